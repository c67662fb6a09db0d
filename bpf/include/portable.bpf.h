/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: the differences between the two compilers of these programs. clang builds an object at
 * build time, which libbpf relocates for the running kernel (CO-RE). bcc compiles on the target,
 * with the headers of its kernel, for kernels without BTF; bpf/loading/by_bcc.py is the other
 * half: it creates the maps, and writes their descriptors and the options' values into the
 * instructions.
 *
 *	MAP(HASH, name, key type, value type, entries, flags)	map_of(name)
 *	BUFFER(RINGBUF, name, bytes)				map_of(name)
 *	SESSION_MAPS(HASH, name, ...)	a map for each session	map_of_session(name, slot), or NULL
 *	SESSION_BUFFERS(RINGBUF, name)	likewise, or PERF_EVENT_ARRAY
 *	OPTION(type, name, value)	option(name), a constant of the loaded program
 *	OPTIONS(type, name, count)	element(name, index), a pointer, or NULL
 *	GLOBAL(type, name)		global(name), likewise; user space reads and writes it too
 *	GLOBALS(type, name, count)	element(name, index), likewise
 *	int RAW_PROGRAM(name, ...)	a program of raw_tp/, with the hook's arguments; the loader
 *					makes it one of tp_btf/ where the kernel knows their types
 *	int PROGRAM(name, argument)	a program of any other kind
 *	SUBPROGRAM int name(...)	a function that the verifier goes through once, not at each
 *					call; its arguments are up to five numbers (Linux 5.6)
 *	IN_BTF(struct record, record)	puts a type into the BTF, for user space
 *	kernel_read(task, tgid)		a member of a kernel structure
 *	kernel_read_string(&to, task, comm)
 */
#pragma once

#ifdef CORAL_BCC

#include <uapi/linux/bpf.h>
#include <linux/cgroup-defs.h>
#include <linux/kernfs.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>

/* Kinds of 64-bit constants; the loader replaces each by what its number stands for. */
#define LOAD_MAP    14
#define LOAD_OPTION 15

#define MAP(kind, name, key_type, value_type, entries, flags)	       _Static_assert(1, "")
#define BUFFER(kind, name, bytes)				       _Static_assert(1, "")
#define SESSION_MAPS(kind, name, key_type, value_type, entries, flags) _Static_assert(1, "")
#define SESSION_BUFFERS(kind, name)				       _Static_assert(1, "")
#define map_of(name) ((void *)bpf_pseudo_fd(LOAD_MAP, MAP_##name))

/* Declared for their types only: an option becomes an instruction, anything else an array map. */
#define OPTION(type, name, value)  extern const type name
#define OPTIONS(type, name, count) extern const type name[count]
#define GLOBAL(type, name)	   extern type name
#define GLOBALS(type, name, count) extern type name[count]
#define option(name)		   ((typeof(name))bpf_pseudo_fd(LOAD_OPTION, OPTION_##name))
#define element(name, index)	   ((typeof(&(name)[0]))element_at(map_of(name), index))
#define global(name)		   ((typeof(&(name)))element_at(map_of(name), 0))

static __always_inline void *element_at(void *map, __u32 index)
{
	return bpf_map_lookup_elem(map, &index);
}

#ifndef barrier_var /* as in libbpf */
#define barrier_var(variable) asm volatile("" : "+r"(variable))
#endif

#define SEC(section)
#define IN_SECTION_OF(name) __attribute__((section(".bpf.fn." #name)))
#define PROGRAM(name, argument)                                                                    \
	name(argument) IN_SECTION_OF(name);                                                        \
	int name(argument)
#define RAW_PROGRAM(name, args...)                                                                 \
	name(unsigned long long *ctx) IN_SECTION_OF(name);                                         \
	static __always_inline int name##_(unsigned long long *ctx, ##args);                       \
	int name(unsigned long long *ctx)                                                          \
	{                                                                                          \
		return name##_(___bpf_ctx_cast(args));                                             \
	}                                                                                          \
	static __always_inline int name##_(unsigned long long *ctx, ##args)
#define SUBPROGRAM	     static __always_inline
#define LICENSED_AS(license) _Static_assert(1, license)
#define IN_BTF(type, name)   _Static_assert(1, "")

/* The compiler would work out the addresses of members once, for the whole of a function, and run
 * out of stack. */
#define kernel_read(pointer, member)                                                               \
	({                                                                                         \
		typeof(pointer) from_ = (pointer);                                                 \
		typeof(from_->member) value_;                                                      \
		barrier_var(from_);                                                                \
		bpf_probe_read_kernel(&value_, sizeof(value_), &from_->member);                    \
		value_;                                                                            \
	})
