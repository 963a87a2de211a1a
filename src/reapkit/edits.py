"""What pruning does to a checkpoint, said tensor by tensor before a byte is written.

A kept tensor is a byte range of the source under a new name; only `dequantize` ever computes a value. Shards of the output follow the
shards of the source, so that each can be written by one sequential read.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from reapkit.checkpoint import CONFIG_NAME, Checkpoint, read_small
from reapkit.errors import UnsupportedError, UsageError
from reapkit.layout import MoELayout, StackedTensor
from reapkit.plans import PruningPlan
from reapkit.quantization import PLAIN_DTYPES, Format, compiled, read_format
from reapkit.tensors import DTYPE_BITS, TensorInfo, nbytes, parse_json

if TYPE_CHECKING:
    import torch

    from reapkit.clusters import Group, Merging
    from reapkit.neurons import Place

# Tables of config.json that do not describe the language model.
_OTHER_TABLE = re.compile(r"vision|audio|image|video|speech|quantization_config")
# Files beside config.json in which quantisers describe what they did.
_QUANTIZATION_SIDECARS = frozenset({"hf_quant_config.json", "quant_config.json", "quantize_config.json"})
# A module's name that says one expert's number, whatever stands before the layer's; and one that says the number alone.
_BARE_EXPERT = re.compile(r"\bexperts\.\d+(?=\.|$)")
_NAMED_EXPERT = re.compile(r"\blayers\.(?P<layer>\d+)\.(?:.*\.)?experts\.(?P<expert>\d+)(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Copy:
    """The tensor's bytes as they are."""

    info: TensorInfo


@dataclass(frozen=True, slots=True)
class Take:
    """The tensor's bytes at some entries of one axis, in the order given.

    Attributes:
        info: the tensor.
        axis: the dimension that is divided.
        num_entries: into how many equal parts; where experts' rows lie one after the other, an entry has many.
        entries: those that stay.
    """

    info: TensorInfo
    axis: int
    num_entries: int
    entries: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """How often the whole axis is repeated in the tensor's bytes: 1 means that an entry is one byte range."""
        return math.prod(self.info.shape[: self.axis])

    @property
    def entry_bytes(self) -> int:
        """Bytes that belong to one entry within one block."""
        return self.info.nbytes // (self.num_blocks * self.num_entries)


@dataclass(frozen=True, slots=True)
class Dequantize:
    """The tensor's values in bf16.

    Attributes:
        weight: the quantised tensor, or the part of it that stays.
        companions: the tensors that its values need besides its own bytes.
        format: how they are stored.
    """

    weight: Copy | Take
    companions: tuple[TensorInfo, ...]
    format: Format


Orders = Mapping[int, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Combine:
    """Weighted averages of experts' values.

    Attributes:
        info: the tensor, of experts with tensors of their own the centre's.
        members: by expert, the tensors that are averaged; empty where `info` holds all experts.
        stacked: how `info` holds all experts, else None.
        groups: what becomes one, in the order of the output; a single one unless `info` holds all experts.
        place: where an expert's neurons lie in it; None where they are averaged as they lie.
        order_EI: by layer-wide expert number, in which order an expert's neurons match its centre's.
        format: how the values are stored.
        dtype: of the result.
    """

    info: TensorInfo
    members: Mapping[int, TensorInfo]
    stacked: StackedTensor | None
    groups: tuple[Group, ...]
    place: Place | None
    order_EI: np.ndarray[Any, Any] | None
    format: Format
    dtype: str


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output and where its bytes come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Copy | Take | Dequantize | Combine

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)

    @property
    def info(self) -> TensorInfo:
        """The source's tensor."""
        return self.source.weight.info if isinstance(self.source, Dequantize) else self.source.info


