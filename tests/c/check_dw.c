/* SPDX-License-Identifier: BSD-3-Clause */
/* conv_dw of every table against the definition, on whole numbers (exact in any order), between guard pages, with
 * untouched elements checked; and the vector operations that only it uses. */
#include "check.h"
#include <math.h>

typedef struct dw_case {
    cbn_conv_dw_args a;
    float *x, *w, *y, *residual;
} dw_case;

static int64_t out_size(int64_t in, int64_t pad, int64_t k, int64_t dil, int64_t stride) {
    const int64_t room = in + 2 * pad - (k - 1) * dil - 1;
    return room < 0 ? 0 : room / stride + 1;
}

/* Any shape, with the weight on what the kernel has fast paths for. */
static bool random_shape(cbn_conv_dw_args *a) {
    static const int32_t common[] = {1, 3, 3, 5, 7};
    const bool deep = check_range(0, 3) == 0;
    a->kh = check_range(0, 5) ? common[check_range(0, 4)] : (int32_t)check_range(1, 9);
    a->kw = check_range(0, 2) ? a->kh : (int32_t)check_range(1, 8);
    a->kd = deep ? (int32_t)check_range(1, 3) : 1;
    a->sh = (int32_t)check_range(1, 2);
    a->sw = check_range(0, 5) ? a->sh : (int32_t)check_range(1, 3);
    a->sd = deep ? (int32_t)check_range(1, 2) : 1;
    a->dh = check_range(0, 3) ? 1 : (int32_t)check_range(1, 3);
    a->dw = check_range(0, 3) ? 1 : (int32_t)check_range(1, 4);
    a->dd = deep ? (int32_t)check_range(1, 2) : 1;
    a->ph = (int32_t)check_range(0, a->kh);
    a->pw = (int32_t)(check_range(0, 3) ? check_range(0, a->kw) : check_range(0, 40));
    a->pd = deep ? (int32_t)check_range(0, 2) : 0;
    a->id = deep ? check_range(1, 5) : 1;
    a->ih = check_range(0, 4) ? check_range(1, 40) : 1;
    a->iw = check_range(1, 70);
    if (check_range(0, 9) == 0) { /* one row: a 1-D convolution */
        a->ih = a->kh = a->sh = a->dh = a->sw = 1;
        a->ph = 0;
        a->iw = check_range(1, 700);
        a->pw = (int32_t)check_range(0, 70);
        a->dw = (int32_t)check_range(1, 64);
    }
    a->od = out_size(a->id, a->pd, a->kd, a->dd, a->sd);
    a->oh = out_size(a->ih, a->ph, a->kh, a->dh, a->sh);
    a->ow = out_size(a->iw, a->pw, a->kw, a->dw, a->sw);
    return a->od > 0 && a->oh > 0 && a->ow > 0;
}

static void random_case(dw_case *c, check_side side) {
    c->a = (cbn_conv_dw_args){0};
    while (!random_shape(&c->a)) continue;
    cbn_conv_dw_args *a = &c->a;
    a->od0 = check_range(0, 2) ? 0 : check_range(0, a->od);
    a->od1 = check_range(0, 2) ? a->od : check_range(a->od0, a->od);
    a->oh0 = check_range(0, 1) ? 0 : check_range(0, a->oh);
    a->oh1 = check_range(0, 1) ? a->oh : check_range(a->oh0, a->oh);
    a->bias = (float)check_range(-3, 3);
    a->lo = check_range(0, 1) ? -INFINITY : -20.0f;
    a->hi = check_range(0, 1) ? INFINITY : 20.0f;
    const size_t nx = (size_t)(a->id * a->ih * a->iw), ny = (size_t)(a->od * a->oh * a->ow);
    const size_t nw = (size_t)(a->kd * a->kh * a->kw);
    a->x = c->x = check_guard(nx * sizeof(float), side);
    a->w = c->w = check_guard(nw * sizeof(float), side);
    a->y = c->y = check_guard(ny * sizeof(float), side);
    c->residual = check_range(0, 2) ? NULL : check_guard(ny * sizeof(float), side);
    a->residual = c->residual;
    check_fill_int(c->x, nx, -4, 4);
    check_fill_int(c->w, nw, -4, 4);
    check_sentinel_fill(c->y, ny);
    if (c->residual) check_fill_int(c->residual, ny, -9, 9);
}

