/* SPDX-License-Identifier: BSD-3-Clause */
/* The elementwise kernels of every table: sizes around the vector length, guard pages on either side, exact data. */
#include "check.h"
#include <math.h>
#include <string.h>

/* Sizes worth trying with vectors of `lanes`: 0, 1, lanes - 1, lanes, lanes + 1, 2*lanes + 3, a prime, and more. */
enum { SIZES = 9 };
static int64_t size_of(int i, int lanes) {
    const int64_t sizes[SIZES] = {0, 1, lanes - 1, lanes, lanes + 1, 2 * lanes - 1, 2 * lanes + 3, 97, 4 * lanes};
    return sizes[i];
}

#define FOR_EACH_CASE(t, n, side)                                                                  \
    for (const cbn_kernels *const *t = check_tables(); *t; t++)                                    \
        for (int i_ = 0; i_ < SIZES; i_++)                                                         \
            for (int side = 0; side < 2; side++)                                                   \
                for (int64_t n = size_of(i_, (*t)->lanes), once_ = 1; once_; once_ = 0)

static float *floats(int64_t n, int side) { return check_guard((size_t)n * sizeof(float), (check_side)side); }

CHECK_TEST(vec_arithmetic) {
    FOR_EACH_CASE(t, n, side) {
        const size_t mark = check_mark();
        float *x = floats(n, side), *z = floats(n, side), *y = floats(n, side), *want = floats(n, side);
        check_fill_int(x, (size_t)n, -9, 9);
        check_fill_int(z, (size_t)n, -9, 9);
        (*t)->affine(y, x, 3.0f, -2.0f, n);
        for (int64_t i = 0; i < n; i++) want[i] = x[i] * 3.0f - 2.0f;
        check_equal_f32(y, want, (size_t)n, "affine %s n=%lld", (*t)->isa, (long long)n);
        (*t)->add(y, x, z, -2.0f, n);
        for (int64_t i = 0; i < n; i++) want[i] = x[i] - 2.0f * z[i];
        check_equal_f32(y, want, (size_t)n, "add %s n=%lld", (*t)->isa, (long long)n);
        (*t)->mul(y, x, z, n);
        for (int64_t i = 0; i < n; i++) want[i] = x[i] * z[i];
        check_equal_f32(y, want, (size_t)n, "mul %s n=%lld", (*t)->isa, (long long)n);
        memcpy(y, z, (size_t)n * sizeof *y); /* y == z */
        (*t)->add(y, x, y, 1.0f, n);
        for (int64_t i = 0; i < n; i++) want[i] = x[i] + z[i];
        check_equal_f32(y, want, (size_t)n, "add in place %s n=%lld", (*t)->isa, (long long)n);
        check_release(mark);
    }
}

CHECK_TEST(vec_add_is_one_fma) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        /* a*z needs 48 bits; x takes the leading ones away */
        float x[5], z[5], y[5];
        for (int i = 0; i < 5; i++) {
            z[i] = 1.0f + 0x1p-23f * (float)(i + 1);
            x[i] = -1.0f;
        }
        const float alpha = 1.0f + 0x1p-12f;
        (*t)->add(y, x, z, alpha, 5);
        for (int i = 0; i < 5; i++) {
            const float want = fmaf(alpha, z[i], x[i]);
            CHECK_MSG(y[i] == want, "%s: %.9g, expected %.9g", (*t)->isa, (double)y[i], (double)want);
        }
    }
}

/* ---- activations ------------------------------------------------------------------------------------------------- */

static double act_exact(cbn_act act, double a, double b, double x) {
    switch (act) {
    case CBN_ACT_NONE: return x;
    case CBN_ACT_RELU: return x < 0 ? 0 : x;
    case CBN_ACT_RELU6: return x < 0 ? 0 : x > 6 ? 6 : x;
    case CBN_ACT_LEAKY_RELU: return x > 0 ? x : a * x;
    case CBN_ACT_SIGMOID: return 1 / (1 + exp(-x));
    case CBN_ACT_HARDTANH: return x < a ? a : x > b ? b : x;
    case CBN_ACT_HARDSWISH: return x * ((x < -3 ? 0 : x > 3 ? 6 : x + 3) / 6);
    case CBN_ACT_SILU: return x / (1 + exp(-x));
    case CBN_ACT_GELU: return x * (0.5 * erfc(-x / sqrt(2.0)));
    case CBN_ACT_GELU_TANH: return x / (1 + exp(-2 * sqrt(2 / acos(-1.0)) * (x + 0.044715 * x * x * x)));
    }
    return NAN;
}

