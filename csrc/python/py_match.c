/* SPDX-License-Identifier: BSD-3-Clause */
/* Matching and rewriting as pyconvbn.fx.matcher and pyconvbn.fx.subgraph_rewriter use them. */
#include "python/py_graph.h"
#include "python/py_module.h"

#include <string.h>

#include "base/cbn_alloc.h"
#include "graph/graph_rewrite.h"

/* One call: the graphs, the pattern, the matches, and what Python sees of them. */
typedef struct session {
    PyObject *graph, *pattern_graph; /* borrowed from the caller */
    PyObject *root, *pattern_root;   /* owning modules or None */
    cbn_graph *g;
    cbn_pattern *pattern;
    cbn_match_list matches;
    PyObject **views; /* [n] nodes of the pattern */
} session;

static cbn_status check_signals(void *arg) {
    (void)arg;
    return PyErr_CheckSignals() == 0 ? CBN_OK : CBN_HOST_ERROR;
}

/* Two arrays of one dtype and shape with the same bytes. */
static cbn_status same_array(cbn_host a, cbn_host b, bool *same) {
    *same = false;
    if (!PyArray_Check((PyObject *)a) || !PyArray_Check((PyObject *)b)) return CBN_OK;
    PyArrayObject *x = a, *y = b;
    if (!PyArray_EquivTypes(PyArray_DESCR(x), PyArray_DESCR(y)) || !PyArray_SAMESHAPE(x, y)) return CBN_OK;
    if (PyDataType_REFCHK(PyArray_DESCR(x))) return CBN_OK; /* bytes of objects say nothing */
    PyObject *p = PyArray_ToString(x, NPY_CORDER), *q = p ? PyArray_ToString(y, NPY_CORDER) : NULL;
    if (q != NULL)
        *same = PyBytes_GET_SIZE(p) == PyBytes_GET_SIZE(q) &&
                memcmp(PyBytes_AS_STRING(p), PyBytes_AS_STRING(q), (size_t)PyBytes_GET_SIZE(p)) == 0;
    const cbn_status status = q != NULL ? CBN_OK : CBN_HOST_ERROR;
    Py_XDECREF(p);
    Py_XDECREF(q);
    return status;
}

static void session_end(session *s) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (s->g != NULL) {
        s->matches.graph = s->g;
        cbn_match_list_free(&s->matches);
    }
    for (uint32_t i = 0; s->views != NULL && i < s->pattern->n; i++) Py_XDECREF(s->views[i]);
    cbn_free(s->views);
    cbn_pattern_free(s->pattern);
    Py_XDECREF(s->root);
    Py_XDECREF(s->pattern_root);
    if (s->g != NULL && cbn_graph_needs_flush(s->g)) cbn_py_graph_flush(s->graph);
    PyErr_Restore(type, value, traceback);
}

/* flags: match_output, match_placeholder, remove_overlapping_matches, ignore_literals. graph NULL: the pattern only. */
static bool session_begin(session *s, PyObject *graph, PyObject *pattern, PyObject *const *flags) {
    static const char *const names[] = {"match_output", "match_placeholder", "remove_overlapping_matches",
                                        "ignore_literals"};
    bool on[4];
    cbn_error err = {0};
    *s = (session){.graph = graph, .pattern_graph = pattern};
    cbn_graph *p = cbn_py_graph_get(pattern, "pattern");
    if (p == NULL) return false;
    for (int i = 0; i < 4; i++)
        if (!cbn_py_bool(flags[i], names[i], &on[i])) return false;
    cbn_match_options opt = {.match_output = on[0], .match_placeholder = on[1], .keep_overlaps = !on[2],
                             .ignore_literals = on[3], .poll = check_signals, .same_array = same_array};
    if (graph != NULL) {
        s->g = cbn_py_graph_get(graph, "graph");
        if (s->g == NULL) return false;
        s->root = PyObject_GetAttrString(graph, "owning_module");
        s->pattern_root = s->root ? PyObject_GetAttrString(pattern, "owning_module") : NULL;
        if (s->pattern_root == NULL) return false;
        opt.root = s->root == Py_None ? NULL : s->root;
        opt.pattern_root = s->pattern_root == Py_None ? NULL : s->pattern_root;
    }
    cbn_status status = cbn_pattern_new(p, &opt, &s->pattern, &err);
    if (status == CBN_OK && graph != NULL) status = cbn_graph_match(s->g, s->pattern, &s->matches, &err);
    if (status != CBN_OK) {
        cbn_py_raise(status, &err);
        return false;
    }
    return true;
}

