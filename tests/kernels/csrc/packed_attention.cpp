// Runs packed attention on the CPU: packed_attention FOLDER H K CAPTIONS EARLY REVERSED
//
// Reads q, k, v, sequences, tiles and y and lse as they were before from FOLDER; writes y and lse.

#include "packed_attention.cuh"

#include "arrays.h"

using Attention = beit3::PackedAttention<ATTENTION>;  // the tests say which
static Attention::Arguments arguments;

int main(int, char** argv) {
  const std::string folder = std::string(argv[1]) + "/";
  arguments.num_heads = std::atoi(argv[2]);
  arguments.head_width = std::atoi(argv[3]);
  arguments.captions = std::atoi(argv[4]);
  emulation::copies_come_early = std::atoi(argv[5]);
  emulation::is_reversed = std::atoi(argv[6]);

  const auto q = read_array<Attention::Element>(folder + "q"), k = read_array<Attention::Element>(folder + "k");
  const auto v = read_array<Attention::Element>(folder + "v");
  const auto sequences = read_array<int>(folder + "sequences"), tiles = read_array<int>(folder + "tiles");
  auto y = read_array<Attention::Element>(folder + "y");
  auto lse = read_array<float>(folder + "lse");
  arguments.q = q.data();
  arguments.k = k.data();
  arguments.v = v.data();
  arguments.y = y.data();
  arguments.lse = lse.data();
  arguments.sequences = sequences.data();
  arguments.tiles = tiles.data();
  arguments.num_tiles = int(tiles.size()) / 2;
  arguments.num_rows = int(lse.size()) / arguments.num_heads;
  arguments.scale = float(1.4426950408889634 / std::sqrt(double(arguments.head_width)));

  const unsigned num_tiles = arguments.num_tiles, num_heads = arguments.num_heads;
  emulation::launch({num_tiles, num_heads}, Attention::kThreads, Attention::kSharedBytes,
                    [] { beit3::packed_attention_kernel<Attention>(arguments); });
  write_array(folder + "y", y);
  write_array(folder + "lse", lse);
}
