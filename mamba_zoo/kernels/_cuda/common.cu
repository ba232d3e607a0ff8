// Shared by all kernels: arguments, which part of the problem a block owns, and how a tile of rows reaches it.
//
// Defined in front of this file, as constants, by `source` in _plan.py:
//   In, Out   number formats of the tokens and of y
//   N         states, padded to a power of two; EXACT: no padding
//   LANES     threads that share a channel, each with S = N / LANES of its states
//   V         neighbouring channels per thread, read as one word
//   T         steps per tile: unrolled, and read one tile ahead
//   THREADS   per block; BLOCKS: resident blocks that the register count must allow
//   MAP_V     elements of B and C read as one word
//   CHUNK     neighbouring channels that move between global and shared memory as one word, at least V
//   SPACING   steps between the states that the forward pass keeps for the backward pass
//   SOFTPLUS, GATED   dt passes softplus; there is a gate z
//   EMPTY     `order` may hold -1
//
// Lanes: the LANES threads of a channel lie 32 / LANES apart, so neighbouring threads read neighbouring channels. What
// costs the same for all states (loads, softplus, gate, stores) is divided among them: lane `q` *owns* the steps
// q, q + LANES, q + 2 LANES, ... of a tile, and hands the step size to the others by shuffles. In a tile of fewer steps
// than lanes, lanes T, T + 1, ... only repeat what lanes 0, 1, ... own.

constexpr int S = N / LANES, SPREAD = 32 / LANES, WARPS = THREADS / 32;
constexpr int GROUP = LANES < T ? LANES : T, OWN = T / GROUP;
constexpr int CHANNELS = THREADS / LANES * V;  // per block
struct Strides {  // bytes
  long long sample, token, direction;
};

// Mirrored by `_ARGS` in selective_scan.py.
struct Args {
  const char *u, *dt, *B, *C, *z, *dy;
  const float *A, *D, *bias;
  const int *order, *offsets;
  const float *initial, *dfinal;
  char *y, *du, *ddt, *dz, *dB, *dC;
  float *final, *saved, *dA, *dD, *dbias, *dinitial;
  float *carry, *carry_dt;  // per chunk: states, and the sum of its step sizes
  Strides su, sdt, sB, sC, sz, sdy;
  long long order_sample, order_direction;  // elements
  long long map_block;                      // elements from one block's dB to the next's
  int l, k, d, n, m, rows;
  int chunk, chunks, grid_chunks;  // steps per chunk; chunks of a row; chunks that this launch covers
  int blocks, slots;               // blocks per row of channels; kept states per (sample, direction)
  float scale;                     // of dy: 1 / k for the mean over directions
};

// The part of the problem that a block owns: one row, one direction, one chunk of steps, CHANNELS channels.
struct Place {
  int row, direction, chunk, block, sample;
  int first, last;  // steps of the whole row
  int begin, end;   // steps of this chunk
  int q, channel;   // this thread's lane within its channel, and its first channel
  int own;          // its first own step of a tile
  bool active, owner;

  DEVICE Place of(const Args& p) {
    Place at;
    u32 id = blockIdx.x;
    at.block = id % p.blocks, id /= p.blocks;
    at.direction = id % p.k, id /= p.k;
    at.chunk = id % p.grid_chunks;
    at.row = id / p.grid_chunks;
    at.sample = p.offsets ? 0 : at.row;
    const int* cuts = p.offsets + (long long)at.direction * (p.rows + 1) + at.row;
    at.first = p.offsets ? cuts[0] : 0;
    at.last = p.offsets ? cuts[1] : p.m;
    at.begin = at.first;
    at.end = at.last;
    int lane = threadIdx.x % 32;
    at.q = lane / SPREAD;
    at.channel = at.block * CHANNELS + (threadIdx.x / 32 * SPREAD + lane % SPREAD) * V;
    at.own = at.q % GROUP;
    at.active = at.channel < p.d;
    at.owner = at.active && at.q < GROUP;
    return at;
  }

  __device__ __forceinline__ void take_chunk(const Args& p) {
    begin = min(first + chunk * p.chunk, last);
    end = min(begin + p.chunk, last);
  }

  // Rows of threads beyond the last channel are read from the last channels: no branch, and nothing is stored.
  __device__ __forceinline__ int readable(const Args& p) const { return min(channel, p.d - V); }

