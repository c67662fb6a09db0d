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

struct task_struct {
	struct thread_info thread_info;
	int pid;
	int tgid;
	unsigned int flags;
	struct task_struct *group_leader;
	struct signal_struct *signal;
	char comm[COMM_BYTES];
};

#pragma clang attribute pop
#endif

static __always_inline struct task_struct *this_task(void)
{
	return (struct task_struct *)bpf_get_current_task();
}

#define PF_KTHREAD 0x00200000

static __always_inline bool in_kernel_thread(void)
{
	return kernel_read(this_task(), flags) & PF_KTHREAD;
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
