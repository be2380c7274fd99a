// Block-sparse attention on the CPU: forward and backward.
#pragma once

#include <cstdint>
#include <string>

namespace gdl {

// A tensor (batch, heads, positions, features) with any strides, counted in elements.
struct Strided {
  void* data;
  std::int64_t batch, head, position, feature;
};

// gdl_kernels.layouts.BlockLists, but for longest_first: a call may use a part of the lines, and sorts those itself.
struct BlockLists {
  const std::int32_t *starts, *splits, *blocks, *masks;
};

struct Attention {
  std::int64_t batch, heads, kv_heads, n_q, n_k, head_dim, value_dim;  // of the call
  std::int64_t layout_n_q, layout_n_k, layout_heads, block_size;       // of the layout; layout_heads is 1 or heads
  BlockLists rows, columns;
  const std::int32_t* mask_table;
  const std::int32_t *order, *places;  // (order_heads, layout_n_q), or null
  std::int64_t order_heads;
  std::int64_t query_start;
  double scale;
  const bool* key_padding_mask;  // (batch, n_k), or null
  double dropout_p;
  std::uint64_t seed;
  int threads;
};

// dtype by PyTorch's name. lse is (batch, heads, n_q) in float, in double for float64, here and below.
void sparse_attention_forward(const std::string& dtype, const Attention& call, const Strided& query, const Strided& key,
                              const Strided& value, const Strided& out, void* lse);

// The same for a few queries; sparse_attention_forward calls it.
void sparse_attention_decode(const std::string& dtype, const Attention& call, const Strided& query, const Strided& key,
                             const Strided& value, const Strided& out, void* lse);

// grad_lse may be null. Fills every element of the three gradients.
void sparse_attention_backward(const std::string& dtype, const Attention& call, const Strided& grad_out,
                               const void* grad_lse, const Strided& query, const Strided& key, const Strided& value,
                               const Strided& out, const void* lse, const Strided& grad_query, const Strided& grad_key,
                               const Strided& grad_value);

// The gradients of a function of the backward pass's results, whose own gradients are given first.
void sparse_attention_double_backward(const std::string& dtype, const Attention& call, const Strided& grad_grad_query,
                                      const Strided& grad_grad_key, const Strided& grad_grad_value,
                                      const Strided& grad_out, const void* grad_lse, const Strided& query,
                                      const Strided& key, const Strided& value, const Strided& out, const void* lse,
                                      const Strided& grad_grad_out, void* grad_grad_lse, const Strided& grad_query,
                                      const Strided& grad_key, const Strided& grad_value);

}  // namespace gdl
