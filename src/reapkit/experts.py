"""How the experts of a transformers model are run and shown to whoever observes them.

transformers has a registry of experts functions, which most families go through: the model's own router hands each of them the tokens,
the chosen experts and the final coefficients. `observed_experts` is one more of them. Families that do not use the registry are brought
to the same function by the small adapters at the end.

What is written here in torch is the reference; forwards that run with `kernels` take the same steps with fewer passes over memory. Only
products in FP8 have no other way than `kernels`: their reference is in the tests.

Shape suffixes: N = tokens of a micro-batch laid end to end, P = routed (token, expert) pairs sorted by expert, K = experts per token,
E = experts, Z = zero experts, D = hidden size, I = inner size of an expert.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from reapkit.quantization import FP8_BLOCK

EXPERTS_NAME = "reapkit"
# Experts' weights whose products may be computed in FP8.
FP8_PROJECTIONS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class RoutedPairs:
    """What one micro-batch sent to one layer's experts, one entry per routed (token, expert) pair, sorted by expert.

    Attributes:
        layer: number of the layer.
        expert_P: int64, the expert.
        token_P: int64, the token's place in the micro-batch laid end to end.
        gate_P: float32, the coefficient with which the model multiplies the expert's output.
        norm_P: float32, L2 norm of the expert's output before that.
        expert_NK, gate_NK: the same choices and coefficients token by token, as the model handed them over.
        hidden_ND: the experts' input.
        compute: from inputs [M, D], places among them and experts, sorted by expert, [P], to the experts' outputs [P, D], good until the
            next call: runs any expert on any input.
    """

    layer: int
    expert_P: Tensor
    token_P: Tensor
    gate_P: Tensor
    norm_P: Tensor
    expert_NK: Tensor
    gate_NK: Tensor
    hidden_ND: Tensor
    compute: Callable[[Tensor, Tensor | None, Tensor], Tensor]


# What an observer of the experts receives.
RoutedObserver = Callable[[RoutedPairs], None]


class Workspace:
    """Memory of a CPU for what experts make on their way, taken over and over: the system gives new memory page by page, each cleared.

    What that costs on two cores is in benchmarks/RESULTS.md, section 7.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, purpose: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, the memory of the last one for the same purpose."""
        count = math.prod(shape)
        memory = self._memory.get((purpose, dtype))
        if memory is None or len(memory) < count:
            memory = None
            self._memory.pop((purpose, dtype), None)  # before more is taken
            memory = self._memory[purpose, dtype] = torch.empty(count, dtype=dtype)
        return memory[:count].view(shape)

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in self._memory.values())

    def clear(self) -> None:
        """Give all of it back."""
        self._memory.clear()


class _Running(threading.local):
    """The suspended forward that runs in this thread: the layer that it is in, who observes it, the fused kernels that it may use, and
    on a CPU the memory that it shares with the others."""

    forward: Any = None
    layer: int = -1
    observe: RoutedObserver | None = None
    kernels: ModuleType | None = None
    workspace: Workspace | None = None


running = _Running()


def observed_experts(self: Any, hidden_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor) -> Tensor:
    """An experts function for transformers' registry: the layer's output, with every pair shown to the running forward's observer.

    Tokens are gathered by expert, so each expert runs on its own tokens only. Norms are taken in float32 before the gate.

    Args:
        hidden_ND: input of the experts, [N, D].
        expert_NK: int64, the experts that the model's own router chose.
        gate_NK: the model's own final coefficients.

    Returns:
        [N, D] in the input's dtype.
    """

    def compute(hidden_ND: Tensor, token_P: Tensor | None, expert_P: Tensor) -> Tensor:
        if is_fp8(self):
            assert running.kernels is not None
            result: Tensor = running.kernels.experts_fp8(
                hidden_ND, token_P, expert_P, self.gate_up_proj, self.gate_up_proj_scale, self.down_proj, self.down_proj_scale
            )  # fmt: skip
            return result
        hidden_PD = _gathered(hidden_ND, token_P)

        def project(inputs: Tensor, name: str) -> Tensor:
            bias = getattr(self, f"{name}_bias")[expert_P] if self.has_bias else None
            weight_E = getattr(self, name)
            return _grouped_linear(inputs, weight_E, expert_P, name, bias_P=bias, is_transposed=self.is_transposed)

        inner = project(hidden_PD, "gate_up_proj" if self.has_gate else "up_proj")
        if _is_swiglu(self):
            inner = _swiglu(inner)
        elif self.has_gate:
            inner = self._apply_gate(inner)
        else:
            inner = self.act_fn(inner)
        out_PD = project(inner, "down_proj")
        return self.post_expert_norm(out_PD) if getattr(self, "has_post_expert_norm", False) else out_PD

    return _routed(hidden_ND, expert_NK, gate_NK, compute)


def _routed(
    hidden_ND: Tensor,
    expert_NK: Tensor,
    gate_NK: Tensor,
    compute: Callable[[Tensor, Tensor | None, Tensor], Tensor],
    *,
    num_observed: int | None = None,
    scale_inputs: bool = False,
) -> Tensor:
    """The weighted sum of what experts make of the tokens sent to them.

    Args:
        hidden_ND, expert_NK, gate_NK: as in `observed_experts`.
        compute: from inputs [N, D], the places among them and the experts of pairs, [P], sorted by expert, to outputs [P, D]; without
            places the inputs are the pairs' own, [P, D].
        num_observed: pairs of experts from this number on are not shown to the observer; None shows all.
        scale_inputs: multiply the experts' inputs with the coefficients, and not their outputs.
    """
    top_k = expert_NK.shape[1]
    expert_P, order_P = torch.sort(expert_NK.reshape(-1), stable=True)
    token_P = order_P // top_k
    gate_P = gate_NK.reshape(-1)[order_P]
    if scale_inputs:
        out_PD = compute(_gathered(hidden_ND, token_P) * gate_P.unsqueeze(-1), None, expert_P)
        gate_P = torch.ones_like(gate_P)
    else:
        out_PD = compute(hidden_ND, token_P, expert_P)
    out_ND, norm_P = _combine(out_PD, gate_P, order_P, top_k=top_k, dtype=hidden_ND.dtype)
    if running.observe is not None:
        shown = slice(None) if num_observed is None else slice(int((expert_P < num_observed).sum()))
        running.observe(
            RoutedPairs(
                running.layer,
                expert_P[shown],
                token_P[shown],
                gate_P[shown].float(),
                norm_P[shown],
                expert_NK,
                gate_NK,
                hidden_ND,
                compute,
            )
        )
    return out_ND


def _gathered(hidden_ND: Tensor, token_P: Tensor | None) -> Tensor:
    """The inputs of the pairs, [P, D]."""
    if token_P is None:
        return hidden_ND
    if running.kernels is None:
        shape = len(token_P), hidden_ND.shape[1]
        return torch.index_select(hidden_ND, 0, token_P, out=_room("pairs", *shape, like=hidden_ND))
    result: Tensor = running.kernels.gather(hidden_ND, token_P)
    return result


def _swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of halves that lie one after the other, [P, 2 I], which may be overwritten."""
    if running.kernels is not None:
        result: Tensor = running.kernels.swiglu(gate_up)
        return result
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.mul(nn.functional.silu(gate, inplace=True), up, out=_room("inner", *gate.shape, like=gate))


