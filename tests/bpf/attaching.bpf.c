// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* For the tests of attaching: samples, stacks, and calls of one function, of one process. */
#include "include/user.bpf.h"

#define MAX_CPUS    256
#define STACKS	    64
#define STACK_STEPS 4

OPTION(__u32, wanted_tgid, 0);

struct called {
	__u64 entered;
	__u64 left;
	__u64 arguments[6]; /* sums */
	__u64 returned;
	__u64 pointed_to;
	__u64 unreadable;
};

struct stack {
	struct user_registers registers;
	__u64 interrupted_ip; /* the kernel's, if that was interrupted */
	__u32 tid;
	__u32 bytes;
	__u8 copied[STACK_STEPS * USER_READ_STEP];
};

IN_BTF(struct called, called);
IN_BTF(struct stack, stack);

OPTION(__u32, most_bytes, STACK_STEPS *USER_READ_STEP);

GLOBALS(__u64, samples, MAX_CPUS);
MAP(ARRAY, calls, __u32, struct called, 1, 0);

SEC("perf_event")
int PROGRAM(count_samples, struct sampled *ctx)
{
	__u32 cpu = bpf_get_smp_processor_id();
	volatile __u64 *count;

	if (current_tgid() != option(wanted_tgid) || cpu >= MAX_CPUS)
		return 0;
	count = element(samples, cpu);
	if (count)
		*count += 1;
	return 0;
}

GLOBAL(__u32, taken);
MAP(ARRAY, stacks, __u32, struct stack, STACKS, 0);

/* One thread at a time is sampled, so the index needs no atomic. */
SEC("perf_event")
int PROGRAM(copy_stack, struct sampled *ctx)
{
	volatile __u32 *next = global(taken);
	__u32 index;
	struct stack *it;
	__u64 sp;

	if (current_tgid() != option(wanted_tgid) || !next)
		return 0;
	index = *next;
	it = bpf_map_lookup_elem(map_of(stacks), &index);
	if (!it || !user_registers_read(&it->registers))
		return 0;
	sp = user_sp(&it->registers);
	it->interrupted_ip = user_ip(&ctx->regs);
	it->tid = bpf_get_current_pid_tgid();
	it->bytes =
	    user_stack_read(it->copied, sp, user_stack_bytes(sp, option(most_bytes)), STACK_STEPS);
	*next = index + 1;
	return 0;
}

/* One thread calls, so these sums need no atomic. */
static __always_inline struct called *called(void)
{
	__u32 zero = 0;

	if (current_tgid() != option(wanted_tgid))
		return NULL;
	return bpf_map_lookup_elem(map_of(calls), &zero);
}

SEC("uprobe")
int PROGRAM(function_entered, struct user_registers *ctx)
{
	struct called *it = called();
	__u64 value;

	if (!it)
		return 0;
	it->entered++;
	it->arguments[0] += user_argument(ctx, 1);
	it->arguments[1] += user_argument(ctx, 2);
	it->arguments[2] += user_argument(ctx, 3);
	it->arguments[3] += user_argument(ctx, 4);
	it->arguments[4] += user_argument(ctx, 5);
	if (user_read(&value, user_argument(ctx, 6)))
		it->unreadable++;
	else
		it->pointed_to += value;
	return 0;
}

SEC("uprobe")
int PROGRAM(function_left, struct user_registers *ctx)
{
	struct called *it = called();

	if (!it)
		return 0;
	it->left++;
	it->returned += user_return_value(ctx);
	return 0;
}

LICENSED_AS("GPL");
