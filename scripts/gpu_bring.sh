#!/usr/bin/env bash
# Collects in build/gpu-bring what scripts/gpu_check.sh needs on a machine with a GPU and no network:
# wheels for its Python, and GoogleTest's sources. Run it where there is a network (and libgtest-dev).
#
#   GPU_PYTHON  the version there (default: 3.12)
set -euo pipefail
cd "$(dirname "$0")/.."

version=${GPU_PYTHON:-3.12}
out=build/gpu-bring
rm -rf "$out"
mkdir -p "$out/wheels"

fetch() { # what follows: arguments for pip download
  "${PYTHON:-python3}" -m pip download -q --disable-pip-version-check --no-deps \
    --dest "$out/wheels" --python-version "$version" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform any --only-binary=:all: "$@"
}

# The engine and its demo, without torch, numpy and what else is there already.
fetch -c scripts/constraints.txt pyzmq msgspec safetensors transformers tokenizers \
  huggingface_hub regex pyyaml tqdm filelock packaging fsspec rich markdown-it-py mdurl pygments \
  pytest-timeout
# transformers imports these only in parts; missing ones are no fault here.
for extra in hf-xet httpx2 httpcore2 anyio idna certifi h11 typer click shellingham typer-slim \
  annotated-doc; do
  fetch -c scripts/constraints.txt "$extra" 2>/dev/null || echo "not collected: $extra" >&2
done
# Kernels to be compared with.
fetch flashinfer-python==0.6.0 2>/dev/null || echo "not collected: flashinfer-python" >&2
for extra in apache-tvm-ffi tabulate einops; do
  fetch "$extra" 2>/dev/null || echo "not collected: $extra" >&2
done

for root in /usr/src/googletest "${GTEST_SOURCE:-}"; do
  if [[ -n $root && -f $root/CMakeLists.txt ]]; then
    cp -rL "$root" "$out/googletest"
    break
  fi
done
[[ -d $out/googletest ]] || echo "not collected: GoogleTest's sources (libgtest-dev)" >&2
du -sh "$out" | sed 's/^/collected: /'
