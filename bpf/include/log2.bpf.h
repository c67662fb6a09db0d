/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* One idiom: the slot of a value in a histogram whose slots double in width. */
#pragma once

#include "portable.bpf.h"

/* 1 if V is greater than LIMIT, which is less than 2^63: without a branch, because the verifier
 * goes through each branch of a loop's body in each turn. */
static __always_inline __u64 above(__u64 v, __u64 limit)
{
	return (limit - v) >> 63;
}

/* floor(log2(v)), and 0 for 0: six halvings. */
static __always_inline __u32 log2_u64(__u64 v)
{
	__u64 r = 0, shift;

	shift = above(v, 0xFFFFFFFF) << 5, v >>= shift, r |= shift;
	shift = above(v, 0xFFFF) << 4, v >>= shift, r |= shift;
	shift = above(v, 0xFF) << 3, v >>= shift, r |= shift;
	shift = above(v, 0xF) << 2, v >>= shift, r |= shift;
	shift = above(v, 0x3) << 1, v >>= shift, r |= shift;
	return r | (v >> 1);
}

/*
 * Slot 0 holds values below 2^(first + 1), slot i those in [2^(first + i), 2^(first + i + 1)), and
 * the last slot everything larger.
 */
static __always_inline __u32 log2_slot(__u64 v, __u32 first, __u32 slots)
{
	__u32 r = log2_u64(v);

	r = r > first ? r - first : 0;
	return r < slots ? r : slots - 1;
}
