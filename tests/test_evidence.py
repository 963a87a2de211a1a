"""Evidence is what its definitions say, counted another way, and lies beside the plan."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from reapkit import plans
from reapkit.cli import app
from reapkit.evidence import gather, jaccard
from reapkit.layout import Identity
from reapkit.statistics import NUM_FOLDS, SUM_NAMES, CalibrationRecord, LayerStatistics, Statistics

EXPERTS, KEEP = 12, 8


def statistics() -> Statistics:
    """Two layers, two domains; expert 11 of layer 1 is never routed to."""
    layers = {}
    for index in range(2):
        rng = np.random.default_rng(index)
        sums = {name: rng.integers(1, 50, (2 * NUM_FOLDS, EXPERTS)).astype(float) for name in SUM_NAMES}
        layers[index] = LayerStatistics(tokens_S=np.arange(1.0, 9.0), max_norm_E=rng.random(EXPERTS), **sums)
    for name in SUM_NAMES:
        getattr(layers[1], name)[:, 11] = 0
    source = Identity("somewhere", None, "layout", "routing", "weights")
    return Statistics(source, EXPERTS, 2, 1, ("a", "b"), {}, (CalibrationRecord("digest", 36),), (), layers)


def kept_by(values: np.ndarray, keep: int = KEEP) -> set[int]:
    return set(sorted(range(EXPERTS), key=lambda e: (-values[e], e))[:keep])


def test_agreement_is_between_halves_of_documents_counted_over() -> None:
    whole = statistics()
    found = gather(plans.choose(whole, criterion="frequency", keep=KEEP), whole)
    for index, layer in whole.layers.items():
        shares = []
        for half in ((0, 1), (0, 2), (0, 3)):
            rows = [[row for row in range(8) if (row % 4 in half) is side] for side in (True, False)]
            one, other = (kept_by(layer.count_SE[part].sum(0)) for part in rows)
            shares.append(len(one & other) / len(one | other))
        assert found.layers[index].agreement == pytest.approx(np.mean(shares))
    assert found.agreement == pytest.approx(np.mean([layer.agreement for layer in found.layers]))
    assert [layer.never_routed for layer in found.layers] == [(), (11,)]


def test_growth_compares_parts_with_the_whole() -> None:
    whole = statistics()
    found = gather(plans.choose(whole, criterion="frequency", keep=KEEP), whole)
    assert [part.tokens for part in found.growth] == [9, 18, 27]
    for part, count in zip(found.growth, (1, 2, 3), strict=True):
        shares = []
        for layer, first in itertools.product(whole.layers.values(), range(4)):
            folds = {(first + step) % 4 for step in range(count)}
            rows = [row for row in range(8) if row % 4 in folds]
            shares.append(jaccard(sorted(kept_by(layer.count_SE[rows].sum(0))), sorted(kept_by(layer.count_SE.sum(0)))))
        assert part.agreement == pytest.approx(np.mean(shares))


def test_coverage_is_told_for_every_domain_and_ratio() -> None:
    whole = statistics()
    found = gather(plans.choose(whole, criterion="frequency", keep=KEEP), whole, ratio="0.4")
    assert {(part.ratio, part.domain) for part in found.coverage} == {
        (ratio, domain) for ratio in ("0.125", "0.25", "0.3", "0.375", "0.4", "0.5") for domain in "ab"
    }
    for part in found.coverage:
        rows = slice(0, 4) if part.domain == "a" else slice(4, 8)
        keep = EXPERTS - int(EXPERTS * float(part.ratio))
        shares = []
        for layer in whole.layers.values():
            kept = sorted(kept_by(layer.count_SE.sum(0), keep))
            shares.append(layer.count_SE[rows][:, kept].sum() / layer.count_SE[rows].sum())
        assert part.routed == pytest.approx(np.mean(shares)) and part.worst_layer == pytest.approx(min(shares))


def test_evidence_is_printed_and_lies_beside_the_plan(tmp_path: Path) -> None:
    statistics().save(tmp_path / "s.safetensors")
    words = ["plan", str(tmp_path / "s.safetensors"), "--keep", "8", "--evidence", "-o", str(tmp_path / "p.json")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "agreement of halves" in result.stdout and "agreement with all" in result.stdout
    stored = json.loads((tmp_path / "p.evidence.json").read_text())
    assert stored == json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["evidence"]
    assert stored["num_kept"] == 8 and len(stored["layers"]) == 2
    (tmp_path / "model").mkdir()
    refused = CliRunner().invoke(app, ["plan", str(tmp_path / "model"), "--criterion", "random", *words[2:]])
    assert refused.exit_code in (1, 2)
