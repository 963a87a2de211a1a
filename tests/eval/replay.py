"""Replay the reference actions of tau2-bench Telecom through inspect-evals' environment and scorer: every task must be solved.

    python tests/eval/replay.py LOGS

The same tasks without any action are scored too, as a control. Exits with 1 unless all 114 are solved with the actions.
"""

from __future__ import annotations

import sys
from typing import Any

from inspect_ai import Task, eval
from inspect_ai.model import ChatMessageAssistant
from inspect_ai.solver import solver
from inspect_ai.tool import ToolCall
from inspect_ai.util import store_as
from inspect_evals.tau2.common.agents import StoredAgentState
from inspect_evals.tau2.common.metadata import Tau2MetaData
from inspect_evals.tau2.telecom.dataset import read_dataset
from inspect_evals.tau2.telecom.environment import TelecomEnvironmentConfig, get_environment
from inspect_evals.tau2.telecom.scorer import telecom_scorer
from inspect_evals.tau2.telecom.solver import telecom_initializer

INSTANCE = "TelecomAgent"
NUM_TASKS = 114


@solver
def replay() -> Any:
    """Make every reference action's call in the environment, and leave it where the scorer looks for calls."""

    async def solve(state: Any, generate: Any) -> Any:
        environment = get_environment(TelecomEnvironmentConfig())
        criteria = Tau2MetaData.model_validate(state.metadata).task.evaluation_criteria
        for number, action in enumerate((criteria.actions if criteria is not None else None) or []):
            tools = environment.tools if action.requestor == "assistant" else environment.user_tools
            getattr(tools, action.name)(**action.arguments)
            environment.sync_tools()
            call = ToolCall(id=str(number), function=action.name, arguments=action.arguments, type="function")
            message = ChatMessageAssistant(content="", tool_calls=[call])
            if action.requestor == "assistant":
                store_as(StoredAgentState, INSTANCE).messages.append(message)
            else:
                state.messages.append(message)
        return state

    return solve


def solved(logs: str, *solvers: Any) -> tuple[int, list[str]]:
    """How many tasks are solved, and the names of the others."""
    task = Task(dataset=read_dataset(INSTANCE), solver=[telecom_initializer(), *solvers], scorer=telecom_scorer())
    [log] = eval(task, model="mockllm/model", log_dir=logs, display="none")
    assert log.status == "success", log.error
    wrong = [str(sample.id) for sample in log.samples or () if next(iter((sample.scores or {}).values())).value != "C"]
    return len(log.samples or ()) - len(wrong), wrong


def main() -> None:
    right, wrong = solved(sys.argv[1], replay())
    print(f"tau2 Telecom, reference actions replayed: {right} of {right + len(wrong)} at reward 1.0")
    for name in wrong:
        print(f"not solved: {name}")
    idle, others = solved(sys.argv[1])
    print(f"without any action: {idle} of {idle + len(others)}")
    sys.exit(right != NUM_TASKS or bool(wrong) or idle > 0)


if __name__ == "__main__":
    main()
