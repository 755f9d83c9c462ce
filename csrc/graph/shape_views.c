/* SPDX-License-Identifier: BSD-3-Clause */
/* Shape rules of operators that rearrange, cut, join or reduce axes. */
#include <string.h>

#include "base/cbn_checked.h"
#include "graph/shape_priv.h"

/* Elements, or -1 beyond 64 bits. */
static int64_t elements(const int64_t *shape, int ndim) {
    int64_t n = 1;
    for (int i = 0; i < ndim; i++) {
        if (shape[i] < 0 || !cbn_mul_ok(n, shape[i], &n)) return -1;
    }
    return n;
}

/* The ints of a variadic parameter or of a list: the count, -1 when not constant. */
static int rest_ints(const cbn_shape_call *c, const char *name, int64_t *out) {
    const int i = cbn_op_param(c->op, name);
    if (i < 0) return -1;
    if (!c->op->params[i].variadic) return cbn_shape_ints(&c->bound->v[i], out, CBN_MAX_DIMS);
    if (c->bound->nrest > CBN_MAX_DIMS) return -1;
    for (uint32_t k = 0; k < c->bound->nrest; k++) {
        if (!cbn_shape_int(&c->bound->rest[k], &out[k])) return -1;
    }
    return (int)c->bound->nrest;
}

/* ---- shape ------------------------------------------------------------------------------------------------------- */
static cbn_status rule_reshape(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    int64_t shape[CBN_MAX_DIMS];
    CBN_TRY(cbn_shape_input(c, &x, &found));
    const int n = rest_ints(c, cbn_op_param(c->op, "size") >= 0 ? "size" : "shape", shape);
    const cbn_value *order = cbn_shape_arg(c, "order");
    if (!found || n < 0 || (order != NULL && order->tag != CBN_V_NONE)) return CBN_OK;
    if (n == 0 && cbn_op_param(c->op, "order") >= 0) return CBN_OK; /* reshape(shape=...) of NumPy */
    int64_t known = 1;
    int free_axis = -1;
    for (int i = 0; i < n; i++) {
        if (shape[i] == -1 && free_axis < 0) free_axis = i;
        else if (shape[i] < 0 || !cbn_mul_ok(known, shape[i], &known)) return cbn_shape_fail(c, "a bad size");
    }
    const int64_t total = elements(x.shape, x.ndim);
    if (total < 0) return CBN_OK;
    if (free_axis >= 0) {
        if (known == 0 || total % known != 0) {
            return cbn_shape_fail(c, "%lld elements cannot be divided among %lld", (long long)total, (long long)known);
        }
        shape[free_axis] = total / known;
    } else if (known != total) {
        return cbn_shape_fail(c, "expected a shape of %lld elements, got one of %lld", (long long)total,
                              (long long)known);
    }
    return cbn_shape_done(c, &x, n, shape);
}

static cbn_status rule_as_strided(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    int64_t shape[CBN_MAX_DIMS];
    CBN_TRY(cbn_shape_input(c, &x, &found));
    const int n = cbn_shape_ints(cbn_shape_arg(c, "size"), shape, CBN_MAX_DIMS);
    if (!found || n < 0) return CBN_OK;
    for (int i = 0; i < n; i++) {
        if (shape[i] < 0) return cbn_shape_fail(c, "size: expected no negative entry");
    }
    return cbn_shape_done(c, &x, n, shape);
}

/* Shape and dtype of the first argument, whatever it is. */
static cbn_status rule_keeps(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    CBN_TRY(cbn_shape_input(c, &x, &found));
    return found ? cbn_shape_done(c, &x, x.ndim, x.shape) : CBN_OK;
}

