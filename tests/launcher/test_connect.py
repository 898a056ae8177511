"""Configuration for other programs: what each of them reads, and that no key is ever in it."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from launcher_support import REGISTRY
from stub_server import Stub, serving

from launcher import cli
from launcher.connect import TOOLS, Endpoint
from launcher.registry import SecretRef
from launcher.supervise.cluster_run import ClusterRun
from launcher.supervise.instance import InstanceFolder

CANARY = "canary-5f1c"
HOSTILE = "a'b\"c$(id)`id`\\ {env:HOME}#é"


def models(name: str = "m", context: object = 131072) -> tuple[int, bytes]:
    return 200, json.dumps({"data": [{"id": name, "max_model_len": context}]}).encode()


def whole(name: str = "m", context: object = 131072) -> dict[str, tuple[int, bytes]]:
    routes = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
    return {"/v1/models": models(name, context), **dict.fromkeys(routes, (405, b"{}"))}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model_registry.yml").write_text(REGISTRY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HLAUNCH_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("HLAUNCH_REGISTRY", str(tmp_path / "model_registry.yml"))
    for name in ("HLAUNCH_API_KEY", "MODEL_NAME", "TEST_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli.run(["connect", *args])
    out, err = capsys.readouterr()
    assert CANARY not in out + err
    return code, out, err


def shell(text: str, environ: dict[str, str] | None = None) -> dict[str, str]:
    """Let a real shell read exports; return its environment."""
    done = subprocess.run(
        ["sh", "-c", f"{text}\nexec env -0"],
        env={"PATH": os.environ["PATH"], **(environ or {})},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if line)


@pytest.mark.parametrize("model", ["m", "org/name", HOSTILE])
def test_shell_variables_are_what_they_say_for_any_model_name(model: str) -> None:
    endpoint = Endpoint("http://h:1", model, SecretRef("env", "SOME_KEY"), 131072)
    got = shell(TOOLS["env"](endpoint).text, {"SOME_KEY": CANARY})
    assert got["OPENAI_BASE_URL"] == got["OPENAI_API_BASE"] == "http://h:1/v1"
    assert (got["OPENAI_API_KEY"], got["OPENAI_MODEL"]) == (CANARY, model)
    got = shell(TOOLS["claude"](endpoint).text, {"SOME_KEY": CANARY, "ANTHROPIC_API_KEY": "in the way"})
    assert got["ANTHROPIC_BASE_URL"] == "http://h:1", "it appends /v1/messages itself"
    assert (got["ANTHROPIC_AUTH_TOKEN"], got["ANTHROPIC_API_KEY"]) == (CANARY, "")
    assert {got[f"ANTHROPIC_DEFAULT_{kind}_MODEL"] for kind in ("OPUS", "SONNET", "HAIKU")} == {model}
    assert got["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "131072"
    assert "MAX_CONTEXT" not in TOOLS["claude"](Endpoint("http://h:1", model, None)).text


@pytest.mark.parametrize("model", ["m", "org/name", HOSTILE])
def test_codex_and_opencode_get_documents_that_parse(model: str) -> None:
    endpoint = Endpoint("http://h:1", model, SecretRef("env", "SOME_KEY"), 131072)
    profile = tomllib.loads(TOOLS["codex"](endpoint).text)
    assert (profile["model"], profile["model_provider"], profile["model_context_window"]) == (model, "hlaunch", 131072)
    assert profile["model_providers"]["hlaunch"] == {
        "name": "hlaunch", "base_url": "http://h:1/v1", "env_key": "SOME_KEY", "wire_api": "responses",
    }  # fmt: skip
    document = json.loads(TOOLS["opencode"](endpoint).text)
    provider = document["provider"]["hlaunch"]
    assert document["model"] == f"hlaunch/{model}"
    assert provider["options"] == {"baseURL": "http://h:1/v1", "apiKey": "{env:SOME_KEY}"}
    assert provider["models"][model]["limit"] == {"context": 131072, "output": 32768}


def test_a_key_in_a_file_is_read_by_the_program_that_needs_it(tmp_path: Path) -> None:
    file = tmp_path / "the key"
    file.write_text(f"{CANARY}\n")
    endpoint = Endpoint("http://h:1", "m", SecretRef("file", str(file)))
    assert shell(TOOLS["env"](endpoint).text)["OPENAI_API_KEY"] == CANARY
    assert (
        json.loads(TOOLS["opencode"](endpoint).text)["provider"]["hlaunch"]["options"]["apiKey"] == f"{{file:{file}}}"
    )
    recipe = TOOLS["codex"](endpoint)
    assert "HLAUNCH_API_KEY" in recipe.text
    assert str(file) in recipe.warnings[0]


def test_open_webui_reaches_the_server_from_its_container_and_no_argv_holds_the_key(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nprintf "key=%s\\n" "$OPENAI_API_KEY"\n')
    docker.chmod(0o755)
    for url, network in (
        ("http://127.0.0.1:8000", ["--network", "host"]),
        ("http://gpu:8000", ["-p", "127.0.0.1:3000:8080"]),
    ):
        text = TOOLS["openwebui"](Endpoint(url, HOSTILE, SecretRef("env", "SOME_KEY"))).text
        environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SOME_KEY": CANARY}
        argv = subprocess.run(["sh", "-c", text], env=environ, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        assert argv[4:6] == network
        assert f"OPENAI_API_BASE_URL={url}/v1" in argv
        assert f"DEFAULT_MODELS={HOSTILE}" in argv
        assert [line for line in argv if CANARY in line] == [f"key={CANARY}"]


def test_a_server_without_a_key_needs_none(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Stub(whole())) as stub:
        code, out, err = run(capsys, "env", "--url", stub.url + "/v1/")
        assert (code, shell(out)["OPENAI_API_KEY"]) == (0, "unused")
        assert err == '# paste into a shell, or run: eval "$(hlaunch connect env)"\n'
        code, out, _ = run(capsys, "codex", "--url", stub.url)
        assert "env_key" not in tomllib.loads(out)["model_providers"]["hlaunch"]
        code, out, _ = run(capsys, "opencode", "--url", stub.url)
        assert "apiKey" not in json.loads(out)["provider"]["hlaunch"]["options"]


def test_a_key_is_named_and_never_printed(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Stub(whole(), key=CANARY)) as stub:
        code, out, err = run(capsys, "env", "keyed", "--url", stub.url)
        assert (code, out) == (1, "")
        assert "run: export TEST_API_KEY=" in err
        monkeypatch.setenv("TEST_API_KEY", CANARY)
        for tool in TOOLS:
            code, out, err = run(capsys, tool, "keyed", "--url", stub.url)
            assert (code, "TEST_API_KEY" in out) == (0, True), tool
            code, out, _ = run(capsys, tool, "keyed", "--url", stub.url, "--json")
            found = json.loads(out)
            assert (code, found["key"], found["warnings"]) == (0, {"kind": "env", "name": "TEST_API_KEY"}, [])
        (home / "model_registry.yml").write_text(f"models:\n  literal: {{model: tiny-oss, api-key: {CANARY}}}\n")
        code, out, err = run(capsys, "claude", "literal", "--url", stub.url)
        assert code == 0
        assert "${HLAUNCH_API_KEY:?" in out
        assert "written in the registry and is not printed" in err


def test_what_a_server_lacks_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = whole(context=4096)
    del answers["/v1/messages"]
    with serving(Stub(answers)) as stub:
        code, out, err = run(capsys, "claude", "--url", stub.url)
        assert code == 0
        assert "warning: Claude Code wants a context of 65,536 tokens or more; this server has 4,096" in err
        assert f"warning: {stub.url} does not serve /v1/messages, which claude needs" in err
        code, out, _ = run(capsys, "claude", "--url", stub.url, "--json")
        found: dict[str, Any] = json.loads(out)
        assert (found["is_served"], found["context_tokens"], len(found["warnings"])) == (False, 4096, 2)


def launch(home: Path, name: str, url: str) -> None:
    folder = InstanceFolder(home / "state", name)
    folder.create()
    run = ClusterRun(name, "tiny-oss", "pair", "process", "0", (), 0.0, url)
    folder.cluster_file.write_text(run.to_json())


def test_launches_on_clusters_count_and_several_need_a_name(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Stub(whole())) as stub:
        launch(home, "tiny-oss", stub.url)
        code, out, _ = run(capsys, "env")
        assert (code, f"OPENAI_BASE_URL={stub.url}/v1" in out) == (0, True)
        launch(home, "other", "")
        code, out, err = run(capsys, "env")
        assert (code, out, err) == (2, "", "error: 2 models run: other, tiny-oss\nhint: say which one: NAME\n")
        assert run(capsys, "env", "tiny")[0] == 0, "an alias names it"
        code, _, err = run(capsys, "env", "other")
        assert (code, err.startswith("error: other is not ready yet")) == (1, True)


def stream(*deltas: dict[str, str]) -> tuple[int, bytes]:
    events = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
    return 200, "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()


def test_a_launch_on_a_cluster_is_talked_to_and_measured(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {
        **whole(),
        "POST /v1/chat/completions": stream({"content": "hel"}, {"content": "lo"}),
        "POST /v1/completions": stream({"content": "x"}, {"content": "y"}),
    }
    with serving(Stub(answers)) as stub:
        launch(home, "tiny-oss", stub.url)
        assert cli.run(["chat", "-m", "hello", "tiny"]) == 0
        assert capsys.readouterr().out == "hello\n"
        assert cli.run(["chat", "-m", "hello", "any", "--url", f"{stub.url}/v1"]) == 0, "as clients are given it"
        assert capsys.readouterr().out == "hello\n"
        assert cli.run(["chat", "-m", "hello", "tiny", "--set", "seed=1"]) == 2
        assert "tiny-oss is running already" in capsys.readouterr().err
        assert cli.run(["bench", "tiny", "-c", "1", "--runs", "1", "--requests", "1", "--output", "2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["device"] == {"name": "unknown"}, "it is on other machines"
        assert "POST /v1/completions" in stub.seen
        launch(home, "keyed", stub.url)
        assert cli.run(["chat", "-m", "hello", "keyed"]) == 5
        assert "error: api-key: ${TEST_API_KEY} is not set\nhint: run: export TEST" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code", "cause"),
    [
        (("env",), 1, "error: nothing runs"),
        (("env", "tiny"), 1, "error: tiny-oss is not running"),
        (("env", "none-such"), 4, "error: "),
        (("claud",), 2, "error: no such tool: claud\nhint: did you mean 'claude'"),
        (("env", "--url", "http://127.0.0.1:9"), 1, "error: no answer from http://127.0.0.1:9"),
        (("env", "--url", "http://h/$(id)"), 2, "error: 'http://h/$(id)' is no plain address"),
        (("env", "--url", "file:///etc/passwd"), 2, "error: "),
    ],
)
def test_no_server_no_configuration(
    home: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int, cause: str
) -> None:
    got, out, err = run(capsys, *args)
    assert (got, out) == (code, "")
    assert err.startswith(cause)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"data": []}', b'{"data": [7]}', b'{"data": [{"id": "a\\u001b[2J"}]}'])
def test_a_server_that_is_none_is_refused(home: Path, capsys: pytest.CaptureFixture[str], body: bytes) -> None:
    with serving(Stub({"/v1/models": (200, body)})) as stub:
        code, out, err = run(capsys, "env", "--url", stub.url)
    assert (code, out) == (1, "")
    assert "\x1b" not in err
