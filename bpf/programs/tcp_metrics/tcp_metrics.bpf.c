// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Follows the TCP connections of watched processes: which process opened them, what they carried
 * and how they ended. In events mode, sends a record of each state change, retransmit and reset
 * instead.
 *
 * The kernel keeps most of the figures itself, in struct tcp_sock. They are read, not counted
 * again: when user space asks (copy_live), and when a connection reaches CLOSE, its last state
 * change. These programs only count what the kernel does not count separately.
 */
#include "include/kernel.bpf.h"
#include "include/account.bpf.h"
#include "connections.bpf.h"
#include "include/net.bpf.h"
#include "include/records.bpf.h"
#include "include/targets.bpf.h"

/* As enum What of the contract. */
enum what {
	WHAT_NONE,
	WHAT_STATE,
	WHAT_RETRANSMIT_FAST,
	WHAT_RETRANSMIT_TIMEOUT,
	WHAT_RETRANSMIT_TAIL_PROBE,
	WHAT_RETRANSMIT_HANDSHAKE,
	WHAT_RESET_SENT,
	WHAT_RESET_RECEIVED,
};

OPTION(bool, refresh_at_segments, false); /* where no program reads open connections */
OPTION(bool, make_cookies, false);	  /* programs may ask for one (5.12) */

#define REFRESH_NS 10000000

enum record_kind {
	RECORD_TCP_EVENT = 1,
	RECORD_TCP_ENDED,
};

/* The record of one event. */
struct tcp_event {
	struct record_head head;
	__u64 time_ns;
	__u64 connection_id;
	__u8 local[ADDRESS_BYTES];
	__u8 remote[ADDRESS_BYTES];
	char name[COMM_BYTES];
	__u32 pid;
	__u32 network;
	__u32 local_port;
	__u32 remote_port;
	__u32 role;
	__u32 what;
	__u32 old_state;
	__u32 new_state;
	__u32 count;
	__u32 reason;
	__u32 error;
	__u32 end;
	__u32 scope_id;
	__u32 group; /* of the process, see struct member */
};

/* The record of a connection that has ended. */
struct tcp_ended {
	struct record_head head;
	struct tcp_connection connection;
};

IN_BTF(struct tcp_event, tcp_event);
IN_BTF(struct tcp_ended, tcp_ended);
IN_BTF(enum record_kind, record_kind);

static __always_inline void send_event_of(void *ctx, __u32 slot, struct tcp_connection *c,
					  __u64 time_ns, __u32 what, __u32 old_state,
					  __u32 new_state, __u32 count)
{
	struct tcp_event event = {
	    .head.kind = RECORD_TCP_EVENT,
	    .time_ns = time_ns,
	    .connection_id = c->cookie,
	    .pid = c->pid,
	    .network = c->network,
	    .local_port = c->local_port,
	    .remote_port = c->remote_port,
	    .role = c->role,
	    .what = what,
	    .old_state = old_state,
	    .new_state = new_state,
	    .count = count,
	    .error = c->error,
	    .end = new_state == TCP_CLOSE ? c->end : END_OPEN,
	    .scope_id = c->scope_id,
	    .group = c->group,
	};

	if (!sends_events(slot))
		return;
	if (what == WHAT_RESET_SENT)
		event.reason = c->reset_reason;
	__builtin_memcpy(event.local, c->local, ADDRESS_BYTES);
	__builtin_memcpy(event.remote, c->remote, ADDRESS_BYTES);
	__builtin_memcpy(event.name, c->comm, COMM_BYTES);
	record_send(ctx, slot, &event, sizeof(event));
}

static __always_inline void send_event(void *ctx, __u32 slot, struct tcp_connection *c, __u32 what,
				       __u32 old_state, __u32 count)
{
	send_event_of(ctx, slot, c, bpf_ktime_get_ns(), what, old_state, c->state, count);
}

/* Beginnings. */

static __always_inline void send_end(void *ctx, __u32 slot, struct tcp_connection *c)
{
	struct tcp_ended *ended;

	if (sends_events(slot))
		return;
	if (c->role == ROLE_LISTENER && !c->syn_ack_retransmits && !c->resets_sent &&
	    c->listen_drops == c->found_listen_drops)
		return;
	ended = record_reserve(slot, RECORD_TCP_ENDED, sizeof(*ended));
	if (!ended)
		return;
	__builtin_memcpy(&ended->connection, c, sizeof(*c));
	record_submit(ctx, slot, ended, sizeof(*ended));
}

/* A watched process makes a connection, or a listener. */
static __always_inline void begin_by_process(void *ctx, __u32 slot, struct sock *sk,
					     struct member *member, __u8 role, int old, int state)
{
	struct tcp_connection *c;

