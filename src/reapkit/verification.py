"""Whether an output is what its manifest says: byte for byte against its source once, by digests afterwards.

Neither transformers nor vLLM checks a pruned quantised checkpoint for completeness, so a gap in expert numbers or a lost scale would load
silently wrong. Which tensors are expected is worked out here from the source and the manifest's kept experts, not from what the writer did;
what the config and the quantisers' files should say comes from the functions that write them.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from reapkit import edits
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import (
    CARD_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    Checkpoint,
    exists,
    is_plain_file,
    read_config,
    read_index,
    read_small,
    refuse_unfinished,
    shard_path,
    walk,
)
from reapkit.clusters import Group
from reapkit.errors import CheckpointError, ReapkitError
from reapkit.landing import Landed
from reapkit.layout import Identity, MoELayer, MoELayout, StackedTensor, resolve
from reapkit.outputs import explained
from reapkit.progress import Progress, silent
from reapkit.quantization import Format, read_format
from reapkit.shards import LANDED, Manifest
from reapkit.sources import Range
from reapkit.tensors import TensorInfo, parse_json, read_header, reading

if TYPE_CHECKING:
    from reapkit.neurons import Place

# Large enough that calls cost nothing, small enough that bytes are still in a core's cache when they are hashed and compared.
_CHUNK_BYTES = 2 << 20
# A core hashes and compares about 1 GB/s, and reads what that takes from the source beside it; no disk of today needs more of them.
_FILES_AT_ONCE = 8


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    Attributes:
        problems: a sentence for each thing that is wrong, naming the tensor or file.
        num_tensors: tensors in readable shards.
        num_bytes: bytes that were read and hashed.
        against_source: whether tensors were compared with the source; else files with the digests of an earlier verification.
        num_received: shards whose bytes were compared with what was received from the hub when they were written, not fetched again.
        moved_bytes: that came through the network for it.
    """

    problems: tuple[str, ...]
    num_tensors: int
    num_bytes: int
    against_source: bool
    num_received: int = 0
    moved_bytes: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    out: str | Path,
    *,
    source: Checkpoint | str | Path | None = None,
    refetch: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Check an output folder, reading each of its files once.

    The first run compares with the source and, if all is well, records the digest of every file in the manifest. Later runs need only
    the digests; with `source` they compare again.

    Of a source on the hub, headers and small files are read. The bytes of shards that came from there are compared with the digests
    that were listed as they came, and that list with where they belong; with `refetch`, they are fetched again.

    Raises:
        CheckpointError: not a finished output of reapkit, another checkpoint's source, or no source where one is needed.
    """
    out = Path(out)
    if not out.is_dir():
        raise CheckpointError(f"there is no folder {out}", hint="give the folder that reapkit prune wrote")
    refuse_unfinished(out)
    manifest = Manifest.load(out)
    is_compared = source is not None or refetch or manifest.digests is None
    original = _open_source(out, manifest, source, progress or silent) if is_compared else None

    found = _Output(out)
    found.read_tables()
    found.check_counts(manifest)
    # Its text is not compared: results are added to it, and people edit it.
    if not (out / CARD_NAME).is_file():
        found.problems.append(f"{CARD_NAME} is missing")
    expected: dict[str, _Expected] = {}
    sidecars: tuple[str, ...] = ()
    if original is not None:
        checkpoint, layout = original
        expected = _expected_tensors(checkpoint, layout, manifest)
        if manifest.merging is not None:
            expected = _merged(checkpoint, layout, manifest, expected, out)
        found.compare_tables(expected)
        found.compare_config(
            edits.edit_config(
                checkpoint,
                layout,
                manifest.kept,
                drop_mtp=manifest.drop_mtp,
                dequantize=manifest.dequantized,
            )
        )
        edited = edits.edit_sidecars(checkpoint, layout, manifest.kept, dequantize=manifest.dequantized)
        sidecars = tuple(name for name in checkpoint.sidecars if edited.get(name, b"") is not None)
        found.compare_sidecars(checkpoint, sidecars, edited)
    landed = _landed(out, found, original[0]) if original is not None and not refetch else {}
    found.read_files(
        expected,
        {*found.headers, *sidecars, CONFIG_NAME, INDEX_NAME, *(manifest.digests or {})},
        checkpoint=original[0] if original is not None else None,
        landed=landed,
        progress=progress or silent,
    )
    if manifest.digests is not None:
        found.compare_digests(manifest.digests)
    elif not found.problems:
        with explained(
            out / MANIFEST_NAME, hint="the output is as it should be; recording its digests needs a writable folder"
        ):
            replace(manifest, digests=dict(sorted(found.digests.items()))).save(out)
    num_tensors = sum(len(header) for header in found.headers.values())
    remote = original[0].remote if original is not None else None
    return Verification(
        tuple(dict.fromkeys(found.problems)),
        num_tensors,
        found.num_bytes,
        original is not None,
        len(landed),
        remote.ranges.moved if remote is not None else 0,
    )


def _landed(out: Path, found: _Output, checkpoint: Checkpoint) -> dict[str, Landed]:
    """By shard that came from the hub and is not on this machine, the list of what came."""
    if checkpoint.remote is None:
        return {}
    lists = {file: Landed.load(out / LANDED / f"{file}.jsonl") for file in found.headers}
    return {
        file: landed
        for file, landed in lists.items()
        if landed is not None and checkpoint.remote.local(landed.source) is None
    }


@dataclass(frozen=True, slots=True)
class _Expected:
    """Where a tensor of the output should come from.

    Attributes:
        info: the source's tensor.
        dtype, shape: what the output should say.
        stacked: the experts' dimension, where only some of them are kept; else None.
        kept: those experts.
        dequantized: the format whose values are to be bf16; None where bytes are compared.
        average: whose weighted average it is; None where it is the source's own.
    """

    info: TensorInfo
    dtype: str
    shape: tuple[int, ...]
    stacked: StackedTensor | None = None
    kept: tuple[int, ...] = ()
    dequantized: Format | None = None
    average: _Average | None = None


@dataclass(frozen=True, slots=True)
class _Average:
    """Of which experts a tensor is the average.

    Attributes:
        groups: in the order of the output.
        members: tensors by expert, where each has one of its own.
        place: where neurons lie in it, None where they are averaged as they lie.
        order_EI: the orders in which neurons match.
        format: how the source stores the values.
    """

    groups: tuple[Group, ...]
    members: Mapping[int, TensorInfo]
    place: Place | None
    order_EI: np.ndarray[Any, Any] | None
    format: Format


def _open_source(
    out: Path, manifest: Manifest, source: Checkpoint | str | Path | None, progress: Progress
) -> tuple[Checkpoint, MoELayout]:
    planned = manifest.source
    try:
        named = planned.origin if source is None else source
        # A repository has moved on since, and a folder has no revision.
        revision = planned.revision if named == planned.origin and not exists(Path(planned.origin)) else None
        checkpoint = (
            named if isinstance(named, Checkpoint) else Checkpoint.open(named, revision=revision, progress=progress)
        )
    except ReapkitError as error:
        if source is not None:
            raise
        raise CheckpointError(
            f"{out} was not yet compared with its source, and that cannot be opened: {error.message}",
            hint="say where the source is with --source",
        ) from None
    layout = resolve(checkpoint, ARCHITECTURES)
    if (what := planned.differing(Identity.of(checkpoint, layout))) is not None:
        raise CheckpointError(
            f"{checkpoint.origin} is not the checkpoint that {out} was made from: it has other {what}",
            hint=f"it was made from {planned.origin}" + (f" at {planned.revision}" if planned.revision else ""),
        )
    return checkpoint, layout


def _expected_tensors(checkpoint: Checkpoint, layout: MoELayout, manifest: Manifest) -> dict[str, _Expected]:
    """What the output should hold, by name: the experts in the manifest's order, stacked tensors at those indices, the rest as it is."""
    layers = [layer for layer in layout.layers if not (manifest.drop_mtp and layer.index >= layout.num_layers)]
    if set(manifest.kept) != {layer.index for layer in layers}:
        raise CheckpointError(
            f"the manifest lists the kept experts of {len(manifest.kept)} layers, the source has {len(layers)}"
        )
    expected: dict[str, _Expected] = {}
    for layer in layers:
        kept = manifest.kept[layer.index]
        if len(set(kept)) != manifest.after.num_experts or not set(kept) <= set(range(layout.num_experts)):
            raise CheckpointError(
                f"the manifest lists {len(set(kept))} kept experts in layer {layer.index}, where it says {manifest.after.num_experts}"
            )
        for rank, expert in enumerate(kept):
            for info in layer.experts[expert].values() if layer.experts else ():
                expected[layout.renamed(info.name, rank)] = _Expected(info, info.dtype, info.shape)
        for stacked in layer.stacked:
            info, axis = stacked.info, stacked.axis
            rows = info.shape[axis] // stacked.num_entries
            left = rows * (stacked.num_entries - layout.num_experts + len(kept))
            shape = tuple(left if i == axis else size for i, size in enumerate(info.shape))
            expected[info.name] = _Expected(info, info.dtype, shape, stacked, kept)
    for name, info in checkpoint.tensors.items():
        is_dropped = manifest.drop_mtp and layout.is_mtp(name)
        if name not in layout.expert_of and name not in layout.stacked_of and not is_dropped:
            expected[name] = _Expected(info, info.dtype, info.shape)
    if manifest.dequantized:
        return dict(_dequantized(checkpoint, expected))
    return expected


