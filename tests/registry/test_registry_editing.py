"""Editing in place: the asked value changes, every other byte stays, and what cannot be done so is refused."""

from __future__ import annotations

import difflib
import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from registry_support import ROOT, Here

from launcher.errors import HlaunchError, OverrideError, RegistryInvalid, UnknownModel, UnknownName
from launcher.registry import parse_registry, resolve
from launcher.registry.editing import (
    ClusterPart,
    EditRefused,
    add_entry,
    begin_registry,
    set_value,
    write_registry,
    yaml_text,
)

BLOCK = """\
# top
models:   # of the house
  a:  # first
    model: org/a   # what
    max-num-seqs: 4
    # between
    ready:
      timeout: 5m  # long
    description: >
      folded
      text

    tags:
      - x
      - y
    env:
      A: 1

  # about b
  b: {model: org/b, port: 9000}  # flow

# the end
"""


def changed(before: str, after: str) -> list[str]:
    """The changed lines, without and with sign."""
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return [line for line in lines if line[:2] in ("- ", "+ ")]


CASES = [
    ("a", "max-num-seqs", "8", ["-     max-num-seqs: 4", "+     max-num-seqs: 8"]),
    ("a", "model", "org/c", ["-     model: org/a   # what", "+     model: org/c   # what"]),
    ("a", "port", "8001", ["+     port: 8001"]),
    ("a", "tp", "2", ["+     tensor-parallel-size: 2"]),
    ("a", "ready.timeout", "10m", ["-       timeout: 5m  # long", "+       timeout: 10m  # long"]),
    ("a", "ready.path", "/ok", ["+       path: /ok"]),
    ("a", "placement.nodes", "n1,n2", ["+     placement: {nodes: [n1, n2]}"]),
    ("a", "env.B", "x y: #z", ['+       B: "x y: #z"']),
    ("a", "env.A", "2", ["-       A: 1", '+       A: "2"']),
    ("a", "tags", '[p, "q r"]', ["-     tags:", "-       - x", "-       - y", "+     tags: [p, q r]"]),
    ("a", "tags", "p,q", ["-     tags:", "-       - x", "-       - y", "+     tags: [p, q]"]),
    (
        "a",
        "description",
        "short",
        ["-     description: >", "-       folded", "-       text", "+     description: short"],
    ),
    ("b", "port", "9001", ["-   b: {model: org/b, port: 9000}  # flow", "+   b: {model: org/b, port: 9001}  # flow"]),
    (
        "b",
        "seed",
        "3",
        ["-   b: {model: org/b, port: 9000}  # flow", "+   b: {model: org/b, port: 9000, seed: 3}  # flow"],
    ),
    (
        "b",
        "ready.timeout",
        "3s",
        [
            "-   b: {model: org/b, port: 9000}  # flow",
            "+   b: {model: org/b, port: 9000, ready: {timeout: 3s}}  # flow",
        ],
    ),
]


