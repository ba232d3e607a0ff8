// The causal convolution along the visiting order, forwards and backwards.
//
// Defined in front of this file, as constants, by `source` in _conv_plan.py:
//   BACKWARD  which pass
//   In        number format of the tokens
//   W         taps
//   V         neighbouring channels per thread, read as one word
//   T         steps that are read ahead: unrolled
//   COLUMNS   threads side by side on a row; RUNS: runs of steps per block, all of one direction
//   BLOCKS    resident blocks that the register count must allow
//   LONGEST   steps of a run at most
//   SILU      the activation
//   PACKED    rows are sequences packed into one sample
//   FINAL     there is a gradient of the final state
//   ADDED     directions add to one gradient of the tokens (sm_90)
//
// A thread walks a run of steps with the last W - 1 inputs in registers, so a row is read once by each direction, and
// W - 1 times more per run. Backwards it walks the same way: the gradients of the last W - 1 inputs are sums that are
// not complete yet. For these it walks W - 1 steps beyond its run.

constexpr int THREADS = COLUMNS * RUNS, LAG = W - 1;
constexpr int SPAN = LONGEST + 2 * LAG + 2 * T;  // steps whose tokens are in shared memory, from LAG before the run
constexpr int TAPS = V * W, COLUMN = (TAPS + V) | 1;  // odd, so that lanes meet in no bank
constexpr int CHANNELS = COLUMNS * V;                 // per block

struct Strides {  // bytes
  long long sample, token, direction;
};

// Mirrored by `_ADDRESSES` and `_SIZES` in causal_conv1d.py.
struct Args {
  const char *x, *dy;
  const float *weight, *bias;
  const int *order, *offsets;
  const float *initial, *dfinal;
  char* out;               // y, or the gradient of x
  float *dweight, *dbias;  // a part for every block of runs: (parts, k, d, w) and (parts, k, d)
  float* state;            // the final state, or the gradient of the initial one
  Strides sx, sdy, sout;
  long long order_sample, order_direction;  // elements
  int samples, k, d, m, rows;
  int run, runs, blocks;  // steps of a run; runs of a sample; blocks of channels
};

// Per run: the token of every step, -1 beyond those that the run needs. Of packed rows also the row of the step, steps
// since its first and until its last.
struct Shared {
  float column[COLUMNS * COLUMN];  // weights of a thread's channels, in the end sums of their gradients
  int token[RUNS][SPAN];
  int row[PACKED ? RUNS : 1][PACKED ? SPAN : 1], age[PACKED ? RUNS : 1][PACKED ? SPAN : 1];
  int left[PACKED ? RUNS : 1][PACKED ? SPAN : 1];
};

struct Thread {
  int column, slot;  // place in the block: channels and run
  int direction, part, sample, channel;
  int begin, steps;  // of the run
  bool active;

  DEVICE Thread of(const Args& p) {
    Thread at;
    at.column = threadIdx.x % COLUMNS;
    at.slot = threadIdx.x / COLUMNS;
    u32 id = blockIdx.x;
    at.channel = (id % p.blocks * COLUMNS + at.column) * V, id /= p.blocks;
    at.direction = id % p.k;
    at.part = id / p.k;
    const int run = at.part * RUNS + at.slot;
    at.sample = run / p.runs;
    at.begin = run % p.runs * p.run;
    at.steps = at.sample < p.samples ? min(p.run, p.m - at.begin) : 0;
    at.active = at.steps > 0 && at.channel < p.d;
    return at;
  }

  __device__ __forceinline__ int first_channel() const { return channel - column * V; }

  // Element of a `(row, k, d, ...)` tensor of `size` per channel.
  __device__ __forceinline__ long long of_row(const Args& p, int row, int size) const {
    return (((long long)row * p.k + direction) * p.d + channel) * size;
  }

