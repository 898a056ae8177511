"""What reaches the terminal: no markup, no control characters, at most 80 columns, the same text without colour."""

from __future__ import annotations

import io
import re
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.console import Console, hang, layout_table, visible
from launcher.errors import HlaunchError, Issue


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_error_is_one_line_details_and_a_hint() -> None:
    err = io.StringIO()
    Console(stderr=err).failure(HlaunchError("it broke", hint="fix it", details=["first", "second"]))
    assert err.getvalue() == "error: it broke\n  first\n  second\nhint: fix it\n"


def test_issues_come_before_the_verdict_and_are_counted_when_many() -> None:
    err = io.StringIO()
    issues = [Issue("error", "code", "f.yml", i, 1, "a.b", "bad", "do") for i in range(60)]
    Console(stderr=err).failure(HlaunchError("f.yml has 60 errors", issues=issues))
    lines = err.getvalue().splitlines()
    assert lines[:2] == ["f.yml:0:1: error[code] a.b: bad", "hint: do"]
    assert lines[-2:] == ["… and 10 more", "error: f.yml has 60 errors"]


@pytest.mark.parametrize("text", ["[/red]", "[bold]x[/]", "[link=file:///x]y[/link]", ":smile:", "\\[x]"])
def test_markup_is_text(text: str) -> None:
    for stream in (io.StringIO(), Terminal()):
        Console(stderr=stream, stdout=stream, environ={"TERM": "xterm"}).error(text, hint=text)
        assert stream.getvalue().count(text) == 2


def test_a_terminal_never_obeys_a_value() -> None:
    hostile = "a\x1b[2Jb\rc\x07d\u202ee\x9bf"
    for stream in (io.StringIO(), Terminal()):
        console = Console(stdout=stream, stderr=stream, environ={"NO_COLOR": "1"})
        console.data(hostile)
        console.error(hostile)
        console.table(("A", "B"), [(hostile, hostile)])
        assert not set("\x1b\r\x07\u202e\x9b") & set(stream.getvalue())


def test_colour_changes_no_word() -> None:
    plain, colour = io.StringIO(), Terminal()
    for stream in (plain, colour):
        Console(stderr=stream, environ={"TERM": "xterm"}).error("models.m.port: bad", hint="x" * 300)
    assert "\x1b[" in colour.getvalue()
    assert re.sub(r"\x1b\[[0-9;]*m", "", colour.getvalue()) == plain.getvalue()


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colour_can_be_switched_off(environ: dict[str, str]) -> None:
    stream = Terminal()
    console = Console(stderr=stream, environ=environ)
    console.error("x")
    assert not console.is_live
    assert stream.getvalue() == "error: x\n"


def test_an_ascii_stream_does_not_raise() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(stdout=stream, stderr=stream)
    console.data("naïve … ✓")
    console.table(("NAME",), [("ünïcode",)])
    stream.flush()
    assert b"na?ve" in raw.getvalue()


CELLS = st.text(alphabet="abc -/.", max_size=120)


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=6)))
def test_a_table_fits_and_loses_nothing(rows: list[list[str]]) -> None:
    columns = [f"C{i}" for i in range(len(rows[0]))]
    lines = layout_table(columns, rows, 80)
    assert all(len(line) <= 80 for line in lines)
    assert sorted("".join(lines).replace(" ", "")) == sorted("".join(columns + sum(rows, [])).replace(" ", ""))


@given(st.text())
def test_visible_text_is_printable(text: str) -> None:
    assert visible(text).isprintable()


def test_phases_in_a_pipe_are_plain_lines() -> None:
    err = io.StringIO()
    with Console(stderr=err).phases() as view:
        view.begin("load")
        view.progress("load", 0.5, "weights")
        view.end("load", 1.25, "11 MB")
        view.begin("kv")
    lines = err.getvalue().splitlines()
    assert [line.split() for line in lines] == [["load", "1.25", "s", "11", "MB"]]


def test_phases_on_a_terminal_leave_no_thread_and_a_readable_end() -> None:
    err = Terminal()
    before = threading.active_count()
    with Console(stderr=err, environ={"TERM": "xterm"}).phases() as view:
        for fraction in (None, 0.0, 0.5, 1.0):
            view.progress("load", fraction, "[/red]\x1b[2J")
        view.end("load", 0.5)
    # rich lets its refresh thread notice the end by itself.
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    assert "\x1b[2J" not in err.getvalue()
    assert "load" in err.getvalue()


@pytest.mark.parametrize("width", [40, 80])
@given(words=st.lists(st.text("ab-,.", min_size=1, max_size=30), min_size=1, max_size=30))
def test_a_message_hangs_below_its_label(width: int, words: list[str]) -> None:
    text = "warning: " + " ".join(words)
    first, *rest = hang(text, width)
    assert [word for line in (first, *rest) for word in line.split()] == text.split(), "no word is lost or cut"
    assert all(line.startswith(" " * 9) and line[9] != " " for line in rest)
    if not any(word.startswith("--") for word in words):
        assert all(len(line) <= width for line in (first, *rest))


def test_what_is_to_be_pasted_is_not_cut() -> None:
    command = "hlaunch up model " + " ".join(f"--set key{i}=value" for i in range(9))
    assert hang(f"hint: no such thing here, run: {command}", 80)[-1].endswith(f"run: {command}")
    for line in hang("hint: would fit: " + "  or  ".join(f"--set key-{i}=value" for i in range(9)), 50):
        assert len(line) <= 50
        assert not line.endswith("--set")


def test_only_a_terminal_gets_a_message_in_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = "every word of this is longer than what one line of the terminal has room for"
    for stream, lines in ((Terminal(), 2), (io.StringIO(), 1)):
        console = Console(stderr=stream, environ={"NO_COLOR": "1"})
        for write in (console.warning, console.info, console.error, console.note):
            stream.seek(0)
            stream.truncate()
            write(text)
            written = stream.getvalue().splitlines()
            assert len(written) == lines
            assert " ".join(line.strip() for line in written).endswith(text)
    console = Console(stderr=(stream := Terminal()), environ={"NO_COLOR": "1"})
    console.quote(text)
    assert stream.getvalue() == text + "\n"
