"""How a variable's text is really read: by NCCL, Gloo, PyTorch, UCX and Ray, each with its own traps.

Knows: parsing rules, and for a text what is wrong with it and what to write instead. Refuses to know: which variable
has which kind (`catalogue`). Pure.

NCCL reads integers with `strtoll` in base 0 and never looks at what follows the digits, so a word is zero and a typo
is silence; lists are prefixes unless they begin with `=`; Gloo's names are exact; Ray's C++ numbers must parse whole,
or the process dies before its first message.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

_BOOL_WORDS = {"true": 1, "yes": 1, "on": 1, "t": 1, "y": 1, "false": 0, "no": 0, "off": 0, "f": 0, "n": 0}
_STRTOLL = re.compile(r"\s*([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_BINARY_SUFFIX = re.compile(r"\s*([KMG](?!\w)|[kmgKMG](?=i?[bB]))(?:i?[bB])?")
_BINARY_STEPS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_COMMENT = re.compile(r"\s#")
_LEVEL_DIGITS = ("LOC", "PIX", "PXB", "PHB", "SYS", "SYS")


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one value. `better` is a value to write instead, None when only the user can know it."""

    code: str
    message: str
    better: str | None = None


class Kind(Protocol):
    """How one family of values is read."""

    def problems(self, text: str) -> list[Problem]:
        """List what is wrong with a text; empty when the reader takes it for what it says."""

    def describe(self) -> str:
        """Say in a few words what is legal."""

    @property
    def examples(self) -> tuple[str, str]:
        """A legal and an illegal text."""


def _without_comment(text: str) -> str:
    """Return what its writer meant by a value: a comment behind it reaches every reader as part of the value."""
    return _COMMENT.split(text, maxsplit=1)[0].strip()


def _listed(body: str) -> list[str]:
    """Return the names that were meant, whatever separates them and whatever comment follows."""
    return _without_comment(body).replace(",", " ").split()


def _with_comment_named(cause: str, text: str) -> str:
    return f"{cause}; a comment is part of the value too" if _COMMENT.search(text) else cause


def read_nccl_int(text: str) -> tuple[int | None, str]:
    """Return the number that NCCL makes of a text, None for "the default", and the text it never looked at."""
    match = _STRTOLL.match(text)
    if match is None:
        return (0 if text.strip() else None), text
    digits = match[2]
    base = 16 if digits[:2].lower() == "0x" else 8 if digits.startswith("0") and len(digits) > 1 else 10
    number = int(digits, base) * (-1 if match[1] == "-" else 1)
    if not -(1 << 63) <= number < 1 << 63:
        return None, text[match.end() :]
    return number, text[match.end() :]


@dataclass(frozen=True, slots=True)
class NcclInt:
    """An integer of NCCL. `special` names values outside the range that have a meaning of their own."""

    low: int | None = None
    high: int | None = None
    special: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))

    def problems(self, text: str) -> list[Problem]:
        if not text.strip():
            return [Problem("empty-value", "an empty value means the default; leave the variable out")]
        number, rest = read_nccl_int(text)
        word = text.strip().lower()
        if word in _BOOL_WORDS:
            return [Problem("bool-word", f"NCCL reads '{text}' as 0", str(_BOOL_WORDS[word]))]
        if rest == text:
            return [Problem("trailing-text", f"NCCL reads '{text}' as 0: it is no number")]
        found = []
        if rest.strip():
            found.append(
                Problem("trailing-text", f"NCCL reads '{text}' as {number} and ignores the rest", self._meant(text))
            )
        if number is None:
            found.append(Problem("out-of-range", "the number overflows 64 bits, NCCL takes its default"))
            return found
        if re.match(r"\s*[+-]?0[0-7]+", text) and not rest.strip():
            found.append(Problem("octal", f"a leading zero is octal: NCCL reads '{text}' as {number}", str(number)))
        if not self._is_legal(number):
            found.append(Problem("out-of-range", f"{number} is not {self.describe()}"))
        return found

    def _meant(self, text: str) -> str | None:
        """Return the number that a text with something behind its digits stands for, None where it may be another."""
        clean = _without_comment(text)
        if re.fullmatch(r"0[0-9]+", clean):
            return str(int(clean))
        number, rest = read_nccl_int(clean)
        if number is None or re.match(r"[.0-9]|e[+-]?[0-9]", rest, re.IGNORECASE):
            return None
        if (suffix := _BINARY_SUFFIX.fullmatch(rest)) is not None:
            number *= _BINARY_STEPS[suffix[1].upper()]
            return str(number) if self._is_legal(number) else None
        # A small letter alone may also be minutes.
        return None if rest.strip() in ("k", "m", "g") else str(number)

    def _is_legal(self, number: int) -> bool:
        if number in self.special:
            return True
        return (self.low is None or number >= self.low) and (self.high is None or number <= self.high)

    def describe(self) -> str:
        if self.low is None and self.high is None:
            span = "an integer"
        elif self.high is None:
            span = f"an integer >= {self.low}"
        else:
            span = f"an integer {self.low}..{self.high}"
        notes = [f"{value} {meaning}" for value, meaning in sorted(self.special.items())]
        return ", ".join([span, *notes])

    @property
    def examples(self) -> tuple[str, str]:
        return str(self.low if self.low is not None else 1), "true"


