"""The command line in processes of its own that are disturbed at a chosen system call: killed, interrupted, or told of a broken disk.

Processes are forked from one that has imported everything and run nothing, so that a run is all work. `disturbances.c`, loaded into
them in front of the C library, counts the calls that change (or read) files below a folder and disturbs one of them; without a C
compiler, runs can be killed at random moments only.
"""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from reapkit import verify
from reapkit.checkpoint import Checkpoint
from reapkit.errors import CheckpointError, DataError, ReapkitError
from reapkit.plans import plan
from reapkit.statistics import Statistics

MODEL = Path(__file__).parents[1] / "models/m2-nano"
KINDS = {"count": 1, "kill": 2, "tear": 3, "fail once": 4, "fail on": 5, "signal": 6, "signal on": 7}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
CONTEXT = multiprocessing.get_context("forkserver")
# Servers that were started with the library; a process has one server at a time.
_OURS: set[int | None] = set()
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, and Linux")
REPORTS = Path(__file__).parents[1] / "out/torture"


@dataclass(frozen=True)
class Disturbance:
    """What happens at which call below a folder.

    Attributes:
        kind: one of KINDS.
        below: the folder.
        at: the number of the call, from 1.
        value: the error or the signal.
        reads: count calls that read, in place of those that change something.
        log: where to write a line per call; "" for nowhere.
    """

    kind: str
    below: Path
    at: int = 0
    value: int = 0
    reads: bool = False
    log: str = ""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (minus the signal that killed it) and what it said on standard error."""

    code: int
    said: str


def start(
    words: Sequence[str],
    said: Path,
    disturbance: Disturbance | None = None,
    *,
    prepare: Callable[[], object] | None = None,
) -> BaseProcess:
    """Begin a command in a process of its own; what it says goes to a file, and `prepare` is called there before."""
    _ensure_server()
    said.unlink(missing_ok=True)
    child = CONTEXT.Process(target=_child, args=(list(words), str(said), disturbance, prepare))
    child.start()
    return child


def run(
    words: Sequence[str],
    said: Path,
    disturbance: Disturbance | None = None,
    *,
    prepare: Callable[[], object] | None = None,
) -> Ended:
    """Run a command to its end."""
    child = start(words, said, disturbance, prepare=prepare)
    child.join()
    assert child.exitcode is not None
    return Ended(child.exitcode, said.read_text(encoding="utf-8") if said.exists() else "")


def calls(words: Sequence[str], said: Path, below: Path, *, reads: bool = False) -> list[tuple[str, str]]:
    """The calls of an undisturbed run, in order: what, and the path below the folder."""
    log = said.with_suffix(".log")
    log.unlink(missing_ok=True)
    ended = run(words, said, Disturbance("count", below, reads=reads, log=str(log)))
    assert ended.code == 0, ended.said
    return [(line.split("\t")[0], line.split("\t")[1]) for line in log.read_text(encoding="utf-8").splitlines()]


def _ensure_server() -> None:
    server = forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_pid is not None:
        if server._forkserver_pid in _OURS:
            return
        server._stop()  # another test's, without the library
    if shutil.which("cc") is not None:
        library = Path(tempfile.mkdtemp(prefix="reapkit-")) / "disturbances.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["cc", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        os.environ["LD_PRELOAD"] = str(library)
    try:
        CONTEXT.set_forkserver_preload(
            [
                "reapkit.cli",
                "reapkit.compression",
                "rich.progress",
                "transformers.models.minimax_m2.modeling_minimax_m2",
                "disturbances",
            ]
        )
        forkserver.ensure_running()
        _OURS.add(server._forkserver_pid)
    finally:
        os.environ.pop("LD_PRELOAD", None)


def _child(words: list[str], said: str, disturbance: Disturbance | None, prepare: Callable[[], object] | None) -> None:
    target = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    from reapkit.cli import main

    if prepare is not None:
        prepare()
    if disturbance is not None:
        ctypes.CDLL(None).disturb(
            os.fsencode(disturbance.below),
            os.fsencode(disturbance.log),
            KINDS[disturbance.kind],
            ctypes.c_long(disturbance.at),
            disturbance.value,
            int(disturbance.reads),
        )
    sys.argv = ["reapkit", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which processes forked from a server ignore
    main()


def small_text(path: Path, lines: int) -> Path:
    """So many rows of the bundled model's calibration text."""
    rows = (MODEL / "data/calibration.jsonl").read_text(encoding="utf-8").splitlines()[:lines]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def compressing(out: Path, data: Path) -> list[str]:
    """The command that is disturbed; its activation budget makes it several waves."""
    return [
        "compress", str(MODEL), "--data", str(data), "--ratio", "0.25", "-o", str(out), "--device", "cpu",
        "--dtype", "float32", "--max-length", "512", "--activation-budget", "1300kB",
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def require_honest(out: Path) -> str:
    """What a killed run left: nothing, something that every verb refuses, or all of it."""
    statistics = out / "reapkit/statistics.safetensors"
    if statistics.exists():
        Statistics.load(statistics)
    for sums in out.rglob("*.unfinished"):
        Statistics.load(sums, unfinished=True)
        with pytest.raises(DataError, match="interrupted run"):
            Statistics.load(sums)
    try:
        Checkpoint.open(out)
    except CheckpointError:
        for verb in (lambda: verify(out), lambda: plan(out, criterion="random", keep=40)):
            with pytest.raises(ReapkitError):
                verb()
        return "unfinished" if out.exists() else "absent"
    assert verify(out, source=MODEL).ok
    return "whole"


def record(name: str, figures: Mapping[str, object]) -> None:
    """Keep a test's counts for the page of a full run (make torture); tests run side by side, so each has a file of its own."""
    print(name, json.dumps(figures))
    if "REAPKIT_TORTURE" in os.environ:
        REPORTS.mkdir(parents=True, exist_ok=True)
        path = REPORTS / f"{re.sub('[^a-z0-9]+', '-', name)}.json"
        path.write_text(json.dumps({"name": name, **figures}) + "\n", encoding="utf-8")
