"""Fused kernels for CUDA, in Triton: what lies between the matrix products of a MoE layer, the sums over routed pairs, products in FP8.

Products in bfloat16 are `grouped_mm`'s. What remains moves bytes, so each kernel reads its inputs once and writes its outputs once, and its
floor is bytes over the memory's bandwidth. With 32,768 tokens of MiniMax-M2 (K = 8, D = 3,072, I = 1,536, bfloat16) on an H200, of which a
copy reaches 4.3 TB/s:

| kernel | bytes | floor |
|---|---|---|
| `dequantize_blocks` | 1 byte a weight read, 2 written: 3.6 and 7.2 GB a layer | 2.5 ms |
| `find_odd` | 1 or 2 bytes a weight read: 3.6 or 7.2 GB a layer | 0.8 or 1.7 ms |
| `gather` | P D read (mostly from the cache), P D written: 1.8 to 3.2 GB | 0.4 to 0.75 ms |
| `swiglu` | 2 P I read, P I written: 2.4 GB | 0.56 ms |
| `combine` | P D read, N D written: 1.8 GB | 0.42 ms |
| `rms_norm` | N D read, N D written: 0.4 GB, of queries 0.8 GB | 0.1 and 0.2 ms |
| `rotate` | queries and keys read and written: 0.94 GB | 0.22 ms |
| `add_pairs` | some 20 bytes a pair: 5 MB | launch |
| `turns` | 2 D a sampled token: below a megabyte | launch |
| `quantize` | P D read (mostly from the cache), P D of a byte written: 1.0 to 2.4 GB | 0.23 to 0.56 ms |

The products take 3 x 2 P D I = 7.4 TFLOP, 10.8 ms at 690 TFLOP/s; in FP8, twice as fast on paper, 5.4 ms. Nothing here waits for the
device, and no kernel uses atomic additions: every result has the same bits in every run.

Imported only where there is a GPU and Triton; `experts` and `sums` hold the plain versions of the same functions, but for products in FP8.

Shape suffixes: N = tokens of a micro-batch laid end to end, P = routed (token, expert) pairs sorted by expert, K = experts per token,
E = experts, D = hidden size, I = inner size of an expert, S = rows of sums, Q = the six sums, M = tiles of a grouped product, or sampled
tokens.
"""

# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reapkit.quantization import FP8_BLOCK

# Values of a row that one program holds at once; a power of two, and longer rows take several rounds.
_COLUMNS = 4096
# Pairs that a program of `add_pairs` takes at a time: an expert of MiniMax-M2 gets about a thousand of 32,768 tokens.
_PAIRS = 1024
# Values that a program of `find_odd` looks at; integers as wide as values; bits that are all set in NaN and infinity.
_PART = 1 << 16
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_EXPONENTS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float8_e4m3fn: 0x7F}
# Rows of an FP8 product that one program computes, its warps, and the parts of its inputs on their way at once.
_TILE_ROWS, _TILE_WARPS, _TILE_STAGES = 128, 8, 3


