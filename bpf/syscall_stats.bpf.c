// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Counts system calls: for each (process, system call) the calls, the errors by class, the total
 * and the greatest latency and a histogram of it. Or, where single events are asked for, writes a
 * record of each call into the ring. A call is seen when it returns; the two that never do, exit
 * and exit_group, when they begin.
 *
 * The figures only ever grow; user space reads them at each interval and subtracts what it read
 * before. So nothing has to be cleared under a running program, and no call falls between two
 * intervals.
 */
#include "include/kernel.bpf.h"
#include "include/account.bpf.h"
#include "include/log2.bpf.h"
#include "include/maps.bpf.h"
#include "include/ring.bpf.h"
#include "include/targets.bpf.h"

#define NR_SYSCALLS   1024 /* numbers from here on count as NR_SYSCALLS: none is defined */
#define NR_COMPAT     4096 /* added to the number of a call by the 32-bit way in */
#define LATENCY_SLOTS 32
#define LATENCY_FIRST 6 /* slot 0: below 2^7 ns; the last: from 2^37 ns, two minutes, on */
#define ERROR_CLASSES 8
#define MAX_ERRNO     4095

#if defined(__TARGET_ARCH_x86)
#define TS_COMPAT	     0x2
#define task_is_compat(task) ((task)->thread_info.status & TS_COMPAT)
#define NR_EXIT		     60
#define NR_EXIT_GROUP	     231
#define NR_EXECVE	     59
#define NR_EXECVEAT	     322
#elif defined(__TARGET_ARCH_arm64)
#define TIF_32BIT	     (1 << 22)
#define task_is_compat(task) ((task)->thread_info.flags & TIF_32BIT)
#define NR_EXIT		     93
#define NR_EXIT_GROUP	     94
#define NR_EXECVE	     221
#define NR_EXECVEAT	     281
#else
#error "this processor's system call numbers are not known"
#endif

const volatile bool single_events = false;
const volatile bool errors_only = false;  /* of single events */
const volatile __u64 min_duration_ns = 0; /* of single events */
const volatile __u32 sample_every = 1;	  /* of single events, on each CPU, one in so many */
const volatile bool filter_syscalls = false;
const volatile bool filter_includes = false; /* the mask says which to count, or which not to */
const volatile __u64 syscall_mask[NR_SYSCALLS / 64] = {0};
const volatile __u8 error_class[MAX_ERRNO + 1] = {0}; /* by errno, the kernel's own included */

/* The current interval: user space counts it up before it reads, so that the greatest latency is
 * the interval's own. Two slots, because the interval before is read while this one runs. */
volatile __u32 interval = 0;

struct syscall_key {
	__u32 tgid;
	__u32 nr;
};

/* Written from the end to the start, and copied by readers from the start to the end: whoever sees
 * an error sees its call, whoever sees a call sees its time. The calls are the histogram's sum. */
struct syscall_stats {
	__u64 errors[ERROR_CLASSES];
	__u64 latency[LATENCY_SLOTS];
	__u64 total_ns;
	__u64 max_ns[2];
	__u32 max_interval[2];
};

/* One call, as it goes through the ring. */
struct syscall_call {
	__u64 ended_ns; /* CLOCK_MONOTONIC */
	__u64 duration_ns;
	__s64 return_value;
	__u32 pid;
	__u32 tid;
	__u32 syscall_number;
	__u32 syscall; /* this and the next: for user space to fill in */
	__u32 comm;
	__u32 reserved;
};

const struct syscall_call *unused_syscall_call __attribute__((unused));

struct call {
	__u64 start_ns; /* 0: no call is under way that is to be counted */
	__u32 nr;
	__u32 armed;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 10240);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct syscall_key);
	__type(value, struct syscall_stats);
} stats SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct call);
} calls SEC(".maps");

static const struct syscall_stats no_stats;

static __always_inline bool syscall_is_wanted(__u32 nr)
{
	bool marked;

	if (!filter_syscalls)
		return true;
	marked = nr < NR_SYSCALLS && (syscall_mask[nr / 64] >> (nr % 64)) & 1;
	return marked == filter_includes;
}

static __always_inline bool is_error(long ret)
{
	return ret < 0 && ret >= -MAX_ERRNO;
}

static __always_inline void count_error(struct syscall_stats *s, long ret)
{
	s->errors[error_class[-ret] % ERROR_CLASSES]++;
}

