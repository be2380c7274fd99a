// Forward pass of block-sparse attention for a few queries: decoding with a cache.
//
// Nothing is packed: keys and values that a query keeps are read once, from where they lie, which is what it costs; of
// a partial block the others are not read. A task is a range of the kept blocks of one line of the layout, for the
// queries of one key head that are in that line; its partial result, a row's maximum, sum and output, is merged with
// the others of that row. The ranges hang on the layout alone, so that any number of threads gives the same bits.
#include <algorithm>
#include <vector>

#include "sparse_attention.h"
#include "sparse_attention_softmax.h"
#include "sparse_attention_tiles.h"

namespace gdl {
namespace {

constexpr std::int64_t kKeysOfTask = 2048;
// Rows that every query of a task uses before the next ones are looked at.
constexpr int kRowsInCache = 64;
// Keys are padded to a multiple of this with rows of zeros: every vector's width divides it.
constexpr int kKeysPadded = 16;

// Rows of keys or values, a pointer to each, and what comes after them, which is fetched meanwhile: alone, neither the
// products nor the memory would be busy all the time.
template <typename E>
struct RowPointers {
  const E* const* rows;
  int count;  // a multiple of the vector's width
  int features;
};

template <typename F>
void fetch(const RowPointers<F>& next, int row) {
  if (row < next.count)
    for (int v = 0; v < next.features; v += 64 / static_cast<int>(sizeof(F)))
      __builtin_prefetch(next.rows[row] + v, 0, 2);
}

// scores[j] = <query, keys[j]>
template <typename E, typename F, typename T = accumulator_t<E>>
void scores_of_keys(const RowPointers<E>& keys, const T* query, T* scores, const RowPointers<F>& next) {
  constexpr int width = kWidth<T>;
  for (int j = 0; j < keys.count; j += width) {
    for (int i = 0; i < width; ++i) fetch(next, j + i);
    Vec<T> sums[width];
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) sums[i] = Vec<T>{};
    for (int v = 0; v < keys.features; v += width) {
      const Vec<T> q = load(query + v);
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) sums[i] += q * load_widened(keys.rows[j + i] + v);
    }
    store<T>(scores + j, reduce_sums<T>(sums));
  }
}

template <typename E, typename F, typename T, int vectors>
void add_weighted(const RowPointers<E>& values, int v, const T* weights, T* out, const RowPointers<F>& next) {
  Vec<T> sums[vectors];
#pragma GCC unroll 4
  for (int i = 0; i < vectors; ++i) sums[i] = load(out + v + i * kWidth<T>);
  for (int j = 0; j < values.count; ++j) {
    fetch(next, j);
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) sums[i] += weights[j] * load_widened(values.rows[j] + v + i * kWidth<T>);
  }
#pragma GCC unroll 4
  for (int i = 0; i < vectors; ++i) store<T>(out + v + i * kWidth<T>, sums[i]);
}

// out += weights * values
template <typename E, typename F, typename T = accumulator_t<E>>
void add_weighted_values(const RowPointers<E>& values, const T* weights, T* out, RowPointers<F> next) {
  int v = 0;
  for (; v + 4 * kWidth<T> <= values.features; v += 4 * kWidth<T>, next.count = 0)
    add_weighted<E, F, T, 4>(values, v, weights, out, next);
  for (; v < values.features; v += kWidth<T>, next.count = 0) add_weighted<E, F, T, 1>(values, v, weights, out, next);
}

// Queries of one key head in one line of the layout, and one order.
struct DecodedLine {
  std::int64_t kv_head, head, line;  // head: one of the query heads, they share order and line
  std::vector<std::int64_t> heads, queries;
  std::vector<int> bit_rows;
};

