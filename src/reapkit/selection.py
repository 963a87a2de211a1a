"""How routers choose experts and weigh them: declared per family, resolved against a model, free of any array library.

`rerouting` applies a rule to a model's own logits on the device and holds it to the model's own choices; `elimination` applies it to what
was measured. Both restrict it to kept experts, which is what pruning a router does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Scoring = Literal["sigmoid", "softmax"]


@dataclass(frozen=True)
class Selection:
    """A family's rule as declared in the table of architectures: data only.

    Scores are a function of the router's logits; the best `top_k` of score plus selection bias are chosen, within the best groups where
    there are groups; each is weighed by its score, divided by the sum over the chosen where that is renormalised, times a factor.

    Attributes:
        scoring: what makes scores of logits.
        normalise: whether scores are divided by their sum over the chosen; or the name of the config's entry that says so.
        scaling: the factor; or the name of the config's entry.
        epsilon: what is added to that sum.
        group_best: a group is scored by the sum of so many of its best scores.
        expert_scale: the end of the name of a factor per expert.
        stream: the norm whose input is the residual stream that the layer's output is added to.
        obstacle: why re-routing is not defined by such a rule; then nothing else matters.
    """

    scoring: Scoring
    normalise: bool | str = True
    scaling: float | str = 1.0
    epsilon: float = 0.0
    group_best: int = 2
    expert_scale: str | None = None
    stream: str = "post_attention_layernorm"
    obstacle: str | None = None


@dataclass(frozen=True)
class Rule:
    """A rule with all its numbers.

    Attributes:
        num_experts, top_k: of a layer; num_groups, topk_groups: 1 and 1 where there are no groups.
        scoring, normalise, scaling, epsilon, group_best: as in `Selection`.
    """

    num_experts: int
    top_k: int
    scoring: Scoring
    normalise: bool
    scaling: float
    epsilon: float
    num_groups: int = 1
    topk_groups: int = 1
    group_best: int = 2

    @property
    def obstacle(self) -> str | None:
        """Why removing an expert would change tokens that are not routed to it; None where it does not."""
        if self.scoring == "softmax" and not self.normalise:
            return "its softmax runs over all experts and is not renormalised over the chosen, so removing any changes every token"
        return None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
