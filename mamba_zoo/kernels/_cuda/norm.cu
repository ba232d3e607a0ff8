// Addition and norm, forwards or backwards, a row by a few threads that hold it in registers.
//
// Defined in front of this file by `norm_source` in _rows.py:
//   BACKWARD        which pass
//   X, Branch, Out  number formats of the tokens, of what is added to them, and of the normed tokens
//   Stream          of the sum: the wider of X and Branch
//   Weight          of weight and bias
//   WIDE            rows are too wide for a block
//
// A thread holds P packs of V channels, `lanes` packs apart. Rows of up to 32 lanes lie side by side in warps; a wider
// row has a block of its own, whose warps exchange their sums. A block walks over rows and asks for the next one before
// it works on the present one. Rows too wide for a block are read more than once: forwards by a loop, backwards by a
// kernel for the two sums over each row and another whose blocks own slices of channels.

constexpr int WHOLE = 256;  // threads of the kernels for one wide row each

struct Args {  // mirrored by `_ARGS` in add_norm.py
  const char *x, *branch, *dy, *dstream, *stream, *scale, *weight, *bias;
  float* statistics;  // (2, rows): mean and reciprocal deviation
  float* along;       // (2, rows): sums over channels, of rows too wide for a block
  char *out, *added;  // y and stream, or dx and dbranch
  float* partial;     // (parts, 2, d)
  long long rows, rows_per_sample;
  int d, lanes, threads, parts, slices, rms, scale_format;
  float eps;
};

// Sums over the threads of a row, in a fixed order. `turn` chooses the buffer, so that one barrier is enough.
template <int N> DEVICE void sum_lanes(float (&x)[N], int lanes, float (*shared)[N][32], int& turn) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1)
    if (mask < lanes)
#pragma unroll
      for (int n = 0; n < N; n++) x[n] += from_xor(x[n], mask);
  if (lanes <= 32) return;
#pragma unroll
  for (int n = 0; n < N; n++)
    if (threadIdx.x % 32 == 0) shared[turn][n][threadIdx.x / 32] = x[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; n++) x[n] = 0.0f;
#pragma unroll 1
  for (int w = 0; w < lanes / 32; w++)
#pragma unroll
    for (int n = 0; n < N; n++) x[n] += shared[turn][n][w];
  turn ^= 1;
}

struct Place {
  int slot, slots, first;  // row of the block's, rows at once, channel of the thread's first pack
  int part, step;

  DEVICE Place of(const Args& p, int packs) {
    Place at;
    at.slots = p.threads / p.lanes;
    at.slot = threadIdx.x / p.lanes;
    at.part = blockIdx.x / p.slices;
    at.step = p.lanes * V;
    at.first = (int)(blockIdx.x % p.slices) * at.step * packs + (int)(threadIdx.x % p.lanes) * V;
    return at;
  }

  __device__ __forceinline__ int channel(int i) const { return first + i * step; }
};

DEVICE float factor_of(const Args& p, long long row, bool real) {
  return p.scale && real ? number(p.scale, row / p.rows_per_sample, p.scale_format) : 1.0f;
}

#if !BACKWARD

// What is stored of the sum, and as the norm sees it.
DEVICE Pack<Stream, V> sum_of(const Pack<X, V>& x, const Pack<Branch, V>& branch, float factor, float (&h)[V]) {
#pragma unroll
  for (int v = 0; v < V; v++) h[v] = fmaf(factor, branch.at(v), x.at(v));
  const Pack<Stream, V> stored = packed<Stream>(h);
#pragma unroll
  for (int v = 0; v < V; v++) h[v] = stored.at(v);
  return stored;
}

#if !WIDE

template <int P> struct Row {
  Pack<X, V> x[P];
  Pack<Branch, V> branch[P];
  float factor;

  __device__ __forceinline__ void read(const Args& p, const Place& at, long long row) {
    const bool real = row < p.rows;
    factor = factor_of(p, row, real);
#pragma unroll
    for (int i = 0; i < P; i++) {
      const long long place = row * p.d + at.channel(i);
      const bool inside = real && at.channel(i) < p.d;
      x[i] = fetch<X>(p.x + place * X::BYTES, inside);
      branch[i] = fetch<Branch>(p.branch + place * Branch::BYTES, inside && p.branch);
    }
  }
};

