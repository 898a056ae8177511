"""Text to token ids and back, over one `tokenizer.json` of the byte-level BPE family.

Knows the vocabulary, the bytes of each token and which tokens are control tokens. Refuses to know chat
formats, models and streams. One rule decides its shape: *text from outside never becomes a control token*.
`tokenizers` matches every added token inside any text, even with `encode_special_tokens`, so ordinary text
goes through a core that was built without the added vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import tokenizers

from engine.text.errors import TokenizerError

TOKENIZER_FILE = "tokenizer.json"
# gpt-oss's file has 28 MB, the largest vocabularies in use about 40 MB. The limit is there so that a wrong
# file fails at once and not after an hour of parsing.
MAX_FILE_BYTES = 256 * 1024 * 1024
# Above this id a file is broken or hostile: the byte table is dense in ids.
MAX_TOKEN_ID = 4_000_000
# `tokenizers` lets go of the GIL only where it encodes batches, which costs 20 us more. A megabyte takes a second, in
# which no other thread of the process would run.
LONG_TEXT_CHARS = 4096


class TextCodec(Protocol):
    """What rendering, parsing and detokenizing need of a tokenizer."""

    @property
    def special_ids(self) -> Mapping[str, int]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def longest_token_bytes(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Tokenizer:
    """A byte-level BPE tokenizer with an exact table from token id to bytes.

    Thread-safe: nothing changes after construction, and encoding long text releases the GIL.
    """

    def __init__(self, inner: tokenizers.Tokenizer, source: str = TOKENIZER_FILE) -> None:
        """Wrap a loaded `tokenizers.Tokenizer`; `source` names it in errors.

        Raises: TokenizerError when the model is no byte-level BPE or control tokens can arise from plain text.
        """
        self._source = source
        _check_byte_level(inner, source)
        added = inner.get_added_tokens_decoder()
        self._core = _core_without_added_tokens(inner)
        self._special_ids = MappingProxyType({t.content: i for i, t in sorted(added.items()) if t.special})
        self._added_ids = MappingProxyType({t.content: i for i, t in sorted(added.items())})
        self._table = _byte_table(inner, self._added_ids, source)
        self._special_id_set = frozenset(self._special_ids.values())
        added_ids = set(self._added_ids.values())
        self._longest = max((len(data) for i, data in enumerate(self._table) if i not in added_ids), default=1)
        self._literals = _literal_pattern(self._added_ids)
        for literal, token_id in self._special_ids.items():
            if token_id in self.encode(literal):
                raise TokenizerError(f"{source}: the text {literal!r} encodes to the control token {token_id}")

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json` from a model folder.

        Raises: TokenizerError naming the file when it is missing, too large or not usable.
        """
        file = Path(path) / TOKENIZER_FILE
        try:
            with file.open("rb") as stream:
                data = stream.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise TokenizerError(f"{file}: cannot be read ({error.strerror or error})") from None
        return cls.from_bytes(data, str(file))

    @classmethod
    def from_bytes(cls, data: bytes, source: str = TOKENIZER_FILE) -> Tokenizer:
        """Parse the contents of a `tokenizer.json`; `source` names it in errors.

        Raises: TokenizerError when it is too large or not usable.
        """
        if len(data) > MAX_FILE_BYTES:
            raise TokenizerError(f"{source}: larger than {MAX_FILE_BYTES} bytes, no tokenizer is")
        try:
            inner = tokenizers.Tokenizer.from_buffer(data)
        except ValueError as error:  # what tokenizers raises for bad JSON, bad UTF-8 and unknown components
            reason = str(error).splitlines()[0][:200]
            raise TokenizerError(f"{source}: not a usable tokenizer ({reason})") from None
        return cls(inner, source)

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Control tokens by literal, for example `<|end|>`; read-only."""
        return self._special_ids

    @property
    def added_ids(self) -> Mapping[str, int]:
        """All added tokens by literal, control tokens included; read-only."""
        return self._added_ids

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id. A model's embedding may have more rows."""
        return len(self._table)

    @property
    def longest_token_bytes(self) -> int:
        """Bytes of the longest token that ordinary text can become."""
        return self._longest

    def encode(self, text: str) -> list[int]:
        """Encode ordinary text; literals of control tokens inside it become plain tokens.

        Time is linear in the text but for the logarithm of the longest word.
        Raises: TokenizerError for lone surrogates, which no byte sequence can carry.
        """
        try:
            if len(text) < LONG_TEXT_CHARS:
                ids: list[int] = self._core.encode(text, add_special_tokens=False).ids
            else:
                ids = self._core.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:
            raise TokenizerError(_unencodable(text)) from None
        return ids

    def encode_trusted(self, text: str) -> list[int]:
        """Encode text of our own, such as a template, in which literals of added tokens become those tokens."""
        if self._literals is None:
            return self.encode(text)
        ids: list[int] = []
        for piece in self._literals.split(text):
            token_id = self._added_ids.get(piece)
            if token_id is not None:
                ids.append(token_id)
            elif piece:
                ids.extend(self.encode(piece))
        return ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Decode ids to text; bytes that are no UTF-8 become U+FFFD, ids with no bytes vanish.

        Raises: TokenizerError for an id outside the vocabulary.
        """
        ids = list(token_ids)
        self.check_ids(ids)
        if skip_special_tokens:
            ids = [i for i in ids if i not in self._special_id_set]
        return b"".join([self._table[i] for i in ids]).decode("utf-8", "replace")

    def check_ids(self, token_ids: Iterable[int]) -> None:
        """Raise TokenizerError when an id is negative or not below `vocab_size`."""
        size = len(self._table)
        for token_id in token_ids:
            if not 0 <= token_id < size:
                raise TokenizerError(f"token id {token_id} is outside the vocabulary (0 to {size - 1})")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token: its literal for an added token, empty for an id with no token."""
        return self._table[token_id] if 0 <= token_id < len(self._table) else b""

    def token_str(self, token_id: int) -> str:
        """Return the token as readable text; a piece of a split character reads `bytes:\\xe2\\x82`."""
        return readable_token(self.token_bytes(token_id))

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token."""
        return token_id in self._special_id_set


def readable_token(data: bytes) -> str:
    """Write a token's bytes as text, or as `bytes:\\x..` when they are no whole UTF-8, as OpenAI does."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _check_byte_level(inner: tokenizers.Tokenizer, source: str) -> None:
    """Refuse tokenizers whose tokens are not written in the byte-level alphabet."""
    if not isinstance(inner.model, tokenizers.models.BPE):
        raise TokenizerError(f"{source}: the model is {type(inner.model).__name__}, only byte-level BPE is read")
    if "ByteLevel" not in repr(inner.decoder):
        raise TokenizerError(f"{source}: the decoder is not ByteLevel, only byte-level BPE is read")


