"""Tokens and passwords are neither printed nor written, and what a stranger wrote is printed as it is, steering nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import fuzzing
import tiny
from reapkit import plans, shards
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint
from reapkit.cli import app
from reapkit.errors import ReapkitError, redacted
from reapkit.layout import resolve

TOKEN = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"
OTHER = "not-of-the-usual-form-0123456789"
HOSTILE = "\x1b[2J[bold red]evil[/] [/x]\u202e\x9b31m"
SHOWN = "\\x1b[2J[bold red]evil[/] [/x]\\u202e\\x9b31m"


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MiniMax-M2 with a tokenizer that has every printable sign, and some that are not."""
    return tiny.add_tokenizer(tiny.make_m2(tmp_path_factory.mktemp("secrets") / "model"))


@pytest.fixture
def logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tokens in the environment and in the file where logging in leaves one."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_TOKEN", OTHER)
    return tmp_path


def require_secret(result: Result) -> None:
    for secret in (TOKEN, OTHER, "pass:word", "pa55"):
        assert secret not in result.stdout and secret not in result.stderr


def test_nothing_written_or_printed_holds_a_token(model: Path, logged_in: Path) -> None:
    text = logged_in / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"the quick brown fox {i}", "domain": "ab"[i % 2]}) + "\n" for i in range(8))
    )
    out, statistics, plan = logged_in / "out", logged_in / "s.safetensors", logged_in / "plan.json"
    for command in (
        ["compress", model, "--data", text, "--ratio", "0.25", "-o", out, "--device", "cpu", "--json"],
        ["observe", model, "--data", text, "-o", statistics, "--device", "cpu", "--verbose"],
        ["plan", statistics, "--ratio", "0.25", "-o", plan, "--json"],
        ["prune", model, plan, "-o", logged_in / "pruned", "--verbose"],
        ["verify", out, "--json"],
        ["inspect", model, "--json"],
    ):  # fmt: skip
        result = run(*command)
        assert result.exit_code == 0, result.stderr
        require_secret(result)
    written = [path for path in logged_in.rglob("*") if path.is_file() and path.parent.name != "home"]
    assert len(written) > 20
    for path in written:
        content = path.read_bytes()
        assert TOKEN.encode() not in content and OTHER.encode() not in content, path


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "https://me:pass:word@hub.invalid/org/name"),
        ("inspect", f"https://hub.invalid/org/name?token={TOKEN}"),
        ("observe", "{model}", "--data", "https://me:pa55@hub.invalid/rows.jsonl", "-o", "{tmp}/s"),
        ("observe", "{model}", "--data", f"x={TOKEN}", "-o", "{tmp}/s"),
        ("plan", f"{OTHER}.safetensors", "--ratio", "0.25", "-o", "{tmp}/p"),
        ("prune", "{model}", f"{{tmp}}/{TOKEN}", "-o", "{tmp}/o"),
        ("verify", f"{{tmp}}/{TOKEN}"),
        ("list", TOKEN),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verbose", [(), ("--verbose",)], ids=["", "verbose"])
def test_a_mistake_with_a_token_in_it_does_not_repeat_the_token(
    model: Path, logged_in: Path, arguments: tuple[str, ...], verbose: tuple[str, ...]
) -> None:
    words = [word.format(model=model, tmp=logged_in) for word in arguments]
    result = run(*words, *verbose)
    assert result.exit_code in (1, 2) and "***" in result.stderr
    require_secret(result)


