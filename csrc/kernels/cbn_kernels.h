/* SPDX-License-Identifier: BSD-3-Clause */
/* THE list of kernels. Tables, tests and benchmarks expand it; adding a kernel is one line here, one template, its
 * test and its benchmark entry.
 *
 * Kernels never allocate, thread, report errors or read globals. Their preconditions are asserts. All sizes and
 * offsets are in elements. Every kernel reads and writes exactly the elements its contract names (guard-page safe).
 * Scalar, AVX2, AVX-512 and NEON tables hold the same functions; the sum of one output element is taken in the same
 * order by all of them: channels outermost, then taps in the order given, each one fused multiply-add. */
#ifndef CBN_KERNELS_H
#define CBN_KERNELS_H
#include "base/cbn_base.h"

/* y = clamp(acc + bias [+ residual], lo, hi); NaN passes through. No activation: lo = -inf, hi = +inf. */
typedef struct cbn_epilogue_args {
    const float *bias;     /* one per output channel of the block, never NULL (zeros instead) */
    const float *residual; /* NULL, or laid out exactly as y (same offsets) */
    float lo, hi;
} cbn_epilogue_args;

/* conv_oc: one tile of a convolution, output channels in vector lanes, pixels broadcast.
 *   acc[p][c] (+)= sum over i < ic, t < ntaps of w[i*w_ic + tap_w[t] + c] * x[xpix[p] + i*x_ic + tap_x[t]]
 * for p < np pixels and c < vw = nv*lanes channels. Which pixels share a tile is free: xpix is any list, so one kernel
 * serves every stride, dilation, padding (taps outside the image are simply not in the list), 1-D to 3-D, transposed
 * convolution by phases, and linear (pixels = rows of the batch). */
typedef struct cbn_conv_oc_args {
    const float *x;
    const int64_t *xpix; /* [np] */
    int64_t x_ic;
    const float *w; /* packed [ic][taps][vw] */
    int64_t w_ic;
    int64_t ic;
    int64_t ntaps;        /* 0 is allowed: the sum is then 0 */
    const int64_t *tap_x; /* [ntaps] */
    const int64_t *tap_w; /* [ntaps] */
    float *acc;           /* [np][vw], 64-byte aligned; may be NULL when load_acc = false and y != NULL */
    bool load_acc;        /* start from acc instead of 0 */
    float *y;             /* NULL: store the sums to acc; else run the epilogue into y[ypix[p] + c*y_oc], c < oc_valid */
    const int64_t *ypix;  /* [np] */
    int64_t y_oc;
    int32_t oc_valid; /* 1 .. vw */
    bool y_run;       /* ypix[p] == ypix[0] + p: lets the store write rows */
    const float *prefetch; /* NULL, or a place to touch one line of every prefetch_step elements, one a channel */
    int64_t prefetch_step;
    cbn_epilogue_args epi;
} cbn_conv_oc_args;

/* conv_px: one tile of a pointwise (1x1, stride 1) convolution, pixels in vector lanes, weights broadcast.
 *   y[c*y_oc + p] = epilogue(sum over k < ic of w[k*mr + c] * x[k*x_ic + p]),  c < oc_valid <= mr, p < np <= nv*lanes
 * with weights packed [ic][mr] (zero padded), CBN_PX_MR_MIN(table->px_mr) <= mr <= table->px_mr. */
#define CBN_PX_MR_MIN(px_mr) ((px_mr) / 2 + 1)
typedef struct cbn_conv_px_args {
    const float *x;
    int64_t x_ic;
    bool x_padded; /* rows of x can be read up to a whole number of vectors */
    float *copy;   /* NULL, or [ic][np in whole vectors]: becomes the rows of x, zeros where they end */
    const float *w;
    int32_t mr; /* 0: px_mr */
    int64_t ic;
    float *y;
    int64_t y_oc;
    int32_t oc_valid;
    int32_t np;
    const float *prefetch;    /* NULL, or a place to touch one line of every prefetch_step elements, one a k step */
    int64_t prefetch_step;
    int32_t panels;  /* 0, or so many tiles of np pixels (whole vectors) side by side in y, their x x_panel apart */
    int64_t x_panel; /* their copies are ic*np apart */
    cbn_epilogue_args epi;
} cbn_conv_px_args;

