# How our targets are built: warnings, exported symbols, names, the torch stub, tests, embedded templates.
# SPDX-License-Identifier: Apache-2.0

# All files that match the patterns, at any depth; a new file is seen by the next build.
function(torchkiln_glob result)
  list(TRANSFORM ARGN PREPEND "${PROJECT_SOURCE_DIR}/")
  file(GLOB_RECURSE files CONFIGURE_DEPENDS ${ARGN})
  set(${result} "${files}" PARENT_SCOPE)
endfunction()

# What every target of ours has.
function(torchkiln_configure target)
  target_include_directories(${target} PUBLIC "$<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>"
                                              "$<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>")
  target_compile_definitions(${target} PRIVATE TORCHKILN_VERSION="${PROJECT_VERSION}")
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wconversion -Wshadow
                                           $<$<BOOL:${TORCHKILN_WERROR}>:-Werror>)
  # Messages and assertions hold file names: none of them may name a folder of the machine that built the library.
  target_compile_options(${target} PRIVATE "-ffile-prefix-map=${PROJECT_SOURCE_DIR}=.")
  # The linker leaves out what nothing calls.
  target_compile_options(${target} PRIVATE -ffunction-sections -fdata-sections)
  if(TORCHKILN_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${TORCHKILN_SANITIZE} -fno-omit-frame-pointer
                                             -fno-sanitize-recover=all -g1)
    target_link_options(${target} PUBLIC -fsanitize=${TORCHKILN_SANITIZE})
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # The flow analysis of g++ 12 misjudges inlined std::string (GCC bug 105651): these two stay warnings.
    target_compile_options(${target} PRIVATE -fno-gnu-unique -Wno-error=array-bounds -Wno-error=restrict)
  endif()
endfunction()

# A library that other packages' libraries share a process with. Its version is part of its file name and soname:
# with a plain soname, operators of one version would bind to an engine of another one that is already loaded.
function(torchkiln_configure_library target)
  set(map "${PROJECT_SOURCE_DIR}/cmake/exports.map")
  set_target_properties(${target} PROPERTIES OUTPUT_NAME "${target}-${PROJECT_VERSION}" LINK_DEPENDS "${map}")
  target_link_options(${target} PRIVATE "LINKER:--version-script=${map}" LINKER:--gc-sections)
endfunction()

# Builds sources for size, a third of what -O3 makes of them: for all that does not run at each launch or in CPU loops.
function(torchkiln_prefer_size)
  set_source_files_properties(${ARGN} PROPERTIES COMPILE_OPTIONS $<$<CONFIG:Release>:-Os>)
endfunction()

# torch's stable ABI, as of torch 2.10. The target is linked with an empty stub of libtorch_cpu.so: it names the library
# that the loader has to find, and leaves no path of the build machine and no other torch library in the result.
function(torchkiln_use_stable_torch target)
  torchkiln_find_torch_headers(torch_include)
  target_include_directories(${target} SYSTEM PRIVATE "${torch_include}")
  target_compile_definitions(${target} PRIVATE TORCH_TARGET_VERSION=0x020a000000000000ULL TORCH_STABLE_ONLY)

  set(stub_dir "${PROJECT_BINARY_DIR}/stub")
  file(CONFIGURE OUTPUT "${stub_dir}/torch_cpu.cpp" CONTENT "")
  add_library(torchkiln_torch_stub SHARED "${stub_dir}/torch_cpu.cpp")
  set_target_properties(torchkiln_torch_stub PROPERTIES OUTPUT_NAME torch_cpu LIBRARY_OUTPUT_DIRECTORY "${stub_dir}")
  target_link_options(${target} PRIVATE LINKER:--no-as-needed)
  # By its file, not by its target: what is installed must not ask for the stub.
  target_link_libraries(${target} PRIVATE $<TARGET_LINKER_FILE:torchkiln_torch_stub>)
endfunction()

