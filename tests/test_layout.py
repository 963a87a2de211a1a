"""Every tensor of a MoE layer has its place, or the checkpoint is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint
from reapkit.errors import CheckpointError, ReapkitError, UnsupportedError
from reapkit.layout import resolve
from reapkit.tensors import TensorInfo

EXPERT = "model.layers.1.block_sparse_moe.experts.3"


@pytest.fixture(scope="module")
def checkpoint(m2_fp8: Path) -> Checkpoint:
    return Checkpoint.open(m2_fp8)


def refuse(checkpoint: Checkpoint, error: type[ReapkitError], sentence: str) -> ReapkitError:
    with pytest.raises(error) as caught:
        resolve(checkpoint, ARCHITECTURES)
    assert sentence in caught.value.message
    return caught.value


def without(checkpoint: Checkpoint, condition: Callable[[str], bool]) -> Checkpoint:
    return replace(checkpoint, tensors={n: info for n, info in checkpoint.tensors.items() if not condition(n)})


def plus(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Checkpoint:
    return replace(checkpoint, tensors={**checkpoint.tensors, name: TensorInfo(name, "U8", shape, "x", 0, 0)})


def config(checkpoint: Checkpoint, **changes: object) -> Checkpoint:
    return replace(checkpoint, config={**checkpoint.config, **changes})


def test_every_tensor_of_an_expert_moves_with_it_scales_too(checkpoint: Checkpoint) -> None:
    layout = resolve(checkpoint, ARCHITECTURES)
    assert (layout.num_experts, layout.top_k, layout.num_groups) == (tiny.NUM_EXPERTS, tiny.TOP_K, 1)
    assert layout.layer_indices == (0, 1, 2)
    parts = {".w1.weight", ".w2.weight", ".w3.weight"}
    assert layout.layers[1].experts[3].keys() == parts | {part + "_scale_inv" for part in parts}
    assert layout.expert_of[EXPERT + ".w2.weight_scale_inv"] == (1, 3)
    assert layout.renamed(EXPERT + ".w2.weight_scale_inv", 12) == EXPERT[:-1] + "12.w2.weight_scale_inv"
    assert len(layout.router_names) == 2 * tiny.NUM_LAYERS


def test_dense_layers_among_moe_layers_have_no_slots(qwen3: Path) -> None:
    layout = resolve(Checkpoint.open(qwen3), ARCHITECTURES)
    assert layout.layer_indices == (0, 2)
    assert not any(name.startswith("model.layers.1.") for name in [*layout.expert_of, *layout.stacked_of])


def test_an_unsupported_architecture_is_told_which_ones_are_supported(checkpoint: Checkpoint) -> None:
    error = refuse(
        config(checkpoint, model_type="mixtrel"), UnsupportedError, "the architecture 'mixtrel' is not supported"
    )
    assert error.hint == "supported model types: minimax_m2, qwen3_moe" or "minimax_m2" in str(error.hint)


def test_a_dense_model_is_told_that_it_has_no_experts(checkpoint: Checkpoint) -> None:
    dense = replace(checkpoint, config={"model_type": "llama", "hidden_size": 64})
    refuse(dense, UnsupportedError, "this is a dense model ('llama')")


def test_a_gap_in_expert_numbers_is_an_error(checkpoint: Checkpoint) -> None:
    gap = without(checkpoint, lambda name: name.startswith(EXPERT + "."))
    error = refuse(
        gap, CheckpointError, "layer 1 has 7 experts where config.json says 8: missing 3, beyond the count none"
    )
    assert error.hint == "neither transformers nor vLLM would notice this"


def test_experts_beyond_the_count_are_an_error(checkpoint: Checkpoint) -> None:
    fewer = config(checkpoint, num_local_experts=6)
    refuse(without(fewer, lambda name: "gate" in name or "bias" in name), CheckpointError, "beyond the count 6, 7")


def test_an_expert_that_lacks_a_weight_is_named(checkpoint: Checkpoint) -> None:
    odd = without(checkpoint, lambda name: name == EXPERT + ".w1.weight")
    refuse(odd, CheckpointError, "expert 3 of layer 1 lacks the tensor 'w1.weight' (1 differ)")


def test_an_expert_with_a_weight_of_its_own_is_named(checkpoint: Checkpoint) -> None:
    odd = plus(checkpoint, EXPERT + ".w4.weight", (2, 2))
    refuse(odd, CheckpointError, "expert 3 of layer 1 alone has the tensor 'w4.weight'")


def test_an_expert_that_lacks_a_bias_is_named(checkpoint: Checkpoint) -> None:
    biased = checkpoint
    for layer in range(3):
        for expert in range(8):
            biased = plus(biased, f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.bias", (2,))
    resolve(biased, ARCHITECTURES)
    odd = without(biased, lambda name: name == EXPERT + ".w1.bias")
    refuse(odd, CheckpointError, "expert 3 of layer 1 lacks the tensor 'w1.bias' (1 differ)")


def test_an_expert_that_lacks_a_scale_is_noted_for_whoever_would_keep_it(checkpoint: Checkpoint) -> None:
    odd = without(checkpoint, lambda name: name == EXPERT + ".w1.weight_scale_inv")
    assert [layer.incomplete for layer in resolve(odd, ARCHITECTURES).layers] == [
        {},
        {3: (".w1.weight_scale_inv",)},
        {},
    ]


def test_a_layer_without_its_router_is_named(checkpoint: Checkpoint) -> None:
    odd = without(checkpoint, lambda name: name == "model.layers.2.block_sparse_moe.gate.weight")
    refuse(odd, CheckpointError, "layer 2 has experts and no router")


def test_a_router_of_another_size_than_the_config_says_is_named(checkpoint: Checkpoint) -> None:
    refuse(
        config(checkpoint, num_local_experts=9), CheckpointError, "dimension 0 should be the 9 experts of config.json"
    )


def test_a_forgotten_slot_is_loud(checkpoint: Checkpoint) -> None:
    odd = plus(checkpoint, "model.layers.0.block_sparse_moe.gate.temperature", (tiny.NUM_EXPERTS,))
    refuse(odd, UnsupportedError, "has a dimension equal to the 8 experts")


def test_the_counts_of_the_config_must_be_there_and_agree(checkpoint: Checkpoint) -> None:
    refuse(config(checkpoint, num_experts=7), CheckpointError, "config.json contradicts itself on number of experts")
    refuse(config(checkpoint, num_local_experts=None), CheckpointError, "config.json has no number of experts")
    refuse(config(checkpoint, num_local_experts="8"), CheckpointError, "where a positive whole number is expected")
    refuse(config(checkpoint, num_experts_per_tok=9), CheckpointError, "routes each token to 9 of 8 experts")


def test_a_checkpoint_of_another_family_than_its_config_says_is_refused(checkpoint: Checkpoint) -> None:
    other = config(checkpoint, model_type="qwen3_moe")
    refuse(other, CheckpointError, "has the name of a Qwen3-MoE expert")


# ---- layouts that experts do not have a name of their own in


def headers(tmp_path: Path, shapes: dict[str, tuple[int, ...]], **config: object) -> Checkpoint:
    """A checkpoint of which only names, shapes and the config are there."""
    tensors = {name: TensorInfo(name, "BF16", shape, "x", 0, 0) for name, shape in shapes.items()}
    return Checkpoint(tmp_path, config, tensors, (), "x")


DBRX = {
    "model_type": "dbrx",
    "n_layers": 1,
    "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
}
LONGCAT = {"model_type": "longcat_flash", "num_layers": 1, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2}
ERNIE = {"model_type": "ernie4_5_moe", "num_hidden_layers": 1, "moe_num_experts": 4, "moe_k": 2}
STEP = {"model_type": "step3p5", "num_hidden_layers": 1, "moe_num_experts": 4, "moe_top_k": 2}


def test_rows_of_experts_one_after_the_other_are_cut_by_whole_experts(tmp_path: Path) -> None:
    ffn = "transformer.blocks.0.ffn."
    shapes = {ffn + "experts.mlp.w1": (4 * 6, 5), ffn + "router.layer.weight": (4, 5)}
    layout = resolve(headers(tmp_path, shapes, **DBRX), ARCHITECTURES)
    _, stacked = layout.stacked_of[ffn + "experts.mlp.w1"]
    assert (stacked.num_entries, stacked.entries((1, 3)), stacked.cut((24, 5), 2)) == (4, (1, 3), (12, 5))
    with pytest.raises(CheckpointError, match=r"dimension 0 should be the 4 rows of experts of config\.json"):
        resolve(headers(tmp_path, {**shapes, ffn + "experts.mlp.w1": (26, 5)}, **DBRX), ARCHITECTURES)


def test_rows_of_zero_experts_always_stay(tmp_path: Path) -> None:
    mlp = "model.layers.0.mlp."
    shapes = {mlp + f"experts.{e}.up_proj.weight": (3, 5) for e in range(4)}
    shapes |= {mlp + "router.classifier.weight": (6, 5), mlp + "router.e_score_correction_bias": (6,)}
    layout = resolve(headers(tmp_path, shapes, **LONGCAT), ARCHITECTURES)
    _, router = layout.stacked_of[mlp + "router.classifier.weight"]
    assert router.entries((0, 2)) == (0, 2, 4, 5)
    assert router.cut((6, 5), 2) == (4, 5)


def test_a_bias_whose_experts_are_its_second_dimension_is_cut_there(tmp_path: Path) -> None:
    mlp = "model.layers.0.mlp."
    shapes = {mlp + f"experts.{e}.up_proj.weight": (3, 5) for e in range(4)}
    shapes |= {mlp + "gate.weight": (4, 5), mlp + "moe_statics.e_score_correction_bias": (1, 4)}
    layout = resolve(headers(tmp_path, shapes, **ERNIE), ARCHITECTURES)
    _, bias = layout.stacked_of[mlp + "moe_statics.e_score_correction_bias"]
    assert (bias.axis, bias.cut((1, 4), 3)) == (1, (1, 3))


def test_a_scale_for_all_experts_stays_whole_and_one_per_expert_is_cut(tmp_path: Path) -> None:
    moe = "model.layers.0.moe."
    shapes: dict[str, tuple[int, ...]] = {moe + "gate.weight": (4, 5), moe + "up_proj.weight": (4, 3, 5)}
    shapes |= {
        moe + "up_proj.weight_scale_2": (),
        moe + "up_proj.input_scale": (1,),
        moe + "up_proj.weight_scale": (4, 3),
    }
    layout = resolve(headers(tmp_path, shapes, **STEP), ARCHITECTURES)
    assert set(layout.stacked_of) == {moe + "gate.weight", moe + "up_proj.weight", moe + "up_proj.weight_scale"}
    with pytest.raises(CheckpointError, match="dimension 0 should be the 4 experts"):
        resolve(headers(tmp_path, shapes | {moe + "up_proj.weight_scale": (3,)}, **STEP), ARCHITECTURES)


def test_counts_listed_by_layer_must_be_one_number(checkpoint: Checkpoint) -> None:
    listed = config(checkpoint, num_local_experts=[8, 8, 8])
    assert resolve(listed, ARCHITECTURES).num_experts == 8
    refuse(config(checkpoint, num_local_experts=[8, 4, 8]), CheckpointError, "contradicts itself on number of experts")


def test_mtp_layers_are_numbered_on_from_the_last_decoder_layer(qwen3: Path) -> None:
    checkpoint = Checkpoint.open(qwen3)
    behind = resolve(config(checkpoint, num_hidden_layers=2), ARCHITECTURES)
    assert (behind.layer_indices, behind.mtp_indices) == ((0,), (2,))
    assert behind.is_mtp("model.layers.2.self_attn.q_proj.weight")
    assert not any("layers.2." in name for name in behind.fingerprinted_names)
    assert "model.layers.2.mlp.gate.weight" in behind.router_names
    own = {name.replace("model.layers.2.", "mtp.layers.0.") for name in checkpoint.tensors}
    renamed = replace(
        checkpoint,
        tensors={
            (new := name.replace("model.layers.2.", "mtp.layers.0.")): replace(info, name=new)
            for name, info in checkpoint.tensors.items()
        },
        config=checkpoint.config | {"model_type": "qwen3_next", "num_hidden_layers": 2},
    )
    layout = resolve(renamed, ARCHITECTURES)
    assert (layout.layer_indices, layout.mtp_indices) == ((0,), (2,))
    assert {name for name in own if layout.is_mtp(name)} == {name for name in own if name.startswith("mtp.")}
    assert (
        layout.renamed("mtp.layers.0.mlp.experts.3.up_proj.weight", 11) == "mtp.layers.0.mlp.experts.11.up_proj.weight"
    )


def test_experts_in_a_place_that_the_layout_does_not_know_are_loud(checkpoint: Checkpoint) -> None:
    odd = plus(checkpoint, "mtp.layers.0.mlp.experts.0.up_proj.weight", (2, 2))
    refuse(odd, UnsupportedError, "has the name of an expert")


def test_a_family_whose_images_have_experts_of_their_own_is_refused(checkpoint: Checkpoint) -> None:
    refuse(config(checkpoint, model_type="ernie4_5_vl_moe"), UnsupportedError, "experts for text and others for images")


def test_every_architecture_has_a_name_and_model_types_of_its_own() -> None:
    names = [entry.name for entry in ARCHITECTURES]
    types = [name for entry in ARCHITECTURES for name in entry.model_types]
    assert len(names) == len(set(names))
    assert len(types) == len(set(types))
    for entry in ARCHITECTURES:
        assert entry.refusal or any(slot.role == "router" for slot in entry.slots), entry.name


def test_a_forgotten_slot_in_an_mtp_block_is_loud_too(qwen3: Path) -> None:
    checkpoint = Checkpoint.open(qwen3)
    tensors = {
        (new := name.replace("model.layers.2.", "mtp.layers.0.")): replace(info, name=new)
        for name, info in checkpoint.tensors.items()
    }
    config = checkpoint.config | {"model_type": "qwen3_next", "num_hidden_layers": 2}
    renamed = replace(checkpoint, tensors=tensors, config=config)
    resolve(renamed, ARCHITECTURES)
    odd = plus(renamed, "mtp.layers.0.mlp.gate.e_score_correction_bias", (tiny.NUM_EXPERTS,))
    refuse(odd, UnsupportedError, "has a dimension equal to the 8 experts")


@pytest.mark.parametrize("count", [0, 1, None])
def test_a_dense_member_of_a_family_is_told_that_it_has_no_experts(tmp_path: Path, count: int | None) -> None:
    described = {"model_type": "granitemoehybrid", "num_local_experts": count, "num_hidden_layers": 1}
    dense = headers(tmp_path, {"model.layers.0.shared_mlp.input_linear.weight": (8, 4)}, **described)
    refuse(dense, UnsupportedError, "this is a dense Granite-MoE")
