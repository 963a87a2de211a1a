"""Tiny random checkpoints in the vendors' on-disk layouts, made in a second and different in every tensor."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

NUM_EXPERTS = 8
NUM_LAYERS = 3
TOP_K = 2
# As the vendor has it. The FP8 fixture is 256 wide, two whole blocks, with experts of 64, half a block: transformers derives a block's
# size from the grid, so it agrees with the vendor's 128 only where a dimension is whole blocks or less than one.
BLOCK = (128, 128)

SIDECARS = {
    "tokenizer.json": b'{"version": "1.0",  "model": {"type": "BPE"}}\n',
    "chat_template.jinja": "{{ messages }} \u2014 <minimax:tool_call>\r\n".encode(),
    "generation_config.json": b'{"eos_token_id": 1}',
    "LICENSE": b"a licence\n",
    "modeling_minimax_m2.py": b"raise SystemExit('remote code ran')\n",
    "assets/vocabulary.txt": b"a\nb\n",
}
NOT_CARRIED = {
    "README.md": b"# the source's card\n",
    "pytorch_model.bin": b"\x80\x04.",
    "stray.safetensors": b"not even safetensors",
    "original/model.safetensors": b"a copy in another layout",
    ".gitattributes": b"* text\n",
}


def make_m2(folder: Path, *, seed: int = 0, hidden: int = 64, width: int = 32) -> Path:
    """A MiniMax-M2 in float32 with a selection bias, in shards so small that one layer's experts lie in several."""
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    torch.manual_seed(seed)
    config = MiniMaxM2Config(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts_per_tok=TOP_K,
        num_local_experts=NUM_EXPERTS,
        rotary_dim=16,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = MiniMaxM2ForCausalLM(config)
    _randomise(model)
    for layer in model.model.layers:
        # As wide as the scores' own spread, so that it changes which experts are chosen.
        layer.mlp.e_score_correction_bias.copy_(torch.randn(NUM_EXPERTS) * 0.2)
    _save(model, folder)
    return folder


def make_qwen3(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen3-MoE in float32, likewise."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=NUM_LAYERS,
        mlp_only_layers=[1],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts_per_tok=TOP_K,
        num_experts=NUM_EXPERTS,
        norm_topk_prob=True,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = Qwen3MoeForCausalLM(config)
    _randomise(model)
    _save(model, folder)
    return folder


def _randomise(model: torch.nn.Module) -> None:
    """Weights large enough that every expert matters to the logits, and norms that are not all ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name, content in {**SIDECARS, **NOT_CARRIED}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    # Keys in the vendor's places, that transformers drops or moves.
    config = read_json(folder / "config.json")
    if config["model_type"] == "minimax_m2":
        config |= {"use_mtp": True, "num_mtp_modules": 3, "use_routing_bias": True, "scoring_func": "sigmoid"}
        config["rms_norm_eps"] = 1e-6
    write_json(folder / "config.json", config)


def make_fp8(source: Path, folder: Path) -> Path:
    """The same M2 in FP8 with a scale per 128x128 block, as the vendor stores it: router and selection bias in F32, the rest in BF16.

    The scales of one shard's last weight lie in the next shard, as a size limit can leave them.
    """
    shutil.copytree(source, folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        tensors.update(load_file(file))
        file.unlink()
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if "experts." in name or ("self_attn" in name and tensor.ndim == 2):
            stored[name], stored[name + "_scale_inv"] = quantize(tensor)
        elif name.endswith(("block_sparse_moe.gate.weight", "e_score_correction_bias")):
            stored[name] = tensor.float()
        else:
            stored[name] = tensor.bfloat16()
    names = list(stored)
    cuts = [0]
    while cuts[-1] < len(names):
        # An odd number of tensors, so that weights and their scales are parted.
        cuts.append(min(cuts[-1] + 31, len(names)))
    shards = [names[start:stop] for start, stop in itertools.pairwise(cuts)]
    weight_map: dict[str, str] = {}
    for number, part in enumerate(shards):
        # The vendor's numbers begin at 0 and promise more files than there are.
        shard = f"model-{number:05d}-of-00130.safetensors"
        save_file({name: stored[name] for name in part}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    total = sum(tensor.nbytes for tensor in stored.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = read_json(folder / "config.json")
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    }
    write_json(folder / "config.json", config)
    return folder


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values and the scale of every block; blocks at the edges may be partial."""
    rows, columns = weight.shape
    grid = torch.empty(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i, j in torch.cartesian_prod(torch.arange(grid.shape[0]), torch.arange(grid.shape[1])).tolist():
        at = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
        grid[i, j] = weight[at].abs().max() / 448.0
        values[at] = (weight[at] / grid[i, j]).to(torch.float8_e4m3fn)
    return values, grid


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by the index and by a reader that is not reapkit's."""
    index = read_json(folder / "model.safetensors.index.json")["weight_map"]
    loaded = {file: load_file(folder / file) for file in set(index.values())}
    return {name: loaded[file][name] for name, file in index.items()}


def read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_bytes())
    assert isinstance(value, dict)
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def add_tokenizer(folder: Path) -> Path:
    """Put a tokenizer that gives every printable ASCII character a token (ids 3 to 98) and adds none, in the place of the fake one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = [*"<>|", *(chr(code) for code in range(32, 127)), "\n"]
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {
        character: number for number, character in enumerate(sorted(set(characters)), start=3)
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>"}
    write_json(folder / "tokenizer_config.json", {**described, "unk_token": "<unk>"})
    return folder
