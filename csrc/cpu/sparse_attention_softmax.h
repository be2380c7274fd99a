// The online softmax of attention, some hundred keys at a time.
#pragma once

#include <algorithm>
#include <limits>

#include "sparse_attention_tiles.h"

namespace gdl {

// Keys whose scores are kept at once. 64 rows of them are 64 KB in float: with the panels they stay in a 1 MB L2.
constexpr int kKeysAtOnce = 256;
// A row more than a power of two apart, or the rows of a tile would share a few sets of the L1 cache.
constexpr int kScoresStride = kKeysAtOnce + 16;

// One step of the online softmax: scores become exp2(score - maximum), and sums and outputs are brought to the new
// maximum.
template <typename T>
void softmax_step(T* scores, long ld, int rows, int columns, T* maxima, T* sums, T* out, int value_dim) {
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  T largest[kMaxTile];
  for (int i = 0; i < rows; ++i) {
    const T* row = scores + i * ld;
    Vec<T> top = load(row);
    for (int v = kWidth<T>; v < columns; v += kWidth<T>) top = maximum<T>(top, load(row + v));
    largest[i] = reduce_maximum<T>(top);
  }
  for (int i = 0; i < rows; ++i) {
    T* row = scores + i * ld;
    T maximum = largest[i] > maxima[i] ? largest[i] : maxima[i];
    if (maximum == nothing) {
      // Nothing is kept so far, unless NaN hid from the comparisons: that has to reach the output.
      bool nan = false;
      for (int j = 0; j < columns; ++j) nan |= row[j] != row[j];
      if (!nan) {
        std::fill(row, row + columns, T(0));
        continue;
      }
      maximum = 0;
    }
    const Vec<T> base = broadcast(maximum);
    Vec<T> total = {};
    for (int v = 0; v < columns; v += kWidth<T>) {
      const Vec<T> p = exp2<T>(load(row + v) - base);
      store<T>(row + v, p);
      total += p;
    }
    if (maximum != maxima[i]) {
      const T shrink = exp2<T>(broadcast<T>(maxima[i] - maximum))[0];
      sums[i] *= shrink;
      for (int v = 0; v < value_dim; v += kWidth<T>)
        store<T>(out + i * value_dim + v, load(out + i * value_dim + v) * shrink);
      maxima[i] = maximum;
    }
    sums[i] += reduce_sum<T>(total);
  }
}

}  // namespace gdl
