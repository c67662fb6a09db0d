// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* For the tests of tail calls and of subprograms: a call of a function is worked on in stages. */
#include "include/user.bpf.h"
#include "include/stages.bpf.h"

OPTION(__u32, wanted_tgid, 0);

struct work {
	__u64 runs[3]; /* of each stage */
	__u64 sum;     /* of the function's second argument, as the subprogram adds it */
	__u64 ends;    /* tail calls that found no program */
};

STAGES(stages, 4);
MAP(ARRAY, works, __u32, struct work, 1, 0);

static __always_inline struct work *work(void)
{
	__u32 zero = 0;

	return current_tgid() == option(wanted_tgid) ? bpf_map_lookup_elem(map_of(works), &zero)
						     : NULL;
}

LOCAL_SUBPROGRAM int add_weighted(struct work *to, __u64 value, __u32 weight)
{
	if (!to)
		return 0;
	to->sum += value * weight;
	return weight;
}

SEC("uprobe")
int PROGRAM(stage_0, struct user_registers *ctx)
{
	struct work *it = work();

	if (!it)
		return 0;
	it->runs[0]++;
	add_weighted(it, user_argument(ctx, 2), 1);
	tail_call(ctx, stages, 1);
	it->ends++;
	return 0;
}

SEC("uprobe")
int PROGRAM(stage_1, struct user_registers *ctx)
{
	struct work *it = work();

	if (!it)
		return 0;
	it->runs[1]++;
	add_weighted(it, user_argument(ctx, 2), 10);
	tail_call(ctx, stages, 2);
	it->ends++;
	return 0;
}

/* Calls itself, until the kernel has had enough of it. */
SEC("uprobe")
int PROGRAM(stage_2, struct user_registers *ctx)
{
	struct work *it = work();

	if (!it)
		return 0;
	it->runs[2]++;
	tail_call(ctx, stages, 2);
	it->ends++;
	return 0;
}

LICENSED_AS("GPL");
