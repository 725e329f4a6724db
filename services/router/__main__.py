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
        "--no-kill",
        dest="may_kill",
        action="store_false",
        help="never kill a silent process of this machine, only end its lease",
    )
    options = RouterOptions(**vars(parser.parse_args(argv)))
    return run_service(options.name, lambda stop: RouterService.serve(options, stop))


if __name__ == "__main__":
    sys.exit(main())
