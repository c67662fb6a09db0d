/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: the socket that a system call has used, found when the call returns, for kernels that
 * have no tracepoints where sockets are used. The registers still hold the call's arguments then,
 * so that nothing is needed where it begins.
 *
 * The descriptor is looked up after the call has used it. Where another thread has put a different
 * socket there meanwhile, that one's sequence numbers do not fit the call.
 */
#pragma once

#include "include/kernel.bpf.h"
#include "include/net.bpf.h"
#include "include/targets.bpf.h"
#include "operations.bpf.h"

#if defined(__TARGET_ARCH_x86)
#define NR_SENDFILE 40
#define NR_SPLICE   275
#elif defined(__TARGET_ARCH_arm64)
#define NR_SENDFILE 71
#define NR_SPLICE   76
#endif

#ifndef CORAL_BCC
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
};

struct files_struct {
	struct fdtable *fdt;
};

struct task_struct___files {
	struct files_struct *files;
};

#pragma clang attribute pop
#endif

/* What a system call does with its descriptor. */
#define CALL_RECEIVES 2
#define CALL_SENDS    3 /* the lowest bit is enum direction */
#define FLAGS_THIRD   4 /* which argument has flags */
#define FLAGS_FOURTH  8
#define OF_MESSAGES   16 /* it returns how many messages have passed, not how many bytes */
#define SPLICES	      32 /* it receives by the first descriptor, or sends by the third argument */

#define SOCKET_CALLS 512

/* By number, so that the verifier goes one way for all. */
static const __u8 socket_calls[SOCKET_CALLS] = {
    [NR_READ] = CALL_RECEIVES,
    [NR_READV] = CALL_RECEIVES,
    [NR_PREADV2] = CALL_RECEIVES,
    [NR_RECVFROM] = CALL_RECEIVES | FLAGS_FOURTH,
    [NR_RECVMSG] = CALL_RECEIVES | FLAGS_THIRD,
    [NR_RECVMMSG] = CALL_RECEIVES | FLAGS_FOURTH | OF_MESSAGES,
    [NR_WRITE] = CALL_SENDS,
    [NR_WRITEV] = CALL_SENDS,
    [NR_PWRITEV2] = CALL_SENDS,
    [NR_SENDFILE] = CALL_SENDS,
    [NR_SENDTO] = CALL_SENDS | FLAGS_FOURTH,
    [NR_SENDMSG] = CALL_SENDS | FLAGS_THIRD,
    [NR_SENDMMSG] = CALL_SENDS | FLAGS_FOURTH | OF_MESSAGES,
    [NR_SPLICE] = CALL_RECEIVES | SPLICES,
};

struct socket_call {
	__u32 descriptor;
	__u32 target; /* of splice: what is sent to */
	__u32 flags;
	__u32 kind;
};

/* False if the call is none that passes bytes through sockets. */
static __always_inline bool socket_call_find(struct socket_call *call)
{
	struct entry entry;
	__u32 third, fourth;

	if (!entry_read(&entry) || entry.number >= SOCKET_CALLS)
		return false;
	call->kind = socket_calls[entry.number];
	third = call->kind / FLAGS_THIRD & 1;
	fourth = call->kind / FLAGS_FOURTH & 1;
	call->flags = (entry.arguments[2] & -third) | (entry.arguments[3] & -fourth);
	call->descriptor = entry.arguments[0];
	call->target = entry.arguments[2];
	return call->kind;
}

/* The socket with this DESCRIPTOR in the current process, or NULL. */
static __always_inline struct sock *socket_of_descriptor(__u32 descriptor)
{
	struct task_struct___files *task = (void *)bpf_get_current_task_btf();
	struct fdtable *table = task->files->fdt; /* plain loads, as far as there are types */
	struct file *file = NULL;

	if (descriptor < table->max_fds)
		bpf_probe_read_kernel(&file, sizeof(file), &table->fd[descriptor]);
	return file ? socket_of(file) : NULL;
}

/* The socket that CALL has used, or NULL. */
static __always_inline struct sock *socket_of_call(struct socket_call *call)
{
	struct sock *sk = socket_of_descriptor(call->descriptor);

	if (!sk && call->kind & SPLICES) {
		call->kind |= CALL_SENDS;
		sk = socket_of_descriptor(call->target);
	}
	return sk ? socket_at((__u64)sk) : NULL;
}
