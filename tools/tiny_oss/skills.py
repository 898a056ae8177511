"""Skills with one right answer: sums, copying, spelling, lists, JSON objects, verses.

Knows: how people ask for them, and the answer.
Refuses to know: Harmony, tools, and how exchanges become conversations.
"""

# ruff: noqa: SIM905  (a pool of words reads best as one string)
from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

from tools.tiny_oss import words
from tools.tiny_oss.smalltalk import Exchange, soften
from tools.tiny_oss.words import any_word, maybe, pick

SUM_PHRASINGS = (
    "{a}+{b}", "{a} + {b}", "{a}+{b}=", "{a} + {b} =", "{a}+{b}=?", "{a} + {b} = ?", "What is {a} + {b}?",
    "What is {a}+{b}?", "What's {a} + {b}?", "What's {a}+{b}?", "What is {a} plus {b}?", "What's {a} plus {b}?",
    "Calculate {a} + {b}.", "Compute {a}+{b}.", "Add {a} and {b}.", "How much is {a} + {b}?",
    "How much is {a} plus {b}?", "Please add {a} and {b}.", "What is the sum of {a} and {b}?", "Sum of {a} and {b}?",
    "{a} plus {b}", "{a} plus {b}?", "{a} plus {b} is?", "Can you add {a} and {b}?", "Tell me {a} + {b}.",
    "What do I get if I add {a} and {b}?", "Solve {a} + {b}.", "Give me the sum of {a} and {b}.",
    "Can you calculate {a}+{b}?", "What does {a} + {b} equal?", "What is the result of {a} + {b}?",
    "Please calculate {a} + {b}", "Do the math: {a} + {b}", "Question: {a}+{b}?", "Evaluate {a} + {b}.",
    "I want to know {a} + {b}.", "Work out {a} plus {b}.", "{a} and {b} make how many?",
)  # fmt: skip
HELD_OUT_SUM_PHRASINGS = (
    "Hey, what is {a} + {b} please?",
    "Could you tell me what {a} plus {b} is?",
    "So {a}+{b} is what?",
)
"""Never in training: they measure whether the skill carries over to a new wording."""
_NUMBER_ONLY = (
    "What is {a} + {b}? Answer with just the number.", "{a} + {b}? Only the number.", "{a}+{b}, number only please.",
    "Add {a} and {b} and reply with only the number.", "Just give me the number: {a} + {b}",
    "What is {a} plus {b}? Reply with the number only.",
)  # fmt: skip
_NUMBER_PROMPTS = ("Answer with only a number.", "Reply with just the number.", "Only answer with the number.")
_STORIES = (
    "I have {a} {p} and get {b} more. How many {p} do I have?",
    "{n} has {a} {p} and {m} has {b} {p}. How many {p} do they have together?",
    "There are {a} {p} on the table and {b} {p} in the box. How many {p} are there?",
)
_DIFFERENCES = (
    "{a}-{b}", "{a} - {b}", "{a}-{b}=", "What is {a} - {b}?", "What is {a}-{b}?", "What is {a} minus {b}?",
    "{a} minus {b}", "Subtract {b} from {a}.", "How much is {a} - {b}?", "Calculate {a} - {b}.", "What's {a}-{b}?",
    "Take {b} away from {a}.", "Compute {a} - {b}.",
)  # fmt: skip
_PRODUCTS = (
    "{a}*{b}", "{a} * {b}", "{a} x {b}", "What is {a} * {b}?", "What is {a} times {b}?", "Multiply {a} by {b}.",
    "How much is {a} times {b}?", "What's {a}*{b}?", "{a} times {b}", "Calculate {a} * {b}.",
)  # fmt: skip


def _operand(rng: Random, number: int, as_word: bool) -> str:
    return words.DIGIT_WORDS[number] if as_word and number <= 10 else str(number)


def sum_exchange(rng: Random, a: int, b: int, phrasing: str) -> Exchange:
    """Return the sum of two numbers asked in a given phrasing, now and then with number words."""
    as_words = a < 10 and b < 10 and " " in phrasing and maybe(rng, 0.15)
    text = phrasing.format(a=_operand(rng, a, as_words), b=_operand(rng, b, as_words))
    total = a + b
    more = f"Check: {total} - {b} = {a}."
    return Exchange(soften(rng, text), f"{a} + {b} = {total}", f"We add {a} and {b}. That is {total}.", more)


