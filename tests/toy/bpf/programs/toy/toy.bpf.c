// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Counts the children that watched processes fork. Or, where single events are wanted, writes a
 * record of each fork into the ring.
 */
#include "include/kernel.bpf.h"
#include "include/account.bpf.h"
#include "include/maps.bpf.h"
#include "include/records.bpf.h"
#include "include/targets.bpf.h"

struct toy_fork {
	__u64 time_ns;
	__u32 pid;
	__u32 child_pid;
	__u32 comm; /* for user space to fill in */
	__u32 reserved;
};

OPTION(bool, single_events, false);
MAP(HASH, forks, __u32, __u64, 1024, BPF_F_NO_PREALLOC); /* by tgid */
IN_BTF(struct toy_fork, toy_fork);

static __always_inline int on_toy(void *ctx, struct task_struct *child)
{
	struct toy_fork fork = {.pid = current_tgid(), .child_pid = kernel_read(child, tgid)};
	__u64 none = 0, *count;
	struct target *target;

	if (fork.child_pid == fork.pid || surely_no_target(fork.pid) || cgroup_excludes_current())
		return 0;
	target = target_of_current(fork.pid);
	if (!target || target->state != TARGET_ACTIVE)
		return 0;
	if (option(single_events)) {
		fork.time_ns = bpf_ktime_get_ns();
		record_send(ctx, &fork, sizeof(fork));
		return 0;
	}
	count = map_lookup_or_init(map_of(forks), &fork.pid, &none);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		account_map_full();
	return 0;
}

SEC("raw_tp/sched_process_fork")
int RAW_PROGRAM(coral_toy, struct task_struct *parent, struct task_struct *child)
{
	return on_toy(ctx, child);
}

LICENSED_AS("GPL");
