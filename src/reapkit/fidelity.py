"""How far a pruned model is from its parent, without a benchmark: both are streamed side by side, layer by layer, over held-out text.

Standard errors count samples as independent, not tokens, nor the windows of one sample.

What is measured of a token's routing in a layer, in the original's numbering of experts: O are the experts that the original chose, P those
that the pruned model chose, K those that were kept. Where O has a dropped expert the routing cannot stay; `routed_to_dropped` is the share
of such tokens, and it is what pruning itself does. A router chooses the best of K, so the pruned model would choose all of O and K if its
hidden states were the original's; `routing_changed` is the share of tokens for which it leaves one of them out, and it is drift.

Shape suffixes: B = documents, D = samples, T = tokens, N = predicted tokens laid end to end, V = vocabulary, M = the measures of a token,
L = layers, R = the measures of a token in a layer, K = experts per token, E = experts of the original.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reapkit import layout as layouts
from reapkit.architectures import ARCHITECTURES
from reapkit.behaviour import Behaviour
from reapkit.calibration import CalibrationBatch, CalibrationData, batches, load
from reapkit.checkpoint import FIDELITY_NAME, MANIFEST_NAME, Checkpoint
from reapkit.errors import CheckpointError, DataError, UsageError, did_you_mean
from reapkit.experts import RoutedObserver, RoutedPairs
from reapkit.figures import Figure, ratio
from reapkit.layout import MoELayout
from reapkit.modules import StreamedModel, SuspendedForwards, load_tokenizer
from reapkit.observation import (
    MAX_SUSPENDED,
    Run,
    bytes_per_token,
    default_budget,
    require_embeddings,
    split_into_waves,
)
from reapkit.outputs import save
from reapkit.progress import Progress, silent

FORMAT = "reapkit-fidelity-1"

# Logits of one micro-batch of both models, in float32, are held at once: this bounds them at 2 x 1 GB.
LOGITS_BYTES = 1 << 30
# Tokens whose log-probabilities are formed at once.
CHUNK_TOKENS = 1024

# A perplexity is given as at most e^100: a model so sure and so wrong is useless at any higher one, and e^710 is no number.
MAX_NLL = 100.0

# Likeliest tokens whose agreement is `top5`.
NUM_LIKELIEST = 5

MEASURES = ("kl", "top1", "top5", "nll_original", "nll_pruned")
LAYER_MEASURES = ("output_error", "routed_to_dropped", "routing_changed")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LayerFidelity:
    """Fidelity of one decoder layer.

    Attributes:
        layer: its number.
        output_error: mean over tokens of ‖pruned - original‖ / ‖original‖, of what leaves the layer.
        routed_to_dropped: share of tokens for which the original chose an expert that was dropped; None for a layer without experts, and
            where it is not known which experts were kept.
        routing_changed: share of tokens for which the original chose a kept expert and the pruned model did not; likewise.
    """

    layer: int
    output_error: Figure
    routed_to_dropped: Figure | None
    routing_changed: Figure | None

    def to_json(self) -> dict[str, Any]:
        return {"layer": self.layer, **_json_of(self, LAYER_MEASURES)}


@dataclass(frozen=True)
class DomainFidelity:
    """Fidelity on one domain's text, or on all of it.

    Attributes:
        tokens, samples: predicted tokens and the samples they stand in.
        kl: KL(original ‖ pruned) in nats per token.
        top1: share of tokens on which both models' likeliest next token is the same.
        top5: share of the original's five likeliest next tokens that are among the pruned model's five likeliest.
        perplexity_original, perplexity_pruned: exp of the mean negative log-likelihood per token.
        output_error: of the last layer.
        error_growth: factor by which the output error grows per layer: exp of the least-squares slope of its logarithm over the layers
            where it is not zero; None where fewer than two have an error.
        routed_to_dropped, routing_changed: over all layers with experts; None as in `LayerFidelity`.
        layers: by layer.
    """

    tokens: int
    samples: int
    kl: Figure
    top1: Figure
    top5: Figure
    perplexity_original: Figure
    perplexity_pruned: Figure
    output_error: Figure
    error_growth: Figure | None
    routed_to_dropped: Figure | None
    routing_changed: Figure | None
    layers: tuple[LayerFidelity, ...]

    def to_json(self) -> dict[str, Any]:
        names = ("kl", "top1", "top5", "perplexity_original", "perplexity_pruned", "output_error", "error_growth",
                 "routed_to_dropped", "routing_changed")  # fmt: skip
        layers = [layer.to_json() for layer in self.layers]
        return {"tokens": self.tokens, "samples": self.samples, **_json_of(self, names), "layers": layers}


def _json_of(part: LayerFidelity | DomainFidelity, names: Sequence[str]) -> dict[str, dict[str, float | None] | None]:
    figures: dict[str, Figure | None] = {name: getattr(part, name) for name in names}
    return {name: None if figure is None else figure.to_json() for name, figure in figures.items()}


@dataclass(frozen=True)
class Fidelity:
    """The comparison of two checkpoints.

    Attributes:
        original, pruned: how they were named.
        digest: of the text's tokens.
        sources: what was read.
        settings: dtype, maximum length, seed.
        overall: all text together, every token counting the same.
        domains: by name.
        notes: what could not be measured, and why.
        behaviour: of both models on prompts, where there were any.
    """

    original: str
    pruned: str
    digest: str
    sources: tuple[Mapping[str, Any], ...]
    settings: dict[str, Any]
    overall: DomainFidelity
    domains: dict[str, DomainFidelity]
    notes: tuple[str, ...] = ()
    behaviour: Behaviour | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "original": self.original,
            "pruned": self.pruned,
            "data": {"digest": self.digest, "sources": list(self.sources), **self.settings},
            "overall": self.overall.to_json(),
            "domains": {name: domain.to_json() for name, domain in self.domains.items()},
            "behaviour": None if self.behaviour is None else self.behaviour.to_json(),
            "notes": [*self.notes, *(() if self.behaviour is None else self.behaviour.notes)],
        }


def compare(
    original: str | Path,
    pruned: str | Path,
    data: Sequence[str],
    *,
    run: Run | None = None,
    max_length: int = 2048,
    seed: int = 0,
    progress: Progress = silent,
) -> Fidelity:
    """Compare two checkpoints with one vocabulary on the same text; neither is ever whole in memory.

    Args:
        original, pruned: folders or hub ids.
        data: `--data` arguments, tokenised once by the original's tokenizer.
        run: device, dtype and memory.
        max_length: tokens per document; longer samples are split into windows.
        seed: of the choice of samples.
        progress: told how far it is.

    Raises:
        CheckpointError: the vocabularies, the numbers of layers or their widths differ.
        UsageError: no text has two tokens.
    """
    run = run or Run()
    device, dtype = run.resolve()
    models = []
    for source in (original, pruned):
        checkpoint = Checkpoint.open(source, progress=progress)
        layout = layouts.resolve(checkpoint, ARCHITECTURES)
        models.append(
            StreamedModel(checkpoint, layout, device=device, dtype=dtype, trust_remote_code=run.trust_remote_code)
        )
    if models[0].vocab_size != models[1].vocab_size:
        raise CheckpointError(f"{original} has {models[0].vocab_size} tokens in its vocabulary and {pruned} has {models[1].vocab_size}: "
                              "their predictions cannot be compared")  # fmt: skip
    sizes = [f"{len(model.layers)} layers of hidden size {model.hidden_size}" for model in models]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{original} has {sizes[0]} and {pruned} has {sizes[1]}: they cannot be compared layer by layer"
        )
    tokenizer = load_tokenizer(models[0].checkpoint, trust_remote_code=run.trust_remote_code)
    text = load(data, tokenizer, max_length=max_length, seed=seed)
    require_embeddings(text, models[0])
    kept = kept_experts(*((model.checkpoint, model.layout) for model in models))
    sums = _measure(models, text, kept, budget=run.activation_budget, progress=progress)
    if not sums.tokens_D.any():
        raise UsageError("no document of the data has two tokens, so there is nothing to predict")

    notes = [] if kept is not None else [
        "which experts were kept cannot be told from the routers, whose rows are not the original's: routing is not compared"
    ]  # fmt: skip
    names = {i: name for i, name in enumerate(text.domains) if sums.tokens_D[sums.domain_D == i].any()}
    return Fidelity(
        original=str(original),
        pruned=str(pruned),
        digest=text.digest,
        sources=tuple(source.to_json() for source in text.sources),
        settings={"max_length": max_length, "seed": seed, "dtype": str(dtype).removeprefix("torch.")},
        overall=_summarize(sums),
        domains={name: _summarize(sums.of_domain(i)) for i, name in names.items()},
        notes=tuple(notes),
    )


def greedy_gaps(
    checkpoint: Checkpoint,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    run: Run | None = None,
    progress: Progress = silent,
) -> list[list[float]]:
    """By how many nats each token of a continuation is less likely than the model's own choice there; 0 where it is that choice.

    One streamed pass over prompts and continuations, so that each token is judged given the tokens that were before it.

    Args:
        checkpoint: the model.
        pairs: a prompt's token ids and those of a continuation, neither empty.
        run: device, dtype and memory.
        progress: told how far it is.
    """
    run = run or Run()
    device, dtype = run.resolve()
    layout = layouts.resolve(checkpoint, ARCHITECTURES)
    model = StreamedModel(checkpoint, layout, device=device, dtype=dtype, trust_remote_code=run.trust_remote_code)
    inputs = [np.asarray([[*prompt, *continuation]], dtype=np.int64) for prompt, continuation in pairs]
    total, done = len(inputs) * len(model.layers), 0

    def after_batch(layer: int, number: int) -> None:
        nonlocal done
        done += 1
        progress("reference", done, total, "documents x layers")

    result = []
    with SuspendedForwards(model, inputs) as forwards:
        forwards.run_layers(after_batch)
        for (prompt, continuation), logits_BTV in zip(pairs, forwards.logits(), strict=True):
            first = len(prompt) - 1  # whose logits predict the first token of the continuation
            logp_NV = torch.log_softmax(logits_BTV[0, first : first + len(continuation)].float(), -1)
            chosen_N = torch.tensor(continuation, device=logp_NV.device)
            gap_N = logp_NV.max(-1).values - logp_NV.gather(1, chosen_N[:, None])[:, 0]
            result.append([float(gap) for gap in gap_N])
    return result


def kept_experts(
    original: tuple[Checkpoint, MoELayout], pruned: tuple[Checkpoint, MoELayout]
) -> dict[int, tuple[int, ...]] | None:
    """By layer, the original's number of every expert of a pruned checkpoint, whoever pruned it.

    A router has a row per expert, and pruning takes rows out: rows are found again by their bytes. As many experts as before are taken
    for the same ones, in a model quantised or trained afterwards.

    Returns:
        None where a row is not the original's, or the layers with experts are others.
    """
    layers = {layer.index: layer for layer in original[1].layers if layer.index < original[1].num_layers}
    others = {layer.index: layer for layer in pruned[1].layers if layer.index < pruned[1].num_layers}
    if layers.keys() != others.keys():
        return None
    if original[1].num_experts == pruned[1].num_experts:
        return {index: tuple(range(original[1].num_experts)) for index in layers}
    kept = {}
    for index in layers:
        places: dict[bytes, list[int]] = {}
        for expert, row in enumerate(_router_rows(*original, index)):
            places.setdefault(row, []).append(expert)
        try:
            # Equal rows belong to the same experts in their order.
            kept[index] = tuple(places[row].pop(0) for row in _router_rows(*pruned, index))
        except (KeyError, IndexError):
            return None
    return kept


def _router_rows(checkpoint: Checkpoint, layout: MoELayout, index: int) -> list[bytes]:
    """The bytes of a layer's router by expert."""
    [layer] = [layer for layer in layout.layers if layer.index == index]
    rows = [b""] * layout.num_experts
    for stacked in layer.stacked:
        if stacked.role == "router":
            # Values are not needed, only which bytes belong together.
            size = stacked.info.nbytes // math.prod(stacked.info.shape)
            array = np.frombuffer(checkpoint.read(stacked.info), dtype=np.uint8).reshape(*stacked.info.shape, size)
            by_entry = np.moveaxis(array, stacked.axis, 0).reshape(stacked.num_entries, -1)
            rows = [row + by_entry[expert].tobytes() for expert, row in enumerate(rows)]
    return rows


