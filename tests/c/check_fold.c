/* SPDX-License-Identifier: BSD-3-Clause */
/* BatchNorm folding, float16 conversion and strided copies against loops over every index. */
#include "check.h"
#include "base/cbn_alloc.h"
#include "ops/bn_fold.h"
#include <fenv.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- strided test arrays ---- */
/* A random view of a buffer of its own: any order of axes, steps of 1 or 2 elements, either
 * direction. */
static cbn_strided make_view(cbn_dtype t, int ndim, const int64_t *shape, void **buffer) {
    cbn_strided v = {.dtype = t, .ndim = ndim};
    int order[CBN_MAX_DIMS];
    int64_t step = (int64_t)cbn_dtype_size(t), offset = check_range(0, 1); /* sometimes unaligned */
    for (int a = 0; a < ndim; a++) order[a] = a;
    for (int a = ndim - 1; a > 0; a--) {
        const int with = (int)check_range(0, a), keep = order[a];
        order[a] = order[with];
        order[with] = keep;
    }
    for (int i = 0; i < ndim; i++) {
        const int a = order[i];
        v.shape[a] = shape[a];
        step *= check_range(1, 2);
        const bool down = check_range(0, 2) == 0;
        if (down) offset += step * CBN_MAX(shape[a] - 1, 0);
        v.stride_bytes[a] = down ? -step : step;
        step *= CBN_MAX(shape[a], 1);
    }
    const size_t bytes = (size_t)step + 16;
    *buffer = malloc(bytes);
    memset(*buffer, 0x5a, bytes);
    v.data = (char *)*buffer + offset;
    return v;
}

static void *element(const cbn_strided *v, const int64_t *index) {
    char *p = v->data;
    for (int a = 0; a < v->ndim; a++) p += index[a] * v->stride_bytes[a];
    return p;
}

/* The next index in C order; false after the last one. */
static bool next_index(const cbn_strided *v, int64_t *index) {
    for (int a = v->ndim - 1; a >= 0; a--) {
        if (++index[a] < v->shape[a]) return true;
        index[a] = 0;
    }
    return false;
}

static bool is_empty(const cbn_strided *v) {
    for (int a = 0; a < v->ndim; a++)
        if (v->shape[a] == 0) return true;
    return false;
}

static void fill_random(const cbn_strided *v) {
    int64_t i[CBN_MAX_DIMS] = {0};
    if (is_empty(v)) return;
    do cbn_store_f64(element(v, i), v->dtype, (double)check_range(-1000, 1000) / 128.0);
    while (next_index(v, i));
}

static bool same_bits(const void *p, cbn_dtype t, double want) {
    char bytes[8];
    cbn_store_f64(bytes, t, want);
    return memcmp(p, bytes, cbn_dtype_size(t)) == 0 || (isnan(want) && isnan(cbn_load_f64(p, t)));
}

CHECK_TEST(strided_copy_any_layout) {
    for (int round = 0; round < 1500; round++) {
        int64_t shape[5];
        const int ndim = (int)check_range(0, 5);
        for (int a = 0; a < ndim; a++)
            shape[a] = check_range(0, 9) == 0 ? check_range(0, 40) : check_range(1, 5);
        void *from, *to;
        cbn_strided src = make_view((cbn_dtype)check_range(0, 2), ndim, shape, &from);
        cbn_strided dst = make_view((cbn_dtype)check_range(0, 2), ndim, shape, &to);
        fill_random(&src);
        if (ndim > 0 && check_range(0, 4) == 0)
            src.stride_bytes[check_range(0, ndim - 1)] = 0; /* broadcast */
        cbn_strided_copy(&src, &dst);
        int64_t i[CBN_MAX_DIMS] = {0};
        bool ok = true;
        if (!is_empty(&dst)) {
            do
                ok &= same_bits(element(&dst, i), dst.dtype,
                                cbn_load_f64(element(&src, i), src.dtype));
            while (ok && next_index(&dst, i));
        }
        CHECK_MSG(ok, "round %d: ndim %d dtypes %d to %d", round, ndim, src.dtype, dst.dtype);
        free(from);
        free(to);
        if (!ok) return;
    }
    /* Gaps between the elements of the destination stay as they are. */
    float gaps[7] = {9, 9, 9, 9, 9, 9, 9}, x[3] = {1, 2, 3};
    const cbn_strided src = {
        .data = x, .dtype = CBN_F32, .ndim = 1, .shape = {3}, .stride_bytes = {4}};
    cbn_strided dst = {
        .data = gaps + 1, .dtype = CBN_F32, .ndim = 1, .shape = {3}, .stride_bytes = {8}};
    cbn_strided_copy(&src, &dst);
    CHECK(gaps[0] == 9 && gaps[1] == 1 && gaps[2] == 9 && gaps[3] == 2 && gaps[4] == 9 &&
          gaps[5] == 3 && gaps[6] == 9);
}

