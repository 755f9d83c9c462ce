/* SPDX-License-Identifier: BSD-3-Clause */
/* Shape rules of convolutions, linear layers, pooling, padding, resizing and matrix products. The formulas are those
 * of the
 * documentation of PyTorch's modules of these names. */
#include <math.h>
#include <string.h>

#include "base/cbn_checked.h"
#include "graph/shape_priv.h"

/* ---- convolution ------------------------------------------------------------------------------------------------- */
typedef struct geometry {
    int nd;
    bool transposed, same;
    int64_t groups, stride[CBN_MAX_SPATIAL], pad[CBN_MAX_SPATIAL], dil[CBN_MAX_SPATIAL], extra[CBN_MAX_SPATIAL];
} geometry;

/* Padding as ints, or 'valid' / 'same'. False: not constant. */
static bool read_padding(cbn_shape_call *c, geometry *q) {
    if (cbn_shape_n_ints(cbn_shape_arg(c, "padding"), q->nd, q->pad)) return true;
    const char *text = cbn_shape_text(c, "padding");
    if (text == NULL || (strcmp(text, "same") != 0 && strcmp(text, "valid") != 0)) return false;
    q->same = text[0] == 's';
    memset(q->pad, 0, sizeof q->pad);
    return true;
}

static bool read_geometry(cbn_shape_call *c, geometry *q) {
    memset(q->extra, 0, sizeof q->extra);
    return cbn_shape_n_ints(cbn_shape_arg(c, "stride"), q->nd, q->stride) &&
           cbn_shape_n_ints(cbn_shape_arg(c, "dilation"), q->nd, q->dil) && read_padding(c, q) &&
           cbn_shape_int(cbn_shape_arg(c, "groups"), &q->groups) &&
           (!q->transposed || cbn_shape_n_ints(cbn_shape_arg(c, "output_padding"), q->nd, q->extra));
}

static cbn_status output_axis(cbn_shape_call *c, const geometry *q, int axis, int64_t in, int64_t k, int64_t *out) {
    int64_t span, total;
    if (q->stride[axis] < 1 || q->dil[axis] < 1 || k < 1)
        return cbn_shape_fail(c, "kernel, stride and dilation: at least 1");
    bool ok = cbn_mul_ok(q->dil[axis], k - 1, &span);
    if (q->same) {
        *out = in;
        return ok ? CBN_OK : cbn_shape_fail(c, "sizes beyond 64 bits");
    }
    int64_t twice;
    ok = ok && cbn_mul_ok(q->pad[axis], 2, &twice);
    if (q->transposed) {
        ok = ok && cbn_mul_ok(in - 1, q->stride[axis], &total) && cbn_add_ok(total, -twice, &total) &&
             cbn_add_ok(total, span, &total) && cbn_add_ok(total, q->extra[axis] + 1, out);
    } else {
        ok = ok && cbn_add_ok(in, twice, &total) && cbn_add_ok(total, -span - 1, &total);
        if (ok) *out = total < 0 ? 0 : total / q->stride[axis] + 1;
    }
    if (!ok) return cbn_shape_fail(c, "sizes beyond 64 bits");
    if (*out < 1) {
        return cbn_shape_fail(c, "output size of axis %d would be below 1 (input %lld, kernel %lld)", axis,
                              (long long)in, (long long)k);
    }
    return CBN_OK;
}

static cbn_status convolve(cbn_shape_call *c, geometry *q) {
    cbn_tensor_meta x, w;
    bool has_x, has_w;
    CBN_TRY(cbn_shape_array(c, cbn_shape_arg(c, "input"), &x, &has_x));
    CBN_TRY(cbn_shape_array(c, cbn_shape_arg(c, "weight"), &w, &has_w));
    if (!has_x || !has_w) return CBN_OK;
    if (q->nd == 0) q->nd = w.ndim - 2;
    if (q->nd < 1 || q->nd > CBN_MAX_SPATIAL || w.ndim != q->nd + 2) {
        return cbn_shape_fail(c, "weight: expected %d axes, got %d", q->nd + 2, w.ndim);
    }
    if (x.ndim != q->nd + 1 && x.ndim != q->nd + 2) {
        return cbn_shape_fail(c, "input: expected %d or %d axes, got %d", q->nd + 1, q->nd + 2, x.ndim);
    }
    if (!read_geometry(c, q)) return CBN_OK;
    const int channel = x.ndim - q->nd - 1;
    const int64_t wanted = q->transposed ? w.shape[0] : w.shape[1] * q->groups;
    if (x.shape[channel] != wanted) {
        return cbn_shape_fail(c, "input: expected %lld channels, got %lld", (long long)wanted,
                              (long long)x.shape[channel]);
    }
    int64_t shape[CBN_MAX_DIMS];
    shape[0] = x.shape[0];
    shape[channel] = q->transposed ? w.shape[1] * q->groups : w.shape[0];
    for (int i = 0; i < q->nd; i++) {
        CBN_TRY(output_axis(c, q, i, x.shape[channel + 1 + i], w.shape[2 + i], &shape[channel + 1 + i]));
    }
    return cbn_shape_done(c, &x, x.ndim, shape);
}

