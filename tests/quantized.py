"""Tiny quantised checkpoints in the layouts of public releases, made by rounding the weights of a plain one.

The packers are written from the formats' descriptions and share nothing with reapkit.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP = 32

Pack = Callable[[str, Tensor], dict[str, Tensor]]


def to_words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [M, N] as int32 words [M, N bits/32], the first in the lowest bits; N is padded to whole words."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % per_word))
    words = sum(padded[:, place::per_word] << (bits * place) for place in range(per_word))
    assert isinstance(words, Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def to_exponents(scale: Tensor) -> Tensor:
    """The smallest power of two that is no less than a scale, as a byte."""
    return (torch.log2(scale).ceil() + 127).to(torch.uint8)


def to_fp4(values: Tensor) -> Tensor:
    """The nearest FP4 values [M, N], two in a byte [M, N/2], the first in the lower half."""
    codes = (values.abs().unsqueeze(-1) - E2M1).abs().argmin(-1) + 8 * (values < 0)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def groups(weight: Tensor, size: int) -> Tensor:
    return weight.float().unflatten(-1, (-1, size))


def fp8_blocks(
    name: str, weight: Tensor, *, scale: Callable[[Tensor], Tensor] = lambda grid: grid
) -> dict[str, Tensor]:
    """FP8 [M, N] and `_scale_inv` [M/128, N/128], rounded up."""
    values, grid = tiny.quantize(weight.float())
    return {name: values, name + "_scale_inv": scale(grid)}


def fp8_power_blocks(name: str, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same with scales that are powers of two: bytes (U8 or E8M0), or the float32 numbers themselves."""
    _, grid = tiny.quantize(weight.float())
    exponents = to_exponents(grid)
    spread = (exponents.float() - 127).exp2().repeat_interleave(128, 0).repeat_interleave(128, 1)
    values = (weight.float() / spread[: weight.shape[0], : weight.shape[1]]).to(torch.float8_e4m3fn)
    scale = (exponents.float() - 127).exp2() if dtype == torch.float32 else exponents.view(dtype)
    return {name: values, name + "_scale_inv": scale}


def fp8_rows(name: str, weight: Tensor) -> dict[str, Tensor]:
    """FP8 [M, N] and `_scale` bf16 [M, 1], as compressed-tensors has it per channel."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    return {name: (weight.float() / scale.float()).to(torch.float8_e4m3fn), name + "_scale": scale}


def fp8_tensor(name: str, weight: Tensor) -> dict[str, Tensor]:
    """FP8 [M, N] and one `_scale` float32, with the scale of the inputs."""
    scale = weight.float().abs().amax() / 448
    stem = name.removesuffix("weight")
    return {
        name: (weight.float() / scale).to(torch.float8_e4m3fn),
        name + "_scale": scale,
        stem + "input_scale": torch.ones(()),
    }


def mxfp8(name: str, weight: Tensor, *, suffix: str = "_scale_inv") -> dict[str, Tensor]:
    """FP8 [M, N] with an exponent for every 32 values of a row, U8 [M, N/32]."""
    exponents = to_exponents(groups(weight, 32).abs().amax(-1) / 448)
    values = groups(weight, 32) / (exponents.float() - 127).exp2().unsqueeze(-1)
    return {name: values.flatten(-2).to(torch.float8_e4m3fn), name + suffix: exponents}


def int_groups(name: str, weight: Tensor, *, bits: int = 4, size: int = GROUP) -> dict[str, Tensor]:
    """compressed-tensors' `pack-quantized`, symmetric: int32 [M, N bits/32], `_scale` bf16 [M, N/size], `_shape` [2]."""
    half = 1 << (bits - 1)
    scale = (groups(weight, size).abs().amax(-1) / (half - 0.5)).bfloat16()
    codes = (groups(weight, size) / scale.float().unsqueeze(-1)).round().clamp(-half, half - 1) + half
    return {
        name + "_packed": to_words(codes.flatten(-2), bits),
        name + "_scale": scale,
        name + "_shape": torch.tensor(weight.shape),
    }


