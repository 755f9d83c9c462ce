/* SPDX-License-Identifier: BSD-3-Clause */
/* What conv_plan.c and the conv_plan_*.c share. Nobody else includes this. */
#ifndef CBN_CONV_PLAN_PRIV_H
#define CBN_CONV_PLAN_PRIV_H
#include "ops/conv_plan.h"

#include <stdatomic.h>

#define CBN_IMPL_COUNT_(name) CBN_PLAN_##name,
enum { CBN_CONV_IMPLS(CBN_IMPL_COUNT_) CBN_PLAN_NIMPLS };
#undef CBN_IMPL_COUNT_

typedef enum { CBN_CHOICE_LISTED, CBN_CHOICE_TUNED, CBN_CHOICE_FORCED } cbn_choice_origin;

/* One input shape. Everything but the choice is constant after publication. States are only ever
 * added, and live as long as the shape: a thread that runs one needs no lock and no count. */
typedef struct cbn_plan_shape {
    int64_t in[CBN_MAX_SPATIAL];     /* as the user gave it, nd entries */
    cbn_conv_desc d;                 /* n = 1; dtype of the computation (float32 for float16) */
    int64_t image[CBN_MAX_SPATIAL];  /* sizes before explicit padding, three axes */
    int64_t pad[CBN_MAX_SPATIAL][2]; /* explicit padding */
    bool padded, temporary;
    int64_t max_n;                      /* larger batches overflow byte sizes */
    int64_t x_elems, xp_elems, y_elems; /* of one image: as given, after explicit padding, output */
    _Atomic int choice; /* index + origin * CBN_PLAN_NIMPLS, so that both change together */
    _Atomic(void *) state[CBN_PLAN_NIMPLS];
    _Atomic size_t state_bytes[CBN_PLAN_NIMPLS]; /* allocated by `prepare`; 0 without a state */
    _Atomic float seconds[CBN_PLAN_NIMPLS];      /* measured by tuning; 0: not measured */
} cbn_plan_shape;

struct cbn_conv_plan {
    cbn_conv_geometry g;
    cbn_plan_options opt;
    cbn_conv_context ctx;
    const void *w, *b;     /* dtype of g */
    void *own_w, *own_b;   /* what of it the plan must free */
    void *wide_w, *wide_b; /* float32 copies for float16, else NULL */
    int64_t w_elems;
    bool clamps; /* the activation is none or the clamp [lo, hi] */
    float lo, hi;
    _Atomic(cbn_plan_shape *) shapes[CBN_PLAN_SHAPES];
};

extern const cbn_conv_impl *const cbn_plan_impls[CBN_PLAN_NIMPLS];

/* The shape's entry, made at need with its algorithm chosen; its state may not have been made yet. Give it back with
 * release. */
CBN_NODISCARD cbn_status cbn_plan_shape_acquire(cbn_conv_plan *p, const int64_t *in,
                                                cbn_plan_shape **out, cbn_error *err);
void cbn_plan_shape_release(cbn_plan_shape *s);
/* Bytes of the states of s. */
size_t cbn_plan_shape_bytes(const cbn_plan_shape *s);

/* What `prepare` of a row made, and how much memory it took. */
typedef struct cbn_plan_state {
    void *state;
    size_t bytes;
} cbn_plan_state;
CBN_NODISCARD cbn_status cbn_plan_state_make(const cbn_conv_plan *p, const cbn_plan_shape *s, int i,
                                             cbn_plan_state *out, cbn_error *err);
/* Keeps it for row i unless another thread was faster; then it is destroyed. */
void cbn_plan_state_publish(cbn_plan_shape *s, int i, cbn_plan_state made);
/* Makes the state of row i at need. Thread-safe. */
CBN_NODISCARD cbn_status cbn_plan_state_ensure(const cbn_conv_plan *p, cbn_plan_shape *s, int i,
                                               cbn_error *err);

/* ---- conv_plan_choose.c ---- */
/* The row of least estimated cost among those that support the shape. */
int cbn_plan_cheapest(const cbn_conv_plan *p, const cbn_plan_shape *s);
/* Estimated time of row i as a multiple of that of row `of`; both support the shape, neither is the last row. */
double cbn_plan_times(const cbn_conv_plan *p, const cbn_plan_shape *s, int i, int of);
void cbn_plan_choose(cbn_plan_shape *s, int index, cbn_choice_origin origin);
CBN_INLINE int cbn_plan_choice(const cbn_plan_shape *s) {
    return atomic_load_explicit(&s->choice, memory_order_acquire) % CBN_PLAN_NIMPLS;
}
/* An entry whose choice will be kept. */
CBN_NODISCARD cbn_status cbn_plan_acquire_kept(cbn_conv_plan *p, const int64_t *in, cbn_plan_shape **out,
                                               cbn_error *err);
/* A row that costs more than this many times the cheapest is not worth measuring. */
#define CBN_PLAN_HOPELESS 4.0

/* ---- conv_plan_run.c ---- */
/* Images staged at a time and the scratch this takes (0: nothing is staged), both for a call of n
 * images. */
int64_t cbn_plan_stage_images(const cbn_conv_plan *p, const cbn_plan_shape *s, int64_t n,
                              bool residual);
size_t cbn_plan_stage_bytes(const cbn_conv_plan *p, const cbn_plan_shape *s, int64_t images,
                            bool residual);
/* What a call of n images takes besides, for the images to be computed again. */
size_t cbn_plan_redo_bytes(const cbn_conv_impl *impl, int64_t n);
#endif
