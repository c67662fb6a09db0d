/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: the processes that a session watches. User space adds those that run when the session
 * starts; the programs of processes.bpf.c add and remove processes from then on. These maps belong
 * to processes.bpf.c, and the programs of every collector use them.
 */
#pragma once

#include "kernel.bpf.h"
#include "account.bpf.h"
#include "records.bpf.h"
#include "sessions.bpf.h"

enum {
	MEMBER_ACTIVE,
	MEMBER_ARMED,  /* is watched from its next successful exec on, which counts */
	MEMBER_SPARED, /* is not watched, although it would be */
	MEMBER_LEFT,   /* is not watched, because it has left the cgroup */
};

struct member {
	char comm[COMM_BYTES];
	__u8 state;
	__u8 is_sighted; /* for the hub's own use: its programs have met the process */
	__u16 reserved;
	__u32 group; /* of the session's cgroups, see struct watched_cgroup; 0 without these */
};

/*
 * By process id. The last name of a process that has ended stays until user space has read its last
 * figures: under its id and the time of its start, so that the id can be another process's by then.
 */
SESSION_MAPS(HASH, members, __u64, struct member, 10240, BPF_F_NO_PREALLOC);

/* A process, as one number. */
static __always_inline __u64 process_of(__u32 tgid, __u32 born)
{
	return (__u64)born << 32 | tgid;
}

static __always_inline struct member *member_of(__u32 slot, __u32 tgid)
{
	void *map = map_of_session(members, slot);
	__u64 key = tgid;

	return map ? bpf_map_lookup_elem(map, &key) : NULL;
}

/*
 * The only cost for processes that nobody watches is one lookup here: the bytes of all members are
 * set, so that a byte that is clear belongs to no member. There are two sets. Programs set a byte
 * in both, and never clear one; user space clears the set that is not in use, sets the bytes of
 * all members in it, and changes over. A program sets the bytes after it has added the member:
 * either user space finds the member, or it clears the bytes before they are set.
 */
#define HINTS 16384
MAP(ARRAY, hints, __u32, __u8, 2 * HINTS, 0);

static __always_inline bool hint_is_clear(const struct sessions *all, __u32 tgid)
{
	__u32 at = (all->hints & 1) * HINTS + tgid % HINTS;
	__u8 *hint = bpf_map_lookup_elem(map_of(hints), &at);

	return hint && !*hint;
}

/* For programs that work for all sessions. */
static __always_inline bool surely_unwatched(const struct sessions *all, __u32 tgid)
{
	return !all->host && hint_is_clear(all, tgid);
}

/* For the programs of a hub: sessions of other hubs that watch every process cost them nothing. */
static __always_inline bool surely_unwatched_here(const struct sessions *all, __u32 tgid)
{
	return !(all->host & sessions_of_hub(all)) && hint_is_clear(all, tgid);
}

static __always_inline void hint_at(__u32 tgid)
{
	__u32 first = tgid % HINTS, second = HINTS + tgid % HINTS;
	__u8 *hint = bpf_map_lookup_elem(map_of(hints), &first);

	if (hint)
		*hint = 1;
	hint = bpf_map_lookup_elem(map_of(hints), &second);
	if (hint)
		*hint = 1;
}

/* The record of a change of what a session watches. Its place among the session's records tells
 * since when it is so. */
enum change {
	CHANGE_NONE,
	CHANGE_FOUND,
	CHANGE_NAMED, /* it has another name, or has moved to another group */
	CHANGE_ENDED,
};

struct process_change {
	struct record_head head;
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u32 tgid;
	__u32 born;
	__u32 change;
	__u32 group;
	char comm[COMM_BYTES];
};

/* Unlike any of `enum record_kind`, which each object has of its own. */
enum process_record_kind {
	RECORD_PROCESS_CHANGE = 1000,
};

IN_BTF(struct process_change, process_change);
IN_BTF(enum process_record_kind, process_record_kind);

/* By slot: how many changes the session was not told of. User space then looks names up again. */
MAP(ARRAY, untold_changes, __u32, __u32, SESSIONS, 0);

/*
 * Whether the session will read of the change, because it wants to and the ring has room. There are
 * only rings: without one, user space looks up each process that it meets.
 */
static __always_inline bool tell_change(const struct sessions *all, __u32 slot, __u32 tgid,
					__u32 born, enum change change, const struct member *member)
{
	struct process_change record = {
	    .head.kind = RECORD_PROCESS_CHANGE,
	    .time_ns = bpf_ktime_get_ns(),
	    .tgid = tgid,
	    .born = born,
	    .change = change,
	    .group = member->group,
	};

	__u32 *untold;

	if (!(all->detailed & session_bit(slot)))
		return false;
	__builtin_memcpy(record.comm, member->comm, COMM_BYTES);
	if (option(records_in_ring) && !record_note(slot, &record, sizeof(record)))
		return true;
	untold = bpf_map_lookup_elem(map_of(untold_changes), &slot);
	if (untold)
		__sync_fetch_and_add(untold, 1);
	return false;
}

static __always_inline void member_forget(__u32 slot, __u32 tgid)
{
	void *map = map_of_session(members, slot);
	__u64 key = tgid;

	if (map)
		bpf_map_delete_elem(map, &key);
}

static __always_inline void member_add(const struct sessions *all, __u32 slot, __u32 tgid,
				       __u32 born, const struct member *member)
{
	void *map = map_of_session(members, slot);
	__u64 key = tgid;
	int error;

	if (!map)
		return;
	error = bpf_map_update_elem(map, &key, member, BPF_ANY);
	if (error) {
		account_error(slot, error);
		return;
	}
	if (!(all->host & session_bit(slot))) /* those that watch every process look at no hint */
		hint_at(tgid);
	tell_change(all, slot, tgid, born, CHANGE_FOUND, member);
}

#define NO_MEMBER -1

/*
 * In which state session SLOT watches the current process, TGID, or NO_MEMBER. A session that
 * watches every process learns of it here, so that user space can name it.
 */
SUBPROGRAM int state_in_session(__u32 slot, __u32 tgid)
{
	struct member *member = member_of(slot, tgid), found = {.state = MEMBER_ACTIVE};
	struct sessions *all = all_sessions();
	struct task_struct *leader;

	if (member)
		return member->state;
	if (!all || !(all->host & session_bit(slot)) || is_ending())
		return NO_MEMBER;
	leader = kernel_read(this_task(), group_leader);
	kernel_read_string(&found.comm, leader, comm);
	member_add(all, slot, tgid, born_of(leader), &found);
	return MEMBER_ACTIVE;
}

/* Those of SESSIONS that watch the current process, TGID, in this STATE. */
SUBPROGRAM __u64 sessions_in_state(__u64 sessions, __u32 tgid, int state)
{
	__u64 found = 0;

	for_each_session (slot, sessions) {
		if (state_in_session(slot, tgid) == state)
			found |= session_bit(slot);
	}
	return found;
}
