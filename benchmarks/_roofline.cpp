// What one machine can do at most, for the floors of benchmarks: reading memory, and multiplying in
// registers on random operands (zeros draw less power and clock higher). One thread per core.
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

using Work = void (*)(const void* operands, int64_t count);

// 16 KB of operands. A float is in [1, 2) with a random sign, a bfloat16 likewise.
struct Operands {
  alignas(64) uint32_t word[4096];
  explicit Operands(bool bfloat16) {
    uint64_t state = 88172645463325252ull;
    for (uint32_t& w : word) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      w = bfloat16 ? (uint32_t(state) & 0x807f807fu) | 0x3f803f80u
                   : (uint32_t(state) & 0x807fffffu) | 0x3f800000u;
    }
  }
};

volatile float sink;

// 12 sums hide the latency of two units; the products are of opposite signs or bounded in number,
// so that nothing overflows to inf.
#define EACH_SUM(do) \
  do (0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)

__attribute__((target("avx2,fma"))) void fma_avx2(const void* operands, int64_t count) {
  const float* x = static_cast<const float*>(operands);
  __m256 a = _mm256_load_ps(x), b = _mm256_load_ps(x + 8);
#define INIT(i) __m256 s##i = _mm256_load_ps(x + 16 + 8 * i);
  EACH_SUM(INIT)
#undef INIT
  for (int64_t n = 0; n < count; ++n) {
#define STEP(i) s##i = _mm256_fmadd_ps(a, b, s##i);
    EACH_SUM(STEP)
#undef STEP
    asm volatile("" : "+x"(a), "+x"(b));
  }
#define ADD(i) a = _mm256_add_ps(a, s##i);
  EACH_SUM(ADD)
#undef ADD
  sink = _mm256_cvtss_f32(a);
}

__attribute__((target("avx512f"))) void fma_avx512(const void* operands, int64_t count) {
  const float* x = static_cast<const float*>(operands);
  __m512 a = _mm512_load_ps(x), b = _mm512_load_ps(x + 16);
#define INIT(i) __m512 s##i = _mm512_load_ps(x + 32 + 16 * i);
  EACH_SUM(INIT)
#undef INIT
  for (int64_t n = 0; n < count; ++n) {
#define STEP(i) s##i = _mm512_fmadd_ps(a, b, s##i);
    EACH_SUM(STEP)
#undef STEP
    asm volatile("" : "+v"(a), "+v"(b));
  }
#define ADD(i) a = _mm512_add_ps(a, s##i);
  EACH_SUM(ADD)
#undef ADD
  sink = _mm512_cvtss_f32(a);
}

__attribute__((target("avx512f,avx512bf16"))) void dpbf16(const void* operands, int64_t count) {
  const float* x = static_cast<const float*>(operands);
  __m512i a = _mm512_load_si512(x), b = _mm512_load_si512(x + 16);
#define INIT(i) __m512 s##i = _mm512_setzero_ps();
  EACH_SUM(INIT)
#undef INIT
  for (int64_t n = 0; n < count; ++n) {
#define STEP(i) s##i = _mm512_dpbf16_ps(s##i, (__m512bh)a, (__m512bh)b);
    EACH_SUM(STEP)
#undef STEP
    asm volatile("" : "+v"(a), "+v"(b));
  }
  __m512 sum = _mm512_setzero_ps();
#define ADD(i) sum = _mm512_add_ps(sum, s##i);
  EACH_SUM(ADD)
#undef ADD
  sink = _mm512_cvtss_f32(sum);
}

__attribute__((target("amx-tile,amx-bf16"))) void amx(const void* operands, int64_t count) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  // GCC 12 declares 8 bytes of the operand as read and would drop the rest of the struct.
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
  const char* x = static_cast<const char*>(operands);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, x, 64);
  _tile_loadd(5, x + 1024, 64);
  _tile_loadd(6, x + 2048, 64);
  _tile_loadd(7, x + 3072, 64);
  for (int64_t n = 0; n < count; ++n) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

