// Double backward pass of block-sparse attention: the gradients of a function of dQ, dK and dV.
//
// With A, B, C the gradients of dQ, dK, dV; Z what dropout multiplies a weight by, or 1; P, delta as in the backward
// pass:
//   T = Z * (dO V^T),  U = scale * (A K^T + Q B^T),  W = Z * (dO C^T),  mu = rowsum(P * U),
//   R = T * (U - mu) - delta * U + W,  rho = rowsum(P * R),  E = P * (R - rho),  dS = P * (T - delta)
//   Q: scale * (E K + dS B)      K: scale * (E^T Q + dS^T A)      V: (Z * P * (U - mu))^T dO
//   dO: (Z * P * (U - mu)) V + (Z * P) C      dlse: mu
// Two walks over the columns' lists, as in the backward pass: one for the rows' sums, one for the products. Neither
// keeps a pair: memory is that of the rows and of the columns.
#include <algorithm>

#include "sparse_attention.h"
#include "sparse_attention_gradients.h"

namespace gdl {
namespace {

// The gradients of a tile's dK and dV, and the four matrices that both walks need of a pair of tiles.
template <typename T>
struct PairScratch {
  PairScratch(const Attention& call, int tile, int head_dim, int value_dim)
      : keys(make_buffer<T>(tile * head_dim)),
        values(make_buffer<T>(tile * value_dim)),
        keys_transposed(make_buffer<T>(call.head_dim * tile)),
        values_transposed(make_buffer<T>(call.value_dim * tile)),
        p(make_buffer<T>(tile * tile)),
        t(make_buffer<T>(tile * tile)),
        u(make_buffer<T>(tile * tile)),
        w(make_buffer<T>(tile * tile)),
        kept(make_buffer<T>(call.dropout_p > 0 ? tile * tile : 0)),
        sum_keys(make_buffer<T>(tile * head_dim)),
        sum_values(make_buffer<T>(tile * value_dim)) {}

