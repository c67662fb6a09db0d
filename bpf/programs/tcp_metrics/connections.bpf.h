/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: the TCP connections of watched processes, their owners, and the kernel's figures of
 * them.
 *
 * The key of a connection is the address of its socket, not its cookie. A socket may have no cookie
 * yet, and keeps it when it connects a second time; the address exists on every kernel, and is
 * unique until tcp_destroy_sock, which removes the element.
 *
 * The owner is the process that holds its own socket at connect, listen or close. A server's
 * connection belongs to the listener's process until another process is seen to have it: by an
 * iterator over open files, or, where there is none, when that process receives.
 */
#pragma once

#include "include/kernel.bpf.h"
#include "include/account.bpf.h"
#include "include/net.bpf.h"
#include "include/targets.bpf.h"

enum role { ROLE_NONE, ROLE_CLIENT, ROLE_SERVER, ROLE_LISTENER };

/* As enum End of the contract. */
enum end {
	END_OPEN,
	END_FIN_LOCAL,
	END_FIN_REMOTE,
	END_FIN_BOTH,
	END_RESET_LOCAL,
	END_RESET_REMOTE,
	END_TIMEOUT,
	END_REFUSED,
	END_ERROR,
	END_ABORTED,
};

#define FAST	   0 /* in fast recovery */
#define TIMEOUT	   1 /* after the retransmission timer */
#define TAIL_PROBE 2 /* a probe for the loss of the last segments (TLP) */
#define HANDSHAKE  3 /* of a SYN or a SYN-ACK */
#define KINDS	   4

#define RTT_SLOTS 16

/* Everything known about one connection. The kernel's counters are as of `read_ns`. */
struct tcp_connection {
	__u64 sk;	/* the socket's address */
	__u64 cookie;	/* the kernel's number of the socket, or one of ours */
	__u64 found_ns; /* CLOCK_MONOTONIC, as all times; unique together with `sk` */
	__u64 start_ns; /* 0: it existed before it was found */
	__u64 established_ns;
	__u64 ended_ns;
	__u64 read_ns;
	__u64 bytes_sent; /* payload, each byte once */
	__u64 bytes_acked;
	__u64 bytes_received;
	__u64 bytes_retransmitted; /* not among those sent */
	__u8 local[ADDRESS_BYTES];
	__u8 remote[ADDRESS_BYTES];
	char comm[COMM_BYTES];
	__u32 pid; /* tgid of the owner; 0: unknown */
	__u32 network;
	__u16 local_port;
	__u16 remote_port;
	__u8 role;
	__u8 state;
	__u8 end;
	__u8 presumed; /* the owner is the listener's: no process was seen to have it yet */
	__u32 segments_sent;
	__u32 segments_received;
	__u32 retransmits;
	__u32 retransmits_of[KINDS];
	/* Of listeners: */
	__u32 syn_ack_retransmits;
	__u32 listen_drops; /* attempts to connect that it dropped */
	__u32 found_listen_drops;
	__u32 backlog; /* connections that wait to be accepted, and how many may */
	__u32 backlog_limit;
	__u32 srtt_us;		/* times eight, as in the kernel */
	__u32 rtt_deviation_us; /* times four */
	__u32 rtt_min_us;
	__u32 congestion_window;
	__u32 slow_start_threshold;
	__u32 segment_bytes;
	__u32 resets_sent;
	__u32 resets_received;
	__u32 reset_reason; /* of the last reset sent */
	__u32 error;
	__u32 delivered; /* as of the last sample of the RTT */
	__u32 rtt[RTT_SLOTS];
	/* Counters when it was found: zeros for a connection seen from its beginning. */
	__u32 found_segments_sent;
	__u32 found_segments_received;
	__u32 found_retransmits;
	__u32 walk;	/* the last walk in which the owner had it open */
	__u32 scope_id; /* the interface that link-local addresses belong to */
	__u32 shared;	/* the last walk in which a process that is not watched had it open */
	__u32 group;	/* of the owner, see struct member */
	__u64 found_bytes_sent;
	__u64 found_bytes_acked;
	__u64 found_bytes_received;
	__u64 found_bytes_retransmitted;
	__u64 rtt_sum_us; /* of the samples */
};

OPTIONS(struct tcp_connection, no_connection, 1); /* zeros, to create elements from */
SESSION_MAPS(HASH, connections, __u64, struct tcp_connection, 10240, BPF_F_NO_PREALLOC);

