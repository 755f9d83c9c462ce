/* SPDX-License-Identifier: BSD-3-Clause */
/* Every row of the list of algorithms with every table, also with those this machine can only emulate: small layers
 * with ragged edges of all kinds, arrays between guard pages, whole numbers, against the row `ref`. */
#include "check.h"
#include "kernels/cbn_amx.h"
#include "ops/conv_plan.h"
#include "threads/cbn_parallel.h"
#include <math.h>
#include <string.h>

typedef struct layer {
    int nd;
    bool transposed;
    int64_t n, g, ic, oc; /* channels of a group */
    int64_t in[3], k[3], stride[3], pad[3], dil[3], output_pad[3];
} layer;

#define ONES {1, 1, 1}
static const layer layers[] = {
    {2, false, 2, 1, 19, 70, {13, 14}, {3, 3}, ONES, {1, 1}, ONES, {0}},
    {2, false, 2, 1, 33, 34, {15, 15}, {3, 3}, {2, 2}, {1, 1}, ONES, {0}},
    {2, false, 1, 1, 40, 48, {2, 3}, {3, 3}, ONES, {1, 1}, ONES, {0}},
    {2, false, 1, 1, 16, 17, {9, 10}, {5, 5}, ONES, {2, 2}, ONES, {0}},
    {2, false, 1, 1, 17, 20, {11, 12}, {3, 3}, ONES, {2, 2}, {2, 2}, {0}},
    {2, false, 1, 1, 20, 16, {9, 11}, {1, 7}, ONES, {0, 3}, ONES, {0}},
    {2, false, 2, 1, 3, 33, {29, 31}, {7, 7}, {2, 2}, {3, 3}, ONES, {0}},
    {2, false, 2, 8, 4, 4, {12, 13}, {3, 3}, ONES, {1, 1}, ONES, {0}},
    {2, false, 1, 3, 16, 18, {7, 9}, {3, 3}, ONES, {0, 1}, ONES, {0}},
    {2, false, 2, 2, 33, 50, {11, 13}, {1, 1}, ONES, {0}, ONES, {0}},
    {2, false, 1, 1, 128, 130, {10, 11}, {1, 1}, ONES, {0}, ONES, {0}},
    {2, false, 1, 1, 18, 200, {15, 14}, {1, 1}, {2, 2}, {0}, ONES, {0}},
    {2, false, 2, 21, 1, 1, {14, 14}, {3, 3}, ONES, {1, 1}, ONES, {0}},
    {2, false, 1, 9, 1, 2, {17, 40}, {5, 5}, {2, 2}, {2, 2}, ONES, {0}},
    {2, false, 2, 20, 1, 1, {7, 7}, {3, 3}, ONES, {1, 1}, ONES, {0}},
    {2, false, 2, 9, 1, 1, {13, 14}, {1, 1}, ONES, {0}, ONES, {0}},
    {1, false, 1, 3, 1, 1, {2500}, {1}, ONES, {0}, ONES, {0}},
    {2, false, 1, 5, 1, 1, {7, 7}, {7, 7}, ONES, {3, 3}, ONES, {0}},
    {1, false, 2, 7, 1, 1, {61}, {9}, ONES, {8}, {2}, {0}},
    {1, false, 2, 1, 18, 33, {61}, {7}, ONES, {9}, {3}, {0}},
    {1, false, 1, 1, 1, 24, {200}, {10}, {5}, {0}, ONES, {0}},
    {3, false, 1, 1, 17, 18, {5, 6, 7}, {3, 3, 3}, ONES, {1, 1, 1}, ONES, {0}},
    {3, false, 1, 6, 1, 1, {4, 5, 18}, {3, 3, 3}, {1, 2, 2}, {1, 1, 1}, ONES, {0}},
    {2, true, 2, 1, 20, 24, {7, 9}, {4, 4}, {2, 2}, {1, 1}, ONES, {0}},
    {2, true, 2, 1, 18, 21, {7, 9}, {2, 2}, {2, 2}, {0}, ONES, {0}},
    {2, true, 1, 1, 17, 16, {8, 9}, {3, 3}, {2, 2}, {1, 1}, ONES, {1, 1}},
    {2, true, 1, 1, 16, 18, {8, 9}, {3, 3}, ONES, {1, 1}, ONES, {0}},
    {1, true, 1, 1, 18, 9, {13}, {16}, {8}, {4}, ONES, {0}},
    {3, true, 1, 2, 5, 6, {3, 4, 5}, {2, 2, 2}, {2, 2, 2}, {0}, ONES, {0}},
    {0, false, 1, 1, 100, 70, {0}, {0}, {0}, {0}, {0}, {0}},
    {0, false, 7, 1, 37, 130, {0}, {0}, {0}, {0}, {0}, {0}},
};
enum { NLAYERS = sizeof layers / sizeof layers[0] };

#define NAME_OF(name) #name,
static const char *const rows[] = {CBN_CONV_IMPLS(NAME_OF)};
#undef NAME_OF
#define SPREADS_OF(name) cbn_conv_##name.spreads_nonfinite,
static bool fractions(int row) { return (const bool[]){CBN_CONV_IMPLS(SPREADS_OF)}[row]; }
#undef SPREADS_OF
#define ROW_OF(name) ROW_##name,
enum { CBN_CONV_IMPLS(ROW_OF) NROWS, REF = NROWS - 1 };
#undef ROW_OF

typedef struct arrays {
    float *x, *w, *b, *residual, *y;
    size_t nx, nw, ny;
    const float *want;
} arrays;