#define field_of(pointer, member) ((void **)&(pointer)->member)
#define kernel_read_string(to, pointer, member)                                                    \
	bpf_probe_read_kernel_str(to, sizeof(*(to)), &(pointer)->member)

#else /* CO-RE */

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

#define MAP(kind, name, key_type, value_type, entries, flags)                                      \
	struct {                                                                                   \
		__uint(type, BPF_MAP_TYPE_##kind);                                                 \
		__uint(max_entries, entries);                                                      \
		__uint(map_flags, flags);                                                          \
		__type(key, key_type);                                                             \
		__type(value, value_type);                                                         \
	} name SEC(".maps")
#define BUFFER(kind, name, bytes)                                                                  \
	struct {                                                                                   \
		__uint(type, BPF_MAP_TYPE_##kind);                                                 \
		__uint(max_entries, bytes);                                                        \
	} name SEC(".maps")
#define map_of(name) (&(name))

/*
 * Maps of sessions (sessions.bpf.h), by slot. User space makes and installs each; the one here is
 * their prototype. Kernels before 5.10 want them to have its size.
 */
#define MAPS_OF_SESSIONS(name, prototype)                                                          \
	struct {                                                                                   \
		__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);                                          \
		__uint(max_entries, SESSIONS);                                                     \
		__type(key, __u32);                                                                \
		__array(values, prototype);                                                        \
	} name SEC(".maps")
#define SESSION_MAPS(kind, name, key_type, value_type, entries, flags)                             \
	struct name##_of_session {                                                                 \
		__uint(type, BPF_MAP_TYPE_##kind);                                                 \
		__uint(max_entries, entries);                                                      \
		__uint(map_flags, flags);                                                          \
		__type(key, key_type);                                                             \
		__type(value, value_type);                                                         \
	};                                                                                         \
	struct name##_element { /* clang only declares types that are met in a prototype alone */  \
		key_type key;                                                                      \
		value_type value;                                                                  \
	};                                                                                         \
	IN_BTF(struct name##_element, name##_element);                                             \
	MAPS_OF_SESSIONS(name, struct name##_of_session)
#define SESSION_BUFFERS(kind, name)                                                                \
	struct name##_of_session {                                                                 \
		__uint(type, BPF_MAP_TYPE_##kind);                                                 \
		PROTOTYPE_##kind                                                                   \
	};                                                                                         \
	MAPS_OF_SESSIONS(name, struct name##_of_session)
#define PROTOTYPE_RINGBUF __uint(max_entries, 4096);
#define PROTOTYPE_PERF_EVENT_ARRAY                                                                 \
	__type(key, __u32);                                                                        \
	__type(value, __u32);

#define OPTION(type, name, value)  const volatile type name = value
#define OPTIONS(type, name, count) const volatile type name[count] = {0}
#define GLOBAL(type, name)	   volatile type name = 0
#define GLOBALS(type, name, count) volatile type name[count] = {0}
#define option(name)		   (name)
#define element(name, index)	   (&(name)[index])
#define global(name)		   (&(name))

#define PROGRAM(name, argument) name(argument)
#define RAW_PROGRAM		BPF_PROG
#define SUBPROGRAM		__noinline
#define LICENSED_AS(license)	char LICENSE[] SEC("license") = license

#define IN_BTF(type, name)	  const type *in_btf_##name __attribute__((unused))

/* The address of a member. */
#define field_of(pointer, member) ((void **)__builtin_preserve_access_index(&(pointer)->member))

/* The pointer goes into a variable, because these macros cannot be nested. */
#define kernel_read(pointer, member)                                                               \
	({                                                                                         \
		typeof(pointer) from_ = (pointer);                                                 \
		BPF_CORE_READ(from_, member);                                                      \
	})
#define kernel_read_string(to, pointer, member)                                                    \
	({                                                                                         \
		typeof(pointer) from_ = (pointer);                                                 \
		BPF_CORE_READ_STR_INTO(to, from_, member);                                         \
	})

#endif

#define map_of_session(name, slot) inner_map_at(map_of(name), slot)

static __always_inline void *inner_map_at(void *maps, __u32 slot)
{
	return bpf_map_lookup_elem(maps, &slot);
}

/* A string in the kernel's memory, at ADDRESS. */
#define read_kernel_string(to, address) bpf_probe_read_kernel_str(to, sizeof(*(to)), address)
