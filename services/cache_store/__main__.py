"""`python -m services.cache_store`: keeps copies of the KV of live sequences, from which lost stages are rebuilt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.service import add_common_options, run_service
from services.cache_store.service import CacheStore, StoreOptions


def main(argv: list[str] | None = None) -> int:
    """Runs a cache store until SIGTERM; returns the exit code."""
    parser = argparse.ArgumentParser("services.cache_store", description=__doc__)
    add_common_options(parser)
    parser.add_argument("--kv-memory", type=int, required=True, metavar="BYTES", help="memory for copies")
    parser.add_argument("--block-size", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--disk-memory", type=int, default=0, metavar="BYTES", help="room on disk for copies, too")
    parser.add_argument("--disk-dir", type=Path, default=Path("."), metavar="DIR", help="where; nobody else's")
    arguments = parser.parse_args(argv)
    options = StoreOptions(
        name=arguments.name,
        etcd=arguments.etcd,
        cluster=arguments.cluster,
        host=arguments.host,
        model=arguments.model,
        dtype=arguments.dtype,
        kv_memory_bytes=arguments.kv_memory,
        block_size=arguments.block_size,
        disk_memory_bytes=arguments.disk_memory,
        disk_dir=arguments.disk_dir,
    )
    return run_service(options.name, lambda stop: CacheStore.serve(options, stop))


if __name__ == "__main__":
    sys.exit(main())
