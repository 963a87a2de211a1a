"""Every family through all of it: streaming, observing, pruning, reloading, against the model that transformers builds in memory.

The references know nothing of layouts: they find experts by the one dimension that is as long as there are experts, and routers by the
product that has as many outputs.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from families import FAMILIES, NUM_LAYERS, Family, make
from reapkit import layout as layouts
from reapkit import plans, prune, verify
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint
from reapkit.elimination import rerouted_error, token_weights
from reapkit.errors import UnsupportedError
from reapkit.modules import load_tokenizer
from reapkit.observation import Observation, Run, observe
from reapkit.plans import PruningPlan
from reapkit.rerouting import Reroute
from reapkit.samples import RoutedSamples
from reapkit.statistics import LayerStatistics
from streaming import streamed_logits, streamed_model, text_rows, token_batches, write_jsonl

RUN = Run(device="cpu", dtype="float32")


@dataclass(frozen=True)
class Built:
    """A family's checkpoint and the model in memory that it was written from."""

    family: Family
    folder: Path
    model: Any

    @property
    def num_experts(self) -> int:
        return self.family.num_experts


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    family: Family = request.param
    folder = tmp_path_factory.mktemp("families") / "original"
    model = make(family, folder)
    tiny.add_tokenizer(folder)
    return Built(family, folder, model)


@pytest.fixture(scope="module")
def plan(built: Built) -> PruningPlan:
    """A quarter of the experts goes, others in every layer."""
    return plans.plan(built.folder, criterion="random", ratio=0.25, seed=3)


@pytest.fixture(scope="module")
def pruned(built: Built, plan: PruningPlan) -> Path:
    out = built.folder.parent / "pruned"
    prune(built.folder, plan, out)
    return out


# ---- references


def logits(model: Any, inputs: list[np.ndarray[Any, Any]]) -> list[Tensor]:
    with torch.inference_mode():
        return [model(input_ids=torch.from_numpy(ids), use_cache=False).logits for ids in inputs]


def require_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        scale = other.abs().max()
        assert scale > 0.1, "logits so small that anything would agree"
        assert (one - other).abs().max() <= 2e-5 * scale


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return tiny.load_tensors(folder)


def sizes(family: Family) -> dict[int, tuple[int, int]]:
    """Sizes of dimensions that hold experts: how many entries, and how many of them are experts."""
    entries = {family.num_experts: (family.num_experts, family.num_experts)}
    if family.num_zero_experts:
        total = family.num_experts + family.num_zero_experts
        entries[total] = (total, family.num_experts)
    if family.expert_rows:
        entries[family.num_experts * family.expert_rows] = (family.num_experts, family.num_experts)
    return entries