template <int P> DEVICE void forward(const Args& p) {
  __shared__ float shared[2][1][32];
  const Place at = Place::of(p, P);
  int turn = 0;
  float weight[P][V], bias[P][V];
#pragma unroll
  for (int i = 0; i < P; i++)
#pragma unroll
    for (int v = 0; v < V; v++) {
      const int channel = at.channel(i) + v;
      weight[i][v] = channel < p.d ? number<Weight>(p.weight, channel) : 0.0f;
      bias[i][v] = channel < p.d && p.bias ? number<Weight>(p.bias, channel) : 0.0f;
    }
  const float share = 1.0f / p.d;
  const long long step = (long long)p.parts * at.slots;
  const long long start = (long long)at.part * at.slots;
  Row<P> next;
  next.read(p, at, start + at.slot);
  for (long long first = start; first < p.rows; first += step) {
    const long long row = first + at.slot;
    float h[P][V], total[1] = {0.0f};
    const bool real = row < p.rows;
#pragma unroll
    for (int i = 0; i < P; i++) {
      const Pack<Stream, V> stored = sum_of(next.x[i], next.branch[i], next.factor, h[i]);
      if (p.branch && real && at.channel(i) < p.d)
        put<Stream>(p.added + (row * p.d + at.channel(i)) * Stream::BYTES, stored);
    }
    next.read(p, at, row + step);
    float mean = 0.0f;
    if (!p.rms) {
#pragma unroll
      for (int i = 0; i < P; i++)
#pragma unroll
        for (int v = 0; v < V; v++) total[0] += h[i][v];
      sum_lanes(total, p.lanes, shared, turn);
      mean = total[0] * share;
    }
    total[0] = 0.0f;
#pragma unroll
    for (int i = 0; i < P; i++)
#pragma unroll
      for (int v = 0; v < V; v++) {
        h[i][v] = at.channel(i) < p.d ? h[i][v] - mean : 0.0f;
        total[0] = fmaf(h[i][v], h[i][v], total[0]);
      }
    sum_lanes(total, p.lanes, shared, turn);
    const float spread = rsqrtf(fmaf(total[0], share, p.eps));
    if (!real) continue;
#pragma unroll
    for (int i = 0; i < P; i++) {
#pragma unroll
      for (int v = 0; v < V; v++) h[i][v] = fmaf(h[i][v] * spread, weight[i][v], bias[i][v]);
      if (at.channel(i) < p.d) put<Out>(p.out + (row * p.d + at.channel(i)) * Out::BYTES, packed<Out>(h[i]));
    }
    if (threadIdx.x % p.lanes == 0) p.statistics[row] = mean, p.statistics[p.rows + row] = spread;
  }
}

extern "C" __global__ void __launch_bounds__(256, 3) norm_forward_1(const __grid_constant__ Args p) { forward<1>(p); }
extern "C" __global__ void __launch_bounds__(512) norm_forward_2(const __grid_constant__ Args p) { forward<2>(p); }
extern "C" __global__ void __launch_bounds__(128, 4) norm_forward_3(const __grid_constant__ Args p) { forward<3>(p); }

#else

extern "C" __global__ void __launch_bounds__(WHOLE) norm_forward_wide(const __grid_constant__ Args p) {
  __shared__ float shared[2][1][32];
  const long long row = blockIdx.x;
  const float factor = factor_of(p, row, true);
  float mean = 0.0f, spread = 0.0f;
  int turn = 0;
  // The sum, its squares, and the result: what is read again is near.
  for (int look = p.rms ? 1 : 0; look < 3; look++) {
    float total[1] = {0.0f};
    for (int channel = threadIdx.x * V; channel < p.d; channel += WHOLE * V) {
      const long long place = row * p.d + channel;
      float h[V];
      const Pack<Stream, V> stored =
          sum_of(fetch<X>(p.x + place * X::BYTES, true),
                 fetch<Branch>(p.branch + place * Branch::BYTES, p.branch != nullptr), factor, h);
#pragma unroll
      for (int v = 0; v < V; v++) {
        h[v] -= mean;
        total[0] += look == 0 ? h[v] : h[v] * h[v];
      }
      if (look < 2) continue;
      if (p.branch) put<Stream>(p.added + place * Stream::BYTES, stored);
#pragma unroll
      for (int v = 0; v < V; v++)
        h[v] = fmaf(h[v] * spread, number<Weight>(p.weight, channel + v),
                    p.bias ? number<Weight>(p.bias, channel + v) : 0.0f);
      put<Out>(p.out + place * Out::BYTES, packed<Out>(h));
    }
    if (look == 2) break;
    sum_lanes(total, WHOLE, shared, turn);
    if (look == 0) mean = total[0] / p.d;
    if (look == 1) spread = rsqrtf(total[0] / p.d + p.eps);
  }
  if (threadIdx.x == 0) p.statistics[row] = mean, p.statistics[p.rows + row] = spread;
}

#endif

#else

template <int P> struct Row {
  Pack<Out, V> dy[P];
  Pack<Stream, V> passed[P], stream[P];
  float factor, mean, spread;

  __device__ __forceinline__ void read(const Args& p, const Place& at, long long row) {
    const bool real = row < p.rows;
    factor = factor_of(p, row, real);
    mean = real ? __ldg(p.statistics + row) : 0.0f;
    spread = real ? __ldg(p.statistics + p.rows + row) : 0.0f;
#pragma unroll
    for (int i = 0; i < P; i++) {
      const long long place = row * p.d + at.channel(i);
      const bool inside = real && at.channel(i) < p.d;
      stream[i] = fetch<Stream>(p.stream + place * Stream::BYTES, inside);
      dy[i] = fetch<Out>(p.dy + place * Out::BYTES, inside);
      if (P == 1) passed[i] = fetch<Stream>(p.dstream + place * Stream::BYTES, inside && p.dstream);
    }
  }

  // What is needed last: of two packs not a row ahead, for which the registers do not suffice.
  __device__ __forceinline__ void read_passed(const Args& p, const Place& at, long long row) {
    if (P == 1) return;
#pragma unroll
    for (int i = 0; i < P; i++)
      passed[i] = fetch<Stream>(p.dstream + (row * p.d + at.channel(i)) * Stream::BYTES,
                                row < p.rows && at.channel(i) < p.d && p.dstream);
  }
};

