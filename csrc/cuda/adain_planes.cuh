// The frame of every pass: which plane and which of its vectors a thread has, and in what order it loads them, adds up,
// and writes. A pass says what is added up and what is written.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <type_traits>

#include "adain.h"
#include "adain_channels.h"
#include "adain_records.cuh"
#include "adain_split.h"
#include "dtypes.cuh"

namespace gdl {

// Where blocks leave records for the next launch, [groups][blocks][slots], with one of the blocks where everything else
// is one launch; null where there is no next one.
struct Chunks {
  float *totals, *after;
};

enum class Step {
  kAll,      // in one launch
  kTotals,   // or: add up, and leave a record for each chunk
  kOutputs,  // merge the chunks' totals and write
};

// What a thread has. Threads past the last unit have no vectors of the first one; they stay for the sums.
struct Place {
  std::int64_t image, channel, plane;
  std::int64_t first;  // its first vector
  int end;             // of the chunk, counted from there
  int group, block, slot, member;
  bool exists;

  __device__ bool leads() const { return exists && member == 0 && block == 0; }
};

// `blocks` share a unit in this launch.
__device__ inline Place place_of(const Images& images, const Split& split, int planes, unsigned block, int blocks) {
  Place place;
  place.group = block / blocks;
  place.block = block % blocks;
  // Members are neighbours where pixels are, and slots where channels are.
  const int inner = split.channels_last ? split.slots : split.members, inner_log = __ffs(inner) - 1;
  const int low = threadIdx.x & (inner - 1), high = threadIdx.x >> inner_log;
  place.slot = split.channels_last ? low : high;
  place.member = split.channels_last ? high : low;
  std::int64_t unit = std::int64_t{place.group} * split.slots + place.slot;
  place.exists = unit < split.units;
  if (!place.exists) unit = 0;
  place.plane = unit * planes;
  place.image = place.plane / images.channels;
  place.channel = place.plane - place.image * images.channels;
  place.first = place.block * std::int64_t{split.chunk} + place.member;
  const std::int64_t end = min(split.vectors, (place.block + 1) * std::int64_t{split.chunk}) - place.first;
  place.end = place.exists ? static_cast<int>(end) : 0;
  return place;
}

// The vectors of a unit in memory, from the thread's first on.
template <typename T, int V, int W>
struct Walk {
  T* first;
  std::int64_t step;

  template <typename Void>
  __device__ Walk(const Lines<Void>& lines, bool channels_last, const Place& place) {
    const Lines<T> typed{static_cast<T*>(lines.data), lines.image, lines.line};
    first = channels_last ? typed.at(place.image, 0) + place.channel : typed.at(place.image, place.channel);
    step = channels_last ? lines.line : V;
    first = at(place.first);
  }

  __device__ T* at(std::int64_t vector) const { return first + vector * (V > 1 && W == 1 ? V : step); }
};

// Which of a unit's planes an element of a vector is in.
template <int W>
constexpr __device__ int plane_of(int element) {
  return W == 1 ? 0 : element;
}

// One number of each plane of a unit, from (N, C) or (C).
template <int W, typename T>
__device__ void read_planes(const T* numbers, std::int64_t first, float (&out)[W]) {
#pragma unroll
  for (int w = 0; w < W; ++w) out[w] = to_float(numbers[first + w]);
}

// Zero where there is none.
template <int W>
__device__ void read_planes(const Numbers<const void>& numbers, std::int64_t first, float (&out)[W]) {
  if (numbers.data == nullptr) {
#pragma unroll
    for (int w = 0; w < W; ++w) out[w] = 0;
    return;
  }
  with_type(numbers.type, [&](auto type) {
    using T = typename decltype(type)::type;
    read_planes<W>(static_cast<const T*>(numbers.data), first, out);
  });
}

template <int W, typename T>
__device__ void write_planes(const float (&numbers)[W], std::int64_t first, T* out) {
#pragma unroll
  for (int w = 0; w < W; ++w) out[first + w] = from_float<T>(numbers[w]);
}

template <int W>
__device__ void write_planes(const float (&numbers)[W], std::int64_t first, const Numbers<void>& out) {
  if (out.data == nullptr) return;
  with_type(out.type, [&](auto type) {
    using T = typename decltype(type)::type;
    write_planes<W>(numbers, first, static_cast<T*>(out.data));
  });
}

// The vectors that a thread has in registers, counted from its own first: `apart` from one to the next, up to the
// chunk's `end`.
struct Batch {
  int first, end, apart;

