// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * One empty program for each kind of hook: a kernel that loads and attaches it supports that kind.
 * bpf_fentry_test1 is a kernel function that exists for trying fentry; nothing else calls it.
 */
#include "include/kernel.bpf.h"
#include "include/sessions.bpf.h"

struct bpf_map;

MAP(HASH, coral_p_map, __u32, __u32, 8, 0);

/* What an iterator writes has a type. */
struct coral_p_record {
	__u32 value;
};

IN_BTF(struct coral_p_record, coral_p_record);

/* libbpf asks the kernel once for all whether it has global data, when an object first has some.
 * That is to be now: of a question that fails for want of memory it never asks again. */
OPTION(__u32, coral_p_option, 1);
GLOBAL(__u32, coral_p_global);
GLOBAL(__u64, coral_p_mask);

SEC("raw_tp/sched_process_exec") /* loaded as tp_btf, too */
int RAW_PROGRAM(coral_p_raw_tp, void *task)
{
	return 0;
}

/* A map for each session, and a loop over the sessions of a mask (5.3). */
SESSION_MAPS(HASH, coral_p_maps, __u32, __u32, 8, 0);

SEC("raw_tp/sched_process_exec")
int RAW_PROGRAM(coral_p_sessions, void *task)
{
	volatile __u64 *mask = global(coral_p_mask);
	__u32 zero = 0, slot;
	void *map;

	if (!mask)
		return 0;
	for (slot = 0; slot < SESSIONS; slot++) {
		if (!(*mask >> slot & 1))
			continue;
		map = map_of_session(coral_p_maps, slot);
		if (map)
			bpf_map_lookup_elem(map, &zero);
	}
	return 0;
}

/* The kernel had the map for security modules alone before it had it for tracing (5.13). Only the
 * probe that loads this program makes it. */
MAP(TASK_STORAGE, coral_p_storage, int, __u32, 0, BPF_F_NO_PREALLOC);

SEC("raw_tp/sched_process_exec")
int RAW_PROGRAM(coral_p_task_storage, void *task)
{
	bpf_task_storage_get(map_of(coral_p_storage), bpf_get_current_task_btf(), 0,
			     BPF_LOCAL_STORAGE_GET_F_CREATE);
	return 0;
}

SEC("kprobe/bpf_fentry_test1")
int PROGRAM(coral_p_kprobe, void *ctx)
{
	return 0;
}

SEC("fentry/bpf_fentry_test1")
int PROGRAM(coral_p_fentry, void *ctx)
{
	return 0;
}

/* Kernels may load one type of iterator and refuse another: each that a collector uses is tried. */
SEC("iter/task_file")
int PROGRAM(coral_p_iter, void *ctx)
{
	return 0;
}

SEC("iter/bpf_map_elem")
int PROGRAM(coral_p_map_iter, void *ctx)
{
	return 0;
}

/* User space runs it, and it calls a function for each element of a map. */
static long coral_p_element(struct bpf_map *map, __u32 *key, __u32 *value, void *ctx)
{
	return 0;
}

SEC("syscall")
int PROGRAM(coral_p_syscall, void *ctx)
{
	bpf_for_each_map_elem(map_of(coral_p_map), coral_p_element, NULL, 0);
	return 0;
}

/* The kernel tells programs of each use of a socket (6.3). */
SEC("raw_tp/sock_send_length")
int RAW_PROGRAM(coral_p_sent, void *sk)
{
	return 0;
}

SEC("raw_tp/sock_recv_length")
int RAW_PROGRAM(coral_p_received, void *sk)
{
	return 0;
}

/* The kernel calls a function of the program again and again (5.17). */
static long coral_p_turn(__u32 turn, void *ctx)
{
	return 0;
}

SEC("raw_tp/sched_process_exec")
int RAW_PROGRAM(coral_p_loop, void *task)
{
	bpf_loop(2, coral_p_turn, NULL, 0);
	return 0;
}

/* At a function of user space. */
SEC("uprobe")
int PROGRAM(coral_p_uprobe, void *ctx)
{
	return 0;
}

/* A timer's interrupt runs a program, which looks into a map and sends something. */
SEC("perf_event")
int PROGRAM(coral_p_sample, void *ctx)
{
	__u32 zero = 0;

	bpf_map_lookup_elem(map_of(coral_p_map), &zero);
	return 0;
}

LICENSED_AS("GPL");
