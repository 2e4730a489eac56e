/* Attention of a decode step, for native.c: each row's heads over the keys and values of its sequence, kv head by kv
   head.

   The heads that share keys and values go over them together, a few at a time: each is read once for all. So do rows
   whose sequences begin with the same kept blocks, for as long as these last: a bunch of rows goes over them a few
   positions at a time, which stay near the processor until the last row has seen them. No number depends on that: alone
   or in a bunch, every sum has the same terms in the same order, and waits in memory from one piece to the next. The
   slow reference is the model itself; a row alone is another (tests/test_engine_borrowed.py). */

#pragma once

#define TOGETHER 16   /* queries of a bunch, at most: their scores stay in the second-level cache */
#define LEAST_LEAD 64 /* positions that rows have in common before they make a bunch */
#define SOME 64       /* positions that stay in the first-level cache while the queries of a bunch pass by */

typedef struct Bunch {      /* rows that begin with the same kept positions: `lead`, 0 of one that is alone */
  long count, lead;
  int row[TOGETHER];
} Bunch;

static inline INLINE void score(const int g, const int n, long d, const float *q, const float *keys, float scaling,
                                float *p, long ldp) { /* p [g, n of ldp] = scaling * q keys', q [g, d], keys [n, d] */
  const long whole = d - d % VW;
  vf s[GROUP][4];
#pragma GCC unroll 4
  for (int h = 0; h < g; h++)
#pragma GCC unroll 4
    for (int j = 0; j < n; j++) s[h][j] = (vf){0};
  for (long i = 0; i < whole; i += VW) {
#pragma GCC unroll 4
    for (int j = 0; j < n; j++) {
      const vf key = load(keys + j * d + i);
#pragma GCC unroll 4
      for (int h = 0; h < g; h++) s[h][j] += load(q + h * d + i) * key;
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < g; h++, q += d, p += ldp) {
    if (n == 4) store4(p, sum4(s[h]));
    else p[0] = sum(s[h][0]);
    for (int j = 0; j < n; j++) {
      for (long i = whole; i < d; i++) p[j] += q[i] * keys[j * d + i];
      p[j] *= scaling;
    }
  }
}

static inline INLINE void score_heads(const int g, long d, float scaling, const float *q, const Piece *piece,
                                      long pieces, float *p, long ldp) {
  for (const Piece *end = piece + pieces; piece < end; p += piece++->count) {
    long t = 0;
    for (; t + 4 <= piece->count; t += 4) score(g, 4, d, q, piece->keys + t * d, scaling, p + t, ldp);
    for (; t < piece->count; t++) score(g, 1, d, q, piece->keys + t * d, scaling, p + t, ldp);
  }
}

static inline INLINE void mix(const int g, const int n, long d, const Piece *piece, long pieces, const float *p,
                              long ldp, long at, int more, const float *share, float *out) {
  /* n vectors of out [g, d]; more: the sums go on from what is there; share: they are done, and scaled */
  vf a[GROUP][4];
#pragma GCC unroll 4
  for (int h = 0; h < g; h++)
#pragma GCC unroll 4
    for (int c = 0; c < n; c++) a[h][c] = more ? load(out + h * d + at + c * VW) : (vf){0};
  for (const Piece *end = piece + pieces; piece < end; p += piece++->count) {
    const float *values = piece->values + at;
    for (long t = 0; t < piece->count; t++, values += d) {
#pragma GCC unroll 4
      for (int c = 0; c < n; c++) {
        const vf value = load(values + c * VW);
#pragma GCC unroll 4
        for (int h = 0; h < g; h++) a[h][c] += p[h * ldp + t] * value;
      }
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < g; h++)
#pragma GCC unroll 4
    for (int c = 0; c < n; c++) store(out + h * d + at + c * VW, share ? a[h][c] * share[h] : a[h][c]);
}

static inline INLINE void mix_heads(const int g, long d, const Piece *piece, long pieces, const float *p, long ldp,
                                    int more, const float *share, float *out) {
  long i = 0;
  for (; i + 4 * VW <= d; i += 4 * VW) mix(g, 4, d, piece, pieces, p, ldp, i, more, share, out);
  switch ((d - i) / VW) { /* sums side by side do not wait for one another */
    case 3: mix(g, 3, d, piece, pieces, p, ldp, i, more, share, out); break;
    case 2: mix(g, 2, d, piece, pieces, p, ldp, i, more, share, out); break;
    case 1: mix(g, 1, d, piece, pieces, p, ldp, i, more, share, out); break;
  }
  i += (d - i) / VW * VW;
  for (; i < d; i++)
    for (int h = 0; h < g; h++) {
      const float *weight = p + h * ldp;
      float a = more ? out[h * d + i] : 0;
      for (long n = 0; n < pieces; n++)
        for (long t = 0; t < piece[n].count; t++) a += *weight++ * piece[n].values[t * d + i];
      out[h * d + i] = share ? a * share[h] : a;
    }
}

static float soften(float *p, long count) { /* scores to their exponentials, zeros behind; gives 1 / their sum */
  vf most = all(-INFINITY), total = {0};
  float high = -INFINITY;
  for (long t = count; t < padded(count); t++) p[t] = -INFINITY;
  for (long t = 0; t < count; t += VW) most = vmax(most, load(p + t));
  for (int i = 0; i < VW; i++) high = most[i] > high ? most[i] : high;
  for (long t = 0; t < count; t += VW) {
    const vf x = load(p + t), e = pick(x == -INFINITY, (vf){0}, vexp(x - high));
    store(p + t, e);
    total += e;
  }
  return 1.0f / sum(total);
}

#if GROUP > 3
#define GROUPS CASE(1) CASE(2) CASE(3) CASE(4)
#elif GROUP > 2
#define GROUPS CASE(1) CASE(2) CASE(3)
#else
#define GROUPS CASE(1) CASE(2)
#endif

static void scores(const Model *M, long queries, const float *q, const Piece *piece, long pieces, float *p, long ldp) {
  /* p [queries, of ldp] of the pieces' positions; q [queries, d] */
  const long d = M->head_dim, parts = (queries + GROUP - 1) / GROUP;
  for (long part = 0; part < parts; part++) {
    const long at = queries * part / parts;
    switch (queries * (part + 1) / parts - at) {
#define CASE(n) case n: score_heads(n, d, M->scaling, q + at * d, piece, pieces, p + at * ldp, ldp); break;
      GROUPS
#undef CASE
    }
  }
}

static void mixes(const Model *M, long queries, const Piece *piece, long pieces, const float *p, long ldp, int more,
                  const float *share, float *out) { /* out [queries, d], as `mix` has it */
  const long d = M->head_dim, parts = (queries + GROUP - 1) / GROUP;
  for (long part = 0; part < parts; part++) {
    const long at = queries * part / parts;
    const float *shares = share ? share + at : 0;
    switch (queries * (part + 1) / parts - at) {
#define CASE(n) case n: mix_heads(n, d, piece, pieces, p + at * ldp, ldp, more, shares, out + at * d); break;
      GROUPS
#undef CASE
    }
  }
}

static long split(const Piece *piece, long pieces, long d, Piece *to) { /* into small ones; gives how many */
  long count = 0;
  for (const Piece *end = piece + pieces; piece < end; piece++)
    for (long t = 0; t < piece->count; t += SOME) {
      const long left = piece->count - t;
      to[count++] = (Piece){piece->keys + t * d, piece->values + t * d, left < SOME ? left : SOME};
    }
  return count;
}

static void attend(const Model *M, const Batch *B, const Layer *L, const Bunch *bunch, long kv) {
  const long d = M->head_dim, group = M->heads / M->kv_heads, rows = bunch->count, queries = rows * group;
  const long width = padded(M->heads * d) + 2 * padded(M->kv_heads * d), lead = bunch->lead;
  long from[rows], stop[rows], most = 0;
  size_t room = 0;
  for (long r = 0; r < rows; r++) {
    const long row = bunch->row[r], position = B->positions[row];
    const size_t its = room_for_pieces(M, B->slots[row]);
    from[r] = L->window && position >= L->window ? position + 1 - L->window : 0;
    stop[r] = position + 1;
    if (stop[r] - from[r] > most) most = stop[r] - from[r];
    if (its > room) room = its;
  }
  const long ldp = padded(most);
  const size_t small = room + (lead / SOME) * (sizeof(Piece) / sizeof(float));
  float *p = scratch(queries * (ldp + 2 * d) + room + small), *q = p + queries * ldp, *out = q + queries * d;
  float share[queries];
  Piece *piece = (Piece *)(out + queries * d), *first = (Piece *)(out + queries * d + room);
  for (long r = 0; r < rows; r++) {
    const long row = bunch->row[r];
    float *turned = B->qkv + row * width + kv * group * d;
    if (!B->shared) keep(M, B, L, row, kv);
    for (long h = 0; h < group; h++) rotate(M, L->q_norm, B->positions[row], turned + h * d);
    memcpy(q + r * group * d, turned, group * d * sizeof(float));
  }
  long firsts = lead ? pieces_of(M, L, B->slots[bunch->row[0]], kv, 0, lead, piece) : 0;
  firsts = split(piece, firsts, d, first);
  for (long n = 0, at = 0; n < firsts; at += first[n++].count) scores(M, queries, q, first + n, 1, p + at, ldp);
  for (long r = 0; r < rows; r++) {
    float *its = p + r * group * ldp;
    const long pieces = pieces_of(M, L, B->slots[bunch->row[r]], kv, lead ? lead : from[r], stop[r], piece);
    scores(M, group, q + r * group * d, piece, pieces, its + lead, ldp);
    for (long h = 0; h < group; h++) share[r * group + h] = soften(its + h * ldp, stop[r] - from[r]);
  }
  for (long n = 0, at = 0; n < firsts; at += first[n++].count)
    mixes(M, queries, first + n, 1, p + at, ldp, n > 0, 0, out);
  for (long r = 0; r < rows; r++) {
    const long row = bunch->row[r], at = r * group;
    const long pieces = pieces_of(M, L, B->slots[row], kv, lead ? lead : from[r], stop[r], piece);
    mixes(M, group, piece, pieces, p + at * ldp + lead, ldp, lead > 0, share + at, out + at * d);
    memcpy(B->mixed + (row * M->heads + kv * group) * d, out + at * d, group * d * sizeof(float));
  }
}

static void attend_bunch(const void *what, long unit, int thread) { /* some rows and a kv head */
  const Attention *u = what;
  const Batch *B = u->B;
  const Bunch *bunch = u->bunch + unit % u->bunches; /* one after the other over one head */
  const long kv = unit / u->bunches;
  int whole = 1; /* whether all of them see what they have in common */
  (void)thread;
  for (long r = 0; r < bunch->count; r++) whole &= !u->L->window || B->positions[bunch->row[r]] < u->L->window;
  if (whole || bunch->count == 1) attend(u->M, B, u->L, bunch, kv);
  else for (long r = 0; r < bunch->count; r++) attend(u->M, B, u->L, &(Bunch){1, 0, {bunch->row[r]}}, kv);
}

static void attention(const Model *M, const Batch *B, const Layer *L, const Bunch *bunch, long bunches) {
  double seen = 0;
  for (long row = 0; row < B->rows; row++) seen += B->positions[row] + 1;
  const double work = 8 * seen / bunches * M->head_dim * M->heads / M->kv_heads;
  const Attention u = {.M = M, .B = B, .L = L, .bunch = bunch, .bunches = bunches};
  if (B->shared) share(B->rows * M->kv_heads, 32.0 * M->head_dim, keep_row, &u); /* before a later row looks at them */
  share(bunches * M->kv_heads, work, attend_bunch, &u);
}

static long in_common(const Model *M, long slot, long other) { /* kept positions with which both sequences begin */
  const Borrowed *a = M->borrowed + slot, *b = M->borrowed + other;
  long count = 0;
  for (long n = 0; n < a->spans && n < b->spans && a->span[n].start == b->span[n].start; n++) {
    const long few = a->span[n].count < b->span[n].count ? a->span[n].count : b->span[n].count;
    count += few;
    if (few < a->span[n].count || few < b->span[n].count) break;
  }
  return count;
}

static long bunches_of(const Model *M, const Batch *B, Bunch *to) { /* of a step's rows, [rows]; gives how many */
  const long fit = TOGETHER / (M->heads / M->kv_heads), busy = B->rows * M->kv_heads / (2 * M->threads);
  const long most = !M->borrowed ? 1 : fit < busy ? fit : busy; /* no thread has to wait for bunches of others */
  char placed[B->rows];
  long bunches = 0;
  memset(placed, 0, B->rows);
  for (long row = 0; row < B->rows; row++) {
    if (placed[row]) continue;
    Bunch *bunch = to + bunches++;
    *bunch = (Bunch){.count = 1, .row = {row}};
    for (long other = row + 1; other < B->rows && bunch->count < most; other++) {
      const long lead = placed[other] ? 0 : in_common(M, B->slots[row], B->slots[other]);
      if (lead < LEAST_LEAD || 2 * lead < bunch->lead) continue; /* nor is what the others have in common given up */
      if (!bunch->lead || lead < bunch->lead) bunch->lead = lead;
      bunch->row[bunch->count++] = other;
      placed[other] = 1;
    }
  }
  return bunches;
}
