"""HumanEval(+) and MBPP(+): whether a program solves a problem, judged as EvalPlus 0.3.1 judges it, with the program in a sandbox.

The problems are EvalPlus's data files. A program is right on the base tests when it is on `base_input`, and right on the plus tests when it
is on these and on `plus_input`. What differs from EvalPlus, and why:

- Outputs leave the sandbox and are compared outside, so a program that knows the harness cannot pass for right. Outputs of types of its own
  making (with an `__eq__` that is always true, say), and NumPy arrays, are wrong.
- Limits on time are processor time, as is the references' time that they are multiples of: a busy machine fails nobody.
- Texts of over 65,536 characters and outputs of over a million values are compared exactly, by digests.
- 8 GiB of address space and not 4, under which two of MBPP+'s own solutions fail.
- HumanEval/32 has its oracle only, as in EvalPlus's later sources; the release fails every program.

Sources: EvalPlus (arXiv 2305.01210), `evalplus/eval/__init__.py`, `_special_oracle.py` and `data/mbpp.py` of the release 0.3.1.
"""

from __future__ import annotations

import ast
import gzip
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from reapkit.errors import EvaluationError
from reapkit.sandbox import Ran, Sandbox
from reapkit.sandboxed import Opaque, decoded

Benchmark = Literal["humaneval", "mbpp"]

# EvalPlus: a call may take four times as long as the reference, and a second at least.
TIME_FACTOR = 4.0
LEAST_SECONDS = 1.0
# EvalPlus's tolerance where the data names none and floats are expected.
FLOAT_TOLERANCE = 1e-6
RELATIVE_TOLERANCE = 1e-7
# What a program may return beyond four times what the reference does.
SPARE_BYTES = 1 << 20
# The references are trusted to end, however busy the machine is.
REFERENCE_SECONDS = 50.0
REFERENCE_WALL_SECONDS = 3600.0

# MBPP: outputs compared as sets, and outputs of which only whether they are None is compared.
_AS_SETS = {"similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum", "intersection_array",
            "find_dissimilar", "Diff"}  # fmt: skip
_NOT_NONE = {"check_str", "text_match_three", "text_starta_endb"}


@dataclass(frozen=True)
class Problem:
    """One problem of an EvalPlus file.

    Attributes:
        benchmark: humaneval or mbpp.
        task_id: such as HumanEval/0.
        prompt: a signature with a docstring, or a docstring with an assertion.
        entry_point: the function to write.
        canonical_solution: what, after the prompt, solves it.
        base_input, plus_input: arguments of every call.
        atol: absolute tolerance, 0 where equality is asked for.
    """

    benchmark: Benchmark
    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    base_input: tuple[Any, ...]
    plus_input: tuple[Any, ...]
    atol: float

    @property
    def reference(self) -> str:
        return self.prompt + self.canonical_solution


@dataclass(frozen=True)
class Expected:
    """What the reference returns, and how long every call may take at least.

    Attributes:
        base, plus: outputs; base_limits, plus_limits: processor seconds.
        nbytes: of the longer outputs as JSON.
    """

    base: tuple[Any, ...]
    plus: tuple[Any, ...]
    base_limits: tuple[float, ...]
    plus_limits: tuple[float, ...]
    nbytes: int


@dataclass(frozen=True)
class Verdict:
    """Whether a program is right on the base tests and on all, and what was wrong first."""

    base: bool
    plus: bool
    reason: str | None


