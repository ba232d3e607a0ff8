// Backward pass. Each tile is run again from the state at its beginning, with all its decays and states in registers,
// and then walked in reverse. States at tile beginnings come from the forward pass, which kept one every SPACING steps;
// the ones between are found by a sweep without outputs and wait in shared memory.
//
// HOLD: keep the decays of a tile in registers too; otherwise they are computed again.
// WINDOW: steps whose tokens are in shared memory at a time, a multiple of SPACING.
// SUMS 0: add dB and dC of all blocks of channels atomically, in float32. 1: one float32 buffer per block of channels.
//      2: the only block of channels stores the result itself.
// ADDED: bits of the tensors, of du, ddt and dz, whose rows all directions add to.
// PART 0: whole rows. 2: every chunk, from the state kept for its beginning and the gradient that `scan_carry` found
//      for its end.

constexpr int TILES = SPACING / T;                  // per kept state
constexpr int VALUES = 2 * T * S;                   // dC and dB of one tile in one thread
constexpr int SUMMED = 2 * T * N;                   // and in a block
constexpr int QUADS = SPREAD >= 8 ? 2 : 1;          // sums of a warp: those of even and of odd quads of lanes
static_assert(VALUES % 16 == 0, "sums over channels go sixteen at a time");
static_assert(LANES <= 8, "a quad of lanes holds channels of one lane index");

// Rows of a tile in shared memory: u, dt, z if gated, dy. du, ddt and dz leave from the places of the first three. `dy`
// may be in another format.
constexpr bool APART = Out::BYTES != In::BYTES;
constexpr int LEAVING = 2 + GATED, TOKENS = LEAVING + !APART;
typedef Traffic<TOKENS, In::BYTES> Incoming;
typedef Traffic<1, Out::BYTES> IncomingApart;
typedef Traffic<LEAVING, In::BYTES> Outgoing;
constexpr int STAGE = Incoming::SIZE + (APART ? IncomingApart::SIZE : 0);

// Sums over the channels of a warp, sixteen values per thread at a time. The tensor cores multiply the values by
// selector matrices of zeros and ones: four products sum each value over the four lanes of a quad, which a butterfly
// would do with four times as many instructions. Lane 4 g + p then holds, for quad g of lanes, values 4 p + {0, 2, 1, 3};
// exchanges add up all but two quads, which are left to `release`.
// Values come in falling order of steps; within a step, by state.
DEVICE void selectors(float (&select)[4][2]) {
  const int row = threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    select[i][0] = row == 2 * i ? 1.0f : 0.0f;
    select[i][1] = row == 2 * i + 1 ? 1.0f : 0.0f;
  }
}

struct ChannelSums {
  float acc[4], x[16];

  __device__ __forceinline__ void push(float* sums, const float (&select)[4][2], int t, int which, int s, float value) {
    const int place = (t * 2 + which) * S + s, at = place % 16;
    x[at] = value;
    // Where fewer than 16 states share a group with later ones, the last of a group in memory comes first.
    const bool opens = S >= 16 ? s % 16 == 0 : which == 0 && s == 0 && (t + 1) * 2 * S % 16 == 0;
    const bool quad = S >= 4 ? s % 4 == 3 : which == 1 && s == S - 1 && t * 2 * S % 4 == 0;
    const bool closes = S >= 16 ? s % 16 == 15 : which == 1 && s == S - 1 && t * 2 * S % 16 == 0;
    if (opens) acc[0] = acc[1] = acc[2] = acc[3] = 0.0f;
    if (quad) {
      const int first = at / 4 * 4;
      float four[4] = {x[first], x[first + 1], x[first + 2], x[first + 3]};
      add(select, first / 4, four);
    }
    if (closes) finish(sums, place / 16);
  }

  // Values 4 i .. 4 i + 3 of the sixteen.
  __device__ __forceinline__ void add(const float (&select)[4][2], int i, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 800
    float high[4], low[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
      u32 bits = __float_as_uint(x[r]);
      // tf32 has the precision of half, so bfloat16 gradients lose nothing by truncation; half ones are rounded, and
      // float32 ones sent in two parts.
      if (In::ROUND) bits += 0x1000;
      high[r] = __uint_as_float(bits & 0xffffe000);
      low[r] = x[r] - high[r];
    }
    multiply_tf32(acc, high, select[i][0], select[i][1]);
    if (In::TWO_PARTS) multiply_tf32(acc, low, select[i][0], select[i][1]);
#else
    float y[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
      y[r] = x[r] + from_xor(x[r], 1);
      y[r] += from_xor(y[r], 2);
    }
    if (threadIdx.x % 4 == i) acc[0] = y[0], acc[1] = y[2], acc[2] = y[1], acc[3] = y[3];
#endif
  }

