/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: records sent to a session's reader. Each is counted as produced, and each that the
 * buffer refuses as lost. They go through a ring buffer, or through one perf buffer per CPU on
 * kernels that have no ring buffers (before 5.8).
 *
 * A record begins with `struct record_head`; records of one buffer may differ in kind and size. The
 * kernel wakes a reader that has caught up for the next record in the ring; then the reader gathers
 * for some milliseconds. A program only wakes it when the ring fills up earlier.
 */
#pragma once

#include "account.bpf.h"

#define WAKEUP_SHARE 4 /* of the ring, which may fill up until the reader is woken again */

/* A ring that stays full wakes its reader until this much is beyond the mark: an object whose
 * records are that long defines more before. */
#ifndef WAKEUP_WINDOW_BYTES
#define WAKEUP_WINDOW_BYTES (16 << 10)
#endif

/*
 * `kind` is a constant of the object's `enum record_kind`: RECORD_CALL for `struct call`, from 1
 * up. `length` is the size of that struct.
 */
struct record_head {
	__u32 kind;
	__u32 length;
};

/* The longest record that is reserved: an object with longer ones defines it before. */
#ifndef RECORD_MOST_BYTES
#define RECORD_MOST_BYTES 1024
#endif

/* Where records for perf buffers are made. */
struct record_draft {
	__u64 busy;
	__u8 record[RECORD_MOST_BYTES];
};

OPTION(bool, records_in_ring, true);
MAP(PERCPU_ARRAY, record_drafts, __u32, struct record_draft, 1, 0);

SESSION_BUFFERS(RINGBUF, rings);
SESSION_BUFFERS(PERF_EVENT_ARRAY, perfs); /* user space opens a buffer per CPU in each */

/* The flags for a new record. Not a wake-up for every record of a ring that stays full. */
static __always_inline __u64 record_flags(void *ring)
{
	__u64 waiting = bpf_ringbuf_query(ring, BPF_RB_AVAIL_DATA);
	__u64 mark = bpf_ringbuf_query(ring, BPF_RB_RING_SIZE) / WAKEUP_SHARE;

	return waiting - mark < WAKEUP_WINDOW_BYTES ? BPF_RB_FORCE_WAKEUP : 0;
}

static __always_inline void record_account(__u32 slot, int error)
{
	struct account *account = account_of(slot);

	if (!account)
		return;
	account_add(&account->produced);
	if (!error)
		return;
	if (error == -EBUSY)
		account_add(&account->lost[LOSS_BUSY]);
	else
		account_add(&account->lost[LOSS_BUFFER_FULL]);
}

/*
 * Sends a record of SIZE bytes, a constant, whose head has its kind. CTX is the program's own
 * argument. A slot without a buffer is of a session that begins or ends: nothing is sent.
 */
static __always_inline void record_send(void *ctx, __u32 slot, void *record, const __u64 size)
{
	void *buffer;
	int error;

	((struct record_head *)record)->length = size;
	if (option(records_in_ring)) {
		buffer = map_of_session(rings, slot);
		if (!buffer)
			return;
		error = bpf_ringbuf_output(buffer, record, size, record_flags(buffer));
	} else {
		buffer = map_of_session(perfs, slot);
		if (!buffer)
			return;
		error = bpf_perf_event_output(ctx, buffer, BPF_F_CURRENT_CPU, record, size);
	}
	record_account(slot, error);
}

static __always_inline struct record_draft *record_draft(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(map_of(record_drafts), &zero);
}

/*
 * Room for a record of KIND and of SIZE bytes, both constants, with its head; NULL, which is
 * counted, if there is none. The program writes the rest, and submits or discards it.
 */
static __always_inline void *record_reserve(__u32 slot, __u32 kind, const __u64 size)
{
	struct record_draft *draft;
	struct record_head *record;
	void *buffer;

	if (option(records_in_ring)) {
		buffer = map_of_session(rings, slot);
		if (!buffer)
			return NULL;
		record = bpf_ringbuf_reserve(buffer, size, 0);
		if (!record) {
			record_account(slot, -ENOSPC);
			return NULL;
		}
	} else {
		draft = record_draft();
		if (!draft || size > sizeof(draft->record))
			return NULL;
		if (draft->busy) { /* by what this program has interrupted */
			record_account(slot, -EBUSY);
			return NULL;
		}
		draft->busy = 1;
		record = (void *)draft->record;
	}
	record->kind = kind;
	record->length = size;
	return record;
}

static __always_inline void record_release_draft(void)
{
	struct record_draft *draft = record_draft();

	if (draft)
		draft->busy = 0;
}

/* Sends a reserved record; SIZE as before. */
static __always_inline void record_submit(void *ctx, __u32 slot, void *record, const __u64 size)
{
	void *buffer;
	int error = 0;

	if (option(records_in_ring)) {
		buffer = map_of_session(rings, slot);
		bpf_ringbuf_submit(record, buffer ? record_flags(buffer) : 0);
	} else {
		buffer = map_of_session(perfs, slot);
		if (buffer)
			error = bpf_perf_event_output(ctx, buffer, BPF_F_CURRENT_CPU, record, size);
		record_release_draft();
	}
	record_account(slot, error);
}

/*
 * Gives a reserved record up. It wakes the reader as others do: where the reader has caught up
 * and is not woken for this one, it would not be for the next one either.
 */
static __always_inline void record_discard(void *record)
{
	if (option(records_in_ring))
		bpf_ringbuf_discard(record, 0);
	else
		record_release_draft();
}

/* Sends a record that is no event, through a ring. It is not counted; 0 if there was room. */
static __always_inline long record_note(__u32 slot, void *record, const __u64 size)
{
	void *buffer = map_of_session(rings, slot);

	((struct record_head *)record)->length = size;
	return buffer ? bpf_ringbuf_output(buffer, record, size, record_flags(buffer)) : -ENOENT;
}
