/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes exact numbers of system calls, and prints how long they took by its own clock:
 *
 *     calls [--threads T] [--wait] NAME COUNT [NAME COUNT ...]
 *
 * NAME: getppid, openat (of a path that does not exist), nanosleep (of 1 ms), getppid32 (through
 * the 32-bit entry, x86-64 only), write (of one byte to /dev/null), futile (a number that no call
 * has). Each of T threads makes all of them. With --wait it first reads a byte from standard input.
 * It prints a line for each NAME: the name, then the count and the nanoseconds over all threads.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_JOBS 16

static struct job {
	const char *name;
	long count;
	long long ns;
} jobs[MAX_JOBS];
static int nr_jobs;
static int null_fd;

static long long now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void make_calls(const char *name, long count)
{
	struct timespec millisecond = {.tv_nsec = 1000000};

	if (!strcmp(name, "getppid"))
		for (long i = 0; i < count; i++)
			syscall(SYS_getppid);
	else if (!strcmp(name, "openat"))
		for (long i = 0; i < count; i++)
			syscall(SYS_openat, AT_FDCWD, "/nonexistent/coral", O_RDONLY);
	else if (!strcmp(name, "nanosleep"))
		for (long i = 0; i < count; i++)
			syscall(SYS_nanosleep, &millisecond, NULL);
	else if (!strcmp(name, "write"))
		for (long i = 0; i < count; i++)
			syscall(SYS_write, null_fd, "x", 1);
	else if (!strcmp(name, "futile"))
		for (long i = 0; i < count; i++)
			syscall(9999);
#ifdef __x86_64__
	else if (!strcmp(name, "getppid32"))
		for (long i = 0; i < count; i++) {
			long ret;

			__asm__ volatile("int $0x80"
					 : "=a"(ret)
					 : "a"(64L)
					 : "memory", "r8", "r9", "r10", "r11");
		}
#endif
	else
		exit(2);
}

static void *run(void *unused)
{
	(void)unused;
	for (int i = 0; i < nr_jobs; i++) {
		long long start = now_ns();

		make_calls(jobs[i].name, jobs[i].count);
		__atomic_add_fetch(&jobs[i].ns, now_ns() - start, __ATOMIC_RELAXED);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	int threads = 1, arg = 1;
	pthread_t ids[64];
	char byte;

	null_fd = open("/dev/null", O_WRONLY);
	for (; arg < argc && !strncmp(argv[arg], "--", 2); arg++) {
		if (!strcmp(argv[arg], "--wait") && read(0, &byte, 1) < 0)
			return 2;
		if (!strcmp(argv[arg], "--threads"))
			threads = atoi(argv[++arg]);
	}
	for (; arg + 1 < argc && nr_jobs < MAX_JOBS; arg += 2)
		jobs[nr_jobs++] = (struct job){argv[arg], atol(argv[arg + 1]), 0};
	for (int i = 1; i < threads; i++)
		pthread_create(&ids[i], NULL, run, NULL);
	run(NULL);
	for (int i = 1; i < threads; i++)
		pthread_join(ids[i], NULL);
	for (int i = 0; i < nr_jobs; i++)
		printf("%s %ld %lld\n", jobs[i].name, jobs[i].count * threads, jobs[i].ns);
	return 0;
}
