"""m2-nano's four generated domains as tasks of inspect: one task a domain, scored as score.py scores them.

    reapkit eval MODEL|URL… --suite examples/m2_nano/inspect_tasks.py

Rows are those of `models/m2-nano/data/heldout.jsonl`. Where a row offers tools, the server's own parser finds the calls.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageTool, ChatMessageUser
from inspect_ai.scorer import CORRECT, INCORRECT, Score, accuracy, scorer, stderr
from inspect_ai.solver import generate, solver
from inspect_ai.tool import ToolCall, ToolInfo, ToolParams

HERE = Path(__file__).resolve().parent
HELDOUT = HERE.parents[1] / "models/m2-nano/data/heldout.jsonl"

sys.path.insert(0, str(HERE))

import sandbox  # noqa: E402


def read_rows(domain: str) -> list[dict]:
    rows = (json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["domain"] == domain]


def messages(row: dict) -> list[ChatMessage]:
    """Everything before the last assistant turn."""
    result: list[ChatMessage] = []
    waiting: list[str] = []
    for turn in row["messages"][:-1]:
        if turn["role"] == "user":
            result.append(ChatMessageUser(content=turn["content"]))
        elif turn["role"] == "tool":
            result.append(ChatMessageTool(content=turn["content"], tool_call_id=waiting.pop(0)))
        else:
            calls = []
            for call in turn.get("tool_calls", []):
                waiting.append(f"call_{len(result)}_{len(calls)}")
                calls.append(
                    ToolCall(id=waiting[-1], function=call["function"]["name"], arguments=call["function"]["arguments"])
                )
            # The model was trained to think first, and its template shows its thinking again after a tool's result.
            content = f"<think>\n{turn['reasoning_content']}\n</think>\n\n{turn['content']}"
            result.append(ChatMessageAssistant(content=content, tool_calls=calls))
    return result


def offered(row: dict) -> list[ToolInfo]:
    return [
        ToolInfo(name=f["name"], description=f["description"], parameters=ToolParams.model_validate(f["parameters"]))
        for f in (tool["function"] for tool in row.get("tools", []))
    ]


@solver
def reply() -> Any:
    """One reply, tools offered and not run."""

    async def solve(state: Any, _: Any) -> Any:
        from inspect_ai.model import get_model

        state.output = await get_model().generate(state.messages, tools=offered(state.metadata["row"]))
        state.messages.append(state.output.message)
        return state

    return solve


def is_right(row: dict, content: str, calls: list[ToolCall]) -> bool:
    content = content.split("</think>")[-1].strip()
    if "calls" in row:
        return [{"name": call.function, "arguments": call.arguments} for call in calls] == row["calls"]
    if "tests" in row:
        code = content.removeprefix("```python\n").removesuffix("```")
        return content == f"```python\n{code}```" and sandbox.passes(code, row["entry_point"], row["tests"])
    return not calls and content == row["answer"]


@scorer(metrics=[accuracy(), stderr()])
def exact() -> Any:
    async def score(state: Any, target: Any) -> Score:
        row, message = state.metadata["row"], state.output.message
        right = await asyncio.to_thread(is_right, row, message.text, message.tool_calls or [])
        return Score(value=CORRECT if right else INCORRECT, answer=message.text)

    return score


def domain_task(domain: str) -> Task:
    rows = read_rows(domain)
    samples = [Sample(id=f"{domain}-{n}", input=messages(row), metadata={"row": row}) for n, row in enumerate(rows)]
    needs_tools = any("tools" in row for row in rows)
    return Task(dataset=MemoryDataset(samples), solver=reply() if needs_tools else generate(), scorer=exact())


@task
def python() -> Task:
    return domain_task("python")


@task
def arithmetic() -> Task:
    return domain_task("arithmetic")


@task
def tools() -> Task:
    return domain_task("tools")


@task
def lookup() -> Task:
    return domain_task("lookup")
