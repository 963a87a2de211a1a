"""A checkpoint as it lies on disk: what is taken from it, and what is refused with which sentence."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import tiny
from reapkit import pagecache
from reapkit.checkpoint import UNFINISHED_NAME, Checkpoint
from reapkit.errors import CheckpointError
from reapkit.pagecache import Ahead


@pytest.fixture
def copy(m2: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(m2, tmp_path / "copy"))


def refuse(folder: Path, sentence: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert sentence in caught.value.message
    return caught.value


def shard_of(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[3]


def test_the_tensor_table_has_every_tensor_of_the_index_and_its_bytes(m2: Path) -> None:
    checkpoint = Checkpoint.open(m2)
    reference = tiny.load_tensors(m2)
    assert checkpoint.tensors.keys() == reference.keys()
    for name, tensor in reference.items():
        assert bytes(checkpoint.read(checkpoint.tensors[name])) == tensor.numpy().tobytes()
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in reference.values())
    assert len(checkpoint.files) > 8


def test_sidecars_are_the_files_that_belong_to_the_model_and_no_weights(m2: Path) -> None:
    assert Checkpoint.open(m2).sidecars == tuple(sorted(tiny.SIDECARS))


def test_fingerprints_do_not_depend_on_shards(m2: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(m2)
    save_file(tiny.load_tensors(m2), tmp_path / "model.safetensors")
    shutil.copy(m2 / "config.json", tmp_path)
    single = Checkpoint.open(tmp_path)
    assert single.files == ("model.safetensors",)
    assert single.layout_fingerprint == checkpoint.layout_fingerprint
    names = [name for name in checkpoint.tensors if "gate" in name]
    assert single.fingerprint(names) == checkpoint.fingerprint(reversed(names))
    assert single.fingerprint(names[1:]) != checkpoint.fingerprint(names)


def test_tensors_that_only_a_shard_knows_do_not_belong_to_the_checkpoint(copy: Path) -> None:
    index = tiny.read_json(copy / "model.safetensors.index.json")
    del index["weight_map"]["model.norm.weight"]
    tiny.write_json(copy / "model.safetensors.index.json", index)
    assert "model.norm.weight" not in Checkpoint.open(copy).tensors


def test_a_missing_shard_is_named(copy: Path) -> None:
    shard_of(copy).unlink()
    error = refuse(copy, f"the shard {shard_of_name(3)} is missing from {copy}")
    assert error.hint and "fetch it again" in error.hint


def shard_of_name(number: int) -> str:
    return f"model-{number + 1:05d}-of-00017.safetensors"


def test_a_truncated_shard_is_named_with_the_numbers(copy: Path) -> None:
    shard = shard_of(copy)
    size = shard.stat().st_size
    with shard.open("r+b") as stream:
        stream.truncate(size - 10)
    refuse(copy, f"{shard.name} is truncated: its tensors end at byte {size:,} and the file has {size - 10:,}")


def test_a_header_longer_than_its_file_is_named(copy: Path) -> None:
    with shard_of(copy).open("r+b") as stream:
        stream.write((1 << 40).to_bytes(8, "little"))
    refuse(copy, "its header claims 1,099,511,627,776 bytes")


@pytest.mark.parametrize("file", ["/etc/passwd", "../m2/model.safetensors", "a\\..\\b.safetensors", "a\0b"])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(copy: Path, file: str) -> None:
    redirect(copy, file)
    refuse(copy, "which is outside the checkpoint")


def test_a_link_out_of_the_folder_is_refused(copy: Path, tmp_path: Path) -> None:
    shard = shard_of(copy)
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    refuse(copy, f"the shard {shard.name} is not a plain file of {copy}")


def test_a_snapshot_of_the_hub_cache_links_to_its_blobs(m2: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in m2.iterdir() if path.is_file())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    checkpoint = Checkpoint.open(snapshot)
    assert checkpoint.revision == "0123abcd"
    assert "tokenizer.json" in checkpoint.sidecars
    assert checkpoint.layout_fingerprint == Checkpoint.open(m2).layout_fingerprint


def test_an_index_that_names_a_file_that_is_not_there_is_refused(copy: Path) -> None:
    redirect(copy, "model-99999.safetensors")
    refuse(copy, "the shard model-99999.safetensors is missing")


def redirect(folder: Path, file: str) -> None:
    index = tiny.read_json(folder / "model.safetensors.index.json")
    index["weight_map"]["model.norm.weight"] = file
    tiny.write_json(folder / "model.safetensors.index.json", index)


def test_a_tensor_that_is_not_in_the_shard_where_the_index_places_it_is_named(copy: Path) -> None:
    index = tiny.read_json(copy / "model.safetensors.index.json")
    index["weight_map"]["model.ghost.weight"] = shard_of(copy).name
    tiny.write_json(copy / "model.safetensors.index.json", index)
    refuse(copy, f"places 'model.ghost.weight' in {shard_of(copy).name}, which does not hold it (1 such tensors)")


def test_an_index_without_a_weight_map_is_refused(copy: Path) -> None:
    tiny.write_json(copy / "model.safetensors.index.json", {"weight_map": ["a"]})
    refuse(copy, "has no table weight_map")


def test_a_folder_without_config_or_weights_says_what_a_checkpoint_is(tmp_path: Path) -> None:
    refuse(tmp_path, "has no config.json")
    tiny.write_json(tmp_path / "config.json", {})
    refuse(tmp_path, "has neither model.safetensors.index.json nor model.safetensors")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    tiny.write_json(tmp_path / "config.json", {})
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    error = refuse(tmp_path, "has neither")
    assert error.hint and "pytorch_model.bin is a pickle, which can run code when loaded" in error.hint


def test_a_config_that_is_not_json_is_named(copy: Path) -> None:
    (copy / "config.json").write_text('{"a": 1, "a": 2}')
    refuse(copy, "config.json is not valid JSON: 'a' appears twice")


def test_neither_a_file_nor_a_missing_path_is_a_checkpoint(tmp_path: Path) -> None:
    refuse(tmp_path / "absent", "there is no folder")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file", "is a file; a checkpoint is a folder")


def test_an_unfinished_output_is_refused(copy: Path) -> None:
    (copy / UNFINISHED_NAME).write_text("{}")
    error = refuse(copy, "is the unfinished output of an interrupted run")
    assert error.hint and "repeat the command" in error.hint


def test_a_shard_that_shrinks_after_it_was_opened_is_named(copy: Path) -> None:
    checkpoint = Checkpoint.open(copy)
    info = list(checkpoint.tensors.values())[-1]
    with (copy / info.file).open("r+b") as stream:
        stream.truncate(info.start + 1)
    with pytest.raises(CheckpointError, match="ends inside"):
        checkpoint.read(info)


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The ranges that reading ahead has had from the system, in pieces of 1,000 bytes."""
    found: list[tuple[str, int, int]] = []
    preadv = os.preadv

    def recorded(descriptor: int, buffers: Any, start: int) -> int:
        count = preadv(descriptor, buffers, start)
        found.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, start, start + count))
        return count

    monkeypatch.setattr(os, "preadv", recorded)
    monkeypatch.setattr(pagecache, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(pagecache, "_BUFFER_BYTES", 300)
    return found


def size(brought: list[tuple[str, int, int]], *, least: int = 0) -> int:
    """How many bytes were brought, once they are so many or it took too long."""
    end = time.monotonic() + 10
    while (found := sum(stop - start for _, start, stop in brought)) < least and time.monotonic() < end:
        time.sleep(0.001)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="what the system was asked for is looked up in /proc")
