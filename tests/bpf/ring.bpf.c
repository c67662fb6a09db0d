// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * For the tests of the ring drain and of BTF layouts: one numbered record for each getppid of one
 * process. Every `discard_each`th is discarded; records that the ring refuses are counted.
 */
#include "include/records.bpf.h"

#ifdef __TARGET_ARCH_arm64
#define NR_GETPPID 173
#else
#define NR_GETPPID 110
#endif

enum colour {
	RED,
	GREEN,
};

struct point {
	__s16 x;
	__s16 y;
};

enum record_kind {
	RECORD_RECORD = 1,
};

struct record {
	struct record_head head;
	__u64 seq;
	__u32 tgid;
	__s32 negative;
	char name[8];
	struct point points[2];
	bool flag;
	__u8 bytes[3];
	enum colour colour;
};

const volatile __u32 wanted_tgid = 0;
const volatile __u32 discard_each = 0;

__u64 seq = 0;
__u64 lost = 0;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 20000);
	__type(key, __u32);
	__type(value, struct point);
} points SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 20000);
	__type(key, struct point);
	__type(value, __u32);
} counts SEC(".maps");

IN_BTF(struct record, record);
IN_BTF(enum record_kind, record_kind);

SEC("raw_tp/sys_enter")
int BPF_PROG(ring_enter, void *regs, long id)
{
	struct record *record;
	__u64 number;

	if (id != NR_GETPPID || bpf_get_current_pid_tgid() >> 32 != wanted_tgid)
		return 0;
	number = seq++; /* one thread makes the calls; a fetching add is new in Linux 5.12 */
	record = record_reserve(0, RECORD_RECORD, sizeof(*record));
	if (!record) {
		__sync_fetch_and_add(&lost, 1);
		return 0;
	}
	record->seq = number;
	record->tgid = wanted_tgid;
	record->negative = -7;
	__builtin_memcpy(record->name, "coral", 6);
	record->points[0] = (struct point){1, -2};
	record->points[1] = (struct point){3, -4};
	record->flag = true;
	record->colour = GREEN;
	if (discard_each && number % discard_each == 0)
		record_discard(record);
	else
		record_submit(ctx, 0, record, sizeof(*record));
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