  __device__ __forceinline__ const char* rows(const char* tensor, const Strides& s) const {
    return tensor + sample * s.sample + direction * s.direction + (long long)channel * In::BYTES;
  }

  // What the block needs in shared memory: tokens from LAG steps before the run to `after` behind it, and weights.
  __device__ __forceinline__ void stage(const Args& p, Shared& b, int after) const {
    const int end = min(begin + steps + after, p.m);
    const int* order = p.order + sample * p.order_sample + direction * p.order_direction;
    const int* cuts = p.offsets + (long long)direction * (p.rows + 1);
    for (int i = column; i < p.run + 2 * LAG + 2 * T; i += COLUMNS) {
      const int step = begin - LAG + i;
      const bool real = steps > 0 && step >= 0 && step < end;
      b.token[slot][i] = real ? __ldg(order + step) : -1;
      if (PACKED) {
        int low = 0, high = real ? p.rows : 1;
        while (high - low > 1) {
          const int middle = (low + high) / 2;
          (__ldg(cuts + middle) <= step ? low : high) = middle;
        }
        b.row[slot][i] = low;
        b.age[slot][i] = real ? step - __ldg(cuts + low) : LAG;
        b.left[slot][i] = real ? __ldg(cuts + low + 1) - 1 - step : LAG;
      }
    }
    const int width = min(CHANNELS, p.d - first_channel()) * W;
    const float* weight = p.weight + ((long long)direction * p.d + first_channel()) * W;
    for (int i = threadIdx.x; i < width; i += THREADS) b.column[i / TAPS * COLUMN + i % TAPS] = __ldg(weight + i);
  }
};

// Spelled out: one instruction, where the compiler would take the address apart and put it together at every step.
DEVICE char* row_of(const char* base, int token, u32 stride) {
  u64 at;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(token), "r"(stride), "l"(base));
  return (char*)at;
}

template <bool ADD> DEVICE void store_row(char* base, u32 stride, int token, const float (&x)[V]) {
  char* at = row_of(base, token, stride);
  if constexpr (In::BYTES * V == 2) {
    store_short(at, In::word(x[0], 0.0f), token >= 0);
  } else {
    u32 words[Pack<In, V>::WORDS];
#pragma unroll
    for (int i = 0; i < Pack<In, V>::WORDS; i++)
      words[i] = In::BYTES == 4 ? In::word(x[i], 0.0f) : In::word(x[2 * i % V], x[(2 * i + 1) % V]);
    if (token < 0) return;
#if __CUDA_ARCH__ >= 900
    if constexpr (ADD) return add_numbers<In>(at, words);
#endif
    store_run(at, words);
  }
}

// Rows of one tensor on their way: those of the next T steps.
struct Rows {
  const char* base;
  u32 stride;
  Pack<In, V> next[T];

  DEVICE Rows of(const Thread& at, const char* tensor, const Strides& s, const int* token) {
    Rows rows;
    rows.base = at.rows(tensor, s);
    rows.stride = (u32)s.token;
#pragma unroll
    for (int i = 0; i < T; i++) rows.next[i] = rows.load(token[i]);
    return rows;
  }

  // Row `token`, zeros if there is none.
  __device__ __forceinline__ Pack<In, V> load(int token) const {
    Pack<In, V> x = Pack<In, V>::zero();
    if (token >= 0) x = ::load<In, V>(row_of(base, token, stride));
    return x;
  }

  // The row of step `i` of a tile; that of the next tile, `token`, takes its place.
  __device__ __forceinline__ Pack<In, V> take(int i, int token) {
    const Pack<In, V> x = next[i];
    next[i] = load(token);
    return x;
  }
};

// What the taps see: inputs of the last W steps, oldest first.
struct Window {
  float x[W][V];

