"""Which bytes of a checkpoint belong to which expert.

An `Architecture` says it in patterns, once per model family; resolving it against a `Checkpoint` gives a `MoELayout`, in which every
tensor of every MoE layer is accounted for. A tensor that could depend on the number of experts and that no pattern claims is an error.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from reapkit.checkpoint import Checkpoint, section_of
from reapkit.errors import CheckpointError, UnsupportedError
from reapkit.tensors import TensorInfo

Role = Literal["expert", "router", "bias"]


@dataclass(frozen=True)
class Slot:
    """A family of tensors on disk that has an expert dimension.

    Attributes:
        pattern: a tensor name with `{layer}`, `{expert}` and `{rest}` (any suffix, so that block scales and other companions of an
            expert always move with it).
        axis: the expert dimension of a tensor that holds all experts; None for one tensor per expert.
        role: `expert` weights, `router` rows (their bytes are the `routing` fingerprint), or a selection `bias` (likewise).
    """

    pattern: str
    axis: int | None
    role: Role

    @cached_property
    def regex(self) -> re.Pattern[str]:
        text = re.escape(self.pattern)
        for field, group in (("layer", r"(?P<layer>\d+)"), ("expert", r"(?P<expert>\d+)"), ("rest", r"(?P<rest>.+)")):
            text = text.replace(re.escape("{" + field + "}"), group)
        return re.compile(text)


@dataclass(frozen=True)
class Architecture:
    """How one family of MoE models lies on disk: data only.

    Attributes:
        name: the family's name for people.
        model_types: values of `model_type` in config.json.
        slots: every family of tensors with an expert dimension.
        block: the prefix of a MoE block, with `{layer}`: any tensor under it with a dimension equal to the number of experts must be
            claimed by a slot or by `unpruned`.
        num_experts_keys: names of the expert count; all that are present must agree and are all rewritten.
        top_k_keys: names of the number of experts per token.
        unpruned: patterns of tensors under `block` that pruning leaves alone (shared experts).
        num_groups_key: name of the number of router groups, None for routers without groups.
        config_section: the nested table that holds these keys, None for the top level.
        scoring: how router logits become scores, for people: `sigmoid + bias`, `softmax`.
    """

    name: str
    model_types: tuple[str, ...]
    slots: tuple[Slot, ...]
    block: str
    num_experts_keys: tuple[str, ...]
    top_k_keys: tuple[str, ...]
    scoring: str
    unpruned: tuple[str, ...] = ()
    num_groups_key: str | None = None
    config_section: str | None = None


@dataclass(frozen=True)
class StackedTensor:
    """One tensor that holds something for every expert along `axis`."""

    info: TensorInfo
    axis: int
    role: Role


@dataclass(frozen=True)
class MoELayer:
    """The tensors of one MoE layer.

    Attributes:
        index: the layer's number in tensor names.
        experts: per expert, its own tensors by the name's rest; empty tables where experts are stacked.
        stacked: tensors that hold something for every expert.
    """

    index: int
    experts: tuple[Mapping[str, TensorInfo], ...]
    stacked: tuple[StackedTensor, ...]


@dataclass(frozen=True)
class MoELayout:
    """An architecture resolved against one checkpoint.

    Attributes:
        architecture: the family.
        num_experts: experts per MoE layer, E.
        top_k: experts that each token is routed to.
        num_groups: groups of the router, 1 where it has none.
        layers: MoE layers in order.
    """

    architecture: Architecture
    num_experts: int
    top_k: int
    num_groups: int
    layers: tuple[MoELayer, ...]

    @cached_property
    def expert_of(self) -> Mapping[str, tuple[int, int]]:
        """(layer, expert) of every tensor that belongs to one expert, by name."""
        return {
            info.name: (layer.index, expert)
            for layer in self.layers
            for expert, parts in enumerate(layer.experts)
            for info in parts.values()
        }

    @cached_property
    def stacked_of(self) -> Mapping[str, tuple[int, StackedTensor]]:
        """(layer, tensor) of every tensor that holds something for all experts, by name."""
        return {stacked.info.name: (layer.index, stacked) for layer in self.layers for stacked in layer.stacked}

    @property
    def router_names(self) -> tuple[str, ...]:
        """Tensors whose bytes decide the routing: routers and selection biases."""
        return tuple(name for name, (_, stacked) in self.stacked_of.items() if stacked.role in ("router", "bias"))

    @property
    def layer_indices(self) -> tuple[int, ...]:
        return tuple(layer.index for layer in self.layers)

    def renamed(self, name: str, expert: int) -> str:
        """The name of an expert's tensor under another expert number."""
        for slot in self.architecture.slots:
            if slot.axis is None and (match := slot.regex.fullmatch(name)):
                start, stop = match.span("expert")
                return f"{name[:start]}{expert}{name[stop:]}"
        raise KeyError(name)


def config_count(config: Mapping[str, Any], keys: Iterable[str], *, what: str) -> int:
    """A count that stands in the config under one or more of these keys.

    Raises:
        CheckpointError: none is there, they disagree, or the value is not a positive integer.
    """
    found = {key: config[key] for key in keys if config.get(key) is not None}
    if not found:
        raise CheckpointError(f"config.json has no {what}: none of {', '.join(keys)}")
    values = list(found.values())
    if any(type(value) is not int or value < 1 for value in values):
        raise CheckpointError(f"config.json gives {what} as {found}, where a positive whole number is expected")
    if len(set(values)) > 1:
        raise CheckpointError(f"config.json contradicts itself on {what}: {found}")
    return int(values[0])


