/* SPDX-License-Identifier: BSD-3-Clause */
/* Internal to the op table: the parser of schemas. */
#ifndef CBN_OP_SCHEMA_H
#define CBN_OP_SCHEMA_H
#include "graph/op_table.h"

/* Fills params, nparams and returns of a row from its schema. `text` has strlen(op->schema) + 1 bytes and lives as
 * long as the
 * row: names and types point into it. On failure the parameters read so far stay counted. */
CBN_NODISCARD cbn_status cbn_op_parse_schema(cbn_op *op, char *text, cbn_error *err);
#endif