static cbn_value *row_of(const session *s, uint32_t i) { return s->matches.values + (size_t)i * s->matches.width; }

static PyObject *pattern_view(session *s, uint32_t pos) {
    if (s->views == NULL) {
        s->views = cbn_calloc((size_t)s->pattern->n * sizeof *s->views);
        if (s->views == NULL) return PyErr_NoMemory();
    }
    if (s->views[pos] == NULL) s->views[pos] = cbn_py_node_view(s->pattern_graph, s->pattern->ids[pos]);
    return s->views[pos];
}

static PyObject *value_object(const session *s, const cbn_value *v) {
    if (v->tag == CBN_V_UNBOUND) return Py_NewRef(Py_None);
    return v->tag == CBN_V_NODE ? cbn_py_node_view(s->graph, v->u.node) : cbn_py_value_to_object(s->graph, v);
}

/* A list of the pattern's nodes at these positions, or of what they are bound to (row). */
static PyObject *node_list(session *s, const uint32_t *positions, uint32_t count, const cbn_value *row) {
    PyObject *list = PyList_New(count);
    for (uint32_t i = 0; list != NULL && i < count; i++) {
        PyObject *item = row != NULL ? value_object(s, &row[positions[i]]) : Py_XNewRef(pattern_view(s, positions[i]));
        if (item == NULL) Py_CLEAR(list);
        else PyList_SET_ITEM(list, i, item);
    }
    return list;
}

static PyObject *nodes_map(session *s, uint32_t i) {
    const cbn_value *row = row_of(s, i);
    const uint32_t *order = s->matches.order + (size_t)i * s->matches.width;
    PyObject *map = PyDict_New();
    for (uint32_t k = 0; map != NULL && k < s->matches.width && order[k] != CBN_PATTERN_NONE; k++) {
        PyObject *key = pattern_view(s, order[k]), *value = key ? value_object(s, &row[order[k]]) : NULL;
        if (value == NULL || PyDict_SetItem(map, key, value) < 0) Py_CLEAR(map);
        Py_XDECREF(value);
    }
    return map;
}

/* factory(anchors, nodes_map, placeholder_nodes, returning_nodes) */
static PyObject *make_match(session *s, uint32_t i, PyObject *factory) {
    const cbn_pattern *p = s->pattern;
    PyObject *argv[4] = {node_list(s, p->anchors, p->nanchors, NULL), NULL, NULL, NULL}, *match = NULL;
    if (argv[0] != NULL) argv[1] = nodes_map(s, i);
    if (argv[1] != NULL) argv[2] = node_list(s, p->placeholders, p->nplaceholders, row_of(s, i));
    if (argv[2] != NULL) argv[3] = node_list(s, p->returning, p->nreturning, row_of(s, i));
    if (argv[3] != NULL) match = PyObject_Vectorcall(factory, argv, 4, NULL);
    for (int k = 0; k < 4; k++) Py_XDECREF(argv[k]);
    return match;
}

/* _match_pattern(pattern, *flags): ValueError when the pattern cannot be used. */
static PyObject *match_pattern(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("_match_pattern", nargs, 5)) return NULL;
    session s;
    const bool ok = session_begin(&s, NULL, args[0], args + 1);
    session_end(&s);
    return ok ? Py_NewRef(Py_None) : NULL;
}

