"""Files as a stranger might have made them: one function per kind of file, which may raise ReapkitError and nothing else.

Cases are made from whole small files by changing their structure (a JSON value, a key, a length, a name) more often than their bytes.
Nothing here needs torch but what reads tokenizers, so that most targets start at once. Used by test_fuzz.py, which also replays the
corpus of cases that once failed, and by benchmarks/fuzz.py, which runs many.
"""

from __future__ import annotations

import base64
import copy
import gzip
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reapkit import calibration, criteria, plans, shards
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint
from reapkit.edits import edit_config, edit_sidecars, outputs
from reapkit.inventory import inspect
from reapkit.layout import Identity, resolve
from reapkit.plans import PruningPlan
from reapkit.statistics import NUM_FOLDS, CalibrationRecord, LayerStatistics, Statistics, combine
from reapkit.tensors import encode_header, nbytes
from reapkit.verification import verify

CORPUS = Path(__file__).parent / "data/fuzz"
EXPERTS, TOP_K, LAYERS, HIDDEN, WIDTH = 4, 2, 2, 8, 4

Tensors = dict[str, tuple[str, tuple[int, ...]]]

# ---- small checkpoints, written without torch ---------------------------------------------------------------------------------------


def _qwen3() -> tuple[dict[str, Any], Tensors]:
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (6, HIDDEN)), "lm_head.weight": ("BF16", (6, HIDDEN))}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.gate.weight"] = ("BF16", (EXPERTS, HIDDEN))
        for expert in range(EXPERTS):
            tensors[f"{block}.experts.{expert}.down_proj.weight"] = ("BF16", (HIDDEN, WIDTH))
            tensors[f"{block}.experts.{expert}.up_proj.weight"] = ("BF16", (WIDTH, HIDDEN))
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": LAYERS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
    }
    return {**config, "hidden_size": HIDDEN, "dtype": "bfloat16", "architectures": ["Qwen3MoeForCausalLM"]}, tensors


def _m2_fp8() -> tuple[dict[str, Any], Tensors]:
    tensors: Tensors = {"model.norm.weight": ("BF16", (HIDDEN,))}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{block}.gate.weight"] = ("F32", (EXPERTS, HIDDEN))
        tensors[f"{block}.e_score_correction_bias"] = ("F32", (EXPERTS,))
        for expert in range(EXPERTS):
            tensors[f"{block}.experts.{expert}.w1.weight"] = ("F8_E4M3", (WIDTH, HIDDEN))
            tensors[f"{block}.experts.{expert}.w1.weight_scale_inv"] = ("F32", (2, 2))
    config = {
        "model_type": "minimax_m2",
        "num_hidden_layers": LAYERS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
    }
    quantization = {"quant_method": "fp8", "weight_block_size": [2, 4], "modules_to_not_convert": ["gate", "lm_head"]}
    return {**config, "quantization_config": quantization, "num_mtp_modules": 0, "scoring_func": "sigmoid"}, tensors


def _packed() -> tuple[dict[str, Any], Tensors]:
    tensors: Tensors = {"model.norm.weight": ("BF16", (HIDDEN,))}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.gate.weight"] = ("BF16", (EXPERTS, HIDDEN))
        for expert in range(EXPERTS):
            tensors[f"{block}.experts.{expert}.up_proj.weight_packed"] = ("I32", (WIDTH, 1))
            tensors[f"{block}.experts.{expert}.up_proj.weight_scale"] = ("BF16", (WIDTH, 1))
    weights = {"num_bits": 4, "type": "int", "group_size": 8, "strategy": "group", "symmetric": True}
    group = {"targets": [r"re:.*experts\.\d+.*", "Linear"], "weights": weights}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
                    "ignore": ["lm_head", "re:.*mlp.gate$", "model.layers.0.mlp.experts.1.up_proj"]}  # fmt: skip
    config, _ = _qwen3()
    return {**config, "quantization_config": quantization}, tensors


