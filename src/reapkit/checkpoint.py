"""A checkpoint as it lies on disk: raw config, tensor table, sidecar files. Nothing is decoded and no library's config class is used.

The index is the only authority on which tensors a checkpoint has: vendors' shard names lie about how many shards there are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from reapkit import hub
from reapkit.errors import CheckpointError, UnsupportedError, UsageError
from reapkit.progress import Progress, silent
from reapkit.sources import Disk, Folder, Remote, Source
from reapkit.tensors import (
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    TensorInfo,
    brief,
    parse_header,
    parse_json,
    read_header,
    reading,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
MANIFEST_NAME = "reapkit.json"
CARD_NAME = "README.md"
# Where an output's folder keeps what was measured of it, for its card and its report.
STATISTICS_NAME = "reapkit/statistics.safetensors"
FIDELITY_NAME = "reapkit/fidelity.json"
EVALUATION_NAME = "reapkit/eval.json"
# Present in an output folder from the first byte to the last rename: a folder that has it is nobody's checkpoint.
UNFINISHED_NAME = "reapkit.unfinished.json"

# Weights of other formats are never read (pickles) nor carried along (they would hold the unpruned model).
_WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".onnx",
    ".h5",
    ".msgpack",
    ".pkl",
    ".pickle",
    ".npz",
    ".npy",
}
# What a repository shows or was made from, and no runtime reads: figures of the README, data sets.
_ATTACHMENT_SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".gif", ".svg", ".webp", ".pdf", ".mp4", ".jsonl", ".parquet", ".csv",
}  # fmt: skip
# Copies of the weights in other layouts (gpt-oss ships two), and reapkit's own folder.
_FOREIGN_FOLDERS = {"original", "metal", "onnx", "reapkit"}


# Descriptions of the quantisation that decide how weights are counted, wherever only tables are fetched.
_QUANTIZATION_TABLES = ("hf_quant_config.json",)
# The least that a header takes per tensor beside its name. A guess that is too short is made good by exactly what is missing, one
# that is too long moves bytes in vain: MiniMax-M2's headers take 77, with shapes of one digit 64.
_ENTRY_BYTES = 60


@dataclass(frozen=True)
class Checkpoint:
    """Safetensors shards with their config, in a folder or on the hub.

    Attributes:
        path: the folder; of a repository on the hub, the one in its cache where the small files lie.
        config: `config.json`, parsed and otherwise untouched.
        tensors: every tensor of the index by name, in the order of shards and of bytes within a shard.
        sidecars: other files that belong to the checkpoint (tokenizer, template, licence, remote code), relative to `path`.
        origin: how the user named it: a path or a hub id.
        revision: the hub's commit, when it is known.
        remote: the repository that shards are read from which `path` lacks; None for a folder.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    sidecars: tuple[str, ...]
    origin: str
    revision: str | None = None
    remote: Remote | None = None

    @classmethod
    def open(
        cls, source: str | Path | Place, *, revision: str | None = None, progress: Progress = silent
    ) -> Checkpoint:
        """Open a folder, a snapshot in the hub's cache, or a repository on the hub, of which headers and small files are fetched.

        Args:
            source: a folder, a hub id, or what `locate` found.
            revision: of a hub id.
            progress: told how a repository's small files, headers and fingerprints come.

        Raises:
            CheckpointError: something is missing, truncated or contradicts itself.
            HubError: the hub does not give it.
        """
        place = source if isinstance(source, Place) else locate(source, revision=revision, progress=progress)
        path, origin, remote = place.path, place.origin, place.remote
        refuse_unfinished(path)
        config = read_config(path)
        weight_map, index_file = read_index(path) if remote is None else _read_remote_index(remote)
        tensors: dict[str, TensorInfo] = {}
        names: dict[str, set[str]] = defaultdict(set)
        for name, file in weight_map.items():
            names[file].add(name)
        headers = _local_headers(path, names) if remote is None else _remote_headers(remote, names)
        for file, header in headers:
            wanted = names[file]
            if absent := sorted(wanted - header.keys()):
                raise CheckpointError(
                    f"{index_file} places {absent[0]!r} in {file}, which does not hold it ({len(absent)} such tensors)",
                    hint="fetch the shard and the index again",
                )
            tensors.update((name, info) for name, info in header.items() if name in wanted)
        if not tensors:
            raise CheckpointError(f"{origin} holds no tensors")
        return cls(path, config, tensors, _sidecars(path), origin, place.revision, remote)

    @cached_property
    def source(self) -> Source:
        """Where the bytes of the shards come from."""
        return self.remote or Folder(self.path)

    @property
    def files(self) -> tuple[str, ...]:
        """The shards that hold tensors, in the order of `tensors`."""
        return tuple(dict.fromkeys(info.file for info in self.tensors.values()))

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def layout_fingerprint(self) -> str:
        """SHA-256 over names, dtypes and shapes: the same for every copy of a checkpoint, whatever its shards."""
        lines = sorted(f"{info.name} {info.dtype} {list(info.shape)}" for info in self.tensors.values())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def read(self, info: TensorInfo) -> bytearray:
        """The bytes of one tensor, writable so that frameworks can wrap them without another copy.

        Raises:
            CheckpointError: the shard has shrunk since it was opened.
            HubError: the hub does not give them.
        """
        buffer = bytearray(info.nbytes)
        self.read_into(info, memoryview(buffer))
        return buffer

    def read_into(self, info: TensorInfo, view: memoryview) -> None:
        """Fill memory of the tensor's size with its bytes; may run in several threads at once.

        Raises:
            CheckpointError: the shard has shrunk since it was opened.
            HubError: the hub does not give them.
        """
        self.source.read_into(info.file, info.start, view, inside=info.name)

    def expecting(
        self, infos: Iterable[TensorInfo], *, cached: int = 0, disk: Disk | None = None, holding: bool = False
    ) -> AbstractContextManager[None]:
        """While this lasts, the tensors' bytes are read ahead in this order: those of a folder into the page cache."""
        ranges = ((info.file, info.start, info.stop) for info in infos)
        return self.source.expecting(ranges, cached=cached, disk=disk, holding=holding)

    def fingerprinting(self, parts: Iterable[tuple[Iterable[str], int | None]]) -> AbstractContextManager[None]:
        """While this lasts, what `fingerprint` reads of the named tensors, up to a limit, comes together through a network, and is kept
        where it is little."""
        if self.remote is None:
            return nullcontext()
        ranges = [
            (info.file, info.start, info.stop if limit is None else min(info.stop, info.start + limit))
            for names, limit in parts
            if (frozenset(names), limit) not in self._fingerprints
            for info in map(self.tensors.__getitem__, sorted(names))
        ]
        return self.source.expecting(ranges, holding=True, task="fingerprints")

    def fingerprint(self, names: Iterable[str], *, limit: int | None = None) -> str:
        """SHA-256 over the bytes of the named tensors, or the first `limit` bytes of each, in the order of their names."""
        named = frozenset(names)
        if (named, limit) in self._fingerprints:
            return self._fingerprints[named, limit]
        digest = hashlib.sha256()
        for name in sorted(named):
            info = self.tensors[name]
            digest.update(f"{name} {info.dtype}\n".encode())
            stop = info.stop if limit is None else min(info.stop, info.start + limit)
            digest.update(self.read(replace(info, stop=stop)))
        if self.remote is not None:  # a commit never changes
            self._fingerprints[named, limit] = digest.hexdigest()
        return digest.hexdigest()

    @cached_property
    def _fingerprints(self) -> dict[tuple[frozenset[str], int | None], str]:
        return {}


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies.

    Attributes:
        path: its folder; of a repository on the hub, the one in its cache that holds its small files.
        origin: how the user named it, without a revision.
        revision: the hub's commit, where known.
        remote: the repository that the rest is read from.
    """

    path: Path
    origin: str
    revision: str | None = None
    remote: Remote | None = None


def locate(
    source: str | Path, *, revision: str | None = None, sidecars: bool = True, progress: Progress = silent
) -> Place:
    """Find a folder, or a repository on the hub, of which config, index and, with `sidecars`, the other small files are fetched.

    Where no hub can be asked, what its cache holds has to do.

    Raises:
        UsageError: a revision of a folder.
        CheckpointError: neither a folder nor a hub id.
        HubError: the hub does not give it.
    """
    path, text = Path(source), str(source)
    is_there = exists(path)
    if is_there and path.is_dir():
        if revision is not None:
            raise UsageError(
                f"{source} is a folder, which has no revision", hint="leave out --revision, or give a hub id"
            )
        # A snapshot in the hub's cache is named by its commit.
        is_snapshot = path.resolve().parent.name == "snapshots"
        return Place(path, text, path.resolve().name if is_snapshot else None)
    if is_there:
        raise CheckpointError(f"{source} is a file; a checkpoint is a folder with {CONFIG_NAME} and safetensors shards")
    # What stands beside existing folders is a mistyped path, not a hub id.
    mistyped = path.parent != Path() and path.parent.is_dir()
    name, stated = hub.parse(text)
    if mistyped or name.count("/") != 1 or name.startswith((".", "/", "~")) or os.sep * 2 in name:
        raise CheckpointError(
            f"there is no folder {text!r}", hint="give a checkpoint's folder or a hub id like ORG/NAME"
        )
    if stated is not None and revision not in (None, stated):
        raise UsageError(f"{text} names one revision and --revision {revision} another", hint="leave out one of them")
    revision = revision or stated
    try:
        repository = hub.find(name, revision=revision)
    except hub.UnreachableError:
        if (folder := hub.cached(name, revision=revision)) is None:
            raise
        return Place(folder, name, folder.name)
    if CONFIG_NAME not in repository.files:
        raise CheckpointError(
            f"{name} has no {CONFIG_NAME}", hint="a checkpoint has config.json and safetensors shards"
        )
    tables = {CONFIG_NAME, INDEX_NAME, *_QUANTIZATION_TABLES} & repository.files.keys()
    # The source's card says what licence an output has.
    others = {name for name in repository.files if _is_sidecar(name) or name == CARD_NAME} if sidecars else set()
    folder = hub.snapshot(repository, sorted(tables | others), progress=progress)
    return Place(folder, name, repository.revision, Remote(repository, folder, progress=progress))


def exists(path: Path) -> bool:
    """Whether something lies there.

    Raises:
        CheckpointError: the system cannot say, as of a name that is too long.
    """
    try:
        return path.exists()
    except OSError as error:
        raise CheckpointError(f"{brief(str(path))} cannot be looked up: {error.strerror}") from None


def _local_headers(path: Path, files: Iterable[str]) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    for file in sorted(files):
        yield file, read_header(shard_path(path, file), file=file)[0]


def _remote_headers(remote: Remote, names: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """The headers of a repository's shards, several at once; how long each will be at least follows from the names of its tensors."""
    guesses = [
        (file, 0, min(remote.size(file), 8 + sum(len(name) + _ENTRY_BYTES for name in names[file])))
        for file in sorted(names)
    ]
    begun: dict[str, bytearray] = {}
    with remote.expecting(guesses, task="headers"):
        for file, _, guess in guesses:
            begun[file] = bytearray(guess)
            remote.read_into(file, 0, memoryview(begun[file]))
    rest = []
    for file, known in begun.items():
        stop = min(8 + int.from_bytes(known[:8], "little"), MAX_HEADER_BYTES, remote.size(file))
        rest.append((file, len(known), stop))
    with remote.expecting(rest):
        for file, known in begun.items():
            header, _ = parse_header(_reader(remote, file, known), size=remote.size(file), file=file)
            length = min((info.start for info in header.values()), default=remote.size(file))
            remote.headers[file] = (length, hashlib.sha256(known[:length]))
            yield file, header


