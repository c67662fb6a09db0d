// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Tells user space of every cgroup that is made or removed, in the unified hierarchy and in that of
 * the memory controller. A container runtime makes the cgroup of a container some milliseconds
 * before the container's first exec: time enough to look up whose it is, and to have it watched.
 */
#include "include/kernel.bpf.h"
#include "include/records.bpf.h"
#include "include/sessions.bpf.h"

#define PATH_BYTES 1024 /* as much as the kernel tells (TRACE_CGROUP_PATH_LEN) */

enum cgroup_change_kind {
	CGROUP_MADE,
	CGROUP_REMOVED,
};

struct cgroup_change {
	struct record_head head;
	__u32 change;
	__u32 hierarchy; /* its number; 0 is the unified one */
	__u64 id;
	char path[PATH_BYTES];
};

enum record_kind {
	RECORD_CGROUP_CHANGE = 1,
};

IN_BTF(struct cgroup_change, cgroup_change);
IN_BTF(enum record_kind, record_kind);

BUFFER(RINGBUF, changes, 1 << 18);

/* Changes that found no room in the buffer: user space then looks at all cgroups again. */
GLOBAL(__u64, changes_lost);

/* The number of the memory controller's hierarchy (v1), 0 if there is none. */
OPTION(__u32, memory_hierarchy, 0);

static __always_inline void tell(struct cgroup *cgroup, const char *path, __u32 change)
{
	__u32 hierarchy = hierarchy_of(cgroup);
	struct cgroup_change *record;
	volatile __u64 *lost;

	if (hierarchy && hierarchy != option(memory_hierarchy))
		return;
	record = bpf_ringbuf_reserve(map_of(changes), sizeof(*record), 0);
	if (!record) {
		lost = global(changes_lost);
		if (lost)
			__sync_fetch_and_add(lost, 1);
		return;
	}
	record->head.kind = RECORD_CGROUP_CHANGE;
	record->head.length = sizeof(*record);
	record->change = change;
	record->hierarchy = hierarchy;
	record->id = id_of_cgroup(cgroup);
	record->path[0] = 0;
	read_kernel_string(&record->path, path);
	bpf_ringbuf_submit(record, BPF_RB_FORCE_WAKEUP);
}

SEC("raw_tp/cgroup_mkdir")
int RAW_PROGRAM(coral_cgroup_made, struct cgroup *cgroup, const char *path)
{
	tell(cgroup, path, CGROUP_MADE);
	return 0;
}

SEC("raw_tp/cgroup_rmdir")
int RAW_PROGRAM(coral_cgroup_removed, struct cgroup *cgroup, const char *path)
{
	tell(cgroup, path, CGROUP_REMOVED);
	return 0;
}

LICENSED_AS("GPL");
