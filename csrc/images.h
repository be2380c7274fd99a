// Image tensors as kernels read them. gdl_kernels/_images.py and bindings_images.h find these strides.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GDL_HOST_DEVICE __host__ __device__
#else
#define GDL_HOST_DEVICE
#endif

namespace gdl {

// A tensor (N, C, P) as lines of numbers next to each other in memory: the pixels of a channel, or with channels_last
// the channels of a pixel.
template <typename T>
struct Lines {
  T* data;
  std::int64_t image;  // stride from image to image, in elements
  std::int64_t line;   // stride from line to line

  GDL_HOST_DEVICE T* at(std::int64_t n, std::int64_t l) const { return data + n * image + l * line; }
};

struct Images {
  std::int64_t count, channels, pixels;
  bool channels_last;
};

}  // namespace gdl
