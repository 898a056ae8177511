"""Function tools as the TypeScript-like declarations that gpt-oss was trained on.

Knows JSON Schema as far as the declarations can say it; anything else is `any`. The layout follows the
`oss-harmony` package character by character, but for two things: a tool whose schema has no properties is
`() => any` as the format's documentation says, and a description of several lines is a comment on each line
(the package lets the second line leak out of the comment).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeGuard

from engine.text.messages import ToolDefinition, compact_json

# A schema nested deeper than this is `any` below; it also bounds the recursion on hostile input.
MAX_DEPTH = 32


def render_tools(tools: Iterable[ToolDefinition]) -> str:
    """Write the `functions` namespace with one `type` per tool and a blank line after each."""
    parts = ["namespace functions {\n\n"]
    for tool in tools:
        parts.extend(_comment(tool.description, ""))
        parts.append(f"type {tool.name} = {_signature(tool)} => any;\n\n")
    parts.append("} // namespace functions")
    return "".join(parts)


def _signature(tool: ToolDefinition) -> str:
    if tool.parameters is None or not _properties(tool.parameters):
        return "()"
    # Only objects declare fields; a schema with properties but no type is an object to everybody.
    return f"(_: {_type({'type': 'object', **tool.parameters}, '', 0)})"


def _type(schema: object, indent: str, depth: int) -> str:
    """Write one schema as a type; nested fields are indented with `indent`."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return "any"
    variants = schema.get("oneOf")
    if _is_list(variants):
        return "".join(f"\n{indent} | {_variant(v, indent, depth)}{_remark(v)}" for v in variants)
    kind = schema.get("type")
    if _is_list(kind):
        names = ["number" if name == "integer" else name for name in kind if isinstance(name, str)]
        return " | ".join(names) or "any"
    match kind:
        case "object":
            return _object(schema, indent, depth)
        case "array":
            return f"{_type(schema['items'], indent, depth + 1)}[]" if "items" in schema else "Array<any>"
        case "string":
            return " | ".join(f'"{v}"' for v in _enum(schema) if isinstance(v, str)) or "string"
        case "number" | "integer":
            return "number"
        case "boolean":
            return "boolean"
    return "any"


def _object(schema: Mapping[str, object], indent: str, depth: int) -> str:
    required = schema.get("required")
    needed = {name for name in required if isinstance(name, str)} if _is_list(required) else set()
    lines = [*_comment(schema.get("description"), indent), "{\n"]
    for name, value in _properties(schema).items():
        lines.extend(_field(name if name in needed else f"{name}?", value, indent, depth + 1))
    lines.append(f"{indent}}}")
    return "".join(lines)


def _field(name: str, schema: object, indent: str, depth: int) -> Iterator[str]:
    """Yield the comments and the declaration of one field, `name` with its question mark."""
    if not isinstance(schema, Mapping):
        yield f"{indent}{name}: any,\n"
        return
    title, examples = schema.get("title"), schema.get("examples")
    variants = schema.get("oneOf")
    if isinstance(title, str):
        yield from _comment(title, indent)
        yield f"{indent}//\n"
    description = schema.get("description")
    if not _is_list(variants):
        yield from _comment(description, indent)
    if _is_list(examples) and examples:
        yield f"{indent}// Examples:\n"
        for example in examples:
            if isinstance(example, str):
                yield from _comment(f'- "{example}"', indent)
    if _is_list(variants):
        yield from _union_field(name, schema, variants, indent, depth)
        return
    default = _default(schema)
    yield f"{indent}{name}: {_variant(schema, indent + ' ', depth)},{f' // {default}' if default else ''}\n"


def _union_field(
    name: str, schema: Mapping[str, object], variants: Sequence[object], indent: str, depth: int
) -> Iterator[str]:
    """Yield a `oneOf` field: one variant per line. A description is written once, above or beside the first."""
    description = schema.get("description")
    first = variants[0].get("description") if variants and isinstance(variants[0], Mapping) else None
    is_above = isinstance(description, str) and description != first
    if is_above:
        yield from _comment(description, indent)
    default = _default(schema)
    if default:
        yield f"{indent}// {default}\n"
    yield f"{indent}{name}:\n"
    for index, variant in enumerate(variants):
        skip = {description} if not (index == 0 and is_above) else {description, first}
        yield f"{indent} | {_variant(variant, indent, depth)}{_remark(variant, skip)}\n"
    yield f"{indent},\n"


def _variant(schema: object, indent: str, depth: int) -> str:
    """Write a type with its `nullable`."""
    text = _type(schema, f"{indent}   ", depth + 1)
    is_nullable = isinstance(schema, Mapping) and schema.get("nullable") is True
    return f"{text} | null" if is_nullable and "null" not in text else text


def _remark(schema: object, skip: Iterable[object] = ()) -> str:
    """Return the trailing comment of a variant: its description unless in `skip`, and its default."""
    if not isinstance(schema, Mapping):
        return ""
    description = schema.get("description")
    words = [description] if isinstance(description, str) and description not in skip else []
    words += [default] if (default := _default(schema)) else []
    return f" // {_one_line(' '.join(words))}" if words else ""


def _default(schema: Mapping[str, object]) -> str:
    """Return `default: …`, quoted for a free string and bare for a member of an enum; empty without default."""
    if "default" not in schema:
        return ""
    value = schema["default"]
    if isinstance(value, str):
        text = value if _enum(schema) else f'"{value}"'
    else:
        text = compact_json(value, "tools")
    return f"default: {_one_line(text)}"


def _comment(text: object, indent: str) -> list[str]:
    if not isinstance(text, str) or not text:
        return []
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    return [f"{indent}// {line}\n" for line in lines]


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


def _enum(schema: Mapping[str, object]) -> Sequence[object]:
    values = schema.get("enum")
    return values if _is_list(values) else ()


def _properties(schema: Mapping[str, object]) -> Mapping[str, object]:
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str)
