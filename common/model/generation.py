"""What a checkpoint says about generating with it, as far as transformers' greedy `generate` does it too (no torch).

What can be said in a request is the default of requests that do not say it. What cannot, and changes which tokens are
generated, is named in `unserved`. What changes sampling alone (temperature, top_p, top_k, ...) is left to requests,
whose defaults are documented: it is named in `suggested`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dejavu.errors import ConfigurationError, InvalidParameter
from dejavu.params import SamplingParams

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "token_healing": (0,),
    "watermarking_config": (),
    "stop_strings": ([],),
    "max_time": (),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
}
"""What would change greedy tokens, with the values that change nothing (None never does)."""
_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (1,),
    "top_k": (0,),
    "top_p": (1,),
    "min_p": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """`file` is where it was found; `min_length` counts the prompt, and `min_new_tokens`, where it is said, takes its
    place. `unserved` and `suggested` name fields with their values."""

    file: Path
    repetition_penalty: float = 1.0
    min_new_tokens: int | None = None
    min_length: int = 0
    unserved: tuple[str, ...] = ()
    suggested: tuple[str, ...] = ()

    @classmethod
    def of(cls, document: Mapping[str, Any], file: Path) -> GenerationDefaults:
        """Raises `ConfigurationError` naming the field that is wrong."""
        said = {name: document.get(name) for name in ("repetition_penalty", "min_new_tokens", "min_length")}
        return cls(
            file=file,
            repetition_penalty=_penalty(said["repetition_penalty"], file),
            min_new_tokens=_count("min_new_tokens", said["min_new_tokens"], file),
            min_length=_count("min_length", said["min_length"], file) or 0,
            unserved=tuple(_said(document, _NEUTRAL)),
            suggested=tuple(_said(document, _SAMPLING)) if document.get("do_sample") else (),
        )

    def complete(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """The parameters with everything that the request leaves to the model."""
        penalty, least = params.repetition_penalty, params.min_tokens
        if least is None:
            least = self.min_length - num_prompt_tokens if self.min_new_tokens is None else self.min_new_tokens
            least = min(max(least, 0), params.max_tokens)
        if penalty is None:
            penalty = self.repetition_penalty
        return msgspec.structs.replace(params, repetition_penalty=penalty, min_tokens=least)

    def remarks(self) -> Iterator[str]:
        """What whoever starts the system should know, a line each."""
        if self.unserved:
            yield (
                f"{self.file}: {', '.join(self.unserved)}: not supported, and ignored; "
                "transformers would generate other tokens"
            )
        if self.suggested:
            yield f"{self.file}: suggests {', '.join(self.suggested)}: requests that want these say so"


def _said(document: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    for name, nothing in neutral.items():
        value = document.get(name)
        if value is not None and value not in nothing:
            yield f"{name} {value if len(str(value)) < 20 else '...'}"


def _penalty(value: object, file: Path) -> float:
    if value is None:
        return 1.0
    try:
        return float(SamplingParams.from_mapping({"repetition_penalty": value}).repetition_penalty or 1.0)
    except InvalidParameter as error:
        raise ConfigurationError(f"{file}: repetition_penalty {value!r} {error.message}", field="model") from error


def _count(name: str, value: object, file: Path) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise ConfigurationError(f"{file}: {name} {value!r} is no whole number", field="model")
    return value
