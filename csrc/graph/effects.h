/* SPDX-License-Identifier: BSD-3-Clause */
/* Who may write whose memory: one analysis for every pass.
 *
 * Each node's value belongs to an alias class: views join the class of what they view (schema marks, methods that
 * view), two
 * get_attr nodes join when the arrays they name share memory, a get_attr joins the constants in arguments that share
 * memory
 * with it. What the table does not know - a callable, a module that is not pure - may write all it is given (a
 * module: also
 * the arrays it holds) and return any of it. For each class the writing nodes are listed.
 * Taken as true: a placeholder shares memory with nothing else in the graph (unless it is told which array it is); in
 * arrays a[i] = b copies b. */
#ifndef CBN_EFFECTS_H
#define CBN_EFFECTS_H
#include "graph/op_table.h"

typedef struct cbn_effects cbn_effects;

/* Describes the graph as it is now: what a pass changes later it says through cbn_effects_substitute.
 * root: the owning module (resolves get_attr and call_module targets), or NULL: every get_attr may alias every other.
 * Host code may run: the graph is locked meanwhile. */
CBN_NODISCARD cbn_status cbn_effects_build(cbn_graph *g, cbn_host root, cbn_effects **out, cbn_error *err);
/* The same, knowing which arrays the first `ninputs` placeholders are going to be. */
CBN_NODISCARD cbn_status cbn_effects_build_with(cbn_graph *g, cbn_host root, const cbn_host *inputs, uint32_t ninputs,
                                                cbn_effects **out, cbn_error *err);
void cbn_effects_free(cbn_effects *e);
/* new_id took the place of old_id: it has old_id's memory class from now on. */
CBN_NODISCARD cbn_status cbn_effects_substitute(cbn_effects *e, cbn_node_id old_id, cbn_node_id new_id, cbn_error *err);
/* new_id, made since, has memory of its own that nothing writes or returns: a new constant. */
CBN_NODISCARD cbn_status cbn_effects_add_fresh(cbn_effects *e, cbn_node_id new_id, cbn_error *err);
/* Of a node that the analysis has not seen everything is assumed, in all questions.
 * The first node strictly between `after` and `before` in the list that may write memory of `value`; 0: none.
 * after = 0: from the start of the list, before = 0: to its end. O(log writers). */
cbn_node_id cbn_effects_writer(const cbn_effects *e, cbn_node_id value, cbn_node_id after, cbn_node_id before);
/* The same for the memory of an array handle (a module's weight). Host code may run. */
CBN_NODISCARD cbn_status cbn_effects_array_writer(const cbn_effects *e, cbn_host array, cbn_node_id after,
                                                  cbn_node_id before, cbn_node_id *out, cbn_error *err);
/* Does the graph return memory of the array handle? Host code may run. */
CBN_NODISCARD cbn_status cbn_effects_array_returned(const cbn_effects *e, cbn_host array, bool *out, cbn_error *err);
/* May the two nodes' values share memory? */
bool cbn_effects_may_alias(const cbn_effects *e, cbn_node_id a, cbn_node_id b);
/* Seen nodes may share memory if and only if their numbers are equal. UINT32_MAX: not seen, may share with any. */
uint32_t cbn_effects_class(const cbn_effects *e, cbn_node_id value);
/* Does anything write this node's memory, anywhere in the graph? */
bool cbn_effects_written(const cbn_effects *e, cbn_node_id value);
/* May the graph return this node's memory, or a part of it? */
bool cbn_effects_returned(const cbn_effects *e, cbn_node_id value);
/* Which node of the output has it? 0: none, CBN_EFFECTS_MANY: several, or an array that stands in the output itself. */
#define CBN_EFFECTS_MANY UINT32_MAX
cbn_node_id cbn_effects_returned_by(const cbn_effects *e, cbn_node_id value);
/* May somebody outside the graph have this node's memory: an input, an attribute, an array in arguments, what a
 * callable that nobody knows gave? */
bool cbn_effects_outside(const cbn_effects *e, cbn_node_id value);
#endif
