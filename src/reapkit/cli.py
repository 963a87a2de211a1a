"""The command line: verbs, progress, printing. The only module that prints or exits.

Results go to standard output or to the file named by -o; progress, notes and errors go to standard error.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reapkit import __version__
from reapkit.errors import EvaluationError, ReapkitError, UsageError, did_you_mean, redacted, require_used
from reapkit.interrupts import heard, ignore_once_stopping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reapkit.behaviour import Behaviour
    from reapkit.capacity import Capacity, Demand
    from reapkit.evidence import Evidence
    from reapkit.fidelity import Fidelity
    from reapkit.figures import Figure
    from reapkit.inventory import Inventory
    from reapkit.layout import Architecture
    from reapkit.observation import Estimate, Observation, Run
    from reapkit.plans import Choice, PruningPlan
    from reapkit.probes import Probe
    from reapkit.progress import Progress
    from reapkit.publishing import Upload
    from reapkit.serving import Deployment
    from reapkit.shards import Manifest
    from reapkit.verification import Verification

app = typer.Typer(
    name="reapkit",
    help="Prune experts from Mixture-of-Experts checkpoints: observe, plan, prune, verify, compare.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Where no terminal says how wide it is, lines are not folded at rich's 80 columns.
WIDTH_OF_FILES = 160
out = Console(width=None if sys.stdout.isatty() else WIDTH_OF_FILES)
err = Console(stderr=True)

# Where suspended activations are kept, in words.
_PLACES = {"device": "on the device", "host": "in the host's pinned memory", "disk": "in temporary files"}
# Control signs and escapes, line breaks of every kind, halves of surrogate pairs, and signs that turn the direction of writing.
_STEERING = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")

EXIT_ANSWERED_NO = 3
EXIT_SIGNALLED = 128  # plus the signal's number, as shells count: 130 for Ctrl-C

Function = TypeVar("Function", bound=Callable[..., None])

# ---- options that several verbs share -------------------------------------------------------------------------------------------

Source = Annotated[str, typer.Argument(metavar="SRC", help="a checkpoint's folder, or a hub id like ORG/NAME")]
Data = Annotated[
    list[str],
    typer.Option("--data", metavar="D", help="[DOMAIN=]SOURCE[SUBSET](SPLIT)[:SAMPLES]: a file, a hub data set or reap-mix; repeatable"),
]  # fmt: skip
Ratio = Annotated[str | None, typer.Option(metavar="R", help="share of the experts to remove, a decimal: 0.25")]
Keep = Annotated[int | None, typer.Option(metavar="K", help="experts to keep per layer")]
DivisibleBy = Annotated[
    int, typer.Option(metavar="N", help="round the number that stays up to a multiple: cards that share experts")
]
CriterionOption = Annotated[str, typer.Option(metavar="C", help="how experts are scored; see reapkit list criteria")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; a GPU where there is one by default")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16, or to observe float8; bfloat16 on a GPU and float32 on a CPU by default"
    ),
]
Budget = Annotated[
    str | None,
    typer.Option("--activation-budget", metavar="B", help="memory for suspended activations, like 24GB; by default a share of free memory"),
]  # fmt: skip
Activations = Annotated[
    str | None,
    typer.Option(metavar="PLACE", help="where suspended activations are kept: device, host or disk; chosen by size and rates by default"),
]  # fmt: skip
DiskBudget = Annotated[
    str | None,
    typer.Option(metavar="B", help="disk for layers on their way from the hub, like 40GB; by default what is useful"),
]  # fmt: skip
MaxLength = Annotated[
    int, typer.Option(metavar="N", min=2, help="tokens per document; longer samples are split into windows")
]
Seed = Annotated[int, typer.Option(metavar="N", help="of the choice of samples and of the criterion random")]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the checkpoint")]
Dequantize = Annotated[bool, typer.Option("--dequantize", help="write quantised weights as bf16")]
Mtp = Annotated[
    str | None,
    typer.Option("--mtp", metavar="POLICY", help="MTP layers with experts: same-as-last (the default), same-as-layer-N or drop"),
]  # fmt: skip
AllowMissingScales = Annotated[
    bool, typer.Option("--allow-missing-scales", help="go on where a kept expert lacks a scale that others have")
]
BaseModel = Annotated[str | None, typer.Option(metavar="ID", help="hub id to record as the parent")]
GpuOption = Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="kind of card; see reapkit list gpus")]
CountOption = Annotated[int | None, typer.Option("--count", metavar="N", help="number of such cards; 1 by default")]
ContextOption = Annotated[
    int | None, typer.Option("--max-model-len", metavar="N", help="tokens per sequence; the model's own by default")
]
KvDtype = Annotated[str, typer.Option("--kv-cache-dtype", metavar="D", help="of the cache: auto (bf16) or fp8")]
Utilization = Annotated[
    float | None, typer.Option("--gpu-memory-utilization", metavar="S", help="share of a card's memory to take; 0.92 by default")
]  # fmt: skip
Private = Annotated[bool, typer.Option("--private", help="make a new repository private")]
RerouteTokens = Annotated[
    int, typer.Option(metavar="N", min=0, help="sample N tokens for the criterion reroute, into a file beside the statistics: 32768")
]  # fmt: skip
RerouteCandidates = Annotated[
    int, typer.Option(metavar="C", min=2, help="best-ranked experts that are run on each sampled token")
]
Weights = Annotated[
    str, typer.Option(metavar="W", help="of tokens under reroute: residual, relative, plain, each also with -balanced")
]
BlendOption = Annotated[
    str | None,
    typer.Option("--blend", metavar="B", help="how domains count: uniform, max-min (for the worst one), or weights like code=2,math=1"),
]  # fmt: skip
Protect = Annotated[str | None, typer.Option(metavar="WHAT", help="super: keep experts with extreme outputs")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="say what would be done and what it would take, and do nothing")
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no tables: errors only")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show where an error came from")]


def _verb(function: Function) -> Function:
    """Register a verb whose errors become one sentence and the contract's exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with heard(_announce_stop):
                function(*args, **kwargs)
        except BrokenPipeError:
            raise  # whoever reads what is printed has read enough
        except (ReapkitError, OSError) as error:
            if kwargs.get("verbose"):
                _note("\n".join(map(_escape, traceback.format_exc().splitlines())))
            if not isinstance(error, ReapkitError):  # a library's own, of a file that it reads
                error = ReapkitError(f"{error.filename or 'a file'}: {error.strerror or error}")
            _print_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as interruption:
            resumes = function.__name__ in ("observe", "prune", "merge", "compress")
            _note(
                "interrupted" + ("; the same command goes on after the last finished wave or file" if resumes else "")
            )
            raise typer.Exit(EXIT_SIGNALLED + getattr(interruption, "signum", signal.SIGINT)) from None

    passing = (
        {"allow_extra_args": True} if function.__name__ == "serve" else None
    )  # what stands behind -- is the engine's
    app.command(function.__name__.rstrip("_"), context_settings=passing)(run)
    return function


def _announce_stop(until: str) -> None:
    _note(f"stopping when {until}; press Ctrl-C again to stop at once")


def _print_error(error: ReapkitError) -> None:
    _note(f"[bold red]error:[/] {_escape(error.message)}")
    if error.hint:
        _note(f"[bold]hint:[/] {_escape(error.hint)}")


def _note(text: str) -> None:
    err.print(text, highlight=False, soft_wrap=True)


