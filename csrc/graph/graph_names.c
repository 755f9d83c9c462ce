/* SPDX-License-Identifier: BSD-3-Clause */
/* Interned strings and unique names of nodes. */
#include "graph/graph_priv.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Sorted by bytes: keywords and builtins of Python up to 3.14, and what generated code calls its modules. Soft keywords
 * stay legal. torch.fx lets "None" pass, which makes code that does not compile. */
static const char *const reserved[] = {
    "ArithmeticError", "AssertionError", "AttributeError", "BaseException", "BaseExceptionGroup", "BlockingIOError",
    "BrokenPipeError", "BufferError", "BytesWarning", "ChildProcessError", "ConnectionAbortedError",
    "ConnectionError", "ConnectionRefusedError", "ConnectionResetError", "DeprecationWarning", "EOFError", "Ellipsis",
    "EncodingWarning", "EnvironmentError", "Exception", "ExceptionGroup", "False", "FileExistsError",
    "FileNotFoundError", "FloatingPointError", "FutureWarning", "GeneratorExit", "IOError", "ImportError",
    "ImportWarning", "IndentationError", "IndexError", "InterruptedError", "IsADirectoryError", "KeyError",
    "KeyboardInterrupt", "LookupError", "MemoryError", "ModuleNotFoundError", "NameError", "None", "NoneType",
    "NotADirectoryError", "NotImplemented", "NotImplementedError", "OSError", "OverflowError",
    "PendingDeprecationWarning", "PermissionError", "ProcessLookupError", "PythonFinalizationError", "RecursionError",
    "ReferenceError", "ResourceWarning", "RuntimeError", "RuntimeWarning", "StopAsyncIteration", "StopIteration",
    "SyntaxError", "SyntaxWarning", "SystemError", "SystemExit", "TabError", "TimeoutError", "True", "TypeError",
    "UnboundLocalError", "UnicodeDecodeError", "UnicodeEncodeError", "UnicodeError", "UnicodeTranslateError",
    "UnicodeWarning", "UserWarning", "ValueError", "Warning", "ZeroDivisionError", "__build_class__", "__debug__",
    "__doc__", "__import__", "__loader__", "__name__", "__package__", "__spec__", "abs", "aiter", "all", "and",
    "anext", "any", "as", "ascii", "assert", "async", "await", "bin", "bool", "break", "breakpoint", "bytearray",
    "bytes", "callable", "chr", "class", "classmethod", "compile", "complex", "continue", "copyright", "credits",
    "def", "del", "delattr", "device", "dict", "dir", "divmod", "elif", "else", "enumerate", "eval", "except", "exec",
    "exit", "filter", "finally", "float", "for", "format", "from", "frozenset", "fx_pytree", "getattr", "global",
    "globals", "hasattr", "hash", "help", "hex", "id", "if", "import", "in", "inf", "input", "int", "is",
    "isinstance", "issubclass", "iter", "lambda", "len", "license", "list", "locals", "map", "max", "memoryview",
    "min", "nan", "next", "nonlocal", "not", "object", "oct", "open", "or", "ord", "pass", "pow", "print", "property",
    "pytree", "quit", "raise", "range", "repr", "return", "reversed", "round", "set", "setattr", "slice", "sorted",
    "staticmethod", "str", "sum", "super", "torch", "try", "tuple", "type", "vars", "while", "with", "yield", "zip",
};

/* ---- strings ----------------------------------------------------------------------------------------------------- */
static uint32_t hash_text(const char *s, size_t len) {
    uint64_t h = 0x9e3779b97f4a7c15u ^ len;
    while (len) {
        uint64_t w = 0;
        const size_t n = len < 8 ? len : 8;
        memcpy(&w, s, n);
        h = (h ^ w) * 0xff51afd7ed558ccdu; /* the constants of MurmurHash3's finaliser */
        h ^= h >> 32;
        s += n;
        len -= n;
    }
    /* A digit at the end of a word has reached the upper bits only: once more, and down. */
    h *= 0xc4ceb9fe1a85ec53u;
    return (uint32_t)(h ^ h >> 32);
}

static size_t str_len(const cbn_strings *t, cbn_str s) {
    return t->entries[s + 1].offset - t->entries[s].offset - 1;
}

