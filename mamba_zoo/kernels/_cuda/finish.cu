// What is left after the scans: the states at the chunk boundaries, and every small sum in one launch.
//
// In: the number format of "half" operands of `scan_finish`, which are otherwise float32.

struct Carry {  // mirrored by `_CARRY` in selective_scan.py
  float *states, *dt;  // (rows, k, chunks, n, d) and (rows, k, chunks, d)
  const float *A, *start;
  const int* offsets;
  int d, n, k, rows, m, chunk, chunks, reverse;
};

// One thread per state: states at the beginnings of chunks (`reverse`: gradients at their ends) from each chunk's own
// result. The decay over a chunk is exp(A * summed dt), so that nothing else of the chunk is needed.
extern "C" __global__ void __launch_bounds__(128) scan_carry(const __grid_constant__ Carry p) {
  long long i = (long long)blockIdx.x * 128 + threadIdx.x;
  const int channel = i % p.d, state = i / p.d % p.n;
  const long long row = i / p.d / p.n;  // and direction
  if (row >= (long long)p.rows * p.k) return;
  const int direction = row % p.k;
  int steps = p.m;
  if (p.offsets) {
    const int* cuts = p.offsets + (long long)direction * (p.rows + 1) + row / p.k;
    steps = cuts[1] - cuts[0];
  }
  const int chunks = max(1, (steps + p.chunk - 1) / p.chunk);
  const float A = p.A[((long long)direction * p.d + channel) * p.n + state] * LOG2E;
  float h = p.start ? p.start[(row * p.d + channel) * p.n + state] : 0.0f;
  constexpr int AHEAD = 8;
  for (int c0 = 0; c0 < chunks; c0 += AHEAD) {
    float own[AHEAD], dt[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      // The last chunk in walking order is not needed by anyone, and was not computed.
      if (c0 + j + 1 < chunks) {
        long long c = row * p.chunks + (p.reverse ? chunks - 1 - c0 - j : c0 + j);
        own[j] = p.states[(c * p.n + state) * p.d + channel];
        dt[j] = p.dt[c * p.d + channel];
      }
    }
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      if (c0 + j >= chunks) break;
      long long c = row * p.chunks + (p.reverse ? chunks - 1 - c0 - j : c0 + j);
      p.states[(c * p.n + state) * p.d + channel] = h;
      if (c0 + j + 1 < chunks) h = fmaf(exp2_fast(A * dt[j]), h, own[j]);
    }
  }
}

// to[o, i] = scale * sum over r of from[o, r, i], for `inner` values of i.
struct Job {  // mirrored by `_JOB` in selective_scan.py
  const char* from;
  char* to;
  long long total, inner;
  int count, first_block, from_half, to_half;
  int split, wide;  // threads that share one sum; elements per thread
  float scale;
};

struct Jobs {
  Job job[8];
};

template <typename From, typename To, int W> DEVICE void run(const Job& job, float (*shared)[256]) {
  const int columns = 256 / job.split, part = threadIdx.x / columns;
  const long long i = ((long long)(blockIdx.x - job.first_block) * columns + threadIdx.x % columns) * W;
  float x[W], lost[W];  // Kahan's sum: tens of thousands of rows of either sign cancel to a small gradient
#pragma unroll
  for (int w = 0; w < W; w++) x[w] = lost[w] = 0.0f;
  if (i < job.total) {
    const char* from = job.from + (i / job.inner * job.count * job.inner + i % job.inner) * From::BYTES;
#pragma unroll 4
    for (int r = part; r < job.count; r += job.split) {
      Pack<From, W> y = load<From, W>(from + r * job.inner * From::BYTES);
#pragma unroll
      for (int w = 0; w < W; w++) {
        const float term = y.at(w) - lost[w], sum = x[w] + term;
        lost[w] = (sum - x[w]) - term;
        x[w] = sum;
      }
    }
  }
  if (W == 1 && job.split > 1) {
    (*shared)[threadIdx.x] = x[0];
    __syncthreads();
    if (part > 0) return;
    for (int s = 1; s < job.split; s++) x[0] += (*shared)[threadIdx.x + s * columns];
  }
  if (i >= job.total || part > 0) return;
#pragma unroll
  for (int w = 0; w < W; w++) x[w] *= job.scale;
  store<To, W>(job.to + i * To::BYTES, x);
}

extern "C" __global__ void __launch_bounds__(256) scan_finish(const __grid_constant__ Jobs jobs) {
  __shared__ float shared[256];
  int id = 0;
#pragma unroll
  for (int j = 1; j < 8; j++)
    if (jobs.job[j].total && blockIdx.x >= jobs.job[j].first_block) id = j;
  const Job& job = jobs.job[id];
  const bool wide = job.wide > 1;
  if (job.from_half && job.to_half) {
    wide ? run<In, In, 4>(job, &shared) : run<In, In, 1>(job, &shared);
  } else if (job.from_half) {
    wide ? run<In, Float, 4>(job, &shared) : run<In, Float, 1>(job, &shared);
  } else if (job.to_half) {
    wide ? run<Float, In, 4>(job, &shared) : run<Float, In, 1>(job, &shared);
  } else {
    wide ? run<Float, Float, 4>(job, &shared) : run<Float, Float, 1>(job, &shared);
  }
}
