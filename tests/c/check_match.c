/* SPDX-License-Identifier: BSD-3-Clause */
/* Matching and rewriting: every allocation failure is clean and taken back, random rounds leave a legal graph. What a
 * match is, is tested from Python against a matcher that tries everything (tests/graph). */
#include "base/cbn_alloc.h"
#include "check.h"
#include "graph/graph_rewrite.h"

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
    (void)err;
    *out = a == b;
    return CBN_OK;
}
static const cbn_host_vtable vtable = {.retain = host_retain, .release = host_release, .equal = host_equal};
static cbn_error err;
static int literal = 1;

static cbn_graph *new_graph(void) {
    cbn_graph *g = NULL;
    CHECK(cbn_graph_new(&vtable, NULL, &g, &err) == CBN_OK);
    return g;
}

static cbn_node_id add(cbn_graph *g, cbn_node_op op, const char *target, const cbn_value *args, uint32_t n) {
    cbn_node_spec spec = {.op = op, .args = args, .nargs = n, .name = CBN_STR_NONE, .target = cbn_value_str(0)};
    cbn_node_id id = 0;
    CHECK(cbn_graph_intern(g, target, strlen(target), &spec.target.u.str, &err) == CBN_OK);
    CHECK_MSG(cbn_graph_create(g, &spec, &id, &err) == CBN_OK, "%s", err.message);
    return id;
}
static cbn_node_id input(cbn_graph *g, const char *name) { return add(g, CBN_NODE_PLACEHOLDER, name, NULL, 0); }
static cbn_node_id call(cbn_graph *g, const char *method, cbn_node_id a, cbn_node_id b) {
    const cbn_value v[2] = {cbn_value_node(a), cbn_value_node(b)};
    return add(g, CBN_NODE_CALL_METHOD, method, v, b ? 2 : 1);
}
static cbn_value list(cbn_graph *g, const cbn_value *items, uint32_t n) {
    cbn_value v;
    CHECK(cbn_value_seq(g, CBN_V_LIST, items, n, NULL, &v, &err) == CBN_OK);
    return v;
}
static void output(cbn_graph *g, const cbn_node_id *ids, uint32_t n) {
    cbn_value items[64];
    for (uint32_t i = 0; i < n; i++) items[i] = cbn_value_node(ids[i]);
    const cbn_value v = n == 1 ? items[0] : list(g, items, n);
    add(g, CBN_NODE_OUTPUT, "output", &v, 1);
}

/* The graph as text, to see whether anything changed. */
static size_t put(char *to, size_t at, size_t size, const char *text) {
    const int n = snprintf(to + at, at < size ? size - at : 0, "%s ", text);
    return at + (size_t)n;
}
static size_t put_value(const cbn_graph *g, const cbn_value *v, char *to, size_t at, size_t size) {
    char text[32];
    if (v->tag == CBN_V_NODE) return put(to, at, size, cbn_graph_str(g, cbn_graph_node(g, v->u.node)->name, NULL));
    snprintf(text, sizeof text, "%d:%lld", v->tag, v->tag == CBN_V_INT ? (long long)v->u.i : 0LL);
    at = put(to, at, size, text);
    for (uint32_t i = 0; cbn_value_is_seq(v) && i < v->u.seq->count; i++)
        at = put_value(g, &v->u.seq->v[i], to, at, size);
    return at;
}
static void describe(const cbn_graph *g, char *to, size_t size) {
    size_t at = 0;
    to[0] = '\0';
    for (cbn_node_id id = cbn_graph_first(g); id != 0; id = cbn_graph_next(g, id)) {
        const cbn_node *node = cbn_graph_node(g, id);
        at = put(to, at, size, cbn_graph_str(g, node->name, NULL));
        at = put_value(g, &node->target, to, at, size);
        for (uint32_t i = 0; i < node->args->nargs; i++) at = put_value(g, &node->args->v[i], to, at, size);
        for (uint32_t e = node->first_user; e != 0; e = cbn_graph_edge(g, e)->next_user)
            at = put(to, at, size, cbn_graph_str(g, cbn_graph_node(g, cbn_graph_edge(g, e)->user)->name, NULL));
        at = put(to, at, size, ";");
    }
    CHECK_MSG(at < size, "the text needs %zu bytes", at);
}

