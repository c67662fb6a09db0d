/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: a little state for each watched thread, from one hook to the next. It is kept in the
 * kernel's task storage, which frees it with the thread, or, on kernels that have none
 * (before 5.13), in a hash map by the address of the task, from which a program removes it. A
 * thread keeps its task for all of its life; its id changes when it execs for its process, and
 * another thread may have the old one before any program learns of that.
 *
 * Define THREAD_STATE, the type of the state, before including this.
 */
#pragma once

#include "kernel.bpf.h"

OPTION(bool, state_in_task_storage, true);

MAP(TASK_STORAGE, thread_storage, int, THREAD_STATE, 0, BPF_F_NO_PREALLOC);
MAP(HASH, thread_hash, __u64, THREAD_STATE, 10240, BPF_F_NO_PREALLOC);

static __always_inline THREAD_STATE *thread_state_in_hash(void)
{
	__u64 task = bpf_get_current_task();

	return bpf_map_lookup_elem(map_of(thread_hash), &task);
}

/* Of the current thread, in the hash map: its room is another thread's then. */
static __always_inline void thread_state_remove(void)
{
	__u64 task = bpf_get_current_task();

	bpf_map_delete_elem(map_of(thread_hash), &task);
}

/* The state of the current thread, or NULL if it has none. */
static __always_inline THREAD_STATE *thread_state(const struct thread *me)
{
#ifndef CORAL_BCC /* task storage needs BTF */
	if (option(state_in_task_storage))
		return bpf_task_storage_get(map_of(thread_storage), me->task, 0, 0);
#endif
	return thread_state_in_hash();
}

/* Gives the current thread, which has no state, the state INITIAL; NULL if there is no room. */
static __always_inline THREAD_STATE *thread_state_make(const struct thread *me,
						       THREAD_STATE *initial)
{
	__u64 task = bpf_get_current_task();

#ifndef CORAL_BCC
	if (option(state_in_task_storage))
		return bpf_task_storage_get(map_of(thread_storage), me->task, initial,
					    BPF_LOCAL_STORAGE_GET_F_CREATE);
#endif
	bpf_map_update_elem(map_of(thread_hash), &task, initial, BPF_ANY);
	return thread_state_in_hash();
}

/* Only needed for the hash map. */
SEC("raw_tp/sched_process_exit")
int RAW_PROGRAM(coral_forget, struct task_struct *task)
{
	thread_state_remove();
	return 0;
}
