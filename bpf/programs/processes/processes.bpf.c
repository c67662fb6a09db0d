// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Keeps the processes that the sessions watch: a child of a watched process is watched before its
 * first instruction, a process that takes a wanted name or enters a wanted cgroup from then on, and
 * a process that has ended no more, so that its id can go to another one.
 */
#include "include/kernel.bpf.h"
#include "include/sessions.bpf.h"
#include "include/targets.bpf.h"

/* By slot: the command name of the processes to watch, as two words padded with zeros. */
struct wanted_comm {
	__u64 words[COMM_BYTES / 8];
};

MAP(ARRAY, wanted_comms, __u32, struct wanted_comm, SESSIONS, 0);

/*
 * What a session says of a cgroup whose processes it watches. The group is the lower half of the id
 * of a cgroup: that of the container that this one is, or is inside of. It is 0 where the session
 * tells no containers apart.
 */
struct watched_cgroup {
	__u32 group;
	__u32 is_pod; /* each cgroup made below it is a group of its own */
};

/* By slot: these cgroups, by key_of_cgroup. A cgroup made below one of them, or again at the path
 * of the first, is added. */
SESSION_MAPS(HASH, cgroups, __u64, struct watched_cgroup, 4096, BPF_F_NO_PREALLOC);

/* By slot: the hash of the path of the cgroup that the session asked for, from the root of its
 * hierarchy; 0 if there is none. */
MAP(ARRAY, cgroup_paths, __u32, __u64, SESSIONS, 0);

static __always_inline bool comm_is_wanted(__u32 slot, const char *comm)
{
	struct wanted_comm *wanted = bpf_map_lookup_elem(map_of(wanted_comms), &slot);
	const __u64 *words = (const __u64 *)comm;

	return wanted && words[0] == wanted->words[0] && words[1] == wanted->words[1];
}

/* Ids are unique within a hierarchy, of which there are two: the unified one, and that of the
 * memory controller. */
#define IN_MEMORY_HIERARCHY (1ULL << 63)

static __always_inline __u64 key_of_cgroup(__u64 id, int hierarchy)
{
	return hierarchy ? id | IN_MEMORY_HIERARCHY : id;
}

/* The sessions that watch cgroups of a hierarchy. */
static __always_inline __u64 sessions_of_hierarchy(const struct sessions *all, int hierarchy)
{
	if (!hierarchy)
		return all->cgroup & ~all->memory;
	return hierarchy == all->hierarchy ? all->cgroup & all->memory : 0;
}

/* The cgroup ID if session SLOT watches what is in it, else NULL. */
static __always_inline struct watched_cgroup *cgroup_watched(__u32 slot, __u64 id)
{
	void *map = map_of_session(cgroups, slot);

	return map ? bpf_map_lookup_elem(map, &id) : NULL;
}

/*
 * The current process forks CHILD, in these cgroups of the two hierarchies. A child has its
 * parent's name until it execs. A member of its id is another process, which ended just when user
 * space added it.
 */
SUBPROGRAM int fork_in_session(__u32 slot, __u64 child, __u64 cgroup, __u64 memory_cgroup)
{
	struct member member = {.state = MEMBER_ACTIVE}, *parent = NULL;
	struct sessions *all = all_sessions();
	struct watched_cgroup *in = NULL;
	__u64 bit = session_bit(slot);

	if (!all)
		return 0;
	bpf_get_current_comm(member.comm, sizeof(member.comm));
	if (all->follow & bit)
		parent = member_of(slot, current_tgid());
	if (all->cgroup & bit)
		in = cgroup_watched(slot, all->memory & bit ? memory_cgroup : cgroup);
	if (parent) {
		member.state = parent->state;
	} else if (in) {
		member.group = in->group;
	} else if (!(all->comm & bit && comm_is_wanted(slot, member.comm))) {
		member_forget(slot, child);
		return 0;
	}
	member_add(all, slot, child, child >> 32, &member);
	return 0;
}

SEC("raw_tp/sched_process_fork")
int RAW_PROGRAM(coral_fork, struct task_struct *parent, struct task_struct *child)
{
	__u32 tgid = kernel_read(child, tgid), parent_tgid = current_tgid();
	struct sessions *all = all_sessions();
	__u64 mask, process, cgroup = 0, memory_cgroup = 0;

	if (!all || tgid == parent_tgid) /* a thread */
		return 0;
	mask = all->comm | all->cgroup;
	if (!surely_unwatched(all, parent_tgid))
		mask |= all->follow & ~all->host;
	if (!surely_unwatched(all, tgid))
		mask = all->all;
	if (!mask)
		return 0;
	process = process_of(tgid, born_of(child));
	if (all->cgroup) {
		cgroup = key_of_cgroup(cgroup_of(child, 0), 0);
		if (all->hierarchy)
			memory_cgroup =
			    key_of_cgroup(cgroup_of(child, all->hierarchy), all->hierarchy);
	}
	for_each_session (slot, mask) {
		fork_in_session(slot, process, cgroup, memory_cgroup);
	}
	return 0;
}

