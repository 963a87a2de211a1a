"""Every failure that a user can cause or cure is one of these; anything else that escapes is a bug.

The command line prints `message`, then `hint` on a line of its own, and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ReapkitError(Exception):
    """A failure with a sentence for the user and, where there is one, a way out.

    Args:
        message: what happened, with the numbers or names.
        hint: what to do about it, as an instruction; None where nothing can be done.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CheckpointError(ReapkitError):
    """The checkpoint on disk is damaged, incomplete or not what its config says."""


class UnsupportedError(ReapkitError):
    """A family, format or option that reapkit does not handle."""


class DataError(ReapkitError):
    """Calibration data that cannot be read or understood."""


class PlanError(ReapkitError):
    """A plan that cannot be made or does not fit the checkpoint."""


class OutputError(ReapkitError):
    """The output cannot be written where it was asked for."""


class ResourceError(ReapkitError):
    """The machine has too little memory for what was asked."""


class UsageError(ReapkitError):
    """Arguments that contradict each other or lack something."""

    exit_code = 2


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A hint that names the closest known word, else all of them."""
    words = sorted(known)
    close = difflib.get_close_matches(given, words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(words)}"
