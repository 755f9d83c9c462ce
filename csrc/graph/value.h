/* SPDX-License-Identifier: BSD-3-Clause */
/* What an argument of a node can be: a tagged union of 16 bytes, nested through immutable reference-counted sequences. */
#ifndef CBN_VALUE_H
#define CBN_VALUE_H
#include "base/cbn_status.h"

typedef uint32_t cbn_node_id; /* 0 = the root, or no node */
typedef uint32_t cbn_str;     /* interned string of a graph */
#define CBN_STR_NONE UINT32_MAX
enum { CBN_VALUE_MAX_DEPTH = 200 }; /* deeper nesting is refused (CBN_BAD_VALUE): recursion over values is bounded */

/* ---- host objects ------------------------------------------------------------------------------------------------ */
typedef void *cbn_host;

typedef enum {
    CBN_MODULE_OTHER,
    CBN_MODULE_LINEAR,
    CBN_MODULE_CONV,
    CBN_MODULE_CONV_TRANSPOSE,
    CBN_MODULE_BATCH_NORM,
    CBN_MODULE_FROZEN /* a prepared layer: its call gives a new array and writes nothing */
} cbn_module_kind;

/* One array: memory range for aliasing, shape, dtype. */
typedef struct cbn_array_info {
    const char *lo, *hi; /* first byte, one past the last byte; lo == hi: empty */
    int ndim;
    char kind; /* NumPy's dtype.kind */
    uint8_t itemsize;
    bool finite; /* not computed here: set by who needs it */
    int64_t shape[CBN_MAX_DIMS];
} cbn_array_info;

/* What a pass may know of a module. Handles are borrowed from the module. */
typedef struct cbn_module_info {
    cbn_module_kind kind;
    int nd;         /* spatial axes; 0 linear; -1 not known (BatchNorm base class) */
    bool training;
    bool hooked;    /* forward hooks, or a forward / __call__ that is not the class's own: more than the operator */
    bool pure;      /* a known class (layer, activation, pooling; ours or torch's, not in place) without hooks: a call writes
                       nothing but, in training, a BatchNorm's statistics; of kind OTHER its result may be a view of its input */
    bool frozen_bn; /* BatchNorm: eval mode (not training) and statistics present */
    int64_t channels; /* BatchNorm: num_features; conv and linear: out channels */
    int64_t groups;
    double eps;
    cbn_host weight, bias, mean, var; /* NULL: None */
} cbn_module_info;

/* What the binding fills in. Functions that return cbn_status may run host code; on failure they return CBN_HOST_ERROR
 * and the host keeps the exception itself. */
typedef struct cbn_host_vtable {
    void (*retain)(cbn_host h);
    void (*release)(cbn_host h); /* may run host code */
    /* Equal literals: same type and equal value (==); identity is tested before the call. */
    cbn_status (*equal)(cbn_host a, cbn_host b, bool *out, cbn_error *err);
    /* A short text for messages and printing, cut to size, never failing. */
    void (*describe)(cbn_host h, char *buf, size_t size);
    /* Is this handle an array, and which memory does it have? *is_array false for everything else. */
    cbn_status (*array)(cbn_host h, cbn_array_info *out, bool *is_array, cbn_error *err);
    /* The object a dotted target names from `root` (a module): borrowed from its owner. *out NULL: not there. */
    cbn_status (*resolve)(cbn_host root, const char *target, cbn_host *out, cbn_error *err);
    /* What kind of module. Everything unknown is CBN_MODULE_OTHER. */
    cbn_status (*module)(cbn_host h, cbn_module_info *out, cbn_error *err);
    /* Calls fn for each array a module holds (parameters and buffers, submodules included). */
    cbn_status (*module_arrays)(cbn_host h, cbn_status (*fn)(cbn_host array, void *arg), void *arg, cbn_error *err);
    /* Calls fn for each BatchNorm inside a module, with its path below it. NULL: nobody looks. */
    cbn_status (*batch_norms)(cbn_host h, cbn_status (*fn)(cbn_host bn, const char *path, void *arg), void *arg,
                              cbn_error *err);
    /* Is it a number, a text, None or a tuple of such, which holds no array for sure? NULL: nobody can say. */
    bool (*plain)(cbn_host h);
} cbn_host_vtable;

