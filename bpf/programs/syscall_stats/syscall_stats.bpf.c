// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Counts system calls: for each (process, system call) the number of calls, the errors by class,
 * the total and the maximum latency, and a latency histogram. In events mode, sends a record of
 * each call instead. A call is counted when it returns; exit and exit_group, which never return,
 * when they begin.
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
#include "include/targets.bpf.h"

struct call {
	__u64 start_ns; /* 0: no call to count is in progress */
	__u32 nr;
	__u32 armed;
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
#define COMPAT_BIT    0x2 /* TS_COMPAT */
#define compat_word   thread_info.status
#define NR_EXIT	      60
#define NR_EXIT_GROUP 231
#define NR_EXECVE     59
#define NR_EXECVEAT   322
#elif defined(__TARGET_ARCH_arm64)
#define COMPAT_BIT    (1 << 22) /* TIF_32BIT */
#define compat_word   thread_info.flags
#define NR_EXIT	      93
#define NR_EXIT_GROUP 94
#define NR_EXECVE     221
#define NR_EXECVEAT   281
#else
#error "the system call numbers of this architecture are unknown"
#endif

OPTION(bool, single_events, false);
/* In events mode: which calls are sent, and one in how many of them, on each CPU. */
OPTION(bool, errors_only, false);
OPTION(__u64, min_duration_ns, 0);
OPTION(__u32, sample_every, 1);
OPTION(bool, filter_syscalls, false);
OPTION(bool, filter_includes, false); /* the mask lists the calls to count, or those to leave out */
OPTIONS(__u64, syscall_mask, NR_SYSCALLS / 64);
OPTIONS(__u8, error_class, MAX_ERRNO + 1); /* by errno, kernel-internal ones included */

/* The number of the current interval. User space increments it before it reads, so that a maximum
 * belongs to one interval. There are two slots, because the previous interval is read during the
 * current one. */
GLOBAL(__u32, interval);

struct syscall_key {
	__u32 tgid;
	__u32 nr;
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
	__u64 ended_ns; /* CLOCK_MONOTONIC */
	__u64 duration_ns;
	__s64 return_value;
	__u32 pid;
	__u32 tid;
	__u32 syscall_number;
	__u32 syscall; /* user space fills in this one and the next */
	__u32 comm;
	__u32 reserved;
};

OPTIONS(struct syscall_stats, no_stats, 1); /* zeros, to create elements from */
IN_BTF(struct syscall_call, syscall_call);

MAP(PERCPU_HASH, stats, struct syscall_key, struct syscall_stats, 10240, BPF_F_NO_PREALLOC);

static __always_inline bool syscall_is_wanted(__u32 nr)
{
	const volatile __u64 *word;

	if (!option(filter_syscalls))
		return true;
	word = nr < NR_SYSCALLS ? element(syscall_mask, nr / 64) : NULL;
	return (word && (*word >> (nr % 64)) & 1) == option(filter_includes);
}

static __always_inline bool is_error(long ret)
{
	return ret < 0 && ret >= -MAX_ERRNO;
}

static __always_inline void count_error(struct syscall_stats *s, long ret)
{
	const volatile __u8 *class = element(error_class, -ret);

	if (class)
		s->errors[*class % ERROR_CLASSES]++;
}

static __always_inline void count_max(struct syscall_stats *s, __u64 latency_ns)
{
	volatile __u32 *running = global(interval);
	__u32 now = running ? *running : 0, slot = now & 1;

	if (s->max_interval[slot] != now) {
		s->max_interval[slot] = now;
		s->max_ns[slot] = latency_ns;
	} else if (latency_ns > s->max_ns[slot]) {
		s->max_ns[slot] = latency_ns;
	}
}

static __always_inline void count(__u32 tgid, __u32 nr, __u64 latency_ns, long ret)
{
	struct syscall_key key = {.tgid = tgid, .nr = nr};
	void *zeros = (void *)element(no_stats, 0);
	struct syscall_stats *s = zeros ? map_lookup_or_init(map_of(stats), &key, zeros) : NULL;

	if (!s) {
		account_map_full();
		return;
	}
	count_max(s, latency_ns);
	s->total_ns += latency_ns;
	barrier();
	s->latency[log2_slot(latency_ns, LATENCY_FIRST, LATENCY_SLOTS)]++;
	barrier();
	if (is_error(ret))
		count_error(s, ret);
}

static __always_inline bool sampled_out(void)
{
	struct account *account;

	if (option(sample_every) <= 1)
		return false;
	account = account_of_cpu();
	return !account || account->seen++ % option(sample_every);
}

static __always_inline void send(void *ctx, const struct thread *me, __u32 nr, __u64 ended_ns,
				 __u64 duration_ns, long ret)
{
	struct syscall_call record = {
	    .ended_ns = ended_ns,
	    .duration_ns = duration_ns,
	    .return_value = ret,
	    .pid = me->tgid,
	    .tid = me->tid,
	    .syscall_number = nr,
	};

	if (duration_ns < option(min_duration_ns) || (option(errors_only) && !is_error(ret)) ||
	    sampled_out())
		return;
	record_send(ctx, &record, sizeof(record));
}

static __always_inline void see(void *ctx, const struct thread *me, __u32 nr, __u64 ended_ns,
				__u64 duration_ns, long ret)
{
	if (option(single_events))
		send(ctx, me, nr, ended_ns, duration_ns, ret);
	else
		count(me->tgid, nr, duration_ns, ret);
}

/* The state of the current thread's call, created at the first call of a watched thread. */
static __always_inline struct call *call_of_target(const struct thread *me)
{
	struct call *call = thread_state(me), fresh = {};
	struct target *target;

	if (call)
		return call;
	target = target_of_current(me->tgid);
	if (!target)
		return NULL;
	fresh.armed = target->state == TARGET_ARMED;
	call = thread_state_make(me, &fresh);
	if (!call)
		account_map_full();
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

static __always_inline int on_sys_enter(void *ctx, long id)
{
	__u32 nr = (unsigned long)id < NR_SYSCALLS ? id : NR_SYSCALLS;
	struct thread me = current_thread();
	struct call *call;

	if (surely_no_target(me.tgid) || cgroup_excludes_current())
		return 0;
	call = call_of_target(&me);
	if (!call)
		return 0;
	call->start_ns = 0;
	if (is_compat(&me))
		nr += NR_COMPAT;
	if (!syscall_is_wanted(nr) && !call->armed)
		return 0;
	if (call->armed && nr != NR_EXECVE && nr != NR_EXECVEAT)
		return 0;
	if (nr == NR_EXIT || nr == NR_EXIT_GROUP) {
		see(ctx, &me, nr, bpf_ktime_get_ns(), 0, 0);
		return 0;
	}
	call->nr = nr;
	call->start_ns = bpf_ktime_get_ns();
	return 0;
}

static __always_inline int on_sys_exit(void *ctx, long ret)
{
	struct thread me = current_thread();
	__u64 ended_ns, duration_ns;
	struct call *call;

	if (surely_no_target(me.tgid))
		return 0;
	call = thread_state(&me);
	if (!call || !call->start_ns)
		return 0;
	ended_ns = bpf_ktime_get_ns();
	duration_ns = ended_ns - call->start_ns;
	call->start_ns = 0;
	if (call->armed) {
		struct target *target = target_of_current(me.tgid);

		if (ret || !target)
			return 0;
		call->armed = false;
		target->state = TARGET_ACTIVE;
		if (!syscall_is_wanted(call->nr))
			return 0;
	}
	see(ctx, &me, call->nr, ended_ns, duration_ns, ret);
	return 0;
}

SEC("raw_tp/sys_enter")
int RAW_PROGRAM(coral_enter, void *regs, long id)
{
	return on_sys_enter(ctx, id);
}

SEC("raw_tp/sys_exit")
int RAW_PROGRAM(coral_exit, void *regs, long ret)
{
	return on_sys_exit(ctx, ret);
}

LICENSED_AS("GPL");
