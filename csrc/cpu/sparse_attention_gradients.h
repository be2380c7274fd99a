// What the backward passes of block-sparse attention share: rows packed in the order of places, the columns of a key
// head among several tasks, and gradients of rows added up from the copies of those.
#pragma once

#include <algorithm>
#include <vector>

#include "sparse_attention_tiles.h"

namespace gdl {

// Queries and output gradients of every head in the order of places, widened; queries times scale * log2(e). Places
// without a query are zeros with lse = inf, which makes their probabilities 0. delta = rowsum(dO * O) - dlse.
template <typename E>
struct PackedRows {
  using T = accumulator_t<E>;

  PackedRows(const Attention& call, const Geometry& geometry, const Strided& grad_out, const void* grad_lse_data,
             const Strided& query, const Strided& out, const void* lse_data)
      : blocks(query_blocks(call, geometry)),
        first_place(blocks.first * call.block_size),
        places((blocks.last - blocks.first) * call.block_size),
        head_dim(padded<T>(call.head_dim)),
        value_dim(padded<T>(call.value_dim)),
        queries(make_buffer<T>(call.batch * call.heads * places * head_dim)),
        grads(make_buffer<T>(call.batch * call.heads * places * value_dim)),
        lse(make_buffer<T>(call.batch * call.heads * places)),
        delta(make_buffer<T>(call.batch * call.heads * places)),
        used(call.batch * call.heads * places / geometry.tile) {
    const T* grad_lse = static_cast<const T*>(grad_lse_data);
    const T* all_lse = static_cast<const T*>(lse_data);
    const T scale = static_cast<T>(call.scale * kLog2E);
    const std::int64_t tiles = places / geometry.tile;
    parallel_for(
        call.threads, call.batch * call.heads * tiles, [&] { return make_buffer<T>(value_dim); },
        [&](std::int64_t task, Buffer<T>& out_row) {
          const std::int64_t head = task / tiles % call.heads, batch = task / tiles / call.heads;
          bool any = false;
          for (int i = 0; i < geometry.tile; ++i) {
            const std::int64_t place = first_place + task % tiles * geometry.tile + i, row = task * geometry.tile + i;
            const std::int64_t q = query_at(call, head, place);
            T* packed = queries.get() + row * head_dim;
            T* grad = grads.get() + row * value_dim;
            load_features<E>(query, batch, head, q, call.head_dim, packed, head_dim);
            load_features<E>(grad_out, batch, head, q, call.value_dim, grad, value_dim);
            load_features<E>(out, batch, head, q, call.value_dim, out_row.get(), value_dim);
            for (int v = 0; v < head_dim; v += kWidth<T>) store<T>(packed + v, load(packed + v) * scale);
            Vec<T> dot = {};
            for (int v = 0; v < value_dim; v += kWidth<T>) dot += load(grad + v) * load(out_row.get() + v);
            const std::int64_t index = (batch * call.heads + head) * call.n_q + q;
            const bool kept = q >= 0 && all_lse[index] != -std::numeric_limits<T>::infinity();
            any |= kept;
            lse[row] = kept ? all_lse[index] * static_cast<T>(kLog2E) : std::numeric_limits<T>::infinity();
            delta[row] = kept ? reduce_sum<T>(dot) - (grad_lse != nullptr ? grad_lse[index] : T(0)) : T(0);
          }
          used[task] = any;
        });
  }

  BlockRange blocks;
  std::int64_t first_place, places;
  int head_dim, value_dim;
  Buffer<T> queries, grads, lse, delta;
  std::vector<char> used;  // by tile: whether a query in it keeps anything
};

// As many rows as wide as queries, packed and scaled as those are.
template <typename E, typename T = accumulator_t<E>>
Buffer<T> pack_scaled_rows(const Attention& call, const PackedRows<E>& rows, const Strided& from) {
  const std::int64_t count = call.batch * call.heads * rows.places;
  Buffer<T> packed = make_buffer<T>(count * rows.head_dim);
  const T scale = static_cast<T>(call.scale * kLog2E);
  parallel_for(
      call.threads, call.batch * call.heads, [] { return 0; },
      [&](std::int64_t line, int) {
        for (std::int64_t place = 0; place < rows.places; ++place) {
          T* to = packed.get() + (line * rows.places + place) * rows.head_dim;
          const std::int64_t head = line % call.heads, q = query_at(call, head, rows.first_place + place);
          load_features<E>(from, line / call.heads, head, q, call.head_dim, to, rows.head_dim);
          for (int v = 0; v < rows.head_dim; v += kWidth<T>) store<T>(to + v, load(to + v) * scale);
        }
      });
  return packed;
}

// A task has a key head of one sample; or, where those are too few for the threads, a range of its block columns. Every
// range has its own copy of what is summed by rows.
struct ColumnSplit {
  ColumnSplit(const Attention& call, const Geometry& geometry)
      : units(call.batch * call.kv_heads), kv_heads(call.kv_heads), blocks(geometry.k_blocks) {
    const std::int64_t wanted = units == 0 || units >= 2 * call.threads ? 1 : (2 * call.threads + units - 1) / units;
    count = std::max<std::int64_t>(1, std::min<std::int64_t>({wanted, 8, blocks}));
  }

