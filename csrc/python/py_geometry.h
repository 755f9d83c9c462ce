/* SPDX-License-Identifier: BSD-3-Clause */
/* What the user says about a convolution or linear operator, from Python objects to the structs of ops/. */
#ifndef CBN_PY_GEOMETRY_H
#define CBN_PY_GEOMETRY_H
#include "python/py_array.h"

#include "ops/conv_plan.h"

/* Borrowed references as the caller passed them; NULL: not given (the default). */
typedef struct cbn_geometry_args {
    PyObject *stride, *padding, *padding_mode, *dilation, *groups, *transposed, *output_padding;
} cbn_geometry_args;

/* Fills and checks *g for this weight (already known to have nd + 2 axes, linear: 2) and bias (array may be NULL).
 * For nd = 0 the per-axis arguments must be their defaults or empty. */
CBN_NODISCARD bool cbn_geometry_parse(const cbn_geometry_args *args, int nd, const cbn_array *weight,
                                      const cbn_array *bias, cbn_conv_geometry *g);
/* ValueError naming `weight` unless it has the axes of an nd-dimensional operator. nd < 0: 2 to 5 axes; returns nd,
 * or -1 with an exception. */
CBN_NODISCARD int cbn_weight_axes(const cbn_array *weight, int nd);

/* None, 'relu', 'relu6', 'hardswish', 'silu', 'sigmoid' or ('leaky_relu', slope). */
CBN_NODISCARD bool cbn_activation_parse(PyObject *obj, cbn_plan_options *opt);
PyObject *cbn_activation_object(const cbn_plan_options *opt);
CBN_NODISCARD bool cbn_precision_parse(PyObject *obj, cbn_precision *out);
const char *cbn_precision_name(cbn_precision p);

/* A new dict of the constructor's geometry arguments, as they can be passed again. */
PyObject *cbn_geometry_params(const cbn_conv_geometry *g, const cbn_plan_options *opt);

/* An array shape cut into batch, channels and spatial sizes. */
typedef struct cbn_io_shape {
    int ndim;     /* axes of the array */
    bool batched; /* false: no batch axis, n = 1 */
    int64_t n, channels;
    int64_t in[CBN_MAX_SPATIAL];
} cbn_io_shape;
/* Linear: every leading axis counts into n. ValueError naming `name` for a wrong number of axes. */
CBN_NODISCARD bool cbn_io_split(const cbn_conv_geometry *g, const char *name, int ndim, const npy_intp *shape,
                                cbn_io_shape *out);
/* The output's shape (ndim axes, same batching) given its spatial sizes. */
void cbn_io_output(const cbn_conv_geometry *g, const cbn_io_shape *io, const npy_intp *input_shape,
                   const int64_t *out_spatial, npy_intp *out_shape);

/* A shape argument: a sequence of at most CBN_MAX_DIMS ints >= 0. *ndim and shape are filled. */
CBN_NODISCARD bool cbn_shape_parse(PyObject *obj, const char *name, int *ndim, npy_intp *shape);

/* How many input elements beyond the edges of a tile (aligned to the stride; transposed: any) its outputs read. */
void cbn_geometry_halo(const cbn_conv_geometry *g, int axis, int64_t *before, int64_t *after);
#endif