  __device__ __forceinline__ long long parameters(const Args& p) const { return (long long)direction * p.d + readable(p); }

  // Element of a `(row, direction, ...)` tensor of `size` per direction.
  __device__ __forceinline__ long long state_row(const Args& p, long long size) const {
    return ((long long)row * p.k + direction) * size;
  }

  // The first kept state of this row. Packed rows share one run of slots per direction, in which row r starts at
  // first / SPACING + r: enough room whatever the lengths, and known without waiting for them.
  __device__ __forceinline__ long long slot(const Args& p) const {
    return p.offsets ? (long long)direction * p.slots + first / SPACING + row
                     : ((long long)row * p.k + direction) * p.slots;
  }
};

// An address is one instruction: a 32 x 32 bit product added to a 64-bit base, so no size of tensor needs another path.
// Spelled out, as the compiler prefers to add twice.
DEVICE const char* row_of(const char* base, int token, u32 stride) {
  u64 at;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(token), "r"(stride), "l"(base));
  return (const char*)at;
}

// Token rows of one tensor, for one sample and direction, from byte `within` of each.
struct Rows {
  const char* base;
  u32 stride;

  DEVICE Rows of(const char* tensor, const Strides& s, const Place& at, u32 within) {
    return {tensor + at.sample * s.sample + at.direction * s.direction + within, (u32)s.token};
  }
  __device__ __forceinline__ const char* at(int token) const { return row_of(base, token, stride); }
};

// Token rows travel between global and shared memory in chunks, and lie there as [tensor][step of the tile][CHANNELS].
// A pass of the block moves chunk number pass * THREADS + thread; a thread's chunks are all in one column, and its own.
constexpr int PER_ROW = CHANNELS / CHUNK, AT_ONCE = THREADS / PER_ROW;  // chunks in a row; rows in a pass
static_assert(AT_ONCE % T == 0 || T % AT_ONCE == 0, "a pass covers whole tensors or a part of one");

template <int TENSORS, int BYTES> struct Traffic {  // BYTES of an element
  static constexpr int TOGETHER = AT_ONCE > T ? AT_ONCE / T : 1;  // tensors in a pass
  static constexpr int SPLIT = AT_ONCE > T ? 1 : T / AT_ONCE;     // passes per tensor
  static constexpr int HELD = (TENSORS + TOGETHER - 1) / TOGETHER, PASSES = HELD * SPLIT;
  static constexpr int EACH = CHUNK * BYTES, SIZE = TENSORS * T * CHANNELS * BYTES;
  char* base[HELD];
  u32 stride[HELD];

  DEVICE int row() { return threadIdx.x / PER_ROW; }
  DEVICE int tensor(int pass) { return TOGETHER > 1 ? pass * TOGETHER + row() / T : pass / SPLIT; }
  DEVICE int step(int pass) { return TOGETHER > 1 ? row() % T : pass % SPLIT * AT_ONCE + row(); }

  // Rows of the tensors, from the block's first channel on. Chunks beyond the last channel are read from the last one.
  DEVICE Traffic of(const Args& p, const Place& at, Rows a, Rows b = {}, Rows c = {}, Rows d = {}) {
    const Rows rows[4] = {a, b, c, d};
    Traffic t;
    const int first = at.block * CHANNELS;
    const int within = min((int)threadIdx.x % PER_ROW * CHUNK, p.d - CHUNK - first) * BYTES;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      const int which = TOGETHER > 1 ? tensor(i) : i;
      t.base[i] = (char*)rows[0].base + within, t.stride[i] = rows[0].stride;
#pragma unroll
      for (int j = 1; j < TENSORS; j++)
        if (which == j) t.base[i] = (char*)rows[j].base + within, t.stride[i] = rows[j].stride;
    }
    return t;
  }

  // The tile's rows of the first `used` tensors, zeros from step `steps` on.
  __device__ __forceinline__ void fetch(char* stage, const int* tokens, int used, int steps) const {
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
      if (tensor(i) >= used) continue;
      const int token = tokens[step(i)];
      const bool real = step(i) < steps && (!EMPTY || token >= 0);
      const char* from = row_of(base[i / SPLIT], EMPTY ? max(token, 0) : token, stride[i / SPLIT]);
      copy<EACH>(stage + (i * THREADS + threadIdx.x) * EACH, from, real);
    }
  }

  // The first `steps` rows of the tile to their tokens; those of tensors in `added` are added to what is there.
  template <typename E>
  __device__ __forceinline__ void send(const char* stage, const int* tokens, int steps, int added, bool real) const {
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
      const int token = tokens[step(i)];
      if (!real || step(i) >= steps || tensor(i) >= TENSORS || (EMPTY && token < 0)) continue;
      const char* from = stage + (i * THREADS + threadIdx.x) * EACH;
      char* to = (char*)row_of(base[i / SPLIT], token, stride[i / SPLIT]);
      if (added >> tensor(i) & 1) {
        add_chunk<E, EACH>(to, from);
      } else {
        store_chunk<EACH>(to, from);
      }
    }
  }
};

