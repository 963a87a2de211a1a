"""What a checkpoint holds and what pruning would leave of it, from its headers alone.

Where the shards are not there, the names of the index and the shapes of a model on the meta device take the headers' place, so that
one code path counts. Only then is torch imported.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from reapkit import dialects, hub
from reapkit import geometry as geometries
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    Place,
    locate,
    read_config,
    read_index,
    read_small,
    refuse_unfinished,
    text_section,
)
from reapkit.errors import CheckpointError, UnsupportedError
from reapkit.geometry import Geometry
from reapkit.layout import Architecture, MoELayout, find, resolve
from reapkit.plans import num_kept
from reapkit.progress import Progress, silent
from reapkit.quantization import ASSUMED_BITS, HINT, Format, quantization_table, read_format
from reapkit.tensors import TensorInfo, nbytes, parse_json, reading

RATIOS = ("0.25", "0.30", "0.40", "0.50")

PARTS = (
    "experts",
    "shared experts",
    "routers",
    "attention",
    "dense layers",
    "embeddings",
    "norms and other",
    "MTP",
)
_SCALE_SUFFIX = "_scale_inv"
# A file of its own counts before the tokenizer's configuration.
_TEMPLATE_NAMES = ("chat_template.jinja", "tokenizer_config.json")
_DTYPE_CODES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Part:
    """What one kind of weights takes; bytes count scales, parameters do not."""

    name: str
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Shrunk:
    """What would be left after removing a share `ratio` of every layer's experts."""

    ratio: str
    num_experts: int
    parameters: int
    nbytes: int
    active_parameters: int


