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
from conftest import PlanFor
from reapkit import compression, observation
from reapkit import fidelity as module
from reapkit import layout as layouts
from reapkit.architectures import ARCHITECTURES
from reapkit.calibration import load
from reapkit.checkpoint import Checkpoint
from reapkit.errors import CheckpointError, DataError, UsageError
from reapkit.experts import RoutedPairs
from reapkit.fidelity import DomainFidelity, Fidelity, compare, failed_thresholds, parse_thresholds
from reapkit.figures import Figure, ratio
from reapkit.layout import MoELayout
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


def test_waves_hold_what_layers_of_both_models_leave(
    original: Path, perturbed: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for two layers of each, and 100 MiB."""
    layer = streamed_model(original).layer_nbytes
    monkeypatch.setattr(observation, "free_memory", lambda device: 4 * layer + (100 << 20))
    budgets = []
    split = module.split_into_waves
    monkeypatch.setattr(module, "split_into_waves", lambda *a, **o: budgets.append(o["budget"]) or split(*a, **o))
    compare(original, perturbed, [text], run=RUN, max_length=MAX_LENGTH)
    assert budgets == [int((100 << 20) * observation.BUDGET_SHARE["cpu"])]


def test_a_checkpoint_is_equal_to_itself(original: Path, text: str) -> None:
    result = compare(original, original, [text], run=RUN, max_length=MAX_LENGTH)
    for part in (result.overall, *result.domains.values()):
        assert part.kl.value == 0 and part.top1.value == 1
        assert part.perplexity_original == part.perplexity_pruned and part.top5.value == 1
        assert part.output_error.value == part.routing_changed.value == part.routed_to_dropped.value == 0
        assert part.error_growth is None and len(part.layers) == tiny.NUM_LAYERS
        assert part.kl.standard_error in (0, None)
    assert failed_thresholds(result, parse_thresholds("kl=0,top1=1")) == []


def naive(original: Path, perturbed: Path, text: str) -> dict[str, np.ndarray[Any, Any]]:
    """By domain and sample: predicted tokens and the sums of KL, both agreements and both losses over its windows, in float64."""
    models = [full_model(folder) for folder in (original, perturbed)]
    data = load([text], load_tokenizer(Checkpoint.open(original)), max_length=MAX_LENGTH)
    rows: dict[str, dict[int, np.ndarray[Any, Any]]] = {}
    for document in data.documents:
        ids = torch.from_numpy(document.input_ids.astype(np.int64))
        with torch.no_grad():
            p, q = (torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1) for model in models)
        sums = [len(ids) - 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
        for place in range(len(ids) - 1):
            target = ids[place + 1]
            sums[1] += float((p[place].exp() * (p[place] - q[place])).sum())
            sums[2] += float(p[place].argmax() == q[place].argmax())
            likeliest = [set(logs.sort(descending=True).indices[:5].tolist()) for logs in (p[place], q[place])]
            sums[3] += len(likeliest[0] & likeliest[1]) / 5
            sums[4] -= float(p[place, target])
            sums[5] -= float(q[place, target])
        samples = rows.setdefault(document.domain, {})
        samples[document.index] = samples.get(document.index, np.zeros(6)) + sums
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
        figures = (ours.kl, ours.top1, ours.top5, ours.perplexity_original, ours.perplexity_pruned)
        for number, figure in enumerate(figures, start=1):
            mean = rows[:, number].sum() / total
            value = math.exp(mean) if number > 3 else mean
            require_figure(figure, value, rows[:, number] - mean * tokens_D, total, value if number > 3 else 1)


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


@pytest.fixture(scope="module")
def pruned(original: Path, plan_for: PlanFor) -> tuple[Path, dict[int, tuple[int, ...]]]:
    *_, plan = plan_for(original, 5)
    compression.prune(original, plan, original.parent / "pruned")
    return original.parent / "pruned", dict(plan.kept)


def test_every_layer_equals_what_the_whole_models_compute(
    original: Path, pruned: tuple[Path, dict[int, tuple[int, ...]]], text: str
) -> None:
    """Hidden states and chosen experts are taken from transformers' own models by hooks, the kept experts from the plan."""
    folder, kept = pruned
    seen: list[
        list[tuple[torch.Tensor, torch.Tensor]]
    ] = []  # by model and layer: what leaves it, and the experts chosen in it

    def watch(model: Any, numbers: dict[int, tuple[int, ...]]) -> None:
        seen.append([])
        chosen: list[torch.Tensor] = []
        for layer, block in enumerate(model.model.layers):

            def keep_choice(_: Any, args: Any, kept: Any = numbers[layer]) -> None:
                chosen.append(torch.tensor(kept)[args[1]])

            def keep_state(_: Any, args: Any, output: Any, mine: Any = seen[-1]) -> None:
                mine.append((output if torch.is_tensor(output) else output[0], chosen.pop()))

            block.mlp.experts.register_forward_pre_hook(keep_choice)
            block.register_forward_hook(keep_state)

    models = [full_model(path) for path in (original, folder)]
    watch(models[0], dict.fromkeys(range(tiny.NUM_LAYERS), tuple(range(tiny.NUM_EXPERTS))))
    watch(models[1], kept)
    totals = np.zeros((tiny.NUM_LAYERS, 3))
    data = load([text], load_tokenizer(Checkpoint.open(original)), max_length=MAX_LENGTH)
    count = 0
    for document in data.documents:
        ids = torch.from_numpy(document.input_ids.astype(np.int64))
        for states in seen:
            states.clear()
        with torch.no_grad():
            for model in models:
                model(input_ids=ids[None], use_cache=False)
        for layer in range(tiny.NUM_LAYERS):
            (state, choice), (other_state, other_choice) = seen[0][layer], seen[1][layer]
            for place in range(len(ids) - 1):
                difference = (other_state[0, place] - state[0, place]).norm() / state[0, place].norm()
                ours, theirs = set(choice[place].tolist()), set(other_choice[place].tolist())
                totals[layer] += (
                    float(difference),
                    not ours <= set(kept[layer]),
                    not (ours & set(kept[layer])) <= theirs,
                )
        count += len(ids) - 1

    result = compare(original, folder, [text], run=RUN, max_length=MAX_LENGTH).overall
    for layer, expected in zip(result.layers, totals / count, strict=True):
        figures = (layer.output_error, layer.routed_to_dropped, layer.routing_changed)
        assert [figure.value for figure in figures] == pytest.approx(list(expected), rel=1e-5), layer.layer
    # The first layer's inputs are the original's, so there only pruning itself moves tokens.
    assert result.layers[0].routing_changed.value == 0 < result.layers[0].routed_to_dropped.value
    assert result.layers[-1].routing_changed.value > 0
    means = (totals / count).mean(0)
    assert (result.routed_to_dropped.value, result.routing_changed.value) == pytest.approx(tuple(means[1:]))
    assert result.output_error == result.layers[-1].output_error


def test_kept_experts_are_found_by_their_routers_rows(
    original: Path, pruned: tuple[Path, dict[int, tuple[int, ...]]], tmp_path: Path
) -> None:
    def opened(folder: Path) -> tuple[Checkpoint, MoELayout]:
        checkpoint = Checkpoint.open(folder)
        return checkpoint, layouts.resolve(checkpoint, ARCHITECTURES)

    folder, kept = pruned
    assert module.kept_experts(opened(original), opened(folder)) == kept

    def retrain(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.block_sparse_moe.gate.weight"][2] += 1

    retrained = with_tensors(folder, tmp_path / "retrained", retrain)
    assert module.kept_experts(opened(original), opened(retrained)) is None
    same = with_tensors(original, tmp_path / "same", retrain)
    assert module.kept_experts(opened(original), opened(same)) == dict.fromkeys(range(3), tuple(range(8)))


def test_unknown_kept_experts_leave_routing_unmeasured_and_say_so(
    original: Path, pruned: tuple[Path, dict[int, tuple[int, ...]]], text: str, tmp_path: Path
) -> None:
    def retrain(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.block_sparse_moe.gate.weight"] += 1

    result = compare(original, with_tensors(pruned[0], tmp_path / "other", retrain), [text], run=RUN)
    assert result.overall.routing_changed is None and result.overall.layers[0].routed_to_dropped is None
    assert result.overall.output_error.value > 0
    assert result.to_json()["notes"] == [
        "which experts were kept cannot be told from the routers, whose rows are not the original's: routing is not compared"
    ]


def test_changed_routing_by_hand() -> None:
    """Experts 0, 2 and 3 of four are kept. Three tokens choose (0, 1), (2, 3), (0, 2); the pruned model (0, 2), (2, 3), (2, 3)."""
    routing = module._Routing((1, 3), {7: (0, 2, 3)}, 4, torch.device("cpu"))

    def pairs(layer: int, choices: list[tuple[int, int]]) -> RoutedPairs:
        expert, token = torch.tensor(choices).reshape(-1), torch.arange(3).repeat_interleave(2)
        gates = torch.ones(6)
        return RoutedPairs(
            layer,
            expert,
            token,
            gates,
            gates,
            torch.tensor(choices),
            gates.view(3, 2),
            torch.empty(0),
            lambda h, t, e: h,
        )

    routing.see_original(pairs(7, [(0, 1), (2, 3), (0, 2)]))
    routing.see_pruned(pairs(7, [(0, 1), (1, 2), (1, 2)]))  # in its own numbering
    dropped, changed = routing.take(7)
    assert dropped.tolist() == [[1, 0, 0]]  # expert 1 of the first token
    assert changed.tolist() == [[0, 0, 1]]  # expert 0 of the third; the first token kept what could be kept
    routing.see_original(pairs(8, [(0, 1)] * 3))  # a layer whose kept experts are not known
    assert all(not values.any() for values in routing.take(8))


def test_the_relative_output_error_by_hand() -> None:
    original, other = (
        torch.tensor([[[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]]),
        torch.tensor([[[3.0, 5.0], [0.0, 0.0], [0.0, 0.0]]]),
    )
    assert module._output_error(original, other).tolist() == [[0.2, 0.0, 1.0]]


def test_the_growth_of_the_error_by_hand() -> None:
    # Errors 1, 2, 4 in layers 0, 1, 2: a factor of 2 a layer, and no spread between samples that agree.
    assert module.error_growth(np.array([[1.0, 2.0, 4.0], [2.0, 4.0, 8.0]])) == Figure(
        pytest.approx(2.0), pytest.approx(0.0, abs=1e-12)
    )
    # Sums 3 and 6 grow by 2; without either sample by 4 and by 5 / 4: sqrt(1 / 2 * 2 * 1.375^2).
    assert module.error_growth(np.array([[2.0, 2.5], [1.0, 4.0]])) == Figure(
        pytest.approx(6.5 / 3), pytest.approx(1.375)
    )
    assert module.error_growth(np.array([[0.0, 2.0], [0.0, 4.0]])) is None
    assert module.error_growth(np.array([[1.0, 3.0]])) == Figure(pytest.approx(3.0), None)


def test_models_of_other_depth_cannot_be_compared(original: Path, text: str, tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            del tensors[name]

    shallow = with_tensors(original, tmp_path / "shallow", cut, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"has 3 layers of hidden size .* has 2 layers of hidden size"):
        compare(original, shallow, [text], run=RUN)


def test_a_comparison_is_kept_in_the_folder_that_reapkit_wrote_and_nowhere_else(
    original: Path, pruned: tuple[Path, dict[int, tuple[int, ...]]], text: str
) -> None:
    result = compare(original, pruned[0], [text], run=RUN)
    assert module.keep(result, original) is None and not (original / "reapkit").exists()
    path = module.keep(result, pruned[0])
    assert path == pruned[0] / "reapkit/fidelity.json"
    assert json.loads(path.read_text()) == {"format": "reapkit-fidelity-1", **result.to_json()}


def test_the_ratio_estimator_by_hand() -> None:
    # r = (2 + 3 + 7) / (1 + 2 + 3) = 2; residuals 0, -1, 1; sqrt(3 / 2 * 2) / 6
    figure = ratio(np.array([2.0, 3.0, 7.0]), np.array([1.0, 2.0, 3.0]))
    assert figure == Figure(2.0, pytest.approx(math.sqrt(3) / 6))
    assert ratio(np.array([3.0]), np.array([2.0])) == Figure(1.5, None)
    assert ratio(np.array([2.0, 4.0]), np.array([1.0, 2.0])) == Figure(2.0, 0.0)


def fidelity(kl: float, top1: float) -> Fidelity:
    one = Figure(1.0, None)
    overall = DomainFidelity(10, 1, Figure(kl, None), Figure(top1, None), one, one, one, one, None, None, None, ())
    return Fidelity("a", "b", "", (), {}, overall, {})


@pytest.mark.parametrize(
    ("thresholds", "failed"),
    [
        ("kl=0.1", []),
        ("kl=0.05,top1=0.9", []),
        ("kl=0.04", ["kl 0.0500 nats/token is more than 0.04"]),
        ("top1=0.95", ["top-1 agreement 0.9000 is less than 0.95"]),
        (
            "error=0.5,routing=0.1",
            [
                "relative output error of the last layer 1.0000 is more than 0.5",
                "share of tokens with changed routing was not measured, and 0.1 was demanded",
            ],
        ),
        ("loops=0.02", ["loop rate was not measured, and 0.02 was demanded"]),
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


def test_thresholds_on_replies_need_prompts() -> None:
    with pytest.raises(UsageError, match="--fail-on loops is measured on replies"):
        parse_thresholds("kl=0.1,loops=0.02", with_prompts=False)


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
