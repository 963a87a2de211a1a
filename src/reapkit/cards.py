"""The model card of an output, `README.md`: what the run knows, for the hub and for people; what it does not know is left out.

The bytes follow from the source, the plan and the options alone: no date, no folder's name, no host. Results that are measured later are
brought into the part between two marks, so that the rest may be edited by hand.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from reapkit import inventory as inventories
from reapkit import serving
from reapkit.calibration import DataSource, looks_like_path
from reapkit.checkpoint import (
    CARD_NAME,
    EVALUATION_NAME,
    FIDELITY_NAME,
    STATISTICS_NAME,
    Checkpoint,
    is_inside,
    text_section,
)
from reapkit.clusters import Merging
from reapkit.errors import CheckpointError, UnsupportedError
from reapkit.inventory import Inventory
from reapkit.layout import MoELayout
from reapkit.outputs import explained, write_file
from reapkit.plans import PruningPlan
from reapkit.statistics import CalibrationRecord, Statistics
from reapkit.tensors import parse_json, reading

BEGIN, END = "<!-- reapkit: results -->", "<!-- reapkit: end of results -->"
REAP_TITLE = "REAP (Router-weighted Expert Activation Pruning)"
CITATION = """\
@article{lasby2025reap,
  title  = {REAP the Experts: Why Pruning Prevails for One-Shot MoE compression},
  author = {Lasby, Mike and Lazarevich, Ivan and Sinnadurai, Nish and Lie, Sean and Ioannou, Yani and Thangarasa, Vithursan},
  year   = {2025},
  eprint = {2510.13999},
  archivePrefix = {arXiv},
  url    = {https://arxiv.org/abs/2510.13999}
}"""
# What a hub's front matter says of a model and pruning does not change.
_CARRIED_TEXTS = ("license", "license_name", "license_link", "library_name", "pipeline_tag")
_LICENCE_FILE = re.compile(r"(licen[cs]e|copying|notice)([-_.].*)?", re.IGNORECASE)
# As huggingface_hub.repocard has it, which loads a client of the hub with itself, in a fifth of a second.
_FRONT_MATTER = re.compile(r"\s*---\n(.*?)\n---[ \t]*(\n|$)", re.DOTALL)
_REPOSITORY = re.compile(r"models--([^/]+?)--([^/]+)")


@dataclass(frozen=True)
class Subject:
    """The output that a card is about.

    Attributes:
        checkpoint, layout: the source.
        plan: the experts that stay.
        output: what will be written: its config, and its tensors without their place.
        counts_parameters: whether the format shows how many there are.
        dequantize: whether quantised weights became bf16.
        base_model: the hub id that the user gave, else None.
        merging: what its experts are averages of; None where they are the source's own.
    """

    checkpoint: Checkpoint
    layout: MoELayout
    plan: PruningPlan
    output: Checkpoint
    counts_parameters: bool
    dequantize: bool
    base_model: str | None
    merging: Merging | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """Of the output."""
        return self.output.config

    @cached_property
    def inventory(self) -> Inventory:
        """What the output holds."""
        return inventories.count(self.output)

    @cached_property
    def parent(self) -> str | None:
        """The hub id of the source: as given, as opened, or as the hub's cache names the folder; None where it is not known."""
        if self.base_model is not None:
            return self.base_model
        if Path(self.checkpoint.origin) != self.checkpoint.path:
            return self.checkpoint.origin
        root = self.checkpoint.path.resolve().parent
        match = _REPOSITORY.fullmatch(root.parent.name) if root.name == "snapshots" else None
        return f"{match[1]}/{match[2]}" if match else None

    @property
    def parent_name(self) -> str:
        """What people call the source: its hub id, or its folder's name."""
        return self.parent or self.checkpoint.path.resolve().name

    @cached_property
    def licence_files(self) -> tuple[str, ...]:
        """Licence and notice files that go along."""
        return tuple(name for name in self.checkpoint.sidecars if _LICENCE_FILE.fullmatch(name))

    @cached_property
    def carried(self) -> dict[str, Any]:
        """What the source's own front matter says that is as true of the output; a link into the folder only where its file goes along."""
        stated = _front_matter(self.checkpoint)
        carried: dict[str, Any] = {
            key: stated[key] for key in _CARRIED_TEXTS if isinstance(stated.get(key), str) and stated[key]
        }
        link = carried.get("license_link")
        if (
            link is not None
            and not re.match(r"https?://", link)
            and PurePosixPath(link).as_posix() not in self.licence_files
        ):
            del carried["license_link"]
        if carried.get("license") == "other" and "license_link" not in carried and self.licence_files:
            carried["license_link"] = self.licence_files[0]  # the hub asks for one where it does not know the licence
        language = stated.get("language")
        if isinstance(language, str) or (
            isinstance(language, list) and all(isinstance(item, str) for item in language)
        ):
            carried["language"] = language
        return carried


def compose(subject: Subject) -> bytes:
    """The card."""
    sections = [f"---\n{_metadata(subject)}\n---", *_body(subject)]
    return ("\n\n".join(sections) + "\n").encode()


def refresh(out: Path) -> bool:
    """Bring the results that lie in the output's own folder into its card; whether the card changed.

    Raises:
        CheckpointError: there is no card, its marks are gone, or a result cannot be read.
    """
    path = out / CARD_NAME
    if not path.is_file():
        raise CheckpointError(f"{out} has no {CARD_NAME}", hint="give the folder that reapkit prune wrote")
    with reading(CARD_NAME):
        text = path.read_bytes().decode(errors="surrogateescape")
    parts = re.split(f"({re.escape(BEGIN)}.*?{re.escape(END)})", text, flags=re.DOTALL)
    if len(parts) != 3:
        raise CheckpointError(
            f"{CARD_NAME} in {out} has {len(parts) // 2} places for results where there should be 1",
            hint=f"put the lines {BEGIN} and {END} where the results belong",
        )
    fresh = parts[0] + "\n".join([BEGIN, *results(out), END]) + parts[2]
    if fresh == text:
        return False
    with explained(path, hint="the card needs a folder that can be written to"):
        write_file(path, fresh.encode(errors="surrogateescape"))
    return True


def results(out: Path) -> Iterator[str]:
    """Markdown of what lies in the output's own folder: the text that was observed, and measurements; nothing where nothing does."""
    if (out / STATISTICS_NAME).is_file():
        yield from _calibration_section(Statistics.load(out / STATISTICS_NAME))
    fidelity = read_result(out / FIDELITY_NAME)
    if fidelity is not None:
        yield from _fidelity_section(fidelity)
    evaluation = read_result(out / EVALUATION_NAME)
    if evaluation is not None:
        yield from _evaluation_section(evaluation)


def read_result(path: Path) -> dict[str, Any] | None:
    """A result that a verb left in the output's own folder, None where it did not run.

    Raises:
        CheckpointError: not JSON.
    """
    if not path.is_file():
        return None
    with reading(path.name):
        return parse_json(path.read_bytes(), origin=path.name)


def deployment(subject: Subject) -> str | None:
    """The command that serves the output from its own folder on one card; None where vLLM does not take the family."""
    try:
        return shlex.join(serving.command(subject.inventory, model="."))
    except UnsupportedError:
        return None


def inline(text: str) -> str:
    """Text that somebody else chose, on one line and without a meaning in Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~&])", r"\\\1", " ".join(text.split()))


def figure_text(figure: Mapping[str, float | None], digits: int) -> str:
    """A measured value with its standard error, where it has one."""
    value, spread = figure["value"], figure["standard_error"]
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


@dataclass(frozen=True)
class Scores:
    """The table of an evaluation, for a card or a page.

    Attributes:
        columns: the models, with the share of experts removed.
        rows: a benchmark, and a figure in percent or a reason by model.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, evaluation: Mapping[str, Any]) -> Scores:
        """Read what `eval` left: models, and by benchmark a cell for each."""
        models = [
            model["name"] + (f" (-{100 * model['compression']:.0f} %)" if model["compression"] else "")
            for model in evaluation["models"]
        ]
        rows = [(row["name"], tuple(map(_cell_text, row["cells"]))) for row in evaluation["benchmarks"]]
        return cls(tuple(models), tuple(rows))


