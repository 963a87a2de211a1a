"""The study's results as one JSON file, a page and its plots: everything that docs/study.md says is worked out here from the cells."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import Any

BASE, CHALLENGERS = "reap", ("reroute residual", "reroute residual-balanced")
MERGERS = ("hc-smoe", "m-smoe", "ream")
SHOWN = {
    "reap": "C0", "reroute residual": "C3", "reroute residual-balanced": "C8", "frequency": "C1", "gated-norm-sum": "C2", "random": "0.5",
    "hc-smoe": "C4", "m-smoe": "C5", "ream": "C6",
}  # fmt: skip
# Two figures are called different where chance alone would have them so far apart, in either direction, with less than this probability.
CHANCE = 0.05
PLOTS = ("study-kl.svg", "study-exact.svg", "study-subspace.svg")


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, and its standard error: what seeds differ by, and what the held-out prompts or texts leave open."""

    value: float
    error: float

    def text(self, digits: int) -> str:
        """The figure; alone where there is one seed and nothing else that it could spread by."""
        return f"{self.value:.{digits}f}" + ("" if math.isnan(self.error) else f" ± {self.error:.{digits}f}")


@dataclass(frozen=True)
class Entry:
    """One method at one ratio and calibration, over its seeds.

    Attributes:
        records: its cells, by seed.
    """

    calibration: str
    method: str
    ratio: str
    records: tuple[Mapping[str, Any], ...]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.records[0]["exact"])

    @property
    def kind(self) -> str:
        return str(self.records[0].get("kind", "original"))

    def exact(self, domain: str | None = None) -> Mean:
        """Share of prompts solved in a domain, or the mean of all domains."""
        by_seed = [share(record, domain) for record in self.records]
        return Mean(fmean(by_seed), math.sqrt(between(by_seed) + self.chance(domain)))

    def chance(self, domain: str | None = None) -> float:
        """The variance of that share that the prompts leave; they are the same for every seed, so it does not shrink with seeds."""
        names = self.domains if domain is None else (domain,)
        chance = 0.0
        for name in names:
            value = fmean(share(record, name) for record in self.records)
            chance += value * (1 - value) / int(self.records[0]["exact"][name]["count"])
        return chance / len(names) ** 2

    def worst(self) -> tuple[str, Mean]:
        """The domain with the smallest share."""
        name = min(self.domains, key=lambda domain: self.exact(domain).value)
        return name, self.exact(name)

    def text(self, measure: str, domain: str = "overall") -> Mean:
        """`kl` or `top1` on held-out text."""
        figures = [record[measure][domain] for record in self.records]
        return mean_of([figure["value"] for figure in figures], [figure["standard_error"] for figure in figures])

    def subspace(self, name: str) -> Mean:
        """A measure of the layers' outputs as a share of the original's."""
        values = [record["subspace"][name] for record in self.records]
        return Mean(fmean(values), math.sqrt(between(values)) if len(values) > 1 else math.nan)

    def replies(self, what: str) -> float:
        """Share of replies that are `looping` or `unended`."""
        total = sum(record["exact"][name]["count"] for record in self.records for name in self.domains)
        return sum(record["exact"][name][what] for record in self.records for name in self.domains) / total


def share(record: Mapping[str, Any], domain: str | None) -> float:
    """Of the prompts of a domain, those solved; without a domain the mean of all."""
    names = record["exact"] if domain is None else (domain,)
    return fmean(record["exact"][name]["right"] / record["exact"][name]["count"] for name in names)


def between(values: Sequence[float]) -> float:
    """The squared standard error of a mean over seeds; 0 of a single one, which shows no spread."""
    return variance(values) / len(values) if len(values) > 1 else 0.0


def mean_of(values: Sequence[float], errors: Sequence[float]) -> Mean:
    return Mean(fmean(values), math.sqrt(between(values) + fmean(error**2 for error in errors)))


