// Device code under g++: every CUDA thread of a block is a fiber, blocks run one after the other.
//
// A barrier is passed when every thread of the block has reached the same one; a warp primitive
// when every lane that its mask names has. Anything else is an error that names what waits: see
// gose_emulate_error(). Shared memory is new and poisoned for every block, and of exact size, so
// that AddressSanitizer sees its bounds. Orders of blocks and threads: forward, reverse, random,
// warp by warp. Not modelled: the memory model between threads that run at once, PTX, time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned count() const { return x * y * z; }
};

namespace gose::emulate {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr int kPoison = 0xFF;  // NaN in every float format

// kWarps: a warp goes on alone until its threads return or wait for the block.
enum class Order { kForward, kReverse, kRandom, kWarps };
enum class State { kReady, kBarrier, kWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kDone;
  const char* site = "";  // what it waits for
  unsigned mask = 0;
  int turn = 0;  // of the two exchange buffers
  void* fake_stack = nullptr;
};

struct Warp {
  uint64_t value[2][kWarpSize];
};

// The one grid that runs: a launch is synchronous and the process has one of it.
struct Machine {
  dim3 grid, block, block_index, thread_index;
  Order order = Order::kForward;
  unsigned lane_index = 0, current = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<std::pair<const char*, int>, std::unique_ptr<char[]>> shared;
  std::string error;
  ucontext_t scheduler;
  void* scheduler_stack = nullptr;
  size_t scheduler_bytes = 0;
  std::mt19937 random{0};
  void (*run)(const void*) = nullptr;
  const void* argument = nullptr;
};

inline Machine& machine() {
  static Machine one;
  return one;
}

// Back to the scheduler; returns when this thread goes on.
inline void wait(State state, const char* site, unsigned mask) {
  Machine& m = machine();
  Fiber& me = m.fibers[m.current];
  me.state = state;
  me.site = site;
  me.mask = mask;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&me.fake_stack, m.scheduler_stack, m.scheduler_bytes);
#endif
  swapcontext(&me.context, &m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me.fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &m.scheduler_bytes);
  m.scheduler_stack = const_cast<void*>(bottom);
#endif
  m.run(m.argument);
  m.fibers[m.current].state = State::kDone;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, m.scheduler_stack, m.scheduler_bytes);
#endif
  setcontext(&m.scheduler);
}

inline void resume(unsigned thread) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[thread];
  m.current = thread;
  m.lane_index = thread % kWarpSize;
  m.thread_index =
      dim3(thread % m.block.x, thread / m.block.x % m.block.y, thread / (m.block.x * m.block.y));
#if defined(__SANITIZE_ADDRESS__)
  void* mine = nullptr;
  __sanitizer_start_switch_fiber(&mine, fiber.stack.get(), kStackBytes);
#endif
  swapcontext(&m.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
#endif
}

inline void sort_by_order(std::vector<unsigned>& ids) {
  Machine& m = machine();
  for (unsigned i = 0; i < ids.size(); ++i) ids[i] = i;
  if (m.order == Order::kReverse) std::reverse(ids.begin(), ids.end());
  if (m.order == Order::kRandom) std::shuffle(ids.begin(), ids.end(), m.random);
}

// Lets lanes go on whose whole mask has arrived; true if any did.
inline bool release_warps() {
  Machine& m = machine();
  bool any = false;
  const unsigned count = unsigned(m.fibers.size());
  for (unsigned first = 0; first < count; first += kWarpSize) {
    for (unsigned t = first; t < std::min(count, first + kWarpSize); ++t) {
      if (m.fibers[t].state != State::kWarp) continue;
      const unsigned mask = m.fibers[t].mask;
      bool complete = (mask >> (t - first)) & 1;
      for (unsigned lane = 0; lane < kWarpSize && complete; ++lane) {
        if (!((mask >> lane) & 1)) continue;
        // A lane that has returned, or that the block does not have, takes no part.
        if (first + lane >= count || m.fibers[first + lane].state == State::kDone) continue;
        const Fiber& other = m.fibers[first + lane];
        complete =
            other.state == State::kWarp && other.mask == mask && other.site == m.fibers[t].site;
      }
      if (!complete) continue;
      for (unsigned lane = 0; lane < kWarpSize && first + lane < count; ++lane) {
        Fiber& other = m.fibers[first + lane];
        if (((mask >> lane) & 1) && other.state == State::kWarp) other.state = State::kReady;
      }
      any = true;
    }
  }
  return any;
}

inline bool release_barrier() {
  Machine& m = machine();
  const char* site = nullptr;
  for (const Fiber& fiber : m.fibers) {
    if (fiber.state != State::kBarrier || (site != nullptr && fiber.site != site)) return false;
    site = fiber.site;
  }
  for (Fiber& fiber : m.fibers) fiber.state = State::kReady;
  return true;
}