/* The place in the table where the string is, or where it would go. The hash beside the id spares a look at the entry,
 * which in a large graph is a cache miss. */
static uint32_t place_of(const cbn_strings *t, const char *s, size_t len, uint32_t hash) {
    uint32_t at = hash & t->table_mask;
    for (;; at = (at + 1) & t->table_mask) {
        const uint64_t place = t->table[at];
        const cbn_str e = (cbn_str)place;
        if (e == CBN_STR_NONE) return at;
        if (place >> 32 == hash && str_len(t, e) == len && memcmp(t->text + t->entries[e].offset, s, len) == 0)
            return at;
    }
}

cbn_str cbn_graph_find_str(const cbn_graph *g, const char *s, size_t len) {
    const cbn_strings *t = &g->strings;
    return t->table ? (cbn_str)t->table[place_of(t, s, len, hash_text(s, len))] : CBN_STR_NONE;
}

static cbn_status grow_table(cbn_strings *t, cbn_error *err) {
    const uint32_t places = t->table ? 2 * (t->table_mask + 1) : 64;
    uint64_t *table = cbn_alloc_array(places, sizeof *table);
    if (!table) return cbn_fail_memory(err, "names of a graph", places * sizeof *table);
    memset(table, 0xff, places * sizeof *table);
    for (uint32_t i = 0; t->table && i <= t->table_mask; i++) {
        if ((cbn_str)t->table[i] == CBN_STR_NONE) continue;
        uint32_t at = (uint32_t)(t->table[i] >> 32) & (places - 1);
        while ((cbn_str)table[at] != CBN_STR_NONE) at = (at + 1) & (places - 1);
        table[at] = t->table[i];
    }
    cbn_free(t->table);
    t->table = table;
    t->table_mask = places - 1;
    return CBN_OK;
}

static cbn_status grow_entries(cbn_strings *t, cbn_error *err) {
    const size_t cap = t->cap ? t->cap + (size_t)t->cap / 2 : 32;
    cbn_str_entry *e = cbn_realloc(t->entries, cap * sizeof *e);
    if (!e) return cbn_fail_memory(err, "names of a graph", cap * sizeof *e);
    if (!t->count) e[0] = (cbn_str_entry){.offset = 0};
    t->entries = e;
    t->cap = (uint32_t)cap;
    return CBN_OK;
}

static cbn_status grow_text(cbn_strings *t, size_t need, cbn_error *err) {
    if (need > UINT32_MAX) return cbn_fail(err, CBN_NO_MEMORY, "the strings of a graph exceed 4 GiB");
    const size_t cap = CBN_MAX(CBN_MAX(need, t->text_cap + t->text_cap / 2), (size_t)512);
    char *text = cbn_realloc(t->text, cap);
    if (!text) return cbn_fail_memory(err, "names of a graph", cap);
    t->text = text;
    t->text_cap = cap;
    return CBN_OK;
}

cbn_status cbn_graph_intern(cbn_graph *g, const char *s, size_t len, cbn_str *out, cbn_error *err) {
    cbn_strings *t = &g->strings;
    const uint32_t hash = hash_text(s, len);
    uint32_t place = t->table ? place_of(t, s, len, hash) : 0;
    if (t->table && (cbn_str)t->table[place] != CBN_STR_NONE) {
        *out = (cbn_str)t->table[place];
        return CBN_OK;
    }
    if (!t->table || 4 * (uint64_t)t->count >= 3 * (uint64_t)t->table_mask) {
        CBN_TRY(grow_table(t, err));
        place = place_of(t, s, len, hash);
    }
    if (t->count + 2 > t->cap) CBN_TRY(grow_entries(t, err));
    if (t->text_len + len + 1 > t->text_cap) {
        if (t->text && s >= t->text && s < t->text + t->text_len) {
            /* A part of our own text: it moves while it is copied. */
            const size_t from = (size_t)(s - t->text);
            CBN_TRY(grow_text(t, t->text_len + len + 1, err));
            s = t->text + from;
        } else {
            CBN_TRY(grow_text(t, t->text_len + len + 1, err));
        }
    }
    if (len) memmove(t->text + t->text_len, s, len);
    t->text[t->text_len + len] = 0;
    t->text_len += len + 1;
    const cbn_str id = t->count++;
    t->entries[id].count = t->entries[id].dense = t->entries[id].flags = 0;
    t->entries[id + 1] = (cbn_str_entry){.offset = (uint32_t)t->text_len};
    t->table[place] = (uint64_t)hash << 32 | id;
    *out = id;
    return CBN_OK;
}

