// What the hardware gives: number formats, special functions, lanes of a warp. Compiled by NVRTC without any header.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

template <bool, typename A, typename> struct Either { typedef A Type; };
template <typename A, typename B> struct Either<false, A, B> { typedef B Type; };

#define DEVICE static __device__ __forceinline__

// ---- Number formats. Memory is read in 32-bit words: `low` and `high` are the numbers in one, `word` packs them.
// How a tf32 product must take what will be rounded to this format: in two parts, rounded first, or truncated.

struct Float {
  static constexpr int BYTES = 4;
  static constexpr bool BRAIN = false, TWO_PARTS = true, ROUND = false;
  DEVICE float low(u32 x) { return __uint_as_float(x); }
  DEVICE float high(u32 x) { return 0.0f; }
  DEVICE u32 word(float x, float) { return __float_as_uint(x); }
};

struct Half {
  static constexpr int BYTES = 2;
  static constexpr bool BRAIN = false, TWO_PARTS = false, ROUND = true;
  DEVICE float up(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
  }
  DEVICE u32 down(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
  }
  DEVICE float low(u32 x) { return up(x & 0xffff); }
  DEVICE float high(u32 x) { return up(x >> 16); }
  DEVICE u32 word(float x, float y) { return down(x) | down(y) << 16; }
};

struct BFloat {
  static constexpr int BYTES = 2;
  static constexpr bool BRAIN = true, TWO_PARTS = false, ROUND = false;
  DEVICE float low(u32 x) { return __uint_as_float(x << 16); }
  DEVICE float high(u32 x) { return __uint_as_float(x & 0xffff0000); }
  DEVICE u32 word(float x, float y) {
#if __CUDA_ARCH__ >= 800
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(y), "f"(x));
    return packed;
#else
    return down(x) | down(y) << 16;
#endif
  }
  DEVICE u32 down(float x) {
    u32 b = __float_as_uint(x);
    if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  }
};

// ---- Memory: V neighbouring elements as one access.

template <typename E, int V> struct Pack {
  static constexpr int BYTES = E::BYTES * V, WORDS = (BYTES + 3) / 4;
  u32 w[WORDS];

  DEVICE Pack zero() {
    Pack p;
#pragma unroll
    for (int i = 0; i < WORDS; i++) p.w[i] = 0;
    return p;
  }

  __device__ __forceinline__ float at(int v) const {
    if (E::BYTES == 4) return E::low(w[v]);
    return v % 2 ? E::high(w[v / 2]) : E::low(w[v / 2]);
  }
};

DEVICE u32 load_short(const char* at) {  // into a whole register, so that nothing needs to clear its upper half
  u32 x;
  asm("ld.global.nc.u16 %0, [%1];" : "=r"(x) : "l"(at));
  return x;
}

// Inputs are read through the non-coherent path: the compiler may then move loads across stores.
template <typename E, int V> DEVICE Pack<E, V> load(const char* at) {
  Pack<E, V> p;
  if constexpr (p.BYTES == 2) {
    p.w[0] = load_short(at);
  } else if constexpr (p.BYTES == 4) {
    p.w[0] = __ldg((const u32*)at);
  } else if constexpr (p.BYTES == 8) {
    uint2 x = __ldg((const uint2*)at);
    p.w[0] = x.x, p.w[1] = x.y;
  } else {
    uint4 x = __ldg((const uint4*)at);
    p.w[0] = x.x, p.w[1] = x.y, p.w[2] = x.z, p.w[3] = x.w;
  }
  return p;
}

// WORDS neighbouring words in shared memory, as one access.
template <int WORDS> DEVICE void write_words(char* to, const u32 (&x)[WORDS]) {
  if constexpr (WORDS == 1) {
    *(u32*)to = x[0];
  } else if constexpr (WORDS == 2) {
    *(uint2*)to = make_uint2(x[0], x[1]);
  } else {
    *(uint4*)to = make_uint4(x[0], x[1], x[2], x[3]);
  }
}

template <int WORDS> DEVICE void read_words(u32 (&x)[WORDS], const char* from) {
  if constexpr (WORDS == 1) {
    x[0] = *(const u32*)from;
  } else if constexpr (WORDS == 2) {
    const uint2 y = *(const uint2*)from;
    x[0] = y.x, x[1] = y.y;
  } else {
    const uint4 y = *(const uint4*)from;
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
  }
}

// V elements in shared memory.
template <typename E, int V> DEVICE Pack<E, V> take(const char* from) {
  Pack<E, V> p;
  if constexpr (p.BYTES == 2) {
    p.w[0] = *(const u16*)from;
  } else {
    read_words(p.w, from);
  }
  return p;
}

