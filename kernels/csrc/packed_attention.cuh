// Computes the forward pass of packed attention, which kernels/ops/packed_attention.py defines. The file
// attention_plan.py in the same folder describes the tables of sequences and tiles.
//
// T packed rows, H heads, K head width.
//
// A block of threads computes one tile of queries of one head, 16 per warp, and loops over blocks of the sequence's
// keys with an online softmax (Dao, 2023, arXiv:2307.08691). The scores stay in registers: the sums of one product have
// the layout of the next product's left operand. Keys and values come through a ring of stages in shared memory as in
// grouped_gemm.cuh. In shared memory, columns beyond K are zeros up to a multiple of 16.

#pragma once

#include <cstdint>

#include "arguments.h"
#include "fragments.cuh"

namespace beit3 {

// Computes kTile queries with kBlock keys at a time, for heads of at most kWidth columns.
template <typename Element_, int kTile, int kBlock, int kWidth, int kStages>
struct PackedAttention {
  using Element = Element_;
  using Arguments = PackedAttentionArguments<Element>;
  using Tile = PaddedTile<kWidth>;

  static constexpr int kThreads = kWarp * kTile / 16;
  static constexpr int kStageBytes = 2 * Tile::bytes(kBlock);
  static constexpr int kSharedBytes = Tile::bytes(kTile) + kStages * kStageBytes;
  static_assert(kTile % 16 == 0 && kBlock % 16 == 0, "a matrix product takes 16 rows at once");
  static_assert(kWidth % 32 == 0, "four products are written together");
  static_assert(kStages >= 2, "one stage comes while another is multiplied");

  __device__ static void run(const Arguments& arguments) {
    const Sequence sequence = sequence_of(arguments, blockIdx.x);
    const int head = blockIdx.y;
    unsigned char* queries = shared_memory();
    unsigned char* ring = queries + Tile::bytes(kTile);
    const int steps = (sequence.stop(arguments.captions) + kBlock - 1) / kBlock;

    copy_positions<kTile>(queries, arguments.q, arguments, sequence, head, sequence.first);
    commit_copies();
    for (int step = 0; step < kStages - 1; ++step) fetch(ring, arguments, sequence, head, step, steps);
    wait_for_copies<kStages - 1>();
    __syncthreads();
    Softmax softmax(queries);
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 2>();
      __syncthreads();
      fetch(ring, arguments, sequence, head, step + kStages - 1, steps);
      softmax.add(ring + step % kStages * kStageBytes, arguments, sequence, step * kBlock);
    }
    softmax.write(arguments, sequence, head);
  }

 private:
  // Positions number a sequence's rows through its first and then its second range.
  struct Sequence {
    int first;  // first position of the tile
    int start_1, length_1, offset_2, total;

    __device__ int row(int position) const { return position + (position < length_1 ? start_1 : offset_2); }

    // Returns the first key that a query does not see. In a sequence of one range all queries are before length_1.
    __device__ int limit(int query, bool captions) const {
      return captions ? min(total, max(length_1, query + 1)) : total;
    }

    // Returns the first key that no query of the tile sees, nor any key after it.
    __device__ int stop(bool captions) const { return limit(first + kTile - 1, captions); }
  };

  __device__ static Sequence sequence_of(const Arguments& arguments, int index) {
    const int* tile = arguments.tiles + 2 * index;
    const int* sequence = arguments.sequences + 4 * tile[0];
    return {tile[1], sequence[0], sequence[1], sequence[2] - sequence[1], sequence[1] + sequence[3]};
  }

  // Returns the offset in q, k, v and y of a position's columns of a head.
  __device__ static std::int64_t offset_of(const Arguments& arguments, const Sequence& sequence, int head,
                                           int position) {
    return (std::int64_t{sequence.row(position)} * arguments.num_heads + head) * arguments.head_width;
  }

  // Starts to copy a block of keys and values. Closes a group of copies even after the last step: waits count groups.
  __device__ static void fetch(unsigned char* ring, const Arguments& arguments, const Sequence& sequence, int head,
                               int step, int steps) {
    if (step < steps) {
      unsigned char* stage = ring + step % kStages * kStageBytes;
      copy_positions<kBlock>(stage, arguments.k, arguments, sequence, head, step * kBlock);
      copy_positions<kBlock>(stage + Tile::bytes(kBlock), arguments.v, arguments, sequence, head, step * kBlock);
    }
    commit_copies();
  }

  // Copies positions of a head, with zeros beyond the sequence's end and beyond the head's width.
  template <int kPositions>
  __device__ static void copy_positions(unsigned char* tile, const Element* matrix, const Arguments& arguments,
                                        const Sequence& sequence, int head, int first) {
    static_assert(kPositions * Tile::kChunks % kThreads == 0, "every thread copies alike");
#pragma unroll
    for (int i = 0; i < kPositions * Tile::kChunks; i += kThreads) {
      const int index = i + threadIdx.x;
      const int position = first + index / Tile::kChunks;
      const int chunk = index % Tile::kChunks;
      const bool real = position < sequence.total && chunk * kChunk < arguments.head_width;
      const Element* source = matrix + (real ? offset_of(arguments, sequence, head, position) + chunk * kChunk : 0);
      copy_async(tile + Tile::offset(index / Tile::kChunks, chunk), source, real);
    }
  }

