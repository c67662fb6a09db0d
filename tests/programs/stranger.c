/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes a child with a given process id, which has to be free; the child makes COUNT calls of
 * getuid, and the program itself none:
 *
 *     stranger PID COUNT
 */
#define _GNU_SOURCE
#include <linux/sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct clone_args how = {.exit_signal = SIGCHLD, .set_tid_size = 1};
	int status = 1;
	pid_t wanted;
	long child;

	if (argc != 3)
		return 2;
	wanted = atoi(argv[1]);
	how.set_tid = (uintptr_t)&wanted;
	child = syscall(SYS_clone3, &how, sizeof(how));
	if (child < 0)
		return 3;
	if (!child) {
		for (long i = 0, count = atol(argv[2]); i < count; i++)
			syscall(SYS_getuid);
		_exit(0);
	}
	waitpid(child, &status, 0);
	return status ? 4 : 0;
}
