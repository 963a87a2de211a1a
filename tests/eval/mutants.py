"""Hold the judge to EvalPlus's own: programs that are nearly right get the same verdict from both, on the base tests and on the plus tests.

    python tests/eval/mutants.py FOLDER [--count 200] [--seed 0]

Canonical solutions of HumanEval+ and MBPP+ are changed in one place each: an operator, a comparison, a constant, a condition, a return.
FOLDER holds EvalPlus's files. Needs evalplus 0.3.1, whose `untrusted_check` runs the mutants in a child process: they are made here and
harmless. Exits with 1 where a verdict differs.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ["EVALPLUS_MAX_MEMORY_BYTES"] = str(8 << 30)  # the sandbox's limit

from canonical import FILES
from evalplus.eval import untrusted_check

from reapkit.programs import Problem, expected, judge, read
from reapkit.sandbox import find

COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.FloorDiv,
    ast.Mod: ast.Mult,
}
# Problems whose references are slow or large: nothing is learnt from them that others do not show.
LONGEST_SECONDS, MOST_BYTES = 1.0, 4 << 20


def changed(tree: ast.AST) -> Iterator[str]:
    """Every way of changing a program in one place, as what was changed; the tree is changed while each is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
            old, node.ops[0] = node.ops[0], COMPARISONS[type(node.ops[0])]()
            yield "comparison"
            node.ops[0] = old
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            operator, node.op = node.op, OPERATORS[type(node.op)]()
            yield "operator"
            node.op = operator
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            value, node.value = node.value, node.value + 1
            yield "constant"
            node.value = value
        elif isinstance(node, ast.If):
            test, node.test = node.test, ast.UnaryOp(ast.Not(), node.test)
            yield "condition"
            node.test = test
        elif isinstance(node, ast.Return) and node.value is not None:
            returned, node.value = node.value, ast.Tuple([node.value], ast.Load())
            yield "return"
            node.value = returned


def mutants(problem: Problem) -> list[tuple[str, str]]:
    tree = ast.parse(problem.reference)
    return [(kind, ast.unparse(ast.fix_missing_locations(tree))) for kind in changed(tree)]


def theirs(problem: Problem, code: str, outputs: tuple, limits: tuple, inputs: tuple) -> bool:
    # EvalPlus takes the references' times and multiplies them itself.
    times = [limit / 4 for limit in limits]
    found, _ = untrusted_check(
        problem.benchmark, code, list(inputs), problem.entry_point, list(outputs), problem.atol, times, fast_check=True
    )
    return found == "pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator, sandbox, start = random.Random(arguments.seed), find("bubblewrap"), time.monotonic()
    problems = [problem for benchmark, name in FILES.items() for problem in read(arguments.folder / name, benchmark)]
    # HumanEval/32: the release fails every program, see reapkit.programs.
    problems = [problem for problem in problems if problem.task_id != "HumanEval/32"]
    generator.shuffle(problems)
    verdicts: Counter[str] = Counter()
    different = 0
    for problem in problems:
        if verdicts.total() >= arguments.count:
            break
        wanted = expected(problem, sandbox)
        if wanted.nbytes > MOST_BYTES or max(wanted.base_limits + wanted.plus_limits) > LONGEST_SECONDS:
            continue
        if not (choices := mutants(problem)):
            continue
        _, code = generator.choice(choices)
        ours = judge(problem, code, wanted, replace(sandbox, cpu_seconds=20))
        base = theirs(problem, code, wanted.base, wanted.base_limits, problem.base_input)
        plus = base and theirs(problem, code, wanted.plus, wanted.plus_limits, problem.plus_input)
        verdicts["plus" if plus else "base only" if base else "wrong"] += 1
        if (ours.base, ours.plus) != (base, plus):
            different += 1
            print(
                f"{problem.task_id}: EvalPlus says {base}, {plus}; ours {ours.base}, {ours.plus}: {ours.reason}\n{code}",
                flush=True,
            )
    seconds = time.monotonic() - start
    print(f"{verdicts.total()} mutants, {dict(verdicts)}, {different} judged differently, {seconds:.0f} s")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
