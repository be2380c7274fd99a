#include "minibatch_self_attention.h"

#include <cmath>
#include <limits>

#include "minibatch_self_attention_maps.h"

namespace gdl {
namespace {

// Keys whose scores are kept at once.
constexpr int kKeysAtOnce = 64;

template <typename T>
struct ForwardScratch {
  explicit ForwardScratch(const MapAttention& call)
      : query(features(call)),
        out(call.value_channels),
        scores(make_buffer<T>(kKeysAtOnce * kQueryTile)),
        maxima(make_buffer<T>(kQueryTile)),
        sums(make_buffer<T>(kQueryTile)) {}

  QueryTile<T> query, out;
  Buffer<T> scores, maxima, sums;
};

// One step of the online softmax down the columns: scores become exp(score - maximum), and sums and outputs are brought
// to the new maximum. A query in each lane.
template <typename T>
void softmax_columns(int keys, int lanes, std::int64_t channels, ForwardScratch<T>& s) {
  const Vec<T> nothing = broadcast<T>(-std::numeric_limits<T>::infinity());
  for (int v = 0; v < lanes; v += kWidth<T>) {
    T* column = s.scores.get() + v;
    const Vec<T> before = load(s.maxima.get() + v);
    // Several chains, or each maximum waits for the one before. What is NaN may be lost here: exp2 keeps it.
    Vec<T> tops[4] = {before, before, before, before};
    int k = 0;
    for (; k + 4 <= keys; k += 4)
      for (int j = 0; j < 4; ++j) tops[j] = maximum<T>(tops[j], load(column + (k + j) * kQueryTile));
    for (; k < keys; ++k) tops[0] = maximum<T>(tops[0], load(column + k * kQueryTile));
    const Vec<T> top = maximum<T>(maximum<T>(tops[0], tops[1]), maximum<T>(tops[2], tops[3]));
    const Vec<T> base = top == nothing ? Vec<T>{} : top;  // -inf - -inf is NaN, though a later key may be finite
    Vec<T> totals[2] = {};
    for (k = 0; k < keys; ++k) {
      const Vec<T> p = exp2<T>((load(column + k * kQueryTile) - base) * static_cast<T>(kLog2E));
      store<T>(column + k * kQueryTile, p);
      totals[k % 2] += p;
    }
    const Vec<T> shrink = exp2<T>((before - base) * static_cast<T>(kLog2E));
    store<T>(s.maxima.get() + v, top);
    store<T>(s.sums.get() + v, load(s.sums.get() + v) * shrink + (totals[0] + totals[1]));
    bool grown = false;
    for (int i = 0; i < kWidth<T>; ++i) grown |= !(shrink[i] == 1);
    if (!grown) continue;
    for (std::int64_t c = 0; c < channels; ++c) {
      T* out = s.out.by_channel.get() + c * kQueryTile + v;
      store<T>(out, load(out) * shrink);
    }
  }
}

template <typename E>
void forward(const MapAttention& call, const Map& query, const Map& key, const Map& value, const Map& out, void* lse) {
  using T = accumulator_t<E>;
  const MapOf<const E> queries(query);
  const MapOf<E> to(out);
  const std::int64_t depth = features(call), channels = call.value_channels;
  const ScoreKeys<T> keys = pack_score_keys<E>(call, key);
  const Buffer<T> values = pack_keys<E>(call, value, value, channels, channels);
  const std::int64_t tiles = query_tiles(call);
  parallel_for(
      call.threads, call.batch * tiles, [&] { return ForwardScratch<T>(call); },
      [&](std::int64_t task, ForwardScratch<T>& s) {
        const std::int64_t n = task / tiles, first = task % tiles * kQueryTile;
        const int count = static_cast<int>(std::min<std::int64_t>(kQueryTile, call.pixels() - first));
        const int lanes = padded<T>(count);
        load_queries(call, queries, n, first, count, T(1), false, s.query);
        T* sums = s.out.by_channel.get();
        std::fill_n(s.maxima.get(), lanes, -std::numeric_limits<T>::infinity());
        std::fill_n(s.sums.get(), lanes, T(0));
        std::fill_n(sums, channels * kQueryTile, T(0));
        for (std::int64_t k = 0; k < call.keys(); k += kKeysAtOnce) {
          const int some = static_cast<int>(std::min<std::int64_t>(kKeysAtOnce, call.keys() - k));
          const std::int64_t row = n * call.keys() + k;
          gemm<false>(some, lanes, static_cast<int>(depth), keys.row(row), depth, 1, s.query.by_channel.get(),
                      kQueryTile, s.scores.get(), kQueryTile);
          softmax_columns(some, lanes, channels, s);
          gemm<true>(static_cast<int>(channels), lanes, some, values.get() + row * channels, 1, channels,
                     s.scores.get(), kQueryTile, sums, kQueryTile);
        }
        for (int v = 0; v < lanes; v += kWidth<T>) {
          const Vec<T> share = T(1) / load(s.sums.get() + v);
          for (std::int64_t c = 0; c < channels; ++c)
            store<T>(sums + c * kQueryTile + v, load(sums + c * kQueryTile + v) * share);
        }
        store_tile(sums, s.out.by_pixel.get(), to, n, first, count, channels);
        T* to_lse = static_cast<T*>(lse) + n * call.pixels() + first;
        for (int i = 0; i < count; ++i) to_lse[i] = s.maxima[i] + std::log(s.sums[i]);
      });
}

}  // namespace

void minibatch_self_attention_forward(const std::string& dtype, const MapAttention& call, const Map& query,
                                      const Map& key, const Map& value, const Map& out, void* lse) {
  dispatch(dtype, [&](auto type) { forward<typename decltype(type)::type>(call, query, key, value, out, lse); });
}

}  // namespace gdl
