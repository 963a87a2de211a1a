"""Verification: every way in which an output can be wrong is found and named, with its source and later without."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from conftest import PlanFor
from reapkit import formats, shards, sources, verification
from reapkit.checkpoint import MANIFEST_NAME, UNFINISHED_NAME, Checkpoint
from reapkit.errors import CheckpointError
from reapkit.shards import Manifest
from reapkit.tensors import read_header, reading
from reapkit.verification import Verification, verify

KEEP = 5
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.block_sparse_moe.experts."
GATE = "model.layers.1.block_sparse_moe.gate.weight"
BIAS = "model.layers.1.block_sparse_moe.e_score_correction_bias"


@pytest.fixture(scope="module")
def fresh(plan_for: PlanFor, m2_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output that was never verified."""
    out = tmp_path_factory.mktemp("fresh") / "out"
    shards.write(*plan_for(m2_fp8, KEEP), out)
    return out


@pytest.fixture
def out(fresh: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(fresh, tmp_path / "out"))


def shard_of(out: Path, name: str) -> Path:
    return out / str(tiny.read_json(out / INDEX)["weight_map"][name])


def rewrite(out: Path, change: Callable[[dict[str, torch.Tensor]], object], name: str) -> Path:
    """Change the tensors of the shard that holds `name`, as some other tool would."""
    shard = shard_of(out, name)
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    return shard


def change_json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    value = tiny.read_json(path)
    change(value)
    tiny.write_json(path, value)


def problems(out: Path) -> tuple[str, ...]:
    """What the first verification of a damaged folder finds; it must not then be recorded as good."""
    result = verify(out)
    assert not result.ok and result.against_source
    assert Manifest.load(out).digests is None
    return result.problems


def found(sentence: str, all_problems: tuple[str, ...]) -> bool:
    return any(sentence in problem for problem in all_problems)


# ---- what is right


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_fresh_output_is_compared_with_its_source_and_later_with_its_digests(
    plan_for: PlanFor, m2_fp8: Path, tmp_path: Path, dequantize: bool
) -> None:
    out = tmp_path / "out"
    shards.write(*plan_for(m2_fp8, KEEP), out, dequantize=dequantize)
    tensors = tiny.load_tensors(out)
    carried = {"config.json", INDEX, *tiny.SIDECARS}
    carried |= {path.name for path in out.glob("*.safetensors")}
    size = sum((out / file).stat().st_size for file in carried)
    assert verify(out) == Verification((), len(tensors), size, against_source=True)
    manifest = Manifest.load(out)
    assert manifest.digests is not None and manifest.digests.keys() == carried
    before = (out / MANIFEST_NAME).read_bytes()
    assert verify(out) == Verification((), len(tensors), size, against_source=False)
    assert verify(out, source=m2_fp8) == Verification((), len(tensors), size, against_source=True)
    assert (out / MANIFEST_NAME).read_bytes() == before


@pytest.mark.parametrize("name", ["m2", "qwen3"])
def test_outputs_of_every_family_verify(
    request: pytest.FixtureRequest, plan_for: PlanFor, tmp_path: Path, name: str
) -> None:
    for keep in (tiny.TOP_K, tiny.NUM_EXPERTS):
        shards.write(*plan_for(request.getfixturevalue(name), keep), tmp_path / str(keep))
        assert verify(tmp_path / str(keep)).ok


def test_later_runs_do_not_need_the_source(plan_for: PlanFor, m2: Path, tmp_path: Path) -> None:
    source = shutil.copytree(m2, tmp_path / "source")
    shards.write(*plan_for(source, KEEP), tmp_path / "out")
    assert verify(tmp_path / "out").ok
    shutil.rmtree(source)
    assert verify(tmp_path / "out").ok


def test_the_card_and_reapkits_own_folder_may_change(out: Path) -> None:
    assert verify(out).ok
    (out / "README.md").write_text("a card")
    (out / "reapkit" / "statistics.safetensors").write_text("sums")
    assert verify(out).ok


