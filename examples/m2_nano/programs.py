"""Short Python functions written from a sentence, and the tests that decide whether a function is right.

A task is put together from parts (keep some items, change each, reduce to one value; or a chain of string steps; or a small
algorithm with numbers in it), so that the same few idioms have to be combined in ways that were not seen before.
"""

# ruff: noqa: E501 - tables of sentences and code stay one entry a line
import random
from collections.abc import Callable
from typing import Any

from words import ADJECTIVES, CITIES, ITEMS, WORDS, made_up

Parts = tuple[str, str, str, Callable[[random.Random], tuple]]  # what it does, plan, code, arguments of one test
MAX_TESTS = 5


def _integers(rng: random.Random) -> list[int]:
    return [rng.randint(-9, 20) for _ in range(rng.randint(3, 8))]


def _strings(rng: random.Random) -> list[str]:
    return [rng.choice([*WORDS, *ITEMS, *CITIES]).lower() for _ in range(rng.randint(3, 8))]


def _text(rng: random.Random) -> str:
    return " ".join(rng.choice([str.title, str.lower])(rng.choice(WORDS)) for _ in range(rng.randint(1, 4)))


def _counts(rng: random.Random) -> dict[str, int]:
    return {rng.choice(WORDS): rng.randint(-5, 20) for _ in range(rng.randint(2, 6))}


_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()  # noqa: SIM905
)


def _spoken(rng: random.Random, number: int) -> str:
    """A number as it may stand in a sentence: in digits, or sometimes in words."""
    if rng.random() < 0.75 or not -15 <= number <= 15:
        return str(number)
    return "minus " * (number < 0) + _ONES[abs(number)]


def _condition(rng: random.Random, x: str) -> tuple[str, str]:
    k, m = rng.randint(2, 9), rng.randint(-3, 15)
    k_, m_, top_ = _spoken(rng, k), _spoken(rng, m), _spoken(rng, m + k)
    return rng.choice(
        [
            ("even", f"{x} % 2 == 0"), ("odd", f"{x} % 2 == 1"), ("positive", f"{x} > 0"), ("negative", f"{x} < 0"),
            (f"greater than {m_}", f"{x} > {m}"), (f"less than {m_}", f"{x} < {m}"), (f"at least {m_}", f"{x} >= {m}"),
            (f"at most {m_}", f"{x} <= {m}"), (f"divisible by {k_}", f"{x} % {k} == 0"), (f"different from {m_}", f"{x} != {m}"),
            (f"not divisible by {k_}", f"{x} % {k} != 0"), (f"between {m_} and {top_}", f"{m} <= {x} <= {m + k}"),
        ]
    )  # fmt: skip


def _change(rng: random.Random, x: str) -> tuple[str, str]:
    k = rng.randint(2, 12)
    k_ = _spoken(rng, k)
    return rng.choice(
        [
            ("squared", f"{x} * {x}"), ("cubed", f"{x} ** 3"), ("doubled", f"{x} * 2"), (f"times {k_}", f"{x} * {k}"),
            (f"plus {k_}", f"{x} + {k}"), (f"minus {k_}", f"{x} - {k}"), ("negated", f"-{x}"), (f"modulo {k_}", f"{x} % {k}"),
            (f"divided by {k_} rounding down", f"{x} // {k}"), ("in absolute value", f"abs({x})"),
            (f"subtracted from {k_}", f"{k} - {x}"), (f"capped at {k_}", f"min({x}, {k})"), (f"at least {k_}", f"max({x}, {k})"),
        ]
    )  # fmt: skip


