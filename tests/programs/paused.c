// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* Waits until a signal ends it: the first process of a pod. */
#include <signal.h>
#include <unistd.h>

static void end(int number)
{
	_exit(128 + number);
}

int main(void)
{
	signal(SIGTERM, end);
	for (;;)
		pause();
}
