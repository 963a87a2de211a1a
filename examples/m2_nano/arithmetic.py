"""Arithmetic with written steps: sums, products, long division, equations, dates, word problems and more.

Every kind is a function `(rng, level) -> (question, steps, answer)`; levels 1 to 3 make the numbers and the chains longer.
The steps spell out carries, partial products and remainders, because a model this small cannot do them in its head.
"""

import itertools
import random
from collections.abc import Callable
from fractions import Fraction
from math import gcd

from words import ITEMS, person

Problem = tuple[str, str, str]


def _added(a: int, b: int) -> str:
    """`47+85: 7+5=12 4+8+1=13 =132`; sums of two small numbers need no columns."""
    if a < 20 and b < 20:
        return f"{a}+{b}={a + b}"
    columns, carry, x, y = [], 0, a, b
    while x or y:
        total = x % 10 + y % 10 + carry
        columns.append(f"{x % 10}+{y % 10}" + ("+1" if carry else "") + f"={total}")
        carry, x, y = total // 10, x // 10, y // 10
    return f"{a}+{b}: {' '.join(columns)} ={a + b}"


def _subtracted(a: int, b: int) -> str:
    """`83-47: 13-7=6 7-4=3 =36`, for a >= b."""
    if a < 20:
        return f"{a}-{b}={a - b}"
    columns, borrow, x, y = [], 0, a, b
    while x or y:
        top, low = x % 10 - borrow, y % 10
        borrow = 1 if top < low else 0
        columns.append(f"{top + 10 * borrow}-{low}={top + 10 * borrow - low}")
        x, y = x // 10, y // 10
    return f"{a}-{b}: {' '.join(columns)} ={a - b}"


def _combined(a: int, sign: str, b: int) -> str:
    if sign == "+":
        return _added(a, b) if a >= 0 and b >= 0 else f"{a}+{b}={a + b}"
    return _subtracted(a, b) if a >= b >= 0 else f"{a}-{b}={a - b}"


def _multiplied(a: int, b: int) -> str:
    """Partial products, largest place of the second factor first."""
    if (a < 10 and b < 10) or a * b == 0:
        return f"{a}*{b}={a * b}"
    if b < 10:
        a, b = b, a
    parts = [a * int(digit) * 10**place for place, digit in reversed(list(enumerate(reversed(str(b))))) if digit != "0"]
    if len(parts) == 1:
        return f"{a}*{b}={a * b}"
    if a >= 10:
        inner = [_multiplied(int(digit), a) for digit in str(b) if digit not in "01"]
        lines, total = [*dict.fromkeys(inner), f"{a}*{b}={'+'.join(map(str, parts))}"], parts[0]
        for part in parts[1:]:
            lines.append(_added(total, part))
            total += part
        return "\n".join(lines)
    return f"{a}*{b}={'+'.join(map(str, parts))}={a * b}"


def _divided(a: int, b: int) -> str:
    """Long division digit by digit: `754/6: 7 1r1, 15 2r3, 34 5r4 = 125 r 4`."""
    steps, rest = [], 0
    for digit in str(a):
        rest = rest * 10 + int(digit)
        steps.append(f"{rest} {rest // b}r{rest % b}")
        rest %= b
    return f"{a}/{b}: {', '.join(steps)} ={a // b} r {a % b}"


def _number(rng: random.Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1) if digits > 1 else 1, 10**digits - 1)


def _sum(rng: random.Random, level: int) -> Problem:
    numbers = [_number(rng, rng.randint(1, level + 1)) for _ in range(rng.randint(2, level + 2))]
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(_added(total, number))
        total += number
    listed = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
    question = rng.choice([f"What is {' + '.join(map(str, numbers))}?", f"Add {listed}.", f"Find the sum of {listed}."])
    return question, "\n".join(steps), str(total)


