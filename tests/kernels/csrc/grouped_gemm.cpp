// Runs the grouped GEMM on the CPU: grouped_gemm FOLDER D F EXPERTS HAS_GELU EARLY REVERSED
//
// Reads x, weights, biases, tiles and u and a as they were before from FOLDER; writes u and a.

#include "grouped_gemm.cuh"

#include "arrays.h"

using Gemm = beit3::GroupedGemm<GEMM>;  // the tests say which
static Gemm::Arguments arguments;

int main(int, char** argv) {
  const std::string folder = std::string(argv[1]) + "/";
  const int input_width = std::atoi(argv[2]), output_width = std::atoi(argv[3]), experts = std::atoi(argv[4]);
  emulation::copies_come_early = std::atoi(argv[6]);
  emulation::is_reversed = std::atoi(argv[7]);

  const auto x = read_array<Gemm::Element>(folder + "x"), biases = read_array<Gemm::Element>(folder + "biases");
  const auto weights = read_array<Gemm::Element>(folder + "weights");
  const auto tiles = read_array<int>(folder + "tiles");
  auto u = read_array<Gemm::Element>(folder + "u"), a = read_array<Gemm::Element>(folder + "a");
  // Every expert's parameters by themselves, so that AddressSanitizer sees where they end.
  std::vector<std::vector<Gemm::Element>> parts;
  for (int expert = 0; expert < experts; ++expert) {
    const std::size_t size = std::size_t(output_width) * input_width;
    parts.emplace_back(weights.begin() + expert * size, weights.begin() + (expert + 1) * size);
    arguments.weights[expert] = parts.back().data();
    parts.emplace_back(biases.begin() + expert * output_width, biases.begin() + (expert + 1) * output_width);
    arguments.biases[expert] = parts.back().data();
  }
  arguments.x = x.data();
  arguments.tiles = tiles.data();
  arguments.u = u.data();
  arguments.a = std::atoi(argv[5]) ? a.data() : nullptr;
  arguments.num_tiles = int(tiles.size()) / 3;
  arguments.input_width = input_width;
  arguments.output_width = output_width;

  const unsigned blocks = Gemm::blocks(arguments.num_tiles, output_width);
  emulation::launch({blocks, 1}, Gemm::kThreads, Gemm::kSharedBytes,
                    [] { beit3::grouped_gemm_kernel<Gemm>(arguments); });
  write_array(folder + "u", u);
  write_array(folder + "a", a);
}
