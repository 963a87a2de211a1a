"""A checkpoint full of traps goes through every verb, and none of its code runs.

Whatever runs leaves a mark in a folder of its own; an audit hook of Python's own tells of files opened outside, of pickles and programs.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fuzzing
import tiny
from reapkit import calibration
from reapkit.checkpoint import Checkpoint
from reapkit.errors import DataError, UnsupportedError
from reapkit.modules import load_tokenizer

# Runs verbs one after another in one process, with the checkpoint's folder as the working folder, and tells what it saw.
DRIVER = """
import json, os, sys
outside, commands = sys.argv[1], json.loads(sys.argv[2])
seen = []
def watch(event, args):
    if event == "open" and str(args[0]).startswith(outside):
        seen.append(f"opened {args[0]}")
    elif event in ("os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect"):
        seen.append(f"{event} {args!r}"[:200])
import torch, transformers, reapkit.cli, reapkit.compression, reapkit.fidelity
from transformers.models.minimax_m2 import modeling_minimax_m2
sys.addaudithook(watch)
codes = []
for command in commands:
    try:
        codes.append(reapkit.cli.app(command, standalone_mode=False) or 0)
    except BaseException as error:
        codes.append(getattr(error, "exit_code", getattr(error, "code", repr(error))))
print("@@" + json.dumps({"codes": codes, "seen": seen}))
"""

PAYLOADS = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch @') }}",
    "{{ lipsum.__globals__['os'].popen('touch @').read() }}",
    "{{ namespace.__init__.__globals__['__builtins__']['open']('@', 'w') }}",
    "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context }}",
    "{{ messages.__class__.__base__.__subclasses__()[0] }}",
    "{{ raise_exception.__globals__['os'].system('touch @') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ messages | map(attribute='__class__') | list | first | attr('__mro__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}{{ '%s' % messages.append }}{{ messages.append(1) }}",
    "{% import 'os' as os %}{{ os.system('touch @') }}",
    "{% include '/etc/passwd' %}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ joiner.__init__.__globals__ }}{{ dict.__base__ }}",
)


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return (open, (self.mark, "w"))


def set_traps(folder: Path, marks: Path) -> Path:
    """Put everything into a working checkpoint that any program might run or read."""

    def code(name: str, *, body: str = "") -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(marks / name.replace('/', '_'))!r}, 'w').close()\n{body}", encoding="utf-8")

    classes = "class Any:\n    @classmethod\n    def from_pretrained(cls, *a, **k): return cls()\n"
    for name in ("modeling_trap", "configuration_trap", "tokenization_trap", "processing_trap"):
        code(f"{name}.py", body=classes)
    # What Python, pytest and shells run or import by their names.
    for name in ("conftest.py", "sitecustomize.py", "usercustomize.py", "setup.py", "json.py", "torch.py", "reapkit/__init__.py",
                 "transformers/__init__.py", "custom_generate/generate.py", "__init__.py", "__main__.py"):  # fmt: skip
        code(name)
    (folder / "trap.pth").write_text(f"import os; open({str(marks / 'pth')!r}, 'w').close()\n")
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "model.pt",
        "scheduler.pkl",
        "spiece.model",
        "vocab.pkl",
        "optimizer.ckpt",
    ):
        (folder / name).write_bytes(pickle.dumps(Payload(str(marks / name))))
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
    remote = dict.fromkeys(names, "modeling_trap.Any")
    config = tiny.read_json(folder / "config.json")
    tiny.write_json(
        folder / "config.json", {**config, "auto_map": remote, "custom_pipelines": {"x": {"impl": "modeling_trap.Any"}}}
    )
    settings = tiny.read_json(folder / "tokenizer_config.json")
    settings |= {
        "auto_map": {
            "AutoTokenizer": ["tokenization_trap.Any", "tokenization_trap.Any"],
            "AutoProcessor": "processing_trap.Any",
        }
    }
    tiny.write_json(folder / "tokenizer_config.json", settings)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        tiny.write_json(folder / name, {"auto_map": remote, "processor_class": "Any", "image_processor_type": "Any"})
    (folder / "chat_template.jinja").write_text(PAYLOADS[1].replace("@", str(marks / "template")))
    return folder


@pytest.fixture(scope="module")
def trapped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint full of traps, and the folder where they leave their marks."""
    base = tmp_path_factory.mktemp("traps")
    (base / "marks").mkdir()
    folder = tiny.add_tokenizer(tiny.make_m2(base / "model"))
    return set_traps(folder, base / "marks"), base / "marks"


