"""The command line of `dejavu serve`, checked before anything is started."""

from __future__ import annotations

import argparse
import errno
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.kv.choice import LINK_NAMES
from dejavu.endpoints import DEFAULT_STATE_DIR
from dejavu.errors import ConfigurationError
from dejavu.params import is_durability

ROOT = Path(__file__).resolve().parents[1]
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
DEFAULT_KV_BYTES = 256 << 20
MAX_OF_A_KIND = 1024
"""Services of a kind: beyond that it is a slip, and to find out by starting them would take its time."""
MAX_THREADS = 1024
"""Of a stage: beyond that the machine may run out of them, for everybody."""
MAX_DIGITS = 18


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What to start. A split is the number of layers of each stage."""

    model: str
    prompt_pipelines: int
    prompt_stages: int
    token_pipelines: int
    token_stages: int
    routers: int
    standbys: int
    cache_stores: int
    replicas: int
    disk_memory_bytes: int
    recovery: str
    durability: str
    may_kill: bool
    device: str
    dtype: str
    kv_memory_bytes: int
    host_kv_memory_bytes: int
    swap: str
    block_size: int
    chunk_size: int
    host: str
    port: int
    etcd: str | None
    state_dir: Path
    is_colocated: bool
    prompt_split: tuple[int, ...] | None
    token_split: tuple[int, ...] | None
    link: str
    threads_per_stage: int | None
    pin: str
    has_nursery: bool

    @property
    def num_stage_processes(self) -> int:
        prompts = (
            0 if self.is_colocated else self.prompt_pipelines * len(self.prompt_split or range(self.prompt_stages))
        )
        return prompts + self.num_token_stage_processes

    @property
    def num_token_stage_processes(self) -> int:
        return self.token_pipelines * len(self.token_split or range(self.token_stages))

    @property
    def store_bytes(self) -> int:
        """Of each store: all token pipelines' KV, its copies shared out between the stores."""
        all_bytes = self.num_token_stage_processes * (self.host_kv_memory_bytes or self.kv_memory_bytes)
        return -(-all_bytes * min(self.replicas, self.cache_stores) // max(1, self.cache_stores))


def parse_options(argv: Sequence[str]) -> ServeOptions:
    """Parses and checks. argparse ends the process with 2 on a usage error; raises `ConfigurationError`."""
    arguments = _parser().parse_args(argv)
    options = ServeOptions(
        model=arguments.model,
        prompt_pipelines=arguments.prompt_pipelines,
        prompt_stages=arguments.prompt_stages,
        token_pipelines=arguments.token_pipelines,
        token_stages=arguments.token_stages,
        routers=arguments.routers,
        standbys=arguments.standbys,
        cache_stores=arguments.cache_stores,
        replicas=arguments.replicas,
        disk_memory_bytes=arguments.disk_memory,
        recovery=arguments.recovery,
        durability=arguments.durability,
        may_kill=not arguments.no_kill,
        device=arguments.device,
        dtype=arguments.dtype,
        kv_memory_bytes=arguments.kv_memory,
        host_kv_memory_bytes=_host_bytes(arguments),
        swap=arguments.swap,
        block_size=arguments.block_size,
        chunk_size=arguments.chunk_size,
        host=arguments.host,
        port=arguments.port,
        etcd=arguments.etcd,
        state_dir=expand_path(arguments.state_dir, "state_dir"),
        is_colocated=arguments.colocated,
        prompt_split=arguments.prompt_split,
        token_split=arguments.token_split,
        link=arguments.link,
        threads_per_stage=arguments.threads_per_stage,
        pin=arguments.pin,
        has_nursery=arguments.nursery,
    )
    _check_counts(options)
    check_address(options.host, options.port)
    return options


def _check_counts(options: ServeOptions) -> None:
    """Raises `ConfigurationError` for counts that contradict each other, or that no machine would bear."""
    for kind in ("prompt", "token"):
        stages, split = getattr(options, f"{kind}_stages"), getattr(options, f"{kind}_split")
        if split and stages not in (1, len(split)):
            raise ConfigurationError(f"there are {stages}, but the split names {len(split)}", field=f"{kind}_stages")
    if options.replicas > max(1, options.cache_stores):
        raise ConfigurationError(
            f"{options.replicas} copies need as many cache stores; there are {options.cache_stores}", field="replicas"
        )
    if (options.threads_per_stage or 0) > MAX_THREADS:
        raise ConfigurationError(f"a stage has at most {MAX_THREADS} of them", field="threads_per_stage")
    for name in ("routers", "cache_stores", "standbys", "prompt_pipelines", "token_pipelines"):
        if getattr(options, name) > MAX_OF_A_KIND:
            raise ConfigurationError(f"at most {MAX_OF_A_KIND} of them run on one machine", field=name)


def expand_path(text: str, field: str) -> Path:
    """With the home directory for `~`. Raises `ConfigurationError` where there is none."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigurationError(f"{text}: {error}", field=field) from error


def check_address(host: str, port: int) -> None:
    """Raises `ConfigurationError` where `host` is no address of this machine, or somebody listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, TypeError) as error:
            raise bind_error(host, port, error) from error


