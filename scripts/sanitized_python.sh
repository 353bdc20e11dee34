#!/usr/bin/env bash
# Builds the extension with sanitizers and runs Python tests with it: SANITIZERS BUILD_DIR TESTS...
# The interpreter is not built with them, so their runtime is loaded before it. Leaks are not looked
# for: the interpreter gives much back only by ending.
set -euo pipefail
sanitizers=$1 build=$2
shift 2
bin=$PWD/.venv/bin
"$bin/cmake" -S . -B "$build" -G Ninja --log-level=WARNING -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPIPELIVE_SANITIZE="$sanitizers" -DPIPELIVE_CUDA=OFF \
  -DPIPELIVE_BUILD_TESTS=OFF -DPython_EXECUTABLE="$bin/python" \
  -Dpybind11_DIR="$("$bin/python" -m pybind11 --cmakedir)" \
  ${CMAKE_CXX_COMPILER_LAUNCHER:+-DCMAKE_CXX_COMPILER_LAUNCHER="$CMAKE_CXX_COMPILER_LAUNCHER"}
"$bin/cmake" --build "$build" --target _core

# The package as it is, with this extension in place of the one that was built for use.
site=$build/site
rm -rf "$site"
mkdir -p "$site"
cp -r src/pipelive_kv "$site/"
rm -f "$site"/pipelive_kv/_core.*.so
cp "$build"/python/_core.*.so "$site/pipelive_kv/"

compiler=${CXX:-g++}
case $sanitizers in
  thread) runtime=libtsan.so launch=(setarch -R) ;;
  *) runtime=libasan.so launch=() ;;
esac
export LD_PRELOAD
LD_PRELOAD="$("$compiler" -print-file-name=$runtime) $("$compiler" -print-file-name=libstdc++.so.6)"
export PYTHONPATH=$PWD/$site PYTHONMALLOC=malloc
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS="halt_on_error=1 suppressions=$PWD/cpp/tests/tsan.supp"
"${launch[@]}" "$bin/python" -c 'import pipelive_kv._core as core; print("extension:", core.__file__)'
exec "${launch[@]}" "$bin/python" -m pytest -p no:cacheprovider -q "$@"