std::vector<DecodedLine> decoded_lines(const Attention& call, const Geometry& geometry) {
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

// A range of a line's list, counted in tiles, and where its partial results are: one after the other for its queries.
struct DecodeTask {
  std::size_t line;
  std::int64_t begin, end, row;
};

// Of every sample, task and query, before the division by the sum.
template <typename T>
struct PartialResults {
  std::int64_t rows;  // of one sample
  Buffer<T> maximum, sum, out;
};

// Tasks of one line follow each other.
template <typename E, typename T = accumulator_t<E>>
void merge_parts(const Attention& call, const std::vector<DecodedLine>& lines, const std::vector<DecodeTask>& tasks,
                 const PartialResults<T>& parts, int value_dim, const Strided& out, T* lse) {
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  Buffer<T> total = make_buffer<T>(value_dim);
  for (std::int64_t batch = 0; batch < call.batch; ++batch) {
    std::size_t first = 0, last = 0;
    for (std::size_t l = 0; l < lines.size(); ++l, first = last) {
      while (last < tasks.size() && tasks[last].line == l) ++last;
      for (std::size_t i = 0; i < lines[l].queries.size(); ++i) {
        const auto row_of = [&](std::size_t task) {
          return batch * parts.rows + tasks[task].row + static_cast<std::int64_t>(i);
        };
        T maximum = nothing, sum = 0;
        for (std::size_t task = first; task < last; ++task) maximum = std::max(maximum, parts.maximum[row_of(task)]);
        std::fill(total.get(), total.get() + value_dim, T(0));
        for (std::size_t task = first; task < last && maximum != nothing; ++task) {
          const T share = exp2<T>(broadcast<T>(parts.maximum[row_of(task)] - maximum))[0];
          const T* part = parts.out.get() + row_of(task) * value_dim;
          sum += share * parts.sum[row_of(task)];
          for (int v = 0; v < value_dim; v += kWidth<T>)
            store<T>(total.get() + v, load(total.get() + v) + share * load(part + v));
        }
        const T inverse = maximum == nothing ? T(0) : T(1) / (sum * static_cast<T>(1 - call.dropout_p));
        for (int v = 0; v < value_dim; v += kWidth<T>) store<T>(total.get() + v, load(total.get() + v) * inverse);
        const std::int64_t head = lines[l].heads[i], q = lines[l].queries[i];
        store_features<E>(total.get(), out, batch, head, q, call.value_dim);
        lse[(batch * call.heads + head) * call.n_q + q] =
            maximum == nothing ? nothing : static_cast<T>(kLn2) * (maximum + std::log2(sum));
      }
    }
  }
}

template <typename E>
void decode(const Attention& call, const Strided& query, const Strided& key, const Strided& value, const Strided& out,
            void* lse_data) {
  using T = accumulator_t<E>;
  const Geometry geometry(call);
  const int tile = geometry.tile, head_dim = padded<T>(call.head_dim), value_dim = padded<T>(call.value_dim);
  const T scale = static_cast<T>(call.scale * kLog2E);
  const std::vector<DecodedLine> lines = decoded_lines(call, geometry);

  std::vector<DecodeTask> tasks;
  std::int64_t rows = 0;
  for (std::size_t l = 0; l < lines.size(); ++l) {
    const std::int64_t begin = std::int64_t(call.rows.starts[lines[l].line]) * geometry.tiles_per_block;
    const std::int64_t end = std::int64_t(call.rows.starts[lines[l].line + 1]) * geometry.tiles_per_block;
    for (std::int64_t at = begin; at < end; at += kKeysOfTask / tile) {
      tasks.push_back({l, at, std::min(end, at + kKeysOfTask / tile), rows});
      rows += static_cast<std::int64_t>(lines[l].queries.size());
    }
  }
  const PartialResults<T> parts{rows, make_buffer<T>(call.batch * rows), make_buffer<T>(call.batch * rows),
                                make_buffer<T>(call.batch * rows * value_dim)};

  // Keys that one of the line's queries keeps: as many whole tiles' as there is room for.
  struct Part {
    std::int64_t end;  // of its tiles
    int keys;
    bool all_kept;                       // by every query
    std::uint64_t queries[kKeysAtOnce];  // bit i: query i keeps the key
    std::int64_t positions[kKeysAtOnce];
    const E *key_rows[kKeysAtOnce], *value_rows[kKeysAtOnce];
  };
  struct Scratch {
    Buffer<T> queries, scores, wide, kept;
    const T* wide_rows[kRowsInCache];
    Buffer<E> zeros;
    Part parts[2];
  };
  const auto make_scratch = [&] {
    Scratch s{make_buffer<T>(kMaxTile * head_dim),
              make_buffer<T>(kMaxTile * kScoresStride),
              make_buffer<T>(kRowsInCache * std::max(head_dim, value_dim)),
              make_buffer<T>(call.dropout_p > 0 ? kMaxTile : 0),
              {},
              make_buffer<E>(std::max(head_dim, value_dim)),
              {}};
    std::memset(s.zeros.get(), 0, std::max(head_dim, value_dim) * sizeof(E));
    return s;
  };
  const auto count = static_cast<std::int64_t>(tasks.size());
  parallel_for(call.threads, call.batch * count, make_scratch, [&](std::int64_t index, Scratch& s) {
    const std::int64_t batch = index / count;
    const DecodeTask& task = tasks[index % count];
    const DecodedLine& line = lines[task.line];
    const int queries = static_cast<int>(line.queries.size());
    const std::int64_t row = batch * rows + task.row;
    T *maxima = parts.maximum.get() + row, *sums = parts.sum.get() + row;
    T* sum_out = parts.out.get() + row * value_dim;
    std::fill(maxima, maxima + queries, -std::numeric_limits<T>::infinity());
    std::fill(sums, sums + queries, T(0));
    std::fill(sum_out, sum_out + queries * value_dim, T(0));
    for (int i = 0; i < queries; ++i) {
      T* to = s.queries.get() + i * head_dim;
      load_features<E>(query, batch, line.heads[i], line.queries[i], call.head_dim, to, head_dim);
      for (int v = 0; v < head_dim; v += kWidth<T>) store<T>(to + v, load(to + v) * scale);
    }
    // Rows of whole vectors are read in place; but several queries share the work of widening.
    const bool as_they_are = std::is_same_v<E, T> || queries == 1;
    const bool keys_in_place = as_they_are && key.feature == 1 && call.head_dim == head_dim;
    const bool values_in_place = as_they_are && value.feature == 1 && call.value_dim == value_dim;

    const std::uint64_t every_query = ~std::uint64_t{0} >> (kMaxTile - queries);
    const auto find_keys = [&](std::int64_t begin, Part& part) {
      part.keys = 0;
      for (part.end = begin; part.end < task.end && part.keys + tile <= kKeysAtOnce; ++part.end) {
        const std::int64_t entry = part.end / geometry.tiles_per_block;
        const std::int64_t first = part.end % geometry.tiles_per_block * tile;
        const std::int64_t place = std::int64_t(call.rows.blocks[entry]) * call.block_size + first;
        const std::int32_t* mask =
            entry < call.rows.splits[line.line]
                ? nullptr
                : call.mask_table + std::int64_t(call.rows.masks[entry]) * call.block_size * geometry.words;
        for (int j = 0; j < tile; ++j) {
          std::uint64_t kept = mask == nullptr ? every_query : 0;
          for (int i = 0; mask != nullptr && i < queries; ++i) {
            const auto word = static_cast<std::uint32_t>(mask[line.bit_rows[i] * geometry.words + (first + j) / 32]);
            kept |= std::uint64_t{word >> ((first + j) % 32) & 1} << i;
          }
          if (kept == 0) continue;
          part.queries[part.keys] = kept;
          part.positions[part.keys++] = key_at(call, line.head, place + j);
        }
      }
      part.all_kept = std::all_of(part.queries, part.queries + part.keys, [&](auto q) { return q == every_query; });
      for (; part.keys % kKeysPadded != 0; ++part.keys, part.all_kept = false)
        part.queries[part.keys] = 0, part.positions[part.keys] = -1;
      const auto rows_of = [&](const Strided& x, const E** to) {
        const E* first = static_cast<const E*>(x.data) + batch * x.batch + line.kv_head * x.head;
        for (int j = 0; j < part.keys; ++j)
          to[j] = part.positions[j] < 0 ? s.zeros.get() : first + part.positions[j] * x.position;
        if (call.key_padding_mask != nullptr)
          for (int j = 0; j < part.keys; ++j)
            if (left_out(call, batch, part.positions[j])) to[j] = s.zeros.get();
      };
      rows_of(key, part.key_rows), rows_of(value, part.value_rows);
    };
    // Calls work(rows, first, next) for some rows at a time, which stay in the L1 while every query uses them, widened
    // first where they are not read in place. Features need not be contiguous.
    const auto for_rows = [&](const Strided& x, bool in_place, const E* const* rows, int keys, std::int64_t features,
                              const E* const* next_rows, int next_keys, int next_width, auto work) {
      const int width = padded<T>(features);
      for (int first = 0; first < keys; first += kRowsInCache) {
        const int here = std::min(kRowsInCache, keys - first);
        const RowPointers<E> next{next_rows + first, std::max(0, std::min(here, next_keys - first)), next_width};
        if (in_place) {
          work(RowPointers<E>{rows + first, here, width}, first, next);
          continue;
        }
        for (int j = 0; j < here; ++j) {
          T* to = s.wide.get() + j * width;
          const E* from = rows[first + j];
          const Strided one{const_cast<E*>(from), 0, 0, 0, x.feature};
          load_features<E>(one, 0, 0, from == s.zeros.get() ? -1 : 0, features, to, width);
          s.wide_rows[j] = to;
        }
        work(RowPointers<T>{s.wide_rows, here, width}, first, next);
      }
    };
    int parity = 0;
    if (task.begin < task.end) find_keys(task.begin, s.parts[0]);
    for (std::int64_t begin = task.begin; begin < task.end; begin = s.parts[parity].end, parity = 1 - parity) {
      const Part& part = s.parts[parity];
      Part& next = s.parts[1 - parity];
      const int keys = part.keys;
      if (keys == 0) break;  // none of the task's
      for_rows(key, keys_in_place, part.key_rows, keys, call.head_dim, part.value_rows, keys, value_dim,
               [&](const auto& these, int first, RowPointers<E> fetched) {
                 for (int i = 0; i < queries; ++i, fetched.count = 0)
                   scores_of_keys(these, s.queries.get() + i * head_dim, s.scores.get() + i * kScoresStride + first,
                                  fetched);
               });
      for (int i = 0; i < queries && !part.all_kept; ++i)
        for (int j = 0; j < keys; ++j)
          if ((part.queries[j] >> i & 1) == 0)
            s.scores.get()[i * kScoresStride + j] = -std::numeric_limits<T>::infinity();
      if (call.key_padding_mask != nullptr) {
        T bias[kKeysAtOnce];
        for (int j = 0; j < keys; ++j)
          bias[j] = left_out(call, batch, part.positions[j]) ? -std::numeric_limits<T>::infinity() : T(0);
        add_bias(s.scores.get(), kScoresStride, queries, keys, bias);
      }
      softmax_step(s.scores.get(), kScoresStride, queries, keys, maxima, sums, sum_out, value_dim);
      for (int i = 0; i < queries && call.dropout_p > 0; ++i)
        for (int first = 0; first < keys; first += kMaxTile) {
          const std::int64_t position = call.query_start + line.queries[i];
          const int here = std::min(kMaxTile, keys - first);
          dropout_multipliers(call, batch, line.heads[i], &position, 1, part.positions + first, here, T(1),
                              s.kept.get(), here);
          multiply(s.scores.get() + i * kScoresStride + first, kScoresStride, s.kept.get(), here, 1, here);
        }
      const bool more = part.end < task.end;
      if (more) find_keys(part.end, next);
      for_rows(value, values_in_place, part.value_rows, keys, call.value_dim, next.key_rows, more ? next.keys : 0,
               head_dim, [&](const auto& these, int first, RowPointers<E> fetched) {
                 for (int i = 0; i < queries; ++i, fetched.count = 0)
                   add_weighted_values(these, s.scores.get() + i * kScoresStride + first, sum_out + i * value_dim,
                                       fetched);
               });
    }
  });

  merge_parts<E>(call, lines, tasks, parts, value_dim, out, static_cast<T*>(lse_data));
}

}  // namespace

void sparse_attention_decode(const std::string& dtype, const Attention& call, const Strided& query, const Strided& key,
                             const Strided& value, const Strided& out, void* lse) {
  dispatch(dtype, [&](auto type) { decode<typename decltype(type)::type>(call, query, key, value, out, lse); });
}

}  // namespace gdl
