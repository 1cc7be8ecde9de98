#!/usr/bin/env bash
# Run the tests: bash tests/run.sh [--long] [pytest arguments]. --long: and then tests/chaos.py, three minutes more.
# It makes .venv if that is needed (env.sh).
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
source "$root/tests/env.sh"
cd "$root"
long=""
if [ "${1:-}" = --long ]; then long=1; shift; fi
two="$("$PYTHON" -c "import xdist; print('-n 2')" 2>/dev/null || true)"         # processes, of one thread each
"$PYTHON" -m pytest -q $two tests "$@"
if [ "$long" ]; then "$PYTHON" tests/chaos.py; fi
