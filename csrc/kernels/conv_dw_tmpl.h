/* SPDX-License-Identifier: BSD-3-Clause */
/* conv_dw: one channel plane of a depthwise convolution.
 *
 * Before: CBN_FN, the vector header of the ISA. Defines: CBN_FN(conv_dw).
 *
 * A tile is NR output rows x one vector of columns. The column tap is the outermost loop inside a tile: its kh weights
 * sit in registers while the input rows stream past, each loaded once and used for up to kh output rows. Registers:
 * NR sums + kh weights + 1 input (+ 1 mask), which fits 16; stride 2 reads two vectors, keeps the even columns for one
 * tap and the odd ones for the next, and takes the kernel rows in two halves by parity. Tiles at the border of the
 * image load under a mask and leave rows outside out, so there is no padded copy; the last tile of a row is moved left
 * to end with it, which computes some values twice instead of needing another code path.
 * Row dilation is a problem with dilation 1 for every dh-th row. The sum of one output takes the
 * taps in the order kd, kw, kh (stride 2: even kh first), in strips kh, kd, kw, and ends with the bias: to start with
 * it would make every partial sum larger, and with them the rounding errors. The common kernels, 3 x 3 and 5 x 5, go by
 * strips (conv_dw_strip_tmpl.h), all else by the tiles described here. */
#include "kernels/cbn_kernels.h"

/* Keeps a loaded vector in its register: gcc 12 otherwise loads it again as the memory operand of each multiply-add,
 * and unaligned loads are what limits these loops. */
#if defined(__x86_64__)
#define DW_PIN(v) __asm__("" : "+v"(v))
#elif defined(__aarch64__)
#define DW_PIN(v) __asm__("" : "+w"(v))
#else
#define DW_PIN(v) ((void)0)
#endif
/* Lets the row pointer walk: gcc otherwise keeps a multiple of the pitch for every row, more than it has registers. */
#define DW_PIN_POINTER(p) __asm__("" : "+r"(p))

enum { DW_MAX_NR = 8, DW_MAX_KH = 7, DW_LINE_NV = 8, DW_ANY_NR = 4, DW_BLOCK = 3500 };

/* A row of tiles: `rows` output rows from one, every vector of columns from one. */
typedef struct dw_rows {
    const float *x; /* depth tap 0, kernel row 0: the input row that output row 0 meets, column 0 of the image */
    const float *w; /* of depth tap 0 */
    float *y;
    const float *residual;
    int64_t x_plane, x_row, y_row; /* steps */
    int64_t w_plane;
    int64_t row_lo, row_hi; /* input rows [row_lo, row_hi), counted from x, are inside the image and needed */
    int64_t iw, ow;
    int64_t y_room; /* rows shorter than a vector: elements of y from here on that this call writes in this order */
    int32_t nd;     /* depth taps inside the image */
    int32_t rows;   /* output rows wanted, <= NR */
    int32_t kh, kw, dw, pw, sh, sw, dh;
    float bias, lo, hi;
} dw_rows;

/* Bounds and residual, which an epilogue keeps in registers. */
typedef struct dw_end {
    vf lo, hi;
    const float *residual;
} dw_end;
CBN_INLINE dw_end dw_end_of(const dw_rows *t) { return (dw_end){vf_set1(t->lo), vf_set1(t->hi), t->residual}; }

/* The first `cols` lanes of v go to y[at]. */
CBN_INLINE void dw_store(const dw_rows *t, const dw_end *e, int64_t at, vf v, int64_t cols) {
    v = vf_min(e->hi, vf_max(e->lo, v));
    /* A row shorter than a vector may run over into the next one, which is written later. */
    if (cols == VF_LANES || t->y_room - at >= VF_LANES) vf_store(t->y + at, v);
    else vf_store_n(t->y + at, v, cols);
}

CBN_INLINE int64_t dw_clip(int64_t v) { return CBN_MAX(0, CBN_MIN(v, VF_LANES)); }

/* What a tile has to look out for. */
typedef enum { DW_INSIDE, DW_COLUMNS, DW_ALL } dw_border; /* nothing, columns, rows and columns outside the image */

/* One column tap, or with `pair` (stride 2) two neighbouring ones, for the input rows i = parity, parity + s, ... of a
 * tile. x: the input that lane 0 of output row 0 meets at the tap of weights w[j*kw]; col: its column in the image.
 * Input row i belongs to output row r at kernel row i - r*s, so stride 2 splits the kernel rows by parity as well. */
