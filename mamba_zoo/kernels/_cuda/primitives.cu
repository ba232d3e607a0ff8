// What the hardware gives: number formats, special functions, lanes of a warp. Compiled by NVRTC without any header.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

template <bool, typename A, typename> struct Either { typedef A Type; };
template <typename A, typename B> struct Either<false, A, B> { typedef B Type; };

#define DEVICE static __device__ __forceinline__

// ---- Number formats: `Bits` is what memory holds, `up` and `down` convert to float and back. How a tf32 product must
// take what will be rounded to this format: in two parts, rounded first, or (the default) truncated.

struct Float {
  typedef float Bits;
  static constexpr bool TWO_PARTS = true, ROUND = false;
  DEVICE float up(Bits x) { return x; }
  DEVICE Bits down(float x) { return x; }
};

struct Half {
  typedef u16 Bits;
  static constexpr bool TWO_PARTS = false, ROUND = true;
  DEVICE float up(Bits x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
  }
  DEVICE Bits down(float x) {
    Bits y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
  }
};

struct BFloat {
  typedef u16 Bits;
  static constexpr bool TWO_PARTS = false, ROUND = false;
  DEVICE float up(Bits x) { return __uint_as_float((u32)x << 16); }
  DEVICE Bits down(float x) {
#if __CUDA_ARCH__ >= 800
    Bits y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#else
    u32 b = __float_as_uint(x);
    if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
#endif
  }
};

// ---- Memory: V neighbouring elements as one access.

template <int BYTES> struct Word;
template <> struct Word<2> { typedef u16 Type; };
template <> struct Word<4> { typedef u32 Type; };
template <> struct Word<8> { typedef uint2 Type; };
template <> struct Word<16> { typedef uint4 Type; };

template <typename E, int V> union Pack {
  typedef typename Word<sizeof(typename E::Bits) * V>::Type Whole;
  Whole whole;
  typename E::Bits x[V];
  DEVICE Pack zero() {
    Pack p;
#pragma unroll
    for (int v = 0; v < V; v++) p.x[v] = 0;
    return p;
  }
};

// Inputs are read through the non-coherent path: the compiler may then move loads across stores.
template <typename E, int V> DEVICE Pack<E, V> load(const char* at) {
  Pack<E, V> p;
  p.whole = __ldg((const typename Pack<E, V>::Whole*)at);
  return p;
}

template <typename E, int V> DEVICE void store(char* at, const float (&x)[V]) {
  Pack<E, V> p;
#pragma unroll
  for (int v = 0; v < V; v++) p.x[v] = E::down(x[v]);
  *(typename Pack<E, V>::Whole*)at = p.whole;
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

// log(1 + e) / e for 0 <= e <= 1. A polynomial (relative error 3e-8) where a logarithm would lose the small steps:
// 1 + e rounds e away. It also leaves the special-function unit, the bottleneck, to the decays.
DEVICE float log1p_over(float e) {
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
DEVICE float softplus(float x, float& e) {
  e = exp2_fast(-fabsf(x) * LOG2E);
  return fmaf(e, log1p_over(e), fmaxf(x, 0.0f));
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
