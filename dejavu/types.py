"""What a client hands to its user."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Token:
    """One token of one choice. `text` is what it adds to the choice's text ('' while a character or a
    possible stop string is incomplete); `finish_reason` ("stop" or "length") is set on its last token.
    `logprob` and `top_logprobs` (token id, log-probability) are there if `SamplingParams.logprobs` asked."""

    index: int
    id: int
    text: str
    choice: int = 0
    logprob: float | None = None
    finish_reason: str | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` answers to a prompt, as its tokens."""

    index: int
    tokens: tuple[Token, ...]

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def finish_reason(self) -> str | None:
        return self.tokens[-1].finish_reason if self.tokens else None

    @property
    def logprobs(self) -> list[float] | None:
        """The log-probability of each token; None where they were not asked for."""
        values = [token.logprob for token in self.tokens if token.logprob is not None]
        return values if values and len(values) == len(self.tokens) else None


@dataclass(frozen=True, slots=True)
class Usage:
    """`num_output_tokens` counts all choices."""

    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. The short names speak of the first choice."""

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason
