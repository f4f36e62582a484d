#!/usr/bin/env bash
# Set up as run.sh does, then lint and test all of the recipe. Arguments go to pytest.
#
#   bash tests/run.sh
#   bash tests/run.sh -k install
#   SPEECH_DIR=/path/to/recordings bash tests/run.sh     # the tests on real recordings too
set -euo pipefail
cd "$(dirname "$0")/.."
trap 'echo "tests/run.sh: exit status $?, $SECONDS s"' EXIT
export EXTRA=test   # pytest, ruff and shellcheck are needed as well
bash tools/install.sh
. ./path.sh

ruff check .
find . \( -name .venv -o -name data -o -name exp -o -name pretrained_models \) -prune -o \
  \( -name '*.sh' -o -path './.ci/run' \) -type f -exec shellcheck -x {} +
echo "tests/run.sh: ruff and shellcheck find nothing"
cores=$(nproc)
export OMP_NUM_THREADS=1   # side by side instead: threads that spin for each other's cores cost ten times as much
python -m pytest --numprocesses "$((cores < 4 ? cores : 4))" --dist loadfile "$@"