/* The name of PROCESS becomes COMM, in two words. */
SUBPROGRAM int rename_in_session(__u32 slot, __u64 process, __u64 low, __u64 high)
{
	struct sessions *all = all_sessions();
	struct member named = {.state = MEMBER_ACTIVE}, *member = member_of(slot, process);
	__u64 *comm = (__u64 *)named.comm;

	if (!all)
		return 0;
	comm[0] = low;
	comm[1] = high;
	if (member) {
		__builtin_memcpy(member->comm, named.comm, COMM_BYTES);
		tell_change(all, slot, process, process >> 32, CHANGE_NAMED, member);
	} else if (all->comm & session_bit(slot) && comm_is_wanted(slot, named.comm)) {
		member_add(all, slot, process, process >> 32, &named);
		count_up(COUNT_GENERATION);
	}
	return 0;
}

/* An exec changes the name too, before the new program's first instruction. */
SEC("raw_tp/task_rename")
int RAW_PROGRAM(coral_rename, struct task_struct *task, const char *comm)
{
	struct sessions *all = all_sessions();
	__u32 tgid = kernel_read(task, tgid);
	__u64 mask, process, words[COMM_BYTES / 8] = {};

	if (!all || kernel_read(task, pid) != tgid) /* the name of a thread */
		return 0;
	mask = surely_unwatched(all, tgid) ? all->comm : all->all;
	if (!mask)
		return 0;
	read_kernel_string(&words, comm);
	process = process_of(tgid, born_of(task));
	for_each_session (slot, mask) {
		rename_in_session(slot, process, words[0], words[1]);
	}
	return 0;
}

SUBPROGRAM int exec_in_session(__u32 slot, __u32 tgid)
{
	struct member *member = member_of(slot, tgid);

	if (member && member->state == MEMBER_ARMED) {
		member->state = MEMBER_ACTIVE;
		count_up(COUNT_GENERATION);
	}
	return 0;
}

SEC("raw_tp/sched_process_exec")
int RAW_PROGRAM(coral_exec, struct task_struct *task)
{
	struct sessions *all = all_sessions();
	__u32 tgid = current_tgid();

	if (!all || surely_unwatched(all, tgid))
		return 0;
	for_each_session (slot, all->all) {
		exec_in_session(slot, tgid);
	}
	return 0;
}

SUBPROGRAM int member_remove(__u32 slot, __u64 process)
{
	struct sessions *all = all_sessions();
	void *map = map_of_session(members, slot);
	struct member *member, last;
	__u64 key = (__u32)process;
	int error;

	member = all && map ? bpf_map_lookup_elem(map, &key) : NULL;
	if (!member)
		return 0;
	last = *member;
	if (all->detailed & session_bit(slot)) {
		if (bpf_map_delete_elem(map, &key))
			return 0; /* the other of two last threads has removed it */
		if (!tell_change(all, slot, process, process >> 32, CHANGE_ENDED, &last))
			bpf_map_update_elem(map, &process, &last, BPF_ANY);
	} else {
		/* First, so that a reader finds the one or the other. */
		error = bpf_map_update_elem(map, &process, &last, BPF_NOEXIST);
		if (error == -EEXIST)
			return 0;
		bpf_map_delete_elem(map, &key);
		if (error) /* the map was full, and has room now */
			error = bpf_map_update_elem(map, &process, &last, BPF_ANY);
		if (error)
			account_error(slot, error);
	}
	count_up(COUNT_ENDED);
	return 0;
}

/* Runs once for each thread; the kernel has already subtracted the thread from signal->live. */
SEC("raw_tp/sched_process_exit")
int RAW_PROGRAM(coral_exit, struct task_struct *task)
{
	struct sessions *all = all_sessions();
	__u32 tgid = current_tgid();
	__u64 process;

	if (!all || surely_unwatched(all, tgid) ||
	    kernel_read(kernel_read(this_task(), signal), live.counter) > 0)
		return 0;
	process = process_of(tgid, born_of(kernel_read(this_task(), group_leader)));
	for_each_session (slot, all->all) {
		member_remove(slot, process);
	}
	return 0;
}

/*
 * A thread of PROCESS has moved to CGROUP, and the process's first thread, LEADER, is in this one.
 * Both are the same but for threaded cgroups and those of v1. A process is watched while its first
 * thread is inside, and from when another one enters until one leaves.
 */
