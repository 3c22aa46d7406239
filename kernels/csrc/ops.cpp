// PyTorch operators of the kernels; the only file here that includes PyTorch's headers.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "launch.h"

namespace beit3 {
namespace {

using at::Tensor;

// Checks a kernel's operand. Kernels move 16 bytes at once, so misaligned ones (parameters in flat buffers) are copied.
Tensor operand(const char* op, const char* name, const Tensor& tensor, const Tensor& like, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.device() == like.device() && tensor.scalar_type() == like.scalar_type(), op, ": ", name, " is ",
              tensor.scalar_type(), " on ", tensor.device(), ", but the first argument is ", like.scalar_type(), " on ",
              like.device(), ".");
  TORCH_CHECK(tensor.sizes() == shape, op, ": ", name, " has shape ", tensor.sizes(), ", expected ", shape, ".");
  TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous.");
  return reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr()) % 16 ? tensor.clone() : tensor;
}

void check_table(const char* op, const char* name, const Tensor& table, const Tensor& like, std::int64_t columns) {
  TORCH_CHECK(table.device() == like.device() && table.scalar_type() == at::kInt && table.is_contiguous() &&
                  table.dim() == 2 && table.size(1) == columns,
              op, ": ", name, " must be a contiguous int32 tensor with ", columns, " columns on ", like.device(), ".");
}

void check_multiple_of_8(const char* op, const char* name, std::int64_t width) {
  TORCH_CHECK(width > 0 && width % 8 == 0, op, ": ", name, " is ", width,
              ", but rows are moved 16 bytes at once, so it must be a multiple of 8.");
}

// Calls `run` with a value of `tensor`'s element type.
template <typename Run>
void with_element(const char* op, const Tensor& tensor, const Run& run) {
  if (tensor.scalar_type() == at::kBFloat16) return run(BFloat16{});
  if (tensor.scalar_type() == at::kHalf) return run(Float16{});
  TORCH_CHECK(false, op, ": the dtype must be bfloat16 or float16, got ", tensor.scalar_type(), ".");
}

template <typename Element>
const Element* read(const Tensor& tensor) {
  return static_cast<const Element*>(tensor.const_data_ptr());
}

