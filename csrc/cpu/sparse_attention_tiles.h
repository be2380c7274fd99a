// What the forward and the backward pass of block-sparse attention share: places, tiles, packing, masks.
//
// Blocks are cut into tiles of at most 64 rows and 64 keys. Tensors are packed per call, widened to the
// type that sums are kept in, so that the products read contiguous panels whatever the strides, dtype and order of the
// tensors.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "buffer.h"
#include "dispatch.h"
#include "gemm.h"
#include "half.h"
#include "philox.h"
#include "sparse_attention.h"
#include "tiles.h"
#include "vec.h"

namespace gdl {

constexpr int kMaxTile = 64;

struct Geometry {
  explicit Geometry(const Attention& call)
      : tile(call.block_size < kMaxTile ? static_cast<int>(call.block_size) : kMaxTile),
        tiles_per_block(static_cast<int>(call.block_size) / tile),
        words(static_cast<int>((call.block_size + 31) / 32)),
        q_blocks((call.layout_n_q + call.block_size - 1) / call.block_size),
        k_blocks((call.layout_n_k + call.block_size - 1) / call.block_size),
        group(call.heads / call.kv_heads) {}

  int tile, tiles_per_block, words;
  std::int64_t q_blocks, k_blocks, group;
};

// Block rows that can hold a query of the call: with an order, any.
struct BlockRange {
  std::int64_t first, last;  // last is one past the end
};

inline BlockRange query_blocks(const Attention& call, const Geometry& geometry) {
  if (call.n_q == 0) return {0, 0};
  if (call.order != nullptr) return {0, geometry.q_blocks};
  return {call.query_start / call.block_size, (call.query_start + call.n_q - 1) / call.block_size + 1};
}

// The position that a place holds, or -1: places past the layout's end hold none.
inline std::int64_t position_of(const Attention& call, std::int64_t head, std::int64_t place, std::int64_t n) {
  if (place >= n) return -1;
  if (call.order == nullptr) return place;
  return call.order[(call.order_heads == 1 ? 0 : head) * n + place];
}

// The place that a position is at.
inline std::int64_t place_of(const Attention& call, std::int64_t head, std::int64_t position) {
  return call.places == nullptr ? position
                                : call.places[(call.order_heads == 1 ? 0 : head) * call.layout_n_q + position];
}

// The call's query at a place, or -1.
inline std::int64_t query_at(const Attention& call, std::int64_t head, std::int64_t place) {
  const std::int64_t position = position_of(call, head, place, call.layout_n_q);
  const std::int64_t query = position - call.query_start;
  return position >= 0 && query >= 0 && query < call.n_q ? query : -1;
}

// The call's key at a place, or -1.
inline std::int64_t key_at(const Attention& call, std::int64_t head, std::int64_t place) {
  const std::int64_t position = position_of(call, head, place, call.layout_n_k);
  return position < call.n_k ? position : -1;
}

// Features of one position, widened; zeros for position -1.
template <typename E, typename T = accumulator_t<E>>
inline void load_features(const Strided& x, std::int64_t batch, std::int64_t head, std::int64_t position,
                          std::int64_t n, T* __restrict to, int padded_n) {
  int i = 0;
  if (position >= 0) {
    const E* from = static_cast<const E*>(x.data) + batch * x.batch + head * x.head + position * x.position;
    if (x.feature == 1) {
      load(from, to, n);
    } else {
      for (std::int64_t j = 0; j < n; ++j) to[j] = to_accumulator(from[j * x.feature]);
    }
    i = static_cast<int>(n);
  }
  for (; i < padded_n; ++i) to[i] = T(0);
}

template <typename E, typename T = accumulator_t<E>>
inline void store_features(const T* __restrict from, const Strided& x, std::int64_t batch, std::int64_t head,
                           std::int64_t position, std::int64_t n) {
  E* to = static_cast<E*>(x.data) + batch * x.batch + head * x.head + position * x.position;
  if (x.feature == 1) {
    store(from, to, n);
  } else {
    for (std::int64_t j = 0; j < n; ++j) to[j * x.feature] = from_accumulator<E>(from[j]);
  }
}

template <typename T>
inline void multiply(T* x, long ld, const T* by, long ld_by, int rows, int columns) {
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < columns; v += kWidth<T>)
      store<T>(x + i * ld + v, load(x + i * ld + v) * load(by + i * ld_by + v));
}

