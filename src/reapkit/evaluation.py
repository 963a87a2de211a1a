"""Benchmarks against served models: the model card's table, with every setting that decides its figures.

inspect-ai asks the questions, keeps the logs (`inspect view`) and remembers every reply, so that a run that was killed loses the requests
in flight and no more. What is asked and how it is scored is in `benchmarks`, `programs` and `grading`; tau2-bench Telecom is that of
inspect-evals.

A benchmark that could not be run leaves an empty cell with its reason. It is never a 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from reapkit import benchmarks, programs, servers
from reapkit.behaviour import without_thinking
from reapkit.benchmarks import CARD, MULTIPLE_CHOICE, PUBLISHED, SUITES, Benchmark, Problems, Question, prompt_of
from reapkit.checkpoint import EVALUATION_NAME, MANIFEST_NAME
from reapkit.endpoints import KEY_VARIABLE, REPLY_SECONDS, Endpoint, connect, is_url, require_no_secret
from reapkit.errors import EndpointError, EvaluationError, ReapkitError, ServerError, UsageError, did_you_mean, redacted
from reapkit.figures import Figure, mean
from reapkit.grading import Grader, grading
from reapkit.outputs import save
from reapkit.programs import Expected, expected, judge, program_in
from reapkit.progress import Progress, silent
from reapkit.sandbox import Sandbox, find

FORMAT = "reapkit-eval-1"
RESULT_NAME = "eval.json"
TABLE_NAME = "table.md"
# Requests of one model at once, and failed ones before the server counts as gone.
CONNECTIONS = 32
# Of one turn of tau2's user.
USER_TOKENS = 4096
RETRIES = 2
# Of a checkpoint, what decides the replies and is not written anew by reapkit itself later, as the card and the manifest are.
SERVED_SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".txt", ".py")
SECRET_WORDS = {"key", "token", "password", "secret"}
THINKING = "removed before scoring: all before the last </think>"


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; None leaves it to the server.

    Attributes:
        temperature, top_p, top_k, seed: as the server takes them; the seed of repeat n is seed + n.
        max_tokens: of a reply, for all benchmarks; None takes each benchmark's own.
        repeats: of every problem, for all benchmarks; None takes each benchmark's own.
    """

    temperature: float = 1.0
    top_p: float | None = 0.95
    top_k: int | None = None
    seed: int = 0
    max_tokens: int | None = None
    repeats: int | None = None


@dataclass(frozen=True)
class Settings:
    """What a run is to do.

    Attributes:
        suite: `card`, `multiple-choice`, or an inspect task by name or file.
        only: of the card's benchmarks, these; all where empty.
        limit: problems of each benchmark, the first so many.
        data_dir: where problems' files lie.
        sampling: as above.
        user: the model that plays tau2's user, the same for all models: a URL or a checkpoint.
        sandbox: docker, bubblewrap or none; None takes what works.
        vllm: the program that serves checkpoints; serve_arguments: what else it is given.
        message_limit: turns of a tau2 conversation.
    """

    suite: str = "card"
    only: tuple[str, ...] = ()
    limit: int | None = None
    data_dir: Path | None = None
    sampling: Sampling = field(default_factory=Sampling)
    user: str | None = None
    sandbox: str | None = None
    vllm: str = "vllm"
    serve_arguments: tuple[str, ...] = ()
    message_limit: int = 100


@dataclass(frozen=True)
class Subject:
    """A model in the table.

    Attributes:
        name: in the table's header; source: a checkpoint's folder or hub id, or a URL.
        compression: share of the experts that were removed; None where that is not known.
        identity: what tells it from another model of this source: of a folder, a digest of its files' names, sizes and times; of a
            URL, the model that it served; None where neither is known.
    """

    name: str
    source: str
    compression: float | None
    identity: str | None = None

    @classmethod
    def parse(cls, text: str) -> Subject:
        """`[NAME=]MODEL|URL`; a folder that reapkit wrote says how much was removed."""
        name, sign, source = text.partition("=")
        if not sign or "/" in name or ":" in name:
            name, source = "", text
        compression = None
        with suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads((Path(source) / MANIFEST_NAME).read_text(encoding="utf-8"))
            compression = 1 - manifest["after"]["num_experts"] / manifest["before"]["num_experts"]
        return cls(name or (source if is_url(source) else Path(source).name), source, compression, _identity(source))

    @property
    def header(self) -> str:
        return self.name if not self.compression else f"{self.name} (-{100 * self.compression:.0f} %)"


