"""What merging needs beyond statistics: every expert run on every token of a sample, with the model's own forward around it.

The text streams through the model as in observing. In front of each layer's experts the sample's tokens are sent through all of them,
one after the other, and only sums are kept: memory does not grow with the sample.

Shape suffixes: N = tokens of a micro-batch laid end to end, E = experts, D = hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as encode
from torch import Tensor, nn

from reapkit import outputs
from reapkit.calibration import CalibrationBatch, CalibrationData, Document, batches
from reapkit.clusters import Similarity
from reapkit.errors import DataError, ReapkitError, UnsupportedError
from reapkit.experts import RoutedPairs, experts_of, running
from reapkit.formats import decode
from reapkit.layout import MoELayer
from reapkit.modules import StreamedModel, SuspendedForwards
from reapkit.observation import MAX_SUSPENDED, Observation, bytes_per_token, split_into_waves, tokens_per_batch
from reapkit.progress import Progress, silent
from reapkit.tensors import (
    MAX_NUMBER,
    as_count,
    as_list,
    as_table,
    as_text,
    name_by_layer,
    parse_json,
    read_header,
    split_by_layer,
)

FORMAT = "reapkit-similarity-1"
# Where merging keeps it in an output's folder.
SIMILARITY_NAME = "reapkit/similarity.safetensors"
# Mean outputs of experts and products of logits settle long before saliency does: the papers take 32 sequences of 2,048 tokens at most.
# More costs E times what observing them costs.
SAMPLE_TOKENS = 16_384
# Inputs on which neurons are compared: with 512 of D values for 62 layers of MiniMax-M2, 0.4 GB.
KEPT_INPUTS = 512


_PARTS = tuple(part.name for part in fields(Similarity) if part.name != "tokens")


@dataclass(frozen=True)
class Similarities:
    """The similarity of every decoder layer's experts, with what it was measured on.

    Attributes:
        layers: by number.
        tokens: size of the sample.
        digest: of the text that the sample was taken from.
        settings: of the observation, and the layout's fingerprint.
        sources: what was read, for people.
    """

    layers: Mapping[int, Similarity]
    tokens: int
    digest: str
    settings: Mapping[str, Any]
    sources: tuple[Mapping[str, Any], ...]

    def save(self, path: Path) -> None:
        """Write to one safetensors file.

        Raises:
            OutputError: the system refuses.
        """
        described = {name: getattr(self, name) for name in ("tokens", "digest", "settings", "sources")}
        metadata = {FORMAT: json.dumps(described, sort_keys=True)}
        outputs.save(path, encode(name_by_layer(self.layers, _PARTS), metadata=metadata))

    @classmethod
    def load(cls, path: Path) -> Similarities:
        """Read what `save` wrote.

        Raises:
            DataError: it is something else, or damaged.
        """
        try:
            _, metadata = read_header(path)
            described = parse_json(metadata[FORMAT], origin="its description")
            tokens = as_count(described["tokens"], least=1)
            layers = {
                index: Similarity(tokens=tokens, **parts)
                for index, parts in split_by_layer(load_file(path), _PARTS).items()
            }
            for index, layer in layers.items():
                _require_consistent(index, layer)
            settings, sources = as_table(described["settings"]), tuple(map(as_table, as_list(described["sources"])))
            for value in (settings["dtype"], *(source["source"] for source in sources)):
                as_text(value)
            for name in ("max_length", "sample", "seed"):
                as_count(settings[name], least=-MAX_NUMBER)
            return cls(layers, tokens, as_text(described["digest"]), settings, sources)
        except (ReapkitError, KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{path} is damaged or does not hold the similarity of experts: {reason}",
                hint="remove it and repeat the command, which measures it again",
            ) from None


def _require_consistent(index: int, layer: Similarity) -> None:
    """Raise ValueError unless a layer's arrays have the shapes that they have together, and hold numbers."""
    (num_experts, hidden), sample = (*layer.output_ED.shape, 0, 0)[:2], (*layer.inputs_ND.shape, 0, 0)[:2]
    shapes = dict.fromkeys(("output_ED", "gated_ED"), (num_experts, hidden))
    shapes |= {"gram_EE": (num_experts, num_experts), "inputs_ND": sample}
    for name, shape in shapes.items():
        values, dtype = getattr(layer, name), np.float32 if name == "inputs_ND" else np.float64
        if values.shape != shape or values.dtype != dtype:
            raise ValueError(
                f"{name} of layer {index} is {values.dtype} {list(values.shape)}, not {np.dtype(dtype)} {list(shape)}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{name} of layer {index} holds a value that is not finite")