class Results:
    """All cells of a study, grouped over seeds.

    Args:
        cells: records, as the study's run writes them.
    """

    def __init__(self, cells: Iterable[Mapping[str, Any]]) -> None:
        grouped: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
        self.not_run: dict[str, str] = {}
        for record in cells:
            if "not_run" in record:
                self.not_run[record["method"]] = record["not_run"]
            else:
                grouped[record["calibration"], record["method"], record["ratio"]].append(record)
        self.entries = {
            key: Entry(*key, tuple(sorted(records, key=lambda record: record["seed"])))
            for key, records in grouped.items()
        }
        self.original = self.entries.pop(("-", "original", "0"))
        self.settings: Mapping[str, Any] = self.original.records[0]["settings"]
        self.ratios = sorted({entry.ratio for entry in self.entries.values()}, key=float)
        self.seeds = sorted({record["seed"] for entry in self.entries.values() for record in entry.records})
        self.calibrations = sorted({entry.calibration for entry in self.entries.values()})

    def at(self, calibration: str, ratio: str) -> list[Entry]:
        """All methods, those of the smallest KL first."""
        found = [entry for entry in self.entries.values() if (entry.calibration, entry.ratio) == (calibration, ratio)]
        return sorted(found, key=lambda entry: entry.text("kl").value)

    def get(self, calibration: str, method: str, ratio: str) -> Entry | None:
        return self.entries.get((calibration, method, ratio))

    @property
    def methods(self) -> list[str]:
        return sorted({entry.method for entry in self.entries.values()})

    @property
    def count(self) -> int:
        return sum(len(entry.records) for entry in self.entries.values())

    @property
    def whole(self) -> int:
        """Cells that are there once every method has run at every ratio on every sample."""
        return len(self.methods) * len(self.ratios) * len(self.calibrations) * len(self.seeds)

    @property
    def is_pilot(self) -> bool:
        is_short = self.settings["prompts"] is not None or self.settings["documents"] is not None
        return is_short or len(self.seeds) < 3 or self.count < self.whole


@dataclass(frozen=True)
class Difference:
    """What one method's figure is above another's, on the same calibration samples.

    Attributes:
        value: mean over seeds.
        error: its standard error.
        freedom: degrees of freedom of that error.
    """

    value: float
    error: float
    freedom: float

    @property
    def is_beyond(self) -> bool:
        """Whether it is beyond what it spreads by: a two-sided t test, since three seeds say little of how much they differ."""
        from scipy.special import ndtri, stdtrit

        level = 1 - CHANCE / 2
        limit = ndtri(level) if math.isinf(self.freedom) else stdtrit(self.freedom, level)
        return bool(abs(self.value) > limit * self.error)


def difference(
    one: Entry, other: Entry, value: Callable[[Mapping[str, Any]], float], *, chance: float = 0.0
) -> Difference | None:
    """What two methods differ by, paired by seed; None where nothing tells how much that spreads.

    Args:
        one: the method whose figure is taken.
        other: the method whose figure is taken from it.
        value: the figure of a cell.
        chance: variance of the difference that no seed shows, such as that of the prompts; its degrees of freedom are many, so the
            whole has those of Welch and Satterthwaite.
    """
    mine, theirs = ({record["seed"]: value(record) for record in entry.records} for entry in (one, other))
    differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    if not differences or (len(differences) == 1 and chance == 0):
        return None
    seeds = between(differences)
    whole = seeds + chance
    freedom = (whole / seeds) ** 2 * (len(differences) - 1) if seeds > 0 else math.inf
    return Difference(fmean(differences), math.sqrt(whole), freedom)


def kl_difference(one: Entry, other: Entry, domain: str = "overall") -> Difference | None:
    """On the same held-out text, whose choice is left out: it is the same for both."""
    return difference(one, other, lambda record: float(record["kl"][domain]["value"]))


def exact_difference(one: Entry, other: Entry, domain: str | None = None) -> Difference | None:
    """Of the share of prompts solved. Which prompts both solve is not kept, so their chance is that of separate prompts: more than it is
    where the same ones are solved."""
    chance = one.chance(domain) + other.chance(domain)
    return difference(one, other, lambda record: share(record, domain), chance=chance)


