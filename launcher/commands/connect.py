"""`hlaunch connect`: other programs configured for a running server. Knows what to ask of it, and what goes where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.commands import invocation_of

if TYPE_CHECKING:
    from launcher.client import Client
    from launcher.commands import Invocation
    from launcher.connect import Endpoint
    from launcher.registry.values import SecretRef
    from launcher.running import RunningServer

TIMEOUT_SECONDS = 5.0


def register(app: typer.Typer) -> None:
    @app.command("connect")
    def connect(
        ctx: typer.Context,
        tool: Annotated[str, typer.Argument(metavar="TOOL", help="env, claude, codex, opencode or openwebui.")],
        name: Annotated[
            str | None, typer.Argument(metavar="NAME", help="A model that runs; left out: the only one.")
        ] = None,
        url: Annotated[str | None, typer.Option("--url", help="A server at this address instead.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Print ready configuration for a running server: data to stdout, where it goes to stderr.

        The API key is never printed: the configuration says where it is.
        """
        import textwrap

        from launcher.connect import TOOLS
        from launcher.errors import UsageError
        from launcher.registry.suggest import did_you_mean
        from launcher.running import running_server

        if tool not in TOOLS:
            raise UsageError(f"no such tool: {tool}", hint=did_you_mean(tool, TOOLS) or f"tools: {', '.join(TOOLS)}")
        invocation = invocation_of(ctx)
        server = running_server(invocation, name, url)
        endpoint, warnings, routes = _examine(invocation, server, tool)
        recipe = TOOLS[tool](endpoint)
        warnings += recipe.warnings
        if recipe.needs not in routes:
            warnings += (f"{endpoint.url} does not serve {recipe.needs}, which {tool} needs",)
        console = invocation.console
        if as_json:
            console.json(
                {
                    "tool": tool,
                    "url": endpoint.url,
                    "model": endpoint.model,
                    "context_tokens": endpoint.context_tokens,
                    "key": _key_fact(endpoint.key),
                    "format": recipe.format,
                    "goes_to": recipe.goes_to,
                    "text": recipe.text,
                    "needs": recipe.needs,
                    "is_served": recipe.needs in routes,
                    "warnings": list(warnings),
                }
            )
            return
        for line in recipe.text.splitlines():
            console.data(line)
        for line in textwrap.wrap(recipe.goes_to, 78, break_long_words=False, break_on_hyphens=False):
            console.note(f"# {line}")
        for warning in warnings:
            console.warning(warning)


def _examine(
    invocation: Invocation, server: RunningServer, tool: str
) -> tuple[Endpoint, tuple[str, ...], tuple[str, ...]]:
    """Ask the server for its key, its model, its context and its routes.

    Raises: EngineFailed when it does not answer, UsageError for an address that is none.
    """
    from launcher.client import ApiError, Client
    from launcher.connect import TOOLS, Endpoint, is_plain_url
    from launcher.errors import EngineFailed, UsageError

    if not is_plain_url(server.url):
        raise UsageError(f"{server.url!r} is no plain address", hint="for example: http://127.0.0.1:8000")
    warnings: tuple[str, ...] = ()
    client = Client(server.url, read_timeout_seconds=TIMEOUT_SECONDS)
    key: SecretRef | None = None
    try:
        card = _card(client)
    except ApiError as error:
        if error.status not in (401, 403):
            raise
        key, warnings = _reference(server)
        secret = server.reveal_key(invocation)
        if secret is None:
            fix = f"put it into {key.name}" if key.kind == "file" else f"run: export {key.name}=… (it is not printed)"
            raise EngineFailed(f"{server.url} asks for an API key", hint=fix) from error
        client.close()
        client = Client(server.url, secret, read_timeout_seconds=TIMEOUT_SECONDS)
        card = _card(client)
    model, context = str(card.get("id", "")), card.get("max_model_len") or card.get("context_length")
    if not model.isprintable() or not model:
        raise EngineFailed(f"{server.url} names a model that cannot be written down: {model!r}")
    endpoint = Endpoint(server.url, model, key, context if type(context) is int and context > 0 else None)
    needed = TOOLS[tool](endpoint).needs
    routes = (needed,) if _is_served(client, needed) else ()
    client.close()
    return endpoint, warnings, routes


def _card(client: Client) -> dict[str, Any]:
    """Return what the server says of its first model. Raises: ApiError, EngineFailed."""
    from launcher.errors import EngineFailed

    try:
        found = client.get("/v1/models")["data"][0]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise EngineFailed(f"{client.base_url} lists no model", hint="is this a model server's address?") from error
    return found if isinstance(found, dict) else {}


def _is_served(client: Client, route: str) -> bool:
    """Say whether a route for POST exists: asked with GET, a server that has it refuses the method, not the path."""
    from launcher.client import ApiError

    try:
        client.get(route)
    except ApiError as error:
        return error.status != 404
    except ValueError:
        return True
    return True


def _key_fact(key: SecretRef | None) -> dict[str, str | None]:
    return {"kind": "none" if key is None else key.kind, "name": None if key is None else key.name}


def _reference(server: RunningServer) -> tuple[SecretRef, tuple[str, ...]]:
    """Turn a registry's reference into one that other programs can follow."""
    from launcher.registry.values import SecretRef
    from launcher.running import KEY_VARIABLE

    if server.key.kind != "literal":
        return server.key, ()
    return SecretRef("env", KEY_VARIABLE), (
        f"the API key of {server.name} is written in the registry and is not printed; run: export {KEY_VARIABLE}=…",
    )
