"""Tiny checkpoints of every family, built by transformers and written with the vendor's names in shards that experts straddle.

A family is a line of data: the model type and what differs from `COMMON`, of which every config takes the entries that it knows. No
other dimension is as long as there are experts, so that references can find experts by that length alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import tiny
from reapkit.architectures import ARCHITECTURES
from reapkit.layout import Architecture, find

NUM_LAYERS = 3
COMMON: Mapping[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 48,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 12,
    "index_head_dim": 12, "index_n_heads": 2, "index_topk": 512,
    "linear_key_head_dim": 12, "linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
VISION: Mapping[str, Any] = {
    "depth": 1, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 24, "num_heads": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "patch_size": 4, "image_size": 12, "in_channels": 3, "num_channels": 3, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 36, "deepstack_visual_indexes": [0],
    "position_embedding_size": 36, "vision_output_dim": 24, "projector_input_dim": 24, "projector_output_dim": 24, "head_dim": 16,
    "text_hidden_size": 64, "mm_hidden_size": 32, "vt_hidden_size": 32,
}  # fmt: skip
SHARD_SIZE = "60KB"


@dataclass(frozen=True)
class Family:
    """One family's tiny checkpoint.

    Attributes:
        name: for people and test reports.
        model_type: of the config that transformers builds.
        changes: config entries that differ from `COMMON`; `text_config` and `vision_config` likewise.
        model_class: name of transformers' class; None lets AutoModelForCausalLM choose.
        num_experts, num_groups, num_zero_experts: of every MoE layer.
        expert_rows: rows per expert where experts lie one after the other in one matrix.
        mtp: where MTP layers lie: the prefix of one of their own, or `behind` the last decoder layer; None where no release has any.
        runs_mtp: whether transformers can run them.
        stored_type: `model_type` in config.json, where transformers has another name for the same.
        finish: brings files to the vendor's form where transformers writes another.
        cannot_load: why transformers itself does not load the vendor's form.
        bias_spread: the largest selection bias; softmax scores are smaller than sigmoids and want less.
        mtp_blocks: what each block under an MTP prefix of its own holds: experts, or the attention of the decoder.
    """

    name: str
    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    model_class: str | None = None
    num_experts: int = 8
    num_groups: int = 1
    num_zero_experts: int = 0
    expert_rows: int = 0
    mtp: str | None = None
    runs_mtp: bool = False
    stored_type: str | None = None
    finish: Callable[[Path], None] | None = None
    cannot_load: str | None = None
    bias_spread: float = 0.15
    mtp_blocks: tuple[str, ...] = ("moe",)

    @property
    def has_mtp(self) -> bool:
        return self.mtp is not None

    @property
    def architecture(self) -> Architecture:
        """reapkit's entry for it."""
        return find({"model_type": self.stored_type or self.model_type}, ARCHITECTURES)

    def layer_of(self, name: str) -> int | None:
        """The layer of a tensor; MTP blocks of their own are numbered on from the last decoder layer."""
        match = re.search(r"(?:layers|blocks)\.(\d+)\.", name)
        if match is None:
            return None
        num_layers = len(self.changes.get("layer_types") or self.changes.get("layers_block_type") or [0] * NUM_LAYERS)
        return int(match[1]) + (num_layers if name.startswith("mtp.") else 0)


def _with_layers_named_so(folder: Path) -> None:
    """Kimi-K2.5: transformers, writing, brings its vision tower's word for layers to the language model too."""
    rewrite(folder, lambda tensors: {
        name.replace("language_model.model.blocks.", "language_model.model.layers."): tensor for name, tensor in tensors.items()
    })  # fmt: skip


def _without_zero_experts(folder: Path) -> None:
    """LongCat's zero experts have no weights; transformers allocates gate and up projections for them."""
    rewrite(folder, lambda tensors: {
        name: tensor for name, tensor in tensors.items() if not re.search(r"\.experts\.(8|9|10)\.", name)
    })  # fmt: skip


def _with_transposed_experts(folder: Path) -> None:
    """Qwen3-VL: the vendor stores [E, D, 2I] and [E, I, D]; transformers turns them only where the shape shows that they are so."""
    rewrite(folder, lambda tensors: {
        name: tensor.transpose(1, 2) if ".mlp.experts." in name else tensor for name, tensor in tensors.items()
    })  # fmt: skip


