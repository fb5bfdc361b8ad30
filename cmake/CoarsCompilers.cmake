# C for the library, C++ for the example; without them one line instead of CMake's own page.
include(CheckLanguage)
foreach(language C CXX)
  check_language(${language})
  if(NOT CMAKE_${language}_COMPILER)
    message(FATAL_ERROR "coars_kernels: no ${language} compiler found; install gcc and g++ (or clang), or name one by "
                        "-DCMAKE_${language}_COMPILER=")
  endif()
  enable_language(${language})
endforeach()
