"""Calibration data: from the user's sources to token documents, and from documents to padded batches.

Saliency is measured on this text, so nothing may be lost or added in silence: every document stands alone in its row,
padding is never counted, a long sample is split and not cut, and each token keeps the domain that it is summed under.

Shape suffixes: B documents in a batch, T token positions.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import heapq
import importlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from reapkit.errors import DataError, UnsupportedError, UsageError, did_you_mean, is_failure, reason_of
from reapkit.interrupts import within
from reapkit.statistics import NUM_FOLDS

# The published mix for agentic reasoning checkpoints: six equal parts.
REAP_MIX: tuple[str, ...] = (
    "code=theblackcat102/evol-codealpaca-v1:4096",
    "tools=Salesforce/xlam-function-calling-60k:4096",
    "reasoning-code=open-r1/Mixture-of-Thoughts[code]:4096",
    "reasoning-math=open-r1/Mixture-of-Thoughts[math]:4096",
    "reasoning-science=open-r1/Mixture-of-Thoughts[science]:4096",
    "agentic=SWE-bench/SWE-smith-trajectories(tool):4096",
)
RECIPES: Mapping[str, tuple[str, ...]] = MappingProxyType({"reap-mix": REAP_MIX})

GRAMMAR = "[DOMAIN=]SOURCE[SUBSET](SPLIT)[:SAMPLES]"
ACCEPTED_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".txt", ".txt.gz", ".md", ".md.gz")

# Endings that nobody gives a hub data set: a missing file is then reported as one, and the network is left alone.
_FILE_SUFFIXES = (*ACCEPTED_SUFFIXES, ".csv", ".tsv", ".arrow", ".gz", ".zip", ".zst", ".yaml")

# Rows that a hub stream is shuffled over. More mixes better, but all of them are downloaded and held in memory:
# 10,000 agent trajectories take about 2 GB. Err towards more when the set is sorted.
_SHUFFLE_BUFFER = 10_000

# Padding is computed though never counted. Past an eighth of a batch's positions a new batch costs less; err towards
# less padding, as each factor of 8/7 in length costs at most one batch more.
_MAX_PADDING = 1 / 8

# Samples tokenised in one call: fast tokenizers share a call's texts among their threads.
_TOKENIZER_CHUNK = 256

# A row of JSON lines, and a file that is one text or one list of rows. Agents' trajectories take a few megabytes; a compressed file may
# unfold to a thousand times its size.
_MAX_ROW_BYTES = 100_000_000
_MAX_FILE_BYTES = 1_000_000_000

# What a chat's template may take: a program from a stranger, of which loops in loops would not end. Usual ones take milliseconds, and
# seconds where a processor prepares many large images.
_TEMPLATE_SECONDS = 60.0

# Templates that print today's date would give other tokens, and another digest, every day: a macro of the same name
# takes the function's place. gpt-oss asks for the first form and Llama for the second.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ {'%d %b %Y': '01 Jan 2025', '%d %B %Y': '01 January 2025'}.get(format, '2025-01-01') }}"
    "{%- endmacro +%}"
)


_Item = TypeVar("_Item")
_NO_TOKENS: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)


class Tokenizer(Protocol):
    """What is asked of a transformers tokenizer."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def chat_template(self) -> Any: ...

    def get_chat_template(self, chat_template: Any = None, tools: Any = None) -> str: ...

    def apply_chat_template(self, conversation: Any, tools: Any = None, **options: Any) -> Any: ...

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]: ...


