"""How much memory may be used: what is free on a device, and within the limits of control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

# Where no system says how much there is.
_ASSUMED_FREE = 4 << 30


def free_memory(device: torch.device) -> int:
    """Bytes free on a device; for the CPU, available memory within the limits of the process's control groups."""
    if device.type == "cuda":
        # What torch has taken from the device and not given out is free to this process.
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return min(int(torch.cuda.mem_get_info(device)[0]), total_memory(device) - reserved) + reserved - allocated
    return free_host_memory(Path("/"))


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory, of which torch may have been told to use a part (`set_per_process_memory_fraction`)."""
    share = torch.cuda.get_per_process_memory_fraction(device)
    return int(torch.cuda.get_device_properties(device).total_memory * share)


def free_host_memory(root: Path) -> int:
    """Bytes of main memory that this process may still take, by the files of a Linux system below `root`."""
    meminfo = root / "proc/meminfo"
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), _ASSUMED_FREE)
    return min([available, *_free_in_groups(root)])


def _free_in_groups(root: Path) -> Iterator[int]:
    """Bytes left in every control group that limits this process, its own and those around it.

    Cached file pages count as used, and are given back when memory is asked for. In a container the path of a group may be the
    host's, which is not mounted: then the mount's root is the container's own group.
    """
    membership = root / "proc/self/cgroup"
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            mount, limit, used, cached = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            limit, used, cached = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = mount / name.lstrip("/")
        for folder in (group, *group.parents):
            if (folder / limit).exists() and (text := (folder / limit).read_text().strip()) != "max":
                counters = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                yield int(text) - int((folder / used).read_text()) + int(counters.get(cached, 0))
            if folder == mount:
                break