# ---- the page


def render(cells: Iterable[Mapping[str, Any]] | None, results: Path, docs: Path) -> None:
    """Write the results' file, where cells are given, the page and its plots."""
    if cells is not None:
        save(cells, results)
    found = Results(json.loads(results.read_text(encoding="utf-8"))["cells"])
    draw(found, docs)
    (docs / "study.md").write_text(page(found), encoding="utf-8")


def save(cells: Iterable[Mapping[str, Any]], path: Path) -> None:
    """One line per cell, six digits, without the figures of single layers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    order = sorted(cells, key=lambda cell: (cell["calibration"], float(cell["ratio"]), cell["method"], cell["seed"]))
    lines = [
        json.dumps(rounded({key: value for key, value in cell.items() if key != "subspace_by_layer"})) for cell in order
    ]
    path.write_text('{"cells": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def percent(ratio: str) -> str:
    return f"{100 * float(ratio):g} %"


def page(found: Results) -> str:
    parts = [
        HEAD,
        about(found),
        "## What it shows\n",
        "\n".join(f"- {line}" for line in findings(found)) + "\n",
        FIGURES,
        CHALLENGE,
        challenge_table(found),
    ]
    for calibration in found.calibrations:
        parts += [
            f"## Calibrated on {'code only' if calibration == 'code' else 'all domains'}\n",
            table(found, calibration),
        ]
    parts += [
        "## Prompts solved by domain\n",
        domains_table(found),
        "## KL by domain of text\n",
        text_table(found),
        METHOD,
    ]
    return "\n".join(parts)


HEAD = """# The study: every criterion and merger on one small model

This page and its plots are written by `python benchmarks/study.py render` from `benchmarks/results/study.json`: do not edit it by hand.
[choosing.md](choosing.md) says what to make of it.
"""

FIGURES = """![KL by share removed](study-kl.svg)

![exact match by share removed](study-exact.svg)