const char *cbn_graph_str(const cbn_graph *g, cbn_str s, size_t *len) {
    assert(s < g->strings.count);
    if (len) *len = str_len(&g->strings, s);
    return g->strings.text + g->strings.entries[s].offset;
}

void cbn_strings_free(cbn_strings *s) {
    cbn_free(s->text);
    cbn_free(s->entries);
    cbn_free(s->table);
    *s = (cbn_strings){0};
}

size_t cbn_strings_bytes(const cbn_strings *s) {
    return s->text_cap + s->cap * sizeof *s->entries + (s->table ? (s->table_mask + 1) * sizeof *s->table : 0);
}

/* ---- names ------------------------------------------------------------------------------------------------------- */
/* ASCII only: names do not depend on the locale. */
static bool is_digit(char c) { return c >= '0' && c <= '9'; }
static bool is_upper(char c) { return c >= 'A' && c <= 'Z'; }
static bool is_lower(char c) { return c >= 'a' && c <= 'z'; }
static bool is_word(char c) { return is_digit(c) || is_upper(c) || is_lower(c) || c == '_'; }

static int compare_reserved(const void *key, const void *item) { return strcmp(key, *(const char *const *)item); }

static bool is_reserved(const char *s) {
    return bsearch(s, reserved, sizeof reserved / sizeof *reserved, sizeof *reserved, compare_reserved) != NULL;
}

static void classify(cbn_strings *t, cbn_str s) {
    const char *p = t->text + t->entries[s].offset;
    const size_t len = str_len(t, s);
    uint32_t flags = CBN_NAME_CLASSIFIED;
    bool clean = len > 0 && !is_digit(p[0]);
    for (size_t i = 0; i < len && clean; i++) clean = is_word(p[i]);
    if (clean) flags |= CBN_NAME_CLEAN;
    if (clean && is_reserved(p)) flags |= CBN_NAME_RESERVED;
    t->entries[s].flags |= flags;
}

/* Small texts stay on the stack. */
typedef struct buffer {
    char small[128];
    char *p;
} buffer;

static cbn_status buffer_take(buffer *b, size_t bytes, cbn_error *err) {
    b->p = bytes <= sizeof b->small ? b->small : cbn_alloc(bytes);
    return b->p ? CBN_OK : cbn_fail_memory(err, "a name", bytes);
}

static void buffer_drop(buffer *b) {
    if (b->p != b->small) cbn_free(b->p);
}

static cbn_status sanitise(cbn_graph *g, const char *s, size_t len, cbn_str *out, cbn_error *err) {
    if (len == 0) return cbn_graph_intern(g, "_unnamed", 8, out, err);
    buffer b;
    CBN_TRY(buffer_take(&b, len + 1, err));
    size_t n = 0;
    if (is_digit(s[0])) b.p[n++] = '_';
    for (size_t i = 0; i < len; i++) {
        if (is_word(s[i])) b.p[n++] = s[i];
        else if (i == 0 || is_word(s[i - 1])) b.p[n++] = '_';
    }
    const cbn_status st = cbn_graph_intern(g, b.p, n, out, err);
    buffer_drop(&b);
    return st;
}

/* Length of the base of "base_12"; *number is 12. The whole text and false when it does not end so, or in more than
 * nine digits. */
static bool split(const char *s, size_t len, size_t *base_len, uint32_t *number) {
    size_t i = len;
    uint64_t value = 0, scale = 1;
    while (i > 0 && is_digit(s[i - 1]) && len - i < 10) {
        value += scale * (uint64_t)(s[i - 1] - '0');
        scale *= 10;
        i--;
    }
    *base_len = len;
    *number = 0;
    if (i == len || len - i > 9 || i < 2 || s[i - 1] != '_') return false;
    *base_len = i - 1;
    *number = (uint32_t)value;
    return true;
}

