"""safetensors headers: what a stranger's file claims is checked against the file before it is believed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reapkit.errors import CheckpointError, UnsupportedError
from reapkit.tensors import encode_header, nbytes, parse_json, read_header


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_a_header_says_where_the_reference_implementation_put_every_tensor(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.randn(5),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "fp8": torch.randn(3, 3).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    content = path.read_bytes()
    for name, tensor in tensors.items():
        info = header[name]
        assert info.shape == tuple(tensor.shape) and info.num_elements == tensor.numel()
        assert content[info.start : info.stop] == bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    assert [info.start for info in header.values()] == sorted(info.start for info in header.values())


def test_a_header_written_here_is_read_by_the_reference_implementation(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = encode_header([("é", "F32", (2,)), ("b", "BF16", (1, 3)), ("c", "U8", (0,))], metadata={"format": "pt"})
    assert len(header) % 8 == 0
    path.write_bytes(header + struct.pack("<2f", 1.5, -2.0) + bytes(6))
    with safe_open(path, framework="pt") as stream:
        assert stream.metadata() == {"format": "pt"}
        assert stream.get_tensor("é").tolist() == [1.5, -2.0]
        assert stream.get_tensor("b").shape == (1, 3)
    assert read_header(path)[0]["b"].nbytes == 6


def test_sub_byte_values_must_fill_whole_bytes() -> None:
    assert nbytes("F4", (3, 2)) == 3
    with pytest.raises(CheckpointError, match="3 values of F4 do not fill whole bytes"):
        nbytes("F4", (3,))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "x is truncated: 0 bytes, too short for a safetensors header"),
        (b"1234567", "x is truncated: 7 bytes"),
        (struct.pack("<Q", 1 << 60) + b"{}", "its header claims 1,152,921,504,606,846,976 bytes and the file has 10"),
        (struct.pack("<Q", 3) + b"{}", "its header claims 3 bytes and the file has 10"),
        (struct.pack("<Q", 2) + b"[]", "the header of x holds a JSON list where an object is expected"),
        (struct.pack("<Q", 2) + b"{!", "the header of x is not valid JSON"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "the header of x is not valid JSON"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "x")
    assert sentence in caught.value.message


@pytest.mark.parametrize(
    ("header", "size", "sentence"),
    [
        ({"a": entry(0, 8, [2])}, 4, "x is truncated: its tensors end at byte"),
        ({"a": entry(0, 8, [2])}, 12, "x has 4 bytes that no tensor owns"),
        ({"a": entry(4, 12, [2])}, 12, "x has a gap or an overlap in front of 'a'"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12, "x has a gap or an overlap in front of 'b'"),
        ({"a": entry(0, 8, [3])}, 8, "x describes 'a' as F32 [3], which takes 12 bytes, in the bytes 0 to 8"),
        ({"a": entry(8, 0, [2])}, 8, "in the bytes 8 to 0"),
        ({"a": entry(-8, 0, [2])}, 8, "in the bytes -8 to 0"),
        ({"a": entry(0, 8, [-2])}, 8, "x describes 'a' with the shape [-2]"),
        ({"a": entry(0, 8, [True])}, 8, "x describes 'a' with the shape [True]"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8, "x describes 'a' with the offsets [0]"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "x describes 'a' without exactly dtype, shape and data_offsets"),
        ({"a": 3}, 8, "x describes 'a' without exactly dtype"),
        ({"__metadata__": {"n": 1}}, 0, "x has metadata that is not a table of strings"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, size: int, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_header(write_raw(tmp_path / "x", header, bytes(size)))
    assert sentence in caught.value.message


def test_an_unknown_dtype_names_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="unknown dtype 'F8_E4M4'") as caught:
        read_header(write_raw(tmp_path / "x", {"a": entry(0, 8, [8], "F8_E4M4")}, bytes(8)))
    assert caught.value.hint == "did you mean 'F8_E4M3'?"


def test_a_name_that_appears_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(entry(0, 4, [1]))
    with pytest.raises(CheckpointError, match="'a' appears twice"):
        read_header(write_raw(tmp_path / "x", f'{{"a": {one}, "a": {one}}}'.encode(), bytes(4)))


def test_absurdly_nested_json_is_refused_and_does_not_crash() -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON: nested too deeply"):
        parse_json("[" * 200_000, origin="config.json")
