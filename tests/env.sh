# The project's commands source this with $root set. It sets $PYTHON, and makes .venv if no Python here fits.
# An active environment that has everything is used as it is; then nothing is installed or downloaded.
needs="import matplotlib, numpy, pytest, tqdm, torch, torch.optim, transformers
from packaging.version import parse
assert hasattr(torch.optim, 'Muon') and parse(transformers.__version__) >= parse('5.17')
assert not torch.cuda.is_available() or parse(torch.__version__) >= parse('2.11')     # addmm with out_dtype"
if [ -x "$root/.venv/bin/python" ] && cmp -s "$root/requirements.txt" "$root/.venv/installed.txt"; then
    PYTHON="$root/.venv/bin/python"
elif python3 -c "$needs" 2>/dev/null; then
    PYTHON=python3
else
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "needs Python 3.10 or newer" >&2; exit 1; }
    echo "making .venv with the packages of requirements.txt; this takes a few minutes" >&2
    python3 -m venv "$root/.venv"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt"
    cp "$root/requirements.txt" "$root/.venv/installed.txt"
    PYTHON="$root/.venv/bin/python"
fi