  __device__ __forceinline__ void push(const Pack<In, V>& row) {
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
      for (int j = 0; j < LAG; j++) x[j][v] = x[j + 1][v];
      x[LAG][v] = row.at(v);
    }
  }

  // Before the first step of a run that lies `age` steps behind the first of its row.
  __device__ __forceinline__ void begin(const Args& p, const Thread& at, const Rows& rows, const int* token, int row,
                                        int age) {
    Pack<In, V> past[LAG + 1];
#pragma unroll
    for (int j = 0; j < LAG; j++) past[j] = rows.load(age + j < LAG ? -1 : token[j - LAG]);
#pragma unroll
    for (int j = 0; j < LAG; j++)
#pragma unroll
      for (int v = 0; v < V; v++) x[j + 1][v] = past[j].at(v);
    if (age < LAG) restart(p, at, row, age);
  }

  // The same, leaving alone what belongs to the row.
  __device__ __forceinline__ void restart(const Args& p, const Thread& at, int row, int age) {
    const float* state = p.initial + at.of_row(p, row, LAG) + age;
#pragma unroll
    for (int j = 0; j < LAG; j++)
#pragma unroll
      for (int v = 0; v < V; v++)
        if (age + j < LAG) x[j + 1][v] = p.initial ? __ldg(state + v * LAG + j) : 0.0f;
  }
};

struct Taps {
  float w[W][V], bias[V];

  __device__ __forceinline__ void read(const Args& p, const Thread& at, const Shared& b) {
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
      for (int j = 0; j < W; j++) w[j][v] = b.column[at.column * COLUMN + v * W + j];
      bias[v] = p.bias ? __ldg(p.bias + (long long)at.direction * p.d + at.channel + v) : 0.0f;
    }
  }

  // Before the activation.
  __device__ __forceinline__ float sum(const Window& in, int v) const {
    float total = bias[v];
#pragma unroll
    for (int j = 0; j < W; j++) total = fmaf(w[j][v], in.x[j][v], total);
    return total;
  }
};

#if !BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv_forward(const __grid_constant__ Args p) {
  __shared__ Shared b;
  const Thread at = Thread::of(p);
  at.stage(p, b, 0);
  __syncthreads();
  if (!at.active) return;
  const int* token = b.token[at.slot] + LAG;
  const int *row = b.row[PACKED ? at.slot : 0] + LAG, *age = b.age[PACKED ? at.slot : 0] + LAG;
  Rows x = Rows::of(at, p.x, p.sx, token);
  Window in;
  in.begin(p, at, x, token, PACKED ? row[0] : at.sample, PACKED ? age[0] : at.begin);
  Taps taps;
  taps.read(p, at, b);
  char* out = (char*)at.rows(p.out, p.sout);
  const u32 stride = (u32)p.sout.token;
  for (int t0 = 0; t0 < at.steps; t0 += T)
#pragma unroll
    for (int i = 0; i < T; i++) {
      const int t = t0 + i;
      if (PACKED && age[t] == 0) in.restart(p, at, row[t], 0);
      in.push(x.take(i, token[t + T]));
      float y[V];
#pragma unroll
      for (int v = 0; v < V; v++) {
        y[v] = taps.sum(in, v);
        if (SILU) y[v] *= sigmoid(y[v]);
      }
      store_row<false>(out, stride, token[t], y);
    }
}

#else

// Of the activation.
DEVICE float slope(float total) {
  const float open = sigmoid(total);
  return open * fmaf(total, 1.0f - open, 1.0f);
}

// Gradients of the inputs of the last LAG steps, newest first.
struct Pending {
  float x[LAG + 1][V];

  // Adds what the step `age` steps into its row gives, through the taps, to itself and to those before it; `done` is
  // the one of LAG steps ago, now complete.
  __device__ __forceinline__ void add(const Taps& taps, const float (&g)[V], int age, float (&done)[V]) {
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
      for (int i = LAG; i >= 0; i--) {
        const float part = !PACKED || age >= i ? g[v] : 0.0f;
        x[i][v] = i ? fmaf(taps.w[LAG - i][v], part, x[(i + LAG) % W][v]) : taps.w[LAG][v] * part;
      }
      done[v] = x[LAG][v];
    }
  }
};

