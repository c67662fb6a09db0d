// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Counts system calls: for each (process, system call) the number of calls, the errors by class,
 * the total and the maximum latency, and a latency histogram. For sessions that want single events,
 * sends a record of each call instead. A call is counted when it returns; exit and exit_group,
 * which never return, when they begin.
 *
 * The counters only grow; user space reads them at each interval and subtracts the previous
 * reading. So nothing is cleared under a running program, and no call is lost between two
 * intervals.
 */
#include "include/kernel.bpf.h"
#include "include/account.bpf.h"
#include "include/log2.bpf.h"
#include "include/maps.bpf.h"
#include "include/records.bpf.h"
#include "include/sessions.bpf.h"
#include "include/targets.bpf.h"

/* What is known of the calls of one thread. */
struct call {
	__u64 start_ns;	  /* 0: no call to count is in progress */
	__u64 counting;	  /* the sessions that the call in progress counts for */
	__u64 watching;	  /* the sessions that watch the thread's process ... */
	__u64 armed;	  /* ... and those that begin with its next exec */
	__u32 generation; /* as of which they do */
	__u32 nr;
	__u32 born;
	__u32 reserved;
};

#define THREAD_STATE struct call
#include "include/thread.bpf.h"

#define NR_SYSCALLS   1024 /* larger numbers, which are undefined, count as this one */
#define NR_COMPAT     4096 /* added to the number of a call from a 32-bit program */
#define LATENCY_SLOTS 32
#define LATENCY_FIRST 6 /* slot 0: below 2^7 ns; the last: 2^37 ns (two minutes) and more */
#define ERROR_CLASSES 8
#define MAX_ERRNO     4095

#if defined(__TARGET_ARCH_x86)
#define COMPAT_BIT	   0x2 /* TS_COMPAT */
#define compat_word	   thread_info.status
#define NR_EXIT		   60
#define NR_EXIT_GROUP	   231
#define NR_EXECVE	   59
#define NR_EXECVEAT	   322
#define NR_COMPAT_EXECVE   11
#define NR_COMPAT_EXECVEAT 358
#define NR_COMPAT_GROUP	   252
#define number_word	   orig_ax
#elif defined(__TARGET_ARCH_arm64)
#define COMPAT_BIT	   (1 << 22) /* TIF_32BIT */
#define compat_word	   thread_info.flags
#define NR_EXIT		   93
#define NR_EXIT_GROUP	   94
#define NR_EXECVE	   221
#define NR_EXECVEAT	   281
#define NR_COMPAT_EXECVE   11
#define NR_COMPAT_EXECVEAT 387
#define NR_COMPAT_GROUP	   248
#define number_word	   syscallno
#else
#error "the system call numbers of this architecture are unknown"
#endif
#define NR_COMPAT_EXIT 1

/* What user space says about one session. */
struct syscall_session {
	__u8 single_events;
	__u8 errors_only;
	__u8 filters;
	__u8 wants_others;  /* numbers that are not in `wanted` */
	__u32 sample_every; /* single events: one call in how many is sent */
	__u64 min_duration_ns;
	__u32 since; /* the generation in which it began */
	/* The number of the current interval. User space increments it before it reads, so that a
	 * maximum belongs to one interval. There are two slots for maxima, because the previous
	 * interval is read during the current one. */
	__u32 interval;
	__u64 wanted[2][NR_SYSCALLS / 64]; /* by number, of native and of 32-bit calls */
};

MAP(ARRAY, syscall_sessions, __u32, struct syscall_session, SESSIONS, 0);

OPTION(bool, typed_registers, false);	   /* the verifier knows the type of struct pt_regs */
OPTIONS(__u8, error_class, MAX_ERRNO + 1); /* by errno, kernel-internal ones included */

struct syscall_key {
	__u32 tgid;
	__u32 nr;
	__u32 born;
};

/* Written from the end to the start, and copied by readers from the start to the end: a reader that
 * sees an error also sees its call, and one that sees a call also sees its time. The number of
 * calls is the sum of the histogram. */
struct syscall_stats {
	__u64 errors[ERROR_CLASSES];
	__u64 latency[LATENCY_SLOTS];
	__u64 total_ns;
	__u64 max_ns[2];
	__u32 max_interval[2];
};

/* The record of one call. */
struct syscall_call {
	struct record_head head;
	__u64 ended_ns; /* CLOCK_MONOTONIC */
	__u64 duration_ns;
	__s64 return_value;
	__u32 pid;
	__u32 tid;
	__u32 syscall_number;
	__u32 syscall; /* user space fills in this one and the next */
	__u32 comm;
	__u32 born;
};

enum record_kind {
	RECORD_SYSCALL_CALL = 1,
};