def _given(context: typer.Context) -> set[str]:
    """The names of what stands on the command line, and is no default."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


# ---- verbs ------------------------------------------------------------------------------------------------------------------------


@_verb
def inspect(
    source: Source,
    gpu: GpuOption = None,
    count: CountOption = None,
    max_model_len: ContextOption = None,
    kv_cache_dtype: KvDtype = "auto",
    gpu_memory_utilization: Utilization = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a checkpoint holds, what pruning would leave of it and, with --gpu, whether that fits."""
    from reapkit.capacity import Demand
    from reapkit.inventory import inspect

    if gpu is None and (count, max_model_len, gpu_memory_utilization, kv_cache_dtype) != (None, None, None, "auto"):
        raise UsageError(
            "what fits depends on the card", hint="give --gpu too, for example --gpu h100; see reapkit list gpus"
        )
    demand = Demand(max_model_len, kv_cache_dtype, gpu_memory_utilization)
    with _progress(quiet) as progress:
        inventory = inspect(source, revision=revision, trust_remote_code=trust_remote_code, progress=progress)
    if gpu is not None:
        _print_capacities(inventory, gpu, 1 if count is None else count, demand, as_json=as_json, quiet=quiet)
        return
    if as_json:
        _print_json(inventory.to_json())
        return
    if quiet:
        return
    about = " (sizes estimated from the configuration)" if inventory.estimated else ""
    out.print(
        f"[bold]{_escape(inventory.origin)}[/]: {inventory.architecture}, {_escape(inventory.format)}{about}",
        highlight=False,
    )
    out.print(
        f"{inventory.num_layers} layers, {inventory.moe_layers} of them with {inventory.num_experts} experts, "
        f"{inventory.top_k} per token ({inventory.scoring}); {inventory.parameters:,} parameters, "
        f"{inventory.active_parameters:,} active; {_size(inventory.nbytes)} in {inventory.shards} shards",
        highlight=False,
    )
    parts = _table("part", "parameters", "bytes")
    for part in inventory.parts:
        parts.add_row(part.name, f"{part.parameters:,}", _size(part.nbytes))
    out.print(parts)
    left = _table("removed", "experts", "parameters", "active", "bytes")
    for row in inventory.shrunk:
        left.add_row(
            _percent(float(row.ratio)),
            str(row.num_experts),
            f"{row.parameters:,}",
            f"{row.active_parameters:,}",
            _size(row.nbytes),
        )
    out.print(left)
    for note in inventory.notes:
        _note(f"[bold]note:[/] {_escape(note)}")


@_verb
def observe(
    context: typer.Context,
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="STATS", help="statistics file to write")],
    data: Data = ["reap-mix"],  # noqa: B006
    activation_budget: Budget = None,
    activations: Activations = None,
    disk_budget: DiskBudget = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_length: MaxLength = 2048,
    seed: Seed = 0,
    reroute_tokens: RerouteTokens = 0,
    reroute_candidates: RerouteCandidates = 16,
    until_stable: Annotated[
        float | None,
        typer.Option(
            metavar="J",
            help="stop when the sets that halves of the text would keep agree so far, like 0.98; with --ratio or --keep",
        ),
    ] = None,
    ratio: Ratio = None,
    keep: Keep = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure on calibration text how much every expert contributes."""
    from reapkit.checkpoint import Checkpoint
    from reapkit.observation import Observation, Settled
    from reapkit.outputs import require_target, unfinished
    from reapkit.ranks import Ranks
    from reapkit.rerouting import Reroute
    from reapkit.statistics import begun_at

    given = _given(context)
    if until_stable is None:
        require_used(given & {"ratio", "keep"}, (), "observe without --until-stable")
    if not reroute_tokens:
        require_used(given & {"reroute_candidates"}, (), "observe without --reroute-tokens")
    require_target(output)
    run = _run(device, dtype, activation_budget, trust_remote_code, activations, disk_budget)
    ranks = Ranks.from_environment()
    # Of several ranks one speaks; all say what went wrong.
    quiet = quiet or ranks.rank > 0
    reroute = Reroute(reroute_tokens, reroute_candidates) if reroute_tokens else None
    until = None if until_stable is None else Settled(until_stable, ratio, keep)
    revision = revision or _begun_commit(source, begun_at(unfinished(ranks.own(output)), source), quiet=quiet)
    with _progress(quiet) as progress:
        checkpoint = Checkpoint.open(source, revision=revision, progress=progress)
        observation = Observation(
            checkpoint, data, run=run, max_length=max_length, seed=seed, ranks=ranks, reroute=reroute, until=until
        )
    sources = [source.to_json() for source in observation.data.sources]
    _note_calibration(observation.layout.architecture, sources, quiet=quiet)
    if dry_run:
        if ranks.rank == 0:
            _print_estimate(observation.estimate(), as_json=as_json)
        return
    if observation.place != "device" or len(observation.waves) > 1:
        _note_waves(observation, quiet=quiet)
    with _progress(quiet) as progress:
        statistics = observation.write(output, progress=progress)
    if as_json:
        _print_json({"statistics": str(output), "tokens": statistics.num_tokens, "domains": list(statistics.domains),
                     "layers": len(statistics.layers), "digest": statistics.calibration[0].digest})  # fmt: skip
    elif not quiet:
        layers, domains = len(statistics.layers), _escape(", ".join(statistics.domains))
        if until_stable is not None:
            told = (
                "settled after"
                if statistics.num_tokens < observation.data.num_tokens
                else "had not settled before the end of"
            )
            _note(f"the choice {told} {statistics.num_tokens:,} of {observation.data.num_tokens:,} tokens")
        _note(f"wrote {_escape(str(output))}: {layers} layers, {statistics.num_tokens:,} tokens, domains {domains}")


@_verb
def combine(
    parts: Annotated[
        list[Path], typer.Argument(metavar="STATS STATS…", help="statistics of one model on different text")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="STATS", help="statistics file to write")],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Add up statistics that were observed on different text, or on different machines."""
    from reapkit.statistics import Statistics, combine

    if len(parts) < 2:
        raise UsageError(
            "combining takes two statistics files or more",
            hint="for example: reapkit combine a.safetensors b.safetensors -o ab.safetensors",
        )
    statistics = combine([Statistics.load(part) for part in parts])
    statistics.save(output)
    if as_json:
        _print_json({"statistics": str(output), "tokens": statistics.num_tokens, "domains": list(statistics.domains)})
    elif not quiet:
        _note(f"wrote {_escape(str(output))}: {statistics.num_tokens:,} tokens")