def _cell_text(cell: Mapping[str, Any]) -> str:
    if cell["value"] is None:
        return f"not run: {cell['error']}"

    def percent(figure: Mapping[str, float | None], sign: str = "") -> str:
        value, spread = figure["value"] or 0.0, figure["standard_error"]
        return f"{100 * value:{sign}.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")

    text = percent(cell) + (f" ({percent(cell['difference'], '+')})" if cell["difference"] is not None else "")
    return ", ".join([text, *cell["notes"]])


def _front_matter(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What the source's README says to the hub; nothing where it has none, or one that cannot be read."""
    import yaml

    path = checkpoint.path / CARD_NAME
    if not path.is_file() or not is_inside(path, checkpoint.path):
        return {}
    try:
        match = _FRONT_MATTER.match(path.read_text(encoding="utf-8"))
        stated = yaml.safe_load(match[1]) if match else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return stated if isinstance(stated, dict) else {}


def _metadata(subject: Subject) -> str:
    from huggingface_hub import ModelCardData

    carried = dict(subject.carried)
    model_type = str(text_section(subject.config).get("model_type", subject.config["model_type"]))
    tags = [
        model_type,
        "moe",
        "pruned" if subject.merging is None else "merged",
        *(["reap"] if subject.plan.criterion == "reap" else []),
        "reapkit",
    ]
    pipeline = carried.pop("pipeline_tag", "text-generation" if _is_causal(subject) else None)
    data = ModelCardData(
        base_model=subject.parent,
        library_name=carried.pop("library_name", "transformers"),
        pipeline_tag=pipeline,
        tags=tags,
        **carried,
    )
    return str(data.to_yaml())


def _is_causal(subject: Subject) -> bool:
    classes = subject.config.get("architectures")
    return isinstance(classes, list) and any(str(name).endswith("ForCausalLM") for name in classes)


def _body(subject: Subject) -> Iterator[str]:
    plan, name = subject.plan, inline(subject.parent_name)
    removed = plan.num_experts - plan.num_kept
    if subject.merging is not None:
        method = f"expert merging by {inline(subject.merging.method)}"
    else:
        method = REAP_TITLE if plan.criterion == "reap" else f"expert pruning by the criterion {inline(plan.criterion)}"
    yield f"# {name}, {plan.num_kept} of {plan.num_experts} experts"
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", subject.parent or "")
    linked = f"[{name}](https://huggingface.co/{subject.parent})" if is_id else name
    if subject.merging is not None:
        yield (
            f"{linked} with the {plan.num_experts} experts of every MoE layer merged into {plan.num_kept}, without fine-tuning. Each token "
            f"still runs {plan.top_k} experts. The other weights are the original's"
            + (", multiplied out to bf16." if subject.dequantize else ", byte for byte.")
        )
    else:
        yield (
            f"{linked} with {removed} of its {plan.num_experts} experts removed from every MoE layer, without fine-tuning. Each token "
            f"still runs {plan.top_k} experts. What was kept is the original's, "
            + ("multiplied out to bf16." if subject.dequantize else "byte for byte.")
        )
    yield "\n".join(f"- **{label}**: {value}" for label, value in _specification(subject, linked, method))
    yield "\n".join([BEGIN, END])
    if (command := deployment(subject)) is not None:
        yield "## Use"
        yield f"In this folder, with [vLLM](https://docs.vllm.ai):\n\n```bash\n{command}\n```"
    yield "## How it was made"
    yield "\n".join(f"- {sentence}" for sentence in _making(subject))
    if plan.criterion == "reap":
        yield f"## Citation\n\n```bibtex\n{CITATION}\n```"


def _specification(subject: Subject, base: str, method: str) -> Iterator[tuple[str, str]]:
    plan, layout, section = subject.plan, subject.layout, text_section(subject.config)
    yield "Base model", base
    yield "Compression method", method
    share = 1 - plan.num_kept / plan.num_experts
    yield "Compression ratio", f"{100 * share:.1f} % of the experts"
    yield "Type", "sparse Mixture-of-Experts" + (" causal language model" if _is_causal(subject) else "")
    if subject.counts_parameters:
        held = subject.inventory
        yield "Parameters", f"{held.parameters:,} in total, {held.active_parameters:,} activated per token"
    yield "Size of the tensors", f"{subject.output.nbytes:,} bytes"
    yield "Layers", f"{layout.num_layers}, {len(layout.layer_indices)} of them with experts"
    heads, groups = section.get("num_attention_heads"), section.get("num_key_value_heads")
    if type(heads) is int:
        yield "Attention heads", f"{heads}" + (f", {groups} for keys and values" if type(groups) is int else "")
    verb = "kept" if subject.merging is None else "merged"
    yield "Experts", f"{plan.num_kept} per layer, {verb} from {plan.num_experts}"
    yield "Activated experts", f"{plan.top_k} per token"
    if type(context := section.get("max_position_embeddings")) is int:
        yield "Context length", f"{context:,} tokens"
    carried = subject.carried
    if stated := carried.get("license_name") or carried.get("license"):
        link = carried.get("license_link") or next(iter(subject.licence_files), None)
        yield "Licence", inline(stated) + (f" ([text]({_target(link)}))" if link else "")
    elif subject.licence_files:
        yield "Licence", ", ".join(f"[{inline(name)}]({_target(name)})" for name in subject.licence_files)


def _target(link: str) -> str:
    """A link's target that ends where it should."""
    return "<" + re.sub(r"[<>\s]", "", link) + ">"


def _making(subject: Subject) -> Iterator[str]:
    from importlib.metadata import version

    plan = subject.plan
    what = "kept experts" if subject.merging is None else "groups of experts"
    yield f"Written by reapkit {version('reapkit')}; `reapkit.json` has the {what} of every layer and the routers' names."
    if subject.merging is not None:
        rows = "the averages of its members'" if subject.merging.router == "average" else "its centre's own"
        yield f"Experts became averages of groups by the method `{inline(subject.merging.method)}`; a group's router row is {rows}."
    elif plan.criterion == "random":
        yield f"The experts were chosen at random, with the seed {plan.seed}."
    else:
        yield f"The experts were chosen by the criterion `{inline(plan.criterion)}`."
    if plan.criterion != "random" and (digests := ", ".join(f"`{inline(digest)}`" for digest in plan.calibration)):
        yield f"SHA-256 of the calibration's tokens: {digests}."
    for layer, like in plan.unmeasured.items():
        yield f"The MTP layer {layer} was not measured and keeps the experts of layer {like}."
    if plan.drop_mtp:
        yield "The MTP layers were removed."
    if subject.dequantize:
        yield "Quantised weights were multiplied out to bf16."


def _calibration_section(statistics: Statistics) -> Iterator[str]:
    text = f"{statistics.num_tokens:,} tokens, in the domains {', '.join(map(inline, statistics.domains))}"
    if names := _public_sources(statistics.calibration):
        text += f"; among them from {', '.join(map(inline, names))}"
    yield f"## Calibration text\n\n{text}.\n"


def _public_sources(records: Sequence[CalibrationRecord]) -> list[str]:
    """The hub data sets among the sources; files have names of somebody's disk."""
    named = [DataSource.parse(str(source["source"])) for record in records for source in record.sources]
    hub = [
        source for source in named if re.fullmatch(r"[\w.-]+/[\w.-]+", source.name) and not looks_like_path(source.name)
    ]
    return list(dict.fromkeys(source.name + (f" ({source.subset})" if source.subset else "") for source in hub))


def _fidelity_section(fidelity: Mapping[str, Any]) -> Iterator[str]:
    rows = [*fidelity["domains"].items(), ("all", fidelity["overall"])]
    yield "## Against the original\n"
    yield "On held-out text; ± is one standard error.\n"
    yield "| domain | tokens | KL, nats/token | top-1 agreement | perplexity of the original | of this model |"
    yield "|---|---|---|---|---|---|"
    for name, row in rows:
        cells = [f"{row['tokens']:,}", figure_text(row["kl"], 4), figure_text(row["top1"], 3)]
        cells += [figure_text(row[key], 2) for key in ("perplexity_original", "perplexity_pruned")]
        yield f"| {inline(name)} | " + " | ".join(cells) + " |"


def _evaluation_section(evaluation: Mapping[str, Any]) -> Iterator[str]:
    scores = Scores.of(evaluation)
    yield "\n## Evaluation\n"
    yield "In percent; ± is one standard error, in brackets the difference to the first model.\n"
    yield f"| benchmark | {' | '.join(map(inline, scores.columns))} |"
    yield "|---|" + "---|" * len(scores.columns)
    for name, cells in scores.rows:
        yield f"| {inline(name)} | {' | '.join(map(inline, cells))} |"
