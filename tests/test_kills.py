"""`compress` killed at any moment: its output never looks finished when it is not, and the same command ends in the same bytes.

`make test` kills it 20 times, `make torture` 200 times (REAPKIT_KILLS); test_boundaries.py kills it at every system call.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import disturbances
from disturbances import contents, require_honest

COUNT = int(os.environ.get("REAPKIT_KILLS", "20"))


def test_a_compress_that_is_killed_anywhere_is_honest_and_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    data = disturbances.small_text(tmp_path / "text.jsonl", 6)
    said = tmp_path / "said"
    assert disturbances.run(disturbances.compressing(tmp_path / "warm", data), said).code == 0
    lengths = []
    for name in ("undisturbed", "again"):
        begun = time.perf_counter()
        assert disturbances.run(disturbances.compressing(tmp_path / name, data), said).code == 0
        lengths.append(time.perf_counter() - begun)
    length = min(lengths)  # what else runs here makes it longer, not shorter
    expected = contents(tmp_path / "undisturbed")
    choose = random.Random(0)
    states = Counter[str]()
    for number in range(COUNT):
        out = tmp_path / f"killed-{number}"
        for _ in range(choose.choice((1, 1, 2))):
            child = disturbances.start(disturbances.compressing(out, data), said)
            child.join(choose.uniform(0.02, 1.1) * length)
            child.kill()
            child.join()
            states[require_honest(out)] += 1
        ended = disturbances.run(disturbances.compressing(out, data), said)
        assert ended.code == 0, f"the run that was killed as number {number} does not go on: {ended.said}"
        assert contents(out) == expected
        shutil.rmtree(out)
    disturbances.record(
        "kills at random moments", {"test": "kills at random moments", "kills": states.total(), **states}
    )
    assert {"unfinished", "whole"} <= states.keys(), "the moments do not cover the run"