template <typename E, int V> DEVICE void leave(char* to, const float (&x)[V]) {
  if constexpr (E::BYTES == 4) {
    u32 w[V];
#pragma unroll
    for (int v = 0; v < V; v++) w[v] = E::word(x[v], 0.0f);
    write_words(to, w);
  } else if constexpr (V == 1) {
    *(u16*)to = E::word(x[0], 0.0f);
  } else {
    const u32 w[1] = {E::word(x[0], x[1])};
    write_words(to, w);
  }
}

template <int BYTES> DEVICE void copy_async(char* shared, const char* from, int bytes) {
#if __CUDA_ARCH__ >= 800
  const u32 to = __cvta_generic_to_shared(shared);
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(bytes) : "memory");
  }
#endif
}

// BYTES from global to shared memory, both aligned to them, without passing through registers on the way: there after
// `copies_arrived`. Zeros if not `real`.
template <int BYTES> DEVICE void copy(char* shared, const char* from, bool real) {
  if constexpr (BYTES > 16) {
    copy<16>(shared, from, real);
    copy<BYTES - 16>(shared + 16, from + 16, real);
  } else if constexpr (BYTES == 2) {
    *(u16*)shared = real ? load_short(from) : 0;
  } else {
#if __CUDA_ARCH__ >= 800
    copy_async<BYTES>(shared, from, real ? BYTES : 0);
#else
    Pack<Float, BYTES / 4> x = Pack<Float, BYTES / 4>::zero();
    if (real) x = load<Float, BYTES / 4>(from);
    write_words(shared, x.w);
#endif
  }
}

DEVICE void copies_arrived() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Stores under a predicate: as a branch, each would cost three instructions more.
DEVICE void store_short(char* at, u32 x, int when) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.u16 [%0], %1;}" ::"l"(at), "r"(x), "r"(when) : "memory");
}
DEVICE void store_word(char* at, u32 x, int when) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.u32 [%0], %1;}" ::"l"(at), "r"(x), "r"(when) : "memory");
}
DEVICE void store_run(char* at, const u32 (&x)[1]) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(at), "r"(x[0]) : "memory");
}
DEVICE void store_run(char* at, const u32 (&x)[2]) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(x[0]), "r"(x[1]) : "memory");
}
DEVICE void store_run(char* at, const u32 (&x)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
DEVICE void store_words(char* at, u32 x, u32 y, int when) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %3, 0; @p st.global.v2.u32 [%0], {%1, %2};}" ::"l"(at), "r"(x), "r"(y),
               "r"(when)
               : "memory");
}

// Without a result, and known to be global: a tenth of what `atomicAdd` on a pointer of unknown kind becomes.
DEVICE void add_word(char* at, float x, int when) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p red.global.add.f32 [%0], %1;}" ::"l"(at), "f"(x), "r"(when) : "memory");
}
template <int W> DEVICE void add_words(char* at, const float (&x)[W], int when) {
#if __CUDA_ARCH__ >= 900
  if constexpr (W == 4) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p red.global.add.v4.f32 [%0], {%1, %2, %3, %4};}" ::"l"(at),
                 "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(when)
                 : "memory");
    return;
  }
#endif
#pragma unroll
  for (int i = 0; i < W; i++) add_word(at + 4 * i, x[i], when);
}

template <typename E, int V> DEVICE void store(char* at, const float (&x)[V], bool when = true) {
  if constexpr (E::BYTES * V == 2) {
    store_short(at, E::word(x[0], 0.0f), when);
  } else if constexpr (E::BYTES * V == 4) {
    store_word(at, E::word(x[0], x[V - 1]), when);
  } else if constexpr (E::BYTES == 4) {
    store_words(at, E::word(x[0], 0.0f), E::word(x[1], 0.0f), when);
    if constexpr (V == 4) store_words(at + 8, E::word(x[2], 0.0f), E::word(x[3], 0.0f), when);
  } else {
    store_words(at, E::word(x[0], x[1]), E::word(x[2], x[3]), when);
  }
}

