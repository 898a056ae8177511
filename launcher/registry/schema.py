"""The pydantic models of a registry, made from `launcher.registry.keys`, and the JSON schema for editors.

Knows: types, shapes, required and forbidden keys; `launcher.registry.reading` checks the ranges. Refuses to know: YAML,
marks, layers.
Validation takes `Scalar` leaves (see `launcher.registry.document`), so every message can quote the source text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    StringConstraints,
    WithJsonSchema,
    create_model,
)
from pydantic_core import PydanticCustomError

from launcher.registry.document import Scalar
from launcher.registry.flags import flags
from launcher.registry.keys import KeySpec, Kind
from launcher.registry.reading import MAX_TEXT, read_port_range, read_scalar, read_variable
from launcher.registry.shapes import DOCUMENT, MAX_NODES, NAME_PATTERN, VARIABLE_PATTERN, Items, Keys, Names
from launcher.registry.values import BadValue, SecretRef

SCHEMA_FILE = "model_registry.schema.json"
SCHEMA_TITLE = "hlaunch model registry"
_SIZE_PATTERN = r"^[0-9]+(\.[0-9]+)? ?([kKmMgGtTpP][bB]|[kKmMgGtTpP][iI][bB]|[bB])?$"
_TOKENS_PATTERN = r"^([0-9]+(\.[0-9]+)?[kKmM]?|auto|-1)$"
_DURATION_PATTERN = r"^[0-9]+(\.[0-9]+)? ?(ms|s|m|min|h|d)?$"
_SECRET_PATTERN = r"^(\$\{[A-Za-z_][A-Za-z0-9_]*\}|file:.+|[^$\s]+)$"


class Block(BaseModel):
    """A mapping of known keys: anything else is an error, and so is a number that is not finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_by_alias=True, validate_by_name=False
    )


def _guarded(read: Callable[[object], object]) -> BeforeValidator:
    """Let pydantic collect our BadValue beside its own errors, code and hint included."""

    def validate(raw: object) -> object:
        try:
            return read(raw)
        except BadValue as error:
            context = {"message": error.message, "hint": error.hint}
            raise PydanticCustomError("hlaunch", "{message}", {**context, "code": error.code}) from None

    return BeforeValidator(validate)


def _reader(spec: KeySpec) -> BeforeValidator:
    return _guarded(lambda raw: read_scalar(spec, raw))


def _range_schema(spec: KeySpec) -> dict[str, Any]:
    """The bounds of a quantity as JSON schema: whole numbers where the bound is whole."""
    bounds = {("exclusiveMinimum" if spec.is_low_open else "minimum"): spec.low, "maximum": spec.high}
    return {key: int(value) if value == int(value) else value for key, value in bounds.items() if value is not None}


def _quantity(spec: KeySpec, python: Any, number: str, pattern: str) -> Any:
    schema = {"anyOf": [{"type": number, **_range_schema(spec)}, {"type": "string", "pattern": pattern}]}
    return Annotated[python, _reader(spec), WithJsonSchema(schema)]


def _texts(raw: object) -> object:
    return [raw] if isinstance(raw, Scalar) else raw


def _annotation(spec: KeySpec) -> Any:
    """The validating type of one key."""
    text = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT}
    if spec.pattern is not None:
        text["pattern"] = f"^{spec.pattern}$"
    match spec.kind:
        case Kind.TEXT:
            return Annotated[str, _reader(spec), WithJsonSchema(text)]
        case Kind.TEXTS:
            item = Annotated[str, _reader(spec), WithJsonSchema(text)]
            both = {"anyOf": [text, {"type": "array", "items": text, "maxItems": 100}]}
            return Annotated[list[item], Field(max_length=100), BeforeValidator(_texts), WithJsonSchema(both)]
        case Kind.CHOICE:
            return Annotated[
                str,
                _reader(spec),
                WithJsonSchema({"enum": [choice for choice in spec.choices if choice not in spec.refused]}),
            ]
        case Kind.BOOLEAN:
            return Annotated[bool, _reader(spec)]
        case Kind.INTEGER if spec.values:
            return Annotated[int, _reader(spec), WithJsonSchema({"enum": list(spec.values)})]
        case Kind.INTEGER:
            schema = {"type": "integer", **_range_schema(spec)}
            return Annotated[int, _reader(spec), WithJsonSchema(schema)]
        case Kind.NUMBER:
            schema = {"type": "number", **_range_schema(spec)}
            return Annotated[float, _reader(spec), WithJsonSchema(schema)]
        case Kind.TOKENS:
            whole: dict[str, Any] = {"type": "integer", **_range_schema(spec)}
            schema = {"anyOf": [whole, {"const": -1}, {"type": "string", "pattern": _TOKENS_PATTERN}]}
            return Annotated[int | str, _reader(spec), WithJsonSchema(schema)]
        case Kind.SIZE:
            return _quantity(spec, int, "integer", _SIZE_PATTERN)
        case Kind.DURATION:
            return _quantity(spec, float, "number", _DURATION_PATTERN)
        case Kind.SECRET:
            schema = {"type": "string", "pattern": _SECRET_PATTERN}
            return Annotated[InstanceOf[SecretRef], _reader(spec), WithJsonSchema(schema)]
        case Kind.ADDRESS | Kind.SUBNET:
            return Annotated[str, _reader(spec), WithJsonSchema({"type": "string", "minLength": 2, "maxLength": 64})]
        case Kind.PORT_RANGE:
            item_schema = {"type": "integer", **_range_schema(spec)}
            pair = {"type": "array", "items": item_schema, "minItems": 2, "maxItems": 2}
            text_range = {"type": "string", "pattern": "^[0-9]{4,5}-[0-9]{4,5}$"}
            read_range = _guarded(lambda raw: read_port_range(spec, raw))
            return Annotated[tuple[int, int], read_range, WithJsonSchema({"anyOf": [pair, text_range]})]
        case Kind.VARIABLES:
            name = Annotated[str, StringConstraints(pattern=VARIABLE_PATTERN)]
            value = Annotated[
                str, _guarded(read_variable), WithJsonSchema({"type": ["string", "number", "boolean", "null"]})
            ]
            # Editors check a name only if no other is allowed; pydantic itself leaves that open.
            return Annotated[dict[name, value | None], Field(json_schema_extra={"additionalProperties": False})]


