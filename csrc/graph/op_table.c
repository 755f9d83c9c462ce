/* SPDX-License-Identifier: BSD-3-Clause */
/* The rows of graph_ops.def in memory, and the two maps into them: by name and by callable. */
#include "graph/op_table.h"

#include <string.h>

#include "base/cbn_alloc.h"
#include "graph/op_schema.h"

enum { NAME_SLOTS = 2048 };
_Static_assert(CBN_OP_COUNT * 2 < NAME_SLOTS && CBN_OP_COUNT < UINT16_MAX, "the name map is at most half full");

typedef struct handle_slot {
    cbn_host callable; /* NULL: free */
    cbn_opcode code;
} handle_slot;

struct cbn_op_table {
    cbn_op rows[CBN_OP_COUNT]; /* row of opcode c: rows[c - 1] */
    cbn_opcode names[NAME_SLOTS];
    char *text; /* the schemas, cut into words */
    handle_slot *handles;
    size_t handle_count, handle_slots; /* slots: 0 or a power of two, at most half full */
};

/* Without the room for parameters, which would be 400 KB of zeros in the library's file. */
static const struct {
    const char *name, *schema, *shape_rule, *doc;
    uint8_t effect, family, nd;
} stock[CBN_OP_COUNT] = {
#define CBN_OP(row, opname, text, kind, fam, axes, rule, words)                                                        \
    {.name = opname, .schema = text, .effect = CBN_EFFECT_##kind, .family = CBN_FAMILY_##fam, .nd = axes,              \
     .shape_rule = rule, .doc = words},
#include "graph/graph_ops.def"
#undef CBN_OP
};

/* FNV-1a, 64 bits: constants from the draft "The FNV Non-Cryptographic Hash Algorithm". */
static uint64_t hash_text(const char *s, size_t len, uint64_t h) {
    for (size_t i = 0; i < len; i++) h = (h ^ (unsigned char)s[i]) * UINT64_C(0x100000001b3);
    return h;
}
#define HASH_START UINT64_C(0xcbf29ce484222325)

/* Finds "<prefix><name>": its opcode, or 0 with *slot the free place. */
static cbn_opcode find_name(const cbn_op_table *t, const char *prefix, size_t nprefix, const char *name, size_t len,
                            size_t *slot) {
    size_t at = hash_text(name, len, hash_text(prefix, nprefix, HASH_START)) % NAME_SLOTS;
    for (; t->names[at] != 0; at = (at + 1) % NAME_SLOTS) {
        const char *have = t->rows[t->names[at] - 1].name;
        if (strncmp(have, prefix, nprefix) == 0 && strncmp(have + nprefix, name, len) == 0 &&
            have[nprefix + len] == '\0') {
            return t->names[at];
        }
    }
    *slot = at;
    return 0;
}

static cbn_status fill(cbn_op_table *t, cbn_error *err) {
    size_t bytes = 0;
    for (int i = 0; i < CBN_OP_COUNT; i++) bytes += strlen(stock[i].schema) + 1;
    t->text = cbn_alloc(bytes);
    if (t->text == NULL) return cbn_fail_memory(err, "op table", bytes);
    char *text = t->text;
    for (int i = 0; i < CBN_OP_COUNT; i++) {
        cbn_op *op = &t->rows[i];
        *op = (cbn_op){.name = stock[i].name,
                       .schema = stock[i].schema,
                       .effect = (cbn_effect)stock[i].effect,
                       .family = (cbn_op_family)stock[i].family,
                       .nd = stock[i].nd,
                       .shape_rule = stock[i].shape_rule,
                       .doc = stock[i].doc};
        CBN_TRY(cbn_op_parse_schema(op, text, err));
        text += strlen(op->schema) + 1;
        size_t slot = 0;
        if (find_name(t, "", 0, op->name, strlen(op->name), &slot) != 0) {
            return cbn_fail(err, CBN_BAD_STATE, "op table: two rows named %s", op->name);
        }
        t->names[slot] = (cbn_opcode)(i + 1);
    }
    return CBN_OK;
}

cbn_status cbn_op_table_new(cbn_op_table **out, cbn_error *err) {
    *out = NULL;
    cbn_op_table *t = cbn_calloc(sizeof *t);
    if (t == NULL) return cbn_fail_memory(err, "op table", sizeof *t);
    const cbn_status status = fill(t, err);
    if (status != CBN_OK) {
        cbn_op_table_free(t);
        return status;
    }
    *out = t;
    return CBN_OK;
}

void cbn_op_table_free(cbn_op_table *t) {
    if (t == NULL) return;
    for (int i = 0; i < CBN_OP_COUNT; i++) {
        for (int k = 0; k < t->rows[i].nparams; k++) {
            const cbn_value *v = &t->rows[i].params[k].default_value;
            if (v->tag == CBN_V_LIST) cbn_free(v->u.seq);
        }
    }
    cbn_free(t->text);
    cbn_free(t->handles);
    cbn_free(t);
}

int cbn_op_table_count(const cbn_op_table *t) {
    (void)t;
    return CBN_OP_COUNT;
}

const cbn_op *cbn_op_table_row(const cbn_op_table *t, cbn_opcode code) {
    return code == 0 || code > CBN_OP_COUNT ? NULL : &t->rows[code - 1];
}

cbn_opcode cbn_op_table_find(const cbn_op_table *t, const char *name, size_t len) {
    size_t slot;
    return find_name(t, "", 0, name, len, &slot);
}

cbn_opcode cbn_op_table_method(const cbn_op_table *t, const char *name, size_t len) {
    if (t == NULL) return 0;
    size_t slot;
    return find_name(t, "method.", 7, name, len, &slot);
}

static size_t hash_handle(cbn_host h, size_t slots) {
    /* Fibonacci hashing: objects are aligned, so the low bits say little. */
    return (size_t)(((uint64_t)(uintptr_t)h * UINT64_C(0x9e3779b97f4a7c15)) >> 32) & (slots - 1);
}

static handle_slot *find_handle(handle_slot *slots, size_t count, cbn_host h) {
    size_t at = hash_handle(h, count);
    while (slots[at].callable != NULL && slots[at].callable != h) at = (at + 1) & (count - 1);
    return &slots[at];
}

static cbn_status grow(cbn_op_table *t, cbn_error *err) {
    const size_t slots = t->handle_slots == 0 ? 1024 : t->handle_slots * 2;
    handle_slot *larger = cbn_calloc(slots * sizeof *larger);
    if (larger == NULL) return cbn_fail_memory(err, "op table", slots * sizeof *larger);
    for (size_t i = 0; i < t->handle_slots; i++) {
        if (t->handles[i].callable != NULL) *find_handle(larger, slots, t->handles[i].callable) = t->handles[i];
    }
    cbn_free(t->handles);
    t->handles = larger;
    t->handle_slots = slots;
    return CBN_OK;
}

cbn_status cbn_op_table_register(cbn_op_table *t, cbn_host callable, cbn_opcode code, cbn_error *err) {
    assert(callable != NULL && code >= 1 && code <= CBN_OP_COUNT);
    if ((t->handle_count + 1) * 2 > t->handle_slots) CBN_TRY(grow(t, err));
    handle_slot *slot = find_handle(t->handles, t->handle_slots, callable);
    if (slot->callable == NULL) t->handle_count++;
    *slot = (handle_slot){callable, code};
    return CBN_OK;
}

cbn_opcode cbn_op_table_lookup(const cbn_op_table *t, cbn_host callable) {
    if (t == NULL || t->handle_slots == 0 || callable == NULL) return 0;
    return find_handle(t->handles, t->handle_slots, callable)->code;
}