@pytest.mark.parametrize("verbose", [(), ("--verbose",)], ids=["", "verbose"])
def test_an_error_of_the_hubs_client_does_not_show_what_it_was_sent(
    logged_in: Path, monkeypatch: pytest.MonkeyPatch, verbose: tuple[str, ...]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(f"401 for https://me:pass:word@hub.invalid/x with authorization: Bearer {TOKEN}, {OTHER}")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    result = run("inspect", "org/name", *verbose)
    assert result.exit_code == 1 and "org/name cannot be had from the hub: 401" in result.stderr
    assert ("Traceback" in result.stderr) == bool(verbose)
    require_secret(result)


def test_a_base_model_with_a_password_is_refused(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert run("plan", model, "--criterion", "random", "--ratio", "0.25", "-o", plan).exit_code == 0
    for name in ("https://me:pa55@hub.invalid/org/name", TOKEN):
        result = run("prune", model, plan, "-o", tmp_path / "out", "--base-model", name)
        assert result.exit_code == 2 and "--base-model holds a token or a password" in result.stderr
        require_secret(result)
    assert not (tmp_path / "out").exists()


KEY = "sk-of-a-server-9876"


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["", "dry"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--serve-arguments", f"--dtype float32 --api-key {KEY}"), "--serve-arguments holds a token or a password: --api-key"),
        (("--serve-arguments", f"--api_key={KEY}"), "--serve-arguments holds a token or a password: --api-key"),
        (("--serve-arguments", f"--hf-token={TOKEN}"), "--serve-arguments holds a token or a password: --hf-token"),
        (("--user", f"https://me:{KEY}@user.invalid/v1"), "the address of user.invalid holds a user, a password"),
        (("--user", f"https://user.invalid/v1?token={KEY}"), "the address of user.invalid holds a user, a password or a query"),
        ((f"other=https://me:{KEY}@model.invalid:1/v1",), "the address of model.invalid:1 holds a user"),
        ((f"https://model.invalid/v1?api_key={KEY}",), "the address of model.invalid holds a user"),
    ],
)  # fmt: skip
def test_eval_takes_no_key_where_it_would_be_written_down(
    tmp_path: Path, arguments: tuple[str, ...], sentence: str, dry: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    result = run("eval", "original=http://127.0.0.1:9", *arguments, *dry, "-o", out, "--only", "tau2-telecom")
    assert result.exit_code == 2 and sentence in result.stderr and KEY not in result.stdout + result.stderr
    require_secret(result)
    assert not out.exists()


def test_compare_takes_no_key_in_an_address(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"prompt": "a", "text": "a"}) + "\n")
    urls = ("--endpoint", f"https://me:{KEY}@a.invalid/v1", "--endpoint", "https://b.invalid/v1")
    result = run("compare", model, model, "--data", text, "--prompts", text, *urls, "--device", "cpu")
    assert result.exit_code == 2 and "the address of a.invalid holds a user" in result.stderr
    assert KEY not in result.stdout + result.stderr


def test_a_key_that_a_server_repeats_is_not_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the results, the table, the model's folder, its card, or the terminal."""
    from reapkit import evaluation
    from reapkit.endpoints import Endpoint

    plan, pruned, out = tmp_path / "plan.json", tmp_path / "pruned", tmp_path / "out"
    assert run("plan", model, "--criterion", "random", "--ratio", "0.25", "-o", plan).exit_code == 0
    assert run("prune", model, plan, "-o", pruned).exit_code == 0
    monkeypatch.setenv("REAPKIT_API_KEY", OTHER)
    said = f"401 for key {OTHER}, authorization: Bearer {KEY}, https://me:pa55@host/v1?api_key={KEY}&a=b, {TOKEN}"
    monkeypatch.setattr(evaluation, "_enter", lambda *_: Endpoint("http://a", "m"))
    monkeypatch.setattr(evaluation, "_run", lambda entry, *_: dict.fromkeys(entry.rows, evaluation.Cell(None, said)))
    command = ("eval", f"small={pruned}", "--only", "math500", "-o", out)
    for result in (run(*command), run(*command, "--json")):
        assert result.exit_code == 1 and "***" in result.stdout and KEY not in result.stdout + result.stderr
        require_secret(result)
    written = [path for folder in (out, pruned) for path in folder.rglob("*") if path.is_file()]
    assert {"eval.json", "table.md", "README.md"} <= {path.name for path in written}
    assert "not run: 401 for key" in (pruned / "README.md").read_text()
    for path in written:
        for secret in (KEY, OTHER, TOKEN, "pa55"):
            assert secret.encode() not in path.read_bytes(), (path, secret)


def test_what_is_no_secret_stays() -> None:
    for text in ("org/hf_model", "hf_quant_config.json", "https://host/a@b", "a@b", "model-00001", "hf_hub", "https://h/x?revision=main",
                 "--max-num-batched-tokens 8192", "the bearer of 8 tokens"):  # fmt: skip
        assert redacted(text) == text
    assert redacted(f"a {TOKEN} b ssh://u:p@h/x") == "a *** b ssh://***@h/x"
    assert TOKEN not in str(ReapkitError(TOKEN, hint=TOKEN)) and ReapkitError("", hint=TOKEN).hint == "***"


