#!/usr/bin/env bash
# Builds on a machine with a GPU, runs all GPU tests (the small ones under compute-sanitizer too), the
# demo with two stage processes on one GPU, and the benchmarks; prints a table last. Everything goes
# into one folder. Needs no network: what the machine lacks comes from build/gpu-bring, which
# scripts/gpu_bring.sh collects elsewhere.
#
#   scripts/gpu_check.sh [STEP...]   steps: machine build cpp tests demo bench sanitizer (all)
#   OUT      folder for logs and figures, eight files at most (default: build/gpu_check)
#   SECONDS_LEFT  for all of it together (default: 540)
#   FULL     1: the whole demo and benchmarks, FlashInfer too, which compiles for minutes; better alone
#
# Fails unless every step has done what it is for: one that was cut short, had no time left or whose
# tests were all skipped has not. What the machine has no tool for is "missing", and no failure.
# It fits into two calls, since what is built stays:
#
#   SECONDS_LEFT=430 scripts/gpu_check.sh machine build cpp tests demo
#   SECONDS_LEFT=300 OUT=build/gpu_check/later scripts/gpu_check.sh bench sanitizer
#
# A step that hangs is ended at a limit of its own, and sooner where the steps after it would not have
# the least that they need: so each of them has run for a while when the time is over.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-build/gpu_check}
budget=${SECONDS_LEFT:-540}
bring=build/gpu-bring
site=$PWD/build/gpu-site
build=build/gpu
python=${PYTHON:-python3}
full=${FULL:-}
all=(machine build cpp tests demo bench sanitizer)
declare -A least=([machine]=10 [build]=60 [cpp]=15 [tests]=60 [demo]=45 [bench]=60 [sanitizer]=60)
steps=("$@")
((${#steps[@]})) || steps=("${all[@]}")
for step in "${steps[@]}"; do
  if [[ -z ${least[$step]:-} ]]; then
    printf 'no such step: %s; expected one of: %s\n' "$step" "${all[*]}" >&2
    exit 2
  fi
done
mkdir -p "$out" build
summary=$out/summary.txt
logs=$out/logs.txt
: >"$summary"
: >"$logs"
failures=0
kept=0

left() { echo $((budget - kept - SECONDS)); }

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
  elif [[ -n ${proof:-} ]] && ! output | grep -E -- "$proof" >/dev/null; then
    # Not grep -q, which ends at the first match: what writes to it then fails, and the pipe with it.
    word="none ran"
    status=1
  fi
  ((status == 0)) || failures=$((failures + 1))
  note "$name" "$word" $((SECONDS - begin)) \
    "$(output | grep -v '^[[:space:]]*$' | tail -n 1 | cut -c1-100)"
  return "$status"
}

# Whether a step is to be run; from then on the least that the ones after it need is kept for them.
wanted() { # STEP
  local step after=''
  [[ " ${steps[*]} " == *" $1 "* ]] || return 1
  kept=0
  for step in "${all[@]}"; do
    if [[ -n $after && " ${steps[*]} " == *" $step "* ]]; then kept=$((kept + least[$step])); fi
    [[ $step != "$1" ]] || after=yes
  done
}

machine() {
  local status=0
  date -u
  uname -srm
  nvidia-smi || status=1
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm --format=csv
  nvcc --version
  "$python" -c 'import torch; print("torch", torch.__version__, torch.cuda.nccl.version())'
  git log -1 --format='commit %H %cI' 2>/dev/null || true
  [[ ! -f $bring/COMMIT ]] || sed 's/^/collected at /' "$bring/COMMIT"
  return "$status"
}

py() { PYTHONPATH="$site:$PWD/src:$PWD/benchmarks" "$python" "$@"; }

# Beside the Python that is there, not in an environment of its own: that Python may be one of a
# virtual environment itself, whose packages another one made from it does not see.
packages() {
  set -e
  mkdir -p "$site"
  local wheels=("$bring"/wheels/*.whl) wheel
  [[ -f ${wheels[0]} ]] || {
    echo "nothing was brought in $bring/wheels"
    return
  }
  if "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile \
      --upgrade --target "$site" "${wheels[@]}"
  else
    for wheel in "${wheels[@]}"; do "$python" -m zipfile -e "$wheel" "$site"; done
  fi
  echo "${#wheels[@]} packages of $bring/wheels"
}

# Now, since in the demo it would be seen last. The model's own module imports torch, which the
# names in transformers hide the absence of.
imports() {
  py - <<'PY'
import importlib
import sys

NAMES = {
    "tests": "torch numpy zmq msgspec pytest pytest_timeout hypothesis",
    "demo": "transformers huggingface_hub transformers.models.llama.modeling_llama safetensors "
    "matplotlib rich",
}
found, problems = [], []
for purpose, names in NAMES.items():
    for name in names.split():
        try:
            module = importlib.import_module(name)
            found.append(f"{name} {module.__version__}" if "." not in name else name)
        except AttributeError:
            found.append(name)
        except Exception as error:
            problems.append(f"WARNING: no {purpose}: {name}: {type(error).__name__}: {error}")
print(", ".join(found))
print("\n".join(problems))
sys.exit(bool(problems))
PY
}

compile() {
  set -e
  local options=() tests='' arch pybind interpreter
  if [[ -d $bring/googletest ]]; then
    options+=("-DPIPELIVE_GTEST_SOURCE=$PWD/$bring/googletest")
  fi
  # The other programs have no test that needs a GPU.
  if [[ -d $bring/googletest || -f /usr/include/gtest/gtest.h ]]; then
    options+=(-DPIPELIVE_BUILD_TESTS=ON)
    tests=yes
  else
    options+=(-DPIPELIVE_BUILD_TESTS=OFF)
  fi
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
  pybind=$(py -m pybind11 --cmakedir)
  interpreter=$(py -c 'import sys; print(sys.executable)')
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPIPELIVE_INPLACE=ON \
    -DPIPELIVE_CUDA=ON "-DPIPELIVE_CUDA_ARCHS=${arch:-90}" "-DPython_EXECUTABLE=$interpreter" \
    "-Dpybind11_DIR=$pybind" "${options[@]}"
  # All that can be compiled, whatever else cannot; the tests of Python need only this.
  cmake --build "$build" -j "$(nproc)" --target _core
  if [[ -n $tests ]]; then cmake --build "$build" -j "$(nproc)" --target cuda_tests -- -k 0 || true; fi
}

# The files with GPU tests, what others build upon first. A mark in a conftest.py is one of a fixture.
suites() {
  local file
  {
    printf '%s\n' tests/test_build_info.py tests/gpu/test_pools.py tests/slots/test_gpu_append.py
    grep -rlE --include='*.py' 'mark\.gpu' tests | sort | while read -r file; do
      case $file in
        */conftest.py) grep -lE '\(.*\bgpu: |^ *gpu: ' "${file%/*}"/test_*.py ;;
        *) echo "$file" ;;
      esac
    done
  } | awk '!seen[$0]++'
}

