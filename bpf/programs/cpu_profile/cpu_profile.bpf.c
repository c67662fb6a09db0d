// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Samples of the watched threads while they are on a CPU: a record of each with the kernel's stack,
 * the registers of user space, and as much of the user stack as is in use, up to a limit. User
 * space unwinds and names.
 *
 * Each session has timers of its own, perf events of the software cpu-clock, or counters of cycles,
 * which all run this one program. Their period, in nanoseconds or cycles, ends with the number of
 * the session's slot.
 */
#define WAKEUP_WINDOW_BYTES (64 << 10) /* more than two samples of the largest size */

#include "include/kernel.bpf.h"
#include "include/user.bpf.h"
#include "include/sessions.bpf.h"
#include "include/targets.bpf.h"

struct profile_session {
	__u32 stack_bytes; /* to copy at most; 0: frames by frame pointers, found by the kernel */
	__u32 reserved;
};

MAP(ARRAY, profile_sessions, __u32, struct profile_session, SESSIONS, 0);

#define MOST_FRAMES 127 /* kernel.perf_event_max_stack, unless it was changed */
#define STACK_STEPS 7

#if defined(__TARGET_ARCH_x86)
#define RED_ZONE_BYTES 128 /* System V ABI, AMD64 supplement, 3.2.2 */
#else
#define RED_ZONE_BYTES 0
#endif

#define SAMPLE_IN_KERNEL  1 /* the kernel was interrupted */
#define SAMPLE_KERNEL_CUT 2 /* its stack may have more frames than those */
#define SAMPLE_NO_USER	  4 /* a kernel thread */
#define SAMPLE_STACK_CUT  8 /* the user stack goes on behind what was copied */
#define SAMPLE_BY_FRAMES                                                                           \
	16 /* frames of user space follow, innermost first, instead of its stack                   \
	    */
#define SAMPLE_STACK_HIDDEN 32 /* reading the user stack met an absent page */

/* `kernel_frames` addresses of the kernel follow, innermost first; then `stack_bytes` of the user
 * stack, from `stack_start` on, or of frames. */
struct cpu_sample {
	struct record_head head;
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u64 stack_start;
	__u64 tail; /* for user space: where in its copy of the ring the rest is */
	__u32 tgid;
	__u32 tid;
	__u32 born;
	__u32 execs;  /* tells the programs apart that a process was, one after the other */
	__u32 parent; /* the process id of its parent */
	__u32 parent_execs;
	__u32 cpu;
	__u32 flags;
	__u32 kernel_frames;
	__u32 stack_bytes;
	char comm[COMM_BYTES]; /* of the thread */
	struct user_registers registers;
};

struct cpu_sample_draft {
	struct cpu_sample sample;
	__u8 rest[MOST_FRAMES * sizeof(__u64) + STACK_STEPS * USER_READ_STEP];
};

/* A watched process has executed a program, and is about to map its libraries; or it has its first
 * sample of a session. */
struct sighting {
	struct record_head head;
	__u32 tgid;
	__u32 has_executed;
};

enum record_kind {
	RECORD_NONE,
	RECORD_CPU_SAMPLE,
	RECORD_SIGHTING,
};

IN_BTF(struct cpu_sample, cpu_sample);
IN_BTF(struct sighting, sighting);
IN_BTF(enum record_kind, record_kind);

/* No sample interrupts another one of the same CPU, although a counter's interrupt can interrupt a
 * timer's: the kernel runs no such program within another (bpf_prog_active). */
MAP(PERCPU_ARRAY, sample_drafts, __u32, struct cpu_sample_draft, 1, 0);

#ifdef CORAL_BCC
#define profiled_task(task) (task)
#else
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct task_struct___profiled {
	struct task_struct *real_parent;
	__u32 self_exec_id; /* 64 bits since 5.7, of which these are enough */
};

#pragma clang attribute pop
#define profiled_task(task) ((struct task_struct___profiled *)(task))
#endif

static __always_inline bool was_in_kernel(const struct sampled *ctx)
{
#if defined(__TARGET_ARCH_x86)
	return !(ctx->regs.cs & 3);
#else
	return ctx->regs.pstate & 0xf;
#endif
}

static __always_inline void describe(struct cpu_sample *it, __u32 tgid)
{
	struct task_struct *task = this_task(), *parent;

	it->head.kind = RECORD_CPU_SAMPLE;
	it->time_ns = bpf_ktime_get_ns();
	it->stack_start = 0;
	it->tail = 0;
	it->tgid = tgid;
	it->tid = bpf_get_current_pid_tgid();
	it->born = born_of(kernel_read(task, group_leader));
	it->execs = kernel_read(profiled_task(task), self_exec_id);
	parent = kernel_read(profiled_task(task), real_parent);
	it->parent = kernel_read(parent, tgid);
	it->parent_execs = kernel_read(profiled_task(parent), self_exec_id);
	it->cpu = bpf_get_smp_processor_id();
	it->flags = 0;
	it->kernel_frames = 0;
	it->stack_bytes = 0;
	bpf_get_current_comm(it->comm, sizeof(it->comm));
}

/* How many bytes were written to TO: frames of the kernel. */
static __always_inline __u64 read_kernel_frames(struct sampled *ctx, struct cpu_sample *it,
						void *to)
{
	long bytes;

	if (!was_in_kernel(ctx))
		return 0;
	it->flags |= SAMPLE_IN_KERNEL;
	bytes = bpf_get_stack(ctx, to, MOST_FRAMES * sizeof(__u64), 0);
	if (bytes <= 0 || bytes > MOST_FRAMES * sizeof(__u64))
		return 0;
	bytes &= ~7ULL;
	it->kernel_frames = bytes / sizeof(__u64);
	if (it->kernel_frames == MOST_FRAMES)
		it->flags |= SAMPLE_KERNEL_CUT;
	return bytes;
}

