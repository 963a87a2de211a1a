"""How files on a disk are read fast: by one thread into the page cache, ahead of those who need it, or past the page cache."""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from io import FileIO
from pathlib import Path

import numpy as np

from reapkit.errors import CheckpointError
from reapkit.tensors import reading

# What is read ahead at a time: by one call, during which nobody waits for the interpreter. It goes into so little memory that it stays in
# the processor's own cache.
_PIECE_BYTES, _BUFFER_BYTES = 64 << 20, 1 << 20
# Ranges from this size on are read past the page cache, in pieces of at most this size, so many of a file at once, from places and to
# memory aligned to blocks.
_LEAST_DIRECT, _DIRECT_BYTES, _DIRECT_AT_ONCE, _BLOCK_BYTES = 1 << 20, 4 << 20, 4, 4096
# What a file system says that does not read past the page cache.
_NO_DIRECT = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class Ahead:
    """Ranges that one thread brings into the page cache in their order, ahead of those who read them, who wait for it.

    A disk gives most to one who reads on and on, and it need not rest while nobody asks. What it gives where others read beside the one is
    in benchmarks/RESULTS.md, section 2.

    Args:
        path: the folder.
        ranges: file, start and stop of each.
        window: bytes that may lie in the page cache ahead of the readers.
    """

    def __init__(self, path: Path, ranges: Iterable[tuple[str, int, int]], *, window: int) -> None:
        self._path = path
        self._window = window
        self._pieces: list[tuple[str, int, int]] = []
        # By file and start of a range, the number of the piece that it ends in.
        self._last: dict[tuple[str, int], int] = {}
        for file, start, stop in ranges:
            if (file, start) not in self._last:
                self._add(file, start, stop)
                self._last[file, start] = len(self._pieces) - 1
        # The furthest piece that was asked for, and how many have come.
        self._asked = self._come = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="reapkit-disk", daemon=True)
        self._thread.start()

    def require(self, file: str, start: int) -> None:
        """Wait until a range has come, if it is expected, and let what follows it be brought in."""
        last = self._last.get((file, start))
        if last is None:
            return
        with self._changed:
            self._asked = max(self._asked, last)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_closed or self._come > last)

    def close(self) -> None:
        """End it, once a piece that was begun has come."""
        self._end()
        self._thread.join()

    def _end(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _add(self, file: str, start: int, stop: int) -> None:
        """Append a range: to the last piece, where it follows on it and there is room, and to new ones."""
        while start < stop:
            before, first, last = self._pieces[-1] if self._pieces else ("", 0, 0)
            if (before, last) != (file, start) or last - first >= _PIECE_BYTES:
                first = start
                self._pieces.append((file, first, first))
            start = min(stop, first + _PIECE_BYTES)
            self._pieces[-1] = file, first, start

    def _run(self) -> None:
        try:
            with suppress(OSError):  # whoever reads the same says what it is
                self._bring_pieces()
        finally:
            self._end()

    def _bring_pieces(self) -> None:
        buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))
        for file, pieces in itertools.groupby(enumerate(self._pieces), key=lambda entry: entry[1][0]):
            with (self._path / file).open("rb", buffering=0) as stream:
                for number, (_, start, stop) in pieces:
                    if not self._may_read(number):
                        return
                    _bring_in(stream.fileno(), start, stop, buffer)

    def _may_read(self, number: int) -> bool:
        """Say that the pieces before it have come, and wait until it is near enough to what is read; False where the end comes first."""
        least = number - self._window // _PIECE_BYTES
        with self._changed:
            self._come = number
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_closed or self._asked >= least)
            return not self._is_closed


def _bring_in(descriptor: int, start: int, stop: int, buffer: memoryview) -> None:
    """Read a range into the page cache, by one call to the system."""
    while start < stop:
        whole, rest = divmod(stop - start, len(buffer))
        count = os.preadv(descriptor, [buffer] * whole + [buffer[:rest]] * bool(rest), start)
        if not count:  # the file has ended
            return
        start += count


class Readers(ThreadPoolExecutor):
    """Threads that read past the page cache, and the memory that they read into, for so many files at once.

    The memory is taken before the page cache fills with what is written: in one request a disk fills only so many places of memory, and
    what is free early lies together.

    Args:
        num_files: how many are read at once, and how many threads read.
    """

    def __init__(self, num_files: int) -> None:
        super().__init__(num_files)
        self._num_files = num_files
        self._lock = threading.Lock()

    @contextmanager
    def buffers(self) -> Iterator[list[memoryview]]:
        """Memory for one file, aligned to pages."""
        with self._lock:
            held = self._unused.pop()
        try:
            yield held
        finally:
            self._unused.append(held)

    @cached_property
    def _unused(self) -> list[list[memoryview]]:
        memory = mmap.mmap(-1, self._num_files * _DIRECT_AT_ONCE * _DIRECT_BYTES)
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 0  # the system gives what is written to
        starts = range(0, len(memory), _DIRECT_BYTES)
        buffers = [memoryview(memory)[start : start + _DIRECT_BYTES] for start in starts]
        return [buffers[number :: self._num_files] for number in range(self._num_files)]