inline void run_block() {
  Machine& m = machine();
  m.shared.clear();
  const unsigned threads = m.block.count();
  m.warps.resize((threads + kWarpSize - 1) / kWarpSize);
  if (m.fibers.size() != threads) m.fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : m.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &m.scheduler;
    fiber.state = State::kReady;
    fiber.turn = 0;
    makecontext(&fiber.context, &fiber_main, 0);
  }
  std::vector<unsigned> ids(threads);
  while (true) {
    bool ran = false, waits = false;
    sort_by_order(ids);
    const auto ready = [&](unsigned id) { return m.fibers[id].state == State::kReady; };
    const auto first = std::find_if(ids.begin(), ids.end(), ready);
    for (unsigned thread : ids) {
      if (!ready(thread)) continue;
      if (m.order == Order::kWarps && thread / kWarpSize != *first / kWarpSize) continue;
      resume(thread);
      ran = true;
    }
    for (const Fiber& fiber : m.fibers) waits |= fiber.state != State::kDone;
    if (!waits) return;
    if (release_warps() || release_barrier() || ran) continue;
    m.error = "block (" + std::to_string(m.block_index.x) + ", " + std::to_string(m.block_index.y) +
              ") cannot go on:";
    for (unsigned t = 0; t < threads; ++t) {
      if (t > 0 && m.fibers[t].state == m.fibers[t - 1].state) continue;
      const State state = m.fibers[t].state;
      m.error += " thread " + std::to_string(t) +
                 (state == State::kDone ? " has returned;"
                                        : std::string(" waits in ") + m.fibers[t].site + ";");
    }
    return;
  }
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, const Params& p) {
  struct Call {
    void (*kernel)(Params);
    Params params;
  } call = {kernel, p};
  Machine& m = machine();
  m.grid = grid;
  m.block = block;
  m.argument = &call;
  m.run = [](const void* argument) {
    const Call& c = *static_cast<const Call*>(argument);
    c.kernel(c.params);
  };
  m.error.clear();
  std::vector<unsigned> ids(grid.count());
  sort_by_order(ids);
  for (unsigned id : ids) {
    m.block_index = dim3(id % grid.x, id / grid.x % grid.y, id / (grid.x * grid.y));
    run_block();
    if (!m.error.empty()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// The block's array that stands at this place of the source.
template <class T>
T* shared_array(const char* file, int line, size_t count) {
  std::unique_ptr<char[]>& bytes = machine().shared[{file, line}];
  if (bytes == nullptr) {
    bytes.reset(new char[count * sizeof(T)]);
    std::memset(bytes.get(), kPoison, count * sizeof(T));
  }
  return reinterpret_cast<T*>(bytes.get());
}

// Every lane's value, once all lanes of the mask have brought theirs; others hold 0.
template <class T>
void exchange(const char* site, unsigned mask, T mine, T (&all)[kWarpSize]) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Machine& m = machine();
  const unsigned lane = m.lane_index;
  Warp& warp = m.warps[m.current / kWarpSize];
  Fiber& me = m.fibers[m.current];
  const int turn = me.turn ^= 1;  // a lane may bring its next value before others read this one
  std::memcpy(&warp.value[turn][lane], &mine, sizeof(T));
  wait(State::kWarp, site, mask);
  for (int i = 0; i < kWarpSize; ++i) {
    all[i] = T{};
    if ((mask >> i) & 1) std::memcpy(&all[i], &warp.value[turn][i], sizeof(T));
  }
}

}  // namespace gose::emulate

#define threadIdx (gose::emulate::machine().thread_index)
#define blockIdx (gose::emulate::machine().block_index)
#define blockDim (gose::emulate::machine().block)
#define gridDim (gose::emulate::machine().grid)

inline void syncthreads_at(const char* site) {
  gose::emulate::wait(gose::emulate::State::kBarrier, site, 0);
}
#define GOSE_TEXT_(x) #x
#define GOSE_TEXT(x) GOSE_TEXT_(x)
#define __syncthreads() syncthreads_at("__syncthreads at line " GOSE_TEXT(__LINE__))

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  gose::emulate::wait(gose::emulate::State::kWarp, "__syncwarp", mask);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int apart, int = 32) {
  T all[32];
  const unsigned lane = gose::emulate::machine().lane_index;
  gose::emulate::exchange("__shfl_xor_sync", mask, x, all);
  return all[lane ^ unsigned(apart)];
}
template <class T>
T __shfl_sync(unsigned mask, T x, int from, int = 32) {
  T all[32];
  gose::emulate::exchange("__shfl_sync", mask, x, all);
  return all[from & 31];
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned by, int = 32) {
  T all[32];
  const unsigned lane = gose::emulate::machine().lane_index;
  gose::emulate::exchange("__shfl_up_sync", mask, x, all);
  return lane >= by ? all[lane - by] : x;
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned by, int = 32) {
  T all[32];
  const unsigned lane = gose::emulate::machine().lane_index;
  gose::emulate::exchange("__shfl_down_sync", mask, x, all);
  return lane + by < 32 ? all[lane + by] : x;
}
inline unsigned __ballot_sync(unsigned mask, bool yes) {
  unsigned all[32], bits = 0;
  gose::emulate::exchange("__ballot_sync", mask, unsigned(yes), all);
  for (int i = 0; i < 32; ++i) bits |= all[i] << i;
  return bits;
}
inline bool __any_sync(unsigned mask, bool yes) { return __ballot_sync(mask, yes) != 0; }
inline bool __all_sync(unsigned mask, bool yes) { return !__any_sync(mask, !yes); }
template <class T>
unsigned __match_any_sync(unsigned mask, T x) {
  T all[32];
  unsigned bits = 0;
  gose::emulate::exchange("__match_any_sync", mask, x, all);
  for (int i = 0; i < 32; ++i) bits |= unsigned(((mask >> i) & 1) && all[i] == x) << i;
  return bits;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

using std::max;
using std::min;
