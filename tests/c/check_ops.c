/* SPDX-License-Identifier: BSD-3-Clause */
/* Convolution descriptions: axis classes by brute force, operation counts, error messages. */
#include "check.h"
#include "ops/conv_desc.h"
#include <string.h>

/* ---- axis classes ---- */
enum { MAX_OUT = 80, MAX_TAPS = 8 };

/* Checks the classes of one axis against the definition; false after a failure. */
static bool check_axis(const cbn_conv_desc *d) {
    const int64_t in = d->in[2], out = d->out[2], k = d->k[2], s = d->stride[2], lo = d->pad_lo[2],
                  dil = d->dil[2];
    int seen[MAX_OUT] = {0};
    cbn_axis_plan p;
    cbn_error err;
    if (!CHECK(cbn_axis_plan_make(d, 2, &p, &err) == CBN_OK)) return false;
    bool ok = true;
    for (int64_t c = 0; c < p.nclasses && ok; c++) {
        const cbn_axis_class *a = &p.classes[c];
        ok &= CHECK(a->count > 0);
        for (int64_t j = 0; j < a->count && ok; j++) {
            const int64_t o = a->out0 + j * a->out_step;
            if (!(ok &= CHECK(o >= 0 && o < out))) break;
            seen[o]++;
            int64_t n = 0;
            for (int64_t t = 0; t < k && ok; t++) {
                const int64_t at = d->transposed ? o + lo - t * dil : o * s - lo + t * dil;
                if (d->transposed && ((at % s) + s) % s != 0) continue;
                const int64_t i = d->transposed ? (at - ((at % s) + s) % s) / s : at;
                if (i < 0 || i >= in) continue;
                ok &= n < a->ntaps && a->tap_k[n] == t &&
                      a->in0 + j * a->in_step + a->tap_in[n] == i && a->in0 >= 0 &&
                      a->tap_in[n] >= 0;
                n++;
            }
            ok &= n == a->ntaps;
        }
    }
    for (int64_t o = 0; o < out; o++) ok &= seen[o] == 1;
    cbn_axis_plan_free(&p);
    return CHECK_MSG(ok, "in %d k %d stride %d pad %d dil %d out %d transposed %d", (int)in, (int)k,
                     (int)s, (int)lo, (int)dil, (int)out, d->transposed);
}

/* Multiply-adds of one axis, counted one by one. */
static int64_t count_pairs(const cbn_conv_desc *d) {
    int64_t n = 0;
    for (int64_t a = 0; a < (d->transposed ? d->in[2] : d->out[2]); a++)
        for (int64_t t = 0; t < d->k[2]; t++) {
            const int64_t b = a * d->stride[2] - d->pad_lo[2] + t * d->dil[2];
            n += b >= 0 && b < (d->transposed ? d->out[2] : d->in[2]);
        }
    return n;
}

CHECK_TEST(axis_classes_by_brute_force) {
    int made = 0;
    for (int transposed = 0; transposed < 2; transposed++)
        for (int64_t k = 1; k <= 5; k++)
            for (int64_t s = 1; s <= 4; s++)
                for (int64_t d = 1; d <= 4; d++)
                    for (int64_t p = 0; p <= 4; p++)
                        for (int64_t op = 0; op < (transposed ? CBN_MAX(s, d) : 1); op++)
                            for (int64_t in = 1; in <= 9; in++) {
                                cbn_conv_geometry g = {.dtype = CBN_F32,
                                                       .nd = 1,
                                                       .transposed = transposed,
                                                       .g = 1,
                                                       .stride = {s},
                                                       .dil = {d},
                                                       .pad = {p},
                                                       .output_pad = {op}};
                                const int64_t w[3] = {1, 1, k};
                                cbn_error err;
                                cbn_conv_desc desc;
                                CHECK(cbn_conv_geometry_check(&g, w, -1, &err) == CBN_OK);
                                const int64_t reach = d * (k - 1) + 1;
                                const int64_t out = transposed ? (in - 1) * s - 2 * p + reach + op
                                                    : in + 2 * p < reach
                                                        ? 0
                                                        : (in + 2 * p - reach) / s + 1;
                                const cbn_status status =
                                    cbn_conv_desc_make(&g, 1, 1, &in, &desc, NULL, &err);
                                if (out < 1) {
                                    CHECK(status == CBN_BAD_VALUE &&
                                          strstr(err.message, "put: expected"));
                                    continue;
                                }
                                if (!CHECK(status == CBN_OK && desc.out[2] == out)) return;
                                if (!check_axis(&desc)) return;
                                CHECK(cbn_conv_flops_real(&desc) == 2 * count_pairs(&desc));
                                CHECK(cbn_conv_flops(&desc) == 2 * k * (transposed ? in : out));
                                made++;
                            }
    CHECK(made > 5000);
}

/* ---- errors ---- */
typedef struct error_case {
    cbn_conv_geometry g;
    int64_t w[5], bias, channels, in[3];
    const char *text;
} error_case;

/* In the cases below groups, stride and dilation are 1 where nothing is said. */
enum { ZERO = -1000 };
static void one_by_default(int64_t *v) { *v = *v == 0 ? 1 : *v == ZERO ? 0 : *v; }

