/* SPDX-License-Identifier: BSD-3-Clause */
/* conv_dw: strips of columns, for kernels of 3 x 3 and 5 x 5, row and column stride 1 or 2.
 *
 * Included by conv_dw_tmpl.h. Defines: dw_strip_choose, dw_strip_set_init, dw_strips, dw_strip_planes.
 *
 * A strip is nv vectors of output columns, walked from the first input row to the last: each input row is read once
 * and added to all the output rows it belongs to, whose sums sit in a ring of registers, ceil(kh/s) rows of nv vectors.
 * Rows outside the image are not met at all. Between two uses of one sum lie all the others of its column tap, which
 * hides the latency of the multiply-add; a block of rows per column tap, the other way to load each row once, needs
 * more of the loop in flight than the CPU can hold. Registers: ring + nv inputs + 1 weight; with `hold` (one vector,
 * 3 x 3) all weights instead.
 * What limits short strips is not arithmetic but branches: rows that need no check have a loop of their own, and the
 * small square maps at the end of every network are unrolled altogether. */

/* What the loads of a strip have to look out for: nothing; columns outside the image in its first vector left of the
 * middle tap and in its last one right of it; or in any vector at any tap. */
typedef enum { DW_FREE, DW_EDGES, DW_MASKED } dw_mask_kind;
enum { DW_STRIP_MAX_NV = 4, DW_STRIP_MAX_K = 7 };

typedef struct dw_strip_masks {
    vm m[DW_STRIP_MAX_K + 1][2 * DW_STRIP_MAX_NV];
} dw_strip_masks;

CBN_INLINE bool dw_strip_masked(const dw_mask_kind kind, const int v, const int k, const int nv, const int kh,
                                const int s) {
    if (kind == DW_EDGES) return (v == 0 && k < kh / 2) || (v == nv - 1 && k + s - 1 > kh / 2);
    return kind == DW_MASKED;
}

/* Input of column tap k (stride 2 and pair: of taps k and k + 1) for vector v. */
CBN_INLINE void dw_strip_load(vf *q, vf *u, const float *x, const vm *m, const int s, const bool pair,
                              const bool masked) {
    vf a = masked ? vf_load_mask(x, m[0]) : vf_load(x);
    if (s == 2) {
        vf b = masked ? vf_load_mask(x + VF_LANES, m[1]) : vf_load(x + VF_LANES);
        if (pair) {
            b = vf_pin(b); /* or gcc loads it again for the second shuffle */
            *u = vf_pin(vf_odd_mixed(a, b));
        }
        a = vf_even_mixed(a, b);
    }
    *q = vf_pin(a);
}

/* Adds input row `parity` of a group of s to the sums; slot 0 of the ring holds the oldest output row, which this group
 * of rows completes. */
CBN_INLINE void dw_strip_row(vf *acc, const dw_rows *t, const float *x, const vf *held,
                             const dw_strip_masks *masks, int64_t last, const int parity, const int nv,
                             const int kh, const int kw, const int s, const bool odd, const dw_mask_kind kind) {
    const int top = (kh - 1) / s * s; /* the kernel row that slot 0 meets at parity 0 */
    const float *w = t->w;
    for (int32_t d = 0; d < (held ? 1 : t->nd); d++, x += t->x_plane, w += t->w_plane) {
        CBN_UNROLL for (int k = 0; k < kw; k++) {
            const bool pair = s == 2 && k + 1 < kw && (k & 1) == odd;
            if (s == 2 && k > 0 && (k & 1) != odd) continue; /* came with the one before */
            vf q[2 * DW_STRIP_MAX_NV];
            if (!held) CBN_BARRIER();
            CBN_UNROLL for (int v = 0; v < nv; v++) {
                const bool masked = dw_strip_masked(kind, v, k, nv, kh, s);
                const float *at = x + k + (v == nv - 1 ? last : v * s * VF_LANES);
                dw_strip_load(&q[v], &q[nv + v], at, &masks->m[k][v * s], s, pair, masked);
            }
            CBN_UNROLL for (int h = 0; h < 2; h++) {
                for (int j = parity; j < kh && h <= pair; j += s) {
                    const int slot = (top + parity - j) / s;
                    const vf f = held ? held[j * kw + k + h] : vf_pin(vf_set1(w[j * kw + k + h]));
                    CBN_UNROLL for (int v = 0; v < nv; v++)
                        acc[slot * nv + v] = vf_fma(f, q[h * nv + v], acc[slot * nv + v]);
                }
            }
        }
    }
}

