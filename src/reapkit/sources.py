"""Where the bytes of a checkpoint's shards come from: a folder, or a repository on the hub that is read range by range.

Config, index, tokenizer and the other small files lie in a folder either way (of a repository, in the hub's cache), so only shards are
read through here. Reading ahead is a hint: whoever says which ranges come next gets those of a repository in parallel, and reads as if
they lay on a disk, and those of a folder from the page cache.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
import shutil
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from reapkit.errors import CheckpointError, UsageError
from reapkit.hub import Ranges, Repository
from reapkit.outputs import PARTIAL, explained, write_all
from reapkit.pagecache import Ahead
from reapkit.progress import Progress, silent
from reapkit.tensors import reading

# Requests at once. One connection to a storage gives some 50 to 100 MB/s; eight fill most lines, and the hub's limits are far off.
NUM_CONNECTIONS = 8
# Large enough that a request's latency is a few percent of it, small enough that a shard keeps all connections busy to its end.
CHUNK_BYTES = 16 << 20
# Bytes that may lie in memory ahead of the reader.
AHEAD_BYTES = 256 << 20
# Of what is wanted, the share that may be read in vain to make one request of several ranges.
WASTE = 0.005
# What fingerprints read is kept, where it is no more than this, and not fetched again for the output.
HELD_BYTES = 32 << 20

Range = tuple[str, int, int]


class Source(Protocol):
    """The shards of a checkpoint.

    Attributes:
        path: the folder of the small files, and of a folder's shards.
    """

    @property
    def path(self) -> Path: ...

    def local(self, file: str) -> Path | None:
        """A shard on this machine; None where it has to be read through the network."""

    def size(self, file: str) -> int:
        """Bytes of a shard."""

    def stamp(self, file: str) -> Sequence[int | str | None]:
        """What changes when a shard is replaced by another."""

    def read_into(self, file: str, start: int, view: memoryview, *, inside: str = "") -> None:
        """Fill a buffer with the bytes from `start` on, which lie `inside` a tensor: an error names it."""

    def expecting(
        self,
        ranges: Iterable[Range],
        *,
        cached: int = 0,
        disk: Disk | None = None,
        holding: bool = False,
        task: str = "",
    ) -> AbstractContextManager[None]:
        """While this lasts, the ranges are read ahead in this order, each once however often it is named.

        Args:
            ranges: what will be read, best in the order of reading.
            cached: bytes of a folder that may lie in the page cache ahead of the reader.
            disk: where to put what is read ahead from a network; in memory otherwise.
            holding: keep the bytes for later reads where they are few.
            task: what to call it where its progress is to be told.
        """


class Folder:
    """A folder that holds everything."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ahead: Ahead | None = None

    def local(self, file: str) -> Path | None:
        return self.path / file

    def size(self, file: str) -> int:
        return (self.path / file).stat().st_size

    def stamp(self, file: str) -> Sequence[int | str | None]:
        found = (self.path / file).stat()
        return [found.st_size, found.st_mtime_ns]

    def read_into(self, file: str, start: int, view: memoryview, *, inside: str = "") -> None:
        if (ahead := self._ahead) is not None:  # which another thread may end
            ahead.require(file, start)
        read_file(self.path / file, start, view, file=file, inside=inside)

    @contextmanager
    def expecting(
        self,
        ranges: Iterable[Range],
        *,
        cached: int = 0,
        disk: Disk | None = None,
        holding: bool = False,
        task: str = "",
    ) -> Iterator[None]:
        if not hasattr(os, "preadv"):
            yield
            return
        with closing(Ahead(self.path, ranges, window=cached)) as self._ahead:
            try:
                yield
            finally:
                self._ahead = None


def read_file(path: Path, start: int, view: memoryview, *, file: str, inside: str = "") -> None:
    """Fill a buffer from a file.

    Raises:
        CheckpointError: it ends early, or cannot be read.
    """
    with reading(file), path.open("rb", buffering=0) as stream:
        stream.seek(start)
        filled = 0
        while filled < len(view):
            count = stream.readinto(view[filled:])
            if not count:
                where = f"inside {inside!r}" if inside else f"at byte {start + filled:,}"
                raise CheckpointError(f"{file} ends {where}", hint="fetch the shard again")
            filled += count


