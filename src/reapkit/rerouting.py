"""Gathering what re-routed errors need while a model is observed: which tokens, what routers rank best, what those experts make of them.

The tokens are chosen before the run, by a hash of the seed, their document and their place, so that waves, processes and resumed runs
agree. On each of them the layer's best-ranked experts are run, whether the model chose them or not; what is kept are scores and the
products of outputs. The family's selection rule is held to the model's own choices and coefficients on every one of them.

Of 16 million tokens a sample of 32,768 takes 67 in a micro-batch of 32,768, and these have nearly every expert among their candidates: on a
GPU running them costs what reading all the layer's weights does, and every kernel is one more to be launched beside those of the layer. So
they wait there for those of the next micro-batches. Grouped products in bfloat16 and FP8 give an output the same bits whatever rows are
beside it; where others run, a micro-batch runs by itself, and what sums over a row does so everywhere.

Shape suffixes: N = tokens of a micro-batch laid end to end, M = sampled ones of them, T = all sampled tokens, K = experts per token,
C = candidates, E = experts, G = groups, D = hidden size (domains in `choose_tokens`), U = pairs of candidates, P = pairs.
"""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reapkit.calibration import CalibrationBatch
from reapkit.errors import UnsupportedError, UsageError
from reapkit.experts import RoutedObserver, RoutedPairs, running
from reapkit.layout import MoELayout, tokens_ahead
from reapkit.modules import StreamedModel
from reapkit.samples import SampleWriter
from reapkit.selection import Rule

# Sampled tokens that run at once: 2,048 x 16 candidates are as many pairs as 4,096 tokens have in MiniMax-M2, and their outputs in
# float32 take 0.4 GB. More would fill a GPU little better.
TOKENS_AT_ONCE = 2048
# A domain gets at least this part of an equal share of the sampled tokens, so that small ones are seen too.
LEAST_SHARE = 0.25
# Units in the last place by which scores and coefficients may differ from the model's: it may round in another order.
ROUNDINGS = 4


@dataclass(frozen=True)
class Reroute:
    """How much is gathered.

    Attributes:
        tokens: tokens that are sampled from the calibration, at most.
        candidates: best-ranked experts that are run on each.
    """

    tokens: int
    candidates: int = 16


@dataclass(frozen=True)
class TokenSample:
    """Which tokens are sampled, in the order of the micro-batches and, within one, of places.

    Attributes:
        place_M: per micro-batch, places in it laid end to end; behind_M: tokens that follow in the document.
        first: per micro-batch, the number of the first of its tokens.
        domain_T, fold_T: of the tokens' documents.
        share_T: tokens of the domain per sampled one.
    """

    place_M: tuple[NDArray[np.int64], ...]
    behind_M: tuple[NDArray[np.int64], ...]
    first: tuple[int, ...]
    domain_T: NDArray[np.int64]
    fold_T: NDArray[np.int64]
    share_T: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.domain_T)


def choose_tokens(batches: Sequence[CalibrationBatch], *, tokens: int, seed: int) -> TokenSample:
    """Sample tokens, of every domain in proportion to its length, but at least a quarter of an equal share."""
    hashes, domains, folds, places, behinds, counts = [], [], [], [], [], []
    for batch in batches:
        width = batch.input_ids_BT.shape[1]
        number = 0
        for row, length in enumerate(batch.length_B):
            size = int(length)
            ids = batch.input_ids_BT[row, :size].astype("<i4").tobytes()
            key = hashlib.sha256(f"{seed} {batch.index_B[row]} {batch.domain_B[row]} ".encode() + ids).digest()
            hashes.append(_mixed(np.arange(size, dtype=np.uint64) + np.uint64(int.from_bytes(key[:8], "little"))))
            domains.append(np.full(size, batch.domain_B[row]))
            folds.append(np.full(size, batch.fold_B[row]))
            places.append(row * width + np.arange(size))
            behinds.append(size - 1 - np.arange(size))
            number += size
        counts.append(number)
    hash_A, domain_A, fold_A = np.concatenate(hashes), np.concatenate(domains), np.concatenate(folds)
    place_A, behind_A = np.concatenate(places), np.concatenate(behinds)
    length_D = np.bincount(domain_A)
    quota_D = _quotas(length_D, tokens)
    chosen_A = np.zeros(len(hash_A), dtype=bool)
    for domain, quota in enumerate(quota_D):
        mine = np.flatnonzero(domain_A == domain)
        chosen_A[mine[np.argsort(hash_A[mine], kind="stable")[:quota]]] = True
    stops = np.cumsum(counts)
    cuts = [
        np.flatnonzero(part) + stop - len(part)
        for part, stop in zip(np.split(chosen_A, stops[:-1]), stops, strict=True)
    ]
    firsts = np.concatenate(([0], np.cumsum([len(cut) for cut in cuts])[:-1]))
    chosen = np.flatnonzero(chosen_A)
    share_D = np.divide(length_D, quota_D, out=np.zeros(len(length_D)), where=quota_D > 0)
    return TokenSample(
        tuple(place_A[cut] for cut in cuts),
        tuple(behind_A[cut] for cut in cuts),
        tuple(int(first) for first in firsts),
        domain_A[chosen],
        fold_A[chosen],
        share_D[domain_A[chosen]],
    )


