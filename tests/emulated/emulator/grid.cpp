// Fibers, their schedule, and what they wait for.
// SPDX-License-Identifier: Apache-2.0
#include "tests/emulated/emulator/grid.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <deque>
#include <numeric>
#include <optional>
#include <random>
#include <stdexcept>
#include <vector>

#include "tests/emulated/emulator/abi.h"
#include "tests/emulated/emulator/faults.h"
#include "tests/emulated/emulator/memory.h"
#include "tests/emulated/emulator/warp.h"

namespace torchkiln::emulator {

using namespace torchkiln_emulator;

namespace {

constexpr std::size_t kStackBytes = std::size_t{128} << 10;
constexpr unsigned kMostFibers = 2048;  // that stay in flight
constexpr unsigned kMostBlocks = 8;
constexpr std::size_t kMostStaticShared = 48 << 10;
constexpr unsigned char kBehindShared = 0xa5;

enum class State { kReady, kAsleep, kAtWarpCall, kAtBlockCall, kExited };

struct Block;

struct Fiber {
  jmp_buf context;
  ucontext_t start;
  bool started = false;
  Thread thread{};
  State state = State::kReady;
  Block* block = nullptr;
  unsigned number = 0;  // in its block
  Place place{};        // where it waits
  WarpRequest request;
  BlockCall call = kSyncThreads;
  int predicate = 0;
  unsigned long long result = 0;
};

struct Block {
  std::vector<Fiber*> fibers;
  bool active = false;
  unsigned live = 0, waiting = 0;  // threads that have not exited, and those at a barrier
  std::vector<char> shared;        // while another block runs
  char* dynamic = nullptr;
};

std::string text(const Position& p) {
  return "(" + std::to_string(p.x) + ", " + std::to_string(p.y) + ", " + std::to_string(p.z) + ")";
}
std::string text(const Place& place) {
  return std::string(place.file) + ":" + std::to_string(place.line);
}
std::string text(const Fiber& fiber) {
  return "thread " + text(fiber.thread.thread) + " of block " + text(fiber.thread.block);
}

std::string waiting_at(const Fiber& fiber) {
  switch (fiber.state) {
    case State::kAtWarpCall:
      return "waits at " + std::string(name_of(fiber.request.call)) + " (" + text(fiber.place) +
             ") with the mask " + hex(fiber.request.mask);
    case State::kAtBlockCall:
      return "waits at " + std::string(name_of(fiber.call)) + " (" + text(fiber.place) + ")";
    case State::kExited:
      return "has exited";
    default:
      return "runs";
  }
}

// ---- orders --------------------------------------------------------------------------------------------------------

unsigned schedule = 0;

class Order {
 public:
  explicit Order(unsigned seed) : seed_(seed), random_(seed) {}

  bool is_random() const { return seed_ > 1; }
  template <class T>
  void arrange(std::vector<T>& list) {
    if (seed_ == 1) std::reverse(list.begin(), list.end());
    if (seed_ > 1) std::shuffle(list.begin(), list.end(), random_);
  }
  std::vector<unsigned> of(unsigned count) {
    std::vector<unsigned> list(count);
    std::iota(list.begin(), list.end(), 0u);
    arrange(list);
    return list;
  }

 private:
  unsigned seed_;
  std::mt19937 random_;
};

// ---- the grid that runs --------------------------------------------------------------------------------------------

class Runner;
Runner* running = nullptr;

class Runner {
 public:
  Runner(Kernel& kernel, const Shape& shape, const std::string& arguments);
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;
  ~Runner();
  void run();

  // What the kernel calls, on its fiber.
  unsigned long long warp_call(const WarpRequest& request, Place place);
  int block_call(BlockCall call, int predicate, Place place);
  void sleep();
  [[noreturn]] void fail(const std::string& what);
  void* dynamic_shared() const { return current_->block->dynamic; }

  [[noreturn]] void fiber_main();

 private:
  void start(Block& block, unsigned long long number);
  bool run_block(Block& block);
  void run_warp(Block& block, unsigned warp, bool& ran);
  void finish(Block& block);
  void resume(Fiber& fiber);
  void enter(Fiber& fiber);
  void leave();
  void show_shared_of(Block& block);

  void complete_warp(Block& block, unsigned warp);
  void complete_block(Block& block);
  Fiber* lane_of(Block& block, unsigned warp, unsigned lane) const;
  std::string deadlock(const Block& block) const;

