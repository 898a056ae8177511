"""`hlaunch synth`: a random-weight checkpoint of a model's true shape. Knows how the work is asked for and shown.

The work itself is done by a child, `python -m engine.synthesis`, which needs numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.commands import invocation_of
from launcher.sizes import counted


def register(app: typer.Typer) -> None:
    @app.command("synth")
    def synth(
        ctx: typer.Context,
        name: Annotated[
            str, typer.Argument(metavar="MODEL", help="A model of the registry, a Hugging Face id or a folder.")
        ],
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; new or empty.")],
        seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same bytes, on every machine.")] = 0,
        layers: Annotated[int | None, typer.Option("--layers", min=1, help="Keep only the first layers.")] = None,
        threads: Annotated[int, typer.Option("--threads", min=0, help="0 for one per core.")] = 0,
        as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
    ) -> None:
        """Write a checkpoint of a model's true shape with random weights.

        For measuring speed without a download: what such a model says is noise. Interrupted, run it again: whole
        shards are kept.
        """
        from launcher.benchmark.synthetic import shape_of, synthesize

        invocation = invocation_of(ctx)
        console = invocation.console
        target = (invocation.cwd / folder).resolve()
        shape = shape_of(invocation, name, layers)
        num_layers = counted(shape.num_layers, "layer")
        console.note(f"{shape.name}: {_amount(shape.weight_bytes)} of random weights, {num_layers}, seed {seed}")
        console.note(f"to {target}")
        with console.phases() as view:
            view.begin("weights")

            def show(done: int, total: int) -> None:
                view.progress("weights", done / total, f"{_amount(done)} of {_amount(total)}")

            facts = synthesize(shape, target, seed, threads, invocation.environ, show)
            written = float(facts["written_bytes"])
            rate = f", {_amount(written / max(facts['seconds'], 1e-9))}/s" if written else ""
            view.end("weights", facts["seconds"], f"{_amount(written)} written{rate}")
        if as_json:
            console.json(facts)
        else:
            console.table(("CHECKPOINT", ""), _rows(facts))
        if not written:
            console.note("the folder held this very checkpoint already")
        elif facts["resumed_bytes"]:
            console.note(f"{_amount(facts['resumed_bytes'])} were there from an earlier run")
        if facts["tokenizer"] == "stand-in":
            console.warning(
                "the model's own tokenizer is not on this machine: the folder has a stand-in that encodes byte by byte",
                hint=f"for figures give token ids, as hlaunch bench does; or copy tokenizer.json to {target}",
            )
        elif facts["tokenizer"] == "none":
            console.warning("no tokenizer is at hand: this checkpoint takes token ids only")


def _rows(facts: dict[str, object]) -> list[tuple[str, str]]:
    size = int(str(facts["weight_bytes"]))
    files = counted(int(str(facts["num_shards"])), "file")
    return [
        ("folder", str(facts["folder"])),
        ("model", str(facts["model"])),
        ("weights", f"{_amount(size)} in {files}, {facts['num_tensors']} tensors, random"),
        ("seed", str(facts["seed"])),
        ("fingerprint", f"{facts['fingerprint']}  (equal: same bytes)"),
        ("tokenizer", str(facts["tokenizer"])),
    ]


def _amount(num_bytes: float) -> str:
    """Write bytes as disks and benchmarks count them: `13.76 GB`, `4.1 MB`."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
