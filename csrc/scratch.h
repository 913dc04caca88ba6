// Memory that kernels need during a call, kept between calls: a fresh allocation of this size would
// be mapped, zeroed and unmapped page by page every time, which costs more than the work in it.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(data, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(data, bytes)
#endif

namespace gose {

// Asks for 2 MB pages where the range holds any; the answer does not matter.
inline void advise_huge_pages(void* data, int64_t bytes) {
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
#if defined(MADV_HUGEPAGE)
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

class ScratchPool {
 public:
  struct Buffer {
    char* data;
    int64_t bytes;
  };

  // Not kept beyond this: larger buffers, and more of them than this in all.
  static constexpr int64_t kKept = int64_t{512} << 20;

  static ScratchPool& of_process() {
    static ScratchPool* pool = new ScratchPool;  // outlives every thread
    return *pool;
  }

  Buffer take(int64_t bytes) {
    // A child forked while another thread held the lock never gets it: it allocates instead.
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      // The smallest that fits: a large one is left for who needs it, and calls that take several
      // find again what they gave back.
      size_t best = free_.size();
      for (size_t i = 0; i < free_.size(); ++i) {
        if (free_[i].bytes >= bytes && (best == free_.size() || free_[i].bytes < free_[best].bytes))
          best = i;
      }
      if (best < free_.size()) {
        const Buffer found = free_[best];
        free_.erase(free_.begin() + best);
        held_ -= found.bytes;
        ASAN_UNPOISON_MEMORY_REGION(found.data, bytes);
        return found;
      }
      // The largest was outgrown: it goes before a larger one comes, not after.
      const auto largest = std::max_element(free_.begin(), free_.end(),
                                            [](Buffer a, Buffer b) { return a.bytes < b.bytes; });
      if (largest != free_.end()) {
        held_ -= largest->bytes;
        drop(*largest);
        free_.erase(largest);
      }
    }
    const int64_t rounded = bytes < kHuge ? (bytes + 4096) / 4096 * 4096
                                          : (bytes + bytes / 8 + kHuge - 1) / kHuge * kHuge;
    void* data = rounded < kHuge ? aligned_alloc(4096, size_t(rounded)) : map(rounded);
    if (data == nullptr) throw std::bad_alloc();
    // Under AddressSanitizer a call may touch the bytes it asked for, while it has them.
    ASAN_POISON_MEMORY_REGION(static_cast<char*>(data) + bytes, rounded - bytes);
    return {static_cast<char*>(data), rounded};
  }

  void give_back(Buffer buffer) {
    if (const std::unique_lock lock(mutex_, std::try_to_lock);
        lock && held_ + buffer.bytes <= kKept) {
      // What is smaller than this one was outgrown.
      while (!free_.empty() && free_.back().bytes < buffer.bytes && free_.size() > 7) drop_last();
      ASAN_POISON_MEMORY_REGION(buffer.data, buffer.bytes);
      free_.push_back(buffer);
      held_ += buffer.bytes;
      return;
    }
    drop(buffer);
  }

  int64_t held() const { return held_; }

  void release() {
    const std::lock_guard lock(mutex_);
    while (!free_.empty()) drop_last();
  }

 private:
  static constexpr int64_t kHuge = int64_t{1} << 21;

  // On whole huge pages; null where there is no memory. From the system, not from malloc: what is
  // dropped goes back at once, however the heap is tuned.
  static void* map(int64_t bytes) {
    const auto at = [](void* p, int64_t offset) { return static_cast<char*>(p) + offset; };
    void* data = mmap(nullptr, size_t(bytes + kHuge), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    const int64_t before = int64_t(-uintptr_t(data) & uintptr_t(kHuge - 1));
    if (before > 0) munmap(data, size_t(before));
    if (before < kHuge) munmap(at(data, before + bytes), size_t(kHuge - before));
    advise_huge_pages(at(data, before), bytes);
    return at(data, before);
  }

  static void drop(Buffer buffer) {
    ASAN_UNPOISON_MEMORY_REGION(buffer.data, buffer.bytes);
    if (buffer.bytes < kHuge) return free(buffer.data);
    munmap(buffer.data, size_t(buffer.bytes));
  }

  void drop_last() {
    held_ -= free_.back().bytes;
    drop(free_.back());
    free_.pop_back();
  }

  std::mutex mutex_;
  std::vector<Buffer> free_;
  int64_t held_ = 0;
};

class Scratch {
 public:
  explicit Scratch(int64_t bytes) : buffer_(ScratchPool::of_process().take(bytes)) {}
  ~Scratch() { ScratchPool::of_process().give_back(buffer_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return buffer_.data; }

 private:
  ScratchPool::Buffer buffer_;
};

}  // namespace gose
