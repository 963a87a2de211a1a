"""On-disk number formats: bytes to tensors, dequantised where the format says so.

Only observing and `--dequantize` need values; pruning moves bytes whatever they mean. Every routine computes in float32 and rounds once,
on one matrix [M, N] at a time: rows are outputs, columns are inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reapkit.checkpoint import Checkpoint
from reapkit.errors import CheckpointError, UnsupportedError
from reapkit.fusion import fused_kernels
from reapkit.quantization import Format, Recipe
from reapkit.tensors import TensorInfo

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
# Bytes to which torch aligns what it allocates itself.
ALIGNMENT = 64
# Larger tensors, embeddings, are copied from ordinary memory: pinned memory is kept for the next ones, rounded up to a power of two.
PINNED_BYTES = 64 << 20
# The values of FP4 (E2M1) by their codes: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, table 5).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Which of a word's eight values, lowest bits first, belongs to each of eight neighbouring outputs: AWQ packs 0, 2, 4, 6, 1, 3, 5, 7.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def read_tensor(checkpoint: Checkpoint, info: TensorInfo, *, pinned: bool = False) -> Tensor:
    """One tensor as it is stored, on the CPU; in pinned memory it is copied to a GPU in the background, and faster.

    Raises:
        UnsupportedError: torch has no such dtype.
    """
    if info.dtype not in TORCH_DTYPES:
        raise UnsupportedError(f"{info.name!r} is {info.dtype}, which cannot be computed with")
    if not info.nbytes:
        return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
    if pinned and info.nbytes <= PINNED_BYTES:
        buffer = torch.empty(info.nbytes, dtype=torch.uint8, pin_memory=True)
        checkpoint.read_into(info, buffer.numpy().data)
        return buffer.view(TORCH_DTYPES[info.dtype]).view(info.shape)
    return torch.frombuffer(checkpoint.read(info), dtype=TORCH_DTYPES[info.dtype]).view(info.shape)


def decode(
    checkpoint: Checkpoint,
    info: TensorInfo,
    *,
    format: Format,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One tensor with its values: quantised weights dequantised to `dtype` on `device`, plain ones as they are stored.

    The result has the shape that `Format.decoded` gives; of a stack of experts one matrix is computed at a time, to keep memory small.

    Raises:
        CheckpointError: a scale is missing or has the wrong shape.
        UnsupportedError: a dtype that the format does not explain, or a format that cannot be computed with.
    """
    recipe = format.recipe(info, checkpoint.tensors)
    is_pinned = torch.device(device).type == "cuda"
    stored = read_tensor(checkpoint, info, pinned=is_pinned).to(device, non_blocking=is_pinned)
    if recipe is None:
        # Products with a single token round differently on weights that are not aligned, and a buffer's alignment is chance.
        return stored if stored.data_ptr() % ALIGNMENT == 0 else stored.clone()

    def read(companion: TensorInfo | None) -> Tensor | None:
        return None if companion is None else read_tensor(checkpoint, companion, pinned=is_pinned)

    _require_stated(read(recipe.stated), recipe)
    factor, zeros = read(recipe.factor), read(recipe.zeros)
    scale = as_factors(read_tensor(checkpoint, recipe.scale, pinned=is_pinned)).view(recipe.grid)
    if factor is not None:
        factor = factor.to(torch.float32).view(-1, 1, 1)
        scale = scale / factor if recipe.divides else scale * factor
    scale = scale.to(device, non_blocking=is_pinned)
    if zeros is not None:
        zeros = zeros.view(-1, *zeros.shape[-2:]).to(device)
    is_grouped = recipe.scheme in ("int", "awq", "gptq")
    group = _groups_of_columns(read(recipe.order), recipe).to(device) if is_grouped else None
    count = recipe.shape[0] if len(recipe.shape) == 3 else 1
    packed = stored.flatten(2) if len(info.shape) == 4 else stored  # gpt-oss: [experts, rows, groups, bytes]
    packed = packed.view(count, *packed.shape[-2:])

    def matrix(number: int) -> Tensor:
        # One scale, or one factor, may serve all experts.
        own = scale[number if len(scale) > 1 else 0]
        return _dequantize(recipe, packed[number], own, None if zeros is None else zeros[number], group, dtype)

    if len(recipe.shape) == 2:
        return matrix(0).contiguous()
    values = torch.empty(recipe.shape, dtype=dtype, device=device)
    for number in range(count):
        values[number] = matrix(number)
    return values


