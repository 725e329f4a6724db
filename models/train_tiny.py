"""Train the small English model shipped in models/tiny/ from Jane Austen's novels, on one CPU thread.

The text comes from the Debian package r-cran-janeaustenr. The run ends, with its learning rate at zero,
when the given minutes are over, so a slower machine trains less rather than longer.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import re
import subprocess
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE = "r-cran-janeaustenr"
DATA_FILE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
BOS, EOS = "<s>", "</s>"
VOCAB_SIZE = 4096
CONTEXT_TOKENS = 512
BATCH_ROWS = 4
PASSAGE_CHARS = 2500
HELD_OUT_EVERY = 50
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 60
FIRST_SAVE_S = 90.0
SAVE_EVERY_S = 300.0
REPORT_EVERY_STEPS = 50


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages of prose, each at least PASSAGE_CHARS characters but for the last of a novel."""

    train: list[str]
    held_out: list[str]


def fetch_package(folder: Path) -> Path:
    """Download and unpack the text package into folder, without root; returns its R data file."""
    subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
    (archive,) = folder.glob(f"{PACKAGE}_*.deb")
    subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True)
    return folder / DATA_FILE


def read_novels(data_file: Path) -> list[list[str]]:
    """Return the lines of each novel in an R lazy-load database of character vectors."""
    rest, novels = data_file.read_bytes(), []
    while rest:
        stream = zlib.decompressobj()
        # Four bytes before each stream give its unpacked length, which zlib does not need.
        novels.append(read_character_vector(stream.decompress(rest[4:])))
        rest = stream.unused_data
    return novels


def read_character_vector(data: bytes) -> list[str]:
    """Decode one R character vector in XDR serialisation version 3.

    Raises ValueError if the data is of another kind.
    """
    if data[:6] != b"X\n\x00\x00\x00\x03":
        raise ValueError("not an R serialisation of version 3")
    position = 14
    position += 4 + int.from_bytes(data[position : position + 4])
    kind, num_lines = data[position + 3], int.from_bytes(data[position + 4 : position + 8])
    if kind != 16:
        raise ValueError(f"R object kind {kind} is not a character vector")
    position += 8
    lines = []
    for _ in range(num_lines):
        length_bytes = int.from_bytes(data[position + 4 : position + 8])
        position += 8
        lines.append(data[position : position + length_bytes].decode())
        position += length_bytes
    return lines


def prose_paragraphs(lines: list[str]) -> list[str]:
    """Join wrapped lines into paragraphs; drop headings, title pages and emphasis marks."""
    blocks = "\n".join(lines).split("\n\n")
    paragraphs = (re.sub(r"\s+", " ", block.replace("_", "")).strip() for block in blocks)
    return [text for text in paragraphs if re.search(r"[a-z].*[.?!;:,\"'\-]$", text)]


def make_passages(paragraphs: list[str]) -> list[str]:
    """Group whole paragraphs into passages of about PASSAGE_CHARS characters."""
    passages: list[str] = []
    pending: list[str] = []
    for paragraph in paragraphs:
        pending.append(paragraph)
        if sum(map(len, pending)) >= PASSAGE_CHARS:
            passages.append("\n\n".join(pending))
            pending = []
    return [*passages, "\n\n".join(pending)] if pending else passages


def read_corpus(data_file: Path) -> Corpus:
    """Read every novel and keep each HELD_OUT_EVERY-th passage out of training."""
    passages = [text for lines in read_novels(data_file) for text in make_passages(prose_paragraphs(lines))]
    held_out = passages[::HELD_OUT_EVERY]
    return Corpus([text for index, text in enumerate(passages) if index % HELD_OUT_EVERY], held_out)


