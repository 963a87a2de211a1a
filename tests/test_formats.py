"""Stored bytes become exactly the values that they stand for, or a clear error.

Every routine is held against the format's own library, or against a loop over single values that shares nothing with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import quantized
import tiny
from reapkit.checkpoint import Checkpoint
from reapkit.errors import CheckpointError, UnsupportedError
from reapkit.formats import (
    E2M1,
    as_factors,
    decode,
    dequantize_awq,
    dequantize_blocks,
    dequantize_fp4,
    dequantize_gptq,
    dequantize_int,
    read_tensor,
    unpack,
)
from reapkit.quantization import Format, read_format
from reapkit.tensors import TensorInfo

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_fp8(*shape: int, seed: int) -> Tensor:
    """Every one of the 254 finite values, at every place."""
    codes = torch.randint(0, 254, shape, generator=seeded(seed))
    return (codes + (codes >= 0x7F).int()).to(torch.uint8).view(torch.float8_e4m3fn)


def random_bytes(*shape: int, seed: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, generator=seeded(seed), dtype=torch.uint8)


def random_words(*shape: int, seed: int) -> Tensor:
    """int32 of every bit pattern."""
    return random_bytes(*shape[:-1], 4 * shape[-1], seed=seed).view(torch.int32)


def random_scale(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (torch.rand(shape, generator=seeded(seed)) * 0.01 + 1e-4).to(dtype)


def random_blocks(rows: int, columns: int, scale_dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    shape = (-(-rows // 128), -(-columns // 128))
    return random_fp8(rows, columns, seed=seed), random_scale(*shape, dtype=scale_dtype, seed=seed)


def checkpoint_of(folder: Path, tensors: dict[str, Tensor], quantization: Any = None) -> tuple[Checkpoint, Format]:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    tiny.write_json(folder / "config.json", {"quantization_config": quantization} if quantization else {})
    checkpoint = Checkpoint.open(folder)
    return checkpoint, read_format(checkpoint)


def decoded(
    folder: Path, tensors: dict[str, Tensor], quantization: Any, name: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    checkpoint, format = checkpoint_of(folder, tensors, quantization)
    return decode(checkpoint, checkpoint.tensors[name], format=format, dtype=dtype)


# --- what is stored plainly


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", [None, FP8, MODELOPT])
def test_plain_tensors_are_given_as_stored(tmp_path: Path, dtype: torch.dtype, quantization: Any) -> None:
    value = torch.randn(5, 7).to(dtype)
    checkpoint, format = checkpoint_of(
        tmp_path, {"odd": torch.ones(1), "w": value, "z": torch.empty(0, 3)}, quantization
    )
    for name, stored in (("w", value), ("z", torch.empty(0, 3))):
        found = decode(checkpoint, checkpoint.tensors[name], format=format, dtype=torch.float32)
        assert found.dtype == stored.dtype and torch.equal(found, stored)


def test_decoded_weights_are_aligned_wherever_they_lie_on_disk(tmp_path: Path) -> None:
    """Products with a single token round differently on weights that are not, so the same run could give other bits."""
    tensors = {f"w{number}": torch.randn(number + 1, 3) for number in range(20)}
    checkpoint, format = checkpoint_of(tmp_path, tensors)
    for name, info in checkpoint.tensors.items():
        found = decode(checkpoint, info, format=format, dtype=torch.float32)
        assert found.data_ptr() % 64 == 0 and torch.equal(found, tensors[name])


# --- FP8 and INT8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (64, 128), (128, 32)])
def test_dequantising_equals_transformers_bit_for_bit(
    shape: tuple[int, int], scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = random_blocks(*shape, scale_dtype, seed=sum(shape))
    reference = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=dtype)
    assert torch.equal(dequantize_blocks(weight, scale, block=(128, 128), dtype=dtype), reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(140, 40), (1, 129), (130, 1)])
def test_dequantising_partial_blocks_equals_a_loop(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, scale = random_blocks(*shape, torch.float32, seed=sum(shape))
    reference = torch.empty(shape, dtype=dtype)
    for row in range(shape[0]):
        for column in range(shape[1]):
            value = weight[row, column].float() * scale[row // 128, column // 128]
            reference[row, column] = value.to(dtype)
    assert torch.equal(dequantize_blocks(weight, scale, block=(128, 128), dtype=dtype), reference)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("block", [(4, 8), (16, 16), (5, 7)])
def test_every_byte_is_dequantised_as_torch_reads_it(stored: torch.dtype, block: tuple[int, int]) -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(stored).view(16, 16)
    scale = torch.rand(-(-16 // block[0]), -(-16 // block[1])) + 0.5
    row, column = torch.arange(16)[:, None] // block[0], torch.arange(16)[None] // block[1]
    found = dequantize_blocks(weight, scale, block=block, dtype=torch.float32)
    torch.testing.assert_close(found, weight.float() * scale[row, column], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_bytes_of_scales_are_exponents(dtype: torch.dtype) -> None:
    exponents = torch.arange(256, dtype=torch.uint8)
    factors = as_factors(exponents.view(dtype))
    assert factors[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert factors[255].isnan()
    assert as_factors(torch.tensor([0.3])).tolist() == torch.tensor([0.3]).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("block", "suffix", "scale_dtype"),
    [
        ((128, 128), "_scale_inv", torch.float32),
        ((128, 128), "_scale_inv", torch.bfloat16),
        ((128, 128), "_scale_inv", torch.uint8),
        ((128, 128), "_scale_inv", torch.float8_e8m0fnu),
        ((1, 32), "_scale_inv", torch.uint8),
        ((1, 32), "_scale_inv", torch.float8_e8m0fnu),
    ],
)
@pytest.mark.parametrize("experts", [None, 3])
def test_fp8_decodes_to_what_transformers_makes_of_it(
    experts: int | None, block: tuple[int, int], suffix: str, scale_dtype: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:  # fmt: skip
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    lead = () if experts is None else (experts,)
    grid = (*lead, 256 // block[0], 128 // block[1])
    weight = random_fp8(*lead, 256, 128, seed=1)
    if scale_dtype.itemsize == 1:
        scale = random_bytes(*grid, seed=2, low=100, high=130).view(scale_dtype)
    else:
        scale = random_scale(*grid, dtype=scale_dtype, seed=2)
    reference = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=dtype)
    for name in ("moe.gate_proj.weight", "experts.gate_up_proj"):
        tensors = {name: weight, name + suffix: scale}
        found = decoded(tmp_path, tensors, FP8 | {"weight_block_size": list(block)}, name, dtype)
        assert found.dtype == dtype and torch.equal(found, reference)


def test_scales_that_are_powers_of_two_are_the_same_as_numbers_and_as_exponents(tmp_path: Path) -> None:
    weight, exponents = random_fp8(130, 200, seed=3), random_bytes(2, 2, seed=3, low=110, high=140)
    values = [
        decoded(tmp_path, {"a": weight, "a_scale_inv": scale}, FP8 | {"scale_fmt": "ue8m0"}, "a", torch.bfloat16)
        for scale in (as_factors(exponents), exponents, exponents.view(torch.float8_e8m0fnu))
    ]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert values[0][129, 0] == (weight[129, 0].float() * 2.0 ** (int(exponents[1, 0]) - 127)).bfloat16()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("weight_shape", "scale_shape"),
    [
        ((6, 4), ()), ((6, 4), (1,)), ((6, 4), (1, 1)), ((6, 4), (6, 1)), ((6, 4), (6,)),
        ((3, 6, 4), ()), ((3, 6, 4), (3,)), ((3, 6, 4), (3, 1, 1)), ((3, 6, 4), (3, 6, 1)), ((3, 6, 4), (3, 6)),
    ],
)  # fmt: skip
def test_a_scale_per_tensor_expert_or_row_multiplies_just_those(
    weight_shape: tuple[int, ...], scale_shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    weight, scale = random_fp8(*weight_shape, seed=4), random_scale(*scale_shape, dtype=torch.float32, seed=5)
    tensors = {"a.weight": weight, "a.weight_scale": scale, "a.input_scale": torch.ones(())}
    found = decoded(tmp_path, tensors, {"quant_method": "fp8"}, "a.weight", dtype)
    per_row = len(scale_shape) and scale_shape[-2 if scale_shape[-1] == 1 and len(scale_shape) > 1 else -1] == 6
    for index in torch.cartesian_prod(*(torch.arange(size) for size in weight_shape)).tolist():
        row, expert = index[-2], index[0] if len(index) == 3 else 0
        place = (expert * 6 + row if per_row else expert) if scale.numel() > 1 else 0
        assert found[tuple(index)] == (weight[tuple(index)].float() * scale.flatten()[place]).to(dtype)


def test_a_whole_fp8_checkpoint_decodes_to_what_transformers_loads(m2_fp8: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(m2_fp8)
    format = read_format(checkpoint)
    loaded = AutoModelForCausalLM.from_pretrained(m2_fp8, dtype=torch.bfloat16).state_dict()
    for layer in range(tiny.NUM_LAYERS):
        prefix, block = f"model.layers.{layer}.", f"model.layers.{layer}.block_sparse_moe.experts."

        def value(name: str) -> Tensor:
            return decode(checkpoint, checkpoint.tensors[name], format=format, dtype=torch.bfloat16)

        for part in "qkvo":
            name = f"{prefix}self_attn.{part}_proj.weight"
            assert torch.equal(value(name), loaded[name])
        for expert in range(tiny.NUM_EXPERTS):
            gate, down, up = (value(f"{block}{expert}.{part}.weight") for part in ("w1", "w2", "w3"))
            assert torch.equal(torch.cat((gate, up)), loaded[f"{prefix}mlp.experts.gate_up_proj"][expert])
            assert torch.equal(down, loaded[f"{prefix}mlp.experts.down_proj"][expert])


# --- packed integers


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_values_are_read_from_the_lowest_bits_up(bits: int) -> None:
    words = random_words(3, 5, seed=bits)
    per_word = 32 // bits
    for row, line in enumerate(words.tolist()):
        number = sum((word % (1 << 32)) << (32 * place) for place, word in enumerate(line))
        expected = [(number >> (bits * place)) % (1 << bits) for place in range(5 * per_word)]
        assert unpack(words, bits)[row].tolist() == expected


def test_integers_of_compressed_tensors_by_hand() -> None:
    packed, scale = torch.tensor([[0x76543210]], dtype=torch.int32), torch.tensor([[0.5, 2.0]])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    values = dequantize_int(packed, scale, None, group, bits=4, dtype=torch.float32)
    assert values.tolist() == [[-4.0, -3.5, -3.0, -2.5, -8.0, -6.0, -4.0, -2.0]]
    zeros = torch.tensor([[0x3, 0x1]], dtype=torch.int32)
    values = dequantize_int(packed, scale, zeros, group, bits=4, dtype=torch.float32)
    assert values.tolist() == [[-1.5, -1.0, -0.5, 0.0, 6.0, 8.0, 10.0, 12.0]]


def test_awq_by_hand() -> None:
    packed, zeros = torch.tensor([[0x76543210]], dtype=torch.int32), torch.tensor([[0x11111111]], dtype=torch.int32)
    scale = torch.full((1, 8), 2.0)
    values = dequantize_awq(packed, scale, zeros, torch.tensor([0]), dtype=torch.float32)
    # The fields hold the outputs 0, 2, 4, 6, 1, 3, 5, 7, so output 1 has field 4.
    assert values.flatten().tolist() == [-2.0, 6.0, 0.0, 8.0, 2.0, 10.0, 4.0, 12.0]


@pytest.mark.parametrize(("offset", "zero"), [(1, 8), (0, 7)])
def test_gptq_by_hand(offset: int, zero: int) -> None:
    packed = torch.tensor([[0x76543210] * 8], dtype=torch.int32)
    zeros, scale = torch.tensor([[0x77777777]], dtype=torch.int32), torch.full((1, 8), 0.5)
    group = torch.zeros(8, dtype=torch.int64)
    values = dequantize_gptq(packed, scale, zeros, group, bits=4, offset=offset, dtype=torch.float32)
    assert values.tolist() == [[(code - zero) / 2 for code in range(8)]] * 8


def test_a_zero_point_of_nought_survives_the_first_layout_of_gptq() -> None:
    """Stored less one it is all ones, and one more is nought again, as AutoGPTQ has it."""
    packed, scale = torch.tensor([[0x3]], dtype=torch.int32), torch.ones(1, 1)
    zeros = torch.tensor([[-1]], dtype=torch.int32)
    group = torch.zeros(8, dtype=torch.int64)
    assert dequantize_gptq(packed, scale, zeros, group, bits=4, offset=1, dtype=torch.float32)[0, 0] == 3


def field(words: Tensor, row: int, place: int, bits: int) -> int:
    """A value by its place in a row of packed words."""
    start = place * bits
    return (int(words[row, start // 32]) >> (start % 32)) % (1 << bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("with_zeros", [False, True])
def test_compressed_tensors_integers_equal_a_loop(
    bits: int, with_zeros: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    rows, columns, size = 12, 64, 16
    packed, scale = (
        random_words(rows, columns * bits // 32, seed=1),
        random_scale(rows, 4, dtype=torch.bfloat16, seed=2),
    )
    zeros = random_words(-(-rows * bits // 32), 4, seed=3)
    group = torch.arange(columns) // size
    group = group[torch.randperm(columns, generator=seeded(4))]
    tensors = {
        "a.weight_packed": packed, "a.weight_scale": scale, "a.weight_shape": torch.tensor([rows, columns]),
        "a.weight_g_idx": group.int(), **({"a.weight_zero_point": zeros} if with_zeros else {}),
    }  # fmt: skip
    config = quantized.compressed("pack-quantized", num_bits=bits, group_size=size, symmetric=not with_zeros)
    found = decoded(tmp_path, tensors, config, "a.weight_packed", dtype)
    for row in range(rows):
        for column in range(columns):
            own = int(group[column])
            zero = field(zeros.T, own, row, bits) if with_zeros else 1 << (bits - 1)
            value = (field(packed, row, column, bits) - zero) * float(scale[row, own])
            assert found[row, column] == torch.tensor(value, dtype=torch.float64).to(dtype)


def test_compressed_tensors_marks_columns_in_order_with_minus_one(tmp_path: Path) -> None:
    tensors, weights = int_case(4, 32, True)
    config = quantized.compressed("pack-quantized", **weights)
    expected = decoded(tmp_path, tensors, config, "a.weight_packed")
    tensors["a.weight_g_idx"] = torch.full((96,), -1, dtype=torch.int32)
    assert torch.equal(decoded(tmp_path, tensors, config, "a.weight_packed"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("mixed", [False, True])
def test_gptq_equals_a_loop(mixed: bool, layout: str, bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    rows, columns, size = 12, 64, 16
    packed, zeros = random_words(columns * bits // 32, rows, seed=1), random_words(4, -(-rows * bits // 32), seed=2)
    scale = random_scale(4, rows, dtype=torch.float16, seed=3)
    group = torch.arange(columns) // size
    tensors = {"a.qweight": packed, "a.qzeros": zeros, "a.scales": scale}
    if mixed:
        group = group[torch.randperm(columns, generator=seeded(4))]
        tensors["a.g_idx"] = group.int()
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": layout}
    found = decoded(tmp_path, tensors, config, "a.qweight", dtype)
    for row in range(rows):
        for column in range(columns):
            own = int(group[column])
            zero = (field(zeros, own, row, bits) + (layout == "gptq")) % (1 << bits)
            value = (field(packed.T, row, column, bits) - zero) * float(scale[own, row])
            assert found[row, column] == torch.tensor(value, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, -1])
def test_awq_equals_a_loop(size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    rows, columns = 16, 64
    count = 1 if size == -1 else columns // size
    packed, zeros = random_words(columns, rows // 8, seed=1), random_words(count, rows // 8, seed=2)
    scale = random_scale(count, rows, dtype=torch.float16, seed=3)
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": size, "zero_point": True, "version": "GEMM"}
    found = decoded(tmp_path, {"a.qweight": packed, "a.qzeros": zeros, "a.scales": scale}, config, "a.qweight", dtype)
    for row in range(rows):
        # Which of the eight fields of its word holds this output.
        place = row // 8 * 8 + quantized.AWQ_ORDER.index(row % 8)
        for column in range(columns):
            own = column * count // columns
            value = (field(packed, column, place, 4) - field(zeros, own, place, 4)) * float(scale[own, row])
            assert found[row, column] == torch.tensor(value, dtype=torch.float64).to(dtype)


# --- packed FP4


def test_the_values_of_fp4_are_the_published_ones() -> None:
    """A sign, two bits of exponent with the bias 1, one bit of mantissa; exponent 0 is subnormal."""
    for code, value in enumerate(E2M1):
        exponent, mantissa = code >> 1 & 3, code & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert value == (-size if code & 8 else size)
    from transformers.integrations.mxfp4 import FP4_VALUES

    assert list(E2M1) == FP4_VALUES


def test_fp4_by_hand() -> None:
    values = dequantize_fp4(torch.tensor([[0x2B, 0xF7]], dtype=torch.uint8), torch.tensor([[2.0]]), dtype=torch.float32)
    assert values.tolist() == [[-3.0, 2.0, 12.0, -12.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [None, 2])
@pytest.mark.parametrize("own_factors", [False, True])
def test_nvfp4_of_modelopt_equals_a_loop(
    experts: int | None, own_factors: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    import numpy as np

    lead = () if experts is None else (experts,)
    packed = random_bytes(*lead, 4, 16, seed=1)
    scale = random_bytes(*lead, 4, 2, seed=2, high=0x7F).view(torch.float8_e4m3fn)
    factor = random_scale(*(lead if own_factors else ()), dtype=torch.float32, seed=3)
    tensors = {"a.weight": packed, "a.weight_scale": scale, "a.weight_scale_2": factor, "a.input_scale": torch.ones(())}
    found = decoded(tmp_path, tensors, MODELOPT, "a.weight", dtype).view(-1, 4, 32)
    packed, scale, factor = packed.view(-1, 4, 16), scale.view(-1, 4, 2).float(), factor.flatten()
    for expert, row, column in torch.cartesian_prod(
        torch.arange(len(packed)), torch.arange(4), torch.arange(32)
    ).tolist():
        code = int(packed[expert, row, column // 2]) >> (4 * (column % 2)) & 15
        own = np.float32(scale[expert, row, column // 16]) * np.float32(factor[expert if len(factor) > 1 else 0])
        assert found[expert, row, column] == torch.tensor(float(np.float32(E2M1[code]) * own)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_of_gpt_oss_decodes_to_what_transformers_makes_of_it(dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_bytes(3, 10, 2, 16, seed=1), random_bytes(3, 10, 2, seed=2, low=110, high=136)
    tensors = {"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": scales}
    found = decoded(tmp_path, tensors, {"quant_method": "mxfp4"}, "experts.gate_up_proj_blocks", dtype)
    reference = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert found.shape == (3, 64, 10) and found.is_contiguous()
    assert torch.equal(found, reference)


def test_every_exponent_of_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    # The largest overflow in either; 255 stands for no number.
    blocks, scales = random_bytes(1, 1, 255, 16, seed=1), torch.arange(255, dtype=torch.uint8).view(1, 1, 255)
    tensors = {"a_proj_blocks": blocks, "a_proj_scales": scales}
    found = decoded(tmp_path, tensors, {"quant_method": "mxfp4"}, "a_proj_blocks", torch.bfloat16)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16))


# --- the library of compressed-tensors


def by_library(format: str, tensors: dict[str, Tensor], **weights: Any) -> Tensor:
    """The values that compressed-tensors' own compressor gives, by names without their module."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    state = {name.removeprefix("a."): tensor for name, tensor in tensors.items()}
    values = BaseCompressor.get_value_from_registry(format).decompress(state, scheme)["weight"]
    assert isinstance(values, Tensor)
    return values