/* conv_tap: convolution with pixels in vector lanes, weights broadcast, mr output channels.
 *   y[c*y_oc + ypix[v] + l] = epilogue(sum over t < ntaps of w[t*mr + c] * x[xpix[v] + tap[t] + l])
 * for c < mr, v < nv, l < lanes; whole vectors of x are read. `tap` lists channels and the taps of each, so any geometry
 * whose pixels are neighbours in x will do. mr in 1..table->tap_mr; a register tile is cbn_tap_nv(table, mr) vectors. */
enum { CBN_TAP_MAX_NV = 8 };
typedef struct cbn_conv_tap_args {
    const float *x;
    const int64_t *xpix; /* [nv] */
    const int32_t *tap;  /* [ntaps] */
    int64_t ntaps;
    int64_t more_runs, skip; /* as many runs of ntaps taps again, each `skip` entries of tap and w behind the last */
    const float *w;          /* [ntaps][mr] */
    float *y;
    const int64_t *ypix; /* [nv] */
    int64_t y_oc;
    int64_t nv;
    int64_t lanes; /* 1 .. table->lanes: how many of each vector are stored */
    cbn_epilogue_args epi;
} cbn_conv_tap_args;

/* rows_copy: for i < ic, r < rows, c < n, n a multiple of the table's lanes
 *   to[i*to_ic + r*to_row + c] = 0 <= x0 + c*step < w ? x[i*x_ic + r*x_row + x0 + c*step] : 0
 * Reads inside 0 .. w-1 of each row only; w may be 0. */
typedef struct cbn_rows_copy_args {
    float *to;
    int64_t to_ic, to_row;
    const float *x;
    int64_t x_ic, x_row;
    int64_t ic, rows, n;
    int64_t x0, step, w;
} cbn_rows_copy_args;

/* linear: y[p*y_p + c] = epilogue(sum over k < ic of w[(c/W)*w_b + k*W + c%W] * x[p*x_p + k]),  c < oc_valid, W = 2*lanes.
 * A long sum may be taken in pieces: all but the last leave it unfinished in y.
 * linear_raw: the same, of weights as they come, w[c*w_b + k], and whole sums only. */
enum { CBN_LINEAR_ROWS = 6, CBN_LINEAR_RAW_ROWS = 3 };
typedef struct cbn_linear_args {
    const float *x;
    int64_t x_p;
    const float *w; /* blocks [ic][W], w_b apart, zeros beyond the last channel */
    int64_t w_b, ic;
    float *y;
    int64_t y_p, oc_valid; /* any number of channels */
    bool first, last;      /* piece of the sum; later ones start from y, the last one runs the epilogue */
    const float *prefetch; /* NULL, or a place to touch one line of every prefetch_step elements, one a k step */
    int64_t prefetch_step;
    cbn_epilogue_args epi;
} cbn_linear_args;

/* conv_dw: one channel plane of a depthwise convolution (multiplier handled by the caller: one call per output channel).
 *   y[(a*oh + b)*ow + c] = epilogue(sum over taps of w[tap] * x[...]) with zero padding, any stride and dilation,
 * for output planes a in [od0, od1) and rows b in [oh0, oh1). x and y point at the channel's first element. Padding may be
 * multiplied by the weights, so they must be finite where it is met. */
