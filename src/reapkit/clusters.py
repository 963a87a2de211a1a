"""Merging baselines: which experts of a layer become one, and with which weights; pure functions of one layer's sums.

They are here to be compared with pruning, as the papers do. What each paper leaves open, or what a checkpoint with fewer experts cannot
express, is decided in the docstring of its method.

Shape suffixes: E = experts, D = hidden size, N = sampled tokens, S = rows of sums, C = experts of one router group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from reapkit.criteria import reap
from reapkit.errors import PlanError, UsageError, did_you_mean
from reapkit.statistics import Array, LayerStatistics
from reapkit.tensors import as_count, as_list, as_table, as_text, brief, read_layers

# REAM's group size C: the paper's, and the released code's default.
MAX_GROUP = 16

Alignment = Literal["weights", "activations and weights"]
ROUTERS = ("average", "centre")


@dataclass(frozen=True)
class Similarity:
    """What merging needs to know of one layer beyond its statistics: every expert run on every token of a sample.

    Attributes:
        tokens: size of the sample.
        output_ED: mean output f_j(x) over the sample.
        gated_ED: mean of s_j(x) f_j(x), s the model's score function (sigmoid or softmax over all experts) of the router's logits.
        gram_EE: sum over the sample of the products of two experts' router logits.
        inputs_ND: some of the experts' inputs, evenly spaced over the sample.
    """

    tokens: int
    output_ED: Array
    gated_ED: Array
    gram_EE: Array
    inputs_ND: np.ndarray[Any, np.dtype[np.float32]]

    def part(self, experts: slice) -> Similarity:
        """The same of some of the experts."""
        return Similarity(
            self.tokens, self.output_ED[experts], self.gated_ED[experts], self.gram_EE[experts, experts], self.inputs_ND
        )


@dataclass(frozen=True)
class Group:
    """Experts that become one.

    Attributes:
        members: their numbers, the centre's first; it gives the merged expert its place and the order of its neurons.
        weights: their shares in the average, in the order of the members; they add up to 1.
    """

    members: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def centre(self) -> int:
        return self.members[0]

    @classmethod
    def from_json(cls, described: Any) -> Group:
        """Raise KeyError or ValueError unless there is a share for every member, and they add up to 1."""
        members, weights = (as_list(as_table(described)[name]) for name in ("members", "weights"))
        shares = tuple(weight for weight in weights if type(weight) is float and 0 <= weight <= 1)
        is_whole = len(shares) == len(weights) == len(members) and math.isclose(math.fsum(shares), 1, rel_tol=1e-9)
        if not is_whole:
            raise ValueError(f"{brief(described)} is no group of experts with a share for each")
        return cls(tuple(map(as_count, members)), shares)


@dataclass(frozen=True)
class Method:
    """One way to merge.

    Attributes:
        group: from one layer's statistics, its similarity and the number of groups to lists of members, the centre's first.
        weigh: from the statistics to every expert's weight before it is normalised within the group.
        alignment: by what the neurons of members are matched to the centre's before averaging; None averages them as they lie.
        router: how the group's router row and selection bias come from those of its members, unless asked for otherwise.
    """

    group: Callable[[LayerStatistics, Similarity, int], list[list[int]]]
    weigh: Callable[[LayerStatistics], Array]
    alignment: Alignment | None
    router: str


@dataclass(frozen=True)
class Merging:
    """What becomes of every merged layer.

    Attributes:
        method: a name in `METHODS`.
        router: `average`, the weighted average of the members' rows and selection biases, or `centre`, the centre's own.
        groups: by layer, equally many, by rising number of their centres, which is the order of the merged experts.
        tokens: size of the sample on which similarity was measured.
        digest: of the text from which it was taken.
        alignment: SHA-256 of the file with the neurons' orders; empty before it is written.
    """

    method: str
    router: str
    groups: Mapping[int, tuple[Group, ...]]
    tokens: int
    digest: str
    alignment: str = ""

    @property
    def kept(self) -> dict[int, tuple[int, ...]]:
        """By layer, the centres."""
        return {layer: tuple(group.centre for group in groups) for layer, groups in self.groups.items()}

    @classmethod
    def from_json(cls, described: Any) -> Merging:
        """Read what `dataclasses.asdict` gave, through JSON.

        Raises:
            KeyError, ValueError: it is damaged.
        """
        entries = as_table(described)
        method, router = as_text(entries["method"]), as_text(entries["router"])
        groups = {
            layer: tuple(map(Group.from_json, as_list(groups))) for layer, groups in read_layers(entries["groups"])
        }
        for layer, held in groups.items():
            members = sorted(member for group in held for member in group.members)
            if not members or members != list(range(len(members))):
                raise ValueError(f"the groups of layer {layer} do not hold every expert once")
        if method not in METHODS or router not in ROUTERS:
            raise ValueError(f"experts are not merged by {brief(method)} with routers by {brief(router)}")
        return cls(
            method=method,
            router=router,
            groups=groups,
            tokens=as_count(entries["tokens"]),
            digest=as_text(entries["digest"]),
            alignment=as_text(entries["alignment"]),
        )


def merge_layer(
    method: Method, layer: LayerStatistics, similarity: Similarity, *, keep: int, num_groups: int = 1
) -> tuple[Group, ...]:
    """The groups of one layer, equally many in each group of the router.

    Weights are normalised within a group; where all are 0, members count the same.
    """
    num_experts = layer.count_SE.shape[1]
    size, per_group = num_experts // num_groups, keep // num_groups
    weight_E = method.weigh(layer)
    found: list[Group] = []
    for start in range(0, num_experts, size):
        part = slice(start, start + size)
        for members in method.group(_experts_of(layer, part), similarity.part(part), per_group):
            numbers = [start + member for member in members]
            share = weight_E[numbers]
            share = share / share.sum() if share.sum() > 0 else np.full(len(numbers), 1 / len(numbers))
            found.append(Group(tuple(int(number) for number in numbers), tuple(float(value) for value in share)))
    return tuple(sorted(found, key=lambda group: group.centre))


def hierarchical(layer: LayerStatistics, similarity: Similarity, keep: int) -> list[list[int]]:
    """HC-SMoE (Chen et al., arXiv 2410.08589): average linkage on the Euclidean distances of mean outputs; frequency-weighted average.

    The mean output is over all sampled tokens, whatever they were routed to, as in the paper; neurons are averaged as they lie. There the
    router keeps its rows and several of them point to one expert. A smaller checkpoint has one row a group: the centre is the member
    closest to the mean of the members' outputs, as in the released code for REAM, which has this baseline.
    """
    output_CD = similarity.output_ED
    square_C = (output_CD**2).sum(1)
    distance_CC = np.sqrt(np.maximum(square_C[:, None] - 2 * output_CD @ output_CD.T + square_C[None], 0.0))
    clusters = average_linkage(distance_CC, keep)
    ordered = []
    for members in clusters:
        away = np.linalg.norm(output_CD[members] - output_CD[members].mean(0), axis=1)
        centre = members[int(np.argmin(away))]
        ordered.append([centre, *(member for member in members if member != centre)])
    return ordered


def average_linkage(distance_CC: Array, count: int) -> list[list[int]]:
    """Merge the two clusters whose members are closest on average until `count` are left; of equals those with the lowest numbers."""
    clusters = [[member] for member in range(len(distance_CC))]
    between = distance_CC.astype(np.float64).copy()
    np.fill_diagonal(between, np.inf)
    while len(clusters) > count:
        first, second = sorted(divmod(int(np.argmin(between)), len(clusters)))
        a, b = len(clusters[first]), len(clusters[second])
        # The mean over all pairs of the union, from the means over the pairs of both.
        joined = (a * between[first] + b * between[second]) / (a + b)
        between[first], between[:, first] = joined, joined
        between[first, first] = np.inf
        between = np.delete(np.delete(between, second, 0), second, 1)
        clusters[first] = sorted(clusters[first] + clusters.pop(second))
    return clusters


def dominant(layer: LayerStatistics, similarity: Similarity, keep: int) -> list[list[int]]:
    """M-SMoE (Li et al., arXiv 2310.01334): the most frequent experts are dominant, every other one joins the dominant expert whose router
    logits are most similar to its own (cosine over the sampled tokens); neurons are matched to the dominant expert's by their weights;
    frequency-weighted average.

    The paper ranks frequencies over all layers, so that layers keep different numbers of experts; a checkpoint has one number for all
    layers, so it is a ranking per layer here. There, too, the router keeps its rows.
    """
    order = _falling(layer.count_SE.sum(0))
    similar_CC = _cosine(similarity.gram_EE)
    centres = sorted(int(expert) for expert in order[:keep])
    groups = {centre: [centre] for centre in centres}
    for expert in range(len(order)):
        if expert not in groups:
            groups[centres[int(np.argmax(similar_CC[expert, centres]))]].append(expert)
    return list(groups.values())


def pseudo_prune(layer: LayerStatistics, similarity: Similarity, keep: int) -> list[list[int]]:
    """REAM (Jha et al., arXiv 2604.04356): the experts of highest REAP saliency are centres; in falling order of it, each takes the experts
    most similar to it until its group has 16, so that most centres stay alone; neurons matched by activations and weights;
    saliency-weighted average; the router keeps the centres' rows.

    Similarity is the mean of two: (1 + cosine) / 2 of mean gated outputs, and of router logits 1 - d / 2, with d the distance of both
    profiles over the sampled tokens when each has length 1. Gates are the model's own scores, sigmoid or softmax. The released code goes
    through the layers one by one on already merged inputs; here all layers see the original's inputs. Experts that were never routed
    to weigh as much as the least salient of the others, as there.
    """
    saliency_C = _ream_weight(layer)
    outputs = (1 + _cosine(similarity.gated_ED @ similarity.gated_ED.T)) / 2
    logits = 1 - np.sqrt(np.maximum(2 - 2 * _cosine(similarity.gram_EE), 0.0)) / 2
    similar_CC = (outputs + logits) / 2
    centres = [int(expert) for expert in _falling(saliency_C)[:keep]]
    num_experts = len(saliency_C)
    if keep * MAX_GROUP < num_experts:
        raise PlanError(
            f"{keep} groups of at most {MAX_GROUP} experts do not hold {num_experts}",
            hint=f"keep at least {-(-num_experts // MAX_GROUP)}",
        )
    free = set(range(num_experts)) - set(centres)
    groups = []
    for centre in centres:
        nearest = sorted(free, key=lambda expert: (-similar_CC[centre, expert], expert))[: MAX_GROUP - 1]
        free -= set(nearest)
        groups.append([centre, *nearest])
    return groups


def _frequency(layer: LayerStatistics) -> Array:
    total_E: Array = layer.count_SE.sum(0)
    return total_E


def _ream_weight(layer: LayerStatistics) -> Array:
    saliency_E = reap(layer)
    least = saliency_E[saliency_E > 0]
    return np.where(saliency_E > 0, saliency_E, least.min() if len(least) else 1.0)


METHODS: Mapping[str, Method] = {
    "hc-smoe": Method(hierarchical, _frequency, None, "centre"),
    "m-smoe": Method(dominant, _frequency, "weights", "centre"),
    "ream": Method(pseudo_prune, _ream_weight, "activations and weights", "centre"),
}


def method_of(name: str, router: str | None = None) -> Method:
    """The method of a name.

    Raises:
        UsageError: an unknown method, or an unknown way with routers.
    """
    if name not in METHODS:
        raise UsageError(f"there is no method {name!r}", hint=did_you_mean(name, METHODS))
    if router is not None and router not in ROUTERS:
        raise UsageError(f"--router {router!r} is not one of: {', '.join(ROUTERS)}", hint=did_you_mean(router, ROUTERS))
    return METHODS[name]


def _experts_of(layer: LayerStatistics, experts: slice) -> LayerStatistics:
    return LayerStatistics(
        **{
            name: values if name == "tokens_S" else values[..., experts]
            for name, values in vars(layer).items()
            if isinstance(values, np.ndarray)
        }
    )


def _falling(score_E: Array) -> Sequence[int]:
    """Numbers by falling score; of equals the lower number first."""
    return [int(expert) for expert in np.lexsort((np.arange(len(score_E)), -score_E))]


def _cosine(gram_EE: Array) -> Array:
    """Cosines from products; 0 with a profile that is 0 throughout."""
    length_E = np.sqrt(np.diag(gram_EE))
    product_EE = np.outer(length_E, length_E)
    cosine: Array = np.divide(gram_EE, product_EE, out=np.zeros_like(gram_EE), where=product_EE > 0)
    return np.clip(cosine, -1.0, 1.0)
