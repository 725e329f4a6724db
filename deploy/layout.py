"""Which processes a system consists of (pure): options and model in, command lines out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from common.model.kv_layout import fitting_layout
from common.model.spec import ModelSpec, split_layers
from dejavu.errors import ConfigurationError
from deploy.options import ServeOptions


@dataclass(frozen=True, slots=True)
class ServiceCommand:
    """One process: its stable name and how it is started."""

    name: str
    role: str
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a system runs. `router_ports` has one port per router."""

    etcd_url: str
    cluster: str
    device: str
    router_ports: tuple[int, ...]
    cores: tuple[int, ...]


def plan_services(options: ServeOptions, spec: ModelSpec, place: Place) -> list[ServiceCommand]:
    """All services, routers first. Raises `ConfigurationError` for a split that does not fit the model."""
    shared = ["--etcd", place.etcd_url, "--cluster", place.cluster, "--model", str(spec.model_dir)]
    shared += ["--dtype", options.dtype, "--host", options.host]
    services = []
    for index, port in enumerate(place.router_ports):
        name = f"router-{index}"
        kill = [] if options.may_kill else ["--no-kill"]
        services.append(_command(name, "router", [*shared, "--port", str(port), *kill]))
    for index in range(options.cache_stores):
        memory = ["--kv-memory", str(options.store_bytes), "--block-size", str(options.block_size)]
        name = f"cache-store-{index}"
        disk_dir = options.state_dir.resolve() / "kv" / name
        memory += ["--disk-memory", str(options.disk_memory_bytes), "--disk-dir", str(disk_dir)]
        services.append(_command(name, "cache_store", [*shared, *memory]))
    stages = _stages(options, spec)
    shares = _core_shares(options, place.cores, len(stages))
    threads = options.threads_per_stage or max(1, len(place.cores) // max(1, len(stages)))
    for (name, role, arguments), cores in zip(stages, shares, strict=True):
        own = ["--device", place.device, "--threads", str(threads), "--link", options.link]
        own += ["--kv-memory", str(options.kv_memory_bytes), "--block-size", str(options.block_size)]
        own += ["--chunk-size", str(options.chunk_size)]
        if cores:
            own += ["--cores", ",".join(map(str, cores))]
        services.append(_command(name, role, [*shared, *own, *arguments]))
        for index in range(options.standbys):
            services.append(_command(f"{name}-standby-{index}", role, [*shared, *own, *arguments, "--standby"]))
    return services


def _stages(options: ServeOptions, spec: ModelSpec) -> list[tuple[str, str, list[str]]]:
    """(name, role, arguments) of every stage."""
    kinds = [("token", options.token_pipelines, options.token_stages, options.token_split)]
    if not options.is_colocated:
        kinds.insert(0, ("prompt", options.prompt_pipelines, options.prompt_stages, options.prompt_split))
    stages = []
    for kind, num_pipelines, num_stages, split in kinds:
        try:
            ranges = split_layers(spec.num_layers, len(split) if split else num_stages, split)
        except ConfigurationError as error:
            raise ConfigurationError(error.message, field=f"{kind}_{error.field}") from None
        # refused before anything is started
        largest = max(last - first for first, last in ranges)
        fitting_layout(spec, (0, largest), options.block_size, options.kv_memory_bytes)
        for number in range(num_pipelines):
            pipeline = f"{kind}-{number}"
            for index, (first, last) in enumerate(ranges):
                arguments = ["--pipeline", pipeline, "--other-pipeline", _other_pipeline(options, kind, number)]
                arguments += ["--stage-index", str(index), "--num-stages", str(len(ranges))]
                arguments += ["--layers", f"{first}:{last}"] + ["--colocated"] * options.is_colocated
                arguments += ["--replicas", str(options.replicas), "--recovery", options.recovery]
                arguments += ["--durability", options.durability, "--swap", options.swap]
                arguments += ["--host-kv-memory", str(options.host_kv_memory_bytes)]
                stages.append((f"{pipeline}-stage-{index}", f"{kind}_stage", arguments))
    return stages


def _other_pipeline(options: ServeOptions, kind: str, number: int) -> str:
    """What a pipeline is called in the other role: a number that no other has. Colocated ones have one role only."""
    if options.is_colocated:
        return ""
    if kind == "prompt":
        return f"token-{options.token_pipelines + number}"
    return f"prompt-{options.prompt_pipelines + number}"


def _core_shares(options: ServeOptions, cores: Sequence[int], num_stages: int) -> list[Sequence[int]]:
    """Cores of each stage; empty where it may run anywhere."""
    fits = 1 < num_stages <= len(cores)
    if options.pin == "off" or (options.pin == "auto" and not fits):
        return [()] * num_stages
    if num_stages > len(cores):
        return [(cores[index % len(cores)],) for index in range(num_stages)]
    each = len(cores) // num_stages
    return [cores[index * each : (index + 1) * each] for index in range(num_stages)]


def _command(name: str, role: str, arguments: Sequence[str]) -> ServiceCommand:
    return ServiceCommand(name, role, (sys.executable, "-m", f"services.{role}", "--name", name, *arguments))
