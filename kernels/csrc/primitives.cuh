// Hardware instructions that the kernels use beyond CUDA's built-ins, for sm_80 and up.
//
// The tests compile the kernels' headers for the CPU and replace this header by one with the same names
// (tests/kernels/csrc/emulation.cuh). So this file contains only what cannot be tested without a GPU.

#pragma once

#include <cstdint>

#include "arguments.h"

namespace beit3 {

// A register holds a pair of half-precision numbers, the first in its lower half.

// Packs two numbers, rounded to nearest with ties to even.
template <typename Element>
__device__ __forceinline__ std::uint32_t pack(float first, float second);

template <>
__device__ __forceinline__ std::uint32_t pack<BFloat16>(float first, float second) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

template <>
__device__ __forceinline__ std::uint32_t pack<Float16>(float first, float second) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

template <typename Element>
__device__ __forceinline__ float2 unpack(std::uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack<BFloat16>(std::uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

template <>
__device__ __forceinline__ float2 unpack<Float16>(std::uint32_t pair) {
  float2 values;
  asm("{.reg .f16 first, second; mov.b32 {first, second}, %2; cvt.f32.f16 %0, first; cvt.f32.f16 %1, second;}"
      : "=f"(values.x), "=f"(values.y)
      : "r"(pair));
  return values;
}

// Reads four 8 x 8 matrices with 16-byte rows from shared memory, by the 32 threads of a warp. Thread l passes the
// address of row l % 8 of matrix l / 8, and receives from every matrix the pair in row l / 4, columns 2 (l % 4) and the
// next.
__device__ __forceinline__ void load_matrices(std::uint32_t (&pairs)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Reads four 8 x 8 matrices like `load_matrices`, but thread l receives column l / 4 of rows 2 (l % 4) and the next.
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&pairs)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Computes sum (16 x 8) += a (16 x 16) @ b (16 x 8), by the 32 threads of a warp. With g = l / 4 and t = l % 4,
// thread l holds
//   of sum: [g][2t], [g][2t + 1], [g + 8][2t], [g + 8][2t + 1]
//   of a: pairs from [g][2t], [g + 8][2t], [g][2t + 8], [g + 8][2t + 8] on
//   of b: [2t][g] and [2t + 1][g] as a pair, [2t + 8][g] and [2t + 9][g] as another.
template <typename Element>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b_upper,
                                             std::uint32_t b_lower);

template <>
__device__ __forceinline__ void multiply_add<BFloat16>(float (&sum)[4], const std::uint32_t (&a)[4],
                                                       std::uint32_t b_upper, std::uint32_t b_lower) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_upper), "r"(b_lower));
}

template <>
__device__ __forceinline__ void multiply_add<Float16>(float (&sum)[4], const std::uint32_t (&a)[4],
                                                      std::uint32_t b_upper, std::uint32_t b_lower) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_upper), "r"(b_lower));
}

// Starts a copy of 16 bytes from global to shared memory. If `real` is false, writes 16 zero bytes and reads nothing.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<std::uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global)), "r"(real ? 16 : 0)
               : "memory");
}

// Closes a group of the copies that this thread started since the last group; a group may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread but the latest `kPending`. Other threads see the data after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Returns the shared memory, whose size the launch sets, aligned to all 32 banks.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

}  // namespace beit3
