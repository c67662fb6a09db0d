/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Threads that work all the time, ten calls deep, in one of eight functions each:
 *
 *     busy THREADS
 *
 * It prints `ready`. Then it reads lines: for `kernel` the first thread reads zeros for a while,
 * and there is no answer. For any other it prints, for the time since the line before, all threads
 * together, in nanoseconds: the CPU time of all units of work; and of those that took less than
 * twice the median of their neighbours, their CPU time, and by how much it exceeds that median.
 *
 * A unit is some 0.1 ms: what an interrupt adds is in few of them, and not in the median. What
 * takes as long as a unit is no interrupt of a profiler's: a virtual machine may stand still
 * without notice. The speed of a CPU changes, but not between neighbours.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define OWN	     __attribute__((noinline, noclone, used))
#define MOST_THREADS 8
#define KERNEL_NS    300000000ULL
#define NEIGHBOURS   128
#define MOST_UNITS   (1 << 20)

struct worker {
	pthread_t thread;
	atomic_uint units;
	uint32_t ns[MOST_UNITS];
};

static struct worker *workers;

static uint64_t cpu_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

#define UNIT(name)                                                                                 \
	OWN static uint64_t name(uint64_t x)                                                       \
	{                                                                                          \
		for (int turn = 0; turn < 120000; turn++) {                                        \
			x ^= x << 13;                                                              \
			x ^= x >> 7;                                                               \
			__asm__ volatile("" : "+r"(x));                                            \
		}                                                                                  \
		return x;                                                                          \
	}

UNIT(unit_0)
UNIT(unit_1)
UNIT(unit_2)
UNIT(unit_3)
UNIT(unit_4)
UNIT(unit_5)
UNIT(unit_6)
UNIT(unit_7)

static uint64_t (*const units[])(uint64_t) = {unit_0, unit_1, unit_2, unit_3,
					      unit_4, unit_5, unit_6, unit_7};

/* A frame that holds something, and a call that is no tail call. */
OWN static uint64_t descend(int depth, unsigned int which)
{
	volatile uint64_t room[8];

	room[3] = depth;
	if (!depth)
		return units[which % 8](88172645463325252ULL) + room[3];
	return descend(depth - 1, which) + room[3];
}

static void *work(void *of)
{
	struct worker *worker = of;
	uint64_t began = cpu_ns(), ended;

	for (unsigned int turn = 0;; turn++) {
		unsigned int at = atomic_load(&worker->units);

		descend(7, turn);
		ended = cpu_ns();
		worker->ns[at % MOST_UNITS] = ended - began;
		atomic_store(&worker->units, at + 1);
		began = ended;
	}
	return NULL;
}

static void read_zeros(void)
{
	static char room[1 << 20];
	int fd = open("/dev/zero", O_RDONLY);

	for (uint64_t end = cpu_ns() + KERNEL_NS; fd >= 0 && cpu_ns() < end;)
		if (read(fd, room, sizeof(room)) < 0)
			break;
	close(fd);
}

static int compare(const void *a, const void *b)
{
	return (*(const uint32_t *)a > *(const uint32_t *)b) -
	       (*(const uint32_t *)a < *(const uint32_t *)b);
}

struct sums {
	uint64_t total, good;
	int64_t excess;
};

static void add(struct sums *sums, const uint32_t *ns)
{
	uint32_t sorted[NEIGHBOURS];

	memcpy(sorted, ns, sizeof(sorted));
	qsort(sorted, NEIGHBOURS, sizeof(*sorted), compare);
	for (int i = 0; i < NEIGHBOURS; i++) {
		uint32_t median = sorted[NEIGHBOURS / 2];

		sums->total += sorted[i];
		if (sorted[i] < 2 * median) {
			sums->good += sorted[i];
			sums->excess += (int64_t)sorted[i] - median;
		}
	}
}

int main(int argc, char **argv)
{
	int count = argc == 2 ? atoi(argv[1]) : 0;
	unsigned int began[MOST_THREADS] = {0};
	char line[16];

	if (count < 1 || count > MOST_THREADS)
		return 2;
	workers = calloc(count, sizeof(*workers));
	for (int i = 0; i < count; i++)
		pthread_create(&workers[i].thread, NULL, work, &workers[i]);
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		struct sums sums = {0, 0, 0};

		if (!strcmp(line, "kernel\n")) {
			read_zeros();
			continue;
		}
		for (int i = 0; i < count; i++) {
			unsigned int end = atomic_load(&workers[i].units);

			for (; end - began[i] >= NEIGHBOURS; began[i] += NEIGHBOURS)
				add(&sums, &workers[i].ns[began[i] % MOST_UNITS]);
		}
		printf("%llu %llu %lld\n", (unsigned long long)sums.total,
		       (unsigned long long)sums.good, (long long)sums.excess);
		fflush(stdout);
	}
	return 0;
}
