#!/usr/bin/env bash
# Make the environment of the recipe: .venv with the packages pinned in requirements.txt, again only when these change.
#
#   bash tools/install.sh                         # an active environment that satisfies pyproject.toml is used as it is
#   PYTHON=python3.12 bash tools/install.sh       # make .venv with another Python (3.11 or later)
#   TORCH='torch==2.10.0 onnxruntime-gpu==1.26.0' bash tools/install.sh
#                                                 # other pins, for CUDA 12; remembered until TORCH= is said again
#
# PIP_* variables (index, cache, proxy) reach pip as they are. No root, compiler or ffmpeg is needed.
# Where nvidia-smi shows a card, onnxruntime-gpu takes the place of onnxruntime (they share one folder), and torch is never
# the CPU build that an index may have beside it. torch since 2.11 and onnxruntime-gpu since 1.27 are built with CUDA 13;
# the CUDA libraries that torch brings serve both once torch is imported. Tried without a card: both install, and of all
# libraries only the driver's libcuda is missing. Not tried: a card, and the pair for CUDA 12.
set -euo pipefail
cd "$(dirname "$0")/.."
die() { echo "install.sh: $*" >&2; exit 1; }
version() { "$1" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
python=${PYTHON:-python3}

# Your own environment. EXTRA names optional requirements of pyproject.toml that are needed as well (tests/run.sh: test).
modern=$("$python" -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null || true)
if [ "$modern" = True ]; then
  if said=$("$python" tools/check_env.py ${EXTRA:+"$EXTRA"}); then
    echo "environment: $said"
    exit
  fi
  [ -z "$said" ] || echo "environment: .venv, since $said"
fi

# What .venv holds: the pins, a card's builds of them, and those of TORCH. A .venv made for a card stays one where no card
# is seen, so that the login node and the compute nodes of a cluster can share it.
wanted=$(sed -E 's/[[:space:]]*#.*//; /^$/d' requirements.txt)
card=
if grep -qs '^onnxruntime-gpu' .venv/installed || [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then
  card=yes
  wanted=$(sed -E 's/^onnxruntime==/onnxruntime-gpu==/; s/^torch==/torch===/' <<<"$wanted")   # === does not match 2.13.0+cpu
fi
TORCH=${TORCH-$(cat .venv/torch 2>/dev/null || true)}
for pin in $TORCH; do
  name=${pin%%[=<>~]*}
  wanted=$(grep -vE "^${name%-gpu}(-gpu)?=" <<<"$wanted"; echo "$pin")
done

# Up to date: finished, for these pins, in this folder (scripts hold absolute paths), by the Python that .venv still is.
stamp() { printf '%s in %s\n%s\n' "$(version .venv/bin/python)" "$(pwd -P)" "$wanted"; }
ready() {
  [ "$(cat .venv/installed 2>/dev/null)" = "$(stamp)" ] || return 1
  [ -z "${PYTHON:-}" ] || [ "$(version "$python")" = "$(version .venv/bin/python)" ]
}
up_to_date() { echo "environment: .venv, $(version .venv/bin/python)${TORCH:+ with $TORCH}, is up to date"; exit; }
if ready; then up_to_date; fi

hint="set PYTHON to one that is: PYTHON=/path/to/python3.12 bash run.sh"
command -v "$python" >/dev/null || die "there is no $python; install Python 3.11 or later, or $hint"
[ "$modern" = True ] ||
  die "$python is $("$python" -V 2>&1 | head -n 1), not Python 3.11 or later; $hint"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  die "$python is without venv, not complete; install it (Debian, Ubuntu: the package python3-venv) or $hint"

# The lock goes with its file descriptor: it ends when this script and a pip it started have ended, however they end.
exec 9>.venv.lock
lock() { "$python" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX | $1)" 2>/dev/null; }
if ! lock fcntl.LOCK_NB; then
  echo "environment: waiting for another install.sh that is at work in this folder"
  lock 0 || die "$PWD/.venv.lock cannot be locked; use a folder on a local disk"
  if ready; then up_to_date; fi
fi

[ ! -e .venv ] || echo "environment: .venv is unfinished, of other requirements, or from elsewhere: making it again"
"$python" -m venv --clear .venv || die "$python cannot make .venv (see above); free space or fix permissions, and run again"
echo "$TORCH" >.venv/torch
pip() { .venv/bin/python -I -m pip --disable-pip-version-check "$@"; }

# Say what comes. The sizes were measured on x86-64 Linux with torch 2.13.0.
torch=$(grep -E '^torch=' <<<"$wanted")
if [[ $torch == *+cpu || $(uname) == Darwin ||
      ( $torch != *===* && $(pip index versions torch 2>/dev/null) == *" ${torch##*=}+cpu"* ) ]]; then
  build="torch for CPU" download=0.5 disk=2 need=3
else
  build="torch with its CUDA libraries" download=3.3 disk=6 need=10
fi
echo "environment: installing $(wc -l <<<"$wanted") packages into .venv${TORCH:+ with $TORCH}:" \
  "$build, $download GB to download, $disk GB on disk"
if [[ $build == *CUDA* && -z $card ]]; then
  echo "environment: no NVIDIA card is visible; 2.7 GB less with TORCH=$torch+cpu and" \
    "PIP_EXTRA_INDEX_URL=(PyTorch's index of CPU wheels)"
fi
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
if [[ -z $TORCH && ${driver%%.*} =~ ^[0-9]+$ && ${driver%%.*} -lt 580 ]]; then
  echo "environment: the NVIDIA driver $driver is older than 580, which CUDA 13 needs; update it, or start again with" \
    "TORCH='torch==2.10.0 onnxruntime-gpu==1.26.0' (CUDA 12)"
fi
free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1000000))
[ "$free" -ge "$need" ] || die "$free GB are free in $PWD, $need are needed (packages and download); free some, run again"

failed() {
  local full='No space left|Errno 28|quota exceeded'
  local away='from versions: none|ConnectionError|ProtocolError|[Tt]imed out|Max retries'
  if grep -qE "$full" .venv/pip.log; then
    die "the disk is full; free $need GB (or set TMPDIR and PIP_CACHE_DIR to a larger disk) and run again"
  elif grep -qE "$away" .venv/pip.log; then
    die "the package index cannot be reached; check the network, the proxy and PIP_INDEX_URL, and run again"
  fi
  die "pip failed for the reason above; mend that and run again"
}
quiet=-qq   # a terminal sees pip at work, a log only its errors
[ ! -t 1 ] || quiet=
install() { { pip install ${quiet:+"$quiet"} "$@" 2>&1 >&3 | tee -a .venv/pip.log >&2; } 3>&1 || failed; }
grep -v '^openai-whisper=' <<<"$wanted" >.venv/requirements.txt
DS_BUILD_OPS=0 install -r .venv/requirements.txt   # deepspeed compiles nothing
install --no-deps "$(grep '^openai-whisper=' <<<"$wanted")"   # without triton
stamp >.venv/installed
echo "environment: .venv is ready, $(du -sm .venv | cut -f 1) MB, $SECONDS s"
