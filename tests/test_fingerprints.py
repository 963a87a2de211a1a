"""Statistics of another model, revision, tokenizer, template, setting or mix of data are told by what they were made of, not by a name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from reapkit.compression import observed_before, prune
from reapkit.errors import CheckpointError, DataError, PlanError
from reapkit.observation import Observation, Run
from reapkit.plans import plan
from reapkit.statistics import Statistics, combine

RUN = Run(device="cpu", dtype="float32")
ROWS = [{"messages": [{"role": "user", "content": f"fox {i} jumps"}], "domain": "ab"[i % 2]} for i in range(6)]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def observation(folder: Path, rows: Path, *, max_length: int = 64, run: Run = RUN, seed: int = 0) -> Observation:
    return Observation(folder, [str(rows)], run=run, max_length=max_length, seed=seed)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, m2: Path) -> tuple[Path, Path, Path]:
    """A model with a chat template, its text, and the statistics of both."""
    here = tmp_path_factory.mktemp("fingerprints")
    folder = tiny.add_tokenizer(Path(shutil.copytree(m2, here / "model")))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    rows, statistics = here / "rows.jsonl", here / "s.safetensors"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    observation(folder, rows).write(statistics)
    return folder, rows, statistics


def flip(folder: Path, part: str) -> None:
    """Change one value of the first tensor whose name has this part, as further training would."""
    from reapkit.checkpoint import Checkpoint

    info = next(info for name, info in Checkpoint.open(folder).tensors.items() if part in name)
    with (folder / info.file).open("r+b") as stream:
        stream.seek(info.start + 1)
        byte = stream.read(1)
        stream.seek(info.start + 1)
        stream.write(bytes([byte[0] ^ 1]))


def another_model(folder: Path, rows: Path) -> dict[str, Any]:
    other = tiny.add_tokenizer(tiny.make_m2(folder.parent / "other", seed=9))
    (other / "chat_template.jinja").write_text(TEMPLATE)
    shutil.rmtree(folder)
    other.rename(folder)  # under the same name
    return {}


def another_revision(folder: Path, rows: Path) -> dict[str, Any]:
    flip(folder, "layers.1.self_attn.q_proj.weight")
    return {}


def another_revision_of_the_routers(folder: Path, rows: Path) -> dict[str, Any]:
    flip(folder, "block_sparse_moe.gate.weight")
    return {}


def another_template(folder: Path, rows: Path) -> dict[str, Any]:
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<", "|"))
    return {}


def a_template_that_renders_these_rows_alike(folder: Path, rows: Path) -> dict[str, Any]:
    (folder / "chat_template.jinja").write_text(TEMPLATE + "{# another #}")
    return {}


def another_tokenizer(folder: Path, rows: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"~":', '"\u00e9":'))
    return {}


def another_share_of_the_domains(folder: Path, rows: Path) -> dict[str, Any]:
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:4], *ROWS[:1]]))
    return {}


def the_same_rows_in_other_domains(folder: Path, rows: Path) -> dict[str, Any]:
    rows.write_text("".join(json.dumps({**row, "domain": "ba"[i % 2]}) + "\n" for i, row in enumerate(ROWS)))
    return {}


def one_word_changed(folder: Path, rows: Path) -> dict[str, Any]:
    rows.write_text(rows.read_text().replace("fox 3", "dog 3"))
    return {}


def another_length(folder: Path, rows: Path) -> dict[str, Any]:
    return {"max_length": 32}


def another_dtype(folder: Path, rows: Path) -> dict[str, Any]:
    return {"run": Run(device="cpu", dtype="bfloat16")}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (another_model, "routers"),
        (another_revision_of_the_routers, "routers"),
        (another_revision, "weights"),
        (another_template, "tokenizer"),
        (a_template_that_renders_these_rows_alike, "tokenizer"),
        (another_tokenizer, "tokenizer"),
        (another_share_of_the_domains, "text"),
        (the_same_rows_in_other_domains, "text"),
        (one_word_changed, "text"),
        (another_length, "max_length"),
        (another_dtype, "dtype"),
    ],
)
def test_statistics_of_something_else_are_refused_and_the_difference_is_named(
    base: tuple[Path, Path, Path], tmp_path: Path, change: Callable[[Path, Path], dict[str, Any]], what: str
) -> None:
    folder, rows = (
        Path(shutil.copytree(base[0], tmp_path / "model")),
        Path(shutil.copy(base[1], tmp_path / "rows.jsonl")),
    )
    options = change(folder, rows)
    other = observation(folder, rows, **options)
    assert other.differing(Statistics.load(base[2])) == what
    with pytest.raises(DataError, match=f"was observed on another model, text or settings: other {what}"):
        observed_before(base[2], other)
    if what in ("text", "max_length", "dtype"):
        return
    # Nor do they add up, nor does a plan made of them prune what it was not made for.
    theirs = other.run()
    with pytest.raises(PlanError, match=f"statistics of different {what} do not add up"):
        combine([Statistics.load(base[2]), theirs])
    if what != "tokenizer":
        with pytest.raises(PlanError, match=f"this checkpoint has other {what}"):
            prune(folder, plan(base[2], ratio="0.25"), tmp_path / "out")


def test_names_and_places_make_no_difference(base: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, rows = Path(shutil.copytree(base[0], tmp_path / "renamed")), tmp_path / "other-name.jsonl"
    rows.write_text(base[1].read_text() + "\n\n")
    other = observation(folder, rows)
    assert other.differing(Statistics.load(base[2])) is None
    assert observed_before(base[2], other) is not None
    assert prune(folder, plan(base[2], ratio="0.25"), tmp_path / "out").after.num_experts == 6


def test_the_same_text_twice_does_not_count_twice(base: tuple[Path, Path, Path]) -> None:
    statistics = Statistics.load(base[2])
    with pytest.raises(PlanError, match="is in more than one of the files and would count twice"):
        combine([statistics, statistics])


def test_a_token_that_the_model_has_no_embedding_for_is_refused_before_observing(
    base: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(base[0], tmp_path / "model"))
    path = folder / "tokenizer.json"
    tokenizer = tiny.read_json(path)
    tokenizer["model"]["vocab"]["x"] = 128
    tiny.write_json(path, tokenizer)
    with pytest.raises(CheckpointError, match="gives the token 128, and the model has 128 embeddings"):
        observation(folder, base[1])
