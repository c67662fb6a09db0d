/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Burns CPU time at the bottom of a recursion:
 *
 *     deep DEPTH ITERATIONS [thread | kernel | context]
 *
 * in its first thread, or in another one, or most of the time in system calls, or on a stack of its
 * own with nothing behind it. Each call but the
 * last has FRAME_MARKS words on the stack that tell its depth. It first reads a byte from standard
 * input, and prints the nanoseconds of CPU that the burning took.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define FRAME_MARKS 32
#define MARK	    0xC0FFEE0000000000UL
#define STACK_BYTES (1 << 20)

static long iterations, depth;
static int in_kernel;
static char buffer[1 << 16];
static long long burned_ns;

static long long cpu_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

__attribute__((noinline, noclone)) void deep_burn(void)
{
	volatile unsigned long work = 0;
	long long before_ns = cpu_ns();

	for (long i = 0; i < iterations; i++) {
		work += i;
		if (in_kernel && getrandom(buffer, sizeof(buffer), 0) < 0)
			exit(1);
	}
	burned_ns = cpu_ns() - before_ns;
}

__attribute__((noinline, noclone)) static unsigned long recurse(unsigned long left)
{
	volatile unsigned long marks[FRAME_MARKS];

	for (int i = 0; i < FRAME_MARKS; i++)
		marks[i] = MARK + left;
	if (left)
		return recurse(left - 1) + marks[0];
	deep_burn();
	return marks[0];
}

static void *run(void *unused)
{
	(void)unused;
	return (void *)recurse(depth - 1);
}

static void run_in_context(void)
{
	run(NULL);
}

static int on_its_own_stack(void)
{
	ucontext_t here, there;
	char *stack =
	    mmap(NULL, 2 * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (stack == MAP_FAILED || mprotect(stack + STACK_BYTES, STACK_BYTES, PROT_NONE) ||
	    getcontext(&there))
		return 1;
	there.uc_stack.ss_sp = stack;
	there.uc_stack.ss_size = STACK_BYTES;
	there.uc_link = &here;
	makecontext(&there, run_in_context, 0);
	return swapcontext(&here, &there);
}

int main(int argc, char **argv)
{
	pthread_t thread;
	char byte;

	if (argc < 3 || read(0, &byte, 1) < 0)
		return 2;
	depth = atol(argv[1]);
	iterations = atol(argv[2]);
	in_kernel = argc > 3 && !strcmp(argv[3], "kernel");
	if (argc > 3 && !strcmp(argv[3], "context")) {
		if (on_its_own_stack())
			return 1;
	} else if (argc > 3 && !in_kernel) {
		if (pthread_create(&thread, NULL, run, NULL) || pthread_join(thread, NULL))
			return 1;
	} else {
		run(NULL);
	}
	printf("%lld\n", burned_ns);
	return 0;
}