@dataclass(frozen=True)
class _Sums:
    """Sums over every sample's predicted tokens.

    Attributes:
        token_DM, layer_DLR: of the measures of a token, and of those of a token in a layer.
        tokens_D, domain_D: how many tokens, and of which domain.
        routed_L: the layers whose routing was compared.
    """

    token_DM: Array
    layer_DLR: Array
    tokens_D: Array
    domain_D: Array
    routed_L: Array

    def of_domain(self, number: int) -> _Sums:
        chosen = self.domain_D == number
        return _Sums(
            self.token_DM[chosen], self.layer_DLR[chosen], self.tokens_D[chosen], self.domain_D[chosen], self.routed_L
        )


def _measure(
    models: Sequence[StreamedModel],
    text: CalibrationData,
    kept: Mapping[int, Sequence[int]] | None,
    *,
    budget: int | None,
    progress: Progress,
) -> _Sums:
    first = models[0]
    per_batch = max(1, LOGITS_BYTES // (4 * first.vocab_size))
    parts = batches(text, tokens_per_batch=min(per_batch, 8192))
    waves = split_into_waves(
        parts,
        budget=budget or default_budget(*models),
        bytes_per_token=sum(map(bytes_per_token, models)),
        max_batches=MAX_SUSPENDED // 2,
    )
    num_layers = len(first.layers)
    total = text.num_tokens * num_layers
    done = 0
    progress("compare", 0, total, "tokens x layers")
    rows: list[tuple[Array, Array]] = []
    for wave in waves:
        inputs = [batch.input_ids_BT for batch in wave]
        layer_rows = [np.zeros((len(batch.length_B), num_layers, len(LAYER_MEASURES))) for batch in wave]
        routings = [
            _Routing(batch.input_ids_BT.shape, kept or {}, first.layout.num_experts, first.device) for batch in wave
        ]
        observers: list[list[RoutedObserver]] = [
            [part.see_original for part in routings],
            [part.see_pruned for part in routings],
        ]
        with (
            SuspendedForwards(models[0], inputs, observe=observers[0], with_mtp=False, with_outputs=True) as ours,
            SuspendedForwards(models[1], inputs, observe=observers[1], with_mtp=False, with_outputs=True) as theirs,
            closing(ours.steps()) as our_steps,
            closing(theirs.steps()) as their_steps,
        ):
            for (layer, number), _ in zip(our_steps, their_steps, strict=True):
                batch = wave[number]
                values_BTR = torch.stack(
                    (_output_error(ours.output(number), theirs.output(number)), *routings[number].take(layer)), dim=-1
                )
                is_predicting_BT = np.arange(batch.input_ids_BT.shape[1]) < batch.length_B[:, None] - 1
                chosen_BT1 = torch.from_numpy(is_predicting_BT[..., None]).to(first.device)
                sums_BR = torch.where(chosen_BT1, values_BTR, 0.0).sum(1, dtype=torch.float64)
                layer_rows[number][:, layer] = sums_BR.cpu().numpy()
                done += int(batch.length_B.sum())
                progress("compare", done, total, "tokens x layers")
            original, pruned = ours.logits(), theirs.logits()
            for batch, layers_BLR in zip(wave, layer_rows, strict=True):
                # Not named, so that they are freed before the next ones are computed.
                sums_BM = _document_sums(batch, next(original), next(pruned))
                _require_finite(sums_BM, models)
                rows.append((sums_BM, layers_BLR))
    index_B, tokens_B, domain_B = (
        np.concatenate(columns)
        for columns in zip(*((b.index_B, b.length_B - 1, b.domain_B) for wave in waves for b in wave), strict=True)
    )
    token_BM, layer_BLR = (np.concatenate(columns) for columns in zip(*rows, strict=True))
    _, first_D, sample_B = np.unique(index_B, return_index=True, return_inverse=True)
    return _Sums(
        token_DM=_by_sample(sample_B, token_BM),
        layer_DLR=_by_sample(sample_B, layer_BLR),
        tokens_D=_by_sample(sample_B, tokens_B),
        domain_D=domain_B[first_D],
        routed_L=np.array([kept is not None and layer in kept for layer in range(num_layers)]),
    )


def _by_sample(sample_B: Array, values_B: Array) -> Array:
    """Add up the windows of every sample."""
    sums_D = np.zeros((sample_B.max() + 1, *values_B.shape[1:]), dtype=values_B.dtype)
    np.add.at(sums_D, sample_B, values_B)
    return sums_D


def _output_error(original_BT: Tensor, pruned_BT: Tensor) -> Tensor:
    """‖pruned - original‖ / ‖original‖ of every token, float64 [B, T]; 0 where both are zero."""
    original_BTX, pruned_BTX = original_BT.flatten(2).double(), pruned_BT.flatten(2).double()
    norm_BT = torch.linalg.vector_norm(original_BTX, dim=-1)
    error_BT = torch.linalg.vector_norm(pruned_BTX - original_BTX, dim=-1)
    return torch.where(error_BT == 0, 0.0, error_BT / norm_BT)


class _Routing:
    """Which experts both models choose for the tokens of one micro-batch, in the original's numbering.

    Args:
        shape: of the micro-batch, (B, T).
        kept: by layer, the original's numbers of the pruned model's experts; other layers are not compared.
        num_experts: of the original.
        device: where the models run.
    """

    def __init__(
        self, shape: tuple[int, ...], kept: Mapping[int, Sequence[int]], num_experts: int, device: torch.device
    ) -> None:
        self._shape = shape
        self._kept = {layer: torch.tensor(experts, device=device) for layer, experts in kept.items()}
        self._num_experts = num_experts
        self._device = device
        self._original: Tensor | None = None
        self._pruned: Tensor | None = None

    def see_original(self, pairs: RoutedPairs) -> None:
        if pairs.layer in self._kept:
            self._original = self._chosen(pairs.token_P, pairs.expert_P)

    def see_pruned(self, pairs: RoutedPairs) -> None:
        if pairs.layer in self._kept:
            self._pruned = self._chosen(pairs.token_P, self._kept[pairs.layer][pairs.expert_P])

    def _chosen(self, token_P: Tensor, expert_P: Tensor) -> Tensor:
        chosen_NE = torch.zeros(math.prod(self._shape), self._num_experts, dtype=torch.bool, device=self._device)
        chosen_NE[token_P, expert_P] = True
        return chosen_NE

    def take(self, layer: int) -> tuple[Tensor, Tensor]:
        """Whether the original chose a dropped expert, and a kept one that the pruned model did not: float64 [B, T] each."""
        original_NE, pruned_NE = self._original, self._pruned
        self._original = self._pruned = None
        if original_NE is None or pruned_NE is None:
            nothing_BT = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
            return nothing_BT, nothing_BT
        is_kept_E = torch.zeros(self._num_experts, dtype=torch.bool, device=self._device)
        is_kept_E[self._kept[layer]] = True
        dropped_N = (original_NE & ~is_kept_E).any(1)
        changed_N = (original_NE & is_kept_E & ~pruned_NE).any(1)
        return dropped_N.view(self._shape).double(), changed_N.view(self._shape).double()


def _require_finite(sums_BM: Array, models: Sequence[StreamedModel]) -> None:
    for model, name in zip(models, ("nll_original", "nll_pruned"), strict=True):
        if not np.isfinite(sums_BM[:, MEASURES.index(name)]).all():
            raise DataError(
                f"{model.checkpoint.origin} predicts NaN or infinities in {str(model.dtype).removeprefix('torch.')}",
                hint="try --dtype float32; if it stays, the checkpoint's weights are damaged",
            )
    if not np.isfinite(sums_BM).all():
        raise DataError(f"{models[1].checkpoint.origin} gives no probability to a token that the original expects")


def _document_sums(batch: CalibrationBatch, original_BTV: Tensor, pruned_BTV: Tensor) -> Array:
    """Sums over each document's predicted tokens, float64 [B, M]."""
    result = np.zeros((len(batch.length_B), len(MEASURES)))
    ids_BT = torch.from_numpy(batch.input_ids_BT).to(original_BTV.device)
    for document, length in enumerate(batch.length_B):
        for start, stop in _chunks(int(length) - 1):
            target_N = ids_BT[document, start + 1 : stop + 1]
            measures_NM = _token_measures(
                original_BTV[document, start:stop], pruned_BTV[document, start:stop], target_N
            )
            result[document] += measures_NM.sum(0).cpu().numpy()
    return result


def _chunks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, CHUNK_TOKENS):
        yield start, min(start + CHUNK_TOKENS, length)