  // One warp's 16 queries and the state of their softmax. A thread holds parts of two rows, g = 0 and 1.
  struct Softmax {
    std::uint32_t q[kWidth / 16][4];
    float y[kWidth / 8][4] = {};                 // sum of p * v, with p = exp2(score - top)
    float top[2] = {-INFINITY, -INFINITY};       // of the row's scores, in units of log2
    float weight[2] = {};                        // sum of p over this thread's keys

    __device__ static int lane() { return threadIdx.x % kWarp; }
    __device__ static int position(const Sequence& sequence, int g) {
      return sequence.first + static_cast<int>(threadIdx.x) / kWarp * 16 + 8 * g + lane() / 4;
    }

    __device__ explicit Softmax(const unsigned char* queries) {
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; chunk += 2)
        load_left<Tile>(q[chunk / 2], queries, static_cast<int>(threadIdx.x) / kWarp * 16, chunk);
    }

    // Adds the block of keys that starts at position `begin`.
    __device__ void add(const unsigned char* stage, const Arguments& arguments, const Sequence& sequence, int begin) {
      float scores[kBlock / 8][4] = {};
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
#pragma unroll
        for (int key = 0; key < kBlock; key += 16) {
          std::uint32_t k[4];
          load_right<Tile>(k, stage, key, chunk);
          multiply_add<Element>(scores[key / 8], q[chunk / 2], k[0], k[1]);
          multiply_add<Element>(scores[key / 8 + 1], q[chunk / 2], k[2], k[3]);
        }
      }
      // Limits grow with the position, so every query sees all keys below the first query's limit.
      if (begin + kBlock > sequence.limit(sequence.first, arguments.captions)) {
        mask(scores, arguments, sequence, begin);
      }
      exponentiate(scores, arguments.scale);
#pragma unroll
      for (int key = 0; key < kBlock; key += 16) {
        const float(&s)[4] = scores[key / 8];
        const float(&t)[4] = scores[key / 8 + 1];
        const std::uint32_t p[4] = {pack<Element>(s[0], s[1]), pack<Element>(s[2], s[3]), pack<Element>(t[0], t[1]),
                                    pack<Element>(t[2], t[3])};
#pragma unroll
        for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
          std::uint32_t v[4];
          load_right_transposed<Tile>(v, stage + Tile::bytes(kBlock), key, chunk);
          multiply_add<Element>(y[chunk], p, v[0], v[1]);
          multiply_add<Element>(y[chunk + 1], p, v[2], v[3]);
        }
      }
    }

    __device__ void mask(float (&scores)[kBlock / 8][4], const Arguments& arguments, const Sequence& sequence,
                         int begin) const {
      const int limits[2] = {sequence.limit(position(sequence, 0), arguments.captions),
                             sequence.limit(position(sequence, 1), arguments.captions)};
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (begin + 8 * n + lane() % 4 * 2 + i % 2 >= limits[i / 2]) scores[n][i] = -INFINITY;
        }
      }
    }

    // Replaces scores by p and rescales earlier sums. Every query sees the first key, so `top` is finite.
    __device__ void exponentiate(float (&scores)[kBlock / 8][4], float scale) {
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        float largest = -INFINITY;
#pragma unroll
        for (int n = 0; n < kBlock / 8; ++n) largest = fmaxf(largest, fmaxf(scores[n][2 * g], scores[n][2 * g + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 2));
        const float new_top = fmaxf(top[g], largest * scale);
        const float shrink = exp2f(top[g] - new_top);
        top[g] = new_top;
        weight[g] *= shrink;
#pragma unroll
        for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
          for (int i = 2 * g; i < 2 * g + 2; ++i) {
            scores[n][i] = exp2f(scores[n][i] * scale - new_top);
            weight[g] += scores[n][i];
          }
        }
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n) {
          y[n][2 * g] *= shrink;
          y[n][2 * g + 1] *= shrink;
        }
      }
    }

    __device__ void write(const Arguments& arguments, const Sequence& sequence, int head) const {
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        float total = weight[g];
        total += __shfl_xor_sync(kWholeWarp, total, 1);
        total += __shfl_xor_sync(kWholeWarp, total, 2);
        const int query = position(sequence, g);
        const bool real = query < sequence.total;
        const std::int64_t offset = real ? offset_of(arguments, sequence, head, query) : 0;
#pragma unroll
        for (int n = 0; n < kWidth / 8; n += 4) {
          std::uint32_t pairs[4];
#pragma unroll
          for (int p = 0; p < 4; ++p) pairs[p] = pack<Element>(y[n + p][2 * g] / total, y[n + p][2 * g + 1] / total);
          transpose_quad(pairs);
          const int column = (n + lane() % 4) * kChunk;
          if (real && column < arguments.head_width)
            *reinterpret_cast<Chunk*>(arguments.y + offset + column) = {pairs[0], pairs[1], pairs[2], pairs[3]};
        }
        if (real && lane() % 4 == 0) {
          float* lse = arguments.lse + std::int64_t{head} * arguments.num_rows;
          lse[sequence.row(query)] = top[g] * kLn2 + logf(total);
        }
      }
    }

    static constexpr float kLn2 = 0.693147181f;
  };
};

template <typename Attention>
__global__ void __launch_bounds__(Attention::kThreads)
    packed_attention_kernel(const __grid_constant__ typename Attention::Arguments arguments) {
  Attention::run(arguments);
}

}  // namespace beit3
