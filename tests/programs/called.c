/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calls `called_function` a given number of times:
 *
 *     called COUNT
 *
 * It first reads a byte from standard input, and prints the sums of what the function was called
 * with and returned.
 */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

__attribute__((noinline, noclone)) long called_function(long a, long b, long c, long d, long e,
							const long *f)
{
	__asm__ volatile("" ::: "memory");
	return a + b + c + d + e + (f ? *f : 0);
}

int main(int argc, char **argv)
{
	long sum = 0, pointed_to, count;
	char byte;

	if (argc != 2 || read(0, &byte, 1) < 0)
		return 2;
	count = atol(argv[1]);
	for (long i = 0; i < count; i++) {
		pointed_to = 5 * i;
		/* every tenth points nowhere */
		sum += called_function(i, 2 * i, 3 * i, -i, 7, i % 10 ? &pointed_to : NULL);
	}
	printf("%ld\n", sum);
	return 0;
}
