"""The benchmark as a picture: throughput and latency over concurrency, one PNG.

The only place that knows matplotlib, which the extra `bench` brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.benchmark.report import LevelFigures
from launcher.errors import PreflightError


def write_plot(path: Path, title: str, levels: Sequence[LevelFigures]) -> None:
    """Draw the levels into `path`.

    Raises: PreflightError when matplotlib is not installed or the file cannot be written.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise PreflightError("the plot needs matplotlib", hint="pip install 'hlaunch[bench]'") from error
    concurrency = [level.concurrency for level in levels]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    floors = [(level.floor or {}).get("floor_tokens_per_second_spec") for level in levels]
    panels: tuple[tuple[str, str, tuple[tuple[str, list[float | None]], ...]], ...] = (
        (
            "Throughput",
            "tokens/s",
            (
                ("output", [level.output_tokens_per_second for level in levels]),
                ("decode alone", [level.decode_tokens_per_second for level in levels]),
                ("floor", floors),
            ),
        ),
        (
            "Time to first token",
            "ms",
            (("p50", [level.ttft_ms_p50 for level in levels]), ("p99", [level.ttft_ms_p99 for level in levels])),
        ),
        (
            "Time per output token",
            "ms",
            (("p50", [level.tpot_ms_p50 for level in levels]), ("ITL p99", [level.itl_ms_p99 for level in levels])),
        ),
    )
    for axis, (name, unit, series) in zip(axes, panels, strict=True):
        for (label, values), color in zip(series, ("#2f6fde", "#d9822b", "#888888"), strict=False):
            # What was not measured is not drawn, and has no place in the legend.
            if any(value is not None for value in values):
                points = [float("nan") if value is None else value for value in values]
                axis.plot(concurrency, points, marker="o", label=label, color=color)
        axis.set_xscale("log", base=2)
        axis.set_xticks(concurrency, [str(value) for value in concurrency])
        axis.set_ylim(bottom=0)
        axis.set_title(name, loc="left", fontsize=11)
        axis.set_xlabel("requests in flight")
        axis.set_ylabel(unit)
        axis.grid(visible=True, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise PreflightError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        plt.close(figure)
