"""The command line's contract: what is printed where, exit codes, one sentence for every mistake."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner, Result

from reapkit import cli, reporting, shards
from reapkit.cli import app, parse_size
from reapkit.errors import SandboxError, UsageError
from reapkit.statistics import Statistics
from tiny import add_tokenizer, make_fp8, make_m2, read_json, write_json


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FP8 MiniMax-M2 with 8 experts, 2 per token, and a tokenizer."""
    folder = tmp_path_factory.mktemp("cli")
    return add_tokenizer(make_fp8(make_m2(folder / "bf16"), folder / "fp8"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"the quick brown fox {i} jumps " * (1 + i % 7), "domain": "ab"[i % 2]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def statistics(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    assert run("observe", model, "--data", text, "-o", path).exit_code == 0
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_what_the_system_refuses_a_library_is_one_sentence_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "vocab.bin")

    monkeypatch.setattr("reapkit.inventory.inspect", refuse)
    result = run("inspect", model)
    assert result.exit_code == 1 and result.stderr == "error: vocab.bin: Input/output error\n"
    assert "Traceback" in run("inspect", model, "--verbose").stderr


def answer(*arguments: str | Path) -> Any:
    """What a command that succeeds prints with --json."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_whole_way_step_by_step_and_in_one_gives_the_same_checkpoint(
    model: Path, text: Path, statistics: Path, tmp_path: Path
) -> None:
    plan, pruned, compressed = tmp_path / "plan.json", tmp_path / "pruned", tmp_path / "compressed"
    assert run("plan", statistics, "--ratio", "0.25", "-o", plan).exit_code == 0
    assert run("prune", model, plan, "-o", pruned).exit_code == 0
    assert run("verify", pruned).exit_code == 0
    result = answer("compress", model, "--data", text, "--ratio", "0.25", "-o", compressed)
    assert result["verification"]["ok"] and result["verification"]["against_source"]
    assert result["manifest"]["after"]["num_experts"] == 6
    names = {path.name for path in pruned.iterdir()}
    assert names == {path.name for path in compressed.iterdir()}
    for name in names - {"reapkit"}:
        if (pruned / name).is_file():
            assert (pruned / name).read_bytes() == (compressed / name).read_bytes(), name
    assert (compressed / "reapkit/statistics.safetensors").read_bytes() == statistics.read_bytes()


def test_compress_rounds_up_what_stays_as_plan_does_and_both_write_it_down(
    model: Path, text: Path, statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ("--ratio", "0.3", "--divisible-by", "4")
    planned = run("plan", statistics, *size, "-o", tmp_path / "plan.json")
    compressed = run("compress", model, "--data", text, *size, "-o", tmp_path / "out")
    for result in (planned, compressed):
        assert result.exit_code == 0 and "keeping 8 of 8 experts: 6 rounded up, to divide by 4" in result.stderr
    plan = read_json(tmp_path / "plan.json")
    assert plan == read_json(tmp_path / "out/reapkit/plan.json")
    assert plan["num_kept"] == 8 and plan["options"] == {"divisible-by": "4"}
    assert "options" in answer("plan", model, "--criterion", "random", *size, "-o", tmp_path / "random.json")
    assert read_json(tmp_path / "random.json")["options"] == {"divisible-by": "4"}
    *_, again, _ = reporting._commands(reporting.Evidence.gather(tmp_path / "out"))
    assert again.startswith("reapkit plan statistics.safetensors --criterion reap --divisible-by 4 --keep 8")
    monkeypatch.setattr("reapkit.observation.Observation.__init__", lambda *_, **__: pytest.fail("began"))
    refused = run("compress", model, "--data", text, "--keep", "4", "--divisible-by", "9", "-o", tmp_path / "x")
    assert refused.exit_code == 1 and "no number of experts from 4 to 8 divides by 9" in refused.stderr


def test_compress_does_not_observe_again_what_an_interrupted_run_observed(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("compress", model, "--data", text, "--ratio", "0.25", "-o", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(shards, "_write_shards", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*arguments).exit_code == 130
    assert run("verify", tmp_path / "out").exit_code == 1
    with monkeypatch.context() as patched:
        patched.setattr("reapkit.observation.Observation.run", lambda *_, **__: pytest.fail("observed again"))
        result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    other = run("compress", model, "--data", f"{text}:20", "--ratio", "0.25", "-o", tmp_path / "out")
    assert other.exit_code == 1 and "was observed on another model, text or settings" in other.stderr
    smaller = run("compress", model, "--data", text, "--ratio", "0.5", "-o", tmp_path / "out")
    assert smaller.exit_code == 1 and "not empty" in smaller.stderr
    (tmp_path / "out/reapkit/statistics.safetensors").unlink()
    with monkeypatch.context() as patched:
        patched.setattr("reapkit.observation.Observation.run", lambda *_, **__: pytest.fail("observed for nothing"))
        unknown = run(*arguments)
    assert unknown.exit_code == 1 and "not empty" in unknown.stderr


def test_compress_refuses_an_impossible_target_before_it_observes(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reapkit.observation.Observation.__init__", lambda *_, **__: pytest.fail("began"))
    result = run("compress", model, "--data", text, "--keep", "1", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "keeping 1 of 8 experts is fewer than the 2 that each token is routed to" in result.stderr
    assert "keep at least 2: --ratio 0.75 or less" in result.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("")
    result = run("compress", model, "--data", text, "--keep", "4", "-o", tmp_path / "full")
    assert result.exit_code == 1 and "not empty: it holds thesis.txt" in result.stderr


def test_compress_refuses_a_format_and_a_full_disk_before_it_observes(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = add_tokenizer(make_m2(tmp_path / "bf16"))
    monkeypatch.setattr("reapkit.observation.Observation.__init__", lambda *_, **__: pytest.fail("began"))
    arguments = ("compress", plain, "--data", text, "--keep", "4", "-o", tmp_path / "out")
    refused = run(*arguments, "--dequantize")
    assert refused.exit_code == 2 and "is not quantised" in refused.stderr
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**4))
    refused = run(*arguments)
    assert refused.exit_code == 1 and "GB free" in refused.stderr


def test_a_resumed_compress_asks_for_the_missing_space_only(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ("compress", model, "--data", text, "--keep", "4", "-o", out)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_file", stop_after_shards(shards.write_file))
        assert run(*arguments).exit_code == 130
    assert list(out.glob("*.safetensors"))
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    fresh = run(*arguments[:-1], tmp_path / "fresh")
    assert fresh.exit_code == 1 and "GB free" in fresh.stderr


def stop_after_shards(write_file: Callable[[Path, bytes], None]) -> Callable[[Path, bytes], None]:
    """A `write_file` that is interrupted at the index, which comes after the last shard."""

    def write(path: Path, content: bytes) -> None:
        if path.name.endswith(".index.json"):
            raise KeyboardInterrupt
        write_file(path, content)

    return write


def test_a_threshold_that_cannot_be_read_is_refused_before_anything_is_compared(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reapkit.fidelity.compare", lambda *_, **__: pytest.fail("began"))
    assert run("compare", model, model, "--data", text, "--fail-on", "kl=small").exit_code == 2


def test_the_budget_that_a_refusal_names_is_enough(model: Path, text: Path) -> None:
    refused = run("compare", model, model, "--data", text, "--activation-budget", "1kB")
    (needed,) = re.findall(r"--activation-budget (\d+) or more", refused.stderr)
    assert run("compare", model, model, "--data", text, "--activation-budget", needed).exit_code == 0


def test_split_and_missing_samples_are_counted(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in (5, 9, 25)))
    common = ("--data", f"{data}:7", "--max-length", "10")
    for arguments in (
        ("observe", model, *common, "-o", tmp_path / "s"),
        ("compress", model, *common, "--keep", "4", "-o", tmp_path / "out"),
        ("compare", model, model, *common),
    ):
        noted = run(*arguments).stderr
        assert "1 long samples were split into 3 windows; nothing was dropped" in noted, arguments
        assert "has 3 of the 7 samples asked for" in noted


def test_combining_two_halves_gives_the_statistics_of_the_whole(
    model: Path, text: Path, statistics: Path, tmp_path: Path
) -> None:
    lines = text.read_text().splitlines(keepends=True)
    halves = []
    for number, part in enumerate((lines[:20], lines[20:])):
        data, halves_path = tmp_path / f"half{number}.jsonl", tmp_path / f"half{number}.safetensors"
        data.write_text("".join(part))
        assert run("observe", model, "--data", data, "-o", halves_path).exit_code == 0
        halves.append(halves_path)
    combined = tmp_path / "combined.safetensors"
    assert (
        answer("combine", *halves, "-o", combined)["tokens"]
        == answer("observe", model, "--data", text, "-o", tmp_path / "s")["tokens"]
    )
    plans = []
    for name, source in (("whole", statistics), ("combined", combined)):
        assert run("plan", source, "--keep", "5", "-o", tmp_path / f"{name}.json").exit_code == 0
        plans.append(read_json(tmp_path / f"{name}.json")["kept"])
    assert plans[0] == plans[1]
    assert run("combine", halves[0], "-o", combined).exit_code == 2


def test_dry_runs_write_nothing(model: Path, text: Path, statistics: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    estimate = answer("observe", model, "--data", text, "-o", tmp_path / "s.safetensors", "--dry-run")
    assert estimate["waves"] >= 1 and estimate["read_bytes"] > 0 and estimate["hours"] > 0
    compressed = answer("compress", model, "--data", text, "--ratio", "0.25", "-o", tmp_path / "out", "--dry-run")
    assert compressed["tokens"] == estimate["tokens"] and compressed["checkpoint_bytes"] > 100_000
    assert answer("plan", statistics, "--ratio", "0.25", "-o", plan, "--dry-run")["num_kept"] == 6
    assert list(tmp_path.iterdir()) == []
    assert run("plan", statistics, "--ratio", "0.25", "-o", plan).exit_code == 0
    assert answer("prune", model, plan, "-o", tmp_path / "out", "--dry-run")["after"]["num_experts"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_plan_says_what_is_lost_and_which_experts_were_never_routed_to(statistics: Path, tmp_path: Path) -> None:
    described = answer("plan", statistics, "--keep", "2", "-o", tmp_path / "plan.json")
    assert [layer["layer"] for layer in described["layers"]] == [0, 1, 2]
    assert all(0 <= layer["saliency_lost"] <= 1 for layer in described["layers"])
    printed = run("plan", statistics, "--keep", "2", "-o", tmp_path / "plan.json").stdout
    assert "saliency lost" in printed and "never routed" in printed


def test_random_takes_a_checkpoint_and_depends_on_the_seed_alone(model: Path, tmp_path: Path) -> None:
    kept = []
    for number, seed in enumerate(("1", "1", "2")):
        path = tmp_path / f"{number}.json"
        assert run("plan", model, "--criterion", "random", "--keep", "4", "--seed", seed, "-o", path).exit_code == 0
        kept.append(read_json(path)["kept"])
    assert kept[0] == kept[1] != kept[2]
    refused = run("plan", model, "--keep", "4", "-o", tmp_path / "x.json")
    assert refused.exit_code == 2 and "needs statistics" in refused.stderr


def test_compare_answers_no_with_exit_code_3(model: Path, text: Path, statistics: Path, tmp_path: Path) -> None:
    plan, pruned = tmp_path / "plan.json", tmp_path / "pruned"
    run("plan", statistics, "--keep", "2", "-o", plan)
    run("prune", model, plan, "-o", pruned)
    result = run("compare", model, pruned, "--data", text, "--fail-on", "kl=0,top1=1.01", "--json")
    assert result.exit_code == 3
    compared = json.loads(result.stdout)
    assert len(compared["failed"]) == 2 and compared["overall"]["kl"]["value"] > 0
    assert set(compared["domains"]) == {"a", "b"}
    assert read_json(pruned / "reapkit/fidelity.json")["overall"] == compared["overall"]
    kl, tokens = compared["overall"]["kl"], compared["overall"]["tokens"]
    assert (
        f"| all | {tokens:,} | {kl['value']:.4f} ± {kl['standard_error']:.4f} |" in (pruned / "README.md").read_text()
    )
    assert run("verify", pruned).exit_code == 0
    (pruned / "README.md").write_text("mine")
    result = run("compare", model, pruned, "--data", text)
    assert result.exit_code == 0 and "wrote" in result.stderr
    assert "the model card was left as it is: README.md in" in result.stderr
    assert (pruned / "README.md").read_text() == "mine"
    same = answer("compare", model, model, "--data", text, "--fail-on", "kl=1e-9,top1=1")
    assert same["overall"]["kl"]["value"] == 0 and same["overall"]["top1"]["value"] == 1


def test_compare_shows_both_replies_side_by_side_and_judges_them(model: Path, text: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "say"}) + "\n" + json.dumps({"text": "no prompt"}) + "\n")
    common = ("compare", model, model, "--data", text, "--prompts", prompts, "--max-tokens", "5")
    shown = run(*common, "--fail-on", "unfinished=0.5")
    assert shown.exit_code == 3 and "rate of unfinished replies 1.0000 is more than 0.5" in shown.stderr
    assert "prompt 1: say" in shown.stdout and "original" in shown.stdout and "1 rows are no prompts" in shown.stderr
    assert "routing changed" in shown.stdout and "same final answer" in shown.stdout
    described = answer(*common, "--fail-on", "loops=0,answers=1")
    assert described["behaviour"]["same_answers"]["value"] == 1 and described["failed"] == []


def test_eval_shows_what_could_not_be_run_and_fails(tmp_path: Path) -> None:
    result = run("eval", "gone=http://127.0.0.1:9", "--only", "mbpp", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "2 of 2 cells are empty; the table says why" in result.stderr
    assert "| MBPP+ | - [1] |" in result.stdout and "no server answers at http://127.0.0.1:9" in result.stdout
    assert (tmp_path / "out/eval.json").exists()


def test_eval_scores_replies_and_names_those_to_no_problem(tmp_path: Path) -> None:
    from reapkit import sandbox

    try:
        sandbox.find(None)
    except SandboxError as error:
        pytest.skip(error.message)
    problem = {"task_id": "a", "prompt": "", "entry_point": "f", "canonical_solution": "def f(x): return x", "base_input": [[1]],
               "plus_input": [[2]], "atol": 0}  # fmt: skip
    (tmp_path / "HumanEvalPlus.jsonl").write_text(json.dumps(problem) + "\n")
    replies = tmp_path / "mine.jsonl"
    replies.write_text("".join(json.dumps({"id": name, "reply": "def f(x): return x"}) + "\n" for name in "abc"))
    command = ("eval", "--replies", replies, "--data-dir", tmp_path, "--only", "humaneval", "-o", tmp_path / "out")
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    assert "| HumanEval+ | 100.0 |" in result.stdout and "are not among those read: b, c" in result.stderr
    dry = json.loads(run(*command, "--dry-run").stdout)["settings"]
    assert dry["replies"]["source"] == "mine.jsonl" and "sampling" not in dry


def test_eval_brings_its_table_into_the_card_of_an_output(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reapkit import evaluation

    plan, pruned = tmp_path / "plan.json", tmp_path / "pruned"
    run("plan", model, "--criterion", "random", "--keep", "6", "-o", plan)
    run("prune", model, plan, "-o", pruned)

    def cells(entry: Any, subject: Any, *_: Any) -> dict[str, evaluation.Cell]:
        right = float(subject.name == "original")
        return dict.fromkeys(entry.rows, evaluation.Cell.of({"a": [1.0], "b": [right]}))

    monkeypatch.setattr(evaluation, "_run", cells)
    monkeypatch.setattr(evaluation, "_enter", lambda *_: None)
    result = run("eval", f"original={model}", f"small={pruned}", "--only", "math500", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    card = (pruned / "README.md").read_text()
    assert "| benchmark | original | small (-25 %) |" in card
    assert "| MATH-500 | 100.0 ± 0.0 | 50.0 ± 50.0 (-50.0 ± 50.0) |" in card
    assert not (model / "reapkit").exists() and "brought the results into" in result.stderr


def test_verify_answers_no_with_exit_code_3(model: Path, statistics: Path, tmp_path: Path) -> None:
    plan, pruned = tmp_path / "plan.json", tmp_path / "pruned"
    run("plan", statistics, "--keep", "4", "-o", plan)
    run("prune", model, plan, "-o", pruned)
    assert run("verify", pruned).exit_code == 0
    shard = sorted(pruned.glob("*.safetensors"))[0]
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    result = run("verify", pruned)
    assert result.exit_code == 3 and shard.name in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("plan", "{statistics}", "--keep", "4", "--criterion", "raep", "-o", "x"), 2, "did you mean 'reap'?"),
        (("plan", "{statistics}", "-o", "x"), 2, "give either --ratio or --keep"),
        (("plan", "{statistics}", "--keep", "4", "--ratio", "0.5", "-o", "x"), 2, "give either --ratio or --keep"),
        (("plan", "{statistics}", "--ratio", "1.5", "-o", "x"), 2, "--ratio 1.5 is not a share"),
        (("plan", "{statistics}", "--ratio", "a quarter", "-o", "x"), 2, "'a quarter' is not a number"),
        (("plan", "{statistics}", "--keep", "9", "-o", "x"), 2, "--keep 9 is not between 1 and the 8 experts"),
        (("plan", "no.safetensors", "--keep", "4", "-o", "x"), 1, "there is no statistics file no.safetensors"),
        (("observe", "no-such-folder", "--data", "{text}", "-o", "x"), 1, "there is no folder 'no-such-folder'"),
        (("observe", "{model}", "--data", "{text}", "--device", "gpu", "-o", "x"), 2, "there is no device 'gpu'"),
        (("observe", "{model}", "--data", "{text}", "--dtype", "bf16", "-o", "x"), 2, "did you mean 'bfloat16'?"),
        (("observe", "{model}", "--data", "{text}", "--activation-budget", "much", "-o", "x"), 2, "'much' is not a size"),
        (("observe", "{model}", "--data", "{text}", "--activation-budget", "1kB", "-o", "x"), 2, "one micro-batch holds"),
        (("observe", "{model}", "--data", "missing.jsonl", "-o", "x"), 1, "missing.jsonl"),
        (("observe", "{model}", "--data", "{text}", "-o", "{model}"), 1, "is a folder"),
        (("observe", "{model}", "--data", "{text}", "-o", "/proc/none/x"), 1, "writing to /proc/none/x stopped"),
        (("plan", "{statistics}", "--keep", "4", "-o", "/proc/none/x"), 1, "writing to /proc/none/x stopped"),
        (("inspect", "{model}", "--revision", "main"), 2, "is a folder, which has no revision"),
        (("inspect", "{model}x"), 1, "there is no folder"),
        (("combine", "{statistics}", "-o", "x"), 2, "two statistics files or more"),
        (("list", "criterias"), 2, "did you mean 'criteria'?"),
        (("prune", "{model}", "no.json", "-o", "x"), 1, "there is no plan no.json"),
        (("verify", "{model}"), 1, "not an output of reapkit"),
        (("compare", "{model}", "{model}", "--data", "{text}", "--fail-on", "kll=1"), 2, "did you mean 'kl'?"),
        (("eval",), 2, "give models to ask, or replies to score"),
        (("eval", "http://a", "--replies", "x"), 2, "give models to ask, or replies to score"),
        (("eval", "http://127.0.0.1:9", "--suite", "crad"), 2, "did you mean 'card'?"),
        (("eval", "http://127.0.0.1:9", "--only", "humanevl"), 2, "did you mean 'humaneval'?"),
        (("eval", "--replies", "missing.jsonl"), 1, "missing.jsonl cannot be read"),
        (("compare", "{model}", "{model}", "--data", "{text}", "--fail-on", "loops=0"), 2, "loops is measured on replies"),
        (("compare", "{model}", "{model}", "--data", "{text}", "--endpoint", "http://x"), 2, "1 endpoints and no prompts"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_with_a_sentence_and_the_contracts_exit_code(
    arguments: tuple[str, ...],
    code: int,
    sentence: str,
    model: Path,
    text: Path,
    statistics: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"model": model, "text": text, "statistics": statistics}
    result = run(*(argument.format(**places) for argument in arguments))
    assert (result.exit_code, sentence in result.stderr) == (code, True), result.stderr
    assert result.stdout == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("plan {statistics} --weights residual", "--weights does not go with --criterion reap"),
        ("plan {statistics} --seed 0", "--seed does not go with --criterion reap"),
        ("plan {statistics} --revision main", "--revision does not go with --criterion reap"),
        ("plan {statistics} --private", "--private does not go with plan without --publish"),
        ("plan {statistics} --criterion random --blend uniform", "--blend does not go with --criterion random"),
        ("plan {statistics} --criterion random --revision x", "--revision does not go with --criterion random on statistics"),
        ("plan {model} --criterion random --protect super", "--protect does not go with --criterion random on a checkpoint"),
        ("plan {model} --criterion aimer --protect super", "--protect does not go with --criterion aimer"),
        ("plan {model} --criterion aimer --evidence", "--evidence does not go with --criterion aimer"),
        ("plan {model} --criterion aimer --weights plain", "--weights does not go with --criterion aimer"),
        ("plan {model} --criterion aimer --seed 1", "--seed does not go with --criterion aimer"),
        ("plan {model} --recover {model}", "--keep does not go with --recover"),
        ("plan {model} --recover {model} --publish a/b", "--keep does not go with --recover"),
        ("compress {model} --data {text} --weights plain", "--weights does not go with --criterion reap"),
        ("compress {model} --data {text} --reroute-tokens 5", "--reroute-tokens does not go with --criterion reap"),
        ("compress {model} --data {text} --criterion aimer --blend uniform", "--blend does not go with --criterion aimer"),
        ("observe {model} --data {text}", "--keep does not go with observe without --until-stable"),
    ],
)  # fmt: skip
def test_an_option_that_would_be_ignored_is_refused(
    words: str,
    refused: str,
    model: Path,
    text: Path,
    statistics: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reapkit.observation.Observation.__init__", lambda *_, **__: pytest.fail("began"))
    places = {"model": model, "text": text, "statistics": statistics}
    result = run(*words.format(**places).split(), "--keep", "4", "-o", tmp_path / "out")
    assert result.exit_code == 2 and f"error: {refused}, which would ignore it" in result.stderr, result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--evidence", "--publish=a/b", "--private", "--criterion=reap", "--blend=uniform"])
def test_a_recovered_choice_takes_no_option_of_choosing(model: Path, tmp_path: Path, option: str) -> None:
    result = run("plan", model, "--recover", model, option, "-o", tmp_path / "plan.json")
    assert result.exit_code == 2 and f"{option.partition('=')[0]} does not go with --recover" in result.stderr


def test_options_of_parts_that_are_left_out_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    result = run("observe", model, "--data", text, "--reroute-candidates", "4", "-o", tmp_path / "s")
    assert result.exit_code == 2 and "does not go with observe without --reroute-tokens" in result.stderr
    result = run("compare", model, model, "--data", text, "--max-tokens", "5")
    assert result.exit_code == 2 and "--max-tokens does not go with compare without --prompts" in result.stderr


def test_a_mistyped_verb_or_option_names_the_nearest(model: Path) -> None:
    assert "observe" in run("obsreve", model).stderr
    assert "--ratio" in run("plan", model, "--ration", "0.5", "-o", "x").stderr
    assert run("obsreve").exit_code == 2


def test_quiet_prints_nothing_and_progress_goes_to_standard_error(model: Path, text: Path, tmp_path: Path) -> None:
    quiet = run("observe", model, "--data", text, "-o", tmp_path / "a", "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    spoken = run("observe", model, "--data", text, "-o", tmp_path / "b")
    assert spoken.stdout == "" and "tokens x layers" in spoken.stderr


def test_code_that_comes_with_a_checkpoint_does_not_run_unless_allowed(
    model: Path, text: Path, statistics: Path, tmp_path: Path
) -> None:
    trapped, trap = tmp_path / "trapped", tmp_path / "sprung"
    shutil.copytree(model, trapped)
    code = f"open({str(trap)!r}, 'w')\nfrom transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM\n"
    (trapped / "remote.py").write_text(code)
    classes = {"AutoConfig": "remote.MiniMaxM2Config", "AutoModelForCausalLM": "remote.MiniMaxM2ForCausalLM"}
    config = read_json(trapped / "config.json")
    write_json(trapped / "config.json", {**config, "auto_map": classes})
    for arguments in (
        ("inspect", trapped),
        ("observe", trapped, "--data", text, "-o", tmp_path / "s.safetensors"),
        ("compress", trapped, "--data", text, "--keep", "4", "-o", tmp_path / "out"),
        ("verify", tmp_path / "out"),
        ("compare", trapped, tmp_path / "out", "--data", text),
    ):
        assert run(*arguments).exit_code == 0, arguments
    assert not trap.exists()
    assert (tmp_path / "out/remote.py").read_text() == code


def test_inspect_and_list_print_tables_and_json(model: Path) -> None:
    assert answer("inspect", model)["num_experts"] == 8
    assert "MiniMax-M2" in run("inspect", model).stdout
    assert {"reap", "frequency", "random"} <= {row["criterion"] for row in answer("list", "criteria")}
    assert [row["suite"] for row in answer("list", "suites")] == ["card", "multiple-choice"]
    would = answer("eval", "original=http://a", "http://b", "--limit", "3", "--dry-run")
    assert [row["name"] for row in would["models"]] == ["original", "http://b"] and would["settings"]["limit"] == 3
    assert "minimax_m2" in run("list", "architectures").stdout


def test_help_is_there_for_every_verb_and_starts_without_torch() -> None:
    code = "import sys; from reapkit.cli import main; sys.argv = ['reapkit', '--help']\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for verb in ("inspect", "observe", "combine", "plan", "prune", "verify", "compress", "compare", "eval", "list"):
        assert verb in shown
        assert run(verb, "--help").exit_code == 0


def test_plan_does_not_import_torch(statistics: Path, tmp_path: Path) -> None:
    arguments = ["reapkit", "plan", str(statistics), "--keep", "4", "-o", str(tmp_path / "plan.json")]
    code = f"import sys; from reapkit.cli import main; sys.argv = {arguments!r}\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (tmp_path / "plan.json").exists()


def test_prune_loads_neither_torch_nor_what_speaks_to_the_hub(model: Path, statistics: Path, tmp_path: Path) -> None:
    """They would take longer than all that it does before it writes."""
    source = Path(shutil.copytree(model, tmp_path / "source"))
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    assert run("plan", statistics, "--keep", "4", "-o", tmp_path / "plan.json").exit_code == 0
    arguments = ["reapkit", "prune", str(source), str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")]
    code = f"import sys; from reapkit.cli import main; sys.argv = {arguments!r}\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code\n"
    code += "assert not {'torch', 'transformers', 'huggingface_hub.hf_api', 'httpx'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "license: mit" in (tmp_path / "out/README.md").read_text()


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * 400}) + "\n" for _ in range(4000)))
    return path


@contextmanager
def observing(model: Path, data: Path, statistics: Path, budget: str) -> Iterator[subprocess.Popen[bytes]]:
    """The real command, in a process that hears signals."""
    command = [sys.executable, "-m", "reapkit", "observe", str(model), "--data", str(data), "-o", str(statistics)]
    with subprocess.Popen(
        [*command, "--activation-budget", budget],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def wait_until_computing(process: subprocess.Popen[bytes]) -> None:
    watched = psutil.Process(process.pid)
    begun, deadline = watched.cpu_times().user, time.monotonic() + 60
    while watched.cpu_times().user < begun + 0.1 and time.monotonic() < deadline:
        time.sleep(0.01)


def test_ctrl_c_once_stops_after_the_running_wave_and_says_how_to_go_on(
    model: Path, long_text: Path, tmp_path: Path
) -> None:
    statistics, sums = tmp_path / "s.safetensors", tmp_path / "s.safetensors.unfinished"
    with observing(model, long_text, statistics, "5MB") as process:
        wait_for(sums, process)
        before = Statistics.load(sums, unfinished=True).finished_batches
        wait_until_computing(process)  # the next wave: what came between the file and it would stop before it
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"stopping when the running wave is done; press Ctrl-C again to stop at once" in errors
    assert b"interrupted; the same command goes on after the last finished wave or file" in errors
    assert Statistics.load(sums, unfinished=True).finished_batches > before
    assert sorted(path.name for path in tmp_path.iterdir()) == [sums.name], "neither statistics nor a lock"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once(model: Path, long_text: Path, tmp_path: Path, signum: int, code: int) -> None:
    """The only wave takes minutes."""
    statistics = tmp_path / "s.safetensors"
    with observing(model, long_text, statistics, "4GB") as process:
        wait_for(tmp_path / "s.safetensors.lock", process)
        process.send_signal(signum)
        assert process.stderr is not None
        assert any(b"stopping when the running wave is done" in line for line in process.stderr)
        begun = time.monotonic()
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code and b"interrupted" in errors and b"Traceback" not in errors
    assert time.monotonic() - begun < 15
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "size"), [("24GB", 24 * 10**9), ("512 MiB", 512 << 20), ("1000", 1000), ("1.5k", 1500), ("7b", 7)]
)
def test_sizes_are_read_as_people_write_them(given: str, size: int) -> None:
    assert parse_size(given) == size


def test_what_is_no_size_is_refused() -> None:
    for given in ("", "GB", "1 furlong", "-1GB", "0"):
        with pytest.raises(UsageError, match="is not a size"):
            parse_size(given)


def test_a_long_task_reports_the_time_remaining(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 40.0, 50.0, 100.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    lines = cli._Lines()
    for done in (0, 40, 50, 100):
        lines.update("observe", done, 100, "layers")
    printed = capsys.readouterr().err.splitlines()
    assert printed == [
        "observe: 40 layers of 100 layers in 40.0 s, 1:00 min remaining",
        "observe: 100 layers of 100 layers in 1:40 min",
    ]