def _pipeline(rng: random.Random, level: int, arg: str) -> Parts:
    """Keep, change, reduce over a list of integers; written as a comprehension, or as a loop when asked to."""
    x = rng.choice(["n", "x", "v", "item", "num"])
    conditions = [_condition(rng, x) for _ in range(rng.choice([(0, 1, 1), (1, 1, 2), (1, 2, 3), (3, 4)][level - 1]))]
    changes = [_change(rng, x)] if level > 1 or not conditions or rng.random() < 0.3 else []
    for _ in range(level - 2 if level == 4 or (level == 3 and rng.random() < 0.6) else 0):
        then, code = _change(rng, f"({changes[0][1]})")
        changes = [(f"{changes[0][0]} and then {then}", code)]
    test = rng.choice([" and ", " or "]) if len(conditions) > 1 else ""
    kept = test.join(text for text, _ in conditions)
    code_kept = test.join(code for _, code in conditions)
    value = changes[0][1] if changes else x
    group = f"the numbers in {arg}" + (f" that are {kept}" if kept else "")
    each = f"{group}, each {changes[0][0]}" if changes else group
    reducer = rng.choice(
        ["list", "sum", "count", "largest", "smallest", "product", "any", "sorted", "descending", "distinct"]
    )
    clause = f" if {code_kept}" if code_kept else ""
    inside = f"{value} for {x} in {arg}{clause}"
    looped = reducer in ("list", "sum", "count", "product") and level > 1 and rng.random() < 0.5
    made = {
        "list": (f"the list of {each}", f"return [{inside}]"),
        "sum": (f"the sum of {each}", f"return sum({inside})"),
        "count": (f"how many of the numbers in {arg} are {kept}", f"return sum(1 for {x} in {arg}{clause})"),
        "largest": (f"the largest of {each}, or 0 if there are none", f"return max([{inside}], default=0)"),
        "smallest": (f"the smallest of {each}, or 0 if there are none", f"return min([{inside}], default=0)"),
        "product": (
            f"the product of {each}",
            f"result = 1\n    for value in [{inside}]:\n        result *= value\n    return result",
        ),
        "any": (f"whether any of the numbers in {arg} is {kept}", f"return any({code_kept} for {x} in {arg})"),
        "sorted": (f"the sorted list of {each}", f"return sorted({inside})"),
        "descending": (f"the list of {each}, in descending order", f"return sorted([{inside}], reverse=True)"),
        "distinct": (f"the sorted list of distinct values of {each}", f"return sorted(set({inside}))"),
    }
    if reducer in ("count", "any") and not kept:
        reducer = "sum"
    what, body = made[reducer]
    if looped:
        start = {"list": "[]", "sum": "0", "count": "0", "product": "1"}[reducer]
        step = {
            "list": f"result.append({value})", "sum": f"result += {value}", "count": "result += 1", "product": f"result *= {value}",
        }[reducer]  # fmt: skip
        if code_kept:
            step = f"if {code_kept}:\n            {step}"
        body = f"result = {start}\n    for {x} in {arg}:\n        {step}\n    return result"
        what += rng.choice([", using a loop", ", with a for loop"])
    plan = " -> ".join([f"keep {kept}" for _ in conditions[:1]] + [f"each {text}" for text, _ in changes] + [reducer])
    return f"the list of integers {arg}", f"returns {what}", plan + f"\n{body}", lambda rng: (_integers(rng),)


def _letters(rng: random.Random, level: int, arg: str) -> Parts:
    """A chain of steps on one string."""
    k, a, b = rng.randint(2, 6), rng.choice("aeinorst"), rng.choice("xyzkwq")
    steps = rng.sample(
        [
            ("reversed", "{}[::-1]"), ("in upper case", "{}.upper()"), ("in lower case", "{}.lower()"),
            ("without spaces", '{}.replace(" ", "")'), (f"with every {a} replaced by {b}", '{}.replace("' + a + '", "' + b + '")'),
            (f"cut to its first {k} characters", "{}[:" + str(k) + "]"), (f"without its first {k} characters", "{}[" + str(k) + ":]"),
            (f"cut to its last {k} characters", "{}[-" + str(k) + ":]"), (f"repeated {k} times", "{} * " + str(k)),
            (f"with {b} put in front", '"' + b + '" + {}'), (f"with {b} at the end", '{} + "' + b + '"'),
            (f"without the letter {a}", '{}.replace("' + a + '", "")'), ("with swapped case", "{}.swapcase()"),
            (f"with every {k}th character only", "{}[::" + str(k) + "]"), ("with spaces replaced by dashes", '{}.replace(" ", "-")'),
        ],
        rng.randint(2 * level - 1, 2 * level),
    )  # fmt: skip
    final = rng.choice(
        [
            None, None, ("its length", "len({})"), (f"the number of {a} in it", '{}.count("' + a + '")'),
            ("the list of its words", "{}.split()"), ("the sorted list of its letters", "sorted({})"),
            (f"whether it starts with {a}", '{}.startswith("' + a + '")'), (f"whether it ends with {a}", '{}.endswith("' + a + '")'),
            ("the number of its different characters", "len(set({}))"), ("whether it reads the same backwards", "{} == {}[::-1]"),
            ("the number of vowels in it", 'sum(1 for c in {} if c in "aeiou")'), (f"whether it contains {a}", '"' + a + '" in {}'),
        ]
    )  # fmt: skip
    result = rng.choice(["text", "result", "s"]) if arg not in ("text", "s") else "result"
    lines, current = [], arg
    for _, code in steps:
        lines.append(f"{result} = {code.format(current)}")
        current = result
    what = "returns it " + ", then ".join(text for text, _ in steps)
    if final:
        what = "takes it " + ", then ".join(text for text, _ in steps) + f", and returns {final[0]}"
        lines.append(f"return {final[1].format(current, current)}")
    else:
        lines[-1] = "return " + lines[-1].split(" = ", 1)[1]
    plan = " -> ".join([text for text, _ in steps] + ([final[0]] if final else []))
    return f"the string {arg}", what, plan + "\n" + "\n    ".join(lines), lambda rng: (_text(rng),)


