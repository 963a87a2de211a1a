"""Files that appear under their name only when they are whole, and one sentence for whatever the system refuses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from reapkit.errors import OutputError

PARTIAL = ".partial"


@contextmanager
def explained(target: Path, *, hint: str) -> Iterator[None]:
    """Turn an OSError into an `OutputError` that names the target."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"writing to {target} stopped: {error.strerror or error}", hint=hint) from error


def require_target(path: Path) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Raises:
        OutputError: a folder stands there, or its own folder cannot be made or written to.
    """
    if path.is_dir():
        raise OutputError(f"the output {path} is a folder", hint=f"name a file in it: {path / 'NAME'}")
    with explained(path, hint="give another place with -o"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(None, "its folder cannot be written to")


def unfinished(path: Path) -> Path:
    """Where the work towards a file is kept until it is done."""
    return path.with_name(path.name + ".unfinished")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside the target, bring it to the disk, and rename it.

    Raises:
        OutputError: the system refuses; nothing is left under either name.
    """
    require_target(path)
    partial = path.with_name(path.name + PARTIAL)
    with explained(path, hint="once that is cured, repeat the command"):
        try:
            write(partial)
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