def _require_stated(stated: Tensor | None, recipe: Recipe) -> None:
    if stated is not None and tuple(stated.tolist()[-2:]) != recipe.shape[-2:]:
        raise CheckpointError(
            f"the shape {stated.tolist()} stored for {recipe.name!r} is not {list(recipe.shape)}, "
            "which its packed values and its scales have"
        )


def _groups_of_columns(order: Tensor | None, recipe: Recipe) -> Tensor:
    """The group of every column, int64 [N]: one after the other unless they are stored; compressed-tensors marks that with -1, too."""
    in_order = torch.arange(recipe.shape[-1]) // max(recipe.block[1], 1)
    if order is None or (recipe.scheme == "int" and bool((order == -1).any())):
        return in_order
    groups = recipe.grid[-1] if recipe.scheme == "int" else recipe.grid[-2]
    if bool(((order < 0) | (order >= groups)).any()):
        assert recipe.order is not None
        raise CheckpointError(f"{recipe.order.name!r} names groups beyond the {groups} that have scales")
    return order.long()


def _dequantize(
    recipe: Recipe, packed: Tensor, scale: Tensor, zeros: Tensor | None, group: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """One matrix by its scheme."""
    if recipe.scheme == "scaled":
        kernels = fused_kernels(packed.device)
        if kernels is not None and packed.dtype == torch.float8_e4m3fn:
            values: Tensor = kernels.dequantize_blocks(packed, scale, block=recipe.block, dtype=dtype)
            return values
        return dequantize_blocks(packed, scale, block=recipe.block, dtype=dtype)
    if recipe.scheme == "fp4":
        values = dequantize_fp4(packed, scale, dtype=dtype)
        return values.T if recipe.transposed else values
    assert group is not None
    if recipe.scheme == "int":
        return dequantize_int(packed, scale, zeros, group, bits=recipe.bits, dtype=dtype)
    assert zeros is not None
    if recipe.scheme == "awq":
        return dequantize_awq(packed, scale, zeros, group, dtype=dtype)
    return dequantize_gptq(packed, scale, zeros, group, bits=recipe.bits, offset=recipe.zero_offset, dtype=dtype)


def as_factors(scale: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents (E8M0): 2 to the power of (byte - 127), and 255 is not a number."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).to(torch.float32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unsigned values of 2, 4 or 8 bits, uint8 [M, N], from bytes or int32 words [M, W] that hold them lowest bits first."""
    packed = words.reshape(-1).view(torch.uint8).view(len(words), words.shape[1] * words.element_size())
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)


def dequantize_blocks(weight: Tensor, scale: Tensor, *, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """FP8 or INT8 weight [M, N] times its block scales [ceil(M/bm), ceil(N/bn)]; blocks at the edges may be partial.

    The same arithmetic as transformers' own dequantisation, which it equals bit for bit.
    """
    rows, columns = weight.shape
    values, scale = _in_float32(weight), scale.to(torch.float32)
    if (rows, columns) == (len(scale) * block[0], scale.shape[1] * block[1]):
        values.view(len(scale), block[0], -1, block[1]).mul_(scale[:, None, :, None])
    else:
        values *= scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return values.to(dtype)


def _in_float32(stored: Tensor) -> Tensor:
    """A new tensor of the same values. On a CPU a table of all 256 is faster than torch's own conversion of a byte."""
    if stored.device.type == "cpu" and stored.dtype.is_floating_point and stored.element_size() == 1:
        return torch.from_numpy(np.take(_values_of(stored.dtype), stored.view(torch.uint8).numpy(), mode="clip"))
    return stored.to(torch.float32, copy=True)


@cache
def _values_of(dtype: torch.dtype) -> NDArray[np.float32]:
    """The values of a dtype of one byte, float32 [256], by their bits."""
    values: NDArray[np.float32] = torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).numpy()
    return values


def dequantize_fp4(packed: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """FP4 values, uint8 [M, N/2] with the lower half of a byte first, times the scale [M, N/group] of their group, in float32.

    NVFP4 has groups of 16, and a scale that is already multiplied with, or divided by, the tensor's own factor (ModelOpt's
    `NVFP4QTensor.dequantize`, compressed-tensors' `NVFP4PackedCompressor`). MXFP4 has groups of 32 and powers of two.
    """
    rows, groups = scale.shape
    pairs = torch.tensor([(E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256)], device=packed.device)
    values = pairs.index_select(0, packed.flatten().int()).view(rows, groups, 2 * packed.shape[1] // max(groups, 1))
    return (values * scale.unsqueeze(-1)).flatten(1).to(dtype)


def dequantize_int(
    packed: Tensor, scale: Tensor, zeros: Tensor | None, group: Tensor, *, bits: int, dtype: torch.dtype
) -> Tensor:
    """compressed-tensors' `pack-quantized`: int32 [M, N bits/32] with scales [M, G] and the group [N] of every column.

    Values are stored with 2^(bits-1) added, and so are zero points, int32 [M bits/32, G], packed along the rows; both may be padded.
    """
    codes = unpack(packed, bits)[:, : len(group)]
    half = 1 << (bits - 1)
    middle = torch.full_like(scale, half) if zeros is None else unpack(zeros.T, bits)[:, : len(scale)].T
    return _affine(codes, scale, middle, group, dtype)


def dequantize_awq(packed: Tensor, scale: Tensor, zeros: Tensor, group: Tensor, *, dtype: torch.dtype) -> Tensor:
    """AWQ's `gemm` layout: int32 [N, M/8] and zero points [G, M/8] in AWQ's order, scales [G, M]; the result is [M, N].

    As AutoAWQ's `dequantize_gemm`.
    """
    places = torch.tensor(AWQ_PLACES, device=packed.device)

    def in_order(words: Tensor) -> Tensor:
        return unpack(words, 4).view(-1, 8).index_select(1, places).view(len(words), -1)

    # Transposed at the end, when values are smallest.
    return _affine(in_order(packed), scale, in_order(zeros), group, dtype, axis=0).T


def dequantize_gptq(
    packed: Tensor, scale: Tensor, zeros: Tensor, group: Tensor, *, bits: int, offset: int, dtype: torch.dtype
) -> Tensor:
    """GPTQ: int32 [N bits/32, M] packed along the inputs, zero points [G, M bits/32], scales [G, M]; the result is [M, N].

    `offset` is added to a stored zero point before it is cut to its bits: 1 in the first layout, as AutoGPTQ does; 0 in `gptq_v2`.
    """
    codes = unpack(packed.T, bits)
    middle = ((unpack(zeros, bits).int() + offset) & ((1 << bits) - 1))[:, : scale.shape[1]]
    return _affine(codes, scale.T, middle.T, group, dtype)


def _affine(codes: Tensor, scale: Tensor, zeros: Tensor, group: Tensor, dtype: torch.dtype, axis: int = 1) -> Tensor:
    """(codes [M, N] - zeros) * scale, where zeros and scale [M, G] are those of the column's group [N]; of the row's with axis 0."""
    shift, factor = (each.to(torch.float32).index_select(axis, group) for each in (zeros, scale))
    return ((codes.to(torch.float32) - shift) * factor).to(dtype)
