"""Where the neurons of an expert lie in its tensors, matching them to another expert's, and the average of several experts.

Reordering the neurons of an expert, the rows of what leads into them together with the columns of what leads out, does not change its
function. Experts that were trained apart hold like neurons in different places, so merging methods match them first.

Shape suffixes: I = neurons of an expert, D = hidden size, N = sampled tokens, F = features of a neuron.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as encode
from torch import Tensor

from reapkit.checkpoint import Checkpoint
from reapkit.clusters import Alignment, Merging
from reapkit.errors import CheckpointError, UnsupportedError
from reapkit.formats import decode
from reapkit.layout import MoELayer, MoELayout, StackedTensor
from reapkit.quantization import Format
from reapkit.tensors import reading

ORDERS_NAME = "reapkit/alignment.safetensors"

# Words for what leads into the neurons and what leads out of them, at the end of a name, after the expert.
_FUSED = re.compile(r"(^|\.)(gate_up_proj|input_linear)(?=[._]|$)")
_INTO = re.compile(r"(^|\.)(gate_proj|up_proj|w1|w3|v1)(?=[._]|$)")
_OUT = re.compile(r"(^|\.)(down_proj|w2|output_linear)(?=[._]|$)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the neurons lie in one expert's part of a tensor.

    Attributes:
        axis: their dimension; None for what belongs to the expert's output.
        halves: how many values stand for one neuron along it: 2 where gate and up lie in one tensor.
        interleaved: whether those two lie side by side, and not the ups behind the gates.
        leads_in: whether it leads into the neurons.
        is_gate: whether it holds the gate alone.
    """

    axis: int | None
    halves: int = 1
    interleaved: bool = False
    leads_in: bool = True
    is_gate: bool = False

    def rows(self, values: Tensor) -> Tensor:
        """The values of every neuron in a row of its own, gates before ups: [I, F]."""
        assert self.axis is not None
        moved = values.movedim(self.axis, 0)
        count = moved.shape[0] // self.halves
        if not self.interleaved:
            moved = moved.reshape(self.halves, count, -1).transpose(0, 1)
        return moved.reshape(count, -1)

    def reorder(self, values: Tensor, order_I: Tensor) -> Tensor:
        """The values with neuron order[i] in the place of neuron i."""
        if self.axis is None:
            return values
        count = len(order_I)
        if self.interleaved:
            at = torch.stack([order_I * self.halves + half for half in range(self.halves)], dim=1).reshape(-1)
        else:
            at = torch.cat([order_I + half * count for half in range(self.halves)])
        return values.index_select(self.axis, at)


