"""What every stage of every pipeline does with a step: keep the table, run the layers, draw tokens if it is last.

Runs on the compute thread. The table follows the steps alone, so every stage of a pipeline holds the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.kv.pool import KvPool
from common.kv.residency import Residency, Want
from common.messages import ChunkWork, Drawn, SequenceOpen, Step, SwapFigures, unpack_ids
from common.model.batch import SequenceChunk, StageBatch
from common.model.runner import StageRunner
from common.model.sampler import SamplingRow, has_penalty, sample


@dataclass(slots=True)
class StageSequence:
    """What a stage keeps of a sequence: as it was opened, the token ids and the blocks that it has by now."""

    opened: SequenceOpen
    tokens: list[int]
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """`hidden` for the next stage, or `drawn` where this stage is the last."""

    hidden: bytes | memoryview | None
    drawn: list[Drawn]
    swap: SwapFigures | None = None


LayerHook = Callable[[Step, int], None]
CloseHook = Callable[[StageSequence], None]


class StageWorker:
    """Layers [a, b) of one pipeline at one epoch. `on_layer(step, local_layer)` is told as soon as the step's KV
    of a layer is in the pool; `on_close(sequence)` when a sequence is closed. With a `residency`
    the blocks of the steps are those of the host pool, and `runner` works on the device's."""

    def __init__(
        self,
        runner: StageRunner,
        pool: KvPool,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: str,
        is_last: bool,
        eos_token_ids: tuple[int, ...],
        residency: Residency | None = None,
        on_layer: LayerHook | None = None,
        on_close: CloseHook | None = None,
    ) -> None:
        self.sequences: dict[str, StageSequence] = {}
        self._runner = runner
        self._block_size = pool.block_size
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._is_last = is_last
        self._eos_token_ids = eos_token_ids
        self._residency = residency
        self._on_layer = on_layer
        self._on_close = on_close

    def execute(self, step: Step, hidden: bytes | memoryview | None) -> StepOutput:
        """Runs one step; `hidden` is the previous stage's output (None on the first stage)."""
        for sequence_id in step.closes:
            closed = self.sequences.pop(sequence_id)
            if self._residency is not None:
                self._residency.drop(sequence_id)
            if self._on_close is not None:
                self._on_close(closed)
        for opened in step.opens:
            tokens = unpack_ids(opened.token_ids)
            self.sequences[opened.sequence_id] = StageSequence(opened, tokens, list(opened.blocks))
        if not step.chunks:
            return StepOutput(None, [])
        self._append(step)
        swap = None if self._residency is None else self._enter(self._residency, step)
        batch = self._batch(step)
        on_layer = self._on_layer
        output = self._runner.run(
            batch,
            None if hidden is None else self._receive_hidden(hidden),
            None if on_layer is None else lambda local_layer: on_layer(step, local_layer),
        )
        if self._residency is not None:
            # whoever gets the output may count on the host pool
            self._residency.write_through(
                (work.sequence_id, self.sequences[work.sequence_id].blocks, work.start, work.start + work.num_tokens)
                for work in step.chunks
            )
        step_output = self._output(step, output, swap)
        if self._device != "cpu":
            # a step that draws nothing has waited for nothing: its KV may not be there yet, and when a step is over
            # its blocks may be read and given to others
            torch.cuda.current_stream().synchronize()
        return step_output

    def _output(self, step: Step, output: torch.Tensor, swap: SwapFigures | None) -> StepOutput:
        if not self._is_last:
            return StepOutput(self._send_hidden(output), [], swap)
        return StepOutput(None, self._draw(step, output), swap)

    def _append(self, step: Step) -> None:
        """The table learns which tokens and blocks the step adds."""
        for work in step.chunks:
            sequence = self.sequences[work.sequence_id]
            sequence.blocks += work.new_blocks
            if work.appended is not None and work.start == len(sequence.tokens):
                sequence.tokens.append(work.appended)

    def _enter(self, residency: Residency, step: Step) -> SwapFigures:
        for sequence_id in step.parked:
            residency.drop(sequence_id)
        needed = [
            Want(work.sequence_id, self.sequences[work.sequence_id].blocks, work.start, work.start + work.num_tokens)
            for work in step.chunks
        ]
        upcoming = [
            Want(sequence_id, self.sequences[sequence_id].blocks, num_tokens, num_tokens)
            for sequence_id, num_tokens in step.upcoming
        ]
        entered = residency.enter(needed, upcoming)
        return SwapFigures(entered.copy_s, entered.waited_s, entered.num_blocks)

    def _batch(self, step: Step) -> StageBatch:
        chunks: list[SequenceChunk] = []
        token_ids: list[int] = []
        for work in step.chunks:
            sequence = self.sequences[work.sequence_id]
            end = work.start + work.num_tokens
            blocks = sequence.blocks if self._residency is None else self._residency.blocks(work.sequence_id)
            chunks.append(SequenceChunk(work.start, work.num_tokens, blocks[: -(-end // self._block_size)], work.draws))
            token_ids += sequence.tokens[work.start : end]
        return StageBatch(chunks, token_ids)

    def _receive_hidden(self, hidden: bytes | memoryview) -> torch.Tensor:
        # a bytearray because torch wants writable memory
        flat = torch.frombuffer(bytearray(hidden), dtype=self._dtype)
        return flat.view(-1, self._hidden_size).to(self._device)

    def _send_hidden(self, output: torch.Tensor) -> memoryview:
        return output.contiguous().cpu().view(torch.uint8).numpy().data.cast("B")

    def _draw(self, step: Step, logits: torch.Tensor) -> list[Drawn]:
        drawing = [work for work in step.chunks if work.draws]
        if not drawing:
            return []
        rows = [self._row(work) for work in drawing]
        drawn = [Drawn(t.token_id, t.logprob, list(t.top_logprobs)) for t in sample(logits, rows)]
        for work, token in zip(drawing, drawn, strict=True):
            self.sequences[work.sequence_id].tokens.append(token.token_id)
        return drawn

    def _row(self, work: ChunkWork) -> SamplingRow:
        sequence = self.sequences[work.sequence_id]
        opened, tokens = sequence.opened, sequence.tokens
        num_prompt = opened.num_prompt_tokens
        return SamplingRow(
            params=opened.params,
            choice=opened.choice,
            position=len(tokens),
            prompt_ids=tokens[:num_prompt] if has_penalty(opened.params) else (),
            output_ids=tokens[num_prompt:] if has_penalty(opened.params) else (),
            eos_token_ids=self._eos_token_ids,
            num_output_tokens=len(tokens) - num_prompt,
        )
