"""Calibration rows with images: the model sees them in the streamed forward as it does in memory, and every refusal explains itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import Glm4vImageProcessorPil, Qwen2VLImageProcessorPil
from typer.testing import CliRunner

import reapkit.observation as module
import tiny
from families import FAMILIES, VL, make
from reapkit.calibration import CalibrationData, batches, load
from reapkit.checkpoint import Checkpoint
from reapkit.cli import app
from reapkit.errors import DataError
from reapkit.modules import SuspendedForwards, load_processor, load_tokenizer
from reapkit.observation import Observation, Run
from streaming import streamed_model, text_rows, write_jsonl
from test_families import Built, experts_modules, hooked_sums, require_same_sums

RUN = Run(device="cpu", dtype="float32")
PATCH, MERGE = 4, 2
SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
GLM_SPECIAL = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>")
FIRST_SPECIAL = 104
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
PIXELS = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
SIZE = {"shortest_edge": 64, "longest_edge": 2048}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return seeing("Qwen3-VL-MoE", tmp_path_factory.mktemp("images") / "model")


def seeing(name: str, folder: Path) -> Built:
    """A family that sees, with a tokenizer that knows the signs around images, a chat template and an image processor."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "partial_rotary_factor": 1.0}
    signs = {f"{part}_token_id": FIRST_SPECIAL + number for part, number in (("image", 2), ("video", 3))}
    for prefix in ("vision", "image"):
        signs |= {f"{prefix}_start_token_id": FIRST_SPECIAL, f"{prefix}_end_token_id": FIRST_SPECIAL + 1}
    family = next(family for family in FAMILIES if family.name == name)
    text = {"rope_parameters": rope} | family.changes.get("text_config", {})
    family = replace(family, changes=VL | signs | {"text_config": text})
    model = make(family, folder)
    add_tokenizer(folder)
    Qwen2VLImageProcessorPil(**PIXELS, size=SIZE).save_pretrained(folder)
    if name == "GLM-4.5V":
        Glm4vImageProcessorPil(**PIXELS, size=SIZE).save_pretrained(folder)
        for path in (folder / "tokenizer.json", folder / "chat_template.jinja"):
            content = path.read_text()
            for sign, other in zip(SPECIAL, GLM_SPECIAL, strict=True):
                content = content.replace(sign, other)
            path.write_text(content)
    return Built(family, folder, model)


def add_tokenizer(folder: Path) -> None:
    """A token for each of the signs, behind those of the characters."""
    tiny.add_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    unused = FIRST_SPECIAL - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([*(f"<unused{number}>" for number in range(unused)), *SPECIAL])
    assert [tokenizer.token_to_id(name) for name in SPECIAL] == list(range(FIRST_SPECIAL, FIRST_SPECIAL + 4))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def draw(path: Path, width: int, height: int, *, seed: int = 0) -> str:
    """Noise, so that no two patches are alike; returns the file's name."""
    random = np.random.default_rng(seed)
    Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path.name


def row_of(*parts: str, reply: str = "yes.", **fields: Any) -> dict[str, Any]:
    """A chat about images; parts that end in .png are images."""
    content = [
        {"type": "image", "image": part} if part.endswith(".png") else {"type": "text", "text": part} for part in parts
    ]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": reply}], **fields}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes beside which rows are written."""
    folder = tmp_path_factory.mktemp("data")
    for number, size in enumerate([(16, 24), (32, 16), (40, 40)]):
        draw(folder / f"{number}.png", *size, seed=number)
    return folder


@pytest.fixture(scope="module")
def seen_rows() -> list[dict[str, Any]]:
    return [
        row_of("0.png", "what is it?", domain="a"),
        row_of("one ", "1.png", " and two ", "0.png", domain="b"),
        row_of("2.png", reply="a large one", domain="a"),
    ]


