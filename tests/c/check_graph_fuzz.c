/* SPDX-License-Identifier: BSD-3-Clause */
/* Random operations on a graph beside a naive model of it, with failing allocations and with host code that changes the
 * graph while handles are released. */
#include "graph_model.h"

/* ---- steps ------------------------------------------------------------------------------------------------------- */
static bool ran(cbn_status st) {
    CHECK_MSG(st == CBN_OK || st == CBN_NO_MEMORY, "status %d: %s", st, st ? err.message : "");
    return st == CBN_OK;
}

static void step_create(void) {
    int k = 0;
    while (k < NODES && m.n[k].alive) k++;
    if (k == NODES || m.count >= NODES - 4) return;
    static mnode fresh[8]; /* by depth: re-entrance comes after the call */
    mnode *n = &fresh[depth];
    *n = (mnode){.op = rnd(CBN_NODE_ROOT), .target_host = -1, .meta = rnd(3) - 1, .type_expr = rnd(2) - 1, .ndim = -2};
    random_args(n, rnd(8) != 0);
    if (n->op == CBN_NODE_CALL_FUNCTION) n->target_host = rnd(HOSTS);
    else strcpy(n->target, words[rnd(WORDS)]);
    const int word = rnd(WORDS + 4);
    cbn_value v[16];
    const int count = build_all(n, v);
    if (count < 0) return;
    cbn_node_spec spec = {.op = (cbn_node_op)n->op,
                          .args = v,
                          .nargs = (uint32_t)n->nargs,
                          .kw = v + n->nargs,
                          .nkw = (uint32_t)n->nkw,
                          .name = CBN_STR_NONE,
                          .meta = n->meta >= 0 ? (void *)&hosts[n->meta] : NULL,
                          .type_expr = n->type_expr >= 0 ? (void *)&hosts[n->type_expr] : NULL};
    cbn_status st = CBN_OK;
    if (n->target_host >= 0) {
        host_retain(&hosts[n->target_host]);
        spec.target = cbn_value_host(&hosts[n->target_host]);
    } else {
        spec.target = cbn_value_str(0);
        st = cbn_graph_intern(g, n->target, strlen(n->target), &spec.target.u.str, &err);
    }
    if (st == CBN_OK && word < WORDS) st = cbn_graph_intern(g, words[word], strlen(words[word]), &spec.name, &err);
    if (st == CBN_OK) st = cbn_graph_create(g, &spec, &n->id, &err);
    if (!ran(st)) {
        for (int i = 0; i < count; i++) cbn_value_release(g, v[i]);
        cbn_value_release(g, spec.target);
        return;
    }
    char cand[NAME_LEN] = "";
    if (word < WORDS) strcpy(cand, words[word]);
    else if (n->target_host < 0) model_snake(n->target, cand);
    model_name(cand, n->name);
    n->alive = true;
    n->gen = cbn_graph_node(g, n->id)->gen;
    m.n[k] = *n;
    const int at = m.anchor < 0 ? (m.after ? 0 : m.count) : place_of_node(m.anchor) + m.after;
    model_insert(k, at);
    model_use(k);
}

static void step_erase(void) {
    const int k = some_node(false);
    if (k < 0) return;
    const cbn_status st = cbn_graph_erase(g, m.n[k].id, &err);
    if (m.n[k].nusers) {
        CHECK(st == CBN_BAD_STATE && strstr(err.message, "Tried to erase Node ") && strstr(err.message, m.n[k].name));
    } else if (CHECK(st == CBN_OK)) {
        CHECK(!cbn_graph_alive(g, m.n[k].id, m.n[k].gen));
        model_erase(k);
    }
}

static void step_args(void) {
    const int k = some_node(false);
    if (k < 0) return;
    mnode n = m.n[k];
    random_args(&n, rnd(4) != 0);
    cbn_value v[16];
    const int count = build_all(&n, v);
    if (count < 0) return;
    if (!ran(cbn_graph_set_args(g, n.id, v, (uint32_t)n.nargs, v + n.nargs, (uint32_t)n.nkw, &err))) {
        for (int i = 0; i < count; i++) cbn_value_release(g, v[i]);
        return;
    }
    model_unuse(k);
    memcpy(n.users, m.n[k].users, sizeof n.users);
    n.nusers = m.n[k].nusers;
    m.n[k] = n;
    model_use(k);
}

