"""Which bytes of a checkpoint belong to which expert.

An `Architecture` says it in patterns, once per model family; resolving it against a `Checkpoint` gives a `MoELayout`, in which every
tensor of every MoE layer is accounted for. A tensor that could depend on the number of experts and that no pattern claims is an error.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple

from reapkit.checkpoint import CONFIG_NAME, Checkpoint, text_section
from reapkit.errors import CheckpointError, UnsupportedError
from reapkit.quantization import read_format
from reapkit.selection import Selection
from reapkit.tensors import TensorInfo, as_table, as_text, brief

Role = Literal["expert", "router", "bias"]

# More than any model has; counts of a stranger's config are believed only below it, since memory and time follow them. The largest
# public releases have 126 layers and 1,024 experts.
LARGEST_COUNT = 100_000

# What is read of each tensor to tell revisions apart: a page, of which training leaves no byte alone for long.
SAMPLED_BYTES = 4096


@dataclass(frozen=True)
class Slot:
    """A family of tensors on disk that has an expert dimension.

    Attributes:
        pattern: the end of a tensor name, after the block, with `{expert}` and `{rest}` (any suffix, so that block scales and other
            companions of an expert always move with it).
        axis: the expert dimension of a tensor that holds all experts; None for one tensor per expert.
        role: `expert` weights, `router` rows and whatever else per expert weighs or scores it (their bytes are the `routing`
            fingerprint), or a selection `bias` (likewise).
        holds: what lies along `axis`: an entry per expert; or the rows of one expert after those of another, [E x I, D]; or, after
            the entries of the experts, those of the zero experts, which have no weights and always stay.
    """

    pattern: str
    axis: int | None
    role: Role
    holds: Literal["experts", "rows of experts", "experts and zero experts"] = "experts"


class Claim(NamedTuple):
    """What a tensor's name says.

    Attributes:
        slot: the slot whose pattern it has.
        layer: the number in the name.
        is_mtp_block: whether that number counts MTP blocks from 0 and not layers.
        start, stop: where the expert's number stands; both -1 where there is none.
    """

    slot: Slot
    layer: int
    is_mtp_block: bool
    start: int
    stop: int


@dataclass(frozen=True)
class Architecture:
    """How one family of MoE models lies on disk: data only.

    Attributes:
        name: the family's name for people.
        model_types: values of `model_type` in config.json.
        blocks: prefixes of a MoE block, with `{layer}`, several where releases differ: any tensor under them with a dimension equal
            to the number of experts must be claimed by a slot or by `unpruned`.
        slots: every family of tensors with an expert dimension, by the name's end after the block.
        scoring: how router logits become scores, for people: `sigmoid + bias`, `softmax`.
        selection: the same as a rule that can be applied to some of the experts.
        mtp_blocks: prefixes of a MoE block inside multi-token prediction, where `{layer}` counts from 0. MTP layers that are numbered
            on from the last decoder layer need none.
        mtp_keys: names of the number of MTP layers with experts, which becomes 0 when they are dropped; empty where no release has any.
        num_experts_keys: names of the expert count; all that are present must agree and are all rewritten.
        top_k_keys: names of the number of experts per token.
        num_layers_keys: names of the number of decoder layers, or of a list or pattern with an entry for each.
        experts_section: the table in the language model's section that holds expert counts, None where no table of its own does.
        num_groups_keys: names of the number of router groups; empty for routers without groups.
        topk_groups_key: name of the number of groups that a token may choose from.
        num_zero_experts_key: name of the number of zero experts.
        unpruned: patterns of tensors under a block that pruning leaves alone (shared experts).
        interleaved: whether gate and up of a neuron lie side by side where one tensor holds both.
        runs_own_experts: whether transformers runs its experts where other tokens cannot be sent to them, so that they are not merged.
        runs_as: the model type by which transformers runs it, where that is another's.
        not_in_transformers: those of the model types that transformers has no class for, so that they are only pruned.
        caution: a sentence on what text alone cannot measure.
        refusal: a sentence on why this family is not pruned; such an entry has no slots.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: tuple[str, ...]
    slots: tuple[Slot, ...]
    scoring: str
    selection: Selection
    mtp_blocks: tuple[str, ...] = ()
    mtp_keys: tuple[str, ...] = ()
    num_experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)
    num_layers_keys: tuple[str, ...] = ("num_hidden_layers",)
    experts_section: str | None = None
    num_groups_keys: tuple[str, ...] = ()
    topk_groups_key: str | None = None
    num_zero_experts_key: str | None = None
    unpruned: tuple[str, ...] = ()
    interleaved: bool = False
    runs_own_experts: bool = False
    runs_as: str | None = None
    not_in_transformers: tuple[str, ...] = ()
    caution: str | None = None
    refusal: str | None = None

    def claim(self, name: str) -> Claim | None:
        """The slot that a tensor's name belongs to, None for everything without an expert dimension."""
        for regex, slot, is_mtp_block in self._claims:
            if match := regex.fullmatch(name):
                span = match.span("expert") if slot.axis is None else (-1, -1)
                return Claim(slot, int(match["layer"]), is_mtp_block, *span)
        return None

    def is_unpruned(self, name: str) -> bool:
        """Whether a tensor of a MoE block belongs to no expert (shared experts and the like)."""
        return any(regex.fullmatch(name) for regex in self._unpruned)

    def block_of(self, name: str, num_layers: int) -> int | None:
        """The number of the layer in whose MoE block a tensor lies, MTP blocks numbered on from the last layer; None elsewhere."""
        for regex, is_mtp_block in self._blocks:
            if match := regex.match(name):
                return int(match["layer"]) + (num_layers if is_mtp_block else 0)
        return None

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a tensor lies in, whatever it is; None outside the list of layers."""
        match = self._layers.match(name)
        return int(match["layer"]) if match else None

    def is_mtp(self, name: str, num_layers: int) -> bool:
        """Whether a tensor belongs to multi-token prediction: behind the last decoder layer, or in a block of its own."""
        layer = self.layer_of(name)
        return layer >= num_layers if layer is not None else bool(self._mtp.match(name))

    @cached_property
    def _all_blocks(self) -> tuple[tuple[str, bool], ...]:
        """Every block, and whether it is one of MTP."""
        return (*((block, False) for block in self.blocks), *((block, True) for block in self.mtp_blocks))

    @cached_property
    def _claims(self) -> tuple[tuple[re.Pattern[str], Slot, bool], ...]:
        return tuple(
            (_regex(block + slot.pattern), slot, is_mtp) for block, is_mtp in self._all_blocks for slot in self.slots
        )

    @cached_property
    def _blocks(self) -> tuple[tuple[re.Pattern[str], bool], ...]:
        return tuple((_regex(block), is_mtp) for block, is_mtp in self._all_blocks)

    @cached_property
    def _unpruned(self) -> tuple[re.Pattern[str], ...]:
        return tuple(_regex(block + end) for block, _ in self._all_blocks for end in self.unpruned)

    @cached_property
    def _layers(self) -> re.Pattern[str]:
        prefixes = dict.fromkeys(block.partition("{layer}")[0] for block in self.blocks)
        return re.compile(f"(?:{'|'.join(map(re.escape, prefixes))})" + r"(?P<layer>\d+)\.")

    @cached_property
    def _mtp(self) -> re.Pattern[str]:
        # Vendors put all of it under names like "mtp." or "model.mtp_block.".
        return re.compile(r"(?:\w+\.)*mtp\w*\.")


# What quantisers call a weight whose values they pack.
_PACKED = re.compile(r"\.(weight_packed|qweight)$")


def _regex(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern)
    for part, group in (("layer", r"(?P<layer>\d+)"), ("expert", r"(?P<expert>\d+)"), ("rest", r".+")):
        text = text.replace(re.escape("{" + part + "}"), group)
    return re.compile(text)


@dataclass(frozen=True)
class StackedTensor:
    """One tensor that holds something for every expert along `axis`.

    Attributes:
        info: the tensor.
        axis: the expert dimension.
        role: as in `Slot`.
        num_entries: what `axis` divides into: E, and the zero experts behind them.
        num_experts: E.
    """

    info: TensorInfo
    axis: int
    role: Role
    num_entries: int
    num_experts: int

    def entries(self, kept: Sequence[int]) -> tuple[int, ...]:
        """The entries that stay, in order: those of the kept experts and of all zero experts."""
        return (*kept, *range(self.num_experts, self.num_entries))

    def cut(self, shape: Sequence[int], num_kept: int) -> tuple[int, ...]:
        """A shape, the tensor's own or that of its values, with so many experts."""
        left = shape[self.axis] // self.num_entries * (num_kept + self.num_entries - self.num_experts)
        return (*shape[: self.axis], left, *shape[self.axis + 1 :])


