"""The only file that touches transformers' internals: the model's own forward, run with at most two layers in memory.

`StreamedModel` builds a model on the meta device and moves one layer's weights at a time from disk into it and out again.
`SuspendedForwards` runs the model's own, unmodified forward over many micro-batches at once: each has a stack of its own, a greenlet, and
is suspended in front of every layer until that layer is loaded. Nothing of the forward is imitated, so whatever a model carries from
layer to layer (alternating masks, indexers, several streams) is carried.

Shape suffixes: B = documents, T = tokens, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from reapkit.activations import Place, Spill, is_spillable
from reapkit.calibration import Images
from reapkit.checkpoint import Checkpoint, read_config, read_small, require_plain_files
from reapkit.errors import CheckpointError, DataError, ReapkitError, UnsupportedError, is_failure, reason_of
from reapkit.experts import (
    EXPERTS_NAME,
    RoutedObserver,
    Workspace,
    adapt,
    experts_of,
    keep_fp8,
    observed_experts,
    running,
    scale_of,
)
from reapkit.formats import as_factors, decode, read_tensor
from reapkit.fusion import fuse, fused_kernels
from reapkit.layout import Architecture, MoELayout
from reapkit.memory import free_memory
from reapkit.quantization import FP8_BLOCK, HINT, Format, read_format
from reapkit.sources import Disk
from reapkit.tensors import TensorInfo, brief

# Threads that read a layer for a GPU. More read no faster, and take turns with the thread that launches kernels. On a CPU, where they
# also dequantise, one for so many cores, and no more.
_READERS, _CORES_PER_READER = 4, 4
# One part in so many of the memory that is free may hold what is read ahead of a pass. It can be taken back; more of it bridges what a disk
# would rest for, like the seconds in which kernels are compiled.
_CACHED_SHARE = 8
# Compute capability of the cards whose products in FP8 were tried (Hopper), what their weights must be, and what of an expert's largest
# scale its others must be at least, and all of them: a row of zeros has the scale 2e-13, and one over both is still a float32.
_FP8_CAPABILITY = (9, 0)
_FP8_WEIGHTS = ("F8_E4M3", "scaled", (FP8_BLOCK, FP8_BLOCK), 2)
_SMALLEST_SHARE, _SMALLEST_SCALE = 1e-6, 1e-20
_DAMAGED = "fetch the checkpoint again: its weights are damaged"
# glibc's malloc.h. From this size on memory is mapped for each tensor, and given back with it; of the heap's end so much stays when free.
_M_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 8 << 20
_M_TRIM_THRESHOLD, _SPARE_BYTES = -1, 64 << 20


@dataclass(frozen=True)
class _Slice:
    """The part of a tensor of all experts, [E, rows, columns], that is one expert's tensor on disk."""

    target: str
    expert: int
    rows: slice


