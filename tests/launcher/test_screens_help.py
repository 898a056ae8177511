"""The help of every command as a reviewed snapshot; and no command is without a screen."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from screens_support import SCREENS, Screens, prepare, reviewed_names

from launcher.cli import COMMANDS, SECTIONS, _build
from launcher.help_screen import EXAMPLES

REVIEWED = SCREENS / "help"
PARTS = {"import": ("vllm-config", "vllm-serve", "mixvllm"), "registry": ("init", "add", "set")}
CASES = {
    "hlaunch": [],
    **{name: [name] for name in COMMANDS},
    **{f"{group}-{part}": [group, part] for group, parts in PARTS.items() for part in parts},
}


@pytest.mark.parametrize("name", CASES)
def test_help_is_as_reviewed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, monkeypatch)
    Screens(tmp_path, REVIEWED, monkeypatch).check(name, [*CASES[name], "--help"])


def test_every_reviewed_help_is_of_a_command() -> None:
    assert reviewed_names(REVIEWED) == set(CASES)


def test_every_command_has_a_screen_of_what_it_says() -> None:
    """A new row of COMMANDS fails here until somebody has looked at what the command prints."""
    shown = set()
    for path in SCREENS.rglob("*.txt"):
        prompt, *words = shlex.split(path.read_text().partition("\n")[0])[:3]
        assert prompt == "$", path
        if path.parent != REVIEWED:
            shown.add(words[1])
    missing = set(COMMANDS) - shown
    assert not missing, f"no reviewed screen shows: {', '.join(sorted(missing))}"


def test_every_command_is_in_one_section() -> None:
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(COMMANDS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_lines_that_the_command_takes(name: str) -> None:
    first, _, part = name.partition(" ")
    root = _build()
    context = root.make_context("hlaunch", [first, *shlex.split(part)])
    command = root.get_command(context, first)
    if part:
        command = command.get_command(context, part)
    *_, examples = (REVIEWED / f"{name.replace(' ', '-')}.txt").read_text().partition("Examples:\n")
    assert examples
    assert all("  # " in line for line in examples.splitlines()), "an example takes more than its line"
    for line, _ in EXAMPLES[name]:
        words = shlex.split(
            line.removeprefix('eval "$(').removesuffix(')"').removeprefix("hlaunch ").partition(" >")[0]
        )
        assert words[: len(name.split())] == name.split()
        command.make_context(name, words[len(name.split()) :])
