"""No value of a registry can become YAML, a variable, a command or another type: 5,000, through real Compose."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from compose_support import CPU, make_plan, read_back, write_files
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.compose.render import render
from launcher.compose.yaml_text import Interpolated, dump, escaped
from launcher.errors import HlaunchError
from launcher.plan.environment import Variable

NUM_VALUES = 5000
VALUES_PER_FILE = 250
PIECES = (
    "${HLAUNCH_API_KEY}",
    "$HLAUNCH_API_KEY",
    "${X:-y}",
    "${X:?boom}",
    "$$",
    "$",
    "$(id)",
    "`id`",
    "'; rm -rf /; '",
    '"; rm',
    "\n",
    "\r\n",
    "\t",
    " ",
    "\\",
    "\\n",
    "\u2028",
    "\u2029",
    "\x85",
    "\ufeff",
    "\x7f",
    "\x01",
    "\x1b[31m",
    "- x: y",
    "\n- x: y",
    ": ",
    "# comment",
    " #",
    "{",
    "}",
    "[",
    "]",
    "{{.Env}}",
    "%",
    "@",
    "!",
    "!!python/object",
    "!reset",
    "&a",
    "*a",
    "<<: *x",
    "---",
    "...",
    "|",
    ">",
    "~",
    "null",
    "yes",
    "no",
    "on",
    "010",
    "0x1f",
    "1e3",
    "1_000",
    "1.10",
    "12:30:45",
    "true",
    ".inf",
    "é",
    "日本",
    "\U0001f600",
    "\u202e",
    "--privileged",
    "-v/:/host",
    "KIND=value",
    "/run/secrets/ray_token",
    "\n    privileged: true",
    "A" * 300,
)


def hostile_values(seed: int, count: int) -> Iterator[str]:
    """Concatenations of what breaks templates, a few of them 64 KiB long."""
    choose = random.Random(seed)
    for index in range(count):
        text = "".join(choose.choices(PIECES, k=choose.randint(1, 8)))
        yield text * (1 + (64 << 10) // len(text)) if index % 100 == 99 else text


def undoubled(text: str) -> str:
    """Compose's `config` prints what it would read again: every `$` twice."""
    return text.replace("$$", "$")


@pytest.mark.parametrize("batch", range(NUM_VALUES // VALUES_PER_FILE))
def test_values_come_back_unchanged(batch: int, tmp_path: Path) -> None:
    values = list(hostile_values(seed=batch, count=VALUES_PER_FILE))
    wanted = {f"V{index:03}": value for index, value in enumerate(values)}
    plan = make_plan("open", CPU, wanted)
    # The same texts as names in the engine's configuration (JSON inside YAML), as model name and as label.
    server = replace(plan.nodes[0].config.server, served_model_names=tuple(values))
    head = replace(plan.nodes[0], config=replace(plan.nodes[0].config, server=server))
    plan = replace(plan, nodes=(head, *plan.nodes[1:]), entry=replace(plan.entry, name=values[0]), digest=values[1])
    files = render(plan)
    write_files(files, tmp_path)
    for folder, node in (("head", plan.nodes[0]), ("worker", plan.nodes[1])):
        document = read_back(tmp_path / folder)
        service = document["services"]["node"]
        found = {name: undoubled(service["environment"][name]) for name in wanted}
        assert found == wanted
        assert undoubled(service["labels"]["dev.hlaunch.model"]) == values[0]
        assert undoubled(service["labels"]["dev.hlaunch.plan"]) == values[1]
        assert service["command"][:3] == ["python", "-m", "launcher.node"]
        assert "privileged" not in service
        told = json.loads(undoubled(document["configs"]["node"]["content"]))
        assert (told["launch"], told["plan"], told["node"]) == (values[0], values[1], node.name)
    engine = json.loads(undoubled(read_back(tmp_path / "head")["configs"]["engine"]["content"]))
    assert engine["server"]["served_model_names"] == values


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=90), st.text(st.characters(codec="utf-8"))))
def test_any_text_is_read_back_by_another_reader(mapping: dict[str, str]) -> None:
    loaded = yaml.safe_load(dump({"values": dict(mapping)}))
    assert loaded == {"values": {key: escaped(value) for key, value in mapping.items()}}


def test_only_our_own_constants_are_interpolated() -> None:
    assert dump({"a": "${X}", "b": Interpolated("${X}")}) == 'a: "$${X}"\nb: "${X}"\n'


@pytest.mark.parametrize("value", ["a\0b", "half \ud800 pair"])
def test_what_no_environment_can_hold_is_refused(value: str) -> None:
    with pytest.raises(HlaunchError):
        render(make_plan("open", CPU, {"BAD": value}))


def test_a_name_is_short() -> None:
    with pytest.raises(HlaunchError, match="longer than"):
        dump({"x" * 1001: "1"})


def test_a_variable_needs_a_name() -> None:
    plan = make_plan("open", CPU)
    node = replace(plan.nodes[0], environment=(Variable("A\n    privileged", "1", "registry"),))
    with pytest.raises(HlaunchError, match="not a variable name"):
        render(replace(plan, nodes=(node, *plan.nodes[1:])))
