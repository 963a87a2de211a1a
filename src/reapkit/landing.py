"""Shards of the output whose bytes come from the hub: kept ranges alone, several at once, and never the same one twice.

What has landed of a shard is listed beside the output with its digest, so that an interrupted shard goes on in its middle, and so that
the output can be checked later against what was received without receiving it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from reapkit import edits
from reapkit.checkpoint import Checkpoint
from reapkit.edits import Combine, Copy, Dequantize, OutputTensor, Take
from reapkit.errors import HubError
from reapkit.hub import RESUME
from reapkit.interrupts import deferred, safe_point
from reapkit.outputs import PARTIAL, discard, make_folder, sync_folder, write_file
from reapkit.sources import NUM_CONNECTIONS, Remote, cut, joined
from reapkit.tensors import TensorInfo

FORMAT = "reapkit-landed-1"
_READ_BYTES = 4 << 20

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of the source's shard and where they go in the output's."""

    start: int
    stop: int
    place: int

    def within(self, start: int, stop: int) -> _Piece | None:
        """The part between two places of the source."""
        first, last = max(start, self.start), min(stop, self.stop)
        return _Piece(first, last, self.place + first - self.start) if first < last else None


@dataclass(frozen=True)
class _Task:
    """What lands as one: bytes from one request or from memory, or a computed tensor.

    Attributes:
        start, stop: the request, or the bytes in memory; both 0 where a tensor is computed.
        pieces: which of them are wanted, in order.
        places: the parts of the output's shard that are filled.
        held: whether the bytes lie in memory already.
        computed: the tensor that is computed.
    """

    start: int
    stop: int
    pieces: tuple[_Piece, ...]
    places: tuple[tuple[int, int], ...]
    held: bool = False
    computed: Take | Dequantize | None = None

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self.places)

    @property
    def key(self) -> str:
        """What names the task in the list of those that have landed: its pieces as [start, stop, place], or where it was computed to."""
        if self.computed is not None:
            return json.dumps([[None, None, self.places[0][0]]])
        return json.dumps([[piece.start, piece.stop, piece.place] for piece in self.pieces])


@dataclass(frozen=True)
class Transfer:
    """What writing an output moves through the network.

    Attributes:
        kept_bytes: bytes of the source that the output needs and this machine lacks.
        moved_bytes: the same with what is read in vain between them.
        requests: how many ranges.
    """

    kept_bytes: int
    moved_bytes: int
    requests: int


def transfer(checkpoint: Checkpoint, shards: Mapping[str, Sequence[OutputTensor]]) -> Transfer:
    """What `land` would move for all shards; nothing for those that lie here."""
    kept = moved = requests = 0
    for tensors in shards.values():
        remote = _remote(checkpoint, tensors)
        if remote is None:
            continue
        for task in _tasks(remote, tensors, 0):
            if task.computed is not None:
                infos = [info for info in _read_by(task.computed) if remote.local(info.file) is None]
                kept += sum(info.nbytes for info in infos)
                moved += sum(info.nbytes for info in infos)
                requests += len(infos)
            elif not task.held:
                kept += task.nbytes
                moved += task.stop - task.start
                requests += 1
    return Transfer(kept, moved, requests)


def comes_from_the_hub(checkpoint: Checkpoint, tensors: Sequence[OutputTensor]) -> bool:
    """Whether a shard of the output is made from one that does not lie on this machine."""
    return _remote(checkpoint, tensors) is not None


def land(
    checkpoint: Checkpoint, header: bytes, tensors: Sequence[OutputTensor], path: Path, log: Path, advance: Advance
) -> None:
    """Write one shard of the output; what an earlier run has landed of it is checked and left.

    Args:
        checkpoint: the source.
        header: of the output's shard.
        tensors: of the output's shard, all from one shard of the source.
        path: the shard, which gets its name when it is whole, as it should be and on the disk.
        log: where its ranges are listed with their digests.
        advance: told how many bytes are in place.

    Raises:
        HubError: the hub does not give them, or gave others than it lists; what has landed stays.
    """
    remote = _remote(checkpoint, tensors)
    assert remote is not None
    tasks = _tasks(remote, tensors, len(header))
    about = {
        "format": FORMAT,
        "source": tensors[0].info.file,
        "listed": list(remote.stamp(tensors[0].info.file)),
        "header": hashlib.sha256(header).hexdigest(),
    }
    partial = path.with_name(path.name + PARTIAL)
    landed = _landed(log, about)
    size = len(header) + sum(tensor.nbytes for tensor in tensors)
    with _growing(partial, size) as descriptor:
        _write(descriptor, header, 0)
        advance(len(header))
        missing = []
        for task in tasks:
            if (digest := landed.get(task.key)) is not None and _digest(descriptor, task.places) == digest:
                advance(task.nbytes)
            else:
                missing.append(task)
        kept = {task.key: landed[task.key] for task in tasks if task not in missing} if missing else landed
        _save_log(log, about, kept)
        with log.open("a", encoding="utf-8") as listing:
            for task, digest in _landing(checkpoint, remote, tensors[0].info.file, missing, descriptor):
                listing.write(json.dumps([task.key, digest]) + "\n")
                listing.flush()
                advance(task.nbytes)
        os.fsync(descriptor)
        _compare_whole(remote, tensors[0].info.file, tasks, descriptor, len(header), partial, log)
    partial.replace(path)
    sync_folder(path.parent)


