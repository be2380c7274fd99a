#include "spectral_normalize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "buffer.h"
#include "elementwise.h"

namespace gdl {
namespace {

using std::int64_t;

// Rows that go through the products together: v and the sums are loaded once for four. Four rows of BigGAN's widest
// weights, 13824 columns, still fit an L2 of 512 KB when they are read the second time.
constexpr int kGroup = 4;

// Elements of a block, the unit of work: enough of them for a large machine's threads, few enough sums to merge.
constexpr int64_t kBlock = 512 * 1024;

// Rows of a block at most: more sums of W' s in float would add up more rounding errors than plain PyTorch's.
constexpr int64_t kMostRows = 512;

// Columns that are merged at a time, in double.
constexpr int64_t kStrip = 512;

// Products whose sum is kept in float before it is added up in double.
constexpr int64_t kRun = 4096;

// Rows [first, first + rows) of a matrix; of what lies dense also elements [first, first + rows) * columns, in the
// order of memory.
struct Block {
  int matrix;
  int64_t first, rows;
  int64_t sums;  // where its sums over rows begin
};

// The blocks of all matrices, largest first. They hang on the shapes alone, so the order of every sum does.
template <typename M>
std::vector<Block> blocks_of(const std::vector<M>& matrices) {
  std::vector<Block> blocks;
  int64_t sums = 0;
  for (int m = 0; m < static_cast<int>(matrices.size()); ++m) {
    const int64_t rows = matrices[m].shape.rows, columns = matrices[m].shape.columns();
    const int64_t fit = kBlock / std::max<int64_t>(1, columns) / kGroup * kGroup;
    const int64_t size = std::clamp<int64_t>(fit, kGroup, kMostRows);
    for (int64_t first = 0; first < rows; first += size) {
      blocks.push_back({m, first, std::min(size, rows - first), sums});
      sums += columns;
    }
  }
  std::stable_sort(blocks.begin(), blocks.end(), [&](const Block& a, const Block& b) {
    return a.rows * matrices[a.matrix].shape.columns() > b.rows * matrices[b.matrix].shape.columns();
  });
  return blocks;
}

template <typename F>
void for_each(int64_t count, int threads, F f) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) f(i);
}

// out[k] = <rows[k], v>
template <int count, typename T, typename A = accumulator_t<T>>
void dot_rows(const T* const (&rows)[count], const A* v, int64_t n, A* out) {
  constexpr int width = kWidth<A>, chains = count == 1 ? 4 : 2;
  Vec<A> sums[chains][count];
  for (auto& chain : sums)
    for (auto& sum : chain) sum = Vec<A>{};
  int64_t i = 0;
  for (; i + chains * width <= n; i += chains * width) {
#pragma GCC unroll 4
    for (int j = 0; j < chains; ++j) {
      const Vec<A> factor = load(v + i + j * width);
#pragma GCC unroll 4
      for (int k = 0; k < count; ++k) sums[j][k] += factor * load_widened(rows[k] + i + j * width);
    }
  }
  for (; i + width <= n; i += width) {
    const Vec<A> factor = load(v + i);
    for (int k = 0; k < count; ++k) sums[0][k] += factor * load_widened(rows[k] + i);
  }
  for (int k = 0; k < count; ++k) {
    A rest = 0;
    for (int64_t tail = i; tail < n; ++tail) rest += v[tail] * to_accumulator(rows[k][tail]);
    for (int j = 1; j < chains; ++j) sums[0][k] += sums[j][k];
    out[k] = reduce_sum<A>(sums[0][k]) + rest;
  }
}

// sums += the sum over k of factors[k] * rows[k]
template <int count, typename T, typename A = accumulator_t<T>>
void add_rows(const T* const (&rows)[count], const A* factors, int64_t n, A* sums) {
  constexpr int width = kWidth<A>;
  Vec<A> factor[count];
  for (int k = 0; k < count; ++k) factor[k] = broadcast(factors[k]);
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    Vec<A> sum = factor[0] * load_widened(rows[0] + i);
#pragma GCC unroll 4
    for (int k = 1; k < count; ++k) sum += factor[k] * load_widened(rows[k] + i);
    store<A>(sums + i, load(sums + i) + sum);
  }
  for (; i < n; ++i) {
    A sum = 0;
    for (int k = 0; k < count; ++k) sum += factors[k] * to_accumulator(rows[k][i]);
    sums[i] += sum;
  }
}

// What one pass over the matrices computes: s = W v, t = W' f of some factors f, or both with f = s. The row is still
// in the cache when t takes it: one reading of W makes a power iteration.
enum class Products { kDots, kSums, kBoth };

