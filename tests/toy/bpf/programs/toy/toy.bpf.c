// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Counts the children that watched processes fork. For sessions that want single events, sends a
 * record of each fork instead.
 */
#include "include/kernel.bpf.h"
#include "include/account.bpf.h"
#include "include/maps.bpf.h"
#include "include/records.bpf.h"
#include "include/sessions.bpf.h"
#include "include/targets.bpf.h"

enum record_kind {
	RECORD_TOY_FORK = 1,
};

struct toy_fork {
	struct record_head head;
	__u64 time_ns;
	__u32 pid;
	__u32 child_pid;
	__u32 comm; /* for user space to fill in */
	__u32 reserved;
	char name[COMM_BYTES]; /* the process may have ended by then */
};

struct toy_session {
	__u8 single_events;
};

MAP(ARRAY, toy_sessions, __u32, struct toy_session, SESSIONS, 0);
/* By process: its id, and when it was born in the upper half. */
SESSION_MAPS(HASH, forks, __u64, __u64, 1024, BPF_F_NO_PREALLOC);
IN_BTF(struct toy_fork, toy_fork);
IN_BTF(enum record_kind, record_kind);

static __always_inline void count(__u32 slot, __u64 process)
{
	void *map = map_of_session(forks, slot);
	__u64 none = 0, *count;

	if (!map)
		return;
	count = map_lookup_or_account(slot, map, &process, &none);
	if (count)
		__sync_fetch_and_add(count, 1);
}

static __always_inline void see_in_session(void *ctx, __u32 slot, __u64 process, __u32 child_pid)
{
	struct toy_session *session = bpf_map_lookup_elem(map_of(toy_sessions), &slot);
	struct toy_fork fork = {
	    .head.kind = RECORD_TOY_FORK,
	    .time_ns = bpf_ktime_get_ns(),
	    .pid = process,
	    .child_pid = child_pid,
	};

	if (!session)
		return;
	if (!session->single_events) {
		count(slot, process);
		return;
	}
	bpf_get_current_comm(fork.name, sizeof(fork.name));
	record_send(ctx, slot, &fork, sizeof(fork));
}

SEC("raw_tp/sched_process_fork")
int RAW_PROGRAM(coral_toy, struct task_struct *parent, struct task_struct *child)
{
	__u32 tgid = current_tgid(), child_tgid = kernel_read(child, tgid);
	struct sessions *all = all_sessions();
	__u64 process, watching;

	if (!all || child_tgid == tgid || surely_unwatched_here(all, tgid))
		return 0;
	process = process_of(tgid, born_of(kernel_read(this_task(), group_leader)));
	watching = sessions_in_state(sessions_of_hub(all), tgid, MEMBER_ACTIVE);
	for_each_session (slot, watching) {
		see_in_session(ctx, slot, process, child_tgid);
	}
	return 0;
}

LICENSED_AS("GPL");
