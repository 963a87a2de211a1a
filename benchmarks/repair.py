"""Does a repair without training earn its place? Two closed forms on the bundled model, by KL on held-out text: `repair.py`.

Both are fitted to the sample of tokens that `observe --reroute-tokens` leaves, so need no further forward, and keep the format:

- `rescale` multiplies each kept expert's output by a factor s_e, folded into the scales of its down projection (stored weights keep their
  bytes). With A_tj = c_K,j(t) for the candidates j of token t, s minimises the sum over tokens of w ‖Σ_j s_j c_K,j f_j - y‖², which is a
  linear least-squares problem of as many unknowns as experts are kept: its normal equations come from the Gram matrices.
- `bias` moves the selection bias of one expert at a time by a step of a fixed list, if that lowers the same error on half of the sampled
  tokens; the other half says whether it lowered it there too.

Coefficients, weights (`residual`) and candidates are those of `reapkit.elimination`.

    python benchmarks/repair.py [--ratios 0.25 0.375] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import reapkit
from reapkit.elimination import RoutedSample, token_weights
from reapkit.rerouting import Reroute
from reapkit.samples import RoutedSamples

MODEL = Path(__file__).parents[1] / "models/m2-nano"
STEPS = [sign * step for step in (0.01, 0.03, 0.1, 0.3) for sign in (1, -1)]
SWEEPS = 2
Array = NDArray[np.float64]


class Layer:
    """A layer's sampled tokens with what its router does before and after pruning. T = tokens, C = candidates, E = experts."""

    def __init__(self, sample: RoutedSample, kept: Sequence[int], bias_E: Array) -> None:
        assert sample.rule.num_groups == 1 and sample.rule.scoring == "sigmoid", "the bundled model's kind of router"
        self.rule, self.kept, self.bias_E = sample.rule, list(kept), bias_E
        self.expert_TC = sample.expert_TC.astype(np.int64)
        self.score_TC = sample.score_TC.astype(np.float64)
        self.is_kept_E = np.isin(np.arange(self.rule.num_experts), kept)
        rows, columns = np.triu_indices(self.expert_TC.shape[1])
        self.gram_TCC = np.empty((len(sample), *2 * (self.expert_TC.shape[1],)), dtype=np.float32)
        self.gram_TCC[:, rows, columns] = self.gram_TCC[:, columns, rows] = sample.gram_TU
        everyone = np.ones(self.rule.num_experts, dtype=bool)
        self.own_TC = self.coefficients(np.arange(len(sample)), everyone, bias_E)
        self.weight_T = token_weights(sample, "residual")
        self.output_sq_T = self.squares(np.arange(len(sample)), self.own_TC)

    def coefficients(self, tokens: NDArray[np.int64], allowed_E: NDArray[np.bool_], bias_E: Array) -> Array:
        """What the router weighs the candidates with if it may choose among `allowed_E`, zero for those that it does not choose."""
        expert, score = self.expert_TC[tokens], self.score_TC[tokens]
        choice = np.where(allowed_E[expert], score + bias_E[expert], -np.inf)
        first = np.argsort(-choice, axis=1, kind="stable")[:, : self.rule.top_k]
        chosen = np.zeros_like(choice, dtype=bool)
        np.put_along_axis(chosen, first, True, 1)
        weighed = np.where(chosen & allowed_E[expert], score, 0.0)
        total = weighed.sum(1, keepdims=True) + self.rule.epsilon if self.rule.normalise else 1.0
        return self.rule.scaling * weighed / total

    def squares(self, tokens: NDArray[np.int64], combination_TC: Array) -> Array:
        result = np.empty(len(tokens))
        for start in range(0, len(tokens), 8192):
            part = slice(start, start + 8192)
            inner = np.einsum("tij,tj->ti", self.gram_TCC[tokens[part]], combination_TC[part])
            result[part] = (inner * combination_TC[part]).sum(1)
        return result

    def error(self, tokens: NDArray[np.int64], bias_E: Array) -> Array:
        """w ‖y_K - y‖² of these tokens."""
        moved = self.coefficients(tokens, self.is_kept_E, bias_E) - self.own_TC[tokens]
        return self.weight_T[tokens] * self.squares(tokens, moved)

    def total(self, tokens: NDArray[np.int64]) -> float:
        return float(self.weight_T[tokens] @ self.output_sq_T[tokens])


def rescale(layer: Layer, tokens: NDArray[np.int64]) -> Array:
    """s_e of all experts; 1 for those that are gone."""
    count = layer.rule.num_experts
    matrix, right = np.zeros(count * count), np.zeros(count)
    for start in range(0, len(tokens), 8192):
        part = tokens[start : start + 8192]
        new_TC, expert_TC = layer.coefficients(part, layer.is_kept_E, layer.bias_E), layer.expert_TC[part]
        weighed = layer.gram_TCC[part] * layer.weight_T[part, None, None]
        pair = expert_TC[:, :, None] * count + expert_TC[:, None, :]
        products = weighed * new_TC[:, :, None] * new_TC[:, None, :]
        matrix += np.bincount(pair.ravel(), weights=products.ravel(), minlength=count * count)
        against = np.einsum("tij,tj->ti", weighed, layer.own_TC[part]) * new_TC
        right += np.bincount(expert_TC.ravel(), weights=against.ravel(), minlength=count)
    inside = np.ix_(layer.kept, layer.kept)
    scale_E = np.ones(count)
    scale_E[layer.kept] = np.linalg.lstsq(matrix.reshape(count, count)[inside], right[layer.kept], rcond=1e-9)[0]
    return scale_E