def settings_of(observation: Observation, *, tokens: int) -> dict[str, Any]:
    """What must agree for similarities to be those that `measure` would find."""
    return {**observation.settings, "seed": observation.seed, "sample": tokens, "source": asdict(observation.source)}


def differing(found: Similarities, observation: Observation, *, tokens: int) -> str | None:
    """What tells similarities from those that `measure` would find: the name of a setting, or the text."""
    wanted = settings_of(observation, tokens=tokens)
    names = sorted(wanted.keys() | found.settings.keys())
    if (what := next((name for name in names if found.settings.get(name) != wanted.get(name)), None)) is not None:
        return what
    return None if found.digest == observation.data.digest else "text"


def measure(observation: Observation, *, tokens: int = SAMPLE_TOKENS, progress: Progress = silent) -> Similarities:
    """Run every expert on a sample of the observation's text: whole documents, of every domain in turn, until it has so many tokens.

    Raises:
        UnsupportedError: a family whose experts cannot be run on tokens of others.
    """
    model, layout = observation.model, observation.layout
    if layout.architecture.runs_own_experts:
        raise UnsupportedError(
            f"the experts of {layout.architecture.name} run by code of their own, which takes no tokens of others: they cannot be merged",
            hint="pruning them works: reapkit plan, reapkit prune",
        )
    data = _sample(observation.data, tokens)
    parts = batches(data, tokens_per_batch=tokens_per_batch(model))
    waves = split_into_waves(
        parts,
        budget=observation.budget,
        bytes_per_token=bytes_per_token(model),
        max_batches=MAX_SUSPENDED,
    )
    decoder = [layer for layer in layout.layers if layer.index < layout.num_layers]
    sums = {layer.index: _LayerSums(observation, layer, data.num_tokens) for layer in decoder}
    total, done = data.num_tokens * len(model.layers), 0
    progress("similarity", 0, total, "tokens x layers")
    for wave in waves:

        def after_batch(layer: int, number: int, *, wave: Sequence[CalibrationBatch] = wave) -> None:
            nonlocal done
            done += int(wave[number].length_B.sum())
            progress("similarity", done, total, "tokens x layers")

        inputs, images = [batch.input_ids_BT for batch in wave], [batch.images for batch in wave]
        masks = [_Mask(torch.from_numpy(batch.mask_BT.reshape(-1)).to(model.device)) for batch in wave]
        with (
            _seen(model, sums),
            SuspendedForwards(
                model, inputs, images=images, observe=masks, place=observation.place, keep_outputs=False, with_mtp=False
            ) as forwards,
        ):
            forwards.run_layers(after_batch)
    assert all(layer.tokens == data.num_tokens for layer in sums.values())
    return Similarities(
        {index: layer.similarity() for index, layer in sums.items()},
        data.num_tokens,
        observation.data.digest,
        settings_of(observation, tokens=tokens),
        tuple(source.to_json() for source in observation.data.sources),
    )


def _sample(data: CalibrationData, tokens: int) -> CalibrationData:
    """Whole documents, one of every domain in turn, until there are so many tokens; all of them where there are fewer."""
    queues = [[document for document in data.documents if document.domain == domain] for domain in data.domains]
    chosen: list[Document] = []
    count = 0
    for place in range(max(map(len, queues))):
        for queue in queues:
            if place < len(queue) and count < tokens:
                chosen.append(queue[place])
                count += len(queue[place].input_ids)
    return replace(data, documents=tuple(chosen))


class _Mask:
    """What a micro-batch's forward carries: which of its tokens are no padding. As an observer of routed pairs it looks away."""

    def __init__(self, mask_N: Tensor) -> None:
        self.mask_N = mask_N

    def __call__(self, pairs: RoutedPairs) -> None:
        pass


