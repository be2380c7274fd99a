#include "positional_embedding.h"

#include <algorithm>
#include <vector>

#include "elementwise.h"

namespace gdl {
namespace {

using std::int64_t;
using std::uint64_t;

// Positions and columns of a block: the sinusoids of one stay in L1 while the rows of the batch go by.
constexpr int64_t kPositions = 8;
constexpr int64_t kColumns = 512;

// Rows that a thread takes at a time.
constexpr int64_t kRows = 64;

// A token that more positions share, such as padding, is summed by several threads, each some of its columns.
constexpr int64_t kShared = 256;

// sin(pi/2 x) = x + x p(x^2) on [-1, 1], lowest power first: p is pi/2 - 1, and the rest by Chebyshev interpolation,
// off by 1e-10 (float) and 1e-18 before rounding. x apart from its polynomial is rounded least.
template <typename T>
struct Sine;
template <>
struct Sine<float> {
  static constexpr float p[] = {5.707963268e-01f,  -6.459640974e-01f, 7.969262085e-02f,
                                -4.681710889e-03f, 1.603197613e-04f,  -3.459223037e-06f};
};
template <>
struct Sine<double> {
  static constexpr double p[] = {5.70796326794896619e-01,  -6.45964097506246252e-01, 7.96926262461668781e-02,
                                 -4.68175413531517996e-03, 1.60441184759281879e-04,  -3.59884312482157545e-06,
                                 5.69214934222367715e-08,  -6.68524220432493835e-10, 5.89427416289510794e-12};
};

// Angles of one column after another. Unsigned, so what overflows is whole turns.
typedef uint64_t Phases __attribute__((vector_size(kVectorBytes)));
constexpr int kPhases = kVectorBytes / 8;

// Of angles in units of 2^-32 (float) or 2^-64 (double) of a turn.
template <typename T>
inline Vec<T> cosine(IntVec<T> turn) {
  constexpr int bits = 8 * sizeof(T);
  constexpr auto quarter = typename Lanes<T>::Int(1) << (bits - 2);
  // From the nearest whole turn it is at most half a turn away, on which side is nothing to a cosine; and from a
  // quarter turn, where the cosine is 0, at most another quarter.
  const IntVec<T> sign = turn >> (bits - 1);
  const IntVec<T> near = quarter + sign - (turn ^ sign);
  const Vec<T> x = __builtin_convertvector(near, Vec<T>) * (T(1) / quarter), u = x * x;
  constexpr int degree = sizeof(Sine<T>::p) / sizeof(T) - 1;
  Vec<T> p = broadcast<T>(Sine<T>::p[degree]);
#pragma GCC unroll 8
  for (int k = degree - 1; k >= 0; --k) p = p * u + Sine<T>::p[k];
  return x + x * p;
}

// As many angles as a vector of T has lanes: their high halves for float.
template <typename T>
inline IntVec<T> turns(const Phases* phases) {
  if constexpr (sizeof(T) == sizeof(uint64_t))
    return (IntVec<T>)phases[0];
  else
    return __builtin_shuffle((IntVec<T>)phases[0], (IntVec<T>)phases[1], 2 * lane_index<T>() + 1);
}

// out[n * kColumns + j]: the sinusoid of position + n at column j. Writes whole vectors: up to kColumns columns. Calls
// meanwhile(n, j) for each.
template <typename T, typename Meanwhile>
void sinusoids(int64_t position, int64_t positions, int64_t columns, const uint64_t* steps, T* out,
               Meanwhile meanwhile) {
  constexpr int width = kWidth<T>, parts = width / kPhases;
  alignas(64) uint64_t step_of[kColumns] = {};
  for (int64_t j = 0; j < columns; ++j) step_of[j] = steps[j / 2];
  const Phases quarter = (Phases)(1 - (lane_index<double>() & 1)) << 62;  // a sine is a cosine a quarter turn behind
  for (int64_t j = 0; j < columns; j += width) {
    Phases at[parts], step[parts];
    for (int i = 0; i < parts; ++i) {
      std::memcpy(&step[i], step_of + j + i * kPhases, sizeof step[i]);
      at[i] = step[i] * static_cast<uint64_t>(position) - quarter;
    }
    for (int64_t n = 0; n < positions; ++n) {
      meanwhile(n, j);
      store<T>(out + n * kColumns + j, cosine<T>(turns<T>(at)));
      for (int i = 0; i < parts; ++i) at[i] += step[i];
    }
  }
}

static_assert(kColumns % 2 == 0, "a block begins with a sine");

template <typename T>
inline void prefetch(const T* numbers, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(numbers + i);
}

// The tokens' places in the order of their rows, those of one row in their own order.
struct ByRow {
  std::vector<int64_t> ends, places;

  ByRow(const Tokens& tokens, int64_t rows) : ends(rows + 1), places(tokens.count) {
    for (int64_t i = 0; i < tokens.count; ++i) ++ends[tokens.ids[i] + 1];
    for (int64_t row = 0; row < rows; ++row) ends[row + 1] += ends[row];
    // Each row's begin moves to its end, which is where the next began.
    for (int64_t i = 0; i < tokens.count; ++i) places[ends[tokens.ids[i]]++] = i;
  }