def sliced(family: Family, tensors: dict[str, Tensor], kept_of: dict[int, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors that should be left: experts numbered anew, and every dimension of experts cut, wherever it is."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = family.layer_of(name)
        if layer not in kept_of:
            result[name] = tensor
            continue
        kept = list(kept_of[layer])
        if match := re.search(r"\.experts\.(\d+)\.", name):
            if int(match[1]) in kept:
                renumbered = f".experts.{kept.index(int(match[1]))}."
                result[name[: match.start()] + renumbered + name[match.end() :]] = tensor
            continue
        for axis, size in enumerate(tensor.shape):
            if size in (found := sizes(family)):
                entries, experts = found[size]
                parts = tensor.chunk(entries, dim=axis)
                tensor = torch.cat([parts[i] for i in [*kept, *range(experts, entries)]], dim=axis)
                break
        result[name] = tensor
    return result


def experts_modules(model: Any) -> dict[int, Any]:
    """The module of every MoE layer that is called with tokens, choices and coefficients, or with tokens alone."""
    found = {}
    for name, module in model.named_modules():
        if re.search(r"Experts$|^Llama4TextMoe$", type(module).__name__) and (m := re.search(r"\.(\d+)\.", name)):
            found.setdefault(int(m[1]), module)
    return found


@contextmanager
def masked_routers(built: Built, plan: PruningPlan) -> Iterator[None]:
    """The original in memory with dropped experts out of reach: their scores before any function are minus infinity."""
    real = torch.nn.functional.linear
    entries = built.num_experts + built.family.num_zero_experts
    stored = tensors_of(built.folder)
    routers = {
        built.family.layer_of(name): tensor
        for name, tensor in stored.items()
        if tensor.ndim == 2 and tensor.shape[0] == entries and built.family.layer_of(name) in plan.kept
    }

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result = real(inputs, weight, bias)
        if weight.shape[0] == entries:
            layer = next(layer for layer, router in routers.items() if torch.equal(router, weight.float()))
            assert layer is not None
            result = result.index_fill(-1, torch.tensor(plan.dropped(layer)), float("-inf"))
        return result

    biases = []
    for name, value in (*built.model.named_parameters(), *built.model.named_buffers()):
        if re.search(r"(correction_bias|expert_bias|router_bias)$", name):
            match = re.search(r"\.(\d+)\.", name)
            assert match is not None
            biases.append((value, value.detach().clone()))
            value.data = value.data.index_fill(-1, torch.tensor(plan.dropped(int(match[1]))), float("-inf"))
    torch.nn.functional.linear = linear
    try:
        yield
    finally:
        torch.nn.functional.linear = real
        for value, before in biases:
            value.data = before


def hooked_sums(modules: dict[int, Any], num_experts: int, run: Callable[[], object]) -> dict[int, LayerStatistics]:
    """Count, gate, norm and their products per expert, from hooks on eager experts: one choice at a time."""
    sums = {layer: LayerStatistics.zeros(1, num_experts) for layer in modules}

    def note(layer: int, choice: Tensor, gate: Tensor, norm: Tensor) -> None:
        into = sums[layer]
        for expert, g, n in zip(choice.tolist(), gate.tolist(), norm.tolist(), strict=True):
            if expert < num_experts:
                into.count_SE[0, expert] += 1
                into.gate_SE[0, expert] += g
                into.norm_SE[0, expert] += n
                into.norm_sq_SE[0, expert] += n * n
                into.gated_norm_SE[0, expert] += g * n
                into.gated_norm_sq_SE[0, expert] += (g * n) ** 2
                into.max_norm_E[expert] = max(into.max_norm_E[expert], n)

    def hook(layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if type(module).__name__ == "Llama4TextMoe":
            hidden = args[0].reshape(-1, args[0].shape[-1])
            scores, _ = module.router(hidden)
            gate, choice = scores.max(-1)
            out = torch.stack([
                module.experts(torch.stack([gate[i] * hidden[i]] * num_experts))[choice[i]] for i in range(len(hidden))
            ])  # fmt: skip
            note(layer, choice, torch.ones_like(gate), out.norm(dim=-1))
            return
        hidden, choices, gates = (*args, *kwargs.values())[:3]
        for k in range(choices.shape[-1]):
            # Twice, and one of them at nothing: a single choice is more than some implementations can do.
            choice = choices[:, [k, k]]
            out = type(module).forward(module, hidden, choice, torch.tensor([1.0, 0.0]).expand(len(choice), 2))
            note(layer, choices[:, k], gates[:, k], out.reshape(-1, out.shape[-1]).norm(dim=-1))

    hooks = [module.register_forward_hook(partial(hook, layer), with_kwargs=True) for layer, module in modules.items()]
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    return sums


def require_same_sums(ours: LayerStatistics, theirs: LayerStatistics) -> None:
    np.testing.assert_array_equal(ours.count_SE.sum(0), theirs.count_SE[0])
    assert theirs.count_SE.sum() > 0
    for name in ("gate_SE", "norm_SE", "norm_sq_SE", "gated_norm_SE", "gated_norm_sq_SE"):
        np.testing.assert_allclose(getattr(ours, name).sum(0), getattr(theirs, name)[0], rtol=5e-5, err_msg=name)
    np.testing.assert_allclose(ours.max_norm_E, theirs.max_norm_E, rtol=5e-5)


def mtp_in_memory(built: Built) -> Any:
    """transformers' own MTP module over the model in memory, its weights put there name by name."""
    from transformers.modeling_layers import MtpModel

    module = MtpModel(built.model, 1).float().eval().requires_grad_(False)
    prefix = f"model.layers.{NUM_LAYERS}."
    stored = {name.removeprefix(prefix): value for name, value in tensors_of(built.folder).items() if prefix in name}
    state = {}
    for name in module.layers[0].state_dict():
        own = name.removeprefix("mtp_block.")
        if "experts." in own and "shared" not in own:
            parts = ("gate_proj", "up_proj") if "gate_up" in own else ("down_proj",)
            state[name] = torch.stack([
                torch.cat([stored[f"mlp.experts.{e}.{part}.weight"] for part in parts]) for e in range(built.num_experts)
            ])  # fmt: skip
        else:
            state[name] = stored["shared_head.norm.weight" if own == "post_norm.weight" else own]
    module.layers[0].load_state_dict(state)
    return module


# ---- the promises


def test_the_family_is_known_and_every_tensor_of_it_is_claimed(built: Built) -> None:
    layout = layouts.resolve(Checkpoint.open(built.folder), ARCHITECTURES)
    assert layout.num_experts == built.num_experts
    assert set(layout.layer_indices) == set(experts_modules(built.model))


def test_streamed_logits_equal_the_full_models(built: Built) -> None:
    inputs = token_batches()
    require_close(streamed_logits(streamed_model(built.folder), inputs), logits(built.model, inputs))


def test_computing_in_bfloat16_with_routers_as_stored_mostly_agrees(built: Built) -> None:
    inputs = token_batches()
    streamed = streamed_logits(streamed_model(built.folder, dtype=torch.bfloat16), inputs)
    same = [
        one.argmax(-1) == other.argmax(-1) for one, other in zip(streamed, logits(built.model, inputs), strict=True)
    ]
    # Rounding moves some tokens of so small a model to other experts.
    assert torch.cat([part.reshape(-1) for part in same]).float().mean() > 0.75


def test_observed_sums_equal_those_of_plain_hooks(built: Built, tmp_path: Path) -> None:
    rows = text_rows(12)
    text = write_jsonl(tmp_path / "text.jsonl", rows)
    ours = observe(built.folder, [text], run=RUN, max_length=64)
    tokenizer = load_tokenizer(Checkpoint.open(built.folder))
    inputs = [np.array([tokenizer(row["text"])["input_ids"]]) for row in rows]
    theirs = hooked_sums(experts_modules(built.model), built.num_experts, lambda: logits(built.model, inputs))
    assert ours.layers.keys() == theirs.keys()
    for layer, expected in theirs.items():
        require_same_sums(ours.layers[layer], expected)


def test_a_pruned_checkpoint_equals_slicing_in_memory(built: Built, plan: PruningPlan, pruned: Path) -> None:
    expected = sliced(built.family, tensors_of(built.folder), dict(plan.kept))
    found = tensors_of(pruned)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert verify(pruned).ok


def test_a_pruned_checkpoint_is_the_original_with_a_masked_router(
    built: Built, plan: PruningPlan, pruned: Path
) -> None:
    inputs = token_batches()
    with masked_routers(built, plan):
        expected = logits(built.model, inputs)
    require_close(streamed_logits(streamed_model(pruned), inputs), expected)
    whole = logits(built.model, inputs)
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(whole, expected, strict=True)), (
        "nothing was masked"
    )


def test_a_pruned_checkpoint_loads_with_no_missing_or_unexpected_key(
    built: Built, plan: PruningPlan, pruned: Path
) -> None:
    if built.family.cannot_load is not None:
        pytest.skip(built.family.cannot_load)
    model, info = type(built.model).from_pretrained(pruned, dtype=torch.float32, output_loading_info=True)
    assert {what: list(keys) for what, keys in info.items() if keys} == {}
    inputs = token_batches()
    with masked_routers(built, plan):
        expected = logits(built.model, inputs)
    require_close(logits(model.eval(), inputs), expected)


def test_keeping_all_experts_changes_no_byte(built: Built, tmp_path: Path) -> None:
    everything = plans.plan(built.folder, criterion="random", keep=built.num_experts)
    prune(built.folder, everything, tmp_path / "all")
    before, after = tensors_of(built.folder), tensors_of(tmp_path / "all")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8)), name
    assert (built.folder / "config.json").read_bytes() == (tmp_path / "all/config.json").read_bytes()


