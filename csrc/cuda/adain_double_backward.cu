// The gradients of <v, dx> + <v_scale, dscale> + <v_shift, dshift> + <v_weight, dweight> + <v_bias, dbias>.
//
// With hh, m_ and M as in adain_backward.cu, w = M (v + v_weight noise + v_bias), and what is left of w and g without
// their parts along one and hh, whose mean product is K = m_wg - m_w m_g - m_whh m_ghh:
//
//   grad_grad = scale rstd (w - m_w - hh m_whh) + v_scale hh + v_shift
//   grad_scale = rstd sum of products, K for each pixel
//   grad_x = M ( rstd (v_scale - scale rstd m_whh) (g - m_g - hh m_ghh)
//                - scale rstd^2 (K hh + m_ghh (w - m_w - hh m_whh)) )
//   grad_weight = sum grad_x noise, grad_bias = sum grad_x
//
// The mean was rounded, so hh is off by its own mean, which is taken from it.
#include "adain_planes.cuh"

namespace gdl {
namespace {

using std::int64_t;

template <int W>
struct Products {
  Comoments<W> w_g;
  Sums<W> w_h_g_h;  // of w hh and g hh
  float h[W];       // of hh

  __device__ void add(const Products& other) {
    w_g.add(other.w_g);
    w_h_g_h.add(other.w_h_g_h);
#pragma unroll
    for (int p = 0; p < W; ++p) h[p] += other.h[p];
  }
};

template <typename T, int V, int W, bool kActive>
struct DoubleBackward {
  using Arguments = AdainDoubleBackward;
  using Totals = Products<W>;
  using After = Sums<W>;  // of grad_x noise and grad_x
  static constexpr bool kAfter = kActive, kWrites = true;
  static constexpr int kThreads = W == 1 ? 512 : 256;
  static constexpr int K = V == 1 ? 4 : 8 / V;
  static constexpr Capacity kCapacity{V, W, 3, K, kThreads, kRecordBytes<kThreads, Totals, After>};

  const Arguments& arguments;
  const float per_pixel;
  const int64_t plane, channel;
  Walk<const T, V, W> v, grad, x;
  Walk<T, V, W> grad_grad, grad_x;
  Epilogue<V, W, kActive> epilogue;
  Batch batch;
  float values[3][K][V];  // w, g and u
  float mean[W], rstd[W];
  // What grad_grad, and grad_x but for M, are made of.
  float gg_one[W], gg_w[W], gg_h[W], gx_one[W], gx_w[W], gx_g[W], gx_h[W];

  __device__ DoubleBackward(const Arguments& arguments, const Split& split, const Place& place)
      : arguments(arguments),
        per_pixel(split.per_pixel),
        plane(place.plane),
        channel(place.channel),
        v(arguments.v, split.channels_last, place),
        grad(arguments.grad, split.channels_last, place),
        x(arguments.x, split.channels_last, place),
        grad_grad(arguments.grad_grad, split.channels_last, place),
        grad_x(arguments.grad_x, split.channels_last, place),
        epilogue(arguments.prologue, place) {
    read_planes<W>(arguments.modulation.mean, plane, mean);
    read_planes<W>(arguments.modulation.rstd, plane, rstd);
  }

  __device__ void load(const Batch& from) {
    batch = from;
    Vector<T, V> in[K], in_grad[K], in_v[K];
    load_batch(x, batch, in);
    load_batch(grad, batch, in_grad);
    load_batch(v, batch, in_v);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      widen(in_v[k], values[0][k]);
      widen(in_grad[k], values[1][k]);
      widen(in[k], values[2][k]);
      if constexpr (kActive) {
        if (!batch.has(k)) continue;
        float noise[kNoise<V, W>], v_weight[W], v_bias[W];
        epilogue.read_noise(batch.at(k), noise);
        epilogue.add(noise, values[2][k]);
        read_planes<W>(arguments.directions.weight, channel, v_weight);
        read_planes<W>(arguments.directions.bias, channel, v_bias);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const int p = plane_of<W>(j);
          values[0][k][j] += v_weight[p] * epilogue.noise_of(noise, j) + v_bias[p];
          values[0][k][j] *= epilogue.derivative(u(k, j));
        }
      }
    }
  }