def outputs(
    checkpoint: Checkpoint,
    layout: MoELayout,
    plan: PruningPlan,
    *,
    dequantize: bool = False,
    merging: Merging | None = None,
    orders: Orders | None = None,
) -> dict[str, list[OutputTensor]]:
    """The output's tensors by shard: one shard per source shard that still has any, tensors in their order there.

    Kept experts are numbered anew from 0 in their original order; router rows and selection biases follow the same order. With
    `dequantize` a quantised weight becomes bf16 in the shard where the weight lies, its scales vanish, and all else stays as it is.
    With `merging`, whose centres the plan keeps, a kept expert is the average of its group; `orders` gives the neurons' by layer.

    Raises:
        UsageError: `dequantize` on a checkpoint that is not quantised.
        CheckpointError: a scale is missing.
        UnsupportedError: a format that cannot be dequantised, or experts that do not begin at whole bytes.
    """
    form = _format_to_dequantize(checkpoint) if dequantize else None
    rank = {layer: {expert: i for i, expert in enumerate(kept)} for layer, kept in plan.kept.items()}
    combined = None if merging is None else _Combined(checkpoint, layout, merging, orders or {})
    by_source: dict[str, list[OutputTensor]] = {}
    for name, info in checkpoint.tensors.items():
        if (form is not None and form.is_companion(name)) or (plan.drop_mtp and layout.is_mtp(name)):
            continue
        source: Copy | Take = Copy(info)
        companions = form.companions(info, checkpoint.tensors) if form is not None else ()
        shape = info.shape
        if form is not None and companions:
            name, shape = form.decoded(info, checkpoint.tensors)
        if info.name in layout.expert_of:
            layer, expert = layout.expert_of[info.name]
            if expert not in rank[layer]:
                continue
            name = layout.renamed(name, rank[layer][expert])
        elif info.name in layout.stacked_of and plan.num_kept < layout.num_experts:
            layer, stacked = layout.stacked_of[info.name]
            if stacked.role != "expert" and info.dtype not in {*PLAIN_DTYPES, "F64"} and not companions:
                raise UnsupportedError(
                    f"the router {info.name!r} is stored as {info.dtype}, and its scales cannot be told apart by expert",
                    hint="--dequantize writes it, and everything else, in bf16",
                )
            source = _take(stacked, plan.kept[layer])
            shape = stacked.cut(shape, plan.num_kept)
        if combined is not None and (merged := combined.source(info, "BF16" if companions else info.dtype)) is not None:
            by_source.setdefault(info.file, []).append(OutputTensor(name, merged.dtype, shape, merged))
            continue
        output = (
            OutputTensor(name, "BF16", shape, Dequantize(source, companions, form))
            if form is not None and companions
            else OutputTensor(name, info.dtype, shape, source)
        )
        by_source.setdefault(info.file, []).append(output)
    count = len(by_source)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": tensors
        for number, tensors in enumerate(by_source.values(), start=1)
    }


class _Combined:
    """Which tensors of the output are averages."""

    def __init__(self, checkpoint: Checkpoint, layout: MoELayout, merging: Merging, orders: Orders) -> None:
        from reapkit.neurons import ExpertTensors

        self._checkpoint, self._layout, self._merging, self._orders = checkpoint, layout, merging, orders
        self._form = read_format(checkpoint)
        self._layers = {layer.index: layer for layer in layout.layers}
        self._group_of = {
            (index, group.centre): group
            for index, groups in merging.groups.items()
            for group in groups
            if len(group.members) > 1
        }
        self._places = {
            index: ExpertTensors(checkpoint, layout, self._layers[index], self._form).places for index in orders
        }

    def source(self, info: TensorInfo, dtype: str) -> Combine | None:
        """The averages that a tensor becomes; None where it is written as in pruning."""
        if info.name in self._layout.expert_of:
            index, expert = self._layout.expert_of[info.name]
            if (group := self._group_of.get((index, expert))) is None:
                return None
            experts = self._layers[index].experts
            rest = next(rest for rest, other in experts[expert].items() if other.name == info.name)
            members = {member: experts[member][rest] for member in group.members}
            place = self._places[index][rest] if index in self._places else None
            return Combine(info, members, None, (group,), place, self._orders.get(index), self._form, dtype)
        if info.name not in self._layout.stacked_of:
            return None
        index, stacked = self._layout.stacked_of[info.name]
        groups = self._merging.groups.get(index, ())
        if all(len(group.members) == 1 for group in groups):
            return None
        if stacked.role == "expert":
            place = self._places[index][info.name] if index in self._places else None
            return Combine(info, {}, stacked, groups, place, self._orders.get(index), self._form, dtype)
        if self._merging.router == "average":
            return Combine(info, {}, stacked, groups, None, None, self._form, dtype)
        return None


