/* SPDX-License-Identifier: BSD-3-Clause */
/* Liveness of values and the slots they live in. */
#include "graph/graph_exec.h"

#include "base/cbn_alloc.h"

#include <string.h>

/* Steps up to the first output; last[id]: the step that uses node id last, its own step at least. */
static cbn_status find_uses(const cbn_graph *g, cbn_program *p, uint32_t *last, cbn_error *err) {
    for (cbn_node_id id = cbn_graph_first(g); id; id = cbn_graph_next(g, id)) {
        const cbn_node *n = cbn_graph_node(g, id);
        const uint32_t i = p->nsteps++;
        p->steps[i] = (cbn_step){.node = id, .slot = CBN_SLOT_NONE};
        p->slot_of[id] = 0; /* it has a step; the slot comes later */
        p->ninputs += n->op == CBN_NODE_PLACEHOLDER;
        last[id] = i;
        for (uint32_t e = n->first_input; e; e = cbn_graph_edge(g, e)->next_input) {
            const cbn_node_id used = cbn_graph_edge(g, e)->producer;
            if (used == id || p->slot_of[used] == CBN_SLOT_NONE)
                return cbn_fail(err, CBN_BAD_STATE, "node '%.80s' uses '%.80s', which has no value yet; see graph.lint()",
                                cbn_graph_str(g, n->name, NULL),
                                cbn_graph_str(g, cbn_graph_node(g, used)->name, NULL));
            last[used] = i;
        }
        if (n->op == CBN_NODE_OUTPUT) break;
    }
    return CBN_OK;
}

/* Gives each value a slot, taking those that were freed before; lists what each step frees. `spare` has room for one number
 * a step. */
static void give_slots(cbn_program *p, const uint32_t *last, bool has_output, uint32_t *spare) {
    const uint32_t nvalues = p->nsteps - has_output;
    for (uint32_t i = 0; i < nvalues; i++) p->steps[last[p->steps[i].node]].n_free++;
    for (uint32_t i = 0, at = 0; i < p->nsteps; i++) {
        p->steps[i].first_free = at;
        at += p->steps[i].n_free;
        p->steps[i].n_free = 0;
    }
    /* Values are listed before their slots are known: by step number first. */
    for (uint32_t i = 0; i < nvalues; i++) {
        cbn_step *s = &p->steps[last[p->steps[i].node]];
        p->frees[s->first_free + s->n_free++] = i;
    }
    uint32_t nspare = 0;
    for (uint32_t i = 0; i < p->nsteps; i++) {
        cbn_step *s = &p->steps[i];
        if (i < nvalues) {
            s->slot = nspare ? spare[--nspare] : p->nslots++;
            p->slot_of[s->node] = s->slot;
        }
        for (uint32_t k = 0; k < s->n_free; k++) {
            uint32_t *entry = &p->frees[s->first_free + k];
            *entry = p->steps[*entry].slot;
            spare[nspare++] = *entry;
        }
    }
    if (has_output) p->slot_of[p->steps[nvalues].node] = CBN_SLOT_NONE;
}

cbn_status cbn_program_build(const cbn_graph *g, cbn_program *out, cbn_error *err) {
    const size_t count = (size_t)cbn_graph_count(g) + 1, ids = cbn_graph_slots(g);
    *out = (cbn_program){.version = cbn_graph_version(g), .nids = (uint32_t)ids};
    out->steps = cbn_alloc_array(count, sizeof *out->steps);
    out->frees = cbn_alloc_array(count, sizeof *out->frees);
    out->slot_of = cbn_alloc_array(ids, sizeof *out->slot_of);
    uint32_t *last = cbn_alloc_array(ids, sizeof *last), *spare = cbn_alloc_array(count, sizeof *spare);
    cbn_status st = CBN_OK;
    if (out->steps && out->frees && out->slot_of && last && spare) {
        memset(out->slot_of, 0xff, ids * sizeof *out->slot_of);
        st = find_uses(g, out, last, err);
    } else {
        st = cbn_fail_memory(err, "a program", count * sizeof *out->steps);
    }
    if (st == CBN_OK) {
        const bool has_output =
            out->nsteps && cbn_graph_node(g, out->steps[out->nsteps - 1].node)->op == CBN_NODE_OUTPUT;
        give_slots(out, last, has_output, spare);
    } else {
        cbn_program_free(out);
    }
    cbn_free(last);
    cbn_free(spare);
    return st;
}

void cbn_program_free(cbn_program *p) {
    cbn_free(p->steps);
    cbn_free(p->frees);
    cbn_free(p->slot_of);
    *p = (cbn_program){0};
}
