"""Pruning: the source's bytes, fewer of them, in a folder that never looks finished before it is."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

import tiny
from conftest import PlanFor, open_with_plan
from reapkit import edits, pagecache, shards
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import UNFINISHED_NAME, Checkpoint
from reapkit.edits import OutputTensor, Take
from reapkit.errors import CheckpointError, OutputError, PlanError, UnsupportedError, UsageError
from reapkit.layout import MoELayout, StackedTensor, resolve
from reapkit.pagecache import Direct, Readers
from reapkit.plans import PruningPlan
from reapkit.shards import Manifest
from reapkit.tensors import TensorInfo
from reapkit.verification import verify
from streaming import with_tensors

KEEP = 5


@pytest.fixture(scope="module")
def pruned(
    plan_for: PlanFor, m2: Path, m2_fp8: Path, qwen3: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Finished outputs by the name of their source."""
    result = {}
    for folder in (m2, m2_fp8, qwen3):
        result[folder.name] = tmp_path_factory.mktemp("pruned") / folder.name
        shards.write(*plan_for(folder, KEEP), result[folder.name])
    return result


every_source = pytest.mark.parametrize("name", ["m2", "m2_fp8", "qwen3"])


def source_of(request: pytest.FixtureRequest, name: str) -> Path:
    folder = request.getfixturevalue(name)
    assert isinstance(folder, Path)
    return folder


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def slice_in_memory(folder: Path, layout: MoELayout, plan: PruningPlan) -> dict[str, torch.Tensor]:
    """The pruned tensors by another way: all of them loaded, and names taken apart at their dots."""
    result = {}
    for name, tensor in tiny.load_tensors(folder).items():
        parts = name.split(".")
        kept = plan.kept.get(int(parts[2])) if parts[1] == "layers" else None
        if kept and "experts" in parts:
            at = parts.index("experts") + 1
            if int(parts[at]) in kept:
                parts[at] = str(kept.index(int(parts[at])))
                result[".".join(parts)] = tensor
        elif kept and (parts[-2] == "gate" or parts[-1] == "e_score_correction_bias"):
            result[name] = tensor[list(kept)]
        else:
            result[name] = tensor
    return result


@every_source
def test_keeping_all_experts_leaves_every_tensor_byte_identical(
    request: pytest.FixtureRequest, plan_for: PlanFor, tmp_path: Path, name: str
) -> None:
    folder = source_of(request, name)
    shards.write(*plan_for(folder, tiny.NUM_EXPERTS), tmp_path / "out")
    before, after = tiny.load_tensors(folder), tiny.load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert raw(after[key]) == raw(tensor) and after[key].dtype == tensor.dtype and after[key].shape == tensor.shape
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@every_source
def test_the_output_equals_the_source_sliced_in_memory(
    request: pytest.FixtureRequest, plan_for: PlanFor, pruned: dict[str, Path], name: str
) -> None:
    folder = source_of(request, name)
    _, layout, plan = plan_for(folder, KEEP)
    expected, found = slice_in_memory(folder, layout, plan), tiny.load_tensors(pruned[folder.name])
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert raw(found[key]) == raw(tensor) and found[key].dtype == tensor.dtype and found[key].shape == tensor.shape


def test_experts_are_numbered_anew_in_their_original_order_and_routers_follow(
    plan_for: PlanFor, m2: Path, pruned: dict[str, Path]
) -> None:
    _, _, plan = plan_for(m2, KEEP)
    before, after = tiny.load_tensors(m2), tiny.load_tensors(pruned["m2"])
    for layer, kept in plan.kept.items():
        assert list(kept) == sorted(kept) and len(kept) == KEEP
        block = f"model.layers.{layer}.block_sparse_moe."
        for new, old in enumerate(kept):
            assert torch.equal(after[f"{block}experts.{new}.w2.weight"], before[f"{block}experts.{old}.w2.weight"])
            assert torch.equal(after[f"{block}gate.weight"][new], before[f"{block}gate.weight"][old])
            bias = f"{block}e_score_correction_bias"
            assert after[bias][new] == before[bias][old] != 0


@every_source
def test_the_config_changes_in_the_expert_count_alone(
    request: pytest.FixtureRequest, pruned: dict[str, Path], name: str
) -> None:
    folder = source_of(request, name)
    before = (folder / "config.json").read_text().splitlines()
    after = (pruned[folder.name] / "config.json").read_text().splitlines()
    changed = [(one.strip(), other.strip()) for one, other in zip(before, after, strict=True) if one != other]
    assert len(changed) == 1
    key = changed[0][0].split(":")[0]
    assert changed[0] in [(f"{key}: 8,", f"{key}: 5,"), (f"{key}: 8", f"{key}: 5")]


@every_source
def test_the_index_names_every_tensor_and_file_and_gives_the_true_size(
    request: pytest.FixtureRequest, pruned: dict[str, Path], name: str
) -> None:
    out = pruned[source_of(request, name).name]
    index = tiny.read_json(out / "model.safetensors.index.json")
    files = sorted(path.name for path in out.rglob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    held = {}
    for file in files:
        with safe_open(out / file, framework="pt") as stream:
            assert stream.metadata() == {"format": "pt"}
            held.update(dict.fromkeys(stream.keys(), file))
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tiny.load_tensors(out).values())


