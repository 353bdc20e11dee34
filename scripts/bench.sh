#!/usr/bin/env bash
# Runs every *_bench program below a build folder, prints its table and leaves its JSON in the folder.
#   scripts/bench.sh BUILD [arguments for the programs]
set -euo pipefail

build=$1
shift
found=0
while IFS= read -r program; do
  found=1
  name=$(basename "$program")
  printf '== %s\n' "$name"
  "$program" --benchmark_out="$build/$name.json" --benchmark_out_format=json "$@"
done < <(find "$build" -type f -name '*_bench' -perm -u+x | sort)
if ((!found)); then
  echo "no *_bench program below $build" >&2
  exit 1
fi
