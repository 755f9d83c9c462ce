/* SPDX-License-Identifier: BSD-3-Clause */
/* Validation and shape arithmetic of convolutions. Geometry numbers are held below 2^31 and image
 * sizes below 2^62, so that no intermediate of the formulas here can overflow; products are
 * checked. */
#include "ops/conv_desc.h"

#include "base/cbn_checked.h"

#include <string.h>

static const int64_t MAX_GEOMETRY = INT32_MAX;
static const int64_t MAX_EXTENT = INT64_C(1) << 61;

/* ---- geometry ---- */
static cbn_status check_range(const char *name, int axis, int64_t value, int64_t least,
                              cbn_error *err) {
    if (value < least)
        return cbn_fail(err, CBN_BAD_VALUE, "%s: expected >= %lld on spatial axis %d, got %lld",
                        name, (long long)least, axis, (long long)value);
    if (value > MAX_GEOMETRY)
        return cbn_fail(err, CBN_BAD_VALUE, "%s: expected <= %lld on spatial axis %d, got %lld",
                        name, (long long)MAX_GEOMETRY, axis, (long long)value);
    return CBN_OK;
}

static cbn_status check_axis(const cbn_conv_geometry *g, int a, cbn_error *err) {
    CBN_TRY(check_range("stride", a, g->stride[a], 1, err));
    CBN_TRY(check_range("dilation", a, g->dil[a], 1, err));
    if (g->pad_kind == CBN_PAD_EXPLICIT) CBN_TRY(check_range("padding", a, g->pad[a], 0, err));
    if (g->pad_kind == CBN_PAD_SAME && g->stride[a] != 1)
        return cbn_fail(err, CBN_BAD_VALUE,
                        "padding: 'same' expects stride = 1, got stride = %lld on spatial axis %d",
                        (long long)g->stride[a], a);
    CBN_TRY(check_range("output_padding", a, g->output_pad[a], 0, err));
    if (!g->transposed) {
        if (g->output_pad[a] != 0)
            return cbn_fail(err, CBN_BAD_VALUE,
                            "output_padding: expected 0 (the convolution is not transposed), got "
                            "%lld on spatial axis %d",
                            (long long)g->output_pad[a], a);
        return CBN_OK;
    }
    const int64_t bound = CBN_MAX(g->stride[a], g->dil[a]);
    if (g->output_pad[a] >= bound)
        return cbn_fail(
            err, CBN_BAD_VALUE,
            "output_padding: expected < max(stride, dilation) = %lld on spatial axis %d, got %lld",
            (long long)bound, a, (long long)g->output_pad[a]);
    return CBN_OK;
}

