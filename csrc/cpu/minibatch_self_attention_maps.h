// How self-attention of a minibatch reads and writes maps: queries by tiles of pixels, keys and values by image.
//
// Scores are computed transposed, S^T[key][query] = K Q: a softmax over keys then runs down the rows with a query in
// each lane, and needs no sums across lanes. Keys and values are always left sides of products, which are read element
// by element, so one copy of them, a row a key, serves every product. What belongs to queries is a right side, by
// channel or by pixel.
//
// With l2 a key has one more channel, -|k|^2 / 2, and a query a 1 there: |q - k|^2 = |q|^2 - 2 <q, k> of these longer
// ones, and the softmax doesn't see |q|^2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "buffer.h"
#include "dispatch.h"
#include "gemm.h"
#include "half.h"
#include "minibatch_self_attention.h"
#include "tiles.h"
#include "vec.h"

namespace gdl {

// Queries of a tile. Rows of 256 bytes: with as many keys, a tile of scores takes half of a 32 KB L1.
constexpr int kQueryTile = 64;

template <typename E>
struct MapOf {
  explicit MapOf(const Map& map)
      : data(static_cast<E*>(map.data)),
        image(map.image),
        channel(map.channels_last ? 1 : map.line),
        pixel(map.channels_last ? map.line : 1),
        channels_last(map.channels_last) {}

  E* at(std::int64_t n, std::int64_t c, std::int64_t p) const { return data + n * image + c * channel + p * pixel; }

  E* data;
  std::int64_t image, channel, pixel;
  bool channels_last;
};

// Channels of a packed query or key, and what a dot product of the two is multiplied by to be a score.
inline std::int64_t features(const MapAttention& call) { return call.channels + (call.l2 ? 1 : 0); }
inline double score_factor(const MapAttention& call) { return call.l2 ? 2 * call.scale : call.scale; }

inline std::int64_t query_tiles(const MapAttention& call) { return (call.pixels() + kQueryTile - 1) / kQueryTile; }

// A tile of queries, or of what has a row for each: [channel][pixel] and [pixel][channel], rows in whole vectors.
template <typename T>
struct QueryTile {
  explicit QueryTile(std::int64_t channels)
      : width(padded<T>(channels)),
        by_channel(make_buffer<T>(channels * kQueryTile)),
        by_pixel(make_buffer<T>(kQueryTile * width)) {
    std::fill_n(by_pixel.get(), kQueryTile * width, T(0));  // rows end in zeros
  }

