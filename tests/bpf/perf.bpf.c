// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * For the tests of the perf buffer's drain: one record for each getppid of a few processes,
 * numbered on each CPU. Records that the perf buffer refuses are counted.
 */
#include "include/records.bpf.h"

#if defined(__TARGET_ARCH_x86)
#define NR_GETPPID 110
#else
#define NR_GETPPID 173
#endif

#define MAX_CPUS      256
#define MAX_PROCESSES 4

enum record_kind {
	RECORD_RECORD = 1,
};

struct record {
	struct record_head head;
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u64 seq;     /* counts on each CPU, refused records included */
	__u32 tgid;
	__u32 cpu;
	char name[8];
};

struct longer_record {
	struct record record;
	__u64 more;
};

const volatile __u32 wanted_tgids[MAX_PROCESSES] = {0};
const volatile bool longer = false;

__u64 produced[MAX_CPUS] = {0};
__u64 lost = 0;

/* One entry for each CPU; libbpf sets their number. */
struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8);
	__type(key, __u64);
	__type(value, __u32);
} no_events SEC(".maps");

IN_BTF(struct record, record);
IN_BTF(enum record_kind, record_kind);

static __always_inline bool is_wanted(__u32 tgid)
{
	for (int i = 0; i < MAX_PROCESSES; i++)
		if (wanted_tgids[i] == tgid)
			return true;
	return false;
}

SEC("raw_tp/sys_enter")
int perf_enter(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 tgid = bpf_get_current_pid_tgid() >> 32, cpu = bpf_get_smp_processor_id();
	struct longer_record it = {
	    .record = {.head = {RECORD_RECORD, sizeof(struct record)}, .name = "coral"}};

	if (ctx->args[1] != NR_GETPPID || !is_wanted(tgid) || cpu >= MAX_CPUS)
		return 0;
	it.record.time_ns = bpf_ktime_get_ns();
	it.record.seq = produced[cpu]++;
	it.record.tgid = tgid;
	it.record.cpu = cpu;
	if (bpf_perf_event_output(ctx, &events, BPF_F_CURRENT_CPU, &it,
				  longer ? sizeof(it) : sizeof(it.record)))
		__sync_fetch_and_add(&lost, 1);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
