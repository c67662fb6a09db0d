/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: a session's count of what programs wanted to report for it, and of what they could
 * not. Nothing is dropped without being counted here. Counts are added atomically: on the same CPU,
 * a program in an interrupt, or in a thread that preempts this one, may come between a plain read
 * and write.
 */
#pragma once

#include <linux/errno.h>
#include "kernel.bpf.h"
#include "sessions.bpf.h"

/* Why an event is in no row. User space finds the names in the BTF: collectors/losses.py. */
enum loss {
	LOSS_BUFFER_FULL, /* the buffer had no room for its record */
	LOSS_MAP_FULL,	  /* a map had no room for its element */
	LOSS_BUSY,	  /* a map was locked, or the kernel had no memory at that moment */
	LOSS_TRUNCATED,	  /* its data did not fit into a record */
	LOSSES,
};

/* 64-bit members only, which user space adds up over the CPUs. */
struct account {
	__u64 produced; /* records meant for the buffer, lost ones included */
	__u64 seen;	/* calls from which samples are drawn */
	__u64 lost[LOSSES];
};

MAP(PERCPU_ARRAY, accounts, __u32, struct account, SESSIONS, 0); /* by slot */
IN_BTF(enum loss, loss);

static __always_inline struct account *account_of(__u32 slot)
{
	return bpf_map_lookup_elem(map_of(accounts), &slot);
}

static __always_inline void account_add(__u64 *count)
{
	__sync_fetch_and_add(count, 1);
}

/* REASON is a constant. */
static __always_inline void account_loss(__u32 slot, const enum loss reason)
{
	struct account *account = account_of(slot);

	if (account)
		account_add(&account->lost[reason]);
}

/*
 * Counts what an element was for; ERROR is what the update of its map or buffer returned. It is an
 * int, because before Linux 6.4 the upper half of what an update returns is undefined.
 */
static __always_inline void account_error(__u32 slot, int error)
{
	struct account *account = account_of(slot);

	if (!account)
		return;
	if (error == -E2BIG)
		account_add(&account->lost[LOSS_MAP_FULL]);
	else
		account_add(&account->lost[LOSS_BUSY]);
}
