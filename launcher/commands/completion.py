"""`hlaunch completion`: a shell's completion of commands, options, and names of models.

Knows: three shells' ways to ask a program for words, and which word stands where. Refuses to know: any command.
The shell asks `hlaunch completion --words -- WORD…` at each TAB; whatever goes wrong there is silence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.commands import Invocation, invocation_of

SCRIPTS = {
    "bash": """\
_hlaunch() {
    mapfile -t COMPREPLY < <(hlaunch completion --words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -F _hlaunch hlaunch
""",
    "zsh": """\
#compdef hlaunch
_hlaunch() {
    local -a found
    found=(${(f)"$(hlaunch completion --words -- "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( ${#found} )); then compadd -a found; else _files; fi
}
compdef _hlaunch hlaunch
""",
    "fish": """\
function __hlaunch_words
    hlaunch completion --words -- (commandline -opc)[2..] (commandline -ct) 2>/dev/null
end
complete -c hlaunch -a '(__hlaunch_words)'
""",
}
_INSTALL = {
    "bash": 'eval "$(hlaunch completion bash)"        in ~/.bashrc',
    "zsh": 'eval "$(hlaunch completion zsh)"         in ~/.zshrc, after compinit',
    "fish": "hlaunch completion fish | source         in ~/.config/fish/config.fish",
}
_OF_WHAT_RUNS = ("down", "restart", "status", "top", "connect")


def register(app: typer.Typer) -> None:
    @app.command("completion")
    def completion(
        ctx: typer.Context,
        shell: Annotated[str | None, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")] = None,
        typed: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
        words: Annotated[bool, typer.Option("--words", hidden=True)] = False,
    ) -> None:
        """Print the lines that let a shell complete commands, options and names of models."""
        from launcher.errors import UsageError
        from launcher.registry.suggest import did_you_mean

        invocation = invocation_of(ctx)
        if words:
            line = [*([shell] if shell is not None else []), *(typed or [])]
            with contextlib.suppress(Exception):
                for word in candidates(invocation, ctx.find_root().command, line):
                    invocation.console.raw(word + "\n")
            return
        if shell not in SCRIPTS or typed:
            names = ", ".join(SCRIPTS)
            hint = did_you_mean(shell or "", SCRIPTS) or f"shells: {names}"
            raise UsageError("completion takes one SHELL" if shell is None else f"no such shell: {shell}", hint=hint)
        invocation.console.raw(SCRIPTS[shell])
        invocation.console.note(_INSTALL[shell])


def candidates(invocation: Invocation, root: Any, typed: Sequence[str]) -> list[str]:
    """List what the last of the typed words may become, in the order of `--help`; nothing where a file is meant."""
    words = _joined(typed)
    current, before = (words[-1], words[:-1]) if words else ("", [])
    file: Path | None = None
    path: list[str] = []
    waiting = iter(before)
    for word in waiting:
        if word == "--":
            path += waiting
        elif not word.startswith("-"):
            path.append(word)
        else:
            option, equals, value = word.partition("=")
            if not _takes_value(root, path, option):
                continue
            if not equals and (found := next(waiting, None)) is None:
                return []
            if option == "--file" or (option == "-f" and not path):
                file = Path(value if equals else str(found))
    offered = _words(invocation, root, file, path, current)
    # Of a word that bash has parted, it replaces the last part.
    begin = len(current) - len(typed[-1]) if typed else 0
    return [word[begin:] for word in dict.fromkeys(offered) if word.startswith(current)]


def _joined(typed: Sequence[str]) -> list[str]:
    """Put together what bash has parted at '=' and ':'; other shells part nothing."""
    words: list[str] = []
    is_open = False
    for word in typed:
        is_sign = word != "" and not word.strip("=:")
        if words and (is_sign or is_open):
            words[-1] += word
        else:
            words.append(word)
        is_open = is_sign
    return words


def _takes_value(root: Any, path: Sequence[str], option: str) -> bool:
    """Whether a value follows an option: a global one, which may stand behind the command too, or the command's."""
    params = [param for param in root.params if not path or option in ("--file", "--profile")]
    if path:
        params += _command(root, path).params
    return any(option in param.opts and not param.is_flag for param in params if param.param_type_name == "option")


def _command(root: Any, path: Sequence[str]) -> Any:
    """Find the command that was typed, or its part."""
    command = root.get_command(None, path[0])
    parts = getattr(command, "commands", {})
    return parts.get(path[1], command) if len(path) > 1 else command


def _words(invocation: Invocation, root: Any, file: Path | None, path: Sequence[str], current: str) -> Iterator[str]:
    from dataclasses import replace

    from launcher.cli import ALIASES, COMMANDS

    if not path:
        yield from _options(root) if current.startswith("-") else COMMANDS
        return
    path = [ALIASES.get(path[0], path[0]), *path[1:]]
    command = _command(root, path)
    parts = getattr(command, "commands", None)
    if current.startswith("-"):
        yield from _options(command)
        return
    if parts:
        yield from parts
        return
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    given = len(path) - (2 if path[0] in ("import", "registry") else 1)
    if path[0] == "completion":
        yield from SCRIPTS
    elif path[0] == "connect" and given == 0:
        from launcher.connect import TOOLS

        yield from TOOLS
    elif given < len(arguments) and str(arguments[given].metavar or "").strip("[]") == "NAME":
        invocation = invocation if file is None else replace(invocation, registry_file=file)
        yield from _names(invocation, is_running=path[0] in _OF_WHAT_RUNS)


def _options(command: Any) -> Iterator[str]:
    for param in command.params:
        if param.param_type_name == "option" and not param.hidden:
            yield max(param.opts, key=len)
    yield "--help"


def _names(invocation: Invocation, *, is_running: bool) -> Iterator[str]:
    from launcher.launches import running_names
    from launcher.supervise.instance import state_root

    if is_running:
        yield from running_names(state_root(invocation.environ))
        return
    for name, model in invocation.load_registry().models.items():
        yield from (name, *model.aliases)