@dataclass(frozen=True, slots=True)
class Level:
    """A distance word of NCCL: exact, upper case. A digit works but means a different word in every release."""

    words: tuple[str, ...]
    is_prefix_match: bool = False
    """`NCCL_NET_MERGE_LEVEL` matches prefixes, and takes LOC for whatever it does not know."""

    def problems(self, text: str) -> list[Problem]:
        if text in self.words:
            return []
        if not text:
            return [Problem("empty-value", "an empty value is ignored; leave the variable out")]
        if self.is_prefix_match:
            if any(text.startswith(word) for word in self.words):
                return []
            return [Problem("level-word", f"'{text}' is read as LOC: no fusion of NICs", self._upper(text))]
        if text[0].isdigit():
            word = _LEVEL_DIGITS[min(int(text[0]), 5)]
            return [Problem("level-int", f"'{text}' means {word}", word)]
        return [Problem("level-word", f"'{text}' is not understood and has no effect", self._upper(text))]

    def _upper(self, text: str) -> str | None:
        word = _without_comment(text).upper()
        return word if word in self.words else None

    def describe(self) -> str:
        return " ".join(self.words)

    @property
    def examples(self) -> tuple[str, str]:
        return self.words[0], "sys"


@dataclass(frozen=True, slots=True)
class Names:
    """A list of interfaces or HCAs as NCCL reads it: optional `^`, then optional `=`, then names without spaces."""

    thing: str
    limit: int
    has_ports: bool = False

    def problems(self, text: str) -> list[Problem]:
        if not text:
            return [Problem("empty-value", "an empty value is ignored; leave the variable out")]
        if text.startswith("=^"):
            clean = "^=" + ",".join(_listed(text[2:]))
            return [Problem("list-order", "'^' comes before '=': this list matches nothing", clean)]
        body = text.removeprefix("^").removeprefix("=")
        clean = ",".join(_listed(body))
        meant = [name.strip() for name in _without_comment(body).split(",")]
        found = []
        if any(ch.isspace() for ch in body):
            cause = _with_comment_named("spaces are part of a name, so it matches nothing", text)
            lead = text[: len(text) - len(body)]
            found.append(Problem("list-space", cause, lead + clean if clean else None))
        if len(text) == 1 and not self.has_ports:
            found.append(Problem("out-of-range", "a value of one character is ignored"))
        if len(meant) > self.limit:
            found.append(Problem("out-of-range", f"{len(meant)} names, NCCL takes {self.limit}"))
        if self.has_ports and any(not _is_hca_token(name) for name in meant):
            found.append(Problem("out-of-range", f"each name is {self.describe()}"))
        if not text.startswith(("^", "=")):
            found.append(
                Problem("list-prefix", f"matches every {self.thing} that begins so", f"={clean}" if clean else None)
            )
        return found

    def names(self, text: str) -> tuple[str, ...]:
        """The bare names of an including list, empty for an excluding one."""
        if text.startswith("^"):
            return ()
        return tuple(name.strip().partition(":")[0] for name in text.removeprefix("=").split(",") if name.strip())

    def describe(self) -> str:
        form = "name[:port[:rail[:plane]]]" if self.has_ports else "name"
        return f"[^][=]{form},... at most {self.limit}"

    @property
    def examples(self) -> tuple[str, str]:
        return ("=mlx5_0:1", "=^mlx5_0") if self.has_ports else ("=eth0", "=^eth0")


