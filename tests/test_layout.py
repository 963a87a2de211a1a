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


def test_an_expert_that_lacks_a_scale_is_named(checkpoint: Checkpoint) -> None:
    odd = without(checkpoint, lambda name: name == EXPERT + ".w1.weight_scale_inv")
    refuse(odd, CheckpointError, "expert 3 of layer 1 lacks the tensor 'w1.weight_scale_inv' (1 differ)")


def test_an_expert_with_a_tensor_of_its_own_is_named(checkpoint: Checkpoint) -> None:
    odd = plus(checkpoint, EXPERT + ".w1.input_scale", ())
    refuse(odd, CheckpointError, "expert 3 of layer 1 alone has the tensor 'w1.input_scale'")


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
