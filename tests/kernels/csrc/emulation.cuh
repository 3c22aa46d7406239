// Replaces kernels/csrc/primitives.cuh, and the CUDA built-ins that the kernels use, on a CPU under g++.
//
// The threads of a block are fibers; instructions of a whole warp synchronise its 32 fibers. Shared memory is watched.
// Errors that end the program, in whatever order the fibers ran: reading bytes that were never written, that are still
// being copied, or that another thread wrote without a barrier since; overwriting bytes that another thread may still
// read; an ldmatrix that visits one bank twice.

#pragma once

#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "arguments.h"

#define __device__
#define __host__
#define __global__ inline
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct dim3 {
  unsigned x, y;
};
inline dim3 threadIdx, blockIdx;
using std::max;
using std::min;

namespace emulation {

inline bool copies_come_early = false;  // otherwise as late as the waits allow
inline bool is_reversed = false;        // blocks, and warps within a block, run from the last to the first

[[noreturn]] inline void fail(const char* mistake) {
  std::fprintf(stderr, "emulation: %s (thread %u of block %u, %u)\n", mistake, threadIdx.x, blockIdx.x, blockIdx.y);
  _exit(3);
}

struct Copy {
  unsigned char* target;
  unsigned char bytes[16];
};

// Operations of the 32 threads of a warp, which run once all have arrived.
using Together = void (*)(void* const (&arguments)[32]);

struct Thread {
  enum { kRuns, kMeets, kWaits, kEnded } state = kRuns;  // kMeets: waits for its warp; kWaits: waits at the barrier
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  Together together = nullptr;
  void* argument = nullptr;
  std::vector<std::vector<Copy>> groups;  // copies that are not complete; the last group is still open
};

// State of 16 bytes of shared memory. Barriers divide time into epochs.
struct Watched {
  static constexpr int kNobody = -1, kSeveral = -2;
  int writer = kNobody, written_in = -1;
  int reader = kNobody, read_in = -1;
  bool is_on_its_way = false;
};

// The block of threads that runs; blocks run one after the other.
class Block {
 public:
  Block(int num_threads, int shared_bytes) : shared_bytes(shared_bytes), threads(num_threads) {
    void* memory;
    if (posix_memalign(&memory, 128, shared_bytes)) std::abort();
    shared = static_cast<unsigned char*>(memory);
  }
  ~Block() { std::free(shared); }

  void run(void (*kernel)()) {
    std::memset(shared, 0xff, shared_bytes);  // NaN in both half precisions
    watched.assign(shared_bytes / 16, {});
    epoch = 0;
    for (Thread& thread : threads) {
      thread.state = Thread::kRuns;
      thread.groups.assign(1, {});
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, kernel, 0);
    }
    const int warps = int(threads.size()) / 32;
    while (!all_are(Thread::kEnded)) {
      for (int warp = 0; warp < warps; ++warp) run_warp(is_reversed ? warps - 1 - warp : warp);
      if (!all_are(Thread::kEnded)) pass_barrier();
    }
  }

  void wait_at_barrier() {
    self().state = Thread::kWaits;
    suspend();
  }

  void meet(Together together, void* argument) {
    self().together = together;
    self().argument = argument;
    self().state = Thread::kMeets;
    Thread* warp = &threads[threadIdx.x / 32 * 32];
    for (int lane = 0; lane < 32; ++lane)
      if (warp[lane].state != Thread::kMeets) return suspend();
    void* arguments[32];
    for (int lane = 0; lane < 32; ++lane) {
      if (warp[lane].together != together) fail("a warp diverges");
      arguments[lane] = warp[lane].argument;
      warp[lane].state = Thread::kRuns;
    }
    together(arguments);
  }

  void begin_copy(void* target, const void* source, bool real) {
    Copy copy = {static_cast<unsigned char*>(target), {}};
    if (real) std::copy_n(static_cast<const unsigned char*>(source), 16, copy.bytes);
    Watched& place = watch(target);
    if (place.is_on_its_way) fail("two copies to one place are on their way");
    if (place.read_in == epoch && place.reader != int(threadIdx.x)) fail("overwrites what others may still read");
    place.is_on_its_way = true;
    if (copies_come_early) std::copy_n(copy.bytes, 16, copy.target);
    self().groups.back().push_back(copy);
  }