def _identity(source: str) -> str | None:
    """A digest of the names, sizes and times of a folder's files; None for what is no folder."""
    folder = Path(source)
    if is_url(source) or not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in SERVED_SUFFIXES and path.name != MANIFEST_NAME and path.is_file():
            found = path.stat()
            digest.update(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Cell:
    """A model's figure on a row.

    Attributes:
        figure: None where the benchmark could not be run; `reason` says why.
        difference: to the first model, on the same problems; None for the first model itself.
        scores: by problem, mean over its repeats.
        notes: what a reader must know, such as `stand-in`.
        seconds: wall time; tokens: generated, None where nobody counted; max_tokens: what a reply was allowed, which may be less than
            the benchmark's own where the server holds less.
    """

    figure: Figure | None
    reason: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float | None = None
    tokens: int | None = None
    difference: Figure | None = None
    max_tokens: int | None = None

    @classmethod
    def of(cls, scores: Mapping[str, Sequence[float]], **details: Any) -> Cell:
        """From every problem's scores: problems are independent of each other, repeats of one are not."""
        means = {name: float(np.mean(values)) for name, values in scores.items()}
        if not means:
            return cls(None, "no problem was scored")
        return cls(mean(np.array(list(means.values()))), None, means, **details)

    def against(self, first: Cell) -> Cell:
        """With the difference to the first model, paired by problem."""
        shared = sorted(self.scores.keys() & first.scores.keys())
        if self.figure is None or first.figure is None or not shared:
            return self
        return replace(self, difference=mean(np.array([self.scores[name] - first.scores[name] for name in shared])))

    def to_json(self) -> dict[str, Any]:
        return {
            "value": None if self.figure is None else self.figure.value,
            "standard_error": None if self.figure is None else self.figure.standard_error,
            "difference": None if self.difference is None else self.difference.to_json(),
            "error": self.reason,
            "notes": list(self.notes),
            "problems": len(self.scores),
            "seconds": self.seconds,
            "tokens": self.tokens,
            "max_tokens": self.max_tokens,
            "scores": dict(self.scores),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Cell:
        figure = None if row["value"] is None else Figure(row["value"], row["standard_error"])
        difference = None if row["difference"] is None else Figure(**row["difference"])
        return cls(
            figure,
            row["error"],
            row["scores"],
            tuple(row["notes"]),
            row["seconds"],
            row["tokens"],
            difference,
            row["max_tokens"],
        )


@dataclass(frozen=True)
class Evaluation:
    """A table with everything that decides its figures.

    Attributes:
        suite: what was run; subjects: the columns.
        rows: cells by row and column.
        settings: sampling, limits, sources of the problems, the user simulator, versions.
    """

    suite: str
    subjects: tuple[Subject, ...]
    rows: Mapping[str, tuple[Cell, ...]]
    settings: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "suite": self.suite,
            "models": [vars(subject) for subject in self.subjects],
            "benchmarks": [
                {
                    "name": name,
                    "published": list(PUBLISHED[name]) if name in PUBLISHED else None,
                    "cells": [cell.to_json() for cell in cells],
                }
                for name, cells in self.rows.items()
            ],
            "settings": dict(self.settings),
        }

    @property
    def content(self) -> bytes:
        """What `eval.json` holds: no token and no password, whoever said it."""
        return (redacted(json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)) + "\n").encode()

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The folders among the models that reapkit wrote."""
        folders = [Path(subject.source) for subject in self.subjects if not is_url(subject.source)]
        return tuple(folder for folder in folders if (folder / MANIFEST_NAME).is_file())

    @property
    def complete(self) -> bool:
        return all(cell.figure is not None for cells in self.rows.values() for cell in cells)

    def table(self) -> str:
        """The model card's table in Markdown, in percent; +- is one standard error, in brackets the difference to the first model."""
        lines = [
            f"| benchmark | {' | '.join(subject.header for subject in self.subjects)} |",
            f"|---|{'---|' * len(self.subjects)}",
        ]
        reasons: dict[str, int] = {}
        for name, cells in self.rows.items():
            lines.append(f"| {name} | {' | '.join(_shown(cell, reasons) for cell in cells)} |")
        lines += ["", *(f"[{number}] {reason}" for reason, number in reasons.items())] if reasons else []
        return redacted("\n".join(lines)) + "\n"


def _shown(cell: Cell, reasons: dict[str, int]) -> str:
    if cell.figure is None:
        return f"- [{reasons.setdefault(cell.reason or 'not run', len(reasons) + 1)}]"

    def percent(figure: Figure, sign: str = "") -> str:
        error = "" if figure.standard_error is None else f" +- {100 * figure.standard_error:.1f}"
        return f"{100 * figure.value:{sign}.1f}{error}"

    difference = "" if cell.difference is None else f" ({percent(cell.difference, '+')})"
    return f"{percent(cell.figure)}{difference}{''.join(f', {note}' for note in cell.notes)}"


def evaluate(
    models: Sequence[str],
    settings: Settings | None = None,
    *,
    out: Path = Path("evaluation"),
    progress: Progress = silent,
) -> Evaluation:
    """Run a suite on every model; `eval.json`, `table.md` and inspect's logs go into a folder, and the same call goes on where one stopped.

    A call with another setting, problem set, user or model asks anew for the cells that this decides.

    Args:
        models: `[NAME=]MODEL|URL`, the original first.
        settings: what to run and how.
        out: the folder.
        progress: told how far it is.

    Raises:
        UsageError: no such suite or benchmark, two models of one name, or a token or a password among the settings.
        EvaluationError: inspect-ai is missing.
    """
    settings = settings or Settings()
    subjects = _subjects(models)
    suite = _suite(settings)
    with ExitStack() as stack:
        tools = _Tools(settings, stack)
        kept = _Kept(out / RESULT_NAME, suite, _described(settings), tools)
        user: Endpoint | ReapkitError | None = None
        if settings.user is not None and any(
            isinstance(entry, Benchmark) and entry.kind == "conversations" and not kept.has(subject, entry)
            for entry in suite
            for subject in subjects
        ):
            user = _tried(partial(_enter, stack, settings.user, settings, out / "logs" / "user"))
            if isinstance(user, Endpoint):
                kept.met_user(user)
        for place, subject in enumerate(subjects):
            if all(kept.has(subject, entry) for entry in suite):
                subjects[place] = kept.identified(subject)
                continue
            with ExitStack() as running:
                started = _tried(partial(_enter, running, subject.source, settings, out / "logs" / subject.name))
                if is_url(subject.source):
                    served = started.model if isinstance(started, Endpoint) else kept.identified(subject).identity
                    subjects[place] = subject = replace(subject, identity=served)
                for entry in suite:
                    if kept.has(subject, entry):
                        continue
                    if isinstance(started, ReapkitError):
                        kept.add(subject, dict.fromkeys(_rows_of(entry), Cell(None, started.message)))
                        continue
                    kept.add(subject, _run(entry, subject, started, user, settings, tools, out, progress))
                    save(out / RESULT_NAME, kept.evaluation(subjects).content)
        evaluation = kept.evaluation(subjects)
    write(evaluation, out)
    return evaluation


