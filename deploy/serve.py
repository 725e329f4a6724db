"""`dejavu serve`: starts a whole system on this machine and keeps it alive until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from common.etcd.client import EtcdClient
from common.model.spec import ModelSpec, load_spec
from common.service import DRAIN_SIGNAL
from common.text import TextCodec
from dejavu import AsyncClient
from dejavu.endpoints import ENDPOINTS_FILE
from dejavu.errors import ConfigurationError, DejavuError
from dejavu.keys import make_keys
from deploy.children import DirectSpawner, Nursery, Spawner
from deploy.etcd_keeper import keep_etcd
from deploy.etcd_server import EtcdServer
from deploy.layout import Place, ServiceCommand, plan_services
from deploy.obituary import Obituaries
from deploy.options import ROOT, ServeOptions, bind_error, check_memory, expand_path, parse_options
from deploy.ports import lasting_ports
from deploy.supervisor import STOP_LIMIT_S, ServiceGaveUp, Supervisor

logger = logging.getLogger("serve")

POLL_S = 0.1
PROGRESS_S = 2.0
DRAIN_LIMIT_S = 5.0
"""For live requests to finish, of the ten seconds in which everything ends."""
CONNECT_LIMIT_S = 0.5
SPINS = "10000"
"""So often a compute thread looks whether the others are done before it sleeps (GNU OpenMP). By default it looks for
milliseconds, and where services share the cores, it keeps those it waits for from running."""
STAGE_MODULES = ("services.prompt_stage.service", "services.token_stage.service")


def main(argv: Sequence[str]) -> int:
    """Runs until SIGINT or SIGTERM; returns the exit code: 0 after an orderly stop, 1 for what the user must mend."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s serve %(levelname)s %(message)s")
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        options = parse_options(argv)
        spec = load_spec(_resolve_model(options.model), options.dtype)
        # a layout that cannot be is refused before anything is started
        plan_services(options, spec, Place("", "", "cpu", (0,) * options.routers, (0,)))
        check_tokenizer(spec.model_dir)
        device = _resolve_device(options.device)
        check_memory(options, device)
        return asyncio.run(_serve(options, spec, device))
    except (DejavuError, ServiceGaveUp) as error:
        print(f"dejavu: error: {error}", file=sys.stderr)  # noqa: T201
        return 1


def check_tokenizer(model_dir: Path) -> None:
    """A model may lack one, which whoever starts it should know. Raises `ConfigurationError` for one that is broken."""
    if TextCodec.load(model_dir) is None:
        logger.warning(
            "%s has no tokenizer.json, nor vocab.json with merges.txt: only prompts of token ids can be served",
            model_dir,
        )


async def _serve(options: ServeOptions, spec: ModelSpec, device: str) -> int:
    ports = _router_ports(options)
    endpoints = [f"tcp://{options.host}:{port}" for port in ports]
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(endpoints_file(options.state_dir, endpoints))
        os.environ["DEJAVU_STATE_DIR"] = str(options.state_dir.resolve())  # where services find their keys
        # first what takes longest
        spawner = stack.enter_context(_spawner(options, spec, device))
        etcd_url = await stack.enter_async_context(_etcd_url(options))
        place = Place(etcd_url, f"c{secrets.token_hex(4)}", device, ports, tuple(sorted(os.sched_getaffinity(0))))
        commands = plan_services(options, spec, place)
        obituaries = await stack.enter_async_context(Obituaries(etcd_url, place.cluster))
        # everybody else is watched by the routers
        unblocked = ("router",) if options.may_kill else ()
        supervisor = Supervisor(commands, spawner, lambda ended: obituaries.report(ended.incarnation), unblocked)
        await _supervise(supervisor, endpoints, commands)
    return 0


async def _supervise(supervisor: Supervisor, endpoints: Sequence[str], commands: Sequence[ServiceCommand]) -> None:
    """Until a signal comes. Raises `ServiceGaveUp`."""
    running = asyncio.ensure_future(supervisor.run())
    stopping = _stop_on_signals(supervisor)
    announcing = asyncio.ensure_future(_announce(endpoints, commands))
    await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
    was_ready = announcing.done()
    announcing.cancel()
    if stopping.done():
        logger.info("stopping")
        asked_s = time.monotonic()
        if was_ready:
            await _drain(supervisor, endpoints)
        await supervisor.stop(STOP_LIMIT_S - (time.monotonic() - asked_s))
    await running


async def _drain(supervisor: Supervisor, endpoints: Sequence[str]) -> None:
    """Nothing new is let in; what is live gets a while to finish, unless a second signal comes."""
    supervisor.signal_role("router", DRAIN_SIGNAL)
    with contextlib.suppress(DejavuError, TimeoutError):
        async with asyncio.timeout(DRAIN_LIMIT_S), AsyncClient(endpoints, connect_timeout_s=1.0) as client:
            while (await client.status())["live"]["requests"] and not await supervisor.is_stopping_within(POLL_S):
                pass


def _stop_on_signals(supervisor: Supervisor) -> asyncio.Future[None]:
    """Done at the first SIGINT, SIGTERM or SIGHUP (the terminal is closed); a second one kills at once."""
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[None] = loop.create_future()

    def on_signal() -> None:
        if asked.done():
            supervisor.kill()
        else:
            asked.set_result(None)

    # nohup asks to be spared the end of the terminal
    hangup = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    for number in (signal.SIGINT, signal.SIGTERM, *hangup):
        loop.add_signal_handler(number, on_signal)
    return asked