def sums(rng: Random) -> Exchange:
    """Return a small sum, difference or product; one-digit sums are by far the most frequent."""
    kind = rng.random()
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    if kind < 0.5:
        return sum_exchange(rng, a, b, pick(rng, SUM_PHRASINGS))
    if kind < 0.58:
        text = pick(rng, _NUMBER_ONLY).format(a=a, b=b)
        return Exchange(soften(rng, text), str(a + b), f"We add {a} and {b}. That is {a + b}.", "Only the number.")
    if kind < 0.64:
        return Exchange(
            f"{a} + {b}" if maybe(rng, 0.5) else f"What is {a} + {b}?", str(a + b),
            f"We add {a} and {b}. That is {a + b}.", "Only the number.",
            system=pick(rng, _NUMBER_PROMPTS),
        )  # fmt: skip
    if kind < 0.7:
        thing, first, second = pick(rng, words.PLURALS), pick(rng, words.NAMES), pick(rng, words.NAMES)
        text = pick(rng, _STORIES).format(a=a, b=b, p=thing, n=first, m=second)
        return Exchange(text, f"{a} + {b} = {a + b}", f"We add {a} and {b}. That is {a + b}.", f"These are {thing}.")
    if kind < 0.8:
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        return sum_exchange(rng, a, b, pick(rng, SUM_PHRASINGS))
    if kind < 0.92:
        a, b = max(a, b), min(a, b)
        text = pick(rng, _DIFFERENCES).format(a=a, b=b)
        return Exchange(soften(rng, text), f"{a} - {b} = {a - b}", f"We take {b} from {a}. That is {a - b}.")
    text = pick(rng, _PRODUCTS).format(a=a, b=b)
    return Exchange(soften(rng, text), f"{a} * {b} = {a * b}", f"We multiply {a} and {b}. That is {a * b}.")


def _phrase(rng: Random, vocabulary: Sequence[str]) -> str:
    count = pick(rng, (1, 1, 1, 2, 2, 3, 4, 5, 6, 9))
    chosen = [any_word(rng, vocabulary) for _ in range(count)]
    if maybe(rng, 0.15):
        chosen.append(str(rng.randint(0, 9999)))
    if maybe(rng, 0.2):
        chosen[0] = chosen[0].capitalize()
    return " ".join(chosen)


_SAY = (
    "Say {}.", "Say {}", "Repeat {}.", "Repeat after me: {}", "Please say {}.", "Say: {}", "Echo {}", "Copy this: {}",
    'Say "{}".', 'Repeat "{}"', "Write {}.", "Type {}", "Repeat this: {}", "Can you say {}?", "Just say {}",
    'Copy the text "{}".', 'Write the words "{}"', "Echo this text: {}", "Repeat the word {}.", "Answer with {}.",
)  # fmt: skip
_COUNTS = {"twice": 2, "two times": 2, "three times": 3, "four times": 4, "five times": 5, "2 times": 2, "3 times": 3,
           "4 times": 4, "5 times": 5}  # fmt: skip


def copying(rng: Random, vocabulary: Sequence[str]) -> Exchange:
    """Repeat a phrase, once or a few times."""
    phrase = _phrase(rng, vocabulary)
    if maybe(rng, 0.2):
        times = pick(rng, tuple(_COUNTS))
        word = phrase.split()[0]
        text = pick(rng, ("Say {} {}.", "Repeat {} {}.", "Repeat the word {} {}.", "Write {} {}.")).format(word, times)
        answer = " ".join([word] * _COUNTS[times])
        return Exchange(soften(rng, text), answer, f"Repeat {word} {times}.")
    return Exchange(pick(rng, _SAY).format(phrase), phrase, "Repeat the words exactly.", "Nothing else is needed.")


