// Token embeddings with sinusoidal positions on the CPU, and the gradient of the table.
#pragma once

#include <cstdint>

#include "half.h"

namespace gdl {

// A matrix whose rows are contiguous, `stride` numbers apart.
template <typename T>
struct Rows {
  T* data;
  std::int64_t stride;

  T* operator[](std::int64_t row) const { return data + row * stride; }
};

// Dense, (batch, length).
struct Tokens {
  const std::int64_t* ids;
  std::int64_t count, length;

  bool within(std::int64_t rows) const;
};

// The table's size, and what its rows are multiplied by.
struct Embedding {
  std::int64_t rows, columns;
  double scale;
};

// out[b, n, j] = scale * weight[tokens[b, n], j] + sin(a quarter turn for odd j + (start + n) * steps[j / 2]), 2^64 of
// steps to a turn. T: float, double, float16 or bfloat16.
template <typename T>
void positional_embedding_forward(Tokens tokens, Embedding embedding, Rows<const T> weight, std::int64_t start,
                                  const std::uint64_t* steps, T* out, int threads);

// grad_weight[v] = scale * the sum of grad's rows at v, one for each token. Each is summed in the order of the tokens:
// the same bits for any number of threads.
template <typename T>
void positional_embedding_backward(Tokens tokens, Embedding embedding, Rows<const T> grad, T* grad_weight, int threads);

}  // namespace gdl
