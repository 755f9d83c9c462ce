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
    if (r->ntaps == 0) return; /* rows of taps without columns have no place in the lists */
    int64_t row = 0;
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
    const bool windowed = s->window > 0 && r->segments > 0;
    const int64_t reach = r->reach;
    int64_t x_next = -1, at = 0;
    *out = (tile){.np = (int)(q1 - q0), .ntaps = r->ntaps, .y_run = true, .r = r};
    for (int p = 0; p < out->np;) {
        /* the tile's pixels in one row */
        const int64_t iz = z->in0 + jz * z->in_step, iy = y->in0 + jy * y->in_step,
                      ix = x->in0 + jx * x->in_step;
        const int64_t oz = z->out0 + jz * z->out_step, oy = y->out0 + jy * y->out_step;
        int64_t from = (iz * d->in[1] + iy) * d->in[2] + ix;
        int64_t to = (oz * d->out[1] + oy) * d->out[2] + x->out0 + jx * x->out_step;
        if (p > 0) out->y_run = out->y_run && to == out->ypix[0] + p;
        const int end = (int)CBN_MIN(out->np, p + x->count - jx);
        if (from != x_next) {
            at += p > 0 ? out->part[out->parts - 1].width : 0;
            out->part[out->parts++] = (part){.x_at = from, .at = (int32_t)at};
        }
        part *const last = &out->part[out->parts - 1];
        for (; p < end; p++, from += x->in_step, to += x->out_step) {
            out->xpix[p] = windowed ? last->at + from - last->x_at : from;
            out->ypix[p] = to;
        }
        x_next = from;
        last->width = (int32_t)(from - x->in_step - last->x_at + 1 + reach);
        jx = 0;
        if (++jy < y->count) continue;
        jy = 0;
        jz++;
    }
    if (x->out_step != 1 && out->np > 1) out->y_run = false;
    out->tap_x = windowed ? lists + 2 * r->ntaps : lists;
    out->tap_w = lists + r->ntaps;
    out->segment_x = windowed ? lists + 3 * r->ntaps : NULL;
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
    job->filled = -1;
    /* Jobs walk through the image from front to back: the next one reads about as much again behind this one. */
    int64_t lo = INT64_MAX, hi = 0, begin = INT64_MAX, end = 0;
    for (const tile *t = job->tiles; t < job->tiles + job->count; t++) {
        if (t->ntaps == 0 || t->parts == 0) continue;
        const int64_t *reach = t->window ? t->segment_x : t->tap_x, last = (t->window ? t->r->segments : t->ntaps) - 1;
        const int64_t at = t->part[t->parts - 1].x_at;
        lo = CBN_MIN(lo, t->part[0].x_at);
        hi = CBN_MAX(hi, at);
        begin = CBN_MIN(begin, t->part[0].x_at + CBN_MIN(reach[0], reach[last]));
        end = CBN_MAX(end, at + CBN_MAX(reach[0], reach[last]));
    }
    job->from = CBN_MIN(CBN_MAX(begin, 0), end);
    job->next_from = end;
    job->next_to = id + 1 < u->jobs && hi > lo ? CBN_MIN(end + (hi - lo), u->x_plane) : end;
}

/* The same `width` elements of each of ic channels, in pieces of four of which the last two may overlap. */
CBN_INLINE void part_copy_pieces(int pieces, float *to, int64_t to_ic, const float *from, int64_t from_ic,
                                 int64_t width, int64_t ic) {
    for (int64_t i = 0; i < ic; i++, to += to_ic, from += from_ic) {
        CBN_UNROLL for (int q = 0; q < pieces; q++) {
            const int64_t at = q < pieces - 1 ? 4 * q : width - 4;
            memcpy(to + at, from + at, 4 * sizeof(float));
        }
    }
}

static void part_copy(float *to, int64_t to_ic, const float *from, int64_t from_ic, int64_t width, int64_t ic) {
    if (width < 4) {
        for (int64_t i = 0; i < ic; i++, to += to_ic, from += from_ic)
            for (int64_t j = 0; j < width; j++) to[j] = from[j];
        return;
    }
    switch ((width + 3) / 4) {
    case 1:
        part_copy_pieces(1, to, to_ic, from, from_ic, width, ic);
        break;
    case 2:
        part_copy_pieces(2, to, to_ic, from, from_ic, width, ic);
        break;
    case 3:
        part_copy_pieces(3, to, to_ic, from, from_ic, width, ic);
        break;
    case 4:
        part_copy_pieces(4, to, to_ic, from, from_ic, width, ic);
        break;
    default:
        for (int64_t i = 0; i < ic; i++) memcpy(to + i * to_ic, from + i * from_ic, (size_t)width * sizeof(float));
    }
}

/* A few channels at a time for all tiles: neighbours read the same lines, and a channel is a page of its own. */
void cbn_direct_windows_copy(const direct_job *job, const float *x, int64_t x_plane, int64_t ic) {
    enum { STEP = 8 };
    for (int64_t i = 0; i < ic; i += STEP) {
        const int64_t n = CBN_MIN(ic - i, STEP);
        for (const tile *t = job->tiles; t < job->tiles + job->count; t++) {
            if (!t->window) continue;
            const int64_t pitch = t->r->width, size = t->r->segments * pitch;
            for (int64_t g = 0; g < t->r->segments; g++) {
                float *to = t->window + i * size + g * pitch;
                const float *from = x + i * x_plane + t->segment_x[g];
                for (const part *p = t->part; p < t->part + t->parts; p++)
                    part_copy(to + p->at, size, from + p->x_at, x_plane, p->width, n);
            }
        }
    }
}