  __device__ float w(int k, int j) const { return values[0][k][j]; }
  __device__ float g(int k, int j) const { return values[1][k][j]; }
  __device__ float u(int k, int j) const { return values[2][k][j]; }
  __device__ float normalised(int k, int j) const {
    return (epilogue.activated(u(k, j)) - mean[plane_of<W>(j)]) * rstd[plane_of<W>(j)];
  }

  __device__ void add_totals(Totals& totals) const {
    Totals own{};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!batch.has(k)) continue;
      own.w_g.count += W == 1 ? V : 1;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int p = plane_of<W>(j);
        own.w_g.mean_a[p] += w(k, j);
        own.w_g.mean_b[p] += g(k, j);
        own.w_h_g_h.a[p] += w(k, j) * normalised(k, j);
        own.w_h_g_h.b[p] += g(k, j) * normalised(k, j);
        own.h[p] += normalised(k, j);
      }
    }
    own.w_g.divide_by_count();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!batch.has(k)) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int p = plane_of<W>(j);
        own.w_g.products[p] += (w(k, j) - own.w_g.mean_a[p]) * (g(k, j) - own.w_g.mean_b[p]);
      }
    }
    totals.add(own);
  }

  __device__ void settle(const Totals& totals, bool leads) {
    float grad_scale[W];
    read_planes<W>(arguments.modulation.scale, plane, gg_w);
    read_planes<W>(arguments.directions.scale, plane, gg_h);
    read_planes<W>(arguments.directions.shift, plane, gg_one);
#pragma unroll
    for (int p = 0; p < W; ++p) {
      const float offset = totals.h[p] * per_pixel;
      const float mean_wh = totals.w_h_g_h.a[p] * per_pixel - offset * totals.w_g.mean_a[p];
      const float mean_gh = totals.w_h_g_h.b[p] * per_pixel - offset * totals.w_g.mean_b[p];
      const float k = totals.w_g.products[p] * per_pixel - mean_wh * mean_gh;
      gg_w[p] *= rstd[p];
      gg_h[p] -= gg_w[p] * mean_wh;
      gx_w[p] = -gg_w[p] * rstd[p] * mean_gh;
      gx_g[p] = rstd[p] * gg_h[p];
      gx_h[p] = rstd[p] * (gg_w[p] * (mean_gh * mean_wh - k) - mean_gh * gg_h[p]);
      gg_one[p] -= gg_w[p] * totals.w_g.mean_a[p] + gg_h[p] * offset;
      gx_one[p] = -gx_w[p] * totals.w_g.mean_a[p] - gx_g[p] * totals.w_g.mean_b[p] - gx_h[p] * offset;
      grad_scale[p] = rstd[p] * k * totals.w_g.count;
    }
    if (leads) write_planes<W>(grad_scale, plane, arguments.gradients.scale);
  }

  __device__ void write(After& after) const {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!batch.has(k)) continue;
      float out[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int p = plane_of<W>(j);
        out[j] = fmaf(gg_w[p], w(k, j), fmaf(gg_h[p], normalised(k, j), gg_one[p]));
      }
      store(grad_grad.at(batch.at(k)), narrow<T>(out));
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int p = plane_of<W>(j);
        out[j] = fmaf(gx_w[p], w(k, j), fmaf(gx_g[p], g(k, j), fmaf(gx_h[p], normalised(k, j), gx_one[p])));
        out[j] *= epilogue.derivative(u(k, j));
      }
      store(grad_x.at(batch.at(k)), narrow<T>(out));
      if constexpr (kActive) epilogue.add_gradients(batch.at(k), out, after);
    }
  }
};

}  // namespace

cudaError_t adain_double_backward(const std::string& dtype, Images images, const AdainDoubleBackward& arguments,
                                  const Scratch& scratch, cudaStream_t stream) {
  const AdainDoubleBackward& a = arguments;
  const auto tensors = {a.v, a.grad, a.x, read_only(a.grad_grad), read_only(a.grad_x)};
  if (images.count == 0) return sum_channels({}, images, arguments.gradients.weight, arguments.gradients.bias, stream);
  return choose(dtype, images, tensors, a.prologue, [&](auto choice) {
    using C = decltype(choice);
    return a.prologue.active
               ? launch<DoubleBackward<typename C::T, C::V, C::W, true>>(arguments, images, scratch, stream)
               : launch<DoubleBackward<typename C::T, C::V, C::W, false>>(arguments, images, scratch, stream);
  });
}

}  // namespace gdl