/* ---- float16 ---- */
CHECK_TEST(half_rounds_once_to_nearest_even) {
    uint16_t h;
    double below = 0;
    for (int bits = 0; bits < 0x7c00; bits++) {
        /* Value of a positive finite half from its fields. */
        const int e = bits >> 10, m = bits & 1023;
        const double v = e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
        h = (uint16_t)bits;
        CHECK(cbn_load_f64(&h, CBN_F16) == v);
        cbn_store_f64(&h, CBN_F16, -v);
        CHECK(h == (bits | 0x8000));
        if (bits) {
            const double middle = (below + v) / 2;
            cbn_store_f64(&h, CBN_F16, middle);
            CHECK_MSG(h == (bits & 1 ? bits - 1 : bits), "%a gives %04x", middle, h);
            cbn_store_f64(&h, CBN_F16, nextafter(middle, INFINITY));
            CHECK(h == bits);
            cbn_store_f64(&h, CBN_F16, nextafter(middle, 0));
            CHECK(h == bits - 1);
        }
        below = v;
    }
    static const struct {
        double v;
        uint16_t bits;
    } edges[] = {{65519.999999, 0x7bff}, {65520, 0x7c00},    {1e300, 0x7c00},
                 {-1e300, 0xfc00},       {INFINITY, 0x7c00}, {5e-324, 0},
                 {-0.0, 0x8000},         {0x1p-25, 0},       {0x1.0000000000001p-25, 1}};
    for (size_t i = 0; i < sizeof edges / sizeof edges[0]; i++) {
        cbn_store_f64(&h, CBN_F16, edges[i].v);
        CHECK_MSG(h == edges[i].bits, "%a gives %04x", edges[i].v, h);
    }
    cbn_store_f64(&h, CBN_F16, NAN);
    CHECK((h & 0x7c00) == 0x7c00 && (h & 0x3ff) != 0 && isnan(cbn_load_f64(&h, CBN_F16)));
}

/* ---- folding ---- */
typedef struct fold_case {
    cbn_strided w, b, w_out, b_out;
    cbn_bn bn;
    void *buffers[8];
    int64_t a, j, groups; /* w.shape[0] / groups, w.shape[1] */
    bool transposed;
} fold_case;

static cbn_strided vector(int64_t n, bool present, void **buffer) {
    cbn_strided v = {0};
    *buffer = NULL;
    if (!present) return v;
    v = make_view((cbn_dtype)check_range(0, 2), 1, &n, buffer);
    fill_random(&v);
    return v;
}

static fold_case fold_make(bool bn_first) {
    fold_case f = {.a = check_range(1, 4),
                   .j = check_range(1, 4),
                   .groups = check_range(1, 3),
                   .transposed = check_range(0, 1)};
    int64_t shape[5] = {f.groups * f.a, f.j};
    const int ndim = (int)check_range(3, 5);
    for (int i = 2; i < ndim; i++) shape[i] = check_range(1, 3);
    const int64_t across = f.j * f.groups, oc = f.transposed ? across : shape[0];
    const int64_t channels = bn_first == f.transposed ? shape[0] : across;
    const cbn_dtype t = (cbn_dtype)check_range(0, 2);
    f.w = make_view(t, ndim, shape, &f.buffers[0]);
    f.w_out = make_view(t, ndim, shape, &f.buffers[1]);
    f.b_out = make_view(t, 1, &oc, &f.buffers[2]);
    fill_random(&f.w);
    f.b = vector(oc, check_range(0, 1), &f.buffers[3]);
    f.bn.weight = vector(channels, check_range(0, 3), &f.buffers[4]);
    f.bn.bias = vector(channels, check_range(0, 3), &f.buffers[5]);
    f.bn.mean = vector(channels, true, &f.buffers[6]);
    f.bn.var = vector(channels, true, &f.buffers[7]);
    f.bn.eps = 1e-3;
    for (int64_t c = 0; c < channels; c++) {
        void *v = element(&f.bn.var, &c);
        const double d = fabs(cbn_load_f64(v, f.bn.var.dtype));
        cbn_store_f64(v, f.bn.var.dtype,
                      check_range(0, 9) ? d : -1.0); /* NaN channels now and then */
    }
    return f;
}

