/* SPDX-License-Identifier: BSD-3-Clause */
/* The graph core, one property a test. check_graph_fuzz.c has the random ones. */
#include "check.h"
#include "graph/graph_priv.h"

#include <stdio.h>
#include <string.h>

static long refs;
static void host_retain(cbn_host h) {
    (void)h;
    refs++;
}
static void host_release(cbn_host h) {
    (void)h;
    refs--;
}
static cbn_status host_equal(cbn_host a, cbn_host b, bool *out, cbn_error *err) {
    *out = *(int *)a == *(int *)b;
    return *(int *)a == -1 ? cbn_fail(err, CBN_HOST_ERROR, "the host says no") : CBN_OK;
}
static const cbn_host_vtable vtable = {.retain = host_retain, .release = host_release, .equal = host_equal};
static cbn_error err;
static int callee = 7;

static cbn_graph *new_graph(void) {
    cbn_graph *g = NULL;
    CHECK(cbn_graph_new(&vtable, NULL, &g, &err) == CBN_OK);
    return g;
}

static cbn_str intern(cbn_graph *g, const char *s) {
    cbn_str id = 0;
    CHECK(cbn_graph_intern(g, s, strlen(s), &id, &err) == CBN_OK);
    return id;
}

static cbn_status try_add(cbn_graph *g, cbn_node_op op, const char *target, const cbn_value *args, uint32_t n,
                          cbn_node_id *out) {
    cbn_node_spec spec = {.op = op, .args = args, .nargs = n, .name = CBN_STR_NONE};
    *out = 0;
    spec.target = cbn_value_str(0);
    CBN_TRY(cbn_graph_intern(g, target, strlen(target), &spec.target.u.str, &err));
    if (op == CBN_NODE_CALL_FUNCTION) {
        spec.name = spec.target.u.str;
        spec.target = cbn_value_host(&callee);
        refs++;
    }
    const cbn_status st = cbn_graph_create(g, &spec, out, &err);
    if (st != CBN_OK && op == CBN_NODE_CALL_FUNCTION) refs--;
    return st;
}

static cbn_node_id add(cbn_graph *g, cbn_node_op op, const char *target, const cbn_value *args, uint32_t n) {
    cbn_node_id id;
    CHECK_MSG(try_add(g, op, target, args, n, &id) == CBN_OK, "%s", err.message);
    return id;
}

static cbn_node_id call(cbn_graph *g, const char *name, cbn_node_id a, cbn_node_id b) {
    const cbn_value v[2] = {cbn_value_node(a), cbn_value_node(b)};
    return add(g, CBN_NODE_CALL_FUNCTION, name, v, b ? 2 : 1);
}

static const char *name_of(cbn_graph *g, cbn_node_id id) { return cbn_graph_str(g, cbn_graph_node(g, id)->name, NULL); }

CHECK_TEST(graph_layout) {
    _Static_assert(sizeof(cbn_node) == 112 && sizeof(cbn_value) == 16, "what the memory target counts on");
    CHECK(cbn_node_op_parse("call_module", 11) == CBN_NODE_CALL_MODULE);
    CHECK(cbn_node_op_parse("call_modul", 10) == CBN_NODE_OP_COUNT);
    CHECK(strcmp(cbn_node_op_name(CBN_NODE_GET_ATTR), "get_attr") == 0);
}