@_verb
def plan(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="STATS|SRC",
            help="statistics, a file or hub://ORG/NAME; random and aimer take a checkpoint, --recover the pruned one",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PLAN", help="plan to write")],
    criterion: CriterionOption = "reap",
    ratio: Ratio = None,
    keep: Keep = None,
    divisible_by: DivisibleBy = 1,
    weights: Weights = "residual",
    blend: BlendOption = None,
    protect: Protect = None,
    recover: Annotated[
        str | None,
        typer.Option(
            metavar="PARENT", help="read which experts the pruned checkpoint SRC kept of PARENT, from its router"
        ),
    ] = None,
    evidence: Annotated[
        bool, typer.Option("--evidence", help="show how far the choice can be trusted, and store it beside the plan")
    ] = False,
    seed: Seed = 0,
    revision: Revision = None,
    publish: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="upload plan and statistics to this repository on the hub")
    ] = None,
    private: Private = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Choose the experts that stay; takes seconds and no device."""
    from reapkit import criteria, publishing, recovery
    from reapkit.evidence import beside as evidence_beside
    from reapkit.plans import choose

    given = _given(context)
    if recover is not None:
        target = {"criterion", "ratio", "keep", "divisible_by", "publish", "private"}
        require_used(given & (criteria.OPTIONS | target), recovery.USED, "--recover")
        _recover(recover, source, None if dry_run else output, revision, as_json=as_json, quiet=quiet)
        return
    criteria.require_used(criterion, given)
    if publish is None:
        require_used(given & {"private"}, (), "plan without --publish")
    with _progress(quiet) as progress:
        if criterion == "aimer" and Path(source).suffix != ".safetensors":
            from reapkit.compression import choose_by_weights

            choice = choose_by_weights(
                source, ratio=ratio, keep=keep, divisible_by=divisible_by, revision=revision, progress=progress
            )
        else:
            choice = choose(
                source, criterion=criterion, ratio=ratio, keep=keep, divisible_by=divisible_by, weights=weights,
                blend=blend, protect=protect, seed=seed, revision=revision, progress=progress,
            )  # fmt: skip
        found = _gather(choice, source, ratio, progress) if evidence else None
    _note_rounding(choice.plan, ratio, keep, divisible_by, quiet=quiet)
    if not dry_run:
        choice.plan.save(output)
        if found is not None:
            found.save(evidence_beside(output))
    upload = publishing.publish(choice, publish, private=private, dry_run=dry_run) if publish else None
    if as_json:
        described = _described_choice(choice, None if dry_run else output)
        described |= {} if found is None else {"evidence": found.to_json()}
        _print_json(described | ({} if upload is None else {"upload": asdict(upload)}))
    elif not quiet:
        _print_choice(choice)
        if found is not None:
            _print_evidence(found)
        _note_unmeasured(choice.plan)
        _note("nothing written" if dry_run else f"wrote {_escape(str(output))}")
        if upload is not None:
            _note_upload(upload)


def _begun_commit(source: str, commit: str | None, *, quiet: bool) -> str | None:
    """The commit that an interrupted run began with, said to whoever repeats it: the branch may have moved."""
    if commit is not None and not quiet:
        _note(f"goes on with {_escape(source)} at {commit[:12]}, as it began")
    return commit


def _gather(choice: Choice, source: str, ratio: str | None, progress: Progress) -> Evidence:
    from reapkit.evidence import gather
    from reapkit.plans import open_sample
    from reapkit.samples import beside

    if choice.statistics is None:
        raise UsageError(
            "--evidence needs statistics", hint="first: reapkit observe SRC --data … -o statistics.safetensors"
        )
    path = beside(Path(source))
    sample = open_sample(path, choice.statistics) if path.exists() else None
    return gather(choice, choice.statistics, sample=sample, ratio=ratio, progress=progress)


def _print_evidence(found: Evidence) -> None:
    table = _table("layer", "agreement of halves", "predicted error", "never routed")
    for layer in found.layers:
        error = "-" if layer.predicted_error is None else _percent(layer.predicted_error)
        never = ", ".join(map(str, layer.never_routed)) or "-"
        table.add_row(str(layer.layer), f"{layer.agreement:.3f}", error, never)
    out.print(table)
    growth = _table("tokens", "agreement with all")
    for part in found.growth:
        growth.add_row(f"{part.tokens:,}", f"{part.agreement:.3f}")
    out.print(growth)
    domains = list(dict.fromkeys(part.domain for part in found.coverage))
    covered = _table("routed pairs kept, removing", *domains)
    for ratio in dict.fromkeys(part.ratio for part in found.coverage):
        shares = [part.routed for part in found.coverage if part.ratio == ratio]
        covered.add_row(_percent(float(ratio)), *(_percent(share) for share in shares))
    out.print(covered)


def _recover(
    parent: str, pruned: str, output: Path | None, revision: str | None, *, as_json: bool, quiet: bool
) -> None:
    from reapkit.recovery import recover

    with _progress(quiet) as progress:
        found = recover(parent, pruned, revision=revision, progress=progress)
    if output is not None:
        found.save(output)
    if as_json:
        _print_json({"plan": None if output is None else str(output), **found.to_json()})
    elif not quiet:
        written = "nothing written" if output is None else f"wrote {_escape(str(output))}"
        _note(f"{written}: {found.num_kept} of {found.num_experts} experts stayed in each of {len(found.kept)} layers")


@_verb
def prune(
    source: Source,
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="the plan: a file, or hub://ORG/NAME[@REVISION]")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="folder to write, new or an interrupted run's")
    ],
    dequantize: Dequantize = False,
    base_model: BaseModel = None,
    mtp: Mtp = None,
    allow_missing_scales: AllowMissingScales = False,
    revision: Revision = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the checkpoint that a plan leaves, byte for byte."""
    from reapkit.compression import open_planned, prune, transfer
    from reapkit.plans import PruningPlan

    chosen = PruningPlan.load(plan)
    with _progress(quiet) as progress:
        checkpoint = open_planned(source, chosen, revision=revision, progress=progress)
        manifest = prune(
            checkpoint,
            chosen,
            output,
            dequantize=dequantize,
            base_model=base_model,
            mtp=mtp,
            allow_missing_scales=allow_missing_scales,
            dry_run=dry_run,
            progress=progress,
        )
    moved = transfer(checkpoint, chosen, dequantize=dequantize, mtp=mtp) if dry_run else None
    if as_json:
        _print_json({**asdict(manifest), **({} if moved is None else {"transfer": asdict(moved)})})
    elif not quiet:
        verb = "would write" if dry_run else "wrote"
        _note(f"{verb} {_escape(str(output))}: {_shrinking(manifest)}")
        if moved is not None and moved.moved_bytes:
            of_it = f"{_size(moved.kept_bytes)} of it kept, in {moved.requests:,} ranges"
            _note(f"would move {_size(moved.moved_bytes)} from the hub, {of_it}")
        _note_output(manifest)


@_verb
def merge(
    source: Source,
    statistics: Annotated[Path, typer.Argument(metavar="STATS", help="statistics of SRC")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="folder to write, new or an interrupted run's")
    ],
    method: Annotated[str, typer.Option(metavar="M", help="how experts are merged; see reapkit list methods")],
    ratio: Ratio = None,
    keep: Keep = None,
    router: Annotated[
        str | None, typer.Option(metavar="R", help="router rows of a group: their average, or the centre's own")
    ] = None,
    data: Data = ["reap-mix"],  # noqa: B006
    tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="of the text, on which the similarity of experts is measured")
    ] = 16_384,
    activation_budget: Budget = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_length: MaxLength = 2048,
    seed: Seed = 0,
    base_model: BaseModel = None,
    mtp: Mtp = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint whose experts are averages of groups: the baselines that pruning is compared with."""
    from reapkit.merging import merge

    with _progress(quiet) as progress:
        manifest = merge(
            source,
            statistics,
            output,
            method=method,
            ratio=ratio,
            keep=keep,
            router=router,
            data=data,
            tokens=tokens,
            run=_run(device, dtype, activation_budget, trust_remote_code),
            max_length=max_length,
            seed=seed,
            base_model=base_model,
            mtp=mtp,
            revision=revision,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        _print_json(asdict(manifest))
    elif not quiet:
        verb = "would write" if dry_run else "wrote"
        _note(f"{verb} {_escape(str(output))}: {_shrinking(manifest)}")
        if manifest.dequantized:
            _note("the source is quantised, and averages are not: everything is written in bf16")
        _note_output(manifest)


@_verb
def verify(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="folder that reapkit wrote")],
    source: Annotated[
        str | None, typer.Option(metavar="SRC", help="the source; where it was by default, needed once")
    ] = None,
    refetch: Annotated[
        bool,
        typer.Option(
            "--refetch",
            help="of a source on the hub, fetch what was kept again, and do not trust what was listed as it came",
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check an output against its source and its manifest; exit code 3 if anything is wrong."""
    from reapkit.verification import verify

    with _progress(quiet) as progress:
        verification = verify(output, source=source, refetch=refetch, progress=progress)
    if as_json:
        _print_json(_described(verification))
    elif not quiet:
        _print_verification(verification)
    if not verification.ok:
        raise typer.Exit(EXIT_ANSWERED_NO)


