"""The table of benchmarks: figures by hand, cells that say why they are empty, replies without a model, what resumes."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reapkit import benchmarks, evaluation
from reapkit import sandbox as sandboxes
from reapkit.benchmarks import CARD, Question, prompt_of
from reapkit.endpoints import Endpoint
from reapkit.errors import EndpointError, EvaluationError, SandboxError, UsageError
from reapkit.evaluation import Cell, Evaluation, Settings, Subject, describe, evaluate, score_replies
from reapkit.figures import Figure
from reapkit.programs import Problem, expected, judge, program_in, read

SHARED = os.environ.get("REAPKIT_SHARED_DATA")
STAND_IN = Path(__file__).parent / "eval/AIME25-stand-in.jsonl"


@pytest.fixture(scope="session")
def sandbox() -> sandboxes.Sandbox:
    try:
        return sandboxes.find("bubblewrap")
    except SandboxError as error:
        pytest.skip(error.message)


def problem_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def f{number}(x):\n    """Multiply by {number}."""\n',
        "entry_point": f"f{number}",
        "canonical_solution": f"    return {number} * x\n",
        "base_input": [[1], [2]],
        "plus_input": [[-3]],
        "atol": 0,
    }
    return {**row, **changes}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# --- judging as EvalPlus does


def humaneval(entry_point: str = "f", atol: float = 0, solution: str = "", **inputs: Any) -> Problem:
    return Problem(
        "humaneval", "HumanEval/1", "", entry_point, solution, inputs.get("base", ([1],)), inputs.get("plus", ()), atol
    )


@pytest.mark.parametrize(
    ("reference", "code", "atol", "is_right"),
    [
        ("return [x, (2, 3)]", "return [x, (2, 3)]", 0, True),
        ("return [x, (2, 3)]", "return [x, [2, 3]]", 0, False),
        ("return x", "return True", 0, True),  # 1 == True, as in Python
        ("return 'a' * 100_000", "return 'a' * 100_000", 0, True),
        ("return 'a' * 100_000", "return 'a' * 100_001", 0, False),
        ("return 0.1 + 0.2", "return 0.3", 0, True),  # floats are compared to 1e-6
        ("return 0.1 + 0.2", "return 0.30001", 0, False),
        ("return 1.0", "return 1 + 1e-7", 0, True),
        ("return [1.0]", "return (1.0 + 1e-9,)", 0, False),
        ("return [1.0, 2.0]", "return [1.0]", 0, False),
        ("return 3", "return 3.0000001", 1e-3, False),  # of another type
        ("return 3.0", "return 3.0001", 1e-3, True),
        ("return {1: {2}}", "import collections; return collections.OrderedDict({1: {2}})", 0, True),
        ("return None", "return x", 0, False),
        ("return x", "import numpy; return numpy.int64(x)", 0, True),
        ("return [x]", "import numpy; return numpy.array([x])", 0, False),
    ],
)  # fmt: skip
def test_outputs_are_compared_as_evalplus_compares_them(
    sandbox: sandboxes.Sandbox, reference: str, code: str, atol: float, is_right: bool
) -> None:
    problem = humaneval(atol=atol, solution=f"def f(x):\n    {reference}\n")
    verdict = judge(problem, f"def f(x):\n    {code}\n", expected(problem, sandbox), sandbox)
    assert verdict.base is is_right, verdict.reason


def test_problems_with_several_answers_have_oracles_of_their_own(sandbox: sandboxes.Sandbox) -> None:
    def verdict(problem: Problem, code: str) -> bool:
        return judge(problem, code, expected(problem, sandbox), sandbox).base

    root = humaneval("find_zero", 1e-4, "def find_zero(xs):\n    return 1.0\n", base=([[-2, 1, 1]],))
    assert verdict(root, "def find_zero(xs):\n    return -2.0\n") and not verdict(
        root, "def find_zero(xs):\n    return 2.0\n"
    )
    sets = Problem(
        "mbpp", "Mbpp/7", "", "find_char_long", "def find_char_long(t):\n    return ['a', 'b']\n", (["x"],), (), 0
    )
    assert verdict(sets, "def find_char_long(t):\n    return ('b', 'a', 'a')\n")
    match = Problem(
        "mbpp",
        "Mbpp/1",
        "",
        "check_str",
        "import re\ndef check_str(s):\n    return re.match('a', s)\n",
        (["a"], ["b"]),
        (),
        0,
    )
    assert verdict(match, "def check_str(s):\n    return s == 'a'\n") and not verdict(
        match, "def check_str(s):\n    return 1\n"
    )


def test_a_reference_that_does_not_run_is_an_error_and_no_zero(sandbox: sandboxes.Sandbox) -> None:
    with pytest.raises(
        EvaluationError, match="the reference of HumanEval/1 does not run in the sandbox: ZeroDivisionError"
    ):
        expected(humaneval(solution="def f(x):\n    return 1 / 0\n"), sandbox)


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        ("Here:\n```python\ndef f(x):\n    return 1\n```\nDone.", "def f(x):\n    return 1"),
        ("```\nimport g\n```\nthen\n```py\ndef f(x): return 2\n```", "def f(x): return 2"),
        ("```python\ndef f(x): return 1\n```\nBetter:\n```python\ndef f(x): return 2\n```\n```python\nprint(f(1))\n```",
         "def f(x): return 2"),
        ("def f(x): return 3", "def f(x): return 3"),
        ("```python\ndef f(x):\n    return 4", "def f(x):\n    return 4"),
        ("```bash\nls\n```\n```python\nf = lambda x: 5\n```", "f = lambda x: 5"),
    ],
)  # fmt: skip
def test_the_program_is_found_in_the_reply(reply: str, program: str) -> None:
    assert program_in(reply, "f") == program


def test_files_of_problems_are_read_or_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "HumanEvalPlus.jsonl", [problem_row(2)])
    assert read(path, "humaneval")[0].entry_point == "f2"
    with pytest.raises(EvaluationError, match="cannot be read: No such file"):
        read(tmp_path / "none", "mbpp")
    with pytest.raises(EvaluationError, match="holds no problems of EvalPlus: KeyError"):
        read(write_rows(tmp_path / "other.jsonl", [{"a": 1}]), "humaneval")


def test_inputs_that_json_cannot_hold_get_their_types_back(tmp_path: Path) -> None:
    def inputs(number: int, call: list[Any]) -> Any:
        row = problem_row(0, task_id=f"Mbpp/{number}", base_input=[call], plus_input=[])
        return read(write_rows(tmp_path / "rows.jsonl", [row]), "mbpp")[0].base_input[0]

    assert inputs(2, [[1, 2], [3]]) == [(1, 2), (3,)]
    assert inputs(63, [[[1, 2]]]) == [[(1, 2)]]
    assert inputs(115, [[[1], []]]) == [[{1}, {}]]
    assert inputs(124, ["1", "2j"]) == (1.0, 2j)
    assert inputs(580, [[1, [2]]]) == ((1, (2,)),)
    assert inputs(1, [[1, 2]]) == [[1, 2]]


@pytest.mark.skipif(SHARED is None, reason="REAPKIT_SHARED_DATA names no folder with the benchmarks")
def test_some_canonical_solutions_of_the_real_data_pass(sandbox: sandboxes.Sandbox) -> None:
    """All of them: tests/eval/canonical.py."""
    for name, benchmark in (("HumanEvalPlus-v0.1.10", "humaneval"), ("MbppPlus-v0.2.0", "mbpp")):
        problems = read(Path(SHARED or "", f"benchmarks/{name}.jsonl.gz"), benchmark)  # type: ignore[arg-type]
        assert len(problems) == {"humaneval": 164, "mbpp": 378}[benchmark]
        for problem in problems[1 :: len(problems) // 3]:
            wanted = expected(problem, sandbox)
            assert judge(problem, problem.reference, wanted, sandbox).plus, problem.task_id
            assert not judge(problem, f"def {problem.entry_point}(*_): return object()", wanted, sandbox).base


# --- problems


def test_the_stand_in_has_thirty_problems_whose_answers_are_found_by_counting() -> None:
    import importlib.util

    specification = importlib.util.spec_from_file_location("stand_in", STAND_IN.with_name("stand_in.py"))
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    rows = [json.loads(line) for line in STAND_IN.read_text().splitlines()]
    assert rows == module.rows() and len(rows) == 30
    assert all(row.keys() == {"id", "problem", "answer"} and 0 <= int(row["answer"]) <= 999 for row in rows)


def test_problems_come_from_the_folder_and_a_stand_in_says_so(tmp_path: Path) -> None:
    aime = next(benchmark for benchmark in CARD if benchmark.name == "aime25")
    (tmp_path / STAND_IN.name).write_bytes(STAND_IN.read_bytes())
    found = benchmarks.load(aime, tmp_path)
    assert found.is_stand_in and len(found.rows) == 30
    write_rows(tmp_path / "AIME25.jsonl.gz", [{"problem": "1 + 1", "answer": 2, "id": 7}])
    found = benchmarks.load(aime, tmp_path)
    assert found.rows == [Question("7", "1 + 1", "2")] and not found.is_stand_in
    assert prompt_of(found.rows[0]).endswith("within \\boxed{}.")


def test_problems_that_cannot_be_fetched_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr(
        benchmarks.urllib.request, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(EvaluationError, match="cannot be fetched: no network"):
        benchmarks.load(CARD[0], None)
    write_rows(tmp_path / "reapkit/HumanEvalPlus.jsonl.gz", [problem_row(1)])
    with pytest.raises(EvaluationError, match="is another file than the one that scores were published on"):
        benchmarks.load(CARD[0], None)
    with pytest.raises(EvaluationError, match=r"MATH-500 comes from the hub|cannot be read from the hub"):
        benchmarks.load(CARD[3], tmp_path)
    write_rows(tmp_path / "MATH-500.jsonl", [{"a": 1}])
    with pytest.raises(EvaluationError, match="holds no problems of MATH-500: KeyError"):
        benchmarks.load(CARD[3], tmp_path)


# --- the table


def test_figures_differences_and_errors_by_hand() -> None:
    # Two repeats of three problems: means 1, 0.5, 0; mean 0.5, standard error sqrt(0.25 / 3).
    first = Cell.of({"a": [1, 1], "b": [1, 0], "c": [0, 0]})
    assert first.figure == Figure(0.5, pytest.approx((0.25 / 3) ** 0.5))
    # Differences by problem 0, -0.5, 1.
    second = Cell.of({"a": [1, 1], "b": [0, 0], "c": [1, 1]}).against(first)
    assert second.difference == Figure(pytest.approx(1 / 6), pytest.approx((7 / 12 / 3) ** 0.5))
    assert Cell(None, "gone").against(first).difference is None
    assert Cell.of({}) == Cell(None, "no problem was scored")
    assert Cell.from_json(json.loads(json.dumps(second.to_json()))) == second


def test_the_table_shows_compression_differences_and_reasons() -> None:
    first, second = (
        Cell(Figure(0.939, 0.019), scores={"a": 1.0}),
        Cell(Figure(0.933, 0.02), difference=Figure(-0.006, 0.01)),
    )
    subjects = (Subject("original", "x", None), Subject("pruned", "y", 0.25))
    rows = {
        "HumanEval": (first, second),
        "AIME25": (replace(first, notes=("stand-in",)), Cell(None, "the server died")),
        "MATH-500": (Cell(None, "the server died"), Cell(None, "no grader")),
    }
    table = Evaluation("card", subjects, rows, {}).table()
    assert table.splitlines() == [
        "| benchmark | original | pruned (-25 %) |",
        "|---|---|---|",
        "| HumanEval | 93.9 +- 1.9 | 93.3 +- 2.0 (-0.6 +- 1.0) |",
        "| AIME25 | 93.9 +- 1.9, stand-in | - [1] |",
        "| MATH-500 | - [1] | - [2] |",
        "",
        "[1] the server died",
        "[2] no grader",
    ]


def test_models_are_named_and_say_how_much_was_removed(tmp_path: Path) -> None:
    (tmp_path / "reapkit.json").write_text(json.dumps({"before": {"num_experts": 256}, "after": {"num_experts": 180}}))
    subject = Subject.parse(f"small={tmp_path}")
    assert (subject.name, subject.source) == ("small", str(tmp_path)) and subject.header == "small (-30 %)"
    assert Subject.parse("http://host/v1?a=b").name == "http://host/v1?a=b"
    assert Subject.parse(str(tmp_path)).name == tmp_path.name


def test_every_setting_that_decides_a_figure_is_recorded() -> None:
    described = describe(Settings(limit=5, user="http://user"), ["original=http://a", "http://b"])
    assert described["benchmarks"] == [
        "HumanEval",
        "HumanEval+",
        "MBPP",
        "MBPP+",
        "AIME25",
        "MATH-500",
        "tau2-bench Telecom",
    ]
    sampling = described["settings"]["sampling"]
    assert sampling["aime25"] == {
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": None,
        "seed": 0,
        "max_tokens": 65536,
        "repeats": 8,
    }
    assert described["settings"]["user_simulator"] == "http://user" and described["settings"]["limit"] == 5
    assert set(benchmarks.PUBLISHED) == set(described["benchmarks"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(suite="crad"), "there is no suite 'crad'"),
        (Settings(only=("humanevl",)), "the card has no benchmark 'humanevl'"),
        (Settings(suite="multiple-choice", only=("mbpp",)), "--only chooses among the card's benchmarks"),
    ],
)
def test_unknown_suites_and_benchmarks_are_refused(settings: Settings, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(["http://127.0.0.1:9"], settings, out=tmp_path)


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two models have the same name"):
        evaluate(["http://a", "http://a"], out=tmp_path)


def test_a_server_that_is_not_there_leaves_empty_cells_with_the_reason(tmp_path: Path) -> None:
    result = evaluate(["gone=http://127.0.0.1:9"], out=tmp_path)
    assert not result.complete and all(cell.figure is None for cells in result.rows.values() for cell in cells)
    assert "no server answers at http://127.0.0.1:9/v1/models" in (tmp_path / "table.md").read_text()
    written = json.loads((tmp_path / "eval.json").read_text())
    assert {cell["value"] for row in written["benchmarks"] for cell in row["cells"]} == {None}


def test_vllm_that_cannot_be_started_or_ends_is_said_with_its_own_words(tmp_path: Path) -> None:
    def reason(program: str) -> str | None:
        result = evaluate([str(tmp_path)], Settings(vllm=program, only=("humaneval",)), out=tmp_path / "out")
        return result.rows["HumanEval"][0].reason

    assert reason("no-such-program") == "no-such-program cannot be started: there is no such program"
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho 'ValueError: too large'\necho 'bye'\nexit 1\n")
    program.chmod(0o755)
    assert reason(str(program)) == f"the server of {tmp_path} did not start: ValueError: too large"


def test_cells_that_are_done_are_kept_and_the_others_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run(entry: Any, subject: Subject, *_: Any) -> dict[str, Cell]:
        ran.append(f"{subject.name} {entry.name}")
        if entry.name == "mbpp" and len(ran) < 4:
            return dict.fromkeys(entry.rows, Cell(None, "the server died"))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return dict.fromkeys(entry.rows, Cell.of({"a": [1.0], "b": [0.0]}))

    monkeypatch.setattr(evaluation, "_run", run)
    monkeypatch.setattr(evaluation, "connect", lambda url: Endpoint(url, "m"))
    settings = Settings(only=("humaneval", "mbpp", "math500"))
    with pytest.raises(KeyboardInterrupt):
        evaluate(["http://a"], settings, out=tmp_path)
    kept = json.loads((tmp_path / "eval.json").read_text())
    assert [row["cells"][0]["value"] for row in kept["benchmarks"]] == [0.5, 0.5, None, None]
    result = evaluate(["http://a"], settings, out=tmp_path)
    assert ran == ["http://a humaneval", "http://a mbpp", "http://a math500", "http://a mbpp", "http://a math500"]
    assert result.complete
    evaluate(["http://a"], settings, out=tmp_path)
    assert len(ran) == 5
    evaluate(["http://a"], replace(settings, limit=3), out=tmp_path)  # other settings, other figures
    assert len(ran) == 8


def test_a_dead_server_is_the_reason_whatever_the_run_said(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m")
    assert evaluation._alive_or(endpoint, "a timeout").startswith("the server died during the run: no server answers")
    monkeypatch.setattr(evaluation, "connect", lambda url: endpoint)
    assert evaluation._alive_or(endpoint, "a timeout") == "a timeout"


def test_the_table_is_kept_in_folders_that_reapkit_wrote(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    for folder in (ours, other):
        folder.mkdir()
    (ours / "reapkit.json").write_text("{}")
    subjects = (Subject("a", str(ours), None), Subject("b", str(other), None))
    evaluation.write(Evaluation("card", subjects, {"HumanEval": (Cell(None, "x"),) * 2}, {}), tmp_path / "out")
    assert (ours / "reapkit/eval.json").read_bytes() == (tmp_path / "out/eval.json").read_bytes()
    assert not (other / "reapkit").exists()


# --- replies without a model


def test_replies_are_scored_without_a_model(sandbox: sandboxes.Sandbox, tmp_path: Path) -> None:
    write_rows(tmp_path / "data/HumanEvalPlus.jsonl", [problem_row(number) for number in range(4)])
    right = "<think>```python\ndef f1(x): return 0\n```</think>\n```python\ndef f1(x):\n    return x\n```"
    rows = [
        {"id": "HumanEval/1", "reply": right},
        {"task_id": "HumanEval/2", "solution": "def f2(x):\n    return abs(2 * x)\n"},
        {"id": "HumanEval/3", "reply": "I cannot."},
    ]
    path = write_rows(tmp_path / "replies.jsonl", rows)
    result = score_replies(path, Settings(only=("humaneval", "tau2-telecom"), data_dir=tmp_path / "data"))
    base, plus = result.rows["HumanEval"][0], result.rows["HumanEval+"][0]
    assert base.scores == {"HumanEval/1": 1, "HumanEval/2": 1, "HumanEval/3": 0} and plus.scores["HumanEval/2"] == 0
    assert base.figure is not None and base.figure.value == pytest.approx(2 / 3) and base.notes == ("3 of 4 problems",)
    assert result.rows["tau2-bench Telecom"][0].reason == "conversations need a model that answers"


def test_replies_that_cannot_be_read_or_belong_to_nothing_are_refused(
    sandbox: sandboxes.Sandbox, tmp_path: Path
) -> None:
    write_rows(tmp_path / "HumanEvalPlus.jsonl", [problem_row(1)])
    settings = Settings(only=("humaneval",), data_dir=tmp_path)
    with pytest.raises(EvaluationError, match=r"no row of .* belongs to a problem of the suite"):
        score_replies(write_rows(tmp_path / "a.jsonl", [{"id": "other", "reply": ""}]), settings)
    with pytest.raises(EvaluationError, match=r"line 1 of .* has no id and reply"):
        score_replies(write_rows(tmp_path / "b.jsonl", [{"id": "other"}]), settings)
    with pytest.raises(EvaluationError, match="cannot be read as JSON lines"):
        score_replies(tmp_path / "none.jsonl", settings)
    with pytest.raises(UsageError, match="--replies scores the card's benchmarks"):
        score_replies(write_rows(tmp_path / "a.jsonl", [{"id": "a", "reply": ""}]), Settings(suite="file.py"))


def test_without_a_sandbox_the_cells_of_programs_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(wanted: str | None) -> None:
        raise SandboxError("none works here")

    monkeypatch.setattr(evaluation, "find", refuse)
    write_rows(tmp_path / "HumanEvalPlus.jsonl", [problem_row(1)])
    path = write_rows(tmp_path / "replies.jsonl", [{"id": "HumanEval/1", "reply": ""}])
    with pytest.raises(EvaluationError, match="no row of"):
        score_replies(path, Settings(only=("humaneval",), data_dir=tmp_path))


def test_lm_evals_results_become_cells(tmp_path: Path) -> None:
    results = {
        "arc_challenge": {"acc,none": 0.5, "acc_norm,none": 0.6, "acc_norm_stderr,none": 0.01},
        "mmlu": {"acc,none": 0.7, "acc_stderr,none": "N/A"},
    }
    (tmp_path / "results.json").write_text(json.dumps({"results": results}))
    cells = evaluation.read_lm_eval(tmp_path / "results.json")
    assert cells["arc_challenge"].figure == Figure(0.6, 0.01) and cells["mmlu"].figure == Figure(0.7, None)
    assert cells["hellaswag"].reason == "lm-eval has no result for it"


def test_an_error_of_the_server_is_no_answer() -> None:
    with pytest.raises(EndpointError):
        evaluation.connect("http://127.0.0.1:9")
