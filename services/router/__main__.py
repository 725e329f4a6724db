"""`python -m services.router`: admission, placement, the ledger, and the clients' endpoint."""

from __future__ import annotations

import argparse
import sys

from common.service import add_common_options, run_service
from services.router.service import RouterOptions, RouterService


def main(argv: list[str] | None = None) -> int:
    """Runs a router until SIGTERM; returns the exit code."""
    parser = argparse.ArgumentParser("services.router", description=__doc__)
    add_common_options(parser)
    parser.add_argument("--port", type=int, default=5555, help="where clients connect (0 = any free port)")
    parser.add_argument(
        "--no-kill", action="store_true", help="never kill a silent process of this machine, only end its lease"
    )
    arguments = parser.parse_args(argv)
    options = RouterOptions(
        name=arguments.name,
        etcd=arguments.etcd,
        cluster=arguments.cluster,
        host=arguments.host,
        port=arguments.port,
        model=arguments.model,
        dtype=arguments.dtype,
        may_kill=not arguments.no_kill,
    )
    return run_service(options.name, lambda stop: RouterService.serve(options, stop))


if __name__ == "__main__":
    sys.exit(main())
