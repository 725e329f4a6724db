"""The only place that knows text: tokenising, exact incremental detokenising, stop strings.

Everything here is a pure function of the ids pushed so far: whoever holds the ids can rebuild a stream.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from dejavu.errors import ConfigurationError, InvalidParameter

_REPLACEMENT = "\ufffd"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TextCodec:
    """A model's tokenizer: encodes and decodes as `transformers.AutoTokenizer` of the same directory does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def load(cls, model_dir: str | Path) -> TextCodec | None:
        """The tokenizer of a model directory, None if it has none. Raises `ConfigurationError`."""
        folder = Path(model_dir)
        try:
            tokenizer = _read_tokenizer(folder)
        except Exception as error:  # noqa: BLE001 the library raises bare Exception for a file it cannot read
            raise ConfigurationError(f"the tokenizer in {folder} cannot be read: {error}", field="model") from error
        return None if tokenizer is None else cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens included. Other threads run meanwhile. Raises `InvalidParameter` for
        invalid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidParameter("is not valid Unicode (a lone surrogate)", field="prompt") from error
        # a batch of one: for a single text the library would keep the interpreter to itself, for seconds perhaps
        return self.tokenizer.encode_batch_fast([text])[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens; unknown ids have no text."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def token(self, token_id: int) -> str | None:
        """How the tokenizer writes a token; None if it has no text (special or unknown)."""
        return None if token_id in self.special_ids else self.tokenizer.id_to_token(token_id)


def _read_tokenizer(folder: Path) -> Tokenizer | None:
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config |= json.loads((folder / name).read_text("utf-8"))
    special = _special_tokens(config)
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        for name in ("bos_token", "eos_token", "unk_token"):
            special.setdefault(name, "<|endoftext|>")
        tokenizer = _byte_level_bpe(folder, config, special)
    else:
        return None
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for token in sorted(set(special.values()) - known):
        if tokenizer.token_to_id(token) is not None:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return tokenizer


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    values = {name: config.get(name) for name in _SPECIAL_NAMES}
    texts = {name: v.get("content") if isinstance(v, dict) else v for name, v in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _byte_level_bpe(folder: Path, config: dict[str, Any], special: dict[str, str]) -> Tokenizer:
    """A tokenizer of GPT-2's two files. Only here do the BOS and EOS flags count: else the template does."""
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    has_prefix_space = bool(config.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    before = [special["bos_token"]] if config.get("add_bos_token") else []
    after = [special["eos_token"]] if config.get("add_eos_token") else []
    if before or after:
        ids = {(token, tokenizer.token_to_id(token)) for token in before + after}
        tokenizer.post_processor = processors.TemplateProcessing([*before, "$A", *after], special_tokens=[*ids])
    return tokenizer


# ---------------------------------------------------------------- incremental detokenising


class _Detokenizer(Protocol):
    """Joined, the results of all `push` and of `flush` are the decoded text of the pushed ids."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class _ByteLevelDetokenizer:
    """GPT-2 style tokens are bytes in disguise: an incremental UTF-8 decoder does it."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        token = self._codec.token(token_id)
        return "" if token is None else self._utf8.decode(_token_bytes(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for 256, 257, …"""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _token_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()  # an added token, written as it is


class _WindowDetokenizer:
    """Any other decoder: the text of a window of ids, less the text of its part that was shown already.

    The library's own `DecodeStream` is not exact here: a run of byte tokens (`<0xC3>`) that turns out invalid
    decodes to replacement characters from its beginning, so nothing of a run may be shown before it ends.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._window: list[int] = []
        self._num_shown = 0

    def push(self, token_id: int) -> str:
        token = self._codec.token(token_id)
        if token is None:
            return ""
        self._window.append(token_id)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return ""
        text = self._text_after_shown()
        if text.endswith(_REPLACEMENT):
            return ""
        # the shown tokens stay as context: a first token loses its leading space
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return text

    def flush(self) -> str:
        text = self._text_after_shown()
        self._num_shown = len(self._window)
        return text

    def _text_after_shown(self) -> str:
        shown = self._codec.decode(self._window[: self._num_shown])
        return self._codec.decode(self._window)[len(shown) :]


# ---------------------------------------------------------------- stop strings


class _Matcher:
    """Finds a stop string in text that arrives in pieces (Knuth, Morris and Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._fallback = [0] * (len(stop) + 1)
        for end in range(1, len(stop)):
            self._fallback[end + 1] = self._next(self._fallback[end], stop[end])

    def push(self, character: str) -> bool:
        """True if this character completes the stop string."""
        self.num_matched = self._next(self.num_matched, character)
        return self.num_matched == len(self.stop)

    def _next(self, num_matched: int, character: str) -> int:
        while num_matched and self.stop[num_matched] != character:
            num_matched = self._fallback[num_matched]
        return num_matched + (self.stop[num_matched] == character)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that can be shown now; `stopped` says that a stop string was completed (and cut)."""

    text: str
    stopped: bool = False


class TextStream:
    """The text of one choice, token by token.

    Joined, the texts of all `push` and of `finish` are `codec.decode(ids)`, cut before the stop string that
    is completed first (the longest, if several end there). A `push` never shows a part of a code point, nor
    text that may become a stop string. Tokens of `silent_ids` (EOS, stop tokens) have no text.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = (), silent_ids: Collection[int] = ()) -> None:
        is_byte_level = isinstance(codec.tokenizer.decoder, decoders.ByteLevel)
        self._detokenizer: _Detokenizer = _ByteLevelDetokenizer(codec) if is_byte_level else _WindowDetokenizer(codec)
        self._matchers = [_Matcher(each) for each in stop]
        self._silent_ids = silent_ids
        self._held = ""
        self._stopped = False

    def push(self, token_id: int) -> TextDelta:
        """The text that the next token makes certain. After a stop string, every token has the text ''."""
        if self._stopped:
            return TextDelta("", True)
        text = "" if token_id in self._silent_ids else self._detokenizer.push(token_id)
        return TextDelta(self._release(text), self._stopped)

    def finish(self) -> str:
        """The rest of the text: no token follows."""
        if self._stopped:
            return ""
        text = self._release(self._detokenizer.flush())
        text, self._held = text + ("" if self._stopped else self._held), ""
        return text

    def _release(self, text: str) -> str:
        if not self._matchers:
            return text
        for character in text:
            self._held += character
            completed = [len(m.stop) for m in self._matchers if m.push(character)]
            if completed:
                self._stopped = True
                return self._held[: len(self._held) - max(completed)]
        num_held = max(matcher.num_matched for matcher in self._matchers)
        end = len(self._held) - num_held
        shown, self._held = self._held[:end], self._held[end:]
        return shown
