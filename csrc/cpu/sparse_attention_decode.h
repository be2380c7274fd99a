// Forward pass of block-sparse attention for a few queries: decoding with a cache.
//
// Nothing is packed: keys and values are read once, from where they lie, which is what it costs. A task is a range of
// the kept keys of one line of the layout, for the queries of one key head that are in that line; its partial result, a
// row's maximum, sum and output, is merged with the others of that row. The ranges hang on the layout alone, so that
// any number of threads gives the same bits.
#pragma once

#include <algorithm>
#include <vector>

#include "sparse_attention_softmax.h"
#include "sparse_attention_tiles.h"

namespace gdl {

// With more queries, packing pays. Measured on a Xeon with AVX-512 at 2.8 GHz, 16384 keys, 64 features.
constexpr std::int64_t kQueriesToDecode = 8;
constexpr std::int64_t kKeysOfTask = 2048;

// A vector of contiguous numbers, widened.
template <typename E, typename T = accumulator_t<E>>
inline Vec<T> load_widened(const E* from) {
  if constexpr (std::is_same_v<E, T>) {
    return load(from);
  } else if constexpr (std::is_same_v<E, bfloat16>) {
    typedef std::uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    typedef std::uint32_t Whole __attribute__((vector_size(kVectorBytes)));
    Half bits;
    std::memcpy(&bits, from, sizeof bits);
    return (Vec<T>)(__builtin_convertvector(bits, Whole) << 16);
  } else {
    T wide[kWidth<T>];
    load(from, wide, kWidth<T>);
    return load(wide);
  }
}

// scores[j] = <query, keys[j]>, count a multiple of the vector's width. What comes next is fetched meanwhile.
template <typename E, typename T = accumulator_t<E>>
void scores_of_keys(const E* const* keys, int count, int features, const T* query, T* scores) {
  constexpr int width = kWidth<T>;
  for (int j = 0; j < count; j += width) {
    Vec<T> sums[width] = {};
    for (int v = 0; v < features; v += width) {
      const Vec<T> q = load(query + v);
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) sums[i] += q * load_widened(keys[j + i] + v);
    }
    store<T>(scores + j, reduce_sums<T>(sums));
  }
}

// out += weights * values
template <typename E, typename T, int vectors>
void add_weighted(const E* const* values, int count, const T* weights, T* out, int v) {
  Vec<T> sums[vectors];
#pragma GCC unroll 4
  for (int i = 0; i < vectors; ++i) sums[i] = load(out + v + i * kWidth<T>);
  for (int j = 0; j < count; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) sums[i] += weights[j] * load_widened(values[j] + v + i * kWidth<T>);
#pragma GCC unroll 4
  for (int i = 0; i < vectors; ++i) store<T>(out + v + i * kWidth<T>, sums[i]);
}

template <typename E, typename T = accumulator_t<E>>
void add_weighted_values(const E* const* values, int count, int features, const T* weights, T* out) {
  int v = 0;
  for (; v + 4 * kWidth<T> <= features; v += 4 * kWidth<T>) add_weighted<E, T, 4>(values, count, weights, out, v);
  for (; v < features; v += kWidth<T>) add_weighted<E, T, 1>(values, count, weights, out, v);
}

// Queries of one key head in one line of the layout, and one order.
struct DecodedLine {
  std::int64_t kv_head, head, line;  // head: one of the query heads, they share order and line
  std::vector<std::int64_t> heads, queries;
  std::vector<int> bit_rows;
};

inline std::vector<DecodedLine> decoded_lines(const Attention& call, const Geometry& geometry) {
  std::vector<DecodedLine> lines;
  const bool shared = std::max(call.layout_heads, call.order_heads) <= 1;
  for (std::int64_t kv_head = 0; kv_head < call.kv_heads; ++kv_head) {
    const std::size_t first = lines.size();
    for (std::int64_t head = kv_head * geometry.group; head < (kv_head + 1) * geometry.group; ++head)
      for (std::int64_t q = 0; q < call.n_q; ++q) {
        const std::int64_t place = place_of(call, head, call.query_start + q);
        const std::int64_t line = (call.layout_heads == 1 ? 0 : head) * geometry.q_blocks + place / call.block_size;
        auto found = std::find_if(lines.begin() + static_cast<std::ptrdiff_t>(first), lines.end(), [&](const auto& l) {
          return l.line == line && (shared || l.head == head) && l.queries.size() < kMaxTile;
        });
        if (found == lines.end()) found = lines.insert(found, {kv_head, head, line, {}, {}, {}});
        found->heads.push_back(head);
        found->queries.push_back(q);
        found->bit_rows.push_back(static_cast<int>(place % call.block_size));
      }
  }
  return lines;
}

// A range of a line's list, counted in tiles, and where its partial results are.
struct DecodeTask {
  std::size_t line;
  std::int64_t begin, end, row;
};

