"""On-disk number formats: bytes to tensors, dequantised where the format says so.

Only observing and `--dequantize` need values; pruning moves bytes whatever they mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from reapkit.checkpoint import Checkpoint, quantization_of
from reapkit.errors import CheckpointError, UnsupportedError
from reapkit.tensors import TensorInfo

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
# Bytes to which torch aligns what it allocates itself.
ALIGNMENT = 64
PLAIN_DTYPES = frozenset({"F16", "BF16", "F32"})


@dataclass(frozen=True)
class Format:
    """How a checkpoint stores its weights.

    Attributes:
        name: for people.
        block: rows and columns that share one scale; None for unquantised checkpoints.
        scale_suffix: what is appended to a weight's name for its scale.
    """

    name: str
    block: tuple[int, int] | None = None
    scale_suffix: str = "_scale_inv"

    def is_companion(self, name: str) -> bool:
        """Whether a tensor only serves another one's dequantisation."""
        return self.block is not None and name.endswith(self.scale_suffix)

    def companions(self, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> tuple[TensorInfo, ...]:
        """The tensors that are needed, besides its own bytes, to dequantise this one; empty where nothing is quantised.

        Raises:
            CheckpointError: a quantised weight has no scale.
        """
        if info.dtype in PLAIN_DTYPES or self.is_companion(info.name):
            return ()
        if self.block is None or info.dtype != "F8_E4M3" or len(info.shape) != 2:
            raise UnsupportedError(
                f"{info.name!r} is {info.dtype} {list(info.shape)}, which the format {self.name!r} does not explain"
            )
        scale = tensors.get(info.name + self.scale_suffix)
        if scale is None:
            raise CheckpointError(f"{info.name!r} is {info.dtype} and has no {info.name + self.scale_suffix!r}")
        grid = tuple(math.ceil(size / block) for size, block in zip(info.shape, self.block, strict=True))
        if scale.dtype not in PLAIN_DTYPES:  # bytes that are exponents (E8M0) would pass for factors
            raise UnsupportedError(
                f"the scale {scale.name!r} is {scale.dtype}, which the format {self.name!r} does not explain"
            )
        if scale.shape != grid:
            raise CheckpointError(f"{scale.name!r} has the shape {list(scale.shape)} where {list(info.shape)} in blocks of "
                                  f"{list(self.block)} needs {list(grid)}")  # fmt: skip
        return (scale,)


def read_format(config: Mapping[str, Any]) -> Format:
    """The format that a config declares.

    Raises:
        UnsupportedError: a quantisation that cannot be run here.
    """
    quantization = quantization_of(config)
    if quantization is None:
        return Format("unquantised")
    method = quantization["quant_method"]
    block = quantization.get("weight_block_size")
    if method != "fp8" or not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise UnsupportedError(
            f"the checkpoint's quantisation {method!r} (weight_block_size {block}) cannot be computed with yet",
            hint="observe reads bf16, fp16, fp32 and FP8 with block scales; a plan made from such a sibling still prunes this one",
        )
    return Format("FP8 with block scales", (block[0], block[1]))


def read_tensor(checkpoint: Checkpoint, info: TensorInfo) -> torch.Tensor:
    """One tensor as it is stored, on the CPU.

    Raises:
        UnsupportedError: torch has no such dtype.
    """
    if info.dtype not in TORCH_DTYPES:
        raise UnsupportedError(f"{info.name!r} is {info.dtype}, which cannot be computed with")
    if not info.nbytes:
        return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
    return torch.frombuffer(checkpoint.read(info), dtype=TORCH_DTYPES[info.dtype]).view(info.shape)


def decode(
    checkpoint: Checkpoint,
    info: TensorInfo,
    *,
    format: Format,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """One tensor with its values: quantised weights dequantised to `dtype` on `device`, plain ones as they are stored.

    Raises:
        CheckpointError: a scale is missing or has the wrong shape.
        UnsupportedError: a dtype that the format does not explain.
    """
    stored = read_tensor(checkpoint, info).to(device)
    scales = format.companions(info, checkpoint.tensors)
    if not scales:
        # Products with a single token round differently on weights that are not aligned, and a buffer's alignment is chance.
        return stored if stored.data_ptr() % ALIGNMENT == 0 else stored.clone()
    assert format.block is not None
    return dequantize_blocks(stored, read_tensor(checkpoint, scales[0]).to(device), block=format.block, dtype=dtype)


def dequantize_blocks(
    weight: torch.Tensor, scale: torch.Tensor, *, block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """FP8 weight [M, N] times its block scales [ceil(M/bm), ceil(N/bn)], multiplied in float32 and rounded once to `dtype`.

    The same arithmetic as transformers' own dequantisation, which it equals bit for bit; blocks at the edges may be partial.
    """
    rows, columns = weight.shape
    expanded = scale.to(torch.float32).repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (weight.to(torch.float32) * expanded).to(dtype)
