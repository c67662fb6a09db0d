/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a system call costs in the best of many short runs: `sessions RUNS CALLS` reads a byte,
 * makes RUNS times CALLS getppid, and prints the nanoseconds of a call in the fastest run. A run of
 * about a millisecond often passes without an interrupt, on a busy machine too.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long long now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv)
{
	long long least_ns = 1LL << 62, began_ns, took_ns;
	int runs, calls;
	char byte;

	if (argc != 3 || read(0, &byte, 1) < 0)
		return 2;
	runs = atoi(argv[1]);
	calls = atoi(argv[2]);
	for (int run = 0; run < runs; run++) {
		began_ns = now_ns();
		for (int call = 0; call < calls; call++)
			syscall(SYS_getppid);
		took_ns = now_ns() - began_ns;
		if (took_ns < least_ns)
			least_ns = took_ns;
	}
	printf("%.2f\n", (double)least_ns / calls);
	return 0;
}