def test_progress_counts_every_byte_that_is_read(out: Path) -> None:
    calls: list[tuple[str, float, float, str]] = []
    result = verify(out, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("verifying", result.num_bytes, result.num_bytes, "B")


# ---- what is wrong, found by comparing with the source


@pytest.mark.parametrize(
    "name", [EXPERT + "4.w2.weight", EXPERT + "0.w1.weight_scale_inv", "model.embed_tokens.weight", GATE, BIAS]
)
def test_a_flipped_bit_is_found_in_its_tensor(out: Path, name: str) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].reshape(-1).view(torch.uint8)[-1] ^= 1

    shard = rewrite(out, flip, name)
    (problem,) = problems(out)
    assert problem.startswith(f"{name!r} in {shard.name} ")


def test_a_flipped_bit_in_a_dequantised_tensor_is_found(plan_for: PlanFor, m2_fp8: Path, tmp_path: Path) -> None:
    out, name = tmp_path / "out", EXPERT + "2.w3.weight"
    shards.write(*plan_for(m2_fp8, KEEP), out, dequantize=True)

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(torch.uint8)[0, 0] ^= 1

    shard = rewrite(out, flip, name)
    kept = Manifest.load(out).kept[1][2]
    assert problems(out) == (
        f"{name!r} in {shard.name} is not the dequantised '{EXPERT}{kept}.w3.weight' of the source",
    )


def test_two_experts_that_were_swapped_are_found(out: Path) -> None:
    names = sorted(name for name in tiny.load_tensors(out) if name.startswith((EXPERT + "0.", EXPERT + "3.")))
    everything = tiny.load_tensors(out)
    for shard in {shard_of(out, name) for name in names}:
        tensors = load_file(shard)
        for name in tensors.keys() & set(names):
            other = name.replace(EXPERT + "0.", EXPERT + "X.").replace(EXPERT + "3.", EXPERT + "0.")
            tensors[name] = everything[other.replace(EXPERT + "X.", EXPERT + "3.")].clone()
        save_file(tensors, shard, metadata={"format": "pt"})
    reported = problems(out)
    assert len(reported) == len(names) == 12
    assert all(found(f"{name!r}", reported) for name in names)


@pytest.mark.parametrize("name", [GATE, BIAS])
def test_router_rows_out_of_order_are_found(out: Path, name: str) -> None:
    shard = rewrite(out, lambda tensors: tensors.update({name: tensors[name].flip(0).contiguous()}), name)
    assert problems(out) == (f"{name!r} in {shard.name} is not the kept experts' part of the source's, in their order",)


@pytest.mark.parametrize("name", [EXPERT + "2.w3.weight_scale_inv", "model.layers.0.self_attn.q_proj.weight_scale_inv"])
def test_a_missing_scale_is_found_though_index_and_shard_agree(out: Path, name: str) -> None:
    shard = rewrite(out, lambda tensors: tensors.pop(name), name)

    def forget(index: dict[str, object]) -> None:
        assert isinstance(index["weight_map"], dict)
        del index["weight_map"][name]

    change_json(out / INDEX, forget)
    fix_total_size(out)
    assert found(f"{name!r} is missing: it should come from", problems(out)), shard


def fix_total_size(out: Path) -> None:
    total = sum(tensor.nbytes for tensor in tiny.load_tensors(out).values())
    change_json(out / INDEX, lambda index: index.update(metadata={"total_size": total}))


def test_a_tensor_of_another_dtype_or_shape_is_found(out: Path) -> None:
    name = "model.norm.weight"
    rewrite(out, lambda tensors: tensors.update({name: tensors[name].float()[:-1].clone()}), name)
    assert found(f"{name!r} in {shard_of(out, name).name} is F32 [255] where BF16 [256] is expected", problems(out))


def test_a_wrong_count_in_the_config_is_found(out: Path) -> None:
    change_json(out / "config.json", lambda config: config.update(num_local_experts=KEEP + 1))
    assert found("config.json: num_local_experts is 6 where 5 is expected", problems(out))


