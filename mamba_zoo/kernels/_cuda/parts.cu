// Sums over rows: of a block, and over what blocks left.

struct Parts {  // mirrored by `_PARTS` in _rows.py
  const float* from;
  char* to;
  int parts, columns, stride, format;
};

// to[c] = sum over r of from[r, c]: a block sums eight columns, each by 32 threads.
extern "C" __global__ void __launch_bounds__(256) sum_parts(const __grid_constant__ Parts p) {
  __shared__ float shared[32][9];
  const int lane = threadIdx.x / 8, column = blockIdx.x * 8 + threadIdx.x % 8;
  float total = 0.0f;
  if (column < p.columns) {
#pragma unroll 8
    for (int r = lane; r < p.parts; r += 32) total += __ldg(p.from + (long long)r * p.stride + column);
  }
  shared[lane][threadIdx.x % 8] = total;
  __syncthreads();
  if (lane > 0 || column >= p.columns) return;
  for (int i = 1; i < 32; i++) total += shared[i][threadIdx.x];
  if (p.format == 0) {
    *(float*)(p.to + 4LL * column) = total;
  } else {
    *(u16*)(p.to + 2LL * column) = p.format == 1 ? Half::word(total, 0.0f) : BFloat::word(total, 0.0f);
  }
}

// A block's sums over its rows, `x` of each thread for its columns, into `to`: the `lanes` threads of a row lie side by
// side. Rows of a warp are added by exchanges, then warps one after another: the same in every run of the program.
template <int N> DEVICE void sum_rows(float (&x)[N], int lanes, int threads, float (*shared)[32]) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1)
    if (mask >= lanes)
#pragma unroll
      for (int n = 0; n < N; n++) x[n] += from_xor(x[n], mask);
  if (lanes > 32) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int w = threads / 32 - 1; w >= 0; w--) {
    if (w == warp && lane < lanes)
#pragma unroll
      for (int n = 0; n < N; n++) {
        if (w < threads / 32 - 1) x[n] += shared[n][lane];
        shared[n][lane] = x[n];
      }
    __syncthreads();
  }
}