static void fold_free(fold_case *f) {
    for (int i = 0; i < 8; i++) free(f->buffers[i]);
}

static double vector_get(const cbn_strided *v, int64_t i, double absent) {
    return v->data ? cbn_load_f64(element(v, &i), v->dtype) : absent;
}
static double scale_of(const cbn_bn *bn, int64_t c) {
    return vector_get(&bn->weight, c, 1) * (1 / sqrt(vector_get(&bn->var, c, 0) + bn->eps));
}

CHECK_TEST(fold_conv_bn_every_index) {
    for (int round = 0; round < 600; round++) {
        fold_case f = fold_make(false);
        cbn_error err = {0};
        CHECK(cbn_fold_conv_bn(&f.w, &f.b, &f.bn, false, f.transposed, f.groups, &f.w_out, &f.b_out,
                               &err) == CBN_OK);
        int64_t i[CBN_MAX_DIMS] = {0};
        bool ok = true;
        do {
            const int64_t c = f.transposed ? i[0] / f.a * f.j + i[1] : i[0];
            ok &= same_bits(element(&f.w_out, i), f.w.dtype,
                            cbn_load_f64(element(&f.w, i), f.w.dtype) * scale_of(&f.bn, c));
        } while (ok && next_index(&f.w, i));
        for (int64_t c = 0; c < f.b_out.shape[0]; c++)
            ok &= same_bits(element(&f.b_out, &c), f.w.dtype,
                            (vector_get(&f.b, c, 0) - vector_get(&f.bn.mean, c, 0)) *
                                    scale_of(&f.bn, c) +
                                vector_get(&f.bn.bias, c, 0));
        fold_free(&f);
        if (!CHECK_MSG(ok, "round %d: transposed %d groups %d", round, f.transposed, (int)f.groups))
            return;
    }
}

CHECK_TEST(fold_bn_conv_every_index) {
    int refused = 0, folded = 0;
    for (int round = 0; round < 600; round++) {
        fold_case f = fold_make(true);
        cbn_error err = {0};
        const bool no_padding = check_range(0, 1), zeros = check_range(0, 1);
        const cbn_status s = cbn_fold_bn_conv(&f.bn, &f.w, &f.b, no_padding, zeros, f.transposed,
                                              f.groups, &f.w_out, &f.b_out, &err);
        bool ok = true;
        if (f.transposed || (zeros && !no_padding)) {
            /* Random statistics never have a shift of 0. */
            ok = s == CBN_FOLD && strcmp(err.reason, "PADDED_PRE_BN") == 0;
            refused++;
        } else if (CHECK(s == CBN_OK)) {
            double *sum = calloc((size_t)f.b_out.shape[0], sizeof *sum);
            int64_t i[CBN_MAX_DIMS] = {0};
            do {
                const int64_t c = i[0] / f.a * f.j + i[1];
                const double w = cbn_load_f64(element(&f.w, i), f.w.dtype),
                             scale = scale_of(&f.bn, c);
                ok &= same_bits(element(&f.w_out, i), f.w.dtype, w * scale);
                sum[i[0]] +=
                    w * (vector_get(&f.bn.bias, c, 0) - vector_get(&f.bn.mean, c, 0) * scale);
            } while (ok && next_index(&f.w, i));
            for (int64_t c = 0; c < f.b_out.shape[0]; c++)
                ok &= same_bits(element(&f.b_out, &c), f.w.dtype, vector_get(&f.b, c, 0) + sum[c]);
            free(sum);
            folded++;
        }
        fold_free(&f);
        if (!CHECK_MSG(ok, "round %d: transposed %d groups %d", round, f.transposed, (int)f.groups))
            return;
    }
    CHECK(refused > 50 && folded > 50);
    /* Without a shift every geometry folds. */
    float w = 3, out, bias = 7, b_out, zero = 0, one = 1;
    cbn_strided sw = {&w, CBN_F32, 3, {1, 1, 1}, {4, 4, 4}}, so = sw,
                v = {&zero, CBN_F32, 1, {1}, {4}}, sb = v, bo = v;
    const cbn_bn bn = {.mean = v, .var = {&one, CBN_F32, 1, {1}, {4}}, .eps = 3.0};
    cbn_error err;
    so.data = &out;
    sb.data = &bias;
    bo.data = &b_out;
    CHECK(cbn_fold_bn_conv(&bn, &sw, &sb, false, true, true, 1, &so, &bo, &err) == CBN_OK &&
          out == 1.5f && b_out == 7);
}

