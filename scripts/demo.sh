#!/usr/bin/env bash
# Makes an environment, builds two example archives and shows them on a real TorchServe: cold start, restart, real
# predictions, and where the time went. Needs Python 3.10-3.12 and nothing else.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

"$VENV_PYTHON" scripts/build_archives.py --only minilm --only digits
exec "$VENV_PYTHON" scripts/demo.py "$@"