/* _match_graph(graph, pattern, *flags, factory) -> list */
static PyObject *match_graph(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("_match_graph", nargs, 7)) return NULL;
    session s;
    PyObject *list = NULL;
    if (session_begin(&s, args[0], args[1], args + 2)) {
        list = PyList_New(0);
        cbn_graph_lock(s.g); /* Python runs while ids are held */
        cbn_graph_lock(s.pattern->graph);
        for (uint32_t i = 0; list != NULL && i < s.matches.count; i++) {
            PyObject *match = make_match(&s, i, args[6]);
            if (match == NULL || PyList_Append(list, match) < 0) Py_CLEAR(list);
            Py_XDECREF(match);
        }
        cbn_graph_unlock(s.pattern->graph);
        cbn_graph_unlock(s.g);
    }
    session_end(&s);
    return list;
}

/* ---- rewriting --------------------------------------------------------------------------------------------------- */

typedef struct rewriting {
    session s;
    cbn_rewrite *rw;
    cbn_rewrite_result added;
    PyObject *replacement;       /* Graph or None */
    PyObject *filters, *callback; /* tuple; None or callback(match, graph, pattern) -> Graph */
    PyObject *match_factory, *result_factory;
    bool want_nodes; /* the result factory takes the new nodes too */
} rewriting;

static bool passes_filters(rewriting *r, PyObject *match, bool *pass) {
    *pass = true;
    for (Py_ssize_t i = 0; *pass && i < PyTuple_GET_SIZE(r->filters); i++) {
        PyObject *argv[] = {match, r->s.graph, r->s.pattern_graph};
        PyObject *said = PyObject_Vectorcall(PyTuple_GET_ITEM(r->filters, i), argv, 3, NULL);
        const int truth = said ? PyObject_IsTrue(said) : -1;
        Py_XDECREF(said);
        if (truth < 0) return false;
        *pass = truth;
    }
    return true;
}

/* A match object made before earlier replacements shows what its placeholders are bound to now. */
static bool refresh_match(rewriting *r, uint32_t i, PyObject *match) {
    session *s = &r->s;
    const cbn_value *row = row_of(s, i);
    PyObject *map = PyObject_GetAttrString(match, "nodes_map");
    PyObject *list = map ? PyObject_GetAttrString(match, "placeholder_nodes") : NULL;
    bool ok = list != NULL;
    for (uint32_t k = 0; ok && k < s->pattern->nplaceholders; k++) {
        const uint32_t pos = s->pattern->placeholders[k];
        if (row[pos].tag == CBN_V_UNBOUND) continue;
        PyObject *key = pattern_view(s, pos), *value = key ? value_object(s, &row[pos]) : NULL;
        ok = value != NULL && PyObject_SetItem(map, key, value) == 0 && PySequence_SetItem(list, k, value) == 0;
        Py_XDECREF(value);
    }
    Py_XDECREF(map);
    Py_XDECREF(list);
    return ok;
}

/* `meta` becomes what a new node has: by role, with the replacement's own node on top. Shapes belong to a value, so
 * only a node that takes a returned value's place inherits them; the line of the program stays the model's. */
static bool merge_meta(PyObject *meta, PyObject *role, PyObject *own, bool returned) {
    static const char *const of_value[] = {"tensor_meta", "val", "example_value"};
    if (role != NULL && PyDict_Update(meta, role) < 0) return false;
    for (size_t i = 0; role != NULL && !returned && i < sizeof of_value / sizeof *of_value; i++) {
        if (PyDict_GetItemString(meta, of_value[i]) != NULL && PyDict_DelItemString(meta, of_value[i]) < 0) return false;
    }
    if (own == NULL) return true;
    PyObject *line = PyDict_GetItemString(meta, "stack_trace");
    Py_XINCREF(line);
    const bool ok = PyDict_Update(meta, own) == 0 &&
                    (line == NULL || PyDict_SetItemString(meta, "stack_trace", line) == 0);
    Py_XDECREF(line);
    return ok;
}

