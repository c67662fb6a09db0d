// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * The record of `syscall_stats` for each call of one number by one process, into the ring buffer or
 * into the perf buffer, and nothing beside it: what is left to measure is the buffer and its drain.
 */
#include "include/kernel.bpf.h"
#include "include/account.bpf.h"
#include "include/records.bpf.h"

OPTION(__u32, wanted_tgid, 0);
OPTION(__u32, wanted_nr, 0);

enum record_kind {
	RECORD_CALL = 1,
};

struct call {
	struct record_head head;
	__u64 ended_ns; /* CLOCK_MONOTONIC */
	__u64 duration_ns;
	__s64 return_value;
	__u32 pid;
	__u32 tid;
	__u32 syscall_number;
	__u32 reserved[3];
};

IN_BTF(struct call, call);
IN_BTF(enum record_kind, record_kind);

MAP(TASK_STORAGE, start_ns, int, __u64, 0, BPF_F_NO_PREALLOC);

static __always_inline void send(void *ctx, struct task_struct *task, __u64 start, long ret)
{
	struct call call = {
	    .head.kind = RECORD_CALL,
	    .ended_ns = bpf_ktime_get_ns(),
	    .return_value = ret,
	    .pid = task->tgid,
	    .tid = task->pid,
	    .syscall_number = wanted_nr,
	};

	call.duration_ns = call.ended_ns - start;
	record_send(ctx, 0, &call, sizeof(call));
}

SEC("tp_btf/sys_enter")
int RAW_PROGRAM(drain_enter, void *regs, long id)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u64 *start;

	if (task->tgid != wanted_tgid || id != wanted_nr)
		return 0;
	start = bpf_task_storage_get(&start_ns, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (start)
		*start = bpf_ktime_get_ns();
	return 0;
}

SEC("tp_btf/sys_exit")
int RAW_PROGRAM(drain_exit, void *regs, long ret)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u64 *start;

	if (task->tgid != wanted_tgid)
		return 0;
	start = bpf_task_storage_get(&start_ns, task, 0, 0);
	if (!start || !*start)
		return 0;
	send(ctx, task, *start, ret);
	*start = 0;
	return 0;
}

LICENSED_AS("GPL");