def letters(rng: Random, vocabulary: Sequence[str]) -> Exchange:
    """Spell, reverse, count, capitalise or take the ends of a word."""
    pools = (words.THINGS, words.FOODS, words.ANIMALS, words.COLORS)
    word = pick(rng, pick(rng, pools)) if maybe(rng, 0.7) else pick(rng, vocabulary).lower()[:9]
    spelled = " ".join(word)
    kind = rng.random()
    if kind < 0.4:
        text = pick(rng, ("Spell {}.", "Spell the word {}.", "How do you spell {}?", "Spell {} letter by letter."))
        return Exchange(soften(rng, text.format(word)), spelled, f"The letters of {word}, one by one.")
    if kind < 0.6:
        text = pick(rng, ("Reverse {}.", "Reverse the word {}.", "Write {} backwards.", "Spell {} backwards."))
        return Exchange(soften(rng, text.format(word)), word[::-1], f"Letters: {spelled}.", "Now from the end.")
    if kind < 0.7:
        text = pick(rng, ("How many letters are in {}?", "How many letters does {} have?", "Count the letters in {}."))
        return Exchange(soften(rng, text.format(word)), f"{word} has {len(word)} letters.", f"Letters: {spelled}.")
    if kind < 0.85:
        text = pick(rng, ("Write {} in upper case.", "Make {} uppercase.", "Convert {} to capital letters."))
        return Exchange(soften(rng, text.format(word)), word.upper(), "Write it in capital letters.")
    which, letter = pick(rng, (("first", word[0]), ("last", word[-1])))
    text = pick(rng, ("What is the {} letter of {}?", "Give me the {} letter of {}.")).format(which, word)
    return Exchange(soften(rng, text), f"The {which} letter of {word} is {letter}.", f"Letters: {spelled}.")


def lists(rng: Random) -> Exchange:
    """Count, or say the days, the months, the alphabet or what comes next."""
    kind = rng.random()
    if kind < 0.4:
        start = 1 if maybe(rng, 0.3) else rng.randint(0, 9)
        stop = start + rng.randint(1, 11)
        if start == 1 and maybe(rng, 0.7):
            text = pick(rng, ("Count to {}.", "Count up to {}.", "Can you count to {}?")).format(stop)
            answer = ", ".join(str(n) for n in range(1, stop + 1))
            return Exchange(soften(rng, text), answer, f"Start at 1 and stop at {stop}.")
        text = pick(rng, ("Count from {} to {}.", "Count {} to {}.", "List the numbers from {} to {}."))
        answer = ", ".join(str(n) for n in range(start, stop + 1))
        return Exchange(soften(rng, text.format(start, stop)), answer, f"Start at {start} and stop at {stop}.")
    if kind < 0.6:
        pool, name = pick(rng, ((words.DAYS, "day"), (words.MONTHS, "month")))
        index = rng.randrange(len(pool))
        step, word = pick(rng, ((1, "after"), (-1, "before")))
        text = pick(rng, ("What {0} comes {1} {2}?", "Which {0} is {1} {2}?")).format(name, word, pool[index])
        return Exchange(soften(rng, text), pool[(index + step) % len(pool)], f"The {name} {word} {pool[index]}.")
    if kind < 0.75:
        number = rng.randint(0, 99)
        step, word = pick(rng, ((1, "after"), (-1, "before")))
        text = pick(rng, ("What number comes {} {}?", "Which number is {} {}?")).format(word, number + 1)
        return Exchange(soften(rng, text), str(number + 1 + step), f"The number {word} {number + 1}.")
    if kind < 0.85:
        a, b = rng.randint(0, 99), rng.randint(100, 199) - 100
        text = f"Which is {pick(rng, ('bigger', 'larger'))}, {a} or {b}?"
        return Exchange(soften(rng, text), str(max(a, b)), f"Compare {a} and {b}.")
    text, answer = pick(rng, (
        ("List the days of the week.", ", ".join(words.DAYS)), ("Name the days of the week.", ", ".join(words.DAYS)),
        ("List the months.", ", ".join(words.MONTHS)), ("Name the months of the year.", ", ".join(words.MONTHS)),
        ("Say the alphabet.", " ".join("abcdefghijklmnopqrstuvwxyz")),
        ("Write the alphabet.", " ".join("abcdefghijklmnopqrstuvwxyz")), ("Name three colors.", "red, green, blue"),
        ("Name three animals.", "cat, dog, horse"), ("Name three fruits.", "apple, pear, banana"),
    ))  # fmt: skip
    return Exchange(soften(rng, text), answer, "Say the list.")