@pytest.mark.parametrize(("name", "key", "value", "lines"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_one_value_changes_and_nothing_else(name: str, key: str, value: str, lines: list[str]) -> None:
    edit = set_value(BLOCK, "r.yml", name, key, value)
    assert sorted(changed(BLOCK, edit.text)) == sorted(lines)
    shown = edit.text.splitlines()[edit.line - 1]
    assert any(line.endswith(shown) for line in lines)


@pytest.mark.parametrize(
    ("text", "key", "value", "expected"),
    [
        ("models: {a: {model: x}}", "port", "1", "models: {a: {model: x, port: 1}}"),
        ("models: {a: {model: x, port: }}", "port", "1", "models: {a: {model: x, port: 1}}"),
        ("models: {a: {model: x, port: }}", "seed", "1", "models: {a: {seed: 1, model: x, port: }}"),
        ("models:\n  a:\n    model: x", "port", "1", "models:\n  a:\n    model: x\n    port: 1"),
        ("models:\n a:\n  model: x\n  port:\n", "port", "1", "models:\n a:\n  model: x\n  port: 1\n"),
        ("models:\n a:\n  model: x\n  env:\n", "env.A", "b", "models:\n a:\n  model: x\n  env: {A: b}\n"),
        ("models:\n a:\n  model: x\n  ready: {}\n", "ready.timeout", "1s",
         "models:\n a:\n  model: x\n  ready: {timeout: 1s}\n"),
        ("models:\r\n  a:\r\n    model: x\r\n", "port", "1", "models:\r\n  a:\r\n    model: x\r\n    port: 1\r\n"),
        ("models:\n  a:\n    max_num_seqs: 1\n    model: x\n", "max-num-seqs", "2",
         "models:\n  a:\n    max_num_seqs: 2\n    model: x\n"),
        ("models:\n  a:\n    tp: 1\n    model: x\n", "tensor-parallel-size", "2",
         "models:\n  a:\n    tp: 2\n    model: x\n"),
        ("models:\n  a:\n    model: 'x'\n", "model", "z", "models:\n  a:\n    model: z\n"),
        ("models:\n  a:\n    model: x # ü\n    description: é\n    seed: 1\n", "seed", "2",
         "models:\n  a:\n    model: x # ü\n    description: é\n    seed: 2\n"),
        ("x: 1\n".replace("x:", "x-b: &b") + "models:\n  a:\n    <<: {port: 2}\n    model: x\n", "port", "3",
         "x-b: &b 1\nmodels:\n  a:\n    <<: {port: 2}\n    model: x\n    port: 3\n"),
        ("x-b: &b 5\nmodels:\n  a:\n    model: x\n    seed: *b\n", "seed", "6",
         "x-b: &b 5\nmodels:\n  a:\n    model: x\n    seed: 6\n"),
        ("models:\n  a:\n    model: x\n    env: {A: 1,\n      # why\n      B: 2}\n", "env.B", "3",
         'models:\n  a:\n    model: x\n    env: {A: 1,\n      # why\n      B: "3"}\n'),
        ("models:\n  a:\n    model: x\n    description: |-\n      t\n", "port", "3",
         "models:\n  a:\n    model: x\n    description: |-\n      t\n    port: 3\n"),
    ],
)  # fmt: skip
def test_styles_of_writing(text: str, key: str, value: str, expected: str) -> None:
    assert set_value(text, "r.yml", "a", key, value).text == expected


REFUSED = [
    ("x-b: &b {model: x}\nmodels:\n  a: *b\n", "port", "1", "by reference"),
    ("models:\n  a: &b\n    model: x\n    port: 1\n  c: {<<: *b}\n", "port", "2", "shared by an anchor"),
    ("models:\n  a:\n    model: x\n    seed: &s 1\n  c: {model: y, seed: *s}\n", "seed", "2", "shared by an anchor"),
    ("x-r: &r {timeout: 1s}\nmodels:\n  a:\n    model: x\n    ready: *r\n", "ready.timeout", "2s", "by reference"),
    ("models:\n  a:\n    model: x\n    tags:\n      - p # why\n      - q\n", "tags", "z", "comments"),
    ("models:\n  ? a\n  : model: x\n", "port", "1", "does not begin its line"),
]


@pytest.mark.parametrize(("text", "key", "value", "why"), REFUSED)
def test_what_would_reach_further_is_refused(text: str, key: str, value: str, why: str) -> None:
    parse_registry(text)
    with pytest.raises(EditRefused, match=why) as caught:
        set_value(text, "r.yml", "a", key, value)
    assert caught.value.hint
    assert caught.value.exit_code == 3


CLUSTER = """\
clusters:
  pair:
    nodes:
      - {name: one, role: head, ip: 10.0.0.1}
      - &two
        name: two
        role: worker
        ip: 10.0.0.2
  same:
    nodes:
      - {name: alone, role: head, ip: 10.0.0.3}
      - *two
models: {a: {model: x}}
"""


def test_variables_of_clusters_and_nodes_are_set_like_those_of_entries() -> None:
    edit = set_value(CLUSTER, "r.yml", ClusterPart("pair"), "env.NCCL_DEBUG", "INFO")
    assert edit.text == CLUSTER.replace("  same:", "    env: {NCCL_DEBUG: INFO}\n  same:")
    assert (edit.entry, edit.key, edit.line, edit.old, edit.new) == ("pair", "env.NCCL_DEBUG", 9, None, "INFO")
    edit = set_value(edit.text, "r.yml", ClusterPart("pair", "one"), "env.NCCL_DEBUG", "WARN")
    assert "ip: 10.0.0.1, env: {NCCL_DEBUG: WARN}}" in edit.text
    assert (edit.entry, edit.line) == ("pair/one", 4)
    assert set_value(edit.text, "r.yml", ClusterPart("pair", "one"), "env.NCCL_DEBUG", "INFO").old == "WARN"


def test_of_a_cluster_only_variables_are_set_and_only_where_they_stand() -> None:
    with pytest.raises(OverrideError, match="max-num-seqs is no variable of a cluster"):
        set_value(CLUSTER, "r.yml", ClusterPart("pair"), "max-num-seqs", "8")
    with pytest.raises(EditRefused, match="same/two is written by reference"):
        set_value(CLUSTER, "r.yml", ClusterPart("same", "two"), "env.A", "b")
    with pytest.raises(EditRefused, match="shared by an anchor"):
        set_value(CLUSTER, "r.yml", ClusterPart("pair", "two"), "env.A", "b")
    for part in (ClusterPart("pear"), ClusterPart("pair", "three")):
        with pytest.raises(UnknownName) as caught:
            set_value(CLUSTER, "r.yml", part, "env.A", "b")
        assert caught.value.exit_code == 4


def test_an_anchored_value_that_nobody_else_uses_keeps_its_anchor() -> None:
    text = "models:\n  a:\n    model: x\n    seed: &s 1\n"
    assert set_value(text, "r", "a", "seed", "2").text == text.replace("1", "2")


def test_what_the_schema_refuses_is_not_written() -> None:
    for key, value in (
        ("tp", "0"),
        ("tp", "x"),
        ("prot", "1"),
        ("ready", "1"),
        ("env", "x"),
        ("env.A-B", "1"),
        ("tp", ""),
    ):
        with pytest.raises(OverrideError) as caught:
            set_value(BLOCK, "r.yml", "a", key, value)
        assert caught.value.issues[0].hint
    with pytest.raises(RegistryInvalid, match=r"nothing was written: r\.yml would not be valid") as ruled:
        set_value(BLOCK, "r.yml", "a", "max-num-seqs", "5000")
    assert [issue.code for issue in ruled.value.issues] == ["step-budget"]
    # What is wrong stands in no file, so it has no line of one.
    assert ruled.value.issues[0].headline().startswith("r.yml: error[step-budget] models.a.max-num-seqs: ")
    with pytest.raises(UnknownModel):
        set_value(BLOCK, "r.yml", "c", "port", "1")
    with pytest.raises(RegistryInvalid):
        set_value("models: {a: {}}", "r.yml", "a", "model", "x")


@pytest.mark.parametrize(("key", "value"), [("dtype", "half"), ("kv-cache-dtype", "fp8"), ("tokenizer", "org/t")])
def test_what_every_plan_refuses_is_not_written(key: str, value: str) -> None:
    with pytest.raises(OverrideError) as caught:
        set_value(BLOCK, "r.yml", "a", key, value)
    assert [issue.code for issue in caught.value.issues] == ["unsupported-value"]
    with pytest.raises(OverrideError):
        add_entry(BLOCK, "r.yml", "c", [("model", "org/c"), (key, value)])


def test_an_entry_is_added_in_the_files_own_style() -> None:
    pairs = [("model", "org/c"), ("tp", "2"), ("ready.timeout", "3m"), ("ready.path", "/x"), ("env.A", "b")]
    body = ["    model: org/c", "    tensor-parallel-size: 2", "    ready: {timeout: 3m, path: /x}", "    env: {A: b}"]
    edit = add_entry(BLOCK, "r.yml", "c", pairs)
    assert sorted(changed(BLOCK, edit.text)) == sorted(f"+ {line}" for line in ("", "  c:", *body))
    assert edit.text.splitlines()[edit.line - 1] == "  c:"
    assert edit.text.index("  b: {") < edit.text.index("  c:") < edit.text.index("# the end")
    flow = "models: {a: {model: x}}  # all\n"
    assert add_entry(flow, "r", "c", [("model", "z")]).text == "models: {a: {model: x}, c: {model: z}}  # all\n"
    tight = "models:\n    a:\n        model: x"
    assert add_entry(tight, "r", "c", [("model", "z")]).text == tight + "\n    c:\n        model: z"
    assert add_entry(tight, "r", "2", [("model", "z")]).text == tight + '\n    "2":\n        model: z'


def test_a_new_registry_begins_with_its_first_entry() -> None:
    text = begin_registry("r.yml", "m", [("model", "tiny-oss"), ("port", "8001")]).text
    assert resolve(parse_registry(text), "m").integer("port") == 8001
    for name in ("--help", "a b", ""):
        with pytest.raises(OverrideError) as caught:
            begin_registry("r.yml", name, [("model", "x")])
        assert caught.value.hint.startswith("use up to 128 letters, digits, '.', ")
        with pytest.raises(OverrideError):
            add_entry(text, "r.yml", name, [("model", "x")])
    for taken in ("m", "M"):
        with pytest.raises(EditRefused, match="is taken"):
            add_entry(text, "r.yml", taken, [("model", "x")])


FIRST = "  m:\n    model: org/m\n    port: 1"


@pytest.mark.parametrize(
    ("text", "expected", "line"),
    [
        ("", f"models:\n{FIRST}\n", 2),
        ("# only\n", f"# only\nmodels:\n{FIRST}\n", 3),
        ("models: {}", f"models:\n{FIRST}", 2),
        ("models: {}  # none yet\n# end\n", f"models:  # none yet\n{FIRST}\n# end\n", 2),
        ("version: 1\nmodels:\n", f"version: 1\nmodels:\n{FIRST}\n", 3),
        ("models: # none\ndefaults: {tp: 2}\n", f"models: # none\n{FIRST}\ndefaults: {{tp: 2}}\n", 2),
        ("models: ~\n\nversion: 1\n", f"models:\n{FIRST}\n\nversion: 1\n", 2),
        ("version: 1", f"version: 1\nmodels:\n{FIRST}\n", 3),
        ("version: 1\r\nmodels: {}\r\n", "version: 1\r\nmodels:\r\n" + FIRST.replace("\n", "\r\n") + "\r\n", 3),
        ("{version: 1, models: {}}\n", "{version: 1, models: {m: {model: org/m, port: 1}}}\n", 1),
        ("{version: 1, models: }\n", "{version: 1, models: {m: {model: org/m, port: 1}}}\n", 1),
        ("{version: 1}\n", "{version: 1, models: {m: {model: org/m, port: 1}}}\n", 1),
        ("{}\n", "{models: {m: {model: org/m, port: 1}}}\n", 1),
    ],
)
def test_a_registry_without_models_gets_its_first(text: str, expected: str, line: int) -> None:
    edit = add_entry(text, "r.yml", "m", [("model", "org/m"), ("port", "1")])
    assert (edit.text, edit.line) == (expected, line)
    assert resolve(parse_registry(edit.text), "m").integer("port") == 1


@pytest.mark.parametrize(
    "text",
    [
        "models: []\n",
        "models: {}\ndefaults: {prot: 1}\n",
        "models: {}\ndefaults: {max-num-seqs: 5000}\n",
        "x-m: &m {}\nmodels: *m\n",
        "models: { # why\n}\n",
        "models: &m {}\nx-m: *m\n",
        "~\n",
    ],
)
def test_a_registry_that_lacks_more_than_models_is_not_begun(text: str) -> None:
    with pytest.raises((RegistryInvalid, EditRefused)):
        add_entry(text, "r.yml", "m", [("model", "org/m"), ("port", "1")])


TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            "a: b",
            "# x",
            "- x",
            "*a",
            "&a",
            "!t",
            "yes",
            "null",
            "~",
            "1e3",
            "010",
            "${X}",
            "'",
            '"',
            "\\",
            "{",
            "]",
            ",",
        ]
    ),
)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_any_text_is_written_so_that_it_reads_back(text: str) -> None:
    written = yaml_text(text)
    assert "\n" not in written
    for document in (
        f"models:\n  m:\n    model: x\n    env: {{A: {written}, B: c}}\n",
        f"models: {{m: {{model: x, env: {{A: {written}}}}}}}\n",
    ):
        if any(ord(ch) in range(0xD800, 0xE000) for ch in text) or "\0" in text or text.startswith("${"):
            continue
        assert resolve(parse_registry(document), "m").env["A"].value == text


