/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Like a server that forks for each connection: it reads a byte from standard input, makes COUNT
 * children, each of which ends before the next one is made, writes a byte to standard output, and
 * reads another one:
 *
 *     forking COUNT
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	char byte;

	if (argc != 2 || read(0, &byte, 1) < 0)
		return 2;
	for (long i = 0, count = atol(argv[1]); i < count; i++) {
		/* The library's fork would make calls of its own in the child. */
		pid_t child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);

		if (!child)
			_exit(0);
		waitpid(child, NULL, 0);
	}
	return write(1, &byte, 1) < 0 || read(0, &byte, 1) < 0;
}
