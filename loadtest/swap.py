"""What microbatch swapping gains and costs: `python -m loadtest.swap --json FILE`.

For each sequence length the device pool is made to hold `--batch` sequences, and twice as many are sent at once:
without a host tier (they run as two batches, more or less), with all of them rotating through the device (`--swap on`),
with the system choosing (`auto`), and, as the best there could be, with a pool that holds all. Beside the measured gain
stands what the paper's rule predicts from the measured step time t and transfer: n_s / max(t, transfer) over n_r / t.

With `--admitted K` a last run sends K times what the device holds. Examples:

    python -m loadtest.swap --json swap.json --model DIR --lengths 256,512,1024,2048,4096
    python -m loadtest.swap --json swap.json --model DIR --workload decode-heavy --batch 16 --runs 3
    python -m loadtest.swap --json swap.json --model DIR --device cuda --batch 64 --max-tokens 65536
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from common.kv.layout import PoolLayout
from common.model.kv_layout import fitting_layout
from common.model.spec import load_spec, split_layers
from dejavu import AsyncClient, SamplingParams
from deploy.running import running_system
from loadtest.drive import Trace, drive, summarise
from loadtest.figures import save
from loadtest.machine import describe_machine
from loadtest.options import add_json, add_model, add_runs, new_parser
from loadtest.workload import FIRST_PLAIN_ID, NAMED, WorkItem, Workload, all_at_once

BLOCK_SIZE = 16
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
MODES = ("without", "on", "auto", "all fit")


class Setting:
    """A workload and a device that holds half of it (or less)."""

    def __init__(self, layout: PoolLayout, workload: Workload, num_fitting: float) -> None:
        self.workload = workload
        self.layout = layout
        needs = [-(-(len(item.prompt) + item.max_tokens) // BLOCK_SIZE) for item in workload.items]
        self.all_blocks = sum(needs) + len(needs)
        mean_blocks = math.ceil(statistics.fmean(needs) * num_fitting) + math.ceil(num_fitting)
        self.device_blocks = max(mean_blocks, max(needs) + 1)

    def options(self, mode: str) -> list[str]:
        """More options for `dejavu serve`."""
        device_bytes, host_bytes = (n * self.layout.bytes_per_block for n in (self.device_blocks, self.all_blocks))
        if mode == "all fit":
            return ["--kv-memory", str(host_bytes)]
        if mode == "without":
            return ["--kv-memory", str(device_bytes)]
        return ["--kv-memory", str(device_bytes), "--host-kv-memory", str(host_bytes), "--swap", mode]


def main() -> int:
    """Runs the benchmark; exit code 0 where no request failed and no device held more than two microbatches."""
    arguments = _parser().parse_args()
    spec = load_spec(arguments.model, arguments.dtype)
    longest = max(split_layers(spec.num_layers, arguments.token_stages, None), key=lambda part: part[1] - part[0])
    layout = fitting_layout(spec, longest, BLOCK_SIZE, 1 << 40)
    vocab_size = spec.vocab_size
    base = ["--model", arguments.model, "--dtype", arguments.dtype, "--token-stages", str(arguments.token_stages)]
    base += ["--colocated", "--cache-stores", str(arguments.cache_stores), "--device", arguments.device]
    document: dict[str, Any] = {
        "machine": describe_machine(),
        "model": Path(arguments.model).name,
        "dtype": spec.dtype,
        "device": arguments.device,
        "stages": arguments.token_stages,
        "bytes_per_block_and_stage": layout.bytes_per_block,
        "settings": [],
    }
    for workload, batch in _workloads(arguments, vocab_size):
        setting = Setting(layout, workload, batch)
        document["settings"].append(asyncio.run(_compare(base, setting, arguments, vocab_size, batch)))
        save(arguments.json, document)
    if arguments.admitted:
        document["admitted"] = asyncio.run(_oversubscribe(base, layout, arguments, vocab_size))
        save(arguments.json, document)
    print(f"written to {arguments.json}", flush=True)
    return 1 if _failures(document) else 0


async def _compare(
    base: list[str], setting: Setting, arguments: argparse.Namespace, vocab_size: int, batch: int
) -> dict[str, Any]:
    """All modes on one setting, one system after the other, round by round."""
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for number in range(arguments.runs):
        for mode in MODES:
            run = await _run([*base, *setting.options(mode)], setting.workload, vocab_size, number)
            runs[mode].append(run)
            print(f"{setting.workload.name} {mode}: {_line(run)}", flush=True)
    rates = {mode: statistics.median(run["output_tokens_per_s"] for run in of) for mode, of in runs.items()}
    return {
        "workload": setting.workload.name,
        "num_requests": len(setting.workload.items),
        "fitting": batch,
        "device_blocks": setting.device_blocks,
        "device_bytes_per_stage": setting.device_blocks * setting.layout.bytes_per_block,
        "output_tokens_per_s": rates,
        "gain_on": round(rates["on"] / rates["without"], 3),
        "gain_auto": round(rates["auto"] / rates["without"], 3),
        "best_possible": round(rates["all fit"] / rates["without"], 3),
        "predicted": _predict(runs, arguments.token_stages),
        "device_peak": _peak(runs["on"], arguments.token_stages, len(setting.workload.items)),
        "runs": runs,
    }


async def _run(options: list[str], workload: Workload, vocab_size: int, number: int) -> dict[str, Any]:
    async with running_system(options) as endpoint, AsyncClient(endpoint) as client:
        warm_up = Workload("warm-up", all_at_once(workload).items[:2])
        await drive(client, warm_up.rotated(1, vocab_size), GREEDY)
        traces, wall_s = await drive(client, workload.rotated(97 * (number + 1), vocab_size), GREEDY)
        status = await client.status()
    stages = [service for service in status["services"] if service["role"] == "token_stage"]
    device = [stage["device_kv_blocks"] for stage in stages if stage.get("device_kv_blocks")]
    return {
        **summarise(traces, wall_s),
        "longest_wait_s": round(_longest_wait_s(traces), 3),
        "device_peak_blocks": max((blocks["peak"] for blocks in device), default=None),
        "swapped_in_bytes": sum(stage.get("swapped_in_bytes") or 0 for stage in stages),
        "waited_s": max((stage.get("swap_waited_s") or 0.0 for stage in stages), default=0.0),
        "swap": next((stage["swap"] for stage in stages if "swap" in stage), None),
    }


def _peak(runs: list[dict[str, Any]], num_stages: int, num_sequences: int) -> dict[str, float]:
    """How many blocks two microbatches took on the device, by the pool's own count, and how many they may: 2 / stages
    of what all sequences need, and a block per sequence."""
    need = max(run["swap"]["peak_need_blocks"] for run in runs)
    blocks = max(run["device_peak_blocks"] for run in runs)
    return {"blocks": blocks, "all_need": need, "allowed": round(2 / num_stages * need + num_sequences, 1)}


def _predict(runs: dict[str, list[dict[str, Any]]], num_stages: int) -> dict[str, float] | None:
    """The paper's rule with what was measured: t from the gaps without swapping, the transfer from the copies."""
    gap_ms = statistics.median(run["gap_p50_ms"] for run in runs["without"])
    swap = runs["on"][-1]["swap"]
    if not swap or not swap["peak_need_blocks"]:
        return None
    step_ms = gap_ms / num_stages
    swapping_blocks = min(swap["peak_need_blocks"] / num_stages, swap["device_blocks"] / 2)
    resident_blocks = min(swap["peak_need_blocks"], swap["device_blocks"]) / num_stages
    transfer_ms = swapping_blocks * swap["block_copy_us"] / 1e3
    gain = swapping_blocks / max(step_ms, transfer_ms) / (resident_blocks / step_ms)
    return {"step_ms": round(step_ms, 3), "transfer_ms": round(transfer_ms, 3), "gain": round(gain, 3)}


