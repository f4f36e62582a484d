# shellcheck shell=bash
# Sourced from the root of the recipe, after tools/install.sh, by run.sh and tests/run.sh: the Python of the recipe comes
# first on PATH and finds cosyvoice_ft, and text is UTF-8 whatever the locale. Which cards are visible stays your choice.
if "${PYTHON:-python3}" tools/check_env.py ${EXTRA:+"$EXTRA"} >/dev/null 2>&1; then   # the active one, as install.sh found
  PATH=$(dirname "$(command -v "${PYTHON:-python3}")"):$PATH
else
  export VIRTUAL_ENV=$PWD/.venv
  PATH=$VIRTUAL_ENV/bin:$PATH
fi
export PATH PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUTF8=1
if locale -a 2>/dev/null | grep -qix 'C\.utf-\?8'; then export LC_ALL=C.UTF-8; fi
