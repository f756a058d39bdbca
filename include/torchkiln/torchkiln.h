// The C interface of libtorchkiln: declare kernels, launch them, drive the cache. Stable across compilers and
// C++ runtimes; torchkiln.hpp turns it back into C++. Every function may be called from any thread.
// SPDX-License-Identifier: Apache-2.0
#ifndef TORCHKILN_TORCHKILN_H_
#define TORCHKILN_TORCHKILN_H_

#include <stdint.h>

#define TORCHKILN_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// ---- errors --------------------------------------------------------------------------------------------------------

// What went wrong decides the Python type. Functions return 0, or one of these; the record below has the sentence.
typedef enum torchkiln_error_kind {
  TORCHKILN_ERROR_NONE = 0,
  TORCHKILN_ERROR_TYPE = 1,      // TypeError: wrong dtype
  TORCHKILN_ERROR_VALUE = 2,     // ValueError: wrong shape, size, range or device
  TORCHKILN_ERROR_INDEX = 3,     // IndexError: an index in the data is out of range
  TORCHKILN_ERROR_COMPILE = 4,   // KernelCompileError: NVRTC refused the source
  TORCHKILN_ERROR_COMPILER = 5,  // CompilerNotFoundError: a compile is needed and there is no NVRTC
  TORCHKILN_ERROR_DRIVER = 6,    // DriverError: libcuda is missing or refused a call
  TORCHKILN_ERROR_CAPTURE = 7,   // CaptureError: the call would break a CUDA graph capture
  TORCHKILN_ERROR_INTERNAL = 8,  // RuntimeError: our own bug
  TORCHKILN_ERROR_MISSING =
      9  // MissingKernelError: not in a bundle or the cache, and compiling is forbidden
} torchkiln_error_kind;

// The last failure on this thread. `details` is a JSON object (log, excerpt, options, source_path, ...), never null.
// The strings live until the next failure on the same thread.
typedef struct torchkiln_error {
  int32_t kind;
  const char* argument;  // the argument that is wrong, or ""
  const char* message;   // one sentence about the rule, one about the way out
  const char* details;
} torchkiln_error;

TORCHKILN_API const torchkiln_error* torchkiln_last_error(void);
TORCHKILN_API void torchkiln_set_error(int32_t kind, const char* argument, const char* message);

// ---- kernels -------------------------------------------------------------------------------------------------------

// Values of a type parameter, and types of arguments. The names are those of kernel_templates/common/types.h.
typedef enum torchkiln_type {
  TORCHKILN_FLOAT = 0,
  TORCHKILN_HALF = 1,
  TORCHKILN_BFLOAT16 = 2,
  TORCHKILN_DOUBLE = 3,
  TORCHKILN_I32 = 4,
  TORCHKILN_I64 = 5,
  TORCHKILN_U8 = 6,
  TORCHKILN_BOOL = 7,
  TORCHKILN_I8 = 8,
  TORCHKILN_I16 = 9,
  TORCHKILN_U16 = 10,
  TORCHKILN_U32 = 11,
  TORCHKILN_U64 = 12,
  TORCHKILN_TYPE_COUNT = 13
} torchkiln_type;

typedef enum torchkiln_param_kind {
  TORCHKILN_PARAM_TYPE = 0,  // values are torchkiln_type
  TORCHKILN_PARAM_INT = 1,
  TORCHKILN_PARAM_BOOL = 2
} torchkiln_param_kind;

// One template parameter. A static one says which program runs; a tunable one only how fast.
typedef struct torchkiln_param {
  const char* name;
  int32_t kind;
  int32_t tunable;  // 0 or 1
  const int64_t*
      values;  // tunable: the search space; static: the generic values that `warm --ops` compiles
  uint32_t n_values;
  // 1: a layer constant, an integer that is compiled in where that is faster. Its value 0 means "given at run time" and
  // must be among the values: that generic program serves every value, from the arguments and sizes of the launch alone,
  // and runs where the exact one may not be compiled. Its launch geometry sees the 0.
  int32_t constant;
} torchkiln_param;

// A size known at each call and never compiled in. It chooses the bucket that tunables are looked up by.
typedef enum torchkiln_bucket {
  TORCHKILN_BUCKET_NONE = 0,
  TORCHKILN_BUCKET_POW2 = 1
} torchkiln_bucket;
typedef struct torchkiln_size {
  const char* name;
  int32_t bucket;
} torchkiln_size;

