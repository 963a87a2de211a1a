"""The bundled model keeps its promises: the vendor's layout, honest splits, a scorer that can be trusted."""

import json
import random
import struct
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "m2-nano"
sys.path.insert(0, str(ROOT / "examples" / "m2_nano"))

import sandbox  # noqa: E402
from tasks import DOMAINS, draw, is_held_out, prompt_key  # noqa: E402

CONFIG = json.loads((MODEL / "config.json").read_text())
INDEX = json.loads((MODEL / "model.safetensors.index.json").read_text())


def read_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (MODEL / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def read_headers() -> dict[str, tuple[str, list[int], str, int]]:
    """dtype, shape, file and bytes of every tensor, from the shards' headers alone."""
    found = {}
    for file in sorted(MODEL.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        header.pop("__metadata__")
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            found[name] = (entry["dtype"], entry["shape"], file.name, stop - start)
    return found


def expected_tensors() -> dict[str, tuple[str, list[int]]]:
    hidden, width, experts = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_local_experts"]
    queries, keys = (
        CONFIG["num_attention_heads"] * CONFIG["head_dim"],
        CONFIG["num_key_value_heads"] * CONFIG["head_dim"],
    )
    expected = {
        name: ("BF16", [CONFIG["vocab_size"], hidden]) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    expected["model.norm.weight"] = ("BF16", [hidden])

    def add_fp8(name: str, rows: int, columns: int) -> None:
        expected[f"{name}.weight"] = ("F8_E4M3", [rows, columns])
        expected[f"{name}.weight_scale_inv"] = ("F32", [rows // 128, columns // 128])

    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, size in (
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
            ("self_attn.q_norm", queries),
            ("self_attn.k_norm", keys),
        ):
            expected[f"{prefix}.{name}.weight"] = ("BF16", [size])
        for name, rows, columns in (
            ("q", queries, hidden),
            ("k", keys, hidden),
            ("v", keys, hidden),
            ("o", hidden, queries),
        ):
            add_fp8(f"{prefix}.self_attn.{name}_proj", rows, columns)
        expected[f"{prefix}.block_sparse_moe.gate.weight"] = ("F32", [experts, hidden])
        expected[f"{prefix}.block_sparse_moe.e_score_correction_bias"] = ("F32", [experts])
        for expert in range(experts):
            for name, rows, columns in (("w1", width, hidden), ("w2", hidden, width), ("w3", width, hidden)):
                add_fp8(f"{prefix}.block_sparse_moe.experts.{expert}.{name}", rows, columns)
    return expected


def test_layout_is_the_vendors():
    found = read_headers()
    assert {name: (dtype, shape) for name, (dtype, shape, _, _) in found.items()} == expected_tensors()


def test_index_and_sizes():
    found = read_headers()
    assert INDEX["weight_map"] == {name: file for name, (_, _, file, _) in found.items()}
    assert INDEX["metadata"]["total_size"] == sum(size for *_, size in found.values())
    shards = list(MODEL.glob("*.safetensors"))
    assert len(shards) >= 3 and all(shard.stat().st_size < 15e6 for shard in shards)
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) < 34e6


def test_config_has_the_vendors_keys():
    assert (
        CONFIG["architectures"] == ["MiniMaxM2ForCausalLM"]
        and CONFIG["model_type"] == "minimax_m2"
        and "auto_map" not in CONFIG
    )
    assert (CONFIG["use_mtp"], CONFIG["num_mtp_modules"], CONFIG["mtp_transformer_layers"]) == (True, 3, 1)
    assert (
        CONFIG["use_routing_bias"]
        and CONFIG["scoring_func"] == "sigmoid"
        and CONFIG["use_qk_norm"]
        and CONFIG["qk_norm_type"] == "per_layer"
    )
    assert CONFIG["quantization_config"] == {
        "quant_method": "fp8", "fmt": "float8_e4m3fn", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    }  # fmt: skip
    assert CONFIG["num_attention_heads"] * CONFIG["head_dim"] != CONFIG["hidden_size"]
    assert CONFIG["attn_type_list"] == [1] * CONFIG["num_hidden_layers"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_generators_are_deterministic_and_split(domain: str):
    first, second = (
        [draw(domain, rng, held_out=side) for side in (False, True) for _ in range(60)]
        for rng in (random.Random(5), random.Random(5))
    )
    assert first == second
    assert [is_held_out(prompt_key(row)) for row in first] == [False] * 60 + [True] * 60


def test_splits_are_disjoint_and_held_out():
    calibration, heldout = read_rows("calibration"), read_rows("heldout")
    keys = [{row.get("text") or prompt_key(row) for row in rows} for rows in (calibration, heldout)]
    assert len(keys[0]) == len(calibration) and len(keys[1]) == len(heldout) and not keys[0] & keys[1]
    for rows in (calibration, heldout):
        assert {row["domain"] for row in rows} == {*DOMAINS, "stdlib", "gsm8k"}
        for domain in DOMAINS:
            chosen = [row for row in rows if row["domain"] == domain]
            assert len(chosen) >= 64 and all(is_held_out(prompt_key(row)) for row in chosen)
        assert all(is_held_out(row["messages"][0]["content"]) for row in rows if row["domain"] == "gsm8k")


@pytest.mark.parametrize(
    "code",
    [
        "import os\ndef f(n):\n    return 1\n",
        "def f(n):\n    return ().__class__\n",
        "def f(n):\n    return __builtins__\n",
        "def f(n):\n    return 'x'.format(n)\n",
        "f = lambda n: 1\n",
        "@f\ndef f(n):\n    return 1\n",
        "class f:\n    pass\n",
        "def f(n)\n    return 1\n",
        "def f(n):\n    try:\n        return 1\n    finally:\n        pass\n",
    ],
)
def test_sandbox_refuses(code: str):
    assert sandbox.check(code) is not None
    assert not sandbox.passes(code, "f", [[[1], 1]])


@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("def f(n):\n    return n * 2\n", True),
        ("def f(n):\n    return n * 3\n", False),
        ("def f(n):\n    return open('/etc/passwd')\n", False),
        ("def f(n):\n    while True:\n        n += 1\n", False),
        ("def g(n):\n    return n * 2\n", False),
    ],
)
def test_sandbox_judges(code: str, right: bool):
    assert sandbox.passes(code, "f", [[[1], 2], [[4], 8]]) is right


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(MODEL)


def test_every_reference_is_right(tokenizer):
    from score import is_right, reference_reply

    rows = [row for row in read_rows("heldout") if row["domain"] in DOMAINS]
    assert [row["messages"][0]["content"] for row in rows if not is_right(row, reference_reply(row, tokenizer))] == []


def test_a_changed_argument_is_wrong(tokenizer):
    from score import is_right, reference_reply

    row = next(row for row in read_rows("heldout") if "calls" in row and row["calls"][0]["arguments"])
    value = str(next(iter(row["calls"][0]["arguments"].values())))
    reply = reference_reply(row, tokenizer)
    assert is_right(row, reply)
    assert not is_right(row, reply.replace(f">{value}</parameter>", f">{value}x</parameter>"))


def test_chat_template_speaks_minimax(tokenizer):
    arguments = {"city": 'São "P"', "days": 3, "exact": True, "tags": ["a", "b"], "note": "x, y: {z}\n"}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
    texts = []
    for form in (arguments, json.dumps(arguments), json.dumps(arguments, ensure_ascii=False)):
        call = {"type": "function", "function": {"name": "get_weather", "arguments": form}}
        messages = [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "reasoning_content": "I need it.", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "sunny"},
            {"role": "tool", "content": "warm"},
        ]
        texts.append(tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False, add_generation_prompt=True))
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] == (
        "]~!b[]~b]system\nYou are a helpful assistant.\n\n# Tools\nCall tools in <minimax:tool_call> XML.\n\n<tools>\n"
        f"<tool>{json.dumps(tool['function'])}</tool>\n</tools>[e~[\n"
        "]~b]user\nWeather?[e~[\n"
        ']~b]ai\n<think>\nI need it.\n</think>\n\n<minimax:tool_call>\n<invoke name="get_weather">\n'
        '<parameter name="city">São "P"</parameter>\n<parameter name="days">3</parameter>\n<parameter name="exact">true</parameter>\n'
        '<parameter name="tags">["a", "b"]</parameter>\n<parameter name="note">x, y: {z}\n</parameter>\n'
        "</invoke>\n</minimax:tool_call>[e~[\n"
        "]~b]tool\n<response>sunny</response>\n<response>warm</response>[e~[\n"
        "]~b]ai\n<think>\n"
    )
    ids = tokenizer(texts[0]).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 4
    assert "<minimax:tool_call>" in tokenizer.decode(ids, skip_special_tokens=True)