  Kernel& kernel_;
  const Shape& shape_;
  std::vector<char> arguments_;
  char* aligned_arguments_ = nullptr;
  unsigned threads_;
  Order order_;
  std::deque<Block> blocks_;
  std::vector<unsigned> warps_, lanes_;
  Block* shown_ = nullptr;  // whose static shared memory lies in the object
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  std::string error_;
};

// Stacks are kept from launch to launch, each with a page below it that may not be touched.
std::vector<std::unique_ptr<Fiber>>& pool() {
  static auto& fibers = *new std::vector<std::unique_ptr<Fiber>>;
  return fibers;
}

void fiber_entry() { running->fiber_main(); }

Fiber* make_fiber() {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  void* stack = ::mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED || ::mprotect(stack, page, PROT_NONE) != 0) throw std::bad_alloc();
  watch_stack(stack, page);
  auto fiber = std::make_unique<Fiber>();
  ::getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = static_cast<char*>(stack) + page;
  fiber->start.uc_stack.ss_size = kStackBytes;
  fiber->start.uc_link = nullptr;
  pool().push_back(std::move(fiber));
  return pool().back().get();
}

Fiber* fiber_at(std::size_t index) {
  while (pool().size() <= index) make_fiber();
  Fiber* fiber = pool()[index].get();
  fiber->started = false;
  ::makecontext(&fiber->start, fiber_entry, 0);
  return fiber;
}

Runner::Runner(Kernel& kernel, const Shape& shape, const std::string& arguments)
    : kernel_(kernel),
      shape_(shape),
      arguments_(arguments.size() + 64),
      threads_(shape.block[0] * shape.block[1] * shape.block[2]),
      order_(schedule) {
  void* at = arguments_.data();
  std::size_t space = arguments_.size();
  aligned_arguments_ = static_cast<char*>(std::align(64, arguments.size(), at, space));
  std::memcpy(aligned_arguments_, arguments.data(), arguments.size());

  const auto total = static_cast<unsigned long long>(shape.grid[0]) * shape.grid[1] * shape.grid[2];
  const auto resident =
      std::min<unsigned long long>(std::clamp(kMostFibers / threads_, 1u, kMostBlocks), total);
  const auto shared_bytes = static_cast<std::size_t>(kernel.shared_end - kernel.shared_begin);
  for (unsigned long long b = 0; b < resident; ++b) {
    Block& block = blocks_.emplace_back();
    for (unsigned t = 0; t < threads_; ++t) {
      block.fibers.push_back(fiber_at(b * threads_ + t));
      block.fibers.back()->block = &block;
      block.fibers.back()->number = t;
    }
    block.shared.resize(shared_bytes);
    if (shape.dynamic_shared_bytes > 0) {
      block.dynamic =
          static_cast<char*>(allocate(shape.dynamic_shared_bytes, "the dynamic shared memory"));
    }
  }
  running = this;
}

Runner::~Runner() {
  for (const Block& block : blocks_) {
    if (block.dynamic != nullptr) release(block.dynamic);
  }
  running = nullptr;
}

void Runner::run() {
  const auto total =
      static_cast<unsigned long long>(shape_.grid[0]) * shape_.grid[1] * shape_.grid[2];
  unsigned long long next = 0, finished = 0;
  // Falling and random orders are of windows, so that a large grid costs no memory.
  constexpr unsigned long long kWindow = 4096;
  std::vector<unsigned long long> window;
  const auto next_number = [&]() -> std::optional<unsigned long long> {
    if (window.empty() && next < total) {
      window.resize(std::min(kWindow, total - next));
      std::iota(window.begin(), window.end(), next);
      next += window.size();
      order_.arrange(window);
      std::reverse(window.begin(), window.end());  // taken from the end
    }
    if (window.empty()) return std::nullopt;
    const auto number = window.back();
    window.pop_back();
    return number;
  };
  lanes_ = order_.of(32);
  warps_ = order_.of((threads_ + 31) / 32);
  while (finished < total) {
    for (Block& block : blocks_) {
      if (!block.active) {
        const auto number = next_number();
        if (!number) continue;
        start(block, *number);
      }
      while (!run_block(block)) {
        // Complete; the next one takes its place.
        finish(block);
        ++finished;
        const auto number = next_number();
        if (!number) break;
        start(block, *number);
      }
    }
  }
}

void Runner::start(Block& block, unsigned long long number) {
  const auto& g = shape_.grid;
  const auto& b = shape_.block;
  const Position at = {static_cast<unsigned>(number % g[0]),
                       static_cast<unsigned>(number / g[0] % g[1]),
                       static_cast<unsigned>(number / g[0] / g[1])};
  for (Fiber* fiber : block.fibers) {
    const unsigned t = fiber->number;
    fiber->thread = {
        {t % b[0], t / b[0] % b[1], t / b[0] / b[1]}, at, {b[0], b[1], b[2]}, {g[0], g[1], g[2]}};
    fiber->state = State::kReady;
  }
  block.active = true;
  block.live = threads_;
  block.waiting = 0;
  std::fill(block.shared.begin(), block.shared.end(), static_cast<char>(kFresh));
  if (block.dynamic != nullptr) std::memset(block.dynamic, kFresh, shape_.dynamic_shared_bytes);
}

void Runner::finish(Block& block) {
  block.active = false;
  if (shown_ == &block) shown_ = nullptr;
}

// Runs all threads until each waits; false when all have exited.
bool Runner::run_block(Block& block) {
  show_shared_of(block);
  for (Fiber* fiber : block.fibers) {
    if (fiber->state == State::kAsleep) fiber->state = State::kReady;
  }
  bool ran = true;
  while (ran && block.live > 0) {
    ran = false;
    if (order_.is_random()) order_.arrange(warps_);
    for (const unsigned warp : warps_) run_warp(block, warp, ran);
  }
  if (block.live == 0) return false;
  const auto sleeper = std::find_if(block.fibers.begin(), block.fibers.end(),
                                    [](const Fiber* f) { return f->state == State::kAsleep; });
  if (sleeper == block.fibers.end()) throw std::runtime_error(deadlock(block));
  if (has_lasted_too_long()) {
    throw std::runtime_error(text(**sleeper) + " runs without end, or waits for what never comes");
  }
  return true;
}

void Runner::run_warp(Block& block, unsigned warp, bool& ran) {
  bool again = true;
  while (again) {
    again = false;
    if (order_.is_random()) order_.arrange(lanes_);
    for (const unsigned lane : lanes_) {
      Fiber* fiber = lane_of(block, warp, lane);
      if (fiber == nullptr || fiber->state != State::kReady) continue;
      resume(*fiber);
      ran = again = true;
    }
    // Warps overtake each other in a random order.
    if (order_.is_random()) return;
  }
}

Fiber* Runner::lane_of(Block& block, unsigned warp, unsigned lane) const {
  const unsigned number = warp * 32 + lane;
  return number < threads_ ? block.fibers[number] : nullptr;
}

void Runner::show_shared_of(Block& block) {
  if (shown_ == &block) return;
  const auto bytes = block.shared.size();
  if (bytes > 0) {
    if (shown_ != nullptr) std::memcpy(shown_->shared.data(), kernel_.shared_begin, bytes);
    std::memcpy(kernel_.shared_begin, block.shared.data(), bytes);
  }
  shown_ = &block;
}

// ---- switching -----------------------------------------------------------------------------------------------------

void Runner::resume(Fiber& fiber) {
  current_ = &fiber;
  kernel_.thread = &fiber.thread;
  enter(fiber);
  current_ = nullptr;
  if (!error_.empty()) throw std::runtime_error(error_);
}

// Nothing here has a destructor: a failing kernel comes back by a jump.
__attribute__((noinline)) void Runner::enter(Fiber& fiber) {
  if (::_setjmp(scheduler_) != 0) return;
  if (fiber.started) ::_longjmp(fiber.context, 1);
  fiber.started = true;
  ::setcontext(&fiber.start);
}

__attribute__((noinline)) void Runner::leave() {
  in_kernel = false;
  if (::_setjmp(current_->context) == 0) ::_longjmp(scheduler_, 1);
}

void Runner::fiber_main() {
  while (true) {
    in_kernel = true;
    kernel_.run(aligned_arguments_);
    in_kernel = false;
    Fiber& fiber = *current_;
    Block& block = *fiber.block;
    fiber.state = State::kExited;
    --block.live;
    // Nobody waits for a thread that has exited.
    if (block.live > 0 && block.waiting == block.live) complete_block(block);
    complete_warp(block, fiber.number / 32);
    leave();
  }
}

void Runner::fail(const std::string& what) {
  in_kernel = false;
  error_ = text(*current_) + " " + what;
  ::_longjmp(scheduler_, 1);
}

void Runner::sleep() {
  current_->state = State::kAsleep;
  leave();
}

// ---- calls that wait -----------------------------------------------------------------------------------------------

unsigned long long Runner::warp_call(const WarpRequest& request, Place place) {
  Fiber& fiber = *current_;
  const unsigned lane = fiber.number % 32;
  if ((request.mask >> lane & 1) == 0) {
    fail("calls " + std::string(name_of(request.call)) + " (" + text(place) + ") with the mask " +
         hex(request.mask) + ", which does not hold its own lane, " + std::to_string(lane));
  }
  fiber.request = request;
  fiber.place = place;
  fiber.state = State::kAtWarpCall;
  complete_warp(*fiber.block, fiber.number / 32);
  leave();
  return fiber.result;
}

// Serves every set of lanes of a warp that has arrived as a whole.
void Runner::complete_warp(Block& block, unsigned warp) {
  for (unsigned first = 0; first < 32; ++first) {
    const Fiber* leader = lane_of(block, warp, first);
    if (leader == nullptr || leader->state != State::kAtWarpCall) continue;
    const WarpRequest asked = leader->request;
    unsigned arrived = 0;
    bool complete = true;
    WarpRequest requests[32] = {};
    for (unsigned lane = 0; lane < 32; ++lane) {
      const Fiber* fiber = lane_of(block, warp, lane);
      if ((asked.mask >> lane & 1) == 0 || fiber == nullptr || fiber->state == State::kExited)
        continue;
      complete &= fiber->state == State::kAtWarpCall && fiber->request.call == asked.call &&
                  fiber->request.mask == asked.mask;
      requests[lane] = fiber->request;
      arrived |= 1u << lane;
    }
    if (!complete) continue;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((arrived >> lane & 1) == 0) continue;
      Fiber* fiber = lane_of(block, warp, lane);
      const WarpAnswer answer = answer_of(requests, arrived, lane);
      if (answer.missing_lane >= 0) {
        current_ = fiber;
        fail("reads lane " + std::to_string(answer.missing_lane) + " by " +
             name_of(fiber->request.call) + " (" + text(fiber->place) + ") with the mask " +
             hex(asked.mask) + "; that lane does not take part");
      }
      fiber->result = answer.value;
      fiber->state = State::kReady;
    }
  }
}

