"""Names, places and made-up words for the task generators, kept apart so that the generators read as tasks, not as lists.

Made-up words exist so that copying from the prompt is needed: a fixed list of names could be learnt by heart.
"""

# ruff: noqa: SIM905 - word lists read better as words than as quoted literals
import random

NAMES = (
    "Mia Tom Ada Ben Eva Leo Zoe Max Ivy Sam Ana Jon Kim Lea Ned Pia Ray Sue Uma Vic Nora Omar Paul Rosa Tara Finn Gina "
    "Hugo Iris Jack Kate Liam Maya Noel Olga Petra Quinn Ruth Saul Tess Yara Zane Alma Boris Clara Dina Emil Freya"
).split()
CITIES = (
    "Paris Rome Oslo Cairo Lima Tokyo Delhi Berlin Madrid Vienna Dublin Athens Prague Lisbon Warsaw Boston Denver "
    "Austin Sydney Toronto Helsinki Nairobi Seoul Zurich Geneva Milan Porto Kyoto Quito Havana"
).split()
ITEMS = (
    "apples pears books pens cards coins shells stamps eggs cups plums nuts balls stones tickets roses lemons boxes "
    "buttons marbles candles keys chairs lamps spoons"
).split()
WORDS = (
    "river stone cloud green light paper house table bread water night horse train glass chair plant music dream sugar "
    "tiger lemon ocean queen radio snake truck under value wheel young zebra arrow beach candy dance eagle fruit ghost "
    "honey igloo jelly knife lunch mango nurse olive piano quilt robot salad torch"
).split()
COLORS = "red blue green black white yellow brown pink grey purple orange".split()
ADJECTIVES = "fast quiet bright small heavy cold early simple local open final main spare daily rapid clean".split()
_ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh sl st t tr v w z".split()
_VOWELS = "a e i o u ai ea oo".split()
_CODAS = ["", "", "n", "r", "l", "s", "t", "k", "m", "nd", "st"]


def made_up(rng: random.Random, syllables: int = 2) -> str:
    """A pronounceable lower-case word that is in no dictionary."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_CODAS)


def word(rng: random.Random) -> str:
    return rng.choice(WORDS) if rng.random() < 0.6 else made_up(rng)


def person(rng: random.Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.7 else made_up(rng).capitalize()


def city(rng: random.Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.7 else made_up(rng).capitalize()


def distinct(make, count: int, rng: random.Random) -> list[str]:
    """`count` different results of `make(rng)`, in the order in which they came."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(rng)] = None
    return list(found)
