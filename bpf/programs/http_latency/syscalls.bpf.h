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
#define NR_RECVMMSG 299
#define NR_SENDMMSG 307
#elif defined(__TARGET_ARCH_arm64)
#define NR_SENDFILE 71
#define NR_SPLICE   76
#define NR_RECVMMSG 243
#define NR_SENDMMSG 269
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

/* What a system call has done with a socket. */
struct socket_call {
	__u32 direction;
	__u32 descriptor;
	__u32 flags;
	__u32 target;	  /* of splice: the descriptor that is written to; one of both is a pipe */
	bool of_messages; /* the call returns how many messages have passed, not how many bytes */
};

#define NO_DESCRIPTOR 0xFFFFFFFF

/* False if the call is none that passes bytes through sockets. */
static __always_inline bool socket_call_find(struct socket_call *call)
{
	struct entry entry;

	if (!entry_read(&entry))
		return false;
	call->direction = SENT;
	call->descriptor = entry.arguments[0];
	call->target = NO_DESCRIPTOR;
	call->flags = 0;
	call->of_messages = false;
	switch (entry.number) {
	case NR_READ:
	case NR_READV:
	case NR_PREADV2:
		call->direction = RECEIVED;
		return true;
	case NR_WRITE:
	case NR_WRITEV:
	case NR_PWRITEV2:
	case NR_SENDFILE:
		return true;
	case NR_RECVMMSG:
		call->of_messages = true;
		/* fall through */
	case NR_RECVFROM:
		call->direction = RECEIVED;
		call->flags = entry.arguments[3];
		return true;
	case NR_SENDMMSG:
		call->of_messages = true;
		/* fall through */
	case NR_SENDTO:
		call->flags = entry.arguments[3];
		return true;
	case NR_RECVMSG:
		call->direction = RECEIVED;
		/* fall through */
	case NR_SENDMSG:
		call->flags = entry.arguments[2];
		return true;
	case NR_SPLICE:
		call->direction = RECEIVED;
		call->target = entry.arguments[2];
		return true;
	}
	return false;
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

/* The socket that CALL has used, or NULL. Sets the direction of splice. */
static __always_inline struct sock *socket_of_call(struct socket_call *call)
{
	struct sock *sk = socket_of_descriptor(call->descriptor);

	if (!sk && call->target != NO_DESCRIPTOR) {
		call->direction = SENT;
		sk = socket_of_descriptor(call->target);
	}
	return sk ? socket_at((__u64)sk) : NULL;
}
