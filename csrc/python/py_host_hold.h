/* SPDX-License-Identifier: BSD-3-Clause */
/* Keeping alive what the vtable's resolve and module lend out. Needs the GIL. */
#ifndef CBN_PY_HOST_HOLD_H
#define CBN_PY_HOST_HOLD_H

/* While a scope is open every object that cbn_py_host_resolve and cbn_py_host_module hand out stays alive: it may have
 * been made by a property, or be replaced by host code. Open one around each call of csrc/graph that takes a root.
 * Scopes nest. Without one, an object that nothing else keeps alive is reported as not there. */
void cbn_py_host_hold_begin(void);
void cbn_py_host_hold_end(void);
#endif
