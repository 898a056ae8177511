"""The byte-level BPE of tiny-oss.

Knows: how its vocabulary is made. Digits are single tokens, so that sums are sums of digits. A word splits the same
way with and without a leading space: merges are learnt on bare words, and each piece `x` that may start a word gets
a twin ` x` whose merge comes last. A model this small then copies a name from prose into JSON token by token.
Refuses to know: what the tokens mean to the model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"
CONTROL_TOKENS = (
    START_OF_TEXT,
    END_OF_TEXT,
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)

SPACE = "Ġ"
"""How byte-level BPE writes a space."""

# Words and punctuation may carry one leading space; digits never do; line breaks stand alone.
PATTERN = r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\p{N}|\r?\n+|\s"
_BARE_PATTERN = r"\p{L}+|[^\s\p{L}\p{N}]+|\p{N}|\r?\n+|\s"


def _splitter(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(texts: Iterable[str], num_merges: int, num_twins: int) -> Tokenizer:
    """Train the tokenizer: `num_merges` merges on bare words, then twins for the commonest first pieces.

    Raises: ValueError when the vocabulary comes out as a multiple of 64, which tiny-oss must not have.
    """
    texts = list(texts)
    bare = Tokenizer(BPE())
    bare.pre_tokenizer = _splitter(_BARE_PATTERN)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + num_merges, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    bare.train_from_iterator(texts, trainer)
    model = json.loads(bare.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    merges = [tuple(pair) for pair in model["merges"]]
    for piece in _first_pieces(bare, texts, num_twins):
        vocab[SPACE + piece] = len(vocab)
        merges.append((SPACE, piece))
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = _splitter(PATTERN)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    if tokenizer.get_vocab_size() % 64 == 0:
        raise ValueError("vocabulary is a multiple of 64; change the number of merges or twins")
    return tokenizer


def _first_pieces(bare: Tokenizer, texts: list[str], count: int) -> list[str]:
    """Return the pieces that most often begin a word after a space, commonest first."""
    splitter = _splitter(PATTERN)
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(text) if len(word) > 1 and word[0] == SPACE)
    pieces: Counter[str] = Counter()
    for word, number in words.items():
        tokens = bare.model.tokenize(word[1:])
        pieces[tokens[0].value] += number
    ranked = sorted(pieces.items(), key=lambda item: (-item[1], item[0]))
    return [piece for piece, _ in ranked[:count]]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "add_bos_token": False,
        "bos_token": START_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|return|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 2048,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load tokenizer.json so that text never becomes a control token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def control_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Map the control token names to their ids."""
    ids: dict[str, int] = {}
    for name in CONTROL_TOKENS:
        number = tokenizer.token_to_id(name)
        if number is None:
            raise ValueError(f"the tokenizer lacks {name}")
        ids[name] = number
    return ids


def merge_table(tokenizer: Tokenizer) -> dict[int, tuple[int, int]]:
    """Map each token that a merge made to the two tokens it was made of."""
    model = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    return {vocab[left + right]: (vocab[left], vocab[right]) for left, right in model["merges"]}