static cbn_status rule_conv(cbn_shape_call *c) {
    geometry q = {.nd = c->op->nd};
    return convolve(c, &q);
}

static cbn_status rule_conv_transpose(cbn_shape_call *c) {
    geometry q = {.nd = c->op->nd, .transposed = true};
    return convolve(c, &q);
}

static cbn_status rule_convolution(cbn_shape_call *c) {
    geometry q = {0};
    return cbn_shape_bool(cbn_shape_arg(c, "transposed"), &q.transposed) ? convolve(c, &q) : CBN_OK;
}

static cbn_status rule_linear(cbn_shape_call *c) {
    cbn_tensor_meta x, w;
    bool has_x, has_w;
    CBN_TRY(cbn_shape_input(c, &x, &has_x));
    CBN_TRY(cbn_shape_array(c, cbn_shape_arg(c, "weight"), &w, &has_w));
    if (!has_x || !has_w || x.ndim < 1 || w.ndim != 2) return CBN_OK;
    if (x.shape[x.ndim - 1] != w.shape[1]) {
        return cbn_shape_fail(c, "input: expected %lld features, got %lld", (long long)w.shape[1],
                              (long long)x.shape[x.ndim - 1]);
    }
    x.shape[x.ndim - 1] = w.shape[0];
    return cbn_shape_done(c, &x, x.ndim, x.shape);
}

/* efficient_conv_bn_eval_decomposed: the convolution's own rule on its own arguments. */
static cbn_status rule_efficient_decomposed(cbn_shape_call *c) {
    const cbn_value *conv = cbn_shape_arg(c, "conv"), *rest = cbn_shape_arg(c, "conv_remaining_args");
    const cbn_op_table *table = cbn_graph_ops(c->g);
    const cbn_op *op =
        conv->tag != CBN_V_HOST ? NULL : cbn_op_table_row(table, cbn_op_table_lookup(table, conv->u.host));
    if (op == NULL || op->nparams < 3) return CBN_OK;
    const bool is_list = rest->tag == CBN_V_TUPLE || rest->tag == CBN_V_LIST;
    if (!is_list && rest->tag != CBN_V_NONE) return CBN_OK;
    cbn_bound b = {.op = op, .n = op->nparams};
    for (int i = 0; i < op->nparams; i++) b.v[i] = op->params[i].default_value;
    const char *const leading[] = {"x", "conv_weight", "conv_bias"};
    for (int i = 0; i < 3; i++) {
        b.v[i] = *cbn_shape_arg(c, leading[i]);
        b.given[i] = true;
    }
    for (uint32_t i = 0; is_list && i < rest->u.seq->count && 3 + (int)i < op->nparams; i++) {
        b.v[3 + i] = rest->u.seq->v[i];
        b.given[3 + i] = true;
    }
    cbn_shape_call inner = *c;
    inner.op = op;
    inner.bound = &b;
    cbn_status status = CBN_OK;
    switch (op->family) {
    case CBN_FAMILY_CONV: status = rule_conv(&inner); break;
    case CBN_FAMILY_CONV_TRANSPOSE: status = rule_conv_transpose(&inner); break;
    case CBN_FAMILY_CONVOLUTION: status = rule_convolution(&inner); break;
    case CBN_FAMILY_LINEAR: status = rule_linear(&inner); break;
    default: break;
    }
    c->out = inner.out;
    c->known = inner.known;
    return status;
}

