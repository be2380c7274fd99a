// Forward pass of block-sparse attention.
//
// One task is one tile of query rows of one head. It walks the row's list of kept blocks, a few tiles of keys at a
// time, with the running maximum and sum of the online softmax. Queries carry scale * log2(e), so that a probability is
// one exp2; but queries that are multiplied as bfloat16 stay as they are, and the scores are scaled.
#include "sparse_attention.h"

#include <algorithm>
#include <vector>

#include "sparse_attention_softmax.h"
#include "sparse_attention_tiles.h"

namespace gdl {
namespace {

// What the products of elements E are made of.
template <typename E>
struct OperandOf {
  using type = accumulator_t<E>;
};
#if defined(GDL_BF16_DOT)
template <>
struct OperandOf<bfloat16> {
  using type = Bf16Pair;
};
#endif

// Numbers in one operand.
template <typename X>
constexpr int kPacked = std::is_same_v<X, Bf16Pair> ? 2 : 1;

inline Bf16Pair make_pair(float first, float second) {
  return {from_accumulator<bfloat16>(first), from_accumulator<bfloat16>(second)};
}

// Rows of numbers as the left side of a product: pairs run along the row.
inline void pack_left(const float* from, int ld, Bf16Pair* to, int ld_to, int rows, int columns) {
  for (int i = 0; i < rows; ++i) store(from + i * ld, &to[i * ld_to].first, (columns + 1) / 2 * 2);
}

// Rows of numbers as the right side of a product: pairs run down the columns.
inline void pack_right(const float* from, int ld, Bf16Pair* to, int ld_to, int rows, int columns) {
  for (int i = 0; i < rows; i += 2)
    for (int j = 0; j < columns; ++j) to[i / 2 * ld_to + j] = make_pair(from[i * ld + j], from[(i + 1) * ld + j]);
}

// The same of the transposed rows.
template <typename T>
void pack_right_transposed(const T* from, int ld, T* to, int ld_to, int rows, int columns) {
  transpose(from, ld, to, ld_to, rows, columns);
}

inline void pack_right_transposed(const float* from, int ld, Bf16Pair* to, int ld_to, int rows, int columns) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; j += 2) to[j / 2 * ld_to + i] = make_pair(from[i * ld + j], from[i * ld + j + 1]);
}

struct RowTile {
  std::int64_t layout_head, block;
  int first;  // row of the block
};

// The tiles that hold a query of this call, those with the longest lists first.
std::vector<RowTile> row_tiles(const Attention& call, const Geometry& geometry) {
  std::vector<RowTile> tiles;
  const std::int64_t heads = std::max(call.layout_heads, call.order_heads);
  const std::int64_t tiles_of_head = geometry.q_blocks * geometry.tiles_per_block;
  std::vector<char> used(tiles_of_head);
  for (std::int64_t head = 0; head < heads; ++head) {
    const auto begin = tiles.size();
    std::fill(used.begin(), used.end(), 0);
    for (std::int64_t q = 0; q < call.n_q; ++q) used[place_of(call, head, call.query_start + q) / geometry.tile] = 1;
    for (std::int64_t i = 0; i < tiles_of_head; ++i)
      if (used[i])
        tiles.push_back(
            {head, i / geometry.tiles_per_block, static_cast<int>(i % geometry.tiles_per_block) * geometry.tile});
    const std::int64_t line = (call.layout_heads == 1 ? 0 : head) * geometry.q_blocks;
    std::stable_sort(tiles.begin() + static_cast<std::ptrdiff_t>(begin), tiles.end(),
                     [&](const RowTile& a, const RowTile& b) {
                       const auto length = [&](const RowTile& t) {
                         return call.rows.starts[line + t.block + 1] - call.rows.starts[line + t.block];
                       };
                       return length(a) > length(b);
                     });
  }
  return tiles;
}

// Packed keys and values: for every block that some row of the call keeps, per tile a panel (head_dim, tile) of keys
// and one (tile, value_dim) of values. Heads share panels unless their orders differ.
template <typename E>
struct Panels {
  using T = accumulator_t<E>;
  using X = typename OperandOf<E>::type;

