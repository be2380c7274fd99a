// From a dtype's name to a C++ type.
#pragma once

#include <stdexcept>
#include <string>

#include "half.h"

namespace gdl {

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for the T that PyTorch calls `dtype`.
template <typename F>
void dispatch(const std::string& dtype, F f) {
  if (dtype == "float32")
    f(Type<float>{});
  else if (dtype == "float64")
    f(Type<double>{});
  else if (dtype == "float16")
    f(Type<float16>{});
  else if (dtype == "bfloat16")
    f(Type<bfloat16>{});
  else
    throw std::invalid_argument("no CPU kernel for dtype " + dtype);
}

}  // namespace gdl
