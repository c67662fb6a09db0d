/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Connects to itself COUNT times, from 127.0.0.9, which has no socket: it makes the client's
 * segments by itself, and sends the one that completes a handshake twice, from two CPUs at once. It
 * accepts each connection and resets it, and prints how many there were:
 *
 *     rivals COUNT
 *
 * It first reads a byte from standard input. Resets from 127.0.0.9 have to be dropped: they answer
 * for a socket that does not exist.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define FIRST_PORT   10000
#define FIRST_NUMBER 1000 /* of the client's bytes */

/* Lets an emulated machine go on with its other CPU. */
#if defined(__x86_64__)
#define relax() __builtin_ia32_pause()
#else
#define relax() sched_yield()
#endif

struct segment {
	struct iphdr ip;
	struct tcphdr tcp;
} __attribute__((packed));

/* What the checksum of TCP covers. */
struct covered {
	unsigned from, to;
	unsigned char zero, protocol;
	unsigned short length;
	struct tcphdr tcp;
} __attribute__((packed));

static struct sockaddr_in server = {.sin_family = AF_INET};
static struct segment segment;
static int asked, answered; /* rounds of the rival */

static int must(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

static void run_on(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	must(sched_setaffinity(0, sizeof(set), &set), "sched_setaffinity");
}

static unsigned short checksum(const struct covered *covered)
{
	unsigned short words[sizeof(*covered) / 2];
	unsigned sum = 0;

	memcpy(words, covered, sizeof(words));
	for (size_t at = 0; at < sizeof(words) / 2; at++)
		sum += words[at];
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* The client's next segment; its SYN if ACK is 0. */
static void make_segment(unsigned short port, unsigned ack)
{
	struct covered covered = {.protocol = IPPROTO_TCP, .length = htons(sizeof(struct tcphdr))};

	segment.ip = (struct iphdr){
	    .version = 4,
	    .ihl = sizeof(struct iphdr) / 4,
	    .tot_len = htons(sizeof(segment)),
	    .ttl = 64,
	    .protocol = IPPROTO_TCP,
	    .saddr = inet_addr("127.0.0.9"),
	    .daddr = server.sin_addr.s_addr,
	};
	covered.from = segment.ip.saddr;
	covered.to = segment.ip.daddr;
	covered.tcp = (struct tcphdr){
	    .source = htons(port),
	    .dest = server.sin_port,
	    .seq = htonl(FIRST_NUMBER + !!ack),
	    .ack_seq = htonl(ack),
	    .doff = sizeof(struct tcphdr) / 4,
	    .syn = !ack,
	    .ack = !!ack,
	    .window = htons(60000),
	};
	segment.tcp = covered.tcp;
	segment.tcp.check = checksum(&covered);
}

static void send_segment(int raw)
{
	must(sendto(raw, &segment, sizeof(segment), 0, (struct sockaddr *)&server, sizeof(server)),
	     "sendto");
}

static int raw_socket(int protocol)
{
	return must(socket(AF_INET, SOCK_RAW, protocol), "socket");
}

/* Sends what the first thread sends, at the same time. */
static void *rival(void *cpu)
{
	int raw = raw_socket(IPPROTO_RAW);

	run_on(*(int *)cpu);
	for (int round = 1;; round++) {
		while (__atomic_load_n(&asked, __ATOMIC_ACQUIRE) < round)
			relax();
		send_segment(raw);
		__atomic_store_n(&answered, round, __ATOMIC_RELEASE);
	}
	return NULL;
}

/* The number that acknowledges the server's SYN to PORT, which arrives at IN. */
static unsigned number_to_acknowledge(int in, unsigned short port)
{
	struct segment got;

	do
		must(recv(in, &got, sizeof(got), 0), "recv");
	while (got.tcp.dest != htons(port) || !got.tcp.syn);
	return ntohl(got.tcp.seq) + 1;
}

static int listening_socket(void)
{
	int listener = must(socket(AF_INET, SOCK_STREAM, 0), "socket");
	socklen_t length = sizeof(server);

	server.sin_addr.s_addr = inet_addr("127.0.0.1");
	must(bind(listener, (struct sockaddr *)&server, length), "bind");
	must(listen(listener, 16), "listen");
	must(getsockname(listener, (struct sockaddr *)&server, &length), "getsockname");
	return listener;
}

static void accept_and_reset(int listener)
{
	struct linger linger = {.l_onoff = 1};
	int accepted = must(accept(listener, NULL, NULL), "accept");

	must(setsockopt(accepted, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger)), "setsockopt");
	close(accepted);
}

int main(int argc, char **argv)
{
	struct sockaddr_in client = {.sin_family = AF_INET};
	int count = argc == 2 ? atoi(argv[1]) : 0, listener = listening_socket();
	int raw = raw_socket(IPPROTO_RAW), in = raw_socket(IPPROTO_TCP), first = -1, last = -1;
	pthread_t thread;
	cpu_set_t usable;
	char byte;

	must(sched_getaffinity(0, sizeof(usable), &usable), "sched_getaffinity");
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &usable))
			continue;
		first = first < 0 ? cpu : first;
		last = cpu;
	}
	client.sin_addr.s_addr = inet_addr("127.0.0.9");
	must(bind(in, (struct sockaddr *)&client, sizeof(client)), "bind");
	if (!count || read(0, &byte, 1) != 1)
		return 2;
	run_on(first);
	if (pthread_create(&thread, NULL, rival, &last))
		return 1;
	for (int round = 1; round <= count; round++) {
		make_segment(FIRST_PORT + round, 0);
		send_segment(raw);
		make_segment(FIRST_PORT + round, number_to_acknowledge(in, FIRST_PORT + round));
		__atomic_store_n(&asked, round, __ATOMIC_RELEASE);
		send_segment(raw);
		while (__atomic_load_n(&answered, __ATOMIC_ACQUIRE) < round)
			relax();
		accept_and_reset(listener);
	}
	printf("%d\n", count);
	return 0;
}
