"""A Llama-shaped checkpoint of random weights to measure with: `python -m loadtest.make_model --out DIR [--shape 8b]`.

128 million weights or, for GPUs, the shapes of Llama 3.2 1B and Llama 3.1 8B. Speed does not depend on the values; they
are drawn wide enough that the likeliest token changes between steps. There is no tokenizer: the workloads consist of
token ids.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loadtest.options import new_parser

WEIGHT_STD = 0.06
SHAPES: dict[str, dict[str, Any]] = {
    "128m": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def main() -> int:
    """Writes the checkpoint."""
    parser = new_parser("make_model", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the weights")
    parser.add_argument("--shape", default="128m", choices=list(SHAPES), help="number of weights")
    arguments = parser.parse_args()
    config = LlamaConfig(**SHAPES[arguments.shape], bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = _drawn(config) if arguments.shape == "128m" else _drawn_at_once(config)
    # the same values in every dtype
    model.to(torch.bfloat16).to(getattr(torch, arguments.dtype)).save_pretrained(arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters in {arguments.out}")
    return 0


def _drawn(config: LlamaConfig) -> Any:
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.normal_(0, WEIGHT_STD)
    return model


def _drawn_at_once(config: LlamaConfig) -> Any:
    """Without what transformers would draw first, and in bfloat16 from the start; on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device=device)
    model.tie_weights()
    spread = WEIGHT_STD * (768 / config.hidden_size) ** 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02 if "embed" in name else spread)
    return model.cpu()


if __name__ == "__main__":
    sys.exit(main())
