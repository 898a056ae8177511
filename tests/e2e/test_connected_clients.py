"""What `hlaunch connect` prints, handed to those whom it is for: each configuration reaches the server that runs.

The SDKs stand for programs that read variables; documents are read as their programs read them. The programs
themselves (`claude`, `codex`, `opencode`), where they are installed, run a command through a scripted model by hand:
`pytest tests/e2e/test_connected_clients.py -m slow`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from e2e_support import HLAUNCH, ROOT, Running
from fake_engine import Brain, Script
from server_support import CHAT, SERVER, TOKENIZER, RunningServer, running

from engine.core.request import EngineRequest
from engine.text import AssistantReply, ToolCall

KEY = "canary-7d20"
ASK_OPENAI = """
import openai, os
answer = openai.OpenAI().chat.completions.create(
    model=os.environ["OPENAI_MODEL"], messages=[{"role": "user", "content": "Hello!"}], max_tokens=8)
print(answer.model)
"""
ASK_ANTHROPIC = """
import anthropic, os
client = anthropic.Anthropic()
for name in ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL"):
    answer = client.messages.create(
        model=os.environ[name], messages=[{"role": "user", "content": "Hello!"}], max_tokens=8)
    print(answer.model)
"""
MARKER = "marker-42"
COMMAND = "echo marker-$((40+2))"
# What each program calls its shell, and the field that holds the command.
SHELLS = {"exec_command": "cmd", "Bash": "command", "bash": "command"}


@pytest.fixture(scope="module")
def locked() -> Iterator[RunningServer]:
    with running(server=replace(SERVER, api_key_sha256=(hashlib.sha256(KEY.encode()).hexdigest(),))) as server:
        yield server


def connect(tool: str, url: str, environ: dict[str, str]) -> str:
    done = subprocess.run(
        [*HLAUNCH, "connect", tool, "--url", url], env=environ, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert KEY not in done.stdout + done.stderr
    return done.stdout


def after_pasting(text: str, program: str, environ: dict[str, str]) -> list[str]:
    """Paste into a shell and run a Python program in it."""
    done = subprocess.run(
        ["sh", "-c", f'{text}\nexec "$0" -c "$1"', sys.executable, program],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def clean_environ(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "ANTHROPIC_", "CLAUDE_", "HLAUNCH_"))}
    return kept | {"NO_COLOR": "1"} | more


@pytest.mark.parametrize(("tool", "program", "num"), [("env", ASK_OPENAI, 1), ("claude", ASK_ANTHROPIC, 2)])
def test_variables_reach_the_server(request: pytest.FixtureRequest, tool: str, program: str, num: int) -> None:
    real: Running = request.getfixturevalue("running")
    environ = clean_environ(HLAUNCH_STATE_DIR=real.environ["HLAUNCH_STATE_DIR"])
    assert after_pasting(connect(tool, real.url, environ), program, environ) == ["tiny-oss"] * num


@pytest.mark.parametrize(("tool", "program", "num"), [("env", ASK_OPENAI, 1), ("claude", ASK_ANTHROPIC, 2)])
def test_variables_name_the_key(locked: RunningServer, tool: str, program: str, num: int) -> None:
    environ = clean_environ(HLAUNCH_API_KEY=KEY)
    text = connect(tool, locked.url, environ)
    assert after_pasting(text, program, environ) == ["tiny-oss"] * num


def test_documents_reach_the_server(locked: RunningServer) -> None:
    environ = clean_environ(HLAUNCH_API_KEY=KEY)
    profile = tomllib.loads(connect("codex", locked.url, environ))
    provider = profile["model_providers"][profile["model_provider"]]
    assert provider["wire_api"] == "responses"
    with openai.OpenAI(base_url=provider["base_url"], api_key=environ[provider["env_key"]]) as client:
        card: Any = client.models.retrieve(profile["model"])
        assert card.max_model_len == profile["model_context_window"]
        assert client.responses.create(model=profile["model"], input="Hello!").output_text
    document = json.loads(connect("opencode", locked.url, environ))
    name, _, model = document["model"].partition("/")
    options = document["provider"][name]["options"]
    assert options["apiKey"] == "{env:HLAUNCH_API_KEY}"
    assert document["provider"][name]["models"][model]["limit"]["context"] == card.max_model_len
    with openai.OpenAI(base_url=options["baseURL"], api_key=KEY) as client:
        answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello!"}])
        assert answer.choices[0].message.content


def run_a_command(request: EngineRequest) -> Script:
    """The model of the programs below: it runs one command in whatever shell is offered and says what it printed."""
    prompt = TOKENIZER.decode(request.prompt_token_ids, skip_special_tokens=False)
    shell = next((name for name in SHELLS if f"type {name} = " in prompt), None)
    if shell is None:
        return Brain(TOKENIZER)(request)
    if f"<|start|>functions.{shell} to=assistant" in prompt:
        result = prompt.rpartition("to=assistant")[2]
        assert "Run it." in prompt, "the chain of thought before the call came back"
        reply = AssistantReply(final="Done: " + (MARKER if MARKER in result else result))
    else:
        # `description` is wanted by some, and ignored by the others.
        arguments = json.dumps({SHELLS[shell]: COMMAND, "description": "says a marker"})
        reply = AssistantReply(reasoning="Run it.", tool_calls=(ToolCall("", shell, arguments),))
    return Script([[token] for token in CHAT.render_completion(reply)])


PROGRAMS = {
    "codex": ("codex", "exec", "--profile", "hlaunch", "--skip-git-repo-check", "Run the command"),
    "claude": ("claude", "-p", "Run the command", "--allowedTools", "Bash(*)"),
    "opencode": ("opencode", "run", "Run the command"),
}


@pytest.mark.slow
@pytest.mark.parametrize("tool", PROGRAMS)
def test_the_program_itself_runs_a_command(tool: str, tmp_path: Path) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    project, codex_home = tmp_path / "project", tmp_path / ".codex"
    project.mkdir()
    codex_home.mkdir()
    keyed = replace(SERVER, api_key_sha256=(hashlib.sha256(KEY.encode()).hexdigest(),))
    with running(run_a_command, server=keyed) as server:
        server.engine.max_model_len = 131072
        environ = clean_environ(HLAUNCH_API_KEY=KEY, HOME=str(tmp_path), HLAUNCH_STATE_DIR=str(tmp_path / "state"))
        text = connect(tool, server.url, environ)
        before = text if tool == "claude" else ""
        (project / "opencode.json" if tool == "opencode" else codex_home / "hlaunch.config.toml").write_text(text)
        done = subprocess.run(
            ["sh", "-c", f'{before}\nexec "$@"', "sh", *PROGRAMS[tool]],
            env=environ,
            cwd=project,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert MARKER in done.stdout
        assert server.engine.live == {}