# One executable per folder of tests/, on the object library: hidden symbols are within its reach.
function(torchkiln_add_tests folder)
  torchkiln_glob(sources tests/${folder}/*.cpp)
  set(target torchkiln_${folder}_tests)
  add_executable(${target} ${sources})
  torchkiln_configure(${target})
  target_link_libraries(${target} PRIVATE torchkiln_objects GTest::gtest_main)
  gtest_discover_tests(${target} DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60)
endfunction()

# What the tests in tests/deploy/attack run and preload: a process of the core with a fake compiler, and a file system
# that lies and fails.
function(torchkiln_add_attack)
  set(folder "${PROJECT_SOURCE_DIR}/tests/deploy/attack")
  add_executable(torchkiln_attack_worker "${folder}/worker.cpp" "${PROJECT_SOURCE_DIR}/tests/jit/support/fake_nvrtc.cpp")
  torchkiln_configure(torchkiln_attack_worker)
  target_link_libraries(torchkiln_attack_worker PRIVATE torchkiln_objects)
  add_library(torchkiln_attack_files MODULE "${folder}/hostile_files.cpp")
  torchkiln_configure(torchkiln_attack_files)
  target_link_libraries(torchkiln_attack_files PRIVATE ${CMAKE_DL_LIBS})
endfunction()

# What the tests in tests/emulated load in place of libraries of CUDA: a compiler whose kernels the host runs, and the
# part of torch that knows CUDA tensors. Torch's C++ interface has no promise: this is built against the torch that is
# there, and used with it only.
function(torchkiln_add_emulator)
  set(folder "${PROJECT_SOURCE_DIR}/tests/emulated/emulator")
  add_library(torchkiln_emulated_nvrtc SHARED "${folder}/nvrtc.cpp")
  torchkiln_configure(torchkiln_emulated_nvrtc)
  target_compile_definitions(torchkiln_emulated_nvrtc PRIVATE TORCHKILN_EMULATOR_FOLDER="${folder}"
                                                              TORCHKILN_EMULATOR_CXX="${CMAKE_CXX_COMPILER}")
  set_source_files_properties("${folder}/nvrtc.cpp" PROPERTIES OBJECT_DEPENDS "${folder}/device.h;${folder}/abi.h")
  target_link_libraries(torchkiln_emulated_nvrtc PRIVATE torchkiln_objects)
  target_link_options(torchkiln_emulated_nvrtc PRIVATE LINKER:--build-id)
  add_library(torchkiln_emulated_torch SHARED "${folder}/torch_cuda.cpp")
  torchkiln_configure(torchkiln_emulated_torch)
  torchkiln_find_torch_headers(torch_include)
  target_include_directories(torchkiln_emulated_torch SYSTEM PRIVATE "${torch_include}"
                                                                     "${torch_include}/torch/csrc/api/include")
  target_link_options(torchkiln_emulated_torch PRIVATE LINKER:--no-as-needed)
  target_link_libraries(torchkiln_emulated_torch PRIVATE $<TARGET_LINKER_FILE:torchkiln_torch_stub> ${CMAKE_DL_LIBS})
  set_target_properties(
    torchkiln_emulated_nvrtc torchkiln_emulated_torch PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/emulator")
  set_target_properties(torchkiln_emulated_nvrtc PROPERTIES OUTPUT_NAME nvrtc SUFFIX .so.13.0)
  set_target_properties(torchkiln_emulated_torch PROPERTIES OUTPUT_NAME torch_cuda)
endfunction()

# Sets `result` to a generated source that holds every file of kernel_templates/ (see jit/spec/embedded.h).
function(torchkiln_embed_templates result)
  torchkiln_glob(templates kernel_templates/*.h kernel_templates/*.cuh)
  # In the arguments of the command, so that a removed file runs it again.
  string(SHA256 file_list "${templates}")
  set(output "${PROJECT_BINARY_DIR}/generated/embedded_templates.cpp")
  set(script "${PROJECT_SOURCE_DIR}/cmake/embed_templates.cmake")
  add_custom_command(
    OUTPUT "${output}"
    COMMAND "${CMAKE_COMMAND}" "-DROOT=${PROJECT_SOURCE_DIR}/kernel_templates" "-DOUTPUT=${output}"
            "-DFILE_LIST=${file_list}" -P "${script}"
    DEPENDS ${templates} "${script}"
    COMMENT "Embedding the kernel templates"
    VERBATIM)
  set(${result} "${output}" PARENT_SCOPE)
endfunction()
