"""Files from strangers, case by case: what they claim is checked, nothing outside their folder is read or written, time and memory end."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import resource
import shutil
import struct
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fuzzing
import reapkit.calibration
import reapkit.tensors
import tiny
from fuzzing import Letters
from reapkit import calibration, plans, shards, verify
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint, require_plain_files
from reapkit.errors import (
    LONGEST_MESSAGE,
    CheckpointError,
    DataError,
    OutputError,
    PlanError,
    ReapkitError,
    UnsupportedError,
)
from reapkit.inventory import inspect
from reapkit.layout import resolve
from reapkit.modules import load_tokenizer
from reapkit.plans import PruningPlan
from reapkit.quantization import compiled
from reapkit.tensors import MAX_HEADER_BYTES, MAX_JSON_BYTES, parse_json, read_header

MEGABYTE = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint in three shards, to be made hostile."""
    return fuzzing.write_checkpoint(tmp_path / "model", fuzzing._qwen3, num_shards=3)


@contextlib.contextmanager
def within(*, seconds: float, nbytes: int) -> Iterator[None]:
    """Fail where it takes longer on the processor, or more memory at its peak."""
    tracemalloc.start()
    begun = time.process_time()
    try:
        yield
        taken, peak = time.process_time() - begun, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < seconds and peak < nbytes, (taken, peak)


def refused(action: Callable[[], Any], sentence: str, kind: type[ReapkitError] = CheckpointError) -> ReapkitError:
    with pytest.raises(kind) as caught:
        action()
    assert sentence in caught.value.message
    return caught.value


def change(path: Path, **entries: Any) -> None:
    tiny.write_json(path, {**tiny.read_json(path), **entries})


def change_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a shard's header and leave its data."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def shard_of(folder: Path) -> Path:
    return folder / "model-0.safetensors"


# ---- headers ------------------------------------------------------------------------------------------------------------------------


def test_a_header_of_more_than_100_megabytes_is_refused_without_reading_it(folder: Path) -> None:
    with shard_of(folder).open("r+b") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        stream.truncate(MAX_HEADER_BYTES + (1 << 30))  # a sparse file, which has the bytes that it claims
    with within(seconds=1, nbytes=MEGABYTE):
        refused(lambda: Checkpoint.open(folder), "has a header of 100,000,001 bytes; at most 100,000,000 are read")


def test_a_header_of_zeros_just_below_the_limit_costs_its_size_and_no_more(folder: Path) -> None:
    with shard_of(folder).open("r+b") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES))
        stream.truncate(8)
        stream.truncate(MAX_HEADER_BYTES + 8)
    with within(seconds=5, nbytes=3 * MAX_HEADER_BYTES):
        refused(lambda: Checkpoint.open(folder), "is not valid JSON")


def test_a_declared_length_beyond_the_file_is_refused(folder: Path) -> None:
    for length in (1 << 40, 1 << 63, (1 << 64) - 1):
        with shard_of(folder).open("r+b") as stream:
            stream.write(struct.pack("<Q", length))
        with within(seconds=1, nbytes=MEGABYTE):
            refused(lambda: Checkpoint.open(folder), f"its header claims {length:,} bytes")


def first(header: dict[str, Any]) -> dict[str, Any]:
    entry = header[next(name for name in header if name != "__metadata__")]
    assert isinstance(entry, dict)
    return entry


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda h: first(h).update(data_offsets=[0, 10**18]), "in the bytes 0 to 1,000,000,000,000,000,000"),
        (lambda h: first(h).update(data_offsets=[-96, 0]), "in the bytes -96 to 0"),
        (lambda h: first(h).update(data_offsets=[2**63, 2**63 + 96]), "with the offsets [9223372036854775808, "),
        (lambda h: first(h).update(data_offsets=[0, 1.5]), "with the offsets [0, 1.5]"),
        (lambda h: first(h).update(data_offsets=[8, 104]), "has a gap or an overlap in front of"),
        (lambda h: first(h).update(shape=[2**32, 2**32], dtype="U8"), "which no file can hold"),
        (lambda h: first(h).update(shape=[2**63, 2, 0]), "with the shape [9223372036854775808, 2, 0]"),
        (lambda h: first(h).update(shape=[10**4000] * 900), "with the shape [1000000"),
        (lambda h: first(h).update(shape=[-6, -8]), "with the shape [-6, -8]"),
        (lambda h: first(h).update(shape=[6.0, 8]), "with the shape [6.0, 8]"),
        (lambda h: first(h).update(shape=["6", 8]), "with the shape ['6', 8]"),
        (lambda h: first(h).update(shape=[True, 48]), "with the shape [True, 48]"),
        (lambda h: first(h).update(shape=[1] * 65), "with the shape [1, 1, "),
        (lambda h: first(h).update(shape={}), "with the shape {}"),
        (lambda h: h.update({"x" * 1_001: first(h)}), "its name has 1,001 signs, and at most 1,000 are read"),
    ],
)
def test_offsets_and_shapes_that_no_file_can_have_are_refused(
    folder: Path, edit: Callable[[dict[str, Any]], Any], sentence: str
) -> None:
    change_header(shard_of(folder), edit)
    with within(seconds=1, nbytes=16 * MEGABYTE):
        refused(lambda: Checkpoint.open(folder), sentence)


