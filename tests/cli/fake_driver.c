// A libcuda.so.1 for the doctor: it has one GPU that nothing can run on. Version and compute capability come from
// FAKE_CUDA_VERSION (12040 for 12.4) and FAKE_CUDA_ARCH (90). With -DANCIENT it is of before CUDA 12.
// SPDX-License-Identifier: Apache-2.0
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int number(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text != NULL ? atoi(text) : otherwise;
}

static int init(unsigned flags) { return (int)flags; }
static int driver_version(int* version) { return *version = number("FAKE_CUDA_VERSION", 13000), 0; }
static int device(int* handle, int ordinal) { return *handle = ordinal, 0; }
static int device_count(int* count) { return *count = 1, 0; }
static int device_name(char* name, int size, int handle) {
  (void)handle;
  return snprintf(name, (size_t)size, "Fake GPU"), 0;
}
static int attribute(int* value, int which, int handle) {
  (void)handle;
  const int arch = number("FAKE_CUDA_ARCH", 90);
  switch (which) {
    case 20:  // compute mode
      *value = number("FAKE_CUDA_COMPUTE_MODE", 0);
      return 0;
    case 75:
      *value = arch / 10;
      return 0;
    case 76:
      *value = arch % 10;
      return 0;
    default:
      *value = 1 << 16;
      return 0;
  }
}
static int unsupported(void) { return 801; }

struct entry {
  const char* name;
  void* function;
};

#ifndef ANCIENT
__attribute__((visibility("default"))) int cuGetProcAddress_v2(const char* name, void** function,
                                                               int version, uint64_t flags,
                                                               int* reason) {
  (void)version;
  (void)flags;
  (void)reason;
  const struct entry entries[] = {
      {"cuInit", (void*)&init},
      {"cuDriverGetVersion", (void*)&driver_version},
      {"cuDeviceGet", (void*)&device},
      {"cuDeviceGetCount", (void*)&device_count},
      {"cuDeviceGetName", (void*)&device_name},
      {"cuDeviceGetAttribute", (void*)&attribute},
  };
  *function = (void*)&unsupported;
  for (size_t i = 0; i < sizeof(entries) / sizeof(entries[0]); ++i) {
    if (strcmp(entries[i].name, name) == 0) *function = entries[i].function;
  }
  return 0;
}
#endif