def test_a_wrong_count_deep_in_the_config_is_found(plan_for: PlanFor, m2: Path, tmp_path: Path) -> None:
    source = shutil.copytree(m2, tmp_path / "source")
    change_json(source / "config.json", lambda config: config.update(draft={"layers": {"num_experts": 8}}))
    shards.write(*plan_for(source, KEEP), tmp_path / "out")
    assert verify(tmp_path / "out").ok
    change_json(tmp_path / "out" / "config.json", lambda config: config.update(draft={"layers": {"num_experts": 8}}))
    reported = verify(tmp_path / "out", source=source).problems
    assert found("config.json: draft.layers.num_experts is 8 where 5 is expected", reported)


def test_any_other_change_of_the_config_is_found(out: Path) -> None:
    def change(config: dict[str, object]) -> None:
        config["rope_theta"] = 1
        config["surplus"] = None
        del config["scoring_func"]

    change_json(out / "config.json", change)
    reported = problems(out)
    assert found("config.json has 'surplus', which should not be there", reported)
    assert found("config.json lacks 'scoring_func'", reported)


def test_an_orphan_tensor_is_found(out: Path) -> None:
    orphan = EXPERT + "7.w1.weight"
    shard = rewrite(out, lambda tensors: tensors.update({orphan: torch.zeros(2)}), GATE)
    reported = problems(out)
    assert found(f"{shard.name} holds {orphan!r}, which {INDEX} does not place there", reported)
    assert found(f"{orphan!r} in {shard.name} has no counterpart in the source", reported)


def test_a_stale_index_is_found(out: Path, m2_fp8: Path) -> None:
    shutil.copy(m2_fp8 / INDEX, out / INDEX)
    reported = problems(out)
    assert found("the shard model-00000-of-00130.safetensors is missing", reported)
    assert found("is a safetensors file that", reported)


def test_an_index_with_the_sources_total_size_is_found(out: Path) -> None:
    change_json(out / INDEX, lambda index: index.update(metadata={"total_size": 1}))
    assert found(f"{INDEX} gives a total_size of 1 where the tensors take ", problems(out))
    change_json(out / INDEX, lambda index: index.pop("metadata"))
    assert found(f"{INDEX} gives a total_size of None where", problems(out))


def test_an_index_that_is_gone_or_not_json_is_found(out: Path) -> None:
    (out / INDEX).write_text("{")
    assert found(f"{INDEX} is not valid JSON", problems(out))
    (out / INDEX).unlink()
    assert found(f"has neither {INDEX} nor", problems(out))


def test_a_truncated_shard_is_found_and_the_others_are_still_compared(out: Path) -> None:
    shard = shard_of(out, "model.norm.weight")
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 3)
    assert shard_of(out, "model.embed_tokens.weight") != shard

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"].zero_()

    rewrite(out, zero, "model.embed_tokens.weight")
    reported = problems(out)
    assert found(f"{shard.name} is truncated", reported) and len(reported) == 2
    assert found("'model.embed_tokens.weight' in ", reported)
    assert not found("'model.norm.weight' is missing", reported), "one cause, one problem"


def test_a_missing_shard_is_found(out: Path) -> None:
    shard = shard_of(out, GATE)
    shard.unlink()
    assert found(f"the shard {shard.name} is missing", problems(out))


def test_an_extra_safetensors_file_is_found(out: Path) -> None:
    save_file({"x": torch.zeros(1)}, out / "extra.safetensors")
    assert problems(out) == (f"extra.safetensors is a safetensors file that {INDEX} does not name",)


def test_changed_and_missing_sidecars_are_found(out: Path) -> None:
    (out / "tokenizer.json").write_bytes(tiny.SIDECARS["tokenizer.json"] + b" ")
    (out / "assets" / "vocabulary.txt").unlink()
    assert problems(out) == ("assets/vocabulary.txt is missing", "tokenizer.json differs from the source's")


# ---- what is wrong, found by digests


@pytest.mark.parametrize("file", ["config.json", INDEX, "tokenizer.json", "model-00001-of-*"])
def test_any_later_change_of_a_file_is_found_without_the_source(fresh: Path, tmp_path: Path, file: str) -> None:
    out = shutil.copytree(fresh, tmp_path / "out")
    assert verify(out).ok
    (path,) = out.glob(file)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    result = verify(out)
    assert not result.against_source
    assert found(f"{path.name} has changed since it was compared with the source", result.problems)


