// How bindings read images (N, C, *spatial), as gdl_kernels/_images.py does for Triton's kernels.
#pragma once

#include <optional>

#include "bindings.h"
#include "images.h"
#include "tensors.h"
#include "threads.h"

namespace gdl {

// The images of a call, all of them in lines along the dimension along which one of them, the output as a rule, has its
// own. Keeps the copies that it makes of others, and is itself to be made and destroyed with the GIL held.
class ImageReader : public Copies {
 public:
  explicit ImageReader(const Tensor& like)
      : images_{like.size(0), like.size(1), like.numel(2), like.stride(1) == 1 && like.size(1) > 1} {}

  const Images& images() const { return images_; }
  int threads(int available) const { return threads_for(images_.count * images_.channels * images_.pixels, available); }

  // The tensor where it is if it has the lines that are asked for, else a copy that has.
  template <typename T>
  Lines<T> lines(const Tensor& x) {
    const bool last = images_.channels_last;
    const std::int64_t channels = x.size(1), pixels = x.numel(2);
    const std::optional<std::int64_t> pixel = pixel_stride(x);
    if (last && pixel && (x.stride(1) == 1 || channels == 1)) return {x.data<T>(), x.stride(0), *pixel};
    if (!last && pixel && (*pixel == 1 || pixels == 1)) return {x.data<T>(), x.stride(0), x.stride(1)};
    const pybind11::object lined =
        last ? x.object().attr("movedim")(1, -1) : pybind11::reinterpret_borrow<pybind11::object>(x.object());
    const Tensor dense = keep(lined.attr("contiguous")());
    return {dense.data<T>(), channels * pixels, last ? channels : pixels};
  }

  // Numbers of every plane or of every channel, next to each other.
  template <typename T>
  T* numbers(const Tensor& x) {
    return contiguous(x).data<T>();
  }

  template <typename T>
  T* numbers(const std::optional<Tensor>& x) {
    return x ? numbers<T>(*x) : nullptr;
  }

 private:
  // The stride from pixel to pixel, if one stride walks all spatial dimensions.
  static std::optional<std::int64_t> pixel_stride(const Tensor& x) {
    std::optional<std::int64_t> pixel;
    std::int64_t after = 0;
    for (int d = x.dim() - 1; d >= 2; --d) {
      if (x.size(d) == 1) continue;
      if (!pixel)
        pixel = x.stride(d);
      else if (x.stride(d) != after)
        return std::nullopt;
      after = x.stride(d) * x.size(d);
    }
    return pixel.value_or(1);
  }

  Images images_;
};

}  // namespace gdl
