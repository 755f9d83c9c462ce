/* SPDX-License-Identifier: BSD-3-Clause */
/* A naive model of a graph for check_graph_fuzz.c, which alone includes it: no ids, no sharing, no edges, everything written
 * out. Also the fake host, random arguments, and the comparison of model and graph. */
#ifndef GRAPH_MODEL_H
#define GRAPH_MODEL_H
#include "base/cbn_alloc.h"
#include "check.h"
#include "graph/graph_priv.h"

#include <stdio.h>
#include <string.h>

enum { NODES = 48, TOKENS = 40, KEYWORDS = 3, HOSTS = 12, NAMES = 60000, NAME_LEN = 48, SNAPS = 3, ITERS = 3 };

/* ---- fake host --------------------------------------------------------------------------------------------------- */
static struct {
    long refs, visited;
} hosts[HOSTS];
static void reenter(void);

static void host_retain(cbn_host h) { ((long *)h)[0]++; }
static void host_release(cbn_host h) {
    ((long *)h)[0]--;
    reenter();
}
static cbn_status host_equal(cbn_host a, cbn_host b, bool *out, cbn_error *err) {
    (void)err;
    *out = a == b;
    return CBN_OK;
}
static const cbn_host_vtable vtable = {.retain = host_retain, .release = host_release, .equal = host_equal};

/* ---- the model --------------------------------------------------------------------------------------------------- */
typedef enum { T_NONE, T_INT, T_FLOAT, T_STR, T_HOST, T_NODE, T_OPEN, T_CLOSE } token_kind;
typedef struct token {
    uint8_t kind, tag; /* tag of T_OPEN */
    int8_t cls;        /* host of T_OPEN, -1: none */
    int32_t x;         /* number, string, host or model node */
} token;

typedef struct mnode {
    bool alive;
    uint32_t gen;
    cbn_node_id id;
    int op, target_host, meta, type_expr, ndim; /* hosts: -1 none; ndim -2: no tensor */
    char name[NAME_LEN], target[NAME_LEN];
    int nargs, nkw, ntokens, keys[KEYWORDS];
    token tokens[TOKENS];
    int nusers, users[NODES];
} mnode;

typedef struct model {
    mnode n[NODES];
    int order[NODES], count;
    int anchor; /* model node, -1: the end or the start */
    bool after;
} model;

typedef struct msnap {
    cbn_graph_snapshot *real;
    model m;
} msnap;

typedef struct miter {
    cbn_graph_iter real;
    bool on, reversed, done;
    int cursor; /* model node, -1: before the first */
    uint32_t gen;
} miter;

static cbn_graph *g;
static model m;
static msnap snaps[SNAPS];
static miter iters[ITERS];
static char used[NAMES][NAME_LEN];
static int n_used;
static struct {
    char base[NAME_LEN];
    long count;
} bases[200];
static int n_bases;
static int depth;      /* of re-entrance */
static bool in_flush;
static cbn_error err;
static const char *const words[] = {"x",  "x_1",  "x_2",        "x_5",  "len", "conv1.0", "",
                                    "9a", "x__1", "HTTPServer", "a..b", "y_x", "y"};
enum { WORDS = sizeof words / sizeof *words };

static int rnd(int n) { return (int)(check_rand() % (uint64_t)n); }

/* ---- names, as torch.fx makes them, naively ---------------------------------------------------------------------- */
static bool name_used(const char *s) {
    for (int i = n_used; i-- > 0;) {
        if (strcmp(used[i], s) == 0) return true;
    }
    return false;
}

static long *base_count(const char *s) {
    for (int i = 0; i < n_bases; i++) {
        if (strcmp(bases[i].base, s) == 0) return &bases[i].count;
    }
    strcpy(bases[n_bases].base, s);
    bases[n_bases].count = 0;
    return &bases[n_bases++].count;
}

static void model_name(const char *cand, char *out) {
    char c[NAME_LEN] = "", base[NAME_LEN];
    size_t n = 0;
    if (!*cand) cand = "_unnamed";
    if (*cand >= '0' && *cand <= '9') c[n++] = '_';
    for (const char *p = cand; *p; p++) {
        if (*p != '.') c[n++] = *p;
        else if (p == cand || p[-1] != '.') c[n++] = '_';
    }
    c[n] = 0;
    size_t digits = 0;
    while (digits < n && c[n - 1 - digits] >= '0' && c[n - 1 - digits] <= '9') digits++;
    const bool numbered = digits && n - digits >= 2 && c[n - digits - 1] == '_';
    strcpy(base, c);
    long num = 0;
    if (numbered) {
        base[n - digits - 1] = 0;
        sscanf(c + n - digits, "%ld", &num);
    }
    strcpy(out, c);
    if (!numbered || name_used(c)) {
        num = *base_count(base);
        if (strcmp(c, "len") == 0) snprintf(out, NAME_LEN, "%.12s_%ld", base, ++num);
    }
    while (name_used(out)) snprintf(out, NAME_LEN, "%.12s_%ld", base, ++num);
    strcpy(used[n_used++], out);
    *base_count(base) = num;
}