def _reader(remote: Remote, file: str, known: bytearray) -> Callable[[int, int], bytearray]:
    """Bytes of a file whose beginning is known already."""

    def read(start: int, stop: int) -> bytearray:
        if stop > len(known):
            more = bytearray(stop - len(known))
            remote.read_into(file, len(known), memoryview(more))
            known.extend(more)
        return known[start:stop]

    return read


def _read_remote_index(remote: Remote) -> tuple[dict[str, str], str]:
    """As `read_index`, of a repository."""
    files = remote.repository.files
    if INDEX_NAME in files:
        weight_map, index_file = read_index(remote.path)
        for file in set(weight_map.values()):
            _refuse_outside(file)
        return weight_map, index_file
    if SINGLE_NAME in files:
        header, _ = parse_header(
            _reader(remote, SINGLE_NAME, bytearray()), size=remote.size(SINGLE_NAME), file=SINGLE_NAME
        )
        return dict.fromkeys(header, SINGLE_NAME), SINGLE_NAME
    raise _without_weights(remote.repository.name, files)


def refuse_unfinished(path: Path) -> None:
    """Raise for a folder whose writing was interrupted."""
    if (path / UNFINISHED_NAME).exists():
        raise CheckpointError(
            f"{path} is the unfinished output of an interrupted run",
            hint="repeat the command that wrote it: it goes on where it stopped",
        )


