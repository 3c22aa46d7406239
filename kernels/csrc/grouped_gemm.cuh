// Computes the up projections of all experts in one launch: u = x @ W_e^T + b_e for the rows of every expert e, and
// a = GELU(u).
//
// T packed rows, D input width, F output width.
//
// Products are mma.sync m16n8k16 with float32 sums. Tiles of x and W come through a ring of stages in shared memory,
// filled by cp.async: while one stage is multiplied, the next ones are copied. One barrier per stage tells both that a
// stage has arrived and that the previous one may be overwritten.

#pragma once

#include <cstdint>

#include "arguments.h"
#include "fragments.cuh"

namespace beit3 {

// A block of threads computes kTileRows x kTileColumns of u, and each of its warps computes kWarpRows x kWarpColumns. A
// tile of `arguments.tiles` has at most kTileRows rows.
template <typename Element_, int kTileRows, int kTileColumns, int kTileDepth, int kStages, int kWarpRows,
          int kWarpColumns>
struct GroupedGemm {
  using Element = Element_;
  using Arguments = GroupedGemmArguments<Element>;
  using Tile = SwizzledTile<kTileDepth>;

  static constexpr int kWarpsDown = kTileRows / kWarpRows;
  static constexpr int kThreads = kWarp * kWarpsDown * (kTileColumns / kWarpColumns);
  static constexpr int kStageBytes = Tile::bytes(kTileRows) + Tile::bytes(kTileColumns);
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kRowFragments = kWarpRows / 16;
  static constexpr int kColumnFragments = kWarpColumns / 8;
  static_assert(kTileRows % kWarpRows == 0 && kTileColumns % kWarpColumns == 0, "warps divide the tile");
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 32 == 0, "four products are written together");
  static_assert(kStages >= 2, "one stage comes while another is multiplied");

  using Sums = float[kRowFragments][kColumnFragments][4];

  static int blocks(int num_tiles, int output_width) { return num_tiles * column_tiles(output_width); }