COMMENT = st.sampled_from(["", "  # c", " # 'é\" {", "\t# tab"])
VALUES = {
    "max-num-seqs": ["4", "5"],
    "seed": ["1", "0"],
    "port": ["8000"],
    "description": ["one", '"two: 2"', "'it''s'"],
}


@st.composite
def written_registries(draw: st.DrawFn) -> str:
    """A valid registry in somebody's own style: comments, gaps, block and flow, both line ends."""
    step = draw(st.sampled_from(["  ", "   ", "    "]))
    lines = draw(st.lists(st.sampled_from(["# top", "", "version: 1", "x-own: {a: [1, 2]}"]), max_size=3, unique=True))
    lines.append("models:" + draw(COMMENT))
    for name in draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True)):
        keys = draw(st.lists(st.sampled_from(["seed", "port", "description", "max_num_seqs"]), max_size=3, unique=True))
        values = [(key, draw(st.sampled_from(VALUES[key.replace("_", "-")]))) for key in keys]
        pairs = [("model", "org/x"), *values]
        if draw(st.booleans()):
            lines.append(f"{step}{name}: {{{', '.join(f'{key}: {value}' for key, value in pairs)}}}" + draw(COMMENT))
        else:
            lines.append(f"{step}{name}:" + draw(COMMENT))
            for key, value in pairs:
                lines += draw(st.sampled_from([[], [""], [f"{step * 2}# note"]]))
                lines.append(f"{step * 2}{key}: {value}" + draw(COMMENT))
            if draw(st.booleans()):
                lines += [f"{step * 2}ready:", f"{step * 3}timeout: 5m" + draw(COMMENT)]
        lines += draw(st.sampled_from([[], [""], ["# below"], [f"{step}# mine"]]))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    return end.join(lines) + draw(st.sampled_from(["", end]))


