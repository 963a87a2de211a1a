"""The study: every criterion and every merger on m2-nano, side by side.

    python benchmarks/study.py run --out out/study          # goes on where an earlier call stopped; --minutes 8 stops before then
    python benchmarks/study.py render --out out/study       # benchmarks/results/study.json, docs/study.md and its plots

A cell is one method at one ratio, chosen on one calibration sample. Pruned models are not written: the original with the dropped experts'
selection biases at minus infinity computes the same, and many of them run as rows of one batch. Merged ones are written and loaded again.
What runs is taken from `reapkit list criteria`, so a new criterion joins by itself.

Shape suffixes: V = variants in a batch, R = rows (prompts) of each, E = experts, N = tokens laid end to end, D = hidden size, T = tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples/m2_nano"), str(ROOT / "benchmarks")]

from score import SPARE_TOKENS, experts_implementation, is_right, load, prompt_text, read_rows, reference_reply  # noqa: E402
from tasks import DOMAINS  # noqa: E402

MODEL = ROOT / "models/m2-nano"
CALIBRATION, HELDOUT = MODEL / "data/calibration.jsonl", MODEL / "data/heldout.jsonl"
CODE = ("python", "stdlib")
WEIGHTS = ("plain", "relative", "residual", "plain-balanced", "relative-balanced", "residual-balanced")
DENSE = "study-dense"
# Tokens that all experts run on at once: 16,384 x 48 x 256 values are 0.8 GB in float32.
CHUNK_TOKENS = 16_384
# A reply loops when it has not ended at its limit and its end is one block of so many tokens at most, three times over.
LONGEST_PERIOD, REPEATS = 16, 3


@dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
        out: folder of results and of what leads to them.
        device: where models run.
        ratios: shares removed.
        seeds: of the calibration sample.
        methods: only these; None runs all.
        calibrations: names in `calibration_data`.
        share: of the calibration rows, that a sample takes.
        domains: whose prompts are replied to.
        prompts: per domain; None takes all.
        documents: of held-out text; None takes all.
        tokens: on which mergers measure similarity.
        rows: replies that are generated at once.
        stop: time at which no further cell is begun.
        workers: processes at once.
    """

    out: Path
    device: str = "cpu"
    ratios: tuple[str, ...] = ("0.125", "0.25", "0.30", "0.375", "0.50")
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] | None = None
    calibrations: tuple[str, ...] = ("all", "code")
    share: float = 0.5
    domains: tuple[str, ...] = DOMAINS
    prompts: int | None = None
    documents: int | None = None
    tokens: int = 16_384
    rows: int = 2048
    stop: float = math.inf
    workers: int = 1

    @property
    def cells_file(self) -> Path:
        return self.out / "cells.jsonl"

    def folder(self, calibration: str, seed: int) -> Path:
        return self.out / "work" / f"{calibration}-{seed}"


@dataclass(frozen=True)
class Cell:
    """One entry of the study."""

    calibration: str
    seed: int
    method: str
    ratio: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Cell:
        return cls(record["calibration"], record["seed"], record["method"], record["ratio"])


# ---- what leads to a cell: commands of reapkit


def reapkit(*words: object) -> Any:
    """Run one command and return what it printed as JSON; its error as RuntimeError."""
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, "-m", "reapkit", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.split()) or f"exit code {done.returncode}")
    return json.loads(done.stdout)


@functools.cache
def options_of(verb: str) -> frozenset[str]:
    import typer

    from reapkit.cli import app

    parameters = typer.main.get_command(app).commands[verb].params  # type: ignore[attr-defined]
    return frozenset(option for parameter in parameters for option in parameter.opts)


def methods_of(study: Study) -> tuple[list[str], list[str]]:
    """Criteria, the re-routed error once for each of its weights, and mergers."""
    criteria: list[str] = []
    for row in reapkit("list", "criteria", "--json"):
        name = row["criterion"]
        criteria += [f"{name} {weights}" for weights in WEIGHTS] if name == "reroute" else [name]
    mergers = [row["method"] for row in reapkit("list", "methods", "--json")]
    chosen = study.methods
    if chosen is not None and (unknown := sorted(set(chosen) - {*criteria, *mergers})):
        sys.exit(f"there is no method {unknown[0]!r}; there are: {', '.join([*criteria, *mergers])}")
    return [name for name in criteria if not chosen or name in chosen], [
        name for name in mergers if not chosen or name in chosen
    ]


