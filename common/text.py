"""Text in and out of a model, without torch: tokenising, incremental detokenising, stop strings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dejavu.errors import ConfigurationError, InvalidParameter

REPLACEMENT = "\ufffd"
MAX_UNFINISHED_TOKENS = 8
"""A code point is never spread over more tokens; what stays undecodable for longer is broken input."""


class TextCodec:
    """A model's tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, model_dir: str | Path) -> TextCodec | None:
        """The tokenizer of a checkpoint directory, None where it has none. Raises `ConfigurationError`."""
        folder = Path(model_dir)
        file = folder / "tokenizer.json"
        try:
            if file.exists():
                return cls(Tokenizer.from_file(str(file)))
            if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
                return cls(_byte_level_bpe(folder))
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception
            raise ConfigurationError(f"{folder}: unreadable tokenizer: {error}", field="model") from error
        return None

    def encode(self, text: str) -> list[int]:
        """Token ids with the model's own special tokens around. Raises `InvalidParameter` for lone surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidParameter(f"not valid Unicode: {error.reason}", field="prompt") from error
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What a token adds to the text; `stopped`: it completed a stop string, nothing more comes."""

    text: str
    stopped: bool = False


class TextStream:
    """Turns one sequence's ids into text as they come. The joined pieces equal the decoded whole, cut before the first
    stop string; half a code point and what may become a stop string are held back."""

    def __init__(self, codec: TextCodec, stop: Sequence[str] = ()) -> None:
        self._codec = codec
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._settled = 0
        """ids before this are decoded for good; they only give the next ones their context"""
        self._context = 0
        self._text = ""
        self._num_emitted = 0
        self._is_stopped = False

    def push(self, token_id: int) -> TextDelta:
        """The next id."""
        self._ids.append(token_id)
        fresh = self._decode_fresh()
        if not fresh:
            return TextDelta("")
        self._text += fresh
        return self._emit(is_end=False)

    def finish(self) -> str:
        """What was held back; the sequence ended without a stop string. (A stop string that only the last piece
        completes still cuts the text.)"""
        if self._is_stopped:
            return ""
        whole = self._codec.decode(self._ids)
        # the whole always begins with what was emitted, unless the tokenizer rewrites its past at the very end
        self._text = self._text[: self._num_emitted] + whole[self._num_emitted :]
        return self._emit(is_end=True).text

    def _decode_fresh(self) -> str:
        """Text that the ids since `_settled` add, once it ends on a whole code point."""
        before = self._codec.decode(self._ids[self._context : self._settled])
        now = self._codec.decode(self._ids[self._context :])
        num_pending = len(self._ids) - self._settled
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and num_pending <= MAX_UNFINISHED_TOKENS):
            return ""
        self._context, self._settled = self._settled, len(self._ids)
        return now[len(before) :]

    def _emit(self, is_end: bool) -> TextDelta:
        # a stop string may begin in what was emitted only if it was held back, so look from there
        found = [at for stop in self._stop if (at := self._text.find(stop, self._num_emitted)) >= 0]
        if found:
            self._is_stopped = True
            end = min(found)
        else:
            end = len(self._text) - (0 if is_end else self._num_held())
        piece = self._text[self._num_emitted : end]
        self._num_emitted = max(self._num_emitted, end)
        return TextDelta(piece, self._is_stopped)

    def _num_held(self) -> int:
        """Length of the longest tail that begins a stop string."""
        longest = 0
        pending = self._text[self._num_emitted :]
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(pending)), longest, -1):
                if pending.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def _byte_level_bpe(folder: Path) -> Any:
    """GPT-2's tokenizer from its two older files."""
    vocab = json.loads((folder / "vocab.json").read_text())
    lines = (folder / "merges.txt").read_text().splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
