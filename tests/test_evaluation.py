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
    second = replace(second, notes=("a",), seconds=1.5, tokens=7, max_tokens=9)
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
    assert described["settings"]["user_simulator"] == {"source": "http://user", "identity": None}
    assert described["settings"]["limit"] == 5
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


class Runs:
    """Stands in for asking and scoring: what was asked of whom, every figure one half; servers serve `models` by URL."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.connected: list[str] = []
        self.models: dict[str, str] = {}
        monkeypatch.setattr(evaluation, "_run", self.run)
        monkeypatch.setattr(evaluation, "_enter", self.enter)

    def enter(self, stack: Any, source: str, *_: Any) -> Endpoint:
        self.connected.append(source)
        return Endpoint(source, self.models.get(source, "m"))

    def run(
        self, entry: Any, subject: Subject, started: Any, user: Any, settings: Settings, tools: Any, *_: Any
    ) -> dict[str, Cell]:
        name = entry if isinstance(entry, str) else entry.name
        self.ran.append(f"{subject.name} {name}")
        if name != "tau2-telecom":
            tools.sources[name] = tools.told(entry)
        return dict.fromkeys(getattr(entry, "rows", (name,)), Cell.of({"a": [1.0], "b": [0.0]}))

    def since(self) -> list[str]:
        ran, self.ran = self.ran, []
        return ran


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_rows(folder / "HumanEvalPlus.jsonl", [problem_row(1)])
    write_rows(folder / "MbppPlus.jsonl", [problem_row(2, task_id="Mbpp/1")])
    write_rows(folder / "MATH-500.jsonl", [{"unique_id": "q", "problem": "1 + 1", "answer": "2"}])
    return folder


def test_cells_that_are_done_are_kept_and_the_others_tried_again(
    runs: Runs, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(entry: Any, *rest: Any) -> dict[str, Cell]:
        cells = runs.run(entry, *rest)
        if len(runs.ran) == 3:
            raise KeyboardInterrupt
        return dict.fromkeys(entry.rows, Cell(None, "the server died")) if entry.name == "mbpp" else cells

    settings = Settings(only=("humaneval", "mbpp", "math500"), data_dir=data)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(["http://a"], settings, out=tmp_path)
    kept = json.loads((tmp_path / "eval.json").read_text())
    assert [row["cells"][0]["value"] for row in kept["benchmarks"]] == [0.5, 0.5, None, None]
    assert runs.since() == ["http://a humaneval", "http://a mbpp", "http://a math500"]
    result = evaluate(["http://a"], settings, out=tmp_path)
    assert runs.since() == ["http://a mbpp", "http://a math500"] and result.complete
    evaluate(["http://a"], settings, out=tmp_path)
    assert not runs.since()
    evaluate(["http://a"], replace(settings, limit=3), out=tmp_path)  # other settings, other figures
    assert runs.since() == ["http://a humaneval", "http://a mbpp", "http://a math500"]


CONVERSING = ("humaneval", "math500", "tau2-telecom")


def test_a_run_that_has_nothing_to_do_loses_nothing_and_asks_nobody(runs: Runs, data: Path, tmp_path: Path) -> None:
    settings = Settings(only=CONVERSING, data_dir=data, user="http://user")
    runs.models["http://user"] = "the user"
    first = evaluate(["http://a", "http://b"], settings, out=tmp_path)
    problems = first.settings["problems"]
    assert problems["humaneval"].keys() == {"source", "sha256"} and problems["math500"]["source"] == "MATH-500.jsonl"
    assert first.settings["user_simulator"] == {"source": "http://user", "identity": "the user"}
    written = (tmp_path / "eval.json").read_bytes()
    runs.connected.clear()
    again = evaluate(["http://a", "http://b"], settings, out=tmp_path)
    assert not runs.connected and again.settings == first.settings and again.subjects == first.subjects
    assert (tmp_path / "eval.json").read_bytes() == written
    # A model beside them is asked alone, and the record stays whole.
    runs.since()
    more = evaluate(["http://a", "http://b", "http://c"], settings, out=tmp_path)
    assert runs.since() == ["http://c humaneval", "http://c math500", "http://c tau2-telecom"]
    assert more.settings == first.settings and [subject.identity for subject in more.subjects] == ["m"] * 3


def test_a_changed_setting_reruns_the_cells_that_it_decides(runs: Runs, data: Path, tmp_path: Path) -> None:
    settings = Settings(only=CONVERSING, data_dir=data, user="http://user")

    def ran(settings: Settings) -> list[str]:
        evaluate(["m=http://a"], settings, out=tmp_path)
        return [row.removeprefix("m ") for row in runs.since()]

    assert ran(settings) == list(CONVERSING)
    settings = replace(settings, user="http://other")
    assert ran(settings) == ["tau2-telecom"]
    settings = replace(settings, message_limit=7)
    assert ran(settings) == ["tau2-telecom"]
    settings = replace(settings, sampling=evaluation.Sampling(temperature=0.5))
    assert ran(settings) == ["humaneval", "math500"]
    settings = replace(settings, user=None)
    assert ran(settings) == ["tau2-telecom"]
    moved = data.rename(tmp_path / "moved")
    settings = replace(settings, data_dir=moved)
    assert ran(settings) == []  # the same problems at another place
    write_rows(moved / "MATH-500.jsonl", [{"unique_id": "q", "problem": "1 + 2", "answer": "3"}])
    assert ran(settings) == ["math500"]
    write_rows(moved / "HumanEvalPlus.jsonl", [problem_row(1, plus_input=[[4]])])
    assert ran(settings) == ["humaneval"]
    settings = replace(settings, serve_arguments=("--dtype", "float32"))
    assert ran(settings) == list(CONVERSING)


def test_another_model_at_the_same_place_is_asked_anew(runs: Runs, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    settings = Settings(only=("math500", "tau2-telecom"), data_dir=data, user="http://user")
    models = ["original=http://a", f"pruned={folder}"]
    evaluate(models, settings, out=tmp_path / "out")
    assert len(runs.since()) == 4
    (folder / "README.md").write_text("a card is no part of the model")
    evaluate(models, settings, out=tmp_path / "out")
    assert not runs.since()
    (folder / "model.safetensors").write_bytes(b"another")
    result = evaluate(models, settings, out=tmp_path / "out")
    assert runs.since() == ["pruned math500", "pruned tau2-telecom"]
    assert result.subjects[1].identity == Subject.parse(str(folder)).identity
    # What a URL serves is known when it is asked, for which something must be waiting.
    runs.models["http://a"] = "another"
    evaluate(models, replace(settings, only=(*settings.only, "humaneval")), out=tmp_path / "out")
    assert runs.since() == ["original humaneval", "original math500", "original tau2-telecom", "pruned humaneval"]
    runs.models["http://user"] = "another user"
    evaluate([*models, "more=http://c"], settings, out=tmp_path / "out")
    assert runs.since() == ["original tau2-telecom", "pruned tau2-telecom", "more math500", "more tau2-telecom"]


def test_cells_of_another_model_at_the_same_place_do_not_stand_beside_new_ones(
    runs: Runs, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even while the run is under way, where a kill would leave them."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    settings = Settings(only=("math500",), data_dir=data)
    evaluate(list(map(str, folders)), settings, out=tmp_path / "out")
    for folder in folders:
        (folder / "config.json").write_text('{"other": 1}')

    def stop(entry: Any, subject: Subject, *rest: Any) -> dict[str, Cell]:
        if subject.name == "two":
            raise KeyboardInterrupt
        return runs.run(entry, subject, *rest)

    monkeypatch.setattr(evaluation, "_run", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(list(map(str, folders)), settings, out=tmp_path / "out")
    [row] = json.loads((tmp_path / "out/eval.json").read_text())["benchmarks"]
    assert [cell["error"] for cell in row["cells"]] == [None, "not run yet"]


def test_a_task_of_ones_own_is_kept_until_its_file_changes(runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("one")
    settings = Settings(suite=str(file))
    first = evaluate(["m=http://a"], settings, out=tmp_path)
    assert runs.since() == [f"m {file}"] and first.settings["problems"][str(file)]["source"] == "mine.py"
    assert evaluate(["m=http://a"], settings, out=tmp_path).settings == first.settings and not runs.since()
    file.write_text("two")
    evaluate(["m=http://a"], settings, out=tmp_path)
    assert runs.since() == [f"m {file}"]


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
    assert not result.complete  # a row that was asked for by name is there, or says why not


def test_replies_give_the_rows_that_they_are_for_and_record_nothing_that_did_not_apply(
    sandbox: sandboxes.Sandbox, data: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "replies.jsonl", [{"id": "Mbpp/1", "reply": "no"}])
    settings = Settings(data_dir=data, user="http://user", sampling=evaluation.Sampling(temperature=0.3))
    result = score_replies(path, settings)
    assert list(result.rows) == ["MBPP", "MBPP+"] and result.complete
    assert result.settings.keys() == {
        "suite", "replies", "limit", "thinking", "packages", "python", "problems", "sandbox", "unknown",
    }  # fmt: skip
    assert result.settings["problems"].keys() == {"mbpp"} and result.settings["unknown"] == []
    assert result.settings["replies"]["source"] == "replies.jsonl" and len(result.settings["replies"]["sha256"]) == 64


def test_replies_to_no_problem_are_named_with_the_benchmarks_that_they_may_belong_to(
    sandbox: sandboxes.Sandbox, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(benchmark: Any, folder: Path | None) -> Any:
        if benchmark.name == "aime25":
            raise EvaluationError("the hub does not answer")
        return benchmarks._read(benchmark, next(folder / name for name in benchmark.files if (folder / name).is_file()))  # type: ignore[operator]

    monkeypatch.setattr(evaluation.benchmarks, "load", load)
    rows = [{"id": "HumanEval/1", "reply": ""}, {"id": "7", "reply": ""}]
    result = score_replies(write_rows(tmp_path / "replies.jsonl", rows), Settings(data_dir=data))
    assert list(result.rows) == ["HumanEval", "HumanEval+", "AIME25"] and result.settings["unknown"] == ["7"]
    assert result.rows["AIME25"][0].reason == "the hub does not answer"
    result = score_replies(write_rows(tmp_path / "replies.jsonl", rows[:1]), Settings(data_dir=data))
    assert list(result.rows) == ["HumanEval", "HumanEval+"] and result.complete


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
    result = score_replies(path, Settings(only=("humaneval",), data_dir=tmp_path))
    assert result.rows["HumanEval+"] == (Cell(None, "none works here"),)


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
