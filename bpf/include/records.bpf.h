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

OPTION(bool, records_in_ring, true);

struct record_head {
	__u32 kind;
	__u32 length;
};

SESSION_BUFFERS(RINGBUF, rings);
SESSION_BUFFERS(PERF_EVENT_ARRAY, perfs);

/* Sends a record of SIZE bytes, a constant. CTX is the program's own argument, which perf buffers
 * need. */
static __always_inline void record_send(void *ctx, __u32 slot, void *record, const __u64 size)
{
	struct account *account = account_of(slot);
	void *buffer;
	long refused;

	if (!account)
		return;
	account_add(&account->produced);
	buffer = option(records_in_ring) ? map_of_session(rings, slot) : map_of_session(perfs, slot);
	if (!buffer)
		return;
	if (option(records_in_ring))
		refused = bpf_ringbuf_output(buffer, record, size, 0);
	else
		refused = bpf_perf_event_output(ctx, buffer, BPF_F_CURRENT_CPU, record, size);
	if (refused)
		account_add(&account->lost[LOSS_BUFFER_FULL]);
}

/* Sends a record that is no event, through a ring. It is not counted. */
static __always_inline void record_note(__u32 slot, void *record, const __u64 size)
{
	void *buffer = map_of_session(rings, slot);

	if (buffer)
		bpf_ringbuf_output(buffer, record, size, 0);
}
