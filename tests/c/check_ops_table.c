/* SPDX-License-Identifier: BSD-3-Clause */
/* The op table, the binder, effects and shapes without Python: allocation failures, many handles, a graph of plain
 * values. */
#include "check.h"

#include <string.h>

#include "base/cbn_alloc.h"
#include "graph/effects.h"
#include "graph/graph_shape.h"

static void host_nothing(cbn_host h) { (void)h; }
static cbn_status host_equal(cbn_host a, cbn_host b, bool *out, cbn_error *err) {
    (void)err;
    *out = a == b;
    return CBN_OK;
}
static void host_describe(cbn_host h, char *buf, size_t size) {
    (void)h;
    if (size > 0) buf[0] = '\0';
}
static cbn_status host_array(cbn_host h, cbn_array_info *out, bool *is_array, cbn_error *err) {
    (void)err;
    /* Every handle of these tests is the address of a byte of `memory`: an array of four bytes from there. */
    *out = (cbn_array_info){.lo = h, .hi = (const char *)h + 4, .ndim = 1, .kind = 'f', .itemsize = 4, .shape = {1}};
    *is_array = true;
    return CBN_OK;
}
static const cbn_host_vtable host = {.retain = host_nothing, .release = host_nothing, .equal = host_equal,
                                     .describe = host_describe, .array = host_array};
static char memory[64];

static cbn_opcode row_of(const cbn_op_table *t, const char *name) { return cbn_op_table_find(t, name, strlen(name)); }

CHECK_TEST(op_table_finds_every_row) {
    cbn_op_table *t;
    cbn_error err;
    if (!CHECK(cbn_op_table_new(&t, &err) == CBN_OK)) return;
    for (int i = 1; i <= cbn_op_table_count(t); i++) {
        const cbn_op *op = cbn_op_table_row(t, (cbn_opcode)i);
        CHECK_MSG(row_of(t, op->name) == i, "%s is not found", op->name);
        if (strncmp(op->name, "method.", 7) == 0)
            CHECK(cbn_op_table_method(t, op->name + 7, strlen(op->name) - 7) == i);
    }
    CHECK(row_of(t, "functional.conv2d") == CBN_OP_FUNCTIONAL_CONV2D && row_of(t, "functional.conv2") == 0);
    CHECK(row_of(t, "") == 0 && cbn_op_table_row(t, 0) == NULL && cbn_op_table_row(t, UINT16_MAX) == NULL);
    for (uintptr_t h = 1; h <= 5000; h++)
        CHECK(cbn_op_table_register(t, (cbn_host)(h * 16), 1 + h % 7, &err) == CBN_OK);
    for (uintptr_t h = 1; h <= 5000; h++) CHECK(cbn_op_table_lookup(t, (cbn_host)(h * 16)) == 1 + h % 7);
    CHECK(cbn_op_table_lookup(t, (cbn_host)8) == 0 && cbn_op_table_lookup(NULL, memory) == 0);
    cbn_op_table_free(t);
}

/* x = placeholder; f = relu_(x[0]); g = batch_norm(...) with constant statistics; fills ids. */
static cbn_status build(cbn_graph *g, const cbn_op_table *t, cbn_node_id *x, cbn_node_id *f, cbn_error *err) {
    (void)t;
    cbn_str name, relu;
    CBN_TRY(cbn_graph_intern(g, "x", 1, &name, err));
    CBN_TRY(cbn_graph_intern(g, "relu_", 5, &relu, err));
    const cbn_node_spec place = {.op = CBN_NODE_PLACEHOLDER, .target = cbn_value_str(name), .name = CBN_STR_NONE};
    CBN_TRY(cbn_graph_create(g, &place, x, err));
    const cbn_value args[] = {cbn_value_node(*x)};
    const cbn_node_spec call = {.op = CBN_NODE_CALL_METHOD, .target = cbn_value_str(relu), .args = args, .nargs = 1,
                                .name = CBN_STR_NONE};
    CBN_TRY(cbn_graph_create(g, &call, f, err));
    const cbn_value constant[] = {cbn_value_host(memory), cbn_value_float(1.0)};
    cbn_str add;
    CBN_TRY(cbn_graph_intern(g, "add_", 4, &add, err));
    const cbn_node_spec write = {.op = CBN_NODE_CALL_METHOD, .target = cbn_value_str(add), .args = constant, .nargs = 2,
                                 .name = CBN_STR_NONE};
    cbn_node_id ignored;
    return cbn_graph_create(g, &write, &ignored, err);
}

static cbn_status analyse(void) {
    cbn_error err;
    cbn_op_table *t = NULL;
    cbn_graph *g = NULL;
    cbn_effects *e = NULL;
    cbn_node_id x = 0, f = 0, found = 0;
    cbn_status status = cbn_op_table_new(&t, &err);
    if (status == CBN_OK) status = cbn_graph_new(&host, t, &g, &err);
    if (status == CBN_OK) status = build(g, t, &x, &f, &err);
    if (status == CBN_OK) status = cbn_effects_build(g, NULL, &e, &err);
    if (status == CBN_OK) {
        CHECK(cbn_effects_writer(e, x, 0, 0) == f && cbn_effects_writer(e, x, f, 0) == 0);
        CHECK(cbn_effects_may_alias(e, x, f) && cbn_effects_written(e, f));
        status = cbn_effects_array_writer(e, memory + 2, 0, 0, &found, &err);
        if (status == CBN_OK) CHECK(found != 0 && found != f);
    }
    if (status == CBN_OK) status = cbn_effects_substitute(e, x, found, &err);
    if (status == CBN_OK) {
        CHECK(cbn_effects_may_alias(e, found, f)); /* x's class now */
        cbn_bound b;
        CHECK(cbn_op_bind(g, f, &b, &err) == CBN_OK && b.n == 1 && b.v[0].u.node == x);
        CHECK(cbn_op_bind(g, x, &b, &err) == CBN_BAD_VALUE);
        const cbn_tensor_meta meta = {.ndim = 2, .kind = 'f', .itemsize = 4, .shape = {2, 3}};
        bool known = false;
        status = cbn_graph_set_tensor(g, x, &meta, &err);
        if (status == CBN_OK) status = cbn_graph_infer_shape(g, f, NULL, &known, &err);
        if (status == CBN_OK) CHECK(known && cbn_graph_node(g, f)->tensor->shape[1] == 3);
    }
    cbn_effects_free(e);
    if (g != NULL) cbn_graph_release(g);
    cbn_op_table_free(t);
    return status;
}

CHECK_TEST(op_table_survives_failing_allocations) {
    cbn_alloc_stats before, after;
    CHECK(analyse() == CBN_OK);
    cbn_alloc_get_stats(&before);
    cbn_status status = CBN_NO_MEMORY;
    int tries = 0;
    for (; status != CBN_OK && tries < 10000; tries++) {
        cbn_alloc_fail_after(tries);
        status = analyse();
        cbn_alloc_fail_after(-1);
        if (!CHECK(status == CBN_OK || status == CBN_NO_MEMORY)) return;
    }
    CHECK(status == CBN_OK && tries > 5);
    cbn_alloc_get_stats(&after);
    CHECK_MSG(after.live_blocks == before.live_blocks, "%zu blocks leaked", after.live_blocks - before.live_blocks);
}