class Processor(Protocol):
    """What is asked of a transformers processor, which renders chats with images."""

    @property
    def chat_template(self) -> Any: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class DataSource:
    """One `--data` argument: `[DOMAIN=]SOURCE[SUBSET](SPLIT)[:SAMPLES]`; `name` is a path, hub id or recipe."""

    name: str
    subset: str | None = None
    split: str | None = None
    samples: int | None = None
    domain: str | None = None

    @classmethod
    def parse(cls, text: str) -> DataSource:
        """Read the grammar from its right end, so that a path may hold any of its signs. UsageError if it cannot be."""
        rest = text.strip()
        if re.search(r":\d+\s*,", rest):
            raise UsageError(f"{text!r} names several sources", hint="give --data once for each source")
        domain = samples = split = subset = None
        head, sign, tail = rest.partition("=")
        if sign and not re.search(r"[/\\\[\]():]", head):
            domain, rest = head.strip(), tail.strip()
            if not re.fullmatch(r"\w[\w.-]*", domain):
                raise UsageError(f"{domain!r} in {text!r} is no domain name", hint="use letters, digits and . _ -")
        if match := re.search(r":([^:/\\\[\]()]*)$", rest):
            if not re.fullmatch(r"[0-9]+", match[1]) or int(match[1]) == 0:
                raise UsageError(
                    f"{match[1]!r} in {text!r} is no number of samples", hint="give a whole number from 1, as in :4096"
                )
            samples, rest = int(match[1]), rest[: match.start()]
        if match := re.search(r"\(([^()]*)\)$", rest):
            split, rest = match[1].strip(), rest[: match.start()]
        if match := re.search(r"\[([^\[\]]*)\]$", rest):
            subset, rest = match[1].strip(), rest[: match.start()]
        stray = re.search(r"[\[\]()]", rest) and not looks_like_path(rest)
        if not rest or "" in (split, subset) or stray:
            raise UsageError(
                f"{text!r} is no data source", hint=f"write {GRAMMAR}, as in code=org/name[math](train):99"
            )
        return cls(rest, subset, split, samples, domain)

    def __str__(self) -> str:
        parts = (
            f"{self.domain}=" if self.domain else "",
            self.name,
            f"[{self.subset}]" if self.subset else "",
            f"({self.split})" if self.split else "",
            f":{self.samples}" if self.samples else "",
        )
        return "".join(parts)


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a document.

    `digests` are the SHA-256 of their files. `load` prepares them anew, so that pixels are in memory only while they are
    needed: what the model takes beside token ids, by the name of its argument, `nbytes` in all. It raises DataError if a
    file is not what it was.
    """

    digests: tuple[str, ...]
    nbytes: int
    load: Callable[[], dict[str, npt.NDArray[Any]]]


@dataclass(frozen=True, eq=False)
class Document:
    """Tokens that see only each other: a sample, or one window of a long sample. A sample with images is never split.

    `index` numbers the samples over all sources; the windows of a sample share it, and so its fold.
    """

    input_ids: npt.NDArray[np.int32]
    domain: str
    index: int
    images: Images | None = None


@dataclass(frozen=True)
class SourceReport:
    """What became of one source.

    `rows` were read (all rows of a file, of a hub stream only those drawn), `requested` were asked for (None: all),
    `samples` have tokens and are used, `empty` were drawn but have none. `split_samples` of the samples were longer
    than the maximal length; all samples together make `windows` documents of `tokens` tokens and with `images` images.
    """

    source: str
    rows: int
    requested: int | None
    samples: int
    empty: int
    split_samples: int
    windows: int
    tokens: int
    images: int

    def to_json(self) -> dict[str, str | int | None]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """All documents in the order of their sources; `digest` covers tokens, images, borders, domains and indices, nothing else."""

    documents: tuple[Document, ...]
    domains: tuple[str, ...]
    digest: str
    sources: tuple[SourceReport, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(document.input_ids) for document in self.documents)


@dataclass(frozen=True, eq=False)
class CalibrationBatch:
    """Documents padded on the right; `domain_B` points into `CalibrationData.domains`, `index_B` is the documents' sample number.

    A document with images is alone in its batch.
    """

    input_ids_BT: npt.NDArray[np.int64]
    length_B: npt.NDArray[np.int64]
    domain_B: npt.NDArray[np.int64]
    index_B: npt.NDArray[np.int64]
    images: Images | None = None

    @property
    def fold_B(self) -> npt.NDArray[np.int64]:  # noqa: N802 - a shape suffix
        """The fold of each document's sums."""
        return self.index_B % NUM_FOLDS

    @property
    def mask_BT(self) -> npt.NDArray[np.bool_]:  # noqa: N802 - a shape suffix
        """True where a real token stands."""
        return np.arange(self.input_ids_BT.shape[1]) < self.length_B[:, None]


