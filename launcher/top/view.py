"""Figures → lines of at most a terminal's width: the whole screen, or one line of a log. Pure.

Knows: layout, units, sparklines. Refuses to know: the terminal. A line is a list of (text, style) parts; the styles are
names that `launcher.console` hands to its library, and nothing is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.console import Line, clip, layout_table
from launcher.top.figures import Figures, Quantiles
from launcher.top.rank_view import rank_lines

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = "._-=+*#@"
_LABEL = 14
MAX_ROWS = 32
"""More engines than this are counted, not drawn; `--json` has all of them."""
_LATENCIES = (("first_token", "first token"), ("next_token", "next token"), ("whole_request", "request"))

LOG_COLUMNS = ("tok/s", "prompt/s", "run", "wait", "preempt", "KV%", "hit%", "TTFT50", "TTFT99", "ITL50", "ITL99")


def screen(
    figures: Figures, title: str, *, width: int, interval: float, trouble: str = "", has_unicode: bool = True
) -> list[Line]:
    """Draw the whole picture. `trouble` says why it is not fresh; `width` counts columns, 40 at least."""
    width = max(40, width)
    reading = figures.reading
    values = reading.values
    state = reading.state or "serving"
    lines: list[Line] = [
        [
            (clip(title, width - len(state) - 2), "bold"),
            ("  ", ""),
            (state, "green" if state in ("ready", "serving") else "yellow"),
        ]
    ]
    if trouble:
        lines.append([("! ", "bold red"), (clip(trouble, width - 2), "red")])
    if figures.num_restarts:
        lines.append([(f"restarts while watched: {figures.num_restarts}", "yellow")])
    lines.append([])
    for word, label, style in (("generated_tokens", "generated", "cyan"), ("prompt_tokens", "prompt", "blue")):
        if word in values:
            lines.append(_rate(figures, word, label, style, width, has_unicode))
    counts = [
        f"{label} {values[word]:,.0f}"
        for word, label in (
            ("running", "running"), ("waiting", "waiting"), ("preemptions", "preempted"), ("finished", "finished"),
        )
        if word in values
    ]  # fmt: skip
    if counts:
        lines += [[(text, "")] for text in _fold("requests", counts, width)]
    if "kv_usage" in values:
        lines.append(_bar("KV cache", values["kv_usage"], width))
    if figures.prefix_hit_rate is not None:
        lines.append(_bar("prefix hits", figures.prefix_hit_rate, width, is_good=True))
    lines += _latencies(figures, width)
    lines += _rows(figures, width)
    lines += rank_lines(figures.ranks, width)
    lines += [[], [(clip(f"every {interval:g} s; Ctrl-C leaves", width), "dim")]]
    return lines


def _rate(figures: Figures, word: str, label: str, style: str, width: int, has_unicode: bool) -> Line:
    rate = figures.rates.get(word)
    text = f"{label:<{_LABEL}}{'-' if rate is None else number(rate):>9} tok/s  "
    history = figures.history.get(word, ())
    peak = f"  peak {number(max(history))}" if history else ""
    room = width - len(text)
    if room - len(peak) < 8:
        peak = ""
    return [(text, ""), (sparkline(history, room - len(peak), has_unicode), style), (peak, "dim")]


def sparkline(points: Sequence[float], width: int, has_unicode: bool = True) -> str:
    """Draw the last `width` points as marks of eight heights; the scale begins at zero."""
    marks = _BLOCKS if has_unicode else _ASCII
    shown = points[-width:] if width > 0 else ()
    top = max(shown, default=0.0)
    return "".join(marks[min(7, int(8 * point / top)) if top > 0 else 0] for point in shown)


def _bar(label: str, share: float, width: int, *, is_good: bool = False) -> Line:
    share = min(1.0, max(0.0, share))
    length = min(40, width - _LABEL - 8)
    full = round(share * length)
    style = "green" if is_good or share < 0.8 else "yellow" if share < 0.95 else "red"
    return [
        (f"{label:<{_LABEL}}[", ""),
        ("#" * full, style),
        ("-" * (length - full), "dim"),
        (f"] {100 * share:3.0f}%", ""),
    ]


def _fold(label: str, parts: Sequence[str], width: int) -> list[str]:
    lines = [f"{label:<{_LABEL}}{parts[0]}"]
    for part in parts[1:]:
        if len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += "   " + part
        else:
            lines.append(" " * _LABEL + part)
    return lines


def _latencies(figures: Figures, width: int) -> list[Line]:
    rows = [
        (
            label,
            duration(found.p50),
            (">" if found.is_capped else "") + duration(found.p99),
            f"{found.count:,}",
            _span(found),
        )
        for word, label in _LATENCIES
        if (found := figures.latencies.get(word)) is not None
    ]
    if not rows:
        return []
    header, *body = layout_table((f"{'LATENCY':<{_LABEL - 2}}", ">P50", ">P99", ">COUNT", "OVER"), rows, width)
    return [[], [(header, "bold")], *([(line, "")] for line in body)]


def _span(found: Quantiles) -> str:
    return "since its start" if found.span_seconds is None else f"last {found.span_seconds:.0f} s"


def _rows(figures: Figures, width: int) -> list[Line]:
    rows = figures.reading.rows
    if len(rows) < 2:
        return []
    cells = []
    for row in rows[:MAX_ROWS]:
        rate = figures.row_rates.get(row.name, {}).get("generated_tokens")
        usage = row.values.get("kv_usage")
        counts = (row.values.get(word) for word in ("running", "waiting", "preemptions"))
        cells.append(
            (
                row.name, "-" if rate is None else number(rate),
                *("-" if value is None else f"{value:,.0f}" for value in counts),
                "-" if usage is None else f"{100 * usage:.0f}%",
            )
        )  # fmt: skip
    header, *body = layout_table(("ENGINE", ">TOK/S", ">RUN", ">WAIT", ">PREEMPT", ">KV"), cells, width)
    lines: list[Line] = [[], [(header, "bold")], *([(line, "")] for line in body)]
    if len(rows) > MAX_ROWS:
        lines.append([(f"… and {len(rows) - MAX_ROWS} more", "dim")])
    return lines


def log_header() -> str:
    """Column names of `log_line`."""
    return " ".join(f"{name:>{_log_width(name)}}" for name in LOG_COLUMNS)


def log_line(figures: Figures) -> str:
    """Write one moment as one line under `log_header`; what is not reported is `-`."""
    values, found = figures.reading.values, figures.latencies

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.0f}"

    def rate(word: str) -> str:
        return number(figures.rates[word]) if word in figures.rates else "-"

    def count(word: str) -> str:
        return number(values[word]) if word in values else "-"

    times = [
        duration(value)
        if (quantiles := found.get(word)) is not None and (value := getattr(quantiles, name)) is not None
        else "-"
        for word in ("first_token", "next_token")
        for name in ("p50", "p99")
    ]
    cells = (
        rate("generated_tokens"), rate("prompt_tokens"), count("running"), count("waiting"), count("preemptions"),
        percent(values.get("kv_usage")), percent(figures.prefix_hit_rate), *times,
    )  # fmt: skip
    return " ".join(f"{cell:>{_log_width(name)}}" for name, cell in zip(LOG_COLUMNS, cells, strict=True))


def _log_width(name: str) -> int:
    return max(len(name), {"tok/s": 7, "prompt/s": 8, "preempt": 7}.get(name, 4 if "%" in name else 5))


def number(value: float) -> str:
    """Write a count or rate in at most seven characters: `4.2`, `2,345`, `1.2M`."""
    if value < 9.95:
        return f"{value:.1f}".removesuffix(".0")
    if value < 99_999.5:
        return f"{value:,.0f}"
    for unit in ("k", "M", "G", "T"):
        value /= 1000
        if value < 999.5:
            return f"{value:.1f}{unit}"
    return f"{value:.0e}"


def duration(seconds: float) -> str:
    """Write a latency with its unit: `850us`, `4.2ms`, `120ms`, `3.1s`, `95s`."""
    if seconds < 0.000_999_5:
        return f"{seconds * 1e6:.0f}us"
    if seconds < 0.009_95:
        return f"{seconds * 1e3:.1f}ms"
    if seconds < 0.999_5:
        return f"{seconds * 1e3:.0f}ms"
    return f"{seconds:.1f}s" if seconds < 99.95 else f"{seconds:,.0f}s"