/* What user space says about one session. */
struct tcp_session {
	__u8 single_events;
	__u8 wants_use; /* programs find the owners of its connections when these receive */
	__u8 walked;	/* its first walk through the open files is over */
	__u8 reserved;
	__u32 first_walk; /* the number of that walk */
};

MAP(ARRAY, tcp_sessions, __u32, struct tcp_session, SESSIONS, 0);

static __always_inline struct tcp_session *session_at(__u32 slot)
{
	return bpf_map_lookup_elem(map_of(tcp_sessions), &slot);
}

static __always_inline bool sends_events(__u32 slot)
{
	struct tcp_session *session = session_at(slot);

	return session && session->single_events;
}

/*
 * Where there is no iterator over files, user space finds earlier connections by sock_diag, which
 * reports the cookie of a socket and not its address. A connection is taken over at the next hook
 * that sees it, whichever process runs; so are listeners.
 */
struct found_owner {
	__u32 pid;
	__u32 group;
	char comm[COMM_BYTES];
};

OPTION(bool, take_over_found, false);
SESSION_MAPS(HASH, found, __u64, struct found_owner, 10240, BPF_F_NO_PREALLOC); /* by cookie */

/*
 * As `hints` of targets.bpf.h: a byte that is clear belongs to no socket that any session follows.
 * There are two sets, too, which user space builds again in the same way.
 */
#define SOCKET_HINTS 65536
MAP(ARRAY, socket_hints, __u32, __u8, 2 * SOCKET_HINTS, 0);
GLOBAL(__u32, socket_hints_in_use); /* which of the two */

static __always_inline __u32 hash_of(struct sock *sk)
{
	return (half_of(sk) * 0x9E3779B1) >> 16;
}

static __always_inline bool surely_unfollowed(struct sock *sk)
{
	volatile __u32 *in_use = global(socket_hints_in_use);
	__u32 at = hash_of(sk) + (in_use && *in_use ? SOCKET_HINTS : 0);
	__u8 *hint = bpf_map_lookup_elem(map_of(socket_hints), &at);

	return hint && !*hint;
}

static __always_inline void hint_at_socket(struct sock *sk)
{
	__u32 first = hash_of(sk), second = SOCKET_HINTS + hash_of(sk);
	__u8 *hint = bpf_map_lookup_elem(map_of(socket_hints), &first);

	if (hint)
		*hint = 1;
	hint = bpf_map_lookup_elem(map_of(socket_hints), &second);
	if (hint)
		*hint = 1;
}

/*
 * The sessions that may have to do with an event of SK: those that may follow it, and those that
 * may watch the current process, if that uses the socket (BY_PROCESS).
 */
static __always_inline __u64 sessions_met(struct sock *sk, bool by_process)
{
	struct sessions *all = all_sessions();

	if (!all)
		return 0;
	if (!option(take_over_found) && surely_unfollowed(sk) &&
	    !(by_process && !surely_unwatched_here(all, current_tgid())))
		return 0;
	return sessions_of_hub(all);
}

static __always_inline struct tcp_connection *connection_of(__u32 slot, struct sock *sk)
{
	void *map = map_of_session(connections, slot);
	__u64 key = (__u64)sk;

	return map ? bpf_map_lookup_elem(map, &key) : NULL;
}

static __always_inline void connection_drop(__u32 slot, struct sock *sk)
{
	void *map = map_of_session(connections, slot);
	__u64 key = (__u64)sk;

	if (map)
		bpf_map_delete_elem(map, &key);
}

/* The process of the current task if session SLOT watches it, or NULL. */
static __always_inline struct member *watched_process(__u32 slot)
{
	struct sessions *all = all_sessions();
	__u32 tgid = current_tgid();
	struct member *member;

	if (!all || surely_unwatched_here(all, tgid))
		return NULL;
	if (all->host & session_bit(slot) && state_in_session(slot, tgid) != MEMBER_ACTIVE)
		return NULL;
	member = member_of(slot, tgid);
	return member && member->state == MEMBER_ACTIVE ? member : NULL;
}

/*
 * The process of the current task, which is ending, if session SLOT has watched it; or NULL. It is
 * no member any more when its files are closed. Its last name stays for a while.
 */