def read_config(path: Path) -> dict[str, Any]:
    """`config.json`, parsed."""
    # State-space layers' `time_step_limit` ends at Infinity in published configs.
    return parse_json(read_small(path, CONFIG_NAME), origin=CONFIG_NAME, infinite=True)


def read_index(path: Path) -> tuple[dict[str, str], str]:
    """Tensor name to shard name, and the name of the file that says so; a lone `model.safetensors` is its own index.

    Raises:
        CheckpointError: there is no index, or it names a file outside the folder.
    """
    if (path / INDEX_NAME).exists():
        # Only names count here; what it says about sizes may be anything.
        index = parse_json(read_small(path, INDEX_NAME), origin=INDEX_NAME, infinite=True)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{INDEX_NAME} has no table weight_map of tensor names to shard names")
        return weight_map, INDEX_NAME
    if (path / SINGLE_NAME).exists():
        header, _ = read_header(shard_path(path, SINGLE_NAME))
        return dict.fromkeys(header, SINGLE_NAME), SINGLE_NAME
    raise _without_weights(str(path), (entry.name for entry in path.iterdir()))


def _without_weights(where: str, names: Iterable[str]) -> CheckpointError:
    hint = "reapkit reads safetensors only"
    if pickles := sorted(name for name in names if name.endswith((".bin", ".pt", ".pth"))):
        hint = f"{pickles[0]} is a pickle, which can run code when loaded: convert it to safetensors first"
    return CheckpointError(f"{where} has neither {INDEX_NAME} nor {SINGLE_NAME}", hint=hint)


