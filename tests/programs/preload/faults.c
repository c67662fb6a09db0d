/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Preloaded into a process, it makes system calls fail that loading eBPF needs: one of them, or one
 * and all after it. A test chooses them in the file that FAULTS names (tests/faults.py), which both
 * processes map.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum kind { BPF = 1, PERF_EVENT, MMAP, IOCTL, EPOLL, PIDFD, THREAD };

#define ANY	   0xffff
#define KEPT	   1024
#define KIND(call) ((call) >> 16)

/* A call is the system call in the upper half, and its operation in the lower. */
struct control {
	/* 0: none; 1: the one at `from`; 2: that one and all after it; 3: likewise, those of other
	 * types included */
	_Atomic uint32_t failing;
	uint32_t from; /* 1 is the first */
	uint32_t error;
	uint32_t call; /* only calls of this type count; 0: all but those that create threads */
	_Atomic uint32_t seen; /* calls that count */
	_Atomic uint32_t failed;
	uint32_t calls[KEPT];
};

static struct control *control;

__attribute__((constructor)) static void map_control(void)
{
	const char *path = getenv("FAULTS");
	int fd = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC) : -1;
	long mapped;

	if (fd < 0)
		return;
	mapped =
	    syscall(SYS_mmap, NULL, sizeof(*control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (mapped != -1)
		control = (struct control *)mapped;
	close(fd);
}

static int is_counted(uint32_t call)
{
	uint32_t wanted = control->call;

	if (!wanted)
		return KIND(call) != THREAD;
	return KIND(call) == KIND(wanted) && ((wanted & ANY) == ANY || call == wanted);
}

/* Whether this call must fail; if so, sets errno. */
static int fails(enum kind kind, uint32_t which)
{
	uint32_t call = kind << 16 | (which & 0xffff), mode, number;

	if (!control || !(mode = control->failing))
		return 0;
	if (is_counted(call)) {
		number = ++control->seen;
		if (number <= KEPT)
			control->calls[number - 1] = call;
		if (number != control->from && (mode == 1 || number < control->from))
			return 0;
	} else if (mode != 3 || control->seen < control->from || kind == THREAD) {
		return 0;
	}
	control->failed++;
	errno = control->error;
	return 1;
}

long syscall(long number, ...)
{
	static long (*next)(long, ...);
	long a, b, c, d, e, f;
	va_list rest;

	va_start(rest, number);
	a = va_arg(rest, long), b = va_arg(rest, long), c = va_arg(rest, long);
	d = va_arg(rest, long), e = va_arg(rest, long), f = va_arg(rest, long);
	va_end(rest);
	if ((number == SYS_bpf && fails(BPF, a)) ||
	    (number == SYS_perf_event_open && fails(PERF_EVENT, 0)) ||
	    (number == SYS_pidfd_open && fails(PIDFD, 0)))
		return -1;
	if (!next)
		next = dlsym(RTLD_NEXT, "syscall");
	return next(number, a, b, c, d, e, f);
}

void *mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset)
{
	if (flags & MAP_SHARED && fails(MMAP, fd < 0))
		return MAP_FAILED;
	return (void *)syscall(SYS_mmap, at, bytes, protection, flags, fd, offset);
}

void *mmap64(void *, size_t, int, int, int, off_t) __attribute__((alias("mmap")));

int ioctl(int fd, unsigned long request, ...)
{
	void *argument;
	va_list rest;

	va_start(rest, request);
	argument = va_arg(rest, void *);
	va_end(rest);
	if ((request >> 8 & 0xff) == '$' && fails(IOCTL, request)) /* ioctls of perf events */
		return -1;
	return syscall(SYS_ioctl, fd, request, argument);
}

int epoll_create1(int flags)
{
	return fails(EPOLL, 0) ? -1 : syscall(SYS_epoll_create1, flags);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
		   void *argument)
{
	static int (*next)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

	if (fails(THREAD, 0))
		return EAGAIN;
	if (!next)
		next = dlsym(RTLD_NEXT, "pthread_create");
	return next(thread, attributes, start, argument);
}
