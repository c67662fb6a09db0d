// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * For the tests of maps of sessions: each getppid of one process is counted for every session whose
 * bit is set in `wanted_sessions`, and sent to its buffer.
 */
#include "include/kernel.bpf.h"
#include "include/records.bpf.h"
#include "include/sessions.bpf.h"

#ifdef __TARGET_ARCH_arm64
#define NR_GETPPID 173
#else
#define NR_GETPPID 110
#endif

struct call_key {
	__u32 tgid;
	__u32 nr;
};

struct figures {
	__u64 calls;
	__u64 weighted;
};

enum record_kind {
	RECORD_RECORD = 1,
};

struct record {
	struct record_head head;
	__u64 seq;
	__u32 slot;
	__u32 tgid;
};

OPTION(__u32, wanted_tgid, 0);
GLOBAL(__u64, wanted_sessions);
OPTIONS(struct figures, no_figures, 1);
IN_BTF(struct record, record);
IN_BTF(enum record_kind, record_kind);

MAP(ARRAY, weights, __u32, __u64, SESSIONS, 0);
SESSION_MAPS(PERCPU_HASH, stats, struct call_key, struct figures, 8, BPF_F_NO_PREALLOC);

static __always_inline void count(struct call_key *key, __u32 slot, __u64 *seq)
{
	void *map = map_of_session(stats, slot), *zeros = (void *)element(no_figures, 0);
	__u64 *weight = bpf_map_lookup_elem(map_of(weights), &slot);
	struct figures *figures;

	if (!map || !weight || !zeros)
		return;
	figures = bpf_map_lookup_elem(map, key);
	if (!figures) {
		bpf_map_update_elem(map, key, zeros, BPF_NOEXIST);
		figures = bpf_map_lookup_elem(map, key);
		if (!figures)
			return;
	}
	*seq = figures->calls++;
	figures->weighted += *weight;
}

SEC("raw_tp/sys_enter")
int RAW_PROGRAM(sessions_enter, void *regs, long id)
{
	struct call_key key = {.tgid = current_tgid(), .nr = id};
	volatile __u64 *mask = global(wanted_sessions);
	struct record record = {.head.kind = RECORD_RECORD, .tgid = key.tgid};
	__u32 slot;

	if (id != NR_GETPPID || key.tgid != option(wanted_tgid) || !mask)
		return 0;
	for (slot = 0; slot < SESSIONS; slot++) {
		if (!(*mask >> slot & 1))
			continue;
		count(&key, slot, &record.seq);
		record.slot = slot;
		record_send(ctx, slot, &record, sizeof(record));
	}
	return 0;
}

LICENSED_AS("GPL");
