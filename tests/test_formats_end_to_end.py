"""Every on-disk format through observing, pruning and dequantising, on one family."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import quantized
import tiny
from reapkit import observe, plans, prune, verify
from reapkit.checkpoint import Checkpoint
from reapkit.errors import UnsupportedError
from reapkit.observation import Run
from reapkit.plans import PruningPlan
from reapkit.quantization import read_format
from streaming import streamed_logits, streamed_model, text_rows, token_batches, write_jsonl

RUN = Run(device="cpu", dtype="bfloat16")


@pytest.fixture(scope="module", params=sorted(quantized.SCHEMES))
def stored(request: pytest.FixtureRequest, qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / request.param
    return tiny.add_tokenizer(quantized.make(qwen3, folder, request.param))


@pytest.fixture(scope="module")
def sibling(stored: Path) -> Path:
    """The same model in bf16: all experts kept, values written out."""
    out = stored.parent / "bf16"
    prune(stored, plans.plan(stored, criterion="random", keep=tiny.NUM_EXPERTS), out, dequantize=True)
    return out


@pytest.fixture(scope="module")
def plan(stored: Path) -> PruningPlan:
    return plans.plan(stored, criterion="random", ratio=0.25, seed=2)


def logits(folder: Path) -> list[torch.Tensor]:
    return streamed_logits(streamed_model(folder, dtype=torch.bfloat16), token_batches())


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_what_is_computed_with_is_what_dequantising_writes(stored: Path, sibling: Path) -> None:
    form = read_format(Checkpoint.open(sibling))
    assert not form.quantized
    assert verify(sibling).ok
    assert all(torch.equal(one, other) for one, other in zip(logits(stored), logits(sibling), strict=True))


def test_observing_a_format_gives_the_sums_of_its_bf16_sibling(stored: Path, sibling: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", text_rows(6))
    ours, theirs = (observe(folder, [text], run=RUN, max_length=64) for folder in (stored, sibling))
    assert ours.source.routing == theirs.source.routing and ours.source.layout != theirs.source.layout
    for layer, sums in theirs.layers.items():
        assert (ours.layers[layer].gated_norm_SE == sums.gated_norm_SE).all() and sums.gated_norm_SE.any()


def test_pruning_moves_bytes_with_all_that_belongs_to_an_expert(
    stored: Path, sibling: Path, plan: PruningPlan, tmp_path: Path
) -> None:
    manifest = prune(stored, plan, tmp_path / "out")
    before, after = tiny.load_tensors(stored), tiny.load_tensors(tmp_path / "out")
    for layer, kept in plan.kept.items():
        prefix = f"model.layers.{layer}.mlp.experts."
        for rank, expert in enumerate(kept):
            parts = {
                name.removeprefix(f"{prefix}{expert}.") for name in before if name.startswith(f"{prefix}{expert}.")
            }
            assert parts == {
                name.removeprefix(f"{prefix}{rank}.") for name in after if name.startswith(f"{prefix}{rank}.")
            }
            for part in parts:
                one, other = before[f"{prefix}{expert}.{part}"], after[f"{prefix}{rank}.{part}"]
                assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))
    assert verify(tmp_path / "out").ok
    assert manifest.before.parameters == sum(tensor.numel() for tensor in tiny.load_tensors(sibling).values())


def test_pruned_values_are_those_of_the_pruned_sibling(
    stored: Path, sibling: Path, plan: PruningPlan, tmp_path: Path
) -> None:
    """A plan made from the one format prunes the other, and both ways to the same values agree to the bit."""
    prune(stored, plan, tmp_path / "quantised")
    prune(stored, plan, tmp_path / "dequantised", dequantize=True)
    manifest = prune(sibling, plan, tmp_path / "sibling")
    assert manifest.observed_layout != manifest.source.layout
    assert verify(tmp_path / "dequantised").ok and verify(tmp_path / "sibling").ok
    ours, theirs = tiny.load_tensors(tmp_path / "dequantised"), tiny.load_tensors(tmp_path / "sibling")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert all(
        torch.equal(one, other)
        for one, other in zip(logits(tmp_path / "quantised"), logits(tmp_path / "sibling"), strict=True)
    )


def test_a_format_that_is_only_sliced_is_refused_by_observe_and_names_what_can_observe_it(
    qwen3: Path, tmp_path: Path
) -> None:
    folder = tiny.add_tokenizer(Path(shutil.copytree(qwen3, tmp_path / "odd")))
    config = tiny.read_json(folder / "config.json") | {"quantization_config": {"quant_method": "bitsandbytes"}}
    tiny.write_json(folder / "config.json", config)
    text = write_jsonl(tmp_path / "text.jsonl", text_rows(2))
    with pytest.raises(UnsupportedError, match="bitsandbytes") as caught:
        observe(folder, [text], run=RUN, max_length=64)
    assert "sibling" in str(caught.value.hint)
    plan = plans.plan(tiny.add_tokenizer(Path(shutil.copytree(qwen3, tmp_path / "plain"))), criterion="random", keep=6)
    manifest = prune(folder, plan, tmp_path / "out")
    assert manifest.after.num_experts == 6 and verify(tmp_path / "out").ok


def test_an_expert_that_is_stored_plainly_among_packed_ones_is_pruned_like_them(qwen3: Path, tmp_path: Path) -> None:
    mixed = quantized.make(qwen3, tmp_path / "int4", "int4", wanted=r".*\.experts\.[0-24-7]\..*")
    names = tiny.load_tensors(mixed).keys()
    assert {name.rpartition(".")[2] for name in names if ".experts.3." in name} == {"weight"}
    assert {name.rpartition(".")[2] for name in names if ".experts.4." in name} > {"weight_packed", "weight_scale"}
    prune(mixed, plans.plan(mixed, criterion="random", keep=6), tmp_path / "out")
    assert verify(tmp_path / "out").ok
    assert all(part.isfinite().all() for part in logits(tmp_path / "out"))
