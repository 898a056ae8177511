"""The pydantic models of a registry, made from `launcher.registry.keys`, and the JSON schema for editors.

Knows: types, shapes, required and forbidden keys; `launcher.registry.reading` checks the ranges. Refuses to know: YAML,
marks, layers.
Validation takes `Scalar` leaves (see `launcher.registry.document`), so every message can quote the source text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
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
from launcher.registry.keys import KEYS, MODEL_ONLY, SPELLINGS, KeySpec, Kind
from launcher.registry.reading import MAX_TEXT, read_scalar, read_variable
from launcher.registry.values import BadValue, SecretRef

SCHEMA_FILE = "model_registry.schema.json"
VERSION = 1
NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._:/+-]{0,127}$"
VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"

_VERSION_SPEC = KeySpec("version", Kind.INTEGER, "Format of this file", default=VERSION, values=(VERSION,))
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
            return Annotated[str, _reader(spec), WithJsonSchema({"enum": list(spec.choices)})]
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
        case Kind.VARIABLES:
            name = Annotated[str, StringConstraints(pattern=VARIABLE_PATTERN)]
            value = Annotated[
                str, _guarded(read_variable), WithJsonSchema({"type": ["string", "number", "boolean", "null"]})
            ]
            # Editors check a name only if no other is allowed; pydantic itself leaves that open.
            return Annotated[dict[name, value | None], Field(json_schema_extra={"additionalProperties": False})]


def _field(spec: KeySpec, alias: str) -> tuple[Any, Any]:
    facts = [spec.summary + ".", f"Default: {spec.describe_default()}."]
    if spec.unit:
        facts.append(f"Unit: {spec.unit}.")
    if accepted := spec.describe_range():
        facts.append(f"Range: {accepted}.")
    annotation = _annotation(spec)
    description = " ".join(facts)
    if spec.is_required:
        return annotation, Field(alias=alias, description=description)
    return annotation | None, Field(default=None, alias=alias, description=description)


def python_name(key: str) -> str:
    """The attribute of a key in its pydantic model."""
    return key.replace("-", "_") + "_"


def _block(title: str, doc: str, specs: Iterable[KeySpec]) -> type[Block]:
    """Build the model of a mapping; dotted keys become nested blocks."""
    members: dict[str, Any] = {}
    groups: dict[str, list[KeySpec]] = {}
    for spec in specs:
        group, dot, _ = spec.key.partition(".")
        if dot:
            groups.setdefault(group, []).append(spec)
        else:
            members[python_name(spec.key)] = _field(spec, spec.key)
    for group, inner in groups.items():
        leaves: dict[str, Any] = {}
        for spec in inner:
            leaf = spec.key.partition(".")[2]
            leaves[python_name(leaf)] = _field(spec, leaf)
        nested: Any = create_model(f"{title}{group.title()}", __base__=Block, **leaves)
        members[python_name(group)] = (nested | None, Field(default=None, alias=group))
    return create_model(title, __base__=Block, __doc__=doc, **members)


@cache
def document_model() -> type[Block]:
    """The model of a whole registry file. Built on first use: the table has no cost for `--help`."""
    entry: Any = _block("Model", "One model: what to serve and how.", KEYS.values())
    shared = [spec for spec in KEYS.values() if spec.key not in MODEL_ONLY]
    defaults: Any = _block("Defaults", "Settings of every model, unless the model sets them itself.", shared)
    name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    version = _annotation(_VERSION_SPEC)
    return create_model(
        "Registry",
        __base__=Block,
        __doc__="hlaunch's model registry.",
        version_=(version | None, Field(default=None, alias="version", description="Format of this file: 1.")),
        defaults_=(defaults | None, Field(default=None, alias="defaults")),
        models_=(dict[name, entry], Field(alias="models", min_length=1, description="Name -> what to serve.")),
    )


def json_schema() -> dict[str, Any]:
    """Make the JSON schema (draft 2020-12) that editors bind to `model_registry.yml`.

    Aliases and underscored spellings validate; `x-…` keys are free.
    """
    schema = document_model().model_json_schema(by_alias=True)
    schema.pop("title", None)
    for name, definition in (("", schema), *schema["$defs"].items()):
        where = f"#/$defs/{name}" if name else "#"
        definition["properties"] = dict(definition["properties"])
        for inner in definition["properties"].values():
            inner.pop("title", None)
            inner.pop("default", None)
        patterns: dict[str, Any] = {"^x-": {}}
        for spelling, key in SPELLINGS.items():
            if key in definition["properties"] and spelling != key and "." not in key:
                patterns[f"^{spelling}$"] = {"$ref": f"{where}/properties/{key}"}
        definition["patternProperties"] = patterns
    models = schema["properties"]["models"]
    models["patternProperties"] = {NAME_PATTERN: models.pop("additionalProperties", None) or _entry_of(models)}
    models["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "hlaunch model registry", **schema}


def _entry_of(models: dict[str, Any]) -> dict[str, Any]:
    (entry,) = models.pop("patternProperties").values()
    return dict(entry)


def json_schema_text() -> str:
    """The JSON schema as it is committed."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