/* One whole round as the binding does it: all or nothing. */
static cbn_status round_of(cbn_graph *g, cbn_graph *pattern, const cbn_graph *replacement, uint32_t *replaced) {
    const cbn_match_options opt = {0};
    cbn_pattern *p = NULL;
    cbn_match_list matches = {.graph = g};
    cbn_rewrite *rw = NULL;
    cbn_rewrite_result added = {0};
    cbn_graph_snapshot *snapshot = NULL;
    *replaced = 0;
    cbn_status status = cbn_pattern_new(pattern, &opt, &p, &err);
    if (status == CBN_OK) status = cbn_graph_match(g, p, &matches, &err);
    if (status == CBN_OK) status = cbn_rewrite_begin(g, p, NULL, &rw, &err);
    if (status == CBN_OK) status = cbn_graph_snapshot_take(g, &snapshot, &err);
    for (uint32_t i = 0; status == CBN_OK && i < matches.count; i++) {
        cbn_value *row = matches.values + (size_t)i * matches.width;
        status = cbn_rewrite_update(rw, row, &err);
        if (status == CBN_OK) status = cbn_rewrite_apply(rw, row, replacement, &added, &err);
        for (uint32_t k = 0; k < added.count; k++) {
            if (added.metas[k] != NULL) host_release(added.metas[k]);
            added.metas[k] = NULL;
        }
        *replaced += status == CBN_OK;
    }
    if (snapshot != NULL && status != CBN_OK) cbn_graph_snapshot_restore(g, snapshot);
    else cbn_graph_snapshot_drop(g, snapshot);
    cbn_rewrite_result_free(g, &added);
    cbn_rewrite_end(rw);
    matches.graph = g;
    cbn_match_list_free(&matches);
    cbn_pattern_free(p);
    cbn_graph_flush(g);
    return status;
}

/* neg(x), abs(y) by two results of one node; the inputs of the second may come after users of the first. */
static void two_results(cbn_graph *pattern, cbn_graph *replacement) {
    cbn_node_id x = input(pattern, "x"), y = input(pattern, "y");
    const cbn_node_id from[2] = {call(pattern, "neg", x, 0), call(pattern, "abs", y, 0)};
    output(pattern, from, 2);
    x = input(replacement, "x"), y = input(replacement, "y");
    const cbn_node_id both = call(replacement, "both", x, y);
    const cbn_node_id to[2] = {call(replacement, "first", both, 0), call(replacement, "second", both, 0)};
    output(replacement, to, 2);
}

static cbn_graph *sample(void) {
    cbn_graph *g = new_graph();
    const cbn_node_id a = input(g, "a");
    cbn_node_id ends[8];
    for (uint32_t i = 0; i < 8; i += 2) {
        const cbn_node_id n = call(g, "neg", i ? ends[i - 1] : a, 0);
        ends[i] = call(g, "user", n, 0); /* stands before the second input of the replacement */
        const cbn_value host = cbn_value_host(&literal);
        refs++;
        const cbn_value items[3] = {cbn_value_node(a), host, cbn_value_node(i ? ends[i - 1] : a)};
        const cbn_value v = list(g, items, 3);
        const cbn_node_id late = add(g, CBN_NODE_CALL_METHOD, "late", &v, 1);
        ends[i + 1] = call(g, "abs", late, 0);
        cbn_graph_set_meta(g, n, &literal);
    }
    output(g, ends, 8);
    return g;
}

CHECK_TEST(match_every_failing_allocation) {
    static char before[16384], after[16384];
    const size_t blocks = check_live_blocks();
    const long held = refs;
    int failures = 0;
    for (int64_t n = 0; n < 10000; n++) {
        cbn_graph *g = sample(), *pattern = new_graph(), *replacement = new_graph();
        two_results(pattern, replacement);
        describe(g, before, sizeof before);
        uint32_t replaced;
        cbn_alloc_fail_after(n);
        const cbn_status status = round_of(g, pattern, replacement, &replaced);
        cbn_alloc_fail_after(-1);
        describe(g, after, sizeof after);
        CHECK_MSG(cbn_graph_verify(g, &err) == CBN_OK, "after %lld: %s", (long long)n, err.message);
        if (status != CBN_OK) {
            failures++;
            CHECK_MSG(status == CBN_NO_MEMORY, "after %lld: %s", (long long)n, err.message);
            CHECK_MSG(strcmp(before, after) == 0, "after %lld:\n%s\n%s", (long long)n, before, after);
        } else {
            CHECK_MSG(replaced == 4, "%u", replaced);
            CHECK(strstr(after, "first_3") != NULL && strstr(after, "neg") == NULL);
        }
        cbn_graph_release(replacement);
        cbn_graph_release(pattern);
        cbn_graph_release(g);
        const size_t now = check_live_blocks();
        if (!CHECK_MSG(now == blocks, "after %lld: %zu blocks, not %zu", (long long)n, now, blocks)) return;
        if (!CHECK_MSG(refs == held, "after %lld: %ld references, not %ld", (long long)n, refs, held)) return;
        if (status == CBN_OK) break;
    }
    CHECK_MSG(failures > 20, "%d", failures);
}