/* Likewise: of user space, by frame pointers. */
static __always_inline __u64 read_user_frames(struct sampled *ctx, struct cpu_sample *it, void *to)
{
	long bytes = bpf_get_stack(ctx, to, MOST_FRAMES * sizeof(__u64), BPF_F_USER_STACK);

	it->flags |= SAMPLE_BY_FRAMES;
	if (bytes <= 0 || bytes > MOST_FRAMES * sizeof(__u64))
		return 0;
	if (bytes == MOST_FRAMES * sizeof(__u64))
		it->flags |= SAMPLE_STACK_CUT;
	return bytes & ~7ULL;
}

/*
 * Where the stack begins: functions that call no other keep things below the stack pointer too
 * (x86-64 has a red zone), unless that is a page that is not there.
 */
static __always_inline __u64 stack_start(__u64 sp)
{
	__u64 start = (sp - RED_ZONE_BYTES) & ~7ULL;
	__u8 byte;

	if ((start ^ sp) & ~(USER_READ_STEP - 1ULL) && user_read(&byte, start))
		return sp & ~7ULL;
	return start;
}

/* Likewise: the stack, at most MOST bytes of it. */
static __always_inline __u64 read_user_stack(struct cpu_sample *it, void *to, __u64 most)
{
	__u64 start = stack_start(user_sp(&it->registers)), wanted, bytes;
	__u64 there_are = user_stack_bytes(start, 1ULL << 40);

	it->stack_start = start;
	wanted = there_are < most ? there_are : most;
	bytes = user_stack_read(to, start, wanted, STACK_STEPS);
	if (bytes < wanted)
		it->flags |= SAMPLE_STACK_HIDDEN;
	else if (bytes < there_are)
		it->flags |= SAMPLE_STACK_CUT;
	return bytes & ~7ULL;
}

/*
 * Of all sessions. The kernel's reports of mapped code are of every process, and this wakes user
 * space for those that are watched: it looks at them while they run, however briefly, and sleeps
 * while others map code. The kernel wakes the reader for the first one after a rest. Without room,
 * the reader is awake.
 */
BUFFER(RINGBUF, sightings, 64 << 10);

static __always_inline void tell_sighting(__u32 tgid, bool has_executed)
{
	struct sighting told = {
	    .head = {RECORD_SIGHTING, sizeof(told)},
	    .tgid = tgid,
	    .has_executed = has_executed,
	};

	bpf_ringbuf_output(map_of(sightings), &told, sizeof(told), 0);
}

static __always_inline void tell_first_sample(__u32 slot, __u32 tgid)
{
	struct member *member = member_of(slot, tgid);

	if (member && !member->is_sighted) {
		member->is_sighted = 1;
		tell_sighting(tgid, false);
	}
}

static __always_inline int sample_for(struct sampled *ctx, __u32 slot, __u32 tgid)
{
	struct profile_session *session = bpf_map_lookup_elem(map_of(profile_sessions), &slot);
	__u64 kernel_bytes, user_bytes = 0, size;
	struct cpu_sample_draft *draft;
	__u32 zero = 0;
	void *buffer, *user;
	int error;

	draft = bpf_map_lookup_elem(map_of(sample_drafts), &zero);
	buffer = map_of_session(rings, slot);
	if (!session || !draft || !buffer)
		return 0;
	describe(&draft->sample, tgid);
	kernel_bytes = read_kernel_frames(ctx, &draft->sample, draft->rest);
	if (kernel_bytes > MOST_FRAMES * sizeof(__u64)) /* never: for the verifier */
		return 0;
	user = draft->rest + kernel_bytes;
	if (!user_registers_read(&draft->sample.registers))
		draft->sample.flags |= SAMPLE_NO_USER;
	else if (session->stack_bytes)
		user_bytes = read_user_stack(&draft->sample, user, session->stack_bytes);
	else
		user_bytes = read_user_frames(ctx, &draft->sample, user);
	if (user_bytes > STACK_STEPS * USER_READ_STEP) /* likewise */
		return 0;
	draft->sample.stack_bytes = user_bytes;
	size = sizeof(draft->sample) + kernel_bytes + user_bytes;
	draft->sample.head.length = size;
	error = bpf_ringbuf_output(buffer, draft, size, record_flags(buffer));
	record_account(slot, error);
	return 0;
}

SEC("perf_event")
int PROGRAM(coral_sample, struct sampled *ctx)
{
	__u32 slot = ctx->sample_period & (SESSIONS - 1), tgid = current_tgid();
	struct sessions *all = all_sessions();

	if (!all || !(sessions_of_hub(all) & session_bit(slot)) || surely_unwatched_here(all, tgid))
		return 0;
	if (state_in_session(slot, tgid) != MEMBER_ACTIVE)
		return 0;
	tell_first_sample(slot, tgid);
	return sample_for(ctx, slot, tgid);
}

SUBPROGRAM int is_watched_in_session(__u32 slot, __u32 tgid)
{
	return member_of(slot, tgid) != NULL;
}

SEC("raw_tp/sched_process_exec")
int RAW_PROGRAM(coral_execution, struct task_struct *task)
{
	struct sessions *all = all_sessions();
	__u32 tgid = current_tgid();
	__u64 ours, host;
	int watched;

	if (!all || surely_unwatched_here(all, tgid))
		return 0;
	ours = sessions_of_hub(all);
	host = ours & all->host; /* members of these are added by samples */
	watched = !!host;
	for_each_session (slot, ours & ~host) {
		watched |= is_watched_in_session(slot, tgid);
	}
	if (watched)
		tell_sighting(tgid, true);
	return 0;
}

LICENSED_AS("GPL");
