// Backward pass of block-sparse attention.
//
// One task is a range of block columns of one key head. It walks the columns' lists, so dK and dV of a column are
// summed in one place, and adds to its own copy of dQ, which are added up at the end: five products a tile, no atomics,
// the same bits every run with one number of threads. With S = scale * Q K^T, P = exp(S - lse), dP = dO V^T and delta =
// rowsum(dO * O) - dlse:
//   dV = P^T dO,  dS = P * (dP - delta),  dK = scale * dS^T Q,  dQ = scale * dS K.
#include <algorithm>
#include <vector>

#include "sparse_attention.h"
#include "sparse_attention_tiles.h"

namespace gdl {
namespace {

// Queries and output gradients of every head in the order of places, widened; queries times scale * log2(e). Places
// without a query are zeros with lse = inf, which makes their probabilities 0.
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

// What a task holds of one tile of keys.
template <typename T>
struct KeyTile {
  KeyTile(const Attention& call, int tile, int head_dim, int value_dim)
      : keys(make_buffer<T>(tile * head_dim)),
        values(make_buffer<T>(tile * value_dim)),
        keys_transposed(make_buffer<T>(call.head_dim * tile)),
        values_transposed(make_buffer<T>(call.value_dim * tile)),
        grad_keys(make_buffer<T>(tile * head_dim)),
        grad_values(make_buffer<T>(tile * value_dim)),
        scores(make_buffer<T>(tile * tile)),
        grad_scores(make_buffer<T>(tile * tile)),
        kept(make_buffer<T>(call.dropout_p > 0 ? tile * tile : 0)) {}

