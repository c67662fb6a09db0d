/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * Connections that were there before a session: which side has sent the last bytes. A request that
 * follows bytes of its own side may be the rest of a body, or the response to one before it may
 * still be to come, so that it is not tried (see `passed`). What the programs see later tells that
 * too, but of the first bytes that they see only TCP's own clock does.
 *
 * Included by http_latency.bpf.c.
 */
#pragma once

#ifndef CORAL_BCC /* iterators need BTF */

/* enum direction + 1 of the last bytes, 0 if that cannot be told: both have passed in one tick of
 * the clock. */
static __always_inline __u64 last_spoken(struct tcp_sock *tp)
{
	bool received = passed_so_far(tp, RECEIVED, false) > 1; /* more than a SYN, or a FIN */
	bool sent = passed_so_far(tp, SENT, false) > 1;
	__s32 later;

	if (!received || !sent)
		return sent ? SENT + 1 : received ? RECEIVED + 1 : 0;
	later = kernel_read(tp, lsndtime) - kernel_read(tp, inet_conn.icsk_ack.lrcvtime);
	if (!later)
		return 0;
	return (later > 0 ? SENT : RECEIVED) + 1;
}

/* A process that the sessions WATCHING watch has SOCKET open. */
SUBPROGRAM int had_before(__u64 socket, __u64 watching)
{
	struct sock *sk = (struct sock *)socket;
	struct connection *c = connection_of(sk);
	struct tcp_sock *tp = tcp_of(sk, false);
	__u64 last;

	/* What waits to be read is seen when it is. */
	if (!tp || state_of(sk) == TCP_LISTEN ||
	    kernel_read(tp, rcv_nxt) != kernel_read(tp, copied_seq))
		return 0;
	last = last_spoken(tp);
	if (!last)
		return 0;
	if (!c) {
		c = connection_make(sk, tp, watching, RECEIVED, 0, false);
		if (!c)
			return 0;
		not_read(c, UNREAD_JOINED);
	}
	if (c->unread == UNREAD_JOINED)
		c->unread_last = last;
	return 0;
}

/* Walks the open files of all processes. */
SEC("iter/task_file")
int coral_join_iter(struct bpf_iter__task_file *ctx)
{
	struct sessions *all = all_sessions();
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	__u64 watching;
	struct sock *sk;

	if (!task || !file || !all || surely_unwatched_here(all, task->tgid))
		return 0;
	sk = socket_of(file);
	if (!sk || !is_tcp(sk, false))
		return 0;
	watching = sessions_in_state(sessions_of_hub(all), task->tgid, MEMBER_ACTIVE);
	if (watching)
		had_before((__u64)sk, watching);
	return 0;
}

#endif