static cbn_status rule_flatten(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    int64_t start, end, shape[CBN_MAX_DIMS];
    CBN_TRY(cbn_shape_input(c, &x, &found));
    if (!found || !cbn_shape_int(cbn_shape_arg(c, "start_dim"), &start) ||
        !cbn_shape_int(cbn_shape_arg(c, "end_dim"), &end)) {
        return CBN_OK;
    }
    int first, last;
    CBN_TRY(cbn_shape_axis(c, "start_dim", start, x.ndim, &first));
    CBN_TRY(cbn_shape_axis(c, "end_dim", end, x.ndim, &last));
    if (first > last) return cbn_shape_fail(c, "start_dim: expected at most end_dim");
    if (x.ndim == 0) return cbn_shape_done(c, &x, 1, (const int64_t[]){1});
    const int64_t joined = elements(x.shape + first, last - first + 1);
    if (joined < 0) return CBN_OK;
    int n = 0;
    for (int i = 0; i < first; i++) shape[n++] = x.shape[i];
    shape[n++] = joined;
    for (int i = last + 1; i < x.ndim; i++) shape[n++] = x.shape[i];
    return cbn_shape_done(c, &x, n, shape);
}

static cbn_status rule_unsqueeze(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    int64_t dim;
    int axis;
    CBN_TRY(cbn_shape_input(c, &x, &found));
    if (!found || x.ndim == CBN_MAX_DIMS || !cbn_shape_int(cbn_shape_arg(c, "dim"), &dim)) return CBN_OK;
    CBN_TRY(cbn_shape_axis(c, "dim", dim, x.ndim + 1, &axis));
    memmove(&x.shape[axis + 1], &x.shape[axis], (size_t)(x.ndim - axis) * sizeof x.shape[0]);
    x.shape[axis] = 1;
    return cbn_shape_done(c, &x, x.ndim + 1, x.shape);
}

/* The axes that `dim` (or `axis`) names, as flags; all for None. False: not constant. */
static cbn_status chosen_axes(cbn_shape_call *c, int ndim, bool *chosen, bool *constant) {
    const cbn_value *dim = cbn_shape_arg(c, "dim"), *axis = cbn_shape_arg(c, "axis");
    if (axis != NULL && axis->tag != CBN_V_NONE) dim = axis;
    const bool all = dim == NULL || dim->tag == CBN_V_NONE;
    for (int i = 0; i < CBN_MAX_DIMS; i++) chosen[i] = all;
    *constant = true;
    if (all) return CBN_OK;
    int64_t dims[CBN_MAX_DIMS];
    const int n = cbn_shape_ints(dim, dims, CBN_MAX_DIMS);
    *constant = n >= 0;
    for (int i = 0; i < n; i++) {
        int at;
        CBN_TRY(cbn_shape_axis(c, "dim", dims[i], ndim, &at));
        chosen[at] = true;
    }
    return CBN_OK;
}

static cbn_status rule_squeeze(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found, constant, chosen[CBN_MAX_DIMS];
    CBN_TRY(cbn_shape_input(c, &x, &found));
    if (!found) return CBN_OK;
    CBN_TRY(chosen_axes(c, x.ndim, chosen, &constant));
    if (!constant) return CBN_OK;
    int n = 0;
    for (int i = 0; i < x.ndim; i++) {
        if (!chosen[i] || x.shape[i] != 1) x.shape[n++] = x.shape[i];
    }
    return cbn_shape_done(c, &x, n, x.shape);
}

static cbn_status rule_expand(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    int64_t shape[CBN_MAX_DIMS];
    CBN_TRY(cbn_shape_input(c, &x, &found));
    const int n = rest_ints(c, "size", shape);
    if (!found || n < 0) return CBN_OK;
    const int extra = n - x.ndim;
    if (extra < 0) return cbn_shape_fail(c, "size: expected at least %d entries, got %d", x.ndim, n);
    for (int i = 0; i < n; i++) {
        if (i < extra) {
            if (shape[i] < 0) return cbn_shape_fail(c, "size: -1 for an axis that is new");
            continue;
        }
        const int64_t have = x.shape[i - extra];
        if (shape[i] == -1) shape[i] = have;
        if (shape[i] != have && have != 1) {
            return cbn_shape_fail(c, "size: axis of size %lld cannot become %lld", (long long)have,
                                  (long long)shape[i]);
        }
    }
    return cbn_shape_done(c, &x, n, shape);
}