static bool give_meta(rewriting *r, const cbn_graph *replacement) {
    cbn_rewrite_result *a = &r->added;
    for (uint32_t k = 0; k < a->count; k++) {
        PyObject *role = a->metas[k], *own = cbn_graph_node(replacement, a->sources[k])->meta;
        if (role != NULL && !PyDict_Check(role)) role = NULL;
        if (own != NULL && !PyDict_Check(own)) own = NULL;
        if (role == NULL && own == NULL) continue;
        Py_XINCREF(own);
        PyObject *meta = PyDict_New();
        const bool ok = meta != NULL && merge_meta(meta, role, own, a->returned[k]);
        Py_XDECREF(own);
        if (ok) cbn_graph_set_meta(r->s.g, a->nodes[k], meta);
        Py_XDECREF(meta);
        if (!ok) return false;
    }
    return true;
}

static PyObject *make_result(rewriting *r, PyObject *map) {
    PyObject *argv[3] = {pattern_view(&r->s, r->s.pattern->anchors[0]), map, NULL};
    if (argv[0] == NULL) return NULL;
    if (r->want_nodes) {
        argv[2] = PyList_New(r->added.count);
        for (uint32_t k = 0; argv[2] != NULL && k < r->added.count; k++) {
            PyObject *node = cbn_py_node_view(r->s.graph, r->added.nodes[k]);
            if (node == NULL) Py_CLEAR(argv[2]);
            else PyList_SET_ITEM(argv[2], k, node);
        }
        if (argv[2] == NULL) return NULL;
    }
    PyObject *result = PyObject_Vectorcall(r->result_factory, argv, r->want_nodes ? 3 : 2, NULL);
    Py_XDECREF(argv[2]);
    return result;
}

static void drop_metas(rewriting *r) {
    for (uint32_t k = 0; k < r->added.count; k++) {
        PyObject *meta = r->added.metas[k];
        r->added.metas[k] = NULL;
        Py_XDECREF(meta);
    }
    r->added.count = 0;
}

/* Replaces match i. `match` is its Python object, or NULL when nobody asked for one. The graph is locked but for the
 * change itself: whatever Python code runs in between can only look. */
static PyObject *replace_one(rewriting *r, uint32_t i, PyObject *match) {
    session *s = &r->s;
    cbn_value *row = row_of(s, i);
    PyObject *source = Py_NewRef(r->replacement), *map = NULL, *result = NULL;
    cbn_error err = {0};
    cbn_status status = cbn_rewrite_update(r->rw, row, &err);
    cbn_graph_lock(s->g);
    if (status == CBN_OK && match != NULL && !refresh_match(r, i, match)) goto done;
    if (status == CBN_OK && r->callback != Py_None) {
        PyObject *argv[] = {match, s->graph, s->pattern_graph};
        Py_SETREF(source, PyObject_Vectorcall(r->callback, argv, 3, NULL));
        if (source == NULL) goto done;
    }
    cbn_graph *replacement = status == CBN_OK ? cbn_py_graph_get(source, "replacement") : NULL;
    if (status == CBN_OK) {
        if (replacement == NULL) goto done;
        map = match != NULL ? PyObject_GetAttrString(match, "nodes_map") : nodes_map(s, i);
        if (map == NULL) goto done;
        cbn_graph_unlock(s->g);
        status = cbn_rewrite_apply(r->rw, row, replacement, &r->added, &err);
        cbn_graph_lock(s->g);
    }
    if (status != CBN_OK) {
        cbn_py_raise(status, &err);
        goto done;
    }
    if (give_meta(r, replacement)) result = make_result(r, map);
    drop_metas(r);
done:
    cbn_graph_unlock(s->g);
    Py_XDECREF(source);
    Py_XDECREF(map);
    return result;
}