template <typename E>
void decode(const Attention& call, const Strided& query, const Strided& key, const Strided& value, const Strided& out,
            void* lse_data) {
  using T = accumulator_t<E>;
  const Geometry geometry(call);
  const int tile = geometry.tile, head_dim = padded<T>(call.head_dim), value_dim = padded<T>(call.value_dim);
  const int tiles_at_once = kKeysAtOnce / tile;
  const T scale = static_cast<T>(call.scale * kLog2E);
  const std::vector<DecodedLine> lines = decoded_lines(call, geometry);

  std::vector<DecodeTask> tasks;
  std::vector<std::size_t> first_task;
  std::int64_t rows = 0;
  for (std::size_t l = 0; l < lines.size(); ++l) {
    first_task.push_back(tasks.size());
    const std::int64_t begin = std::int64_t(call.rows.starts[lines[l].line]) * geometry.tiles_per_block;
    const std::int64_t end = std::int64_t(call.rows.starts[lines[l].line + 1]) * geometry.tiles_per_block;
    for (std::int64_t at = begin; at < end; at += kKeysOfTask / tile) {
      tasks.push_back({l, at, std::min(end, at + kKeysOfTask / tile), rows});
      rows += static_cast<std::int64_t>(lines[l].queries.size());
    }
  }
  first_task.push_back(tasks.size());

  Buffer<T> partial_out = make_buffer<T>(call.batch * rows * value_dim);
  Buffer<T> partial_maximum = make_buffer<T>(call.batch * rows), partial_sum = make_buffer<T>(call.batch * rows);
  // Rows of whole vectors are read in place; others are widened into scratch first.
  const bool keys_in_place = key.feature == 1 && call.head_dim == head_dim;
  const bool values_in_place = value.feature == 1 && call.value_dim == value_dim;

  struct Scratch {
    Buffer<T> queries, scores, keys, values, kept;
    Buffer<E> nothing;
  };
  const auto make_scratch = [&] {
    Scratch s{make_buffer<T>(kMaxTile * head_dim),
              make_buffer<T>(kMaxTile * kScoresStride),
              make_buffer<T>(keys_in_place ? 0 : kKeysAtOnce * head_dim),
              make_buffer<T>(values_in_place ? 0 : kKeysAtOnce * value_dim),
              make_buffer<T>(call.dropout_p > 0 ? kMaxTile * tile : 0),
              make_buffer<E>(std::max(head_dim, value_dim))};
    std::memset(s.nothing.get(), 0, std::max(head_dim, value_dim) * sizeof(E));
    return s;
  };
  const auto count = static_cast<std::int64_t>(tasks.size());
  parallel_for(call.threads, call.batch * count, make_scratch, [&](std::int64_t index, Scratch& s) {
    const std::int64_t batch = index / count;
    const DecodeTask& task = tasks[index % count];
    const DecodedLine& line = lines[task.line];
    const int queries = static_cast<int>(line.queries.size());
    const std::int64_t row = batch * rows + task.row;
    T *sums = partial_sum.get() + row, *maxima = partial_maximum.get() + row;
    T* sum_out = partial_out.get() + row * value_dim;
    std::fill(maxima, maxima + queries, -std::numeric_limits<T>::infinity());
    std::fill(sums, sums + queries, T(0));
    std::fill(sum_out, sum_out + queries * value_dim, T(0));
    for (int i = 0; i < queries; ++i) {
      T* to = s.queries.get() + i * head_dim;
      load_features<E>(query, batch, line.heads[i], line.queries[i], call.head_dim, to, head_dim);
      for (int v = 0; v < head_dim; v += kWidth<T>) store<T>(to + v, load(to + v) * scale);
    }
    for (std::int64_t begin = task.begin; begin < task.end; begin += tiles_at_once) {
      const int tiles = static_cast<int>(std::min<std::int64_t>(tiles_at_once, task.end - begin)), keys = tiles * tile;
      std::int64_t positions[kKeysAtOnce];
      const E *key_rows[kKeysAtOnce], *value_rows[kKeysAtOnce];
      const T *wide_keys[kKeysAtOnce], *wide_values[kKeysAtOnce];
      for (int k = 0; k < tiles; ++k) {
        const std::int64_t block = call.rows.blocks[(begin + k) / geometry.tiles_per_block];
        const std::int64_t place = block * call.block_size + (begin + k) % geometry.tiles_per_block * tile;
        for (int j = 0; j < tile; ++j) positions[k * tile + j] = key_at(call, line.head, place + j);
      }
      for (int j = 0; j < keys; ++j) {
        const std::int64_t seen = left_out(call, batch, positions[j]) ? -1 : positions[j];
        const auto row_of = [&](const Strided& x) {
          return seen < 0 ? s.nothing.get()
                          : static_cast<const E*>(x.data) + batch * x.batch + line.kv_head * x.head + seen * x.position;
        };
        key_rows[j] = row_of(key), value_rows[j] = row_of(value);
        if (!keys_in_place) {
          wide_keys[j] = s.keys.get() + j * head_dim;
          load_features<E>(key, batch, line.kv_head, seen, call.head_dim, s.keys.get() + j * head_dim, head_dim);
        }
        if (!values_in_place) {
          wide_values[j] = s.values.get() + j * value_dim;
          load_features<E>(value, batch, line.kv_head, seen, call.value_dim, s.values.get() + j * value_dim, value_dim);
        }
      }
      for (int i = 0; i < queries; ++i) {
        T* scores = s.scores.get() + i * kScoresStride;
        if (keys_in_place)
          scores_of_keys(key_rows, keys, head_dim, s.queries.get() + i * head_dim, scores);
        else
          scores_of_keys(wide_keys, keys, head_dim, s.queries.get() + i * head_dim, scores);
      }
      for (int k = 0; k < tiles; ++k) {
        const std::int64_t entry = (begin + k) / geometry.tiles_per_block;
        T* scores = s.scores.get() + k * tile;
        if (entry >= call.rows.splits[line.line])
          mask_scores(scores, kScoresStride, queries, tile,
                      call.mask_table + std::int64_t(call.rows.masks[entry]) * call.block_size * geometry.words,
                      geometry.words, line.bit_rows.data(),
                      static_cast<int>((begin + k) % geometry.tiles_per_block) * tile);
      }
      if (call.key_padding_mask != nullptr) {
        alignas(64) T bias[kKeysAtOnce];
        for (int j = 0; j < keys; ++j)
          bias[j] = left_out(call, batch, positions[j]) ? -std::numeric_limits<T>::infinity() : T(0);
        add_bias(s.scores.get(), kScoresStride, queries, keys, bias);
      }
      softmax_step(s.scores.get(), kScoresStride, queries, keys, maxima, sums, sum_out, value_dim);
      if (call.dropout_p > 0)
        for (int i = 0; i < queries; ++i)
          for (int k = 0; k < tiles; ++k) {
            const std::int64_t position = call.query_start + line.queries[i];
            dropout_multipliers(call, batch, line.heads[i], &position, 1, positions + k * tile, tile, T(1),
                                s.kept.get(), tile);
            multiply(s.scores.get() + i * kScoresStride + k * tile, kScoresStride, s.kept.get(), tile, 1, tile);
          }
      for (int i = 0; i < queries; ++i) {
        const T* weights = s.scores.get() + i * kScoresStride;
        if (values_in_place)
          add_weighted_values(value_rows, keys, value_dim, weights, sum_out + i * value_dim);
        else
          add_weighted_values(wide_values, keys, value_dim, weights, sum_out + i * value_dim);
      }
    }
  });

  T* lse = static_cast<T*>(lse_data);
  Buffer<T> total_out = make_buffer<T>(value_dim);
  for (std::int64_t batch = 0; batch < call.batch; ++batch)
    for (std::size_t l = 0; l < lines.size(); ++l)
      for (std::size_t i = 0; i < lines[l].queries.size(); ++i) {
        T maximum = -std::numeric_limits<T>::infinity(), sum = 0;
        std::fill(total_out.get(), total_out.get() + value_dim, T(0));
        const auto row_of = [&](std::size_t t) { return batch * rows + tasks[t].row + static_cast<std::int64_t>(i); };
        for (std::size_t t = first_task[l]; t < first_task[l + 1]; ++t)
          maximum = std::max(maximum, partial_maximum[row_of(t)]);
        const bool empty = maximum == -std::numeric_limits<T>::infinity();
        for (std::size_t t = first_task[l]; t < first_task[l + 1] && !empty; ++t) {
          const std::int64_t row = row_of(t);
          const T share = exp2<T>(broadcast<T>(partial_maximum[row] - maximum))[0];
          sum += share * partial_sum[row];
          for (int v = 0; v < value_dim; v += kWidth<T>)
            store<T>(total_out.get() + v,
                     load(total_out.get() + v) + share * load(partial_out.get() + row * value_dim + v));
        }
        const T inverse = empty ? T(0) : T(1) / (sum * static_cast<T>(1 - call.dropout_p));
        for (int v = 0; v < value_dim; v += kWidth<T>)
          store<T>(total_out.get() + v, load(total_out.get() + v) * inverse);
        const std::int64_t head = lines[l].heads[i], q = lines[l].queries[i];
        store_features<E>(total_out.get(), out, batch, head, q, call.value_dim);
        lse[(batch * call.heads + head) * call.n_q + q] =
            empty ? maximum : static_cast<T>(kLn2) * (maximum + std::log2(sum));
      }
}

}  // namespace gdl