	c = is_tcp(sk, option(typed_sockets)) ? connection_begin(slot, sk, role) : NULL;
	if (!c)
		return;
	own(c, current_tgid(), member->group, member->comm);
	c->state = state;
	name_ends(c, sk, option(typed_sockets));
	connection_show(c, number_of(c, sk, option(typed_sockets)));
	send_event(ctx, slot, c, WHAT_STATE, old, 0);
}

/* The socket of a connection that was dissolved, or of a listener that was shut down, may be used
 * again, by another process too. */
static __always_inline void begin_again(void *ctx, __u32 slot, struct sock *sk, __u8 role, int old,
					int state)
{
	struct member *member = watched_process(slot);
	struct tcp_connection *c = connection_of(slot, sk);

	if (c) {
		send_end(ctx, slot, c);
		connection_drop(slot, sk);
	}
	if (member)
		begin_by_process(ctx, slot, sk, member, role, old, state);
}

/* A listener's child, cloned from it. It has no addresses of its own yet, so that this event is
 * sent together with the next one. */
SUBPROGRAM int on_child(__u32 slot, __u64 child)
{
	struct sock *sk = socket_at(child);
	struct found_owner owner = {};
	struct tcp_connection *c;

	if (!owner_by_listener(slot, listener_of_child(sk), &owner))
		return 0;
	c = connection_begin(slot, sk, ROLE_SERVER);
	if (!c)
		return 0;
	own(c, owner.pid, owner.group, owner.comm);
	c->presumed = true;
	c->state = TCP_SYN_RECV;
	c->local_port = local_port_of(sk);
	connection_show(c, our_number(c)); /* the socket's may still be the listener's */
	return 0;
}

static __always_inline bool refreshes_at_segments(__u32 slot)
{
	return option(refresh_at_segments) && !sends_events(slot);
}

static __always_inline void on_established(__u32 slot, struct tcp_connection *c, struct sock *sk)
{
	struct tcp_sock *tp = tcp_of(sk, option(typed_sockets));
	__u32 srtt_us;

	c->established_ns = bpf_ktime_get_ns();
	name_ends(c, sk, option(typed_sockets));
	if (!tp)
		return;
	if (c->role == ROLE_SERVER)
		c->cookie = number_of(c, sk, option(typed_sockets));
	c->delivered = socket_read(tp, delivered);
	srtt_us = socket_read(tp, srtt_us);
	if (srtt_us)
		count_rtt(c, srtt_us >> 3);
	if (refreshes_at_segments(slot))
		refresh(c, sk, TCP_ESTABLISHED, false);
	if (c->role == ROLE_SERVER) { /* SYN-ACKs, sent before there was a socket */
		c->retransmits = socket_read(tp, total_retrans);
		c->retransmits_of[HANDSHAKE] = c->retransmits;
	}
}

/* Ends. */

static __always_inline __u8 end_by(const struct tcp_connection *c, int old)
{
	if (c->error == ECONNABORTED)
		return END_ABORTED;
	/* The program that counts those received may have been skipped. */
	if (c->resets_received ||
	    (c->error == ECONNRESET && !c->resets_sent && old != TCP_SYN_SENT))
		return old == TCP_SYN_SENT ? END_REFUSED : END_RESET_REMOTE;
	if (c->error == ETIMEDOUT)
		return END_TIMEOUT;
	if (c->resets_sent && (c->error || !c->end)) /* and not long ago, for a stray segment */
		return END_RESET_LOCAL;
	if (c->error)
		return END_ERROR;
	if (c->end)
		return c->end;
	/* A close without a FIN is a reset, which is sent next. */
	return old == TCP_SYN_SENT || old == TCP_SYN_RECV ? END_ABORTED : END_RESET_LOCAL;
}

/* Whoever reads a time here reads final figures afterwards. */
static __always_inline void set_ended(struct tcp_connection *c)
{
	barrier();
	c->ended_ns = c->read_ns;
}

static __always_inline void on_end(struct tcp_connection *c, struct sock *sk, int old)
{
	c->error = socket_read(sk, sk_err);
	sample_rtt(c, sk);
	refresh(c, sk, old, option(typed_sockets));
	c->end = end_by(c, old);
	set_ended(c);
}

static __always_inline void note_fin(struct tcp_connection *c, int old, int state)
{
	if (state == TCP_CLOSING)
		c->end = END_FIN_BOTH;
	else if (!c->end && state == TCP_FIN_WAIT1)
		c->end = END_FIN_LOCAL;
	else if (!c->end && (state == TCP_CLOSE_WAIT || state == TCP_LAST_ACK))
		c->end = END_FIN_REMOTE;
}

