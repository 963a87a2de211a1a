"""Whether a server that runs says what it should: a completion, a chat, a tool call, a long prompt, and the tokens of our own forward.

The last one asks for greedy continuations as token ids and runs the checkpoint once over prompts and continuations, layer by layer, by the
forward that `compare` uses. Every token is judged given the server's own text before it, so that one difference does not make others.
Computed in another dtype or by other kernels, near-ties fall the other way: a token counts as wrong only when our forward finds it less
likely by `NEAR_TIE` nats than its own choice. This says that the engine computes what the checkpoint holds; that it holds the right experts
is what `verify` says.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reapkit.checkpoint import Checkpoint
from reapkit.errors import ServerError
from reapkit.fidelity import greedy_gaps
from reapkit.modules import load_tokenizer
from reapkit.observation import Run
from reapkit.progress import Progress, silent

Verdict = Literal["yes", "no", "skipped"]

# Nats by which a token may be less likely than our choice and still count as a near-tie. FP8 activations and bfloat16 move logits by some
# tenths; an expert out of place moves them by whole nats.
NEAR_TIE = 1.0
# Share of tokens that may be wrong all the same.
MOST_WRONG = 0.05
GREEDY_TOKENS = 32
LONG_TOKENS = 8192
REQUEST_SECONDS = 600.0
# Left of the context for the reply to a long prompt.
REPLY_TOKENS = 16

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Question: A farmer has 17 sheep and buys 5 more. How many are there?\nAnswer:",
    "人工智能的发展",
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASKED_TOOL = "What is the weather in Paris right now? Call the tool."
# How families begin a tool call in their text; found in the answer, nobody parsed it.
MARKUP = ("<tool_call", "<minimax:tool_call", "<function=", "[TOOL_CALLS]", "<|tool", "<\uff5ctool")

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Probe:
    """What one question to the server gave.

    Attributes:
        name: of the question.
        verdict: `yes`, `no`, or `skipped` where it could not be asked or says nothing.
        detail: a sentence.
        seconds: it took.
        figures: numbers behind the sentence.
    """

    name: str
    verdict: Verdict
    detail: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "verdict": self.verdict,
            "detail": self.detail,
            "seconds": self.seconds,
            **self.figures,
        }


def check(
    address: str,
    source: str | Path | None = None,
    *,
    run: Run | None = None,
    revision: str | None = None,
    progress: Progress = silent,
    tool: dict[str, Any] = TOOL,
    asked: str = ASKED_TOOL,
) -> list[Probe]:
    """Ask a server everything; the reference needs the checkpoint.

    Args:
        address: like `http://127.0.0.1:8000`.
        source: the checkpoint's folder or hub id; None leaves out the reference.
        run: device, dtype and memory of the reference.
        revision: of a hub id, the one that is served.
        progress: told how far the reference is.
        tool, asked: a tool to offer, and what a user says to have it called.

    Raises:
        ServerError: nothing answers there, or it lists no model.
    """
    model = _model(address)
    client = _Client(address, str(model["id"]))
    probes = [
        _timed("completion", lambda: _completion(client)),
        _timed("chat", lambda: _chat(client)),
        _timed("tool call", lambda: _tool_call(client, tool, asked)),
        _timed("long prompt", lambda: _long_prompt(client, model.get("max_model_len"))),
    ]
    if source is None:
        probes.append(Probe("greedy tokens", "skipped", "no checkpoint was given to compute a reference from"))
    else:
        probes.append(
            _timed(
                "greedy tokens",
                lambda: _greedy(
                    client, Checkpoint.open(source, revision=revision, progress=progress), run or Run(), progress
                ),
            )
        )
    return probes


def _timed(name: str, ask: Callable[[], tuple[Verdict, str, dict[str, Any]]]) -> Probe:
    start = time.monotonic()
    try:
        verdict, detail, figures = ask()
    except _RefusedError as refusal:
        verdict, detail, figures = "no", str(refusal), {}
    return Probe(name, verdict, detail, round(time.monotonic() - start, 3), figures)


# --- asking


class _RefusedError(Exception):
    """The server answered with an error, or with what is no answer."""


@dataclass(frozen=True)
class _Client:
    address: str
    model: str

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """A greedy reply."""
        asked = {"model": self.model, "temperature": 0, **body}
        request = urllib.request.Request(
            f"{self.address}/v1/{path}", json.dumps(asked).encode(), headers={"Content-Type": "application/json"}
        )
        try:
            with _OPENER.open(request, timeout=REQUEST_SECONDS) as reply:
                return dict(json.load(reply))
        except urllib.error.HTTPError as error:
            raise _RefusedError(f"HTTP {error.code}: {error.read().decode(errors='replace')[:300].strip()}") from None
        except (OSError, ValueError, TypeError) as error:
            raise _RefusedError(f"no answer that can be read: {type(error).__name__} {error}") from None


def _of(reply: Any, *keys: str | int) -> Any:
    """What stands under these keys of a reply."""
    for key in keys:
        try:
            reply = reply[key]
        except (LookupError, TypeError):
            raise _RefusedError(f"the reply has no {key!r}") from None
    return reply


def _model(address: str) -> dict[str, Any]:
    try:
        with _OPENER.open(f"{address}/v1/models", timeout=30) as reply:
            listed = json.load(reply)["data"]
        return dict(listed[0])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ServerError(
            f"no server that lists a model answers at {address}: {type(error).__name__} {error}",
            hint="start one with reapkit serve MODEL --run, or give its address: --url http://HOST:PORT",
        ) from None


def _completion(client: _Client) -> tuple[Verdict, str, dict[str, Any]]:
    reply = client.ask("completions", prompt=TEXTS[0], max_tokens=8)
    text = _of(reply, "choices", 0, "text")
    return ("yes", f"goes on with {text!r}", {}) if text else ("no", "the completion is empty", {})


def _chat(client: _Client) -> tuple[Verdict, str, dict[str, Any]]:
    reply = client.ask("chat/completions", messages=[{"role": "user", "content": "Say hello."}], max_tokens=64)
    said = _said(_of(reply, "choices", 0, "message"))
    return (
        ("yes", f"says {said[:60]!r}", {}) if said.strip() else ("no", "neither reasoning nor an answer came back", {})
    )


def _said(message: dict[str, Any]) -> str:
    return "".join(str(message.get(key) or "") for key in ("reasoning", "reasoning_content", "content"))


def _tool_call(client: _Client, tool: dict[str, Any], asked: str) -> tuple[Verdict, str, dict[str, Any]]:
    message = client.ask(
        "chat/completions", messages=[{"role": "user", "content": asked}], tools=[tool], max_tokens=512
    )
    message = message["choices"][0]["message"]
    calls = message.get("tool_calls") or []
    if not calls:
        said = _said(message)
        if found := [mark for mark in MARKUP if mark in said]:
            return (
                "no",
                f"a tool call came back as text that nobody parsed ({found[0]}…): is --tool-call-parser right?",
                {},
            )
        return "skipped", "the model answered in words and called nothing, which says nothing about parsing", {}
    function = calls[0].get("function", {})
    try:
        arguments = json.loads(function["arguments"])
    except (LookupError, TypeError, ValueError):
        return "no", f"the call's arguments are not JSON: {str(function)[:200]}", {}
    if function.get("name") != tool["function"]["name"]:
        return (
            "no",
            f"the call names the tool {function.get('name')!r}, and offered was {tool['function']['name']!r}",
            {},
        )
    return "yes", f"{function['name']}({json.dumps(arguments, ensure_ascii=False)})", {}


def _long_prompt(client: _Client, limit: Any) -> tuple[Verdict, str, dict[str, Any]]:
    """A prompt of `LONG_TOKENS`, or of what the context has room for, is read whole."""
    room = limit - REPLY_TOKENS if type(limit) is int else LONG_TOKENS
    wanted = min(LONG_TOKENS, room)
    # A word that is seldom less than a token, until the server counts as many as wanted.
    words = max(1, wanted // 2)
    reply = client.ask("completions", prompt=" one" * words, max_tokens=REPLY_TOKENS)
    counted = int(_of(reply, "usage", "prompt_tokens"))
    again = min(words * wanted // max(1, counted), 4 * LONG_TOKENS)
    reply = client.ask("completions", prompt=" one" * max(1, again * 99 // 100), max_tokens=REPLY_TOKENS)
    counted = int(_of(reply, "usage", "prompt_tokens"))
    figures = {"prompt_tokens": counted}
    if counted < wanted * 9 // 10:
        return "no", f"the server counts {counted:,} tokens of a prompt of about {wanted:,}", figures
    return "yes", f"{counted:,} tokens read", figures


# --- the reference


def _greedy(
    client: _Client, checkpoint: Checkpoint, run: Run, progress: Progress
) -> tuple[Verdict, str, dict[str, Any]]:
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=run.trust_remote_code)
    pairs = []
    for text in TEXTS:
        prompt = list(map(int, tokenizer(text)["input_ids"]))
        reply = client.ask(
            "completions", prompt=prompt, max_tokens=GREEDY_TOKENS, ignore_eos=True, return_token_ids=True
        )
        tokens = _of(reply, "choices", 0).get("token_ids")
        if not tokens:
            return "skipped", "this engine does not say which tokens it chose", {}
        pairs.append((prompt, list(map(int, tokens))))
    return judged(greedy_gaps(checkpoint, pairs, run=run, progress=progress))


def judged(gaps: Sequence[Sequence[float]]) -> tuple[Verdict, str, dict[str, Any]]:
    """The verdict on how many nats each of the server's tokens is less likely than our forward's choice, 0 where it is that choice."""
    every = [gap for row in gaps for gap in row]
    equal = sum(gap == 0 for gap in every)
    wrong = sum(not gap <= NEAR_TIE for gap in every)
    figures = {"tokens": len(every), "equal": equal, "wrong": wrong, "largest_gap_nats": max(every)}
    detail = f"{equal} of {len(every)} greedy tokens are our forward's own, {wrong} are less likely by more than {NEAR_TIE} nats"
    return ("no" if wrong > MOST_WRONG * len(every) else "yes"), detail, figures


def failed(probes: Sequence[Probe]) -> bool:
    """Whether any answer was no."""
    return any(probe.verdict == "no" for probe in probes)
