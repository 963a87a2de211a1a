"""Sampled tokens: the same ones however a run is cut, whole or not there, and refused where the family's rule is not the model's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tiny
from reapkit import observation as module
from reapkit import plans, rerouting
from reapkit.calibration import batches, load
from reapkit.checkpoint import Checkpoint
from reapkit.cli import app
from reapkit.errors import DataError, OutputError, UnsupportedError, UsageError
from reapkit.layout import Identity
from reapkit.modules import load_tokenizer
from reapkit.observation import Observation, Run
from reapkit.rerouting import Reroute, choose_tokens
from reapkit.samples import RoutedSamples, SampleHeader, beside, require_space
from reapkit.selection import Rule
from reapkit.statistics import Statistics
from streaming import full_model, text_rows, write_jsonl

MAX_LENGTH = 48
RUN = Run(device="cpu", dtype="float32")
REROUTE = Reroute(tokens=300, candidates=4)


@pytest.fixture(scope="module")
def folder(m2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.add_tokenizer(Path(shutil.copytree(m2, tmp_path_factory.mktemp("rerouting") / "m2")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", text_rows(23))


@pytest.fixture(scope="module")
def observed(folder: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics with their sample beside them, observed in one wave."""
    path = tmp_path_factory.mktemp("observed") / "statistics.safetensors"
    observation(folder, text).write(path)
    return path


def observation(folder: Path, text: str, **changes: Any) -> Observation:
    options: dict[str, Any] = {"run": RUN, "max_length": MAX_LENGTH, "seed": 0, "reroute": REROUTE}
    return Observation(folder, [text], **options | changes)


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


# ---- which tokens


def documents_and_places(
    text: str, folder: Path, *, tokens: int, per_batch: int, seed: int = 0
) -> list[tuple[bytes, int, int]]:
    data = load([text], load_tokenizer(Checkpoint.open(folder)), max_length=MAX_LENGTH)
    parts = batches(data, tokens_per_batch=per_batch)
    sample = choose_tokens(parts, tokens=tokens, seed=seed)
    found = []
    for batch, places, behind in zip(parts, sample.place_M, sample.behind_M, strict=True):
        width = batch.input_ids_BT.shape[1]
        for place, after in zip(places, behind, strict=True):
            row, at = divmod(int(place), width)
            assert at + after + 1 == batch.length_B[row]
            found.append((batch.input_ids_BT[row, : batch.length_B[row]].tobytes(), int(batch.index_B[row]), at))
    return found


def test_the_same_tokens_are_sampled_however_documents_are_put_together(folder: Path, text: str) -> None:
    one, other = (documents_and_places(text, folder, tokens=200, per_batch=size) for size in (100, 1000))
    assert sorted(one) == sorted(other) and one != other
    assert len(set(one)) == len(one)
    assert sorted(documents_and_places(text, folder, tokens=200, per_batch=100, seed=1)) != sorted(one)


def test_every_domain_is_sampled_in_proportion_and_small_ones_more(tmp_path: Path, folder: Path) -> None:
    rows = text_rows(40, domains=("a",)) + text_rows(1, seed=1, domains=("b",)) + text_rows(20, seed=2, domains=("c",))
    data = load(
        [write_jsonl(tmp_path / "text.jsonl", rows)], load_tokenizer(Checkpoint.open(folder)), max_length=MAX_LENGTH
    )
    sample = choose_tokens(batches(data, tokens_per_batch=200), tokens=240, seed=0)
    length = np.bincount([d for doc in data.documents for d in [data.domains.index(doc.domain)] * len(doc.input_ids)])
    found = np.bincount(sample.domain_T)
    assert len(sample) == 240
    assert found[1] >= min(length[1], 20) > 2 * 240 * length[1] / length.sum()  # a quarter of an equal share
    np.testing.assert_allclose((found[0] - 20) / (found[2] - 20), (length[0] - 20) / (length[2] - 20), rtol=0.05)
    # Each stands for as many as its domain has per sampled one.
    np.testing.assert_allclose(np.bincount(sample.domain_T, weights=sample.share_T), length)


