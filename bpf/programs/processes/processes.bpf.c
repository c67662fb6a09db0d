// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Keeps the processes that the sessions watch: a child of a watched process is watched before its
 * first instruction, a process that takes a wanted name or enters a wanted cgroup from then on, and
 * a process that has ended no more, so that its id can go to another one.
 */
#include "include/kernel.bpf.h"
#include "include/sessions.bpf.h"
#include "include/targets.bpf.h"

/* By slot: the command name of the processes to watch, as two words padded with zeros. */
struct wanted_comm {
	__u64 words[COMM_BYTES / 8];
};

MAP(ARRAY, wanted_comms, __u32, struct wanted_comm, SESSIONS, 0);

/* By slot: the ids of the cgroups whose processes to watch. A cgroup made below one of them, or
 * again at the path of the first, is added. */
SESSION_MAPS(HASH, cgroups, __u64, __u8, 4096, BPF_F_NO_PREALLOC);

#define PATH_BYTES 256

struct cgroup_path {
	__u64 words[PATH_BYTES / 8];
};

MAP(ARRAY, cgroup_paths, __u32, struct cgroup_path, SESSIONS, 0);

static __always_inline bool comm_is_wanted(__u32 slot, const char *comm)
{
	struct wanted_comm *wanted = bpf_map_lookup_elem(map_of(wanted_comms), &slot);
	const __u64 *words = (const __u64 *)comm;

	return wanted && words[0] == wanted->words[0] && words[1] == wanted->words[1];
}

static __always_inline bool cgroup_is_wanted(__u32 slot, __u64 id)
{
	void *map = map_of_session(cgroups, slot);

	return map && bpf_map_lookup_elem(map, &id);
}

/* The state in which session SLOT watches a child of the process PARENT, or -1 if it does not. */
static __always_inline int state_of_child(const struct sessions *all, __u32 slot, __u32 parent,
					  const char *comm, __u64 cgroup)
{
	__u64 bit = session_bit(slot);
	struct member *member = all->follow & bit ? member_of(slot, parent) : NULL;

	if (member)
		return member->state;
	if (all->comm & bit && comm_is_wanted(slot, comm))
		return MEMBER_ACTIVE;
	if (all->cgroup & bit && cgroup_is_wanted(slot, cgroup))
		return MEMBER_ACTIVE;
	return -1;
}

/* The child has its parent's name until it execs. */
SEC("raw_tp/sched_process_fork")
int RAW_PROGRAM(coral_fork, struct task_struct *parent, struct task_struct *child)
{
	__u32 tgid = kernel_read(child, tgid), parent_tgid = current_tgid();
	struct sessions *all = all_sessions();
	struct member member = {};
	__u64 mask, cgroup = 0;
	int state;

	if (!all || tgid == parent_tgid) /* a thread */
		return 0;
	mask = all->comm | all->cgroup;
	if (!surely_unwatched(all, parent_tgid))
		mask |= all->follow & ~all->host;
	if (!mask)
		return 0;
	bpf_get_current_comm(member.comm, sizeof(member.comm));
	if (all->cgroup)
		cgroup = cgroup_of(child, all->hierarchy);
	for_each_session (slot, mask) {
		state = state_of_child(all, slot, parent_tgid, member.comm, cgroup);
		if (state < 0)
			continue;
		member.state = state;
		member_add(ctx, all, slot, tgid, born_of(child), &member);
	}
	return 0;
}

/* An exec counts as a change of name too. Both come before the new program's first instruction. */
SEC("raw_tp/task_rename")
int RAW_PROGRAM(coral_rename, struct task_struct *task, const char *comm)
{
	struct member named = {.state = MEMBER_ACTIVE};
	struct sessions *all = all_sessions();
	__u32 tgid = kernel_read(task, tgid);
	struct member *member;
	__u64 mask;

	if (!all || kernel_read(task, pid) != tgid) /* the name of a thread */
		return 0;
	mask = surely_unwatched(all, tgid) ? all->comm : all->all;
	if (!mask)
		return 0;
	read_kernel_string(&named.comm, comm);
	for_each_session (slot, mask) {
		member = member_of(slot, tgid);
		if (member) {
			__builtin_memcpy(member->comm, named.comm, COMM_BYTES);
			tell_change(ctx, all, slot, tgid, born_of(task), CHANGE_NAMED, named.comm);
		} else if (all->comm & session_bit(slot) && comm_is_wanted(slot, named.comm)) {
			member_add(ctx, all, slot, tgid, born_of(task), &named);
			generation_advance();
		}
	}
	return 0;
}