/* ---- values ------------------------------------------------------------------------------------------------------ */
typedef enum {
    CBN_V_NONE,
    CBN_V_BOOL,
    CBN_V_INT,   /* int64; larger host integers are HOST */
    CBN_V_FLOAT, /* compared by bit pattern */
    CBN_V_STR,
    CBN_V_NODE,
    CBN_V_HOST,
    CBN_V_TUPLE, /* seq; cls: NULL, or a namedtuple class */
    CBN_V_LIST,
    CBN_V_DICT, /* seq: key, value, key, value ...; keys hold no nodes */
    CBN_V_SLICE /* seq of 3 */
} cbn_value_tag;

struct cbn_seq;
typedef struct cbn_value {
    uint8_t tag;     /* cbn_value_tag */
    bool has_nodes;  /* for the seq tags: a node is somewhere inside; true for NODE */
    uint8_t depth;   /* 0 for leaves, 1 + the deepest item for the seq tags */
    union {
        bool b;
        int64_t i;
        double f;
        cbn_str str;
        cbn_node_id node;
        cbn_host host;
        struct cbn_seq *seq;
    } u;
} cbn_value;

typedef struct cbn_seq {
    uint32_t refs, count;
    cbn_host cls;
    cbn_value v[];
} cbn_seq;

struct cbn_graph;

CBN_INLINE cbn_value cbn_value_none(void) { return (cbn_value){.tag = CBN_V_NONE}; }
CBN_INLINE cbn_value cbn_value_bool(bool b) { return (cbn_value){.tag = CBN_V_BOOL, .u.b = b}; }
CBN_INLINE cbn_value cbn_value_int(int64_t i) { return (cbn_value){.tag = CBN_V_INT, .u.i = i}; }
CBN_INLINE cbn_value cbn_value_float(double f) { return (cbn_value){.tag = CBN_V_FLOAT, .u.f = f}; }
CBN_INLINE cbn_value cbn_value_str(cbn_str s) { return (cbn_value){.tag = CBN_V_STR, .u.str = s}; }
CBN_INLINE cbn_value cbn_value_node(cbn_node_id id) {
    return (cbn_value){.tag = CBN_V_NODE, .has_nodes = true, .u.node = id};
}
/* The value owns one reference to the handle: retain it first, or hand yours over. */
CBN_INLINE cbn_value cbn_value_host(cbn_host h) { return (cbn_value){.tag = CBN_V_HOST, .u.host = h}; }
CBN_INLINE bool cbn_value_is_seq(const cbn_value *v) { return v->tag >= CBN_V_TUPLE; }

/* A TUPLE, LIST, DICT or SLICE of `count` items (moved on success). cls: NULL or a class handle (one reference moved).
 * CBN_BAD_VALUE beyond CBN_VALUE_MAX_DEPTH. Memory belongs to g. */
CBN_NODISCARD cbn_status cbn_value_seq(struct cbn_graph *g, cbn_value_tag tag, const cbn_value *items, uint32_t count,
                                       cbn_host cls, cbn_value *out, cbn_error *err);
/* One more reference to everything it holds: cheap, cannot fail. */
cbn_value cbn_value_retain(struct cbn_graph *g, cbn_value v);
/* Handles are queued for cbn_graph_flush. */
void cbn_value_release(struct cbn_graph *g, cbn_value v);

/* Every node in v, in order, duplicates included; fn returns false to stop. Returns false if stopped. */
bool cbn_value_each_node(const cbn_value *v, bool (*fn)(cbn_node_id id, void *arg), void *arg);
/* A value of graph dst equal to v (of graph src, may be the same graph) with each node replaced by map(id, arg).
 * Strings are interned in dst, handles retained. The result is the caller's. */
CBN_NODISCARD cbn_status cbn_value_map(struct cbn_graph *dst, const struct cbn_graph *src, const cbn_value *v,
                                       cbn_node_id (*map)(cbn_node_id id, void *arg), void *arg, cbn_value *out,
                                       cbn_error *err);
/* Same type and value; floats by bit pattern; nodes by id; host objects by identity, then through vtable->equal (host
 * code may run: lock the graphs). Strings are compared as text, so a and b may come from different graphs. */
CBN_NODISCARD cbn_status cbn_value_equal(const struct cbn_graph *ga, const cbn_value *a, const struct cbn_graph *gb,
                                         const cbn_value *b, bool *out, cbn_error *err);
#endif