int Runner::block_call(BlockCall call, int predicate, Place place) {
  Fiber& fiber = *current_;
  Block& block = *fiber.block;
  fiber.call = call;
  fiber.predicate = predicate;
  fiber.place = place;
  fiber.state = State::kAtBlockCall;
  ++block.waiting;
  if (block.waiting == block.live) complete_block(block);
  leave();
  return static_cast<int>(fiber.result);
}

void Runner::complete_block(Block& block) {
  const Fiber* first = nullptr;
  unsigned count = 0;
  for (const Fiber* fiber : block.fibers) {
    if (fiber->state == State::kExited) continue;
    if (first == nullptr) first = fiber;
    count += fiber->predicate != 0 ? 1 : 0;
    if (fiber->call != first->call || fiber->place.line != first->place.line ||
        std::strcmp(fiber->place.file, first->place.file) != 0) {
      const std::string other = text(*fiber) + " " + waiting_at(*fiber);
      current_ = const_cast<Fiber*>(first);
      fail(waiting_at(*first) + ", but " + other +
           ": a barrier must be reached by all threads of the block or by none");
    }
  }
  const unsigned long long results[] = {0, count, count == block.live, count > 0};
  const BlockCall call = first->call;
  for (Fiber* fiber : block.fibers) {
    if (fiber->state == State::kExited) continue;
    fiber->result = results[call];
    fiber->state = State::kReady;
  }
  block.waiting = 0;
}

