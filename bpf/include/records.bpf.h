/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: records sent to user space. Each is counted as produced, and each that the buffer
 * refuses as lost. They go through a ring buffer, or through one perf buffer per CPU on kernels
 * that have no ring buffers (before 5.8). User space drains the buffers every few milliseconds; a
 * program wakes it only when a buffer fills up earlier.
 */
#pragma once

#include "kernel.bpf.h"
#include "account.bpf.h"

#define WAKEUP_WINDOW_BYTES (16 << 10)

OPTION(bool, records_in_ring, true);
OPTION(__u64, ring_wakeup_bytes, 0); /* wake the reader when this much is waiting in the ring */

BUFFER(RINGBUF, ring, 4096);		     /* at least a page; user space sets the real size */
MAP(PERF_EVENT_ARRAY, perf, int, int, 0, 0); /* user space opens a buffer per CPU */

/* Sends a record of SIZE bytes, a constant. CTX is the program's own argument. */
static __always_inline void record_send(void *ctx, void *record, const __u64 size)
{
	struct account *account = account_of(0);
	long refused;

	if (!account)
		return;
	account_add(&account->produced);
	if (option(records_in_ring)) {
		/* Within a window above the mark, not for every record of a ring that stays full.
		 */
		__u64 waiting = bpf_ringbuf_query(map_of(ring), BPF_RB_AVAIL_DATA);
		bool wake = waiting - option(ring_wakeup_bytes) < WAKEUP_WINDOW_BYTES;

		refused = bpf_ringbuf_output(map_of(ring), record, size,
					     wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
	} else {
		refused = bpf_perf_event_output(ctx, map_of(perf), BPF_F_CURRENT_CPU, record, size);
	}
	if (refused)
		account_add(&account->lost[LOSS_BUFFER_FULL]);
}