def _stacked() -> tuple[dict[str, Any], Tensors]:
    tensors: Tensors = {"model.norm.weight": ("BF16", (HIDDEN,))}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.router.weight"] = ("BF16", (EXPERTS, HIDDEN))
        tensors[f"{block}.router.bias"] = ("BF16", (EXPERTS,))
        tensors[f"{block}.experts.gate_up_proj_blocks"] = ("U8", (EXPERTS, WIDTH, 1, 16))
        tensors[f"{block}.experts.gate_up_proj_scales"] = ("U8", (EXPERTS, WIDTH, 1))
        tensors[f"{block}.experts.gate_up_proj_bias"] = ("BF16", (EXPERTS, WIDTH))
    config = {
        "model_type": "gpt_oss",
        "num_hidden_layers": LAYERS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
    }
    return {**config, "quantization_config": {"quant_method": "mxfp4"}, "layer_types": ["full_attention"]}, tensors


KINDS = (_qwen3, _m2_fp8, _packed, _stacked)


def shard(tensors: Tensors) -> bytes:
    """A safetensors file with these tensors and bytes that tell them apart."""
    body = b"".join(bytes((7 * len(name) + i) % 251 for i in range(nbytes(*kind))) for name, kind in tensors.items())
    return encode_header([(name, *kind) for name, kind in tensors.items()], metadata={"format": "pt"}) + body


def write_checkpoint(folder: Path, kind: Callable[[], tuple[dict[str, Any], Tensors]], *, num_shards: int = 1) -> Path:
    """A small checkpoint, with an index where there are several shards."""
    folder.mkdir(parents=True)
    config, tensors = kind()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if num_shards == 1:
        (folder / "model.safetensors").write_bytes(shard(tensors))
        return folder
    files = {name: f"model-{number % num_shards}.safetensors" for number, name in enumerate(tensors)}
    for file in dict.fromkeys(files.values()):
        (folder / file).write_bytes(shard({name: entry for name, entry in tensors.items() if files[name] == file}))
    total = sum(nbytes(*entry) for entry in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": files})
    )
    return folder


# ---- changing files -----------------------------------------------------------------------------------------------------------------

DEEP = object()  # written as nesting that no parser follows
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400,
    0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf"), "", "0", "-1", "1e3", " 4", "\uff14", "NaN", "y" * 300,
    "a\0b", "a\nb", "\x1b[31mred", "\u202e", "\ud800", "[bold]", "[/]", "../x", "/etc/passwd", "..", ".", "a/b", "file:///x", "\\\\x",
    "re:(", "re:.*", "-:.*", "+:[", "{layer}", "%s", "model.safetensors", "reapkit.json", "re:(a+)+$", "experts.0", "*", "?",
    [], {}, [[]], [None], {"": None}, [0] * 50, ["a", 1], [1, 2], {"quant_method": "fp8"}, DEEP,
)  # fmt: skip


def _dumps(value: Any, chance: random.Random) -> str:
    """JSON text, with keys given twice and nesting beyond any stack now and then."""
    text = json.dumps(value, default=lambda _: "@deep@", ensure_ascii=chance.random() < 0.5)
    depth = chance.choice((50, 2_000, 100_000))
    return text.replace('"@deep@"', chance.choice(("[" * depth, "[" * depth + "]" * depth, '{"a":' * depth)))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    found: list[tuple[Any, Any]] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        keys: Any = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            stack.append(node[key])
    return found


def change_tree(tree: Any, chance: random.Random) -> Any:
    """A JSON tree with one to four changes."""
    box = [copy.deepcopy(tree)]
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 4))):
        places = _places(box)
        node, key = chance.choice(places)
        what = chance.randrange(10)
        if what < 4:
            node[key] = copy.deepcopy(chance.choice(VALUES))
        elif what == 4:
            other, at = chance.choice(places)
            node[key] = copy.deepcopy(other[at])
        elif what == 5 and node is not box:
            del node[key]
        elif what == 6 and isinstance(node, dict):
            new = chance.choice(
                (str(key) + "x", str(key)[:-1], *(str(value) for value in VALUES[20:40]), "0", "99", "-1")
            )
            node[new] = node.pop(key)
        elif what == 7 and type(node[key]) in (int, float):
            node[key] = chance.choice(
                (
                    node[key] + 1,
                    node[key] - 1,
                    -node[key],
                    node[key] * 2,
                    node[key] / 2 if abs(node[key]) < 2**60 else 0.5,
                    str(node[key]),
                )
            )
        elif what == 8:
            node[key] = chance.choice(([node[key]], {"a": node[key]}, str(node[key])))
        elif isinstance(node[key], list):
            chance.shuffle(node[key])
        elif isinstance(node[key], str):
            at = chance.randrange(len(node[key]) + 1)
            node[key] = node[key][:at] + str(chance.choice(VALUES[22:52])) + node[key][at:]
    return box[0]