def _subjects(models: Sequence[str]) -> list[Subject]:
    subjects = [Subject.parse(text) for text in models]
    for subject in subjects:
        if is_url(subject.source):
            require_no_secret(subject.source)
    if len({subject.name for subject in subjects}) != len(subjects):
        raise UsageError("two models have the same name", hint="name them: original=URL pruned=URL")
    return subjects


def describe(settings: Settings, models: Sequence[str]) -> dict[str, Any]:
    """What a run would do, before a single request: models, rows, settings.

    Raises:
        UsageError: as in `evaluate`.
    """
    subjects = _subjects(models)
    rows = [row for entry in _suite(settings) for row in _rows_of(entry)]
    return {"models": [vars(subject) for subject in subjects], "benchmarks": rows, "settings": _described(settings)}


def write(evaluation: Evaluation, out: Path) -> None:
    """`eval.json` and `table.md`, and the same into every folder that reapkit wrote and that is a column."""
    content = evaluation.content
    save(out / RESULT_NAME, content)
    save(out / TABLE_NAME, evaluation.table().encode())
    for folder in evaluation.outputs:
        save(folder / EVALUATION_NAME, content)


def score_replies(path: Path, settings: Settings, *, progress: Progress = silent) -> Evaluation:
    """Score replies that are there already: a row for every benchmark of the suite that the file has replies to.

    A benchmark that was asked for by name has a row whatever the file holds.

    Args:
        path: JSON lines with `id` (or EvalPlus's `task_id`, MATH-500's `unique_id`) and `reply`, or `solution` for a program as it
            is; several rows of one problem are its repeats.

    Raises:
        EvaluationError: the file cannot be read, or no row belongs to a problem of the suite.
    """
    suite = [entry for entry in _suite(settings) if isinstance(entry, Benchmark)]
    if not suite:
        raise UsageError("--replies scores the card's benchmarks", hint="--suite card")
    rows = _read_replies(path)
    cells: dict[str, Cell] = {}
    unknown = set(rows)
    unreadable: dict[str, ReapkitError] = {}
    with ExitStack() as stack:
        tools = _Tools(settings, stack)
        for entry in suite:
            if entry.kind == "conversations":
                if entry.name in settings.only:
                    cells |= dict.fromkeys(entry.rows, Cell(None, "conversations need a model that answers"))
                continue
            if not unknown and entry.name not in settings.only:
                continue  # nothing is fetched that no reply can belong to
            told = _tried(partial(tools.told, entry))
            if isinstance(told, ReapkitError):
                unreadable |= dict.fromkeys(entry.rows, told)
                continue
            problems = tools.loaded(entry)
            unknown -= {_id(problem) for problem in problems.rows}
            chosen = [
                (problem, rows[_id(problem)]) for problem in problems.rows[: settings.limit] if _id(problem) in rows
            ]
            if not chosen and entry.name not in settings.only:
                continue
            tools.sources[entry.name] = told
            cells |= _score_chosen(entry, problems, chosen, tools, settings, progress)
        # Replies that none of the others has a problem for may be theirs.
        if unknown or settings.only:
            cells |= {row: Cell(None, error.message) for row, error in unreadable.items()}
        described = {**describe_replies(settings, path), "unknown": sorted(unknown), **tools.described()}
    if all(cell.figure is None for cell in cells.values()) and len(unknown) == len(rows):
        reasons = "".join(f"; {reason}" for reason in dict.fromkeys(str(error) for error in unreadable.values()))
        raise EvaluationError(
            f"no row of {path} belongs to a problem of the suite{reasons}", hint='a row has "id" and "reply"'
        )
    order = [row for entry in suite for row in entry.rows if row in cells]
    return Evaluation(
        settings.suite, (Subject(path.stem, str(path), None),), {row: (cells[row],) for row in order}, described
    )


def describe_replies(settings: Settings, path: Path) -> dict[str, Any]:
    """What decides the scores of replies that are there: nothing that would have decided the replies.

    Raises:
        EvaluationError: the file cannot be read.
    """
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror or error}") from None
    return {
        "suite": settings.suite,
        "replies": {"source": path.name, "sha256": digest},
        "limit": settings.limit,
        "thinking": THINKING,
        **_environment(),
    }