async def _oversubscribe(
    base: list[str], layout: PoolLayout, arguments: argparse.Namespace, vocab_size: int
) -> dict[str, Any]:
    """Many more requests than the device holds: without a host tier, with it, and on a device that holds them all."""
    num_requests = arguments.admitted * arguments.batch
    workload = _fixed(256, 64, num_requests, vocab_size)
    setting = Setting(layout, workload, arguments.batch)
    runs = {}
    for mode in ("without", "auto", "all fit"):
        runs[mode] = await _run([*base, *setting.options(mode)], workload, vocab_size, 0)
        print(f"{num_requests} requests, {arguments.batch} fit, {mode}: {_line(runs[mode])}", flush=True)
    rates = {mode: run["output_tokens_per_s"] for mode, run in runs.items()}
    return {
        "num_requests": num_requests,
        "fitting": arguments.batch,
        "of_the_same_device_without": round(rates["auto"] / rates["without"], 3),
        "of_a_device_for_all": round(rates["auto"] / rates["all fit"], 3),
        "runs": runs,
    }


def _workloads(arguments: argparse.Namespace, vocab_size: int) -> list[tuple[Workload, int]]:
    """(workload, how many of its sequences fit)."""
    if arguments.workload:
        workload = NAMED[arguments.workload](vocab_size)
        return [(workload, arguments.batch or len(workload.items) // 2)]
    chosen = []
    for length in arguments.lengths:
        batch = max(arguments.token_stages, min(arguments.batch, arguments.max_tokens // length))
        chosen.append((_fixed(length, arguments.tokens, 2 * batch, vocab_size), batch))
    return chosen


def _fixed(length: int, num_output: int, num_requests: int, vocab_size: int) -> Workload:
    """Sequences that end at `length` tokens."""
    num_prompt = max(1, length - num_output)
    span = vocab_size - FIRST_PLAIN_ID
    items = [
        WorkItem(0.0, tuple(FIRST_PLAIN_ID + (7919 * i + 31 * t) % span for t in range(num_prompt)), num_output)
        for i in range(num_requests)
    ]
    return Workload(f"{length} tokens", tuple(items))


def _longest_wait_s(traces: list[Trace]) -> float:
    """For a first token, or for the next."""
    return max(max([trace.ttft_s or math.inf, *trace.gaps_s]) for trace in traces)


def _line(run: dict[str, Any]) -> str:
    names = ("output_tokens_per_s", "gap_p50_ms", "longest_wait_s", "device_peak_blocks", "num_failed")
    decision = (run["swap"] or {}).get("decision", "")
    return " ".join(f"{name}={run[name]}" for name in names) + (f" ({decision} at the end)" if decision else "")


def _failures(document: dict[str, Any]) -> int:
    runs = [run for setting in document["settings"] for of in setting["runs"].values() for run in of]
    runs += document.get("admitted", {}).get("runs", {}).values()
    peaks = [setting["device_peak"] for setting in document["settings"]]
    num_failed: int = sum(run["num_failed"] for run in runs) + sum(p["blocks"] > p["allowed"] for p in peaks)
    return num_failed


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("swap", __doc__)
    add_json(parser)
    add_model(parser)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the stages compute")
    stages = "of the pipeline; at 2 and less there is nothing to gain"
    parser.add_argument("--token-stages", type=int, default=4, metavar="N", help=stages)
    lengths = "of sequences, prompt and output, in tokens; one setting each"
    parser.add_argument("--lengths", type=_lengths, default="256,512,1024,2048,4096", metavar="L,L,...", help=lengths)
    tokens = "generated by each sequence, up to its length"
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help=tokens)
    parser.add_argument("--workload", choices=list(NAMED), help="these lengths instead of --lengths")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="sequences that the device holds")
    most = "long sequences: the device holds fewer than --batch, so many tokens"
    parser.add_argument("--max-tokens", type=int, default=16384, metavar="N", help=most)
    parser.add_argument("--admitted", type=int, default=0, metavar="K", help="at last, K times what the device holds")
    parser.add_argument("--cache-stores", type=int, default=0, metavar="S", help="stores that keep copies of all KV")
    add_runs(parser, 1, "times that each mode of a setting is measured")
    return parser


def _lengths(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