static void model_swap(int user, int old_k, int new_k) {
    for (int i = 0; i < m.n[user].ntokens; i++) {
        token *t = &m.n[user].tokens[i];
        if (t->kind == T_NODE && t->x == old_k) t->x = new_k;
    }
    model_unuse(user);
    model_use(user);
}

static bool even_only(cbn_node_id user, void *arg) {
    (void)arg;
    return user % 2 == 0;
}

static void step_replace(void) {
    const int a = some_node(false), b = some_node(false);
    if (a < 0) return;
    const bool choose = rnd(2);
    uint32_t count;
    if (!ran(cbn_graph_replace_uses(g, m.n[a].id, m.n[b].id, choose ? even_only : NULL, NULL, &count, &err))) return;
    const mnode was = m.n[a];
    uint32_t expected = 0;
    for (int i = 0; i < was.nusers && a != b; i++) {
        const int u = was.users[i];
        if (choose && m.n[u].id % 2) continue;
        model_swap(u, a, b);
        expected++;
    }
    CHECK(count == expected);
}

static void step_replace_input(void) {
    const int u = some_node(false), a = some_node(false), b = some_node(false);
    if (u >= 0 && ran(cbn_graph_replace_input(g, m.n[u].id, m.n[a].id, m.n[b].id, &err))) model_swap(u, a, b);
}

static void step_move(void) {
    const int k = some_node(false), before = rnd(4) ? some_node(false) : -1;
    const cbn_node_id place = before < 0 ? 0 : m.n[before].id;
    if (k < 0 || !ran(cbn_graph_move_before(g, m.n[k].id, place, &err)) || k == before) return;
    model_remove(k);
    model_insert(k, before < 0 ? m.count : place_of_node(before));
}

static void step_fields(void) {
    const int k = some_node(false);
    if (k < 0) return;
    mnode *n = &m.n[k];
    const int h = rnd(HOSTS + 1) - 1;
    const cbn_host host = h < 0 ? NULL : &hosts[h];
    cbn_str s;
    switch (rnd(6)) {
    case 0:
        cbn_graph_set_meta(g, n->id, host);
        n->meta = h;
        break;
    case 1:
        cbn_graph_set_type_expr(g, n->id, host);
        n->type_expr = h;
        break;
    case 2: {
        const int ndim = rnd(8) - 1;
        cbn_tensor_meta t = {.ndim = (int8_t)ndim, .kind = 'f', .itemsize = 4, .shape = {1, 2, 3, 4, 5, 6, 7}};
        if (ran(cbn_graph_set_tensor(g, n->id, ndim == 3 ? NULL : &t, &err))) n->ndim = ndim == 3 ? -2 : ndim;
        break;
    }
    case 3:
        if (h < 0) break;
        host_retain(host);
        if (CHECK(cbn_graph_set_target(g, n->id, cbn_value_host(host), &err) == CBN_OK)) n->target_host = h;
        CHECK(cbn_graph_set_op(g, n->id, CBN_NODE_CALL_FUNCTION, &err) == CBN_OK);
        n->op = CBN_NODE_CALL_FUNCTION;
        break;
    case 4:
        if (!ran(cbn_graph_unique_name(g, "y", 1, &s, &err))) break;
        model_name("y", n->name);
        CHECK(cbn_graph_set_name(g, n->id, s, &err) == CBN_OK);
        break;
    default: {
        /* A value that nobody takes. */
        mnode scratch = {.ntokens = 0};
        random_value(&scratch, 0, false);
        const token *p = scratch.tokens;
        cbn_value v;
        if (build(&p, &v)) cbn_value_release(g, v);
    }
    }
}

static void step_anchor(void) {
    m.after = rnd(2);
    m.anchor = rnd(3) ? some_node(false) : -1;
    const cbn_node_id id = m.anchor < 0 ? 0 : m.n[m.anchor].id;
    if (m.after) cbn_graph_set_insert_after(g, id);
    else cbn_graph_set_insert_point(g, id);
}