static __always_inline struct member *ended_process(__u32 slot)
{
	struct task_struct *leader = kernel_read(this_task(), group_leader);
	void *map = map_of_session(members, slot);
	__u64 process = process_of(current_tgid(), born_of(leader));

	return map ? bpf_map_lookup_elem(map, &process) : NULL;
}

static __always_inline bool surely_nobodys(__u32 tgid)
{
	struct sessions *all = all_sessions();

	return !all || surely_unwatched_here(all, tgid);
}

static __always_inline void name_ends(struct tcp_connection *c, struct sock *sk, bool typed)
{
	addresses_of(&sk->__sk_common, c->local, c->remote, typed);
	c->local_port = local_port_of(sk);
	c->remote_port = remote_port_of(sk, typed);
	c->scope_id = socket_read_if(typed, sk, __sk_common.skc_bound_dev_if);
}

/* A client gets its port after its first state change. */
static __always_inline void name_ends_late(struct tcp_connection *c, struct sock *sk, bool typed)
{
	if (!c->established_ns && c->start_ns)
		name_ends(c, sk, typed);
}

/* A unique number for a socket that has no cookie. Its highest bit distinguishes it from the
 * kernel's cookies, which count from 1. */
static __always_inline __u64 our_number(const struct tcp_connection *c)
{
	return 1ULL << 63 | (c->found_ns * 0x9E3779B97F4A7C15ULL + c->sk) >> 1;
}

static __always_inline __u64 number_of(const struct tcp_connection *c, struct sock *sk, bool typed)
{
	__u64 cookie = socket_read_if(typed, sk, __sk_common.skc_cookie.counter);

	return cookie ? cookie : our_number(c);
}

/*
 * Readers leave the connection out until `connection_show`. NULL if there is no room: that is a
 * loss where a connection begins; one that is only found is tried again when it is next used.
 */
static __always_inline struct tcp_connection *connection_make(__u32 slot, struct sock *sk,
							      __u8 role, __u64 flags, bool typed)
{
	void *zeros = (void *)element(no_connection, 0), *map = map_of_session(connections, slot);
	struct tcp_connection *c;
	__u64 key = (__u64)sk;

	if (!zeros || !map || bpf_map_update_elem(map, &key, zeros, flags))
		return NULL;
	hint_at_socket(sk);
	c = bpf_map_lookup_elem(map, &key);
	if (!c)
		return NULL;
	c->sk = key;
	c->role = role;
	c->network = network_of(sk, typed);
	c->state = state_of(sk);
	c->found_ns = bpf_ktime_get_ns();
	return c;
}

/* Lets readers have the connection, which is complete. */
static __always_inline void connection_show(struct tcp_connection *c, __u64 number)
{
	barrier();
	c->cookie = number;
}

static __always_inline struct tcp_connection *connection_begin(__u32 slot, struct sock *sk,
							       __u8 role)
{
	struct tcp_connection *c = connection_make(slot, sk, role, BPF_ANY, option(typed_sockets));

	if (c)
		c->start_ns = c->found_ns;
	else
		account_loss(slot, LOSS_MAP_FULL);
	return c;
}

static __always_inline void own(struct tcp_connection *c, __u32 pid, __u32 group, const char *comm)
{
	c->pid = pid;
	c->group = group;
	c->presumed = false;
	__builtin_memcpy(c->comm, comm, COMM_BYTES);
}

/* Copies what the kernel counts. */
static __always_inline void read_counters(struct tcp_connection *c, struct tcp_sock *tp, bool typed)
{
	c->bytes_retransmitted = socket_read_if(typed, tp, bytes_retrans);
	c->bytes_acked = socket_read_if(typed, tp, bytes_acked);
	c->bytes_received = socket_read_if(typed, tp, bytes_received);
	c->segments_sent = socket_read_if(typed, tp, segs_out);
	c->segments_received = socket_read_if(typed, tp, segs_in);
	c->retransmits = socket_read_if(typed, tp, total_retrans);
	c->srtt_us = socket_read_if(typed, tp, srtt_us);
	c->rtt_deviation_us = socket_read_if(typed, tp, mdev_us);
	c->rtt_min_us = socket_read_if(typed, tp, rtt_min.s[0].v);
	c->congestion_window = socket_read_if(typed, tp, snd_cwnd);
	c->slow_start_threshold = socket_read_if(typed, tp, snd_ssthresh);
	c->segment_bytes = socket_read_if(typed, tp, mss_cache);
}