/* What a target becomes before it is made unique. */
static void model_snake(const char *target, char *out) {
    size_t n = 0;
    for (const char *p = target; *p; p++) {
        const bool upper = *p >= 'A' && *p <= 'Z';
        if (upper && p > target && p[-1] >= 'a' && p[-1] <= 'z') out[n++] = '_';
        out[n++] = (char)(upper ? *p + 32 : *p);
    }
    out[n] = 0;
}

/* ---- model operations -------------------------------------------------------------------------------------------- */
static int place_of_node(int k) {
    for (int i = 0; i < m.count; i++) {
        if (m.order[i] == k) return i;
    }
    return -1;
}

static void model_unuse(int user) {
    for (int k = 0; k < NODES; k++) {
        mnode *p = &m.n[k];
        if (!p->alive) continue;
        int w = 0;
        for (int i = 0; i < p->nusers; i++) {
            if (p->users[i] != user) p->users[w++] = p->users[i];
        }
        p->nusers = w;
    }
}

static void model_use(int user) {
    for (int i = 0; i < m.n[user].ntokens; i++) {
        if (m.n[user].tokens[i].kind != T_NODE) continue;
        mnode *p = &m.n[m.n[user].tokens[i].x];
        bool there = false;
        for (int u = 0; u < p->nusers; u++) there |= p->users[u] == user;
        if (!there) p->users[p->nusers++] = user;
    }
}

static void model_insert(int k, int at) {
    memmove(&m.order[at + 1], &m.order[at], (size_t)(m.count - at) * sizeof m.order[0]);
    m.order[at] = k;
    m.count++;
}

static void model_remove(int k) {
    const int at = place_of_node(k);
    memmove(&m.order[at], &m.order[at + 1], (size_t)(m.count - at - 1) * sizeof m.order[0]);
    m.count--;
}

static int neighbour(int k, int step) {
    const int at = k < 0 ? (step > 0 ? 0 : m.count - 1) : place_of_node(k) + step;
    return at < 0 || at >= m.count ? -1 : m.order[at];
}

static void model_erase(int k) {
    for (int i = 0; i < ITERS; i++) {
        if (iters[i].on && iters[i].cursor == k) {
            iters[i].cursor = neighbour(k, iters[i].reversed ? 1 : -1);
            iters[i].gen = iters[i].cursor < 0 ? 0 : m.n[iters[i].cursor].gen;
        }
    }
    if (m.anchor == k) m.anchor = neighbour(k, m.after ? -1 : 1);
    model_unuse(k);
    model_remove(k);
    m.n[k].alive = false;
}

static bool model_legal(void) {
    int output = -1;
    for (int i = 0; i < m.count; i++) {
        const mnode *n = &m.n[m.order[i]];
        for (int t = 0; t < n->ntokens; t++) {
            if (n->tokens[t].kind == T_NODE && place_of_node(n->tokens[t].x) >= i) return false;
        }
        if (output >= 0 && (n->nusers || n->op == CBN_NODE_OUTPUT)) return false;
        if (n->op == CBN_NODE_OUTPUT) {
            output = i;
            if (n->nusers) return false;
        }
        if ((n->op == CBN_NODE_CALL_FUNCTION) != (n->target_host >= 0)) return false;
    }
    return true;
}

/* ---- random arguments -------------------------------------------------------------------------------------------- */
static int some_node(bool before_anchor) {
    if (!m.count) return -1;
    int limit = m.count;
    if (before_anchor && m.anchor >= 0) limit = place_of_node(m.anchor) + (m.after ? 1 : 0);
    else if (before_anchor && m.after) limit = 0;
    return limit ? m.order[rnd(limit)] : -1;
}

