/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * The kernel as the programs see it: the helpers, and of each kernel type only the members that
 * are touched. libbpf finds their true offsets on the running kernel (preserve_access_index); bcc
 * takes the types from the kernel's own headers.
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

/* The current task can be had as BTF describes it (5.11): that call is inlined where the next is
 * not, and saves some 25 ns a look. */
OPTION(bool, current_by_btf, false);

static __always_inline __u32 current_tgid(void)
{
#ifndef CORAL_BCC
	if (option(current_by_btf))
		return bpf_get_current_task_btf()->tgid;
#endif
	return bpf_get_current_pid_tgid() >> 32;
}

static __always_inline __u32 current_tid(void)
{
#ifndef CORAL_BCC
	if (option(current_by_btf))
		return bpf_get_current_task_btf()->pid;
#endif
	return bpf_get_current_pid_tgid();
}
