"""`compress` killed at any moment: its output never looks finished when it is not, and the same command ends in the same bytes.

`make test` kills it 20 times, `make torture` 200 times (REAPKIT_KILLS).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest

from reapkit import verify
from reapkit.checkpoint import Checkpoint
from reapkit.compression import Target, compress
from reapkit.errors import CheckpointError, DataError, ReapkitError
from reapkit.observation import Run
from reapkit.plans import plan
from reapkit.statistics import Statistics

MODEL = Path(__file__).parents[1] / "models/m2-nano"
COUNT = int(os.environ.get("REAPKIT_KILLS", "20"))
# Children are forked from a process that has imported everything and run nothing, so that a run is all work.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["reapkit.compression", "transformers.models.minimax_m2.modeling_minimax_m2", "test_kills"]
)


def run(out: Path, data: Path) -> None:
    run = Run(device="cpu", dtype="float32", activation_budget=8 << 20)
    compress(MODEL, out, Target(ratio="0.25"), data=[str(data)], run=run, max_length=512)


def start(out: Path, data: Path) -> multiprocessing.process.BaseProcess:
    child = CONTEXT.Process(target=run, args=(out, data))
    child.start()
    return child


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def require_honest(out: Path, tmp_path: Path) -> str:
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


def test_a_compress_that_is_killed_anywhere_is_honest_and_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    lines = (MODEL / "data/calibration.jsonl").read_text(encoding="utf-8").splitlines()[:48]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    start(tmp_path / "warm", data).join()
    begun = time.perf_counter()
    child = start(tmp_path / "undisturbed", data)
    child.join()
    length = time.perf_counter() - begun
    assert child.exitcode == 0
    expected = contents(tmp_path / "undisturbed")
    choose = random.Random(0)
    states = []
    for number in range(COUNT):
        out = tmp_path / f"killed-{number}"
        for _ in range(choose.choice((1, 1, 2))):
            child = start(out, data)
            child.join(choose.uniform(0.02, 1.1) * length)
            child.kill()
            child.join()
            states.append(require_honest(out, tmp_path))
        child = start(out, data)
        child.join()
        assert child.exitcode == 0, f"the run that was killed as number {number} does not go on"
        assert contents(out) == expected
    print({state: states.count(state) for state in sorted(set(states))})
    assert {"unfinished", "whole"} <= set(states), "the moments do not cover the run"