def _core_without_added_tokens(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Build a tokenizer of the same model, normalizer and pre-tokenizer that knows no added token."""
    core = tokenizers.Tokenizer(inner.model)
    if inner.normalizer is not None:
        core.normalizer = inner.normalizer
    if inner.pre_tokenizer is not None:
        core.pre_tokenizer = inner.pre_tokenizer
    return core


def _byte_table(inner: tokenizers.Tokenizer, added_ids: Mapping[str, int], source: str) -> list[bytes]:
    """Return the bytes of each id, empty where the vocabulary has a hole."""
    vocab: dict[str, int] = inner.get_vocab(with_added_tokens=False)
    highest = max([-1, *vocab.values(), *added_ids.values()])
    if highest > MAX_TOKEN_ID:
        raise TokenizerError(f"{source}: token id {highest} is above {MAX_TOKEN_ID}")
    table = [b""] * (highest + 1)
    to_latin1 = {ord(char): byte for byte, char in enumerate(byte_level_alphabet())}
    added = set(added_ids.values())
    for token, token_id in vocab.items():
        if token_id in added:
            continue
        try:
            table[token_id] = token.translate(to_latin1).encode("latin-1")
        except UnicodeEncodeError:
            raise TokenizerError(f"{source}: token {token!r} is not in the byte-level alphabet") from None
    for literal, token_id in added_ids.items():
        table[token_id] = literal.encode("utf-8")
    return table


def byte_level_alphabet() -> Sequence[str]:
    """Return the 256 characters that byte-level BPE writes for the bytes 0 to 255, in byte order.

    Printable Latin-1 stands for itself; every other byte, in order, takes the next character from U+0100 on.
    """
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in itself else chr(next(spare)) for byte in range(256)]


def _literal_pattern(literals: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that splits text at the literals, longest first, and keeps them."""
    ordered = sorted(literals, key=len, reverse=True)
    if not ordered:
        return None
    return re.compile("(" + "|".join(re.escape(literal) for literal in ordered) + ")")


def _unencodable(text: str) -> str:
    for index, char in enumerate(text):
        if 0xD800 <= ord(char) <= 0xDFFF:
            return f"the text holds a lone surrogate (U+{ord(char):04X}) at character {index}"
    return f"the text to encode is a {type(text).__name__}, not a string"