@dataclass(frozen=True)
class MoELayer:
    """The tensors of one MoE layer.

    Attributes:
        index: the layer's number in tensor names; MTP blocks of their own are numbered on from the last decoder layer.
        experts: per expert, its own tensors by the name's rest; empty where experts are stacked.
        stacked: tensors that hold something for every expert.
        incomplete: by expert, the names' rests of scales and the like that other experts have and it lacks.
    """

    index: int
    experts: tuple[Mapping[str, TensorInfo], ...]
    stacked: tuple[StackedTensor, ...]
    incomplete: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class MoELayout:
    """An architecture resolved against one checkpoint.

    Attributes:
        architecture: the family.
        num_experts: experts per MoE layer, E.
        top_k: experts that each token is routed to.
        num_groups: groups of the router, 1 where it has none.
        topk_groups: groups that a token may choose its experts from.
        num_layers: decoder layers, MTP layers left out.
        layers: MoE layers in order, MTP layers last.
    """

    architecture: Architecture
    num_experts: int
    top_k: int
    num_groups: int
    topk_groups: int
    num_layers: int
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
    def fingerprinted_names(self) -> tuple[str, ...]:
        """Those of the decoder layers: siblings in other formats have them in common, also where only one of them ships MTP layers."""
        return tuple(name for name in self.router_names if self.stacked_of[name][0] < self.num_layers)

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """The decoder layers with experts."""
        return tuple(layer.index for layer in self.layers if layer.index < self.num_layers)

    @property
    def mtp_indices(self) -> tuple[int, ...]:
        """The MTP layers with experts."""
        return tuple(layer.index for layer in self.layers if layer.index >= self.num_layers)

    def is_mtp(self, name: str) -> bool:
        """Whether a tensor, expert or not, belongs to multi-token prediction."""
        return self.architecture.is_mtp(name, self.num_layers)

    def renamed(self, name: str, expert: int) -> str:
        """The name of an expert's tensor under another expert number."""
        claim = self.architecture.claim(name)
        if claim is None or claim.start < 0:
            raise KeyError(name)
        return f"{name[: claim.start]}{expert}{name[claim.stop :]}"