def _field(spec: KeySpec, *, is_required: bool) -> tuple[Any, Any]:
    facts = [spec.summary + ".", f"Default: {spec.describe_default()}."]
    if spec.unit:
        facts.append(f"Unit: {spec.unit}.")
    if accepted := spec.describe_range():
        facts.append(f"Range: {accepted}.")
    annotation = _annotation(spec)
    description = " ".join(facts)
    if is_required:
        return annotation, Field(alias=spec.key, description=description)
    return annotation | None, Field(default=None, alias=spec.key, description=description)


def python_name(key: str) -> str:
    """The attribute of a key in its pydantic model."""
    return key.replace("-", "_") + "_"


def _block(shape: Keys, made: dict[str, Any]) -> Any:
    """Build the pydantic model of a mapping and of all below it; `made` holds those that exist, by title."""
    if shape.title in made:
        return made[shape.title]
    members: dict[str, Any] = {}
    for spec in shape.table.specs.values():
        if "." not in spec.key:
            is_required = spec.is_required and spec.key not in shape.optional
            members[python_name(spec.key)] = _field(spec, is_required=is_required)
    for key, below in shape.below.items():
        if isinstance(below, Keys):
            members[python_name(key)] = (_block(below, made) | None, Field(default=None, alias=key))
        elif isinstance(below, Items):
            members[python_name(key)] = (
                list[_block(below.item, made)],  # type: ignore[misc]
                Field(alias=key, min_length=1, max_length=MAX_NODES),
            )
        elif isinstance(below, Names):
            members[python_name(key)] = _names(key, below, made)
    made[shape.title] = create_model(shape.title, __base__=Block, __doc__=shape.summary or None, **members)
    return made[shape.title]


def _names(key: str, shape: Names, made: dict[str, Any]) -> tuple[Any, Any]:
    pattern = f"^({'|'.join(shape.choices)})$" if shape.choices else NAME_PATTERN
    name = Annotated[str, StringConstraints(pattern=pattern)]
    mapping: Any = dict[name, _block(shape.item, made)]  # type: ignore[misc]
    description = f"Name of a {shape.noun} -> {shape.item.summary}"
    if shape.is_required:
        return mapping, Field(alias=key, min_length=1, description=description)
    return mapping | None, Field(default=None, alias=key, description=description)


@cache
def document_model() -> type[Block]:
    """The model of a whole registry file. Built on first use: the table has no cost for `--help`."""
    model: type[Block] = _block(DOCUMENT, {})
    return model


def json_schema() -> dict[str, Any]:
    """Make the JSON schema (draft 2020-12) that editors bind to `model_registry.yml`.

    Aliases and underscored spellings validate; `x-…` keys are free.
    """
    schema = document_model().model_json_schema(by_alias=True)
    title = schema.pop("title")
    shapes = {shape.title: shape for shape in _all_keys(DOCUMENT)}
    for name, definition in ((title, schema), *schema["$defs"].items()):
        where = "#" if name == title else f"#/$defs/{name}"
        definition["properties"] = dict(definition["properties"])
        for inner in definition["properties"].values():
            inner.pop("title", None)
            inner.pop("default", None)
            _close_names(inner)
        patterns: dict[str, Any] = {"^x-": {}}
        for spelling, key in shapes[name].table.spellings.items():
            if spelling != key and "." not in key:
                patterns[f"^{spelling}$"] = {"$ref": f"{where}/properties/{key}"}
        if shapes[name].takes_flags:
            patterns |= _flag_patterns()
        definition["patternProperties"] = patterns
    schema["$defs"]["Model"]["anyOf"] = [{"required": ["model"]}, {"required": ["extends"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": SCHEMA_TITLE, **schema}


def _flag_patterns() -> dict[str, Any]:
    """Options of vLLM: those without effect take anything, those that cannot work only what switches them off."""
    names = {
        status: "|".join(flag.name.replace("-", "[-_]") for flag in flags().values() if flag.status == status)
        for status in ("accepted", "unsupported")
    }
    off: dict[str, Any] = {"enum": [False, None, 0, "none", "", [], {}]}
    return {
        f"^({names['accepted']})$": {"description": "An option of vLLM, without effect here."},
        f"^({names['unsupported']})$": {"description": "An option of vLLM that cannot work here: off only.", **off},
    }


def _all_keys(shape: Keys) -> Iterator[Keys]:
    yield shape
    for below in shape.below.values():
        if isinstance(below, Keys):
            yield from _all_keys(below)
        elif isinstance(below, (Names, Items)):
            yield from _all_keys(below.item)


def _close_names(schema: dict[str, Any]) -> None:
    """Let a mapping of names take no name that its pattern refuses: pydantic leaves that open."""
    for option in (schema, *schema.get("anyOf", ())):
        if "patternProperties" in option and option.get("type") == "object":
            option["additionalProperties"] = False


def json_schema_text() -> str:
    """The JSON schema as it is committed."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
