"""Differences: what would be made, changed, removed; why; and nothing of a secret."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import UsageError
from launcher.plan.diff import Change, diff_files, diff_text, has_changes, hide_secrets

FILES = {
    "head/docker-compose.yml": b'image: "a:1"\nenvironment:\n  NCCL_DEBUG: "WARN"\n',
    "head/README.md": b"one\n",
    "worker/docker-compose.yml": b'image: "a:1"\n',
}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def by_path(changes: tuple[Change, ...]) -> dict[str, Change]:
    return {change.path: change for change in changes}


def test_the_same_files_change_nothing(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    changes = diff_files(FILES, tmp_path)
    assert [change.action for change in changes] == ["none"] * 3
    assert not has_changes(changes)


def test_each_file_has_its_action_and_reason(tmp_path: Path) -> None:
    write(tmp_path, {**FILES, "worker-old/docker-compose.yml": b"x: 1\n", "head/notes.txt": b"mine"})
    changed = {**FILES, "head/docker-compose.yml": b'image: "a:2"\nenvironment:\n  NCCL_DEBUG: "INFO"\n'}
    changed["worker-b/docker-compose.yml"] = b"image: 1\n"
    found = by_path(diff_files(changed, tmp_path))
    assert found["head/docker-compose.yml"].action == "recreate"
    assert found["head/docker-compose.yml"].reason == "image, NCCL_DEBUG"
    assert '+image: "a:2"' in found["head/docker-compose.yml"].lines
    assert found["worker-b/docker-compose.yml"].action == "create"
    assert found["worker-old/docker-compose.yml"].action == "remove"
    assert found["worker/docker-compose.yml"].action == "none"
    assert "head/notes.txt" not in found, "what is not ours is not touched"
    assert has_changes(tuple(found.values()))


def test_an_empty_folder_gets_everything(tmp_path: Path) -> None:
    assert [change.action for change in diff_files(FILES, tmp_path)] == ["create"] * 3


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("a: 1\n", "a: 1", "line ends"),
        ("a: 1\r\n", "a: 1\n", "line ends"),
        ("a: 1\nb: 1\nc: 1\nd: 1\ne: 1\n", "a: 2\nb: 2\nc: 2\nd: 2\ne: 2\n", "a, b, c and 2 more"),
        ('{"model": "x"}', '{\n"model": "y"}', "model"),
    ],
)
def test_reasons(old: str, new: str, reason: str) -> None:
    change = diff_text("f", old, new)
    assert change.action == "recreate"
    assert change.reason == reason


def test_secrets_are_hidden() -> None:
    change = diff_text("f", '  HF_TOKEN: "canary-old"\n', '  HF_TOKEN: "canary-new"\n  MY_KEY=canary-2\n')
    assert "canary" not in "\n".join(change.lines)
    assert change.reason == "HF_TOKEN, MY_KEY"


ENGINE_JSON = """{
  "server": {
    "host": "127.0.0.1",
    "api_key_sha256": [
      "%s"
    ],
    "insecure_no_auth": %s
  }
}"""


def test_a_list_below_a_secret_name_is_hidden_and_a_switch_is_not() -> None:
    shown = "\n".join(
        diff_text("engine.json", ENGINE_JSON % ("0ca" * 8, "true"), ENGINE_JSON % ("1ca" * 8, "false")).lines
    )
    assert "0ca" not in shown
    assert "1ca" not in shown
    assert '-    "insecure_no_auth": true' in shown
    assert '+    "insecure_no_auth": false' in shown
    assert '     "api_key_sha256": [' in shown


def test_a_value_far_below_its_name_is_hidden() -> None:
    old = "api_key:\n" + "".join(f"  - canary-{number}\n" for number in range(12)) + "port: 1\n"
    new = old.replace("canary-11", "canary-x").replace("port: 1", "port: 2")
    lines = diff_text("f", old, new).lines
    assert "canary" not in "\n".join(lines)
    assert "-port: 1" in lines
    assert "+port: 2" in lines


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('"insecure_no_auth": true,', '"insecure_no_auth": true,'),
        ("api_key: null", "api_key: null"),
        ("  - MY_TOKEN=canary", "  - MY_TOKEN=<hidden>"),
        ('{"a": {"HF_TOKEN": "canary"}}', '{"a": {"HF_TOKEN": <hidden>'),
        ("HF_TOKEN: ${HF_TOKEN:?export it}", "HF_TOKEN: ${HF_TOKEN:?export it}"),
        ("secrets: [hf_token]", "secrets: [hf_token]"),
        ("PASSWORD: 'true'", "PASSWORD: <hidden>"),
        ("# secret: export it, do not write it here", "# secret: export it, do not write it here"),
        ("#HF_TOKEN=canary", "#HF_TOKEN=<hidden>"),
        ("# password: four canary words here", "# password: <hidden>"),
        ("# HF_TOKEN=canary", "# HF_TOKEN=<hidden>"),
        ("DB_URL: https://h/x?token=canary", "DB_URL: https://h/x?token=<hidden>"),
        ("model: openai/gpt-oss-20b", "model: openai/gpt-oss-20b"),
        ('RAY_AUTH_MODE: "token"', 'RAY_AUTH_MODE: "token"'),
        ("RAY_AUTH_MODE: canary", "RAY_AUTH_MODE: <hidden>"),
        ("AUTH_MODE=canary", "AUTH_MODE=<hidden>"),
        ("  RAY_AUTH_TOKEN_PATH: /run/secrets/ray_token", "  RAY_AUTH_TOKEN_PATH: /run/secrets/ray_token"),
        ('"api_key_file": "/run/secrets/api_key",', '"api_key_file": "/run/secrets/api_key",'),
        ("HF_TOKEN_PATH=./token", "HF_TOKEN_PATH=./token"),
        ("HF_TOKEN_PATH=canary", "HF_TOKEN_PATH=<hidden>"),
        ("HF_TOKEN_PATH=/run/token canary", "HF_TOKEN_PATH=<hidden>"),
        ("HF_TOKEN=/run/canary", "HF_TOKEN=<hidden>"),
        ('{"token_file": "/run/t", "token": "canary"}', '{"token_file": <hidden>'),
        ('"num_key_value_heads": 8,', '"num_key_value_heads": 8,'),
        ('"eos_token_id": 200002', '"eos_token_id": 200002'),
        ("api_key_id: 200002", "api_key_id: <hidden>"),
        ("tokenizer: openai/gpt-oss-20b", "tokenizer: openai/gpt-oss-20b"),
        ("MAX_TOKENS: 16", "MAX_TOKENS: 16"),
        ('"max_num_batched_tokens": 8192,', '"max_num_batched_tokens": 8192,'),
    ],
)
def test_what_may_be_shown_of_a_line(line: str, shown: str) -> None:
    assert hide_secrets([line]) == [shown]


def test_a_text_of_several_lines_is_hidden() -> None:
    shown = hide_secrets(["key: |", "  canary one: 1", "", "  canary two", "model: m"])
    assert shown == ["key: |", "  <hidden>", "", "  <hidden>", "model: m"]


@given(st.none() | st.text(max_size=200), st.none() | st.text(max_size=200))
def test_no_difference_is_missed(old: str | None, new: str | None) -> None:
    assert (diff_text("f", old, new).action == "none") is (old == new)


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_bytes_that_are_no_text_are_told_apart(
    tmp_path_factory: pytest.TempPathFactory, one: bytes, two: bytes
) -> None:
    folder = tmp_path_factory.mktemp("d")
    write(folder, {"head/f": one})
    assert has_changes(diff_files({"head/f": two}, folder)) is (one != two)


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "head/docker-compose.yml").mkdir(parents=True)
    with pytest.raises(UsageError, match="cannot read"):
        diff_files(FILES, tmp_path)
