"""The benchmarks of the model card: where their problems come from, what is asked, and how a reply is scored.

Problems come from files in `--data-dir` where they lie there, else from the hub. Their texts are not part of reapkit.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from reapkit import programs
from reapkit.errors import EvaluationError
from reapkit.outputs import write_file

Kind = Literal["programs", "mathematics", "conversations"]

# EvalPlus's instruction for chat models.
CODE_INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
MATH_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Benchmark:
    """One set of problems; a set of programs gives two rows, on the base tests and on all.

    Attributes:
        name: as `--only` takes it.
        rows: names in the table.
        kind: what is asked.
        files: names in `--data-dir`, the first that is there.
        hub: data set and split.
        max_tokens: of a reply, long enough for models that think; temperature is the run's.
        repeats: how often every problem is asked, so that few problems say something.
    """

    name: str
    rows: tuple[str, ...]
    kind: Kind
    files: tuple[str, ...]
    hub: tuple[str, str] | None
    max_tokens: int
    repeats: int = 1


CARD: tuple[Benchmark, ...] = (
    Benchmark("humaneval", ("HumanEval", "HumanEval+"), "programs", ("HumanEvalPlus-v0.1.10.jsonl.gz", "HumanEvalPlus.jsonl"),
              None, 32_768),
    Benchmark("mbpp", ("MBPP", "MBPP+"), "programs", ("MbppPlus-v0.2.0.jsonl.gz", "MbppPlus.jsonl"), None, 32_768),
    Benchmark("aime25", ("AIME25",), "mathematics", ("AIME25.jsonl", "AIME25.jsonl.gz", "AIME25-stand-in.jsonl"),
              ("math-ai/aime25", "test"),
              65_536, repeats=8),
    Benchmark("math500", ("MATH-500",), "mathematics", ("MATH-500.jsonl.gz", "MATH-500.jsonl"), ("HuggingFaceH4/MATH-500", "test"), 65_536),
    Benchmark("tau2-telecom", ("tau2-bench Telecom",), "conversations", (), None, 16_384),
)  # fmt: skip
STAND_IN = "stand-in"
# EvalPlus's files and the SHA-256 of what they hold.
RELEASES: Mapping[str, tuple[str, str]] = MappingProxyType({
    "humaneval": ("https://github.com/evalplus/humanevalplus_release/releases/download/v0.1.10/HumanEvalPlus.jsonl.gz",
                  "42526ec0e7d5f3ee0b06d6ced98f8c8bae3d76519151bfb3d36f79010645bd7f"),
    "mbpp": ("https://github.com/evalplus/mbppplus_release/releases/download/v0.2.0/MbppPlus.jsonl.gz",
             "b54e762755248ca411b523c917fa9f93c07b5ff2966bf60b3917b853926a3dad"),
})  # fmt: skip

# As published in MiniMax-M2's REAP cards, in percent: original, 25 %, 30 %.
PUBLISHED: Mapping[str, tuple[float, float, float]] = MappingProxyType({
    "HumanEval": (93.9, 93.9, 93.3),
    "HumanEval+": (89.0, 86.6, 86.6),
    "MBPP": (87.6, 88.1, 86.5),
    "MBPP+": (73.0, 74.9, 73.0),
    "AIME25": (76.7, 83.3, 73.3),
    "MATH-500": (91.6, 89.4, 89.4),
    "tau2-bench Telecom": (59.1, 57.6, 59.1),
})  # fmt: skip

# What lm-eval calls the multiple choice tasks of the paper.
MULTIPLE_CHOICE = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte", "winogrande")
SUITES: Mapping[str, str] = MappingProxyType({
    "card": "HumanEval, HumanEval+, MBPP, MBPP+, AIME25, MATH-500, tau2-bench Telecom: the model card's table",
    "multiple-choice": f"{', '.join(MULTIPLE_CHOICE)}, by lm-eval",
})  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One mathematical problem.

    Attributes:
        id: its name; problem: its text; answer: the right answer in LaTeX.
    """

    id: str
    problem: str
    answer: str