  struct Task {
    std::int64_t batch, kv_head, range, first_block, last_block;
  };

  Task at(std::int64_t task) const {
    const std::int64_t range = task % count, unit = task / count;
    return {unit / kv_heads, unit % kv_heads, range, blocks * range / count, blocks * (range + 1) / count};
  }

  std::int64_t units, kv_heads, blocks, count;
};

// A tile of keys, and what belongs to each of them.
template <typename T>
struct KeyTile {
  std::int64_t batch, kv_head, first_head, range, first_place;
  Buffer<T> keys, values, keys_transposed, values_transposed;
  bool biased;
  T bias[kMaxTile];
  std::int64_t positions[kMaxTile];  // -1 where there is no key
};

// A tile of rows that sees a tile of keys.
struct RowsSeen {
  std::int64_t head;
  std::int64_t place, row;   // among the packed rows of the head, and of all heads
  std::int64_t first_place;  // in the layout
  const std::int32_t* mask;  // of the block, null where the tile is full
  int first_bit_row, first_bit_column;
};

// Rows of key features, or of something as wide, and the same transposed; zeros where there is no key to see.
template <typename E, typename T = accumulator_t<E>>
void load_tile(const Attention& call, const KeyTile<T>& at, const Strided& from, std::int64_t features, int tile,
               T* rows, T* transposed) {
  const int width = padded<T>(features);
  for (int j = 0; j < tile; ++j) {
    const std::int64_t position = left_out(call, at.batch, at.positions[j]) ? -1 : at.positions[j];
    load_features<E>(from, at.batch, at.kv_head, position, features, rows + j * width, width);
  }
  transpose(rows, width, transposed, tile, tile, static_cast<int>(features));
}

// Stores a tile's sums times a factor at the keys' positions.
template <typename E, typename T = accumulator_t<E>>
void store_tile(const KeyTile<T>& at, T* rows, std::int64_t features, int tile, double factor, const Strided& to) {
  const int width = padded<T>(features);
  for (int j = 0; j < tile; ++j) {
    if (at.positions[j] < 0) continue;
    T* row = rows + j * width;
    for (int v = 0; v < width; v += kWidth<T>) store<T>(row + v, load(row + v) * static_cast<T>(factor));
    store_features<E>(row, to, at.batch, at.kv_head, at.positions[j], features);
  }
}

// Walks the columns' lists. For every tile of keys: begin(at, own), then pair(at, seen, own) for every tile of rows
// that keeps something of it, then end(at, own). `own` is what make_own() makes for each thread.
template <typename E, typename MakeOwn, typename BeginTask, typename Begin, typename Pair, typename End>
void walk_columns(const Attention& call, const Geometry& geometry, const ColumnSplit& split, const PackedRows<E>& rows,
                  const Strided& key, const Strided& value, MakeOwn make_own, BeginTask begin_task, Begin begin,
                  Pair pair, End end) {
  using T = accumulator_t<E>;
  using Own = decltype(make_own());
  const int tile = geometry.tile;
  struct Scratch {
    KeyTile<T> at;
    Own own;
  };
  const auto make_scratch = [&] {
    Scratch s{{}, make_own()};
    s.at.keys = make_buffer<T>(tile * rows.head_dim);
    s.at.values = make_buffer<T>(tile * rows.value_dim);
    s.at.keys_transposed = make_buffer<T>(call.head_dim * tile);
    s.at.values_transposed = make_buffer<T>(call.value_dim * tile);
    return s;
  };
  parallel_for(call.threads, split.units * split.count, make_scratch, [&](std::int64_t task, Scratch& s) {
    const auto [batch, kv_head, range, first_block, last_block] = split.at(task);
    KeyTile<T>& at = s.at;
    at.batch = batch, at.kv_head = kv_head, at.range = range, at.first_head = kv_head * geometry.group;
    begin_task(at);
    for (std::int64_t block = first_block; block < last_block; ++block)
      for (int part = 0; part < geometry.tiles_per_block; ++part) {
        at.first_place = block * call.block_size + part * tile;
        // Orders that differ come with key heads of their own, so any head of the group has the keys' order.
        for (int j = 0; j < tile; ++j) at.positions[j] = key_at(call, at.first_head, at.first_place + j);
        load_tile<E>(call, at, key, call.head_dim, tile, at.keys.get(), at.keys_transposed.get());
        load_tile<E>(call, at, value, call.value_dim, tile, at.values.get(), at.values_transposed.get());
        at.biased =
            call.key_padding_mask != nullptr && padding_bias(call, batch, at.first_head, at.first_place, tile, at.bias);
        begin(at, s.own);
        for (std::int64_t head = at.first_head; head < at.first_head + geometry.group; ++head) {
          const std::int64_t line = (call.layout_heads == 1 ? 0 : head) * geometry.k_blocks + block;
          for (std::int32_t entry = call.columns.starts[line]; entry < call.columns.starts[line + 1]; ++entry) {
            const std::int64_t row_block = call.columns.blocks[entry];
            if (row_block < rows.blocks.first || row_block >= rows.blocks.last) continue;
            const std::int32_t* mask = nullptr;
            if (entry >= call.columns.splits[line])
              mask = call.mask_table + std::int64_t(call.columns.masks[entry]) * call.block_size * geometry.words;
            for (int t = 0; t < geometry.tiles_per_block; ++t) {
              const std::int64_t first_place = row_block * call.block_size + t * tile;
              const std::int64_t place = first_place - rows.first_place;
              const std::int64_t row = (batch * call.heads + head) * rows.places + place;
              if (!rows.used[row / tile]) continue;
              const Kept kept = kept_of_tile(geometry, mask, t, part);
              if (kept == Kept::kNothing) continue;
              pair(at,
                   RowsSeen{head, place, row, first_place, kept == Kept::kEverything ? nullptr : mask, t * tile,
                            part * tile},
                   s.own);
            }
          }
        }
        end(at, s.own);
      }
  });
}

// scores = rows' queries by keys, -inf where a pair is not kept.
template <typename E, typename T = accumulator_t<E>>
void kept_scores(const Attention& call, const Geometry& geometry, const PackedRows<E>& rows, const KeyTile<T>& at,
                 const RowsSeen& seen, T* scores) {
  const int tile = geometry.tile;
  gemm<false>(tile, tile, static_cast<int>(call.head_dim), rows.queries.get() + seen.row * rows.head_dim, rows.head_dim,
              1, at.keys_transposed.get(), tile, scores, tile);
  if (seen.mask != nullptr) {
    int bit_rows[kMaxTile];
    for (int i = 0; i < tile; ++i) bit_rows[i] = seen.first_bit_row + i;
    mask_scores(scores, tile, tile, tile, seen.mask, geometry.words, bit_rows, seen.first_bit_column);
  }
  if (at.biased) add_bias(scores, tile, tile, tile, at.bias);
}

// What dropout multiplies a pair of tiles by.
template <typename T>
void dropout_tile(const Attention& call, int tile, const KeyTile<T>& at, const RowsSeen& seen, T* to) {
  std::int64_t positions[kMaxTile];
  for (int i = 0; i < tile; ++i)  // a place without a row has no weights either
    positions[i] = std::max<std::int64_t>(0, position_of(call, seen.head, seen.first_place + i, call.layout_n_q));
  const T kept = static_cast<T>(1 / (1 - call.dropout_p));
  dropout_multipliers(call, at.batch, seen.head, positions, tile, at.positions, tile, kept, to, tile);
}

// Adds up the copies of packed rows `dim` wide, `features` of them real, times a factor, and stores them by position.
template <typename E, typename T = accumulator_t<E>>
void sum_copies(const Attention& call, const PackedRows<E>& rows, const Buffer<T>& copies, int dim, std::int64_t count,
                double factor, const Strided& to, std::int64_t features) {
  const Geometry geometry(call);
  const int tile = geometry.tile;
  const std::int64_t tiles = rows.places / tile, copy_size = call.batch * call.heads * rows.places * dim;
  parallel_for(
      call.threads, call.batch * call.heads * tiles, [&] { return make_buffer<T>(dim); },
      [&](std::int64_t task, Buffer<T>& sum) {
        const std::int64_t head = task / tiles % call.heads, batch = task / tiles / call.heads;
        for (int i = 0; i < tile; ++i) {
          const std::int64_t q = query_at(call, head, rows.first_place + task % tiles * tile + i);
          if (q < 0) continue;
          for (int v = 0; v < dim; v += kWidth<T>) {
            const T* from = copies.get() + (task * tile + i) * dim + v;
            Vec<T> total = load(from);
            for (std::int64_t copy = 1; copy < count; ++copy) total += load(from + copy * copy_size);
            store<T>(sum.get() + v, total * static_cast<T>(factor));
          }
          store_features<E>(sum.get(), to, batch, head, q, features);
        }
      });
}

}  // namespace gdl