CHECK_TEST(graph_names) {
    static const struct {
        const char *cand, *first, *second;
    } rows[] = {{"x", "x", "x_1"},
                {"x_1", "x_2", "x_3"},
                {"relu_007", "relu_007", "relu_8"},
                {"relu_3", "relu_3", "relu_4"},
                {"conv 2.d", "conv_2_d", "conv_2_d_1"},
                {"9lives", "_9lives", "_9lives_1"},
                {"", "_unnamed", "_unnamed_1"},
                {"len", "len_1", "len_2"},
                {"device", "device_1", "device_2"},
                {"None", "None_1", "None_2"},
                {"match", "match", "match_1"},
                {"\xc3\xa9t\xc3\xa9", "_t_", "_t__1"},
                {"k_4000000000", "k_4000000000", "k_4000000000_1"}};
    cbn_graph *g = new_graph();
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        for (int k = 0; k < 2; k++) {
            cbn_str s;
            CHECK(cbn_graph_unique_name(g, rows[i].cand, strlen(rows[i].cand), &s, &err) == CBN_OK);
            const char *want = k ? rows[i].second : rows[i].first;
            CHECK_MSG(strcmp(cbn_graph_str(g, s, NULL), want) == 0, "%s: %s, not %s", rows[i].cand,
                      cbn_graph_str(g, s, NULL), want);
        }
    }
    static const char *const targets[][2] = {{"HTTPServer", "httpserver"},      {"fooBarBaz", "foo_bar_baz"},
                                             {"__add__", "add"},                {"____", ""},
                                             {"layer1.0.Conv", "layer1.0.conv"}, {"__x", "__x"}};
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++) {
        cbn_str s;
        CHECK(cbn_graph_name_of_target(g, targets[i][0], strlen(targets[i][0]), &s, &err) == CBN_OK);
        CHECK_MSG(strcmp(cbn_graph_str(g, s, NULL), targets[i][1]) == 0, "%s: %s", targets[i][0],
                  cbn_graph_str(g, s, NULL));
    }
    /* Strings of any content and size, found again. */
    char text[300];
    for (int i = 0; i < 300; i++) text[i] = (char)(i * 7);
    for (size_t len = 0; len < 300; len++) {
        cbn_str a, b;
        CHECK(cbn_graph_intern(g, text, len, &a, &err) == CBN_OK && cbn_graph_intern(g, text, len, &b, &err) == CBN_OK);
        size_t got;
        CHECK(a == b && cbn_graph_find_str(g, text, len) == a);
        CHECK(memcmp(cbn_graph_str(g, a, &got), text, len) == 0 && got == len);
    }
    CHECK(cbn_graph_find_str(g, "never seen", 10) == CBN_STR_NONE);
    cbn_graph_release(g);
}

CHECK_TEST(graph_order) {
    cbn_graph *g = new_graph();
    const cbn_node_id x = add(g, CBN_NODE_PLACEHOLDER, "x", NULL, 0), y = add(g, CBN_NODE_PLACEHOLDER, "y", NULL, 0);
    /* Thousands of nodes into one gap, then everywhere. */
    cbn_graph_set_insert_point(g, y);
    for (int i = 0; i < 3000; i++) call(g, "a", x, 0);
    cbn_graph_set_insert_after(g, x);
    for (int i = 0; i < 3000; i++) call(g, "b", x, 0);
    cbn_graph_set_insert_after(g, 0);
    for (int i = 0; i < 3000; i++) add(g, CBN_NODE_GET_ATTR, "w", NULL, 0);
    for (int i = 0; i < 3000; i++) {
        cbn_node_id id = 1 + (cbn_node_id)(check_rand() % (cbn_graph_slots(g) - 1));
        if (id == x) continue;
        cbn_graph_set_insert_after(g, id);
        add(g, CBN_NODE_GET_ATTR, "r", NULL, 0);
    }
    uint32_t n = 0;
    for (cbn_node_id id = cbn_graph_first(g), prev = 0; id; prev = id, id = cbn_graph_next(g, id), n++)
        CHECK(!prev || (cbn_node_before(g, prev, id) && !cbn_node_before(g, id, prev)));
    CHECK(n == cbn_graph_count(g));
    CHECK_MSG(cbn_graph_verify(g, &err) == CBN_OK, "%s", err.message);
    cbn_graph_release(g);
    CHECK(refs == 0);
}

