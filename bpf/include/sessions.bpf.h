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

#ifdef CORAL_BCC
static __always_inline __u32 lowest_slot(__u64 mask)
{
	return log2_u64(mask & -mask) & (SESSIONS - 1);
}
#else
/* Each six bits in a row of the factor are a different number, so a power of two times the factor
 * has a number of its own in the highest six bits (a de Bruijn sequence). */
#define DE_BRUIJN 0x03F79D71B4CB0A89ULL
static const __u8 slot_of_product[SESSIONS] = {
    0,	1,  48, 2,  57, 49, 28, 3,  61, 58, 50, 42, 38, 29, 17, 4,  62, 55, 59, 36, 53, 51,
    43, 22, 45, 39, 33, 30, 24, 18, 12, 5,  63, 47, 56, 27, 60, 41, 37, 16, 54, 35, 52, 21,
    44, 32, 23, 11, 46, 26, 40, 15, 34, 20, 31, 10, 25, 14, 19, 9,  13, 8,  7,	6,
};

static __always_inline __u32 lowest_slot(__u64 mask)
{
	return slot_of_product[((mask & -mask) * DE_BRUIJN) >> 58];
}
#endif

/*
 * Runs its block once for each session in MASK, with its SLOT. What the block does should be a
 * SUBPROGRAM, which the verifier only goes through once.
 */
#define for_each_session(slot, mask)                                                               \
	for (__u64 left_ = (mask), turn_ = 0, slot = lowest_slot(left_);                           \
	     left_ && turn_ < option(slots);                                                       \
	     left_ &= left_ - 1, turn_++, slot = lowest_slot(left_))

#define session_bit(slot) (1ULL << (slot))

/* The programs of a hub only see the sessions that use it. User space numbers the kinds of hubs. */
#define MOST_HUBS 8
OPTION(__u32, hub, 0);

/* What user space says about all sessions. It changes them one at a time, and never a bit of a
 * session that runs. */
struct sessions {
	__u64 of_hub[MOST_HUBS];
	__u64 all;
	__u64 host;	  /* those that watch every process */
	__u64 follow;	  /* those that watch the children of what they watch */
	__u64 comm;	  /* those that watch processes by command name */
	__u64 cgroup;	  /* those that watch the processes of a cgroup */
	__u64 memory;	  /* of these, those of a cgroup of the memory controller (v1) */
	__u64 await_exec; /* those that watch a process from its next exec on */
	__u64 detailed;	  /* those that are sent a record of each change of what they watch */
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

static __always_inline __u64 sessions_of_hub(const struct sessions *all)
{
	return all->of_hub[option(hub) % MOST_HUBS];
}

enum {
	/* Grows whenever the processes that a session watches may have changed for threads that run
	 * already. User space and programs have a counter each, because neither can add to the
	 * other's. */
	COUNT_GENERATION,
	COUNT_ENDED, /* processes that were watched */
	COUNTS,
};

MAP(ARRAY, shared_counts, __u32, __u32, COUNTS, 0);

static __always_inline __u32 generation_of(const struct sessions *all)
{
	__u32 at = COUNT_GENERATION, *changed = bpf_map_lookup_elem(map_of(shared_counts), &at);

	return all->generation + (changed ? *changed : 0);
}

static __always_inline void count_up(__u32 at)
{
	__u32 *count = bpf_map_lookup_elem(map_of(shared_counts), &at);

	if (count)
		__sync_fetch_and_add(count, 1);
}
