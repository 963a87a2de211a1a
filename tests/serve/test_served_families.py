"""Unmodified vLLM loads pruned checkpoints of several families on a CPU and says what their originals say with masked routers.

Tiny models with random weights, in float32, so every token must be equal. The reference is transformers' own model of the *original*
checkpoint, whose dropped experts are put out of reach; README.md in this folder says why two engines on one folder would not do.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from serving import NEVER_CHOSEN, Continuations, continued, greedy, one_thread, require_vllm
from torch import Tensor

import quantized
import tiny
from families import FAMILIES, Family, make, rewrite
from reapkit import plans, prune
from reapkit.plans import PruningPlan

pytestmark = pytest.mark.serve

NUM_TOKENS = 24
PROMPTS: Continuations = [
    torch.randint(3, 99, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (1, 2, 5, 11, 30, 64)
]
# Thirty models on two idle cores take a minute and a half; a busy machine several times that.
WITHIN_S = 600

# What vLLM's CPU kernels ask for: heads of 32 or more, of latent attention the vendor's own 512 and 64, and experts that are whole blocks
# of 32 wide where it does not fill them up.
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
# With the vendor's kind of RoPE: plain RoPE in latent attention is wrong on CPUs, README.md says where.
LATENT: Mapping[str, Any] = {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
DIMENSIONS: Mapping[str, Mapping[str, Any]] = {
    "Qwen2-MoE": HEADS,
    "Qwen3-MoE": HEADS,
    "GLM-4.5": HEADS,
    "GLM-4.7-Flash": LATENT,
    "DeepSeek-V2": LATENT,
    "DeepSeek-V3": LATENT,
    "Mixtral": HEADS,
    # vLLM reads the second entry only, transformers the first.
    "Llama-4 text": HEADS | {"moe_layers": [1], "interleave_moe_layer_step": 2},
    "gpt-oss": HEADS | {"intermediate_size": 32},
    "Granite-MoE": HEADS,
    "Hunyuan-A13B": HEADS,
}
# The vendor's entries that transformers leaves out and vLLM reads.
ENTRIES: Mapping[str, Mapping[str, Any]] = {
    "DeepSeek-V3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "GLM-4.7-Flash": {"topk_method": "noaux_tc", "first_k_dense_replace": 1},
}
WITH_MTP = ("GLM-4.5", "GLM-4.7-Flash", "DeepSeek-V3")
MXFP4 = "gpt-oss in MXFP4"

# Ways in which a family's checkpoint is served.
PRUNED = "pruned"
WITHOUT_MTP = "pruned, MTP dropped"
SPECULATING = "pruned, speculating with its MTP layer"
REORDERED = "pruned, two rows of every router exchanged"
DEQUANTIZED = "pruned, dequantised"
SPECULATION = {"method": "mtp", "num_speculative_tokens": 1}


@dataclass(frozen=True)
class Original:
    """An unpruned checkpoint and its plan, by which a quarter of the experts goes, others in every layer."""

    folder: Path
    plan: PruningPlan

    def pruned(self, name: str, **options: Any) -> Path:
        out = self.folder.parent / name
        prune(self.folder, self.plan, out, **options)
        return out


@pytest.fixture(scope="module", autouse=True)
def vllm_installed() -> None:
    require_vllm()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Original]:
    """By name of the family; those of `WITH_MTP` hold an MTP layer, as releases do."""
    folders = {}
    for family in FAMILIES:
        if family.name in DIMENSIONS:
            folders[family.name] = tmp_path_factory.mktemp(family.model_type) / "original"
            write_original(family, folders[family.name])
    folders[MXFP4] = tmp_path_factory.mktemp("mxfp4") / "original"
    write_mxfp4(folders["gpt-oss"], folders[MXFP4])
    return {
        name: Original(folder, plans.plan(folder, criterion="random", ratio=0.25, seed=3))
        for name, folder in folders.items()
    }


def write_original(family: Family, folder: Path) -> None:
    name = family.name
    make(replace(family, changes={**family.changes, **DIMENSIONS[name]}), folder, mtp=name in WITH_MTP)
    config = tiny.read_json(folder / "config.json")
    tiny.write_json(folder / "config.json", config | ENTRIES.get(name, {}))
    tiny.add_tokenizer(folder)
    if name in WITH_MTP:
        rewrite(folder, with_mtp_ends)


def with_mtp_ends(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An MTP layer behind the last has embeddings, a norm and a head of its own, as large as the model's."""
    (layer,) = {name.removesuffix("eh_proj.weight") for name in tensors if name.endswith(".eh_proj.weight")}
    ends = {"embed_tokens": "model.embed_tokens", "shared_head.norm": "model.norm", "shared_head.head": "lm_head"}
    return tensors | {f"{layer}{end}.weight": torch.randn_like(tensors[f"{like}.weight"]) for end, like in ends.items()}


def write_mxfp4(source: Path, folder: Path) -> None:
    """The same in the form in which gpt-oss is released: experts' matrices in MXFP4, the rest in bfloat16."""
    shutil.copytree(source, folder)

    def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            is_expert = name.endswith((".gate_up_proj", ".down_proj"))
            stored |= quantized.mxfp4_blocks(name, tensor) if is_expert else {name: tensor.bfloat16()}
        return stored

    rewrite(folder, packed)
    others = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": others}
    config = tiny.read_json(folder / "config.json")
    tiny.write_json(folder / "config.json", config | {"dtype": "bfloat16", "quantization_config": quantization})