cbn_status cbn_conv_geometry_check(cbn_conv_geometry *g, const int64_t *weight_shape,
                                   int64_t bias_len, cbn_error *err) {
    assert(g->nd >= 0 && g->nd <= CBN_MAX_SPATIAL);
    for (int a = 0; a < g->nd + 2; ++a) {
        if (weight_shape[a] < 1)
            return cbn_fail(err, CBN_BAD_VALUE, "weight: expected sizes >= 1, got %lld on axis %d",
                            (long long)weight_shape[a], a);
        if (weight_shape[a] > MAX_GEOMETRY)
            return cbn_fail(err, CBN_BAD_VALUE,
                            "weight: expected sizes <= %lld, got %lld on axis %d",
                            (long long)MAX_GEOMETRY, (long long)weight_shape[a], a);
    }
    if (g->g < 1)
        return cbn_fail(err, CBN_BAD_VALUE, "groups: expected >= 1, got %lld", (long long)g->g);
    if (weight_shape[0] % g->g != 0)
        return cbn_fail(err, CBN_BAD_VALUE,
                        "groups: expected a divisor of %s = %lld (weight axis 0), got %lld",
                        g->transposed ? "in_channels" : "out_channels", (long long)weight_shape[0],
                        (long long)g->g);
    /* groups divides axis 0, so this product stays below 2^62. */
    const int64_t across = weight_shape[1] * g->g;
    if (g->nd == 0 && (g->g != 1 || g->transposed))
        return cbn_fail(err, CBN_BAD_VALUE, "%s: expected %s for a linear operator, got %lld",
                        g->transposed ? "transposed" : "groups", g->transposed ? "false" : "1",
                        g->transposed ? 1LL : (long long)g->g);
    if (g->transposed && g->pad_kind != CBN_PAD_EXPLICIT)
        return cbn_fail(err, CBN_BAD_VALUE,
                        "padding: expected integers for a transposed convolution, got '%s'",
                        g->pad_kind == CBN_PAD_SAME ? "same" : "valid");
    if (g->transposed && g->pad_mode != CBN_MODE_ZEROS)
        return cbn_fail(err, CBN_BAD_VALUE,
                        "padding_mode: expected 'zeros' for a transposed convolution, got '%s'",
                        g->pad_mode == CBN_MODE_REFLECT     ? "reflect"
                        : g->pad_mode == CBN_MODE_REPLICATE ? "replicate"
                                                            : "circular");
    for (int a = 0; a < g->nd; ++a) CBN_TRY(check_axis(g, a, err));
    const int64_t ic = g->transposed ? weight_shape[0] : across;
    const int64_t oc = g->transposed ? across : weight_shape[0];
    if (bias_len >= 0 && bias_len != oc)
        return cbn_fail(err, CBN_BAD_VALUE, "bias: expected length %lld (out_channels), got %lld",
                        (long long)oc, (long long)bias_len);
    int64_t bytes = 8;
    for (int a = 0; a < g->nd + 2; ++a)
        if (!cbn_mul_ok(bytes, weight_shape[a], &bytes))
            return cbn_fail(err, CBN_BAD_VALUE,
                            "weight: expected a size below 2^63 bytes, got more");
    g->ic = ic;
    g->oc = oc;
    for (int a = 0; a < g->nd; ++a) g->k[a] = weight_shape[a + 2];
    return CBN_OK;
}

/* ---- sizes ---- */
static void axis_padding(const cbn_conv_geometry *g, int a, int64_t *lo, int64_t *hi) {
    *lo = *hi = 0;
    if (g->pad_kind == CBN_PAD_EXPLICIT) {
        *lo = *hi = g->pad[a];
    } else if (g->pad_kind == CBN_PAD_SAME) {
        const int64_t total = g->dil[a] * (g->k[a] - 1);
        *lo = total / 2;
        *hi = total - *lo;
    }
}

static cbn_status check_pad_mode(const cbn_conv_geometry *g, int a, int64_t in, int64_t pad,
                                 cbn_error *err) {
    if (g->pad_mode == CBN_MODE_REFLECT && pad >= in)
        return cbn_fail(err, CBN_BAD_VALUE,
                        "padding: mode 'reflect' expects less than the input size %lld on spatial "
                        "axis %d, got %lld",
                        (long long)in, a, (long long)pad);
    if (g->pad_mode == CBN_MODE_CIRCULAR && pad > in)
        return cbn_fail(err, CBN_BAD_VALUE,
                        "padding: mode 'circular' expects at most the input size %lld on spatial "
                        "axis %d, got %lld",
                        (long long)in, a, (long long)pad);
    return CBN_OK;
}

/* Multiplies the sizes; false on overflow. The batch counts at least once, so that a single image
 * always fits. */
static bool tensor_bytes_ok(int64_t n, int64_t channels, const int64_t *size, int64_t elem) {
    int64_t p = CBN_MAX(n, 1);
    if (!cbn_mul_ok(p, channels, &p) || !cbn_mul_ok(p, elem, &p)) return false;
    for (int a = 0; a < CBN_MAX_SPATIAL; ++a)
        if (!cbn_mul_ok(p, size[a], &p)) return false;
    return true;
}