/* Largest error allowed, in units in the last place of the exact result. Where an exponential of a large argument is
 * taken, its relative error grows with the argument: gelu_tanh's is a rounded sum of a few. */
static double ulps_allowed(cbn_act act, double x) {
    switch (act) {
    case CBN_ACT_HARDSWISH: return fabs(x + 3) < 0.5 ? 1e9 : 3; /* x + 3 is rounded: bounded absolutely below */
    case CBN_ACT_SIGMOID:
    case CBN_ACT_SILU: return 3;
    case CBN_ACT_GELU: return x > -6 ? 4 : 12;
    case CBN_ACT_GELU_TANH: return x >= 0 ? 4 : 4 + 12 * fabs(x + 0.045 * x * x * x);
    default: return 0.5000001; /* exact or one multiplication */
    }
}

static double ulp(double v) {
    int e;
    frexp(v, &e);
    return ldexp(1.0, (e < -110 ? -110 : e) - 24); /* below 1e-33 an absolute error of 5e-41 will do */
}

CHECK_TEST(vec_unary_accuracy) {
    enum { N = 20011 };
    float *x = floats(N, 1), *y = floats(N, 1);
    for (int i = 0; i < N; i++) x[i] = -40.0f + 80.0f * (float)i / (float)(N - 1);
    for (int i = 0; i < 400; i++) x[i] = ldexpf(i % 2 ? 1.25f : -1.25f, -i / 4); /* down to 1e-30 */
    for (const cbn_kernels *const *t = check_tables(); *t; t++)
        for (int act = CBN_ACT_NONE; act <= CBN_ACT_GELU_TANH; act++) {
            const float a = act == CBN_ACT_HARDTANH ? -0.5f : 0.125f, b = 2.0f;
            double worst = 0, at = 0;
            (*t)->unary((cbn_act)act, a, b, y, x, N);
            for (int i = 0; i < N; i++) {
                const double want = act_exact((cbn_act)act, a, b, x[i]);
                const double err = fabs((double)y[i] - want) / ulp(want), share = err / ulps_allowed((cbn_act)act, x[i]);
                if (!(share <= worst)) worst = share, at = x[i];
                CHECK_MSG(fabs((double)y[i] - want) <= 1e-5 * fabs((double)x[i]) + 2e-7, "%s act %d at %g: %g, not %g",
                          (*t)->isa, act, (double)x[i], (double)y[i], want);
            }
            CHECK_MSG(worst <= 1, "%s act %d: %.2f times the allowed error at %.9g", (*t)->isa, act, worst, at);
        }
}

CHECK_TEST(vec_unary_sizes) {
    FOR_EACH_CASE(t, n, side) {
        const size_t mark = check_mark();
        float *x = floats(n, side), *y = floats(n, side), *one = floats(1, side);
        check_fill_uniform(x, (size_t)n, -8, 8);
        for (int act = CBN_ACT_NONE; act <= CBN_ACT_GELU_TANH; act++) {
            (*t)->unary((cbn_act)act, -0.5f, 2.0f, y, x, n);
            for (int64_t i = 0; i < n; i++) { /* the value may not depend on the place in the vector */
                (*t)->unary((cbn_act)act, -0.5f, 2.0f, one, x + i, 1);
                if (!check_equal_f32(y + i, one, 1, "%s act %d n=%lld i=%lld", (*t)->isa, act, (long long)n, (long long)i))
                    break;
            }
        }
        check_release(mark);
    }
}

CHECK_TEST(vec_unary_limits) {
    static const struct {
        cbn_act act;
        float at_inf, at_minus_inf;
    } limits[] = {
        {CBN_ACT_RELU, INFINITY, 0},     {CBN_ACT_RELU6, 6, 0},        {CBN_ACT_LEAKY_RELU, INFINITY, -INFINITY},
        {CBN_ACT_SIGMOID, 1, 0},         {CBN_ACT_HARDTANH, 2, 0.125f}, {CBN_ACT_HARDSWISH, INFINITY, NAN},
        {CBN_ACT_SILU, INFINITY, NAN},   {CBN_ACT_GELU, INFINITY, NAN}, {CBN_ACT_GELU_TANH, INFINITY, NAN},
    };
    for (const cbn_kernels *const *t = check_tables(); *t; t++)
        for (size_t i = 0; i < sizeof limits / sizeof limits[0]; i++) {
            const float x[4] = {INFINITY, -INFINITY, NAN, 0.0f};
            float y[4];
            (*t)->unary(limits[i].act, 0.125f, 2.0f, y, x, 4);
            const float zero = limits[i].act == CBN_ACT_SIGMOID ? 0.5f : limits[i].act == CBN_ACT_HARDTANH ? 0.125f : 0.0f;
            const float want[4] = {limits[i].at_inf, limits[i].at_minus_inf, NAN, zero};
            check_equal_f32(y, want, 4, "%s act %d", (*t)->isa, (int)limits[i].act);
        }
}

