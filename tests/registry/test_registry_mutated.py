"""5,000 registries, each broken in one known place: the first message names the kind, the line and the column."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from launcher.errors import Issue, RegistryInvalid
from launcher.registry import parse_registry
from launcher.registry.flags import flags
from launcher.registry.shapes import DOCUMENT, Items, Keys, Names

SOUND = """\
version: 1
defaults:
  dtype: auto
  cluster: pair
profiles:
  long:
    max-model-len: 64k
    max-num-seqs: 4
clusters:
  pair:
    platform: hopper
    fabric:
      rdma: required
      subnet: 10.0.0.0/24
      mtu: 9000
      tc: 106
      timeout: 20
      merge-nics: true
    ray:
      port: 6379
      dashboard-host: 127.0.0.1
      object-store-memory: 2GiB
    container:
      ipc: private
      shm-size: 16GiB
      gpu-mode: reservation
    env:
      NCCL_DEBUG: WARN
    nodes:
      - name: one
        role: head
        ip: 10.0.0.1
        gpus: 8
        ifname: eth0
      - name: two
        role: worker
        ip: 10.0.0.2
        gpus: 8
models:
  small:
    model: tiny-oss
    device: cpu
    seed: 1
    enforce-eager: true
  large:
    model: openai/gpt-oss-120b
    tensor-parallel-size: 8
    pipeline-parallel-size: 2
    gpu-memory-utilization: 0.5
    max-num-seqs: 8
    kv-cache-dtype: auto
    drain-timeout: 30s
    max-body-size: 8MiB
    scheduling-policy: fcfs
    async-scheduling: false
    block-size: 32
    port: 8000
    ready:
      timeout: 900s
    placement:
      strategy: pack
