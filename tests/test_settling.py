"""Observing stops at the end of a wave when the choice has settled, and says what it rests on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny
from reapkit import observation as module
from reapkit.cli import app
from reapkit.errors import PlanError, UsageError
from reapkit.evidence import agreement_of_halves
from reapkit.observation import Observation, Run, Settled
from reapkit.ranks import Ranks
from reapkit.rerouting import Reroute
from reapkit.statistics import combine
from streaming import text_rows, write_jsonl

RUN = Run(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def folder(m2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.add_tokenizer(Path(shutil.copytree(m2, tmp_path_factory.mktemp("settling") / "m2")))


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "tokens_per_batch", lambda model: 60)
    return write_jsonl(tmp_path / "text.jsonl", text_rows(60))


def observed(folder: Path, text: str, until: Settled | None, **options: object) -> Observation:
    return Observation(folder, [text], run=RUN, max_length=48, seed=0, until=until, **options)  # type: ignore[arg-type]


def test_it_stops_where_halves_agree_and_records_what_was_observed(folder: Path, text: str) -> None:
    whole = observed(folder, text, None).run()
    early = observed(folder, text, Settled(0.3, keep=6)).run()
    assert early.num_tokens < whole.num_tokens
    assert agreement_of_halves(early, keep=6) >= 0.3
    assert all(layer.tokens_S.sum() == early.num_tokens for layer in early.layers.values())
    assert early.calibration[0].digest != whole.calibration[0].digest
    # Its sums are those of the first micro-batches of the whole.
    parts = [batch for wave in observed(folder, text, None).waves for batch in wave]
    tokens = np.cumsum([int(batch.length_B.sum()) for batch in parts])
    assert early.num_tokens in tokens


def test_what_never_settles_is_observed_to_the_end_to_the_same_sums(folder: Path, text: str) -> None:
    whole, patient = (observed(folder, text, until).run() for until in (None, Settled(1.0, keep=3)))
    assert patient.calibration == whole.calibration
    for index, layer in whole.layers.items():
        np.testing.assert_array_equal(layer.gated_norm_SE, patient.layers[index].gated_norm_SE)


def test_agreement_is_one_where_halves_have_the_same_sums(folder: Path, text: str) -> None:
    statistics = observed(folder, text, None).run()
    for layer in statistics.layers.values():
        for name in ("count_SE", "gated_norm_SE"):
            getattr(layer, name)[:] = getattr(layer, name).sum(0)
    assert agreement_of_halves(statistics, keep=5) == 1.0
    with pytest.raises(Exception, match="would count twice"):
        combine([statistics, statistics])


@pytest.mark.parametrize(
    ("until", "options", "message"),
    [
        (Settled(1.5, keep=4), {}, "--until-stable 1.5 is not a share"),
        (Settled(0.9), {}, "give either --ratio or --keep"),
        (Settled(0.9, keep=4), {"reroute": Reroute(10, 4)}, "do not go together"),
        (Settled(0.9, keep=4), {"ranks": Ranks(0, 2)}, "looks at the sums of all text"),
    ],
)
def test_what_cannot_settle_is_refused(
    folder: Path, text: str, until: Settled, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        observed(folder, text, until, **options)
    with pytest.raises(PlanError, match="keeping 1 of 8 experts is fewer"):
        observed(folder, text, Settled(0.9, keep=1))


def test_the_command_line_says_how_many_tokens_it_took(folder: Path, text: str, tmp_path: Path) -> None:
    words = ["observe", str(folder), "--data", text, "--max-length", "48", "--keep", "6", "-o", str(tmp_path / "s")]
    early = CliRunner().invoke(app, [*words, "--until-stable", "0.3"])
    assert early.exit_code == 0 and "the choice settled after" in early.stderr, early.stderr
    late = CliRunner().invoke(app, [*words, "--until-stable", "1"])
    assert late.exit_code == 0 and "tokens" in late.stderr
