/* SPDX-License-Identifier: BSD-3-Clause */
/* Reads the schemas of graph_ops.def. They are ours, so a mistake in one is CBN_BAD_STATE naming the row: the table
 * of a
 * build with such a row cannot be made at all. */
#include "graph/op_schema.h"

#include <stdlib.h>
#include <string.h>

#include "base/cbn_alloc.h"

static cbn_status malformed(const cbn_op *op, const char *what, cbn_error *err) {
    return cbn_fail(err, CBN_BAD_STATE, "op table, row %s: %s in schema %s", op->name, what, op->schema);
}

static char *skip_spaces(char *s) {
    while (*s == ' ') s++;
    return s;
}

static void cut_spaces(char *s) {
    size_t n = strlen(s);
    while (n > 0 && s[n - 1] == ' ') s[--n] = '\0';
}

/* The first `wanted` outside brackets and quotes, or the end of the text. */
static char *find_outside(char *s, char wanted) {
    int depth = 0;
    bool quoted = false;
    for (; *s != '\0'; s++) {
        if (*s == '"') quoted = !quoted;
        if (quoted) continue;
        if (depth == 0 && *s == wanted) return s;
        if (*s == '(' || *s == '[') depth++;
        if (*s == ')' || *s == ']') depth--;
    }
    return s;
}

static bool parse_number(const char *s, cbn_value *out) {
    char *end;
    const long long i = strtoll(s, &end, 10);
    if (end != s && *end == '\0') {
        *out = cbn_value_int(i);
        return true;
    }
    const double f = strtod(s, &end);
    if (end == s || *end != '\0') return false;
    *out = cbn_value_float(f);
    return true;
}

/* "[1, 1]": a list of the table's own, with the one reference it keeps. */
static cbn_status parse_list(const cbn_op *op, char *text, cbn_value *out, cbn_error *err) {
    uint32_t count = text[1] == ']' ? 0 : 1;
    for (const char *p = text; *p != '\0'; p++) count += *p == ',';
    cbn_seq *seq = cbn_calloc(sizeof *seq + count * sizeof(cbn_value));
    if (seq == NULL) return cbn_fail_memory(err, "op table", sizeof *seq + count * sizeof(cbn_value));
    seq->refs = 1;
    seq->count = count;
    char *p = text + 1;
    for (uint32_t i = 0; i < count; i++) {
        char *end;
        seq->v[i] = cbn_value_int(strtoll(p, &end, 10));
        if (end == p || (*end != ',' && *end != ']')) {
            cbn_free(seq);
            return malformed(op, "a bad list", err);
        }
        p = end + 1;
    }
    *out = (cbn_value){.tag = CBN_V_LIST, .depth = 1, .u.seq = seq};
    return CBN_OK;
}

static cbn_status parse_default(const cbn_op *op, cbn_param *p, char *text, cbn_error *err) {
    p->has_default = true;
    p->default_text = text;
    p->default_value = cbn_value_none();
    const size_t n = strlen(text);
    if (strcmp(text, "None") == 0) return CBN_OK;
    if (strcmp(text, "True") == 0 || strcmp(text, "False") == 0) {
        p->default_value = cbn_value_bool(text[0] == 'T');
        return CBN_OK;
    }
    if (n >= 2 && text[0] == '"' && text[n - 1] == '"') {
        text[n - 1] = '\0';
        p->default_str = p->default_text = text + 1;
        return CBN_OK;
    }
    if (text[0] == '[') return parse_list(op, text, &p->default_value, err);
    return parse_number(text, &p->default_value) ? CBN_OK : malformed(op, "a bad default", err);
}

static cbn_status parse_param(cbn_op *op, char *text, bool keyword_only, cbn_error *err) {
    if (op->nparams == CBN_OP_MAX_ARGS) return malformed(op, "too many parameters", err);
    cbn_param *p = &op->params[op->nparams];
    *p = (cbn_param){.keyword_only = keyword_only};
    char *equals = find_outside(text, '=');
    if (*equals == '=') {
        *equals = '\0';
        cut_spaces(text);
        CBN_TRY(parse_default(op, p, equals + 1, err));
    }
    op->nparams++; /* from here on the table frees the default */
    char *space = strrchr(text, ' ');
    if (space == NULL || space[1] == '\0') return malformed(op, "a parameter without type or name", err);
    *space = '\0';
    p->name = space + 1;
    char *alias = strchr(text, '(');
    if (alias != NULL) {
        char *end = strchr(alias, ')');
        if (end == NULL) return malformed(op, "an open bracket", err);
        p->aliased = true;
        p->written = memchr(alias, '!', (size_t)(end - alias)) != NULL;
        memmove(alias, end + 1, strlen(end + 1) + 1);
    }
    size_t n = strlen(text);
    if (n > 3 && strcmp(text + n - 3, "...") == 0) {
        p->variadic = true;
        text[n - 3] = '\0';
        n -= 3;
    }
    p->type = text;
    p->optional = n > 0 && text[n - 1] == '?';
    if (strcmp(text, "Any") == 0) p->optional = true;
    return CBN_OK;
}

/* How many results "Tensor", "(Tensor, Tensor)", "()" and "Tensor[]" stand for. */
static int count_results(const char *returns) {
    const size_t n = strlen(returns);
    if (n >= 2 && strcmp(returns + n - 2, "[]") == 0) return -1;
    if (returns[0] != '(') return 1;
    if (strcmp(returns, "()") == 0) return 0;
    int count = 1;
    for (const char *p = returns; *p != '\0'; p++) count += *p == ',';
    return count;
}

cbn_status cbn_op_parse_schema(cbn_op *op, char *text, cbn_error *err) {
    strcpy(text, op->schema); /* the caller made it long enough */
    char *arrow = strstr(text, ") -> ");
    while (arrow != NULL && strstr(arrow + 1, ") -> ") != NULL) arrow = strstr(arrow + 1, ") -> ");
    if (text[0] != '(' || arrow == NULL) return malformed(op, "no '(' or no ') -> '", err);
    *arrow = '\0';
    op->returns = arrow + 5;
    op->nreturns = count_results(op->returns);
    bool keyword_only = false;
    char *at = skip_spaces(text + 1);
    while (*at != '\0') {
        char *end = find_outside(at, ',');
        const bool last = *end == '\0';
        *end = '\0';
        if (strcmp(at, "*") == 0) keyword_only = true;
        else CBN_TRY(parse_param(op, at, keyword_only, err));
        at = last ? end : skip_spaces(end + 1);
    }
    return CBN_OK;
}