def _with_stacked_experts(folder: Path) -> None:
    """Qwen3.5: the BF16 releases stack the experts of decoder layers; transformers writes them one by one."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
        stems = {name.partition("experts.")[0] + "experts." for name in tensors if ".mlp.experts." in name}
        for stem in sorted(stems):
            parts = {
                part: torch.stack([tensors[f"{stem}{e}.{part}_proj.weight"] for e in range(8)])
                for part in ("gate", "up", "down")
            }
            result[f"{stem}gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), dim=1)
            result[f"{stem}down_proj"] = parts["down"]
        return result

    rewrite(folder, change)


def _with_dense_mlp(folder: Path) -> None:
    """Kimi-Linear: the vendor's dense layer is an `mlp`; transformers, writing, calls it a sparse block too."""
    rewrite(folder, lambda tensors: {
        name.replace(".0.block_sparse_moe.", ".0.mlp."): tensor for name, tensor in tensors.items()
    })  # fmt: skip


GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}
LING_GROUPS = {"num_experts": 16, "n_group": 4, "topk_group": 2}
MLA_HEADS = {"num_key_value_heads": 4}
NEXT_N = {"num_nextn_predict_layers": 1}
VL = {"vision_config": {}}
# MTP layers of these are copies of the last one, and attend in full.
LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LLAMA_4 = {"moe_layers": [0, 2], "num_experts_per_tok": 1, "intermediate_size": 24, "intermediate_size_mlp": 48}