CHECK_TEST(conv_errors_name_argument_and_numbers) {
    /* clang-format off */
#define G(...) {.dtype = CBN_F32, .nd = 2, __VA_ARGS__}
    static const error_case cases[] = {
        {G(.stride = {ZERO, 1}), {4, 3, 2, 2}, -1, 3, {8, 8},
         "stride: expected >= 1 on spatial axis 0, got 0"},
        {G(.dil = {1, -2}), {4, 3, 2, 2}, -1, 3, {8, 8},
         "dilation: expected >= 1 on spatial axis 1, got -2"},
        {G(.pad = {-1, 0}), {4, 3, 2, 2}, -1, 3, {8, 8},
         "padding: expected >= 0 on spatial axis 0, got -1"},
        {G(.g = ZERO), {4, 3, 2, 2}, -1, 3, {8, 8}, "groups: expected >= 1, got 0"},
        {G(.g = 3), {4, 3, 2, 2}, -1, 3, {8, 8},
         "groups: expected a divisor of out_channels = 4 (weight axis 0), got 3"},
        {G(.g = 1), {4, 0, 2, 2}, -1, 3, {8, 8}, "weight: expected sizes >= 1, got 0 on axis 1"},
        {G(.g = 1), {4, 3, 0, 2}, -1, 3, {8, 8}, "weight: expected sizes >= 1, got 0 on axis 2"},
        {G(.pad_kind = CBN_PAD_SAME, .stride = {1, 2}), {4, 3, 2, 2}, -1, 3, {8, 8},
         "padding: 'same' expects stride = 1, got stride = 2 on spatial axis 1"},
        {G(.output_pad = {1, 0}), {4, 3, 2, 2}, -1, 3, {8, 8}, "output_padding: expected 0"},
        {G(.transposed = true, .stride = {2, 2}, .output_pad = {0, 2}), {4, 3, 2, 2}, -1, 4, {8, 8},
         "output_padding: expected < max(stride, dilation) = 2 on spatial axis 1, got 2"},
        {G(.transposed = true, .pad_kind = CBN_PAD_SAME), {4, 3, 2, 2}, -1, 4, {8, 8},
         "padding: expected integers for a transposed convolution, got 'same'"},
        {G(.transposed = true, .pad_mode = CBN_MODE_REFLECT), {4, 3, 2, 2}, -1, 4, {8, 8},
         "padding_mode: expected 'zeros' for a transposed convolution, got 'reflect'"},
        {G(.g = 2), {4, 3, 2, 2}, 3, 6, {8, 8}, "bias: expected length 4 (out_channels), got 3"},
        {G(.g = 2), {4, 3, 2, 2}, 4, 8, {8, 8},
         "input: expected 6 channels (weight has in_channels/groups = 3, groups = 2), got 8"},
        {G(.g = 2, .transposed = true), {4, 3, 2, 2}, 6, 8, {8, 8},
         "input: expected 4 channels (weight has in_channels = 4), got 8"},
        {G(.dil = {3, 1}), {4, 3, 4, 2}, -1, 3, {9, 8},
         "input: expected padded size >= kernel reach 10 (dilation 3, kernel 4) on spatial"},
        {G(.transposed = true, .pad = {4, 0}), {3, 4, 2, 2}, -1, 3, {3, 8},
         "output: expected size >= 1 on spatial axis 0, got -4"},
        {G(.g = 1), {4, 3, 1, 1}, -1, 3, {0, 8},
         "input: expected size >= 1 on spatial axis 0, got 0"},
        {G(.pad_mode = CBN_MODE_REFLECT, .pad = {0, 3}), {4, 3, 2, 2}, -1, 3, {8, 3},
         "padding: mode 'reflect' expects less than the input size 3 on spatial axis 1, got 3"},
        {G(.pad_mode = CBN_MODE_CIRCULAR, .pad = {0, 4}), {4, 3, 2, 2}, -1, 3, {8, 3},
         "padding: mode 'circular' expects at most the input size 3 on spatial axis 1, got 4"},
        {G(.g = 1), {4, 3, 1, 1}, -1, 3, {INT64_C(1) << 40, INT64_C(1) << 40},
         "input: expected a size below 2^63 bytes"},
        {G(.g = 1), {4, 3, 1, 1}, -1, 3, {INT64_MAX, 1}, "input: expected size <= "},
        {G(.pad = {INT64_MAX, 0}), {4, 3, 1, 1}, -1, 3, {8, 8},
         "padding: expected <= 2147483647 on spatial axis 0"},
        {G(.transposed = true, .stride = {INT32_MAX, INT32_MAX}), {4, 4, 1, 1}, -1, 4,
         {1 << 20, 1 << 20}, "output: expected a size below 2^63 bytes"},
    };
    /* clang-format on */
#undef G
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        cbn_conv_geometry g = cases[i].g;
        one_by_default(&g.g);
        for (int a = 0; a < 2; a++) {
            one_by_default(&g.stride[a]);
            one_by_default(&g.dil[a]);
        }
        cbn_error err = {0};
        cbn_conv_desc d;
        cbn_status s = cbn_conv_geometry_check(&g, cases[i].w, cases[i].bias, &err);
        if (s == CBN_OK)
            s = cbn_conv_desc_make(&g, 2, cases[i].channels, cases[i].in, &d, NULL, &err);
        CHECK_MSG(
            s == CBN_BAD_VALUE && strncmp(err.message, cases[i].text, strlen(cases[i].text)) == 0,
            "case %zu: status %d, '%s' does not start with '%s'", i, s, err.message, cases[i].text);
    }
    cbn_conv_geometry linear = {.dtype = CBN_F32, .nd = 0, .g = 1};
    cbn_error err = {0};
    cbn_conv_desc d;
    CHECK(cbn_conv_geometry_check(&linear, (int64_t[]){4, 3}, 4, &err) == CBN_OK);
    CHECK(cbn_conv_desc_make(&linear, 0, 3, NULL, &d, NULL, &err) == CBN_OK && d.n == 0 &&
          d.out[2] == 1);
    CHECK(cbn_conv_desc_make(&linear, 5, 2, NULL, &d, NULL, &err) == CBN_BAD_VALUE);
    CHECK(strcmp(err.message, "input: expected 3 features (weight has in_features = 3), got 2") ==
          0);
}
