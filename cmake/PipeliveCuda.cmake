# Kernels as fatbins inside our own binaries: nvcc only ever makes a fatbin, the CUDA language is not
# enabled and no CUDA library is linked. Sets PIPELIVE_NVCC_WORKS, PIPELIVE_NVCC_VERSION and
# PIPELIVE_CUDA_ARCH_LIST, and defines pipelive_embed_kernels().

set(PIPELIVE_NVCC_WORKS FALSE)
set(PIPELIVE_NVCC_VERSION "")
set(PIPELIVE_CUDA_ARCH_LIST "")

# Whether nvcc gets along with this machine's host compiler; a version it does not know is refused.
function(_pipelive_try_nvcc result)
  set(probe "${CMAKE_BINARY_DIR}/CMakeFiles/pipelive_nvcc_probe.cu")
  file(WRITE "${probe}" "extern \"C\" __global__ void probe() {}\n")
  execute_process(
    COMMAND "${PIPELIVE_NVCC}" -std=c++17 -fatbin -o "${probe}.fatbin" "${probe}"
    RESULT_VARIABLE status ERROR_VARIABLE output OUTPUT_VARIABLE output)
  if(status EQUAL 0)
    set(${result} TRUE PARENT_SCOPE)
  else()
    set(${result} FALSE PARENT_SCOPE)
    message(STATUS "CUDA: ${PIPELIVE_NVCC} fails here:\n${output}")
  endif()
endfunction()

if(NOT PIPELIVE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "PIPELIVE_CUDA is '${PIPELIVE_CUDA}'; expected AUTO, ON or OFF")
endif()
if(NOT PIPELIVE_CUDA STREQUAL "OFF")
  find_program(PIPELIVE_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
               PATH_SUFFIXES bin)
  if(PIPELIVE_NVCC)
    if(NOT PIPELIVE_NVCC_PROBED STREQUAL "${PIPELIVE_NVCC}")
      _pipelive_try_nvcc(works)
      if(works)
        set(PIPELIVE_NVCC_PROBED "${PIPELIVE_NVCC}" CACHE INTERNAL "the nvcc that was seen to work")
      endif()
    endif()
    if(PIPELIVE_NVCC_PROBED STREQUAL "${PIPELIVE_NVCC}")
      set(PIPELIVE_NVCC_WORKS TRUE)
    endif()
  endif()
  if(PIPELIVE_CUDA STREQUAL "ON" AND NOT PIPELIVE_NVCC_WORKS)
    message(FATAL_ERROR "PIPELIVE_CUDA is ON, but no working nvcc was found in PATH, CUDA_HOME or "
                        "/usr/local/cuda. Install the CUDA toolkit or use PIPELIVE_CUDA=OFF.")
  endif()
endif()

if(PIPELIVE_NVCC_WORKS)
  execute_process(COMMAND "${PIPELIVE_NVCC}" --version OUTPUT_VARIABLE output)
  string(REGEX MATCH "V([0-9.]+)" _ "${output}")
  set(PIPELIVE_NVCC_VERSION "${CMAKE_MATCH_1}")
  execute_process(COMMAND "${PIPELIVE_NVCC}" --list-gpu-code OUTPUT_VARIABLE known)
  string(REGEX MATCHALL "sm_[0-9]+[a-z]?" known "${known}")

  set(_pipelive_gencode "")
  if(PIPELIVE_CUDA_ARCHS STREQUAL "fast")
    set(wanted 90)
  else()
    set(wanted ${PIPELIVE_CUDA_ARCHS})
  endif()
  foreach(arch IN LISTS wanted)
    if("sm_${arch}" IN_LIST known)
      list(APPEND PIPELIVE_CUDA_ARCH_LIST "sm_${arch}")
      list(APPEND _pipelive_gencode "-gencode=arch=compute_${arch},code=sm_${arch}")
      set(highest ${arch})
    else()
      message(WARNING "CUDA: nvcc ${PIPELIVE_NVCC_VERSION} does not know sm_${arch}; left out")
    endif()
  endforeach()
  if(NOT PIPELIVE_CUDA_ARCH_LIST)
    message(FATAL_ERROR "PIPELIVE_CUDA_ARCHS is '${PIPELIVE_CUDA_ARCHS}'; nvcc "
                        "${PIPELIVE_NVCC_VERSION} knows none of them, only ${known}")
  endif()
  if(NOT PIPELIVE_CUDA_ARCHS STREQUAL "fast")
    # PTX of the newest one, so that the driver can translate for devices that come later.
    list(APPEND PIPELIVE_CUDA_ARCH_LIST "compute_${highest}")
    list(APPEND _pipelive_gencode "-gencode=arch=compute_${highest},code=compute_${highest}")
  endif()
  string(REPLACE ";" " " shown "${PIPELIVE_CUDA_ARCH_LIST}")
  message(STATUS "CUDA: nvcc ${PIPELIVE_NVCC_VERSION}, ${shown}")