@_verb
def compress(
    context: typer.Context,
    source: Source,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="folder to write, new or an interrupted run's")
    ],
    data: Data = ["reap-mix"],  # noqa: B006
    ratio: Ratio = None,
    keep: Keep = None,
    divisible_by: DivisibleBy = 1,
    criterion: CriterionOption = "reap",
    weights: Weights = "residual",
    blend: BlendOption = None,
    protect: Protect = None,
    reroute_tokens: RerouteTokens = 32768,
    reroute_candidates: RerouteCandidates = 16,
    activation_budget: Budget = None,
    activations: Activations = None,
    disk_budget: DiskBudget = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_length: MaxLength = 2048,
    seed: Seed = 0,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    dequantize: Dequantize = False,
    base_model: BaseModel = None,
    mtp: Mtp = None,
    allow_missing_scales: AllowMissingScales = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Observe, plan, prune and verify in one; repeated after an interruption, it goes on."""
    from reapkit import compression, criteria
    from reapkit.compression import Target
    from reapkit.ranks import Ranks

    if Ranks.from_environment().count > 1:
        raise UsageError("compress runs in one process", hint="observe with torchrun, then plan and prune")
    # Text is sampled by the seed, and the source has the revision, whatever the criterion.
    criteria.require_used(criterion, _given(context) - {"seed", "revision"})
    run = _run(device, dtype, activation_budget, trust_remote_code, activations, disk_budget)
    target = Target(ratio, keep, criterion, weights, blend, protect, reroute_tokens, reroute_candidates, divisible_by)
    revision = revision or _begun_commit(source, compression.begun_with(source, output), quiet=quiet)
    text: dict[str, Any] = {"data": data, "run": run, "max_length": max_length, "seed": seed, "revision": revision}
    fixed: dict[str, Any] = {"dequantize": dequantize, "mtp": mtp, "allow_missing_scales": allow_missing_scales}
    if dry_run:
        with _progress(quiet) as progress:
            observation, manifest = compression.prepare(source, output, target, **text, **fixed, progress=progress)
        sources = [source.to_json() for source in observation.data.sources]
        _note_calibration(observation.layout.architecture, sources, quiet=quiet)
        _print_estimate(observation.estimate(), as_json=as_json, output_bytes=manifest.after.bytes)
        return
    with _progress(quiet) as progress:
        result = compression.compress(source, output, target, **text, **fixed, base_model=base_model, progress=progress)
    _note_rounding(result.choice.plan, ratio, keep, divisible_by, quiet=quiet)
    if as_json:
        _print_json(
            {
                "statistics": str(result.statistics),
                "plan": _described_choice(result.choice, None),
                "manifest": asdict(result.manifest),
                "verification": _described(result.verification),
            }
        )
    elif not quiet:
        observed = result.choice.statistics.calibration[0].sources if result.choice.statistics else ()
        _note_calibration(result.architecture, observed, quiet=quiet)
        _print_choice(result.choice)
        _note(f"wrote {_escape(str(output))}: {_shrinking(result.manifest)}")
        _note_output(result.manifest)
        _print_verification(result.verification)
    if not result.verification.ok:
        raise typer.Exit(EXIT_ANSWERED_NO)


@_verb
def compare(
    context: typer.Context,
    original: Annotated[str, typer.Argument(metavar="A", help="the original: a folder or hub id")],
    pruned: Annotated[str, typer.Argument(metavar="B", help="the pruned model: a folder or hub id")],
    data: Annotated[list[str], typer.Option("--data", metavar="D", help="held-out text, as in observe; repeatable")],
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="prompts, to compare replies: JSON lines with messages or a prompt"),
    ] = None,
    endpoint: Annotated[
        list[str],
        typer.Option(metavar="URL", help="servers of A and of B, for replies of models that do not fit into memory"),
    ] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="prompts to take")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="tokens of a reply")] = 1024,
    fail_on: Annotated[
        str | None,
        typer.Option(
            metavar="M=X,…",
            help="exit with 3 if kl or loops are above, top1 below their limit: kl=0.1,loops=0.02,top1=0.9",
        ),
    ] = None,
    activation_budget: Budget = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_length: MaxLength = 2048,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure how far a pruned model is from its parent on held-out text and, with prompts, in its replies."""
    from dataclasses import replace

    from reapkit.behaviour import Prompt, Replier, ask, observe_behaviour, read_prompts
    from reapkit.endpoints import connect
    from reapkit.fidelity import compare, failed_thresholds, keep, parse_thresholds

    if prompts is None:
        require_used(_given(context) & {"limit", "max_tokens"}, (), "compare without --prompts")
    limits = parse_thresholds(fail_on, with_prompts=prompts is not None) if fail_on else {}
    if endpoint and (prompts is None or len(endpoint) != 2):
        raise UsageError(
            f"{len(endpoint)} endpoints and {'no prompts' if prompts is None else 'prompts'}: replies take two servers, A's and B's",
            hint="--prompts FILE --endpoint URL --endpoint URL",
        )
    run = _run(device, dtype, activation_budget, trust_remote_code)
    repliers: list[Replier] = []
    rows: list[Prompt] = []
    notes: list[str] = []
    skipped = 0
    if prompts is not None:
        rows, skipped = read_prompts(prompts, limit=limit)
        if endpoint:
            repliers = [ask(connect(url)) for url in endpoint]
        else:
            from reapkit.generation import LoadedModel

            with _progress(quiet) as progress:
                models = [LoadedModel(source, run, progress=progress) for source in (original, pruned)]
            repliers = [model.reply_all for model in models]
            if not all(model.knows_calls for model in models) and any(row.tools for row in rows):
                notes.append(
                    "tool calls in this model's format are read by servers alone: valid and exact calls are not measured"
                )
    with _progress(quiet) as progress:
        fidelity = compare(original, pruned, data, run=run, max_length=max_length, seed=seed, progress=progress)
        if rows:
            behaviour = observe_behaviour(rows, *repliers, max_tokens=max_tokens, progress=progress)
            if notes:
                behaviour = replace(behaviour, valid_calls=None, exact_calls=None, notes=tuple(notes))
            fidelity = replace(fidelity, behaviour=behaviour)
    _note_sources(fidelity.sources, quiet=quiet)
    if skipped and not quiet:
        _note(f"{prompts}: {skipped:,} rows are no prompts")
    failed = failed_thresholds(fidelity, limits)
    if as_json:
        _print_json({**fidelity.to_json(), "failed": failed})
    elif not quiet:
        _print_fidelity(fidelity, seed)
    # After the figures are shown: a folder that cannot be written to must not cost them.
    if (path := keep(fidelity, pruned)) is not None:
        if not quiet:
            _note(f"wrote {_escape(str(path))}")
        _refresh_card(Path(pruned), quiet=quiet)
    for sentence in failed:
        _note(f"[bold red]failed:[/] {_escape(sentence)}")
    if limits and not failed and not quiet and not as_json:
        out.print(f"passed: {fail_on}", highlight=False)
    if failed:
        raise typer.Exit(EXIT_ANSWERED_NO)


