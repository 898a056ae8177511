"""JSON to structs and sampling options, with errors that name the offending path.

Knows how msgspec words its complaints; those words are read, never passed on. Refuses to know engines and text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from engine.core.sampling_params import InvalidSamplingParams, SamplingParams
from engine.server import errors
from engine.server.schemas import Body, SamplingBody

T = TypeVar("T", bound=msgspec.Struct)

logger = logging.getLogger("hlaunch.server")

_PATH = re.compile(r" - at `(?:key in )?\$\.?(.*)`\Z")
_EXPECTED = re.compile(r"Expected `([^`]{1,80})`, got `([^`]{1,80})`")
_MISSING = re.compile(r"Object missing required field `([^`]{1,80})`")
_JSON_NAMES = {
    "str": "string",
    "dict": "object",
    "list": "array",
    "bool": "boolean",
    "int": "integer",
    "float": "number",
}
_MAX_LOGGED_FIELDS = 16
NO_NAMES: Mapping[str, str] = MappingProxyType({})


def convert(data: Mapping[str, Any], type_: type[T]) -> T:
    """Turn a parsed body into its struct.

    Raises: ApiError 400 `invalid_value`, with `param` the path of the field.
    """
    try:
        return msgspec.convert(data, type_)
    except (msgspec.ValidationError, RecursionError) as error:
        raise _explain(str(error)) from None


def _explain(text: str) -> errors.ApiError:
    """Word msgspec's complaint in the API's terms; whatever is not recognised gets a fixed sentence."""
    path = _PATH.search(text)
    param = path.group(1) if path else None
    if missing := _MISSING.search(text):
        field = f"{param}.{missing.group(1)}" if param else missing.group(1)
        return errors.invalid_value(field, f"{field}: this field is required.")
    if expected := _EXPECTED.search(text):
        wanted = " or ".join(_JSON_NAMES.get(word, word) for word in expected.group(1).split(" | "))
        found = _JSON_NAMES.get(expected.group(2), expected.group(2))
        return errors.invalid_value(param, f"{param or 'body'}: expected {wanted}, got {found}.")
    return errors.invalid_value(param, f"{param or 'body'}: this value is not valid.")


def check_fields(data: Mapping[str, Any], type_: type[Body]) -> None:
    """Refuse what is known and unsupported; note what is unknown in the debug log.

    Raises: ApiError 400 `unsupported_parameter` naming the field.
    """
    for name, message in type_.UNSUPPORTED.items():
        if data.get(name) is not None and data[name] != []:
            raise errors.unsupported_parameter(name, message if name in message else f"{name}: {message}")
    if logger.isEnabledFor(logging.DEBUG):
        unknown = [k for k in data if k not in type_.__struct_fields__ and k not in type_.IGNORED]
        if unknown:
            logger.debug("ignored fields: %s", ", ".join(repr(k[:64]) for k in unknown[:_MAX_LOGGED_FIELDS]))


def sampling_params(
    body: SamplingBody,
    *,
    defaults: Mapping[str, float],
    max_tokens: int | None,
    logprobs: int | None,
    vocab_size: int,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    names: Mapping[str, str] = NO_NAMES,
) -> SamplingParams:
    """Turn the sampling fields of a body into `SamplingParams`; `defaults` are the model's own.

    `names` says what a dialect calls an option, where that is not our name for it.
    Raises: ApiError 400 naming the option that is out of range.
    """
    try:
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=_or(body.min_tokens, 0),
            temperature=_or(body.temperature, defaults.get("temperature", 1.0)),
            top_p=_or(body.top_p, defaults.get("top_p", 1.0)),
            top_k=_top_k(_or(body.top_k, int(defaults.get("top_k", 0)))),
            min_p=_or(body.min_p, 0.0),
            seed=body.seed,
            n=_or(n, 1),
            presence_penalty=_or(body.presence_penalty, 0.0),
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
            stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            include_stop_str_in_output=bool(body.include_stop_str_in_output),
            ignore_eos=bool(body.ignore_eos),
            skip_special_tokens=body.skip_special_tokens is not False,
            logprobs=logprobs,
        )
    except InvalidSamplingParams as error:
        param = names.get(error.param, error.param)
        raise errors.invalid_value(param, f"{param}: {error.message}.") from None
    for token_id in params.stop_token_ids:
        if token_id >= vocab_size:
            raise errors.invalid_value("stop_token_ids", f"stop_token_ids: {token_id} is outside the vocabulary.")
    return params


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _top_k(value: int) -> int:
    # vLLM's clients write -1 for "all".
    return 0 if value == -1 else value


def _logit_bias(raw: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, value in raw.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9 and int(key) < vocab_size):
            raise errors.invalid_value(
                "logit_bias", f"logit_bias: every key must be a token id below {vocab_size}, as a string."
            )
        biases[int(key)] = value
    return biases
