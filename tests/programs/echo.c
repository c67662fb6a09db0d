/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An echo server on 127.0.0.1 and its client, each with one thread:
 *
 *     echo serve
 *     echo ask PORT CONNECTIONS MESSAGES BYTES
 *
 * The server prints its port, and echoes one connection after the other until it is killed. The
 * client makes CONNECTIONS, one after the other. On each it sends MESSAGES of BYTES, one at a time,
 * waits for each to come back, and closes. It prints its elapsed time and its CPU time, in
 * nanoseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static char buffer[1 << 20];

static long long ns_of(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void must(int holds, const char *what)
{
	if (holds)
		return;
	perror(what);
	exit(1);
}

/* Small messages are sent at once. */
static void set_no_delay(int fd)
{
	int yes = 1;

	must(!setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes)), "TCP_NODELAY");
}

static void put(int fd, size_t bytes)
{
	must(write(fd, buffer, bytes) == (ssize_t)bytes, "write");
}

static void serve(void)
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	socklen_t size = sizeof(address);
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	must(!bind(fd, (void *)&address, size) && !listen(fd, 128), "listen");
	must(!getsockname(fd, (void *)&address, &size), "getsockname");
	printf("%d\n", ntohs(address.sin_port));
	fflush(stdout);
	for (;;) {
		int one = accept(fd, NULL, NULL);
		ssize_t bytes;

		must(one >= 0, "accept");
		set_no_delay(one);
		while ((bytes = read(one, buffer, sizeof(buffer))) > 0)
			put(one, bytes);
		close(one);
	}
}

static void ask(int port, long connections, long messages, size_t bytes)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
	long long wall, cpu;

	must(bytes <= sizeof(buffer), "BYTES");
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	memset(buffer, 1, bytes);
	wall = ns_of(CLOCK_MONOTONIC);
	cpu = ns_of(CLOCK_PROCESS_CPUTIME_ID);
	for (long i = 0; i < connections; i++) {
		int fd = socket(AF_INET, SOCK_STREAM, 0);

		must(!connect(fd, (void *)&address, sizeof(address)), "connect");
		set_no_delay(fd);
		for (long message = 0; message < messages; message++) {
			put(fd, bytes);
			for (size_t got = 0; got < bytes;) {
				ssize_t more = read(fd, buffer, bytes - got);

				must(more > 0, "read");
				got += more;
			}
		}
		close(fd);
	}
	printf("%lld %lld\n", ns_of(CLOCK_MONOTONIC) - wall, ns_of(CLOCK_PROCESS_CPUTIME_ID) - cpu);
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "serve"))
		serve();
	if (argc != 6 || strcmp(argv[1], "ask"))
		return 2;
	ask(atoi(argv[2]), atol(argv[3]), atol(argv[4]), atol(argv[5]));
	return 0;
}
