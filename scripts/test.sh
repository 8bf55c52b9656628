#!/usr/bin/env bash
# Makes an environment and runs the linter, the type checker and the tests. Needs Python 3.10-3.12 and nothing else.
#
#   scripts/test.sh                   everything
#   scripts/test.sh --quick           without tests that start a process, a server or a compiler: less than two minutes
#   scripts/test.sh -m "not slow"     what continuous integration runs
#   scripts/test.sh -m "not serving"  arguments go to pytest
#   scripts/test.sh -n 0              one test after the other, instead of one more at once than there are processors
#
# The tests on Azure's protocol need Azurite, which npm installs in a quarter of a minute and 190 MB, so it is left to you:
# npm install azurite, and AZURITE=<folder>/node_modules/.bin/azurite-blob.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

WORKERS=$(($(nproc) + 1)) # the tests of servers wait half of their time
if [ "${1:-}" = --quick ]; then
    shift
    WORKERS=$(nproc)
    set -- -m "not serving and not compile and not gpu and not processes and not services" "$@"
fi

"$VENV_PYTHON" -m ruff format --check .
"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m mypy --strict -p ts_handlers
exec "$VENV_PYTHON" -m pytest -n "$WORKERS" --dist loadgroup --no-loadscope-reorder "$@"