/*
 * SYN and FIN occupy sequence numbers, and the kernel counts them as bytes. This subtracts them:
 * OLD is the state of the socket when it was read, or its last state before CLOSE. The bytes sent
 * are those acknowledged and those in flight: the kernel's own bytes_sent counts some twice, those
 * that the machine itself dropped on the way out.
 */
static __always_inline void take_flags_out(struct tcp_connection *c, struct sock *sk,
					   struct tcp_sock *tp, int old, bool typed)
{
	__u32 unacked = socket_read_if(typed, tp, snd_una);
	__u32 next = socket_read_if(typed, tp, snd_nxt), under_way = next - unacked;
	__u32 end = socket_read_if(typed, tp, write_seq);
	bool fin_acked = old == TCP_FIN_WAIT2;

	if (socket_read_if(typed, sk, __sk_common.skc_flags) & (1UL << SOCK_DONE) &&
	    c->bytes_received)
		c->bytes_received--;
	if (c->state == TCP_CLOSE && (old == TCP_LAST_ACK || old == TCP_CLOSING))
		fin_acked = unacked == end;
	if (c->role == ROLE_CLIENT && c->bytes_acked)
		c->bytes_acked--;
	if (fin_acked && c->bytes_acked)
		c->bytes_acked--;
	if (under_way && next == end &&
	    (old == TCP_FIN_WAIT1 || old == TCP_CLOSING || old == TCP_LAST_ACK))
		under_way--;
	if (old == TCP_SYN_SENT)
		under_way = 0;
	c->bytes_sent = c->bytes_acked + under_way;
}

/* Unless it is TYPED, SK is read as plain memory: it may be gone, which the caller checks. */
static __always_inline void refresh(struct tcp_connection *c, struct sock *sk, int old, bool typed)
{
	struct tcp_sock *tp = tcp_of(sk, typed);

	c->read_ns = bpf_ktime_get_ns();
	if (c->role == ROLE_LISTENER) {
		c->listen_drops = kernel_read(sk, sk_drops.counter);
		c->backlog = kernel_read(sk, sk_ack_backlog);
		c->backlog_limit = kernel_read(sk, sk_max_ack_backlog);
		return;
	}
	if (!tp)
		return;
	read_counters(c, tp, typed);
	take_flags_out(c, sk, tp, old, typed);
}

/* The bounds are those of the collector's BOUNDS_US. */
static __always_inline __u32 rtt_slot(__u32 us)
{
	__u32 half = us < 5000;

	if (half)
		return us < 200 ? (us < 50 ? us >= 20 : 2 + (us >= 100))
				: (us < 1000 ? 4 + (us >= 500) : 6 + (us >= 2000));
	return us < 100000 ? (us < 25000 ? 8 + (us >= 10000) : 10 + (us >= 50000))
			   : (us < 500000 ? 12 + (us >= 250000) : 14 + (us >= 1000000));
}

static __always_inline void count_rtt(struct tcp_connection *c, __u32 us)
{
	__u32 slot = rtt_slot(us);

	c->rtt_sum_us += us;
	if (slot < RTT_SLOTS)
		c->rtt[slot]++;
}

/* One sample each time the peer acknowledges new data: the round-trip time of the most recently
 * sent segment among those acknowledged (RACK, RFC 8985). */
static __always_inline void sample_rtt(struct tcp_connection *c, struct sock *sk)
{
	struct tcp_sock *tp = tcp_of(sk, option(typed_sockets));
	__u32 delivered;

	if (!tp)
		return;
	delivered = socket_read(tp, delivered);
	if (delivered == c->delivered)
		return;
	c->delivered = delivered;
	count_rtt(c, socket_read(tp, rack.rtt_us));
}

/* Connections that existed before they were found. */

/*
 * bytes_acked includes a client's SYN, but not a server's SYN-ACK: for a client, the bytes
 * acknowledged and in flight exceed the payload sent by one. A segment that was dropped before it
 * left the machine counts twice in bytes_sent, and hides that.
 */
