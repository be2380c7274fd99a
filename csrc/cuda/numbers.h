// Numbers beside images, next to each other in memory: of planes, of channels, of noise. Kernels read and write them in
// the dtype that they have, because to convert them first would take as long as a kernel does on small images.
#pragma once

namespace gdl {

enum class NumberType : int { kFloat, kHalf, kBfloat16 };

// Void: void or const void. Null where there are none.
template <typename Void>
struct Numbers {
  Void* data = nullptr;
  NumberType type = NumberType::kFloat;
};

}  // namespace gdl