def test_a_later_loss_of_a_file_is_found_without_the_source(out: Path) -> None:
    assert verify(out).ok
    (out / "LICENSE").unlink()
    assert verify(out).problems == ("LICENSE is missing",)


def test_a_later_orphan_file_is_found_without_the_source(out: Path) -> None:
    assert verify(out).ok
    (out / "consolidated").mkdir()
    save_file({"x": torch.zeros(1)}, out / "consolidated" / "extra.safetensors")
    assert verify(out).problems == (f"consolidated/extra.safetensors is a safetensors file that {INDEX} does not name",)


def test_a_manifest_that_lists_other_experts_is_found(out: Path) -> None:
    def swap(manifest: dict[str, dict[str, list[int]]]) -> None:
        kept = set(manifest["kept"]["1"])
        dropped = next(expert for expert in range(8) if expert not in kept)
        manifest["kept"]["1"] = sorted({*list(kept)[1:], dropped})

    value = json.loads((out / MANIFEST_NAME).read_text())
    swap(value)
    tiny.write_json(out / MANIFEST_NAME, value)
    reported = problems(out)
    assert found(repr(GATE), reported) and found(repr(BIAS), reported) and found(EXPERT, reported)


# ---- several files at once


def flip_last_bits(out: Path) -> list[str]:
    """Damage the end of the last tensor of every shard but the first; how what is found should begin, in order."""
    expected = []
    for shard in sorted(out.glob("*.safetensors"))[1:]:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        expected.append(f"{list(read_header(shard)[0])[-1]!r} in {shard.name} ")
    return expected


@pytest.mark.parametrize("chunk", [1001, 2 << 20])
@pytest.mark.parametrize("at_once", [1, 8])
def test_what_is_found_depends_neither_on_how_many_files_are_read_at_once_nor_on_the_pieces(
    out: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, chunk: int
) -> None:
    monkeypatch.setattr(verification, "_FILES_AT_ONCE", at_once)
    monkeypatch.setattr(verification, "_CHUNK_BYTES", chunk)
    whole = out.with_name("whole")
    shutil.copytree(out, whole)
    expected = flip_last_bits(out)
    calls: list[tuple[str, float, float, str]] = []
    result = verify(out, progress=lambda *call: calls.append(call))
    assert len(expected) > 2
    assert [problem.startswith(start) for problem, start in zip(result.problems, expected, strict=True)] == [
        True
    ] * len(expected)
    done = [call[1] for call in calls]
    assert done == sorted(done) and calls[-1] == ("verifying", result.num_bytes, result.num_bytes, "B")
    assert verify(whole).ok
    digests = Manifest.load(whole).digests
    assert digests == {name: hashlib.sha256((whole / name).read_bytes()).hexdigest() for name in sorted(digests or ())}


