"""Engine outputs of one sequence to what a client reads: the last step before a dialect.

Knows stop strings, detokenizing and chat parsing, and which tokens a piece of text came from. Refuses to know HTTP,
requests and logprob layouts. The HTTP server and the offline face use the same two classes:

| class | for | gives per push |
|---|---|---|
| `OutputProcessor` | completions | `TextUpdate`: a piece of text |
| `ChatOutputProcessor` | chat | `ChatUpdate`: chat events |

Both are finished when `finish_reason` is set. With `must_abort` the text ended before the engine did (a stop string,
or a reply that is complete): the caller aborts the engine's request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.core.request import FinishReason
from engine.text.chat import ChatFormat
from engine.text.detokenizer import Detokenizer
from engine.text.events import ChatEvent, ChatFinishReason, ContentDelta, StreamEnd, ToolCallStart
from engine.text.messages import ToolDefinition
from engine.text.stop import StopMatcher
from engine.text.tokenizer import TextCodec, readable_token


@dataclass(frozen=True, slots=True)
class TextUpdate:
    """New text of a completion.

    `num_tokens` of the pushed tokens were used: fewer than all when a stop string ended the text before the last.
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    must_abort: bool = False


@dataclass(frozen=True, slots=True)
class ChatUpdate:
    """New events of a chat reply; the last event of the last update is a `StreamEnd`.

    `num_tokens` as in `TextUpdate`. `content_positions` are the positions within this push of the tokens that became
    content; a negative one belongs to an earlier push, when text was first taken for a header.
    """

    events: list[ChatEvent]
    num_tokens: int
    content_positions: list[int]
    finish_reason: ChatFinishReason | None = None
    stop_string: str | None = None
    must_abort: bool = False