static void random_value(mnode *n, int level, bool early) {
    token *t = &n->tokens[n->ntokens++];
    *t = (token){.cls = -1};
    const int what = rnd(n->ntokens > TOKENS - 14 ? 6 : 10);
    if (what < 3) {
        const int k = some_node(early);
        if (k >= 0) *t = (token){.kind = T_NODE, .cls = -1, .x = k};
    } else if (what == 3) {
        *t = (token){.kind = T_INT, .cls = -1, .x = rnd(3)};
    } else if (what == 4) {
        *t = (token){.kind = T_HOST, .cls = -1, .x = rnd(HOSTS)};
    } else if (what == 5) {
        *t = (token){.kind = T_STR, .cls = -1, .x = rnd(WORDS)};
    } else if (what == 6 || level > 2) {
        *t = (token){.kind = T_FLOAT, .cls = -1, .x = rnd(3)};
    } else {
        const bool slice = what == 7, named = what == 8 && rnd(2);
        *t = (token){.kind = T_OPEN, .tag = slice ? CBN_V_SLICE : what == 8 ? CBN_V_TUPLE : CBN_V_LIST};
        t->cls = named ? (int8_t)rnd(HOSTS) : -1;
        const int items = slice ? 3 : rnd(4);
        for (int i = 0; i < items; i++) random_value(n, level + 1 + (n->ntokens > TOKENS / 2 ? 9 : 0), early);
        n->tokens[n->ntokens++] = (token){.kind = T_CLOSE, .cls = -1};
    }
}

static void random_args(mnode *n, bool early) {
    n->ntokens = 0;
    n->nargs = rnd(4);
    n->nkw = rnd(4) ? 0 : rnd(3);
    for (int i = 0; i < n->nargs + n->nkw; i++) random_value(n, 0, early);
    for (int i = 0; i < n->nkw; i++) n->keys[i] = i + rnd(5);
}

static bool build(const token **p, cbn_value *out) {
    const token t = *(*p)++;
    switch ((token_kind)t.kind) {
    case T_NONE: *out = cbn_value_none(); return true;
    case T_INT: *out = cbn_value_int(t.x); return true;
    case T_FLOAT: *out = cbn_value_float(t.x / 2.0); return true;
    case T_NODE: *out = cbn_value_node(m.n[t.x].id); return true;
    case T_HOST:
        host_retain(&hosts[t.x]);
        *out = cbn_value_host(&hosts[t.x]);
        return true;
    case T_STR:
        *out = cbn_value_str(0);
        return cbn_graph_intern(g, words[t.x], strlen(words[t.x]), &out->u.str, &err) == CBN_OK;
    case T_CLOSE:
    case T_OPEN: break;
    }
    cbn_value items[4];
    uint32_t n = 0;
    bool ok = true;
    while (ok && (*p)->kind != T_CLOSE) {
        ok = build(p, &items[n]);
        n += ok;
    }
    if (ok) {
        (*p)++;
        const cbn_host cls = t.cls >= 0 ? &hosts[t.cls] : NULL;
        if (cls) host_retain(cls);
        ok = cbn_value_seq(g, (cbn_value_tag)t.tag, items, n, cls, out, &err) == CBN_OK;
        if (!ok && cls) cbn_value_release(g, cbn_value_host(cls));
    }
    for (uint32_t i = 0; !ok && i < n; i++) cbn_value_release(g, items[i]);
    return ok;
}

/* All arguments of a model node as values: positions, then pairs. Number of values, -1 when memory ran out. */
static int build_all(const mnode *n, cbn_value *v) {
    const token *p = n->tokens;
    int count = 0;
    bool ok = true;
    for (int i = 0; ok && i < n->nargs; i++) {
        ok = build(&p, &v[count]);
        count += ok;
    }
    for (int k = 0; ok && k < n->nkw; k++) {
        char key[8];
        snprintf(key, sizeof key, "k%d", n->keys[k]);
        v[count] = cbn_value_str(0);
        ok = cbn_graph_intern(g, key, strlen(key), &v[count].u.str, &err) == CBN_OK;
        if (ok) ok = build(&p, &v[count + 1]);
        if (ok) count += 2;
    }
    for (int i = 0; !ok && i < count; i++) cbn_value_release(g, v[i]);
    return ok ? count : -1;
}