def affine(weight: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [M, N], scales fp16 [M, G] and zero points [M, G] that span every group's values, with the codes 1 to 2^bits - 1."""
    low, high = groups(weight, size).aminmax(dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / ((1 << bits) - 2)).half()
    zeros = (1 - low / scale.float()).round()
    codes = (groups(weight, size) / scale.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    return codes.clamp(0, (1 << bits) - 1).flatten(-2), scale, zeros


def int_affine(name: str, weight: Tensor, *, bits: int = 4, size: int = GROUP) -> dict[str, Tensor]:
    """compressed-tensors' `pack-quantized` with zero points, packed along the rows: int32 [M bits/32, N/size]."""
    codes, scale, zeros = affine(weight, bits, size)
    return {
        name + "_packed": to_words(codes, bits),
        name + "_scale": scale.bfloat16(),
        name + "_zero_point": to_words(zeros.T, bits).T.contiguous(),
        name + "_shape": torch.tensor(weight.shape),
    }


def awq(name: str, weight: Tensor, *, size: int = GROUP) -> dict[str, Tensor]:
    """AWQ `gemm`: int32 [N, M/8] and [G, M/8] in AWQ's order, scales fp16 [G, M]."""
    codes, scale, zeros = affine(weight, 4, size)
    stem = name.removesuffix("weight")

    def packed(values: Tensor) -> Tensor:
        return to_words(values.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1), 4)

    return {
        stem + "qweight": packed(codes.T),
        stem + "qzeros": packed(zeros.T),
        stem + "scales": scale.T.contiguous(),
    }


def gptq(
    name: str, weight: Tensor, *, bits: int = 4, size: int = GROUP, less: int = 1, mixed: bool = False
) -> dict[str, Tensor]:
    """GPTQ: int32 [N bits/32, M], zero points less one [G, M bits/32], scales fp16 [G, M], `g_idx` [N].

    With `mixed` the columns are in another order than their groups, as act-order leaves them.
    """
    columns = weight.shape[1]
    order = (
        torch.randperm(columns, generator=torch.Generator().manual_seed(columns)) if mixed else torch.arange(columns)
    )
    sorted_codes, scale, zeros = affine(weight[:, order], bits, size)
    codes, group = torch.empty_like(sorted_codes), torch.empty(columns, dtype=torch.int32)
    codes[:, order], group[order] = sorted_codes, (torch.arange(columns) // size).int()
    stem = name.removesuffix("weight")
    return {
        stem + "qweight": to_words(codes, bits).T.contiguous(),
        stem + "qzeros": to_words((zeros.T - less) % (1 << bits), bits),
        stem + "scales": scale.T.contiguous(),
        stem + "g_idx": group,
    }


def nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FP4 [M, N/2], its scales FP8 [M, N/16], and the factor float32 that multiplies those."""
    factor = weight.float().abs().amax() / (6 * 448)
    scale = (groups(weight, 16).abs().amax(-1) / 6 / factor).to(torch.float8_e4m3fn)
    values = groups(weight, 16) / (scale.float() * factor).clamp(min=1e-30).unsqueeze(-1)
    return to_fp4(values.flatten(-2)), scale, factor


def nvfp4_modelopt(name: str, weight: Tensor) -> dict[str, Tensor]:
    packed, scale, factor = nvfp4(weight)
    stem = name.removesuffix("weight")
    return {name: packed, name + "_scale": scale, name + "_scale_2": factor, stem + "input_scale": torch.ones(())}


def nvfp4_compressed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """With the reciprocal of the factor."""
    packed, scale, factor = nvfp4(weight)
    stem = name.removesuffix("weight")
    return {
        name + "_packed": packed,
        name + "_scale": scale,
        name + "_global_scale": (1 / factor).reshape(1),
        stem + "input_global_scale": torch.ones(1),
    }


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP4 [.., M, N/2] and an exponent for every 32 values of a row, U8 [.., M, N/32]."""
    exponents = to_exponents(groups(weight, 32).abs().amax(-1) / 6)
    values = groups(weight, 32) / (exponents.float() - 127).exp2().unsqueeze(-1)
    return to_fp4(values.flatten(-2)), exponents


def mxfp4_compressed(name: str, weight: Tensor) -> dict[str, Tensor]:
    packed, exponents = mxfp4(weight)
    return {name + "_packed": packed, name + "_scale": exponents}


def mxfp4_blocks(name: str, weight: Tensor) -> dict[str, Tensor]:
    """gpt-oss: a stack [E, N, M] as `_blocks` U8 [E, M, N/32, 16] and `_scales` U8 [E, M, N/32]."""
    packed, exponents = mxfp4(weight.transpose(1, 2))
    return {name + "_blocks": packed.unflatten(-1, (-1, 16)), name + "_scales": exponents}


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
# Every scheme: how one matrix is packed, what the config says, its name for people, and how far values may be off, in parts of the
# largest value of the matrix.
SCHEMES: Mapping[str, tuple[Pack, dict[str, Any], str, float]] = {
    "fp8-block": (fp8_blocks, FP8, "FP8 with block scales", 0.04),
    "fp8-block-bf16": (
        lambda name, weight: fp8_blocks(name, weight, scale=Tensor.bfloat16), FP8, "FP8 with block scales", 0.04,
    ),
    "fp8-block-e8m0": (
        lambda name, weight: fp8_power_blocks(name, weight, torch.float8_e8m0fnu), FP8 | {"scale_fmt": "ue8m0"},
        "FP8 with block scales", 0.04,
    ),
    "fp8-block-powers": (
        lambda name, weight: fp8_power_blocks(name, weight, torch.float32), FP8 | {"scale_fmt": "ue8m0"},
        "FP8 with block scales", 0.04,
    ),
    "fp8-tensor": (fp8_tensor, {"quant_method": "fp8"}, "FP8 with a scale per tensor", 0.04),
    "fp8-channel": (
        fp8_rows, compressed("float-quantized", num_bits=8, type="float", strategy="channel"), "FP8 (compressed-tensors)", 0.04,
    ),
    "fp8-modelopt": (fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}, "FP8 (ModelOpt)", 0.04),
    "mxfp8": (mxfp8, {"quant_method": "mxfp8", "weight_block_size": [1, 32]}, "MXFP8", 0.04),
    "mxfp8-modelopt": (
        lambda name, weight: mxfp8(name, weight, suffix="_scale"), {"quant_method": "modelopt", "quant_algo": "MXFP8"},
        "MXFP8 (ModelOpt)", 0.04,
    ),
    "int4": (int_groups, compressed("pack-quantized", **INT4), "INT4 (compressed-tensors)", 0.08),
    "int8": (
        lambda name, weight: int_groups(name, weight, bits=8), compressed("pack-quantized", **(INT4 | {"num_bits": 8})),
        "INT8 (compressed-tensors)", 0.01,
    ),
    "int4-zeros": (
        int_affine, compressed("pack-quantized", **(INT4 | {"symmetric": False})), "INT4 (compressed-tensors)", 0.12,
    ),
    "awq": (
        awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, "INT4 (AWQ)", 0.1,
    ),
    "gptq": (
        gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}, "INT4 (GPTQ)", 0.1,
    ),
    "gptq-int8": (
        lambda name, weight: gptq(name, weight, bits=8, mixed=True),
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "desc_act": True, "checkpoint_format": "gptq"},
        "INT8 (GPTQ)", 0.01,
    ),
    "gptq-v2": (
        lambda name, weight: gptq(name, weight, less=0, mixed=True),
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "checkpoint_format": "gptq_v2"},
        "INT4 (GPTQ)", 0.1,
    ),
    "nvfp4-modelopt": (nvfp4_modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4 (ModelOpt)", 0.2),
    "nvfp4": (
        nvfp4_compressed,
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        "NVFP4 (compressed-tensors)", 0.2,
    ),
    "mxfp4": (
        mxfp4_compressed, compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        "MXFP4 (compressed-tensors)", 0.2,
    ),
}  # fmt: skip