@dataclass(frozen=True)
class Problems:
    """A benchmark's problems.

    Attributes:
        rows: programs' problems or questions.
        source: the file's name, or the hub data set.
        sha256: of what a file of programs holds, unpacked; of questions, their ids, texts and answers, wherever they came from.
        is_stand_in: whether they are not the benchmark's own.
    """

    rows: Sequence[programs.Problem] | Sequence[Question]
    source: str
    sha256: str
    is_stand_in: bool = False


def load(benchmark: Benchmark, folder: Path | None) -> Problems:
    """The problems from the folder where it has them, else from the hub.

    Raises:
        EvaluationError: neither has them, or what is there is something else.
    """
    for name in benchmark.files if folder is not None else ():
        assert folder is not None
        if (path := folder / name).is_file():
            return _read(benchmark, path)
    return _fetch(benchmark)


def _read(benchmark: Benchmark, path: Path) -> Problems:
    if benchmark.kind == "programs":
        rows = programs.read(path, "humaneval" if benchmark.name == "humaneval" else "mbpp")
        return Problems(rows, path.name, hashlib.sha256(_content(path)).hexdigest())
    try:
        lines = _content(path).decode().splitlines()
        return _questions((json.loads(line) for line in lines if line.strip()), path.name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{path} holds no problems of {benchmark.rows[0]}: {type(error).__name__}: {error}"
        ) from None


def _content(path: Path) -> bytes:
    raw = path.read_bytes()
    return gzip.decompress(raw) if path.suffix == ".gz" else raw


def _questions(rows: Iterable[Mapping[str, Any]], source: str) -> Problems:
    questions = [
        Question(str(row.get("unique_id", row.get("id", number))), row["problem"], str(row["answer"]))
        for number, row in enumerate(rows)
    ]
    told = json.dumps([[question.id, question.problem, question.answer] for question in questions])
    return Problems(questions, source, hashlib.sha256(told.encode()).hexdigest(), STAND_IN in source)


def _fetch(benchmark: Benchmark) -> Problems:
    """From the hub; EvalPlus's own files, which hold the inputs, from its releases."""
    if benchmark.kind == "programs":
        return _read(benchmark, _download(*RELEASES[benchmark.name]))
    assert benchmark.hub is not None
    name, split = benchmark.hub
    try:
        from datasets import load_dataset
    except ImportError:
        raise EvaluationError(
            f"{benchmark.rows[0]} comes from the hub, which needs datasets",
            hint="pip install 'reapkit[data]', or --data-dir DIR",
        ) from None
    try:
        return _questions(load_dataset(name, split=split), name)
    except Exception as error:  # of any kind: the network's, the hub's, the data set's own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EvaluationError(
            f"{name} cannot be read from the hub: {reason}", hint="put a file into --data-dir"
        ) from None


def _download(url: str, digest: str) -> Path:
    """A file of EvalPlus's releases, kept in the hub's cache and held to the digest of its content."""
    from huggingface_hub.constants import HF_HOME

    path = Path(HF_HOME) / "reapkit" / url.rpartition("/")[2]
    try:
        if not path.is_file():
            with urllib.request.urlopen(url, timeout=60) as stream:
                content = stream.read()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
        found = hashlib.sha256(_content(path)).hexdigest()
    except OSError as error:
        raise EvaluationError(f"{url} cannot be fetched: {error}", hint="put the file into --data-dir") from None
    if found != digest:
        raise EvaluationError(
            f"{path} is another file than the one that scores were published on", hint="remove it and try again"
        )
    return path


def prompt_of(problem: programs.Problem | Question) -> str:
    """What a chat model is asked."""
    if isinstance(problem, Question):
        return f"{problem.problem}\n\n{MATH_INSTRUCTION}"
    return f"{CODE_INSTRUCTION}\n```\n{problem.prompt.strip()}\n```"
