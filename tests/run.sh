#!/usr/bin/env bash
# The tests: bash tests/run.sh [pytest arguments]. Sets up .venv when it is missing.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
source "$root/tests/env.sh"
cd "$root"
exec "$PYTHON" -m pytest -q tests "$@"
