/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: which processes a collector watches. User space fills the map at the start; from then
 * on these programs keep it: a child of a target becomes one before its first instruction, a
 * process that execs gets its new name, one that has ended is marked, for user space to remove
 * once its last figures are read.
 */
#pragma once

#include "kernel.bpf.h"

enum {
	SELECT_HOST,	/* every process */
	SELECT_TARGETS, /* the processes in the targets map */
	SELECT_CGROUP,	/* the processes below the cgroup (v2) in slot 0 of the cgroups map */
};

enum {
	TARGET_ACTIVE,
	TARGET_ARMED,  /* becomes active with its next successful exec, which is counted */
	TARGET_EXITED, /* its last thread has ended */
};

struct target {
	char comm[COMM_BYTES];
	__u32 state;
	__u32 reserved;
};

const volatile __u32 selection = SELECT_TARGETS;
const volatile bool follow_children = true;
const volatile bool select_comm = false;	   /* adopt what execs to this name */
const volatile char wanted_comm[COMM_BYTES] = {0}; /* padded with zeros */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 10240);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32); /* tgid */
	__type(value, struct target);
} targets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_CGROUP_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} cgroups SEC(".maps");

/*
 * What every process of the machine pays is one look here: a target's byte is set, so a byte that
 * is not set is no target's. It is never cleared; bytes, not bits, so that user space and programs
 * can set them without seeing each other.
 */
#define TARGET_HINTS 65536
__u8 target_hints[TARGET_HINTS] = {0};

/* Targets that did not fit: each is a process of which nothing is seen. */
__u64 targets_full = 0;

static __always_inline bool surely_no_target(__u32 tgid)
{
	return selection == SELECT_TARGETS && !target_hints[tgid % TARGET_HINTS];
}

static __always_inline struct target *target_add(struct task_struct *leader, __u32 tgid,
						 __u32 state)
{
	struct target target = {.state = state};

	BPF_CORE_READ_STR_INTO(&target.comm, leader, comm);
	target_hints[tgid % TARGET_HINTS] = 1;
	if (bpf_map_update_elem(&targets, &tgid, &target, BPF_ANY))
		__sync_fetch_and_add(&targets_full, 1);
	return bpf_map_lookup_elem(&targets, &tgid);
}

/*
 * The target that the current task belongs to, or NULL. In a mode that does not ask for single
 * processes, the first sight of one adds it, so that user space can name it.
 */
static __always_inline struct target *target_of(struct task_struct *task)
{
	__u32 tgid = task->tgid;
	struct target *target = bpf_map_lookup_elem(&targets, &tgid);

	if (target || selection == SELECT_TARGETS)
		return target;
	return target_add(BPF_CORE_READ(task, group_leader), tgid, TARGET_ACTIVE);
}

static __always_inline bool cgroup_excludes_current(void)
{
	return selection == SELECT_CGROUP && bpf_current_task_under_cgroup(&cgroups, 0) != 1;
}

static __always_inline int on_fork(struct task_struct *parent, struct task_struct *child)
{
	__u32 parent_tgid = BPF_CORE_READ(parent, tgid);
	__u32 child_tgid = BPF_CORE_READ(child, tgid);
	struct target *target;

	if (selection != SELECT_TARGETS || !follow_children || parent_tgid == child_tgid)
		return 0; /* a new thread belongs to its process already */
	target = bpf_map_lookup_elem(&targets, &parent_tgid);
	if (target)
		target_add(child, child_tgid, target->state);
	return 0;
}

static __always_inline bool comm_is_wanted(const char *comm)
{
	for (int i = 0; i < COMM_BYTES; i++) {
		if (comm[i] != wanted_comm[i])
			return false;
		if (!comm[i])
			return true;
	}
	return true;
}

static __always_inline int on_exec(struct task_struct *task)
{
	__u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct target *target = bpf_map_lookup_elem(&targets, &tgid);
	struct target named = {};

	if (target) {
		BPF_CORE_READ_STR_INTO(&target->comm, task, comm);
	} else if (select_comm) {
		BPF_CORE_READ_STR_INTO(&named.comm, task, comm);
		if (comm_is_wanted(named.comm))
			target_add(task, tgid, TARGET_ACTIVE);
	}
	return 0;
}

/* Runs once for each thread; the kernel has taken the thread out of signal->live before. */
static __always_inline int on_exit(struct task_struct *task)
{
	__u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct target *target;

	if (BPF_CORE_READ(task, signal, live.counter) > 0)
		return 0;
	target = bpf_map_lookup_elem(&targets, &tgid);
	if (target)
		target->state = TARGET_EXITED;
	return 0;
}

SEC("tp_btf/sched_process_fork")
int BPF_PROG(coral_fork_btf, struct task_struct *parent, struct task_struct *child)
{
	return on_fork(parent, child);
}

SEC("raw_tp/sched_process_fork")
int BPF_PROG(coral_fork_raw, struct task_struct *parent, struct task_struct *child)
{
	return on_fork(parent, child);
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(coral_exec_btf, struct task_struct *task)
{
	return on_exec(task);
}

SEC("raw_tp/sched_process_exec")
int BPF_PROG(coral_exec_raw, struct task_struct *task)
{
	return on_exec(task);
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(coral_gone_btf, struct task_struct *task)
{
	return on_exit(task);
}

SEC("raw_tp/sched_process_exit")
int BPF_PROG(coral_gone_raw, struct task_struct *task)
{
	return on_exit(task);
}
