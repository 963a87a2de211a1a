"""How two models behave on the same prompts: whether their replies end, loop, call tools rightly, and agree.

Replies come from the models themselves where they fit into memory, else from servers. Decoding is greedy, so nothing is left to chance.

A reply **loops** when it ends in one passage repeated: at least 4 times in a row, at least 120 characters together, the passage at most
1,000 characters long. Thinking counts. A reply is **unfinished** when the limit on its tokens cut it off.

The **final answer** is what stands in the last \\boxed{} or behind the last `####`, else the reply without its thinking; spaces and case do
not count; tool calls are part of it. A reply has **valid calls** when every one names an offered tool, with the arguments that its schema
asks for and none of another name or type; it has **exact calls** when they are the row's `calls`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reapkit.endpoints import Endpoint, complete
from reapkit.errors import DataError
from reapkit.figures import Figure, mean, ratio
from reapkit.progress import Progress, silent

LOOP_REPEATS = 4
LOOP_CHARACTERS = 120
LOOP_PASSAGE = 1000
# Requests that a server is sent at once.
CONCURRENT = 16

_JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,), "object": (dict,),
    "null": (type(None),),
}  # fmt: skip

Call = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One row of a prompts file.

    Attributes:
        messages: the conversation, up to a user's or a tool's turn.
        tools: offered, in OpenAI's form.
        calls: the right calls, `{"name", "arguments"}` each; None where the row does not say.
        answer: the right final answer; None where the row does not say.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    calls: tuple[Call, ...] | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Reply:
    """What a model replied.

    Attributes:
        text: all of it, thinking and calls included.
        content: what is left for the user: no thinking, no calls.
        calls: the tool calls, in order; None where there are some that cannot be read.
        tokens: how many were generated.
        is_finished: False where the limit on tokens cut it off.
    """

    text: str
    content: str
    calls: tuple[Call, ...] | None
    tokens: int
    is_finished: bool

    def to_json(self) -> dict[str, Any]:
        calls = None if self.calls is None else list(self.calls)
        return {"text": self.text, "calls": calls, "tokens": self.tokens, "finished": self.is_finished}


Replier = Callable[[Sequence[Prompt], int, Progress], list[Reply]]


@dataclass(frozen=True)
class Pair:
    """One figure of each model."""

    original: Figure
    pruned: Figure

    def to_json(self) -> dict[str, Any]:
        return {"original": self.original.to_json(), "pruned": self.pruned.to_json()}


@dataclass(frozen=True)
class Behaviour:
    """The behaviour of two models on the same prompts.

    Attributes:
        prompts, max_tokens: how many prompts, and the limit on a reply's tokens.
        loops, unfinished: share of replies that loop, that were cut off.
        length_ratio: tokens of the pruned model's replies over those of the original's.
        valid_calls: share of the prompts with tools whose reply makes valid calls or, where none is the right thing, none; None where no
            prompt has tools or the calls' format is not known.
        exact_calls: share of the prompts with `calls` whose reply makes these; None where there are none.
        right_answers: share of the prompts with an `answer` whose reply gives it; None where there are none.
        same_answers: share of prompts on which both models' final answers agree.
        replies: (prompt, original's reply, pruned model's reply).
        notes: what could not be measured, and why.
    """

    prompts: int
    max_tokens: int
    loops: Pair
    unfinished: Pair
    length_ratio: Figure
    valid_calls: Pair | None
    exact_calls: Pair | None
    right_answers: Pair | None
    same_answers: Figure
    replies: tuple[tuple[Prompt, Reply, Reply], ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        names = ("loops", "unfinished", "length_ratio", "valid_calls", "exact_calls", "right_answers", "same_answers")
        figures: dict[str, Pair | Figure | None] = {name: getattr(self, name) for name in names}
        return {
            "prompts": self.prompts,
            "max_tokens": self.max_tokens,
            **{name: None if figure is None else figure.to_json() for name, figure in figures.items()},
        }


def read_prompts(path: Path, *, limit: int | None = None) -> tuple[list[Prompt], int]:
    """The prompts of a file of JSON lines, and how many rows are none.

    A row has `messages`, whose last assistant turn is what a model is to give and is left out, or a `prompt`; rows with `text` alone are
    no prompts. Of more rows than `limit`, as many are taken at equal distances.

    Raises:
        DataError: the file cannot be read or holds no prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{path} cannot be read as JSON lines: {reason}") from None
    prompts = [prompt for row in rows if (prompt := _prompt(row)) is not None]
    if not prompts:
        raise DataError(f"{path} holds no prompts", hint='a row has "messages" or a "prompt"')
    skipped = len(rows) - len(prompts)
    if limit is not None and limit < len(prompts):
        prompts = [prompts[number * len(prompts) // limit] for number in range(limit)]
    return prompts, skipped


def _prompt(row: Any) -> Prompt | None:
    if not isinstance(row, Mapping):
        return None
    if isinstance(row.get("prompt"), str):
        messages: list[Mapping[str, Any]] = [{"role": "user", "content": row["prompt"]}]
    elif isinstance(row.get("messages"), list) and all(isinstance(turn, Mapping) for turn in row["messages"]):
        messages = list(row["messages"])
        if messages and messages[-1].get("role") == "assistant":
            messages.pop()
    else:
        return None
    calls, answer = row.get("calls"), row.get("answer")
    return Prompt(
        tuple(messages),
        tuple(row.get("tools") or ()),
        None if calls is None else tuple({"name": call["name"], "arguments": call["arguments"]} for call in calls),
        None if answer is None else str(answer),
    ) if messages else None  # fmt: skip


def observe_behaviour(
    prompts: Sequence[Prompt],
    original: Replier,
    pruned: Replier,
    *,
    max_tokens: int,
    progress: Progress = silent,
) -> Behaviour:
    """Have both models reply to the same prompts, one model after the other, and compare what they said."""
    ours, theirs = original(prompts, max_tokens, progress), pruned(prompts, max_tokens, progress)
    return summarize(prompts, ours, theirs, max_tokens=max_tokens)


def summarize(
    prompts: Sequence[Prompt], ours: Sequence[Reply], theirs: Sequence[Reply], *, max_tokens: int
) -> Behaviour:
    """The figures of replies that are there."""

    def pair(judge: Callable[[Prompt, Reply], bool], chosen: Sequence[bool]) -> Pair | None:
        def share(replies: Sequence[Reply]) -> Figure:
            rows = zip(prompts, replies, chosen, strict=True)
            return mean(np.array([judge(prompt, reply) for prompt, reply, is_chosen in rows if is_chosen]))

        return Pair(share(ours), share(theirs)) if any(chosen) else None

    everywhere = [True] * len(prompts)
    loops = pair(lambda _, reply: is_loop(reply.text), everywhere)
    unfinished = pair(lambda _, reply: not reply.is_finished, everywhere)
    assert loops is not None and unfinished is not None
    tokens = [np.array([max(reply.tokens, 1) for reply in replies]) for replies in (theirs, ours)]
    return Behaviour(
        prompts=len(prompts),
        max_tokens=max_tokens,
        loops=loops,
        unfinished=unfinished,
        length_ratio=ratio(tokens[0], tokens[1]),
        valid_calls=pair(
            lambda prompt, reply: are_valid(reply.calls, prompt.tools) and (bool(reply.calls) or not prompt.calls),
            [bool(prompt.tools) for prompt in prompts],
        ),
        exact_calls=pair(
            lambda prompt, reply: reply.calls is not None and same_calls(reply.calls, prompt.calls or ()),
            [prompt.calls is not None for prompt in prompts],
        ),
        right_answers=pair(
            lambda prompt, reply: final_answer(reply.content) == final_answer(prompt.answer or ""),
            [prompt.answer is not None for prompt in prompts],
        ),
        same_answers=mean(np.array([_agree(one, other) for one, other in zip(ours, theirs, strict=True)])),
        replies=tuple(zip(prompts, ours, theirs, strict=True)),
    )


def is_loop(text: str) -> bool:
    """Whether a text ends in one passage repeated, see the module's definition.

    A text of n characters whose longest proper border (a start that is also an end) has b of them repeats with the period n - b; of the
    reversed text's starts each is an end of the text, and the failure function has all their borders in one pass (Knuth, Morris, Pratt).
    """
    backwards = text[::-1]
    border = [0] * (len(backwards) + 1)
    length = 0
    for place in range(1, len(backwards)):
        while length and backwards[place] != backwards[length]:
            length = border[length]
        length += backwards[place] == backwards[length]
        border[place + 1] = length
        size, period = place + 1, place + 1 - length
        if size >= LOOP_CHARACTERS and period <= LOOP_PASSAGE and size >= LOOP_REPEATS * period:
            return True
    return False


def final_answer(content: str) -> str:
    """What a reply answers in the end, without spaces and case."""
    if (start := content.rfind("\\boxed{")) >= 0:
        depth, begin = 1, start + len("\\boxed{")
        for place in range(begin, len(content)):
            depth += {"{": 1, "}": -1}.get(content[place], 0)
            if not depth:
                content = content[begin:place]
                break
    elif "####" in content:
        content = content.rpartition("####")[2]
    return "".join(content.split()).casefold()


def _agree(one: Reply, other: Reply) -> bool:
    if one.calls is None or other.calls is None:
        return False
    return final_answer(one.content) == final_answer(other.content) and same_calls(one.calls, other.calls)


def same_calls(calls: Sequence[Call], others: Sequence[Call]) -> bool:
    """Whether two lists hold the same calls in the same order; `1` is not `true`, and `1` is `1.0`."""

    def written(values: Sequence[Call]) -> str:
        return json.dumps(
            [{"name": call["name"], "arguments": _plain(call["arguments"])} for call in values], sort_keys=True
        )

    return written(calls) == written(others)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def are_valid(calls: Sequence[Call] | None, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every call fits the schema of an offered tool: names, required arguments, types and choices at the top level."""
    if calls is None:
        return False
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    return all(call["name"] in schemas and _fits(call["arguments"], schemas[call["name"]]) for call in calls)


def _fits(arguments: Any, schema: Mapping[str, Any]) -> bool:
    if not isinstance(arguments, Mapping):
        return False
    properties = schema.get("properties") or {}
    known = arguments.keys() <= properties.keys() or schema.get("additionalProperties") not in (None, False)
    required = set(schema.get("required") or ()) <= arguments.keys()
    return (
        known
        and required
        and all(_is_of(value, properties[key]) for key, value in arguments.items() if key in properties)
    )


def _is_of(value: Any, schema: Mapping[str, Any]) -> bool:
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = schema.get("type")
    if kinds is None:
        return True
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind == "boolean" or not isinstance(value, bool):
            if isinstance(value, _JSON_TYPES.get(kind, (object,))):
                return True
            if kind == "integer" and isinstance(value, float) and value.is_integer():
                return True
    return False


# --- replies of a server


def ask(endpoint: Endpoint) -> Replier:
    """Replies of a served model; the server's own parsers find thinking and calls."""

    def reply_all(prompts: Sequence[Prompt], max_tokens: int, progress: Progress) -> list[Reply]:
        task, done = f"replies of {endpoint.model}", 0
        progress(task, 0, len(prompts), "prompts")
        replies = []
        pool = ThreadPoolExecutor(max_workers=CONCURRENT)
        try:
            for reply in pool.map(lambda prompt: _ask(endpoint, prompt, max_tokens), prompts):
                replies.append(reply)
                done += 1
                progress(task, done, len(prompts), "prompts")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return replies

    return reply_all


def _ask(endpoint: Endpoint, prompt: Prompt, max_tokens: int) -> Reply:
    options: dict[str, Any] = {"temperature": 0.0, "seed": 0, "max_tokens": max_tokens}
    if prompt.tools:
        options["tools"] = list(prompt.tools)
    answer = complete(endpoint, for_server(prompt.messages), **options)
    message = answer["choice"]["message"]
    thinking = message.get("reasoning") or message.get("reasoning_content") or ""
    content = message.get("content") or ""
    raw = message.get("tool_calls") or []
    written = "".join(f"\n{call['function']['name']}({call['function']['arguments']})" for call in raw)
    return Reply(
        text=f"{thinking}{content}{written}",
        content=without_thinking(content),
        calls=_read_calls(raw),
        tokens=int(answer["usage"]["completion_tokens"]),
        is_finished=answer["choice"].get("finish_reason") != "length",
    )


def _read_calls(raw: Sequence[Mapping[str, Any]]) -> tuple[Call, ...] | None:
    try:
        return tuple(
            {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"] or "{}")}
            for call in raw
        )
    except (ValueError, KeyError, TypeError):
        return None


def for_server(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation as OpenAI's interface wants it: calls with ids and their arguments as text, results with the id of their call."""
    result: list[dict[str, Any]] = []
    waiting: list[str] = []
    count = 0
    for turn in messages:
        copy = dict(turn)
        if calls := copy.get("tool_calls"):
            copy["tool_calls"] = []
            for call in calls:
                count += 1
                arguments = call["function"]["arguments"]
                text = arguments if isinstance(arguments, str) else json.dumps(arguments)
                name = call.get("id") or f"call_{count}"
                waiting.append(name)
                function = {"name": call["function"]["name"], "arguments": text}
                copy["tool_calls"].append({"id": name, "type": "function", "function": function})
        elif copy.get("role") == "tool" and "tool_call_id" not in copy and waiting:
            copy["tool_call_id"] = waiting.pop(0)
        result.append(copy)
    return result


def without_thinking(text: str) -> str:
    """A reply behind its thinking; one that never stops thinking has said nothing."""
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return "" if "<think>" in text else text.strip()


# --- calls in a model's own words, where no server parses them

_MINIMAX = re.compile(r"<minimax:tool_call>\s*(.*?)\s*</minimax:tool_call>", re.DOTALL)
_INVOKE = re.compile(r'<invoke name="([^"]*)">(.*?)</invoke>', re.DOTALL)
_PARAMETER = re.compile(r'<parameter name="([^"]*)">(.*?)</parameter>', re.DOTALL)
_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def knows_calls_of(template: str) -> bool:
    """Whether calls in a chat template's format can be read here: MiniMax-M2's, and JSON in <tool_call> (Qwen3, Hermes)."""
    return "<minimax:tool_call>" in template or (
        "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template
    )


def parse_calls(content: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[Call, ...] | None]:
    """What a reply says besides its calls, and the calls; None for calls that cannot be read."""
    calls: list[Call] = []
    schemas = {
        tool["function"]["name"]: (tool["function"].get("parameters") or {}).get("properties") or {} for tool in tools
    }
    readable = True
    for block in _MINIMAX.findall(content):
        invoked = _INVOKE.findall(block)
        readable &= bool(invoked) and not _INVOKE.sub("", block).strip()
        for name, body in invoked:
            readable &= not _PARAMETER.sub("", body).strip() and body.count("<parameter ") == body.count("</parameter>")
            arguments = {
                key: _typed(value, schemas.get(name, {}).get(key, {})) for key, value in _PARAMETER.findall(body)
            }
            calls.append({"name": name, "arguments": arguments})
    for block in _HERMES.findall(content):
        try:
            call = json.loads(block)
            calls.append({"name": call["name"], "arguments": call["arguments"]})
        except (ValueError, KeyError, TypeError):
            readable = False
    rest = _HERMES.sub("", _MINIMAX.sub("", content)).strip()
    readable &= not re.search(r"</?(minimax:)?tool_call>|<invoke", rest)
    return rest, tuple(calls) if readable else None


def _typed(value: str, schema: Mapping[str, Any]) -> Any:
    """An argument written as text, in the type that its schema names; text where it is not of that type."""
    kinds = schema.get("type", "string")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if set(kinds) - {"string"}:
        try:
            parsed = json.loads(value)
        except ValueError:
            return value
        if _is_of(parsed, schema):
            return parsed
    return value
