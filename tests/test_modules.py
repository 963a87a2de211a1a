"""Streaming a model layer by layer gives what the whole model gives, and leaves nothing behind."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from greenlet import greenlet

import tiny
from families import FAMILIES, make
from reapkit import modules
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint
from reapkit.errors import CheckpointError, UnsupportedError
from reapkit.experts import Workspace
from reapkit.formats import dequantize_blocks
from reapkit.layout import resolve
from reapkit.modules import StreamedModel, SuspendedForwards, build_meta_model, load_tokenizer
from reapkit.quantization import Format
from reapkit.tensors import TensorInfo
from streaming import full_logits, full_model, streamed_logits, streamed_model, token_batches, with_tensors

M2_NANO = Path(__file__).parents[1] / "models/m2-nano"
ROUTERS = ("gate.weight", "e_score_correction_bias")


@pytest.fixture(scope="module")
def checkpoints(m2: Path, qwen3: Path, m2_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("modules")

    def to_bfloat16(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor if name.endswith(ROUTERS) else tensor.bfloat16()

    def tie(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]

    return {
        "m2": m2,
        "qwen3": qwen3,
        "m2-fp8": m2_fp8,
        "m2-bf16": with_tensors(m2, folder / "m2-bf16", to_bfloat16, dtype="bfloat16"),
        "m2-tied": with_tensors(m2, folder / "m2-tied", tie, tie_word_embeddings=True),
        "qwen3-tied": with_tensors(qwen3, folder / "qwen3-tied", tie, tie_word_embeddings=True),
    }


def require_nothing_left(model: StreamedModel) -> None:
    gc.collect()
    assert [forward for forward in gc.get_objects() if type(forward) is greenlet and forward and forward.parent] == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("reapkit-loader")] == []
    assert all(parameter.is_meta for parameter in model.module.parameters())
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.layers)


def test_a_pass_for_a_gpu_expects_of_a_folder_what_it_then_reads_in_that_order(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[tuple[str, int]] = []
    asked: list[tuple[str, int]] = []
    windows: list[int] = []

    class Recorded:
        def __init__(self, path: Path, ranges: Iterable[tuple[str, int, int]], *, window: int) -> None:
            expected.extend((file, start) for file, start, _ in ranges)
            windows.append(window)

        def require(self, file: str, start: int) -> None:
            asked.append((file, start))

        def close(self) -> None:
            pass

    monkeypatch.setattr("reapkit.sources.Ahead", Recorded)
    monkeypatch.setattr("reapkit.modules.free_memory", lambda device: 8_000 if device.type == "cpu" else 0)
    model = streamed_model(checkpoints["m2-fp8"])
    scales = {(i.file, i.start) for i in model.checkpoint.tensors.values() if model.format.is_companion(i.name)}
    with model.reading(with_mtp=False, disk=None):
        model.load_entry()
    assert expected == asked == []  # on a CPU
    monkeypatch.setattr(model, "device", torch.device("cuda"))
    with model.reading(with_mtp=False, disk=None):
        monkeypatch.setattr(model, "device", torch.device("cpu"))
        model.load_entry()
        for index in range(len(model.layers)):
            model.load(index, model.fetch(index))
    assert [place for place in asked if place not in scales] == [place for place in expected if place not in scales]
    assert sorted(asked) == sorted(expected)
    assert scales & set(asked)
    assert windows == [1_000]  # an eighth of what is free


@pytest.mark.parametrize("name", ["m2", "qwen3", "m2-fp8", "m2-bf16", "m2-tied", "qwen3-tied"])
def test_streamed_logits_equal_the_whole_models_bit_for_bit_and_eager_ones_closely(
    checkpoints: dict[str, Path], name: str
) -> None:
    inputs = token_batches()
    model = streamed_model(checkpoints[name])
    streamed = streamed_logits(model, inputs)
    same = full_logits(full_model(checkpoints[name], experts="reapkit"), inputs)
    eager = full_logits(full_model(checkpoints[name]), inputs)
    for ours, reference, independent in zip(streamed, same, eager, strict=True):
        assert torch.equal(ours, reference)
        torch.testing.assert_close(ours, independent, rtol=0, atol=1e-5)
    require_nothing_left(model)


@pytest.mark.parametrize("name", ["m2", "m2-fp8"])
def test_the_format_is_asked_once_what_a_tensor_is_called(
    checkpoints: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed_model(checkpoints[name])
    asked: Counter[str] = Counter()
    decoded = Format.decoded

    def counting(self: Format, info: TensorInfo, tensors: Any) -> Any:
        asked[info.name] += 1
        return decoded(self, info, tensors)

    monkeypatch.setattr(Format, "decoded", counting)
    model.fetch(1)
    assert sum(".experts." in tensor for tensor in asked) == 3 * tiny.NUM_EXPERTS and set(asked.values()) == {1}


@pytest.mark.parametrize("name", ["m2-bf16", "m2-fp8"])
def test_streamed_logits_in_bfloat16_equal_the_whole_models_with_its_routers_in_float32(
    checkpoints: dict[str, Path], name: str
) -> None:
    inputs = token_batches()
    streamed = streamed_logits(streamed_model(checkpoints[name], dtype=torch.bfloat16), inputs)
    same = full_logits(full_model(checkpoints[name], dtype=torch.bfloat16, experts="reapkit"), inputs)
    assert all(torch.equal(ours, reference) for ours, reference in zip(streamed, same, strict=True))


@pytest.mark.parametrize("name", ["m2-bf16", "m2-fp8"])
def test_several_threads_that_read_give_what_one_gives(checkpoints: dict[str, Path], name: str) -> None:
    model = streamed_model(checkpoints[name])
    one = model.fetch(1)
    model._num_readers = 3
    several = model.fetch(1)
    assert list(one) == list(several) and all(torch.equal(value, several[key]) for key, value in one.items())


def test_reading_beside_a_forward_takes_one_core_and_leaves_the_others_as_they_were(m2: Path) -> None:
    model = streamed_model(m2)
    counts: dict[str, int] = {}

    def fetch(index: int) -> dict[str, torch.Tensor]:
        counts["loader"] = torch.get_num_threads()
        return StreamedModel.fetch(model, index)

    model.fetch = fetch  # type: ignore[method-assign]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        streamed_logits(model, token_batches(), lambda *_: counts.update(computing=torch.get_num_threads()))
        later = threading.Thread(target=lambda: counts.update(later=torch.get_num_threads()))
        later.start()
        later.join()
    finally:
        torch.set_num_threads(before)
    assert counts == {"loader": 1, "computing": 2, "later": 2}


def test_experts_of_all_layers_and_micro_batches_share_their_memory_and_give_it_back(m2: Path) -> None:
    model, taken = streamed_model(m2), set[int]()
    assert model.workspace is not None and model.workspace.nbytes == 0
    workspace, config = model.workspace, model.module.config
    with SuspendedForwards(model, token_batches()) as forwards:
        forwards.run_layers(lambda *_: taken.add(workspace.nbytes))
    pairs = tiny.TOP_K * max(batch.size for batch in token_batches())
    # Inputs, later the outputs in the tokens' order; gate and up; their product; outputs.
    assert taken == {4 * pairs * (2 * config.hidden_size + 3 * config.intermediate_size)}
    assert workspace.nbytes == 0


def test_memory_for_one_purpose_is_not_that_for_another_and_grows() -> None:
    workspace = Workspace()
    first = workspace.take("a", 3, 4, dtype=torch.float32)
    assert workspace.take("a", 6, 2, dtype=torch.float32).data_ptr() == first.data_ptr()
    assert workspace.take("a", 5, dtype=torch.float32).shape == (5,)
    other = workspace.take("b", 3, 4, dtype=torch.float32)
    assert other.data_ptr() != first.data_ptr()
    larger = workspace.take("a", 100, 4, dtype=torch.float32)
    assert larger.shape == (100, 4) and larger.is_contiguous()
    assert workspace.take("a", 3, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert workspace.nbytes == 4 * (400 + 12) + 2 * 3


def test_a_model_can_be_streamed_again(checkpoints: dict[str, Path]) -> None:
    inputs = token_batches()
    model = streamed_model(checkpoints["m2-tied"])
    first, second = streamed_logits(model, inputs), streamed_logits(model, inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["m2", "m2-fp8", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routers_and_selection_biases_stay_exactly_as_stored_when_computing_in_16_bits(
    checkpoints: dict[str, Path], name: str, dtype: torch.dtype
) -> None:
    model = streamed_model(checkpoints[name], dtype=dtype)
    stored = tiny.load_tensors(checkpoints[name])
    seen = []

    def after_batch(layer: int, number: int) -> None:
        for router in model.layout.router_names:
            if f"layers.{layer}." in router:
                value = model.module.get_submodule(f"model.layers.{layer}.mlp")
                for part in router.partition("block_sparse_moe." if "m2" in name else "mlp.")[2].split("."):
                    value = getattr(value, part)
                assert value.dtype == torch.float32 and torch.equal(value, stored[router])
                seen.append(router)
        assert model.layers[layer].self_attn.q_proj.weight.dtype == dtype

    logits = streamed_logits(model, token_batches()[:1], after_batch)
    assert sorted(seen) == sorted(model.layout.router_names)
    assert logits[0].isfinite().all()


def test_one_layer_at_a_time_is_in_the_model_while_the_next_is_read_by_another_thread(m2: Path) -> None:
    model = streamed_model(m2)
    readers: dict[int, str] = {}
    fetch = model.fetch

    def watched(index: int) -> dict[str, torch.Tensor]:
        readers[index] = threading.current_thread().name
        return fetch(index)

    model.fetch = watched  # type: ignore[method-assign]
    calls = []

    def after_batch(layer: int, number: int) -> None:
        calls.append((layer, number))
        loaded = [i for i, part in enumerate(model.layers) if not any(value.is_meta for value in part.parameters())]
        assert loaded == [layer]
        assert model.module.lm_head.weight.is_meta and model.module.model.embed_tokens.weight.is_meta

    streamed_logits(model, token_batches(), after_batch)
    assert calls == [(layer, number) for layer in range(3) for number in range(4)]
    assert readers.keys() == {0, 1, 2} and all(name.startswith("reapkit-loader") for name in readers.values())


@pytest.mark.parametrize("stop", [(0, 0), (1, 2), (2, 3)])
def test_ctrl_c_leaves_no_suspended_forward_and_no_weights(m2: Path, stop: tuple[int, int]) -> None:
    model = streamed_model(m2)
    weights: list[Any] = []

    def after_batch(layer: int, number: int) -> None:
        weights.append(weakref.ref(model.layers[layer].mlp.experts.down_proj))
        if (layer, number) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamed_logits(model, token_batches(), after_batch)
    require_nothing_left(model)
    assert all(weight() is None for weight in weights)


def test_an_error_inside_a_forward_is_raised_and_leaves_nothing(m2: Path) -> None:
    model = streamed_model(m2)
    inputs = token_batches()
    inputs[2][0, 0] = 10_000  # no such token
    with pytest.raises(IndexError):
        streamed_logits(model, inputs)
    require_nothing_left(model)


def test_leaving_before_anything_ran_leaves_nothing(m2: Path) -> None:
    model = streamed_model(m2)
    with SuspendedForwards(model, token_batches()):
        pass
    require_nothing_left(model)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "layer 1 lacks weights"),
        ("model.layers.2.input_layernorm.weight", "layer 2 lacks weights"),
        ("model.embed_tokens.weight", "the model lacks weights"),
        ("model.norm.weight", "the model lacks weights"),
        ("lm_head.weight", "the model lacks weights"),
    ],
)
def test_a_missing_tensor_is_named(m2: Path, tmp_path: Path, missing: str, message: str) -> None:
    folder = with_tensors(m2, tmp_path / "m2", lambda tensors: tensors.pop(missing))
    model = streamed_model(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        streamed_logits(model, token_batches())
    assert missing in str(caught.value)
    require_nothing_left(model)


def test_a_tensor_of_another_shape_is_named(m2: Path, tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"] = torch.ones(7)

    model = streamed_model(with_tensors(m2, tmp_path / "m2", cut))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.input_layernorm\.weight' has the shape \[7\]"):
        streamed_logits(model, token_batches())


def test_a_shard_that_shrinks_while_streaming_is_named(m2: Path, tmp_path: Path) -> None:
    model = streamed_model(with_tensors(m2, tmp_path / "m2", lambda tensors: None))

    def after_batch(layer: int, number: int) -> None:
        (tmp_path / "m2/model-1.safetensors").write_bytes(b"")

    with pytest.raises(CheckpointError, match=r"model-1\.safetensors ends inside"):
        streamed_logits(model, token_batches(), after_batch)
    require_nothing_left(model)


def test_what_a_forward_would_keep_for_every_layer_is_not_asked_for(m2: Path, tmp_path: Path) -> None:
    asked = {"output_router_logits": True, "output_hidden_states": True, "output_attentions": True}
    model = streamed_model(with_tensors(m2, tmp_path / "m2", lambda tensors: None, **asked))
    with SuspendedForwards(model, token_batches()[:1]) as forwards:
        forwards.run_layers(lambda layer, number: None)
        model.load_exit()
        forwards._forwards[0].step()
        assert list(forwards._forwards[0].take_result().keys()) == ["logits"]


def test_tensors_behind_the_last_layer_are_never_read(m2: Path, tmp_path: Path) -> None:
    """MTP layers lie on disk as further layers, and transformers does not run them."""

    def add_mtp(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            tensors[name.replace("layers.2.", "layers.3.")] = torch.full_like(tensors[name], float("nan"))

    model = streamed_model(with_tensors(m2, tmp_path / "m2", add_mtp))
    inputs = token_batches()
    streamed = streamed_logits(model, inputs)
    reference = full_logits(full_model(m2, experts="reapkit"), inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(streamed, reference, strict=True))


def test_remote_code_is_not_run_unasked(m2: Path, tmp_path: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_minimax_m2.Model", "AutoConfig": "modeling_minimax_m2.Config"}
    folder = with_tensors(m2, tmp_path / "m2", lambda tensors: None, auto_map=auto_map)
    assert "SystemExit" in (folder / "modeling_minimax_m2.py").read_text()
    checkpoint = Checkpoint.open(folder)
    assert (
        type(build_meta_model(folder, ARCHITECTURES[0], origin="m2", dtype=torch.float32)).__name__
        == "MiniMaxM2ForCausalLM"
    )
    assert load_tokenizer(checkpoint)("ab")["input_ids"]


def test_a_checkpoint_without_a_readable_tokenizer_says_so(m2: Path, tmp_path: Path) -> None:
    shutil.copytree(m2, tmp_path / "m2")
    (tmp_path / "m2/tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be loaded: "):
        load_tokenizer(Checkpoint.open(tmp_path / "m2"))


# ---- experts left in FP8, with a stand-in for the kernels, which need a GPU


def exact_experts(*, sees: list[torch.Size]) -> SimpleNamespace:
    """What the fused kernels do for experts in FP8, in plain torch, and without rounding inputs."""

    def experts_fp8(
        hidden_ND: Any,
        token_P: Any,
        expert_P: Any,
        gate_up_E: Any,
        gate_up_scale_E: Any,
        down_E: Any,
        down_scale_E: Any,
    ) -> torch.Tensor:
        assert (gate_up_E.dtype, down_E.dtype) == (torch.float8_e4m3fn,) * 2
        sees.append(gate_up_E.shape)
        outs = []
        for token, expert in zip(token_P, expert_P, strict=True):
            gate_up, down = (
                dequantize_blocks(weight_E[expert], scale_E[expert], block=(128, 128), dtype=torch.float32)
                for weight_E, scale_E in ((gate_up_E, gate_up_scale_E), (down_E, down_scale_E))
            )
            gate, up = (gate_up @ hidden_ND[token].float()).chunk(2)
            outs.append(down @ (torch.nn.functional.silu(gate) * up))
        return torch.stack(outs)

    def combine(
        out_PD: Any, gate_P: Any, order_P: Any, *, top_k: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weighted = torch.empty_like(out_PD)
        weighted[order_P] = out_PD * gate_P.unsqueeze(-1)
        return weighted.view(-1, top_k, out_PD.shape[-1]).sum(1).to(dtype), out_PD.norm(dim=-1)

    def find_odd(values: Any) -> torch.Tensor:
        return ~values.float().flatten(1).isfinite().all(1)

    return SimpleNamespace(experts_fp8=experts_fp8, combine=combine, find_odd=find_odd)


@pytest.fixture
def with_fp8(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Makes a CPU one that computes products in FP8; the shapes of the weights that its kernels were given."""
    sees: list[torch.Size] = []
    monkeypatch.setattr(modules, "fused_kernels", lambda device: exact_experts(sees=sees))
    monkeypatch.setattr(modules, "fuse", lambda module, kernels: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return sees


def fp8_model(folder: Path, *, fp8: bool = True) -> StreamedModel:
    checkpoint = Checkpoint.open(folder)
    layout = resolve(checkpoint, ARCHITECTURES)
    return StreamedModel(checkpoint, layout, device=torch.device("cpu"), dtype=torch.float32, plain=not fp8, fp8=fp8)


def test_experts_left_in_fp8_are_the_dequantised_ones_each_with_its_own_scales(with_fp8: list[torch.Size]) -> None:
    inputs = token_batches()[2:]
    ours = streamed_logits(fp8_model(M2_NANO), inputs)
    assert {tuple(shape) for shape in with_fp8} == {(48, 256, 256)}
    for logits, expected in zip(ours, streamed_logits(fp8_model(M2_NANO, fp8=False), inputs), strict=True):
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_scale_of_zero_among_experts_left_in_fp8_is_none_to_divide_by(
    with_fp8: list[torch.Size], tmp_path: Path
) -> None:
    def no_scale(tensors: dict[str, torch.Tensor]) -> None:
        part, whole = (f"model.layers.0.block_sparse_moe.experts.{number}.w1.weight_scale_inv" for number in (3, 4))
        tensors[part][0, 0] = 0
        tensors[whole][:] = 0

    model = fp8_model(with_tensors(M2_NANO, tmp_path / "model", no_scale))
    layer = model.fetch(0)
    name = next(name for name in layer if name.endswith("gate_up_proj_scale"))
    scale_EBG = layer[name]
    assert 0 < scale_EBG[3, 0, 0] <= 1e-6 * scale_EBG[3, 0, 1]
    assert scale_EBG[4, 0].tolist() == [pytest.approx(1e-20)] * 2


def test_experts_that_lie_in_one_tensor_cannot_be_left_in_fp8(with_fp8: list[torch.Size], tmp_path: Path) -> None:
    make(next(family for family in FAMILIES if family.name == "gpt-oss"), tmp_path / "model")
    with pytest.raises(UnsupportedError, match="all experts of a layer in one tensor") as caught:
        fp8_model(tmp_path / "model")
    assert caught.value.hint == "--dtype bfloat16"


@pytest.mark.parametrize(
    ("which", "message"), [("m2-bf16", "is not stored in FP8"), ("m2-fp8", "are not computed in FP8")]
)
def test_experts_that_cannot_be_left_in_fp8_are_refused(
    checkpoints: dict[str, Path], with_fp8: list[torch.Size], which: str, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        fp8_model(checkpoints[which])
    assert caught.value.hint == "--dtype bfloat16"