/* ---- pooling ----------------------------------------------------------------------------------------------------- */
static cbn_status pool(cbn_shape_call *c, bool dilated) {
    const int nd = c->op->nd;
    int64_t k[CBN_MAX_SPATIAL], s[CBN_MAX_SPATIAL], p[CBN_MAX_SPATIAL], d[CBN_MAX_SPATIAL] = {1, 1, 1}, room[1];
    bool ceil_mode, found;
    cbn_tensor_meta x;
    CBN_TRY(cbn_shape_input(c, &x, &found));
    const cbn_value *stride = cbn_shape_arg(c, "stride");
    const bool default_stride = stride->tag == CBN_V_NONE || cbn_shape_ints(stride, room, 1) == 0;
    if (!found || !cbn_shape_n_ints(cbn_shape_arg(c, "kernel_size"), nd, k) ||
        !cbn_shape_n_ints(default_stride ? cbn_shape_arg(c, "kernel_size") : stride, nd, s) ||
        !cbn_shape_n_ints(cbn_shape_arg(c, "padding"), nd, p) ||
        (dilated && !cbn_shape_n_ints(cbn_shape_arg(c, "dilation"), nd, d)) ||
        !cbn_shape_bool(cbn_shape_arg(c, "ceil_mode"), &ceil_mode)) {
        return CBN_OK;
    }
    if (x.ndim != nd + 1 && x.ndim != nd + 2) {
        return cbn_shape_fail(c, "input: expected %d or %d axes, got %d", nd + 1, nd + 2, x.ndim);
    }
    for (int i = 0; i < nd; i++) {
        int64_t *size = &x.shape[x.ndim - nd + i];
        const int64_t limit = INT64_MAX / 8;
        if (k[i] < 1 || s[i] < 1 || d[i] < 1 || p[i] < 0 || k[i] > limit / d[i] || p[i] > limit || s[i] > limit ||
            *size > limit) {
            return cbn_shape_fail(c, "kernel_size, stride, padding or dilation out of range");
        }
        const int64_t last = *size + 2 * p[i] - d[i] * (k[i] - 1) - 1 + (ceil_mode ? s[i] - 1 : 0);
        int64_t out = last < 0 ? 0 : last / s[i] + 1;
        if (ceil_mode && (out - 1) * s[i] >= *size + p[i])
            out--; /* a window must start inside the input or left padding */
        if (out < 1)
            return cbn_shape_fail(c, "output size of axis %d would be below 1 (input %lld)", i, (long long)*size);
        *size = out;
    }
    return cbn_shape_done(c, &x, x.ndim, x.shape);
}

static cbn_status rule_max_pool(cbn_shape_call *c) { return pool(c, true); }
static cbn_status rule_avg_pool(cbn_shape_call *c) { return pool(c, false); }

static cbn_status rule_adaptive_pool(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    CBN_TRY(cbn_shape_input(c, &x, &found));
    const int nd = c->op->nd;
    const cbn_value *size = cbn_shape_arg(c, "output_size");
    if (!found || (x.ndim != nd + 1 && x.ndim != nd + 2)) return CBN_OK;
    const bool list = size->tag == CBN_V_LIST || size->tag == CBN_V_TUPLE;
    if (list && size->u.seq->count != (uint32_t)nd && size->u.seq->count != 1) {
        return cbn_shape_fail(c, "output_size: expected %d entries, got %u", nd, size->u.seq->count);
    }
    for (int i = 0; i < nd; i++) {
        const cbn_value *v = !list ? size : &size->u.seq->v[size->u.seq->count == 1 ? 0 : i];
        if (v->tag == CBN_V_NONE) continue; /* keeps the axis */
        if (!cbn_shape_int(v, &x.shape[x.ndim - nd + i])) return CBN_OK;
    }
    return cbn_shape_done(c, &x, x.ndim, x.shape);
}

/* ---- padding and resizing ---------------------------------------------------------------------------------------- */
static cbn_status rule_pad(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    int64_t amount[2 * CBN_MAX_DIMS];
    CBN_TRY(cbn_shape_input(c, &x, &found));
    const int n = cbn_shape_ints(cbn_shape_arg(c, "pad"), amount, 2 * CBN_MAX_DIMS);
    if (!found || n < 0 || n % 2 != 0 || n / 2 > x.ndim) return CBN_OK;
    for (int i = 0; i < n / 2; i++) {
        int64_t *size = &x.shape[x.ndim - 1 - i];
        if (!cbn_add_ok(*size, amount[2 * i], size) || !cbn_add_ok(*size, amount[2 * i + 1], size) || *size < 0) {
            return cbn_shape_fail(c, "pad: axis %d would have a negative size", -1 - i);
        }
    }
    return cbn_shape_done(c, &x, x.ndim, x.shape);
}