CHECK_TEST(graph_wide_and_deep) {
    enum { WIDE = 100000 };
    const size_t blocks = check_live_blocks();
    cbn_graph *g = new_graph();
    cbn_value *v = cbn_alloc_array(WIDE, sizeof *v);
    for (int i = 0; i < WIDE; i++) v[i] = cbn_value_node(add(g, CBN_NODE_PLACEHOLDER, "p", NULL, 0));
    const cbn_node_id cat = add(g, CBN_NODE_CALL_FUNCTION, "cat", v, WIDE);
    CHECK(cbn_graph_node(g, cat)->n_inputs == WIDE);
    /* One user, however often it uses the node; one node with very many users. */
    for (int i = 0; i < WIDE; i++) v[i] = cbn_value_node(cat);
    const cbn_node_id twice = add(g, CBN_NODE_CALL_FUNCTION, "cat", v, WIDE);
    CHECK(cbn_graph_node(g, twice)->n_inputs == 1 && cbn_graph_node(g, cat)->n_users == 1);
    CHECK(cbn_node_single_user(g, cat) == twice);
    for (int i = 0; i < WIDE; i++) call(g, "relu", twice, 0);
    uint32_t count;
    CHECK(cbn_graph_replace_uses(g, twice, cat, NULL, NULL, &count, &err) == CBN_OK && count == WIDE);
    CHECK_MSG(cbn_graph_verify(g, &err) == CBN_OK, "%s", err.message);
    cbn_free(v);

    cbn_value deep = cbn_value_node(cat);
    int levels = 0;
    while (cbn_value_seq(g, CBN_V_LIST, &deep, 1, NULL, &deep, &err) == CBN_OK) levels++;
    CHECK(levels == CBN_VALUE_MAX_DEPTH && err.status == CBN_BAD_VALUE && deep.depth == CBN_VALUE_MAX_DEPTH);
    const cbn_node_id user = add(g, CBN_NODE_CALL_FUNCTION, "f", &deep, 1);
    CHECK(cbn_graph_replace_input(g, user, cat, twice, &err) == CBN_OK);
    CHECK(cbn_graph_node(g, user)->n_inputs == 1 && cbn_graph_verify(g, &err) == CBN_OK);
    cbn_graph_release(g);
    CHECK(refs == 0 && check_live_blocks() == blocks);
}

CHECK_TEST(graph_erase_refused) {
    cbn_graph *g = new_graph();
    const cbn_node_id x = add(g, CBN_NODE_PLACEHOLDER, "x", NULL, 0), r = call(g, "relu", x, 0);
    const uint32_t gen = cbn_graph_node(g, r)->gen;
    CHECK(cbn_graph_erase(g, x, &err) == CBN_BAD_STATE);
    const char *const want = "Tried to erase Node x but it still had 1 users in the graph";
    CHECK_MSG(strcmp(err.message, want) == 0, "%s", err.message);
    CHECK(cbn_graph_erase(g, r, &err) == CBN_OK && !cbn_graph_alive(g, r, gen));
    CHECK(cbn_graph_erase(g, r, &err) == CBN_BAD_STATE);
    CHECK(cbn_graph_erase(g, 0, &err) == CBN_BAD_STATE && cbn_graph_erase(g, 1000, &err) == CBN_BAD_STATE);
    CHECK(refs == 1 && cbn_graph_needs_flush(g));
    cbn_graph_flush(g);
    CHECK(refs == 0 && !cbn_graph_needs_flush(g));
    /* The slot is used again, under another generation. */
    CHECK(call(g, "relu", x, 0) == r && cbn_graph_node(g, r)->gen != gen && !cbn_graph_alive(g, r, gen));
    CHECK(strcmp(name_of(g, r), "relu_1") == 0);
    cbn_graph_release(g);
}

CHECK_TEST(graph_walk_while_erasing) {
    cbn_graph *g = new_graph();
    for (int i = 0; i < 100; i++) add(g, CBN_NODE_PLACEHOLDER, "x", NULL, 0);
    cbn_graph_iter a, b;
    cbn_graph_iter_begin(g, false, &a);
    cbn_graph_iter_begin(g, true, &b);
    int seen = 0;
    for (cbn_node_id id; (id = cbn_graph_iter_next(&a)); seen++) {
        const cbn_node_id next = cbn_graph_next(g, id);
        CHECK(cbn_graph_erase(g, id, &err) == CBN_OK);
        if (seen % 3 == 0 && next) CHECK(cbn_graph_erase(g, next, &err) == CBN_OK);
    }
    /* Three steps meet three nodes and erase a fourth. */
    CHECK_MSG(seen == 75 && cbn_graph_count(g) == 0, "%d seen, %u left", seen, cbn_graph_count(g));
    CHECK(cbn_graph_iter_next(&b) == 0 && cbn_graph_iter_next(&a) == 0);
    cbn_graph_iter_end(&a);
    cbn_graph_release(g);
    CHECK(cbn_graph_iter_next(&b) == 0); /* the graph went first */
    cbn_graph_iter_end(&b);
}