SEC("raw_tp/sched_process_exec")
int RAW_PROGRAM(coral_exec, struct task_struct *task)
{
	struct sessions *all = all_sessions();
	__u32 tgid = current_tgid();
	struct member *member;

	if (!all || surely_unwatched(all, tgid))
		return 0;
	for_each_session (slot, all->all) {
		member = member_of(slot, tgid);
		if (member && member->state == MEMBER_ARMED) {
			member->state = MEMBER_ACTIVE;
			generation_advance();
		}
	}
	return 0;
}

static __always_inline void member_remove(void *ctx, const struct sessions *all, __u32 slot,
					  __u32 tgid, __u32 born)
{
	void *map = map_of_session(members, slot);
	struct member *member, last;
	__u64 key = tgid;

	member = map ? bpf_map_lookup_elem(map, &key) : NULL;
	if (!member)
		return;
	last = *member;
	if (bpf_map_delete_elem(map, &key)) /* the other of two last threads has removed it */
		return;
	tell_change(ctx, all, slot, tgid, born, CHANGE_ENDED, last.comm);
	if (all->detailed & session_bit(slot))
		return;
	key = key_of_ended(tgid, born);
	bpf_map_update_elem(map, &key, &last, BPF_ANY);
}

/* Runs once for each thread; the kernel has already subtracted the thread from signal->live. */
SEC("raw_tp/sched_process_exit")
int RAW_PROGRAM(coral_exit, struct task_struct *task)
{
	struct sessions *all = all_sessions();
	__u32 tgid = current_tgid();
	__u32 born;

	if (!all || surely_unwatched(all, tgid) ||
	    kernel_read(kernel_read(this_task(), signal), live.counter) > 0)
		return 0;
	born = born_of(kernel_read(this_task(), group_leader));
	for_each_session (slot, all->all) {
		member_remove(ctx, all, slot, tgid, born);
	}
	return 0;
}

/* A process, or one thread of it, has moved to the cgroup TO. */
SEC("raw_tp/cgroup_attach_task")
int RAW_PROGRAM(coral_attach, struct cgroup *to, const char *path, struct task_struct *task,
		bool whole)
{
	struct member moved = {.state = MEMBER_ACTIVE};
	struct sessions *all = all_sessions();
	__u32 tgid = kernel_read(task, tgid), born;
	struct task_struct *leader;
	struct member *member;
	__u64 id;

	if (!all || !all->cgroup || hierarchy_of(to) != all->hierarchy)
		return 0;
	id = id_of_cgroup(to);
	leader = kernel_read(task, group_leader);
	born = born_of(leader);
	kernel_read_string(&moved.comm, leader, comm);
	for_each_session (slot, all->cgroup) {
		member = member_of(slot, tgid);
		if (cgroup_is_wanted(slot, id)) {
			if (member)
				continue;
			member_add(ctx, all, slot, tgid, born, &moved);
			generation_advance();
		} else if (member && member->state == MEMBER_ACTIVE &&
			   kernel_read(task, pid) == tgid) {
			member_remove(ctx, all, slot, tgid, born);
			generation_advance();
		}
	}
	return 0;
}

static __always_inline bool path_is_wanted(__u32 slot, const struct cgroup_path *path)
{
	struct cgroup_path *wanted = bpf_map_lookup_elem(map_of(cgroup_paths), &slot);
	__u64 differ = 0;

	if (!wanted || !wanted->words[0])
		return false;
	for (int at = 0; at < PATH_BYTES / 8; at++)
		differ |= wanted->words[at] ^ path->words[at];
	return !differ;
}

SEC("raw_tp/cgroup_mkdir")
int RAW_PROGRAM(coral_mkdir, struct cgroup *made, const char *path)
{
	struct sessions *all = all_sessions();
	struct cgroup_path at = {};
	__u64 id, parent;
	__u8 wanted = 1;
	void *map;
	long error;

	if (!all || !all->cgroup || hierarchy_of(made) != all->hierarchy)
		return 0;
	id = id_of_cgroup(made);
	parent = id_of_parent(made);
	read_kernel_string(&at, path);
	for_each_session (slot, all->cgroup) {
		if (!cgroup_is_wanted(slot, parent) && !path_is_wanted(slot, &at))
			continue;
		map = map_of_session(cgroups, slot);
		error = map ? bpf_map_update_elem(map, &id, &wanted, BPF_ANY) : 0;
		if (error)
			account_error(slot, error);
	}
	return 0;
}

LICENSED_AS("GPL");
