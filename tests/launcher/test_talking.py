"""What `chat` and `bench` find out before they start anything, and how a chat ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.benchmark.load import LevelResult, RequestTimes
from launcher.benchmark.report import figures, percentile
from launcher.client import Client, Event
from launcher.commands.bench import check_results
from launcher.commands.chat import Conversation
from launcher.console import Console
from launcher.errors import PreflightError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, *args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "HLAUNCH_STATE_DIR": str(tmp_path / "state"), "NO_COLOR": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *args], env=environ, cwd=ROOT, input=stdin, capture_output=True
    )
    assert not (tmp_path / "state/instances").exists(), "nothing was started"
    return subprocess.CompletedProcess(args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.parametrize(
    ("args", "stdin", "cause"),
    [
        (("-m", " "), b"", "error: the message is empty"),
        ((), b"\n", "error: the message is empty"),
        ((), b"\xff\xfe", "error: the message is no UTF-8 text"),
        (("-m", "x", "--url", "http://h:99999"), b"", "error: 'http://h:99999' is no address"),
        (("-m", "x", "--url", "http://[h"), b"", "error: 'http://[h' is no address"),
        (("-m", "x", "--url", "ftp://h"), b"", "error: 'ftp://h' is no http:// or https:// address"),
    ],
)
def test_chat_refuses_what_it_cannot_say_or_reach(
    tmp_path: Path, args: tuple[str, ...], stdin: bytes, cause: str
) -> None:
    done = run(tmp_path, "chat", "tiny-oss", *args, stdin=stdin)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(cause)


def test_bench_checks_where_its_results_go_before_it_measures(tmp_path: Path) -> None:
    for option in ("--out", "--plot"):
        done = run(tmp_path, "bench", "tiny-oss", option, str(tmp_path / "none/x.png"))
        assert done.returncode == 5
        assert done.stderr.startswith(f"error: {tmp_path}/none/x.png: cannot be written: No such file")
    with pytest.raises(UsageError, match="is a PNG"):
        check_results(None, tmp_path / "x.zzz")
    with pytest.raises(PreflightError, match="Is a directory"):
        check_results(tmp_path, None)
    kept = tmp_path / "kept.json"
    kept.write_text("old")
    check_results(kept, tmp_path / "new.png")
    assert kept.read_text() == "old"
    assert not (tmp_path / "new.png").exists()


def test_a_key_that_no_header_can_carry_is_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        Client("http://h", "canary\nx")
    assert "canary" not in str(caught.value)
    assert Client("http://h", "key\n")._headers["Authorization"] == "Bearer key"


class OneReply(Client):
    """Streams one reply; `None` in it is a Ctrl-C."""

    def __init__(self, pieces: list[str | None]) -> None:
        super().__init__("http://h")
        self._pieces = pieces

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Event]:
        for piece in self._pieces:
            if piece is None:
                raise KeyboardInterrupt
            yield Event(0.0, {"choices": [{"delta": {"content": piece}}]})


def test_ctrl_c_cuts_a_reply_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    talk = Conversation(OneReply(["Good ", None, "day"]), Console(is_plain=True, environ={}), "m", {}, None)
    assert not talk.ask("Hello")
    assert [message["content"] for message in talk.history] == ["Hello", "Good  …"]
    assert capsys.readouterr().out == "Good \n"
    talk.client = OneReply(["Good ", "day"])
    assert talk.ask("Again")


def test_figures_of_a_level_are_those_of_its_requests() -> None:
    requests = [RequestTimes(0.010, 0.1, [0.001, 0.003], 3), RequestTimes(0.030, 0.2, [0.002], 2)]
    found = figures(LevelResult(2, 0.5, requests, ["late"]))
    assert (found.requests, found.errors) == (2, 1)
    assert found.output_tokens_per_second == pytest.approx(10.0)
    assert found.ttft_ms_p50 == pytest.approx(20.0)
    assert found.itl_ms_p50 == pytest.approx(2.0)
    assert found.itl_ms_p99 == pytest.approx(2.98)
    assert (percentile([], 99), percentile([4.0], 99)) == (0.0, 4.0)