@triton.jit
def _dequantize_kernel(
    weight, scale, result, columns, scale_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        values = tl.load(weight + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(scale + (row // ROWS) * scale_columns + column // COLUMNS, mask=inside, other=0.0)
        tl.store(result + row * columns + column, (values * factor).to(result.dtype.element_ty), mask=inside)


def dequantize_blocks(weight: Tensor, scale: Tensor, *, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """FP8 (E4M3) weight [M, N] times its float32 block scales, rounded once: the same bits as `formats.dequantize_blocks`."""
    weight, scale = weight.contiguous(), scale.contiguous()
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    rows, columns = weight.shape
    if result.numel():
        _dequantize_kernel[(rows,)](
            weight, scale, result, columns, scale.shape[1], ROWS=block[0], COLUMNS=block[1], BLOCK=_block(columns), num_warps=4
        )  # fmt: skip
    return result


@triton.jit
def _find_odd_kernel(bits, odd, columns, MASK: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    begin = tl.program_id(1).to(tl.int64) * PART
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, PART, BLOCK):
        column = begin + first + tl.arange(0, BLOCK)
        values = tl.load(bits + row.to(tl.int64) * columns + column, mask=column < columns, other=0)
        found = found | ((values & MASK) == MASK).to(tl.int32)
    tl.store(odd + row * tl.num_programs(1) + tl.program_id(1), tl.max(found, 0))


def find_odd(values: Tensor) -> Tensor:
    """Whether each of the first dimension's parts holds a value that is NaN or infinite, bool: values whose exponent has all bits set.

    FP8 (E4M3) has no infinity, and NaN where all bits but the sign are set.
    """
    rows = len(values)
    bits = values.contiguous().view(rows, -1).view(_BITS[values.element_size()])
    columns = bits.shape[1]
    odd = torch.empty(rows, triton.cdiv(columns, _PART), dtype=torch.int32, device=values.device)
    if odd.numel():
        _find_odd_kernel[odd.shape](
            bits, odd, columns, MASK=_EXPONENTS[values.dtype], PART=_PART, BLOCK=_COLUMNS, num_warps=4
        )
    return odd.any(1)


@triton.jit
def _gather_kernel(hidden, token, result, width, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    source = tl.load(token + pair).to(tl.int64)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        values = tl.load(hidden + source * width + column, mask=column < width)
        tl.store(result + pair * width + column, values, mask=column < width)


def gather(hidden_ND: Tensor, token_P: Tensor) -> Tensor:
    """`hidden_ND[token_P]`, [P, D]."""
    hidden_ND = hidden_ND.contiguous()
    width = hidden_ND.shape[1]
    result = hidden_ND.new_empty(len(token_P), width)
    if len(token_P):
        _gather_kernel[(len(token_P),)](hidden_ND, token_P, result, width, BLOCK=_block(width), num_warps=4)
    return result


@triton.jit
def _swiglu_kernel(gate_up, result, width, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(gate_up + 2 * pair * width + column, mask=inside, other=0.0)
        up = tl.load(gate_up + (2 * pair + 1) * width + column, mask=inside, other=0.0)
        wide = gate.to(tl.float32)
        activated = wide / (1.0 + tl.exp(-wide))
        tl.store(result + pair * width + column, (activated * up.to(tl.float32)).to(gate.dtype), mask=inside)


def swiglu(gate_up_P2I: Tensor) -> Tensor:
    """`silu(gate) * up`, [P, I], of the halves of a contiguous [P, 2 I]; in float32, rounded once."""
    width = gate_up_P2I.shape[1] // 2
    result = gate_up_P2I.new_empty(len(gate_up_P2I), width)
    if len(result):
        _swiglu_kernel[(len(result),)](gate_up_P2I.contiguous(), result, width, BLOCK=_block(width), num_warps=4)
    return result


@triton.jit
def _rms_norm_kernel(hidden, weight, result, width, epsilon, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        values = tl.load(hidden + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        squares += values * values
    scale = tl.rsqrt(tl.sum(squares, 0) / width + epsilon)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        values = tl.load(hidden + row * width + column, mask=inside, other=0.0)
        factor = tl.load(weight + column, mask=inside, other=0.0)
        normed = values.to(tl.float32) * scale * factor.to(tl.float32)
        tl.store(result + row * width + column, normed.to(result.dtype.element_ty), mask=inside)


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`weight * (x / sqrt(mean(x^2) + epsilon))` over the last dimension; in float32, rounded once."""
    hidden = hidden.contiguous()
    width = hidden.shape[-1]
    result = torch.empty_like(hidden, dtype=torch.promote_types(hidden.dtype, weight.dtype))
    if rows := hidden.numel() // width:
        _rms_norm_kernel[(rows,)](hidden, weight, result, width, epsilon, BLOCK=_block(width), num_warps=8)
    return result


@triton.jit
def _rotate_kernel(
    heads, cos, sin, result, num_heads, num_tokens, per_batch, width, turned,
    stride_b, stride_h, stride_t, stride_b_out, stride_h_out, stride_t_out, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < num_heads) & (column < width)
    at = heads + batch * stride_b + token * stride_t + head * stride_h
    values = tl.load(at + column, mask=inside, other=0.0)
    half = turned // 2
    partner = tl.where(column < half, column + half, column - half)
    is_turned = column < turned
    others = tl.load(at + partner, mask=inside & is_turned, other=0.0).to(tl.float32)
    others = tl.where(column < half, -others, others)
    angle = (batch * per_batch + token) * turned + column
    c = tl.load(cos + angle, mask=is_turned, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=is_turned, other=0.0).to(tl.float32)
    rotated = tl.where(is_turned, (values.to(tl.float32) * c + others * s).to(values.dtype), values)
    at_result = result + batch * stride_b_out + token * stride_t_out + head * stride_h_out
    tl.store(at_result + column, rotated, mask=inside)


def rotate(heads_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Rotary position embedding of the first R of D values of each head, by halves; the others pass. In float32, rounded once.

    The result's memory is laid out as the input's.

    Args:
        heads_BHTD: queries or keys; the last dimension contiguous.
        cos_BTR, sin_BTR: of the angles, of one row of positions for all documents, or one for each.
    """
    batch, num_heads, num_tokens, width = heads_BHTD.shape
    turned = cos_BTR.shape[-1]
    cos_BTR, sin_BTR = cos_BTR.contiguous(), sin_BTR.contiguous()
    result = torch.empty_like(heads_BHTD)
    per_batch = num_tokens if len(cos_BTR) > 1 else 0
    _rotate_kernel[(num_tokens, batch)](
        heads_BHTD, cos_BTR, sin_BTR, result, num_heads, num_tokens, per_batch, width, turned,
        *heads_BHTD.stride()[:3], *result.stride()[:3],
        BLOCK_H=triton.next_power_of_2(num_heads), BLOCK_D=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return result


@triton.jit
def _combine_kernel(out, gate, place, result, norm, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    if width <= BLOCK:
        column = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(TOP_K):
            pair = tl.load(place + token * TOP_K + k).to(tl.int64)
            values = tl.load(out + pair * width + column, mask=column < width, other=0.0).to(tl.float32)
            tl.store(norm + pair, tl.sqrt_rn(tl.sum(values * values, 0)))
            total += values * tl.load(gate + pair).to(tl.float32)
        tl.store(result + token * width + column, total.to(result.dtype.element_ty), mask=column < width)
    else:
        for k in tl.static_range(TOP_K):
            pair = tl.load(place + token * TOP_K + k).to(tl.int64)
            squares = tl.zeros([BLOCK], tl.float32)
            for first in range(0, width, BLOCK):
                column = first + tl.arange(0, BLOCK)
                values = tl.load(out + pair * width + column, mask=column < width, other=0.0).to(tl.float32)
                squares += values * values
            tl.store(norm + pair, tl.sqrt_rn(tl.sum(squares, 0)))
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], tl.float32)
            for k in tl.static_range(TOP_K):
                pair = tl.load(place + token * TOP_K + k).to(tl.int64)
                values = tl.load(out + pair * width + column, mask=column < width, other=0.0).to(tl.float32)
                total += values * tl.load(gate + pair).to(tl.float32)
            tl.store(result + token * width + column, total.to(result.dtype.element_ty), mask=column < width)


def combine(
    out_PD: Tensor, gate_P: Tensor, order_P: Tensor, *, top_k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The weighted sum of every token's pairs and the norm of every pair, from one reading of the experts' outputs.

    Args:
        out_PD: the experts' outputs.
        gate_P: coefficients.
        order_P: int64, the place of a pair before pairs were sorted by expert, where a token's `top_k` pairs were neighbours.
        dtype: of the sum, which is taken in float32 in the order of the token's pairs.

    Returns:
        [N, D], and float32 [P]: L2 norms in float32.
    """
    width = out_PD.shape[1]
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(len(order_P), device=order_P.device)
    result = out_PD.new_empty(len(order_P) // top_k, width, dtype=dtype)
    norm_P = out_PD.new_empty(len(out_PD), dtype=torch.float32)
    if len(result):
        _combine_kernel[(len(result),)](
            out_PD.contiguous(), gate_P, place_P, result, norm_P, width, TOP_K=top_k, BLOCK=_block(width), num_warps=8
        )
    return result, norm_P


@triton.jit
def _turns_kernel(before, after, place, square, turn, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(place + row).to(tl.int64)
    own = tl.zeros([BLOCK], tl.float32)
    other = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        b = tl.load(before + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        a = tl.load(after + source * width + column, mask=column < width, other=0.0).to(tl.float32)
        own += b * b
        other += a * a
        product += b * a
    squared = tl.sum(own, 0)
    lengths = tl.maximum(tl.sqrt_rn(squared), 1e-8) * tl.maximum(tl.sqrt_rn(tl.sum(other, 0)), 1e-8)
    tl.store(square + row, squared)
    tl.store(turn + row, 1.0 - tl.sum(product, 0) / lengths)


def turns(before_MD: Tensor, after_ND: Tensor, place_M: Tensor) -> tuple[Tensor, Tensor]:
    """The squared length of rows before, and one minus their cosine to those after, float32 [M]: M sampled tokens, N of a micro-batch.

    Args:
        before_MD: what the residual stream was.
        after_ND: what it became.
        place_M: int64, where the sampled ones lie.
    """
    before_MD, after_ND = before_MD.contiguous(), after_ND.contiguous()
    rows, width = before_MD.shape
    square_M, turn_M = before_MD.new_empty(2, rows, dtype=torch.float32)
    if rows:
        _turns_kernel[(rows,)](before_MD, after_ND, place_M, square_M, turn_M, width, BLOCK=_block(width), num_warps=4)
    return square_M, turn_M


@triton.jit
def _add_pairs_kernel(
    norm, gate, token, row, end, sums, largest, first_bad, before, num_experts, stride, BLOCK: tl.constexpr
):
    expert = tl.program_id(0)
    own_row = tl.program_id(1)
    begin = tl.load(end + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(end + expert)
    count = tl.zeros([BLOCK], tl.float64)
    gates = tl.zeros([BLOCK], tl.float64)
    norms = tl.zeros([BLOCK], tl.float64)
    norms_sq = tl.zeros([BLOCK], tl.float64)
    gated = tl.zeros([BLOCK], tl.float64)
    gated_sq = tl.zeros([BLOCK], tl.float64)
    maximum = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for first in range(begin, stop, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        inside = pair < stop
        place = tl.load(token + pair, mask=inside, other=0)
        own = tl.load(row + place, mask=inside, other=-1) == own_row
        n32 = tl.load(norm + pair, mask=own, other=0.0)
        g = tl.load(gate + pair, mask=own, other=0.0).to(tl.float64)
        n = n32.to(tl.float64)
        product = g * n
        count += own.to(tl.float64)
        gates += g
        norms += n
        norms_sq += n * n
        gated += product
        gated_sq += product * product
        maximum = tl.maximum(maximum, n32)
        bad = bad | (~(tl.abs(product) < float("inf"))).to(tl.int32)
    at = sums + own_row * num_experts + expert
    tl.store(at, tl.load(at) + tl.sum(count, 0))
    tl.store(at + stride, tl.load(at + stride) + tl.sum(gates, 0))
    tl.store(at + 2 * stride, tl.load(at + 2 * stride) + tl.sum(norms, 0))
    tl.store(at + 3 * stride, tl.load(at + 3 * stride) + tl.sum(norms_sq, 0))
    tl.store(at + 4 * stride, tl.load(at + 4 * stride) + tl.sum(gated, 0))
    tl.store(at + 5 * stride, tl.load(at + 5 * stride) + tl.sum(gated_sq, 0))
    at_largest = largest + own_row * num_experts + expert
    tl.store(at_largest, tl.maximum(tl.load(at_largest), tl.max(maximum, 0)))
    # The smallest of whole numbers does not depend on the order, as a sum would.
    if tl.max(bad, 0) > 0:
        tl.atomic_min(first_bad, (before + expert).to(tl.int64))


def add_pairs(
    norm_P: Tensor,
    gate_P: Tensor,
    token_P: Tensor,
    expert_P: Tensor,
    row_N: Tensor,
    *,
    sums_QSE: Tensor,
    max_SE: Tensor,
    num_rows: int,
    first_bad: Tensor,
    number: int,
) -> None:
    """Add a micro-batch's pairs to a layer's totals, in place; one program owns the totals of one expert in one row.

    Args:
        norm_P, gate_P, token_P, expert_P: as in `experts.RoutedPairs`, sorted by expert.
        row_N: the row to which a token belongs; those from `num_rows` on are left out.
        sums_QSE: float64 [6, S, E], contiguous: counts, gates, norms, their squares, gated norms, their squares.
        max_SE: float32 [S, E], the largest norms.
        num_rows: rows that are added to, at most S.
        first_bad: int64 scalar, lowered to `number` x E + the first expert with a gated norm that is NaN or infinite.
        number: of the micro-batch.
    """
    num_experts = sums_QSE.shape[-1]
    end_E = torch.searchsorted(expert_P, torch.arange(num_experts, device=expert_P.device), right=True).int()
    _add_pairs_kernel[(num_experts, num_rows)](
        norm_P, gate_P, token_P, row_N, end_E, sums_QSE, max_SE, first_bad, number * num_experts, num_experts,
        sums_QSE.stride(0),
        BLOCK=_PAIRS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _quantize_kernel(
    values, token, result, scale, width, rows, GATHERS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(token + row).to(tl.int64) if GATHERS else row
    group = tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < width
    wide = tl.load(values + source * width + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.maximum(tl.max(tl.abs(wide), 1), 1e-10) / 448.0
    tl.store(result + row * width + column, (wide / factor[:, None]).to(result.dtype.element_ty), mask=inside)
    tl.store(scale + group.to(tl.int64) * rows + row, factor, mask=group * GROUP < width)


def quantize(values_ND: Tensor, token_P: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows in FP8 (E4M3), each 128 values with a scale of their own, as engines quantise inputs of weights with blocks of 128 x 128.

    A scale is the largest of its values over 448, which FP8 reaches; at least 1e-10 over it.

    Args:
        values_ND: D a multiple of 128.
        token_P: the rows that are taken; None takes all as they are.

    Returns:
        [P, D], and float32 [D / 128, P].
    """
    values_ND = values_ND.contiguous()
    rows, width = len(values_ND if token_P is None else token_P), values_ND.shape[1]
    result = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=values_ND.device)
    scale = torch.empty(width // FP8_BLOCK, rows, dtype=torch.float32, device=values_ND.device)
    if rows:
        block = int(triton.next_power_of_2(width // FP8_BLOCK))
        _quantize_kernel[(rows,)](
            values_ND, values_ND if token_P is None else token_P, result, scale, width, rows,
            GATHERS=token_P is not None, BLOCK=block, GROUP=FP8_BLOCK, num_warps=4,
        )  # fmt: skip
    return result, scale


@triton.jit
def _grouped_fp8_kernel(
    rows, row_scale, weight, weight_scale, result, result_scale, tile_expert, tile_first, end, num_experts, num_rows,
    WIDTH: tl.constexpr, OUT: tl.constexpr, SWIGLU: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    programs: tl.constexpr = OUT // (2 * GROUP)
    groups: tl.constexpr = WIDTH // GROUP
    apart: tl.constexpr = OUT // 2 if SWIGLU else GROUP
    tile = tl.program_id(0) // programs
    column = (tl.program_id(0) % programs) * (GROUP if SWIGLU else 2 * GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < num_experts:
        first_row = tl.load(tile_first + tile)
        pair = first_row + tl.arange(0, ROWS)
        inside = pair < tl.load(end + expert)
        at_row_scale = row_scale + pair
        at_scale = weight_scale + (expert * (OUT // GROUP) + column // GROUP) * groups
        one = tl.zeros([ROWS, GROUP], tl.float32)
        two = tl.zeros([ROWS, GROUP], tl.float32)
        # Sums are kept in units of the last group's scales, so that the matrix units add to them: a sum beside them, to be multiplied
        # and added, would take as many registers again.
        unit_row = tl.full([ROWS], 1.0, tl.float32)
        unit_one = 1.0
        unit_two = 1.0
        for group in tl.range(0, groups, num_stages=STAGES):
            left = rows.load([first_row, group * GROUP])
            right_one = weight.load([expert * OUT + column, group * GROUP])
            right_two = weight.load([expert * OUT + column + apart, group * GROUP])
            scale_row = tl.load(at_row_scale + group * num_rows, mask=inside, other=1.0)
            scale_one = tl.load(at_scale + group)
            scale_two = tl.load(at_scale + (apart // GROUP) * groups + group)
            ratio = unit_row / scale_row
            one = tl.dot(left, right_one.T, one * (ratio * (unit_one / scale_one))[:, None])
            two = tl.dot(left, right_two.T, two * (ratio * (unit_two / scale_two))[:, None])
            unit_row = scale_row
            unit_one = scale_one
            unit_two = scale_two
        one *= (unit_row * unit_one)[:, None]
        two *= (unit_row * unit_two)[:, None]
        at = pair.to(tl.int64)
        columns = column + tl.arange(0, GROUP)
        if SWIGLU:
            wide = one / (1.0 + tl.exp(-one)) * two
            factor = tl.maximum(tl.max(tl.abs(wide), 1), 1e-10) / 448.0
            at_result = result + at[:, None] * (OUT // 2) + columns[None, :]
            tl.store(at_result, (wide / factor[:, None]).to(result.dtype.element_ty), mask=inside[:, None])
            tl.store(result_scale + (column // GROUP).to(tl.int64) * num_rows + at, factor, mask=inside)
        else:
            at_result = result + at[:, None] * OUT + columns[None, :]
            tl.store(at_result, one.to(result.dtype.element_ty), mask=inside[:, None])
            tl.store(at_result + apart, two.to(result.dtype.element_ty), mask=inside[:, None])


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Which rows of which expert each program of a grouped product takes; made on the device, which nothing waits for.

    Attributes:
        expert_M, first_M: int32, the expert and the first pair of a tile; E for those that are left over.
        end_E: int32, the first pair after an expert's.
    """

    expert_M: Tensor
    first_M: Tensor
    end_E: Tensor

    @classmethod
    def of(cls, expert_P: Tensor, num_experts: int) -> _Tiles:
        """As many tiles as there can be: full ones, and one more for each expert."""
        end_E = torch.searchsorted(expert_P, torch.arange(num_experts, device=expert_P.device), right=True)
        begin_E = torch.cat((end_E.new_zeros(1), end_E[:-1]))
        count_E = (end_E - begin_E + (_TILE_ROWS - 1)) // _TILE_ROWS
        behind_E = count_E.cumsum(0)
        number_M = torch.arange(len(expert_P) // _TILE_ROWS + num_experts, device=expert_P.device)
        expert_M = torch.searchsorted(behind_E, number_M, right=True)
        own_M = expert_M.clamp(max=num_experts - 1)
        first_M = begin_E[own_M] + (number_M - (behind_E - count_E)[own_M]) * _TILE_ROWS
        return cls(expert_M.int(), first_M.int(), end_E.int())


def _grouped_fp8(
    values_PD: Tensor, scale_GP: Tensor, tiles: _Tiles, weight_EOD: Tensor, scale_EHG: Tensor, *, swiglu: bool
) -> tuple[Tensor, Tensor]:
    """Each pair's row times its expert's weight, [P, O] in bfloat16, or, of gate and up, their SwiGLU in FP8 as `quantize` rounds it.

    Args:
        values_PD, scale_GP: as `quantize` returns them.
        weight_EOD: FP8 [E, O, D], gate and up one after the other.
        scale_EHG: float32 [E, O / 128, D / 128].

    Returns:
        The values, and their scales, [O / 256, P]; of bfloat16 there are none.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    (rows, width), (num_experts, out, _) = values_PD.shape, weight_EOD.shape
    if swiglu:
        result = torch.empty(rows, out // 2, dtype=torch.float8_e4m3fn, device=values_PD.device)
    else:
        result = torch.empty(rows, out, dtype=torch.bfloat16, device=values_PD.device)
    scale = torch.empty(out // 2 // FP8_BLOCK if swiglu else 0, rows, dtype=torch.float32, device=values_PD.device)
    if rows:
        _grouped_fp8_kernel[(len(tiles.expert_M) * out // (2 * FP8_BLOCK),)](
            TensorDescriptor.from_tensor(values_PD, [_TILE_ROWS, FP8_BLOCK]), scale_GP,
            TensorDescriptor.from_tensor(weight_EOD.view(num_experts * out, width), [FP8_BLOCK, FP8_BLOCK]), scale_EHG,
            result, scale, tiles.expert_M, tiles.first_M, tiles.end_E, num_experts, rows,
            WIDTH=width, OUT=out, SWIGLU=swiglu, ROWS=_TILE_ROWS, GROUP=FP8_BLOCK, STAGES=_TILE_STAGES, num_warps=_TILE_WARPS,
        )  # fmt: skip
    return result, scale


def experts_fp8(
    hidden_ND: Tensor,
    token_P: Tensor | None,
    expert_P: Tensor,
    gate_up_E: Tensor,
    gate_up_scale_E: Tensor,
    down_E: Tensor,
    down_scale_E: Tensor,
) -> Tensor:
    """SwiGLU experts with weights and inputs in FP8 (E4M3), [P, D] in bfloat16; sums are float32 as the matrix units keep it.

    Args:
        hidden_ND: inputs.
        token_P: int64, the input of a pair; None where inputs are the pairs' own.
        expert_P: int64, sorted.
        gate_up_E, down_E: weights, [E, 2 I, D] and [E, D, I]; I a multiple of 128, D of 256.
        gate_up_scale_E, down_scale_E: float32, of each 128 x 128 of them; none of them 0.
    """
    tiles = _Tiles.of(expert_P, len(gate_up_E))
    inner, scale = _grouped_fp8(*quantize(hidden_ND, token_P), tiles, gate_up_E, gate_up_scale_E, swiglu=True)
    return _grouped_fp8(inner, scale, tiles, down_E, down_scale_E, swiglu=False)[0]


def _block(width: int) -> int:
    return min(int(triton.next_power_of_2(width)), _COLUMNS)
