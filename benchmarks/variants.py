"""What was tried so that re-routed error halves REAP's KL on the bundled model, and what each came to: `variants.py`.

Every variant removes experts one by one, always the one whose removal adds least to an error over the same calibration tokens; they
differ in that error. With f_j(t) the outputs of a token's best-ranked experts, y(t) the layer's output and y_K(t) that of a router
restricted to the kept set K, the sum over tokens and layers of

- `reroute`: ‖y_K - y‖² / ‖h‖², the criterion that reapkit has, and `reroute balanced`: every domain the same mass;
- `fisher`: the mean of (g · (y_K - y))² over gradients g of the log-likelihood of tokens drawn from the model's own predictions, with
  respect to the layer's output: what all later layers make of the error, to second order, which is what KL is;
- `sensitivity`: ‖y_K - y‖² times the mean ‖g‖², which is the same without directions;
- `sequential`: as `reroute`, but a layer is chosen on what the layers before it give once they are pruned;
- `feedback`: as `sequential`, and what is to be met is the original's stream after the layer, so that a layer may make up for those
  before it: a joint choice over neighbouring layers, as far as a greedy one goes.

A pruned model is the whole one with its router restricted, in float32. KL is that of held-out text, in nats per token, +- its standard
error over documents.

    python benchmarks/variants.py [--removed 12 18] [--tokens 2500] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from reapkit.figures import ratio
from streaming import full_model

MODEL = Path(__file__).parents[1] / "models/m2-nano"
CANDIDATES = 24
LONGEST = 640
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Document:
    domain: str
    ids: Tensor  # [1, T]


def documents(split: str, tokens: int) -> list[Document]:
    """The first rows of every domain until each has so many tokens."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found, counts = [], defaultdict[str, int](int)
    for line in (MODEL / f"data/{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if counts[row["domain"]] >= tokens:
            continue
        if "text" in row:
            ids = tokenizer(row["text"])["input_ids"]
        else:
            given = {"tools": row["tools"]} if row.get("tools") else {}
            ids = tokenizer.apply_chat_template(row["messages"], return_dict=True, **given)["input_ids"]
        found.append(Document(row["domain"], torch.tensor([ids[:LONGEST]])))
        counts[row["domain"]] += len(ids[:LONGEST])
    return found


class Model:
    """The whole model, whose routers can be restricted, layer by layer."""

    def __init__(self) -> None:
        self.whole = full_model(MODEL, dtype=torch.float32, experts="eager")
        self.whole.requires_grad_(False)
        self.layers: list[Any] = list(self.whole.model.layers)
        self.bias = [layer.mlp.e_score_correction_bias.clone() for layer in self.layers]
        self.top_k: int = self.whole.config.num_experts_per_tok
        self.num_experts: int = self.whole.config.num_local_experts

    def restrict(self, index: int, kept: Sequence[int] | None) -> None:
        bias = self.bias[index].clone()
        if kept is not None:
            bias[[expert for expert in range(self.num_experts) if expert not in set(kept)]] = float("-inf")
        self.layers[index].mlp.e_score_correction_bias.data.copy_(bias)

    @torch.inference_mode()
    def log_probabilities(self, ids: Tensor) -> Tensor:
        return functional.log_softmax(self.whole(input_ids=ids, use_cache=False).logits[0], -1)

    def routed(self, index: int, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's best-ranked experts, their scores and their outputs, [T, C], [T, C] and [T, C, D]."""
        mlp = self.layers[index].mlp
        score_TE = torch.sigmoid(functional.linear(hidden_TD, mlp.gate.weight))
        best_TC = (score_TE + self.bias[index]).topk(CANDIDATES).indices
        gate_TEI, up_TEI = torch.einsum("td,eid->tei", hidden_TD, mlp.experts.gate_up_proj).chunk(2, -1)
        out_TED = torch.einsum("tei,edi->ted", functional.silu(gate_TEI) * up_TEI, mlp.experts.down_proj)
        width = hidden_TD.shape[1]
        return best_TC, score_TE.gather(1, best_TC), out_TED.gather(1, best_TC[..., None].expand(-1, -1, width))

    def output(self, index: int, hidden: Tensor) -> Tensor:
        found = self.layers[index].mlp(hidden)
        result: Tensor = found[0] if isinstance(found, tuple) else found
        return result


@dataclass
class Tokens:
    """A layer's tokens. The last row and column of a Gram matrix belong to what is to be met.

    Attributes:
        expert_TC, score_TC: the candidates by falling rank.
        gram_TCC: [T, C + 1, C + 1].
        weight_T: of each token's error.
    """

    expert_TC: NDArray[np.int64]
    score_TC: Array
    gram_TCC: Array
    weight_T: Array

    def errors(
        self, tokens: NDArray[np.int64], kept_E: NDArray[np.bool_], top_k: int
    ) -> tuple[Array, NDArray[np.bool_]]:
        """Weighted errors of some tokens under a kept set, and which candidates it chooses."""
        is_kept = kept_E[self.expert_TC[tokens]]
        chosen = is_kept & (np.cumsum(is_kept, 1) <= top_k)
        weighed = np.where(chosen, self.score_TC[tokens], 0.0)
        total = weighed.sum(1, keepdims=True)
        coefficient = np.divide(weighed, total, out=np.zeros_like(weighed), where=total > 0)
        coefficient = np.concatenate((coefficient, np.full((len(tokens), 1), -1.0)), 1)
        inner = np.einsum("tij,tj->ti", self.gram_TCC[tokens], coefficient)
        return self.weight_T[tokens] * (inner * coefficient).sum(1), chosen


def eliminate(tokens: Tokens, *, num_experts: int, top_k: int, removed: int) -> list[int]:
    """Experts in the order in which they go."""
    kept_E = np.ones(num_experts, dtype=bool)
    everyone = np.arange(len(tokens.weight_T))
    now_T, chosen_TC = tokens.errors(everyone, kept_E, top_k)
    order: list[int] = []
    for _ in range(removed):
        costs = np.full(num_experts, np.inf)
        for expert in np.flatnonzero(kept_E):
            touched = np.flatnonzero((chosen_TC & (tokens.expert_TC == expert)).any(1))
            without = kept_E.copy()
            without[expert] = False
            costs[expert] = (tokens.errors(touched, without, top_k)[0] - now_T[touched]).sum()
        order.append(int(costs.argmin()))
        kept_E[order[-1]] = False
        now_T, chosen_TC = tokens.errors(everyone, kept_E, top_k)
    return order


def gradients(model: Model, ids: Tensor, draws: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of every layer, what its experts got as input and the stream it stems from, [T, D], and gradients of its output, [T, draws, D]."""
    inputs: list[Tensor] = []
    streams: list[Tensor] = []
    added: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        streams.append(args[0].detach()[0])

    def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        added.append(torch.zeros_like(own, requires_grad=True))
        inputs.append(args[0].detach()[0])
        return (own + added[-1], *output[1:]) if isinstance(output, tuple) else own + added[-1]

    handles = [layer.mlp.register_forward_hook(add) for layer in model.layers]
    handles += [layer.post_attention_layernorm.register_forward_pre_hook(look) for layer in model.layers]
    try:
        logits = model.whole(input_ids=ids, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for number in range(draws):
        drawn = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        loss = functional.cross_entropy(logits, drawn, reduction="sum")
        found.append(torch.autograd.grad(loss, added, retain_graph=number + 1 < draws))
    return inputs, streams, [torch.stack([part[index][0] for part in found], 1) for index in range(len(added))]


def one_pass(model: Model, text: Sequence[Document], draws: int) -> tuple[dict[str, list[Tokens]], list[Array]]:
    """The tokens of every layer under the errors that need the original model alone, and REAP's saliencies."""
    parts: list[dict[str, list[Array]]] = [defaultdict(list) for _ in model.layers]
    for document in text:
        inputs, streams, gradient_TSD = gradients(model, document.ids, draws)
        for index, part in enumerate(parts):
            with torch.inference_mode():
                expert_TC, score_TC, out_TCD = model.routed(index, inputs[index])
                coefficient = score_TC[:, : model.top_k] / score_TC[:, : model.top_k].sum(1, keepdim=True)
                target = torch.einsum("tk,tkd->td", coefficient, out_TCD[:, : model.top_k])
                vectors = torch.cat((out_TCD, target[:, None]), 1)
                along = torch.einsum("tcd,tsd->tcs", vectors, gradient_TSD[index])
                part["gated"].append((coefficient * out_TCD[:, : model.top_k].norm(dim=-1)).double().numpy())
                part["expert"].append(expert_TC.numpy())
                part["score"].append(score_TC.double().numpy())
                part["gram"].append((vectors @ vectors.transpose(1, 2)).double().numpy())
                part["fisher"].append((along @ along.transpose(1, 2) / draws).double().numpy())
                part["stream"].append(streams[index].square().sum(-1).double().numpy())
                part["steep"].append(gradient_TSD[index].square().sum(-1).mean(1).double().numpy())
    domains = np.concatenate([np.full(document.ids.shape[1], document.domain) for document in text])
    names, domain_T = np.unique(domains, return_inverse=True)
    found: dict[str, list[Tokens]] = defaultdict(list)
    saliencies = []
    for part in parts:
        whole = {name: np.concatenate(pieces) for name, pieces in part.items()}
        residual = 1 / whole["stream"]
        mass = np.bincount(domain_T, weights=residual, minlength=len(names))
        common = (whole["expert"].astype(np.int64), whole["score"])
        found["reroute"].append(Tokens(*common, whole["gram"], residual))
        found["reroute balanced"].append(Tokens(*common, whole["gram"], residual / mass[domain_T]))
        found["fisher"].append(Tokens(*common, whole["fisher"], np.ones_like(residual)))
        found["sensitivity"].append(Tokens(*common, whole["gram"], whole["steep"]))
        first = whole["expert"][:, : model.top_k].astype(np.int64).ravel()
        count = np.bincount(first, minlength=model.num_experts)
        total = np.bincount(first, weights=whole["gated"].ravel(), minlength=model.num_experts)
        saliencies.append(np.divide(total, count, out=np.zeros_like(total), where=count > 0))
    return found, saliencies


@torch.inference_mode()
def layer_by_layer(model: Model, text: Sequence[Document], *, removed: int, feedback: bool) -> list[list[int]]:
    """The orders that follow when every layer is chosen behind pruned ones."""
    whole = model.whole.model
    original = [whole.embed_tokens(document.ids) for document in text]
    pruned = list(original)
    positions = [whole.rotary_emb(state, torch.arange(state.shape[1])[None]) for state in original]
    masks = [torch.full((state.shape[1],) * 2, float("-inf")).triu(1)[None, None] for state in original]
    orders = []
    for index, layer in enumerate(model.layers):

        def attended(state: Tensor, number: int, layer: Any = layer) -> Tensor:
            added, _ = layer.self_attn(
                hidden_states=layer.input_layernorm(state),
                position_embeddings=positions[number],
                attention_mask=masks[number],
            )
            return state + added

        original = [attended(state, number) for number, state in enumerate(original)]
        pruned = [attended(state, number) for number, state in enumerate(pruned)]
        part: dict[str, list[Array]] = defaultdict(list)
        after = [state + model.output(index, layer.post_attention_layernorm(state)) for state in original]
        for wanted, state in zip(after, pruned, strict=True):
            hidden = layer.post_attention_layernorm(state)
            expert_TC, score_TC, out_TCD = model.routed(index, hidden[0])
            target = wanted - state if feedback else model.output(index, hidden)
            vectors = torch.cat((out_TCD, target[0][:, None]), 1)
            part["expert"].append(expert_TC.numpy())
            part["score"].append(score_TC.double().numpy())
            part["gram"].append((vectors @ vectors.transpose(1, 2)).double().numpy())
            part["weight"].append(1 / state[0].square().sum(-1).double().numpy())
        merged = {name: np.concatenate(pieces) for name, pieces in part.items()}
        tokens = Tokens(merged["expert"].astype(np.int64), merged["score"], merged["gram"], merged["weight"])
        orders.append(eliminate(tokens, num_experts=model.num_experts, top_k=model.top_k, removed=removed))
        model.restrict(index, sorted(set(range(model.num_experts)) - set(orders[-1])))
        pruned = [state + model.output(index, layer.post_attention_layernorm(state)) for state in pruned]
        model.restrict(index, None)
        original = after
    return orders


def divergence(
    model: Model, text: Sequence[Document], references: Sequence[Tensor], kept: Sequence[Sequence[int]]
) -> dict[str, list[float | None]]:
    """KL(original ‖ pruned) by domain and over all tokens, each with its standard error over documents."""
    for index, experts in enumerate(kept):
        model.restrict(index, experts)
    sums: list[tuple[str, float, int]] = []
    for document, reference in zip(text, references, strict=True):
        found = model.log_probabilities(document.ids)
        sums.append((document.domain, float((reference.exp() * (reference - found)).sum()), len(found)))
    for index in range(len(kept)):
        model.restrict(index, None)
    found_by: dict[str, list[float | None]] = {}
    for name in [*sorted({domain for domain, _, _ in sums}), "overall"]:
        total, count = np.array([row[1:] for row in sums if name in (row[0], "overall")], dtype=np.float64).T
        figure = ratio(total, count)
        found_by[name] = [figure.value, figure.standard_error]
    return found_by


def kept_sets(
    model: Model, text: Sequence[Document], removed: Sequence[int], draws: int
) -> Iterator[tuple[str, int, list[list[int]]]]:
    everyone = range(model.num_experts)
    found, saliencies = one_pass(model, text, draws)
    lowest = [np.argsort(saliency_E, kind="stable").tolist() for saliency_E in saliencies]
    orders: dict[str, Mapping[int, list[list[int]]]] = {"reap": dict.fromkeys(removed, lowest)}
    for name, layers in found.items():
        order = [
            eliminate(layer, num_experts=model.num_experts, top_k=model.top_k, removed=max(removed)) for layer in layers
        ]
        orders[name] = dict.fromkeys(removed, order)
    for name, feedback in (("sequential", False), ("feedback", True)):
        orders[name] = {count: layer_by_layer(model, text, removed=count, feedback=feedback) for count in removed}
    for name, by_count in orders.items():
        for count in removed:
            yield name, count, [sorted(set(everyone) - set(order[:count])) for order in by_count[count]]


def table(results: dict[str, Any]) -> str:
    """A run as rows of docs/reroute.md."""
    lines = ["| removed | chosen by | KL | of that on each domain |", "|---|---|---|---|"]
    for row in sorted(results["rows"], key=lambda row: (row["removed"], row["kl"]["overall"])):
        mean, error = row["kl"]["overall"]
        domains = ", ".join(f"{name} {kl:.2f}" for name, (kl, _) in row["kl"].items() if name != "overall")
        lines.append(f"| {row['removed']} of 48 | {row['variant']} | {mean:.3f} ± {error:.3f} | {domains} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--removed", type=int, nargs="+", default=[12, 18], help="experts of 48 to remove from a layer")
    parser.add_argument(
        "--tokens", type=int, default=2500, help="of calibration text of each domain; half of that held out"
    )
    parser.add_argument("--draws", type=int, default=4, help="gradients a token")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print what an earlier run wrote as a table, and run nothing"
    )
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return
    torch.manual_seed(0)
    begun = time.perf_counter()
    model = Model()
    calibration, heldout = documents("calibration", arguments.tokens), documents("heldout", arguments.tokens // 2)
    references = [model.log_probabilities(document.ids) for document in heldout]
    rows = []
    for name, count, kept in kept_sets(model, calibration, arguments.removed, arguments.draws):
        row = {"variant": name, "removed": count, "kl": divergence(model, heldout, references, kept)}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    tokens = {
        split: sum(document.ids.shape[1] for document in text)
        for split, text in (("calibration", calibration), ("heldout", heldout))
    }
    text = json.dumps(
        {"tokens": tokens, "draws": arguments.draws, "seconds": round(time.perf_counter() - begun), "rows": rows},
        indent=1,
    )
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
