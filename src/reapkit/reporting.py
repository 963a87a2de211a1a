"""One page that shows what was compressed and how well it held: self-contained, readable without a network, years later.

What it says comes from the output's folder: manifest, plan, statistics and results. Plotly draws; its script is carried along compressed.
The page forbids itself everything but its own script (a content security policy by digest), since names of domains, tensors and models
come from files that others wrote; Jinja escapes them, and charts get them as data.

Shape suffixes: S = rows of sums, one per (domain, fold); E = experts; D = domains; L = layers.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import itertools
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reapkit import cards, criteria, plans
from reapkit.cards import read_result
from reapkit.checkpoint import EVALUATION_NAME, FIDELITY_NAME, STATISTICS_NAME, refuse_unfinished
from reapkit.clusters import Merging
from reapkit.errors import CheckpointError, DataError, UnsupportedError
from reapkit.evidence import jaccard
from reapkit.inventory import Inventory, inspect
from reapkit.outputs import save
from reapkit.plans import PruningPlan, num_kept
from reapkit.samples import RoutedSamples, SampleHeader, beside
from reapkit.shards import PLAN_NAME, Manifest
from reapkit.statistics import NUM_FOLDS, Array, LayerStatistics, Statistics

# What `report` promises. Plotly's own script takes two thirds of it; the rest holds 60 layers of 384 experts several times.
MAX_BYTES = 3_000_000
# Steps of the share of experts removed, in the plot of what would be kept.
RATIO_STEPS = tuple(f"0.{percent:02d}" for percent in range(0, 100, 5))
FORMULA = {"reap": "mean of gate weight times output norm over the tokens routed to the expert"}


@dataclass(frozen=True)
class Evidence:
    """What lies in an output's folder, and the statistics behind it.

    Attributes:
        out: the folder.
        manifest: what the output says about itself.
        inventory: what it holds.
        statistics: that the plan rests on, None where they are not there.
        fidelity, evaluation: results, None where they were not measured.
        sample: the header of the sampled tokens beside the statistics, None where there are none.
    """

    out: Path
    manifest: Manifest
    inventory: Inventory
    statistics: Statistics | None
    fidelity: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    sample: SampleHeader | None

    @classmethod
    def gather(cls, out: Path, statistics: Path | None = None) -> Evidence:
        """Read an output folder.

        Args:
            out: the folder.
            statistics: their file; by default `reapkit/statistics.safetensors` in the folder, if it is there.

        Raises:
            CheckpointError: not a finished output of reapkit.
            DataError: the statistics are not those that the plan was made from.
        """
        if not out.is_dir():
            raise CheckpointError(f"there is no folder {out}", hint="give the folder that reapkit prune wrote")
        refuse_unfinished(out)
        manifest = Manifest.load(out)
        own = out / STATISTICS_NAME
        path = statistics or (own if own.is_file() else None)
        sums = Statistics.load(path) if path is not None else None
        if sums is not None and path is not None:
            _require_same(sums, manifest, path)
        sample = None if path is None or not beside(path).is_file() else RoutedSamples.open(beside(path)).header
        fidelity, evaluation = read_result(out / FIDELITY_NAME), read_result(out / EVALUATION_NAME)
        return cls(out, manifest, inspect(out, ratios=()), sums, fidelity, evaluation, sample)

    @property
    def name(self) -> str:
        """What people call the source."""
        return self.manifest.base_model or Path(self.manifest.source.origin).name or self.manifest.source.origin

    @property
    def num_kept(self) -> int:
        return self.manifest.after.num_experts

    @cached_property
    def criterion(self) -> str:
        """The criterion whose saliency is shown: the plan's, and REAP where that has none of its own."""
        return self.manifest.criterion if self.manifest.criterion in criteria.CRITERIA else "reap"

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers that were measured and kept, in their order."""
        return (
            tuple(layer for layer in self.statistics.layers if layer in self.manifest.kept) if self.statistics else ()
        )


def report(out: str | Path, path: str | Path, *, statistics: str | Path | None = None, card: bool = False) -> Path:
    """Write the page about an output.

    Args:
        out: the folder that `prune` or `compress` wrote.
        path: the page.
        statistics: their file, where the folder has none of its own.
        card: also bring results into the folder's model card.

    Raises:
        CheckpointError: not a finished output of reapkit.
        DataError: statistics of another plan.
        UnsupportedError: the charting library is not installed.
        OutputError: the page cannot be written.
    """
    page = render(Evidence.gather(Path(out), None if statistics is None else Path(statistics)))
    save(Path(path), page)
    if card:
        cards.refresh(Path(out))
    return Path(path)


def render(evidence: Evidence) -> bytes:
    """The page.

    Raises:
        UnsupportedError: the charting library is not installed, or the page would be larger than it may be.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("reapkit"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.loader.get_source(environment, "report.js")[0] if environment.loader else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    library, library_version = _library()
    charts = _charts(evidence)
    text = environment.get_template("report.html").render(
        evidence=evidence,
        manifest=evidence.manifest,
        charts=charts,
        facts=list(_facts(evidence)),
        tiles=list(_tiles(evidence)),
        scores=None if evidence.evaluation is None else cards.Scores.of(evidence.evaluation),
        fidelity_rows=list(_fidelity_rows(evidence.fidelity)),
        commands=list(_commands(evidence)),
        script=script,
        digest=digest,
        library=library,
        library_version=library_version,
        formula=FORMULA.get(evidence.criterion, evidence.criterion),
        size=size_text,
        figure=cards.figure_text,
    )
    page = text.encode()
    if len(page) > MAX_BYTES:
        raise UnsupportedError(f"the page would take {len(page):,} bytes, and {MAX_BYTES:,} are promised")
    return page


def _library() -> tuple[str, str]:
    """Plotly's script, compressed and in letters, and its version."""
    try:
        from plotly.offline import get_plotlyjs, get_plotlyjs_version
    except ImportError:
        raise UnsupportedError(
            "the report's charts need plotly, which is not installed", hint="pip install 'reapkit[report]'"
        ) from None
    compressed = gzip.compress(get_plotlyjs().encode(), 9, mtime=0)
    return base64.b64encode(compressed).decode(), str(get_plotlyjs_version())


def _require_same(statistics: Statistics, manifest: Manifest, path: Path) -> None:
    digests = {record.digest for record in statistics.calibration}
    if statistics.source.routing != manifest.source.routing or (
        manifest.calibration and digests != set(manifest.calibration)
    ):
        what = "another model" if statistics.source.routing != manifest.source.routing else "other text"
        raise DataError(
            f"{path} was observed on {what} than the plan of this output rests on", hint="give those with --statistics"
        )


# ---- words and numbers of the page ------------------------------------------------------------------------------------------------


def size_text(count: float) -> str:
    """Decimal bytes, as disks and the hub count them."""
    power = min(max(int(math.log10(count)) // 3, 0), 4) if count else 0
    return f"{count / 1000**power:.{2 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _tiles(evidence: Evidence) -> Iterator[tuple[str, str, str]]:
    """Label, number after, and what it was before."""
    before, after = evidence.manifest.before, evidence.manifest.after
    yield "experts per layer", f"{after.num_experts}", f"of {before.num_experts}"
    if before.parameters is not None and after.parameters is not None:
        yield "parameters", _short(after.parameters), f"of {_short(before.parameters)}"
        yield "active per token", _short(evidence.inventory.active_parameters), f"{evidence.inventory.top_k} experts"
    yield "tensors", size_text(after.bytes), f"of {size_text(before.bytes)}"
    if evidence.fidelity is not None:
        kl = evidence.fidelity["overall"]["kl"]
        spread = "" if kl["standard_error"] is None else f"± {kl['standard_error']:.3f} "
        yield "KL to the original", f"{kl['value']:.3f}", f"{spread}nats/token"


def _fidelity_rows(measured: Mapping[str, Any] | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if measured is not None:
        yield from measured["domains"].items()
        yield "all", measured["overall"]


def _short(count: int) -> str:
    power = min(max(int(math.log10(count)) // 3, 0), 4) if count else 0
    return f"{count / 1000**power:.{1 if power else 0}f}{('', 'k', 'M', 'B', 'T')[power]}"


def _facts(evidence: Evidence) -> Iterator[tuple[str, str]]:
    manifest, inventory, statistics = evidence.manifest, evidence.inventory, evidence.statistics
    before, after = manifest.before, manifest.after
    revision = f" at {manifest.source.revision}" if manifest.source.revision else ""
    yield "Source", manifest.source.origin + revision
    if manifest.base_model:
        yield "Base model", manifest.base_model
    yield "Family", f"{inventory.architecture} ({inventory.model_type}), router: {inventory.scoring}"
    share = 1 - after.num_experts / before.num_experts
    yield (
        "Removed" if manifest.merging is None else "Merged away",
        f"{before.num_experts - after.num_experts} of {before.num_experts} experts per layer, {100 * share:.1f} %",
    )
    seed = f", seed {manifest.seed}" if manifest.seed is not None else ""
    if manifest.merging is not None:
        yield "Merging", f"{manifest.merging.method}, router rows: {manifest.merging.router}"
    else:
        yield "Criterion", manifest.criterion + seed
    if before.parameters is not None and after.parameters is not None:
        yield (
            "Parameters",
            f"{before.parameters:,} before, {after.parameters:,} after, {inventory.active_parameters:,} active per token",
        )
    yield "Bytes of tensors", f"{before.bytes:,} before, {after.bytes:,} after"
    yield "Format", inventory.format + (", multiplied out from the source's" if manifest.dequantized else "")
    yield "Layers", f"{inventory.num_layers}, {inventory.moe_layers} of them with experts"
    if inventory.context_length is not None:
        yield "Context length", f"{inventory.context_length:,} tokens"
    for layer, like in manifest.unmeasured.items():
        yield f"MTP layer {layer}", f"not measured; keeps the experts of layer {like}"
    if manifest.drop_mtp:
        yield "MTP layers", "removed"
    if statistics is not None:
        yield "Calibration", f"{statistics.num_tokens:,} tokens, domains {', '.join(statistics.domains)}"
    for digest in manifest.calibration:
        yield "SHA-256 of its tokens", digest
    yield "Versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())


def _commands(evidence: Evidence) -> Iterator[str]:
    """What gives the same output again; `observe` only where the statistics say what it was given."""
    manifest, statistics = evidence.manifest, evidence.statistics
    # A snapshot of the hub's cache that was named by its folder has a revision too, which must not be repeated.
    origin, revision = manifest.source.origin, manifest.source.revision
    source = [origin, *(["--revision", revision] if revision and Path(origin).name != revision else [])]
    without_text = manifest.criterion in (criteria.RANDOM, criteria.AIMER) and not manifest.calibration
    sample = evidence.sample
    is_told = sample is not None or manifest.criterion not in criteria.OF_SAMPLE
    if not without_text and is_told and statistics is not None and len(statistics.calibration) == 1:
        record = statistics.calibration[0]
        text = _text(record.sources, statistics.settings, record.seed)
        sampled = (
            ["--reroute-tokens", str(sample.tokens), "--reroute-candidates", str(sample.candidates)] if sample else []
        )
        yield shlex.join(["reapkit", "observe", *source, *text, *sampled, "-o", "statistics.safetensors"])
    seed = ["--seed", str(manifest.seed)] if manifest.seed is not None else []
    basis = source if without_text else ["statistics.safetensors"]
    keep = ["--keep", str(evidence.num_kept)]
    options = ["--base-model", manifest.base_model] if manifest.base_model else []
    if manifest.drop_mtp:
        options += ["--mtp", "drop"]
    elif manifest.unmeasured:
        options += ["--mtp", f"same-as-layer-{next(iter(manifest.unmeasured.values()))}"]
    if (merging := manifest.merging) is not None:
        how = ["--method", merging.method, *keep, "--router", merging.router]
        yield shlex.join(
            ["reapkit", "merge", *source, "statistics.safetensors", *how, *_measured_on(evidence, merging), "-o", evidence.out.name,
             *options]
        )  # fmt: skip
        return
    path = evidence.out / PLAN_NAME
    chosen = PruningPlan.load(path).options if path.is_file() else {}
    how = [word for name, value in sorted(chosen.items()) for word in (f"--{name}", str(value))]
    yield shlex.join(
        ["reapkit", "plan", *basis, "--criterion", manifest.criterion, *how, *keep, *seed, "-o", "plan.json"]
    )
    options = [*(["--dequantize"] if manifest.dequantized else []), *options]
    yield shlex.join(["reapkit", "prune", *source, "plan.json", "-o", evidence.out.name, *options])


def _text(sources: Iterable[Mapping[str, Any]], settings: Mapping[str, Any], seed: int) -> list[str]:
    """The options that name a text, and how it is run."""
    data = [word for part in sources for word in ("--data", str(part["source"]))]
    return [*data, "--max-length", str(settings["max_length"]), "--dtype", str(settings["dtype"]), "--seed", str(seed)]


def _measured_on(evidence: Evidence, merging: Merging) -> list[str]:
    """The options that name what the similarity of experts was measured on, by its file; without it, where that is the statistics' text."""
    from reapkit.similarity import SIMILARITY_NAME, Similarities

    path = evidence.out / SIMILARITY_NAME
    if path.is_file():
        found = Similarities.load(path)
        text = _text(found.sources, found.settings, found.settings["seed"])
        return [*text, "--tokens", str(found.settings["sample"])]
    text = []
    if (statistics := evidence.statistics) is not None:
        for record in statistics.calibration:
            if record.digest == merging.digest:
                text = _text(record.sources, statistics.settings, record.seed)
    return [*text, "--tokens", str(merging.tokens)]


# ---- numbers of the charts --------------------------------------------------------------------------------------------------------


def _charts(evidence: Evidence) -> dict[str, Any]:
    """What the script draws: plain numbers by chart; a chart without numbers is left out."""
    charts: dict[str, Any] = {"memory": memory(evidence)}
    if evidence.statistics is not None and evidence.layers:
        charts |= {
            "saliency": saliency(evidence),
            "mass": mass(evidence),
            "coverage": coverage(evidence),
            "stability": stability(evidence),
        }
    if evidence.fidelity is not None:
        charts["fidelity"] = fidelity(evidence.fidelity)
    return charts


def saliency(evidence: Evidence) -> dict[str, Any]:
    """By layer: every expert's score, its routed tokens, and its number in the output (null for the dropped)."""
    statistics = _statistics(evidence)
    layers = []
    for layer in evidence.layers:
        sums = statistics.layers[layer]
        number = {expert: rank for rank, expert in enumerate(evidence.manifest.kept[layer])}
        layers.append(
            {
                "layer": layer,
                "score": _rounded(criteria.CRITERIA[evidence.criterion](sums)),
                "routed": [int(count) for count in sums.count_SE.sum(0)],
                "number": [number.get(expert) for expert in range(statistics.num_experts)],
            }
        )
    return {"criterion": evidence.criterion, "layers": layers}


def mass(evidence: Evidence) -> dict[str, Any]:
    """Share of every layer's saliency that stays, by the share of experts removed, and by this output's own choice."""
    statistics = _statistics(evidence)
    scores = criteria.score(statistics.layers, evidence.criterion)
    kept_by_ratio = {}
    for ratio in RATIO_STEPS:
        keep = num_kept(statistics.num_experts, ratio=ratio, num_groups=statistics.num_groups)
        if keep >= statistics.top_k:
            kept_by_ratio[keep] = plans.select(scores, keep=keep, num_groups=statistics.num_groups)
    rows = [
        [_share(scores.score_E[layer], kept[layer]) for layer in evidence.layers] for kept in kept_by_ratio.values()
    ]
    return {
        "criterion": evidence.criterion,
        "layers": list(evidence.layers),
        "kept": list(kept_by_ratio),
        "share": rows,
        "num_experts": statistics.num_experts,
        "chosen": evidence.num_kept,
        "own": [_share(scores.score_E[layer], evidence.manifest.kept[layer]) for layer in evidence.layers],
    }


def coverage(evidence: Evidence) -> dict[str, Any]:
    """By domain and layer: shares of what the domain uses that stay.

    routed: of its token-expert pairs; saliency: of the sum of gate weight x output norm; choice: of the experts that would have been
    kept had the domain been the only text.
    """
    statistics = _statistics(evidence)
    shares: dict[str, list[list[float]]] = {"routed": [], "saliency": [], "choice": []}
    tokens = []
    for domain in range(len(statistics.domains)):
        sums = {layer: criteria.of_domain(statistics.layers[layer], domain) for layer in evidence.layers}
        own = _chosen(statistics, sums, evidence)
        tokens.append(int(sums[evidence.layers[0]].tokens_S.sum()))
        kept = evidence.manifest.kept
        shares["routed"].append([_share(part.count_SE.sum(0), kept[layer]) for layer, part in sums.items()])
        shares["saliency"].append([_share(part.gated_norm_SE.sum(0), kept[layer]) for layer, part in sums.items()])
        shares["choice"].append([len(set(own[layer]) & set(kept[layer])) / evidence.num_kept for layer in sums])
    return {"domains": list(statistics.domains), "tokens": tokens, "layers": list(evidence.layers), "shares": shares}


def stability(evidence: Evidence) -> dict[str, Any]:
    """Jaccard index of kept sets chosen on different parts of the calibration, by layer.

    The four folds of the statistics are parts of a quarter. `apart`: sets from disjoint parts of equal size, which tells how far another
    sample of the same text would choose differently. `whole`: sets from a part against the set from all, which overlaps it. `chance`:
    what two sets drawn at random would have.
    """
    statistics = _statistics(evidence)
    folds = frozenset(range(NUM_FOLDS))
    parts = [frozenset(part) for size in range(1, NUM_FOLDS + 1) for part in itertools.combinations(folds, size)]
    choices: dict[frozenset[int], dict[int, tuple[int, ...]]] = {}
    tokens: dict[frozenset[int], int] = {}
    for part in parts:
        sums = {layer: criteria.of_folds(statistics.layers[layer], sorted(part)) for layer in evidence.layers}
        choices[part] = _chosen(statistics, sums, evidence)
        tokens[part] = int(sums[evidence.layers[0]].tokens_S.sum())

    def by_layer(pairs: Sequence[tuple[frozenset[int], frozenset[int]]]) -> list[list[float]]:
        """[pairs][layers]"""
        return [
            [jaccard(choices[one][layer], choices[other][layer]) for layer in evidence.layers] for one, other in pairs
        ]

    apart, whole = [], []
    for size in (1, 2):
        pairs = [
            (one, other)
            for one, other in itertools.combinations(parts, 2)
            if len(one) == size and len(other) == size and not one & other
        ]
        mean = sum(tokens[one] + tokens[other] for one, other in pairs) / (2 * len(pairs))
        apart.append({"quarters": size, "tokens": round(mean), "jaccard": by_layer(pairs)})
    for size in (1, 2, 3):
        chosen = [part for part in parts if len(part) == size]
        mean = sum(map(tokens.__getitem__, chosen)) / len(chosen)
        whole.append({"quarters": size, "tokens": round(mean), "jaccard": by_layer([(part, folds) for part in chosen])})
    differing = [layer for layer in evidence.layers if choices[folds][layer] != evidence.manifest.kept[layer]]
    return {
        "layers": list(evidence.layers),
        "tokens": tokens[folds],
        "apart": apart,
        "whole": whole,
        "chance": jaccard_by_chance(statistics.num_experts, evidence.num_kept),
        "differing": differing,
    }


def memory(evidence: Evidence) -> dict[str, Any]:
    """Bytes of tensors before and after, in parts where pruning alone changed them."""
    manifest = evidence.manifest
    sizes = {part.name: part.nbytes for part in evidence.inventory.parts}
    if manifest.dequantized or manifest.drop_mtp or "MTP" in sizes:
        return {"parts": [{"name": "tensors", "before": manifest.before.bytes, "after": manifest.after.bytes}]}
    others = {name: size for name, size in sizes.items() if name not in ("experts", "routers")}
    left = manifest.after.bytes - sum(others.values())
    pruned = {
        "name": "experts and their router rows",
        "before": left + manifest.before.bytes - manifest.after.bytes,
        "after": left,
    }
    return {"parts": [pruned, *({"name": name, "before": size, "after": size} for name, size in others.items())]}


def fidelity(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Figures by domain, and by layer where `compare` measured layers."""
    rows = list(_fidelity_rows(measured))
    names = [name for name, _ in rows]
    by_layer: list[dict[str, Any]] = []
    for name, row in rows:
        layers = row.get("layers")
        if layers:
            by_layer.append(
                {
                    "domain": name,
                    "layers": [part["layer"] for part in layers],
                    "output_error": [part["output_error"] for part in layers],
                }
            )
    return {
        "domains": names,
        "kl": [row["kl"] for _, row in rows],
        "top1": [row["top1"] for _, row in rows],
        "tokens": [row["tokens"] for _, row in rows],
        "by_layer": by_layer,
    }


def jaccard_by_chance(num_experts: int, keep: int) -> float:
    """Expected Jaccard index of two sets of `keep` of `num_experts` drawn at random: the overlap is hypergeometric."""
    ways = math.comb(num_experts, keep)
    return sum(
        math.comb(keep, both) * math.comb(num_experts - keep, keep - both) / ways * both / (2 * keep - both)
        for both in range(max(0, 2 * keep - num_experts), keep + 1)
    )


def _chosen(
    statistics: Statistics, sums: Mapping[int, LayerStatistics], evidence: Evidence
) -> dict[int, tuple[int, ...]]:
    scores = criteria.score(sums, evidence.criterion)
    return plans.select(scores, keep=evidence.num_kept, num_groups=statistics.num_groups)


def _share(value_E: Array, kept: Sequence[int]) -> float:
    """The kept experts' share of a sum; of nothing, nothing is lost."""
    total = float(value_E.sum())
    return round(float(value_E[list(kept)].sum()) / total, 6) if total > 0 else 1.0


def _rounded(value_E: Array) -> list[float]:
    """Six digits are more than a plot shows, and keep the page small."""
    return [float(f"{value:.6g}") for value in value_E]


def _statistics(evidence: Evidence) -> Statistics:
    assert evidence.statistics is not None
    return evidence.statistics
