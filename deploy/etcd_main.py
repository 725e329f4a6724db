"""`python -m deploy.etcd_main --client-port N --data-dir DIR`: becomes the etcd that is on PATH or in a package."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from deploy.etcd_server import EtcdNotInstalled, etcd_command


def main() -> int:
    """Replaces this process by etcd."""
    parser = argparse.ArgumentParser("deploy.etcd_main", description=__doc__)
    parser.add_argument("--client-port", type=int, default=23790)
    parser.add_argument("--data-dir", type=Path, required=True)
    arguments = parser.parse_args()
    client, peer = (f"http://127.0.0.1:{arguments.client_port + offset}" for offset in (0, 1))
    try:
        command = etcd_command(arguments.data_dir, client, peer)
    except EtcdNotInstalled as error:
        print(f"dejavu: error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
