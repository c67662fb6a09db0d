// SPDX-License-Identifier: Apache-2.0
// Spends CPU time in instances of templates, as `profiled shares` does in functions:
//
//     shares MILLISECONDS [THREADS]
//
// ten calls below main, or below the start of each thread. It reads a byte first, and prints the
// truth.
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

namespace shares {

static thread_local long long spent_ns[3];

static long long cpu_ns()
{
	timespec now;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

struct most {};
struct some {};
struct little {};

template <typename Part, int which> [[gnu::noinline]] void spend(long long ns)
{
	long long began = cpu_ns();

	do {
		for (uint64_t turn = 0, x = 88172645463325252ULL + which; turn < 60000; turn++) {
			x ^= x << 13;
			x ^= x >> 7;
			__asm__ volatile("" : "+r"(x));
		}
	} while (cpu_ns() < began + ns);
	spent_ns[which] += cpu_ns() - began;
}

// Each level has something to destroy, so that it has unwind information of its own.
template <int depth> [[gnu::noinline]] int level(const std::string &text, int left_ms)
{
	std::string longer = text + "x";

	if constexpr (depth == 9) {
		for (; left_ms > 0; left_ms -= 10) {
			spend<most, 0>(7000000);
			spend<some, 1>(2000000);
			spend<little, 2>(1000000);
		}
		return longer.size();
	} else {
		return level<depth + 1>(longer, left_ms) + longer[0];
	}
}

} // namespace shares

int main(int argc, char **argv)
{
	int left_ms = argc > 1 ? atoi(argv[1]) : 0, threads = argc > 2 ? atoi(argv[2]) : 0;
	std::vector<std::thread> made;
	std::vector<long long> spent(3 * (threads + 1));
	auto work = [&](int which, int ms) {
		shares::level<1>("begin", ms);
		for (int i = 0; i < 3; i++)
			spent[3 * which + i] = shares::spent_ns[i];
	};
	char byte;

	if (!left_ms || read(0, &byte, 1) < 0)
		return 2;
	for (int i = 0; i < threads; i++)
		made.emplace_back(work, i + 1, left_ms / threads);
	if (threads)
		for (std::thread &thread : made)
			thread.join();
	else
		work(0, left_ms);
	for (int i = 0; i < 3; i++) {
		long long sum = 0;

		for (int which = 0; which <= threads; which++)
			sum += spent[3 * which + i];
		printf("%s %lld\n", (const char *[]){"most", "some", "little"}[i], sum);
	}
	return 0;
}