def _dequantized(checkpoint: Checkpoint, expected: Mapping[str, _Expected]) -> Iterator[tuple[str, _Expected]]:
    """The same with values in bf16 under the names that they have then, and without scales."""
    form = read_format(checkpoint)
    for name, item in expected.items():
        if form.is_companion(item.info.name):
            continue
        if not form.companions(item.info, checkpoint.tensors):
            yield name, item
            continue
        decoded, shape = form.decoded(item.info, checkpoint.tensors)
        # Decoding changes the last part of the name, and the expert's number stands before it.
        renamed = f"{name.rpartition('.')[0]}.{decoded.rpartition('.')[2]}"
        if item.stacked is not None:
            shape = tuple(item.shape[i] if i == item.stacked.axis else size for i, size in enumerate(shape))
        yield renamed, replace(item, dtype="BF16", shape=shape, dequantized=form)


def _merged(
    checkpoint: Checkpoint, layout: MoELayout, manifest: Manifest, expected: Mapping[str, _Expected], out: Path
) -> dict[str, _Expected]:
    """The same with averages where several experts became one."""
    merging = manifest.merging
    assert merging is not None
    from reapkit.neurons import ExpertTensors, read_orders

    orders = read_orders(out, merging, layout.num_experts)
    form = read_format(checkpoint)
    averaged: dict[str, tuple[MoELayer, tuple[Group, ...], str]] = {}
    for layer in layout.layers:
        groups = merging.groups.get(layer.index, ())
        _require_whole(layer.index, groups, manifest, layout)
        several = [group for group in groups if len(group.members) > 1]
        for group in several:
            for rest, info in layer.experts[group.centre].items() if layer.experts else ():
                averaged[info.name] = (layer, (group,), rest)
        for stacked in layer.stacked if several else ():
            if stacked.role == "expert" or merging.router == "average":
                averaged[stacked.info.name] = (layer, groups, stacked.info.name)
    places = {index: ExpertTensors(checkpoint, layout, next(layer for layer in layout.layers if layer.index == index), form).places
              for index in orders}  # fmt: skip
    result = dict(expected)
    for name, item in expected.items():
        if item.info.name not in averaged:
            continue
        layer, groups, key = averaged[item.info.name]
        members = {e: layer.experts[e][key] for e in groups[0].members} if item.stacked is None else {}
        is_expert = item.stacked is None or item.stacked.role == "expert"
        place = places[layer.index][key] if is_expert and layer.index in places else None
        average = _Average(groups, members, place, orders.get(layer.index), form)
        result[name] = replace(item, average=average)
    return result