static __always_inline __u8 role_by_numbering(struct sock *sk)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;
	__u64 payload = kernel_read(tp, bytes_sent) - kernel_read(tp, bytes_retrans);
	__u64 acked = kernel_read(tp, bytes_acked);
	__u32 under_way = kernel_read(tp, snd_nxt) - kernel_read(tp, snd_una);
	__u8 state = state_of(sk);
	bool fin_sent = state != TCP_ESTABLISHED && state != TCP_CLOSE_WAIT &&
			kernel_read(tp, snd_nxt) == kernel_read(tp, write_seq);

	if (state == TCP_SYN_SENT) /* a SYN in flight looks like a FIN */
		return ROLE_CLIENT;
	return acked + under_way > payload + fin_sent ? ROLE_CLIENT : ROLE_SERVER;
}

/* Where `connect` chose the local port, the kernel marks the port as not bound by anybody. */
static __always_inline __u8 role_of(struct sock *sk)
{
	struct inet_bind_bucket *bound;

	bound = kernel_read((struct inet_connection_sock *)sk, icsk_bind_hash);
	if (bound && kernel_read(bound, fastreuse) < 0)
		return ROLE_CLIENT;
	return role_by_numbering(sk);
}

/* What a connection carried earlier does not count in the interval in which it is found. */
static __always_inline void keep_as_found(struct tcp_connection *c)
{
	c->found_bytes_sent = c->bytes_sent;
	c->found_bytes_acked = c->bytes_acked;
	c->found_bytes_received = c->bytes_received;
	c->found_bytes_retransmitted = c->bytes_retransmitted;
	c->found_segments_sent = c->segments_sent;
	c->found_segments_received = c->segments_received;
	c->found_retransmits = c->retransmits;
	c->found_listen_drops = c->listen_drops;
}

/* User space increments it before each walk through the open files. */
GLOBAL(__u32, walk);

/*
 * Sockets that walks met, by a hash of their addresses: the number of the last walk that did, times
 * two, and one if the walk before had met it, too; 0 if none did. Like a hint, a byte may be of
 * another socket: then a new connection is taken for one that was there before.
 */
GLOBALS(__u8, met_in_walk, SOCKET_HINTS);

static __always_inline volatile __u8 *walk_mark_of(struct sock *sk)
{
	return element(met_in_walk, hash_of(sk));
}

/* The number of a walk in marks: in turn, from 1. */
static __always_inline __u8 mark_of_walk(__u32 walk)
{
	return walk % 127 + 1;
}

static __always_inline void meet_in_walk(struct sock *sk, __u32 now)
{
	volatile __u8 *mark = walk_mark_of(sk);
	bool before;

	if (!mark || *mark >> 1 == mark_of_walk(now))
		return;
	before = now == 1 || *mark >> 1 == mark_of_walk(now - 1);
	*mark = mark_of_walk(now) << 1 | before;
}

/* Another socket may get the address. */
static __always_inline void forget_in_walk(struct sock *sk)
{
	volatile __u8 *mark = walk_mark_of(sk);

	if (mark && *mark)
		*mark = 0;
}

/*
 * Whether the connection of SK, which is found now, is younger than the previous walk for session
 * SLOT: then all that it has carried is of this interval. IN_WALK, the present walk has met it
 * already.
 */
static __always_inline bool is_younger_than_walk(__u32 slot, struct sock *sk, bool in_walk)
{
	struct tcp_session *session = session_at(slot);
	volatile __u32 *now = global(walk);
	volatile __u8 *mark = walk_mark_of(sk);

	if (!now || !mark || !session || !session->walked)
		return false;
	return in_walk ? !(*mark & 1) : *mark >> 1 != mark_of_walk(*now);
}

static __always_inline struct tcp_connection *connection_find(__u32 slot, struct sock *sk,
							      __u32 pid, __u32 group,
							      const char *comm, bool in_walk,
							      bool typed)
{
	__u8 state = state_of(sk);
	struct tcp_connection *c;

	if (state == TCP_CLOSE || state == TCP_TIME_WAIT)
		return NULL;
	c = connection_make(slot, sk, state == TCP_LISTEN ? ROLE_LISTENER : role_of(sk),
			    BPF_NOEXIST, typed); /* a hook may have been faster */
	if (!c)
		return NULL;
	own(c, pid, group, comm);
	name_ends(c, sk, typed);
	c->delivered = kernel_read((struct tcp_sock *)sk, delivered);
	refresh(c, sk, state, false);
	if (!is_younger_than_walk(slot, sk, in_walk))
		keep_as_found(c);
	connection_show(c, number_of(c, sk, typed));
	return c;
}