/* output_size / size, or floor(size * factor). */
static cbn_status rule_interpolate(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    CBN_TRY(cbn_shape_input(c, &x, &found));
    if (!found || x.ndim < 3 || x.ndim > 5) return CBN_OK;
    const bool aten = cbn_op_param(c->op, "output_size") >= 0;
    const cbn_value *size = cbn_shape_arg(c, aten ? "output_size" : "size");
    const cbn_value *scale = cbn_shape_arg(c, aten ? "scale_factors" : "scale_factor");
    const int nd = x.ndim - 2;
    if (size->tag != CBN_V_NONE) {
        if (scale->tag != CBN_V_NONE || !cbn_shape_n_ints(size, nd, &x.shape[2])) return CBN_OK;
        return cbn_shape_done(c, &x, x.ndim, x.shape);
    }
    const bool list = scale->tag == CBN_V_LIST || scale->tag == CBN_V_TUPLE;
    if (list && scale->u.seq->count != (uint32_t)nd) return CBN_OK;
    for (int i = 0; i < nd; i++) {
        const cbn_value *v = list ? &scale->u.seq->v[i] : scale;
        if (v->tag != CBN_V_FLOAT && v->tag != CBN_V_INT) return CBN_OK;
        const double wanted = floor((double)x.shape[2 + i] * (v->tag == CBN_V_INT ? (double)v->u.i : v->u.f));
        if (!(wanted >= 1 && wanted < 1e15))
            return cbn_shape_fail(c, "scale_factor: axis %d would have size %g", i, wanted);
        x.shape[2 + i] = (int64_t)wanted;
    }
    return cbn_shape_done(c, &x, x.ndim, x.shape);
}

static cbn_status rule_pixel_shuffle(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    int64_t r;
    CBN_TRY(cbn_shape_input(c, &x, &found));
    if (!found || x.ndim < 3 || !cbn_shape_int(cbn_shape_arg(c, "upscale_factor"), &r) || r < 1 || r > 1 << 15)
        return CBN_OK;
    if (x.shape[x.ndim - 3] % (r * r) != 0) return cbn_shape_fail(c, "upscale_factor: channels are not divisible");
    x.shape[x.ndim - 3] /= r * r;
    x.shape[x.ndim - 2] *= r;
    x.shape[x.ndim - 1] *= r;
    return cbn_shape_done(c, &x, x.ndim, x.shape);
}

/* ---- matrix products --------------------------------------------------------------------------------------------- */
static cbn_status product(cbn_shape_call *c, const cbn_value *a, const cbn_value *b, const cbn_tensor_meta *add) {
    cbn_tensor_meta x, y;
    bool has_x, has_y;
    CBN_TRY(cbn_shape_array(c, a, &x, &has_x));
    CBN_TRY(cbn_shape_array(c, b, &y, &has_y));
    if (!has_x || !has_y || x.kind != 'f' || y.kind != 'f' || x.itemsize != y.itemsize) return CBN_OK;
    if (x.ndim < 2 || y.ndim != x.ndim) return CBN_OK; /* vectors and broadcast batches: let it run */
    const int n = x.ndim;
    for (int i = 0; i < n - 2; i++) {
        if (x.shape[i] != y.shape[i]) return CBN_OK;
    }
    if (x.shape[n - 1] != y.shape[n - 2]) {
        return cbn_shape_fail(c, "columns (%lld) and rows (%lld) differ", (long long)x.shape[n - 1],
                              (long long)y.shape[n - 2]);
    }
    x.shape[n - 1] = y.shape[n - 1];
    if (add != NULL) { /* broadcast, and of the same dtype */
        if (add->itemsize != x.itemsize || add->kind != x.kind || add->ndim > n) return CBN_OK;
        for (int i = 0; i < add->ndim; i++) {
            if (add->shape[i] != 1 && add->shape[i] != x.shape[n - add->ndim + i]) return CBN_OK;
        }
    }
    return cbn_shape_done(c, &x, n, x.shape);
}

static cbn_status rule_matmul(cbn_shape_call *c) {
    return c->bound->n < 2 ? CBN_OK : product(c, &c->bound->v[0], &c->bound->v[1], NULL);
}

static cbn_status rule_addmm(cbn_shape_call *c) {
    cbn_tensor_meta add;
    bool found;
    CBN_TRY(cbn_shape_input(c, &add, &found));
    return found ? product(c, &c->bound->v[1], &c->bound->v[2], &add) : CBN_OK;
}

const cbn_shape_row cbn_shape_rules_layers[] = {
    {"conv", rule_conv},
    {"conv_transpose", rule_conv_transpose},
    {"convolution", rule_convolution},
    {"linear", rule_linear},
    {"efficient_decomposed", rule_efficient_decomposed},
    {"max_pool", rule_max_pool},
    {"avg_pool", rule_avg_pool},
    {"adaptive_pool", rule_adaptive_pool},
    {"pad", rule_pad},
    {"interpolate", rule_interpolate},
    {"pixel_shuffle", rule_pixel_shuffle},
    {"matmul", rule_matmul},
    {"addmm", rule_addmm},
    {NULL, NULL},
};
