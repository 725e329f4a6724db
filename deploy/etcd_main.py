"""`python -m deploy.etcd_main --client-port N --data-dir DIR`: becomes the etcd that is on PATH or in a package."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from deploy.etcd_server import EtcdNotInstalled, find_etcd


def main() -> int:
    """Replaces this process by etcd."""
    parser = argparse.ArgumentParser("deploy.etcd_main", description=__doc__)
    parser.add_argument("--client-port", type=int, default=23790)
    parser.add_argument("--data-dir", type=Path, required=True)
    arguments = parser.parse_args()
    client, peer = (f"http://127.0.0.1:{arguments.client_port + offset}" for offset in (0, 1))
    try:
        binary = find_etcd()
    except EtcdNotInstalled as error:
        print(f"dejavu: error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    options = [f"--data-dir={arguments.data_dir}", "--name=dejavu", "--log-level=error", "--logger=zap"]
    options += [f"--listen-client-urls={client}", f"--advertise-client-urls={client}"]
    options += [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"]
    os.execv(binary, [binary, *options, f"--initial-cluster=dejavu={peer}"])


if __name__ == "__main__":
    sys.exit(main())
