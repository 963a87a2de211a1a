"""safetensors headers and byte spans, without decoding a single value.

The format is 8 bytes of little-endian header length, a JSON header, then the tensors' bytes end to end. The header comes from a
stranger, so everything it claims is checked against the file before it is believed.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reapkit.errors import CheckpointError, UnsupportedError, did_you_mean

# fmt: off
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}
# fmt: on

# The reference implementation refuses larger headers; MiniMax-M2's largest is under 1 MB. Erring low would refuse real files.
MAX_HEADER_BYTES = 100_000_000
# The same for any other JSON file. The largest index of a public release, of 138,721 tensors, has 14 MB; parsing takes up to 25 times as
# much memory as a file has bytes.
MAX_JSON_BYTES = 100_000_000
# Counts, sizes and offsets beyond this are no file's: the format's own numbers end at 2**64, and file systems' at 2**63.
MAX_NUMBER = 2**63 - 1
# The reference implementation has no limit and no framework goes beyond 64.
MAX_DIMENSIONS = 64

# Public names have at most some 150 signs. A bound keeps every pattern that is tried on them fast.
LONGEST_NAME = 1_000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: nothing is decoded.

    Attributes:
        name: the tensor's name on disk.
        dtype: safetensors dtype code, a key of `DTYPE_BITS`.
        shape: dimensions, outermost first.
        file: name of the shard, relative to the checkpoint's folder.
        start: first byte in the file.
        stop: one past the last byte in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor of this dtype and shape takes; sub-byte dtypes are packed without gaps."""
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise CheckpointError(f"{math.prod(shape)} values of {dtype} do not fill whole bytes")
    return bits // 8


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} appears twice")
    return result


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def parse_json(text: bytes | str, *, origin: str, infinite: bool = False) -> dict[str, Any]:
    """A JSON object from an untrusted file; duplicate keys, half surrogate pairs, absurd size and nesting are errors.

    With `infinite`, the words NaN and Infinity are numbers, which they are not in JSON: configs of some families hold them.

    Raises:
        CheckpointError: not a JSON object, with `origin` named.
    """
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{origin} has {len(text):,} bytes; at most {MAX_JSON_BYTES:,} are read")
    try:
        # Python's own reading of bytes lets half surrogate pairs and UTF-16 through.
        written = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        constant = float if infinite else _reject_constant
        value = json.loads(written, object_pairs_hook=_reject_duplicates, parse_constant=constant)
        if "\\ud" in written or "\\uD" in written:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{origin} is not valid JSON: it holds half a surrogate pair", hint="fetch the file again"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{origin} is not valid JSON: {reason}", hint="fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{origin} holds a JSON {type(value).__name__} where an object is expected")
    return value


def as_text(value: Any) -> str:
    """A string, which a JSON value should be; ValueError else."""
    if not isinstance(value, str):
        raise ValueError(f"{brief(value)} is not a string")
    return value


def as_count(value: Any, *, least: int = 0) -> int:
    """A whole number that counts something, which a JSON value should be; ValueError else."""
    if type(value) is not int or not least <= value <= MAX_NUMBER:
        raise ValueError(f"{brief(value)} is not a whole number from {least}")
    return value


def as_flag(value: Any) -> bool:
    """True or false, which a JSON value should be; ValueError else."""
    if type(value) is not bool:
        raise ValueError(f"{brief(value)} is neither true nor false")
    return value


def as_list(value: Any) -> list[Any]:
    """A list, which a JSON value should be; ValueError else."""
    if not isinstance(value, list):
        raise ValueError(f"{brief(value)} is not a list")
    return value


def as_table(value: Any) -> dict[str, Any]:
    """An object, which a JSON value should be; ValueError else."""
    if not isinstance(value, dict):
        raise ValueError(f"{brief(value)} is not a table")
    return value


def read_layers(value: Any) -> Iterator[tuple[int, Any]]:
    """Number and entry of every layer of a JSON object with a key for each; ValueError where it is none or has one twice."""
    entries = as_table(value)
    numbers = list(map(int, entries))
    if len(set(numbers)) < len(numbers):
        raise ValueError("a layer is listed twice")
    yield from zip(numbers, entries.values(), strict=True)


def name_by_layer(layers: Mapping[int, Any], parts: Collection[str]) -> dict[str, Any]:
    """Every layer's arrays, its attributes `parts`, by their names in a file: `layers.3.count_SE`."""
    return {
        f"layers.{index}.{part}": np.ascontiguousarray(getattr(layer, part))
        for index, layer in layers.items()
        for part in parts
    }