class Watched:
    """Stands in for how a folder's shards are read, so that a test decides when and how."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[str], object]) -> None:
        read = sources.read_file

        def read_file(path: Path, start: int, view: memoryview, *, file: str, inside: str = "") -> None:
            # Headers and fingerprints are read by the main thread, before.
            if threading.current_thread() is not threading.main_thread():
                before(file)
            read(path, start, view, file=file, inside=inside)

        monkeypatch.setattr(sources, "read_file", read_file)


def test_several_files_are_read_at_once(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_two = sorted(out.glob("*.safetensors"))[:2]
    together, seen = threading.Barrier(2, timeout=20), set[str]()

    def meet(file: str) -> None:
        if file not in seen and len(seen) < 2:
            seen.add(file)
            together.wait()  # one thread alone would wait for itself

    Watched(monkeypatch, meet)
    assert verify(out).ok and len(seen) == len(first_two)


@pytest.mark.parametrize("at_once", [1, 8])
def test_of_several_files_that_cannot_be_read_the_first_is_named(
    out: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(verification, "_FILES_AT_ONCE", at_once)
    order = sorted(set(tiny.read_json(out / INDEX)["weight_map"].values()))
    failed = threading.Event()

    def fail(file: str) -> None:
        with reading(file):
            if file == of_source[1]:
                failed.wait(20 if at_once > 1 else 0)  # it fails last
                raise OSError(errno.EIO, "Input/output error")
            if file == of_source[2]:
                failed.set()
                raise OSError(errno.EIO, "Input/output error")

    header_of = Checkpoint.open(Manifest.load(out).source.origin).tensors
    of_source = [header_of[next(iter(read_header(out / file)[0]))].file for file in order[:3]]
    assert of_source == sorted(set(of_source))
    Watched(monkeypatch, fail)
    refuse(out, f"{of_source[1]} cannot be read: Input/output error")
    assert failed.is_set() == (at_once > 1)


def test_an_interrupt_ends_all_files_and_nothing_is_recorded(
    out: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # Where the tests themselves run in the background, interrupts are ignored.
    request.addfinalizer(
        partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
    )
    monkeypatch.setattr(verification, "_CHUNK_BYTES", 512)
    before = (out / MANIFEST_NAME).read_bytes()
    calls: list[float] = []

    def interrupt(task: str, done: float, total: float, unit: str) -> None:
        calls.append(done / total)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.002)

    with pytest.raises(KeyboardInterrupt):
        verify(out, progress=interrupt)
    assert len(calls) >= 20 and calls[-1] < 0.5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reapkit-verify")]
    assert (out / MANIFEST_NAME).read_bytes() == before


def test_one_tensor_at_a_time_is_computed(
    plan_for: PlanFor, m2_fp8: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(out)
    shards.write(*plan_for(m2_fp8, KEEP), out, dequantize=True)
    running, most, decode = 0, 0, formats.decode
    counting = threading.Lock()

    def counted(*arguments: object, **options: object) -> torch.Tensor:
        nonlocal running, most
        with counting:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with counting:
            running -= 1
        return decode(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(formats, "decode", counted)
    assert verify(out).ok and most == 1


# ---- what cannot be verified


def refuse(out: Path, sentence: str, source: Path | None = None) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        verify(out, source=source)
    assert sentence in caught.value.message
    return caught.value


def test_an_output_whose_source_is_gone_before_the_first_verification_says_so(
    plan_for: PlanFor, m2: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(m2, tmp_path / "source")
    shards.write(*plan_for(source, KEEP), tmp_path / "out")
    source.rename(tmp_path / "moved")
    error = refuse(
        tmp_path / "out", "was not yet compared with its source, and that cannot be opened: there is no folder"
    )
    assert error.hint == "say where the source is with --source"
    assert verify(tmp_path / "out", source=tmp_path / "moved").ok


def test_another_checkpoint_is_not_taken_for_the_source(out: Path, m2: Path, m2_fp8: Path, tmp_path: Path) -> None:
    refuse(out, "is not the checkpoint that", m2)
    copy = shutil.copytree(m2_fp8, tmp_path / "copy")
    rewrite(copy, lambda tensors: tensors[GATE].neg_(), GATE)
    error = refuse(out, "it has other routers", copy)
    assert error.hint == f"it was made from {m2_fp8}"


def test_a_damaged_source_is_named(out: Path, m2_fp8: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(m2_fp8, tmp_path / "copy")
    shard = shard_of(copy, GATE)
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 1)
    refuse(out, f"{shard.name} is truncated", copy)


def test_a_folder_that_reapkit_did_not_write_is_refused(m2: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "absent", "there is no folder")
    refuse(m2, f"{m2} has no reapkit.json, so it is not an output of reapkit")


def test_an_unfinished_output_is_refused(out: Path) -> None:
    (out / UNFINISHED_NAME).write_text("{}")
    refuse(out, "is the unfinished output of an interrupted run")


def test_a_damaged_manifest_is_refused(out: Path) -> None:
    whole = tiny.read_json(out / MANIFEST_NAME)
    tiny.write_json(out / MANIFEST_NAME, {**whole, "format": "other"})
    refuse(out, "is not in the format reapkit-manifest-1")
    for key in whole.keys() - {"format", "digests"}:
        tiny.write_json(out / MANIFEST_NAME, {name: value for name, value in whole.items() if name != key})
        refuse(out, "reapkit.json in ")
    tiny.write_json(out / MANIFEST_NAME, {**whole, "surplus": 1})
    refuse(out, "is damaged: ValueError the entry 'surplus' is unknown")
    (out / MANIFEST_NAME).write_text("[]")
    refuse(out, "reapkit.json holds a JSON list")


def test_a_manifest_that_contradicts_itself_is_refused(out: Path) -> None:
    whole = tiny.read_json(out / MANIFEST_NAME)
    tiny.write_json(out / MANIFEST_NAME, {**whole, "kept": {**whole["kept"], "1": [0, 1, 1, 2, 3]}})
    refuse(out, "the manifest lists 4 kept experts in layer 1, where it says 5")
    del whole["kept"]["1"]
    tiny.write_json(out / MANIFEST_NAME, whole)
    refuse(out, "the manifest lists the kept experts of 2 layers, the source has 3")


# ---- anywhere at all


def corrupt(out: Path, kind: str, choose: random.Random) -> None:
    """Damage an output in one place that the generator chooses."""
    weight_map: dict[str, str] = tiny.read_json(out / INDEX)["weight_map"]
    names = sorted(weight_map)
    layer = choose.randrange(tiny.NUM_LAYERS)
    block = f"model.layers.{layer}.block_sparse_moe."
    if kind == "a flipped bit":
        name = choose.choice(names)
        header, _ = read_header(out / weight_map[name])
        at = choose.randrange(header[name].start, header[name].stop)
        content = bytearray((out / weight_map[name]).read_bytes())
        content[at] ^= 1 << choose.randrange(8)
        (out / weight_map[name]).write_bytes(content)
    elif kind == "swapped experts":
        one, other = (f"{block}experts.{expert}." for expert in choose.sample(range(KEEP), 2))
        everything = tiny.load_tensors(out)
        for shard in {file for name, file in weight_map.items() if name.startswith((one, other))}:
            tensors = load_file(out / shard)
            for name in [name for name in tensors if name.startswith((one, other))]:
                twin = name.replace(one, other) if name.startswith(one) else name.replace(other, one)
                tensors[name] = everything[twin].clone()
            save_file(tensors, out / shard, metadata={"format": "pt"})
    elif kind == "router rows out of order":
        name = block + choose.choice(("gate.weight", "e_score_correction_bias"))
        rows = list(range(KEEP))
        one, other = choose.sample(rows, 2)
        rows[one], rows[other] = rows[other], rows[one]
        rewrite(out, lambda tensors: tensors.update({name: tensors[name][rows].clone()}), name)
    elif kind == "a missing scale":
        name = choose.choice([name for name in names if name.endswith("_scale_inv")])
        rewrite(out, lambda tensors: tensors.pop(name), name)
        change_json(out / INDEX, lambda index: index["weight_map"].pop(name))  # type: ignore[attr-defined]
        fix_total_size(out)
    elif kind == "a wrong count":
        change_json(out / "config.json", lambda config: config.update(num_local_experts=choose.choice((4, 6, 8))))
    elif kind == "an orphan tensor":
        name = f"{block}experts.{choose.randrange(KEEP, 8)}.w1.weight"
        rewrite(out, lambda tensors: tensors.update({name: torch.zeros(2)}), choose.choice(names))
    elif kind == "a stale index":
        one, other = choose.sample(sorted(set(weight_map.values())), 2)
        moved = choose.choice([name for name in names if weight_map[name] == one])
        change_json(out / INDEX, lambda index: index["weight_map"].update({moved: other}))  # type: ignore[attr-defined]
    else:
        shard = out / choose.choice(sorted(set(weight_map.values())))
        with shard.open("r+b") as stream:
            stream.truncate(choose.randrange(shard.stat().st_size))


KINDS = (
    "a flipped bit", "swapped experts", "router rows out of order", "a missing scale", "a wrong count", "an orphan tensor",
    "a stale index", "a truncated shard",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_seeded_corruptions_are_all_caught(fresh: Path, tmp_path: Path, kind: str) -> None:
    """13 of each kind, 104 in all."""
    for seed in range(13):
        out = Path(shutil.copytree(fresh, tmp_path / f"{seed}"))
        corrupt(out, kind, random.Random(f"{kind} {seed}"))
        assert not verify(out).ok, (kind, seed)
        shutil.rmtree(out)
