"""Fused kernels for CUDA, in Triton: what lies between the matrix products of a MoE layer, and the sums over routed pairs.

The products themselves are `grouped_mm`'s, which no kernel of ours beat (benchmarks/RESULTS.md). What remains moves bytes, so each kernel
reads its inputs once and writes its outputs once, and its floor is bytes over the memory's bandwidth. With 32,768 tokens of MiniMax-M2
(K = 8, D = 3,072, I = 1,536, bfloat16) on an H200, of which a copy reaches 4.3 TB/s:

| kernel | bytes | floor |
|---|---|---|
| `dequantize_blocks` | 1 byte a weight read, 2 written: 3.6 and 7.2 GB a layer | 2.5 ms |
| `gather` | P D read (mostly from the cache), P D written: 1.8 to 3.2 GB | 0.4 to 0.75 ms |
| `swiglu` | 2 P I read, P I written: 2.4 GB | 0.56 ms |
| `combine` | P D read, N D written: 1.8 GB | 0.42 ms |
| `rms_norm` | N D read, N D written: 0.4 GB, of queries 0.8 GB | 0.1 and 0.2 ms |
| `rotate` | queries and keys read and written: 0.94 GB | 0.22 ms |
| `add_pairs` | some 20 bytes a pair: 5 MB | launch |

The products take 3 x 2 P D I = 7.4 TFLOP, 10.8 ms at 690 TFLOP/s. Nothing here waits for the device, and no kernel uses atomic additions:
every result has the same bits in every run.

Imported only where there is a GPU and Triton; `experts` and `sums` hold the plain versions of the same functions.

Shape suffixes: N = tokens of a micro-batch laid end to end, P = routed (token, expert) pairs sorted by expert, K = experts per token,
E = experts, D = hidden size, I = inner size of an expert, S = rows of sums, Q = the six sums.
"""

# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-untyped-def,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values of a row that one program holds at once; a power of two, and longer rows take several rounds.
_COLUMNS = 4096
# Pairs that a program of `add_pairs` takes at a time: an expert of MiniMax-M2 gets about a thousand of 32,768 tokens.
_PAIRS = 1024


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


def _block(width: int) -> int:
    return min(int(triton.next_power_of_2(width)), _COLUMNS)