def _format_to_dequantize(checkpoint: Checkpoint) -> Format:
    form = read_format(checkpoint)
    if not form.quantized:
        raise UsageError(
            f"{checkpoint.origin} is not quantised, so there is nothing to dequantise", hint="leave out --dequantize"
        )
    return form


def _take(stacked: StackedTensor, kept: tuple[int, ...]) -> Take:
    info = stacked.info
    if math.prod(info.shape[stacked.axis :]) // stacked.num_entries * DTYPE_BITS[info.dtype] % 8:
        raise UnsupportedError(
            f"the experts in {info.name!r} ({info.dtype} {list(info.shape)}) do not begin at whole bytes"
        )
    return Take(info, stacked.axis, stacked.num_entries, stacked.entries(kept))


def spans(source: Copy | Take) -> Iterator[tuple[int, int]]:
    """The byte ranges of the source's shard that make up the output's tensor, in order; rows only, for `Take`."""
    if isinstance(source, Copy):
        yield source.info.start, source.info.stop
        return
    assert source.num_blocks == 1
    for entry in source.entries:
        start = source.info.start + entry * source.entry_bytes
        yield start, start + source.entry_bytes


def compute(checkpoint: Checkpoint, source: Take | Dequantize | Combine) -> memoryview:
    """The bytes of an output tensor that is not a sequence of byte ranges."""
    if isinstance(source, Combine):
        return _combine(checkpoint, source)
    if isinstance(source, Take):
        stored = np.frombuffer(checkpoint.read(source.info), np.uint8)
        blocks = stored.reshape(source.num_blocks, source.num_entries, source.entry_bytes)
        return np.ascontiguousarray(blocks[:, list(source.entries)]).reshape(-1).data
    import torch

    from reapkit.formats import decode

    values = decode(checkpoint, source.weight.info, format=source.format)
    if isinstance(source.weight, Take):
        values = take_values(values, source.weight.axis, source.weight.num_entries, source.weight.entries)
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _combine(checkpoint: Checkpoint, source: Combine) -> memoryview:
    import torch

    from reapkit.formats import TORCH_DTYPES, decode
    from reapkit.neurons import average, join_experts, split_experts

    dtype = TORCH_DTYPES[source.dtype]
    stored = decode(checkpoint, source.info, format=source.format)
    parts = split_experts(stored, source.stacked) if source.stacked is not None else []

    def values(member: int, centre: int) -> torch.Tensor:
        part = parts[member] if parts else decode(checkpoint, source.members[member], format=source.format)
        if source.place is None or source.order_EI is None or member == centre:
            return part.float()
        return source.place.reorder(part.float(), torch.from_numpy(source.order_EI[member]).long())

    results = [
        average([values(member, group.centre) for member in group.members], group.weights).to(dtype)
        for group in source.groups
    ]
    if source.stacked is None:
        (result,) = results
    else:
        zero_experts = [part.to(dtype) for part in parts[source.stacked.num_experts :]]
        result = join_experts([*results, *zero_experts], source.stacked, num_dimensions=stored.ndim)
    return result.contiguous().reshape(-1).view(torch.uint8).numpy().data


def take_values(values: torch.Tensor, axis: int, num_entries: int, entries: Sequence[int]) -> torch.Tensor:
    """Values at some entries of an axis that divides into `num_entries` equal parts."""
    import torch

    parts = values.reshape(*values.shape[:axis], num_entries, -1, *values.shape[axis + 1 :])
    return parts.index_select(axis, torch.tensor(entries)).flatten(axis, axis + 1)


def num_parameters(form: Format, tensors: Iterable[TensorInfo | OutputTensor]) -> int | None:
    """Values in these tensors, scales left out; None where the format packs them in a way that is not known."""
    if form.obstacle is not None:
        return None
    return sum(
        form.num_values(
            tensor if isinstance(tensor, TensorInfo) else TensorInfo(tensor.name, tensor.dtype, tensor.shape, "", 0, 0)
        )
        for tensor in tensors
    )