  __device__ bool has(int k) const { return at(k) < end; }
  __device__ int at(int k) const { return first + k * apart; }
};

template <int V, int K, int W, typename T>
__device__ void load_batch(const Walk<const T, V, W>& in, const Batch& batch, Vector<T, V> (&out)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) out[k] = batch.has(k) ? load<V>(in.at(batch.at(k))) : Vector<T, V>{};
}

// Numbers of noise for a vector: one for each of its pixels.
template <int V, int W>
constexpr int kNoise = W == 1 ? V : 1;

// What StyleGAN's epilogue does before the statistics, for the vectors of a thread.
template <int V, int W, bool kActive>
struct Epilogue {
  static constexpr int kNumbers = kNoise<V, W>;

  const Prologue* prologue;  // where the kernel's arguments are: its members take no registers
  std::int64_t first;        // number of noise for the thread's first vector
  float weight[W], bias[W];

  __device__ Epilogue(const Prologue& given, const Place& place) {
    if constexpr (kActive) {
      prologue = &given;
      first = place.image * given.image + place.first * kNumbers;
      read_planes<W>(given.weight, place.channel, weight);
      read_planes<W>(given.bias, place.channel, bias);
    }
  }

  __device__ void read_noise(std::int64_t vector, float (&out)[kNumbers]) const {
    if (prologue->noise.data == nullptr) {
#pragma unroll
      for (int j = 0; j < kNumbers; ++j) out[j] = 0;
      return;
    }
    const std::int64_t number = first + vector * kNumbers;
    const NumberType type = prologue->noise.type;
    if constexpr (kNumbers % 4 != 0) {
      with_type(type, [&](auto of) {
        using T = typename decltype(of)::type;
#pragma unroll
        for (int j = 0; j < kNumbers; ++j) out[j] = to_float(static_cast<const T*>(prologue->noise.data)[number + j]);
      });
    } else if (type == NumberType::kFloat) {
      const float4* in = reinterpret_cast<const float4*>(static_cast<const float*>(prologue->noise.data) + number);
#pragma unroll
      for (int j = 0; j < kNumbers; j += 4) {
        const float4 four = in[j / 4];
        out[j] = four.x, out[j + 1] = four.y, out[j + 2] = four.z, out[j + 3] = four.w;
      }
    } else {
      const uint2* in = reinterpret_cast<const uint2*>(static_cast<const __half*>(prologue->noise.data) + number);
#pragma unroll
      for (int j = 0; j < kNumbers; j += 4) {
        const uint2 words = in[j / 4];
        const float2 low = widen_pair(words.x, type), high = widen_pair(words.y, type);
        out[j] = low.x, out[j + 1] = low.y, out[j + 2] = high.x, out[j + 3] = high.y;
      }
    }
  }

  __device__ static float noise_of(const float (&noises)[kNoise<V, W>], int j) { return noises[W == 1 ? j : 0]; }

  // x becomes u.
  __device__ void add(const float (&noises)[kNoise<V, W>], float (&values)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int w = plane_of<W>(j);
      values[j] += weight[w] * noise_of(noises, j) + bias[w];
    }
  }

  // To the sums of gradient * noise and gradient.
  __device__ void add_gradients(std::int64_t vector, const float (&gradient)[V], Sums<W>& sums) const {
    float noises[kNumbers];
    read_noise(vector, noises);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      sums.a[plane_of<W>(j)] += gradient[j] * noise_of(noises, j);
      sums.b[plane_of<W>(j)] += gradient[j];
    }
  }

  __device__ float activated(float u) const { return !kActive || u > 0 ? u : prologue->slope * u; }
  __device__ float derivative(float u) const { return !kActive || u > 0 ? 1.0f : prologue->slope; }
};