  __device__ static void run(const Arguments& arguments) {
    const Place place = place_of(arguments, blockIdx.x);
    const int steps = (arguments.input_width + kTileDepth - 1) / kTileDepth;
    Sums sums = {};
    for (int step = 0; step < kStages - 1; ++step) fetch(arguments, place, step, steps);
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 2>();
      __syncthreads();
      fetch(arguments, place, step + kStages - 1, steps);
      multiply(sums, shared_memory() + step % kStages * kStageBytes);
    }
    write(arguments, place, sums);
  }

 private:
  struct Place {
    int expert, first_row, stop_row, first_column;
  };

  __host__ __device__ static int column_tiles(int output_width) {
    return (output_width + kTileColumns - 1) / kTileColumns;
  }

  // Returns a block's expert, rows and first column. Blocks that run together compute all columns of eight row tiles.
  // They read few rows of x and W, which therefore stay in the L2 cache.
  __device__ static Place place_of(const Arguments& arguments, int block) {
    constexpr int kTogether = 8;
    const int in_group = kTogether * column_tiles(arguments.output_width);
    const int first = block / in_group * kTogether;
    const int height = min(kTogether, arguments.num_tiles - first);
    const int* tile = arguments.tiles + 3 * (first + block % in_group % height);
    return {tile[0], tile[1], tile[2], block % in_group / height * kTileColumns};
  }

  // Starts to copy a step's tiles of x and W. Closes a group of copies even after the last step: waits count groups.
  __device__ static void fetch(const Arguments& arguments, const Place& place, int step, int steps) {
    if (step < steps) {
      unsigned char* stage = shared_memory() + step % kStages * kStageBytes;
      const int width = arguments.input_width;
      copy_rows<kTileRows>(stage, arguments.x, place.first_row, place.stop_row, step * kTileDepth, width);
      copy_rows<kTileColumns>(stage + Tile::bytes(kTileRows), arguments.weights[place.expert], place.first_column,
                              arguments.output_width, step * kTileDepth, width);
    }
    commit_copies();
  }

  // Copies rows [first, first + kRows) of kTileDepth columns, with zeros from row `stop` and from column `width` on.
  template <int kRows>
  __device__ static void copy_rows(unsigned char* tile, const Element* matrix, int first, int stop, int first_column,
                                   int width) {
    static_assert(kRows * Tile::kChunks % kThreads == 0, "every thread copies alike");
#pragma unroll
    for (int i = 0; i < kRows * Tile::kChunks; i += kThreads) {
      const int index = i + threadIdx.x;
      const int row = first + index / Tile::kChunks;
      const int chunk = index % Tile::kChunks;
      const int column = first_column + chunk * kChunk;
      const bool real = row < stop && column < width;
      const Element* source = matrix + (real ? std::int64_t{row} * width + column : 0);
      copy_async(tile + Tile::offset(index / Tile::kChunks, chunk), source, real);
    }
  }

  __device__ static int warp_row() { return threadIdx.x / kWarp % kWarpsDown * kWarpRows; }
  __device__ static int warp_column() { return threadIdx.x / kWarp / kWarpsDown * kWarpColumns; }

  __device__ static void multiply(Sums& sums, const unsigned char* stage) {
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
      std::uint32_t a[kRowFragments][4];
      std::uint32_t b[kColumnFragments / 2][4];
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) load_left<Tile>(a[i], stage, warp_row() + 16 * i, chunk);
#pragma unroll
      for (int j = 0; j < kColumnFragments / 2; ++j)
        load_right<Tile>(b[j], stage + Tile::bytes(kTileRows), warp_column() + 16 * j, chunk);
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnFragments; ++j)
          multiply_add<Element>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // The GELU is computed from u as stored, so that a backward pass recomputes the same numbers.
  __device__ static void write(const Arguments& arguments, const Place& place, const Sums& sums) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int j = 0; j < kColumnFragments; j += 4) {
      const int column = place.first_column + warp_column() + 8 * j;
      float2 bias[4];
#pragma unroll
      for (int p = 0; p < 4; ++p) bias[p] = bias_of(arguments, place.expert, column + 8 * p + lane % 4 * 2);
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = place.first_row + warp_row() + 16 * i + 8 * half + lane / 4;
          std::uint32_t pairs[4];
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            const float* sum = sums[i][j + p] + 2 * half;
            pairs[p] = pack<Element>(sum[0] + bias[p].x, sum[1] + bias[p].y);
          }
          std::uint32_t activated[4] = {gelu(pairs[0]), gelu(pairs[1]), gelu(pairs[2]), gelu(pairs[3])};
          write_row(arguments, arguments.u, pairs, row, place.stop_row, column);
          if (arguments.a) write_row(arguments, arguments.a, activated, row, place.stop_row, column);
        }
      }
    }
  }

  __device__ static float2 bias_of(const Arguments& arguments, int expert, int column) {
    if (column >= arguments.output_width) return {0.0f, 0.0f};
    return unpack<Element>(*reinterpret_cast<const std::uint32_t*>(arguments.biases[expert] + column));
  }

  __device__ static std::uint32_t gelu(std::uint32_t pair) {
    const float2 u = unpack<Element>(pair);
    return pack<Element>(gelu(u.x), gelu(u.y));
  }

  __device__ static float gelu(float u) { return 0.5f * u * (1.0f + erff(u * 0.70710678f)); }

  // Writes 32 columns of a row, starting at `column`, which four threads hold.
  __device__ static void write_row(const Arguments& arguments, Element* matrix, std::uint32_t (&pairs)[4], int row,
                                   int stop, int column) {
    transpose_quad(pairs);
    column += threadIdx.x % 4 * kChunk;
    if (row >= stop || column >= arguments.output_width) return;
    Element* target = matrix + std::int64_t{row} * arguments.output_width + column;
    *reinterpret_cast<Chunk*>(target) = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
};

template <typename Gemm>
__global__ void __launch_bounds__(Gemm::kThreads)
    grouped_gemm_kernel(const __grid_constant__ typename Gemm::Arguments arguments) {
  Gemm::run(arguments);
}

}  // namespace beit3