def test_what_is_expected_of_a_folder_comes_to_the_page_cache_once_in_order_and_not_too_far_ahead(
    m2: Path, brought: list[tuple[str, int, int]]
) -> None:
    checkpoint = Checkpoint.open(m2)
    infos = sorted(checkpoint.tensors.values(), key=lambda info: (info.file, info.start), reverse=True)
    total, furthest = sum(info.nbytes for info in infos), 0
    with checkpoint.expecting([*infos, *infos[:2]], cached=4000):
        for place, info in enumerate(infos):
            read = sum(info.nbytes for info in infos[:place])
            furthest = max(furthest, size(brought, least=min(read + 3000, total)) - read)
            assert checkpoint.read(info) == (m2 / info.file).read_bytes()[info.start : info.stop]
        size(brought, least=total)
    expected = [(info.file, place) for info in infos for place in range(info.start, info.stop)]
    assert [(file, place) for file, start, stop in brought for place in range(start, stop)] == expected
    assert max(stop - start for _, start, stop in brought) == 1000
    # Four pieces, and the one that ends what was read last.
    assert 3000 <= furthest <= 5000


@pytest.mark.skipif(sys.platform != "linux", reason="what the system was asked for is looked up in /proc")
def test_reading_ahead_ends_with_what_expects_it(m2: Path, brought: list[tuple[str, int, int]]) -> None:
    checkpoint = Checkpoint.open(m2)
    info = next(iter(checkpoint.tensors.values()))
    before = threading.active_count()
    with checkpoint.expecting(checkpoint.tensors.values(), cached=4000):
        assert threading.active_count() == before + 1
        size(brought, least=5000)
    assert threading.active_count() == before
    checkpoint.read(info)
    assert size(brought) == 5000


@pytest.fixture
def held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What the thread that reads ahead waits for before it reads anything."""
    may_go_on = threading.Event()
    preadv = os.preadv

    def waiting(descriptor: int, buffers: Any, start: int) -> int:
        assert may_go_on.wait(10)
        return preadv(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", waiting)
    yield may_go_on
    may_go_on.set()


def test_who_reads_waits_for_what_is_expected_and_for_nothing_else(m2: Path, held_up: threading.Event) -> None:
    checkpoint = Checkpoint.open(m2)
    info, *_, other = checkpoint.tensors.values()
    with ThreadPoolExecutor(2) as pool, checkpoint.expecting([info]):
        expected, unexpected = pool.submit(checkpoint.read, info), pool.submit(checkpoint.read, other)
        assert len(unexpected.result(10)) == other.nbytes
        assert wait([expected], 0.05).not_done
        held_up.set()
        assert expected.result(10) == (m2 / info.file).read_bytes()[info.start : info.stop]


def test_who_waits_for_what_is_read_ahead_need_not_wait_when_that_ends(m2: Path, held_up: threading.Event) -> None:
    file = Checkpoint.open(m2).files[0]
    ahead = Ahead(m2, [(file, 0, (m2 / file).stat().st_size)], window=0)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(ahead.require, file, 0)
        assert wait([waiting], 0.05).not_done
        closing = pool.submit(ahead.close)
        waiting.result(5)
        assert not closing.done()
        held_up.set()
        closing.result(10)


@pytest.mark.parametrize("harm", ["shrinks", "is gone"])
def test_a_shard_that_is_harmed_while_it_is_read_ahead_is_named_by_who_reads_it(copy: Path, harm: str) -> None:
    checkpoint = Checkpoint.open(copy)
    file = checkpoint.files[0]
    info = max((info for info in checkpoint.tensors.values() if info.file == file), key=lambda info: info.stop)
    if harm == "shrinks":
        os.truncate(copy / file, info.stop - 1)
    else:
        (copy / file).unlink()
    with checkpoint.expecting(checkpoint.tensors.values()), pytest.raises(CheckpointError, match=file):
        checkpoint.read(info)