  Panels(const Attention& call, const Geometry& geometry, const std::vector<RowTile>& tiles, const Strided& key,
         const Strided& value)
      : per_query_head(call.order_heads > 1),
        group(geometry.group),
        tiles_per_block(geometry.tiles_per_block),
        heads(per_query_head ? call.heads : call.kv_heads),
        depth((static_cast<int>(call.head_dim) + kPacked<X> - 1) / kPacked<X>),
        value_dim(padded<T>(call.value_dim)),
        key_size(static_cast<std::int64_t>(depth) * geometry.tile),
        value_size(static_cast<std::int64_t>(geometry.tile / kPacked<X>) * value_dim),
        slot(geometry.k_blocks, -1) {
    for (const RowTile& t : tiles) {
      const std::int64_t line = (call.layout_heads == 1 ? 0 : t.layout_head) * geometry.q_blocks + t.block;
      for (std::int32_t e = call.rows.starts[line]; e < call.rows.starts[line + 1]; ++e) slot[call.rows.blocks[e]] = 0;
    }
    std::vector<std::int64_t> blocks;
    for (std::int64_t c = 0; c < geometry.k_blocks; ++c)
      if (slot[c] == 0) {
        slot[c] = static_cast<std::int64_t>(blocks.size());
        blocks.push_back(c);
      }
    count = static_cast<std::int64_t>(blocks.size()) * geometry.tiles_per_block;
    const std::int64_t panels = call.batch * heads * count;
    keys = make_buffer<X>(panels * key_size);
    values = make_buffer<X>(panels * value_size);
    if (call.key_padding_mask != nullptr) {
      bias = make_buffer<T>(panels * geometry.tile);
      biased.resize(panels);
    }
    const int head_dim = padded<T>(call.head_dim), tile = geometry.tile;
    parallel_for(
        call.threads, panels, [&] { return make_buffer<T>(tile * std::max(head_dim, value_dim)); },
        [&](std::int64_t panel, Buffer<T>& rows) {
          const std::int64_t head = panel / count % heads, batch = panel / count / heads;
          const std::int64_t kv_head = per_query_head ? head / group : head;
          const std::int64_t block = blocks[panel % count / tiles_per_block];
          const std::int64_t first = block * call.block_size + panel % tiles_per_block * tile;
          std::int64_t positions[kMaxTile];
          for (int j = 0; j < tile; ++j) {
            positions[j] = key_at(call, head, first + j);
            if (left_out(call, batch, positions[j])) positions[j] = -1;
            load_features<E>(key, batch, kv_head, positions[j], call.head_dim, rows.get() + j * head_dim, head_dim);
          }
          pack_right_transposed(rows.get(), head_dim, keys.get() + panel * key_size, tile, tile,
                                static_cast<int>(call.head_dim));
          X* to = values.get() + panel * value_size;
          for (int j = 0; j < tile; ++j) {
            // Floats are their own operands and need no second copy.
            T* row = rows.get() + j * value_dim;
            if constexpr (std::is_same_v<X, T>) row = to + j * value_dim;
            load_features<E>(value, batch, kv_head, positions[j], call.value_dim, row, value_dim);
          }
          if constexpr (!std::is_same_v<X, T>) pack_right(rows.get(), value_dim, to, value_dim, tile, value_dim);
          if (bias) biased[panel] = padding_bias(call, batch, head, first, tile, bias.get() + panel * tile);
        });
  }

  // The first panel of a block, for a query head.
  std::int64_t of(std::int64_t batch, std::int64_t query_head, std::int64_t block) const {
    return (batch * heads + (per_query_head ? query_head : query_head / group)) * count + slot[block] * tiles_per_block;
  }

  bool per_query_head;
  std::int64_t group, tiles_per_block, heads;
  int depth;  // operands to a score
  int value_dim;
  std::int64_t key_size, value_size, count = 0;
  std::vector<std::int64_t> slot;  // by block column; -1 where no row keeps it
  Buffer<X> keys, values;
  Buffer<T> bias;
  std::vector<char> biased;
};

inline void scale_scores(float* scores, int rows, int columns, float scale) {
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < columns; v += kWidth<float>) {
      float* at = scores + i * kScoresStride + v;
      store<float>(at, load(at) * scale);
    }
}

// A tile of keys that a tile of rows sees.
struct KeysSeen {
  std::int64_t block;
  int part;                  // the tile's place in the block
  const std::int32_t* mask;  // of the block, null where the tile is full
};