template <typename T>
struct Vectors {
  using A = accumulator_t<T>;
  const A* u;  // the factors of kSums
  const A* v;
  A* s;
  A* sums;  // of one block
};

template <int count, typename T>
void group_products(Products products, const SpectralMatrix<T>& matrix, int64_t first, const Vectors<T>& vectors,
                    T* gathered) {
  using A = accumulator_t<T>;
  const auto [outer, rows, inner] = matrix.shape;
  const int64_t columns = outer * inner;
  const T* lines[count];
  for (int k = 0; k < count; ++k) lines[k] = matrix.weight + (first + k) * inner;
  if (outer > 1) {
    for (int64_t o = 0; o < outer; ++o)
      for (int k = 0; k < count; ++k)
        std::memcpy(gathered + k * columns + o * inner, lines[k] + o * rows * inner, inner * sizeof(T));
    for (int k = 0; k < count; ++k) lines[k] = gathered + k * columns;
  }
  const A* factors = vectors.u + first;
  if (products != Products::kSums) {
    dot_rows<count>(lines, vectors.v, columns, vectors.s + first);
    factors = vectors.s + first;
  }
  if (products != Products::kDots) add_rows<count>(lines, factors, columns, vectors.sums);
}

template <typename T>
void block_products(Products products, const SpectralMatrix<T>& matrix, const Block& block, const Vectors<T>& vectors) {
  const int64_t columns = matrix.shape.columns(), end = block.first + block.rows;
  const Buffer<T> gathered = make_buffer<T>(matrix.shape.outer > 1 ? kGroup * columns : 0);
  if (products != Products::kDots) std::fill_n(vectors.sums, columns, accumulator_t<T>(0));
  int64_t row = block.first;
  for (; row + kGroup <= end; row += kGroup) group_products<kGroup>(products, matrix, row, vectors, gathered.get());
  for (; row < end; ++row) group_products<1>(products, matrix, row, vectors, gathered.get());
}

template <typename A>
double norm(const A* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return std::sqrt(sum);
}

template <typename A>
void divide(A* x, int64_t n, double by) {
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<A>(static_cast<double>(x[i]) / by);
}

// t = the sums of a matrix's blocks, in their order.
template <typename A>
void merge(const A* sums, int64_t blocks, int64_t columns, A* t) {
  for (int64_t first = 0; first < columns; first += kStrip) {
    const int64_t count = std::min(kStrip, columns - first);
    double total[kStrip] = {};
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t i = 0; i < count; ++i) total[i] += static_cast<double>(sums[b * columns + first + i]);
    for (int64_t i = 0; i < count; ++i) t[first + i] = static_cast<A>(total[i]);
  }
}

// From a pass's products, s in new_u and t in new_v, the vectors that they are of length 1. Returns u' W v.
template <typename T>
double finish(Products products, bool iterated, const SpectralMatrix<T>& matrix, double eps) {
  const int64_t rows = matrix.shape.rows, columns = matrix.shape.columns();
  if (!iterated) {
    double sigma = 0;
    for (int64_t i = 0; i < rows; ++i) sigma += static_cast<double>(matrix.u[i]) * static_cast<double>(matrix.new_u[i]);
    std::copy_n(matrix.u, rows, matrix.new_u);
    std::copy_n(matrix.v, columns, matrix.new_v);
    return sigma;
  }
  double shrink = 1, sigma = 0;
  if (products != Products::kSums) {
    const double length = norm(matrix.new_u, rows);
    shrink = std::max(length, eps);  // NaN where length is
    divide(matrix.new_u, rows, shrink);
    sigma = length * (length / shrink);  // u' W v is u' s: where v came first
  }
  if (products != Products::kDots) {
    const double length = norm(matrix.new_v, columns) / shrink;  // of W' u
    const double bound = std::max(length, eps);
    divide(matrix.new_v, columns, shrink * bound);
    sigma = length * (length / bound);  // (W' u)' v
  }
  return sigma;
}

}  // namespace

