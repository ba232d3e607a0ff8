// Forward pass. One block walks one chunk of one row in one direction; rows of the next tile are read into registers
// before the current tile is computed, so a store never delays a load.
//
// KEEP: write the state every SPACING steps for the backward pass.
// PART 0: whole rows. 1: only the final state and the summed step size of every chunk, from a zero state.
//      2: every chunk from the state that `scan_carry` found for its beginning.
//      3: as 1 but for the backward pass: the gradient of the state at the beginning of every chunk, walking back from
//         a zero gradient at its end; dy, gated, takes the place of u, and C that of B.

constexpr int SPAN = 64;  // steps per refill of the token ring

constexpr bool OUTPUT = PART == 0 || PART == 2, BACK = PART == 3;
typedef Either<BACK, Out, In>::Type Source;

struct Tile {  // this thread's own steps of one tile
  Pack<Source, V> u[OWN];
  Pack<In, V> dt[OWN], z[OWN];

  __device__ __forceinline__ void fetch(const Rows& ur, const Rows& dtr, const Rows& zr, const int* tokens, int own) {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      int token = tokens[i * GROUP + own];
      u[i] = Pack<Source, V>::zero();
      dt[i] = z[i] = Pack<In, V>::zero();
      if (!EMPTY || token >= 0) {
        dt[i] = load<In, V>(dtr.at(token));
        u[i] = load<Source, V>(ur.at(token));
        if (GATED && PART != 1) z[i] = load<In, V>(zr.at(token));
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_forward(const __grid_constant__ Args p) {
  __shared__ __align__(16) float maps[2][2 * T * N];
  __shared__ __align__(16) int ring[2 * SPAN];

  Place at = Place::of(p);
  at.chunk += BACK;  // nobody needs what comes before the first chunk, nor after the last
  at.take_chunk(p);
  const int q = at.q, own = at.own, begin = at.begin, end = at.end;
  if (at.chunk > 0 && begin >= end) return;
  const bool last_chunk = end == at.last;
  const u32 within = at.readable(p) * In::BYTES;
  const Rows u = BACK ? Rows::of(p.dy, p.sdy, at, at.readable(p) * Source::BYTES) : Rows::of(p.u, p.su, at, within);
  const Rows dt = Rows::of(p.dt, p.sdt, at, within), z = Rows::of(p.z, p.sz, at, within);
  const Rows C = Rows::of(p.C, p.sC, at, 0), B = BACK ? C : Rows::of(p.B, p.sB, at, 0);
  char* y = output(p, p.y, at, p.d, Out::BYTES, at.channel);
  const u32 y_stride = p.k * p.d * Out::BYTES;
  const int* order = order_of(p, at);

  float A[V][S], h[V][S], bias[V], skip[V], total[V];
  read_A(A, p, at);
  read_channels(bias, p.bias, p, at);
  read_channels(skip, p.D, p, at);
#pragma unroll
  for (int v = 0; v < V; v++) total[v] = 0.0f;
  float* carry = p.carry + (at.state_row(p, p.chunks) + at.chunk) * p.n * p.d;
  if (PART == 2) {
    read_kept(h, carry, p, at);
  } else if (PART == 0 && p.initial) {
    read_state(h, p.initial, p, at);
  } else {
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int s = 0; s < S; s++) h[v][s] = 0.0f;
  }

  auto walked = [&](int i) { return BACK ? end - 1 - i : begin + i; };
  Tile now;
  Maps travelling;
  if (begin < end) {
    for (int i = threadIdx.x; i < 2 * SPAN; i += THREADS) ring[i] = visited(p, order, at, walked(i));
    __syncthreads();
    now.fetch(u, dt, z, ring, own);
    travelling.fetch(B, C, ring, p.n);
    travelling.put(maps[0]);
    __syncthreads();
  }

  constexpr int REFILL = (SPAN + THREADS - 1) / THREADS;
  int refill[REFILL];
  int buffer = 0;
  for (int step = begin; step < end; step += T, buffer ^= 1) {
    const int done = step - begin;
    const int* tokens = ring + done % (2 * SPAN);
    const bool boundary = done % SPAN == 0 && done > 0;
    if (boundary) {
#pragma unroll
      for (int i = 0; i < REFILL; i++)
        refill[i] = visited(p, order, at, walked(done + SPAN + i * THREADS + threadIdx.x));
    }
    Tile next;
    if (step + T < end) {
      const int* ahead = ring + (done + T) % (2 * SPAN);
      next.fetch(u, dt, z, ahead, own);
      travelling.fetch(B, C, ahead, p.n);
    }
    if (KEEP && OUTPUT) {
      int kept = step - at.first;
      if (kept % SPACING == 0 && kept > 0)
        write_kept(h, p.saved + (at.slot(p) + kept / SPACING - 1) * p.n * p.d, p, at);
    }

    float delta[OWN][V], drive[OWN][V];
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
      for (int v = 0; v < V; v++) {
        float x = now.dt[i].at(v) + bias[v], e;
        if (SOFTPLUS) x = softplus(x, e);
        if (step + i * GROUP + own >= end) x = 0.0f;
        delta[i][v] = x;
        drive[i][v] = (BACK ? p.scale : x) * now.u[i].at(v);
        if (BACK) {
          if (step + i * GROUP + own >= end) drive[i][v] = 0.0f;
          float gate = now.z[i].at(v);
          if (GATED) drive[i][v] *= gate * sigmoid(gate);
        }
        if (!OUTPUT) total[v] += x;
      }

    const float* map = maps[buffer] + q * S;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      float part[V][GROUP];
#pragma unroll
      for (int j = 0; j < GROUP; j++) {
        const int t = i * GROUP + j;
        float b[S], c[S];
        read_shared(b, map + t * N);
        if (OUTPUT) read_shared(c, map + T * N + t * N);
#pragma unroll
        for (int v = 0; v < V; v++) {
          float dl = shared_by(delta[i][v], j), dr = shared_by(drive[i][v], j), sum = 0.0f;
#pragma unroll
          for (int s = 0; s < S; s++) {
            float decay = exp2_fast(dl * A[v][s]);
            h[v][s] = BACK ? decay * fmaf(dr, b[s], h[v][s]) : fmaf(decay, h[v][s], dr * b[s]);
            if (OUTPUT) sum = fmaf(h[v][s], c[s], sum);
          }
          part[v][j] = sum;
        }
      }
      if (OUTPUT) {
        float out[V];
#pragma unroll
        for (int v = 0; v < V; v++) {
          out[v] = fmaf(skip[v], now.u[i].at(v), owned_total(part[v]));
          if (GATED) {
            float gate = now.z[i].at(v);
            out[v] *= gate * sigmoid(gate);
          }
        }
        int token = tokens[i * GROUP + own];
        bool written = at.owner && step + i * GROUP + own < end && (!EMPTY || token >= 0);
        store<Out, V>(output_row(y, token, y_stride), out, written);
      }
    }

    if (step + T < end) travelling.put(maps[buffer ^ 1]);
    if (boundary) {
#pragma unroll
      for (int i = 0; i < REFILL; i++) {
        int slot = i * THREADS + threadIdx.x;
        if (slot < SPAN) ring[(done + SPAN + slot) % (2 * SPAN)] = refill[i];
      }
    }
    __syncthreads();
    now = next;
  }

  if (!OUTPUT) {
    write_kept(h, carry, p, at);
      // Each lane has summed its own steps.
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int w = SPREAD; w < SPREAD * GROUP; w *= 2) total[v] += from_xor(total[v], w);
    store<Float, V>((char*)(p.carry_dt + (at.state_row(p, p.chunks) + at.chunk) * p.d + at.channel), total,
                    q == 0 && at.active);
  } else if (p.final && last_chunk) {
    write_state(h, p.final, p, at);
  }
}