// Whether the padding mask leaves a key out. Such keys are packed as zeros: what lies there, NaN too, goes nowhere.
inline bool left_out(const Attention& call, std::int64_t batch, std::int64_t key) {
  return call.key_padding_mask != nullptr && key >= 0 && call.key_padding_mask[batch * call.n_k + key];
}

// bias[j] = -inf for the tile's keys that the padding mask leaves out, else 0. Returns whether there is any.
template <typename T>
inline bool padding_bias(const Attention& call, std::int64_t batch, std::int64_t head, std::int64_t first_place,
                         int tile, T* bias) {
  bool any = false;
  for (int j = 0; j < tile; ++j) {
    const bool out = left_out(call, batch, key_at(call, head, first_place + j));
    bias[j] = out ? -std::numeric_limits<T>::infinity() : T(0);
    any |= out;
  }
  return any;
}

template <typename T>
inline void add_bias(T* scores, long ld, int rows, int columns, const T* bias) {
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < columns; v += kWidth<T>)
      store<T>(scores + i * ld + v, load(scores + i * ld + v) + load(bias + v));
}

// What a block keeps of one of its tiles: a diagonal block of several tiles has some that are empty and some that are
// full.
enum class Kept { kNothing, kSomething, kEverything };

inline Kept kept_of_tile(const Geometry& geometry, const std::int32_t* mask, int row_part, int column_part) {
  if (mask == nullptr) return Kept::kEverything;
  if (geometry.tiles_per_block == 1) return Kept::kSomething;
  const int tile = geometry.tile, tile_words = tile / 32;
  const std::int32_t* first = mask + row_part * tile * geometry.words + column_part * tile_words;
  std::int32_t any = 0, all = -1;
  for (int i = 0; i < tile; ++i)
    for (int w = 0; w < tile_words; ++w) any |= first[i * geometry.words + w], all &= first[i * geometry.words + w];
  return any == 0 ? Kept::kNothing : all == -1 ? Kept::kEverything : Kept::kSomething;
}

// Scores that a partial block does not keep become -inf. Row i of the tile is row bit_rows[i] of the block.
template <typename T>
inline void mask_scores(T* scores, long ld, int rows, int columns, const std::int32_t* mask, int words,
                        const int* bit_rows, int first_column) {
  const Vec<T> nothing = broadcast<T>(-std::numeric_limits<T>::infinity());
  for (int i = 0; i < rows; ++i) {
    const std::int32_t* bits = mask + bit_rows[i] * words;
    for (int v = 0; v < columns; v += kWidth<T>) {
      const int column = first_column + v;
      using Int = typename Lanes<T>::Int;
      const Int word = static_cast<Int>(bits[column / 32] >> (column % 32));
      const IntVec<T> kept = ((word >> lane_index<T>()) & 1) != 0;
      store<T>(scores + i * ld + v, kept ? load(scores + i * ld + v) : nothing);
    }
  }
}

// What dropout multiplies a tile of weights by: 0, or `kept`. Rows and columns are the positions of queries and keys.
// Lanes past the last key may have any position: their weights are 0.
template <typename T>
inline void dropout_multipliers(const Attention& call, std::int64_t batch, std::int64_t head,
                                const std::int64_t* queries, int rows, const std::int64_t* keys, int columns, T kept,
                                T* to, int ld) {
  const auto threshold = static_cast<std::uint32_t>(call.dropout_p * 0x1p31);
  const auto line = static_cast<std::uint32_t>(batch * call.heads + head);
  std::uint32_t key[kMaxTile], words[4][kMaxTile];
  for (int j = 0; j < columns; ++j) key[j] = static_cast<std::uint32_t>(keys[j]);
  std::int64_t drawn = -1;
  for (int i = 0; i < rows; ++i) {
    // One counter serves four queries, which in natural order follow each other.
    if (const std::int64_t four = queries[i] / 4; four != drawn) {
      drawn = four;
      for (int j = 0; j < columns; j += kWords) {
        Words counter;
        std::memcpy(&counter, key + j, sizeof counter);
        const PhiloxWords random = philox(call.seed, counter, static_cast<std::uint32_t>(four), line, 0);
        for (int w = 0; w < 4; ++w) std::memcpy(words[w] + j, &random.word[w], sizeof counter);
      }
    }
    const std::uint32_t* word = words[queries[i] % 4];
    for (int j = 0; j < columns; ++j) to[i * ld + j] = word[j] >> 1 >= threshold ? kept : T(0);
  }
}

}  // namespace gdl
