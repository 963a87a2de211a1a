"""Does anything pile up? Compresses the bundled model over and over in one process that lives on, memory and open files recorded.

Every round, a process of its own begins to compress and is killed at a random moment (every third round two after each other); the
process that lives on then goes on with what that left, through the Python API, and what comes out must equal an undisturbed output
byte for byte. Exits with 1 if it does not, if open files or threads are more at the end than after warming up, or if resident memory
has grown: the median of the last fifth of the rounds is compared with that of the first fifth after warming up.

    python benchmarks/soak.py [--minutes 30] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parents[1] / "models/m2-nano"
ROWS = 6
# Caches of torch, transformers and the allocator fill up in the first rounds.
WARM_UP = 5
# Of the resident memory after warming up: the allocator's noise from round to round is less. A leak of 1 MB a round would be ten times
# that in 30 minutes.
GROWTH = 0.05
CONTEXT = multiprocessing.get_context("forkserver")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    CONTEXT.set_forkserver_preload(
        ["reapkit.compression", "transformers.models.minimax_m2.modeling_minimax_m2", "__main__"]
    )
    with tempfile.TemporaryDirectory(prefix="reapkit-soak-") as folder:
        figures = soak(Path(folder), arguments.minutes * 60)
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if figures["ok"] else 1


def soak(folder: Path, seconds: float) -> dict[str, Any]:
    data = folder / "text.jsonl"
    lines = (MODEL / "data/calibration.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    compress(folder / "undisturbed", data)
    expected = contents(folder / "undisturbed")
    begun = time.perf_counter()
    child = CONTEXT.Process(target=compress, args=(folder / "warm", data))
    child.start()
    child.join()
    length = time.perf_counter() - begun

    choose, left = random.Random(0), Counter[str]()
    rounds: list[dict[str, int]] = []
    wrong = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(rounds) < 3 * WARM_UP:
        out = folder / "out"
        for _ in range(2 if len(rounds) % 3 == 2 else 1):
            begun = time.perf_counter()
            child = CONTEXT.Process(target=compress, args=(out, data))
            child.start()
            child.join(choose.uniform(0.02, 1.1) * length)
            if child.is_alive():
                left["killed"] += 1
            else:
                length = min(length, time.perf_counter() - begun)
                left["done before"] += 1
            child.kill()
            child.join()
            child.close()
        compress(out, data)
        wrong += contents(out) != expected
        shutil.rmtree(out)
        rounds.append(used())
        if len(rounds) % 20 == 0:
            print(f"{len(rounds)} rounds: {rounds[-1]}", file=sys.stderr, flush=True)

    after = rounds[WARM_UP:]
    fifth = max(1, len(after) // 5)
    first, last = (
        statistics.median(used["resident_bytes"] for used in part) for part in (after[:fifth], after[-fifth:])
    )
    piled_up = {name: after[-1][name] - max(used[name] for used in after[:fifth]) for name in ("open_files", "threads")}
    ok = not wrong and last <= first * (1 + GROWTH) and all(more <= 0 for more in piled_up.values())
    return {
        "minutes": round(seconds / 60, 1),
        "rounds": len(rounds),
        "runs": {**left, "finished in the living process": len(rounds)},
        "wrong_outputs": wrong,
        "resident_bytes": {
            "first": int(first),
            "last": int(last),
            "most": max(used["resident_bytes"] for used in rounds),
        },
        "open_files": {"first": after[0]["open_files"], "last": after[-1]["open_files"]},
        "threads": {"first": after[0]["threads"], "last": after[-1]["threads"]},
        "ok": ok,
    }


def compress(out: Path, data: Path) -> None:
    from reapkit import Run, compress
    from reapkit.compression import Target

    run = Run(device="cpu", dtype="float32", activation_budget=1_300_000)
    compress(MODEL, out, Target(ratio="0.25"), data=[str(data)], run=run, max_length=512)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def used() -> dict[str, int]:
    """What this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "open_files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "threads": threading.active_count(),
    }


if __name__ == "__main__":
    sys.exit(main())