OPTIONS(struct syscall_stats, no_stats, 1); /* zeros, to create elements from */
IN_BTF(struct syscall_call, syscall_call);
IN_BTF(enum record_kind, record_kind);

SESSION_MAPS(PERCPU_HASH, stats, struct syscall_key, struct syscall_stats, 10240,
	     BPF_F_NO_PREALLOC);

/*
 * Programs may only have per-CPU memory that the kernel has at hand, which it gets four pages at a
 * time: many processes that begin at once can find none. Their elements are then here, in ordinary
 * memory, shared by all CPUs. A pair of process and call is in the one map or in the other, but for
 * pairs that several threads begin at the same time, whose calls are in both.
 */
OPTION(bool, has_spare_stats, false); /* elements of `stats` are allocated on demand */
SESSION_MAPS(HASH, spare_stats, struct syscall_key, struct syscall_stats, 10240, BPF_F_NO_PREALLOC);

static __always_inline bool is_wanted(const struct syscall_session *session, __u32 nr)
{
	__u32 word = nr % NR_COMPAT;

	if (!session->filters)
		return true;
	if (word >= NR_SYSCALLS)
		return session->wants_others;
	return session->wanted[nr >= NR_COMPAT][(word / 64) % (NR_SYSCALLS / 64)] >> (word % 64) &
	       1;
}

static __always_inline bool is_error(long ret)
{
	return ret < 0 && ret >= -MAX_ERRNO;
}

static __always_inline const volatile __u8 *class_of_error(long ret)
{
	__u32 number = -ret;

	barrier_var(number); /* or the compiler leaves out the mask, which the verifier needs */
	return element(error_class, number & MAX_ERRNO);
}

static __always_inline void count_max(struct syscall_stats *s, __u32 now, __u64 latency_ns)
{
	__u32 half = now & 1;

	if (s->max_interval[half] != now) {
		s->max_interval[half] = now;
		s->max_ns[half] = latency_ns;
	} else if (latency_ns > s->max_ns[half]) {
		s->max_ns[half] = latency_ns;
	}
}

/*
 * Counts a call in `spare_stats`, if its pair has an element there; one is only made if MAKE. 0 if
 * it has none.
 */
SUBPROGRAM int count_in_spare(__u32 slot, __u64 nr_and_born, __u64 duration_ns, __s64 ret,
			      bool make)
{
	struct syscall_key key = {
	    .tgid = current_tgid(),
	    .nr = nr_and_born >> 32,
	    .born = nr_and_born,
	};
	const volatile __u8 *class = class_of_error(ret);
	struct syscall_session *session;
	struct syscall_stats *s;
	void *zeros, *map;

	/* Kernels before 6.8 go through it, called or not. */
	if (!option(has_spare_stats))
		return 0;
	zeros = (void *)element(no_stats, 0);
	map = map_of_session(spare_stats, slot);
	session = bpf_map_lookup_elem(map_of(syscall_sessions), &slot);
	if (!zeros || !map || !session || !class)
		return 0;
	s = make ? map_lookup_or_init(map, &key, zeros) : bpf_map_lookup_elem(map, &key);
	if (!s)
		return 0;
	count_max(s, session->interval, duration_ns);
	__sync_fetch_and_add(&s->total_ns, duration_ns);
	__sync_fetch_and_add(&s->latency[log2_slot(duration_ns, LATENCY_FIRST, LATENCY_SLOTS)], 1);
	if (is_error(ret))
		__sync_fetch_and_add(&s->errors[*class % ERROR_CLASSES], 1);
	return 1;
}

/* The element of a pair that has none in `stats`; NULL if the call is counted elsewhere, or lost.
 */
static __always_inline struct syscall_stats *
begin_pair(__u32 slot, void *map, struct syscall_key *key, void *zeros, __u64 duration_ns, long ret)
{
	__u64 nr_and_born = (__u64)key->nr << 32 | key->born;
	struct syscall_stats *s;
	int error;

	if (option(has_spare_stats) && count_in_spare(slot, nr_and_born, duration_ns, ret, false))
		return NULL;
	error = bpf_map_update_elem(map, key, zeros, BPF_NOEXIST);
	s = bpf_map_lookup_elem(map, key);
	if (s)
		return s;
	if (!option(has_spare_stats) || error == -E2BIG ||
	    !count_in_spare(slot, nr_and_born, duration_ns, ret, true))
		account_error(slot, error);
	return NULL;
}