/* ---- axes -------------------------------------------------------------------------------------------------------- */
static cbn_status permuted(cbn_shape_call *c, const cbn_tensor_meta *x, const int64_t *dims, int n) {
    bool seen[CBN_MAX_DIMS] = {false};
    int64_t shape[CBN_MAX_DIMS];
    if (n != x->ndim) return cbn_shape_fail(c, "dims: expected %d entries, got %d", x->ndim, n);
    for (int i = 0; i < n; i++) {
        int at;
        CBN_TRY(cbn_shape_axis(c, "dims", dims[i], n, &at));
        if (seen[at]) return cbn_shape_fail(c, "dims: axis %d twice", at);
        seen[at] = true;
        shape[i] = x->shape[at];
    }
    return cbn_shape_done(c, x, n, shape);
}

static cbn_status rule_permute(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    int64_t dims[CBN_MAX_DIMS];
    CBN_TRY(cbn_shape_input(c, &x, &found));
    const int n = rest_ints(c, "dims", dims);
    return found && n >= 0 ? permuted(c, &x, dims, n) : CBN_OK;
}

static cbn_status swapped(cbn_shape_call *c, cbn_tensor_meta *x, int64_t dim0, int64_t dim1) {
    int a, b;
    CBN_TRY(cbn_shape_axis(c, "dim0", dim0, x->ndim, &a));
    CBN_TRY(cbn_shape_axis(c, "dim1", dim1, x->ndim, &b));
    const int64_t size = x->shape[a];
    x->shape[a] = x->shape[b];
    x->shape[b] = size;
    return cbn_shape_done(c, x, x->ndim, x->shape);
}

static cbn_status rule_transpose(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    int64_t dim0, dim1;
    CBN_TRY(cbn_shape_input(c, &x, &found));
    if (!found || !cbn_shape_int(cbn_shape_arg(c, "dim0"), &dim0) || !cbn_shape_int(cbn_shape_arg(c, "dim1"), &dim1)) {
        return CBN_OK;
    }
    return swapped(c, &x, dim0, dim1);
}

/* PyTorch's swaps two axes, NumPy's takes none or all: two axes of a matrix mean different things, so nothing is
 * said. */
static cbn_status rule_transpose_method(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    int64_t dims[CBN_MAX_DIMS];
    CBN_TRY(cbn_shape_input(c, &x, &found));
    const int n = rest_ints(c, "dims", dims);
    if (!found || n < 0) return CBN_OK;
    if (n == 0) {
        for (int i = 0; i < x.ndim; i++) dims[i] = x.ndim - 1 - i;
        return permuted(c, &x, dims, x.ndim);
    }
    if (n == 2) return x.ndim == 2 ? CBN_OK : swapped(c, &x, dims[0], dims[1]);
    return permuted(c, &x, dims, n);
}

static cbn_status rule_t(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    CBN_TRY(cbn_shape_input(c, &x, &found));
    if (!found) return CBN_OK;
    if (x.ndim > 2) return cbn_shape_fail(c, "self: expected at most 2 axes, got %d", x.ndim);
    return x.ndim == 2 ? swapped(c, &x, 0, 1) : cbn_shape_done(c, &x, x.ndim, x.shape);
}

/* ---- parts ------------------------------------------------------------------------------------------------------- */
/* Length of [start:end:step] of an axis, with NumPy's clamping. False: not constant. */
static bool slice_length(int64_t size, const cbn_value *start, const cbn_value *end, const cbn_value *step,
                         int64_t *out) {
    int64_t by = 1;
    if (step->tag != CBN_V_NONE && !cbn_shape_int(step, &by)) return false;
    if (by == 0 || by == INT64_MIN) return false;
    int64_t lo = by > 0 ? 0 : size - 1, hi = by > 0 ? size : -1;
    const int64_t least = by > 0 ? 0 : -1, most = by > 0 ? size : size - 1;
    const cbn_value *const bounds[] = {start, end};
    int64_t *const targets[] = {&lo, &hi};
    for (int i = 0; i < 2; i++) {
        if (bounds[i]->tag == CBN_V_NONE) continue;
        int64_t v;
        if (!cbn_shape_int(bounds[i], &v)) return false;
        if (v < 0) v += size;
        *targets[i] = v < least ? least : v > most ? most : v;
    }
    const int64_t span = by > 0 ? hi - lo : lo - hi;
    *out = span <= 0 ? 0 : (span - 1) / (by > 0 ? by : -by) + 1;
    return true;
}

