// What the backward pass of the MLP needs between its products: the gradient of the GELU, and sums over rows.
//
// Defined in front of this file by `mlp_source` in _rows.py:
//   In  number format of the tokens
//
// A block owns `lanes` packs of V columns side by side and walks over rows; a thread holds the sums of its columns, and
// the rows of the next turns are on their way.

struct Args {  // mirrored by `_ARGS` in mlp.py
  const char* x;
  char *g, *y;
  float* sums;  // (parts, columns)
  long long rows;
  int columns, lanes, parts, blocks;
};

constexpr int THREADS = 128;

// The normal distribution at `x`, and x times its density. The tail beyond |x| is the density times a minimax polynomial
// in 1 / (1 + 0.43 |x| / sqrt(2)), of relative error 8e-8; 1 + erf would lose its digits.
DEVICE void gelu_parts(float x, float& below, float& along) {
  const float e = exp2_fast(x * x * -0.72134752f), t = reciprocal(fmaf(fabsf(x), 0.304055916f, 1.0f));
  float p = fmaf(t, 0.0368559547f, -0.15519549f);
  p = fmaf(p, t, 0.19186905f);
  p = fmaf(p, t, -0.042878896f);
  p = fmaf(p, t, 0.123431385f);
  p = fmaf(p, t, 0.102472521f);
  p = fmaf(p, t, 0.122188255f);
  p = fmaf(p, t, 0.121257268f);
  const float tail = p * (t * e);
  below = x < 0.0f ? tail : 1.0f - tail;
  along = x * 0.39894228f * e;
}

struct Place {
  int slots, slot, part, column;
  bool inside;

  DEVICE Place of(const Args& p) {
    Place at;
    at.slots = THREADS / p.lanes;
    at.slot = threadIdx.x / p.lanes;
    at.part = blockIdx.x / p.blocks;
    at.column = ((int)(blockIdx.x % p.blocks) * p.lanes + (int)(threadIdx.x % p.lanes)) * V;
    at.inside = at.column < p.columns;
    return at;
  }
};

// T rows ahead of columns that the thread owns, with GELU that of `x` to `y` and its gradient in the place of `g`.
template <int T, bool GELU> DEVICE void walk(const Args& p) {
  __shared__ float shared[V][32];
  const Place at = Place::of(p);
  const long long step = (long long)p.parts * at.slots, stride = (long long)p.columns * In::BYTES;
  const long long jump = step * stride;
  long long row = (long long)at.part * at.slots + at.slot;
  const long long start = row * stride + at.column * In::BYTES;
  const char* x = p.x + start;
  char *g = p.g + start, *y = p.y + start;
  Pack<In, V> next[T], given[T];
#pragma unroll
  for (int i = 0; i < T; i++) {
    const bool real = at.inside && row + i * step < p.rows;
    next[i] = fetch<In>(x + i * jump, real);
    if (GELU) given[i] = fetch<In>(g + i * jump, real);
  }
  float sums[V];
#pragma unroll
  for (int v = 0; v < V; v++) sums[v] = 0.0f;
  while (row < p.rows && at.inside) {
#pragma unroll
    for (int i = 0; i < T; i++) {
      const Pack<In, V> h = next[i], dy = given[i];
      const bool real = row < p.rows, later = row + T * step < p.rows;
      next[i] = fetch<In>(x + T * jump, later);
      if (GELU) given[i] = fetch<In>(g + T * jump, later);
      if (GELU && real) {
        float gradient[V], out[V];
#pragma unroll
        for (int v = 0; v < V; v++) {
          float below, along;
          gelu_parts(h.at(v), below, along);
          out[v] = h.at(v) * below;
          gradient[v] = dy.at(v) * (below + along);
          sums[v] += gradient[v];
        }
        put<In>(g, packed<In>(gradient));
        if (p.y) put<In>(y, packed<In>(out));
      }
      if (!GELU)
#pragma unroll
        for (int v = 0; v < V; v++) sums[v] += h.at(v);
      row += step, x += jump, g += jump, y += jump;
    }
  }
  if (!p.sums) return;
  sum_rows(sums, p.lanes, THREADS, shared);
  if (at.slot > 0 || !at.inside) return;
#pragma unroll
  for (int v = 0; v < V; v++) p.sums[(long long)at.part * p.columns + at.column + v] = sums[v];
}

extern "C" __global__ void __launch_bounds__(THREADS) gelu_backward(const __grid_constant__ Args p) { walk<2, true>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) column_sums(const __grid_constant__ Args p) { walk<4, false>(p); }