static void step_snapshot(void) {
    msnap *s = &snaps[rnd(SNAPS)];
    if (!s->real) {
        if (ran(cbn_graph_snapshot_take(g, &s->real, &err))) s->m = m;
    } else if (rnd(2)) {
        cbn_graph_snapshot_drop(g, s->real);
        s->real = NULL;
    } else {
        cbn_graph_snapshot_restore(g, s->real);
        s->real = NULL;
        m = s->m;
        for (int i = 0; i < ITERS; i++) {
            miter *it = &iters[i];
            if (!it->on || it->cursor < 0) continue;
            int at = -1;
            for (int k = 0; k < NODES; k++) {
                if (m.n[k].alive && m.n[k].gen == it->gen) at = k;
            }
            it->cursor = at;
            if (at < 0) it->done = true;
        }
    }
}

static void step_iter(void) {
    miter *it = &iters[rnd(ITERS)];
    if (!it->on) {
        *it = (miter){.on = true, .reversed = rnd(2), .cursor = -1};
        cbn_graph_iter_begin(g, it->reversed, &it->real);
    } else if (rnd(8) == 0) {
        cbn_graph_iter_end(&it->real);
        it->on = false;
    } else {
        const cbn_node_id id = cbn_graph_iter_next(&it->real);
        if (!it->done) {
            it->cursor = neighbour(it->cursor, it->reversed ? -1 : 1);
            it->done = it->cursor < 0;
            it->gen = it->done ? 0 : m.n[it->cursor].gen;
        }
        CHECK(id == (it->done ? 0 : m.n[it->cursor].id));
    }
}

static bool dce_keeps(cbn_node_id id, void *arg) {
    (void)arg;
    return cbn_graph_node(g, id)->op != CBN_NODE_CALL_FUNCTION || id % 3 == 0;
}

static void step_dce(void) {
    uint32_t removed, expected = 0;
    if (!CHECK(cbn_graph_dce(g, dce_keeps, NULL, &removed, &err) == CBN_OK)) return;
    for (int i = m.count; i-- > 0;) {
        const int k = m.order[i];
        if (m.n[k].nusers || m.n[k].op != CBN_NODE_CALL_FUNCTION || m.n[k].id % 3 == 0) continue;
        model_erase(k);
        expected++;
    }
    CHECK(removed == expected);
}

/* Into another graph and away again: its nodes must say the same. */
static void step_copy(void) {
    cbn_graph *other;
    cbn_node_id map[4 * NODES] = {0};
    if (cbn_graph_slots(g) > 4 * NODES || !ran(cbn_graph_new(&vtable, NULL, &other, &err))) return;
    const cbn_status st = cbn_graph_copy_nodes(other, g, map, &err);
    if (!model_legal() && st == CBN_BAD_STATE) CHECK(cbn_graph_count(other) == 0);
    else if (ran(st)) {
        CHECK(cbn_graph_count(other) == (uint32_t)m.count);
        for (cbn_node_id a = cbn_graph_first(g), b = cbn_graph_first(other); a;
             a = cbn_graph_next(g, a), b = cbn_graph_next(other, b)) {
            CHECK(map[a] == b && cbn_graph_node(g, a)->n_users == cbn_graph_node(other, b)->n_users);
            CHECK(cbn_graph_node(g, a)->op == cbn_graph_node(other, b)->op);
        }
    } else {
        CHECK(cbn_graph_count(other) == 0);
    }
    cbn_graph_release(other);
}

static void step_refused(void) {
    const int k = some_node(false);
    if (k < 0) return;
    const cbn_value bad = cbn_value_node(cbn_graph_slots(g) + 5), root = cbn_value_node(0);
    CHECK(cbn_graph_set_args(g, m.n[k].id, &bad, 1, NULL, 0, &err) == CBN_BAD_STATE);
    CHECK(cbn_graph_set_args(g, m.n[k].id, &root, 1, NULL, 0, &err) == CBN_BAD_STATE);
    cbn_graph_lock(g);
    CHECK(cbn_graph_erase(g, m.n[k].id, &err) == CBN_BAD_STATE);
    CHECK(cbn_graph_move_before(g, m.n[k].id, 0, &err) == CBN_BAD_STATE);
    cbn_graph_unlock(g);
}

