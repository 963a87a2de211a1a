"""What `inspect` promises: exact counts, from shards or from the configuration alone, and what pruning would leave."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import quantized
import tiny
from conftest import PlanFor
from reapkit import inventory, shards
from reapkit.architectures import ARCHITECTURES
from reapkit.errors import CheckpointError, ReapkitError, UnsupportedError, UsageError
from reapkit.inventory import Inventory, Part, inspect

DATA = Path(__file__).parent / "data"
INDEX = "model.safetensors.index.json"

# MiniMax-M2 by hand: 62 layers of 256 experts, hidden 3072, width 1536, 48 query and 8 key heads of 128, vocabulary 200,064.
LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH = 62, 256, 8, 3072, 1536
EXPERT = 3 * HIDDEN * WIDTH
ROUTER_ROW = HIDDEN + 1  # with its selection bias
ATTENTION = 2 * HIDDEN * 6144 + 2 * HIDDEN * 1024 + 6144 + 1024
NORMS = LAYERS * 2 * HIDDEN + HIDDEN
EMBEDDINGS = 2 * 200_064 * HIDDEN


def m2_parameters(experts: int, *, weights_of: int | None = None) -> int:
    weights = EXPERT * (experts if weights_of is None else weights_of)
    return LAYERS * (weights + experts * ROUTER_ROW + ATTENTION) + NORMS + EMBEDDINGS


def m2_nbytes(experts: int) -> int:
    """FP8 weights with an F32 scale per 128x128 block, routers in F32, the rest in BF16."""
    expert = EXPERT + 4 * EXPERT // 128**2
    projections = ATTENTION - 6144 - 1024
    attention = projections + 4 * projections // 128**2 + 2 * (6144 + 1024)
    return LAYERS * (experts * (expert + 4 * ROUTER_ROW) + attention) + 2 * (NORMS + EMBEDDINGS)


def m2_index() -> dict[str, Any]:
    """The vendor's index: 125 shards from number 0 that promise 130."""
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    for layer in range(LAYERS):
        block, attention = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.self_attn"
        names += [f"model.layers.{layer}.{norm}_layernorm.weight" for norm in ("input", "post_attention")]
        names += [f"{attention}.{norm}_norm.weight" for norm in "qk"]
        names += [f"{block}.gate.weight", f"{block}.e_score_correction_bias"]
        matrices = [f"{attention}.{projection}_proj.weight" for projection in "qkvo"]
        matrices += [f"{block}.experts.{expert}.w{w}.weight" for expert in range(EXPERTS) for w in (1, 2, 3)]
        names += [name + suffix for name in matrices for suffix in ("", "_scale_inv")]
    return {
        "metadata": {"total_size": m2_nbytes(EXPERTS)},
        "weight_map": {name: f"model-{i * 125 // len(names):05d}-of-00130.safetensors" for i, name in enumerate(names)},
    }


@pytest.fixture
def m2_real(tmp_path: Path) -> Path:
    """MiniMax-M2's own configuration and index, without a weight."""
    shutil.copy(DATA / "minimax-m2-config.json", tmp_path / "config.json")
    tiny.write_json(tmp_path / INDEX, m2_index())
    return tmp_path


@pytest.fixture(scope="session")
def qwen3_bf16(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE in bf16, with tied embeddings, in one shard without an index."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("inventory") / "qwen3-bf16"
    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.bfloat16)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").exists()
    return folder


@pytest.fixture(params=["m2", "m2_fp8", "qwen3", "qwen3_bf16"])
def any_checkpoint(request: pytest.FixtureRequest) -> Path:
    folder = request.getfixturevalue(request.param)
    assert isinstance(folder, Path)
    return folder


def without_shards(source: Path, folder: Path, *, index: bool = True) -> Path:
    """A copy of what describes a checkpoint, without a weight."""
    folder.mkdir(parents=True)
    shutil.copy(source / "config.json", folder)
    if (source / "chat_template.jinja").exists():
        shutil.copy(source / "chat_template.jinja", folder)
    if index and (source / INDEX).exists():
        shutil.copy(source / INDEX, folder)
    return folder