def _refresh_card(folder: Path, *, quiet: bool) -> None:
    """Bring new results into an output's model card; one that was edited out of shape costs them nothing."""
    from reapkit import cards

    try:
        is_changed = cards.refresh(folder)
    except ReapkitError as error:
        _note(f"[bold]note:[/] the model card was left as it is: {_escape(error.message)}")
    else:
        if is_changed and not quiet:
            _note(f"brought the results into {_escape(str(folder / 'README.md'))}")


def _print_fidelity(fidelity: Fidelity, seed: int) -> None:
    """Replies side by side where there are any, then the figures."""
    if fidelity.behaviour is not None:
        _print_replies(fidelity.behaviour)
    rows = [*fidelity.domains.items(), ("overall", fidelity.overall)]
    table = _table("domain", "tokens", "KL, nats/token", "top-1 agreement", "top-5", "perplexity", "of the pruned")
    for name, row in rows:
        perplexities = (_figure(row.perplexity_original, 2), _figure(row.perplexity_pruned, 2))
        agreements = (_figure(row.top1, 3), _figure(row.top5, 3))
        table.add_row(name, f"{row.tokens:,}", _figure(row.kl, 4), *agreements, *perplexities)
    out.print(table)
    drift = _table("layer", "output error", "routed to dropped", "routing changed")
    for layer in fidelity.overall.layers:
        routing = (_figure(layer.routed_to_dropped, 3), _figure(layer.routing_changed, 3))
        drift.add_row(str(layer.layer), _figure(layer.output_error, 4), *routing)
    out.print()
    out.print(drift)
    if fidelity.overall.error_growth is not None:
        out.print(
            f"the output error grows by a factor of {_figure(fidelity.overall.error_growth, 3)} per layer",
            highlight=False,
        )
    out.print()
    if fidelity.behaviour is not None:
        _print_behaviour(fidelity.behaviour)
    out.print(f"{fidelity.overall.tokens:,} tokens, {fidelity.overall.samples:,} samples, seed {seed}; +- is one standard error",
              highlight=False)  # fmt: skip
    for note in fidelity.to_json()["notes"]:
        _note(f"[bold]note:[/] {_escape(note)}")


def _print_replies(behaviour: Behaviour) -> None:
    for number, (prompt, ours, theirs) in enumerate(behaviour.replies, start=1):
        asked = str(prompt.messages[-1].get("content"))
        out.print(f"[bold]prompt {number}:[/] {_escape(asked)}", highlight=False)
        table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False, expand=True)
        for name in ("original", "pruned"):
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(_escape(ours.text.strip()), _escape(theirs.text.strip()))
        out.print(table)
        out.print()


def _print_behaviour(behaviour: Behaviour) -> None:
    table = _table("replies", "original", "pruned")
    pairs = {
        "loops": behaviour.loops,
        f"unfinished after {behaviour.max_tokens:,} tokens": behaviour.unfinished,
        "valid tool calls": behaviour.valid_calls,
        "exact tool calls": behaviour.exact_calls,
        "right final answers": behaviour.right_answers,
    }
    for name, pair in pairs.items():
        if pair is not None:
            table.add_row(name, _figure(pair.original, 3), _figure(pair.pruned, 3))
    table.add_row("length, to the original's", "1", _figure(behaviour.length_ratio, 3))
    table.add_row("same final answer", "1", _figure(behaviour.same_answers, 3))
    out.print(table)


@_verb
def eval_(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]MODEL|URL…", help="checkpoints or OpenAI-compatible servers, the original first"
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="folder for eval.json, table.md and the logs")
    ] = Path("evaluation"),
    suite: Annotated[
        str, typer.Option(metavar="S", help="card, multiple-choice, or an inspect task: inspect_evals/NAME or file.py")
    ] = "card",
    only: Annotated[list[str], typer.Option(metavar="NAME", help="of the card's benchmarks, these; repeatable")] = [],  # noqa: B006
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="problems of each benchmark, the first so many")
    ] = None,
    replies: Annotated[Path | None, typer.Option(metavar="FILE", help="score these replies; no model is asked")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where problems' files lie; from the hub by default")
    ] = None,
    user: Annotated[
        str | None, typer.Option(metavar="MODEL|URL", help="who plays tau2-bench's user, the same for all models")
    ] = None,
    temperature: Annotated[float, typer.Option(metavar="T", min=0.0, help="of the sampling")] = 1.0,
    top_p: Annotated[float | None, typer.Option(metavar="P", help="of the sampling")] = 0.95,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="of the sampling; the server's by default")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="of a reply; each benchmark's own by default")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="of every problem; 8 of AIME25's and 1 of the others' by default"),
    ] = None,
    message_limit: Annotated[int, typer.Option(metavar="N", min=1, help="turns of a tau2-bench conversation")] = 100,
    sandbox: Annotated[
        str | None,
        typer.Option(metavar="S", help="for programs that a model wrote: docker, bubblewrap, or none at your own risk"),
    ] = None,
    vllm: Annotated[str, typer.Option(metavar="PROGRAM", help="what serves checkpoints")] = "vllm",
    serve_arguments: Annotated[str, typer.Option(metavar="ARGS", help="what it is given besides, as one word")] = "",
    seed: Seed = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run benchmarks on served models, and write the model card's table."""
    import shlex

    from reapkit.evaluation import Sampling, Settings, describe, describe_replies, evaluate, score_replies, write

    sampling = Sampling(temperature, top_p, top_k, seed, max_tokens, repeats)
    settings = Settings(
        suite,
        tuple(only),
        limit,
        data_dir,
        sampling,
        user,
        sandbox,
        vllm,
        tuple(shlex.split(serve_arguments)),
        message_limit,
    )
    if (replies is None) != bool(models):
        raise UsageError(
            "give models to ask, or replies to score", hint="reapkit eval URL URL, or reapkit eval --replies FILE"
        )
    if dry_run:
        _print_json(
            describe(settings, models or []) if replies is None else {"settings": describe_replies(settings, replies)}
        )
        return
    with _progress(quiet) as progress:
        if replies is not None:
            evaluation = score_replies(replies, settings, progress=progress)
            write(evaluation, output)
        else:
            evaluation = evaluate(models or [], settings, out=output, progress=progress)
    if replies is not None and (unknown := evaluation.settings["unknown"]):
        _note(f"[bold]note:[/] {len(unknown)} problems that {_escape(str(replies))} replies to are not among those read: "
              f"{_escape(', '.join(unknown[:3]))}{'…' if len(unknown) > 3 else ''}")  # fmt: skip
    for folder in evaluation.outputs:
        _refresh_card(folder, quiet=quiet)
    if as_json:
        _print_json(evaluation.to_json())
    elif not quiet:
        out.print(evaluation.table(), highlight=False, markup=False)
        _note(f"wrote {_escape(str(output / 'eval.json'))} and {_escape(str(output / 'table.md'))}")
    if not evaluation.complete:
        empty = sum(cell.figure is None for cells in evaluation.rows.values() for cell in cells)
        raise EvaluationError(f"{empty} of {sum(map(len, evaluation.rows.values()))} cells are empty; the table says why",
                              hint="the same command tries these again and keeps the others")  # fmt: skip


