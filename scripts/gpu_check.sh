#!/usr/bin/env bash
# Builds on a machine with a GPU, runs all GPU tests (the small ones under compute-sanitizer too), the
# demo with two stage processes on one GPU, and the benchmarks; prints a table last. Everything goes
# into one folder. Needs no network: what the machine lacks comes from build/gpu-bring, which
# scripts/gpu_bring.sh collects elsewhere.
#
#   scripts/gpu_check.sh [STEP...]   steps: machine build cpp tests demo bench sanitizer (all)
#   OUT      folder for logs and figures, eight files at most (default: build/gpu_check)
#   SECONDS_LEFT  for all of it together (default: 540)
#   FULL     1: whole benchmarks, FlashInfer too, which compiles for minutes; better alone
#
# Fails unless every step has done what it is for: one that was cut short, had no time left or whose
# tests were all skipped has not. What the machine has no tool for is "missing", and no failure.
# Where compiling takes most of the time, "machine build cpp tests" and "demo bench sanitizer" fit
# into two calls: what is built stays.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-build/gpu_check}
budget=${SECONDS_LEFT:-540}
bring=build/gpu-bring
site=$PWD/build/gpu-site
build=build/gpu
python=${PYTHON:-python3}
full=${FULL:-}
steps=("$@")
((${#steps[@]})) || steps=(machine build cpp tests demo bench sanitizer)
for step in "${steps[@]}"; do
  case $step in
    machine | build | cpp | tests | demo | bench | sanitizer) ;;
    *)
      printf 'no such step: %s; expected machine, build, cpp, tests, demo, bench or sanitizer\n' \
        "$step" >&2
      exit 2
      ;;
  esac
done
mkdir -p "$out" build
summary=$out/summary.txt
logs=$out/logs.txt
: >"$summary"
: >"$logs"
failures=0

left() { echo $((budget - SECONDS)); }

note() { # NAME WORD SECONDS TEXT
  printf '%-28s %-10s %4d s  %s\n' "$1" "$2" "$3" "$4" | tee -a "$summary"
}

# run NAME MOST COMMAND...: at most MOST seconds, or what is left; its output is added to logs.txt.
# proof: what the output must match besides, since tests that are all skipped succeed as well.
run() {
  local name=$1 most=$2 begin=$SECONDS status=0 word=ok limit before
  shift 2
  limit=$(left)
  ((limit < most)) || limit=$most
  if ((limit < 5)); then
    failures=$((failures + 1))
    note "$name" "no time" 0 ""
    return 1
  fi
  printf '\n===== %s =====\n' "$name" >>"$logs"
  before=$(wc -c <"$logs")
  timeout -k 5 "$limit" "$@" >>"$logs" 2>&1 </dev/null || status=$?
  output() { tail -c +$((before + 1)) "$logs"; }
  if ((status == 124 || (status == 137 && SECONDS - begin >= limit))); then
    word="too long"
  elif ((status != 0)); then
    word="failed:$status"
  elif [[ -n ${proof:-} ]] && ! output | grep -Eq -- "$proof"; then
    word="none ran"
    status=1
  fi
  ((status == 0)) || failures=$((failures + 1))
  note "$name" "$word" $((SECONDS - begin)) \
    "$(output | grep -v '^[[:space:]]*$' | tail -n 1 | cut -c1-100)"
  return "$status"
}

wanted() { [[ " ${steps[*]} " == *" $1 "* ]]; }

machine() {
  local status=0
  date -u
  nvidia-smi || status=1
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm --format=csv
  nvcc --version
  "$python" -c 'import torch; print("torch", torch.__version__, torch.cuda.nccl.version())'
  git log -1 --format='commit %H %cI' 2>/dev/null || true
  return "$status"
}

# Beside the Python that is there, not in an environment of its own: that Python may be one of a
# virtual environment itself, whose packages another one made from it does not see.
prepare_python() {
  set -e
  mkdir -p "$site"
  local wheels=("$bring"/wheels/*.whl) wheel
  [[ -f ${wheels[0]} ]] || return 0
  if "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile \
      --upgrade --target "$site" "${wheels[@]}"
  else
    for wheel in "${wheels[@]}"; do "$python" -m zipfile -e "$wheel" "$site"; done
  fi
}

prepare() {
  set -e
  prepare_python
  local options=() targets=(_core) arch pybind interpreter
  # What needs no GPU (the emulated attention kernels) is not built.
  if [[ -d $bring/googletest ]]; then
    options+=("-DPIPELIVE_GTEST_SOURCE=$PWD/$bring/googletest")
  fi
  if [[ -d $bring/googletest || -f /usr/include/gtest/gtest.h ]]; then
    options+=(-DPIPELIVE_BUILD_TESTS=ON)
    targets+=(cuda_tests cuda_transport_tests cuda_slots_tests cuda_image_tests)
  else
    options+=(-DPIPELIVE_BUILD_TESTS=OFF)
  fi
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
  pybind=$(py -m pybind11 --cmakedir)
  interpreter=$(py -c 'import sys; print(sys.executable)')
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPIPELIVE_INPLACE=ON \
    -DPIPELIVE_CUDA=ON "-DPIPELIVE_CUDA_ARCHS=${arch:-90}" "-DPython_EXECUTABLE=$interpreter" \
    "-Dpybind11_DIR=$pybind" "${options[@]}"
  cmake --build "$build" -j "$(nproc)" --target "${targets[@]}"
}

py() { PYTHONPATH="$site:$PWD/src:$PWD/benchmarks" "$python" "$@"; }

# Only where GPU tests are: what all of the other tests import need not be there.
gpu_pytest() {
  local files
  mapfile -t files < <(grep -rlE --include='*.py' 'mark\.gpu' tests | sed 's|/conftest\.py$||')
  "${checker[@]}" env PYTHONPATH="$site:$PWD/src:$PWD/benchmarks" "$python" -m pytest -q \
    -p no:cacheprovider --hypothesis-profile=ci "$@" "${files[@]}"
}

gpu_tests() {
  local checker=()
  gpu_pytest -m gpu --maxfail=20 --timeout=120
}

sanitized() { # TOOL
  # A message of the sanitizer is an error of the run, whatever the tests say. Calls that fail are
  # none: torch and the engine ask the driver for things that it may refuse.
  local checker=(compute-sanitizer --tool "$1" --error-exitcode 9 --report-api-errors no
    --target-processes all)
  gpu_pytest -m 'gpu and small' --timeout=140
}

# The shape of SmolLM2-135M with random weights: the real one is too large to bring along.
demo() {
  py -c '
from pipelive_kv.models.tiny import tiny_model
tiny_model("llama", "build/gpu-model", vocab_size=49152, hidden_size=576, intermediate_size=1536,
           num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
           max_position_embeddings=8192, tie_word_embeddings=True, initializer_range=0.05)' &&
    py -m pipelive_kv.cli demo --device cuda --model build/gpu-model/llama --out build/gpu-demo
}

export -f machine prepare_python prepare py gpu_pytest gpu_tests sanitized demo
export python bring site build

finish() {
  local last=passed
  ((failures == 0)) || last="NOT passed: $failures of the steps"
  printf '%s, %d s\n' "$last" "$SECONDS" >>"$summary"
  printf '\n'
  cat "$summary"
  exit $((failures > 0))
}

if wanted machine; then run machine 20 bash -c machine; fi
if wanted build && ! run build 300 bash -c prepare; then
  tail -n 40 "$logs"
  finish
fi
if wanted cpp; then
  if grep -qs '^PIPELIVE_BUILD_TESTS:BOOL=ON' "$build/CMakeCache.txt"; then
    # The names end in the device: "cuda_fake" needs no GPU.
    proof='/cuda [. ]*Passed' run cpp 60 ctest --test-dir "$build" -j "$(nproc)" \
      --no-tests=error --output-on-failure -R 'Cuda|cuda|Gpu'
  else
    note cpp missing 0 "built without GoogleTest"
  fi
fi
if wanted tests; then proof='[0-9]+ passed' run tests 150 bash -c gpu_tests; fi
if wanted demo; then
  rm -rf build/gpu-demo
  run demo 60 bash -c demo
  for file in report.json timeline.png; do
    [[ ! -f build/gpu-demo/$file ]] || cp "build/gpu-demo/$file" "$out/demo-$file"
  done
fi
if wanted bench; then
  for file in benchmarks/gpu/*_bench.py; do
    name=$(basename "$file" .py)
    how=(--quick)
    [[ $name != attention_bench ]] || how+=(--flashinfer off)
    most=60
    if [[ -n $full ]]; then
      how=()
      most=240
    fi
    run "$name" "$most" bash -c 'py "$@"' bash "$file" "${how[@]}" --out "$out/$name.json"
  done
fi
if wanted sanitizer; then
  # Where the toolkit is not on the path it may still be in its usual place.
  PATH=$PATH:/usr/local/cuda/bin
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      proof='[0-9]+ passed' run "sanitizer-$tool" 150 bash -c "sanitized $tool"
    done
  else
    note sanitizer missing 0 "no compute-sanitizer"
  fi
fi
finish
