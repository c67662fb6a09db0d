// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* For the tests of reading elements by a program that user space runs: squares, but none of 7. */
#include "include/kernel.bpf.h"

#define RECORDS 4

struct bpf_map;

struct square {
	__u64 key;
	__u64 value;
};

MAP(HASH, numbers, __u64, __u64, 100, 0);
MAP(ARRAY, squares, __u32, struct square, RECORDS, BPF_F_MMAPABLE);
GLOBAL(__u32, runs);

static long square_of_key(struct bpf_map *map, __u32 *index, struct square *square, void *ctx)
{
	__u64 key = square->key;
	__u64 *value;

	if (!key)
		return 1;
	value = bpf_map_lookup_elem(map_of(numbers), &key);
	if (value && *value != 7)
		square->value = *value * *value;
	else
		square->key = 0;
	return 0;
}

SEC("syscall")
int squares_run(void *ctx)
{
	*global(runs) += 1;
	bpf_for_each_map_elem(map_of(squares), square_of_key, NULL, 0);
	return 0;
}

LICENSED_AS("GPL");
