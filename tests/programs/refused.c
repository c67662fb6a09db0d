/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes calls that its own seccomp filter answers:
 *
 *     refused ACTION COUNT
 *
 * ACTION: errno (EPERM), trap (a SIGSYS for each call), trace (without a tracer), notify (a thread
 * of the program answers EPERM). It first reads a byte from standard input; then it makes COUNT
 * calls of mkdir, which the filter answers, and as many of getppid, which it allows.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef SYS_mkdir
#define NR_REFUSED SYS_mkdir
#else
#define NR_REFUSED SYS_mkdirat
#endif

static int notifier;
static long count;

static void ignore(int signal)
{
	(void)signal;
}

static void *answer(void *unused)
{
	for (long i = 0; i < count; i++) {
		struct seccomp_notif asked = {};
		struct seccomp_notif_resp given = {.error = -EPERM};

		if (ioctl(notifier, SECCOMP_IOCTL_NOTIF_RECV, &asked))
			exit(3);
		given.id = asked.id;
		if (ioctl(notifier, SECCOMP_IOCTL_NOTIF_SEND, &given))
			exit(3);
	}
	return unused;
}

static unsigned int action_of(const char *name)
{
	if (!strcmp(name, "errno"))
		return SECCOMP_RET_ERRNO | EPERM;
	if (!strcmp(name, "trap"))
		return SECCOMP_RET_TRAP;
	if (!strcmp(name, "trace"))
		return SECCOMP_RET_TRACE;
	if (!strcmp(name, "notify"))
		return SECCOMP_RET_USER_NOTIF;
	exit(2);
}

int main(int argc, char **argv)
{
	struct sigaction handled = {.sa_handler = ignore};
	struct sock_filter filter[] = {
	    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
	    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, NR_REFUSED, 0, 1),
	    BPF_STMT(BPF_RET | BPF_K, argc > 1 ? action_of(argv[1]) : 0),
	    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof(filter) / sizeof(*filter), filter};
	int notifies;
	pthread_t thread;
	char byte;

	if (argc != 3 || read(0, &byte, 1) < 0)
		return 2;
	count = atol(argv[2]);
	notifies = !strcmp(argv[1], "notify");
	sigaction(SIGSYS, &handled, NULL);
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	notifier = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER,
			   notifies ? SECCOMP_FILTER_FLAG_NEW_LISTENER : 0, &program);
	if (notifier < 0)
		return 4;
	if (notifies && pthread_create(&thread, NULL, answer, NULL))
		return 3;
	for (long i = 0; i < count; i++) {
		syscall(NR_REFUSED, "/nonexistent/coral", 0700);
		syscall(SYS_getppid);
	}
	if (notifies)
		pthread_join(thread, NULL);
	return 0;
}