def _token_measures(original_NV: Tensor, pruned_NV: Tensor, target_N: Tensor) -> Tensor:
    """KL(original ‖ pruned), agreement of the likeliest tokens, one and five, and both negative log-likelihoods: float64 [N, M]."""
    p_NV = torch.log_softmax(original_NV.float(), -1)
    q_NV = torch.log_softmax(pruned_NV.float(), -1)
    kl_N = (p_NV.exp() * (p_NV - q_NV)).sum(-1, dtype=torch.float64)
    same_N = (p_NV.argmax(-1) == q_NV.argmax(-1)).double()
    number = min(NUM_LIKELIEST, p_NV.shape[-1])
    ours_NK, theirs_NK = p_NV.topk(number, dim=-1).indices, q_NV.topk(number, dim=-1).indices
    shared_N = (ours_NK[:, :, None] == theirs_NK[:, None, :]).sum((1, 2)) / number
    nll_p_N = -p_NV.gather(1, target_N[:, None])[:, 0].double()
    nll_q_N = -q_NV.gather(1, target_N[:, None])[:, 0].double()
    return torch.stack((kl_N, same_N, shared_N.double(), nll_p_N, nll_q_N), dim=1)


def _summarize(sums: _Sums) -> DomainFidelity:
    has_tokens_D = sums.tokens_D > 0
    token_DM, layer_DLR, tokens_D = (
        sums.token_DM[has_tokens_D],
        sums.layer_DLR[has_tokens_D],
        sums.tokens_D[has_tokens_D],
    )
    kl, top1, top5, nll_original, nll_pruned = (ratio(token_DM[:, m], tokens_D) for m in range(len(MEASURES)))
    layers = []
    for layer, is_routed in enumerate(sums.routed_L):
        error, dropped, changed = (ratio(layer_DLR[:, layer, r], tokens_D) for r in range(len(LAYER_MEASURES)))
        layers.append(LayerFidelity(layer, error, dropped if is_routed else None, changed if is_routed else None))
    # A sample's share over several layers is the mean of its shares in them.
    routed = (
        [ratio(layer_DLR[:, sums.routed_L, r].mean(1), tokens_D) for r in (1, 2)]
        if sums.routed_L.any()
        else [None, None]
    )
    return DomainFidelity(
        tokens=int(tokens_D.sum()),
        samples=len(tokens_D),
        kl=kl,
        top1=top1,
        top5=top5,
        perplexity_original=_perplexity(nll_original),
        perplexity_pruned=_perplexity(nll_pruned),
        output_error=layers[-1].output_error,
        error_growth=error_growth(layer_DLR[:, :, 0]),
        routed_to_dropped=routed[0],
        routing_changed=routed[1],
        layers=tuple(layers),
    )