def _quotas(length_D: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    total, present = int(length_D.sum()), int((length_D > 0).sum())
    if tokens >= total:
        return length_D
    least_D = np.minimum(length_D, int(LEAST_SHARE * tokens / present))
    rest = tokens - int(least_D.sum())
    spare_D = length_D - least_D
    quota_D, left_D = np.divmod(spare_D * rest, max(int(spare_D.sum()), 1))
    missing = rest - int(quota_D.sum())
    quota_D[np.argsort(-left_D, kind="stable")[:missing]] += 1
    return least_D + quota_D


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: neighbouring numbers come out unrelated."""
    with np.errstate(over="ignore"):
        mixed = values * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


# ---- the rule


def resolve_rule(layout: MoELayout, config: Any) -> Rule:
    """The family's rule with the numbers of a model's config, transformers' own, which has a value for every entry.

    Raises:
        UnsupportedError: re-routing is not defined by such a rule.
    """
    declared = layout.architecture.selection
    if declared.obstacle is not None:
        raise _refused(layout, declared.obstacle)
    text = config.get_text_config()
    normalise, scaling = declared.normalise, declared.scaling
    rule = Rule(
        layout.num_experts,
        layout.top_k,
        declared.scoring,
        bool(getattr(text, normalise)) if isinstance(normalise, str) else normalise,
        float(getattr(text, scaling)) if isinstance(scaling, str) else scaling,
        declared.epsilon,
        layout.num_groups,
        layout.topk_groups if layout.num_groups > 1 else 1,
        declared.group_best,
    )
    if rule.obstacle is not None:
        raise _refused(layout, rule.obstacle)
    return rule


def _refused(layout: MoELayout, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"re-routed errors cannot be measured for {layout.architecture.name}: {reason}",
        hint="leave out --reroute-tokens, and choose by another criterion",
    )


def scores_of(rule: Rule, logits_NE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """What coefficients are made of, and what experts are chosen by, both float32 [N, E]; groups not yet looked at."""
    logits_NE = logits_NE.float()
    if rule.scoring == "sigmoid":
        score_NE = logits_NE.sigmoid()
        return score_NE, score_NE if bias_E is None else score_NE + bias_E.float().reshape(-1)
    return (logits_NE - logits_NE.amax(-1, keepdim=True)).exp(), logits_NE


def limit_to_groups(rule: Rule, choice_NE: Tensor) -> Tensor:
    """Scores with those in groups that may not be chosen from at minus infinity."""
    if rule.num_groups == 1:
        return choice_NE
    grouped = choice_NE.view(len(choice_NE), rule.num_groups, -1)
    score_NG = grouped.topk(rule.group_best, dim=-1).values.sum(-1)
    allowed = torch.zeros_like(score_NG, dtype=torch.bool).scatter(
        1, score_NG.topk(rule.topk_groups, dim=-1).indices, True
    )
    return torch.where(allowed.unsqueeze(-1), grouped, -torch.inf).view_as(choice_NE)


def coefficients(rule: Rule, score_NK: Tensor) -> Tensor:
    """What the chosen experts' outputs are multiplied with, from their scores."""
    if rule.normalise:
        score_NK = score_NK / (score_NK.sum(-1, keepdim=True) + rule.epsilon)
    return score_NK * rule.scaling


def route(
    rule: Rule, logits_NE: Tensor, bias_E: Tensor | None = None, *, kept: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """The whole rule, restricted to kept experts: their numbers and coefficients, [N, K], by falling rank."""
    score_NE, choice_NE = scores_of(rule, logits_NE, bias_E)
    if kept is not None:
        dropped = sorted(set(range(rule.num_experts)) - set(kept))
        choice_NE = choice_NE.index_fill(
            -1, torch.tensor(dropped, dtype=torch.long, device=choice_NE.device), -torch.inf
        )
    expert_NK = limit_to_groups(rule, choice_NE).topk(rule.top_k, dim=-1).indices
    return expert_NK, coefficients(rule, score_NE.gather(1, expert_NK))


# ---- the run


class _Seen(threading.local):
    """What the running forward has passed on its way into the experts of a layer; it is not suspended in between."""

    logits: Tensor | None = None
    stream: Tensor | None = None
    # Sampled tokens of a layer that has not ended: where what is measured goes, their stream before, their places.
    begun: tuple[_Measured, Tensor, Tensor] | None = None


_seen = _Seen()
# Of a micro-batch's sampled tokens in a layer, by the name in the file; parts to be put one after the other.
_Measured = dict[str, list[Tensor]]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Sampled tokens of one micro-batch whose candidates have not run.

    Attributes:
        hidden_MD: the experts' input.
        logits_ME: the router's.
        expert_MK, gate_MK: the model's own choices and coefficients.
        done: where what is measured goes.
    """

    hidden_MD: Tensor
    logits_ME: Tensor
    expert_MK: Tensor
    gate_MK: Tensor
    done: _Measured


@dataclass(frozen=True)
class _Router:
    """Where a layer's router and what belongs to it are found, in the model: owner and name, since values come and go."""

    bias: tuple[nn.Module, str] | None
    expert_scale: tuple[nn.Module, str] | None


class RerouteRecorder:
    """Records sampled tokens layer by layer while a model is observed.

    Args:
        model: the model.
        batches: all micro-batches of the calibration.
        reroute: how much is gathered.
        seed: of the choice of tokens.
    """

    def __init__(
        self, model: StreamedModel, batches: Sequence[CalibrationBatch], reroute: Reroute, *, seed: int
    ) -> None:
        layout = model.layout
        self.rule = resolve_rule(layout, model.module.config)
        if reroute.candidates < min(self.rule.top_k + 1, self.rule.num_experts):
            raise UsageError(
                f"--reroute-candidates {reroute.candidates} are too few: each token is routed to {self.rule.top_k} experts already",
                hint=f"--reroute-candidates {min(2 * self.rule.top_k, self.rule.num_experts)}",
            )
        self.candidates = min(reroute.candidates, self.rule.num_experts)
        self.sample = choose_tokens(batches, tokens=reroute.tokens, seed=seed)
        self.layers = layout.layer_indices + (layout.mtp_indices if model.mtp is not None else ())
        self._model = model
        self._routers: dict[int, _Router] = {}
        self._done: dict[int, dict[int, _Measured]] = {index: {} for index in self.layers}
        self._waiting: list[_Waiting] = []
        self._waits = model.kernels is not None and model.dtype == torch.bfloat16
        self._wrong = torch.zeros((), dtype=torch.int64, device=model.device)
        rows, columns = torch.triu_indices(self.candidates, self.candidates)
        self._upper = (rows.to(model.device), columns.to(model.device))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts, routers and the norms in front of them show what passes them."""
        hooks = []
        try:
            for index in self.layers:
                hooks += self._watch(index)
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _watch(self, index: int) -> list[Any]:
        layout, model = self._model.layout, self._model
        selection = layout.architecture.selection
        if index < layout.num_layers:
            module, layer, in_memory = model.module, model.layers[index], model.in_memory_name
        else:
            assert model.mtp is not None
            module, in_memory = model.mtp.module, model.mtp.in_memory_name
            layer = module.layers[index - layout.num_layers]
        found: dict[str, tuple[nn.Module, str]] = {}
        for name, (at, stacked) in layout.stacked_of.items():
            if at == index and stacked.role in ("router", "bias"):
                path, _, leaf = in_memory(name).rpartition(".")
                is_scale = selection.expert_scale is not None and name.endswith(selection.expert_scale)
                what: str = "scale" if is_scale else stacked.role if leaf != "bias" else "router bias"
                found[what] = (module.get_submodule(path), leaf)
        norm = next((part for name, part in layer.named_modules() if name.rpartition(".")[2] == selection.stream), None)
        if "router" not in found or norm is None:
            what = "router" if "router" not in found else f"norm {selection.stream!r}"
            raise _refused(layout, f"layer {index} has no {what} where it is declared")
        self._routers[index] = _Router(found.get("bias"), found.get("scale"))
        hooks = [
            found["router"][0].register_forward_hook(_note_logits),
            norm.register_forward_pre_hook(_note_stream),
        ]
        return hooks if index >= layout.num_layers else [*hooks, layer.register_forward_hook(_note_turn)]

    def observer(self, number: int, observe: RoutedObserver, *, is_last: bool) -> RoutedObserver:
        """What one micro-batch's forward shows its routed pairs to, in front of another observer.

        Args:
            number: of the micro-batch.
            observe: the other observer.
            is_last: whether no other micro-batch passes a layer after this one, before its weights are gone.
        """
        # Copied before any forward runs: a copy from pageable memory would first wait for all that the device has to do.
        place_M = {
            ahead: torch.from_numpy(self.sample.place_M[number][self._has_next(number, ahead)]).to(self._model.device)
            for ahead in set(map(self._ahead, self.layers))
        }

        def record(pairs: RoutedPairs) -> None:
            observe(pairs)
            if pairs.layer in self._routers:
                self._record(number, pairs, place_M[self._ahead(pairs.layer)])
                if is_last:
                    self._run_waiting(pairs)

        return record

    def _ahead(self, layer: int) -> int:
        return tokens_ahead(layer, self._model.layout.num_layers)

    def _has_next(self, number: int, ahead: int) -> NDArray[np.bool_]:
        """Which of a micro-batch's sampled tokens have so many after them, [M]."""
        return self.sample.behind_M[number] >= ahead

    def _record(self, number: int, pairs: RoutedPairs, place_M: Tensor) -> None:
        logits, stream = _seen.logits, _seen.stream
        _seen.logits = _seen.stream = _seen.begun = None
        num_tokens = len(pairs.expert_NK)
        if logits is None or stream is None or logits.numel() != num_tokens * self.rule.num_experts:
            raise _refused(self._model.layout, f"the router of layer {pairs.layer} does not show its logits")
        if not len(place_M):
            return
        done = self._done[pairs.layer][number] = defaultdict(list)
        logits_NE = logits.reshape(num_tokens, -1)
        for place in torch.split(place_M, TOKENS_AT_ONCE):
            waiting = sum(len(others.logits_ME) for others in self._waiting)
            if not self._waits or waiting + len(place) > TOKENS_AT_ONCE:
                self._run_waiting(pairs)
            choices = pairs.expert_NK[place], pairs.gate_NK[place]
            self._waiting.append(_Waiting(pairs.hidden_ND[place], logits_NE[place], *choices, done))
        stream_MD = stream.reshape(num_tokens, -1)[place_M]
        if pairs.layer < self._model.layout.num_layers:
            _seen.begun = (done, stream_MD, place_M)
        else:  # what comes after an MTP layer is not seen
            done["stream_sq"] = [stream_MD.float().square().sum(-1)]
            done["turn"] = [torch.ones_like(done["stream_sq"][0])]

    def _run_waiting(self, pairs: RoutedPairs) -> None:
        """Measure the waiting tokens, all of the layer in which `pairs` are."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        hidden_MD, logits_ME, expert_MK, gate_MK = (
            torch.cat([getattr(part, name) for part in waiting])
            for name in ("hidden_MD", "logits_ME", "expert_MK", "gate_MK")
        )
        router = self._routers[pairs.layer]
        bias_E = None if router.bias is None else getattr(*router.bias)
        scale_E = None if router.expert_scale is None else getattr(*router.expert_scale).float()
        score_ME, choice_ME = scores_of(self.rule, logits_ME, bias_E)
        rounding = ROUNDINGS * torch.finfo(logits_ME.dtype).eps
        self._wrong += self._count_wrong(score_ME, choice_ME, expert_MK, gate_MK, scale_E, rounding)
        expert_MC = self._rank(choice_ME, expert_MK)
        expert_P, order_P = torch.sort(expert_MC.reshape(-1), stable=True)
        out_PD = pairs.compute(hidden_MD, order_P // self.candidates, expert_P)
        out = torch.empty_like(out_PD)
        out[order_P] = out_PD
        measured = {"expert": expert_MC.to(torch.int16), "score": score_ME.gather(1, expert_MC)}
        if self.rule.num_groups > 1:
            measured["choice"] = choice_ME
        sizes = [len(part.logits_ME) for part in waiting]
        for name, values in measured.items():
            for part, own in zip(waiting, torch.split(values, sizes), strict=True):
                part.done[name].append(own)
        out_MCD = out.view(*expert_MC.shape, -1)
        if scale_E is not None:
            out_MCD = out_MCD.float() * scale_E[expert_MC].unsqueeze(-1)
        for part, own_MCD in zip(waiting, torch.split(out_MCD, sizes), strict=True):
            wide_MCD = own_MCD.float()
            gram_MCC = torch.bmm(wide_MCD, wide_MCD.transpose(1, 2))
            part.done["gram"].append(gram_MCC[:, *self._upper])

    def _count_wrong(
        self,
        score_ME: Tensor,
        choice_ME: Tensor,
        expert_MK: Tensor,
        gate_MK: Tensor,
        scale_E: Tensor | None,
        rounding: float,
    ) -> Tensor:
        """Tokens for which the rule does not give the model's choices and coefficients, ties and the rounding of logits and gates aside."""
        limited_ME = limit_to_groups(self.rule, choice_ME)
        # Theirs are the best where none of the others is better than the worst of them.
        least_M = limited_ME.gather(1, expert_MK).amin(-1)
        best_other_M = limited_ME.scatter(1, expert_MK, -torch.inf).amax(-1)
        is_other_M = best_other_M - least_M > rounding * best_other_M.abs().clamp(min=1)
        own_MK = coefficients(self.rule, score_ME.gather(1, expert_MK))
        if scale_E is not None:
            own_MK = own_MK * scale_E[expert_MK]
        rounding = max(rounding, ROUNDINGS * torch.finfo(gate_MK.dtype).eps)
        gate_MK = gate_MK.float()
        is_other_M |= ((own_MK - gate_MK).abs() > rounding * gate_MK.abs().amax(-1, keepdim=True)).any(-1)
        return is_other_M.sum()

    def _rank(self, choice_ME: Tensor, chosen_MK: Tensor) -> Tensor:
        """The candidates, the model's choices and the best of the others, [M, C] by falling rank."""
        order_MK = choice_ME.gather(1, chosen_MK).argsort(dim=-1, descending=True, stable=True)
        chosen_MK = chosen_MK.gather(1, order_MK)
        others_ME = choice_ME.scatter(1, chosen_MK, -torch.inf)
        next_MC = others_ME.topk(self.candidates - self.rule.top_k, dim=-1).indices
        expert_MC = torch.cat((chosen_MK, next_MC), dim=-1)
        if self.rule.num_groups == 1:
            return expert_MC
        by_rank_MC = choice_ME.gather(1, expert_MC).argsort(dim=-1, descending=True, stable=True)
        return expert_MC.gather(1, by_rank_MC)

    def flush(self, layer: int, writer: SampleWriter) -> None:
        """Write what micro-batches left in a layer; waits for the device.

        Raises:
            UnsupportedError: the family's rule is not the model's.
        """
        if layer not in self._done:
            return
        if wrong := int(self._wrong):
            raise _refused(
                self._model.layout,
                "the declared selection rule does not give the experts and coefficients that the model's own router chose for "
                f"{wrong:,} tokens of layer {layer}",
            )
        done, self._done[layer] = self._done[layer], {}
        for number, parts in done.items():
            is_measured_M = self._has_next(number, self._ahead(layer))
            for part, values in parts.items():
                measured = torch.cat(values).cpu().numpy()
                if not is_measured_M.all():
                    whole = np.zeros((len(is_measured_M), *measured.shape[1:]), dtype=measured.dtype)
                    whole[is_measured_M] = measured
                    measured = whole
                writer.write(f"layers.{layer}.{part}", self.sample.first[number], measured)

    def begin(self, writer: SampleWriter) -> None:
        """Write what does not depend on the model."""
        for name, values in (
            ("domain", self.sample.domain_T),
            ("fold", self.sample.fold_T),
            ("share", self.sample.share_T),
        ):
            writer.write(name, 0, values)


def _note_logits(router: nn.Module, args: Any, output: Any) -> None:
    # transformers' routers return their logits first.
    _seen.logits = output if isinstance(output, Tensor) else output[0]


def _note_turn(layer: nn.Module, args: Any, output: Any) -> None:
    if _seen.begun is None:
        return
    (done, before_MD, place_M), _seen.begun = _seen.begun, None
    after_BTD = output if isinstance(output, Tensor) else output[0]
    after_ND = after_BTD.reshape(-1, after_BTD.shape[-1])
    turns = _turns if running.kernels is None else running.kernels.turns
    for name, values_M in zip(("stream_sq", "turn"), turns(before_MD, after_ND, place_M), strict=True):
        done[name] = [values_M]


def _turns(before_MD: Tensor, after_ND: Tensor, place_M: Tensor) -> tuple[Tensor, Tensor]:
    """The squared length of rows before, and one minus their cosine to those after, float32 [M]."""
    before_MD, after_MD = before_MD.float(), after_ND[place_M].float()
    return before_MD.square().sum(-1), 1 - nn.functional.cosine_similarity(before_MD, after_MD, dim=-1)


def _note_stream(norm: nn.Module, args: Any) -> None:
    _seen.stream = args[0]
