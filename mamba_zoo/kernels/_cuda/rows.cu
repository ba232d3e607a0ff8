// What the kernels that pass over rows once share: packs of any format, and weights of a format known at run time.
//
// Defined in front of this file, as a constant, by those who compile it:
//   V  neighbouring numbers per thread, read as one word

// Not through the non-coherent path, as the place may be written later.
template <typename E> DEVICE Pack<E, V> fetch(const char* at, bool real) {
  Pack<E, V> x = Pack<E, V>::zero();
  if (real) {
    if constexpr (x.BYTES == 2) {
      x.w[0] = *(const u16*)at;
    } else {
      read_words(x.w, at);
    }
  }
  return x;
}

template <typename E> DEVICE Pack<E, V> packed(const float (&x)[V]) {
  Pack<E, V> p;
#pragma unroll
  for (int i = 0; i < Pack<E, V>::WORDS; i++)
    p.w[i] = E::BYTES == 4 ? E::word(x[i], 0.0f) : E::word(x[2 * i % V], V == 1 ? 0.0f : x[(2 * i + 1) % V]);
  return p;
}

template <typename E> DEVICE void put(char* at, const Pack<E, V>& x) {
  if constexpr (Pack<E, V>::BYTES == 2) {
    store_short(at, x.w[0], true);
  } else {
    store_run(at, x.w);
  }
}

// Number `i` of a tensor, also of one whose format is 0: float32, 1: float16, 2: bfloat16.
template <typename E> DEVICE float number(const char* from, long long i) {
  return E::low(E::BYTES == 4 ? __ldg((const u32*)from + i) : load_short(from + 2 * i));
}
DEVICE float number(const char* from, long long i, int format) {
  if (format == 0) return number<Float>(from, i);
  return format == 1 ? number<Half>(from, i) : number<BFloat>(from, i);
}
