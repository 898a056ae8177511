"""Did-you-mean for keys, values and names. Pure; refuses to know what the words are for."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# get_close_matches is quadratic in length: a hostile 1 MiB key must not stall the error message.
_MAX_WORD = 100
_MAX_COMPARED = 1000


def close_names(word: str, known: Iterable[str]) -> list[str]:
    """Return up to three known names that are close to `word`, best first, whatever its case and separators."""
    if len(word) > _MAX_WORD:
        return []
    by_form: dict[str, str] = {}
    for name in known:
        by_form.setdefault(_form(name), name)
    written, forms = _form(word), list(by_form)
    if len(forms) > _MAX_COMPARED:
        # Of very many names only those are worth the time that begin alike.
        forms = [form for form in forms if form[:2] == written[:2]][:_MAX_COMPARED]
    close = get_close_matches(written, forms, n=3, cutoff=0.6)
    # Two letters that changed places are the commonest slip, and in a short word count as two wrong ones.
    return [by_form[form] for form in close or [form for form in forms if sorted(form) == sorted(written)][:3]]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x' or 'y'?`, or nothing when no name is close."""
    names = close_names(word, known)
    return f"did you mean {' or '.join(repr(name) for name in names)}?" if names else ""


class Suggester:
    """`did_you_mean` for one file: after so many wrong words nobody reads further guesses, and each costs time."""

    LIMIT = 20

    def __init__(self) -> None:
        self._left = self.LIMIT

    def __call__(self, word: str, known: Iterable[str]) -> str:
        """Return `did you mean …?`, or nothing when no name is close or the limit is reached."""
        self._left -= 1
        return did_you_mean(word, known) if self._left >= 0 else ""


def _form(name: str) -> str:
    return name.lower().replace("_", "-").strip("-")