  void commit() { self().groups.emplace_back(); }

  void wait_for_copies(int pending) {
    auto& groups = self().groups;
    while (int(groups.size()) > pending + 1) {
      for (const Copy& copy : groups.front()) {
        std::copy_n(copy.bytes, 16, copy.target);
        Watched& place = watch(copy.target);
        place.is_on_its_way = false;
        place.writer = threadIdx.x;
        place.written_in = epoch;
      }
      groups.erase(groups.begin());
    }
  }

  void note_read(const void* source) {
    const int thread = threadIdx.x;
    Watched& place = watch(source);
    if (place.is_on_its_way) fail("reads what is still on its way");
    if (place.writer == Watched::kNobody) fail("reads what was never written");
    if (place.written_in == epoch && place.writer != thread) fail("reads what another thread wrote, without a barrier");
    const bool is_first = place.read_in != epoch || place.reader == thread;
    place.reader = is_first ? thread : Watched::kSeveral;
    place.read_in = epoch;
  }

  unsigned char* shared;

 private:
  Thread& self() { return threads[threadIdx.x]; }

  void suspend() {
    const unsigned index = threadIdx.x;
    swapcontext(&threads[index].context, &scheduler);
    threadIdx.x = index;
  }

  void run_warp(int warp) {
    for (bool has_run = true; has_run;) {
      has_run = false;
      for (threadIdx.x = 32 * warp; int(threadIdx.x) < 32 * warp + 32; ++threadIdx.x) {
        const unsigned index = threadIdx.x;
        if (self().state != Thread::kRuns) continue;
        swapcontext(&scheduler, &self().context);
        threadIdx.x = index;
        if (self().state == Thread::kRuns) end();
        has_run = true;
      }
    }
  }

  void end() {  // the kernel has returned
    for (const auto& group : self().groups)
      if (!group.empty()) fail("ends while copies are on their way");
    self().state = Thread::kEnded;
  }

  void pass_barrier() {
    if (!all_are(Thread::kWaits)) fail("waits for threads that do not come");
    for (Thread& thread : threads) thread.state = Thread::kRuns;
    ++epoch;
  }

  bool all_are(int state) const {
    return std::all_of(threads.begin(), threads.end(), [=](const Thread& thread) { return thread.state == state; });
  }

  Watched& watch(const void* place) {
    const std::ptrdiff_t offset = static_cast<const unsigned char*>(place) - shared;
    if (offset < 0 || offset >= shared_bytes) fail("an address outside of shared memory");
    if (offset % 16) fail("an address that is no multiple of 16");
    return watched[offset / 16];
  }

  const int shared_bytes;
  int epoch = 0;
  std::vector<Watched> watched;
  std::vector<Thread> threads;
  ucontext_t scheduler;
};

inline Block* block;

// Runs `kernel` in every thread of every block.
inline void launch(dim3 grid, int num_threads, int shared_bytes, void (*kernel)()) {
  Block every(num_threads, shared_bytes);
  block = &every;
  for (unsigned i = 0; i < grid.x * grid.y; ++i) {
    const unsigned index = is_reversed ? grid.x * grid.y - 1 - i : i;
    blockIdx = {index % grid.x, index / grid.x};
    every.run(kernel);
  }
}

template <typename Value>
Value shuffle(Value value, int bit) {
  struct Argument {
    Value value, received;
    int bit;
  } argument = {value, {}, bit};
  block->meet(
      [](void* const(&arguments)[32]) {
        for (int lane = 0; lane < 32; ++lane) {
          Argument& mine = *static_cast<Argument*>(arguments[lane]);
          mine.received = static_cast<Argument*>(arguments[lane ^ mine.bit])->value;
        }
      },
      &argument);
  return argument.received;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block->wait_at_barrier(); }
inline float __shfl_xor_sync(unsigned, float value, int bit) { return emulation::shuffle(value, bit); }
inline std::uint32_t __shfl_xor_sync(unsigned, std::uint32_t value, int bit) { return emulation::shuffle(value, bit); }

