"""The layers between a default and a flag: platform, extends, overrides, profiles, and what each value remembers."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from registry_support import Here

from launcher.errors import RegistryInvalid, UnknownName
from launcher.registry import Layer, Registry, parse_registry, resolve

WHOLE = """\
version: 1
defaults: {max-num-seqs: 2, env: {V: defaults}}
profiles:
  big: {max-num-seqs: 6, env: {V: shared}}
  slow: {enforce-eager: true}
clusters:
  c:
    platform: gb10
    env: {V: cluster}
    nodes: [{name: n, role: head, ip: 10.0.0.1, gpus: 1, env: {V: node}}]
models:
  base: {model: org/base, max-num-seqs: 3, tags: [t], aliases: [b], description: d, env: {V: extends}}
  m:
    extends: base
    max-num-seqs: 4
    cluster: c
    env: {V: model}
    overrides:
      gb10: {max-num-seqs: 5, env: {V: overrides}}
      hopper: {max-num-seqs: 50}
    profiles:
      big: {enforce-eager: true, max-num-seqs: 7}
"""


def whole() -> Registry:
    return parse_registry(WHOLE, "r.yml")


def test_every_layer_stands_where_the_page_says() -> None:
    environ = {"HLAUNCH_MAX_NUM_SEQS": "8"}
    entry = resolve(whole(), "m", environ, ["max-num-seqs=9", "env.V=flag"], profiles=["big"], node="n")
    item = entry.values["max-num-seqs"]
    assert [(below.value, str(below.origin)) for below in (*item.shadowed, item)] == [
        (16, "built-in"),
        (2, "defaults (r.yml:2:26)"),
        (3, "extends base (r.yml:12:41)"),
        (4, "model (r.yml:15:19)"),
        (5, "overrides gb10 (r.yml:19:28)"),
        (6, "profile big (r.yml:4:23)"),
        (7, "profile big (r.yml:22:48)"),
        (8, "environment ($HLAUNCH_MAX_NUM_SEQS)"),
        (9, "flag (--set max-num-seqs)"),
    ]
    layers = [below.origin.layer for below in (*entry.env["V"].shadowed, entry.env["V"])]
    assert layers == [
        Layer.DEFAULTS,
        Layer.EXTENDS,
        Layer.MODEL,
        Layer.OVERRIDES,
        Layer.PROFILE,
        Layer.CLUSTER,
        Layer.NODE,
        Layer.FLAG,
    ]
    utilization = entry.values["gpu-memory-utilization"]
    assert [str(below.origin) for below in (*utilization.shadowed, utilization)] == ["built-in", "platform gb10"]
    order = list(Layer)
    for value in (*entry.values.values(), *entry.env.values()):
        ranks = [order.index(below.origin.layer) for below in (*value.shadowed, value)]
        assert ranks == sorted(ranks)
    assert (entry.platform, entry.profiles) == ("gb10", ("big",))


def test_what_an_entry_says_about_itself_is_not_inherited() -> None:
    entry = resolve(whole(), "m")
    assert entry.model == "org/base"
    assert entry.texts("tags") == entry.texts("aliases") == ()
    assert entry.text_or_none("description") is None
    assert whole().models["m"].model == "org/base"


def test_profiles_stack_from_left_to_right_and_come_from_a_variable() -> None:
    assert resolve(whole(), "m", {"HLAUNCH_PROFILE": "big, slow"}).profiles == ("big", "slow")
    assert resolve(whole(), "m", {"HLAUNCH_PROFILE": "big"}, profiles=["slow"]).integer("max-num-seqs") == 5
    assert resolve(whole(), "base", profiles=["big"]).integer("max-num-seqs") == 6
    with pytest.raises(UnknownName, match="profile 'bgi' is not in r.yml for m") as caught:
        resolve(whole(), "m", profiles=["bgi"])
    assert caught.value.exit_code == 4
    assert "'big'" in caught.value.hint


def test_the_clusters_platform_wins_over_what_this_machine_is() -> None:
    assert resolve(whole(), "m", platform="hopper").integer("max-num-seqs") == 5
    alone = resolve(whole(), "m", {}, ["cluster=none"], platform="hopper")
    assert (alone.integer("max-num-seqs"), alone.platform) == (50, "hopper")
    assert resolve(whole(), "m", {}, ["cluster=none"]).integer("max-num-seqs") == 4


def test_bases_go_left_to_right_and_a_shared_one_stays_below() -> None:
    registry = parse_registry(
        "models:\n"
        "  root: {model: x, port: 1, seed: 1, max-queue: 1}\n"
        "  left: {extends: root, port: 2, seed: 2}\n"
        "  right: {extends: [root], port: 3}\n"
        "  both: {extends: [left, right]}\n"
        "  by-alias: {extends: l2}\n"
        "  l2-owner: {extends: left, aliases: [l2], max-queue: 9}\n"
    )
    both = resolve(registry, "both")
    assert [both.integer(key) for key in ("port", "seed", "max-queue")] == [3, 2, 1]
    assert [base.name for base in registry.models["both"].bases] == ["root", "left", "right"]
    assert resolve(registry, "by-alias").integer("max-queue") == 9


@pytest.mark.parametrize(
    ("text", "code", "line", "column", "says"),
    [
        ("models:\n  a: {extends: a}\n", "extends-cycle", 2, 16, "a -> a"),
        (
            "models:\n  a: {extends: b}\n  b: {extends: [c]}\n  c: {extends: [a]}\n",
            "extends-cycle",
            4,
            17,
            "a -> b -> c -> a",
        ),
        ("models:\n  a: {model: x}\n  b: {extends: [a, aa]}\n", "unknown-ref", 3, 20, "'aa'"),
        ("models:\n  a: {extends: b}\n  b: {port: 1}\n", "missing-key", 2, 3, "what to serve"),
        ("models:\n  a: {extends: b}\n  b: {extends: [c, q]}\n  c: {tp: 1}\n", "unknown-ref", 3, 20, "'q'"),
        ("models:\n  a: {model: x, overrides: {gb1: {tp: 2}}}\n", "unknown-key", 2, 29, "platform"),
        ("models:\n  a: {model: x, overrides: {gb10: {model: y}}}\n", "model-only", 2, 36, "one model"),
        ("models:\n  a: {model: x, profiles: {p: {extends: a}}}\n", "model-only", 2, 32, "one model"),
        ("models:\n  a: {model: x, profiles: {p: {max-num-seqs: 5000}}}\n", "step-budget", 2, 46, "2048"),
        ("models:\n  a: {model: x, overrides: {cpu: {max-num-seqs: 5000}}}\n", "step-budget", 2, 49, "2048"),
        ("profiles: {p: {prot: 1}}\nmodels: {a: {model: x}}\n", "unknown-key", 1, 16, "not a known"),
        ("profiles: {-p: {}}\nmodels: {a: {model: x}}\n", "bad-name", 1, 12, "name a profile"),
        ("models:\n  a: {model: x, extends: {}}\n", "wrong-type", 2, 26, "a list"),
    ],
)
def test_mistakes_between_entries(text: str, code: str, line: int, column: int, says: str) -> None:
    with pytest.raises(RegistryInvalid) as caught:
        parse_registry(text)
    found = [issue for issue in caught.value.issues if issue.code == code]
    assert (found[0].line, found[0].column) == (line, column)
    assert says in found[0].message
    assert found[0].hint
    if "missing-key" not in {issue.code for issue in caught.value.issues}:
        assert len(caught.value.issues) == 1


@pytest.mark.parametrize("step", [1, -1])
def test_a_long_chain_of_bases_is_refused_in_time(step: int) -> None:
    numbers = range(1, 5000)[::step]
    lines = ["models:", *(f"  e{i}: {{extends: e{i - 1}}}" for i in numbers), "  e0: {model: x}"]
    start = time.process_time()
    with pytest.raises(RegistryInvalid) as caught:
        parse_registry("\n".join(lines))
    assert time.process_time() - start < 1.0
    assert {issue.code for issue in caught.value.issues} == {"extends-too-many"}
    assert "models.e65.extends" in {issue.path for issue in caught.value.issues}


GRAPHS = st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(GRAPHS)
def test_any_graph_of_bases_resolves_or_is_refused(graph: list[list[int]]) -> None:
    names = range(len(graph))
    lists = [", ".join(f"e{base}" for base in bases) for bases in graph]
    lines = [f"  e{i}: {{model: m{i}, extends: [{bases}]}}" for i, bases in enumerate(lists)]
    edges = {i: {base for base in bases if base in names} for i, bases in enumerate(graph)}
    is_unknown = any(base not in names for bases in graph for base in bases)
    reach = {i: set(edges[i]) for i in names}
    for _ in names:
        for i in names:
            reach[i] |= {far for near in reach[i] for far in reach[near]}
    has_cycle = any(i in reach[i] for i in names)
    text = "models:\n" + "\n".join(lines)
    try:
        registry = parse_registry(text)
    except RegistryInvalid as error:
        codes = {issue.code for issue in error.issues}
        assert codes == ({"unknown-ref"} if is_unknown else set()) | ({"extends-cycle"} if has_cycle else set())
        return
    assert not is_unknown
    assert not has_cycle
    for i in names:
        bases = [base.name for base in registry.models[f"e{i}"].bases]
        assert set(bases) == {f"e{base}" for base in reach[i]}
        for position, name in enumerate(bases):
            assert not {f"e{base}" for base in edges[int(name[1:])]} & set(bases[position:])


def test_the_command_line_chooses_profiles_and_shows_where_values_stand(here: Here) -> None:
    here.write(WHOLE)
    shown = json.loads(here("show", "m", "--profile", "big", "--node", "n", "--json").out)
    assert (shown["cluster"], shown["platform"], shown["profiles"]) == ("c", "gb10", ["big"])
    assert shown["values"]["max-num-seqs"]["value"] == 7
    assert shown["values"]["max-num-seqs"]["origin"]["name"] == "big"
    assert shown["env"]["V"]["value"] == "node"
    explained = here("--profile=big", "show", "m", "--explain")
    assert "profile big" in explained.out
    assert "over 5" in explained.out
    assert max(len(line) for line in explained.out.splitlines()) <= 80
    assert here("show", "m", "--profile", "nope").code == 4
    assert here("show", "m", "--platform", "h100").code == 2
    assert here("show", "m", HLAUNCH_PROFILE="nope").code == 4
    assert here("show", "m", "--node", "x").code == 4