def test_two_tensors_of_the_same_bytes_are_refused(folder: Path) -> None:
    def alias(header: dict[str, Any]) -> None:
        header["copy"] = dict(first(header))

    change_header(shard_of(folder), alias)
    refused(lambda: Checkpoint.open(folder), "has a gap or an overlap in front of")


def test_a_name_twice_in_one_header_is_refused(folder: Path) -> None:
    content = shard_of(folder).read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].rstrip(b" ").replace(b'{"__metadata__"', b'{"__metadata__":{},"__metadata__"', 1)
    shard_of(folder).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    refused(lambda: Checkpoint.open(folder), "'__metadata__' appears twice")


def test_of_a_name_in_two_shards_the_indexs_is_taken(folder: Path) -> None:
    """The index is the authority: a copy in another shard is no part of the checkpoint, and is not carried into an output."""
    index = tiny.read_json(folder / "model.safetensors.index.json")["weight_map"]
    name = next(name for name, file in index.items() if file == "model-0.safetensors")
    content = (folder / "model-1.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    end = len(content) - 8 - length
    header[name] = {"dtype": "U8", "shape": [3], "data_offsets": [end, end + 3]}
    text = json.dumps(header).encode()
    (folder / "model-1.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :] + b"abc")
    assert Checkpoint.open(folder).tensors[name].file == "model-0.safetensors"


def test_an_output_with_a_name_in_two_shards_does_not_verify(folder: Path, tmp_path: Path) -> None:
    out = pruned(folder, tmp_path / "out")
    extra = {"lm_head.weight": ("BF16", (6, 8))}
    (out / "model-00004-of-00004.safetensors").write_bytes(fuzzing.shard(extra))
    assert "is a safetensors file that model.safetensors.index.json does not name" in " ".join(verify(out).problems)


def pruned(folder: Path, out: Path) -> Path:
    checkpoint = Checkpoint.open(folder)
    layout = resolve(checkpoint, ARCHITECTURES)
    shards.write(checkpoint, layout, plans.choose_for_checkpoint(checkpoint, layout, keep=3).plan, out)
    return out


# ---- JSON ---------------------------------------------------------------------------------------------------------------------------

NESTED = b'{"a": ' + b"[" * 200_000
NESTED_AND_CLOSED = b'{"a": ' + b'{"a": [' * 50_000 + b"]}" * 50_000 + b"}"


def readers(tmp_path: Path) -> dict[str, Callable[[bytes], Any]]:
    """By the kind of file, a function that reads one with this content."""
    folder = fuzzing.write_checkpoint(tmp_path / "model", fuzzing._qwen3, num_shards=2)
    out = pruned(folder, tmp_path / "out")

    def through(path: Path, read: Callable[[], Any]) -> Callable[[bytes], Any]:
        def reader(content: bytes) -> Any:
            before = path.read_bytes() if path.exists() else None
            path.write_bytes(content)
            try:
                return read()
            finally:
                path.unlink() if before is None else path.write_bytes(before)

        return reader

    def statistics(content: bytes) -> Any:
        (tmp_path / "s").mkdir(exist_ok=True)
        target = fuzzing.statistics(tmp_path / "s")
        header = {"__metadata__": {"reapkit-statistics-1": content.decode("utf-8", "surrogatepass")}}
        text = json.dumps(header).encode()
        target.run(struct.pack("<Q", len(text)) + text)

    def header(content: bytes) -> Any:
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)
        return read_header(tmp_path / "x.safetensors")

    rows = tmp_path / "rows.jsonl"
    (folder / "tokenizer.json").write_text("{}")
    return {
        "header": header,
        "index": through(folder / "model.safetensors.index.json", lambda: Checkpoint.open(folder)),
        "config": through(folder / "config.json", lambda: inspect(folder)),
        "plan": through(tmp_path / "plan.json", lambda: PruningPlan.load(tmp_path / "plan.json")),
        "manifest": through(out / "reapkit.json", lambda: verify(out)),
        "statistics": statistics,
        "row": through(rows, lambda: calibration.load([str(rows)], Letters())),
        "rows": through(tmp_path / "rows.json", lambda: calibration.load([str(tmp_path / "rows.json")], Letters())),
        "tokenizer_config": through(folder / "tokenizer_config.json", lambda: load_tokenizer(Checkpoint.open(folder))),
        "quantisation": through(
            folder / "hf_quant_config.json", lambda: resolve(Checkpoint.open(folder), ARCHITECTURES)
        ),
    }


@pytest.mark.parametrize("content", [NESTED, NESTED_AND_CLOSED], ids=["open", "closed"])
def test_nesting_beyond_any_stack_is_refused_whatever_the_file(tmp_path: Path, content: bytes) -> None:
    for kind, read in readers(tmp_path).items():
        with pytest.raises(ReapkitError) as caught:
            read(content)
        assert "nested too deeply" in caught.value.message or "recursion" in caught.value.message, kind


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"a": "\xff\xfe"}', "'utf-8' codec can't decode"),
        (b'{"a": "\xed\xa0\x80"}', "'utf-8' codec can't decode"),
        ('{"a": 1}'.encode("utf-16"), "'utf-8' codec can't decode"),
        (b'{"a": "\\ud800"}', "it holds half a surrogate pair"),
        (b'{"\\uDfff": 1}', "it holds half a surrogate pair"),
        (b'{"a": NaN}', "NaN is not a number of JSON"),
        (b'{"a": [-Infinity]}', "-Infinity is not a number of JSON"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' appears twice"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "Exceeds the limit (4300 digits)"),
    ],
)
def test_json_that_is_none_is_refused_by_headers_indices_plans_manifests_and_statistics(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    every = readers(tmp_path)
    for kind in ("header", "plan", "manifest", *(["index"] if "number of JSON" not in sentence else [])):
        refused(lambda kind=kind: every[kind](content), sentence, ReapkitError)  # type: ignore[misc]
    if b"\xff" not in content and b"\xed" not in content:
        refused(lambda: every["statistics"](content), sentence, DataError)


def test_a_config_may_hold_infinity_as_published_ones_do_and_nothing_else_of_the_kind(folder: Path) -> None:
    change(folder / "config.json", time_step_limit=[0.0, float("inf")])
    assert Checkpoint.open(folder).config["time_step_limit"] == [0.0, float("inf")]
    change(folder / "config.json", num_experts=float("inf"))
    refused(lambda: inspect(folder), "where a positive whole number is expected")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_json_file_of_more_than_100_megabytes_is_not_read(folder: Path, name: str) -> None:
    with (folder / name).open("r+b") as stream:
        stream.truncate(1 << 40)
    with within(seconds=1, nbytes=MEGABYTE):
        refused(lambda: Checkpoint.open(folder), f"{name} has 1,099,511,627,776 bytes; at most 100,000,000 are read")


def test_a_plan_or_manifest_of_more_than_100_megabytes_is_not_read(folder: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", pruned(folder, tmp_path / "out")
    for path in (plan, out / "reapkit.json"):
        with path.open("wb") as stream:
            stream.truncate(MAX_JSON_BYTES + 1)
    with within(seconds=1, nbytes=MEGABYTE):
        refused(lambda: PruningPlan.load(plan), "has 100,000,001 bytes; at most 100,000,000 are read", PlanError)
        refused(lambda: verify(out), "has 100,000,001 bytes; at most 100,000,000 are read")
    refused(lambda: parse_json(b" " * (MAX_JSON_BYTES + 1), origin="x"), "x has 100,000,001 bytes")


@pytest.mark.parametrize("key", ["num_experts", "num_hidden_layers", "num_experts_per_tok"])
@pytest.mark.parametrize("value", [10**9, 2**64, 10**4_000])
def test_counts_of_which_memory_or_time_would_follow_are_refused(folder: Path, key: str, value: int) -> None:
    change(folder / "config.json", **{key: value})
    for read in (lambda: resolve(Checkpoint.open(folder), ARCHITECTURES), lambda: inspect(folder)):
        with within(seconds=1, nbytes=4 * MEGABYTE):
            refused(read, "and no model has more than 100,000")


@pytest.mark.parametrize("value", [-4, 0, 4.0, "4", True, [], {}, [4, 5], None])
def test_a_count_that_is_none_is_refused(folder: Path, value: Any) -> None:
    change(folder / "config.json", num_experts=value)
    with pytest.raises(ReapkitError, match=r"number of experts|counts no experts"):
        resolve(Checkpoint.open(folder), ARCHITECTURES)


@pytest.mark.parametrize("pattern", ["(.+)+!", "(a*)*b", "((a{2,}){9})*", "(?:x+|y)+z", ".*" * 9])
def test_a_pattern_that_could_be_tried_forever_is_refused(pattern: str) -> None:
    with within(seconds=1, nbytes=MEGABYTE):
        refused(lambda: compiled(pattern, where="config.json"), "which could take forever to try")


@pytest.mark.parametrize(
    "pattern", [r".*mlp\.experts\.\d+\.(gate|up|down)_proj.*", r"model\.layers\.(1|2)\..*", "(?:ab){2}c+"]
)
def test_patterns_as_quantisers_write_them_are_taken(pattern: str) -> None:
    assert compiled(pattern, where="config.json").pattern == pattern


# ---- names and places -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("../model/model-0.safetensors", "which is outside the checkpoint"),
        ("/etc/passwd", "which is outside the checkpoint"),
        ("a/../../model/model-0.safetensors", "which is outside the checkpoint"),
        ("..\\model-0.safetensors", "which is outside the checkpoint"),
        ("model-0.safetensors\0.txt", "which is outside the checkpoint"),
        ("", "is not a plain file"),
        (".", "is not a plain file"),
        ("x" * 300, "cannot be looked up: File name too long"),
        ("a/" * 3000, "cannot be looked up: File name too long"),
        ("\x1b[2J", "is missing from"),
    ],
)
def test_an_index_names_files_of_the_folder_alone(folder: Path, file: str, sentence: str) -> None:
    index = tiny.read_json(folder / "model.safetensors.index.json")
    index["weight_map"]["lm_head.weight"] = file
    tiny.write_json(folder / "model.safetensors.index.json", index)
    refused(lambda: Checkpoint.open(folder), sentence)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    "make", [make_fifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")], ids=["fifo", "folder", "device"]
)
@pytest.mark.parametrize("name", ["model-0.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_pipe_a_folder_or_a_device_in_a_files_place_is_refused_at_once(
    folder: Path, name: str, make: Callable[[Path], Any]
) -> None:
    (folder / name).unlink()
    make(folder / name)
    for read in (lambda: Checkpoint.open(folder), lambda: inspect(folder)):
        with within(seconds=1, nbytes=4 * MEGABYTE):
            refused(read, "plain file of")


def test_a_link_round_in_a_circle_is_refused(folder: Path) -> None:
    shard_of(folder).unlink()
    shard_of(folder).symlink_to("model-0.safetensors")
    with pytest.raises(CheckpointError):
        Checkpoint.open(folder)


def test_folders_linked_in_circles_and_nested_beyond_any_stack_end(folder: Path) -> None:
    for name in ("a", "b", "c"):
        (folder / name).symlink_to(".")
    deep = folder / "deep"
    here = Path.cwd()
    deep.mkdir()
    try:
        os.chdir(deep)
        for _ in range(1_500):
            Path("d").mkdir()
            os.chdir("d")
    finally:
        os.chdir(here)
    with within(seconds=5, nbytes=16 * MEGABYTE):
        assert Checkpoint.open(folder).sidecars == ()
    subprocess.run(["rm", "-rf", deep], check=True)  # Python's own way of removing folders overflows its stack


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling_x.py"])
def test_a_sidecar_that_leads_out_of_the_folder_is_neither_copied_nor_read(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / name).symlink_to(tmp_path / "secret")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.sidecars == ()
    assert not (pruned(folder, tmp_path / "out") / name).exists()
    refused(lambda: load_tokenizer(checkpoint), f"'{name}' in {folder} leads out of the checkpoint")


def test_a_linked_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/secret.txt").write_text("secret")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.sidecars == ()
    refused(lambda: load_tokenizer(checkpoint), "leads out of the checkpoint")


def test_a_pipe_among_the_tokenizers_files_does_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "tokenizer.json")
    refused(lambda: load_tokenizer(Checkpoint.open(folder)), "'tokenizer.json' in")
    refused(lambda: require_plain_files(folder), "is neither a file nor a folder")


