"""What every service's process does: options, logging, signals, and one place where an unknown error ends it."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import uvloop

from common.etcd.errors import EtcdUnavailable
from common.fault_hooks import STUCK_LOOP, install_fault_hook, stall
from common.loop_monitor import run_measured
from common.membership import MemberRecord
from common.process import die_with_parent, own_machine, set_affinity
from dejavu.errors import DejavuError

logger = logging.getLogger(__name__)

FATAL_EXIT = 78
"""Exit code of a service that has said why it cannot run (EX_CONFIG); starting it again would not help."""
TRY_AGAIN_EXIT = 75
"""Exit code of one that has not found etcd (EX_TEMPFAIL): it may be back when the service is started again."""

DRAIN_SIGNAL = signal.SIGUSR1
"""Tells a router that the whole system is about to stop: it lets nothing new in."""


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """What the command line of any service says. Fields are called what the parser calls them."""

    name: str
    etcd: str
    cluster: str
    host: str
    model: str
    dtype: str


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """`ServiceOptions`."""
    parser.add_argument("--name", required=True, help="unique and stable name of this service")
    parser.add_argument("--etcd", required=True, metavar="URL", help="where etcd listens")
    parser.add_argument("--cluster", default="default", help="services of one cluster find each other")
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint directory")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")


def own_record(
    name: str, role: str, incarnation: str, endpoint: str, detail: Mapping[str, str | int | float]
) -> MemberRecord:
    """What this process tells the others about itself, if it belongs to no pipeline."""
    return MemberRecord(
        name=name,
        role=role,
        incarnation=incarnation,
        pid=os.getpid(),
        host=socket.gethostname(),
        endpoint=endpoint,
        pipeline=None,
        stage_index=None,
        num_stages=None,
        layers=None,
        state="active",
        detail=dict(detail),
        machine=own_machine(),
    )


def log_as(name: str) -> None:
    """From now on this process logs under `name`, to stderr, what DEJAVU_LOG_LEVEL asks for."""
    asked = os.environ.get("DEJAVU_LOG_LEVEL") or "INFO"
    level = logging.getLevelNamesMapping().get(asked.upper())
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if level is None else level,
        format=f"%(asctime)s {name} %(levelname)s %(message)s",
        force=True,
    )
    if level is None:
        logger.warning("DEJAVU_LOG_LEVEL: there is no level %r; INFO is used", asked)


def run_service(name: str, serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]], cores: str = "") -> int:
    """Runs `serve(stop)` on uvloop until it returns; `stop` is set by SIGTERM. The terminal's SIGINT is the
    parent's business. Returns the process's exit code."""
    log_as(name)
    die_with_parent()
    if cores:
        set_affinity([int(core) for core in cores.split(",")])
    # a compute thread that holds the interpreter lock gives it back sooner
    sys.setswitchinterval(0.001)

    # what was imported stays: a collection that visits it all would stop the loop for tens of milliseconds
    gc.collect()
    gc.freeze()

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        install_fault_hook(loop, STUCK_LOOP, stall)
        await serve(stop)

    try:
        run = run_measured if os.environ.get("DEJAVU_MEASURE_CALLBACKS") else uvloop.run
        run(main())
    except DejavuError as error:
        return _say_why(error)
    except BaseExceptionGroup as group:
        known, unknown = group.split(DejavuError)
        if known is None or unknown is not None:
            raise
        return _say_why(known.exceptions[0])
    return 0


def _say_why(error: Exception) -> int:
    """The exit code."""
    logger.error("%s", error)
    return TRY_AGAIN_EXIT if isinstance(error, EtcdUnavailable) else FATAL_EXIT
