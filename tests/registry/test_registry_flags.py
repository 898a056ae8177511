"""vLLM's options: each has one status and a reason; in a registry they are keys, notes, or errors with the reason."""

from __future__ import annotations

import re

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from registry_support import Here

from launcher.errors import Issue, OverrideError, RegistryInvalid
from launcher.registry import parse_registry, resolve
from launcher.registry.editing import add_entry, set_value
from launcher.registry.flags import Flag, find_flag, find_negated, flags
from launcher.registry.keys import KEYS, SPELLINGS
from launcher.registry.schema import json_schema


def test_the_table_is_large_and_each_row_complete() -> None:
    table = flags()
    assert len(table) >= 295
    for name, flag in table.items():
        assert name == flag.name
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
        assert flag.status in ("native", "accepted", "unsupported")
        assert (flag.status == "native") == (name in KEYS)
        assert bool(flag.reason) == (flag.status != "native")
        assert flag.reason == flag.reason.strip()
    shorts = [short for flag in table.values() for short in flag.shorts]
    assert len(shorts) == len(set(shorts))
    assert not set(shorts) & set(table)


def test_the_seven_keys_of_the_seed_are_native() -> None:
    for name in ("model", "dtype", "tensor-parallel-size", "gpu-memory-utilization", "max-num-seqs", "max-model-len"):
        assert flags()[name].status == "native"


def one(line: str) -> str:
    return f"models:\n  m:\n    model: tiny-oss\n    {line}\n"


@pytest.mark.parametrize("flag", [flag for flag in flags().values() if flag.status != "native"], ids=lambda f: f.name)
def test_every_option_in_a_registry_is_a_note_or_an_error(flag: Flag) -> None:
    validator = jsonschema.Draft202012Validator(json_schema_once())
    for name in (flag.name, flag.name.replace("-", "_")):
        text = one(f"{name}: something")
        try:
            issues = parse_registry(text).issues
        except RegistryInvalid as error:
            issues = error.issues
        (issue,) = issues
        expected = ("info", "accepted-flag") if flag.status == "accepted" else ("error", "unsupported-flag")
        assert (issue.severity, issue.code, issue.line, issue.column) == (*expected, 4, 5)
        assert flag.reason in issue.message
        assert issue.path == f"models.m.{flag.name}"
        assert validator.is_valid(yaml.safe_load(text)) == (flag.status == "accepted")
    for off in ("false", "null", "0", "none"):
        assert {issue.severity for issue in parse_registry(one(f"{flag.name}: {off}")).issues} <= {"info"}
        assert validator.is_valid(yaml.safe_load(one(f"{flag.name}: {off}")))


_SCHEMA: list[object] = []


def json_schema_once() -> object:
    if not _SCHEMA:
        _SCHEMA.append(json_schema())
    return _SCHEMA[0]


def test_an_accepted_option_changes_nothing() -> None:
    plain = resolve(parse_registry(one("port: 9000")), "m")
    noted = resolve(parse_registry(one("port: 9000\n    swap-space: 4\n    compilation-config: {mode: 3}")), "m")
    assert {key: item.value for key, item in plain.values.items()} == {
        key: item.value for key, item in noted.values.items()
    }


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("enable-loar: true", "'enable-lora'"),
        ("no-enable-prefix-caching: true", "enable-prefix-caching: false"),
        ("no-enable-lora: true", "remove it"),
        ("swap_spac: 4", "'swap-space'"),
    ],
)
def test_a_wrong_option_is_guessed_among_vllms_too(line: str, hint: str) -> None:
    with pytest.raises(RegistryInvalid) as caught:
        parse_registry(one(line))
    assert hint in caught.value.issues[0].hint


def test_short_forms_and_negations_are_of_the_command_line_only() -> None:
    assert find_flag("tp") is flags()["tensor-parallel-size"]
    assert find_flag("q") is flags()["quantization"]
    assert find_flag("max_num_seqs") is flags()["max-num-seqs"]
    assert find_flag("nothing") is None
    assert find_negated("no-enable-prefix-caching") is flags()["enable-prefix-caching"]
    assert find_negated("no-port") is None
    assert "q" not in SPELLINGS