def calibration_data(study: Study, name: str) -> str:
    """The `--data` of a calibration: a random share of the rows, from all domains or from those of code."""
    rows = read_rows(CALIBRATION)
    file = CALIBRATION
    if name == "code":
        rows = [row for row in rows if row["domain"] in CODE]
        file = study.out / "work/code.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"{file}:{max(1, round(study.share * len(rows)))}"


def observe(study: Study, calibration: str, seed: int) -> Path:
    """The statistics of one calibration sample."""
    path = study.folder(calibration, seed) / "statistics.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        extra = ["--reroute-tokens", 32_768] if "--reroute-tokens" in options_of("observe") else []
        data = calibration_data(study, calibration)
        reapkit(
            "observe",
            MODEL,
            "--data",
            data,
            "--seed",
            seed,
            "--device",
            study.device,
            "--dtype",
            "float32",
            *extra,
            "-o",
            path,
            "--json",
        )
    return path


def plan(study: Study, cell: Cell) -> dict[int, list[int]]:
    """The kept experts of a cell, by layer."""
    path = study.folder(cell.calibration, cell.seed) / "plans" / f"{cell.method.replace(' ', '-')}-{cell.ratio}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        criterion, _, weights = cell.method.partition(" ")
        words = ["--criterion", criterion, "--ratio", cell.ratio, "-o", path, "--json"]
        words += ["--seed", cell.seed] if criterion == "random" else []
        words += ["--weights", weights] if weights else []
        try:
            reapkit("plan", study.folder(cell.calibration, cell.seed) / "statistics.safetensors", *words)
        except RuntimeError as error:
            try:  # a criterion that needs no data may want the checkpoint
                reapkit("plan", MODEL, *words)
            except RuntimeError:
                raise error from None
    return {int(layer): kept for layer, kept in json.loads(path.read_text())["kept"].items()}


def measure_similarity(study: Study, calibration: str, seed: int) -> Path:
    """What mergers need of one calibration sample beyond statistics."""
    path = study.folder(calibration, seed) / "similarity.safetensors"
    if not path.exists():
        from reapkit.observation import Observation, Run
        from reapkit.similarity import measure

        run = Run(device=study.device, dtype="float32")
        observation = Observation(MODEL, [calibration_data(study, calibration)], run=run, max_length=2048, seed=seed)
        measure(observation, tokens=study.tokens).save(path)
    return path


def merge_one(folder: Path, data: str, cell: Cell) -> Path:
    """Write a merged checkpoint; runs in a process of its own."""
    torch.set_num_threads(1)
    from reapkit.merging import merge
    from reapkit.observation import Run
    from reapkit.similarity import Similarities

    out = folder / "merged" / f"{cell.method}-{cell.ratio}"
    shutil.rmtree(out, ignore_errors=True)
    merge(
        MODEL, folder / "statistics.safetensors", out, method=cell.method, ratio=cell.ratio, data=[data], seed=cell.seed,
        run=Run(device="cpu", dtype="float32"), measured=Similarities.load(folder / "similarity.safetensors"),
    )  # fmt: skip
    return out


# ---- evaluating a model


def dense_experts(self: Any, hidden_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor) -> Tensor:
    """All experts on all tokens in two products, unchosen ones with a coefficient of 0: on a GPU the fastest for experts this small."""
    count, width = self.num_experts, self.down_proj.shape[2]
    into = self.gate_up_proj.reshape(-1, hidden_ND.shape[1])
    out_of = self.down_proj.permute(0, 2, 1).reshape(count * width, -1)
    parts = []
    for start in range(0, len(hidden_ND), CHUNK_TOKENS):
        at = slice(start, start + CHUNK_TOKENS)
        gate_NE = torch.zeros(len(hidden_ND[at]), count, device=hidden_ND.device, dtype=hidden_ND.dtype)
        gate_NE.scatter_(1, expert_NK[at], gate_NK[at].to(hidden_ND.dtype))
        gate, up = (hidden_ND[at] @ into.T).view(-1, count, 2, width).unbind(2)
        inner = torch.nn.functional.silu(gate) * up * gate_NE.unsqueeze(-1)
        parts.append(inner.view(-1, count * width) @ out_of)
    return torch.cat(parts)


