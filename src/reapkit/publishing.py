"""To the hub, where the user says: a pruned checkpoint with its card, or a plan with the statistics behind it.

Uploading is huggingface_hub's: it goes on after an interruption when it is repeated, and leaves what is there already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from reapkit import hub, shards
from reapkit.checkpoint import CARD_NAME, MANIFEST_NAME
from reapkit.errors import CheckpointError
from reapkit.layout import Identity
from reapkit.plans import PUBLISHED_PLANS, PUBLISHED_STATISTICS, Choice
from reapkit.shards import LANDED, LOCK_NAME, OWN_FOLDER


@dataclass(frozen=True)
class Upload:
    """What goes to the hub.

    Attributes:
        repository: where to.
        files: bytes by path there.
        notes: sentences on what a person should know before it is public.
        url: of the commit; None where nothing was sent.
    """

    repository: str
    files: Mapping[str, int]
    notes: tuple[str, ...]
    url: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())


def push(
    out: str | Path, repository: str, *, with_reapkit: bool = False, private: bool = False, dry_run: bool = False
) -> Upload:
    """Upload a finished output: the checkpoint and its card, without the folder `reapkit/` unless asked.

    Args:
        out: the folder.
        repository: `ORG/NAME`; made where it does not exist.
        with_reapkit: send statistics, plan and what else lies in `reapkit/` too.
        private: make a new repository private.
        dry_run: only say what would be sent; the hub is not asked.

    Raises:
        CheckpointError: not a finished output of reapkit.
        HubError: the hub refuses.
    """
    out = Path(out)
    manifest = shards.finished(out)
    if manifest is None:
        raise CheckpointError(
            f"{out} is not a finished output of reapkit", hint="give the folder that reapkit prune wrote"
        )
    unwanted = [f"{LOCK_NAME}*", f"{LANDED}/*"] if with_reapkit else [f"{OWN_FOLDER}/*"]
    names = (path.relative_to(out).as_posix() for path in sorted(out.rglob("*")) if path.is_file())
    is_sent = _matching(unwanted)
    files = {name: (out / name).stat().st_size for name in names if is_sent(name)}
    notes = []
    if CARD_NAME not in files:
        notes.append(f"{out} has no {CARD_NAME}, so the page on the hub will be empty")
    if manifest.digests is None:
        notes.append(f"{out} was never verified: reapkit verify {out}")
    if not _is_hub_id(manifest.source):
        notes.append(f"{MANIFEST_NAME} names the source as {manifest.source.origin}, and so will the hub")
    upload = Upload(repository, files, tuple(notes))
    if dry_run:
        return upload
    with hub.explained(repository):
        api = _api()
        api.create_repo(repository, exist_ok=True, private=private or None)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=out,
            ignore_patterns=list(unwanted),  # which the call extends
            commit_message="Upload a checkpoint pruned by reapkit",
        )
    return replace(upload, url=str(done.commit_url))


def publish(choice: Choice, repository: str, *, private: bool = False, dry_run: bool = False) -> Upload:
    """Upload a plan, the statistics that it was chosen from and, where the repository has none, a card.

    A source that was a local folder is named by its last part alone: the path to it is nobody's business, and fingerprints tell
    checkpoints apart.

    Raises:
        HubError: the hub refuses.
    """
    source = _named_shortly(choice.plan.source)
    plan = replace(choice.plan, source=source)
    with TemporaryDirectory(prefix="reapkit-") as scratch:
        folder = Path(scratch)
        plan.save(folder / PUBLISHED_PLANS[0])
        if choice.statistics is not None:
            replace(choice.statistics, source=_named_shortly(choice.statistics.source)).save(
                folder / PUBLISHED_STATISTICS[0]
            )
        (folder / CARD_NAME).write_text(_card(choice, source, repository), encoding="utf-8")
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        note = (
            ()
            if _is_hub_id(source)
            else (f"the plan names its source as {source.origin}, not as a repository on the hub",)
        )
        upload = Upload(repository, files, note)
        if dry_run:
            return upload
        with hub.explained(repository):
            api = _api()
            api.create_repo(repository, exist_ok=True, private=private or None)
            kept = [CARD_NAME] if api.file_exists(repository, CARD_NAME) else []
            done = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                ignore_patterns=list(kept),
                commit_message="Upload a pruning plan of reapkit",
            )
    files = {name: size for name, size in files.items() if name not in kept}
    return replace(upload, files=files, url=str(done.commit_url))


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="reapkit")


def _matching(unwanted: list[str]) -> Any:
    """Whether huggingface_hub sends a file in spite of these patterns, by its own rules."""
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    return lambda name: bool(list(filter_repo_objects([name], ignore_patterns=unwanted)))


def _is_hub_id(source: Identity) -> bool:
    return (
        source.origin.count("/") == 1
        and not Path(source.origin).exists()
        and not source.origin.startswith((".", "/", "~"))
    )


def _named_shortly(source: Identity) -> Identity:
    return source if _is_hub_id(source) else replace(source, origin=Path(source.origin).name or "a local checkpoint")


def _card(choice: Choice, source: Identity, repository: str) -> str:
    """A card that says what the plan is, what it is for and how it is used."""
    plan = choice.plan
    is_hub_id = _is_hub_id(source)
    front = [
        "---",
        "tags:",
        "- reapkit",
        "- pruning-plan",
        *([f"base_model: {source.origin}"] if is_hub_id else []),
        "---",
    ]
    at = f" at `{source.revision}`" if source.revision else ""
    tokens = choice.statistics.num_tokens if choice.statistics is not None else None
    observed = f", observed on {tokens:,} tokens" if tokens is not None else ""
    lines = [
        f"# A pruning plan for {source.origin}",
        "",
        f"Which {plan.num_kept} of {plan.num_experts} experts stay in each MoE layer of {source.origin}{at}, by the criterion "
        f"`{plan.criterion}`{observed}.",
        "",
        "```console",
        f"$ reapkit prune {source.origin if is_hub_id else 'SRC'} hub://{repository} -o OUT",
        "```",
    ]
    return "\n".join([*front, "", *lines, ""])
