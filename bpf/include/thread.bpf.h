/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: a little state for each watched thread, from one hook to the next. It is kept in the
 * kernel's task storage, which frees it with the thread, or, on kernels that have none
 * (before 5.13), in a hash map by thread id, from which a program removes it.
 *
 * Define THREAD_STATE, the type of the state, before including this.
 */
#pragma once

#include "kernel.bpf.h"

OPTION(bool, state_in_task_storage, true);

MAP(TASK_STORAGE, thread_storage, int, THREAD_STATE, 0, BPF_F_NO_PREALLOC);
MAP(HASH, thread_hash, __u32, THREAD_STATE, 10240, BPF_F_NO_PREALLOC);

/* The state of the current thread, or NULL if it has none. */
static __always_inline THREAD_STATE *thread_state(const struct thread *me)
{
#ifndef CORAL_BCC /* task storage needs BTF */
	if (option(state_in_task_storage))
		return bpf_task_storage_get(map_of(thread_storage), me->task, 0, 0);
#endif
	return bpf_map_lookup_elem(map_of(thread_hash), &me->tid);
}

/* Gives the current thread, which has no state, the state INITIAL; NULL if there is no room. */
static __always_inline THREAD_STATE *thread_state_make(const struct thread *me,
						       THREAD_STATE *initial)
{
#ifndef CORAL_BCC
	if (option(state_in_task_storage))
		return bpf_task_storage_get(map_of(thread_storage), me->task, initial,
					    BPF_LOCAL_STORAGE_GET_F_CREATE);
#endif
	bpf_map_update_elem(map_of(thread_hash), &me->tid, initial, BPF_ANY);
	return bpf_map_lookup_elem(map_of(thread_hash), &me->tid);
}

/* Only needed for the hash map. */
SEC("raw_tp/sched_process_exit")
int RAW_PROGRAM(coral_forget, struct task_struct *task)
{
	__u32 tid = bpf_get_current_pid_tgid();

	bpf_map_delete_elem(map_of(thread_hash), &tid);
	return 0;
}

/* Likewise: a thread that execs takes the id of its process. */
SEC("raw_tp/sched_process_exec")
int RAW_PROGRAM(coral_renumber, struct task_struct *task, int old_tid)
{
	__u32 old = old_tid, tid = bpf_get_current_pid_tgid();
	THREAD_STATE *state, moved;

	if (old == tid)
		return 0;
	state = bpf_map_lookup_elem(map_of(thread_hash), &old);
	if (!state)
		return 0;
	moved = *state;
	bpf_map_delete_elem(map_of(thread_hash), &old);
	bpf_map_update_elem(map_of(thread_hash), &tid, &moved, BPF_ANY);
	return 0;
}
