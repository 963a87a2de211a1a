"""Which experts stay: small, reviewable, and bound to one checkpoint by fingerprint.

Shape suffixes: E = experts.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from reapkit import criteria, hub, outputs
from reapkit import layout as layouts
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint
from reapkit.criteria import Blend, Scores
from reapkit.elimination import WEIGHTS, Elimination, check_weights, easy_ep, eliminate, token_weights
from reapkit.errors import CheckpointError, DataError, PlanError, UsageError, require_used
from reapkit.layout import Identity, MoELayout
from reapkit.progress import Progress, silent
from reapkit.samples import RoutedSamples, beside
from reapkit.statistics import Statistics, differing
from reapkit.tensors import (
    MAX_JSON_BYTES,
    MAX_NUMBER,
    as_count,
    as_flag,
    as_list,
    as_table,
    as_text,
    brief,
    parse_json,
    read_layers,
)

FORMAT = "reapkit-plan-1"
# Where a repository holds a plan: alone, as `plan --publish` puts it, or beside the checkpoint that it left.
PUBLISHED_PLANS = ("plan.json", "reapkit/plan.json")
PUBLISHED_STATISTICS = ("statistics.safetensors", "reapkit/statistics.safetensors")
MTP_POLICIES = "same-as-last, same-as-layer-N or drop"


@dataclass(frozen=True)
class PruningPlan:
    """The experts that stay, layer by layer.

    Attributes:
        source: the checkpoint.
        criterion: how they were chosen.
        num_experts: experts per layer before pruning.
        top_k: experts that each token is routed to.
        kept: by layer number, the kept experts' original numbers, ascending; equally many in every layer.
        unmeasured: MTP layers, which calibration never runs, with the layer whose kept set each of them took.
        drop_mtp: whether all MTP layers are to be removed; then none is in `kept`.
        calibration: digests of the text that the choice rests on.
        seed: of the random criterion, else None.
        options: what else decided, by name: the weights of tokens, the blend of domains, what was protected, of what the number of
            kept experts had to be a multiple.
    """

    source: Identity
    criterion: str
    num_experts: int
    top_k: int
    kept: Mapping[int, tuple[int, ...]]
    unmeasured: Mapping[int, int] = field(default_factory=dict)
    drop_mtp: bool = False
    calibration: tuple[str, ...] = ()
    seed: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {len(experts) for experts in self.kept.values()}
        if len(sizes) != 1 or sizes == {0}:
            raise PlanError(f"a plan keeps equally many experts in every layer, and this one keeps {sorted(sizes)}")
        for layer, experts in self.kept.items():
            if beyond := [expert for expert in experts if not 0 <= expert < self.num_experts]:
                raise PlanError(
                    f"layer {layer} of the plan keeps the expert {beyond[0]}, and there are {self.num_experts}",
                    hint=f"experts are numbered from 0 to {self.num_experts - 1}",
                )
            if list(experts) != sorted(set(experts)):
                odd = next(after for before, after in itertools.pairwise(experts) if after <= before)
                raise PlanError(
                    f"layer {layer} of the plan lists the expert {odd} twice or out of order",
                    hint="list every kept expert once, in ascending order",
                )
        for layer, measured in self.unmeasured.items():
            if measured in self.unmeasured or layer not in self.kept or self.kept[layer] != self.kept.get(measured):
                raise PlanError(f"layer {layer} of the plan does not keep the experts of layer {measured}, as it says")
        _require_top_k(self.num_kept, self.num_experts, self.top_k)

    @property
    def num_kept(self) -> int:
        """Experts per layer that stay, K."""
        return len(next(iter(self.kept.values())))

    def dropped(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer that go."""
        kept = set(self.kept[layer])
        return tuple(expert for expert in range(self.num_experts) if expert not in kept)

    def for_layout(self, layout: MoELayout, policy: str | None = None) -> PruningPlan:
        """The plan for a checkpoint that may have MTP layers of which the plan knows nothing, or lack those that it knows.

        Raises:
            UsageError: as `with_mtp`.
        """
        absent = {layer for layer in self.kept if layer >= layout.num_layers} - set(layout.mtp_indices)
        unmeasured = {layer: like for layer, like in self.unmeasured.items() if layer not in absent}
        kept = {layer: experts for layer, experts in self.kept.items() if layer not in absent}
        plan = replace(self, kept=kept, unmeasured=unmeasured) if absent and kept else self
        return plan if absent and policy == "drop" else plan.with_mtp(layout.mtp_indices, policy)

    def with_mtp(self, layers: Sequence[int], policy: str | None = None) -> PruningPlan:
        """The plan with MTP layers provided for.

        Args:
            layers: the MTP layers with experts on disk.
            policy: one of `MTP_POLICIES`; None takes what the plan says of them, and the kept set of the last measured layer for those
                of which it says nothing.

        Raises:
            UsageError: an unknown policy, a layer that the plan does not know, or a policy where there are no MTP layers.
        """
        match = re.fullmatch(r"same-as-last|drop|same-as-layer[-= ](\d+)", policy or "same-as-last")
        if match is None:
            raise UsageError(f"--mtp {policy!r} is not one of: {MTP_POLICIES}", hint="--mtp same-as-last")
        if policy is None:
            if self.drop_mtp or set(layers) <= self.kept.keys():
                return self
            layers = [layer for layer in layers if layer not in self.kept]
        elif not layers:
            raise UsageError(f"--mtp {policy}: the checkpoint has no MTP layers with experts", hint="leave out --mtp")
        kept = {layer: experts for layer, experts in self.kept.items() if layer not in layers}
        unmeasured = {layer: like for layer, like in self.unmeasured.items() if layer not in layers}
        if policy == "drop":
            return replace(self, kept=kept, unmeasured={}, drop_mtp=True)
        measured = kept.keys() - unmeasured.keys()
        if not measured:
            raise PlanError("the plan has no layer of its own choice whose experts the MTP layers could keep")
        like = int(match[1]) if match[1] else max(measured)
        if like not in measured:
            raise UsageError(
                f"--mtp {policy}: layer {like} has no experts of its own choice in the plan",
                hint=f"layers that have: {', '.join(map(str, sorted(measured)))}",
            )
        taken = dict.fromkeys(layers, like)
        return replace(
            self, kept=kept | dict.fromkeys(layers, kept[like]), unmeasured=unmeasured | taken, drop_mtp=False
        )

    def require_fits(self, layout: MoELayout, found: Identity) -> None:
        """Raise PlanError unless the plan was made for this checkpoint, or for a sibling of it in another format."""
        self._require_revision(found)
        if (what := self.source.differing(found, siblings=True)) is not None:
            name = {"routers": "routing"}.get(what, what)
            revision = f" at {self.source.revision[:12]}" if self.source.revision else ""
            raise PlanError(
                f"the plan is for {self.source.origin}{revision} ({what} {getattr(self.source, name)[:12]}), and this checkpoint has "
                f"other {what} ({getattr(found, name)[:12]})",
                hint="make a plan from statistics of this checkpoint",
            )
        if self.num_experts != layout.num_experts:
            raise PlanError(
                f"the plan is for {self.num_experts} experts per layer, and the checkpoint has {layout.num_experts}"
            )
        expected = {*layout.layer_indices, *(() if self.drop_mtp else layout.mtp_indices)}
        if apart := sorted(set(self.kept) ^ expected):
            what = "the plan" if apart[0] in self.kept else "the checkpoint"
            raise PlanError(f"the MoE layer {apart[0]} is only in {what} ({len(apart)} such layers)")
        _require_top_k(self.num_kept, layout.num_experts, layout.top_k)
        require_groups(layout, self.num_kept)
        size = layout.num_experts // layout.num_groups
        for layer, experts in self.kept.items():
            counts = np.bincount(np.asarray(experts) // size, minlength=layout.num_groups)
            if counts.min() != counts.max():
                raise PlanError(
                    f"layer {layer} of the plan keeps {counts.min()} to {counts.max()} experts per router group, and routers with "
                    "groups need equally many in each",
                    hint=f"keep {self.num_kept // layout.num_groups} in each of the {layout.num_groups} groups",
                )

    def _require_revision(self, found: Identity) -> None:
        """Raise PlanError for another revision of the repository that the plan names, and say what tells the two apart."""
        if (moved := self.source.moved(found)) is not None:
            raise PlanError(
                f"the plan is for {moved}",
                hint=f"--revision {self.source.revision}, or leave --revision out: the plan's is taken; "
                "where the hub has it no more, the folder of a download is held to fingerprints alone",
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "source": asdict(self.source),
            "criterion": self.criterion,
            "seed": self.seed,
            "options": dict(self.options),
            "calibration": list(self.calibration),
            "num_experts": self.num_experts,
            "num_kept": self.num_kept,
            "top_k": self.top_k,
            "unmeasured": {str(layer): like for layer, like in self.unmeasured.items()},
            "drop_mtp": self.drop_mtp,
            "kept": {str(layer): list(experts) for layer, experts in self.kept.items()},
        }

    def save(self, path: Path) -> None:
        """Write as JSON, one line per layer, so that two plans can be compared with diff."""
        described = self.to_json()
        kept = described.pop("kept")
        head = json.dumps(described, indent=2)[: -len("\n}")]
        lines = ",\n".join(f'    "{layer}": {json.dumps(experts)}' for layer, experts in kept.items())
        text = f'{head},\n  "kept": {{\n{lines}\n  }}\n}}\n'
        outputs.save(path, text.encode())

    @classmethod
    def load(cls, source: str | Path) -> PruningPlan:
        """Read what `save` wrote, or a person edited, or what somebody published as `hub://ORG/NAME[@REVISION]`.

        Raises:
            PlanError: missing, not a plan, or inconsistent.
            HubError: the hub does not give it.
        """
        path = Path(source)
        if str(source).startswith(hub.SCHEME):
            found = fetch(str(source), PUBLISHED_PLANS)
            if found is None:
                raise PlanError(
                    f"{source} holds no plan: neither {' nor '.join(PUBLISHED_PLANS)}",
                    hint="reapkit plan --publish puts one there",
                )
            path = found
        if not path.is_file():
            raise PlanError(f"there is no plan {path}", hint="make one with reapkit plan")
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise PlanError(f"{path} has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
        try:
            described = parse_json(path.read_bytes(), origin=str(path))
        except CheckpointError as error:
            raise PlanError(error.message, hint="make one with reapkit plan") from None
        return cls.from_json(described, origin=str(path))

    @classmethod
    def from_json(cls, described: Mapping[str, Any], *, origin: str) -> PruningPlan:
        """The plan in a parsed JSON object."""
        known = {"format", "source", "criterion", "seed", "options", "calibration", "num_experts", "num_kept", "top_k", "unmeasured",
                 "drop_mtp", "kept"}  # fmt: skip
        if described.get("format") != FORMAT:
            raise PlanError(f"{origin} is not a plan of reapkit", hint="make one with reapkit plan")
        if unknown := sorted(described.keys() - known):
            raise PlanError(f"{origin} has the unknown entry {unknown[0]!r}")
        try:
            kept = {layer: tuple(as_list(experts)) for layer, experts in read_layers(described["kept"])}
            if odd := [expert for experts in kept.values() for expert in experts if type(expert) is not int]:
                raise ValueError(f"{brief(odd[0])} is not the number of an expert")
            seed = described["seed"]
            plan = cls(
                source=Identity.from_json(described["source"]),
                criterion=as_text(described["criterion"]),
                num_experts=as_count(described["num_experts"], least=1),
                top_k=as_count(described["top_k"], least=1),
                kept=kept,
                unmeasured={layer: as_count(like) for layer, like in read_layers(described["unmeasured"])},
                drop_mtp=as_flag(described["drop_mtp"]),
                calibration=tuple(map(as_text, as_list(described["calibration"]))),
                seed=seed if seed is None else as_count(seed, least=-MAX_NUMBER),
                options={as_text(key): as_text(value) for key, value in as_table(described.get("options", {})).items()},
            )
            stated = as_count(described["num_kept"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{origin} is not a whole plan: {type(error).__name__} {error}") from None
        if plan.num_kept != stated:
            raise PlanError(f"{origin} says it keeps {stated} experts a layer and lists {plan.num_kept}")
        return plan


def fetch(source: str, names: Sequence[str]) -> Path | None:
    """The first of some files that a repository holds, fetched whole; None where it holds none of them."""
    name, revision = hub.parse(source)
    repository = hub.find(name, revision=revision)
    found = next((file for file in names if file in repository.files), None)
    return None if found is None else hub.snapshot(repository, [found]) / found


def num_kept(
    num_experts: int,
    *,
    ratio: str | float | None = None,
    keep: int | None = None,
    num_groups: int = 1,
    divisible_by: int = 1,
) -> int:
    """Experts that stay per layer: `keep`, or E - floor(E x ratio) with the ratio read as a decimal, so that 100 x 0.29 is 29.

    Rounded up to a multiple of the router's groups, and of `divisible_by`, the cards that will share whole experts.

    Raises:
        UsageError: neither or both given, or a value out of range.
        PlanError: no multiple lies between that and all experts.
    """
    if (ratio is None) == (keep is None):
        raise UsageError("give either --ratio or --keep", hint="for example --ratio 0.25")
    if keep is None:
        try:
            decimal = Decimal(str(ratio))
        except InvalidOperation:
            raise UsageError(f"--ratio {ratio!r} is not a number", hint="for example --ratio 0.25") from None
        if not decimal.is_finite() or not 0 <= decimal < 1:
            raise UsageError(f"--ratio {ratio} is not a share of the experts to remove", hint="0.25 removes a quarter")
        keep = num_experts - math.floor(num_experts * decimal)
    if not 1 <= keep <= num_experts:
        raise UsageError(f"--keep {keep} is not between 1 and the {num_experts} experts of a layer")
    if divisible_by < 1:
        raise UsageError(f"--divisible-by {divisible_by} is no number of cards", hint="--divisible-by 1 or more")
    step = math.lcm(num_groups, divisible_by)
    rounded = math.ceil(keep / step) * step
    if rounded > num_experts and divisible_by > 1:
        groups = f" and by the router's {num_groups} groups" if num_groups > 1 else ""
        raise PlanError(
            f"no number of experts from {keep} to {num_experts} divides by {divisible_by}{groups}",
            hint=f"the next below is {num_experts // step * step}: --keep {num_experts // step * step}"
            if num_experts >= step
            else None,
        )
    return min(num_experts, rounded)


def require_target(
    layout: MoELayout, *, criterion: str, ratio: str | float | None, keep: int | None, divisible_by: int = 1
) -> int:
    """The number of experts that would stay, refused before anything is observed.

    Raises:
        UsageError: an unknown criterion, neither or both of ratio and keep.
        PlanError: fewer would stay than each token is routed to, or no multiple is small enough.
    """
    criteria.check(criterion)
    count = num_kept(
        layout.num_experts, ratio=ratio, keep=keep, num_groups=layout.num_groups, divisible_by=divisible_by
    )
    _require_top_k(count, layout.num_experts, layout.top_k)
    require_groups(layout, count)
    return count


def require_groups(layout: MoELayout, count: int) -> None:
    """Raise PlanError where the groups that a token may choose from would hold fewer experts than it is routed to.

    Groups are compared by the sum of their two best scores in DeepSeek-V3 and its kin, so two must stay in each.
    """
    if layout.num_groups == 1:
        return
    least = max(2, math.ceil(layout.top_k / layout.topk_groups))
    if count // layout.num_groups < least:
        raise PlanError(
            f"keeping {count} experts leaves {count // layout.num_groups} in each of {layout.num_groups} router groups, and "
            f"{least} are needed: a token takes {layout.top_k} from {layout.topk_groups} groups",
            hint=f"keep at least {least * layout.num_groups}",
        )


def _require_top_k(count: int, num_experts: int, top_k: int) -> None:
    if count < top_k:
        # Rounded down, so that the ratio named is one that works.
        largest = math.floor((num_experts - top_k) / num_experts * 1000) / 1000
        raise PlanError(
            f"keeping {count} of {num_experts} experts is fewer than the {top_k} that each token is routed to",
            hint=f"keep at least {top_k}: --ratio {largest} or less",
        )


def select(scores: Scores, *, keep: int, num_groups: int = 1) -> dict[int, tuple[int, ...]]:
    """The `keep` experts of highest score in every layer, equally many in each group; ties keep the lower expert number."""
    per_group, rest = divmod(keep, num_groups)
    if rest:
        raise PlanError(f"{keep} experts do not divide into {num_groups} equal groups")
    kept = {}
    for layer, score_E in scores.score_E.items():
        grouped = score_E.reshape(num_groups, -1)
        size = grouped.shape[1]
        # lexsort is stable and sorts by its last key first: by falling score, then by rising number.
        best = [np.lexsort((np.arange(size), -group))[:per_group] + start * size for start, group in enumerate(grouped)]
        kept[layer] = tuple(int(expert) for expert in np.sort(np.concatenate(best)))
    return kept


@dataclass(frozen=True)
class Choice:
    """A plan with what it was chosen from.

    Attributes:
        plan: the kept experts.
        scores: of every expert.
        statistics: what the scores rest on; None for the random criterion on a checkpoint.
        eliminations: by layer, in which order experts went and what that cost, under the criterion `reroute`.
    """

    plan: PruningPlan
    scores: Scores
    statistics: Statistics | None
    eliminations: Mapping[int, Elimination] = field(default_factory=dict)

    @property
    def super_dropped(self) -> dict[int, tuple[int, ...]]:
        """By layer, experts with extreme outputs (`criteria.super_experts`) that the plan drops."""
        if self.statistics is None:
            return {}
        found = criteria.super_experts(self.statistics.layers)
        dropped = {
            layer: tuple(expert for expert in experts if expert not in self.plan.kept[layer])
            for layer, experts in found.items()
            if layer in self.plan.kept
        }
        return {layer: experts for layer, experts in dropped.items() if experts}


def choose(
    source: Statistics | str | Path,
    *,
    criterion: str = "reap",
    ratio: str | float | None = None,
    keep: int | None = None,
    divisible_by: int = 1,
    weights: str = "residual",
    blend: str | None = None,
    protect: str | None = None,
    sample: Path | None = None,
    seed: int = 0,
    revision: str | None = None,
    progress: Progress = silent,
) -> Choice:
    """Choose the experts that stay.

    Args:
        source: statistics, their file or `hub://ORG/NAME` where they were published; the criterion `random` also takes a checkpoint.
        criterion: a name in `criteria.CRITERIA` or `criteria.OTHERS`.
        ratio: share of the experts to remove, read as a decimal; or
        keep: number of experts to keep per layer.
        divisible_by: round what stays up to a multiple of this, the number of cards that will share whole experts.
        weights: of tokens, under `reroute`: a name in `elimination.WEIGHTS`.
        blend: how domains count: `uniform`, `max-min` or weights like `code=2,math=1`; None as they are long.
        protect: `super` keeps experts with extreme outputs.
        sample: the sample of tokens that `reroute` needs; by default beside the statistics' file.
        seed: of the criterion `random`.
        revision: of a hub id.
        progress: told how far it is.

    Raises:
        UsageError: an unknown criterion, neither or both of ratio and keep.
        PlanError: fewer experts would stay than each token is routed to, or no multiple is small enough.
        DataError: the sample of tokens is missing, damaged or another observation's.
    """
    criteria.check(criterion)
    check_weights(weights)
    if isinstance(source, str) and source.startswith(hub.SCHEME):
        source = fetch(source, PUBLISHED_STATISTICS) or source
    if criterion == criteria.AIMER:
        raise UsageError(
            "the criterion 'aimer' scores weights, and not statistics", hint="reapkit plan SRC --criterion aimer"
        )
    settings = {"blend": blend, "protect": protect, "revision": revision}
    given = {name for name, value in settings.items() if value is not None}
    given |= {"weights"} if weights != WEIGHTS[0] else set()
    criteria.require_used(criterion, given)
    if not isinstance(source, Statistics) and (Path(source).is_dir() or Path(source).suffix != ".safetensors"):
        if criterion != criteria.RANDOM:
            raise UsageError(
                f"the criterion {criterion!r} needs statistics, and {source} is not a statistics file",
                hint="first: reapkit observe SRC --data … -o statistics.safetensors",
            )
        require_used(given, criteria.ON_CHECKPOINTS, f"--criterion {criterion} on a checkpoint")
        checkpoint = Checkpoint.open(source, revision=revision, progress=progress)
        layout = layouts.resolve(checkpoint, ARCHITECTURES)
        return choose_for_checkpoint(checkpoint, layout, ratio=ratio, keep=keep, divisible_by=divisible_by, seed=seed)
    require_used(given, criteria.ON_STATISTICS, f"--criterion {criterion} on statistics")
    statistics = source if isinstance(source, Statistics) else Statistics.load(Path(source))
    num_experts, num_groups = statistics.num_experts, statistics.num_groups
    count = num_kept(num_experts, ratio=ratio, keep=keep, num_groups=num_groups, divisible_by=divisible_by)
    _require_top_k(count, num_experts, statistics.top_k)
    mixed = None if blend is None else Blend.parse(blend, statistics.domains)
    protected = _protected(statistics, protect)
    eliminations: Mapping[int, Elimination] = {}
    if criterion == criteria.RANDOM:
        scores = criteria.score_at_random(tuple(statistics.layers), num_experts, seed=seed)
    elif criterion in criteria.OF_SAMPLE:
        if sample is None:
            if isinstance(source, Statistics):
                raise UsageError(f"the criterion {criterion!r} needs the sample of tokens beside the statistics' file")
            sample = beside(Path(source))
        found = open_sample(sample, statistics)
    if criterion == criteria.EASY_EP:
        scores = score_sampled(found, mixed)
    elif criterion == criteria.REROUTE:
        eliminations = _eliminate(found, weights, mixed, keep=count, protected=protected, progress=progress)
        scores = Scores(criterion, {index: _ranks(went, num_experts) for index, went in eliminations.items()})
    elif criterion != criteria.RANDOM:
        scores = score_blended(statistics, criterion, mixed)
    options = {"weights": weights} if criterion == criteria.REROUTE else {}
    options |= {} if blend is None else {"blend": blend}
    options |= {} if protect is None else {"protect": protect}
    options |= _rounding(divisible_by)
    chosen = PruningPlan(
        source=statistics.source,
        criterion=criterion,
        num_experts=num_experts,
        top_k=statistics.top_k,
        kept=select(_raised(scores, protected), keep=count, num_groups=num_groups),
        calibration=tuple(record.digest for record in statistics.calibration),
        seed=seed if criterion == criteria.RANDOM else None,
        options=options,
    )
    return Choice(chosen.with_mtp(statistics.unobserved), scores, statistics, eliminations)


def score_blended(statistics: Statistics, criterion: str, blend: Blend | None) -> Scores:
    """Scores of every layer under a criterion of sums, with domains blended."""
    layers, domains = statistics.layers, range(len(statistics.domains))
    if blend is None:
        return criteria.score(layers, criterion)
    if blend.share_D is not None:
        share_D = blend.share_D
        return criteria.score(
            {index: criteria.blend_sums(layer, share_D) for index, layer in layers.items()}, criterion
        )
    parts = [
        criteria.score({index: criteria.of_domain(layer, domain) for index, layer in layers.items()}, criterion)
        for domain in domains
    ]
    ranks = {
        index: criteria.rank_by_worst(
            np.stack([part.score_E[index] for part in parts]), num_groups=statistics.num_groups
        )
        for index in layers
    }
    return Scores(criterion, ranks)


def score_sampled(sample: RoutedSamples, blend: Blend | None, *, folds: tuple[int, ...] | None = None) -> Scores:
    """Scores of every layer by the criterion `easy-ep`.

    Raises:
        UsageError: the blend `max-min`, which it has not.
    """
    if blend is not None and blend.share_D is None:
        raise UsageError("--blend max-min is not there for the criterion 'easy-ep'", hint="--blend uniform")
    share_D = None if blend is None else blend.share_D
    return Scores(
        criteria.EASY_EP, {index: easy_ep(sample.layer(index, folds=folds), share_D) for index in sample.layers}
    )


def _protected(statistics: Statistics, protect: str | None) -> dict[int, tuple[int, ...]]:
    require_protection(protect)
    return {} if protect is None else criteria.super_experts(statistics.layers)


def require_protection(protect: str | None) -> None:
    """Raise UsageError for anything but `super` or nothing."""
    if protect not in (None, "super"):
        raise UsageError(f"--protect {protect!r} is not known", hint="--protect super")


def _raised(scores: Scores, protected: Mapping[int, Sequence[int]]) -> Scores:
    """Scores under which protected experts stay before all others."""
    raised = {index: score_E.copy() for index, score_E in scores.score_E.items()}
    for index, experts in protected.items():
        raised[index][list(experts)] = np.inf
    return Scores(scores.criterion, raised)


def open_sample(path: Path, statistics: Statistics) -> RoutedSamples:
    """The sample of tokens that was gathered with these statistics.

    Raises:
        DataError: missing, damaged, or of another model, text or settings.
    """
    sample = RoutedSamples.open(path)
    header = sample.header
    what = differing(statistics.source, statistics.settings, header.source, header.settings)
    if what is None and [record.digest for record in statistics.calibration] != [header.digest]:
        what = "text"
    if what is not None:
        raise DataError(
            f"the sample of tokens {path} was gathered on another model, text or settings: other {what}",
            hint="observe both together, with --reroute-tokens",
        )
    return sample


def _eliminate(
    sample: RoutedSamples,
    weights: str,
    blend: Blend | None,
    *,
    keep: int,
    protected: Mapping[int, Sequence[int]],
    progress: Progress,
) -> dict[int, Elimination]:
    found = {}
    for number, index in enumerate(sample.layers, start=1):
        layer = sample.layer(index)
        weight_T = token_weights(layer, weights, None if blend is None else blend.share_D)
        found[index] = eliminate(
            layer,
            weight_T,
            keep=keep,
            worst_domain=blend is not None and blend.share_D is None,
            protected=protected.get(index, ()),
        )
        progress("plan", number, len(sample.layers), "layers")
    return found


def _ranks(found: Elimination, num_experts: int) -> np.ndarray[Any, Any]:
    """A score: the step at which an expert went, and more than any for those that stay."""
    score_E = np.full(num_experts, float(len(found.order)))
    score_E[list(found.order)] = np.arange(len(found.order))
    return score_E


def plan(
    source: Statistics | str | Path,
    *,
    criterion: str = "reap",
    ratio: str | float | None = None,
    keep: int | None = None,
    divisible_by: int = 1,
    weights: str = "residual",
    blend: str | None = None,
    protect: str | None = None,
    sample: Path | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> PruningPlan:
    """The plan of `choose`, which also gives the scores behind it."""
    return choose(
        source,
        criterion=criterion,
        ratio=ratio,
        keep=keep,
        divisible_by=divisible_by,
        weights=weights,
        blend=blend,
        protect=protect,
        sample=sample,
        seed=seed,
        revision=revision,
    ).plan


def _rounding(divisible_by: int) -> dict[str, str]:
    return {"divisible-by": str(divisible_by)} if divisible_by > 1 else {}


def choose_for_checkpoint(
    checkpoint: Checkpoint,
    layout: MoELayout,
    *,
    ratio: str | float | None = None,
    keep: int | None = None,
    divisible_by: int = 1,
    seed: int = 0,
    scores: Scores | None = None,
) -> Choice:
    """Choose by scores that need a checkpoint alone, by default those of the criterion `random`."""
    is_random = scores is None
    if scores is None:
        scores = criteria.score_at_random(layout.layer_indices, layout.num_experts, seed=seed)
    count = num_kept(
        layout.num_experts, ratio=ratio, keep=keep, num_groups=layout.num_groups, divisible_by=divisible_by
    )
    chosen = PruningPlan(
        source=Identity.of(checkpoint, layout),
        criterion=scores.criterion,
        num_experts=layout.num_experts,
        top_k=layout.top_k,
        kept=select(scores, keep=count, num_groups=layout.num_groups),
        seed=seed if is_random else None,
        options=_rounding(divisible_by),
    )
    return Choice(chosen.with_mtp(layout.mtp_indices), scores, None)


@dataclass(frozen=True)
class LayerLoss:
    """What a plan gives up in one layer.

    Attributes:
        layer: its number.
        saliency_lost: the dropped experts' share of the layer's total score, from 0 to 1; None under `reroute`, whose scores are ranks.
        predicted_error: the re-routed error, as a share of the layer's own output; None under other criteria.
        short: the share of sampled tokens whose candidates ran out; likewise.
        routed_lost: the share of routed token-expert pairs that went to dropped experts; None without statistics.
        never_routed: experts that no calibration token was routed to.
    """

    layer: int
    saliency_lost: float | None
    routed_lost: float | None
    never_routed: tuple[int, ...]
    predicted_error: float | None = None
    short: float | None = None


def losses(choice: Choice) -> list[LayerLoss]:
    """What a choice gives up, layer by layer."""
    plan, scores, statistics = choice.plan, choice.scores, choice.statistics
    result = []
    for layer, score_E in scores.score_E.items():
        if layer not in plan.kept:  # an MTP layer that is removed
            continue
        dropped = list(plan.dropped(layer))
        never: tuple[int, ...] = ()
        routed = None
        if statistics is not None:
            count_E = statistics.layers[layer].count_SE.sum(0)
            never = tuple(int(expert) for expert in np.flatnonzero(count_E == 0))
            routed = _share(count_E, dropped)
        if (found := choice.eliminations.get(layer)) is None:
            result.append(LayerLoss(layer, _share(score_E, dropped), routed, never))
        else:
            error, short = (found.error[-1], found.short[-1]) if found.order else (0.0, 0.0)
            result.append(LayerLoss(layer, None, routed, never, error, short))
    return result


def _share(values_E: np.ndarray[Any, Any], chosen: Sequence[int]) -> float:
    total = float(values_E.sum())
    return float(values_E[list(chosen)].sum()) / total if total > 0 else 0.0
