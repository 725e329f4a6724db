#!/usr/bin/env bash
# Runs all tests, or what pytest's arguments choose. All of them run in two processes: those that start systems wait most
# of the time, for torch to be imported and for somebody to be missed, and the others compute meanwhile on one core.
set -euo pipefail
cd "$(dirname "$0")/.."

pytest=(.venv/bin/python -m pytest)
if (($#)); then
  exec "${pytest[@]}" "$@"
fi
output=$(mktemp)
"${pytest[@]}" --ignore=tests/cluster >"$output" 2>&1 &
others=$!
trap 'kill $others 2>/dev/null || true; rm -f "$output"' EXIT
systems_code=0 others_code=0
"${pytest[@]}" tests/cluster || systems_code=$?
wait $others || others_code=$?
cat "$output"
if ((systems_code)); then
  echo "tests/cluster: exit code $systems_code, see above" >&2
fi
exit $((systems_code ? systems_code : others_code))