def test_links_into_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123abcd", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    require_plain_files(snapshot)
    assert len(Checkpoint.open(snapshot).tensors) == len(Checkpoint.open(folder).tensors)


def test_a_file_whose_name_cannot_be_printed_is_refused(folder: Path) -> None:
    for name in (b"evil\x1b[2J.txt", b"half\xff.txt"):
        path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
        path.write_text("")
        refused(lambda: Checkpoint.open(folder), "whose name has signs that cannot be printed")
        path.unlink()


def test_tensor_names_are_never_paths(folder: Path, tmp_path: Path) -> None:
    """A tensor may be called as it likes: outputs name their shards themselves."""
    name = "../../evil/\x1b[2J/etc/passwd"
    (folder / "model-3.safetensors").write_bytes(fuzzing.shard({name: ("U8", (3,))}))
    index = tiny.read_json(folder / "model.safetensors.index.json")
    index["weight_map"][name] = "model-3.safetensors"
    tiny.write_json(folder / "model.safetensors.index.json", index)
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "out")}
    out = pruned(folder, tmp_path / "out")
    assert name in Checkpoint.open(out).tensors and verify(out, source=folder).ok
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(out)} == before


def test_shards_in_a_folder_of_the_checkpoint_come_out_beside_each_other(folder: Path, tmp_path: Path) -> None:
    (folder / "sub").mkdir()
    shard_of(folder).rename(folder / "sub/model-0.safetensors")
    index = tiny.read_json(folder / "model.safetensors.index.json")
    files = {name: file.replace("model-0", "sub/model-0") for name, file in index["weight_map"].items()}
    tiny.write_json(folder / "model.safetensors.index.json", {**index, "weight_map": files})
    out = pruned(folder, tmp_path / "out")
    assert all("/" not in file for file in Checkpoint.open(out).files)


