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

# Python without ensurepip (Debian's python3 without python3-venv): pip from elsewhere, the nearest source first
has_pip() { .venv/bin/python -m pip --version >/dev/null 2>&1; }

pip_from_system() { "$python" -m pip --python .venv/bin/python install --quiet pip; }

pip_from_uv() { uv pip install --quiet --python .venv/bin/python pip; }

pip_from_wheel() { PYTHONPATH=$1 .venv/bin/python -m pip install --quiet --no-index "$1"; }

pip_from_wheel_folder() { pip_from_wheel "$(echo "${WHEELS:-/usr/share/python-wheels}"/pip-*.whl)"; }

pip_from_debian() {
  (cd "$downloads" && apt-get download python3-pip-whl && dpkg -x python3-pip-whl_*.deb .) &&
    pip_from_wheel "$(echo "$downloads"/usr/share/python-wheels/pip-*.whl)"
}

pip_from_zipapp() {
  local url=https://bootstrap.pypa.io/pip/pip.pyz
  "$python" -c 'import sys, urllib.request as u; u.urlretrieve(*sys.argv[1:])' "$url" "$downloads/pip.pyz" &&
    "$python" "$downloads/pip.pyz" --python .venv/bin/python install --quiet pip
}

add_pip() {
  local source downloads
  downloads=$(mktemp -d)
  for source in pip_from_system pip_from_uv pip_from_wheel_folder pip_from_debian pip_from_zipapp; do
    if "$source" >"$downloads/log" 2>&1 && has_pip; then
      rm -r "$downloads"
      say "This Python has no ensurepip; $source helped"
      return
    fi
  done
  rm -r "$downloads"
  say "No pip could be found for $python. Install python3-venv (apt install python3-venv) and try again."
  return 1
}

python=$(find_python)
say "Setting up .venv with $("$python" --version) (once; takes a minute or two)"
if ! has_pip; then
  rm -rf .venv
  if ! "$python" -m venv .venv >/dev/null 2>&1; then
    rm -rf .venv
    if ! "$python" -m venv --without-pip .venv && ! uv venv --quiet --python "$python" .venv; then
      say "$python cannot make a virtual environment. Install python3-venv (apt install python3-venv) and try again."
      exit 1
    fi
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
