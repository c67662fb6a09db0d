/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes children in one way. Each child makes exactly CALLS calls of getppid, from its very first
 * call on; the program itself makes none:
 *
 *     family WAY CHILDREN CALLS
 *
 * WAY: fork, vfork, thread, spawn (posix_spawn of `family leaf CALLS`), exec (fork, then exec of
 * that), threadexec (fork, then exec of that by another thread than the first), daemon (fork
 * twice; the last call is made when the process between has ended).
 * It first reads a byte from standard input, and ends after all its children.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define THREAD_STACK (64 << 10)
#define THREAD_FLAGS                                                                               \
	(CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM)

extern char **environ;

static long calls;
static char *calls_text;
static int threads_done;

static void make_calls(long count)
{
	for (long i = 0; i < count; i++)
		syscall(SYS_getppid);
}

/* The library's fork would make calls of its own in the child. */
static pid_t bare_fork(void)
{
	return syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
}

static int thread(void *unused)
{
	(void)unused;
	make_calls(calls);
	__atomic_add_fetch(&threads_done, 1, __ATOMIC_RELEASE);
	return 0;
}

static void *exec_leaf(void *unused)
{
	(void)unused;
	execl("/proc/self/exe", "leaf", "leaf", calls_text, NULL);
	_exit(3);
}

static void exec_leaf_in_thread(void)
{
	pthread_t id;

	if (!pthread_create(&id, NULL, exec_leaf, NULL))
		pthread_join(id, NULL);
	_exit(3);
}

/* Two pipes: one tells the daemon that its parent has ended, the other tells its own end. */
static void make_daemon(void)
{
	int parent_ended[2], daemon_ended[2];
	char byte;
	pid_t child;

	if (pipe(parent_ended) || pipe(daemon_ended))
		exit(3);
	child = bare_fork();
	if (!child) {
		if (bare_fork())
			_exit(0);
		make_calls(calls - 1);
		setsid();
		if (read(parent_ended[0], &byte, 1) == 1)
			make_calls(1);
		_exit(0);
	}
	close(daemon_ended[1]);
	waitpid(child, NULL, 0);
	if (write(parent_ended[1], "x", 1) != 1 || read(daemon_ended[0], &byte, 1))
		exit(3);
}

static void make_child(const char *way)
{
	char *leaf[] = {"leaf", "leaf", calls_text, NULL};
	pid_t child = -1;

	if (!strcmp(way, "daemon")) {
		make_daemon();
		return;
	}
	if (!strcmp(way, "thread")) {
		char *stack = malloc(THREAD_STACK);

		if (!stack || clone(thread, stack + THREAD_STACK, THREAD_FLAGS, NULL) < 0)
			exit(3);
		return;
	}
	if (!strcmp(way, "vfork")) {
		child = vfork();
		if (!child) {
			make_calls(calls);
			_exit(0);
		}
	} else if (!strcmp(way, "spawn")) {
		if (posix_spawn(&child, "/proc/self/exe", NULL, NULL, leaf, environ))
			exit(3);
	} else {
		child = bare_fork();
		if (!child && !strcmp(way, "exec"))
			exec_leaf(NULL);
		if (!child && !strcmp(way, "threadexec"))
			exec_leaf_in_thread();
		if (!child) {
			make_calls(calls);
			_exit(0);
		}
	}
}

int main(int argc, char **argv)
{
	char byte;

	if (argc == 3 && !strcmp(argv[1], "leaf")) {
		make_calls(atol(argv[2]));
		return 0;
	}
	if (argc != 4 || read(0, &byte, 1) < 0)
		return 2;
	calls_text = argv[3];
	calls = atol(calls_text);
	for (int i = 0, children = atoi(argv[2]); i < children; i++)
		make_child(argv[1]);
	if (!strcmp(argv[1], "thread"))
		while (__atomic_load_n(&threads_done, __ATOMIC_ACQUIRE) < atoi(argv[2]))
			sched_yield();
	while (wait(NULL) > 0)
		;
	return 0;
}
