/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: the count of what a program wanted to report, and of what it could not. Every
 * collector has this map; nothing is dropped without being counted here.
 */
#pragma once

#include "kernel.bpf.h"

struct account {
	__u64 produced; /* records meant for the buffer, lost ones included */
	__u64 lost;	/* the part of them that was refused because the buffer was full */
	__u64 seen;	/* calls from which samples are drawn */
	__u64 map_full; /* calls not counted, because a map had no room or the kernel no memory */
};

MAP(PERCPU_ARRAY, account, __u32, struct account, 1, 0);

static __always_inline struct account *account_of_cpu(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(map_of(account), &zero);
}

static __always_inline void account_map_full(void)
{
	struct account *a = account_of_cpu();

	if (a)
		a->map_full++;
}