def _score_chosen(
    entry: Benchmark,
    problems: Problems,
    chosen: Sequence[tuple[Any, Sequence[tuple[str, bool]]]],
    tools: _Tools,
    settings: Settings,
    progress: Progress,
) -> dict[str, Cell]:
    scores: dict[str, dict[str, list[float]]] = {row: {} for row in entry.rows}
    total = len(problems.rows[: settings.limit])
    for number, (problem, replies) in enumerate(chosen):
        progress(entry.rows[-1], number, len(chosen), "problems")
        for text, is_program in replies:
            score = _tried(partial(tools.score, problem, text, is_program=is_program))
            if isinstance(score, ReapkitError):
                return dict.fromkeys(entry.rows, Cell(None, score.message))
            for row, value in zip(entry.rows, score.values, strict=True):
                scores[row].setdefault(_id(problem), []).append(value)
    progress(entry.rows[-1], len(chosen), len(chosen), "problems")
    notes = _notes(problems) + (() if len(chosen) == total else (f"{len(chosen)} of {total} problems",))
    return {
        row: Cell.of(values, notes=notes) if values else Cell(None, "the file has no replies to its problems")
        for row, values in scores.items()
    }


def _read_replies(path: Path) -> dict[str, list[tuple[str, bool]]]:
    """By problem, its replies, and whether they are programs as they are."""
    rows: dict[str, list[tuple[str, bool]]] = {}
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            name = next((str(row[key]) for key in ("id", "task_id", "unique_id") if key in row), None)
            text = row.get("solution", row.get("reply"))
            if name is None or not isinstance(text, str):
                raise EvaluationError(
                    f"line {number} of {path} has no id and reply",
                    hint='a row has "id" and "reply", or "task_id" and "solution"',
                )
            rows.setdefault(name, []).append((text, "solution" in row))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise EvaluationError(f"{path} cannot be read as JSON lines: {error}") from None
    return rows


# --- what to run


def _suite(settings: Settings) -> tuple[Benchmark | str, ...]:
    """The card's benchmarks, or the suite's name for those that others run.

    Raises:
        UsageError: no such benchmark.
    """
    if settings.suite != "card":
        if settings.only:
            raise UsageError("--only chooses among the card's benchmarks", hint="--suite card")
        is_task = "/" in settings.suite or settings.suite.partition("@")[0].endswith(".py")
        if settings.suite not in SUITES and not is_task:
            raise UsageError(
                f"there is no suite {settings.suite!r}",
                hint=f"{did_you_mean(settings.suite, SUITES)}; an inspect task is named like inspect_evals/gsm8k or file.py",
            )
        return (settings.suite,)
    names = {benchmark.name: benchmark for benchmark in CARD}
    for name in settings.only:
        if name not in names:
            raise UsageError(f"the card has no benchmark {name!r}", hint=did_you_mean(name, names))
    return tuple(benchmark for benchmark in CARD if not settings.only or benchmark.name in settings.only)


def _rows_of(entry: Benchmark | str) -> tuple[str, ...]:
    if isinstance(entry, Benchmark):
        return entry.rows
    return MULTIPLE_CHOICE if entry == "multiple-choice" else (entry,)


def _described(settings: Settings) -> dict[str, Any]:
    """Everything that decides the figures beside the models; what nothing in the suite asks for is left out.

    Raises:
        UsageError: no such suite or benchmark, or a token or a password in what would be written down.
    """
    for word in settings.serve_arguments:
        flag = word.partition("=")[0].lstrip("-").replace("_", "-").lower()
        if word.startswith("-") and SECRET_WORDS & set(flag.split("-")):
            raise UsageError(
                f"--serve-arguments holds a token or a password: --{flag}",
                hint="servers started here answer this machine alone and need no key; the hub's token is read from HF_TOKEN",
            )
    if settings.user is not None and is_url(settings.user):
        require_no_secret(settings.user)
    sampling = settings.sampling
    suite = _suite(settings)
    chosen = [entry for entry in suite if isinstance(entry, Benchmark)]
    described: dict[str, Any] = {
        "suite": settings.suite,
        "sampling": {
            entry.name: {
                "temperature": 0.0 if entry.kind == "conversations" else sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "seed": sampling.seed,
                "max_tokens": sampling.max_tokens or entry.max_tokens,
                "repeats": sampling.repeats or entry.repeats,
            }
            for entry in chosen
        }
        or {"all": dict(vars(sampling))},
        "limit": settings.limit,
        "serve_arguments": list(settings.serve_arguments),
        **_environment(),
    }
    kinds = {entry.kind for entry in chosen}
    if kinds:
        described["thinking"] = THINKING
    if "programs" in kinds:
        described["code_prompt"] = benchmarks.CODE_INSTRUCTION
    if "mathematics" in kinds:
        described["math_prompt"] = benchmarks.MATH_INSTRUCTION
    if "conversations" in kinds:
        described["message_limit"] = settings.message_limit
        described["user_simulator"] = (
            None if settings.user is None else {"source": settings.user, "identity": _identity(settings.user)}
        )
        described["user_sampling"] = {
            "temperature": 0.0,
            "seed": sampling.seed,
            "max_tokens": min(USER_TOKENS, sampling.max_tokens or USER_TOKENS),
        }
    return described


def _environment() -> dict[str, Any]:
    packages = {}
    for name in ("reapkit", "inspect_ai", "inspect_evals", "math-verify", "lm_eval"):
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {"packages": packages, "python": platform.python_version()}


