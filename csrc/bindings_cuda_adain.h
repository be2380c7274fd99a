// How bindings read what a call of adain on a GPU is given.
#pragma once

#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings_images.h"
#include "cuda/adain.h"
#include "cuda/check.h"

namespace gdl {

// (noise, seed, weight, bias, slope)
using PrologueArguments =
    std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, double>;

// Reads images like `like`, and what is beside them. To be made and destroyed with the GIL held, as ImageReader.
class AdainReader : public ImageReader {
 public:
  // statistics: float32, as is the memory that kernels ask for.
  AdainReader(const Tensor& like, const Tensor& statistics, std::uintptr_t stream)
      : ImageReader(like), dtype_(like.dtype_name()), statistics_(statistics), stream_(stream) {}

  const std::string& dtype() const { return dtype_; }
  cudaStream_t stream() const { return reinterpret_cast<cudaStream_t>(stream_); }

  Numbers<const void> numbers(const Tensor& x) {
    const Tensor dense = contiguous(x);
    return {dense.data<const void>(), type_of(dense)};
  }

  Numbers<const void> numbers(const std::optional<Tensor>& x) { return x ? numbers(*x) : Numbers<const void>{}; }

  // An output, which is empty where there is nothing to be written.
  static Numbers<void> written(const Tensor& out) {
    return out.numel() == 0 ? Numbers<void>{} : Numbers<void>{out.data<void>(), type_of(out)};
  }

  // Draws the noise where there is a seed.
  Prologue prologue(const PrologueArguments& arguments) {
    const auto& [noise, seed, weight, bias, slope] = arguments;
    Prologue prologue;
    prologue.active = noise || seed || bias || slope != 1;
    prologue.noise = numbers(noise);
    prologue.image = noise && noise->size(0) == 1 ? 0 : images().pixels;
    prologue.weight = numbers(weight);
    prologue.bias = numbers(bias);
    prologue.slope = static_cast<float>(slope);
    if (!seed) return prologue;
    float* const drawn = allocate(images().count * images().pixels);
    prologue.noise = {drawn, NumberType::kFloat};
    const Seed given =
        seed->is_on_cpu() ? Seed{nullptr, *seed->data<std::int64_t>()} : Seed{seed->data<const std::int64_t>(), 0};
    const pybind11::gil_scoped_release without_gil;
    check(draw_noise(given, images().count, images().pixels, drawn, stream()), "adain_noise");
    return prologue;
  }

  // Without the GIL.
  Scratch scratch() {
    return [this](std::int64_t floats) {
      const pybind11::gil_scoped_acquire gil;
      return allocate(floats);
    };
  }

 private:
  // Kept until the kernels are launched: what comes after on the same stream may have it.
  float* allocate(std::int64_t floats) { return keep(statistics_.object().attr("new_empty")(floats)).data<float>(); }

  static NumberType type_of(const Tensor& x) {
    const dlpack::DataType type = x.dtype();
    if (type.code == dlpack::kBfloat) return NumberType::kBfloat16;
    if (type.code == dlpack::kFloat && type.bits == 16) return NumberType::kHalf;
    if (type.code == dlpack::kFloat && type.bits == 32) return NumberType::kFloat;
    throw std::invalid_argument("CUDA kernels read numbers in float32, float16 and bfloat16");
  }

  std::string dtype_;
  Tensor statistics_;
  std::uintptr_t stream_;
};

}  // namespace gdl
