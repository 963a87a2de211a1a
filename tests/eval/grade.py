"""Put MATH-500's own answers through the grader: every one must be right, and the next problem's answer wrong unless it is the same.

    python tests/eval/grade.py MATH-500.jsonl.gz

Three forms: the worked solution as a reply, the answer in a box with math-verify alone (no comparison of texts), and the next problem's
answer. Exits with 1 where an answer of its own is called wrong.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from math_verify import parse, verify

from reapkit.grading import is_right


def main() -> None:
    rows = [json.loads(line) for line in gzip.decompress(Path(sys.argv[1]).read_bytes()).decode().splitlines()]
    forms = {
        "worked solutions": [row for row in rows if not is_right(row["solution"], row["answer"])],
        "answers by math-verify alone": [
            row for row in rows if not verify(parse(f"${row['answer']}$"), parse(f"\\boxed{{{row['answer']}}}"))
        ],
    }
    for name, wrong in forms.items():
        print(f"{name}: {len(rows) - len(wrong)}/{len(rows)}")
        for row in wrong:
            print(f"  {row['unique_id']}: {row['answer']}")
    others = list(zip(rows, rows[1:] + rows[:1], strict=True))
    same = [(one, other) for one, other in others if is_right(f"\\boxed{{{other['answer']}}}", one["answer"])]
    print(f"the next problem's answer is called right: {len(same)}/{len(rows)}")
    for one, other in same:
        print(f"  {one['unique_id']}: {one['answer']} and {other['answer']}")
    sys.exit(any(forms.values()))


if __name__ == "__main__":
    main()