def _deciding(entry: Benchmark | str, described: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is described, what decides an entry's cells, the problems and the user left out."""
    names = ["suite", "limit", "serve_arguments", "packages", "python"]
    if not isinstance(entry, Benchmark):
        return {name: described[name] for name in [*names, "sampling"]}
    names += {
        "programs": ["thinking", "code_prompt"],
        "mathematics": ["thinking", "math_prompt"],
        "conversations": ["thinking", "message_limit", "user_sampling"],
    }[entry.kind]
    return {**{name: described[name] for name in names}, "sampling": described["sampling"][entry.name]}


class _Kept:
    """The cells of a table on its way: those of `eval.json` that the same things decide now, and those that were added."""

    def __init__(self, path: Path, suite: Sequence[Benchmark | str], described: dict[str, Any], tools: _Tools) -> None:
        self._suite = suite
        self._described = described
        self._tools = tools
        self._cells: dict[tuple[str, str], dict[str, Cell]] = {}
        self._identities: dict[tuple[str, str], str | None] = {}
        # What another suite or a file of another making holds is no part of this table.
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["format"] == FORMAT and before["suite"] == described["suite"]:
                for entry in suite:
                    self._keep(entry, before)

    def _keep(self, entry: Benchmark | str, before: Mapping[str, Any]) -> None:
        settings = before["settings"]
        rows = {row["name"]: row["cells"] for row in before["benchmarks"]}
        if isinstance(entry, Benchmark) or entry in SUITES:
            rows = {name: cells for name, cells in rows.items() if name in _rows_of(entry)}
        if not rows or _deciding(entry, settings) != _deciding(entry, self._described):
            return
        if isinstance(entry, Benchmark) and entry.kind == "conversations":
            user, now = settings["user_simulator"], self._described["user_simulator"]
            if (user is None) != (now is None):
                return
            if user is not None:
                if user["source"] != now["source"] or now["identity"] not in (None, user["identity"]):
                    return
                now["identity"] = user["identity"]
        elif isinstance(entry, str) and entry in SUITES:
            pass  # lm-eval has the problems
        else:
            name = entry.name if isinstance(entry, Benchmark) else entry
            now = _tried(partial(self._tools.told, entry))
            # Problems that cannot be had now are nothing that other cells could be of.
            if not isinstance(now, ReapkitError) and now != settings["problems"].get(name):
                return
            self._tools.sources[name] = settings["problems"][name]
            if settings.get("sandbox") is not None:
                self._tools.sandbox_kind = settings["sandbox"]
        for place, model in enumerate(before["models"]):
            key = (model["name"], model["source"])
            self._identities[key] = model["identity"]
            found = {name: replace(Cell.from_json(cells[place]), difference=None) for name, cells in rows.items()}
            # What could not be run is tried again, with what ran beside it where rows are known by running alone.
            if isinstance(entry, Benchmark) or entry in SUITES:
                found = {name: cell for name, cell in found.items() if cell.figure is not None}
            if all(cell.figure is not None for cell in found.values()):
                self._cells.setdefault(key, {}).update(found)

    def _of(self, subject: Subject) -> dict[str, Cell]:
        """A model's cells; none where its source has become another model."""
        key = (subject.name, subject.source)
        if subject.identity is not None and self._identities.get(key, subject.identity) != subject.identity:
            return {}
        return self._cells.get(key, {})

    def has(self, subject: Subject, entry: Benchmark | str) -> bool:
        cells = self._of(subject)
        if isinstance(entry, Benchmark) or entry in SUITES:
            return set(_rows_of(entry)) <= {name for name, cell in cells.items() if cell.figure is not None}
        return bool(cells) and all(cell.figure is not None for cell in cells.values())

    def identified(self, subject: Subject) -> Subject:
        """With the identity that its cells were measured under, where nobody has asked yet."""
        return replace(subject, identity=subject.identity or self._identities.get((subject.name, subject.source)))

    def met_user(self, endpoint: Endpoint) -> None:
        """Drop conversations with another user than the one that a URL serves now."""
        user = self._described["user_simulator"]
        if is_url(user["source"]) and user["identity"] != endpoint.model:
            for cells in self._cells.values():
                for row in (row for entry in CARD if entry.kind == "conversations" for row in entry.rows):
                    cells.pop(row, None)
            user["identity"] = endpoint.model

    def add(self, subject: Subject, cells: Mapping[str, Cell]) -> None:
        key = (subject.name, subject.source)
        self._cells[key] = {**self._of(subject), **cells}
        self._identities[key] = subject.identity

    def evaluation(self, subjects: Sequence[Subject]) -> Evaluation:
        columns = [self._of(subject) for subject in subjects]
        known = [row for entry in self._suite for row in _rows_of(entry)]
        names = dict.fromkeys(name for column in columns for name in column)
        rows = {}
        for name in sorted(names, key=lambda name: (*known, name).index(name)):
            cells = [column.get(name, Cell(None, "not run yet")) for column in columns]
            rows[name] = (replace(cells[0], difference=None), *(cell.against(cells[0]) for cell in cells[1:]))
        described = {**self._described, **self._tools.described()}
        return Evaluation(self._described["suite"], tuple(subjects), rows, described)


# --- scoring


@dataclass(frozen=True)
class _Score:
    """A reply's scores in the order of its benchmark's rows, and why."""

    values: tuple[float, ...]
    reason: str


class _Tools:
    """What scoring needs, each made when it is first asked for: problems, the sandbox, the references' outputs, the grader."""

    def __init__(self, settings: Settings, stack: ExitStack) -> None:
        self._settings = settings
        self._stack = stack
        self._problems: dict[str, Problems] = {}
        self._expected: dict[str, Expected] = {}
        self._sandbox: Sandbox | None = None
        self._grader: Grader | None = None
        self.sources: dict[str, Mapping[str, str]] = {}
        self.sandbox_kind: str | None = None

    def problems(self, entry: Benchmark) -> Problems:
        """A benchmark's problems, with what scores their replies: refused before a single reply is asked for."""
        if entry.kind == "programs":
            self.sandbox()
        else:
            self.grader()
        self.sources[entry.name] = self.told(entry)
        return self._problems[entry.name]

    def loaded(self, entry: Benchmark) -> Problems:
        """A benchmark's problems alone."""
        if entry.name not in self._problems:
            self._problems[entry.name] = benchmarks.load(entry, self._settings.data_dir)
        return self._problems[entry.name]

    def told(self, entry: Benchmark | str) -> dict[str, str]:
        """Where problems come from, and a digest of them; of a task in a file, of that file."""
        if isinstance(entry, Benchmark):
            found = self.loaded(entry)
            return {"source": found.source, "sha256": found.sha256}
        path = Path(entry.partition("@")[0])
        if not path.is_file():
            return {"source": entry}
        return {"source": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    def described(self) -> dict[str, Any]:
        """Where the problems came from that were asked, and what programs ran in, as far as any did."""
        sandbox = {} if self.sandbox_kind is None else {"sandbox": self.sandbox_kind}
        return {"problems": dict(self.sources), **sandbox}

    def sandbox(self) -> Sandbox:
        if self._sandbox is None:
            self._sandbox = find(self._settings.sandbox)
            self.sandbox_kind = self._sandbox.kind
        return self._sandbox

    def grader(self) -> Grader:
        if self._grader is None:
            self._grader = self._stack.enter_context(grading())
        return self._grader

    def score(self, problem: programs.Problem | Question, reply: str, *, is_program: bool = False) -> _Score:
        """Score one reply; thinking is removed first."""
        content = reply if is_program else without_thinking(reply)
        if isinstance(problem, Question):
            is_right = self.grader().submit(content, problem.answer).result()
            return _Score((float(is_right),), f"the answer is {problem.answer}")
        if problem.task_id not in self._expected:
            self._expected[problem.task_id] = expected(problem, self.sandbox())
        code = content if is_program else program_in(content, problem.entry_point)
        verdict = judge(problem, code, self._expected[problem.task_id], self.sandbox())
        return _Score((float(verdict.base), float(verdict.plus)), verdict.reason or "all tests passed")


def _id(problem: programs.Problem | Question) -> str:
    return problem.id if isinstance(problem, Question) else problem.task_id


def _notes(problems: Problems) -> tuple[str, ...]:
    return (benchmarks.STAND_IN,) if problems.is_stand_in else ()


def _tried(action: Callable[[], Any]) -> Any:
    """What an action returns, or the error of ours that it raises: one cell's failure is not the table's."""
    try:
        return action()
    except ReapkitError as error:
        return error


# --- serving


def _enter(stack: ExitStack, source: str, settings: Settings, logs: Path) -> Endpoint:
    return stack.enter_context(served(source, settings, logs))


@contextmanager
def served(source: str, settings: Settings, logs: Path) -> Iterator[Endpoint]:
    """The server behind a URL, or vLLM started on a checkpoint and ended afterwards.

    Raises:
        EndpointError: it does not answer, or ended while it started; its log says why.
    """
    if is_url(source):
        yield connect(source)
        return
    logs.mkdir(parents=True, exist_ok=True)
    program = shutil.which(settings.vllm)
    if program is None:
        raise EndpointError(
            f"{settings.vllm} cannot be started: there is no such program",
            hint="pip install vllm, or name it: --vllm PROGRAM",
        )
    log, port = logs / "vllm.log", servers.free_port(servers.LOOPBACK, 0)
    address = f"http://{servers.LOOPBACK}:{port}"
    command = [program, "serve", source, "--host", servers.LOOPBACK, "--port", str(port), *settings.serve_arguments]
    with servers.running(command, address=address, log=log) as server:
        try:
            server.wait_until_healthy(within_s=servers.START_SECONDS, announce=lambda _: None)
        except ServerError:
            raise EndpointError(
                f"the server of {source} did not start: {_said(log)}", hint=f"its log is {log}"
            ) from None
        yield connect(address)


def _said(log: Path) -> str:
    """The last line of a log that tells of an error, else the last one."""
    lines = servers.last_lines(log, 200).splitlines()
    return next((line for line in reversed(lines) if "Error" in line), lines[-1]).strip()[-300:]


# --- running, by inspect


def _run(
    entry: Benchmark | str,
    subject: Subject,
    endpoint: Endpoint,
    user: Endpoint | ReapkitError | None,
    settings: Settings,
    tools: _Tools,
    out: Path,
    progress: Progress,
) -> dict[str, Cell]:
    """One entry of the suite on one model: cells by row."""
    if entry == "multiple-choice":
        return _run_lm_eval(subject, endpoint, settings, out)
    if isinstance(entry, Benchmark) and entry.kind == "conversations" and not isinstance(user, Endpoint):
        reason = user.message if user is not None else "needs a model that plays the user: --user URL"
        return dict.fromkeys(entry.rows, Cell(None, reason))
    try:
        return _run_inspect(
            entry, subject, endpoint, user if isinstance(user, Endpoint) else None, settings, tools, out, progress
        )
    except ReapkitError as error:
        return dict.fromkeys(_rows_of(entry), Cell(None, error.message))


def _run_inspect(
    entry: Benchmark | str,
    subject: Subject,
    endpoint: Endpoint,
    user: Endpoint | None,
    settings: Settings,
    tools: _Tools,
    out: Path,
    progress: Progress,
) -> dict[str, Cell]:
    try:
        import inspect_ai
        from inspect_ai.model import CachePolicy, GenerateConfig
    except ImportError:
        raise EvaluationError(
            "benchmarks are run by inspect-ai, which is not installed", hint="pip install 'reapkit[eval]'"
        ) from None

    sampling = settings.sampling
    limit = settings.limit
    repeats, max_tokens, task = sampling.repeats or 1, sampling.max_tokens, entry
    counted = _Counted(progress, f"{subject.name}, {_rows_of(entry)[-1]}")
    notes: tuple[str, ...] = ()
    if isinstance(entry, Benchmark):
        repeats, max_tokens = sampling.repeats or entry.repeats, sampling.max_tokens or entry.max_tokens
        if endpoint.max_length is not None:
            # Room for the prompt: a request for more than the server can hold is refused whole.
            max_tokens = min(max_tokens, max(endpoint.max_length // 2, endpoint.max_length - 4096))
        if entry.kind == "conversations":
            task, notes = _telecom(settings), (f"user: {user.model}" if user is not None else "",)
        else:
            problems = tools.problems(entry)
            counted.total, notes = len(problems.rows[:limit]) * repeats, _notes(problems)
            task = _task(entry, problems, tools, counted)
    if isinstance(task, str):
        tools.sources[task] = tools.told(task)
        if Path(task.partition("@")[0]).is_file():
            # inspect looks for files from where it stands.
            file, sign, name = task.partition("@")
            task = f"{os.path.relpath(file)}{sign}{name}"
    # A reply is remembered for the model that gave it, however it was served and whatever another at its place would say.
    scope = {
        "model": subject.name,
        "source": subject.source,
        "identity": str(subject.identity),
        "serve_arguments": "" if is_url(subject.source) else " ".join(settings.serve_arguments),
        "seed": str(sampling.seed),
    }
    policy = CachePolicy(expiry=None, per_epoch=True, scopes=scope)
    os.environ["INSPECT_CACHE_DIR"] = str((out / "cache").resolve())
    config = GenerateConfig(max_retries=RETRIES, max_connections=CONNECTIONS, timeout=int(REPLY_SECONDS))
    roles = None
    if user is not None and settings.user is not None:
        # A role takes nothing of the run's settings.
        of_user = {**scope, "user": settings.user, "user_identity": str(_identity(settings.user) or user.model)}
        own = GenerateConfig(
            seed=sampling.seed,
            max_tokens=min(USER_TOKENS, max_tokens or USER_TOKENS),
            cache=CachePolicy(expiry=None, per_epoch=True, scopes=of_user),
        )
        roles = {"user": _inspect_model(user, settings.user, config.merge(own))}
    logs = inspect_ai.eval(
        task,
        model=_inspect_model(endpoint, subject.source, config),
        model_roles=roles,
        epochs=repeats,
        limit=limit,
        log_dir=str(out / "logs" / subject.name),
        display="none",
        fail_on_error=True,
        retry_on_error=0,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        max_tokens=max_tokens,
        cache=policy,
        metadata={"reapkit": subject.name},
    )
    cells: dict[str, Cell] = {}
    for log in logs:
        cells |= _cells_of(log, entry, endpoint, notes, max_tokens)
    return cells


def _inspect_model(endpoint: Endpoint, source: str, config: Any) -> Any:
    from inspect_ai.model import get_model

    key = os.environ.get(KEY_VARIABLE, "none")
    # Not memoized: two models may have one name.
    model = get_model(
        f"openai-api/reapkit/{endpoint.model}", base_url=endpoint.url, api_key=key, config=config, memoize=False
    )
    # Its client has the address. What is left of it here is a part of the key that replies are remembered under, and a server that is
    # started again has another port.
    model.api.base_url = source
    return model


def _task(entry: Benchmark, problems: Problems, tools: _Tools, counted: _Counted) -> Any:
    """A benchmark of single replies as a task of inspect."""
    from inspect_ai import Task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.scorer import Score, accuracy, scorer, stderr
    from inspect_ai.solver import generate

    by_id = {_id(problem): problem for problem in problems.rows}

    def scored() -> Any:
        async def score(state: Any, target: Any) -> Any:
            reply = state.output.completion
            found = await asyncio.to_thread(tools.score, by_id[str(state.sample_id)], reply)
            counted.one()
            if len(entry.rows) == 1:
                return Score(value=found.values[0], answer=without_thinking(reply)[-2000:], explanation=found.reason)
            values = dict(zip(entry.rows, found.values, strict=True))
            return Score(value=values, answer=without_thinking(reply), explanation=found.reason)

        return score

    both = [accuracy(), stderr()]
    metrics: Any = both if len(entry.rows) == 1 else dict.fromkeys(entry.rows, both)
    samples = [Sample(id=name, input=prompt_of(problem), target="") for name, problem in by_id.items()]
    return Task(
        name=entry.name,
        dataset=MemoryDataset(samples),
        solver=generate(),
        scorer=scorer(metrics=metrics, name=entry.name)(scored)(),
    )


def _telecom(settings: Settings) -> Any:
    try:
        from inspect_evals.tau2 import tau2_telecom
    except ImportError:
        raise EvaluationError(
            "tau2-bench is run by inspect-evals, which is not installed", hint="pip install 'reapkit[eval]'"
        ) from None
    return tau2_telecom(shuffle=False, message_limit=settings.message_limit)


class _Counted:
    """Progress in scored replies."""

    def __init__(self, progress: Progress, task: str) -> None:
        self._progress, self._task, self._done, self.total = progress, task, 0, 0

    def one(self) -> None:
        self._done += 1
        self._progress(self._task, self._done, max(self.total, self._done), "replies")


def _cells_of(
    log: Any, entry: Benchmark | str, endpoint: Endpoint, notes: tuple[str, ...], max_tokens: int | None
) -> dict[str, Cell]:
    """A log's cells by row; of a task that is not ours the row is the task's name."""
    rows = entry.rows if isinstance(entry, Benchmark) else (str(log.eval.task).rpartition("/")[2],)
    if log.status != "success":
        said = log.error.message if log.error is not None else log.status
        return dict.fromkeys(rows, Cell(None, _alive_or(endpoint, f"the run ended: {' '.join(said.split())[:300]}")))
    failed, count = _failed_requests(log.samples)
    if failed is not None:
        # tau2's loop goes on after a failed request, and a conversation without a model would count as lost.
        reason = f"{count} of {len(log.samples)} conversations had requests that failed: {failed}"
        return dict.fromkeys(rows, Cell(None, _alive_or(endpoint, reason)))
    scores: dict[str, dict[str, list[float]]] = {row: {} for row in rows}
    for sample in log.samples:
        for row, value in _values_of(sample, rows).items():
            scores[row].setdefault(str(sample.id), []).append(value)
    # What the user said does not count, whoever played it.
    tokens = sum(usage.output_tokens for usage in log.stats.model_usage.values())
    tokens -= sum(usage.output_tokens for usage in log.stats.role_usage.values())
    times = [datetime.fromisoformat(moment) for moment in (log.stats.started_at, log.stats.completed_at)]
    seconds = (times[1] - times[0]).total_seconds()
    details = {"notes": notes, "seconds": seconds, "tokens": tokens, "max_tokens": max_tokens}
    return {row: Cell.of(values, **details) for row, values in scores.items()}


def _values_of(sample: Any, rows: Sequence[str]) -> dict[str, float]:
    from inspect_ai.scorer import value_to_float

    if not sample.scores:
        return {}
    value = next(iter(sample.scores.values())).value
    if isinstance(value, Mapping):
        return {row: float(value[row]) for row in rows}
    return {rows[0]: float(value_to_float()(value))}


def _failed_requests(samples: Iterable[Any]) -> tuple[str | None, int]:
    """The first failed request of a finished run and how many samples have one; what the server refuses as wrong is the model's own."""
    first, count = None, 0
    for sample in samples:
        errors = [event.error for event in sample.events if event.event == "model" and event.error]
        own = [error for error in errors if "400" not in error and "BadRequest" not in error]
        if own:
            first, count = first or " ".join(own[0].split())[:200], count + 1
    return first, count


def _alive_or(endpoint: Endpoint, reason: str) -> str:
    """The reason, or that the server is gone, which is the better one."""
    try:
        connect(endpoint.url)
    except EndpointError as error:
        return f"the server died during the run: {error.message}"
    return reason


def _run_lm_eval(subject: Subject, endpoint: Endpoint, settings: Settings, out: Path) -> dict[str, Cell]:
    """Multiple choice by log-likelihoods, which lm-eval asks the server's completions for."""
    folder = out / "logs" / subject.name / "lm-eval"
    folder.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {
        "model": endpoint.model,
        "base_url": f"{endpoint.url}/completions",
        "tokenizer": endpoint.model if is_url(subject.source) else subject.source,
        "tokenizer_backend": "huggingface",
        "num_concurrent": CONNECTIONS,
    }
    if endpoint.max_length is not None:
        arguments["max_length"] = endpoint.max_length
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", json.dumps(arguments),
               "--tasks", ",".join(MULTIPLE_CHOICE), "--seed", str(settings.sampling.seed), "--output_path", str(folder)]  # fmt: skip
    if settings.limit is not None:
        command += ["--limit", str(settings.limit)]
    key = {"OPENAI_API_KEY": os.environ[KEY_VARIABLE]} if KEY_VARIABLE in os.environ else {}
    log = folder / "lm-eval.log"
    with log.open("wb") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **key}, check=False)
    if done.returncode:
        reason = _alive_or(endpoint, f"lm-eval ended: {_said(log)}")
        return dict.fromkeys(MULTIPLE_CHOICE, Cell(None, reason))
    return read_lm_eval(max(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime))


def read_lm_eval(path: Path) -> dict[str, Cell]:
    """The cells of lm-eval's results: accuracy by normalised length where a task has it, else plain."""
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    cells = {}
    for name in MULTIPLE_CHOICE:
        row = results.get(name)
        metric = next((key for key in ("acc_norm,none", "acc,none") if row and key in row), None)
        if row is None or metric is None:
            cells[name] = Cell(None, "lm-eval has no result for it")
            continue
        error = row.get(metric.replace(",", "_stderr,"))
        # Scores by problem are in lm-eval's own logs.
        cells[name] = Cell(
            Figure(row[metric], error if isinstance(error, float) else None), notes=(metric.partition(",")[0],)
        )
    return cells
