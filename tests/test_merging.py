"""Merging baselines: hand-computed groups, neurons matched without changing a function, checkpoints that load and can be verified."""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from families import FAMILIES, NUM_LAYERS, Family, make
from reapkit import clusters, merging, observe, plans, prune, reporting, shards, similarity, verify
from reapkit import layout as layouts
from reapkit import observation as observations
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint
from reapkit.cli import app
from reapkit.clusters import METHODS, Group, Merging, Similarity
from reapkit.errors import CheckpointError, DataError, OutputError, PlanError, UnsupportedError, UsageError
from reapkit.layout import Identity
from reapkit.merging import match_neurons, merge
from reapkit.modules import StreamedModel, SuspendedForwards
from reapkit.neurons import ExpertTensors, encode_orders, read_orders
from reapkit.observation import Observation, Run
from reapkit.plans import PruningPlan
from reapkit.quantization import read_format
from reapkit.reporting import Evidence
from reapkit.shards import Manifest
from reapkit.similarity import Similarities, measure
from reapkit.statistics import LayerStatistics
from streaming import full_logits, full_model, streamed_logits, streamed_model, text_rows, token_batches, write_jsonl

RUN = Run(device="cpu", dtype="float32")
every_method = pytest.mark.parametrize("method", list(METHODS))


def statistics_of(count_E: list[float], gated_E: list[float] | None = None) -> LayerStatistics:
    """One row of sums, in which mean gated norms are `gated_E`."""
    layer = LayerStatistics.zeros(1, len(count_E))
    layer.count_SE[0] = count_E
    layer.gated_norm_SE[0] = np.array(count_E) * np.array(gated_E or [1.0] * len(count_E))
    return layer


def similarity_of(output_ED: Any, logits_NE: Any | None = None) -> Similarity:
    output_ED = np.array(output_ED, dtype=float)
    logits_NE = np.eye(len(output_ED)) if logits_NE is None else np.array(logits_NE, dtype=float)
    return Similarity(len(logits_NE), output_ED, output_ED, logits_NE.T @ logits_NE, np.zeros((1, 1), dtype=np.float32))


# ---- groups by hand


def test_average_linkage_joins_what_is_closest_on_average() -> None:
    at = np.array([0.0, 1.0, 3.0, 7.0])
    distance = np.abs(at[:, None] - at)
    # 0 and 1 first; then {0, 1} to 3 is (3 + 2) / 2 = 2.5, closer than 3 to 7.
    assert clusters.average_linkage(distance, 3) == [[0, 1], [2], [3]]
    assert clusters.average_linkage(distance, 2) == [[0, 1, 2], [3]]
    assert clusters.average_linkage(distance, 4) == [[0], [1], [2], [3]]


def test_average_linkage_equals_scipys() -> None:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist, squareform

    points = np.random.default_rng(0).normal(size=(24, 5))
    for keep in (3, 11, 20):
        labels = fcluster(linkage(pdist(points), "average"), keep, "maxclust")
        wanted = sorted([int(i) for i in np.flatnonzero(labels == label)] for label in set(labels))
        assert sorted(clusters.average_linkage(squareform(pdist(points)), keep)) == wanted


def test_hc_smoe_weighs_by_frequency_and_takes_the_member_in_the_middle_as_centre() -> None:
    layer, similar = statistics_of([3, 1, 4, 9]), similarity_of([[0.0], [1.0], [1.6], [9.0]])
    groups = clusters.merge_layer(METHODS["hc-smoe"], layer, similar, keep=2)
    # The mean output of {0, 1, 2} is 0.87, closest to that of expert 1.
    assert groups == (Group((1, 0, 2), (1 / 8, 3 / 8, 4 / 8)), Group((3,), (1.0,)))


def test_m_smoe_keeps_the_most_frequent_and_joins_the_rest_by_router_logits() -> None:
    logits = [[1.0, 0.9, 0.0, 0.1], [0.0, 0.2, 1.0, 0.8]]
    layer = statistics_of([6, 2, 5, 0])
    groups = clusters.merge_layer(METHODS["m-smoe"], layer, similarity_of(np.eye(4), logits), keep=2)
    assert groups == (Group((0, 1), (0.75, 0.25)), Group((2, 3), (1.0, 0.0)))


def test_ream_fills_the_groups_of_the_most_salient_first_and_never_beyond_sixteen() -> None:
    layer = statistics_of([1.0] * 20, [20.0 - i for i in range(20)])
    similar = similarity_of(np.ones((20, 1)), np.ones((2, 20)))
    groups = clusters.merge_layer(METHODS["ream"], layer, similar, keep=3)
    # All are equally similar, so the lowest numbers come first: 15 join expert 0, the other 2 expert 1.
    assert [group.members for group in groups] == [(0, *range(3, 18)), (1, 18, 19), (2,)]
    np.testing.assert_allclose(groups[1].weights, np.array([19.0, 2.0, 1.0]) / 22)
    with pytest.raises(PlanError, match="1 groups of at most 16 experts do not hold 20"):
        clusters.merge_layer(METHODS["ream"], layer, similar, keep=1)


