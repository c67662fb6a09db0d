/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Burns CPU time at the bottom of a recursion:
 *
 *     deep DEPTH ITERATIONS [thread]
 *
 * in its first thread, or in another one. Each call but the last has FRAME_MARKS words on the stack
 * that tell its depth. It first reads a byte from standard input, and prints the nanoseconds of CPU
 * that the burning took.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define FRAME_MARKS 32
#define MARK	    0xC0FFEE0000000000UL

static long iterations, depth;
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

	for (long i = 0; i < iterations; i++)
		work += i;
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

int main(int argc, char **argv)
{
	pthread_t thread;
	char byte;

	if (argc < 3 || read(0, &byte, 1) < 0)
		return 2;
	depth = atol(argv[1]);
	iterations = atol(argv[2]);
	if (argc > 3) {
		if (pthread_create(&thread, NULL, run, NULL) || pthread_join(thread, NULL))
			return 1;
	} else {
		run(NULL);
	}
	printf("%lld\n", burned_ns);
	return 0;
}
