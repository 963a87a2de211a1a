"""Looking things up, counting and sorting in short lists and tables, answered by the exact text asked for."""

import json
import random
from collections.abc import Callable

from words import CITIES, COLORS, ITEMS, city, distinct, person, word

Problem = tuple[str, str, str]
COLUMNS: dict[str, Callable[[random.Random], object]] = {
    "age": lambda rng: rng.randint(18, 90),
    "city": lambda rng: rng.choice(CITIES),
    "score": lambda rng: rng.randint(10, 999),
    "color": lambda rng: rng.choice(COLORS),
    "item": lambda rng: rng.choice(ITEMS),
    "price": lambda rng: rng.randint(2, 250),
    "code": lambda rng: f"{rng.choice('ABCDEFG')}{rng.randint(10, 99)}",
    "year": lambda rng: rng.randint(1950, 2030),
}
NUMERIC = ("age", "score", "price", "year")


def _table(rng: random.Random, level: int) -> tuple[str, str, list[dict[str, object]], list[str]]:
    """A table in one of four notations; the first column identifies the row."""
    key, make = rng.choice([("name", person), ("town", city), ("word", word)])
    names = sorted(
        rng.sample([column for column in COLUMNS if column != "city" or key != "town"], min(level + 1, 3)),
        key=lambda _: rng.random(),
    )
    if not set(names) & set(NUMERIC):
        names[0] = rng.choice(NUMERIC)
    rows = [
        {key: first} | {name: COLUMNS[name](rng) for name in names}
        for first in distinct(make, rng.randint(3, 3 + 2 * level), rng)
    ]
    columns = [key, *names]
    notation = rng.randrange(4)
    if notation == 0:
        text = "\n".join(" | ".join(map(str, line)) for line in [columns, *(row.values() for row in rows)])
    elif notation == 1:
        text = "\n".join(",".join(map(str, line)) for line in [columns, *(row.values() for row in rows)])
    elif notation == 2:
        text = "\n".join(f"- {row[key]}: " + ", ".join(f"{name} {row[name]}" for name in names) for row in rows)
    else:
        text = "\n".join(json.dumps(row) for row in rows)
    return text, key, rows, names


def _ask_table(rng: random.Random, level: int) -> Problem:
    text, key, rows, names = _table(rng, level)
    number = rng.choice([name for name in names if name in NUMERIC])
    name, row = rng.choice(names), rng.choice(rows)
    values = [entry[number] for entry in rows]
    listed = ", ".join(f"{entry[number]} {entry[key]}" for entry in rows)
    kind = rng.randrange(3 + 2 * level)
    if kind in (0, 7):
        question, steps = (
            f"What is the {name} of {row[key]}?",
            ", ".join(f"{column} {value}" for column, value in row.items()),
        )
        answer = row[name]
    elif kind == 1 or kind == 2:
        best = max(values) if kind == 1 else min(values)
        found = [entry for entry in rows if entry[number] == best]
        question = f"Which {key} has the {('largest', 'smallest')[kind - 1]} {number}?"
        steps, answer = f"{listed}\nbest {best} {found[0][key]}", found[0][key]
    elif kind == 3:
        same = [entry[key] for entry in rows if entry[name] == row[name]]
        question, steps = (
            f"Which {key} has {name} {row[name]}? Give all of them.",
            ", ".join(f"{entry[name]} {entry[key]}" for entry in rows),
        )
        answer = ", ".join(map(str, same))
    elif kind == 4:
        limit = rng.choice(values)
        hits = [entry for entry in rows if entry[number] >= limit]
        marks = " ".join(f"{entry[number]} {'yes' if entry[number] >= limit else 'no'}" for entry in rows)
        question, steps, answer = f"How many have {number} of at least {limit}?", marks, len(hits)
    elif kind == 5:
        ordered = sorted(rows, key=lambda entry: entry[number])
        question, steps = (
            f"List every {key} from smallest to largest {number}.",
            ", ".join(f"{entry[number]} {entry[key]}" for entry in ordered),
        )
        answer = ", ".join(str(entry[key]) for entry in ordered)
    elif kind == 6:
        question, steps, answer = (
            f"List the {name} of every {key} in order.",
            f"{len(rows)} rows",
            ", ".join(str(entry[name]) for entry in rows),
        )
    else:
        a, b = rng.sample(rows, 2)
        high = a if a[number] >= b[number] else b
        question = f"Who has the larger {number}, {a[key]} or {b[key]}?"
        steps, answer = f"{a[number]} {a[key]}, {b[number]} {b[key]}", high[key]
    return f"{text}\n\n{question}", steps, str(answer)


def _numbers(rng: random.Random, level: int) -> list[int]:
    return [rng.randint(1, 10 ** rng.randint(1, min(level + 1, 3)) - 1) for _ in range(rng.randint(4, 4 + 2 * level))]


def _order_numbers(rng: random.Random, level: int) -> Problem:
    numbers, down = _numbers(rng, level), rng.random() < 0.5
    ordered = sorted(numbers, reverse=down)
    question = f"Sort from {'largest to smallest' if down else 'smallest to largest'}: {', '.join(map(str, numbers))}"
    sizes = [[n for n in ordered if len(str(n)) == digits] for digits in ((3, 2, 1) if down else (1, 2, 3))]
    return question, " / ".join(" ".join(map(str, group)) for group in sizes if group), ", ".join(map(str, ordered))