static float expected(const cbn_conv_dw_args *a, int64_t d, int64_t h, int64_t w) {
    double sum = a->bias;
    for (int i = 0; i < a->kd; i++)
        for (int j = 0; j < a->kh; j++)
            for (int k = 0; k < a->kw; k++) {
                const int64_t id = d * a->sd - a->pd + i * a->dd, ih = h * a->sh - a->ph + j * a->dh;
                const int64_t iw = w * a->sw - a->pw + k * a->dw;
                if (id < 0 || id >= a->id || ih < 0 || ih >= a->ih || iw < 0 || iw >= a->iw) continue;
                sum += (double)a->w[(i * a->kh + j) * a->kw + k] * (double)a->x[(id * a->ih + ih) * a->iw + iw];
            }
    if (a->residual) sum += a->residual[(d * a->oh + h) * a->ow + w];
    return (float)fmin(fmax(sum, a->lo), a->hi);
}

static bool verify(const dw_case *c, const char *isa, int number) {
    const cbn_conv_dw_args *a = &c->a;
    for (int64_t d = 0; d < a->od; d++)
        for (int64_t h = 0; h < a->oh; h++)
            for (int64_t w = 0; w < a->ow; w++) {
                const float got = c->y[(d * a->oh + h) * a->ow + w];
                const bool ours = d >= a->od0 && d < a->od1 && h >= a->oh0 && h < a->oh1;
                const float want = ours ? expected(a, d, h, w) : 0;
                if (ours ? got == want : check_sentinel_is(got)) continue;
                return check_fail(__FILE__, __LINE__,
                                  "%s case %d at (%lld %lld %lld): %g, expected %s%g; k %dx%dx%d s %d,%d,%d p %d,%d,%d "
                                  "d %d,%d,%d i %lldx%lldx%lld rows [%lld, %lld)",
                                  isa, number, (long long)d, (long long)h, (long long)w, (double)got,
                                  ours ? "" : "nothing written, not ", (double)want, a->kd, a->kh, a->kw, a->sd, a->sh,
                                  a->sw, a->pd, a->ph, a->pw, a->dd, a->dh, a->dw, (long long)a->id, (long long)a->ih,
                                  (long long)a->iw, (long long)a->oh0, (long long)a->oh1);
            }
    return true;
}

CHECK_TEST(conv_dw_random) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++)
        for (int i = 0; i < 1200; i++) {
            const size_t mark = check_mark();
            dw_case c;
            random_case(&c, i % 2 ? CHECK_RIGHT : CHECK_LEFT);
            (*t)->conv_dw(&c.a);
            const bool ok = verify(&c, (*t)->isa, i);
            check_release(mark);
            if (!ok && check_failures() > 4) return;
        }
}

/* Every width around the vector length, for every fast path: the borders of the column tiles. */
CHECK_TEST(conv_dw_widths) {
    static const struct {
        int32_t k, s, dil;
    } kinds[] = {{1, 1, 1}, {3, 1, 1}, {5, 1, 1}, {7, 1, 1}, {3, 2, 1}, {5, 2, 1}, {7, 2, 1},
                 {3, 1, 2}, {4, 1, 1}, {3, 3, 1}};
    for (const cbn_kernels *const *t = check_tables(); *t; t++)
        for (size_t q = 0; q < sizeof kinds / sizeof kinds[0]; q++)
            for (int64_t w = 1; w <= 3 * (*t)->lanes + 8; w++) {
                const size_t mark = check_mark();
                dw_case c = {0};
                cbn_conv_dw_args *a = &c.a;
                a->kd = a->sd = a->dd = 1;
                a->kh = a->kw = kinds[q].k;
                a->sh = a->sw = kinds[q].s;
                a->dh = a->dw = kinds[q].dil;
                a->ph = a->pw = kinds[q].k / 2 * kinds[q].dil;
                a->id = a->od = a->od1 = 1;
                a->ih = w % 7 ? 19 : w; /* square ones have code of their own */
                a->iw = w;
                a->oh = a->oh1 = out_size(a->ih, a->ph, a->kh, a->dh, a->sh);
                a->ow = out_size(w, a->pw, a->kw, a->dw, a->sw);
                a->lo = -INFINITY;
                a->hi = INFINITY;
                const size_t ny = (size_t)(a->oh * a->ow);
                a->x = c.x = check_guard((size_t)(a->ih * w) * sizeof(float), CHECK_RIGHT);
                a->w = c.w = check_guard((size_t)(a->kh * a->kw) * sizeof(float), CHECK_RIGHT);
                a->y = c.y = check_guard(ny * sizeof(float), CHECK_RIGHT);
                check_fill_int(c.x, (size_t)(a->ih * w), -4, 4);
                check_fill_int(c.w, (size_t)(a->kh * a->kw), -4, 4);
                check_sentinel_fill(c.y, ny);
                if (ny > 0) {
                    (*t)->conv_dw(a);
                    verify(&c, (*t)->isa, (int)w);
                }
                check_release(mark);
                if (check_failures() > 4) return;
            }
}