def _is_hca_token(token: str) -> bool:
    name, *numbers = token.split(":")
    return bool(name) and len(numbers) <= 3 and all(number.isdigit() for number in numbers)


@dataclass(frozen=True, slots=True)
class GlooNames:
    """Gloo's interface list: exact names, no pattern, no space."""

    def problems(self, text: str) -> list[Problem]:
        if not text:
            return [Problem("empty-value", "an empty value is ignored; leave the variable out")]
        if text.startswith(("=", "^")):
            meant = ",".join(_listed(text.lstrip("="))) if text.startswith("=") else None
            return [Problem("gloo-pattern", "Gloo takes exact names, no '=' and no '^'", meant)]
        if any(ch.isspace() for ch in text) or not all(text.split(",")):
            cause = _with_comment_named("spaces are part of a name for Gloo", text)
            return [Problem("gloo-pattern", cause, ",".join(_listed(text)) or None)]
        if len(text) == 1:
            return [Problem("gloo-pattern", "Gloo ignores a value of one character")]
        return []

    def names(self, text: str) -> tuple[str, ...]:
        return tuple(name.strip() for name in text.split(",") if name.strip())

    def describe(self) -> str:
        return "exact names, comma-separated"

    @property
    def examples(self) -> tuple[str, str]:
        return "eth0", "=eth0"


@dataclass(frozen=True, slots=True)
class Words:
    """One word of a list. `is_open`: other words are legal too (a plugin's name)."""

    words: tuple[str, ...]
    is_case_sensitive: bool = True
    is_open: bool = False
    ignored_code: str = "level-word"

    def problems(self, text: str) -> list[Problem]:
        if not text:
            return [Problem("empty-value", "an empty value is not the same as none; leave the variable out")]
        if text in self.words or (not self.is_case_sensitive and text.lower() in [word.lower() for word in self.words]):
            return []
        if self.is_open and not any(ch.isspace() for ch in text):
            return []
        meant = _without_comment(text).lower()
        same = next((word for word in self.words if word.lower() == meant), None)
        return [Problem(self.ignored_code, f"'{text}' is none of {' '.join(self.words)}", same)]

    def describe(self) -> str:
        return " ".join(self.words) + (" or a name" if self.is_open else "")

    @property
    def examples(self) -> tuple[str, str]:
        return self.words[0], "no such" if self.is_open else "nonsense"


@dataclass(frozen=True, slots=True)
class WordList:
    """A list of words after optional `^` and, per part, an optional `name:` (NCCL_ALGO, NCCL_DEBUG_SUBSYS)."""

    words: tuple[str, ...]
    is_case_sensitive: bool = False

    def problems(self, text: str) -> list[Problem]:
        if not text:
            return [Problem("empty-value", "an empty value is ignored; leave the variable out")]
        known = {word.lower() for word in self.words}
        tokens = [
            token
            for part in text.split(";")
            for token in part.rpartition(":")[2].removeprefix("^").removeprefix("=").split(",")
        ]
        wrong = [token for token in tokens if token.lower() not in known]
        return [Problem("out-of-range", f"'{wrong[0]}' is none of {' '.join(self.words)}")] if wrong else []

    def describe(self) -> str:
        return "[^]" + "|".join(self.words)

    @property
    def examples(self) -> tuple[str, str]:
        return self.words[0], "nonsense"


@dataclass(frozen=True, slots=True)
class Network:
    """`address/prefix`; without the slash NCCL ignores it."""

    def problems(self, text: str) -> list[Problem]:
        try:
            ipaddress.ip_network(text, strict=False)
        except ValueError:
            return [Problem("out-of-range", f"'{text}' is no network address/prefix")]
        if "/" not in text:
            return [Problem("out-of-range", "without '/prefix' NCCL ignores it", f"{text}/24")]
        return []

    def describe(self) -> str:
        return "address/prefix"

    @property
    def examples(self) -> tuple[str, str]:
        return "192.168.100.0/24", "192.168.100.0"


