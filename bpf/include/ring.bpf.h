/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: records into the ring buffer, each counted as produced, each one refused as lost.
 * User space comes by every few milliseconds; it is woken only when the ring fills up before.
 */
#pragma once

#include "kernel.bpf.h"
#include "account.bpf.h"

const volatile __u64 ring_wakeup_bytes = 0; /* wake the reader when so much waits */

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096); /* the page size at least; user space sets the real size */
} ring SEC(".maps");

/* Room for a record of SIZE bytes, a constant, or NULL where the ring is full. */
static __always_inline void *ring_reserve(const __u64 size)
{
	struct account *account = account_of_cpu();
	void *record;

	if (!account)
		return NULL;
	account->produced++;
	record = bpf_ringbuf_reserve(&ring, size, 0);
	if (!record)
		account->lost++;
	return record;
}

static __always_inline void ring_submit(void *record)
{
	bool full = bpf_ringbuf_query(&ring, BPF_RB_AVAIL_DATA) >= ring_wakeup_bytes;

	bpf_ringbuf_submit(record, full ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}