def load(
    sources: Sequence[DataSource | str],
    tokenizer: Tokenizer,
    *,
    max_length: int = 2048,
    seed: int = 0,
    processor: Callable[[], Processor] | None = None,
) -> CalibrationData:
    """Read, sample, render and tokenise the sources.

    Of each source the first SAMPLES rows after a shuffle by `seed` are used, whatever other sources there are. Samples
    longer than `max_length` tokens become several documents; none is cut or dropped. `processor` is called when the first
    row with images is met; without one such rows are refused.

    Raises:
        UsageError: a source that does not follow the grammar, or no source.
        DataError: a source that cannot be read or understood, or that yields no token; images that cannot be taken, or
            with which a sample is longer than `max_length`.
        UnsupportedError: an optional package that the source needs is not installed.
    """
    if max_length < 1:
        raise UsageError(f"a maximal length of {max_length} tokens holds nothing", hint="--max-length 2048 is usual")
    given = [sources] if isinstance(sources, str) else sources
    parsed = [source if isinstance(source, DataSource) else DataSource.parse(source) for source in given]
    if not parsed:
        raise UsageError("no calibration data given", hint=f"--data {GRAMMAR}, or --data reap-mix")
    documents: list[Document] = []
    reports: list[SourceReport] = []
    num_samples = 0
    shared = None if processor is None else cache(processor)
    for source in itertools.chain.from_iterable(_expand(source) for source in parsed):
        found, report = _load_source(
            source, tokenizer, shared, max_length=max_length, seed=seed, first_index=num_samples
        )
        documents += found
        reports.append(report)
        num_samples += report.samples
    domains = tuple(sorted({document.domain for document in documents}))
    return CalibrationData(tuple(documents), domains, _digest(documents), tuple(reports))


def batches(data: CalibrationData, *, tokens_per_batch: int, pad_id: int = 0) -> list[CalibrationBatch]:
    """Put documents of like length together, padded on the right, at most `tokens_per_batch` positions (B x T) each.

    A document longer than that, or with images, is a batch of its own. The batches come in a fixed shuffled order, not by length, so
    that any first part of the list is a fair sample of the whole.
    """
    if tokens_per_batch < 1:
        raise UsageError(f"a batch of {tokens_per_batch} tokens holds nothing", hint="give at least 1 token per batch")
    length_of = [len(document.input_ids) for document in data.documents]
    groups: list[list[int]] = []
    group: list[int] = []
    num_real = 0
    text = [number for number, document in enumerate(data.documents) if document.images is None]
    for number in sorted(text, key=lambda number: (-length_of[number], number)):
        longest = length_of[group[0]] if group else length_of[number]
        size = (len(group) + 1) * longest
        if group and (size > tokens_per_batch or size - num_real - length_of[number] > _MAX_PADDING * size):
            groups.append(group)
            group, num_real = [], 0
        group.append(number)
        num_real += length_of[number]
    if group:
        groups.append(group)
    groups += [[number] for number, document in enumerate(data.documents) if document.images is not None]
    _, shuffled = _draw(groups, None, seed=0)
    return [_pad([data.documents[number] for number in group], data.domains, pad_id) for group in shuffled]


def _pad(documents: list[Document], domains: tuple[str, ...], pad_id: int) -> CalibrationBatch:
    length_B = np.array([len(document.input_ids) for document in documents], dtype=np.int64)
    input_ids_BT = np.full((len(documents), int(length_B.max())), pad_id, dtype=np.int64)
    for row_T, document in zip(input_ids_BT, documents, strict=True):
        row_T[: len(document.input_ids)] = document.input_ids
    domain_B = np.array([domains.index(document.domain) for document in documents], dtype=np.int64)
    index_B = np.array([document.index for document in documents], dtype=np.int64)
    return CalibrationBatch(input_ids_BT, length_B, domain_B, index_B, documents[0].images)


def _digest(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256(b"reapkit calibration 1\n")
    for document in documents:
        images = [] if document.images is None else [document.images.digests]
        header = json.dumps([document.index, document.domain, len(document.input_ids), *images])
        digest.update(header.encode() + b"\n" + document.input_ids.astype("<i4").tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Sources to rows


@dataclass(frozen=True)
class _Row:
    """A row as read; `where` names it in messages: file and line, or data set and sample. Its images' paths begin at `folder`."""

    where: str
    fields: dict[str, Any]
    folder: Path = Path()


def looks_like_path(name: str) -> bool:
    """Whether a source is a file's name, which is never looked up on the hub."""
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or name.lower().endswith(_FILE_SUFFIXES)
        or ("/" not in name and "." in name)
    )


def _expand(source: DataSource) -> list[DataSource]:
    """A recipe's parts, its samples spread equally; any other source as it is."""
    if source.name not in RECIPES:
        return [source]
    if source.subset or source.split:
        raise UsageError(f"{source.name} is a recipe: it has no subset or split", hint=f"--data {source.name}")
    parts = [DataSource.parse(part) for part in RECIPES[source.name]]
    if source.samples is not None:
        if source.samples < len(parts):
            raise UsageError(
                f"{source.samples} samples are fewer than the {len(parts)} parts of {source.name}",
                hint=f"ask for at least {len(parts)}: {source.name}:{len(parts)}",
            )
        share, extra = divmod(source.samples, len(parts))
        parts = [dataclasses.replace(part, samples=share + (i < extra)) for i, part in enumerate(parts)]
    if source.domain is not None:
        parts = [dataclasses.replace(part, domain=source.domain) for part in parts]
    return parts


def _read(source: DataSource, seed: int) -> tuple[int, list[_Row], str]:
    """The number of rows read, the rows drawn, and the domain of rows that name none."""
    path = Path(source.name).expanduser()
    if path.exists():
        if source.subset or source.split:
            raise UsageError(f"{source.name} is a file: it has no subset or split", hint=f"--data {source.name}")
        num_rows, rows = _draw(_read_file(path), source.samples, seed)
        return num_rows, [dataclasses.replace(row, folder=path.parent) for row in rows], _stem(path)
    if looks_like_path(source.name):
        raise DataError(f"there is no file {source.name}", hint="a hub data set is written ORG/NAME")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source.name):
        raise DataError(
            f"{source.name!r} is neither a file, nor a hub data set (ORG/NAME), nor a recipe",
            hint=did_you_mean(source.name, RECIPES),
        )
    rows = list(_read_hub(source, seed))
    return len(rows), rows, f"{source.name}[{source.subset}]" if source.subset else source.name


