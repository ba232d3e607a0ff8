// Forward pass. One block walks one chunk of one row in one direction; rows of the next tile are on their way to
// shared memory while the current one is computed, and rows of y leave through it.
//
// KEEP: write the state every SPACING steps for the backward pass.
// ADDED: 1 if all directions add to one y, times the scale.
// PART 0: whole rows. 1: only the final state and the summed step size of every chunk, from a zero state.
//      2: every chunk from the state that `scan_carry` found for its beginning.
//      3: as 1 but for the backward pass: the gradient of the state at the beginning of every chunk, walking back from
//         a zero gradient at its end; dy, gated, takes the place of u, and C that of B.

constexpr int SPAN = 64;  // steps per refill of the token ring

constexpr bool OUTPUT = PART == 0 || PART == 2, BACK = PART == 3;
typedef Either<BACK, Out, In>::Type Source;

// Own rows of a tile in shared memory: u and dt, and z if gated. `dy` may be in another format than these.
constexpr bool APART = Source::BYTES != In::BYTES;
constexpr int TOKENS = 1 + !APART + (GATED && PART != 1);
typedef Traffic<TOKENS, In::BYTES> Incoming;
typedef Traffic<1, Source::BYTES> IncomingApart;
typedef Traffic<1, Out::BYTES> Outgoing;
constexpr int STAGE = Incoming::SIZE + (APART ? IncomingApart::SIZE : 0);

extern __shared__ float tile_states[];  // as bytes: incoming rows of two tiles, then outgoing rows of two

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_forward(const __grid_constant__ Args p) {
  __shared__ __align__(16) float maps[2][2 * T * N];
  __shared__ __align__(16) int ring[2 * SPAN];

  Place at = Place::of(p);
  at.chunk += BACK;  // nobody needs what comes before the first chunk, nor after the last
  at.take_chunk(p);
  const int q = at.q, own = at.own, begin = at.begin, end = at.end;
  if (at.chunk > 0 && begin >= end) return;
  const bool last_chunk = end == at.last;
  const u32 within = at.block * CHANNELS * In::BYTES;
  const Rows u = BACK ? Rows::of(p.dy, p.sdy, at, at.block * CHANNELS * Source::BYTES) : Rows::of(p.u, p.su, at, within);
  const Rows dt = Rows::of(p.dt, p.sdt, at, within), z = Rows::of(p.z, p.sz, at, within);
  const Incoming incoming = APART ? Incoming::of(p, at, dt, z) : Incoming::of(p, at, dt, u, z);
  const IncomingApart incoming_apart = IncomingApart::of(p, at, u);
  char* const stage = (char*)tile_states;
  char* const leaving = stage + 2 * STAGE;
  const int local = at.channel - at.block * CHANNELS;  // this thread's first channel in a staged row
  const Rows C = Rows::of(p.C, p.sC, at, 0), B = BACK ? C : Rows::of(p.B, p.sB, at, 0);
  const Outgoing outgoing = Outgoing::of(p, at, output_rows(p, p.y, at, ADDED, Out::BYTES));
  const bool sender = sends(p, at);
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
  Maps travelling;
  auto fetch = [&](int buffer, const int* tokens, int steps) {
    incoming.fetch(stage + buffer * STAGE, tokens, TOKENS, steps);
    if constexpr (APART) incoming_apart.fetch(stage + buffer * STAGE + Incoming::SIZE, tokens, 1, steps);
    travelling.fetch(B, C, tokens, p.n);
  };
  if (begin < end) {
    for (int i = threadIdx.x; i < 2 * SPAN; i += THREADS) ring[i] = visited(p, order, at, walked(i));
    __syncthreads();
    fetch(0, ring, end - begin);
    travelling.put(maps[0]);
    copies_arrived();
    __syncthreads();
  }

  constexpr int REFILL = (SPAN + THREADS - 1) / THREADS;
  int refill[REFILL];
  int buffer = 0;
  for (int step = begin; step < end; step += T, buffer ^= 1) {
    const int done = step - begin;
    const int* tokens = ring + done % (2 * SPAN);
    // One tile late: when the last tile before the span has been sent.
    const int span = done - T;
    const bool boundary = span % SPAN == 0 && span > 0;
    if (boundary) {
#pragma unroll
      for (int i = 0; i < REFILL; i++)
        refill[i] = visited(p, order, at, walked(span + SPAN + i * THREADS + threadIdx.x));
    }
    if (step + T < end) fetch(buffer ^ 1, ring + (done + T) % (2 * SPAN), end - step - T);
    if (KEEP && OUTPUT) {
      int kept = step - at.first;
      if (kept % SPACING == 0 && kept > 0)
        write_kept(h, p.saved + (at.slot(p) + kept / SPACING - 1) * p.n * p.d, p, at);
    }

    const char* const rows = stage + buffer * STAGE + (own * CHANNELS + local) * In::BYTES;
    auto staged = [&](int tensor, int i) {
      return take<In, V>(rows + (tensor * T + i * GROUP) * CHANNELS * In::BYTES);
    };
    auto staged_source = [&](int i) {
      const char* from = stage + buffer * STAGE + (APART ? Incoming::SIZE : T * CHANNELS * Source::BYTES);
      return take<Source, V>(from + ((i * GROUP + own) * CHANNELS + local) * Source::BYTES);
    };
    float delta[OWN][V], drive[OWN][V], source[OWN][V];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const Pack<In, V> dts = staged(0, i);
#pragma unroll
      for (int v = 0; v < V; v++) {
        float x = dts.at(v) + bias[v], e;
        delta[i][v] = SOFTPLUS ? softplus<In::BYTES == 2>(x, e) : x;
      }
    }
    if (step + T > end) {  // steps beyond the end have no effect
#pragma unroll
      for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int v = 0; v < V; v++)
          if (step + i * GROUP + own >= end) delta[i][v] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const Pack<Source, V> us = staged_source(i);
      Pack<In, V> zs = Pack<In, V>::zero();
      if (BACK && GATED) zs = staged(TOKENS - 1, i);
#pragma unroll
      for (int v = 0; v < V; v++) {
        source[i][v] = us.at(v);
        drive[i][v] = (BACK ? p.scale : delta[i][v]) * source[i][v];
        if (BACK && GATED) {
          float gate = zs.at(v);
          drive[i][v] *= gate * sigmoid(gate);
        }
        if (!OUTPUT) total[v] += delta[i][v];
      }
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
        Pack<In, V> zs = Pack<In, V>::zero();
        if (GATED) zs = staged(TOKENS - 1, i);
#pragma unroll
        for (int v = 0; v < V; v++) {
          out[v] = fmaf(skip[v], source[i][v], owned_total(part[v]));
          if (GATED) {
            float gate = zs.at(v);
            out[v] *= gate * sigmoid(gate);
          }
          if (ADDED) out[v] *= p.scale;
        }
        char* to = leaving + buffer * Outgoing::SIZE + ((i * GROUP + own) * CHANNELS + local) * Out::BYTES;
        if (q < GROUP) leave<Out, V>(to, out);
      }
    }

    if (step + T < end) travelling.put(maps[buffer ^ 1]);
    if (boundary) {
#pragma unroll
      for (int i = 0; i < REFILL; i++) {
        int slot = i * THREADS + threadIdx.x;
        if (slot < SPAN) ring[(span + SPAN + slot) % (2 * SPAN)] = refill[i];
      }
    }
    copies_arrived();
    __syncthreads();
    if (OUTPUT) outgoing.send<Out>(leaving + buffer * Outgoing::SIZE, tokens, end - step, ADDED, sender);
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