typedef struct cbn_conv_dw_args {
    const float *x;
    const float *w; /* [kd][kh][kw] */
    float *y;
    const float *residual; /* NULL or laid out as y */
    float bias, lo, hi;
    int64_t id, ih, iw, od, oh, ow;
    int32_t kd, kh, kw;
    int32_t sd, sh, sw;
    int32_t pd, ph, pw; /* padding before; after it is implied by the output size */
    int32_t dd, dh, dw;
    int64_t od0, od1, oh0, oh1;
    /* Further planes of the same kind in one call, which is what makes small ones cheap: plane i = 1 .. more has
     * x + i*x_step, w + i*kd*kh*kw, y and residual + i*od*oh*ow and the bias more_bias[i - 1]. */
    int64_t more, x_step;
    const float *more_bias;
} cbn_conv_dw_args;

/* ---- Winograd convolution in five steps ----
 * L is the table's `lanes`. Between the steps channels lie in lanes: "a vector" is L floats, one for each of L
 * neighbouring channels, 64-byte aligned buffers. An axis of a tile has n points and m outputs, which makes it
 * F(m, n - m + 1); n = 1 (m = 1: the axis is left alone), 4 (points 0, 1, -1, inf) or 6 (points 0, +-5/8, +-3/2, inf).
 * With points p_i: outputs y_a = sum_i p_i^a M_i, where inf gives M to the last output alone; weights
 * U_i = sum_b p_i^b g_b / prod_{j != i} (p_i - p_j), where inf takes the last tap (ops/wino_matrix.h);
 * inputs V = B^T d, which depends on n only. */
typedef struct cbn_wino_in_args {
    int nh, nw;           /* points of the vertical and the horizontal axis */
    const float *row[6];  /* nh rows of ncols vectors, as lanes_gather makes them; may repeat */
    int64_t ncols;        /* 0, where both axes have points: tmp holds what an earlier call made of its columns */
    int64_t ntiles;
    const int32_t *col;   /* [ntiles] first column of each tile: any order, any overlap */
    int64_t step;         /* columns from one input of a tile to the next; all of them are < ncols */
    float *tmp;           /* nh*ncols vectors of scratch */
    float *v;             /* point (i, j) of tile t goes to v + (i*nw + j)*v_xi + t*L */
    int64_t v_xi;
} cbn_wino_in_args;

/* m[t*m_t + j*m_v + c] (+)= sum over k < nk of v[(k/L)*v_b + t*L + k%L] * u[k*nv*L + j*L + c]
 * for t < np tiles, j < nv vectors of output channels, c < L. Channels are summed `chunk` at a time (a multiple of L,
 * as is nk) and these sums added up in order, which keeps rounding errors small when there are many. */
typedef struct cbn_wino_gemm_args {
    const float *v;
    int64_t v_b;
    const float *u;
    int64_t nk, chunk;
    float *m;
    int64_t m_t, m_v;
    bool add; /* m holds earlier sums; false: what m holds is ignored */
} cbn_wino_gemm_args;

typedef struct cbn_wino_out_args {
    int nh, nw, mh, mw;
    const float *m; /* point (i, j) of tile t at m + t*m_t + (i*nw + j)*L */
    int64_t m_t;
    int64_t ntiles;
    const int32_t *col; /* [ntiles] column of each tile's first output */
    int64_t step;       /* columns from one output of a tile to the next */
    float *o;           /* output (i, j) of tile t goes to o + i*o_row + (col[t] + j*step)*L */
    int64_t o_row;
} cbn_wino_out_args;

/* Weights of one vector of output channels, n input channels, one piece of high x wide taps (at most 5 each):
 *   u[k*u_c + (i*nw + j)*u_xi + l] = sum over a, b of gh[i][a] * gw[j][b] * w[k*w_c + tap[a*wide + b] + l]
 * in float64, rounded once, for k < n, l < L; a tap < 0 is zero. gh and gw hold rows of 6, [nh] and [nw] of them, made by
 * cbn_wino_g: the points come as 0, p, -p, q, -q, inf, and only those of gh[0], gh[1], gh[3] are read. */
typedef struct cbn_wino_weights_args {
    int nh, nw, high, wide;
    const double *gh, *gw;
    const float *w;
    int64_t w_c;
    const int32_t *tap;
    float *u;
    int64_t u_c, u_xi;
    int64_t n;
} cbn_wino_weights_args;

