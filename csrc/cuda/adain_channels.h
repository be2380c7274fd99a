// What planes leave to be added up over images and over the chunks that a plane was cut into.
#pragma once

#include <cuda_runtime_api.h>

#include "../images.h"
#include "numbers.h"

namespace gdl {

// Two sums of each plane, `planes` neighbouring ones in a record: first the one sum of all of them, then the other.
struct ChannelRecords {
  const float* data;  // [groups][blocks][slots][2][planes]; a plane's records are those of all blocks
  int planes, blocks, slots;
};

// Adds the first sums up to `weight` and the second ones to `bias`, (C), where they are not null. Without images they
// are zero, and there need be no records.
cudaError_t sum_channels(const ChannelRecords& records, const Images& images, const Numbers<void>& weight,
                         const Numbers<void>& bias, cudaStream_t stream);

}  // namespace gdl