def edit_config(folder: Path, **entries: Any) -> Path:
    config = tiny.read_json(folder / "config.json") | entries
    tiny.write_json(folder / "config.json", {key: value for key, value in config.items() if value is not None})
    return folder


def counts(found: Inventory) -> Inventory:
    """All but how it was found."""
    return replace(found, origin="", shards=0, estimated=False)


def part(found: Inventory, name: str) -> Part:
    return next(part for part in found.parts if part.name == name)


# --- with shards


def test_parameters_equal_those_of_the_loaded_model(any_checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(any_checkpoint, dtype=torch.float32)
    biases = [value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")]
    expected = sum(value.numel() for value in (*model.parameters(), *biases))
    assert inspect(any_checkpoint).parameters == expected


def test_bytes_are_those_of_all_tensors_and_parts_add_up(any_checkpoint: Path) -> None:
    found = inspect(any_checkpoint)
    files = any_checkpoint.glob("model*.safetensors")
    headers = {file: int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in files}
    assert found.nbytes == sum(file.stat().st_size - header for file, header in headers.items())
    assert found.shards == len(headers)
    assert sum(part.nbytes for part in found.parts) == found.nbytes
    assert sum(part.parameters for part in found.parts) == found.parameters
    assert not found.estimated and not found.notes


def test_active_parameters_count_top_k_experts_and_whole_routers(m2: Path, qwen3: Path) -> None:
    # 3 layers: attention (64 x 128 query, 64 x 64 key and value, 128 x 64 output; norms of 128 and 64), two norms, 8 router rows with
    # their biases, 2 of 8 experts of 3 x 64 x 32; embeddings twice, a last norm.
    layer = 2 * 64 * 128 + 2 * 64 * 64 + 128 + 64 + 2 * 64 + 8 * (64 + 1) + 2 * 3 * 64 * 32
    found = inspect(m2)
    assert found.active_parameters == 3 * layer + 2 * 128 * 64 + 64
    assert found.parameters - found.active_parameters == 3 * (8 - 2) * 3 * 64 * 32
    # Layer 1 of 3 is dense.
    found = inspect(qwen3)
    assert found.parameters - found.active_parameters == 2 * (8 - 2) * 3 * 64 * 32


def test_parts_hold_what_their_names_say(m2: Path, qwen3: Path) -> None:
    found = inspect(m2)
    assert [part.name for part in found.parts] == ["experts", "routers", "attention", "embeddings", "norms and other"]
    assert part(found, "experts") == Part("experts", 3 * 8 * 3 * 64 * 32, 4 * 3 * 8 * 3 * 64 * 32)
    assert part(found, "routers").parameters == 3 * 8 * (64 + 1)
    assert part(found, "attention").parameters == 3 * (2 * 64 * 128 + 2 * 64 * 64 + 128 + 64)
    assert part(found, "embeddings").parameters == 2 * 128 * 64
    assert part(found, "norms and other").parameters == 3 * 2 * 64 + 64
    assert part(inspect(qwen3), "dense layers").parameters == 3 * 64 * 96


def test_scales_take_bytes_and_are_no_parameters(m2_fp8: Path) -> None:
    found = inspect(m2_fp8)
    weights = 3 * 8 * 3 * 256 * 64
    assert part(found, "experts") == Part("experts", weights, weights + 3 * 8 * 3 * 2 * 4)


def test_the_model_is_described_as_its_configuration_says(m2: Path, qwen3: Path) -> None:
    found = inspect(m2)
    assert (found.architecture, found.model_type, found.format) == ("MiniMax-M2", "minimax_m2", "unquantised")
    assert (found.num_layers, found.moe_layers, found.num_experts, found.top_k, found.num_groups) == (3, 3, 8, 2, 1)
    assert (found.scoring, found.context_length, found.origin) == ("sigmoid + selection bias", 512, str(m2))
    assert found.tensors == len(tiny.read_json(m2 / INDEX)["weight_map"])
    found = inspect(qwen3)
    assert (found.architecture, found.num_layers, found.moe_layers, found.scoring) == ("Qwen3-MoE", 3, 2, "softmax")
    assert json.loads(json.dumps(found.to_json()))["shrunk"][0]["num_experts"] == 6


def test_the_format_has_its_name_for_people(m2: Path, m2_fp8: Path) -> None:
    assert inspect(m2).format == "unquantised"
    assert inspect(m2_fp8).format == "FP8 with block scales"


def test_inspecting_shards_imports_no_torch(m2_fp8: Path) -> None:
    code = "import sys; from reapkit.inventory import inspect; inspect(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(m2_fp8)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- what pruning would leave


@pytest.mark.parametrize("name", ["m2_fp8", "qwen3"])
def test_the_pruned_checkpoint_is_as_large_as_foretold(
    name: str, request: pytest.FixtureRequest, plan_for: PlanFor, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(name)
    for foretold in inspect(folder).shrunk:
        checkpoint, layout, plan = plan_for(folder, foretold.num_experts)
        out = tmp_path / foretold.ratio
        manifest = shards.write(checkpoint, layout, plan, out)
        found = inspect(out)
        assert (foretold.num_experts, foretold.parameters, foretold.nbytes, foretold.active_parameters) == (
            found.num_experts, found.parameters, found.nbytes, found.active_parameters,
        )  # fmt: skip
        assert manifest.after.parameters == found.parameters


def test_ratios_that_leave_fewer_experts_than_top_k_are_left_out(m2: Path) -> None:
    found = inspect(m2, ratios=("0", "0.75", "0.8", "0.9"))
    assert [(row.ratio, row.num_experts) for row in found.shrunk] == [("0", 8), ("0.75", 2), ("0.8", 2)]
    assert found.shrunk[0].parameters == found.parameters
    assert found.shrunk[0].active_parameters == found.active_parameters


def test_a_ratio_that_is_none_is_refused(m2: Path) -> None:
    with pytest.raises(UsageError, match="is not a number"):
        inspect(m2, ratios=("a quarter",))


def test_router_groups_keep_equally_many(m2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = replace(ARCHITECTURES[0], num_groups_keys=("n_group",))
    monkeypatch.setattr(inventory, "ARCHITECTURES", (grouped,))
    folder = edit_config(Path(shutil.copytree(m2, tmp_path / "grouped")), n_group=4)
    found = inspect(folder, ratios=("0.25", "0.5"))
    assert found.num_groups == 4
    assert [row.num_experts for row in found.shrunk] == [8, 4]


def test_mtp_layers_are_a_part_of_their_own_and_not_active(qwen3: Path, tmp_path: Path) -> None:
    folder = edit_config(Path(shutil.copytree(qwen3, tmp_path / "mtp")), num_hidden_layers=2)
    found, whole = inspect(folder), inspect(qwen3)
    assert (found.num_layers, found.moe_layers, found.parameters) == (2, 1, whole.parameters)
    layer = 8 * 3 * 64 * 32 + 8 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 2 * 16 + 2 * 64
    assert part(found, "MTP").parameters == layer
    assert found.active_parameters == whole.parameters - layer - 6 * 3 * 64 * 32
    # Its experts are pruned with the others.
    assert [row.parameters for row in found.shrunk] == [row.parameters for row in whole.shrunk]


# --- other formats


@pytest.mark.parametrize("scheme", quantized.SCHEMES)
def test_quantised_weights_count_as_the_values_that_they_hold(scheme: str, m2: Path, tmp_path: Path) -> None:
    folder = quantized.make(m2, tmp_path / "quantised", scheme)
    found, plain = inspect(folder), inspect(m2)
    assert (found.parameters, found.active_parameters) == (plain.parameters, plain.active_parameters)
    assert [(part.name, part.parameters) for part in found.parts] == [
        (part.name, part.parameters) for part in plain.parts
    ]
    assert found.nbytes == sum(tensor.nbytes for tensor in tiny.load_tensors(folder).values())
    assert found.format == quantized.SCHEMES[scheme][2]
    assert found.notes == ()


def test_what_can_only_be_pruned_is_said_with_what_can_be_observed(m2: Path, tmp_path: Path) -> None:
    folder = quantized.make(m2, tmp_path / "marlin", "gptq")
    entries = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}
    found = inspect(edit_config(folder, quantization_config=entries))
    assert (found.parameters, found.format) == (inspect(m2).parameters, "GPTQ")
    assert found.notes[0].startswith(
        "the weights can be pruned but not observed: the checkpoint's GPTQ weights have 4 bits"
    )
    assert "observe a sibling checkpoint of the same model in bf16" in found.notes[0]
    assert found.notes[1:] == ("packed weights are counted as values of 4 bits each, padding included",)


def test_packed_weights_of_unknown_width_are_counted_as_four_bits_and_that_is_said(m2: Path, tmp_path: Path) -> None:
    folder = quantized.make(m2, tmp_path / "unknown", "nvfp4-modelopt")
    found = inspect(edit_config(folder, quantization_config={"quant_method": "unheard-of"}))
    assert found.format == "unheard-of"
    # The scales' names are those of other schemes.
    assert found.parameters == inspect(m2).parameters
    assert found.notes[1] == (
        "packed weights are counted as values of 4 bits each, which config.json does not say, padding included"
    )


def test_packed_weights_without_their_shards_are_refused(m2: Path, tmp_path: Path) -> None:
    folder = edit_config(without_shards(m2, tmp_path / "gptq"), quantization_config={"quant_method": "gptq", "bits": 4})
    error = refuse(folder, "the shapes of INT4 (GPTQ) weights do not follow from config.json", UnsupportedError)
    assert error.hint == "fetch the shards: only their headers are read"


def test_tensors_that_no_quantisation_explains_are_said(m2: Path, tmp_path: Path) -> None:
    folder = quantized.make(m2, tmp_path / "odd", "nvfp4-modelopt")
    found = inspect(edit_config(folder, quantization_config=None))
    assert found.notes == (
        "config.json names no quantisation, and some tensors are F8_E4M3, U8: they are counted as if unpacked",
    )


# --- without shards


def test_the_real_minimax_m2_is_counted_exactly(m2_real: Path) -> None:
    started = time.process_time()
    found = inspect(m2_real, ratios=("0.25", "0.30", "0.40", "0.50", "0.97"))
    # Of the processor: other tests share the clock on the wall.
    assert time.process_time() - started < 10
    assert found.tensors == 96_103
    assert found.shards == 125
    assert (found.num_layers, found.moe_layers, found.num_experts, found.top_k) == (62, 62, 256, 8)
    assert (found.format, found.context_length, found.estimated) == ("FP8 with block scales", 196_608, True)
    assert found.parameters == m2_parameters(256) == 228_689_764_864
    assert found.active_parameters == m2_parameters(256, weights_of=8) == 11_030_553_088
    assert found.nbytes == m2_nbytes(256) == sum(part.nbytes for part in found.parts)
    assert [(row.num_experts, row.parameters) for row in found.shrunk] == [
        (192, 172_507_452_032),
        (180, 161_973_268_376),
        (154, 139_149_203_788),
        (128, m2_parameters(128)),
        (8, m2_parameters(8)),
    ]
    for row in found.shrunk:
        assert row.parameters == m2_parameters(row.num_experts)
        assert row.active_parameters == m2_parameters(row.num_experts, weights_of=8)
        assert row.nbytes == m2_nbytes(row.num_experts)
    assert part(found, "experts").parameters == 62 * 256 * 3 * 1536 * 3072
    assert found.notes == ()


def test_the_index_and_the_configuration_tell_as_much_as_the_shards(any_checkpoint: Path, tmp_path: Path) -> None:
    folder = without_shards(any_checkpoint, tmp_path / "described")
    found, whole = inspect(folder), inspect(any_checkpoint)
    assert found.estimated
    assert counts(found) == counts(whole)
    assert found.shards == (whole.shards if (folder / INDEX).exists() else 0)


@pytest.mark.parametrize("name", ["m2", "m2_fp8", "qwen3"])
def test_the_configuration_alone_tells_as_much(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    whole = request.getfixturevalue(name)
    found = inspect(without_shards(whole, tmp_path / "described", index=False))
    assert (found.shards, found.estimated) == (0, True)
    assert counts(found) == counts(inspect(whole))


@pytest.mark.parametrize(("bias", "scale"), [("BF16", "BF16"), ("F32", "BF16"), ("BF16", "F32")])
def test_dtypes_that_no_file_tells_follow_from_the_total_size(
    m2_fp8: Path, tmp_path: Path, bias: str, scale: str
) -> None:
    whole = inspect(m2_fp8)
    folder = without_shards(m2_fp8, tmp_path / "described")
    num_scales = (whole.nbytes - nbytes_without_scales(m2_fp8)) // 4
    saved = (2 * 3 * 8 if bias == "BF16" else 0) + (2 * num_scales if scale == "BF16" else 0)
    index = tiny.read_json(folder / INDEX)
    index["metadata"]["total_size"] = float(whole.nbytes - saved)
    tiny.write_json(folder / INDEX, index)
    found = inspect(folder)
    assert found.nbytes == whole.nbytes - saved == sum(part.nbytes for part in found.parts)
    assert part(found, "routers").nbytes == part(whole, "routers").nbytes - (2 * 3 * 8 if bias == "BF16" else 0)
    assert found.notes == ()


def nbytes_without_scales(folder: Path) -> int:
    return sum(value.nbytes for name, value in tiny.load_tensors(folder).items() if not name.endswith("_scale_inv"))


def test_a_total_size_that_shapes_cannot_give_is_said_and_believed(m2: Path, tmp_path: Path) -> None:
    folder = without_shards(m2, tmp_path / "described")
    index = tiny.read_json(folder / INDEX)
    true = index["metadata"]["total_size"]
    index["metadata"]["total_size"] = 2 * true
    tiny.write_json(folder / INDEX, index)
    found, whole = inspect(folder), inspect(m2)
    assert found.notes == (
        f"model.safetensors.index.json says {2 * true:,} bytes and the shapes give {true:,}: bytes by part are those of "
        "the shapes",
    )
    assert found.nbytes == 2 * true
    assert [row.nbytes for row in found.shrunk] == [2 * row.nbytes for row in whole.shrunk]


@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-block-bf16", "fp8-block-e8m0", "mxfp8"])
def test_scales_of_every_width_are_counted_without_shards(scheme: str, m2: Path, tmp_path: Path) -> None:
    folder = quantized.make(m2, tmp_path / "quantised", scheme)
    found = inspect(without_shards(folder, tmp_path / "described"))
    assert counts(found) == counts(inspect(folder))
    assert found.estimated and found.notes == ()


@pytest.mark.parametrize("metadata", [{}, {"total_size": "much"}, {"total_size": float("nan")}, None])
def test_without_a_total_size_the_shapes_give_the_bytes(m2: Path, tmp_path: Path, metadata: Any) -> None:
    folder = without_shards(m2, tmp_path / "described")
    tiny.write_json(folder / INDEX, tiny.read_json(folder / INDEX) | {"metadata": metadata})
    assert counts(inspect(folder)) == counts(inspect(m2))


def test_a_configuration_without_a_dtype_is_taken_for_bf16_and_says_so(m2: Path, tmp_path: Path) -> None:
    folder = edit_config(without_shards(m2, tmp_path / "described", index=False), dtype=None, torch_dtype=None)
    found = inspect(folder)
    assert found.nbytes == 2 * found.parameters
    assert found.notes == ("config.json names no dtype: bf16 is assumed",)


def test_what_the_index_and_the_model_do_not_share_is_said(m2: Path, tmp_path: Path) -> None:
    folder = without_shards(m2, tmp_path / "described")
    index = tiny.read_json(folder / INDEX)
    names = index["weight_map"]
    names["model.mtp.0.eh_proj.weight"] = names["model.mtp.0.norm.weight"] = names.pop("model.norm.weight")
    del index["metadata"]
    tiny.write_json(folder / INDEX, index)
    found = inspect(folder)
    assert found.notes == (
        "model.safetensors.index.json names tensors that the model does not have, and they are not counted: "
        "model.mtp.0.eh_proj.weight (2 such)",
        "model.safetensors.index.json lacks tensors that the model has, and they are not counted: model.norm.weight (1 such)",
    )
    assert found.parameters == inspect(m2).parameters - 64


def test_an_expert_that_the_index_lacks_is_an_error(m2: Path, tmp_path: Path) -> None:
    folder = without_shards(m2, tmp_path / "described")
    index = tiny.read_json(folder / INDEX)
    index["weight_map"] = {
        name: file for name, file in index["weight_map"].items() if ".1.block_sparse_moe.experts.5." not in name
    }
    tiny.write_json(folder / INDEX, index)
    refuse(folder, "layer 1 has 7 experts where config.json says 8: missing 5")


def test_layers_that_are_not_there_are_said(qwen3: Path, tmp_path: Path) -> None:
    folder = edit_config(Path(shutil.copytree(qwen3, tmp_path / "cut")), num_hidden_layers=5)
    assert inspect(folder).notes == ("config.json says 5 layers, and tensors name 3 of them",)


def test_of_a_hub_id_that_is_in_the_cache_without_shards_the_rest_follows_from_its_tables(
    m2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--name"
    without_shards(m2, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = inspect("org/name", revision="main")
    assert (found.origin, found.parameters, found.estimated) == ("org/name", inspect(m2).parameters, True)


# --- bad input


def refuse(folder: Path, sentence: str, kind: type[ReapkitError] = CheckpointError) -> ReapkitError:
    with pytest.raises(kind) as caught:
        inspect(folder)
    assert sentence in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value


def test_a_missing_shard_among_others_is_an_error(m2: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(m2, tmp_path / "copy"))
    sorted(folder.glob("model-*.safetensors"))[3].unlink()
    refuse(folder, "is missing from")


@pytest.mark.parametrize("file", ["/etc/passwd", "../described/config.json"])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(m2: Path, tmp_path: Path, file: str) -> None:
    folder = without_shards(m2, tmp_path / "described")
    index = tiny.read_json(folder / INDEX)
    index["weight_map"]["model.norm.weight"] = file
    tiny.write_json(folder / INDEX, index)
    refuse(folder, "outside the checkpoint")


def test_a_folder_of_pickles_is_refused(m2: Path, tmp_path: Path) -> None:
    folder = without_shards(m2, tmp_path / "described", index=False)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    error = refuse(folder, "has neither model.safetensors.index.json nor model.safetensors")
    assert error.hint and "is a pickle" in error.hint


def test_an_unfinished_output_is_refused(m2: Path, tmp_path: Path) -> None:
    folder = without_shards(m2, tmp_path / "described")
    (folder / "reapkit.unfinished.json").write_text("{}")
    refuse(folder, "is the unfinished output of an interrupted run")


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    tiny.write_json(tmp_path / "config.json", {"model_type": "llama", "hidden_size": 64})
    refuse(tmp_path, "this is a dense model ('llama')", UnsupportedError)


def test_an_unsupported_family_is_refused_and_the_supported_are_named(tmp_path: Path) -> None:
    tiny.write_json(tmp_path / "config.json", {"model_type": "unheard_of", "num_experts": 8})
    error = refuse(tmp_path, "the architecture 'unheard_of' is not supported", UnsupportedError)
    assert error.hint and "minimax_m2" in error.hint


def test_a_configuration_that_transformers_refuses_is_one_sentence(m2: Path, tmp_path: Path) -> None:
    folder = edit_config(without_shards(m2, tmp_path / "described"), hidden_size="large")
    refuse(folder, "transformers cannot build this model", UnsupportedError)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"dtype": "bf17"}, "config.json gives dtype as 'bf17'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": "gate"}},
         "config.json has modules_to_not_convert that is not a list of names"),
    ],
)  # fmt: skip
def test_entries_that_cannot_be_understood_are_named(
    m2: Path, tmp_path: Path, entries: dict[str, Any], sentence: str
) -> None:
    folder = edit_config(without_shards(m2, tmp_path / "described", index=False), **entries)
    refuse(folder, sentence)
