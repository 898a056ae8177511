"""POST /tokenize and /detokenize: the tokenizer of the served model over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.server import errors, info
from engine.server.chat_request import read_conversation
from engine.server.completions import check_ids
from engine.server.conversation import render_to_count
from engine.server.http import Exchange
from engine.server.parsing import convert
from engine.server.schemas import ChatBody, DetokenizeBody, TokenizeBody
from engine.text import BoundedCodec, PromptTooLong, TokenizerError

if TYPE_CHECKING:
    from engine.server.app import App


async def tokenize(app: App, exchange: Exchange) -> None:
    """Answer POST /tokenize: a prompt, or messages rendered as chat would."""
    data = await exchange.read_json(app.config.server.max_body_bytes)
    body = convert(data, TokenizeBody)
    if body.model is not None:
        info.check_model(app, body.model)
    ids = await app.run_text(exchange.body_bytes, _encode, app, exchange, body)
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": app.engine.max_model_len}
    if body.return_token_strs:
        answer["token_strs"] = [app.tokenizer.token_str(token_id) for token_id in ids]
    await exchange.answer_json(200, answer)


def _encode(app: App, exchange: Exchange, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise errors.invalid_value("prompt", "Send either prompt or messages.")
    if body.prompt is not None:
        try:
            return BoundedCodec(app.tokenizer, app.max_counted_tokens).encode(body.prompt)
        except PromptTooLong as error:
            raise errors.too_long_to_count(error.max_tokens, "prompt") from None
        except TokenizerError:
            raise errors.invalid_value("prompt", "prompt: this text cannot be encoded.") from None
    chat = ChatBody(
        model=app.model_names[0],
        messages=body.messages or [],
        tools=body.tools,
        reasoning_effort=body.reasoning_effort,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )
    return render_to_count(app, exchange, read_conversation(chat, exchange))


async def detokenize(app: App, exchange: Exchange) -> None:
    """Answer POST /detokenize: ids to text, control tokens included."""
    data = await exchange.read_json(app.config.server.max_body_bytes)
    body = convert(data, DetokenizeBody)
    if body.model is not None:
        info.check_model(app, body.model)
    check_ids(app, body.tokens, "tokens")
    tokenizer = app.tokenizer
    text = b"".join([tokenizer.token_bytes(token_id) for token_id in body.tokens]).decode("utf-8", "replace")
    await exchange.answer_json(200, {"prompt": text})
