// What the threads of a plane add up, and how they bring it together. A record is a struct of floats with a member
// add(). Records are merged in a fixed order, so that every run gives the same bits.
#pragma once

#include <cooperative_groups.h>

#include "adain_split.h"

namespace gdl {

template <typename Record>
constexpr int kWords = sizeof(Record) / sizeof(float);

template <typename Record>
__device__ float& word(Record& record, int i) {
  return reinterpret_cast<float*>(&record)[i];
}

// Rounded but for the last bit, and without the slow path that division has for what no count is.
__device__ inline float divide(float a, float count) {
  const float inverse = __fdividef(1.0f, count), quotient = a * inverse;
  return fmaf(fmaf(-quotient, count, a), inverse, quotient);
}

// The share that the second of two counts has in both. Exact where one of them is zero, so that a mean is not rounded.
__device__ inline float second_share(float first, float second) {
  return first > 0 ? divide(second, first + second) : 1.0f;
}

// Means and sums of squared deviations, of W planes: merged by Chan's formula, in which nothing cancels.
template <int W>
struct Moments {
  float count, mean[W], squares[W];

  // Sums become means.
  __device__ void divide_by_count() {
#pragma unroll
    for (int w = 0; w < W; ++w) mean[w] = count > 0 ? divide(mean[w], count) : 0.0f;
  }

  __device__ void add(const Moments& other) {
    const float share = second_share(count, other.count);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const float apart = other.mean[w] - mean[w];
      mean[w] += share * apart;
      squares[w] += other.squares[w] + count * share * apart * apart;
    }
    count += other.count;
  }
};

// Means of a and b and the sum of products of their deviations, merged likewise.
template <int W>
struct Comoments {
  float count, mean_a[W], mean_b[W], products[W];

  __device__ void divide_by_count() {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      mean_a[w] = count > 0 ? divide(mean_a[w], count) : 0.0f;
      mean_b[w] = count > 0 ? divide(mean_b[w], count) : 0.0f;
    }
  }

  __device__ void add(const Comoments& other) {
    const float share = second_share(count, other.count);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const float apart_a = other.mean_a[w] - mean_a[w], apart_b = other.mean_b[w] - mean_b[w];
      mean_a[w] += share * apart_a;
      mean_b[w] += share * apart_b;
      products[w] += other.products[w] + count * share * apart_a * apart_b;
    }
    count += other.count;
  }
};

struct Nothing {};

// Two sums, of W planes.
template <int W>
struct Sums {
  float a[W], b[W];

  __device__ void add(const Sums& other) {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      a[w] += other.a[w];
      b[w] += other.b[w];
    }
  }
};

// Adds up over the lanes of a warp that are `stride`, 2 `stride`, ... apart, within groups of `span` lanes: powers of
// two. All of them get the record of the first.
template <typename Record>
__device__ void merge_lanes(Record& record, int stride, int span) {
#pragma unroll 1
  for (int offset = stride; offset < span; offset *= 2) {
    Record other;
#pragma unroll
    for (int i = 0; i < kWords<Record>; ++i) word(other, i) = __shfl_xor_sync(0xffffffffu, word(record, i), offset);
    record.add(other);
  }
  // Merged the other way around, the others' differ from it in the last place.
  const int first = threadIdx.x % kWarp & ~(span - stride);
#pragma unroll
  for (int i = 0; i < kWords<Record>; ++i) word(record, i) = __shfl_sync(0xffffffffu, word(record, i), first);
}

// A cluster needs compute capability 9.0. Kernels for older GPUs are launched without, with `blocks` 1.
__device__ inline void sync_blocks(int blocks) {
  if (blocks == 1) {
    __syncthreads();
    return;
  }
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __trap();
#endif
}

__device__ inline const float* in_block(const float* shared, int blocks, int rank) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#endif
  return shared;
}

// Adds up over the `members` threads of a block that share planes, `stride` threads apart, and over the `blocks` of its
// cluster. All of them get the same record. Where the members are more than a warp has, the block holds `stride` such
// groups. With more than one block, none of them may end before sync_blocks() has been called again. kTurn gives each
// call of a kernel shared memory of its own: threads that are slow may still read what the last one left there.
template <int kTurn, int kThreads, typename Record>
__device__ void merge_members(Record& record, int members, int stride, int blocks) {
  const int span = min(kWarp, members * stride);
  merge_lanes(record, stride, span);
  if (members * stride <= kWarp && blocks == 1) return;

  __shared__ float records[kWords<Record>][kThreads / kWarp * kMostSlots];
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int warps_log = __ffs(warps) - 1, stride_log = __ffs(stride) - 1;
  if (lane < stride) {
#pragma unroll
    for (int i = 0; i < kWords<Record>; ++i) records[i][threadIdx.x / kWarp * stride + lane] = word(record, i);
  }
  sync_blocks(blocks);
  record = Record{};
#pragma unroll 1
  for (int j = lane >> stride_log; j < blocks * warps; j += kWarp >> stride_log) {
    const float* from = in_block(&records[0][0], blocks, j >> warps_log);
    from += ((j & (warps - 1)) << stride_log) + (lane & (stride - 1));
    Record other;
#pragma unroll
    for (int i = 0; i < kWords<Record>; ++i) word(other, i) = from[i * (kThreads / kWarp * kMostSlots)];
    record.add(other);
  }
  merge_lanes(record, stride, kWarp);
}

}  // namespace gdl
