// What the backward passes of minibatch self-attention share: keys among several tasks, tiles of queries with their
// output's gradient, and sums of queries over the tasks' copies.
#pragma once

#include "minibatch_self_attention_maps.h"

namespace gdl {

// Keys whose scores with a tile of queries are kept at once.
constexpr int kKeysOfPair = 64;
// Keys that the tiles of queries pass by before others are taken: with their gradients they take half of a 512 KB L2.
constexpr std::int64_t kResidentKeys = 256;

// A task has a range of an image's keys. Every range has its own copy of what is summed by queries. How many there are
// follows from the shape alone: results don't hang on the number of threads.
struct KeyRanges {
  explicit KeyRanges(const MapAttention& call) : keys(call.keys()) {
    const std::int64_t pairs = (keys + kKeysOfPair - 1) / kKeysOfPair;
    const std::int64_t wanted = call.batch == 0 ? 1 : (16 + call.batch - 1) / call.batch;
    count = std::max<std::int64_t>(1, std::min<std::int64_t>({wanted, 8, pairs}));
  }

  std::int64_t first(std::int64_t range) const { return keys * range / count; }

  std::int64_t keys, count;
};

// A tile of queries of an image, with the gradient of its output.
template <typename E>
struct QueriesSeen {
  using T = accumulator_t<E>;

  explicit QueriesSeen(const MapAttention& call)
      : query(features(call)),
        grad(call.value_channels),
        out(call.value_channels),
        lse(make_buffer<T>(kQueryTile)),
        delta(make_buffer<T>(kQueryTile)) {}

  // delta = sum over channels of dO * O.
  void load_from(const MapAttention& call, const Map& grad_out, const Map& queries, const Map& outs,
                 const void* all_lse, std::int64_t image, std::int64_t tile) {
    n = image, first = tile * kQueryTile;
    count = static_cast<int>(std::min<std::int64_t>(kQueryTile, call.pixels() - first));
    lanes = padded<T>(count);
    load_queries(call, MapOf<const E>(queries), n, first, count, T(1), true, query);
    load_tile(MapOf<const E>(grad_out), n, first, count, call.value_channels, T(1), true, grad);
    load_tile(MapOf<const E>(outs), n, first, count, call.value_channels, T(1), false, out);
    const T* from = static_cast<const T*>(all_lse) + n * call.pixels() + first;
    for (int i = 0; i < lanes; ++i) lse[i] = i < count ? from[i] : T(0);
    for (int v = 0; v < lanes; v += kWidth<T>) {
      // In several sums: all weights of a query feel the rounding of its delta.
      Vec<T> sums[8] = {};
      for (std::int64_t c = 0; c < call.value_channels; ++c)
        sums[c % 8] +=
            load(grad.by_channel.get() + c * kQueryTile + v) * load(out.by_channel.get() + c * kQueryTile + v);
      for (int j = 4; j > 0; j /= 2)
        for (int i = 0; i < j; ++i) sums[i] += sums[i + j];
      store<T>(delta.get() + v, sums[0]);
    }
  }

  std::int64_t n, first;
  int count, lanes;
  QueryTile<T> query, grad, out;
  Buffer<T> lse, delta;
};

// The weights of scores. log2(e) multiplies what is left of the score: times the score itself, rounding errors of large
// scores would be felt in the weights.
template <typename T>
Vec<T> weight_of(Vec<T> score, Vec<T> lse) {
  return exp2<T>((score - lse) * static_cast<T>(kLog2E));
}

// products[key][query] = rows of keys by a tile of queries.
template <bool accumulate, typename T>
void by_queries(int keys, int lanes, std::int64_t channels, const T* rows, const QueryTile<T>& tile, T* products) {
  gemm<accumulate>(keys, lanes, static_cast<int>(channels), rows, channels, 1, tile.by_channel.get(), kQueryTile,
                   products, kQueryTile);
}

// sums[channel][query] += rows of keys, transposed, by weights[key][query].
template <typename T>
void add_to_queries(int keys, int lanes, std::int64_t channels, const T* rows, std::int64_t width, const T* weights,
                    T* sums) {
  gemm<true>(static_cast<int>(channels), lanes, keys, rows, 1, width, weights, kQueryTile, sums, kQueryTile);
}

// sums[key][channel] += weights[key][query] by a tile of queries.
template <typename T>
void add_to_keys(int keys, int count, const T* weights, const QueryTile<T>& tile, T* sums) {
  gemm<true>(keys, tile.width, count, weights, kQueryTile, 1, tile.by_pixel.get(), tile.width, sums, tile.width);
}

// Sums by tile of queries, [channel][query], a copy for each range of keys.
template <typename T>
struct QuerySums {
  QuerySums(const MapAttention& call, std::int64_t ranges, std::int64_t channels)
      : ranges(ranges),
        channels(channels),
        tiles(query_tiles(call)),
        copy(call.batch * tiles * channels * kQueryTile),
        sums(make_buffer<T>(ranges * copy)) {}

