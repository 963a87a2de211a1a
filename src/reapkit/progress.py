"""How long work reports how far it is: a function that is handed in, so that no module below the command line prints."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with a task's name, how much is done, how much there is, and the unit (`B`, `tokens`, `layers`)."""

    def __call__(self, task: str, done: float, total: float, unit: str) -> None: ...


def silent(task: str, done: float, total: float, unit: str) -> None:
    """A `Progress` that says nothing."""
