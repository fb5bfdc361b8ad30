# `cmake --install build --prefix P`, after which find_package(coars_kernels) finds P by CMAKE_PREFIX_PATH.
include(CMakePackageConfigHelpers)
set(PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/coars_kernels)
install(TARGETS coars_kernels EXPORT coars_kernels_targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} PUBLIC_HEADER DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT coars_kernels_targets
  FILE coars_kernelsTargets.cmake NAMESPACE coars_kernels:: DESTINATION ${PACKAGE_DIR})
configure_package_config_file(
  cmake/coars_kernelsConfig.cmake.in coars_kernelsConfig.cmake INSTALL_DESTINATION ${PACKAGE_DIR})
write_basic_package_version_file(coars_kernelsConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/coars_kernelsConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/coars_kernelsConfigVersion.cmake
        DESTINATION ${PACKAGE_DIR})
