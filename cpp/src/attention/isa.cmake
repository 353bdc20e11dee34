# Flags of the kernel files. Each is compiled for one ISA and chosen at run time; contraction is off
# so that a row's arithmetic is the same in every register tile.
set(kernel_flags -O3 -ffp-contract=off)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(avx2_flags -mavx2 -mfma -mf16c)
  # GCC 12 takes the undefined operand of its own AVX-512 intrinsics for an error of ours.
  set(avx512_flags ${avx2_flags} -mavx512f -mavx512bw -mavx512vl -mavx512dq
                   -mprefer-vector-width=512
                   $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
  set(avx512_bf16_flags ${avx512_flags} -mavx512bf16)
endif()
foreach(isa portable avx2 avx512 avx512_bf16)
  set_source_files_properties("${CMAKE_CURRENT_LIST_DIR}/kernels_${isa}.cpp"
                              PROPERTIES COMPILE_OPTIONS "${kernel_flags};${${isa}_flags}")
endforeach()
# A kernel for tests.
set_source_files_properties("${CMAKE_CURRENT_LIST_DIR}/../../tests/attention/bf16_pairs_kernel.cpp"
                            PROPERTIES COMPILE_OPTIONS "${kernel_flags};${avx512_flags}")
