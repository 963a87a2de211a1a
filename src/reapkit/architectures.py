"""The families that reapkit knows: one entry each, data only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reapkit.layout import Architecture, Slot
from reapkit.selection import Selection

# Tensors that most families share; the pattern is the name's end after the block.
_EXPERTS = Slot("experts.{expert}.{rest}", None, "expert")
_STACKED_EXPERTS = Slot("experts.{rest}", 0, "expert")
_GATE = Slot("gate.weight", 0, "router")
_GATE_BIAS = Slot("gate.e_score_correction_bias", 0, "bias")
_BLOCK_BIAS = Slot("e_score_correction_bias", 0, "bias")

_MLP = "model.layers.{layer}.mlp."
_MLP_OF_TEXT = "model.language_model.layers.{layer}.mlp."
_SPARSE = "model.layers.{layer}.block_sparse_moe."
_FEED_FORWARD = "model.layers.{layer}.feed_forward."

_SHARED_EXPERT = ("shared_expert.{rest}", "shared_expert_gate.weight")
_SHARED_EXPERTS = ("shared_experts.{rest}",)

_NEXT_N = ("num_nextn_predict_layers",)

_SIGMOID = "sigmoid + selection bias"
_SIGMOID_GROUPS = "sigmoid + selection bias, groups"
_IMAGES = "text alone does not measure experts that images use: give rows with images, and check images after"

_RENORMALISED = "norm_topk_prob"
_BY_SIGMOID = Selection("sigmoid")
_BY_SIGMOID_SCALED = Selection("sigmoid", normalise=_RENORMALISED, scaling="routed_scaling_factor", epsilon=1e-20)
_BY_SOFTMAX = Selection("softmax")
_BY_SOFTMAX_MAYBE = Selection("softmax", normalise=_RENORMALISED)
_BIASED_SOFTMAX = Selection(
    "softmax",
    obstacle="its selection bias is added to a softmax over all experts, so removing any changes every token's choice",
)

_DEEPSEEK_V3 = Architecture(
    name="DeepSeek-V3, R1, V3.1",
    model_types=("deepseek_v3",),
    blocks=(_MLP,),
    slots=(_EXPERTS, _GATE, _GATE_BIAS),
    unpruned=_SHARED_EXPERTS,
    num_groups_keys=("n_group",),
    topk_groups_key="topk_group",
    mtp_keys=_NEXT_N,
    scoring=_SIGMOID_GROUPS,
    selection=_BY_SIGMOID_SCALED,
)

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        name="MiniMax-M2",
        model_types=("minimax_m2",),
        blocks=(_SPARSE,),
        slots=(_EXPERTS, _GATE, _BLOCK_BIAS),
        scoring=_SIGMOID,
        selection=_BY_SIGMOID,
    ),
    Architecture(
        name="MiniMax-M3",
        model_types=("minimax_m3_vl",),
        blocks=("language_model.model.layers.{layer}.block_sparse_moe.",),
        slots=(_EXPERTS, _GATE, _BLOCK_BIAS),
        unpruned=_SHARED_EXPERTS,
        scoring=_SIGMOID,
        selection=_BY_SIGMOID,
        caution=_IMAGES,
    ),
    Architecture(
        name="MiniMax-M1, Text-01",
        model_types=("minimax", "minimax_m1", "minimax_text_01"),
        not_in_transformers=("minimax_m1", "minimax_text_01"),
        blocks=(_SPARSE,),
        slots=(_EXPERTS, _GATE),
        scoring="softmax",
        selection=_BY_SOFTMAX,
    ),
    Architecture(
        name="Qwen2-MoE",
        model_types=("qwen2_moe",),
        blocks=(_MLP,),
        slots=(_EXPERTS, _GATE),
        unpruned=_SHARED_EXPERT,
        scoring="softmax",
        selection=_BY_SOFTMAX_MAYBE,
    ),
    Architecture(
        name="Qwen3-MoE",
        model_types=("qwen3_moe",),
        blocks=(_MLP,),
        slots=(_EXPERTS, _GATE),
        scoring="softmax",
        selection=_BY_SOFTMAX_MAYBE,
    ),
    Architecture(
        name="Qwen3-Next",
        model_types=("qwen3_next",),
        mtp_keys=_NEXT_N,
        blocks=(_MLP,),
        mtp_blocks=("mtp.layers.{layer}.mlp.",),
        slots=(_EXPERTS, _GATE),
        unpruned=_SHARED_EXPERT,
        scoring="softmax",
        selection=_BY_SOFTMAX_MAYBE,
    ),
    Architecture(
        name="Qwen3-VL-MoE",
        model_types=("qwen3_vl_moe",),
        blocks=(_MLP_OF_TEXT,),
        slots=(_EXPERTS, _STACKED_EXPERTS, _GATE),
        scoring="softmax",
        selection=_BY_SOFTMAX,
        caution=_IMAGES,
    ),
    Architecture(
        name="Qwen3.5-MoE",
        model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
        blocks=(_MLP_OF_TEXT, _MLP),
        mtp_blocks=("mtp.layers.{layer}.mlp.",),
        mtp_keys=("mtp_num_hidden_layers",),
        slots=(_EXPERTS, _STACKED_EXPERTS, _GATE),
        unpruned=_SHARED_EXPERT,
        scoring="softmax",
        selection=_BY_SOFTMAX,
        caution=_IMAGES,
    ),
    replace(
        _DEEPSEEK_V3,
        name="GLM-4.5, 4.6, 4.7",
        model_types=("glm4_moe",),
    ),
    replace(
        _DEEPSEEK_V3,
        name="GLM-4.7-Flash",
        model_types=("glm4_moe_lite",),
    ),
    replace(
        _DEEPSEEK_V3,
        name="GLM-4.5V",
        model_types=("glm4v_moe",),
        mtp_keys=(),
        blocks=(_MLP_OF_TEXT,),
        caution=_IMAGES,
    ),
    replace(
        _DEEPSEEK_V3,
        name="GLM-5",
        model_types=("glm_moe_dsa",),
    ),
    Architecture(
        name="DeepSeek-V2",
        model_types=("deepseek_v2",),
        blocks=(_MLP,),
        slots=(_EXPERTS, _GATE),
        unpruned=_SHARED_EXPERTS,
        num_groups_keys=("n_group",),
        topk_groups_key="topk_group",
        scoring="softmax, groups",
        selection=Selection("softmax", normalise=False, scaling="routed_scaling_factor", group_best=1),
    ),
    _DEEPSEEK_V3,
    replace(
        _DEEPSEEK_V3,
        name="DeepSeek-V3.2",
        model_types=("deepseek_v32",),
    ),
    replace(
        _DEEPSEEK_V3,
        name="Kimi-K2",
        model_types=("kimi_k2",),
        mtp_keys=(),
        runs_as="deepseek_v3",
    ),
    replace(
        _DEEPSEEK_V3,
        name="Kimi-K2.5",
        model_types=("kimi_k25",),
        mtp_keys=(),
        blocks=("language_model.model.layers.{layer}.mlp.",),
        caution=_IMAGES,
    ),
    Architecture(
        name="Kimi-Linear",
        model_types=("kimi_linear",),
        blocks=(_SPARSE,),
        slots=(_EXPERTS, _GATE, _GATE_BIAS),
        unpruned=_SHARED_EXPERTS,
        top_k_keys=("num_experts_per_token", "num_experts_per_tok"),
        num_groups_keys=("num_expert_group",),
        topk_groups_key="topk_group",
        scoring=_SIGMOID_GROUPS,
        selection=_BY_SIGMOID_SCALED,
    ),
    Architecture(
        name="Mixtral",
        model_types=("mixtral",),
        blocks=(_SPARSE,),
        slots=(_EXPERTS, _GATE),
        scoring="softmax",
        selection=_BY_SOFTMAX,
    ),
    Architecture(
        name="Llama-4",
        model_types=("llama4", "llama4_text"),
        blocks=("language_model.model.layers.{layer}.feed_forward.", _FEED_FORWARD),
        slots=(_EXPERTS, _STACKED_EXPERTS, Slot("router.weight", 0, "router")),
        unpruned=_SHARED_EXPERT,
        runs_own_experts=True,
        scoring="sigmoid on the experts' inputs",
        selection=Selection(
            "sigmoid", obstacle="its router's score multiplies what goes into an expert and not what comes out"
        ),
        caution=_IMAGES,
    ),
    Architecture(
        name="ERNIE-4.5",
        model_types=("ernie4_5_moe",),
        blocks=(_MLP,),
        slots=(_EXPERTS, _GATE, Slot("moe_statics.e_score_correction_bias", 1, "bias")),
        unpruned=_SHARED_EXPERTS,
        top_k_keys=("moe_k", "num_experts_per_tok"),
        scoring="softmax + selection bias",
        selection=_BIASED_SOFTMAX,
    ),
    Architecture(
        name="ERNIE-4.5-VL",
        model_types=("ernie4_5_vl_moe", "ernie4_5_moe_vl"),
        blocks=(),
        slots=(),
        scoring="softmax + selection bias, by modality",
        selection=_BIASED_SOFTMAX,
        refusal="ERNIE-4.5-VL has experts for text and others for images in one list, and text alone would remove those for images",
    ),
    Architecture(
        name="gpt-oss",
        model_types=("gpt_oss",),
        blocks=(_MLP,),
        slots=(_STACKED_EXPERTS, Slot("router.weight", 0, "router"), Slot("router.bias", 0, "router")),
        top_k_keys=("num_experts_per_tok", "experts_per_token"),
        interleaved=True,
        scoring="softmax of the chosen",
        selection=_BY_SOFTMAX,
    ),
    Architecture(
        name="OLMoE",
        model_types=("olmoe",),
        blocks=(_MLP,),
        slots=(_EXPERTS, _GATE),
        scoring="softmax",
        selection=_BY_SOFTMAX_MAYBE,
    ),
    Architecture(
        name="Flex-OLMo",
        model_types=("flex_olmo",),
        blocks=(_MLP,),
        slots=(_EXPERTS, _GATE),
        scoring="softmax",
        selection=_BY_SOFTMAX_MAYBE,
    ),
    Architecture(
        name="Granite-MoE, Shared, Hybrid",
        model_types=("granitemoe", "granitemoeshared", "granitemoehybrid"),
        blocks=(_SPARSE,),
        slots=(
            Slot("input_linear.{rest}", 0, "expert"),
            Slot("output_linear.{rest}", 0, "expert"),
            Slot("router.layer.weight", 0, "router"),
        ),
        scoring="softmax of the chosen",
        selection=_BY_SOFTMAX,
    ),
    Architecture(
        name="PhiMoE",
        model_types=("phimoe",),
        blocks=(_SPARSE,),
        slots=(_EXPERTS, _GATE),
        scoring="sparsemixer",
        selection=Selection(
            "softmax",
            obstacle="its sparsemixer weighs each of two experts by those near it, which is no rule of scores and a sum",
        ),
    ),
    replace(
        _DEEPSEEK_V3,
        name="dots1",
        model_types=("dots1",),
        mtp_keys=(),
    ),
    Architecture(
        name="Hunyuan-A13B",
        model_types=("hunyuan_v1_moe",),
        blocks=(_MLP,),
        slots=(_EXPERTS, Slot("gate.wg.weight", 0, "router")),
        unpruned=("shared_mlp.{rest}",),
        top_k_keys=("moe_topk", "num_experts_per_tok"),
        scoring="softmax",
        selection=_BY_SOFTMAX,
    ),
    Architecture(
        name="LFM2-MoE",
        model_types=("lfm2_moe",),
        blocks=(_FEED_FORWARD,),
        slots=(_EXPERTS, _GATE, Slot("expert_bias", 0, "bias")),
        scoring=_SIGMOID,
        selection=Selection(
            "sigmoid", normalise=_RENORMALISED, scaling="routed_scaling_factor", epsilon=1e-6, stream="ffn_norm"
        ),
    ),
    replace(
        _DEEPSEEK_V3,
        name="Nemotron-3",
        model_types=("nemotron_h",),
        selection=replace(_BY_SIGMOID_SCALED, stream="norm"),
        blocks=("backbone.layers.{layer}.mixer.",),
        num_layers_keys=("num_hidden_layers", "layers_block_type", "hybrid_override_pattern"),
        mtp_blocks=("mtp.layers.{layer}.mixer.",),
        unpruned=(*_SHARED_EXPERTS, "fc1_latent_proj.{rest}", "fc2_latent_proj.{rest}"),
    ),
    Architecture(
        name="Step-3.5, 3.7",
        model_types=("step3p5", "step3p7"),
        not_in_transformers=("step3p5",),
        mtp_keys=_NEXT_N,
        blocks=("model.layers.{layer}.moe.", "model.language_model.layers.{layer}.moe."),
        slots=(
            _EXPERTS,
            _GATE,
            Slot("router_bias", 0, "bias"),
            Slot("gate_proj.{rest}", 0, "expert"),
            Slot("up_proj.{rest}", 0, "expert"),
            Slot("down_proj.{rest}", 0, "expert"),
        ),
        top_k_keys=("moe_top_k", "num_experts_per_tok"),
        scoring=_SIGMOID,
        selection=_BY_SIGMOID,
    ),
    Architecture(
        name="MiMo-V2-Flash",
        model_types=("mimo_v2_flash",),
        blocks=(_MLP,),
        slots=(_EXPERTS, _GATE, _GATE_BIAS),
        num_groups_keys=("n_group",),
        topk_groups_key="topk_group",
        scoring=_SIGMOID_GROUPS,
        selection=_BY_SIGMOID_SCALED,
    ),
    Architecture(
        name="Ling, Ring",
        model_types=("bailing_hybrid", "bailing_moe", "bailing_moe_v2", "bailing_moe_linear"),
        not_in_transformers=("bailing_moe", "bailing_moe_v2", "bailing_moe_linear"),
        mtp_keys=("num_nextn_predict_layers", "num_mtp_layers"),
        blocks=(_MLP,),
        slots=(_EXPERTS, _GATE, Slot("gate.expert_bias", 0, "bias")),
        unpruned=_SHARED_EXPERTS,
        top_k_keys=("num_experts_per_tok", "num_experts_per_token"),
        num_groups_keys=("n_group", "num_expert_group"),
        topk_groups_key="topk_group",
        scoring=_SIGMOID_GROUPS,
        selection=_BY_SIGMOID_SCALED,
    ),
    Architecture(
        name="LongCat-Flash",
        model_types=("longcat_flash",),
        blocks=(_MLP,),
        slots=(
            _EXPERTS,
            Slot("router.classifier.weight", 0, "router", "experts and zero experts"),
            Slot("router.classifier.bias", 0, "router", "experts and zero experts"),
            Slot("router.e_score_correction_bias", 0, "bias", "experts and zero experts"),
        ),
        top_k_keys=("moe_topk", "num_experts_per_tok"),
        num_layers_keys=("num_layers",),
        num_zero_experts_key="zero_expert_num",
        scoring="softmax + selection bias",
        selection=_BIASED_SOFTMAX,
    ),
    Architecture(
        name="AFMoE, Trinity",
        model_types=("afmoe",),
        blocks=(_MLP,),
        slots=(_EXPERTS, Slot("router.gate.weight", 0, "router"), Slot("expert_bias", 0, "bias")),
        unpruned=_SHARED_EXPERTS,
        num_groups_keys=("n_group",),
        topk_groups_key="topk_group",
        scoring=_SIGMOID_GROUPS,
        selection=Selection("sigmoid", scaling="route_scale", epsilon=1e-20, stream="pre_mlp_layernorm"),
    ),
    Architecture(
        name="Jamba",
        model_types=("jamba",),
        blocks=(_FEED_FORWARD,),
        slots=(_EXPERTS, Slot("router.weight", 0, "router")),
        scoring="softmax",
        selection=Selection("softmax", normalise=False, stream="pre_ff_layernorm"),
    ),
    Architecture(
        name="DBRX",
        model_types=("dbrx",),
        blocks=("transformer.blocks.{layer}.ffn.",),
        slots=(
            Slot("experts.mlp.{rest}", 0, "expert", "rows of experts"),
            Slot("router.layer.weight", 0, "router"),
        ),
        top_k_keys=("moe_top_k",),
        num_layers_keys=("n_layers",),
        experts_section="ffn_config",
        scoring="softmax",
        selection=Selection("softmax", stream="norm_2"),
    ),
    Architecture(
        name="Gemma-4",
        model_types=("gemma4",),
        blocks=("model.language_model.layers.{layer}.",),
        slots=(
            _STACKED_EXPERTS,
            Slot("router.proj.weight", 0, "router"),
            Slot("router.per_expert_scale", 0, "router"),
        ),
        unpruned=("self_attn.{rest}", "mlp.{rest}", "router.scale"),
        top_k_keys=("top_k_experts", "num_experts_per_tok"),
        scoring="softmax x scale per expert",
        selection=Selection("softmax", expert_scale="router.per_expert_scale", stream="pre_feedforward_layernorm"),
        caution=_IMAGES,
    ),
    Architecture(
        name="EXAONE-MoE",
        model_types=("exaone_moe",),
        blocks=(_MLP,),
        slots=(_EXPERTS, _GATE, _BLOCK_BIAS, _GATE_BIAS),
        unpruned=_SHARED_EXPERTS,
        num_groups_keys=("n_group",),
        topk_groups_key="topk_group",
        scoring=_SIGMOID_GROUPS,
        selection=_BY_SIGMOID_SCALED,
    ),
    replace(
        _DEEPSEEK_V3,
        name="Solar-Open",
        model_types=("solar_open",),
        mtp_keys=(),
    ),
)


def rerouted(entry: Architecture) -> str:
    """Whether re-routed errors are defined by the family's selection rule."""
    selection = entry.selection
    if entry.refusal or selection.obstacle or (selection.scoring == "softmax" and selection.normalise is False):
        return "no"
    return (
        f"where {selection.normalise}"
        if selection.scoring == "softmax" and isinstance(selection.normalise, str)
        else "yes"
    )


def described(entry: Architecture) -> dict[str, Any]:
    """What works, for people: a row of `reapkit list architectures`."""
    works = "no" if entry.refusal else "yes"
    run = [name for name in entry.model_types if name not in entry.not_in_transformers]
    return {
        "family": entry.name,
        "model_type": list(entry.model_types),
        "routing": entry.scoring,
        "observe": works if len(run) == len(entry.model_types) else f"{', '.join(run)} only",
        "prune": works,
        "reroute": rerouted(entry),
        "merge": "no" if entry.refusal or entry.runs_own_experts else "yes",
        "formats": "no" if entry.refusal else "all",
        "mtp": "kept or dropped" if entry.mtp_keys else "-",
        "note": entry.refusal or entry.caution or "",
    }
