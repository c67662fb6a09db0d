// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * The floor: what it costs that there is a program at all at the start and the end of each system
 * call. Whatever a collector costs beyond these two is its own doing.
 */
#include "include/kernel.bpf.h"

SEC("tp_btf/sys_enter")
int coral_empty_enter(void *ctx)
{
	return 0;
}

SEC("tp_btf/sys_exit")
int coral_empty_exit(void *ctx)
{
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
