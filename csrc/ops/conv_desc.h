/* SPDX-License-Identifier: BSD-3-Clause */
/* The problem a convolution solves, validated once; everything below asserts. */
#ifndef CBN_CONV_DESC_H
#define CBN_CONV_DESC_H
#include "base/cbn_base.h"
#include "base/cbn_status.h"

typedef enum { CBN_PAD_EXPLICIT, CBN_PAD_VALID, CBN_PAD_SAME } cbn_pad_kind;
typedef enum {
    CBN_MODE_ZEROS,
    CBN_MODE_REFLECT,
    CBN_MODE_REPLICATE,
    CBN_MODE_CIRCULAR
} cbn_pad_mode;

/* What the user said, without an input size. Per-axis fields hold nd entries in the user's axis
 * order. */
typedef struct cbn_conv_geometry {
    cbn_dtype dtype;
    int nd; /* spatial axes, 0 = linear */
    bool transposed;
    int64_t g, ic, oc;
    int64_t k[CBN_MAX_SPATIAL], stride[CBN_MAX_SPATIAL], dil[CBN_MAX_SPATIAL];
    int64_t pad[CBN_MAX_SPATIAL], output_pad[CBN_MAX_SPATIAL];
    cbn_pad_kind pad_kind;
    cbn_pad_mode pad_mode;
} cbn_conv_geometry;

/* The same normalised to three axes (unit axes in front: depth, height, width) with sizes. For
 * linear every spatial size is 1 and n counts rows. x is [n][ic][id][ih][iw], y is
 * [n][oc][od][oh][ow], both C-contiguous. Weights: [oc][ic/g][kd][kh][kw], transposed
 * [ic][oc/g][kd][kh][kw]. Non-zero padding modes: `in` is the size after the explicit padding and
 * the pads here are 0 (the plan pads first). */
typedef struct cbn_conv_desc {
    cbn_dtype dtype;
    int nd;
    bool transposed;
    int64_t n, g, ic, oc;
    int64_t in[CBN_MAX_SPATIAL], out[CBN_MAX_SPATIAL], k[CBN_MAX_SPATIAL];
    int64_t stride[CBN_MAX_SPATIAL], dil[CBN_MAX_SPATIAL];
    int64_t pad_lo[CBN_MAX_SPATIAL], pad_hi[CBN_MAX_SPATIAL];
} cbn_conv_desc;

/* Checks of everything that needs no input: positive sizes, groups, ranges, 'same' with stride 1,
 * output_pad < max(stride, dil), weight shape. weight_shape has nd + 2 entries (linear: 2).
 * bias_len < 0: no bias. Fills g->ic, g->oc and g->k from the weight's shape. Messages name the
 * argument and both numbers. */
CBN_NODISCARD cbn_status cbn_conv_geometry_check(cbn_conv_geometry *g, const int64_t *weight_shape,
                                                 int64_t bias_len, cbn_error *err);

/* Completes the description for an input of shape [n][channels][in...] (nd spatial entries; linear:
 * in = NULL). explicit_pad (3x2, may be NULL) receives the padding to be done beforehand for
 * non-zero padding modes. Checks the channel count, output size >= 1, reflect/circular limits and
 * that all byte sizes fit. n = 0 is allowed. */
CBN_NODISCARD cbn_status cbn_conv_desc_make(const cbn_conv_geometry *g, int64_t n, int64_t channels,
                                            const int64_t *in, cbn_conv_desc *out,
                                            int64_t explicit_pad[CBN_MAX_SPATIAL][2],
                                            cbn_error *err);

/* Multiply-adds times two, all taps counted / only taps inside the image. Saturating. */
int64_t cbn_conv_flops(const cbn_conv_desc *d);
int64_t cbn_conv_flops_real(const cbn_conv_desc *d);

/* A run of output coordinates of one axis that meet the same kernel taps: coordinate j (0 <= j <
 * count) is output out0 + j*out_step; its tap t multiplies kernel index tap_k[t] with input in0 +
 * j*in_step + tap_in[t], always inside the image. Convolution: out_step 1, in_step stride.
 * Transposed: out_step stride, in_step 1 (one phase). Every output coordinate is in exactly one
 * class; ntaps may be 0. Taps are in ascending kernel index. */
typedef struct cbn_axis_class {
    int64_t out0, out_step, in0, in_step, count;
    int64_t ntaps;
    const int64_t *tap_k, *tap_in; /* owned by the plan below */
} cbn_axis_class;

typedef struct cbn_axis_plan {
    int64_t nclasses;
    cbn_axis_class *classes;
    int64_t *taps;
} cbn_axis_plan;

/* axis 0..2 of the description. Owner of *out: caller, free with cbn_axis_plan_free (NULL fields
 * are fine). */
CBN_NODISCARD cbn_status cbn_axis_plan_make(const cbn_conv_desc *d, int axis, cbn_axis_plan *out,
                                            cbn_error *err);
void cbn_axis_plan_free(cbn_axis_plan *p);
#endif
