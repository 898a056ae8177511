"""How `--help` of a command reads: what to type, what it does, examples. Typer parses; it writes none of this.

Knows: labels, ranges and defaults in words, one or two command lines to copy per command. Refuses to know: commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand

Example = tuple[str, str]
"""A command line without `hlaunch`, and what it is for."""

EXAMPLES: Mapping[str, tuple[Example, ...]] = {
    "up": (
        ("up tiny-oss", "serve it here until Ctrl-C"),
        ("up tiny-oss -d --port 0", "in the background, on a free port"),
        ("up tiny-oss --dry-run", "show everything, start nothing"),
        ("up NAME --cluster rack", "on the nodes of a cluster"),
    ),
    "plan": (
        ("plan tiny-oss", "on this host"),
        ("plan NAME --cluster rack --svg a.svg", "on a cluster, drawn"),
        ("plan NAME --diff --against deploy", "what would change"),
    ),
    "down": (("down tiny-oss", "let running requests end, then stop"), ("down --all", "all that runs")),
    "restart": (("restart tiny-oss", "for example after a change in the registry"),),
    "ps": (("ps --json", "for scripts"),),
    "status": (("status NAME", "nodes, events, transports"), ("status NAME --env", "what each node really has")),
    "logs": (("logs NAME -n 50 -f", "go on reading"), ("logs NAME --transport", "what NCCL and Gloo said")),
    "top": (("top", "the one that runs"), ("top --url http://127.0.0.1:8000 --once", "any server, one picture")),
    "connect": (
        ('eval "$(hlaunch connect env)"', "for OpenAI's library"),
        ("connect codex > ~/.codex/hlaunch.config.toml", "a file"),
    ),
    "chat": (("chat tiny-oss", "a conversation"), ("chat tiny-oss -m 'Hello!'", "one question, for scripts")),
    "bench": (
        ("bench tiny-oss -c 1,4,16 -o a.json", "through a server"),
        ("bench tiny-oss --offline --profile-step", "the engine, op by op"),
    ),
    "synth": (("synth openai/gpt-oss-20b ./random-20b", "same shape, random"),),
    "explain": (
        ("explain --kernels", "on a CPU"),
        ("explain --kernels openai/gpt-oss-20b --device cuda", "with its sizes"),
    ),
    "fit": (("fit NAME --set max-model-len=8k", "with another length"),),
    "render": (("render NAME -o deploy", "one folder per node"), ("render NAME -o deploy --check", "for CI")),
    "topo": (("topo NAME --cluster rack", "all splits, best first"), ("topo NAME --cases", "the seven topologies")),
    "inventory": (
        ("inventory --measure", "with memory bandwidth"),
        ("inventory --json > spark-01.json", "to plan for it elsewhere"),
    ),
    "init": (("init", "./model_registry.yml, every key commented"),),
    "completion": (("completion bash >> ~/.bashrc", "for good"), ("completion fish | source", "for this shell")),
    "list": (("list --tag cpu", "some of them"),),
    "show": (("show NAME --explain", "where each value comes from"),),
    "validate": (("validate", "the registry that commands use"), ("validate a.yml --strict --sarif", "for CI")),
    "env": (
        ("env NAME", "every variable"),
        ("env --explain NCCL_IB_HCA", "what one of them does"),
        ("env --cluster rack --set NCCL_DEBUG=INFO", "write one"),
    ),
    "doctor": (
        ("doctor", "this host"),
        ("doctor --cluster rack --active", "nodes and network"),
        ("doctor --cluster rack --print-firewall", "lines to paste"),
    ),
    "schema": (("schema --keys", "to read"), ("schema > registry.schema.json", "for an editor")),
    "import vllm-config": (("import vllm-config config.yaml -o mine.yml", "a file"),),
    "import vllm-serve": (("import vllm-serve 'vllm serve openai/gpt-oss-20b'", "a line"),),
    "import mixvllm": (("import mixvllm registry.yml --env .env", "both files"),),
    "registry init": (("registry init", "./model_registry.yml, every key commented"),),
    "registry add": (("registry add mine --model openai/gpt-oss-20b", "a new entry"),),
    "registry set": (("registry set mine max-num-seqs=8 --dry-run", "look first"),),
}

_GLUE = "\u00a0"
"""Stands for a blank at which no line breaks, until the text is whole."""


class App(typer.Typer):
    """A Typer application whose commands have our help."""

    def command(self, *args: Any, **options: Any) -> Any:
        return super().command(*args, **{"cls": Command, **options})


class Command(TyperCommand):
    """One command with its help."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        params = self._shown(ctx)
        arguments = [param for param in params if param.param_type_name == "argument"]
        needed = [_label(param, ctx) for param in params if param.required and param not in arguments]
        return ["[OPTIONS]", *map(_in_usage, arguments), *needed]

    def _shown(self, ctx: Any) -> list[Any]:
        return [param for param in self.get_params(ctx) if not getattr(param, "hidden", False)]

    def get_help(self, ctx: Any) -> str:
        text: str = super().get_help(ctx)
        return text.replace(_GLUE, " ")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        params = self._shown(ctx)
        for kind in ("argument", "option"):
            rows = [(_label(param, ctx), _words(param)) for param in params if param.param_type_name == kind]
            if rows:
                with formatter.section(f"{kind.title()}s"):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from launcher.cli import ALIASES

        program, _, name = ctx.command_path.partition(" ")
        name = ALIASES.get(name, name)
        if name in EXAMPLES:
            rows = [
                (line if f"{program} " in line else f"{program} {line}", f"# {use}") for line, use in EXAMPLES[name]
            ]
            with formatter.section("Examples"):
                formatter.write_dl(rows, col_max=60)


def _name(param: Any) -> str:
    return str(param.metavar or param.name.upper()).strip("[]")


def _in_usage(param: Any) -> str:
    name = _name(param)
    return name if param.required else f"[{name}]"


def _label(param: Any, ctx: Any) -> str:
    if param.param_type_name == "argument":
        return _name(param)
    names = ", ".join(sorted(param.opts, key=len))
    return names if param.is_flag else f"{names} {param.metavar or _value_of(param, ctx)}"


def _value_of(param: Any, ctx: Any) -> str:
    """Name what an option takes: a number, a path, else after the option itself."""
    describe = getattr(param, "display_type", None) or param.make_metavar
    kind = str(describe(ctx)).strip("<>[]").lower()
    if kind.startswith(("int", "float")):
        return "N"
    return "PATH" if kind.startswith(("path", "file")) else str(max(param.opts, key=len)).strip("-").upper()


def _words(param: Any) -> str:
    """The help text, then default and range where there are any."""
    source = param if hasattr(param, "min") else param.type
    low, high = getattr(source, "min", None), getattr(source, "max", None)
    facts = []
    has_default = param.default is not None and param.default is not False and param.default != ()
    if has_default and param.show_default and not param.required:
        facts.append(f"default: {param.default}")
    if low is not None and high is not None:
        facts.append(f"{low} to {high}")
    elif low is not None:
        facts.append(f"at least {low}")
    elif high is not None:
        facts.append(f"at most {high}")
    if param.required and param.param_type_name == "option":
        facts.append("required")
    text = param.help or ""
    return f"{text}  [{_GLUE.join('; '.join(facts).split())}]".strip() if facts else text