/* One vector of a panel (kernel panel_pack). */
typedef struct cbn_panel_move {
    int64_t x, out;    /* where lane 0 comes from, where it goes */
    int16_t lo, hi, n; /* lanes lo <= l < hi are read, the others become 0; n >= 1 lanes are written */
    int16_t skip;      /* elements of x between those of neighbouring lanes: 0 or 1 */
} cbn_panel_move;

/* Activations that are more than a clamp. Both use the same formula as pyconvbn.functional. */
typedef enum {
    CBN_ACT_NONE, CBN_ACT_RELU, CBN_ACT_RELU6, CBN_ACT_LEAKY_RELU, CBN_ACT_SIGMOID, CBN_ACT_HARDTANH,
    CBN_ACT_HARDSWISH, CBN_ACT_SILU, CBN_ACT_GELU, CBN_ACT_GELU_TANH
} cbn_act;

/* Pooling along a line; contract at pool_max. */
typedef struct cbn_pool_args {
    float *y;
    const float *x;
    int64_t n, step;
    int64_t taps[2], apart[2];
} cbn_pool_args;

/* X(name, signature) */
#define CBN_KERNEL_LIST(X)                                                                         \
    /* np in 1..oc_np, nv in 1..oc_nv of the table */                                              \
    X(conv_oc, (int np, int nv, const cbn_conv_oc_args *a))                                        \
    X(conv_px, (const cbn_conv_px_args *a))                                                        \
    /* np in 1..CBN_LINEAR_ROWS */                                                                 \
    X(linear, (int np, const cbn_linear_args *a))                                                  \
    /* np in 1..CBN_LINEAR_RAW_ROWS */                                                             \
    X(linear_raw, (int np, const cbn_linear_args *a))                                              \
    X(conv_tap, (int mr, const cbn_conv_tap_args *a))                                              \
    X(rows_copy, (const cbn_rows_copy_args *a))                                                    \
    /* conv_px with weights for the two phases of a row in turn: y[c*y_oc + 2*p + r] = epilogue of c and the sum of  \
     * weights 2*c + r; mr is table->px_mr or 2 less, oc_valid is even and copy or x_padded set */  \
    X(conv_px2, (const cbn_conv_px_args *a))                                                       \
    X(conv_dw, (const cbn_conv_dw_args *a))                                                        \
    /* s[c*L + l] = x[l*x_c + x0 + c] where 0 <= x0 + c < w and l < nch, else 0; for c < n, l < L. Reads inside the row  \
     * only. */                                                                                    \
    X(lanes_gather, (float *s, const float *x, int64_t x_c, int nch, int64_t x0, int64_t n, int64_t w)) \
    X(wino_weights, (const cbn_wino_weights_args *a))                                              \
    X(wino_in, (const cbn_wino_in_args *a))                                                        \
    /* np >= 1: any number of tiles, taken in groups of at most wino_np; nv in 1..2 */              \
    X(wino_gemm, (int np, int nv, const cbn_wino_gemm_args *a))                                    \
    X(wino_out, (const cbn_wino_out_args *a))                                                      \
    /* y[l*y_c + c] = clamp(s[c*L + l] + bias[l] [+ residual[l*y_c + c]]) for c < n, l < nch; *nonfinite becomes true (and  \
     * is never set to false) when one of these s is Inf or NaN */                                 \
    X(lanes_scatter, (float *y, int64_t y_c, int nch, const float *s, int64_t n, const cbn_epilogue_args *e, bool *nonfinite)) \
    /* out[i*out_c + m.out + l] = m.lo <= l < m.hi ? x[i*x_c + m.x + l*(1 + m.skip)] : 0 for       \
     * i < n, l < m.n and the moves m. Within a channel they are made in order, so a later one may \
     * overwrite what an earlier one wrote too much; moves of different channels may not meet */   \
    X(panel_pack, (float *out, int64_t out_c, const float *x, int64_t x_c, int64_t n,              \
                   const cbn_panel_move *moves, int64_t nmoves))                                   \
    /* o = i*ns + r: y[c*y_c + o] = clamp(s[c*s_c + r*s_p + i] + bias[c] [+ residual[c*y_c + o]]) for o < n, c < nch  \
     * and r < ns: the phases of a row put together. Reads the elements of s named here only */    \
    X(interleave, (float *y, int64_t y_c, int nch, int ns, const float *s, int64_t s_c,            \
                   int64_t s_p, int64_t n, const cbn_epilogue_args *e))                            \
    /* y[i] = act(x[i]; a, b) for i < n; y == x is allowed. a, b: leaky slope; hardtanh bounds. */ \
    X(unary, (cbn_act act, float a, float b, float *y, const float *x, int64_t n))                 \
    /* y[i] = x[i]*scale + shift, y == x allowed */                                                \
    X(affine, (float *y, const float *x, float scale, float shift, int64_t n))                     \
    /* y[i] = x[i] + alpha*z[i] (one FMA); y may equal x or z */                                   \
    X(add, (float *y, const float *x, const float *z, float alpha, int64_t n))                     \
    X(mul, (float *y, const float *x, const float *z, int64_t n))                                  \
    /* y[i] = the largest x[i*step + r*apart[0] + t*apart[1]] with r < taps[0] and t < taps[1], for i < n; NaN wins. Between \
     * the first and the last element of each (r, t) the gaps may be read, too */                   \
    X(pool_max, (const cbn_pool_args *a))                                                          \
    /* the same with their sum, for each r all t in turn */                                        \
    X(pool_add, (const cbn_pool_args *a))                                                          \
    /* float16 (IEEE binary16 bit patterns) <-> float32; narrowing rounds to nearest even */       \
    X(widen_f16, (float *y, const uint16_t *x, int64_t n))                                         \
    X(narrow_f16, (uint16_t *y, const float *x, int64_t n))                                        \
    /* runs `iters` rounds of independent FMAs in registers, returns FLOPs done through *flops */  \
    X(fma_peak, (int64_t iters, double *flops, float *sink))