// Whether this thread's chunks hold channels that exist.
DEVICE bool sends(const Args& p, const Place& at) {
  return at.block * CHANNELS + (int)(threadIdx.x % PER_ROW) * CHUNK < p.d;
}

// Rows of a `(b, l, k, d)` output, or where directions share them `(b, l, d)`, from the block's first channel on.
DEVICE Rows output_rows(const Args& p, char* tensor, const Place& at, bool shared, int bytes) {
  const long long k = shared ? 1 : p.k, row = at.sample * (long long)p.l * k + (shared ? 0 : at.direction);
  return {tensor + (row * p.d + at.block * CHANNELS) * bytes, (u32)(k * p.d * bytes)};
}

// `(b, l, k, width)` outputs, contiguous.
DEVICE char* output(const Args& p, char* tensor, const Place& at, int width, int bytes, int within) {
  return tensor + (((long long)at.sample * p.l * p.k + at.direction) * width + within) * bytes;
}

// Tokens visited by `count` steps from `step`, into shared memory. Steps past the end repeat the last token: their
// step size is set to zero, so what is read there has no effect.
DEVICE int visited(const Args& p, const int* order, const Place& at, int step) {
  return __ldg(order + max(min(step, at.last - 1), 0));
}

DEVICE const int* order_of(const Args& p, const Place& at) {
  return p.order + at.sample * p.order_sample + at.direction * p.order_direction;
}

// B and C of one tile: raw in registers while they travel, float32 in shared memory [B, C][step][state], from where
// every thread reads its states as 16-byte broadcasts.
struct Maps {
  static constexpr int EACH = T * N / MAP_V, PER = (2 * EACH + THREADS - 1) / THREADS;
  Pack<In, MAP_V> raw[PER];

  __device__ __forceinline__ void fetch(const Rows& B, const Rows& C, const int* tokens, int n) {
#pragma unroll
    for (int c = 0; c < PER; c++) {
      int slot = c * THREADS + threadIdx.x;
      raw[c] = Pack<In, MAP_V>::zero();
      if (2 * EACH % THREADS == 0 || slot < 2 * EACH) {
        int e = slot % EACH * MAP_V, token = tokens[e / N];
        bool real = (EXACT || e % N < n) && (!EMPTY || token >= 0);
        const Rows& rows = slot < EACH ? B : C;
        if (real) raw[c] = load<In, MAP_V>(rows.at(token) + e % N * In::BYTES);
      }
    }
  }

  __device__ __forceinline__ void put(float* maps) const {
#pragma unroll
    for (int c = 0; c < PER; c++) {
      int slot = c * THREADS + threadIdx.x;
      if (2 * EACH % THREADS == 0 || slot < 2 * EACH) {
        float x[MAP_V];
#pragma unroll
        for (int v = 0; v < MAP_V; v++) x[v] = raw[c].at(v);
        float* to = maps + slot * MAP_V;
        if constexpr (MAP_V % 4 == 0) {
#pragma unroll
          for (int v = 0; v < MAP_V; v += 4) *(float4*)(to + v) = make_float4(x[v], x[v + 1], x[v + 2], x[v + 3]);
        } else {
#pragma unroll
          for (int v = 0; v < MAP_V; v++) to[v] = x[v];
        }
      }
    }
  }
};