def read(path: Path, benchmark: Benchmark) -> list[Problem]:
    """The problems of an EvalPlus file, `.jsonl` or `.jsonl.gz`.

    Raises:
        EvaluationError: the file cannot be read or is another.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [_problem(row, benchmark) for row in rows]
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path} holds no problems of EvalPlus: {type(error).__name__}: {error}") from None


def _problem(row: Mapping[str, Any], benchmark: Benchmark) -> Problem:
    task_id, inputs = row["task_id"], [row["base_input"], row["plus_input"] or []]
    if benchmark == "mbpp":
        inputs = [_retyped(int(task_id.partition("/")[2]), part) for part in inputs]
    return Problem(
        benchmark,
        task_id,
        row["prompt"],
        row["entry_point"],
        row["canonical_solution"],
        tuple(inputs[0]),
        tuple(inputs[1]),
        row["atol"],
    )


def expected(problem: Problem, sandbox: Sandbox) -> Expected:
    """Run the reference.

    Raises:
        EvaluationError: it does not come to its end.
    """
    sandbox = replace(sandbox, wall_seconds=max(sandbox.wall_seconds, REFERENCE_WALL_SECONDS))
    parts: list[tuple[Any, ...]] = []
    nbytes = 0
    for inputs in (problem.base_input, problem.plus_input):
        ran = sandbox.call(problem.reference, problem.entry_point, inputs, [REFERENCE_SECONDS] * len(inputs))
        outputs, reason = _outputs(ran, len(inputs))
        if reason is not None:
            raise EvaluationError(f"the reference of {problem.task_id} does not run in the sandbox: {reason}")
        if problem.benchmark == "mbpp" and problem.entry_point in _NOT_NONE:
            outputs = [output is not None for output in outputs]
        seconds = [line["seconds"] for line in ran.lines[1:]]
        nbytes = max(nbytes, ran.nbytes)
        parts += [tuple(outputs), tuple(max(LEAST_SECONDS, TIME_FACTOR * time) for time in seconds)]
    return Expected(parts[0], parts[2], parts[1], parts[3], nbytes)


def judge(problem: Problem, code: str, wanted: Expected, sandbox: Sandbox) -> Verdict:
    """Run a program on the problem's inputs and compare."""
    # Numbers are equal in several ways of writing them.
    sandbox = replace(sandbox, output_bytes=4 * wanted.nbytes + SPARE_BYTES)
    reason = _first_wrong(problem, code, problem.base_input, wanted.base, wanted.base_limits, sandbox)
    if reason is not None:
        return Verdict(False, False, f"base tests: {reason}")
    reason = _first_wrong(problem, code, problem.plus_input, wanted.plus, wanted.plus_limits, sandbox)
    return Verdict(True, reason is None, None if reason is None else f"plus tests: {reason}")


def _first_wrong(
    problem: Problem, code: str, inputs: Sequence[Any], wanted: Sequence[Any], limits: Sequence[float], sandbox: Sandbox
) -> str | None:
    outputs, reason = _outputs(sandbox.call(code, problem.entry_point, inputs, limits), len(inputs))
    right = _oracle(problem)
    atol = problem.atol
    for number, output in enumerate(outputs):
        arguments, target = inputs[number], wanted[number]
        if atol == 0 and _are_floats(target):
            atol = FLOAT_TOLERANCE  # from here on, as EvalPlus does
        try:
            if not right(arguments, output, target, atol):
                return f"call {number + 1} of {len(inputs)} returns {output!r:.100}, expected {target!r:.100}"
        except Exception as error:
            return f"call {number + 1} of {len(inputs)} returns what cannot be compared: {type(error).__name__}"
    return reason


def _outputs(ran: Ran, count: int) -> tuple[list[Any], str | None]:
    """The outputs of a run, and why there are fewer than there should be, or more."""
    outputs: list[Any] = []
    if not ran.lines or ran.lines[0] != {"ready": True}:
        said = ran.lines[0].get("error") if ran.lines and isinstance(ran.lines[0], dict) else None
        return outputs, str(said or ran.problem or "it wrote nothing")
    for line in ran.lines[1:]:
        if not isinstance(line, dict) or "out" not in line:
            return outputs, str(line.get("error") if isinstance(line, dict) else "it wrote what is no output")
        try:
            outputs.append(decoded(line["out"]))
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
            OverflowError,
            RecursionError,
            ArithmeticError,
        ):
            return outputs, "it wrote what is no output"
    if len(outputs) != count:
        return outputs[:count], ran.problem or f"it returned {len(outputs)} times for {count} calls"
    return outputs, ran.problem


Oracle = Callable[[Sequence[Any], Any, Any, float], bool]


def _oracle(problem: Problem) -> Oracle:
    special = _ORACLES.get((problem.benchmark, problem.entry_point))
    if special is not None:
        return special
    if problem.benchmark == "mbpp" and problem.entry_point in _AS_SETS:
        return lambda arguments, output, target, atol: bool(set(output) == set(target))
    if problem.benchmark == "mbpp" and problem.entry_point in _NOT_NONE:
        return lambda arguments, output, target, atol: (
            target == (output if isinstance(output, bool) else output is not None)
        )
    return lambda arguments, output, target, atol: _is_close(output, target, atol)


def _is_close(output: Any, target: Any, atol: float) -> bool:
    if output == target:
        return True
    if atol == 0 or isinstance(output, Opaque) or type(output) is not type(target):
        return False
    if isinstance(target, list | tuple) and len(output) != len(target):
        return False
    return bool(np.allclose(output, target, rtol=RELATIVE_TOLERANCE, atol=atol))