@dataclass(frozen=True, slots=True)
class Pattern:
    """A text of a given form, which its reader refuses or ignores otherwise."""

    form: str
    regex: str
    good: str
    bad: str
    code: str = "out-of-range"

    def problems(self, text: str) -> list[Problem]:
        if re.fullmatch(self.regex, text):
            return []
        if not text:
            return [Problem("empty-value", "an empty value is not the same as none; leave the variable out")]
        return [Problem(self.code, f"'{text}' is not {self.form}")]

    def describe(self) -> str:
        return self.form

    @property
    def examples(self) -> tuple[str, str]:
        return self.good, self.bad


@dataclass(frozen=True, slots=True)
class Text:
    """Any text that is not empty."""

    form: str = "text"

    def problems(self, text: str) -> list[Problem]:
        return [] if text else [Problem("empty-value", "an empty value is not the same as none; leave it out")]

    def describe(self) -> str:
        return self.form

    @property
    def examples(self) -> tuple[str, str]:
        return "something", ""


@dataclass(frozen=True, slots=True)
class TorchValue:
    """PyTorch's integers and bools: anything else raises when a process group is made."""

    is_bool: bool = False
    low: int | None = None
    high: int | None = None

    def problems(self, text: str) -> list[Problem]:
        if self.is_bool and text.lower() in ("y", "yes", "1", "t", "true", "n", "no", "0", "f", "false"):
            return []
        if not self.is_bool and re.fullmatch(r"[+-]?\d+", text):
            number = int(text)
            if (self.low is None or number >= self.low) and (self.high is None or number <= self.high):
                return []
        return [Problem("out-of-range", f"PyTorch raises when it makes a group: '{text}' is not {self.describe()}")]

    def describe(self) -> str:
        if self.is_bool:
            return "true or false"
        if self.low is None:
            return "an integer"
        return f"an integer {self.low}..{self.high}" if self.high is not None else f"an integer >= {self.low}"

    @property
    def examples(self) -> tuple[str, str]:
        return ("1" if self.is_bool else str(self.low or 0)), "maybe"


@dataclass(frozen=True, slots=True)
class RayNumber:
    """A number of Ray's C++ code: parsed whole, or the process dies without a message (exit 139)."""

    is_float: bool = False

    def problems(self, text: str) -> list[Problem]:
        form = r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?" if self.is_float else r"[+-]?\d+"
        if re.fullmatch(form, text):
            return []
        return [Problem("ray-parse", f"'{text}' is not {self.describe()}: every Ray process ends with exit 139")]

    def describe(self) -> str:
        return "a number" if self.is_float else "a whole number"

    @property
    def examples(self) -> tuple[str, str]:
        return ("0.95" if self.is_float else "250"), "abc"


@dataclass(frozen=True, slots=True)
class RayBool:
    """A bool of Ray's C++ code: `true` and `1` are true, everything else is false."""

    def problems(self, text: str) -> list[Problem]:
        if text.lower() in ("true", "false", "1", "0"):
            return []
        wanted = _BOOL_WORDS.get(text.lower())
        better = None if wanted is None else str(wanted)
        return [Problem("ray-parse", f"Ray reads '{text}' as false: only 'true' and '1' are true", better)]

    def describe(self) -> str:
        return "true or false"

    @property
    def examples(self) -> tuple[str, str]:
        return "1", "yes"


@dataclass(frozen=True, slots=True)
class DebugFile:
    """A path for NCCL's log: without `%h` and `%p` the ranks overwrite each other's file."""

    def problems(self, text: str) -> list[Problem]:
        if not text:
            return [Problem("empty-value", "an empty value is ignored; leave the variable out")]
        if "%h" in text and "%p" in text:
            return []
        return [Problem("debug-left-on", "without %h and %p the ranks overwrite each other's lines", text + ".%h.%p")]

    def describe(self) -> str:
        return "a path with %h (host) and %p (pid)"

    @property
    def examples(self) -> tuple[str, str]:
        return "/tmp/nccl.%h.%p", "/tmp/nccl.log"
