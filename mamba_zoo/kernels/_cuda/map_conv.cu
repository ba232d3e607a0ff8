// The depthwise convolution of channels-last maps: the maps, what their gradient is convolved from, and the gradient of
// the taps.
//
// Defined in front of this file by `_source` in depthwise_conv2d.py:
//   BACKWARD  which pass
//   In        number format of the maps
//   V         channels of a thread, neighbours
//   S         positions of a thread, neighbours in a row of the map
//   KH, KW    taps
//   ROWS      rows of the window that may be read at once
//   THREADS, BLOCKS  threads of a block, and how many blocks a multiprocessor holds
//
// A block owns `lanes` packs of V channels side by side, keeps their taps in shared memory as float32, and walks down
// rows of maps, so that the rows above are still in its cache. Beyond the edges everything is zero.

constexpr int TAPS = KH * KW, LINE = S + KW - 1, QUADS = (V + 3) / 4, QUAD = V < 4 ? V : 4;

struct Args {  // mirrored by `_ARGS` in depthwise_conv2d.py
  const char *x, *dy, *weight, *bias;
  char* out;       // contiguous: the result, or the gradient in front of the activation
  float* partial;  // (parts, (TAPS + 1) * d)
  long long sample, row, column;              // bytes of x from one to the next
  long long dy_sample, dy_row, dy_column;     // of dy
  int h, w, d, strips, across, run;           // strips of all maps, of a row, of a part
  int lanes, slots, blocks, silu, flip, weight_format, bias_format;
};

typedef float Taps[TAPS][QUADS][32 * QUAD];

// Quads of channels lie side by side, so that the lanes of a warp read all banks.
DEVICE void keep_taps(Taps& taps, const Args& p, int first) {
  const int channels = min(p.lanes * V, p.d - first);
  for (int i = threadIdx.x; i < channels * TAPS; i += THREADS) {
    const int tap = p.flip ? TAPS - 1 - i % TAPS : i % TAPS, lane = i / TAPS / V, v = i / TAPS % V;
    taps[tap][v / 4][lane * QUAD + v % 4] = number(p.weight, (long long)first * TAPS + i, p.weight_format);
  }
  __syncthreads();
}

struct Place {
  int lane, slot, part, first, channel;

  DEVICE Place of(const Args& p) {
    Place at;
    at.lane = threadIdx.x % p.lanes;
    at.slot = threadIdx.x / p.lanes;
    at.part = blockIdx.x / p.blocks;
    at.first = (int)(blockIdx.x % p.blocks) * p.lanes * V;
    at.channel = at.first + at.lane * V;
    return at;
  }
};

struct Strip {
  long long sample;
  int y, x;

  DEVICE Strip of(const Args& p, u32 index) {
    Strip at;
    const u32 row = index / p.across;
    at.x = (int)(index - row * p.across) * S;
    at.sample = row / p.h;
    at.y = (int)(row - (u32)at.sample * p.h);
    return at;
  }

  // Where a contiguous map has the first position.
  __device__ __forceinline__ long long place(const Args& p, int channel) const {
    return (((sample * p.h + y) * p.w + x) * p.d + channel) * In::BYTES;
  }
};

// What a strip sees of a row of the map that `from` is the first position of.
DEVICE void read_line(Pack<In, V> (&line)[LINE], const Args& p, const char* from, const Strip& at, int tap) {
  const int y = at.y + tap - KH / 2;
  const bool inside = 0 <= y && y < p.h;
  const char* row = from + y * p.row + (long long)(at.x - KW / 2) * p.column;
#pragma unroll
  for (int i = 0; i < LINE; i++, row += p.column) {
    const int x = at.x + i - KW / 2;
    line[i] = fetch<In>(row, inside && 0 <= x && x < p.w);
  }
}

DEVICE void add_line(float (&sum)[S][V], const Pack<In, V> (&line)[LINE], const Taps& taps, int tap, int lane) {
#pragma unroll
  for (int i = 0; i < KW; i++) {
    float weight[V];
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
      u32 words[QUAD];
      read_words(words, (const char*)&taps[tap * KW + i][q][lane * QUAD]);
#pragma unroll
      for (int v = 0; v < QUAD; v++) weight[4 * q + v] = __uint_as_float(words[v]);
    }
#pragma unroll
    for (int s = 0; s < S; s++)
#pragma unroll
      for (int v = 0; v < V; v++) sum[s][v] = fmaf(weight[v], line[s + i].at(v), sum[s][v]);
  }
}

// The convolution of a strip.
DEVICE void convolve(float (&sum)[S][V], const Args& p, const char* from, const Strip& at, const Taps& taps, int lane,
                     const float (&bias)[V]) {
#pragma unroll
  for (int s = 0; s < S; s++)
#pragma unroll
    for (int v = 0; v < V; v++) sum[s][v] = bias[v];
#pragma unroll ROWS
  for (int tap = 0; tap < KH; tap++) {
    Pack<In, V> line[LINE];
    read_line(line, p, from, at, tap);
    add_line(sum, line, taps, tap, lane);
  }
}

