"""Runs Python that a model wrote: a whitelist of syntax first, then a child process with limits on time and memory.

The whitelist is the defence (no imports, no attributes but a few methods, no underscores); the limits only stop endless loops.
"""

# ruff: noqa: SIM905 - the whitelists read better as words
import ast
import json
import subprocess
import sys
from typing import Any

NODES = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.AugAssign, ast.For, ast.While, ast.If,
    ast.Expr, ast.Pass, ast.Break, ast.Continue, ast.BoolOp, ast.boolop, ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop,
    ast.Compare, ast.cmpop, ast.Call, ast.keyword, ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
    ast.comprehension, ast.Constant, ast.Name, ast.expr_context, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.Subscript, ast.Slice,
    ast.Attribute,
)  # fmt: skip
METHODS = frozenset(
    "append extend insert pop remove sort reverse index count copy add update items keys values get upper lower swapcase title "
    "capitalize strip lstrip rstrip split join replace startswith endswith find isdigit isalpha isupper islower".split()
)
BUILTINS = (
    "abs all any bool dict divmod enumerate filter float int len list map max min pow range reversed round set sorted str sum "
    "tuple zip"
).split()
MAX_CHARACTERS = 4000
SECONDS = 2
MEMORY_BYTES = 512 * 2**20  # an interpreter needs some 20 MB; the tasks need next to nothing

_CHILD = f"""
import builtins, json, resource, sys
task = json.load(sys.stdin)
limits = {{"CPU": {SECONDS}, "AS": {MEMORY_BYTES}, "FSIZE": 0, "NPROC": 0}}
for name, value in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
scope = {{"__builtins__": {{name: getattr(builtins, name) for name in {BUILTINS!r}}}}}
exec(compile(task["code"], "reply", "exec"), scope)
same = lambda value: json.dumps(value, sort_keys=True)
right = all(same(scope[task["entry_point"]](*arguments)) == same(expected) for arguments, expected in task["tests"])
sys.exit(0 if right else 1)
"""


def check(code: str) -> str | None:
    """Why the code may not run, or None."""
    if len(code) > MAX_CHARACTERS:
        return f"{len(code)} characters, at most {MAX_CHARACTERS} are run"
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"no Python: {type(error).__name__}"
    for node in ast.walk(tree):
        if not isinstance(node, NODES):
            return f"{type(node).__name__} is not allowed"
        if isinstance(node, ast.Attribute) and node.attr not in METHODS:
            return f"attribute {node.attr} is not allowed"
        names = [getattr(node, field, None) for field in ("id", "name", "arg")]
        if any(isinstance(name, str) and name.startswith("_") and name != "_" for name in names):
            return "names with a leading underscore are not allowed"
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            return "decorators are not allowed"
    return None


def passes(code: str, entry_point: str, tests: list[list[Any]]) -> bool:
    """Whether the code is allowed and gives the expected value for every `[arguments, expected]`."""
    if check(code) is not None:
        return False
    task = json.dumps({"code": code, "entry_point": entry_point, "tests": tests})
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    try:
        done = subprocess.run(command, input=task, text=True, capture_output=True, timeout=2 * SECONDS + 4, env={})
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
