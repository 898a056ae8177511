"""The commands as a user runs them: stdout, stderr, exit code, and what they import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.cli import COMMANDS, arrange

ROOT = Path(__file__).parents[2]
SEED = Path(__file__).parent / "seed.yml"
HEAVY = ("torch", "ray", "fastapi", "starlette", "uvicorn", "cupy", "numpy", "transformers", "engine.server")


def hlaunch(*args: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HLAUNCH_") and key != "MODEL_NAME"}
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *args],
        cwd=cwd or ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom launcher.cli import run\nsys.argv = ['hlaunch', '--help']\nrc = run(['--help'])\n"
        f"bad = [name for name in {HEAVY + ('rich', 'pydantic', 'yaml')!r} if name in sys.modules]\n"
        "print(bad, rc, file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        assert done.stderr == "[] 0\n"
    assert min(seconds) < 1.5


@pytest.mark.parametrize("args", [["list"], ["show", "tiny-oss"], ["validate"], ["schema"]])
def test_read_only_commands_load_nothing_heavy(args: list[str]) -> None:
    code = (
        f"import sys\nfrom launcher.cli import run\nrc = run({args!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], rc, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[] 0"


def test_help_names_every_command_at_80_columns() -> None:
    done = hlaunch("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert done.stderr == ""


def test_list() -> None:
    done = hlaunch("list", "--file", str(SEED))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "NAME         MODEL               DESCRIPTION\ngpt-oss-20b  openai/gpt-oss-20b  Lightweight\n"


def test_list_in_any_folder_uses_the_copy_that_came_along(tmp_path: Path) -> None:
    done = hlaunch("list", "--json", cwd=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 0
    data = json.loads(done.stdout)
    assert [item["name"] for item in data["models"]] == ["tiny-oss", "gpt-oss-20b", "gpt-oss-120b"]


@pytest.mark.parametrize("args", [["list"], ["show", "gpt-oss-20b", "--explain"], ["validate"], ["schema", "--keys"]])
def test_every_screen_fits_80_columns(args: list[str]) -> None:
    done = hlaunch(*args)
    assert done.returncode == 0
    if args[0] != "schema":
        assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert "\x1b" not in done.stdout


def test_show_explains_each_value() -> None:
    done = hlaunch("show", "gpt-oss-20b", "--explain", "--set", "port=9000", "-f", str(SEED), HLAUNCH_MAX_NUM_SEQS="2")
    assert done.returncode == 2
    done = hlaunch("-f", str(SEED), "show", "gpt-oss-20b", "--explain", "--set", "port=9000", HLAUNCH_MAX_NUM_SEQS="2")
    assert done.returncode == 0
    flat = " ".join(done.stdout.split())
    assert "port 9000 flag (--set port) over 8000 built-in" in flat
    assert "max-num-seqs 2 environment ($HLAUNCH_MAX_NUM_SEQS) over 8 model" in flat


def test_show_as_json_holds_value_origin_and_what_is_hidden() -> None:
    done = hlaunch("show", "gpt-oss-20b", "--json", "--set", "tp=4", "--file", str(SEED))
    values = json.loads(done.stdout)["values"]
    assert values["tensor-parallel-size"]["value"] == 4
    assert values["tensor-parallel-size"]["origin"]["layer"] == "flag"
    assert [item["value"] for item in values["tensor-parallel-size"]["shadowed"]] == [1, 2]
    assert values["dtype"]["origin"]["line"] == 4


def test_an_unknown_model() -> None:
    done = hlaunch("show", "gpt-oss-20", "--file", str(SEED))
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.endswith("  available: gpt-oss-20b\nhint: did you mean 'gpt-oss-20b'?\n")
    assert done.stderr.startswith("error: model 'gpt-oss-20' is not in ")


def test_validate_reports_all_and_exits_3(tmp_path: Path) -> None:
    (tmp_path / "model_registry.yml").write_text(
        "models:\n  other:\n    model: x\n    gpu-memory-utilisation: 0.9\n    port: [/red]\n"
    )
    done = hlaunch("validate", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr == (
        "model_registry.yml:4:5: error[unknown-key] models.other.gpu-memory-utilisation: not a known option\n"
        "hint: did you mean 'gpu-memory-utilization'?\n"
        "model_registry.yml:5:11: error[wrong-type] models.other.port: expected a whole number, got a list\n"
        "hint: accepted: >= 1, <= 65535\n"
        "error: model_registry.yml is not valid: 2 errors\n"
    )
    for command in (["list"], ["show", "other"]):
        done = hlaunch(*command, cwd=tmp_path)
        assert done.returncode == 3
        assert done.stderr.endswith("error: model_registry.yml has 2 errors\n")
    done = hlaunch("validate", "--json", cwd=tmp_path)
    assert done.returncode == 3
    report = json.loads(done.stdout)
    assert not report["valid"]
    assert [issue["line"] for issue in report["issues"]] == [4, 5]


def test_validate_takes_a_file_and_can_be_strict(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text("models: {m: {model: org/x, host: 0.0.0.0}}\n")
    done = hlaunch("validate", "r.yml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "r.yml: valid, 1 model, 1 warning\n")
    assert "warning[open-server]" in done.stderr
    assert hlaunch("validate", "--strict", "r.yml", cwd=tmp_path).returncode == 3
    assert hlaunch("validate", "absent.yml", cwd=tmp_path).returncode == 3


def test_secrets_stay_out_of_every_screen(tmp_path: Path) -> None:
    canary = "sk-canary-31337"
    path = tmp_path / "model_registry.yml"
    path.write_text(f"models:\n  m:\n    model: x\n    api-key: {canary}\n    env: {{HF_TOKEN: {canary}, A: b}}\n")
    for args in (["list"], ["show", "m"], ["show", "m", "--explain"], ["show", "m", "--json"], ["validate", "--json"]):
        done = hlaunch(*args, cwd=tmp_path)
        assert done.returncode == 0
        assert canary not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["--help-me", "-x", "[/red]", "\x1b[31m", "a" * 5000, "../../etc/passwd", ""])
def test_hostile_names_end_in_one_clear_error(name: str) -> None:
    done = hlaunch("show", "--", name)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["lst"], "did you mean 'list'?"),
        (["list", "--jsn"], "No such option"),
        (["show"], "Missing argument 'NAME'"),
        (["--file"], "requires"),
        (["--dry-run"], "MODEL_NAME=tiny-oss hlaunch --dry-run"),
        (["show", "tiny-oss", "--set", "port=x"], "'x' is not a whole number"),
    ],
)
def test_a_bad_command_line_exits_2(args: list[str], text: str) -> None:
    done = hlaunch(*args)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_version_and_bare_call() -> None:
    assert hlaunch("--version").stdout.startswith("hlaunch 0.")
    bare = hlaunch()
    assert bare.returncode == 0
    assert bare.stdout.startswith("Usage: hlaunch")


def test_a_bug_is_one_line_and_exit_70_with_a_traceback_only_on_request(tmp_path: Path) -> None:
    code = (
        "import sys\nimport launcher.commands.list as command\nfrom launcher.cli import run\n"
        "def register(app):\n    @app.command('list')\n    def broken():\n"
        "        raise ZeroDivisionError('oops [/red]')\n"
        "command.register = register\nsys.exit(run(sys.argv[1:]))"
    )

    def broken(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *flags, "list"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = broken()
    assert done.returncode == 70
    assert done.stderr.splitlines()[0] == "error: internal error: ZeroDivisionError: oops [/red]"
    assert "Traceback" not in done.stderr
    assert "Traceback" in broken("--debug").stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m launcher.cli schema | head -n 1; echo ${{PIPESTATUS[0]}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["{", "0"]


@pytest.mark.parametrize(
    ("args", "model", "expected"),
    [
        ([], "x", ["up", "--", "x"]),
        (["--dry-run"], "x", ["up", "--dry-run", "--", "x"]),
        (["--dry-run"], "--help", ["up", "--dry-run", "--", "--help"]),
        ([], "", []),
        (["list"], "x", ["list"]),
        (["--help"], "x", ["--help"]),
        (["list", "--debug", "--file", "r"], "", ["--debug", "--file", "r", "list"]),
        (["logs", "-f", "x", "--plain"], "", ["--plain", "logs", "-f", "x"]),
        (["-f", "r", "logs", "-f"], "", ["-f", "r", "logs", "-f"]),
        (["show", "--", "--plain"], "", ["show", "--", "--plain"]),
        (["list", "--file"], "", ["--file", "list"]),
    ],
)
def test_the_seeds_bare_form_and_global_options(args: list[str], model: str, expected: list[str]) -> None:
    assert arrange(args, {"MODEL_NAME": model}) == expected


def test_validate_speaks_sarif(tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text("models: {m: {model: x, prot: 1, host: 0.0.0.0, swap-space: 4}}\n")
    done = hlaunch("validate", "r.yml", "--sarif", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr == ""
    log = json.loads(done.stdout)
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    assert {(item["ruleId"], item["level"]) for item in run["results"]} == {
        ("unknown-key", "error"),
        ("open-server", "warning"),
        ("accepted-flag", "note"),
    }
    for item in run["results"]:
        assert run["tool"]["driver"]["rules"][item["ruleIndex"]]["id"] == item["ruleId"]
        place = item["locations"][0]["physicalLocation"]
        assert place["artifactLocation"]["uri"] == "r.yml"
        assert place["region"]["startLine"] == 1
        assert place["region"]["startColumn"] > 1


@pytest.mark.parametrize("command", [["show", "m", "--explain"], ["plan", "m"], ["up", "m", "--dry-run"]])
def test_a_registry_in_another_folder_leaves_room_for_values(tmp_path: Path, command: list[str]) -> None:
    folder = tmp_path / "a-folder-with-a-long-name" / "and-another-one"
    folder.mkdir(parents=True)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (folder / "r.yml").write_text("models: {m: {model: tiny-oss, description: words that fit into one line}}\n")
    done = hlaunch("--file", str(folder / "r.yml"), *command, cwd=elsewhere, HLAUNCH_STATE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    origins = [line for line in done.stdout.splitlines() if "(r.yml:1:" in line]
    assert any(line.startswith("description ") and "words that fit into one line" in line for line in origins)
    assert f"registry: {folder / 'r.yml'}" in done.stderr.splitlines()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["plan", "tiny-oss", "--inventory"], "larger than an inventory can be"),
        (["env", "tiny-oss", "--env-file"], "larger than 1 MiB"),
        (["validate"], "larger than 1 MiB"),
        (["import", "vllm-config"], "larger than 1 MiB"),
    ],
)
def test_a_file_without_end_is_refused_before_it_is_read(tmp_path: Path, command: list[str], said: str) -> None:
    endless = tmp_path / "endless"
    endless.touch()
    os.truncate(endless, 1 << 40)
    shell = ["sh", "-c", 'ulimit -v 4000000; exec "$@"', "sh", sys.executable, "-m", "launcher.cli"]
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*shell, *command, str(endless)],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (2, 3, 5), done.stderr
    assert said in done.stderr