  T* at(std::int64_t range, std::int64_t n, std::int64_t tile) {
    return sums.get() + range * copy + (n * tiles + tile) * channels * kQueryTile;
  }

  void clear(std::int64_t range, std::int64_t n) { std::fill_n(at(range, n, 0), tiles * channels * kQueryTile, T(0)); }

  // Adds up the copies and stores them times a factor.
  template <typename E>
  void store_in(const MapAttention& call, T factor, const Map& out) {
    const MapOf<E> to(out);
    parallel_for(
        call.threads, call.batch * tiles, [&] { return make_buffer<T>(kQueryTile * padded<T>(channels)); },
        [&](std::int64_t task, Buffer<T>& by_pixel) {
          const std::int64_t n = task / tiles, tile = task % tiles;
          T* total = at(0, n, tile);
          for (std::int64_t range = 1; range < ranges; ++range) {
            const T* more = at(range, n, tile);
            for (std::int64_t i = 0; i < channels * kQueryTile; ++i) total[i] += more[i];
          }
          for (std::int64_t i = 0; i < channels * kQueryTile; ++i) total[i] *= factor;
          const std::int64_t first = tile * kQueryTile;
          const int count = static_cast<int>(std::min<std::int64_t>(kQueryTile, call.pixels() - first));
          store_tile(total, by_pixel.get(), to, n, first, count, channels);
        });
  }

  std::int64_t ranges, channels, tiles, copy;
  Buffer<T> sums;
};

// Sums of keys: rows in whole vectors, [key][channel].
template <typename T>
struct KeySums {
  KeySums(const MapAttention& call, std::int64_t channels)
      : width(padded<T>(channels)), keys(call.keys()), sums(make_buffer<T>(call.batch * keys * width)) {}

  T* at(std::int64_t n, std::int64_t key) { return sums.get() + (n * keys + key) * width; }

  std::int64_t width, keys;
  Buffer<T> sums;
};

// Calls finish(row, sums) for the row of every key of every image, then stores what these have become.
template <typename E, typename T, typename Finish>
void store_key_sums(const MapAttention& call, KeySums<T>& sums, const Map& pooled_map, std::int64_t channels,
                    const Map& out, Finish finish) {
  parallel_for(
      call.threads, call.batch, [] { return 0; },
      [&](std::int64_t n, int) {
        for (std::int64_t key = 0; key < sums.keys; ++key) finish(n * sums.keys + key, sums.at(n, key));
      });
  store_keys<E>(call, sums.sums.get(), sums.width, pooled_map, channels, out);
}

// Walks all pairs: begin(range, n, first key, keys) once a task, then for every tile of queries and some keys
// pair(range, n, tile, first key, keys, own), after load(n, tile, own). `own` is what make_own() makes for each thread.
template <typename MakeOwn, typename Begin, typename Load, typename Pair>
void walk_pairs(const MapAttention& call, const KeyRanges& ranges, MakeOwn make_own, Begin begin, Load load,
                Pair pair) {
  parallel_for(call.threads, call.batch * ranges.count, make_own, [&](std::int64_t task, auto& own) {
    const std::int64_t n = task / ranges.count, range = task % ranges.count;
    const std::int64_t from = ranges.first(range), to = ranges.first(range + 1);
    begin(range, n, from, to - from);
    for (std::int64_t resident = from; resident < to; resident += kResidentKeys) {
      const std::int64_t end = std::min(to, resident + kResidentKeys);
      for (std::int64_t tile = 0; tile < query_tiles(call); ++tile) {
        load(n, tile, own);
        for (std::int64_t key = resident; key < end; key += kKeysOfPair)
          pair(range, n, tile, key, static_cast<int>(std::min<std::int64_t>(kKeysOfPair, end - key)), own);
      }
    }
  });
}

}  // namespace gdl
