/* SPDX-License-Identifier: BSD-3-Clause */
/* Output coordinates of one axis, grouped into runs that meet the same kernel taps.
 *
 * Both directions are one problem. Outputs are cut into phases (a convolution has one; a transposed
 * convolution has one for each residue of the stride), and within a phase the taps that can meet it
 * at all are t = first, first + step, ... Moving along the phase, the taps inside the image always
 * form one contiguous piece of that sequence, so a class is (phase, piece). All classes share two
 * small tables: kernel indices laid out phase by phase, and input offsets. */
#include "base/cbn_alloc.h"
#include "ops/conv_desc.h"

typedef struct phase {
    int64_t out0, out_step, count; /* its output coordinates */
    int64_t tap0, tap_step, ntaps; /* kernel indices that can meet it */
    int64_t at, at_step, at_tap;   /* input of (j, i-th tap): at + j*at_step + i*at_tap */
    const int64_t *tap_k,
        *tap_in; /* ntaps kernel indices; offsets from the lowest tap of a piece */
} phase;

static int64_t gcd(int64_t a, int64_t b) {
    while (b) {
        const int64_t r = a % b;
        a = b;
        b = r;
    }
    return a;
}

/* [*first, *end) of the taps that lie inside [0, in) for output j of the phase. */
static void piece_inside(const phase *p, int64_t in, int64_t j, int64_t *first, int64_t *end) {
    const int64_t at = p->at + j * p->at_step, step = p->at_tap > 0 ? p->at_tap : -p->at_tap;
    /* With negative steps tap i sits at at - i*step: inside when at - in < i*step <= at. */
    const int64_t below = p->at_tap > 0 ? -at : at - (in - 1); /* i*step >= below */
    const int64_t above = p->at_tap > 0 ? in - 1 - at : at;    /* i*step <= above */
    int64_t f = below > 0 ? cbn_ceil_div(below, step) : 0;
    int64_t e = above < 0 ? 0 : CBN_MIN(p->ntaps, above / step + 1);
    if (f >= e) f = e = 0;
    *first = f;
    *end = e;
}

static void class_set(cbn_axis_class *c, const phase *p, int64_t j, int64_t first, int64_t end) {
    const int64_t n = end - first;
    *c = (cbn_axis_class){.out0 = p->out0 + j * p->out_step,
                          .out_step = p->out_step,
                          .in_step = p->at_step,
                          .count = 1,
                          .ntaps = n,
                          .tap_k = p->tap_k + first};
    /* Offsets are counted from the tap that lies lowest in the image, so that in0 and every offset
     * are >= 0. */
    if (p->at_tap > 0) {
        c->in0 = n ? p->at + j * p->at_step + first * p->at_tap : 0;
        c->tap_in = p->tap_in;
    } else {
        c->in0 = n ? p->at + j * p->at_step + (end - 1) * p->at_tap : 0;
        c->tap_in = p->tap_in + (p->ntaps - n);
    }
}

/* Appends the classes of a phase (only counts them when `classes` is NULL). */
static int64_t phase_classes(const phase *p, int64_t in, cbn_axis_class *classes) {
    int64_t count = 0, last_first = -1, last_end = -1;
    for (int64_t j = 0; j < p->count; ++j) {
        int64_t first, end;
        piece_inside(p, in, j, &first, &end);
        if (first == last_first && end == last_end) {
            if (classes) classes[count - 1].count += 1;
            continue;
        }
        if (classes) class_set(&classes[count], p, j, first, end);
        last_first = first;
        last_end = end;
        ++count;
    }
    return count;
}

static int64_t phase_count(const cbn_conv_desc *d, int axis) {
    return d->transposed ? CBN_MIN(d->stride[axis], d->out[axis]) : 1;
}

/* The r-th phase. Its part of tap_k is filled at `used`; returns how much of it is used afterwards.
 */
static int64_t phase_make(const cbn_conv_desc *d, int axis, int64_t r, int64_t *tap_k,
                          const int64_t *tap_in, int64_t used, phase *p) {
    const int64_t k = d->k[axis], s = d->stride[axis], dil = d->dil[axis], lo = d->pad_lo[axis];
    if (!d->transposed) {
        *p = (phase){.out_step = 1,
                     .count = d->out[axis],
                     .tap_step = 1,
                     .ntaps = k,
                     .at = -lo,
                     .at_step = s,
                     .at_tap = dil,
                     .tap_in = tap_in};
    } else {
        /* Output o meets tap t when o + lo - t*dil = s*(input coordinate). */
        const int64_t common = gcd(s, dil), target = (r + lo) % s;
        *p = (phase){.out0 = r,
                     .out_step = s,
                     .count = (d->out[axis] - r + s - 1) / s,
                     .tap_step = s / common,
                     .at_step = 1,
                     .at_tap = -(dil / common)};
        int64_t t = 0;
        while (t < k && t < p->tap_step && t * dil % s != target) ++t;
        p->tap0 = t;
        p->ntaps = t < k && t < p->tap_step ? (k - t + p->tap_step - 1) / p->tap_step : 0;
        p->at = p->ntaps ? (r + lo - t * dil) / s : 0;
        /* The offsets ... 2q, q, 0 end at the table's end, for every number of taps. */
        p->tap_in = tap_in + (k - p->ntaps);
    }
    p->tap_k = tap_k + used;
    for (int64_t i = 0; i < p->ntaps; ++i) tap_k[used + i] = p->tap0 + i * p->tap_step;
    return used + p->ntaps;
}

cbn_status cbn_axis_plan_make(const cbn_conv_desc *d, int axis, cbn_axis_plan *out,
                              cbn_error *err) {
    const int64_t k = d->k[axis], nphases = phase_count(d, axis);
    *out = (cbn_axis_plan){0};
    int64_t *taps = cbn_alloc_array((size_t)k, 2 * sizeof *taps);
    if (!taps)
        return cbn_fail_memory(err, "the table of kernel taps", (size_t)k * 2 * sizeof *taps);
    int64_t *tap_in = taps + k;
    const int64_t q =
        d->transposed ? d->dil[axis] / gcd(d->stride[axis], d->dil[axis]) : d->dil[axis];
    for (int64_t i = 0; i < k; ++i) tap_in[i] = (d->transposed ? k - 1 - i : i) * q;

    int64_t nclasses = 0, used = 0;
    phase p;
    for (int64_t r = 0; r < nphases; ++r) {
        used = phase_make(d, axis, r, taps, tap_in, used, &p);
        nclasses += phase_classes(&p, d->in[axis], NULL);
    }
    cbn_axis_class *classes = cbn_alloc_array((size_t)nclasses, sizeof *classes);
    if (!classes) {
        cbn_free(taps);
        return cbn_fail_memory(err, "the classes of an axis", (size_t)nclasses * sizeof *classes);
    }
    nclasses = used = 0;
    for (int64_t r = 0; r < nphases; ++r) {
        used = phase_make(d, axis, r, taps, tap_in, used, &p);
        nclasses += phase_classes(&p, d->in[axis], classes + nclasses);
    }
    *out = (cbn_axis_plan){.nclasses = nclasses, .classes = classes, .taps = taps};
    return CBN_OK;
}

void cbn_axis_plan_free(cbn_axis_plan *p) {
    cbn_free(p->classes);
    cbn_free(p->taps);
    *p = (cbn_axis_plan){0};
}