SUBPROGRAM int attach_in_session(__u32 slot, __u64 process, __u64 cgroup, __u64 leaders_cgroup,
				 __u64 leader)
{
	struct member moved = {.state = MEMBER_ACTIVE}, *member = member_of(slot, process);
	struct watched_cgroup *in = cgroup_watched(slot, leaders_cgroup);
	struct sessions *all = all_sessions();

	if (!all)
		return 0;
	if (!in)
		in = cgroup_watched(slot, cgroup);
	kernel_read_string(&moved.comm, (struct task_struct *)leader, comm);
	if (in)
		moved.group = in->group;
	else
		moved.state = MEMBER_LEFT;
	if (member && in && member->group != moved.group) {
		member->group = moved.group;
		tell_change(all, slot, process, process >> 32, CHANGE_NAMED, member);
	}
	if (!member && in)
		member_add(all, slot, process, process >> 32, &moved);
	else if (member && member->state != MEMBER_SPARED && member->state != moved.state)
		member->state = moved.state;
	else
		return 0;
	count_up(COUNT_GENERATION);
	return 0;
}

SEC("raw_tp/cgroup_attach_task")
int RAW_PROGRAM(coral_attach, struct cgroup *to, const char *path, struct task_struct *task)
{
	struct sessions *all = all_sessions();
	__u64 mask, process, cgroup, leaders_cgroup;
	struct task_struct *leader;
	int hierarchy;

	if (!all || !all->cgroup)
		return 0;
	hierarchy = hierarchy_of(to);
	mask = sessions_of_hierarchy(all, hierarchy);
	if (!mask)
		return 0;
	leader = kernel_read(task, group_leader);
	process = process_of(kernel_read(task, tgid), born_of(leader));
	cgroup = key_of_cgroup(id_of_cgroup(to), hierarchy);
	leaders_cgroup = key_of_cgroup(cgroup_of(leader, hierarchy), hierarchy);
	for_each_session (slot, mask) {
		attach_in_session(slot, process, cgroup, leaders_cgroup, (__u64)leader);
	}
	return 0;
}

#define PATH_BYTES  256
#define HASH_PRIME  0x100000001B3ULL
#define HASH_OFFSET 0xCBF29CE484222325ULL

/* FNV-1a over the words of a path, padded with zeros. A longer one is cut off. */
static __always_inline __u64 hash_of_path(const char *path)
{
	__u64 words[PATH_BYTES / 8] = {}, hash = HASH_OFFSET;

	read_kernel_string(&words, path);
	for (int at = 0; at < PATH_BYTES / 8; at++)
		hash = (hash ^ words[at]) * HASH_PRIME;
	return hash;
}

SUBPROGRAM int mkdir_in_session(__u32 slot, __u64 cgroup, __u64 parent, __u64 path)
{
	__u64 *wanted = bpf_map_lookup_elem(map_of(cgroup_paths), &slot);
	struct watched_cgroup *above = cgroup_watched(slot, parent), made = {};
	void *map = map_of_session(cgroups, slot);
	int error;

	if (!map || (!above && (!wanted || *wanted != path)))
		return 0;
	if (above)
		made.group = above->is_pod ? cgroup : above->group;
	error = bpf_map_update_elem(map, &cgroup, &made, BPF_ANY);
	if (error)
		account_error(slot, error);
	return 0;
}

SEC("raw_tp/cgroup_mkdir")
int RAW_PROGRAM(coral_mkdir, struct cgroup *made, const char *path)
{
	struct sessions *all = all_sessions();
	__u64 mask, cgroup, parent, hash;
	int hierarchy;

	if (!all || !all->cgroup)
		return 0;
	hierarchy = hierarchy_of(made);
	mask = sessions_of_hierarchy(all, hierarchy);
	if (!mask)
		return 0;
	cgroup = key_of_cgroup(id_of_cgroup(made), hierarchy);
	parent = key_of_cgroup(id_of_parent(made), hierarchy);
	hash = hash_of_path(path) ^ key_of_cgroup(0, hierarchy);
	for_each_session (slot, mask) {
		mkdir_in_session(slot, cgroup, parent, hash);
	}
	return 0;
}

SUBPROGRAM int rmdir_in_session(__u32 slot, __u64 cgroup)
{
	void *map = map_of_session(cgroups, slot);

	if (map)
		bpf_map_delete_elem(map, &cgroup);
	return 0;
}

/* Its processes have ended, so its room can be another one's. */
SEC("raw_tp/cgroup_rmdir")
int RAW_PROGRAM(coral_rmdir, struct cgroup *removed)
{
	struct sessions *all = all_sessions();
	__u64 mask, cgroup;
	int hierarchy;

	if (!all || !all->cgroup)
		return 0;
	hierarchy = hierarchy_of(removed);
	mask = sessions_of_hierarchy(all, hierarchy);
	if (!mask)
		return 0;
	cgroup = key_of_cgroup(id_of_cgroup(removed), hierarchy);
	for_each_session (slot, mask) {
		rmdir_in_session(slot, cgroup);
	}
	return 0;
}

LICENSED_AS("GPL");
