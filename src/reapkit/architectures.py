"""The families that reapkit knows: one entry each, data only."""

from __future__ import annotations

from reapkit.layout import Architecture, Slot

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        name="MiniMax-M2",
        model_types=("minimax_m2",),
        block="model.layers.{layer}.block_sparse_moe.",
        slots=(
            Slot("model.layers.{layer}.block_sparse_moe.experts.{expert}.{rest}", None, "expert"),
            Slot("model.layers.{layer}.block_sparse_moe.gate.weight", 0, "router"),
            Slot("model.layers.{layer}.block_sparse_moe.e_score_correction_bias", 0, "bias"),
        ),
        num_experts_keys=("num_local_experts", "num_experts"),
        top_k_keys=("num_experts_per_tok",),
        scoring="sigmoid + selection bias",
    ),
    Architecture(
        name="Qwen3-MoE",
        model_types=("qwen3_moe",),
        block="model.layers.{layer}.mlp.",
        slots=(
            Slot("model.layers.{layer}.mlp.experts.{expert}.{rest}", None, "expert"),
            Slot("model.layers.{layer}.mlp.gate.weight", 0, "router"),
        ),
        num_experts_keys=("num_experts", "num_local_experts"),
        top_k_keys=("num_experts_per_tok",),
        scoring="softmax",
    ),
)
