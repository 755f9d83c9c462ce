/* SPDX-License-Identifier: BSD-3-Clause */
/* Shape rules of the op table. */
#ifndef CBN_GRAPH_SHAPE_H
#define CBN_GRAPH_SHAPE_H
#include "graph/op_table.h"

/* The shape of a node's value from the tensor metas of its inputs (and arrays in get_attr / modules through root), by its
 * row's rule, or the module's kind. *known false when no rule applies: the host may then find out by running the node.
 * CBN_BAD_VALUE naming the node when the shapes cannot work. Sets the node's tensor meta when known. Host code may run. */
CBN_NODISCARD cbn_status cbn_graph_infer_shape(cbn_graph *g, cbn_node_id id, cbn_host root, bool *known, cbn_error *err);
/* The same for every node in list order; placeholders have their metas already. Calls that no rule knows lose theirs and
 * are given to unknown(id, arg). */
CBN_NODISCARD cbn_status cbn_graph_infer_shapes(cbn_graph *g, cbn_host root,
                                                cbn_status (*unknown)(cbn_node_id id, void *arg), void *arg,
                                                cbn_error *err);
#endif
