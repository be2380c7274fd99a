// With a, b and c the gradients of dQ, dK and dV, and T = dO V^T, W = dO c^T, U = factor (a K^T + Q b^T):
//   dS = P (T - delta), mu = sum_k P U, rho = sum_k P (T U + W) - mu (sum_k P T + delta),
//   M = P (U - mu), E = P (T (U - mu) - delta U + W - rho),
// and the gradients are, of dO, M V + P c; of Q, factor (E K + dS b); of K, factor (E^T Q + dS^T a); of V, M^T dO.
//
// A walk by queries for mu and rho, and one by keys for the products, both over P^T and its like. Neither keeps a pair.
#include "minibatch_self_attention.h"
#include "minibatch_self_attention_gradients.h"

namespace gdl {
namespace {

template <typename E>
struct DoubleBackwardScratch {
  using T = accumulator_t<E>;

  explicit DoubleBackwardScratch(const MapAttention& call)
      : seen(call),
        a(features(call)),
        p(make_buffer<T>(kKeysOfPair * kQueryTile)),
        t(make_buffer<T>(kKeysOfPair * kQueryTile)),
        u(make_buffer<T>(kKeysOfPair * kQueryTile)),
        w(make_buffer<T>(kKeysOfPair * kQueryTile)) {}

  QueriesSeen<E> seen;
  QueryTile<T> a;
  Buffer<T> p, t, u, w;
};

// What of each query the second walk needs.
template <typename T>
struct Moments {
  explicit Moments(const MapAttention& call)
      : mu(make_buffer<T>(call.batch * query_tiles(call) * kQueryTile)),
        rho(make_buffer<T>(call.batch * query_tiles(call) * kQueryTile)) {}