CHECK_TEST(graph_value_equal) {
    static int one = 1, other_one = 1, two = 2, angry = -1;
    cbn_graph *g = new_graph(), *h = new_graph();
    const cbn_value leaves[] = {cbn_value_none(), cbn_value_bool(true), cbn_value_int(1), cbn_value_float(1.0),
                                cbn_value_float(0.0), cbn_value_float(-0.0), cbn_value_float(__builtin_nan("")),
                                cbn_value_host(&one), cbn_value_host(&two), cbn_value_node(0), cbn_value_node(1)};
    enum { N = sizeof leaves / sizeof *leaves };
    bool same;
    for (int i = 0; i < N; i++) {
        for (int k = 0; k < N; k++) {
            CHECK(cbn_value_equal(g, &leaves[i], h, &leaves[k], &same, &err) == CBN_OK);
            CHECK_MSG(same == (i == k), "%d and %d", i, k);
        }
    }
    const cbn_value equal_host = cbn_value_host(&other_one), bad_host = cbn_value_host(&angry);
    CHECK(cbn_value_equal(g, &leaves[7], h, &equal_host, &same, &err) == CBN_OK && same);
    CHECK(cbn_value_equal(g, &bad_host, h, &equal_host, &same, &err) == CBN_HOST_ERROR && !same);
    /* The same text under other ids; nested. */
    intern(h, "something first");
    const cbn_value a[3] = {cbn_value_str(intern(g, "text")), cbn_value_int(1), cbn_value_none()};
    const cbn_value b[3] = {cbn_value_str(intern(h, "text")), cbn_value_int(1), cbn_value_none()};
    cbn_value va, vb, vc;
    CHECK(cbn_value_seq(g, CBN_V_TUPLE, a, 3, NULL, &va, &err) == CBN_OK);
    CHECK(cbn_value_seq(h, CBN_V_TUPLE, b, 3, NULL, &vb, &err) == CBN_OK);
    CHECK(cbn_value_seq(h, CBN_V_LIST, b, 3, NULL, &vc, &err) == CBN_OK);
    CHECK(cbn_value_equal(g, &va, h, &vb, &same, &err) == CBN_OK && same);
    CHECK(cbn_value_equal(h, &vc, h, &vb, &same, &err) == CBN_OK && !same);
    cbn_graph_release(g);
    cbn_graph_release(h);
    CHECK(refs == 0);
}

/* ---- lint finds each kind of damage ------------------------------------------------------------------------------ */
static void damaged(cbn_graph *g, const char *what, const char *text) {
    CHECK_MSG(cbn_graph_verify(g, &err) == CBN_BAD_STATE && strstr(err.message, text), "%s: '%s'", what, err.message);
}