static cbn_status make_axis(const cbn_conv_geometry *g, int a, int64_t in, cbn_conv_desc *d,
                            int64_t pad[2], cbn_error *err) {
    const int at = CBN_MAX_SPATIAL - g->nd + a;
    if (in < 1)
        return cbn_fail(err, CBN_BAD_VALUE,
                        "input: expected size >= 1 on spatial axis %d, got %lld", a, (long long)in);
    if (in > MAX_EXTENT / g->stride[a])
        return cbn_fail(err, CBN_BAD_VALUE,
                        "input: expected size <= %lld on spatial axis %d, got %lld",
                        (long long)(MAX_EXTENT / g->stride[a]), a, (long long)in);
    int64_t lo, hi;
    axis_padding(g, a, &lo, &hi);
    d->k[at] = g->k[a];
    d->stride[at] = g->stride[a];
    d->dil[at] = g->dil[a];
    const int64_t reach = g->dil[a] * (g->k[a] - 1) + 1;
    if (g->transposed) {
        d->in[at] = in;
        d->out[at] = (in - 1) * g->stride[a] - 2 * lo + reach + g->output_pad[a];
        d->pad_lo[at] = lo;
        d->pad_hi[at] = hi - g->output_pad[a];
        if (d->out[at] < 1)
            return cbn_fail(err, CBN_BAD_VALUE,
                            "output: expected size >= 1 on spatial axis %d, got %lld (input size "
                            "%lld, padding %lld, "
                            "kernel reach %lld)",
                            a, (long long)d->out[at], (long long)in, (long long)lo,
                            (long long)reach);
        return CBN_OK;
    }
    if (in + lo + hi < reach)
        return cbn_fail(err, CBN_BAD_VALUE,
                        "input: expected padded size >= kernel reach %lld (dilation %lld, kernel "
                        "%lld) on spatial axis %d, "
                        "got %lld; the output would be empty",
                        (long long)reach, (long long)g->dil[a], (long long)g->k[a], a,
                        (long long)(in + lo + hi));
    d->out[at] = (in + lo + hi - reach) / g->stride[a] + 1;
    if (g->pad_mode == CBN_MODE_ZEROS) {
        d->in[at] = in;
        d->pad_lo[at] = lo;
        d->pad_hi[at] = hi;
        return CBN_OK;
    }
    CBN_TRY(check_pad_mode(g, a, in, CBN_MAX(lo, hi), err));
    d->in[at] = in + lo + hi;
    pad[0] = lo;
    pad[1] = hi;
    return CBN_OK;
}

