// Backward pass of block-sparse attention.
//
// One task is a range of block columns of one key head. It walks the columns' lists, so dK and dV of a column are
// summed in one place, and adds to its own copy of dQ, which are added up at the end: five products a tile, no atomics,
// the same bits every run with one number of threads. With S = scale * Q K^T, P = exp(S - lse), dP = dO V^T and delta =
// rowsum(dO * O) - dlse:
//   dV = P^T dO,  dS = P * (dP - delta),  dK = scale * dS^T Q,  dQ = scale * dS K.
#include <algorithm>

#include "sparse_attention.h"
#include "sparse_attention_gradients.h"

namespace gdl {
namespace {

// What a thread holds besides a tile of keys.
template <typename T>
struct Sums {
  Sums(int tile, int head_dim, int value_dim, bool dropping)
      : grad_keys(make_buffer<T>(tile * head_dim)),
        grad_values(make_buffer<T>(tile * value_dim)),
        weights(make_buffer<T>(tile * tile)),
        grad_scores(make_buffer<T>(tile * tile)),
        kept(make_buffer<T>(dropping ? tile * tile : 0)) {}

  Buffer<T> grad_keys, grad_values, weights, grad_scores, kept;
};

template <typename E>
void backward(const Attention& call, const Strided& grad_out, const void* grad_lse, const Strided& query,
              const Strided& key, const Strided& value, const Strided& out, const void* lse, const Strided& grad_query,
              const Strided& grad_key, const Strided& grad_value) {
  using T = accumulator_t<E>;
  const Geometry geometry(call);
  const PackedRows<E> rows(call, geometry, grad_out, grad_lse, query, out, lse);
  const ColumnSplit split(call, geometry);
  const int tile = geometry.tile, head_dim = rows.head_dim, value_dim = rows.value_dim;
  const bool dropping = call.dropout_p > 0;

  // By range of columns, sample, head and place.
  const std::int64_t copy_size = call.batch * call.heads * rows.places * head_dim;
  Buffer<T> grad_queries = make_buffer<T>(split.count * copy_size);

  walk_columns<E>(
      call, geometry, split, rows, key, value, [&] { return Sums<T>(tile, head_dim, value_dim, dropping); },
      [&](const KeyTile<T>& at) {
        T* sums = grad_queries.get() + at.range * copy_size +
                  (at.batch * call.heads + at.first_head) * rows.places * head_dim;
        std::fill(sums, sums + geometry.group * rows.places * head_dim, T(0));
      },
      [&](const KeyTile<T>&, Sums<T>& s) {
        std::fill(s.grad_keys.get(), s.grad_keys.get() + tile * head_dim, T(0));
        std::fill(s.grad_values.get(), s.grad_values.get() + tile * value_dim, T(0));
      },
      [&](const KeyTile<T>& at, const RowsSeen& seen, Sums<T>& s) {
        const T* queries = rows.queries.get() + seen.row * head_dim;
        const T* grads = rows.grads.get() + seen.row * value_dim;
        T *p = s.weights.get(), *ds = s.grad_scores.get();
        kept_scores(call, geometry, rows, at, seen, p);
        gemm<false>(tile, tile, static_cast<int>(call.value_dim), grads, value_dim, 1, at.values_transposed.get(), tile,
                    ds, tile);
        if (dropping) {
          dropout_tile(call, tile, at, seen, s.kept.get());
          multiply(ds, tile, s.kept.get(), tile, tile, tile);
        }
        for (int i = 0; i < tile; ++i)
          for (int v = i * tile; v < (i + 1) * tile; v += kWidth<T>) {
            const Vec<T> probability = exp2<T>(load(p + v) - rows.lse[seen.row + i]);
            store<T>(p + v, probability);
            store<T>(ds + v, probability * (load(ds + v) - rows.delta[seen.row + i]));
          }
        if (dropping) multiply(p, tile, s.kept.get(), tile, tile, tile);
        gemm<true>(tile, value_dim, tile, p, 1, tile, grads, value_dim, s.grad_values.get(), value_dim);
        gemm<true>(tile, head_dim, tile, ds, 1, tile, queries, head_dim, s.grad_keys.get(), head_dim);
        gemm<true>(tile, head_dim, tile, ds, tile, 1, at.keys.get(), head_dim,
                   grad_queries.get() + at.range * copy_size + seen.row * head_dim, head_dim);
      },
      [&](const KeyTile<T>& at, Sums<T>& s) {
        // The packed queries carry scale * log2(e): ln(2) leaves the scale.
        store_tile<E>(at, s.grad_keys.get(), call.head_dim, tile, kLn2, grad_key);
        store_tile<E>(at, s.grad_values.get(), call.value_dim, tile, 1, grad_value);
      });

  sum_copies<E>(call, rows, grad_queries, head_dim, split.count, call.scale, grad_query, call.head_dim);
}

}  // namespace

void sparse_attention_backward(const std::string& dtype, const Attention& call, const Strided& grad_out,
                               const void* grad_lse, const Strided& query, const Strided& key, const Strided& value,
                               const Strided& out, const void* lse, const Strided& grad_query, const Strided& grad_key,
                               const Strided& grad_value) {
  dispatch(dtype, [&](auto type) {
    backward<typename decltype(type)::type>(call, grad_out, grad_lse, query, key, value, out, lse, grad_query, grad_key,
                                            grad_value);
  });
}

}  // namespace gdl