class Remote:
    """A repository on the hub whose shards are read by ranges; those that the hub's cache holds are read there.

    Args:
        repository: which, at which commit.
        path: its snapshot in the hub's cache.
        progress: told how headers and fingerprints come.
    """

    def __init__(self, repository: Repository, path: Path, *, progress: Progress = silent) -> None:
        self.progress = progress
        self.repository = repository
        self.path = path
        self.ranges = Ranges(repository)
        # By shard, how long its header is, and the SHA-256 of the file begun with it: what follows may turn out to be kept whole.
        self.headers: dict[str, tuple[int, hashlib._Hash]] = {}
        self._ahead: list[_Ahead] = []
        self._held = _Held()

    def local(self, file: str) -> Path | None:
        path = self.path / file
        return path if path.is_file() else None

    def size(self, file: str) -> int:
        try:
            return self.repository.files[file].size
        except KeyError:
            raise CheckpointError(f"the shard {file} is missing from {self.repository.name}") from None

    def stamp(self, file: str) -> Sequence[int | str | None]:
        listed = self.repository.files[file]
        return [listed.size, listed.sha256]

    def read_into(self, file: str, start: int, view: memoryview, *, inside: str = "") -> None:
        if (path := self.local(file)) is not None:
            read_file(path, start, view, file=file, inside=inside)
            return
        for ahead in reversed(self._ahead):
            if ahead.read_into(file, start, view):
                return
        self.fetch_into(file, start, view)

    def fetch_into(self, file: str, start: int, view: memoryview, *, stopped: threading.Event | None = None) -> None:
        """Fill a buffer from what is held and from the network, whatever is read ahead."""
        if self._held.read_into(file, start, view):
            return
        filled = 0
        for piece in self.ranges.read(file, start, start + len(view), stopped=stopped):
            view[filled : filled + len(piece)] = piece
            filled += len(piece)

    def held(self, file: str) -> list[tuple[int, int]]:
        """The ranges of a file that need not be fetched, ascending."""
        return self._held.spans(file)

    @contextmanager
    def expecting(
        self,
        ranges: Iterable[Range],
        *,
        cached: int = 0,
        disk: Disk | None = None,
        holding: bool = False,
        task: str = "",
    ) -> Iterator[None]:
        wanted = [(file, start, stop) for file, start, stop in ranges if stop > start and self.local(file) is None]
        ahead = _Ahead(self, wanted, disk=disk, holding=holding, task=task)
        self._ahead.append(ahead)
        try:
            yield
        finally:
            self._ahead.remove(ahead)
            ahead.close()


@dataclass(frozen=True)
class Disk:
    """A bounded place for what is read ahead.

    Attributes:
        folder: a folder of its own; emptied when it is opened and removed at the end.
        window: bytes that may lie there ahead of the reader.
        kept: bytes of what was read that may stay for the next time the same is read.
    """

    folder: Path
    window: int
    kept: int
    _stay: dict[str, int] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, *, budget: int, window: int) -> Iterator[Disk]:
        """A place of `budget` bytes, of which `window` are needed to read ahead.

        Raises:
            UsageError: the budget is smaller than the window.
            OutputError: the folder cannot be made.
        """
        if budget < window:
            raise UsageError(
                f"a disk budget of {budget:,} bytes is less than the {window:,} that two layers take",
                hint=f"--disk-budget {-(-window // 1_000_000)}MB or more",
            )
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        with explained(folder, hint="give another place with -o"):
            folder.mkdir(parents=True)
        try:
            yield cls(folder, window, budget - window)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class _Chunk:
    """A range that is fetched by one request, and how much of it is still to be read."""

    def __init__(self, file: str, start: int, stop: int) -> None:
        self.file = file
        self.start = start
        self.stop = stop
        self.left = 0
        self.future: Future[memoryview | Path] | None = None

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        return f"{self.file.replace('/', '_')}.{self.start}-{self.stop}"


