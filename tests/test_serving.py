"""What `serve` promises before anything starts: the right command with its reasons, and warnings where shapes are unlucky."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from reapkit import dialects, gpus, plans, serving
from reapkit.architectures import ARCHITECTURES
from reapkit.capacity import Demand, Parallel
from reapkit.cli import app
from reapkit.errors import PlanError, UnsupportedError, UsageError
from reapkit.inventory import Inventory, inspect

CONFIG = Path(__file__).parent / "data" / "minimax-m2-config.json"
CARD = (
    "--tensor-parallel-size 8 --tool-call-parser minimax_m2 --reasoning-parser minimax_m2_append_think --trust-remote-code "
    "--enable_expert_parallel --enable-auto-tool-choice"
)


@pytest.fixture(scope="session")
def pruned_to(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A folder with MiniMax-M2's configuration and so many experts: with 180, MiniMax-M2-REAP-162B."""

    def make(experts: int) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"MiniMax-M2-{experts}"
        if not folder.exists():
            folder.mkdir()
            tiny.write_json(folder / "config.json", tiny.read_json(CONFIG) | {"num_local_experts": experts})
        return folder

    return make


@pytest.fixture(scope="module", autouse=True)
def inspected_once() -> Iterator[None]:
    """Without shards each look at these configurations builds the model's shapes anew, which takes seconds."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("reapkit.inventory.inspect", functools.cache(inspect))
        yield


@pytest.fixture(scope="session")
def m2_162b(pruned_to: Callable[[int], Path]) -> Inventory:
    return inspect(pruned_to(180))


def serve(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def with_experts(inventory: Inventory, experts: int) -> Inventory:
    return replace(inventory, num_experts=experts)


def test_minimax_m2_reap_162b_gets_the_model_cards_command(
    m2_162b: Inventory, pruned_to: Callable[[int], Path]
) -> None:
    name = "cerebras/MiniMax-M2-REAP-162B-A10B"
    found = serving.command(m2_162b, model=name, gpus=8, trust_remote_code=True)
    assert shlex.join(found) == f"vllm serve {name} {CARD}"
    for more in ((), ("--gpu", "h100")):
        result = serve(pruned_to(180), "--count", 8, "--trust-remote-code", *more)
        assert result.exit_code == 0, result.stderr
        assert result.stdout == f"vllm serve {pruned_to(180)} {CARD}\n"


def test_every_flag_has_its_reason(m2_162b: Inventory) -> None:
    found = serving.deployment(
        m2_162b, gpu=gpus.find("h200"), gpus=2, demand=Demand(kv_dtype="fp8"), max_num_seqs=7, extra=["--seed", "1"]
    )
    assert all(flag.reason for flag in found.flags)
    assert shlex.join(found.command).endswith("--max-num-seqs 7 --kv-cache-dtype fp8 --seed 1")
    wide = next(flag for flag in serving.deployment(m2_162b, gpus=8).flags if "--enable_expert_parallel" in flag.words)
    assert "1,536 wide" in wide.reason and "blocks of 128" in wide.reason


def test_code_of_the_checkpoints_own_is_trusted_only_where_both_say_so(m2_162b: Inventory) -> None:
    assert m2_162b.geometry is not None
    plain = replace(m2_162b, geometry=replace(m2_162b.geometry, needs_own_code=False))
    assert "--trust-remote-code" not in serving.command(m2_162b, gpus=8)
    assert "--trust-remote-code" not in serving.command(plain, gpus=8, trust_remote_code=True)
    assert any("auto_map" in warning for warning in serving.deployment(m2_162b).warnings)
    assert any("left out" in warning for warning in serving.deployment(plain, trust_remote_code=True).warnings)


def test_an_uneven_split_is_warned_of_with_neighbours_and_flags(
    m2_162b: Inventory, pruned_to: Callable[[int], Path]
) -> None:
    warnings = " ".join(serving.shape_warnings(m2_162b, Parallel(8, experts=True)))
    assert "23, 23, 23, 23, 22, 22, 22, 22" in warnings
    assert "176, 184, 192" in warnings and "--divisible-by 8" in warnings and "--moe-backend triton" in warnings
    assert "leave out expert parallelism" not in warnings, "the blocks of FP8 need it"
    even = " ".join(serving.shape_warnings(with_experts(m2_162b, 184), Parallel(8, experts=True)))
    assert "do not divide" not in even
    cut = " ".join(serving.shape_warnings(replace(m2_162b, block=None), Parallel(8, experts=True)))
    assert "or leave out expert parallelism" in cut
    assert "176, 184, 192" in serve(pruned_to(180), "--count", 8).stderr
    assert serving.split_of_experts(179, 8) == (23, 23, 23, 22, 22, 22, 22, 22)
    assert serving.safe_neighbours(180, 8) == (176, 184, 192)
    assert serving.safe_neighbours(254, 8, original=256) == (248, 256)
    assert serving.safe_neighbours(5, 8) == (8, 16)


def test_other_unlucky_shapes_are_warned_of(m2_162b: Inventory) -> None:
    def said(inventory: Inventory, parallel: Parallel) -> str:
        return " ".join(serving.shape_warnings(inventory, parallel))

    assert "179 experts do not divide by 4" in said(with_experts(m2_162b, 179), Parallel(4))
    assert "there must be one for each" in said(with_experts(m2_162b, 6), Parallel(8, experts=True))
    assert "falls back to plain top-k" in said(replace(m2_162b, num_groups=8), Parallel(4))
    assert "more than vLLM's Triton kernels sort" in said(with_experts(m2_162b, 1024), Parallel(4))
    assert "--enable-eplb (experts held twice" in said(m2_162b, Parallel(8, experts=True))
    balanced = said(replace(m2_162b, model_type="deepseek_v3"), Parallel(8, experts=True))
    assert "num_redundant_experts 4 at least" in balanced


def test_missing_tuned_tiles_are_named_with_the_command_that_makes_them(m2_162b: Inventory) -> None:
    whole = " ".join(serving.shape_warnings(m2_162b, Parallel(8, experts=True)))
    assert "E=23,N=1536,dtype=fp8_w8a8" in whole and "-tp 8 --enable-expert-parallel --dtype fp8_w8a8 --tune" in whole
    cut = " ".join(serving.shape_warnings(with_experts(m2_162b, 128), Parallel(4)))
    assert "E=128,N=384" in cut and "H200" in cut
    assert "E=180,N=384" in " ".join(serving.shape_warnings(m2_162b, Parallel(4)))


def test_what_does_not_fit_is_shortened_or_answered_with_exit_code_3(pruned_to: Callable[[int], Path]) -> None:
    shorter = serve(pruned_to(256), "--gpu", "h200", "--count", 2)
    assert shorter.exit_code == 0
    assert "--max-model-len 137904" in shorter.stdout
    assert "7.45 GB a card are missing" in shorter.stderr and "--count 4" in shorter.stderr
    hopeless = serve(pruned_to(256), "--gpu", "unified-128", "--run")
    assert hopeless.exit_code == 3, "nothing is started"
    hopeless = serve(pruned_to(256), "--gpu", "unified-128")
    assert (
        hopeless.exit_code == 3
        and "does not fit" in hopeless.stderr
        and "--gpu-memory-utilization 0.83" in hopeless.stdout
    )
    described = json.loads(serve(pruned_to(256), "--gpu", "h200", "--count", 2, "--json").stdout)
    assert (
        described["capacity"]["fits"] is False
        and described["capacity"]["missing_bytes"] > 7e9
        and described["next_steps"]
    )


def test_few_sequences_are_said_where_the_cache_is_small(m2_162b: Inventory) -> None:
    small = serving.deployment(m2_162b, gpu=gpus.find("h100"), gpus=3)
    assert small.parallel == Parallel(3) or small.parallel.pipeline == 3
    tight = serving.deployment(with_experts(m2_162b, 256), gpu=gpus.find("h100"), gpus=4)
    flag = next(flag for flag in tight.flags if "--max-num-seqs" in flag.words)
    assert tight.capacity is not None
    assert int(flag.words[1]) == tight.capacity.cache // tight.capacity.per_token // 1024 < 1024


def test_second_engines_get_their_own_words(m2_162b: Inventory, pruned_to: Callable[[int], Path]) -> None:
    even = with_experts(m2_162b, 184)
    assert shlex.join(serving.command(even, model="M", engine="sglang", gpus=8, trust_remote_code=True)) == (
        "python -m sglang.launch_server --model-path M --tp-size 8 --tool-call-parser minimax-m2 --reasoning-parser minimax-append-think "
        "--trust-remote-code --ep-size 8"
    )
    assert serving.command(m2_162b, model="M", engine="transformers") == ("transformers", "serve", "M")
    with pytest.raises(UnsupportedError, match="180 do not divide by 8"):
        serving.command(m2_162b, engine="sglang", gpus=8)
    with pytest.raises(UnsupportedError, match="transformers has no class for 'minimax_m1'"):
        serving.command(replace(m2_162b, model_type="minimax_m1"), engine="transformers")
    with pytest.raises(UsageError, match="no engine 'vlm'"):
        serving.command(m2_162b, engine="vlm")
    limited = serve(
        pruned_to(180), "--engine", "sglang", "--max-model-len", 4096, "--max-num-seqs", 4, "--kv-cache-dtype", "fp8"
    )
    assert limited.stdout.strip().endswith("--context-length 4096 --max-running-requests 4 --kv-cache-dtype fp8_e4m3")
    with pytest.raises(UsageError, match="--max-num-seqs 0"):
        serving.deployment(m2_162b, max_num_seqs=0)


def test_words_behind_two_dashes_and_an_address_go_to_the_engine(pruned_to: Callable[[int], Path]) -> None:
    result = serve(pruned_to(180), "--host", "0.0.0.0", "--", "--moe-backend", "triton")
    assert result.stdout.strip().endswith("--host 0.0.0.0 --port 8000 --moe-backend triton")
    assert serve(pruned_to(180), "--url", "http://x").exit_code == 2


@pytest.mark.parametrize(("model_type", "template", "expected"), [
    ("minimax_m2", None, ("minimax_m2", "minimax_m2_append_think")),
    ("qwen3_moe", "… <tool_call> … </think>", ("hermes", "qwen3")),
    ("qwen3_moe", "… <tool_call> …", ("hermes", None)),
    ("qwen3_moe", "… <function=name> …", ("qwen3_coder", None)),
    ("glm4_moe", "<tool_call>{function-name}\n<arg_key>", ("glm45", "glm45")),
    ("glm4_moe", "<tool_call>{function-name}<arg_key>", ("glm47", "glm47")),
    ("deepseek_v3", "{% if not thinking is defined %}", ("deepseek_v31", "deepseek_v3")),
    ("deepseek_v3", "```json", ("deepseek_v3", None)),
    ("deepseek_v3", "content.split('</think>')", ("deepseek_v3", "deepseek_r1")),
    ("gpt_oss", None, ("openai", "openai_gptoss")),
])  # fmt: skip
def test_siblings_are_told_apart_by_their_chat_template(
    model_type: str, template: str | None, expected: tuple[str, str | None]
) -> None:
    found = dialects.find(model_type, template)
    assert found is not None and (found.tools, found.reasoning) == expected


def test_the_chat_template_is_read_from_either_file(
    pruned_to: Callable[[int], Path], tmp_path: Path, qwen3: Path
) -> None:
    folder = tmp_path / "qwen3"
    shutil.copytree(qwen3, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "<function="}))
    assert inspect(folder).tool_parser == "qwen3_coder"
    (folder / "chat_template.jinja").write_text("</think>")
    assert (inspect(folder).tool_parser, inspect(folder).reasoning_parser) == ("hermes", "qwen3")


def test_the_page_on_serving_shows_what_its_commands_print(
    pruned_to: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every console block: MiniMax-M2's memory on five machines, and the model card's command."""
    page = (Path(__file__).parents[1] / "docs/serving.md").read_text(encoding="utf-8")
    shutil.copytree(pruned_to(256), tmp_path / "MiniMaxAI/MiniMax-M2")
    shutil.copytree(pruned_to(180), tmp_path / "MiniMax-M2-REAP-162B")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```console\n\$ reapkit (.*)\n((?:.*\n)*?)```", page, re.MULTILINE)
    assert len(blocks) == 6
    for command, shown in blocks:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0, result.stderr
        assert [line.rstrip() for line in result.stdout.splitlines()] == shown.splitlines(), command


