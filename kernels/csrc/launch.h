// Launches of the kernels with the tiles that are shipped.

#pragma once

#include <cuda_runtime_api.h>

#include "arguments.h"

namespace beit3 {

constexpr int kGroupedGemmTileRows = 128;

// Element is BFloat16 or Float16.
template <typename Element>
cudaError_t launch_grouped_gemm(const GroupedGemmArguments<Element>& arguments, cudaStream_t stream);

// `tile` is the number of queries per tile of `arguments.tiles`: 64 or 128. Heads are at most 128 wide.
template <typename Element>
cudaError_t launch_packed_attention(const PackedAttentionArguments<Element>& arguments, int tile, cudaStream_t stream);

}  // namespace beit3
