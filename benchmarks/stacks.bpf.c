// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Ways of getting a sampled thread's registers and stack to user space: copied by the kernel behind
 * a program that only says whether, and by a program into a ring buffer, in place or over a buffer
 * of its CPU.
 */
#include "include/user.bpf.h"
#include "include/stages.bpf.h"

#define STEPS	   4
#define MOST_BYTES (STEPS * USER_READ_STEP)

OPTION(__u32, wanted_tgid, 0);

struct sample {
	__u64 time_ns;
	__u32 tgid;
	__u32 tid;
	struct user_registers registers;
	__u32 stack_bytes;
	__u32 reserved;
};

struct sample_with_stack {
	struct sample sample;
	__u8 stack[MOST_BYTES];
};

IN_BTF(struct sample, sample);

#define MAX_CPUS 256

GLOBALS(__u64, lost, MAX_CPUS);

/* By CPU: when the timer's interrupt began, whether a sample was taken in it, and what those took.
 */
GLOBALS(__u64, began_ns, MAX_CPUS);
GLOBALS(__u64, sampled, MAX_CPUS);
GLOBALS(__u64, interrupts, MAX_CPUS);
GLOBALS(__u64, interrupt_ns, MAX_CPUS);

BUFFER(RINGBUF, ring, 4096);
MAP(PERCPU_ARRAY, scratch, __u32, struct sample_with_stack, 1, 0);

static __always_inline __u32 this_cpu(void)
{
	return bpf_get_smp_processor_id() & (MAX_CPUS - 1);
}

SEC("raw_tp/local_timer_entry")
int PROGRAM(timer_entry, void *ctx)
{
	*element(sampled, this_cpu()) = 0;
	*element(began_ns, this_cpu()) = bpf_ktime_get_ns();
	return 0;
}

SEC("raw_tp/local_timer_exit")
int PROGRAM(timer_exit, void *ctx)
{
	if (!*element(sampled, this_cpu()))
		return 0;
	*element(interrupt_ns, this_cpu()) += bpf_ktime_get_ns() - *element(began_ns, this_cpu());
	*element(interrupts, this_cpu()) += 1;
	return 0;
}

static __always_inline bool wanted(void)
{
	if (current_tgid() != option(wanted_tgid))
		return false;
	*element(sampled, this_cpu()) = 1;
	return true;
}

/* Does nothing: what a sample costs anyhow. */
SEC("perf_event")
int PROGRAM(sample_nothing, struct sampled *ctx)
{
	wanted();
	return 0;
}

/* The kernel copies if it returns 1. */
SEC("perf_event")
int PROGRAM(sample_by_kernel, struct sampled *ctx)
{
	return wanted();
}

static __always_inline bool begin(struct sample *sample)
{
	struct thread thread = current_thread();

	if (!user_registers_read(&sample->registers))
		return false;
	sample->time_ns = bpf_ktime_get_ns();
	sample->tgid = thread.tgid;
	sample->tid = thread.tid;
	sample->reserved = 0;
	return true;
}

static __always_inline int count_lost(void)
{
	*element(lost, this_cpu()) += 1;
	return 0;
}

/* Two copies, and a record as long as the stack. */
SEC("perf_event")
int PROGRAM(sample_to_scratch, struct sampled *ctx)
{
	struct sample_with_stack *it;
	__u64 sp, bytes;
	__u32 zero = 0;

	if (!wanted())
		return 0;
	it = bpf_map_lookup_elem(map_of(scratch), &zero);
	if (!it || !begin(&it->sample))
		return 0;
	sp = user_sp(&it->sample.registers);
	bytes = user_stack_read(it->stack, sp, user_stack_bytes(sp, MOST_BYTES), STEPS);
	it->sample.stack_bytes = bytes;
	if (bytes > MOST_BYTES) /* never: for the verifier */
		return 0;
	if (bpf_ringbuf_output(map_of(ring), it, sizeof(it->sample) + bytes, BPF_RB_NO_WAKEUP))
		return count_lost();
	return 0;
}

/* One copy, and a record of 4, 8 or 16 KiB and a header. */
#define SAMPLE_IN_PLACE(steps)                                                                     \
	SUBPROGRAM int sample_in_place_##steps(__u64 sp, __u64 bytes)                              \
	{                                                                                          \
		struct sample_with_stack *it = bpf_ringbuf_reserve(                                \
		    map_of(ring), sizeof(struct sample) + steps * USER_READ_STEP, 0);              \
                                                                                                   \
		if (!it)                                                                           \
			return count_lost();                                                       \
		if (begin(&it->sample)) {                                                          \
			it->sample.stack_bytes = user_stack_read(it->stack, sp, bytes, steps);     \
			bpf_ringbuf_submit(it, BPF_RB_NO_WAKEUP);                                  \
		} else {                                                                           \
			bpf_ringbuf_discard(it, BPF_RB_NO_WAKEUP);                                 \
		}                                                                                  \
		return 0;                                                                          \
	}

SAMPLE_IN_PLACE(1)
SAMPLE_IN_PLACE(2)
SAMPLE_IN_PLACE(4)

SEC("perf_event")
int PROGRAM(sample_in_place, struct sampled *ctx)
{
	struct user_registers registers;
	__u64 sp, bytes;

	if (!wanted() || !user_registers_read(&registers))
		return 0;
	sp = user_sp(&registers);
	bytes = user_stack_bytes(sp, MOST_BYTES);
	if (bytes <= 1 * USER_READ_STEP)
		return sample_in_place_1(sp, bytes);
	if (bytes <= 2 * USER_READ_STEP)
		return sample_in_place_2(sp, bytes);
	return sample_in_place_4(sp, bytes);
}

LICENSED_AS("GPL");