CBN_INLINE void dw_tap(vf *acc, const dw_rows *t, const float *x, const float *w, int64_t col, const int nr,
                       const int kh, const int s, const int parity, const bool pair, const dw_border border) {
    const int ni = (nr - 1) * s + kh;
    const int64_t step = t->x_row * s;
    const int64_t lo = dw_clip(-col), hi = dw_clip(t->iw - col);
    const int64_t lo2 = dw_clip(-col - VF_LANES), hi2 = dw_clip(t->iw - col - VF_LANES);
    static const float zeros[2 * VF_LANES] = {0}; /* a row outside the image */
    vf we[DW_MAX_KH], wo[DW_MAX_KH];
    CBN_UNROLL for (int j = parity; j < kh; j += s) {
        we[j] = vf_set1(w[j * t->kw]);
        wo[j] = pair ? vf_set1(w[j * t->kw + 1]) : we[j];
    }
    const float *p = x + parity * t->x_row;
    CBN_UNROLL for (int i = parity; i < ni; i += s, p += step) {
        DW_PIN_POINTER(p);
        const float *src = p;
        /* Measured: with stride 2 it is faster to add zeros than to branch around the multiply-adds. */
        if (border == DW_ALL && s == 1 && (i < t->row_lo || i >= t->row_hi)) continue;
        if (border == DW_ALL && s == 2 && (uint64_t)(i - t->row_lo) >= (uint64_t)(t->row_hi - t->row_lo)) src = zeros;
        vf q = border == DW_INSIDE ? vf_load(src) : vf_load_range(src, lo, hi), u = q;
        if (s == 2) {
            src += VF_LANES;
            u = border == DW_INSIDE ? vf_load(src) : vf_load_range(src, lo2, hi2);
            const vf even = vf_even_mixed(q, u);
            u = vf_odd_mixed(q, u);
            q = even;
        }
        DW_PIN(q);
        CBN_UNROLL for (int j = parity; j < kh; j += s) {
            if (i >= j && (i - j) / s < nr) acc[(i - j) / s] = vf_fma(we[j], q, acc[(i - j) / s]);
        }
        if (!pair) continue;
        DW_PIN(u);
        CBN_UNROLL for (int j = parity; j < kh; j += s) {
            if (i >= j && (i - j) / s < nr) acc[(i - j) / s] = vf_fma(wo[j], u, acc[(i - j) / s]);
        }
    }
}

/* One tile; c: its first output column. nr, kh, s (row and column stride, 1 or 2) and border are constants. */
CBN_INLINE void dw_tile(const dw_rows *t, int64_t c, const int nr, const int kh, const int s, const dw_border border) {
    vf acc[DW_MAX_NR];
    CBN_UNROLL for (int r = 0; r < nr; r++) acc[r] = vf_zero();
    for (int32_t d = 0; d < t->nd; d++) {
        int64_t col = c * s - t->pw;
        const float *x = t->x + d * t->x_plane + col, *w = t->w + d * t->w_plane;
        int32_t k = 0;
        if (s == 1) {
            for (; k < t->kw; k++, w++, x += t->dw, col += t->dw)
                dw_tap(acc, t, x, w, col, nr, kh, 1, 0, false, border);
            continue;
        }
        /* A pair of taps comes from the same two loads. It begins at an even column, where rows of many images are
         * aligned to a cache line. */
        while (k < t->kw) {
            if (k + 1 < t->kw && (col & 1) == 0) {
                dw_tap(acc, t, x, w, col, nr, kh, 2, 0, true, border);
                dw_tap(acc, t, x, w, col, nr, kh, 2, 1, true, border);
                k += 2, w += 2, x += 2, col += 2;
            } else {
                dw_tap(acc, t, x, w, col, nr, kh, 2, 0, false, border);
                dw_tap(acc, t, x, w, col, nr, kh, 2, 1, false, border);
                k++, w++, x++, col++;
            }
        }
    }
    const int64_t cols = border == DW_INSIDE ? VF_LANES : CBN_MIN(t->ow, VF_LANES);
    const dw_end e = dw_end_of(t);
    if (border == DW_INSIDE) {
        /* The rows that the next block reads first: too many streams for the hardware to follow. */
        const float *p = t->x + ((nr - 1) * s + kh) * t->x_row + c * s;
        CBN_UNROLL for (int r = 0; r < nr * s; r++, p += t->x_row) {
            DW_PIN_POINTER(p);
            __builtin_prefetch(p);
        }
    }
    const vf bias = vf_set1(t->bias);
    CBN_UNROLL for (int r = 0; r < nr; r++) acc[r] = vf_add(s == 2 ? vf_unmix(acc[r]) : acc[r], bias);
    if (e.residual) {
        CBN_UNROLL for (int r = 0; r < nr; r++) {
            if (border == DW_ALL && r >= t->rows) break;
            acc[r] = vf_add(acc[r], vf_load_n(e.residual + r * t->y_row + c, cols));
        }
    }
    CBN_UNROLL for (int r = 0; r < nr; r++) {
        if (border == DW_ALL && r >= t->rows) break;
        dw_store(t, &e, r * t->y_row + c, acc[r], cols);
    }
}