// COUNT floats in a row, such as this thread's states of one map at one step.
template <int COUNT> DEVICE void read_shared(float (&x)[COUNT], const float* from) {
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      float4 w = *(const float4*)(from + i);
      x[i] = w.x, x[i + 1] = w.y, x[i + 2] = w.z, x[i + 3] = w.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] = from[i];
  }
}

// The value that lane `q` of this channel holds.
DEVICE float shared_by(float x, int q) {
  return LANES == 1 ? x : from_lane(x, threadIdx.x % SPREAD + q * SPREAD);
}

// Partial sums of a group of steps in every lane -> their totals, each in the lane that owns the step. Each exchange
// halves the values: one shuffle per step.
DEVICE float owned_total(float (&x)[GROUP]) {
  const int q = threadIdx.x % 32 / SPREAD;
#pragma unroll
  for (int w = LANES / 2; w >= GROUP; w /= 2)
#pragma unroll
    for (int i = 0; i < GROUP; i++) x[i] += from_xor(x[i], w * SPREAD);
#pragma unroll
  for (int w = GROUP / 2; w >= 1; w /= 2) {
    bool upper = q & w;
#pragma unroll
    for (int i = 0; i < w; i++) {
      float keep = upper ? x[i + w] : x[i], give = upper ? x[i] : x[i + w];
      x[i] = keep + from_xor(give, w * SPREAD);
    }
  }
  return x[0];
}

// Per-channel parameters; absent ones are zero.
DEVICE void read_channels(float (&x)[V], const float* values, const Args& p, const Place& at) {
#pragma unroll
  for (int v = 0; v < V; v++) x[v] = values ? values[at.parameters(p) + v] : 0.0f;
}

// A * log2(e), so that a decay is one multiplication and one exp2.
DEVICE void read_A(float (&A)[V][S], const Args& p, const Place& at) {
#pragma unroll
  for (int v = 0; v < V; v++)
#pragma unroll
    for (int s = 0; s < S; s++) {
      int state = at.q * S + s;
      A[v][s] = EXACT || state < p.n ? p.A[(at.parameters(p) + v) * p.n + state] * LOG2E : 0.0f;
    }
}

// A state `(row, direction, d, n)` as callers see it.
DEVICE void read_state(float (&h)[V][S], const float* states, const Args& p, const Place& at) {
  const float* from = states + (at.state_row(p, p.d) + at.readable(p)) * p.n;
#pragma unroll
  for (int v = 0; v < V; v++)
#pragma unroll
    for (int s = 0; s < S; s++) {
      int state = at.q * S + s;
      h[v][s] = EXACT || state < p.n ? from[(long long)v * p.n + state] : 0.0f;
    }
}

DEVICE void write_state(const float (&h)[V][S], float* states, const Args& p, const Place& at) {
  float* to = states + (at.state_row(p, p.d) + at.channel) * p.n;
#pragma unroll
  for (int v = 0; v < V; v++)
#pragma unroll
    for (int s = 0; s < S; s++) {
      int state = at.q * S + s;
      if (at.active && (EXACT || state < p.n)) to[(long long)v * p.n + state] = h[v][s];
    }
}

// A state as the kernels keep it, `[slot][n][d]`: with channels last the accesses of a warp are contiguous (15 times
// cheaper than `[slot][d][n]` in the forward pass).
DEVICE void read_kept(float (&h)[V][S], const float* slot, const Args& p, const Place& at) {
#pragma unroll
  for (int s = 0; s < S; s++) {
    int state = at.q * S + s;
    bool real = EXACT || state < p.n;
    Pack<Float, V> x = Pack<Float, V>::zero();
    if (real) x = load<Float, V>((const char*)(slot + (long long)state * p.d + at.readable(p)));
#pragma unroll
    for (int v = 0; v < V; v++) h[v][s] = x.at(v);
  }
}

DEVICE void write_kept(const float (&h)[V][S], float* slot, const Args& p, const Place& at) {
#pragma unroll
  for (int s = 0; s < S; s++) {
    int state = at.q * S + s;
    float x[V];
#pragma unroll
    for (int v = 0; v < V; v++) x[v] = h[v][s];
    store<Float, V>((char*)(slot + (long long)state * p.d + at.channel), x, at.active && (EXACT || state < p.n));
  }
}
