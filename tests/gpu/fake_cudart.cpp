// The part of the CUDA runtime that a compiled .cu file calls, without CUDA: launches go to a
// callback with the kernel's name in the PTX. Signatures are those of crt/host_runtime.h.
#include <cstddef>
#include <map>
#include <string>

namespace {

struct Dim3 {
  unsigned x, y, z;
};

struct Configuration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};

using Callback = int (*)(const char* name, const unsigned* sizes, size_t shared, void** args);

Callback callback = nullptr;
Configuration pending;
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> table;  // libraries register before any constructor
  return table;
}

}  // namespace

extern "C" {

void gose_on_launch(Callback to) { callback = to; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*,
                            void*, void*, int*) {
  names()[host] = device;
}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  pending = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = pending.grid;
  *block = pending.block;
  *shared = pending.shared;
  *static_cast<void**>(stream) = pending.stream;
  return 0;
}
int __cudaGetKernel(void** kernel, const void* host) {
  *kernel = const_cast<void*>(host);
  return 0;
}
int __cudaLaunchKernel(void* kernel, Dim3 grid, Dim3 block, void** args, size_t shared, void*) {
  const unsigned sizes[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  return callback(names().at(kernel).c_str(), sizes, shared, args);
}
int cudaGetLastError() { return 0; }
}