def find(config: Mapping[str, Any], architectures: Sequence[Architecture]) -> Architecture:
    """The architecture of a config.

    Raises:
        UnsupportedError: an unknown family, with the known ones named, or a dense model.
    """
    model_type = config.get("model_type")
    for architecture in architectures:
        if model_type in architecture.model_types:
            return architecture
    supported = ", ".join(sorted(t for architecture in architectures for t in architecture.model_types))
    expert_keys = [key for key in config if "expert" in key]
    if not expert_keys and not any(
        isinstance(value, dict) and any("expert" in key for key in value) for value in config.values()
    ):
        raise UnsupportedError(
            f"this is a dense model ({model_type!r}): its config.json names no experts, so there are none to prune",
            hint=f"supported model types: {supported}",
        )
    raise UnsupportedError(
        f"the architecture {model_type!r} is not supported", hint=f"supported model types: {supported}"
    )


def resolve(checkpoint: Checkpoint, architectures: Sequence[Architecture]) -> MoELayout:
    """Assign every tensor of every MoE layer to its expert.

    Raises:
        UnsupportedError: unknown family or dense model.
        CheckpointError: gaps in expert numbers, unequal sets of tensors among experts, shapes that contradict the config, or a
            tensor that depends on the number of experts and is claimed by no slot.
    """
    architecture = find(checkpoint.config, architectures)
    section = section_of(checkpoint.config, architecture.config_section)
    num_experts = config_count(section, architecture.num_experts_keys, what="number of experts")
    top_k = config_count(section, architecture.top_k_keys, what="number of experts per token")
    if top_k > num_experts:
        raise CheckpointError(f"config.json routes each token to {top_k} of {num_experts} experts")
    groups_key = architecture.num_groups_key
    num_groups = (
        config_count(section, [groups_key], what="number of groups") if groups_key and section.get(groups_key) else 1
    )

    experts: dict[int, dict[int, dict[str, TensorInfo]]] = defaultdict(lambda: defaultdict(dict))
    stacked: dict[int, list[StackedTensor]] = defaultdict(list)
    unclaimed: list[TensorInfo] = []
    for name, info in checkpoint.tensors.items():
        for slot in architecture.slots:
            match = slot.regex.fullmatch(name)
            if match is None:
                continue
            layer = int(match["layer"])
            if slot.axis is None:
                experts[layer][int(match["expert"])][name[match.end("expert") :]] = info
            else:
                _check_stacked(info, slot.axis, num_experts)
                stacked[layer].append(StackedTensor(info, slot.axis, slot.role))
            break
        else:
            unclaimed.append(info)

    indices = sorted(experts.keys() | stacked.keys())
    if not indices:
        raise CheckpointError(
            f"no tensor of {checkpoint.origin} has the name of a {architecture.name} expert",
            hint=f"expected names like {architecture.slots[0].pattern}",
        )
    _check_unclaimed(unclaimed, architecture, indices, num_experts)
    return MoELayout(
        architecture,
        num_experts,
        top_k,
        num_groups,
        tuple(_layer(i, experts[i], stacked[i], architecture, num_experts) for i in indices),
    )


def _layer(
    index: int,
    experts: Mapping[int, Mapping[str, TensorInfo]],
    stacked: Sequence[StackedTensor],
    architecture: Architecture,
    num_experts: int,
) -> MoELayer:
    wants_experts = any(slot.axis is None for slot in architecture.slots)
    if wants_experts:
        absent = sorted(set(range(num_experts)) - experts.keys())
        extra = sorted(experts.keys() - set(range(num_experts)))
        if absent or extra:
            raise CheckpointError(
                f"layer {index} has {len(experts)} experts where config.json says {num_experts}: "
                f"missing {_brief(absent)}, beyond the count {_brief(extra)}",
                hint="neither transformers nor vLLM would notice this",
            )
        usual = Counter(frozenset(parts) for parts in experts.values()).most_common(1)[0][0]
        for expert in range(num_experts):
            if odd := sorted(usual ^ experts[expert].keys()):
                verb = "lacks" if odd[0] in usual else "alone has"
                raise CheckpointError(
                    f"expert {expert} of layer {index} {verb} the tensor {odd[0].lstrip('.')!r} ({len(odd)} differ)"
                )
    routers = [tensor for tensor in stacked if tensor.role == "router"]
    if not routers:
        raise CheckpointError(f"layer {index} has experts and no router")
    return MoELayer(index, tuple(experts[e] for e in range(num_experts)) if wants_experts else (), tuple(stacked))


def _check_stacked(info: TensorInfo, axis: int, num_experts: int) -> None:
    if len(info.shape) <= axis or info.shape[axis] != num_experts:
        raise CheckpointError(
            f"{info.name!r} has the shape {list(info.shape)}: dimension {axis} should be the {num_experts} experts "
            "of config.json"
        )


def _check_unclaimed(
    infos: Iterable[TensorInfo], architecture: Architecture, indices: Sequence[int], num_experts: int
) -> None:
    blocks = tuple(architecture.block.format(layer=index) for index in indices)
    allowed = [Slot(pattern, None, "expert").regex for pattern in architecture.unpruned]
    for info in infos:
        in_block = info.name.startswith(blocks)
        if in_block and num_experts in info.shape and not any(regex.fullmatch(info.name) for regex in allowed):
            raise UnsupportedError(
                f"{info.name!r} {list(info.shape)} has a dimension equal to the {num_experts} experts, and "
                f"{architecture.name}'s layout does not say whether pruning must slice it"
            )


def _brief(numbers: Sequence[int]) -> str:
    return (
        "none"
        if not numbers
        else ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    )
