#!/usr/bin/env bash
# Run the tests: bash tests/run.sh [pytest arguments]. It makes .venv if that is needed (env.sh).
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
source "$root/tests/env.sh"
cd "$root"
two="$("$PYTHON" -c "import xdist; print('-n 2')" 2>/dev/null || true)"         # processes, of one thread each
exec "$PYTHON" -m pytest -q $two tests "$@"
