"""Which scheme a tensor is stored in, what belongs to it and what it stands for, without a single value being read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quantized
import tiny
from reapkit.checkpoint import Checkpoint
from reapkit.errors import CheckpointError, UnsupportedError
from reapkit.quantization import Format, read_format
from reapkit.tensors import TensorInfo, nbytes

KIMI = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}  # fmt: skip


def format_of(config: dict[str, Any], folder: Path = Path("/nonexistent")) -> Format:
    return read_format(Checkpoint(folder, config, {}, (), "a checkpoint"))


def quantized_by(table: dict[str, Any]) -> Format:
    return format_of({"quantization_config": table})


def info(name: str, dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, dtype, shape, "a.safetensors", 0, nbytes(dtype, shape))


def table(*infos: TensorInfo) -> dict[str, TensorInfo]:
    return {info.name: info for info in infos}


# --- configs


def test_an_unquantised_checkpoint_is_said_to_be() -> None:
    assert format_of({}) == format_of({"quantization_config": None}) == Format("unquantised")
    assert not format_of({}).quantized and format_of({}).obstacle is None


@pytest.mark.parametrize("scheme", quantized.SCHEMES)
def test_every_scheme_has_a_name_and_can_be_computed_with(scheme: str) -> None:
    _, config, name, _ = quantized.SCHEMES[scheme]
    form = quantized_by(config)
    assert (form.name, form.obstacle, form.quantized) == (name, None, True)


def test_the_block_of_fp8_is_that_of_the_config() -> None:
    assert quantized_by(quantized.FP8).block == (128, 128)
    assert quantized_by({"quant_method": "mxfp8"}).block == (1, 32)
    assert quantized_by({"quant_method": "fp8"}).block is None
    assert quantized_by(KIMI).block is None


def test_a_quantisation_of_the_part_for_text_counts_wherever_it_stands() -> None:
    forms = [
        format_of({"quantization_config": KIMI, "text_config": {"quantization_config": KIMI}}),
        format_of({"text_config": {"quantization_config": KIMI}}),
        format_of({"quantization_config": KIMI, "text_config": {}}),
    ]
    assert {form.name for form in forms} == {"INT4 (compressed-tensors)"}


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "modelopt"}}])
def test_the_algorithm_of_modelopt_may_stand_in_a_file_of_its_own(config: dict[str, Any], tmp_path: Path) -> None:
    described = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    tiny.write_json(tmp_path / "hf_quant_config.json", described)
    assert format_of(config, tmp_path).name == "NVFP4 (ModelOpt)"
    described["quantization"]["quant_algo"] = None  # only the cache is quantised
    tiny.write_json(tmp_path / "hf_quant_config.json", described)
    assert format_of(config, tmp_path) == Format("unquantised")


def test_a_config_goes_before_the_file_of_modelopt(tmp_path: Path) -> None:
    tiny.write_json(tmp_path / "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}})
    assert format_of({"quantization_config": quantized.FP8}, tmp_path).name == "FP8 with block scales"


def test_a_file_of_modelopt_outside_the_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny.write_json(tmp_path / "elsewhere.json", {"quantization": {"quant_algo": "NVFP4"}})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "hf_quant_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json is not a plain file"):
        format_of({}, tmp_path / "folder")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantisation 'bitsandbytes'"),
        ({"quant_method": "gguf"}, "quantisation 'gguf'"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits in the layout 'gptq'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*q_proj": {"bits": 3}}}, "3 bits in the layout 'gptq'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "4 bits in the layout 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "4 bits in the layout 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point False"),
        ({"quant_method": "awq", "w_bit": 8}, "8 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size [128]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size [128, 0]"),
        ({"quant_method": "fp8", "weight_block_size": [128, True]}, "weight_block_size [128, True]"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "ModelOpt quantisation 'NVFP4_AWQ'"),
        (quantized.compressed("marlin-24", num_bits=4), "format 'marlin-24'"),
        (quantized.compressed("pack-quantized", num_bits=3), "3 bits"),
        (quantized.compressed("dense", num_bits=4) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
         "format 'sparse-24-bitmask'"),
        (KIMI | {"transform_config": {"config_groups": {"R1": {}}}}, "transforms inputs"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_with_is_said_in_one_sentence_with_a_way_out(
    config: dict[str, Any], found: str
) -> None:
    form = quantized_by(config)
    assert form.quantized and form.obstacle is not None and found in form.obstacle
    weight = info("a.weight_packed", "I32", 4, 4)
    with pytest.raises(UnsupportedError) as caught:
        form.companions(weight, table(weight))
    assert form.obstacle in caught.value.message and "'a.weight_packed'" in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint is not None and "sibling" in caught.value.hint
    # What is stored plainly is read all the same.
    assert form.companions(info("a.weight", "BF16", 4, 4), {}) == ()


def test_a_quantisation_without_a_method_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="without a quant_method"):
        quantized_by({"bits": 4})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 0}, "gives group_size as 0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "128"}, "gives group_size as '128'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": ["a"]}, "has dynamic that is not a table of tables"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:(": {}}}, r"has the pattern '\(', which is none"),
        (KIMI | {"config_groups": {"a": 4}}, "has config_groups that is not a table of tables"),
        (KIMI | {"config_groups": {"a": {"targets": "Linear", "weights": {}}}}, "targets 'Linear', where a list"),
        (quantized.compressed("float-quantized", num_bits=8, type="float", strategy="block"), "block_structure as None"),
    ],
)  # fmt: skip
def test_entries_that_cannot_be_understood_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        quantized_by(config)


# --- tensors


@pytest.mark.parametrize(
    "name",
    [
        "a.weight_scale_inv", "experts.gate_up_proj_scale_inv", "a.weight_scale", "a.weight_scale_2", "a.input_scale",
        "a.weight_global_scale", "a.input_global_scale", "a.weight_shape", "a.weight_zero_point", "a.weight_g_idx", "a.qzeros",
        "a.scales", "a.g_idx", "experts.down_proj_scales", "attn.k_scale", "attn.v_scale", "a.weight.absmax",
        "a.weight.quant_state.bitsandbytes__nf4",
    ],
)  # fmt: skip
def test_companions_are_known_by_their_names(name: str) -> None:
    form = quantized_by(KIMI)
    assert form.is_companion(name) and not format_of({}).is_companion(name)
    assert form.num_values(info(name, "F32", 3)) == 0


@pytest.mark.parametrize(
    "name",
    [
        "a.weight", "a.bias", "experts.gate_up_proj_blocks", "experts.gate_up_proj_bias", "mlp.gate.e_score_correction_bias",
        "router.scale", "router.per_expert_scale", "a.weight_packed", "a.qweight", "layer_scalar",
    ],
)  # fmt: skip
def test_weights_are_not_taken_for_companions(name: str) -> None:
    assert not quantized_by(KIMI).is_companion(name)


@pytest.mark.parametrize("scheme", quantized.SCHEMES)
def test_a_quantised_checkpoint_stands_for_the_tensors_of_the_plain_one(scheme: str, m2: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(quantized.make(m2, tmp_path / "quantised", scheme))
    form, plain = read_format(checkpoint), Checkpoint.open(m2)
    found = {}
    needed = set()
    for tensor in checkpoint.tensors.values():
        if form.is_companion(tensor.name):
            assert form.companions(tensor, checkpoint.tensors) == () and form.num_values(tensor) == 0
            continue
        name, shape = form.decoded(tensor, checkpoint.tensors)
        companions = form.companions(tensor, checkpoint.tensors)
        assert bool(companions) == (".experts." in name or "_proj.weight" in name)
        assert form.num_values(tensor) == plain.tensors[name].num_elements
        needed |= {companion.name for companion in companions}
        found[name] = shape
    assert found == {name: tensor.shape for name, tensor in plain.tensors.items()}
    unused = {name for name in checkpoint.tensors if form.is_companion(name)} - needed
    assert {name.rpartition(".")[2] for name in unused} <= {"input_scale", "input_global_scale"}


def test_blocks_of_mxfp4_stand_for_the_transposed_stack() -> None:
    form = quantized_by({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    blocks, scales = info("e.gate_up_proj_blocks", "U8", 4, 96, 2, 16), info("e.gate_up_proj_scales", "U8", 4, 96, 2)
    tensors = table(blocks, scales, info("e.gate_up_proj_bias", "BF16", 4, 96))
    assert form.name == "MXFP4"
    assert form.decoded(blocks, tensors) == ("e.gate_up_proj", (4, 64, 96))
    assert form.companions(blocks, tensors) == (scales,)
    assert form.num_values(blocks) == 4 * 64 * 96
    assert form.decoded(tensors["e.gate_up_proj_bias"], tensors) == ("e.gate_up_proj_bias", (4, 96))


def test_stacked_fp8_has_a_grid_of_scales_for_every_expert() -> None:
    form = quantized_by(quantized.FP8)
    weight = info("moe.gate_proj.weight", "F8_E4M3", 288, 1280, 4096)
    scale = info("moe.gate_proj.weight_scale_inv", "F32", 288, 10, 32)
    assert form.companions(weight, table(weight, scale)) == (scale,)
    assert form.decoded(weight, table(weight, scale)) == (weight.name, weight.shape)
    for shape in ((10, 32), (288, 32, 10), (1, 10, 32)):
        with pytest.raises(CheckpointError, match=r"needs \[288, 10, 32\]"):
            form.companions(weight, table(weight, info(scale.name, "F32", *shape)))


def test_modules_may_have_bits_and_groups_of_their_own() -> None:
    groups = {
        "one": {"targets": ["lm_head"], "weights": {"num_bits": 8, "type": "int", "group_size": 16}},
        "most": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}},
        "some": {
            "targets": ["re:.*self_attn.*"],
            "weights": {"num_bits": 8, "type": "int", "group_size": 64, "symmetric": False},
        },
        "none": {"targets": ["Embedding"], "weights": None},
    }
    form = quantized_by(KIMI | {"config_groups": groups})
    assert form.name == "INT8 and INT4 (compressed-tensors)"
    for module, bits, size in (("mlp.up_proj", 4, 32), ("model.self_attn.q_proj", 8, 64), ("lm_head", 8, 16)):
        weight = info(f"{module}.weight_packed", "I32", 8, 128 * bits // 32)
        scale = info(f"{module}.weight_scale", "BF16", 8, 128 // size)
        zeros = info(f"{module}.weight_zero_point", "I32", 8 * bits // 32, 128 // size)
        tensors = table(weight, scale, zeros)
        assert form.decoded(weight, tensors) == (f"{module}.weight", (8, 128))
        assert form.companions(weight, tensors) == ((scale, zeros) if "attn" in module else (scale,))
        assert form.num_values(weight) == 8 * 128


def test_gptq_may_give_modules_bits_and_groups_of_their_own() -> None:
    dynamic = {r"+:.*\.self_attn\..*": {"bits": 8, "group_size": 64}, r"-:.*\.gate": {"bits": 2}}
    form = quantized_by({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": dynamic})
    assert form.name == "INT4 and INT8 (GPTQ)"
    for module, bits, size in (("model.mlp.up_proj", 4, 32), ("model.self_attn.q_proj", 8, 64)):
        weight = info(f"{module}.qweight", "I32", 128 * bits // 32, 16)
        tensors = table(
            weight,
            info(f"{module}.qzeros", "I32", 128 // size, 16 * bits // 32),
            info(f"{module}.scales", "F16", 128 // size, 16),
        )
        assert form.decoded(weight, tensors) == (f"{module}.weight", (16, 128))
        assert form.num_values(weight) == 16 * 128


def test_one_checkpoint_may_mix_schemes() -> None:
    groups = {
        "experts": {"targets": ["re:.*experts.*"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}},
        "others": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
    }
    form = quantized_by(KIMI | {"config_groups": groups, "format": "mixed-precision"})
    packed, rows = info("experts.0.up_proj.weight_packed", "U8", 8, 16), info("q_proj.weight", "F8_E4M3", 8, 32)
    tensors = table(
        packed,
        info("experts.0.up_proj.weight_scale", "F8_E4M3", 8, 2),
        info("experts.0.up_proj.weight_global_scale", "F32", 1),
        rows,
        info("q_proj.weight_scale", "BF16", 8, 1),
    )
    assert form.name == "NVFP4 and FP8 (compressed-tensors)"
    assert form.decoded(packed, tensors) == ("experts.0.up_proj.weight", (8, 32))
    assert form.decoded(rows, tensors) == ("q_proj.weight", (8, 32))
    assert [form.num_values(tensor) for tensor in tensors.values()] == [256, 0, 0, 256, 0]


def test_a_byte_holds_two_values_of_fp4_whatever_bits_other_modules_have() -> None:
    form = quantized_by(quantized.compressed("mixed-precision", num_bits=8, type="float"))
    assert form.num_values(info("a.weight_packed", "U8", 4, 4)) == 32
    assert quantized_by({"quant_method": "hqq", "nbits": 8}).num_values(info("a.weight", "U8", 4, 4)) == 16
    assert quantized_by({"quant_method": "hqq", "nbits": 2}).num_values(info("a.weight", "U8", 4, 4)) == 64


UNEXPLAINED: list[tuple[str, dict[str, Any], TensorInfo, list[TensorInfo], str]] = [
    ("a zero point of int8", quantized.compressed("int-quantized", num_bits=8), info("a.weight", "I8", 8, 8),
     [info("a.weight_scale", "BF16", 8, 1), info("a.weight_zero_point", "I8", 8, 1)], "'a.weight_zero_point' is I8"),
    ("a zero point in bytes", quantized.SCHEMES["int4-zeros"][1], info("a.weight_packed", "I32", 8, 8),
     [info("a.weight_scale", "BF16", 8, 2), info("a.weight_zero_point", "I8", 1, 2)],
     "the zero point 'a.weight_zero_point' is I8"),
    ("groups in floats", KIMI, info("a.weight_packed", "I32", 8, 8),
     [info("a.weight_scale", "BF16", 8, 2), info("a.weight_g_idx", "F32", 64)], "the group number 'a.weight_g_idx' is F32"),
    ("narrow blocks", {"quant_method": "mxfp4"}, info("a_blocks", "U8", 2, 8, 2, 8), [info("a_scales", "U8", 2, 8, 2)],
     "'a_blocks' is U8 [2, 8, 2, 8]"),
    ("half a group", quantized.SCHEMES["nvfp4-modelopt"][1], info("a.weight", "U8", 8, 12),
     [info("a.weight_scale", "F8_E4M3", 8, 2), info("a.weight_scale_2", "F32")], "'a.weight' is U8 [8, 12]"),
    ("exponents with a factor", quantized.SCHEMES["nvfp4-modelopt"][1], info("a.weight", "U8", 8, 16),
     [info("a.weight_scale", "U8", 8, 2), info("a.weight_scale_2", "F32")], "the scale 'a.weight_scale' is U8"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "weight", "others", "found"), [case[1:] for case in UNEXPLAINED], ids=[c[0] for c in UNEXPLAINED]
)
def test_what_a_scheme_does_not_explain_is_refused(
    config: dict[str, Any], weight: TensorInfo, others: list[TensorInfo], found: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        quantized_by(config).companions(weight, table(weight, *others))
    assert found in caught.value.message and "does not explain" in caught.value.message
    assert caught.value.hint is not None and "sibling" in caught.value.hint


PACKED = info("a.weight_packed", "I32", 8, 8)
CASES: list[tuple[str, dict[str, Any], TensorInfo, list[TensorInfo], str]] = [
    ("no scale", KIMI, PACKED, [], r"'a\.weight_packed' is I32 and has no 'a\.weight_scale'"),
    ("groups", KIMI, PACKED, [info("a.weight_scale", "BF16", 8, 3)], r"'a\.weight_scale' has 3 groups where 64 values"),
    ("rows", KIMI, PACKED, [info("a.weight_scale", "BF16", 4, 2)], r"'a\.weight_scale' has the shape \[4, 2\]"),
    ("no zeros", quantized.SCHEMES["int4-zeros"][1], PACKED, [info("a.weight_scale", "BF16", 8, 2)],
     r"has no 'a\.weight_zero_point'"),
    ("order", KIMI, PACKED, [info("a.weight_scale", "BF16", 8, 2), info("a.weight_g_idx", "I32", 8)],
     r"'a\.weight_g_idx' has the shape \[8\] where .* needs \[64\]"),
    ("factor", quantized.SCHEMES["nvfp4"][1], info("a.weight_packed", "U8", 8, 16),
     [info("a.weight_scale", "F8_E4M3", 8, 2)], r"has no 'a\.weight_global_scale'"),
    ("factors", quantized.SCHEMES["nvfp4-modelopt"][1], info("a.weight", "U8", 8, 16),
     [info("a.weight_scale", "F8_E4M3", 8, 2), info("a.weight_scale_2", "F32", 2)], "where one scale is expected"),
    ("nvfp4 groups", quantized.SCHEMES["nvfp4-modelopt"][1], info("a.weight", "U8", 8, 32),
     [info("a.weight_scale", "F8_E4M3", 8, 2), info("a.weight_scale_2", "F32")], r"in groups of 16 needs \[8, 4\]"),
    ("awq groups", quantized.SCHEMES["awq"][1], info("a.qweight", "I32", 64, 2),
     [info("a.scales", "F16", 1, 16), info("a.qzeros", "I32", 1, 2)], "has 1 groups where 64 values in groups of 32 need 2"),
    ("awq groups by their other name", {"quant_method": "awq", "w_bit": 4, "q_group_size": 16}, info("a.qweight", "I32", 64, 2),
     [info("a.scales", "F16", 2, 16), info("a.qzeros", "I32", 2, 2)], "has 2 groups where 64 values in groups of 16 need 4"),
    ("awq zeros", quantized.SCHEMES["awq"][1], info("a.qweight", "I32", 64, 2),
     [info("a.scales", "F16", 2, 16), info("a.qzeros", "I32", 2, 1)], r"'a\.qzeros' has the shape \[2, 1\]"),
    ("gptq zeros", quantized.SCHEMES["gptq"][1], info("a.qweight", "I32", 8, 16),
     [info("a.scales", "F16", 2, 16), info("a.qzeros", "I32", 2, 4)], r"'a\.qzeros' has the shape \[2, 4\]"),
    ("gptq scales", quantized.SCHEMES["gptq"][1], info("a.qweight", "I32", 8, 16),
     [info("a.scales", "F16", 2, 8), info("a.qzeros", "I32", 2, 2)], r"'a\.scales' has the shape \[2, 8\]"),
    ("channel", quantized.SCHEMES["fp8-channel"][1], info("a.weight", "F8_E4M3", 8, 16),
     [info("a.weight_scale", "BF16", 4, 1)], r"with a scale per row needs \[8, 1\]"),
    ("mxfp4", {"quant_method": "mxfp4"}, info("a_blocks", "U8", 2, 8, 2, 16), [info("a_scales", "U8", 2, 8, 4)],
     r"'a_scales' has the shape \[2, 8, 4\]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "weight", "others", "message"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_a_companion_that_is_missing_or_does_not_fit_is_named(
    config: dict[str, Any], weight: TensorInfo, others: list[TensorInfo], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        quantized_by(config).companions(weight, table(weight, *others))


def test_bits_that_no_config_says_are_asked_for() -> None:
    form = quantized_by({"quant_method": "compressed-tensors", "format": "pack-quantized"})
    with pytest.raises(
        UnsupportedError, match=r"config\.json does not say how many bits the values in 'a\.weight_packed'"
    ):
        form.companions(PACKED, table(PACKED, info("a.weight_scale", "BF16", 8, 2)))


def test_recognising_a_format_imports_no_torch() -> None:
    code = "import sys, reapkit.quantization; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
