# Sourced by the project's commands: sets $PYTHON, and makes .venv when no Python here has what is needed.
# An active environment that has everything is used as it is; nothing is then installed or downloaded.
needs="import matplotlib, numpy, pytest, tqdm, torch.optim, transformers
from packaging.version import parse
assert hasattr(torch.optim, 'Muon') and parse(transformers.__version__) >= parse('5.17')"
if [ -x .venv/bin/python ] && cmp -s requirements.txt .venv/installed.txt; then
    PYTHON=.venv/bin/python
elif python3 -c "$needs" 2>/dev/null; then
    PYTHON=python3
else
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "needs Python 3.10 or newer" >&2; exit 1; }
    echo "making .venv with the packages of requirements.txt; this takes a few minutes" >&2
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
    PYTHON=.venv/bin/python
fi
