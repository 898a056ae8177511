"""The control tokens of the Harmony format, read from the model's own tokenizer.

Knows names and ids. gpt-oss and tiny-oss have different vocabularies and the same grammar, so no id is written
down anywhere in this package.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.text.errors import TokenizerError
from engine.text.tokenizer import TextCodec


@dataclass(frozen=True, slots=True)
class HarmonyIds:
    """Ids of the control tokens; `special` holds every control token of the vocabulary, reserved ones included."""

    start: int
    end: int
    message: int
    channel: int
    constrain: int
    return_: int
    call: int
    endoftext: int
    special: frozenset[int]

    @classmethod
    def from_codec(cls, codec: TextCodec) -> HarmonyIds:
        """Look the names up in the tokenizer.

        Raises: TokenizerError naming the first control token that the vocabulary lacks.
        """
        table = codec.special_ids

        def find(name: str) -> int:
            literal = f"<|{name}|>"
            if literal not in table:
                raise TokenizerError(f"the tokenizer has no control token {literal}, Harmony needs it")
            return table[literal]

        return cls(
            start=find("start"),
            end=find("end"),
            message=find("message"),
            channel=find("channel"),
            constrain=find("constrain"),
            return_=find("return"),
            call=find("call"),
            endoftext=find("endoftext"),
            special=frozenset(table.values()),
        )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens after which the model has nothing more to say: return, call, endoftext."""
        return (self.return_, self.call, self.endoftext)
