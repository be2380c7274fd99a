// Forward, and the statistics alone.
#include "adain_planes.cuh"

namespace gdl {
namespace {

using std::int64_t;

// 64 registers are enough for a thread that has one plane.
template <int V, int W>
constexpr int kThreadsOf = W == 1 ? 1024 : 512;
template <int V, int W>
constexpr Capacity kCapacityOf{
    V, W, 1, V == 1 ? 4 : 16 / V, kThreadsOf<V, W>, kRecordBytes<kThreadsOf<V, W>, Moments<W>, Nothing>};

// What is read of the planes, and the moments of it.
template <typename T, int V, int W, bool kActive>
struct Moved {
  static constexpr int K = kCapacityOf<V, W>.batch;

  Walk<const T, V, W> x;
  Epilogue<V, W, kActive> epilogue;
  // A value of the plane. Means are those of the differences from it, so that they have all their digits.
  float pivot[W];

  __device__ Moved(const Lines<const void>& lines, const Prologue& prologue, const Split& split, const Place& place)
      : x(lines, split.channels_last, place), epilogue(prologue, place) {
    float first[V];
    widen(gdl::load<V>(x.at(-place.first)), first);
    activate(-place.first, first);
#pragma unroll
    for (int w = 0; w < W; ++w) pivot[w] = first[w];
  }

  // x becomes h.
  __device__ void activate(int64_t vector, float (&h)[V]) const {
    if constexpr (kActive) {
      float noise[kNoise<V, W>];
      epilogue.read_noise(vector, noise);
      epilogue.add(noise, h);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) h[j] = epilogue.activated(h[j]);
  }

  __device__ void load(const Batch& batch, float (&h)[K][V]) const {
    Vector<T, V> in[K];
    load_batch(x, batch, in);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      widen(in[k], h[k]);
      if (batch.has(k)) activate(batch.at(k), h[k]);
    }
  }

  __device__ void add_moments(const Batch& batch, const float (&h)[K][V], Moments<W>& moments) const {
    Moments<W> own{};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!batch.has(k)) continue;
      own.count += W == 1 ? V : 1;
#pragma unroll
      for (int j = 0; j < V; ++j) own.mean[plane_of<W>(j)] += h[k][j] - pivot[plane_of<W>(j)];
    }
    own.divide_by_count();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!batch.has(k)) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int w = plane_of<W>(j);
        const float apart = h[k][j] - pivot[w] - own.mean[w];
        own.squares[w] += apart * apart;
      }
    }
    moments.add(own);
  }
};

template <typename T, int V, int W, bool kActive>
struct Forward {
  using Arguments = AdainForward;
  using Totals = Moments<W>;
  using After = Nothing;
  static constexpr bool kAfter = false, kWrites = true;
  static constexpr Capacity kCapacity = kCapacityOf<V, W>;
  static constexpr int K = kCapacity.batch;

  const Arguments& arguments;
  const float per_pixel;
  const int64_t plane;
  Moved<T, V, W, kActive> in;
  Walk<T, V, W> y;
  Batch batch;
  float values[1][K][V];  // h
  float mean[W], factor[W], shift[W];

  __device__ Forward(const Arguments& arguments, const Split& split, const Place& place)
      : arguments(arguments),
        per_pixel(split.per_pixel),
        plane(place.plane),
        in(arguments.x, arguments.prologue, split, place),
        y(arguments.y, split.channels_last, place) {}

  __device__ void load(const Batch& from) {
    batch = from;
    in.load(batch, values[0]);
  }

  __device__ void add_totals(Totals& totals) const { in.add_moments(batch, values[0], totals); }

  __device__ void settle(const Totals& totals, bool leads) {
    float rstd[W];
    read_planes<W>(arguments.scale, plane, factor);
    read_planes<W>(arguments.shift, plane, shift);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      mean[w] = in.pivot[w] + totals.mean[w];
      rstd[w] = rsqrtf(totals.squares[w] * per_pixel + arguments.eps);
      factor[w] *= rstd[w];
    }
    if (!leads) return;
    write_planes<W>(mean, plane, arguments.mean);
    write_planes<W>(rstd, plane, arguments.rstd);
  }

  __device__ void write(After&) const {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!batch.has(k)) continue;
      float out[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int w = plane_of<W>(j);
        out[j] = factor[w] * (values[0][k][j] - mean[w]) + shift[w];
      }
      store(y.at(batch.at(k)), narrow<T>(out));
    }
  }
};

template <typename T, int V, int W>
struct Statistics {
  using Arguments = AdainStatistics;
  using Totals = Moments<W>;
  using After = Nothing;
  static constexpr bool kAfter = false, kWrites = false;
  static constexpr Capacity kCapacity = kCapacityOf<V, W>;

  const Arguments& arguments;
  const float per_pixel;
  const int64_t plane;
  Moved<T, V, W, false> in;
  Batch batch;
  float values[1][kCapacity.batch][V];

  __device__ Statistics(const Arguments& arguments, const Split& split, const Place& place)
      : arguments(arguments),
        per_pixel(split.per_pixel),
        plane(place.plane),
        in(arguments.x, Prologue{}, split, place) {}

  __device__ void load(const Batch& from) {
    batch = from;
    in.load(batch, values[0]);
  }

  __device__ void add_totals(Totals& totals) const { in.add_moments(batch, values[0], totals); }

  __device__ void settle(const Totals& totals, bool leads) const {
    if (!leads) return;
    float mean[W], deviation[W];
#pragma unroll
    for (int w = 0; w < W; ++w) {
      mean[w] = in.pivot[w] + totals.mean[w];
      deviation[w] = sqrtf(totals.squares[w] * per_pixel + arguments.eps);
    }
    write_planes<W>(mean, plane, arguments.mean);
    write_planes<W>(deviation, plane, arguments.deviation);
  }
};

}  // namespace

cudaError_t adain_forward(const std::string& dtype, Images images, const AdainForward& arguments,
                          const Scratch& scratch, cudaStream_t stream) {
  const Prologue& prologue = arguments.prologue;
  return choose(dtype, images, {arguments.x, read_only(arguments.y)}, prologue, [&](auto choice) {
    using C = decltype(choice);
    return prologue.active ? launch<Forward<typename C::T, C::V, C::W, true>>(arguments, images, scratch, stream)
                           : launch<Forward<typename C::T, C::V, C::W, false>>(arguments, images, scratch, stream);
  });
}

cudaError_t adain_statistics(const std::string& dtype, Images images, const AdainStatistics& arguments,
                             const Scratch& scratch, cudaStream_t stream) {
  return choose(dtype, images, {arguments.x}, Prologue{}, [&](auto choice) {
    using C = decltype(choice);
    return launch<Statistics<typename C::T, C::V, C::W>>(arguments, images, scratch, stream);
  });
}

}  // namespace gdl