class Evaluator:
    """The held-out prompts and text, and how models are measured on them; the original's predictions are kept.

    Args:
        study: what is run.
    """

    def __init__(self, study: Study) -> None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        from reapkit.calibration import load as load_text

        ALL_EXPERTS_FUNCTIONS.register(DENSE, dense_experts)
        self.study = study
        self.original, self.tokenizer = self.load(MODEL)
        rows = read_rows(HELDOUT)
        self.rows = {name: [row for row in rows if row["domain"] == name][: study.prompts] for name in study.domains}
        everything = load_text([str(HELDOUT)], self.tokenizer)
        documents = everything.documents
        if study.documents is not None:  # of every domain as many
            each = max(1, study.documents // len(everything.domains))
            documents = tuple(
                document
                for domain in everything.domains
                for document in [document for document in documents if document.domain == domain][:each]
            )
        self.documents = [document for document in documents if len(document.input_ids) > 1]
        self._passed: dict[tuple[str, int, str], bool] = {}
        self._original_log_probs: list[Tensor] = []
        self.original_subspace: dict[int, dict[str, float]] = {}

    def load(self, folder: Path) -> tuple[Any, Any]:
        model, tokenizer = load(folder, self.study.device)
        model.set_experts_implementation(experts_implementation("cpu") if self.study.device == "cpu" else DENSE)
        return model, tokenizer

    # -- replies

    @torch.inference_mode()
    def replies(self, model: Any, domains: Sequence[str], masks: Masks | None) -> dict[str, list[list[list[int]]]]:
        """Greedy replies as tokens, by domain, variant and row: up to the end token, which is kept, or the domain's limit."""
        rows = [(domain, row) for domain in domains for row in self.rows[domain]]
        prompts = [
            self.tokenizer(prompt_text(row, self.tokenizer), add_special_tokens=False).input_ids for _, row in rows
        ]
        width, pad, end = max(map(len, prompts)), self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        count = 1 if masks is None else masks.count
        with masked(model, masks):
            output = model.generate(
                ids.repeat(count, 1).to(model.device), attention_mask=mask.repeat(count, 1).to(model.device), do_sample=False,
                temperature=None, top_p=None, top_k=None, eos_token_id=end, pad_token_id=pad,
                max_new_tokens=max(map(self.limit, domains)),
            )[:, width:].tolist()  # fmt: skip
        found: dict[str, list[list[list[int]]]] = {domain: [[] for _ in range(count)] for domain in domains}
        for place, tokens in enumerate(output):
            variant, number = divmod(place, len(rows))
            domain = rows[number][0]
            ended = tokens.index(end) + 1 if end in tokens else len(tokens)
            found[domain][variant].append(tokens[: min(ended, self.limit(domain))])
        return found

    @functools.cache  # noqa: B019 - one evaluator lives as long as the process
    def limit(self, domain: str) -> int:
        lengths = [
            len(self.tokenizer(reference_reply(row, self.tokenizer), add_special_tokens=False).input_ids)
            for row in self.rows[domain]
        ]
        return max(lengths) + SPARE_TOKENS

    def score(self, domain: str, replies: Sequence[Sequence[int]], pool: ThreadPoolExecutor) -> dict[str, Any]:
        """How many replies are right, loop, and do not end."""
        end = self.tokenizer.eos_token_id
        texts = [
            self.tokenizer.decode(
                [token for token in tokens if token != end],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
            for tokens in replies
        ]
        keys = [(domain, number, text) for number, text in enumerate(texts)]
        new = [key for key in dict.fromkeys(keys) if key not in self._passed]
        judged = pool.map(lambda key: is_right(self.rows[domain][key[1]], key[2]), new)
        self._passed.update(zip(new, judged, strict=True))
        unended = [tokens for tokens in replies if not tokens or tokens[-1] != end]
        return {
            "count": len(replies),
            "right": sum(self._passed[key] for key in keys),
            "unended": len(unended),
            "looping": sum(map(loops, unended)),
        }

    # -- text

    @torch.inference_mode()
    def fidelity(self, model: Any, masks: Masks | None) -> dict[str, Any]:
        """KL and top-1 agreement by domain and overall, and the layers' outputs, on the held-out text.

        The first call must be the original's: its predictions are what others are held against.
        """
        is_first = not self._original_log_probs
        kl: list[tuple[str, int, float, float]] = []
        with masked(model, masks), outputs_of(model) as seen:
            for number, batch in enumerate(self._batches()):
                lengths = torch.tensor([len(document.input_ids) for document in batch], device=model.device)
                ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
                for row, document in zip(ids, batch, strict=True):
                    row[: len(document.input_ids)] = torch.from_numpy(document.input_ids.astype(np.int64))
                real = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
                seen.mask_N = real.reshape(-1)
                logits = model(ids.to(model.device), use_cache=False).logits
                predicts = torch.arange(ids.shape[1], device=model.device) < lengths[:, None] - 1
                ours = torch.log_softmax(logits[predicts].float(), dim=-1)
                if is_first:
                    self._original_log_probs.append(ours)
                theirs = self._original_log_probs[number]
                kl_N = (theirs.exp() * (theirs - ours)).sum(-1).double()
                same_N = (theirs.argmax(-1) == ours.argmax(-1)).double()
                counts = (lengths - 1).tolist()
                for document, one, other in zip(batch, kl_N.split(counts), same_N.split(counts), strict=True):
                    kl.append((document.domain, len(one), float(one.sum()), float(other.sum())))
        layers = {layer: subspace(*sums) for layer, sums in seen.sums().items()}
        if is_first:
            self.original_subspace = layers
        relative = {
            name: float(np.mean([layers[layer][name] / self.original_subspace[layer][name] for layer in layers]))
            for name in ("participation", "effective_rank", "spread")
        }
        domains = sorted({domain for domain, *_ in kl})
        return {
            "kl": {"overall": ratio_of_sums(kl, 2)} | {name: ratio_of_sums([k for k in kl if k[0] == name], 2) for name in domains},
            "top1": {"overall": ratio_of_sums(kl, 3)} | {name: ratio_of_sums([k for k in kl if k[0] == name], 3) for name in domains},
            "subspace": relative,
            "subspace_by_layer": {str(layer): values for layer, values in layers.items()},
        }  # fmt: skip

    def _batches(self) -> Iterator[list[Any]]:
        """Documents of like length, at most some tokens at once."""
        limit = 32_768 if self.study.device != "cpu" else 4_096
        batch: list[Any] = []
        for document in sorted(self.documents, key=lambda document: -len(document.input_ids)):
            if batch and (len(batch) + 1) * len(batch[0].input_ids) > limit:
                yield batch
                batch = []
            batch.append(document)
        yield batch


def loops(tokens: Sequence[int]) -> bool:
    """Whether a reply ends in one block of at most `LONGEST_PERIOD` tokens, `REPEATS` times over."""
    return any(
        len(tokens) >= REPEATS * period and list(tokens[-REPEATS * period :]) == list(tokens[-period:]) * REPEATS
        for period in range(1, LONGEST_PERIOD + 1)
    )


def ratio_of_sums(rows: Sequence[tuple[Any, ...]], place: int) -> dict[str, float]:
    """A mean over tokens with its standard error over documents."""
    tokens = sum(row[1] for row in rows)
    mean = sum(row[place] for row in rows) / tokens
    spread = math.sqrt(sum((row[place] - mean * row[1]) ** 2 for row in rows)) / tokens
    return {"value": mean, "standard_error": spread}


def subspace(count: int, sum_D: Tensor, product_DD: Tensor) -> dict[str, float]:
    """What the covariance of a layer's outputs says of the space that they fill, from its eigenvalues l.

    participation: (sum l)^2 / sum l^2. effective_rank: exp of the entropy of l / sum l. spread: sum l, the mean squared distance from
    the mean output.
    """
    mean_D = sum_D / count
    covariance = product_DD / count - torch.outer(mean_D, mean_D)
    eigenvalues = torch.linalg.eigvalsh(covariance.cpu()).clamp(min=0)
    share = eigenvalues / eigenvalues.sum()
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    return {
        "participation": float(1 / share.square().sum()),
        "effective_rank": float(entropy.exp()),
        "spread": float(eigenvalues.sum()),
    }


@dataclass(frozen=True)
class Masks:
    """What is added to the selection biases of every variant: minus infinity for its dropped experts; by layer, [V, E]."""

    by_layer: Mapping[int, Tensor]
    count: int

    @classmethod
    def of(cls, plans: Sequence[Mapping[int, Sequence[int]]], *, num_experts: int, device: Any) -> Masks:
        by_layer = {}
        for layer in plans[0]:
            mask_VE = torch.full((len(plans), num_experts), -math.inf)
            for row, plan in zip(mask_VE, plans, strict=True):
                row[list(plan[layer])] = 0.0
            by_layer[layer] = mask_VE.to(device)
        return cls(by_layer, len(plans))


@contextmanager
def masked(model: Any, masks: Masks | None) -> Iterator[None]:
    """Let every variant's rows, which follow each other in the batch, choose among its own experts alone."""
    if masks is None:
        yield
        return

    def before(layer: int, module: Any, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, bias_E = args
        tokens = hidden.reshape(-1, hidden.shape[-1]).shape[0] // masks.count
        return hidden, (bias_E + masks.by_layer[layer]).repeat_interleave(tokens, dim=0)

    hooks = [
        model.model.layers[layer].mlp.gate.register_forward_pre_hook(functools.partial(before, layer))
        for layer in masks.by_layer
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Outputs:
    """Sums over the outputs of every MoE layer, padding left out."""

    mask_N: Tensor

    def __init__(self) -> None:
        self._sums: dict[int, list[Any]] = {}

    def add(self, layer: int, module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        out_ND = hidden.reshape(-1, hidden.shape[-1])[self.mask_N].double()
        count, sum_D, product_DD = self._sums.setdefault(layer, [0, 0.0, 0.0])
        self._sums[layer] = [count + len(out_ND), sum_D + out_ND.sum(0), product_DD + out_ND.T @ out_ND]

    def sums(self) -> dict[int, tuple[int, Tensor, Tensor]]:
        return {layer: tuple(sums) for layer, sums in self._sums.items()}


@contextmanager
def outputs_of(model: Any) -> Iterator[_Outputs]:
    seen = _Outputs()
    hooks = [
        layer.mlp.register_forward_hook(functools.partial(seen.add, index))
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# ---- running


def run(study: Study) -> bool:
    """Run the cells that are not there yet; whether all are."""
    study.out.mkdir(parents=True, exist_ok=True)
    done = read_cells(study.cells_file)
    criteria, mergers = methods_of(study)
    left = [cell for cell in all_cells(study, [*criteria, *mergers]) if cell not in done]
    report(f"{len(done)} cells are there, {len(left)} are left: {len(criteria)} criteria, {len(mergers)} mergers")
    evaluator = Evaluator(study)
    pool = ThreadPoolExecutor(study.workers)

    def keep(cell: Cell, found: Mapping[str, Any]) -> None:
        record = {**vars(cell), **found}
        with study.cells_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    original = Cell("-", 0, "original", "0")
    text = evaluator.fidelity(evaluator.original, None)
    if original not in done:
        replies = evaluator.replies(evaluator.original, tuple(evaluator.rows), None)
        exact = {name: evaluator.score(name, found[0], pool) for name, found in replies.items()}
        keep(original, {"settings": settings_of(study), "exact": exact, **text})
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in left:
        groups.setdefault((cell.calibration, cell.seed), []).append(cell)
    with ProcessPoolExecutor(max(1, study.workers // 2), mp_context=get_context("spawn")) as processes:
        try:
            for (calibration, seed), cells in groups.items():
                if time.time() > study.stop:
                    return False
                observe(study, calibration, seed)
                merging = start_merging(study, [cell for cell in cells if cell.method in mergers], processes)
                pruned = [cell for cell in cells if cell.method in criteria]
                if not prune_cells(study, evaluator, pruned, pool, keep):
                    return False
                if not merge_cells(study, evaluator, merging, pool, keep):
                    return False
        finally:
            processes.shutdown(wait=True, cancel_futures=True)
            pool.shutdown()
    return True


def all_cells(study: Study, methods: Sequence[str]) -> list[Cell]:
    return [
        Cell(calibration, seed, method, ratio)
        for seed in study.seeds
        for calibration in study.calibrations
        for method in methods
        for ratio in study.ratios
    ]


def settings_of(study: Study) -> dict[str, Any]:
    device = torch.cuda.get_device_name(0) if study.device != "cpu" else "cpu"
    return {
        "device": device, "dtype": "float32", "share": study.share, "prompts": study.prompts, "documents": study.documents,
        "similarity_tokens": study.tokens, "torch": torch.__version__,
    }  # fmt: skip


def prune_cells(
    study: Study,
    evaluator: Evaluator,
    cells: Sequence[Cell],
    pool: ThreadPoolExecutor,
    keep: Callable[[Cell, Mapping[str, Any]], None],
) -> bool:
    plans: dict[Cell, dict[int, list[int]]] = {}
    futures = {pool.submit(plan, study, cell): cell for cell in cells}
    for future in as_completed(futures):
        try:
            plans[futures[future]] = future.result()
        except RuntimeError as error:
            keep(futures[future], {"not_run": str(error)})
            report(f"not run: {futures[future]}: {error}")
    ready = [cell for cell in cells if cell in plans]
    largest = max(map(len, evaluator.rows.values()))
    size = max(1, study.rows // largest)
    num_experts = evaluator.original.config.num_local_experts
    for start in range(0, len(ready), size):
        if time.time() > study.stop:
            return False
        batch, began = ready[start : start + size], time.time()
        device = evaluator.original.device
        masks = Masks.of([plans[cell] for cell in batch], num_experts=num_experts, device=device)
        # One domain after the other, since the longest replies of one would keep the others waiting.
        replies = {name: evaluator.replies(evaluator.original, [name], masks)[name] for name in evaluator.rows}
        generated = time.time()
        for number, cell in enumerate(batch):
            alone = Masks.of([plans[cell]], num_experts=num_experts, device=device)
            exact = {name: evaluator.score(name, replies[name][number], pool) for name in evaluator.rows}
            keep(cell, {"kind": "pruned", "exact": exact, **evaluator.fidelity(evaluator.original, alone)})
        report(
            f"{batch[0].calibration} {batch[0].seed}: {len(batch)} pruned cells, replies {generated - began:.1f} s, "
            f"text {time.time() - generated:.1f} s"
        )
    return True


def start_merging(study: Study, cells: Sequence[Cell], processes: ProcessPoolExecutor) -> dict[Future[Path], Cell]:
    if not cells:
        return {}
    calibration, seed = cells[0].calibration, cells[0].seed
    measure_similarity(study, calibration, seed)
    data = calibration_data(study, calibration)
    return {processes.submit(merge_one, study.folder(calibration, seed), data, cell): cell for cell in cells}


def merge_cells(
    study: Study,
    evaluator: Evaluator,
    merging: Mapping[Future[Path], Cell],
    pool: ThreadPoolExecutor,
    keep: Callable[[Cell, Mapping[str, Any]], None],
) -> bool:
    began, count = time.time(), 0
    for future in as_completed(merging):
        if time.time() > study.stop:
            return False
        folder, cell = future.result(), merging[future]
        model, _ = evaluator.load(folder)
        replies = evaluator.replies(model, tuple(evaluator.rows), None)
        exact = {name: evaluator.score(name, found[0], pool) for name, found in replies.items()}
        keep(cell, {"kind": "merged", "exact": exact, **evaluator.fidelity(model, None)})
        del model
        shutil.rmtree(folder)
        count += 1
    report(f"{count} merged cells in {time.time() - began:.1f} s")
    return True


def read_cells(path: Path) -> dict[Cell, dict[str, Any]]:
    """The cells of a file; a line that was cut off at a kill is left out."""
    cells: dict[Cell, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        cells[Cell.of(record)] = record
    return cells


def report(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=ROOT / "out/study")
    parser.add_argument(
        "--resume", type=Path, nargs="*", default=[], help="cells.jsonl of earlier calls, to go on with"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further cells after so long")
    for name in ("ratios", "methods", "calibrations"):
        parser.add_argument(f"--{name}", type=lambda text: tuple(text.split(",")))
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--share", type=float)
    for name in ("prompts", "documents", "tokens", "rows"):
        parser.add_argument(f"--{name}", type=int)


def main(words: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    add_run_options(verbs.add_parser("run"))
    rendering = verbs.add_parser("render")
    rendering.add_argument(
        "--out", type=Path, help="folder of the run; by default benchmarks/results/study.json is rendered again"
    )
    rendering.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/study.json")
    rendering.add_argument("--docs", type=Path, default=ROOT / "docs")
    given = vars(parser.parse_args(None if words is None else list(words)))
    if given.pop("verb") == "render":
        from study_page import render

        cells = None if given["out"] is None else read_cells(given["out"] / "cells.jsonl").values()
        render(cells, given["results"], given["docs"])
        return 0
    minutes, resume = given.pop("minutes"), given.pop("resume")
    stop = time.time() + 60 * minutes
    study = Study(
        **{key: value for key, value in given.items() if value is not None}, stop=stop, workers=os.cpu_count() or 1
    )
    study.out.mkdir(parents=True, exist_ok=True)
    there = read_cells(study.cells_file)
    for file in resume:
        for cell, record in read_cells(file).items():
            if cell not in there:
                there[cell] = record
                with study.cells_file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(record) + "\n")
    finished = run(study)
    report("all cells are there" if finished else "stopped for the time; the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