def _room(purpose: str, *shape: int, like: Tensor) -> Tensor | None:
    """Where a result of the plain path goes; None for memory of its own."""
    return None if running.workspace is None else running.workspace.take(purpose, *shape, dtype=like.dtype)


def _combine(
    out_PD: Tensor, gate_P: Tensor, order_P: Tensor, *, top_k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The weighted sum of every token's pairs, [N, D] in `dtype`, and the norm of every pair, float32 [P].

    Pairs are summed in the token's order: no atomics, so the same bits every time.
    """
    if running.kernels is not None:
        result: tuple[Tensor, Tensor] = running.kernels.combine(out_PD, gate_P, order_P, top_k=top_k, dtype=dtype)
        return result
    norm_P = torch.linalg.vector_norm(out_PD, dim=-1, dtype=torch.float32)
    # In the wider dtype of both: some routers' coefficients are float32.
    is_widened = torch.result_type(out_PD, gate_P) != out_PD.dtype
    weighted_PD = torch.mul(out_PD, gate_P.unsqueeze(-1), out=None if is_widened else out_PD)
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(len(order_P), device=order_P.device)
    # Where the inputs were, which are not needed any more.
    unsorted = torch.index_select(weighted_PD, 0, place_P, out=_room("pairs", *weighted_PD.shape, like=weighted_PD))
    return unsorted.view(-1, top_k, unsorted.shape[-1]).sum(dim=1).to(dtype), norm_P


def _is_swiglu(experts: Any) -> bool:
    """Whether experts declare `silu(gate) * up` on halves that lie one after the other."""
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import _default_apply_gate

    return (
        experts.has_gate
        and type(experts)._apply_gate is _default_apply_gate
        and isinstance(experts.act_fn, nn.SiLU | SiLUActivation)
    )


def is_fp8(experts: Any) -> bool:
    """Whether `keep_fp8` was called on experts."""
    return hasattr(experts, scale_of(FP8_PROJECTIONS[0]))


def scale_of(name: str) -> str:
    """The name of the scales of experts' weights in FP8."""
    return f"{name}_scale"


def keep_fp8(experts: Any) -> bool:
    """Give experts on the meta device homes for weights in FP8 (E4M3) and for a float32 scale of each 128 x 128 of them; whether they can.

    They can where they are SwiGLU without biases on weights [E, out, in], with inner sizes in 128s and hidden ones in 256s.
    """
    projections = [getattr(experts, name, None) for name in FP8_PROJECTIONS]
    if (
        any(
            weight is None or weight.shape[1] % (2 * FP8_BLOCK) or weight.shape[2] % FP8_BLOCK for weight in projections
        )
        or "forward" in vars(experts)  # an adapter's
        or getattr(experts, "has_bias", True)
        or getattr(experts, "is_transposed", True)
        or getattr(experts, "has_post_expert_norm", False)
        or not _is_swiglu(experts)
    ):
        return False
    for name in FP8_PROJECTIONS:
        count, rows, columns = getattr(experts, name).shape
        weight = torch.empty(count, rows, columns, dtype=torch.float8_e4m3fn, device="meta")
        scale = torch.empty(count, rows // FP8_BLOCK, columns // FP8_BLOCK, device="meta")
        setattr(experts, name, nn.Parameter(weight, requires_grad=False))
        setattr(experts, scale_of(name), nn.Parameter(scale, requires_grad=False))
    return True


def _grouped_linear(
    inputs: Tensor,
    weight_E: Tensor,
    expert_P: Tensor,
    name: str,
    *,
    bias_P: Tensor | None = None,
    is_transposed: bool = False,
) -> Tensor:
    """Each row times its expert's weight: [E, out, in], or [E, in, out] if transposed; rows are sorted by expert.

    The name says which of an expert's weights it is: in a workspace its results have a place of their own.
    """
    from transformers.integrations.moe import _grouped_linear as grouped

    numbers_E = torch.arange(len(weight_E), device=expert_P.device)
    offsets_E = torch.searchsorted(expert_P, numbers_E, right=True).int()
    if running.workspace is not None:
        weight_E = weight_E if is_transposed else weight_E.mT
        inputs = inputs.to(weight_E.dtype)
        out = running.workspace.take(name, len(inputs), weight_E.shape[2], dtype=weight_E.dtype)
        begin = 0
        for weight, end in zip(weight_E, offsets_E.tolist(), strict=True):
            if end > begin:
                torch.mm(inputs[begin:end], weight, out=out[begin:end])
            begin = end
        return out if bias_P is None else out.add_(bias_P)
    result: Tensor = grouped(inputs, weight_E, offsets_E, bias=bias_P, is_transposed=is_transposed)
    return result


# --- families that do not go through the registry


def adapt(model: nn.Module) -> None:
    """Bring experts that transformers runs by code of their own to `observed_experts` or a function like it; model on the meta device."""
    for module in model.modules():
        if adapter := _ADAPTERS.get(type(module).__name__):
            adapter(module)


def experts_of(layer: nn.Module) -> nn.Module | None:
    """The module that holds a layer's expert weights and shows what is routed to them; None for a layer without experts."""
    return next((part for part in layer.modules() if hasattr(part, "has_gate") and hasattr(part, "num_experts")), None)


def _adapt_plain(experts: Any) -> None:
    """Weights lie as the registry expects them, and only the class is not registered."""
    experts.has_gate, experts.has_bias, experts.is_transposed = True, False, False
    experts.forward = partial(observed_experts, experts)


def _adapt_longcat(experts: Any) -> None:
    """LongCat-Flash: choices from E on are zero experts, which return their input and have no weights.

    transformers allocates gate and up projections for them too, which no checkpoint of the vendor holds.
    """
    experts.has_gate, experts.num_experts = True, experts.num_routed_experts
    num_experts = experts.num_experts
    shape = (num_experts, *experts.gate_up_proj.shape[1:])
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.new_empty(shape), requires_grad=False)

    def compute(hidden_ND: Tensor, token_P: Tensor | None, expert_P: Tensor) -> Tensor:
        hidden_PD = _gathered(hidden_ND, token_P)
        real = int((expert_P < num_experts).sum())
        gate_up = _grouped_linear(hidden_PD[:real], experts.gate_up_proj, expert_P[:real], "gate_up_proj")
        gate, up = gate_up.chunk(2, dim=-1)
        out = _grouped_linear(experts.act_fn(gate) * up, experts.down_proj, expert_P[:real], "down_proj")
        return torch.cat((out, hidden_PD[real:]))

    experts.forward = lambda hidden_ND, expert_NK, gate_NK: _routed(
        hidden_ND, expert_NK, gate_NK, compute, num_observed=num_experts
    )


def _adapt_dbrx(experts: Any) -> None:
    """DBRX: one matrix [E x I, D] per projection, the experts' rows one after the other."""
    experts.has_gate = True

    def compute(hidden_ND: Tensor, token_P: Tensor | None, expert_P: Tensor) -> Tensor:
        hidden_PD = _gathered(hidden_ND, token_P)
        glu = experts.mlp
        w1, v1, w2 = (weight.view(experts.num_experts, -1, experts.hidden_size) for weight in (glu.w1, glu.v1, glu.w2))
        gate, up = _grouped_linear(hidden_PD, w1, expert_P, "w1"), _grouped_linear(hidden_PD, v1, expert_P, "v1")
        return _grouped_linear(glu.activation_fn(gate) * up, w2, expert_P, "w2", is_transposed=True)

    def forward(hidden_BTD: Tensor, expert_NK: Tensor, gate_NK: Tensor) -> Tensor:
        hidden_ND = hidden_BTD.reshape(-1, experts.hidden_size)
        return _routed(hidden_ND, expert_NK, gate_NK, compute).view(hidden_BTD.shape)

    experts.forward = forward


def _adapt_llama4(block: Any) -> None:
    """Llama-4: the router's score multiplies the expert's input and not its output, whose coefficient is 1.

    transformers runs every expert on every token, with zeros for those that were not chosen.
    """
    experts = block.experts
    experts.has_gate = True

    def compute(hidden_ND: Tensor, token_P: Tensor | None, expert_P: Tensor) -> Tensor:
        hidden_PD = _gathered(hidden_ND, token_P)
        gate_up = _grouped_linear(hidden_PD, experts.gate_up_proj, expert_P, "gate_up_proj", is_transposed=True)
        gate, up = gate_up.chunk(2, dim=-1)
        return _grouped_linear(up * experts.act_fn(gate), experts.down_proj, expert_P, "down_proj", is_transposed=True)

    def forward(hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        hidden_ND = hidden_BTD.reshape(-1, block.hidden_dim)
        score_NE, logits_NE = block.router(hidden_ND)
        # Scores of experts that were not chosen are sigmoid(-inf) = 0.
        expert_NK = logits_NE.topk(block.top_k, dim=1).indices
        routed_ND = _routed(hidden_ND, expert_NK, score_NE.gather(1, expert_NK), compute, scale_inputs=True)
        return block.shared_expert(hidden_ND) + routed_ND, logits_NE

    block.forward = forward


_ADAPTERS: Mapping[str, Callable[[Any], None]] = {
    "Step3p7Experts": _adapt_plain,
    "LongcatFlashExperts": _adapt_longcat,
    "DbrxExperts": _adapt_dbrx,
    "Llama4TextMoe": _adapt_llama4,
}
