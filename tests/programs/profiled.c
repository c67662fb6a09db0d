/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Spends CPU time in named functions:
 *
 *     profiled WHAT MILLISECONDS
 *
 * It first reads a byte from standard input. At its end it prints, for each name, the nanoseconds
 * of CPU time that the thread's own clock tells: `NAME NANOSECONDS`, a line each.
 *
 *     shares	spend_most, spend_some, spend_little: 70, 20 and 10 %, ten calls below main
 *     deep	the same, below 400 calls of descend
 *     phases	phase_even and phase_odd, 5 ms of each in turn
 *     threads	two threads that work, one a third as much as the other, and four that wait
 *     children	children of 40 ms, one after the other, each in child_even or child_odd
 *     exec	half in before_exec; then it executes itself, and the rest is in after_exec
 *     system	reads /dev/zero, and asks for its parent
 *     signals	shares, interrupted all the time, in handle_signal
 *     coroutine	shares, on a stack of makecontext
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define OWN __attribute__((noinline, noclone, used))

static long long cpu_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* About a tenth of a millisecond, in the function that holds it. */
#define SPIN()                                                                                     \
	do {                                                                                       \
		for (uint64_t turn_ = 0, x_ = 88172645463325252ULL; turn_ < 60000; turn_++) {      \
			x_ ^= x_ << 13;                                                            \
			x_ ^= x_ >> 7;                                                             \
			__asm__ volatile("" : "+r"(x_));                                           \
		}                                                                                  \
	} while (0)

/* A function that works until the thread has used so much CPU time. */
#define SPENDER(name)                                                                              \
	OWN static void name(long long until_ns)                                                   \
	{                                                                                          \
		do                                                                                 \
			SPIN();                                                                    \
		while (cpu_ns() < until_ns);                                                       \
	}

SPENDER(spend_most)
SPENDER(spend_some)
SPENDER(spend_little)
SPENDER(phase_even)
SPENDER(phase_odd)
SPENDER(work_full)
SPENDER(work_third)
SPENDER(child_even)
SPENDER(child_odd)
SPENDER(before_exec)
SPENDER(after_exec)
SPENDER(handle_signal_work)

static long long spent_ns[3];

static void spend(int which, long long ns, void (*spender)(long long))
{
	long long began = cpu_ns();

	spender(began + ns);
	spent_ns[which] += cpu_ns() - began;
}