def _draw(items: Iterable[_Item], samples: int | None, seed: int) -> tuple[int, list[_Item]]:
    """Count the items and shuffle them, keeping the first `samples`.

    The order is that of a hash of seed and position: the same on every machine and version, a smaller draw is the
    beginning of a larger one, and only the draw is held in memory.
    """

    def key(item: tuple[int, _Item]) -> bytes:
        return hashlib.blake2b(f"{seed}:{item[0]}".encode(), digest_size=16).digest()

    count = 0

    def numbered() -> Iterator[tuple[int, _Item]]:
        nonlocal count
        for item in items:
            yield count, item
            count += 1

    drawn = sorted(numbered(), key=key) if samples is None else heapq.nsmallest(samples, numbered(), key=key)
    return count, [item for _, item in drawn]


def _stem(path: Path) -> str:
    return re.sub(r"\.[a-z]+(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def _read_file(path: Path) -> Iterator[_Row]:
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if path.is_dir() or not path.name.lower().endswith(ACCEPTED_SUFFIXES):
        what = "a directory" if path.is_dir() else "a file of a kind that is not read"
        raise DataError(f"{path} is {what}", hint=f"give a file that ends in {', '.join(ACCEPTED_SUFFIXES)}")
    readers: dict[str, Callable[[Path], Iterator[_Row]]] = {
        "jsonl": _read_jsonl,
        "json": _read_json,
        "parquet": _read_parquet,
        "txt": _read_text,
        "md": _read_text,
    }
    try:
        yield from readers[kind](path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.name.lower().endswith(".gz") else path.open("rb")


def _read_jsonl(path: Path) -> Iterator[_Row]:
    with _open(path) as file:
        for number in itertools.count(1):
            where = f"{path} line {number}"
            line = file.readline(_MAX_ROW_BYTES + 1)
            if not line:
                return
            if len(line) > _MAX_ROW_BYTES:
                raise DataError(f"{where} has more than {_MAX_ROW_BYTES:,} bytes", hint="is it one row a line?")
            if line.strip():
                yield _row(where, _parsed(line, where))


def _read_json(path: Path) -> Iterator[_Row]:
    rows = _parsed(_whole(path), str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {_kind(rows)}, not a list of rows", hint="write [{...}, {...}]")
    for number, value in enumerate(rows, start=1):
        yield _row(f"{path} row {number}", value)


def _read_parquet(path: Path) -> Iterator[_Row]:
    parquet = _optional("pyarrow.parquet", f"reading {path}")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield _row(f"{path} row {number}", fields)
    except (DataError, OSError):
        raise
    except Exception as error:  # pyarrow raises kinds of its own, and plain ones for values that Python lacks
        raise DataError(f"{path} is not Parquet: {reason_of(error)}") from error


def _read_text(path: Path) -> Iterator[_Row]:
    try:
        text = _whole(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    yield _Row(str(path), {"text": text})


def _whole(path: Path) -> bytes:
    with _open(path) as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise DataError(
            f"{path} holds more than {_MAX_FILE_BYTES:,} bytes", hint="write its rows as .jsonl, one a line"
        )
    return content


def _parsed(text: bytes | str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{where} is not JSON: nested too deeply") from None
    except ValueError as error:
        hint = "a file with one row a line must end in .jsonl" if str(error).startswith("Extra data") else None
        raise DataError(f"{where} is not JSON: {error}", hint=hint) from error


def _read_hub(source: DataSource, seed: int) -> Iterator[_Row]:
    """Stream from the hub; only the rows drawn and the shuffle buffer are downloaded."""
    datasets = _optional("datasets", f"reading {source.name} from the hub")
    try:
        stream = datasets.load_dataset(source.name, source.subset, split=source.split or "train", streaming=True)
        shuffled = stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        drawn = list(itertools.islice(shuffled, source.samples))
    except Exception as error:  # the hub's client raises a dozen kinds, from those of sockets to its own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        closed = re.search(
            r"gated|\b40[13]\b|unauthori|forbidden|authenticated", f"{type(error)} {error}", re.IGNORECASE
        )
        hint = (
            f"accept its terms on the hub page of {source.name}, then log in: hf auth login"
            if closed
            else "check its name, subset and split, and the network; a local copy can be given as a file"
        )
        raise DataError(f"{source.name} cannot be read from the hub: {reason}", hint=hint) from error
    for number, fields in enumerate(drawn, start=1):
        yield _row(f"{source.name} sample {number}", fields)


def _optional(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UnsupportedError(f"{purpose} needs the package {package}", hint="pip install 'reapkit[data]'") from error


def _row(where: str, value: Any) -> _Row:
    if not isinstance(value, dict):
        raise DataError(f"{where} holds {_kind(value)}, not an object with columns")
    return _Row(where, value)


def _kind(value: Any) -> str:
    kinds: tuple[tuple[Any, str], ...] = (
        (type(None), "nothing"),
        (bool, "true or false"),
        (str, "a string"),
        ((int, float), "a number"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Rows to chats


@dataclass(frozen=True)
class _Chat:
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @property
    def images(self) -> list[Path]:
        parts = [
            part for message in self.messages if isinstance(message["content"], list) for part in message["content"]
        ]
        return [Path(part["image"]) for part in parts if part["type"] == "image"]


def _understand(row: _Row) -> _Chat | str:
    """A row's chat, or its plain text, by the first set of columns that it has; a null column counts as absent."""
    found = {name for name, value in row.fields.items() if value is not None}
    for columns, read in _COLUMN_SETS:
        if found.issuperset(columns):
            return read(row)
    known = "; ".join(", ".join(columns) for columns, _ in _COLUMN_SETS)
    raise DataError(
        f"{row.where} has no known set of columns: it has {', '.join(sorted(found)) or 'none'}",
        hint=f"rename its columns to one of these sets: {known}",
    )


def _from_messages(row: _Row) -> _Chat:
    return _Chat(_messages(row, "messages"), _tools(row))


def _from_prompt(row: _Row) -> _Chat:
    return _Chat(_turns(row, "prompt", "user") + _turns(row, "completion", "assistant"), _tools(row))


def _from_query(row: _Row) -> _Chat:
    """xlam: the answers, a JSON list of `{name, arguments}`, are the assistant's tool calls."""
    answers = _decoded(row, "answers")
    if not isinstance(answers, list):
        raise DataError(f"{row.where}: column answers holds {_kind(answers)}, not a list of tool calls")
    calls = [_tool_call(row, call) for call in answers]
    for number, call in enumerate(calls):
        call.setdefault("id", f"call{number:05d}")  # nine letters and digits, as the strictest templates ask
    reply: dict[str, Any] = {"role": "assistant", "content": ""}
    if calls:
        reply["tool_calls"] = calls
    return _Chat([{"role": "user", "content": _text(row, "query")}, reply], _tools(row))


def _from_instruction(row: _Row) -> _Chat:
    extra = _text(row, "input") if row.fields.get("input") else ""
    question = f"{_text(row, 'instruction')}\n\n{extra}" if extra else _text(row, "instruction")
    return _exchange(question, _text(row, "output"))


def _from_question(row: _Row) -> _Chat:
    return _exchange(_text(row, "question"), _text(row, "answer"))


def _from_text(row: _Row) -> str:
    return _text(row, "text")


_COLUMN_SETS: tuple[tuple[tuple[str, ...], Callable[[_Row], _Chat | str]], ...] = (
    (("messages",), _from_messages),
    (("prompt", "completion"), _from_prompt),
    (("query", "answers", "tools"), _from_query),
    (("instruction", "output"), _from_instruction),
    (("question", "answer"), _from_question),
    (("text",), _from_text),
)


def _exchange(question: str, answer: str) -> _Chat:
    return _Chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _text(row: _Row, column: str) -> str:
    value = row.fields[column]
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column {column} holds {_kind(value)}, not a string")
    return value


def _decoded(row: _Row, column: str) -> Any:
    """A column's value, read if it is JSON text; else without nulls, which Parquet puts where rows differ in keys."""
    value = row.fields[column]
    if not isinstance(value, str):
        return _without_nulls(value)
    return _parsed(value, f"{row.where}: column {column}")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _turns(row: _Row, column: str, role: str) -> list[dict[str, Any]]:
    value = row.fields[column]
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(row, column)


def _messages(row: _Row, column: str) -> list[dict[str, Any]]:
    value = _decoded(row, column)
    if not isinstance(value, list):
        raise DataError(f"{row.where}: column {column} holds {_kind(value)}, not a list of messages")
    return [_message(row, message, f"message {number} of {column}") for number, message in enumerate(value, start=1)]


def _message(row: _Row, message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{row.where}: {name} is no object with a role", hint='write {"role": ..., "content": ...}')
    result = dict(message)
    result["content"] = _content(row, message.get("content"), name)
    calls = result.pop("tool_calls", None)
    if calls:
        if not isinstance(calls, list):
            raise DataError(f"{row.where}: {name} has tool_calls that are {_kind(calls)}, not a list")
        result["tool_calls"] = [_tool_call(row, call) for call in calls]
    ids = result.pop("tool_call_ids", None)  # SWE-smith's name for what templates know as tool_call_id
    if isinstance(ids, list) and len(ids) == 1:
        result.setdefault("tool_call_id", ids[0])
    return result


def _content(row: _Row, content: Any, name: str) -> str | list[dict[str, Any]]:
    """Text parts joined, as half of the templates take only a string; with images among them the list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise DataError(f"{row.where}: {name} has content that is {_kind(content)}, not text")
    texts: list[str] = []
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, dict) and part.get("type") == "image":
            parts.append({"type": "image", "image": str(_image(row, part, name))})
            continue
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else None
            raise DataError(f"{row.where}: {name} holds a part that is no text ({kind or _kind(part)})")
        texts.append(text)
        parts.append({"type": "text", "text": text})
    return parts if len(parts) > len(texts) else "".join(texts)


def _image(row: _Row, part: dict[str, Any], name: str) -> Path:
    """The file of an image, as transformers' chat templates know it: `{type: image, image}` or `{type: image, path}`."""
    usual = 'write {"type": "image", "image": PATH}'
    value = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
    if not isinstance(value, str) or not value:
        raise DataError(f"{row.where}: {name} has an image that is {_kind(value)}, not a path", hint=usual)
    if part.get("url") is not None or re.match(r"[a-z][a-z0-9+.-]+://|data:", value, re.IGNORECASE):
        raise DataError(
            f"{row.where}: {name} has an image that is not a local file: {value[:80]}",
            hint=f"download it, then {usual}; nothing is fetched for it",
        )
    path = row.folder / Path(value).expanduser()
    try:
        is_there = path.is_file()
    except OSError:  # a name that no file can have
        is_there = False
    if not is_there:
        raise DataError(
            f"{row.where}: there is no image {path}", hint="paths are relative to the folder of the file with the rows"
        )
    return path


def _tool_call(row: _Row, call: Any) -> dict[str, Any]:
    """OpenAI's form `{type, function: {name, arguments}}`, the arguments an object where they can be read as one."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{row.where}: a tool call has no name", hint='write {"name": ..., "arguments": {...}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # A model's own arguments may be broken JSON: then the template decides about the string.
        try:
            parsed = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    outer = call if function is not call else {}
    return {
        **outer,
        "type": outer.get("type", "function"),
        "function": {**function, "arguments": {} if arguments is None else arguments},
    }


def _tools(row: _Row) -> list[dict[str, Any]] | None:
    """The row's tools in OpenAI's schema; xlam's flat ones are converted."""
    if not row.fields.get("tools"):
        return None
    tools = _decoded(row, "tools")
    if not isinstance(tools, list):
        raise DataError(f"{row.where}: column tools holds {_kind(tools)}, not a list")
    return [_tool(row, tool) for tool in tools] or None


def _tool(row: _Row, tool: Any) -> dict[str, Any]:
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        return tool
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
        raise DataError(
            f"{row.where}: a tool has no name", hint='write {"name": ..., "description": ..., "parameters": {...}}'
        )
    parameters = tool.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise DataError(f"{row.where}: tool {tool['name']} has parameters that are {_kind(parameters)}, not an object")
    if parameters.get("type") != "object":
        properties = {name: _property(value) for name, value in parameters.items()}
        required = [name for name, value in parameters.items() if not _is_optional(value)]
        parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {**tool, "parameters": parameters}}


_SCHEMA_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "str": "string",
        "int": "integer",
        "float": "number",
        "bool": "boolean",
        "list": "array",
        "tuple": "array",
        "set": "array",
        "dict": "object",
    }
)


def _is_optional(argument: Any) -> bool:
    return isinstance(argument, dict) and ("default" in argument or "optional" in str(argument.get("type", "")).lower())


def _property(argument: Any) -> Any:
    """A flat argument with its Python type (`str, optional`, `List[int]`) named as JSON Schema does; others stay."""
    if not isinstance(argument, dict) or not isinstance(argument.get("type"), str):
        return argument
    bare = re.sub(r"^optional\[(.*)\]$|,\s*optional$", r"\1", argument["type"].strip().lower())
    return {**argument, "type": _SCHEMA_TYPES.get(bare.partition("[")[0].strip(), argument["type"])}


# ---------------------------------------------------------------------------------------------------------------------
# Chats to tokens


def _load_source(
    source: DataSource,
    tokenizer: Tokenizer,
    processor: Callable[[], Processor] | None,
    *,
    max_length: int,
    seed: int,
    first_index: int,
) -> tuple[list[Document], SourceReport]:
    num_rows, rows, default_domain = _read(source, seed)
    if not rows:
        raise DataError(f"{source.name} holds no rows")
    domains = [source.domain or _domain(row) or default_domain for row in rows]
    documents: list[Document] = []
    num_samples = num_split = 0
    for row, domain, (ids_T, images) in zip(rows, domains, _tokenize(rows, tokenizer, processor), strict=True):
        if len(ids_T) == 0:
            continue
        if images is not None and len(ids_T) > max_length:
            raise DataError(
                f"{row.where} has {len(ids_T):,} tokens with its images, which are never split, and at most {max_length:,} "
                "are allowed",
                hint=f"--max-length {len(ids_T)}, or smaller images",
            )
        for start in range(0, len(ids_T), max_length):
            documents.append(Document(ids_T[start : start + max_length], domain, first_index + num_samples, images))
        num_samples += 1
        num_split += len(ids_T) > max_length
    if not documents:
        raise DataError(f"{source.name} yields no tokens: each of its {len(rows)} samples is empty")
    report = SourceReport(
        source=str(source),
        rows=num_rows,
        requested=source.samples,
        samples=num_samples,
        empty=len(rows) - num_samples,
        split_samples=num_split,
        windows=len(documents),
        tokens=sum(len(document.input_ids) for document in documents),
        images=sum(len(document.images.digests) for document in documents if document.images is not None),
    )
    return documents, report


def _domain(row: _Row) -> str | None:
    domain = row.fields.get("domain")
    if domain is not None and not isinstance(domain, str):
        raise DataError(f"{row.where}: column domain holds {_kind(domain)}, not a string")
    return domain or None


def _tokenize(
    rows: Sequence[_Row], tokenizer: Tokenizer, processor: Callable[[], Processor] | None
) -> Iterator[tuple[npt.NDArray[np.int32], Images | None]]:
    """Token ids of every row, none for an empty one, and its images.

    A template writes every special token itself, so none is added to a chat. Plain text gets the tokenizer's own once,
    also if the text begins with them.
    """
    for start in range(0, len(rows), _TOKENIZER_CHUNK):
        texts: list[str] = []
        is_chat: list[bool] = []
        seen: dict[int, tuple[npt.NDArray[np.int32], Images]] = {}
        for number, row in enumerate(rows[start : start + _TOKENIZER_CHUNK]):
            content = _understand(row)
            is_chat.append(isinstance(content, _Chat))
            if isinstance(content, _Chat) and content.images:
                seen[number] = _see(row, content, processor)
                texts.append("")
            else:
                texts.append(_encodable(_render(row, content, tokenizer) if isinstance(content, _Chat) else content))
        ids: dict[int, npt.NDArray[np.int32]] = {}
        for chat in (True, False):
            chosen = [number for number, text in enumerate(texts) if text and is_chat[number] == chat]
            if chosen:
                encoded = _encoded(tokenizer, [texts[number] for number in chosen], add_special_tokens=not chat)
                ids.update(zip(chosen, encoded, strict=True))
        bos = tokenizer.bos_token_id
        for number in range(len(texts)):
            ids_T = ids.get(number, _NO_TOKENS)
            doubled = not is_chat[number] and bos is not None and len(ids_T) > 1 and (ids_T[:2] == bos).all()
            yield seen.get(number, (ids_T[1:] if doubled else ids_T, None))


def _encoded(tokenizer: Tokenizer, texts: list[str], *, add_special_tokens: bool) -> list[npt.NDArray[np.int32]]:
    """Token ids of each text.

    Raises:
        DataError: the tokenizer fails, as one from a stranger's files may in any way.
    """
    try:
        encoded = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return [np.asarray(ids, dtype=np.int32) for ids in encoded]
    except BaseException as error:  # panics of the library's Rust part are no Exception
        if not is_failure(error):
            raise
        raise DataError(f"the checkpoint's tokenizer fails: {reason_of(error)}", hint="fetch it again") from error


def _encodable(text: str) -> str:
    """Half surrogate pairs, which JSON escapes may hold and tokenizers refuse, become the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _render(row: _Row, chat: _Chat, tokenizer: Tokenizer) -> str:
    """The chat through the model's own template, which transformers runs in its sandbox."""
    if not chat.messages:
        return ""
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.where} is a chat, but the tokenizer has no chat template",
            hint="give rows with a column text, or a checkpoint with a chat template",
        )

    def apply(messages: list[dict[str, Any]]) -> str:
        template = tokenizer.get_chat_template(tools=chat.tools)
        options = {"tools": chat.tools, "tokenize": False, **_dated(template)}
        return str(tokenizer.apply_chat_template(messages, **options))

    hint = "change or remove the row, or give its rendered text in a column text"
    return _applied(row, chat, apply, failure="the chat template fails", hint=hint)


def _dated(template: Any) -> dict[str, Any]:
    """The option that gives a template a fixed date, if it asks for today's."""
    return {"chat_template": _FIXED_DATE + template} if isinstance(template, str) and "strftime_now" in template else {}


def _applied(
    row: _Row, chat: _Chat, apply: Callable[[list[dict[str, Any]]], _Item], *, failure: str, hint: str
) -> _Item:
    """What a template makes of a chat's messages; DataError, with the row and the reason, where it fails."""
    try:
        with within(_TEMPLATE_SECONDS):
            try:
                return apply(chat.messages)
            except TypeError:
                # Some templates (DeepSeek's) add the arguments to a string: those want them as JSON text.
                if not any("tool_calls" in message for message in chat.messages):
                    raise
                return apply(_with_text_arguments(chat.messages))
    except Exception as error:  # a template is a program from the checkpoint and may fail in any way
        raise DataError(f"{row.where}: {failure}: {str(error).strip() or type(error).__name__}", hint=hint) from error


def _see(row: _Row, chat: _Chat, processor: Callable[[], Processor] | None) -> tuple[npt.NDArray[np.int32], Images]:
    """A chat with images through the model's own processor: token ids, those of images among them, and the images."""
    if processor is None:
        raise DataError(f"{row.where} holds images, and only text is read here", hint="remove the rows with images")
    digests = _digests_of_files(row, chat.images)
    inputs = _processed(row, chat, processor())
    ids_T = inputs.pop("input_ids")[0].astype(np.int32)
    if not any(np.issubdtype(array.dtype, np.floating) for array in inputs.values()):
        raise DataError(
            f"{row.where}: the processor gives no pixels for its images", hint="is its chat template one for images?"
        )

    def load() -> dict[str, npt.NDArray[Any]]:
        again = _processed(row, chat, processor())
        if _digests_of_files(row, chat.images) != digests or not np.array_equal(again.pop("input_ids")[0], ids_T):
            raise DataError(f"{row.where}: its images were changed after they were first read", hint="start again")
        return again

    return ids_T, Images(digests, sum(array.nbytes for array in inputs.values()), load)


def _digests_of_files(row: _Row, paths: Sequence[Path]) -> tuple[str, ...]:
    try:
        return tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    except OSError as error:
        raise DataError(f"{row.where}: an image cannot be read: {error}") from error


def _processed(row: _Row, chat: _Chat, processor: Processor) -> dict[str, npt.NDArray[Any]]:
    """What the processor makes of a chat, by name; there is no mask, as nothing is padded."""

    def apply(messages: list[dict[str, Any]]) -> dict[str, npt.NDArray[Any]]:
        features = processor.apply_chat_template(
            [dict(message) for message in messages],
            tools=chat.tools,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"add_special_tokens": False, "verbose": False},
            **_dated(processor.chat_template),
        )
        return {name: np.asarray(value) for name, value in features.items() if name != "attention_mask"}

    hint = "change or remove the row, and see whether its images can be opened"
    return _applied(row, chat, apply, failure="the processor fails", hint=hint)


def _with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": text}}

    return [
        {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]