def _require_whole(index: int, groups: Sequence[Group], manifest: Manifest, layout: MoELayout) -> None:
    """Raise CheckpointError unless a layer's groups hold every expert once, around the kept ones."""
    if not groups:  # an MTP layer, which nothing measured
        return
    members = sorted(member for group in groups for member in group.members)
    if members != list(range(layout.num_experts)) or tuple(group.centre for group in groups) != manifest.kept[index]:
        raise CheckpointError(
            f"the groups that the manifest lists for layer {index} do not hold every expert once, around the kept ones"
        )


@dataclass
class _Output:
    """What is found in an output folder; every method adds what is wrong to `problems`.

    Attributes:
        path: the folder.
        weight_map: the index, empty where it cannot be read.
        headers: tensors by shard, for shards that can be read.
        digests: SHA-256 by file name.
    """

    path: Path
    problems: list[str] = field(default_factory=list)
    weight_map: Mapping[str, str] = field(default_factory=dict)
    headers: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0

    def read_tables(self) -> None:
        """Read index and headers: each names exactly what the other does, and nothing else lies around."""
        try:
            self.weight_map, _ = read_index(self.path)
        except ReapkitError as error:
            self.problems.append(error.message)
            return
        for file in sorted(set(self.weight_map.values())):
            try:
                self.headers[file], _ = read_header(shard_path(self.path, file), file=file)
            except ReapkitError as error:
                self.problems.append(error.message)
        for name, file in self.weight_map.items():
            if file in self.headers and name not in self.headers[file]:
                self.problems.append(f"{INDEX_NAME} places {name!r} in {file}, which does not hold it")
        for file, header in self.headers.items():
            for name in header:
                if self.weight_map.get(name) != file:
                    self.problems.append(f"{file} holds {name!r}, which {INDEX_NAME} does not place there")
        for path in sorted(path for path in walk(self.path) if path.name.endswith(".safetensors")):
            file = path.relative_to(self.path).as_posix()
            if file not in self.weight_map.values() and not file.startswith("reapkit/"):
                self.problems.append(f"{file} is a safetensors file that {INDEX_NAME} does not name")
        if self.headers.keys() == set(self.weight_map.values()):
            self._check_total_size()

    def _check_total_size(self) -> None:
        if not (self.path / INDEX_NAME).is_file():
            self.problems.append(f"{INDEX_NAME} is missing")
            return
        stated = parse_json(read_small(self.path, INDEX_NAME), origin=INDEX_NAME, infinite=True).get("metadata")
        size = stated.get("total_size") if isinstance(stated, dict) else None
        total = sum(info.nbytes for header in self.headers.values() for info in header.values())
        if size != total:
            self.problems.append(f"{INDEX_NAME} gives a total_size of {size} where the tensors take {total} bytes")

    def check_counts(self, manifest: Manifest) -> None:
        """The folder opens as a checkpoint whose experts are numbered without gaps, as many as config and manifest say."""
        if self.problems:
            return  # opening would stop at the first of them
        try:
            num_experts = resolve(Checkpoint.open(self.path), ARCHITECTURES).num_experts
        except ReapkitError as error:
            self.problems.append(error.message)
            return
        if num_experts != manifest.after.num_experts:
            self.problems.append(
                f"the checkpoint has {num_experts} experts per layer, the manifest says {manifest.after.num_experts}"
            )

    def compare_tables(self, expected: Mapping[str, _Expected]) -> None:
        """Names are complete and nothing more; dtypes and shapes are the source's."""
        held = {name: info for header in self.headers.values() for name, info in header.items()}
        unreadable = set(self.weight_map.values()) - self.headers.keys()
        for name, item in expected.items():
            info = held.get(name)
            if info is None:
                if self.weight_map.get(name) not in unreadable:
                    self.problems.append(f"{name!r} is missing: it should come from {item.info.name!r} of the source")
            elif (info.dtype, info.shape) != (item.dtype, item.shape):
                self.problems.append(
                    f"{name!r} in {info.file} is {info.dtype} {list(info.shape)} where {item.dtype} {list(item.shape)} is expected"
                )
        for name in held.keys() - expected.keys():
            self.problems.append(f"{name!r} in {held[name].file} has no counterpart in the source")

    def compare_config(self, expected: Mapping[str, Any]) -> None:
        """The config is the source's but for what pruning changes."""
        try:
            config = read_config(self.path)
        except ReapkitError as error:
            self.problems.append(error.message)
            return
        self.problems.extend(_differences(config, expected, CONFIG_NAME))

    def compare_sidecars(
        self, checkpoint: Checkpoint, names: Sequence[str], edited: Mapping[str, bytes | None]
    ) -> None:
        """Tokenizer, template, licence and remote code are the source's, byte for byte; what pruning changes is as it should be."""
        for name in names:
            path = self.path / name
            if not is_plain_file(path, self.path):
                self.problems.append(f"{name} is missing")
            elif name in edited:
                if read_small(self.path, name) != edited[name]:
                    self.problems.append(f"{name} does not follow from the source's")
            elif not _same_bytes(path, checkpoint.path / name):
                self.problems.append(f"{name} differs from the source's")

    def read_files(
        self,
        expected: Mapping[str, _Expected],
        names: set[str],
        *,
        checkpoint: Checkpoint | None,
        landed: Mapping[str, Landed],
        progress: Progress,
    ) -> None:
        """Hash every file, and compare its tensors with the source on the way, or with what was received of it.

        Several files are read at once, each by a thread; what is found does not depend on that.
        """
        present = [name for name in sorted(names) if is_plain_file(self.path / name, self.path)]
        total = sum((self.path / name).stat().st_size for name in present)
        comparisons = {name: self._comparison(name, expected, landed.get(name), checkpoint) for name in present}
        counting, computing = Lock(), Lock()
        # What comes after it is read in vain; what comes before it may yet be what the error is about.
        last = len(present)

        def stop_after(number: int) -> None:
            nonlocal last
            with counting:
                last = min(last, number)

        def read(number: int) -> tuple[str, list[str]]:
            def advance(count: int) -> None:
                if number > last:
                    raise CancelledError
                with counting:
                    self.num_bytes += count
                    progress("verifying", self.num_bytes, total, "B")

            name = present[number]
            try:
                advance(0)
                return self._read_file(name, comparisons[name], checkpoint, advance=advance, computing=computing)
            except BaseException:
                stop_after(number)
                raise

        # What comes through the network is read ahead by several requests, for one file after the other.
        is_fetched = checkpoint is not None and any(_is_fetched(checkpoint, found) for found in comparisons.values())
        count = 1 if is_fetched else min(_FILES_AT_ONCE, 2 * (os.cpu_count() or 1))
        with ThreadPoolExecutor(count, thread_name_prefix="reapkit-verify") as readers:
            try:
                for name, future in zip(present, [readers.submit(read, n) for n in range(len(present))], strict=True):
                    self.digests[name], problems = future.result()
                    self.problems.extend(problems)
            except BaseException:
                stop_after(-1)
                raise

    def _comparison(
        self,
        name: str,
        expected: Mapping[str, _Expected],
        landed: Landed | None,
        checkpoint: Checkpoint | None,
    ) -> _Comparison:
        held = self.headers.get(name, {})
        mine = {key: expected[key] for key in held if key in expected}
        received = _Received(landed) if landed is not None else None
        problems = received.misplaced(held, mine) if received is not None else ()
        compared = [
            (info, mine[key])
            for key, info in held.items()
            if checkpoint is not None
            and key in mine
            and (info.dtype, info.shape) == (mine[key].dtype, mine[key].shape)
            and (received is None or _segments(mine[key]) is None)
        ]
        return _Comparison(compared, received, tuple(problems))

    def _read_file(
        self,
        name: str,
        comparison: _Comparison,
        checkpoint: Checkpoint | None,
        *,
        advance: Callable[[int], None],
        computing: Lock,
    ) -> tuple[str, list[str]]:
        """A file's digest, and what is wrong with its bytes.

        Args:
            name: the file.
            comparison: what its tensors are held against.
            checkpoint: the source.
            advance: told how many bytes were read.
            computing: held while a tensor is computed, which may take as much memory as a layer, until it was compared.
        """
        problems = list(comparison.problems)
        space = memoryview(bytearray(_CHUNK_BYTES))
        with (
            reading(name),
            (self.path / name).open("rb", buffering=0) as stream,
            _expected_soon(checkpoint, comparison),
        ):
            content = _Content(stream, comparison.received, advance)
            for info, item in comparison.compared:
                assert checkpoint is not None
                content.read_to(info.start)
                if _segments(item) is not None:
                    is_same = content.equals(_wanted(checkpoint, item, space), info.nbytes)
                else:
                    with computing:
                        content.tell()
                        is_same = content.equals(_wanted(checkpoint, item, space), info.nbytes)
                if not is_same:
                    problems.append(_describe_difference(info, item))
            content.read_to(None)
            content.tell()
        if comparison.received is not None:
            problems.extend(comparison.received.problems(name))
        return content.digest.hexdigest(), problems

    def compare_digests(self, recorded: Mapping[str, str]) -> None:
        """Every file is as it was when it was compared with the source."""
        for name, digest in recorded.items():
            if name not in self.digests:
                self.problems.append(f"{name} is missing")
            elif self.digests[name] != digest:
                self.problems.append(f"{name} has changed since it was compared with the source")


