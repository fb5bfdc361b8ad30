# COARS_PYTHON_EXECUTABLE: a Python that has torch and Triton, which building needs and the library does not.
if(COARS_PYTHON)
  set(Python3_EXECUTABLE ${COARS_PYTHON})
endif()
find_package(Python3 3.11 COMPONENTS Interpreter)
if(NOT Python3_Interpreter_FOUND)
  message(FATAL_ERROR "coars_kernels: no Python 3.11 or newer found; name one by -DCOARS_PYTHON=/path/to/python")
endif()
set(COARS_PYTHON_EXECUTABLE ${Python3_EXECUTABLE})
execute_process(
  COMMAND ${COARS_PYTHON_EXECUTABLE} -c "import torch, triton; print(torch.__version__, triton.__version__)"
  RESULT_VARIABLE failed OUTPUT_VARIABLE found ERROR_VARIABLE problem OUTPUT_STRIP_TRAILING_WHITESPACE)
if(failed)
  string(STRIP "${problem}" problem)
  string(REGEX REPLACE ".*\n" "" problem "${problem}")
  message(FATAL_ERROR "coars_kernels: ${COARS_PYTHON_EXECUTABLE} cannot import torch and triton (${problem}); run "
                      "'${COARS_PYTHON_EXECUTABLE} -m pip install torch triton', or name another by -DCOARS_PYTHON=")
endif()
message(STATUS "coars_kernels: ${COARS_PYTHON_EXECUTABLE} with torch and triton ${found}")
execute_process(
  COMMAND ${CMAKE_COMMAND} -E env PYTHONPATH=${CMAKE_CURRENT_SOURCE_DIR}/kernels PYTHONDONTWRITEBYTECODE=1
          ${COARS_PYTHON_EXECUTABLE} -m aot.build --archs "${COARS_ARCHS}" --check-archs
  RESULT_VARIABLE failed ERROR_VARIABLE problem ERROR_STRIP_TRAILING_WHITESPACE)
if(failed)
  message(FATAL_ERROR "coars_kernels: ${problem}")
endif()
