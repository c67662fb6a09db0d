/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* One idiom: find a map's element, or make it. */
#pragma once

#include "kernel.bpf.h"

/*
 * Returns the element of KEY, made as a copy of INITIAL where there was none, or NULL where the
 * map is full. Of two CPUs that make the same element at once, one makes it and both find it.
 */
static __always_inline void *map_lookup_or_init(void *map, void *key, void *initial)
{
	void *value = bpf_map_lookup_elem(map, key);

	if (value)
		return value;
	bpf_map_update_elem(map, key, initial, BPF_NOEXIST);
	return bpf_map_lookup_elem(map, key);
}
