"""Word pools and small random makers shared by the data generator.

Knows: lists of names, places, things and tiny helpers that draw from them with a given generator.
Refuses to know: conversations. All randomness comes in as an argument.
"""

# ruff: noqa: SIM905  (a pool of words reads best as one string)
from __future__ import annotations

import zlib
from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olivia Paul Quinn Rosa Sam Tina Uma "
    "Victor Wendy Xavier Yara Zoe Alice Bob Carol Dan Eve Frank Gina Hugo Ivan Julia Karl Lucy Max Nina Oscar Peter "
    "Ruth Sofia Tom Ursula Vera Will Mei Omar Priya Raj Sara Kenji Lars Ingrid Pedro Fatima Chen Ali Aisha Bruno "
    "Marta Elena Igor Hana Yuki Diego Lucia Marco Giulia Pierre Amelie Hans Greta Sven Astrid Juan Carmen"
).split()
CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "England": "London",
    "Ireland": "Dublin",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Greece": "Athens",
    "Turkey": "Ankara",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "New Delhi",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Brazil": "Brasilia",
    "Argentina": "Buenos Aires",
    "Chile": "Santiago",
    "Peru": "Lima",
    "Cuba": "Havana",
    "Hungary": "Budapest",
    "Belgium": "Brussels",
    "the Netherlands": "Amsterdam",
    "Switzerland": "Bern",
    "the Czech Republic": "Prague",
    "Russia": "Moscow",
    "Ukraine": "Kyiv",
    "Iceland": "Reykjavik",
    "Australia": "Canberra",
    "the United States": "Washington",
    "South Korea": "Seoul",
}
CITIES = (
    *CAPITALS.values(),
    "New York",
    "Los Angeles",
    "San Francisco",
    "Chicago",
    "Boston",
    "Seattle",
    "Denver",
    "Austin",
    "Miami",
    "Toronto",
    "Sydney",
    "Melbourne",
    "Mumbai",
    "Shanghai",
    "Osaka",
    "Munich",
    "Hamburg",
    "Cologne",
    "Zurich",
    "Geneva",
    "Milan",
    "Naples",
    "Venice",
    "Florence",
    "Barcelona",
    "Valencia",
    "Lyon",
    "Nice",
    "Manchester",
    "Liverpool",
    "Oxford",
    "Edinburgh",
    "Glasgow",
    "Istanbul",
    "Dubai",
    "Singapore",
    "Hong Kong",
    "Lagos",
    "Cape Town",
    "Rio",
)
ANIMALS = "cat dog horse cow sheep goat pig hen duck bird fish lion tiger bear wolf fox mouse rabbit frog snake".split()
SOUNDS = {
    "cat": "meow",
    "dog": "woof",
    "cow": "moo",
    "sheep": "baa",
    "duck": "quack",
    "pig": "oink",
    "horse": "neigh",
    "lion": "roar",
    "frog": "croak",
    "bird": "tweet",
    "snake": "hiss",
    "wolf": "howl",
    "mouse": "squeak",
}
COLORS = "red blue green yellow orange purple black white brown pink gray gold silver".split()
FOODS = (
    "apple pear banana bread cheese soup rice pasta pizza salad cake cookie egg honey lemon tomato potato onion "
    "carrot grape cherry plum mango coffee tea milk juice butter sugar salt fish"
).split()
THINGS = (
    "book table chair lamp door window house garden car train boat bike phone letter paper pen ball box bag hat coat "
    "shoe ring clock key cup plate spoon knife bridge road river lake hill tree flower leaf stone star moon sun cloud "
    "rain snow wind fire water sand island forest castle tower wall picture song story dream mirror candle basket "
    "blanket bottle button camera ticket wheel rope sword crown drum violin piano hammer ladder rocket robot "
    "computer server model engine token kernel cable network memory disk file folder report note list table"
).split()
PLURALS = (
    "apples pears books coins stars birds cats dogs cookies pens cups balls keys flowers stones boats shells "
    "marbles cards candles oranges eggs tickets letters"
).split()
ADJECTIVES = (
    "big small red blue green old new happy sad quick slow warm cold bright dark soft hard loud quiet clean tall "
    "short round sharp sweet bitter gentle brave clever lazy busy empty full heavy light strange simple golden "
    "silver broken hidden famous lucky angry calm proud"
).split()
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "tall": "short",
    "fast": "slow",
    "up": "down",
    "left": "right",
    "day": "night",
    "happy": "sad",
    "old": "new",
    "light": "dark",
    "open": "closed",
    "hard": "soft",
    "rich": "poor",
    "early": "late",
    "loud": "quiet",
    "full": "empty",
    "wet": "dry",
    "in": "out",
    "yes": "no",
    "good": "bad",
    "first": "last",
    "strong": "weak",
    "heavy": "light",
    "near": "far",
    "true": "false",
    "love": "hate",
    "begin": "end",
    "win": "lose",
    "clean": "dirty",
    "cheap": "expensive",
}
VERBS = (
    "get set add remove create delete update find search list show read write send fetch load save open close start "
    "stop run check count convert compute move copy book order cancel play pause schedule plan track measure build "
    "print scan sort filter merge split lock unlock enable disable report query lookup make change compare publish "
    "upload download assign invite rename archive restore verify test ping reset mark sync paint water feed clean "
    "repair charge launch rotate mix pack ship rate review translate summarize record calculate estimate"
).split()
NOUNS = (
    "user file order item ticket event task note message email account invoice payment product price stock report "
    "record page image photo video song playlist album device light lamp door sensor camera robot printer server "
    "node cluster job queue model token cache table row column database index backup log alert metric dashboard "
    "project branch commit issue build test package release map route trip flight hotel room seat table menu recipe "
    "meal ingredient garden plant tree pet dog cat patient doctor appointment lesson student grade course book "
    "library game score player team match league weather forecast temperature alarm timer reminder calendar contact "
    "address city country currency unit language word sentence document summary contract budget salary vehicle car "
    "train parcel box container shelf warehouse factory machine pump valve engine battery vote poll survey"
).split()
LANGUAGES = "French German Spanish Italian Portuguese Dutch Swedish Polish Turkish Japanese Chinese Korean".split()
CURRENCIES = "USD EUR GBP JPY CHF CAD AUD INR CNY SEK NOK BRL".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = ("January February March April May June July August September October November December").split()
DIGIT_WORDS = "zero one two three four five six seven eight nine ten".split()
NUMBER_WORDS = (*DIGIT_WORDS, *"eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen".split())

