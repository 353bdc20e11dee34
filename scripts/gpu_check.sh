#!/usr/bin/env bash
# Builds on a machine with a GPU, runs all GPU tests (the small ones under compute-sanitizer too), the
# demo with two stage processes on one GPU, and the benchmarks; prints a table last. Everything goes
# into one folder. Needs no network: what the machine lacks comes from build/gpu-bring, which
# scripts/gpu_bring.sh collects elsewhere.
#
#   scripts/gpu_check.sh [STEP...]   steps: machine build cpp tests sanitizer demo bench (all)
#   OUT      folder for logs and figures (default: build/gpu_check)
#   SECONDS_LEFT  for all of it together (default: 540)
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-build/gpu_check}
budget=${SECONDS_LEFT:-540}
bring=build/gpu-bring
venv=build/gpu-venv
build=build/gpu
python=${PYTHON:-python3}
steps=("$@")
((${#steps[@]})) || steps=(machine build cpp tests sanitizer demo bench)
mkdir -p "$out"
: >"$out/summary.txt"

left() { echo $((budget - SECONDS)); }

# run NAME MOST COMMAND...: at most MOST seconds, or what is left; its output goes to NAME.log.
run() {
  local name=$1 most=$2 begin=$SECONDS status=0
  shift 2
  local limit
  limit=$(left)
  ((limit < most)) || limit=$most
  if ((limit < 5)); then
    printf '%-28s %-8s\n' "$name" "no time" >>"$out/summary.txt"
    return 1
  fi
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null || status=$?
  local word=ok
  ((status == 0)) || word="failed:$status"
  ((status != 124)) || word="too long"
  printf '%-28s %-10s %4d s  %s\n' "$name" "$word" $((SECONDS - begin)) \
    "$(tail -n 1 "$out/$name.log" | cut -c1-100)" | tee -a "$out/summary.txt"
  return "$status"
}

wanted() { [[ " ${steps[*]} " == *" $1 "* ]]; }

machine() {
  date -u
  nvidia-smi
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm --format=csv
  nvcc --version
  "$python" -c 'import torch; print("torch", torch.__version__, torch.cuda.nccl.version())'
  git log -1 --format='commit %H %cI' 2>/dev/null || true
}

prepare() {
  set -e
  [[ -x $venv/bin/python ]] || "$python" -m venv --system-site-packages "$venv"
  if [[ -d $bring/wheels ]]; then
    "$venv/bin/python" -m pip install -q --no-index --no-deps --find-links "$bring/wheels" \
      "$bring"/wheels/*.whl
  fi
  local gtest=() arch
  [[ ! -d $bring/googletest ]] || gtest=("-DPIPELIVE_GTEST_SOURCE=$PWD/$bring/googletest")
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPIPELIVE_INPLACE=ON \
    -DPIPELIVE_BUILD_TESTS=ON -DPIPELIVE_CUDA=ON "-DPIPELIVE_CUDA_ARCHS=${arch:-90}" \
    "-DPython_EXECUTABLE=$PWD/$venv/bin/python" \
    "-Dpybind11_DIR=$("$venv/bin/python" -m pybind11 --cmakedir)" "${gtest[@]}"
  cmake --build "$build" -j "$(nproc)"
}

py() { PYTHONPATH=src:benchmarks "$venv/bin/python" "$@"; }
export -f machine prepare py
export python bring venv build out

wanted machine && run machine 30 bash -c machine
if wanted build; then
  run build 240 bash -c prepare || {
    tail -n 40 "$out/build.log"
    exit 1
  }
fi
if wanted cpp; then
  run cpp 60 ctest --test-dir "$build" -j "$(nproc)" --output-on-failure -R 'Cuda|cuda|Gpu'
fi
if wanted tests; then
  run tests 180 bash -c 'py -m pytest -q -m gpu -x --maxfail=20 --timeout=120 -p no:cacheprovider \
    --hypothesis-profile=ci tests'
fi
if wanted sanitizer; then
  # A message of the sanitizer is an error of the run, whatever the tests say.
  for tool in memcheck racecheck; do
    run "sanitizer-$tool" 90 bash -c "PYTHONPATH=src compute-sanitizer --tool $tool \
      --error-exitcode 9 --target-processes all $venv/bin/python -m pytest -q -m 'gpu and small' \
      --timeout=80 -p no:cacheprovider tests"
  done
fi
if wanted demo; then
  # The shape of SmolLM2-135M with random weights: the real one is too large to bring along.
  run demo 90 bash -c '
    py -c "
from pipelive_kv.models.tiny import tiny_model
tiny_model(\"llama\", \"build/gpu-model\", vocab_size=49152, hidden_size=576, intermediate_size=1536,
           num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
           max_position_embeddings=8192, tie_word_embeddings=True, initializer_range=0.05)" &&
    py -m pipelive_kv.cli demo --device cuda --model build/gpu-model/llama --out "$out/demo"'
fi
if wanted bench; then
  for file in benchmarks/gpu/*_bench.py; do
    name=$(basename "$file" .py)
    run "$name" 120 bash -c "py $file --out $out/$name.json"
  done
fi
printf '\n'
cat "$out/summary.txt"
! grep -q 'failed' "$out/summary.txt"
