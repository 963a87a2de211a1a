"""Files that appear under their name only when they are whole, one run at a time, and one sentence for whatever the system refuses."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from reapkit.errors import OutputError

PARTIAL = ".partial"
REPEAT = "once that is cured, repeat the command"


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
        make_folder(path.parent)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(None, "its folder cannot be written to")


def unfinished(path: Path) -> Path:
    """Where the work towards a file is kept until it is done."""
    return path.with_name(path.name + ".unfinished")


def discard(path: Path) -> None:
    """Remove a file, and what a run that died may have left of writing it.

    Raises:
        OutputError: the system refuses.
    """
    with explained(path, hint=REPEAT):
        path.unlink(missing_ok=True)
        path.with_name(path.name + PARTIAL).unlink(missing_ok=True)


def lock_of(path: Path) -> Path:
    """What is held while a file is worked towards."""
    return path.with_name(path.name + ".lock")


def save(path: Path, content: bytes) -> None:
    """Write a file that the user named.

    Raises:
        OutputError: the system refuses; nothing is left under its own name or another.
    """
    require_target(path)
    with explained(path, hint=REPEAT):
        write_file(path, content)


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when it is whole and on the disk."""
    with appearing(path) as target:
        write_all(target, content)


@contextmanager
def appearing(path: Path) -> Iterator[FileIO]:
    """A new file to write to, which gets its name when it is whole and on the disk; on an error nothing is left of it."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        # What another run left there is not written through: a link may lead anywhere.
        partial.unlink(missing_ok=True)
        with partial.open("xb", buffering=0) as stream:
            yield stream
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_all(target: FileIO, content: bytes | memoryview) -> None:
    """Write all of it: one call writes at most 2 GiB."""
    view = memoryview(content)
    while view:
        view = view[target.write(view) :]


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that a power cut takes none of them once files in it are said to last."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_folder(place.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where folders can be synced at all."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(target: Path, lock: Path) -> Iterator[None]:
    """Work on a target while no other run does; what a run that died left of its lock is taken over.

    The system releases the lock of a process that ends in any way. The file says who holds it, and goes when the work ends.

    Raises:
        OutputError: another run holds the lock; the message says which.
    """
    with explained(target, hint="give another place with -o"):
        make_folder(lock.parent)
        stream = _acquired(target, lock)
        try:
            stream.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            write_all(
                stream, json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}).encode()
            )
        except BaseException:
            lock.unlink(missing_ok=True)
            stream.close()
            raise
    try:
        yield
    finally:
        with stream, explained(target, hint=f"remove {lock}"):
            lock.unlink(missing_ok=True)


def _acquired(target: Path, lock: Path) -> FileIO:
    while True:
        stream = FileIO(lock, "a+b", opener=_open_no_link)
        try:
            if not _lock(stream, lock):
                stream.seek(0)
                raise OutputError(
                    f"{target} is being written by {_holder(stream.read())}", hint="wait for it, or give another place"
                )
            # Its last holder may have removed the file between our opening and our locking it.
            if lock.exists() and os.path.samestat(os.fstat(stream.fileno()), lock.stat()):
                return stream
        except BaseException:
            stream.close()
            raise
        stream.close()


def _open_no_link(path: str, flags: int) -> int:
    # Emptying what a link leads to would destroy another file; a system without such a flag has hardly any links.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _lock(stream: FileIO, lock: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # not a POSIX system: two runs at once go unnoticed
        return True
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network folder without locks
        return True
    return True


def _holder(text: bytes) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it has the lock and has not said so yet
        return "another process"