def rescaled_error(layer: Layer, tokens: NDArray[np.int64], scale_E: Array) -> float:
    new_TC = layer.coefficients(tokens, layer.is_kept_E, layer.bias_E) * scale_E[layer.expert_TC[tokens]]
    return float(layer.weight_T[tokens] @ layer.squares(tokens, new_TC - layer.own_TC[tokens]))


def move_bias(layer: Layer, tokens: NDArray[np.int64]) -> Array:
    """The selection bias after coordinate descent."""
    bias_E = layer.bias_E.copy()
    now = layer.error(tokens, bias_E)
    having = {expert: np.flatnonzero((layer.expert_TC[tokens] == expert).any(1)) for expert in layer.kept}
    for _ in range(SWEEPS):
        for expert, places in having.items():
            tried = []
            for step in STEPS:
                moved = bias_E.copy()
                moved[expert] += step
                tried.append((layer.error(tokens[places], moved), moved))
            best, moved = min(tried, key=lambda found: float(found[0].sum()), default=(now[places], bias_E))
            if best.sum() < now[places].sum():
                bias_E, now[places] = moved, best
    return bias_E


def fit(sample: RoutedSamples, kept: dict[int, tuple[int, ...]], biases: dict[int, Array]) -> dict[str, Any]:
    """Both repairs of all layers, fitted to one half of the tokens, with the relative error of both halves."""
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {"rescale": {}, "bias": {}, "errors": []}
    for index in sample.layers:
        layer = Layer(sample.layer(index), kept[index], biases[index])
        order = rng.permutation(len(layer.weight_T))
        fitted, other = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
        found["rescale"][index] = scale_E = rescale(layer, fitted)
        found["bias"][index] = bias_E = move_bias(layer, fitted)
        found["errors"].append(
            {
                "layer": index,
                **{
                    name: {
                        "none": float(layer.error(tokens, layer.bias_E).sum()) / layer.total(tokens),
                        "rescale": rescaled_error(layer, tokens, scale_E) / layer.total(tokens),
                        "bias": float(layer.error(tokens, bias_E).sum()) / layer.total(tokens),
                    }
                    for name, tokens in (("fitted", fitted), ("other", other))
                },
                "scales": [float(scale_E[list(kept[index])].min()), float(scale_E[list(kept[index])].max())],
            }
        )
    return found


def repaired(pruned: Path, out: Path, kept: dict[int, tuple[int, ...]], repairs: dict[str, dict[int, Array]]) -> Path:
    """A copy of a pruned checkpoint with repairs folded in."""
    shutil.copytree(pruned, out)
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            parts = name.split(".")
            if "rescale" in repairs and name.endswith("w2.weight_scale_inv"):
                expert = kept[int(parts[2])][int(parts[5])]
                tensors[name] = tensors[name] * float(repairs["rescale"][int(parts[2])][expert])
            if "bias" in repairs and name.endswith("e_score_correction_bias"):
                layer = int(parts[2])
                moved = torch.from_numpy(repairs["bias"][layer][list(kept[layer])])
                tensors[name] = moved.to(tensors[name].dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return out


def measure(folder: Path, ratios: Sequence[float], tokens: int) -> list[dict[str, Any]]:
    gathered = folder / "sample.safetensors"
    calibration, heldout = ([str(MODEL / f"data/{name}.jsonl")] for name in ("calibration", "heldout"))
    statistics = reapkit.observe(MODEL, calibration, reroute=Reroute(tokens, 16), sample=gathered)
    sample = RoutedSamples.open(gathered)
    biases = {}
    for path in MODEL.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if name.endswith("e_score_correction_bias"):
                biases[int(name.split(".")[2])] = tensor.double().numpy()
    rows = []
    for criterion in ("reap", "reroute"):
        for ratio in ratios:
            plan = reapkit.plan(statistics, criterion=criterion, ratio=ratio, sample=gathered)
            pruned = folder / f"{criterion}-{ratio}"
            reapkit.prune(MODEL, plan, pruned)
            kept = dict(plan.kept)
            found = fit(sample, kept, biases)
            for name in ("none", "rescale", "bias"):
                model = pruned
                if name != "none":
                    model = repaired(pruned, folder / f"{criterion}-{ratio}-{name}", kept, {name: found[name]})
                fidelity = reapkit.compare(MODEL, model, heldout).to_json()
                row = {
                    "criterion": criterion,
                    "ratio": ratio,
                    "repair": name,
                    "overall": {key: fidelity["overall"][key] for key in ("kl", "top1")},
                    "domains": {domain: figures["kl"] for domain, figures in fidelity["domains"].items()},
                }
                rows.append(row | ({"layers": found["errors"]} if name == "none" else {}))
                print(json.dumps(row), file=sys.stderr)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A run as rows of docs/reroute.md."""
    lines = [
        "| removed | chosen by | repair | KL | on each domain | error of the layers, fitted and other tokens |",
        "|---|---|---|---|---|---|",
    ]
    layers: list[dict[str, Any]] = []
    for row in rows:
        layers = row.get("layers", layers)
        kl = row["overall"]["kl"]
        domains = ", ".join(f"{name} {figure['value']:.3f}" for name, figure in row["domains"].items())
        errors = ", ".join(
            f"{np.mean([layer[half][row['repair']] for layer in layers]):.4f}" for half in ("fitted", "other")
        )
        lines.append(
            f"| {100 * row['ratio']:g} % | {row['criterion']} | {row['repair']} | {kl['value']:.4f} ± {kl['standard_error']:.4f} | "
            f"{domains} | {errors} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.25, 0.375], help="shares of the experts to remove"
    )
    parser.add_argument("--tokens", type=int, default=32_768, help="sampled")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print what an earlier run wrote as a table, and run nothing"
    )
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.ratios, arguments.tokens)
    text = json.dumps(rows, indent=1) + "\n"
    print(text, end="")
    if arguments.json is not None:
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