/* Stores the oldest output row of the ring. */
CBN_INLINE void dw_strip_out(const vf *acc, const dw_rows *t, float *y, int64_t tail, const int nv, const int s,
                             const dw_mask_kind kind) {
    CBN_BARRIER(); /* or gcc keeps the bounds in registers and the sums in memory */
    const vf bias = vf_set1(t->bias), lo = vf_set1(t->lo), hi = vf_set1(t->hi);
    CBN_UNROLL for (int v = 0; v < nv; v++) {
        float *to = y + (v == nv - 1 ? tail : v * VF_LANES);
        const vf sum = vf_min(hi, vf_max(lo, vf_add(s == 2 ? vf_unmix(acc[v]) : acc[v], bias)));
        /* A row shorter than a vector may run over into the next one, which is written later. */
        if (kind != DW_MASKED || nv > 1 || t->ow >= VF_LANES || t->y_room - (y - t->y) >= VF_LANES) vf_store(to, sum);
        else vf_store_n(to, sum, t->ow);
    }
}

CBN_INLINE void dw_strip_next(vf *acc, const int ring, const int nv) {
    CBN_UNROLL for (int k = 0; k < (ring - 1) * nv; k++) acc[k] = acc[k + nv];
    CBN_UNROLL for (int v = 0; v < nv; v++) acc[(ring - 1) * nv + v] = vf_zero();
}

/* All rows of t for the output columns of vectors c, c + lanes, ..., the last one at c + tail. Everything after tail is
 * constant; odd: stride 2, and tap 0 lies in an odd column, alone. */
CBN_INLINE void dw_strip(const dw_rows *t, const dw_strip_masks *masks, int64_t c, int64_t tail, const bool hold,
                         const int nv, const int kh, const int kw, const int s, const bool odd,
                         const dw_mask_kind kind) {
    const int ring = (kh + s - 1) / s;
    vf acc[DW_STRIP_MAX_K * DW_STRIP_MAX_NV];
    const int64_t col = c * s - t->pw, last = tail * s, groups = t->rows + ring - 1;
    const int64_t row_lo = t->row_lo, row_hi = t->row_hi, full = CBN_MIN(row_hi / s, groups);
    const float *x = t->x + col;
    float *y = t->y + c;
    vf weights[9], *held = hold ? weights : NULL;
    if (hold) {
        CBN_UNROLL for (int i = 0; i < kh * kw; i++) weights[i] = vf_pin(vf_set1(t->w[i]));
    }
    CBN_UNROLL for (int i = 0; i < ring * nv; i++) acc[i] = vf_zero();
    int64_t g = 0, stop = CBN_MIN(groups, CBN_MAX(ring - 1, (row_lo + s - 1) / s));
    for (;;) {
        for (; g < stop; g++, x += s * t->x_row) {
            CBN_UNROLL for (int h = 0; h < s; h++) {
                if (g * s + h >= row_lo && g * s + h < row_hi)
                    dw_strip_row(acc, t, x + h * t->x_row, held, masks, last, h, nv, kh, kw, s, odd, kind);
            }
            if (g >= ring - 1) {
                dw_strip_out(acc, t, y, tail, nv, s, kind);
                y += t->y_row;
            }
            dw_strip_next(acc, ring, nv);
        }
        if (g == groups) return;
        for (; g < full; g++, x += s * t->x_row, y += t->y_row) {
            CBN_UNROLL for (int h = 0; h < s; h++)
                dw_strip_row(acc, t, x + h * t->x_row, held, masks, last, h, nv, kh, kw, s, odd, kind);
            dw_strip_out(acc, t, y, tail, nv, s, kind);
            dw_strip_next(acc, ring, nv);
        }
        stop = groups;
    }
}

typedef void (*dw_strip_fn)(const dw_rows *t, const dw_strip_masks *masks, int64_t c, int64_t tail);
#define DW_STRIP_(name, hold, nv, kh, s, odd, kind)                                                \
    static void name(const dw_rows *t, const dw_strip_masks *m, int64_t c, int64_t tail) {         \
        dw_strip(t, m, c, (kind) == DW_MASKED ? tail : ((nv) - 1) * VF_LANES, hold, nv, kh, kh, s, odd, kind); \
    }