def tokens_ahead(layer: int, num_layers: int) -> int:
    """How many of the next tokens a layer takes: none, but MTP layers, which follow the others, one and more.

    The last tokens of a document do not have them.
    """
    return max(0, layer - num_layers + 1)


@dataclass(frozen=True)
class Identity:
    """Which checkpoint something was made from: by its bytes, whatever it was called.

    Attributes:
        origin: how the user named it; revision: the hub's commit, where known.
        layout: SHA-256 over names, dtypes and shapes.
        routing: SHA-256 over the routers and selection biases of the decoder layers. Siblings, the same model in other formats, share
            it, and differ in `layout`.
        weights: SHA-256 over the first bytes of every tensor, of experts those of the first one: another revision has another one, also
            where its routers were left alone.
    """

    origin: str
    revision: str | None
    layout: str
    routing: str
    weights: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, layout: MoELayout) -> Identity:
        """Read from the routers whole, and a few kilobytes from every other tensor."""
        sampled = [name for name in checkpoint.tensors if layout.expert_of.get(name, (0, 0))[1] == 0]
        with checkpoint.fingerprinting([(layout.fingerprinted_names, None), (sampled, SAMPLED_BYTES)]):
            return cls(
                checkpoint.origin,
                checkpoint.revision,
                checkpoint.layout_fingerprint,
                checkpoint.fingerprint(layout.fingerprinted_names),
                checkpoint.fingerprint(sampled, limit=SAMPLED_BYTES),
            )

    @classmethod
    def from_json(cls, value: Any) -> Identity:
        """Read from a file.

        Raises:
            ValueError: it is not what `asdict` gives.
        """
        entries = as_table(value)
        if entries.keys() != {part.name for part in fields(cls)}:
            raise ValueError(f"the source has the entries {brief(sorted(entries))}")
        revision = entries["revision"]
        texts = {name: as_text(entry) for name, entry in entries.items() if name != "revision"}
        return cls(revision=None if revision is None else as_text(revision), **texts)

    def differing(self, other: Identity, *, siblings: bool = False) -> str | None:
        """What tells the models apart, None where nothing does; with `siblings` another format does not."""
        if self.routing != other.routing:
            return "routers"
        if self.layout != other.layout:
            return None if siblings else "tensors"
        return "weights" if self.weights != other.weights else None

    def moved(self, other: Identity) -> str | None:
        """Of another commit of the same repository, which one is meant, which one this is, and what tells the two apart.

        None where it is the same commit, or one that is not known. Fingerprints do not see most experts, so a commit counts by itself.
        """
        if self.origin != other.origin or None in (self.revision, other.revision) or self.revision == other.revision:
            return None
        apart = [
            f"{what} {getattr(self, name)[:12]} there and {getattr(other, name)[:12]} here"
            for what, name in (("routers", "routing"), ("tensors", "layout"), ("weights", "weights"))
            if getattr(self, name) != getattr(other, name)
        ]
        return f"{self.origin} at {str(self.revision)[:12]}, and this is {str(other.revision)[:12]}: " + (
            "its fingerprints differ, " + "; ".join(apart) if apart else "all fingerprints are the same"
        )