__attribute__((target("avx2"))) void read_memory(const void* memory, int64_t bytes) {
  // Four streams, as one alone leaves the memory idle between pages.
  const char* p = static_cast<const char*>(memory);
  const int64_t quarter = bytes / 4 / 64 * 64;
  __m256i sum[8];
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  for (int64_t i = 0; i < quarter; i += 64) {
    for (int k = 0; k < 4; ++k) {
      const char* line = p + k * quarter + i;
      _mm_prefetch(line + 512, _MM_HINT_T0);
      sum[2 * k] = _mm256_xor_si256(sum[2 * k], _mm256_load_si256((const __m256i*)line));
      sum[2 * k + 1] =
          _mm256_xor_si256(sum[2 * k + 1], _mm256_load_si256((const __m256i*)(line + 32)));
    }
  }
  for (int k = 1; k < 8; ++k) sum[0] = _mm256_xor_si256(sum[0], sum[k]);
  sink = float(_mm256_extract_epi32(sum[0], 0));
}

bool has_amx() {
  if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */)) return false;
  unsigned a = 7, b = 0, c = 0, d = 0;
  asm volatile("cpuid" : "+a"(a), "+b"(b), "+c"(c), "+d"(d));
  return (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
}

struct Unit {
  const char* name;
  Work work;
  double flops;  // of one count
  bool bfloat16;
};
const Unit UNITS[] = {
    {"fma_avx2", fma_avx2, 12 * 16, false},
    {"fma_avx512", fma_avx512, 12 * 32, false},
    {"dpbf16_avx512", dpbf16, 12 * 64, true},
    {"amx_bf16", amx, 4 * 2 * 16 * 16 * 32, true},
};

bool runs(const Unit& unit) {
  __builtin_cpu_init();
  if (unit.work == fma_avx2) return __builtin_cpu_supports("fma");
  if (unit.work == fma_avx512) return __builtin_cpu_supports("avx512f");
  if (unit.work == dpbf16) return __builtin_cpu_supports("avx512bf16");
  return has_amx();
}

// Seconds from the first thread's start to the last one's end, each on a core of its own. They take
// the times: a main thread that has no core left would look at the clock too late.
template <class F>
double seconds(int threads, F work) {
  using Clock = std::chrono::steady_clock;
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof allowed, &allowed);
  std::vector<int> core;
  for (int c = 0; c < CPU_SETSIZE; ++c)
    if (CPU_ISSET(c, &allowed)) core.push_back(c);
  pthread_barrier_t start;
  pthread_barrier_init(&start, nullptr, threads);
  std::vector<Clock::time_point> begin(threads), end(threads);
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      cpu_set_t mine;
      CPU_ZERO(&mine);
      CPU_SET(core[t % core.size()], &mine);
      sched_setaffinity(0, sizeof mine, &mine);
      pthread_barrier_wait(&start);
      begin[t] = Clock::now();
      work(t);
      end[t] = Clock::now();
    });
  for (std::thread& thread : team) thread.join();
  pthread_barrier_destroy(&start);
  const std::chrono::duration<double> taken =
      *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end());
  return taken.count();
}

}  // namespace

extern "C" {

// Name of unit i where this machine has it, "" where not, null past the last.
const char* unit_name(int i) {
  if (i < 0 || i >= int(sizeof UNITS / sizeof UNITS[0])) return nullptr;
  return runs(UNITS[i]) ? UNITS[i].name : "";
}

// FLOP/s of unit i on `threads` threads, over about `wanted` seconds.
double flops(int i, int threads, double wanted) {
  const Unit& unit = UNITS[i];
  const Operands operands(unit.bfloat16);
  const int64_t trial = 20000;
  // The first run may wake the cores: the second one tells how much to do.
  for (int k = 0; k < 2; ++k) {
    const double taken = seconds(threads, [&](int) { unit.work(operands.word, trial); });
    if (k == 0) continue;
    const int64_t count = int64_t(trial * (wanted / taken)) + trial;
    const double time = seconds(threads, [&](int) { unit.work(operands.word, count); });
    return threads * unit.flops * double(count) / time;
  }
  return 0;
}

// Bytes/s at which `threads` threads read `bytes` of memory between them.
double bandwidth(const void* memory, int64_t bytes, int threads) {
  const int64_t share = bytes / threads / 4096 * 4096;
  const char* begin = static_cast<const char*>(memory);
  const double time = seconds(threads, [&](int t) { read_memory(begin + t * share, share); });
  return double(share) * threads / time;
}

}  // extern "C"
