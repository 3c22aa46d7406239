#include "packed_attention.cuh"

#include "launch.h"

namespace beit3 {

template <typename Element, int kTile, int kWidth>
static cudaError_t launch(const PackedAttentionArguments<Element>& arguments, cudaStream_t stream) {
  using Attention = PackedAttention<Element, kTile, 64, kWidth, 2>;
  const auto kernel = packed_attention_kernel<Attention>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Attention::kSharedBytes);
  if (error != cudaSuccess) return error;
  const dim3 blocks(arguments.num_tiles, arguments.num_heads);
  kernel<<<blocks, Attention::kThreads, Attention::kSharedBytes, stream>>>(arguments);
  return cudaGetLastError();
}

template <typename Element, int kTile>
static cudaError_t launch_tile(const PackedAttentionArguments<Element>& arguments, cudaStream_t stream) {
  if (arguments.head_width <= 64) return launch<Element, kTile, 64>(arguments, stream);
  if (arguments.head_width <= 96) return launch<Element, kTile, 96>(arguments, stream);
  if (arguments.head_width <= 128) return launch<Element, kTile, 128>(arguments, stream);
  return cudaErrorInvalidValue;
}

template <typename Element>
cudaError_t launch_packed_attention(const PackedAttentionArguments<Element>& arguments, int tile, cudaStream_t stream) {
  if (tile == 64) return launch_tile<Element, 64>(arguments, stream);
  if (tile == 128) return launch_tile<Element, 128>(arguments, stream);
  return cudaErrorInvalidValue;
}

template cudaError_t launch_packed_attention(const PackedAttentionArguments<BFloat16>&, int, cudaStream_t);
template cudaError_t launch_packed_attention(const PackedAttentionArguments<Float16>&, int, cudaStream_t);

}  // namespace beit3