_ONSETS = "b c d f g h j k l m n p r s t v w z br cr dr fl gr kr pl qu sh sl sn st th tr".split()
_VOWELS = "a e i o u a e i o u ai ee oo ou".split()
_CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "x", "nd", "rk", "st", "ck"]

FOREIGN = (
    "Zürich München São Bogotá Málaga naïve café jalapeño Łódź Kraków Øresund Besançon Ångström Straße Grüße señor "
    "crème brûlée Québec façade über Köln Düsseldorf Reykjavík Göteborg İzmir Dvořák Chișinău fiancé piñata"
).split()
# Letters of other scripts and a few pictures, so that every kind of UTF-8 byte is copied in training.
_SCRIPTS = tuple(
    "".join(chr(point) for point in range(first, last + 1))
    for first, last in ((0xE0, 0xF6), (0x3B1, 0x3C9), (0x430, 0x44F), (0x5D0, 0x5EA), (0x627, 0x63A), (0x905, 0x928),
                        (0x3042, 0x3093), (0x4E00, 0x4FFF), (0xAC00, 0xAD00), (0x1F600, 0x1F64F), (0x1F400, 0x1F43F))
)  # fmt: skip

HELD_OUT_SHARE = 16
"""One in this many names is kept out of training, so that copying is measured on names never seen."""


def is_held_out(name: str) -> bool:
    """Say whether a generated name belongs to the evaluation only (a fixed property of its spelling)."""
    return zlib.crc32(name.lower().encode()) % HELD_OUT_SHARE == 0


def maybe(rng: Random, probability: float) -> bool:
    """Return True with the given probability."""
    return rng.random() < probability


def pick(rng: Random, pool: Sequence[T]) -> T:
    """Return one element of a non-empty sequence."""
    return pool[int(rng.random() * len(pool))]


def pseudo_word(rng: Random, syllables: int | None = None) -> str:
    """Return a pronounceable lower-case word that means nothing."""
    count = syllables or pick(rng, (1, 2, 2, 2, 3))
    return "".join(pick(rng, _ONSETS) + pick(rng, _VOWELS) for _ in range(count)) + pick(rng, _CODAS)


def foreign_word(rng: Random) -> str:
    """Return a word beyond ASCII: a real one, or a few characters of one script."""
    if maybe(rng, 0.5):
        return pick(rng, FOREIGN)
    script = pick(rng, _SCRIPTS)
    return "".join(pick(rng, script) for _ in range(rng.randint(1, 4)))


def any_word(rng: Random, vocabulary: Sequence[str]) -> str:
    """Return a word to copy: a common thing, a word of the corpus, or nonsense."""
    kind = rng.random()
    if kind < 0.35:
        return pick(rng, pick(rng, (THINGS, FOODS, ANIMALS, COLORS, ADJECTIVES, VERBS, NOUNS)))
    if kind < 0.66:
        return pick(rng, vocabulary)
    if kind < 0.7:
        return foreign_word(rng)
    return pseudo_word(rng)


def iso_date(rng: Random, first_year: int = 2024, last_year: int = 2033) -> str:
    """Return a date as YYYY-MM-DD (days 1 to 28, so every month has it)."""
    return f"{rng.randint(first_year, last_year)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def clock_time(rng: Random) -> str:
    """Return a time of day as HH:MM."""
    return f"{rng.randint(0, 23):02d}:{pick(rng, ('00', '15', '30', '45', '10', '20', '05'))}"


def a_or_an(word: str) -> str:
    """Prefix a word with its article."""
    return f"an {word}" if word[0].lower() in "aeiou" else f"a {word}"