/* All columns of one block of rows: tiles VF_LANES apart, the last one moved left to end with the row. `inside`: no row
 * outside the image and none too many; then columns [lo, hi) need no masks. */
#define DW_DEFINE_(name, nr, kh, s)                                                                \
    static void name(const dw_rows *rows, int64_t lo, int64_t hi, bool inside) {                   \
        const dw_rows t = *rows; /* stores to y may not change a local copy */                     \
        const int64_t last = CBN_MAX(t.ow - VF_LANES, 0);                                          \
        int64_t c = 0;                                                                             \
        if (!inside) {                                                                             \
            for (; c < t.ow; c += VF_LANES) dw_tile(&t, CBN_MIN(c, last), nr, kh, s, DW_ALL);      \
            return;                                                                                \
        }                                                                                          \
        while (c < t.ow) {                                                                         \
            if (c == lo)                                                                           \
                for (; c < hi; c += VF_LANES) dw_tile(&t, c, nr, kh, s, DW_INSIDE);                \
            if (c < t.ow) dw_tile(&t, CBN_MIN(c, last), nr, kh, s, DW_COLUMNS);                    \
            c += VF_LANES;                                                                         \
        }                                                                                          \
    }
DW_DEFINE_(dw_k1, 8, 1, 1)
DW_DEFINE_(dw_t_k3, 8, 3, 1)
DW_DEFINE_(dw_t_k5, 8, 5, 1)
DW_DEFINE_(dw_k7, 7, 7, 1)
DW_DEFINE_(dw_t_k3s2, 8, 3, 2)
DW_DEFINE_(dw_t_k5s2, 7, 5, 2)
DW_DEFINE_(dw_k7s2, 4, 7, 2)

/* ---- one row: vectors side by side instead of rows --------------------------------------------------------------- */

CBN_INLINE void dw_line_tile(const dw_rows *t, int64_t c, const bool checked) {
    vf acc[DW_LINE_NV];
    CBN_UNROLL for (int v = 0; v < DW_LINE_NV; v++) acc[v] = vf_zero();
    for (int32_t d = 0; d < t->nd; d++)
        for (int32_t k = 0; k < t->kw; k++) {
            const int64_t col = c - t->pw + (int64_t)k * t->dw;
            const float *x = t->x + d * t->x_plane + col;
            const vf w = vf_set1(t->w[d * t->w_plane + k]);
            CBN_UNROLL for (int v = 0; v < DW_LINE_NV; v++) {
                const int64_t at = col + v * VF_LANES;
                const vf q = checked ? vf_load_range(x + v * VF_LANES, dw_clip(-at), dw_clip(t->iw - at))
                                     : vf_load(x + v * VF_LANES);
                acc[v] = vf_fma(w, q, acc[v]);
            }
        }
    const dw_end e = dw_end_of(t);
    CBN_UNROLL for (int v = 0; v < DW_LINE_NV; v++) {
        const int64_t at = c + v * VF_LANES;
        if (checked && at >= t->ow) break;
        const int64_t cols = checked ? CBN_MIN(t->ow - at, VF_LANES) : VF_LANES;
        acc[v] = vf_add(acc[v], vf_set1(t->bias));
        if (e.residual) acc[v] = vf_add(acc[v], vf_load_n(e.residual + at, cols));
        dw_store(t, &e, at, acc[v], cols);
    }
}

static void dw_line(const dw_rows *rows, int64_t lo, int64_t hi, bool inside) {
    const dw_rows t = *rows;
    (void)inside;
    for (int64_t c = 0; c < t.ow; c += DW_LINE_NV * VF_LANES) dw_line_tile(&t, c, c < lo || c >= hi);
}

/* ---- anything ---------------------------------------------------------------------------------------------------- */

/* Lanes lo <= l < hi of p[l*s]. */
CBN_INLINE vf dw_load_step(const float *p, int64_t s, int64_t lo, int64_t hi) {
    float lane[VF_LANES] = {0};
    if (s == 1) return vf_load_range(p, lo, hi);
    for (int64_t l = lo; l < hi; l++) lane[l] = p[l * s];
    return vf_load(lane);
}