def test_earlier_reasoning_is_dropped(tokenizer):
    turn = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>\neasy\n</think>\n\n2"}]
    text = tokenizer.apply_chat_template(turn + turn, tokenize=False)
    assert text.count("easy") == 1 and text.count("]~b]ai\n2[e~[") == 1


def test_loads_in_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from export import dequantize
    from safetensors import safe_open

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    prefix = "model.layers.1.block_sparse_moe"
    names = [
        f"{prefix}.gate.weight",
        f"{prefix}.e_score_correction_bias",
        f"{prefix}.experts.7.w2.weight",
        f"{prefix}.experts.7.w2.weight_scale_inv",
    ]
    tensors = []
    for name in names:
        with safe_open(MODEL / INDEX["weight_map"][name], "pt") as file:
            tensors.append(file.get_tensor(name))
    block = model.model.layers[1].mlp
    assert torch.equal(block.gate.weight, tensors[0]) and torch.equal(block.e_score_correction_bias, tensors[1])
    assert torch.equal(block.experts.down_proj[7].float(), dequantize(tensors[2], tensors[3]))


@pytest.mark.parametrize("dequantize", [False, True], ids=["fp8", "bf16"])
def test_pruned_it_loads_whole_and_equals_the_original_with_its_router_masked(dequantize: bool, tmp_path: Path) -> None:
    """In float32, as shipped in FP8 and dequantised."""
    import torch
    from transformers import AutoModelForCausalLM

    import reapkit
    from streaming import full_model

    original, pruned = MODEL, tmp_path / "pruned"
    if dequantize:
        original = tmp_path / "original"
        reapkit.prune(MODEL, reapkit.plan(MODEL, criterion="random", keep=48), original, dequantize=True)
    plan = reapkit.plan(MODEL, criterion="random", keep=36, seed=3)
    reapkit.prune(MODEL, plan, pruned, dequantize=dequantize)
    _, info = AutoModelForCausalLM.from_pretrained(pruned, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]

    masked = full_model(original)
    for layer in plan.kept:
        masked.model.layers[layer].mlp.e_score_correction_bias[list(plan.dropped(layer))] = -1e9
    ids = torch.arange(20, 220).view(2, 100)
    with torch.inference_mode():
        reference, logits = masked(ids).logits, full_model(pruned)(ids).logits
    assert torch.allclose(logits, reference, atol=1e-4)
    assert torch.equal(logits.argmax(-1), reference.argmax(-1))