@_verb
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a checkpoint's folder, or a hub id like ORG/NAME")],
    engine: Annotated[str, typer.Option(metavar="E", help="vllm, sglang or transformers")] = "vllm",
    gpu: GpuOption = None,
    count: CountOption = None,
    max_model_len: ContextOption = None,
    max_num_seqs: Annotated[int | None, typer.Option(metavar="N", help="sequences at once")] = None,
    kv_cache_dtype: KvDtype = "auto",
    gpu_memory_utilization: Utilization = None,
    trust_remote_code: TrustRemoteCode = False,
    start: Annotated[bool, typer.Option("--run", help="start the server and keep it until Ctrl-C or its end")] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="ask a running server everything; with --run, ask and end it; exit code 3 if it fails"
        ),
    ] = False,
    url: Annotated[str | None, typer.Option(metavar="URL", help="of the running server to check")] = None,
    reference: Annotated[
        bool,
        typer.Option("--reference/--no-reference", help="with --check: compare greedy tokens with our own forward"),
    ] = True,
    program: Annotated[
        str | None,
        typer.Option("--program", "--vllm", metavar="PATH", help="the engine: executable, environment or its Python"),
    ] = None,
    host: Annotated[
        str | None, typer.Option(metavar="H", help="address to listen on; with --run 127.0.0.1 by default")
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="P", help="with --run 8000 by default; 0 takes a free one")
    ] = None,
    log: Annotated[Path, typer.Option(metavar="FILE", help="for all that the server prints")] = Path(
        "reapkit-serve.log"
    ),
    timeout: Annotated[float, typer.Option(metavar="S", help="seconds that the start may take")] = 3600.0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: Revision = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Print the command that serves a checkpoint, and with --run start it; words behind -- go to the engine."""
    from reapkit import servers, serving
    from reapkit.capacity import Demand

    if url is not None and (start or not check):
        raise UsageError(
            "--url names a running server, which only --check alone asks", hint="leave out --run, or give --check"
        )
    run = _run(device, dtype, None, trust_remote_code)
    if check and not start:
        address = url or servers.listening(host, port).address
        source = model if reference else None
        _check(address, source, run, as_json=as_json, quiet=quiet, described={}, revision=revision)
        return
    with _progress(quiet) as progress:
        deployment = serving.serve(
            model,
            engine=engine,
            gpu=gpu,
            count=count,
            trust_remote_code=trust_remote_code,
            demand=Demand(max_model_len, kv_cache_dtype, gpu_memory_utilization),
            max_num_seqs=max_num_seqs,
            extra=context.args,
            revision=revision,
            progress=progress,
        )
    listening = servers.listening(host, port)
    fits = deployment.capacity is None or deployment.capacity.max_context > 0
    if start and fits:
        words = servers.find_program(engine, program)
        listening = replace(listening, port=servers.free_port(listening.host, listening.port))
        deployment = serving.listening_on(
            serving.with_program(deployment, words), listening.host, listening.port, by_default=not listening.asked
        )
    elif listening.asked:
        deployment = serving.listening_on(deployment, listening.host, listening.port)
    # With --json there is one object on standard output, which a start completes.
    if not (start and fits and as_json and not dry_run):
        _print_deployment(deployment, as_json=as_json, quiet=quiet)
    if not fits:
        raise typer.Exit(EXIT_ANSWERED_NO)
    if not start or dry_run:
        return
    address = listening.address

    def announce(text: str) -> None:
        if not quiet:
            _note(_escape(text))

    with servers.running(deployment.command, address=address, log=log) as server:
        announce(f"started {engine}, process {server.process.pid}; its output is in {log}")
        server.wait_until_healthy(within_s=timeout, announce=announce)
        announce(f"answers at {address}/v1 after {server.seconds:.0f} s")
        if check:
            source = model if reference else None
            described = deployment.to_json() | {"address": address, "start_seconds": round(server.seconds, 1)}
            _check(address, source, run, as_json=as_json, quiet=quiet, described=described, revision=revision)
            return
        if as_json:
            _print_json(deployment.to_json() | {"address": address, "start_seconds": round(server.seconds, 1)})
            sys.stdout.flush()
        announce("Ctrl-C ends it")
        server.wait()


def _print_deployment(deployment: Deployment, *, as_json: bool, quiet: bool) -> None:
    """The command on standard output, so that a shell can take it; why it is so, and what could go wrong, on standard error."""
    import shlex

    if as_json:
        _print_json(deployment.to_json())
        return
    sys.stdout.write(shlex.join(deployment.command) + "\n")
    if quiet:
        return
    for flag in deployment.flags:
        _note(f"[bold]{_escape(shlex.join(flag.words))}[/]: {_escape(flag.reason)}")
    if (held := deployment.capacity) is not None:
        _note(
            f"[bold]memory[/] of each of {held.parallel.gpus} x {held.gpu.title}: {_size(held.usable)} to take, {_size(held.weights)} "
            f"weights ({held.num_experts} experts), {_size(held.overhead)} allowed for running, {_size(held.cache)} left for the cache"
        )
        _note(
            f"[bold]cache[/]: {_size(held.per_token)} a token, {_size(held.per_sequence)} a sequence of {held.context:,} tokens, of which "
            f"{held.max_num_seqs} fit; the longest single one has {held.max_context:,} tokens"
        )
        if not held.fits:
            _note(
                f"[bold red]does not fit[/]: {_size(held.missing)} a card are missing for one sequence of {held.context:,} tokens"
            )
    for step in deployment.next_steps:
        _note(f"[bold]next step[/]: {_escape(step)}")
    for warning in deployment.warnings:
        _note(f"[bold]note:[/] {_escape(warning)}")


def _check(
    address: str,
    source: str | None,
    run: Run,
    *,
    as_json: bool,
    quiet: bool,
    described: dict[str, Any],
    revision: str | None,
) -> None:
    """Ask a server everything, print the answers, and exit with 3 where one is no."""
    from reapkit import probes

    with _progress(quiet) as progress:
        answers = probes.check(address, source, run=run, revision=revision, progress=progress)
    no = probes.failed(answers)
    if as_json:
        _print_json(described | {"ok": not no, "checks": [answer.to_json() for answer in answers]})
    elif not quiet:
        _print_answers(answers)
    if no:
        raise typer.Exit(EXIT_ANSWERED_NO)


def _print_answers(answers: Sequence[Probe]) -> None:
    table = _table("check", "answer", "seconds", "detail", numbers=False)
    for answer in answers:
        table.add_row(answer.name, answer.verdict, f"{answer.seconds:.1f}", _escape(answer.detail))
    out.print(table)


@_verb
def report(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="folder that reapkit wrote")],
    page: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="page to write: FILE.html")],
    statistics: Annotated[
        Path | None, typer.Option(metavar="STATS", help="statistics behind the plan; those in OUT by default")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="also bring results into OUT's model card")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a page that shows what was compressed and how well it held; it needs no network."""
    from reapkit.outputs import require_target
    from reapkit.reporting import report

    require_target(page)
    written = report(output, page, statistics=statistics, card=card)
    if as_json:
        _print_json({"report": str(written), "bytes": written.stat().st_size})
    elif not quiet:
        _note(f"wrote {_escape(str(written))}: {_size(written.stat().st_size)}")


