# Stand-ins for libnccl, opened the same way; the others are too old, or lack an entry point.
foreach(fake IN ITEMS fake_nccl fake_nccl_old fake_nccl_part)
  add_library(pipelive_${fake} MODULE "${CMAKE_CURRENT_LIST_DIR}/fake_nccl.cpp")
  target_link_libraries(pipelive_${fake} PRIVATE pipelive_flags)
endforeach()
target_compile_definitions(pipelive_fake_nccl_old PRIVATE PIPELIVE_FAKE_NCCL_VERSION=21705)
target_compile_definitions(pipelive_fake_nccl_part PRIVATE PIPELIVE_FAKE_WITHOUT_ABORT)

add_executable(
  cuda_transport_tests
  "${CMAKE_CURRENT_LIST_DIR}/nccl_test.cpp" "${CMAKE_CURRENT_LIST_DIR}/nccl_channel_test.cpp"
  "${CMAKE_CURRENT_LIST_DIR}/device_channels.cpp"
  "${PROJECT_SOURCE_DIR}/cpp/tests/transport/channel_test.cpp"
  "${PROJECT_SOURCE_DIR}/cpp/tests/migration/session_test.cpp")
target_include_directories(cuda_transport_tests PRIVATE "${CMAKE_CURRENT_LIST_DIR}"
                                                        "${PROJECT_SOURCE_DIR}/cpp/tests")
target_link_libraries(cuda_transport_tests PRIVATE pipelive_cuda pipelive_migration pipelive_flags
                                                   GTest::gtest GTest::gmock GTest::gtest_main)
target_compile_options(cuda_transport_tests PRIVATE -O1)
target_compile_definitions(
  cuda_transport_tests
  PRIVATE PIPELIVE_TEST_CHANNEL_KINDS=ChannelKind::nccl
          PIPELIVE_FAKE_NCCL="$<TARGET_FILE:pipelive_fake_nccl>"
          PIPELIVE_FAKE_NCCL_OLD="$<TARGET_FILE:pipelive_fake_nccl_old>"
          PIPELIVE_FAKE_NCCL_PART="$<TARGET_FILE:pipelive_fake_nccl_part>")
add_dependencies(cuda_transport_tests pipelive_fake_nccl pipelive_fake_nccl_old
                 pipelive_fake_nccl_part)
gtest_discover_tests(cuda_transport_tests DISCOVERY_TIMEOUT 60)