def _difference(rng: random.Random, level: int) -> Problem:
    a, b = sorted((_number(rng, level + 1), _number(rng, rng.randint(1, level + 1))), reverse=True)
    question = rng.choice([f"What is {a} - {b}?", f"Subtract {b} from {a}.", f"How much larger is {a} than {b}?"])
    return question, _subtracted(a, b), str(a - b)


def _product(rng: random.Random, level: int) -> Problem:
    a, b = _number(rng, min(level + 1, 3)), _number(rng, 1 if level == 1 else 2)
    question = rng.choice([f"What is {a} * {b}?", f"Multiply {a} by {b}.", f"Compute {a} times {b}."])
    return question, _multiplied(a, b), str(a * b)


def _division(rng: random.Random, level: int) -> Problem:
    a, b = _number(rng, level + 1), rng.randint(2, 9 if level < 3 else 12)
    kind = rng.randrange(3)
    question = [f"Divide {a} by {b} and give quotient and remainder.", f"What is {a} // {b}?", f"What is {a} mod {b}?"][
        kind
    ]
    return question, _divided(a, b), [f"{a // b} r {a % b}", str(a // b), str(a % b)][kind]


def _expression(rng: random.Random, level: int) -> Problem:
    """An expression with one pair of brackets a level, reduced one step a line."""

    def build(depth: int) -> tuple[str, int, list[str]]:
        if depth == 0:
            number = rng.randint(1, 12)
            return str(number), number, []
        left_text, left, left_steps = build(depth - 1)
        right_text, right, right_steps = build(0 if rng.random() < 0.7 else depth - 1)
        sign = rng.choice("++-*") if abs(left * right) < 900 else rng.choice("+-")
        if rng.random() < 0.5:
            left_text, left, right_text, right = right_text, right, left_text, left
        value = {"+": left + right, "-": left - right, "*": left * right}[sign]
        step = _multiplied(left, right) if sign == "*" and min(left, right) >= 0 else f"{left}{sign}{right}={value}"
        if sign in "+-" and min(left, right) >= 0:
            step = _combined(left, sign, right)
        return f"({left_text} {sign} {right_text})", value, [*left_steps, *right_steps, step]

    text, value, steps = build(level + 1)
    return rng.choice([f"Evaluate {text[1:-1]}.", f"What is {text[1:-1]}?"]), "\n".join(steps), str(value)


def _common_divisor(rng: random.Random, level: int) -> Problem:
    factor = rng.randint(2, 6 * level)
    a, b = sorted((factor * rng.randint(2, 9), factor * rng.randint(2, 9)), reverse=True)
    steps, x, y = [], a, b
    while y:
        steps.append(f"{x} mod {y}={x % y}")
        x, y = y, x % y
    if rng.random() < 0.6:
        return f"What is the greatest common divisor of {a} and {b}?", "\n".join(steps), str(x)
    steps += [f"gcd {x}", f"{a}/{x}={a // x}", _multiplied(a // x, b)]
    return f"What is the least common multiple of {a} and {b}?", "\n".join(steps), str(a // x * b)


def _equation(rng: random.Random, level: int) -> Problem:
    a, x, b, name = (
        rng.randint(2, 4 + 3 * level),
        rng.randint(1, 10 * level),
        rng.randint(1, 20 * level),
        rng.choice("xyntk"),
    )
    if level < 3 or rng.random() < 0.5:
        sign = rng.choice("+-")
        right = a * x + (b if sign == "+" else -b)
        steps = [f"{a}{name}={right}{'-' if sign == '+' else '+'}{b}={a * x}", f"{name}={a * x}/{a}={x}"]
        return f"Solve {a}{name} {sign} {b} = {right} for {name}.", "\n".join(steps), str(x)
    c = rng.randint(1, a - 1)
    right = (a - c) * x + b
    steps = [f"{a}{name}-{c}{name}={right}-{b}", f"{a - c}{name}={(a - c) * x}", f"{name}={x}"]
    return f"Solve {a}{name} + {b} = {c}{name} + {right} for {name}.", "\n".join(steps), str(x)


def _percentage(rng: random.Random, level: int) -> Problem:
    rate, base = rng.choice([5, 10, 15, 20, 25, 30, 40, 50, 60, 75][: 4 + 2 * level]), 20 * rng.randint(1, 10 * level)
    value = rate * base // 100
    steps = [_multiplied(rate, base), f"{rate * base}/100={value}"]
    kind = rng.randrange(3) if level > 1 else 0
    if kind == 0:
        return f"What is {rate}% of {base}?", "\n".join(steps), str(value)
    item = rng.choice(["coat", "lamp", "phone", "bike", "desk"])
    if kind == 1:
        question, total = f"A {item} costs ${base} and is {rate}% off. What is the new price in dollars?", base - value
        return question, "\n".join([*steps, _subtracted(base, value)]), str(total)
    question, total = f"A {item} costs ${base} plus {rate}% tax. What is the total in dollars?", base + value
    return question, "\n".join([*steps, _added(base, value)]), str(total)


def _average(rng: random.Random, level: int) -> Problem:
    count = rng.randint(2, level + 2)
    numbers = [rng.randint(1, 30 * level) for _ in range(count)]
    numbers[-1] += -sum(numbers) % count
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(_added(total, number))
        total += number
    steps.append(f"{total}/{count}={total // count}")
    return f"What is the average of {', '.join(map(str, numbers))}?", "\n".join(steps), str(total // count)


def _sequence(rng: random.Random, level: int) -> Problem:
    start, step, growth = rng.randint(1, 20), rng.randint(2, 6 * level), rng.randint(1, 2 * level)
    kind = rng.randrange(min(level + 1, 3))
    if kind == 0:
        terms = [start + step * i for i in range(5)]
    elif kind == 1:
        terms = [min(start, 9) * (2 + growth % 3) ** i for i in range(4)]
        return (
            f"What comes next: {', '.join(map(str, terms))}?",
            f"times {2 + growth % 3}\n" + _multiplied(terms[-1], 2 + growth % 3),
            str(terms[-1] * (2 + growth % 3)),
        )
    else:
        terms = [start]
        for i in range(4):
            terms.append(terms[-1] + step + growth * i)
    gaps = [b - a for a, b in itertools.pairwise(terms)]
    gap = gaps[-1] + (growth if kind == 2 else 0)
    steps = f"gaps {' '.join(map(str, gaps))}, next {gap}\n" + _added(terms[-1], gap)
    return f"What comes next: {', '.join(map(str, terms))}?", steps, str(terms[-1] + gap)


def _binary(rng: random.Random, level: int) -> Problem:
    number = rng.randint(2, 4 ** (level + 1))
    if rng.random() < 0.5:
        steps, rest = [], number
        while rest:
            steps.append(f"{rest} {rest % 2}")
            rest //= 2
        return f"Write {number} in binary.", "\n".join(steps), f"{number:b}"
    powers = [2**i for i, bit in enumerate(f"{number:b}"[::-1]) if bit == "1"][::-1]
    return f"Which decimal number is binary {number:b}?", f"{'+'.join(map(str, powers))}={number}", str(number)


def _clock(rng: random.Random, level: int) -> Problem:
    hour, minute, minutes = rng.randint(0, 23), rng.randint(0, 59), rng.randint(5, 80 * level)
    total = minute + minutes
    hours, rest = divmod(total, 60)
    end = (hour + hours) % 24
    steps = [_added(minute, minutes), f"{total}={hours}h {rest}m", f"{hour}+{hours}={hour + hours}"]
    steps += [f"{hour + hours}-24={end}"] if hour + hours >= 24 else []
    what = rng.choice(["film", "trip", "lesson", "meeting", "match"])
    question = f"A {what} starts at {hour:02}:{minute:02} and lasts {minutes} minutes. When does it end?"
    return question, "\n".join(steps), f"{end:02}:{rest:02}"


def _rectangle(rng: random.Random, level: int) -> Problem:
    a, b = rng.randint(2, 12 * level), rng.randint(2, 9 * level)
    what = rng.choice(["garden", "field", "room", "sheet", "yard"])
    if rng.random() < 0.5:
        steps = _multiplied(a, b)
        return f"A {what} is {a} m long and {b} m wide. What is its area in square metres?", steps, str(a * b)
    steps = _added(a, b) + "\n" + _multiplied(2, a + b)
    return f"A {what} is {a} m long and {b} m wide. What is its perimeter in metres?", steps, str(2 * (a + b))


def _shop(rng: random.Random, level: int) -> Problem:
    kinds = rng.sample(ITEMS, min(level, 2) + (level == 3))
    bought = [(rng.randint(2, 9), rng.randint(2, 6 * level), item) for item in kinds]
    steps, total = [], 0
    for count, price, _ in bought:
        steps.append(_multiplied(count, price))
        steps += [_added(total, count * price)] if total else []
        total += count * price
    listed = " and ".join(f"{count} {item} at ${price} each" for count, price, item in bought)
    name = person(rng)
    if rng.random() < 0.5:
        return f"{name} buys {listed}. How many dollars does {name} pay?", "\n".join(steps), str(total)
    paid = total + rng.randint(1, 10 * level)
    steps.append(_subtracted(paid, total))
    return (
        f"{name} buys {listed} and pays with ${paid}. How many dollars come back?",
        "\n".join(steps),
        str(paid - total),
    )


def _story(rng: random.Random, level: int) -> Problem:
    """A chain of gains, losses, doublings and shares, one sentence each."""
    name, other, item = person(rng), person(rng), rng.choice(ITEMS)
    have = rng.randint(5, 20 * level)
    sentences, steps = [f"{name} has {have} {item}."], []
    for _ in range(rng.randint(level, level + 2)):
        kind, amount = rng.randrange(6), rng.randint(2, 15 * level)
        if kind <= 1:
            sentences.append(
                f"{rng.choice(['Then', 'Later'])} {name} {rng.choice(['finds', 'buys', 'gets'])} {amount} more."
            )
            steps.append(_added(have, amount))
            have += amount
        elif kind <= 3 and have > 2:
            amount = rng.randint(1, have - 1)
            sentences.append(
                rng.choice(
                    [f"{name} gives {amount} to {other}.", f"{name} loses {amount}.", f"{other} takes {amount}."]
                )
            )
            steps.append(_subtracted(have, amount))
            have -= amount
        elif kind == 4 and have < 300:
            times = rng.randint(2, 4)
            sentences.append(f"Then {name} has {('twice', 'three times', 'four times')[times - 2]} as many.")
            steps.append(_multiplied(times, have))
            have *= times
        elif have % 2 == 0:
            sentences.append(f"{name} sells half of them.")
            steps.append(f"{have}/2={have // 2}")
            have //= 2
        else:
            sentences.append(f"{name} drops one.")
            steps.append(_subtracted(have, 1))
            have -= 1
    return " ".join(sentences) + f" How many {item} does {name} have now?", "\n".join(steps), str(have)


def _travel(rng: random.Random, level: int) -> Problem:
    speed, hours = rng.randint(2, 30 * level), rng.randint(2, 9)
    vehicle = rng.choice(["train", "car", "bus", "boat", "bike"])
    kind = rng.randrange(3)
    if kind == 0:
        question, steps = (
            f"A {vehicle} goes {speed} km an hour for {hours} hours. How many km is that?",
            _multiplied(hours, speed),
        )
        return question, steps, str(speed * hours)
    if kind == 1:
        question = f"A {vehicle} covers {speed * hours} km in {hours} hours. How many km an hour is that?"
        return question, _divided(speed * hours, hours), str(speed)
    rest = rng.randint(2, 40)
    question = f"A {vehicle} goes {speed} km an hour for {hours} hours and then {rest} km more. How many km in total?"
    return question, _multiplied(hours, speed) + "\n" + _added(speed * hours, rest), str(speed * hours + rest)


def _fractions(rng: random.Random, level: int) -> Problem:
    if level == 1 or rng.random() < 0.4:
        factor, a, b = rng.randint(2, 4 * level), rng.randint(1, 9), rng.randint(2, 9)
        top, low = a * factor, b * factor
        common = gcd(top, low)
        steps = f"gcd {common}\n{top}/{common}={top // common} {low}/{common}={low // common}"
        return f"Reduce the fraction {top}/{low}.", steps, f"{top // common}/{low // common}"
    a, b, c, d = rng.randint(1, 8), rng.randint(2, 9), rng.randint(1, 8), rng.randint(2, 9)
    total, top = Fraction(a, b) + Fraction(c, d), a * d + c * b
    common = gcd(top, b * d)
    steps = f"{a}*{d}={a * d} {c}*{b}={c * b}\n{_added(a * d, c * b)}\n{b}*{d}={b * d}\n{top}/{b * d} gcd {common}"
    return f"Add {a}/{b} and {c}/{d} and reduce.", steps, f"{total.numerator}/{total.denominator}"


def _digits(rng: random.Random, level: int) -> Problem:
    number = _number(rng, 2 + level)
    kind = rng.randrange(3)
    if kind == 0:
        steps, total = [], 0
        for digit in str(number):
            steps.append(f"{total}+{digit}={total + int(digit)}")
            total += int(digit)
        return f"What is the sum of the digits of {number}?", "\n".join(steps), str(total)
    if kind == 1:
        return f"Write the digits of {number} in reverse order.", " ".join(str(number)[::-1]), str(number)[::-1]
    place = rng.choice([10, 100])
    low = number // place * place
    answer = low + place if number - low >= place // 2 else low
    return f"Round {number} to the nearest {place}.", f"{low} or {low + place}, rest {number - low}", str(answer)


def _power(rng: random.Random, level: int) -> Problem:
    base, exponent = rng.randint(2, 4 + 3 * level), 2 if level == 1 else rng.randint(2, 3)
    steps, value = [], base
    for _ in range(exponent - 1):
        steps.append(_multiplied(base, value))
        value *= base
    return (
        rng.choice([f"What is {base}^{exponent}?", f"Raise {base} to the power {exponent}."]),
        "\n".join(steps),
        str(value),
    )


def _rate(rng: random.Random, level: int) -> Problem:
    """Rule of three: so many for so much, how many for that much?"""
    per, one, other = rng.randint(2, 5 * level), rng.randint(2, 9), rng.randint(2, 9 * level)
    item, name = rng.choice(ITEMS), person(rng)
    question = f"{one} boxes hold {one * per} {item}. How many {item} are in {other} boxes?"
    if rng.random() < 0.5:
        question = f"{name} packs {one * per} {item} in {one} minutes. How many {item} in {other} minutes?"
    return question, f"{one * per}/{one}={per}\n" + _multiplied(per, other), str(per * other)


KINDS: tuple[Callable[[random.Random, int], Problem], ...] = (
    _sum, _difference, _product, _division, _expression, _common_divisor, _equation, _percentage, _average, _sequence,
    _binary, _clock, _rectangle, _shop, _story, _travel, _fractions, _digits, _power, _rate,
)  # fmt: skip


def draw(rng: random.Random, level: int) -> dict:
    """One problem as a chat row; `answer` is the exact text of the final reply."""
    kind = rng.choice(KINDS)
    question, steps, answer = kind(rng, level)
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "reasoning_content": steps, "content": answer},
    ]
    return {"kind": kind.__name__.strip("_"), "messages": messages, "answer": answer}
