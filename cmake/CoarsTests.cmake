# ctest: what can be checked anywhere, and on a machine with a GPU the example's results.
set(AOT_TESTS ${KERNELS_DIR}/aot/library/tests)

add_executable(coars_kernels_example kernels/aot/example/main.cpp)
set_target_properties(coars_kernels_example PROPERTIES CXX_STANDARD 17)
target_link_libraries(coars_kernels_example PRIVATE coars_kernels::coars_kernels ${CMAKE_DL_LIBS})

# A stand-in for the CUDA driver that writes down what it is asked to launch.
add_library(stand_in_driver SHARED EXCLUDE_FROM_ALL ${AOT_TESTS}/stand_in_driver.c)
set_target_properties(stand_in_driver PROPERTIES
  OUTPUT_NAME cuda SUFFIX .so.1 LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/stand_in)
add_executable(coars_kernels_test_launch ${AOT_TESTS}/test_launch.c)
target_link_libraries(coars_kernels_test_launch PRIVATE coars_kernels::coars_kernels ${CMAKE_DL_LIBS})
add_dependencies(coars_kernels_test_launch stand_in_driver)

set(CHECK
  ${BUILD_ENVIRONMENT} TRITON_CACHE_DIR=${AOT_DIR}/triton_cache
  ${COARS_PYTHON_EXECUTABLE} -m aot.check --library $<TARGET_FILE:coars_kernels>)
add_test(NAME symbols COMMAND ${CHECK} --symbols ${KERNELS_DIR}/aot/library/coars_kernels.h --nm ${CMAKE_NM})
add_test(NAME resources COMMAND ${CHECK} --resources)
add_test(NAME example COMMAND coars_kernels_example)
add_test(NAME launch_of_every_kernel COMMAND coars_kernels_test_launch)
set_tests_properties(launch_of_every_kernel PROPERTIES
  ENVIRONMENT LD_LIBRARY_PATH=${CMAKE_CURRENT_BINARY_DIR}/stand_in)
# 77: a GPU that the library was not built for
set_tests_properties(example PROPERTIES SKIP_RETURN_CODE 77)
add_test(NAME find_package COMMAND ${CMAKE_COMMAND}
  -D BUILD=${CMAKE_CURRENT_BINARY_DIR} -D EXAMPLE=${KERNELS_DIR}/aot/example -D GENERATOR=${CMAKE_GENERATOR}
  -D CXX=${CMAKE_CXX_COMPILER} -D VERSION=${PROJECT_VERSION} -P ${CMAKE_CURRENT_SOURCE_DIR}/cmake/TestInstall.cmake)
