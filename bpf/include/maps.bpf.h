/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* One idiom: find an element of a map, or create it. */
#pragma once

#include "account.bpf.h"

/*
 * Returns the element of KEY, created as a copy of INITIAL if there was none, or NULL if the map is
 * full. When two CPUs create the same element at once, one succeeds and both find it.
 */
static __always_inline void *map_lookup_or_init(void *map, void *key, void *initial)
{
	void *value = bpf_map_lookup_elem(map, key);

	if (value)
		return value;
	bpf_map_update_elem(map, key, initial, BPF_NOEXIST);
	return bpf_map_lookup_elem(map, key);
}

/* Likewise, for the session in SLOT: if there is no element in the end, that is a loss of it. */
static __always_inline void *map_lookup_or_account(__u32 slot, void *map, void *key, void *initial)
{
	void *value = bpf_map_lookup_elem(map, key);
	int error;

	if (value)
		return value;
	error = bpf_map_update_elem(map, key, initial, BPF_NOEXIST);
	value = bpf_map_lookup_elem(map, key);
	if (!value)
		account_error(slot, error);
	return value;
}
