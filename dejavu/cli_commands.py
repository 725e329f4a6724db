"""What the `dejavu` command does."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import aclosing

from dejavu import __version__
from dejavu.cli_status import render_status
from dejavu.client import AsyncClient
from dejavu.errors import DejavuError
from dejavu.params import SamplingParams

EXIT_FAILED = 1

EXAMPLES = """\
examples:
  dejavu serve --model models/tiny            start a system (in a checkout)
  dejavu generate "Once upon a time"          stream a completion
  dejavu generate "2 + 2 =" --temperature 0 --max-tokens 8
  dejavu status                               who runs, where, with how much memory
  dejavu status --json | jq .counters
  dejavu drain token-0-stage-0                replace a running process, keep its streams
  dejavu convert prompt-1 token               have a prompt pipeline generate tokens from now on

The system is found through --endpoint, DEJAVU_ENDPOINT, the state directory of a running `dejavu serve`
(DEJAVU_STATE_DIR), or at tcp://127.0.0.1:5555, in this order.
"""


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code: 0 done, 1 failed. Wrong usage raises `SystemExit`."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a terminal that cannot show a character shows another
        sys.stdout.reconfigure(errors="replace")
    try:
        return asyncio.run(COMMANDS[options.command](options))
    except DejavuError as error:
        print(f"dejavu: error: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader of stdout has left
        _forget_stdout()
    except _StdoutFull as error:
        print(f"dejavu: error: stdout: {error}", file=sys.stderr)
        _forget_stdout()
    return EXIT_FAILED


class _StdoutFull(Exception):
    """What is to be shown cannot be written; the text says why."""


def _show(text: str, end: str = "\n") -> None:
    """Raises `BrokenPipeError`, `_StdoutFull`."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _StdoutFull(error.strerror) from error


def _forget_stdout() -> None:
    """Keeps the interpreter from complaining about it once more on exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dejavu",
        description="Serve large language models with streamed KV cache, and use them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dejavu {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_generate(commands)
    status = commands.add_parser("status", help="show what runs where", description="Shows what runs where.")
    status.add_argument("--json", action="store_true", help="the whole status document, as JSON")
    _add_endpoint(status)
    _add_drain(commands)
    _add_convert(commands)
    commands.add_parser("serve", help="start a system (`dejavu serve --help` lists its options)", add_help=False)
    return parser


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "generate",
        help="stream a completion to stdout",
        description="Streams a completion of TEXT to stdout as it is generated. Ctrl-C cancels it.",
        epilog='example: dejavu generate "Once upon a time" --temperature 0.7 --stop "The end"',
    )
    defaults = SamplingParams(max_tokens=64)
    parser.add_argument("text", metavar="TEXT", help="the prompt")
    parser.add_argument("--max-tokens", type=int, metavar="N", help=f"at most N tokens ({defaults.max_tokens})")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (1.0)")
    parser.add_argument("--top-p", type=float, metavar="P", help="only the likeliest tokens with mass P (1.0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens (0: all)")
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="P", help="above 1: fewer repetitions (the model's own)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="makes sampling repeatable (default: random)")
    parser.add_argument("--stop", action="append", metavar="S", help="end before this string; may be repeated")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the model's end of text")
    parser.set_defaults(max_tokens=defaults.max_tokens, temperature=defaults.temperature, stop=[])
    parser.set_defaults(top_p=defaults.top_p, top_k=defaults.top_k)
    _add_endpoint(parser)


def _add_drain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "drain",
        help="have others take over from a service, and end it",
        description="Moves the live work of a service to a standby or a peer, without a failed request, and ends the "
        "process. What keeps it alive (`dejavu serve`) starts a fresh one, which then stands by.",
        epilog="example: dejavu drain token-0-stage-0",
    )
    parser.add_argument("name", metavar="NAME", help="as `dejavu status` shows it")
    _add_endpoint(parser)


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn a prompt pipeline into a token pipeline, or back",
        description="Moves the live work of a pipeline to the others of its kind, without a failed request, and has "
        "its processes work in the other role, under another name. The weights stay where they are.",
        epilog="example: dejavu convert prompt-1 token",
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="as `dejavu status` shows it, e.g. prompt-1")
    parser.add_argument("role", choices=["prompt", "token"], help="what it is to be")
    _add_endpoint(parser)


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", metavar="E", help="router(s), comma separated (tcp://HOST:PORT)")


async def _generate(options: argparse.Namespace) -> int:
    names = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop", "ignore_eos")
    params = SamplingParams.from_mapping({name: getattr(options, name) for name in names})
    async with (
        AsyncClient(options.endpoint) as client,
        aclosing(client.stream(options.text, params)) as tokens,
    ):
        async for token in tokens:
            _show(token.text, end="")
    _show("")
    return 0


async def _drain(options: argparse.Namespace) -> int:
    async with AsyncClient(options.endpoint) as client:
        await client.drain(options.name)
    _show(f"{options.name} is drained")
    return 0


async def _convert(options: argparse.Namespace) -> int:
    async with AsyncClient(options.endpoint) as client:
        name = await client.convert(options.pipeline, options.role)
    _show(f"{options.pipeline} is now {name}")
    return 0


async def _status(options: argparse.Namespace) -> int:
    async with AsyncClient(options.endpoint) as client:
        status = await client.status()
    _show(json.dumps(status) if options.json else render_status(status))
    return 0


COMMANDS = {"generate": _generate, "status": _status, "drain": _drain, "convert": _convert}