def config_count(config: Mapping[str, Any], keys: Iterable[str], *, what: str) -> int:
    """A count that stands in the config under one or more of these keys; a list, one entry per layer, must repeat one number.

    Raises:
        CheckpointError: none is there, they disagree, or the value is not a positive integer.
    """
    found = {key: config[key] for key in keys if config.get(key) is not None}
    if not found:
        raise CheckpointError(f"{CONFIG_NAME} has no {what}: none of {', '.join(keys)}")
    values = [entry for value in found.values() for entry in (value if isinstance(value, list) else [value])]
    if not values or any(type(value) is not int or value < 1 for value in values):
        raise CheckpointError(
            f"{CONFIG_NAME} gives {what} as {brief(found)}, where a positive whole number is expected"
        )
    if (largest := max(values)) > LARGEST_COUNT:
        raise CheckpointError(
            f"{CONFIG_NAME} gives {what} as {brief(largest)}, and no model has more than {LARGEST_COUNT:,}"
        )
    if len(set(values)) > 1:
        raise CheckpointError(f"{CONFIG_NAME} contradicts itself on {what}: {found}")
    return int(values[0])


def experts_section(config: Mapping[str, Any], architecture: Architecture) -> Mapping[str, Any]:
    """The part of a config that holds expert counts.

    Raises:
        CheckpointError: it is missing.
    """
    section = text_section(config)
    if architecture.experts_section is None:
        return section
    value = section.get(architecture.experts_section)
    if not isinstance(value, dict):
        raise CheckpointError(f"{CONFIG_NAME} has no table {architecture.experts_section!r}")
    return value


def find(config: Mapping[str, Any], architectures: Sequence[Architecture]) -> Architecture:
    """The architecture of a config.

    Raises:
        UnsupportedError: an unknown family, with the known ones named, a refused one, or a dense model.
    """
    model_type = config.get("model_type")
    for architecture in architectures:
        if model_type in architecture.model_types:
            if architecture.refusal is not None:
                raise UnsupportedError(architecture.refusal)
            return architecture
    supported = ", ".join(
        sorted(t for architecture in architectures if not architecture.refusal for t in architecture.model_types)
    )
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


@dataclass(frozen=True)
class _Counts:
    """What config.json says."""

    num_experts: int
    num_zero_experts: int
    top_k: int
    num_groups: int
    topk_groups: int
    num_layers: int

    @classmethod
    def read(cls, config: Mapping[str, Any], architecture: Architecture) -> _Counts:
        text, section = text_section(config), experts_section(config, architecture)
        num_experts = config_count(section, architecture.num_experts_keys, what="number of experts")
        top_k = config_count(section, architecture.top_k_keys, what="number of experts per token")
        if top_k > num_experts:
            raise CheckpointError(f"{CONFIG_NAME} routes each token to {top_k} of {num_experts} experts")

        def optional(keys: Iterable[str | None], what: str, default: int) -> int:
            present = [key for key in keys if key and section.get(key)]
            return config_count(section, present, what=what) if present else default

        num_groups = optional(architecture.num_groups_keys, "number of groups", 1)
        return cls(
            num_experts=num_experts,
            num_zero_experts=optional([architecture.num_zero_experts_key], "number of zero experts", 0),
            top_k=top_k,
            num_groups=num_groups,
            topk_groups=optional([architecture.topk_groups_key], "number of groups per token", num_groups),
            num_layers=config_count(
                {key: len(value) if isinstance(value, list | str) else value for key, value in text.items()},
                architecture.num_layers_keys,
                what="number of layers",
            ),
        )