@dataclass(frozen=True)
class _Comparison:
    """What a file of the output is held against.

    Attributes:
        compared: its tensors in the order of their bytes, with where they should come from.
        received: what came for it from the hub; None where nothing is listed, or nothing is to be trusted.
        problems: what is wrong by that list alone.
    """

    compared: Sequence[tuple[TensorInfo, _Expected]]
    received: _Received | None
    problems: tuple[str, ...]


class _Content:
    """A file's bytes, read once from its beginning in pieces that are hashed and forgotten.

    Args:
        stream: the file, unbuffered.
        received: given every piece too.
        advance: told how many bytes were read.
    """

    def __init__(self, stream: FileIO, received: _Received | None, advance: Callable[[int], None]) -> None:
        self.digest = hashlib.sha256()
        self._stream = stream
        self._received = received
        self._advance = advance
        self._space = memoryview(bytearray(_CHUNK_BYTES))
        self._position = self._told = 0

    def read_to(self, stop: int | None) -> None:
        """Read on to a place, to the end for None."""
        while stop is None or self._position < stop:
            if not self._take(_CHUNK_BYTES if stop is None else stop - self._position):
                return

    def equals(self, expected: Iterable[memoryview], count: int) -> bool:
        """Whether the next `count` bytes are the expected ones; it reads as many as are expected."""
        is_same, left = True, count
        for whole in expected:
            for first in range(0, len(whole), _CHUNK_BYTES):
                wanted = whole[first : first + _CHUNK_BYTES]
                piece = self._take(len(wanted))
                is_same = is_same and _equal(piece, wanted)
                left -= len(piece)
        return is_same and not left

    def _take(self, count: int) -> memoryview:
        """The next bytes, as many as there are and fit: until the next are taken."""
        space, filled = self._space[:count], 0
        while filled < len(space) and (more := self._stream.readinto(space[filled:])):
            filled += more
        piece = space[:filled]
        self.digest.update(piece)
        if self._received is not None:
            self._received.update(piece)
        self._position += filled
        if self._position - self._told >= _CHUNK_BYTES:  # thousands of scales of a kilobyte are not worth a word each
            self.tell()
        return piece

    def tell(self) -> None:
        """Say how far it is, which ends the reading where it was stopped."""
        self._advance(self._position - self._told)
        self._told = self._position