cbn_status cbn_conv_desc_make(const cbn_conv_geometry *g, int64_t n, int64_t channels,
                              const int64_t *in, cbn_conv_desc *out,
                              int64_t explicit_pad[CBN_MAX_SPATIAL][2], cbn_error *err) {
    if (n < 0)
        return cbn_fail(err, CBN_BAD_VALUE, "input: expected a batch size >= 0, got %lld",
                        (long long)n);
    if (channels != g->ic) {
        if (g->nd == 0)
            return cbn_fail(
                err, CBN_BAD_VALUE,
                "input: expected %lld features (weight has in_features = %lld), got %lld",
                (long long)g->ic, (long long)g->ic, (long long)channels);
        if (g->transposed)
            return cbn_fail(
                err, CBN_BAD_VALUE,
                "input: expected %lld channels (weight has in_channels = %lld), got %lld",
                (long long)g->ic, (long long)g->ic, (long long)channels);
        return cbn_fail(err, CBN_BAD_VALUE,
                        "input: expected %lld channels (weight has in_channels/groups = %lld, "
                        "groups = %lld), got %lld",
                        (long long)g->ic, (long long)(g->ic / g->g), (long long)g->g,
                        (long long)channels);
    }
    cbn_conv_desc d = {.dtype = g->dtype,
                       .nd = g->nd,
                       .transposed = g->transposed,
                       .n = n,
                       .g = g->g,
                       .ic = g->ic,
                       .oc = g->oc};
    int64_t pad[CBN_MAX_SPATIAL][2] = {{0}};
    for (int a = 0; a < CBN_MAX_SPATIAL; ++a)
        d.in[a] = d.out[a] = d.k[a] = d.stride[a] = d.dil[a] = 1;
    for (int a = 0; a < g->nd; ++a)
        CBN_TRY(make_axis(g, a, in[a], &d, pad[CBN_MAX_SPATIAL - g->nd + a], err));
    /* float16 is computed in float32, so it needs room for that. */
    const int64_t elem = g->dtype == CBN_F64 ? 8 : 4;
    if (!tensor_bytes_ok(n, d.ic, d.in, elem))
        return cbn_fail(
            err, CBN_BAD_VALUE,
            "input: expected a size below 2^63 bytes, got %lld x %lld x %lld x %lld x %lld",
            (long long)n, (long long)d.ic, (long long)d.in[0], (long long)d.in[1],
            (long long)d.in[2]);
    if (!tensor_bytes_ok(n, d.oc, d.out, elem))
        return cbn_fail(
            err, CBN_BAD_VALUE,
            "output: expected a size below 2^63 bytes, got %lld x %lld x %lld x %lld x %lld",
            (long long)n, (long long)d.oc, (long long)d.out[0], (long long)d.out[1],
            (long long)d.out[2]);
    *out = d;
    if (explicit_pad) memcpy(explicit_pad, pad, sizeof pad);
    return CBN_OK;
}

/* ---- operation counts ---- */
static int64_t mul_saturate(int64_t a, int64_t b) {
    int64_t r;
    return cbn_mul_ok(a, b, &r) ? r : INT64_MAX;
}

/* How many c in [0, count) have 0 <= c*step + at < limit. */
static int64_t count_inside(int64_t count, int64_t step, int64_t at, int64_t limit) {
    const int64_t first = at >= 0 ? 0 : cbn_ceil_div(-at, step);
    const int64_t end = at >= limit ? 0 : CBN_MIN(count, cbn_ceil_div(limit - at, step));
    return CBN_MAX(end - first, 0);
}

static int64_t real_taps(const cbn_conv_desc *d, int axis) {
    /* A transposed convolution is the convolution that leads from its output back to its input. */
    const int64_t count = d->transposed ? d->in[axis] : d->out[axis];
    const int64_t limit = d->transposed ? d->out[axis] : d->in[axis];
    int64_t sum = 0;
    for (int64_t t = 0; t < d->k[axis]; ++t)
        sum += count_inside(count, d->stride[axis], t * d->dil[axis] - d->pad_lo[axis], limit);
    return sum;
}

/* taps[axis]: (position, tap) pairs of one axis. */
static int64_t flops_of(const cbn_conv_desc *d, const int64_t taps[CBN_MAX_SPATIAL]) {
    int64_t f = mul_saturate(2, d->n);
    f = mul_saturate(f, d->oc);
    f = mul_saturate(f, d->ic / d->g);
    for (int a = 0; a < CBN_MAX_SPATIAL; ++a) f = mul_saturate(f, taps[a]);
    return f;
}

int64_t cbn_conv_flops(const cbn_conv_desc *d) {
    int64_t taps[CBN_MAX_SPATIAL];
    for (int a = 0; a < CBN_MAX_SPATIAL; ++a)
        taps[a] = mul_saturate(d->transposed ? d->in[a] : d->out[a], d->k[a]);
    return flops_of(d, taps);
}

int64_t cbn_conv_flops_real(const cbn_conv_desc *d) {
    int64_t taps[CBN_MAX_SPATIAL];
    for (int a = 0; a < CBN_MAX_SPATIAL; ++a) taps[a] = real_taps(d, a);
    return flops_of(d, taps);
}