enum { TORCHKILN_MAX_PARAMS = 16, TORCHKILN_MAX_SIZES = 8 };

// Facts of a device, as plain numbers, so that choices can be made for a device that is not there.
typedef struct torchkiln_device {
  int32_t major, minor;
  int32_t multiprocessors;
  int32_t shared_bytes_per_block;  // with opt-in
  int64_t l2_bytes;
} torchkiln_device;

typedef struct torchkiln_problem {
  const torchkiln_device* device;
  const int64_t* statics;  // static parameters in declaration order
  const int64_t* sizes;
  const void* context;  // of the declaration
} torchkiln_problem;

typedef struct torchkiln_geometry {
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t dynamic_shared_bytes;
} torchkiln_geometry;

typedef enum torchkiln_feature {
  TORCHKILN_FEATURE_NONE = 0,     // sm_XY
  TORCHKILN_FEATURE_SPECIFIC = 1  // sm_XYa: wgmma, setmaxnreg, ...
} torchkiln_feature;

// How a parameter of a user's kernel is passed.
typedef enum torchkiln_passing {
  TORCHKILN_VALUE = 0,
  TORCHKILN_POINTER = 1,
  TORCHKILN_CONST_POINTER = 2
} torchkiln_passing;

// A parameter of a kernel that takes ordinary parameters instead of one struct. The program asserts its type. The args
// of a launch hold the parameters in order, each at the next multiple of its own size.
typedef struct torchkiln_argument {
  const char* name;
  int32_t passing;  // torchkiln_passing
  int32_t type;     // torchkiln_type, where type_param is below 0; a value is not half or bfloat16
  int32_t
      type_param;  // index of the static type parameter that gives the type of what is pointed to
} torchkiln_argument;

// Adds a file to the templates, for a user's own kernels: `path` is below "user/", and ends with ".cuh" where kernels
// are declared from it. It may include files of kernel_templates/ by their path and other added files by their path or
// relative to its own folder, in quotes. The same text again is fine; another one only until a kernel is declared from
// it. Both strings are copied.
TORCHKILN_API int32_t torchkiln_add_template(const char* path, const char* text);

// A kernel template and everything the engine must know to specialise and launch it. Strings, arrays and functions
// must live as long as the process; only pointers are kept.
typedef struct torchkiln_declaration {
  uint32_t struct_size;
  const char* path;   // "detection/box_iou.cuh", below kernel_templates/ or added
  const char* entry;  // "forward", in namespace torchkiln::<stem of path>; of an added file the
                      // name as it is seen from the global namespace, "mine::forward"
  const char* const* operators;  // operators that launch it, for `warm --ops`
  uint32_t n_operators;
  const torchkiln_param* params;  // in the order of the template's parameters
  uint32_t n_params;
  const torchkiln_size* sizes;
  uint32_t n_sizes;
  const int64_t* defaults;  // rows of tunables in declaration order: all that `choose` can return
  uint32_t n_defaults;
  uint32_t args_size;  // bytes of all arguments; of the one struct that the kernel takes, or packed
  // How far two points of the space may be apart, relative to the largest value of an output; 0: by its type.
  double tolerance;
  int32_t min_architecture;  // 75 for sm_75
  int32_t feature;
  const void* context;
  // 0 for a combination of static values that does not exist; may be null.
  int32_t (*valid)(const void* context, const int64_t* statics);
  // 0 for a point that this device or size cannot run; may be null.
  int32_t (*legal)(const torchkiln_problem* problem, const int64_t* tunables);
  // Row of `defaults` for this problem; null when there is one row.
  uint32_t (*choose)(const torchkiln_problem* problem);
  void (*geometry)(const torchkiln_problem* problem, const int64_t* tunables,
                   torchkiln_geometry* out);
  // Null for a kernel that takes one struct. Of added files only.
  const torchkiln_argument* arguments;
  uint32_t n_arguments;
  // What `--import` of the command line must name so that this declaration is there; may be null.
  const char* module;
} torchkiln_declaration;

typedef struct torchkiln_kernel torchkiln_kernel;

// Declares a kernel; never opens the driver or the compiler.
TORCHKILN_API int32_t torchkiln_declare(const torchkiln_declaration* declaration,
                                        torchkiln_kernel** out);

