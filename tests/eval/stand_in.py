"""Thirty problems of our own in AIME25's schema, each with a program that finds its answer by trying or counting.

    python tests/eval/stand_in.py tests/eval/AIME25-stand-in.jsonl        # write the file anew

AIME's own problems are the Mathematical Association of America's and not part of this repository. These stand in where what is shown is
that the pipeline works; they are easier, and figures on them say nothing about AIME.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import combinations, permutations, product
from math import comb, gcd, isqrt
from pathlib import Path


def digits(number: int) -> list[int]:
    return [int(sign) for sign in str(number)]


def is_prime(number: int) -> bool:
    return number > 1 and all(number % other for other in range(2, isqrt(number) + 1))


def divisors(number: int) -> list[int]:
    return [other for other in range(1, number + 1) if number % other == 0]


@cache
def tilings(width: int) -> int:
    """Of a 2 by `width` board by dominoes, from left to right."""
    return 1 if width < 2 else tilings(width - 1) + tilings(width - 2)


def lattice_paths(forbidden: tuple[int, int], end: tuple[int, int]) -> int:
    @cache
    def ways(x: int, y: int) -> int:
        if (x, y) == forbidden or x < 0 or y < 0:
            return 0
        return 1 if (x, y) == (0, 0) else ways(x - 1, y) + ways(x, y - 1)

    return ways(*end)


def relatively_prime_sum(value: Fraction) -> int:
    return value.numerator + value.denominator


def dice_sum_is_prime() -> Fraction:
    rolls = list(product(range(1, 7), repeat=3))
    return Fraction(sum(is_prime(sum(roll)) for roll in rolls), len(rolls))


def two_red_of_three() -> Fraction:
    balls = ["red"] * 5 + ["blue"] * 4 + ["green"] * 3
    draws = list(combinations(range(12), 3))
    return Fraction(sum(sum(balls[i] == "red" for i in draw) == 2 for draw in draws), len(draws))


PROBLEMS: tuple[tuple[str, Callable[[], int]], ...] = (
    ("Find the number of positive integers less than $1000$ whose digits add up to $9$.",
     lambda: sum(sum(digits(n)) == 9 for n in range(1, 1000))),
    ("Find the number of ordered pairs $(a, b)$ of positive integers with $a \\le 30$ and $b \\le 30$ such that $ab$ is a perfect square.",
     lambda: sum(isqrt(a * b) ** 2 == a * b for a in range(1, 31) for b in range(1, 31))),
    ("Find the remainder when $7^{2025} + 11^{2025}$ is divided by $1000$.",
     lambda: (7**2025 + 11**2025) % 1000),
    ("Find the sum of all primes $p < 100$ for which $p + 6$ is also a prime.",
     lambda: sum(p for p in range(100) if is_prime(p) and is_prime(p + 6))),
    ("Find the number of ways to tile a $2 \\times 14$ board with $1 \\times 2$ dominoes.",
     lambda: tilings(14)),
    ("Three fair dice are rolled. The probability that the sum of the numbers is prime is $\\tfrac{m}{n}$ in lowest terms. Find $m + n$.",
     lambda: relatively_prime_sum(dice_sum_is_prime())),
    ("Find the number of subsets of $\\{1, 2, \\ldots, 12\\}$ that contain no two consecutive integers.",
     lambda: sum(all(not (mask >> i & 1 and mask >> i + 1 & 1) for i in range(11)) for mask in range(2**12))),
    ("Find the least positive integer $n$ such that $n$ leaves the remainders $2$, $3$ and $4$ when divided by $5$, $7$ and $9$.",
     lambda: next(n for n in range(1, 1000) if (n % 5, n % 7, n % 9) == (2, 3, 4))),
    ("A path goes from $(0, 0)$ to $(6, 6)$ in steps of one unit to the right or up and does not pass through $(3, 3)$. Find the number of "
     "such paths.",
     lambda: lattice_paths((3, 3), (6, 6))),
    ("Find the number of trailing zeros of $2025!$ in base ten.",
     lambda: sum(2025 // 5**k for k in range(1, 6))),
    ("Find the number of permutations $(a_1, \\ldots, a_6)$ of $1, \\ldots, 6$ with $a_i \\ne i$ for every $i$.",
     lambda: sum(all(p[i] != i for i in range(6)) for p in permutations(range(6)))),
    ("Find the sum of the positive divisors of $360$ that are not divisible by $4$.",
     lambda: sum(d for d in divisors(360) if d % 4)),
    ("Find the greatest three-digit integer that is equal to $11$ times the sum of the squares of its digits.",
     lambda: max(n for n in range(100, 1000) if n == 11 * sum(d * d for d in digits(n)))),
    ("Three balls are drawn without replacement from $5$ red, $4$ blue and $3$ green ones. The probability that exactly two are red is "
     "$\\tfrac{m}{n}$ in lowest terms. Find $m + n$.",
     lambda: relatively_prime_sum(two_red_of_three())),
    ("Find the number of ordered triples $(x, y, z)$ of positive integers with $x + y + z = 24$ and $x < y < z$.",
     lambda: sum(x < y < 24 - x - y for x in range(1, 25) for y in range(1, 25))),
    ("Find the number of triangles with integer side lengths and perimeter $45$, no two of them congruent.",
     lambda: sum(a + b > 45 - a - b >= b for a in range(1, 45) for b in range(a, 45))),
    ("Find the number of integers from $1$ to $1000$ that are divisible by $6$ or by $10$ but not by $15$.",
     lambda: sum((n % 6 == 0 or n % 10 == 0) and n % 15 != 0 for n in range(1, 1001))),
    ("The sequence $a_1 = 1$, $a_2 = 3$, $a_{n+2} = 2a_{n+1} + a_n$ is given. Find the remainder when $a_{20}$ is divided by $1000$.",
     lambda: recurrence(20) % 1000),
    ("Find the number of four-digit palindromes that are divisible by $33$.",
     lambda: sum(str(n) == str(n)[::-1] and n % 33 == 0 for n in range(1000, 10000))),
    ("Find the number of fractions $\\tfrac{a}{b}$ in lowest terms with $0 < a < b \\le 30$.",
     lambda: sum(gcd(a, b) == 1 for b in range(1, 31) for a in range(1, b))),
    ("Find the area of the convex polygon whose vertices are $(0,0)$, $(8,0)$, $(11,6)$, $(7,13)$ and $(-2,9)$, times $2$.",
     lambda: twice_area([(0, 0), (8, 0), (11, 6), (7, 13), (-2, 9)])),
    ("Find the number of points with integer coordinates strictly inside the circle $x^2 + y^2 = 100$.",
     lambda: sum(x * x + y * y < 100 for x in range(-10, 11) for y in range(-10, 11))),
    ("Find the number of integers from $1$ to $2025$ whose binary form contains exactly five ones.",
     lambda: sum(bin(n).count("1") == 5 for n in range(1, 2026))),
    ("Find the sum of the digits of $2^{100}$.",
     lambda: sum(digits(2**100))),
    ("Find the number of ways to make $50$ cents from coins of $1$, $5$, $10$ and $25$ cents.",
     lambda: sum(50 - 5 * a - 10 * b - 25 * c >= 0 for a in range(11) for b in range(6) for c in range(3))),
    ("Find the coefficient of $x^6$ in $(1 + x + x^2)^7$.",
     lambda: sum(sum(powers) == 6 for powers in product(range(3), repeat=7))),
    ("Eight people sit at a round table with eight numbered seats. Find the number of ways to choose three of them so that no two of the "
     "chosen sit next to each other.",
     lambda: sum(all((b - a) % 8 not in (1, 7) for a, b in combinations(chosen, 2)) for chosen in combinations(range(8), 3))),
    ("Find the least integer $n > 1$ for which $1 + 2 + \\cdots + n$ is a perfect square greater than $36$.",
     lambda: next(n for n in range(2, 1000) if (t := n * (n + 1) // 2) > 36 and isqrt(t) ** 2 == t)),
    ("Find the number of positive integers $n \\le 500$ for which $n^2 + n + 41$ is not a prime.",
     lambda: sum(not is_prime(n * n + n + 41) for n in range(1, 501))),
    ("A committee of $5$ is chosen from $6$ women and $5$ men and has more women than men. Find the number of such committees.",
     lambda: sum(comb(6, women) * comb(5, 5 - women) for women in (3, 4, 5))),
)  # fmt: skip


def recurrence(number: int) -> int:
    terms = [1, 3]
    while len(terms) < number:
        terms.append(2 * terms[-1] + terms[-2])
    return terms[number - 1]


def twice_area(corners: list[tuple[int, int]]) -> int:
    """By the shoelace formula."""
    return abs(sum(x * v - u * y for (x, y), (u, v) in zip(corners, corners[1:] + corners[:1], strict=True)))


def rows() -> list[dict[str, str]]:
    """The problems with the answers that their programs find."""
    return [
        {"id": f"stand-in-{n}", "problem": text, "answer": str(answer())}
        for n, (text, answer) in enumerate(PROBLEMS, start=1)
    ]


def main() -> None:
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