  // Group `group` of sixteen is complete: write its sums over the warp to `sums` [step][dC, dB][state].
  __device__ __forceinline__ void finish(float* sums, int group) {
    const int lane = threadIdx.x % 32, q = lane / SPREAD;
    float x[4] = {acc[0], acc[2], acc[1], acc[3]};
    int held = 4, from = lane % 4 * 4;
#pragma unroll
    for (int w = SPREAD / 2; w >= 8; w /= 2) {
      bool upper = lane & w;
      if (held > 1) {
        held /= 2;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          if (i >= held) break;
          float keep = upper ? x[i + held] : x[i], give = upper ? x[i] : x[i + held];
          x[i] = keep + from_xor(give, w);
        }
        from += upper ? held : 0;
      } else {
        x[0] += from_xor(x[0], w);
      }
    }
    sums += QUADS == 2 && lane & 4 ? SUMMED : 0;
    if constexpr (SPREAD <= 8 && S % 4 == 0) {
      const int r = group * 16 + from;
      *(float4*)(sums + r / S * N + q * S + r % S) = make_float4(x[0], x[1], x[2], x[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (i >= held) break;
        const int r = group * 16 + from + i;
        sums[r / S * N + q * S + r % S] = x[i];
      }
    }
  }
};

extern __shared__ float tile_states[];  // [tile][channel of thread][state of thread][thread]; then rows of two tiles

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_backward(const __grid_constant__ Args p) {
  __shared__ __align__(16) float maps[2][2 * T * N];
  __shared__ __align__(16) float sums[2][WARPS * QUADS][SUMMED];
  __shared__ __align__(16) int visit[WINDOW];

  Place at = Place::of(p);
  at.take_chunk(p);
  const int q = at.q, own = at.own, begin = at.begin, end = at.end;
  const u32 within = at.block * CHANNELS * In::BYTES;
  const Rows u = Rows::of(p.u, p.su, at, within), dt = Rows::of(p.dt, p.sdt, at, within);
  const Rows z = Rows::of(p.z, p.sz, at, within), dy = Rows::of(p.dy, p.sdy, at, at.block * CHANNELS * Out::BYTES);
  const Rows du = output_rows(p, p.du, at, ADDED & 1, In::BYTES), ddt = output_rows(p, p.ddt, at, false, In::BYTES);
  const Rows dz = output_rows(p, p.dz, at, ADDED & 4, In::BYTES);
  const Incoming incoming = GATED ? Incoming::of(p, at, u, dt, z, dy) : Incoming::of(p, at, u, dt, dy);
  const IncomingApart incoming_apart = IncomingApart::of(p, at, dy);
  const Outgoing outgoing = Outgoing::of(p, at, du, ddt, dz);
  const bool sender = sends(p, at);
  // Threads beyond the last channel have no gradients, so that they add nothing to dB and dC.
  const float scale = at.active ? p.scale : 0.0f;
  char* const stages = (char*)(tile_states + (TILES > 1 ? TILES * N * CHANNELS : 0));
  const int local = at.channel - at.block * CHANNELS;  // this thread's first channel in a staged row
  const Rows B = Rows::of(p.B, p.sB, at, 0), C = Rows::of(p.C, p.sC, at, 0);
  typedef Either<SUMS == 2, In, Float>::Type Map;
  const char* map_base = output(p, nullptr, at, p.n, Map::BYTES, 0);
  if (SUMS == 1) map_base += at.block * p.map_block * Map::BYTES;
  const u32 map_stride = p.k * p.n * Map::BYTES;
  const int* order = order_of(p, at);

  float A[V][S], g[V][S], dA[V][S], bias[V], skip[V], dskip[V], dbias[V];
  read_A(A, p, at);
  read_channels(bias, p.bias, p, at);
  read_channels(skip, p.D, p, at);
  if (PART == 2) {
    read_kept(g, p.carry + (at.state_row(p, p.chunks) + at.chunk) * p.n * p.d, p, at);
  } else if (p.dfinal) {
    read_state(g, p.dfinal, p, at);
  } else {
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int s = 0; s < S; s++) g[v][s] = 0.0f;
  }
