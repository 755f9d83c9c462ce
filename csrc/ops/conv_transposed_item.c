/* SPDX-License-Identifier: BSD-3-Clause */
/* The work of an item of conv_transposed.c: panels, sums, rows of y. */
#include <math.h>
#include "ops/conv_transposed_priv.h"

/* Taps of the phases before this one. */
static int64_t phase_before(const transposed_state *s, const cbn_conv_desc *d,
                            const int64_t r[CBN_MAX_SPATIAL]) {
    const phase *z = &s->phases[0][r[0]], *y = &s->phases[1][r[1]], *x = &s->phases[2][r[2]];
    return z->before * d->k[1] * d->k[2] + z->ntaps * (y->before * d->k[2] + y->ntaps * x->before);
}

float *cbn_phase_weights(const transposed_state *s, const cbn_conv_desc *d, int mr, int64_t g,
                         const int64_t r[CBN_MAX_SPATIAL], int64_t block) {
    const int64_t taps = d->k[0] * d->k[1] * d->k[2], per_tap = s->icg * s->blocks * mr;
    return s->w + (g * taps + phase_before(s, d, r)) * per_tap + block * s->icg * cbn_phase_taps(s, r) * mr;
}

/* The moves that fill pixels [q0, q1) of one tap, whose input is `shift` away from q on each axis; they write up to
 * pitch pixels to `at`. */
static int64_t tap_moves(const transposed_run *u, const int64_t shift[CBN_MAX_SPATIAL], int64_t q0,
                         int64_t q1, int64_t pitch, int64_t at, cbn_panel_move *out) {
    const transposed_state *s = u->s;
    const cbn_conv_desc *d = u->d;
    const int lanes = u->k->lanes;
    cbn_panel_move *m = out;
    for (int64_t q = q0; q < q1;) {
        const int64_t x = q % s->grid[2], row = q / s->grid[2];
        const int64_t iy = row % s->grid[1] + shift[1], iz = row / s->grid[1] + shift[0];
        const int64_t end = CBN_MIN(q1, q + s->grid[2] - x);
        const bool inside = 0 <= iy && iy < d->in[1] && 0 <= iz && iz < d->in[0];
        for (int64_t p = q; p < end; p += lanes, m++) {
            const int64_t ix = x + (p - q) + shift[2], n = CBN_MIN(end - p, lanes);
            const int64_t lo = CBN_MIN(CBN_MAX(-ix, 0), lanes), hi = CBN_MIN(d->in[2] - ix, n);
            *m = (cbn_panel_move){.out = at + p - q0, .n = (int16_t)CBN_MIN(lanes, pitch - (p - q0))};
            if (!inside || lo >= hi) continue;
            m->x = (iz * d->in[1] + iy) * d->in[2] + ix;
            m->lo = (int16_t)lo;
            m->hi = (int16_t)hi;
        }
        q = end;
    }
    return m - out;
}

void cbn_item_pack(const transposed_run *u, const item *it) {
    const transposed_state *s = u->s;
    const phase *z = &s->phases[0][it->r[0]], *y = &s->phases[1][it->r[1]], *x = &s->phases[2][it->r[2]];
    const float *from = (const float *)u->call->x + (it->image * u->d->ic + it->g * s->icg) * u->x_plane;
    const int64_t ntaps = cbn_phase_taps(s, it->r);
    float *out = it->packed;
    for (int64_t p = it->p0; p < it->p1; p++) {
        const int64_t q0 = cbn_panel_pixel(u, p), pitch = cbn_panel_pixel(u, p + 1) - q0,
                      q1 = CBN_MIN(q0 + pitch, s->pixels);
        int64_t t = 0, n = 0;
        for (int64_t a = 0; a < z->ntaps; a++)
            for (int64_t b = 0; b < y->ntaps; b++)
                for (int64_t c = 0; c < x->ntaps; c++, t++) {
                    const int64_t shift[] = {z->first - a, y->first - b, x->first - c};
                    n += tap_moves(u, shift, q0, q1, pitch, t * pitch, it->moves + n);
                }
        u->k->panel_pack(out, ntaps * pitch, from, u->x_plane, s->icg, it->moves, n);
        out += s->icg * ntaps * pitch;
    }
}

/* Pixels that are neighbours in a row of y. */
typedef struct run {
    int64_t end;   /* first pixel after them */
    int64_t at, n; /* their outputs: where in the image, how many (0: pixels beyond the last row) */
} run;

