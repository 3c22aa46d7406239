#include "grouped_gemm.cuh"

#include "launch.h"

namespace beit3 {

template <typename Element>
cudaError_t launch_grouped_gemm(const GroupedGemmArguments<Element>& arguments, cudaStream_t stream) {
  // Registers (budgeted in tests) and 64 KB of shared memory let two blocks run on a multiprocessor.
  using Gemm = GroupedGemm<Element, kGroupedGemmTileRows, 128, 32, 4, 64, 64>;
  const auto kernel = grouped_gemm_kernel<Gemm>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Gemm::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int blocks = Gemm::blocks(arguments.num_tiles, arguments.output_width);
  kernel<<<blocks, Gemm::kThreads, Gemm::kSharedBytes, stream>>>(arguments);
  return cudaGetLastError();
}

template cudaError_t launch_grouped_gemm(const GroupedGemmArguments<BFloat16>&, cudaStream_t);
template cudaError_t launch_grouped_gemm(const GroupedGemmArguments<Float16>&, cudaStream_t);

}  // namespace beit3
