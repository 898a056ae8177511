"""Harmony token ids, as the model emits them, to chat events: a state machine that never raises.

Knows the grammar of messages and what to make of a stream that breaks it. Refuses to know the engine and HTTP.
Three states: BETWEEN messages, in a HEADER, in CONTENT; a stop token ends the reply.

Decisions that the grammar leaves open:
- Arguments of a call are held back until the call ends and are then checked. Valid JSON becomes a call, unchanged;
  nothing becomes `{}`; anything else becomes content, so that `arguments` always holds valid JSON and a stream says
  what the whole reply says. With `stream_arguments` they pass through at once and that promise is not kept.
- Text where a header belongs is content as soon as it cannot be a header that lost its control token.
- A header that never gets its `<|message|>` is read as far as it goes and what remains is the body; a length limit
  inside a header leaves nothing to say.
- A message that the model writes for another role (a user, a tool's result) is dropped.
"""

from __future__ import annotations

import codecs
import enum
import json
from collections.abc import Callable, Iterable

from engine.core.request import FinishReason
from engine.text.events import (
    ChatEvent,
    ChatFinishReason,
    ContentChannel,
    ContentDelta,
    ReasoningDelta,
    StreamEnd,
    ToolArgumentsDelta,
    ToolCallStart,
)
from engine.text.harmony.header import Header, Part, Route, may_be_header, read_header
from engine.text.harmony.ids import HarmonyIds
from engine.text.tokenizer import TextCodec

# The longest real header, a name of 64 characters that share no token, has about 90. Beyond the cap the text was
# no header, and holding it back any longer would hide an answer.
MAX_HEADER_TOKENS = 128

_make_decoder = codecs.getincrementaldecoder("utf-8")


class _State(enum.Enum):
    BETWEEN = "between"
    HEADER = "header"
    CONTENT = "content"
    ENDED = "ended"