def edit_config(
    checkpoint: Checkpoint,
    layout: MoELayout,
    kept: Mapping[int, Sequence[int]],
    *,
    drop_mtp: bool = False,
    dequantize: bool = False,
) -> dict[str, Any]:
    """The raw config with the new expert count under every key that held the old one, at whatever depth; nothing else changes but
    names of single experts in `quantization_config`, which follow their experts.

    With `drop_mtp` the counts of MTP layers become 0. With `dequantize` the quantisation goes, and the dtype becomes bfloat16 under
    the key that is there.
    """
    architecture = layout.architecture
    num_kept = len(next(iter(kept.values())))
    counts = dict.fromkeys(architecture.num_experts_keys, (layout.num_experts, num_kept))
    edited: dict[str, Any] = _recount(checkpoint.config, counts)
    if drop_mtp:
        for key in architecture.mtp_keys:
            edited = _with_entry(edited, key, lambda count: 0 if type(count) is int else count)
    if dequantize:
        edited = _without(edited, "quantization_config")
        for key in ("dtype", "torch_dtype"):
            edited |= {key: "bfloat16"} if key in edited else {}
            if isinstance(section := edited.get("text_config"), dict) and key in section:
                edited |= {"text_config": section | {key: "bfloat16"}}
    else:
        names = _ExpertNames(checkpoint, layout, kept)
        edited = _with_entry(edited, "quantization_config", names.follow)
    return edited


def edit_sidecars(
    checkpoint: Checkpoint, layout: MoELayout, kept: Mapping[int, Sequence[int]], *, dequantize: bool = False
) -> dict[str, bytes | None]:
    """The sidecars that do not stay as they are: descriptions of the quantisation, in which single experts' names follow the experts.

    With `dequantize` they are left behind, which is said by None.
    """
    edited: dict[str, bytes | None] = {}
    names = _ExpertNames(checkpoint, layout, kept)
    for name in sorted(_QUANTIZATION_SIDECARS & set(checkpoint.sidecars)):
        if dequantize:
            edited[name] = None
            continue
        described = parse_json(read_small(checkpoint.path, name), origin=name)
        if (followed := names.follow(described)) != described:
            edited[name] = _json_text(followed)
    return edited


class _ExpertNames:
    """Names and patterns of single experts, as quantisers list them, brought to the numbers that the kept experts have in the output.

    A literal name is renumbered, or vanishes with its expert. A pattern (`re:…` of compressed-tensors, `+:…` and `-:…` of GPTQ, globs of
    ModelOpt, an expert's name without its layer) that matches all experts of a layer or none stays; one that tells experts apart
    becomes the names of all modules that it matched.
    """

    def __init__(self, checkpoint: Checkpoint, layout: MoELayout, kept: Mapping[int, Sequence[int]]) -> None:
        self._checkpoint = checkpoint
        self._layout = layout
        self._rank = {layer: {expert: i for i, expert in enumerate(experts)} for layer, experts in kept.items()}

    def follow(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self.follow(inner) for key, inner in value.items() for name in self._follow_name(key)}
        if isinstance(value, list):
            followed = (
                [*self._follow_name(inner)] if isinstance(inner, str) else [self.follow(inner)] for inner in value
            )
            return [entry for entries in followed for entry in entries]
        return value

    def _follow_name(self, name: str) -> Iterator[str]:
        marker, regex = _pattern(name)
        if regex is None:
            yield from self._renamed(name)
            return
        matched = [module for module in self._modules if regex.match(module)]
        experts = Counter((owner[0], owner[2]) for module in matched if (owner := self._modules[module]))
        if all(count == self._layout.num_experts for count in experts.values()):
            yield name
            return
        for module in sorted(matched, key=lambda module: (self._modules[module] or (-1, -1, ""), module)):
            for renamed in self._renamed(module):
                yield f"{marker}^{re.escape(renamed)}$" if marker in ("+:", "-:") else renamed

    def _renamed(self, name: str) -> Iterator[str]:
        """A literal name with the number that its expert has in the output, nothing where it has none."""
        if (place := self._place(name)) is None or place[0] not in self._rank:
            yield name
        elif (rank := self._rank[place[0]].get(place[1])) is not None:
            yield f"{name[: place[2]]}{rank}{name[place[3] :]}"

    def _place(self, name: str) -> tuple[int, int, int, int] | None:
        """Layer, expert and where the expert's number stands, of a module's name that says one; whatever stands before the layers."""
        claim = self._layout.architecture.claim(f"{name}.weight")
        if claim is not None and claim.start >= 0:
            layer, start, stop = claim.layer, claim.start, claim.stop
            is_own_block = claim.is_mtp_block
        elif match := _NAMED_EXPERT.search(name):
            layer, (start, stop) = int(match["layer"]), match.span("expert")
            is_own_block = bool(re.search(r"\bmtp\.", name[:start]))
        else:
            return None
        return layer + (self._layout.num_layers if is_own_block else 0), int(name[start:stop]), start, stop

    @cached_property
    def _modules(self) -> dict[str, tuple[int, int, str] | None]:
        """Every module by name; of one expert's, its layer, its number and the rest of the name."""
        modules: dict[str, tuple[int, int, str] | None] = {}
        for name in self._checkpoint.tensors:
            module = name.rpartition(".")[0]
            modules[module] = None
            if (owner := self._layout.expert_of.get(name)) is not None:
                claim = self._layout.architecture.claim(name)
                assert claim is not None
                modules[module] = (*owner, module[claim.stop :])
        return modules