def resolve(checkpoint: Checkpoint, architectures: Sequence[Architecture]) -> MoELayout:
    """Assign every tensor of every MoE layer to its expert.

    Raises:
        UnsupportedError: unknown family or dense model.
        CheckpointError: gaps in expert numbers, unequal sets of tensors among experts, shapes that contradict the config, or a
            tensor that depends on the number of experts and is claimed by no slot.
    """
    architecture = find(checkpoint.config, architectures)
    _refuse_dense(checkpoint, architecture)
    counts = _Counts.read(checkpoint.config, architecture)
    experts: dict[int, dict[int, dict[str, TensorInfo]]] = defaultdict(lambda: defaultdict(dict))
    stacked: dict[int, list[StackedTensor]] = defaultdict(list)
    unclaimed: list[TensorInfo] = []
    for name, info in checkpoint.tensors.items():
        claim = architecture.claim(name)
        if claim is None:
            unclaimed.append(info)
            continue
        layer = claim.layer + (counts.num_layers if claim.is_mtp_block else 0)
        if claim.slot.axis is None:
            experts[layer][int(name[claim.start : claim.stop])][name[claim.stop :]] = info
        elif (tensor := _stack(info, claim.slot, claim.slot.axis, counts)) is not None:
            stacked[layer].append(tensor)

    indices = sorted(experts.keys() | stacked.keys())
    if not indices:
        raise CheckpointError(
            f"no tensor of {checkpoint.origin} has the name of a {architecture.name} expert",
            hint=f"expected names like {architecture.blocks[0]}{architecture.slots[0].pattern}",
        )
    _check_unclaimed(unclaimed, architecture, counts, set(indices))
    is_companion = cache(read_format(checkpoint).is_companion)
    return MoELayout(
        architecture=architecture,
        num_experts=counts.num_experts,
        top_k=counts.top_k,
        num_groups=counts.num_groups,
        topk_groups=counts.topk_groups,
        num_layers=counts.num_layers,
        layers=tuple(
            _layer(index, experts[index], stacked[index], counts.num_experts, is_companion) for index in indices
        ),
    )


def _layer(
    index: int,
    experts: Mapping[int, Mapping[str, TensorInfo]],
    stacked: Sequence[StackedTensor],
    num_experts: int,
    is_companion: Callable[[str], bool],
) -> MoELayer:
    incomplete: dict[int, tuple[str, ...]] = {}
    if experts:
        absent = sorted(set(range(num_experts)) - experts.keys())
        extra = sorted(experts.keys() - set(range(num_experts)))
        if absent or extra:
            raise CheckpointError(
                f"layer {index} has {len(experts)} experts where config.json says {num_experts}: "
                f"missing {_brief(absent)}, beyond the count {_brief(extra)}",
                hint="neither transformers nor vLLM would notice this",
            )
        _require_same_weights(index, experts, is_companion)
        incomplete = _lacking_companions(experts, is_companion)
    elif not any(tensor.role == "expert" for tensor in stacked):
        raise CheckpointError(f"layer {index} has a router and no experts")
    if not any(tensor.role == "router" for tensor in stacked):
        raise CheckpointError(f"layer {index} has experts and no router")
    return MoELayer(index, tuple(experts[e] for e in range(num_experts)) if experts else (), tuple(stacked), incomplete)