/* The match objects of all matches, None for those that a filter turned down; NULL with an exception. */
static PyObject *filtered(rewriting *r) {
    session *s = &r->s;
    PyObject *list = PyList_New(0);
    cbn_graph_lock(s->g);
    for (uint32_t i = 0; list != NULL && i < s->matches.count; i++) {
        PyObject *match = make_match(s, i, r->match_factory);
        if (match == NULL || PyList_Append(list, match) < 0) Py_CLEAR(list);
        Py_XDECREF(match);
    }
    for (uint32_t i = 0; list != NULL && i < s->matches.count; i++) {
        bool pass;
        if (!passes_filters(r, PyList_GET_ITEM(list, i), &pass)) Py_CLEAR(list);
        else if (!pass) PyList_SetItem(list, i, Py_NewRef(Py_None));
    }
    cbn_graph_unlock(s->g);
    return list;
}

static PyObject *replace_all(rewriting *r) {
    session *s = &r->s;
    const bool objects = PyTuple_GET_SIZE(r->filters) > 0 || r->callback != Py_None;
    PyObject *matches = objects ? filtered(r) : NULL, *results = NULL;
    if (objects && matches == NULL) return NULL;
    results = PyList_New(0);
    for (uint32_t i = 0; results != NULL && i < s->matches.count; i++) {
        PyObject *match = objects ? PyList_GET_ITEM(matches, i) : NULL;
        if (match == Py_None) continue;
        PyObject *result = i % 256 == 255 && PyErr_CheckSignals() < 0 ? NULL : replace_one(r, i, match);
        if (result == NULL || PyList_Append(results, result) < 0) Py_CLEAR(results);
        Py_XDECREF(result);
    }
    Py_XDECREF(matches);
    return results;
}

/* _rewrite_graph(graph, pattern, replacement, filters, callback, ignore_literals, match_factory, result_factory,
 * want_nodes, finish) -> list of what the result factory made. finish(results) runs last; whatever fails, the graph
 * is as it was. */
static PyObject *rewrite_graph(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("_rewrite_graph", nargs, 10)) return NULL;
    rewriting r = {.replacement = args[2], .filters = args[3], .callback = args[4], .match_factory = args[6],
                   .result_factory = args[7]};
    PyObject *const flags[] = {Py_False, Py_False, Py_True, args[5]};
    PyObject *results = NULL;
    cbn_graph_snapshot *snapshot = NULL;
    cbn_error err = {0};
    if (!PyTuple_Check(r.filters)) {
        PyErr_SetString(PyExc_TypeError, "filters: expected a tuple");
        return NULL;
    }
    if (!cbn_py_bool(args[8], "want_nodes", &r.want_nodes)) return NULL;
    if (!session_begin(&r.s, args[0], args[1], flags)) goto done;
    if (r.s.matches.count == 0) {
        results = PyList_New(0);
        goto done;
    }
    cbn_status status = cbn_rewrite_begin(r.s.g, r.s.pattern, r.s.pattern->opt.root, &r.rw, &err);
    if (status == CBN_OK) status = cbn_graph_snapshot_take(r.s.g, &snapshot, &err);
    if (status != CBN_OK) {
        cbn_py_raise(status, &err);
        goto done;
    }
    cbn_graph_lock(r.s.pattern->graph);
    results = replace_all(&r);
    cbn_graph_unlock(r.s.pattern->graph);
    if (results != NULL && args[9] != Py_None) {
        PyObject *said = PyObject_CallOneArg(args[9], results);
        if (said == NULL) Py_CLEAR(results);
        Py_XDECREF(said);
    }
    if (results == NULL) cbn_graph_snapshot_restore(r.s.g, snapshot);
    else cbn_graph_snapshot_drop(r.s.g, snapshot);
done:
    drop_metas(&r);
    if (r.s.g != NULL) cbn_rewrite_result_free(r.s.g, &r.added);
    cbn_rewrite_end(r.rw);
    session_end(&r.s);
    return results;
}

PyMethodDef cbn_match_methods[] = {
    {"_match_pattern", (PyCFunction)(void (*)(void))match_pattern, METH_FASTCALL, NULL},
    {"_match_graph", (PyCFunction)(void (*)(void))match_graph, METH_FASTCALL, NULL},
    {"_rewrite_graph", (PyCFunction)(void (*)(void))rewrite_graph, METH_FASTCALL, NULL},
    {0},
};