/* ---- float16 ----------------------------------------------------------------------------------------------------- */

/* Written from the format's definition: sign, 5 bits of exponent, 10 of significand. */
static double f16_value(uint16_t h) {
    const int e = h >> 10 & 31, m = h & 1023;
    const double v = e == 31 ? (m ? (double)NAN : (double)INFINITY)
                             : e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
    return h & 0x8000 ? -v : v;
}

CHECK_TEST(vec_f16_all_values) {
    enum { N = 65536 };
    uint16_t *h = check_guard(N * sizeof *h, CHECK_RIGHT), *back = check_guard(N * sizeof *back, CHECK_RIGHT);
    float *wide = floats(N, 1);
    for (int i = 0; i < N; i++) h[i] = (uint16_t)i;
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        (*t)->widen_f16(wide, h, N);
        (*t)->narrow_f16(back, wide, N);
        for (int i = 0; i < N; i++) {
            const double want = f16_value(h[i]);
            const bool nan = want != want;
            if (!CHECK_MSG(nan ? wide[i] != wide[i] : (double)wide[i] == want, "%s: 0x%04x widens to %g", (*t)->isa, i,
                           (double)wide[i]) ||
                !CHECK_MSG(nan ? f16_value(back[i]) != f16_value(back[i]) : back[i] == h[i], "%s: 0x%04x comes back as 0x%04x",
                           (*t)->isa, i, back[i]))
                break;
        }
    }
}

CHECK_TEST(vec_f16_rounding) {
    /* Between any two neighbours: the middle goes to the even one, anything off the middle to the nearer one. */
    for (const cbn_kernels *const *t = check_tables(); *t; t++)
        for (int i = 0; i < 0x7c00; i++) {
            const double lo = f16_value((uint16_t)i), hi = i + 1 == 0x7c00 ? 65536.0 : f16_value((uint16_t)(i + 1));
            const float middle = (float)((lo + hi) / 2);
            const float x[4] = {middle, nextafterf(middle, 0), nextafterf(middle, INFINITY), -middle};
            uint16_t y[4];
            (*t)->narrow_f16(y, x, 4);
            const int even = i & 1 ? i + 1 : i;
            if (!CHECK_MSG(y[0] == even && y[1] == i && y[2] == i + 1 && y[3] == (even | 0x8000),
                           "%s after 0x%04x: %04x %04x %04x %04x", (*t)->isa, i, y[0], y[1], y[2], y[3]))
                break;
        }
}

CHECK_TEST(vec_f16_sizes) {
    FOR_EACH_CASE(t, n, side) {
        const size_t mark = check_mark();
        float *x = floats(n, side), *y = floats(n, side);
        uint16_t *h = check_guard((size_t)n * sizeof *h, (check_side)side);
        check_fill_int(x, (size_t)n, -2000, 2000);
        (*t)->narrow_f16(h, x, n);
        (*t)->widen_f16(y, h, n);
        check_equal_f32(y, x, (size_t)n, "f16 %s n=%lld", (*t)->isa, (long long)n);
        check_release(mark);
    }
}

/* ---- speed ------------------------------------------------------------------------------------------------------- */

CHECK_BENCH(unary) {
    enum { N = 4096 };
    static float x[N], y[N];
    check_fill_uniform(x, N, -8, 8);
    static const char *const names[] = {"none",     "relu",      "relu6", "leaky_relu", "sigmoid",
                                        "hardtanh", "hardswish", "silu",  "gelu",       "gelu_tanh"};
    for (const cbn_kernels *const *t = check_tables(); *t; t++)
        for (int act = CBN_ACT_RELU; act <= CBN_ACT_GELU_TANH; act++) {
            double best = 1e9;
            for (int r = 0; r < 200; r++) {
                const double t0 = check_seconds();
                (*t)->unary((cbn_act)act, 0.1f, 1.0f, y, x, N);
                best = fmin(best, check_seconds() - t0);
            }
            char what[64];
            strcpy(what, (*t)->isa);
            strcat(what, " ");
            strcat(what, names[act]);
            check_report(what, "elements/ns", N / best * 1e-9);
        }
}