def _strings_list(rng: random.Random, level: int, arg: str) -> Parts:
    k, a, sep = rng.randint(3, 6), rng.choice("bcghlprst"), rng.choice(["-", ", ", " ", "/", "+"])
    x = rng.choice(["w", "word", "s"])
    tests = [
        (f"longer than {k} letters", f"len({x}) > {k}"), (f"shorter than {k} letters", f"len({x}) < {k}"), (f"starting with {a}", f'{x}[0] == "{a}"'),
        (f"containing {a}", f'"{a}" in {x}'), (f"ending with {a}", f'{x}[-1] == "{a}"'), (f"of exactly {k} letters", f"len({x}) == {k}"),
    ]  # fmt: skip
    maps = [
        ("", x), ("", x), ("in upper case", f"{x}.upper()"), ("reversed", f"{x}[::-1]"), ("as first letters", f"{x}[0]"),
        ("as lengths", f"len({x})"), (f"cut to {k - 1} letters", f"{x}[:{k - 1}]"), ("capitalized", f"{x}.capitalize()"),
    ]  # fmt: skip
    (kept, code_kept), (mapped, value) = rng.choice(tests), rng.choice(maps)
    if level == 1 and rng.random() < 0.5:
        kept = code_kept = ""
    words = f"the words in {arg}" + (f" {kept}" if kept else "") + (f", {mapped}" if mapped else "")
    clause = f" if {code_kept}" if code_kept else ""
    inside = f"{value} for {x} in {arg}{clause}"
    choices = [
        (f"the list of {words}", f"return [{inside}]"),
        (f"the sorted list of {words}", f"return sorted({inside})"),
        (f"the number of {words.split(', ')[0]}", f"return sum(1 for {x} in {arg}{clause})"),
        (f"a dict from each of the words in {arg} to its length", f"return {{{x}: len({x}) for {x} in {arg}}}"),
        (f"the longest of the words in {arg}", f"return max({arg}, key=len)"),
        (f"the words in {arg} sorted by length", f"return sorted({arg}, key=len)"),
    ]
    if value == x or mapped not in ("as lengths",):
        choices.append((f"{words} joined with {sep!r}", f"return {sep!r}.join({inside})".replace("'", '"')))
    what, body = rng.choice(choices[: 3 + level] + choices[-1:])
    what = what.replace("'", '"')
    return (
        f"the list of words {arg}",
        f"returns {what}",
        what.replace(f" in {arg}", "") + f"\n{body}",
        lambda rng: (_strings(rng),),
    )


def _dictionary(rng: random.Random, level: int, arg: str) -> Parts:
    condition, code = _condition(rng, "v")
    change, changed = _change(rng, "v")
    a = rng.choice("bcghlprst")
    what, body = rng.choice(
        [
            (
                f"the keys of {arg} whose value is {condition}, sorted",
                f"return sorted(k for k, v in {arg}.items() if {code})",
            ),
            (
                f"{arg} with only the values that are {condition}",
                f"return {{k: v for k, v in {arg}.items() if {code}}}",
            ),
            (f"{arg} with every value {change}", f"return {{k: {changed} for k, v in {arg}.items()}}"),
            (
                f"the sum of the values of {arg} that are {condition}",
                f"return sum(v for v in {arg}.values() if {code})",
            ),
            (f"how many values of {arg} are {condition}", f"return sum(1 for v in {arg}.values() if {code})"),
            (f"the key of {arg} with the largest value", f"return max({arg}, key={arg}.get)"),
            (f"the key of {arg} with the smallest value", f"return min({arg}, key={arg}.get)"),
            (
                f"the sum of the values of {arg} whose key contains {a}",
                f'return sum(v for k, v in {arg}.items() if "{a}" in k)',
            ),
            (f"the keys of {arg} sorted by value", f"return sorted({arg}, key={arg}.get)"),
            (
                f"the values of {arg} in sorted order, each {change}",
                f"return [{changed} for v in sorted({arg}.values())]",
            ),
        ][: 6 + 2 * level]
    )
    if level == 3 and "items" in body and "{k: v" in body:
        what, body = f"{what}, each {change}", body.replace("{k: v", f"{{k: {changed}")
    return (
        f"the dict {arg} of integers",
        f"returns {what}",
        what.replace(f" of {arg}", "") + f"\n{body}",
        lambda rng: (_counts(rng),),
    )


