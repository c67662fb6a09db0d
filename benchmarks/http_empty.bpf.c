// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * The floor: what it costs that there is a program at all where sockets are used. Whatever
 * http_latency costs beyond these is its own doing.
 */
#include "include/kernel.bpf.h"

SEC("tp_btf/sock_send_length")
int coral_empty_send(void *ctx)
{
	return 0;
}

SEC("tp_btf/sock_recv_length")
int coral_empty_receive(void *ctx)
{
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