template <int P> DEVICE void backward(const Args& p) {
  __shared__ float shared[2][2][32], columns[2 * P * V][32];
  const Place at = Place::of(p, P);
  int turn = 0;
  float weight[P][V], sums[2 * P * V];
#pragma unroll
  for (int i = 0; i < P; i++)
#pragma unroll
    for (int v = 0; v < V; v++) {
      const int channel = at.channel(i) + v;
      weight[i][v] = channel < p.d ? number<Weight>(p.weight, channel) : 0.0f;
      sums[i * V + v] = sums[(P + i) * V + v] = 0.0f;
    }
  const float share = 1.0f / p.d;
  const long long step = (long long)p.parts * at.slots;
  const long long start = (long long)at.part * at.slots;
  Row<P> next;
  next.read(p, at, start + at.slot);
  for (long long first = start; first < p.rows; first += step) {
    const long long row = first + at.slot;
    const bool real = row < p.rows;
    const float spread = next.spread, factor = next.factor;
    const float mean = next.mean;
    Row<P> held = next;
    held.read_passed(p, at, row);
    float total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < P; i++) {
#pragma unroll
      for (int v = 0; v < V; v++) {
        const float normed = (held.stream[i].at(v) - mean) * spread, dy = held.dy[i].at(v), g = dy * weight[i][v];
        sums[i * V + v] = fmaf(dy, normed, sums[i * V + v]);
        sums[(P + i) * V + v] += dy;
        total[0] = fmaf(g, normed, total[0]);
        total[1] += g;
      }
    }
    next.read(p, at, row + step);
    if (WIDE) {
      total[0] = real ? __ldg(p.along + row) : 0.0f;
      total[1] = real ? __ldg(p.along + p.rows + row) : 0.0f;
    } else {
      sum_lanes(total, p.lanes, shared, turn);
    }
    const float along = total[0] * share, shift = p.rms ? 0.0f : total[1] * share;
    if (!real) continue;
#pragma unroll
    for (int i = 0; i < P; i++) {
      if (at.channel(i) >= p.d) continue;
      const long long place = row * p.d + at.channel(i);
      float g[V];
#pragma unroll
      for (int v = 0; v < V; v++) {
        const float normed = (held.stream[i].at(v) - mean) * spread;
        g[v] = held.dy[i].at(v) * weight[i][v] - fmaf(normed, along, shift);
        g[v] = fmaf(g[v], spread, held.passed[i].at(v));
      }
      put<X>(p.out + place * X::BYTES, packed<X>(g));
      if (p.added) {
#pragma unroll
        for (int v = 0; v < V; v++) g[v] *= factor;
        put<Branch>(p.added + place * Branch::BYTES, packed<Branch>(g));
      }
    }
  }
  sum_rows(sums, p.lanes, p.threads, columns);
  if (at.slot > 0) return;
#pragma unroll
  for (int i = 0; i < P; i++)
#pragma unroll
    for (int v = 0; v < V; v++)
      if (at.channel(i) < p.d) {
        float* to = p.partial + 2LL * at.part * p.d + at.channel(i) + v;
        to[0] = sums[i * V + v], to[p.d] = sums[(P + i) * V + v];
      }
}

extern "C" __global__ void __launch_bounds__(256, 3) norm_backward_1(const __grid_constant__ Args p) { backward<1>(p); }
#if !WIDE
extern "C" __global__ void __launch_bounds__(512) norm_backward_2(const __grid_constant__ Args p) { backward<2>(p); }

#else

extern "C" __global__ void __launch_bounds__(WHOLE) norm_backward_along(const __grid_constant__ Args p) {
  __shared__ float shared[2][2][32];
  const long long row = blockIdx.x;
  const float mean = __ldg(p.statistics + row), spread = __ldg(p.statistics + p.rows + row);
  float total[2] = {0.0f, 0.0f};
  for (int channel = threadIdx.x * V; channel < p.d; channel += WHOLE * V) {
    const long long place = row * p.d + channel;
    const Pack<Stream, V> h = fetch<Stream>(p.stream + place * Stream::BYTES, true);
    const Pack<Out, V> dy = fetch<Out>(p.dy + place * Out::BYTES, true);
#pragma unroll
    for (int v = 0; v < V; v++) {
      const float g = dy.at(v) * number<Weight>(p.weight, channel + v);
      total[0] = fmaf(g, (h.at(v) - mean) * spread, total[0]);
      total[1] += g;
    }
  }
  int turn = 0;
  sum_lanes(total, WHOLE, shared, turn);
  if (threadIdx.x == 0) p.along[row] = total[0], p.along[p.rows + row] = total[1];
}

#endif

#endif
