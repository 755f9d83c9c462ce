/* SPDX-License-Identifier: BSD-3-Clause */
/* The arithmetic of conv_ref.c for one element type; included once for each.
 * Define before: REF_T (element type), REF_NAME(base) (suffixes the type), REF_MADD(acc, w, x).
 * Defines: REF_NAME(rows_range) and REF_NAME(points_range), the cbn_range_fn of either kind of
 * problem. */

/* y[c][j*ys] += w[c] * x[j*xs] for four output channels: one load of x serves all. */
static void REF_NAME(axpy4)(REF_T *CBN_RESTRICT y0, REF_T *CBN_RESTRICT y1, REF_T *CBN_RESTRICT y2,
                            REF_T *CBN_RESTRICT y3, const REF_T w[4], const REF_T *CBN_RESTRICT x,
                            int64_t count, int64_t ys, int64_t xs) {
    const REF_T w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    if (ys == 1 && xs == 1) {
        for (int64_t j = 0; j < count; ++j) {
            const REF_T v = x[j];
            y0[j] = REF_MADD(y0[j], w0, v);
            y1[j] = REF_MADD(y1[j], w1, v);
            y2[j] = REF_MADD(y2[j], w2, v);
            y3[j] = REF_MADD(y3[j], w3, v);
        }
        return;
    }
    for (int64_t j = 0; j < count; ++j) {
        const REF_T v = x[j * xs];
        y0[j * ys] = REF_MADD(y0[j * ys], w0, v);
        y1[j * ys] = REF_MADD(y1[j * ys], w1, v);
        y2[j * ys] = REF_MADD(y2[j * ys], w2, v);
        y3[j * ys] = REF_MADD(y3[j * ys], w3, v);
    }
}

static void REF_NAME(axpy1)(REF_T *CBN_RESTRICT y, REF_T w, const REF_T *CBN_RESTRICT x,
                            int64_t count, int64_t ys, int64_t xs) {
    if (ys == 1 && xs == 1) {
        for (int64_t j = 0; j < count; ++j) y[j] = REF_MADD(y[j], w, x[j]);
        return;
    }
    for (int64_t j = 0; j < count; ++j) y[j * ys] = REF_MADD(y[j * ys], w, x[j * xs]);
}

/* One output row of nc <= 4 neighbouring output channels of one group; y[c] points at channel c's
 * row, which holds the sums while they grow. x: the group's first channel of the image; w: the
 * first channel's weights. */
static void REF_NAME(row_block)(const ref_state *s, const ref_row *row, int nc, const REF_T *x,
                                const REF_T *w, const REF_T *bias, REF_T *const y[4]) {
    const ref_taps *td = row->depth, *th = row->height;
    for (int c = 0; c < nc; ++c) memset(y[c], 0, (size_t)s->ow * sizeof(REF_T));
    for (int64_t i = 0; i < s->icg; ++i) {
        for (int64_t a = 0; a < td->ntaps; ++a) {
            for (int64_t b = 0; b < th->ntaps; ++b) {
                const REF_T *xr = x + i * s->x_ic + (td->in + td->tap_in[a]) * s->x_d +
                                  (th->in + th->tap_in[b]) * s->iw;
                const REF_T *wr = w + i * s->w_ic + (td->tap_k[a] * s->kh + th->tap_k[b]) * s->kw;
                for (int64_t t = 0; t < s->kw; ++t) {
                    const ref_span *sp = &s->spans[t];
                    if (nc == 4) {
                        const REF_T w4[4] = {wr[t], wr[s->w_oc + t], wr[2 * s->w_oc + t],
                                             wr[3 * s->w_oc + t]};
                        REF_NAME(axpy4)
                        (y[0] + sp->out, y[1] + sp->out, y[2] + sp->out, y[3] + sp->out, w4,
                         xr + sp->in, sp->count, s->out_step, s->in_step);
                        continue;
                    }
                    for (int c = 0; c < nc; ++c)
                        REF_NAME(axpy1)
                        (y[c] + sp->out, wr[c * s->w_oc + t], xr + sp->in, sp->count, s->out_step,
                         s->in_step);
                }
            }
        }
    }
    for (int c = 0; c < nc; ++c)
        for (int64_t j = 0; j < s->ow; ++j) y[c][j] += bias[c];
}

/* Items: (image, block of output channels, output plane, output row). */
static void REF_NAME(rows_range)(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const ref_job *job = arg;
    const ref_state *s = job->state;
    const int64_t rows = s->od * s->oh, plane = rows * s->ow;
    const REF_T *xs = job->call->x, *ws = s->w, *bias = job->call->bias;
    REF_T *ys = job->call->y;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t r = item % rows, block = item / rows % s->nblocks,
                      image = item / rows / s->nblocks;
        const int64_t group = block / s->group_blocks, o0 = block % s->group_blocks * 4;
        const int nc = (int)CBN_MIN(4, s->ocg - o0);
        const int64_t o = group * s->ocg + o0;
        const ref_row row = {&s->depth[r / s->oh], &s->height[r % s->oh]};
        REF_T *y[4];
        for (int c = 0; c < 4; ++c)
            y[c] = ys + (image * s->oc + o + CBN_MIN(c, nc - 1)) * plane + r * s->ow;
        REF_NAME(row_block)
        (s, &row, nc, xs + (image * s->ic + group * s->icg) * s->x_ic,
         ws + group * s->w_group + o0 * s->w_oc, bias + o, y);
    }
}

/* One-pixel problems (linear layers): a row of one column has nothing to run along, so 4 images x 4
 * channels of sums are kept at once. Missing ones repeat the last and are not stored. */
static void REF_NAME(point_block)(const ref_state *s, const REF_T *x, int images, const REF_T *w,
                                  int nc, const REF_T *bias, REF_T *y) {
    REF_T sum[4][4] = {{0}};
    const REF_T *xs[4], *ws[4];
    for (int m = 0; m < 4; ++m) {
        xs[m] = x + CBN_MIN(m, images - 1) * s->ic;
        ws[m] = w + CBN_MIN(m, nc - 1) * s->w_oc;
    }
    for (int64_t i = 0; i < s->icg; ++i) {
        CBN_UNROLL
        for (int m = 0; m < 4; ++m) {
            CBN_UNROLL
            for (int c = 0; c < 4; ++c)
                sum[m][c] = REF_MADD(sum[m][c], ws[c][i * s->w_ic], xs[m][i]);
        }
    }
    for (int m = 0; m < images; ++m)
        for (int c = 0; c < nc; ++c) y[m * s->oc + c] = sum[m][c] + bias[c];
}

/* Items: (block of 4 images, block of output channels). */
static void REF_NAME(points_range)(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const ref_job *job = arg;
    const ref_state *s = job->state;
    const REF_T *xs = job->call->x, *ws = s->w, *bias = job->call->bias;
    REF_T *ys = job->call->y;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t block = item % s->nblocks, image = item / s->nblocks * 4;
        const int64_t group = block / s->group_blocks, o0 = block % s->group_blocks * 4,
                      o = group * s->ocg + o0;
        REF_NAME(point_block)
        (s, xs + image * s->ic + group * s->icg, (int)CBN_MIN(4, job->call->n - image),
         ws + group * s->w_group + o0 * s->w_oc, (int)CBN_MIN(4, s->ocg - o0), bias + o,
         ys + image * s->oc + o);
    }
}

#undef REF_T
#undef REF_NAME
#undef REF_MADD