@pytest.fixture(scope="module")
def served(originals: dict[str, Original]) -> dict[tuple[str, str], Continuations | str]:
    """vLLM's continuations of PROMPTS, or its exception, by family and way; without plugins, in one process."""
    engines: dict[tuple[str, str], dict[str, Any]] = {}
    for name in DIMENSIONS:
        original = originals[name]
        pruned = original.pruned("pruned")
        engines[name, PRUNED] = {"model": pruned}
        engines[name, REORDERED] = {"model": reordered(pruned, original.plan.num_kept)}
        if name in WITH_MTP:
            engines[name, WITHOUT_MTP] = {"model": original.pruned("without-mtp", mtp="drop")}
            engines[name, SPECULATING] = {"model": pruned, "speculative_config": SPECULATION}
    mxfp4 = originals[MXFP4]
    engines[MXFP4, DEQUANTIZED] = {"model": mxfp4.pruned("dequantized", dequantize=True)}
    engines[MXFP4, PRUNED] = {"model": mxfp4.pruned("pruned"), "dtype": "bfloat16"}
    answers = greedy(list(engines.values()), PROMPTS, NUM_TOKENS, within_s=WITHIN_S, VLLM_PLUGINS="")
    return dict(zip(engines, answers, strict=True))


def reordered(pruned: Path, num_kept: int) -> Path:
    """A copy whose first two router entries are exchanged in every layer: as if two experts had been renumbered wrongly."""
    copy = pruned.parent / "reordered"
    shutil.copytree(pruned, copy)
    order = torch.tensor([1, 0, *range(2, num_kept)])
    rewrite(copy, lambda tensors: {
        name: tensor if routed_layer(name, tensor, num_kept) is None else tensor[order] for name, tensor in tensors.items()
    })  # fmt: skip
    return copy


def routed_layer(name: str, tensor: Tensor, num_experts: int) -> int | None:
    """The layer whose router's weight or bias this is, told by its length; None if it is something else."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    is_router = match and "experts" not in name and tensor.ndim < 3 and tensor.shape[0] == num_experts
    return int(match[1]) if is_router else None


def masked_continuations(original: Original) -> Continuations:
    """The original with dropped experts out of reach, continued by transformers in float32 from the original's own bytes."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(original.folder, **options).float().eval()
    routers: dict[int, Tensor] = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        layer = routed_layer(name, value, original.plan.num_experts)
        if layer is None:
            continue
        dropped = torch.tensor(original.plan.dropped(layer))
        if value.ndim == 2:
            routers[value.data_ptr()] = dropped
        else:
            value.data[dropped] = NEVER_CHOSEN
    assert len(routers) == len(original.plan.kept.keys() - original.plan.unmeasured.keys())
    with one_thread(), mock.patch.object(torch.nn.functional, "linear", masking(routers)):
        return [continued(model, prompt, NUM_TOKENS) for prompt in PROMPTS]


def masking(routers: Mapping[int, Tensor]) -> Callable[..., Tensor]:
    """`linear` in whose products with routers, found by where they lie, the dropped experts' logits are minus infinity."""
    linear = torch.nn.functional.linear

    def masked(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = linear(inputs, weight, bias)
        dropped = routers.get(weight.data_ptr())
        return logits if dropped is None else logits.index_fill(-1, dropped, float("-inf"))

    return masked


@pytest.fixture(scope="module")
def references(originals: dict[str, Original]) -> dict[str, Continuations]:
    return {name: masked_continuations(original) for name, original in originals.items()}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_a_pruned_checkpoint_says_what_the_masked_original_says(
    name: str, served: dict[tuple[str, str], Continuations | str], references: dict[str, Continuations]
) -> None:
    assert served[name, PRUNED] == references[name]


@pytest.mark.parametrize("way", [WITHOUT_MTP, SPECULATING])
@pytest.mark.parametrize("name", WITH_MTP)
def test_mtp_layers_load_or_are_gone_and_change_no_text(
    name: str, way: str, served: dict[tuple[str, str], Continuations | str], references: dict[str, Continuations]
) -> None:
    """Without the MTP layer, and with it loaded and drafting: greedy drafts decide how fast the text comes, never which it is."""
    assert served[name, way] == references[name]


@pytest.mark.parametrize("name", DIMENSIONS)
def test_experts_in_another_order_than_their_router_are_noticed(
    name: str, served: dict[tuple[str, str], Continuations | str], references: dict[str, Continuations]
) -> None:
    """The comparison has teeth: such a checkpoint loads as before and says something else."""
    wrong = served[name, REORDERED]
    assert isinstance(wrong, list), wrong
    assert wrong != references[name]


def test_gpt_oss_in_mxfp4_dequantised_says_what_the_masked_original_says(
    served: dict[tuple[str, str], Continuations | str], references: dict[str, Continuations]
) -> None:
    assert served[MXFP4, DEQUANTIZED] == references[MXFP4]


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="with AMX vLLM has a kernel for MXFP4 experts")
def test_mxfp4_experts_need_amx_on_a_cpu(served: dict[tuple[str, str], Continuations | str]) -> None:
    """Not the checkpoint is refused but the machine: vLLM ends before it reads a weight."""
    answer = served[MXFP4, PRUNED]
    assert "No MXFP4 MoE backend supports the deployment configuration" in answer, answer
    assert "backend: CPU, reason: kernel does not support current device cpu" in answer