static cbn_status rule_slice(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    int64_t dim, step;
    int axis;
    CBN_TRY(cbn_shape_input(c, &x, &found));
    if (!found || x.ndim == 0 || !cbn_shape_int(cbn_shape_arg(c, "dim"), &dim)) return CBN_OK;
    CBN_TRY(cbn_shape_axis(c, "dim", dim, x.ndim, &axis));
    const cbn_value *by = cbn_shape_arg(c, "step");
    if (cbn_shape_int(by, &step) && step < 1)
        return cbn_shape_fail(c, "step: expected at least 1, got %lld", (long long)step);
    if (!slice_length(x.shape[axis], cbn_shape_arg(c, "start"), cbn_shape_arg(c, "end"), by, &x.shape[axis]))
        return CBN_OK;
    return cbn_shape_done(c, &x, x.ndim, x.shape);
}

static cbn_status rule_select(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    int64_t dim, index;
    int axis;
    CBN_TRY(cbn_shape_input(c, &x, &found));
    if (!found || x.ndim == 0 || !cbn_shape_int(cbn_shape_arg(c, "dim"), &dim)) return CBN_OK;
    CBN_TRY(cbn_shape_axis(c, "dim", dim, x.ndim, &axis));
    if (cbn_shape_int(cbn_shape_arg(c, "index"), &index) && (index < -x.shape[axis] || index >= x.shape[axis])) {
        return cbn_shape_fail(c, "index: %lld is out of bounds for size %lld", (long long)index,
                              (long long)x.shape[axis]);
    }
    memmove(&x.shape[axis], &x.shape[axis + 1], (size_t)(x.ndim - axis - 1) * sizeof x.shape[0]);
    return cbn_shape_done(c, &x, x.ndim - 1, x.shape);
}

/* Ints, slices and Ellipsis-free tuples of them; everything else (None, arrays, Ellipsis) is left to be run. */
static cbn_status rule_getitem(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    CBN_TRY(cbn_shape_input(c, &x, &found));
    if (!found || c->bound->n < 2) return CBN_OK;
    const cbn_value *index = &c->bound->v[1];
    const bool tuple = index->tag == CBN_V_TUPLE;
    const uint32_t count = tuple ? index->u.seq->count : 1;
    if (count > (uint32_t)x.ndim) return CBN_OK;
    int n = 0;
    int64_t shape[CBN_MAX_DIMS];
    for (uint32_t i = 0; i < count; i++) {
        const cbn_value *v = tuple ? &index->u.seq->v[i] : index;
        const int64_t size = x.shape[i];
        if (v->tag == CBN_V_INT) {
            if (v->u.i < -size || v->u.i >= size) {
                return cbn_shape_fail(c, "index %lld is out of bounds for axis %u of size %lld", (long long)v->u.i, i,
                                      (long long)size);
            }
        } else if (v->tag == CBN_V_SLICE) {
            const cbn_value *part = v->u.seq->v;
            if (!slice_length(size, &part[0], &part[1], &part[2], &shape[n++])) return CBN_OK;
        } else {
            return CBN_OK;
        }
    }
    for (int i = (int)count; i < x.ndim; i++) shape[n++] = x.shape[i];
    return cbn_shape_done(c, &x, n, shape);
}