def shard_path(path: Path, file: str) -> Path:
    """The path of a shard named by an index, refused unless it is a plain file of this folder.

    A link is followed only into the hub's cache (`blobs/` beside `snapshots/`): anything else could read files that are not part of
    the checkpoint.
    """
    _refuse_outside(file)
    full = path / file
    try:
        if not full.exists():
            raise CheckpointError(
                f"the shard {file} is missing from {path}", hint="fetch it again, or the download never finished"
            )
        if not full.is_file() or not is_inside(full, path):
            raise CheckpointError(f"the shard {file} is not a plain file of {path}")
    except OSError as error:
        raise CheckpointError(f"the shard {brief(file)} cannot be looked up: {error.strerror}") from None
    return full


def _refuse_outside(file: str) -> None:
    pure = PurePosixPath(file)
    if pure.is_absolute() or ".." in pure.parts or "\\" in file or "\0" in file:
        raise CheckpointError(f"{INDEX_NAME} names {file!r}, which is outside the checkpoint")


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file, links resolved, lies in the folder or in the hub cache that the folder belongs to."""
    try:
        resolved, root = file.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # links that lead to each other, or to where nothing may be looked up
        return False
    cache = root.parent.parent / "blobs"
    return resolved.is_relative_to(root) or (root.parent.name == "snapshots" and resolved.is_relative_to(cache))


def read_small(path: Path, name: str) -> bytes:
    """A JSON file of a checkpoint's folder.

    Raises:
        CheckpointError: it is missing, not a plain file of the folder, or too large to be one.
    """
    full = path / name
    if not full.exists():
        raise CheckpointError(
            f"{path} has no {name}", hint="a checkpoint is a folder with config.json and safetensors shards"
        )
    if not full.is_file() or not is_inside(full, path):
        raise CheckpointError(f"{name} is not a plain file of {path}")
    with reading(name):
        if (size := full.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{name} has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
        return full.read_bytes()


def _sidecars(path: Path) -> tuple[str, ...]:
    names = sorted(_walk_sidecars(path))
    if odd := [name for name in names if not name.isprintable() or any("\ud800" <= sign <= "\udfff" for sign in name)]:
        raise CheckpointError(
            f"{path} holds a file whose name has signs that cannot be printed: {odd[0]!r}", hint="remove or rename it"
        )
    return tuple(names)


def _walk_sidecars(root: Path) -> Iterator[str]:
    skipped = {*_FOREIGN_FOLDERS, "__pycache__"}
    for entry in walk(root, enter=lambda name: not name.startswith(".") and name not in skipped):
        if not entry.name.startswith(".") and is_plain_file(entry, root) and not _is_own_or_weight(entry, root):
            yield entry.relative_to(root).as_posix()


def walk(root: Path, *, enter: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """Everything in a folder and the folders in it, but for those whose name `enter` declines.

    Links to folders are given and not followed, since they may lead out or round in circles.

    Raises:
        CheckpointError: a folder cannot be listed, as one nested too deeply cannot.
    """
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise CheckpointError(f"{brief(str(folder))} cannot be listed: {error.strerror}") from None
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                folders += [Path(entry)] if enter(entry.name) else []
            yield Path(entry)


def is_plain_file(file: Path, folder: Path) -> bool:
    """Whether there is such a file, and it belongs to the folder as `is_inside` says."""
    try:
        return file.is_file() and is_inside(file, folder)
    except OSError:  # a name that no file can have
        return False


def require_plain_files(path: Path) -> None:
    """Refuse a folder from which transformers is to read where a link leads out of it, or a pipe or device stands in a file's place.

    Raises:
        CheckpointError: it names the entry.
    """
    for entry in walk(path):
        if not is_inside(entry, path):
            raise CheckpointError(
                f"{entry.relative_to(path).as_posix()!r} in {path} leads out of the checkpoint",
                hint="put the file itself there, or remove it",
            )
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise CheckpointError(f"{entry.relative_to(path).as_posix()!r} in {path} is neither a file nor a folder")


def _is_own_or_weight(entry: Path, root: Path) -> bool:
    # The source's README describes the source; the output gets a card of its own.
    own = entry.parent == root and entry.name in {CONFIG_NAME, MANIFEST_NAME, UNFINISHED_NAME, CARD_NAME}
    return own or entry.suffix in _WEIGHT_SUFFIXES | _ATTACHMENT_SUFFIXES or entry.name.endswith(".index.json")


def _is_sidecar(name: str) -> bool:
    """Whether a file of a repository is one that `_walk_sidecars` would find in its folder."""
    path = PurePosixPath(name)
    folders = path.parts[:-1]
    hidden = any(part.startswith(".") or part in {*_FOREIGN_FOLDERS, "__pycache__"} for part in folders)
    return not hidden and not path.name.startswith(".") and not _is_own_or_weight(Path(name), Path())


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: `text_config` in models that also see or hear, else the whole."""
    section = config.get("text_config")
    return section if isinstance(section, dict) else config


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config's `quantization_config`, None for an unquantised checkpoint."""
    value = config.get("quantization_config")
    if value is None:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("quant_method"), str):
        raise UnsupportedError(
            f"{CONFIG_NAME} has a quantization_config without a quant_method: {json.dumps(value)[:200]}"
        )
    return value