static void flush(void) {
    const bool was = in_flush;
    in_flush = true;
    cbn_graph_flush(g);
    in_flush = was;
}

static void step(void) {
    static void (*const often[])(void) = {step_create, step_create, step_create, step_create, step_create, step_erase,
                                          step_erase,  step_erase,  step_args,   step_replace, step_replace_input,
                                          step_move,   step_fields, step_fields, step_anchor,  step_iter, step_iter};
    static void (*const seldom[])(void) = {step_snapshot, step_snapshot, step_snapshot,
                                           step_dce,      step_copy,     step_refused};
    if (rnd(6)) often[rnd(sizeof often / sizeof *often)]();
    else seldom[rnd(sizeof seldom / sizeof *seldom)]();
}

/* Host code during a flush uses the graph, as a destructor may. */
static void reenter(void) {
    if (!in_flush || depth >= 3 || n_used > NAMES - 1000 || rnd(3)) return;
    depth++;
    in_flush = false;
    step();
    in_flush = true;
    if (rnd(2)) cbn_graph_flush(g);
    depth--;
}

static void clear_model(void) {
    memset(m.n, 0, sizeof m.n);
    m.count = 0;
    m.anchor = -1;
    m.after = false;
    for (int i = 0; i < ITERS; i++) iters[i].cursor = -1;
}

/* Argument blocks, sequences and shapes in use. */
static uint32_t live_cells(void) {
    uint32_t live = 0;
    for (int k = 0; k < CBN_CELL_KINDS; k++) {
        for (int c = 0; c < CBN_CELL_CLASSES; c++) {
            for (const cbn_chunk *p = g->pools[k][c].chunks; p; p = p->next) live += p->used;
            for (const cbn_cell *f = g->pools[k][c].free; f; f = f->next) live--;
        }
    }
    return live;
}

static void fuzz_graph(int steps) {
    n_used = n_bases = 0;
    clear_model();
    if (!CHECK(cbn_graph_new(&vtable, NULL, &g, &err) == CBN_OK)) return;
    for (int i = 0; i < steps && check_failures() == 0; i++) {
        if (rnd(5) == 0) cbn_alloc_fail_after(rnd(3));
        step();
        if (rnd(2)) flush();
        if (rnd(400) == 0) {
            cbn_graph_clear(g);
            clear_model();
        }
        compare();
        compare_verdict();
    }
    cbn_alloc_fail_after(-1);
    for (int i = 0; i < ITERS; i++) {
        if (iters[i].on && rnd(2)) cbn_graph_iter_end(&iters[i].real);
    }
    if (rnd(2)) {
        for (int i = 0; i < SNAPS; i++) cbn_graph_snapshot_drop(g, snaps[i].real);
        cbn_graph_clear(g);
        depth = 9; /* no more calls from the host */
        flush();
        depth = 0;
        CHECK_MSG(live_cells() == 1, "%u cells beside the root's leaked", live_cells() - 1);
    }
    cbn_graph_release(g);
    for (int i = 0; i < ITERS; i++) {
        if (iters[i].on) CHECK(cbn_graph_iter_next(&iters[i].real) == 0);
        iters[i] = (miter){.on = false};
    }
    for (int i = 0; i < SNAPS; i++) snaps[i].real = NULL;
    for (int i = 0; i < HOSTS; i++) CHECK_MSG(hosts[i].refs == 0, "host %d: %ld references left", i, hosts[i].refs);
}

CHECK_TEST(graph_fuzz) {
    cbn_alloc_stats before, after;
    cbn_alloc_get_stats(&before);
    const int rounds = check_under("") ? 300 : 100;
    for (int i = 0; i < rounds && check_failures() == 0; i++) fuzz_graph(400);
    cbn_alloc_get_stats(&after);
    CHECK_MSG(before.live_blocks == after.live_blocks, "%zu blocks leaked", after.live_blocks - before.live_blocks);
}
