/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reads a byte from standard input. Then a child's calls are interrupted: a sleep by SIGSTOP and
 * SIGCONT, a read by five signals after which it is restarted, and by five after which it fails.
 * The child is killed in its last read. The program itself makes neither reads nor sleeps.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TIMES 5

static int *handled; /* how many signals the child has handled */

static void note(int signal)
{
	(void)signal;
	__atomic_add_fetch(handled, 1, __ATOMIC_RELEASE);
}

static void work(void)
{
	struct sigaction restarts = {.sa_handler = note, .sa_flags = SA_RESTART};
	struct sigaction fails = {.sa_handler = note};
	struct timespec time = {.tv_nsec = 300000000};
	int never[2];
	char byte;

	if (pipe(never))
		_exit(3);
	sigaction(SIGUSR1, &restarts, NULL);
	sigaction(SIGUSR2, &fails, NULL);
	nanosleep(&time, NULL);
	while (read(never[0], &byte, 1))
		;
}

/* Returns once the child is in this call. */
static void wait_for(int call, int number)
{
	char text[32] = {};

	do
		if (pread(call, text, sizeof(text) - 1, 0) < 0)
			exit(4);
	while (strtol(text, NULL, 10) != number || text[0] < '0' || text[0] > '9');
}

int main(void)
{
	char path[32], byte;
	pid_t child;
	int call;

	if (read(0, &byte, 1) < 0)
		return 2;
	handled = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	child = fork();
	if (!child)
		work();
	snprintf(path, sizeof(path), "/proc/%d/syscall", child);
	call = open(path, O_RDONLY);
	wait_for(call, SYS_clock_nanosleep);
	kill(child, SIGSTOP);
	waitpid(child, NULL, WUNTRACED);
	kill(child, SIGCONT);
	for (int i = 0; i < 2 * TIMES; i++) {
		wait_for(call, SYS_read);
		kill(child, i < TIMES ? SIGUSR1 : SIGUSR2);
		while (__atomic_load_n(handled, __ATOMIC_ACQUIRE) <= i)
			sched_yield();
	}
	wait_for(call, SYS_read);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	return 0;
}