def _equal(one: memoryview, other: memoryview) -> bool:
    """Whether bytes are the same, by whole words and with the interpreter's lock released; views themselves compare sign by sign."""
    if len(one) != len(other):
        return False
    count = len(one) // 8
    mine, theirs = (np.frombuffer(view, np.uint64, count) for view in (one, other))
    return np.array_equal(mine, theirs) and bytes(one[8 * count :]) == bytes(other[8 * count :])


def _wanted(checkpoint: Checkpoint, item: _Expected, space: memoryview) -> Iterator[memoryview]:
    """The bytes that a tensor of the output should have; what is not computed comes in pieces through `space`, each until the next."""
    if item.average is not None:
        yield _average(checkpoint, item, item.average)
    elif item.dequantized is not None:
        import torch

        from reapkit.formats import decode

        values = decode(checkpoint, item.info, format=item.dequantized)
        if item.stacked is not None:
            axis, count = item.stacked.axis, item.stacked.num_entries
            parts = values.tensor_split(count, dim=axis)
            values = torch.cat([parts[entry] for entry in _entries(item.stacked, item.kept)], dim=axis)
        yield values.contiguous().reshape(-1).view(torch.uint8).numpy().data
    elif (segments := _segments(item)) is not None:
        for start, stop in segments:
            for first in range(start, stop, len(space)):
                piece = space[: stop - first]
                checkpoint.source.read_into(item.info.file, first, piece, inside=item.info.name)
                yield piece
    else:
        assert item.stacked is not None
        # The bytes of one expert along the axis are one element of a structured array, whatever the dtype.
        outer, count = item.info.shape[: item.stacked.axis], item.stacked.num_entries
        inner = item.info.nbytes // (math.prod(outer) * count)
        stored = np.frombuffer(checkpoint.read(item.info), np.dtype((np.void, inner)))
        taken = stored.reshape((*outer, count)).take(_entries(item.stacked, item.kept), axis=item.stacked.axis)
        yield memoryview(taken.tobytes())


