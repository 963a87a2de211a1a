"""Fidelity equals what two whole models give, and its spread what the estimator's definition gives."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from reapkit import fidelity as module
from reapkit.calibration import load
from reapkit.checkpoint import Checkpoint
from reapkit.errors import CheckpointError, DataError, UsageError
from reapkit.fidelity import DomainFidelity, Fidelity, Figure, compare, failed_thresholds, parse_thresholds, ratio
from reapkit.modules import load_tokenizer
from reapkit.observation import Run
from streaming import full_model, streamed_model, text_rows, with_tensors, write_jsonl

RUN = Run(device="cpu", dtype="float32")
MAX_LENGTH = 32


@pytest.fixture(scope="module")
def original(m2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.add_tokenizer(Path(shutil.copytree(m2, tmp_path_factory.mktemp("fidelity") / "m2")))


@pytest.fixture(scope="module")
def perturbed(original: Path) -> Path:
    def perturb(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        for name, tensor in tensors.items():
            if name.endswith("w2.weight") or name == "lm_head.weight":
                tensor += 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)

    return with_tensors(original, original.parent / "perturbed", perturb)


@pytest.fixture(scope="module")
def text(original: Path) -> str:
    """Three domains, one of them a single document; one document of one token, which predicts nothing."""
    rows = [*text_rows(14), {"text": "a", "domain": "a"}, {"text": "the one of its kind", "domain": "single"}]
    return write_jsonl(original.parent / "text.jsonl", rows)


def test_a_checkpoint_is_equal_to_itself(original: Path, text: str) -> None:
    result = compare(original, original, [text], run=RUN, max_length=MAX_LENGTH)
    for part in (result.overall, *result.domains.values()):
        assert part.kl.value == 0 and part.top1.value == 1
        assert part.perplexity_original == part.perplexity_pruned
        assert part.kl.standard_error in (0, None)
    assert failed_thresholds(result, parse_thresholds("kl=0,top1=1")) == []


def naive(original: Path, perturbed: Path, text: str) -> dict[str, np.ndarray[Any, Any]]:
    """By domain and sample: predicted tokens and the sums of KL, agreement and both losses over its windows, in float64."""
    models = [full_model(folder) for folder in (original, perturbed)]
    data = load([text], load_tokenizer(Checkpoint.open(original)), max_length=MAX_LENGTH)
    rows: dict[str, dict[int, np.ndarray[Any, Any]]] = {}
    for document in data.documents:
        ids = torch.from_numpy(document.input_ids.astype(np.int64))
        with torch.no_grad():
            p, q = (torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1) for model in models)
        sums = [len(ids) - 1.0, 0.0, 0.0, 0.0, 0.0]
        for place in range(len(ids) - 1):
            target = ids[place + 1]
            sums[1] += float((p[place].exp() * (p[place] - q[place])).sum())
            sums[2] += float(p[place].argmax() == q[place].argmax())
            sums[3] -= float(p[place, target])
            sums[4] -= float(q[place, target])
        samples = rows.setdefault(document.domain, {})
        samples[document.index] = samples.get(document.index, np.zeros(5)) + sums
    result = {name: np.array([row for row in values.values() if row[0]]) for name, values in rows.items()}
    return result | {"overall": np.concatenate(list(result.values()))}


def require_figure(figure: Figure, value: float, residual_D: np.ndarray[Any, Any], total: float, scale: float) -> None:
    assert figure.value == pytest.approx(value, rel=2e-5, abs=1e-7)
    if len(residual_D) == 1:
        assert figure.standard_error is None
        return
    # sqrt(D / (D - 1) * sum of squared residuals) / tokens is the sample's standard deviation of residuals / mean tokens / sqrt(D).
    spread = residual_D.std(ddof=1) * math.sqrt(len(residual_D)) / total
    assert figure.standard_error == pytest.approx(scale * spread, rel=1e-4)


@pytest.mark.parametrize("limits", [None, "small"])
def test_a_comparison_equals_the_whole_models_in_float64(
    original: Path, perturbed: Path, text: str, limits: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limits == "small":  # several micro-batches, waves and chunks
        monkeypatch.setattr(module, "LOGITS_BYTES", 4 * 128 * 40)
        monkeypatch.setattr(module, "CHUNK_TOKENS", 7)
    run = RUN if limits is None else replace(RUN, activation_budget=2 * 40 * 512 * 2)
    result = compare(original, perturbed, [text], run=run, max_length=MAX_LENGTH)
    reference = naive(original, perturbed, text)
    assert {*result.domains, "overall"} == reference.keys() == {"a", "b", "single", "overall"}
    assert result.overall.kl.value > 0.01 and result.overall.top1.value < 1
    for name, rows in reference.items():
        ours = result.overall if name == "overall" else result.domains[name]
        tokens_D, total = rows[:, 0], rows[:, 0].sum()
        assert (ours.tokens, ours.samples) == (total, len(rows))
        figures = (ours.kl, ours.top1, ours.perplexity_original, ours.perplexity_pruned)
        for number, figure in enumerate(figures, start=1):
            mean = rows[:, number].sum() / total
            value = math.exp(mean) if number > 2 else mean
            require_figure(figure, value, rows[:, number] - mean * tokens_D, total, value if number > 2 else 1)


def test_the_result_is_plain_json_with_a_spread_for_every_figure(original: Path, perturbed: Path, text: str) -> None:
    result = compare(original, perturbed, [text], run=RUN, max_length=MAX_LENGTH)
    described = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert described["overall"]["kl"].keys() == {"value", "standard_error"}
    assert described["domains"]["single"]["kl"]["standard_error"] is None
    assert described["data"]["max_length"] == MAX_LENGTH and len(described["data"]["digest"]) == 64


def test_progress_counts_the_tokens_of_both_models(original: Path, perturbed: Path, text: str) -> None:
    calls: list[tuple[str, float, float, str]] = []
    compare(original, perturbed, [text], run=RUN, progress=lambda *call: calls.append(call))
    assert calls[0][1] == 0 and calls[-1][1] == calls[-1][2]


def test_the_ratio_estimator_by_hand() -> None:
    # r = (2 + 3 + 7) / (1 + 2 + 3) = 2; residuals 0, -1, 1; sqrt(3 / 2 * 2) / 6
    figure = ratio(np.array([2.0, 3.0, 7.0]), np.array([1.0, 2.0, 3.0]))
    assert figure == Figure(2.0, pytest.approx(math.sqrt(3) / 6))
    assert ratio(np.array([3.0]), np.array([2.0])) == Figure(1.5, None)
    assert ratio(np.array([2.0, 4.0]), np.array([1.0, 2.0])) == Figure(2.0, 0.0)


def fidelity(kl: float, top1: float) -> Fidelity:
    one = Figure(1.0, None)
    overall = DomainFidelity(10, 1, Figure(kl, None), Figure(top1, None), one, one)
    return Fidelity("a", "b", "", (), {}, overall, {})


@pytest.mark.parametrize(
    ("thresholds", "failed"),
    [
        ("kl=0.1", []),
        ("kl=0.05,top1=0.9", []),
        ("kl=0.04", ["kl 0.0500 nats/token is more than 0.04"]),
        ("top1=0.95", ["top-1 agreement 0.9000 is less than 0.95"]),
        (" kl=0 , top1=1", ["kl 0.0500 nats/token is more than 0.0", "top-1 agreement 0.9000 is less than 1.0"]),
    ],
)
def test_failed_thresholds_are_sentences(thresholds: str, failed: list[str]) -> None:
    assert failed_thresholds(fidelity(0.05, 0.9), parse_thresholds(thresholds)) == failed


@pytest.mark.parametrize("thresholds", ["kl=nan", "kl=0.1"])
def test_what_is_no_number_never_passes(thresholds: str) -> None:
    assert len(failed_thresholds(fidelity(float("nan"), 1.0), parse_thresholds(thresholds))) == 1


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ("kll=0.1", "--fail-on has no measure 'kll'"),
        ("", "--fail-on has no measure ''"),
        ("kl", "--fail-on 'kl' has no number"),
        ("kl=high", "--fail-on 'kl=high' has no number"),
    ],
)
def test_thresholds_that_cannot_be_read_are_usage_errors(thresholds: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_thresholds(thresholds)


def test_another_vocabulary_cannot_be_compared(original: Path, text: str, tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:120]

    other = with_tensors(original, tmp_path / "other", cut, vocab_size=120)
    with pytest.raises(CheckpointError, match=r"has 128 tokens in its vocabulary and .* has 120"):
        compare(original, other, [text], run=RUN)


def test_text_that_predicts_nothing_is_refused(original: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(UsageError, match="no document of the data has two tokens"):
        compare(original, original, [text], run=RUN)


@pytest.mark.parametrize("which", ["original", "pruned"])
def test_predictions_that_are_not_finite_are_refused_with_the_model_named(
    original: Path, text: str, tmp_path: Path, which: str
) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][:] = 3e38

    damaged = with_tensors(original, tmp_path / "damaged", damage)
    pair = (damaged, original) if which == "original" else (original, damaged)
    with pytest.raises(DataError, match="damaged predicts NaN or infinities in float32"):
        compare(*pair, [text], run=RUN)


def test_a_hopeless_model_has_a_perplexity_that_is_a_number() -> None:
    assert module._perplexity(Figure(800.0, 3.0)).value == math.exp(100)
    assert module._perplexity(Figure(2.0, 0.5)) == Figure(math.exp(2), 0.5 * math.exp(2))


def test_logits_of_one_micro_batch_are_freed_before_the_next(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    model = streamed_model(original)
    alive: list[Callable[[], Any]] = []
    with module.SuspendedForwards(model, [np.full((1, 4), 5)] * 3) as forwards:
        forwards.run_layers(lambda layer, number: None)
        logits = forwards.logits()
        for _ in range(3):
            assert all(reference() is None for reference in alive)
            alive.append(weakref.ref(next(logits)))
