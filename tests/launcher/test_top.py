"""`hlaunch top`: metrics read strictly, rates and quantiles against arithmetic, screens, and servers that go away."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from launcher_support import Launcher, wait_for
from metrics_text import SGLANG, ranks, vllm
from stub_server import Stub, serving

from launcher.client import Client
from launcher.console import Console, clip
from launcher.errors import EngineFailed
from launcher.top import exposition
from launcher.top.exposition import MetricsInvalid, parse
from launcher.top.figures import Figures, Watch, quantile
from launcher.top.rank_view import rank_lines
from launcher.top.reading import NotAModelServer, read
from launcher.top.view import duration, log_header, log_line, number, screen, sparkline
from launcher.top.watching import watch


def served(text: str, **more: str) -> dict[str, tuple[int, bytes]]:
    return {"/metrics": (200, text.encode()), **{path: (200, body.encode()) for path, body in more.items()}}


def pair(before: str, now: str, seconds: float = 2.0) -> Figures:
    state = Watch()
    state.add(100.0, read(parse(before)))
    return state.add(100.0 + seconds, read(parse(now)))


def test_samples_are_read_with_labels_escapes_and_times() -> None:
    found = parse(
        'a:b_total{x="1",y="q\\"\\\\\\nend",} 1.5e+3 1395066363000\r\n'
        '# TYPE z counter\n\nz -Inf\nw{} NaN\nv{x="{}#"} .5'
    )
    assert (found["a:b_total"][0].labels, found["a:b_total"][0].value) == ({"x": "1", "y": 'q"\\\nend'}, 1500.0)
    assert found["z"][0].value == -math.inf
    assert math.isnan(found["w"][0].value)
    assert (found["v"][0].labels, found["v"][0].value) == ({"x": "{}#"}, 0.5)
    assert parse('a{x="\u2028"} 1')["a"][0].labels == {"x": "\u2028"}, "only a newline ends a line"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("<html><body>hello</body></html>", 1),
        ("a 1\nb", 2),
        ("a 1\na 2", 2),
        ('a{x="1"} 1\na{x="1"} 1', 2),
        ("a one", 1),
        ("a 1_0", 1),
        ("a 0x10", 1),
        ("a infinity", 1),
        ("a ١", 1),
        ('a{x="1" 1', 1),
        ('a{x="1"y="2"} 1', 1),
        ("a{x=1} 1", 1),
        ('a{x="1",x="2"} 1', 1),
        ('a{9="1"} 1', 1),
        ('a{x="1\n"} 1', 1),
        ("9a 1", 1),
        ("a 1 2 3", 1),
        ("a 1 # {} 2", 1),
        ("a" * (16 << 10) + " 1", 1),
        ("a{" + ",".join(f'l{i}="1"' for i in range(65)) + "} 1", 1),
    ],
)
def test_a_malformed_line_refuses_the_text_and_is_named(text: str, line: int) -> None:
    with pytest.raises(MetricsInvalid) as caught:
        parse(text)
    assert caught.value.line == line
    assert len(str(caught.value)) < 200


def test_a_hostile_text_costs_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.perf_counter()
    half = exposition.MAX_LINE_CHARS // 2 - 10
    for line in (
        'a{x="' + "\\" * half,
        "a{" + '""' * half,
        "a{" + "x" * half + '="',
        "a" + " " * half,
        'a{x="' + '\\"' * half,
    ):
        with pytest.raises(MetricsInvalid):
            parse(line)
    assert time.perf_counter() - began < 1.0
    monkeypatch.setattr(exposition, "MAX_SAMPLES", 10)
    with pytest.raises(MetricsInvalid, match="more than 10 samples"):
        parse("\n".join(f"a{i} 1" for i in range(11)))


def test_rates_are_differences_and_engines_add_up() -> None:
    found = pair(vllm((1000, 500)), vllm((1400, 700), values={"prompt_tokens_total": 4100}))
    assert found.rates["generated_tokens"] == 300.0
    assert found.rates["prompt_tokens"] == 100.0
    values = found.reading.values
    assert (values["running"], values["waiting"], values["kv_usage"]) == (16, 6, 0.25)
    assert (values["preemptions"], values["finished"]) == (4, 14)
    assert [(row.name, found.row_rates[row.name]["generated_tokens"]) for row in found.reading.rows] == [
        ("0", 200.0),
        ("1", 100.0),
    ]
    assert found.reading.models == ("openai/gpt-oss-20b",)
    assert found.history["generated_tokens"] == (300.0,)


def test_ranks_of_one_engine_count_once() -> None:
    found = read(parse(SGLANG))
    assert (found.values["running"], found.values["waiting"], found.values["kv_usage"]) == (6, 1, 0.28)
    assert [row.name for row in found.rows] == ["0 tp 0", "0 tp 1"]
    assert Watch().add(0.0, found).prefix_hit_rate == 0.25
    assert read(parse(SGLANG.replace("sglang:", "sglang_"))) == found


def test_engines_come_in_the_order_of_their_numbers() -> None:
    rows = read(parse(vllm([1.0] * 12))).rows
    assert [row.name for row in rows] == [str(engine) for engine in range(12)]
    # Python reads no number of that many digits, and none is needed.
    long = vllm([1.0]).replace('engine="0"', f'engine="{"9" * 5000}"')
    assert [len(row.name) for row in read(parse(long)).rows] == [5000]


def test_a_restart_is_no_negative_rate() -> None:
    state = Watch()
    state.add(0.0, read(parse(vllm((1000, 500)))))
    state.add(1.0, read(parse(vllm((1100, 500)))))
    again = state.add(2.0, read(parse(vllm((10, 0), values={"prompt_tokens_total": 1.0}))))
    assert (again.rates, again.num_restarts) == ({}, 1)
    after = state.add(3.0, read(parse(vllm((60, 0), values={"prompt_tokens_total": 1.0}))))
    assert after.rates["generated_tokens"] == 50.0
    assert after.history["generated_tokens"] == (100.0, 50.0)


def test_latencies_and_hits_are_over_the_window_and_else_since_the_start() -> None:
    old = vllm((10,), first_token=(100, 0, 0, 0, 0, 0, 0, 0))
    new = vllm(
        (20,),
        first_token=(100, 0, 0, 10, 0, 0, 0, 0),
        values={"prefix_cache_queries_total": 4100, "prefix_cache_hits_total": 1090},
    )
    recent = pair(old, new)
    assert recent.latencies["first_token"].p50 == pytest.approx(0.015)
    assert recent.latencies["first_token"].p99 == pytest.approx(0.0199)
    assert (recent.latencies["first_token"].count, recent.latencies["first_token"].span_seconds) == (10, 2.0)
    assert recent.prefix_hit_rate == pytest.approx(0.9)
    calm = pair(old, old)
    assert (calm.latencies["first_token"].count, calm.latencies["first_token"].span_seconds) == (100, None)
    assert calm.prefix_hit_rate == pytest.approx(0.25)
    assert "first_token" not in pair(vllm((1,)), vllm((2,))).latencies
    # The window slides: what is older than it is forgotten.
    state = Watch()
    state.add(0.0, read(parse(old)))
    for at in range(1, 40):
        found = state.add(float(at), read(parse(new)))
    assert found.latencies["first_token"].span_seconds is None


def test_quantiles_are_linear_in_a_bucket_and_stop_at_the_last_bound() -> None:
    assert quantile({0.1: 10.0, 0.2: 20.0, math.inf: 20.0}, 0.5) == (pytest.approx(0.1), False)
    assert quantile({0.1: 10.0, 0.2: 20.0, math.inf: 20.0}, 0.75) == (pytest.approx(0.15), False)
    assert quantile({0.1: 1.0, math.inf: 100.0}, 0.99) == (0.1, True)
    assert quantile({0.1: 0.0, 0.2: 4.0, math.inf: 4.0}, 0.5) == (pytest.approx(0.15), False)
    assert quantile({math.inf: 3.0}, 0.5) == (0.0, True)


def test_a_gauge_that_falls_is_no_restart() -> None:
    state = Watch()
    for at, retracted in enumerate((3, 0)):
        found = state.add(float(at), read(parse(f'{SGLANG}sglang:num_retracted_reqs{{tp_rank="0"}} {retracted}\n')))
    assert (found.num_restarts, found.rates["generated_tokens"]) == (0, 0.0)


def test_other_metrics_are_no_model_server() -> None:
    with pytest.raises(NotAModelServer):
        read(parse("node_load1 0.5\n"))


def test_numbers_keep_to_their_columns() -> None:
    assert [number(value) for value in (0, 4.25, 9.96, 2345, 99999, 123456, 7.6e6)] == [
        "0", "4.2", "10", "2,345", "99,999", "123.5k", "7.6M",
    ]  # fmt: skip
    assert [duration(value) for value in (0.00085, 0.0042, 0.00996, 0.12, 3.14, 95, 240)] == [
        "850us", "4.2ms", "10ms", "120ms", "3.1s", "95.0s", "240s",
    ]  # fmt: skip
    assert sparkline((0, 1, 4, 8), 10) == "▁▂▅█"
    assert sparkline((0, 1, 4, 8), 2, has_unicode=False) == "+@"
    assert sparkline((0, 0), 5) == "▁▁"


def picture(width: int = 80, trouble: str = "", engines: int = 2) -> list[str]:
    state = Watch()
    for step in range(12):
        tokens = [1000.0 + step * (step + engine) * 60 for engine in range(engines)]
        text = vllm(
            tokens, values={"prompt_tokens_total": 4000 + 90 * step}, first_token=(0, 0, step, step, 1, 0, 0, 0)
        )
        figures = state.add(float(step), read(parse(text)))
    lines = screen(figures, "gpt-oss-20b at http://10.0.0.1:8000", width=width, interval=1, trouble=trouble)
    return ["".join(part for part, _ in line) for line in lines]


def test_the_screen_at_80_columns() -> None:
    assert picture() == [
        "gpt-oss-20b at http://10.0.0.1:8000  serving",
        "",
        "generated         2,580 tok/s  ▁▂▃▃▄▅▆▆▇██  peak 2,580",
        "prompt              180 tok/s  ███████████  peak 180",
        "requests      running 16   waiting 6   preempted 4   finished 14",
        "KV cache      [##########------------------------------]  25%",
        "prefix hits   [##########------------------------------]  25%",
        "",
        "LATENCY        P50   P99  COUNT  OVER",
        "first token   10ms  20ms     44  last 11 s",
        "",
        "ENGINE  TOK/S  RUN  WAIT  PREEMPT   KV",
        "0       1,260    8     3        2  25%",
        "1       1,320    8     3        2  25%",
        "",
        "every 1 s; Ctrl-C leaves",
    ]


def rank_picture(width: int = 80, **shape: int) -> list[str]:
    figures = pair(vllm() + ranks(10.0, **shape), vllm() + ranks(12.0, **shape))
    return ["".join(part for part, _ in line) for line in rank_lines(figures.ranks, width)]


def test_every_rank_has_a_row_with_its_shares_of_the_last_interval() -> None:
    assert rank_picture() == [
        "",
        "RANK  NODE   DEVICE  STATE                    BUSY  WAIT    MEMORY  POWER",
        "0     node0  cuda:0  computing                 90%    0%  70.0 GiB  400 W",
        "1     node0  cuda:1  computing                 85%    5%  71.0 GiB  401 W",
        "2     node1  cuda:2  computing                 80%   10%  72.0 GiB  402 W",
        "3     node1  cuda:3  stopped by a signal 5 s   75%   15%  73.0 GiB  403 W",
        "RDMA node0: 12.50 GB/s sent, 11.00 GB/s received",
        "RDMA node1: 12.50 GB/s sent, 11.00 GB/s received",
    ]
    assert rank_picture(num_engines=2)[2].startswith("0       0     node0  cuda:0")
    # The first reading has no interval yet, and a server of another make no ranks.
    state = Watch()
    figures = state.add(0.0, read(parse(vllm() + ranks(10.0))))
    assert [(rank.computing, rank.rank.values["watts"]) for rank in figures.ranks.ranks][0] == (None, 400.0)
    # Who reads more often than the server measures sees the same shares twice, not an idle rank and a busy one.
    for at, seconds in ((0.5, 11.0), (1.0, 11.0), (1.5, 12.0)):
        figures = state.add(at, read(parse(vllm() + ranks(seconds))))
        assert figures.ranks.ranks[0].computing == pytest.approx(0.9)
        assert figures.ranks.traffic["node1"]["sent"] == pytest.approx(12.5e9)
    assert rank_lines(pair(vllm(), vllm()).ranks, 80) == []


def test_shares_of_a_process_that_is_gone_are_not_shown_for_the_next() -> None:
    state = Watch()
    for at in (0.0, 1.0):
        state.add(at, read(parse(vllm() + ranks(10.0 + at))))
    figures = state.add(2.0, read(parse(vllm((1, 0)) + ranks(1.0))))
    assert figures.num_restarts == 1
    assert {rank.computing for rank in figures.ranks.ranks} == {None}
    assert figures.ranks.traffic == {}


def test_what_a_server_says_of_ranks_is_held_within_bounds() -> None:
    place = 'engine="0",rank="0",node="n",device="cpu"'
    said = "".join(f"hlaunch_rank_{name}{{{place}}} {value}\n" for name, value in (
        ("memory_bytes", "1.7e308"), ("power_watts", "NaN"), ("state_seconds", "-5"),
    ))  # fmt: skip
    said += f'hlaunch_rank_state{{{place},state="a"}} 1\nhlaunch_rank_state{{{place},state="b"}} 1\n'
    said += 'hlaunch_rank_state{engine="0",state="c"} 1\nhlaunch_node_rdma_sent_bytes_total{node="n"} 1.7e308\n'
    (rank,) = read(parse(vllm() + said)).ranks.ranks
    assert (rank.state, rank.values) == ("b", {})
    assert read(parse(vllm() + said)).ranks.traffic == {}


def test_ranks_as_json() -> None:
    shown = pair(vllm() + ranks(10.0), vllm() + ranks(12.0)).to_json()
    assert shown["ranks"][3] == {
        "engine": "0", "rank": "3", "node": "node1", "device": "cuda:3", "state": "stopped by a signal",
        "state_seconds": 5.0, "computing_share": 0.75, "waiting_share": 0.15, "memory_bytes": 73.0 * 2**30,
        "power_watts": 403.0,
    }  # fmt: skip
    assert shown["rdma_bytes_per_second"]["node1"] == {"sent": 12.5e9, "received": 11e9}
    assert [rank["rank"] for rank in pair(vllm(), ranks(3.0, num_ranks=12) + vllm()).to_json()["ranks"]] == [
        str(rank) for rank in range(12)
    ]


def test_ranks_are_not_wider_than_the_terminal_and_many_are_counted() -> None:
    for width in (40, 60, 80, 132):
        lines = rank_picture(width, num_ranks=64, num_engines=8)
        assert max(len(line) for line in lines) <= width
        assert "… and 32 more" in lines
    assert rank_picture(40)[1:4] == [
        "RANK  NODE   STATE                  BUSY",
        "0     node0  computing               90%",
        "1     node0  computing               85%",
    ]
    assert clip("ノード" * 20, 10) == "ノード..."


def test_no_line_is_wider_than_the_terminal() -> None:
    for width in (40, 60, 80, 132):
        lines = picture(width, trouble="no figures for 3 s: " + "x" * 200, engines=40)
        assert max(len(line) for line in lines) <= width
        assert "… and 8 more" in lines
    assert len(log_header()) <= 80
    assert len(log_line(pair(vllm((1, 1)), vllm((9e9, 1))))) <= 80


def test_the_screen_is_redrawn_in_colour_and_a_pipe_gets_neither() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    line = [("KV ", ""), ("\x1b[31m##", "red")]
    terminal = Terminal()
    console = Console(stdout=terminal, stderr=io.StringIO(), environ={"TERM": "xterm"})
    assert console.has_screen
    with console.screen() as draw:
        draw([line])
        draw([line, []])
    shown = terminal.getvalue()
    assert "\x1b[31m" in shown
    assert "\\x1b[31m##" in shown, "a server's own control characters are escaped"
    assert shown.count("KV") >= 2
    for plain in (
        Console(stdout=Terminal(), environ={"NO_COLOR": "1"}),
        Console(stdout=Terminal(), environ={"TERM": "dumb"}),
        Console(stdout=io.StringIO(), environ={}),
    ):
        assert not plain.has_screen
    pipe = io.StringIO()
    Console(stdout=pipe, environ={}).styled(line)
    assert pipe.getvalue() == "KV \\x1b[31m##\n"


def test_a_server_that_dies_while_watched_is_waited_for_and_then_named() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with serving(Stub(served(vllm()))) as stub:
        moments = watch(stub.url, None, 1.0, clock=lambda: now[0], sleep=sleep)
        assert next(moments).trouble == ""
        stub.answers = served("<html>")
        assert next(moments).trouble.startswith("no figures for 1 s: line 1 of the metrics:")
        stub.answers = served(vllm((1100, 500)))
        back = next(moments)
        assert (back.trouble, back.figures.rates["generated_tokens"]) == ("", 50.0), "over the two seconds since"
        stub.stop.set()
        wait_for(lambda: refuses(stub.url))
        for silent in range(1, 11):
            assert next(moments).trouble.startswith(f"no figures for {silent} s: no answer from {stub.url}")
        with pytest.raises(EngineFailed, match=r"has not answered for 11 s"):
            next(moments)


def refuses(url: str) -> bool:
    try:
        Client(url).get("/metrics")
    except EngineFailed:
        return True
    except ValueError:
        pass
    return False


def test_a_launch_that_has_ended_is_not_waited_for() -> None:
    with serving(Stub(served(vllm()))) as stub:
        moments = watch(stub.url, None, 1.0, is_alive=lambda: False, sleep=lambda seconds: None)
        next(moments)
        stub.answers = {}
        with pytest.raises(EngineFailed, match="its launcher has ended"):
            next(moments)


def test_an_answer_that_is_endless_cut_or_no_text_is_none() -> None:
    with serving(Stub(served("# " + "x" * (3 << 20)))) as stub:
        with pytest.raises(EngineFailed, match="longer than 1 MiB"):
            Client(stub.url).text("/metrics", 1 << 20)
        stub.answers = {"/metrics": (200, b"\xff\xfe")}
        with pytest.raises(EngineFailed, match="no UTF-8"):
            Client(stub.url).text("/metrics", 1 << 20)
        stub.answers, stub.missing_bytes = served("vllm:generation_tokens_total 12"), 2
        with pytest.raises(EngineFailed, match="broke off 2 bytes before the end"):
            Client(stub.url).text("/metrics", 1 << 20)


def hlaunch(tmp_path: Path, *args: str, seconds: float = 20) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "HLAUNCH_STATE_DIR": str(tmp_path / "state"), "PYTHONUTF8": "1"}
    environ.pop("HLAUNCH_API_KEY", None)
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", "top", *args],
        cwd=Path(__file__).parents[2], env=environ, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip


def test_what_cannot_be_watched_is_said(tmp_path: Path) -> None:
    done = hlaunch(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: nothing runs")
    with serving(Stub({})) as stub:
        done = hlaunch(tmp_path, "--url", stub.url)
        assert done.returncode == 1
        assert "it serves no /metrics" in done.stderr
        stub.key = "canary-77"
        done = hlaunch(tmp_path, "--url", stub.url)
        assert (done.returncode, "HLAUNCH_API_KEY" in done.stderr) == (1, True)
        assert "canary" not in done.stderr


def test_a_real_server_is_watched_while_it_works_and_when_it_ends(hlaunch: Launcher) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    up = hlaunch.cli("up", "tiny-oss", "--detach", "--set", f"port={port}")
    assert up.returncode == 0, up.stderr
    url = hlaunch.ready()["url"]
    stopping = threading.Event()

    def work() -> None:
        while not stopping.is_set():
            body = json.dumps({"model": "tiny-oss", "prompt": "ROMEO:", "max_tokens": 200, "ignore_eos": True}).encode()
            request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=20) as answer:
                answer.read()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        done = hlaunch.cli("top", "--once", "--json", "--interval", "1")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["models"], found["state"], found["url"]) == (["tiny-oss"], "ready", url)
        assert found["generated_tokens_per_second"] > 20
        assert found["latency_seconds"]["next_token"]["count"] > 0
        assert 0 < found["latency_seconds"]["next_token"]["p50"] <= found["latency_seconds"]["next_token"]["p99"]
        shown = hlaunch.cli("top", "tiny", "--once", "--interval", "0.3")
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith(f"tiny-oss at {url}  ready\n")
        assert "\x1b" not in shown.stdout
        assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    finally:
        stopping.set()
        for worker in workers:
            worker.join(timeout=20)
    given = hlaunch.cli("connect", "env")
    assert (given.returncode, f"OPENAI_BASE_URL={url}/v1" in given.stdout) == (0, True), given.stderr
    log = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "top", "--interval", "0.2"],
        cwd=hlaunch.folder, env=hlaunch.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    hlaunch.started.append(log)
    assert log.stdout is not None
    assert log.stdout.readline().split() == log_header().split()
    log.stdout.readline()
    assert hlaunch.cli("down", "tiny-oss").returncode == 0
    _, errors = log.communicate(timeout=15)
    assert log.returncode == 1
    assert "error: " in errors
    assert "its launcher has ended" in errors


def test_ctrl_c_leaves_a_whole_terminal(tmp_path: Path) -> None:
    environ = {**os.environ, "HLAUNCH_STATE_DIR": str(tmp_path), "TERM": "xterm", "PYTHONUTF8": "1"}
    environ.pop("NO_COLOR", None)
    ours, theirs = pty.openpty()
    with serving(Stub(served(vllm()))) as stub:
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", "top", "--url", stub.url, "--interval", "0.1"],
            cwd=Path(__file__).parents[2], env=environ, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and shown.count(b"Ctrl-C leaves") < 3:
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        while select.select([ours], [], [], 5)[0]:
            try:
                part = os.read(ours, 65536)
            except OSError:
                break
            if not part:
                break
            shown += part
        assert process.wait(timeout=10) == 0
    os.close(ours)
    assert shown.count(b"Ctrl-C leaves") >= 3
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") > -1, "the cursor is back"
    assert b"Traceback" not in shown