def _segments(item: _Expected) -> list[tuple[int, int]] | None:
    """The byte ranges of the source that a tensor should consist of, in order; None where it is no sequence of ranges."""
    info, stacked = item.info, item.stacked
    if item.dequantized is not None or item.average is not None:
        return None
    if stacked is not None and math.prod(info.shape[: stacked.axis]) != 1:
        return None
    if stacked is None:
        return [(info.start, info.stop)]
    size = info.nbytes // stacked.num_entries
    return [(info.start + e * size, info.start + (e + 1) * size) for e in _entries(stacked, item.kept)]


def _expected_soon(checkpoint: Checkpoint | None, comparison: _Comparison) -> AbstractContextManager[None]:
    """Let what a shard of the output is compared with be read ahead, where it comes through the network."""
    if checkpoint is None or not _is_fetched(checkpoint, comparison):
        return nullcontext()
    return checkpoint.source.expecting(_ranges(checkpoint, comparison))


def _is_fetched(checkpoint: Checkpoint, comparison: _Comparison) -> bool:
    """Whether anything that a file is held against comes through the network."""
    remote = checkpoint.remote
    if remote is None:
        return False
    is_averaged = any(item.average is not None for _, item in comparison.compared)  # of tensors in any shard
    return is_averaged or any(
        remote.local(file) is None for file in {file for file, _, _ in _ranges(checkpoint, comparison)}
    )