@pytest.mark.parametrize(
    ("line", "code", "path", "words"),
    [
        ("dcp: 2", "unsupported-flag", "decode-context-parallel-size", "tensor, pipeline and data"),
        ("pcp: 2", "unsupported-flag", "prefill-context-parallel-size", "tensor, pipeline and data"),
        ("asc: 2", "accepted-flag", "api-server-count", "one process for HTTP"),
        ("max-parallel-loading-workers: 2", "accepted-flag", "max-parallel-loading-workers", "reads its own part"),
        ("enable-reasoning: true", "accepted-flag", "enable-reasoning", "always on"),
        ("engine-use-ray: true", "accepted-flag", "engine-use-ray", "cluster in the registry"),
        ("worker_use_ray: true", "accepted-flag", "worker-use-ray", "cluster in the registry"),
    ],
)
def test_short_and_old_names_are_known(line: str, code: str, path: str, words: str) -> None:
    try:
        issues = parse_registry(one(line)).issues
    except RegistryInvalid as error:
        issues = error.issues
    assert [(issue.code, issue.path) for issue in issues] == [(code, f"models.m.{path}")]
    assert words in issues[0].message
    assert "did you mean" not in issues[0].hint


def outside(text: str) -> tuple[Issue, ...]:
    try:
        return resolve(parse_registry(one("port: 9000")), "m", {}, [text]).issues
    except OverrideError as error:
        return tuple(error.issues)


@pytest.mark.parametrize("value", ["something", "0", "1"])
@pytest.mark.parametrize("flag", [flag for flag in flags().values() if flag.status != "native"], ids=lambda f: f.name)
def test_an_override_is_told_what_a_file_is(flag: Flag, value: str) -> None:
    try:
        in_file = parse_registry(one(f"{flag.name}: {value}")).issues
    except RegistryInvalid as error:
        in_file = tuple(error.issues)
    said = [(issue.severity, issue.code, issue.message) for issue in in_file]
    for name in (flag.name, flag.name.replace("-", "_"), *flag.shorts):
        found = outside(f"{name}={value}")
        assert [(issue.severity, issue.code, issue.message) for issue in found] == said
        assert found[0].path == flag.name
    for edit in (
        lambda: set_value(one("port: 9000"), "r.yml", "m", flag.name, value),
        lambda: add_entry(one("port: 9000"), "r.yml", "n", [("model", "org/n"), (flag.name, value)]),
    ):
        with pytest.raises(OverrideError) as caught:
            edit()
        assert [(issue.code, issue.message) for issue in caught.value.issues] == [said[0][1:]]


@pytest.mark.parametrize(
    ("text", "code", "hint"),
    [
        ("compilation-config.mode=3", "accepted-flag", "leave it out"),
        ("no-enable-prefix-caching=true", "unknown-key", "write enable-prefix-caching=false"),
        ("no-enable-lora=true", "unknown-key", "leave it out"),
        ("swap_spac=4", "unknown-key", "did you mean 'swap-space'?"),
    ],
)
def test_an_override_is_guessed_among_vllms_options_too(text: str, code: str, hint: str) -> None:
    assert [(issue.code, issue.hint) for issue in outside(text)] == [(code, hint)]


def test_the_command_names_the_option_that_was_meant(here: Here) -> None:
    refused = here("plan", "first", "--set", "dcp=2")
    assert refused.code == 2
    assert "--set dcp: error[unsupported-flag] decode-context-parallel-size: the engine splits" in refused.err
    assert "did you mean" not in refused.err
    noted = here("plan", "first", "--set", "attention-backend=x")
    assert noted.code == 0
    assert "--set attention-backend: info[accepted-flag] attention-backend: no effect" in noted.err
    variable = here("show", "first", HLAUNCH_DCP="2")
    assert variable.code == 0
    assert "warning[unknown-variable] decode-context-parallel-size: the engine splits" in variable.err
