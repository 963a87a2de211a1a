"""Is the activation budget honoured within 10 %? What is held must grow with it, and by no more.

Observes one synthetic MiniMax-M2 checkpoint at two budgets, each in a process of its own on the same text, and compares the peaks of
resident memory. Exits with 1 if they differ by more than 1.1 times, or less than 0.9 times, what the suspended activations were said to
differ by, or if activations were to take more than the budget.

    python benchmarks/activation_budget.py [--budgets 40000000 210000000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from observe_memory import DOCUMENT_TOKENS, WORDS, make, mb, peak_bytes

NUM_LAYERS = 2
NUM_DOCUMENTS = 96
TOLERANCE = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budgets", type=int, nargs=2, default=(40_000_000, 210_000_000), metavar=("SMALL", "LARGE"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "BUDGET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, budget = arguments.child
        observe(Path(folder), int(budget)) if int(budget) else prepare(Path(folder))
        return 0

    with tempfile.TemporaryDirectory(prefix="reapkit-budget-") as folder:
        in_child(folder, 0)
        runs = [{"budget_bytes": budget, **in_child(folder, budget)} for budget in arguments.budgets]
    small, large = runs
    held = large["held_bytes"] - small["held_bytes"]
    growth = large["peak_bytes"] - small["peak_bytes"]
    ok = abs(growth / held - 1) <= TOLERANCE and all(run["held_bytes"] <= run["budget_bytes"] for run in runs)
    print(f"{'budget':>9}  {'to hold':>9}  {'waves':>5}  {'peak':>9}  {'time':>6}")
    for run in runs:
        print(
            f"{mb(run['budget_bytes']):>9}  {mb(run['held_bytes']):>9}  {run['waves']:>5}  "
            f"{mb(run['peak_bytes']):>9}  {run['seconds']:>4.0f} s"
        )
    print(f"the peak grows by {growth / held:.3f} of what more was to be held: {'within' if ok else 'NOT WITHIN'} 10 %")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"runs": runs, "slope": growth / held, "ok": ok}, indent=2) + "\n", encoding="utf-8"
        )
    return 0 if ok else 1


def in_child(folder: str, budget: int) -> dict[str, Any]:
    """Run in a process of its own, which inherits no peak; a budget of 0 makes the checkpoint."""
    command = [sys.executable, __file__, "--child", folder, str(budget)]
    reply = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(reply)) if reply.strip() else {}


def prepare(folder: Path) -> None:
    make(folder, NUM_LAYERS)
    words = random.Random(0)
    documents = [" ".join(str(words.randrange(2, WORDS)) for _ in range(DOCUMENT_TOKENS)) for _ in range(NUM_DOCUMENTS)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def observe(folder: Path, budget: int) -> None:
    """Observe and print the figures; the peak is this process's own."""
    from reapkit.observation import ACTIVATIONS, Observation, Run

    run = Run(device="cpu", dtype="float32", activation_budget=budget)
    observation = Observation(folder, [str(folder / "text.jsonl")], run=run, max_length=DOCUMENT_TOKENS, seed=0)
    start = time.perf_counter()
    observation.run()
    figures = {
        "held_bytes": observation.memory()[ACTIVATIONS],
        "waves": len(observation.waves),
        "peak_bytes": peak_bytes(),
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(main())
