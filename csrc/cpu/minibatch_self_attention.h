// Self-attention over the pixels of every image of a minibatch on the CPU.
#pragma once

#include <cstdint>
#include <string>

namespace gdl {

// A tensor (images, channels, pixels) in lines, as in images.h; each in its own memory format.
struct Map {
  void* data;
  std::int64_t image, line;
  bool channels_last;
};

struct MapAttention {
  std::int64_t batch, channels, value_channels, height, width;  // channels of query and key
  int pool;                                                     // 1 or 2; divides height and width
  double scale;
  bool l2;
  int threads;

  std::int64_t pixels() const { return height * width; }
  std::int64_t keys() const { return pixels() / (pool * pool); }
};

// dtype by PyTorch's name. lse is (images, pixels) in float, in double for float64, here and below.
void minibatch_self_attention_forward(const std::string& dtype, const MapAttention& call, const Map& query,
                                      const Map& key, const Map& value, const Map& out, void* lse);

void minibatch_self_attention_backward(const std::string& dtype, const MapAttention& call, const Map& grad_out,
                                       const Map& query, const Map& key, const Map& value, const Map& out,
                                       const void* lse, const Map& grad_query, const Map& grad_key,
                                       const Map& grad_value);

// The gradients of a function of the backward pass's results, whose own gradients are given first.
void minibatch_self_attention_double_backward(const std::string& dtype, const MapAttention& call,
                                              const Map& grad_grad_query, const Map& grad_grad_key,
                                              const Map& grad_grad_value, const Map& grad_out, const Map& query,
                                              const Map& key, const Map& value, const Map& out, const void* lse,
                                              const Map& grad_grad_out, const Map& grad_query, const Map& grad_key,
                                              const Map& grad_value);

}  // namespace gdl
