/* Panels of quantised weights, for native.c: what lies in them, products of few rows with them, and unpacking for many.

   A panel is cut along its inputs into groups of 32. A group holds a scale for each of its NR columns, in bfloat16 (of
   int4 a minimum as well), and then a code for each weight, input by input: a weight is scale * code, or
   scale * code + minimum. Both have so few bits that the product is exact in float32: a weight is the same number
   however it is computed, and so are sums over it, whether it was unpacked before or on the way. `panels.py` packs
   them and says what they stand for. */

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define WEIGHTS_GROUP 32
#define UNPACKED_BYTES (256 << 10) /* panels that stay in the second cache, unpacked, while rows pass by */

enum { FLOAT32, INT8, INT4 };

#if defined(__AVX512F__) /* GCC takes such short vectors apart */
static inline vi int8s(const unsigned char *p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)); }
static inline vi uint8s(const unsigned char *p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)); }
static inline vi uint16s(const unsigned char *p) {
  return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
}
#elif defined(__AVX2__)
static inline vi int8s(const unsigned char *p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)); }
static inline vi uint8s(const unsigned char *p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)); }
static inline vi uint16s(const unsigned char *p) { return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)); }
#else
#define WIDENED(name, type) \
  static inline vi name(const unsigned char *p) { \
    type v __attribute__((vector_size(VW * sizeof(type)))); \
    memcpy(&v, p, sizeof v); \
    return __builtin_convertvector(v, vi); \
  }
WIDENED(int8s, signed char)
WIDENED(uint8s, unsigned char)
WIDENED(uint16s, unsigned short)
#endif

static inline long codes_at(long kind) { return kind == INT8 ? 2 * NR : 4 * NR; } /* bytes of scales and minima */
static inline long input_bytes(long kind) { return kind == INT8 ? NR : NR / 2; }
static inline long group_bytes(long kind) { return codes_at(kind) + WEIGHTS_GROUP * input_bytes(kind); }

static inline const unsigned char *quantised_panel(const void *panels, long kind, long k, long panel) {
  return (const unsigned char *)panels + panel * ((k + WEIGHTS_GROUP - 1) / WEIGHTS_GROUP) * group_bytes(kind);
}

static inline vf bfloats(const unsigned char *p) { return (vf)(uint16s(p) << 16); }

static inline float bfloat(const unsigned char *p) {
  unsigned short high;
  memcpy(&high, p, sizeof high);
  const uint32_t bits = (uint32_t)high << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

typedef struct {
  vf scale[2], least[2];
} Group;

static inline INLINE Group group_of(const int kind, const unsigned char *group) {
  Group g = {{bfloats(group), bfloats(group + 2 * VW)}, {{0}, {0}}};
  if (kind == INT4) g.least[0] = bfloats(group + 4 * VW), g.least[1] = bfloats(group + 6 * VW);
  return g;
}

static inline INLINE void weights_of(const int kind, const Group *g, const unsigned char *codes, vf *w0, vf *w1) {
  if (kind == INT8) {
    *w0 = __builtin_convertvector(int8s(codes), vf) * g->scale[0];
    *w1 = __builtin_convertvector(int8s(codes + VW), vf) * g->scale[1];
  } else { /* a byte holds a column's code and, above it, that of the column a vector further on */
    const vi pair = uint8s(codes);
    *w0 = __builtin_convertvector(pair & 15, vf) * g->scale[0] + g->least[0];
    *w1 = __builtin_convertvector(pair >> 4, vf) * g->scale[1] + g->least[1];
  }
}

static inline INLINE void quantised_tile(const int kind, const int m, long k, const float *x, const unsigned char *w,
                                         float *out) { /* `tile` with weights as they lie: out [m, NR], x [k, m] */
  vf a[MR], b[MR];
#pragma GCC unroll 12
  for (int r = 0; r < m; r++) a[r] = b[r] = (vf){0};
  for (long i = 0; i < k; i += WEIGHTS_GROUP, w += group_bytes(kind)) {
    const Group g = group_of(kind, w);
    const unsigned char *codes = w + codes_at(kind);
    const long n = k - i < WEIGHTS_GROUP ? k - i : WEIGHTS_GROUP;
    for (long j = 0; j < n; j++, codes += input_bytes(kind), x += m) {
      vf w0, w1;
      weights_of(kind, &g, codes, &w0, &w1);
#pragma GCC unroll 12
      for (int r = 0; r < m; r++) {
        a[r] += w0 * x[r];
        b[r] += w1 * x[r];
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < m; r++) {
    store(out + r * NR, a[r]);
    store(out + r * NR + VW, b[r]);
  }
}

static void run_quantised_tile(long kind, int m, long k, const float *x, const unsigned char *w, float *out) {
  switch (2 * m + (kind == INT4)) {
#define CASE(n) \
  case 2 * n: quantised_tile(INT8, n, k, x, w, out); break; \
  case 2 * n + 1: quantised_tile(INT4, n, k, x, w, out); break;
    CASE(1) CASE(2) CASE(3) CASE(4)
#if MR > 4
    CASE(5) CASE(6)
#endif
#if MR > 6
    CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
  }
}

static inline INLINE void unpack_kind(const int kind, long from, long to, const unsigned char *panel, float *out) {
  for (long i = from; i < to;) {
    const unsigned char *group = panel + i / WEIGHTS_GROUP * group_bytes(kind);
    const unsigned char *codes = group + codes_at(kind) + i % WEIGHTS_GROUP * input_bytes(kind);
    const Group g = group_of(kind, group);
    const long end = (i / WEIGHTS_GROUP + 1) * WEIGHTS_GROUP;
    for (; i < end && i < to; i++, codes += input_bytes(kind), out += NR) {
      vf w0, w1;
      weights_of(kind, &g, codes, &w0, &w1);
      store(out, w0), store(out + VW, w1);
    }
  }
}

static void unpack(long kind, long from, long to, const unsigned char *panel, float *out) {
  /* inputs [from, to) of a panel, as float32: out [to - from, NR] */
  if (kind == INT8) unpack_kind(INT8, from, to, panel, out);
  else unpack_kind(INT4, from, to, panel, out);
}

static void unpack_column(long kind, long k, const unsigned char *panel, long column, float *out) { /* out: [k] */
  const long at = kind == INT8 ? column : column % VW, shift = column < VW ? 0 : 4;
  for (long i = 0; i < k; i++) {
    const unsigned char *group = panel + i / WEIGHTS_GROUP * group_bytes(kind);
    const unsigned char code = group[codes_at(kind) + i % WEIGHTS_GROUP * input_bytes(kind) + at];
    const float scale = bfloat(group + 2 * column);
    if (kind == INT8) out[i] = scale * (signed char)code;
    else out[i] = scale * (code >> shift & 15) + bfloat(group + 2 * NR + 2 * column);
  }
}
