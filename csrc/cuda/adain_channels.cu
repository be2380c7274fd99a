#include <cstdint>

#include "adain_channels.h"
#include "dtypes.cuh"

namespace gdl {
namespace {

using std::int64_t;

constexpr int kWarp = 32, kChannels = 8;  // of a block, a warp to each

__device__ void write(const Numbers<void>& out, int64_t channel, double value) {
  if (out.data == nullptr) return;
  with_type(out.type, [&](auto type) {
    using T = typename decltype(type)::type;
    static_cast<T*>(out.data)[channel] = from_float<T>(static_cast<float>(value));
  });
}

// In double: the numbers are few, and of images without number float would lose digits.
__global__ void __launch_bounds__(kWarp* kChannels)
    add_up(ChannelRecords records, Images images, Numbers<void> weight, Numbers<void> bias) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kChannels + threadIdx.x / kWarp;
  if (channel >= images.channels) return;
  const int lane = threadIdx.x % kWarp;
  double of_weight = 0, of_bias = 0;
  for (int64_t i = lane; i < images.count * records.blocks; i += kWarp) {
    const int64_t plane = i / records.blocks * images.channels + channel, block = i % records.blocks;
    const int64_t unit = plane / records.planes, group = unit / records.slots, slot = unit % records.slots;
    const float* record = records.data + ((group * records.blocks + block) * records.slots + slot) * 2 * records.planes;
    of_weight += record[plane % records.planes];
    of_bias += record[records.planes + plane % records.planes];
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    of_weight += __shfl_xor_sync(0xffffffffu, of_weight, offset);
    of_bias += __shfl_xor_sync(0xffffffffu, of_bias, offset);
  }
  if (lane != 0) return;
  write(weight, channel, of_weight);
  write(bias, channel, of_bias);
}

}  // namespace

cudaError_t sum_channels(const ChannelRecords& records, const Images& images, const Numbers<void>& weight,
                         const Numbers<void>& bias, cudaStream_t stream) {
  if (images.channels == 0 || (weight.data == nullptr && bias.data == nullptr)) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((images.channels + kChannels - 1) / kChannels));
  config.blockDim = dim3(kWarp * kChannels);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, add_up, records, images, weight, bias);
}

}  // namespace gdl
