# Flags that every target of ours takes, and one function per kind of target.

add_library(pipelive_flags INTERFACE)
target_compile_options(pipelive_flags INTERFACE -Wall -Wextra -Wshadow -Wnon-virtual-dtor)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # GCC 12 sees overlapping copies in its own std::string operator+ (its bug 105651).
  target_compile_options(pipelive_flags INTERFACE -Wno-restrict)
endif()
if(PIPELIVE_WERROR)
  target_compile_options(pipelive_flags INTERFACE -Werror)
endif()
if(PIPELIVE_SANITIZE)
  target_compile_options(pipelive_flags INTERFACE -fsanitize=${PIPELIVE_SANITIZE}
                                                 -fno-omit-frame-pointer
                                                 -fno-sanitize-recover=all)
  target_link_options(pipelive_flags INTERFACE -fsanitize=${PIPELIVE_SANITIZE})
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # Once instrumented, parts of the standard library (std::regex) look uninitialised to GCC.
    target_compile_options(pipelive_flags INTERFACE -Wno-maybe-uninitialized)
  endif()
endif()

# pipelive_precompile(TARGET HEADER...): headers that cost more to read than what includes them.
function(pipelive_precompile target)
  target_precompile_headers(${target} PRIVATE ${ARGN})
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # Without this flag ccache cannot see what such a compilation read.
    target_compile_options(${target} PRIVATE -fpch-preprocess)
  endif()
endfunction()

# pipelive_layer(NAME DEPENDS ...): cpp/src/NAME/*.cpp as the static library pipelive_NAME. A layer
# links only the layers it may know, so that a call upwards fails at link time.
function(pipelive_layer name)
  cmake_parse_arguments(LAYER "" "" "DEPENDS" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/src/${name}/*.cpp")
  set(target pipelive_${name})
  if(sources)
    add_library(${target} STATIC ${sources})
    set(scope PUBLIC)
    target_link_libraries(${target} PRIVATE pipelive_flags)
  else()
    add_library(${target} INTERFACE)
    set(scope INTERFACE)
  endif()
  target_include_directories(${target} ${scope} "${CMAKE_CURRENT_SOURCE_DIR}/include")
  target_link_libraries(${target} ${scope} Threads::Threads)
  foreach(dependency IN LISTS LAYER_DEPENDS)
    target_link_libraries(${target} ${scope} pipelive_${dependency})
  endforeach()

  if(PIPELIVE_BUILD_TESTS)
    file(GLOB tests CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/tests/${name}/*.cpp")
    if(tests)
      add_executable(${name}_tests ${tests})
      target_link_libraries(${name}_tests PRIVATE ${target} pipelive_flags GTest::gtest GTest::gmock
                                                  GTest::gtest_main)
      target_include_directories(${name}_tests PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/tests")
      # What is tested is optimised; optimising the tests themselves would take most of a build.
      target_compile_options(${name}_tests PRIVATE -O1)
      list(LENGTH tests num_tests)
      if(num_tests GREATER 2)
        pipelive_precompile(${name}_tests <gtest/gtest.h>)
        # Sources with flags of their own, which a header compiled without them does not fit.
        list(FILTER tests INCLUDE REGEX "_kernel\\.cpp$")
        set_source_files_properties(${tests} PROPERTIES SKIP_PRECOMPILE_HEADERS ON)
      endif()
      gtest_discover_tests(${name}_tests DISCOVERY_TIMEOUT 60)
    endif()
  endif()
  if(PIPELIVE_BUILD_BENCH)
    file(GLOB benches CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/bench/${name}_bench.cpp"
                                        "${CMAKE_CURRENT_SOURCE_DIR}/bench/${name}_*_bench.cpp")
    foreach(source IN LISTS benches)
      cmake_path(GET source STEM bench)
      add_executable(${bench} "${source}")
      target_link_libraries(${bench} PRIVATE ${target} pipelive_flags benchmark::benchmark_main)
      target_include_directories(${bench} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/bench")
    endforeach()
  endif()
endfunction()

# pipelive_fuzz(NAME DEPENDS ...): NAME_fuzz.cpp beside the caller. With PIPELIVE_FUZZ it becomes a
# libFuzzer program; in the tests the same file runs over its corpus, whatever the compiler.
function(pipelive_fuzz name)
  cmake_parse_arguments(FUZZ "" "" "DEPENDS" ${ARGN})
  if(NOT PIPELIVE_BUILD_TESTS AND NOT PIPELIVE_FUZZ)
    return()
  endif()
  set(target ${name}_fuzz)
  set(tools "${PROJECT_SOURCE_DIR}/cpp/fuzz")
  add_executable(${target} ${name}_fuzz.cpp)
  target_include_directories(${target} PRIVATE "${tools}")
  target_link_libraries(${target} PRIVATE ${FUZZ_DEPENDS} pipelive_flags)
  if(PIPELIVE_FUZZ)
    target_link_options(${target} PRIVATE -fsanitize=fuzzer)
  else()
    target_sources(${target} PRIVATE "${tools}/replay.cpp")
    target_compile_options(${target} PRIVATE -O1)
    add_test(NAME Fuzz.${name} COMMAND ${target} "${tools}/corpus/${name}")
  endif()
endfunction()