class OutputProcessor:
    """Text of one completion, stop strings removed. Never raises."""

    def __init__(
        self,
        codec: TextCodec,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """`stop`, `include_stop` and `skip_special_tokens` are the request's options; no stop string is empty."""
        self._detokenizer = Detokenizer(codec, skip_special_tokens=skip_special_tokens)
        self._matcher = StopMatcher(stop, include_stop=include_stop)
        self._has_stops = bool(stop)
        self._include_stop = include_stop
        self._is_finished = False

    def push(
        self, token_ids: Sequence[int], finish_reason: FinishReason | None = None, stop_token_id: int | None = None
    ) -> TextUpdate:
        """Take the tokens of one engine output and return the text they add.

        `stop_token_id`, the id that ended the request, is no part of the text unless stops are included.
        After the end, further pushes are empty.
        """
        if self._is_finished:
            return TextUpdate("", 0)
        visible = token_ids if self._include_stop else _without_stop_token(token_ids, stop_token_id)
        parts = []
        is_early = finish_reason is None
        for num_used, ids in _chunks(visible, one_by_one=self._has_stops):
            parts.append(self._matcher.push(self._detokenizer.push(ids)))
            if self._matcher.matched is not None:
                return self._finish(parts, num_used, FinishReason.STOP, is_early=is_early)
        if finish_reason is None:
            return TextUpdate("".join(parts), len(token_ids))
        parts.append(self._matcher.push(self._detokenizer.finish()))
        parts.append(self._matcher.finish())
        return self._finish(parts, len(token_ids), finish_reason, is_early=False)

    def _finish(self, parts: list[str], num_used: int, reason: FinishReason, *, is_early: bool) -> TextUpdate:
        self._is_finished = True
        if self._matcher.matched is not None:
            reason = FinishReason.STOP
        return TextUpdate("".join(parts), num_used, reason, self._matcher.matched, is_early)


class ChatOutputProcessor:
    """Events of one chat reply. Stop strings apply to the answer, not to reasoning, preambles and arguments.

    Never raises.
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        tools: Sequence[ToolDefinition] = (),
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        is_continuation: bool = False,
        parallel_tool_calls: bool = True,
        stream_arguments: bool = False,
    ) -> None:
        """`stop` and `include_stop` as in `OutputProcessor`; the rest goes to the parser of `chat_format`."""
        self._parser = chat_format.parser(
            tools,
            is_continuation=is_continuation,
            parallel_tool_calls=parallel_tool_calls,
            stream_arguments=stream_arguments,
        )
        self._format_stop_ids = chat_format.stop_token_ids
        self._has_stops = bool(stop)
        self._matcher = StopMatcher(stop, include_stop=include_stop)
        self._held_message = 0  # the message whose text the matcher holds back
        self._num_seen = 0
        self._is_finished = False

    def push(
        self, token_ids: Sequence[int], finish_reason: FinishReason | None = None, stop_token_id: int | None = None
    ) -> ChatUpdate:
        """Take the tokens of one engine output and return the events they add.

        A `stop_token_id` of the format closes what is open; one of the client's own leaves no text.
        After the end, further pushes are empty.
        """
        if self._is_finished:
            return ChatUpdate([], 0, [])
        is_client_stop = stop_token_id is not None and stop_token_id not in self._format_stop_ids
        visible = _without_stop_token(token_ids, stop_token_id) if is_client_stop else token_ids
        events: list[ChatEvent] = []
        for num_used, ids in _chunks(visible, one_by_one=self._has_stops):
            events += self._without_stops(self._parser.push(ids))
            if self._matcher.matched is not None:
                return self._finish(events, num_used, FinishReason.STOP, is_early=finish_reason is None)
        if finish_reason is not None or self._parser.is_ended:
            reason = finish_reason or FinishReason.STOP
            return self._finish(events, len(token_ids), reason, is_early=finish_reason is None)
        return ChatUpdate(events, len(token_ids), self._positions(len(token_ids)))

    def _finish(self, events: list[ChatEvent], num_used: int, reason: FinishReason, *, is_early: bool) -> ChatUpdate:
        self._is_finished = True
        closing = self._parser.finish(reason)
        end = next((event for event in closing if isinstance(event, StreamEnd)), StreamEnd("stop", 0))
        events += self._without_stops([event for event in closing if event is not end])
        if self._matcher.matched is None:
            events += self._flush()
        events.append(end)
        return ChatUpdate(
            events, num_used, self._positions(num_used), end.finish_reason, self._matcher.matched, is_early
        )

    def _without_stops(self, events: list[ChatEvent]) -> list[ChatEvent]:
        """Pass events through the stop matcher; nothing follows a match.

        The client joins the pieces of the answer, so a stop string counts even where the model's messages meet.
        """
        if not self._has_stops:
            return events
        out: list[ChatEvent] = []
        for event in events:
            if self._matcher.matched is not None:
                break
            if isinstance(event, ContentDelta) and event.channel == "final":
                self._held_message = event.message
                if text := self._matcher.push(event.text):
                    out.append(ContentDelta(text, event.message))
                continue
            if isinstance(event, ContentDelta | ToolCallStart):  # the held text belongs in front of these
                out += self._flush()
            out.append(event)
        return out

    def _flush(self) -> list[ChatEvent]:
        held = self._matcher.finish()
        return [ContentDelta(held, self._held_message)] if held else []

    def _positions(self, num_used: int) -> list[int]:
        """Return the positions of new content tokens relative to this push, and count the push."""
        base, self._num_seen = self._num_seen, self._num_seen + num_used
        return [position - base for position in self._parser.take_content_positions()]


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as logprobs show it: readable text, and its exact bytes even for a piece of a character."""

    token: str
    bytes: list[int]


def token_text(codec: TextCodec, token_id: int, *, skip_special_tokens: bool = True) -> TokenText:
    """Return the text and bytes of a token; control tokens are empty unless asked for."""
    if skip_special_tokens and token_id in codec.special_ids.values():
        return TokenText("", [])
    data = codec.token_bytes(token_id)
    return TokenText(readable_token(data), list(data))


def _without_stop_token(token_ids: Sequence[int], stop_token_id: int | None) -> Sequence[int]:
    if stop_token_id is not None and token_ids and token_ids[-1] == stop_token_id:
        return token_ids[:-1]
    return token_ids


def _chunks(token_ids: Sequence[int], *, one_by_one: bool) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield (number of tokens so far, tokens): one by one only where it matters at which token a stop string ends."""
    if one_by_one:
        for index in range(len(token_ids)):
            yield index + 1, token_ids[index : index + 1]
    else:
        yield len(token_ids), token_ids
