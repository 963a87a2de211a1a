"""How far a pruned model is from its parent, without a benchmark: both are streamed layer by layer over the same held-out text.

Standard errors count samples as independent, not tokens, nor the windows of one sample.

Shape suffixes: B = documents, D = samples, T = tokens, N = predicted tokens laid end to end, V = vocabulary, M = the four measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reapkit import layout as layouts
from reapkit.architectures import ARCHITECTURES
from reapkit.calibration import CalibrationBatch, CalibrationData, batches, load
from reapkit.checkpoint import Checkpoint
from reapkit.errors import CheckpointError, DataError, UsageError, did_you_mean
from reapkit.modules import StreamedModel, SuspendedForwards, load_tokenizer
from reapkit.observation import (
    Run,
    bytes_per_token,
    default_budget,
    max_suspended,
    require_embeddings,
    split_into_waves,
)
from reapkit.progress import Progress, silent

# Logits of one micro-batch of both models, in float32, are held at once: this bounds them at 2 x 1 GB.
LOGITS_BYTES = 1 << 30
# Tokens whose log-probabilities are formed at once.
CHUNK_TOKENS = 1024

# A perplexity is given as at most e^100: a model so sure and so wrong is useless at any higher one, and e^710 is no number.
MAX_NLL = 100.0

MEASURES = ("kl", "top1", "nll_original", "nll_pruned")


@dataclass(frozen=True)
class Figure:
    """A measured value and its standard error (None where one sample leaves no spread to see)."""

    value: float
    standard_error: float | None

    def to_json(self) -> dict[str, float | None]:
        return {"value": self.value, "standard_error": self.standard_error}


@dataclass(frozen=True)
class DomainFidelity:
    """Fidelity on one domain's text, or on all of it.

    Attributes:
        tokens, samples: predicted tokens and the samples they stand in.
        kl: KL(original ‖ pruned) in nats per token.
        top1: share of tokens on which both models' likeliest next token is the same.
        perplexity_original, perplexity_pruned: exp of the mean negative log-likelihood per token.
    """

    tokens: int
    samples: int
    kl: Figure
    top1: Figure
    perplexity_original: Figure
    perplexity_pruned: Figure

    def to_json(self) -> dict[str, Any]:
        figures = {name: getattr(self, name).to_json() for name in
                   ("kl", "top1", "perplexity_original", "perplexity_pruned")}  # fmt: skip
        return {"tokens": self.tokens, "samples": self.samples, **figures}


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
    """

    original: str
    pruned: str
    digest: str
    sources: tuple[Mapping[str, Any], ...]
    settings: dict[str, Any]
    overall: DomainFidelity
    domains: dict[str, DomainFidelity]

    def to_json(self) -> dict[str, Any]:
        return {
            "original": self.original,
            "pruned": self.pruned,
            "data": {"digest": self.digest, "sources": list(self.sources), **self.settings},
            "overall": self.overall.to_json(),
            "domains": {name: domain.to_json() for name, domain in self.domains.items()},
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
        CheckpointError: the vocabularies differ.
        UsageError: no text has two tokens.
    """
    run = run or Run()
    device, dtype = run.resolve()
    models = []
    for source in (original, pruned):
        checkpoint = Checkpoint.open(source)
        layout = layouts.resolve(checkpoint, ARCHITECTURES)
        models.append(
            StreamedModel(checkpoint, layout, device=device, dtype=dtype, trust_remote_code=run.trust_remote_code)
        )
    if models[0].vocab_size != models[1].vocab_size:
        raise CheckpointError(f"{original} has {models[0].vocab_size} tokens in its vocabulary and {pruned} has {models[1].vocab_size}: "
                              "their predictions cannot be compared")  # fmt: skip
    tokenizer = load_tokenizer(models[0].checkpoint, trust_remote_code=run.trust_remote_code)
    text = load(data, tokenizer, max_length=max_length, seed=seed)
    require_embeddings(text, models[0])
    sums_DM, tokens_D, domain_D = _measure(models, text, budget=run.activation_budget, progress=progress)
    if not tokens_D.any():
        raise UsageError("no document of the data has two tokens, so there is nothing to predict")

    everything = np.ones(len(domain_D), dtype=bool)
    domains = {
        name: _summarize(sums_DM, tokens_D, domain_D == i)
        for i, name in enumerate(text.domains)
        if tokens_D[domain_D == i].any()
    }
    return Fidelity(
        original=str(original),
        pruned=str(pruned),
        digest=text.digest,
        sources=tuple(source.to_json() for source in text.sources),
        settings={"max_length": max_length, "seed": seed, "dtype": str(dtype).removeprefix("torch.")},
        overall=_summarize(sums_DM, tokens_D, everything),
        domains=domains,
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


def _measure(
    models: Sequence[StreamedModel], text: CalibrationData, *, budget: int | None, progress: Progress
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sums per sample of the four measures [D, M], predicted tokens [D] and domains [D]."""
    first = models[0]
    per_batch = max(1, LOGITS_BYTES // (4 * first.vocab_size))
    parts = batches(text, tokens_per_batch=min(per_batch, 8192))
    # Both models' activations are held at the same time.
    waves = split_into_waves(
        parts,
        budget=budget or default_budget(first),
        bytes_per_token=sum(map(bytes_per_token, models)),
        max_batches=max(1, max_suspended(first.device) // 2),
    )
    total = text.num_tokens * sum(len(model.layers) for model in models)
    done = 0
    progress("compare", 0, total, "tokens x layers")
    sums, tokens, domains, samples = [], [], [], []
    for wave in waves:
        inputs = [batch.input_ids_BT for batch in wave]

        def after_batch(layer: int, number: int, *, wave: Sequence[CalibrationBatch] = wave) -> None:
            nonlocal done
            done += int(wave[number].length_B.sum())
            progress("compare", done, total, "tokens x layers")

        with SuspendedForwards(models[0], inputs) as ours, SuspendedForwards(models[1], inputs) as theirs:
            ours.run_layers(after_batch)
            theirs.run_layers(after_batch)
            original, pruned = ours.logits(), theirs.logits()
            for batch in wave:
                # Not named, so that they are freed before the next ones are computed.
                sums_BM = _document_sums(batch, next(original), next(pruned))
                _require_finite(sums_BM, models)
                sums.append(sums_BM)
                tokens.append(batch.length_B - 1)
                domains.append(batch.domain_B)
                samples.append(batch.index_B)
    return _by_sample(np.concatenate(samples), np.concatenate(sums), np.concatenate(tokens), np.concatenate(domains))


def _by_sample(
    index_B: np.ndarray[Any, Any],
    sums_BM: np.ndarray[Any, Any],
    tokens_B: np.ndarray[Any, Any],
    domain_B: np.ndarray[Any, Any],
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Add up the windows of every sample."""
    _, first_D, sample_B = np.unique(index_B, return_index=True, return_inverse=True)
    sums_DM = np.zeros((len(first_D), sums_BM.shape[1]))
    np.add.at(sums_DM, sample_B, sums_BM)
    return sums_DM, np.bincount(sample_B, weights=tokens_B).astype(np.int64), domain_B[first_D]


def _require_finite(sums_BM: np.ndarray[Any, Any], models: Sequence[StreamedModel]) -> None:
    for model, name in zip(models, ("nll_original", "nll_pruned"), strict=True):
        if not np.isfinite(sums_BM[:, MEASURES.index(name)]).all():
            raise DataError(
                f"{model.checkpoint.origin} predicts NaN or infinities in {str(model.dtype).removeprefix('torch.')}",
                hint="try --dtype float32; if it stays, the checkpoint's weights are damaged",
            )
    if not np.isfinite(sums_BM).all():
        raise DataError(f"{models[1].checkpoint.origin} gives no probability to a token that the original expects")


def _document_sums(batch: CalibrationBatch, original_BTV: Tensor, pruned_BTV: Tensor) -> np.ndarray[Any, Any]:
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
    """KL(original ‖ pruned), agreement of the likeliest token, and both negative log-likelihoods: float64 [N, M]."""
    p_NV = torch.log_softmax(original_NV.float(), -1)
    q_NV = torch.log_softmax(pruned_NV.float(), -1)
    kl_N = (p_NV.exp() * (p_NV - q_NV)).sum(-1, dtype=torch.float64)
    same_N = (p_NV.argmax(-1) == q_NV.argmax(-1)).double()
    nll_p_N = -p_NV.gather(1, target_N[:, None])[:, 0].double()
    nll_q_N = -q_NV.gather(1, target_N[:, None])[:, 0].double()
    return torch.stack((kl_N, same_N, nll_p_N, nll_q_N), dim=1)


def _summarize(
    sums_DM: np.ndarray[Any, Any], tokens_D: np.ndarray[Any, Any], chosen_D: np.ndarray[Any, Any]
) -> DomainFidelity:
    chosen_D = chosen_D & (tokens_D > 0)
    sums_DM, tokens_D = sums_DM[chosen_D], tokens_D[chosen_D]
    kl, top1, nll_original, nll_pruned = (ratio(sums_DM[:, m], tokens_D) for m in range(len(MEASURES)))
    return DomainFidelity(
        int(tokens_D.sum()), len(tokens_D), kl, top1, _perplexity(nll_original), _perplexity(nll_pruned)
    )


def ratio(sum_D: np.ndarray[Any, Any], tokens_D: np.ndarray[Any, Any]) -> Figure:
    """Sum over tokens, with the standard error of a ratio estimator over samples (Cochran, Sampling Techniques, eq. 6.13).

    value r = sum_D sum / sum_D tokens;  standard error = sqrt(D / (D - 1) * sum_D (sum - r * tokens)^2) / sum_D tokens.
    """
    total = float(tokens_D.sum())
    value = float(sum_D.sum()) / total
    if len(sum_D) < 2:
        return Figure(value, None)
    spread = float(np.square(sum_D - value * tokens_D).sum()) * len(sum_D) / (len(sum_D) - 1)
    return Figure(value, math.sqrt(spread) / total)


def _perplexity(nll: Figure) -> Figure:
    value = math.exp(min(nll.value, MAX_NLL))
    return Figure(value, None if nll.standard_error is None else value * nll.standard_error)


def parse_thresholds(text: str) -> dict[str, float]:
    """The limits in `kl=0.1,top1=0.9`: KL divergence at most, agreement at least.

    Raises:
        UsageError: an unknown measure or a value that is not a number.
    """
    limits = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in ("kl", "top1"):
            raise UsageError(f"--fail-on has no measure {name!r}", hint=did_you_mean(name, ["kl", "top1"]))
        try:
            limits[name] = float(value)
        except ValueError:
            raise UsageError(
                f"--fail-on {part!r} has no number", hint="for example --fail-on kl=0.1,top1=0.9"
            ) from None
    return limits


def failed_thresholds(fidelity: Fidelity, limits: Mapping[str, float]) -> list[str]:
    """A sentence for every limit that the comparison fails."""
    failed = []
    kl, top1 = fidelity.overall.kl.value, fidelity.overall.top1.value
    if "kl" in limits and not kl <= limits["kl"]:
        failed.append(f"kl {kl:.4f} nats/token is more than {limits['kl']}")
    if "top1" in limits and not top1 >= limits["top1"]:
        failed.append(f"top-1 agreement {top1:.4f} is less than {limits['top1']}")
    return failed