  const int64_t* begin(int64_t row) const { return places.data() + (row == 0 ? 0 : ends[row - 1]); }
  const int64_t* end(int64_t row) const { return places.data() + ends[row]; }
  int64_t count(int64_t row) const { return end(row) - begin(row); }
};

// A sum over places, with those of kAdditions of them added up on their own: rounding errors stay small.
template <typename V, typename At>
[[gnu::always_inline]] inline void sum_places(const int64_t* begin, const int64_t* end, V* totals, int count, At at) {
  for (const int64_t* place = begin; place < end;) {
    V sums[8] = {};
    for (const int64_t* stop = place + std::min<int64_t>(kAdditions, end - place); place < stop; ++place) {
#pragma GCC unroll 8
      for (int k = 0; k < count; ++k) sums[k] += at(*place, k);
    }
#pragma GCC unroll 8
    for (int k = 0; k < count; ++k) totals[k] += sums[k];
  }
}

template <typename T>
void sum_row(const Rows<const T>& grad, const int64_t* begin, const int64_t* end, int64_t first, int64_t last,
             accumulator_t<T> scale, T* out) {
  using A = accumulator_t<T>;
  constexpr int64_t width = kWidth<A>;
  constexpr int vectors = kVectorRegisters / 4;  // and as many sums on their own
  if (begin == end) {
    std::fill(out + first, out + last, T{});
    return;
  }
  int64_t j = first;
  for (; j + vectors * width <= last; j += vectors * width) {
    Vec<A> totals[vectors] = {};
    sum_places(begin, end, totals, vectors, [&](int64_t i, int k) { return load_widened(grad[i] + j + k * width); });
    for (int k = 0; k < vectors; ++k) store_rounded(out + j + k * width, totals[k] * scale);
  }
  for (; j + width <= last; j += width) {
    Vec<A> total[1] = {};
    sum_places(begin, end, total, 1, [&](int64_t i, int) { return load_widened(grad[i] + j); });
    store_rounded(out + j, total[0] * scale);
  }
  for (; j < last; ++j) {
    A total[1] = {};
    sum_places(begin, end, total, 1, [&](int64_t i, int) { return to_accumulator(grad[i][j]); });
    out[j] = from_accumulator<T>(total[0] * scale);
  }
}

}  // namespace

bool Tokens::within(int64_t rows) const {
  bool all = true;
  for (int64_t i = 0; i < count; ++i) all &= static_cast<uint64_t>(ids[i]) < static_cast<uint64_t>(rows);
  return all;
}

template <typename T>
void positional_embedding_forward(Tokens tokens, Embedding embedding, Rows<const T> weight, int64_t start,
                                  const uint64_t* steps, T* out, int threads) {
  if (tokens.count == 0) return;
  using A = accumulator_t<T>;
  const int64_t batch = tokens.count / tokens.length, width = embedding.columns;
  const int64_t blocks = (tokens.length + kPositions - 1) / kPositions, tiles = (width + kColumns - 1) / kColumns;
  // With few positions the batch is cut, too, and each part computes the sinusoids again.
  const int64_t parts = std::min(batch, std::max<int64_t>(1, 4 * threads / (blocks * tiles)));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < blocks * tiles * parts; ++task) {
    const int64_t part = task % parts, tile = task / parts % tiles, block = task / parts / tiles;
    const int64_t n_begin = block * kPositions, n_end = std::min(tokens.length, n_begin + kPositions);
    const int64_t first = tile * kColumns, columns = std::min(kColumns, width - first);
    const int64_t b_begin = batch * part / parts, b_end = batch * (part + 1) / parts;
    alignas(64) A places[kPositions * kColumns];
    const auto row = [&](int64_t b, int64_t n) { return weight[tokens.ids[b * tokens.length + n]] + first; };
    // Rows lie anywhere, so the hardware does not foresee the next.
    sinusoids(start + n_begin, n_end - n_begin, columns, steps + first / 2, places,
              [&](int64_t n, int64_t j) { __builtin_prefetch(row(b_begin, n_begin + n) + j); });
    for (int64_t b = b_begin; b < b_end; ++b) {
      for (int64_t n = n_begin; n < n_end; ++n) {
        if (b + 1 < b_end) prefetch(row(b + 1, n), columns);
        const T* from = row(b, n);
        const A* place = places + (n - n_begin) * kColumns;
        const A scale = static_cast<A>(embedding.scale);
        write(out + (b * tokens.length + n) * width + first, columns,
              [=](auto at) { return at(scale) * at(from) + at(place); });
      }
    }
  }
}

template <typename T>
void positional_embedding_backward(Tokens tokens, Embedding embedding, Rows<const T> grad, T* grad_weight,
                                   int threads) {
  const int64_t rows = embedding.rows, width = embedding.columns;
  const auto scale = static_cast<accumulator_t<T>>(embedding.scale);
  const ByRow places(tokens, rows);
  std::vector<int64_t> shared;
  for (int64_t row = 0; row < rows; ++row)
    if (places.count(row) > kShared) shared.push_back(row);
  const auto sum = [&](int64_t row, int64_t first, int64_t last) {
    sum_row(grad, places.begin(row), places.end(row), first, last, scale, grad_weight + row * width);
  };
  constexpr int64_t columns = 128;
  const int64_t tiles = (width + columns - 1) / columns;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < static_cast<int64_t>(shared.size()) * tiles; ++task) {
      const int64_t first = task % tiles * columns;
      sum(shared[task / tiles], first, std::min(width, first + columns));
    }
#pragma omp for schedule(dynamic)
    for (int64_t begin = 0; begin < rows; begin += kRows) {
      for (int64_t row = begin; row < std::min(rows, begin + kRows); ++row)
        if (places.count(row) <= kShared) sum(row, 0, width);
    }
  }
}

#define GDL_INSTANTIATE(T)                                                                                            \
  template void positional_embedding_forward<T>(Tokens, Embedding, Rows<const T>, int64_t, const uint64_t*, T*, int); \
  template void positional_embedding_backward<T>(Tokens, Embedding, Rows<const T>, T*, int);
GDL_INSTANTIATE(float)
GDL_INSTANTIATE(double)
GDL_INSTANTIATE(float16)
GDL_INSTANTIATE(bfloat16)
#undef GDL_INSTANTIATE

}  // namespace gdl
