"""What is observed equals what plain hooks on the whole model see, document by document, in float64."""

from __future__ import annotations

import gc
import math
import re
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from reapkit import observation as module
from reapkit import plans
from reapkit.calibration import CalibrationBatch, load
from reapkit.checkpoint import Checkpoint
from reapkit.criteria import reap, score
from reapkit.errors import DataError, PlanError, UnsupportedError, UsageError
from reapkit.modules import load_tokenizer
from reapkit.observation import Observation, Run, observe, split_into_waves
from reapkit.statistics import NUM_FOLDS, SUM_NAMES, LayerStatistics, Statistics, combine
from streaming import full_model, streamed_model, text_rows, with_tensors, write_jsonl

MAX_LENGTH = 48
RUN = Run(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def checkpoints(m2: Path, qwen3: Path, m2_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("observation")
    result = {}
    for name, source in (("m2", m2), ("qwen3", qwen3), ("m2-fp8", m2_fp8)):
        result[name] = tiny.add_tokenizer(Path(shutil.copytree(source, folder / name)))
    return result


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """23 documents in two domains; some are split into windows, so there are micro-batches of several shapes."""
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", text_rows(23))


@pytest.fixture(scope="module")
def observed(checkpoints: dict[str, Path], text: str) -> Statistics:
    return observe(checkpoints["m2"], [text], run=RUN, max_length=MAX_LENGTH)


@dataclass
class Seen:
    """What one MoE layer of the whole model did with one document: its input and its router's answer."""

    hidden_ND: torch.Tensor
    gate_NK: torch.Tensor
    expert_NK: torch.Tensor


@dataclass
class Document:
    row: int
    ids: list[int]
    layers: dict[int, Seen] = field(default_factory=dict)


def documents_of(folder: Path, text: str) -> list[Document]:
    data = load([text], load_tokenizer(Checkpoint.open(folder)), max_length=MAX_LENGTH)
    domains = sorted({document.domain for document in data.documents})
    return [
        Document(domains.index(document.domain) * NUM_FOLDS + document.index % NUM_FOLDS, document.input_ids.tolist())
        for document in data.documents
    ]


def watch(model: Any, documents: Sequence[Document]) -> dict[int, Any]:
    """Run every document alone through the whole model, hooks on its routers; returns the experts' modules by layer."""
    experts = {i: layer.mlp.experts for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}
    for document in documents:

        def hook(router: Any, args: Any, output: Any, *, seen: dict[int, Seen] = document.layers) -> None:
            layer = next(i for i in experts if model.model.layers[i].mlp.gate is router)
            seen[layer] = Seen(args[0].reshape(-1, args[0].shape[-1]), output[1], output[2])

        handles = [model.model.layers[i].mlp.gate.register_forward_hook(hook) for i in experts]
        with torch.no_grad():
            model(input_ids=torch.tensor([document.ids]), use_cache=False)
        for handle in handles:
            handle.remove()
    return experts


def norms(experts: Any, hidden_ND: torch.Tensor) -> torch.Tensor:
    """‖f(x)‖₂ of every expert for every token, SwiGLU written out in float64."""
    result = []
    for gate_up, down in zip(experts.gate_up_proj.detach().double(), experts.down_proj.detach().double(), strict=True):
        gate, up = (hidden_ND.double() @ gate_up.T).chunk(2, dim=-1)
        result.append((gate / (1 + torch.exp(-gate)) * up @ down.T).square().sum(-1).sqrt())
    return torch.stack(result, dim=1)


def naive_sums(
    experts: Any, documents: Sequence[Document], num_rows: int, choices: Sequence[tuple[Any, Any]], layer: int
) -> LayerStatistics:
    """All sums, one routed pair after the other, from (experts, gates) of each document's tokens."""
    sums = LayerStatistics.zeros(num_rows, tiny.NUM_EXPERTS)
    for document, (expert_NK, gate_NK) in zip(documents, choices, strict=True):
        sums.tokens_S[document.row] += len(document.ids)
        norm_NE = norms(experts, document.layers[layer].hidden_ND)
        for token in range(len(document.ids)):
            for expert, gate in zip(expert_NK[token].tolist(), gate_NK[token].tolist(), strict=True):
                norm = float(norm_NE[token, expert])
                at = document.row, expert
                sums.count_SE[at] += 1
                sums.gate_SE[at] += gate
                sums.norm_SE[at] += norm
                sums.norm_sq_SE[at] += norm**2
                sums.gated_norm_SE[at] += gate * norm
                sums.gated_norm_sq_SE[at] += (gate * norm) ** 2
                sums.max_norm_E[expert] = max(sums.max_norm_E[expert], norm)
    return sums


def require_close(ours: LayerStatistics, theirs: LayerStatistics, *, rtol: float) -> None:
    np.testing.assert_array_equal(ours.tokens_S, theirs.tokens_S)
    np.testing.assert_array_equal(ours.count_SE, theirs.count_SE)
    for name in (*SUM_NAMES, "max_norm_E"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=rtol, err_msg=name)


@pytest.mark.parametrize("name", ["m2", "qwen3", "m2-fp8"])
def test_streamed_sums_equal_those_of_plain_hooks_on_the_whole_model(
    checkpoints: dict[str, Path], text: str, name: str
) -> None:
    documents = documents_of(checkpoints["m2"], text)
    experts = watch(model := full_model(checkpoints[name]), documents)
    observation = Observation(checkpoints[name], [text], run=RUN, max_length=MAX_LENGTH, seed=0)
    assert len({batch.input_ids_BT.shape for batch in observation.batches}) > 2
    assert any((~batch.mask_BT).any() for batch in observation.batches), "nothing was padded"
    ours = observation.run()
    assert ours.domains == ("a", "b")
    assert ours.layers.keys() == experts.keys() == ({0, 2} if name == "qwen3" else {0, 1, 2})
    assert ours.num_tokens == sum(len(document.ids) for document in documents)
    for layer in experts:
        choices = [(d.layers[layer].expert_NK, d.layers[layer].gate_NK) for d in documents]
        theirs = naive_sums(experts[layer], documents, 2 * NUM_FOLDS, choices, layer)
        assert theirs.tokens_S.all(), "a row of the test is empty"
        require_close(ours.layers[layer], theirs, rtol=2e-5)
    del model


def test_the_biased_choice_is_followed_with_unbiased_weights(
    checkpoints: dict[str, Path], text: str, observed: Statistics
) -> None:
    documents = documents_of(checkpoints["m2"], text)
    experts = watch(full_model(checkpoints["m2"]), documents)
    stored = tiny.load_tensors(checkpoints["m2"])
    for layer in experts:
        prefix = f"model.layers.{layer}.block_sparse_moe."
        router_ED, bias_E = stored[prefix + "gate.weight"], stored[prefix + "e_score_correction_bias"]
        true, unbiased_choice, biased_weights = [], [], []
        for document in documents:
            score_NE = torch.sigmoid(document.layers[layer].hidden_ND @ router_ED.T)
            for scores_NE, weights_NE, into in (
                (score_NE + bias_E, score_NE, true),
                (score_NE, score_NE, unbiased_choice),
                (score_NE + bias_E, score_NE + bias_E, biased_weights),
            ):
                expert_NK = scores_NE.topk(tiny.TOP_K).indices
                gate_NK = weights_NE.gather(1, expert_NK)
                into.append((expert_NK, gate_NK / gate_NK.sum(1, keepdim=True)))
        ours = observed.layers[layer]
        by_hand, other_choice, other_weights = (
            naive_sums(experts[layer], documents, 2 * NUM_FOLDS, choices, layer)
            for choices in (true, unbiased_choice, biased_weights)
        )
        require_close(ours, by_hand, rtol=2e-5)
        assert (ours.count_SE.sum(0) != other_choice.count_SE.sum(0)).sum() >= 4
        np.testing.assert_array_equal(ours.count_SE, other_weights.count_SE)
        assert (np.abs(ours.gate_SE - other_weights.gate_SE) > 0.01 * ours.gate_SE).any()


def test_softmax_in_place_of_sigmoid_would_keep_other_experts(
    checkpoints: dict[str, Path], text: str, observed: Statistics
) -> None:
    """The scoring that takes softmax and top-k of raw logits for every family differs where it matters: in what is kept."""
    documents = documents_of(checkpoints["m2"], text)
    experts = watch(full_model(checkpoints["m2"]), documents)
    stored = tiny.load_tensors(checkpoints["m2"])
    differing = []
    for layer in experts:
        router_ED = stored[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        choices = []
        for document in documents:
            probability_NE = torch.softmax(document.layers[layer].hidden_ND @ router_ED.T, dim=-1)
            gate_NK, expert_NK = probability_NE.topk(tiny.TOP_K)
            choices.append((expert_NK, gate_NK))
        softmax = naive_sums(experts[layer], documents, 2 * NUM_FOLDS, choices, layer)
        kept = [plans.select(score({layer: sums}, "reap"), keep=4)[layer] for sums in (observed.layers[layer], softmax)]
        differing.append(kept[0] != kept[1])
    assert any(differing)


def test_padding_is_not_counted(checkpoints: dict[str, Path], observed: Statistics) -> None:
    for layer in observed.layers.values():
        assert layer.tokens_S.sum() == observed.num_tokens
        np.testing.assert_array_equal(layer.count_SE.reshape(2 * NUM_FOLDS, -1).sum(1), layer.tokens_S * tiny.TOP_K)


def test_as_many_threads_give_the_same_bits_and_others_nearly_the_same_sums(
    checkpoints: dict[str, Path], text: str
) -> None:
    before = torch.get_num_threads()
    runs: list[Statistics] = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append(observe(checkpoints["m2"], [text], run=RUN, max_length=MAX_LENGTH))
    finally:
        torch.set_num_threads(before)
    one, two, again = runs
    for index, layer in two.layers.items():
        for name in (*SUM_NAMES, "max_norm_E"):
            np.testing.assert_array_equal(getattr(layer, name), getattr(again.layers[index], name))
            np.testing.assert_allclose(getattr(layer, name), getattr(one.layers[index], name), rtol=1e-5)


def test_observing_twice_gives_the_same_bits(checkpoints: dict[str, Path], text: str, observed: Statistics) -> None:
    again = observe(checkpoints["m2"], [text], run=RUN, max_length=MAX_LENGTH)
    for index, layer in observed.layers.items():
        for name in ("tokens_S", *SUM_NAMES, "max_norm_E"):
            np.testing.assert_array_equal(getattr(layer, name), getattr(again.layers[index], name))


@pytest.mark.parametrize("limit", ["activations", "threads"])
def test_one_wave_and_many_give_the_same_sums(
    checkpoints: dict[str, Path], text: str, observed: Statistics, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: every micro-batch adds to running totals."""
    probe = Observation(checkpoints["m2"], [text], run=RUN, max_length=MAX_LENGTH, seed=0)
    assert len(probe.waves) == 1 and len(probe.batches) >= 4
    largest = max(batch.input_ids_BT.size for batch in probe.batches) * module.bytes_per_token(probe.model)
    if limit == "threads":
        monkeypatch.setattr(module, "MAX_SUSPENDED", 1)
    run = replace(RUN, activation_budget=largest if limit == "activations" else None)
    many = Observation(checkpoints["m2"], [text], run=run, max_length=MAX_LENGTH, seed=0)
    assert len(many.waves) >= (2 if limit == "activations" else len(probe.batches))
    ours = many.run()
    for index, layer in observed.layers.items():
        require_close(layer, ours.layers[index], rtol=0)


def test_what_was_observed_is_recorded(checkpoints: dict[str, Path], text: str, observed: Statistics) -> None:
    assert observed.source.origin == str(checkpoints["m2"]) and observed.source.revision is None
    assert (observed.num_experts, observed.top_k, observed.num_groups) == (tiny.NUM_EXPERTS, tiny.TOP_K, 1)
    settings = dict(observed.settings)
    assert len(settings.pop("tokenizer")) == 64
    assert settings == {"dtype": "float32", "max_length": MAX_LENGTH}
    (record,) = observed.calibration
    assert len(record.digest) == 64 and record.sources[0]["source"] == text and record.sources[0]["samples"] == 23


def test_statistics_of_the_device_survive_the_file(observed: Statistics, tmp_path: Path) -> None:
    observed.save(tmp_path / "stats.safetensors")
    loaded = Statistics.load(tmp_path / "stats.safetensors")
    for index, layer in observed.layers.items():
        np.testing.assert_array_equal(reap(layer), reap(loaded.layers[index]))


@pytest.mark.parametrize("cut", [12, 10])
def test_two_halves_combined_are_the_whole(checkpoints: dict[str, Path], text: str, tmp_path: Path, cut: int) -> None:
    """Cut after a multiple of four documents the folds agree too, and else their total."""
    rows = [tiny.json.loads(line) for line in Path(text).read_text().splitlines()]
    parts = [write_jsonl(tmp_path / "1.jsonl", rows[:cut]), write_jsonl(tmp_path / "2.jsonl", rows[cut:])]
    observed = observe(checkpoints["m2"], parts, run=RUN, max_length=MAX_LENGTH)
    both = combine([observe(checkpoints["m2"], [part], run=RUN, max_length=MAX_LENGTH) for part in parts])
    assert both.domains == observed.domains and both.num_tokens == observed.num_tokens
    for index, whole in observed.layers.items():
        ours = both.layers[index]
        np.testing.assert_allclose(ours.max_norm_E, whole.max_norm_E, rtol=1e-5)
        for name in ("tokens_S", *SUM_NAMES):
            one, other = (getattr(layer, name).reshape(2, NUM_FOLDS, -1) for layer in (ours, whole))
            if cut % NUM_FOLDS:
                assert not np.array_equal(one, other)
                one, other = one.sum(1), other.sum(1)
            # The halves' micro-batches have other shapes, in which float32 products round otherwise.
            exact = name in ("tokens_S", "count_SE")
            np.testing.assert_allclose(one, other, rtol=0 if exact else 1e-5, err_msg=name)


def test_the_same_text_or_another_model_does_not_add_up(
    checkpoints: dict[str, Path], text: str, tmp_path: Path, observed: Statistics
) -> None:
    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.block_sparse_moe.gate.weight"][0, 0] += 1

    with pytest.raises(PlanError, match="is in more than one of the files and would count twice"):
        combine([observed, observe(checkpoints["m2"], [text], run=RUN, max_length=MAX_LENGTH)])
    other_text = [write_jsonl(tmp_path / "other.jsonl", text_rows(3, seed=9))]
    nudged = with_tensors(checkpoints["m2"], tmp_path / "nudged", nudge)
    with pytest.raises(PlanError, match="statistics of different routers do not add up"):
        combine([observed, observe(nudged, other_text, run=RUN, max_length=MAX_LENGTH)])
    with pytest.raises(PlanError, match=r"statistics of different max_length \(48 and 49\) do not add up"):
        combine([observed, observe(checkpoints["m2"], other_text, run=RUN, max_length=MAX_LENGTH + 1)])


def test_bfloat16_gives_nearly_the_same_scores(checkpoints: dict[str, Path], text: str, observed: Statistics) -> None:
    rough = observe(checkpoints["m2"], [text], run=replace(RUN, dtype="bfloat16"), max_length=MAX_LENGTH)
    for index, layer in observed.layers.items():
        np.testing.assert_allclose(reap(rough.layers[index]), reap(layer), rtol=0.15)


def test_an_output_that_overflows_is_reported_with_layer_expert_and_micro_batch(
    checkpoints: dict[str, Path], text: str, tmp_path: Path
) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"][5] = 3e38

    def forwards() -> list[object]:
        gc.collect()
        return [found for found in gc.get_objects() if type(found).__name__ == "_Forward"]

    folder = with_tensors(checkpoints["m2"], tmp_path / "m2", enlarge)
    before = forwards()  # another test's, which pytest may hold
    with pytest.raises(DataError, match="layer 1, expert 3, micro-batch 0: its output or gate weight is NaN") as caught:
        observe(folder, [text], run=RUN, max_length=MAX_LENGTH)
    assert "--dtype float32" in str(caught.value.hint)
    del caught
    assert not [found for found in forwards() if not any(found is other for other in before)], "they are let go"


PLACES = {
    "a router": "model.layers.1.block_sparse_moe.gate.weight",
    "a selection bias": "model.layers.2.block_sparse_moe.e_score_correction_bias",
    "attention": "model.layers.0.self_attn.q_proj.weight",
    "an expert": "model.layers.2.block_sparse_moe.experts.5.w3.weight",
    "the embeddings": "model.embed_tokens.weight",
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_weight_that_is_not_finite_is_named(
    checkpoints: dict[str, Path], text: str, tmp_path: Path, stored: str, name: str, value: float
) -> None:
    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(module.DTYPES[stored])
        tensors[name].view(-1)[7] = value

    folder = with_tensors(checkpoints["m2"], tmp_path / "m2", plant)
    with pytest.raises(DataError, match=rf"'{re.escape(name)}' in model-1.safetensors holds NaN or infinity: 1 of "):
        observe(folder, [text], run=RUN, max_length=MAX_LENGTH)


def test_finite_weights_whose_sum_is_not_are_no_error(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors[PLACES["an expert"]].view(-1)[:4] = 3e38

    model = streamed_model(with_tensors(checkpoints["m2"], tmp_path / "m2", plant))
    assert max(value.max() for value in model.fetch(2).values()) == torch.tensor(3e38)


@pytest.mark.parametrize("where", ["value", "scale"])
def test_an_fp8_weight_or_scale_that_is_nan_is_named(
    checkpoints: dict[str, Path], text: str, tmp_path: Path, where: str
) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        if where == "value":
            tensors[name].view(torch.uint8).view(-1)[300] = 0x7F  # NaN in E4M3
        else:
            tensors[name + "_scale_inv"].view(-1)[0] = math.nan

    folder = with_tensors(checkpoints["m2-fp8"], tmp_path / "m2", plant)
    scale = rf"'{re.escape(name)}_scale_inv' in model-1.safetensors, a scale of '{re.escape(name)}',"
    named = rf"'{re.escape(name)}' in model-1.safetensors" if where == "value" else scale
    with pytest.raises(DataError, match=rf"^{named} holds NaN or infinity: 1 of "):
        observe(folder, [text], run=RUN, max_length=MAX_LENGTH)


@pytest.mark.parametrize("name", PLACES.values(), ids=PLACES.keys())
def test_a_finite_weight_beyond_the_range_of_the_computation_is_named_unless_it_keeps_its_own(
    checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] = -7e4

    model = streamed_model(with_tensors(checkpoints["m2"], tmp_path / "m2", plant), dtype=torch.float16)

    def load() -> None:
        model.load_entry()
        for layer in range(3):
            model.load(layer, model.fetch(layer))

    if name in (PLACES["a router"], PLACES["a selection bias"]):  # stored as F32, they stay so
        load()
        values = model.module.state_dict()[model.in_memory_name(name)]
        assert values.dtype == torch.float32 and values.view(-1)[7] == -7e4
        return
    with pytest.raises(DataError, match=rf"'{re.escape(name)}' in .* holds values beyond the range of float16: 1 of "):
        load()


def test_a_quantised_weight_that_is_finite_until_it_is_rounded_is_told_from_a_damaged_one(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name + "_scale_inv"].view(-1)[0] = 1e4

    model = streamed_model(with_tensors(checkpoints["m2-fp8"], tmp_path / "m2", plant), dtype=torch.float16)
    with pytest.raises(
        DataError, match=rf"'{re.escape(name)}' in .* holds values beyond the range of float16"
    ) as caught:
        model.fetch(1)
    assert caught.value.hint == "--dtype float32"


def test_an_activation_that_overflows_in_a_later_micro_batch_is_named_with_it(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One word, in the last document alone, has a value in a dimension where all others have 0 and a norm is too large."""
    monkeypatch.setitem(module.TOKENS_PER_BATCH, "cpu", 16)
    rows = [{"text": "a" * 12}] * 4 + [{"text": "a" * 12 + "z"}]
    text = write_jsonl(tmp_path / "rare.jsonl", rows)
    data = load([text], load_tokenizer(Checkpoint.open(checkpoints["m2"])), max_length=MAX_LENGTH)
    words = [set(document.input_ids.tolist()) for document in data.documents]
    (rare,) = max(words, key=len) - min(words, key=len)

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][:, 0] = 0
        tensors["model.embed_tokens.weight"][rare, 0] = 5
        tensors["model.layers.0.self_attn.o_proj.weight"][0] = 0
        tensors["model.layers.0.post_attention_layernorm.weight"][0] = 3e38

    folder = with_tensors(checkpoints["m2"], tmp_path / "m2", enlarge)
    observation = Observation(folder, [text], run=RUN, max_length=MAX_LENGTH, seed=0)
    holding = [number for number, batch in enumerate(observation.batches) if (batch.input_ids_BT == rare).any()]
    assert len(holding) == 1 and len(observation.batches) > 2
    with pytest.raises(DataError, match=rf"layer 0, expert \d+, micro-batch {holding[0]}: its output or gate weight"):
        observation.run()


def test_ctrl_c_while_observing_leaves_no_thread(checkpoints: dict[str, Path], text: str) -> None:
    observation = Observation(checkpoints["m2"], [text], run=RUN, max_length=MAX_LENGTH, seed=0)
    before = threading.active_count()

    def progress(task: str, done: float, total: float, unit: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observation.run(progress=progress)
    assert threading.active_count() == before
    assert all(parameter.is_meta for parameter in observation.model.module.parameters())


def test_progress_goes_from_nothing_to_all(checkpoints: dict[str, Path], text: str) -> None:
    calls: list[tuple[str, float, float, str]] = []
    observe(checkpoints["m2"], [text], run=RUN, max_length=MAX_LENGTH, progress=lambda *call: calls.append(call))
    assert calls[0][:2] == ("observe", 0) and calls[-1][1] == calls[-1][2] == calls[0][2]
    assert [call[1] for call in calls] == sorted({call[1] for call in calls})


def test_experts_that_bypass_the_registry_are_an_error_not_zeros(checkpoints: dict[str, Path], text: str) -> None:
    observation = Observation(checkpoints["m2"], [text], run=RUN, max_length=MAX_LENGTH, seed=0)
    observation.model.module.set_experts_implementation("eager")
    with pytest.raises(UnsupportedError, match=r"layer 0 sent 0 of .* tokens through transformers' experts function"):
        observation.run()


def test_an_estimate_is_consistent_and_runs_nothing(
    checkpoints: dict[str, Path], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model was run or loaded")

    probe = Observation(checkpoints["m2"], [text], run=RUN, max_length=MAX_LENGTH, seed=0)
    budget = max(batch.input_ids_BT.size for batch in probe.batches) * module.bytes_per_token(probe.model)
    for name in ("load", "load_entry", "fetch"):
        monkeypatch.setattr(module.StreamedModel, name, refuse)
    monkeypatch.setattr(module.SuspendedForwards, "__enter__", refuse)
    observation = Observation(
        checkpoints["m2"], [text], run=replace(RUN, activation_budget=budget), max_length=MAX_LENGTH, seed=0
    )
    estimate = observation.estimate()
    assert estimate.tokens == sum(len(document.ids) for document in documents_of(checkpoints["m2"], text))
    assert estimate.documents == len(documents_of(checkpoints["m2"], text))
    assert estimate.batches == len(observation.batches) and estimate.waves == len(observation.waves) > 1
    assert 0 < estimate.held_bytes <= budget < estimate.device_bytes
    stored = sum(
        tensor.nbytes for name, tensor in tiny.load_tensors(checkpoints["m2"]).items() if name != "lm_head.weight"
    )
    assert estimate.read_bytes == stored * estimate.waves
    assert (estimate.device, estimate.dtype) == ("cpu", "float32")
    assert (estimate.moved_bytes, estimate.reroute_bytes) == (0, 0), "a folder, and no sample"
    optional = ("moved_bytes", "reroute_bytes")
    numbers = [
        value for name, value in estimate.to_json().items() if not isinstance(value, str) and name not in optional
    ]
    assert all(math.isfinite(value) and value > 0 for value in numbers)


def test_the_estimated_size_of_the_file_is_right(checkpoints: dict[str, Path], text: str, tmp_path: Path) -> None:
    observation = Observation(checkpoints["m2"], [text], run=RUN, max_length=MAX_LENGTH, seed=0)
    observation.run().save(tmp_path / "stats")
    header = 8 + int.from_bytes((tmp_path / "stats").read_bytes()[:8], "little")
    assert observation.estimate().output_bytes == (tmp_path / "stats").stat().st_size - header


def batches_of(*lengths: int) -> list[CalibrationBatch]:
    one = np.zeros(1, dtype=np.int64)
    return [CalibrationBatch(np.zeros((1, n), dtype=np.int64), np.array([n]), one, one) for n in lengths]


@pytest.mark.parametrize("budget", [50, 77, 100, 1000])
@pytest.mark.parametrize("max_batches", [1, 3, 100])
def test_waves_keep_order_budget_and_every_batch(budget: int, max_batches: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 11, size=40)
    parts = batches_of(*lengths)
    waves = split_into_waves(parts, budget=budget, bytes_per_token=5, max_batches=max_batches)
    assert [id(batch) for wave in waves for batch in wave] == [id(batch) for batch in parts]
    assert all(wave and len(wave) <= max_batches for wave in waves)
    assert all(sum(batch.input_ids_BT.size for batch in wave) * 5 <= budget for wave in waves)


def test_waves_are_about_equally_long() -> None:
    waves = split_into_waves(batches_of(*[10] * 12), budget=100, bytes_per_token=1, max_batches=100)
    assert [len(wave) for wave in waves] == [6, 6]


def test_a_budget_below_one_micro_batch_names_the_one_that_works() -> None:
    with pytest.raises(UsageError, match="an activation budget of 49 bytes is less than the 50") as caught:
        split_into_waves(batches_of(3, 10), budget=49, bytes_per_token=5, max_batches=9)
    assert caught.value.hint is not None and "--activation-budget 50" in caught.value.hint


def test_experts_are_not_left_in_fp8_where_nothing_computes_in_it() -> None:
    with pytest.raises(UnsupportedError, match="fused kernels alone, which do not run on cpu here") as caught:
        model = Path(__file__).parents[1] / "models/m2-nano"
        observe(model, [str(model / "data/calibration.jsonl")], run=Run(device="cpu", dtype="float8"))
    assert caught.value.hint == "--dtype bfloat16"


def test_defaults_fit_the_machine() -> None:
    device, dtype = Run().resolve()
    assert (device.type, dtype) in {("cpu", torch.float32), ("cuda", torch.bfloat16)}
    assert Run(device="cpu", dtype="bfloat16").resolve() == (torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(
    ("run", "message", "hint"),
    [
        (Run(device="gpu"), "there is no device 'gpu'", "cuda"),
        (Run(device="meta"), "the device 'meta' is not supported", "cuda"),
        (Run(device="cuda:99"), "there is no device 'cuda:99': torch sees", "--device cpu"),
        (Run(device="cpu", dtype="bf16"), "cannot compute in 'bf16'", "bfloat16"),
        (Run(device="cpu", dtype="int8"), "cannot compute in 'int8'", ""),
        (Run(device="cpu", dtype="float8"), "only observing computes in float8", "--dtype bfloat16"),
    ],
)
def test_a_device_or_dtype_that_is_not_there_is_named(run: Run, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run.resolve()
    assert hint in str(caught.value.hint)


# ---- interrupted runs


def many_waves(folder: Path, text: str, *, share: int = 1) -> Observation:
    """An observation in so many waves as there are micro-batches, or fewer by a factor."""
    probe = Observation(folder, [text], run=RUN, max_length=MAX_LENGTH, seed=0)
    budget = max(batch.input_ids_BT.size for batch in probe.batches) * module.bytes_per_token(probe.model)
    return Observation(
        folder, [text], run=replace(RUN, activation_budget=share * budget), max_length=MAX_LENGTH, seed=0
    )


def stop_past_half(task: str, done: float, total: float, unit: str) -> None:
    if done / total > 0.5:
        raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_after_its_last_finished_wave_to_the_same_bits(
    checkpoints: dict[str, Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.TOKENS_PER_BATCH, "cpu", 200)
    undisturbed = many_waves(checkpoints["m2"], text).run()
    undisturbed.save(tmp_path / "undisturbed")
    keep = tmp_path / "statistics.unfinished"
    begun_at = []
    for stop_at in (0.4, 0.9, 2.0):
        shares: list[float] = []

        def progress(
            task: str, done: float, total: float, unit: str, *, stop_at: float = stop_at, shares: list[float] = shares
        ) -> None:
            shares.append(done / total)
            if done / total >= stop_at:
                raise KeyboardInterrupt

        # Fewer waves than were begun with: each micro-batch adds to running totals, so that is the same to the bit.
        observation = many_waves(checkpoints["m2"], text, share=1 if stop_at == 0.4 else 2)
        if stop_at < 1:
            with pytest.raises(KeyboardInterrupt):
                observation.run(progress=progress, keep=keep)
            assert 0 < Statistics.load(keep, unfinished=True).finished_batches < len(observation.batches)
        else:
            observation.run(progress=progress, keep=keep).save(tmp_path / "resumed")
        begun_at.append(shares[0])
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "undisturbed").read_bytes()
    assert begun_at[0] == 0 < begun_at[1] < begun_at[2] < 1 and shares[-1] == 1


def test_sums_of_an_interrupted_run_are_no_statistics(checkpoints: dict[str, Path], text: str, tmp_path: Path) -> None:
    keep = tmp_path / "s.safetensors"
    with pytest.raises(KeyboardInterrupt):
        many_waves(checkpoints["m2"], text).run(progress=stop_past_half, keep=keep)
    with pytest.raises(DataError, match=r"holds the sums of an interrupted run: \d+ of \d+ micro-batches") as caught:
        plans.plan(keep, ratio=0.25)
    assert caught.value.hint == "repeat the command that wrote it: it goes on from there"


def test_another_runs_sums_are_not_gone_on_with(checkpoints: dict[str, Path], text: str, tmp_path: Path) -> None:
    keep = tmp_path / "s.safetensors"
    with pytest.raises(KeyboardInterrupt):
        many_waves(checkpoints["m2"], text).run(progress=stop_past_half, keep=keep)
    other = write_jsonl(tmp_path / "other.jsonl", text_rows(20, seed=9))
    for observation in (many_waves(checkpoints["m2"], other), many_waves(checkpoints["qwen3"], text)):
        with pytest.raises(DataError, match="an interrupted run on another model, text or settings"):
            observation.run(keep=keep)