FAMILIES: tuple[Family, ...] = (
    Family("MiniMax-M2", "minimax_m2", {"intermediate_size": 24, "rotary_dim": 8}),
    Family("MiniMax-M3", "minimax_m3_vl", {
        **VL, "projector_hidden_size": 24,
        "text_config": {"intermediate_size": 24, "shared_intermediate_size": 48, "dense_intermediate_size": 96,
            "mlp_layer_types": ["dense", "sparse", "sparse"], "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]},
    }, model_class="MiniMaxM3SparseForConditionalGeneration"),
    Family("MiniMax-M1", "minimax", {"intermediate_size": 24}),
    Family("Qwen2-MoE", "qwen2_moe", {"mlp_only_layers": [1]}),
    Family("Qwen3-MoE", "qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": True}),
    Family("Qwen3-Next", "qwen3_next", LINEAR_THEN_FULL, mtp="mtp."),
    Family("Qwen3-VL-MoE", "qwen3_vl_moe", VL, model_class="Qwen3VLMoeForConditionalGeneration", finish=_with_transposed_experts),
    Family(
        "Qwen3.5-MoE", "qwen3_5_moe", {**VL, "text_config": LINEAR_THEN_FULL},
        model_class="Qwen3_5MoeForConditionalGeneration", mtp="mtp.", finish=_with_stacked_experts,
    ),
    Family("Qwen3.5-MoE text", "qwen3_5_moe_text", LINEAR_THEN_FULL, mtp="mtp."),
    Family("GLM-4.5", "glm4_moe", {"n_group": 1, "topk_group": 1, **NEXT_N}, mtp="behind", runs_mtp=True),
    Family("GLM-4.7-Flash", "glm4_moe_lite", {"n_group": 1, "topk_group": 1, **MLA_HEADS, **NEXT_N}, mtp="behind"),
    Family("GLM-4.5V", "glm4v_moe", {**VL, "text_config": {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    }}}, model_class="Glm4vMoeForConditionalGeneration"),
    Family("GLM-5", "glm_moe_dsa", {"n_group": 1, "topk_group": 1, **MLA_HEADS, **NEXT_N}, mtp="behind"),
    Family(
        "DeepSeek-V2", "deepseek_v2", {**GROUPS, **MLA_HEADS, "topk_method": "group_limited_greedy"},
        num_experts=16, num_groups=4,
    ),
    Family(
        "DeepSeek-V3", "deepseek_v3", {**GROUPS, **MLA_HEADS, **NEXT_N},
        num_experts=16, num_groups=4, mtp="behind", runs_mtp=True, bias_spread=0.1,
    ),
    Family("DeepSeek-V3.2", "deepseek_v32", {**GROUPS, **MLA_HEADS, **NEXT_N}, num_experts=16, num_groups=4, mtp="behind"),
    Family(
        "Kimi-K2", "deepseek_v3", {**MLA_HEADS, "n_group": 1, "topk_group": 1}, stored_type="kimi_k2",
        cannot_load="transformers has no class for kimi_k2; what it holds is a DeepSeek-V3",
    ),
    Family("Kimi-K2.5", "kimi_k25", {**VL, "text_config": {**MLA_HEADS, "n_group": 1, "topk_group": 1}},
        model_class="Kimi_K25ForConditionalGeneration", finish=_with_layers_named_so),
    Family("Kimi-Linear", "kimi_linear", {**MLA_HEADS, "linear_attn_config": {
        "head_dim": 12, "num_heads": 2, "short_conv_kernel_size": 4, "full_attn_layers": [2], "kda_layers": [1, 3],
    }}, finish=_with_dense_mlp),
    Family("Mixtral", "mixtral", {"intermediate_size": 24}),
    Family("Llama-4", "llama4", {**VL, "text_config": LLAMA_4}, model_class="Llama4ForConditionalGeneration"),
    Family("Llama-4 text", "llama4_text", LLAMA_4),
    Family("ERNIE-4.5", "ernie4_5_moe", bias_spread=0.03),
    Family("gpt-oss", "gpt_oss", {"intermediate_size": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    Family("OLMoE", "olmoe", {"intermediate_size": 24}),
    Family("Flex-OLMo", "flex_olmo", {"intermediate_size": 24}),
    Family("Granite-MoE", "granitemoe", {"intermediate_size": 24}),
    Family("Granite-MoE Shared", "granitemoeshared", {"intermediate_size": 24, "shared_intermediate_size": 48}),
    Family("Granite-MoE Hybrid", "granitemoehybrid", {
        "intermediate_size": 24, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 12,
    }),
    Family("PhiMoE", "phimoe", {"intermediate_size": 24}),
    Family("dots1", "dots1", {"n_group": 1, "topk_group": 1}),
    Family("Hunyuan-A13B", "hunyuan_v1_moe", {"intermediate_size": 24, "moe_topk": [2, 2, 2]}),
    Family("LFM2-MoE", "lfm2_moe", {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1}),
    Family("Nemotron-3", "nemotron_h", {
        "layers_block_type": ["mamba", "moe", "attention", "moe"], "num_hidden_layers": 4, "mamba_num_heads": 4, "mamba_head_dim": 32,
        "ssm_state_size": 12, "n_groups": 2, "n_group": 1, "topk_group": 1, "moe_shared_expert_intermediate_size": 48,
        "moe_latent_size": None, **NEXT_N,
    }, mtp="mtp.", mtp_blocks=("attention", "moe")),
    Family("Step-3.7", "step3p7", {**VL, "text_config": {
        "sliding_window": 16, "mlp_layer_types": ["dense", "sparse", "sparse"], "share_expert_dim": 48,
    }}, model_class="Step3p7ForConditionalGeneration"),
    Family("MiMo-V2-Flash", "mimo_v2_flash", {"n_group": 1, "topk_group": 1}),
    Family(
        "Ling, Ring", "bailing_hybrid", {**LING_GROUPS, **MLA_HEADS, **NEXT_N, **LINEAR_THEN_FULL, "head_dim": 12},
        num_experts=16, num_groups=4, mtp="behind",
    ),
    Family("LongCat-Flash", "longcat_flash", {
        "num_layers": 2, "num_hidden_layers": 4, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 24, "zero_expert_num": 3,
        "num_key_value_heads": 4, "head_dim": 4,
    }, num_zero_experts=3, bias_spread=0.03, finish=_without_zero_experts,
        cannot_load="transformers allocates projections for zero experts, which the vendor's checkpoint does not hold"),
    Family("AFMoE", "afmoe", {**SLIDING_AND_FULL, "num_dense_layers": 1, "n_group": 1, "topk_group": 1}),
    Family("Jamba", "jamba", {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 0, "mamba_dt_rank": 6, "mamba_d_state": 12,
        "intermediate_size": 24,
    }),
    Family("DBRX", "dbrx", {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    }, expert_rows=24),
    Family("Gemma-4", "gemma4", {**VL, "text_config": {
        "enable_moe_block": True, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 0, "global_head_dim": 16,
    }}, model_class="Gemma4ForConditionalGeneration"),
    Family("EXAONE-MoE", "exaone_moe", {**SLIDING_AND_FULL, "n_group": 1, "topk_group": 1}),
    Family("Solar-Open", "solar_open", {"n_group": 1, "topk_group": 1}),
)  # fmt: skip


def make(family: Family, folder: Path, *, mtp: bool = False) -> Any:
    """Write a family's checkpoint and return the model in memory: float32, eager experts, weights that all matter to the logits."""
    torch.manual_seed(0)
    config = _config(family)
    cls = (
        getattr(transformers, family.model_class)._from_config
        if family.model_class
        else transformers.AutoModelForCausalLM.from_config
    )
    model = cls(config, experts_implementation="eager").float().eval().requires_grad_(False)
    _randomise(model, bias_spread=family.bias_spread)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if family.stored_type is not None:
        # Such releases bring code for their type.
        auto_map = {"AutoConfig": "configuration_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
        config = tiny.read_json(folder / "config.json") | {"model_type": family.stored_type, "auto_map": auto_map}
        tiny.write_json(folder / "config.json", config)
    if family.finish is not None:
        family.finish(folder)
    if mtp:
        _add_mtp(family, folder)
    return model


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change a checkpoint's tensors, in shards of so many that experts straddle them."""
    tensors = change(tiny.load_tensors(folder))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    names = list(tensors)
    parts = [names[start : start + 7] for start in range(0, len(names), 7)]
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    tiny.write_json(folder / "model.safetensors.index.json", index)


def _config(family: Family) -> Any:
    cls = type(transformers.AutoConfig.for_model(family.model_type))
    if "vision_config" not in family.changes:
        return cls(**_known(cls, COMMON) | family.changes)
    text, vision = cls.sub_configs["text_config"], cls.sub_configs["vision_config"]
    if text is transformers.AutoConfig:
        text = type(cls().text_config)
    nested = {
        "text_config": _known(text, COMMON) | family.changes.get("text_config", {}),
        "vision_config": _known(vision, VISION) | family.changes["vision_config"],
    }
    return cls(**family.changes | nested)


def _known(cls: Any, entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key in cls.__dataclass_fields__}


def _randomise(model: torch.nn.Module, *, bias_spread: float) -> None:
    """Weights large enough that every expert matters to the logits, norms that are not all ones, selection biases as wide as scores."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for name, buffer in (*model.named_buffers(), *model.named_parameters()):
            if re.search(r"(correction_bias|expert_bias|router_bias)$", name):
                # Evenly spaced, so that none is so low that its expert is never chosen; about as wide as the scores' own spread.
                order = torch.randperm(buffer.shape[-1])
                buffer.copy_(torch.linspace(-bias_spread, bias_spread, buffer.shape[-1])[order].reshape(buffer.shape))


def _add_mtp(family: Family, folder: Path) -> None:
    """An MTP layer as releases ship it: a copy of the last MoE layer with other values, and what joins it to the model."""
    tensors = tiny.load_tensors(folder)
    layers = {layer for name in tensors if (layer := family.layer_of(name)) is not None}
    count = max(layers) + 1
    own = family.mtp != "behind"
    sources = [
        _last_layer(family, tensors, r"experts" if block == "moe" else r"[qk]_proj") for block in family.mtp_blocks
    ]

    def change(before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        added = {}
        for number, source in enumerate(sources):
            for name, tensor in before.items():
                if family.layer_of(name) == source:
                    end = name[name.index(f"layers.{source}.") + len(f"layers.{source}.") :]
                    place = f"mtp.layers.{number}.{end}" if own else f"model.layers.{count}.{end}"
                    for part, value in _per_expert(place, tensor) if own else [(place, tensor)]:
                        added[part] = torch.randn_like(value) * value.std()
        return before | added | _mtp_joins(family, count)

    rewrite(folder, change)


def _last_layer(family: Family, tensors: Mapping[str, torch.Tensor], pattern: str) -> int:
    return max(layer for name in tensors if re.search(pattern, name) and (layer := family.layer_of(name)) is not None)


def _mtp_joins(family: Family, count: int) -> dict[str, torch.Tensor]:
    """What joins an MTP layer to the model; blocks that part attention from experts (Nemotron) name it like layers behind the last."""
    if family.mtp == "behind" or len(family.mtp_blocks) > 1:
        first, last = (f"model.layers.{count}.",) * 2 if family.mtp == "behind" else (
            f"{family.mtp}layers.0.", f"{family.mtp}layers.{len(family.mtp_blocks) - 1}.",
        )  # fmt: skip
        names = (f"{first}enorm", f"{first}hnorm", f"{first}eh_proj")
        end = f"{last}{'shared_head.norm' if family.mtp == 'behind' else 'final_layernorm'}"
    else:
        prefix = family.mtp
        names = (f"{prefix}pre_fc_norm_embedding", f"{prefix}pre_fc_norm_hidden", f"{prefix}fc")
        end = f"{prefix}norm"
    joins = {f"{name}.weight": torch.randn(64) for name in names[:2]}
    if family.mtp == "behind":
        joins |= {
            f"model.layers.{count}.{part}.weight": torch.randn(128, 64) for part in ("embed_tokens", "shared_head.head")
        }
    return joins | {f"{names[2]}.weight": torch.randn(64, 128) / 8, f"{end}.weight": torch.ones(64)}


def _per_expert(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """MTP experts lie one by one also where those of the decoder layers are stacked (Qwen3.5)."""
    if name.endswith("experts.down_proj"):
        return [(f"{name.removesuffix('down_proj')}{e}.down_proj.weight", part) for e, part in enumerate(tensor)]
    if name.endswith("experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        halves = [(e, *part.chunk(2)) for e, part in enumerate(tensor)]
        return [
            (f"{stem}{e}.{half}_proj.weight", part)
            for e, gate, up in halves
            for half, part in (("gate", gate), ("up", up))
        ]
    return [(name, tensor)]
