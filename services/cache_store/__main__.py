"""`python -m services.cache_store`: keeps copies of the KV of live sequences, from which lost stages are rebuilt."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from common.service import add_common_options, run_service
from services.cache_store.service import CacheStore, StoreOptions


def main(argv: list[str] | None = None) -> int:
    """Runs a cache store until SIGTERM; returns the exit code."""
    parser = argparse.ArgumentParser("services.cache_store", description=__doc__)
    add_common_options(parser)
    size = functools.partial(parser.add_argument, type=int, metavar="BYTES")
    size("--kv-memory", dest="kv_memory_bytes", required=True, help="memory for copies")
    size("--disk-memory", dest="disk_memory_bytes", default=0, help="room on disk for copies, too")
    parser.add_argument("--disk-dir", type=Path, default=Path("."), metavar="DIR", help="where; nobody else's")
    parser.add_argument("--block-size", type=int, default=16, metavar="TOKENS")
    options = StoreOptions(**vars(parser.parse_args(argv)))
    return run_service(options.name, lambda stop: CacheStore.serve(options, stop))


if __name__ == "__main__":
    sys.exit(main())
