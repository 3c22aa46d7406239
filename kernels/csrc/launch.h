// Launches the kernels with fixed tile sizes.

#pragma once

#include <cuda_runtime_api.h>

#include "arguments.h"

namespace beit3 {

constexpr int kGroupedGemmTileRows = 128;

// Computes the up projections of all experts. Element is BFloat16 or Float16.
template <typename Element>
cudaError_t launch_grouped_gemm(const GroupedGemmArguments<Element>& arguments, cudaStream_t stream);

// Computes the forward pass of packed attention. `tile` is the number of queries per tile of `arguments.tiles`: 64 or
// 128. Heads have at most 128 columns.
template <typename Element>
cudaError_t launch_packed_attention(const PackedAttentionArguments<Element>& arguments, int tile, cudaStream_t stream);

}  // namespace beit3