/* row_lo and row_hi count image rows here: tap i of output row r is row r*sh + i*dh. */
static void dw_any(const dw_rows *t, int64_t in_lo, int64_t in_hi, bool inside) {
    (void)in_lo, (void)in_hi, (void)inside;
    for (int64_t c = 0; c < t->ow; c += VF_LANES) {
        vf acc[DW_ANY_NR];
        CBN_UNROLL for (int r = 0; r < DW_ANY_NR; r++) acc[r] = vf_zero();
        const int64_t cols = CBN_MIN(t->ow - c, VF_LANES);
        for (int32_t d = 0; d < t->nd; d++)
            for (int32_t k = 0; k < t->kw; k++) {
                const int64_t col = c * t->sw - t->pw + (int64_t)k * t->dw;
                const int64_t lo = col >= 0 ? 0 : CBN_MIN(cols, cbn_ceil_div(-col, t->sw));
                const int64_t hi = col >= t->iw ? 0 : CBN_MIN(cols, cbn_ceil_div(t->iw - col, t->sw));
                if (hi <= lo) continue;
                for (int32_t j = 0; j < t->kh; j++) {
                    const float *w = t->w + d * t->w_plane + (int64_t)j * t->kw + k;
                    CBN_UNROLL for (int r = 0; r < DW_ANY_NR; r++) {
                        const int64_t row = (int64_t)r * t->sh + (int64_t)j * t->dh;
                        if (r >= t->rows || row < t->row_lo || row >= t->row_hi) continue;
                        const float *x = t->x + d * t->x_plane + row * t->x_row + col;
                        acc[r] = vf_fma(vf_set1(*w), dw_load_step(x, t->sw, lo, hi), acc[r]);
                    }
                }
            }
        const dw_end e = dw_end_of(t);
        CBN_UNROLL for (int r = 0; r < DW_ANY_NR; r++) {
            const int64_t at = r * t->y_row + c;
            if (r >= t->rows) break;
            acc[r] = vf_add(acc[r], vf_set1(t->bias));
            if (e.residual) acc[r] = vf_add(acc[r], vf_load_n(e.residual + at, cols));
            dw_store(t, &e, at, acc[r], cols);
        }
    }
}

#include "kernels/conv_dw_strip_tmpl.h"

/* ---- choosing ---------------------------------------------------------------------------------------------------- */

/* lo, hi: columns (whole tiles) that read inside the image only; inside: so do all rows. */
typedef void (*dw_rows_fn)(const dw_rows *t, int64_t lo, int64_t hi, bool inside);
typedef struct dw_family {
    int32_t nr, kh, s;
    dw_rows_fn run;
} dw_family;

static const dw_family *dw_choose(const cbn_conv_dw_args *a) {
    static const dw_family families[] = {
        {8, 3, 1, dw_t_k3},   {8, 5, 1, dw_t_k5},   {7, 7, 1, dw_k7},   {8, 1, 1, dw_k1},
        {8, 3, 2, dw_t_k3s2}, {7, 5, 2, dw_t_k5s2}, {4, 7, 2, dw_k7s2},
    };
    static const dw_family line = {1, 1, 1, dw_line};
    static const dw_family any = {DW_ANY_NR, 0, 0, dw_any};
    if (a->oh == 1 && a->kh == 1 && a->ph == 0 && a->sw == 1) return &line;
    if (a->sh != a->sw && a->kh != 1) return &any;
    if (a->sw == 2 && (a->dh != 1 || a->dw != 1)) return &any;
    if (a->kh == 1 && a->sh != 1) return &any;
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++)
        if (families[i].kh == a->kh && families[i].s == a->sw) return &families[i];
    return &any;
}

/* Divisions take longer than a small tile, and most strides and dilations are 1. */
CBN_INLINE int64_t dw_ceil_div(int64_t a, int64_t b) { return b == 1 ? a : cbn_ceil_div(a, b); }

/* Output columns [*lo, *hi), a whole number of tiles of `step` columns from *lo on, that read inside the image only. */
static void dw_inner_columns(const cbn_conv_dw_args *a, int64_t step, int64_t *lo, int64_t *hi) {
    const int shift = a->sw - 1; /* the stride is 1 or 2 here, and step a power of two */
    const int64_t reach = (int64_t)(a->kw - 1) * a->dw + shift;
    *lo = (((a->pw + shift) >> shift) + step - 1) & -step;
    const int64_t last = a->iw - 1 - reach + a->pw; /* the last column times stride that still may be a lane */
    const int64_t end = last < 0 ? 0 : CBN_MIN(a->ow, (last >> shift) + 1);
    *hi = *lo + (end > *lo ? (end - *lo) & -step : 0);
    if (*hi == *lo) *lo = *hi = 0;
}