![effective rank of the layers' outputs by share removed](study-subspace.svg)
"""

CHALLENGE = """## Re-routed error against REAP

Calibrated on all domains. The last four columns name what differs *beyond the spread*, as said below. Re-routed error was made to halve
REAP's KL; [what was tried where it does not](reroute.md#what-was-tried-to-do-better).
"""

METHOD = """## How it was measured

- **The model**: m2-nano, 31M parameters in the layout of MiniMax-M2: 6 layers of 48 experts, 4 per token, sigmoid router with selection
  bias. A model this small is trained to its capacity: expect it to lose more at the same share than a large one.
- **Exact match**: greedy replies to held-out prompts in float32, at most 24 tokens longer than the longest reference of the domain; code by
  running its tests. *Worst* is the domain that is solved least.
- **Loops**: share of replies that have not ended at that limit and whose end is one block of at most 16 tokens three times over.
- **KL, top-1**: KL(original ‖ compressed) in nats per token and agreement of the likeliest next token, on held-out text of all domains,
  two of which (gsm8k, stdlib) are real text without prompts.
- **The space of outputs**: the covariance of each MoE layer's outputs on that text, in the compressed model's own forward; from its
  eigenvalues l the effective rank (exp of the entropy of l / sum l), the participation ratio ((sum l)² / sum l²) and the spread (sum l).
  Each as a share of the original's, averaged over layers.
- **Standard errors**, after ±, join the spread over calibration seeds with what the held-out prompts or documents leave open. A seed's
  sample is a random share of the same rows, so that two of them have text in common: other text would differ by more.
- **Beyond the spread** is a difference between two methods on the same calibration samples that a t test tells from 0 at 5 %, in
  either direction, not corrected for how many are compared. For KL it counts seeds alone and so holds for this text. For prompts
  solved it counts prompts too, as if each method had got others: a domain that is not named may still be worse.
- Pruned models were not written: the original with the selection biases of dropped experts at minus infinity computes the same. Mergers
  keep the router rows of their groups' centres and were written as checkpoints. Nothing was trained afterwards.
- How long a study takes, and what of it was computed again on another device: `benchmarks/RESULTS.md`.
"""


def about(found: Results) -> str:
    settings = found.settings
    removed = ", ".join(map(percent, found.ratios))
    prompts = {name: found.original.records[0]["exact"][name]["count"] for name in found.original.domains}
    seeds = f"{len(found.seeds)} seed{'s' if len(found.seeds) > 1 else ''}"
    calibrated = " and on ".join("code only" if name == "code" else "all domains" for name in found.calibrations)
    text = (
        f"{found.count} cells: {len(found.methods)} methods, {removed} of the experts removed, calibrated on {calibrated}, "
        f"{seeds} of the calibration sample, each {settings['share']:.0%} of the bundled calibration rows. "
        f"{', '.join(f'{number} prompts of {name}' for name, number in prompts.items())}; run on {settings['device']}.\n"
    )
    if found.is_pilot:
        fewest = min(prompts.values())
        short = [f"{seeds} instead of 3"] if len(found.seeds) < 3 else []
        short += [f"{fewest} prompts per domain instead of 64"] if fewest < 64 else []
        short += [f"{settings['documents']} documents of held-out text instead of all"] if settings["documents"] else []
        short += [f"{found.whole - found.count} of {found.whole} cells missing"] if found.count < found.whole else []
        text = f"**This is a pilot**: {', '.join(short)}. Its order of methods may not hold.\n\n{text}"
    if found.not_run:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(found.not_run.items()))
        text += f"\nNot run: {reasons}\n"
    return text


def table(found: Results, calibration: str) -> str:
    lines = [
        "| removed | method | exact match | worst domain | KL | top-1 | loops | effective rank | participation | spread |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ratio in found.ratios:
        for entry in found.at(calibration, ratio):
            name, worst = entry.worst()
            method = f"{entry.method} (merged)" if entry.kind == "merged" else entry.method
            space = [entry.subspace(measure).text(3) for measure in ("effective_rank", "participation", "spread")]
            figures = [
                entry.exact().text(3), f"{worst.text(3)} {name}", entry.text("kl").text(4), entry.text("top1").text(3),
                f"{entry.replies('looping'):.3f}", *space,
            ]  # fmt: skip
            lines.append(f"| {percent(ratio)} | {method} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def domains_table(found: Results) -> str:
    """Exact match of the original, the default, its challengers and mergers by domain."""
    lines = [
        "| calibrated on | removed | method | " + " | ".join(found.original.domains) + " |",
        "|---|---|---|" + "---|" * len(found.original.domains),
    ]
    cells = " | ".join(found.original.exact(name).text(3) for name in found.original.domains)
    lines.append(f"| - | 0 % | original | {cells} |")
    for calibration in found.calibrations:
        for ratio in found.ratios:
            for method in (BASE, *CHALLENGERS, *MERGERS):
                if (entry := found.get(calibration, method, ratio)) is not None:
                    cells = " | ".join(entry.exact(name).text(3) for name in found.original.domains)
                    lines.append(f"| {calibration} | {percent(ratio)} | {method} | {cells} |")
    return "\n".join(lines) + "\n"


def challenge_table(found: Results) -> str:
    """The default and its challengers: by how much KL is smaller, which domains gain and lose, what does better still."""
    lines = [
        "| removed | method | KL | REAP's | so KL is | exact match | REAP's | solved less | solved more | larger KL on | smaller KL by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for challenger in CHALLENGERS:
        for ratio in found.ratios:
            base, other = found.get("all", BASE, ratio), found.get("all", challenger, ratio)
            if base is None or other is None:
                continue
            factor = base.text("kl").value / other.text("kl").value
            size = f"{factor:.2f} times smaller" if factor >= 1 else f"{1 / factor:.2f} times larger"
            apart = kl_difference(base, other)
            size += "" if apart is None or apart.is_beyond else ", within the spread"
            exact = {name: exact_difference(other, base, name) for name in base.domains}
            text = {name: kl_difference(other, base, name) for name in text_domains(found)}
            ahead = {entry.method: kl_difference(entry, other) for entry in found.at("all", ratio)}
            figures = [
                other.text("kl").text(4), base.text("kl").text(4), size, other.exact().text(3), base.exact().text(3),
                names_of(exact, _is_below), names_of(exact, _is_above), names_of(text, _is_above), names_of(ahead, _is_below),
            ]  # fmt: skip
            lines.append(f"| {percent(ratio)} | {challenger} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def names_of(apart: Mapping[str, Difference | None], holds: Callable[[Difference | None], bool]) -> str:
    return ", ".join(name for name, one in apart.items() if holds(one)) or "none"


def text_domains(found: Results) -> list[str]:
    return [name for name in found.original.records[0]["kl"] if name != "overall"]


def text_table(found: Results) -> str:
    """KL of the default and its challengers by domain of the held-out text."""
    names = text_domains(found)
    lines = [
        "| calibrated on | removed | method | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for calibration in found.calibrations:
        for ratio in found.ratios:
            for method in (BASE, *CHALLENGERS):
                if (entry := found.get(calibration, method, ratio)) is not None:
                    cells = " | ".join(entry.text("kl", name).text(3) for name in names)
                    lines.append(f"| {calibration} | {percent(ratio)} | {method} | {cells} |")
    return "\n".join(lines) + "\n"


def findings(found: Results) -> list[str]:
    """Sentences that follow from the cells, also where the default loses."""
    return [*_best(found), *_default_loses(found), *_samples(found), *_calibration(found), *_subspaces(found)]


def _best(found: Results) -> list[str]:
    lines = []
    for ratio in found.ratios:
        entries = found.at("all", ratio)
        if not entries:
            continue
        names = [entry.method for entry in entries]
        best = max(entries, key=lambda entry: entry.exact().value)
        place = ""
        if base := found.get("all", BASE, ratio):
            more = names_of({entry.method: exact_difference(entry, base) for entry in entries}, _is_above)
            place = f"; REAP is {names.index(BASE) + 1} of {len(names)} by KL; more than REAP, beyond the spread, solve: {more}"
        lines.append(
            f"{percent(ratio)} removed: the smallest KL has {entries[0].method} ({entries[0].text('kl').text(4)}), the best exact match "
            f"{best.method} ({best.exact().text(3)}){place}."
        )
    return lines


def _is_below(apart: Difference | None) -> bool:
    return apart is not None and apart.value < 0 and apart.is_beyond


def _is_above(apart: Difference | None) -> bool:
    return apart is not None and apart.value > 0 and apart.is_beyond


def _default_loses(found: Results) -> list[str]:
    lines = []
    for ratio in found.ratios:
        base = found.get("all", BASE, ratio)
        ahead = [
            f"{entry.method} ({entry.text('kl').text(4)})"
            for entry in found.at("all", ratio)
            if base is not None and entry.method not in CHALLENGERS and _is_below(kl_difference(entry, base))
        ]
        if base is not None and ahead:
            lines.append(
                f"{percent(ratio)} removed: REAP ({base.text('kl').text(4)}) loses by KL, beyond the spread, to {', '.join(ahead)}."
            )
    return lines


def _samples(found: Results) -> list[str]:
    """Where it matters most which sample a method was calibrated on."""
    lines = []
    for method in (BASE, *CHALLENGERS):
        entries = [
            entry for ratio in found.ratios if (entry := found.get("all", method, ratio)) and len(entry.records) > 1
        ]
        shares = [
            (entry, name, [share(record, name) for record in entry.records])
            for entry in entries
            for name in entry.domains
        ]
        if shares:
            entry, name, values = max(shares, key=lambda one: max(one[2]) - min(one[2]))
            lines.append(
                f"{percent(entry.ratio)} removed by {method}: where the calibration sample matters most to it, {name} is solved at "
                f"{', '.join(f'{value:.3f}' for value in values)} by sample."
            )
    return lines


def _calibration(found: Results) -> list[str]:
    lines = []
    for method in (BASE, CHALLENGERS[0]):
        for ratio in found.ratios:
            both, code = found.get("all", method, ratio), found.get("code", method, ratio)
            if both is None or code is None or "python" not in both.domains or ratio not in ("0.25", "0.375"):
                continue
            others = [name for name in both.domains if name != "python"]
            rest = [fmean(entry.exact(name).value for name in others) for entry in (code, both)]
            lines.append(
                f"{percent(ratio)} removed by {method}: calibrated on code only, python is solved at {code.exact('python').text(3)} "
                f"(all domains: {both.exact('python').text(3)}), the other domains at {rest[0]:.3f} ({rest[1]:.3f}), "
                f"KL on text of all domains is {code.text('kl').text(4)} ({both.text('kl').text(4)})."
            )
    return lines


def _subspaces(found: Results) -> list[str]:
    """Whether merging narrows the space of outputs more than pruning to the same size does."""
    lines = []
    for ratio in found.ratios:
        pruned = [entry for entry in found.at("all", ratio) if entry.kind == "pruned"]
        merged = [entry for entry in found.at("all", ratio) if entry.kind == "merged"]
        base = found.get("all", BASE, ratio)
        if not merged or base is None:
            continue
        said = []
        for name, words in (("effective_rank", "effective rank"), ("spread", "spread")):
            ours = [entry.subspace(name).value for entry in pruned]
            below = [entry.method for entry in merged if entry.subspace(name).value < min(ours)]
            figures = ", ".join(f"{entry.method} {entry.subspace(name).text(3)}" for entry in merged)
            said.append(
                f"{words}: REAP {base.subspace(name).text(3)}, pruned models {min(ours):.3f} to {max(ours):.3f}, merged {figures} "
                f"(below every pruned one: {', '.join(below) or 'none'})"
            )
        lines.append(f"{percent(ratio)} removed, shares of the original's outputs: {'; '.join(said)}.")
    return lines


# ---- plots


def draw(found: Results, docs: Path) -> None:
    """Three plots over the share removed, calibrated on all domains: KL, exact match, effective rank; same bytes for the same results."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    matplotlib.rcParams.update({"svg.hashsalt": "reapkit", "svg.fonttype": "none", "font.size": 9})
    measures: tuple[tuple[str, str, Callable[[Entry], Mean], bool], ...] = (
        (PLOTS[0], "KL, nats per token", lambda entry: entry.text("kl"), True),
        (PLOTS[1], "exact match, mean of four domains", lambda entry: entry.exact(), False),
        (
            PLOTS[2],
            "effective rank of layer outputs, share of the original's",
            lambda entry: entry.subspace("effective_rank"),
            False,
        ),
    )
    methods = sorted({entry.method for entry in found.entries.values() if entry.calibration == "all"})
    for file, label, value, is_log in measures:
        figure, axes = plt.subplots(figsize=(8.4, 4.2))
        for method in sorted(methods, key=lambda name: name in SHOWN):
            entries = [entry for ratio in found.ratios if (entry := found.get("all", method, ratio)) is not None]
            at = [100 * float(entry.ratio) for entry in entries]
            figures = [value(entry) for entry in entries]
            is_shown = method in SHOWN
            axes.errorbar(
                at, [mean.value for mean in figures], yerr=[mean.error for mean in figures] if is_shown else None,
                color=SHOWN.get(method, "0.85"), label=method if is_shown else None, linewidth=1.6 if is_shown else 0.8,
                linestyle="--" if method in MERGERS else "-", marker="o" if is_shown else None, markersize=3, capsize=2,
            )  # fmt: skip
        axes.set_xticks([100 * float(ratio) for ratio in found.ratios])
        axes.set_xlabel("experts removed, %")
        axes.set_ylabel(label)
        if is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
        axes.set_title("dashed: merged; grey: other criteria", fontsize=8)
        figure.tight_layout()
        figure.savefig(docs / file, metadata={"Date": None, "Creator": None})
        plt.close(figure)
