/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: work that is too long for one program. A local subprogram is compiled once, and its
 * pointers keep what the verifier knows of them, unlike those of a SUBPROGRAM; bcc has none, and
 * inlines it. A stage is a program that another one continues as, with a stack and a limit of
 * instructions of its own.
 *
 *	LOCAL_SUBPROGRAM int name(...)	defines a local subprogram
 *	STAGES(name, count)		where user space puts the programs (BpfObject.write_fd)
 *	tail_call(ctx, name, index)	returns only if there is none, or after 32 of them
 *
 * All programs of one map are of one kind.
 */
#pragma once

#include "portable.bpf.h"

#define STAGES(name, count) MAP(PROG_ARRAY, name, __u32, __u32, count, 0)

#ifdef CORAL_BCC
#define LOCAL_SUBPROGRAM	    static __always_inline
#define tail_call(ctx, name, index) bpf_tail_call_(map_of(name), ctx, index)
#else
#define LOCAL_SUBPROGRAM	    static __noinline
#define tail_call(ctx, name, index) bpf_tail_call(ctx, map_of(name), index)
#endif
