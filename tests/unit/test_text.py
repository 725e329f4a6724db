import json
import random
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

from common.text import TextCodec, TextStream
from dejavu.errors import ConfigurationError, InvalidParameter

CORPUS = ["the cat sat on the mat, naïve 🌍🌍 and the dog 👩\u200d🚀 said: «привет» 日本語\n" * 20]
TEXTS = ["the cat 🌍 said", " two  spaces", "日本語 👩\u200d🚀!", "a</s>b", "", "\n\t\x00é"]
SHIPPED = Path(__file__).parents[2] / "models" / "tiny"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False), AddedToken("é", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def byte_fallback_vocabulary() -> dict[str, int]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*"▁thecasomdn,:.", "▁t", "he", "▁the", "▁▁", "▁c", "at", "▁cat"]
    return {token: token_id for token_id, token in enumerate(tokens)}


def llama_style() -> Tokenizer:
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("▁", "c"), ("a", "t"), ("▁c", "at")]
    tokenizer = Tokenizer(
        models.BPE(byte_fallback_vocabulary(), merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace() -> Tokenizer:
    pieces = [("<unk>", 0.0), *((piece, -1.0) for piece in ["▁", "▁the", "cat", "s", "▁s"])]
    tokenizer = Tokenizer(models.Unigram(pieces, 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


MAKERS: list[Callable[[], Tokenizer]] = [byte_level, llama_style, metaspace]


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__)
def codec(request: pytest.FixtureRequest) -> TextCodec:
    return TextCodec(request.param())


def random_ids(codec: TextCodec, rng: random.Random) -> list[int]:
    """Any ids, or a real text (so that code points are whole), or both; some are unknown to the tokenizer."""
    vocab_size = codec.tokenizer.get_vocab_size()
    noise = [rng.randrange(vocab_size + 5) for _ in range(rng.randrange(12))]
    text = codec.encode("".join(rng.choices(["the cat", " 🌍", "日本語", "é ", "  ", "👩\u200d🚀", "sat"], k=4)))
    return rng.choice([noise, text, text + noise, noise + text])


def stream(codec: TextCodec, ids: list[int], stop: list[str]) -> tuple[list[str], bool]:
    text = TextStream(codec, stop)
    deltas = [text.push(token_id) for token_id in ids]
    return [*(delta.text for delta in deltas), text.finish()], any(delta.stopped for delta in deltas)


def cut(text: str, stops: list[str]) -> str:
    """What a reader of one character at a time would do."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)]
    return text


def test_a_long_prompt_leaves_the_interpreter_to_others() -> None:
    codec = TextCodec.load(SHIPPED)
    assert codec is not None
    ticks: list[float] = []
    over = threading.Event()

    def tick() -> None:
        while not over.wait(0.001):
            ticks.append(time.monotonic())

    ticking = threading.Thread(target=tick)
    ticking.start()
    began_s = time.monotonic()
    codec.encode("ab " * 200_000)
    took_s = time.monotonic() - began_s
    over.set()
    ticking.join()
    assert any(began_s + 0.2 * took_s < at_s < began_s + 0.8 * took_s for at_s in ticks)


def test_pieces_join_to_the_decoded_text(codec: TextCodec) -> None:
    rng = random.Random(1)
    for _ in range(600):
        ids = random_ids(codec, rng)
        pieces, _ = stream(codec, ids, [])
        assert "".join(pieces) == codec.decode(ids), ids


def test_text_is_cut_before_any_stop_string_wherever_it_is(codec: TextCodec) -> None:
    rng = random.Random(2)
    num_stopped = 0
    for _ in range(60):
        ids = random_ids(codec, rng)
        text = codec.decode(ids)
        for start in range(len(text)):
            stops = [text[start : start + rng.randint(1, 5)] for start in (start, rng.randrange(len(text)))]
            stops.append(rng.choice(["never", "the the", text[:2] + "?"]))
            pieces, stopped = stream(codec, ids, stops)
            assert "".join(pieces) == cut(text, stops), (ids, stops)
            num_stopped += stopped
    assert num_stopped > 200


def ids_of(codec: TextCodec, tokens: Iterable[str]) -> list[int]:
    ids = [codec.tokenizer.token_to_id(token) for token in tokens]
    return [token_id for token_id in ids if token_id is not None]


def test_no_piece_holds_half_a_code_point() -> None:
    codec = TextCodec(byte_level())
    ids = ids_of(codec, "ðŁĮį")  # 🌍 in four byte tokens
    assert stream(codec, [*ids, *ids[:2]], [])[0] == ["", "", "", "🌍", "", "", "\ufffd"]
    llama = TextCodec(llama_style())
    ids = ids_of(llama, ["<0xC3>", "<0xA9>", "t"])
    # a run of byte tokens can turn invalid as a whole, so it is shown when it ends
    assert stream(llama, ids, [])[0] == ["", "", "ét", ""]
    assert stream(llama, ids[:2], [])[0] == ["", "", "é"]


def test_a_stop_string_is_withheld_over_tokens_and_never_shown() -> None:
    codec = TextCodec(byte_level())
    text = TextStream(codec, ["ababc"])
    pushed = [text.push(token_id) for token_id in ids_of(codec, "xabababc!")]
    assert [delta.text for delta in pushed] == ["x", "", "", "", "", "ab", "", "", ""]
    assert [delta.stopped for delta in pushed] == [False] * 7 + [True] * 2
    assert text.finish() == ""


def test_withheld_text_is_shown_at_the_end() -> None:
    codec = TextCodec(byte_level())
    assert stream(codec, ids_of(codec, "xab"), ["abc"])[0] == ["x", "", "", "ab"]


def test_end_tokens_have_no_text() -> None:
    codec = TextCodec(byte_level())
    first, second = ids_of(codec, "xy")
    text = TextStream(codec, [], silent_ids=[second])
    assert [text.push(token_id).text for token_id in (first, second, 1)] == ["x", "", ""]


@pytest.mark.parametrize("make", [byte_level, llama_style])
@pytest.mark.parametrize(
    "config",
    [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}, {"pad_token": "t"}],
    ids=["plain", "bos-eos", "no-bos", "pad"],
)
def test_encodes_and_decodes_as_transformers(
    make: Callable[[], Tokenizer], config: dict[str, object], tmp_path: Path
) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    names = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | config))
    assert_same(tmp_path)


def test_builds_gpt2_tokenizers_from_vocabulary_and_merges(tmp_path: Path) -> None:
    byte_level().model.save(str(tmp_path))
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
    }
    for flags in [(), ("add_bos_token",), ("add_bos_token", "add_eos_token"), ("add_prefix_space",)]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | dict.fromkeys(flags, True)))
        assert_same(tmp_path)


def test_the_shipped_tokenizer() -> None:
    assert_same(SHIPPED)


def assert_same(model_dir: Path) -> None:
    codec, theirs = TextCodec.load(model_dir), AutoTokenizer.from_pretrained(str(model_dir))
    assert codec is not None
    for text in TEXTS:
        ids = codec.encode(text)
        assert ids == theirs(text).input_ids, text
        assert codec.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def test_no_tokenizer_and_a_broken_one(tmp_path: Path) -> None:
    assert TextCodec.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ConfigurationError, match="cannot be read"):
        TextCodec.load(tmp_path)


def test_truncation_of_the_file_is_ignored() -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    assert len(TextCodec(tokenizer).encode("x y z " * 5)) > 4
    assert len(TextCodec(tokenizer).encode("x")) == 2


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(InvalidParameter) as caught:
        TextCodec(byte_level()).encode("a\ud800")
    assert caught.value.field == "prompt"