def compact(value: object) -> str:
    """Write JSON as the model should: one line, no spaces, no escapes of ordinary characters."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


_FIELDS: tuple[tuple[str, Any], ...] = (
    ("name", words.NAMES), ("city", words.CITIES), ("color", words.COLORS), ("animal", words.ANIMALS),
    ("food", words.FOODS), ("item", words.THINGS), ("day", words.DAYS), ("month", words.MONTHS),
    ("language", words.LANGUAGES), ("age", (1, 99)), ("count", (0, 20)), ("price", (1, 500)), ("size", (1, 99)),
    ("year", (1990, 2035)), ("id", (1, 9999)), ("active", (True, False)), ("ready", (True, False)),
)  # fmt: skip


def _object(rng: Random, vocabulary: Sequence[str]) -> dict[str, Any]:
    chosen = rng.sample(_FIELDS, rng.randint(1, 4))
    result: dict[str, Any] = {}
    for key, pool in chosen:
        is_range = len(pool) == 2 and not isinstance(pool[0], bool) and isinstance(pool[0], int)
        result[key] = rng.randint(*pool) if is_range else pick(rng, pool)
    if maybe(rng, 0.35):
        result[any_word(rng, vocabulary).lower()] = pick(rng, (any_word(rng, vocabulary), rng.randint(0, 999)))
    return result


def spoken(value: object) -> str:
    """Write a value as a user would: `true`, `17`, `red, green and blue`."""
    if isinstance(value, list):
        return join([str(item) for item in value])
    return str(value).lower() if isinstance(value, bool) else str(value)


def join(parts: list[str]) -> str:
    """Join words with commas and a last `and`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


_JSON_ASKS = (
    "Write a JSON object with {}.", "Give me JSON with {}.", "Make a JSON object with {}.", "Return JSON: {}.",
    "Create a JSON object with {}.", "I need a JSON object with {}.", "Output JSON with {}.", "As JSON: {}",
    "Please write JSON with {}.", "Generate a JSON object: {}.", "Answer in JSON with {}.",
)  # fmt: skip


def json_object(rng: Random, vocabulary: Sequence[str]) -> Exchange:
    """Write the fields that the user names as one JSON object, or a JSON list of words."""
    if maybe(rng, 0.15):
        items = [any_word(rng, vocabulary) for _ in range(rng.randint(2, 5))]
        text = pick(rng, ("Write a JSON list of {}.", "Make a JSON array with {}.", "Give me {} as a JSON list."))
        return Exchange(text.format(join(items)), compact(items), "The user wants a JSON list.")
    value = _object(rng, vocabulary)
    form = pick(rng, ("{} {}", "{} {}", "{}: {}", "{}={}", '{} "{}"', "{} set to {}", "{} = {}"))
    parts = [form.format(key, spoken(item)) for key, item in value.items()]
    text = pick(rng, _JSON_ASKS).format(join(parts))
    system = "" if maybe(rng, 0.9) else pick(rng, ("Answer only with JSON.", "Reply in JSON.", "Always write JSON."))
    keys = ", ".join(value)
    return Exchange(text, compact(value), "The user wants a JSON object.", f"The keys are {keys}.", system=system)


def structured(rng: Random, vocabulary: Sequence[str]) -> tuple[Exchange, dict[str, Any]]:
    """Return a sentence and the JSON that a response schema asks to extract from it."""
    value = _object(rng, vocabulary)
    parts = [f"{key} is {spoken(item)}" for key, item in value.items()]
    kinds = {bool: "boolean", int: "integer", str: "string"}
    properties = {key: {"type": kinds[type(item)]} for key, item in value.items()}
    schema: dict[str, Any] = {"type": "object", "properties": properties, "required": list(value)}
    if maybe(rng, 0.5):
        schema["additionalProperties"] = False
    name = pick(rng, ("answer", "result", "person", "item", "output", "record", "response", words.pseudo_word(rng)))
    text = pick(rng, ("The {}.", "Extract: {}.", "Here is the data: {}.", "Fill in the form: {}.")).format(join(parts))
    exchange = Exchange(text, compact(value), "Fill in the response format.", "Use the keys of the schema.")
    return exchange, {"name": name, "schema": schema}


_VERSE_ASKS = (
    "Write some Shakespeare.", "Write a few lines like Shakespeare.", "Give me a verse.", "Write a poem.",
    "Tell me a story.", "Write a short poem.", "Recite something.", "Write something in the style of Shakespeare.",
    "Quote Shakespeare.", "Speak like Shakespeare.", "Write a scene.", "Perform a monologue.", "Write a line of verse.",
)  # fmt: skip


def verse(rng: Random, speeches: Sequence[str]) -> Exchange:
    """Answer with a short speech of the training text."""
    text = soften(rng, pick(rng, _VERSE_ASKS))
    if maybe(rng, 0.4):
        kind = pick(rng, ("poem", "short poem", "haiku", "story", "short story", "song", "sonnet", "verse", "tale"))
        text = f"{pick(rng, ('Write', 'Tell me', 'Give me', 'Please write'))} a {kind}"
        text += pick(rng, (".", "", f" about {pick(rng, words.THINGS)}", f" about the {pick(rng, words.THINGS)}."))
    return Exchange(text, pick(rng, speeches), "The user wants verse. Write a few lines.")
