// Philox4x32 with 7 rounds, as gdl_kernels/_philox.py has it: random words from a counter.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gdl {

__device__ inline uint4 philox(std::uint64_t seed, uint4 counter) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter.x, b = std::uint64_t{0xCD9E8D57u} * counter.z;
    counter = make_uint4(static_cast<std::uint32_t>(b >> 32) ^ counter.y ^ key0, static_cast<std::uint32_t>(b),
                         static_cast<std::uint32_t>(a >> 32) ^ counter.w ^ key1, static_cast<std::uint32_t>(a));
  }
  return counter;
}

}  // namespace gdl