static cbn_status numbered(cbn_graph *g, cbn_str base, uint64_t number, cbn_str *out, cbn_error *err) {
    size_t len;
    const char *text = cbn_graph_str(g, base, &len);
    char digits[24];
    size_t n = sizeof digits;
    do digits[--n] = (char)('0' + number % 10);
    while (number /= 10);
    digits[--n] = '_';
    buffer b;
    CBN_TRY(buffer_take(&b, len + sizeof digits, err));
    memcpy(b.p, text, len);
    memcpy(b.p + len, digits + n, sizeof digits - n);
    const size_t whole = len + sizeof digits - n;
    const cbn_status st = cbn_graph_intern(g, b.p, whole, out, err);
    /* The next name of this base comes soon, and in a large graph its place in the table is in no cache. */
    if (st == CBN_OK && b.p[whole - 1] != '9') {
        b.p[whole - 1]++;
        __builtin_prefetch(&g->strings.table[hash_text(b.p, whole) & g->strings.table_mask], 1);
    }
    buffer_drop(&b);
    return st;
}

cbn_status cbn_name_make(cbn_graph *g, cbn_str cand, cbn_str *out, cbn_error *err) {
    cbn_strings *t = &g->strings;
    if (!(t->entries[cand].flags & CBN_NAME_CLASSIFIED)) classify(t, cand);
    if (!(t->entries[cand].flags & CBN_NAME_CLEAN)) {
        size_t n;
        const char *s = cbn_graph_str(g, cand, &n);
        CBN_TRY(sanitise(g, s, n, &cand, err));
        classify(t, cand);
    }
    size_t len, base_len;
    uint32_t written = 0;
    const char *text = cbn_graph_str(g, cand, &len);
    const bool has_number = split(text, len, &base_len, &written);
    cbn_str base = cand;
    if (has_number) CBN_TRY(cbn_graph_intern(g, text, base_len, &base, err));

    const bool used = (t->entries[cand].flags & CBN_NAME_USED) != 0;
    uint64_t number = written;
    cbn_str name = cand;
    bool taken = used;
    if (!has_number || used) {
        number = t->entries[base].count;
        if (t->entries[cand].flags & CBN_NAME_RESERVED) taken = true;
    }
    const bool reached = number <= t->entries[base].dense;
    while (taken) {
        number++;
        /* base_1 .. base_dense are all given away: no need to try them again. */
        if (number <= t->entries[base].dense) number = (uint64_t)t->entries[base].dense + 1;
        CBN_TRY(numbered(g, base, number, &name, err));
        taken = (t->entries[name].flags & CBN_NAME_USED) != 0;
    }
    if (name != cand && reached) t->entries[base].dense = (uint32_t)CBN_MIN(number, (uint64_t)CBN_NAME_DENSE_MAX);
    t->entries[base].count = (uint32_t)CBN_MIN(number, (uint64_t)UINT32_MAX);
    t->entries[name].flags |= CBN_NAME_USED;
    *out = name;
    return CBN_OK;
}

void cbn_name_use(cbn_graph *g, cbn_str name) { g->strings.entries[name].flags |= CBN_NAME_USED; }

cbn_status cbn_graph_unique_name(cbn_graph *g, const char *cand, size_t len, cbn_str *out, cbn_error *err) {
    cbn_str s;
    CBN_TRY(sanitise(g, cand, len, &s, err));
    return cbn_name_make(g, s, out, err);
}

cbn_status cbn_graph_name_of_target(cbn_graph *g, const char *target, size_t len, cbn_str *out, cbn_error *err) {
    if (len >= 2 && memcmp(target, "__", 2) == 0 && memcmp(target + len - 2, "__", 2) == 0) {
        target += 2;
        len = len >= 4 ? len - 4 : 0;
    }
    buffer b;
    if (len > SIZE_MAX / 4) return cbn_fail_memory(err, "a name", len);
    CBN_TRY(buffer_take(&b, 2 * len + 1, err));
    size_t n = 0;
    for (size_t i = 0; i < len; i++) {
        const char c = target[i];
        if (is_upper(c) && i > 0 && is_lower(target[i - 1])) b.p[n++] = '_';
        b.p[n++] = is_upper(c) ? (char)(c - 'A' + 'a') : c;
    }
    const cbn_status st = cbn_graph_intern(g, b.p, n, out, err);
    buffer_drop(&b);
    return st;
}
