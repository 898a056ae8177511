"""`hlaunch explain`: why things run the way they do; today, which kernel serves each op and why not the others.

Knows how the choice is drawn. The choice itself is made and explained by the registry of the `kernels` package, in a
child process, since it needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.commands import invocation_of

if TYPE_CHECKING:
    from launcher.commands import Invocation

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


def register(app: typer.Typer) -> None:
    @app.command("explain")
    def explain(
        ctx: typer.Context,
        name: Annotated[
            str | None, typer.Argument(metavar="[MODEL]", help="Show the sizes that this model calls the ops with.")
        ] = None,
        kernels: Annotated[
            bool, typer.Option("--kernels", help="Which kernel serves each op, and why not the others.")
        ] = False,
        device: Annotated[str, typer.Option("--device", help="cpu or cuda; cuda is explained without a GPU.")] = "cpu",
        dtype: Annotated[str | None, typer.Option("--dtype", help="float32 or bfloat16.")] = None,
        op: Annotated[str | None, typer.Option("--op", help="Only this op.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Say why each op runs on the kernel it runs on."""
        from launcher.errors import UsageError

        if not kernels:
            raise UsageError("explain what?", hint="hlaunch explain --kernels [MODEL]")
        if device not in DTYPES:
            raise UsageError(f"--device {device}: expected cpu or cuda")
        dtype = dtype or DTYPES[device]
        if dtype not in DTYPES.values():
            raise UsageError(f"--dtype {dtype}: expected float32 or bfloat16")
        invocation = invocation_of(ctx)
        report = _ask(invocation, name, device, dtype, op)
        if as_json:
            invocation.console.json(report)
            return
        _draw(invocation, report, name)


def _ask(invocation: Invocation, name: str | None, device: str, dtype: str, op: str | None) -> dict[str, Any]:
    from launcher.benchmark.child import run_child
    from launcher.errors import EngineFailed, UsageError

    config = None
    if name is not None:
        from launcher.benchmark.synthetic import shape_of

        config = dict(shape_of(invocation, name).config)
    request = {"device": device, "dtype": dtype, "model": config, "op": op}
    for event in run_child("engine.kernel_report", request, invocation.environ):
        if event["event"] == "kernels":
            return {"model": name, **{key: value for key, value in event.items() if key != "event"}}
        if event["event"] == "error" and event["kind"] == "KeyError":
            raise UsageError(event["message"])
        if event["event"] == "error":
            raise EngineFailed(event["message"], hint=event["hint"])
    raise EngineFailed("the explanation ended without a word")


def _draw(invocation: Invocation, report: dict[str, Any], name: str | None) -> None:
    console = invocation.console
    if "stages" in report:
        _draw_stages(invocation, report)
    of_model = f", sizes of {name}" if name else ""
    rows = []
    for op in report["ops"]:
        label = op["op"]
        for line in op["candidates"]:
            mark = "*" if line["selected"] else ""
            rows.append((label, mark, line["kernel"], line["band"].lower(), line["reason"]))
            label = ""
    console.table(
        ("OP", "", "KERNEL", "BAND", "WHY, OR WHY NOT"), rows, title=f"kernels on {report['platform']}{of_model}"
    )
    if name:
        console.data()
        shapes = [
            (op["op"], "  ".join(f"{tensor} {shape}" for tensor, shape in op["shape"].items())) for op in report["ops"]
        ]
        console.table(("OP", "TENSORS (T tokens, B rows, S slots)"), shapes)
    missing = [probe.removeprefix("has_") for probe, is_there in report["probes"].items() if not is_there]
    console.note("* runs: the one of the highest band that fits")
    console.note("bands: reference < portable < optimized < specialized")
    if missing and report["platform"].startswith("cpu"):
        console.note(f"not in this build of torch: {', '.join(missing)}")


def _draw_stages(invocation: Invocation, report: dict[str, Any]) -> None:
    """Draw gpt-oss's stages on a GPU: what serves them, by the tokens of a step, and why."""
    console, bands = invocation.console, report["bands"]
    rows = []
    for stage in report["stages"]:
        kernels = [kernel["kernel"] for kernel in stage["kernels"]]
        begins = [i for i, kernel in enumerate(kernels) if i == 0 or kernel != kernels[i - 1]]
        for first, end in zip(begins, [*begins[1:], len(kernels)], strict=True):
            rows.append((stage["stage"] if first == 0 else "", _tokens(bands[first:end]), kernels[first]))
    console.table(("STAGE", "TOKENS", "KERNEL"), rows, title="gpt-oss on one Hopper GPU: fused stages")
    console.data()
    reasons = []
    for i, band in enumerate(bands):
        languages = ", ".join(dict.fromkeys(stage["kernels"][i]["language"] for stage in report["stages"]))
        reasons.append((_tokens([band]), languages, band["why"]))
    console.table(("TOKENS", "WRITTEN IN", "WHY"), reasons)
    console.data()
    console.data("other models, and gpt-oss elsewhere, run these ops:")


def _tokens(bands: Sequence[Mapping[str, Any]]) -> str:
    """Name the tokens of a step that neighbouring bands cover: `5-256`, `257+`."""
    low, high = bands[0]["low"], bands[-1]["high"]
    return f"{low}+" if high is None else f"{low}-{high}"