def _is_stacking(converter: Any) -> bool:
    """Whether a conversion puts experts one after the other, and of each its parts: nothing else."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    kinds = [(type(operation), operation.dim) for operation in converter.operations if hasattr(operation, "dim")]
    if len(kinds) != len(converter.operations) or len(converter.target_patterns) != 1:
        return False
    one, several = [(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]
    return kinds == (one if len(converter.source_patterns) == 1 else several)


class StreamedModel:
    """A transformers model whose weights come from disk one layer at a time.

    Args:
        checkpoint: where the weights lie.
        layout: its MoE layout.
        device: where layers are computed.
        dtype: dtype of the computation; router and selection bias keep float32 where they are stored so.
        trust_remote_code: run code that came with the checkpoint.
        plain: run without fused kernels on a GPU too.
        fp8: leave experts in FP8 as they are stored, and compute their products in it.

    Attributes:
        kernels: the fused kernels, where they are used.
        workspace: on a CPU, memory for what experts make on their way; for one forward at a time.
        fp8: whether experts are left in FP8.

    Raises:
        UnsupportedError: transformers has no such model, it does not route through the registry of experts functions, or experts cannot
            be computed with in FP8 here.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: MoELayout,
        *,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
        plain: bool = False,
        fp8: bool = False,
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.checkpoint = checkpoint
        self.layout = layout
        self.device = device
        self.dtype = dtype
        # Where weights are copied and dequantised beside what runs.
        self._copies: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        cores = torch.get_num_threads()
        self._num_readers = _READERS if device.type != "cpu" else min(_READERS, max(1, cores // _CORES_PER_READER))
        self.format: Format = read_format(checkpoint)
        if self.format.obstacle is not None:
            raise UnsupportedError(self.format.obstacle, hint=HINT)
        self.module = build_meta_model(
            checkpoint.path,
            layout.architecture,
            origin=checkpoint.origin,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        _require_rotary_dim(self.module, origin=checkpoint.origin)
        self.kernels = None if plain else fused_kernels(device)
        self.workspace = Workspace() if device.type == "cpu" else None
        if self.kernels is not None:
            fuse(self.module, self.kernels)
        self.layers = _decoder_layers(self.module, layout)
        self._conversions: list[Any] = get_model_conversion_mapping(self.module)
        head, embeddings = self.module.get_output_embeddings(), self.module.get_input_embeddings()
        self._is_tied = head is not None and head.weight is embeddings.weight
        self._state_names = dict.fromkeys(self.module.state_dict())
        self.fp8 = fp8
        self._as_stored = self._keep_fp8() if fp8 else frozenset[str]()
        self._by_layer, outer = _split_by_layer(checkpoint, layout, len(self.layers))
        self._entry, self._exit = self._split_outer(outer)
        self.mtp = MtpLayers.build(self)
        self._keep_routers_in_float32()
        self._fill_computed_buffers()

    @property
    def hidden_size(self) -> int:
        return int(self.module.get_input_embeddings().weight.shape[1])

    @property
    def num_heads(self) -> int:
        """Attention heads of a layer, by the config; 0 where it does not say."""
        return int(getattr(self.module.config.get_text_config(), "num_attention_heads", None) or 0)

    @property
    def vocab_size(self) -> int:
        return int(self.module.get_input_embeddings().weight.shape[0])

    @property
    def layer_nbytes(self) -> int:
        """Bytes that the largest layer takes on the device."""
        return max(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in self.layers)

    @property
    def entry_nbytes(self) -> int:
        """Bytes on the device of what runs before the first layer and after the last one, the output projection left out."""
        size = torch.empty((), dtype=self.dtype).element_size()
        return sum(self.format.num_values(info) for info in self._entry) * size

    @property
    def nbytes_per_pass(self) -> int:
        """Bytes that one pass over embeddings and layers reads from disk."""
        return sum(info.nbytes for infos in (*self._by_layer, self._entry) for info in infos)

    def stages(self, *, with_mtp: bool) -> list[list[TensorInfo]]:
        """What one pass reads at a time, each part in the order of its bytes: what stands outside the layers, every layer, MTP."""
        stages = [self._entry, *self._by_layer]
        if with_mtp and self.mtp is not None:
            stages.append([*self.mtp.infos, *self._shared_with_mtp()])
        tensors = self.checkpoint.tensors
        weights = ([info for info in stage if not self.format.is_companion(info.name)] for stage in stages)
        read = (
            [part for info in stage for part in (info, *self.format.companions(info, tensors))] for stage in weights
        )
        return [_by_place(stage) for stage in read]

    def reading(self, *, with_mtp: bool, disk: Disk | None) -> AbstractContextManager[None]:
        """While this lasts, a pass finds what it reads already on its way; but on a CPU, which takes longer than any disk."""
        if self.checkpoint.remote is None and self.device.type == "cpu":
            return nullcontext()
        order = itertools.chain.from_iterable(self.stages(with_mtp=with_mtp))
        return self.checkpoint.expecting(order, cached=free_memory(torch.device("cpu")) // _CACHED_SHARE, disk=disk)

    def fetch(self, index: int) -> dict[str, Tensor]:
        """A layer's tensors by on-disk name, read and dequantised; may run in another thread.

        Experts that the model keeps in one tensor are put there at once, under its own name, so that they are never held twice.
        """
        infos = self._by_layer[index]
        return self._decode(infos, self._stacks(infos))

    def load(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Put a fetched layer into the model."""
        self._assign(tensors)
        self._require_loaded(f"layer {index}", self.layers[index].modules())

    def unload(self, index: int) -> None:
        """Free a layer's weights."""
        _to_meta(self.layers[index])
        _return_freed_memory()

    def load_entry(self) -> None:
        """Load everything outside the layers but the output projection."""
        self._assign(self._decode(self._entry))
        elsewhere = {part for owner in (*self.layers, self.module.get_output_embeddings()) for part in owner.modules()}
        self._require_loaded("the model", (part for part in self.module.modules() if part not in elsewhere))

    def unload_embeddings(self) -> None:
        """Free the input embeddings, which are not needed again once every forward stands in front of the first layer."""
        _to_meta(self.module.get_input_embeddings())

    def load_exit(self) -> None:
        """Load the output projection."""
        self._assign(self._decode(self._exit))
        self.module.tie_weights()
        self._require_loaded("the model", self.module.get_output_embeddings().modules())

    def fetch_mtp(self) -> dict[str, Tensor]:
        """The MTP layers' tensors and the input embeddings, which they share, by name once dequantised."""
        assert self.mtp is not None
        return self._decode([*self.mtp.infos, *self._shared_with_mtp()])

    def _shared_with_mtp(self) -> list[TensorInfo]:
        embeddings = self.module.get_input_embeddings()
        return [info for info in self._entry if self.owner_of(info.name) is embeddings]

    def load_mtp(self, tensors: dict[str, Tensor]) -> None:
        """Put the MTP layers and the input embeddings into the model."""
        assert self.mtp is not None
        own = {name: tensor for name, tensor in tensors.items() if self.layout.is_mtp(name)}
        self._assign({name: tensor for name, tensor in tensors.items() if name not in own})
        self._assign(own, self.mtp.module, self.mtp.conversions)
        self._require_loaded("multi-token prediction", self.mtp.module.layers.modules())

    def unload_everything(self) -> None:
        """Free all weights, and what forwards shared."""
        if self.workspace is not None:
            self.workspace.clear()
        _to_meta(self.module)
        if self.mtp is not None:
            _to_meta(self.mtp.module)

    def _keep_fp8(self) -> frozenset[str]:
        """Prepare experts for weights in FP8; the names of these and of their scales in the model.

        Raises:
            UnsupportedError: the card, the checkpoint's format or the family's experts are not made for it.
        """
        if self.kernels is None:
            raise UnsupportedError(
                f"products in FP8 are computed by fused kernels alone, which do not run on {self.device} here",
                hint="--dtype bfloat16",
            )
        if torch.cuda.get_device_capability(self.device) != _FP8_CAPABILITY:
            raise UnsupportedError(
                f"products in FP8 are computed on Hopper GPUs alone, and {self.device} is none", hint="--dtype bfloat16"
            )
        weights = [self.checkpoint.tensors[name] for name in self.layout.expert_of if not self.layout.is_mtp(name)]
        if not weights:
            raise UnsupportedError(
                f"{self.checkpoint.origin} stores all experts of a layer in one tensor, so their products are not computed in FP8",
                hint="--dtype bfloat16",
            )
        for info in weights:
            if self.format.is_companion(info.name):
                continue
            recipe = self.format.recipe(info, self.checkpoint.tensors)
            if recipe is None or (info.dtype, recipe.scheme, recipe.block, len(recipe.shape)) != _FP8_WEIGHTS:
                raise UnsupportedError(
                    f"{info.name!r} is not stored in FP8 (E4M3) with a scale for each {FP8_BLOCK} x {FP8_BLOCK} values, so its products "
                    "are not computed in FP8",
                    hint="--dtype bfloat16",
                )
        for layer in self.layers:
            experts = experts_of(layer)
            if experts is not None and not keep_fp8(experts):
                raise UnsupportedError(
                    f"experts of {type(experts).__name__} are not computed in FP8", hint="--dtype bfloat16"
                )
        weights_in_memory = [
            name for name, value in self.module.named_parameters() if value.dtype == torch.float8_e4m3fn
        ]
        return frozenset((*weights_in_memory, *map(scale_of, weights_in_memory)))

    def _decode(self, infos: Sequence[TensorInfo], stacks: Mapping[str, _Slice] | None = None) -> dict[str, Tensor]:
        """Values by name once dequantised. Several threads read, for a GPU and where there are many cores; what they read for a GPU is
        copied and computed with beside the layer that runs. All of it is done on return.

        Raises:
            DataError: a value is NaN or infinite.
        """
        # In the order in which `stages` says that they will be read.
        weights = _by_place(info for info in infos if not self.format.is_companion(info.name))
        places = stacks or {}
        heights = {place.target: place.rows.stop - place.rows.start for place in places.values()}
        targets = {name: self._empty(name) for name in heights}
        scales = {name: self._empty_scales(name) for name in heights} if self.fp8 else {}

        def read(info: TensorInfo) -> tuple[str, Tensor] | None:
            place = places.get(info.name)
            with self._aside():
                if place is not None and self.fp8:
                    self._read_fp8(info, place, targets[place.target], scales[place.target])
                    return None
                value = decode(self.checkpoint, info, format=self.format, dtype=self.dtype, device=self.device)
                if place is None:
                    return info.name, value
                targets[place.target][place.expert, place.rows] = value
                return None

        with ExitStack() as stack:
            run: Any = map  # one reader is the thread that this runs in
            if self._num_readers > 1:
                run = stack.enter_context(_Readers("reapkit-reader", self._num_readers, device=self.device)).map
            values = dict(filter(None, run(read, weights)))
        with self._aside():
            for name, scale in scales.items():
                on_device = scale.to(self.device, non_blocking=True)
                targets[scale_of(name)] = _usable(on_device, heights[name] // FP8_BLOCK)
            self._require_finite(values, targets, places)
        if self._copies is not None:
            self._copies.synchronize()
        tensors = self.checkpoint.tensors
        return targets | {self.format.decoded(tensors[name], tensors)[0]: value for name, value in values.items()}

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Where copies for a GPU are queued: the current device and stream belong to the thread."""
        if self._copies is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._copies):
            yield

    def _read_fp8(self, info: TensorInfo, place: _Slice, weight_E: Tensor, scale_E: Tensor) -> None:
        """Put an expert's bytes and its scales where they belong, as they are stored."""
        recipe = self.format.recipe(info, self.checkpoint.tensors)
        assert recipe is not None
        is_pinned = self._copies is not None
        stored = read_tensor(self.checkpoint, info, pinned=is_pinned)
        weight_E[place.expert, place.rows].copy_(stored, non_blocking=is_pinned)
        blocks = slice(place.rows.start // FP8_BLOCK, place.rows.stop // FP8_BLOCK)
        scale_E[place.expert, blocks] = as_factors(read_tensor(self.checkpoint, recipe.scale)).view(recipe.grid[-2:])

    def _require_finite(
        self, values: Mapping[str, Tensor], targets: Mapping[str, Tensor], stacks: Mapping[str, _Slice]
    ) -> None:
        """Raise DataError naming the first tensor on disk that holds NaN or infinity, or what becomes infinite in the model's dtype.

        The least and the greatest value say so without a mask as large as the tensor; there is one wait for the device.
        """
        single = {name: value for name, value in values.items() if value.is_floating_point() and value.numel()}
        extremes = [torch.stack(value.aminmax()).to(self.dtype).float() for value in single.values()]
        odd_E = {target: self._odd_experts(target, targets) for target in {place.target for place in stacks.values()}}
        odd = [*(~extreme.isfinite() for extreme in extremes), *odd_E.values()]
        if not odd or not bool(torch.cat(odd).any()):
            return
        suspects = [name for name, extreme in zip(single, extremes, strict=True) if not extreme.isfinite().all()]
        suspects += [name for name, place in stacks.items() if odd_E[place.target][place.expert]]
        for name in sorted(suspects):
            self._require_finite_values(self.checkpoint.tensors[name])

    def _odd_experts(self, target: str, targets: Mapping[str, Tensor]) -> Tensor:
        """Which of the experts in a tensor of all hold NaN or infinity, bool [E]; in FP8 their scales may, too."""
        value_E = targets[target]
        if self.kernels is None:
            # One after the other: along the other dimensions of all torch takes many times as long.
            return ~torch.stack([torch.stack(value.aminmax()) for value in value_E]).isfinite().all(1)
        odd_E: Tensor = self.kernels.find_odd(value_E)
        return odd_E | self.kernels.find_odd(targets[scale_of(target)]) if self.fp8 else odd_E

    def _require_finite_values(self, info: TensorInfo) -> None:
        """The same of one tensor, of which what is wrong is told: a scale, a value of its own, or one that the model's dtype has not."""
        recipe = self.format.recipe(info, self.checkpoint.tensors)
        for scale in (recipe.scale, recipe.factor) if recipe is not None else ():
            if scale is not None:
                what = f"{scale.name!r} in {scale.file}, a scale of {info.name!r},"
                _require_no_odd(
                    as_factors(read_tensor(self.checkpoint, scale)), f"{what} holds NaN or infinity", _DAMAGED
                )
        what = f"{info.name!r} in {info.file}"
        value = decode(self.checkpoint, info, format=self.format, dtype=torch.float32, device=self.device)
        _require_no_odd(value, f"{what} holds NaN or infinity", _DAMAGED)
        dtype = self._dtype_of(info.name)
        named = str(dtype).removeprefix("torch.")
        hint = None if dtype == torch.float32 else "--dtype float32"
        _require_no_odd(value.to(dtype), f"{what} holds values beyond the range of {named}", hint)

    def _dtype_of(self, name: str) -> torch.dtype:
        """What a tensor on disk becomes in the model, where some have a dtype of their own."""
        owner, leaf = self.owner_of(name), self.in_memory_name(name).rpartition(".")[2]
        value = getattr(owner, leaf, None)
        return value.dtype if isinstance(value, Tensor) and value.dtype != torch.float8_e4m3fn else self.dtype

    def _empty(self, name: str) -> Tensor:
        """Memory for one of the model's tensors; for a GPU the copying stream's, which fills it."""
        like = self.module.get_parameter(name)
        if self._copies is None:
            return torch.empty(like.shape, dtype=like.dtype, device=self.device)
        with torch.cuda.stream(self._copies):
            return torch.empty(like.shape, dtype=like.dtype, device=self.device)

    def _empty_scales(self, name: str) -> Tensor:
        """Memory on the host for the scales of one of the model's tensors in FP8.

        They go to a GPU all at once: a copy for each of hundreds, a kilobyte long, would keep the driver from the layer that runs.
        """
        like = self.module.get_parameter(scale_of(name))
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self._copies is not None)

    def _stacks(self, infos: Sequence[TensorInfo]) -> dict[str, _Slice]:
        """Where in a tensor of all experts a tensor of one expert goes, by its name on disk, where conversion would only stack them."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        found: dict[str, dict[str, _Slice]] = defaultdict(dict)
        for info in infos:
            if info.name not in self.layout.expert_of or self.format.is_companion(info.name):
                continue
            name, shape = self.format.decoded(info, self.checkpoint.tensors)
            target, pattern = rename_source_key(
                name, renamings, converters, self.module.base_model_prefix, self._state_names
            )
            own = [entry for entry in converters if pattern in entry.source_patterns and _is_stacking(entry)]
            if len(own) != 1 or target not in self._state_names:
                continue
            sources = own[0].source_patterns
            part, (experts, rows, columns) = sources.index(pattern), self.module.get_parameter(target).shape
            height = rows // len(sources)
            if tuple(shape) == (height, columns) and experts == self.layout.num_experts:
                expert = self.layout.expert_of[info.name][1]
                found[target][info.name] = _Slice(target, expert, slice(part * height, (part + 1) * height))
        # One that lacks an expert is converted as it is, and refused.
        whole = [
            slices
            for target, slices in found.items()
            if sum(place.rows.stop - place.rows.start for place in slices.values())
            == self.layout.num_experts * self.module.get_parameter(target).shape[1]
        ]
        return {name: place for slices in whole for name, place in slices.items()}

    def _assign(self, tensors: dict[str, Tensor], module: Any = None, conversions: list[Any] | None = None) -> None:
        """Convert on-disk names and layouts to the module's own, by default the whole model's, and assign them."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        if self._copies is not None:
            # Their memory may be used for the next layer only when this one has run.
            for tensor in tensors.values():
                tensor.record_stream(torch.cuda.current_stream(self.device))
        for name in self._as_stored & tensors.keys():  # which transformers would convert to the model's dtype
            path, _, leaf = name.rpartition(".")
            setattr(self.module.get_submodule(path), leaf, nn.Parameter(tensors.pop(name), requires_grad=False))
        mapping = self._conversions if conversions is None else conversions
        config = LoadStateDictConfig(device_map={"": self.device}, dtype=self.dtype, weight_mapping=mapping)
        with _quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.module if module is None else module, tensors, config)
        if info.mismatched_keys:
            name, found, expected = min(info.mismatched_keys)
            raise CheckpointError(f"{name!r} has the shape {list(found)} where the model has {list(expected)}")
        if info.conversion_errors:
            name, reason = next(iter(info.conversion_errors.items()))
            raise CheckpointError(f"{name!r} cannot be converted: {str(reason).strip().splitlines()[-1]}")

    def _require_loaded(self, where: str, owners: Iterable[nn.Module]) -> None:
        names = {owner: path for path, owner in self.module.named_modules()}
        if self.mtp is not None:
            names |= {owner: path for path, owner in self.mtp.module.layers.named_modules(prefix="mtp.layers")}
        empty = [
            f"{names[owner]}.{leaf}"
            for owner in owners
            for leaf, value in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
            if value.is_meta
        ]
        if empty:
            raise CheckpointError(
                f"{where} lacks weights: the checkpoint has no tensor for {empty[0]!r} ({len(empty)} such tensors)",
                hint="fetch the checkpoint again",
            )

    def _split_outer(self, outer: Sequence[TensorInfo]) -> tuple[list[TensorInfo], list[TensorInfo]]:
        """What must be there before the first layer, and what the output projection needs."""
        head, embeddings = self.module.get_output_embeddings(), self.module.get_input_embeddings()
        entry, exit_ = [], []
        for info in outer:
            owner = self.owner_of(info.name)
            if owner is head or (owner is embeddings and self._is_tied):
                exit_.append(info)
            if owner is not head:
                entry.append(info)
        return entry, exit_

    def owner_of(self, name: str) -> nn.Module | None:
        """The module that a tensor on disk belongs to; None where transformers does not run it."""
        try:
            owner: nn.Module = self.module.get_submodule(self.in_memory_name(name).rpartition(".")[0])
        except AttributeError:  # something that transformers does not run, such as an MTP layer
            return None
        return owner

    def in_memory_name(self, name: str) -> str:
        return _renamed(name, self.module, self._conversions, self._state_names)

    def _keep_routers_in_float32(self) -> None:
        """Give routers and selection biases that are stored as F32 a float32 home, so that loading does not round them."""
        for name in self.layout.router_names:
            if self.checkpoint.tensors[name].dtype != "F32":
                continue
            if not self.layout.is_mtp(name):
                module, target = self.module, self.in_memory_name(name)
            elif self.mtp is not None:
                module, target = self.mtp.module, self.mtp.in_memory_name(name)
            else:
                continue
            path, _, leaf = target.rpartition(".")
            owner = module.get_submodule(path)
            old = getattr(owner, leaf)
            new = torch.empty(old.shape, dtype=torch.float32, device="meta")
            setattr(owner, leaf, new if leaf in owner._buffers else nn.Parameter(new, requires_grad=False))
            if self.layout.stacked_of[name][1].role == "router":
                owner.register_forward_pre_hook(_to_float32)

    def _fill_computed_buffers(self) -> None:
        """Compute the buffers that no checkpoint holds (rotary frequencies) on the device, as loading in transformers does."""
        owners: dict[str, nn.Module] = {}
        for name, buffer in list(self.module.named_non_persistent_buffers()):
            path, _, leaf = name.rpartition(".")
            owners[path] = owner = self.module.get_submodule(path)
            owner.register_buffer(leaf, torch.empty_like(buffer, device=self.device), persistent=False)
        with torch.no_grad():
            for path, owner in owners.items():
                self._closest_model(path)._init_weights(owner)

    def _closest_model(self, path: str) -> Any:
        from transformers import PreTrainedModel

        parts = path.split(".")
        for end in range(len(parts), -1, -1):
            module = self.module.get_submodule(".".join(parts[:end]))
            if isinstance(module, PreTrainedModel):
                return module
        raise AssertionError("the model itself is a PreTrainedModel")


class MtpLayers:
    """Multi-token prediction as transformers runs it for some families: layers that take the next token and the hidden state before it.

    Attributes:
        module: transformers' own module for them, on the meta device; embeddings and rotary frequencies are the model's.
        infos: their tensors on disk.
        conversions: from names and layouts on disk to the module's own.
    """

    def __init__(self, module: Any, infos: Sequence[TensorInfo], conversions: list[Any]) -> None:
        self.module = module
        self.infos = infos
        self.conversions = conversions
        self._state_names = dict.fromkeys(module.state_dict())

    @classmethod
    def build(cls, model: StreamedModel) -> MtpLayers | None:
        """The MTP layers of a model; None where it has none with experts, or transformers cannot run them."""
        layout = model.layout
        count = getattr(model.module.config.get_text_config(), "num_mtp_layers", None)
        if not layout.mtp_indices or layout.mtp_indices != tuple(
            range(layout.num_layers, layout.num_layers + (count or 0))
        ):
            return None
        try:
            from transformers.modeling_layers import MtpModel

            with torch.device("meta"), _quiet_transformers():
                module = MtpModel(model.module, count).eval().requires_grad_(False)
                module.layers.to(model.dtype)  # what it shares with the model keeps its own
                conversions = module.get_weight_conversions(model.module)
        except (
            ImportError,
            ValueError,
            AttributeError,
            TypeError,
        ):  # an older transformers, or a config that says too little
            return None
        if any(experts_of(layer) is None for layer in module.layers):
            return None
        # Releases repeat the embeddings and the output projection beside them.
        shared = (".embed_tokens.weight", ".shared_head.head.weight")
        infos = [
            info for name, info in model.checkpoint.tensors.items() if layout.is_mtp(name) and not name.endswith(shared)
        ]
        return cls(module, infos, conversions)

    def in_memory_name(self, name: str) -> str:
        return _renamed(name, self.module, self.conversions, self._state_names)

    def run(self, index: int, hidden_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """One layer's hidden states, [B, T, D], from those before it and the tokens one further than these have seen.

        The last token of a row has no next one; a padding token stands in, and no earlier position sees it.
        """
        next_BT = torch.nn.functional.pad(ids_BT[:, index + 1 :], (0, min(index + 1, ids_BT.shape[1])))
        position_T = torch.arange(index + 1, index + 1 + ids_BT.shape[1], device=ids_BT.device)
        result: Tensor = self.module.forward_layer(index, hidden_BTD, position_T[None], None, input_ids=next_BT)
        return result


def _by_place(infos: Iterable[TensorInfo]) -> list[TensorInfo]:
    """In the order of their bytes on disk."""
    return sorted(infos, key=lambda info: (info.file, info.start))


def _usable(scale_EHG: Tensor, height: int) -> Tensor:
    """Scales of all experts without zeros, by which kernels would divide: each so many rows of an expert's were one tensor.

    What is put in their place is so small a part of that tensor's largest that it is far below FP8's rounding.
    """
    grouped = scale_EHG.view(len(scale_EHG), -1, height * scale_EHG.shape[2])
    floor = (grouped.abs().amax(-1, keepdim=True) * _SMALLEST_SHARE).clamp(min=_SMALLEST_SCALE)
    return torch.where(grouped.abs() < floor, floor, grouped).view_as(scale_EHG)


def _require_no_odd(value: Tensor, what: str, hint: str | None) -> None:
    """Raise DataError where a value is NaN or infinite."""
    if count := int((~value.isfinite()).sum()):
        raise DataError(f"{what}: {count:,} of {value.numel():,} values", hint=hint)


def _renamed(name: str, module: Any, conversions: Sequence[Any], state_names: dict[str, Any]) -> str:
    """The name in a module of a tensor on disk."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    return str(rename_source_key(name, renamings, converters, module.base_model_prefix, state_names)[0])


def _to_float32(router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Bring a router's inputs to its weights' dtype: MiniMax-M2's router does so itself, Qwen3-MoE's would fail on a mixed product."""
    return tuple(value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for value in args)


def _to_meta(module: nn.Module) -> None:
    """Free the values that a checkpoint can bring back."""
    for owner in module.modules():
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, leaf, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
        for leaf, buffer in list(owner.named_buffers(recurse=False)):
            if leaf not in owner._non_persistent_buffers_set:
                setattr(owner, leaf, torch.empty_like(buffer, device="meta"))


def _return_freed_memory() -> None:
    """Hand freed memory back to the system.

    glibc keeps it in arenas, whose gaps let the peak creep up layer by layer (by 0.3 GB over 16 layers of 0.1 GB).
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # other C libraries have no such function
            ctypes.CDLL(None).malloc_trim(0)


class _Readers(ThreadPoolExecutor):
    """Threads that read beside the one that runs a model.

    Where that is on the CPU, a reader computes on one core: torch would give each as many threads as there are cores, and all would wait
    for those that the others hold.
    """

    def __init__(self, name: str, count: int, *, device: torch.device) -> None:
        self._is_limited = device.type == "cpu" and torch.backends.openmp.is_available()  # type: ignore[no-untyped-call]
        # A thread's number is its own once it has asked for it. A new thread takes the one that was set last, in whatever thread.
        self._num_threads = torch.get_num_threads()
        limit = partial(torch.set_num_threads, 1) if self._is_limited else None
        super().__init__(count, thread_name_prefix=name, initializer=limit)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        if self._is_limited:
            torch.set_num_threads(self._num_threads)


def _map_large_tensors() -> None:
    """Keep suspended hidden states and a layer's temporaries from breaking up each other's memory.

    glibc moves its threshold up with what is freed, and then lays both out in one heap: a fourth more than what is suspended was taken
    (benchmarks/activation_budget.py), and still as much with one of 16 MB. Where the threshold is set, glibc also gives back all but
    128 KB of what is free at the heap's end, which every step would take anew.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, _SPARE_BYTES)


def build_meta_model(
    path: Path, architecture: Architecture, *, origin: str, dtype: torch.dtype, trust_remote_code: bool = False
) -> Any:
    """The model of a folder's config.json on the meta device, its experts routed through `observed_experts`."""
    from transformers import AutoConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, observed_experts)
    require_plain_files(path)
    try:
        with _quiet_transformers():
            stored = read_config(path)
            if (model_type := stored.get("model_type")) in architecture.not_in_transformers:
                raise UnsupportedError(
                    f"transformers has no class for {model_type!r}, so its experts cannot be observed",
                    hint="a plan made elsewhere prunes it all the same",
                )
            if architecture.runs_as is not None:
                # Its own code is for another transformers, and does not go through the registry.
                unwanted = ("model_type", "auto_map")
                described = {key: value for key, value in stored.items() if key not in unwanted}
                config = type(AutoConfig.for_model(architecture.runs_as)).from_dict(described)
            else:
                config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
            # Weights are dequantised before they reach the model, so it must not be prepared for quantised ones.
            for part in (config, config.get_text_config()):
                if getattr(part, "quantization_config", None) is not None:
                    del part.quantization_config
            config.use_cache = False
            # Kept for every layer until the forward ends, they would make memory grow with the number of layers.
            for name in ("output_router_logits", "output_hidden_states", "output_attentions"):
                setattr(config.get_text_config(), name, False)
            with torch.device("meta"):
                model = _model_class(config).from_config(
                    config, dtype=dtype, experts_implementation=EXPERTS_NAME, trust_remote_code=trust_remote_code
                )
                adapt(model)
    except Exception as error:  # a config from a stranger reaches code that expects any other
        if isinstance(error, ReapkitError):
            raise
        if "trust_remote_code" in str(error):
            raise UnsupportedError(f"{origin} needs code of its own to run, which was not allowed",
                                   hint="read that code, then pass --trust-remote-code") from None  # fmt: skip
        raise UnsupportedError(f"transformers cannot build this model: {reason_of(error)}") from None
    return model.eval().requires_grad_(False)


def _model_class(config: Any) -> Any:
    """The kind of model that a config describes: language models, and those that also see, which are run on text alone."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    is_remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    named = next(iter(config.architectures or ()), "")
    return (
        AutoModelForCausalLM
        if is_remote or (type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not named.endswith("ForConditionalGeneration"))
        else AutoModelForImageTextToText
    )


def _require_rotary_dim(model: Any, *, origin: str) -> None:
    """Refuse a transformers that ignores `rotary_dim`: 5.17 rotates every dimension of MiniMax-M2's heads, later ones the first half."""
    import transformers

    expected = getattr(model.config, "rotary_dim", None)
    for module in model.modules():
        frequencies = getattr(module, "inv_freq", None)
        if expected is not None and isinstance(frequencies, Tensor) and 2 * frequencies.numel() != expected:
            raise UnsupportedError(
                f"transformers {transformers.__version__} rotates {2 * frequencies.numel()} dimensions of a head where {origin} "
                f"says {expected}",
                hint="pip install 'transformers>=5.18'",
            )


def shapes_on_disk(
    path: Path, architecture: Architecture, *, origin: str, trust_remote_code: bool = False
) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """Shapes of the unquantised weights of a folder's config.json by on-disk name, without any weights.

    Returns:
        The shapes, and those of the names that share another one's values (tied embeddings), which a checkpoint may leave out.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = build_meta_model(
        path, architecture, origin=origin, dtype=torch.bfloat16, trust_remote_code=trust_remote_code
    )
    state = model.state_dict()
    owned = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    with _quiet_transformers():
        stored = revert_weight_conversion(model, state)
    return {name: tuple(value.shape) for name, value in stored.items()}, frozenset(state.keys() - owned)


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's own tokenizer.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    require_plain_files(checkpoint.path)
    try:
        _require_printable_keys(checkpoint)
        with _quiet_transformers():
            return AutoTokenizer.from_pretrained(str(checkpoint.path), trust_remote_code=trust_remote_code)
    except (
        BaseException
    ) as error:  # the library raises whatever its parts do, and panics of its Rust part are no Exception
        if isinstance(error, ReapkitError) or not is_failure(error):
            raise
        raise CheckpointError(f"the tokenizer of {checkpoint.origin} cannot be loaded: {reason_of(error)}") from None


def _require_printable_keys(checkpoint: Checkpoint) -> None:
    """Refuse signs that steer a terminal among the keys of tokenizer_config.json: the tokenizers library prints those it does not know."""
    name = "tokenizer_config.json"
    if not (checkpoint.path / name).exists():
        return
    stack = [json.loads(read_small(checkpoint.path, name))]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if odd := [key for key in value if not key.isprintable()]:
                raise CheckpointError(f"{name} has the key {brief(odd[0])}, which cannot be printed")
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)


def load_processor(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's own processor, which renders chats with images; without its part for videos where torchvision is missing.

    Raises:
        DataError: the model takes no images, the checkpoint brings no image processor, or a package is missing.
    """
    from transformers import AutoProcessor

    if checkpoint.config.get("vision_config") is None:
        raise DataError(
            f"{checkpoint.origin} has no vision tower, so it takes no images", hint="remove the rows with images"
        )
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise DataError("reading images needs the package pillow", hint="pip install pillow") from None
    described = ("preprocessor_config.json", "processor_config.json")
    if not any((checkpoint.path / name).exists() for name in described):
        raise DataError(
            f"{checkpoint.origin} brings no image processor: it has neither {' nor '.join(described)}",
            hint="fetch these files from where the checkpoint came from",
        )
    require_plain_files(checkpoint.path)
    try:
        with _quiet_transformers():
            try:
                processor = AutoProcessor.from_pretrained(str(checkpoint.path), trust_remote_code=trust_remote_code)
            except ImportError as error:
                processor = _processor_without_videos(checkpoint.path, error)
        if getattr(processor, "image_processor", None) is None:
            raise ValueError("there is none in its files")
    except BaseException as error:  # as in `load_tokenizer`
        if not is_failure(error):
            raise
        raise DataError(
            f"the image processor of {checkpoint.origin} cannot be loaded: {reason_of(error)}",
            hint="pip install torchvision" if "torchvision" in str(error).lower() else "fetch the checkpoint again",
        ) from None
    return processor


def _processor_without_videos(path: Path, error: ImportError) -> Any:
    """A family's processor for text and images alone: its part for videos needs torchvision, also where nobody has videos.

    Raises:
        ImportError: the given one, where that is not all that is missing.
    """
    from transformers import PROCESSOR_MAPPING, AutoConfig, AutoImageProcessor, AutoTokenizer

    config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    family: Any = PROCESSOR_MAPPING.get(type(config), None)
    if family is None or set(family.get_attributes()) != {"image_processor", "tokenizer", "video_processor"}:
        raise error

    class WithoutVideos(family):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
            """Passes no video processor, of which transformers' own check looks up the class."""

    described, _ = family.get_processor_dict(str(path))
    tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    return WithoutVideos(
        image_processor=AutoImageProcessor.from_pretrained(str(path), trust_remote_code=False),
        tokenizer=tokenizer,
        chat_template=described.get("chat_template") or tokenizer.chat_template,
    )


class _Cancelled(BaseException):
    """Wakes a suspended forward so that it unwinds."""


class _Forward:
    """One micro-batch's forward, run a layer at a time, in a greenlet: a stack of its own, and no thread.

    Attributes:
        result: what the model returned.
        output: of the layer that was run last.
    """

    # Hidden states that it was seen to hold at its pauses; those that are gone are dropped.
    _seen: list[weakref.ref[Tensor]]

    def __init__(
        self,
        run: Callable[[], Any],
        *,
        model: StreamedModel,
        observe: RoutedObserver | None,
    ) -> None:
        self._model = model
        self._observe = observe
        self._seen = []
        self._layer = -1
        self.result: Any = None
        self.output: Tensor | None = None
        self._run_forward = run
        self._greenlet = greenlet(self._run)

    def _run(self) -> None:
        with suppress(_Cancelled):
            self.result = self._run_forward()

    def pause(self, layer: int, hidden: Any = None) -> None:
        """Called in the forward: wait in front of a layer, whose input is `hidden`."""
        self._layer = layer
        if is_spillable(hidden) and not any(hidden is tensor for tensor in self.held()):
            self._seen.append(weakref.ref(hidden))
        hidden = None  # else this frame would keep it
        self._greenlet.parent.switch()

    def step(self) -> None:
        """Called from outside: run up to the next pause or to the end."""
        self.output = None
        running.forward, running.layer = self, self._layer
        running.observe, running.kernels, running.workspace = self._observe, self._model.kernels, self._model.workspace
        self._greenlet.parent = getcurrent()
        # Gradient mode and the current device belong to the thread, so they are set for every step.
        device = self._model.device
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        try:
            with torch.inference_mode(), on_device:
                self._greenlet.switch()
        finally:
            running.forward = running.observe = running.kernels = running.workspace = None

    def held(self) -> list[Tensor]:
        """The hidden states that it holds while it is suspended."""
        alive = [(reference, tensor) for reference in self._seen if (tensor := reference()) is not None]
        self._seen = [reference for reference, _ in alive]
        return [tensor for _, tensor in alive]

    def take_result(self) -> Any:
        """The forward's result, not kept here."""
        result, self.result = self.result, None
        return result

    def cancel(self) -> None:
        """Called from outside: unwind."""
        if self._greenlet:  # begun, and not at its end
            self._greenlet.parent = getcurrent()
            self._greenlet.throw(_Cancelled)


class SuspendedForwards:
    """The model's own forward over many micro-batches, all of them suspended in front of the same layer.

    A context manager: on leaving, also by an error or Ctrl-C, every forward is woken and unwound, and the model's weights are freed. To be
    used in the thread that made it.

    Args:
        model: whose forward runs.
        inputs_BT: int64 token ids per micro-batch, documents padded on the right. No mask is passed: causal attention cannot see
            the padding behind a token.
        images: per micro-batch, the images of its only document, which are prepared when its forward begins.
        observe: per micro-batch, what is shown its routed pairs.
        place: where suspended micro-batches keep their hidden states.
        keep_outputs: whether anything is asked for after the last layer; else a micro-batch is freed when it has left it.
        with_mtp: also run the MTP layers, where transformers can and somebody observes.
        with_outputs: keep what leaves a layer until the next step, for `output`; not where activations are spilled.
    """

    def __init__(
        self,
        model: StreamedModel,
        inputs_BT: Sequence[np.ndarray[Any, Any]],
        *,
        images: Sequence[Images | None] | None = None,
        observe: Sequence[RoutedObserver] | None = None,
        place: Place = "device",
        keep_outputs: bool = True,
        with_mtp: bool = True,
        with_outputs: bool = False,
    ) -> None:
        self._model = model
        self._spill = None if place == "device" else Spill(model.device, place)
        seen: Sequence[Images | None] = images if images is not None else [None] * len(inputs_BT)
        observers: Sequence[RoutedObserver | None] = observe if observe is not None else [None] * len(inputs_BT)
        self._forwards = [
            _Forward(partial(self._forward, ids_BT, image), model=model, observe=observer)
            for ids_BT, image, observer in zip(inputs_BT, seen, observers, strict=True)
        ]
        self._loader = _Readers("reapkit-loader", 1, device=model.device)
        self._hooks: list[Any] = []
        self._with_outputs = with_outputs
        self._runs_mtp = with_mtp and observe is not None and model.mtp is not None
        self._keep_outputs = keep_outputs or self._runs_mtp

    def __enter__(self) -> SuspendedForwards:
        if self._model.device.type == "cpu":
            _map_large_tensors()
        for index, layer in enumerate(self._model.layers):
            self._hooks.append(layer.register_forward_pre_hook(partial(_pause_before, index), with_kwargs=True))
            if self._with_outputs:
                self._hooks.append(layer.register_forward_hook(_keep_output))
        last = len(self._model.layers)
        self._hooks.append(self._model.layers[-1].register_forward_hook(partial(_pause_after, last)))
        if self._runs_mtp:
            decoder = self._model.module.get_decoder()
            self._hooks.append(decoder.register_forward_hook(partial(_run_mtp, self._model), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:  # all of it, the last one first, whatever a forward raises while it unwinds
            stack.callback(self._model.unload_everything)
            if self._spill is not None:
                stack.callback(self._spill.close)
            for hook in self._hooks:
                stack.callback(hook.remove)
            stack.callback(self._loader.shutdown, wait=True, cancel_futures=True)
            for forward in self._forwards:
                stack.callback(forward.cancel)

    def run_layers(self, after_batch: Callable[[int, int], None], *, disk: Disk | None = None) -> None:
        """Run all micro-batches through all layers; `after_batch(layer, batch)` is called when a batch has left a layer."""
        with closing(self.steps(disk=disk)) as steps:
            for layer, number in steps:
                after_batch(layer, number)

    def output(self, number: int) -> Tensor:
        """What the layer that a micro-batch has just left made of it, [B, T, ...]; good until the next step."""
        output = self._forwards[number].output
        assert output is not None
        return output

    def steps(self, *, disk: Disk | None = None) -> Generator[tuple[int, int], None, None]:
        """Run all micro-batches through all layers, and yield (layer, batch) when a batch has left a layer; to be closed.

        While one layer runs, the next one is read and dequantised; through a network further ones come to the disk.
        """
        with self._model.reading(with_mtp=self._runs_mtp, disk=disk):
            yield from self._steps()

    def _steps(self) -> Iterator[tuple[int, int]]:
        model = self._model
        fetched: Future[dict[str, Tensor]] = self._loader.submit(model.fetch, 0)
        model.load_entry()
        for number in range(len(self._forwards)):
            self._step(number)
        model.unload_embeddings()
        for index in range(len(model.layers)):
            model.load(index, fetched.result())
            if index + 1 < len(model.layers):
                fetched = self._loader.submit(model.fetch, index + 1)
            for number in range(len(self._forwards)):
                self._step(number)
                if index + 1 == len(model.layers) and not self._keep_outputs:
                    self._forwards[number].cancel()
                    if self._spill is not None:
                        self._spill.forget(number)
                yield index, number
            model.unload(index)
        if self._runs_mtp:
            yield from self._mtp_steps()

    def _mtp_steps(self) -> Iterator[tuple[int, int]]:
        """The MTP layers, all of them loaded at once: releases have one to three."""
        model = self._model
        model.load_mtp(model.fetch_mtp())
        for index in model.layout.mtp_indices:
            for number in range(len(self._forwards)):
                self._step(number)
                yield index, number

    def _step(self, number: int) -> None:
        """Run one micro-batch up to its next pause; where activations are spilled, the next one's come in beside it."""
        if self._spill is None:
            self._forwards[number].step()
            return
        self._spill.require(number)
        self._spill.bring_in((number + 1) % len(self._forwards))
        self._forwards[number].step()
        self._spill.take_out(number, self._forwards[number].held())

    def logits(self) -> Iterator[Tensor]:
        """After `run_layers`: finish each forward and yield its logits, [B, T, V]; one micro-batch's are held at a time."""
        self._model.load_exit()
        for number, forward in enumerate(self._forwards):
            self._step(number)
            yield forward.take_result().logits

    def _forward(self, ids_BT: np.ndarray[Any, Any], images: Images | None) -> Any:
        inputs = {name: self._moved(array) for name, array in (images.load() if images is not None else {}).items()}
        return self._model.module(input_ids=self._moved(ids_BT), use_cache=False, **inputs)

    def _moved(self, array: np.ndarray[Any, Any]) -> Tensor:
        """To the model's device, and to its dtype unless whole numbers."""
        tensor = torch.from_numpy(array)
        return tensor.to(self._model.device, self._model.dtype if tensor.is_floating_point() else None)


def _running_forward() -> _Forward:
    assert isinstance(running.forward, _Forward)
    return running.forward


def _pause_before(layer: int, module: nn.Module, args: Any, kwargs: Any) -> None:
    _running_forward().pause(layer, args[0] if args else kwargs.get("hidden_states"))


def _keep_output(module: nn.Module, args: Any, output: Any) -> None:
    # Families return the hidden state, or it and what attention or the router had to say.
    _running_forward().output = output[0] if isinstance(output, tuple) else output


def _pause_after(layer: int, module: nn.Module, args: Any, output: Any) -> None:
    _running_forward().pause(layer, output[0] if isinstance(output, tuple) else output)


def _run_mtp(model: StreamedModel, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """After the decoder's last norm: run the MTP layers, each when it is its turn."""
    forward = _running_forward()
    assert model.mtp is not None
    hidden_BTD = output.last_hidden_state
    for depth, index in enumerate(model.layout.mtp_indices):
        running.layer = index
        hidden_BTD = model.mtp.run(depth, hidden_BTD, kwargs["input_ids"])
        forward.pause(index + 1)


def _decoder_layers(module: nn.Module, layout: MoELayout) -> Sequence[nn.Module]:
    """The list of decoder layers: the one ModuleList that is as long as config.json says and whose members hold experts."""
    found = [
        child
        for child in module.modules()
        if isinstance(child, nn.ModuleList)
        and len(child) == layout.num_layers
        and any(experts_of(layer) is not None for layer in child)
    ]
    if not found:
        raise UnsupportedError(
            f"transformers' {type(module).__name__} does not route its experts through the registry of experts functions, so they cannot "
            "be observed"
        )
    # The outermost list comes first: lists inside a layer are found after it.
    return list(found[0])


def _split_by_layer(
    checkpoint: Checkpoint, layout: MoELayout, num_layers: int
) -> tuple[list[list[TensorInfo]], list[TensorInfo]]:
    by_layer: list[list[TensorInfo]] = [[] for _ in range(num_layers)]
    outer = []
    for info in checkpoint.tensors.values():
        index = layout.architecture.layer_of(info.name)
        if index is not None and index < num_layers:
            by_layer[index].append(info)
        elif not layout.is_mtp(info.name):  # which transformers does not run
            outer.append(info)
    return by_layer, outer


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars nor advice from transformers while it does our work."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