def make(
    source: Path, folder: Path, scheme: str, *, wanted: str = r".*\.experts\..*|.*self_attn\..*_proj\.weight"
) -> Path:
    """A copy of a tiny checkpoint whose matrices of the wanted names are quantised, and all others bf16, in two shards.

    Companions lie in another shard than some of their weights, as a size limit can leave them.
    """
    pack, quantization, _, _ = SCHEMES[scheme]
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model*.safetensors", "model.safetensors.index.json"))
    stored: dict[str, Tensor] = {}
    for name, tensor in tiny.load_tensors(source).items():
        is_wanted = tensor.ndim == 2 and re.fullmatch(wanted, name)
        stored |= pack(name, tensor) if is_wanted else {name: tensor.bfloat16()}
    names = list(stored)
    cut = len(names) // 2 | 1
    weight_map: dict[str, str] = {}
    for number, (start, stop) in enumerate(itertools.pairwise((0, cut, len(names))), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file(
            {name: stored[name].contiguous() for name in names[start:stop]}, folder / shard, metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(names[start:stop], shard)
    total = sum(tensor.nbytes for tensor in stored.values())
    tiny.write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    config = tiny.read_json(folder / "config.json") | {"dtype": "bfloat16", "quantization_config": quantization}
    tiny.write_json(folder / "config.json", config)
    return folder