def _order_words(rng: random.Random, level: int) -> Problem:
    words = distinct(word, rng.randint(3, 3 + 2 * level), rng)
    kind = rng.randrange(3)
    if kind == 0:
        ordered = sorted(words)
        return f"Sort alphabetically: {', '.join(words)}", " ".join(w[0] for w in ordered), ", ".join(ordered)
    if kind == 1:
        ordered = sorted(words, reverse=True)
        return (
            f"Sort in reverse alphabetical order: {', '.join(words)}",
            " ".join(w[0] for w in ordered),
            ", ".join(ordered),
        )
    ordered = sorted(words, key=len)
    sizes = " ".join(f"{w} {len(w)}" for w in words)
    return f"Sort by number of letters, shortest first: {', '.join(words)}", sizes, ", ".join(ordered)


def _position(rng: random.Random, level: int) -> Problem:
    items = distinct(word, rng.randint(4, 4 + 3 * level), rng)
    place = rng.randrange(len(items))
    counted = " ".join(f"{i} {item}" for i, item in enumerate(items[: place + 1], 1))
    listed = ", ".join(items)
    kind = rng.randrange(5)
    if kind == 0:
        return f"Which item is number {place + 1} in this list: {listed}?", counted, items[place]
    if kind == 1:
        return f"At which position is {items[place]} in this list: {listed}?", counted, str(place + 1)
    if kind == 2:
        return f"Reverse this list: {listed}", f"last {items[-1]}", ", ".join(reversed(items))
    place = max(place, 1)
    if kind == 3:
        return (
            f"Which item comes right before {items[place]} in this list: {listed}?",
            f"{items[place - 1]} {items[place]}",
            items[place - 1],
        )
    step = rng.randint(2, 3)
    return (
        f"Give every {('second', 'third')[step - 2]} item of this list, starting with the first: {listed}",
        "",
        ", ".join(items[::step]),
    )


def _sets(rng: random.Random, level: int) -> Problem:
    pool = distinct(word, 4 + 2 * level, rng)
    left, right = rng.sample(pool, 3 + level), rng.sample(pool, 3 + level)
    a, b = ", ".join(left), ", ".join(right)
    kind = rng.randrange(3)
    marks = " ".join(f"{w} {'yes' if w in right else 'no'}" for w in left)
    if kind == 0:
        common = [w for w in left if w in right]
        return f"A: {a}\nB: {b}\nWhich items of A are also in B?", marks, ", ".join(common) or "none"
    if kind == 1:
        only = [w for w in left if w not in right]
        return f"A: {a}\nB: {b}\nWhich items of A are missing in B?", marks, ", ".join(only) or "none"
    joined = list(dict.fromkeys(left + right))
    return (
        f"A: {a}\nB: {b}\nJoin both lists without repeats.",
        " ".join(w for w in right if w not in left) or "nothing new",
        ", ".join(joined),
    )


def _counting(rng: random.Random, level: int) -> Problem:
    pool = distinct(word, 2 + level, rng)
    items = [rng.choice(pool) for _ in range(rng.randint(5, 6 + 3 * level))]
    target = rng.choice(items)
    kind = rng.randrange(3)
    listed = " ".join(items)
    if kind == 0:
        seen, steps = 0, []
        for item in items:
            seen += item == target
            steps.append(f"{item} {seen}")
        return f"How often does {target} occur: {listed}", " ".join(steps), str(seen)
    if kind == 1:
        return f"Remove repeats: {listed}", f"{len(set(items))} left", ", ".join(dict.fromkeys(items))
    numbers = _numbers(rng, level)
    limit = rng.choice(numbers)
    kept = [str(n) for n in numbers if n > limit]
    marks = " ".join(f"{n} {'yes' if n > limit else 'no'}" for n in numbers)
    return (
        f"Which of these numbers are larger than {limit}: {', '.join(map(str, numbers))}",
        marks,
        ", ".join(kept) or "none",
    )


def _extremes(rng: random.Random, level: int) -> Problem:
    numbers = _numbers(rng, level)
    ordered = sorted(numbers)
    listed = ", ".join(map(str, numbers))
    kind = rng.randrange(4)
    what = ["largest", "smallest", "second largest", "second smallest"][kind]
    answer = [ordered[-1], ordered[0], ordered[-2], ordered[1]][kind]
    steps = " ".join(map(str, ordered[-2:][::-1] if kind in (0, 2) else ordered[:2]))
    return f"What is the {what} number of {listed}?", steps, str(answer)


def _mapping(rng: random.Random, level: int) -> Problem:
    """Follow arrows through a mapping: one hop a level."""
    nodes = distinct(word, rng.randint(4, 5 + 2 * level), rng)
    targets = {node: rng.choice([other for other in nodes if other != node]) for node in nodes}
    start = current = rng.choice(nodes)
    hops = rng.randint(1, level + 1)
    path = [start]
    for _ in range(hops):
        current = targets[current]
        path.append(current)
    arrows = rng.choice([" -> ", ": ", " = ", " leads to "])
    text = "\n".join(f"{node}{arrows}{targets[node]}" for node in nodes)
    return (
        f"{text}\n\nStart at {start} and take {hops} step{'s' if hops > 1 else ''}. Where do you end?",
        " ".join(path),
        current,
    )


KINDS = (
    _ask_table,
    _ask_table,
    _ask_table,
    _order_numbers,
    _order_words,
    _position,
    _sets,
    _counting,
    _extremes,
    _mapping,
)


def draw(rng: random.Random, level: int) -> dict:
    """One problem as a chat row; `answer` is the exact text of the final reply."""
    kind = rng.choice(KINDS)
    question, steps, answer = kind(rng, level)
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "reasoning_content": steps or "Count along.", "content": answer},
    ]
    return {"kind": kind.__name__.strip("_"), "messages": messages, "answer": answer}