static float *numbers(size_t n, check_side side) {
    float *p = check_guard(n * sizeof *p, side);
    check_fill_int(p, n, -2, 2);
    return p;
}

/* Whole numbers come out exactly, but for rows that transform the data: they work with fractions, and a mistake would
 * be off by one or more. */
static bool right(const arrays *a, bool exact, const char *isa, const char *row, int index, int variant) {
    for (size_t i = 0; i < a->ny; i++) {
        const float got = a->y[i], want = a->want[i];
        const bool good = got == want || (isnan(got) && isnan(want)) || (!exact && fabsf(got - want) < 0.25f);
        if (!CHECK_MSG(good, "%s %s, layer %d, variant %d: y[%d] is %g, expected %g", isa, row, index, variant, (int)i,
                       (double)got, (double)want))
            return false;
    }
    return true;
}

/* Runs a layer with those of the rows first .. end - 1 that take it. Variants: 0 one thread, 1 three threads, 2 these
 * and an Inf in the input. */
static void run_layer(const cbn_kernels *k, int first, int end, int index, int variant, int ran[NROWS]) {
    const layer *l = &layers[index];
    const check_side side = variant == 1 ? CHECK_LEFT : CHECK_RIGHT;
    cbn_conv_geometry g = {.dtype = CBN_F32, .nd = l->nd, .transposed = l->transposed, .g = l->g};
    int64_t shape[5] = {l->g * l->oc, l->ic}, out[3] = {0};
    if (l->transposed) shape[0] = l->g * l->ic, shape[1] = l->oc;
    arrays a = {.nx = (size_t)(l->n * l->g * l->ic), .nw = (size_t)(shape[0] * shape[1]),
                .ny = (size_t)(l->n * l->g * l->oc)};
    for (int i = 0; i < l->nd; i++) {
        g.stride[i] = l->stride[i];
        g.dil[i] = l->dil[i];
        g.pad[i] = l->pad[i];
        g.output_pad[i] = l->output_pad[i];
        shape[2 + i] = l->k[i];
        a.nx *= (size_t)l->in[i];
        a.nw *= (size_t)l->k[i];
    }
    cbn_error err = {0};
    if (!CHECK(cbn_conv_geometry_check(&g, shape, -1, &err) == CBN_OK)) return;
    a.w = numbers(a.nw, side);
    a.b = numbers((size_t)(l->g * l->oc), side);
    a.x = numbers(a.nx, side);
    if (variant == 2) a.x[a.nx / 2] = INFINITY; /* stays where it belongs */
    /* No row declines for the sake of rounding errors when results may be less exact. */
    const cbn_plan_options opt = {.activation = index % 2 ? CBN_ACT_RELU : CBN_ACT_NONE,
                                  .precision = variant == 0 ? CBN_PRECISION_FP32 : CBN_PRECISION_FAST,
                                  .kernels = k,
                                  .borrow = variant == 0}; /* which makes it a plan of one call */
    cbn_conv_plan *p;
    if (!CHECK_MSG(cbn_plan_create(&g, a.w, a.b, &opt, &p, &err) == CBN_OK, "%s", err.message)) return;
    CHECK(cbn_plan_output(p, l->n, g.ic, l->in, out, &err) == CBN_OK);
    for (int i = 0; i < l->nd; i++) a.ny *= (size_t)out[i];
    a.residual = index / 2 % 2 ? numbers(a.ny, side) : NULL;
    a.y = check_guard(a.ny * sizeof(float), side);
    float *want = check_guard(a.ny * sizeof(float), side);
    a.want = want;
    cbn_threads_set(variant == 0 ? 1 : 3);
    CHECK(cbn_plan_force(p, l->in, rows[REF], &err) == CBN_OK);
    CHECK(cbn_plan_run(p, a.x, l->n, l->in, a.residual, want, &err) == CBN_OK);
    for (int row = first; row < end; row++) {
        if (cbn_plan_force(p, l->in, rows[row], &err) != CBN_OK) continue;
        ran[row]++;
        check_sentinel_fill(a.y, a.ny);
        CHECK_MSG(cbn_plan_run(p, a.x, l->n, l->in, a.residual, a.y, &err) == CBN_OK, "%s", err.message);
        right(&a, !fractions(row), k->isa, rows[row], index, variant);
    }
    cbn_plan_destroy(p);
}

static void all_layers(const cbn_kernels *k, int first, int end) {
    const int threads = cbn_threads_get(NULL), slow = check_under("valgrind") || check_under("qemu") || k->amx;
    int ran[NROWS] = {0};
    for (int i = 0; i < NLAYERS; i++)
        for (int variant = slow ? 2 : 0; variant < 3; variant++) {
            const size_t mark = check_mark();
            run_layer(k, first, end, i, variant, ran);
            check_release(mark);
        }
    cbn_threads_set(threads);
    for (int row = first; row < end; row++)
        CHECK_MSG(ran[row] || (row == ROW_amx && !k->amx), "%s: no layer for %s", k->isa, rows[row]);
}

CHECK_TEST(rows_with_every_table) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) all_layers(*t, 0, REF);
}

/* The unit besides the widest vectors there are. */
CHECK_TEST(rows_with_the_emulated_matrix_unit) {
    cbn_kernels k = *check_tables()[0];
    k.isa = "amx_emulated";
    k.amx = &cbn_amx_emulated;
    all_layers(&k, ROW_amx, ROW_amx + 1);
}