def _ranges(checkpoint: Checkpoint, comparison: _Comparison) -> Iterator[Range]:
    for _, item in comparison.compared:
        infos = [item.info]
        if item.dequantized is not None:
            infos += item.dequantized.companions(item.info, checkpoint.tensors)
        if (segments := _segments(item)) is not None:
            yield from ((item.info.file, start, stop) for start, stop in segments)
        else:
            yield from ((part.file, part.start, part.stop) for part in infos)


class _Received:
    """A shard of the output against the list of what came for it: the list says where bytes belong, and what they were."""

    def __init__(self, landed: Landed) -> None:
        self._landed = landed
        ranges = [
            (place, place + stop - start, start, number)
            for number, (pieces, _) in enumerate(landed.parts)
            for start, stop, place in pieces
        ]
        self._ranges = sorted(ranges)
        self._digests = [hashlib.sha256() for _ in landed.parts]
        self._header = hashlib.sha256()
        self._header_stop: int | None = None
        self._position = 0
        self._next = 0

    def misplaced(self, header: Mapping[str, TensorInfo], expected: Mapping[str, _Expected]) -> Iterator[str]:
        """A sentence for every tensor whose bytes are, by the list, not those of the source that belong there."""
        self._header_stop = min((info.start for info in header.values()), default=0)
        starts = [place for place, _, _, _ in self._ranges]
        for name, item in expected.items():
            info, segments = header[name], _segments(item)
            if segments is None or (info.dtype, info.shape) != (item.dtype, item.shape):
                continue
            place, is_right = info.start, item.info.file == self._landed.source
            for start, stop in segments:
                is_right = is_right and self._came_from(start, stop, place, starts)
                place += stop - start
            if not is_right:
                yield f"{name!r} in {info.file} did not come from the bytes of {item.info.name!r} that belong there"

    def _came_from(self, start: int, stop: int, place: int, starts: list[int]) -> bool:
        while start < stop:
            number = bisect.bisect_right(starts, place) - 1
            if number < 0:
                return False
            first, last, origin, _ = self._ranges[number]
            if place >= last or origin + place - first != start:
                return False
            count = min(last - place, stop - start)
            start, place = start + count, place + count
        return True

    def update(self, view: memoryview) -> None:
        """Take the file's next bytes."""
        begin = self._position
        end = begin + len(view)
        assert self._header_stop is not None
        if begin < self._header_stop:
            self._header.update(view[: self._header_stop - begin])
        while self._next < len(self._ranges):
            first, last, _, number = self._ranges[self._next]
            if first >= end:
                break
            self._digests[number].update(view[max(0, first - begin) : last - begin])
            if last > end:
                break
            self._next += 1
        self._position = end

    def problems(self, file: str) -> Iterator[str]:
        """What differs, once the whole file was taken."""
        if self._header.hexdigest() != self._landed.header:
            yield f"the header of {file} is not the one that was written"
        wrong = [
            pieces
            for (pieces, listed), digest in zip(self._landed.parts, self._digests, strict=True)
            if digest.hexdigest() != listed
        ]
        if wrong:
            start, stop, place = wrong[0][0]
            yield (
                f"{file} differs at byte {place:,} to {place + stop - start:,} from what was received from the hub "
                f"({len(wrong)} such parts)"
            )