// A pass has:
//   Arguments, its pointers; Totals and After, records; kAfter, whether there is an After; kWrites, whether it writes
//   more than numbers of planes; kCapacity
//   Pass(arguments, split, place)       reads what is one number a plane
//   load(batch)                         reads a batch of vectors into registers
//   values                              what of them has to be kept until they are written
//   add_totals(totals)                  adds them to the thread's totals
//   settle(totals, leads)               takes the totals of the planes; whoever leads writes numbers of planes
//   write(after)                        writes the batch, adds to what is added up after the totals
template <int kThreads, typename Totals, typename After>
constexpr int kRecordBytes = (sizeof(Totals) + sizeof(After)) * (kThreads / kWarp) * kMostSlots;

// Moves a batch's values between registers and shared memory, where each thread has places of its own. Those of
// neighbouring threads, 16 bytes each, are neighbours.
template <bool kStore, int kArrays, int K, int V>
__device__ void move_values(float (&values)[kArrays][K][V], float* shared, int vector) {
  using Piece = std::conditional_t<V % 4 == 0, float4, float>;
  constexpr int kPieces = V * sizeof(float) / sizeof(Piece);
  Piece* pieces = reinterpret_cast<Piece*>(shared) + vector * (kArrays * kPieces) + threadIdx.x;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int a = 0; a < kArrays; ++a)
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        Piece& there = pieces[((k * kArrays + a) * kPieces + p) * blockDim.x];
        Piece& here = reinterpret_cast<Piece*>(values[a][k])[p];
        if (kStore)
          there = here;
        else
          here = there;
      }
}

template <typename Pass>
__global__ void __launch_bounds__(Pass::kCapacity.threads, 1)
    adain_pass(const __grid_constant__ typename Pass::Arguments arguments, Images images, Split split, Chunks chunks,
               Step step) {
  using Totals = typename Pass::Totals;
  using After = typename Pass::After;
  constexpr int kThreads = Pass::kCapacity.threads, kBatch = Pass::kCapacity.batch;
  // The last chunks that were read to add them up are written first: they may still be in the L2 cache.
  const unsigned block = step == Step::kOutputs ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const bool whole = step == Step::kOutputs && !Pass::kWrites;
  const Place place = place_of(images, split, Pass::kCapacity.planes, block, whole ? 1 : split.blocks);
  const int stride = split.channels_last ? split.slots : 1, cluster = step == Step::kAll ? split.blocks : 1;
  const auto record = [&](int b) { return (std::int64_t{place.group} * split.blocks + b) * split.slots + place.slot; };

  extern __shared__ float4 shared[];
  float* kept = reinterpret_cast<float*>(shared);
  Pass pass(arguments, split, place);
  const auto for_each_batch = [&](auto f) {
    Batch batch{0, place.end, split.members};
#pragma unroll 1
    for (; batch.first < batch.end; batch.first += kBatch * split.members) f(batch);
  };

  Totals totals{};
  if (step == Step::kOutputs) {
    for (int b = place.member; b < split.blocks; b += split.members)
      totals.add(reinterpret_cast<const Totals*>(chunks.totals)[record(b)]);
  } else {
    for_each_batch([&](const Batch& batch) {
      pass.load(batch);
      pass.add_totals(totals);
      if (Pass::kWrites && step == Step::kAll) move_values<true>(pass.values, kept, batch.first * split.slots);
    });
  }
  merge_members<0, kThreads>(totals, split.members, stride, cluster);
  if (step == Step::kTotals) {
    if (place.member == 0) reinterpret_cast<Totals*>(chunks.totals)[record(place.block)] = totals;
    return;
  }

  pass.settle(totals, place.leads());
  if constexpr (Pass::kWrites) {
    After after{};
    for_each_batch([&](const Batch& batch) {
      if (step == Step::kAll) {
        pass.batch = batch;
        move_values<false>(pass.values, kept, batch.first * split.slots);
      } else {
        pass.load(batch);
      }
      pass.write(after);
    });
    if constexpr (Pass::kAfter) {
      if (chunks.after != nullptr) {
        merge_members<1, kThreads>(after, split.members, stride, cluster);
        After* const records = reinterpret_cast<After*>(chunks.after);
        if (step == Step::kOutputs) {
          if (place.member == 0) records[record(place.block)] = after;
        } else if (place.leads()) {
          records[place.plane / Pass::kCapacity.planes] = after;
        }
      }
    }
  }
  if (cluster > 1) sync_blocks(cluster);
}

inline cudaError_t describe_gpu(Gpu& gpu) {
  int device = 0, clusters = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  gpu.has_clusters = clusters != 0;
  return error;
}

