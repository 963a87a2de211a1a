"""Whether the final answer of a mathematical reply is the right one, by math-verify.

math-verify stops what takes too long by a signal, which works in a process's main thread alone; so answers are graded in a process of their
own, which also keeps what SymPy does to itself out of ours.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager

from reapkit.errors import EvaluationError


class Grader:
    """A process that grades; use `grading`, which ends it."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def submit(self, reply: str, answer: str) -> Future[bool]:
        """Whether a reply without thinking ends in an answer equal to the right one, given in LaTeX."""
        return self._pool.submit(is_right, reply, answer)


@contextmanager
def grading() -> Iterator[Grader]:
    """A grader, for as long as it is needed.

    Raises:
        EvaluationError: math-verify is not installed.
    """
    try:
        import math_verify  # noqa: F401
    except ImportError:
        raise EvaluationError("grading mathematics needs math-verify", hint="pip install 'reapkit[eval]'") from None
    pool = ProcessPoolExecutor(
        max_workers=1, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    try:
        yield Grader(pool)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """A pool's process waits for work for ever where the one that gives it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def is_right(reply: str, answer: str) -> bool:
    """As `Grader.submit`, here and now; in a main thread only.

    An answer that is literally the right one is right whatever math-verify can parse.
    """
    from math_verify import parse, verify

    given = boxed(reply)
    if given is not None and _plain(given) == _plain(answer):
        return True
    # The last box decides; a reply without one is read whole, as math-verify does.
    said = reply if given is None else f"\\boxed{{{given}}}"
    return bool(verify(parse(f"${answer}$"), parse(said)))


def boxed(reply: str) -> str | None:
    """What stands in a reply's last \\boxed{}; None where there is none that is closed."""
    start = reply.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for place in range(begin, len(reply)):
        if reply[place] in "{}" and reply[place - 1] != "\\":
            depth += 1 if reply[place] == "{" else -1
            if not depth:
                return reply[begin:place]
    return None


def _plain(answer: str) -> str:
    """Without what changes the look of an answer and not the answer."""
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", answer)
    text = re.sub(
        r"\\(?:left|right|,|;|!|quad)(?![a-zA-Z])|\\ |\$",
        "",
        text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"),
    )
    return "".join(text.split())