struct Backward {
  Rows x, dy;
  Window in;
  Taps taps;
  Pending pending;
  float sums[W + 1][V];  // of the gradients of weights and bias

  // Step `t` of the run, the `i`-th of a tile. `OWN`: not one of those beyond the run.
  template <bool OWN>
  __device__ __forceinline__ void step(const Args& p, const Thread& at, const Shared& b, char* out, int t, int i) {
    const int* token = b.token[at.slot] + LAG;
    const int *row = b.row[PACKED ? at.slot : 0] + LAG, *age = b.age[PACKED ? at.slot : 0] + LAG;
    const int before = t - LAG;
    if (PACKED && age[t] == 0) in.restart(p, at, row[t], 0);
    in.push(x.take(i, token[t + T]));
    const Pack<In, V> given = dy.take(i, token[t + T]);
    float g[V], done[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
      g[v] = given.at(v);
      if (SILU) g[v] *= slope(taps.sum(in, v));
      if (OWN) {
#pragma unroll
        for (int j = 0; j < W; j++) sums[j][v] = fmaf(g[v], in.x[j][v], sums[j][v]);
        sums[W][v] += g[v];
      }
    }
    pending.add(taps, g, PACKED ? age[t] : LAG, done);
    if (FINAL && before >= 0 && before < at.steps) {
      const int until = PACKED ? b.left[at.slot][t] : p.m - 1 - (at.begin + before);
      const float* end = p.dfinal + at.of_row(p, PACKED ? row[before] : at.sample, LAG) + LAG - 1 - until;
      if (until < LAG)
#pragma unroll
        for (int v = 0; v < V; v++) done[v] += __ldg(end + v * LAG);
    }
    const bool complete = before >= 0 && (OWN || before < at.steps);
    store_row<ADDED>(out, (u32)p.sout.token, complete ? token[before] : -1, done);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv_backward(const __grid_constant__ Args p) {
  __shared__ Shared b;
  const Thread at = Thread::of(p);
  at.stage(p, b, LAG);
  __syncthreads();
  Backward walk;
#pragma unroll
  for (int j = 0; j <= W; j++)
#pragma unroll
    for (int v = 0; v < V; v++) walk.sums[j][v] = 0.0f;
  if (at.active) {
    const int* token = b.token[at.slot] + LAG;
    walk.x = Rows::of(at, p.x, p.sx, token);
    walk.dy = Rows::of(at, p.dy, p.sdy, token);
    walk.in.begin(p, at, walk.x, token, PACKED ? b.row[at.slot][LAG] : at.sample,
                  PACKED ? b.age[at.slot][LAG] : at.begin);
    walk.taps.read(p, at, b);
#pragma unroll
    for (int j = 0; j <= LAG; j++)
#pragma unroll
      for (int v = 0; v < V; v++) walk.pending.x[j][v] = 0.0f;
    char* out = (char*)at.rows(p.out, p.sout);
    int t = 0;
    // The last tile may end beyond the run only where the sample ends: there everything is zero.
    for (; t < at.steps; t += T)
#pragma unroll
      for (int i = 0; i < T; i++) walk.step<true>(p, at, b, out, t + i, i);
#pragma unroll
    for (int i = 0; i < LAG; i++) walk.step<false>(p, at, b, out, t + i, i % T);
  }
  // Sums over the runs of the block, one after another: the same in every run of the program.
  for (int slot = 0; slot < RUNS; slot++) {
    __syncthreads();
    if (slot != at.slot) continue;
    float* column = b.column + at.column * COLUMN;
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int j = 0; j <= W; j++) {
        float& sum = column[j < W ? v * W + j : TAPS + v];
        sum = slot ? sum + walk.sums[j][v] : walk.sums[j][v];
      }
  }
  __syncthreads();
  const int width = min(CHANNELS, p.d - at.first_channel());
  const long long first = ((long long)at.part * p.k + at.direction) * p.d + at.first_channel();
  for (int i = threadIdx.x; i < width * W; i += THREADS)
    p.dweight[first * W + i] = b.column[i / TAPS * COLUMN + i % TAPS];
  if (p.dbias)
    for (int i = threadIdx.x; i < width; i += THREADS) p.dbias[first + i] = b.column[i / V * COLUMN + TAPS + i % V];
}

#endif

// One row, direction and channel: what the small kernels for states work on, a thread each.
struct Row {
  int channel, direction, row, length;
  const char *x, *dy;
  const int* order;
  const float *initial, *dfinal;
  float* state;
  bool real;