class Direct:
    """A file that is read past the page cache, but for what the cache holds, several pieces at once.

    What is read is needed once. The page cache would hold it in place of what is written, and the system, which sees a file that is read
    from end to end, would read the gaps between kept ranges too. Where a checkpoint was just observed and memory is large, it is there.
    """

    def __init__(self, descriptor: int, *, file: str, readers: Readers, buffers: list[memoryview]) -> None:
        self._descriptor = descriptor
        self._file = file
        self._readers = readers
        self._buffers = buffers

    @classmethod
    @contextmanager
    def opened(cls, source: FileIO, *, file: str, readers: Readers) -> Iterator[Direct | None]:
        """The same file once more; None where it does not lie on a disk by itself (but on the network or in memory), or its file system
        does not read so."""
        direct = None
        with ExitStack() as stack:
            if hasattr(os, "O_DIRECT") and os.major(os.fstat(source.fileno()).st_dev):
                with reading(file):
                    try:
                        descriptor = os.open(source.name, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
                        stack.callback(os.close, descriptor)
                        buffers = stack.enter_context(readers.buffers())
                        trial = cls(descriptor, file=file, readers=readers, buffers=buffers)
                        trial._fill(0, 0, 1)
                        direct = trial
                    except OSError as error:
                        if error.errno not in _NO_DIRECT:
                            raise
            yield direct

    def is_for(self, start: int, stop: int) -> bool:
        """Whether a range is long, and not in the page cache."""
        return stop - start >= _LEAST_DIRECT and not self.is_cached(start, stop)

    def is_cached(self, start: int, stop: int) -> bool:
        """Whether the page cache holds most of a range; of a file that belongs to somebody else the system says so always."""
        first = start - start % mmap.ALLOCATIONGRANULARITY
        held = np.zeros(-(-(stop - first) // mmap.PAGESIZE), np.uint8)
        try:
            mincore = ctypes.CDLL(None).mincore
            mapping = mmap.mmap(self._descriptor, stop - first, access=mmap.ACCESS_READ, offset=first)
        except (OSError, ValueError, AttributeError):  # not every system tells; of a file that has ended, reading does
            return False
        mincore(ctypes.c_void_p(np.frombuffer(mapping, np.uint8).ctypes.data), ctypes.c_size_t(stop - first),
                held.ctypes.data_as(ctypes.c_void_p))  # fmt: skip
        return bool((held & 1).mean() > 0.5)

    def read(self, ranges: Iterable[tuple[int, int]]) -> Generator[memoryview, None, None]:
        """The bytes of ranges, in their order; what is yielded is good until the next is asked for. To be read to its end or closed.

        Raises:
            CheckpointError: the file has become shorter, or cannot be read.
        """
        begun: deque[Future[memoryview]] = deque()

        def first() -> memoryview:
            with reading(self._file):
                return begun[0].result()

        try:
            for number, (start, stop) in enumerate(_cut(ranges)):
                if len(begun) == len(self._buffers):
                    yield first()
                    begun.popleft()
                begun.append(self._readers.submit(self._fill, number % len(self._buffers), start, stop))
            while begun:
                yield first()
                begun.popleft()
        finally:
            for future in begun:
                future.cancel()
            wait(begun)

    def _fill(self, buffer: int, start: int, stop: int) -> memoryview:
        """A range that a buffer holds when its beginning is moved back to a whole block."""
        first = start - start % _BLOCK_BYTES
        place, missing = self._buffers[buffer][: stop - first + -stop % _BLOCK_BYTES], stop - first
        filled = 0
        while filled < missing:
            count = os.preadv(self._descriptor, [place[filled:]], first + filled)
            filled += count
            if not count or (count % _BLOCK_BYTES and filled < missing):
                raise shorter(self._file)
        return place[start - first : missing]


def _cut(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Pieces that end at whole blocks where the range goes on."""
    for start, stop in ranges:
        while start < stop:
            end = min(stop, start - start % _BLOCK_BYTES + _DIRECT_BYTES)
            yield start, end
            start = end


def shorter(file: str) -> CheckpointError:
    """What a shard is told that ends before its header says it does."""
    return CheckpointError(f"{file} has become shorter while it was read", hint="fetch the shard again")
