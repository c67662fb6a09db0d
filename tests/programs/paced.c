/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes getppid calls at a steady rate:
 *
 *     paced [OPTIONS OF calls] RATE COUNT
 *
 * It first reads a byte from standard input, whatever the options. Up to 1,000 calls a second, each
 * call has a time of its own; above that, the calls of each millisecond are made together at its
 * start. A late call is made at once. It prints the same line as `calls`: the name, the count, and
 * the nanoseconds from the first call to the last.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SECOND_NS 1000000000LL

static long long now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * SECOND_NS + t.tv_nsec;
}

static void sleep_until(long long ns)
{
	struct timespec t = {.tv_sec = ns / SECOND_NS, .tv_nsec = ns % SECOND_NS};

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

int main(int argc, char **argv)
{
	long rate, count, burst, made = 0;
	long long start;
	char byte;

	if (argc < 3)
		return 2;
	rate = atol(argv[argc - 2]);
	count = atol(argv[argc - 1]);
	burst = rate > 1000 ? rate / 1000 : 1;
	if (read(0, &byte, 1) < 0)
		return 2;
	start = now_ns();
	while (made < count) {
		sleep_until(start + made * SECOND_NS / rate);
		for (long i = 0; i < burst && made < count; i++, made++)
			syscall(SYS_getppid);
	}
	printf("getppid %ld %lld\n", count, now_ns() - start);
	return 0;
}
