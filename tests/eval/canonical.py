"""Run the canonical solutions of HumanEval+ and MBPP+ through the sandbox and the judge, and print how many are right.

    python tests/eval/canonical.py FOLDER [--problems N] [--only mbpp]

FOLDER holds EvalPlus's files HumanEvalPlus-v0.1.10.jsonl.gz and MbppPlus-v0.2.0.jsonl.gz. Exits with 1 unless all are right.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from reapkit.programs import Benchmark, expected, judge, read
from reapkit.sandbox import find

FILES: dict[Benchmark, str] = {"humaneval": "HumanEvalPlus-v0.1.10.jsonl.gz", "mbpp": "MbppPlus-v0.2.0.jsonl.gz"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problems", type=int, help="the first so many of each; all by default")
    parser.add_argument("--only", choices=list(FILES), help="one of the two; both by default")
    arguments = parser.parse_args()
    # References are no endless loops: a busy machine must not make them look like some.
    sandbox = replace(find(), wall_seconds=3600.0)
    print(f"sandbox: {sandbox.kind}", flush=True)
    failed = 0
    for benchmark, name in FILES.items():
        if arguments.only not in (None, benchmark):
            continue
        start, problems = time.monotonic(), read(arguments.folder / name, benchmark)[: arguments.problems]
        base = plus = 0
        for problem in problems:
            verdict = judge(problem, problem.reference, expected(problem, sandbox), sandbox)
            base, plus = base + verdict.base, plus + verdict.plus
            if not verdict.plus:
                print(f"{problem.task_id}: {verdict.reason}", flush=True)
        failed += len(problems) - plus
        seconds = time.monotonic() - start
        print(f"{benchmark}: base {base}/{len(problems)}, plus {plus}/{len(problems)} in {seconds:.0f} s", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