#define DW_STRIPS_(name, hold, nv, kh, s, odd)                                                     \
    DW_STRIP_(name##_free, hold, nv, kh, s, odd, DW_FREE)                                          \
    DW_STRIP_(name##_edges, hold, nv, kh, s, odd, DW_EDGES)                                        \
    DW_STRIP_(name##_masked, hold, nv, kh, s, odd, DW_MASKED)
#define DW_FNS_(name) {name##_free, name##_edges, name##_masked}
DW_STRIPS_(dw_k3, true, 1, 3, 1, 0)
DW_STRIPS_(dw_k3_1, false, 1, 3, 1, 0)
DW_STRIPS_(dw_k3_2, false, 2, 3, 1, 0)
DW_STRIPS_(dw_k3_3, false, 3, 3, 1, 0)
DW_STRIPS_(dw_k5_1, false, 1, 5, 1, 0)
DW_STRIPS_(dw_k5_2, false, 2, 5, 1, 0)
DW_STRIPS_(dw_k3s2_1, false, 1, 3, 2, 1)
DW_STRIPS_(dw_k3s2_2, false, 2, 3, 2, 1)
DW_STRIPS_(dw_k3s2_3, false, 3, 3, 2, 1)
DW_STRIPS_(dw_k3s2_4, false, 4, 3, 2, 1)
DW_STRIPS_(dw_k5s2_1, false, 1, 5, 2, 0)
DW_STRIPS_(dw_k5s2_2, false, 2, 5, 2, 0)
DW_STRIPS_(dw_k5s2_3, false, 3, 5, 2, 0)

typedef struct dw_strip_family {
    int kh, s, odd, max_nv, flat; /* flat: one depth tap only */
    dw_strip_fn run[DW_STRIP_MAX_NV][3];
} dw_strip_family;

/* NULL: none for this shape. */
static const dw_strip_family *dw_strip_choose(const cbn_conv_dw_args *a) {
    static const dw_strip_family families[] = {
        {3, 1, 0, 3, 1, {DW_FNS_(dw_k3), DW_FNS_(dw_k3_2), DW_FNS_(dw_k3_3)}},
        {3, 1, 0, 3, 0, {DW_FNS_(dw_k3_1), DW_FNS_(dw_k3_2), DW_FNS_(dw_k3_3)}},
        {5, 1, 0, 2, 0, {DW_FNS_(dw_k5_1), DW_FNS_(dw_k5_2)}},
        {3, 2, 1, 4, 0, {DW_FNS_(dw_k3s2_1), DW_FNS_(dw_k3s2_2), DW_FNS_(dw_k3s2_3), DW_FNS_(dw_k3s2_4)}},
        {5, 2, 0, 3, 0, {DW_FNS_(dw_k5s2_1), DW_FNS_(dw_k5s2_2), DW_FNS_(dw_k5s2_3)}},
    };
    if (a->kw != a->kh || a->dw != 1 || a->sh != a->sw || (a->sw == 2 && a->dh != 1)) return NULL;
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++) {
        const dw_strip_family *f = &families[i];
        if (f->flat && a->kd > 1) continue;
        if (f->kh == a->kh && f->s == a->sw && (f->s == 1 || (a->pw & 1) == f->odd)) return f;
    }
    return NULL;
}

/* y = clamp(y + residual), for the rows of t. */
static void dw_finish(const dw_rows *t) {
    const vf lo = vf_set1(t->lo), hi = vf_set1(t->hi);
    for (int64_t r = 0; r < t->rows; r++)
        for (int64_t c = 0; c < t->ow; c += VF_LANES) {
            const int64_t at = r * t->y_row + c, cols = CBN_MIN(t->ow - c, VF_LANES);
            const vf sum = vf_add(vf_load_n(t->y + at, cols), vf_load_n(t->residual + at, cols));
            vf_store_n(t->y + at, vf_min(hi, vf_max(lo, sum)), cols);
        }
}

/* A strip of nv vectors from the one numbered `done` on: what to call. */
typedef struct dw_strip_call {
    dw_strip_fn run;
    int64_t c, tail;
    dw_strip_masks masks;
} dw_strip_call;

static void dw_strip_prepare(dw_strip_call *call, const dw_strip_family *f, const dw_rows *t, int64_t done,
                             int64_t nv) {
    const int64_t L = VF_LANES, half = f->kh / 2;
    int64_t c = done * L, tail = (nv - 1) * L;
    if (c + nv * L > t->ow) {
        if (t->ow >= nv * L) c = t->ow - nv * L;
        else tail = CBN_MAX(t->ow - L, 0);
    }
    const int64_t first = c * f->s - t->pw, last = first + tail * f->s; /* columns of tap 0 */
    const int64_t reach = t->kw - 1 - f->odd + f->s * L - 1;            /* from there to the last element loaded */
    dw_mask_kind kind = DW_FREE;
    if (tail != (nv - 1) * L) kind = DW_MASKED;
    else if (first < 0 || last + reach >= t->iw) {
        kind = DW_EDGES;
        /* the taps of these vectors that go without a mask, and the vectors that do */
        if (first + half < 0 || last + half + f->s * L - 1 >= t->iw) kind = DW_MASKED;
        if (nv > 1 && (first + f->s * L < 0 || last - f->s * L + reach >= t->iw)) kind = DW_MASKED;
    }
    call->run = f->run[nv - 1][kind];
    call->c = c;
    call->tail = tail;
    if (kind == DW_FREE) return;
    for (int k = 0; k < t->kw; k++)
        for (int v = 0; v < nv; v++) {
            if (!dw_strip_masked(kind, v, k, (int)nv, f->kh, f->s)) continue;
            for (int h = 0; h < f->s; h++) {
                const int64_t at = (v == nv - 1 ? last : first + v * f->s * L) + k + h * L;
                call->masks.m[k][v * f->s + h] = vf_mask(dw_clip(-at), dw_clip(t->iw - at));
            }
        }
}

CBN_INLINE void dw_strip_run(const dw_strip_call *call, const dw_rows *t) {
    if (t->residual) {
        dw_rows sums = *t;
        sums.lo = -__builtin_inff();
        sums.hi = __builtin_inff();
        call->run(&sums, &call->masks, call->c, call->tail);
    } else {
        call->run(t, &call->masks, call->c, call->tail);
    }
}

/* Whole maps of a size that every network ends with, without a loop: most of the time of a short strip goes into
 * starting and ending it. Maps of `rows` rows and columns, padding half the kernel. */
CBN_INLINE void dw_map(const dw_rows *t, const dw_strip_masks *masks, const int rows, const int nv, const int kh) {
    const int half = kh / 2;
    const int64_t tail = rows > VF_LANES ? rows - VF_LANES : 0;
    const float *x = t->x + half * (int64_t)rows - half, *const w = t->w;
    float *y = t->y;
    vf acc[DW_STRIP_MAX_K * DW_STRIP_MAX_NV];
    CBN_UNROLL for (int i = 0; i < kh * nv; i++) acc[i] = vf_zero();
    CBN_UNROLL for (int i = 0; i < rows + half; i++) {
        CBN_UNROLL for (int k = 0; k < kh; k++) {
            vf q[DW_STRIP_MAX_NV];
            if (i >= rows) continue;
            CBN_BARRIER();
            CBN_UNROLL for (int v = 0; v < nv; v++) {
                const float *at = x + k + (v == nv - 1 ? tail : v * VF_LANES);
                const bool masked = rows < VF_LANES || dw_strip_masked(DW_EDGES, v, k, nv, kh, 1);
                q[v] = vf_pin(masked ? vf_load_mask(at, masks->m[k][v]) : vf_load(at));
            }
            CBN_UNROLL for (int j = 0; j < kh; j++) {
                const int r = i + half - j;
                if (r < 0 || r >= rows) continue;
                const vf f = vf_pin(vf_set1(w[j * kh + k]));
                CBN_UNROLL for (int v = 0; v < nv; v++) acc[r % kh * nv + v] = vf_fma(f, q[v], acc[r % kh * nv + v]);
            }
        }
        x += rows;
        DW_PIN_POINTER(x);
        if (i < half) continue;
        const int slot = (i - half) % kh;
        CBN_BARRIER();
        const vf bias = vf_set1(t->bias), lo = vf_set1(t->lo), hi = vf_set1(t->hi);
        CBN_UNROLL for (int v = 0; v < nv; v++) {
            const vf sum = vf_min(hi, vf_max(lo, vf_add(acc[slot * nv + v], bias)));
            float *to = y + (v == nv - 1 ? tail : v * VF_LANES);
            acc[slot * nv + v] = vf_zero();
            const int reach = (i - half) * rows + VF_LANES; /* vectors pass the end from the last rows but one, too */
            const bool end = rows < VF_LANES && reach > rows * rows && t->y_room < reach;
            if (end) vf_store_n(to, sum, rows);
            else vf_store(to, sum);
        }
        y += rows;
        DW_PIN_POINTER(y);
    }
}
#define DW_MAP_(name, rows, kh)                                                                    \
    static void name(const dw_rows *t, const dw_strip_masks *m, int64_t c, int64_t tail) {         \
        (void)c, (void)tail;                                                                       \
        dw_map(t, m, rows, ((rows) + VF_LANES - 1) / VF_LANES, kh);                                \
    }
#if VF_LANES >= 8
DW_MAP_(dw_map7_k3, 7, 3)
DW_MAP_(dw_map7_k5, 7, 5)
DW_MAP_(dw_map14_k3, 14, 3)
DW_MAP_(dw_map14_k5, 14, 5)
#endif

/* NULL: none for this shape. */
static dw_strip_fn dw_map_choose(const cbn_conv_dw_args *a) {
    const bool k3 = a->kh == 3, centred = a->ph == a->kh / 2 && a->pw == a->kw / 2 && a->oh == a->ih && a->ow == a->iw;
    if (a->sh != 1 || !centred || a->ih != a->iw || a->oh0 != 0 || a->oh1 != a->oh || (!k3 && a->kh != 5)) return NULL;
#if VF_LANES >= 8
    if (a->iw == 7) return k3 ? dw_map7_k3 : dw_map7_k5;
    if (a->iw == 14) return k3 ? dw_map14_k3 : dw_map14_k5;
#endif
    return NULL;
}

/* The strips of a row, as far as they are worth keeping from one run of rows to the next. */
enum { DW_KEPT_STRIPS = 8 };
typedef struct dw_strip_set {
    const dw_strip_family *f;
    int64_t n, vectors;
    dw_strip_call kept[DW_KEPT_STRIPS];
} dw_strip_set;

/* The first vector of strip i: vectors are shared out evenly. */
CBN_INLINE int64_t dw_strip_begin(const dw_strip_set *s, int64_t i) { return i * s->vectors / s->n; }

static void dw_strip_set_init(dw_strip_set *s, const dw_strip_family *f, const dw_rows *t) {
    s->f = f;
    s->vectors = (t->ow + VF_LANES - 1) / VF_LANES;
    s->n = (s->vectors + f->max_nv - 1) / f->max_nv;
    for (int64_t i = 0; i < CBN_MIN(s->n, DW_KEPT_STRIPS); i++)
        dw_strip_prepare(&s->kept[i], f, t, dw_strip_begin(s, i), dw_strip_begin(s, i + 1) - dw_strip_begin(s, i));
}

/* All columns of a run of rows. */
static void dw_strips(const dw_strip_set *s, const dw_rows *t) {
    for (int64_t i = 0; i < CBN_MIN(s->n, DW_KEPT_STRIPS); i++) dw_strip_run(&s->kept[i], t);
    for (int64_t i = DW_KEPT_STRIPS; i < s->n; i++) {
        dw_strip_call call;
        dw_strip_prepare(&call, s->f, t, dw_strip_begin(s, i), dw_strip_begin(s, i + 1) - dw_strip_begin(s, i));
        dw_strip_run(&call, t);
    }
    if (t->residual) dw_finish(t);
}

/* Planes that one strip covers. In networks there are hundreds of these in a layer, and finding the way through the
 * general code takes longer than computing one. */
static bool dw_strip_planes(const dw_strip_family *f, const cbn_conv_dw_args *a) {
    const int64_t taps = (int64_t)a->kh * a->kw, vectors = (a->ow + VF_LANES - 1) / VF_LANES;
    if (vectors > f->max_nv || a->kd != 1 || a->id != 1 || a->od != 1 || a->pd != 0 || a->dh != 1) return false;
    if (a->od1 <= a->od0 || a->oh1 <= a->oh0) return true;
    const int64_t ih = a->oh0 * a->sh - a->ph, rows = a->oh1 - a->oh0, out_plane = a->oh * a->ow;
    dw_rows t;
    t.x = a->x + ih * a->iw;
    t.w = a->w;
    t.y = a->y + a->oh0 * a->ow;
    t.residual = a->residual ? a->residual + a->oh0 * a->ow : NULL;
    t.x_plane = t.w_plane = 0;
    t.x_row = t.iw = a->iw;
    t.y_row = t.ow = a->ow;
    t.nd = 1;
    t.rows = (int32_t)rows;
    t.kw = a->kw, t.pw = a->pw;
    t.row_lo = CBN_MAX(-ih, 0);
    t.row_hi = CBN_MAX(t.row_lo, CBN_MIN(a->ih - ih, (rows - 1) * a->sh + a->kh));
    t.y_room = 0;
    t.bias = a->bias, t.lo = a->lo, t.hi = a->hi;
    dw_strip_call call;
    dw_strip_prepare(&call, f, &t, 0, vectors);
    const dw_strip_fn map = dw_map_choose(a);
    if (map) call.run = map;
    const bool whole = rows == a->oh;
    for (int64_t i = 0;; i++) {
        if (a->ow < VF_LANES) t.y_room = whole ? (a->more - i + 1) * out_plane : rows * a->ow;
        dw_strip_run(&call, &t);
        if (t.residual) {
            dw_finish(&t);
            t.residual += out_plane;
        }
        if (i == a->more) return true;
        t.x += a->x_step;
        t.w += taps;
        t.y += out_plane;
        t.bias = a->more_bias[i];
    }
}
