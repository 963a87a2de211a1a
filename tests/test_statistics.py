"""The file that observing leaves behind is exact, is refused when damaged, and adds up."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from reapkit import outputs
from reapkit.errors import DataError, PlanError
from reapkit.layout import Identity
from reapkit.statistics import FORMAT, NUM_FOLDS, SUM_NAMES, CalibrationRecord, LayerStatistics, Statistics, combine
from reapkit.tensors import read_header

SOURCE = Identity("org/model", None, "l" * 64, "r" * 64, "w" * 64)
SETTINGS = {"dtype": "float32", "max_length": 2048, "tokenizer": "t" * 64}
NUM_EXPERTS = 5


def layer(rows: int, seed: int) -> LayerStatistics:
    random = np.random.default_rng(seed)
    sums = {name: random.random((rows, NUM_EXPERTS)) / 3 for name in SUM_NAMES}
    return LayerStatistics(tokens_S=random.integers(1, 9, rows) * 1.0, max_norm_E=random.random(NUM_EXPERTS), **sums)


def statistics(seed: int = 0, domains: tuple[str, ...] = ("a", "b"), **changes: Any) -> Statistics:
    rows = len(domains) * NUM_FOLDS
    record = CalibrationRecord(
        f"digest-{seed}", 100 + seed, 0, ({"source": "a.jsonl:3", "rows": 3, "requested": None},)
    )
    described: dict[str, Any] = {
        "source": SOURCE,
        "num_experts": NUM_EXPERTS,
        "top_k": 2,
        "num_groups": 1,
        "unobserved": (),
        "domains": domains,
        "settings": SETTINGS,
        "calibration": (record,),
        "layers": {1: layer(rows, seed), 10: layer(rows, seed + 100), 2: layer(rows, seed + 200)},
    }
    return Statistics(**described | changes)


def require_equal(one: Statistics, other: Statistics) -> None:
    for part in dataclasses.fields(Statistics):
        if part.name != "layers":
            assert getattr(one, part.name) == getattr(other, part.name), part.name
    assert one.layers.keys() == other.layers.keys()
    for index, sums in one.layers.items():
        for part in dataclasses.fields(LayerStatistics):
            ours, theirs = getattr(sums, part.name), getattr(other.layers[index], part.name)
            assert ours.dtype == theirs.dtype == np.float64
            np.testing.assert_array_equal(ours, theirs)


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    saved = statistics(domains=("a", "väld", "c.d-e"), source=replace(SOURCE, revision="abc"))
    saved.save(tmp_path / "deep/er/stats.safetensors")
    require_equal(saved, Statistics.load(tmp_path / "deep/er/stats.safetensors"))
    assert [path.name for path in (tmp_path / "deep/er").iterdir()] == ["stats.safetensors"]


def test_the_same_statistics_make_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        statistics().save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_interrupted_saving_leaves_the_old_file_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stats"

    def write_half(target: FileIO, content: bytes) -> None:
        target.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(outputs, "write_all", write_half)
        statistics().save(path)
    assert list(tmp_path.iterdir()) == []
    statistics().save(path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(outputs, "write_all", write_half)
        statistics(seed=1).save(path)
    require_equal(statistics(), Statistics.load(path))


def rewrite(path: Path, *, metadata: dict[str, str] | None = None, **changes: np.ndarray[Any, Any] | None) -> None:
    _, described = read_header(path)
    arrays = {**load_file(path), **{name.replace("__", "."): value for name, value in changes.items()}}
    kept = {name: value for name, value in arrays.items() if value is not None}
    save_file(kept, path, metadata=described if metadata is None else metadata)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no statistics file") as caught:
        Statistics.load(tmp_path / "none")
    assert caught.value.hint == "make one with reapkit observe"


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64, b'{"kept": {}}' * 9])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "stats").write_bytes(content)
    with pytest.raises(DataError, match="is damaged or not a statistics file"):
        Statistics.load(tmp_path / "stats")


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"reapkit-statistics-0": "{}"}])
def test_another_safetensors_file_is_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file({"layers.0.count_SE": np.zeros((4, 4))}, tmp_path / "stats", metadata=metadata)
    with pytest.raises(DataError, match="is not a statistics file of reapkit"):
        Statistics.load(tmp_path / "stats")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    statistics().save(tmp_path / "stats")
    content = (tmp_path / "stats").read_bytes()
    (tmp_path / "stats").write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match="is damaged") as caught:
        Statistics.load(tmp_path / "stats")
    assert caught.value.hint == "observe again"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers__2__gate_SE": None}, "layers.2.gate_SE"),
        ({"layers__2__gate_SE": np.zeros((8, 4))}, "gate_SE of layer 2"),
        ({"layers__2__tokens_S": np.zeros(4)}, "tokens_S of layer 2"),
        ({"layers__2__max_norm_E": np.zeros(6)}, "max_norm_E of layer 2"),
        ({"layers__2__norm_SE": np.zeros((8, 5), dtype=np.float32)}, "float32"),
        ({"strange": np.zeros(1)}, "'strange' is nothing that belongs there"),
    ],
)
def test_an_inconsistent_file_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    statistics().save(tmp_path / "stats")
    rewrite(tmp_path / "stats", **changes)
    with pytest.raises(DataError, match="is damaged") as caught:
        Statistics.load(tmp_path / "stats")
    assert reason in str(caught.value)


@pytest.mark.parametrize("described", ["{}", "[]", "not JSON", '{"calibration": [], "domains": ["a"], "extra": 1}'])
def test_damaged_descriptions_are_refused(tmp_path: Path, described: str) -> None:
    statistics().save(tmp_path / "stats")
    rewrite(tmp_path / "stats", metadata={FORMAT: described})
    with pytest.raises(DataError, match="is damaged"):
        Statistics.load(tmp_path / "stats")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [*SUM_NAMES, "max_norm_E"])
def test_sums_that_are_not_finite_are_refused_with_layer_and_expert(tmp_path: Path, name: str, value: float) -> None:
    damaged = statistics()
    getattr(damaged.layers[10], name)[..., 4] = value
    damaged.save(tmp_path / "stats")
    with pytest.raises(DataError, match=f"layer 10, expert 4: the sum {name} is not finite"):
        Statistics.load(tmp_path / "stats")


def test_a_number_of_tokens_that_is_not_finite_is_refused_with_the_layer(tmp_path: Path) -> None:
    damaged = statistics()
    damaged.layers[10].tokens_S[0] = np.nan
    damaged.save(tmp_path / "stats")
    with pytest.raises(DataError, match="layer 10: the number of tokens is not finite"):
        Statistics.load(tmp_path / "stats")


def test_combining_adds_rows_by_domain_and_fold_and_takes_the_larger_maximum() -> None:
    one, other = statistics(0, ("a", "c")), statistics(1, ("b", "c"))
    both = combine([one, other])
    assert both.domains == ("a", "b", "c")
    assert [record.digest for record in both.calibration] == ["digest-0", "digest-1"]
    assert both.num_tokens == 201
    for index in (1, 2, 10):
        first, second, sums = one.layers[index], other.layers[index], both.layers[index]
        for name in ("tokens_S", *SUM_NAMES):
            ours = getattr(sums, name).reshape(3, NUM_FOLDS, -1)
            left, right = (getattr(part, name).reshape(2, NUM_FOLDS, -1) for part in (first, second))
            np.testing.assert_array_equal(ours[0], left[0])
            np.testing.assert_array_equal(ours[1], right[0])
            np.testing.assert_array_equal(ours[2], left[1] + right[1])
        np.testing.assert_array_equal(sums.max_norm_E, np.maximum(first.max_norm_E, second.max_norm_E))
    require_equal(one, statistics(0, ("a", "c")))  # combining changes nothing that it is given


def test_combining_in_any_order_gives_the_same_sums() -> None:
    one, other = statistics(0, ("b",)), statistics(1, ("a",))
    forward, backward = combine([one, other]), combine([other, one])
    require_equal(forward, dataclasses.replace(backward, calibration=forward.calibration))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": replace(SOURCE, layout="x")}, "statistics of different tensors do not add up"),
        ({"source": replace(SOURCE, routing="x")}, "statistics of different routers do not add up"),
        ({"source": replace(SOURCE, weights="x")}, "statistics of different weights do not add up"),
        ({"settings": SETTINGS | {"dtype": "bfloat16"}}, r"of different dtype \(float32 and bfloat16\) do not add up"),
        ({"settings": SETTINGS | {"tokenizer": "x"}}, "statistics of different tokenizer do not add up"),
        ({"layers": {1: layer(8, 0)}}, "statistics of different layers do not add up"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        combine([statistics(0), statistics(1, **changes)])


def test_the_same_text_is_not_counted_twice() -> None:
    both = combine([statistics(0), statistics(1)])
    with pytest.raises(PlanError, match="the calibration text digest-1 is in more than one of the files"):
        combine([both, statistics(2), statistics(1)])
