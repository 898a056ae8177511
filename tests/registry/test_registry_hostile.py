"""A hostile user at the command line: torn files, strange paths, texts that want to be markup, secrets to leak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from registry_support import REGISTRY, ROOT, SEED, Here, process

from launcher.cli import run
from launcher.console import layout_table
from launcher.registry import check_registry, load_registry, resolve
from launcher.registry.keys import SPELLINGS

CANARY = "canary-31337-do-not-print"


# Files that are no registry.


def test_a_file_that_is_no_registry_ends_in_one_line(here: Here) -> None:
    texts: dict[str, bytes] = {
        "empty": b"",
        "comment": b"# nothing here\n",
        "utf-16": REGISTRY.encode("utf-16"),
        "utf-32": REGISTRY.encode("utf-32"),
        "latin-1": "models: {m: {model: caf\xe9}}".encode("latin-1"),
        "10 MB": b"models: {m: {model: x}}\n" + b"# padding\n" * 1_000_000,
        "10 MB without an end": b"[" * 10_000_000,
        "brackets": b"[" * 200_000,
        "braces": b"{a: " * 100_000,
        "dashes": b"- " * 200_000,
        "questions": b"? " * 200_000,
        "one key": b"a" * 1_000_000,
        "quotes": b'"' * 1_000_000,
        "anchors": b"".join(b"&a%d " % i for i in range(100_000)),
        "bomb": b"x-0: &a0 [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"x-%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 30)),
        "merge bomb": b"x-0: &a0 {k: v}\n"
        + b"".join(b"x-%d: &a%d {<<: [%s]}\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 30)),
        "elf": b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 100,
    }
    for name, data in texts.items():
        here.write(data, "bad.yml")
        begin = time.perf_counter()
        result = here("validate", "bad.yml")
        seconds = time.perf_counter() - begin
        assert (result.code, result.out) == (3, ""), name
        lines = result.err.splitlines()
        assert lines[0].startswith("bad.yml:"), name
        assert lines[1].startswith("hint: "), name
        assert lines[-1] == "error: bad.yml is not valid: 1 error", name
        assert max(len(line) for line in lines) < 300, name
        assert seconds < 1.0, (name, seconds)


def test_memory_stays_small_whatever_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text("x-a: [" + "a," * 200_001 + "]")
    code = (
        # VmHWM, not ru_maxrss: the latter remembers the process that forked this one.
        "from launcher.cli import run\nrc = run(['validate', 'r.yml'])\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(rc, int(status['VmHWM'].split()[0]) // 1024)"
    )
    command = [sys.executable, "-c", code]
    environ = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    rc, mebibytes = done.stdout.split()
    assert rc == "3"
    assert int(mebibytes) < 200


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (
            "tiny-oss:\n  model: tiny-oss\n",
            "profiles, clusters, models; a model stands under models:",
        ),
        ("models:\n  - name: a\n    model: x\n", "models: {tiny-oss: {model: tiny-oss}}"),
        ("models:\n  m:\n    model:tiny-oss\n", "put a space after the colon: model: …"),
        ("models:\n  x-base: {dtype: auto}\n  m: {model: x}\n", "stands outside models"),
        ("models:\r\n  m:\r\n    model: x\r\n    prot: 1\r\n", "did you mean 'port'?"),
        ("models: {m: {model: x, gpu-memory-utilization: 90}}", "accepted: > 0, <= 1; 0.9 means 90 percent"),
        ("models: {m: {model: x, gpu-memory-utilization: 90%}}", "write a fraction: 0.9 means 90 percent"),
        ("models: {m: {model: x, --port: 1}}", "did you mean 'port'?"),
        ("models: {m: {model: x, drain-timeout: 5 minutes}}", "500ms, 30s, 15m, 1h"),
        ('{"models": {"m": {"model": "x", "port": "80"}}}', "remove the quotes"),
    ],
)
def test_what_people_write_first_is_explained(here: Here, text: str, hint: str) -> None:
    here.write(text)
    result = here("validate")
    assert result.code == 3
    assert any(line.startswith("hint: ") and hint in line for line in result.err.splitlines())


# Paths.


@pytest.mark.parametrize("command", [["list"], ["show", "first"], ["validate"]])
def test_a_named_place_that_holds_no_file(here: Here, command: list[str]) -> None:
    (here.folder / "folder").mkdir()
    (here.folder / "loop").symlink_to("loop")
    (here.folder / "dangling").symlink_to("nowhere")
    places = {
        "folder": "'folder' is a folder",
        "loop": "'loop' cannot be read: Too many levels",
        "dangling": "'dangling' does not exist",
        "absent.yml": "'absent.yml' does not exist",
        "model_registry.yml/x": "cannot be read: Not a directory",
        "~nobody-of-this-name/x": "does not exist",
        "n" * 5000: "cannot be read: File name too long",
        "\x1b[31m[/red]": "'\\x1b[31m[/red]' does not exist",
    }
    for place, text in places.items():
        result = here("--file", place, *command)
        assert (result.code, result.out) == (3, ""), place
        assert text in result.err
        assert result.err.endswith("hint: it was named on the command line\n")
        assert "\x1b" not in result.err
        assert len(result.err) < 400
    by_variable = here(*command, HLAUNCH_REGISTRY="loop")
    assert by_variable.code == 3
    assert "named by $HLAUNCH_REGISTRY" in by_variable.err


def test_a_searched_place_that_holds_no_file_is_passed_over(here: Here) -> None:
    (here.folder / "model_registry.yml").unlink()
    (here.folder / "model_registry.yml").symlink_to("model_registry.yml")
    (here.folder / "hlaunch.yml").mkdir()
    result = here("list", "--json")
    assert result.code == 0
    assert json.loads(result.out)["registry"] == str(ROOT / "launcher" / "model_registry.yml")


def test_a_registry_may_come_through_a_pipe(here: Here) -> None:
    pipe = here.folder / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(REGISTRY,))
    writer.start()
    result = here("validate", "pipe")
    writer.join(timeout=5)
    assert (result.code, result.out) == (0, "pipe: valid, 2 models\n")


def test_an_endless_file_is_read_only_in_part(here: Here) -> None:
    result = here("validate", "/dev/zero")
    assert result.code == 3
    assert "larger than 1 MiB" in result.err


def test_a_file_that_breaks_while_it_is_read(here: Here) -> None:
    result = here("validate", "/proc/self/mem")
    assert result.code == 3
    assert "cannot be read: Input/output error\nhint: " in result.err


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"rmdir '{gone}'; exec '{sys.executable}' -m launcher.cli list"
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", script], cwd=gone, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the current folder is gone\n")


@pytest.mark.parametrize(
    ("redirection", "code", "error"),
    [
        (">/dev/full", 1, "error: cannot write the output: No space left on device\nhint: free some space\n"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
    ],
)
def test_an_output_that_takes_nothing(tmp_path: Path, redirection: str, code: int, error: str) -> None:
    (tmp_path / "model_registry.yml").write_text(REGISTRY)
    script = f"exec '{sys.executable}' -m launcher.cli list {redirection}"
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, error)


# Texts that want to be more.


def test_markup_and_controls_of_a_registry_are_shown_not_obeyed(here: Here) -> None:
    here.write(
        "models:\n  m:\n    model: tiny-oss\n"
        "    description: '[/red] [bold]b[/bold] :smile: [link=http://x]y[/link]'\n"
        "    tags: ['[/]', '[on red]']\n"
        '    env: {A: "\\e[2J\\a\\r", B: "[blink]\\u202e", "C": "1\\n2\\tx"}\n'
    )
    screens = [here(*args).out for args in (["list"], ["show", "m"], ["show", "m", "--explain"])]
    for screen in screens:
        assert screen.isascii()
        assert "\x1b" not in screen
        assert "[bold]b[/bold]" in screen
        assert max(len(line) for line in screen.splitlines()) <= 80
    assert "\\x1b[2J\\x07\\r" in screens[1]
    assert "[blink]\\u202e" in screens[1]
    assert json.loads(here("show", "m", "--json").out)["env"]["A"]["value"] == "\x1b[2J\a\r"
    for line in (
        'description: "\\e[2J[/red]"',
        'tokenizer: "\\e[2J[/red]"',
        "port: '\\x1b[/red]'",
        'dtype: "\\e[/red]"',
    ):
        here.write(f"models:\n  m:\n    model: x\n    {line}\n")
        refused = here("validate")
        assert refused.code == 3
        assert "\x1b" not in refused.err
        assert "[/red]" in refused.err


def test_names_in_errors_are_escaped(here: Here) -> None:
    for args in (["show", "\x1b]0;x\x07"], ["\x1b[31m"], ["list", "--tag", "\x1b[31m\n"], ["show", "\udcff"]):
        result = here(*args)
        assert not set("\x1b\x07\udcff") & set(result.out + result.err)
        assert "internal error" not in result.err


def test_wide_characters_keep_a_table_at_its_width() -> None:
    wide = "日本語" * 30
    lines = layout_table(("NAME", ">N"), [(wide, "1"), ("e\u0301" * 50, "2")], 40)
    assert "".join(lines[1:-2]).replace(" ", "").replace("1", "") == wide
    for line in lines:
        assert sum(2 if ch in wide else 0 if ch == "\u0301" else 1 for ch in line) <= 40


# Secrets.


def test_no_screen_shows_a_secret(here: Here) -> None:
    here.write(
        "models:\n"
        f"  literal: {{model: tiny-oss, api-key: {CANARY}, env: {{HF_TOKEN: {CANARY}, TOKEN: {CANARY}, MY_PASSWORD: {CANARY}}}}}\n"  # noqa: E501
        '  variable: {model: tiny-oss, api-key: "${TEST_KEY}"}\n'
        "  plain: {model: tiny-oss}\n"
    )
    environ = {"HLAUNCH_API_KEY": CANARY, "TEST_KEY": CANARY, "HF_TOKEN": CANARY, "OPENAI_API_KEY": CANARY}
    for name in ("literal", "variable", "plain"):
        for args in (["show", name], ["show", name, "--explain"], ["show", name, "--json"], ["up", name, "--dry-run"],
                     ["up", name, "--dry-run", "--json"], ["show", name, "--set", f"api-key={CANARY}", "--explain"],
                     ["show", name, "--set", f"env.HF_TOKEN={CANARY}", "--json"]):  # fmt: skip
            result = here(*args, **environ)
            assert result.code == 0, result.err
            assert result.out
            assert CANARY not in result.out + result.err, args
    for args in (["list"], ["list", "--json"], ["validate"], ["validate", "--json"]):
        result = here(*args, **environ)
        assert CANARY not in result.out + result.err


@pytest.mark.parametrize(
    "line",
    [
        f"api-key: '{CANARY} $X'",
        f"api-key: [{CANARY}]",
        f"api-key: {{{CANARY}: 1}}",
        f"api-key: {CANARY}: x",
        f"api-key:\n      {CANARY}: : x",
        f"api-key: '{CANARY}",
        f"api-kay: {CANARY}",
        f"api-key: {CANARY}\n    api_key: {CANARY}",
        f"env: {{HF_TOKEN: [{CANARY}]}}",
        f"env: {{HF_TOKEN: '${{{CANARY.replace('-', '_')}}}'}}",
        f"env: {{HF_TOKEN: {CANARY}, HF_TOKEN: {CANARY}}}",
        f"env: {{HF-TOKEN: {CANARY}}}",
        f'env: {{HF_TOKEN: "{CANARY}\\0"}}',
    ],
)
def test_no_error_quotes_a_secret_of_the_file(here: Here, line: str) -> None:
    here.write(f"models:\n  m:\n    model: x\n    {line}\n")
    for args in (["validate"], ["validate", "--json"], ["list"], ["show", "m"]):
        result = here(*args)
        assert result.code == 3
        assert CANARY not in result.out + result.err
        assert CANARY.replace("-", "_") not in result.out + result.err


def test_a_numeric_secret_is_not_quoted_either(here: Here) -> None:
    here.write("models:\n  m: {model: x, env: {DOOR_PASSWORD: 0123987, PORT: 0123986}}\n")
    result = here("validate")
    assert result.code == 3
    assert "0123986" in result.err
    assert "0123987" not in result.err


def test_no_error_quotes_a_secret_of_the_command_line(here: Here) -> None:
    for override in (f"api-key={CANARY} x", f"api-key:{CANARY}", CANARY, f"api-kay={CANARY}", f"aliases={CANARY}"):
        result = here("show", "first", "--set", override)
        assert result.code == 2
        assert CANARY not in result.out + result.err
    result = here("show", "first", HLAUNCH_API_KEY=f"{CANARY} x", HLAUNCH_API_KAY=CANARY)
    assert result.code == 2
    assert CANARY not in result.out + result.err


# The command as a shell starts it.


def test_every_read_only_command_answers_in_json_too(here: Here) -> None:
    listed = json.loads(here("list", "--json").out)
    assert [(item["name"], item["aliases"], item["line"]) for item in listed["models"]] == [
        ("first", ["one"], 5),
        ("second", [], 13),
    ]
    shown = json.loads(here("show", "one", "--json", "--set", "env.X=1").out)
    assert shown["name"] == "first"
    assert shown["values"]["ready.timeout"]["value"] == 20.0
    assert shown["env"]["X"]["origin"]["layer"] == "flag"
    assert shown["env"]["GONE"]["value"] is None
    assert json.loads(here("validate", "--json").out) == {
        "file": "model_registry.yml",
        "valid": True,
        "models": ["first", "second"],
        "issues": [],
    }
    schema = here("schema", "--json").out
    assert schema == here("schema").out
    assert json.loads(schema)["$schema"].endswith("/draft/2020-12/schema")
    keys = json.loads(here("schema", "--keys", "--json").out)
    assert {item["key"] for item in keys if not item["key"].startswith("clusters.")} == set(SPELLINGS.values())
    for args in (["list", "--json"], ["show", "first", "--json"], ["schema", "--json"], ["schema", "--keys"]):
        assert here(*args).err == ""
    assert here("show", "first").err.endswith("more keys are built-in; see --explain\n")


def test_a_tag_selects(here: Here) -> None:
    assert "first" in here("list", "--tag", "cpu").out
    assert "second" not in here("list", "--tag", "cpu").out
    nothing = here("list", "--tag", "gpu")
    assert nothing.code == 0
    assert nothing.err == "no model has the tag 'gpu'; tags: cpu\n"


def test_an_unknown_model_exits_4_and_lists_the_known_ones(here: Here) -> None:
    for args, environ in (
        (["show", "frist"], {}),
        (["show", "frist", "--json"], {}),
        (["up", "frist", "--dry-run"], {}),
        (["--dry-run"], {"MODEL_NAME": "frist"}),
        ([], {"MODEL_NAME": "frist"}),
        (["--file", "model_registry.yml", "--dry-run"], {"MODEL_NAME": "frist"}),
    ):
        result = here(*args, **environ)
        assert (result.code, result.out) == (4, "")
        assert result.err == (
            "error: model 'frist' is not in model_registry.yml\n"
            "  available: first, second\n"
            "hint: did you mean 'first'?\n"
        )
    for name in ("--help", "-x", "--dry-run", ";id", "$(id)"):
        assert here("--dry-run", MODEL_NAME=name).code == 4


def test_the_seeds_way_through_a_real_process(tmp_path: Path) -> None:
    (tmp_path / "model_registry.yml").write_bytes(SEED.read_bytes())
    listed = process(tmp_path, "list")
    assert (listed.code, listed.err) == (0, "")
    unknown = process(tmp_path, MODEL_NAME="gpt-oss-20")
    assert unknown.code == 4
    assert unknown.err.endswith("  available: gpt-oss-20b\nhint: did you mean 'gpt-oss-20b'?\n")
    strange = process(tmp_path, "list", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (strange.code, strange.out) == (0, listed.out)


@pytest.mark.parametrize("args", [["--help"], ["list"], ["validate"]])
def test_what_a_user_waits_for(args: list[str], tmp_path: Path) -> None:
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        assert process(tmp_path, *args).code == 0
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1.5


@pytest.mark.parametrize("command", ["list", "show", "validate", "schema", "up"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_fits_80_columns(here: Here, command: str, flag: str) -> None:
    result = here(command, flag)
    assert (result.code, result.err) == (0, "")
    assert max(len(line) for line in result.out.splitlines()) <= 80


# Registries that were valid, and then were not.

WHOLE = REGISTRY + "  third: &t {model: x, port: 9000, kv-cache-memory-bytes: 4GiB, tags: [a, b]}\n  fourth: {<<: *t}\n"
PIECES = st.one_of(
    st.sampled_from(sorted(SPELLINGS)),
    st.sampled_from(["", " ", "\n", "\n  ", ": ", "- ", "{", "}", "[", "]", "'", '"', "#", "&a ", "*a", "<<: ", "!x ", "|\n", "\t", "\0", "\x85", "~"]),  # noqa: E501
    st.text(max_size=5),
)  # fmt: skip
EDITS = st.lists(
    st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 12), PIECES),
    min_size=1,
    max_size=6,
)


def judge(path: Path, data: bytes) -> None:
    """One file: valid and every entry resolves, or exit 3 with at least one located error; never slow."""
    path.write_bytes(data)
    begin = time.perf_counter()
    registry, issues = check_registry(path, path.parent)
    assert time.perf_counter() - begin < 1.0
    if registry is not None:
        for name in registry.models:
            assert resolve(registry, name, {}).model
        return
    errors = [issue for issue in issues if issue.severity == "error"]
    assert errors
    for issue in issues:
        assert issue.line is not None
        assert issue.column is not None
        assert min(issue.line, issue.column) >= 1
        assert (
            issue.line <= data.count(b"\n") + data.count(b"\r") + data.count(b"\xc2\x85") + data.count(b"\xe2\x80") + 1
        )
        assert issue.message
        assert "\n" not in issue.headline()


def edited(edits: list[tuple[int, int, str]]) -> bytes:
    text = WHOLE
    for start, length, piece in edits:
        text = text[:start] + piece + text[start + length :]
    return text.encode("utf-8", "surrogatepass")


QUICK = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONG = settings(QUICK, max_examples=5000)


def test_the_whole_registry_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(WHOLE)
    assert list(load_registry(path).models) == ["first", "second", "third", "fourth"]


@QUICK
@given(EDITS)
def test_a_damaged_registry_is_judged(tmp_path: Path, edits: list[tuple[int, int, str]]) -> None:
    judge(tmp_path / "r.yml", edited(edits))


@QUICK
@given(st.binary(max_size=300))
def test_any_bytes_are_judged(tmp_path: Path, data: bytes) -> None:
    judge(tmp_path / "r.yml", data)


@pytest.mark.slow
@LONG
@given(EDITS)
def test_five_thousand_damaged_registries_through_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], edits: list[tuple[int, int, str]]
) -> None:
    path = tmp_path / "r.yml"
    judge(path, edited(edits))
    assert run(["validate", str(path)]) in (0, 3)
    out, err = capsys.readouterr()
    assert "internal error" not in err
    assert ("valid" in out) != ("error[" in err)


@pytest.mark.slow
@LONG
@given(st.binary(max_size=1000))
def test_five_thousand_times_any_bytes(tmp_path: Path, data: bytes) -> None:
    judge(tmp_path / "r.yml", data)
