// How the pixels of a plane are shared out among threads and thread blocks.
//
// Memory is read in vectors of V elements. A unit is what one vector has values of: a plane, or with channels last the
// planes of V neighbouring channels. A unit has a vector for every V pixels, or for every pixel.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "../images.h"

namespace gdl {

constexpr int kWarp = 32;

struct Split {
  std::int64_t units, vectors;
  std::int64_t groups;  // of units: those that a block has at a time
  int chunk;            // vectors of a unit that one block takes
  int blocks;           // that share a group
  int slots;            // units in a group, a power of two
  int members;          // threads of a block that share a unit, a power of two
  int shared_bytes;     // of a block, where its chunk stays there; then one launch does everything
  bool channels_last;
  float per_pixel;  // one by the pixels of a plane

  int threads() const { return slots * members; }
  bool fits() const { return shared_bytes > 0; }
};

// What a kernel holds.
struct Capacity {
  int vector;        // elements of a vector
  int planes;        // of a unit
  int arrays;        // of floats that it keeps, one number of each for an element
  int batch;         // vectors that a thread loads at a time
  int threads;       // the most in a block
  int record_bytes;  // of shared memory, for sums

  // Vectors that a thread keeps if there are threads enough.
  constexpr int vectors() const { return 2 * batch; }
  constexpr int bytes_of_vector() const { return vector * arrays * static_cast<int>(sizeof(float)); }
};

// Units of a group with channels last: a line of the cache, or a sector of it where vectors are single elements.
constexpr int kMostSlots = 8;

struct Gpu {
  int multiprocessors, shared_bytes;
  bool has_clusters;
};

inline std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline std::int64_t power_of_two_at_least(std::int64_t n) {
  std::int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

inline Split share_out(const Images& images, const Capacity& kernel, const Gpu& gpu) {
  // A plane is shared by blocks of no more threads, where it can be: several run side by side on a multiprocessor, and
  // while one waits for its sums the others use the memory.
  constexpr int kPreferredThreads = 512, kThreadsInTwoLaunches = 256;
  constexpr int kNeighbours = 8;     // a line of the cache, in vectors of 16 bytes
  constexpr int kMostInCluster = 8;  // that every GPU with clusters can launch
  constexpr int kMostBlocks = 256;   // in two launches: as many records as a block merges with one a thread

  Split split{};
  split.channels_last = images.channels_last;
  split.per_pixel = 1 / static_cast<float>(images.pixels);
  split.units = images.count * images.channels / kernel.planes;
  split.vectors = images.channels_last ? images.pixels : images.pixels / kernel.vector;
  split.blocks = split.slots = 1;
  if (images.channels_last) {
    const std::int64_t units_of_pixel = images.channels / kernel.planes;
    split.slots = static_cast<int>(power_of_two_at_least(std::min<std::int64_t>(units_of_pixel, kMostSlots)));
  }
  split.groups = ceil_divide(split.units, split.slots);

  // Threads of a unit: as few as can keep it, but enough to read whole lines and to keep the GPU busy.
  const std::int64_t most = power_of_two_at_least(split.vectors), limit = kernel.threads / split.slots;
  std::int64_t threads = power_of_two_at_least(ceil_divide(split.vectors, kernel.vectors()));
  threads = std::max(threads, std::min<std::int64_t>(most, kNeighbours));
  if (images.channels_last) threads = std::max<std::int64_t>(threads, kWarp / split.slots);
  while (2 * threads <= std::min(most, limit) &&
         split.groups * split.slots * threads < std::int64_t{kPreferredThreads} * gpu.multiprocessors)
    threads *= 2;

  if (gpu.has_clusters) {
    const auto halve_while = [&](auto too_large) {
      while (split.blocks < kMostInCluster && too_large(threads / split.blocks * split.slots)) split.blocks *= 2;
    };
    halve_while([&](std::int64_t block) { return block > kPreferredThreads; });
    halve_while(
        [&](std::int64_t block) { return block > 4 * kWarp && split.groups * split.blocks < gpu.multiprocessors; });
  }
  split.members = static_cast<int>(std::min(threads / split.blocks, limit));
  if (!images.channels_last && split.members <= kWarp) {
    split.slots = 4 * kWarp / split.members;
    split.groups = ceil_divide(split.units, split.slots);
  }
  // Whole rounds of the members, so that they start with a line.
  const auto whole_rounds = [&](std::int64_t vectors) { return ceil_divide(vectors, split.members) * split.members; };
  std::int64_t chunk = whole_rounds(ceil_divide(split.vectors, split.blocks));
  const std::int64_t batches = ceil_divide(chunk, split.members * kernel.batch);
  const std::int64_t bytes = batches * kernel.batch * kernel.bytes_of_vector() * split.threads();
  if (bytes + kernel.record_bytes <= gpu.shared_bytes) {
    split.chunk = static_cast<int>(chunk);
    split.shared_bytes = static_cast<int>(bytes);
    return split;
  }

  split.members = kThreadsInTwoLaunches / split.slots;
  const std::int64_t tiles = ceil_divide(split.vectors, split.members * kernel.vectors());
  const std::int64_t busy =
      std::min(ceil_divide(2 * gpu.multiprocessors, split.groups), ceil_divide(split.vectors, split.members));
  const std::int64_t blocks = std::min<std::int64_t>(std::max(tiles, busy), kMostBlocks);
  chunk = whole_rounds(ceil_divide(split.vectors, blocks));
  split.chunk = static_cast<int>(chunk);
  split.blocks = static_cast<int>(ceil_divide(split.vectors, chunk));
  return split;
}

}  // namespace gdl
