/* The decode step and the projections of a prefill for Llama-like models on a CPU. Computes in float32; weights are
   float32 or quantised (quantised.h).

   Weights lie in panels: two vectors of VW output columns, input by input, so that a product streams them once, in
   order, whatever the number of rows. Every output is one sum over the inputs in their order: a row's numbers do not
   depend on its neighbours, and prefill and decode agree. `native.py` packs the weights and is the only caller;
   the slow reference is the model itself (tests/test_engine_native.py).

   Sites are the seven projections. Each takes a scale and a shift per slot (PEDRO, (IA)3, RED, bias) and a low-rank
   term per slot (LoRA): y = scale * (W x + b) + shift + B (A x). */

#include "thread_pool.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__AVX512F__)
#define VW 16
#define MR 12
#define GROUP 4 /* heads that attend together: at most; times four sums each, they want registers */
#elif defined(__AVX2__)
#define VW 8
#define MR 6
#define GROUP 3
#else
#define VW 8
#define MR 4
#define GROUP 2
#endif
#define INLINE __attribute__((always_inline))
#define NR (2 * VW)
#define AHEAD (32 * NR) /* floats: weights come from memory faster when asked for across page borders */
#define FEW 48
#define GROUP_BYTES (768 << 10) /* panels that stay in the second-level cache while the rows pass by */

typedef float vf __attribute__((vector_size(VW * 4)));
typedef float vfu __attribute__((vector_size(VW * 4), aligned(4)));
typedef int vi __attribute__((vector_size(VW * 4)));
typedef float f4 __attribute__((vector_size(16)));
typedef float f4u __attribute__((vector_size(16), aligned(4)));

enum { Q, K, V, O, GATE, UP, DOWN, SITES };
enum { SILU, GELU_TANH };
enum { RATIONAL, GELU, RELU };
enum { LAST, MEAN, MAX };

typedef struct {
  const float *norm1, *norm2, *q_norm, *k_norm;   /* q_norm, k_norm: [d] or null */
  const void *qkv, *o, *gate_up, *down;           /* panels; gate_up: VW columns of gate beside VW of up */
  const float *bias[SITES];                       /* of the projection, padded to VW, or null */
  const float *scale[SITES], *shift[SITES];       /* [slots, padded width], or null where no slot has any */
  float *keys, *values;                           /* [slots, kv_heads, length, head_dim] */
  const float *kept_keys, *kept_values;           /* [kv_heads, kept, head_dim], null where nothing is kept */
  long window;                                    /* positions that a token sees; 0: all */
} Layer;

typedef struct {                                  /* positions that follow one another among the kept */
  long start, count;
} Span;

typedef struct {                                  /* what a slot reads of the kept: its first `count` positions; its */
  long count, spans;                              /* own come after them, from the slot's beginning on */
  const Span *span;
} Borrowed;

typedef struct {
  long layers, dim, heads, kv_heads, head_dim, rotary, ffn, vocab, length, slots, threads, activation;
  long weights, head_weights;                     /* of the layers; of head and embed: FLOAT32, INT8 or INT4 */
  float eps, scaling, embed_scale, pad;
  const void *embed;                              /* null: read from the head's panels. [vocab, dim] or, quantised, */
                                                  /* panels like those */
  const float *final_norm;
  const void *head;
  const float *cos, *sin;                         /* [length, rotary] */
  Layer *layer;
  long kept;                                      /* positions of all kept blocks */
  const Borrowed *borrowed;                       /* [slots], or null where nothing is kept */
  const float *const *lora;                       /* [layers, SITES, slots, 2]: A [in, rank], B [rank, padded out] */
  const int *ranks;                               /* [layers, SITES, slots], padded to VW; 0: none */
  long max_rank;
  double spent, lost;                             /* seconds of the last call; lost: to threads that did not run */
} Model;

typedef struct {                                  /* one layer of a PEDRO or PARA adapter: R(pooled down) up + bias */
  const float *down, *up, *bias, *a, *b;          /* [dim, rank], [rank, width], [width]; a, b: of the rational */
  long rank, width, above, below;                 /* above, below: how many a and b */
  long activation, pool, residual, window, sites, site[SITES]; /* window: pool the last `window` tokens; 0: all */
} Generator;

typedef struct {
  long rows, lora, shared;                        /* lora: whether any row has a low-rank term; shared: whether rows */
                                                  /* of a decode step share a slot, at positions of their own */
  const int *ids, *positions, *slots, *mods;      /* [rows]; mods: the slot whose scales apply, -1 for none */
  float *x, *qkv, *mixed, *act, *low;             /* [rows, …]: dim, qkv, heads * d, padded ffn, 3 * max_rank */
  float *packed;                                  /* rows times the widest input, scratch; for many rows only */
  long prompts;                                   /* of a prefill; starts: [prompts + 1], in rows */
  const int *starts, *conditioned;                /* conditioned: tokens of the prompt that its vectors may see */
  const Generator *const *generators;             /* [prompts]: one a layer, or null */
  long asked;                                     /* how many rows' outputs of a layer are asked for; -1: all */
  const int *asked_rows;                          /* these, ascending; the outputs of all others may be anything */
  float *logits;                                  /* [rows, vocab] */
  int *best;                                      /* [rows]: the likeliest token, -1 where logits are not finite */
  float *best_value;                              /* [threads, rows], scratch; best_at likewise */
  int *best_at;
} Batch;

typedef struct {                                  /* keys and values on their way from a slot to kept blocks */
  float *const *to;                               /* the tensors; then, in floats, where the first head begins and */
  const float *const *from;                       /* how far apart heads are */
  long to_at, to_stride, from_at, from_stride;
  long heads, count, fresh;                       /* count: floats of each head; fresh: nothing was there before */
} Copy;

long pedro_simd_width(void) { return VW; }