CHANGES = st.sampled_from(
    [("seed", "7"), ("port", "9999"), ("max-num-seqs", "3"), ("description", "new: # text"), ("ready.timeout", "9m"),
     ("ready.path", "/up"), ("env.A", "b c"), ("tags", "p,q"), ("model", "org/y"), ("kv-cache-memory-bytes", "4GiB")]
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(written_registries(), CHANGES, st.data())
def test_whatever_the_style_only_one_value_changes(text: str, change: tuple[str, str], data: st.DataObject) -> None:
    registry = parse_registry(text)
    name = data.draw(st.sampled_from(sorted(registry.models)))
    key, value = change
    edit = set_value(text, "r.yml", name, key, value)
    after = parse_registry(edit.text)
    asked = resolve(registry, name, {}, [] if key in ("description", "tags", "model") else [f"{key}={value}"])
    for other in registry.models:
        mine, theirs = resolve(after, other), resolve(registry, other) if other != name else asked
        for item in (*theirs.values.values(), *theirs.env.values()):
            if not (other == name and item.key == key):
                assert (mine.values.get(item.key) or mine.env[item.key]).value == item.value
    # One range changed: what stands before and after it is the same text, comments included.
    prefix = os.path.commonprefix([text, edit.text])
    suffix = os.path.commonprefix([text[len(prefix) :][::-1], edit.text[len(prefix) :][::-1]])
    assert "#" not in text[len(prefix) : len(text) - len(suffix)]
    assert set_value(edit.text, "r.yml", name, key, value).text == edit.text


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(written_registries())
def test_whatever_the_style_an_entry_is_only_added(text: str) -> None:
    edit = add_entry(text, "r.yml", "new", [("model", "org/n"), ("ready.timeout", "1m")])
    assert list(parse_registry(edit.text).models) == [*parse_registry(text).models, "new"]
    assert resolve(parse_registry(edit.text), "new").number("ready.timeout") == 60.0
    prefix = os.path.commonprefix([text, edit.text])
    assert edit.text.endswith(text[len(prefix) :])
    begun, _, rest = edit.text.partition("new:")
    assert rest
    assert begun.count("\n") + 1 == edit.line


def test_the_file_is_replaced_whole_with_its_permissions(tmp_path: Path) -> None:
    path, link = tmp_path / "r.yml", tmp_path / "link.yml"
    path.write_bytes(b"\xef\xbb\xbf" + BLOCK.encode())
    path.chmod(0o640)
    link.symlink_to(path)
    write_registry(link, BLOCK + "# more\n", BLOCK)
    assert path.read_bytes() == b"\xef\xbb\xbf" + BLOCK.encode() + b"# more\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert link.is_symlink()
    with pytest.raises(HlaunchError, match="somebody else"):
        write_registry(path, "x", BLOCK)
    with pytest.raises(HlaunchError, match="somebody else"):
        write_registry(path, "x", None)
    with pytest.raises(HlaunchError, match="cannot be written"):
        write_registry(tmp_path / "absent" / "r.yml", "x", None)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["link.yml", "r.yml"]


def test_a_protected_file_stays_as_it_is(here: Here) -> None:
    here.write(BLOCK)
    path = here.folder / "model_registry.yml"
    path.chmod(0o444)
    for argv in (["registry", "set", "a", "port=9000"], ["registry", "add", "new", "--model", "x"]):
        done = here(*argv)
        assert (done.code, done.out) == (1, "")
        assert "model_registry.yml is write-protected (mode 0444)" in done.err
        assert "hint: run: chmod u+w " in done.err
        assert path.read_text() == BLOCK
    assert here("registry", "set", "a", "port=9000", "--dry-run").code == 0
    path.chmod(0o644)
    assert here("registry", "set", "a", "port=9000").code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_others_may_write_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(BLOCK)
    path.chmod(0o464)
    with pytest.raises(HlaunchError, match=r"is not yours to write \(mode 0464\)"):
        write_registry(path, "x", BLOCK)
    assert path.read_text() == BLOCK


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_files_owner_stays(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(BLOCK)
    os.chown(path, 65534, 65534)
    write_registry(path, BLOCK + "# more\n", BLOCK)
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)


def test_the_commands(here: Here) -> None:
    here.write(BLOCK)
    done = here("registry", "set", "a", "max-num-seqs=8", "env.HF_TOKEN=canary", "api-key=canary")
    assert done.code == 0
    assert done.out.splitlines()[0] == "model_registry.yml:5: set a max-num-seqs = 8 (was 4)"
    assert "canary" not in done.out + done.err
    shown = json.loads(here("show", "a", "--json").out)
    assert shown["values"]["max-num-seqs"]["value"] == 8
    before = (here.folder / "model_registry.yml").read_bytes()
    dry = here("registry", "set", "a", "max-num-seqs=9", "--dry-run")
    assert [line for line in dry.out.splitlines() if line[:1] in "+-" and line[1:2] not in "+-"] == [
        "-    max-num-seqs: 8",
        "+    max-num-seqs: 9",
    ]
    # Neither what changes nor what stands around it.
    secret = here("registry", "set", "a", "env.HF_TOKEN=canary_new", "env.B=2", "--dry-run").out
    assert "canary" not in secret
    assert "-      HF_TOKEN: <hidden>" in secret
    assert "+      HF_TOKEN: <hidden>" in secret
    same = here("registry", "set", "a", "max-num-seqs=8")
    assert "nothing changed" in same.err
    assert (here.folder / "model_registry.yml").read_bytes() == before
    added = json.loads(here("registry", "add", "c", "--model", "org/c", "--set", "tp=2", "--json").out)
    assert (added["action"], added["written"], added["entry"]) == ("added", True, "c")
    assert here("registry", "add", "c", "--model", "x").code == 3
    assert here("registry", "set", "zz", "tp=2").code == 4
    assert here("registry", "set", "a", "tp=zero").code == 2
    assert here("registry", "set", "a", "tp").code == 2


def test_without_a_registry_of_ones_own_add_begins_one(here: Here) -> None:
    (here.folder / "model_registry.yml").unlink()
    packaged = (ROOT / "model_registry.yml").read_bytes()
    assert here("registry", "set", "tiny-oss", "port=1").code == 2
    assert here("registry", "add", "mine", "--model", "org/x").code == 0
    assert here("validate").out == "model_registry.yml: valid, 1 model\n"
    assert (ROOT / "model_registry.yml").read_bytes() == packaged


@pytest.mark.parametrize("text", ["models: {}\n", "", "# mine\n"])
def test_add_begins_a_registry_that_has_no_models(here: Here, text: str) -> None:
    here.write(text)
    assert here("registry", "add", "mine", "--model", "org/x").code == 0
    assert here("validate").out == "model_registry.yml: valid, 1 model\n"
    assert here("registry", "add", "more", "--model", "org/y").code == 0
    assert here("validate").out == "model_registry.yml: valid, 2 models\n"


def test_init_writes_a_registry_that_is_valid_and_never_replaces_one(here: Here) -> None:
    (here.folder / "model_registry.yml").unlink()
    done = here("registry", "init")
    assert done.code == 0
    assert done.out == "model_registry.yml: written, with its schema model_registry.schema.json\n"
    text = (here.folder / "model_registry.yml").read_text()
    # The first line binds the schema for editors.
    assert text.startswith("# yaml-language-server: $schema=./model_registry.schema.json\n")
    schema = json.loads((here.folder / "model_registry.schema.json").read_text())
    assert schema["title"] == "hlaunch model registry"
    assert here("validate", "--strict").code == 0
    (here.folder / "model_registry.yml").write_text(BLOCK)
    again = here("registry", "init")
    assert again.code == 2
    assert "is there already" in again.err
    assert (here.folder / "model_registry.yml").read_text() == BLOCK
    other = json.loads(here("registry", "init", "conf/mine.yml", "--json").out)
    assert other == {"file": "conf/mine.yml", "schema": "conf/model_registry.schema.json"}
    (here.folder / "gone").symlink_to(here.folder / "absent")
    assert here("registry", "init", "gone").code == 2
    assert here("--file", "named.yml", "registry", "init").out.startswith("named.yml: written")
    (here.folder / "model_registry.schema.json").write_text("{}")
    assert "not hlaunch's" in here("registry", "init", "more.yml").err
    assert not (here.folder / "more.yml").exists()
    assert (here.folder / "model_registry.schema.json").read_text() == "{}"
    # Each command in one line: what a summary says is not cut off.
    assert "..." not in here("registry", "--help").out.partition("Commands:")[2]