/* Calls that are no tail calls, and whose frames hold something. */
#define LEVEL(name, below)                                                                         \
	OWN static int name(int left_ms)                                                           \
	{                                                                                          \
		volatile char room[40 + sizeof(#name)];                                            \
                                                                                                   \
		memset((void *)room, left_ms, sizeof(room));                                       \
		return below(left_ms) + room[3];                                                   \
	}

OWN static int level_9(int left_ms)
{
	for (; left_ms > 0; left_ms -= 10) {
		spend(0, 7000000, spend_most);
		spend(1, 2000000, spend_some);
		spend(2, 1000000, spend_little);
	}
	return 1;
}

LEVEL(level_8, level_9)
LEVEL(level_7, level_8)
LEVEL(level_6, level_7)
LEVEL(level_5, level_6)
LEVEL(level_4, level_5)
LEVEL(level_3, level_4)
LEVEL(level_2, level_3)
LEVEL(level_1, level_2)

static void print_shares(void)
{
	printf("spend_most %lld\nspend_some %lld\nspend_little %lld\n", spent_ns[0], spent_ns[1],
	       spent_ns[2]);
}

OWN static int descend(int depth, int left_ms)
{
	volatile char room[64];

	room[7] = depth;
	if (!depth)
		return level_9(left_ms);
	return descend(depth - 1, left_ms) + room[7];
}

static void phases(int left_ms)
{
	long long origin = cpu_ns(), even = 0, odd = 0, began;

	for (int turn = 0; turn < left_ms / 10; turn++) {
		began = cpu_ns();
		phase_even(origin + turn * 10000000LL + 5000000);
		even += cpu_ns() - began;
		began = cpu_ns();
		phase_odd(origin + turn * 10000000LL + 10000000);
		odd += cpu_ns() - began;
	}
	printf("phase_even %lld\nphase_odd %lld\n", even, odd);
}

static int pipe_ends[2];
static long long full_ns, third_ns;

static void *run_full(void *of)
{
	pthread_setname_np(pthread_self(), "full");
	work_full(*(int *)of * 1000000LL);
	full_ns = cpu_ns();
	return NULL;
}

static void *run_third(void *of)
{
	pthread_setname_np(pthread_self(), "third");
	for (int turn = 1; turn <= *(int *)of / 30; turn++) {
		work_third(turn * 10000000LL);
		usleep(20000);
	}
	third_ns = cpu_ns();
	return NULL;
}

OWN static void *wait_in_read(void *of)
{
	char byte;

	(void)of;
	return read(pipe_ends[0], &byte, 1) < 0 ? &pipe_ends : NULL;
}

OWN static void *wait_in_poll(void *of)
{
	struct pollfd fd = {.fd = pipe_ends[0], .events = POLLIN};

	(void)of;
	poll(&fd, 1, -1);
	return NULL;
}

static void threads(int left_ms)
{
	void *(*const starts[])(void *) = {run_full,	 run_third,    wait_in_read,
					   wait_in_read, wait_in_poll, wait_in_poll};
	pthread_t made[6];

	if (pipe(pipe_ends))
		exit(2);
	for (int i = 0; i < 6; i++)
		pthread_create(&made[i], NULL, starts[i], &left_ms);
	pthread_join(made[0], NULL);
	pthread_join(made[1], NULL);
	close(pipe_ends[1]);
	for (int i = 2; i < 6; i++)
		pthread_join(made[i], NULL);
	printf("work_full %lld\nwork_third %lld\n", full_ns, third_ns);
}

static void children(int left_ms)
{
	long long used[2] = {0, 0}, ns;
	int ends[2];

	if (pipe(ends))
		exit(2);
	for (int turn = 0; turn < left_ms / 40; turn++) {
		if (!fork()) {
			(turn % 2 ? child_odd : child_even)(40000000);
			ns = cpu_ns();
			_exit(write(ends[1], &ns, sizeof(ns)) != sizeof(ns));
		}
		wait(NULL);
		if (read(ends[0], &ns, sizeof(ns)) == sizeof(ns))
			used[turn % 2] += ns;
	}
	printf("child_even %lld\nchild_odd %lld\n", used[0], used[1]);
}

static void execute(const char *program, const char *milliseconds)
{
	before_exec(atoi(milliseconds) / 2 * 1000000LL);
	printf("before_exec %lld\n", cpu_ns());
	fflush(stdout);
	execl(program, program, "executed", milliseconds, NULL);
	exit(2);
}

OWN static void read_zeros(long long until_ns)
{
	static char room[1 << 20];
	int fd = open("/dev/zero", O_RDONLY);

	do {
		if (read(fd, room, sizeof(room)) < 0)
			exit(2);
	} while (cpu_ns() < until_ns);
	close(fd);
}

OWN static void ask_parent(long long until_ns)
{
	do {
		for (int i = 0; i < 500; i++)
			syscall(SYS_getppid);
	} while (cpu_ns() < until_ns);
}

static void system_calls(int left_ms)
{
	for (; left_ms > 0; left_ms -= 10) {
		spend(0, 5000000, read_zeros);
		spend(1, 3000000, ask_parent);
		spend(2, 2000000, spend_little);
	}
	printf("read_zeros %lld\nask_parent %lld\nspend_little %lld\n", spent_ns[0], spent_ns[1],
	       spent_ns[2]);
}

OWN static void handle_signal(int signal)
{
	(void)signal;
	handle_signal_work(cpu_ns() + 1000000);
}

static void coroutine(int milliseconds)
{
	level_1(milliseconds);
}

static void run_coroutine(int milliseconds)
{
	static ucontext_t caller, callee;
	static char stack[256 << 10];

	if (getcontext(&callee))
		exit(2);
	callee.uc_stack.ss_sp = stack;
	callee.uc_stack.ss_size = sizeof(stack);
	callee.uc_link = &caller;
	makecontext(&callee, (void (*)(void))coroutine, 1, milliseconds);
	if (swapcontext(&caller, &callee))
		exit(2);
	print_shares();
}

int main(int argc, char **argv)
{
	const char *what = argc == 3 ? argv[1] : "";
	int milliseconds = argc == 3 ? atoi(argv[2]) : 0;
	const struct itimerval every = {{0, 3000}, {0, 3000}};
	char byte;

	if (!strcmp(what, "executed")) {
		long long began = cpu_ns();

		after_exec(began + milliseconds / 2 * 1000000LL);
		printf("after_exec %lld\n", cpu_ns() - began);
		return 0;
	}
	if (argc != 3 || read(0, &byte, 1) < 0)
		return 2;
	if (!strcmp(what, "phases")) {
		phases(milliseconds);
	} else if (!strcmp(what, "threads")) {
		threads(milliseconds);
	} else if (!strcmp(what, "children")) {
		children(milliseconds);
	} else if (!strcmp(what, "exec")) {
		execute(argv[0], argv[2]);
	} else if (!strcmp(what, "system")) {
		system_calls(milliseconds);
	} else if (!strcmp(what, "coroutine")) {
		run_coroutine(milliseconds);
	} else if (!strcmp(what, "deep")) {
		descend(400, milliseconds);
		print_shares();
	} else {
		if (!strcmp(what, "signals")) {
			signal(SIGPROF, handle_signal);
			setitimer(ITIMER_PROF, &every, NULL);
		}
		level_1(milliseconds);
		print_shares();
	}
	return 0;
}