def int_case(bits: int, size: int | None, symmetric: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    rows, columns = 24, 96
    count = columns // size if size else 1
    tensors = {
        "a.weight_packed": random_words(rows, columns * bits // 32, seed=1),
        "a.weight_scale": random_scale(rows, count, dtype=torch.bfloat16, seed=2),
        "a.weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors["a.weight_zero_point"] = random_words(rows * bits // 32, count, seed=3)
    strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    return tensors, {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_quantized_decodes_to_what_its_library_makes_of_it(
    bits: int, size: int | None, symmetric: bool, tmp_path: Path
) -> None:
    tensors, weights = int_case(bits, size, symmetric)
    config = quantized.compressed("pack-quantized", **weights)
    found = decoded(tmp_path, tensors, config, "a.weight_packed", torch.bfloat16)
    assert torch.equal(found, by_library("pack-quantized", tensors, **weights))


def test_nvfp4_decodes_to_what_its_library_makes_of_it(tmp_path: Path) -> None:
    tensors = {
        "a.weight_packed": random_bytes(8, 24, seed=1),
        "a.weight_scale": random_bytes(8, 3, seed=2, high=0x7F).view(torch.float8_e4m3fn),
        "a.weight_global_scale": torch.tensor([1234.5]),
        "a.input_global_scale": torch.tensor([1.0]),
    }
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    config = quantized.compressed("nvfp4-pack-quantized", **weights)
    found = decoded(tmp_path, tensors, config, "a.weight_packed", torch.bfloat16)
    assert torch.equal(found, by_library("nvfp4-pack-quantized", tensors, **weights))


def test_mxfp4_decodes_to_what_its_library_makes_of_it(tmp_path: Path) -> None:
    tensors = {
        "a.weight_packed": random_bytes(8, 48, seed=1),
        "a.weight_scale": random_bytes(8, 3, seed=2, low=90, high=140),
    }
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    config = quantized.compressed("mxfp4-pack-quantized", **weights)
    found = decoded(tmp_path, tensors, config, "a.weight_packed", torch.bfloat16)
    assert torch.equal(found, by_library("mxfp4-pack-quantized", tensors, **weights))


@pytest.mark.parametrize(
    ("format", "scale", "weights"),
    [
        ("float-quantized", (24, 1), {"strategy": "channel"}),
        ("float-quantized", (1,), {"strategy": "tensor"}),
        ("float-quantized", (3, 12), {"strategy": "block", "block_structure": [8, 8]}),
        ("float-quantized", (24, 3), {"strategy": "group", "group_size": 32}),
        ("mxfp8-quantized", (24, 3), {"strategy": "group", "group_size": 32}),
    ],
)
def test_fp8_decodes_to_what_its_library_makes_of_it(
    format: str, scale: tuple[int, ...], weights: dict[str, Any], tmp_path: Path
) -> None:
    exponents = format == "mxfp8-quantized"
    tensors = {
        "a.weight": random_fp8(24, 96, seed=1),
        "a.weight_scale": random_bytes(*scale, seed=2, low=100, high=130)
        if exponents
        else random_scale(*scale, dtype=torch.bfloat16, seed=2),
    }
    weights = {"num_bits": 8, "type": "float", **weights}
    found = decoded(tmp_path, tensors, quantized.compressed(format, **weights), "a.weight", torch.bfloat16)
    assert torch.equal(found, by_library(format, tensors, **weights))


def test_int8_decodes_to_what_its_library_makes_of_it(tmp_path: Path) -> None:
    tensors = {
        "a.weight": random_bytes(24, 96, seed=1).view(torch.int8),
        "a.weight_scale": random_scale(24, 1, dtype=torch.bfloat16, seed=2),
    }
    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    found = decoded(tmp_path, tensors, quantized.compressed("int-quantized", **weights), "a.weight", torch.bfloat16)
    assert torch.equal(found, by_library("int-quantized", tensors, **weights))


# --- every scheme


@pytest.mark.parametrize("scheme", quantized.SCHEMES)
def test_what_was_packed_comes_back_as_near_as_the_scheme_can(scheme: str, tmp_path: Path) -> None:
    pack, config, _, tolerance = quantized.SCHEMES[scheme]
    weight = torch.randn(64, 160, generator=seeded(5))
    checkpoint, format = checkpoint_of(tmp_path, pack("a.weight", weight), config)
    (info,) = (info for info in checkpoint.tensors.values() if not format.is_companion(info.name))
    found = decode(checkpoint, info, format=format, dtype=torch.float32)
    assert format.decoded(info, checkpoint.tensors) == ("a.weight", weight.shape)
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert (found - weight).abs().max() <= tolerance * weight.abs().max()


STACKED = {
    "fp8-block": lambda w: {"w": random_fp8(*w, seed=1), "w_scale_inv": random_scale(w[0], 2, 1, dtype=torch.float32, seed=2)},
    "nvfp4-modelopt": lambda w: {
        "w": random_bytes(w[0], w[1], w[2] // 2, seed=1),
        "w_scale": random_bytes(w[0], w[1], w[2] // 16, seed=2, high=0x7F).view(torch.float8_e4m3fn),
        "w_scale_2": torch.tensor(0.3),
    },
    "int4-zeros": lambda w: {
        "w.weight_packed": random_words(w[0], w[1], w[2] // 8, seed=1),
        "w.weight_scale": random_scale(w[0], w[1], w[2] // 32, dtype=torch.bfloat16, seed=2),
        "w.weight_zero_point": random_words(w[0], w[1] // 8, w[2] // 32, seed=3),
        "w.weight_shape": torch.tensor(w),
    },
    "mxfp4-blocks": lambda w: quantized.mxfp4_blocks("w", torch.randn(w[0], w[2], w[1], generator=seeded(1))),
}  # fmt: skip


@pytest.mark.parametrize("scheme", STACKED)
def test_a_stack_cut_and_then_decoded_is_the_same_as_decoded_and_then_cut(scheme: str, tmp_path: Path) -> None:
    config = {"quant_method": "mxfp4"} if scheme == "mxfp4-blocks" else quantized.SCHEMES[scheme][1]
    tensors, kept = STACKED[scheme]((5, 256, 64)), [0, 3, 4]
    name = next(iter(tensors))
    whole = decoded(tmp_path / "whole", tensors, config, name, torch.bfloat16)
    # Scalars and shapes belong to all experts.
    cut = {key: tensor[kept] if tensor.shape[:1] == (5,) else tensor for key, tensor in tensors.items()}
    assert whole.shape[0] == 5 and not torch.equal(whole[1], whole[3])
    assert torch.equal(decoded(tmp_path / "cut", cut, config, name, torch.bfloat16), whole[kept])
    for expert in kept:
        alone = {key: tensor[[expert]] if tensor.shape[:1] == (5,) else tensor for key, tensor in tensors.items()}
        assert torch.equal(decoded(tmp_path / "alone", alone, config, name, torch.bfloat16), whole[[expert]])


# --- what does not fit


def test_a_weight_without_its_scale_is_named(tmp_path: Path) -> None:
    checkpoint, format = checkpoint_of(tmp_path, {"a.weight": random_fp8(4, 4, seed=0)}, FP8)
    with pytest.raises(CheckpointError, match=r"'a\.weight' is F8_E4M3 and has no 'a\.weight_scale_inv'"):
        decode(checkpoint, checkpoint.tensors["a.weight"], format=format)


def test_a_scale_for_other_blocks_is_named_with_the_shape_that_fits(tmp_path: Path) -> None:
    tensors = {"a.weight": random_fp8(130, 4, seed=0), "a.weight_scale_inv": torch.ones(1, 1)}
    checkpoint, format = checkpoint_of(tmp_path, tensors, FP8)
    message = r"'a\.weight_scale_inv' has the shape \[1, 1\] where \[130, 4\] in blocks of \[128, 128\] needs \[2, 1\]"
    with pytest.raises(CheckpointError, match=message):
        decode(checkpoint, checkpoint.tensors["a.weight"], format=format)


def test_a_stored_shape_that_is_not_the_packed_one_is_said(tmp_path: Path) -> None:
    tensors, weights = int_case(4, 32, True)
    tensors["a.weight_shape"] = torch.tensor([24, 95])
    with pytest.raises(CheckpointError, match=r"the shape \[24, 95\] stored for 'a\.weight' is not \[24, 96\]"):
        decoded(tmp_path, tensors, quantized.compressed("pack-quantized", **weights), "a.weight_packed")


def test_rows_that_do_not_fill_their_last_word_are_cut(tmp_path: Path) -> None:
    weight = torch.randn(8, 36, generator=seeded(1))
    tensors = quantized.int_groups("a.weight", weight, size=12)
    assert tensors["a.weight_packed"].shape == (8, 5)
    config = quantized.compressed("pack-quantized", **(quantized.INT4 | {"group_size": 12}))
    found = decoded(tmp_path, tensors, config, "a.weight_packed")
    assert found.shape == (8, 36)
    assert (found - weight).abs().max() < 0.08 * weight.abs().max()


@pytest.mark.parametrize("order", [4, -1])
def test_a_group_that_has_no_scale_is_an_error(order: int, tmp_path: Path) -> None:
    tensors = {
        "a.qweight": random_words(8, 16, seed=1), "a.qzeros": random_words(4, 2, seed=2),
        "a.scales": random_scale(4, 16, dtype=torch.float16, seed=3),
        "a.g_idx": torch.full((64,), order, dtype=torch.int32),
    }  # fmt: skip
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    with pytest.raises(CheckpointError, match=r"'a\.g_idx' names groups beyond the 4 that have scales"):
        decoded(tmp_path, tensors, config, "a.qweight")


@pytest.mark.parametrize(
    ("tensors", "quantization", "message"),
    [
        ({"a": torch.ones(2, 2, dtype=torch.int8)}, None, r"'a' is I8 \[2, 2\], which the format 'unquantised'"),
        ({"a": torch.ones(2, 2).to(torch.float8_e4m3fn)}, None, "'a' is F8_E4M3"),
        ({"a": torch.ones(2, 2).to(torch.float8_e5m2)}, FP8, "'a' is F8_E5M2 .* 'FP8 with block scales'"),
        ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, FP8, r"'a' is F8_E4M3 \[2\]"),
        # Two FP4 values in a byte, which some FP8 checkpoints have for their experts.
        ({"a": torch.ones(2, 2, dtype=torch.int8), "a_scale_inv": torch.ones(1, 1)}, FP8, "'a' is I8"),
        ({"a": torch.ones(2, 2).to(torch.float8_e4m3fn), "a_scale_inv": torch.ones(1, 1, dtype=torch.int32)}, FP8,
         "the scale 'a_scale_inv' is I32"),
        ({"a": torch.ones(2, 2, dtype=torch.uint8)}, FP8, "'a' is U8"),
    ],
)  # fmt: skip
def test_a_dtype_that_the_format_does_not_explain_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], quantization: Any, message: str
) -> None:
    checkpoint, format = checkpoint_of(tmp_path, tensors, quantization)
    with pytest.raises(UnsupportedError, match=message) as caught:
        decode(checkpoint, checkpoint.tensors["a"], format=format)
    assert caught.value.hint is not None and "sibling" in caught.value.hint


def test_a_dtype_that_torch_lacks_is_refused(m2: Path) -> None:
    checkpoint = Checkpoint.open(m2)
    info = TensorInfo("a", "F6_E2M3", (4,), "model.safetensors", 0, 3)
    with pytest.raises(UnsupportedError, match="'a' is F6_E2M3, which cannot be computed with"):
        read_tensor(checkpoint, info)
