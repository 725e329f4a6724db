#!/usr/bin/env bash
# Everything that needs a GPU; where there is none it says so and succeeds.
# A GPU machine often brings a Python of its own that has CUDA, torch and the rest, and no network to set up another:
# that one is taken if it is complete and sees the device, else .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

needed='import aiozmq, grpc, hypothesis, msgspec, psutil, pytest_asyncio, pytest_timeout, torch, transformers, uvloop, zmq'
sees_cuda='import sys, torch; sys.exit(not torch.cuda.is_available())'

python=${PYTHON:-python3}
if ! "$python" -c "$needed; $sees_cuda" 2>/dev/null; then
  deploy/setup.sh
  python=.venv/bin/python
fi
# not by exit code: a torch that cannot even be imported is no machine without a GPU
sees=$("$python" -c 'import torch; print(torch.cuda.is_available())')
if [[ $sees != True ]]; then
  echo "no CUDA device here: nothing to check"
  exit 0
fi
"$python" -c 'import torch; print(torch.cuda.get_device_name(0), "torch", torch.__version__)'
exec "$python" -m pytest -m gpu "$@"
