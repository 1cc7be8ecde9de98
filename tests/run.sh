#!/usr/bin/env bash
# The tests: bash tests/run.sh [pytest arguments]. Sets up .venv when it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/env.sh
exec "$PYTHON" -m pytest -q tests "$@"