def error_growth(error_DL: Array) -> Figure | None:
    """Factor per layer by which an error grows, from its sums by sample and layer, with the jackknife's standard error over samples.

    value g = exp of the least-squares slope of ln(sum_D error) over layers;
    standard error = sqrt((D - 1) / D * sum_D (g without D - mean of these)^2).
    """
    total_L = error_DL.sum(0)
    layer_L = np.flatnonzero(total_L > 0)
    if len(layer_L) < 2:
        return None
    centred_L = layer_L - layer_L.mean()

    def growth(sums_L: Array) -> float:
        slope = centred_L @ np.log(sums_L[layer_L]) / (centred_L @ centred_L)
        return math.exp(slope)

    value, count = growth(total_L), len(error_DL)
    left_DL = total_L - error_DL
    # Where one sample has all of a layer's error, the others say nothing of the growth.
    if count < 2 or not (left_DL[:, layer_L] > 0).all():
        return Figure(value, None)
    without_D = np.array([growth(sums_L) for sums_L in left_DL])
    return Figure(value, math.sqrt((count - 1) / count * np.square(without_D - without_D.mean()).sum()))


def _perplexity(nll: Figure) -> Figure:
    value = math.exp(min(nll.value, MAX_NLL))
    return Figure(value, None if nll.standard_error is None else value * nll.standard_error)