CHECK_TEST(fold_errors_name_argument_and_numbers) {
    float data[64] = {0};
    double stats[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    const cbn_strided w = {data, CBN_F32, 3, {6, 2, 3}, {24, 12, 4}},
                      v6 = {stats, CBN_F64, 1, {6}, {8}};
    const cbn_strided v4 = {stats, CBN_F64, 1, {4}, {8}}, none = {0},
                      two = {stats, CBN_F64, 2, {2, 3}, {24, 8}};
    cbn_strided w_out = w, b_out = {data + 40, CBN_F32, 1, {6}, {4}};
    const struct {
        cbn_strided w, b;
        cbn_bn bn;
        bool linear, transposed;
        int64_t groups;
        const char *text;
    /* clang-format off */
    } cases[] = {
        {w, none, {none, none, none, v6, 0}, false, false, 1,
         "bn_rm: expected running statistics of length 6, got None"},
        {w, none, {none, none, v6, none, 0}, false, false, 1,
         "bn_rv: expected running statistics of length 6, got None"},
        {w, none, {none, none, v6, v6, -1}, false, false, 1,
         "bn_eps: expected a finite number >= 0, got -1"},
        {w, none, {none, none, v6, v6, NAN}, false, false, 1,
         "bn_eps: expected a finite number >= 0, got "},
        {w, none, {none, none, v4, v6, 0}, false, false, 1,
         "bn_rm: expected length 6 (out_channels = conv_w.shape[0]), got 4"},
        {w, none, {v4, none, v6, v6, 0}, false, false, 1, "bn_w: expected length 6 (out_channels"},
        {w, none, {none, two, v6, v6, 0}, false, false, 1, "bn_b: expected 1 dimension, got 2"},
        {w, v4, {none, none, v6, v6, 0}, false, false, 1,
         "conv_b: expected length 6 (out_channels"},
        {w, none, {none, none, v6, v6, 0}, false, true, 2,
         "bn_rm: expected length 4 (out_channels = conv_w.shape[1] * groups), got 6"},
        {w, none, {none, none, v4, v4, 0}, false, true, 4,
         "groups: expected a divisor of conv_w.shape[0] = 6, got 4"},
        {w, none, {none, none, v6, v6, 0}, false, false, 0, "groups: expected >= 1, got 0"},
        {w, none, {none, none, v6, v6, 0}, true, false, 1,
         "linear_w: expected 2 dimensions, got 3"},
        {v6, none, {none, none, v6, v6, 0}, false, false, 1,
         "conv_w: expected at least 2 dimensions, got 1"},
    };
    /* clang-format on */
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        cbn_error err = {0};
        const cbn_status s =
            cbn_fold_conv_bn(&cases[i].w, &cases[i].b, &cases[i].bn, cases[i].linear,
                             cases[i].transposed, cases[i].groups, &w_out, &b_out, &err);
        CHECK_MSG(
            s == CBN_BAD_VALUE && strncmp(err.message, cases[i].text, strlen(cases[i].text)) == 0,
            "case %zu: status %d, '%s' does not start with '%s'", i, s, err.message, cases[i].text);
    }
    cbn_error err = {0};
    const cbn_bn bn = {none, none, v4, v4, 0};
    CHECK(cbn_bn_check(&bn, 4, false, &err) == CBN_OK &&
          cbn_bn_check(&bn, 3, true, &err) == CBN_BAD_VALUE);
    CHECK(strcmp(err.message, "bn_rm: expected length 3 (channels) or 1, got 4") == 0);
}