def _refuse_dense(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raise UnsupportedError for a dense member of a family: it counts no experts, or a single one, and has none on disk."""
    section = experts_section(checkpoint.config, architecture)
    named = [section[key] for key in architecture.num_experts_keys if key in section]
    if all(value in (None, 0, 1) for value in named) and not any(map(architecture.claim, checkpoint.tensors)):
        raise UnsupportedError(
            f"this is a dense {architecture.name} model: {CONFIG_NAME} counts no experts, so there are none to prune"
        )


def _require_same_weights(
    index: int, experts: Mapping[int, Mapping[str, TensorInfo]], is_companion: Callable[[str], bool]
) -> None:
    """Raise CheckpointError unless all experts have the same weights and biases, in whatever format each weight is stored."""
    weights = {
        expert: {_PACKED.sub(".weight", rest): rest for rest, info in parts.items() if not is_companion(info.name)}
        for expert, parts in experts.items()
    }
    usual = Counter(frozenset(stored) for stored in weights.values()).most_common(1)[0][0]
    names = {weight: rest for stored in weights.values() for weight, rest in stored.items()}
    for expert in sorted(weights):
        if odd := sorted(usual ^ weights[expert].keys()):
            verb = "lacks" if odd[0] in usual else "alone has"
            name = names[odd[0]].lstrip(".")
            raise CheckpointError(f"expert {expert} of layer {index} {verb} the tensor {name!r} ({len(odd)} differ)")


def _lacking_companions(
    experts: Mapping[int, Mapping[str, TensorInfo]], is_companion: Callable[[str], bool]
) -> dict[int, tuple[str, ...]]:
    """By expert, the companions that other experts have beside a weight of the same name and dtype; others are stored in another format."""
    had: dict[tuple[str, ...], set[str]] = defaultdict(set)
    of_expert: dict[int, dict[tuple[str, ...], set[str]]] = {}
    for expert, parts in experts.items():
        weight_of: dict[str, tuple[str, ...]] = defaultdict(tuple)
        for rest, info in sorted(parts.items()):
            if not is_companion(info.name):
                weight_of[rest.rpartition(".")[0]] += (rest, info.dtype)
        mine: dict[tuple[str, ...], set[str]] = {weight: set() for weight in weight_of.values()}
        for rest, info in parts.items():
            if is_companion(info.name):
                # The scale of a stacked name, `w_scale_inv` of `w`, has no module of its own.
                mine.setdefault(weight_of[rest.rpartition(".")[0]], set()).add(rest)
        of_expert[expert] = mine
        for weight, companions in mine.items():
            had[weight] |= companions
    lacking = {
        expert: tuple(sorted(rest for weight, companions in mine.items() for rest in had[weight] - companions))
        for expert, mine in of_expert.items()
    }
    return {expert: rests for expert, rests in lacking.items() if rests}


def _stack(info: TensorInfo, slot: Slot, axis: int, counts: _Counts) -> StackedTensor | None:
    """The tensor with its expert dimension; None for a single value that serves all experts, such as a scale."""
    entries = counts.num_experts
    if slot.holds == "experts and zero experts":
        entries += counts.num_zero_experts
    size = info.shape[axis] if len(info.shape) > axis else 0
    fits = size > 0 and size % entries == 0 if slot.holds == "rows of experts" else size == entries
    if not fits:
        if slot.role == "expert" and info.num_elements == 1:
            return None
        raise CheckpointError(
            f"{info.name!r} has the shape {list(info.shape)}: dimension {axis} should be the {entries} {slot.holds} "
            "of config.json"
        )
    return StackedTensor(info, axis, slot.role, entries, counts.num_experts)


def _check_unclaimed(
    infos: Iterable[TensorInfo], architecture: Architecture, counts: _Counts, indices: set[int]
) -> None:
    for info in infos:
        if architecture.is_unpruned(info.name):
            continue
        for reason in _dependence(info, architecture, counts, indices):
            raise UnsupportedError(
                f"{info.name!r} {list(info.shape)} {reason}, and {architecture.name}'s layout does not say whether "
                "pruning must slice it"
            )


def _dependence(info: TensorInfo, architecture: Architecture, counts: _Counts, indices: set[int]) -> Iterator[str]:
    """Why a tensor that nothing claims may depend on the number of experts."""
    layer = architecture.block_of(info.name, counts.num_layers)
    if counts.num_experts in info.shape and layer in indices:
        yield f"has a dimension equal to the {counts.num_experts} experts"
    if ".experts." in info.name:
        yield "has the name of an expert"


def _brief(numbers: Sequence[int]) -> str:
    return (
        "none"
        if not numbers
        else ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    )
