/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* One idiom: the slot of a value in a histogram whose slots double in width. */
#pragma once

#include "kernel.bpf.h"

/* floor(log2(v)), and 0 for 0: six halvings, without a loop and without a branch on the value. */
static __always_inline __u32 log2_u64(__u64 v)
{
	__u32 r = 0, shift;

	shift = (v > 0xFFFFFFFF) << 5, v >>= shift, r |= shift;
	shift = (v > 0xFFFF) << 4, v >>= shift, r |= shift;
	shift = (v > 0xFF) << 3, v >>= shift, r |= shift;
	shift = (v > 0xF) << 2, v >>= shift, r |= shift;
	shift = (v > 0x3) << 1, v >>= shift, r |= shift;
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
