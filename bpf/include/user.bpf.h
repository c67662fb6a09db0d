/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: user space as programs see it: its memory, its registers, its stack. The layout of
 * registers is that of ptrace(2), the same on every kernel, so nothing here is relocated.
 *
 *	user_read(&to, address)		copies user memory; not 0 if it is not there
 *	user_ip(regs), user_sp(regs), user_fp(regs), user_lr(regs)
 *	user_argument(regs, 1)		of a function at its first instruction, 1 to 6
 *	user_return_value(regs)		of a function at its return
 *	syscall_number(regs), syscall_argument(regs, 1)
 *	user_registers_read(&regs)	those of the current thread, wherever it was interrupted
 *	user_stack_bytes(sp, most)	how much stack there can be from SP on
 *	user_stack_read(to, sp, bytes, steps)	copies it
 *
 * REGS is the context of a uprobe, `&ctx->regs` of a perf event (`struct sampled *ctx`), or a copy
 * by `user_registers_read`. Arguments are those of 64-bit code.
 *
 * Before 5.5 there is one helper for all memory, bpf_probe_read; libbpf and bcc replace the others
 * by it there.
 */
#pragma once

#include "kernel.bpf.h"

#define user_read(to, address) bpf_probe_read_user(to, sizeof(*(to)), (const void *)(address))

#if defined(__TARGET_ARCH_x86)

struct user_registers {
	__u64 r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di;
	__u64 orig_ax, ip, cs, flags, sp, ss;
};

#define user_ip(of)	       ((of)->ip)
#define user_sp(of)	       ((of)->sp)
#define user_fp(of)	       ((of)->bp)
#define user_lr(of)	       0ULL
#define user_return_value(of)  ((of)->ax)
#define USER_ARGUMENT_1(of)    ((of)->di)
#define USER_ARGUMENT_2(of)    ((of)->si)
#define USER_ARGUMENT_3(of)    ((of)->dx)
#define USER_ARGUMENT_4(of)    ((of)->cx)
#define USER_ARGUMENT_5(of)    ((of)->r8)
#define USER_ARGUMENT_6(of)    ((of)->r9)
#define syscall_number(of)     ((of)->orig_ax)
#define SYSCALL_ARGUMENT_4(of) ((of)->r10)

#elif defined(__TARGET_ARCH_arm64)

struct user_registers {
	__u64 x[31], sp, pc, pstate;
};

#define user_ip(of)	       ((of)->pc)
#define user_sp(of)	       ((of)->sp)
#define user_fp(of)	       ((of)->x[29])
#define user_lr(of)	       ((of)->x[30])
#define user_return_value(of)  ((of)->x[0])
#define USER_ARGUMENT_1(of)    ((of)->x[0]) /* of a system call: until its result replaces it */
#define USER_ARGUMENT_2(of)    ((of)->x[1])
#define USER_ARGUMENT_3(of)    ((of)->x[2])
#define USER_ARGUMENT_4(of)    ((of)->x[3])
#define USER_ARGUMENT_5(of)    ((of)->x[4])
#define USER_ARGUMENT_6(of)    ((of)->x[5])
#define syscall_number(of)     ((of)->x[8])
#define SYSCALL_ARGUMENT_4(of) ((of)->x[3])

#else
#error "the registers of this processor are not known here"
#endif

#define SYSCALL_ARGUMENT_1 USER_ARGUMENT_1
#define SYSCALL_ARGUMENT_2 USER_ARGUMENT_2
#define SYSCALL_ARGUMENT_3 USER_ARGUMENT_3
#define SYSCALL_ARGUMENT_5 USER_ARGUMENT_5
#define SYSCALL_ARGUMENT_6 USER_ARGUMENT_6

/* The context of a perf_event program: struct bpf_perf_event_data. */
struct sampled {
	struct user_registers regs; /* the kernel's, if it interrupted the kernel */
	__u64 sample_period;
	__u64 address;
};