template <typename T, typename X>
struct Scratch {
  Buffer<T> rows, scores, kept, out;
  Buffer<X> query, weights;  // of packed operands
  T maxima[kMaxTile], sums[kMaxTile];
  std::vector<KeysSeen> keys;
};

template <typename E>
void forward(const Attention& call, const Strided& query, const Strided& key, const Strided& value, const Strided& out,
             void* lse_data) {
  using T = accumulator_t<E>;
  using X = typename OperandOf<E>::type;
  constexpr bool packed = !std::is_same_v<X, T>;
  const Geometry geometry(call);
  const std::vector<RowTile> tiles = row_tiles(call, geometry);
  const Panels<E> panels(call, geometry, tiles, key, value);
  const int tile = geometry.tile, head_dim = padded<T>(call.head_dim), value_dim = panels.value_dim;
  const int at_once = kKeysAtOnce / tile;
  const T scale = static_cast<T>(call.scale * kLog2E);
  T* lse = static_cast<T*>(lse_data);

  // Tiles of one head follow each other, so that its panels stay in the caches.
  const std::int64_t own = std::max(call.layout_heads, call.order_heads) > 1;
  const std::int64_t tiles_of_batch =
      own ? static_cast<std::int64_t>(tiles.size()) : call.heads * static_cast<std::int64_t>(tiles.size());
  const auto scratch = [&] {
    return Scratch<T, X>{make_buffer<T>(tile * head_dim),
                         make_buffer<T>(tile * kScoresStride),
                         make_buffer<T>(call.dropout_p > 0 ? tile * tile : 0),
                         make_buffer<T>(tile * value_dim),
                         make_buffer<X>(packed ? tile * panels.depth : 0),
                         make_buffer<X>(packed ? tile * kScoresStride / 2 : 0),
                         {},
                         {},
                         {}};
  };
  parallel_for(call.threads, call.batch * tiles_of_batch, scratch, [&](std::int64_t task, Scratch<T, X>& s) {
    const std::int64_t batch = task / tiles_of_batch, in_batch = task % tiles_of_batch;
    const RowTile& t = tiles[in_batch % static_cast<std::int64_t>(tiles.size())];
    const std::int64_t head = own ? t.layout_head : in_batch / static_cast<std::int64_t>(tiles.size());

    std::int64_t queries[kMaxTile], query_positions[kMaxTile];
    int bit_rows[kMaxTile], rows = 0;
    for (int i = 0; i < tile; ++i) {
      const std::int64_t q = query_at(call, head, t.block * call.block_size + t.first + i);
      if (q < 0) continue;
      T* to = s.rows.get() + rows * head_dim;
      load_features<E>(query, batch, head, q, call.head_dim, to, head_dim);
      if (!packed)
        for (int v = 0; v < head_dim; v += kWidth<T>) store<T>(to + v, load(to + v) * scale);
      queries[rows] = q, query_positions[rows] = call.query_start + q;
      bit_rows[rows++] = t.first + i;
    }
    const X *left, *weights;
    int ld_left, ld_weights;
    if constexpr (packed) {
      pack_left(s.rows.get(), head_dim, s.query.get(), panels.depth, rows, static_cast<int>(call.head_dim));
      left = s.query.get(), ld_left = panels.depth, weights = s.weights.get(), ld_weights = kScoresStride / 2;
    } else {
      left = s.rows.get(), ld_left = head_dim, weights = s.scores.get(), ld_weights = kScoresStride;
    }
    std::fill(s.maxima, s.maxima + rows, -std::numeric_limits<T>::infinity());
    std::fill(s.sums, s.sums + rows, T(0));
    std::fill(s.out.get(), s.out.get() + rows * value_dim, T(0));

    const std::int64_t line = (call.layout_heads == 1 ? 0 : head) * geometry.q_blocks + t.block;
    s.keys.clear();
    for (std::int32_t entry = call.rows.starts[line]; entry < call.rows.starts[line + 1]; ++entry) {
      const std::int32_t* mask = nullptr;
      if (entry >= call.rows.splits[line])
        mask = call.mask_table + std::int64_t(call.rows.masks[entry]) * call.block_size * geometry.words;
      for (int part = 0; part < geometry.tiles_per_block; ++part) {
        const Kept kept = kept_of_tile(geometry, mask, t.first / tile, part);
        if (kept != Kept::kNothing)
          s.keys.push_back({call.rows.blocks[entry], part, kept == Kept::kEverything ? nullptr : mask});
      }
    }
    for (std::size_t begin = 0; begin < s.keys.size(); begin += at_once) {
      const KeysSeen* seen = s.keys.data() + begin;
      const int count = static_cast<int>(std::min<std::size_t>(at_once, s.keys.size() - begin));
      const X *keys[kKeysAtOnce / 16 + 1], *values[kKeysAtOnce / 16 + 1];
      std::int64_t panel[kKeysAtOnce / 16];
      for (int k = 0; k < count; ++k) {
        panel[k] = panels.of(batch, head, seen[k].block) + seen[k].part;
        keys[k] = panels.keys.get() + panel[k] * panels.key_size;
        values[k] = panels.values.get() + panel[k] * panels.value_size;
      }
      keys[count] = values[0];
      values[count] = nullptr;
      for (int k = 0; k < count; ++k) {
        T* scores = s.scores.get() + k * tile;
        gemm<false>(rows, tile, panels.depth, left, ld_left, 1, keys[k], tile, scores, kScoresStride, keys[k + 1]);
        if constexpr (packed) scale_scores(scores, rows, tile, scale);
        if (seen[k].mask != nullptr)
          mask_scores(scores, kScoresStride, rows, tile, seen[k].mask, geometry.words, bit_rows, seen[k].part * tile);
        if (panels.bias && panels.biased[panel[k]])
          add_bias(scores, kScoresStride, rows, tile, panels.bias.get() + panel[k] * tile);
      }
      softmax_step(s.scores.get(), kScoresStride, rows, count * tile, s.maxima, s.sums, s.out.get(), value_dim);
      if (call.dropout_p > 0)
        for (int k = 0; k < count; ++k) {
          const std::int64_t place = seen[k].block * call.block_size + seen[k].part * tile;
          std::int64_t positions[kMaxTile];
          for (int j = 0; j < tile; ++j) positions[j] = key_at(call, head, place + j);
          dropout_multipliers(call, batch, head, query_positions, rows, positions, tile, T(1), s.kept.get(), tile);
          multiply(s.scores.get() + k * tile, kScoresStride, s.kept.get(), tile, rows, tile);
        }
      if constexpr (packed)
        pack_left(s.scores.get(), kScoresStride, s.weights.get(), kScoresStride / 2, rows, count * tile);
      for (int k = 0; k < count; ++k)
        gemm<true>(rows, value_dim, tile / kPacked<X>, weights + k * tile / kPacked<X>, ld_weights, 1, values[k],
                   value_dim, s.out.get(), value_dim, values[k + 1]);
    }

    for (int i = 0; i < rows; ++i) {
      T* row = s.out.get() + i * value_dim;
      const bool empty = s.sums[i] == T(0);
      const T inverse = empty ? T(0) : T(1) / (s.sums[i] * static_cast<T>(1 - call.dropout_p));
      for (int v = 0; v < value_dim; v += kWidth<T>) store<T>(row + v, load(row + v) * inverse);
      store_features<E>(row, out, batch, head, queries[i], call.value_dim);
      lse[(batch * call.heads + head) * call.n_q + queries[i]] =
          empty ? -std::numeric_limits<T>::infinity() : static_cast<T>(kLn2) * (s.maxima[i] + std::log2(s.sums[i]));
    }
  });
}

}  // namespace

void sparse_attention_forward(const std::string& dtype, const Attention& call, const Strided& query, const Strided& key,
                              const Strided& value, const Strided& out, void* lse) {
  // With up to 32 queries packing does not pay: on one core of a Xeon with AVX-512 at 2.8 GHz, 8 heads of 64 features
  // and 16384 keys, 32 take 29 ms and not 65 in float32, 23 ms and not 71 in bfloat16. Heads that share keys share
  // packing.
  const std::int64_t few = 32 / std::clamp<std::int64_t>(call.heads / call.kv_heads, 1, 8);
  if (call.n_q <= few) return sparse_attention_decode(dtype, call, query, key, value, out, lse);
  dispatch(dtype, [&](auto type) { forward<typename decltype(type)::type>(call, query, key, value, out, lse); });
}

}  // namespace gdl