// Somebody waits for somebody who never comes.
std::string Runner::deadlock(const Block& block) const {
  for (const Fiber* fiber : block.fibers) {
    if (fiber->state != State::kAtWarpCall) continue;
    const unsigned base = fiber->number / 32 * 32;
    for (unsigned lane = 0; lane < 32 && base + lane < threads_; ++lane) {
      const Fiber* other = block.fibers[base + lane];
      const bool arrives =
          other->state == State::kExited ||
          (other->state == State::kAtWarpCall && other->request.call == fiber->request.call &&
           other->request.mask == fiber->request.mask);
      if ((fiber->request.mask >> lane & 1) == 0 || arrives) continue;
      return text(*fiber) + " " + waiting_at(*fiber) + " for lane " + std::to_string(lane) +
             ", which never comes: it " + waiting_at(*other);
    }
  }
  for (const Fiber* fiber : block.fibers) {
    if (fiber->state == State::kAtBlockCall) {
      return text(*fiber) + " " + waiting_at(*fiber) + ", which not all threads of the block reach";
    }
  }
  return "no thread of the block can go on";
}

// ---- what the kernel is given ----------------------------------------------------------------------------------------

// Turns the fiber's calls into the runner's; the kernel's own code is all that a timer may interrupt.
Grid& grid_of_kernels() {
  static Grid grid = {
      .warp =
          [](WarpCall call, unsigned mask, unsigned long long value, int operand, int width,
             Place place) {
            in_kernel = false;
            const auto result = running->warp_call({call, mask, value, operand, width}, place);
            in_kernel = true;
            return result;
          },
      .block =
          [](BlockCall call, int predicate, Place place) {
            in_kernel = false;
            const int result = running->block_call(call, predicate, place);
            in_kernel = true;
            return result;
          },
      .yield =
          [] {
            in_kernel = false;
            running->sleep();
            in_kernel = true;
          },
      .dynamic_shared = [] { return running->dynamic_shared(); },
      .fail = [](const char* what,
                 Place place) { running->fail(std::string(what) + " (" + text(place) + ")"); },
  };
  return grid;
}

}  // namespace