/*
 * Whether SK, a listener's child, is closed because the kernel has another one for its connection:
 * of two segments that complete one handshake on two CPUs at once, each makes a child, and the
 * first in the table of connections stays (inet_ehash_nolisten). Whatever else closes a child gives
 * the listener's port back first (tcp_set_state).
 */
static __always_inline bool is_spare_child(const struct tcp_connection *c, struct sock *sk, int old)
{
	return c->role == ROLE_SERVER && old == TCP_SYN_RECV &&
	       kernel_read((struct inet_connection_sock *)sk, icsk_bind_hash);
}

static __always_inline bool changed_by_process(struct sock *sk, int old)
{
	return held_by_process(sk) && old != TCP_LISTEN && !is_destroyed_by_other(sk);
}

static __always_inline int on_change(void *ctx, __u32 slot, struct sock *sk, int old, int state)
{
	struct tcp_connection *c =
	    connection_met(slot, sk, changed_by_process(sk, old) ? USER_HOLDS : USER_NONE);

	if (!c || c->ended_ns)
		return 0;
	if (state == TCP_CLOSE && is_spare_child(c, sk, old)) {
		connection_drop(slot, sk);
		return 0;
	}
	c->state = state;
	if (c->role == ROLE_LISTENER) {
		if (state != TCP_CLOSE)
			return 0;
		refresh(c, sk, old, false);
		set_ended(c);
	} else if (state == TCP_ESTABLISHED && !c->established_ns) {
		on_established(slot, c, sk);
		if (c->role == ROLE_SERVER && c->start_ns)
			send_event_of(ctx, slot, c, c->start_ns, WHAT_STATE, TCP_LISTEN, old, 0);
	} else if (state == TCP_CLOSE) {
		name_ends_late(c, sk, option(typed_sockets));
		on_end(c, sk, old);
	} else {
		note_fin(c, old, state);
	}
	send_event(ctx, slot, c, WHAT_STATE, old, 0);
	return 0;
}

static __always_inline int on_state(void *ctx, __u32 slot, struct sock *sk, int old, int state)
{
	if (state != TCP_SYN_SENT && state != TCP_LISTEN)
		return on_change(ctx, slot, sk, old, state);
	begin_again(ctx, slot, sk, state == TCP_LISTEN ? ROLE_LISTENER : ROLE_CLIENT, old, state);
	return 0;
}

static __always_inline int on_destroy(void *ctx, __u32 slot, struct sock *sk)
{
	struct tcp_connection *c = connection_of(slot, sk);

	/* A process that nobody watches only matters where the owner is presumed. */
	if ((c && c->presumed) || !surely_nobodys(current_tgid())) {
		if (held_by_process(sk) && !(c && is_destroyed_by_other(sk)))
			c = connection_met(slot, sk, USER_HOLDS);
	}
	if (!c)
		return 0;
	if (!c->ended_ns)
		on_end(c, sk, c->state);
	send_end(ctx, slot, c);
	connection_drop(slot, sk);
	return 0;
}

/* While a connection is open. */

SUBPROGRAM int on_segment(__u32 slot, __u64 socket)
{
	struct sock *sk = socket_at(socket);
	struct tcp_connection *c = connection_met(slot, sk, USER_NONE);

	if (!c || c->ended_ns)
		return 0;
	sample_rtt(c, sk);
	if (refreshes_at_segments(slot) && bpf_ktime_get_ns() - c->read_ns > REFRESH_NS)
		refresh(c, sk, c->state, false);
	return 0;
}

/* An application has received data: it owns the connection, unless that is known already. */
SUBPROGRAM int on_received(__u32 slot, __u64 socket)
{
	struct sock *sk = socket_at(socket);
	struct tcp_session *session = session_at(slot);
	struct tcp_connection *c;

	if (!session || !session->wants_use)
		return 0;
	c = connection_met(slot, sk, USER_RECEIVES);
	if (c && !c->ended_ns && refreshes_at_segments(slot))
		refresh(c, sk, c->state, false);
	return 0;
}

static __always_inline __u32 kind_of_retransmit(struct sock *sk)
{
	__u8 state = state_of(sk), congestion;

	if (state == TCP_SYN_SENT || state == TCP_SYN_RECV)
		return HANDSHAKE;
	congestion = congestion_state(sk);
	if (congestion == TCP_CA_LOSS)
		return TIMEOUT;
	return congestion == TCP_CA_RECOVERY ? FAST : TAIL_PROBE;
}

