"""Quantities and secrets: what is read, what is refused, and that writing and reading agree."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.registry import (
    BadValue,
    SecretRef,
    format_duration,
    format_size,
    holds_secret,
    parse_count,
    parse_duration,
    parse_size,
    redacted,
)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4GiB", 4 << 30),
        ("4 GiB", 4 << 30),
        ("4gib", 4 << 30),
        ("1.5KiB", 1536),
        ("1.31MiB", 1373634),
        ("500MB", 500_000_000),
        ("0", 0),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "tokens"), [("131072", 131072), ("128k", 131072), ("128K", 131072), ("1m", 1 << 20), ("1.5k", 1536)]
)
def test_counts(text: str, tokens: int) -> None:
    assert parse_count(text) == tokens


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("900s", 900.0), ("15m", 900.0), ("1h", 3600.0), ("500ms", 0.5), ("2.5", 2.5), ("1d", 86400.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", " ", "4G", "GiB", "-1GiB", "1e3", "4 G iB", "1,5GiB", "٤GiB", "4GiBs", "9" * 30])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(BadValue) as caught:
        parse_size(text)
    assert caught.value.hint


@given(st.integers(0, 1 << 50))
def test_a_whole_size_survives_writing_and_reading(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes)) == num_bytes


@given(st.integers(0, 10**7))
def test_a_duration_survives_writing_and_reading(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=1e-5)


@given(st.text(max_size=40))
def test_any_text_gives_a_value_or_one_error(text: str) -> None:
    for parse in (parse_size, parse_count, parse_duration):
        message = ""
        try:
            assert parse(text) >= 0
        except BadValue as error:
            message = error.message
        assert "\n" not in message


def test_a_secret_is_read_late_and_never_shown(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("from-file\n")
    assert SecretRef.parse("${API_KEY}").reveal({"API_KEY": "from-env"}) == "from-env"
    assert SecretRef.parse(f"file:{key_file}").reveal({}) == "from-file"
    literal = SecretRef.parse("sk-canary")
    assert literal.reveal({}) == "sk-canary"
    assert "canary" not in f"{literal} {literal!r}"


@pytest.mark.parametrize("text", ["${API_KEY}", "file:/nowhere/at/all"])
def test_a_secret_that_is_not_there_names_its_place(text: str) -> None:
    with pytest.raises(BadValue, match="API_KEY|nowhere") as caught:
        SecretRef.parse(text).reveal({})
    assert caught.value.code == "secret-unset"


@pytest.mark.parametrize(
    ("name", "shown"),
    [("HF_TOKEN", "<hidden>"), ("OPENAI_API_KEY", "<hidden>"), ("DB_PASSWORD", "<hidden>"), ("NCCL_DEBUG", "value")],
)
def test_secret_variables_are_hidden_whole(name: str, shown: str) -> None:
    assert redacted(name, "value") == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("postgres://u:canary@h/db", "postgres://<hidden>@h/db"),
        ("http://u:can@ary@proxy:3128", "http://<hidden>@proxy:3128"),
        ("redis://:canary@h:6379/0", "redis://<hidden>@h:6379/0"),
        ("https://canary@github.com/a/b", "https://<hidden>@github.com/a/b"),
        ("http://a:canary@h,http://b:canary@i/x", "http://<hidden>@h,http://<hidden>@i/x"),
        ("ssh://git@github.com/a", "ssh://git@github.com/a"),
        ("http://h:80/a@b", "http://h:80/a@b"),
        ("tcp://h:80", "tcp://h:80"),
        ("user@host:/path", "user@host:/path"),
    ],
)
def test_the_login_of_a_url_is_hidden(value: str, shown: str) -> None:
    assert redacted("HTTPS_PROXY", value) == shown
    assert holds_secret("HTTPS_PROXY", value) is (shown != value)
