"""Encoding that stops once a prompt is known to be too long for its reader.

Knows how many tokens a text has at least, without encoding all of it. Refuses to know which limit is whose. A text that
may fit is encoded whole, exactly as without a limit: what is estimated here only ever refuses.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.text.errors import PromptTooLong
from engine.text.tokenizer import TextCodec

EXACT_BYTES = 64 * 1024
"""What is encoded whole at any limit: about 25 ms."""
EXACT_BYTES_PER_TOKEN = 8
"""Up to so many bytes per token of the limit, encode whole: English has 4.5, so a client slightly over learns by
how much, and a prompt that fits is hardly ever read twice."""
WINDOW_CHARS = 32 * 1024


class BoundedCodec:
    """A codec for one prompt, in as many texts as it has. Not for two threads at once."""

    def __init__(self, codec: TextCodec, max_tokens: int) -> None:
        """`max_tokens` is what all texts may have together before encoding stops."""
        self._codec = codec
        self._max_tokens = max_tokens
        self._exact_bytes = max(EXACT_BYTES, EXACT_BYTES_PER_TOKEN * max_tokens)
        self._num_bytes = 0
        self._num_tokens = 0

    @property
    def special_ids(self) -> Mapping[str, int]:
        return self._codec.special_ids

    @property
    def vocab_size(self) -> int:
        return self._codec.vocab_size

    @property
    def longest_token_bytes(self) -> int:
        return self._codec.longest_token_bytes

    def token_bytes(self, token_id: int) -> bytes:
        return self._codec.token_bytes(token_id)

    def encode(self, text: str) -> list[int]:
        """Encode one more text of the prompt.

        Work is bounded by the limit unless the prompt keeps it. A prompt of at most `EXACT_BYTES` is never refused.
        Raises: PromptTooLong; TokenizerError, as the codec.
        """
        # A lone surrogate is the codec's to refuse.
        num_bytes = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        self._num_bytes += num_bytes
        if self._num_bytes > self._exact_bytes:
            self._check(text, num_bytes)
        ids = self._codec.encode(text)
        self._num_tokens += len(ids)
        return ids

    def _check(self, text: str, num_bytes: int) -> None:
        """Raise PromptTooLong as soon as the prompt has too many tokens for sure.

        First by bytes: no token has more than the longest. Then by parts. Whatever rule splits text into words, a cut
        can disturb tokens only as far as these reach, so those next to a cut are not counted.
        """
        room = self._max_tokens - self._num_tokens
        longest = self._codec.longest_token_bytes
        if num_bytes > room * longest:
            raise PromptTooLong(self._max_tokens)
        at_least = 0
        for start in range(0, len(text) if len(text) > WINDOW_CHARS else 0, WINDOW_CHARS):
            at_least += max(0, len(self._codec.encode(text[start : start + WINDOW_CHARS])) - 2 * longest)
            if at_least > room:
                raise PromptTooLong(self._max_tokens)