static __always_inline void count_max(struct syscall_stats *s, __u64 latency_ns)
{
	__u32 now = interval, slot = now & 1;

	if (s->max_interval[slot] != now) {
		s->max_interval[slot] = now;
		s->max_ns[slot] = latency_ns;
	} else if (latency_ns > s->max_ns[slot]) {
		s->max_ns[slot] = latency_ns;
	}
}

static __always_inline void count(struct task_struct *task, __u32 nr, __u64 latency_ns, long ret)
{
	struct syscall_key key = {.tgid = task->tgid, .nr = nr};
	struct syscall_stats *s = map_lookup_or_init(&stats, &key, &no_stats);

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

	if (sample_every <= 1)
		return false;
	account = account_of_cpu();
	return !account || account->seen++ % sample_every;
}

static __always_inline void emit(struct task_struct *task, __u32 nr, __u64 ended_ns,
				 __u64 duration_ns, long ret)
{
	struct syscall_call *record;

	if (duration_ns < min_duration_ns || (errors_only && !is_error(ret)) || sampled_out())
		return;
	record = ring_reserve(sizeof(*record));
	if (!record)
		return;
	record->ended_ns = ended_ns;
	record->duration_ns = duration_ns;
	record->return_value = ret;
	record->pid = task->tgid;
	record->tid = task->pid;
	record->syscall_number = nr;
	record->syscall = record->comm = record->reserved = 0;
	ring_submit(record);
}

static __always_inline void see(struct task_struct *task, __u32 nr, __u64 ended_ns,
				__u64 duration_ns, long ret)
{
	if (single_events)
		emit(task, nr, ended_ns, duration_ns, ret);
	else
		count(task, nr, duration_ns, ret);
}

/* The state of the current task's call, made at the first call of a watched process. */
static __always_inline struct call *call_of_target(struct task_struct *task)
{
	struct call *call = bpf_task_storage_get(&calls, task, 0, 0);
	struct target *target;

	if (call)
		return call;
	target = target_of(task);
	if (!target)
		return NULL;
	call = bpf_task_storage_get(&calls, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (call)
		call->armed = target->state == TARGET_ARMED;
	else
		account_map_full();
	return call;
}

static __always_inline int on_sys_enter(long id)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u32 nr = (unsigned long)id < NR_SYSCALLS ? id : NR_SYSCALLS;
	struct call *call;

	if (surely_no_target(task->tgid) || cgroup_excludes_current())
		return 0;
	call = call_of_target(task);
	if (!call)
		return 0;
	call->start_ns = 0;
	if (task_is_compat(task))
		nr += NR_COMPAT;
	if (!syscall_is_wanted(nr) && !call->armed)
		return 0;
	if (call->armed && nr != NR_EXECVE && nr != NR_EXECVEAT)
		return 0;
	if (nr == NR_EXIT || nr == NR_EXIT_GROUP) {
		see(task, nr, bpf_ktime_get_ns(), 0, 0);
		return 0;
	}
	call->nr = nr;
	call->start_ns = bpf_ktime_get_ns();
	return 0;
}

static __always_inline int on_sys_exit(long ret)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct call *call;
	__u64 ended_ns, duration_ns;

	if (surely_no_target(task->tgid))
		return 0;
	call = bpf_task_storage_get(&calls, task, 0, 0);
	if (!call || !call->start_ns)
		return 0;
	ended_ns = bpf_ktime_get_ns();
	duration_ns = ended_ns - call->start_ns;
	call->start_ns = 0;
	if (call->armed) {
		struct target *target = target_of(task);

		if (ret || !target)
			return 0;
		call->armed = false;
		target->state = TARGET_ACTIVE;
		if (!syscall_is_wanted(call->nr))
			return 0;
	}
	see(task, call->nr, ended_ns, duration_ns, ret);
	return 0;
}

SEC("tp_btf/sys_enter")
int BPF_PROG(coral_enter_btf, void *regs, long id)
{
	return on_sys_enter(id);
}

SEC("raw_tp/sys_enter")
int BPF_PROG(coral_enter_raw, void *regs, long id)
{
	return on_sys_enter(id);
}

SEC("tp_btf/sys_exit")
int BPF_PROG(coral_exit_btf, void *regs, long ret)
{
	return on_sys_exit(ret);
}

SEC("raw_tp/sys_exit")
int BPF_PROG(coral_exit_raw, void *regs, long ret)
{
	return on_sys_exit(ret);
}

char LICENSE[] SEC("license") = "GPL";