else()
  message(STATUS "CUDA: kernels are not compiled (PIPELIVE_CUDA=${PIPELIVE_CUDA}, "
                 "nvcc: ${PIPELIVE_NVCC})")
endif()

# pipelive_embed_kernels(TARGET file.cu ...): adds to TARGET a source that defines
# pipelive::cuda::fatbins() with one entry per file, named after it; without nvcc there are none.
function(pipelive_embed_kernels target)
  set(declarations "")
  set(entries "")
  set(objects "")
  set(count 0)
  if(PIPELIVE_NVCC_WORKS)
    foreach(source IN LISTS ARGN)
      get_filename_component(name "${source}" NAME_WE)
      set(fatbin "${CMAKE_CURRENT_BINARY_DIR}/${name}.fatbin")
      add_custom_command(
        OUTPUT "${fatbin}"
        COMMAND "${PIPELIVE_NVCC}" -std=c++17 -O3 -fatbin -Xfatbin=-compress-all ${_pipelive_gencode}
                "-I${CMAKE_CURRENT_SOURCE_DIR}/include" -MD -MF "${fatbin}.d" -MT "${fatbin}"
                -o "${fatbin}" "${source}"
        DEPENDS "${source}"
        DEPFILE "${fatbin}.d"
        COMMENT "nvcc ${name}.cu"
        VERBATIM)
      # The assembler takes the bytes in as they are: an array initialiser of megabytes takes a
      # C++ compiler minutes.
      string(APPEND declarations
        "__asm__(\".pushsection .rodata\\n.balign 64\\n\"\n"
        "        \"pipelive_fatbin_${name}:\\n.incbin \\\"${fatbin}\\\"\\n\"\n"
        "        \"pipelive_fatbin_${name}_end:\\n.byte 0\\n.popsection\\n\");\n"
        "extern \"C\" __attribute__((visibility(\"hidden\"))) const std::byte "
        "pipelive_fatbin_${name}[];\n"
        "extern \"C\" __attribute__((visibility(\"hidden\"))) const std::byte "
        "pipelive_fatbin_${name}_end[];\n")
      string(APPEND entries
        "    Fatbin{\"${name}\", {pipelive_fatbin_${name}, pipelive_fatbin_${name}_end}},\n")
      list(APPEND objects "${fatbin}")
      math(EXPR count "${count} + 1")
    endforeach()
  endif()
  # The sources as well, for NVRTC to compile at run time where the fatbins do not suit a device or
  # are missing: every .cu, and what one may include.
  file(GLOB included CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/src/*.cuh"
       "${CMAKE_CURRENT_SOURCE_DIR}/src/*.inl")
  file(GLOB headers CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/include/pipelive/cuda/*.hpp")
  foreach(header IN LISTS headers)
    file(STRINGS "${header}" device_functions REGEX "PIPELIVE_HD" LIMIT_COUNT 1)
    if(device_functions)
      list(APPEND included "${header}")
    endif()
  endforeach()
  set(source_entries "")
  set(source_count 0)
  foreach(source IN LISTS ARGN included)
    if(source MATCHES "/include/(.*)$")
      set(name "${CMAKE_MATCH_1}")
    else()
      get_filename_component(name "${source}" NAME)
    endif()
    set(symbol "pipelive_kernel_source_${source_count}")
    string(APPEND declarations
      "__asm__(\".pushsection .rodata\\n\"\n"
      "        \"${symbol}:\\n.incbin \\\"${source}\\\"\\n${symbol}_end:\\n.byte 0\\n"
      ".popsection\\n\");\n"
      "extern \"C\" __attribute__((visibility(\"hidden\"))) const char ${symbol}[];\n"
      "extern \"C\" __attribute__((visibility(\"hidden\"))) const char ${symbol}_end[];\n")
    string(APPEND source_entries
      "    KernelSource{\"${name}\", {${symbol}, ${symbol}_end}},\n")
    list(APPEND objects "${source}")
    math(EXPR source_count "${source_count} + 1")
  endforeach()
  set(archs "")
  list(LENGTH PIPELIVE_CUDA_ARCH_LIST arch_count)
  foreach(arch IN LISTS PIPELIVE_CUDA_ARCH_LIST)
    string(APPEND archs "\"${arch}\", ")
  endforeach()
  set(generated "${CMAKE_CURRENT_BINARY_DIR}/fatbins.cpp")
  configure_file("${PROJECT_SOURCE_DIR}/cmake/fatbins.cpp.in" "${generated}" @ONLY)
  if(objects)
    set_source_files_properties("${generated}" PROPERTIES OBJECT_DEPENDS "${objects}")
  endif()
  target_sources(${target} PRIVATE "${generated}")
endfunction()