#define user_argument(of, number)    USER_ARGUMENT_##number(of)
#define syscall_argument(of, number) SYSCALL_ARGUMENT_##number(of)

#ifdef CORAL_BCC
#include <linux/mm_types.h>

#define KERNEL_STACK_BYTES THREAD_SIZE
#define KERNEL_REGS_BYTES  sizeof(struct pt_regs)
#define user_task(task)	   (task)
#else
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct mm_struct___user {
	unsigned long start_stack;
};

struct thread_struct___user {
#if defined(__TARGET_ARCH_x86)
	unsigned long fsbase;
#else
	struct {
		unsigned long tp_value;
	} uw;
#endif
};

/* The members of a task that this header needs. */
struct task_struct___user {
	void *stack;
	struct mm_struct___user *mm;
	struct thread_struct___user thread;
};

#pragma clang attribute pop
#define KERNEL_STACK_BYTES 16384
#define KERNEL_REGS_BYTES  bpf_core_type_size(struct pt_regs)
#define user_task(task)	   ((struct task_struct___user *)(task))
#endif

/* The registers with which the current thread left user space; false if it never was there. */
static __always_inline bool user_registers_read(struct user_registers *to)
{
	struct task_struct *task = this_task();
	void *regs;

	if (in_kernel_thread())
		return false;
#ifndef CORAL_BCC
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_pt_regs)) /* 5.15 */
		regs = (void *)bpf_task_pt_regs(bpf_get_current_task_btf());
	else
#endif
		/* They lie at the end of its kernel stack. */
		regs = kernel_read(user_task(task), stack) + KERNEL_STACK_BYTES - KERNEL_REGS_BYTES;
	return !bpf_probe_read_kernel(to, sizeof(*to), regs);
}

/* Where the current thread keeps its own variables; glibc and musl put it behind the stack. */
static __always_inline __u64 user_thread_pointer(struct task_struct *task)
{
#if defined(__TARGET_ARCH_x86)
	return kernel_read(user_task(task), thread.fsbase);
#else
	return kernel_read(user_task(task), thread.uw.tp_value);
#endif
}

/*
 * How much of the current thread's stack there can be from SP on, in bytes, at most MOST: nothing
 * of it lies behind the place where a process's first stack began, or a thread's own variables.
 */
static __always_inline __u64 user_stack_bytes(__u64 sp, __u64 most)
{
	struct task_struct *task = this_task();
	__u64 thread_pointer = user_thread_pointer(task);
	typeof(user_task(task)->mm) mm = kernel_read(user_task(task), mm);
	__u64 first = kernel_read(mm, start_stack);

	if (sp < thread_pointer && thread_pointer - sp < most)
		most = thread_pointer - sp;
	if (sp < first && first - sp < most)
		most = first - sp;
	return most;
}

#define USER_READ_STEP 4096 /* pages are no smaller */

/*
 * Copies up to BYTES of the stack from SP on to TO, which has room for STEPS * 4096 bytes; STEPS is
 * a constant. Returns the number of bytes copied. A read that meets an absent page copies nothing:
 * then it is done page by page up to there.
 */
static __always_inline __u64 user_stack_read(void *to, __u64 sp, __u64 bytes, const __u64 steps)
{
	__u64 done = 0;

	if (bytes > steps * USER_READ_STEP)
		bytes = steps * USER_READ_STEP;
	if (!bpf_probe_read_user(to, bytes, (const void *)sp))
		return bytes;
#pragma unroll
	for (int i = 0; i < steps; i++) {
		__u64 step = USER_READ_STEP - ((sp + done) & (USER_READ_STEP - 1));

		/* The second condition is never true: for the verifier. */
		if (done >= bytes || done > (steps - 1) * USER_READ_STEP)
			break;
		if (bpf_probe_read_user(to + done, step, (const void *)(sp + done)))
			break;
		done += step;
	}
	return done < bytes ? done : bytes;
}