/* ---- joining ----------------------------------------------------------------------------------------------------- */
static cbn_status joined(cbn_shape_call *c, bool stack) {
    const cbn_value *list = cbn_shape_arg(c, "tensors");
    int64_t dim;
    int axis = 0;
    if (list == NULL || (list->tag != CBN_V_LIST && list->tag != CBN_V_TUPLE) || list->u.seq->count == 0 ||
        !cbn_shape_int(cbn_shape_arg(c, "dim"), &dim)) {
        return CBN_OK;
    }
    cbn_tensor_meta sum = {0};
    for (uint32_t i = 0; i < list->u.seq->count; i++) {
        cbn_tensor_meta x;
        bool found;
        CBN_TRY(cbn_shape_array(c, &list->u.seq->v[i], &x, &found));
        if (!found || (!stack && x.ndim == 1 && x.shape[0] == 0)) return CBN_OK; /* PyTorch skips these */
        if (i == 0) {
            sum = x;
            CBN_TRY(cbn_shape_axis(c, "dim", dim, x.ndim + stack, &axis));
            if (x.ndim == 0 && !stack) return cbn_shape_fail(c, "tensors: 0-d arrays cannot be joined");
            continue;
        }
        if (x.kind != sum.kind || x.itemsize != sum.itemsize) return CBN_OK;
        bool same = x.ndim == sum.ndim;
        for (int k = 0; same && k < x.ndim; k++) same = (k == axis && !stack) || x.shape[k] == sum.shape[k];
        if (!same) return cbn_shape_fail(c, "tensors[%u]: its shape does not fit that of tensors[0]", i);
        if (!stack && !cbn_add_ok(sum.shape[axis], x.shape[axis], &sum.shape[axis])) return CBN_OK;
    }
    if (stack) {
        if (sum.ndim == CBN_MAX_DIMS) return CBN_OK;
        memmove(&sum.shape[axis + 1], &sum.shape[axis], (size_t)(sum.ndim - axis) * sizeof sum.shape[0]);
        sum.shape[axis] = list->u.seq->count;
    }
    return cbn_shape_done(c, &sum, sum.ndim + stack, sum.shape);
}

static cbn_status rule_cat(cbn_shape_call *c) { return joined(c, false); }
static cbn_status rule_stack(cbn_shape_call *c) { return joined(c, true); }

/* ---- reducing ---------------------------------------------------------------------------------------------------- */
static cbn_status rule_reduce(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found, constant, keep = false, chosen[CBN_MAX_DIMS];
    CBN_TRY(cbn_shape_input(c, &x, &found));
    const cbn_value *dtype = cbn_shape_arg(c, "dtype"), *out = cbn_shape_arg(c, "out");
    if (!found || x.kind != 'f' || (dtype != NULL && dtype->tag != CBN_V_NONE) ||
        (out != NULL && out->tag != CBN_V_NONE)) {
        return CBN_OK;
    }
    const cbn_value *flags[] = {cbn_shape_arg(c, "keepdim"), cbn_shape_arg(c, "keepdims")};
    for (int i = 0; i < 2; i++) {
        bool flag;
        if (flags[i] == NULL || flags[i]->tag == CBN_V_NONE) continue;
        if (!cbn_shape_bool(flags[i], &flag)) return CBN_OK;
        keep = keep || flag;
    }
    const cbn_value *dim = cbn_shape_arg(c, "dim");
    const bool empty = dim != NULL && cbn_value_is_seq(dim) && dim->u.seq->count == 0;
    if (empty && strncmp(c->op->name, "aten.", 5) != 0) return CBN_OK; /* NumPy reduces nothing then, PyTorch all */
    CBN_TRY(chosen_axes(c, x.ndim, chosen, &constant));
    if (!constant) return CBN_OK;
    int n = 0;
    for (int i = 0; i < x.ndim; i++) {
        if (!chosen[i] && !empty) x.shape[n++] = x.shape[i];
        else if (keep) x.shape[n++] = 1;
    }
    return cbn_shape_done(c, &x, n, x.shape);
}

const cbn_shape_row cbn_shape_rules_views[] = {
    {"reshape", rule_reshape},
    {"flatten", rule_flatten},
    {"as_strided", rule_as_strided},
    {"keeps", rule_keeps},
    {"unsqueeze", rule_unsqueeze},
    {"squeeze", rule_squeeze},
    {"expand", rule_expand},
    {"permute", rule_permute},
    {"transpose", rule_transpose},
    {"transpose_method", rule_transpose_method},
    {"t", rule_t},
    {"slice", rule_slice},
    {"select", rule_select},
    {"getitem", rule_getitem},
    {"cat", rule_cat},
    {"stack", rule_stack},
    {"reduce", rule_reduce},
    {"reduce_method", rule_reduce},
    {NULL, NULL},
};