#define CBN_DECL_FN_(name, sig) typedef void(*cbn_##name##_fn) sig;
CBN_KERNEL_LIST(CBN_DECL_FN_)
#undef CBN_DECL_FN_

typedef struct cbn_kernels {
    const char *isa;
    uint32_t needs; /* CPU feature bits */
    int lanes;      /* floats in a vector */
    int oc_np, oc_nv; /* largest conv_oc tile: pixels, vectors of output channels */
    int px_mr, px_nv; /* largest conv_px tile: output channels, vectors of pixels */
    int tap_mr, tap_acc; /* conv_tap tile: output channels, sums in registers */
    int wino_np;      /* tiles of the image that wino_gemm sums at a time */
#define CBN_FIELD_(name, sig) cbn_##name##_fn name;
    CBN_KERNEL_LIST(CBN_FIELD_)
#undef CBN_FIELD_
    const struct cbn_amx *amx; /* kernels/cbn_amx.h; NULL: there is no matrix unit */
} cbn_kernels;

/* Vectors of pixels in a conv_tap tile of mr output channels. */
CBN_INLINE int cbn_tap_nv(const cbn_kernels *k, int mr) { return CBN_MIN(CBN_TAP_MAX_NV, k->tap_acc / mr); }

/* NULL-terminated, best first. Decided once; thread-safe. */
const cbn_kernels *const *cbn_kernels_compiled(void);
const cbn_kernels *const *cbn_kernels_available(void); /* those the (masked) CPU can run */
const cbn_kernels *cbn_kernels_active(void);
/* For tests: the active table with an emulated matrix unit, named amx_emulated; not among the available ones. */
const cbn_kernels *cbn_kernels_amx_emulated(void);
const char *const *cbn_kernel_names(int *count);
#endif
