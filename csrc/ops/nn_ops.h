/* SPDX-License-Identifier: BSD-3-Clause */
/* What a CNN needs around its convolutions: pooling, batch normalisation, elementwise functions, softmax, padding.
 *
 * Arrays are C-contiguous and of one dtype (float16 is computed in float32 and rounded once, float64 stays float64).
 * x and y may not overlap unless a function says so. Work above ~20 us is shared by cbn_parallel_for; results do not
 * depend on the number of threads. Everything is thread-safe. Failures leave the outputs untouched. */
#ifndef CBN_NN_OPS_H
#define CBN_NN_OPS_H
#include "base/cbn_status.h"
#include "kernels/cbn_kernels.h"
#include "ops/bn_fold.h"
#include "ops/conv_desc.h"

/* ---- pooling --------------------------------------------------------------------------------------------------- */

/* One pooling problem, normalised to three axes (unit axes in front). x: [planes][in...], y: [planes][out...]. */
typedef struct cbn_pool_desc {
    cbn_dtype dtype;
    int nd;
    int64_t planes; /* batch * channels; 0 is allowed */
    int64_t in[CBN_MAX_SPATIAL], out[CBN_MAX_SPATIAL], k[CBN_MAX_SPATIAL];
    int64_t stride[CBN_MAX_SPATIAL], pad[CBN_MAX_SPATIAL], dil[CBN_MAX_SPATIAL];
    bool count_include_pad; /* average only */
    int64_t divisor;        /* average only; 0: the number of elements of the window */
} cbn_pool_desc;

/* Fills *d from nd user entries per list (dilation may be NULL: 1) and computes the output sizes. ceil_mode as in
 * PyTorch: a last window that would start in the right padding is dropped. Checks k, stride, dilation >= 1,
 * 0 <= pad <= k/2 and output sizes >= 1; messages name the argument and both numbers. */
CBN_NODISCARD cbn_status cbn_pool_desc_make(cbn_dtype dtype, int nd, int64_t planes, const int64_t *in,
                                            const int64_t *k, const int64_t *stride, const int64_t *pad,
                                            const int64_t *dil, bool ceil_mode, cbn_pool_desc *d,
                                            cbn_error *err);
/* Padding counts as -inf; a NaN in the window gives NaN. */
CBN_NODISCARD cbn_status cbn_max_pool(const cbn_pool_desc *d, const void *x, void *y, cbn_error *err);
/* Padding counts as 0 and is part of the divisor when count_include_pad. */
CBN_NODISCARD cbn_status cbn_avg_pool(const cbn_pool_desc *d, const void *x, void *y, cbn_error *err);
/* Output j of an axis averages inputs floor(j*in/out) .. ceil((j+1)*in/out) - 1. Uses d->in, d->out, d->planes. */
CBN_NODISCARD cbn_status cbn_adaptive_avg_pool(const cbn_pool_desc *d, const void *x, void *y,
                                               cbn_error *err);

/* ---- batch normalisation --------------------------------------------------------------------------------------- */

/* x and y: [n][c][inner]; y == x is allowed. bn->weight and bn->bias may be absent (1 and 0).
 * y = (x - mean) * (gamma / sqrt(var + eps)) + beta, coefficients in float64. */
CBN_NODISCARD cbn_status cbn_batch_norm_eval(cbn_dtype dtype, int64_t n, int64_t c, int64_t inner,
                                             const void *x, const cbn_bn *bn, void *y, cbn_error *err);
/* The same with the statistics of the batch (biased variance). Then running = (1 - momentum)*running + momentum*batch
 * (unbiased variance) is written to bn->mean and bn->var where they are present. n*inner must be at least 2 (0 with
 * n == 0 leaves everything as it is). */
CBN_NODISCARD cbn_status cbn_batch_norm_train(cbn_dtype dtype, int64_t n, int64_t c, int64_t inner,
                                              const void *x, const cbn_bn *bn, double momentum, void *y,
                                              cbn_error *err);

/* ---- elementwise ----------------------------------------------------------------------------------------------- */

/* y[i] = act(x[i]; a, b); y == x is allowed. */
CBN_NODISCARD cbn_status cbn_unary(cbn_dtype dtype, cbn_act act, double a, double b, const void *x, void *y,
                                   int64_t n, cbn_error *err);

typedef enum { CBN_BINARY_ADD, CBN_BINARY_MUL } cbn_binary_kind;
/* out = x + alpha*z or x * z over `shape`, with strides in elements (0 repeats an axis). out is C-contiguous and may
 * equal an operand that has the full shape. */
CBN_NODISCARD cbn_status cbn_binary(cbn_dtype dtype, cbn_binary_kind kind, int ndim, const int64_t *shape,
                                    const void *x, const int64_t *x_stride, const void *z,
                                    const int64_t *z_stride, double alpha, void *out, cbn_error *err);

/* Softmax along the middle axis of [outer][len][inner]; y == x is allowed. */
CBN_NODISCARD cbn_status cbn_softmax(cbn_dtype dtype, int64_t outer, int64_t len, int64_t inner, const void *x,
                                     void *y, cbn_error *err);

/* Output sizes of a padding; checks that nothing gets below 0 and the limits of each mode: reflect needs pads < size,
 * circular pads <= size, both of them and replicate pads of at least 0 or a crop that leaves something. */
CBN_NODISCARD cbn_status cbn_pad_shape(int ndim, const int64_t *shape, const int64_t *lo, const int64_t *hi,
                                       cbn_pad_mode mode, int64_t *out_shape, cbn_error *err);
/* y[..., i, ...] = x[..., source(i - lo), ...]; negative pads crop. CBN_MODE_ZEROS fills with `value`. The arguments must
 * have passed cbn_pad_shape. */
CBN_NODISCARD cbn_status cbn_pad(cbn_dtype dtype, int ndim, const int64_t *shape, const int64_t *lo,
                                 const int64_t *hi, cbn_pad_mode mode, double value, const void *x, void *y,
                                 cbn_error *err);
#endif
