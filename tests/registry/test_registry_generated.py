"""Generated registries: whatever the text, a registry or located errors; never another exception, never slow."""

from __future__ import annotations

import time
from contextlib import suppress

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.errors import Issue, OverrideError, RegistryInvalid, UnknownName
from launcher.registry import Registry, parse_registry, resolve
from launcher.registry.keys import CLUSTER, ENVIRONMENT, KEYS, NODE, SPELLINGS, KeySpec, Kind, show_value

NASTY = ["", "~", "null", "yes", "off", "0755", "0x1F", "1_000", ".inf", ".nan", "22:30", "-1", "auto", "128k", "4GiB",
         "1e3", "1e999", "true", "[]", "{}", "[a]", "{a: b}", "'", '"', "*a", "&a x", "!t x", "- x", "a: b", "#", "|",
         ">", "@", "%", "`", "\t", "\x1b", "\u2028", "[/red]", "${X}", "--help", "{", "]", "<<", "? x"]  # fmt: skip

SCALARS = st.one_of(st.sampled_from(NASTY), st.text(max_size=12), st.integers().map(str), st.floats().map(str))
KEY_NAMES = st.one_of(st.sampled_from(sorted(SPELLINGS)), SCALARS)


CLUSTER_KEYS = sorted({key.split(".")[0] for key in CLUSTER.spellings})
NODE_KEYS = sorted(NODE.spellings)
CLUSTER_VALUES = st.sampled_from(
    [
        "cpu",
        "{port: 7000}",
        "{rdma: off}",
        "{subnet: 10.0.0.0/24}",
        "{worker-ports: [1, 2]}",
        "{A: 1}",
        "head",
        "[m_0]",
        "9",
    ]
)


@st.composite
def torn_registries(draw: st.DrawFn) -> str:
    """A registry's shape with anything in its holes, then perhaps a byte less or more."""
    lines = [
        draw(st.sampled_from(["version: 1", "x-a: &a {port: 1}", ""])),
        draw(st.sampled_from(["defaults:", "x-d:"])),
    ]
    lines += [f"  {draw(KEY_NAMES)}: {draw(SCALARS)}" for _ in range(draw(st.integers(0, 3)))]
    if draw(st.booleans()):
        lines += ["clusters:", f"  {draw(st.one_of(st.just('c'), SCALARS))}:"]
        keys = draw(st.lists(st.one_of(st.sampled_from(CLUSTER_KEYS), KEY_NAMES), max_size=3))
        lines += [f"    {key}: {draw(st.one_of(SCALARS, CLUSTER_VALUES))}" for key in keys]
        lines += ["    nodes:"]
        for _ in range(draw(st.integers(0, 3))):
            lines += [
                f"      - name: {draw(st.one_of(st.sampled_from('ab'), SCALARS))}",
                f"        {draw(st.sampled_from(NODE_KEYS))}: {draw(st.one_of(SCALARS, CLUSTER_VALUES))}",
                f"        ip: {draw(st.one_of(st.sampled_from(['10.0.0.1', '10.0.0.2', '::1']), SCALARS))}",
            ]
    if draw(st.booleans()):
        lines += ["profiles:", f"  {draw(SCALARS)}: {{{draw(KEY_NAMES)}: {draw(SCALARS)}}}"]
    lines += ["models:"]
    for _ in range(draw(st.integers(0, 3))):
        lines += [
            f"  {draw(st.one_of(st.just('m'), SCALARS))}:",
            f"    model: {draw(st.one_of(st.just('x'), SCALARS))}",
            f"    {draw(st.sampled_from(['cluster: c', 'extends: m', 'extends: [m, n]', 'cluster: none', '']))}",
        ]
        lines += [f"    {draw(KEY_NAMES)}: {draw(SCALARS)}" for _ in range(draw(st.integers(0, 4)))]
    text = "\n".join(lines) + "\n"
    cut = draw(st.integers(0, len(text)))
    return draw(st.sampled_from([text, text[:cut], text[:cut] + draw(SCALARS) + text[cut:]]))