#if __CUDA_ARCH__ >= 900
template <typename E> DEVICE void add_numbers(char* at, const u32 (&x)[1]) {
  if constexpr (E::BYTES == 4) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(at), "f"(__uint_as_float(x[0])) : "memory");
  } else if constexpr (E::BRAIN) {
    asm volatile("red.global.add.noftz.bf16x2 [%0], %1;" ::"l"(at), "r"(x[0]) : "memory");
  } else {
    asm volatile("red.global.add.noftz.f16x2 [%0], %1;" ::"l"(at), "r"(x[0]) : "memory");
  }
}
template <typename E> DEVICE void add_numbers(char* at, const u32 (&x)[2]) {
  if constexpr (E::BYTES == 4) {
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(__uint_as_float(x[0])), "f"(__uint_as_float(x[1]))
                 : "memory");
  } else if constexpr (E::BRAIN) {
    asm volatile("red.global.add.noftz.v2.bf16x2 [%0], {%1, %2};" ::"l"(at), "r"(x[0]), "r"(x[1]) : "memory");
  } else {
    asm volatile("red.global.add.noftz.v2.f16x2 [%0], {%1, %2};" ::"l"(at), "r"(x[0]), "r"(x[1]) : "memory");
  }
}
template <typename E> DEVICE void add_numbers(char* at, const u32 (&x)[4]) {
  if constexpr (E::BYTES == 4) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(__uint_as_float(x[0])),
                 "f"(__uint_as_float(x[1])), "f"(__uint_as_float(x[2])), "f"(__uint_as_float(x[3]))
                 : "memory");
  } else if constexpr (E::BRAIN) {
    asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]),
                 "r"(x[3])
                 : "memory");
  } else {
    asm volatile("red.global.add.noftz.v4.f16x2 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]),
                 "r"(x[3])
                 : "memory");
  }
}
#endif

// BYTES of numbers in format E stored, or added to what is there (sm_90).
template <int BYTES> DEVICE void store_chunk(char* at, const char* shared) {
  if constexpr (BYTES == 2) {
    store_short(at, *(const u16*)shared, true);
  } else if constexpr (BYTES > 16) {
    store_chunk<16>(at, shared);
    store_chunk<BYTES - 16>(at + 16, shared + 16);
  } else {
    store_run(at, take<Float, BYTES / 4>(shared).w);
  }
}

template <typename E, int BYTES> DEVICE void add_chunk(char* at, const char* shared) {
#if __CUDA_ARCH__ >= 900
  if constexpr (BYTES > 16) {
    add_chunk<E, 16>(at, shared);
    add_chunk<E, BYTES - 16>(at + 16, shared + 16);
  } else if constexpr (BYTES == 2) {
    const u16 x = *(const u16*)shared;
    if constexpr (E::BRAIN) {
      asm volatile("red.global.add.noftz.bf16 [%0], %1;" ::"l"(at), "h"(x) : "memory");
    } else {
      asm volatile("red.global.add.noftz.f16 [%0], %1;" ::"l"(at), "h"(x) : "memory");
    }
  } else {
    u32 x[BYTES / 4];
    read_words(x, shared);
    add_numbers<E>(at, x);
  }
#endif
}

// ---- Special functions.

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// log(1 + e) / e for 0 <= e <= 1. A polynomial where a logarithm would lose the small steps: 1 + e rounds e away. It also
// leaves the special-function unit, the bottleneck, to the decays. Relative error 3e-8, or 1.3e-6 for 16-bit inputs.
template <bool SHORT> DEVICE float log1p_over(float e) {
  if (SHORT) {
    float p = 0.01414102f;
    p = fmaf(p, e, -0.0664018f);
    p = fmaf(p, e, 0.14922389f);
    p = fmaf(p, e, -0.23503862f);
    p = fmaf(p, e, 0.3310945f);
    p = fmaf(p, e, -0.49986966f);
    return fmaf(p, e, 0.99999873f);
  }
  float p = 0.005232690833508968f;
  p = fmaf(p, e, -0.029505228623747826f);
  p = fmaf(p, e, 0.07822594791650772f);
  p = fmaf(p, e, -0.13663245737552643f);
  p = fmaf(p, e, 0.19106008112430573f);
  p = fmaf(p, e, -0.2484298199415207f);
  p = fmaf(p, e, 0.3331909775733948f);
  p = fmaf(p, e, -0.4999949336051941f);
  return fmaf(p, e, 0.9999999403953552f);
}

// softplus(x), and in `e` exp(-|x|), of which its slope is made.
template <bool SHORT> DEVICE float softplus(float x, float& e) {
  e = exp2_fast(-fabsf(x) * LOG2E);
  return fmaf(e, log1p_over<SHORT>(e), fmaxf(x, 0.0f));
}

DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-x * LOG2E)); }

// ---- Lanes.

DEVICE float from_lane(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE float from_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// D += A * B on the tensor cores, A 16 x 8, B 8 x 8, in tf32: float32 with the last 13 bits of A and B ignored.
DEVICE void multiply_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}
