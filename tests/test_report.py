"""The report of an output: its numbers against others' arithmetic, its page in a browser, and what hostile names cannot do in it."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny
from browser import DESKTOP, PHONE, Page, browser, needs_browser
from reapkit import cli, layout, plans, reporting, shards
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import CARD_NAME, STATISTICS_NAME, Checkpoint
from reapkit.errors import CheckpointError, DataError, UnsupportedError
from reapkit.evidence import jaccard
from reapkit.layout import Identity
from reapkit.reporting import MAX_BYTES, Evidence, jaccard_by_chance, render
from reapkit.samples import SampleHeader, SampleWriter, beside
from reapkit.selection import Rule
from reapkit.shards import Manifest
from reapkit.statistics import NUM_FOLDS, CalibrationRecord, LayerStatistics, Statistics
from test_cards import EVALUATION

KEEP = 5
DOMAINS = ("code", "maths")
# Each would leave a trace if it ran: in the window, in the console, or on the network.
HOSTILE = (
    "<script>window.ran=1</script>",
    "</script><script>window.ran=2</script>",
    "<img src=x onerror=window.ran=3>",
    '"><svg onload=window.ran=4>',
    "{{ 7 * 191 }}{% raw %}",
    '<a href="javascript:window.ran=5">click</a>',
    "%{customdata} ${window.ran=6} `",
    "<!-- <script>",
)


def observed(folder: Path, *, domains: tuple[str, ...] = DOMAINS, seed: int = 0) -> Statistics:
    """Sums as observing might leave them, of no real text."""
    checkpoint = Checkpoint.open(folder)
    resolved = layout.resolve(checkpoint, ARCHITECTURES)
    draw = np.random.default_rng(seed)
    rows, experts = len(domains) * NUM_FOLDS, resolved.num_experts
    layers = {}
    for index in resolved.layer_indices:
        part = LayerStatistics.zeros(rows, experts)
        part.tokens_S[:] = draw.integers(50, 100, rows)
        part.count_SE[:] = draw.integers(1, 40, (rows, experts))
        part.gate_SE[:] = part.count_SE * draw.random((rows, experts))
        part.norm_SE[:] = part.count_SE * draw.random((rows, experts)) * 3
        part.gated_norm_SE[:] = part.count_SE * (draw.random(experts) + 0.5 * draw.random((rows, experts)))
        layers[index] = part
    settings = {"dtype": "float32", "max_length": 2048, "tokenizer": "none"}
    record = CalibrationRecord("d" * 64, 600, 3, ({"source": "code=some text.jsonl:10"},))
    source = Identity.of(checkpoint, resolved)
    return Statistics(source, experts, resolved.top_k, 1, domains, settings, (record,), (), layers)


def write_output(source: Path, out: Path, *, domains: tuple[str, ...] = DOMAINS, results: bool = True) -> Statistics:
    """An output with statistics and, if wanted, fidelity in its folder."""
    statistics = observed(source, domains=domains)
    choice = plans.choose(statistics, keep=KEEP)
    checkpoint = Checkpoint.open(source)
    shards.write(checkpoint, layout.resolve(checkpoint, ARCHITECTURES), choice.plan, out)
    statistics.save(out / "reapkit/statistics.safetensors")
    if results:
        tiny.write_json(out / "reapkit/fidelity.json", measured(domains))
    return statistics


def measured(domains: tuple[str, ...]) -> dict[str, Any]:
    def figure(value: float, error: float | None = 0.01) -> dict[str, float | None]:
        return {"value": value, "standard_error": error}

    row = {
        "tokens": 1234, "samples": 5, "kl": figure(0.25), "top1": figure(0.875, None),
        "perplexity_original": figure(3.0), "perplexity_pruned": figure(4.0),
        "layers": [{"layer": layer, "output_error": figure(0.1 * layer)} for layer in range(3)],
    }  # fmt: skip
    return {"domains": dict.fromkeys(domains, row), "overall": row}


@pytest.fixture(scope="module")
def out(m2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "out"
    write_output(m2, folder)
    return folder


@pytest.fixture(scope="module")
def evidence(out: Path) -> Evidence:
    return Evidence.gather(out)


# ---- numbers


def test_saliency_and_mass_are_those_of_the_sums(evidence: Evidence) -> None:
    assert evidence.statistics is not None
    for row, layer in enumerate(reporting.saliency(evidence)["layers"]):
        sums, kept = evidence.statistics.layers[layer["layer"]], evidence.manifest.kept[layer["layer"]]
        reap = [sum(sums.gated_norm_SE[:, e]) / sum(sums.count_SE[:, e]) for e in range(8)]
        assert layer["score"] == pytest.approx(reap, rel=1e-5)
        assert layer["routed"] == [int(sum(sums.count_SE[:, e])) for e in range(8)]
        assert layer["number"] == [kept.index(e) if e in kept else None for e in range(8)]
        mass = reporting.mass(evidence)
        assert mass["own"][row] == pytest.approx(sum(reap[e] for e in kept) / sum(reap), abs=1e-6)
        best = sorted(reap, reverse=True)
        for kept_count, shares in zip(mass["kept"], mass["share"], strict=True):
            assert shares[row] == pytest.approx(sum(best[:kept_count]) / sum(best), abs=1e-6)
    # 8 experts by steps of 5 %: E - floor(E x ratio), once each, down to the two that a token is routed to.
    assert mass["kept"] == [8, 7, 6, 5, 4, 3, 2] and mass["chosen"] == KEEP


def test_coverage_is_counted_by_domain(evidence: Evidence) -> None:
    assert evidence.statistics is not None
    coverage = reporting.coverage(evidence)
    for d, domain in enumerate(DOMAINS):
        assert coverage["domains"][d] == domain
        assert coverage["tokens"][d] == evidence.statistics.layers[0].tokens_S[4 * d : 4 * d + 4].sum()
        for row, layer in enumerate(coverage["layers"]):
            sums, kept = evidence.statistics.layers[layer], evidence.manifest.kept[layer]
            for name, array in (("routed", sums.count_SE), ("saliency", sums.gated_norm_SE)):
                part = array[4 * d : 4 * d + 4]
                share = sum(part[f][e] for f in range(4) for e in kept) / part.sum()
                assert coverage["shares"][name][d][row] == pytest.approx(share, abs=1e-6)
            own = sums.gated_norm_SE[4 * d : 4 * d + 4].sum(0) / sums.count_SE[4 * d : 4 * d + 4].sum(0)
            best = set(np.argsort(-own)[:KEEP].tolist())
            assert coverage["shares"]["choice"][d][row] == len(best & set(kept)) / KEEP


def test_stability_compares_choices_of_disjoint_folds(evidence: Evidence) -> None:
    assert evidence.statistics is not None
    stability = reporting.stability(evidence)
    assert stability["differing"] == [], "all folds together choose what was kept"

    def choose(layer: int, folds: tuple[int, ...]) -> set[int]:
        assert evidence.statistics is not None
        sums = evidence.statistics.layers[layer]
        rows = [4 * d + f for d in range(len(DOMAINS)) for f in folds]
        score = sums.gated_norm_SE[rows].sum(0) / sums.count_SE[rows].sum(0)
        return set(np.argsort(-score)[:KEEP].tolist())

    halves = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    quarters = [((a,), (b,)) for a, b in itertools.combinations(range(4), 2)]
    for part, pairs in zip(stability["apart"], (quarters, halves), strict=True):
        for found, (one, other) in zip(part["jaccard"], pairs, strict=True):
            for row, layer in enumerate(stability["layers"]):
                a, b = choose(layer, one), choose(layer, other)
                assert found[row] == len(a & b) / len(a | b)
    tokens = evidence.statistics.layers[0].tokens_S.sum()
    assert stability["tokens"] == tokens
    assert [part["tokens"] for part in stability["apart"]] == [round(tokens / 4), round(tokens / 2)]
    assert [(part["quarters"], len(part["jaccard"])) for part in stability["whole"]] == [(1, 4), (2, 6), (3, 4)]


def test_a_kept_set_that_the_criterion_would_not_choose_is_said(evidence: Evidence) -> None:
    other = dict(evidence.manifest.kept) | {1: (0, 1, 2, 3, 4)}
    if other[1] == evidence.manifest.kept[1]:
        other[1] = (3, 4, 5, 6, 7)
    edited = replace(evidence, manifest=replace(evidence.manifest, kept=other))
    assert reporting.stability(edited)["differing"] == [1]
    assert "In 1 of 3 layers the kept set is not what" in render(edited).decode()


@pytest.mark.parametrize(("num_experts", "keep"), [(4, 2), (6, 4), (5, 5), (7, 1)])
def test_jaccard_by_chance_is_the_mean_over_all_pairs_of_sets(num_experts: int, keep: int) -> None:
    sets = list(itertools.combinations(range(num_experts), keep))
    mean = sum(jaccard(one, other) for one in sets for other in sets) / len(sets) ** 2
    assert jaccard_by_chance(num_experts, keep) == pytest.approx(mean)


def test_memory_adds_up_to_the_tensors_before_and_after(evidence: Evidence, m2: Path, out: Path) -> None:
    parts = reporting.memory(evidence)["parts"]
    for when, folder in (("before", m2), ("after", out)):
        assert sum(part[when] for part in parts) == sum(tensor.nbytes for tensor in tiny.load_tensors(folder).values())
    name = "experts and their router rows"
    before = {key: tensor.nbytes for key, tensor in tiny.load_tensors(m2).items()}
    moe = sum(size for key, size in before.items() if ".block_sparse_moe." in key)
    assert [part["before"] for part in parts if part["name"] == name] == [moe]


def test_sizes_are_decimal() -> None:
    assert [reporting.size_text(count) for count in (0, 999, 1000, 32_692_576, 230e9, 1.5e12)] == [
        "0 B", "999 B", "1.00 kB", "32.69 MB", "230.00 GB", "1.50 TB",
    ]  # fmt: skip


# ---- the page


def test_the_page_names_the_commands_that_make_the_output_again(evidence: Evidence, m2: Path) -> None:
    assert list(reporting._commands(evidence)) == [
        f"reapkit observe {m2} --data 'code=some text.jsonl:10' --max-length 2048 --dtype float32 --seed 3 -o statistics.safetensors",
        "reapkit plan statistics.safetensors --criterion reap --keep 5 -o plan.json",
        f"reapkit prune {m2} plan.json -o out",
    ]
    manifest = replace(evidence.manifest, criterion="random", seed=7, calibration=(), dequantized=True, base_model="ORG/NAME",
                       unmeasured={3: 2}, source=replace(evidence.manifest.source, origin="ORG/NAME", revision="abc"))  # fmt: skip
    assert list(reporting._commands(replace(evidence, manifest=manifest, statistics=None))) == [
        "reapkit plan ORG/NAME --revision abc --criterion random --keep 5 --seed 7 -o plan.json",
        "reapkit prune ORG/NAME --revision abc plan.json -o out --dequantize --base-model ORG/NAME --mtp same-as-layer-2",
    ]


def test_the_commands_name_how_the_plan_was_made(out: Path, evidence: Evidence, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    plan = tiny.read_json(folder / "reapkit/plan.json")
    tiny.write_json(folder / "reapkit/plan.json", plan | {"options": {"protect": "super", "blend": "code=2,math=1"}})
    _, command, _ = reporting._commands(replace(evidence, out=folder))
    named = "--criterion reap --blend code=2,math=1 --protect super --keep 5 -o plan.json"
    assert command == f"reapkit plan statistics.safetensors {named}"
    # Sampled tokens, which the statistics do not tell of: without their file nothing is said of observing.
    for criterion in ("reroute", "easy-ep"):
        chosen = replace(evidence, manifest=replace(evidence.manifest, criterion=criterion), out=folder)
        first, *_ = reporting._commands(chosen)
        assert first.startswith(f"reapkit plan statistics.safetensors --criterion {criterion}")
        sample = SampleHeader(evidence.manifest.source, {}, "digest", 3, ("code",), 300, 4, {})
        first, *_ = reporting._commands(replace(chosen, sample=sample))
        assert first.startswith("reapkit observe ")
        assert first.endswith(" --seed 3 --reroute-tokens 300 --reroute-candidates 4 -o statistics.safetensors")


def test_a_sample_beside_statistics_that_were_given_is_found(out: Path, tmp_path: Path) -> None:
    statistics = Path(shutil.copyfile(out / STATISTICS_NAME, tmp_path / "s.safetensors"))
    assert Evidence.gather(out, statistics).sample is None
    rule = Rule(8, 2, "sigmoid", True, 1.0, 0.0)
    header = SampleHeader(Manifest.load(out).source, {}, "digest", 0, ("a",), 5, 3, {0: rule})
    writer = SampleWriter(beside(statistics), header)
    writer.finish()
    assert Evidence.gather(out, statistics).sample == header


def test_the_page_is_self_contained_and_the_same_every_time(evidence: Evidence) -> None:
    page = render(evidence)
    assert page == render(evidence) and len(page) < MAX_BYTES
    text = page.decode()
    outside = re.sub(r'<script type="application/octet-stream".*?</script>', "", text, flags=re.DOTALL)
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", outside), "nothing is loaded from elsewhere"
    assert "default-src 'none'" in text and "unsafe-eval" not in text and "script-src 'unsafe-inline'" not in text
    library = re.search(r'id="library">(.*?)</script>', text, re.DOTALL)
    assert library is not None
    assert b"plotly.js" in gzip.decompress(base64.b64decode(library[1]))[:200]


def test_a_page_of_the_largest_models_fits(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    """62 layers of 256 experts, as MiniMax-M2, and 60 of 384, as Kimi-K2, with six domains."""
    for num_layers, experts, keep in ((62, 256, 180), (60, 384, 269)):
        draw = np.random.default_rng(0)
        layers = {}
        for index in range(num_layers):
            part = LayerStatistics.zeros(24, experts)
            part.tokens_S[:] = 1e6
            part.count_SE[:] = draw.integers(1, 100_000, (24, experts))
            part.gated_norm_SE[:] = part.count_SE * draw.random(experts)
            layers[index] = part
        assert evidence.statistics is not None
        statistics = replace(evidence.statistics, num_experts=experts, top_k=8, layers=layers, domains=tuple("abcdef"))
        kept = {index: tuple(range(keep)) for index in layers}
        before, after = (replace(evidence.manifest.before, num_experts=count) for count in (experts, keep))
        manifest = replace(evidence.manifest, kept=kept, before=before, after=after)
        assert len(render(replace(evidence, manifest=manifest, statistics=statistics))) < MAX_BYTES
    monkeypatch.setattr(reporting, "MAX_BYTES", 1_000_000)
    with pytest.raises(UnsupportedError, match=r"would take [\d,]+ bytes, and 1,000,000 are promised"):
        render(evidence)


def test_without_statistics_or_results_the_page_says_how_to_get_them(m2: Path, tmp_path: Path) -> None:
    write_output(m2, tmp_path / "out", results=False)
    kept_elsewhere = tmp_path / "statistics.safetensors"
    (tmp_path / "out/reapkit/statistics.safetensors").rename(kept_elsewhere)
    text = render(Evidence.gather(tmp_path / "out")).decode()
    assert (
        "--statistics FILE" in text and "reapkit compare ORIGINAL PRUNED" in text and 'id="chart-saliency"' not in text
    )
    assert 'id="chart-saliency"' in render(Evidence.gather(tmp_path / "out", kept_elsewhere)).decode()


def test_the_evaluations_table_stands_on_the_page(evidence: Evidence) -> None:
    assert 'id="evaluation"' not in render(evidence).decode()
    text = render(replace(evidence, evaluation=EVALUATION)).decode()
    assert "<th>original</th><th>&lt;b&gt; (-25 %)</th>" in text
    assert "<tr><th>AIME25</th><td>not run: no | server</td><td>50.0 ± 10.0</td></tr>" in text


def test_statistics_of_other_text_or_another_model_are_refused(
    out: Path, m2: Path, qwen3: Path, tmp_path: Path
) -> None:
    record = CalibrationRecord("e" * 64, 600)
    replace(observed(m2), calibration=(record,)).save(tmp_path / "text.safetensors")
    replace(observed(qwen3), calibration=(record,)).save(tmp_path / "model.safetensors")
    for name, what in (("text", "other text"), ("model", "another model")):
        with pytest.raises(DataError, match=f"was observed on {what} than the plan of this output rests on"):
            Evidence.gather(out, tmp_path / f"{name}.safetensors")


def test_what_is_no_finished_output_is_refused(m2: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        Evidence.gather(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no reapkit\.json"):
        Evidence.gather(m2)
    (tmp_path / "reapkit.unfinished.json").write_text("{}")
    with pytest.raises(CheckpointError, match="unfinished output"):
        Evidence.gather(tmp_path)


def test_a_missing_charting_library_is_one_sentence(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(UnsupportedError, match="the report's charts need plotly") as caught:
        render(evidence)
    assert caught.value.hint == "pip install 'reapkit[report]'"


def test_the_command_writes_page_and_card(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "out")
    page = tmp_path / "sub/page.html"
    result = CliRunner().invoke(cli.app, ["report", str(copy), "-o", str(page), "--card", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"report": str(page), "bytes": page.stat().st_size}
    assert "| code | 1,234 | 0.2500 ± 0.0100 | 0.875 |" in (copy / CARD_NAME).read_text()
    told = CliRunner().invoke(cli.app, ["report", str(copy), "-o", str(page)])
    assert (
        told.exit_code == 0
        and f"page.html: {page.stat().st_size / 1e6:.2f} MB" in told.stderr.replace("\n", "")
        and told.stdout == ""
    )
    refused = CliRunner().invoke(cli.app, ["report", str(copy), "-o", str(tmp_path)])
    assert refused.exit_code == 1 and "is a folder" in refused.stderr


def test_names_reach_the_page_escaped(m2: Path, tmp_path: Path) -> None:
    """Without a browser: no tag of theirs is a tag of the page."""
    write_output(m2, tmp_path / "out", domains=tuple(sorted(HOSTILE)))
    evidence = Evidence.gather(tmp_path / "out")
    hostile = "".join(HOSTILE)
    source = replace(evidence.manifest.source, origin=hostile)
    text = render(
        replace(evidence, manifest=replace(evidence.manifest, source=source, criterion=hostile, base_model=hostile))
    ).decode()
    assert len(re.findall("<script", text)) == 3 and len(re.findall("</script", text)) == 3
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"<(img|svg|a)\b", outside) and "1337" not in outside


# ---- in a browser


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@needs_browser
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_chart_is_drawn_without_a_word_in_the_console(
    page: Page, out: Path, tmp_path: Path, size: tuple[int, int], dark: bool
) -> None:
    reporting.report(out, tmp_path / "report.html")
    page.open(tmp_path / "report.html", size=size, dark=dark)
    assert page.messages() == []
    charts = page.run(
        "return [...document.querySelectorAll('.chart')].map(c => [c.id, c.querySelectorAll('.main-svg').length])"
    )
    assert len(charts) == 10 and all(count > 0 for _, count in charts), charts
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth"), (
        "nothing is wider than the screen"
    )
    ink, paper = page.run("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
    first = [int(re.findall(r"\d+", colour)[0]) for colour in (ink, paper)]
    assert (first[0] > first[1]) is dark


@needs_browser
def test_experts_can_be_sorted_and_tell_their_values(page: Page, out: Path, evidence: Evidence, tmp_path: Path) -> None:
    reporting.report(out, tmp_path / "report.html")
    page.open(tmp_path / "report.html")
    read = "const c = document.getElementById('chart-saliency'); return [c.data[0].z, c.data[1].z, c.data[0].text, c.data[2].x.length]"
    kept, dropped, texts, crosses = page.run(read)
    saliency = reporting.saliency(evidence)["layers"]
    for row, layer in enumerate(saliency):
        highest = max(layer["score"])
        for expert, number in enumerate(layer["number"]):
            share = pytest.approx(layer["score"][expert] / highest)
            assert (kept[row][expert], dropped[row][expert]) == ((share, None) if number is not None else (None, share))
            assert f"expert {expert}<br>saliency {layer['score'][expert]}" in texts[row][expert]
            assert ("dropped" in texts[row][expert]) == (number is None)
    assert crosses == 3 * (8 - KEEP)
    page.run("document.querySelector('[data-value=score]').click()")
    kept, dropped, texts, _ = page.run(read)
    for row, layer in enumerate(saliency):
        both = [a if a is not None else b for a, b in zip(kept[row], dropped[row], strict=True)]
        assert both == sorted(both, reverse=True)
        assert kept[row][KEEP:] == [None] * (8 - KEEP), "the least salient are the dropped"
        order = [int(re.findall(r"expert (\d+)<br>saliency", text)[0]) for text in texts[row]]
        assert order == sorted(range(8), key=lambda e: -layer["score"][e])
    page.run("document.querySelector('[data-control=coverage] [data-value=choice]').click()")
    shares = page.run("return document.getElementById('chart-coverage').data[0].z.map(row => row.slice(0, -1))")
    assert shares == reporting.coverage(evidence)["shares"]["choice"]
    assert page.messages() == []


@needs_browser
def test_nothing_that_names_hold_runs_and_nothing_is_loaded(page: Page, m2: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(m2, tmp_path / "<img src=x onerror=window.ran=7>"))
    (source / "chat_template.jinja").write_text("{{ 7 * 191 }}<script>window.ran=8</script>")
    tiny.write_json(source / "tokenizer_config.json", {"chat_template": HOSTILE[1]})
    write_output(source, tmp_path / "out", domains=tuple(sorted(HOSTILE)))
    evidence = Evidence.gather(tmp_path / "out")
    hostile = "".join(HOSTILE)
    manifest = replace(
        evidence.manifest,
        base_model=hostile,
        calibration=(hostile, "d" * 64),
        versions={"reapkit": hostile, hostile: "1"},
    )
    names = [replace(part, name=f"{part.name} {hostile}") for part in evidence.inventory.parts]
    inventory = replace(evidence.inventory, architecture=hostile, model_type=hostile, parts=tuple(names))
    file = tmp_path / "report.html"
    file.write_bytes(render(replace(evidence, manifest=manifest, inventory=inventory)))
    page.driver.get_log("performance")  # what the browser's own first page did
    page.open(file)
    shown = [page.hover(chart) for chart in ("chart-saliency", "chart-coverage", "chart-kl", "chart-memory")]
    assert all(shown), shown
    assert any("<script>" in text for text in shown), "a name is shown as it is written"
    page.run("for (const button of document.querySelectorAll('button')) button.click()")
    assert page.run(
        "return window.ran === undefined && document.querySelectorAll('img, iframe, object, embed').length === 0"
    )
    assert (
        page.run(
            "return [...document.querySelectorAll('a')].filter(a => a.getAttribute('href') || a.getAttribute('xlink:href')).length"
        )
        == 0
    )
    assert "1337" not in page.run("return document.body.innerText")
    assert page.messages() == []
    requests = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = [part["params"]["request"]["url"] for part in requests if part["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("file:", "blob:", "data:")) for url in asked), asked


@needs_browser
def test_a_script_that_got_into_the_page_would_not_run(page: Page, out: Path, tmp_path: Path) -> None:
    """The last line of defence, tried: the page's own policy stops what escaping might one day miss."""
    text = render(Evidence.gather(out)).decode()
    file = tmp_path / "report.html"
    file.write_text(text.replace("<main>", "<main><script>window.ran=1</script><img src=x onerror=window.ran=2>"))
    page.open(file)
    assert page.run("return window.ran === undefined")
    told = page.messages()
    assert told and all("Content Security Policy" in message or "ERR_FILE_NOT_FOUND" in message for message in told)
