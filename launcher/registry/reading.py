"""One raw value -> one typed value, by the key's spec: the same for YAML, variables and flags.

Knows: what each `Kind` accepts, its range, and the message when it does not. Refuses to know: which keys exist where
(the pydantic models of `launcher.registry.schema`), layers, files.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from launcher.registry.document import Scalar
from launcher.registry.keys import KeySpec, Kind
from launcher.registry.suggest import did_you_mean
from launcher.registry.values import AUTO, BadValue, SecretRef, parse_count, parse_duration, parse_size, show_text

MAX_TEXT = 4096

_INTEGER = re.compile(r"[-+]?[0-9]{1,20}", re.ASCII)
_NUMBER = re.compile(r"[-+]?([0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20})([eE][-+]?[0-9]{1,3})?", re.ASCII)
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_SYNONYMS = {"gpu": "cuda", "nvidia": "cuda", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_NEARLY_TRUE = frozenset({"on", "yes", "y", "1", "enable", "enabled"})
_NEARLY_FALSE = frozenset({"off", "no", "n", "0", "disable", "disabled"})

_EXPECTED = {
    Kind.TEXT: "text",
    Kind.CHOICE: "one word",
    Kind.BOOLEAN: "true or false",
    Kind.INTEGER: "a whole number",
    Kind.NUMBER: "a number",
    Kind.TOKENS: "a number of tokens",
    Kind.SIZE: "a size such as 4GiB",
    Kind.DURATION: "a duration such as 30s",
    Kind.SECRET: "a secret reference such as ${NAME}",
    Kind.TEXTS: "one text per item",
    Kind.VARIABLES: "a mapping of variables",
    Kind.ADDRESS: "an address such as 192.168.100.1",
    Kind.SUBNET: "a network such as 192.168.100.0/24",
    Kind.PORT_RANGE: "two ports such as [10002, 19999]",
}


def read_scalar(spec: KeySpec, raw: object) -> object:
    """Turn the raw value of `spec` (for a list: one item) into its type.

    Raises: BadValue with the offending text; never shows a secret's.
    """
    if not isinstance(raw, Scalar):
        expected = _EXPECTED[spec.kind]
        raise BadValue("wrong-type", f"expected {expected}, got {describe(raw)}", _hint(spec) or f"write {expected}")
    if spec.kind is not Kind.SECRET:
        raw.check()
    value = _READERS[spec.kind](spec, raw)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_range(spec, value, raw.text)
    return value


def read_port_range(spec: KeySpec, raw: object) -> tuple[int, int]:
    """Read `[first, last]` or `first-last`. Raises: BadValue."""
    expected = _EXPECTED[Kind.PORT_RANGE]
    parts: list[object] = []
    if isinstance(raw, Scalar):
        raw.check()
        parts = [Scalar(text, raw.style, raw.mark) for text in raw.text.split("-")]
    elif isinstance(raw, list):
        parts = raw
    if len(parts) != 2:
        raise BadValue("wrong-type", f"expected {expected}, got {describe(raw)}", f"write {expected}")
    port = replace(spec, kind=Kind.INTEGER)
    first, last = (int(str(read_scalar(port, part))) for part in parts)
    if first > last:
        raise BadValue("out-of-range", f"the first port {first} is above the last, {last}", f"write [{last}, {first}]")
    return first, last


def read_variable(raw: object) -> str:
    """Read the value of an environment variable: any text without NUL. Raises: BadValue."""
    if not isinstance(raw, Scalar):
        raise BadValue("wrong-type", f"expected text, got {describe(raw)}", "a variable holds one text")
    raw.check()
    if re.fullmatch(r"\$\{\w+\}", raw.text, re.ASCII):
        raise BadValue(
            "not-expanded",
            f"{raw.text} is not expanded here",
            "the engine inherits your environment: export the variable and remove this line",
        )
    if "\0" in raw.text or len(raw.text) > MAX_TEXT:
        raise BadValue("bad-text", "the value holds NUL or is too long", f"at most {MAX_TEXT} characters are allowed")
    return raw.text


def describe(raw: object) -> str:
    """Name the shape of a raw value for a message."""
    if isinstance(raw, Scalar):
        return show_text(raw.text)
    if isinstance(raw, dict):
        return "a mapping"
    return "a list" if isinstance(raw, list) else "nothing"


def _check_range(spec: KeySpec, value: float, text: str) -> None:
    is_low = spec.low is not None and (value <= spec.low if spec.is_low_open else value < spec.low)
    if is_low or (spec.high is not None and value > spec.high):
        has_unit = spec.kind in (Kind.INTEGER, Kind.TOKENS) and spec.unit
        unit = f" {spec.unit}" if has_unit else "; 0.9 means 90 percent" if spec.unit == "fraction" else ""
        raise BadValue("out-of-range", f"{show_text(text)} is out of range", f"accepted: {spec.describe_range()}{unit}")


def _hint(spec: KeySpec) -> str:
    accepted = spec.describe_range()
    return f"accepted: {accepted}" if accepted else ""


def _read_text(spec: KeySpec, raw: Scalar) -> str:
    text = raw.text
    if not text.strip() or raw.is_null:
        raise BadValue("wrong-type", "the text is empty", "write a value, or remove the key")
    if len(text) > MAX_TEXT:
        raise BadValue("out-of-range", f"the text has {len(text)} characters", f"at most {MAX_TEXT} are allowed")
    if spec.pattern is not None and re.fullmatch(spec.pattern, text) is None:
        raise BadValue("bad-text", f"{show_text(text)} is not usable here", spec.pattern_hint)
    if not all(ch.isprintable() or ch in "\n\t" for ch in text):
        raise BadValue("bad-text", f"{show_text(text)} holds a control character", "remove it")
    return text


def _read_choice(spec: KeySpec, raw: Scalar) -> str:
    if raw.text in spec.choices:
        return raw.text
    # A synonym says more than a likeness: 'gpu' looks like 'cpu'.
    synonym = _SYNONYMS.get(raw.text.lower())
    guess = f"did you mean '{synonym}'?" if synonym in spec.choices else did_you_mean(raw.text, spec.choices)
    accepted = f"accepted: {', '.join(spec.choices)}"
    hint = f"{guess} ({accepted})" if guess else "; ".join(part for part in (accepted, spec.pattern_hint) if part)
    raise BadValue("unknown-value", f"{show_text(raw.text)} is not accepted", hint)


def _read_boolean(spec: KeySpec, raw: Scalar) -> bool:
    value = _BOOLEANS.get(raw.text) if raw.style != "quoted" else None
    if value is not None:
        return value
    lower = raw.text.lower()
    if raw.style == "quoted" and raw.text in _BOOLEANS:
        hint = "remove the quotes"
    else:
        meant = "true" if lower in _NEARLY_TRUE else "false" if lower in _NEARLY_FALSE else ""
        hint = f"write {meant}" if meant else "write true or false"
    raise BadValue("wrong-type", f"{show_text(raw.text)} is not true or false", hint)


def _read_integer(spec: KeySpec, raw: Scalar) -> int:
    _refuse_quotes(raw, _NUMBER)
    value = _integer(raw.text)
    if value is None:
        raise BadValue("wrong-type", f"{show_text(raw.text)} is not a whole number", _hint(spec))
    if spec.values and value not in spec.values:
        raise BadValue("unknown-value", f"{value} is not accepted", _hint(spec))
    return value


def _integer(text: str) -> int | None:
    if _INTEGER.fullmatch(text):
        digits = text.lstrip("+-")
        # Python and Go read 010 as 10, YAML 1.1 as 8, C as 8.
        return None if len(digits) > 1 and digits[0] == "0" else int(text)
    if ("e" in text or "E" in text) and _NUMBER.fullmatch(text):
        number = float(text)
        if math.isfinite(number) and number == int(number) and abs(number) <= 2**53:
            return int(number)
    return None


def _read_number(spec: KeySpec, raw: Scalar) -> float:
    _refuse_quotes(raw, _NUMBER)
    if _NUMBER.fullmatch(raw.text) and math.isfinite(value := float(raw.text)):
        return value
    hint = _hint(spec)
    if raw.text.endswith("%"):
        hint = "write a fraction: 0.9 means 90 percent"
    raise BadValue("wrong-type", f"{show_text(raw.text)} is not a number", hint)


def _read_tokens(spec: KeySpec, raw: Scalar) -> int | str:
    if raw.text in ("auto", "-1"):
        return AUTO
    return parse_count(raw.text) if (value := _integer(raw.text)) is None else value


def _read_size(spec: KeySpec, raw: Scalar) -> int:
    return parse_size(raw.text) if (value := _integer(raw.text)) is None else value


def _read_address(spec: KeySpec, raw: Scalar) -> str:
    try:
        address = ipaddress.ip_address(raw.text)
    except ValueError:
        raise BadValue(
            "bad-address", f"{show_text(raw.text)} is not an IP address", "write numbers: 192.168.100.1, not a name"
        ) from None
    return str(address)


def _read_subnet(spec: KeySpec, raw: Scalar) -> str:
    hint = "write network/bits, such as 192.168.100.0/24"
    if "/" not in raw.text:
        raise BadValue("bad-address", f"{show_text(raw.text)} is not a network", hint)
    with suppress(ValueError):
        return str(ipaddress.ip_network(raw.text))
    with suppress(ValueError):
        hint = f"write {ipaddress.ip_network(raw.text, strict=False)}"
    raise BadValue("bad-address", f"{show_text(raw.text)} is not a network", hint)


def _read_duration(spec: KeySpec, raw: Scalar) -> float:
    return parse_duration(raw.text)


def _read_secret(spec: KeySpec, raw: Scalar) -> SecretRef:
    if not raw.text:
        raise BadValue("bad-secret", "the secret is empty", "write ${NAME}, or remove the key")
    return SecretRef.parse(raw.text)


def _refuse_quotes(raw: Scalar, shape: re.Pattern[str]) -> None:
    if raw.style == "quoted" and shape.fullmatch(raw.text):
        raise BadValue("wrong-type", f"{show_text(raw.text)} is text, because of the quotes", "remove the quotes")


_READERS: dict[Kind, Callable[[KeySpec, Scalar], object]] = {
    Kind.TEXT: _read_text,
    Kind.TEXTS: _read_text,
    Kind.CHOICE: _read_choice,
    Kind.BOOLEAN: _read_boolean,
    Kind.INTEGER: _read_integer,
    Kind.NUMBER: _read_number,
    Kind.TOKENS: _read_tokens,
    Kind.SIZE: _read_size,
    Kind.DURATION: _read_duration,
    Kind.SECRET: _read_secret,
    Kind.ADDRESS: _read_address,
    Kind.SUBNET: _read_subnet,
}
