"""MiniMax-M2's layout on disk: block-wise FP8 tensors with their scales, one tensor per expert, F32 routers, a few shards.

Shapes: R rows, C columns of a weight (the last two dimensions), b and c blocks of 128 along them.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

BLOCK = 128
FP8_MAX = 448.0  # largest finite float8_e4m3fn
NUM_SHARDS = 3
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

CONFIG = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [1] * 6,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 196608,
    "model_type": "minimax_m2",
    "mtp_transformer_layers": 1,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 48,
    "num_mtp_modules": 3,
    "output_router_logits": False,
    "qk_norm_type": "per_layer",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    },
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "tie_word_embeddings": False,
    "transformers_version": "4.46.1",
    "use_cache": True,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 2048,
}
GENERATION = {
    "bos_token_id": 0,
    "do_sample": True,
    "eos_token_id": 1,
    "pad_token_id": 3,
    "temperature": 1.0,
    "top_k": 40,
    "top_p": 0.95,
    "transformers_version": "4.46.1",
}


def quantize(weight_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values [..., R, C] and the float32 scales [..., b, c] that each 128 x 128 block has to be multiplied with."""
    *lead, rows, columns = weight_RC.shape
    if rows % BLOCK or columns % BLOCK:
        raise ValueError(f"a weight of {rows} x {columns} has no whole {BLOCK} x {BLOCK} blocks")
    blocks = weight_RC.float().reshape(*lead, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale_bc = blocks.abs().amax(dim=(-3, -1)).clamp(min=1e-12) / FP8_MAX
    values = (blocks / scale_bc[..., :, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return values.reshape(weight_RC.shape), scale_bc


def dequantize(values_RC: torch.Tensor, scale_bc: torch.Tensor) -> torch.Tensor:
    *lead, rows, columns = values_RC.shape
    blocks = values_RC.float().reshape(*lead, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    return (blocks * scale_bc[..., :, None, :, None]).reshape(values_RC.shape)


def disk_tensors(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on disk, in the vendor's names, dtypes and order, from transformers' names (`mlp.experts.gate_up_proj`...)."""
    found: dict[str, torch.Tensor] = {}

    def put_fp8(name: str, weight: torch.Tensor) -> None:
        values, scale = quantize(weight)
        found[f"{name}.weight"], found[f"{name}.weight_scale_inv"] = values.contiguous(), scale.contiguous()

    found["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].bfloat16()
    layers = sorted({int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")})
    for layer in layers:
        prefix = f"model.layers.{layer}"
        for name in ATTENTION:
            put_fp8(f"{prefix}.self_attn.{name}", weights[f"{prefix}.self_attn.{name}.weight"])
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{name}.weight"] = weights[f"{prefix}.{name}.weight"].bfloat16()
        moe = f"{prefix}.block_sparse_moe"
        found[f"{moe}.gate.weight"] = weights[f"{prefix}.mlp.gate.weight"].float()
        found[f"{moe}.e_score_correction_bias"] = weights[f"{prefix}.mlp.e_score_correction_bias"].float()
        gate_up, down = weights[f"{prefix}.mlp.experts.gate_up_proj"], weights[f"{prefix}.mlp.experts.down_proj"]
        for expert in range(len(down)):
            w1, w3 = gate_up[expert].chunk(2)
            for name, weight in (("w1", w1), ("w2", down[expert]), ("w3", w3)):
                put_fp8(f"{moe}.experts.{expert}.{name}", weight)
    found["model.norm.weight"] = weights["model.norm.weight"].bfloat16()
    found["lm_head.weight"] = weights["lm_head.weight"].bfloat16()
    return found


def write_checkpoint(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Shards, index, config.json and generation_config.json; the tokenizer's files are not touched."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in disk_tensors(weights).items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(NUM_SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shards[min(written * NUM_SHARDS // total, NUM_SHARDS - 1)][name] = tensor
        written += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{NUM_SHARDS:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=0) + "\n")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
