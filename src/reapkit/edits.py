"""What pruning does to a checkpoint, said tensor by tensor before a byte is written.

A kept tensor is a byte range of the source under a new name; only `dequantize` ever computes a value. Shards of the output follow the
shards of the source, so that each can be written by one sequential read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reapkit.checkpoint import CONFIG_NAME, Checkpoint
from reapkit.errors import UnsupportedError, UsageError
from reapkit.layout import MoELayout
from reapkit.plans import PruningPlan
from reapkit.tensors import DTYPE_BITS, TensorInfo, nbytes

if TYPE_CHECKING:
    from reapkit.formats import Format


@dataclass(frozen=True, slots=True)
class Copy:
    """The tensor's bytes as they are."""

    info: TensorInfo


@dataclass(frozen=True, slots=True)
class Take:
    """The tensor's bytes at some indices of one axis, in the order of the indices."""

    info: TensorInfo
    axis: int
    indices: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """How often the whole axis is repeated in the tensor's bytes: 1 means that indices are rows."""
        return math.prod(self.info.shape[: self.axis])

    @property
    def row_bytes(self) -> int:
        """Bytes that belong to one index within one block."""
        return self.info.nbytes // (self.num_blocks * self.info.shape[self.axis])


@dataclass(frozen=True, slots=True)
class Dequantize:
    """The tensor's values in bf16.

    Attributes:
        weight: the quantised tensor, or the part of it that stays.
        companions: the tensors that its values need besides its own bytes.
    """

    weight: Copy | Take
    companions: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output and where its bytes come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Copy | Take | Dequantize

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)

    @property
    def info(self) -> TensorInfo:
        """The source's tensor."""
        return self.source.weight.info if isinstance(self.source, Dequantize) else self.source.info


def outputs(
    checkpoint: Checkpoint, layout: MoELayout, plan: PruningPlan, *, dequantize: bool = False
) -> dict[str, list[OutputTensor]]:
    """The output's tensors by shard: one shard per source shard that still has any, tensors in their order there.

    Kept experts are numbered anew from 0 in their original order; router rows and selection biases follow the same order. With
    `dequantize` a quantised weight becomes bf16 in the shard where the weight lies, its scales vanish, and all else stays as it is.

    Raises:
        UsageError: `dequantize` on a checkpoint that is not quantised.
        CheckpointError: a scale is missing.
        UnsupportedError: a format that cannot be dequantised, or experts that do not begin at whole bytes.
    """
    form = _format_to_dequantize(checkpoint) if dequantize else None
    rank = {layer: {expert: i for i, expert in enumerate(kept)} for layer, kept in plan.kept.items()}
    by_source: dict[str, list[OutputTensor]] = {}
    for name, info in checkpoint.tensors.items():
        if form is not None and form.is_companion(name):
            continue
        source: Copy | Take = Copy(info)
        shape = info.shape
        if name in layout.expert_of:
            layer, expert = layout.expert_of[name]
            if expert not in rank[layer]:
                continue
            name = layout.renamed(name, rank[layer][expert])
        elif name in layout.stacked_of and plan.num_kept < layout.num_experts:
            layer, stacked = layout.stacked_of[name]
            source = _take(info, stacked.axis, plan.kept[layer])
            shape = (*shape[: stacked.axis], plan.num_kept, *shape[stacked.axis + 1 :])
        companions = form.companions(info, checkpoint.tensors) if form is not None else ()
        output = (
            OutputTensor(name, "BF16", shape, Dequantize(source, companions))
            if companions
            else OutputTensor(name, info.dtype, shape, source)
        )
        by_source.setdefault(info.file, []).append(output)
    count = len(by_source)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": tensors
        for number, tensors in enumerate(by_source.values(), start=1)
    }


def _format_to_dequantize(checkpoint: Checkpoint) -> Format:
    from reapkit.formats import read_format

    form = read_format(checkpoint.config)
    if form.block is None:
        raise UsageError(
            f"{checkpoint.origin} is not quantised, so there is nothing to dequantise", hint="leave out --dequantize"
        )
    return form