def test_every_dialect_is_of_a_family_that_there_is() -> None:
    known = {name for entry in ARCHITECTURES for name in entry.model_types}
    assert {name for row in dialects.DIALECTS for name in row.model_types} <= known
    assert known >= dialects.BALANCES_EXPERTS
    names = {row.tools for row in dialects.DIALECTS}
    assert set(dialects.SGLANG_TOOLS) <= names
    assert set(dialects.SGLANG_REASONING) <= {row.reasoning for row in dialects.DIALECTS}


@pytest.mark.parametrize(("experts", "ratio", "divisor", "groups", "kept"), [
    (256, "0.30", 8, 1, 184), (256, "0.25", 8, 1, 192), (256, "0.30", 1, 1, 180), (128, "0.5", 6, 1, 66), (256, "0.30", 6, 8, 192),
])  # fmt: skip
def test_what_stays_is_rounded_up_to_a_multiple(experts: int, ratio: str, divisor: int, groups: int, kept: int) -> None:
    assert plans.num_kept(experts, ratio=ratio, num_groups=groups, divisible_by=divisor) == kept


def test_a_multiple_beyond_all_experts_is_refused_with_the_next_below() -> None:
    with pytest.raises(PlanError, match="no number of experts from 58 to 60 divides by 8") as refused:
        plans.num_kept(60, keep=58, divisible_by=8)
    assert refused.value.hint == "the next below is 56: --keep 56"
    with pytest.raises(PlanError, match="and by the router's 4 groups"):
        plans.num_kept(12, keep=10, num_groups=4, divisible_by=8)
    with pytest.raises(UsageError, match="--divisible-by 0"):
        plans.num_kept(60, keep=58, divisible_by=0)


def test_plan_says_that_it_rounded(qwen3: Path, tmp_path: Path) -> None:
    arguments = ["plan", str(qwen3), "--criterion", "random", "--ratio", "0.5", "-o", str(tmp_path / "plan.json")]
    total = inspect(qwen3).num_experts
    result = CliRunner().invoke(app, [*arguments, "--divisible-by", "3"])
    assert result.exit_code == 0, result.stderr
    kept = plans.PruningPlan.load(tmp_path / "plan.json").num_kept
    assert kept % 3 == 0 and kept >= total / 2
    assert f"keeping {kept} of {total} experts: {total // 2} rounded up, to divide by 3" in result.stderr
