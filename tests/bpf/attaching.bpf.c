// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* For the tests of attaching: counts samples of one process. */
#include "include/kernel.bpf.h"

OPTION(__u32, wanted_tgid, 0);

GLOBALS(__u64, samples, 256); /* by CPU */

SEC("perf_event")
int PROGRAM(count_samples, void *ctx)
{
	__u32 cpu = bpf_get_smp_processor_id();
	volatile __u64 *count;

	if (current_tgid() != option(wanted_tgid) || cpu >= 256)
		return 0;
	count = element(samples, cpu);
	if (count)
		*count += 1;
	return 0;
}

LICENSED_AS("GPL");