def test_every_alias_of_the_count_is_updated_and_nothing_else(built: Built, plan: PruningPlan, pruned: Path) -> None:
    before, after = (tiny.read_json(folder / "config.json") for folder in (built.folder, pruned))
    changed = dict(differences(before, after))
    assert changed, "no count was updated"
    for path, (old, new) in changed.items():
        assert (old, new) == (built.num_experts, plan.num_kept), path
    assert {path.rpartition(".")[2] for path in changed} <= {
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    }  # fmt: skip
    left = [
        path for path, value in leaves(after) if "experts" in path.rpartition(".")[2] and value == built.num_experts
    ]
    assert left == []


def differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    first, second = dict(leaves(before, path)), dict(leaves(after, path))
    assert first.keys() == second.keys()
    yield from ((key, (first[key], second[key])) for key in first if first[key] != second[key])


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, path + "[]") if isinstance(inner, dict) else ()
        yield path, [inner for inner in value if not isinstance(inner, dict)]
    else:
        yield path, value


def test_groups_of_the_router_keep_equally_many_experts(built: Built, plan: PruningPlan) -> None:
    layout = layouts.resolve(Checkpoint.open(built.folder), ARCHITECTURES)
    assert layout.num_groups == built.family.num_groups
    size = built.num_experts // layout.num_groups
    for kept in plan.kept.values():
        per_group = [sum(expert // size == group for expert in kept) for group in range(layout.num_groups)]
        assert len(set(per_group)) == 1


def test_rerouted_errors_are_those_of_a_masked_router(built: Built, plan: PruningPlan, tmp_path: Path) -> None:
    rows = text_rows(12)
    text = write_jsonl(tmp_path / "text.jsonl", rows)
    everything = Reroute(tokens=1_000_000, candidates=built.num_experts)
    if refused := REFUSED.get(built.family.name):
        with pytest.raises(UnsupportedError, match=refused):
            Observation(built.folder, [text], run=RUN, max_length=64, seed=0, reroute=everything)
        pytest.skip(REFUSAL.format(refused))
    observe(built.folder, [text], run=RUN, max_length=64, reroute=everything, sample=tmp_path / "sample")
    # The first layer of the pruned model still has the same inputs.
    layer = min(experts_modules(built.model))
    sample = RoutedSamples.open(tmp_path / "sample").layer(layer)
    tokenizer = load_tokenizer(Checkpoint.open(built.folder))
    inputs = [np.array([tokenizer(row["text"])["input_ids"]]) for row in rows]
    outputs: list[Tensor] = []
    hook = experts_modules(built.model)[layer].register_forward_hook(lambda *call: outputs.append(call[-1]))
    logits(built.model, inputs)
    whole, outputs = torch.cat([part.reshape(-1, part.shape[-1]) for part in outputs]), []
    with masked_routers(built, plan):
        logits(built.model, inputs)
    hook.remove()
    masked = torch.cat([part.reshape(-1, part.shape[-1]) for part in outputs])
    weight = np.ones(len(sample))
    assert len(sample) == len(whole)
    expected = float((masked - whole).square().sum())
    assert expected > 0.01 * float(whole.square().sum())
    np.testing.assert_allclose(rerouted_error(sample, plan.kept[layer], weight), expected, rtol=1e-4)
    np.testing.assert_allclose(
        1 / token_weights(sample, "relative").mean(), 1 / np.mean(1 / whole.square().sum(-1).numpy()), rtol=1e-3
    )


REFUSAL = "the criterion reroute is refused: {}"
OVER_ALL = "its softmax runs over all experts and is not renormalised"
BIASED = "its selection bias is added to a softmax over all experts"
ON_INPUTS = "its router's score multiplies what goes into an expert and not what comes out"
REFUSED = {
    "Qwen2-MoE": OVER_ALL, "DeepSeek-V2": OVER_ALL, "OLMoE": OVER_ALL, "Flex-OLMo": OVER_ALL, "Jamba": OVER_ALL,
    "ERNIE-4.5": BIASED, "LongCat-Flash": BIASED, "PhiMoE": "its sparsemixer weighs each of two experts by those near it",
    "Llama-4": ON_INPUTS, "Llama-4 text": ON_INPUTS,
}  # fmt: skip


# ---- multi-token prediction

RUNS_MTP = "transformers can run these MTP layers, so they are measured"
CANNOT_RUN_MTP = "transformers cannot run these MTP layers, so they are not measured"
WITH_MTP = [family for family in FAMILIES if family.has_mtp]


@pytest.fixture(scope="module", params=WITH_MTP, ids=lambda family: family.name)
def with_mtp(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    family: Family = request.param
    folder = tmp_path_factory.mktemp("families") / "mtp"
    model = make(family, folder, mtp=True)
    tiny.add_tokenizer(folder)
    return Built(family, folder, model)


def test_mtp_layers_that_are_not_run_keep_the_experts_of_the_last_layer_and_are_said_to_be_unmeasured(
    with_mtp: Built, tmp_path: Path
) -> None:
    if with_mtp.family.runs_mtp:
        pytest.skip(RUNS_MTP)
    text = write_jsonl(tmp_path / "text.jsonl", text_rows(4))
    statistics = observe(with_mtp.folder, [text], run=RUN, max_length=64)
    layout = layouts.resolve(Checkpoint.open(with_mtp.folder), ARCHITECTURES)
    assert layout.mtp_indices
    assert statistics.unobserved == layout.mtp_indices
    plan = plans.plan(statistics, ratio=0.25)
    last = max(layout.layer_indices)
    assert plan.unmeasured == dict.fromkeys(statistics.unobserved, last)
    assert plan.kept.keys() == {*layout.layer_indices, *layout.mtp_indices}
    manifest = prune(with_mtp.folder, plan, tmp_path / "out")
    assert manifest.unmeasured == plan.unmeasured
    before, found = tensors_of(with_mtp.folder), tensors_of(tmp_path / "out")
    expected = sliced(with_mtp.family, before, dict(plan.kept))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert verify(tmp_path / "out").ok
    if with_mtp.family.cannot_load is None:
        _, info = type(with_mtp.model).from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]


def test_mtp_layers_that_transformers_can_run_are_measured(with_mtp: Built, tmp_path: Path) -> None:
    if not with_mtp.family.runs_mtp:
        pytest.skip(CANNOT_RUN_MTP)
    rows = text_rows(12)
    text = write_jsonl(tmp_path / "text.jsonl", rows)
    ours = observe(with_mtp.folder, [text], run=RUN, max_length=64)
    tokenizer = load_tokenizer(Checkpoint.open(with_mtp.folder))
    module = mtp_in_memory(with_mtp)

    def run() -> None:
        for row in rows:
            ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
            if ids.shape[1] > 1:  # each token takes the next one
                with torch.inference_mode():
                    hidden = with_mtp.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
                    positions = torch.arange(1, ids.shape[1])[None]
                    module.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[:, 1:])

    theirs = hooked_sums({NUM_LAYERS: module.layers[0].mtp_block.mlp.experts}, with_mtp.num_experts, run)
    require_same_sums(ours.layers[NUM_LAYERS], theirs[NUM_LAYERS])
    assert int(ours.layers[NUM_LAYERS].tokens_S.sum()) == ours.num_tokens - len(rows)


def test_mtp_layers_that_are_dropped_leave_nothing_behind(with_mtp: Built, tmp_path: Path) -> None:
    plan = plans.plan(with_mtp.folder, criterion="random", ratio=0.25)
    manifest = prune(with_mtp.folder, plan, tmp_path / "out", mtp="drop")
    assert manifest.drop_mtp and not manifest.unmeasured
    without = make(with_mtp.family, tmp_path / "plain")
    del without
    plain = prune(tmp_path / "plain", PruningPlan.load(tmp_path / "out/reapkit/plan.json"), tmp_path / "expected")
    assert plain.after.bytes == manifest.after.bytes
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    config = tiny.read_json(tmp_path / "out/config.json")
    keys = {path for path, value in leaves(config) if re.search(r"num_nextn|mtp_num", path) and value}
    assert keys == set()
    assert verify(tmp_path / "out").ok


def test_mtp_layers_take_the_kept_set_of_a_layer_that_is_named(with_mtp: Built, tmp_path: Path) -> None:
    plan = plans.plan(with_mtp.folder, criterion="random", ratio=0.25)
    first = min(set(plan.kept) - set(plan.unmeasured))
    prune(with_mtp.folder, plan, tmp_path / "out", mtp=f"same-as-layer-{first}")
    done = PruningPlan.load(tmp_path / "out/reapkit/plan.json")
    assert set(done.unmeasured.values()) == {first}
    assert all(done.kept[layer] == plan.kept[first] for layer in done.unmeasured)
    shutil.rmtree(tmp_path / "out")
