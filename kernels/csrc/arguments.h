// Arguments of the kernels, in plain C++ for host and device.

#pragma once

#include <cstdint>

namespace beit3 {

// Half-precision numbers as stored in memory.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

constexpr int kMaxExperts = 4;

// T packed rows, D input width, F output width. All matrices are contiguous and begin at a multiple of 16 bytes.
template <typename Element>
struct GroupedGemmArguments {
  const Element* x;                     // (T, D)
  const Element* weights[kMaxExperts];  // (F, D) each
  const Element* biases[kMaxExperts];   // (F,) each
  const int* tiles;                     // (num_tiles, 3): expert, first row, stop row
  Element* u;                           // (T, F)
  Element* a;                           // (T, F), or null if it is not needed
  int num_tiles;
  int input_width;                      // D, a multiple of 8
  int output_width;                     // F, a multiple of 8
};

// T packed rows, H heads, K head width. All matrices are contiguous and begin at a multiple of 16 bytes.
template <typename Element>
struct PackedAttentionArguments {
  const Element* q;  // (T, H, K), like k and v
  const Element* k;
  const Element* v;
  Element* y;            // (T, H, K)
  float* lse;            // (H, T): natural logarithm of the sum of exp(scaled score)
  const int* sequences;  // (num_sequences, 4): start and length of both ranges of rows
  const int* tiles;      // (num_tiles, 2): sequence, and first position in it
  int num_tiles;
  int num_rows;
  int num_heads;
  int head_width;  // K, a multiple of 8
  float scale;     // 1 / sqrt(K), in units of log2: log2(e) / sqrt(K)
  bool captions;   // whether the second range is a caption with a causal mask
};

}  // namespace beit3
