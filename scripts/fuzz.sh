#!/usr/bin/env bash
# Runs every libFuzzer target of a build for a while over its corpus. What is found on the way stays
# in BUILD/corpus, what fails in BUILD/findings; only chosen inputs go into the repository.
#
#   fuzz.sh BUILD [TARGET...]
#
#   FUZZ_SECONDS    for each target (default: 60)
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${FUZZ_SECONDS:-60}
build=${1:?usage: fuzz.sh BUILD [TARGET...]}
shift
targets=("$@")
if ((${#targets[@]} == 0)); then
  for program in "$build"/{cpp,cuda}/fuzz/*_fuzz; do
    name=${program##*/}
    targets+=("${name%_fuzz}")
  done
fi

mkdir -p "$build/findings"
failed=()
for target in "${targets[@]}"; do
  kept=$build/corpus/$target
  fuzzer=("$build"/*/fuzz/"${target}_fuzz")
  log=$build/findings/$target.log
  mkdir -p "$kept"
  printf '== %s for %s s\n' "$target" "$seconds"
  if ! UBSAN_OPTIONS=print_stacktrace=1 "${fuzzer[0]}" "$kept" "cpp/fuzz/corpus/$target" \
    -max_total_time="$seconds" -max_len=4096 -timeout=30 -print_final_stats=1 \
    -artifact_prefix="$build/findings/$target-" >"$log" 2>&1; then
    failed+=("$target")
    tail -n 40 "$log"
  fi
  grep -E 'number_of_executed_units|DONE|^Done' "$log" || true
done
if ((${#failed[@]})); then
  printf 'fuzz: failed: %s (inputs and logs in %s)\n' "${failed[*]}" "$build/findings" >&2
  exit 1
fi