def test_experts_of_one_layer_lie_in_several_shards(m2: Path) -> None:
    index = tiny.read_json(m2 / "model.safetensors.index.json")["weight_map"]
    assert len({file for name, file in index.items() if "layers.1.block_sparse_moe.experts" in name}) > 2


@every_source
def test_sidecars_are_carried_byte_for_byte_and_nothing_else_is(
    request: pytest.FixtureRequest, pruned: dict[str, Path], name: str
) -> None:
    out = pruned[source_of(request, name).name]
    found = contents(out)
    for file, content in tiny.SIDECARS.items():
        assert found.pop(file) == content
    own = {"README.md", "config.json", "model.safetensors.index.json", "reapkit.json", "reapkit/plan.json"}
    assert {file for file in found if not file.startswith("model-")} == own


def test_the_manifest_records_source_choice_and_sizes(plan_for: PlanFor, m2: Path, pruned: dict[str, Path]) -> None:
    checkpoint, layout, plan = plan_for(m2, KEEP)
    manifest = Manifest.load(pruned["m2"])
    assert manifest.source == plan.source
    assert manifest.kept == plan.kept
    assert (manifest.criterion, manifest.seed, manifest.dequantized) == ("random", 5, False)
    assert manifest.routers == layout.router_names
    assert manifest.before == shards.Size(8, sum(t.numel() for t in tiny.load_tensors(m2).values()), checkpoint.nbytes)
    after = tiny.load_tensors(pruned["m2"])
    assert manifest.after == shards.Size(
        KEEP, sum(t.numel() for t in after.values()), sum(t.nbytes for t in after.values())
    )
    assert PruningPlan.load(pruned["m2"] / "reapkit" / "plan.json") == plan
    assert '"0": [' in (pruned["m2"] / "reapkit.json").read_text(), "a layer's experts stand on one line"


def test_block_scales_are_bytes_and_no_parameters(m2_fp8: Path, pruned: dict[str, Path]) -> None:
    weights = [tensor for name, tensor in tiny.load_tensors(m2_fp8).items() if not name.endswith("_scale_inv")]
    assert Manifest.load(pruned["m2-fp8"]).before.parameters == sum(tensor.numel() for tensor in weights)