static bool same(const cbn_value *v, const token **p) {
    const token t = *(*p)++;
    switch ((token_kind)t.kind) {
    case T_NONE: return v->tag == CBN_V_NONE;
    case T_INT: return v->tag == CBN_V_INT && v->u.i == t.x;
    case T_FLOAT: return v->tag == CBN_V_FLOAT && v->u.f == t.x / 2.0;
    case T_NODE: return v->tag == CBN_V_NODE && v->u.node == m.n[t.x].id;
    case T_HOST: return v->tag == CBN_V_HOST && v->u.host == &hosts[t.x];
    case T_STR: return v->tag == CBN_V_STR && strcmp(cbn_graph_str(g, v->u.str, NULL), words[t.x]) == 0;
    case T_CLOSE: return false;
    case T_OPEN: break;
    }
    if (v->tag != t.tag || v->u.seq->cls != (t.cls >= 0 ? (void *)&hosts[t.cls] : NULL)) return false;
    for (uint32_t i = 0; i < v->u.seq->count; i++) {
        if (!same(&v->u.seq->v[i], p)) return false;
    }
    return (*p)++->kind == T_CLOSE;
}

/* ---- comparing --------------------------------------------------------------------------------------------------- */
static int count_visit(cbn_host h, void *arg) {
    ((long *)h)[1]++;
    (void)arg;
    return 0;
}

static void compare_node(const mnode *n, cbn_node_id prev) {
    const cbn_node *r = cbn_graph_node(g, n->id);
    CHECK(cbn_graph_alive(g, n->id, n->gen));
    CHECK_MSG(r->op == n->op && r->prev == prev, "%s: op or place", n->name);
    CHECK_MSG(strcmp(cbn_graph_str(g, r->name, NULL), n->name) == 0, "name %s is %s", n->name,
              cbn_graph_str(g, r->name, NULL));
    if (n->target_host >= 0) CHECK(r->target.tag == CBN_V_HOST && r->target.u.host == &hosts[n->target_host]);
    else CHECK(r->target.tag == CBN_V_STR && strcmp(cbn_graph_str(g, r->target.u.str, NULL), n->target) == 0);
    CHECK(r->meta == (n->meta >= 0 ? (void *)&hosts[n->meta] : NULL));
    CHECK(r->type_expr == (n->type_expr >= 0 ? (void *)&hosts[n->type_expr] : NULL));
    CHECK(r->tensor ? r->tensor->ndim == n->ndim : n->ndim == -2);
    if (!CHECK(r->args->nargs == (uint32_t)n->nargs && r->args->nkw == (uint32_t)n->nkw)) return;
    const token *p = n->tokens;
    for (int i = 0; i < n->nargs; i++) CHECK_MSG(same(&r->args->v[i], &p), "%s: argument %d", n->name, i);
    for (int k = 0; k < n->nkw; k++) {
        CHECK(cbn_graph_str(g, cbn_args_key(r->args, (uint32_t)k), NULL)[1] - '0' == n->keys[k]);
        CHECK_MSG(same(cbn_args_kw(r->args, (uint32_t)k), &p), "%s: keyword %d", n->name, k);
    }
    if (!CHECK_MSG(r->n_users == (uint32_t)n->nusers, "%s: %u users, not %d", n->name, r->n_users, n->nusers)) return;
    uint32_t e = r->first_user;
    for (int i = 0; i < n->nusers; i++, e = cbn_graph_edge(g, e)->next_user)
        CHECK_MSG(cbn_graph_edge(g, e)->user == m.n[n->users[i]].id, "%s: user %d", n->name, i);
}

static void compare(void) {
    CHECK(cbn_graph_count(g) == (uint32_t)m.count);
    cbn_node_id prev = 0;
    for (int i = 0; i < m.count; i++) {
        compare_node(&m.n[m.order[i]], prev);
        prev = m.n[m.order[i]].id;
    }
    CHECK(cbn_graph_prev(g, 0) == prev);
    const int first = m.after ? neighbour(m.anchor, 1) : m.anchor;
    CHECK(cbn_graph_insert_point(g) == (first < 0 ? 0 : m.n[first].id));
    /* Every reference the graph took is shown to a garbage collector, once. */
    for (int i = 0; i < HOSTS; i++) hosts[i].visited = 0;
    CHECK(cbn_graph_visit_hosts(g, count_visit, NULL) == 0);
    for (int i = 0; i < HOSTS; i++)
        CHECK_MSG(hosts[i].refs == hosts[i].visited, "host %d: %ld references, %ld shown", i, hosts[i].refs,
                  hosts[i].visited);
}

/* verify says what the model says. An armed fault may hit it, which changes nothing. */
static void compare_verdict(void) {
    cbn_status st = cbn_graph_verify(g, &err);
    if (st == CBN_NO_MEMORY) st = cbn_graph_verify(g, &err);
    CHECK_MSG(st == (model_legal() ? CBN_OK : CBN_BAD_STATE), "verify: %d, %s", st, st ? err.message : "");
}
#endif
