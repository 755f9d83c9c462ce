/* SPDX-License-Identifier: BSD-3-Clause */
/* Tables of a job of the direct convolution: addresses of pixels, lists of taps, windows. */
#include "ops/conv_direct_priv.h"
#include <string.h>

int64_t cbn_direct_region_of(const direct_state *s, int64_t t) {
    int64_t lo = 0, hi = s->nregions;
    while (hi - lo > 1) {
        const int64_t mid = lo + (hi - lo) / 2;
        if (s->regions[mid].first_tile <= t)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

/* Four lists of r->ntaps: offsets in the image, in the weights, in the window; offsets of the
 * window's segments. */
static void taps_list(const direct_state *s, const cbn_conv_desc *d, const region *r,
                      int64_t *lists) {
    const cbn_axis_class *z = cbn_direct_class(s, r, 0), *y = cbn_direct_class(s, r, 1),
                         *x = cbn_direct_class(s, r, 2);
    int64_t *tap_x = lists, *tap_w = lists + r->ntaps, *tap_win = tap_w + r->ntaps,
            *seg = tap_win + r->ntaps;
    if (r->ntaps == 0) return; /* rows without taps have no place in the lists */
    if (r->ntaps == 0) return; /* rows of taps without columns would still write segments */
    int64_t row = 0;
    if (r->ntaps == 0)
        return; /* rows of no taps would still be written to seg, for which there is no room then */
    for (int64_t a = 0; a < z->ntaps; a++) {
        for (int64_t b = 0; b < y->ntaps; b++, row++) {
            const int64_t in = (z->tap_in[a] * d->in[1] + y->tap_in[b]) * d->in[2];
            const int64_t at = (z->tap_k[a] * d->k[1] + y->tap_k[b]) * d->k[2];
            if (!r->by_tap) seg[row] = in;
            for (int64_t c = 0; c < x->ntaps; c++) {
                const int64_t t = row * x->ntaps + c;
                tap_x[t] = in + x->tap_in[c];
                tap_w[t] = (at + x->tap_k[c]) * s->vw;
                tap_win[t] = r->by_tap ? t * r->width : row * r->width + x->tap_in[c];
                if (r->by_tap) seg[t] = tap_x[t];
            }
        }
    }
}

/* Pixels of tile number t of region r, whose lists are at `lists`. */
static void tile_fill(const direct_run *u, const region *r, int64_t t, const int64_t *lists,
                      tile *out) {
    const direct_state *s = u->s;
    const cbn_conv_desc *d = u->d;
    const cbn_axis_class *z = cbn_direct_class(s, r, 0), *y = cbn_direct_class(s, r, 1),
                         *x = cbn_direct_class(s, r, 2);
    const int64_t line = (t - r->first_tile) / r->per_run, piece = (t - r->first_tile) % r->per_run;
    const int64_t q0 = line * r->run + piece * r->run / r->per_run;
    const int64_t q1 = line * r->run + (piece + 1) * r->run / r->per_run;
    int64_t jx = q0 % x->count, jy = q0 / x->count % y->count, jz = q0 / x->count / y->count;
    bool x_run = s->window > 0 && r->segments > 0;
    *out = (tile){.np = (int)(q1 - q0), .ntaps = r->ntaps, .y_run = true, .r = r};
    for (int p = 0; p < out->np;) {
        /* the tile's pixels in one row */
        const int64_t iz = z->in0 + jz * z->in_step, iy = y->in0 + jy * y->in_step,
                      ix = x->in0 + jx * x->in_step;
        const int64_t oz = z->out0 + jz * z->out_step, oy = y->out0 + jy * y->out_step;
        int64_t from = (iz * d->in[1] + iy) * d->in[2] + ix;
        int64_t to = (oz * d->out[1] + oy) * d->out[2] + x->out0 + jx * x->out_step;
        if (p > 0) {
            x_run = x_run && from == out->xpix[0] + p * x->in_step;
            out->y_run = out->y_run && to == out->ypix[0] + p;
        }
        const int end = (int)CBN_MIN(out->np, p + x->count - jx);
        for (; p < end; p++, from += x->in_step, to += x->out_step) {
            out->xpix[p] = from;
            out->ypix[p] = to;
        }
        jx = 0;
        if (++jy < y->count) continue;
        jy = 0;
        jz++;
    }
    if (x->out_step != 1 && out->np > 1) out->y_run = false;
    out->tap_x = lists;
    out->tap_w = lists + r->ntaps;
    if (!x_run) return;
    out->tap_x = lists + 2 * r->ntaps;
    out->segment_x = lists + 3 * r->ntaps;
    out->x_at = out->xpix[0];
    for (int p = 0; p < out->np; p++) out->xpix[p] = p * x->in_step;
}

/* The tables of tiles [t0, t1) of the image. */
static void job_image(const direct_run *u, int64_t t0, int64_t t1, direct_job *job) {
    const direct_state *s = u->s;
    int64_t at = cbn_direct_region_of(s, t0), *lists = job->taps, *free_lists = job->taps;
    float *window = job->windows;
    for (int64_t t = t0; t < t1; t++) {
        tile *out = &job->tiles[t - t0];
        while (t >= s->regions[at + 1].first_tile) at++;
        const region *r = &s->regions[at];
        if (t == t0 || t == r->first_tile) {
            lists = free_lists;
            free_lists += 4 * r->ntaps;
            taps_list(s, u->d, r, lists);
        }
        tile_fill(u, r, t, lists, out);
        if (out->segment_x) {
            out->window = window;
            window += r->segments * r->width * s->ic_chunk;
        }
    }
}

/* The tables of tiles [t0, t1) of the rows of a batch. */
static void job_linear(const direct_run *u, int64_t t0, int64_t t1, direct_job *job) {
    job->taps[0] = 0;
    for (int64_t t = t0; t < t1; t++) {
        const int64_t row = u->call->n * t / u->tiles, end = u->call->n * (t + 1) / u->tiles;
        tile *out = &job->tiles[t - t0];
        *out = (tile){.np = (int)(end - row), .ntaps = 1, .tap_x = job->taps, .tap_w = job->taps};
        for (int p = 0; p < out->np; p++) {
            out->xpix[p] = (row + p) * u->d->ic;
            out->ypix[p] = (row + p) * u->d->oc;
        }
    }
}

void cbn_direct_job_make(const direct_run *u, int64_t id, direct_job *job) {
    if (job->id == id) return;
    const int64_t t0 = cbn_direct_first(u->tiles, u->jobs, id),
                  t1 = cbn_direct_first(u->tiles, u->jobs, id + 1);
    job->id = id;
    job->count = t1 - t0;
    (u->s->linear ? job_linear : job_image)(u, t0, t1, job);
    int64_t acc = 0;
    for (int64_t t = 0; t < job->count; t++) {
        job->tiles[t].acc = acc;
        acc += job->tiles[t].np * u->s->vw;
    }
    job->acc_block = acc;
    const tile *first = job->tiles, *last = first + job->count - 1;
    job->ahead = u->s->linear ? 0 : last->xpix[last->np - 1] - first->xpix[0];
}

/* Copies `width` elements of each of ic channels. The four-element pieces overlap at the end of a
 * row. */
CBN_INLINE void rows_copy(int pieces, float *to, int64_t to_ic, const float *from, int64_t from_ic,
                          int64_t width, int64_t ic) {
    for (int64_t i = 0; i < ic; i++, to += to_ic, from += from_ic) {
        CBN_UNROLL for (int q = 0; q < pieces; q++) {
            const int64_t at = q < pieces - 1 ? 4 * q : width - 4;
            memcpy(to + at, from + at, 4 * sizeof(float));
        }
    }
}

void cbn_direct_window_copy(const tile *t, const float *x, int64_t x_plane, int64_t ic) {
    const region *r = t->r;
    /* A tile with fewer pixels than the region's largest reads less than the region's width. */
    /* Taps of a row ascend in x, those of a transposed convolution descend. */
    const int64_t last = CBN_MAX(t->tap_x[0] % r->width, t->tap_x[t->ntaps - 1] % r->width);
    const int64_t width = t->xpix[t->np - 1] + 1 + (r->by_tap ? 0 : last),
                  size = r->segments * r->width;
    for (int64_t g = 0; g < r->segments; g++) {
        float *to = t->window + g * r->width;
        const float *from = x + t->x_at + t->segment_x[g];
        switch ((width + 3) / 4) {
        case 2:
            rows_copy(2, to, size, from, x_plane, width, ic);
            break;
        case 3:
            rows_copy(3, to, size, from, x_plane, width, ic);
            break;
        case 4:
            rows_copy(4, to, size, from, x_plane, width, ic);
            break;
        default:
            for (int64_t i = 0; i < ic; i++)
                memcpy(to + i * size, from + i * x_plane, (size_t)width * sizeof(float));
        }
    }
}