def _are_floats(value: Any) -> bool:
    if isinstance(value, list | tuple) and value:
        return all(isinstance(part, float) for part in value)
    return isinstance(value, float)


def _is_root(arguments: Sequence[Any], output: Any, target: Any, atol: float) -> bool:
    """HumanEval/32: any root of the polynomial will do."""
    return bool(
        abs(sum(coefficient * math.pow(output, power) for power, coefficient in enumerate(arguments[0]))) <= atol
    )


def _surface(arguments: Sequence[Any], output: Any, target: Any, atol: float) -> bool:
    """Mbpp/581: the height may be that of the pyramid, or that of its sides."""
    base, height = arguments
    slant = math.sqrt((base / 2) ** 2 + height**2)
    return bool(_is_close(output, target, atol) or abs(output - round(base**2 + 4 * (base * slant) / 2)) <= atol)


def _digit_distance(arguments: Sequence[Any], output: Any, target: Any, atol: float) -> bool:
    """Mbpp/558: the shorter number may be padded with zeros."""
    one, other = (str(number) for number in arguments)
    width = max(len(one), len(other))
    pairs = zip(one.zfill(width), other.zfill(width), strict=True)
    return bool(_is_close(output, target, atol) or output == sum(abs(int(a) - int(b)) for a, b in pairs))


_ORACLES: Mapping[tuple[str, str], Oracle] = {
    ("humaneval", "find_zero"): _is_root,
    # Mbpp/164: EvalPlus takes any output.
    ("mbpp", "are_equivalent"): lambda arguments, output, target, atol: True,
    ("mbpp", "sum_div"): lambda arguments, output, target, atol: bool(_is_close(output, target, atol) or output == 0),
    ("mbpp", "surface_Area"): _surface,
    ("mbpp", "digit_distance_nums"): _digit_distance,
}


# --- inputs that JSON cannot hold, by MBPP's task numbers (evalplus/data/mbpp.py)

_INNER_TUPLES = {
    2,
    116,
    132,
    143,
    222,
    261,
    273,
    394,
    399,
    421,
    424,
    429,
    470,
    560,
    579,
    596,
    616,
    630,
    726,
    740,
    744,
    809,
}
_TUPLES_IN_LISTS = {63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780}
_TUPLES_IN_FIRST = {75, 413, 444, 753}
_SECOND_TUPLE = {106, 750}
_FIRST_TUPLE = {250, 405, 446, 617, 720, 763, 808}
_TUPLES_OF_TUPLES = {259, 401, 445}
_ALL_TUPLES = {580, 615, 791}


def _retyped(number: int, inputs: Iterable[Any]) -> list[Any]:
    def deep(value: Any) -> Any:
        return tuple(map(deep, value)) if isinstance(value, list) else value

    def retype(call: Any) -> Any:
        if number in _INNER_TUPLES:
            return [tuple(part) for part in call]
        if number in _TUPLES_IN_LISTS:
            return [[tuple(item) for item in part] for part in call]
        if number in _TUPLES_IN_FIRST:
            return [[tuple(item) for item in call[0]], call[1]]
        if number in _SECOND_TUPLE:
            return [call[0], tuple(call[1])]
        if number == 115:
            return [[set(item) if isinstance(item, list) and item else {} for item in call[0]]]
        if number == 124:
            return (float(call[0]), complex(call[1]))
        if number in _FIRST_TUPLE:
            return [tuple(call[0]), call[1]]
        if number in _TUPLES_OF_TUPLES:
            return [tuple(tuple(item) for item in part) for part in call]
        if number == 278:
            return [tuple(tuple(item) if isinstance(item, list) else item for item in call[0])]
        if number == 307:
            return [tuple(call[0]), call[1], call[2]]
        if number == 722:
            return [{key: tuple(value) for key, value in call[0].items()}, *call[1:]]
        if number == 252:
            return [complex(call[0])]
        return deep(call) if number in _ALL_TUPLES else call

    return [retype(call) for call in inputs]


# --- from a reply to a program

_FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def program_in(reply: str, entry_point: str) -> str:
    """The program of a reply without thinking: the last block that defines the function, else the first that is Python, else all."""
    blocks: list[str] = [
        body for language, body in _FENCE.findall(reply) if language.lower() in ("", "py", "python", "python3")
    ]
    for block in reversed(blocks):
        if _defines(block, entry_point):
            return block
    for block in blocks:
        if _parses(block):
            return block
    return reply


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _defines(code: str, name: str) -> bool:
    if not _parses(code):
        return False
    body = ast.parse(code).body
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = {
        target.id
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return name in functions | assigned