/* The owner of a connection that user space has found and no hook has seen since; or NULL. */
static __always_inline struct found_owner *found_owner_of(__u32 slot, struct sock *sk,
							  __u64 *cookie)
{
	void *map;

	if (!option(take_over_found))
		return NULL;
	map = map_of_session(found, slot);
	*cookie = kernel_read(sk, __sk_common.skc_cookie.counter);
	return map && *cookie ? bpf_map_lookup_elem(map, cookie) : NULL;
}

/* A connection not yet in the map: one of MEMBER, or one that user space has found; or NULL. */
static __always_inline struct tcp_connection *connection_seek(__u32 slot, struct sock *sk,
							      struct member *member)
{
	__u64 cookie = 0;
	struct found_owner *found_owner = found_owner_of(slot, sk, &cookie);
	struct tcp_connection *c;
	void *map;

	if ((!member && !found_owner) || !is_tcp(sk, option(typed_sockets)))
		return NULL;
	c = connection_find(slot, sk, member ? current_tgid() : found_owner->pid,
			    member ? member->group : found_owner->group,
			    member ? member->comm : found_owner->comm, false,
			    option(typed_sockets));
	if (c && found_owner) {
		map = map_of_session(found, slot);
		if (map)
			bpf_map_delete_elem(map, &cookie);
	}
	return c;
}

/* Whether a process that is not watched had a listener open in the previous walk, or in the present
 * one so far. */
static __always_inline bool is_shared(const struct tcp_connection *listener)
{
	volatile __u32 *now = global(walk);

	return listener->shared && now && *now - listener->shared <= 1;
}

/* The owner of a new connection until a process is seen to have it: the listener's, or nobody if
 * processes that are not watched may accept it, too. False if the listener is not followed. */
static __always_inline bool owner_by_listener(__u32 slot, struct sock *listener,
					      struct found_owner *owner)
{
	struct tcp_connection *c = connection_of(slot, listener);
	struct found_owner *found_owner;
	__u64 cookie;

	if (c && c->role == ROLE_LISTENER) {
		if (!is_shared(c)) {
			owner->pid = c->pid;
			owner->group = c->group;
			__builtin_memcpy(owner->comm, c->comm, COMM_BYTES);
		}
		return true;
	}
	found_owner = found_owner_of(slot, listener, &cookie);
	if (found_owner)
		*owner = *found_owner;
	return found_owner;
}

OPTION(__u32, agent, 0); /* the agent's own process, which looks at open files of others */

/* Who is at a hook. */
enum socket_user {
	USER_NONE,     /* a packet or a timer */
	USER_HOLDS,    /* a process that holds the socket's lock */
	USER_RECEIVES, /* one that receives, too, and so surely has the socket open */
};

/*
 * Whether a process that is not watched, and only HOLDS the socket of C, may be the one that
 * accepted it. The last reference to an open file may be that of a process that just looks at it:
 * by /proc/PID/fd, or in a walk of its own. The socket is then closed there. Walks tell which
 * listeners are shared with others: their connections have no owner yet.
 */
static __always_inline bool may_be_accepted_by_other(__u32 slot, const struct tcp_connection *c)
{
	struct tcp_session *session = session_at(slot);

	return !c->pid || !session || !session->first_walk;
}

/*
 * The connection of the socket that a hook sees. If a process is using the socket and is watched,
 * it owns the connection from now on. Threads of the kernel work for others.
 */
static __always_inline struct tcp_connection *connection_met(__u32 slot, struct sock *sk,
							     enum socket_user user)
{
	struct tcp_connection *c = connection_of(slot, sk);
	bool by_process = user != USER_NONE;
	struct member *member;

	if (c && !by_process)
		return c;
	if (c && c->pid == current_tgid()) {
		c->presumed = false;
		return c;
	}
	if (c && current_tgid() == option(agent))
		return c;
	by_process = by_process && !in_kernel_thread();
	if (by_process && is_ending()) {
		member = c ? ended_process(slot) : NULL;
		by_process = false;
	} else {
		member = by_process ? watched_process(slot) : NULL;
	}
	if (!c)
		return connection_seek(slot, sk, member);
	if (member) {
		own(c, current_tgid(), member->group, member->comm);
	} else if (by_process && c->presumed &&
		   (user == USER_RECEIVES || may_be_accepted_by_other(slot, c))) {
		/* Another process, which shares the listener with a watched one, has it. */
		connection_drop(slot, sk);
		return NULL;
	}
	return c;
}