@dataclass(frozen=True)
class Inventory:
    """What a checkpoint holds.

    Attributes:
        origin: how it was named.
        architecture: the family's name.
        model_type: as in config.json.
        num_layers: decoder layers, MTP layers left out.
        moe_layers: how many of them have experts.
        num_experts: experts per MoE layer.
        top_k: experts that each token is routed to.
        num_groups: groups of the router, 1 where it has none.
        scoring: how router logits become scores.
        format: how the weights are stored.
        parameters: values of all weights, selection biases counted, quantisation scales not.
        active_parameters: the same with `top_k` experts per layer, and without MTP layers, which are not part of the forward.
        nbytes: bytes of all tensors, scales included.
        parts: the same by kind.
        context_length: `max_position_embeddings`, None where config.json does not say.
        shards: files; 0 where neither they nor an index are there.
        tensors: of the index, scales included.
        estimated: whether the shards are missing, so that shapes and dtypes follow from config.json and the index.
        shrunk: what removing some shares of the experts would leave.
        block: rows and columns that share a scale in every quantised weight, None where that is not said for all of them.
        geometry: what an engine holds besides weights; None where config.json lacks a size.
        tool_parser, reasoning_parser: vLLM's names of the parsers for what the family writes, by its chat template; None for none.
        notes: sentences on what is not as usual.
    """

    origin: str
    architecture: str
    model_type: str
    num_layers: int
    moe_layers: int
    num_experts: int
    top_k: int
    num_groups: int
    scoring: str
    format: str
    parameters: int
    active_parameters: int
    nbytes: int
    parts: tuple[Part, ...]
    context_length: int | None
    shards: int
    tensors: int
    estimated: bool
    shrunk: tuple[Shrunk, ...]
    block: tuple[int, int] | None = None
    geometry: Geometry | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(
    source: str | Path,
    *,
    revision: str | None = None,
    ratios: Sequence[str] = RATIOS,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Inventory:
    """Count what a checkpoint holds; of a repository on the hub config, index and the headers of its shards are read.

    Args:
        source: a folder, with shards or with config.json (and the index) alone, or a hub id.
        revision: of the hub id.
        ratios: shares of the experts to imagine removed; those that leave fewer than `top_k` are left out of the answer.
        trust_remote_code: let transformers run the folder's own code where there are no shards.
        progress: told how headers come from the hub.

    Raises:
        CheckpointError: something is missing, truncated or contradicts itself.
        UnsupportedError: a dense model, an unknown family, or packed weights without their shards.
        UsageError: a ratio that is not one.
    """
    place = locate(source, revision=revision, sidecars=False, progress=progress)
    refuse_unfinished(place.path)
    _bring_template(place)
    has_shards = _has_shards(place)
    known = _Known(Checkpoint.open(place)) if has_shards else _imagine(place, trust_remote_code=trust_remote_code)
    return _take_stock(known, ratios)


def count(checkpoint: Checkpoint, *, ratios: Sequence[str] = ()) -> Inventory:
    """The same of a checkpoint that is open, or of one that is described and not yet written."""
    return _take_stock(_Known(checkpoint), ratios)


@dataclass(frozen=True)
class _Known:
    """A checkpoint, or one imagined; then with the bytes that its index gives, and what is to be said about it."""

    checkpoint: Checkpoint
    estimated: bool = False
    total_size: int | None = None
    notes: tuple[str, ...] = ()


def _has_shards(place: Place) -> bool:
    path = place.path
    if place.remote is not None:
        names = place.remote.repository.files.keys()
        has_index = INDEX_NAME in names and not names.isdisjoint(read_index(path)[0].values())
        return has_index or any(name.endswith((".safetensors", ".bin", ".pt", ".pth")) for name in names)
    if (path / INDEX_NAME).exists():
        weight_map, _ = read_index(path)
        return any((path / file).exists() for file in set(weight_map.values()))
    if any(entry.suffix in {".safetensors", ".bin", ".pt", ".pth"} for entry in path.iterdir()):
        read_index(path)  # says what is wrong, unless it is a lone model.safetensors
        return (path / SINGLE_NAME).exists()
    return False


# --- counting


Kind = Literal["expert", "row", "whole"]


@dataclass(frozen=True)
class _Tally:
    """Sums over tensors by part and by what pruning does to them: remove experts, remove rows, or nothing."""

    parameters: Mapping[tuple[str, Kind], int]
    nbytes: Mapping[tuple[str, Kind], int]
    num_experts: int
    top_k: int

    def kept_parameters(self, kept: int) -> int:
        return self._scaled(self.parameters, experts=kept, rows=kept)

    def kept_nbytes(self, kept: int) -> int:
        return self._scaled(self.nbytes, experts=kept, rows=kept)

    def active_parameters(self, kept: int) -> int:
        run = {key: count for key, count in self.parameters.items() if key[0] != "MTP"}
        return self._scaled(run, experts=self.top_k, rows=kept)

    def parts(self) -> Iterator[Part]:
        for name in PARTS:
            parameters = sum(count for (part, _), count in self.parameters.items() if part == name)
            size = sum(count for (part, _), count in self.nbytes.items() if part == name)
            if size:
                yield Part(name, parameters, size)

    def _scaled(self, sums: Mapping[tuple[str, Kind], int], *, experts: int, rows: int) -> int:
        """The sum with so many of the experts and of the routers' rows; all experts are of one size, so that it is exact."""
        left: Mapping[Kind, int] = {"expert": experts, "row": rows, "whole": self.num_experts}
        return sum(count * left[kind] // self.num_experts for (_, kind), count in sums.items())


def _take_stock(known: _Known, ratios: Sequence[str]) -> Inventory:
    checkpoint, notes = known.checkpoint, list(known.notes)
    layout = resolve(checkpoint, ARCHITECTURES)
    if layout.architecture.caution is not None:
        notes.append(layout.architecture.caution)
    section = text_section(checkpoint.config)
    _note_absent_layers(checkpoint, layout, notes)
    form = read_format(checkpoint)
    _note_format(checkpoint, form, notes)
    tally = _tally(checkpoint, layout, form)

    # Where only the index knows the bytes, what the shapes give is scaled to it: one is exact when they agree.
    shape_bytes = tally.kept_nbytes(layout.num_experts)
    total = known.total_size or shape_bytes
    shrunk = []
    for ratio in ratios:
        kept = num_kept(layout.num_experts, ratio=ratio, num_groups=layout.num_groups)
        if kept >= layout.top_k:
            size = tally.kept_nbytes(kept) * total // shape_bytes
            shrunk.append(Shrunk(ratio, kept, tally.kept_parameters(kept), size, tally.active_parameters(kept)))
    context = section.get("max_position_embeddings")
    model_type = str(checkpoint.config["model_type"])
    dialect = dialects.find(model_type, _chat_template(checkpoint.path))
    return Inventory(
        origin=checkpoint.origin,
        architecture=layout.architecture.name,
        model_type=model_type,
        num_layers=layout.num_layers,
        moe_layers=len(layout.layer_indices),
        num_experts=layout.num_experts,
        top_k=layout.top_k,
        num_groups=layout.num_groups,
        scoring=layout.architecture.scoring,
        format=form.name,
        parameters=tally.kept_parameters(layout.num_experts),
        active_parameters=tally.active_parameters(layout.num_experts),
        nbytes=total,
        parts=tuple(tally.parts()),
        context_length=context if type(context) is int else None,
        shards=len([file for file in checkpoint.files if file]),
        tensors=len(checkpoint.tensors),
        estimated=known.estimated,
        shrunk=tuple(shrunk),
        block=form.block,
        geometry=geometries.read(checkpoint.config, layout.num_layers),
        tool_parser=dialect.tools if dialect else None,
        reasoning_parser=dialect.reasoning if dialect else None,
        notes=tuple(notes),
    )


def _bring_template(place: Place) -> None:
    """Fetch the chat template of a repository, where how the model writes depends on it."""
    if place.remote is None or not dialects.reads_template(str(read_config(place.path).get("model_type"))):
        return
    repository = place.remote.repository
    if names := [name for name in _TEMPLATE_NAMES if name in repository.files]:
        hub.snapshot(repository, names[:1])


def _chat_template(path: Path) -> str | None:
    """The text that holds the chat template; None where there is none."""
    # Whatever is wrong with it is the tokenizer's matter: this only looks for words.
    name = next((name for name in _TEMPLATE_NAMES if (path / name).is_file()), None)
    if name is None:
        return None
    with reading(name):
        return (path / name).read_text(encoding="utf-8", errors="replace")


def _tally(checkpoint: Checkpoint, layout: MoELayout, form: Format) -> _Tally:
    parameters: Counter[tuple[str, Kind]] = Counter()
    sizes: Counter[tuple[str, Kind]] = Counter()
    experts, stacked = layout.expert_of, layout.stacked_of
    for name, info in checkpoint.tensors.items():
        kind: Kind = "expert" if name in experts else "whole"
        part = "experts"
        if name in stacked:
            is_expert = stacked[name][1].role == "expert"
            kind, part = ("expert", "experts") if is_expert else ("row", "routers")
        elif kind == "whole":
            part = _outer_part(name)
        if layout.is_mtp(name):
            part = "MTP"
        values, size = form.num_values(info), info.nbytes
        if name in stacked and (entries := stacked[name][1].num_entries) > layout.num_experts:
            # Rows of zero experts stay whatever goes.
            parameters[part, "whole"] += values * (entries - layout.num_experts) // entries
            sizes[part, "whole"] += size * (entries - layout.num_experts) // entries
            values, size = values * layout.num_experts // entries, size * layout.num_experts // entries
        parameters[part, kind] += values
        sizes[part, kind] += size
    return _Tally(parameters, sizes, layout.num_experts, layout.top_k)


def _outer_part(name: str) -> str:
    """The part of a tensor that no expert nor router owns, by the words in its name; an attention's own norms count with it."""
    words = [word for word in name.split(".") if "norm" not in word]
    if any(word.startswith(("shared_expert", "share_expert", "shared_mlp")) for word in words):
        return "shared experts"
    if any("attn" in word or "attention" in word for word in words):
        return "attention"
    if any("embed" in word or word == "lm_head" for word in words):
        return "embeddings"
    return "dense layers" if {"mlp", "feed_forward", "ffn"} & set(words) else "norms and other"


def _note_absent_layers(checkpoint: Checkpoint, layout: MoELayout, notes: list[str]) -> None:
    named = set(map(layout.architecture.layer_of, checkpoint.tensors))
    present = sum(index in named for index in range(layout.num_layers))
    if present < layout.num_layers:
        notes.append(f"{CONFIG_NAME} says {layout.num_layers} layers, and tensors name {present} of them")


# --- formats


def _note_format(checkpoint: Checkpoint, form: Format, notes: list[str]) -> None:
    odd = {info.dtype for info in checkpoint.tensors.values()} - {"F16", "BF16", "F32", "F64"}
    if not form.quantized:
        if odd:
            notes.append(
                f"{CONFIG_NAME} names no quantisation, and some tensors are {', '.join(sorted(odd))}: they are counted "
                "as if unpacked"
            )
        return
    if form.obstacle is None:
        return
    notes.append(f"the weights can be pruned but not observed: {form.obstacle}; {HINT}")
    packed = [info.name for info in checkpoint.tensors.values() if info.dtype in ("U8", "I32")]
    if packed := [name for name in packed if not form.is_companion(name)]:
        bits = form.packed_bits(packed[0])
        told = f"{bits} bits each" if bits else f"{ASSUMED_BITS} bits each, which {CONFIG_NAME} does not say"
        notes.append(f"packed weights are counted as values of {told}, padding included")


# --- without shards


def _imagine(place: Place, *, trust_remote_code: bool) -> _Known:
    """The checkpoint that config.json and, where it is there, the index describe.

    Names come from the index and shapes from the model that transformers builds; a weight with a scale in the index is FP8.
    """
    path, origin, revision = place.path, place.origin, place.revision
    config = read_config(path)
    architecture = find(config, ARCHITECTURES)
    form = read_format(Checkpoint(path, config, {}, (), origin, revision))
    block = form.block
    if form.quantized and block is None:
        raise UnsupportedError(
            f"{origin} has no shards, and the shapes of {form.name} weights do not follow from {CONFIG_NAME}",
            hint="fetch the shards: only their headers are read",
        )
    dtype, exempt = _named_dtype(config), _exempt(quantization_table(config))
    from reapkit.modules import shapes_on_disk

    shapes, tied = shapes_on_disk(path, architecture, origin=origin, trust_remote_code=trust_remote_code)
    scales = _scale_shapes(shapes, block) if block is not None else {}
    notes: list[str] = []
    if (path / INDEX_NAME).exists():
        named, _ = read_index(path)
        total = _total_size(path)
        strange = named.keys() - shapes.keys() - scales.keys()
        absent = shapes.keys() - named.keys() - tied
        for verb, names, has in (("names", strange, "does not have"), ("lacks", absent, "has")):
            if names:
                notes.append(
                    f"{INDEX_NAME} {verb} tensors that the model {has}, and they are not counted: "
                    f"{min(names)} ({len(names):,} such)"
                )
        files = {name: file for name, file in named.items() if name not in strange}
    else:
        total = None
        scaled = {name + _SCALE_SUFFIX for name in _converted(shapes, architecture, exempt)}
        files = {name: "" for name in shapes if name not in tied} | {name: "" for name in scales if name in scaled}

    shapes |= scales
    storage = {name: _storage(name, files, architecture) for name in files}
    elements: Counter[_Storage] = Counter()
    for name, kind in storage.items():
        elements[kind] += math.prod(shapes[name])
    dtypes = _choose_dtypes(elements, plain=dtype, exempt=exempt, block=block, total=total, notes=notes)
    tensors = {}
    for name, file in files.items():
        dtype = dtypes[storage[name]]
        tensors[name] = TensorInfo(name, dtype, shapes[name], file, 0, nbytes(dtype, shapes[name]))
    return _Known(Checkpoint(path, config, tensors, (), origin, revision), True, total, tuple(notes))


def _total_size(path: Path) -> int | None:
    """The bytes of all tensors that the index gives; None where it gives none."""
    metadata = parse_json(read_small(path, INDEX_NAME), origin=INDEX_NAME, infinite=True).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    # Some vendors' tools write a float.
    return int(total) if isinstance(total, int | float) and 1 <= total < math.inf else None


def _scale_shapes(shapes: Mapping[str, tuple[int, ...]], block: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Name and shape of the block scales that every matrix would have."""
    return {
        name + _SCALE_SUFFIX: (*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))
        for name, shape in shapes.items()
        if len(shape) >= 2
    }


def _converted(names: Iterable[str], architecture: Architecture, exempt: tuple[str, ...]) -> Iterator[str]:
    """The weights that a quantiser leaves scales for, if they are matrices: those in layers that the config does not exempt."""
    for name in names:
        if architecture.layer_of(name) is not None and not name.removesuffix(".weight").endswith(exempt):
            yield name


def _exempt(quantization: Mapping[str, Any] | None) -> tuple[str, ...]:
    names = (quantization or {}).get("modules_to_not_convert") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{CONFIG_NAME} has modules_to_not_convert that is not a list of names")
    return tuple(names)


_Storage = Literal["plain", "fp8", "scale", "router", "bias"]


def _storage(name: str, files: Mapping[str, str], architecture: Architecture) -> _Storage:
    if name + _SCALE_SUFFIX in files:
        return "fp8"
    if name.endswith(_SCALE_SUFFIX):
        return "scale"
    claim = architecture.claim(name)
    return "plain" if claim is None or claim.slot.role == "expert" else claim.slot.role


def _choose_dtypes(
    elements: Mapping[_Storage, int],
    *,
    plain: str | None,
    exempt: tuple[str, ...],
    block: tuple[int, int] | None,
    total: int | None,
    notes: list[str],
) -> Mapping[_Storage, str]:
    """The dtype of each kind of tensor: the likeliest of those whose bytes add up to the index's `total_size`, else the likeliest."""
    candidates: list[dict[_Storage, str]] = []
    # Scales of MXFP8 are exponents; elsewhere they seldom are.
    scales = ["U8"] if block == (1, 32) else ["F32", "BF16", "F8_E8M0"]
    for weights in [plain] if plain else ["BF16", "F32", "F16"]:
        # MiniMax-M2 exempts "gate" by its bare name and stores routers and their biases in F32; others mostly store them like the rest.
        either = ["F32", weights] if "gate" in exempt else [weights, "F32"]
        for router, bias, scale in itertools.product(either, either, scales):
            candidates.append({"plain": weights, "fp8": "F8_E4M3", "scale": scale, "router": router, "bias": bias})
    sizes = [sum(nbytes(choice[kind], [count]) for kind, count in elements.items()) for choice in candidates]
    if total in sizes:
        return candidates[sizes.index(total)]
    if total is not None:
        notes.append(
            f"{INDEX_NAME} says {total:,} bytes and the shapes give {sizes[0]:,}: bytes by part are those of the shapes"
        )
    if plain is None:
        notes.append(f"{CONFIG_NAME} names no dtype: bf16 is assumed")
    return candidates[0]


def _named_dtype(config: Mapping[str, Any]) -> str | None:
    for table in (text_section(config), config):
        for key in ("dtype", "torch_dtype"):
            if (value := table.get(key)) is not None:
                if not isinstance(value, str) or value not in _DTYPE_CODES:
                    raise CheckpointError(
                        f"{CONFIG_NAME} gives {key} as {value!r}", hint=f"one of: {', '.join(_DTYPE_CODES)}"
                    )
                return _DTYPE_CODES[value]
    return None
