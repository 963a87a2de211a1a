"""What replies are judged by, on cases made by hand; replies of models in memory equal transformers' own; servers that die are named."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from reapkit import behaviour as module
from reapkit.behaviour import Prompt, Reply, are_valid, final_answer, is_loop, parse_calls, read_prompts, summarize
from reapkit.endpoints import connect
from reapkit.errors import DataError, EndpointError, ResourceError, UnsupportedError
from reapkit.figures import Figure
from reapkit.generation import LoadedModel
from reapkit.observation import Run
from reapkit.progress import silent
from streaming import full_model, write_jsonl

TOOL = {
    "type": "function",
    "function": {
        "name": "book",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "nights": {"type": "integer"},
                "class": {"type": "string", "enum": ["first", "second"]},
            },
            "required": ["city"],
        },
    },
}


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("", False),
        ("a plain answer of some length, which says what is to be said once and then ends as it should. " * 1, False),
        ("Start. " + "and so on, " * 11, True),  # 121 characters
        ("Start. " + "and so on, " * 10, False),  # 110 characters
        ("a passage of forty characters or a few. " * 3, False),  # 120 characters and three times
        ("a passage of forty characters or a few. " * 4, True),
        ("!" * 119, False),
        ("!" * 120, True),
        ("wait " * 50 + "the answer is 7, since no more can be said", False),  # it found its way out
        ("x" * 1001 * 4, True),
        ("".join(chr(97 + n * n % 23) for n in range(1001)) + "?" * 30, False),
        ("".join(f"{n} " for n in range(400)) * 4, False),  # the passage has 1,490 characters
        ("".join(f"{n} " for n in range(200)) * 4, True),  # 690
        ("Start " + "and so on. Then " * 9 + "and so", True),  # cut off inside the passage
    ],
)
def test_a_loop_is_a_passage_repeated_at_the_end(text: str, loops: bool) -> None:
    assert is_loop(text) is loops


def test_loops_are_those_that_a_naive_search_finds() -> None:
    def naive(text: str) -> bool:
        for period in range(1, min(1000, len(text) // 4) + 1):
            size = period
            while size < len(text) and text[-size - 1] == text[-size - 1 + period]:
                size += 1
            if size >= 120 and size >= 4 * period:
                return True
        return False

    generator = torch.Generator().manual_seed(3)
    found = 0
    for _ in range(300):
        unit, times, head = (int(torch.randint(1, n, (1,), generator=generator)) for n in (60, 8, 40))
        letters = "".join("ab "[int(i)] for i in torch.randint(0, 3, (unit,), generator=generator))
        text = "ba"[: head % 3] * head + letters * times + letters[: head % unit]
        assert is_loop(text) == naive(text)
        found += naive(text)
    assert 50 < found < 250


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("The sum is \\boxed{\\frac{1}{2}} and not \\boxed{ 3 }.", "3"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("so 3 + 4\n#### 7 ", "7"),
        ("  New\nYork ", "newyork"),
        ("\\boxed{open", "\\boxed{open"),
        ("", ""),
    ],
)
def test_the_final_answer_is_boxed_marked_or_all_there_is(content: str, answer: str) -> None:
    assert final_answer(content) == answer


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [
        ({"city": "Oslo"}, True),
        ({"city": "Oslo", "nights": 2, "class": "first"}, True),
        ({"city": "Oslo", "nights": 2.0}, True),
        ({"city": "Oslo", "nights": "2"}, False),
        ({"city": "Oslo", "nights": True}, False),
        ({"city": "Oslo", "class": "third"}, False),
        ({"city": "Oslo", "night": 2}, False),
        ({"nights": 2}, False),
        ("Oslo", False),
    ],
)
def test_valid_calls_fit_the_schema(arguments: Any, valid: bool) -> None:
    assert are_valid(({"name": "book", "arguments": arguments},), [TOOL]) is valid
    assert not are_valid(({"name": "bok", "arguments": {"city": "Oslo"}},), [TOOL])
    assert not are_valid(None, [TOOL]) and are_valid((), [TOOL])


def test_calls_are_read_in_the_formats_that_are_known() -> None:
    minimax = (
        'Yes.\n<minimax:tool_call>\n<invoke name="book">\n<parameter name="city">12</parameter>\n'
        '<parameter name="nights">2</parameter>\n</invoke>\n</minimax:tool_call>'
    )
    expected = {"name": "book", "arguments": {"city": "12", "nights": 2}}
    assert parse_calls(minimax, [TOOL]) == ("Yes.", (expected,))
    hermes = '<tool_call>\n{"name": "book", "arguments": {"city": "12", "nights": 2}}\n</tool_call>'
    assert parse_calls(f"{hermes}\n{hermes}", [TOOL]) == ("", (expected, expected))
    assert parse_calls(minimax.replace(">2<", ">two<"), [TOOL])[1] == (
        {"name": "book", "arguments": {"city": "12", "nights": "two"}},
    )
    for broken in (
        minimax.removesuffix("</minimax:tool_call>"),
        minimax.replace("</invoke>", ""),
        minimax.replace("</parameter>", "", 1),
        hermes.replace('"}}', '"}'),
        hermes.replace("name", "nome", 1),
        "<tool_call>",
    ):
        assert parse_calls(broken.replace("2}}", "2}"), [TOOL])[1] is None, broken
    assert parse_calls("no calls", [TOOL]) == ("no calls", ())


def test_the_figures_of_replies_by_hand() -> None:
    right: module.Call = {"name": "book", "arguments": {"city": "Oslo", "nights": 2}}
    ask = ({"role": "user", "content": "?"},)
    prompts = [
        Prompt(ask, answer="7"),
        Prompt(ask, answer="8"),
        Prompt(ask, (TOOL,), calls=(right,)),
        Prompt(ask, (TOOL,), calls=(right,)),
    ]
    ours = [
        Reply("is 7", "\\boxed{7}", (), 10, True),
        Reply("is 8", "#### 8", (), 10, True),
        Reply("", "", (right,), 10, True),
        Reply("", "", (right,), 10, True),
    ]
    theirs = [
        Reply("it is 7", "7", (), 10, True),
        Reply("no " * 60, "", (), 50, False),
        Reply("", "", ({"name": "book", "arguments": {"city": "Oslo", "nights": 3}},), 10, True),
        Reply("<tool_call>", "", None, 10, True),
    ]
    result = summarize(prompts, ours, theirs, max_tokens=50)
    quarter = Figure(0.25, pytest.approx(0.25))  # sqrt(4 / 3 * (0.25 * 0.75) * 4) / 4
    assert (result.loops.original.value, result.loops.pruned) == (0, quarter)
    assert (result.unfinished.original.value, result.unfinished.pruned) == (0, quarter)
    assert result.length_ratio.value == 2
    assert result.right_answers is not None and result.valid_calls is not None and result.exact_calls is not None
    assert [result.right_answers.original.value, result.right_answers.pruned.value] == [1, 0.5]
    assert [result.valid_calls.original.value, result.valid_calls.pruned.value] == [1, 0.5]
    assert [result.exact_calls.original.value, result.exact_calls.pruned.value] == [1, 0]
    assert result.same_answers == quarter  # the first prompt alone
    described = json.loads(json.dumps(result.to_json()))
    assert described["loops"]["pruned"]["value"] == 0.25 and described["length_ratio"]["value"] == 2
    without = summarize(prompts[:2], ours[:2], theirs[:2], max_tokens=50)
    assert without.valid_calls is None and without.exact_calls is None


def test_a_call_that_is_not_made_is_no_valid_call() -> None:
    right: module.Call = {"name": "book", "arguments": {"city": "Oslo"}}
    prompts = [Prompt(({"role": "user", "content": "?"},), (TOOL,), calls=(right,))]
    silent_one = [Reply("No.", "No.", (), 3, True)]
    result = summarize(prompts, silent_one, silent_one, max_tokens=50)
    assert result.valid_calls is not None and result.valid_calls.original.value == 0


def test_prompts_are_rows_with_messages_or_a_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one"},
        {"text": "none"},
        {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "reply"}], "answer": 2},
        {
            "messages": [{"role": "user", "content": "three"}],
            "tools": [TOOL],
            "calls": [{"name": "book", "arguments": {}}],
        },
    ]
    path = Path(write_jsonl(tmp_path / "prompts.jsonl", rows))
    prompts, skipped = read_prompts(path)
    assert [prompt.messages[-1]["content"] for prompt in prompts] == ["one", "two", "three"] and skipped == 1
    assert prompts[1].answer == "2" and prompts[2].calls == ({"name": "book", "arguments": {}},)
    assert [prompt.messages[-1]["content"] for prompt in read_prompts(path, limit=2)[0]] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read as JSON lines"), ('{"text": "a"}', "holds no prompts")]
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "file.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / "file.jsonl")
    with pytest.raises(DataError, match="No such file"):
        read_prompts(tmp_path / "missing.jsonl")


# --- models in memory


@pytest.fixture(scope="module")
def model(m2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.add_tokenizer(Path(shutil.copytree(m2, tmp_path_factory.mktemp("behaviour") / "m2")))
    (folder / "chat_template.jinja").unlink()
    settings = tiny.read_json(folder / "tokenizer_config.json")
    settings["chat_template"] = (
        "{% for turn in messages %}{{ turn.content }}{% endfor %}{% if add_generation_prompt %} {% endif %}"
    )
    tiny.write_json(folder / "tokenizer_config.json", settings)
    return folder


def test_replies_in_memory_are_those_of_transformers_one_by_one(model: Path) -> None:
    from transformers import AutoTokenizer

    whole, tokenizer = full_model(model), AutoTokenizer.from_pretrained(model)
    asked = ["the first of them", "a", "a longer one, so that the others are padded on the left"]
    prompts = [Prompt(({"role": "user", "content": text},)) for text in asked]
    replies = LoadedModel(model, Run("cpu", "float32")).reply_all(prompts, 12, silent)
    for text, reply in zip(asked, replies, strict=True):
        ids = tokenizer(text + " ", add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            for _ in range(12):
                ids = torch.cat((ids, whole(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
        new = ids[0, -12:].tolist()
        stop = new.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in new else 12
        assert reply.text == tokenizer.decode(new[:stop]) and reply.tokens == min(stop + 1, 12)
        assert reply.is_finished == (stop < 12)


def test_a_model_that_does_not_fit_is_refused_with_the_way_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reapkit.generation.free_memory", lambda device: 1000)
    with pytest.raises(ResourceError, match=r"0\.00 GB are free: it cannot reply here") as caught:
        LoadedModel(model, Run("cpu", "float32"))
    assert caught.value.hint is not None and "--endpoint URL --endpoint URL" in caught.value.hint


def test_a_model_without_a_chat_template_cannot_be_asked(m2: Path, tmp_path: Path) -> None:
    folder = tiny.add_tokenizer(Path(shutil.copytree(m2, tmp_path / "plain")))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedError, match="has no chat template"):
        LoadedModel(folder, Run("cpu", "float32"))


# --- servers

Answer = Callable[[dict[str, Any] | None], tuple[int, Any]]


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """A server that answers GETs with None and POSTs with what was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(answer(None))

        def do_POST(self) -> None:
            self._send(answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def _send(self, answered: tuple[int, Any]) -> None:
            body = answered[1].encode() if isinstance(answered[1], str) else json.dumps(answered[1]).encode()
            self.send_response(answered[0])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


MODELS = {"data": [{"id": "tiny", "max_model_len": 512}]}


def test_a_servers_replies_are_read_with_thinking_and_calls() -> None:
    asked: list[dict[str, Any]] = []

    def answer(body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is None:
            return 200, MODELS
        asked.append(body)
        call = {"id": "1", "type": "function", "function": {"name": "book", "arguments": '{"city": "Oslo"}'}}
        message = {"reasoning": "Hm. ", "content": "<think>so</think>Here.", "tool_calls": [call]}
        return 200, {"choices": [{"message": message, "finish_reason": "length"}], "usage": {"completion_tokens": 9}}

    turns = (
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "book", "arguments": {"city": "Rome"}}}]},
        {"role": "tool", "content": "done"},
    )
    with serving(answer) as url:
        [reply] = module.ask(connect(url))([Prompt(turns, (TOOL,))], 33, silent)
    assert reply == Reply(
        'Hm. <think>so</think>Here.\nbook({"city": "Oslo"})',
        "Here.",
        ({"name": "book", "arguments": {"city": "Oslo"}},),
        9,
        False,
    )
    [body] = asked
    assert (body["model"], body["temperature"], body["max_tokens"], body["tools"]) == ("tiny", 0, 33, [TOOL])
    call, result = body["messages"][1]["tool_calls"][0], body["messages"][2]
    assert call["function"]["arguments"] == '{"city": "Rome"}' and call["id"] == result["tool_call_id"]