def train_tokenizer(passages: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose only post-processing is a leading BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(passages, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model; its six layers split evenly over one, two or three stages."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def pack(tokenizer: PreTrainedTokenizerFast, passages: list[str]) -> torch.Tensor:
    """Tokenize passages into one int64 vector, each as BOS text EOS."""
    ids: list[int] = []
    for passage in passages:
        ids += [*tokenizer.encode(passage), tokenizer.eos_token_id]
    return torch.tensor(ids)


def shuffled_rows(passages: list[str], tokenizer: PreTrainedTokenizerFast, epoch: int) -> torch.Tensor:
    """Pack one epoch in a new order; returns [rows, CONTEXT_TOKENS] with new row boundaries each epoch."""
    shuffler = random.Random(epoch)
    ids = pack(tokenizer, shuffler.sample(passages, len(passages)))[shuffler.randrange(CONTEXT_TOKENS) :]
    rows = ids[: len(ids) // CONTEXT_TOKENS * CONTEXT_TOKENS].view(-1, CONTEXT_TOKENS)
    return rows[torch.randperm(len(rows))]


def row_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats over rows [batch, tokens]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Mean loss in nats over the held-out ids, in rows of CONTEXT_TOKENS."""
    rows = ids[: len(ids) // CONTEXT_TOKENS * CONTEXT_TOKENS].view(-1, CONTEXT_TOKENS)
    losses = [row_loss(model, batch).item() * len(batch) for batch in torch.split(rows, BATCH_ROWS)]
    return sum(losses) / len(rows)


def learning_rate(step: int, fraction_done: float) -> float:
    """Linear warm-up by steps, then a cosine that is zero when the time is over."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction_done)))


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays the matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint with bfloat16 weights, leaving the float32 weights in training as they are."""
    shipped = copy.deepcopy(model).to(torch.bfloat16)
    shipped.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    shipped.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, arguments: argparse.Namespace
) -> None:
    """Train until the given minutes are over, saving at FIRST_SAVE_S and then every SAVE_EVERY_S."""
    optimizer = make_optimizer(model)
    held_out_ids = pack(tokenizer, corpus.held_out)
    start_s, duration_s, next_save_s = time.monotonic(), arguments.minutes * 60, FIRST_SAVE_S
    step = epoch = 0
    elapsed_s = 0.0
    while elapsed_s < duration_s:
        for rows in torch.split(shuffled_rows(corpus.train, tokenizer, epoch), BATCH_ROWS):
            loss = train_step(model, optimizer, rows, learning_rate(step, elapsed_s / duration_s))
            elapsed_s = time.monotonic() - start_s
            if step % REPORT_EVERY_STEPS == 0:
                report(step, epoch, loss, elapsed_s, duration_s)
            if elapsed_s >= next_save_s:
                save(model, tokenizer, arguments.out)
                next_save_s += SAVE_EVERY_S
                print(f"saved; held-out loss {held_out_loss(model, held_out_ids):.3f}", flush=True)
            step += 1
            if elapsed_s >= duration_s:
                break
        epoch += 1
    save(model, tokenizer, arguments.out)
    print(f"done: {step} steps, held-out loss {held_out_loss(model, held_out_ids):.3f} nats", flush=True)


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, rows: torch.Tensor, rate: float) -> float:
    """Take one clipped AdamW step at the given rate; returns the loss in nats."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = row_loss(model, rows)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def report(step: int, epoch: int, loss: float, elapsed_s: float, duration_s: float) -> None:
    tokens_per_s = (step + 1) * BATCH_ROWS * CONTEXT_TOKENS / elapsed_s
    print(
        f"step {step} epoch {epoch} loss {loss:.3f} {tokens_per_s:.0f} tokens/s "
        f"{(duration_s - elapsed_s) / 60:.1f} min left",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=35.0, help="wall-clock training time")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--data", type=Path, help="an unpacked Rdata.rdb; downloaded when absent")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        corpus = read_corpus(arguments.data or fetch_package(Path(folder)))
    tokenizer = train_tokenizer(corpus.train)
    train(make_model(tokenizer), tokenizer, corpus, arguments)


if __name__ == "__main__":
    main()