class _LayerSums:
    """One layer's sums, on the model's device.

    Attributes:
        tokens: added so far.
        router_input_ND: what the layer's router was last given.
    """

    def __init__(self, observation: Observation, layer: MoELayer, total: int) -> None:
        model = observation.model
        self._num_experts, self._device = observation.layout.num_experts, model.device
        self._is_sigmoid = observation.layout.architecture.scoring.startswith("sigmoid")
        rows = {stacked.info.name: stacked for stacked in layer.stacked if stacked.role == "router"}
        read = {
            name: decode(model.checkpoint, stacked.info, format=model.format).float() for name, stacked in rows.items()
        }
        # Rows of experts, zero experts left out; a scale per expert is no part of the logits.
        self.router_name = next(name for name, values in read.items() if values.ndim == 2)
        self._router_ED = read[self.router_name][: self._num_experts].to(model.device)
        bias = next((values for name, values in read.items() if values.ndim == 1 and name.endswith("bias")), None)
        self._bias_E = None if bias is None else bias[: self._num_experts].to(model.device)
        self._stride = max(1, total // KEPT_INPUTS)
        self._output_ED: Tensor | None = None
        self._gram_EE = torch.zeros(self._num_experts, self._num_experts, dtype=torch.float64, device=model.device)
        self._inputs: list[Tensor] = []
        self.router_input_ND: Tensor | None = None
        self.tokens = 0

    def add(self, experts: Any, hidden_ND: Tensor, mask_N: Tensor) -> None:
        """Run all experts on the tokens that are no padding."""
        assert self.router_input_ND is not None
        hidden_ND = hidden_ND.reshape(len(mask_N), -1)[mask_N]
        logits_NE = self.router_input_ND.reshape(len(mask_N), -1)[mask_N].float() @ self._router_ED.T
        if self._bias_E is not None:
            logits_NE = logits_NE + self._bias_E
        score_NE = torch.sigmoid(logits_NE) if self._is_sigmoid else torch.softmax(logits_NE, dim=-1)
        logits_NE = logits_NE.double()
        self._gram_EE += logits_NE.T @ logits_NE
        ones = torch.ones(len(hidden_ND), 1, device=self._device, dtype=hidden_ND.dtype)
        for expert in range(self._num_experts):
            chosen = torch.full((len(hidden_ND), 1), expert, device=self._device)
            out_ND = experts(hidden_ND, chosen, ones).reshape(len(hidden_ND), -1).double()
            if self._output_ED is None:
                shape = (self._num_experts, out_ND.shape[1])
                self._output_ED = torch.zeros(shape, dtype=torch.float64, device=self._device)
                self._gated_ED = torch.zeros_like(self._output_ED)
            self._output_ED[expert] += out_ND.sum(0)
            self._gated_ED[expert] += score_NE[:, expert].double() @ out_ND
        first = -self.tokens % self._stride
        self._inputs.append(hidden_ND[first :: self._stride].float().cpu())
        self.tokens += len(hidden_ND)

    def similarity(self) -> Similarity:
        assert self._output_ED is not None
        return Similarity(
            tokens=self.tokens,
            output_ED=(self._output_ED / self.tokens).cpu().numpy(),
            gated_ED=(self._gated_ED / self.tokens).cpu().numpy(),
            gram_EE=self._gram_EE.cpu().numpy(),
            inputs_ND=torch.cat(self._inputs).numpy(),
        )


@contextmanager
def _seen(model: StreamedModel, sums: Mapping[int, _LayerSums]) -> Iterator[None]:
    """Show every layer's sums what its router and its experts are given."""
    hooks = []
    for index, layer_sums in sums.items():
        experts, router = experts_of(model.layers[index]), model.owner_of(layer_sums.router_name)
        assert experts is not None and router is not None
        hooks.append(router.register_forward_pre_hook(partial(_see_router, layer_sums)))
        hooks.append(experts.register_forward_pre_hook(partial(_see_experts, layer_sums), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _see_router(sums: _LayerSums, module: nn.Module, args: tuple[Any, ...]) -> None:
    if args:
        sums.router_input_ND = args[0]


def _see_experts(sums: _LayerSums, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not isinstance(running.observe, _Mask):  # one of our own calls
        return
    mask, running.observe = running.observe, None
    try:
        sums.add(module, next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), mask.mask_N)
    finally:
        running.observe = mask
