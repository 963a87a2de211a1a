"""Lets vLLM's CPU router take MiniMax-M2's routing: sigmoid scores with a selection bias and no groups.

vLLM's GPU routers take this as it is. Its CPU router (0.32) takes a sigmoid only as grouped top-k and otherwise asserts a softmax,
so a MiniMax-M2 loads on a CPU, is healthy, and fails at the first request. One group of which one is taken masks no expert, and
what is left of grouped top-k is the function wanted: choose by sigmoid plus bias, weigh by the sigmoid, renormalise.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Send ungrouped sigmoid routing through grouped top-k; vLLM calls this in each of its processes. Off CPUs it does nothing."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return

    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    original_init = CPURouter.__init__

    def init_with_one_group(self: CPURouter, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        if self.scoring_func == "sigmoid" and not self.use_grouped_topk and self.custom_routing_function is None:
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1

    CPURouter.__init__ = init_with_one_group
