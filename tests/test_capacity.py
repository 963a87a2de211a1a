"""What `inspect --gpu` promises: memory by hand for each kind of attention and each way to spread a model."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reapkit import capacity, geometry, gpus
from reapkit.capacity import Demand, Parallel
from reapkit.cli import app
from reapkit.errors import UnsupportedError, UsageError
from reapkit.geometry import Geometry
from reapkit.inventory import Inventory, inspect

DATA = Path(__file__).parent / "data"
CONTEXT = 196_608
EXPERT = 3 * 3072 * 1536
EXPERT_BYTES = EXPERT + 4 * EXPERT // 128**2  # FP8 with an F32 scale for each block
H100 = gpus.find("h100")


@pytest.fixture(scope="session")
def m2_inventory(tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    """MiniMax-M2 by its real configuration."""
    folder = tmp_path_factory.mktemp("real") / "MiniMax-M2"
    folder.mkdir()
    shutil.copy(DATA / "minimax-m2-config.json", folder / "config.json")
    return inspect(folder)


def geometry_of(**config: Any) -> Geometry:
    layers = config.get("num_hidden_layers", config.get("num_layers"))
    found = geometry.read(config, layers)
    assert found is not None and found.cache
    return found


# Entries of the vendors' own configurations.
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "vocab_size": 129_280, "moe_intermediate_size": 2048,
    "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "intermediate_size": 18432,
}  # fmt: skip
GPT_OSS_120B: dict[str, Any] = {
    "model_type": "gpt_oss", "num_hidden_layers": 36, "hidden_size": 2880, "vocab_size": 201_088, "intermediate_size": 2880,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
}  # fmt: skip
QWEN3_NEXT: dict[str, Any] = {
    "model_type": "qwen3_next", "num_hidden_layers": 48, "hidden_size": 2048, "vocab_size": 151_936, "moe_intermediate_size": 512,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "full_attention_interval": 4, "linear_num_key_heads": 16,
    "linear_key_head_dim": 128, "linear_num_value_heads": 32, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip


def bytes_of(shape: Geometry, tokens: int, parallel: Parallel = Parallel(), in_flight: int = 2 * 8192) -> int:  # noqa: B008
    return capacity.pool(shape, parallel, value_bytes=2).sequence_bytes(tokens, in_flight=in_flight)


def per_token(shape: Geometry, parallel: Parallel = Parallel()) -> int:  # noqa: B008
    return capacity.token_bytes(shape, parallel, value_bytes=2)


def test_minimax_m2s_cache_is_the_hand_computed_one(m2_inventory: Inventory) -> None:
    """62 layers of 8 key and 8 value heads of 128 in bf16; eight cards have a head each, sixteen have it twice."""
    shape = capacity.require_geometry(m2_inventory)
    whole = 62 * 2 * 8 * 128 * 2
    assert whole == 253_952
    assert per_token(shape) == whole
    assert per_token(shape, Parallel(8)) == per_token(shape, Parallel(16)) == whole // 8
    assert per_token(shape, Parallel(4, 2)) == whole // 4 // 2
    assert bytes_of(shape, CONTEXT, Parallel(8)) == CONTEXT * whole // 8 == 6_241_124_352
    assert bytes_of(shape, 17) == 32 * whole, "whole blocks of 16 tokens"
    assert capacity.pool(shape, Parallel(), value_bytes=1).sequence_bytes(CONTEXT, in_flight=0) == CONTEXT * whole // 2


def test_latent_attention_is_the_same_on_every_card() -> None:
    """DeepSeek-V3: 512 latent and 64 rotary values in each of 61 layers; V3.2 adds an index of 128 FP8 values and a scale."""
    shape = geometry_of(**DEEPSEEK_V3)
    assert per_token(shape) == per_token(shape, Parallel(8)) == 61 * 576 * 2 == 70_272
    assert bytes_of(shape, 163_840, Parallel(8)) == 163_840 * 70_272
    assert shape.replicated_values == 7168 * (1536 + 512 + 64)
    assert shape.absorbed_values == 128 * 512 * (128 + 128)
    indexed = geometry_of(**DEEPSEEK_V3 | {"model_type": "deepseek_v32", "index_head_dim": 128})
    assert per_token(indexed) == 61 * (576 * 2 + 132)
    assert bytes_of(indexed, 4096) == 4096 * 61 * (576 * 2 + 132)


def test_sliding_windows_keep_their_window_and_the_steps_under_way() -> None:
    """gpt-oss-120b: 18 full and 18 sliding layers; a block of 16 tokens of a group takes 18 x 16 x 8 x (64 + 64) x 2 bytes."""
    shape = geometry_of(**GPT_OSS_120B)
    block = 18 * 16 * 8 * 128 * 2
    assert per_token(shape) == block // 16 == 36_864
    full = 131_072 // 16
    sliding = math.ceil((127 + 2 * 8192) / 16) + 1
    assert bytes_of(shape, 131_072) == (full + sliding) * block
    assert bytes_of(shape, 64) == (4 + 5) * block
    without = {key: value for key, value in GPT_OSS_120B.items() if key != "layer_types"}
    assert geometry_of(**without).cache == shape.cache, "they alternate where config.json does not say"


def test_recurrent_layers_keep_a_state_per_sequence() -> None:
    """Qwen3-Next: 12 full layers of 2 x 256, and 36 with a state; blocks are made long enough to hold one."""
    shape = geometry_of(**QWEN3_NEXT)
    state = 4 * ((2 * 16 * 128 + 32 * 128) * 3 + 32 * 128 * 128)
    assert state == 2_195_456
    token = 2 * 2 * 256 * 2
    longer = math.ceil(state / (16 * token))
    assert per_token(shape) == 12 * token
    blocks = math.ceil(10_000 / (16 * longer)) + 3
    assert bytes_of(shape, 10_000) == blocks * 12 * 16 * longer * token


def test_other_ways_to_mix_attention_are_read() -> None:
    plain = {
        "hidden_size": 512,
        "vocab_size": 1000,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    }
    kinds = {
        "llama4_text": ({"attention_chunk_size": 8192}, {"full": 2, "chunked": 6}),
        "mixtral": ({"sliding_window": 4096}, {"sliding": 8}),
        "qwen3_moe": ({"sliding_window": 4096, "use_sliding_window": False}, {"full": 8}),
        "minimax_m1": ({"attn_type_list": [0, 0, 0, 1] * 2}, {"full": 2, "state": 6}),
        "mimo_v2_flash": (
            {"hybrid_layer_pattern": [0, 1, 1, 1] * 2, "sliding_window_size": 128, "swa_num_key_value_heads": 8, "v_head_dim": 32},
            {"full": 2, "sliding": 6},
        ),
        "gemma4": (
            {"layer_types": ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 4, "sliding_window": 512,
             "num_kv_shared_layers": 4, "global_head_dim": 128},
            {"full": 1, "sliding": 3},
        ),
        "kimi_linear": (
            {"kv_lora_rank": 128, "qk_rope_head_dim": 64,
             "linear_attn_config": {"full_attn_layers": [4, 8], "num_heads": 4, "head_dim": 64, "short_conv_kernel_size": 4}},
            {"latent": 2, "state": 6},
        ),
        "nemotron_h": (
            {"hybrid_override_pattern": "MEM*EMME", "mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 16, "n_groups": 2,
             "conv_kernel": 4},
            {"full": 1, "state": 4},
        ),
        "jamba": (
            {"attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_d_conv": 4},
            {"full": 1, "state": 7},
        ),
        "lfm2_moe": ({"layer_types": ["conv", "conv", "full_attention", "conv"] * 2, "conv_L_cache": 3}, {"full": 2, "state": 6}),
    }  # fmt: skip
    for model_type, (entries, expected) in kinds.items():
        shape = geometry_of(model_type=model_type, num_hidden_layers=8, **plain | entries)
        assert {layer.kind: layer.num_layers for layer in shape.cache} == expected, model_type
    mimo = geometry_of(model_type="mimo_v2_flash", num_hidden_layers=8, **plain | kinds["mimo_v2_flash"][0])
    assert [(layer.heads, layer.values) for layer in mimo.cache] == [(4, 96), (8, 96)]
    gemma = geometry_of(model_type="gemma4", num_hidden_layers=8, **plain | kinds["gemma4"][0])
    assert [layer.values for layer in gemma.cache] == [256, 128]
    longcat = geometry_of(**DEEPSEEK_V3 | {"model_type": "longcat_flash", "num_hidden_layers": 28})
    assert longcat.cache[0].num_layers == 56


def test_what_is_not_known_is_said_and_does_not_stop_inspect(m2_inventory: Inventory) -> None:
    odd = geometry.read(DEEPSEEK_V3 | {"model_type": "bailing_hybrid"}, 61)
    assert odd is not None and odd.cache == ()
    assert geometry.read(QWEN3_NEXT | {"layer_types": ["something new"] * 48}, 48).cache == ()  # type: ignore[union-attr]
    assert geometry.read({"model_type": "qwen3_moe"}, 8) is None
    for shape in (odd, None):
        with pytest.raises(UnsupportedError, match=r"does not follow from config\.json"):
            capacity.capacity(replace(m2_inventory, geometry=shape), H100, Parallel(8))
    with pytest.raises(UnsupportedError, match="how long sequences may be"):
        capacity.capacity(replace(m2_inventory, context_length=None), H100, Parallel(8))


@pytest.mark.parametrize(("experts", "parallel", "share"), [
    (256, Parallel(8, experts=True), 32), (180, Parallel(8, experts=True), 23), (180, Parallel(4), 45), (192, Parallel(1), 192),
])  # fmt: skip
def test_weights_on_the_fullest_card_are_the_hand_computed_ones(
    m2_inventory: Inventory, experts: int, parallel: Parallel, share: int
) -> None:
    """Experts, attention and embeddings are divided, routers and norms are not; 180 experts over 8 cards are 23 on the fullest."""
    projections = 2 * 3072 * 6144 + 2 * 3072 * 1024
    attention = projections + 4 * projections // 128**2 + 2 * (6144 + 1024)
    routers = experts * 4 * (3072 + 1)
    norms = 2 * (62 * 2 * 3072 + 3072)
    embeddings = 2 * 2 * 200_064 * 3072
    by_hand = 62 * (share * EXPERT_BYTES + routers + attention / parallel.tensor) + norms + embeddings / parallel.tensor
    found = capacity.weight_bytes(m2_inventory, parallel, experts)
    # Routers, whose dtype config.json does not say, are assumed to be in F32.
    assert abs(found - by_hand) <= 1


def test_pipeline_stages_share_layers_and_the_ends_have_the_embeddings(m2_inventory: Inventory) -> None:
    whole, staged = (capacity.weight_bytes(m2_inventory, Parallel(1, stages), 256) for stages in (1, 2))
    embeddings = 2 * 2 * 200_064 * 3072
    assert staged == pytest.approx((whole - embeddings) / 2 + embeddings / 2, abs=2)
    assert capacity.stage_layers(62, 4) == 16


def test_a_card_with_fewer_key_value_heads_than_cards_has_one_whole(m2_inventory: Inventory) -> None:
    eight, sixteen = (capacity.weight_bytes(m2_inventory, Parallel(cards), 256) for cards in (8, 16))
    per_head = 62 * 3072 * 2 * 128
    scales = 1 + 4 / 128**2
    halves = (eight - sixteen) - (eight - replicated_bytes()) / 2
    # Of the two heads' worth that eight cards have, sixteen keep one and not a half.
    assert halves == pytest.approx(-per_head * scales / 2, rel=0.01)


def replicated_bytes() -> int:
    return 62 * 256 * 4 * 3073 + 2 * (62 * 2 * 3072 + 3072)


def test_latent_attention_keeps_its_down_projections_whole_and_its_up_projections_twice(
    m2_inventory: Inventory,
) -> None:
    """Beside what plain attention of as many bytes would take."""
    shape = geometry_of(**DEEPSEEK_V3)
    plain = replace(shape, cache=(), replicated_values=0, absorbed_values=0)
    inventory = replace(m2_inventory, num_layers=61, moe_layers=61)
    part = next(part for part in inventory.parts if part.name == "attention")
    each = part.nbytes / part.parameters
    more = [capacity.weight_bytes(replace(inventory, geometry=found), Parallel(8), 256) for found in (shape, plain)]
    whole = 61 * shape.replicated_values * each
    assert more[0] - more[1] == pytest.approx(whole * 7 / 8 + 2 * 61 * shape.absorbed_values / 8, abs=2)


def test_what_fits_is_what_is_left_of_the_card(m2_inventory: Inventory) -> None:
    found = capacity.capacity(m2_inventory, H100, Parallel(8, experts=True), num_experts=180)
    assert found.usable == int(H100.nbytes * 0.92)
    assert found.cache == found.usable - found.weights - found.overhead
    assert found.max_num_seqs == found.cache // found.per_sequence == 8
    assert found.fits and found.missing == 0 and found.max_context == CONTEXT
    assert found.cached_tokens == (found.cache // (16 * 31_744)) * 16
    # 8,192 tokens of 8 whole experts of 1,536 and 3,072 values, 8 x 3,072 besides, in bf16; logits of 1,024 sequences, twice, in float32.
    activations = 8192 * 2 * (8 * (3 * 1536 + 3072) + 8 * 3072)
    assert found.overhead == int(2.5 * 2**30) + activations + 1024 * 200_064 * 4 * 2


def test_the_longest_context_is_the_longest_that_fits(m2_inventory: Inventory) -> None:
    found = capacity.capacity(m2_inventory, gpus.find("h200"), Parallel(2))
    assert not found.fits and 0 < found.max_context < CONTEXT
    shape = capacity.require_geometry(m2_inventory)
    assert (
        bytes_of(shape, found.max_context, Parallel(2))
        <= found.cache
        < bytes_of(shape, found.max_context + 1, Parallel(2))
    )
    assert found.missing == found.per_sequence - found.cache
    shorter = capacity.capacity(m2_inventory, gpus.find("h200"), Parallel(2), Demand(context=found.max_context))
    assert shorter.fits


def test_each_next_step_is_enough_and_no_smaller_one_is(m2_inventory: Inventory) -> None:
    card = gpus.find("h200")
    steps = " ".join(capacity.next_steps(m2_inventory, card, 2))
    for words in ("--max-model-len 137904", "--kv-cache-dtype fp8", "--count 4", "238 of 256, 7.0 % removed"):
        assert words in steps
    assert capacity.capacity(m2_inventory, card, Parallel(2), num_experts=238).fits
    assert not capacity.capacity(m2_inventory, card, Parallel(2), num_experts=240).fits
    assert capacity.capacity(m2_inventory, card, Parallel(2), Demand(kv_dtype="fp8")).fits
    assert capacity.next_steps(m2_inventory, H100, 8) == []
    hopeless = " ".join(capacity.next_steps(m2_inventory, gpus.find("unified-128"), 1))
    assert (
        "--count 4" in hopeless and "fewer experts alone do not do it" in hopeless and "--max-model-len" not in hopeless
    )


@pytest.mark.parametrize(("cards", "expected"), [
    (1, Parallel(1)), (4, Parallel(4)), (8, Parallel(8, experts=True)), (6, Parallel(2, 3)), (16, Parallel(16, experts=True)),
])  # fmt: skip
def test_a_model_is_spread_as_its_heads_and_blocks_allow(
    m2_inventory: Inventory, cards: int, expected: Parallel
) -> None:
    """Eight cards would cut experts of 1,536 into 192, which is not whole blocks of 128; 8 key-value heads do not divide by 6."""
    assert capacity.spread(m2_inventory, cards) == expected
    assert expected.gpus == cards


def test_unquantised_experts_are_cut_freely(m2_inventory: Inventory) -> None:
    assert capacity.spread(replace(m2_inventory, block=None), 8) == Parallel(8)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Demand(context=0), "--max-model-len 0"),
    (lambda: Demand(kv_dtype="fp9"), "no KV cache dtype 'fp9'"),
    (lambda: Demand(utilization=92.0), "--gpu-memory-utilization 92.0"),
    (lambda: gpus.find("h10"), "no card 'h10'"),
])  # fmt: skip
def test_impossible_demands_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_no_cards_are_refused(m2_inventory: Inventory) -> None:
    with pytest.raises(UsageError, match="--count 0"):
        capacity.spread(m2_inventory, 0)


def test_a_drivers_name_is_recognized() -> None:
    found = gpus.recognize("NVIDIA H100 80GB HBM3", 85_000_000_000)
    assert (found.name, found.nbytes, found.max_num_seqs) == ("h100", 85_000_000_000, 1024)
    assert gpus.recognize("NVIDIA A100-SXM4-40GB", 1).name == "a100-40"
    unknown = gpus.recognize("Card 9000", 16 << 30)
    assert (unknown.name, unknown.utilization, unknown.max_num_seqs) == ("card-9000", 0.92, 256)


def test_inspect_prints_the_table_and_its_json(m2_inventory: Inventory, tmp_path: Path) -> None:
    shutil.copy(DATA / "minimax-m2-config.json", tmp_path / "config.json")
    arguments = ["inspect", str(tmp_path), "--gpu", "h100", "--count", "8"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if " % " in line]
    assert [(row[0], row[2]) for row in rows] == [
        ("0.0", "256"),
        ("25.0", "192"),
        ("30.0", "180"),
        ("40.0", "154"),
        ("50.0", "128"),
    ]
    described = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    thirty = described["capacity"][2]
    found = capacity.capacity(m2_inventory, H100, Parallel(8, experts=True), num_experts=180)
    assert thirty == {"ratio": "0.30", **found.to_json()}
    assert described["next_steps"] == []
    lone = CliRunner().invoke(app, ["inspect", str(tmp_path), "--count", "8"])
    assert lone.exit_code == 2 and "what fits depends on the card" in lone.stderr
    assert [row["gpu"] for row in json.loads(CliRunner().invoke(app, ["list", "gpus", "--json"]).stdout)] == [
        gpu.name for gpu in gpus.GPUS
    ]