def change_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut out, doubled, put in or cut off."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(data) + 1)
        span = chance.choice((1, 1, 2, 4, 8, 64))
        what = chance.randrange(6)
        if what == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif what == 1:
            del data[at : at + span]
        elif what == 2:
            data[at:at] = data[at : at + span]
        elif what == 3:
            data[at:at] = chance.choice(
                (b"\0", b"\xff", b'"', b"{", b"[", b"\xed\xa0\x80", b"\x1b[2J", b"\\u", b"9" * 40, b",")
            )
        elif what == 4:
            del data[at:]
        else:
            data[at : at + span] = bytes(chance.randrange(256) for _ in range(span))
    return bytes(data)


def change_json(content: bytes, chance: random.Random) -> bytes:
    """A JSON file with its tree changed, now and then a key doubled or its bytes changed too."""
    try:
        text = _dumps(change_tree(json.loads(content), chance), chance).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return change_bytes(content, chance)
    if chance.random() < 0.1 and (at := text.find(b", ")) > 0:
        text = text[: at + 2] + text[1 : at + 2] + text[at + 2 :]
    return change_bytes(text, chance) if chance.random() < 0.15 else text


def change_shard(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file with its header, its length or its bytes changed."""
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], content[8 + length :]
    what = chance.random()
    if what < 0.8:
        header = change_json(header, chance)
    elif what < 0.9:
        body = change_bytes(body, chance)
    else:
        return change_bytes(content, chance)
    stated = len(header) if chance.random() < 0.95 else chance.choice((0, len(header) + 1, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", stated) + header + body


def change_statistics(content: bytes, chance: random.Random) -> bytes:
    """A statistics file with its description, its header or its numbers changed."""
    length = int.from_bytes(content[:8], "little")
    try:
        header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
        ((name, text),) = header["__metadata__"].items()
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):  # changed before
        return change_shard(content, chance)
    if isinstance(text, str) and chance.random() < 0.6:
        header["__metadata__"] = {
            name: change_json(text.encode("utf-8", "surrogatepass"), chance).decode("utf-8", "replace")
        }
        packed = json.dumps(header).encode()
        return struct.pack("<Q", len(packed)) + packed + body
    return change_shard(content, chance)


def change_lines(content: bytes, chance: random.Random) -> bytes:
    """JSON lines with one of them changed."""
    lines = content.split(b"\n")
    at = chance.randrange(len(lines))
    lines[at] = change_json(lines[at] or b"{}", chance)
    return b"\n".join(lines)


def change_parquet(content: bytes, chance: random.Random) -> bytes:
    """A Parquet file with bytes changed, or one of other rows."""
    if chance.random() < 0.5:
        return change_bytes(content, chance)
    rows = change_tree(chance.choice(ROWS), chance)
    try:
        return parquet([rows] if isinstance(rows, dict) else rows)
    except Exception:  # what Parquet cannot hold
        return change_bytes(content, chance)


def change_pair(content: bytes, chance: random.Random) -> bytes:
    """A JSON file behind the byte that says which checkpoint it stands in."""
    if not content:
        return b"\0"
    return content[:1] + change_json(content[1:], chance)


# ---- whole files ----------------------------------------------------------------------------------------------------------------------

ROWS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], "domain": "a"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]},
    {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function",
                   "function": {"name": "f", "arguments": "{\"a\": 1}"}}]}, {"role": "tool", "content": "x", "tool_call_ids": ["1"]}],
     "tools": [{"name": "f", "description": "d", "parameters": {"a": {"type": "str, optional", "default": 1}}}]},
    {"query": "q", "answers": "[{\"name\": \"f\", \"arguments\": {}}]", "tools": "[{\"name\": \"f\", \"parameters\": {}}]"},
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}, "see"]}]},
    {"prompt": "p", "completion": [{"role": "assistant", "content": "c"}]},
    {"instruction": "i", "input": "n", "output": "o"},
    {"question": "q", "answer": "a"},
    {"text": "plain text", "domain": "b"},
)  # fmt: skip


def parquet(rows: list[Any]) -> bytes:
    """These rows as a Parquet file."""
    import pyarrow
    from pyarrow import parquet as writer

    sink = pyarrow.BufferOutputStream()
    writer.write_table(pyarrow.Table.from_pylist(rows), sink, compression="none")
    return bytes(sink.getvalue())


class Letters:
    """What calibration asks of a tokenizer, in plain Python: a token per byte."""

    bos_token_id = None
    chat_template = "as JSON"

    def get_chat_template(self, chat_template: Any = None, tools: Any = None) -> str:
        return self.chat_template

    def apply_chat_template(self, conversation: Any, tools: Any = None, **options: Any) -> str:
        return json.dumps([conversation, tools])

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        return {"input_ids": [list(entry.encode()) for entry in text]}


# ---- targets --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Attributes:
        run: takes a file's content as far as reapkit would; raises ReapkitError at most.
        seeds: whole files.
        change: makes a case of one.
    """

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    change: Callable[[bytes, random.Random], bytes]

    def cases(self, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """Numbered cases, the same ones in every run."""
        for number in range(start, stop):
            yield number, self.case(random.Random(number))

    def case(self, chance: random.Random) -> bytes:
        """A changed file, often changed twice."""
        content = chance.choice(self.seeds)
        for _ in range(chance.choice((1, 1, 2))):
            content = self.change(content, chance)
        return content


def use_up(folder: Path) -> None:
    """Everything that is read of a checkpoint on the way from `inspect` to `prune`, short of running the model."""
    checkpoint = Checkpoint.open(folder)
    layout = resolve(checkpoint, ARCHITECTURES)
    identity = Identity.of(checkpoint, layout)
    inspect(folder)
    keep = max(layout.top_k, layout.num_experts - 1)
    chosen = plans.choose_for_checkpoint(checkpoint, layout, keep=keep).plan
    chosen.require_fits(layout, identity)
    outputs(checkpoint, layout, chosen)
    edit_config(checkpoint, layout, chosen.kept)
    edit_sidecars(checkpoint, layout, chosen.kept)


def header(scratch: Path) -> Target:
    folders = [write_checkpoint(scratch / f"header-{number}", kind) for number, kind in enumerate(KINDS)]

    words = (b'up_proj.weight"', b"w1.weight", b"weight_packed", b"router")

    def run(content: bytes) -> None:
        folder = next((folder for folder, word in zip(folders, words, strict=True) if word in content), folders[0])
        (folder / "model.safetensors").write_bytes(content)
        use_up(folder)

    return Target(run, tuple(shard(kind()[1]) for kind in KINDS), change_shard)


def index(scratch: Path) -> Target:
    folder = write_checkpoint(scratch / "index", _qwen3, num_shards=3)
    path = folder / "model.safetensors.index.json"
    seed = path.read_bytes()

    def run(content: bytes) -> None:
        path.write_bytes(content)
        use_up(folder)

    return Target(run, (seed,), change_json)


def config(scratch: Path) -> Target:
    folders = [write_checkpoint(scratch / f"config-{number}", kind) for number, kind in enumerate(KINDS)]
    seeds = [bytes([number]) + (folder / "config.json").read_bytes() for number, folder in enumerate(folders)]
    nano = json.loads((Path(__file__).parents[1] / "models/m2-nano/config.json").read_bytes())
    nano |= {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "num_hidden_layers": LAYERS}

    def run(content: bytes) -> None:
        folder = folders[content[0] % len(folders)] if content else folders[0]
        (folder / "config.json").write_bytes(content[1:])
        use_up(folder)

    return Target(run, (*seeds, b"\1" + json.dumps(nano).encode()), change_pair)


def plan(scratch: Path) -> Target:
    folder = write_checkpoint(scratch / "plan", _qwen3)
    checkpoint = Checkpoint.open(folder)
    layout = resolve(checkpoint, ARCHITECTURES)
    path, out = scratch / "plan.json", scratch / "plan-out"
    chosen = plans.choose_for_checkpoint(checkpoint, layout, keep=3).plan
    chosen.save(path)

    def run(content: bytes) -> None:
        path.write_bytes(content)
        loaded = PruningPlan.load(path)
        shards.write(checkpoint, layout, loaded, out, dry_run=True)
        loaded.save(scratch / "plan-again.json")
        assert PruningPlan.load(scratch / "plan-again.json") == loaded

    return Target(run, (path.read_bytes(),), change_json)


def statistics(scratch: Path) -> Target:
    layers = {}
    for number in range(LAYERS):
        layers[number] = layer = LayerStatistics.zeros(2 * NUM_FOLDS, EXPERTS)
        layer.tokens_S += 3
        for values in (
            layer.count_SE,
            layer.gate_SE,
            layer.norm_SE,
            layer.norm_sq_SE,
            layer.gated_norm_SE,
            layer.gated_norm_sq_SE,
        ):
            values += np.arange(values.size).reshape(values.shape) + 1.0
        layer.max_norm_E += 2.0
    source = Identity("seed", None, "a" * 64, "b" * 64, "c" * 64)
    record = CalibrationRecord("d" * 64, 24, 0, ({"source": "x", "samples": 3},))
    settings = {"dtype": "float32", "max_length": 512, "tokenizer": "e" * 64}
    base = Statistics(source, EXPERTS, TOP_K, 1, ("a", "b"), settings, (record,), (), layers)
    path, again = scratch / "statistics.safetensors", scratch / "combined.safetensors"
    base.save(path)
    seed = path.read_bytes()
    other = Statistics(source, EXPERTS, TOP_K, 1, ("c",), settings, (CalibrationRecord("f" * 64, 1),), (),
                       {number: LayerStatistics.zeros(NUM_FOLDS, EXPERTS) for number in layers})  # fmt: skip

    def run(content: bytes) -> None:
        path.write_bytes(content)
        loaded = Statistics.load(path)
        for criterion in criteria.CRITERIA:
            choice = plans.choose(loaded, criterion=criterion, keep=max(1, loaded.num_experts - 1))
            plans.losses(choice)
        combine([loaded, other]).save(again)
        Statistics.load(again)

    return Target(run, (seed,), change_statistics)


def manifest(scratch: Path) -> Target:
    source, out = write_checkpoint(scratch / "manifest", _m2_fp8, num_shards=2), scratch / "manifest-out"
    (source / "tokenizer.json").write_text("{}")
    checkpoint = Checkpoint.open(source)
    layout = resolve(checkpoint, ARCHITECTURES)
    shards.write(checkpoint, layout, plans.choose_for_checkpoint(checkpoint, layout, keep=3).plan, out)
    unverified = (out / "reapkit.json").read_bytes()
    assert verify(out).ok
    seeds = (unverified, (out / "reapkit.json").read_bytes())

    def run(content: bytes) -> None:
        (out / "reapkit.json").write_bytes(content)
        verify(out)

    return Target(run, seeds, change_json)


def rows(scratch: Path) -> Target:
    path = scratch / "rows.jsonl"
    (scratch / "x.png").write_bytes(b"")

    def run(content: bytes) -> None:
        path.write_bytes(content)
        calibration.batches(calibration.load([str(path)], Letters(), max_length=64), tokens_per_batch=256)

    seeds = tuple(json.dumps(row).encode() for row in ROWS)
    return Target(run, (*seeds, b"\n".join(seeds[:3])), change_lines)


def rows_in_parquet(scratch: Path) -> Target:
    path = scratch / "rows.parquet"

    def run(content: bytes) -> None:
        path.write_bytes(content)
        calibration.batches(calibration.load([str(path)], Letters(), max_length=64), tokens_per_batch=256)

    return Target(run, tuple(parquet([row]) for number, row in enumerate(ROWS) if number not in (1, 4)), change_parquet)


def _tokenizer_folder(scratch: Path, name: str) -> Path:
    """A checkpoint with a small byte-pair tokenizer and m2-nano's own settings and chat template."""
    folder = write_checkpoint(scratch / name, _qwen3)
    nano = Path(__file__).parents[1] / "models/m2-nano"
    shutil.copy(nano / "tokenizer_config.json", folder)
    shutil.copy(nano / "chat_template.jinja", folder)
    whole = json.loads((nano / "tokenizer.json").read_bytes())
    words = dict(list(whole["model"]["vocab"].items())[:40])
    whole["model"] |= {"vocab": words, "merges": [pair for pair in whole["model"]["merges"]
                       if "".join(pair) in words and all(part in words for part in pair)]}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    return folder


def _render(folder: Path, checkpoint: Checkpoint) -> None:
    from reapkit.modules import load_tokenizer

    calibration.load([str(folder / "rows.jsonl")], load_tokenizer(checkpoint), max_length=64)


def _tokenizer_target(scratch: Path, name: str, change: Callable[[bytes, random.Random], bytes]) -> Target:
    folder = _tokenizer_folder(scratch, name.replace(".", "-"))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, (*ROWS[:4], *ROWS[5:]))), encoding="utf-8")
    checkpoint = Checkpoint.open(folder)

    def run(content: bytes) -> None:
        (folder / name).write_bytes(content)
        _render(folder, checkpoint)

    return Target(run, ((folder / name).read_bytes(),), change)