def _average(checkpoint: Checkpoint, item: _Expected, average: _Average) -> memoryview:
    """The averages, each group's added up in float32 in the order of its members and rounded once."""
    import torch

    from reapkit.formats import TORCH_DTYPES, decode

    whole = decode(checkpoint, item.info, format=average.format) if item.stacked is not None else None
    pieces = []
    for group in average.groups:
        total = None
        for member, weight in zip(group.members, group.weights, strict=True):
            if whole is None:
                values = decode(checkpoint, average.members[member], format=average.format).float()
                squeezed = values
            else:
                assert item.stacked is not None
                rows = whole.shape[item.stacked.axis] // item.stacked.num_entries
                values = whole.narrow(item.stacked.axis, member * rows, rows).float()
                squeezed = values.squeeze(item.stacked.axis) if rows == 1 and values.ndim > 1 else values
            if average.place is not None and average.order_EI is not None and member != group.centre:
                order_I = torch.from_numpy(average.order_EI[member]).long()
                values = average.place.reorder(squeezed, order_I).reshape(values.shape)
            total = values * weight if total is None else total + values * weight
        assert total is not None
        pieces.append(total.to(TORCH_DTYPES[item.dtype]))
    if item.stacked is not None:
        assert whole is not None
        entries = whole.tensor_split(item.stacked.num_entries, dim=item.stacked.axis)
        pieces += [entry.to(TORCH_DTYPES[item.dtype]) for entry in entries[item.stacked.num_experts :]]
        result = torch.cat(pieces, dim=item.stacked.axis)
    else:
        (result,) = pieces
    return result.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _entries(stacked: StackedTensor, kept: Sequence[int]) -> list[int]:
    """The kept experts, and whatever follows the experts."""
    return [*kept, *range(stacked.num_experts, stacked.num_entries)]


def _describe_difference(info: TensorInfo, item: _Expected) -> str:
    if item.average is not None:
        return f"{info.name!r} in {info.file} is not the average of the source's experts that the manifest says"
    if item.dequantized is not None:
        return f"{info.name!r} in {info.file} is not the dequantised {item.info.name!r} of the source"
    if item.stacked is not None:
        return f"{info.name!r} in {info.file} is not the kept experts' part of the source's, in their order"
    return f"{info.name!r} in {info.file} differs from {item.info.name!r} of the source"


def _differences(found: Any, expected: Any, where: str) -> Iterator[str]:
    """A sentence for every value in which two JSON trees differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            if key not in found:
                yield f"{where} lacks {key!r}"
            elif key not in expected:
                yield f"{where} has {key!r}, which should not be there"
            else:
                yield from _differences(
                    found[key], expected[key], f"{where}: {key}" if ":" not in where else f"{where}.{key}"
                )
    elif json.dumps(found) != json.dumps(expected):
        yield f"{where} is {json.dumps(found)} where {json.dumps(expected)} is expected"


def _same_bytes(path: Path, other: Path) -> bool:
    with reading(path.name):
        if path.stat().st_size != other.stat().st_size:
            return False
        with path.open("rb") as first, other.open("rb") as second:
            return all(piece == second.read(len(piece)) for piece in iter(lambda: first.read(_CHUNK_BYTES), b""))
