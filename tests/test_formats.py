"""Stored bytes become exactly the values that they stand for, or a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from reapkit.checkpoint import Checkpoint
from reapkit.errors import CheckpointError, UnsupportedError
from reapkit.formats import Format, decode, dequantize_blocks, read_format, read_tensor
from reapkit.tensors import TensorInfo

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_blocks(rows: int, columns: int, scale_dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Every one of the 254 finite values, at every place.
    codes = torch.randint(0, 254, (rows, columns), generator=generator)
    codes += (codes >= 0x7F).int()
    weight = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) * 0.01
    return weight, scale.to(scale_dtype)


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


def test_a_whole_fp8_checkpoint_decodes_to_what_transformers_loads(m2_fp8: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(m2_fp8)
    format = read_format(checkpoint.config)
    loaded = AutoModelForCausalLM.from_pretrained(m2_fp8, dtype=torch.bfloat16).state_dict()
    for layer in range(tiny.NUM_LAYERS):
        prefix, block = f"model.layers.{layer}.", f"model.layers.{layer}.block_sparse_moe.experts."

        def value(name: str) -> torch.Tensor:
            return decode(checkpoint, checkpoint.tensors[name], format=format, dtype=torch.bfloat16)

        for part in "qkvo":
            name = f"{prefix}self_attn.{part}_proj.weight"
            assert torch.equal(value(name), loaded[name])
        for expert in range(tiny.NUM_EXPERTS):
            gate, down, up = (value(f"{block}{expert}.{part}.weight") for part in ("w1", "w2", "w3"))
            assert torch.equal(torch.cat((gate, up)), loaded[f"{prefix}mlp.experts.gate_up_proj"][expert])
            assert torch.equal(down, loaded[f"{prefix}mlp.experts.down_proj"][expert])


def checkpoint_of(
    folder: Path, tensors: dict[str, torch.Tensor], quantization: Any = None
) -> tuple[Checkpoint, Format]:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    tiny.write_json(folder / "config.json", {"quantization_config": quantization} if quantization else {})
    checkpoint = Checkpoint.open(folder)
    return checkpoint, read_format(checkpoint.config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", [None, FP8])
def test_plain_tensors_are_given_as_stored(tmp_path: Path, dtype: torch.dtype, quantization: Any) -> None:
    value = torch.randn(5, 7).to(dtype)
    checkpoint, format = checkpoint_of(
        tmp_path, {"odd": torch.ones(1), "w": value, "z": torch.empty(0, 3)}, quantization
    )
    for name, stored in (("w", value), ("z", torch.empty(0, 3))):
        decoded = decode(checkpoint, checkpoint.tensors[name], format=format, dtype=torch.float32)
        assert decoded.dtype == stored.dtype and torch.equal(decoded, stored)


def test_decoded_weights_are_aligned_wherever_they_lie_on_disk(tmp_path: Path) -> None:
    """Products with a single token round differently on weights that are not, so the same run could give other bits."""
    tensors = {f"w{number}": torch.randn(number + 1, 3) for number in range(20)}
    checkpoint, format = checkpoint_of(tmp_path, tensors)
    for name, info in checkpoint.tensors.items():
        decoded = decode(checkpoint, info, format=format, dtype=torch.float32)
        assert decoded.data_ptr() % 64 == 0 and torch.equal(decoded, tensors[name])


def test_a_weight_without_its_scale_is_named(tmp_path: Path) -> None:
    checkpoint, format = checkpoint_of(tmp_path, {"a.weight": random_blocks(4, 4, torch.float32, 0)[0]}, FP8)
    with pytest.raises(CheckpointError, match=r"'a\.weight' is F8_E4M3 and has no 'a\.weight_scale_inv'"):
        decode(checkpoint, checkpoint.tensors["a.weight"], format=format)


def test_a_scale_for_other_blocks_is_named_with_the_shape_that_fits(tmp_path: Path) -> None:
    tensors = {"a.weight": random_blocks(130, 4, torch.float32, 0)[0], "a.weight_scale_inv": torch.ones(1, 1)}
    checkpoint, format = checkpoint_of(tmp_path, tensors, FP8)
    message = r"'a\.weight_scale_inv' has the shape \[1, 1\] where \[130, 4\] in blocks of \[128, 128\] needs \[2, 1\]"
    with pytest.raises(CheckpointError, match=message):
        decode(checkpoint, checkpoint.tensors["a.weight"], format=format)


@pytest.mark.parametrize(
    ("tensors", "quantization", "message"),
    [
        ({"a": torch.ones(2, 2, dtype=torch.int8)}, None, r"'a' is I8 \[2, 2\], which the format 'unquantised'"),
        ({"a": torch.ones(2, 2).to(torch.float8_e4m3fn)}, None, "'a' is F8_E4M3"),
        ({"a": torch.ones(2, 2).to(torch.float8_e5m2)}, FP8, "'a' is F8_E5M2 .* 'FP8 with block scales'"),
        ({"a": torch.ones(2, 2, 2).to(torch.float8_e4m3fn)}, FP8, r"'a' is F8_E4M3 \[2, 2, 2\]"),
        (
            {"a": torch.ones(2, 2).to(torch.float8_e4m3fn), "a_scale_inv": torch.ones(1, 1, dtype=torch.uint8)},
            FP8,
            "the scale 'a_scale_inv' is U8",
        ),
    ],
)
def test_a_dtype_that_the_format_does_not_explain_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], quantization: Any, message: str
) -> None:
    checkpoint, format = checkpoint_of(tmp_path, tensors, quantization)
    with pytest.raises(UnsupportedError, match=message):
        decode(checkpoint, checkpoint.tensors["a"], format=format)


def test_a_dtype_that_torch_lacks_is_refused(m2: Path) -> None:
    checkpoint = Checkpoint.open(m2)
    info = TensorInfo("a", "F6_E2M3", (4,), "model.safetensors", 0, 3)
    with pytest.raises(UnsupportedError, match="'a' is F6_E2M3, which cannot be computed with"):
        read_tensor(checkpoint, info)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "mxfp4"},
        {"quant_method": "compressed-tensors", "weight_block_size": [128, 128]},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": None},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [128, 0]},
        {"quant_method": "fp8", "weight_block_size": [128, True]},
    ],
)
def test_an_unsupported_quantisation_is_refused_with_a_way_out(quantization: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=f"quantisation '{quantization['quant_method']}'") as caught:
        read_format({"quantization_config": quantization})
    assert caught.value.hint is not None and "sibling" in caught.value.hint


def test_a_quantisation_without_a_method_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="without a quant_method"):
        read_format({"quantization_config": {"bits": 4}})


def test_formats_are_read_from_the_config() -> None:
    assert read_format({}) == read_format({"quantization_config": None}) == Format("unquantised")
    assert read_format({"quantization_config": FP8}).block == (128, 128)