static cbn_graph *random_graph(int n) {
    static const char *const methods[] = {"neg", "abs", "add", "cat"};
    cbn_graph *g = new_graph();
    cbn_node_id ids[64];
    int count = 0;
    ids[count++] = input(g, "a");
    ids[count++] = input(g, "b");
    while (count < n + 2) {
        const cbn_node_id a = ids[check_range(CBN_MAX(0, count - 5), count - 1)];
        const cbn_node_id b = ids[check_range(CBN_MAX(0, count - 5), count - 1)];
        const char *method = methods[check_range(0, 3)];
        if (method[0] == 'c') {
            const cbn_value items[3] = {cbn_value_node(a), cbn_value_int(check_range(0, 1)), cbn_value_node(b)};
            const cbn_value v = list(g, items, 3);
            ids[count++] = add(g, CBN_NODE_CALL_METHOD, method, &v, 1);
        } else {
            ids[count++] = call(g, method, a, strcmp(method, "add") == 0 ? b : 0);
        }
    }
    cbn_node_id ends[64];
    uint32_t nends = 0;
    for (int i = 2; i < count; i++)
        if (cbn_graph_node(g, ids[i])->n_users == 0) ends[nends++] = ids[i];
    output(g, ends, nends);
    return g;
}

/* A pattern of one to three results, and a replacement with as many, some of them inputs that come back. */
static void random_pattern(cbn_graph *pattern, cbn_graph *replacement) {
    static const char *const methods[] = {"neg", "abs"};
    const cbn_node_id px[2] = {input(pattern, "x"), input(pattern, "y")};
    const cbn_node_id rx[2] = {input(replacement, "x"), input(replacement, "y")};
    cbn_node_id from[3], to[3];
    const uint32_t n = (uint32_t)check_range(1, 3);
    const cbn_node_id shared = call(replacement, "shared", rx[0], check_range(0, 1) ? rx[1] : 0);
    for (uint32_t i = 0; i < n; i++) {
        from[i] = call(pattern, methods[check_range(0, 1)], i == 0 ? px[0] : px[check_range(0, 1)], 0);
        if (check_range(0, 2) == 0) from[i] = call(pattern, "add", from[i], px[1]);
        to[i] = check_range(0, 3) == 0 ? rx[0] : call(replacement, "result", shared, 0);
    }
    output(pattern, from, n);
    output(replacement, to, n);
}

CHECK_TEST(match_random_rounds) {
    static char before[65536], after[65536];
    const size_t blocks = check_live_blocks();
    enum { MANY = 2000 };
    const int rounds = check_under("valgrind") ? 100 : MANY;
    int replaced_all = 0, cycles = 0;
    for (int r = 0; r < rounds; r++) {
        cbn_graph *g = random_graph((int)check_range(3, 40)), *pattern = new_graph(), *replacement = new_graph();
        random_pattern(pattern, replacement);
        uint32_t replaced = 0;
        for (int i = 0; i < 3; i++) { /* the second round finds what the first brought together */
            describe(g, before, sizeof before);
            if (r % 3 == 0) cbn_alloc_fail_after(check_range(0, 60));
            const cbn_status status = round_of(g, pattern, replacement, &replaced);
            cbn_alloc_fail_after(-1);
            if (!CHECK_MSG(cbn_graph_verify(g, &err) == CBN_OK, "round %d: %s", r, err.message)) return;
            describe(g, after, sizeof after);
            if (status == CBN_OK) {
                replaced_all += (int)replaced;
                CHECK_MSG((replaced == 0) == (strcmp(before, after) == 0), "round %d", r);
            } else {
                cycles += status == CBN_BAD_STATE;
                /* the replacement may use an input that the pattern has no use for */
                const bool expected = status == CBN_NO_MEMORY || status == CBN_BAD_STATE || status == CBN_BAD_VALUE;
                CHECK_MSG(expected, "round %d: %s", r, err.message);
                CHECK_MSG(strcmp(before, after) == 0, "round %d", r);
            }
        }
        cbn_graph_release(replacement);
        cbn_graph_release(pattern);
        cbn_graph_release(g);
    }
    CHECK_MSG(check_live_blocks() == blocks, "%zu blocks, not %zu", check_live_blocks(), blocks);
    /* Cycles are rare: a short run may meet none. */
    CHECK_MSG(replaced_all > rounds / 2 && (cycles > 0 || rounds < MANY), "%d replaced, %d cycles", replaced_all, cycles);
}