"""
COUNT = 5000


@dataclass(frozen=True, slots=True)
class Line:
    """One `key: value` of the sound registry. `column` of its key, from 1; `value` empty for a mapping."""

    number: int
    column: int
    key: str
    value: str

    @property
    def value_column(self) -> int:
        return self.column + len(self.key) + 2


def lines_of(text: str) -> list[Line]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        body = line.lstrip(" -")
        key, _, value = body.partition(":")
        found.append(Line(number, len(line) - len(body) + 1, key, value.strip()))
    return found


LINES = lines_of(SOUND)
LEAVES = [line for line in LINES if line.value]
NUMBERS = [
    line
    for line in LEAVES
    if line.value.replace(".", "").isdigit() and line.key not in ("ip", "dashboard-host", "seed")
]
CHOICES = [line for line in LEAVES if line.key in ("dtype", "platform", "rdma", "ipc", "gpu-mode", "role", "device",
                                                   "kv-cache-dtype", "scheduling-policy", "strategy")]  # fmt: skip
BOOLEANS = [line for line in LEAVES if line.value in ("true", "false")]
OPTIONS = [line for line in LINES if line.key not in ("pair", "small", "large", "long", "NCCL_DEBUG")]


def all_words(shape: Keys) -> set[str]:
    words = set(shape.proposals) | set(shape.table.spellings) | set(shape.elsewhere)
    for below in shape.below.values():
        words |= all_words(below) if isinstance(below, Keys) else set()
        words |= all_words(below.item) if isinstance(below, (Names, Items)) else set()
    return words


WORDS = all_words(DOCUMENT) | set(flags()) | {name.replace("-", "_") for name in flags()}

Broken = tuple[str, set[str], int, int | None]
"""The text, the codes that are right, the line, and the column (None: anywhere on it)."""


def with_line(line: Line, new: str) -> str:
    """The registry with one line rewritten behind its indentation."""
    lines = SOUND.splitlines()
    lines[line.number - 1] = lines[line.number - 1][: line.column - 1] + new
    return "\n".join(lines) + "\n"


def with_value(line: Line, value: str) -> str:
    return with_line(line, f"{line.key}: {value}")


def misspelt_key(dice: random.Random) -> Broken:
    line = dice.choice(OPTIONS)
    while True:
        at = dice.randrange(len(line.key))
        other = dice.choice("abcdefghijklmnopqrstuvwxyz")
        word = dice.choice([line.key[:at] + line.key[at + 1 :], line.key[:at] + other + line.key[at:]])
        if word and word not in WORDS and not word.startswith(("x-", "no-", "-")):
            break
    return with_line(line, f"{word}: {line.value}".rstrip()), {"unknown-key"}, line.number, line.column


def repeated_key(dice: random.Random) -> Broken:
    line = dice.choice([item for item in LEAVES if item.key != "name"])
    spelled = line.key.replace("-", "_") if dice.random() < 0.5 else line.key
    lines = SOUND.splitlines()
    lines.insert(line.number, " " * (line.column - 1) + f"{spelled}: {line.value}")
    return "\n".join(lines) + "\n", {"duplicate-key", "two-spellings"}, line.number + 1, line.column


def wrong_number(dice: random.Random) -> Broken:
    line = dice.choice(NUMBERS)
    value = dice.choice(["many", "true", "[1]", "{a: 1}", "'7'", "010", "0x1F", "1_0", ".inf", ".nan", "-5", "1e400",
                         "22:30", "9" * 25, "99999999999"])  # fmt: skip
    codes = {"wrong-type", "ambiguous-number", "not-finite", "out-of-range", "unknown-value"}
    return with_value(line, value), codes, line.number, line.value_column


def wrong_choice(dice: random.Random) -> Broken:
    line = dice.choice(CHOICES)
    value = dice.choice(["nothing-of-this", line.value + "x", line.value.upper(), "[a]", "{a: b}", "7"])
    return with_value(line, value), {"unknown-value", "wrong-type"}, line.number, line.value_column


def wrong_boolean(dice: random.Random) -> Broken:
    line = dice.choice(BOOLEANS)
    value = dice.choice(["yes", "no", "on", "Off", "1", "0", "'true'", "tru", "[true]", "y"])
    return with_value(line, value), {"wrong-type"}, line.number, line.value_column


def wrong_shape(dice: random.Random) -> Broken:
    line = dice.choice([item for item in LEAVES if item.key not in ("NCCL_DEBUG", "version")])
    return with_value(line, dice.choice(["{a: b}", "[[a]]"])), {"wrong-type"}, line.number, None


def forbidden_syntax(dice: random.Random) -> Broken:
    line = dice.choice(LEAVES)
    value, codes = dice.choice(
        [("!mine x", {"custom-tag"}), ("!!binary x", {"custom-tag"}), ("*nobody", {"unknown-anchor"}),
         ("@x", {"syntax"}), ("a: b", {"syntax"}), ('"\\q"', {"syntax"}), ("`x", {"syntax"})]
    )  # fmt: skip
    return with_value(line, value), codes, line.number, None


def unclosed(dice: random.Random) -> Broken:
    line = dice.choice(LEAVES)
    text = with_value(line, dice.choice(["[a", "{a: b", '"a', "'a"]))
    return text, {"syntax"}, 0, None


def control_character(dice: random.Random) -> Broken:
    line = dice.choice(LEAVES)
    at = dice.randrange(len(line.value) + 1)
    value = line.value[:at] + dice.choice("\x00\x01\x07\x1b\x7f") + line.value[at:]
    return with_value(line, value), {"bad-character"}, line.number, line.value_column + at


def bad_indentation(dice: random.Random) -> Broken:
    line = dice.choice([item for item in LEAVES if item.column > 3 and item.key != "name"])
    lines = SOUND.splitlines()
    lines[line.number - 1] = "\t" + lines[line.number - 1].lstrip()
    return "\n".join(lines) + "\n", {"syntax"}, 0, None


def missing_line(dice: random.Random) -> Broken:
    line = dice.choice([item for item in LINES if item.key in ("model", "ip", "nodes", "models")])
    lines = SOUND.splitlines()
    if line.key in ("nodes", "models"):
        end = next((item.number for item in LINES[line.number :] if item.column <= line.column - 2 * (line.key == "x")
                    and item.column <= line.column), len(LINES) + 1)  # fmt: skip
        del lines[line.number - 1 : end - 1]
    else:
        del lines[line.number - 1]
    return "\n".join(lines) + "\n", {"missing-key"}, 0, None


def wrong_reference(dice: random.Random) -> Broken:
    line = next(item for item in LEAVES if item.key == "cluster")
    return with_value(line, dice.choice(["pairs", "x", "p"])), {"unknown-ref"}, line.number, line.value_column


def wrong_name(dice: random.Random) -> Broken:
    line = dice.choice([item for item in LINES if item.key in ("pair", "small", "large", "long")])
    name = dice.choice(["--help", "-x", "a b", "''", "[a]", "é", "x" * 129, "~"])
    return with_line(line, f"{name}:"), {"bad-name", "bad-key"}, line.number, line.column


def wrong_address(dice: random.Random) -> Broken:
    line = dice.choice([item for item in LEAVES if item.key in ("ip", "subnet", "dashboard-host")])
    value = dice.choice(["host-a", "10.0.0", "10.0.0.300", "10.0.0.1:80", "::g", "10.0.0.5/40", "localhost"])
    return with_value(line, value), {"bad-address"}, line.number, line.value_column


def wrong_quantity(dice: random.Random) -> Broken:
    keys = ("max-model-len", "object-store-memory", "shm-size", "drain-timeout", "max-body-size")
    line = dice.choice([item for item in LEAVES if item.key in keys])
    value = dice.choice(["4G", "lots", "-1s", "1.5.2k", "4 GiBs", "[4GiB]", "1e999", "k", "99999999999999PiB"])
    return with_value(line, value), {"wrong-type", "out-of-range"}, line.number, line.value_column


WAYS: list[Callable[[random.Random], Broken]] = [
    misspelt_key, repeated_key, wrong_number, wrong_choice, wrong_boolean, wrong_shape, forbidden_syntax, unclosed,
    control_character, bad_indentation, missing_line, wrong_reference, wrong_name, wrong_address, wrong_quantity,
]  # fmt: skip


def test_the_sound_one_is_sound() -> None:
    assert parse_registry(SOUND).issues == ()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_each_broken_registry_has_one_clear_message_at_its_place(way: Callable[[random.Random], Broken]) -> None:
    dice = random.Random(way.__name__)
    seen: Counter[str] = Counter()
    for _ in range(-(-COUNT // len(WAYS))):
        text, codes, line, column = way(dice)
        start = time.process_time()
        with pytest.raises(RegistryInvalid) as caught:
            parse_registry(text, "r.yml")
        assert time.process_time() - start < 1.0
        assert caught.value.exit_code == 3
        errors = [issue for issue in caught.value.issues if issue.severity == "error"]
        expected = [issue for issue in errors if issue.code in codes]
        assert expected, (text, errors)
        judge(errors, text)
        if line:
            assert expected[0].line == line, (text, errors)
        if column:
            assert expected[0].column == column, (text, errors)
        # A lost line may leave a rule unsatisfied beside the message about itself, never a heap of messages.
        assert len(errors) <= 2, (text, errors)
        seen[expected[0].code] += 1
    assert seen


def judge(errors: list[Issue], text: str) -> None:
    count = len(text.splitlines())
    for issue in errors:
        assert issue.line is not None
        assert 1 <= issue.line <= count + 1
        assert issue.column is not None
        assert issue.column >= 1
        assert issue.message
        assert issue.hint
        assert issue.headline().isprintable()
        assert len(issue.headline()) < 400