def test_where_there_are_no_more_tokens_all_are_taken_once(folder: Path, text: str) -> None:
    found = documents_and_places(text, folder, tokens=10**6, per_batch=200)
    data = load([text], load_tokenizer(Checkpoint.open(folder)), max_length=MAX_LENGTH)
    assert len(found) == len(set(found)) == data.num_tokens


# ---- what is written


def test_what_is_written_is_what_the_whole_model_shows(folder: Path, text: str, tmp_path: Path) -> None:
    """Norms of the residual stream, scores and the products of outputs, from hooks on the model in memory."""
    observation(folder, text, reroute=Reroute(10**6, 4)).run(sample=tmp_path / "sample")
    sample = RoutedSamples.open(tmp_path / "sample")
    data = load([text], load_tokenizer(Checkpoint.open(folder)), max_length=MAX_LENGTH)
    model = full_model(folder)
    stream_sq, trace, turn = [], [], []
    block = model.model.layers[1]

    def note(module: Any, args: tuple[torch.Tensor]) -> None:
        stream_sq.append(args[0].reshape(-1, 64).square().sum(-1))

    def experts(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        logits = args[0] @ block.mlp.gate.weight.T
        best = (logits.sigmoid() + block.mlp.e_score_correction_bias).argsort(-1, descending=True)[:, :4]
        outputs = torch.stack([
            type(module).forward(module, args[0], best[:, [k]], torch.ones(len(best), 1)) for k in range(4)
        ], 1)  # fmt: skip
        trace.append((outputs @ outputs.transpose(1, 2)).diagonal(dim1=1, dim2=2).sum(-1))

    def turned(module: Any, args: Any, output: torch.Tensor) -> None:
        before, after = held.pop().reshape(-1, 64).double(), output.reshape(-1, 64).double()
        turn.append(1 - (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1))

    held: list[torch.Tensor] = []
    block.post_attention_layernorm.register_forward_pre_hook(lambda module, args: held.append(args[0].clone()))
    block.register_forward_hook(turned)
    block.post_attention_layernorm.register_forward_pre_hook(note)
    block.mlp.experts.register_forward_hook(experts)
    with torch.no_grad():
        for document in data.documents:
            model(input_ids=torch.tensor([document.input_ids.tolist()]), use_cache=False)
    layer = sample.layer(1)
    np.testing.assert_allclose(np.sort(layer.stream_sq_T), np.sort(torch.cat(stream_sq).numpy()), rtol=2e-5)
    np.testing.assert_allclose(np.sort(layer.turn_T), np.sort(torch.cat(turn).numpy()), atol=2e-6)
    assert layer.turn_T.max() > 0.01
    on_diagonal = [0, 4, 7, 9]
    np.testing.assert_allclose(
        np.sort(layer.gram_TU[:, on_diagonal].sum(1)), np.sort(torch.cat(trace).numpy()), rtol=2e-4
    )
    assert len(layer) == data.num_tokens


def test_statistics_are_the_same_with_and_without_a_sample(
    folder: Path, text: str, observed: Path, tmp_path: Path
) -> None:
    observation(folder, text, reroute=None).write(tmp_path / "s.safetensors")
    assert (tmp_path / "s.safetensors").read_bytes() == observed.read_bytes()


def in_waves(folder: Path, text: str, share: int) -> Observation:
    probe = observation(folder, text)
    budget = max(batch.input_ids_BT.size for batch in probe.batches) * module.bytes_per_token(probe.model)
    return observation(folder, text, run=replace(RUN, activation_budget=share * budget))


def test_a_sample_does_not_depend_on_waves_nor_interruptions_to_the_bit(
    folder: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.TOKENS_PER_BATCH, "cpu", 200)
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    observation(folder, text).write(whole)

    def stop(task: str, done: float, total: float, unit: str) -> None:
        if done / total > 0.6:
            raise KeyboardInterrupt

    assert len(in_waves(folder, text, 1).waves) > 2
    with pytest.raises(KeyboardInterrupt):
        in_waves(folder, text, 1).write(resumed, progress=stop)
    assert not beside(resumed).exists() and not resumed.exists()
    assert Statistics.load(Path(f"{resumed}.unfinished"), unfinished=True).finished_batches > 0
    in_waves(folder, text, 2).write(resumed)
    assert beside(resumed).read_bytes() == beside(whole).read_bytes()
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in (whole, resumed, beside(whole), beside(resumed))
    )


