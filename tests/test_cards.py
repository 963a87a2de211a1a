"""The model card that an output carries: the hub can read it, and it says only what the run knows."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

import tiny
from conftest import PlanFor
from reapkit import cards, compress, inspect, shards, verify
from reapkit.cards import BEGIN, END
from reapkit.checkpoint import CARD_NAME
from reapkit.compression import Target, prune
from reapkit.errors import CheckpointError

KEEP = 5
ROOT = Path(__file__).parents[1]
NANO = ROOT / "models/m2-nano"


@pytest.fixture
def source(m2: Path, tmp_path: Path) -> Path:
    """A copy whose README may be written."""
    return Path(shutil.copytree(m2, tmp_path / "source"))


def card_of(plan_for: PlanFor, source: Path, out: Path, **options: Any) -> ModelCard:
    shards.write(*plan_for(source, KEEP), out, **options)
    return ModelCard.load(out / CARD_NAME)


def data_of(card: ModelCard) -> dict[str, Any]:
    data = card.data
    assert isinstance(data, ModelCardData)
    found: dict[str, Any] = data.to_dict()
    return found


def specification(card: ModelCard) -> dict[str, str]:
    return dict(re.findall(r"^- \*\*(.+?)\*\*: (.*)$", card.text, re.MULTILINE))


def test_the_hub_reads_what_the_source_says_of_licence_library_and_task(
    plan_for: PlanFor, source: Path, tmp_path: Path
) -> None:
    (source / "LICENSE").write_text("a modified licence")
    (source / CARD_NAME).write_text(
        "---\nlicense: other\nlicense_name: modified-mit\nlicense_link: LICENSE\nlibrary_name: vllm\n"
        "pipeline_tag: image-text-to-text\nlanguage: [en, zh]\ntags: [theirs]\nbase_model: somebody/else\nwidget: [x]\n---\n# Theirs\n"
    )
    card = card_of(plan_for, source, tmp_path / "out", base_model="ORG/NAME")
    data = data_of(card)
    assert data.pop("tags") == ["minimax_m2", "moe", "pruned", "reapkit"]
    assert data == {
        "base_model": "ORG/NAME", "license": "other", "license_name": "modified-mit", "license_link": "LICENSE",
        "library_name": "vllm", "pipeline_tag": "image-text-to-text", "language": ["en", "zh"],
    }  # fmt: skip
    assert (tmp_path / "out/LICENSE").read_text() == "a modified licence"
    assert "Theirs" not in card.text and "somebody" not in card.content
    assert specification(card)["Licence"] == "modified-mit ([text](<LICENSE>))"


def test_what_is_not_known_is_left_out(plan_for: PlanFor, source: Path, tmp_path: Path) -> None:
    for name in ("LICENSE", CARD_NAME):
        (source / name).unlink(missing_ok=True)
    config = tiny.read_json(source / "config.json")
    for key in ("num_attention_heads", "max_position_embeddings", "architectures"):
        config.pop(key, None)
    tiny.write_json(source / "config.json", config)
    card = card_of(plan_for, source, tmp_path / "out")
    assert data_of(card) == {"library_name": "transformers", "tags": ["minimax_m2", "moe", "pruned", "reapkit"]}
    assert not {"Licence", "Attention heads", "Context length"} & specification(card).keys()
    assert "None" not in card.content and "REAP" not in card.text, "chosen at random, so not by REAP"


@pytest.mark.parametrize(
    "front", ["", "no front matter", "---\n: [\n---\n", "---\n- a list\n---\n", "---\nlicense: [mit]\nlicense_link: 3\n---\n",
              "---\nlicense: ''\n---\n", "---\n" + "[" * 5000 + "\n---\n"],
)  # fmt: skip
def test_a_readme_of_the_source_that_says_nothing_readable_stops_nothing(
    plan_for: PlanFor, source: Path, tmp_path: Path, front: str
) -> None:
    (source / CARD_NAME).write_text(front)
    data = data_of(card_of(plan_for, source, tmp_path / "out"))
    assert not {"license", "license_link", "license_name"} & data.keys()


def test_front_matter_ends_where_the_hubs_library_says() -> None:
    for count in range(1, 7):
        for parts in itertools.product(("---", "----", "\n", " ", "a: b"), repeat=count):
            text = "".join(parts)
            ours, theirs = cards._FRONT_MATTER.match(text), REGEX_YAML_BLOCK.search(text)
            assert (ours and ours[1]) == (theirs and theirs[2]), text


def test_a_licence_link_into_the_folder_stays_only_where_its_file_goes_along(
    plan_for: PlanFor, source: Path, tmp_path: Path
) -> None:
    for number, (link, expected) in enumerate(
        [
            ("LICENSE.txt", None),
            ("https://example.org/x", "https://example.org/x"),
            ("../LICENSE", None),
            ("javascript:x", None),
        ]
    ):
        (source / "LICENSE").unlink(missing_ok=True)
        (source / CARD_NAME).write_text(f"---\nlicense: mit\nlicense_link: {link}\n---\n")
        data = data_of(card_of(plan_for, source, tmp_path / f"out-{number}"))
        assert data.get("license_link") == expected
    (source / "LICENCE.md").write_text("text")
    (source / CARD_NAME).write_text("---\nlicense: other\n---\n")
    assert data_of(card_of(plan_for, source, tmp_path / "out"))["license_link"] == "LICENCE.md"


def test_the_base_model_is_the_hub_id_of_the_cache_where_no_other_is_given(
    plan_for: PlanFor, source: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--ORG--Some-MoE/snapshots" / ("a" * 40)
    shutil.copytree(source, snapshot)
    card = card_of(plan_for, snapshot, tmp_path / "out")
    assert data_of(card)["base_model"] == "ORG/Some-MoE"
    assert "[ORG/Some-MoE](https://huggingface.co/ORG/Some-MoE)" in card.text


def test_the_numbers_are_those_of_the_tensors_on_disk(
    plan_for: PlanFor, m2: Path, m2_fp8: Path, qwen3: Path, tmp_path: Path
) -> None:
    for folder in (m2, m2_fp8, qwen3):
        out = tmp_path / folder.name
        facts = specification(card_of(plan_for, folder, out))
        tensors = tiny.load_tensors(out)
        values = {name: tensor.numel() for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
        # By another way: of each layer's experts those with the numbers 0 and 1, as many as a token runs.
        idle = [name for name in values if (at := re.search(r"\.experts\.(\d+)\.", name)) and int(at[1]) >= tiny.TOP_K]
        total, active = sum(values.values()), sum(values.values()) - sum(values[name] for name in idle)
        assert facts["Parameters"] == f"{total:,} in total, {active:,} activated per token"
        assert facts["Size of the tensors"] == f"{sum(tensor.nbytes for tensor in tensors.values()):,} bytes"
        assert facts["Experts"] == f"{KEEP} per layer, kept from 8" and facts["Activated experts"] == "2 per token"
        assert facts["Compression ratio"] == "37.5 % of the experts"
        config = tiny.read_json(out / "config.json")
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        assert facts["Attention heads"] == f"{heads}, {groups} for keys and values"
        assert facts["Context length"] == f"{config['max_position_embeddings']:,} tokens"
        inventory = inspect(out, ratios=())
        assert (inventory.parameters, inventory.active_parameters) == (total, active)


def test_a_card_names_no_folder_and_is_the_same_wherever_it_is_written(
    plan_for: PlanFor, m2: Path, tmp_path: Path
) -> None:
    for name in ("here", "there"):
        shards.write(*plan_for(m2, KEEP), tmp_path / name)
    texts = [(tmp_path / name / CARD_NAME).read_text() for name in ("here", "there")]
    assert texts[0] == texts[1]
    assert str(tmp_path) not in texts[0] and str(m2.parent) not in texts[0]
    assert not re.search(r"\b20(1\d|2[0-46-9])\b", texts[0]), "no year but the paper's"


def test_a_card_by_compress_is_that_of_the_steps_and_results_bring_what_its_text_was(tmp_path: Path) -> None:
    rows = (NANO / "data/calibration.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "private-name.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    data, out = [f"maths={tmp_path / 'private-name.jsonl'}"], tmp_path / "out"
    result = compress(NANO, out, Target(ratio="0.25"), data=data, max_length=64)
    card = ModelCard.load(out / CARD_NAME)
    assert data_of(card)["license"] == "apache-2.0" and "reap" in data_of(card)["tags"]
    assert "arXiv" in card.text and "2510.13999" in card.text
    prune(NANO, result.choice.plan, tmp_path / "pruned")
    assert (tmp_path / "pruned" / CARD_NAME).read_text() == card.content
    assert cards.refresh(out) and result.choice.statistics is not None
    text = (out / CARD_NAME).read_text()
    assert (
        f"{result.choice.statistics.num_tokens:,} tokens, in the domains maths." in text and "private-name" not in text
    )
    assert data_of(ModelCard.load(out / CARD_NAME)) == data_of(card) and verify(out).ok


def test_hub_data_sets_are_named_and_files_are_not() -> None:
    sources = [
        {"source": name}
        for name in ("code=ORG/SET[sub](train):10", "a.jsonl", "dir/a.jsonl", "./ORG/SET", "x=/home/me/a.txt")
    ]
    record = cards.CalibrationRecord("d", 1, 0, tuple(sources))
    assert cards._public_sources([record, record]) == ["ORG/SET (sub)"]


def test_names_that_others_chose_have_no_meaning_in_the_card(plan_for: PlanFor, source: Path, tmp_path: Path) -> None:
    hostile = "x](http://e.org) <script>alert(1)</script>\n# title `"
    front = json.dumps({"license": hostile})
    (source / CARD_NAME).write_text(f"---\n{front}\n---\n")
    card = card_of(plan_for, source, tmp_path / "out", base_model="a/b\nlicense: mit")
    assert data_of(card)["license"] == hostile and data_of(card)["base_model"] == "a/b\nlicense: mit"
    assert "huggingface.co" not in card.text
    assert (
        "<script>" not in card.text
        and "\n# title" not in card.text
        and re.search(r"[^\\]\]\(http://e.org", card.text) is None
    )


# ---- what is measured later


FIDELITY = {
    "domains": {"a|b": {"tokens": 1234, "kl": {"value": 0.25, "standard_error": 0.01}, "top1": {"value": 0.9, "standard_error": None},
                        "perplexity_original": {"value": 3.0, "standard_error": 0.1},
                        "perplexity_pruned": {"value": 4.0, "standard_error": 0.2}}},
}  # fmt: skip
FIDELITY["overall"] = FIDELITY["domains"]["a|b"]


def test_results_are_brought_into_their_place_and_the_rest_stays_as_people_left_it(
    plan_for: PlanFor, m2: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shards.write(*plan_for(m2, KEEP), out)
    assert not cards.refresh(out), "nothing was measured"
    path = out / CARD_NAME
    path.write_bytes(path.read_bytes() + b"\nA sentence of mine, \xff.\n")
    before = path.read_bytes()
    tiny.write_json(out / "reapkit/fidelity.json", FIDELITY)
    assert cards.refresh(out)
    text = path.read_bytes()
    assert "| a\\|b | 1,234 | 0.2500 ± 0.0100 | 0.900 | 3.00 ± 0.10 | 4.00 ± 0.20 |".encode() in text
    assert re.sub(rb"(?s)(?<=results -->).*?(?=\n<!-- reapkit: end)", b"", text) == before
    assert not cards.refresh(out), "it is there already"
    (out / "reapkit/fidelity.json").unlink()
    assert cards.refresh(out) and path.read_bytes() == before


EVALUATION = {
    "format": "reapkit-eval-1",
    "suite": "card",
    "models": [{"name": "original", "source": "a", "compression": None}, {"name": "<b>", "source": "b", "compression": 0.25}],
    "benchmarks": [
        {"name": "MATH-500", "published": None, "cells": [
            {"value": 0.9, "standard_error": 0.01, "difference": None, "error": None, "notes": []},
            {"value": 0.0, "standard_error": None, "error": None, "notes": ["stand-in"],
             "difference": {"value": -0.9, "standard_error": 0.02}},
        ]},
        {"name": "AIME25", "published": None, "cells": [
            {"value": None, "standard_error": None, "difference": None, "error": "no | server", "notes": []},
            {"value": 0.5, "standard_error": 0.1, "difference": None, "error": None, "notes": []},
        ]},
    ],
    "settings": {},
}  # fmt: skip


def test_the_evaluations_table_gives_reasons_for_empty_cells_and_no_zeros(
    plan_for: PlanFor, m2: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shards.write(*plan_for(m2, KEEP), out)
    tiny.write_json(out / "reapkit/eval.json", EVALUATION)
    assert cards.refresh(out)
    text = (out / CARD_NAME).read_text()
    assert "| benchmark | original | \\<b\\> (-25 %) |" in text
    assert "| MATH-500 | 90.0 ± 1.0 | 0.0 (-90.0 ± 2.0), stand-in |" in text
    assert "| AIME25 | not run: no \\| server | 50.0 ± 10.0 |" in text


def test_a_card_without_a_place_for_results_is_said(plan_for: PlanFor, m2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shards.write(*plan_for(m2, KEEP), out)
    text = (out / CARD_NAME).read_text()
    for broken, count in ((text.replace(BEGIN, ""), 0), (text + f"{BEGIN}{END}", 2)):
        (out / CARD_NAME).write_text(broken)
        with pytest.raises(CheckpointError, match=f"{count} places for results where there should be 1"):
            cards.refresh(out)
    (out / CARD_NAME).unlink()
    with pytest.raises(CheckpointError, match="has no README"):
        cards.refresh(out)


def test_verify_misses_a_card_and_lets_people_write_in_it(plan_for: PlanFor, m2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shards.write(*plan_for(m2, KEEP), out)
    (out / CARD_NAME).write_text("mine")
    assert verify(out, source=m2).ok and verify(out).ok
    (out / CARD_NAME).unlink()
    assert verify(out).problems == ("README.md is missing",)
