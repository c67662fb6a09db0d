// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * The floor: what it costs that there is a program at all where connections are followed. Whatever
 * tcp_metrics costs beyond these is its own doing.
 */
#include "include/kernel.bpf.h"

#define EMPTY(name, tracepoint)                                                                    \
	SEC("tp_btf/" #tracepoint)                                                                 \
	int name(void *ctx)                                                                        \
	{                                                                                          \
		return 0;                                                                          \
	}

EMPTY(coral_empty_state, inet_sock_set_state)
EMPTY(coral_empty_destroy, tcp_destroy_sock)
EMPTY(coral_empty_segment, tcp_probe)

char LICENSE[] SEC("license") = "GPL";
