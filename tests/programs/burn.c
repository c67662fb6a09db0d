/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Burns CPU time:
 *
 *     burn MILLISECONDS
 *
 * It first reads a byte from standard input. It prints, from getrusage over the burning alone: the
 * nanoseconds of CPU used, and how often the kernel switched to something else.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

static long long cpu_ns(const struct rusage *r)
{
	return (r->ru_utime.tv_sec + r->ru_stime.tv_sec) * 1000000000LL +
	       (r->ru_utime.tv_usec + r->ru_stime.tv_usec) * 1000LL;
}

int main(int argc, char **argv)
{
	struct rusage before, now;
	volatile unsigned long work = 0;
	char byte;

	if (argc != 2 || read(0, &byte, 1) < 0)
		return 2;
	getrusage(RUSAGE_SELF, &before);
	do {
		for (int i = 0; i < 200000; i++)
			work += i;
		getrusage(RUSAGE_SELF, &now);
	} while (cpu_ns(&now) - cpu_ns(&before) < atoll(argv[1]) * 1000000LL);
	printf("%lld %ld\n", cpu_ns(&now) - cpu_ns(&before),
	       now.ru_nvcsw + now.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw);
	return 0;
}