/* Several planes in one call, of the sizes that have code of their own and others: what as many calls give, to the
 * bit. */
CHECK_TEST(conv_dw_planes) {
    static const int32_t sizes[] = {5, 7, 14, 17, 40}, kernels[] = {3, 5, 7};
    for (const cbn_kernels *const *t = check_tables(); *t; t++)
        for (int q = 0; q < 240; q++) {
            const size_t mark = check_mark();
            const int32_t n = sizes[q % 5], k = kernels[q / 5 % 3], s = 1 + q / 15 % 2, planes = 1 + q / 30 % 4;
            const int32_t o = (n - 1) / s + 1;
            const bool shared = q / 60 % 2, residual = q / 120 % 2; /* one input for all planes */
            const check_side side = q % 7 < 3 ? CHECK_RIGHT : CHECK_LEFT;
            const size_t nx = (size_t)(n * n) * (size_t)(shared ? 1 : planes), ny = (size_t)(o * o * planes);
            float *x = check_guard(nx * sizeof *x, side), *y = check_guard(ny * sizeof *y, side);
            float *w = check_guard((size_t)(k * k * planes) * sizeof *w, side);
            float *r = check_guard(ny * sizeof *r, side), *want = check_guard(ny * sizeof *want, side), bias[4];
            check_fill_uniform(x, nx, -1, 1);
            check_fill_uniform(w, (size_t)(k * k * planes), -1, 1);
            check_fill_uniform(r, ny, -1, 1);
            check_fill_uniform(bias, 4, -1, 1);
            cbn_conv_dw_args a = {.x = x, .w = w, .y = y, .residual = residual ? r : NULL, .bias = bias[0],
                                  .lo = 0, .hi = 2, .id = 1, .ih = n, .iw = n, .od = 1, .oh = o, .ow = o,
                                  .kd = 1, .kh = k, .kw = k, .sd = 1, .sh = s, .sw = s, .ph = k / 2, .pw = k / 2,
                                  .dd = 1, .dh = 1, .dw = 1, .od1 = 1, .oh1 = o,
                                  .more = planes - 1, .x_step = shared ? 0 : n * n, .more_bias = bias + 1};
            check_sentinel_fill(y, ny);
            (*t)->conv_dw(&a);
            a.more = 0;
            for (int32_t i = 0; i < planes; i++) {
                a.x = x + i * a.x_step;
                a.w = w + i * k * k;
                a.y = want + i * o * o;
                a.residual = residual ? r + i * o * o : NULL;
                a.bias = bias[i];
                /* In two runs of rows, which no code for whole maps takes. */
                for (a.oh0 = 0; a.oh0 < o; a.oh0 = a.oh1) {
                    a.oh1 = a.oh0 == 0 ? o / 2 + 1 : o;
                    (*t)->conv_dw(&a);
                }
            }
            check_equal_f32(y, want, ny, "%s %d planes of %d, k %d, s %d", (*t)->isa, planes, n, k, s);
            check_release(mark);
            if (check_failures() > 4) return;
        }
}