def keep(fidelity: Fidelity, pruned: str | Path) -> Path | None:
    """Write a comparison into the folder that reapkit pruned, for `report`; None for any other checkpoint."""
    folder = Path(pruned)
    if not (folder / MANIFEST_NAME).is_file():
        return None
    path = folder / FIDELITY_NAME
    described = {"format": FORMAT, **fidelity.to_json()}
    save(path, (json.dumps(described, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return path


@dataclass(frozen=True)
class Threshold:
    """What `--fail-on NAME=X` holds against X.

    Attributes:
        place: keys in the comparison's JSON.
        what: the figure in words.
        is_upper: whether X is the most that passes, and not the least.
        unit: behind the number.
    """

    place: tuple[str, ...]
    what: str
    is_upper: bool
    unit: str = ""


THRESHOLDS: Mapping[str, Threshold] = {
    "kl": Threshold(("overall", "kl"), "kl", True, " nats/token"),
    "top1": Threshold(("overall", "top1"), "top-1 agreement", False),
    "top5": Threshold(("overall", "top5"), "top-5 agreement", False),
    "perplexity": Threshold(("overall", "perplexity_pruned"), "perplexity of the pruned model", True),
    "error": Threshold(("overall", "output_error"), "relative output error of the last layer", True),
    "routing": Threshold(("overall", "routing_changed"), "share of tokens with changed routing", True),
    "loops": Threshold(("behaviour", "loops", "pruned"), "loop rate", True),
    "unfinished": Threshold(("behaviour", "unfinished", "pruned"), "rate of unfinished replies", True),
    "length": Threshold(("behaviour", "length_ratio"), "length ratio", True),
    "calls": Threshold(("behaviour", "valid_calls", "pruned"), "share of valid tool calls", False),
    "arguments": Threshold(("behaviour", "exact_calls", "pruned"), "share of exact tool calls", False),
    "answers": Threshold(("behaviour", "same_answers"), "agreement of final answers", False),
}


def parse_thresholds(text: str, *, with_prompts: bool = True) -> dict[str, float]:
    """The limits in `kl=0.1,top1=0.9`, by names of `THRESHOLDS`.

    Raises:
        UsageError: an unknown measure, a value that is not a number, or a measure of replies without prompts.
    """
    limits = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in THRESHOLDS:
            raise UsageError(f"--fail-on has no measure {name!r}", hint=did_you_mean(name, THRESHOLDS))
        if THRESHOLDS[name].place[0] == "behaviour" and not with_prompts:
            raise UsageError(f"--fail-on {name} is measured on replies", hint="name prompts: --prompts FILE")
        try:
            limits[name] = float(value)
        except ValueError:
            raise UsageError(
                f"--fail-on {part!r} has no number", hint="for example --fail-on kl=0.1,top1=0.9"
            ) from None
    return limits


def failed_thresholds(fidelity: Fidelity, limits: Mapping[str, float]) -> list[str]:
    """A sentence for every limit that the comparison fails; a figure that could not be measured fails."""
    described, failed = fidelity.to_json(), []
    for name, limit in limits.items():
        threshold = THRESHOLDS[name]
        figure: Any = described
        for key in threshold.place:
            figure = None if figure is None else figure[key]
        if figure is None:
            failed.append(f"{threshold.what} was not measured, and {limit} was demanded")
        elif not (figure["value"] <= limit if threshold.is_upper else figure["value"] >= limit):
            relation = "more" if threshold.is_upper else "less"
            failed.append(f"{threshold.what} {figure['value']:.4f}{threshold.unit} is {relation} than {limit}")
    return failed