static __always_inline void count(const struct syscall_session *session, __u32 slot, __u32 nr,
				  __u32 born, __u64 duration_ns, long ret)
{
	struct syscall_key key = {.tgid = current_thread().tgid, .nr = nr, .born = born};
	void *zeros = (void *)element(no_stats, 0), *map = map_of_session(stats, slot);
	const volatile __u8 *class;
	struct syscall_stats *s;

	if (!map || !zeros)
		return;
	s = bpf_map_lookup_elem(map, &key);
	if (!s)
		s = begin_pair(slot, map, &key, zeros, duration_ns, ret);
	if (!s)
		return;
	count_max(s, session->interval, duration_ns);
	s->total_ns += duration_ns;
	barrier();
	s->latency[log2_slot(duration_ns, LATENCY_FIRST, LATENCY_SLOTS)]++;
	barrier();
	class = is_error(ret) ? class_of_error(ret) : NULL;
	if (class)
		s->errors[*class % ERROR_CLASSES]++;
}

static __always_inline void send(void *ctx, const struct syscall_session *session, __u32 slot,
				 __u32 nr, __u32 born, __u64 ended_ns, __u64 duration_ns, long ret)
{
	struct thread me = current_thread();
	struct syscall_call record = {
	    .head.kind = RECORD_SYSCALL_CALL,
	    .ended_ns = ended_ns,
	    .duration_ns = duration_ns,
	    .return_value = ret,
	    .pid = me.tgid,
	    .tid = me.tid,
	    .syscall_number = nr,
	    .born = born,
	};

	if (duration_ns < session->min_duration_ns || (session->errors_only && !is_error(ret)))
		return;
	/* By chance, so that each call is as likely as any other, however few there are. */
	if (session->sample_every > 1 && bpf_get_prandom_u32() % session->sample_every)
		return;
	record_send(ctx, slot, &record, sizeof(record));
}

static __always_inline void see_in_session(void *ctx, __u32 slot, __u32 nr, __u32 born,
					   __u64 ended_ns, __u64 duration_ns, long ret)
{
	struct syscall_session *session = bpf_map_lookup_elem(map_of(syscall_sessions), &slot);

	if (!session || !is_wanted(session, nr))
		return;
	if (session->single_events)
		send(ctx, session, slot, nr, born, ended_ns, duration_ns, ret);
	else
		count(session, slot, nr, born, duration_ns, ret);
}

/* A call of the current thread, for session SLOT. */
SUBPROGRAM int see_by_ring(__u32 slot, __u64 nr_and_born, __u64 ended_ns, __u64 duration_ns,
			   __s64 ret)
{
	/* Kernels before 6.8 go through it, called or not. */
	if (option(records_in_ring))
		see_in_session(NULL, slot, nr_and_born >> 32, nr_and_born, ended_ns, duration_ns,
			       ret);
	return 0;
}

/* Likewise, for all of SESSIONS. */
SUBPROGRAM int see_all_by_ring(__u64 sessions, __u64 nr_and_born, __u64 ended_ns, __u64 duration_ns,
			       __s64 ret)
{
	for_each_session (slot, sessions) {
		see_by_ring(slot, nr_and_born, ended_ns, duration_ns, ret);
	}
	return 0;
}

static __always_inline void see(void *ctx, __u64 sessions, __u32 nr, __u32 born, __u64 ended_ns,
				__u64 duration_ns, long ret)
{
	if (option(records_in_ring)) {
		see_all_by_ring(sessions, (__u64)nr << 32 | born, ended_ns, duration_ns, ret);
		return;
	}
	for_each_session (slot, sessions) {
		see_in_session(ctx, slot, nr, born, ended_ns, duration_ns, ret);
	}
}

/* There was no room for a thread's state: in the hash map, or in the kernel's memory. */
SUBPROGRAM int lose_calls(__u64 sessions)
{
	for_each_session (slot, sessions) {
		if (option(state_in_task_storage))
			account_loss(slot, LOSS_BUSY);
		else
			account_loss(slot, LOSS_MAP_FULL);
	}
	return 0;
}

/*
 * The state of the current thread as of GENERATION, or NULL if no session watches it. Where that is
 * cheap, one that nobody watches keeps its state, or gets one: its hint may be set for the sake of
 * another process, or of another kind of session.
 */
static __always_inline struct call *call_of(const struct sessions *all, const struct thread *me,
					    __u32 generation)
{
	struct call *call = thread_state(me), fresh = {.generation = generation};

	if (call && call->generation == generation)
		return call;
	fresh.watching = sessions_in_state(sessions_of_hub(all), me->tgid, MEMBER_ACTIVE);
	fresh.armed =
	    sessions_in_state(sessions_of_hub(all) & all->await_exec, me->tgid, MEMBER_ARMED);
	if (!fresh.watching && !fresh.armed && !option(state_in_task_storage)) {
		if (call)
			thread_state_remove();
		return NULL;
	}
	if (call) {
		call->watching = fresh.watching;
		call->armed = fresh.armed;
		call->generation = generation;
		return call;
	}
	fresh.born = born_of(kernel_read(this_task(), group_leader));
	call = thread_state_make(me, &fresh);
	if (!call)
		lose_calls(fresh.watching);
	return call;
}

