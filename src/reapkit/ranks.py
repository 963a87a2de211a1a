"""Observing with several processes: `torchrun` starts them, each observes a share of the micro-batches, and the sums are added.

Only sums travel, a few megabytes at the end, so the processes may sit on GPUs of one host or of several.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from reapkit import outputs
from reapkit.errors import OutputError, ResourceError, UsageError
from reapkit.statistics import LayerStatistics

# How long a rank waits for one that is still observing. One that has died is noticed at once, since its connection ends.
_PATIENCE = timedelta(days=7)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """One of several processes that observe together.

    Attributes:
        rank: its number, from 0; count: how many there are.
        local_rank: its number on its host, which is that of its GPU; local_count: how many share the host.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """As `torchrun` says; a single process where nothing is said.

        Raises:
            UsageError: the variables are no numbers.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            return cls(*(int(os.environ[name]) for name in names))
        except (KeyError, ValueError):
            raise UsageError(
                f"the environment names a rank without all of {', '.join(names)}", hint="start it with torchrun"
            ) from None

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every so many-th item, so that the shares are alike."""
        return list(items[self.rank :: self.count])

    def number(self, place: int) -> int:
        """The number among all items of one in the share."""
        return self.rank + self.count * place

    def own(self, path: Path) -> Path:
        """Where this rank works towards a file."""
        return path if self.count == 1 else path.with_name(f"{path.name}.rank-{self.rank}-of-{self.count}")

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Be connected with the other ranks.

        Raises:
            ResourceError: another rank ended before the work was done, or cannot be reached.
        """
        if self.count == 1:
            yield
            return
        import torch.distributed as dist

        try:
            with self._explained():
                dist.init_process_group("gloo", timeout=_PATIENCE)
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's own class derives from it
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ResourceError(
                f"rank {self.rank} of {self.count} lost the others: {reason}",
                hint="start them again with the same command: each rank goes on after its last finished wave",
            ) from error

    def add(self, layers: Mapping[int, LayerStatistics]) -> dict[int, LayerStatistics]:
        """The sums of all ranks, which every rank gets; call inside `joined`."""
        if self.count == 1:
            return dict(layers)
        import torch.distributed as dist

        totals = {}
        for index, layer in layers.items():
            arrays = {part.name: torch.from_numpy(getattr(layer, part.name).copy()) for part in fields(layer)}
            for name, tensor in arrays.items():
                with self._explained():
                    dist.all_reduce(tensor, dist.ReduceOp.MAX if name == "max_norm_E" else dist.ReduceOp.SUM)
            totals[index] = LayerStatistics(**{name: tensor.numpy() for name, tensor in arrays.items()})
        return totals

    def gather(self, value: Item) -> list[Item]:
        """Every rank's value, by its number; call inside `joined`."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        with self._explained():
            dist.all_gather_object(values, value)
        return values

    def require_shared(self, path: Path) -> None:
        """Make sure that all ranks see one folder, where they are to fill one file; call inside `joined`.

        Raises:
            OutputError: some do not; on every rank.
        """
        mark = path.with_name(f"{path.name}.{self.gather(secrets.token_hex(8))[0]}")
        with outputs.explained(path, hint=outputs.REPEAT):
            try:
                if self.rank == 0:
                    mark.touch()
                self.wait()
                blind = [rank for rank, sees in enumerate(self.gather(mark.exists())) if not sees]
            finally:
                if self.rank == 0:
                    mark.unlink(missing_ok=True)
        if blind:
            raise OutputError(
                f"all ranks fill {path.name}, and {', '.join(f'rank {rank}' for rank in blind)} of {self.count} cannot see the folder "
                "that rank 0 writes to",
                hint="give a folder that all hosts share with -o, or sample on one host alone",
            )

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.count > 1:
            import torch.distributed as dist

            with self._explained():
                dist.barrier()
