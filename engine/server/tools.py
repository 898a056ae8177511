"""The tools of one request and which of them must be called, whatever dialect offered them.

Knows limits, what needs a grammar, and the header that forces a call. Refuses to know how a dialect writes tools.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from engine.server import errors
from engine.server.http import Exchange
from engine.text import ChatRequestError, ToolDefinition, tools_from_openai

if TYPE_CHECKING:
    from engine.server.app import App

MAX_TOOLS = 128
# Claude Code's own tools are 60 KiB; one server of the Model Context Protocol comes on top.
MAX_TOOLS_BYTES = 256 * 1024
# JSON levels; a schema takes two of them for each of its own.
MAX_TOOLS_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of one request. `forced` names the one that must be called."""

    definitions: tuple[ToolDefinition, ...] = ()
    forced: str | None = None

    @property
    def may_call(self) -> bool:
        return bool(self.definitions)


def check_size(raw: Sequence[Any]) -> None:
    """Raise ApiError 400 for more tools than a prompt should hold, or nested deeper than any reader follows."""
    if len(raw) > MAX_TOOLS:
        raise errors.invalid_value("tools", f"tools: at most {MAX_TOOLS}.")
    if _is_deeper(raw, MAX_TOOLS_DEPTH):
        raise errors.invalid_value("tools", f"tools: nested deeper than {MAX_TOOLS_DEPTH} levels.")
    if raw and len(orjson.dumps(raw)) > MAX_TOOLS_BYTES:
        raise errors.invalid_value("tools", f"tools: at most {MAX_TOOLS_BYTES} bytes of JSON.")


def _is_deeper(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, list | dict)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def read_functions(raw: Sequence[dict[str, Any]], exchange: Exchange) -> tuple[ToolDefinition, ...]:
    """Read function tools in OpenAI's nested or flat shape; tools of other types are skipped with a warning.

    Raises: ApiError 400 naming the field.
    """
    check_size(raw)
    warn_skipped((tool.get("type", "function") for tool in raw), ("function",), exchange)
    functions = [tool for tool in raw if tool.get("type", "function") == "function"]
    nested = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in functions]
    warn_strict(nested, exchange)
    try:
        return tuple(tools_from_openai(raw))
    except ChatRequestError as error:
        raise errors.invalid_value(error.param, f"{error.param}: {error}.") from None


def warn_skipped(types: Any, known: Sequence[str], exchange: Exchange) -> None:
    """Say in the answer's warning header which types of tools are left out."""
    skipped = sorted({str(kind)[:32] for kind in types} - set(known))
    if skipped:
        exchange.warn(f"tools of type {', '.join(skipped)} are skipped")


def warn_strict(functions: Iterable[dict[str, Any]], exchange: Exchange) -> None:
    """Say in the answer's warning header that nothing holds arguments to a schema yet.

    Not refused: OpenAI's own clients mark the tools that they make strict, and models mostly keep to a schema.
    """
    if any(function.get("strict") for function in functions):
        exchange.warn("strict tools: arguments are not held to their schema")


def choose(
    tools: tuple[ToolDefinition, ...],
    mode: str,
    name: str | None = None,
    *,
    mode_name: str = "required",
    name_param: str = "tool_choice.function.name",
) -> Tools:
    """Apply a choice: `none`, `auto`, `required`, or `named` with the tool's `name`.

    `mode_name` and `name_param` are the dialect's words for what may be wrong.
    Raises: ApiError 400 for a choice that names no tool, or that needs a grammar (`required` among several).
    """
    if mode == "auto":
        return Tools(tools)
    if mode == "none":
        return Tools()
    names = [tool.name for tool in tools]
    if mode == "named":
        if name not in names:
            raise errors.invalid_value(name_param, f"{name_param} names a function that is not in tools.")
        return Tools(tools, forced=name)
    if not tools:
        raise errors.invalid_value("tool_choice", f"tool_choice: '{mode_name}' needs at least one function tool.")
    if len(tools) > 1:
        raise errors.unsupported_parameter(
            "tool_choice",
            f"tool_choice '{mode_name}' among several tools is not supported yet; name one, or offer one tool.",
        )
    return Tools(tools, forced=names[0])


def choose_openai(tools: tuple[ToolDefinition, ...], choice: str | dict[str, Any] | None) -> Tools:
    """Apply OpenAI's `tool_choice`, in the nested shape of chat or the flat one of responses.

    Raises: ApiError 400 as `choose`.
    """
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools, choice = _allowed(tools, choice)
    if choice is None or isinstance(choice, str):
        if choice not in (None, "none", "auto", "required"):
            raise _unknown_choice()
        return choose(tools, choice or "auto")
    is_flat = "function" not in choice and choice.get("type") == "function"
    function = choice if is_flat else choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise _unknown_choice()
    return choose(tools, "named", name, name_param="tool_choice.name" if is_flat else "tool_choice.function.name")


def _unknown_choice() -> errors.ApiError:
    return errors.invalid_value(
        "tool_choice", "tool_choice: expected 'none', 'auto', 'required' or an object that names a function."
    )


def _allowed(tools: tuple[ToolDefinition, ...], choice: dict[str, Any]) -> tuple[tuple[ToolDefinition, ...], Any]:
    """Apply `allowed_tools`: keep the tools that it lists, and take its mode as the choice."""
    inner = choice.get("allowed_tools")
    inner = inner if isinstance(inner, dict) else choice
    mode, listed = inner.get("mode"), inner.get("tools")
    if mode not in ("auto", "required") or not isinstance(listed, list):
        raise errors.invalid_value(
            "tool_choice.allowed_tools", "tool_choice.allowed_tools needs a mode and a list of tools."
        )
    names = set()
    for item in listed:
        function = item.get("function", item) if isinstance(item, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if name not in [tool.name for tool in tools]:
            raise errors.invalid_value(
                "tool_choice.allowed_tools", "tool_choice.allowed_tools names a tool that is not in tools."
            )
        names.add(name)
    return tuple(tool for tool in tools if tool.name in names), mode


def forced_prefix(app: App, name: str) -> list[int]:
    """Return the header of a call, which leaves the model nothing but the arguments to write.

    Until grammars constrain the reply this is how a named choice is kept; the model does not reason before it.
    The name passed the tool reader, so it cannot end the header.
    """
    if "<|channel|>" not in app.tokenizer.special_ids:
        raise errors.unsupported_parameter("tool_choice", "This model's chat format cannot force a tool call yet.")
    return app.tokenizer.encode_trusted(f" to=functions.{name}<|channel|>commentary json<|message|>")