async def _announce(endpoints: Sequence[str], commands: Sequence[ServiceCommand]) -> None:
    """Prints the one line on stdout when everything that was asked for is up."""
    started_s = time.monotonic()
    told_s = started_s
    while (missing := await _missing(endpoints[0], commands)) and missing:
        if time.monotonic() - told_s > PROGRESS_S:
            told_s = time.monotonic()
            logger.info("%.0f s: waiting for %s", told_s - started_s, ", ".join(missing))
        await asyncio.sleep(POLL_S)
    logger.info("everything is up after %.1f s", time.monotonic() - started_s)
    print(f"ready {','.join(endpoints)}", flush=True)  # noqa: T201


async def _missing(endpoint: str, commands: Sequence[ServiceCommand]) -> list[str]:
    """What is not up yet."""
    try:
        async with AsyncClient(endpoint, connect_timeout_s=1.0) as client:
            status = await client.status()
    except DejavuError:
        return ["a router"]
    present = {service["name"] for service in status["services"]}
    absent = [command.name for command in commands if command.name not in present]
    wanted = {command.name.rpartition("-stage-")[0] for command in commands if command.role.endswith("_stage")}
    ready = {pipeline["name"] for pipeline in status["pipelines"] if pipeline["ready"]}
    leader = [] if status["leader"] else ["a leading router"]
    return absent or leader + [f"pipeline {name}" for name in sorted(wanted - ready)]


def _router_ports(options: ServeOptions) -> tuple[int, ...]:
    """The first router takes --port, others any free one."""
    given = [options.port] if options.port else []
    try:
        return (*given, *lasting_ports(options.routers - len(given), options.host))
    except OSError as error:
        raise bind_error(options.host, options.port, error) from error


@contextlib.contextmanager
def endpoints_file(state_dir: Path, endpoints: Sequence[str]) -> Iterator[None]:
    """Tells clients on this machine where the routers are, and gives them and the services their keys."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_keys(state_dir)
        file = state_dir / ENDPOINTS_FILE
        file.touch(mode=0o600)
        earlier = file.read_text(errors="replace")
        ours = "".join(f"{endpoint}\n" for endpoint in endpoints)
        file.write_text(ours)
    except OSError as error:
        raise ConfigurationError(f"{state_dir}: {error.strerror}", field="state_dir") from error
    try:
        yield
    finally:
        # a system that was started later with the same directory has put its own there
        with contextlib.suppress(FileNotFoundError):
            if file.read_text() == ours:
                _hand_back(file, earlier)


def _hand_back(file: Path, earlier: str) -> None:
    """To a system that was started earlier with the same directory, if it is still there."""
    if any(map(_is_served, earlier.split())):
        file.write_text(earlier)
    else:
        file.unlink()


def _is_served(endpoint: str) -> bool:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_LIMIT_S).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


@contextlib.contextmanager
def _spawner(options: ServeOptions, spec: ModelSpec, device: str) -> Iterator[Spawner]:
    """A nursery where it helps; a process that uses CUDA must not come from a fork."""
    if not options.has_nursery or device == "cuda" or not hasattr(os, "pidfd_open"):
        yield DirectSpawner(ROOT)
        return
    nursery = Nursery(ROOT, [*STAGE_MODULES, f"transformers.models.{spec.architecture}.modeling_{spec.architecture}"])
    try:
        yield nursery
    finally:
        nursery.close()


@contextlib.asynccontextmanager
async def _etcd_url(options: ServeOptions) -> AsyncIterator[str]:
    """The given etcd, checked, or a private one with its data in a temporary directory, kept alive."""
    if options.etcd is not None:
        await _check_etcd(options.etcd)
        yield options.etcd
        return
    with tempfile.TemporaryDirectory(prefix="dejavu-etcd-") as folder, EtcdServer(Path(folder)) as etcd:
        keeping = asyncio.ensure_future(keep_etcd(etcd))
        try:
            yield etcd.url
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])


async def _check_etcd(url: str) -> None:
    async with EtcdClient(url) as client:
        await client.get("/dejavu")


def _resolve_model(name: str) -> Path:
    """A directory as it is; a Hub id is downloaded. Raises `ConfigurationError`."""
    folder = expand_path(name, "model")
    if os.path.exists(folder) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return folder
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "merges.txt"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # noqa: BLE001 - whatever the Hub's client raises means the same here
        raise ConfigurationError(
            f"{name} is no directory, and the Hub did not give it ({type(error).__name__}): no such model, or no net",
            field="model",
        ) from error


def _resolve_device(wanted: str) -> str:
    """Asks a process of its own, so that this one never loads torch. Raises `ConfigurationError`."""
    # containers may lack the one or the other
    may_be_there = any(Path(path).exists() for path in ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg"))
    if wanted == "cpu" or (wanted == "auto" and not may_be_there):
        return "cpu"
    probe = "import torch; print(torch.cuda.is_available())"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    if found.stdout.strip() == "True":
        return "cuda"
    if wanted == "cuda":
        raise ConfigurationError("torch finds no CUDA device here; use --device cpu", field="device")
    return "cpu"
