"""Configuration of other programs for a running server: pure text from an address, a model and a key's reference.

Knows: what Claude Code, Codex, opencode and Open WebUI read, and where. Refuses to know: how the server is found; a
key's value. Keys go by reference: a shell variable, a file, a variable's name.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from launcher.addresses import is_loopback
from launcher.registry.values import SecretRef

MIN_CLAUDE_CONTEXT = 64 * 1024
"""Tokens below which Claude Code's own instructions and tools leave no room for work."""
MIN_CODING_CONTEXT = 16 * 1024
NO_KEY = "unused"
"""What is sent where a program insists on a key and the server wants none."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server as its clients see it. `context_tokens` is None when it does not say.

    `key` says where the key is, in a variable or a file; None means that the server asks for none.
    """

    url: str
    model: str
    key: SecretRef | None = None
    context_tokens: int | None = None

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"

    @property
    def is_loopback(self) -> bool:
        return is_loopback(urlsplit(self.url).hostname or "")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to paste. `goes_to` says where and what to run then; `needs` is the route the program talks to."""

    text: str
    format: Literal["shell", "toml", "json"]
    goes_to: str
    needs: str
    warnings: tuple[str, ...] = ()


def env(endpoint: Endpoint) -> Recipe:
    """Variables that the OpenAI SDKs and most programs built on them read."""
    return Recipe(
        _exports(
            {
                "OPENAI_BASE_URL": shlex.quote(endpoint.v1),
                # The older name, still read by LangChain and aider.
                "OPENAI_API_BASE": shlex.quote(endpoint.v1),
                "OPENAI_API_KEY": _in_shell(endpoint.key),
                "OPENAI_MODEL": shlex.quote(endpoint.model),
            }
        ),
        "shell",
        'paste into a shell, or run: eval "$(hlaunch connect env)"',
        "/v1/chat/completions",
    )


def claude(endpoint: Endpoint) -> Recipe:
    """Variables of Claude Code. All its model classes map to the one model: it calls a small one for titles."""
    model = shlex.quote(endpoint.model)
    variables = {
        # It appends /v1/messages itself.
        "ANTHROPIC_BASE_URL": shlex.quote(endpoint.url),
        "ANTHROPIC_AUTH_TOKEN": _in_shell(endpoint.key),
        # Any value here would go before the token.
        "ANTHROPIC_API_KEY": "",
        "ANTHROPIC_MODEL": model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    if endpoint.context_tokens is not None:
        # It takes any other model for one of 200,000 tokens and would compact the conversation too late.
        variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(endpoint.context_tokens)
    return Recipe(
        _exports(variables),
        "shell",
        "paste into a shell, then run: claude",
        "/v1/messages",
        _short(endpoint, MIN_CLAUDE_CONTEXT, "Claude Code"),
    )


def codex(endpoint: Endpoint) -> Recipe:
    """A profile of Codex, which speaks only the Responses API and takes its key from a variable."""
    lines = [f"model = {_quoted(endpoint.model)}", 'model_provider = "hlaunch"']
    if endpoint.context_tokens is not None:
        lines.append(f"model_context_window = {endpoint.context_tokens}")
    lines += ["", "[model_providers.hlaunch]", 'name = "hlaunch"', f"base_url = {_quoted(endpoint.v1)}"]
    warnings = _short(endpoint, MIN_CODING_CONTEXT, "Codex")
    key = endpoint.key
    if key is not None:
        variable = key.name if key.kind == "env" else "HLAUNCH_API_KEY"
        lines.append(f"env_key = {_quoted(variable)}")
        if key.kind == "file":
            warnings += (f"Codex reads no key file; run: export {variable}={_in_shell(key)}",)
    lines.append('wire_api = "responses"')
    return Recipe(
        "\n".join(lines) + "\n",
        "toml",
        "save as ~/.codex/hlaunch.config.toml, then run: codex --profile hlaunch "
        "(or put it at the top of ~/.codex/config.toml)",
        "/v1/responses",
        warnings,
    )


def opencode(endpoint: Endpoint) -> Recipe:
    """A provider of opencode; a model without limits would be taken for a small one."""
    options = {"baseURL": endpoint.v1}
    if endpoint.key is not None:
        options["apiKey"] = f"{{{endpoint.key.kind}:{endpoint.key.name}}}"
    model: dict[str, object] = {"name": endpoint.model}
    if endpoint.context_tokens is not None:
        # It keeps the output's share of the context free, so all of it would leave nothing for the prompt.
        model["limit"] = {"context": endpoint.context_tokens, "output": max(1, endpoint.context_tokens // 4)}
    document = {
        "$schema": "https://opencode.ai/config.json",
        "provider": {
            "hlaunch": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "hlaunch",
                "options": options,
                "models": {endpoint.model: model},
            }
        },
        "model": f"hlaunch/{endpoint.model}",
    }
    return Recipe(
        json.dumps(document, indent=2) + "\n",
        "json",
        "save as opencode.json in a project, or ~/.config/opencode/opencode.json, then run: opencode",
        "/v1/chat/completions",
        _short(endpoint, MIN_CODING_CONTEXT, "opencode"),
    )


def openwebui(endpoint: Endpoint) -> Recipe:
    """A container of Open WebUI at port 3000. The key is in its environment, not in anybody's process list."""
    # A container's own loopback is not the host's.
    network = (
        ["--network host", "-e PORT=3000 -e HOST=127.0.0.1"] if endpoint.is_loopback else ["-p 127.0.0.1:3000:8080"]
    )
    lines = [
        f"OPENAI_API_KEY={_in_shell(endpoint.key)} docker run -d --name open-webui",
        *network,
        f"-e OPENAI_API_BASE_URL={shlex.quote(endpoint.v1)} -e OPENAI_API_KEY",
        f"-e DEFAULT_MODELS={shlex.quote(endpoint.model)} -e ENABLE_OLLAMA_API=false",
        "-v open-webui:/app/backend/data",
        "ghcr.io/open-webui/open-webui:main",
    ]
    return Recipe(
        " \\\n  ".join(lines) + "\n",
        "shell",
        "paste into a shell, then open http://127.0.0.1:3000 (what an earlier start saved goes before these values)",
        "/v1/chat/completions",
    )


TOOLS: Mapping[str, Callable[[Endpoint], Recipe]] = {
    "env": env,
    "claude": claude,
    "codex": codex,
    "opencode": opencode,
    "openwebui": openwebui,
}

_URL = re.compile(r"https?://[A-Za-z0-9._\[\]:%/~-]+")


def is_plain_url(url: str) -> bool:
    """Say whether an address is one that needs no quoting anywhere."""
    return _URL.fullmatch(url) is not None


def _exports(variables: Mapping[str, str]) -> str:
    return "".join(f"export {name}={value}\n" for name, value in variables.items())


def _in_shell(key: SecretRef | None) -> str:
    """An expression of a POSIX shell that yields the key."""
    if key is None:
        return NO_KEY
    if key.kind == "file":
        return f'"$(cat {shlex.quote(key.name)})"'
    return f'"${{{key.name}:?export {key.name} first}}"'


def _quoted(text: str) -> str:
    """Write a printable text as a TOML basic string; JSON's escapes of quotes and backslashes are TOML's."""
    return json.dumps(text, ensure_ascii=False)


def _short(endpoint: Endpoint, wanted: int, program: str) -> tuple[str, ...]:
    if endpoint.context_tokens is None or endpoint.context_tokens >= wanted:
        return ()
    return (f"{program} wants a context of {wanted:,} tokens or more; this server has {endpoint.context_tokens:,}",)
