// With hh = (h - mean) * rstd, m_ the mean over a plane, and M the slope of the leaky ReLU at u:
//
//   dscale = sum g hh, dshift = sum g
//   dx = M scale rstd (g - m_g - hh m_ghh), dweight = sum dx noise, dbias = sum dx
//
// The mean was rounded, so hh is off by its own mean, which is taken from it.
#include "adain_planes.cuh"

namespace gdl {
namespace {

using std::int64_t;

// Of g, g hh and hh.
template <int W>
struct GradientSums {
  Sums<W> of_g;
  float h[W];

  __device__ void add(const GradientSums& other) {
    of_g.add(other.of_g);
#pragma unroll
    for (int w = 0; w < W; ++w) h[w] += other.h[w];
  }
};

template <typename T, int V, int W, bool kActive>
struct Backward {
  using Arguments = AdainBackward;
  using Totals = GradientSums<W>;
  using After = Sums<W>;  // of dx noise and dx
  static constexpr bool kAfter = kActive, kWrites = true;
  static constexpr int kThreads = W == 1 ? 1024 : 256;
  static constexpr int K = V == 1 ? 2 : 8 / V;
  static constexpr Capacity kCapacity{V, W, 2, K, kThreads, kRecordBytes<kThreads, Totals, After>};

  const Arguments& arguments;
  const float per_pixel;
  const int64_t plane;
  Walk<const T, V, W> grad, x;
  Walk<T, V, W> dx;
  Epilogue<V, W, kActive> epilogue;
  Batch batch;
  float values[2][K][V];  // g and u
  float mean[W], rstd[W];
  float of_one[W], of_g[W], of_h[W];  // what dx, but for M, is made of

  __device__ Backward(const Arguments& arguments, const Split& split, const Place& place)
      : arguments(arguments),
        per_pixel(split.per_pixel),
        plane(place.plane),
        grad(arguments.grad, split.channels_last, place),
        x(arguments.x, split.channels_last, place),
        dx(arguments.dx, split.channels_last, place),
        epilogue(arguments.prologue, place) {
    read_planes<W>(arguments.modulation.mean, plane, mean);
    read_planes<W>(arguments.modulation.rstd, plane, rstd);
  }

  __device__ void load(const Batch& from) {
    batch = from;
    Vector<T, V> in[K], in_grad[K];
    load_batch(x, batch, in);
    load_batch(grad, batch, in_grad);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      widen(in[k], values[1][k]);
      if constexpr (kActive) {
        float noise[kNoise<V, W>];
        if (batch.has(k)) {
          epilogue.read_noise(batch.at(k), noise);
          epilogue.add(noise, values[1][k]);
        }
      }
      widen(in_grad[k], values[0][k]);
    }
  }

  __device__ float g(int k, int j) const { return values[0][k][j]; }
  __device__ float u(int k, int j) const { return values[1][k][j]; }
  __device__ float normalised(int k, int j) const {
    return (epilogue.activated(u(k, j)) - mean[plane_of<W>(j)]) * rstd[plane_of<W>(j)];
  }

  __device__ void add_totals(Totals& totals) const {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!batch.has(k)) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int w = plane_of<W>(j);
        totals.of_g.a[w] += g(k, j);
        totals.of_g.b[w] += g(k, j) * normalised(k, j);
        totals.h[w] += normalised(k, j);
      }
    }
  }

  __device__ void settle(const Totals& totals, bool leads) {
    read_planes<W>(arguments.modulation.scale, plane, of_g);
    float of_scale[W];
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const float offset = totals.h[w] * per_pixel;
      of_scale[w] = totals.of_g.b[w] - offset * totals.of_g.a[w];
      of_g[w] *= rstd[w];
      of_h[w] = -of_g[w] * of_scale[w] * per_pixel;
      of_one[w] = -of_g[w] * totals.of_g.a[w] * per_pixel - of_h[w] * offset;
    }
    if (!leads) return;
    write_planes<W>(totals.of_g.a, plane, arguments.gradients.shift);
    write_planes<W>(of_scale, plane, arguments.gradients.scale);
  }

  __device__ void write(After& after) const {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!batch.has(k)) continue;
      float out[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int w = plane_of<W>(j);
        // g - m_g by itself would round the same way for all g of a size, and that adds up in dbias.
        out[j] = fmaf(of_g[w], g(k, j), fmaf(of_h[w], normalised(k, j), of_one[w])) * epilogue.derivative(u(k, j));
      }
      store(dx.at(batch.at(k)), narrow<T>(out));
      if constexpr (kActive) epilogue.add_gradients(batch.at(k), out, after);
    }
  }
};

}  // namespace

cudaError_t adain_backward(const std::string& dtype, Images images, const AdainBackward& arguments,
                           const Scratch& scratch, cudaStream_t stream) {
  const Prologue& prologue = arguments.prologue;
  const auto tensors = {arguments.grad, arguments.x, read_only(arguments.dx)};
  if (images.count == 0) return sum_channels({}, images, arguments.gradients.weight, arguments.gradients.bias, stream);
  return choose(dtype, images, tensors, prologue, [&](auto choice) {
    using C = decltype(choice);
    return prologue.active ? launch<Backward<typename C::T, C::V, C::W, true>>(arguments, images, scratch, stream)
                           : launch<Backward<typename C::T, C::V, C::W, false>>(arguments, images, scratch, stream);
  });
}

}  // namespace gdl
