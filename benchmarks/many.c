/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A busy machine's worth of what collectors count, from one program:
 *
 *     many calls PROCESSES NUMBER...
 *     many connections COUNT
 *
 * `calls` forks PROCESSES, each of which makes every system call of the given NUMBERs ten times a
 * second, with -1 for every argument. `connections` opens COUNT connections to itself on 127.0.0.1,
 * and twice a second sends a byte over each in both directions.
 *
 * It prints the id of each process, one a line, then an empty line once all are at work. It runs
 * until it is killed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

static void must(int holds, const char *what)
{
	if (holds)
		return;
	perror(what);
	exit(1);
}

static void make_calls(int count, char **numbers)
{
	for (;;) {
		for (int i = 0; i < count; i++)
			syscall(atol(numbers[i]), -1L, -1L, -1L, -1L, -1L, -1L);
		usleep(100 * 1000);
	}
}

static void fork_all(int processes, int count, char **numbers)
{
	for (int i = 0; i < processes; i++) {
		pid_t pid = fork();

		must(pid >= 0, "fork");
		if (!pid) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			make_calls(count, numbers);
		}
		printf("%d\n", pid);
	}
}

/* Connections that are reset when they close leave no TIME_WAIT behind. */
static void set_reset_on_close(int fd)
{
	struct linger now = {.l_onoff = 1};

	must(!setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now)), "SO_LINGER");
}

static void send_byte(int from, int to)
{
	char byte = 'x';

	must(write(from, &byte, 1) == 1 && read(to, &byte, 1) == 1, "send a byte");
}

static int (*connect_all(int count))[2]
{
	struct rlimit files = {2 * count + 64, 2 * count + 64};
	struct sockaddr_in address = {.sin_family = AF_INET};
	socklen_t size = sizeof(address);
	int (*ends)[2] = calloc(count, sizeof(*ends));
	int listener = socket(AF_INET, SOCK_STREAM, 0);

	must(ends && !setrlimit(RLIMIT_NOFILE, &files), "RLIMIT_NOFILE");
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	must(!bind(listener, (void *)&address, size) && !listen(listener, 128), "listen");
	must(!getsockname(listener, (void *)&address, &size), "getsockname");
	for (int i = 0; i < count; i++) {
		ends[i][0] = socket(AF_INET, SOCK_STREAM, 0);
		must(!connect(ends[i][0], (void *)&address, size), "connect");
		ends[i][1] = accept(listener, NULL, NULL);
		must(ends[i][1] >= 0, "accept");
		set_reset_on_close(ends[i][0]);
		set_reset_on_close(ends[i][1]);
	}
	close(listener);
	return ends;
}

int main(int argc, char **argv)
{
	int (*ends)[2] = NULL;
	int count = argc > 2 ? atoi(argv[2]) : 0;

	if (argc > 3 && !strcmp(argv[1], "calls")) {
		fork_all(count, argc - 3, argv + 3);
	} else if (argc == 3 && !strcmp(argv[1], "connections")) {
		ends = connect_all(count);
		printf("%d\n", getpid());
	} else {
		return 2;
	}
	puts("");
	fflush(stdout);
	if (!ends)
		pause();
	for (;;) {
		for (int i = 0; i < count; i++) {
			send_byte(ends[i][0], ends[i][1]);
			send_byte(ends[i][1], ends[i][0]);
		}
		usleep(500 * 1000);
	}
}