gpu_pytest() {
  "${checker[@]}" env PYTHONPATH="$site:$PWD/src:$PWD/benchmarks" "$python" -m pytest -v \
    -p no:cacheprovider --hypothesis-profile=ci --tb=short "$@"
}

# A test that hangs in the driver is ended with its process only, but its stacks are printed before.
gpu_tests() { # FILE
  local checker=()
  gpu_pytest -m gpu --durations=5 --timeout=50 --hang-grace=5 --maxfail=40 "$1"
}

sanitized() { # TOOL FILE...
  # Kernels of torch's are left out: there are many, and checking them takes most of the time.
  # A message of the sanitizer is an error of the run, whatever the tests say. Calls that fail are
  # none: torch and the engine ask the driver for things that it may refuse.
  local checker=(compute-sanitizer --tool "$1" --error-exitcode 9 --report-api-errors no
    --kernel-name kns=pipelive_ --target-processes all)
  gpu_pytest -m 'gpu and small' --timeout=55 "${@:2}"
}

# The shape of SmolLM2-135M with random weights: the real one is too large to bring along.
demo() {
  local how=(--quick --new-tokens 256)
  [[ -z $full ]] || how=(--new-tokens 512)
  py -c '
from pipelive_kv.models.tiny import tiny_model
tiny_model("llama", "build/gpu-model", vocab_size=49152, hidden_size=576, intermediate_size=1536,
           num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
           max_position_embeddings=8192, tie_word_embeddings=True, initializer_range=0.05)' || return
  # So that asking whether there is a GPU makes no context in a process that forks.
  export PYTORCH_NVML_BASED_CUDA_CHECK=1
  py -m pipelive_kv.cli demo --device cuda --model build/gpu-model/llama --out build/gpu-demo \
    "${how[@]}"
}