def test_the_same_command_writes_the_same_bytes(
    plan_for: PlanFor, m2: Path, pruned: dict[str, Path], tmp_path: Path
) -> None:
    shards.write(*plan_for(m2, KEEP), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(pruned["m2"])


# ---- what transformers makes of it


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        result = model(tokens).logits
    assert isinstance(result, torch.Tensor)
    return result


def mask_m2(model: Any, plan: PruningPlan) -> None:
    for layer in plan.kept:
        model.model.layers[layer].mlp.e_score_correction_bias[list(plan.dropped(layer))] = -1e9


def mask_qwen3(model: Any, plan: PruningPlan) -> None:
    def mask(layer: int) -> Callable[..., Any]:
        def hook(router: Any, inputs: Any, output: Any) -> Any:
            scores = output[0].clone()
            scores[:, list(plan.dropped(layer))] = -torch.inf
            weights, chosen = scores.float().softmax(-1).topk(router.top_k)
            return scores, weights / weights.sum(-1, keepdim=True), chosen

        return hook

    for layer in plan.kept:
        model.model.layers[layer].mlp.gate.register_forward_hook(mask(layer))


@pytest.mark.parametrize(("name", "mask"), [("m2", mask_m2), ("qwen3", mask_qwen3)])
def test_the_pruned_model_computes_what_the_original_does_with_its_router_masked(
    request: pytest.FixtureRequest, plan_for: PlanFor, pruned: dict[str, Path], name: str, mask: Callable[..., None]
) -> None:
    folder = source_of(request, name)
    original = load(folder)
    unmasked = logits(original)
    mask(original, plan_for(folder, KEEP)[2])
    expected, found = logits(original), logits(load(pruned[folder.name]))
    assert (unmasked - expected).abs().max() > 0.1, "the mask must matter"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_pruned_fp8_model_loads_with_no_missing_or_unexpected_key(pruned: dict[str, Path]) -> None:
    assert load(pruned["m2-fp8"], torch.bfloat16).config.num_local_experts == KEEP


# ---- dequantising


@pytest.fixture(scope="module")
def dequantized(plan_for: PlanFor, m2_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "bf16"
    shards.write(*plan_for(m2_fp8, KEEP), out, dequantize=True)
    return out


def test_dequantised_weights_equal_transformers_own_bit_for_bit(
    plan_for: PlanFor, m2_fp8: Path, dequantized: Path
) -> None:
    plan = plan_for(m2_fp8, KEEP)[2]
    original, pruned = load(m2_fp8, torch.bfloat16), load(dequantized, torch.bfloat16)
    compared = 0
    found = pruned.state_dict()
    for name, tensor in original.state_dict().items():
        parts = name.split(".")
        if "mlp" in parts:
            tensor = tensor[list(plan.kept[int(parts[2])])]
            compared += tensor.shape[0] * ("experts" in parts)
        # Loading bf16, transformers rounds the router too; what is on the disk is F32, as the next test says.
        assert raw(found[name]) == raw(tensor.to(torch.bfloat16)), name
    assert compared == 2 * KEEP * tiny.NUM_LAYERS


def test_dequantised_weights_are_bf16_and_router_and_bias_stay_f32(m2_fp8: Path, dequantized: Path) -> None:
    before, after = tiny.load_tensors(m2_fp8), tiny.load_tensors(dequantized)
    assert not any(name.endswith("_scale_inv") for name in after)
    for name, tensor in after.items():
        router = name.endswith(("gate.weight", "e_score_correction_bias"))
        assert tensor.dtype == (torch.float32 if router else torch.bfloat16), name
    weight = "model.layers.2.self_attn.q_proj.weight"
    assert after[weight].shape == before[weight].shape
    config = tiny.read_json(dequantized / "config.json")
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert {**config, "num_local_experts": 8} == {
        key: value for key, value in tiny.read_json(m2_fp8 / "config.json").items() if key != "quantization_config"
    }


def test_a_weight_is_dequantised_in_its_own_shard_though_its_scale_lies_in_another(
    m2_fp8: Path, plan_for: PlanFor
) -> None:
    checkpoint, layout, plan = plan_for(m2_fp8, tiny.NUM_EXPERTS)
    apart = [
        name
        for name, info in checkpoint.tensors.items()
        if (scale := checkpoint.tensors.get(name + "_scale_inv")) and scale.file != info.file
    ]
    assert apart, "the fixture parts some weight from its scale"
    plain = edits.outputs(checkpoint, layout, plan)
    for number, tensors in enumerate(edits.outputs(checkpoint, layout, plan, dequantize=True).values()):
        assert {tensor.info.file for tensor in tensors} == {list(plain.values())[number][0].info.file}


def test_dequantising_what_is_not_quantised_is_a_usage_error(plan_for: PlanFor, m2: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not quantised, so there is nothing to dequantise") as caught:
        shards.write(*plan_for(m2, KEEP), tmp_path / "out", dequantize=True)
    assert caught.value.hint == "leave out --dequantize"
    assert not (tmp_path / "out").exists()


def test_dequantising_without_a_scale_names_the_weight(plan_for: PlanFor, m2_fp8: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(m2_fp8, tmp_path / "copy")
    index = tiny.read_json(copy / "model.safetensors.index.json")
    del index["weight_map"]["model.layers.0.self_attn.q_proj.weight_scale_inv"]
    tiny.write_json(copy / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=r"'model.layers.0.self_attn.q_proj.weight' is F8_E4M3 and has no"):
        shards.write(*plan_for(copy, KEEP), tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out").exists()


# ---- the config, where it is not the common case

SIX = dict.fromkeys(range(3), tuple(range(6)))


def with_config(folder: Path, config: dict[str, Any]) -> Checkpoint:
    return replace(Checkpoint.open(folder), config=config)


def test_every_alias_of_the_count_changes_at_every_depth_and_nothing_that_only_looks_like_it(m2: Path) -> None:
    layout = resolve(Checkpoint.open(m2), ARCHITECTURES)
    config = {
        "num_local_experts": 8,
        "num_experts": 8,
        "num_experts_per_tok": 8,
        "text_config": {"num_local_experts": 8, "hidden": 8, "blocks": [{"num_experts": 8}, 8]},
        "vision_config": {"num_experts": 8},
        "flag": True,
        "eps": 1e-6,
    }
    assert edits.edit_config(with_config(m2, config), layout, SIX) == {
        "num_local_experts": 6,
        "num_experts": 6,
        "num_experts_per_tok": 8,
        "text_config": {"num_local_experts": 6, "hidden": 8, "blocks": [{"num_experts": 6}, 8]},
        "vision_config": {"num_experts": 8},
        "flag": True,
        "eps": 1e-6,
    }


def test_dequantising_removes_quantisation_at_every_depth_and_sets_the_dtype_key_that_is_there(m2: Path) -> None:
    layout = resolve(Checkpoint.open(m2), ARCHITECTURES)
    config = {"torch_dtype": "float8", "quantization_config": {}, "text_config": {"quantization_config": {}, "a": 1}}
    assert edits.edit_config(with_config(m2, config), layout, SIX, dequantize=True) == {
        "torch_dtype": "bfloat16",
        "text_config": {"a": 1},
    }
    assert edits.edit_config(with_config(m2, {"a": 1}), layout, SIX, dequantize=True) == {"a": 1}
    config = {"text_config": {"dtype": "float8"}, "vision_config": {"dtype": "float16"}}
    expected = {"text_config": {"dtype": "bfloat16"}, "vision_config": {"dtype": "float16"}}
    assert edits.edit_config(with_config(m2, config), layout, SIX, dequantize=True) == expected


def test_the_config_keeps_its_own_formatting(m2: Path, tmp_path: Path, plan_for: PlanFor) -> None:
    copy = shutil.copytree(m2, tmp_path / "copy")
    text = (
        '{"b": 1e-06,\t"num_local_experts" :8,  "\\u00e9":[ ], '
        + (copy / "config.json")
        .read_text()
        .lstrip()
        .replace('"num_local_experts": 8,', '"rope_theta_": 5000000.0,')[1:]
    )
    (copy / "config.json").write_text(text)
    shards.write(*plan_for(copy, KEEP), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == text.replace(
        '"num_local_experts" :8', '"num_local_experts" :5'
    )


# ---- names of single experts, where a quantiser lists them


def test_lists_of_modules_follow_their_experts(m2: Path) -> None:
    layout = resolve(Checkpoint.open(m2), ARCHITECTURES)
    kept = {0: (0, 2, 3, 5, 6, 7), 1: (0, 1, 2, 3, 4, 5), 2: (2, 3, 4, 5, 6, 7)}
    block = "model.layers.{}.block_sparse_moe.experts.{}"
    quantization = {
        "quant_method": "compressed-tensors",
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*\\.experts\\.\\d+\\.w1",
            block.format(0, 1),
            block.format(0, 5) + ".w2",
            "language_model." + block.format(2, 7) + ".w1",
            "re:.*layers\\.2\\..*experts\\.(2|1)\\.w3",
            "re:.*layers\\.1\\.(self_attn\\.[qk]|.*experts\\.0\\.w1)",
            "vision.layers.7.experts.3.w1",
        ],
        "config_groups": {"group_0": {"targets": ["Linear", block.format(1, 5) + ".w1"], "weights": {"num_bits": 4}}},
        "dynamic": {"-:.*experts\\.3\\.w1$": {}, "+:.*": {"bits": 8}, "-:.*lm_head": {}},
        "exclude_modules": ["*experts.7*", "model.layers.0*"],
        "modules_to_not_convert": ["experts.6.w2", "*.1.*experts.[23].w3"],
    }
    config = {
        "num_local_experts": 8,
        "quantization_config": quantization,
        "text_config": {"quantization_config": quantization},
    }
    edited = edits.edit_config(with_config(m2, config), layout, kept)
    assert edited["text_config"]["quantization_config"] == edited["quantization_config"]
    assert edited["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*\\.experts\\.\\d+\\.w1",
            block.format(0, 3) + ".w2",
            "language_model." + block.format(2, 5) + ".w1",
            block.format(2, 0) + ".w3",
            *(f"model.layers.1.self_attn.{part}" for part in ("k_norm", "k_proj", "q_norm", "q_proj")),
            block.format(1, 0) + ".w1",
            "vision.layers.7.experts.3.w1",
        ],
        "config_groups": {"group_0": {"targets": ["Linear", block.format(1, 5) + ".w1"], "weights": {"num_bits": 4}}},
        "dynamic": {
            f"-:^{re.escape(block.format(0, 2) + '.w1')}$": {},
            f"-:^{re.escape(block.format(1, 3) + '.w1')}$": {},
            f"-:^{re.escape(block.format(2, 1) + '.w1')}$": {},
            "+:.*": {"bits": 8},
            "-:.*lm_head": {},
        },
        "exclude_modules": [
            *(block.format(0, 5) + part for part in (".w1", ".w2", ".w3")),
            *(block.format(2, 5) + part for part in (".w1", ".w2", ".w3")),
            "model.layers.0*",
        ],
        "modules_to_not_convert": [
            block.format(0, 4) + ".w2",
            block.format(2, 4) + ".w2",
            block.format(1, 2) + ".w3",
            block.format(1, 3) + ".w3",
        ],
    }


def test_a_pattern_that_is_none_is_named(m2: Path) -> None:
    layout = resolve(Checkpoint.open(m2), ARCHITECTURES)
    with pytest.raises(CheckpointError, match=r"the quantisation has the pattern '\(', which is none"):
        edits.edit_config(with_config(m2, {"quantization_config": {"ignore": ["re:("]}}), layout, SIX)


def test_the_quantisers_own_file_follows_too_and_verify_holds_it_to_that(
    m2_fp8: Path, plan_for: PlanFor, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(m2_fp8, tmp_path / "source"))
    _, _, plan = plan_for(source, KEEP)
    stale, stays = sorted(set(range(8)) - set(plan.kept[1]))[0], plan.kept[1][-1]
    name = "model.layers.1.block_sparse_moe.experts.{}.w1"
    listed = {"quantization": {"exclude_modules": ["lm_head", name.format(stale), name.format(stays)]}}
    tiny.write_json(source / "hf_quant_config.json", listed)
    shards.write(*plan_for(source, KEEP), tmp_path / "out")
    assert tiny.read_json(tmp_path / "out/hf_quant_config.json") == {
        "quantization": {"exclude_modules": ["lm_head", name.format(KEEP - 1)]}
    }
    assert verify(tmp_path / "out").ok
    tiny.write_json(tmp_path / "out/hf_quant_config.json", listed)
    problems = verify(tmp_path / "out", source=source).problems
    assert "hf_quant_config.json does not follow from the source's" in problems
    shards.write(*plan_for(source, KEEP), tmp_path / "bf16", dequantize=True)
    assert not (tmp_path / "bf16/hf_quant_config.json").exists()
    assert verify(tmp_path / "bf16").ok


def test_a_kept_expert_without_its_scale_stops_the_run_unless_it_is_allowed(
    m2_fp8: Path, plan_for: PlanFor, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(m2_fp8, tmp_path / "source"))
    _, _, plan = plan_for(source, KEEP)
    dropped = sorted(set(range(8)) - set(plan.kept[1]))[0]
    index = tiny.read_json(source / "model.safetensors.index.json")
    scale = "model.layers.1.block_sparse_moe.experts.{}.w3.weight_scale_inv"
    del index["weight_map"][scale.format(dropped)]
    tiny.write_json(source / "model.safetensors.index.json", index)
    shards.write(*plan_for(source, KEEP), tmp_path / "of-a-dropped-expert")
    del index["weight_map"][scale.format(plan.kept[1][2])]
    tiny.write_json(source / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError) as caught:
        shards.write(*plan_for(source, KEEP), tmp_path / "out")
    assert caught.value.message == (
        f"1 kept experts lack scales that other experts have: layer 1, expert {plan.kept[1][2]}: w3.weight_scale_inv"
    )
    assert "--allow-missing-scales" in str(caught.value.hint)
    shards.write(*plan_for(source, KEEP), tmp_path / "out", allow_missing_scales=True)
    assert scale.format(2) not in tiny.load_tensors(tmp_path / "out")
    assert verify(tmp_path / "out").ok


def test_a_quantised_router_is_refused_unless_it_is_dequantised(
    m2_fp8: Path, plan_for: PlanFor, tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(3):
            name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
            tensors[name], tensors[name + "_scale_inv"] = tiny.quantize(tensors[name])

    folder = with_tensors(m2_fp8, tmp_path / "m2", change)
    with pytest.raises(UnsupportedError, match=r"the router .* is stored as F8_E4M3") as caught:
        shards.write(*plan_for(folder, KEEP), tmp_path / "out")
    assert "--dequantize" in str(caught.value.hint)
    shards.write(*plan_for(folder, KEEP), tmp_path / "out", dequantize=True)
    assert verify(tmp_path / "out").ok


def test_mtp_layers_that_nothing_counts_cannot_be_dropped(plan_for: PlanFor, m2: Path, tmp_path: Path) -> None:
    folder = with_tensors(m2, tmp_path / "m2", lambda tensors: None, num_hidden_layers=2)
    with pytest.raises(UnsupportedError, match=r"which key of config\.json counts the MTP layers of MiniMax-M2"):
        shards.write(*plan_for(folder, KEEP), tmp_path / "out", mtp="drop")
    manifest = shards.write(*plan_for(folder, KEEP), tmp_path / "out")
    assert manifest.unmeasured == {2: 1} and len(manifest.routers) == 6


def test_an_expert_that_is_stored_in_another_format_lacks_nothing(
    m2_fp8: Path, plan_for: PlanFor, tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("w1", "w2", "w3"):
            name = f"model.layers.1.block_sparse_moe.experts.3.{part}.weight"
            tensors[name] = tensors[name].to(torch.bfloat16)
            del tensors[name + "_scale_inv"]

    folder = with_tensors(m2_fp8, tmp_path / "m2", change)
    everything = plan_for(folder, tiny.NUM_EXPERTS)
    assert [layer.incomplete for layer in everything[1].layers] == [{}, {}, {}]
    shards.write(*everything, tmp_path / "out")
    assert verify(tmp_path / "out").ok


# ---- bytes


def test_byte_ranges_are_copied_where_the_kernel_cannot(
    plan_for: PlanFor, m2: Path, pruned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(shards, "_CHUNK_BYTES", 1000)
    shards.write(*plan_for(m2, KEEP), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(pruned["m2"])


def test_short_copies_by_the_kernel_are_continued(
    plan_for: PlanFor, m2: Path, pruned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def copy(source: int, target: int, count: int, start: int) -> int:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            return 0
        return os.write(target, os.pread(source, min(count, 777), start))

    monkeypatch.setattr(os, "copy_file_range", copy, raising=False)
    shards.write(*plan_for(m2, KEEP), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(pruned["m2"])


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no reading past the page cache")
@pytest.mark.parametrize("most", [4096, 3 * 4096, 8 << 20])
def test_what_is_read_past_the_page_cache_is_the_same(
    plan_for: PlanFor, m2: Path, pruned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """From any place to any place of a file, however much is read at once."""
    read, calls = os.preadv, 0

    def count(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        return read(*arguments)

    monkeypatch.setattr(pagecache, "_LEAST_DIRECT", 1)
    monkeypatch.setattr(pagecache, "_DIRECT_BYTES", most)
    monkeypatch.setattr(os, "copy_file_range", lambda *_: pytest.fail("copied otherwise"), raising=False)
    monkeypatch.setattr(os, "major", lambda device: 8)  # wherever the tests run
    monkeypatch.setattr(Direct, "is_cached", lambda *_: False)
    monkeypatch.setattr(os, "preadv", count)
    shards.write(*plan_for(m2, KEEP), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(pruned["m2"])
    assert calls > 10


def test_where_the_page_cache_cannot_be_gone_past_bytes_are_copied_as_before(
    plan_for: PlanFor, m2: Path, pruned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(pagecache, "_LEAST_DIRECT", 1)
    monkeypatch.setattr(os, "preadv", refuse)
    shards.write(*plan_for(m2, KEEP), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(pruned["m2"])


@pytest.mark.parametrize("is_cached", [True, False])
def test_what_the_page_cache_holds_is_copied_inside_the_kernel(
    plan_for: PlanFor,
    m2: Path,
    pruned: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_cached: bool,
) -> None:
    asked: list[int] = []

    def read(self: object, ranges: Iterable[tuple[int, int]]) -> Generator[memoryview, None, None]:
        for start, stop in ranges:
            asked.append(start)
            yield memoryview(bytes(stop - start))

    @contextmanager
    def opened(source: Any, *, file: str, readers: Any) -> Iterator[Direct]:
        yield object.__new__(Direct)

    monkeypatch.setattr(pagecache, "_LEAST_DIRECT", 1)
    monkeypatch.setattr(Direct, "opened", opened)
    monkeypatch.setattr(Direct, "is_cached", lambda *_: is_cached)
    monkeypatch.setattr(Direct, "read", read)
    shards.write(*plan_for(m2, KEEP), tmp_path / "out")
    assert (contents(tmp_path / "out") == contents(pruned["m2"]), bool(asked)) == (is_cached, not is_cached)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no reading past the page cache")
def test_the_system_says_what_the_page_cache_holds(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 4 << 20
    path.write_bytes(bytes(size))
    with (
        Readers(1) as readers,
        path.open("rb", buffering=0) as source,
        Direct.opened(source, file="file", readers=readers) as direct,
    ):
        if direct is None:
            pytest.skip("files of tests do not lie on a disk by themselves here")
        os.fsync(source.fileno())
        assert direct.is_cached(0, size) and direct.is_cached(5000, size - 1)
        os.posix_fadvise(source.fileno(), 0, size // 2, os.POSIX_FADV_DONTNEED)
        assert not direct.is_cached(0, size // 2) and direct.is_cached(size // 2, size)
        assert not direct.is_cached(0, size - 8192) and direct.is_cached(8192, size)
        assert not direct.is_cached(size, 2 * size), "a file that ended is read, which says so"


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no reading past the page cache")
def test_a_disk_that_refuses_to_be_read_past_the_page_cache_is_not_asked_otherwise(
    plan_for: PlanFor, m2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken disk is told from a file system that cannot read so."""

    def refuse(*arguments: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "major", lambda device: 8)  # wherever the tests run
    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(CheckpointError, match=r"\.safetensors cannot be read: Input/output error"):
        shards.write(*plan_for(m2, KEEP), tmp_path / "out")


def test_nothing_is_read_past_the_page_cache_any_more_when_its_reader_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is closed then, and its number may be another's."""
    content = bytes(range(256)) * 400
    (tmp_path / "file").write_bytes(content)
    preadv, calls = os.preadv, Counter[str]()

    def slow(*arguments: Any) -> int:
        calls["begun"] += 1
        time.sleep(0.01)
        count = preadv(*arguments)
        calls["ended"] += 1
        return count

    monkeypatch.setattr(pagecache, "_DIRECT_BYTES", 4096)
    monkeypatch.setattr(os, "preadv", slow)
    with (
        Readers(2) as readers,
        (tmp_path / "file").open("rb", buffering=0) as source,
        readers.buffers() as buffers,
    ):
        direct = Direct(source.fileno(), file="file", readers=readers, buffers=buffers)
        assert b"".join(direct.read([(5, 10), (4000, 30_000)])) == content[5:10] + content[4000:30_000]
        calls.clear()
        contents = direct.read([(5, 100_000)])
        assert bytes(next(contents)) == content[5:4096]
        contents.close()
        assert 1 <= calls["begun"] == calls["ended"] <= 4
        at_close = calls.copy()
    assert calls == at_close


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_experts_along_any_axis_are_taken_byte_for_byte(tmp_path: Path, axis: int) -> None:
    stacked = torch.randn(4, 4, 4).to(torch.bfloat16)
    (tmp_path / "x").write_bytes(b"12345678" + raw(stacked))
    info = TensorInfo("x", "BF16", (4, 4, 4), "x", 8, 8 + 128)
    checkpoint = Checkpoint(tmp_path, {}, {"x": info}, (), "x")
    take = Take(info, axis, 4, (0, 1, 3))
    expected = raw(stacked.index_select(axis, torch.tensor([0, 1, 3])))
    assert bytes(edits.compute(checkpoint, take)) == expected
    if axis == 0:
        content = (tmp_path / "x").read_bytes()
        pieces = list(shards._joined(shards._pieces(checkpoint, [OutputTensor("x", "BF16", (3, 4, 4), take)])))
        assert len(pieces) == 2, "neighbouring rows are one byte range"
        assert b"".join(content[piece[0] : piece[1]] for piece in pieces if isinstance(piece, tuple)) == expected


def test_experts_that_do_not_begin_at_whole_bytes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"the experts in 'x' \(F4 \[2, 8\]\) do not begin at whole bytes"):
        edits._take(StackedTensor(TensorInfo("x", "F4", (2, 8), "x", 8, 16), 1, "expert", 8, 8), (0,))


def test_progress_counts_every_byte_of_the_shards_once(plan_for: PlanFor, m2: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, float, float, str]] = []
    shards.write(*plan_for(m2, KEEP), tmp_path / "out", progress=lambda *call: calls.append(call))
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert {(task, total, unit) for task, _, total, unit in calls} == {("writing", size, "B")}
    done = [call[1] for call in calls]
    assert done == sorted(done) and done[-1] == size


# ---- interrupted runs


class Killed(BaseException):
    """As abrupt as Ctrl-C."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Stop the writer when it renames its n-th file into place."""
    rename = os.replace

    def set_limit(limit: int) -> None:
        count = 0

        def replace(*args: Any, **kwargs: Any) -> None:
            nonlocal count
            count += 1
            if count == limit:
                raise Killed
            rename(*args, **kwargs)

        monkeypatch.setattr(os, "replace", replace)

    yield set_limit
    monkeypatch.setattr(os, "replace", rename)


def test_a_run_killed_anywhere_never_looks_finished_and_goes_on_to_the_same_bytes(
    plan_for: PlanFor, m2: Path, pruned: dict[str, Path], tmp_path: Path, kill_at: Callable[[int], None]
) -> None:
    expected = contents(pruned["m2"])
    for limit in (1, 2, 3, 10, 18, 19, 20, 22, 26, 27, 28, 29):
        out = tmp_path / f"killed-at-{limit}"
        kill_at(limit)
        with pytest.raises(Killed):
            shards.write(*plan_for(m2, KEEP), out)
        with pytest.raises(CheckpointError):
            Checkpoint.open(out)
        kill_at(-1)
        shards.write(*plan_for(m2, KEEP), out)
        assert contents(out) == expected
    assert len(expected) + 1 == 29, (
        "every file and the marker were renamed into place once; the last kill hit the last file"
    )


def test_shards_that_are_whole_are_not_written_again(
    plan_for: PlanFor, m2: Path, tmp_path: Path, kill_at: Callable[[int], None]
) -> None:
    out = tmp_path / "out"
    kill_at(6)
    with pytest.raises(Killed):
        shards.write(*plan_for(m2, KEEP), out)
    whole = {path: path.stat().st_ino for path in out.glob("*.safetensors")}
    assert len(whole) >= 4, "files are written several at once"
    damaged, truncated = sorted(whole)[:2]
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    with truncated.open("r+b") as stream:
        stream.truncate(truncated.stat().st_size - 1)
    kill_at(-1)
    shards.write(*plan_for(m2, KEEP), out)
    again = {path for path, inode in whole.items() if path.stat().st_ino != inode}
    assert again == {damaged, truncated}


def test_no_space_in_the_middle_is_one_sentence_and_the_run_goes_on(
    plan_for: PlanFor, m2: Path, pruned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, copied = tmp_path / "out", 0
    copy = os.copy_file_range

    def run_full(*args: Any) -> int:
        nonlocal copied
        copied += 1
        if copied > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copy(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", run_full)
        with pytest.raises(OutputError, match=f"writing to {out} stopped: No space left on device") as caught:
            shards.write(*plan_for(m2, KEEP), out)
    assert caught.value.hint == "once that is cured, repeat the command: it goes on where it stopped"
    with pytest.raises(CheckpointError, match="unfinished output of an interrupted run"):
        Checkpoint.open(out)
    shards.write(*plan_for(m2, KEEP), out)
    assert contents(out) == contents(pruned["m2"])


def test_too_little_space_is_said_with_the_numbers_before_anything_is_written(
    plan_for: PlanFor, m2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2000))
    with pytest.raises(OutputError, match=r"needs 0\.001 GB and its disk has 0\.000 GB free"):
        shards.write(*plan_for(m2, KEEP), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors*"))


@pytest.mark.parametrize("least", [1, 1 << 20], ids=["past the page cache", "through it"])
def test_a_source_that_shrinks_while_it_is_read_is_named(
    plan_for: PlanFor, m2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    monkeypatch.setattr(pagecache, "_LEAST_DIRECT", least)
    copy = shutil.copytree(m2, tmp_path / "copy")
    checkpoint, layout, plan = plan_for(copy, KEEP)
    last = checkpoint.files[-1]

    def shrink(task: str, done: float, total: float, unit: str) -> None:
        os.truncate(copy / last, checkpoint.tensors["model.norm.weight"].stop - 1)

    with pytest.raises(CheckpointError, match=f"{last} has become shorter while it was read"):
        shards.write(checkpoint, layout, plan, tmp_path / "out", progress=shrink)


# ---- folders that are refused


def refuse(plan_for: PlanFor, source: Path, out: Path, sentence: str, keep: int = KEEP, **options: Any) -> OutputError:
    before = contents(out) if out.is_dir() else None
    with pytest.raises(OutputError) as caught:
        shards.write(*plan_for(source, keep), out, **options)
    assert sentence in caught.value.message
    assert before is None or contents(out) == before, "a refusal changes nothing"
    return caught.value


def test_a_folder_that_is_not_empty_is_refused(plan_for: PlanFor, m2: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("precious")
    refuse(plan_for, m2, tmp_path, f"the output folder {tmp_path} is not empty: it holds a.txt")


def test_a_finished_output_is_not_overwritten(plan_for: PlanFor, m2: Path, pruned: dict[str, Path]) -> None:
    before = contents(pruned["m2"])
    shards.write(*plan_for(m2, KEEP), pruned["m2"])  # the same command again
    checkpoint, layout, other = open_with_plan(m2, KEEP, seed=6)
    with pytest.raises(OutputError, match="is not empty: it holds LICENSE and 26 more"):
        shards.write(checkpoint, layout, other, pruned["m2"])
    assert contents(pruned["m2"]) == before


def test_reapkits_own_folder_may_be_there_already(
    plan_for: PlanFor, m2: Path, pruned: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "reapkit").mkdir()
    (tmp_path / "reapkit" / "statistics.safetensors").write_bytes(b"as compress leaves it")
    shards.write(*plan_for(m2, KEEP), tmp_path)
    assert contents(tmp_path).keys() == contents(pruned["m2"]).keys() | {"reapkit/statistics.safetensors"}


def test_a_file_in_the_place_of_the_output_is_refused(plan_for: PlanFor, m2: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    refuse(plan_for, m2, tmp_path / "out", "is a file")


def test_the_output_may_not_be_the_source_nor_inside_it(plan_for: PlanFor, m2: Path, tmp_path: Path) -> None:
    refuse(plan_for, m2, m2, "is the source itself")
    refuse(plan_for, m2, m2 / "out", "is inside the source")
    (tmp_path / "link").symlink_to(m2)
    refuse(plan_for, m2, tmp_path / "link", "is the source itself")
    assert not (m2 / "out").exists()


@pytest.fixture
def unfinished(plan_for: PlanFor, m2: Path, tmp_path: Path, kill_at: Callable[[int], None]) -> Path:
    kill_at(6)
    with pytest.raises(Killed):
        shards.write(*plan_for(m2, KEEP), tmp_path / "out")
    kill_at(-1)
    return tmp_path / "out"


def test_another_commands_unfinished_output_is_refused(
    plan_for: PlanFor, m2: Path, unfinished: Path, tmp_path: Path
) -> None:
    refuse(plan_for, m2, unfinished, "holds the unfinished output of another command (other plan)", keep=KEEP + 1)
    refuse(plan_for, m2, unfinished, "(other base_model)", base_model="a/b")
    # The same tensors, but experts that were trained on need not show in the fingerprints.
    copy = shutil.copytree(m2, tmp_path / "copy")
    refuse(plan_for, copy, unfinished, "another command (other folder, ")


def test_a_foreign_file_in_an_unfinished_output_is_refused(plan_for: PlanFor, m2: Path, unfinished: Path) -> None:
    (unfinished / "model-99999.safetensors").write_text("")
    refuse(plan_for, m2, unfinished, "holds model-99999.safetensors, which this command does not write")


def test_a_damaged_marker_is_refused(plan_for: PlanFor, m2: Path, unfinished: Path) -> None:
    (unfinished / UNFINISHED_NAME).write_text("{")
    refuse(plan_for, m2, unfinished, "holds the unfinished output of another command")


def test_two_runs_into_one_folder_do_not_meet(plan_for: PlanFor, m2: Path, unfinished: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    lock = unfinished / "reapkit/lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        refuse(plan_for, m2, unfinished, f"{unfinished} is being written by another process")
        stream.write(b'{"process": 7, "host": "somewhere", "since": "2026-01-02 03:04:05"}')
        stream.flush()
        holder = "process 7 on somewhere since 2026-01-02 03:04:05"
        refuse(plan_for, m2, unfinished, f"{unfinished} is being written by {holder}")
    # The holder is gone, and so is its hold, although the file still says its name.
    shards.write(*plan_for(m2, KEEP), unfinished)
    assert not lock.exists()


def test_a_read_only_disk_is_one_sentence(
    plan_for: PlanFor, m2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_folder(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse_folder)
        refuse(plan_for, m2, tmp_path / "out", "stopped: Read-only file system")


def test_a_name_that_the_disk_does_not_take_is_one_sentence(plan_for: PlanFor, m2: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="stopped: File name too long"):
        shards.write(*plan_for(m2, KEEP), tmp_path / ("a" * 300))


def test_a_dry_run_describes_and_writes_nothing(
    plan_for: PlanFor, m2: Path, pruned: dict[str, Path], tmp_path: Path
) -> None:
    manifest = shards.write(*plan_for(m2, KEEP), tmp_path / "out", dry_run=True)
    assert manifest == Manifest.load(pruned["m2"])
    assert not (tmp_path / "out").exists()


def test_a_plan_of_another_model_is_refused_before_anything_is_written(
    plan_for: PlanFor, m2: Path, tmp_path: Path
) -> None:
    checkpoint, layout, _ = plan_for(m2, KEEP)
    other = plan_for(tiny.make_m2(tmp_path / "other", seed=1), KEEP)[2]
    with pytest.raises(
        PlanError, match=r"the plan is for .*other \(routers .*\), and this checkpoint has other routers"
    ):
        shards.write(checkpoint, layout, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_made_from_one_format_prunes_its_sibling_in_another(
    plan_for: PlanFor, m2_fp8: Path, tmp_path: Path
) -> None:
    bf16, pruned = tmp_path / "bf16", tmp_path / "pruned"
    shards.write(*plan_for(m2_fp8, tiny.NUM_EXPERTS), bf16, dequantize=True)
    _, _, plan = plan_for(m2_fp8, KEEP)
    checkpoint, layout, _ = plan_for(bf16, KEEP)
    shards.write(checkpoint, layout, plan, pruned)
    digest = hashlib.sha256(raw(tiny.load_tensors(pruned)["model.layers.0.block_sparse_moe.gate.weight"])).digest()
    gate = tiny.load_tensors(m2_fp8)["model.layers.0.block_sparse_moe.gate.weight"][list(plan.kept[0])]
    assert digest == hashlib.sha256(raw(gate)).digest()