class HarmonyParser:
    """Parses one reply.

    The stream begins after the prompt's `<|start|>assistant`, or inside a final message with `is_continuation`.
    `new_call_id` gives the id of each call. Results do not depend on how the tokens are split over `push`.
    """

    def __init__(
        self,
        codec: TextCodec,
        ids: HarmonyIds,
        new_call_id: Callable[[], str],
        *,
        is_continuation: bool = False,
        parallel_tool_calls: bool = True,
        stream_arguments: bool = False,
    ) -> None:
        self._token_bytes = codec.token_bytes
        self._ids = ids
        self._new_call_id = new_call_id
        self._parallel_tool_calls = parallel_tool_calls
        self._stream_arguments = stream_arguments
        self.reasoning_tokens = 0
        self._num_tokens = 0
        self._content_positions: list[int] = []
        self._out = _EventBuffer()
        self._num_calls = 0
        self._finish_reason: FinishReason | None = None
        self._state = _State.HEADER
        self._segments: list[tuple[Part, bytearray]] = [(Part.ROLE, bytearray())]
        # (position, number of segments so far, bytes of the segment so far) of each token, to find those of a body
        self._header_tokens: list[tuple[int, int, int]] = []
        self._has_start = False
        self._route = Route.CONTENT
        self._channel: str | None = None
        self._tool = ""
        self._message = -1
        self._has_call_started = False
        self._arguments: list[str] = []
        self._has_arguments = False
        self._decoder = _make_decoder("replace")
        if is_continuation:
            self._open_message(Route.CONTENT, "final", "")

    @property
    def is_ended(self) -> bool:
        """Whether the reply is complete, so that further tokens would be ignored."""
        return self._state is _State.ENDED

    def push(self, token_ids: Iterable[int]) -> list[ChatEvent]:
        """Take the next tokens and return what they say."""
        for token_id in token_ids:
            self._take(token_id)
            self._num_tokens += 1
        return self._out.drain()

    def finish(self, reason: FinishReason) -> list[ChatEvent]:
        """Close the reply, for the reason the engine gives, and return what was held back; the last is `StreamEnd`.

        Idempotent: a second call returns nothing.
        """
        if self._finish_reason is not None:
            return []
        self._finish_reason = reason
        if self._state is _State.CONTENT:
            self._close_message()
        elif self._state is not _State.ENDED and reason is FinishReason.STOP:
            self._abandon_header(is_call=False)
        self._state = _State.ENDED
        return [*self._out.drain(), StreamEnd(self.finish_reason, self.reasoning_tokens)]

    @property
    def finish_reason(self) -> ChatFinishReason:
        """The reason in the API's words; calls outrank everything."""
        if self._num_calls:
            return "tool_calls"
        return "length" if self._finish_reason is FinishReason.LENGTH else "stop"

    def take_content_positions(self) -> list[int]:
        """Return the positions, counted from the first token, of tokens that became content since the last call.

        For logprobs, which the API gives for the tokens of the visible text only.
        """
        positions, self._content_positions = self._content_positions, []
        return positions

    def _take(self, token_id: int) -> None:
        ids = self._ids
        if self._state is _State.ENDED:
            return
        if token_id not in ids.special:
            if self._state is _State.CONTENT:
                self._take_content(token_id)
            else:
                self._take_header_text(token_id)
        elif token_id == ids.end:
            self._close(is_call=False)
        elif token_id in (ids.return_, ids.call, ids.endoftext):
            self._close(is_call=token_id == ids.call)
            self._state = _State.ENDED
        elif token_id == ids.start:
            self._close(is_call=False, is_restart=True)
            if not self.is_ended:
                self._open_header(_State.HEADER, has_start=True)
        elif token_id == ids.message:
            self._take_message()
        elif token_id == ids.channel:
            if self._state is _State.CONTENT:
                self._close(is_call=False)
            if not self.is_ended:
                self._state = _State.HEADER
                self._segments.append((Part.CHANNEL, bytearray()))
        elif token_id == ids.constrain and self._state is not _State.CONTENT:
            self._segments.append((Part.CONSTRAIN, bytearray()))
        # Any other control token, or one that means nothing here, decodes to nothing.

    def _open_header(self, state: _State, *, has_start: bool) -> None:
        self._state = state
        self._segments = [(Part.ROLE, bytearray())]
        self._header_tokens = []
        self._has_start = has_start

    @property
    def _is_bare(self) -> bool:
        """Whether no control token vouches for the header: its text may be anything."""
        return not self._has_start and len(self._segments) == 1

    def _take_header_text(self, token_id: int) -> None:
        segment = self._segments[-1][1]
        segment.extend(self._token_bytes(token_id))
        self._header_tokens.append((self._num_tokens, len(self._segments), len(segment)))
        if self._is_bare:
            if len(self._header_tokens) > MAX_HEADER_TOKENS or not may_be_header(
                self._segments[0][1].decode("utf-8", "replace")
            ):
                self._open_as_text()
        elif len(self._header_tokens) > MAX_HEADER_TOKENS:
            self._open_with_rest(self._read_header())

    def _take_message(self) -> None:
        if self._state is not _State.CONTENT:
            header = self._read_header()
            self._open_message(header.route, header.channel, header.tool)

    def _abandon_header(self, *, is_call: bool) -> None:
        """Make the best of a header that ends without its message token."""
        header = self._read_header()
        if self._is_bare and not (is_call and header.route is Route.TOOL):
            # Between messages only words of a header are left here (`assistant`, a newline): nothing to say.
            if self._state is _State.HEADER and self._segments[0][1]:
                self._open_as_text()
                self._close_message()
        elif header.rest or (is_call and header.route is Route.TOOL):
            self._open_with_rest(header)
            self._close_message()

    def _read_header(self) -> Header:
        # "surrogateescape" carries bytes of a split character through to the body.
        texts = [(part, data.decode("utf-8", "surrogateescape")) for part, data in self._segments]
        return read_header(texts, has_start=self._has_start)

    def _close(self, *, is_call: bool, is_restart: bool = False) -> None:
        """End the message or the header that is open, and wait for the next."""
        if self._state is _State.CONTENT:
            self._close_message()
        elif not (is_restart and self._is_bare):
            self._abandon_header(is_call=is_call)
        if self._state is not _State.ENDED:
            self._open_header(_State.BETWEEN, has_start=False)

    def _open_as_text(self) -> None:
        """Open a message of plain text whose beginning was taken for a header."""
        self._open_within_header(Route.CONTENT, None, "", bytes(self._segments[0][1]))

    def _open_with_rest(self, header: Header) -> None:
        """Open a message whose `<|message|>` got lost: its body begins within the header."""
        body = header.rest.encode("utf-8", "surrogateescape")
        self._open_within_header(header.route, header.channel, header.tool, body)

    def _open_within_header(self, route: Route, channel: str | None, tool: str, body: bytes) -> None:
        """Open a message whose first bytes, `body`, are the end of the header's last segment."""
        num_segments, begin = len(self._segments), len(self._segments[-1][1]) - len(body)
        positions = [at for at, segment, end in self._header_tokens if segment == num_segments and end > begin]
        self._open_message(route, channel, tool)
        self._count(positions)
        self._emit(self._decoder.decode(body))

    def _count(self, positions: list[int]) -> None:
        """Count tokens of the open message."""
        if self._route is Route.REASONING:
            self.reasoning_tokens += len(positions)
        elif self._route is Route.CONTENT:
            self._content_positions += positions

    def _open_message(self, route: Route, channel: str | None, tool: str) -> None:
        self._state = _State.CONTENT
        self._route, self._channel, self._tool = route, channel, tool
        self._message += 1
        self._decoder = _make_decoder("replace")
        self._arguments = []
        self._has_arguments = False
        self._has_call_started = False

    def _take_content(self, token_id: int) -> None:
        self._count([self._num_tokens])
        self._emit(self._decoder.decode(self._token_bytes(token_id)))

    def _emit(self, text: str) -> None:
        if not text or self._route is Route.NOWHERE:
            return
        if self._route is not Route.TOOL:
            self._out.add_text(self._route, text, self._message, self._channel)
            return
        self._has_arguments = self._has_arguments or not text.isspace()
        if self._stream_arguments:
            self._start_call()
            self._out.add_text(Route.TOOL, text, self._num_calls - 1)
        else:
            self._arguments.append(text)

    def _close_message(self) -> None:
        self._emit(self._decoder.decode(b"", final=True))
        if self._route is Route.TOOL:
            self._close_call()
        self._open_header(_State.BETWEEN, has_start=False)
        if self._num_calls and not self._parallel_tool_calls:
            self._state = _State.ENDED

    def _close_call(self) -> None:
        arguments = "".join(self._arguments)
        if not self._has_arguments:
            arguments = "{}"
        elif self._stream_arguments:
            return
        elif not is_json(arguments):
            self._out.add_text(Route.CONTENT, arguments, self._message)
            return
        self._start_call()
        self._out.add_text(Route.TOOL, arguments, self._num_calls - 1)

    def _start_call(self) -> None:
        if not self._has_call_started:
            self._has_call_started = True
            self._out.add(ToolCallStart(self._num_calls, self._new_call_id(), self._tool))
            self._num_calls += 1