typedef enum torchkiln_access {
  TORCHKILN_READ = 1,
  TORCHKILN_WRITE = 2,
  TORCHKILN_READ_WRITE = 3
} torchkiln_access;

// What a buffer holds, where it is no torchkiln_type.
enum {
  TORCHKILN_BYTES = -1,    // the same bytes whatever the tunables: integers, masks, bits
  TORCHKILN_SCRATCH = -2,  // may differ between tunables that give the same answer
};

// A buffer that the kernel touches: where its pointer lies in the args, how long it is, what happens to it, how two
// results of it compare. The tuner clones, rotates and compares by it; nothing else needs to understand the args.
typedef struct torchkiln_buffer {
  uint32_t offset;
  int16_t access;  // torchkiln_access
  int16_t type;    // torchkiln_type of its elements, TORCHKILN_BYTES or TORCHKILN_SCRATCH
  uint64_t bytes;
} torchkiln_buffer;

// Device memory from the caller (torch's caching allocator). Returns null when there is none.
typedef struct torchkiln_allocator {
  void* (*allocate)(void* context, uint64_t bytes, void** owner);
  void (*release)(void* context, void* owner);
  void* context;
} torchkiln_allocator;

typedef struct torchkiln_launch {
  uint32_t struct_size;
  int32_t device;
  void* stream;
  const int64_t* statics;
  const int64_t* sizes;
  const void* args;
  const torchkiln_buffer* buffers;
  uint32_t n_buffers;
  const torchkiln_allocator*
      allocator;  // may be null: then nothing that needs memory (tuning) happens
} torchkiln_launch;

// Launches on `stream`. After the first call with the same statics and size bucket on a device it takes no lock, makes
// no allocation and touches no string.
TORCHKILN_API int32_t torchkiln_run(torchkiln_kernel* kernel, const torchkiln_launch* launch);

// Refuses (TORCHKILN_ERROR_CAPTURE) when `stream` is being captured into a CUDA graph; `what` names the thing that
// would break the capture, `way_out` what to do instead.
TORCHKILN_API int32_t torchkiln_capture_guard(int32_t device, void* stream, const char* what,
                                              const char* way_out);

// Waits for `stream`, after the capture guard.
TORCHKILN_API int32_t torchkiln_synchronize(int32_t device, void* stream, const char* what,
                                            const char* way_out);

// Facts of a device, cached; null and a record when the driver is missing.
TORCHKILN_API const torchkiln_device* torchkiln_device_facts(int32_t device);

// ---- watching ------------------------------------------------------------------------------------------------------

// The process's counters, under the names that Python's torchkiln.statistics() has too. Fills at most `capacity` rows
// and returns how many there are.
typedef struct torchkiln_counter {
  const char* name;  // lives as long as the process
  uint64_t value;
} torchkiln_counter;
TORCHKILN_API uint32_t torchkiln_statistics(torchkiln_counter* out, uint32_t capacity);

// What the engine has to say to people: a warning, or that compiles make the caller wait. Without a sink it goes to the
// standard error stream. A sink may be called from any thread and must not throw.
typedef enum torchkiln_log_level {
  TORCHKILN_LOG_INFO = 20,  // the numbers of Python's logging
  TORCHKILN_LOG_WARNING = 30
} torchkiln_log_level;
typedef void (*torchkiln_log_sink)(void* context, int32_t level, const char* sentence);
// Null for none. When this returns, no thread is inside the sink before.
TORCHKILN_API void torchkiln_set_log_sink(torchkiln_log_sink sink, void* context);

// Whether the user wants the program to stop (Ctrl-C): asked while a launch is being tuned, between two measurements, on
// the thread that launched. Not 0: the tuner keeps what it knows and the launch goes on. Null for nobody to ask.
typedef int32_t (*torchkiln_interrupted)(void* context);
TORCHKILN_API void torchkiln_set_interrupt(torchkiln_interrupted interrupted, void* context);

// ---- control -------------------------------------------------------------------------------------------------------

// Everything that is not a launch: JSON in, JSON out, so that the interface does not grow with each command. The reply
// must be given to torchkiln_free. Commands are listed in jit/control.cpp.
TORCHKILN_API int32_t torchkiln_control(const char* command, const char* request, char** reply);
TORCHKILN_API void torchkiln_free(char* reply);

TORCHKILN_API const char* torchkiln_version(void);

#ifdef __cplusplus
}
#endif

#endif  // TORCHKILN_TORCHKILN_H_