def tokenizer(scratch: Path) -> Target:
    return _tokenizer_target(scratch, "tokenizer.json", change_json)


def tokenizer_config(scratch: Path) -> Target:
    return _tokenizer_target(scratch, "tokenizer_config.json", change_json)


def chat_template(scratch: Path) -> Target:
    """Only the template changes, so the tokenizer is loaded once."""
    from reapkit.modules import load_tokenizer

    folder = _tokenizer_folder(scratch, "template")
    path = scratch / "template-rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS[:2])), encoding="utf-8")
    loaded = load_tokenizer(Checkpoint.open(folder))
    pieces = (b"{{ ''.__class__ }}", b"{% for i in range(9) %}", b"{% endfor %}", b"{{ messages[0].content }}", b"{% macro f() %}",
              b"{{ f() }}", b"{% endmacro %}", b"{{ 1 / 0 }}", b"{{ raise_exception('x') }}", b"{% set a = a ~ a %}", b"{%", b"}}",
              b"{{ messages | tojson }}", b"{{ self }}", b"{{ cycler.__init__.__globals__ }}")  # fmt: skip

    def change(content: bytes, chance: random.Random) -> bytes:
        if chance.random() < 0.4:
            return change_bytes(content, chance)
        at = chance.choice([at for at in range(len(content)) if content[at : at + 1] == b"\n"] or [0])
        return content[:at] + chance.choice(pieces) + content[at + chance.choice((0, 0, 40)) :]

    def run(content: bytes) -> None:
        loaded.chat_template = content.decode("utf-8", "replace")
        calibration.load([str(path)], loaded, max_length=64)

    # The real one takes 30 times as long to compile as these do.
    small = (
        b"{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        b"{%- macro show(m) %}{{ '<' ~ m['role'] ~ '>' }}{{ m.content if m.content is string else '' }}{% endmacro -%}\n"
        b"{%- for m in messages %}\n{{- show(m) }}"
        b"\n{%- for call in m.tool_calls or [] %}\n{{ call.function | tojson }}\n{%- endfor %}\n{% endfor %}",
    )
    return Target(run, ((folder / "chat_template.jinja").read_bytes(), *small * 10), change)


TARGETS: Mapping[str, Callable[[Path], Target]] = {
    "header": header,
    "index": index,
    "config": config,
    "plan": plan,
    "statistics": statistics,
    "manifest": manifest,
    "rows": rows,
    "rows-parquet": rows_in_parquet,
    "tokenizer": tokenizer,
    "tokenizer-config": tokenizer_config,
    "chat-template": chat_template,
}


def corpus(name: str) -> dict[str, bytes]:
    """The cases of a target that once got past reapkit's own errors, by what they were."""
    stored = json.loads((CORPUS / f"{name}.json").read_bytes())
    # Compressed, since nesting that overflows a stack has as many brackets.
    return {what: gzip.decompress(base64.b64decode(text)) for what, text in stored.items()}
