# find_package(mylayers) gives mylayers::mylayers: the operators without Python, and libtorch.

get_filename_component(_mylayers "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
if(NOT EXISTS "${_mylayers}/libmylayers.so")
  set(mylayers_FOUND FALSE)
  set(mylayers_NOT_FOUND_MESSAGE "${_mylayers} has no libmylayers.so: it is mylayers' source \
folder. Give the installed package's: python -c \"import mylayers; \
print(mylayers.cmake_prefix_path())\", outside of the source folder.")
  return()
endif()

include(CMakeFindDependencyMacro)
find_dependency(Torch)

# libtorch's C++ ABI holds for one minor series.
file(STRINGS "${_mylayers}/_built_for.py" _built_for)
string(REGEX MATCH "[0-9]+[.][0-9]+" _series "${_built_for}")
if(NOT "${Torch_VERSION}." MATCHES "^${_series}[.]")
  set(mylayers_FOUND FALSE)
  set(mylayers_NOT_FOUND_MESSAGE "mylayers was compiled for torch ${_series}; find_package(Torch) \
found ${Torch_VERSION} in ${Torch_DIR}.")
  return()
endif()

# What the CUDA kernels need of a torch that has CUDA; torch's own target links it "as needed" only.
set(_c10_cuda)
if(C10_CUDA_LIBRARY)
  set(_c10_cuda "-Wl,--no-as-needed,\"${C10_CUDA_LIBRARY}\"")
endif()

if(NOT TARGET mylayers::mylayers)
  add_library(mylayers::mylayers SHARED IMPORTED)
  set_target_properties(mylayers::mylayers PROPERTIES
    IMPORTED_LOCATION "${_mylayers}/libmylayers.so"
    IMPORTED_SONAME libmylayers.so
    INTERFACE_LINK_LIBRARIES "${_c10_cuda};torch"
    # No symbol of the library need be named: to load it registers the operators.
    INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed")
endif()
