#include "minibatch_self_attention.h"
#include "minibatch_self_attention_gradients.h"

namespace gdl {
namespace {

template <typename E>
struct BackwardScratch {
  using T = accumulator_t<E>;

  explicit BackwardScratch(const MapAttention& call)
      : seen(call), p(make_buffer<T>(kKeysOfPair * kQueryTile)), ds(make_buffer<T>(kKeysOfPair * kQueryTile)) {}

  QueriesSeen<E> seen;
  Buffer<T> p, ds;
};

template <typename E>
void backward(const MapAttention& call, const Map& grad_out, const Map& query, const Map& key, const Map& value,
              const Map& out, const void* lse, const Map& grad_query, const Map& grad_key, const Map& grad_value) {
  using T = accumulator_t<E>;
  const KeyRanges ranges(call);
  const std::int64_t depth = features(call), channels = call.value_channels;
  const ScoreKeys<T> keys = pack_score_keys<E>(call, key);
  const Buffer<T> values = pack_keys<E>(call, value, value, channels, channels);
  QuerySums<T> sum_queries(call, ranges.count, call.channels);
  KeySums<T> sum_keys(call, depth), sum_values(call, channels);
  walk_pairs(
      call, ranges, [&] { return BackwardScratch<E>(call); },
      [&](std::int64_t range, std::int64_t n, std::int64_t first, std::int64_t count) {
        sum_queries.clear(range, n);
        std::fill_n(sum_keys.at(n, first), count * sum_keys.width, T(0));
        std::fill_n(sum_values.at(n, first), count * sum_values.width, T(0));
      },
      [&](std::int64_t n, std::int64_t tile, BackwardScratch<E>& s) {
        s.seen.load_from(call, grad_out, query, out, lse, n, tile);
      },
      [&](std::int64_t range, std::int64_t n, std::int64_t tile, std::int64_t first, int some, BackwardScratch<E>& s) {
        const QueriesSeen<E>& seen = s.seen;
        const T* rows = keys.row(n * call.keys() + first);
        T *p = s.p.get(), *ds = s.ds.get();
        by_queries<false>(some, seen.lanes, depth, rows, seen.query, p);
        by_queries<false>(some, seen.lanes, channels, values.get() + (n * call.keys() + first) * channels, seen.grad,
                          ds);
        for (int k = 0; k < some; ++k)
          for (int v = 0; v < seen.lanes; v += kWidth<T>) {
            const int at = k * kQueryTile + v;
            const Vec<T> weight = weight_of<T>(load(p + at), load(seen.lse.get() + v));
            store<T>(p + at, weight);
            store<T>(ds + at, weight * (load(ds + at) - load(seen.delta.get() + v)));
          }
        add_to_keys(some, seen.count, p, seen.grad, sum_values.at(n, first));
        add_to_keys(some, seen.count, ds, seen.query, sum_keys.at(n, first));
        add_to_queries(some, seen.lanes, call.channels, rows, depth, ds, sum_queries.at(range, n, tile));
      });

  sum_queries.template store_in<E>(call, static_cast<T>(score_factor(call)), grad_query);
  store_key_sums<E>(call, sum_keys, key, call.channels, grad_key, [&](std::int64_t row, T* sums) {
    if (!call.l2) return;
    const T of_square = sums[call.channels];  // the gradient of -|k|^2 / 2
    for (std::int64_t c = 0; c < call.channels; ++c) sums[c] -= of_square * keys.key(row, c);
  });
  store_key_sums<E>(call, sum_values, value, channels, grad_value, [](std::int64_t, T*) {});
}

}  // namespace

void minibatch_self_attention_backward(const std::string& dtype, const MapAttention& call, const Map& grad_out,
                                       const Map& query, const Map& key, const Map& value, const Map& out,
                                       const void* lse, const Map& grad_query, const Map& grad_key,
                                       const Map& grad_value) {
  dispatch(dtype, [&](auto type) {
    backward<typename decltype(type)::type>(call, grad_out, query, key, value, out, lse, grad_query, grad_key,
                                            grad_value);
  });
}

}  // namespace gdl