def _branches(rng: random.Random, level: int, arg: str) -> Parts:
    other = rng.choice([name for name in ("b", "y", "m", "q") if name != arg])
    cases = []
    for _ in range(2 * level - 1):
        condition, code = _condition(rng, arg)
        if rng.random() < 0.3:
            condition, code = rng.choice(
                [(f"greater than {other}", f"{arg} > {other}"), (f"equal to {other}", f"{arg} == {other}")]
            )
        change, changed = _change(rng, rng.choice([arg, other]))
        cases.append((condition, code, f"{changed}", change))
    _, last_code = _change(rng, other)
    sentences = [f"{value} if {arg} is {condition}" for condition, _, value, _ in cases]
    what = "returns " + ", else ".join(sentences) + f", and otherwise {last_code}"
    lines = []
    for _, code, value, _ in cases:
        lines.append(f"if {code}:\n        return {value}")
    lines.append(f"return {last_code}")
    plan = " / ".join(condition for condition, _, _, _ in cases) + " / otherwise"
    return (
        f"the integers {arg} and {other}", what, plan + "\n" + "\n    ".join(lines),
        lambda rng: (rng.randint(-9, 20), rng.randint(-9, 20)),
    )  # fmt: skip


def _algorithm(rng: random.Random, level: int, arg: str) -> Parts:
    k, j = rng.randint(2, 9), rng.randint(2, 9)
    condition, code = _condition(rng, "i")
    change, changed = _change(rng, "i")
    what, body = rng.choice(
        [
            (f"the sum of the numbers from 1 to {arg} that are {condition}", f"return sum(i for i in range(1, {arg} + 1) if {code})"),
            (f"the list of numbers below {arg} that are {condition}", f"return [i for i in range({arg}) if {code}]"),
            (f"the list of the numbers from 1 to {arg}, each {change}", f"return [{changed} for i in range(1, {arg} + 1)]"),
            (f"the sum of the digits of {arg}, times {k}", f"return {k} * sum(int(d) for d in str({arg}))"),
            (f"the number of digits {k} in {arg}", f'return str({arg}).count("{k}")'),
            (f"the divisors of {arg} that are {condition}", f"return [i for i in range(1, {arg} + 1) if {arg} % i == 0 and {code}]"),
            (f"how many divisors {arg} has, plus {k}", f"return {k} + sum(1 for i in range(1, {arg} + 1) if {arg} % i == 0)"),
            (f"the factorial of {arg} modulo {k + j}", f"result = 1\n    for i in range(2, {arg} + 1):\n        result *= i\n    return result % {k + j}"),
            (f"the {arg}th number of the sequence that starts with {k}, {j} and adds the last two", f"a, b = {k}, {j}\n    for _ in range({arg}):\n        a, b = b, a + b\n    return a"),
            (f"how often {arg} can be divided by {k} before it is below {j}", f"count = 0\n    while {arg} >= {j}:\n        {arg} //= {k}\n        count += 1\n    return count"),
            (f"whether {arg} is prime", f"return {arg} > 1 and all({arg} % i for i in range(2, {arg}))"),
            (f"{arg} written in base {k}, as a string", f'digits = ""\n    while {arg} > 0:\n        digits = str({arg} % {k}) + digits\n        {arg} //= {k}\n    return digits'),
            (f"the smallest multiple of {k} above {arg}", f"result = {arg} + 1\n    while result % {k} != 0:\n        result += 1\n    return result"),
            (f"the square table of {arg} as a list of rows, each entry plus {k}", f"return [[i * j + {k} for j in range(1, {arg} + 1)] for i in range(1, {arg} + 1)]"),
        ][: 7 + 3 * level - (level == 3) * 2]
    )  # fmt: skip
    return f"the positive integer {arg}", f"returns {what}", what + f"\n{body}", lambda rng: (rng.randint(1, 12),)