class _EventBuffer:
    """Collects the events of one push; neighbouring pieces of one text become one event."""

    def __init__(self) -> None:
        self._events: list[ChatEvent] = []
        self._texts: list[str] = []
        self._key: tuple[Route, int, str | None] | None = None

    def add_text(self, route: Route, text: str, message: int, channel: str | None = None) -> None:
        """Add a piece of message number `message`, or of call number `message` on the route TOOL."""
        key = (route, message, channel)
        if key != self._key:
            self._flush()
            self._key = key
        self._texts.append(text)

    def add(self, event: ChatEvent) -> None:
        self._flush()
        self._events.append(event)

    def drain(self) -> list[ChatEvent]:
        self._flush()
        events, self._events = self._events, []
        return events

    def _flush(self) -> None:
        if self._key is not None:
            route, message, channel = self._key
            text = "".join(self._texts)
            match route:
                case Route.REASONING:
                    self._events.append(ReasoningDelta(text, message))
                case Route.TOOL:
                    self._events.append(ToolArgumentsDelta(message, text))
                case _:
                    shown: ContentChannel = "commentary" if channel == "commentary" else "final"
                    self._events.append(ContentDelta(text, message, shown))
        self._key, self._texts = None, []


def is_json(text: str) -> bool:
    """Whether the text is one JSON value by the standard, which knows no NaN and no Infinity."""
    try:
        # Numbers stay text: their value does not matter, and int() refuses very long ones.
        json.loads(text, parse_constant=_refuse_constant, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