@_verb
def push(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="folder that reapkit wrote")],
    repository: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="repository on the hub; made where there is none")
    ],
    with_reapkit: Annotated[
        bool, typer.Option("--with-reapkit", help="send the folder reapkit/ too: plan, statistics, reports")
    ] = False,
    private: Private = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Upload an output and its card to the hub."""
    from reapkit.publishing import push

    upload = push(output, repository, with_reapkit=with_reapkit, private=private, dry_run=dry_run)
    if as_json:
        _print_json(asdict(upload))
    elif not quiet:
        if dry_run:
            files = _table("file", "bytes")
            for name, size in upload.files.items():
                files.add_row(_escape(name), _size(size))
            out.print(files)
        _note_upload(upload)


@_verb
def list_(
    what: Annotated[str, typer.Argument(metavar="architectures|criteria|methods|gpus|suites", help="what to list")],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List what reapkit knows."""
    rows = _listings().get(what)
    if rows is None:
        raise UsageError(f"there is no list of {what!r}", hint=did_you_mean(what, _listings()))
    if as_json:
        _print_json(rows)
        return
    # Notes are sentences: below the table, each once.
    columns = [name for name in rows[0] if name != "note"]
    table = _table(*columns, numbers=False)
    notes: dict[str, list[str]] = {}
    for row in rows:
        table.add_row(*(", ".join(row[name]) if isinstance(row[name], list) else row[name] for name in columns))
        if note := row.get("note"):
            notes.setdefault(note, []).append(row[columns[0]])
    out.print(table)
    for note, names in notes.items():
        out.print(f"{', '.join(names)}: {note}", highlight=False, soft_wrap=True)


def _listings() -> dict[str, list[dict[str, Any]]]:
    from reapkit import gpus
    from reapkit.architectures import ARCHITECTURES, described
    from reapkit.benchmarks import SUITES
    from reapkit.clusters import METHODS
    from reapkit.criteria import CRITERIA, OTHERS

    criteria = [
        {"criterion": name, "score": (function.__doc__ or "").splitlines()[0]} for name, function in CRITERIA.items()
    ]
    criteria += [{"criterion": name, "score": sentence} for name, sentence in OTHERS.items()]
    architectures = [described(entry) for entry in ARCHITECTURES]
    methods = [
        {
            "method": name,
            "merges": (method.group.__doc__ or "").partition("\n\n")[0].replace("\n    ", " "),
            "matches neurons by": method.alignment or "-",
            "router": method.router,
        }
        for name, method in METHODS.items()
    ]
    suites = [{"suite": name, "runs": about} for name, about in SUITES.items()]
    cards = [gpus.described(gpu) for gpu in gpus.GPUS]
    return {"architectures": architectures, "criteria": criteria, "methods": methods, "gpus": cards, "suites": suites}