// A file without a name, loaded as a library. It stays open: the loader knows libraries by the path, which has its number.
class Object {
 public:
  explicit Object(std::string_view file) {
    if (file_ < 0 ||
        ::write(file_, file.data(), file.size()) != static_cast<ssize_t>(file.size())) {
      throw std::runtime_error("the kernel could not be written to memory");
    }
    const std::string path = "/proc/self/fd/" + std::to_string(file_);
    library_ = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) throw std::runtime_error(::dlerror());
    kernel_ = static_cast<Kernel*>(::dlsym(library_, "torchkiln_emulated"));
    if (kernel_ == nullptr) throw std::runtime_error("the object holds no emulated kernel");
    kernel_->grid = &grid_of_kernels();
  }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() {
    if (library_ != nullptr) ::dlclose(library_);
    ::close(file_);
  }
  Kernel& kernel() { return *kernel_; }

 private:
  int file_ = ::memfd_create("kernel", MFD_CLOEXEC);
  void* library_ = nullptr;
  Kernel* kernel_ = nullptr;
};

void set_schedule(unsigned seed) { schedule = seed; }

std::shared_ptr<Object> load(std::string_view file) { return std::make_shared<Object>(file); }

void run(Object& object, const Shape& shape, const std::string& arguments) {
  Kernel& kernel = object.kernel();
  const auto shared = static_cast<std::size_t>(kernel.shared_end - kernel.shared_begin);
  if (shared > kMostStaticShared) {
    throw std::runtime_error("a kernel may have 48 KiB of static shared memory; it has " +
                             std::to_string(shared) + " bytes");
  }
  // What lies behind it up to the end of the page belongs to nobody.
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto end = reinterpret_cast<std::uintptr_t>(kernel.shared_end);
  const std::size_t behind = shared > 0 ? (page - end % page) % page : 0;
  std::memset(kernel.shared_end, kBehindShared, behind);
  {
    Runner runner(kernel, shape, arguments);
    const FaultWatch watch([](const std::string& what) { running->fail(what); },
                           [] { running->sleep(); });
    runner.run();
    if (const auto place = unseen_writes()) throw std::runtime_error("it writes " + *place);
  }
  const auto* byte = reinterpret_cast<unsigned char*>(kernel.shared_end);
  if (std::any_of(byte, byte + behind, [](unsigned char b) { return b != kBehindShared; })) {
    throw std::runtime_error("it writes behind the end of its static shared memory");
  }
}

}  // namespace torchkiln::emulator