def test_a_run_that_died_between_sample_and_statistics_is_gone_on_with(
    folder: Path, text: str, observed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(Statistics, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            observation(folder, text).write(path)
    assert beside(path).exists() and not path.exists()
    observation(folder, text).write(path)
    assert beside(path).read_bytes() == beside(observed).read_bytes()


def test_another_runs_sample_is_not_gone_on_with(folder: Path, text: str, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    Path(f"{beside(path)}.unfinished").write_bytes(b"something else")
    with pytest.raises(DataError, match="holds the sample of an interrupted run on another model, text or settings"):
        observation(folder, text).write(path)


def test_sums_without_the_sample_that_belongs_to_them_are_not_gone_on_with(
    folder: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.TOKENS_PER_BATCH, "cpu", 200)
    path = tmp_path / "s.safetensors"

    def stop(task: str, done: float, total: float, unit: str) -> None:
        if done / total > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_waves(folder, text, 1).write(path, progress=stop)
    Path(f"{beside(path)}.unfinished").unlink()
    with pytest.raises(DataError, match="the sample of tokens that belongs to them is missing"):
        in_waves(folder, text, 1).write(path)


def test_a_disk_without_room_is_said_before_anything_is_observed(
    folder: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Full", (), {"f_bavail": 1, "f_frsize": 4096})
    monkeypatch.setattr("reapkit.samples.os.statvfs", lambda _: full)
    with pytest.raises(OutputError, match=r"the sample of 300 tokens takes 0\.\d MB in .*, and 0\.0 MB are free"):
        observation(folder, text).write(tmp_path / "s.safetensors")


@pytest.mark.parametrize("name", ["s.reroute.safetensors", "s.reroute.safetensors.unfinished"])
def test_a_sample_that_is_there_needs_no_room_again(
    folder: Path, text: str, observed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    full = type("Full", (), {"f_bavail": 1, "f_frsize": 4096})
    monkeypatch.setattr("reapkit.samples.os.statvfs", lambda _: full)
    shutil.copyfile(beside(observed), tmp_path / name)
    header = observation(folder, text).sample_header()
    require_space(tmp_path / "s.reroute.safetensors", header)
    with pytest.raises(OutputError, match="the sample of 300 tokens takes"):
        require_space(tmp_path / "s.reroute.safetensors", replace(header, seed=1))


def test_the_estimated_size_of_the_sample_is_right(folder: Path, text: str, observed: Path) -> None:
    assert observation(folder, text).estimate().reroute_bytes == beside(observed).stat().st_size
    assert observation(folder, text, reroute=None).estimate().reroute_bytes == 0


def test_the_size_that_the_documentation_names_is_that_of_minimax_m2() -> None:
    rule = Rule(256, 8, "sigmoid", True, 1.0, 0.0)
    source = Identity("somewhere", None, "layout", "routing", "weights")
    header = SampleHeader(source, {}, "digest", 0, ("a",), 32_768, 16, dict.fromkeys(range(62), rule))
    page = (Path(__file__).parents[1] / "docs/reroute.md").read_text(encoding="utf-8")
    assert f"{header.nbytes / 1e9:.2f} GB for MiniMax-M2" in page


# ---- what is refused


@pytest.mark.parametrize("change", [{"scoring": "softmax"}, {"scaling": 1.5}, {"normalise": False}])
def test_a_rule_that_is_not_the_models_is_refused(
    folder: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    right = rerouting.resolve_rule
    monkeypatch.setattr(rerouting, "resolve_rule", lambda *args: replace(right(*args), **change))
    with pytest.raises(
        UnsupportedError, match="cannot be measured for MiniMax-M2: the declared selection rule does not give"
    ):
        observation(folder, text).write(tmp_path / "s.safetensors")
    assert not (tmp_path / "s.safetensors").exists()


def test_a_rule_that_gives_the_models_coefficients_but_not_its_choices_is_refused(
    folder: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the selection bias others are best; the coefficients of those that the model chose stay what they are."""
    right = rerouting.scores_of
    monkeypatch.setattr(rerouting, "scores_of", lambda rule, logits_NE, bias_E: right(rule, logits_NE, None))
    with pytest.raises(
        UnsupportedError, match=r"the declared selection rule does not give .* for [\d,]+ tokens of layer 0"
    ):
        observation(folder, text).write(tmp_path / "s.safetensors")


def test_too_few_candidates_are_refused(folder: Path, text: str) -> None:
    with pytest.raises(UsageError, match="--reroute-candidates 2 are too few: each token is routed to 2 experts"):
        observation(folder, text, reroute=Reroute(100, 2))


def test_a_sample_of_other_text_is_refused(folder: Path, text: str, observed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    observation(folder, write_jsonl(tmp_path / "text.jsonl", text_rows(9, seed=3)), reroute=None).write(other)
    with pytest.raises(DataError, match="was gathered on another model, text or settings: other text"):
        plans.choose(other, criterion="reroute", ratio=0.25, sample=beside(observed))
    with pytest.raises(DataError, match="there is no sample of tokens") as caught:
        plans.choose(other, criterion="reroute", ratio=0.25)
    assert "--reroute-tokens" in str(caught.value.hint)
    with pytest.raises(UsageError, match="needs the sample of tokens beside the statistics' file"):
        plans.choose(Statistics.load(other), criterion="reroute", ratio=0.25)


def test_a_damaged_sample_is_refused(observed: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "s.safetensors"
    content = bytearray(beside(observed).read_bytes())
    damaged.write_bytes(content[:-4])
    with pytest.raises(DataError, match="is damaged or not a sample of tokens"):
        RoutedSamples.open(damaged)
    content[-4:] = np.float32("nan").tobytes()
    damaged.write_bytes(content)
    with pytest.raises(DataError, match="layer 2: the turn of a sampled token is not finite"):
        RoutedSamples.open(damaged).layer(2)


# ---- the command line


def test_compressing_by_rerouted_error_in_one_and_step_by_step_is_the_same(
    folder: Path, text: str, tmp_path: Path
) -> None:
    sample = ("--reroute-tokens", "300", "--reroute-candidates", "4", "--max-length", "48")
    statistics = tmp_path / "s.safetensors"
    assert run("observe", folder, "--data", text, "-o", statistics, *sample).exit_code == 0
    planned = run("plan", statistics, "--criterion", "reroute", "--ratio", "0.25", "-o", tmp_path / "plan.json")
    assert planned.exit_code == 0 and "predicted error" in planned.stdout
    chosen = ("--criterion", "reroute", "--ratio", "0.25", "-o", tmp_path / "out")
    done = run("compress", folder, "--data", text, *chosen, *sample)
    assert done.exit_code == 0, done.stderr
    described = json.loads((tmp_path / "out/reapkit/plan.json").read_text())
    assert described == json.loads((tmp_path / "plan.json").read_text())
    assert (described["criterion"], described["options"]) == ("reroute", {"weights": "residual"})
    assert beside(tmp_path / "out/reapkit/statistics.safetensors").read_bytes() == beside(statistics).read_bytes()


def test_weights_change_the_errors_and_unknown_ones_are_named(observed: Path) -> None:
    errors = {
        weights: plans.choose(observed, criterion="reroute", keep=4, weights=weights).eliminations[1].error
        for weights in ("residual", "plain", "relative", "plain-balanced")
    }
    assert len(set(errors.values())) == len(errors)
    with pytest.raises(UsageError, match="there are no weights 'resid'"):
        plans.plan(observed, criterion="reroute", keep=4, weights="resid")
