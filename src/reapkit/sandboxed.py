"""What runs inside the sandbox: a program that a model wrote is called on inputs, and what it returns is written out, typed, as JSON lines.

Whether an output is right is decided outside, by whoever knows the expected one: nothing that the program prints or writes can pass for
a verdict, since no verdict is made here. This file needs the standard library alone, and NumPy only where the program returns its numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

# The user nobody. Root starts the sandbox as root and becomes nobody here, because limits on processes do not hold for root.
NOBODY = 65534
_EXACT = 2**53
_DEPTH = 200


# Longer texts, and outputs of more values, leave as digests: right outputs of some problems are a gigabyte.
_LONG_TEXT = 1 << 16
_MANY_VALUES = 1_000_000
_PLAIN = frozenset({str, int, bool, float, type(None)})


@dataclass(frozen=True)
class Digest:
    """An output too large to leave the sandbox; equal to the same output, numbers and their types to the bit."""

    digest: str
    length: int


class Opaque:
    """An output of a type that is not carried out of the sandbox; equal to nothing."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def encoded_output(value: Any) -> Any:
    """`encoded`, or the digest of a value that is large."""
    if _count(value, _MANY_VALUES) <= _MANY_VALUES:
        return encoded(value)
    digest = hashlib.sha256()
    _feed(digest, value, 0)
    return ["digest", digest.hexdigest(), len(value)]


def _count(value: Any, limit: int, depth: int = 0) -> int:
    """How many values there are in a value, or some number over the limit."""
    if not isinstance(value, list | tuple | set | frozenset | dict) or depth > _DEPTH:
        return 1
    total = len(value)
    for part in value.values() if isinstance(value, dict) else value:
        if total > limit:
            break
        if not isinstance(part, str | int | float):
            total += _count(part, limit - total, depth + 1)
    return total


def _feed(digest: Any, value: Any, depth: int) -> None:
    """Add a value to a digest: what is equal, and of equal types, adds the same."""
    kind = type(value)
    if depth > _DEPTH:
        raise ValueError("nested too deeply")
    if kind in (list, tuple):
        digest.update(f"{kind.__name__} {len(value)}:".encode())
        # Whole rows of plain values at a time: one by one takes minutes.
        if frozenset(map(type, value)) <= _PLAIN:
            digest.update(repr(value).encode(errors="surrogatepass"))
        else:
            for part in value:
                _feed(digest, part, depth + 1)
    elif kind in (set, frozenset, dict):
        digest.update(f"{kind.__name__} {len(value)}:".encode())
        for part in sorted(_alone(part, depth) for part in (value.items() if kind is dict else value)):
            digest.update(part)
    elif kind in _PLAIN:
        digest.update(f"{kind.__name__} {value!r}".encode(errors="surrogatepass"))
    else:
        digest.update(os.urandom(32))  # equal to nothing


def _alone(value: Any, depth: int) -> bytes:
    digest = hashlib.sha256()
    _feed(digest, value, depth + 1)
    return digest.digest()


def encoded(value: Any, depth: int = 0, *, is_whole: bool = False) -> Any:
    """A value as JSON that says its types; subclasses count as what they are a kind of.

    Args:
        value: what to write; depth: how deep it lies in another.
        is_whole: long texts as they are, and not as digests.
    """
    if depth > _DEPTH:
        raise ValueError("nested too deeply")
    kind = type(value)
    if kind.__module__ == "numpy" and hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        return ["numpy", value.dtype.name, encoded(value.item(), depth + 1)]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < _EXACT else ["int", hex(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else ["float", str(float(value))]
    if isinstance(value, str) and len(value) > _LONG_TEXT and not is_whole:
        return ["digest", hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest(), len(value)]
    if isinstance(value, str):
        return ["str", [ord(letter) for letter in value]] if _has_surrogates(value) else str(value)
    if isinstance(value, complex):
        return ["complex", encoded(value.real), encoded(value.imag)]
    if isinstance(value, bytes | bytearray):
        return [kind.__name__ if kind in (bytes, bytearray) else "bytes", value.hex()]
    for name, base in (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, base):
            return [name, [encoded(part, depth + 1, is_whole=is_whole) for part in value]]
    if isinstance(value, dict):
        pairs = value.items()
        return ["dict", [[encoded(part, depth + 1, is_whole=is_whole) for part in pair] for pair in pairs]]
    if isinstance(value, Fraction | Decimal):
        return [kind.__name__, str(value)]
    return ["object", f"{kind.__module__}.{kind.__qualname__}"]


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def decoded(value: Any) -> Any:
    """The value that `encoded` wrote.

    Raises:
        ValueError: nothing that `encoded` writes.
    """
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise ValueError("an object")
        return value
    kind, *parts = value
    if kind == "numpy":
        import numpy as np

        return np.dtype(parts[0]).type(decoded(parts[1]))
    if kind == "int":
        return int(parts[0], 16)
    if kind in _SIMPLE:
        return _SIMPLE[kind](*(decoded(part) for part in parts))
    if kind in ("bytes", "bytearray"):
        content = bytes.fromhex(parts[0])
        return content if kind == "bytes" else bytearray(content)
    if kind == "str":
        return "".join(map(chr, parts[0]))
    if kind in _MANY:
        return _MANY[kind](decoded(part) for part in parts[0])
    if kind == "dict":
        return {decoded(key): decoded(part) for key, part in parts[0]}
    if kind == "digest":
        return Digest(str(parts[0]), int(parts[1]))
    if kind == "object":
        return Opaque(str(parts[0]))
    raise ValueError(f"the type {kind!r}")


_SIMPLE: Mapping[str, Any] = {"float": float, "complex": complex, "Fraction": Fraction, "Decimal": Decimal}
_MANY: Mapping[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class _OutOfTimeError(BaseException):
    pass


def main() -> None:
    """Read a task from standard input, run it, and write one line per call: `{"out", "seconds"}`, or `{"error"}` and nothing more."""
    task = json.load(sys.stdin)
    if task["is_confined"] and os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _lower_limits(task["memory"], task["seconds"], task["processes"])
    channel = os.fdopen(os.dup(1), "w", encoding="ascii")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 1000))
    if task["packages"] is not None:
        sys.path.append(task["packages"])

    def say(line: dict[str, Any]) -> None:
        channel.write(json.dumps(line, allow_nan=False) + "\n")
        channel.flush()

    def out_of_time(*_: Any) -> None:
        raise _OutOfTimeError

    signal.signal(signal.SIGPROF, out_of_time)
    try:
        scope: dict[str, Any] = {}
        exec(compile(task["code"], "<reply>", "exec"), scope)
        function = scope[task["entry_point"]]
        say({"ready": True})
        for number, inputs in enumerate(task["inputs"]):
            arguments = decoded(inputs)
            start = time.process_time()
            # Processor time, so that a busy machine fails nobody.
            signal.setitimer(signal.ITIMER_PROF, task["limits"][number])
            try:
                out = function(*arguments)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            seconds = time.process_time() - start
            say({"out": encoded_output(out), "seconds": seconds})
    except _OutOfTimeError:
        say({"error": "out of time"})
    except BaseException as error:
        say({"error": f"{type(error).__name__}: {error}"[:300]})


def _lower_limits(memory: int, seconds: int, processes: int) -> None:
    """For good: nobody can raise them again."""
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_FSIZE, 16 << 20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        _, hard = resource.getrlimit(what)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))


if __name__ == "__main__":
    main()