CHECK_TEST(fold_linear_repeats_single_statistics) {
    double w[6] = {1, 2, 3, 4, 5, 6}, b[3] = {1, 2, 3}, mean = 2, var = 3, gamma = 4, beta = 5,
           w_out[6], b_out[3];
    const cbn_strided sw = {w, CBN_F64, 2, {3, 2}, {16, 8}}, sb = {b, CBN_F64, 1, {3}, {8}};
    cbn_strided wo = {w_out, CBN_F64, 2, {3, 2}, {16, 8}}, bo = {b_out, CBN_F64, 1, {3}, {8}};
    const cbn_bn bn = {{&gamma, CBN_F64, 1, {1}, {8}},
                       {&beta, CBN_F64, 1, {1}, {8}},
                       {&mean, CBN_F64, 1, {1}, {8}},
                       {&var, CBN_F64, 1, {1}, {8}},
                       1.0};
    cbn_error err;
    CHECK(cbn_fold_conv_bn(&sw, &sb, &bn, true, false, 1, &wo, &bo, &err) == CBN_OK);
    for (int i = 0; i < 6; i++) CHECK(w_out[i] == 2 * w[i]);
    for (int i = 0; i < 3; i++) CHECK(b_out[i] == (b[i] - 2) * 2 + 5);
}

CHECK_TEST(fold_raises_no_flags_and_keeps_denormals) {
    if (check_under("valgrind")) {
        check_skip("valgrind does not keep floating-point flags");
        return;
    }
    enum { OC = 64, K = 1000 };
    float *w = malloc(sizeof(float) * OC * K), *w_out = malloc(sizeof(float) * OC * K), b_out[OC];
    double mean[OC], var[OC];
    check_fill_uniform(w, OC * K, -1e-39, 1e-39); /* denormal */
    for (int c = 0; c < OC; c++) {
        mean[c] = 1e300;
        var[c] = c % 3 == 0 ? -1 : c % 3 == 1 ? 0.25 : 0;
    }
    const cbn_strided sw = {w, CBN_F32, 2, {OC, K}, {4 * K, 4}}, none = {0};
    cbn_strided wo = {w_out, CBN_F32, 2, {OC, K}, {4 * K, 4}}, bo = {b_out, CBN_F32, 1, {OC}, {4}};
    const cbn_bn bn = {
        none, none, {mean, CBN_F64, 1, {OC}, {8}}, {var, CBN_F64, 1, {OC}, {8}}, 0.0};
    cbn_error err;
    feclearexcept(FE_ALL_EXCEPT);
    feraiseexcept(FE_DIVBYZERO);
    CHECK(cbn_fold_conv_bn(&sw, &none, &bn, false, false, 1, &wo, &bo, &err) == CBN_OK);
    CHECK_MSG(fetestexcept(FE_ALL_EXCEPT) == FE_DIVBYZERO, "flags 0x%x",
              fetestexcept(FE_ALL_EXCEPT));
    feclearexcept(FE_ALL_EXCEPT);
    CHECK(isnan(w_out[0]) && isnan(b_out[0]) && b_out[1] == -INFINITY);
    int wrong = 0;
    for (int i = 0; i < K; i++) wrong += w_out[K + i] != 2 * w[K + i];
    CHECK_MSG(wrong == 0, "%d denormal weights were not doubled", wrong);
    free(w);
    free(w_out);
}

CHECK_TEST(fold_allocation_failure) {
    fold_case f = fold_make(false);
    cbn_error err = {0};
    cbn_alloc_stats before, after;
    cbn_alloc_get_stats(&before);
    cbn_alloc_fail_after(0);
    CHECK(cbn_fold_conv_bn(&f.w, &f.b, &f.bn, false, f.transposed, f.groups, &f.w_out, &f.b_out,
                           &err) == CBN_NO_MEMORY);
    cbn_alloc_fail_after(-1);
    CHECK(strncmp(err.message, "out of memory: ", 15) == 0);
    cbn_alloc_get_stats(&after);
    CHECK(after.live_blocks == before.live_blocks);
    fold_free(&f);
}