/* The kernel has already counted it; several segments may have been sent at once. */
static __always_inline int on_retransmit(void *ctx, __u32 slot, struct sock *sk)
{
	struct tcp_connection *c = connection_met(slot, sk, USER_NONE);
	__u32 kind, total, count;

	if (!c)
		return 0;
	name_ends_late(c, sk, option(typed_sockets));
	kind = kind_of_retransmit(sk);
	total = kernel_read((struct tcp_sock *)sk, total_retrans);
	count = total - c->retransmits;
	c->retransmits = total;
	c->retransmits_of[kind % KINDS] += count;
	send_event(ctx, slot, c, WHAT_RETRANSMIT_FAST + kind, c->state, count);
	return 0;
}

static __always_inline int on_synack_retransmit(void *ctx, __u32 slot, struct sock *listener,
						struct request_sock *request)
{
	struct tcp_connection *c = connection_met(slot, listener, USER_NONE);

	if (!c)
		return 0;
	__sync_fetch_and_add(&c->syn_ack_retransmits, 1);
	if (!sends_events(slot))
		return 0;
	{
		struct tcp_event event = {
		    .head.kind = RECORD_TCP_EVENT,
		    .time_ns = bpf_ktime_get_ns(),
		    .connection_id = kernel_read(request, __req_common.skc_cookie.counter),
		    .pid = c->pid,
		    .network = c->network,
		    .local_port = c->local_port,
		    .remote_port = bpf_ntohs(kernel_read(request, __req_common.skc_dport)),
		    .role = ROLE_SERVER,
		    .what = WHAT_RETRANSMIT_HANDSHAKE,
		    .old_state = TCP_SYN_RECV,
		    .new_state = TCP_SYN_RECV,
		    .count = 1,
		    .group = c->group,
		};

		addresses_of(&request->__req_common, event.local, event.remote, false);
		__builtin_memcpy(event.name, c->comm, COMM_BYTES);
		record_send(ctx, slot, &event, sizeof(event));
	}
	return 0;
}

/* A reset on the way to CLOSE is the cause of the end. */
static __always_inline int on_reset_sent(void *ctx, __u32 slot, struct sock *sk, __u32 reason)
{
	struct tcp_connection *c = connection_met(slot, sk, USER_NONE);

	if (!c)
		return 0;
	c->resets_sent++;
	c->reset_reason = reason;
	if (c->ended_ns && c->role != ROLE_LISTENER && c->end != END_ABORTED) {
		c->end = END_RESET_LOCAL;
		c->segments_sent = kernel_read((struct tcp_sock *)sk, segs_out);
	}
	send_event(ctx, slot, c, WHAT_RESET_SENT, c->state, 1);
	return 0;
}

static __always_inline int on_reset_received(void *ctx, __u32 slot, struct sock *sk)
{
	struct tcp_connection *c = connection_met(slot, sk, USER_NONE);

	if (!c)
		return 0;
	name_ends_late(c, sk, option(typed_sockets));
	c->resets_received++;
	send_event(ctx, slot, c, WHAT_RESET_RECEIVED, c->state, 1);
	return 0;
}