def split_by_layer(arrays: Mapping[str, Any], parts: Collection[str]) -> dict[int, dict[str, Any]]:
    """What `name_by_layer` named, by layer and part; ValueError where there is anything else, or a layer lacks a part."""
    layers: dict[int, dict[str, Any]] = {}
    for name, values in arrays.items():
        match = re.fullmatch(r"layers\.([0-9]+)\.(\w+)", name)
        if match is None or match[2] not in parts:
            raise ValueError(f"{brief(name)} is nothing that belongs there")
        layers.setdefault(int(match[1]), {})[match[2]] = values
    for index, found in layers.items():
        if missing := sorted(set(parts) - found.keys()):
            raise ValueError(f"layers.{index}.{missing[0]} is missing")
    if not layers:
        raise ValueError("it has no layers")
    return dict(sorted(layers.items()))


def brief(value: Any) -> str:
    """A value from a stranger's file for a message, however long it is."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a number of more than 30 digits"
    return text if len(text) <= 200 else f"{text[:200]}…"


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Turn an OSError into a `CheckpointError` that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None


def read_header(path: Path, *, file: str | None = None) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read one shard's header: tensors in order of their bytes, and the file's metadata.

    Args:
        path: the shard.
        file: the name recorded in each `TensorInfo`; the path's own name by default.

    Raises:
        CheckpointError: the header is longer than the file, or lies about offsets, dtypes or shapes.
    """
    file = path.name if file is None else file
    with reading(file):
        size = path.stat().st_size
        with path.open("rb") as stream:

            def read(start: int, stop: int) -> bytes:
                stream.seek(start)
                return stream.read(stop - start)

            return parse_header(read, size=size, file=file)


def parse_header(
    read: Callable[[int, int], bytes | bytearray], *, size: int, file: str
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The same of a shard that lies anywhere: `read(start, stop)` gives its bytes, and `size` says how many there are."""
    prefix = read(0, min(8, size))
    if len(prefix) < 8:
        raise CheckpointError(
            f"{file} is truncated: {size} bytes, too short for a safetensors header",
            hint="fetch the shard again",
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > size - 8:
        raise CheckpointError(
            f"{file} is truncated or not safetensors: its header claims {length:,} bytes and the file has {size:,}",
            hint="fetch the shard again",
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file} has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    text = bytes(read(8, 8 + length))

    header = parse_json(text, origin=f"the header of {file}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file} has metadata that is not a table of strings")
    data_start = 8 + length
    infos = [_parse_entry(name, entry, file=file, data_start=data_start) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    position = data_start
    for info in infos:
        if info.start != position:
            raise CheckpointError(
                f"{file} has a gap or an overlap in front of {info.name!r}: "
                f"byte {info.start:,} where {position:,} is expected"
            )
        position = info.stop
    if position > size:
        raise CheckpointError(
            f"{file} is truncated: its tensors end at byte {position:,} and the file has {size:,}",
            hint="fetch the shard again",
        )
    if position < size:
        raise CheckpointError(f"{file} has {size - position:,} bytes that no tensor owns")
    return {info.name: info for info in infos}, metadata


def _parse_entry(name: str, entry: Any, *, file: str, data_start: int) -> TensorInfo:
    where = f"{file} describes {brief(name)}"
    if len(name) > LONGEST_NAME:
        raise CheckpointError(f"{where}: its name has {len(name):,} signs, and at most {LONGEST_NAME:,} are read")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} without exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        known = did_you_mean(str(dtype), DTYPE_BITS)
        raise UnsupportedError(f"{where} with the unknown dtype {brief(dtype)}", hint=known)
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise CheckpointError(f"{where} with the shape {brief(shape)}")
    if not _is_size(math.prod(shape)):
        raise CheckpointError(f"{where} with the shape {brief(shape)}, which no file can hold")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, map(_abs, offsets))):
        raise CheckpointError(f"{where} with the offsets {brief(offsets)}")
    start, stop = offsets
    if not 0 <= start <= stop or stop - start != nbytes(dtype, shape):
        raise CheckpointError(
            f"{where} as {dtype} {shape}, which takes {nbytes(dtype, shape):,} bytes, "
            f"in the bytes {start:,} to {stop:,}"
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_start + start, data_start + stop)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_NUMBER


def _abs(value: Any) -> Any:
    return abs(value) if type(value) is int else value


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, metadata: Mapping[str, str]) -> bytes:
    """The 8-byte length and the JSON header of a shard whose tensors (name, dtype, shape) follow in this order.

    Padded with spaces to a multiple of 8 bytes, as the reference implementation does, so that the data is aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        stop = position + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
