"""Tokenize text with a byte-level BPE of a fixed form, so that any text round-trips.

The tokenizer is Hugging Face's `tokenizers` library. Token 0 is always PAD (silence); token 1
always marks the start of an event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from shared.errors import ConfigError
from shared.files import sha256_of_bytes
from shared.recipe import PAD_TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

PAD_TEXT = "<pad>"
EVENT_TOKEN = 1
EVENT_TEXT = "<event>"


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """A byte-level BPE; `json` is its complete ``tokenizer.json``."""

    json: str
    vocab_size: int
    """Every id is smaller."""
    _inner: Tokenizer

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, in hex."""
        return sha256_of_bytes(self.json.encode())

    def encode(self, text: str) -> list[int]:
        """Tokenize one event: the event mark, then the tokens of its text.

        A text that spells a special token (``<pad>``) is encoded as text, never as that token.
        """
        return [EVENT_TOKEN, *self._inner.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode tokens to text; PAD and event marks are skipped."""
        kept = [i for i in ids if i not in (PAD_TOKEN, EVENT_TOKEN) and 0 <= i < self.vocab_size]
        return str(self._inner.decode(kept, skip_special_tokens=False))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer in any order.

    Without texts, every byte is a token.
    """
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TEXT, EVENT_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(sorted(texts), trainer)
    return parse_tokenizer(inner.to_str(), origin="trained tokenizer")


def parse_tokenizer(json: str, *, origin: str) -> TextTokenizer:
    """Parse the text of a tokenizer.json.

    Raises:
        ConfigError: it is not a tokenizer, or its first tokens aren't PAD and the event mark.
    """
    try:
        inner = Tokenizer.from_str(json)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{origin}: not a tokenizer.json: {error}") from error
    if inner.token_to_id(PAD_TEXT) != PAD_TOKEN or inner.token_to_id(EVENT_TEXT) != EVENT_TOKEN:
        raise ConfigError(
            f"{origin}: token 0 must be {PAD_TEXT} and token 1 {EVENT_TEXT}; "
            "fix: train it with these special tokens first, or leave text.tokenizer out"
        )
    inner.encode_special_tokens = True
    inner.no_truncation()
    inner.no_padding()
    return TextTokenizer(json, 1 + max(inner.get_vocab().values()), inner)


def load_tokenizer(path: Path) -> TextTokenizer:
    """Read a tokenizer.json.

    Raises:
        ConfigError: the file doesn't exist or is not a tokenizer.
    """
    try:
        return parse_tokenizer(path.read_text(encoding="utf-8"), origin=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: can't be read as a tokenizer: {error}; fix: correct text.tokenizer, or leave "
            "it out"
        ) from error


def group_events(
    tokens: Sequence[int], times_s: Sequence[float], tokenizer: TextTokenizer
) -> list[dict[str, Any]]:
    """Group predicted tokens, one per tick, into events.

    An event is a run of tokens without PAD; the event mark starts a new one. `times_s` has the
    start of each tick.

    Returns:
        One {"timestamp": seconds, "text", "tokens"} per event; its ids include the event mark.
    """
    events: list[dict[str, Any]] = []
    previous = PAD_TOKEN
    for token, time_s in zip(tokens, times_s, strict=True):
        if token == EVENT_TOKEN or (token != PAD_TOKEN and previous == PAD_TOKEN):
            events.append({"timestamp": round(time_s, 6), "text": "", "tokens": [token]})
        elif token != PAD_TOKEN:
            events[-1]["tokens"].append(token)
        previous = token
    for event in events:
        event["text"] = tokenizer.decode(event["tokens"])
    return events