class ExpertTensors:
    """The tensors of one layer's experts with their values, whatever lies on disk: one tensor per expert, or one for all.

    Args:
        checkpoint: where they lie.
        layout: its layout.
        layer: the layer.
        form: how they are stored.

    Attributes:
        num_neurons: of an expert.
        places: where they lie, by what a tensor's name says after the expert, or by the whole name of one that holds all experts.

    Raises:
        UnsupportedError: where the neurons lie is not known.
    """

    def __init__(self, checkpoint: Checkpoint, layout: MoELayout, layer: MoELayer, form: Format) -> None:
        self._checkpoint, self._form, self._num_experts = checkpoint, form, layout.num_experts
        self._index = layer.index
        self._own = [
            {rest: info for rest, info in parts.items() if not form.is_companion(info.name)} for parts in layer.experts
        ]
        self._stacked = {
            stacked.info.name: stacked
            for stacked in layer.stacked
            if stacked.role == "expert" and not form.is_companion(stacked.info.name)
        }
        self.num_neurons, self.places = self._find_places(layout.architecture.interleaved)

    def values(self, key: str, experts: Iterable[int]) -> dict[int, Tensor]:
        """Some experts' values, in float32."""
        if key in self._stacked:
            parts = split_experts(
                decode(self._checkpoint, self._stacked[key].info, format=self._form), self._stacked[key]
            )
            return {expert: parts[expert].float() for expert in experts}
        return {
            expert: decode(self._checkpoint, self._own[expert][key], format=self._form).float() for expert in experts
        }

    def load(self, experts: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """By expert, all its tensors."""
        by_key = {key: self.values(key, experts) for key in self.places}
        return {expert: {key: values[expert] for key, values in by_key.items()} for expert in experts}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        tensors = self._checkpoint.tensors
        if self._own:
            return {rest: self._form.decoded(info, tensors)[1] for rest, info in self._own[0].items()}
        shapes = {}
        for name, stacked in self._stacked.items():
            shape = list(self._form.decoded(stacked.info, tensors)[1])
            shape[stacked.axis] //= stacked.num_entries
            # One entry per expert is no dimension of the expert itself.
            if shape[stacked.axis] == 1 and len(shape) > 1:
                del shape[stacked.axis]
            shapes[name] = tuple(shape)
        return shapes

    def _find_places(self, interleaved: bool) -> tuple[int, dict[str, Place]]:
        shapes = self._shapes()
        short = {key: key.rpartition(".experts.")[2] if key in self._stacked else key for key in shapes}
        short = {key: _last_words(name) for key, name in short.items()}
        weights = {key: shape for key, shape in shapes.items() if len(shape) == 2}
        fused = next((key for key in weights if _FUSED.search(short[key])), None)
        into = fused or next((key for key in weights if _INTO.search(short[key])), None)
        out = next((key for key in weights if _OUT.search(short[key])), None)
        if into is None or out is None:
            raise UnsupportedError(
                f"where the neurons of layer {self._index}'s experts lie is not known: they consist of {', '.join(sorted(shapes))}",
                hint="hc-smoe averages experts without matching their neurons",
            )
        halves = 2 if fused else 1
        by_rows = any(stacked.num_entries != stacked.info.shape[stacked.axis] for stacked in self._stacked.values())
        # As a linear layer stores them, as its transpose, or both with neurons as rows (DBRX).
        orders = [(0, 0)] if by_rows else [(0, 1), (1, 0)]
        for axis_in, axis_out in orders:
            neurons = shapes[out][axis_out]
            if (
                shapes[into][axis_in] == halves * neurons
                and shapes[into][1 - axis_in] == shapes[out][1 - axis_out]
            ):  # fmt: skip
                break
        else:
            raise UnsupportedError(
                f"{into!r} {list(shapes[into])} and {out!r} {list(shapes[out])} of layer {self._index} share no dimension of neurons"
            )
        places = {}
        for key, shape in shapes.items():
            name = short[key]
            is_out = bool(_OUT.search(name))
            if not is_out and not _FUSED.search(name) and not _INTO.search(name):
                raise UnsupportedError(
                    f"whether {key!r} of layer {self._index} leads into an expert's neurons is not known"
                )
            axis: int | None = axis_out if is_out else axis_in
            if len(shape) == 1:  # a bias: what leads out adds it to the output
                axis = None if is_out else 0
            count = 1 if is_out else halves
            if axis is not None and shape[axis] != count * neurons:
                raise UnsupportedError(
                    f"{key!r} {list(shape)} of layer {self._index} does not fit the {neurons} neurons that the others have"
                )
            is_gate = bool(re.search(r"(^|\.)(gate_proj|w1)(?=[._]|$)", name))
            places[key] = Place(axis, count, interleaved and not is_out and count == 2, not is_out, is_gate)
        return neurons, places


def _last_words(name: str) -> str:
    """A tensor's name without `.weight`, and of a stacked one without the layer."""
    return ".".join(
        name.removesuffix(".weight").removesuffix(".weight_packed").removesuffix(".qweight").split(".")[-2:]
    )


def split_experts(values: Tensor, stacked: StackedTensor) -> list[Tensor]:
    """Every expert's part of a tensor that holds all of them, the expert dimension left out where it has one entry for each."""
    parts = values.tensor_split(stacked.num_entries, dim=stacked.axis)
    one_each = values.shape[stacked.axis] == stacked.num_entries and values.ndim > 1
    return [part.squeeze(stacked.axis) if one_each else part for part in parts]


def join_experts(parts: Sequence[Tensor], stacked: StackedTensor, *, num_dimensions: int) -> Tensor:
    """One tensor of the experts' parts, as `split_experts` took one with so many dimensions apart."""
    return (torch.stack if parts[0].ndim < num_dimensions else torch.cat)(list(parts), dim=stacked.axis)


def align(
    tensors: ExpertTensors, centre: int, others: Sequence[int], *, by: Alignment, inputs_ND: Tensor
) -> dict[int, np.ndarray[Any, np.dtype[np.int32]]]:
    """For each of the others the order of its neurons that makes them most like the centre's: its neuron order[i] matches the centre's i.

    By weights: the largest sum of inner products of what leads in and out (Ainsworth et al., arXiv 2209.04836). By activations and
    weights: the smallest sum of the distances of normalised activations on `inputs_ND` and of normalised weights, as in REAM's code but
    for its projection of the weights to 64 dimensions. Activations are silu(gate) x up, relu(up)^2 for experts without a gate: which
    function it is decides how good a match is, never whether the reordered expert computes the same.

    Raises:
        UnsupportedError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UnsupportedError(
            "matching the neurons of experts needs the package scipy", hint="pip install 'reapkit[merge]'"
        ) from None
    loaded = tensors.load([centre, *others])

    def features(expert: int) -> tuple[Tensor, Tensor | None]:
        parts = loaded[expert]
        weights = torch.cat(
            [tensors.places[key].rows(parts[key]) for key in parts if tensors.places[key].axis is not None], 1
        )
        return weights, _activations(parts, tensors.places, inputs_ND) if by != "weights" else None

    ours = features(centre)
    orders = {}
    for expert in others:
        theirs = features(expert)
        if by == "weights":
            cost = -(ours[0] @ theirs[0].T)
        else:
            assert ours[1] is not None and theirs[1] is not None
            cost = _distances(ours[1], theirs[1]) + _distances(ours[0], theirs[0])
        _, order = linear_sum_assignment(cost.double().numpy())
        orders[expert] = np.asarray(order, dtype=np.int32)
    return orders


def _activations(parts: Mapping[str, Tensor], places: Mapping[str, Place], inputs_ND: Tensor) -> Tensor:
    """What every neuron makes of the inputs, [I, N]; biases are left out."""
    gate = up = None
    for key, values in parts.items():
        place = places[key]
        if not place.leads_in or values.ndim == 1:
            continue
        for half, rows in enumerate(place.rows(values).chunk(place.halves, dim=1)):
            seen_IN = rows @ inputs_ND.T
            if place.is_gate or (place.halves == 2 and half == 0):
                gate = seen_IN
            else:
                up = seen_IN
    assert up is not None
    return torch.relu(up).square() if gate is None else torch.nn.functional.silu(gate) * up


def _distances(ours: Tensor, theirs: Tensor) -> Tensor:
    """Euclidean distances of rows brought to length 1."""
    normal = torch.nn.functional.normalize
    return torch.cdist(normal(ours, dim=1), normal(theirs, dim=1))


def average(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum in float32, added up in the order given."""
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + part * weight
    return total


def encode_orders(orders: Mapping[int, np.ndarray[Any, Any]]) -> tuple[bytes, str]:
    """The file of all layers' orders, int32 [E, I] each, and its digest."""
    content = encode({f"layers.{index}": np.ascontiguousarray(order_EI) for index, order_EI in orders.items()})
    return content, hashlib.sha256(content).hexdigest()


def read_orders(out: Path, merging: Merging, num_experts: int) -> dict[int, np.ndarray[Any, Any]]:
    """The orders that an output's experts were merged with, by layer; none where the method matches no neurons.

    Raises:
        CheckpointError: the file is missing, changed, or holds something that is no order.
    """
    if not merging.alignment:
        return {}
    path = out / ORDERS_NAME
    if not path.is_file():
        raise CheckpointError(f"{out} has no {ORDERS_NAME}, by which its experts were merged", hint="merge again")
    with reading(ORDERS_NAME):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != merging.alignment:
        raise CheckpointError(f"{ORDERS_NAME} in {out} has changed since the experts were merged", hint="merge again")
    try:
        orders = {int(name.split(".")[1]): order_EI for name, order_EI in load_file(path).items()}
    except (SafetensorError, ValueError, IndexError) as error:
        raise CheckpointError(f"{ORDERS_NAME} in {out} is damaged: {error}", hint="merge again") from None
    for index, order_EI in orders.items():
        if (
            order_EI.ndim != 2
            or len(order_EI) != num_experts
            or (np.sort(order_EI) != np.arange(order_EI.shape[1])).any()
        ):
            raise CheckpointError(
                f"{ORDERS_NAME} in {out} holds no order of the neurons of layer {index}", hint="merge again"
            )
    return orders