class _Ahead:
    """Ranges that are being read ahead."""

    def __init__(self, source: Remote, ranges: Sequence[Range], *, disk: Disk | None, holding: bool, task: str) -> None:
        self._source = source
        self._task = task
        self._came = 0
        self._disk = disk
        total = sum(stop - start for _, start, stop in ranges)
        self._holding = holding and total <= HELD_BYTES
        self._bound = disk.window if disk is not None else AHEAD_BYTES
        times = Counter(ranges)
        order = list(times)
        if (disk is None and total <= AHEAD_BYTES) or _overlap(order):
            order = _united(order)  # where everything fits, neighbours make fewer requests
        self._stopped = threading.Event()
        self._chunks = _chunks(order)
        self._by_file: dict[str, list[_Chunk]] = defaultdict(list)
        for chunk in self._chunks:
            self._by_file[chunk.file].append(chunk)
        for chunks in self._by_file.values():
            chunks.sort(key=lambda chunk: chunk.start)
        for (file, start, stop), count in times.items():
            for chunk in self._covering(file, start, stop):
                chunk.left += count * (min(chunk.stop, stop) - max(chunk.start, start))
        self._next = 0
        self._outstanding = 0
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        self._pool = ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="reapkit-hub")
        with self._lock:
            self._advance()

    def read_into(self, file: str, start: int, view: memoryview) -> bool:
        """Fill a buffer from what was read ahead; False where that was never expected, or is gone."""
        stop = start + len(view)
        with self._lock:
            chunks = self._covering(file, start, stop)
            if not chunks or chunks[0].start > start or chunks[-1].stop < stop:
                return False
            if any(after.start != before.stop for before, after in itertools.pairwise(chunks)):
                return False
            if any(chunk.left <= 0 for chunk in chunks):
                return False
        for chunk in chunks:
            with self._lock:
                if chunk.future is None:
                    self._launch(chunk)
                future = chunk.future
            assert future is not None
            content = future.result()
            first, last = max(chunk.start, start), min(chunk.stop, stop)
            part = view[first - start : last - start]
            if isinstance(content, Path):
                read_file(content, first - chunk.start, part, file=file)
            else:
                part[:] = content[first - chunk.start : last - chunk.start]
            self._took(chunk, last - first)
        return True

    def close(self) -> None:
        """End all reading; what was not read is dropped."""
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for chunk in self._chunks:
            if chunk.left > 0 and self._disk is not None and chunk.name not in self._disk._stay:
                (self._disk.folder / chunk.name).unlink(missing_ok=True)

    def _covering(self, file: str, start: int, stop: int) -> list[_Chunk]:
        chunks = self._by_file.get(file, [])
        first = bisect.bisect_right(chunks, start, key=lambda chunk: chunk.stop)
        last = bisect.bisect_left(chunks, stop, key=lambda chunk: chunk.start)
        return chunks[first:last]

    def _advance(self) -> None:
        """Ask for the next chunks as far as the bound allows; one always is."""
        while self._next < len(self._chunks):
            chunk = self._chunks[self._next]
            if chunk.future is None:
                if self._outstanding and self._outstanding + chunk.nbytes > self._bound:
                    return
                self._launch(chunk)
            self._next += 1

    def _launch(self, chunk: _Chunk) -> None:
        if self._disk is None or chunk.name not in self._disk._stay:
            self._outstanding += chunk.nbytes
        chunk.future = self._pool.submit(self._fetch, chunk)

    def _fetch(self, chunk: _Chunk) -> memoryview | Path:
        content = self._fetched(chunk)
        if self._task:
            with self._telling:
                self._came += chunk.nbytes
                self._source.progress(self._task, self._came, sum(c.nbytes for c in self._chunks), "B")
        return content

    def _fetched(self, chunk: _Chunk) -> memoryview | Path:
        if self._disk is None:
            content = memoryview(bytearray(chunk.nbytes))
            self._source.fetch_into(chunk.file, chunk.start, content, stopped=self._stopped)
            if self._holding:
                self._source._held.add(chunk.file, chunk.start, content)
            return content
        path = self._disk.folder / chunk.name
        if chunk.name in self._disk._stay:
            return path
        partial = path.with_name(path.name + PARTIAL)
        with explained(self._disk.folder, hint="free some space, or give a smaller --disk-budget"):
            with partial.open("wb", buffering=0) as target:
                for piece in self._source.ranges.read(chunk.file, chunk.start, chunk.stop, stopped=self._stopped):
                    write_all(target, piece)
            partial.replace(path)
        return path

    def _took(self, chunk: _Chunk, count: int) -> None:
        with self._lock:
            chunk.left -= count
            if chunk.left > 0:
                return
            disk = self._disk
            if disk is None:
                chunk.future = None
                self._outstanding -= chunk.nbytes
            elif chunk.name not in disk._stay:
                # The first that come stay: what is read in the same order again and again is best served by its beginning.
                self._outstanding -= chunk.nbytes
                if sum(disk._stay.values()) + chunk.nbytes <= disk.kept:
                    disk._stay[chunk.name] = chunk.nbytes
                else:
                    (disk.folder / chunk.name).unlink(missing_ok=True)
            self._advance()


