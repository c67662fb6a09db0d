// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * For the tests of records: each getppid of one process is numbered and sent to one session, as a
 * record of one of three kinds and sizes. And for those of the account: a program in a timer's
 * interrupt counts in the same account as a program that it interrupts.
 */
#define RECORD_MOST_BYTES 2048
#include "include/kernel.bpf.h"
#include "include/records.bpf.h"

#ifdef __TARGET_ARCH_arm64
#define NR_GETPPID 173
#else
#define NR_GETPPID 110
#endif

#define SLOT	  5
#define BIG	  240
#define ADDITIONS 256

enum record_kind {
	RECORD_SMALL = 1,
	RECORD_MIDDLE,
	RECORD_BIG,
};

struct small {
	struct record_head head;
	__u64 seq;
};

struct middle {
	struct record_head head;
	__u64 seq;
	__u32 same[7];
};

struct big {
	struct record_head head;
	__u64 seq;
	__u64 same[BIG];
};

OPTION(__u32, wanted_tgid, 0);
OPTION(bool, additions, false);
GLOBAL(__u64, seq);
GLOBAL(__u64, ticks);
IN_BTF(enum record_kind, record_kind);
IN_BTF(struct small, small);
IN_BTF(struct middle, middle);
IN_BTF(struct big, big);

static __always_inline void send_middle(void *ctx, __u64 number)
{
	struct middle middle = {.head.kind = RECORD_MIDDLE, .seq = number};
	int i;

	for (i = 0; i < 7; i++)
		middle.same[i] = number;
	record_send(ctx, SLOT, &middle, sizeof(middle));
}

static __always_inline void send_big(void *ctx, __u64 number, bool discard)
{
	struct big *big = record_reserve(SLOT, RECORD_BIG, sizeof(*big));
	int i;

	if (!big)
		return;
	big->seq = number;
	for (i = 0; i < BIG; i++)
		big->same[i] = number;
	if (discard)
		record_discard(big);
	else
		record_submit(ctx, SLOT, big, sizeof(*big));
}

static __always_inline void add(void)
{
	struct account *account = account_of(SLOT);
	int i;

	for (i = 0; account && i < ADDITIONS; i++)
		account_add(&account->seen);
}

SEC("raw_tp/sys_enter")
int RAW_PROGRAM(records_enter, void *regs, long id)
{
	struct small small = {.head.kind = RECORD_SMALL};

	if (id != NR_GETPPID || current_tgid() != option(wanted_tgid))
		return 0;
	if (option(additions)) {
		add();
		return 0;
	}
	small.seq = (*global(seq))++; /* one thread makes the calls */
	switch (small.seq % 7) {
	case 3:
		send_middle(ctx, small.seq);
		break;
	case 4:
		send_big(ctx, small.seq, false);
		break;
	case 5:
		send_big(ctx, small.seq, true);
		break;
	default:
		record_send(ctx, SLOT, &small, sizeof(small));
	}
	return 0;
}

SEC("perf_event")
int PROGRAM(records_tick, void *ctx)
{
	struct account *account = account_of(SLOT);

	if (account) {
		account_add(&account->seen);
		__sync_fetch_and_add(global(ticks), 1);
	}
	return 0;
}

LICENSED_AS("GPL");
