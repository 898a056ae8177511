"""Token ids to text, a few at a time, for one stream.

Knows how bytes of characters are spread over tokens. An incomplete character waits for its next token and becomes
U+FFFD only at the end, so that the pieces concatenate to what `Tokenizer.decode` gives for all ids at once.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from engine.text.tokenizer import TextCodec

_make_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The incremental decoder of one sequence. Never raises: ids with no token decode to nothing."""

    def __init__(self, codec: TextCodec, *, skip_special_tokens: bool = True) -> None:
        self._token_bytes = codec.token_bytes
        self._skipped = frozenset(codec.special_ids.values()) if skip_special_tokens else frozenset[int]()
        self._decoder = _make_decoder("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the text that these tokens complete; linear in their number."""
        skipped, token_bytes = self._skipped, self._token_bytes
        return self._decoder.decode(b"".join([token_bytes(i) for i in token_ids if i not in skipped]))

    def finish(self) -> str:
        """Return what is left: U+FFFD for a character that never completed, else nothing."""
        return self._decoder.decode(b"", final=True)