template <typename T>
void spectral_normalize_forward(const std::vector<SpectralMatrix<T>>& matrices, int iterations, bool v_first,
                                double eps, accumulator_t<T>* sigmas, int threads) {
  using A = accumulator_t<T>;
  const int64_t count = static_cast<int64_t>(matrices.size());
  const std::vector<Block> blocks = blocks_of(matrices);
  std::vector<int64_t> sums_of(count, 0), blocks_in(count, 0);  // by matrix
  int64_t all_sums = 0;
  for (const Block& block : blocks) {
    ++blocks_in[block.matrix];
    if (block.first == 0) sums_of[block.matrix] = block.sums;
    all_sums += matrices[block.matrix].shape.columns();
  }
  const Buffer<A> sums = make_buffer<A>(iterations > 0 ? all_sums : 0);

  const auto pass = [&](Products products, bool first) {
    for_each(static_cast<int64_t>(blocks.size()), threads, [&](int64_t b) {
      const SpectralMatrix<T>& m = matrices[blocks[b].matrix];
      const bool v_is_new = !first || (v_first && products == Products::kDots && iterations > 0);
      block_products(products, m, blocks[b],
                     Vectors<T>{first ? m.u : m.new_u, v_is_new ? m.new_v : m.v, m.new_u, sums.get() + blocks[b].sums});
    });
    for_each(count, threads, [&](int64_t i) {
      const SpectralMatrix<T>& m = matrices[i];
      if (products != Products::kDots) merge(sums.get() + sums_of[i], blocks_in[i], m.shape.columns(), m.new_v);
      sigmas[i] = static_cast<A>(finish(products, iterations > 0, m, eps));
    });
  };
  if (iterations == 0) pass(Products::kDots, true);
  for (int i = 0; i < iterations; ++i) {
    if (v_first) {
      pass(Products::kSums, i == 0);
      pass(Products::kDots, i == 0);
    } else {
      pass(Products::kBoth, i == 0);
    }
  }

  // Backwards: what was read last is still in the cache.
  for_each(static_cast<int64_t>(blocks.size()), threads, [&](int64_t b) {
    const Block& block = blocks[blocks.size() - 1 - b];
    const SpectralMatrix<T>& m = matrices[block.matrix];
    const int64_t columns = m.shape.columns(), begin = block.first * columns;
    const T* weight = m.weight + begin;
    const A sigma = sigmas[block.matrix];
    write(m.out + begin, block.rows * columns, [=](auto at) { return at(weight) / at(sigma); });
  });
}

template <typename T>
void spectral_normalize_backward(const std::vector<SpectralGradient<T>>& matrices, const accumulator_t<T>* sigmas,
                                 int threads) {
  using A = accumulator_t<T>;
  const std::vector<Block> blocks = blocks_of(matrices);
  const int64_t count = static_cast<int64_t>(blocks.size());
  std::vector<double> products(count);
  for_each(count, threads, [&](int64_t b) {
    const Block& block = blocks[b];
    const SpectralGradient<T>& m = matrices[block.matrix];
    const int64_t begin = block.first * m.shape.columns(), end = begin + block.rows * m.shape.columns();
    double total = 0;
    for (int64_t i = begin; i < end; i += kRun) {
      const T *grad = m.grad + i, *weight = m.weight + i;
      total +=
          static_cast<double>(sum_up<A>(std::min(kRun, end - i), [=](auto at) { return at(grad) * at(weight); })[0]);
    }
    products[b] = total;
  });
  std::vector<double> inner_products(matrices.size(), 0);  // <G, W>
  for (int64_t b = 0; b < count; ++b) inner_products[blocks[b].matrix] += products[b];

  for_each(count, threads, [&](int64_t b) {
    const Block& block = blocks[count - 1 - b];
    const SpectralGradient<T>& m = matrices[block.matrix];
    const auto [outer, rows, inner] = m.shape;
    const A sigma = sigmas[block.matrix];
    const double along = inner_products[block.matrix] / static_cast<double>(sigma);  // <G, W / sigma>
    for (int64_t o = 0; o < outer; ++o) {
      for (int64_t row = block.first; row < block.first + block.rows; ++row) {
        const int64_t line = (o * rows + row) * inner;
        const T* grad = m.grad + line;
        const A* v = m.v + o * inner;
        const A factor = static_cast<A>(along * static_cast<double>(m.u[row]));
        write(m.grad_weight + line, inner, [=](auto at) { return (at(grad) - factor * at(v)) / at(sigma); });
      }
    }
  });
}

#define GDL_INSTANTIATE(T)                                                                              \
  template void spectral_normalize_forward<T>(const std::vector<SpectralMatrix<T>>&, int, bool, double, \
                                              accumulator_t<T>*, int);                                  \
  template void spectral_normalize_backward<T>(const std::vector<SpectralGradient<T>>&, const accumulator_t<T>*, int);
GDL_INSTANTIATE(float)
GDL_INSTANTIATE(double)
GDL_INSTANTIATE(float16)
GDL_INSTANTIATE(bfloat16)
#undef GDL_INSTANTIATE

}  // namespace gdl