def test_arguments_that_are_no_json_are_calls_that_cannot_be_read() -> None:
    assert module._read_calls([{"function": {"name": "book", "arguments": "{"}}]) is None
    assert module._read_calls([{"function": {"name": "book", "arguments": ""}}]) == ({"name": "book", "arguments": {}},)


@pytest.mark.parametrize(
    ("answered", "message"),
    [
        ((200, {"data": []}), "lists no model"),
        ((200, {"data": [{"id": "a"}, {"id": "b"}]}), "serves 2 models: a, b"),
        ((200, "<html>"), "something that is not JSON"),
        ((401, {"error": "no key"}), 'answered 401 Unauthorized: {"error": "no key"}'),
        ((500, "out of memory"), "answered 500 Internal Server Error: out of memory"),
    ],
)
def test_servers_that_cannot_be_asked_are_refused(answered: tuple[int, Any], message: str) -> None:
    with serving(lambda body: answered) as url, pytest.raises(EndpointError) as caught:
        connect(url)
    assert message in caught.value.message


def test_an_adapter_beside_the_model_is_no_second_model() -> None:
    rows = [{"id": "alias", "root": "m"}, {"id": "m", "root": "m"}, {"id": "lora", "root": "l", "parent": "m"}]
    with serving(lambda body: (200, {"data": rows})) as url:
        assert connect(url).model == "alias"


def test_a_server_that_dies_between_replies_is_named() -> None:
    with serving(lambda body: (200, MODELS)) as url:
        endpoint = connect(url)
    with pytest.raises(
        EndpointError, match=r"no server answers at http://127.0.0.1:\d+/v1/chat/completions: .*refused"
    ):
        module.ask(endpoint)([Prompt(({"role": "user", "content": "?"},))] * 3, 5, silent)


def test_an_answer_without_a_completion_is_refused() -> None:
    with serving(lambda body: (200, MODELS if body is None else {"choices": []})) as url:
        replier = module.ask(connect(url))
        with pytest.raises(EndpointError, match="answered a request for a chat with no completion"):
            replier([Prompt(({"role": "user", "content": "?"},))], 5, silent)
