/*
 * Prints where its functions are, a name and an address a line, then `ready`, and waits for a line:
 * `exec PATH` executes another program, anything else ends it. With the argument `move` the text of
 * moved_function lies in anonymous memory, with `overwrite` other code does; with `jit` it has
 * compiled functions, and a perf map that tells them; `again` then tells others at their addresses.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096

__attribute__((noinline, used)) static int static_function(int x)
{
	return x * 3 + 1;
}

__attribute__((noinline, used)) int global_function(int x)
{
	return static_function(x) + 2;
}

__attribute__((aligned(PAGE), noinline, used)) int moved_function(int x)
{
	return x * 7 + 1;
}

__attribute__((aligned(PAGE), noinline, used)) int after_moved(int x)
{
	return x * 11 + 1;
}

static void move(int overwrite)
{
	char *from = (char *)moved_function;
	char *to = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	memcpy(to, from, PAGE);
	if (overwrite)
		memset(to, 0xc3, PAGE);
	if (mprotect(to, PAGE, PROT_READ | PROT_EXEC) ||
	    mremap(to, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, from) != from)
		exit(2);
}

static char *code;

static void tell(const char *mode, const char *first, const char *second)
{
	char path[64];
	FILE *map;

	snprintf(path, sizeof(path), "/tmp/perf-%d.map", getpid());
	map = fopen(path, mode);
	if (!map)
		exit(2);
	fprintf(map, "%lx 20 %s\n%lx 40 %s\n", (long)code, first, (long)code + 64, second);
	fclose(map);
}

int main(int argc, char **argv)
{
	char line[4096];
	int n;

	for (n = 1; n < argc; n++) {
		if (!strcmp(argv[n], "move") || !strcmp(argv[n], "overwrite"))
			move(!strcmp(argv[n], "overwrite"));
		if (!strcmp(argv[n], "jit")) {
			code = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			tell("w", "first compiled", "second;compiled");
			printf("code %lx\n", (long)code);
		}
	}
	printf("static_function %lx\n", (long)static_function);
	printf("global_function %lx\n", (long)global_function);
	printf("moved_function %lx\n", (long)moved_function);
	printf("after_moved %lx\n", (long)after_moved);
	printf("main %lx\n", (long)main);
	printf("getppid %lx\n", (long)dlsym(RTLD_DEFAULT, "getppid"));
	printf("vdso %lx\n", getauxval(AT_SYSINFO_EHDR));
	printf("pid %lx\n", (long)getpid());
	printf("ready\n");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		line[strcspn(line, "\n")] = 0;
		if (!strcmp(line, "again")) {
			tell("a", "third", "fourth");
		} else if (!strcmp(line, "rewrite")) {
			tell("w", "fifth", "sixth");
		} else if (!strncmp(line, "exec ", 5)) {
			execl(line + 5, line + 5, NULL);
			return 3;
		} else {
			break;
		}
		printf("done\n");
		fflush(stdout);
	}
	return global_function(argc) == moved_function(after_moved(argc));
}