export -f machine packages imports compile py gpu_pytest gpu_tests sanitized demo
export python bring site build full
export PYTHONUNBUFFERED=1 # what is cut short has said how far it came

finish() {
  local last=passed
  ((failures == 0)) || last="NOT passed: $failures of the steps"
  printf '%s, %d s\n' "$last" "$SECONDS" >>"$summary"
  printf '\n'
  cat "$summary"
  exit $((failures > 0))
}

if wanted machine; then run machine 120 bash -c machine; fi
if wanted build; then
  run packages 60 bash -c packages
  run imports 120 bash -c imports
  if ! run build 200 bash -c compile; then
    tail -n 40 "$logs"
    finish
  fi
  run doctor 30 bash -c 'py -m pipelive_kv.cli doctor'
fi
if wanted cpp; then
  if grep -qs '^PIPELIVE_BUILD_TESTS:BOOL=ON' "$build/CMakeCache.txt"; then
    # The names end in the device: "cuda_fake" needs no GPU. What was not built stands in the list
    # of tests as well.
    # CMake before 4.2 puts the parameter's value behind the name.
    proof='/cuda[ #].*Passed' PIPELIVE_REQUIRE_GPU=1 run cpp 90 ctest --test-dir "$build" -j 8 --timeout 40 \
      --no-tests=error --output-on-failure -R 'Cuda|cuda|Gpu' -E NOT_BUILT
  else
    note cpp missing 0 "built without GoogleTest"
  fi
fi
if wanted tests; then
  # A process for each file: an access to memory that is not there ends a process's use of the GPU.
  for file in $(suites); do
    proof='[0-9]+ passed' run "$(basename "$file" .py)" 90 bash -c 'gpu_tests "$@"' bash "$file"
  done
fi
if wanted demo; then
  rm -rf build/gpu-demo
  most=150
  [[ -z $full ]] || most=300
  run demo "$most" bash -c demo
  for file in report.json timeline.png; do
    [[ ! -f build/gpu-demo/$file ]] || cp "build/gpu-demo/$file" "$out/demo-$file"
  done
fi
if wanted bench; then
  for file in benchmarks/gpu/*_bench.py; do
    name=$(basename "$file" .py)
    how=(--quick)
    [[ $name != attention_bench ]] || how+=(--flashinfer off)
    most=45
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
  if [[ $(uname -r) == 4.4.0 ]]; then
    note sanitizer missing 0 "gVisor: compute-sanitizer finds no device there"
  elif command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      proof='[0-9]+ passed' run "$tool" 100 bash -c 'sanitized "$@"' bash "$tool" \
        tests/slots/test_gpu_append.py tests/attention/test_attention_gpu.py
    done
  else
    note sanitizer missing 0 "no compute-sanitizer"
  fi
fi
finish