  int width;
  Buffer<T> by_channel, by_pixel;
};

// Pixels from `first` times a factor, zeros after the last. by_pixel is filled where `both` is asked for.
template <typename E, typename T = accumulator_t<E>>
void load_tile(const MapOf<E>& map, std::int64_t n, std::int64_t first, int count, std::int64_t channels, T factor,
               bool both, QueryTile<T>& to) {
  T* by_channel = to.by_channel.get();
  T* by_pixel = to.by_pixel.get();
  if (map.channels_last) {
    for (int i = 0; i < count; ++i) load(map.at(n, 0, first + i), by_pixel + i * to.width, channels);
    transpose(by_pixel, to.width, by_channel, kQueryTile, count, static_cast<int>(channels));
    if (both && factor != 1)
      for (int v = 0; v < count * to.width; v += kWidth<T>) store<T>(by_pixel + v, load(by_pixel + v) * factor);
  } else {
    for (std::int64_t c = 0; c < channels; ++c) load(map.at(n, c, first), by_channel + c * kQueryTile, count);
  }
  const int lanes = padded<T>(count);
  for (std::int64_t c = 0; c < channels; ++c) {
    T* row = by_channel + c * kQueryTile;
    std::fill(row + count, row + lanes, T(0));
    if (factor != 1)
      for (int v = 0; v < lanes; v += kWidth<T>) store<T>(row + v, load(row + v) * factor);
  }
  if (both && !map.channels_last)
    transpose(by_channel, kQueryTile, by_pixel, to.width, static_cast<int>(channels), count);
}

// Queries, or the gradients of their gradients, times the factor of scores. `one` is what they have in the
// channel that l2 adds: 1, which has no gradient.
template <typename E, typename T = accumulator_t<E>>
void load_queries(const MapAttention& call, const MapOf<E>& map, std::int64_t n, std::int64_t first, int count, T one,
                  bool both, QueryTile<T>& to) {
  const T factor = static_cast<T>(score_factor(call));
  load_tile(map, n, first, count, call.channels, factor, both, to);
  if (!call.l2) return;
  std::fill_n(to.by_channel.get() + call.channels * kQueryTile, kQueryTile, one * factor);
  for (int i = 0; i < count; ++i) to.by_pixel[i * to.width + call.channels] = one * factor;
}

// rows: [channel][pixel], stored at the pixels from `first`; by_pixel is scratch.
template <typename E, typename T = accumulator_t<E>>
void store_tile(const T* rows, T* by_pixel, const MapOf<E>& map, std::int64_t n, std::int64_t first, int count,
                std::int64_t channels) {
  if (!map.channels_last) {
    for (std::int64_t c = 0; c < channels; ++c) store(rows + c * kQueryTile, map.at(n, c, first), count);
    return;
  }
  const int width = padded<T>(channels);
  transpose(rows, kQueryTile, by_pixel, width, static_cast<int>(channels), count);
  for (int i = 0; i < count; ++i) store(by_pixel + i * width, map.at(n, 0, first + i), channels);
}

// A part of an image's keys, large enough for a task, and contiguous in memory: rows of keys where channels are last,
// else channels. Of these so many that their numbers fill the cache lines of the packed rows.
struct KeyParts {
  KeyParts(const MapAttention& call, std::int64_t channels, bool channels_last)
      : rows(call.height / call.pool),
        channels(channels),
        channels_last(channels_last),
        count(channels_last ? rows : (channels + kChannels - 1) / kChannels) {}

  // Calls visit(channel, key, first pixel of the key's window) in the order of memory.
  template <typename Visit>
  void visit(const MapAttention& call, std::int64_t part, Visit visit) const {
    const std::int64_t width = call.width / call.pool;
    const auto at = [&](std::int64_t c, std::int64_t y, std::int64_t x) {
      visit(c, y * width + x, (y * call.width + x) * call.pool);
    };
    if (channels_last) {
      for (std::int64_t x = 0; x < width; ++x)
        for (std::int64_t c = 0; c < channels; ++c) at(c, part, x);
    } else {
      for (std::int64_t c = part * kChannels; c < std::min(channels, (part + 1) * kChannels); ++c)
        for (std::int64_t y = 0; y < rows; ++y)
          for (std::int64_t x = 0; x < width; ++x) at(c, y, x);
    }
  }

