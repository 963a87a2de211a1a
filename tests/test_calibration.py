"""Calibration promises: nothing lost or added between the user's rows and the batches, and every refusal explains itself."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from reapkit import calibration
from reapkit.calibration import CalibrationData, DataSource, Document, batches, load
from reapkit.errors import DataError, ReapkitError, UnsupportedError, UsageError

DATA = Path(__file__).parent / "data"
SHARED_DATA = Path(os.environ.get("REAPKIT_SHARED_DATA", "unset"))

TEMPLATE = (
    "{{ bos_token }}"
    "{% for tool in tools or [] %}[tool {{ tool.function | tojson }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[call {{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}]{% endfor %}"
    "{% if m.tool_call_id %}[re {{ m.tool_call_id }}]{% endif %}{% endfor %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, so that decoding gives the very text; plain text gets a BOS from the post-processor."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: number for number, sign in enumerate(["<bos>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(data: CalibrationData, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The documents decoded, without the BOS, which each must begin with exactly once."""
    decoded = [tokenizer.decode(document.input_ids) for document in data.documents]
    assert all(text.startswith("<bos>") and text.count("<bos>") == 1 for text in decoded)
    return [text.removeprefix("<bos>") for text in decoded]


def rendered(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> str:
    [text] = texts(load([write(tmp_path / "rows.jsonl", row)], tokenizer), tokenizer)
    return text


def refusal(*sources: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> ReapkitError:
    with pytest.raises(ReapkitError) as caught:
        load(sources, tokenizer, **options)
    return caught.value


# The grammar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "code=theblackcat102/evol-codealpaca-v1:4096",
            DataSource("theblackcat102/evol-codealpaca-v1", None, None, 4096, "code"),
        ),
        ("open-r1/Mixture-of-Thoughts[math]:4096", DataSource("open-r1/Mixture-of-Thoughts", "math", None, 4096)),
        (
            "SWE-bench/SWE-smith-trajectories(tool):4096",
            DataSource("SWE-bench/SWE-smith-trajectories", None, "tool", 4096),
        ),
        ("a.b-c=org/name[x y](train)", DataSource("org/name", "x y", "train", None, "a.b-c")),
        ("./my=file.jsonl.gz:100", DataSource("./my=file.jsonl.gz", samples=100)),
        ("mine=./my=file.jsonl", DataSource("./my=file.jsonl", domain="mine")),
        ("./data (copy) [1].jsonl:7", DataSource("./data (copy) [1].jsonl", samples=7)),
        (r"C:\data\x.jsonl:7", DataSource(r"C:\data\x.jsonl", samples=7)),
        ("reap-mix", DataSource("reap-mix")),
        (" reap-mix:60 ", DataSource("reap-mix", samples=60)),
    ],
)
def test_grammar_reads(text: str, expected: DataSource) -> None:
    assert DataSource.parse(text) == expected
    assert DataSource.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no data source"),
        (":10", "':10' is no data source"),
        ("org/name[]", "'org/name[]' is no data source"),
        ("org/name()", "'org/name()' is no data source"),
        ("org/name(train)[math]", "'org/name(train)[math]' is no data source"),
        ("org/name[math", "'org/name[math' is no data source"),
        ("org/name:", "'' in 'org/name:' is no number of samples"),
        ("org/name:0", "'0' in 'org/name:0' is no number of samples"),
        ("org/name:-3", "'-3' in 'org/name:-3' is no number of samples"),
        ("org/name:4k", "'4k' in 'org/name:4k' is no number of samples"),
        ("=org/name", "'' in '=org/name' is no domain name"),
        ("my code=org/name", "'my code' in 'my code=org/name' is no domain name"),
        ("org/a:1,org/b:2", "'org/a:1,org/b:2' names several sources"),
    ],
)
def test_grammar_refuses_and_says_why(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        DataSource.parse(text)
    assert caught.value.message == message
    assert caught.value.hint


# The published schemas


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (
            "instruction.jsonl",
            {
                "<user>Write a function that doubles a number.<assistant>def double(x):\n    return 2 * x",
                "<user>Translate to French.\n\ngood day<assistant>bonjour",
            },
        ),
        ("messages.jsonl", {"<user>What is 3+4?<assistant><think>\n3+4=7\n</think>\n\nIt is 7."}),
        (
            "function-calling.jsonl",
            {
                '[tool {"name": "weather", "description": "The weather of a city.", "parameters": {"type": "object", '
                '"properties": {"city": {"description": "Name of the city.", "type": "string"}, '
                '"days": {"description": "Days ahead.", "type": "integer", "default": 1}, '
                '"units": {"description": "Units to use.", "type": "array"}}, "required": ["city"]}}]'
                "<user>How warm is it in Oslo and in Rome?"
                "<assistant>[call weather city=Oslo][call weather city=Rome days=2]"
            },
        ),
        (
            "trajectory.jsonl",
            {
                "<system>You solve tasks on a computer.<user>Fix the bug."
                "<assistant>Let me look.[call edit command=view]<tool>setup.py[re tool01]<assistant>[call submit]"
            },
        ),
    ],
)
def test_published_schemas_render_through_the_template(
    file: str, expected: set[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    assert set(texts(load([str(DATA / file)], tokenizer), tokenizer)) == expected


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("evol-codealpaca-v1.jsonl", ["<user>Write a Python function", "<assistant>```python"]),
        ("Mixture-of-Thoughts.jsonl", ["<user>What is 6*7?", "<assistant><think>\n6*7=42"]),
        ("xlam-function-calling-60k.jsonl", ['"type": {"description"', "[call live_giveaways_by_type type=game]"]),
        ("SWE-smith-trajectories.jsonl", ["[call str_replace_editor command=view path=/testbed]", "[re toolu_01]"]),
    ],
)
def test_shared_sample_rows_render(file: str, parts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    path = SHARED_DATA / "calibration" / file
    if not path.exists():
        pytest.skip(f"{path} is absent")
    [text] = texts(load([str(path)], tokenizer), tokenizer)
    assert all(part in text for part in parts), text


def test_shared_gsm8k_is_drawn_by_samples_not_batches(tokenizer: PreTrainedTokenizerFast) -> None:
    path = SHARED_DATA / "calibration" / "GSM8K-train.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    data = load([f"math={path}:100"], tokenizer)
    assert {document.index for document in data.documents} == set(range(100))
    [report] = data.sources
    assert (report.rows, report.samples, data.domains) == (7473, 100, ("math",))


# Columns


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, "<user>a<assistant>b"),
        (
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "completion": "b"},
            "<system>s<user>a<assistant>b",
        ),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "<user>a<assistant>b"),
        ({"question": "a", "answer": "b", "extra": 1}, "<user>a<assistant>b"),
        ({"instruction": "a", "input": "", "output": "b"}, "<user>a<assistant>b"),
        ({"instruction": "a", "input": None, "output": "b"}, "<user>a<assistant>b"),
        ({"text": "plain é"}, "plain é"),
        ({"text": "kept", "messages": None}, "kept"),
        ({"text": "unused", "messages": [{"role": "user", "content": "a"}]}, "<user>a"),
        ({"query": "a", "answers": "[]", "tools": "[]"}, "<user>a<assistant>"),
        ({"messages": [{"role": "user", "content": ["a", {"text": "b"}]}]}, "<user>ab"),
        (
            {
                "messages": [{"role": "user", "content": "a"}],
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
            '[tool {"name": "f"}]<user>a',
        ),
        (
            {
                "messages": [{"role": "user", "content": "a"}],
                "tools": [{"name": "f", "parameters": {"type": "object", "properties": {"p": {"type": "null"}}}}],
            },
            '[tool {"name": "f", "parameters": {"type": "object", "properties": {"p": {"type": "null"}}}}]<user>a',
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1, "unused": None}}]},
                    {"role": "assistant", "content": "b", "tool_calls": []},
                ]
            },
            "<assistant>[call f x=1]<assistant>b",
        ),
    ],
)
def test_columns_are_recognised(
    row: dict[str, Any], expected: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert rendered(tmp_path, tokenizer, row) == expected


@pytest.mark.parametrize(
    ("python", "schema"),
    [
        ("str", "string"),
        ("Optional[int]", "integer"),
        ("float, optional", "number"),
        ("bool", "boolean"),
        ("Dict[str, Any]", "object"),
        ("Tuple[int, int]", "array"),
        ("set", "array"),
        ("Callable", "Callable"),
    ],
)
def test_flat_tool_types_become_json_schema(
    python: str, schema: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tools = [{"name": "f", "parameters": {"p": {"type": python}}}]
    text = rendered(tmp_path, tokenizer, {"query": "q", "answers": "[]", "tools": json.dumps(tools)})
    function, _ = json.JSONDecoder().raw_decode(text.removeprefix("[tool "))
    assert function["parameters"]["properties"] == {"p": {"type": schema}}
    assert function["parameters"]["required"] == ([] if "optional" in python.lower() else ["p"])


def test_tool_call_ids_suit_the_strictest_templates(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("{{ bos_token }}{% for c in messages[1].tool_calls %}{{ c.id }} {% endfor %}")
    calls = [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]
    row = {"query": "q", "answers": calls, "tools": [{"name": "f"}]}
    assert rendered(tmp_path, tokenizer, row) == "call00000 call00001 "


def test_arguments_are_text_for_templates_that_add_them_to_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("{{ bos_token }}{{ 'call ' + messages[1].tool_calls[0].function.arguments }}")
    row = {"query": "q", "answers": [{"name": "f", "arguments": {"x": "é"}}], "tools": [{"name": "f"}]}
    assert rendered(tmp_path, tokenizer, row) == 'call {"x": "é"}'


def test_broken_tool_arguments_are_left_to_the_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("{{ bos_token }}{{ messages[0].tool_calls[0].function.arguments }}")
    message = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": '}]}
    assert rendered(tmp_path, tokenizer, {"messages": [message]}) == '{"x": '


def test_dates_in_a_template_are_fixed(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    macro = "{%- macro today() %}{{ strftime_now('%Y-%m-%d') }} {{ strftime_now('%d %b %Y') }}{% endmacro %}"
    tokenizer = make_tokenizer(macro + "{{ bos_token }}{% if strftime_now is defined %}{{ today() }}{% endif %}")
    assert texts(load([source], tokenizer), tokenizer) == ["2025-01-01 01 Jan 2025"]
    plain = make_tokenizer("\n x{% if false %}{{ strftime_now('%Y') }}{% endif %}")
    assert plain.decode(load([source], plain).documents[0].input_ids) == "\n x", "the macro left a trace"


# Special tokens


def test_bos_is_never_doubled(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(
        tmp_path / "rows.jsonl",
        {"text": "plain"},
        {"text": "<bos>with its own"},
        {"messages": [{"role": "user", "content": "chat"}]},
    )
    for document in load([source], tokenizer).documents:
        assert (document.input_ids == tokenizer.bos_token_id).sum() == 1
        assert document.input_ids[0] == tokenizer.bos_token_id


def test_chats_get_no_bos_that_the_template_does_not_write(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": "chat"}]})
    tokenizer = make_tokenizer("{{ messages[0].content }}")
    assert tokenizer.decode(load([source], tokenizer).documents[0].input_ids) == "chat"


def test_half_surrogates_become_the_replacement_character(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert rendered(tmp_path, tokenizer, {"text": "a\ud83db \U0001f600"}) == "a�b \U0001f600"


def test_plain_text_needs_no_chat_template(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"text": "plain"})
    tokenizer = make_tokenizer(None)
    assert texts(load([source], tokenizer), tokenizer) == ["plain"]


# File formats


def test_every_format_gives_the_same_digest(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    rows = [json.loads(line) for line in (DATA / "questions.jsonl").read_text().splitlines()]
    lines = "\r\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "a.JSONL.GZ").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5
    digests = {load([f"{file}:7"], tokenizer).digest for file in files}
    assert digests == {load([f"a={DATA / 'questions.jsonl'}:7"], tokenizer).digest}


def test_parquet_nulls_of_other_rows_are_not_rendered(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    calls = [{"x": 1}, {"y": 2}]
    rows = [
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": call}}]}]}
        for call in calls
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    data = load([str(tmp_path / "a.parquet")], tokenizer)
    assert set(texts(data, tokenizer)) == {"<assistant>[call f x=1]", "<assistant>[call f y=2]"}


@pytest.mark.parametrize("name", ["notes.txt", "notes.md", "notes.txt.gz"])
def test_a_text_file_is_one_document(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    content = b"two\nlines\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    data = load([f"{tmp_path / name}:5"], tokenizer)
    assert texts(data, tokenizer) == ["two\nlines\n"]
    assert (data.domains, data.sources[0].requested, data.sources[0].samples) == (("notes",), 5, 1)


# Sampling, windows, domains, digest


def test_samples_are_drawn_by_seed_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    questions, other = str(DATA / "questions.jsonl"), str(DATA / "messages.jsonl")

    def drawn(*sources: str, seed: int = 0) -> list[str]:
        data = load(sources, tokenizer, seed=seed)
        return [text for text in texts(data, tokenizer) if " plus " in text]

    five = drawn(f"{questions}:5")
    assert five == drawn(f"{questions}:5")
    assert five == drawn(other, f"{questions}:5"), "another source changed the draw"
    assert five == drawn(f"{questions}:9")[:5], "a smaller draw is not the beginning of a larger one"
    assert five != drawn(f"{questions}:5", seed=1)
    numbers = [int(text.split()[2]) for text in five]
    assert numbers == [10, 12, 7, 5, 6], "the order is another than in earlier versions: old digests no longer hold"


def test_fewer_rows_than_asked_are_all_used_and_recorded(tokenizer: PreTrainedTokenizerFast) -> None:
    [report] = load([f"{DATA / 'questions.jsonl'}:5000"], tokenizer).sources
    assert (report.rows, report.requested, report.samples) == (12, 5000, 12)


def test_long_samples_become_windows_and_no_token_is_lost(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "rows.jsonl", *({"text": "x" * (length - 1)} for length in (15, 16, 17, 40)))
    whole = load([source], tokenizer)
    data = load([source], tokenizer, max_length=16)
    rejoined = {
        index: np.concatenate([document.input_ids for document in data.documents if document.index == index])
        for index in range(4)
    }
    for document in whole.documents:
        assert np.array_equal(rejoined[document.index], document.input_ids)
    assert max(len(document.input_ids) for document in data.documents) == 16
    assert data.num_tokens == whole.num_tokens == 88
    [report] = data.sources
    assert report.to_json() == {
        "source": source,
        "rows": 4,
        "requested": None,
        "samples": 4,
        "empty": 0,
        "split_samples": 2,
        "windows": 7,
        "tokens": 88,
        "images": 0,
    }


def test_windows_share_index_fold_and_domain(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "rows.jsonl", *({"text": sign * 50, "domain": sign} for sign in "abcdef"))
    data = load([source], tokenizer, max_length=8)
    fold_of: dict[int, set[int]] = {}
    for batch in batches(data, tokens_per_batch=32):
        for row_T, length, domain, fold in zip(
            batch.input_ids_BT, batch.length_B, batch.domain_B, batch.fold_B, strict=True
        ):
            sign = data.domains[domain]
            assert set(tokenizer.decode(row_T[:length]).removeprefix("<bos>")) == {sign}
            fold_of.setdefault(domain, set()).add(int(fold))
    assert all(len(folds) == 1 for folds in fold_of.values())
    assert {fold for folds in fold_of.values() for fold in folds} == {0, 1, 2, 3}


def test_domain_is_the_given_else_the_rows_else_the_sources(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(
        tmp_path / "my.rows.jsonl", {"text": "a", "domain": "own"}, {"text": "b"}, {"text": "c", "domain": ""}
    )
    data = load([source], tokenizer)
    found = dict(zip(texts(data, tokenizer), (document.domain for document in data.documents), strict=True))
    assert found == {"a": "own", "b": "my.rows", "c": "my.rows"}
    assert data.domains == ("my.rows", "own")
    assert load([f"given={source}"], tokenizer).domains == ("given",)


def test_indices_number_the_samples_over_all_sources(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": ""}, {"text": "b"})
    second = write(tmp_path / "b.jsonl", {"text": "c"}, {"text": "d"})
    data = load([first, DataSource(second)], tokenizer)
    assert [document.index for document in data.documents] == [0, 1, 2, 3]


def test_empty_rows_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": ""}, {"messages": []}, {"messages": "[]"})
    [report] = load([source], tokenizer).sources
    assert (report.rows, report.samples, report.empty, report.tokens) == (4, 1, 3, 2)


def test_digest_changes_with_what_is_observed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    one = write(tmp_path / "one.jsonl", {"text": "abcdefghij"}, {"text": "klm"})
    two = write(tmp_path / "two.jsonl", {"text": "nop"})

    def digest(*sources: str, **options: int) -> str:
        return load(sources, tokenizer, **options).digest

    changed = [
        digest(f"x={one}", f"x={two}"),
        digest(f"x={one}", f"x={two}", max_length=4),
        digest(f"x={one}", f"x={two}", max_length=5),
        digest(f"y={one}", f"x={two}"),
        digest(f"x={two}", f"x={one}"),
        digest(f"x={one}"),
        digest(f"x={one}:1", f"x={two}"),
        digest(f"x={one}", f"x={two}", f"x={two}"),
    ]
    assert len(set(changed)) == len(changed)


def test_digest_covers_token_order_borders_domains_and_indices_only() -> None:
    def digest(*documents: tuple[list[int], str, int]) -> str:
        return calibration._digest(Document(np.array(ids, np.int32), domain, index) for ids, domain, index in documents)

    base = digest(([1, 2], "x", 0), ([3], "x", 1))
    assert base == digest(([1, 2], "x", 0), ([3], "x", 1))
    others = [
        digest(([2, 1], "x", 0), ([3], "x", 1)),
        digest(([1], "x", 0), ([2, 3], "x", 1)),
        digest(([1, 2], "y", 0), ([3], "x", 1)),
        digest(([1, 2], "x", 0), ([3], "x", 0)),
        digest(([3], "x", 1), ([1, 2], "x", 0)),
    ]
    assert len({base, *others}) == 6


def test_digest_ignores_path_request_and_unused_length(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "abc", "extra": 1}, {"text": "de"}]
    first, second = write(tmp_path / "one.jsonl", *rows), write(tmp_path / "two.jsonl", *rows)
    digests = {
        load([f"x={first}"], tokenizer).digest,
        load([f"x={second}:2"], tokenizer).digest,
        load([f"x={second}:99"], tokenizer, max_length=4).digest,
    }
    assert len(digests) == 1


# Batches


def random_data(num_documents: int, longest: int) -> CalibrationData:
    rng = np.random.default_rng(0)
    documents = tuple(
        Document(rng.integers(1, 1000, rng.integers(1, longest + 1)).astype(np.int32), "ab"[n % 2], n)
        for n in range(num_documents)
    )
    return CalibrationData(documents, ("a", "b"), "", ())


@pytest.mark.parametrize("budget", [1, 64, 200, 5000])
def test_batches_hold_every_token_once_and_keep_the_budget(budget: int) -> None:
    data = random_data(150, 100)
    seen = []
    for batch in batches(data, tokens_per_batch=budget, pad_id=-7):
        size = batch.input_ids_BT.size
        assert size <= budget or len(batch.length_B) == 1
        assert batch.input_ids_BT.shape == (len(batch.length_B), batch.length_B.max())
        assert (batch.input_ids_BT[~batch.mask_BT] == -7).all() and (batch.input_ids_BT[batch.mask_BT] > 0).all()
        assert batch.mask_BT.dtype == bool and (batch.mask_BT.sum(1) == batch.length_B).all()
        assert {a.dtype for a in (batch.input_ids_BT, batch.length_B, batch.domain_B, batch.fold_B)} == {np.dtype("i8")}
        for row in range(len(batch.length_B)):
            ids = batch.input_ids_BT[row][batch.mask_BT[row]].tolist()
            seen.append((ids, data.domains[batch.domain_B[row]], int(batch.fold_B[row])))
    expected = [(document.input_ids.tolist(), document.domain, document.index % 4) for document in data.documents]
    assert sorted(seen) == sorted(expected)


def test_batches_pad_little_and_fill_the_budget() -> None:
    data = random_data(2000, 500)
    made = batches(data, tokens_per_batch=8192)
    cells = sum(batch.input_ids_BT.size for batch in made)
    assert all(batch.input_ids_BT.size - batch.length_B.sum() <= batch.input_ids_BT.size / 8 for batch in made)
    assert data.num_tokens > 0.97 * cells
    assert len(made) < 1.5 * data.num_tokens / 8192


def test_batches_are_repeatable_and_any_first_part_is_a_fair_sample() -> None:
    data = random_data(2000, 500)
    made, again = batches(data, tokens_per_batch=8192), batches(data, tokens_per_batch=8192)
    assert all(np.array_equal(a.input_ids_BT, b.input_ids_BT) for a, b in zip(made, again, strict=True))
    longest = [batch.input_ids_BT.shape[1] for batch in made]
    assert abs(np.mean(longest[: len(made) // 2]) - np.mean(longest)) < 0.15 * np.mean(longest)


def test_batches_of_no_size_are_refused() -> None:
    with pytest.raises(UsageError, match="a batch of 0 tokens holds nothing"):
        batches(random_data(1, 5), tokens_per_batch=0)


# The recipe and the hub


class FakeStream:
    """Rows as a streamed data set of the hub gives them; shuffling is recorded and reverses them."""

    def __init__(self, rows: list[Any], log: list[Any]) -> None:
        self.rows, self.log = rows, log

    def shuffle(self, *, seed: int, buffer_size: int) -> FakeStream:
        self.log.append((seed, buffer_size))
        return FakeStream(self.rows[::-1], self.log)

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            if isinstance(row, Exception):
                raise row
            yield row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A `datasets` module that serves `rows` and logs what was asked."""
    fake = types.SimpleNamespace(rows=[{"text": f"row {n}"} for n in range(20)], calls=[], shuffles=[])
    module = types.ModuleType("datasets")

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> FakeStream:
        fake.calls.append((name, subset, split, streaming))
        return FakeStream(fake.rows, fake.shuffles)

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return fake


def test_hub_sets_are_streamed_shuffled_and_cut(hub: types.SimpleNamespace, tokenizer: PreTrainedTokenizerFast) -> None:
    data = load(["org/name[math]:3", "org/other(tool):1"], tokenizer, seed=5)
    assert hub.calls == [("org/name", "math", "train", True), ("org/other", None, "tool", True)]
    assert [seed for seed, _ in hub.shuffles] == [5, 5]
    assert texts(data, tokenizer) == ["row 19", "row 18", "row 17", "row 19"]
    assert data.domains == ("org/name[math]", "org/other")
    assert [(report.source, report.rows) for report in data.sources] == [
        ("org/name[math]:3", 3),
        ("org/other(tool):1", 1),
    ]


def test_reap_mix_is_six_equal_parts(hub: types.SimpleNamespace, tokenizer: PreTrainedTokenizerFast) -> None:
    data = load(["reap-mix"], tokenizer)
    assert [report.requested for report in data.sources] == [4096] * 6
    assert [call[:3] for call in hub.calls] == [
        ("theblackcat102/evol-codealpaca-v1", None, "train"),
        ("Salesforce/xlam-function-calling-60k", None, "train"),
        ("open-r1/Mixture-of-Thoughts", "code", "train"),
        ("open-r1/Mixture-of-Thoughts", "math", "train"),
        ("open-r1/Mixture-of-Thoughts", "science", "train"),
        ("SWE-bench/SWE-smith-trajectories", None, "tool"),
    ]
    assert data.domains == ("agentic", "code", "reasoning-code", "reasoning-math", "reasoning-science", "tools")


def test_reap_mix_spreads_a_number_of_samples(hub: types.SimpleNamespace, tokenizer: PreTrainedTokenizerFast) -> None:
    data = load(["mine=reap-mix:20"], tokenizer)
    assert [report.requested for report in data.sources] == [4, 4, 3, 3, 3, 3]
    assert data.domains == ("mine",)


# Refusals: the sentence and the way out


def test_refused_sources_say_what_and_the_way_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "x.csv").write_text("a,b\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "object.json").write_text('{"text": "a"}')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    (tmp_path / "number.jsonl").write_text('{"text": "a"}\n7\n')
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    (tmp_path / "not.jsonl.gz").write_text("plain")
    (tmp_path / "short.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    (tmp_path / "x.parquet").write_bytes(b"PAR0")
    accepted = "give a file that ends in .jsonl, .jsonl.gz, .json, .json.gz, .parquet, .txt, .txt.gz, .md, .md.gz"
    expected: list[tuple[str, str, str | None]] = [
        ("", " is a directory", accepted),
        ("x.csv", "x.csv is a file of a kind that is not read", accepted),
        ("missing.jsonl", "missing.jsonl", "a hub data set is written ORG/NAME"),
        ("empty.jsonl", "empty.jsonl holds no rows", None),
        ("lines.json", "lines.json is not JSON: Extra data", "a file with one row a line must end in .jsonl"),
        ("object.json", "object.json holds an object, not a list of rows", "write [{...}, {...}]"),
        ("broken.jsonl", "broken.jsonl line 3 is not JSON: Expecting value", None),
        ("number.jsonl", "number.jsonl line 2 holds a number, not an object with columns", None),
        ("blank.jsonl", "blank.jsonl yields no tokens: each of its 2 samples is empty", None),
        ("latin.txt", "latin.txt is not UTF-8 text", None),
        ("latin.jsonl", "latin.jsonl line 1 is not JSON: 'utf-8' codec", None),
        ("not.jsonl.gz", "not.jsonl.gz cannot be read: Not a gzipped file", None),
        ("short.txt.gz", "short.txt.gz cannot be read: Compressed file ended", None),
        ("x.parquet", "x.parquet is not Parquet", None),
    ]
    for name, message, hint in expected:
        if name.endswith(".parquet"):
            pytest.importorskip("pyarrow.parquet")
        error = refusal(DataSource(str(tmp_path / name)), tokenizer=tokenizer)
        assert isinstance(error, DataError)
        assert message in error.message, error.message
        assert error.hint == hint


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("./none.jsonl", "there is no file ./none.jsonl", "a hub data set is written ORG/NAME"),
        ("a/b/c", "there is no file a/b/c", "a hub data set is written ORG/NAME"),
        ("org/none.json", "there is no file org/none.json", "a hub data set is written ORG/NAME"),
        ("none.csv", "there is no file none.csv", "a hub data set is written ORG/NAME"),
        (
            "reapmix",
            "'reapmix' is neither a file, nor a hub data set (ORG/NAME), nor a recipe",
            "did you mean 'reap-mix'?",
        ),
        ("zzz", "'zzz' is neither a file, nor a hub data set (ORG/NAME), nor a recipe", "one of: reap-mix"),
    ],
)
def test_unknown_names_are_refused_without_the_network(
    source: str, message: str, hint: str, hub: types.SimpleNamespace, tokenizer: PreTrainedTokenizerFast
) -> None:
    error = refusal(source, tokenizer=tokenizer)
    assert (type(error), error.message, error.hint) == (DataError, message, hint)
    assert hub.calls == []


@pytest.mark.parametrize(
    ("sources", "options", "message", "hint"),
    [
        ([], {}, "no calibration data given", "--data [DOMAIN=]SOURCE[SUBSET](SPLIT)[:SAMPLES], or --data reap-mix"),
        (["reap-mix"], {"max_length": 0}, "a maximal length of 0 tokens holds nothing", "--max-length 2048 is usual"),
        (
            ["reap-mix:5"],
            {},
            "5 samples are fewer than the 6 parts of reap-mix",
            "ask for at least 6: reap-mix:6",
        ),
        (["reap-mix[math]"], {}, "reap-mix is a recipe: it has no subset or split", "--data reap-mix"),
        (
            [f"{DATA / 'messages.jsonl'}(train)"],
            {},
            f"{DATA / 'messages.jsonl'} is a file: it has no subset or split",
            f"--data {DATA / 'messages.jsonl'}",
        ),
    ],
)
def test_contradicting_arguments_are_usage_errors(
    sources: list[str], options: dict[str, int], message: str, hint: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    error = refusal(*sources, tokenizer=tokenizer, **options)
    assert (type(error), error.message, error.hint) == (UsageError, message, hint)


CALL = 'write {"name": ..., "arguments": {...}}'


@pytest.mark.parametrize(
    ("row", "message", "hint"),
    [
        (
            {"b": 1, "a": 2, "text": None},
            "has no known set of columns: it has a, b",
            "rename its columns to one of these sets: messages; prompt, completion; query, answers, tools; "
            "instruction, output; question, answer; text",
        ),
        ({}, "has no known set of columns: it has none", None),
        ({"text": 5}, ": column text holds a number, not a string", None),
        ({"question": "q", "answer": ["a"]}, ": column answer holds a list, not a string", None),
        ({"text": "a", "domain": True}, ": column domain holds true or false, not a string", None),
        ({"messages": "[{"}, ": column messages is not JSON: Expecting property name", None),
        ({"messages": {"role": "user"}}, ": column messages holds an object, not a list of messages", None),
        (
            {"messages": [{"role": "user", "content": "a"}, {"content": "b"}]},
            ": message 2 of messages is no object with a role",
            'write {"role": ..., "content": ...}',
        ),
        (
            {"prompt": [{"role": "user", "content": 5}], "completion": ""},
            ": message 1 of prompt has content that is a number, not text",
            None,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            ": message 1 of messages holds a part that is no text (input_audio)",
            None,
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": "f()"}]},
            ": message 1 of messages has tool_calls that are a string, not a list",
            None,
        ),
        ({"messages": [{"role": "assistant", "tool_calls": ["f()"]}]}, ": a tool call has no name", CALL),
        ({"query": "q", "answers": "{}", "tools": "[]"}, ": column answers holds an object, not a list of", None),
        ({"query": "q", "answers": "[]", "tools": "{}"}, ": column tools holds an object, not a list", None),
        (
            {"query": "q", "answers": "[]", "tools": "[{}]"},
            ": a tool has no name",
            'write {"name": ..., "description": ..., "parameters": {...}}',
        ),
        (
            {"query": "q", "answers": "[]", "tools": '[{"name": "f", "parameters": "x"}]'},
            ": tool f has parameters that are a string, not an object",
            None,
        ),
    ],
)
def test_refused_rows_are_named_by_file_and_line(
    row: dict[str, Any], message: str, hint: str | None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write(tmp_path / "rows.jsonl", {"text": "a"}, row)
    error = refusal(source, tokenizer=tokenizer)
    assert isinstance(error, DataError)
    assert error.message.startswith(f"{source} line 2")
    assert message in error.message
    assert hint is None or error.hint == hint


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_failing_template_names_row_and_reason(template: str, reason: str, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    error = refusal(source, tokenizer=make_tokenizer(template))
    assert isinstance(error, DataError)
    assert error.message.startswith(f"{source} line 1: the chat template fails: ")
    assert reason in error.message
    assert error.hint == "change or remove the row, or give its rendered text in a column text"


def test_a_chat_without_a_template_is_refused_with_the_way_out() -> None:
    error = refusal(str(DATA / "messages.jsonl"), tokenizer=make_tokenizer(None))
    assert error.message == f"{DATA / 'messages.jsonl'} line 1 is a chat, but the tokenizer has no chat template"
    assert error.hint == "give rows with a column text, or a checkpoint with a chat template"


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("datasets", "org/name:1", "reading org/name from the hub needs the package datasets"),
        ("pyarrow.parquet", "x.parquet", "x.parquet needs the package pyarrow"),
    ],
)
def test_missing_extras_are_named(
    module: str,
    source: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    error = refusal(source, tokenizer=tokenizer)
    assert isinstance(error, UnsupportedError)
    assert error.message.endswith(message)
    assert error.hint == "pip install 'reapkit[data]'"


@pytest.mark.parametrize(
    ("failure", "message", "hint"),
    [
        (
            RuntimeError("Dataset 'org/name' is a gated dataset on the Hub. You must be authenticated to access it."),
            "org/name cannot be read from the hub: Dataset 'org/name' is a gated dataset on the Hub. "
            "You must be authenticated to access it.",
            "accept its terms on the hub page of org/name, then log in: hf auth login",
        ),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['all']\nmore"),
            "org/name cannot be read from the hub: BuilderConfig 'x' not found. Available: ['all']",
            "check its name, subset and split, and the network; a local copy can be given as a file",
        ),
        (
            TimeoutError(),
            "org/name cannot be read from the hub: TimeoutError",
            "check its name, subset and split, and the network; a local copy can be given as a file",
        ),
    ],
)
def test_hub_failures_say_what_and_the_way_out(
    failure: Exception, message: str, hint: str, hub: types.SimpleNamespace, tokenizer: PreTrainedTokenizerFast
) -> None:
    hub.rows = [{"text": "a"}, failure]
    error = refusal("org/name", tokenizer=tokenizer)
    assert (type(error), error.message, error.hint) == (DataError, message, hint)


def test_hub_rows_are_named_by_sample(hub: types.SimpleNamespace, tokenizer: PreTrainedTokenizerFast) -> None:
    hub.rows = [{"nothing": 1}, {"text": "a"}]
    assert refusal("org/name", tokenizer=tokenizer).message.startswith("org/name sample 2 has no known set of columns")


def test_importing_needs_no_torch_and_no_optional_package() -> None:
    code = (
        "import sys, reapkit.calibration\n"
        "print([name for name in ('torch', 'transformers', 'pyarrow', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
