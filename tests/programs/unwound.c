// Threads that are always busy, in every kind of frame that an unwinder has to know: recursion,
// frames of variable and of realigned size, calls through the linker's stubs and from libc, and a
// signal's handler on the stack, on a stack of its own in one thread. Runs until it is killed.
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define HIDDEN __attribute__((noinline, noclone))

static volatile uint64_t sink;

HIDDEN static uint64_t spin(uint64_t turns)
{
	uint64_t sum = 1;

	for (uint64_t i = 0; i < turns; i++)
		sum = sum * 31 + i;
	sink = sum;
	return sum;
}

HIDDEN static uint64_t recursion(int depth, uint64_t seed)
{
	uint64_t here = seed * 7 + (uint64_t)depth;

	if (depth == 0)
		return spin(2000);
	here += recursion(depth - 1, here) * 3;
	here += spin(20);
	return here ^ seed;
}

HIDDEN static uint64_t variable(size_t bytes, uint64_t seed)
{
	char *room = __builtin_alloca(bytes);

	memset(room, (int)seed, bytes);
	return recursion(3, (uint64_t)room[bytes / 2]) + (uint64_t)room[0];
}

HIDDEN static uint64_t realigned(uint64_t seed, size_t bytes)
{
	_Alignas(128) volatile char wide[128];
	char *room = __builtin_alloca(bytes);

	wide[seed & 127] = (char)seed;
	room[bytes - 1] = 1;
	seed += spin(500);
	return seed + recursion(2, seed) + (uint64_t)wide[seed & 127] + (uint64_t)room[bytes - 1];
}

HIDDEN static uint64_t many_registers(const uint64_t *v)
{
	uint64_t a = v[0], b = v[1], c = v[2], d = v[3], e = v[4], f = v[5], g = v[6];

	for (int i = 0; i < 4; i++) {
		a += spin(100) ^ b;
		b ^= c + (uint64_t)i;
		c += variable(64 + (a & 63), d);
		d ^= e;
		e += realigned(f, 32 + (b & 31));
		f ^= g + a;
		g += b;
	}
	return a ^ b ^ c ^ d ^ e ^ f ^ g;
}

static int compare(const void *a, const void *b)
{
	spin(50);
	return *(const int *)a - *(const int *)b;
}

HIDDEN static uint64_t through_libc(void)
{
	int numbers[64];
	char text[64];
	struct timespec now;

	for (int i = 0; i < 40; i++)
		clock_gettime(CLOCK_MONOTONIC, &now); // in the vdso, where the clock allows it
	for (int i = 0; i < 64; i++)
		numbers[i] = (i * 37) % 64;
	qsort(numbers, 64, sizeof(numbers[0]), compare);
	snprintf(text, sizeof(text), "%d %s %g", numbers[3], "text", (double)numbers[5]);
	return strlen(text) + strtoul(text, NULL, 10);
}

HIDDEN static void handled(int signal)
{
	sink += (uint64_t)signal + recursion(4, 1) + spin(3000000);
}

HIDDEN static void interrupted(uint64_t turn)
{
	if (turn % 256 == 0)
		raise(SIGUSR1);
	sink += many_registers((uint64_t[]){1, 2, 3, 4, 5, 6, 7});
}

static void *thread(void *own_stack)
{
	stack_t stack = {.ss_sp = malloc(1 << 16), .ss_size = 1 << 16};
	sigset_t wanted;

	sigemptyset(&wanted);
	sigaddset(&wanted, SIGUSR1);
	pthread_sigmask(SIG_UNBLOCK, &wanted, NULL);
	if (own_stack)
		sigaltstack(&stack, NULL);
	for (uint64_t turn = 0;; turn++) {
		sink += recursion((int)(turn % 40), turn);
		sink += through_libc();
		interrupted(turn);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = handled, .sa_flags = SA_ONSTACK};
	int threads = argc > 1 ? atoi(argv[1]) : 4;
	pthread_t ids[threads];

	sigaction(SIGUSR1, &action, NULL);
	for (int i = 1; i < threads; i++)
		pthread_create(&ids[i], NULL, thread, i == 1 ? "own" : NULL);
	puts("ready");
	fflush(stdout);
	thread(NULL);
	return 0;
}