@dataclass(frozen=True)
class Landed:
    """What a shard of the output was made of, as listed when it came.

    Attributes:
        source: the source's shard.
        header: SHA-256 of the output's header.
        parts: the ranges that came together, as (start, stop, place) in the source and in the output, with the SHA-256 of their bytes.
            What was computed is not among them.
    """

    source: str
    header: str
    parts: tuple[tuple[tuple[tuple[int, int, int], ...], str], ...]

    @classmethod
    def load(cls, log: Path) -> Landed | None:
        """Read the list of a shard; None where there is none, or it is damaged."""
        try:
            about, *lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            parts = [
                (tuple((int(a), int(b), int(c)) for a, b, c in json.loads(key) if a is not None), digest)
                for key, digest in lines
            ]
            return cls(about["source"], about["header"], tuple(part for part in parts if part[0]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _remote(checkpoint: Checkpoint, tensors: Sequence[OutputTensor]) -> Remote | None:
    remote = checkpoint.remote
    return remote if remote is not None and remote.local(tensors[0].info.file) is None else None


def _read_by(source: Take | Dequantize) -> Iterator[TensorInfo]:
    if isinstance(source, Dequantize):
        yield source.weight.info
        yield from source.companions
    else:
        yield source.info


def _tasks(remote: Remote, tensors: Sequence[OutputTensor], place: int) -> list[_Task]:
    """What has to land, in the order of the source's bytes; the output's data begins at `place`."""
    pieces: list[_Piece] = []
    tasks: list[_Task] = []
    for tensor in tensors:
        source = tensor.source
        if isinstance(source, Copy) or (isinstance(source, Take) and source.num_blocks == 1):
            for start, stop in edits.spans(source):
                last = pieces[-1] if pieces else None
                if last is not None and last.stop == start and last.place + last.stop - last.start == place:
                    pieces[-1] = _Piece(last.start, stop, last.place)
                elif stop > start:
                    pieces.append(_Piece(start, stop, place))
                place += stop - start
        else:
            assert not isinstance(source, Combine), "merging refuses what is not here"
            tasks.append(_Task(0, 0, (), ((place, place + tensor.nbytes),), computed=source))
            place += tensor.nbytes
    pieces.sort(key=lambda piece: piece.start)
    file = tensors[0].info.file
    held = remote.held(file)
    missing = list(_without(pieces, held))
    tasks += _grouped(pieces, held, held=True)
    tasks += _grouped(missing, cut(joined([(piece.start, piece.stop) for piece in missing])), held=False)
    return tasks


def _without(pieces: Iterable[_Piece], held: Sequence[tuple[int, int]]) -> Iterator[_Piece]:
    """What is left of pieces when ascending ranges are taken out."""
    for piece in pieces:
        start = piece.start
        for first, last in held:
            if last <= start or first >= piece.stop:
                continue
            if (before := piece.within(start, first)) is not None:
                yield before
            start = last
        if (after := piece.within(start, piece.stop)) is not None:
            yield after


def _grouped(pieces: Sequence[_Piece], spans: Iterable[tuple[int, int]], *, held: bool) -> Iterator[_Task]:
    """The pieces by the ranges in which they come, both ascending."""
    first = 0
    for start, stop in spans:
        while first < len(pieces) and pieces[first].stop <= start:
            first += 1
        inside = []
        for piece in pieces[first:]:
            if piece.start >= stop:
                break
            if (part := piece.within(start, stop)) is not None:
                inside.append(part)
        if inside:
            places: list[tuple[int, int]] = []
            for part in inside:
                end = part.place + part.stop - part.start
                if places and places[-1][1] == part.place:
                    places[-1] = (places[-1][0], end)
                else:
                    places.append((part.place, end))
            yield _Task(start, stop, tuple(inside), tuple(places), held=held)


def _landing(
    checkpoint: Checkpoint, remote: Remote, file: str, tasks: Sequence[_Task], descriptor: int
) -> Iterator[tuple[_Task, str]]:
    """Do the tasks, several at once; each is given back with its digest when its bytes are in the file."""
    stopped = threading.Event()

    def run(task: _Task) -> str:
        if task.computed is not None:
            content = edits.compute(checkpoint, task.computed)
            _write(descriptor, content, task.places[0][0])
            return hashlib.sha256(content).hexdigest()
        if task.held:
            buffer = bytearray(task.stop - task.start)
            remote.fetch_into(file, task.start, memoryview(buffer))
            return _scatter(descriptor, task, [bytes(buffer)])
        return _scatter(descriptor, task, remote.ranges.read(file, task.start, task.stop, stopped=stopped))

    computed = [task.computed for task in tasks if task.computed is not None]
    infos = [info for source in computed for info in _read_by(source)]
    with checkpoint.expecting(infos), deferred("the running requests are done"):
        pool = ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="reapkit-hub")
        try:
            running = {pool.submit(run, task): task for task in tasks}
            for future in as_completed(running):
                yield running[future], future.result()
                safe_point()
        finally:
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _scatter(descriptor: int, task: _Task, content: Iterable[bytes]) -> str:
    """Write what arrives to where it belongs, gaps left out; the digest is that of what was written, in order."""
    digest = hashlib.sha256()
    position, number = task.start, 0
    for chunk in content:
        view, end = memoryview(chunk), position + len(chunk)
        while number < len(task.pieces) and task.pieces[number].start < end:
            piece = task.pieces[number]
            part = piece.within(position, end)
            if part is not None:
                wanted = view[part.start - position : part.stop - position]
                _write(descriptor, wanted, part.place)
                digest.update(wanted)
            if piece.stop > end:
                break
            number += 1
        position = end
    return digest.hexdigest()


def _write(descriptor: int, content: bytes | memoryview, place: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(descriptor, view, place)
        view, place = view[count:], place + count


def _digest(descriptor: int, places: Iterable[tuple[int, int]]) -> str:
    digest = hashlib.sha256()
    for start, stop in places:
        for piece in _read(descriptor, start, stop):
            digest.update(piece)
    return digest.hexdigest()


def _read(descriptor: int, start: int, stop: int) -> Iterator[bytes]:
    while start < stop and (piece := os.pread(descriptor, min(stop - start, _READ_BYTES), start)):
        yield piece
        start += len(piece)


@contextmanager
def _growing(partial: Path, size: int) -> Iterator[int]:
    """A file of its final size that stays as it is when its writing is interrupted."""
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)
        yield descriptor
    finally:
        os.close(descriptor)


def _landed(log: Path, about: Mapping[str, object]) -> dict[str, str]:
    """Digests by task of what an earlier run has landed, where it was the same shard of the same source."""
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
        if not lines or json.loads(lines[0]) != about:
            return {}
    except (OSError, ValueError):
        return {}
    landed = {}
    for line in lines[1:]:
        try:
            key, digest = json.loads(line)
        except ValueError:  # a line that was being written when the run was killed
            continue
        landed[key] = digest
    return landed


def _save_log(log: Path, about: Mapping[str, object], landed: Mapping[str, str]) -> None:
    make_folder(log.parent)
    lines = [json.dumps(about), *(json.dumps(entry) for entry in landed.items())]
    write_file(log, ("\n".join(lines) + "\n").encode())


def _compare_whole(
    remote: Remote, file: str, tasks: Sequence[_Task], descriptor: int, place: int, partial: Path, log: Path
) -> None:
    """Where a whole file of the source was kept, hold it to the SHA-256 that the hub lists for it."""
    listed, begun = remote.repository.files[file].sha256, remote.headers.get(file)
    if listed is None or begun is None or any(task.computed is not None for task in tasks):
        return
    length, digest = begun
    size = remote.size(file)
    if sum(task.nbytes for task in tasks) != size - length:
        return
    digest = digest.copy()
    for piece in _read(descriptor, place, place + size - length):
        digest.update(piece)
    if digest.hexdigest() != listed:
        partial.unlink(missing_ok=True)
        discard(log)
        raise HubError(
            f"what came as {file} has the SHA-256 {digest.hexdigest()[:12]}, and the hub lists {listed[:12]}; it was thrown away",
            hint=RESUME,
        )