// Floats of a record that is left to be added up over images, if anybody asks for what it comes to.
template <typename Pass>
std::int64_t after_words(const typename Pass::Arguments& arguments) {
  if constexpr (Pass::kAfter) {
    const Gradients& gradients = arguments.gradients;
    return gradients.weight.data == nullptr && gradients.bias.data == nullptr ? 0 : kWords<typename Pass::After>;
  }
  return 0;
}

template <typename Pass>
cudaError_t launch(const typename Pass::Arguments& arguments, const Images& images, const Scratch& scratch,
                   cudaStream_t stream) {
  Gpu gpu;
  if (const cudaError_t error = describe_gpu(gpu); error != cudaSuccess) return error;
  const Split split = share_out(images, Pass::kCapacity, gpu);

  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(split.blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(static_cast<unsigned>(split.threads()));
  config.stream = stream;
  Chunks chunks{};
  const auto run = [&](Step step, std::int64_t blocks) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    return cudaLaunchKernelEx(&config, adain_pass<Pass>, arguments, images, split, chunks, step);
  };

  constexpr int kTotals = kWords<typename Pass::Totals>;
  const bool one_launch = split.fits();
  const std::int64_t records = split.groups * split.slots * (one_launch ? 1 : split.blocks);
  const std::int64_t of_totals = one_launch ? 0 : records * kTotals, of_after = after_words<Pass>(arguments) * records;
  if (of_totals + of_after > 0) chunks.totals = scratch(of_totals + of_after);
  if (of_after > 0) chunks.after = chunks.totals + of_totals;

  cudaError_t error = cudaSuccess;
  if (one_launch) {
    constexpr int kUnasked = 48 << 10;  // bytes of shared memory that every kernel may have
    if (split.shared_bytes + Pass::kCapacity.record_bytes > kUnasked) {
      error = cudaFuncSetAttribute(adain_pass<Pass>, cudaFuncAttributeMaxDynamicSharedMemorySize, split.shared_bytes);
      if (error != cudaSuccess) return error;
    }
    config.dynamicSmemBytes = static_cast<std::size_t>(split.shared_bytes);
    config.attrs = &cluster;
    config.numAttrs = split.blocks > 1 ? 1 : 0;
    error = run(Step::kAll, split.groups * split.blocks);
  } else {
    error = run(Step::kTotals, split.groups * split.blocks);
    if (error == cudaSuccess) error = run(Step::kOutputs, split.groups * (Pass::kWrites ? split.blocks : 1));
  }
  if constexpr (Pass::kAfter) {
    if (error == cudaSuccess && of_after > 0) {
      const ChannelRecords left{chunks.after, Pass::kCapacity.planes, one_launch ? 1 : split.blocks, split.slots};
      error = sum_channels(left, images, arguments.gradients.weight, arguments.gradients.bias, stream);
    }
  }
  return error;
}

// Whether vectors of 16 bytes can be read: all of them are whole and aligned.
template <typename T>
bool aligned(const Images& images, std::initializer_list<Lines<const void>> tensors, const Prologue& prologue) {
  constexpr int V = kVector<T>;
  const auto address = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; };
  return (images.channels_last ? images.channels : images.pixels) % V == 0 &&
         (images.channels_last || address(prologue.noise.data)) &&
         std::all_of(tensors.begin(), tensors.end(), [&](const Lines<const void>& t) {
           return address(t.data) && t.image % V == 0 && t.line % V == 0;
         });
}

inline Lines<const void> read_only(const Lines<void>& lines) { return {lines.data, lines.image, lines.line}; }

template <typename Type, int kVectorSize, int kPlanes>
struct Choice {
  using T = Type;
  static constexpr int V = kVectorSize, W = kPlanes;
};

// Calls f(Choice{}) for the dtype, and for vectors that all of the images can be read in.
template <typename F>
cudaError_t choose(const std::string& dtype, const Images& images, std::initializer_list<Lines<const void>> tensors,
                   const Prologue& prologue, F f) {
  if (images.count * images.channels * images.pixels == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = kVector<T>;
    if (!aligned<T>(images, tensors, prologue)) return f(Choice<T, 1, 1>{});
    return images.channels_last ? f(Choice<T, V, V>{}) : f(Choice<T, V, 1>{});
  });
}

}  // namespace gdl