def _pattern(name: str) -> tuple[str, re.Pattern[str] | None]:
    """How an entry marks itself as a pattern, and the pattern; None for a literal name.

    Raises:
        CheckpointError: it is not a regular expression.
    """
    if name.startswith(("re:", "+:", "-:")):
        marker, _, text = name.partition(":")
        return marker + ":", compiled(text, where="the quantisation")
    if any(sign in name for sign in "*?["):
        return "", re.compile(fnmatch.translate(name))
    if _BARE_EXPERT.search(name) and not _NAMED_EXPERT.search(name):
        return "", re.compile(rf".*\b{re.escape(name)}(\.|$)")
    return "", None


def _with_entry(value: Any, key: str, change: Callable[[Any], Any]) -> Any:
    """A JSON tree with everything that stands under a key, at whatever depth, changed."""
    if isinstance(value, dict):
        return {
            name: change(inner) if name == key else _with_entry(inner, key, change) for name, inner in value.items()
        }
    return [_with_entry(inner, key, change) for inner in value] if isinstance(value, list) else value


def _recount(value: Any, counts: Mapping[str, tuple[int, int]]) -> Any:
    """A JSON tree with counts replaced under some keys, where the one before stands, alone or in a list with an entry per layer; not
    in tables that describe other towers or the quantisation.
    """
    if isinstance(value, dict):
        return {
            key: inner
            if _OTHER_TABLE.search(key)
            else _new_count(inner, *counts[key])
            if key in counts
            else _recount(inner, counts)
            for key, inner in value.items()
        }
    return [_recount(inner, counts) for inner in value] if isinstance(value, list) else value


def _new_count(value: Any, before: int, after: int) -> Any:
    if isinstance(value, list):
        return [_new_count(inner, before, after) for inner in value]
    return after if type(value) is int and value == before else value


def _without(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _without(inner, key) for name, inner in value.items() if name != key}
    return [_without(inner, key) for inner in value] if isinstance(value, list) else value


def config_text(checkpoint: Checkpoint, edited: Mapping[str, Any]) -> bytes:
    """The edited config as a file: the source's own text with the counts replaced, so that `diff` shows those lines alone.

    Where more than counts changed, it is written anew with the keys in their order.
    """
    text = read_small(checkpoint.path, CONFIG_NAME)
    for key, before, after in set(_changed_counts(checkpoint.config, edited)):
        text = re.sub(rb'("%s"\s*:\s*)%d\b' % (key.encode(), before), rb"\g<1>%d" % after, text)
    try:
        if json.loads(text) == edited:
            return text
    except ValueError:
        pass
    return _json_text(edited)


def _changed_counts(before: Any, after: Any) -> Iterator[tuple[str, int, int]]:
    """Key, old and new value of every whole number that differs between two JSON trees."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        if type(old) is int and type(new) is int:
            if old != new:
                yield key, old, new
        else:
            yield from _changed_counts(old, new)


def _json_text(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
