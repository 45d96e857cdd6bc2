#!/usr/bin/env bash
# Set up .venv in the checkout and run every check: lint, format, all tests.
# Arguments go to pytest: `bash scripts/test.sh -m "not slow"`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
# Of this release the CPU build is enough; an open requirement can bring gigabytes of CUDA.
.venv/bin/python -m pip install --quiet torch==2.13.0
.venv/bin/python -m pip install --quiet --editable '.[test,tpu]'

.venv/bin/ruff check .
.venv/bin/ruff format --check .
# A file's tests stay together, for they share runs.
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