static __always_inline bool is_compat(const struct thread *me)
{
#ifndef CORAL_BCC
	if (option(current_by_btf)) /* a plain load */
		return me->task->compat_word & COMPAT_BIT;
#endif
	return kernel_read(this_task(), compat_word) & COMPAT_BIT;
}

static __always_inline __u32 number_of(const struct thread *me, long id)
{
	__u32 nr = (unsigned long)id < NR_SYSCALLS ? id : NR_SYSCALLS;

	return is_compat(me) ? nr + NR_COMPAT : nr;
}

static __always_inline bool is_exec(__u32 nr)
{
	return nr == NR_EXECVE || nr == NR_EXECVEAT || nr == NR_COMPAT + NR_COMPAT_EXECVE ||
	       nr == NR_COMPAT + NR_COMPAT_EXECVEAT;
}

static __always_inline bool is_exit(__u32 nr)
{
	return nr == NR_EXIT || nr == NR_EXIT_GROUP || nr == NR_COMPAT + NR_COMPAT_EXIT ||
	       nr == NR_COMPAT + NR_COMPAT_GROUP;
}

SEC("raw_tp/sys_enter")
int RAW_PROGRAM(coral_enter, struct pt_regs *regs, long id)
{
	struct sessions *all = all_sessions();
	struct thread me = current_thread();
	struct call *call;
	__u32 nr;

	if (!all || surely_unwatched_here(all, me.tgid))
		return 0;
	call = call_of(all, &me, generation_of(all));
	if (!call)
		return 0;
	call->start_ns = 0;
	nr = number_of(&me, id);
	call->counting = call->watching | (is_exec(nr) ? call->armed : 0);
	if (!call->counting)
		return 0;
	call->nr = nr;
	if (is_exit(nr)) /* the number is read again: the verifier would look at each by itself */
		see(ctx, call->counting, call->nr, call->born, bpf_ktime_get_ns(), 0, 0);
	else
		call->start_ns = bpf_ktime_get_ns();
	return 0;
}

/* Those of SESSIONS that began before the GENERATION of a thread. */
SUBPROGRAM __u64 older_sessions(__u64 sessions, __u32 generation)
{
	__u64 found = 0;

	for_each_session (slot, sessions) {
		__u32 key = slot;
		struct syscall_session *session =
		    bpf_map_lookup_elem(map_of(syscall_sessions), &key);

		if (session && (__s32)(session->since - generation) <= 0)
			found |= session_bit(slot);
	}
	return found;
}

/*
 * Those of the sessions WATCHED, as of GENERATION, that have not begun since: their slots may have
 * been other sessions' then.
 */
static __always_inline __u64 sessions_since(__u64 watched, __u32 generation, __u32 now)
{
	return generation == now ? watched : older_sessions(watched, generation);
}

static __always_inline long number_in(struct pt_regs *regs)
{
#ifndef CORAL_BCC
	if (option(typed_registers))
		return regs->number_word;
#endif
	return kernel_read(regs, number_word);
}

SEC("raw_tp/sys_exit")
int RAW_PROGRAM(coral_leave, struct pt_regs *regs, long ret)
{
	struct sessions *all = all_sessions();
	struct thread me = current_thread();
	__u64 ended_ns, duration_ns = 0, watched = 0;
	__u32 now, generation = 0;
	struct call *call;

	if (!all || surely_unwatched_here(all, me.tgid))
		return 0;
	now = generation_of(all);
	call = thread_state(&me);
	if (call) {
		watched = call->watching;
		generation = call->generation;
	}
	if (generation != now || !call)
		call = call_of(all, &me, now);
	if (!call)
		return 0;
	ended_ns = bpf_ktime_get_ns();
	if (call->start_ns) {
		watched = call->counting;
		duration_ns = ended_ns - call->start_ns;
		call->start_ns = 0;
	} else {
		/*
		 * It was not seen to begin: seccomp has answered it, before sys_enter. It takes no
		 * time that could be measured. A call that began before its session did looks the
		 * same, but then the session did not watch the thread when it last returned.
		 */
		if (!watched)
			return 0;
		call->nr = number_of(&me, number_in(regs));
	}
	watched = sessions_since(watched, generation, now);
	see(ctx, watched & call->watching, call->nr, call->born, ended_ns, duration_ns, ret);
	return 0;
}

LICENSED_AS("GPL");
