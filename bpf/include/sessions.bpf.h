/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: many sessions share one set of programs. A session has a slot; in a mask, bit SLOT
 * stands for it. What is a session's own (the processes that it watches, its figures, its records)
 * is in maps that are found by its slot, so that it costs nothing to those that are not in a mask.
 */
#pragma once

#include "portable.bpf.h"
#include "log2.bpf.h"

#define SESSIONS 64 /* as many as a mask has bits */

/* How many slots there are in these programs: fewer where the verifier goes through each turn of a
 * loop, and one where the kernel cannot share an object between sessions. */
OPTION(__u32, slots, SESSIONS);

static __always_inline __u32 lowest_slot(__u64 mask)
{
	return log2_u64(mask & -mask) & (SESSIONS - 1);
}

/*
 * Runs its block once for each session in MASK, with its SLOT. What the block does should be a
 * SUBPROGRAM, which the verifier only goes through once.
 */
#define for_each_session(slot, mask)                                                               \
	for (__u64 left_ = (mask), turn_ = 0, slot = lowest_slot(left_);                           \
	     left_ && turn_ < option(slots);                                                       \
	     left_ &= left_ - 1, turn_++, slot = lowest_slot(left_))

#define session_bit(slot) (1ULL << (slot))

/* The programs of a hub, which only see the sessions that use them. */
enum hub {
	HUB_SYSCALLS,
	HUB_SOCKETS,
	HUBS,
};

/* What user space says about all sessions. It changes them one at a time, and never a bit of a
 * session that runs. */
struct sessions {
	__u64 of_hub[HUBS];
	__u64 all;
	__u64 host;	/* those that watch every process */
	__u64 follow;	/* those that watch the children of what they watch */
	__u64 comm;	/* those that watch processes by command name */
	__u64 cgroup;	/* those that watch the processes of a cgroup */
	__u64 memory;	/* of these, those of a cgroup of the memory controller (v1) */
	__u64 detailed; /* those that are sent a record of each change of what they watch */
	__u32 generation;
	__u32 hints;	 /* which of the two sets of hints is in use */
	__u32 hierarchy; /* of the memory controller (cgroups v1), 0 if there is none */
	__u32 reserved;
};

MAP(ARRAY, sessions, __u32, struct sessions, 1, 0);

static __always_inline struct sessions *all_sessions(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(map_of(sessions), &zero);
}

enum {
	/* Grows whenever the processes that a session watches may have changed for threads that run
	 * already. User space and programs have a counter each, because neither can add to the
	 * other's. */
	COUNT_GENERATION,
	COUNT_ENDED, /* processes that were watched */
	COUNTS,
};

MAP(ARRAY, counts, __u32, __u32, COUNTS, 0);

static __always_inline __u32 generation_of(const struct sessions *all)
{
	__u32 at = COUNT_GENERATION, *changed = bpf_map_lookup_elem(map_of(counts), &at);

	return all->generation + (changed ? *changed : 0);
}

static __always_inline void count_up(__u32 at)
{
	__u32 *count = bpf_map_lookup_elem(map_of(counts), &at);

	if (count)
		__sync_fetch_and_add(count, 1);
}
