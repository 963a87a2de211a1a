"""Ctrl-C: at the next safe point where work would be lost, at once where none would be; pressed again, at once everywhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The user, or whoever runs the machine, asked the program to stop.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


@dataclass
class _State:
    until: str | None = None
    signum: int | None = None
    is_stopping: bool = False


_state = _State()


@contextmanager
def deferred(until: str) -> Iterator[None]:
    """Work that is stopped at its safe points alone; `until` says when the next one comes, as in "until the wave is done"."""
    before, _state.until = _state.until, until
    try:
        yield
    finally:
        _state.until = before


def is_asked_to_stop() -> bool:
    """Whether the next safe point will stop."""
    return _state.signum is not None


def safe_point() -> None:
    """Stop here if that was asked for: nothing is lost.

    Raises:
        Interrupted: it was.
    """
    if _state.signum is not None:
        _state.is_stopping = True
        raise Interrupted(_state.signum)


def ignore_once_stopping() -> None:
    """For a whole program: a signal that comes when one has stopped it already does not change how it ends.

    Threads that wrote when it was stopped take away what they had begun, and who presses Ctrl-C four times means no more than by two.
    """

    def hear(signum: int, frame: FrameType | None) -> None:
        if not _state.is_stopping:
            raise Interrupted(signum)

    for number in SIGNALS:
        signal.signal(number, hear)


@contextmanager
def heard(announce: Callable[[str], None]) -> Iterator[None]:
    """Listen to SIGINT and SIGTERM; `announce` is told when the work that defers them will stop."""

    def hear(signum: int, frame: FrameType | None) -> None:
        if _state.until is None or _state.signum is not None:
            _state.is_stopping = True
            raise Interrupted(signum)
        _state.signum = signum
        announce(_state.until)

    _state.signum, _state.is_stopping = None, False
    if threading.current_thread() is not threading.main_thread():  # where the system delivers no signals
        yield
        return
    before = {number: signal.signal(number, hear) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Work that is given up after so many seconds, between two steps of Python; only the main thread can be told the time.

    Raises:
        TimeoutError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes longer than {seconds:g} seconds")

    handler = signal.signal(signal.SIGALRM, expire)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)