  static constexpr std::int64_t kChannels = 16;
  std::int64_t rows, channels;
  bool channels_last;
  std::int64_t count;
};

template <typename T>
struct Pooled {
  T value;
  std::int64_t pixel;
};

// What max pooling takes of a 2x2 window, as F.max_pool2d does: of equals the first, of NaN the last.
template <typename E, typename T = accumulator_t<E>>
Pooled<T> pooled(const MapAttention& call, const MapOf<const E>& map, std::int64_t n, std::int64_t c,
                 std::int64_t first) {
  Pooled<T> best{to_accumulator(*map.at(n, c, first)), first};
  for (const std::int64_t pixel : {first + 1, first + call.width, first + call.width + 1}) {
    const T x = to_accumulator(*map.at(n, c, pixel));
    const bool taken = (x > best.value) | (x != x);  // a select: a branch would go the wrong way half of the time
    best.value = taken ? x : best.value;
    best.pixel = taken ? pixel : best.pixel;
  }
  return best;
}

// Rows of `channels` numbers, one a key of every image: `from` where max pooling takes `pooled_map`. These are the same
// but for what is differentiated along the way: that goes where the maximum came from. Rows are `width` apart.
template <typename E, typename T = accumulator_t<E>>
Buffer<T> pack_keys(const MapAttention& call, const Map& from, const Map& pooled_map, std::int64_t channels,
                    std::int64_t width) {
  const MapOf<const E> values(from), map(pooled_map);
  Buffer<T> packed = make_buffer<T>(call.batch * call.keys() * width);
  const KeyParts parts(call, channels, values.channels_last);
  parallel_for(
      call.threads, call.batch * parts.count, [] { return 0; },
      [&](std::int64_t task, int) {
        const std::int64_t n = task / parts.count;
        T* to = packed.get() + n * call.keys() * width;
        const auto pack = [&](auto value_of) {
          parts.visit(call, task % parts.count, [&](std::int64_t c, std::int64_t key, std::int64_t first) {
            to[key * width + c] = value_of(c, first);
          });
        };
        if (call.pool == 1)
          pack([&](std::int64_t c, std::int64_t first) { return to_accumulator(*values.at(n, c, first)); });
        else if (values.data == map.data)
          pack([&](std::int64_t c, std::int64_t first) { return pooled<E>(call, map, n, c, first).value; });
        else
          pack([&](std::int64_t c, std::int64_t first) {
            return to_accumulator(*values.at(n, c, pooled<E>(call, map, n, c, first).pixel));
          });
      });
  return packed;
}

// Gradients of keys, in rows, stored where max pooling took them from: every pixel is written.
template <typename E, typename T = accumulator_t<E>>
void store_keys(const MapAttention& call, const T* rows, std::int64_t width, const Map& pooled_map,
                std::int64_t channels, const Map& out) {
  const MapOf<const E> map(pooled_map);
  const MapOf<E> to(out);
  const KeyParts parts(call, channels, to.channels_last);
  parallel_for(
      call.threads, call.batch * parts.count, [] { return 0; },
      [&](std::int64_t task, int) {
        const std::int64_t n = task / parts.count;
        const T* from = rows + n * call.keys() * width;
        parts.visit(call, task % parts.count, [&](std::int64_t c, std::int64_t key, std::int64_t first) {
          const E x = from_accumulator<E>(from[key * width + c]);
          if (call.pool == 1) {
            *to.at(n, c, first) = x;
            return;
          }
          const std::int64_t chosen = pooled<E>(call, map, n, c, first).pixel;
          for (const std::int64_t pixel : {first, first + 1, first + call.width, first + call.width + 1})
            *to.at(n, c, pixel) = pixel == chosen ? x : E{};
        });
      });
}

// Keys as scores are made of them, less their mean over an image. No softmax sees the mean, and the gradient of a query
// has it times a sum of dS that is 0 but for rounding, of a 16-bit output above all. Pooled keys have one far from 0: 5
// to 18 times plain PyTorch's error in bfloat16.
template <typename T>
struct ScoreKeys {
  ScoreKeys(const MapAttention& call, Buffer<T> packed)
      : keys(call.keys()),
        channels(call.channels),
        width(features(call)),
        rows(std::move(packed)),
        means(make_buffer<T>(call.batch * channels)) {
    parallel_for(
        call.threads, call.batch, [] { return 0; },
        [&](std::int64_t n, int) {
          T* image = rows.get() + n * keys * width;
          if (call.l2)
            for (T* k = image; k < image + keys * width; k += width) k[channels] = -square(k) / 2;
          for (std::int64_t c = 0; c < channels; ++c) {
            double sum = 0;
            for (std::int64_t key = 0; key < keys; ++key) sum += static_cast<double>(image[key * width + c]);
            const T mean = static_cast<T>(sum / static_cast<double>(keys));
            means[n * channels + c] = std::isfinite(mean) ? mean : T(0);
            for (std::int64_t key = 0; key < keys; ++key) image[key * width + c] -= means[n * channels + c];
          }
        });
  }

  const T* row(std::int64_t row) const { return rows.get() + row * width; }
  // As it was.
  T key(std::int64_t row, std::int64_t c) const { return rows[row * width + c] + means[row / keys * channels + c]; }

  std::int64_t keys, channels, width;
  Buffer<T> rows, means;

 private:
  T square(const T* k) const {
    T sum = 0;
    for (std::int64_t c = 0; c < channels; ++c) sum += k[c] * k[c];
    return sum;
  }
};

template <typename E, typename T = accumulator_t<E>>
ScoreKeys<T> pack_score_keys(const MapAttention& call, const Map& key) {
  return ScoreKeys<T>(call, pack_keys<E>(call, key, key, call.channels, features(call)));
}

}  // namespace gdl