def test_ream_takes_the_mean_of_both_similarities() -> None:
    # Expert 2's outputs are like expert 0's (cosine 1), its logits like expert 1's (distance 0 against sqrt 2).
    layer = statistics_of([1, 1, 1], [3.0, 2.0, 1.0])
    similar = similarity_of([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    # With 0: (1 + (1 - sqrt 2 / 2)) / 2 = 0.646; with 1: (0.5 + 1) / 2 = 0.75; but expert 0 chooses first.
    assert clusters.pseudo_prune(layer, similar, 2) == [[0, 2], [1]]
    layer = statistics_of([1, 1, 1], [2.0, 3.0, 1.0])
    assert clusters.pseudo_prune(layer, similar, 2) == [[1, 2], [0]]


@every_method
def test_every_expert_is_in_one_group_and_router_groups_keep_equally_many(method: str) -> None:
    rng = np.random.default_rng(1)
    layer = statistics_of(list(rng.integers(0, 9, 16).astype(float)), list(rng.random(16)))
    similar = similarity_of(rng.normal(size=(16, 6)), rng.normal(size=(40, 16)))
    groups = clusters.merge_layer(METHODS[method], layer, similar, keep=8, num_groups=4)
    assert sorted(member for group in groups for member in group.members) == list(range(16))
    assert [group.centre // 4 for group in groups] == [0, 0, 1, 1, 2, 2, 3, 3]
    for group in groups:
        assert {member // 4 for member in group.members} == {group.centre // 4}
        assert sum(group.weights) == pytest.approx(1.0)


@every_method
def test_experts_that_were_never_routed_count_the_same(method: str) -> None:
    groups = clusters.merge_layer(METHODS[method], statistics_of([0.0] * 4), similarity_of(np.eye(4)), keep=2)
    for group in groups:
        assert group.weights == tuple([1 / len(group.members)] * len(group.members))


def test_unknown_methods_and_routers_are_refused() -> None:
    with pytest.raises(UsageError, match="there is no method 'reem'") as caught:
        clusters.method_of("reem")
    assert caught.value.hint == "did you mean 'ream'?"
    with pytest.raises(UsageError, match="--router 'center'"):
        clusters.method_of("ream", "center")


# ---- every layout


LAYOUTS = ("MiniMax-M2", "Qwen3-VL-MoE", "Qwen3.5-MoE", "DeepSeek-V3", "ERNIE-4.5", "gpt-oss", "Granite-MoE", "Nemotron-3", "Step-3.7",
           "LongCat-Flash", "DBRX", "Gemma-4")  # fmt: skip


@pytest.fixture(
    scope="module", params=[family for family in FAMILIES if family.name in LAYOUTS], ids=lambda family: family.name
)
def paired(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    """A family's checkpoint in which every odd expert is the one before it with its neurons in another order."""
    family: Family = request.param
    folder = tmp_path_factory.mktemp("families") / "original"
    model = make(family, folder)
    for module in model.modules():
        permute_odd_experts(family, module)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    config = (folder / "config.json").read_bytes()
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "config.json").write_bytes(config)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if family.finish is not None:
        family.finish(folder)
    return family, tiny.add_tokenizer(folder)


def permute_odd_experts(family: Family, module: Any) -> None:
    """In memory, by the shapes of transformers' own modules: [E, 2I, D], [E, D, 2I], with gates and ups in halves or side by side."""
    width, count = 24, family.num_experts
    order = torch.randperm(width, generator=torch.Generator().manual_seed(1))
    side_by_side = torch.stack((2 * order, 2 * order + 1), 1).reshape(-1)
    both = side_by_side if family.name == "gpt-oss" else torch.cat((order, width + order))
    for name, parameter in module.named_parameters(recurse=False):
        if name in ("w1", "v1", "w2") and len(parameter) == count * width:  # DBRX
            rows = parameter.view(count, width, -1)
            rows[1::2] = rows[::2][:, order]
        elif name == "down_proj_bias":
            parameter[1::2] = parameter[::2].clone()
        elif len(parameter) in (count, count + family.num_zero_experts) and (
            parameter.ndim == 3 or name == "gate_up_proj_bias"
        ):
            axis = next(i for i, size in enumerate(parameter.shape) if i and size in (width, 2 * width))
            index = both if parameter.shape[axis] == 2 * width else order
            parameter[1:count:2] = parameter[0:count:2].index_select(axis, index)


@every_method
def test_merging_an_expert_with_a_permuted_copy_of_itself_is_the_identity(
    paired: tuple[Family, Path], method: str, tmp_path: Path
) -> None:
    """The merged model computes what the one computes that keeps the even experts alone."""
    _, folder = paired
    checkpoint = Checkpoint.open(folder)
    layout = layouts.resolve(checkpoint, ARCHITECTURES)
    groups = tuple(Group((expert, expert + 1), (0.25, 0.75)) for expert in range(0, layout.num_experts, 2))
    merging = Merging(method, "centre", dict.fromkeys(layout.layer_indices, groups), 1, "")
    inputs = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    similar = {index: replace(similarity_of(np.eye(2)), inputs_ND=inputs) for index in layout.layer_indices}
    orders = match_neurons(checkpoint, layout, read_format(checkpoint), merging, similar)
    kept = merging.kept
    plan = PruningPlan(Identity.of(checkpoint, layout), method, layout.num_experts, layout.top_k, kept)
    shards.write(checkpoint, layout, plan, tmp_path / "pruned")
    content, digest = encode_orders(orders)
    merging = replace(merging, alignment=digest if orders else "")
    shards.write(checkpoint, layout, plan, tmp_path / "merged", merging=merging, orders=orders)
    if orders:
        (tmp_path / "merged/reapkit/alignment.safetensors").write_bytes(content)
    assert verify(tmp_path / "merged").problems == ()
    pruned, merged = tiny.load_tensors(tmp_path / "pruned"), tiny.load_tensors(tmp_path / "merged")
    assert pruned.keys() == merged.keys()
    apart = max(float((pruned[name].float() - merged[name].float()).abs().max()) for name in pruned)
    if METHODS[method].alignment is None:
        assert apart > 0.1  # averaged as they lie, they are not the same
    else:
        assert apart < 1e-6


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", text_rows(12))


@dataclass(frozen=True)
class Ready:
    """A checkpoint with a tokenizer, its statistics and the similarity of its experts."""

    folder: Path
    statistics: Path
    similar: Similarities
    text: str

    def merge(self, out: Path, method: str, **options: Any) -> Manifest:
        options = {"ratio": 0.375} | options
        return merge(
            self.folder, self.statistics, out, method=method, data=[self.text], run=RUN, tokens=100, measured=self.similar, **options
        )  # fmt: skip


@pytest.fixture(scope="module", params=["m2", "m2_fp8", "qwen3"])
def ready(request: pytest.FixtureRequest, text: str, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    folder = tmp_path_factory.mktemp("ready")
    shutil.copytree(request.getfixturevalue(request.param), folder / "source")
    tiny.add_tokenizer(folder / "source")
    observe(folder / "source", [text], run=RUN).save(folder / "statistics.safetensors")
    observation = Observation(folder / "source", [text], run=RUN, max_length=2048, seed=0)
    return Ready(folder / "source", folder / "statistics.safetensors", measure(observation, tokens=100), text)


def merged_in_memory(model: Any, groups: dict[int, tuple[Group, ...]], orders: dict[int, Any]) -> Any:
    """A model that transformers loaded whole, with every group's first expert replaced by the average and the others never chosen."""
    for layer, module in enumerate(model.model.layers):
        if layer not in groups:
            continue
        experts = module.mlp.experts
        width = experts.down_proj.shape[2]
        gate, up = experts.gate_up_proj.clone().split(width, dim=1)
        down = experts.down_proj.clone()
        for group in groups[layer]:
            at = [orders[layer][member] if layer in orders else np.arange(width) for member in group.members]
            for target, start in ((gate, 0), (up, width)):
                rows = sum(w * target[m][a] for m, w, a in zip(group.members, group.weights, at, strict=True))
                experts.gate_up_proj[group.centre, start : start + width] = rows
            columns = sum(w * down[m][:, a] for m, w, a in zip(group.members, group.weights, at, strict=True))
            experts.down_proj[group.centre] = columns
        kept = [group.centre for group in groups[layer]]
        experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj[kept])
        experts.down_proj = torch.nn.Parameter(experts.down_proj[kept])
        experts.num_experts = len(kept)
        module.mlp.gate.weight = torch.nn.Parameter(module.mlp.gate.weight[kept])
        if hasattr(module.mlp, "e_score_correction_bias"):
            module.mlp.e_score_correction_bias = module.mlp.e_score_correction_bias[kept]
    return model


def test_the_report_of_a_merged_output_says_so_and_how_to_merge_again(ready: Ready, tmp_path: Path) -> None:
    manifest = ready.merge(tmp_path / "out", "hc-smoe")
    assert manifest.merging is not None
    page = reporting.render(Evidence.gather(tmp_path / "out", ready.statistics)).decode()
    assert "experts per layer are left, averages of groups by <code>hc-smoe</code>. No other weight was changed" in page
    found = Evidence.gather(tmp_path / "out", ready.statistics)
    *_, command = reporting._commands(found)
    again = [f"reapkit merge {ready.folder} statistics.safetensors --method hc-smoe --keep 5",
             f"--router {manifest.merging.router} --data {ready.text} --max-length 2048 --dtype float32 --seed 0",
             f"--tokens {manifest.merging.tokens} -o out"]  # fmt: skip
    assert command == " ".join(again)


@every_method
def test_a_merged_checkpoint_computes_what_merging_in_memory_does_and_loads_with_no_missing_or_unexpected_key(
    ready: Ready, method: str, tmp_path: Path
) -> None:
    manifest = ready.merge(tmp_path / "out", method)
    assert manifest.merging is not None and manifest.after.num_experts == 5
    assert any(len(group.members) > 1 for groups in manifest.merging.groups.values() for group in groups)
    assert verify(tmp_path / "out").problems == ()
    card = (tmp_path / "out/README.md").read_text()
    assert (
        "with the 8 experts of every MoE layer merged into 5" in card
        and f"- **Compression method**: expert merging by {method}" in card
    )
    assert "- merged\n" in card and "removed" not in card and "What was kept" not in card
    orders = read_orders(tmp_path / "out", manifest.merging, 8)
    assert bool(orders) == (METHODS[method].alignment is not None)
    folder = ready.folder
    if manifest.dequantized:  # averages are those of the values that --dequantize writes, rounded once
        folder = tmp_path / "dequantized"
        prune(ready.folder, plans.plan(ready.statistics, ratio=0), folder, dequantize=True)
    with torch.no_grad():
        whole = merged_in_memory(full_model(folder), dict(manifest.merging.groups), orders)
        for parameter in whole.parameters() if manifest.dequantized else ():
            if parameter.ndim == 3:
                parameter.copy_(parameter.bfloat16())
    inputs = token_batches()
    for wanted, found in zip(
        full_logits(whole, inputs), streamed_logits(streamed_model(tmp_path / "out"), inputs), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


@every_method
def test_keeping_all_experts_is_the_identity(ready: Ready, method: str, tmp_path: Path) -> None:
    """Of an unquantised checkpoint byte for byte, of a quantised one what dequantising leaves."""
    manifest = ready.merge(tmp_path / "out", method, ratio=0)
    prune(ready.folder, plans.plan(ready.statistics, ratio=0), tmp_path / "pruned", dequantize=manifest.dequantized)
    wanted, found = tiny.load_tensors(tmp_path / "pruned"), tiny.load_tensors(tmp_path / "out")
    assert wanted.keys() == found.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items()
    )
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "pruned/config.json").read_bytes()


def test_similarity_is_what_plain_hooks_see(ready: Ready) -> None:
    model = full_model(ready.folder)
    observation = Observation(ready.folder, [ready.text], run=RUN, max_length=2048, seed=0)
    assert 100 <= ready.similar.tokens < 200
    wanted: dict[int, list[torch.Tensor]] = {layer: [] for layer in ready.similar.layers}
    hooks = [
        model.model.layers[layer].mlp.register_forward_pre_hook(
            lambda module, args, layer=layer: wanted[layer].append(args[0][0])
        )
        for layer in wanted
    ]
    documents = observation.data.documents
    by_domain = [
        [document for document in documents if document.domain == domain] for domain in observation.data.domains
    ]
    count = 0
    for pair in itertools.zip_longest(*by_domain):  # documents of the domains in turn
        for document in pair:
            if document is not None and count < 100:
                count += len(document.input_ids)
                full_logits(model, [document.input_ids.astype(np.int64)[None]])
    for hook in hooks:
        hook.remove()
    for layer, inputs in wanted.items():
        hidden, similar, mlp = torch.cat(inputs), ready.similar.layers[layer], model.model.layers[layer].mlp
        assert len(hidden) == similar.tokens
        logits = hidden @ mlp.gate.weight.T
        score = logits.sigmoid() if hasattr(mlp, "e_score_correction_bias") else logits.softmax(-1)
        np.testing.assert_allclose(similar.gram_EE, (logits.T @ logits).detach(), rtol=1e-4, atol=1e-3)
        for expert in range(8):
            gate, up = (hidden @ mlp.experts.gate_up_proj[expert].T).chunk(2, dim=1)
            out = (torch.nn.functional.silu(gate) * up) @ mlp.experts.down_proj[expert].T
            np.testing.assert_allclose(similar.output_ED[expert], out.mean(0).detach(), rtol=1e-3, atol=1e-5)
            gated = (score[:, expert : expert + 1] * out).mean(0)
            np.testing.assert_allclose(similar.gated_ED[expert], gated.detach(), rtol=1e-3, atol=1e-5)


def test_similarity_is_measured_within_the_activation_budget_to_the_same_numbers(
    small: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(observations.TOKENS_PER_BATCH, "cpu", 64)
    held = 64 * observations.HELD_STATES * 64 * 4  # of one micro-batch: hidden size 64, float32
    observation = Observation(
        small.folder, [small.text], run=replace(RUN, activation_budget=held), max_length=32, seed=0
    )
    most = 0

    class Counting(SuspendedForwards):
        def __init__(self, model: Any, inputs: Any, **options: Any) -> None:
            nonlocal most
            most = max(most, sum(ids_BT.size for ids_BT in inputs))
            super().__init__(model, inputs, **options)

    monkeypatch.setattr(similarity, "SuspendedForwards", Counting)
    found = measure(observation, tokens=300)
    assert 0 < most <= 64 < found.tokens
    observation = Observation(small.folder, [small.text], run=RUN, max_length=32, seed=0)
    wanted = measure(observation, tokens=300)
    assert most > 64
    for index, layer in wanted.layers.items():
        for name in ("output_ED", "gated_ED", "gram_EE", "inputs_ND"):
            np.testing.assert_array_equal(getattr(found.layers[index], name), getattr(layer, name))


def test_router_rows_and_biases_are_averaged_where_that_is_asked_for(ready: Ready, tmp_path: Path) -> None:
    manifest = ready.merge(tmp_path / "out", "m-smoe", router="average")
    assert manifest.merging is not None and verify(tmp_path / "out").problems == ()
    before, after = tiny.load_tensors(ready.folder), tiny.load_tensors(tmp_path / "out")
    routers = [name for name in before if name.endswith((".gate.weight", "e_score_correction_bias"))]
    assert routers
    for name in routers:
        for place, group in enumerate(manifest.merging.groups[int(name.split(".")[2])]):
            rows = sum(w * before[name][m].double() for m, w in zip(group.members, group.weights, strict=True))
            torch.testing.assert_close(after[name][place].double(), rows, rtol=1e-6, atol=1e-7)


# ---- promises


@pytest.fixture(scope="module")
def small(m2: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(m2, folder / "source")
    tiny.add_tokenizer(folder / "source")
    observe(folder / "source", [text], run=RUN).save(folder / "statistics.safetensors")
    observation = Observation(folder / "source", [text], run=RUN, max_length=2048, seed=0)
    return Ready(folder / "source", folder / "statistics.safetensors", measure(observation, tokens=100), text)


def test_a_repeated_command_measures_nothing_again_and_writes_the_same_bytes(
    small: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"method": "ream", "keep": 5, "data": [small.text], "run": RUN, "tokens": 100}
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_shard", lambda *arguments: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OutputError, match="the disk is full"):
            merge(small.folder, small.statistics, out, **options)
    assert (out / "reapkit.unfinished.json").exists() and (out / "reapkit/similarity.safetensors").exists()
    monkeypatch.setattr(similarity, "measure", lambda *arguments, **named: pytest.fail("measured again"))
    merge(small.folder, small.statistics, out, **options)
    assert verify(out).problems == ()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    merge(small.folder, small.statistics, out, **options)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    small.merge(tmp_path / "other", "ream", ratio=None, keep=5)
    for path in before:
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    with pytest.raises(OutputError, match="not empty"):
        merge(small.folder, small.statistics, out, **options | {"method": "m-smoe"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content[:-1], "is damaged or does not hold the similarity of experts: .* is truncated"),
        (lambda content: b"\0" * 16, "is damaged or does not hold the similarity"),
        (lambda content: content.replace(b"reapkit-similarity-1", b"reapkit-similarity-9"), "it has no 'reapkit-similarity-1'"),
        (lambda content: content.replace(b"tokens", b"tokans"), "it has no 'tokens'"),
        (lambda content: content.replace(b"seed", b"sead"), "it has no 'seed'"),
        (lambda content: content.replace(b"sources", b"sourses"), "it has no 'sources'"),
        (lambda content: content.replace(b'"{\\"digest', b'"[\\"digest'), "its description is not valid JSON"),
        (lambda content: content.replace(b"layers.1.gram_EE", b"layers.1.gram_EF"), "'layers.1.gram_EF' is nothing that belongs there"),
        (lambda content: content.replace(b"layers.1.gram_EE", b"layers.9.gram_EE"), r"layers\.1\.gram_EE is missing"),
        (lambda content: content.replace(b"[8,64]", b"[64,8]"), r"gram_EE of layer 0 is float64 \[8, 8\], not float64 \[64, 64\]"),
        (lambda content: content[:-8] + np.float64("nan").tobytes(), "of layer . holds a value that is not finite"),
    ],
    ids=["short", "no tensors", "another format", "no size", "no seed", "no sources", "no JSON", "a stranger", "a gap", "shapes", "NaN"],
)  # fmt: skip
def test_a_damaged_similarity_is_refused_with_what_is_wrong_with_it(
    small: Ready, tmp_path: Path, change: Callable[[bytes], bytes], sentence: str
) -> None:
    path = tmp_path / "out/reapkit/similarity.safetensors"
    small.similar.save(path)
    assert Similarities.load(path).settings == small.similar.settings
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=sentence) as caught:
        merge(small.folder, small.statistics, tmp_path / "out", method="ream", keep=5, data=[small.text], run=RUN)
    assert caught.value.hint == "remove it and repeat the command, which measures it again"


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize("other", ["a pruned checkpoint", "another method", "other text", "another sample"])
def test_a_folder_with_another_output_is_refused_before_anything_is_measured_and_left_as_it_is(
    small: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str, is_finished: bool
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"method": "ream", "keep": 5, "data": [small.text], "run": RUN, "tokens": 100}
    with monkeypatch.context() as patch:
        if not is_finished:
            patch.setattr(shards, "_write_shard", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with nullcontext() if is_finished else pytest.raises(OutputError, match="the disk is full"):
            if other == "a pruned checkpoint":
                prune(small.folder, plans.plan(small.statistics, keep=5), out)
            else:
                merge(small.folder, small.statistics, out, **options)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    options |= {"another method": {"method": "m-smoe"}, "another sample": {"tokens": 60}}.get(other, {})
    if other == "other text":
        options["data"] = [write_jsonl(tmp_path / "text.jsonl", text_rows(9, seed=5))]
    refused = {
        "a pruned checkpoint": "is not empty" if is_finished else "holds the unfinished output of another command",
        "another method": "is not empty" if is_finished else r"of another command \(other merging\)",
        "other text": "was measured on another model, text or settings: other text",
        "another sample": "was measured on another model, text or settings: other sample",
    }
    monkeypatch.setattr(similarity, "measure", lambda *arguments, **named: pytest.fail("measured"))
    monkeypatch.setattr(merging, "match_neurons", lambda *arguments, **named: pytest.fail("matched"))
    with pytest.raises((OutputError, DataError), match=refused[other]):
        merge(small.folder, small.statistics, out, **options)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_reports_command_merges_on_the_same_text_to_the_same_bytes(small: Ready, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", text_rows(9, seed=5))
    text: dict[str, Any] = {"data": [f"{other}:6"], "tokens": 60, "max_length": 40, "seed": 3}
    merge(small.folder, small.statistics, tmp_path / "out", method="ream", keep=5, run=RUN, **text)
    *_, command = reporting._commands(Evidence.gather(tmp_path / "out", small.statistics))
    words = shlex.split(command.replace(" statistics.safetensors ", f" {small.statistics} "))
    assert words[0] == "reapkit" and words[-2:] == ["-o", "out"]
    result = CliRunner().invoke(app, [*words[1:-1], str(tmp_path / "again"), "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    assert Manifest.load(tmp_path / "again") == Manifest.load(tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def in_merging(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["merging"].update(entries)


def in_group(**entries: Any) -> Callable[[dict[str, Any]], None]:
    """Of the first group of layer 1, which has two members or more."""

    def change(manifest: dict[str, Any]) -> None:
        first = next(group for group in manifest["merging"]["groups"]["1"] if len(group["members"]) > 1)
        first |= {name: value(first[name]) if callable(value) else value for name, value in entries.items()}

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda manifest: manifest.pop("merging"), "KeyError 'merging'"),
        (lambda manifest: manifest.update(merging=[]), r"\[\] is not a table"),
        (lambda manifest: manifest.update(merging="ream"), "'ream' is not a table"),
        (lambda manifest: manifest["merging"].pop("groups"), "KeyError 'groups'"),
        (lambda manifest: manifest["merging"].pop("digest"), "KeyError 'digest'"),
        (lambda manifest: manifest["merging"]["groups"].pop("1"), r"in the layers \[0, 1, 2\] and merged in \[0, 2\]"),
        (lambda manifest: manifest["merging"]["groups"].update({"1": []}), "layer 1 do not hold every expert once"),
        (lambda manifest: manifest["merging"]["groups"].update({"x": []}), "invalid literal"),
        (lambda manifest: manifest["merging"]["groups"]["1"].pop(), "layer 1"),
        (lambda manifest: manifest["before"].update(num_experts=9), "layer 0 do not hold 9 experts"),
        (lambda manifest: manifest["kept"]["1"].reverse(), "layer 1 are not those of the kept experts"),
        (in_merging(method="reem"), "experts are not merged by 'reem'"),
        (in_merging(router="center"), "with routers by 'center'"),
        (in_merging(method=["ream"]), r"\['ream'\] is not a string"),
        (in_merging(groups=[1]), r"\[1\] is not a table"),
        (in_merging(groups={"1": {}}), r"\{\} is not a list"),
        (in_merging(groups={"1": [7]}), "7 is not a table"),
        (in_merging(tokens=-1), "-1 is not a whole number from 0"),
        (in_merging(tokens=1.5), "1.5 is not a whole number"),
        (in_merging(digest=None), "None is not a string"),
        (in_merging(alignment=7), "7 is not a string"),
        (in_group(members=[]), "is no group of experts"),
        (in_group(members="01"), "'01' is not a list"),
        (in_group(members=lambda members: [*members[:-1], -1]), "-1 is not a whole number"),
        (in_group(members=lambda members: [*members[:-1], 1.5]), "1.5 is not a whole number"),
        (in_group(members=lambda members: [*members[:-1], 8]), "layer 1 do not hold every expert once"),
        (in_group(members=lambda members: [*members[:-1], members[0]]), "layer 1 do not hold every expert once"),
        (in_group(weights=lambda weights: weights[:-1]), "is no group of experts with a share for each"),
        (in_group(weights=lambda weights: [2.0] * len(weights)), "is no group of experts"),
        (in_group(weights=lambda weights: [0.25] + [0.0] * (len(weights) - 1)), "is no group of experts"),
        (in_group(weights=lambda weights: [None] * len(weights)), "is no group of experts"),
    ],
)  # fmt: skip
def test_a_manifest_whose_merging_is_damaged_is_refused_with_what_is_wrong_with_it(
    small: Ready, tmp_path: Path, change: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    source = small.folder.with_name("merged")
    if not source.exists():
        small.merge(source, "hc-smoe")
    described = tiny.read_json(source / "reapkit.json")
    change(described)
    tiny.write_json(tmp_path / "reapkit.json", described)
    with pytest.raises(CheckpointError, match=rf"reapkit.json in .* is damaged: .*{sentence}"):
        Manifest.load(tmp_path)


def damage(path: Path, name: str) -> None:
    tensors = load_file(path)
    tensors[name].reshape(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def test_verify_finds_a_changed_average_a_changed_copy_and_changed_groups(small: Ready, tmp_path: Path) -> None:
    manifest = small.merge(tmp_path / "out", "ream")
    assert manifest.merging is not None
    layer, groups = next(iter(manifest.merging.groups.items()))
    merged = next(place for place, group in enumerate(groups) if len(group.members) > 1)
    index = tiny.read_json(tmp_path / "out/model.safetensors.index.json")["weight_map"]
    for name, what in (
        (
            f"model.layers.{layer}.block_sparse_moe.experts.{merged}.w2.weight",
            "is not the average of the source's experts",
        ),
        ("model.embed_tokens.weight", "differs from"),
    ):
        shutil.copytree(tmp_path / "out", tmp_path / what[:3])
        damage(tmp_path / what[:3] / index[name], name)
        assert [what in problem for problem in verify(tmp_path / what[:3]).problems] == [True]
    described = tiny.read_json(tmp_path / "out/reapkit.json")
    members = described["merging"]["groups"][str(layer)][merged]["members"]
    members[1] = members[0]
    shutil.copytree(tmp_path / "out", tmp_path / "groups")
    tiny.write_json(tmp_path / "groups/reapkit.json", described)
    with pytest.raises(CheckpointError, match="do not hold every expert once"):
        verify(tmp_path / "groups")


def test_verify_wants_the_orders_that_the_experts_were_merged_with(small: Ready, tmp_path: Path) -> None:
    manifest = small.merge(tmp_path / "out", "m-smoe")
    path = tmp_path / "out/reapkit/alignment.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="has changed since"):
        verify(tmp_path / "out")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no reapkit/alignment\.safetensors"):
        verify(tmp_path / "out")
    assert manifest.merging is not None
    for broken, what in (
        (b"no tensors", "is damaged"),
        (encode_orders({0: np.zeros((8, 3), np.int32)})[0], "holds no order"),
    ):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=what):
            read_orders(tmp_path / "out", replace(manifest.merging, alignment=hashlib.sha256(broken).hexdigest()), 8)


def test_statistics_of_another_model_and_too_few_experts_are_refused(small: Ready, qwen3: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(qwen3, other)
    tiny.add_tokenizer(other)
    with pytest.raises(PlanError, match=r"the statistics are of .*, and .* has other routers"):
        merge(other, small.statistics, tmp_path / "out", method="ream", ratio=0.25, data=[small.text], run=RUN)
    with pytest.raises(PlanError, match="fewer than the 2"):
        small.merge(tmp_path / "out", "ream", ratio=None, keep=1)


def test_experts_that_run_by_code_of_their_own_are_refused(text: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "Llama-4 text")
    make(family, tmp_path / "llama")
    tiny.add_tokenizer(tmp_path / "llama")
    observation = Observation(tmp_path / "llama", [text], run=RUN, max_length=2048, seed=0)
    with pytest.raises(UnsupportedError, match="the experts of Llama-4 run by code of their own"):
        measure(observation, tokens=100)


def test_experts_whose_neurons_are_not_known_are_refused_where_they_must_be_matched(
    small: Ready, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(small.folder)
    layout = layouts.resolve(checkpoint, ARCHITECTURES)
    layer = layout.layers[0]
    renamed = tuple({rest.replace("w2", "other"): info for rest, info in parts.items()} for parts in layer.experts)
    with pytest.raises(UnsupportedError, match="where the neurons of layer 0's experts lie is not known"):
        ExpertTensors(checkpoint, layout, replace(layer, experts=renamed), read_format(checkpoint))
    more = tuple({**parts, ".extra.weight": parts[".w1.weight"]} for parts in layer.experts)
    with pytest.raises(UnsupportedError, match=r"whether '\.extra\.weight' of layer 0 leads into"):
        ExpertTensors(checkpoint, layout, replace(layer, experts=more), read_format(checkpoint))


def test_matching_neurons_needs_scipy_and_says_so(
    small: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UnsupportedError, match="needs the package scipy") as caught:
        small.merge(tmp_path / "out", "ream")
    assert caught.value.hint == "pip install 'reapkit[merge]'"


def test_mtp_layers_are_neither_run_nor_merged_and_keep_the_centres_of_the_last_layer(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = next(family for family in FAMILIES if family.name == "GLM-4.5")
    source = tmp_path / "source"
    make(family, source, mtp=True)
    tiny.add_tokenizer(source)
    statistics = observe(source, [text], run=RUN)
    monkeypatch.setattr(StreamedModel, "fetch_mtp", lambda model: pytest.fail("MTP layers were run"))
    manifest = merge(source, statistics, tmp_path / "out", method="m-smoe", ratio=0.25, data=[text], run=RUN, tokens=50)
    layer = max(manifest.kept)
    assert manifest.merging is not None and layer == NUM_LAYERS and layer not in manifest.merging.groups
    assert manifest.unmeasured == {layer: layer - 1} and manifest.kept[layer] == manifest.kept[layer - 1]
    *_, command = reporting._commands(Evidence.gather(tmp_path / "out"))
    assert command.endswith(f" --tokens 50 -o out --mtp same-as-layer-{layer - 1}")
    assert verify(tmp_path / "out").problems == ()
    before, after = tiny.load_tensors(source), tiny.load_tensors(tmp_path / "out")
    for place, centre in enumerate(manifest.kept[layer]):
        name = f"model.layers.{layer}.mlp.experts.{{}}.down_proj.weight"
        assert torch.equal(after[name.format(place)], before[name.format(centre)])


def test_the_command_merges_says_what_becomes_of_quantised_weights_and_lists_its_methods(
    m2_fp8: Path, text: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(m2_fp8, source)
    tiny.add_tokenizer(source)
    words = ["--data", text, "--device", "cpu"]
    run = CliRunner().invoke
    assert run(app, ["observe", str(source), *words, "-o", str(tmp_path / "s.safetensors")]).exit_code == 0
    arguments = [
        "merge",
        str(source),
        str(tmp_path / "s.safetensors"),
        *words,
        "--method",
        "hc-smoe",
        "--ratio",
        "0.25",
        "-o",
    ]
    dry = run(app, [*arguments, str(tmp_path / "out"), "--dry-run", "--json"])
    assert dry.exit_code == 0 and not (tmp_path / "out").exists()
    result = run(app, [*arguments, str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    assert "averages are not: everything is written in bf16" in result.stderr
    manifest = json.loads((tmp_path / "out/reapkit.json").read_text())
    assert json.loads(dry.stdout)["after"] == manifest["after"] and manifest["merging"]["method"] == "hc-smoe"
    assert "quantization_config" not in tiny.read_json(tmp_path / "out/config.json")
    assert run(app, ["verify", str(tmp_path / "out")]).exit_code == 0
    listed = json.loads(run(app, ["list", "methods", "--json"]).stdout)
    assert [row["method"] for row in listed] == list(METHODS)
    assert run(app, [*arguments[:-5], "--method", "reem", "--ratio", "0.25", "-o", str(tmp_path / "x")]).exit_code == 2