  Buffer<T> mu, rho;
};

template <typename E>
void double_backward(const MapAttention& call, const Map& grad_grad_query, const Map& grad_grad_key,
                     const Map& grad_grad_value, const Map& grad_out, const Map& query, const Map& key,
                     const Map& value, const Map& out, const void* lse, const Map& grad_grad_out, const Map& grad_query,
                     const Map& grad_key, const Map& grad_value) {
  using T = accumulator_t<E>;
  const std::int64_t depth = features(call), channels = call.value_channels, tiles = query_tiles(call);
  const ScoreKeys<T> keys = pack_score_keys<E>(call, key);
  const Buffer<T> values = pack_keys<E>(call, value, value, channels, channels);
  // Max pooling passes the direction on from the pixel that it chose.
  const Buffer<T> b = pack_keys<E>(call, grad_grad_key, key, call.channels, depth);
  const Buffer<T> c = pack_keys<E>(call, grad_grad_value, value, channels, channels);
  if (call.l2)
    for (std::int64_t row = 0; row < call.batch * call.keys(); ++row) {
      T dot = 0;
      for (std::int64_t i = 0; i < call.channels; ++i) dot += keys.key(row, i) * b[row * depth + i];
      b[row * depth + call.channels] = -dot;  // of -|k|^2 / 2
    }

  const auto load_tiles = [&](std::int64_t n, std::int64_t tile, DoubleBackwardScratch<E>& s) {
    s.seen.load_from(call, grad_out, query, out, lse, n, tile);
    load_queries(call, MapOf<const E>(grad_grad_query), n, s.seen.first, s.seen.count, T(0), true, s.a);
  };
  const auto matrices = [&](std::int64_t row, int some, DoubleBackwardScratch<E>& s) {
    const QueriesSeen<E>& seen = s.seen;
    by_queries<false>(some, seen.lanes, depth, keys.row(row), seen.query, s.p.get());
    by_queries<false>(some, seen.lanes, channels, values.get() + row * channels, seen.grad, s.t.get());
    by_queries<false>(some, seen.lanes, channels, c.get() + row * channels, seen.grad, s.w.get());
    by_queries<false>(some, seen.lanes, depth, keys.row(row), s.a, s.u.get());
    by_queries<true>(some, seen.lanes, depth, b.get() + row * depth, seen.query, s.u.get());
    for (int k = 0; k < some; ++k)
      for (int v = 0; v < seen.lanes; v += kWidth<T>) {
        const int at = k * kQueryTile + v;
        store<T>(s.p.get() + at, weight_of<T>(load(s.p.get() + at), load(seen.lse.get() + v)));
      }
  };
  const auto scratch = [&] { return DoubleBackwardScratch<E>(call); };

  Moments<T> moments(call);
  parallel_for(call.threads, call.batch * tiles, scratch, [&](std::int64_t task, DoubleBackwardScratch<E>& s) {
    const std::int64_t n = task / tiles;
    load_tiles(n, task % tiles, s);
    T by_u[kQueryTile] = {}, by_t[kQueryTile] = {}, by_rest[kQueryTile] = {};
    for (std::int64_t first = 0; first < call.keys(); first += kKeysOfPair) {
      const int some = static_cast<int>(std::min<std::int64_t>(kKeysOfPair, call.keys() - first));
      matrices(n * call.keys() + first, some, s);
      for (int v = 0; v < s.seen.lanes; v += kWidth<T>) {
        Vec<T> of_u = {}, of_t = {}, of_rest = {};
        for (int k = 0; k < some; ++k) {
          const int at = k * kQueryTile + v;
          const Vec<T> p = load(s.p.get() + at), t = load(s.t.get() + at), u = load(s.u.get() + at);
          of_u += p * u, of_t += p * t, of_rest += p * (t * u + load(s.w.get() + at));
        }
        store<T>(by_u + v, load(by_u + v) + of_u);
        store<T>(by_t + v, load(by_t + v) + of_t);
        store<T>(by_rest + v, load(by_rest + v) + of_rest);
      }
    }
    for (int i = 0; i < kQueryTile; ++i) {
      moments.mu[task * kQueryTile + i] = by_u[i];
      const T delta = i < s.seen.lanes ? s.seen.delta[i] : T(0);
      moments.rho[task * kQueryTile + i] = by_rest[i] - by_u[i] * (by_t[i] + delta);
    }
  });

  const KeyRanges ranges(call);
  QuerySums<T> sum_queries(call, ranges.count, call.channels), sum_outs(call, ranges.count, channels);
  KeySums<T> sum_keys(call, depth), sum_values(call, channels);
  Buffer<T> sum_ds = make_buffer<T>(call.batch * call.keys());
  walk_pairs(
      call, ranges, scratch,
      [&](std::int64_t range, std::int64_t n, std::int64_t first, std::int64_t count) {
        sum_queries.clear(range, n);
        sum_outs.clear(range, n);
        std::fill_n(sum_keys.at(n, first), count * sum_keys.width, T(0));
        std::fill_n(sum_values.at(n, first), count * sum_values.width, T(0));
        std::fill_n(sum_ds.get() + n * call.keys() + first, count, T(0));
      },
      load_tiles,
      [&](std::int64_t range, std::int64_t n, std::int64_t tile, std::int64_t first, int some,
          DoubleBackwardScratch<E>& s) {
        const QueriesSeen<E>& seen = s.seen;
        const std::int64_t row = n * call.keys() + first, place = (n * tiles + tile) * kQueryTile;
        matrices(row, some, s);
        T *p = s.p.get(), *ds = s.t.get(), *m = s.u.get(), *e = s.w.get();
        for (int k = 0; k < some; ++k) {
          Vec<T> total = {};
          for (int v = 0; v < seen.lanes; v += kWidth<T>) {
            const int at = k * kQueryTile + v;
            const Vec<T> weight = load(p + at), t = load(ds + at), u = load(m + at);
            const Vec<T> delta = load(seen.delta.get() + v), centred = u - load(moments.mu.get() + place + v);
            const Vec<T> of_score = weight * (t - delta);
            store<T>(ds + at, of_score);
            store<T>(m + at, weight * centred);
            store<T>(e + at, weight * (t * centred - delta * u + load(e + at) - load(moments.rho.get() + place + v)));
            total += of_score;  // past the last query it is 0, as dO is
          }
          sum_ds[row + k] += reduce_sum<T>(total);
        }
        T* to_queries = sum_queries.at(range, n, tile);
        T* to_outs = sum_outs.at(range, n, tile);
        add_to_queries(some, seen.lanes, call.channels, keys.row(row), depth, e, to_queries);
        add_to_queries(some, seen.lanes, call.channels, b.get() + row * depth, depth, ds, to_queries);
        add_to_queries(some, seen.lanes, channels, values.get() + row * channels, channels, m, to_outs);
        add_to_queries(some, seen.lanes, channels, c.get() + row * channels, channels, p, to_outs);
        add_to_keys(some, seen.count, e, seen.query, sum_keys.at(n, first));
        add_to_keys(some, seen.count, ds, s.a, sum_keys.at(n, first));
        add_to_keys(some, seen.count, m, seen.grad, sum_values.at(n, first));
      });

  const T factor = static_cast<T>(score_factor(call));
  sum_queries.template store_in<E>(call, factor, grad_query);
  sum_outs.template store_in<E>(call, T(1), grad_grad_out);
  store_key_sums<E>(call, sum_keys, key, call.channels, grad_key, [&](std::int64_t row, T* sums) {
    if (!call.l2) return;
    // -|k|^2 / 2 has a gradient in each direction, and its first gradient, times -b, has one of its own.
    const T *direction = b.get() + row * depth, of_square = sums[call.channels], of_ds = factor * sum_ds[row];
    for (std::int64_t i = 0; i < call.channels; ++i) sums[i] -= of_square * keys.key(row, i) + of_ds * direction[i];
  });
  store_key_sums<E>(call, sum_values, value, channels, grad_value, [](std::int64_t, T*) {});
}

}  // namespace

void minibatch_self_attention_double_backward(const std::string& dtype, const MapAttention& call,
                                              const Map& grad_grad_query, const Map& grad_grad_key,
                                              const Map& grad_grad_value, const Map& grad_out, const Map& query,
                                              const Map& key, const Map& value, const Map& out, const void* lse,
                                              const Map& grad_grad_out, const Map& grad_query, const Map& grad_key,
                                              const Map& grad_value) {
  dispatch(dtype, [&](auto type) {
    double_backward<typename decltype(type)::type>(call, grad_grad_query, grad_grad_key, grad_grad_value, grad_out,
                                                   query, key, value, out, lse, grad_grad_out, grad_query, grad_key,
                                                   grad_value);
  });
}

}  // namespace gdl
