/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * The kernel as the programs see it: the helpers, and each kernel type with only the members that
 * the programs use. libbpf finds their true offsets on the running kernel (preserve_access_index);
 * bcc takes the types from the kernel's own headers.
 */
#pragma once

#include "portable.bpf.h"

#define COMM_BYTES 16

#ifndef CORAL_BCC
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	int counter;
} atomic_t;

struct thread_info {
	unsigned long flags;
	__u32 status; /* x86 only */
};

struct signal_struct {
	atomic_t live;
};

struct kernfs_node {
	__u64 id;
};

struct cgroup;

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	struct cgroup_subsys_state *parent;
};

struct cgroup_root {
	int hierarchy_id;
};

struct cgroup {
	struct cgroup_subsys_state self;
	struct kernfs_node *kn;
	struct cgroup_root *root;
};

struct css_set {
	struct cgroup_subsys_state *subsys[1]; /* as many as the kernel has controllers */
	struct cgroup *dfl_cgrp;
};

enum cgroup_subsys_id {
	memory_cgrp_id,
};

struct task_struct {
	struct thread_info thread_info;
	int pid;
	int tgid;
	unsigned int flags;
	struct task_struct *group_leader;
	struct signal_struct *signal;
	struct css_set *cgroups;
	__u64 start_time;
	char comm[COMM_BYTES];
};

struct pt_regs {
#if defined(__TARGET_ARCH_x86)
	unsigned long orig_ax;
#elif defined(__TARGET_ARCH_arm64)
	int syscallno;
#endif
};

#pragma clang attribute pop
#endif

static __always_inline struct task_struct *this_task(void)
{
	return (struct task_struct *)bpf_get_current_task();
}

#ifndef CORAL_BCC
#define PF_EXITING   0x00000004
#define PF_IO_WORKER 0x00000010 /* a thread of io_uring in the process that uses it */
#define PF_KTHREAD   0x00200000
#endif

static __always_inline bool in_kernel_thread(void)
{
	return kernel_read(this_task(), flags) & PF_KTHREAD;
}

/* Whether TASK has begun to end. Its process's files are closed after sched_process_exit, when the
 * process is no target any more. */
static __always_inline bool task_is_ending(struct task_struct *task)
{
	return kernel_read(task, flags) & PF_EXITING;
}

static __always_inline bool is_ending(void)
{
	return task_is_ending(this_task());
}

/*
 * The current thread, looked up once per run of a program. Where the kernel provides it as a typed
 * pointer (5.11), members are plain loads; otherwise the ids come from a helper, and members from
 * kernel_read.
 */
struct thread {
	struct task_struct *task;
	__u32 tgid;
	__u32 tid;
};

OPTION(bool, current_by_btf, false);

static __always_inline struct thread current_thread(void)
{
	struct thread thread = {};
	__u64 ids;

#ifndef CORAL_BCC
	if (option(current_by_btf)) {
		thread.task = bpf_get_current_task_btf();
		thread.tgid = thread.task->tgid;
		thread.tid = thread.task->pid;
		return thread;
	}
#endif
	ids = bpf_get_current_pid_tgid();
	thread.tgid = ids >> 32;
	thread.tid = ids;
	return thread;
}

static __always_inline __u32 current_tgid(void)
{
	return bpf_get_current_pid_tgid() >> 32;
}

/* When a process began, in microseconds modulo 2^32: tells it from others that have had its id.
 * LEADER is its first thread. Never 0. */
static __always_inline __u32 born_of(struct task_struct *leader)
{
	return (kernel_read(leader, start_time) >> 10) | 1;
}

/* Cgroups. */

static __always_inline int hierarchy_of(struct cgroup *cgroup)
{
	return kernel_read(kernel_read(cgroup, root), hierarchy_id);
}

static __always_inline __u64 id_of_cgroup(struct cgroup *cgroup)
{
	return kernel_read(kernel_read(cgroup, kn), id);
}

/* 0 for the root of a hierarchy. */
static __always_inline __u64 id_of_parent(struct cgroup *cgroup)
{
	struct cgroup_subsys_state *parent = kernel_read(cgroup, self.parent);

	return parent ? id_of_cgroup(kernel_read(parent, cgroup)) : 0;
}

/* The id of the cgroup of a task in a hierarchy: in the unified one, whose number is 0, or in that
 * of the memory controller. */
static __always_inline __u64 cgroup_of(struct task_struct *task, int hierarchy)
{
	struct css_set *set = kernel_read(task, cgroups);
	struct cgroup_subsys_state *state = NULL;
	int memory = 0;

	if (!hierarchy)
		return id_of_cgroup(kernel_read(set, dfl_cgrp));
#ifdef CORAL_BCC
#ifdef CONFIG_MEMCG
	memory = memory_cgrp_id;
#endif
#else
	if (bpf_core_enum_value_exists(enum cgroup_subsys_id, memory_cgrp_id))
		memory = bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id);
#endif
	bpf_probe_read_kernel(&state, sizeof(state), field_of(set, subsys) + memory);
	return state ? id_of_cgroup(kernel_read(state, cgroup)) : 0;
}