DEVICE void bias_of(float (&bias)[V], const Args& p, int channel) {
#pragma unroll
  for (int v = 0; v < V; v++)
    bias[v] = p.bias && channel < p.d ? number(p.bias, channel + v, p.bias_format) : 0.0f;
}

#if !BACKWARD

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) map_conv(const __grid_constant__ Args p) {
  __shared__ __align__(16) Taps taps;
  const Place at = Place::of(p);
  keep_taps(taps, p, at.first);
  if (at.slot >= p.slots || at.channel >= p.d) return;
  float bias[V];
  bias_of(bias, p, at.channel);
  const u32 end = min((u32)p.strips, (u32)(at.part + 1) * p.run);
  for (u32 index = (u32)at.part * p.run + at.slot; index < end; index += p.slots) {
    const Strip strip = Strip::of(p, index);
    const char* from = p.x + strip.sample * p.sample + (long long)at.channel * In::BYTES;
    float sum[S][V];
    convolve(sum, p, from, strip, taps, at.lane, bias);
    if (p.silu)
#pragma unroll
      for (int s = 0; s < S; s++)
#pragma unroll
        for (int v = 0; v < V; v++) sum[s][v] *= sigmoid(sum[s][v]);
    char* out = p.out + strip.place(p, at.channel);
#pragma unroll
    for (int s = 0; s < S; s++, out += (long long)p.d * In::BYTES)
      if (strip.x + s < p.w) put<In>(out, packed<In>(sum[s]));
  }
}

#else

// Gradients of taps and bias, and with SiLU the gradient in front of it, for which the convolution is computed again.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) map_conv_backward(const __grid_constant__ Args p) {
  __shared__ __align__(16) Taps taps;
  __shared__ float shared[(TAPS + 1) * V][32];
  const Place at = Place::of(p);
  keep_taps(taps, p, at.first);
  float sums[(TAPS + 1) * V], bias[V];
#pragma unroll
  for (int i = 0; i < (TAPS + 1) * V; i++) sums[i] = 0.0f;
  bias_of(bias, p, at.channel);
  const u32 end = at.channel < p.d ? min((u32)p.strips, (u32)(at.part + 1) * p.run) : 0;
  for (u32 index = (u32)at.part * p.run + at.slot; index < end; index += p.slots) {
    const Strip strip = Strip::of(p, index);
    const char* from = p.x + strip.sample * p.sample + (long long)at.channel * In::BYTES;
    const char* dy = p.dy + strip.sample * p.dy_sample + strip.y * p.dy_row + strip.x * p.dy_column +
                     (long long)at.channel * In::BYTES;
    Pack<In, V> given[S];
#pragma unroll
    for (int s = 0; s < S; s++, dy += p.dy_column) given[s] = fetch<In>(dy, strip.x + s < p.w);
    float g[S][V];
    if (p.silu) {
      convolve(g, p, from, strip, taps, at.lane, bias);
      char* out = p.out + strip.place(p, at.channel);
#pragma unroll
      for (int s = 0; s < S; s++, out += (long long)p.d * In::BYTES) {
#pragma unroll
        for (int v = 0; v < V; v++) {
          const float share = sigmoid(g[s][v]);
          g[s][v] = given[s].at(v) * share * fmaf(g[s][v], 1.0f - share, 1.0f);
        }
        if (strip.x + s < p.w) put<In>(out, packed<In>(g[s]));
      }
    } else {
#pragma unroll
      for (int s = 0; s < S; s++)
#pragma unroll
        for (int v = 0; v < V; v++) g[s][v] = given[s].at(v);
    }
#pragma unroll
    for (int s = 0; s < S; s++)
#pragma unroll
      for (int v = 0; v < V; v++) sums[TAPS * V + v] += g[s][v];
#pragma unroll
    for (int row = 0; row < KH; row++) {
      Pack<In, V> line[LINE];
      read_line(line, p, from, strip, row);
#pragma unroll
      for (int i = 0; i < KW; i++)
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
          for (int v = 0; v < V; v++) {
            float& sum = sums[(row * KW + i) * V + v];
            sum = fmaf(g[s][v], line[s + i].at(v), sum);
          }
    }
  }
  sum_rows(sums, p.lanes, THREADS, shared);
  if (at.slot > 0 || at.channel >= p.d) return;
  float* to = p.partial + (long long)at.part * (TAPS + 1) * p.d;
#pragma unroll
  for (int v = 0; v < V; v++) {
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) to[(long long)(at.channel + v) * TAPS + tap] = sums[tap * V + v];
    to[(long long)TAPS * p.d + at.channel + v] = sums[TAPS * V + v];
  }
}

#endif