def _overlap(order: Iterable[Range]) -> bool:
    ascending = sorted(order)
    return any(before[0] == after[0] and after[1] < before[2] for before, after in itertools.pairwise(ascending))


def _united(order: Iterable[Range]) -> list[Range]:
    """The same bytes as ranges that do not overlap, ascending."""
    result: list[Range] = []
    for file, start, stop in sorted(order):
        if result and result[-1][0] == file and start < result[-1][2]:
            result[-1] = (file, result[-1][1], max(stop, result[-1][2]))
        else:
            result.append((file, start, stop))
    return result


def _chunks(order: Sequence[Range]) -> list[_Chunk]:
    """Requests for ranges in the order of reading, no byte in two: ascending runs of one file are joined, and long ones are cut."""
    # Between neighbours lies nothing that is wanted too, at another time.
    neighbours = {
        (file, stop, start) for (file, _, stop), (other, start, _) in itertools.pairwise(sorted(order)) if file == other
    }
    chunks: list[_Chunk] = []
    run: list[tuple[int, int]] = []
    running = ""
    for file, start, stop in order:
        if run and (file, run[-1][1], start) not in neighbours:
            chunks += [_Chunk(running, *span) for span in cut(joined(run))]
            run = []
        running = file
        run.append((start, stop))
    chunks += [_Chunk(running, *span) for span in cut(joined(run))]
    return chunks


def joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending byte ranges made fewer by reading the smallest gaps between them too, up to `WASTE` of the bytes that are wanted."""
    if not spans:
        return []
    allowed = int(WASTE * sum(stop - start for start, stop in spans))
    gaps = sorted((after[0] - before[1], place) for place, (before, after) in enumerate(itertools.pairwise(spans)))
    closed = set()
    for gap, place in gaps:
        if gap > allowed:
            break
        allowed -= gap
        closed.add(place)
    result = [spans[0]]
    for place, (start, stop) in enumerate(spans[1:]):
        if place in closed:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return result


def cut(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes in pieces of at most `CHUNK_BYTES`."""
    return [
        (place, min(stop, place + CHUNK_BYTES)) for start, stop in spans for place in range(start, stop, CHUNK_BYTES)
    ]


class _Held:
    """Bytes that stay in memory, by file and place."""

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[int, memoryview]]] = defaultdict(list)
        self._lock = threading.Lock()

    def add(self, file: str, start: int, content: memoryview) -> None:
        with self._lock:
            bisect.insort(self._parts[file], (start, content), key=lambda part: part[0])

    def spans(self, file: str) -> list[tuple[int, int]]:
        with self._lock:
            return [(start, start + len(content)) for start, content in self._parts.get(file, ())]

    def read_into(self, file: str, start: int, view: memoryview) -> bool:
        """Fill a buffer that lies within one part; False where it does not."""
        with self._lock:
            parts = self._parts.get(file, [])
            place = bisect.bisect_right(parts, start, key=lambda part: part[0]) - 1
            if place < 0 or start + len(view) > parts[place][0] + len(parts[place][1]):
                return False
            first, content = parts[place]
        view[:] = content[start - first : start - first + len(view)]
        return True
