// Philox4x32 with 7 rounds, as gdl_kernels/_philox.py has it: random words from a counter.
#pragma once

#include <cstdint>

#include "vec.h"

namespace gdl {

typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));
constexpr int kWords = kVectorBytes / 4;

struct WideProduct {
  Words high, low;
};

// 32 by 32 to 64 bits, lane by lane. GCC has a vector expression for neither half alone, the CPU one for both.
inline WideProduct multiply_wide(Words a, std::uint32_t b) {
  typedef std::uint64_t Pairs __attribute__((vector_size(kVectorBytes)));
  const Pairs factor = b - Pairs{};
  const auto of_even_lanes = [&](Pairs x) -> Pairs {
#if defined(__AVX512F__)
    return (Pairs)_mm512_mul_epu32((__m512i)x, (__m512i)factor);
#elif defined(__AVX2__)
    return (Pairs)_mm256_mul_epu32((__m256i)x, (__m256i)factor);
#elif defined(__SSE2__)
    return (Pairs)_mm_mul_epu32((__m128i)x, (__m128i)factor);
#else
    return (x & 0xffffffffu) * factor;
#endif
  };
  const Pairs even = of_even_lanes((Pairs)a), odd = of_even_lanes((Pairs)a >> 32);
  constexpr std::uint64_t upper = 0xffffffff00000000u;
  return {(Words)((even >> 32) | (odd & upper)), (Words)((even & ~upper) | (odd << 32))};
}

struct PhiloxWords {
  Words word[4];
};

// Each lane has its own c0.
inline PhiloxWords philox(std::uint64_t seed, Words c0, std::uint32_t second, std::uint32_t third,
                          std::uint32_t fourth) {
  Words c1 = second - Words{}, c2 = third - Words{}, c3 = fourth - Words{};
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    const WideProduct a = multiply_wide(c0, 0xD2511F53u), b = multiply_wide(c2, 0xCD9E8D57u);
    c0 = b.high ^ c1 ^ key0, c1 = b.low, c2 = a.high ^ c3 ^ key1, c3 = a.low;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace gdl