def judge(text: str) -> Registry | None:
    start = time.process_time()  # CPU time: a busy machine is not a slow loader
    registry: Registry | None = None
    issues: tuple[Issue, ...] = ()
    try:
        registry = parse_registry(text, "r.yml")
    except RegistryInvalid as error:
        issues = error.issues
    if registry is None:
        for issue in issues:
            assert issue.line is not None
            assert issue.line >= 1
            assert issue.column is not None
            assert issue.column >= 1
            assert issue.message
            assert "\n" not in issue.headline()
        assert any(issue.severity == "error" for issue in issues)
    assert time.process_time() - start < 1.0
    return registry


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(torn_registries())
def test_a_torn_registry_gives_located_errors(text: str) -> None:
    registry = judge(text)
    for name in registry.models if registry is not None else ():
        assert resolve(registry, name).model  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=200), st.text(alphabet="[]{}:,-&*!|>'\"#%@` \n\tab<", max_size=200)))
def test_any_text_gives_located_errors(text: str) -> None:
    judge(text)


def values_of(spec: KeySpec) -> st.SearchStrategy[str]:
    """Texts that this key accepts, in the range where no rule between keys can object."""
    match spec.kind:
        case Kind.CHOICE:
            return st.sampled_from(spec.choices)
        case Kind.BOOLEAN:
            return st.sampled_from(["true", "false"])
        case Kind.INTEGER if spec.values:
            return st.sampled_from([str(value) for value in spec.values])
        case Kind.INTEGER | Kind.TOKENS | Kind.SIZE:
            return st.integers(int(spec.low or 0), int(spec.high or 0)).map(str)
        case Kind.NUMBER:
            return st.floats(0.01, 1.0).map(lambda value: f"{value:.6f}")
        case Kind.DURATION:
            return st.integers(1, 3600).map(lambda value: f"{value}s")
        case Kind.SECRET:
            return st.sampled_from(["${KEY}", "file:/run/key"])
    return st.text(alphabet="abcxyz019", min_size=1, max_size=10)


# Rules between keys have their own tests; here each key must stand for itself.
RULED = {"trust-remote-code", "max-num-seqs", "max-num-batched-tokens", "enable-chunked-prefill", "host",
         "kv-cache-memory-bytes", "distributed-executor-backend", "cluster", "ready.path"}  # fmt: skip
SINGLE = [spec for spec in KEYS.values() if spec.key not in RULED and spec.kind not in (Kind.VARIABLES,)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_valid_value_is_the_same_from_file_variable_and_flag(data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from([item for item in SINGLE if not item.is_fixed and item.key != "model"]))
    text = data.draw(values_of(spec))
    leaf = spec.key.split(".")
    # A word such as `1e5` needs quotes to be text in YAML; numbers must have none.
    is_text = spec.kind in (Kind.TEXT, Kind.TEXTS, Kind.SECRET, Kind.CHOICE)
    written = yaml.safe_dump(text).removesuffix("...\n").strip() if not is_text else f"'{text}'"
    written = written.strip("'") if not is_text else written
    block = f"{{{leaf[1]}: {written}}}" if len(leaf) == 2 else written
    bare = parse_registry("models: {m: {model: x}}\n")
    from_file = resolve(parse_registry(f"models:\n  m:\n    model: x\n    {leaf[0]}: {block}\n"), "m")[spec.key]
    variable = next(name for name, key in ENVIRONMENT.items() if key == spec.key)
    assert resolve(bare, "m", {variable: text})[spec.key] == from_file
    assert resolve(bare, "m", {}, [f"{spec.key}={text}"])[spec.key] == from_file
    if spec.kind not in (Kind.SIZE, Kind.SECRET):
        shown = show_value(spec, from_file)
        assert resolve(bare, "m", {}, [f"{spec.key}={shown}"])[spec.key] == from_file


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=30), st.builds("{}={}".format, KEY_NAMES, SCALARS)))
def test_any_flag_is_typed_or_refused(override: str) -> None:
    bare = parse_registry("models: {m: {model: x}}\n")
    with suppress(OverrideError, RegistryInvalid, UnknownName):
        resolve(bare, "m", {}, [override])
