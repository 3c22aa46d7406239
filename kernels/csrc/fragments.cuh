// Places tiles in shared memory, loads operands of products from them, and reorders a warp's results before a write.

#pragma once

#include <cstdint>

#include "primitives.cuh"

namespace beit3 {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kChunk = 8;  // numbers in 16 bytes, which one thread copies; rows are aligned to them

struct alignas(16) Chunk {
  std::uint32_t pairs[4];
};

// Rows of `kColumns` numbers without gaps. The chunks of a row are permuted by exclusive or, so that one column of
// chunks in eight consecutive rows covers all 32 banks: `load_matrices` reads it at once.
template <int kColumns>
struct SwizzledTile {
  static constexpr int kChunks = kColumns / kChunk;
  static_assert(kChunks == 2 || kChunks == 4 || kChunks == 8, "a row is a part of 128 bytes");

  __host__ __device__ static constexpr int bytes(int rows) { return rows * kChunks * 16; }
  __device__ static int offset(int row, int chunk) {
    return 16 * (row * kChunks + (chunk ^ (row * kChunks / 8 % kChunks)));
  }
};

// Rows of `kColumns` numbers, a multiple of 16, with a gap that makes the row stride an odd number of chunks. This too
// avoids bank conflicts, for row lengths that are no power of two.
template <int kColumns>
struct PaddedTile {
  static constexpr int kChunks = kColumns / kChunk;
  static_assert(kColumns % 16 == 0, "a matrix product takes 16 columns at once");

  __host__ __device__ static constexpr int bytes(int rows) { return rows * (kChunks | 1) * 16; }
  __device__ static int offset(int row, int chunk) { return 16 * (row * (kChunks | 1) + chunk); }
};

// Reads the left operand of `multiply_add`: 16 rows of a tile starting at `row`, two chunks starting at `chunk`.
template <typename Tile>
__device__ __forceinline__ void load_left(std::uint32_t (&a)[4], const unsigned char* tile, int row, int chunk) {
  const int lane = threadIdx.x % kWarp;
  load_matrices(a, tile + Tile::offset(row + lane % 16, chunk + lane / 16));
}

// Reads the right operands of two products. Columns of an operand are rows of the tile: b[0] and b[1] are the first
// eight rows, b[2] and b[3] the next eight.
template <typename Tile>
__device__ __forceinline__ void load_right(std::uint32_t (&b)[4], const unsigned char* tile, int row, int chunk) {
  const int lane = threadIdx.x % kWarp;
  load_matrices(b, tile + Tile::offset(row + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
}

// Reads the right operands of two products. Columns of an operand are columns of the tile.
template <typename Tile>
__device__ __forceinline__ void load_right_transposed(std::uint32_t (&b)[4], const unsigned char* tile, int row,
                                                      int chunk) {
  const int lane = threadIdx.x % kWarp;
  load_matrices_transposed(b, tile + Tile::offset(row + lane % 16, chunk + lane / 16));
}

// Transposes pairs among four neighbouring threads: pair p of thread t becomes pair t of thread p. Before, each thread
// holds two columns of four products; afterwards, 8 columns of one product, 16 bytes that are written at once.
__device__ __forceinline__ void transpose_quad(std::uint32_t (&pairs)[4]) {
  const int lane = threadIdx.x;
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const std::uint32_t received = __shfl_xor_sync(kWholeWarp, upper ? pairs[i] : pairs[i | bit], bit);
      (upper ? pairs[i] : pairs[i | bit]) = received;
    }
  }
}

}  // namespace beit3
