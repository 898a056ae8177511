"""`validate` says what every plan would refuse: values of no device, sizes that a model at hand forbids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from registry_support import Here

from engine.config import BUNDLED_MODELS
from launcher.plan.entry_checks import JUDGED, entry_issues
from launcher.registry import parse_registry
from launcher.registry.keys import KEYS


@pytest.mark.parametrize(
    ("option", "code", "column"),
    [
        ("tp: 3", "heads-tp", 31),
        ("pp: 50", "layers-pp", 31),
        ("max-model-len: 1000000", "context-too-long", 42),
        ("tool-call-parser: hermes", "unsupported-value", 45),
        ("reasoning-parser: x", "unsupported-value", 45),
        ("tokenizer: org/t", "unsupported-value", 38),
        ("kv-cache-dtype: fp8", "unsupported-value", 43),
        ("dtype: float16", "unsupported-value", 34),
    ],
)
def test_what_plan_refuses_is_not_valid(here: Here, option: str, code: str, column: int) -> None:
    here.write(f"models:\n  m: {{model: tiny-oss,    {option}}}\n  other: {{model: tiny-oss}}\n")
    result = here("validate", "--json")
    assert result.code == 3
    (issue,) = json.loads(result.out)["issues"]
    assert (issue["code"], issue["line"], issue["column"]) == (code, 2, column)
    assert issue["hint"]
    assert here("plan", "m").code != 0
    assert here("list").code == 0, "one entry's mistake is not the file's"
    assert here("plan", "other").code == 0


def test_a_model_that_is_not_here_is_a_warning(here: Here) -> None:
    here.write(
        "models: {a: {model: tiny-os}, b: {model: ./nowhere}, c: {model: org/name}, d: {model: openai/gpt-oss-20b}}"
    )
    result = here("validate")
    assert result.code == 0
    assert result.err.count("warning[model-absent]") == 2
    assert "did you mean 'tiny-oss'?" in result.err
    assert here("validate", "--strict").code == 3


def test_a_folder_beside_the_registry_is_read(here: Here, tmp_path: Path) -> None:
    config = json.loads((BUNDLED_MODELS["tiny-oss"] / "config.json").read_text())
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    here.write("defaults: {max-model-len: 4096}\nmodels:\n  m: {model: ./mine}\n  n: {model: ./mine}\n")
    result = here("validate")
    assert result.err.count("error[context-too-long] defaults.max-model-len") == 1
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": "many"}))
    assert "model_registry.yml:3:14: error[model-config] models.m.model" in here("validate").err


def test_values_of_profiles_and_overrides_are_judged_where_they_stand() -> None:
    registry = parse_registry(
        "profiles: {p: {dtype: half}}\n"
        "models:\n  m:\n    model: org/m\n    profiles: {q: {kv-cache-dtype: fp8}}\n"
        "    overrides: {hopper: {dtype: float16}}\n"
    )
    assert [(issue.line, issue.path) for issue in entry_issues(registry, {})] == [
        (1, "profiles.p.dtype"),
        (5, "models.m.profiles.q.kv-cache-dtype"),
        (6, "models.m.overrides.hopper.dtype"),
    ]


def test_the_schema_advertises_no_value_that_every_plan_refuses() -> None:
    assert {spec.key for spec in KEYS.values() if spec.refusal} == set(JUDGED)
    for key in JUDGED:
        spec = KEYS[key]
        offered = [choice for choice in spec.choices if choice not in spec.refused]
        assert [choice for choice in offered if spec.refusal_of(choice) is not None] == []
        assert all(spec.refusal_of(choice) is not None for choice in spec.refused)