  DEVICE Row of(const Args& p) {
    Row at;
    long long id = (long long)blockIdx.x * 128 + threadIdx.x;
    const long long place = id * LAG;
    at.channel = id % p.d, id /= p.d;
    at.direction = id % p.k, id /= p.k;
    at.row = id;
    at.real = id < p.rows;
    if (!at.real) return at;
    const int* cuts = p.offsets + (long long)at.direction * (p.rows + 1) + at.row;
    const long long sample = PACKED ? 0 : at.row, channel = (long long)at.channel * In::BYTES;
    at.length = PACKED ? cuts[1] - cuts[0] : p.m;
    at.x = p.x + sample * p.sx.sample + at.direction * p.sx.direction + channel;
    at.dy = p.dy + sample * p.sdy.sample + at.direction * p.sdy.direction + channel;
    at.order = p.order + sample * p.order_sample + at.direction * p.order_direction + (PACKED ? cuts[0] : 0);
    at.initial = p.initial ? p.initial + place : nullptr;
    at.dfinal = p.dfinal ? p.dfinal + place : nullptr;
    at.state = p.state + place;
    return at;
  }

  // What `tensor` holds at a step of the row, zero at empty ones.
  __device__ __forceinline__ float at_step(const char* tensor, long long stride, int step) const {
    const int token = order[step];
    return token >= 0 ? load<In, 1>(tensor + token * stride).at(0) : 0.0f;
  }

  // The input at a step of the row; negative ones are the state before it.
  __device__ __forceinline__ float input(const Args& p, int step) const {
    if (step >= 0) return at_step(x, p.sx.token, step);
    return initial ? initial[step + LAG] : 0.0f;
  }
};

#if !BACKWARD
extern "C" __global__ void __launch_bounds__(128) conv_final(const __grid_constant__ Args p) {
  const Row at = Row::of(p);
  if (!at.real) return;
  for (int i = 0; i < LAG; i++) at.state[i] = at.input(p, at.length - LAG + i);
}

#else
// The gradient of the state before each row, from its first LAG steps; of a shorter row, part of it was its last state.
extern "C" __global__ void __launch_bounds__(128) conv_initial(const __grid_constant__ Args p) {
  const Row at = Row::of(p);
  if (!at.real) return;
  const long long parameters = (long long)at.direction * p.d + at.channel;
  const float* weight = p.weight + parameters * W;
  for (int i = 0; i < LAG; i++) {
    const int place = i - at.length;
    at.state[i] = at.dfinal && place >= 0 ? at.dfinal[place] : 0.0f;
  }
  for (int t = 0; t < min(LAG, at.length); t++) {
    float g = at.at_step(at.dy, p.sdy.token, t);
    if (SILU) {
      float total = p.bias ? p.bias[parameters] : 0.0f;
      for (int j = 0; j < W; j++) total = fmaf(weight[j], at.input(p, t - LAG + j), total);
      g *= slope(total);
    }
    for (int j = 0; t + j < LAG; j++) at.state[t + j] = fmaf(weight[j], g, at.state[t + j]);
  }
}
#endif