  Buffer<T> keys, values, keys_transposed, values_transposed, grad_keys, grad_values, scores, grad_scores, kept;
  T bias[kMaxTile];
  std::int64_t positions[kMaxTile];  // -1 where there is no key
};

template <typename E>
void backward(const Attention& call, const Strided& grad_out, const void* grad_lse, const Strided& query,
              const Strided& key, const Strided& value, const Strided& out, const void* lse, const Strided& grad_query,
              const Strided& grad_key, const Strided& grad_value) {
  using T = accumulator_t<E>;
  const Geometry geometry(call);
  const PackedRows<E> rows(call, geometry, grad_out, grad_lse, query, out, lse);
  const int tile = geometry.tile, head_dim = rows.head_dim, value_dim = rows.value_dim;

  // Too few key heads for the threads: their columns are split, and every split has its own copy of dQ.
  const std::int64_t units = call.batch * call.kv_heads;
  const std::int64_t wanted = units == 0 || units >= 2 * call.threads ? 1 : (2 * call.threads + units - 1) / units;
  const std::int64_t splits = std::max<std::int64_t>(1, std::min<std::int64_t>({wanted, 8, geometry.k_blocks}));
  const std::int64_t head_size = rows.places * head_dim, copy_size = call.batch * call.heads * head_size;
  Buffer<T> grad_queries = make_buffer<T>(splits * copy_size);

  const auto scratch = [&] { return KeyTile<T>(call, tile, head_dim, value_dim); };
  parallel_for(call.threads, units * splits, scratch, [&](std::int64_t task, KeyTile<T>& s) {
    const std::int64_t split = task % splits, kv_head = task / splits % call.kv_heads,
                       batch = task / splits / call.kv_heads;
    const std::int64_t first_head = kv_head * geometry.group;
    T* grad_of_unit = grad_queries.get() + split * copy_size + (batch * call.heads + first_head) * head_size;
    std::fill(grad_of_unit, grad_of_unit + geometry.group * head_size, T(0));
    for (std::int64_t block = geometry.k_blocks * split / splits; block < geometry.k_blocks * (split + 1) / splits;
         ++block)
      for (int part = 0; part < geometry.tiles_per_block; ++part) {
        const std::int64_t first = block * call.block_size + part * tile;
        // Orders that differ come with key heads of their own, so any head of the group has the keys' order.
        for (int j = 0; j < tile; ++j) {
          std::int64_t position = s.positions[j] = key_at(call, first_head, first + j);
          if (left_out(call, batch, position)) position = -1;
          load_features<E>(key, batch, kv_head, position, call.head_dim, s.keys.get() + j * head_dim, head_dim);
          load_features<E>(value, batch, kv_head, position, call.value_dim, s.values.get() + j * value_dim, value_dim);
        }
        transpose(s.keys.get(), head_dim, s.keys_transposed.get(), tile, tile, static_cast<int>(call.head_dim));
        transpose(s.values.get(), value_dim, s.values_transposed.get(), tile, tile, static_cast<int>(call.value_dim));
        const bool biased =
            call.key_padding_mask != nullptr && padding_bias(call, batch, first_head, first, tile, s.bias);
        std::fill(s.grad_keys.get(), s.grad_keys.get() + tile * head_dim, T(0));
        std::fill(s.grad_values.get(), s.grad_values.get() + tile * value_dim, T(0));

        for (std::int64_t head = first_head; head < first_head + geometry.group; ++head) {
          const std::int64_t line = (call.layout_heads == 1 ? 0 : head) * geometry.k_blocks + block;
          for (std::int32_t entry = call.columns.starts[line]; entry < call.columns.starts[line + 1]; ++entry)
            for (int t = 0; t < geometry.tiles_per_block; ++t) {
              const std::int64_t row_block = call.columns.blocks[entry];
              if (row_block < rows.blocks.first || row_block >= rows.blocks.last) continue;
              const std::int64_t place = (row_block - rows.blocks.first) * call.block_size + t * tile;
              const std::int64_t row = (batch * call.heads + head) * rows.places + place;
              if (!rows.used[row / tile]) continue;
              const T* queries = rows.queries.get() + row * head_dim;
              const T* grads = rows.grads.get() + row * value_dim;
              T *p = s.scores.get(), *ds = s.grad_scores.get();
              gemm<false>(tile, tile, static_cast<int>(call.head_dim), queries, head_dim, 1, s.keys_transposed.get(),
                          tile, p, tile);
              if (entry >= call.columns.splits[line]) {
                int bit_rows[kMaxTile];
                for (int i = 0; i < tile; ++i) bit_rows[i] = t * tile + i;
                mask_scores(
                    p, tile, tile, tile,
                    call.mask_table + std::int64_t(call.columns.masks[entry]) * call.block_size * geometry.words,
                    geometry.words, bit_rows, part * tile);
              }
              if (biased) add_bias(p, tile, tile, tile, s.bias);
              gemm<false>(tile, tile, static_cast<int>(call.value_dim), grads, value_dim, 1, s.values_transposed.get(),
                          tile, ds, tile);
              if (call.dropout_p > 0) {
                std::int64_t positions[kMaxTile];
                for (int i = 0; i < tile; ++i)
                  positions[i] = std::max<std::int64_t>(
                      0, position_of(call, head, row_block * call.block_size + t * tile + i, call.layout_n_q));
                dropout_multipliers(call, batch, head, positions, tile, s.positions, tile,
                                    static_cast<T>(1 / (1 - call.dropout_p)), s.kept.get(), tile);
                multiply(ds, tile, s.kept.get(), tile, tile, tile);
              }
              for (int i = 0; i < tile; ++i)
                for (int v = i * tile; v < (i + 1) * tile; v += kWidth<T>) {
                  const Vec<T> probability = exp2<T>(load(p + v) - rows.lse[row + i]);
                  store<T>(p + v, probability);
                  store<T>(ds + v, probability * (load(ds + v) - rows.delta[row + i]));
                }
              if (call.dropout_p > 0) multiply(p, tile, s.kept.get(), tile, tile, tile);
              gemm<true>(tile, value_dim, tile, p, 1, tile, grads, value_dim, s.grad_values.get(), value_dim);
              gemm<true>(tile, head_dim, tile, ds, 1, tile, queries, head_dim, s.grad_keys.get(), head_dim);
              gemm<true>(tile, head_dim, tile, ds, tile, 1, s.keys.get(), head_dim,
                         grad_of_unit + (head - first_head) * head_size + place * head_dim, head_dim);
            }
        }

        for (int j = 0; j < tile; ++j) {
          const std::int64_t position = key_at(call, first_head, first + j);
          if (position < 0) continue;
          // The packed queries carry scale * log2(e): ln(2) leaves the scale.
          T* grad = s.grad_keys.get() + j * head_dim;
          for (int v = 0; v < head_dim; v += kWidth<T>) store<T>(grad + v, load(grad + v) * static_cast<T>(kLn2));
          store_features<E>(grad, grad_key, batch, kv_head, position, call.head_dim);
          store_features<E>(s.grad_values.get() + j * value_dim, grad_value, batch, kv_head, position, call.value_dim);
        }
      }
  });

  const std::int64_t tiles = rows.places / tile;
  parallel_for(
      call.threads, call.batch * call.heads * tiles, [&] { return make_buffer<T>(head_dim); },
      [&](std::int64_t task, Buffer<T>& sum) {
        const std::int64_t head = task / tiles % call.heads, batch = task / tiles / call.heads;
        for (int i = 0; i < tile; ++i) {
          const std::int64_t q = query_at(call, head, rows.first_place + task % tiles * tile + i);
          if (q < 0) continue;
          for (int v = 0; v < head_dim; v += kWidth<T>) {
            const T* from = grad_queries.get() + (task * tile + i) * head_dim + v;
            Vec<T> total = load(from);
            for (std::int64_t split = 1; split < splits; ++split) total += load(from + split * copy_size);
            store<T>(sum.get() + v, total * static_cast<T>(call.scale));
          }
          store_features<E>(sum.get(), grad_query, batch, head, q, call.head_dim);
        }
      });
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