def _take(info: TensorInfo, axis: int, indices: tuple[int, ...]) -> Take:
    if math.prod(info.shape[axis + 1 :]) * DTYPE_BITS[info.dtype] % 8:
        raise UnsupportedError(
            f"the experts in {info.name!r} ({info.dtype} {list(info.shape)}) do not begin at whole bytes"
        )
    return Take(info, axis, indices)


def spans(source: Copy | Take) -> Iterator[tuple[int, int]]:
    """The byte ranges of the source's shard that make up the output's tensor, in order; rows only, for `Take`."""
    if isinstance(source, Copy):
        yield source.info.start, source.info.stop
        return
    assert source.num_blocks == 1
    for index in source.indices:
        start = source.info.start + index * source.row_bytes
        yield start, start + source.row_bytes


def compute(checkpoint: Checkpoint, source: Take | Dequantize) -> memoryview:
    """The bytes of an output tensor that is not a sequence of byte ranges."""
    if isinstance(source, Take):
        stored = np.frombuffer(checkpoint.read(source.info), np.uint8)
        blocks = stored.reshape(source.num_blocks, source.info.shape[source.axis], source.row_bytes)
        return np.ascontiguousarray(blocks[:, list(source.indices)]).reshape(-1).data
    import torch

    from reapkit.formats import decode, read_format

    weight = source.weight
    values = decode(checkpoint, weight.info, format=read_format(checkpoint.config))
    if isinstance(weight, Take):
        values = values.index_select(weight.axis, torch.tensor(weight.indices))
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data


def num_parameters(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Values in the tensors of these names and shapes, scales left out; None where the format packs them in a way that is not known."""
    if config.get("quantization_config") is None:
        return sum(map(math.prod, shapes.values()))
    from reapkit.formats import read_format

    try:
        form = read_format(config)
    except UnsupportedError:
        return None
    return sum(math.prod(shape) for name, shape in shapes.items() if not form.is_companion(name))


def edit_config(
    config: Mapping[str, Any], layout: MoELayout, num_kept: int, *, dequantize: bool = False
) -> dict[str, Any]:
    """The raw config with the new expert count under every key that held the old one, at whatever depth; nothing else changes.

    With `dequantize` the quantisation goes too, and the dtype becomes bfloat16 under the key that is there.
    """
    edited: dict[str, Any] = _recount(
        config, frozenset(layout.architecture.num_experts_keys), layout.num_experts, num_kept
    )
    if dequantize:
        edited = _without(edited, "quantization_config")
        section = layout.architecture.config_section
        for table in (edited, *([edited[section]] if section else [])):
            for key in {"dtype", "torch_dtype"} & table.keys():
                table[key] = "bfloat16"
    return edited


def _recount(value: Any, keys: frozenset[str], before: int, after: int) -> Any:
    if isinstance(value, dict):
        return {
            key: after
            if key in keys and type(inner) is int and inner == before
            else _recount(inner, keys, before, after)
            for key, inner in value.items()
        }
    return [_recount(inner, keys, before, after) for inner in value] if isinstance(value, list) else value


def _without(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _without(inner, key) for name, inner in value.items() if name != key}
    return [_without(inner, key) for inner in value] if isinstance(value, list) else value


def config_text(checkpoint: Checkpoint, edited: Mapping[str, Any], keys: Iterable[str]) -> bytes:
    """The edited config as a file: the source's own text with the counts replaced, so that `diff` shows those lines alone.

    Where more than counts changed, it is written anew with the keys in their order.
    """
    text = (checkpoint.path / CONFIG_NAME).read_bytes()
    for key in keys:
        if key in edited:
            text = re.sub(rb'("%s"\s*:\s*)\d+' % key.encode(), rb"\g<1>%d" % edited[key], text)
    try:
        if json.loads(text) == edited:
            return text
    except ValueError:
        pass
    return (json.dumps(edited, indent=2, ensure_ascii=False) + "\n").encode()