def _pairs(rng: random.Random, level: int, arg: str) -> Parts:
    other = rng.choice([name for name in ("other", "b", "right", "second") if name != arg])
    change, changed = _change(rng, "x")
    condition, code = _condition(rng, "x")
    what, body = rng.choice(
        [
            (f"the list of sums of {arg} and {other} item by item", f"return [x + y for x, y in zip({arg}, {other})]"),
            (f"the list of products of {arg} and {other} item by item", f"return [x * y for x, y in zip({arg}, {other})]"),
            (f"the items of {arg} that are also in {other}", f"return [x for x in {arg} if x in {other}]"),
            (f"the items of {arg} that are not in {other}", f"return [x for x in {arg} if x not in {other}]"),
            (f"the larger of {arg} and {other} item by item", f"return [max(x, y) for x, y in zip({arg}, {other})]"),
            (f"the sorted distinct items of {arg} and {other} together", f"return sorted(set({arg} + {other}))"),
            (f"the items of {arg} and {other} together that are {condition}", f"return [x for x in {arg} + {other} if {code}]"),
            (f"the items of {arg}, each {change}, followed by {other}", f"return [{changed} for x in {arg}] + {other}"),
            (f"the sum of the products of {arg} and {other} item by item", f"return sum(x * y for x, y in zip({arg}, {other}))"),
            (f"the items of {arg} that are {condition}, followed by {other} reversed", f"return [x for x in {arg} if {code}] + {other}[::-1]"),
        ][: 4 + 2 * level]
    )  # fmt: skip
    return (
        f"the lists of integers {arg} and {other}",
        f"returns {what}",
        what + f"\n{body}",
        lambda rng: (_integers(rng), _integers(rng)),
    )


LONGEST = 3  # the last level of training; level 4 asks for longer chains than were ever trained
LONG_KINDS = (_pipeline, _letters, _branches)
KINDS = (_pipeline, _pipeline, _letters, _letters, _strings_list, _dictionary, _branches, _algorithm, _pairs)
ARGUMENTS = {
    _pipeline: ["numbers", "values", "items", "data", "nums", "xs"], _letters: ["text", "s", "line", "name", "phrase"],
    _strings_list: ["words", "names", "items", "lines", "tokens"], _dictionary: ["counts", "table", "scores", "prices", "d"],
    _branches: ["a", "x", "n", "p"], _algorithm: ["n", "number", "k", "limit"], _pairs: ["left", "a", "first", "xs"],
}  # fmt: skip


def _tests(code: str, entry_point: str, make: Callable[[random.Random], tuple], rng: random.Random) -> list[list[Any]]:
    """Arguments and expected values, from running the reference (our own text, not a model's)."""
    scope: dict[str, Any] = {}
    exec(code, scope)
    tests = []
    for _ in range(MAX_TESTS):
        arguments = list(make(rng))
        tests.append([arguments, scope[entry_point](*arguments)])
    return tests


def draw(rng: random.Random, level: int, *, tests: bool = False) -> dict:
    """One task as a chat row; with `tests`, also what is needed to score a reply."""
    kind = rng.choice(KINDS if level <= LONGEST else LONG_KINDS)
    arg = rng.choice(ARGUMENTS[kind])
    takes, does, planned, make = kind(rng, level, arg)
    plan, body = planned.split("\n", 1)
    name = "_".join(
        [
            rng.choice(["get", "find", "make", "do", "calc", rng.choice(ADJECTIVES)]),
            rng.choice([rng.choice(WORDS), made_up(rng)]),
        ]
    )
    signature = f"{name}({', '.join(takes.split('integers ')[-1].split(' and ')) if ' and ' in takes else arg})"
    question = rng.choice(
        [
            f"Write a function {signature} that takes {takes} and {does}.",
            f"Write a Python function {signature} for {takes}. It {does}.",
            f"I need a function {signature}. It takes {takes} and {does}.",
        ]
    )
    code = f"def {signature}:\n    {body}\n"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "reasoning_content": plan, "content": f"```python\n{code}```"},
    ]
    row = {"kind": kind.__name__.strip("_"), "messages": messages, "entry_point": name}
    return row | {"tests": _tests(code, name, make, rng)} if tests else row