@pytest.fixture(scope="module")
def mixed(folder: Path, seen_rows: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Rows of text and rows with images, and where they are written."""
    text = text_rows(9)
    rows = [*text[:3], seen_rows[0], *text[3:7], *seen_rows[1:], *text[7:]]
    return write_jsonl(folder / "mixed.jsonl", rows), rows


def reference_inputs(built: Built, folder: Path, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the model takes for a row, its prompt written out by hand."""
    tokenizer = load_tokenizer(Checkpoint.open(built.folder))
    if "text" in row:
        return {"input_ids": torch.tensor([tokenizer(row["text"])["input_ids"]])}
    parts = row["messages"][0]["content"]
    images = [Image.open(folder / part["image"]) for part in parts if part["type"] == "image"]
    made = Qwen2VLImageProcessorPil(**PIXELS, size=SIZE)(images=images, return_tensors="pt")
    counts = [int(grid.prod()) // MERGE**2 for grid in made["image_grid_thw"]]
    assert min(counts) > 2
    text = "<user>"
    for part in parts:
        pads = "<|image_pad|>" * counts.pop(0) if part["type"] == "image" else ""
        text += f"<|vision_start|>{pads}<|vision_end|>" if pads else part["text"]
    ids = torch.tensor([tokenizer(f"{text}<assistant>{row['messages'][1]['content']}")["input_ids"]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int(),
        **made,
    }


def run_in_memory(built: Built, inputs: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [built.model(**one, use_cache=False).logits for one in inputs]


def read(built: Built, source: str, *, max_length: int = 256) -> CalibrationData:
    checkpoint = Checkpoint.open(built.folder)
    processor = partial(load_processor, checkpoint)
    return load([source], load_tokenizer(checkpoint), max_length=max_length, processor=processor)


def refusal(call: Callable[[], object]) -> DataError:
    with pytest.raises(DataError) as caught:
        call()
    assert caught.value.hint
    return caught.value


# What the model sees


@pytest.mark.parametrize("waves", [1, 3])
def test_observed_sums_equal_those_of_plain_hooks_with_the_same_pixels(
    built: Built, folder: Path, mixed: tuple[str, list[dict[str, Any]]], waves: int
) -> None:
    source, rows = mixed
    observation = Observation(built.folder, [source], run=RUN, max_length=256, seed=0)
    size = -(-len(observation.batches) // waves)
    observation.waves = [
        observation.batches[start : start + size] for start in range(0, len(observation.batches), size)
    ]
    assert len(observation.waves) == waves
    ours = observation.run()
    inputs = [reference_inputs(built, folder, row) for row in rows]
    theirs = hooked_sums(experts_modules(built.model), built.num_experts, lambda: run_in_memory(built, inputs))
    assert ours.layers.keys() == theirs.keys()
    for layer, expected in theirs.items():
        require_same_sums(ours.layers[layer], expected)
        assert ours.layers[layer].tokens_S.sum() == sum(one["input_ids"].numel() for one in inputs) == ours.num_tokens
    # Each domain has its own share: that of one domain alone is the reference of its rows alone.
    assert ours.domains == ("a", "b")
    tokens = [int(one["input_ids"].numel()) for one, row in zip(inputs, rows, strict=True) if row["domain"] == "a"]
    first = ours.layers[0].tokens_S.reshape(2, -1)[0]
    assert first.sum() == sum(tokens)


@pytest.mark.parametrize("name", ["Qwen3.5-MoE", "GLM-4.5V"])
def test_other_families_see_too(
    name: str, folder: Path, mixed: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    built = seeing(name, tmp_path / "model")
    observation = Observation(built.folder, [mixed[0]], run=RUN, max_length=256, seed=0)
    ours = observation.run()
    inputs = []
    for document in observation.data.documents:
        made = document.images.load() if document.images is not None else {}
        made["input_ids"] = document.input_ids[None].astype(np.int64)
        inputs.append({name: torch.from_numpy(array) for name, array in made.items()})
    assert sum("pixel_values" in one for one in inputs) == 3
    theirs = hooked_sums(experts_modules(built.model), built.num_experts, lambda: run_in_memory(built, inputs))
    for layer, expected in theirs.items():
        require_same_sums(ours.layers[layer], expected)


def test_streamed_logits_equal_the_full_models_and_the_pixels_matter(
    built: Built, folder: Path, mixed: tuple[str, list[dict[str, Any]]]
) -> None:
    source, rows = mixed
    data = read(built, source)
    parts = batches(data, tokens_per_batch=1)
    expected = {}
    inputs = [reference_inputs(built, folder, row) for row in rows]
    for one, logits in zip(inputs, run_in_memory(built, inputs), strict=True):
        expected[tuple(one["input_ids"][0].tolist())] = logits
    with SuspendedForwards(
        streamed_model(built.folder), [part.input_ids_BT for part in parts], images=[part.images for part in parts]
    ) as forwards:
        forwards.run_layers(lambda layer, number: None)
        for part, logits in zip(parts, forwards.logits(), strict=True):
            reference = expected.pop(tuple(part.input_ids_BT[0].tolist()))
            assert (logits - reference).abs().max() <= 2e-5 * reference.abs().max()
    assert expected == {}
    black = inputs[3] | {"pixel_values": torch.zeros_like(inputs[3]["pixel_values"])}
    [other] = run_in_memory(built, [black])
    [real] = run_in_memory(built, [inputs[3]])
    assert (other - real).abs().max() > 1e-2 * real.abs().max()


def test_images_are_seen_in_bfloat16(built: Built, mixed: tuple[str, list[dict[str, Any]]]) -> None:
    run = Run(device="cpu", dtype="bfloat16")
    observation = Observation(built.folder, [mixed[0]], run=run, max_length=256, seed=0)
    taken: list[dict[str, torch.dtype]] = []

    def note(model: Any, args: Any, inputs: dict[str, Any]) -> None:
        taken.append({name: value.dtype for name, value in inputs.items() if isinstance(value, torch.Tensor)})

    observation.model.module.register_forward_pre_hook(note, with_kwargs=True)
    ours = observation.run()
    assert ours.num_tokens == ours.layers[0].tokens_S.sum()
    seen = [dtypes for dtypes in taken if "pixel_values" in dtypes]
    assert len(seen) == 3 and {dtypes["pixel_values"] for dtypes in seen} == {torch.bfloat16}
    assert all(dtypes["input_ids"] == dtypes["image_grid_thw"] == torch.int64 for dtypes in seen)


def test_both_names_of_a_path_and_absolute_paths_are_the_same_images(built: Built, folder: Path) -> None:
    def digest(**part: str) -> str:
        row = {"messages": [{"role": "user", "content": [{"type": "image", **part}]}], "domain": "x"}
        return read(built, write_jsonl(folder / "names.jsonl", [row])).digest

    assert digest(image="0.png") == digest(path="0.png") == digest(image=str(folder / "0.png"))


def test_a_list_of_rows_and_a_completion_may_hold_images(built: Built, folder: Path) -> None:
    row = row_of("0.png", "what is it?")
    plain = read(built, f"x={write_jsonl(folder / 'plain.jsonl', [row])}")
    (folder / "rows.json").write_text(json.dumps([row]))
    turns = {"prompt": row["messages"][:1], "completion": row["messages"][1]["content"]}
    other = write_jsonl(folder / "turns.jsonl", [turns])
    assert plain.digest == read(built, f"x={folder / 'rows.json'}").digest == read(built, f"x={other}").digest


# Documents and batches


def test_a_document_with_images_is_whole_and_alone_in_its_batch(
    built: Built, mixed: tuple[str, list[dict[str, Any]]], seen_rows: list[dict[str, Any]]
) -> None:
    data = read(built, mixed[0], max_length=150)
    seen = [document for document in data.documents if document.images is not None]
    assert sorted(len(document.images.digests) for document in seen if document.images) == [1, 1, 2]
    assert data.sources[0].images == data.sources[0].to_json()["images"] == 4
    parts = batches(data, tokens_per_batch=4096)
    with_images = [part for part in parts if part.images is not None]
    assert len(with_images) == len(seen_rows) and all(len(part.length_B) == 1 for part in with_images)
    assert all(part.mask_BT.all() for part in with_images)
    assert sum(int(part.length_B.sum()) for part in parts) == data.num_tokens
    for part in with_images:
        assert part.images is not None
        inputs = part.images.load()
        assert inputs.keys() == {"pixel_values", "image_grid_thw", "mm_token_type_ids"}
        assert part.images.nbytes == sum(array.nbytes for array in inputs.values())


def test_held_bytes_count_pixels_and_what_the_vision_tower_made(built: Built, folder: Path) -> None:
    source = write_jsonl(folder / "held.jsonl", [row_of("2.png")])
    observation = Observation(built.folder, [source], run=RUN, max_length=256, seed=0)
    [[batch]] = observation.waves
    assert batch.images is not None
    # The embeddings of its tokens, the hidden state, and for each image token the tower's output and one of its layers', twice each.
    num_image_tokens = int((batch.input_ids_BT == FIRST_SPECIAL + 2).sum())
    states = (2 * batch.input_ids_BT.size + 4 * num_image_tokens) * 64 * 4
    assert observation.estimate().held_bytes >= states + batch.images.nbytes
    assert observation.estimate().device_bytes > observation.estimate().held_bytes
    run = replace(RUN, activation_budget=observation.estimate().held_bytes - 1)
    with pytest.raises(module.UsageError, match="an activation budget"):
        Observation(built.folder, [source], run=run, max_length=256, seed=0)


# The digest


def test_the_digest_covers_the_images_bytes_and_not_their_names(built: Built, tmp_path: Path) -> None:
    def digest(name: str, *, seed: int) -> str:
        draw(tmp_path / name, 16, 24, seed=seed)
        return read(built, f"x={write_jsonl(tmp_path / 'rows.jsonl', [row_of(name)])}").digest

    first = digest("a.png", seed=1)
    assert first == digest("b.png", seed=1)
    assert first != digest("a.png", seed=2)


def test_the_digest_of_text_is_what_it_was_before_rows_could_hold_images(built: Built, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "abc"}, {"type": "text", "text": "def"}]
    rows = [{"text": "plain text", "domain": "a"}, {"messages": [{"role": "user", "content": parts}], "domain": "b"}]
    data = read(built, write_jsonl(tmp_path / "rows.jsonl", rows))
    assert data.digest == "0c22801affc1d0008c6d0f0991366f967a1365dac9fd0be4dafab4a43ab97c6b"
    assert [document.images for document in data.documents] == [None, None]
    assert data.sources[0].images == 0


# Refusals


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"image": "https://example.org/a.png"}, "an image that is not a local file: https://example.org/a.png"),
        ({"url": "http://example.org/a.png"}, "an image that is not a local file: http://example.org/a.png"),
        ({"path": "data:image/png;base64,AAAA"}, "an image that is not a local file: data:image/png;base64,AAAA"),
        ({"image": 7}, "an image that is a number, not a path"),
        ({"image": ""}, "an image that is a string, not a path"),
        ({}, "an image that is nothing, not a path"),
        ({"image": "none.png"}, "there is no image "),
        ({"image": "."}, "there is no image "),
    ],
)
def test_images_that_are_no_local_files_are_refused(
    built: Built, folder: Path, part: dict[str, Any], message: str
) -> None:
    rows = [{"text": "a"}, {"messages": [{"role": "user", "content": [{"type": "image", **part}]}]}]
    source = write_jsonl(folder / "refused.jsonl", rows)
    error = refusal(lambda: read(built, source))
    assert error.message.startswith(f"{source} line 2: ") and message in error.message


def test_a_file_that_is_no_image_is_refused_by_row(built: Built, folder: Path) -> None:
    (folder / "broken.png").write_text("text")
    source = write_jsonl(folder / "broken.jsonl", [row_of("broken.png")])
    error = refusal(lambda: read(built, source))
    assert error.message.startswith(f"{source} line 1: the processor fails: ")
    assert "broken.png" in error.message or "identify image" in error.message


def test_a_document_with_images_is_never_cut(built: Built, folder: Path) -> None:
    source = write_jsonl(folder / "long.jsonl", [row_of("2.png", "x" * 40)])
    [length] = [len(document.input_ids) for document in read(built, source).documents]
    assert len(read(built, source, max_length=length).documents) == 1
    error = refusal(lambda: read(built, source, max_length=length - 1))
    assert error.message == (
        f"{source} line 1 has {length} tokens with its images, which are never split, and at most {length - 1} are allowed"
    )
    assert error.hint == f"--max-length {length}, or smaller images"


def test_a_template_that_leaves_images_out_is_refused(built: Built, folder: Path, tmp_path: Path) -> None:
    model = copy_without(built.folder, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    source = write_jsonl(folder / "left.jsonl", [row_of("0.png")])
    error = refusal(lambda: read(replace(built, folder=model), source))
    assert error.message.startswith(f"{source} line 1: the processor fails: The total number of <|image_pad|>")


def test_a_processor_that_gives_no_pixels_is_refused(built: Built, folder: Path) -> None:
    class Blind:
        chat_template = TEMPLATE

        def apply_chat_template(self, conversation: Any, **options: Any) -> dict[str, Any]:
            return {"input_ids": np.array([[1, 2]]), "attention_mask": np.array([[1, 1]])}

    source = write_jsonl(folder / "blind.jsonl", [row_of("0.png")])
    error = refusal(lambda: load([source], load_tokenizer(Checkpoint.open(built.folder)), processor=Blind))
    assert error.message == f"{source} line 1: the processor gives no pixels for its images"


def test_a_changed_image_stops_the_run(built: Built, tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 16, 24, seed=1)
    observation = Observation(
        built.folder, [write_jsonl(tmp_path / "rows.jsonl", [row_of("a.png")])], run=RUN, max_length=256, seed=0
    )
    draw(tmp_path / "a.png", 16, 24, seed=2)
    assert "its images were changed after they were first read" in refusal(observation.run).message
    (tmp_path / "a.png").unlink()
    assert "a.png" in refusal(observation.run).message


def test_a_reader_of_text_alone_refuses_images(built: Built, folder: Path) -> None:
    source = write_jsonl(folder / "text-only.jsonl", [row_of("0.png")])
    tokenizer = load_tokenizer(Checkpoint.open(built.folder))
    error = refusal(lambda: load([source], tokenizer))
    assert error.message == f"{source} line 1 holds images, and only text is read here"


def copy_without(source: Path, folder: Path, *names: str) -> Path:
    """A checkpoint's files in another folder, linked, without some of them."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name not in names:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_family_that_sees_nothing_is_named(qwen3: Path) -> None:
    error = refusal(lambda: load_processor(Checkpoint.open(qwen3)))
    assert error.message == f"{qwen3} has no vision tower, so it takes no images"


def test_a_checkpoint_without_an_image_processor_is_named(built: Built, folder: Path, tmp_path: Path) -> None:
    model = copy_without(built.folder, tmp_path / "model", "preprocessor_config.json")
    source = write_jsonl(folder / "processor.jsonl", [row_of("0.png")])
    error = refusal(lambda: read(replace(built, folder=model), source))
    assert error.message == (
        f"{model} brings no image processor: it has neither preprocessor_config.json nor processor_config.json"
    )


def test_a_missing_imaging_library_is_named(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    error = refusal(lambda: load_processor(Checkpoint.open(built.folder)))
    assert (error.message, error.hint) == ("reading images needs the package pillow", "pip install pillow")


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"image_processor_type": "Llama4ImageProcessor"}, "torchvision"),
        ({"image_processor_type": "NoImageProcessor"}, "fetch the checkpoint again"),
        ({"feature_extractor_type": "WhisperFeatureExtractor"}, ""),
    ],
)
def test_an_image_processor_that_cannot_be_loaded_says_why(
    built: Built, tmp_path: Path, described: dict[str, str], message: str
) -> None:
    model = copy_without(built.folder, tmp_path / "model")
    tiny.write_json(model / "preprocessor_config.json", described)
    error = refusal(lambda: load_processor(Checkpoint.open(model)))
    assert error.message.startswith(f"the image processor of {model} cannot be loaded: ")
    assert message.lower() in f"{error.message} {error.hint}".lower()


# The command line


def test_the_caution_about_images_is_printed_only_where_no_row_had_any(
    built: Built, folder: Path, tmp_path: Path
) -> None:
    text = write_jsonl(folder / "text.jsonl", text_rows(3))
    seen = write_jsonl(folder / "seen.jsonl", [row_of("0.png")])

    def noted(*arguments: str) -> bool:
        result = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "400"})
        assert result.exit_code == 0, result.stderr
        return "text alone does not measure" in result.stderr

    model = str(built.folder)
    for verb in (["observe", model], ["compress", model, "--ratio", "0.25"]):
        out = str(tmp_path / verb[0])
        assert noted(*verb, "--data", text, "-o", out, "--dry-run")
        assert not noted(*verb, "--data", text, "-o", out, "--dry-run", "--quiet")
        assert not noted(*verb, "--data", text, "--data", seen, "-o", out, "--dry-run")
    assert noted("compress", model, "--ratio", "0.25", "--data", text, "-o", str(tmp_path / "blind"))
    assert not noted("compress", model, "--ratio", "0.25", "--data", seen, "-o", str(tmp_path / "seeing"))