def drive(folder: Path, marks: Path, commands: list[list[str | Path]]) -> dict[str, Any]:
    """Exit codes of reapkit commands, and what the audit hook saw."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    home = marks.parent / "home"
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    (marks.parent / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-P", str(marks.parent / "driver.py"), str(marks), words]
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    answer = json.loads(ended.stdout.rpartition("@@")[2])
    assert isinstance(answer, dict)
    return {**answer, "stderr": ended.stderr}


def test_no_verb_runs_anything_of_a_booby_trapped_checkpoint(trapped: tuple[Path, Path], tmp_path: Path) -> None:
    folder, marks = trapped
    text, chats = tmp_path / "text.jsonl", tmp_path / "chats.jsonl"
    text.write_text("".join(json.dumps({"text": f"the quick brown fox {i} jumps"}) + "\n" for i in range(8)))
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    shardless = tmp_path / "shardless"
    shardless.mkdir()
    for path in folder.iterdir():
        if path.is_file() and "safetensors" not in path.name and path.suffix not in {".bin", ".pt", ".pth"}:
            (shardless / path.name).write_bytes(path.read_bytes())
    statistics, plan, out, both = (tmp_path / name for name in ("s.safetensors", "p.json", "out", "both"))
    cpu = ["--device", "cpu", "--max-length", "64"]
    commands: list[list[str | Path]] = [
        ["inspect", folder],
        ["inspect", shardless],
        ["observe", folder, "--data", chats, "-o", tmp_path / "c.safetensors", *cpu],
        ["observe", folder, "--data", text, "-o", statistics, *cpu],
        ["plan", statistics, "--ratio", "0.25", "-o", plan],
        ["plan", folder, "--criterion", "random", "--ratio", "0.25", "-o", tmp_path / "random.json"],
        ["prune", folder, plan, "-o", out],
        ["verify", out],
        ["compress", folder, "--data", text, "--ratio", "0.25", "-o", both, *cpu],
        ["compare", folder, out, "--data", text, *cpu],
        ["compare", folder, out, "--data", chats, *cpu],
        ["combine", statistics, statistics, "-o", tmp_path / "n.safetensors"],
    ]
    answer = drive(folder, marks, commands)
    assert answer["codes"] == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1], answer["stderr"][-3000:]
    assert "the chat template fails" in answer["stderr"] and "unsafe" in answer["stderr"]
    assert answer["seen"] == [] and list(marks.iterdir()) == []
    carried = {path.name for path in out.iterdir()}
    assert "modeling_trap.py" in carried and not carried & {
        "pytorch_model.bin",
        "model.pt",
        "trap.pth",
        "scheduler.pkl",
    }


def test_the_traps_are_live(trapped: tuple[Path, Path], tmp_path: Path) -> None:
    """With leave to run it, the checkpoint's code does run: the other test would see it."""
    folder, marks = trapped
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "hello"}) + "\n")
    drive(
        folder,
        marks,
        [["observe", folder, "--data", text, "-o", tmp_path / "s", "--device", "cpu", "--trust-remote-code"]],
    )
    found = {path.name for path in marks.iterdir()}
    for path in marks.iterdir():
        path.unlink()
    assert found & {"tokenization_trap.py", "modeling_trap.py"}
    pickle.load(io.BytesIO((folder / "pytorch_model.bin").read_bytes())).close()
    assert (marks / "pytorch_model.bin").exists()
    (marks / "pytorch_model.bin").unlink()


def test_a_family_that_only_its_own_code_knows_is_refused(trapped: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = trapped
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "modeling_trap.py"):
        (other / name).write_bytes((folder / name).read_bytes())
    tiny.write_json(other / "config.json", {**tiny.read_json(other / "config.json"), "model_type": "trap_moe"})
    from reapkit.inventory import inspect

    with pytest.raises(UnsupportedError, match="'trap_moe' is not supported"):
        inspect(other)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_template_reaches_nothing_outside_its_sandbox(tmp_path: Path, payload: str) -> None:
    tokenizer, path, mark = _tokenizer(tmp_path), tmp_path / "rows.jsonl", tmp_path / "mark"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    tokenizer.chat_template = payload.replace("@", str(mark))
    # What the sandbox does not give at all is undefined, which renders as nothing.
    with pytest.raises(DataError, match=r"the chat template fails|each of its 1 samples is empty"):
        calibration.load([str(path)], tokenizer)
    assert not mark.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% for i in range(999) %}{{ f(n + 1) if n < 20 }}{% endfor %}{% endmacro %}{{ f(0) }}",
    ],
)
def test_a_template_that_would_not_end_is_given_up(
    tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_TEMPLATE_SECONDS", 0.3)
    tokenizer, path = _tokenizer(tmp_path), tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"line 1: the chat template fails: it takes longer than 0\.3 seconds"):
        calibration.load([str(path)], tokenizer)


@pytest.mark.parametrize("template", ["{{ range(10**9) | list }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"])
def test_a_template_that_asks_for_too_much_is_refused(tmp_path: Path, template: str) -> None:
    tokenizer, path = _tokenizer(tmp_path), tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="the chat template fails"):
        calibration.load([str(path)], tokenizer)


def _tokenizer(tmp_path: Path) -> Any:
    return load_tokenizer(Checkpoint.open(fuzzing._tokenizer_folder(tmp_path, "model")))
