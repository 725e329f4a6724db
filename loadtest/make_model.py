"""A Llama-shaped checkpoint of 128 million random weights to measure with: `python -m loadtest.make_model --out DIR`.

Speed does not depend on the values; they are drawn wide enough that the likeliest token changes between steps. There
is no tokenizer: the workloads consist of token ids.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

WEIGHT_STD = 0.06


def main() -> int:
    """Writes the checkpoint."""
    parser = argparse.ArgumentParser("loadtest.make_model", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    arguments = parser.parse_args()
    config = LlamaConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
        head_dim=64, vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.normal_(0, WEIGHT_STD)
    # the same values in every dtype
    model.to(torch.bfloat16).to(getattr(torch, arguments.dtype)).save_pretrained(arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