static void dw_plane(const cbn_conv_dw_args *a, const dw_strip_set *strip) {
    const dw_family *f = dw_choose(a);
    /* A strip walks down as many rows as the nearest cache holds. */
    const int64_t nr = strip ? CBN_MAX(DW_BLOCK / CBN_MAX(a->iw * a->sh, 1), 16) : f->nr;
    const bool any = f->kh == 0, line = f->nr == 1;
    const int64_t step = line ? DW_LINE_NV * VF_LANES : VF_LANES;
    /* Rows dh apart form a problem of their own with dilation 1. */
    const int64_t phases = any ? 1 : CBN_MIN(a->dh, CBN_MAX(a->oh1 - a->oh0, 1));
    const int64_t row_step = any ? 1 : a->dh;
    int64_t in_lo = 0, in_hi = 0;
    if (!any && a->iw > step * a->sw) dw_inner_columns(a, step, &in_lo, &in_hi);
    dw_rows t; /* assigned field by field: an initialiser clears it first, which takes as long as a small plane */
    t.x_plane = a->dd * a->ih * a->iw;
    t.x_row = row_step * a->iw;
    t.y_row = row_step * a->ow;
    t.w_plane = (int64_t)a->kh * a->kw;
    t.iw = a->iw, t.ow = a->ow;
    t.kh = a->kh, t.kw = a->kw;
    t.sh = a->sh, t.sw = a->sw;
    t.dh = a->dh, t.dw = a->dw;
    t.pw = a->pw;
    t.bias = a->bias, t.lo = a->lo, t.hi = a->hi;
    for (int64_t od = a->od0; od < a->od1; od++) {
        const int64_t id = od * a->sd - a->pd;
        const int64_t d0 = id >= 0 ? 0 : CBN_MIN(a->kd, dw_ceil_div(-id, a->dd));
        const int64_t d1 = id >= a->id ? 0 : CBN_MIN(a->kd, dw_ceil_div(a->id - id, a->dd));
        t.nd = (int32_t)CBN_MAX(d1 - d0, 0);
        t.w = a->w + d0 * t.w_plane;
        for (int64_t phase = 0; phase < phases; phase++)
            for (int64_t oh = a->oh0 + phase; oh < a->oh1; oh += nr * row_step) {
                const int64_t ih = oh * a->sh - a->ph;
                t.rows = (int32_t)CBN_MIN(nr, dw_ceil_div(a->oh1 - oh, row_step));
                t.x = a->x + ((id + d0 * a->dd) * a->ih + ih) * a->iw;
                t.y = a->y + (od * a->oh + oh) * a->ow;
                t.residual = a->residual ? a->residual + (od * a->oh + oh) * a->ow : NULL;
                t.y_room = phases == 1 && a->ow < VF_LANES ? (a->oh1 - oh) * a->ow : 0;
                t.row_lo = ih >= 0 ? 0 : dw_ceil_div(-ih, row_step);
                t.row_hi = ih >= a->ih ? 0 : dw_ceil_div(a->ih - ih, row_step);
                const int64_t needed = (int64_t)(t.rows - 1) * f->s + f->kh;
                const bool inside = t.rows == nr && t.row_lo == 0 && t.row_hi >= needed;
                if (!any) t.row_hi = CBN_MAX(t.row_lo, CBN_MIN(t.row_hi, needed));
                if (strip) dw_strips(strip, &t);
                else f->run(&t, in_lo, in_hi, inside);
            }
    }
}

static void CBN_FN(conv_dw)(const cbn_conv_dw_args *a) {
    assert(a->kd >= 1 && a->kh >= 1 && a->kw >= 1 && a->sd >= 1 && a->sh >= 1 && a->sw >= 1);
    const dw_strip_family *strip = dw_strip_choose(a);
    if (strip && dw_strip_planes(strip, a)) return;
    dw_strip_set set;
    if (strip) {
        dw_rows t;
        t.iw = a->iw, t.ow = a->ow;
        t.kw = a->kw, t.pw = a->pw;
        dw_strip_set_init(&set, strip, &t);
    }
    const dw_strip_set *const strips = strip ? &set : NULL;
    dw_plane(a, strips);
    if (a->more == 0) return;
    cbn_conv_dw_args p = *a;
    for (int64_t i = 0; i < a->more; i++) {
        p.x += a->x_step;
        p.w += (int64_t)a->kd * a->kh * a->kw;
        p.y += a->od * a->oh * a->ow;
        if (p.residual) p.residual += a->od * a->oh * a->ow;
        p.bias = a->more_bias[i];
        dw_plane(&p, strips);
    }
}