/* The longest one from pixel q on, ending before `end`. */
static run run_at(const transposed_run *u, const item *it, int64_t q, int64_t end) {
    const cbn_conv_desc *d = u->d;
    const int64_t *grid = u->s->grid, x = q % grid[2] * d->stride[2], row = q / grid[2];
    const int64_t oy = row % grid[1] * d->stride[1] + it->r[1], oz = row / grid[1] * d->stride[0] + it->r[0];
    run r = {.end = CBN_MIN(end, q / grid[2] * grid[2] + grid[2])};
    if (oy >= d->out[1] || oz >= d->out[0]) return r;
    r.n = CBN_MIN((r.end - q) * d->stride[2], d->out[2] - x);
    r.at = (oz * d->out[1] + oy) * d->out[2] + x;
    return r;
}

/* Sums of blocks [b0, b1) in the item's phase, to `sums`. copy: the panels are read from the image, and kept. */
static void group_sums(const transposed_run *u, item *it, int64_t b0, int64_t b1, bool copy, float *sums) {
    enum { LINE = CBN_CACHE_LINE / sizeof(float) };
    const transposed_state *s = u->s;
    const int mr = u->k->px_mr;
    const float *image = (const float *)u->call->x + (it->image * u->d->ic + it->g * s->icg) * u->x_plane;
    float *packed = it->packed;
    cbn_conv_px_args a = {.ic = s->icg * cbn_phase_taps(s, it->r),
                          .y_oc = it->width,
                          .mr = mr,
                          .oc_valid = (int)(b1 - b0) * mr};
    a.w = cbn_phase_weights(s, u->d, mr, it->g, it->r, b0);
    a.epi = (cbn_epilogue_args){s->zeros, NULL, -INFINITY, INFINITY};
    a.prefetch_step = u->x_plane;
    for (int64_t p = it->p0; p < it->p1; p++) {
        const int64_t q = cbn_panel_pixel(u, p), pitch = cbn_panel_pixel(u, p + 1) - q;
        a.np = (int32_t)(copy ? CBN_MIN(pitch, s->pixels - q) : pitch);
        a.x = copy ? image + q : packed;
        a.x_ic = copy ? u->x_plane : pitch;
        a.x_padded = !copy;
        a.copy = copy ? packed : NULL;
        a.y = sums + (q - it->pixel0);
        a.prefetch = it->next < it->next_end ? it->next : NULL;
        it->next += LINE;
        u->k->conv_px(&a);
        packed += a.ic * pitch;
    }
}

/* Rows of y of blocks [b0, b1). */
static void group_weave(const transposed_run *u, const item *it, int64_t b0, int64_t b1) {
    const transposed_state *s = u->s;
    const int64_t mr = u->k->px_mr, oc0 = it->g * s->ocg + b0 * mr,
                  y0 = (it->image * u->d->oc + oc0) * u->y_plane;
    const int64_t q1 = CBN_MIN(cbn_panel_pixel(u, it->p1), s->pixels);
    const int nch = (int)(CBN_MIN(b1 * mr, s->ocg) - b0 * mr);
    float *y = (float *)u->call->y + y0;
    const float *residual = u->call->residual ? (const float *)u->call->residual + y0 : NULL;
    cbn_epilogue_args e = {(const float *)u->call->bias + oc0, NULL, u->call->lo, u->call->hi};
    for (int64_t q = it->pixel0; q < q1;) {
        const run r = run_at(u, it, q, q1);
        e.residual = residual ? residual + r.at : NULL;
        if (r.n > 0)
            u->k->interleave(y + r.at, u->y_plane, nch, (int)u->d->stride[2], it->sums + (q - it->pixel0),
                             it->width, (b1 - b0) * mr * it->width, r.n, &e);
        q = r.end;
    }
}

/* Blocks [b0, b1) of the rows of one (depth, height) phase. */
void cbn_item_rows(const transposed_run *u, item *it, int64_t b0, int64_t b1) {
    const transposed_state *s = u->s;
    const int64_t columns = CBN_MIN(u->d->stride[2], u->d->out[2]), mr = u->k->px_mr;
    for (int64_t b = b0; b < b1; b += s->group_blocks) {
        const int64_t end = CBN_MIN(b + s->group_blocks, b1);
        for (it->r[2] = 0; it->r[2] < columns; it->r[2]++) {
            if (!s->shared) cbn_item_pack(u, it);
            group_sums(u, it, b, end, it->copy, it->sums + it->r[2] * (end - b) * mr * it->width);
            it->copy = false;
        }
        group_weave(u, it, b, end);
    }
}

/* Panels of neighbours in the image are asked for early: the hardware does not foresee a walk over channels. */
void cbn_item_ahead(const transposed_run *u, item *it) {
    const transposed_state *s = u->s;
    if (it->p1 == s->panels) return;
    const float *x = (const float *)u->call->x + (it->image * u->d->ic + it->g * s->icg) * u->x_plane;
    it->next = x + cbn_panel_pixel(u, it->p1);
    it->next_end = x + CBN_MIN(cbn_panel_pixel(u, it->p1) + it->width, s->pixels);
}
