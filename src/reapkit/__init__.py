"""Expert pruning for Mixture-of-Experts language models: observe, plan, prune, verify, compare.

The verbs of the command line are the functions exported here, with the same names and defaults; options that belong together come as
a `Run` (device, dtype, memory) and a `Target` (how much to remove, by which criterion). torch is imported by the first function that
needs it.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reapkit.compression import Compression, Target, compress, prune
    from reapkit.errors import ReapkitError
    from reapkit.evaluation import Evaluation, evaluate
    from reapkit.fidelity import Fidelity, compare
    from reapkit.inventory import Inventory, inspect
    from reapkit.merging import merge
    from reapkit.observation import Run, observe
    from reapkit.plans import PruningPlan, choose, plan
    from reapkit.publishing import push
    from reapkit.reporting import report
    from reapkit.serving import Deployment, serve
    from reapkit.statistics import Statistics, combine
    from reapkit.verification import Verification, verify

__version__ = version("reapkit")

_HOMES = {
    "Compression": "compression", "Target": "compression", "compress": "compression", "prune": "compression",
    "ReapkitError": "errors",
    "Evaluation": "evaluation", "evaluate": "evaluation",
    "Fidelity": "fidelity", "compare": "fidelity",
    "Inventory": "inventory", "inspect": "inventory",
    "merge": "merging",
    "Run": "observation", "observe": "observation",
    "PruningPlan": "plans", "choose": "plans", "plan": "plans",
    "Deployment": "serving", "serve": "serving",
    "report": "reporting",
    "push": "publishing",
    "Statistics": "statistics", "combine": "statistics",
    "Verification": "verification", "verify": "verification",
}  # fmt: skip
__all__ = [
    "Compression", "Deployment", "Evaluation", "Fidelity", "Inventory", "PruningPlan", "ReapkitError", "Run", "Statistics", "Target",
    "Verification",
    "choose", "combine", "compare", "compress", "evaluate", "inspect", "merge", "observe", "plan", "prune", "push", "report", "serve",
    "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'reapkit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"reapkit.{_HOMES[name]}"), name)