template <typename Element>
Element* write(const Tensor& tensor) {
  return static_cast<Element*>(tensor.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> grouped_gemm(const Tensor& x, at::TensorList weights, at::TensorList biases,
                                        const Tensor& tiles, std::int64_t tile_rows, bool gelu) {
  constexpr const char* op = "grouped_gemm";
  const c10::cuda::CUDAGuard guard(x.device());
  TORCH_CHECK(x.dim() == 2, op, ": x must be (rows, width), got ", x.sizes(), ".");
  TORCH_CHECK(!weights.empty() && weights.size() <= kMaxExperts && weights.size() == biases.size(), op, ": ",
              weights.size(), " weights and ", biases.size(), " biases; expected one each for at most ", kMaxExperts,
              " experts.");
  TORCH_CHECK(tile_rows == kGroupedGemmTileRows, op, ": tiles must have ", kGroupedGemmTileRows, " rows, got ",
              tile_rows, ".");
  TORCH_CHECK(weights[0].dim() == 2, op, ": weights must be matrices.");
  const std::int64_t rows = x.size(0), input_width = x.size(1), output_width = weights[0].size(0);
  check_multiple_of_8(op, "the input width", input_width);
  check_multiple_of_8(op, "the output width", output_width);
  check_table(op, "tiles", tiles, x, 3);

  const Tensor u = at::empty({rows, output_width}, x.options());
  const Tensor a = at::empty({gelu ? rows : 0, output_width}, x.options());
  if (tiles.size(0) == 0) return {u, a};
  with_element(op, x, [&](auto element) {
    using Element = decltype(element);
    std::vector<Tensor> operands = {operand(op, "x", x, x, x.sizes())};  // copies must live until the launch
    GroupedGemmArguments<Element> arguments = {};
    arguments.x = read<Element>(operands.back());
    for (std::size_t expert = 0; expert < weights.size(); ++expert) {
      operands.push_back(operand(op, "a weight", weights[expert], x, {output_width, input_width}));
      arguments.weights[expert] = read<Element>(operands.back());
      operands.push_back(operand(op, "a bias", biases[expert], x, {output_width}));
      arguments.biases[expert] = read<Element>(operands.back());
    }
    arguments.tiles = read<int>(tiles);
    arguments.u = write<Element>(u);
    arguments.a = gelu ? write<Element>(a) : nullptr;
    arguments.num_tiles = static_cast<int>(tiles.size(0));
    arguments.input_width = static_cast<int>(input_width);
    arguments.output_width = static_cast<int>(output_width);
    C10_CUDA_CHECK(launch_grouped_gemm(arguments, c10::cuda::getCurrentCUDAStream()));
  });
  return {u, a};
}

std::tuple<Tensor, Tensor> packed_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& sequences,
                                            const Tensor& tiles, std::int64_t tile_size, bool causal_captions) {
  constexpr const char* op = "packed_attention";
  const c10::cuda::CUDAGuard guard(q.device());
  TORCH_CHECK(q.dim() == 3, op, ": q must be (rows, heads, width), got ", q.sizes(), ".");
  const std::int64_t head_width = q.size(2);
  check_multiple_of_8(op, "the head width", head_width);
  TORCH_CHECK(head_width <= 128, op, ": the head width is ", head_width, ", at most 128 fit.");
  TORCH_CHECK(tile_size == 64 || tile_size == 128, op, ": tiles must have 64 or 128 positions, got ", tile_size, ".");
  check_table(op, "sequences", sequences, q, 4);
  check_table(op, "tiles", tiles, q, 2);

  const Tensor y = at::empty_like(q);
  const Tensor lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  if (tiles.size(0) == 0 || q.size(1) == 0) return {y, lse};
  with_element(op, q, [&](auto element) {
    using Element = decltype(element);
    const Tensor operands[] = {operand(op, "q", q, q, q.sizes()), operand(op, "k", k, q, q.sizes()),
                               operand(op, "v", v, q, q.sizes())};
    PackedAttentionArguments<Element> arguments = {};
    arguments.q = read<Element>(operands[0]);
    arguments.k = read<Element>(operands[1]);
    arguments.v = read<Element>(operands[2]);
    arguments.y = write<Element>(y);
    arguments.lse = write<float>(lse);
    arguments.sequences = read<int>(sequences);
    arguments.tiles = read<int>(tiles);
    arguments.num_tiles = static_cast<int>(tiles.size(0));
    arguments.num_rows = static_cast<int>(q.size(0));
    arguments.num_heads = static_cast<int>(q.size(1));
    arguments.head_width = static_cast<int>(head_width);
    arguments.scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(head_width)));
    arguments.captions = causal_captions;
    C10_CUDA_CHECK(launch_packed_attention(arguments, static_cast<int>(tile_size), c10::cuda::getCurrentCUDAStream()));
  });
  return {y, lse};
}

}  // namespace
}  // namespace beit3

TORCH_LIBRARY(beit3_ds_cuda, library) {
  library.def(
      "grouped_gemm(Tensor x, Tensor[] weights, Tensor[] biases, Tensor tiles, int tile_rows, bool gelu) "
      "-> (Tensor u, Tensor a)");
  library.def(
      "packed_attention(Tensor q, Tensor k, Tensor v, Tensor sequences, Tensor tiles, int tile_size, "
      "bool causal_captions) -> (Tensor y, Tensor lse)");
}

TORCH_LIBRARY_IMPL(beit3_ds_cuda, CUDA, library) {
  library.impl("grouped_gemm", &beit3::grouped_gemm);
  library.impl("packed_attention", &beit3::packed_attention);
}