def bind_error(host: str, port: int, error: OSError | TypeError) -> ConfigurationError:
    """What is wrong where an address cannot be bound: the port, or the host."""
    if isinstance(error, TypeError):  # its letters cannot be those of a name
        return ConfigurationError(f"{host} is no name of a machine ({error})", field="host")
    if error.errno in (errno.EADDRINUSE, errno.EACCES):
        hint = "choose another --port, or 0 for a free one"
        return ConfigurationError(f"{host}:{port} cannot be used ({error.strerror}); {hint}", field="port")
    return ConfigurationError(f"{host} is no address of this machine ({error.strerror})", field="host")


def check_memory(options: ServeOptions, device: str) -> None:
    """Raises `ConfigurationError` where the KV pools of all stages would not fit this machine's memory, or where those
    that lie on a GPU have copies that would not. What a GPU has left, the stages find out."""
    each = options.num_token_stage_processes * options.host_kv_memory_bytes
    if device == "cpu":
        each += options.num_stage_processes * options.kv_memory_bytes
    wanted = (1 + options.standbys) * each
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted > there:
        raise ConfigurationError(
            f"the KV pools of {options.num_stage_processes} stages need {wanted} bytes, this machine has {there}",
            field="host_kv_memory" if options.host_kv_memory_bytes > options.kv_memory_bytes else "kv_memory",
        )
    copies = options.cache_stores * options.store_bytes
    if device == "cuda" and wanted + copies > there:
        raise ConfigurationError(
            f"copies of the stages' KV need {copies} bytes in the stores, this machine has {there}",
            field="cache_stores",
        )