CHECK_TEST(graph_verify_rejects) {
    cbn_graph *g = new_graph();
    const cbn_node_id x = add(g, CBN_NODE_PLACEHOLDER, "x", NULL, 0), a = call(g, "a", x, 0), b = call(g, "b", a, x);
    const cbn_value result = cbn_value_node(b);
    const cbn_node_id out = add(g, CBN_NODE_OUTPUT, "output", &result, 1);
    cbn_node *n = g->s.nodes;
    const cbn_node keep[5] = {n[0], n[x], n[a], n[b], n[out]};
#define DAMAGE(change, text)                                                                                           \
    do {                                                                                                               \
        CHECK(cbn_graph_verify(g, &err) == CBN_OK);                                                                    \
        change;                                                                                                        \
        damaged(g, #change, text);                                                                                     \
        memcpy(n, keep, sizeof keep);                                                                                  \
    } while (0)
    CHECK(x == 1 && a == 2 && b == 3 && out == 4);
    DAMAGE(n[b].name = n[a].name, "redefined name a");
    DAMAGE(n[a].op = CBN_NODE_CALL_MODULE, "target of call_module must be a string");
    DAMAGE(n[x].op = CBN_NODE_CALL_FUNCTION, "target of call_function must be a callable");
    DAMAGE(n[a].n_users = 2, "Node a: its list of users");
    DAMAGE(n[a].first_user = 0, "Node a: its list of users");
    DAMAGE(n[b].n_inputs = 1, "Node b: its list of inputs");
    DAMAGE(n[b].last_input = n[a].last_input, "Node b: its list of inputs");
    DAMAGE(n[a].order = n[b].order, "list of nodes is broken");
    DAMAGE(n[a].next = out, "list of nodes is broken");
    DAMAGE(n[0].prev = b, "list of nodes is broken at its end");
    DAMAGE(n[a].op = CBN_NODE_OP_COUNT, "");
    DAMAGE(g->s.count = 3, "list of nodes is broken");
    g->s.count = 4;
    DAMAGE(n[a].op = CBN_NODE_OUTPUT; n[a].target = n[out].target, "an output cannot be used");
    DAMAGE(n[b].args->v[0].u.node = 77, "not a node of this graph");
    n[b].args->v[0].u.node = a;
    DAMAGE(n[b].args->v[1].u.node = out, "used before it has been defined");
    n[b].args->v[1].u.node = x;
    DAMAGE(n[b].args->v[1].u.node = a, "among the users of x");
    n[b].args->v[1].u.node = x;
#undef DAMAGE
    CHECK(cbn_graph_move_before(g, x, 0, &err) == CBN_OK);
    damaged(g, "x last", "used before it has been defined");
    CHECK(cbn_graph_move_before(g, x, a, &err) == CBN_OK && cbn_graph_move_before(g, out, b, &err) == CBN_OK);
    damaged(g, "output early", "used before it has been defined");
    cbn_graph_release(g);
    CHECK(refs == 0);
}

/* ---- every allocation fails once --------------------------------------------------------------------------------- */
static cbn_status scenario(cbn_graph **out) {
    cbn_graph *g = NULL, *copy = NULL;
    cbn_graph_snapshot *snap = NULL;
    cbn_node_id id = 0, first = 0, map[200] = {0};
    uint32_t n;
    cbn_status st = cbn_graph_new(&vtable, NULL, &g, &err);
    *out = g;
    if (st == CBN_OK) st = try_add(g, CBN_NODE_PLACEHOLDER, "input", NULL, 0, &first);
    id = first;
    for (int i = 0; i < 100 && st == CBN_OK; i++) {
        const cbn_value v[3] = {cbn_value_node(id), cbn_value_node(first), cbn_value_int(i)};
        cbn_value seq;
        st = cbn_value_seq(g, CBN_V_LIST, v, 3, NULL, &seq, &err);
        if (st != CBN_OK) break;
        cbn_node_id next;
        st = try_add(g, CBN_NODE_CALL_FUNCTION, "step", &seq, 1, &next);
        if (st != CBN_OK) cbn_value_release(g, seq);
        else id = next;
        const cbn_tensor_meta t = {.ndim = (int8_t)(i % 5), .kind = 'f'};
        if (st == CBN_OK) st = cbn_graph_set_tensor(g, id, &t, &err);
    }
    if (st == CBN_OK) st = cbn_graph_snapshot_take(g, &snap, &err);
    if (st == CBN_OK) st = cbn_graph_replace_uses(g, first, id, NULL, NULL, &n, &err);
    if (snap) cbn_graph_snapshot_restore(g, snap);
    if (st == CBN_OK) st = cbn_graph_new(&vtable, NULL, &copy, &err);
    if (st == CBN_OK) st = cbn_graph_copy_nodes(copy, g, map, &err);
    if (st == CBN_OK) st = cbn_graph_verify(copy, &err);
    cbn_graph_release(copy);
    return st;
}

CHECK_TEST(graph_out_of_memory) {
    const size_t blocks = check_live_blocks();
    int64_t fail = 0;
    for (bool done = false; !done && check_failures() == 0; fail++) {
        cbn_graph *g;
        cbn_alloc_fail_after(fail);
        const cbn_status st = scenario(&g);
        cbn_alloc_fail_after(-1);
        done = st == CBN_OK;
        const bool says_so = st == CBN_NO_MEMORY && strncmp(err.message, "out of memory: ", 15) == 0;
        CHECK_MSG(done || says_so, "%d: %s", st, err.message);
        if (g) CHECK_MSG(cbn_graph_verify(g, &err) == CBN_OK, "allocation %d: %s", (int)fail, err.message);
        cbn_graph_release(g);
        CHECK_MSG(refs == 0 && check_live_blocks() == blocks, "allocation %d: %ld references, %zu blocks left", (int)fail,
                  refs, check_live_blocks() - blocks);
    }
    CHECK_MSG(fail > 30, "only %d allocations", (int)fail);
}

/* Erasing and creating for ever takes no more memory, names apart. */
CHECK_TEST(graph_steady_state) {
    cbn_graph *g = new_graph();
    const cbn_node_id x = add(g, CBN_NODE_PLACEHOLDER, "x", NULL, 0);
    size_t bytes = 0;
    for (int i = 0; i < 3000; i++) {
        const cbn_value v[2] = {cbn_value_node(x), cbn_value_int(i)};
        cbn_value seq;
        CHECK(cbn_value_seq(g, CBN_V_TUPLE, v, 2, NULL, &seq, &err) == CBN_OK);
        const cbn_node_id id = add(g, CBN_NODE_CALL_FUNCTION, "f", &seq, 1);
        const cbn_tensor_meta t = {.ndim = 4, .kind = 'f'};
        CHECK(cbn_graph_set_tensor(g, id, &t, &err) == CBN_OK);
        CHECK(cbn_graph_erase(g, id, &err) == CBN_OK);
        cbn_graph_flush(g);
        const size_t now = cbn_graph_bytes(g) - cbn_strings_bytes(&g->strings);
        if (i == 10) bytes = now;
        if (i > 10) CHECK_MSG(now == bytes, "%zu bytes, then %zu", bytes, now);
    }
    cbn_graph_release(g);
    CHECK(refs == 0);
}

/* ---- speed ------------------------------------------------------------------------------------------------------- */
CHECK_BENCH(graph) {
    enum { N = 200000 };
    cbn_graph *g = new_graph();
    const cbn_str relu = intern(g, "relu");
    cbn_node_id id = add(g, CBN_NODE_PLACEHOLDER, "x", NULL, 0);
    double t = check_seconds();
    for (int i = 0; i < N; i++) {
        const cbn_value v[2] = {cbn_value_node(id), cbn_value_int(i)};
        const cbn_node_spec spec = {.op = CBN_NODE_CALL_FUNCTION,
                                    .target = cbn_value_host(&callee),
                                    .args = v,
                                    .nargs = 2,
                                    .name = relu};
        refs++;
        if (!CHECK(cbn_graph_create(g, &spec, &id, &err) == CBN_OK)) return;
    }
    check_report("create", "ns/node", (check_seconds() - t) * 1e9 / N);
    check_report("memory", "byte/node", (double)cbn_graph_bytes(g) / N);
    t = check_seconds();
    CHECK(cbn_graph_verify(g, &err) == CBN_OK);
    check_report("verify", "ns/node", (check_seconds() - t) * 1e9 / N);
    t = check_seconds();
    cbn_graph_snapshot *s;
    CHECK(cbn_graph_snapshot_take(g, &s, &err) == CBN_OK);
    check_report("snapshot", "ns/node", (check_seconds() - t) * 1e9 / N);
    uint32_t removed;
    t = check_seconds();
    CHECK(cbn_graph_dce(g, NULL, NULL, &removed, &err) == CBN_OK && removed == N);
    check_report("dce", "ns/node", (check_seconds() - t) * 1e9 / N);
    cbn_graph_snapshot_restore(g, s);
    cbn_graph_flush(g);
    t = check_seconds();
    for (int i = 0; i < N; i++) {
        if (!CHECK(cbn_graph_erase(g, cbn_graph_prev(g, 0), &err) == CBN_OK)) return;
        cbn_graph_flush(g);
    }
    check_report("erase", "ns/node", (check_seconds() - t) * 1e9 / N);
    cbn_graph_release(g);
}
