"""Every failure that a user can cause or cure is one of these; anything else that escapes is a bug.

The command line prints `message`, then `hint` on a line of its own, and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable

# A name from a stranger's file may have megabytes; nobody reads on after a screen.
LONGEST_MESSAGE = 4_000
# A hub token; user and password in an address; what an address's query or a header says under such a name.
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+@")
_NAMED = re.compile(r"([?&][\w-]*(?:key|token|secret|password)=|\bbearer (?=\S{16}))[^\s&#\"'<>]+", re.IGNORECASE)
_TOKEN_VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "REAPKIT_API_KEY", "VLLM_API_KEY", "OPENAI_API_KEY",
)  # fmt: skip


class ReapkitError(Exception):
    """A failure with a sentence for the user and, where there is one, a way out.

    Args:
        message: what happened, with the numbers or names.
        hint: what to do about it, as an instruction; None where nothing can be done.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message = redacted(message)
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[:LONGEST_MESSAGE]}… ({len(message):,} characters)"
        super().__init__(message)
        self.message = message
        self.hint = None if hint is None else redacted(hint)[:LONGEST_MESSAGE]


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


class ServerError(ReapkitError):
    """A server that did not start, ended, or answers otherwise than it should."""


class HubError(ReapkitError):
    """The hub, or what stands in front of it, does not give what was asked for."""


class EndpointError(ReapkitError):
    """A server that does not answer, or not as it should."""


class EvaluationError(ReapkitError):
    """A benchmark that cannot be run or scored here."""


class SandboxError(ReapkitError):
    """Programs that a model wrote cannot be confined here."""


class UsageError(ReapkitError):
    """Arguments that contradict each other or lack something."""

    exit_code = 2


def require_used(given: Iterable[str], used: Collection[str], mode: str) -> None:
    """Refuse options that would change nothing, rather than ignore them.

    Args:
        given: names of options, as Python spells them.
        used: those that the mode uses.
        mode: what the others do not go with, in words.

    Raises:
        UsageError: one is not used.
    """
    for name in sorted(set(given) - set(used)):
        option = "--" + name.replace("_", "-")
        raise UsageError(f"{option} does not go with {mode}, which would ignore it", hint=f"leave out {option}")


def is_failure(error: BaseException) -> bool:
    """Whether a library failed: an Exception, or a panic of its Rust part, which is none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def reason_of(error: BaseException) -> str:
    """The first line of what a library says, else the kind of its error."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def redacted(text: str) -> str:
    """A text without the tokens of the hub and the keys of servers, and without user, password and token in addresses."""
    for name in _TOKEN_VARIABLES:
        if len(secret := os.environ.get(name, "").strip()) >= 8:
            text = text.replace(secret, "***")
    return _NAMED.sub(r"\1***", _CREDENTIALS.sub("***@", _TOKEN.sub("***", text)))


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A hint that names the closest known word, else all of them."""
    words = sorted(known)
    close = difflib.get_close_matches(given[:100], words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(words)}"
