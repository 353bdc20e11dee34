#!/usr/bin/env bash
# Collects in build/gpu-bring what scripts/gpu_check.sh needs on a machine with a GPU and no network:
# wheels for its Python, GoogleTest's sources and the commit's name. Run it where there is a network
# (and libgtest-dev), after committing what is to be measured.
#
#   GPU_PYTHON  the version there (default: 3.12)
#   FULL        1: FlashInfer too, which only the whole benchmarks are compared with
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
# What huggingface_hub, and so transformers, imports: without one of them there is no demo.
fetch -c scripts/constraints.txt hf-xet httpx2 httpcore2 truststore anyio idna certifi h11 typer \
  click shellingham annotated-doc typing_extensions
# Kernels to be compared with.
if [[ -n ${FULL:-} ]]; then
  fetch flashinfer-python==0.6.0
  for extra in apache-tvm-ffi tabulate einops; do
    fetch "$extra" || echo "not collected: $extra" >&2
  done
fi

for root in /usr/src/googletest "${GTEST_SOURCE:-}"; do
  if [[ -n $root && -f $root/CMakeLists.txt ]]; then
    cp -rL "$root" "$out/googletest"
    break
  fi
done
[[ -d $out/googletest ]] || echo "not collected: GoogleTest's sources (libgtest-dev)" >&2
# The history may stay behind.
changed=$(git status --porcelain --untracked-files=no 2>/dev/null || true)
echo "$(git log -1 --format='%H %cI' 2>/dev/null || echo unknown)${changed:+ with changes}" >"$out/COMMIT"
du -sh "$out" | sed 's/^/collected: /'
