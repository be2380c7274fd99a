// How bindings of the CUDA kernels take images from gdl_kernels/_images.py.
#pragma once

#include <tuple>

#include "bindings.h"
#include "images.h"

namespace gdl {

// (address, image stride, line stride)
using Array = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;
// (images, channels, pixels)
using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

template <typename T>
Lines<T> lines(const Array& array) {
  return {pointer<T>(std::get<0>(array)), std::get<1>(array), std::get<2>(array)};
}

inline Images images(const Shape& shape, bool channels_last) {
  return {std::get<0>(shape), std::get<1>(shape), std::get<2>(shape), channels_last};
}

}  // namespace gdl
