/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: the processes that a collector watches. User space fills the map at the start; from
 * then on these programs maintain it. A child of a target becomes a target before its first
 * instruction, a process that execs gets its new name, and a process that exits is marked, so that
 * user space removes it once its last figures are read.
 */
#pragma once

#include "kernel.bpf.h"

enum {
	SELECT_HOST,	/* every process */
	SELECT_TARGETS, /* the processes in the targets map */
	SELECT_CGROUP,	/* the processes in or below the cgroup (v2) in slot 0 of `cgroups` */
};

enum {
	TARGET_ACTIVE,
	TARGET_ARMED,  /* becomes active at its next successful exec, which counts */
	TARGET_EXITED, /* its last thread has exited */
};

struct target {
	char comm[COMM_BYTES];
	__u32 state;
	__u32 reserved;
};

OPTION(__u32, selection, SELECT_TARGETS);
OPTION(bool, follow_children, true);
OPTION(bool, active_at_exec, false); /* the collector does not count the exec itself */
OPTION(bool, select_comm, false);    /* adopt processes that exec to the name below */
OPTION(__u64, wanted_comm_low, 0);
OPTION(__u64, wanted_comm_high, 0);

MAP(HASH, targets, __u32, struct target, 10240, BPF_F_NO_PREALLOC); /* by tgid */
MAP(CGROUP_ARRAY, cgroups, __u32, __u32, 1, 0);

/*
 * The only cost for processes that are not watched is one lookup here: the byte of every target is
 * set, so a byte that is clear belongs to no target. Bytes are never cleared. They are bytes and
 * not bits, so that user space and programs can set them without synchronization.
 */
#define TARGET_HINTS 65536
GLOBALS(__u8, target_hints, TARGET_HINTS);

/* Targets for which the map had no room: the collector sees nothing of these processes. */
GLOBAL(__u64, targets_full);

static __always_inline bool surely_no_target(__u32 tgid)
{
	volatile __u8 *hint;

	if (option(selection) != SELECT_TARGETS)
		return false;
	hint = element(target_hints, tgid % TARGET_HINTS);
	return hint && !*hint;
}

static __always_inline struct target *target_add(__u32 tgid, struct target *target)
{
	volatile __u8 *hint = element(target_hints, tgid % TARGET_HINTS);
	volatile __u64 *full = global(targets_full);

	if (hint)
		*hint = 1;
	if (bpf_map_update_elem(map_of(targets), &tgid, target, BPF_ANY) && full)
		__sync_fetch_and_add(full, 1);
	return bpf_map_lookup_elem(map_of(targets), &tgid);
}

/*
 * The target that the current task belongs to, or NULL. Where single processes are not selected, a
 * process is added when it is first seen, so that user space can name it.
 */
static __always_inline struct target *target_of_current(__u32 tgid)
{
	struct target *target = bpf_map_lookup_elem(map_of(targets), &tgid);
	struct target found = {.state = TARGET_ACTIVE};

	if (target || option(selection) == SELECT_TARGETS)
		return target;
	kernel_read_string(&found.comm, kernel_read(this_task(), group_leader), comm);
	return target_add(tgid, &found);
}

static __always_inline bool cgroup_excludes_current(void)
{
	return option(selection) == SELECT_CGROUP &&
	       bpf_current_task_under_cgroup(map_of(cgroups), 0) != 1;
}

/* The current process forks; the child has its parent's name until it execs. */
static __always_inline int on_fork(__u32 child_tgid)
{
	__u32 parent_tgid = current_tgid();
	struct target *parent, child = {};

	if (option(selection) != SELECT_TARGETS || !option(follow_children) ||
	    surely_no_target(parent_tgid))
		return 0;
	parent = bpf_map_lookup_elem(map_of(targets), &parent_tgid);
	if (!parent)
		return 0;
	child.state = parent->state;
	bpf_get_current_comm(child.comm, sizeof(child.comm));
	target_add(child_tgid, &child);
	return 0;
}

static __always_inline bool comm_is_wanted(const struct target *target)
{
	const __u64 *comm = (const __u64 *)target->comm;

	return comm[0] == option(wanted_comm_low) && comm[1] == option(wanted_comm_high);
}

static __always_inline int on_exec(void)
{
	__u32 tgid = current_tgid();
	struct target *target = bpf_map_lookup_elem(map_of(targets), &tgid);
	struct target named = {.state = TARGET_ACTIVE};

	if (target) {
		bpf_get_current_comm(target->comm, sizeof(target->comm));
		if (option(active_at_exec))
			target->state = TARGET_ACTIVE;
	} else if (option(select_comm)) {
		bpf_get_current_comm(named.comm, sizeof(named.comm));
		if (comm_is_wanted(&named))
			target_add(tgid, &named);
	}
	return 0;
}

/* Runs once per thread; the kernel has already subtracted the thread from signal->live. */
static __always_inline int on_exit(void)
{
	__u32 tgid = current_tgid();
	struct target *target;

	if (kernel_read(kernel_read(this_task(), signal), live.counter) > 0)
		return 0;
	target = bpf_map_lookup_elem(map_of(targets), &tgid);
	if (target)
		target->state = TARGET_EXITED;
	return 0;
}

static __always_inline int on_task_fork(struct task_struct *child)
{
	__u32 tgid = kernel_read(child, tgid);

	/* A new thread already belongs to its process. */
	return tgid == current_tgid() ? 0 : on_fork(tgid);
}

SEC("raw_tp/sched_process_fork")
int RAW_PROGRAM(coral_fork, struct task_struct *parent, struct task_struct *child)
{
	return on_task_fork(child);
}

SEC("raw_tp/sched_process_exec")
int RAW_PROGRAM(coral_exec, void *task)
{
	return on_exec();
}

SEC("raw_tp/sched_process_exit")
int RAW_PROGRAM(coral_gone, void *task)
{
	return on_exit();
}