CHECK_TEST(conv_dw_nan_stays) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        float x[40 * 40], y[40 * 40], w[9];
        check_fill_int(x, 40 * 40, -4, 4);
        check_fill_int(w, 9, 1, 4);
        x[17 * 40 + 21] = NAN;
        cbn_conv_dw_args a = {.x = x, .w = w, .y = y, .lo = 0, .hi = 6, .id = 1, .ih = 40, .iw = 40, .od = 1,
                              .oh = 40, .ow = 40, .kd = 1, .kh = 3, .kw = 3, .sd = 1, .sh = 1, .sw = 1, .ph = 1,
                              .pw = 1, .dd = 1, .dh = 1, .dw = 1, .od1 = 1, .oh1 = 40};
        (*t)->conv_dw(&a);
        for (int h = 0; h < 40; h++)
            for (int c = 0; c < 40; c++) {
                const bool near = h >= 16 && h <= 18 && c >= 20 && c <= 22, nan = y[h * 40 + c] != y[h * 40 + c];
                CHECK_MSG(near == nan, "%s: (%d, %d) is %g", (*t)->isa, h, c, (double)y[h * 40 + c]);
            }
    }
}

/* The value of an output may not depend on how the rows are shared out. */
CHECK_TEST(conv_dw_same_bits_for_any_rows) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++)
        for (int s = 1; s <= 2; s++) {
            enum { H = 37, W = 43 };
            static float x[H * W], whole[H * W], parts[H * W];
            float w[25];
            check_fill_uniform(x, H * W, -1, 1);
            check_fill_uniform(w, 25, -1, 1);
            cbn_conv_dw_args a = {.x = x, .w = w, .y = whole, .bias = 0.3f, .lo = -9, .hi = 9, .id = 1, .ih = H,
                                  .iw = W, .od = 1, .kd = 1, .kh = 5, .kw = 5, .sd = 1, .sh = s, .sw = s, .ph = 2,
                                  .pw = 2, .dd = 1, .dh = 1, .dw = 1, .od1 = 1};
            a.oh = a.oh1 = out_size(H, 2, 5, 1, s);
            a.ow = out_size(W, 2, 5, 1, s);
            (*t)->conv_dw(&a);
            a.y = parts;
            for (int64_t h = 0, step = 1; h < a.oh; h += step, step = step % 5 + 1) {
                a.oh0 = h;
                a.oh1 = CBN_MIN(h + step, a.oh);
                (*t)->conv_dw(&a);
            }
            check_equal_f32(parts, whole, (size_t)(a.oh * a.ow), "%s stride %d", (*t)->isa, s);
        }
}

CHECK_BENCH(conv_dw) {
    static const struct {
        const char *name;
        int32_t h, k, s;
    } shapes[] = {{"112 k3", 112, 3, 1}, {"112 k3 s2", 112, 3, 2}, {"56 k3", 56, 3, 1}, {"14 k3", 14, 3, 1},
                  {"7 k3", 7, 3, 1},     {"56 k5 s2", 56, 5, 2},   {"14 k5", 14, 5, 1}, {"56 k7", 56, 7, 1}};
    static float x[112 * 112], y[112 * 112], w[49];
    check_fill_uniform(x, 112 * 112, -1, 1);
    check_fill_uniform(w, 49, -1, 1);
    for (const cbn_kernels *const *t = check_tables(); *t; t++)
        for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
            const int32_t h = shapes[i].h, k = shapes[i].k, s = shapes[i].s, o = (h - 1) / s + 1;
            const cbn_conv_dw_args a = {.x = x, .w = w, .y = y, .lo = 0, .hi = 6, .id = 1, .ih = h, .iw = h, .od = 1,
                                        .oh = o, .ow = o, .kd = 1, .kh = k, .kw = k, .sd = 1, .sh = s, .sw = s,
                                        .ph = k / 2, .pw = k / 2, .dd = 1, .dh = 1, .dw = 1, .od1 = 1, .oh1 = o};
            double best = 1e9;
            for (int r = 0; r < 300; r++) {
                const double t0 = check_seconds();
                for (int q = 0; q < 10; q++) (*t)->conv_dw(&a);
                best = fmin(best, (check_seconds() - t0) / 10);
            }
            check_report(shapes[i].name, (*t)->isa, 2.0 * k * k * o * o / best * 1e-9);
        }
}
