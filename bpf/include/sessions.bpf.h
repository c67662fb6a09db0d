/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: many sessions share one loaded object. Each has a slot; what is its own is found by
 * the slot: maps (SESSION_MAPS of portable.bpf.h), and elements of plain arrays.
 */
#pragma once

#define SESSIONS 64 /* as many as a mask has bits */
