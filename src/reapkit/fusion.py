"""Where fused kernels take steps of a model's own forward: what is written as expected, to the letter, and nothing else."""

from __future__ import annotations

import importlib.util
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def fused_kernels(device: torch.device) -> ModuleType | None:
    """The module of fused kernels where they run: on a GPU with Triton."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from reapkit import kernels

    return kernels


def fuse(model: nn.Module, kernels: ModuleType) -> None:
    """Let RMS norms and rotary embeddings run as one kernel each, where they are written as Llama's or MiniMax-M2's are, to the letter.

    All else stays as it is. Attention keeps its own forward, in which the rotation alone has another meaning.
    """
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.minimax_m2 import modeling_minimax_m2 as minimax

    rotations = [_compiled(llama.apply_rotary_pos_emb), _compiled(minimax.apply_rotary_pos_emb)]
    for module in model.modules():
        forward: Any = type(module).forward
        if not isinstance(forward, FunctionType):
            continue
        if hasattr(module, "variance_epsilon") and _compiled(forward) == _compiled(llama.LlamaRMSNorm.forward):
            module.forward = partial(_fused_norm, module, kernels)
        used = forward.__globals__
        if (
            "apply_rotary_pos_emb" in forward.__code__.co_names
            and _compiled(used["apply_rotary_pos_emb"]) in rotations
            and _compiled(used["rotate_half"]) == _compiled(llama.rotate_half)
        ):
            changed = {**used, "apply_rotary_pos_emb": partial(_fused_rotation, kernels)}
            copy = FunctionType(forward.__code__, changed, forward.__name__, forward.__defaults__, forward.__closure__)
            module.forward = MethodType(copy, module)


def _compiled(function: Any) -> tuple[Any, ...]:
    """What a function does, whatever its documentation says."""
    code = function.__code__
    return code.co_code, code.co_names, code.co_consts[1:]  # the first is the docstring or None


def _fused_norm(module: Any, kernels: ModuleType, hidden: Tensor) -> Tensor:
    result: Tensor = kernels.rms_norm(hidden, module.weight, module.variance_epsilon)
    return result


def _fused_rotation(
    kernels: ModuleType, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    assert unsqueeze_dim == 1, "heads before tokens"
    return kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin)
