#!/usr/bin/env bash
# Makes .venv with everything the project needs; does nothing where it is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.dejavu-stamp
wanted=$(cat pyproject.toml deploy/setup.sh | sha256sum | cut -d' ' -f1)
if [[ -x .venv/bin/dejavu && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  exit 0
fi

say() { printf '== %s\n' "$*" >&2; }

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.12 python3.11 python3.13 python3; do
    if command -v "$candidate" >/dev/null && fits "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  say "Python 3.11, 3.12 or 3.13 is needed. On Debian or Ubuntu: apt install python3 python3-venv"
  return 1
}

# Python without ensurepip (Debian's python3 without python3-venv): pip from elsewhere
add_pip() {
  if python3 -m pip --version >/dev/null 2>&1; then
    python3 -m pip --python .venv/bin/python install --quiet pip && return
  fi
  local folder wheel
  folder=$(mktemp -d)
  if (cd "$folder" && apt-get download python3-pip-whl >/dev/null 2>&1 && dpkg -x python3-pip-whl_*.deb .); then
    wheel=$(echo "$folder"/usr/share/python-wheels/pip-*.whl)
    PYTHONPATH=$wheel .venv/bin/python -m pip install --quiet pip && rm -r "$folder" && return
  fi
  rm -rf "$folder"
  say "No pip could be found for $python. Install python3-venv (apt install python3-venv) and try again."
  return 1
}

python=$(find_python)
say "Setting up .venv with $("$python" --version) (once; takes a minute or two)"
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  rm -rf .venv
  if ! "$python" -m venv .venv >/dev/null 2>&1; then
    rm -rf .venv
    "$python" -m venv --without-pip .venv
    add_pip
  fi
fi
pip=(.venv/bin/python -m pip install --disable-pip-version-check --progress-bar off)
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  say "1/2 torch (the largest part)"
  "${pip[@]}" --quiet torch==2.13.0 || "${pip[@]}" --quiet 'torch>=2.11,<2.14'
fi
say "2/2 everything else"
"${pip[@]}" --quiet -e '.[server,loadtest,test]'
echo "$wanted" >"$stamp"
say "Ready: .venv/bin/dejavu --help"