class Help(argparse.RawDescriptionHelpFormatter):
    """What is described as it is written, and behind every option its default, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_none = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        return str(action.help) if has_none else f"{action.help} (default: %(default)s)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dejavu serve",
        description="Starts the whole system on this machine and prints one line when it is ready.",
        epilog="example: dejavu serve --model ./my-model --prompt-stages 2 --token-stages 2",
        formatter_class=Help,
    )
    _add_parts(parser.add_argument)
    _add_survival(parser.add_argument)
    _add_stages(parser.add_argument)
    _add_surroundings(parser.add_argument)
    return parser


def _add_parts(add: Callable[..., Any]) -> None:
    """Which model, and how many processes of which kind."""
    add(
        "--model",
        type=_text,
        default=str(ROOT / "models" / "tiny"),
        metavar="DIR_OR_HUB_ID",
        help="Hugging Face checkpoint",
    )
    for name, what in (
        ("prompt-pipelines", "prompt pipelines"),
        ("prompt-stages", "stages of each prompt pipeline"),
        ("token-pipelines", "token pipelines"),
        ("token-stages", "stages of each token pipeline"),
        ("routers", "routers; one leads, the others stand by"),
    ):
        add(f"--{name}", type=_count, default=1, metavar="N", help=what)
    add("--colocated", action="store_true", help="token pipelines compute prompts, too; no prompt pipelines")
    add("--prompt-split", type=_split, metavar="A,B", help="layers of each prompt stage (default: even)")
    add("--token-split", type=_split, metavar="A,B", help="layers of each token stage (default: even)")


def _add_survival(add: Callable[..., Any]) -> None:
    """What is kept ready for when something dies."""
    add(
        "--standbys",
        type=_number,
        default=0,
        metavar="K",
        help="warm spare processes of every stage, which take its place at once when it dies",
    )
    add("--cache-stores", type=_number, default=1, metavar="S", help="stores that keep copies of all KV (0: none)")
    add("--replicas", type=_count, default=1, metavar="R", help="stores that each sequence is copied to")
    add(
        "--disk-memory",
        type=_bytes,
        default=0,
        metavar="BYTES",
        help="room of each store in the state directory, where copies outlive everything and those that are not in use "
        "make way for others (0: none. All KV is written there several times: mind what the disk is good for)",
    )
    add(
        "--recovery",
        default="auto",
        choices=["auto", "restore", "replay"],
        help="after a failure: take KV from the stores, or compute everything again (replay)",
    )
    add(
        "--durability",
        type=_durability,
        default="async",
        metavar="async|lag:k|sync",
        help="what a store must have before a token is shown: nothing; all but k tokens' KV; everything",
    )
    add("--no-kill", action="store_true", help="never kill a silent service, only take its lease (to test fencing)")


def _add_stages(add: Callable[..., Any]) -> None:
    """How stages compute."""
    add("--device", default="auto", choices=["cpu", "cuda", "auto"], help="auto: cuda where there is one")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: the checkpoint's",
    )
    add(
        "--kv-memory",
        type=_bytes,
        default=DEFAULT_KV_BYTES,
        metavar="BYTES",
        help="KV pool of a stage, for example 64M or 2G",
    )
    add(
        "--host-kv-memory",
        type=_bytes,
        default=0,
        metavar="BYTES",
        help="host tier of a token stage: all sequences live there, --kv-memory holds those at work (0: none)",
    )
    add(
        "--swap",
        default="auto",
        choices=["auto", "on", "off"],
        help="with a host tier, rotate microbatches through the device: where it is faster, always, or never",
    )
    add("--block-size", type=_count, default=16, metavar="N", help="tokens of a KV block")
    add("--chunk-size", type=_count, default=256, metavar="N", help="tokens of a prefill step")
    add("--link", default="auto", choices=["auto", *LINK_NAMES], help="how KV travels between stages")
    add("--threads-per-stage", type=_count, metavar="N", help="compute threads (default: cores / stages)")
    add("--pin", default="auto", choices=["auto", "on", "off"], help="keep each stage on cores of its own")
    add(
        "--nursery",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fork stages from a process that has imported torch (never with cuda)",
    )


def _add_surroundings(add: Callable[..., Any]) -> None:
    """Where the system listens and keeps its things."""
    add("--host", type=_text, default="127.0.0.1", help="address to listen on")
    add("--port", type=_port, default=5555, help="where clients connect (0: any free port)")
    add("--etcd", metavar="URL", help="use this etcd instead of a private one")
    add(
        "--state-dir",
        type=_text,
        default=os.environ.get("DEJAVU_STATE_DIR") or DEFAULT_STATE_DIR,
        metavar="DIR",
        help="endpoints for clients on this machine",
    )


def _host_bytes(arguments: argparse.Namespace) -> int:
    """The host tier: what was asked for; by default all microbatches of a pipeline where they always rotate."""
    if arguments.swap == "off":
        return 0
    if arguments.swap == "on" and not arguments.host_kv_memory:
        return (len(arguments.token_split or ()) or int(arguments.token_stages)) * int(arguments.kv_memory)
    if 0 < arguments.host_kv_memory <= arguments.kv_memory:
        raise ConfigurationError(
            "the host tier is no larger than --kv-memory: nothing is gained", field="host_kv_memory"
        )
    return int(arguments.host_kv_memory)


def _durability(text: str) -> str:
    if not is_durability(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not async, lag:k or sync")
    return text


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def _is_number(text: str) -> bool:
    """Digits of other scripts are none of ours, and Python reads no more than some thousands."""
    return text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS


def _number(text: str) -> int:
    if not _is_number(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _count(text: str) -> int:
    if not _is_number(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _port(text: str) -> int:
    if not _is_number(text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to 65535")
    return int(text)


def _split(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _bytes(text: str) -> int:
    number, unit = text.rstrip("KMGkmg"), text[len(text.rstrip("KMGkmg")) :].upper()
    if not _is_number(number) or unit not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; examples: 1048576, 64M, 2G")
    return int(number) * UNITS[unit]