def test_an_output_folder_that_is_a_link_is_written_through_to_its_target_and_nowhere_else(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    pruned(folder, tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "real/reapkit.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "real"]


def test_an_output_folder_that_links_into_the_source_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(folder)
    refused(lambda: pruned(folder, tmp_path / "out"), "is the source itself", OutputError)
    (tmp_path / "inside").symlink_to(folder / "sub")
    refused(lambda: pruned(folder, tmp_path / "inside"), "is inside the source", OutputError)


def test_links_laid_into_an_unfinished_output_are_not_written_through(folder: Path, tmp_path: Path) -> None:
    """Someone else who may write to the folder lays a link under the name that is written next."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("reapkit.unfinished.json.partial", "reapkit"):
        (out / name).symlink_to(victim)
        with contextlib.suppress(ReapkitError):
            pruned(folder, out)
        assert victim.read_text() == "kept", name
        shutil.rmtree(out)
        out.mkdir()
    (out / "reapkit").mkdir()
    (out / "reapkit/lock").symlink_to(victim)
    refused(lambda: pruned(folder, out), "stopped: Too many levels of symbolic links", OutputError)
    assert victim.read_text() == "kept"


@pytest.mark.parametrize("name", ["../victim", "/etc/passwd", "a\0b", "x" * 300, "..", "", "\x1b[2J"])
def test_verify_reads_no_file_outside_whatever_the_manifest_names(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "victim").write_text("kept")
    out = pruned(folder, tmp_path / "out")
    assert verify(out).ok
    manifest = tiny.read_json(out / "reapkit.json")
    manifest["digests"][name] = "0" * 64
    tiny.write_json(out / "reapkit.json", manifest)
    assert [problem for problem in verify(out).problems if "is missing" in problem] == [f"{name} is missing"]


def test_a_link_laid_under_a_verified_file_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    out = pruned(folder, tmp_path / "out")
    assert verify(out).ok
    (tmp_path / "copy").write_text("{}")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").symlink_to(tmp_path / "copy")
    assert verify(out).problems == ("tokenizer.json is missing",)


@pytest.mark.parametrize(
    "origin", ["https://user:secret@host/x", "/dev/zero", "/", "\x1b]0;title\x07", "a\0b", "x" * 300, "-o", "~root/x"]
)
def test_a_plans_origin_is_shown_and_never_opened(folder: Path, tmp_path: Path, origin: str) -> None:
    checkpoint = Checkpoint.open(folder)
    layout = resolve(checkpoint, ARCHITECTURES)
    path = tmp_path / "plan.json"
    plans.choose_for_checkpoint(checkpoint, layout, keep=3).plan.save(path)
    plan = tiny.read_json(path)
    tiny.write_json(path, {**plan, "source": {**plan["source"], "origin": origin}})
    shards.write(checkpoint, layout, PruningPlan.load(path), tmp_path / "out")  # it fits by its fingerprints
    tiny.write_json(path, {**plan, "source": {**plan["source"], "origin": origin, "routing": "0" * 64}})
    error = refused(
        lambda: shards.write(checkpoint, layout, PruningPlan.load(path), tmp_path / "two"), "the plan is for", PlanError
    )
    assert "secret" not in error.message


def test_a_manifests_origin_that_is_no_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    out = pruned(folder, tmp_path / "out")
    for origin in ("/dev/zero", "/etc/passwd", "x" * 300, "a\0b", "https://host/x", "../../.."):
        manifest = tiny.read_json(out / "reapkit.json")
        change(out / "reapkit.json", source={**manifest["source"], "origin": origin})
        refused(lambda: verify(out), "")


def test_a_tokenizers_settings_lead_to_no_file_outside(tmp_path: Path) -> None:
    """transformers once opened what tokenizer_config.json named; with the versions in use the folder's own files come first."""
    folder = fuzzing._tokenizer_folder(tmp_path, "model")
    (tmp_path / "outside.json").write_bytes(
        (folder / "tokenizer.json").read_bytes().replace(b'"content": "', b'"content": "stolen')
    )
    keys = (
        "tokenizer_file",
        "vocab_file",
        "merges_file",
        "added_tokens_file",
        "special_tokens_map_file",
        "chat_template_file",
    )
    change(folder / "tokenizer_config.json", **dict.fromkeys(keys, str(tmp_path / "outside.json")))
    loaded = load_tokenizer(Checkpoint.open(folder))
    assert "stolen" not in json.dumps(loaded.get_vocab())


# ---- rows -----------------------------------------------------------------------------------------------------------------------------


def test_a_row_or_a_file_that_unfolds_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reapkit.calibration, "_MAX_ROW_BYTES", 2 * MEGABYTE)
    monkeypatch.setattr(reapkit.calibration, "_MAX_FILE_BYTES", 2 * MEGABYTE)
    for name, sentence in (
        ("rows.jsonl.gz", "line 1 has more than"),
        ("rows.json.gz", "holds more than"),
        ("x.txt.gz", "holds more than"),
    ):
        path = tmp_path / name
        path.write_bytes(gzip.compress(b" " * (64 * MEGABYTE), 1))
        with within(seconds=5, nbytes=8 * MEGABYTE):
            refused(lambda path=path: calibration.load([str(path)], Letters()), sentence, DataError)  # type: ignore[misc]


def test_a_parquet_file_that_claims_billions_of_rows_is_refused(tmp_path: Path) -> None:
    content = fuzzing.parquet([{"text": "a"}])
    path = tmp_path / "rows.parquet"
    path.write_bytes(content[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1")
    refused(lambda: calibration.load([str(path)], Letters()), "is not Parquet", DataError)
    path.write_bytes(b"PAR1" + bytes(1000) + b"PAR1")
    refused(lambda: calibration.load([str(path)], Letters()), "rows.parquet", DataError)


# ---- messages -------------------------------------------------------------------------------------------------------------------------


def test_a_message_stays_short_whatever_it_names(folder: Path) -> None:
    error = UnsupportedError("x" * 10**7, hint="y" * 10**7)
    assert len(error.message) < LONGEST_MESSAGE + 40 and "(10,000,000 characters)" in error.message
    assert error.hint is not None and len(error.hint) == LONGEST_MESSAGE
    change_header(shard_of(folder), lambda header: first(header).update(dtype="B" * 10**6))
    with within(seconds=5, nbytes=64 * MEGABYTE):
        assert (
            len(refused(lambda: Checkpoint.open(folder), "with the unknown dtype 'BBB", UnsupportedError).message) < 500
        )


def test_numbers_of_any_length_can_be_named() -> None:
    assert reapkit.tensors.brief(10**10_000) == "a number of more than 30 digits"
    assert reapkit.tensors.brief(10**6) == "1000000"


def test_the_limits_do_not_hinder_other_threads(folder: Path) -> None:
    """Reading works in a thread other than the main one, where no signal can end it."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(len(Checkpoint.open(folder).tensors)))
    thread.start()
    thread.join()
    assert found and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
