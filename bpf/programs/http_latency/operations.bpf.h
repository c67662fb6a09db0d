/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: where the bytes lie that a system call has sent or received. The hooks know the socket
 * and how many bytes passed; the registers, with which the thread left user space, know the call
 * and its arguments.
 */
#pragma once

#include "include/kernel.bpf.h"
#include "include/user.bpf.h"

#if defined(__TARGET_ARCH_x86)
#define NR_READ	    0
#define NR_WRITE    1
#define NR_READV    19
#define NR_WRITEV   20
#define NR_SENDTO   44
#define NR_RECVFROM 45
#define NR_SENDMSG  46
#define NR_RECVMSG  47
#define NR_PREADV2  327
#define NR_PWRITEV2 328
#elif defined(__TARGET_ARCH_arm64)
#define NR_READ	    63
#define NR_WRITE    64
#define NR_READV    65
#define NR_WRITEV   66
#define NR_SENDTO   206
#define NR_RECVFROM 207
#define NR_SENDMSG  211
#define NR_RECVMSG  212
#define NR_PREADV2  286
#define NR_PWRITEV2 287
#endif

/* As in the contract of the system calls. */
struct user_iovec {
	__u64 base;
	__u64 length;
};

struct user_msghdr {
	__u64 name;
	__u64 name_length;
	__u64 iov;
	__u64 iov_count;
};

/* The bytes of one operation: pieces of memory, the first of which is at hand. */
struct operation {
	__u64 base; /* of the present piece, and what is left of it */
	__u64 length;
	__u64 iov; /* the next pieces */
	__u64 iov_count;
};

/* How the current system call was entered: its number and its first four arguments. */
struct entry {
	__u64 number;
	__u64 arguments[4];
};

#if defined(__TARGET_ARCH_x86) && !defined(CORAL_BCC)
struct pt_regs___entry {
	unsigned long orig_ax;
	unsigned long di;
	unsigned long si;
	unsigned long dx;
	unsigned long r10;
} __attribute__((preserve_access_index));

#define TS_COMPAT 2
#elif defined(__TARGET_ARCH_arm64) && !defined(CORAL_BCC)
struct pt_regs___entry {
	__u64 regs[31];
	__u64 orig_x0; /* the first argument: the result of the call replaces it in regs */
	int syscallno;
} __attribute__((preserve_access_index));

#define TIF_32BIT (1 << 22)
#endif

static __always_inline bool entry_read(struct entry *entry)
{
#if defined(__TARGET_ARCH_x86) && !defined(CORAL_BCC)
	struct task_struct *task = bpf_get_current_task_btf();
	struct pt_regs___entry *regs = (void *)bpf_task_pt_regs(task);

	/* 32-bit calls have other numbers. */
	if (task->flags & PF_KTHREAD || task->thread_info.status & TS_COMPAT)
		return false;
	entry->number = regs->orig_ax;
	entry->arguments[0] = regs->di;
	entry->arguments[1] = regs->si;
	entry->arguments[2] = regs->dx;
	entry->arguments[3] = regs->r10;
	return true;
#elif defined(__TARGET_ARCH_arm64) && !defined(CORAL_BCC)
	struct task_struct *task = bpf_get_current_task_btf();
	struct pt_regs___entry *regs = (void *)bpf_task_pt_regs(task);

	if (task->flags & PF_KTHREAD || task->thread_info.flags & TIF_32BIT)
		return false;
	entry->number = regs->syscallno;
	entry->arguments[0] = regs->orig_x0;
	entry->arguments[1] = regs->regs[1];
	entry->arguments[2] = regs->regs[2];
	entry->arguments[3] = regs->regs[3];
	return true;
#else
	struct user_registers regs;

	if (!user_registers_read(&regs))
		return false;
	entry->number = syscall_number(&regs);
	entry->arguments[0] = syscall_argument(&regs, 1);
	entry->arguments[1] = syscall_argument(&regs, 2);
	entry->arguments[2] = syscall_argument(&regs, 3);
	entry->arguments[3] = syscall_argument(&regs, 4);
	return true;
#endif
}

/* The first piece of several. */
static __always_inline bool next_piece(struct operation *op)
{
	struct user_iovec iovec;

	if (!op->iov_count || user_read(&iovec, op->iov))
		return false;
	op->iov += sizeof(iovec);
	op->iov_count--;
	op->base = iovec.base;
	op->length = iovec.length;
	return true;
}

/* Whether the bytes that pass are those of no call of the present thread, whatever its registers
 * say. */
static __always_inline bool in_thread_without_calls(void)
{
	return kernel_read(this_task(), flags) & (PF_KTHREAD | PF_IO_WORKER);
}

/* The same number on all architectures. */
#define NR_IO_URING_ENTER 426

/* Whether the bytes that pass are io_uring's: in the call that has it work, or in its threads. */
SUBPROGRAM int by_io_uring(void)
{
	struct entry entry;

	if (kernel_read(this_task(), flags) & PF_IO_WORKER)
		return true;
	return entry_read(&entry) && entry.number == NR_IO_URING_ENTER;
}

/* False if the bytes of the present call cannot be seen: sendfile and splice have none in user
 * memory, io_uring works elsewhere, and of several messages nothing tells which one it is. */
static __always_inline bool operation_find(struct operation *op, __u64 length)
{
	struct user_msghdr header;
	struct entry entry;

	op->length = length;
	op->base = op->iov = op->iov_count = 0;
	if (in_thread_without_calls() || !entry_read(&entry))
		return false;
	switch (entry.number) {
	case NR_READ:
	case NR_WRITE:
	case NR_SENDTO:
	case NR_RECVFROM:
		op->base = entry.arguments[1];
		return true;
	case NR_READV:
	case NR_WRITEV:
	case NR_PREADV2:
	case NR_PWRITEV2:
		op->iov = entry.arguments[1];
		op->iov_count = entry.arguments[2];
		return next_piece(op);
	case NR_SENDMSG:
	case NR_RECVMSG:
		if (user_read(&header, entry.arguments[1]))
			return false;
		op->iov = header.iov;
		op->iov_count = header.iov_count;
		return next_piece(op);
	}
	return false;
}