# ---- what a stranger wrote --------------------------------------------------------------------------------------------------------------


def require_tame(result: Result) -> str:
    """All that was printed, which steers no terminal and turns no writing."""
    printed = result.stdout + result.stderr
    for sign in printed:
        assert sign == "\n" or (sign >= " " and not "\x7f" <= sign <= "\x9f" and not "\u202a" <= sign <= "\u202e"), (
            repr(sign)
        )
    return printed


def test_domain_names_are_printed_as_they_are(model: Path, tmp_path: Path) -> None:
    text, statistics = tmp_path / "text.jsonl", tmp_path / "s.safetensors"
    domains = (HOSTILE, "[/]", "b\nerror: forged", "\ud800")
    text.write_text("".join(json.dumps({"text": "the quick brown fox", "domain": name}) + "\n" for name in domains))
    result = run("observe", model, "--data", text, "-o", statistics, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert SHOWN in require_tame(result) and "\\nerror: forged" in result.stderr
    result = run("observe", model, "--data", text, "-o", statistics, "--device", "cpu", "--json")
    assert HOSTILE in json.loads(result.stdout)["domains"]
    require_tame(result)
    result = run("compare", model, model, "--data", text, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert SHOWN in require_tame(result)
    result = run("compare", model, model, "--data", text, "--device", "cpu", "--json")
    assert HOSTILE in json.loads(result.stdout)["domains"]
    require_tame(result)


def test_names_of_tensors_and_words_of_a_config_are_printed_as_they_are(tmp_path: Path) -> None:
    folder = fuzzing.write_checkpoint(tmp_path / "model", fuzzing._qwen3)
    config = tiny.read_json(folder / "config.json")
    for change in ({"quantization_config": {"quant_method": HOSTILE}}, {"model_type": HOSTILE}, {"dtype": HOSTILE}):
        tiny.write_json(folder / "config.json", {**config, **change})
        for command in (("inspect", folder), ("inspect", folder, "--json"), ("inspect", folder, "--verbose")):
            require_tame(run(*command))
    tiny.write_json(folder / "config.json", {**config, "quantization_config": {"quant_method": HOSTILE}})
    assert SHOWN in run("inspect", folder).stdout
    tiny.write_json(folder / "config.json", config)
    config_of, tensors = fuzzing._qwen3()
    name = f"model.layers.0.mlp.experts.{HOSTILE}"
    (folder / "model.safetensors").write_bytes(fuzzing.shard({**tensors, name: ("BF16", (1,))}))
    result = run("inspect", folder)
    assert result.exit_code == 1 and config_of
    assert "\\x1b[2J[bold red]evil[/] [/x]\\u202e\\x9b31m" in require_tame(result)


def test_problems_that_verify_finds_are_printed_as_they_are(tmp_path: Path) -> None:
    folder = fuzzing.write_checkpoint(tmp_path / "model", fuzzing._qwen3)
    checkpoint = Checkpoint.open(folder)
    layout = resolve(checkpoint, ARCHITECTURES)
    out = tmp_path / "out"
    shards.write(checkpoint, layout, plans.choose_for_checkpoint(checkpoint, layout, keep=3).plan, out)
    assert run("verify", out).exit_code == 0
    manifest = tiny.read_json(out / "reapkit.json")
    manifest["digests"][HOSTILE] = "0" * 64
    tiny.write_json(out / "reapkit.json", manifest)
    result = run("verify", out)
    assert result.exit_code == 3 and f"{SHOWN} is missing" in require_tame(result)
    assert f"{HOSTILE} is missing" in json.loads(run("verify", out, "--json").stdout)["problems"]


def test_paths_of_ones_own_are_printed_as_they_are(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a[b]c\x1b[0m [/]"
    shutil.copytree(model, folder)
    result = run("inspect", folder)
    assert result.exit_code == 0 and "a[b]c\\x1b[0m [/]" in require_tame(result)
    (folder / "config.json").rename(folder / "gone.json")
    assert "a[b]c\\x1b[0m [/]" in require_tame(run("inspect", folder, "--verbose"))