static inline long padded(long n) { return (n + VW - 1) / VW * VW; }
static inline vf load(const float *p) { return *(const vfu *)p; }
static inline void store(float *p, vf v) { *(vfu *)p = v; }
static inline void store4(float *p, f4 v) { *(f4u *)p = v; }
static inline vf all(float s) { return s - (vf){0}; }
static inline vf pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
#if defined(__AVX512F__)
static inline vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); } /* b where one is no number */
static inline vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
static inline vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
static inline vf vmax(vf a, vf b) { return pick(a > b, a, b); }
static inline vf vmin(vf a, vf b) { return pick(a < b, a, b); }
#endif

static inline float sum(vf v) {
  float s[VW];
  memcpy(s, &v, sizeof s);
  for (int w = VW / 2; w; w /= 2)
    for (int i = 0; i < w; i++) s[i] += s[i + w];
  return s[0];
}

static inline f4 folded(vf v) { /* [4]: the sums of every fourth */
  f4 part[VW / 4];
  memcpy(part, &v, sizeof v);
  for (int w = VW / 8; w; w /= 2)
    for (int i = 0; i < w; i++) part[i] += part[i + w];
  return part[0];
}

static inline f4 sum4(const vf *v) { /* `sum` of four vectors, each in the same order */
  const f4 a = folded(v[0]), b = folded(v[1]), c = folded(v[2]), d = folded(v[3]);
  return ((f4){a[0], b[0], c[0], d[0]} + (f4){a[2], b[2], c[2], d[2]}) +
         ((f4){a[1], b[1], c[1], d[1]} + (f4){a[3], b[3], c[3], d[3]});
}