#pragma unroll
  for (int v = 0; v < V; v++) {
    dskip[v] = dbias[v] = 0.0f;
#pragma unroll
    for (int s = 0; s < S; s++) {
      dA[v][s] = 0.0f;
      if (!at.active) g[v][s] = 0.0f;
    }
  }
  ChannelSums channels[S < 16 ? 1 : 2];
  float select[4][2];
  selectors(select);

  Maps travelling;
  auto fetch = [&](int buffer, const int* tokens, int steps, bool whole) {
    char* const stage = stages + buffer * STAGE;
    incoming.fetch(stage, tokens, whole ? TOKENS : 2, steps);
    if constexpr (APART)
      if (whole) incoming_apart.fetch(stage + Incoming::SIZE, tokens, 1, steps);
    travelling.fetch(B, C, tokens, p.n);
  };
  // This thread's own step i of a tensor.
  auto place = [&](int buffer, int tensor, int i) {
    return stages + buffer * STAGE + ((tensor * T + i * GROUP + own) * CHANNELS + local) * In::BYTES;
  };
  // dB and dC of a finished tile: over the warps, then to memory, W states at a time.
  constexpr int W = MAP_V == 4 ? 4 : 1;
  auto release = [&](const float* of_tile, const int* tokens, int step) {
#pragma unroll
    for (int i = 0; i < (SUMMED / W + THREADS - 1) / THREADS; i++) {
      const int e = (i * THREADS + threadIdx.x) * W, t = e / (2 * N), state = e % N;
      if (SUMMED / W % THREADS && e >= SUMMED) break;
      float x[W];
#pragma unroll
      for (int w = 0; w < WARPS * QUADS; w++) {
        float y[W];
        read_shared(y, of_tile + w * SUMMED + e);
#pragma unroll
        for (int v = 0; v < W; v++) x[v] = w == 0 ? y[v] : x[v] + y[v];
      }
      int token = tokens[t];
      char* to = (e / N % 2 ? p.dB : p.dC) + (u64)row_of(map_base, token, map_stride) + state * Map::BYTES;
      bool written = step + t < end && (!EMPTY || token >= 0) && (EXACT || state < p.n);
      if constexpr (SUMS == 0) {
        add_words(to, x, written);
      } else {
        store<Map, W>(to, x, written);
      }
    }
  };

  // The state at the beginning of a segment of SPACING steps.
  auto kept_state = [&](float (&h)[V][S], int step) {
    const int kept = step - at.first;
    if (kept > 0) {
      read_kept(h, p.saved + (at.slot(p) + kept / SPACING - 1) * p.n * p.d, p, at);
    } else if (p.initial) {
      read_state(h, p.initial, p, at);
    } else {
#pragma unroll
      for (int v = 0; v < V; v++)
#pragma unroll
        for (int s = 0; s < S; s++) h[v][s] = 0.0f;
    }
  };

  const int windows = (end - begin + WINDOW - 1) / WINDOW;
  int buffer = 0;
  for (int window = windows - 1; window >= 0; window--) {
    const int first = begin + window * WINDOW, stop = min(first + WINDOW, end);
    __syncthreads();  // nobody needs the last window's tokens any more
    for (int i = threadIdx.x; i < WINDOW; i += THREADS) visit[i] = visited(p, order, at, first + i);
    __syncthreads();
    int segment = (stop - first - 1) / SPACING * SPACING;
    int tiles = (stop - first - segment + T - 1) / T;
    float start[V][S];
    kept_state(start, first + segment);
    fetch(buffer, visit + segment, stop - first - segment, tiles == 1);
    travelling.put(maps[buffer]);
    copies_arrived();
    __syncthreads();
    for (; segment >= 0; segment -= SPACING, tiles = TILES) {
      float h[T + 1][V][S];
#pragma unroll
      for (int v = 0; v < V; v++)
#pragma unroll
        for (int s = 0; s < S; s++) h[0][v][s] = start[v][s];

      // The sweep: states at the beginning of every tile but the last.
      for (int tile = 0; TILES > 1 && tile < tiles - 1; tile++, buffer ^= 1) {
        fetch(buffer ^ 1, visit + segment + (tile + 1) * T, stop - first - segment - (tile + 1) * T, tile + 2 == tiles);
#pragma unroll
        for (int v = 0; v < V; v++)
#pragma unroll
          for (int s = 0; s < S; s++) tile_states[((tile * V + v) * S + s) * THREADS + threadIdx.x] = h[0][v][s];
        const float* map = maps[buffer] + q * S;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
          float delta[V], drive[V];
          const Pack<In, V> us = take<In, V>(place(buffer, 0, i)), dts = take<In, V>(place(buffer, 1, i));
#pragma unroll
          for (int v = 0; v < V; v++) {
            float x = dts.at(v) + bias[v], e;
            delta[v] = SOFTPLUS ? softplus<In::BYTES == 2>(x, e) : x;
            drive[v] = delta[v] * us.at(v);
          }
#pragma unroll
          for (int j = 0; j < GROUP; j++) {
            float b[S];
            read_shared(b, map + (i * GROUP + j) * N);
#pragma unroll
            for (int v = 0; v < V; v++) {
              float dl = shared_by(delta[v], j), dr = shared_by(drive[v], j);
#pragma unroll
              for (int s = 0; s < S; s++) h[0][v][s] = fmaf(exp2_fast(dl * A[v][s]), h[0][v][s], dr * b[s]);
            }
          }
        }
        travelling.put(maps[buffer ^ 1]);
        copies_arrived();
        __syncthreads();
      }

      for (int tile = tiles - 1; tile >= 0; tile--, buffer ^= 1) {
        const int* tokens = visit + segment + tile * T;
        const int step = first + segment + tile * T;
        if (TILES > 1 && tile < tiles - 1) {
#pragma unroll
          for (int v = 0; v < V; v++)
#pragma unroll
            for (int s = 0; s < S; s++) h[0][v][s] = tile_states[((tile * V + v) * S + s) * THREADS + threadIdx.x];
        }
        constexpr bool EARLY = V * S <= 4;
        const bool more = tile > 0 || segment > 0;
        if (more) fetch(buffer ^ 1, tile > 0 ? tokens - T : visit + segment - SPACING, T, TILES == 1 || tile > 0);
        if (EARLY && tile == 0 && segment > 0) kept_state(start, first + segment - SPACING);
        float delta[OWN][V], slope[OWN][V];
#pragma unroll
        for (int i = 0; i < OWN; i++) {
          const Pack<In, V> dts = take<In, V>(place(buffer, 1, i));
#pragma unroll
          for (int v = 0; v < V; v++) {
            float x = dts.at(v) + bias[v], e;
            delta[i][v] = x;
            slope[i][v] = 1.0f;
            if (SOFTPLUS) {
              delta[i][v] = softplus<In::BYTES == 2>(x, e);
              float r = reciprocal(1.0f + e);
              slope[i][v] = x >= 0.0f ? r : e * r;
            }
          }
        }
        if (step + T > end) {  // steps beyond the end have no effect: their dy is zero too
#pragma unroll
          for (int i = 0; i < OWN; i++)
#pragma unroll
            for (int v = 0; v < V; v++)
              if (step + i * GROUP + own >= end) delta[i][v] = slope[i][v] = 0.0f;
        }

        float a[HOLD ? T : 1][V][S];
        const float* map = maps[buffer] + q * S;
        Pack<In, V> us;
#pragma unroll
        for (int t = 0; t < T; t++) {
          float b[S];
          read_shared(b, map + t * N);
          if (t % GROUP == 0) us = take<In, V>(place(buffer, 0, t / GROUP));
#pragma unroll
          for (int v = 0; v < V; v++) {
            float dl = shared_by(delta[t / GROUP][v], t % GROUP);
            float dr = shared_by(delta[t / GROUP][v] * us.at(v), t % GROUP);
#pragma unroll
            for (int s = 0; s < S; s++) {
              float decay = exp2_fast(dl * A[v][s]);
              if (HOLD) a[t][v][s] = decay;
              h[t + 1][v][s] = fmaf(decay, h[t][v][s], dr * b[s]);
            }
          }
        }

        float* sum = sums[buffer][threadIdx.x / 32 * QUADS];
#pragma unroll
        for (int i = OWN - 1; i >= 0; i--) {
          float input[V], dout[V], dgate[V];
          us = take<In, V>(place(buffer, 0, i));
          const char* const dy_at = APART ? stages + buffer * STAGE + Incoming::SIZE +
                                                ((i * GROUP + own) * CHANNELS + local) * Out::BYTES
                                          : place(buffer, LEAVING, i);
          const Pack<Out, V> dys = take<Out, V>(dy_at);
          Pack<In, V> zs = Pack<In, V>::zero();
          if (GATED) zs = take<In, V>(place(buffer, 2, i));
#pragma unroll
          for (int v = 0; v < V; v++) {
            input[v] = us.at(v);
            dout[v] = dys.at(v) * scale;
            if (GATED) {
              float gate = zs.at(v), half_way = sigmoid(gate);
              dgate[v] = dout[v] * half_way * fmaf(gate, 1.0f - half_way, 1.0f);
              dout[v] *= gate * half_way;
            }
          }
          float by_output[V][GROUP], by_decay[V][GROUP], by_input[V][GROUP];
#pragma unroll
          for (int j = GROUP - 1; j >= 0; j--) {
            const int t = i * GROUP + j;
            float b[S], c[S];
            read_shared(b, map + t * N);
            read_shared(c, map + T * N + t * N);
            float dl[V], dr[V], d[V];
#pragma unroll
            for (int v = 0; v < V; v++) {
              dl[v] = shared_by(delta[i][v], j);
              dr[v] = shared_by(delta[i][v] * input[v], j);
              d[v] = shared_by(dout[v], j);
              by_output[v][j] = by_decay[v][j] = by_input[v][j] = 0.0f;
            }
#pragma unroll
            for (int s = 0; s < S; s++) {
              float dmap[2];
#pragma unroll
              for (int v = 0; v < V; v++) {
                float& G = g[v][s];
                G = fmaf(d[v], c[s], G);
                if (GATED) by_output[v][j] = fmaf(h[t + 1][v][s], c[s], by_output[v][j]);
                dmap[0] = v == 0 ? d[v] * h[t + 1][v][s] : fmaf(d[v], h[t + 1][v][s], dmap[0]);
                dmap[1] = v == 0 ? dr[v] * G : fmaf(dr[v], G, dmap[1]);
                by_input[v][j] = fmaf(G, b[s], by_input[v][j]);
                G *= HOLD ? a[HOLD ? t : 0][v][s] : exp2_fast(dl[v] * A[v][s]);
                float through = G * h[t][v][s];
                dA[v][s] = fmaf(through, dl[v], dA[v][s]);
                by_decay[v][j] = fmaf(through, A[v][s], by_decay[v][j]);
              }
#pragma unroll
              for (int which = 0; which < 2; which++) channels[S < 16 ? 0 : which].push(sum, select, t, which, s, dmap[which]);
            }
          }

          float new_du[V], new_ddt[V], new_dz[V];
#pragma unroll
          for (int v = 0; v < V; v++) {
            float through_input = owned_total(by_input[v]), through_decay = owned_total(by_decay[v]);
            new_du[v] = fmaf(delta[i][v], through_input, skip[v] * dout[v]);
            new_ddt[v] = fmaf(input[v], through_input, through_decay * LN2) * slope[i][v];
            dskip[v] = fmaf(dout[v], input[v], dskip[v]);
            dbias[v] += new_ddt[v];
            if (GATED) new_dz[v] = dgate[v] * fmaf(skip[v], input[v], owned_total(by_output[v]));
          }
          if (q < GROUP) {
            leave<In, V>(place(buffer, 0, i), new_du);
            leave<In, V>(place(buffer, 1, i), new_ddt);
            if (GATED) leave<In, V>(place(buffer, 2, i), new_dz);
          }
        }

        if (!EARLY && tile == 0 && segment > 0) kept_state(start, first + segment - SPACING);
        if (more) travelling.put(maps[buffer ^ 1]);
        copies_arrived();
        __syncthreads();
        release(sums[buffer][0], tokens, step);
        outgoing.send<In>(stages + buffer * STAGE, tokens, end - step, ADDED, sender);
      }
    }
  }

  const long long channel_row = ((long long)at.row * p.chunks + at.chunk) * p.k * p.d + at.parameters(p);
  if (at.active) {
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int s = 0; s < S; s++) {
        int state = q * S + s;
        if (EXACT || state < p.n) p.dA[(channel_row + v) * p.n + state] = dA[v][s];
      }
  }
#pragma unroll
  for (int v = 0; v < V; v++)
#pragma unroll
    for (int w = SPREAD; w < SPREAD * GROUP; w *= 2) {
      dskip[v] += from_xor(dskip[v], w);
      dbias[v] += from_xor(dbias[v], w);
    }
  if (q == 0 && at.active) {
#pragma unroll
    for (int v = 0; v < V; v++) {
      p.dD[channel_row + v] = dskip[v];
      p.dbias[channel_row + v] = dbias[v];
    }
  }
  if (p.dinitial && at.chunk == 0) write_state(g, p.dinitial, p, at);
}