/* The reason of a reset in our own numbering: the values of Linux 6.18, plus one. */
static __always_inline __u32 reset_reason_of(__u32 reason)
{
#ifdef CORAL_BCC
	return 0;
#else
#define REASON(name)                                                                               \
	if (bpf_core_enum_value_exists(enum sk_rst_reason, SK_RST_REASON_##name) &&                \
	    reason == bpf_core_enum_value(enum sk_rst_reason, SK_RST_REASON_##name))               \
	return SK_RST_REASON_##name + 1
	REASON(NOT_SPECIFIED);
	REASON(NO_SOCKET);
	REASON(TCP_INVALID_ACK_SEQUENCE);
	REASON(TCP_RFC7323_PAWS);
	REASON(TCP_TOO_OLD_ACK);
	REASON(TCP_ACK_UNSENT_DATA);
	REASON(TCP_FLAGS);
	REASON(TCP_OLD_ACK);
	REASON(TCP_ABORT_ON_DATA);
	REASON(TCP_TIMEWAIT_SOCKET);
	REASON(INVALID_SYN);
	REASON(TCP_ABORT_ON_CLOSE);
	REASON(TCP_ABORT_ON_LINGER);
	REASON(TCP_ABORT_ON_MEMORY);
	REASON(TCP_STATE);
	REASON(TCP_KEEPALIVE_TIMEOUT);
	REASON(TCP_DISCONNECT_WITH_DATA);
	return 0;
#endif
}

/*
 * The kernel skips a program that is running on the CPU already: packets that interrupt it while it
 * works for a process are not seen. Where nothing should be missed, two programs are attached. The
 * first that runs handles an event and leaves a mark for its twin. Packets and timers do not
 * interrupt each other, so that one of the two is free; they have a mark of their own, as they may
 * come between the two runs for a process.
 */
struct done {
	__u64 by_packets;
	__u64 by_process;
};

MAP(PERCPU_ARRAY, done, __u32, struct done, 1, 0);

/* Whether a program's twin has handled this EVENT of SK; if not, the twin will find it done. */
static __always_inline bool done_by_twin(struct sock *sk, __u64 event)
{
	__u32 zero = 0;
	struct done *marks = bpf_map_lookup_elem(map_of(done), &zero);
	__u64 *mark;

	if (!marks)
		return false;
	mark = held_by_process(sk) ? &marks->by_process : &marks->by_packets;
	if (*mark == event) {
		*mark = 0;
		return true;
	}
	*mark = event;
	return false;
}

#ifdef CORAL_BCC
#define KERNEL_TELLS_REASON 0
#else
#define KERNEL_TELLS_REASON bpf_core_type_exists(enum sk_rst_reason)
#endif

#ifdef CORAL_BCC
#define make_cookie(sk) ((void)0)
#else
/* Only allowed for an argument that the verifier knows to be a socket. */
#define make_cookie(sk)                                                                            \
	do {                                                                                       \
		if (option(make_cookies))                                                          \
			bpf_get_socket_cookie(sk);                                                 \
	} while (0)
#endif

/*
 * What a hook does for each session is a function that the verifier goes through once, which takes
 * numbers only. A record for a perf buffer needs the program's context: there it goes through the
 * function for each session. Kernels before 6.8 go through all of the first kind, called or not.
 */
#ifdef CORAL_BCC
#define WITH_CONTEXT static __always_inline
#define BY_RING	     false
#else
#define WITH_CONTEXT static __noinline
#define BY_RING	     option(records_in_ring)
#endif

/* Has HOOK done what it does for one session. */
#define HAVE_DONE(hook, args...) (BY_RING ? hook##_by_ring(args) : hook##_by_perf(ctx, args))

SUBPROGRAM int state_by_ring(__u32 slot, __u64 sk, int old, int state)
{
	return BY_RING ? on_state(NULL, slot, socket_at(sk), old, state) : 0;
}

WITH_CONTEXT int state_by_perf(void *ctx, __u32 slot, __u64 sk, int old, int state)
{
	return on_state(ctx, slot, socket_at(sk), old, state);
}

SUBPROGRAM int destroy_by_ring(__u32 slot, __u64 sk)
{
	return BY_RING ? on_destroy(NULL, slot, socket_at(sk)) : 0;
}

WITH_CONTEXT int destroy_by_perf(void *ctx, __u32 slot, __u64 sk)
{
	return on_destroy(ctx, slot, socket_at(sk));
}

SUBPROGRAM int retransmit_by_ring(__u32 slot, __u64 sk)
{
	return BY_RING ? on_retransmit(NULL, slot, socket_at(sk)) : 0;
}

WITH_CONTEXT int retransmit_by_perf(void *ctx, __u32 slot, __u64 sk)
{
	return on_retransmit(ctx, slot, socket_at(sk));
}

SUBPROGRAM int synack_by_ring(__u32 slot, __u64 sk, __u64 request)
{
	return BY_RING
		   ? on_synack_retransmit(NULL, slot, socket_at(sk), (struct request_sock *)request)
		   : 0;
}

WITH_CONTEXT int synack_by_perf(void *ctx, __u32 slot, __u64 sk, __u64 request)
{
	return on_synack_retransmit(ctx, slot, socket_at(sk), (struct request_sock *)request);
}

SUBPROGRAM int reset_sent_by_ring(__u32 slot, __u64 sk, __u32 reason)
{
	return BY_RING ? on_reset_sent(NULL, slot, socket_at(sk), reason) : 0;
}

WITH_CONTEXT int reset_sent_by_perf(void *ctx, __u32 slot, __u64 sk, __u32 reason)
{
	return on_reset_sent(ctx, slot, socket_at(sk), reason);
}

SUBPROGRAM int reset_received_by_ring(__u32 slot, __u64 sk)
{
	return BY_RING ? on_reset_received(NULL, slot, socket_at(sk)) : 0;
}

WITH_CONTEXT int reset_received_by_perf(void *ctx, __u32 slot, __u64 sk)
{
	return on_reset_received(ctx, slot, socket_at(sk));
}

static __always_inline __u64 sessions_of_state(struct sock *sk, int old, int state)
{
	if (state == TCP_SYN_RECV && old == TCP_LISTEN)
		return sessions_met(listener_of_child(sk), false);
	return sessions_met(sk, state == TCP_SYN_SENT || state == TCP_LISTEN ||
				    changed_by_process(sk, old));
}

static __always_inline int on_any_state(void *ctx, struct sock *sk, int old, int state)
{
	__u64 mask, address;

	if (done_by_twin(sk, (__u64)half_of(sk) << 32 | old << 8 | state))
		return 0;
	if (state == TCP_SYN_SENT || state == TCP_LISTEN || state == TCP_ESTABLISHED)
		make_cookie(sk);
	mask = sessions_of_state(sk, old, state);
	address = address_of(sk);
	if (state == TCP_SYN_RECV && old == TCP_LISTEN) {
		for_each_session (slot, mask) {
			on_child(slot, address);
		}
		return 0;
	}
	for_each_session (slot, mask) {
		HAVE_DONE(state, slot, address, old, state);
	}
	return 0;
}

SEC("raw_tp/inet_sock_set_state")
int RAW_PROGRAM(coral_state, struct sock *sk, int old, int state)
{
	return on_any_state(ctx, sk, old, state);
}

#ifndef CORAL_BCC /* which takes its code from the other one */
SEC("raw_tp/inet_sock_set_state")
int RAW_PROGRAM(coral_state_twin, struct sock *sk, int old, int state)
{
	return on_any_state(ctx, sk, old, state);
}
#endif

SEC("raw_tp/tcp_destroy_sock")
int RAW_PROGRAM(coral_destroy, struct sock *sk)
{
	__u64 mask = sessions_met(sk, held_by_process(sk)), address = address_of(sk);

	forget_in_walk(sk);
	for_each_session (slot, mask) {
		HAVE_DONE(destroy, slot, address);
	}
	return 0;
}

SEC("raw_tp/tcp_probe")
int RAW_PROGRAM(coral_segment, struct sock *sk)
{
	__u64 mask = sessions_met(sk, false), address = address_of(sk);

	for_each_session (slot, mask) {
		on_segment(slot, address);
	}
	return 0;
}

SEC("raw_tp/tcp_rcv_space_adjust")
int RAW_PROGRAM(coral_received, struct sock *sk)
{
	__u64 mask = sessions_met(sk, true), address;

	/* Some layers above (kTLS) receive outside of any process. */
	if (!mask || !held_by_process(sk))
		return 0;
	address = address_of(sk);
	for_each_session (slot, mask) {
		on_received(slot, address);
	}
	return 0;
}

SEC("raw_tp/tcp_retransmit_skb")
int RAW_PROGRAM(coral_retransmit, struct sock *sk)
{
	__u64 mask = sessions_met(sk, false), address = address_of(sk);

	for_each_session (slot, mask) {
		HAVE_DONE(retransmit, slot, address);
	}
	return 0;
}

SEC("raw_tp/tcp_retransmit_synack")
int RAW_PROGRAM(coral_synack, struct sock *sk, struct request_sock *request)
{
	__u64 mask = sessions_met(sk, false);
	__u64 address = address_of(sk), of_request = address_of(request);

	for_each_session (slot, mask) {
		HAVE_DONE(synack, slot, address, of_request);
	}
	return 0;
}

SEC("raw_tp/tcp_send_reset")
int RAW_PROGRAM(coral_reset_out, struct sock *sk, void *skb)
{
	/* Only kernels that tell the reason have a third argument. */
	__u32 reason = KERNEL_TELLS_REASON ? reset_reason_of(ctx[2]) : 0;
	__u64 mask, address;

	if (!sk) /* nothing listens there */
		return 0;
	mask = sessions_met(sk, false);
	address = address_of(sk);
	for_each_session (slot, mask) {
		HAVE_DONE(reset_sent, slot, address, reason);
	}
	return 0;
}

SEC("raw_tp/tcp_receive_reset")
int RAW_PROGRAM(coral_reset_in, struct sock *sk)
{
	__u64 mask = sessions_met(sk, false), address = address_of(sk);

	for_each_session (slot, mask) {
		HAVE_DONE(reset_received, slot, address);
	}
	return 0;
}

#ifndef CORAL_BCC /* iterators need BTF */

/*
 * Whether the kernel is about to number a FIN, or has just seen it acknowledged: for a moment
 * nothing tells whether it is among the bytes.
 */
static __always_inline bool fin_is_unsettled(struct sock *sk, __u8 state)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;

	return (state == TCP_FIN_WAIT1 || state == TCP_CLOSING || state == TCP_LAST_ACK) &&
	       kernel_read(tp, snd_una) == kernel_read(tp, write_seq);
}

static __always_inline bool fin_received(struct sock *sk)
{
	return kernel_read(sk, __sk_common.skc_flags) & (1UL << SOCK_DONE);
}

/* Whether the kernel is at work on SK: for a process, or in a softirq, which has its spinlock. */
static __always_inline bool is_locked(struct sock *sk)
{
	__u32 spinlock = 0;

	bpf_probe_read_kernel(&spinlock, sizeof(spinlock),
			      __builtin_preserve_access_index(&sk->sk_lock));
	return spinlock || kernel_read(sk, sk_lock.owned);
}

/*
 * Copies the element VALUE of `connections` to C, and brings the copy up to date from the socket.
 * The element is not written to: hooks may be at work on it, and its memory may belong to another
 * connection by then. For the same reason the socket is read as plain memory, and the copy is only
 * good if nothing has changed meanwhile. Where this is false, the next reading has the connection,
 * or the record of its end.
 *
 * The compiler copies an element from its last member to its first. Figures copied before the hook
 * completed them must not pass for those of the end, so the time of the end is read before the
 * copy.
 *
 * The kernel counts the peer's FIN as a byte before it notes that it has come. While it is at work
 * on the socket, the last byte may be one, and is left to the next reading.
 */
static __always_inline bool copy_live(struct tcp_connection *c, const struct tcp_connection *value)
{
	const volatile __u64 *ended_ns = &value->ended_ns;
	__u64 ended_before = *ended_ns;
	struct sock *sk;
	bool fin, locked;
	__u8 state;

	barrier();
	*c = *value;
	if (c->ended_ns != ended_before)
		return false;
	sk = (struct sock *)c->sk;
	state = c->state;
	if (!c->ended_ns) {
		state = state_of(sk);
		fin = fin_received(sk);
		refresh(c, sk, state, false);
		name_ends_late(c, sk, false);
		locked = is_locked(sk);
		if (fin_is_unsettled(sk, state) || state_of(sk) != state || fin_received(sk) != fin)
			return false;
		if (locked && !fin && c->bytes_received)
			c->bytes_received--;
	}
	barrier();
	return c->cookie && c->state == state && value->sk == c->sk &&
	       value->found_ns == c->found_ns && *ended_ns == ended_before;
}

/* The connections as they are now, for user space to read: by an iterator over the map ... */
SEC("iter/bpf_map_elem")
int coral_live_iter(struct bpf_iter__bpf_map_elem *ctx)
{
	/* Loaded once: kernels check each load of it by itself. */
	const struct tcp_connection *value = ctx->value;
	struct tcp_connection c;

	if (value && copy_live(&c, value))
		bpf_seq_write(ctx->meta->seq, &c, sizeof(c));
	return 0;
}

/*
 * ... or by a program that user space runs itself, where the kernel refuses that type of iterator.
 * User space writes the keys to the first elements of `live`, and a 0 behind them; a key that it
 * finds to be 0 afterwards has no good copy. Sessions take turns.
 */
#define LIVE_ELEMENTS 1024

MAP(ARRAY, live, __u32, struct tcp_connection, LIVE_ELEMENTS, BPF_F_MMAPABLE);
GLOBAL(__u32, live_slot); /* the session whose connections they are */

static long copy_live_of_key(struct bpf_map *map, __u32 *index, struct tcp_connection *c, void *ctx)
{
	__u64 key = c->sk;
	struct tcp_connection *value;
	void *of_session;

	if (!key)
		return 1; /* no further one */
	of_session = map_of_session(connections, *global(live_slot));
	value = of_session ? bpf_map_lookup_elem(of_session, &key) : NULL;
	if (!value || !copy_live(c, value))
		c->sk = 0;
	return 0;
}

SEC("syscall")
int coral_live_run(void *ctx)
{
	bpf_for_each_map_elem(map_of(live), copy_live_of_key, NULL, 0);
	return 0;
}

/* A process has it open. It becomes the owner if the present owner did not have it open in the
 * previous walk; in the current one, the owner may still follow. */
static __always_inline void had_by(struct tcp_connection *c, __u32 tgid, __u32 group,
				   const char *comm, __u32 now)
{
	if (c->presumed || (c->pid != tgid && now - c->walk > 1))
		own(c, tgid, group, comm);
	if (c->pid == tgid)
		c->walk = now;
}

/* A process that is not watched has it open: drop it if it was only presumed to be ours. */
static __always_inline void had_by_other(__u32 slot, struct sock *sk, __u32 now)
{
	struct tcp_connection *c = connection_of(slot, sk);

	if (c && c->presumed)
		connection_drop(slot, sk);
	else if (c && c->role == ROLE_LISTENER)
		c->shared = now;
}

/* A watched process has it open, which is found now if it was not known. NOW is the number of the
 * walk, from the session's first. */
static __always_inline void had_by_target(__u32 slot, struct sock *sk, __u32 tgid, __u32 group,
					  const char *comm, __u32 now)
{
	struct tcp_connection *c = connection_of(slot, sk);

	if (!c && is_tcp(sk, false)) {
		c = connection_find(slot, sk, tgid, group, comm, true, false);
		if (!c && now == 1 && state_of(sk) != TCP_CLOSE && !connection_of(slot, sk))
			account_loss(slot, LOSS_MAP_FULL);
	}
	if (c)
		had_by(c, tgid, group, comm, now);
}

static __always_inline bool is_watched_in_walk(__u32 slot, __u32 tgid)
{
	struct member *member = member_of(slot, tgid);
	struct sessions *all = all_sessions();

	if (member)
		return member->state == MEMBER_ACTIVE;
	return all && all->host & session_bit(slot);
}

/* Those of SESSIONS that watch the process TGID. */
SUBPROGRAM __u64 watching_in_walk(__u64 sessions, __u32 tgid)
{
	__u64 found = 0;

	for_each_session (slot, sessions) {
		if (is_watched_in_walk(slot, tgid))
			found |= session_bit(slot);
	}
	return found;
}

/* The process of this leader, which session SLOT watches if WATCHED, has the socket open. */
SUBPROGRAM int had_in_session(__u32 slot, __u64 socket, __u64 leader, __u32 now, bool watched)
{
	struct task_struct *task = (struct task_struct *)leader;
	struct tcp_session *session = session_at(slot);
	struct sock *sk = (struct sock *)socket;
	char comm[COMM_BYTES] = {};
	struct member *member;
	__u32 tgid;

	if (!session || !session->first_walk)
		return 0;
	if (!watched) {
		had_by_other(slot, sk, now);
		return 0;
	}
	kernel_read_string(&comm, task, comm);
	tgid = kernel_read(task, tgid);
	member = member_of(slot, tgid);
	had_by_target(slot, sk, tgid, member ? member->group : 0, comm,
		      now - session->first_walk + 1);
	return 0;
}

static __always_inline struct sock *socket_in(struct file *file)
{
	struct socket *socket;

	if (!option(make_cookies)) /* which is later than the helper (5.11) */
		return socket_of(file);
	socket = bpf_sock_from_file(file);
	return socket ? socket->sk : NULL;
}

#define MOST_SUBFLOWS 8 /* as in the kernel (MPTCP_SUBFLOWS_MAX) */

/* The connection behind NODE in the list of an MPTCP socket that begins and ends at LIST, or NULL;
 * sets NODE to its place in the list. */
static __always_inline struct sock *next_subflow(__u64 *node, __u64 list)
{
	*node = (__u64)kernel_read((struct list_head *)*node, next);
	if (!*node || *node == list)
		return NULL;
	return kernel_read(
	    (struct mptcp_subflow_context *)(*node -
					     member_offset(struct mptcp_subflow_context, node)),
	    tcp_sock);
}

/* The process of this leader, which the sessions WATCHING watch, has the socket open. */
SUBPROGRAM int had_open(__u64 socket, __u64 sessions, __u64 watching, __u64 leader, __u32 now)
{
	struct sock *sk = (struct sock *)socket;

	meet_in_walk(sk, now);
	if (surely_unfollowed(sk))
		sessions = watching;
	for_each_session (slot, sessions) {
		had_in_session(slot, socket, leader, now, watching & session_bit(slot));
	}
	return 0;
}

/* Walks the open files of all processes, for sockets that existed before or were passed on from
 * another process, and for the present owners of known ones; for all sessions at once. */
SEC("iter/task_file")
int coral_find_iter(struct bpf_iter__task_file *ctx)
{
	volatile __u32 *number = global(walk);
	struct sessions *all = all_sessions();
	struct task_struct *task = ctx->task;
	__u64 list, node, sessions, watching = 0, leader;
	struct file *file = ctx->file;
	struct sock *sk;

	if (!task || !file || !number || !all || task_is_new(task) || task_is_ending(task))
		return 0;
	sk = socket_in(file);
	if (!sk)
		return 0;
	sessions = sessions_of_hub(all);
	if (!surely_unwatched_here(all, task->tgid))
		watching = watching_in_walk(sessions, task->tgid);
	leader = (__u64)kernel_read(task, group_leader);
	if (!kernel_has_mptcp() || !is_of_protocol(sk, IPPROTO_MPTCP, false)) {
		if (watching && is_tcp(sk, false))
			make_cookie(sk);
		had_open(address_of(sk), sessions, watching, leader, *number);
		return 0;
	}
	list = node = (__u64)sk + member_offset(struct mptcp_sock, conn_list);
	for (int i = 0; i < MOST_SUBFLOWS && (sk = next_subflow(&node, list)); i++)
		had_open((__u64)sk, sessions, watching, leader, *number);
	return 0;
}

#endif

LICENSED_AS("GPL");