def _version(value: bool) -> None:
    if value:
        out.print(f"reapkit {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    pass


# ---- printing ---------------------------------------------------------------------------------------------------------------------


def _print_json(value: Any) -> None:
    text = redacted(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
    # JSON itself escapes the others.
    sys.stdout.write(
        _STEERING.sub(lambda match: match[0] if match[0] == "\n" else f"\\u{ord(match[0]):04x}", text) + "\n"
    )


def _print_capacities(
    inventory: Inventory, gpu: str, count: int, demand: Demand, *, as_json: bool, quiet: bool
) -> None:
    """What fits on some cards, with the shares of the experts removed that `inspect` also counts."""
    from reapkit import capacity, gpus
    from reapkit.inventory import RATIOS

    card = gpus.find(gpu)
    rows = list(capacity.over_ratios(inventory, card, count, ("0", *RATIOS), demand))
    steps = capacity.next_steps(inventory, card, count, demand)
    if as_json:
        described = [{"ratio": ratio, **held.to_json()} for ratio, held in rows]
        _print_json(inventory.to_json() | {"capacity": described, "next_steps": steps})
        return
    if quiet:
        return
    first = rows[0][1]
    out.print(
        f"[bold]{_escape(inventory.origin)}[/] on {count} x {card.title}, {_size(first.usable)} to take of each, by {_spread(first)}; "
        f"sequences of {first.context:,} tokens, {_size(first.per_token)} of cache a token",
        highlight=False,
        soft_wrap=True,
    )  # fmt: skip
    table = _table("removed", "experts", "weights", "running", "left for cache", "a sequence", "sequences", "longest")
    for ratio, held in rows:
        table.add_row(
            _percent(float(ratio)), str(held.num_experts), _size(held.weights), _size(held.overhead), _size(held.cache),
            _size(held.per_sequence), str(held.max_num_seqs), f"{held.max_context:,}" if held.max_context else "does not fit",
        )  # fmt: skip
    out.print(table)
    for step in steps:
        _note(f"[bold]next step[/] with all experts: {_escape(step)}")


def _spread(held: Capacity) -> str:
    parts = [f"tensor parallelism over {held.parallel.tensor}"] if held.parallel.tensor > 1 else []
    parts += [f"{held.parallel.pipeline} pipeline stages"] if held.parallel.pipeline > 1 else []
    return " and ".join(parts + (["whole experts"] if held.parallel.experts else [])) or "itself"


def _print_estimate(estimate: Estimate, *, as_json: bool, output_bytes: int | None = None) -> None:
    """The estimate of an observation and, where a checkpoint is to follow, the bytes of its tensors."""
    if as_json:
        _print_json({**estimate.to_json(), **({} if output_bytes is None else {"checkpoint_bytes": output_bytes})})
        return
    beside = " beside the process" if estimate.device == "cpu" else ""
    written = f"{_size(estimate.output_bytes)} of statistics"
    if estimate.reroute_bytes:
        written += f", {_size(estimate.reroute_bytes)} of sampled tokens"
    if output_bytes is not None:
        written += f", {_size(output_bytes)} of checkpoint"
    table = _table("what", "estimate")
    rates = f"{estimate.compute_rate:,.0f} tokens/s a layer, {_size(estimate.disk_rate)}/s from disk"
    rows = {
        "tokens": f"{estimate.tokens:,} in {estimate.documents:,} documents",
        "waves": f"{estimate.waves} of {estimate.batches} micro-batches in all",
        "time": f"{_duration(3600 * estimate.hours)} at {rates}",
        "memory": f"{_size(estimate.device_bytes)} on {estimate.device}{beside}",
        "activations": f"{_size(estimate.held_bytes)} {_PLACES[estimate.place]}",
        "dtype": estimate.dtype,
        "read": _size(estimate.read_bytes)
        + (f", {_size(estimate.moved_bytes)} of it from the hub" if estimate.moved_bytes else ""),
        "written": written,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(table)


def _described_choice(choice: Choice, output: Path | None) -> dict[str, Any]:
    from reapkit.plans import losses

    return {
        "plan": None if output is None else str(output),
        "criterion": choice.plan.criterion,
        "num_experts": choice.plan.num_experts,
        "num_kept": choice.plan.num_kept,
        "options": dict(choice.plan.options),
        "super_experts_dropped": {str(layer): list(experts) for layer, experts in choice.super_dropped.items()},
        "layers": [vars(loss) for loss in losses(choice)],
    }


def _print_choice(choice: Choice) -> None:
    from reapkit.plans import losses

    rerouted = bool(choice.eliminations)
    lost = ("predicted error", "out of candidates") if rerouted else ("saliency lost",)
    table = _table("layer", "kept", *lost, "routed pairs lost", "never routed")
    for loss in losses(choice):
        routed = "-" if loss.routed_lost is None else _percent(loss.routed_lost)
        never = ", ".join(map(str, loss.never_routed)) or "-"
        table.add_row(
            str(loss.layer),
            f"{choice.plan.num_kept} of {choice.plan.num_experts}",
            *(_percent(share) for share in (loss.saliency_lost, loss.predicted_error, loss.short) if share is not None),
            routed,
            never,
        )
    out.print(table)
    for layer, experts in choice.super_dropped.items():
        _note(
            f"[bold]note:[/] layer {layer} drops the super experts {', '.join(map(str, experts))}: --protect super keeps them"
        )


def _described(verification: Verification) -> dict[str, Any]:
    return {"ok": verification.ok, **asdict(verification)}


def _print_verification(verification: Verification) -> None:
    for problem in verification.problems:
        _note(f"[bold red]wrong:[/] {_escape(problem)}")
    if verification.ok:
        against = "its source, byte for byte" if verification.against_source else "its recorded digests"
        if verification.num_received:
            against = f"its source's headers and what was received from the hub ({verification.num_received} shards)"
        moved = f"; {_size(verification.moved_bytes)} came through the network" if verification.moved_bytes else ""
        _note(
            f"verified {verification.num_tensors:,} tensors, {_size(verification.num_bytes)}, against {against}{moved}"
        )


def _note_calibration(architecture: Architecture, sources: Sequence[Mapping[str, Any]], *, quiet: bool) -> None:
    """What a person should know of the text, and what text alone cannot measure in this family."""
    _note_sources(sources, quiet=quiet)
    # Statistics from before rows could have images do not count them.
    if architecture.caution and not quiet and not any(source.get("images") for source in sources):
        _note(f"[bold]note:[/] {architecture.name}: {architecture.caution}")


def _note_waves(observation: Observation, *, quiet: bool) -> None:
    """How the text is cut, where the weights are read more than once or activations leave the device."""
    if not quiet:
        reads = _size(observation.model.nbytes_per_pass)
        _note(
            f"{len(observation.waves)} waves, each reads {reads}; activations up to {_size(observation.held_bytes)}, "
            + _PLACES[observation.place]
        )


def _note_rounding(plan: PruningPlan, ratio: str | None, keep: int | None, divisible_by: int, *, quiet: bool) -> None:
    """That more experts stay than were asked for."""
    from reapkit.plans import num_kept

    asked, kept = num_kept(plan.num_experts, ratio=ratio, keep=keep), plan.num_kept
    if kept > asked and divisible_by > 1 and not quiet:
        _note(f"keeping {kept} of {plan.num_experts} experts: {asked} rounded up, to divide by {divisible_by}")


def _note_unmeasured(chosen: Manifest | PruningPlan) -> None:
    """What a person should know of experts that no calibration text went through."""
    for layer, like in chosen.unmeasured.items():
        _note(f"MTP layer {layer} was not measured: it keeps the experts of layer {like}")
    if chosen.drop_mtp:
        _note("the MTP layers were removed")


def _note_output(manifest: Manifest) -> None:
    """The same of an output, and whether its plan was made elsewhere."""
    _note_unmeasured(manifest)
    if manifest.observed_layout != manifest.source.layout:
        _note("the plan was made from a sibling with other tensors and the same routers")


def _note_upload(upload: Upload) -> None:
    what = f"{len(upload.files)} files, {_size(upload.nbytes)}"
    for note in upload.notes:
        _note(f"[bold]note:[/] {_escape(note)}")
    if upload.url is None:
        _note(f"would upload {what} to {_escape(upload.repository)}")
    else:
        _note(f"uploaded {what} to {_escape(upload.repository)}: {_escape(upload.url)}")


def _note_sources(sources: Iterable[Mapping[str, Any]], *, quiet: bool) -> None:
    """What a person should know of the text: what was split, missing or empty."""
    for source in () if quiet else sources:
        name, found = _escape(source["source"]), source["samples"] + source["empty"]
        if split := source["split_samples"]:
            windows = source["windows"] - (source["samples"] - split)
            _note(f"{name}: {split:,} long samples were split into {windows:,} windows; nothing was dropped")
        if source["requested"] is not None and found < source["requested"]:
            _note(f"{name}: has {found:,} of the {source['requested']:,} samples asked for")
        if source["empty"]:
            _note(f"{name}: {source['empty']:,} samples were empty")


def _shrinking(manifest: Manifest) -> str:
    before, after = manifest.before, manifest.after
    experts = f"{before.num_experts} to {after.num_experts} experts"
    # Packed formats hide how many values there are.
    known = before.parameters is not None and after.parameters is not None
    parameters = f", {before.parameters:,} to {after.parameters:,} parameters" if known else ""
    return f"{experts}{parameters}, {_size(before.bytes)} to {_size(after.bytes)}"


class _Table(Table):
    """A table whose cells are printed as they are."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(_escape(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def _table(*columns: str, numbers: bool = True) -> Table:
    table = _Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and position else "left", overflow="fold")
    return table


def _figure(figure: Figure | None, digits: int) -> str:
    if figure is None:
        return "-"
    value = f"{figure.value:.{digits}f}"
    return value if figure.standard_error is None else f"{value} +- {figure.standard_error:.{digits}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _size(count: float) -> str:
    """Decimal bytes, as disks and the hub count them."""
    if count < 0:
        return f"-{_size(-count)}"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _escape(text: str) -> str:
    """A text from outside as it may be printed: without rich's markup, signs that steer a terminal, tokens and passwords."""
    return escape(_STEERING.sub(lambda match: ascii(match[0])[1:-1], redacted(text)))


# ---- arguments --------------------------------------------------------------------------------------------------------------------


def _run(
    device: str | None,
    dtype: str | None,
    budget: str | None,
    trust_remote_code: bool,
    place: str | None = None,
    disk: str | None = None,
) -> Run:
    from reapkit.observation import Run

    sizes = [None if text is None else parse_size(text) for text in (budget, disk)]
    return Run(device, dtype, sizes[0], trust_remote_code, place=place, disk_budget=sizes[1])


def parse_size(text: str) -> int:
    """Bytes in `24GB`, `512 MiB` or `1000`.

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UsageError(f"{text!r} is not a size", hint="for example 24GB or 512MiB")
    power = " kmgt".index((match[2] or " ").lower())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


# ---- progress ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """Bars with rate, elapsed and remaining time on a terminal; a line per finished task elsewhere."""
    if quiet:
        from reapkit.progress import silent

        yield silent
    elif err.is_terminal:
        with _Bars() as bars:
            yield bars.update
    else:
        yield _Lines().update


class _Lines:
    """A line whenever a task is done, and every half minute of a long one."""

    _EVERY_SECONDS = 30.0

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._printed: dict[str, float] = {}

    def update(self, task: str, done: float, total: float, unit: str) -> None:
        now = time.monotonic()
        start = self._started.setdefault(task, now)
        last = self._printed.setdefault(task, now)
        if last < 0 or (done < total and now - last < self._EVERY_SECONDS):
            return
        elapsed = now - start
        rate = done / elapsed if elapsed else 0.0
        remaining = f", {_duration((total - done) / rate)} remaining" if rate and done < total else ""
        _note(f"{task}: {_amount(done, unit)} of {_amount(total, unit)} in {_duration(elapsed)}{remaining}")
        self._printed[task] = -1.0 if done >= total else now


class _Bars:
    """Progress bars, a bar per task."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("remaining"),
        )
        self._progress = Progress(*columns, console=err)
        self._tasks: dict[str, Any] = {}
        self._started: dict[str, float] = {}

    def __enter__(self) -> _Bars:
        self._progress.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._progress.__exit__(*details)

    def update(self, task: str, done: float, total: float, unit: str) -> None:
        now = time.monotonic()
        if task not in self._tasks:
            self._tasks[task] = self._progress.add_task(task, total=total, rate="")
            self._started[task] = now
        elapsed = now - self._started[task]
        rate = f"{_amount(done / elapsed, unit)}/s" if elapsed > 0 and done else ""
        self._progress.update(self._tasks[task], completed=done, total=total, rate=rate)


def _amount(count: float, unit: str) -> str:
    return _size(count) if unit == "B" else f"{count:,.0f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d} min"


def main() -> None:
    """The entry point."""
    # Read when torch is imported: layers and micro-batches of many sizes come and go, and this keeps gaps between them small.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    ignore_once_stopping()
    app(prog_name="reapkit")