namespace beit3 {

template <typename To, typename From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

template <typename Element>
std::uint16_t round_to(float value) {
  if constexpr (std::is_same_v<Element, Float16>) return bits_as<std::uint16_t>(static_cast<_Float16>(value));
  const std::uint32_t bits = bits_as<std::uint32_t>(value);
  if (std::isnan(value)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <typename Element>
float widen(std::uint16_t bits) {
  if constexpr (std::is_same_v<Element, Float16>) return bits_as<_Float16>(bits);
  return bits_as<float>(std::uint32_t{bits} << 16);
}

template <typename Element>
std::uint32_t pack(float first, float second) {
  return round_to<Element>(first) | std::uint32_t{round_to<Element>(second)} << 16;
}

template <typename Element>
float2 unpack(std::uint32_t pair) {
  return {widen<Element>(pair & 0xffff), widen<Element>(pair >> 16)};
}

struct Matrices {
  std::uint32_t* pairs;
  const void* row;
};

// Reads element [row][column] of a matrix; lanes 8 * matrix to 8 * matrix + 7 gave the addresses of its rows.
inline std::uint32_t matrix_element(void* const (&arguments)[32], int matrix, int row, int column) {
  std::uint16_t bits;
  const void* start = static_cast<const Matrices*>(arguments[8 * matrix + row])->row;
  std::memcpy(&bits, static_cast<const unsigned char*>(start) + 2 * column, 2);
  return bits;
}

template <bool kTransposed>
void load_four_matrices(void* const (&arguments)[32]) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    for (int row = 0; row < 8; ++row) {
      const auto address = reinterpret_cast<std::uintptr_t>(static_cast<Matrices*>(arguments[8 * matrix + row])->row);
      banks |= 1u << address / 16 % 8;
    }
    if (banks != 0xff) emulation::fail("eight rows of a matrix share banks");
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const std::uint32_t first = matrix_element(arguments, matrix, kTransposed ? j : i, kTransposed ? i : j);
      const std::uint32_t second = matrix_element(arguments, matrix, kTransposed ? j + 1 : i, kTransposed ? i : j + 1);
      static_cast<Matrices*>(arguments[lane])->pairs[matrix] = first | second << 16;
    }
  }
}

inline void load_matrices(std::uint32_t (&pairs)[4], const void* row) {
  emulation::block->note_read(row);
  Matrices argument = {pairs, row};
  emulation::block->meet(load_four_matrices<false>, &argument);
}

inline void load_matrices_transposed(std::uint32_t (&pairs)[4], const void* row) {
  emulation::block->note_read(row);
  Matrices argument = {pairs, row};
  emulation::block->meet(load_four_matrices<true>, &argument);
}

struct Product {
  float* sum;
  const std::uint32_t* a;
  std::uint32_t b[2];
};

// Element positions follow the PTX manual, section "Matrix fragments for mma.m16n8k16".
template <typename Element>
void multiply_matrices(void* const (&arguments)[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& mine = *static_cast<Product*>(arguments[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const float2 values = unpack<Element>(mine.a[i]);
      a[g + i % 2 * 8][2 * t + i / 2 * 8] = values.x;
      a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = values.y;
    }
    for (int i = 0; i < 2; ++i) {
      const float2 values = unpack<Element>(mine.b[i]);
      b[2 * t + 8 * i][g] = values.x;
      b[2 * t + 8 * i + 1][g] = values.y;
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* sum = static_cast<Product*>(arguments[lane])->sum;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) sum[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
  }
}

template <typename Element>
void multiply_add(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b_upper, std::uint32_t b_lower) {
  Product argument = {sum, a, {b_upper, b_lower}};
  emulation::block->meet(multiply_matrices<Element>, &argument);
}

inline void copy_async(void* shared, const void* global, bool real) {
  emulation::block->begin_copy(shared, global, real);
}

inline void commit_copies() { emulation::block->commit(); }

template <int kPending>
void wait_for_copies() {
  emulation::block->wait_for_copies(kPending);
}

inline unsigned char* shared_memory() { return emulation::block->shared; }

}  // namespace beit3