  Buffer<T> keys, values, keys_transposed, values_transposed, p, t, u, w, kept, sum_keys, sum_values;
};

// Sums of a row that the second walk needs, each by copy and packed row.
enum RowSum { kWeightsByU, kWeightsByT, kWeightsByTUAndW, kRowSums };

template <typename E>
void double_backward(const Attention& call, const Strided& grad_grad_query, const Strided& grad_grad_key,
                     const Strided& grad_grad_value, const Strided& grad_out, const void* grad_lse,
                     const Strided& query, const Strided& key, const Strided& value, const Strided& out,
                     const void* lse, const Strided& grad_grad_out, void* grad_grad_lse, const Strided& grad_query,
                     const Strided& grad_key, const Strided& grad_value) {
  using T = accumulator_t<E>;
  const Geometry geometry(call);
  const PackedRows<E> rows(call, geometry, grad_out, grad_lse, query, out, lse);
  const ColumnSplit split(call, geometry);
  const int tile = geometry.tile, head_dim = rows.head_dim, value_dim = rows.value_dim;
  const bool dropping = call.dropout_p > 0;
  const std::int64_t all_rows = call.batch * call.heads * rows.places;
  const Buffer<T> a = pack_scaled_rows<E>(call, rows, grad_grad_query);

  const auto scratch = [&] { return PairScratch<T>(call, tile, head_dim, value_dim); };
  const auto load_gradients = [&](const KeyTile<T>& at, PairScratch<T>& s) {
    load_tile<E>(call, at, grad_grad_key, call.head_dim, tile, s.keys.get(), s.keys_transposed.get());
    load_tile<E>(call, at, grad_grad_value, call.value_dim, tile, s.values.get(), s.values_transposed.get());
  };
  // P, T, U, and W. What dropout multiplies by is in s.kept.
  const auto matrices = [&](const KeyTile<T>& at, const RowsSeen& seen, PairScratch<T>& s) {
    const int depth = static_cast<int>(call.head_dim), value_depth = static_cast<int>(call.value_dim);
    const T* queries = rows.queries.get() + seen.row * head_dim;
    const T* grads = rows.grads.get() + seen.row * value_dim;
    kept_scores(call, geometry, rows, at, seen, s.p.get());
    gemm<false>(tile, tile, value_depth, grads, value_dim, 1, at.values_transposed.get(), tile, s.t.get(), tile);
    gemm<false>(tile, tile, value_depth, grads, value_dim, 1, s.values_transposed.get(), tile, s.w.get(), tile);
    gemm<false>(tile, tile, depth, a.get() + seen.row * head_dim, head_dim, 1, at.keys_transposed.get(), tile,
                s.u.get(), tile);
    gemm<true>(tile, tile, depth, queries, head_dim, 1, s.keys_transposed.get(), tile, s.u.get(), tile);
    if (dropping) {
      dropout_tile(call, tile, at, seen, s.kept.get());
      multiply(s.t.get(), tile, s.kept.get(), tile, tile, tile);
      multiply(s.w.get(), tile, s.kept.get(), tile, tile, tile);
    }
    for (int i = 0; i < tile; ++i)
      for (int v = i * tile; v < (i + 1) * tile; v += kWidth<T>) {
        store<T>(s.p.get() + v, exp2<T>(load(s.p.get() + v) - rows.lse[seen.row + i]));
        store<T>(s.u.get() + v, load(s.u.get() + v) * static_cast<T>(kLn2));  // rows carry scale * log2(e)
      }
  };

  Buffer<T> sums = make_buffer<T>(split.count * kRowSums * all_rows);
  const auto row_sums = [&](std::int64_t copy, RowSum which) {
    return sums.get() + (copy * kRowSums + which) * all_rows;
  };
  walk_columns<E>(
      call, geometry, split, rows, key, value, scratch,
      [&](const KeyTile<T>& at) {
        for (const RowSum which : {kWeightsByU, kWeightsByT, kWeightsByTUAndW}) {
          T* first = row_sums(at.range, which) + (at.batch * call.heads + at.first_head) * rows.places;
          std::fill(first, first + geometry.group * rows.places, T(0));
        }
      },
      load_gradients,
      [&](const KeyTile<T>& at, const RowsSeen& seen, PairScratch<T>& s) {
        matrices(at, seen, s);
        for (int i = 0; i < tile; ++i) {
          Vec<T> by_u = {}, by_t = {}, by_rest = {};
          for (int v = i * tile; v < (i + 1) * tile; v += kWidth<T>) {
            const Vec<T> p = load(s.p.get() + v), t = load(s.t.get() + v), u = load(s.u.get() + v);
            by_u += p * u, by_t += p * t, by_rest += p * (t * u + load(s.w.get() + v));
          }
          row_sums(at.range, kWeightsByU)[seen.row + i] += reduce_sum<T>(by_u);
          row_sums(at.range, kWeightsByT)[seen.row + i] += reduce_sum<T>(by_t);
          row_sums(at.range, kWeightsByTUAndW)[seen.row + i] += reduce_sum<T>(by_rest);
        }
      },
      [](const KeyTile<T>&, PairScratch<T>&) {});

  // mu in the place of the first sum, rho in that of the second.
  T *mu = row_sums(0, kWeightsByU), *rho = row_sums(0, kWeightsByT);
  for (std::int64_t row = 0; row < all_rows; ++row) {
    T total[kRowSums] = {};
    for (std::int64_t copy = 0; copy < split.count; ++copy)
      for (const RowSum which : {kWeightsByU, kWeightsByT, kWeightsByTUAndW})
        total[which] += row_sums(copy, which)[row];
    mu[row] = total[kWeightsByU];
    rho[row] = total[kWeightsByTUAndW] - mu[row] * (total[kWeightsByT] + rows.delta[row]);
  }

  const std::int64_t query_copy = all_rows * head_dim, out_copy = all_rows * value_dim;
  Buffer<T> sum_queries = make_buffer<T>(split.count * query_copy), sum_outs = make_buffer<T>(split.count * out_copy);
  walk_columns<E>(
      call, geometry, split, rows, key, value, scratch,
      [&](const KeyTile<T>& at) {
        const std::int64_t first = (at.batch * call.heads + at.first_head) * rows.places;
        const std::int64_t count = geometry.group * rows.places;
        std::fill_n(sum_queries.get() + at.range * query_copy + first * head_dim, count * head_dim, T(0));
        std::fill_n(sum_outs.get() + at.range * out_copy + first * value_dim, count * value_dim, T(0));
      },
      [&](const KeyTile<T>& at, PairScratch<T>& s) {
        load_gradients(at, s);
        std::fill_n(s.sum_keys.get(), tile * head_dim, T(0));
        std::fill_n(s.sum_values.get(), tile * value_dim, T(0));
      },
      [&](const KeyTile<T>& at, const RowsSeen& seen, PairScratch<T>& s) {
        matrices(at, seen, s);
        for (int i = 0; i < tile; ++i) {
          const std::int64_t row = seen.row + i;
          for (int v = i * tile; v < (i + 1) * tile; v += kWidth<T>) {
            const Vec<T> p = load(s.p.get() + v), t = load(s.t.get() + v), u = load(s.u.get() + v);
            const Vec<T> kept = dropping ? p * load(s.kept.get() + v) : p, centred = u - mu[row];
            store<T>(s.p.get() + v, kept);                       // Z P
            store<T>(s.t.get() + v, p * (t - rows.delta[row]));  // dS
            store<T>(s.u.get() + v, kept * centred);             // Z P (U - mu)
            store<T>(s.w.get() + v, p * (t * centred - rows.delta[row] * u + load(s.w.get() + v) - rho[row]));  // E
          }
        }
        const T *kept = s.p.get(), *ds = s.t.get(), *m = s.u.get(), *e = s.w.get();
        T* to_query = sum_queries.get() + at.range * query_copy + seen.row * head_dim;
        T* to_out = sum_outs.get() + at.range * out_copy + seen.row * value_dim;
        gemm<true>(tile, head_dim, tile, e, tile, 1, at.keys.get(), head_dim, to_query, head_dim);
        gemm<true>(tile, head_dim, tile, ds, tile, 1, s.keys.get(), head_dim, to_query, head_dim);
        gemm<true>(tile, value_dim, tile, m, tile, 1, at.values.get(), value_dim, to_out, value_dim);
        gemm<true>(tile, value_dim, tile, kept, tile, 1, s.values.get(), value_dim, to_out, value_dim);
        gemm<true>(tile, head_dim, tile, e, 1, tile, rows.queries.get() + seen.row * head_dim, head_dim,
                   s.sum_keys.get(), head_dim);
        gemm<true>(tile, head_dim, tile, ds, 1, tile, a.get() + seen.row * head_dim, head_dim, s.sum_keys.get(),
                   head_dim);
        gemm<true>(tile, value_dim, tile, m, 1, tile, rows.grads.get() + seen.row * value_dim, value_dim,
                   s.sum_values.get(), value_dim);
      },
      [&](const KeyTile<T>& at, PairScratch<T>& s) {
        store_tile<E>(at, s.sum_keys.get(), call.head_dim, tile, kLn2, grad_key);
        store_tile<E>(at, s.sum_values.get(), call.value_dim, tile, 1, grad_value);
      });

  sum_copies<E>(call, rows, sum_queries, head_dim, split.count, call.scale, grad_query, call.head_dim);
  sum_copies<E>(call, rows, sum_outs, value_dim, split.count, 1, grad_grad_out, call.value_dim);
  T* to_lse = static_cast<T*>(grad_grad_lse);
  for (std::int64_t line = 0; line < call.batch * call.heads; ++line)
    for (std::int64_t place = 0; place < rows.places; ++place) {
      const std::int64_t q = query_at(call, line % call.heads, rows.first_place + place);
      if (q >= 0) to_lse[line * call.n_q + q] = mu[line * rows.places + place];
    }
}

}  // namespace

void sparse_attention_double_backward(const std::string& dtype, const Attention& call, const Strided& grad_grad_query,
                                      const Strided& grad_grad_key, const Strided& grad_grad_value,
                                      const Strided& grad_out, const void* grad_lse, const Strided& query,
                                      const Strided& key, const Strided& value, const Strided& out, const void* lse,
                                      const Strided& grad_grad_out, void* grad_grad_lse, const Strided& grad_query,
                                      const Strided& grad_key, const Strided& grad_value) {
  dispatch(dtype, [&](auto type) {
    double_backward<typename decltype(type)::type>(call, grad_grad_query, grad_grad_key, grad_grad_value, grad_out,
                                                   grad_lse, query, key, value, out, lse, grad_grad_out, grad_grad_lse,
                                                   grad_query, grad_key, grad_value);
  });
}

}  // namespace gdl