static inline vf vexp(vf x) { /* Cephes' expf: relative error below 2e-7 */
  x = vmin(all(88.0f), vmax(all(-87.0f), x));
  vf n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = ((((r * 1.9875691500e-4f + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
          1.6666665459e-1f) * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vi bits = (__builtin_convertvector(n, vi) + 127) << 23;
  return p * (vf)bits;
}

static inline vf activate(long kind, vf x) {
  if (kind == SILU) return x / (1.0f + vexp(-x));
  vf y = 0.7978845608f * (x + 0.044715f * x * x * x);
  return x * (1.0f - 1.0f / (vexp(2.0f * y) + 1.0f));
}

typedef struct {
  float *memory;
  size_t size;
} Room;

static float *roomy(Room *room, size_t floats) {
  if (floats > room->size) {
    free(room->memory);
    room->size = floats + floats / 2;
    room->memory = aligned_alloc(64, (room->size * sizeof(float) + 63) / 64 * 64);
    if (!room->memory) abort();
  }
  return room->memory;
}

static float *scratch(size_t floats) { /* a thread's own, kept from call to call */
  static __thread Room room;
  return roomy(&room, floats);
}

static inline float rms(const float *x, long n, float eps) {
  vf s = {0};
  float rest = 0;
  long i = 0;
  for (; i + VW <= n; i += VW) s += load(x + i) * load(x + i);
  for (; i < n; i++) rest += x[i] * x[i];
  return 1.0f / sqrtf((sum(s) + rest) / n + eps);
}

/* ---- products ---- */

typedef struct {            /* one product: rows [m, k] (normed on the way where norm is given) times panels */
  const float *x;
  long ldx, k;
  const float *norm;
  const void *panels;
  enum { STORE, ADD, GATED, HEAD } mode;
  int first, count;         /* its sites, in the order of their columns */
  long width[3];            /* of the sites, unpadded */
  float *out;
  long ldo;
  long weights;             /* what the panels hold: `project` says it */
} Product;

static inline INLINE void tile(const int m, const int ahead, const int more, long k, const float *x, long ldx,
                               const float *w, long ldw, float *out, long ldo) {
  /* out [m, NR] = x' w, with x [k, m] and w [k, NR]; ahead: w comes from memory, and is one piece with what follows;
     more: the sums go on from what is in `out` */
  vf a[MR], b[MR];
#pragma GCC unroll 12
  for (int r = 0; r < m; r++) a[r] = b[r] = (vf){0};
  if (more) {
#pragma GCC unroll 12
    for (int r = 0; r < m; r++) a[r] = load(out + r * ldo), b[r] = load(out + r * ldo + VW);
  }
  for (long i = 0; i < k; i++, w += ldw, x += ldx) {
    vf w0 = load(w), w1 = load(w + VW);
    if (ahead) __builtin_prefetch(w + AHEAD), __builtin_prefetch(w + AHEAD + VW);
#pragma GCC unroll 12
    for (int r = 0; r < m; r++) {
      a[r] += w0 * x[r];
      b[r] += w1 * x[r];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < m; r++) {
    store(out + r * ldo, a[r]);
    store(out + r * ldo + VW, b[r]);
  }
}

#if MR > 6
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#elif MR > 4
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#else
#define CASES CASE(1) CASE(2) CASE(3) CASE(4)
#endif

static void run_tile(int m, long k, const float *x, long ldx, const float *w, long ldw, float *out, long ldo) {
  switch (m) {
#define CASE(n) case n: tile(n, 1, 0, k, x, ldx, w, ldw, out, ldo); break;
    CASES
#undef CASE
  }
}

/* For attention: what follows its operands may be no memory yet, and to ask for such an address costs a walk through
   the page tables each time; on one processor that took four times as long as the products themselves. */
static void run_near_tile(int m, int more, long k, const float *x, long ldx, const float *w, long ldw, float *out) {
  switch (m) {
#define CASE(n) case n: tile(n, 0, more, k, x, ldx, w, ldw, out, NR); break;
    CASES
#undef CASE
  }
}

#include "quantised.h"

static inline int rows_of(const Batch *B, long b, long block) { /* of block b; the last may be short or empty */
  const long left = B->rows - b * block;
  return left < 0 ? 0 : left < block ? left : block;
}

static inline f4 some_of(const float *x, float scale, const float *norm, long i) {
  const f4 v = *(const f4u *)(x + i) * scale;
  return norm ? v * *(const f4u *)(norm + i) : v;
}

static void turn(const float *const *x, const float *scale, const float *norm, int m, long k, float *out, long ldo) {
  /* m rows of k side by side, each times its scale (and norm): out [k, m of ldo]. Four by four; where m is no multiple
     the last four rows are some that were there before */
  const long fours = m < 4 ? 0 : k / 4 * 4;
  for (long i = 0; i < fours; i += 4)
    for (int from = 0; from < m; from += 4) {
      const int r = from < m - 4 ? from : m - 4;
      float *to = out + i * ldo + r;
      const f4 a = some_of(x[r], scale[r], norm, i), b = some_of(x[r + 1], scale[r + 1], norm, i);
      const f4 c = some_of(x[r + 2], scale[r + 2], norm, i), d = some_of(x[r + 3], scale[r + 3], norm, i);
      const f4 ab = {a[0], b[0], a[1], b[1]}, cd = {c[0], d[0], c[1], d[1]};
      const f4 AB = {a[2], b[2], a[3], b[3]}, CD = {c[2], d[2], c[3], d[3]};
      store4(to, (f4){ab[0], ab[1], cd[0], cd[1]});
      store4(to + ldo, (f4){ab[2], ab[3], cd[2], cd[3]});
      store4(to + 2 * ldo, (f4){AB[0], AB[1], CD[0], CD[1]});
      store4(to + 3 * ldo, (f4){AB[2], AB[3], CD[2], CD[3]});
    }
  for (long i = fours; i < k; i++)
    for (int r = 0; r < m; r++) {
      const float v = x[r][i] * scale[r];
      out[i * ldo + r] = norm ? v * norm[i] : v;
    }
}

static void pack(const Product *p, long row, int m, float eps, float *packed) { /* rows side by side: [k, m] */
  const float *x[MR];
  float scale[MR];
  for (int r = 0; r < m; r++) x[r] = p->x + (row + r) * p->ldx, scale[r] = p->norm ? rms(x[r], p->k, eps) : 1;
  turn(x, scale, p->norm, m, p->k, packed, m);
}

typedef struct {            /* what is done to VW columns of one site */
  const float *bias, *scale, *shift, *const *lora;
  const int *rank;
  long width, col, low;     /* low: where the site's low-rank terms stand in a row of B->low */
} Columns;

static inline Columns columns_of(const Model *M, const Batch *B, long l, const Product *p, int at, long col) {
  const Layer *L = M->layer + l;
  const int site = p->first + at;
  const long entry = (l * SITES + site) * M->slots;
  return (Columns){L->bias[site] ? L->bias[site] + col : 0, L->scale[site] ? L->scale[site] + col : 0,
                 L->shift[site] ? L->shift[site] + col : 0, B->lora ? M->lora + 2 * entry : 0, M->ranks + entry,
                 padded(p->width[at]), col, at * M->max_rank};
}

static inline vf modulated(const Model *M, const Batch *B, const Columns *s, long row, vf y) {
  if (s->bias) y += load(s->bias);
  const long slot = B->mods[row];
  if (slot < 0) return y;
  if (s->scale) y *= load(s->scale + slot * s->width);
  if (s->shift) y += load(s->shift + slot * s->width);
  if (s->lora) {
    const float *up = s->lora[2 * slot + 1] + s->col, *low = B->low + row * 3 * M->max_rank + s->low;
    for (int r = 0; r < s->rank[slot]; r++) y += low[r] * load(up + r * s->width);
  }
  return y;
}

static void finish(const Model *M, const Batch *B, long l, const Product *p, long panel, long row, int m, float *y) {
  if (p->mode == GATED) {
    const Columns gate = columns_of(M, B, l, p, 0, panel * VW), up = columns_of(M, B, l, p, 1, panel * VW);
    float *out = p->out + row * p->ldo + panel * VW;
    for (int r = 0; r < m; r++, y += NR, out += p->ldo) {
      vf g = modulated(M, B, &gate, row + r, load(y)), u = modulated(M, B, &up, row + r, load(y + VW));
      store(out, activate(M->activation, g) * u);
    }
    return;
  }
  for (int half = 0; half < 2; half++, y += VW) {
    long col = (2 * panel + half) * VW, at = 0;
    float *out = p->out + row * p->ldo + col;
    while (at < p->count && col >= padded(p->width[at])) col -= padded(p->width[at++]);
    if (at == p->count) return; /* the last panel's second half may be empty */
    const Columns s = columns_of(M, B, l, p, at, col);
    for (int r = 0; r < m; r++, out += p->ldo) {
      vf v = modulated(M, B, &s, row + r, load(y + r * NR));
      store(out, p->mode == ADD ? v + load(out) : v);
    }
  }
}

static void finish_head(const Model *M, const Batch *B, long panel, long row, int m, const float *y, int thread) {
  const long col = panel * NR, left = M->vocab - col;
  for (int r = 0; r < m; r++, y += NR) {
    memcpy(B->logits + (row + r) * M->vocab + col, y, sizeof(float) * (left < NR ? left : NR));
    float *best = B->best_value + thread * B->rows + row + r;
    int *at = B->best_at + thread * B->rows + row + r;
    if (left < NR) {
      for (long c = 0; c < left; c++) {
        if (!(y[c] - y[c] == 0)) *at = -2;
        if (*at != -2 && y[c] > *best) *best = y[c], *at = col + c;
      }
      continue;
    }
    vf high = vmax(load(y), load(y + VW)), nothing = (load(y) + load(y + VW)) * 0.0f;
    vi more = high > all(*best);
    int any = 0, bad = 0;
    for (int i = 0; i < VW; i++) any |= more[i], bad |= !(nothing[i] == 0);
    if (bad) *at = -2;
    if (any && *at != -2)
      for (int c = 0; c < NR; c++)
        if (y[c] > *best) *best = y[c], *at = col + c;
  }
}

typedef struct {            /* a product, cut into tiles of some panels and blocks of rows each */
  const Model *M;
  const Batch *B;
  const Product *p;
  long l, panels, spans, block, blocks, chunks; /* a block: rows that run_tile takes; tiles: spans * chunks */
  uint64_t number;          /* of this product among all */
} Multiplication;

static void pack_block(const void *what, long b, int thread) {
  const Multiplication *u = what;
  (void)thread;
  pack(u->p, b * u->block, rows_of(u->B, b, u->block), u->M->eps, u->B->packed + b * u->block * u->p->k);
}

static const float *packed_rows(const Multiplication *u, float **y) { /* of all blocks; y: room for a tile's outputs */
  static __thread uint64_t packed; /* the product whose few rows this thread has packed for itself */
  const Batch *B = u->B;
  const long k = u->p->k;
  *y = scratch(MR * NR + (B->rows <= FEW ? B->rows * k : 0));
  if (B->rows > FEW) return B->packed;
  float *own = *y + MR * NR;
  if (packed != u->number)
    for (long b = 0, row = 0; b < u->blocks; b++, row += u->block)
      pack(u->p, row, rows_of(B, b, u->block), u->M->eps, own + row * k);
  packed = u->number;
  return own;
}

static void multiply_tile(const void *what, long index, int thread) {
  const Multiplication *u = what;
  const Product *p = u->p;
  const long span = index / u->chunks, chunk = index % u->chunks;
  float *y;
  const float *packed = packed_rows(u, &y);
  for (long b = u->blocks * chunk / u->chunks; b < u->blocks * (chunk + 1) / u->chunks; b++) {
    const long row = b * u->block;
    const int m = rows_of(u->B, b, u->block);
    for (long panel = u->panels * span / u->spans; m > 0 && panel < u->panels * (span + 1) / u->spans; panel++) {
      run_tile(m, p->k, packed + row * p->k, m, (const float *)p->panels + panel * p->k * NR, NR, y, NR);
      if (p->mode == HEAD) finish_head(u->M, u->B, panel, row, m, y, thread);
      else finish(u->M, u->B, u->l, p, panel, row, m, y);
    }
  }
}

static void multiply_quantised(const void *what, long index, int thread) {
  /* `multiply_tile` with quantised panels: one block of rows takes them as they lie; for several, as many panels as the
     second cache holds are unpacked before the rows pass by. */
  static __thread Room room;
  const Multiplication *u = what;
  const Product *p = u->p;
  const long k = p->k, span = index / u->chunks, chunk = index % u->chunks;
  const long from = u->blocks * chunk / u->chunks, to = u->blocks * (chunk + 1) / u->chunks;
  const long last = u->panels * (span + 1) / u->spans, fit = UNPACKED_BYTES / sizeof(float) / (k * NR);
  const long step = to - from < 2 || fit < 1 ? 1 : fit;
  float *y, *plain = roomy(&room, step * k * NR);
  const float *packed = packed_rows(u, &y);
  for (long first = u->panels * span / u->spans; first < last; first += step) {
    const long stop = first + step < last ? first + step : last;
    for (long panel = first; to - from > 1 && panel < stop; panel++)
      unpack(p->weights, 0, k, quantised_panel(p->panels, p->weights, k, panel), plain + (panel - first) * k * NR);
    for (long b = from; b < to; b++) {
      const long row = b * u->block;
      const int m = rows_of(u->B, b, u->block);
      for (long panel = first; m > 0 && panel < stop; panel++) {
        const float *x = packed + row * k;
        if (to - from > 1) run_tile(m, k, x, m, plain + (panel - first) * k * NR, NR, y, NR);
        else run_quantised_tile(p->weights, m, k, x, quantised_panel(p->panels, p->weights, k, panel), y);
        if (p->mode == HEAD) finish_head(u->M, u->B, panel, row, m, y, thread);
        else finish(u->M, u->B, u->l, p, panel, row, m, y);
      }
    }
  }
}

static void multiply(const Model *M, const Batch *B, long l, const Product *p, long panels) {
  static _Atomic uint64_t products;
  const long floats = p->k * NR, group = GROUP_BYTES / sizeof(float) / floats;
  const long blocks = (B->rows + MR - 1) / MR;
  Multiplication u = {M, B, p, l, panels, 1, (B->rows + blocks - 1) / blocks, blocks, 1, 0};
  u.number = 1 + atomic_fetch_add(&products, 1);
  /* Of few rows memory sets the pace, and reads best in long pieces. */
  const double work = (double)(B->rows < 4 ? 4 : B->rows < 16 ? 16 : B->rows) * floats * panels;
  if (B->rows <= FEW) { /* each thread packs them for itself; a tile is some panels for all rows */
    u.spans = tiles_of(work, panels);
  } else { /* all threads share the packing; a tile is panels that the cache holds, for some blocks */
    share(blocks, 32.0 * p->k * u.block, pack_block, &u);
    u.spans = group < 1 ? panels : (panels + group - 1) / group;
    u.chunks = tiles_of(work / u.spans, blocks);
  }
  share(u.spans * u.chunks, B->rows <= FEW ? work / u.spans : TILE,
        p->weights == FLOAT32 ? multiply_tile : multiply_quantised, &u);
}

static void low_rank_row(const void *what, long row, int thread) { /* low = A x of a row, for each site */
  const Multiplication *u = what;
  const Model *M = u->M;
  const Batch *B = u->B;
  const Product *p = u->p;
  (void)thread;
  if (B->mods[row] < 0) return;
  const float *x = p->x + row * p->ldx;
  if (p->norm) {
    float *normed = scratch(p->k), scale = rms(x, p->k, M->eps);
    for (long i = 0; i < p->k; i++) normed[i] = x[i] * scale * p->norm[i];
    x = normed;
  }
  for (int at = 0; at < p->count; at++) {
    const long entry = (u->l * SITES + p->first + at) * M->slots + B->mods[row], rank = M->ranks[entry];
    const float *down = M->lora[2 * entry];
    for (long r = 0; r < rank; r += VW) {
      vf a = {0}, b = {0};
      long i = 0;
      for (; i + 1 < p->k; i += 2) {
        a += x[i] * load(down + i * rank + r);
        b += x[i + 1] * load(down + (i + 1) * rank + r);
      }
      if (i < p->k) a += x[i] * load(down + i * rank + r);
      store(B->low + (row * 3 + at) * M->max_rank + r, a + b);
    }
  }
}

static void project(const Model *M, const Batch *B, long l, Product p) {
  long vectors = 0;
  for (int at = 0; at < p.count; at++) vectors += padded(p.width[at]) / VW;
  const Multiplication u = {.M = M, .B = B, .p = &p, .l = l};
  p.weights = p.mode == HEAD ? M->head_weights : M->weights;
  if (B->lora && p.mode != HEAD) share(B->rows, 4.0 * p.k * M->max_rank, low_rank_row, &u);
  multiply(M, B, l, &p, (vectors + 1) / 2);
}

/* ---- attention ---- */

static void rotate(const Model *M, const float *norm, long position, float *x) { /* one head: norm, then RoPE */
  const long d = M->head_dim, half = M->rotary / 2;
  const float *cos = M->cos + position * M->rotary, *sin = M->sin + position * M->rotary;
  if (norm) {
    const float scale = rms(x, d, M->eps);
    for (long i = 0; i < d; i++) x[i] *= scale * norm[i];
  }
  for (long i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

static inline long borrowed(const Model *M, long slot) { return M->borrowed ? M->borrowed[slot].count : 0; }

static inline long place(const Model *M, long slot, long kv, long position) { /* in `keys`: one of the slot's own */
  return ((slot * M->kv_heads + kv) * M->length + position - borrowed(M, slot)) * M->head_dim;
}

typedef struct {            /* some positions of a sequence, in one piece */
  const float *keys, *values;
  long count;
} Piece;

static inline size_t room_for_pieces(const Model *M, long slot) { /* of a sequence, in floats */
  return (M->borrowed ? M->borrowed[slot].spans + 1 : 1) * (sizeof(Piece) / sizeof(float));
}

static long pieces_of(const Model *M, const Layer *L, long slot, long kv, long from, long stop, Piece *to) {
  /* Positions [from, stop) of a slot's sequence, in their order: of the kept, then its own. Gives how many pieces. */
  const long begin = borrowed(M, slot);
  long count = 0;
  for (long n = 0, at = 0; at < begin && at < stop; at += M->borrowed[slot].span[n++].count) {
    const Span s = M->borrowed[slot].span[n];
    const long low = from > at ? from - at : 0, high = stop - at < s.count ? stop - at : s.count;
    const long first = (kv * M->kept + s.start + low) * M->head_dim;
    if (low < high) to[count++] = (Piece){L->kept_keys + first, L->kept_values + first, high - low};
  }
  if (from < begin) from = begin;
  const long first = place(M, slot, kv, from);
  if (from < stop) to[count++] = (Piece){L->keys + first, L->values + first, stop - from};
  return count;
}

static void keep(const Model *M, const Batch *B, const Layer *L, long row, long kv) { /* rotate and cache one kv head */
  const long d = M->head_dim, kw = padded(M->kv_heads * d), qw = padded(M->heads * d);
  const long at = place(M, B->slots[row], kv, B->positions[row]);
  float *key = B->qkv + row * (qw + 2 * kw) + qw + kv * d;
  rotate(M, L->k_norm, B->positions[row], key);
  memcpy(L->keys + at, key, d * sizeof(float));
  memcpy(L->values + at, key + kw, d * sizeof(float));
}

typedef struct {            /* attention of one layer, or the making of vectors from its inputs */
  const Model *M;
  const Batch *B;
  const Layer *L;
  long l;
  float *keys;              /* of a prefill: side by side in blocks of MR, [prompts and kv heads, up to the last row] */
  const long *first_key, *first_tile; /* [prompts + 1]: tokens and tiles of the prompts before */
  const long *lender, *lent; /* [prompts]: the first `lent` keys lie with the prompt `lender`, which begins alike */
  const struct Bunch *bunch; /* of a decode step: its rows, those together that begin with the same kept blocks */
  long bunches;
} Attention;

static void keep_row(const void *what, long unit, int thread) {
  const Attention *u = what;
  (void)thread;
  keep(u->M, u->B, u->L, unit / u->M->kv_heads, unit % u->M->kv_heads);
}

#include "decode_attention.h"

static void place_row(const void *what, long row, int thread) { /* turn a row's heads, and keep its keys and values */
  const Attention *u = what;
  const Model *M = u->M;
  const long d = M->head_dim, width = padded(M->heads * d) + 2 * padded(M->kv_heads * d);
  (void)thread;
  for (long kv = 0; kv < M->kv_heads; kv++) keep(M, u->B, u->L, row, kv);
  for (long h = 0; h < M->heads; h++) rotate(M, u->L->q_norm, u->B->positions[row], u->B->qkv + row * width + h * d);
}

static inline float *keys_of(const Attention *u, long prompt, long kv) {
  const long before = u->first_key[prompt], count = u->first_key[prompt + 1] - before;
  return u->keys + (before * u->M->kv_heads + kv * count) * u->M->head_dim;
}

static void pack_keys(const void *what, long unit, int thread) { /* of a prompt and a kv head: [d, keys] a block */
  const Attention *u = what;
  const Model *M = u->M;
  const long d = M->head_dim, prompt = unit / M->kv_heads, kv = unit % M->kv_heads, first = u->B->starts[prompt];
  const long begin = u->B->positions[first], count = u->first_key[prompt + 1] - u->first_key[prompt];
  const long slot = u->B->slots[first];
  Piece *piece = (Piece *)scratch(room_for_pieces(M, slot));
  float *key = keys_of(u, prompt, kv);
  (void)thread;
  long t = u->L->window && begin >= u->L->window ? (begin + 1 - u->L->window) / MR * MR : u->lent[prompt];
  const long pieces = pieces_of(M, u->L, slot, kv, t, count, piece);
  const float *x[MR];
  float same[MR];
  for (int r = 0; r < MR; r++) same[r] = 1;
  for (long n = 0; n < pieces; n++)
    for (long j = 0; j < piece[n].count; j++, t++) {
      const int m = t % MR + 1;
      x[m - 1] = piece[n].keys + j * d;
      if (m == MR || t + 1 == count) turn(x, same, 0, m, d, key + (t + 1 - m) * d, m);
    }
}

static int any_asked(const Batch *B, long from, long stop) { /* whether one of these rows' outputs is asked for */
  long n = 0;
  while (n < B->asked && B->asked_rows[n] < from) n++;
  return B->asked < 0 || (n < B->asked && B->asked_rows[n] < stop);
}

static void attend_prompt(const void *what, long index, int thread) {
  /* Some queries of one prompt and head; they are consecutive tokens, whose keys up to them are in the cache.
     Scores [keys, NR queries] and mixes are products like any other. */
  const Attention *u = what;
  const Model *M = u->M;
  const Batch *B = u->B;
  const Layer *L = u->L;
  (void)thread;
  long prompt = 0;
  while (u->first_tile[prompt + 1] <= index) prompt++;
  const long tiles = (u->first_tile[prompt + 1] - u->first_tile[prompt]) / M->heads;
  const long h = (index - u->first_tile[prompt]) / tiles, part = (index - u->first_tile[prompt]) % tiles;
  const long d = M->head_dim, kv = h / (M->heads / M->kv_heads), first = B->starts[prompt];
  const long n = B->starts[prompt + 1] - first, begin = B->positions[first], count = begin + n;
  const long blocks = (n + NR - 1) / NR;
  const long width = padded(M->heads * d) + 2 * padded(M->kv_heads * d);
  const long slot = B->slots[first];
  const long lent = u->lent[prompt];
  const float *key = keys_of(u, prompt, kv), *lender = keys_of(u, u->lender[prompt], kv);
  float *p = scratch(count * NR + d * NR + MR * NR + room_for_pieces(M, slot)), *q = p + count * NR, *y = q + d * NR;
  Piece *piece = (Piece *)(y + MR * NR);
  vf lane[2];
  for (int c = 0; c < NR; c++) lane[c / VW][c % VW] = c;
  for (long row = blocks * part / tiles * NR; row < n && row < blocks * (part + 1) / tiles * NR; row += NR) {
    const long queries = n - row < NR ? n - row : NR, here = begin + row, high = here + queries;
    if (!any_asked(B, first + row, first + row + queries)) continue;
    const long low = L->window && here >= L->window ? (here + 1 - L->window) / MR * MR : 0;
    const long pieces = pieces_of(M, L, slot, kv, low, high, piece);
    const float *query[NR];
    float scale[NR], share[NR];
    for (long c = 0; c < queries; c++) query[c] = B->qkv + (first + row + c) * width + h * d, scale[c] = M->scaling;
    turn(query, scale, 0, queries, d, q, NR);
    for (long t = low; t < high; t += MR) {
      const int m = count - t < MR ? count - t : MR;
      run_near_tile(m, 0, d, (t < lent ? lender : key) + t * d, m, q, NR, p + t * NR);
    }
    for (int s = 0; s < 2; s++) {
      vf most = all(-INFINITY), total = {0};
      const vf position = lane[s] + (float)here, oldest = L->window ? position - (float)L->window : all(-1);
      for (long t = low; t < high; t++) {
        float *score = p + t * NR + s * VW;
        if (t >= here || L->window) {
          const vf place = all(t);
          store(score, pick((place <= position) & (place > oldest), load(score), all(-INFINITY)));
        }
        most = vmax(most, load(score));
      }
      for (long t = low; t < high; t++) {
        float *score = p + t * NR + s * VW;
        const vf x = load(score), e = pick(x == -INFINITY, (vf){0}, vexp(x - most));
        store(score, e);
        total += e;
      }
      store(share + s * VW, 1.0f / total);
    }
    for (long r = 0; r < queries; r += MR)
      for (long i = 0; i < d; i += NR) { /* columns past the head's width are read and dropped */
        const int m = queries - r < MR ? queries - r : MR;
        const long columns = d - i < NR ? d - i : NR;
        const float *weight = p + low * NR + r;
        for (long n = 0; n < pieces; weight += piece[n++].count * NR)
          run_near_tile(m, n > 0, piece[n].count, weight, NR, piece[n].values + i, d, y);
        for (int j = 0; j < m; j++) {
          float *out = B->mixed + (first + row + r + j) * M->heads * d + h * d + i;
          for (long c = 0; c < columns; c++) out[c] = y[j * NR + c] * share[r + j];
        }
      }
  }
}

static void prompt_attention(const Model *M, const Batch *B, const Layer *L) {
  static __thread Room room;
  long first_key[B->prompts + 1], first_tile[B->prompts + 1], lender[B->prompts], lent[B->prompts];
  first_key[0] = first_tile[0] = 0;
  for (long prompt = 0; prompt < B->prompts; prompt++) {
    const long n = B->starts[prompt + 1] - B->starts[prompt], count = B->positions[B->starts[prompt]] + n;
    first_key[prompt + 1] = first_key[prompt] + count;
    first_tile[prompt + 1] =
        first_tile[prompt] + M->heads * tiles_of(2.0 * n * count * M->head_dim, (n + NR - 1) / NR);
    lender[prompt] = prompt, lent[prompt] = 0;
    for (long other = 0; other < prompt && M->borrowed && !L->window; other++) {
      const long alike = in_common(M, B->slots[B->starts[other]], B->slots[B->starts[prompt]]) / MR * MR;
      if (!lent[other] && alike > lent[prompt]) lender[prompt] = other, lent[prompt] = alike;
    }
  }
  float *keys = roomy(&room, first_key[B->prompts] * M->kv_heads * M->head_dim);
  const Attention u = {.M = M, .B = B, .L = L, .keys = keys, .first_key = first_key, .first_tile = first_tile,
                       .lender = lender, .lent = lent};
  share(B->rows, 32.0 * (M->heads + 2 * M->kv_heads) * M->head_dim, place_row, &u);
  share(B->prompts * M->kv_heads, TILE, pack_keys, &u);
  share(first_tile[B->prompts], TILE, attend_prompt, &u);
}

/* ---- vectors ---- */

static float activated(const Generator *G, float x) {
  if (G->activation == RELU) return x > 0 ? x : 0;
  if (G->activation == GELU) return 0.5f * x * (1 + erff(x * 0.70710678f));
  float above = 0, below = 0;
  for (long j = G->above - 1; j >= 0; j--) above = above * x + G->a[j];
  for (long i = G->below - 1; i >= 0; i--) below = (below + G->b[i]) * x;
  return above / (1 + fabsf(below));
}

static void generate(const void *what, long prompt, int thread) { /* the prompt's scales of a layer, into its slot */
  const Attention *u = what;
  const Model *M = u->M;
  const Batch *B = u->B;
  const long dim = M->dim, l = u->l;
  (void)thread;
  if (!B->generators[prompt]) return;
  const Generator *G = B->generators[prompt] + l;
  const long start = B->starts[prompt], stop = start + B->conditioned[prompt], slot = B->slots[start];
  const long first = G->window && stop - G->window > start ? stop - G->window : start;
  float *pooled = scratch(dim + G->rank + G->width), *low = pooled + dim, *made = low + G->rank;
  for (long row = G->pool == LAST ? stop - 1 : first, begun = 0; row < stop; row++, begun = 1) {
    const float *x = B->x + row * padded(dim), scale = G->residual ? 1 : rms(x, dim, M->eps);
    for (long i = 0; i < dim; i++) {
      const float v = G->residual ? x[i] : x[i] * scale * M->layer[l].norm1[i];
      pooled[i] = !begun ? v : G->pool == MEAN ? pooled[i] + v : v > pooled[i] ? v : pooled[i];
    }
  }
  if (G->pool == MEAN)
    for (long i = 0; i < dim; i++) pooled[i] /= stop - first;
  memset(low, 0, G->rank * sizeof(float));
  for (long i = 0; i < dim; i++)
    for (long r = 0; r < G->rank; r++) low[r] += pooled[i] * G->down[i * G->rank + r];
  memcpy(made, G->bias, G->width * sizeof(float));
  for (long r = 0; r < G->rank; r++) {
    const float h = activated(G, low[r]);
    for (long i = 0; i < G->width; i++) made[i] += h * G->up[r * G->width + i];
  }
  const long q = M->heads * M->head_dim, kv = M->kv_heads * M->head_dim;
  const long widths[SITES] = {q, kv, kv, dim, M->ffn, M->ffn, dim};
  for (long s = 0; s < G->sites; made += widths[G->site[s++]]) {
    const long width = widths[G->site[s]];
    memcpy((float *)M->layer[l].scale[G->site[s]] + slot * padded(width), made, width * sizeof(float));
  }
}

/* ---- the parts of a layer ---- */

static void into_attention(const Model *M, const Batch *B, long l) {
  const long qd = M->heads * M->head_dim, kd = M->kv_heads * M->head_dim;
  project(M, B, l, (Product){B->x, padded(M->dim), M->dim, M->layer[l].norm1, M->layer[l].qkv, STORE, Q, 3, {qd, kd, kd},
                             B->qkv, padded(qd) + 2 * padded(kd)});
}

static void out_of_attention(const Model *M, const Batch *B, long l) {
  const Layer *L = M->layer + l;
  const long dim = M->dim, ffn = M->ffn, qd = M->heads * M->head_dim;
  project(M, B, l, (Product){B->mixed, qd, qd, 0, L->o, ADD, O, 1, {dim}, B->x, padded(dim)});
  project(M, B, l, (Product){B->x, padded(dim), dim, L->norm2, L->gate_up, GATED, GATE, 2, {ffn, ffn}, B->act,
                             padded(ffn)});
  project(M, B, l, (Product){B->act, padded(ffn), ffn, 0, L->down, ADD, DOWN, 1, {dim}, B->x, padded(dim)});
}

static void out_of_attention_asked(const Model *M, const Batch *B, long l) { /* only the rows that are asked for */
  const long dim = padded(M->dim), qd = M->heads * M->head_dim;
  int mods[B->asked + 1];
  Batch few = *B;
  few.rows = B->asked, few.mods = mods;
  for (long n = 0; n < B->asked; n++) { /* they come to the front, and go back */
    const long row = B->asked_rows[n];
    memmove(B->x + n * dim, B->x + row * dim, dim * sizeof(float));
    memmove(B->mixed + n * qd, B->mixed + row * qd, qd * sizeof(float));
    mods[n] = B->mods[row];
  }
  if (B->asked) out_of_attention(M, &few, l);
  for (long n = B->asked - 1; n >= 0; n--)
    memmove(B->x + B->asked_rows[n] * dim, B->x + n * dim, dim * sizeof(float));
}

static void embed_row(const void *what, long row, int thread) {
  const Attention *u = what;
  const Model *M = u->M;
  const long id = u->B->ids[row], dim = M->dim;
  const void *from = M->embed ? M->embed : M->head;
  float *x = u->B->x + row * padded(dim);
  (void)thread;
  if (M->head_weights == FLOAT32) {
    const long first = M->embed ? id * dim : id / NR * dim * NR + id % NR, step = M->embed ? 1 : NR;
    for (long i = 0; i < dim; i++) x[i] = ((const float *)from)[first + i * step];
  } else {
    unpack_column(M->head_weights, dim, quantised_panel(from, M->head_weights, dim, id / NR), id % NR, x);
  }
  for (long i = 0; i < dim; i++) x[i] *= M->embed_scale;
}

static void embed(const Model *M, const Batch *B) {
  share(B->rows, 32.0 * M->dim, embed_row, &(Attention){.M = M, .B = B});
}

static void logits(const Model *M, const Batch *B) {
  for (long i = 0; i < call.threads * B->rows; i++) B->best_value[i] = -INFINITY, B->best_at[i] = 0;
  const int used = call.threads;
  project(M, B, 0, (Product){B->x, padded(M->dim), M->dim, M->final_norm, M->head, HEAD, 0, 1, {M->vocab}, 0, 0});
  for (long row = 0; row < B->rows; row++) {
    float best = -INFINITY;
    int at = 0;
    for (long t = 0; t < used && at >= 0; t++) { /* of equals the first, whoever found it */
      const int found = B->best_at[t * B->rows + row];
      const float value = B->best_value[t * B->rows + row];
      if (found == -2) at = -1;
      else if (value > best || (value == best && found < at)) best = value, at = found;
    }
    B->best[row] = at;
  }
}

/* ---- the likeliest token that a mask lets through ---- */

static int likeliest(const float *y, const unsigned *mask, long words, long vocab) {
  const vf none = all(-FLT_MAX);
  const long end = vocab < 32 * words ? vocab : 32 * words;
  vf best = none, bad = all(0);
  vi lane, at = {0};
  long t = 0, found = -1;
  float value = -FLT_MAX;
  for (int i = 0; i < VW; i++) lane[i] = 1 << i;
  for (; t + VW <= end; t += VW) {
    const unsigned let = mask[t / 32] >> t % 32 & ((1u << VW) - 1);
    if (!let) continue;
    const vf x = pick((lane & (int)let) != 0, load(y + t), none);
    const vi more = x > best;
    bad += x - x;
    best = pick(more, x, best);
    at = (more & (int)t) | (~more & at);
  }
  for (int i = 0; i < VW; i++) {
    if (!(bad[i] == 0)) return -1;
    if (best[i] > value || (best[i] == value && value > -FLT_MAX && at[i] + i < found)) value = best[i], found = at[i] + i;
  }
  for (; t < end; t++) {
    if (!(mask[t / 32] >> t % 32 & 1)) continue;
    if (!(y[t] - y[t] == 0)) return -1;
    if (y[t] > value) value = y[t], found = t;
  }
  return found;
}

/* ---- kept blocks ---- */

static void copy_head(const void *what, long unit, int thread) { /* of one tensor */
  const Copy *c = what;
  const long tensor = unit / c->heads, head = unit % c->heads;
  float *to = c->to[tensor] + c->to_at + head * c->to_stride;
  (void)thread;
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  if (c->fresh) { /* new memory all at once: a fault for every page takes longer. Where it is refused, faults come */
    const uintptr_t page = sysconf(_SC_PAGESIZE), first = (uintptr_t)to / page * page;
    madvise((void *)first, (uintptr_t)(to + c->count) - first, MADV_POPULATE_WRITE);
  }
#endif
  memcpy(to, c->from[tensor] + c->from_at + head * c->from_stride, c->count * sizeof(float));
}

/* ---- what native.py calls ---- */

void pedro_embed(Model *M, const Batch *B) {
  enter(M->threads);
  embed(M, B);
  leave(&M->spent, &M->lost);
}

void pedro_generate(Model *M, const Batch *B, long l) { /* the prompts' vectors of layer l, from its inputs */
  enter(M->threads);
  share(B->prompts, TILE, generate, &(Attention){.M = M, .B = B, .l = l});
  leave(&M->spent, &M->lost);
}

void pedro_prefill(Model *M, const Batch *B, long l) { /* layer l of the next rows of prompts, all before them done */
  enter(M->threads);
  into_attention(M, B, l);
  prompt_attention(M, B, M->layer + l);
  if (B->asked < 0) out_of_attention(M, B, l);
  else out_of_attention_asked(M, B, l);
  leave(&M->spent, &M->lost);
}

void pedro_logits(Model *M, const Batch *B) {
  enter(M->threads);
  logits(M, B);
  leave(&M->spent, &M->lost);
}

void pedro_copy(long threads, long tensors, const Copy *c) {
  double spent, lost;
  enter(threads);
  share(tensors * c->heads, 8.0 * c->count, copy_head, c);
  leave(&spent, &lost);
}

void pedro_likeliest(long rows, const float *const *logits, const unsigned *const *masks, long words, long vocab,
                     int *found) { /* -1 where what is let through is not finite, or nothing is */
  for (long row = 0; row < rows; row++) found[row] = likeliest(logits[row], masks[row], words, vocab);
}

void pedro_decode(Model *M, const Batch *B) {
  enter(M->threads);
  Bunch bunch[B->rows];
  const long bunches = bunches_of(M, B, bunch);
  embed(M, B);
  for (long l = 0; l < M->layers; l++) {
    into_attention(M, B, l);
    attention(M, B, M->layer + l, bunch, bunches);
    out_of_attention(M, B, l);
  }
  logits(M, B);
  leave(&M->spent, &M->lost);
}
