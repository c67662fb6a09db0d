// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Follows the HTTP requests of watched processes where they use their sockets, and sends a record
 * of each exchange when it is over.
 *
 * The hooks know the socket, the direction and the number of bytes; TCP's own sequence numbers tell
 * whether anything passed in between that no hook has seen. The state of a connection is kept by
 * its socket, until the kernel destroys that.
 */
#include "include/kernel.bpf.h"
#include "include/account.bpf.h"
#include "include/net.bpf.h"
#include "include/sessions.bpf.h"
#include "include/targets.bpf.h"
#include "http.bpf.h"
#include "operations.bpf.h"
#include "syscalls.bpf.h"

enum record_kind {
	RECORD_HTTP_EXCHANGE = 1,
	RECORD_HTTP_SHORT_EXCHANGE,
	RECORD_HTTP_DETAILED,
};

/* How many characters of a path a short record has room for. Most of what a record costs are the
 * cache lines of the ring, which the reader's CPU had last: with its frame, a short one has three.
 */
#define SHORT_PATH_BYTES 48

/* The record of one exchange. A short one ends after SHORT_PATH_BYTES of the path. */
struct http_exchange {
	struct record_head head;
	__u64 began_ns; /* CLOCK_MONOTONIC: the first byte of the request */
	__u64 asked_ns; /* its last byte; 0 if that had not passed when the exchange ended */
	__u64 first_ns; /* the first byte of the final response; 0 if there was none */
	__u64 ended_ns; /* the last byte */
	__u64 connection;
	__u64 request_body_bytes;
	__u64 response_body_bytes;
	__u64 path_hash; /* of the whole path */
	__u32 number;	 /* of the exchange on its connection, from 0 */
	__u32 pid;
	__u32 born;
	__u32 network;
	__u16 local_port;
	__u16 remote_port;
	__u16 status; /* 0 if there was none */
	__u16 path_bytes;
	__u8 method;
	__u8 version;
	__u8 role;
	__u8 outcome;
	__u8 path_flags;
	__u8 tls;
	__u8 reserved[2];
	__u8 local[ADDRESS_BYTES];
	__u8 remote[ADDRESS_BYTES];
	__u64 path[PATH_BYTES / 8]; /* its characters */
};

struct http_short_exchange {
	__u8 bytes[__builtin_offsetof(struct http_exchange, path) + SHORT_PATH_BYTES];
};

/* Instead, for a session that wants more of requests: what it does not want is zero. */
struct http_detailed {
	struct http_exchange exchange; /* the query follows the path in its place */
	__u64 trace[2];
	__u64 parent;
	__u64 host[HOST_BYTES / 8];
	__u16 query_bytes;
	__u8 host_bytes;
	__u8 reserved[5];
};

IN_BTF(struct http_exchange, http_exchange);
IN_BTF(struct http_detailed, http_detailed);
IN_BTF(struct http_short_exchange, http_short_exchange);
IN_BTF(enum record_kind, record_kind);

MAP(HASH, connections, __u64, struct connection, 65536, BPF_F_NO_PREALLOC);
OPTIONS(struct connection, no_connection, 1); /* zeros, to create elements from */

/* Requests that wait behind as many as a connection has at hand. */
struct request_key {
	__u64 sk;
	__u64 number;
};

MAP(HASH, spilled_requests, struct request_key, struct request, 16384, BPF_F_NO_PREALLOC);
MAP(PERCPU_ARRAY, windows, __u32, struct window, 1, 0);
/* In a map, where the verifier knows nothing of it: it would go through the parser for each kind of
 * call. */
MAP(PERCPU_ARRAY, operations, __u32, struct operation, 1, 0);

#define BY_PACKET 0x100 /* with an outcome: no process runs the program */
#define BY_SSL	  0x200 /* likewise: a program of tls.bpf.h runs, which others may come between */

/* Where a record is made. */
struct draft {
	struct http_detailed record;
	__u64 wants;	     /* what any session may want of it; if so: */
	struct request kept; /* from which each is made */
};

/* For a process, or for a packet or a timer, which may come in between. What OpenSSL has passed is
 * ended by uprobes, too, between which the kernel changes threads: there each thread has its own.
 */
MAP(PERCPU_ARRAY, drafts, __u32, struct draft, 2, 0);

#define DRAFT_OF_THREAD 2

static __always_inline struct draft *draft_of_thread(void);
SUBPROGRAM int ssl_thread_prepare(__u32 unused);

/* What user space says about one session. */
struct http_session {
	__u32 since; /* the generation in which it began */
	__u32 wants; /* of a request, see details.bpf.h */
	__u32 reads_tls;
	__u32 reserved;
};

MAP(ARRAY, http_sessions, __u32, struct http_session, SESSIONS, 0);

/* Those of the sessions WATCHING, as of GENERATION, that have not begun since: their slots may have
 * been other sessions' then. */
SUBPROGRAM __u64 sessions_of_then(__u64 watching, __u32 generation)
{
	struct sessions *all = all_sessions();
	__u64 found = 0;

	if (!all || generation_of(all) == generation)
		return watching;
	for_each_session (slot, watching) {
		__u32 key = slot;
		struct http_session *session = bpf_map_lookup_elem(map_of(http_sessions), &key);

		if (session && (__s32)(session->since - generation) <= 0)
			found |= session_bit(slot);
	}
	return found;
}

/* What any of the sessions WATCHING wants of a request. */
SUBPROGRAM __u32 wants_of(__u64 watching)
{
	__u32 found = 0;

	for_each_session (slot, watching) {
		__u32 key = slot;
		struct http_session *session = bpf_map_lookup_elem(map_of(http_sessions), &key);

		if (session)
			found |= session->wants;
	}
	return found;
}

static __always_inline struct draft *draft_at(__u32 at)
{
	if (at == DRAFT_OF_THREAD)
		return draft_of_thread();
	return bpf_map_lookup_elem(map_of(drafts), &at);
}

static __always_inline __u32 draft_for(__u32 outcome)
{
	if (outcome & BY_SSL)
		return DRAFT_OF_THREAD;
	return outcome & BY_PACKET ? 1 : 0;
}

static __always_inline __u32 kind_of(const struct request *request)
{
	return request->path_bytes <= SHORT_PATH_BYTES ? RECORD_HTTP_SHORT_EXCHANGE
						       : RECORD_HTTP_EXCHANGE;
}

/* Makes the record for one session of a draft of which others may want more, or less. */
SUBPROGRAM int draft_for_session(__u32 slot, __u32 at)
{
	struct http_session *session = bpf_map_lookup_elem(map_of(http_sessions), &slot);
	struct draft *draft = draft_at(at);
	struct http_detailed *to;
	__u32 wants, length;

	if (!draft || !session)
		return 0;
	to = &draft->record;
	wants = session->wants;
	to->exchange.head.kind = wants ? RECORD_HTTP_DETAILED : kind_of(&draft->kept);
	to->query_bytes = wants & WANTS_QUERY ? draft->kept.query_bytes : 0;
	length = draft->kept.path_bytes + to->query_bytes;
	if (length > PATH_BYTES)
		length = PATH_BYTES;
	__builtin_memset(to->exchange.path, 0, PATH_BYTES);
	bpf_probe_read_kernel(to->exchange.path, length, draft->kept.path);
	to->trace[0] = to->trace[1] = to->parent = 0;
	if (wants & WANTS_TRACE && draft->kept.flags & HAS_TRACE) {
		to->trace[0] = draft->kept.trace[0];
		to->trace[1] = draft->kept.trace[1];
		to->parent = draft->kept.parent;
	}
	to->host_bytes = wants & WANTS_HOST ? draft->kept.host_bytes : 0;
	if (wants & WANTS_HOST)
		__builtin_memcpy(to->host, draft->kept.host, HOST_BYTES);
	else
		__builtin_memset(to->host, 0, HOST_BYTES);
	return 0;
}

/* Sends a draft to one session. */
SUBPROGRAM int send_draft(__u32 slot, __u32 at)
{
	struct draft *draft = draft_at(at);

	if (!draft)
		return 0;
	switch (draft->record.exchange.head.kind) {
	case RECORD_HTTP_SHORT_EXCHANGE:
		record_send(NULL, slot, &draft->record, sizeof(struct http_short_exchange));
		break;
	case RECORD_HTTP_EXCHANGE:
		record_send(NULL, slot, &draft->record, sizeof(struct http_exchange));
		break;
	case RECORD_HTTP_DETAILED:
		record_send(NULL, slot, &draft->record, sizeof(struct http_detailed));
	}
	return 0;
}

static __always_inline struct connection *connection_at(__u64 sk)
{
	return bpf_map_lookup_elem(map_of(connections), &sk);
}

/* Keeps request NUMBER elsewhere; where there is no room, its exchange is lost. */
SUBPROGRAM int spill(__u64 sk, __u32 number)
{
	struct request_key key = {.sk = sk, .number = number};
	struct connection *c = connection_at(sk);

	if (!c || c->answered - number - 1 < PIPELINE) /* it was answered */
		return 0;
	bpf_map_update_elem(map_of(spilled_requests), &key, request_at(c, number), BPF_ANY);
	return 0;
}

static __always_inline void request_spill(struct connection *c, __u32 number)
{
	spill(c->sk, number);
}

/* NULL if it was spilled, and there was no room. */
static __always_inline const struct request *request_waiting(struct connection *c, __u32 number)
{
	struct request_key key = {.sk = c->sk, .number = number};

	if (request_at(c, number)->number == number)
		return request_at(c, number);
	return bpf_map_lookup_elem(map_of(spilled_requests), &key);
}

static __always_inline void request_forget(struct connection *c, __u32 number)
{
	struct request_key key = {.sk = c->sk, .number = number};

	if (request_at(c, number)->number != number)
		bpf_map_delete_elem(map_of(spilled_requests), &key);
}

SUBPROGRAM int count_unread(__u64 sessions, __u32 why, __u64 count, __u64 bytes);

/* False if there is no room to make the record. */
static __always_inline bool exchange_send(struct connection *c, const struct request *request,
					  __u32 outcome, __u64 now_ns)
{
	struct lane *ask = lane_of(c, request_direction(c));
	struct lane *answer = lane_of(c, !request_direction(c));
	bool answers = answer->status >= 200 || answer->status == 101;
	__u32 at = draft_for(outcome);
	struct draft *draft = draft_at(at);
	struct http_exchange *to;
	__u64 sessions;

	if (!draft)
		return false;
	to = &draft->record.exchange;
	to->head.kind = kind_of(request);
	to->connection = c->id;
	to->number = request->number;
	to->began_ns = request->begun_ns;
	to->asked_ns = request->ended_ns;
	to->ended_ns = now_ns;
	to->status = answers ? answer->status : 0;
	to->first_ns = answers ? answer->begun_ns : 0;
	to->response_body_bytes = answers ? answer->body_bytes : 0;
	to->request_body_bytes = request->body_bytes;
	if (!request->ended_ns)
		to->request_body_bytes = ask->body_bytes;
	to->path_hash = request->path_hash;
	to->path_bytes = request->path_bytes;
	to->path_flags = request->flags;
	to->method = request->method;
	to->version = request->version;
	to->pid = c->tgid;
	to->born = c->born;
	to->network = c->network;
	to->role = c->role;
	to->outcome = outcome & ~(BY_PACKET | BY_SSL);
	to->tls = c->ssl != 0;
	to->local_port = c->local_port;
	to->remote_port = c->remote_port;
	__builtin_memcpy(to->local, c->local, ADDRESS_BYTES);
	__builtin_memcpy(to->remote, c->remote, ADDRESS_BYTES);
	if (to->head.kind == RECORD_HTTP_SHORT_EXCHANGE)
		__builtin_memcpy(to->path, request->path, SHORT_PATH_BYTES);
	else
		__builtin_memcpy(to->path, request->path, PATH_BYTES);
	draft->wants = c->wants | request->wants;
	sessions = sessions_of_then(c->watching, c->generation);
	if (draft->wants) {
		__builtin_memcpy(&draft->kept, request, sizeof(*request));
		for_each_session (slot, sessions) {
			draft_for_session(slot, at);
			send_draft(slot, at);
		}
	} else {
		for_each_session (slot, sessions) {
			send_draft(slot, at);
		}
	}
	if (c->ssl && !c->remote_port)
		count_unread(sessions_of_then(c->watching, c->generation), UNREAD_PEER, 1, 0);
	return true;
}

/* The exchange that waits longest is over: for each, this is done once, whoever comes first. */
static __always_inline void exchange_over(struct connection *c, __u32 outcome, __u64 now_ns)
{
	__u32 number = c->answered;
	const struct request *request = request_waiting(c, number);
	bool is_none = !(outcome & ~(BY_PACKET | BY_SSL));

	if (!__sync_bool_compare_and_swap(&c->answered, number, number + 1))
		return;
	if (!request || !(is_none || exchange_send(c, request, outcome, now_ns))) {
		for_each_session (slot, sessions_of_then(c->watching, c->generation)) {
			account_loss(slot, LOSS_MAP_FULL);
		}
	}
	request_forget(c, number);
	lane_of(c, !request_direction(c))->status = 0;
}

/* What has ended the exchanges of a connection. */
struct ending {
	struct connection *c;
	__u64 now_ns;
	__u32 outcome;
};

static long exchange_end(__u32 turn, struct ending *ending)
{
	struct connection *c = ending->c;

	if (c->answered == c->made)
		return 1;
	exchange_over(c, ending->outcome, ending->now_ns);
	return 0;
}

/* The exchange that waits longest is over; with an outcome that is no answer, all that wait are. */
SUBPROGRAM int end_exchanges(struct connection *c, __u32 outcome, __u64 now_ns)
{
	struct ending ending = {.c = c, .outcome = outcome, .now_ns = now_ns};

	if (!c)
		return 0;
	if (outcome & BY_SSL)
		ssl_thread_prepare(0);
	outcome &= ~(BY_PACKET | BY_SSL);
	if (outcome == OUTCOME_COMPLETE || outcome == OUTCOME_UPGRADED)
		exchange_end(0, &ending);
	else
		bpf_loop(PIPELINE, exchange_end, &ending, 0);
	return 0;
}

static __always_inline void exchange_ended(struct connection *c, enum outcome outcome, __u64 now_ns)
{
	if (c->ssl && !(outcome & BY_PACKET))
		outcome |= BY_SSL;
	end_exchanges(c, outcome, now_ns);
}

/* What a session's processes used that was not read, by enum unread: connections, when that became
 * clear, and their bytes, when they end. At UNREAD_NONE and UNREAD_IO_URING, operations whose bytes
 * could not be seen.
 */
#define UNREADS 16 /* a power of two */

struct http_unread {
	__u64 count[UNREADS];
	__u64 bytes[UNREADS];
};

MAP(PERCPU_ARRAY, http_unreads, __u32, struct http_unread, SESSIONS, 0);

SUBPROGRAM int count_unread(__u64 sessions, __u32 why, __u64 count, __u64 bytes)
{
	for_each_session (slot, sessions) {
		__u32 key = slot;
		struct http_unread *unread = bpf_map_lookup_elem(map_of(http_unreads), &key);

		if (!unread)
			return 0;
		__sync_fetch_and_add(&unread->count[why & (UNREADS - 1)], count);
		__sync_fetch_and_add(&unread->bytes[why & (UNREADS - 1)], bytes);
	}
	return 0;
}

/* Connections. */

static __always_inline struct connection *connection_of(struct sock *sk)
{
	__u64 key = address_of(sk);

	return bpf_map_lookup_elem(map_of(connections), &key);
}

static __always_inline void connection_forget(struct sock *sk)
{
	__u64 key = address_of(sk);

	bpf_map_delete_elem(map_of(connections), &key);
}

/* Where the next byte lies. */
static __always_inline __u32 offset_of(struct tcp_sock *tp, __u32 direction, bool typed)
{
	if (direction == RECEIVED)
		return socket_read_if(typed, tp, copied_seq);
	return socket_read_if(typed, tp, write_seq);
}

/* How many bytes have passed; a client's SYN may be among them. */
static __always_inline __u64 passed_so_far(struct tcp_sock *tp, __u32 direction, bool typed)
{
	__u32 rest;

	if (direction == RECEIVED) {
		rest = socket_read_if(typed, tp, rcv_nxt) - socket_read_if(typed, tp, copied_seq);
		return socket_read_if(typed, tp, bytes_received) - rest;
	}
	rest = socket_read_if(typed, tp, write_seq) - socket_read_if(typed, tp, snd_una);
	return socket_read_if(typed, tp, bytes_acked) + rest;
}

/* Whether the LENGTH bytes that have just passed are the first. A SYN or a FIN may be among them.
 */
static __always_inline bool is_fresh(struct sock *sk, struct tcp_sock *tp, __u32 direction,
				     __u32 length, bool typed)
{
	__u64 passed = passed_so_far(tp, direction, typed);
	bool more = direction == SENT || socket_read_if(typed, sk, sk_shutdown) & RCV_SHUTDOWN;

	return (passed == length || (more && passed == length + 1)) &&
	       passed_so_far(tp, !direction, typed) <= 1;
}

static __always_inline struct connection *connection_make(struct sock *sk, struct tcp_sock *tp,
							  __u64 watching, __u32 direction,
							  __u32 length, bool typed)
{
	struct connection *c;
	__u64 key = address_of(sk);

	bpf_map_update_elem(map_of(connections), &key, (void *)element(no_connection, 0), BPF_ANY);
	c = bpf_map_lookup_elem(map_of(connections), &key);
	if (!c) {
		for_each_session (slot, watching) {
			account_loss(slot, LOSS_MAP_FULL);
		}
		return NULL;
	}
	c->sk = key;
	c->id = socket_read_if(typed, sk, __sk_common.skc_cookie.counter);
	if (!c->id) /* nobody has asked for one: a number unlike any of the kernel's */
		c->id = 1ULL << 63 | (__u64)bpf_get_prandom_u32() << 31 | bpf_get_prandom_u32();
	c->network = network_of(sk, typed);
	addresses_of(&sk->__sk_common, c->local, c->remote, typed);
	c->local_port = local_port_of(sk);
	c->remote_port = remote_port_of(sk, typed);
	c->lanes[RECEIVED].offset = offset_of(tp, RECEIVED, typed);
	c->lanes[SENT].offset = offset_of(tp, SENT, typed);
	lane_of(c, direction)->offset -= length;
	if (is_fresh(sk, tp, direction, length, typed))
		c->role = direction == RECEIVED ? HTTP_SERVER : HTTP_CLIENT;
	else
		not_read(c, UNREAD_JOINED);
	return c;
}

/* The kernel gives the memory of a socket to another one. Its end is only missed where the kernel
 * skips a program. */
static __always_inline bool is_same_socket(const struct connection *c, struct sock *sk,
					   struct tcp_sock *tp, bool typed)
{
	__u16 local_port = socket_read_if(typed, tp, inet_conn.icsk_inet.inet_sport);

	return c->remote_port == remote_port_of(sk, typed) &&
	       c->local_port == bpf_ntohs(local_port);
}

/* The connection of SK, which the current process uses; NULL if no session watches that. */
static __always_inline struct connection *connection_used(const struct sessions *all,
							  struct sock *sk, struct tcp_sock *tp,
							  __u32 direction, __u32 length, bool typed)
{
	struct connection *c = connection_of(sk);
	__u32 tgid = current_tgid(), generation = generation_of(all);
	__u64 watching;

	if (c && !is_same_socket(c, sk, tp, typed)) {
		connection_forget(sk);
		c = NULL;
	}
	if (c && c->tgid == tgid && c->generation == generation)
		return c->watching ? c : NULL;
	watching = sessions_in_state(sessions_of_hub(all), tgid, MEMBER_ACTIVE);
	/* With fewer bytes it is another socket, which has the descriptor since. */
	if (!c && watching && passed_so_far(tp, direction, typed) >= length)
		c = connection_make(sk, tp, watching, direction, length, typed);
	if (!c)
		return NULL;
	c->watching = watching;
	c->wants = wants_of(watching);
	c->generation = generation;
	c->tgid = tgid;
	c->born = born_of(kernel_read(this_task(), group_leader));
	return watching ? c : NULL;
}

/* Reading what passes. */

static __always_inline struct window *window_here(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(map_of(windows), &zero);
}

static __always_inline struct window *ssl_window(void); /* of tls.bpf.h */

/* Functions that the verifier goes through once: each program comes to the parser by these. */

SUBPROGRAM int window_read(struct connection *c)
{
	struct cursor cursor = {.c = c};

	if (!c)
		return 0;
	cursor.window = c->ssl ? ssl_window() : window_here();
	if (!cursor.window)
		return 0;
	cursor.wants = details_wanted(c, cursor.window->direction);
	bpf_loop(WINDOW, http_step, &cursor, 0);
	return 0;
}

SUBPROGRAM int bytes_unseen(struct connection *c, __u32 direction, __u64 length, __u64 now_ns)
{
	if (c)
		unseen_passed(c, direction, length, now_ns);
	return 0;
}

struct feed {
	struct connection *c;
	struct window *window;
	struct operation *op;
	__u64 left;
};

static long feed_window(__u32 turn, struct feed *feed)
{
	struct window *window = feed->window;
	__u64 length = feed->left, body, now_ns = window->now_ns;
	__u32 direction = window->direction;
	struct lane *lane = lane_of(feed->c, direction);

	if (!length)
		return 1;
	body = body_ahead(lane);
	if (body >= length) {
		bytes_unseen(feed->c, direction, length, now_ns);
		return 1;
	}
	if (!feed->op->length && !next_piece(feed->op)) {
		bytes_unseen(feed->c, direction, length, now_ns);
		return 1;
	}
	if (length > feed->op->length)
		length = feed->op->length;
	if (body) {
		if (length > body)
			length = body;
		bytes_unseen(feed->c, direction, length, now_ns);
	} else {
		if (length > WINDOW)
			length = WINDOW;
		if (bpf_probe_read_user(window->bytes, length, (void *)feed->op->base)) {
			bytes_unseen(feed->c, direction, feed->left, now_ns);
			return 1;
		}
		window->at = 0;
		window->end = length;
		window_read(feed->c);
	}
	feed->op->base += length;
	feed->op->length -= length;
	feed->left -= length;
	return 0;
}

#define MOST_WINDOWS (1 << 17)
#define GLANCE	     16

/* Whether a request may begin with BYTES. */
static __always_inline bool looks_like_request(const __u8 *bytes)
{
	if (bytes[0] < 'A' || bytes[0] > 'Z')
		return false;
	for (int i = 1; i < GLANCE - 1; i++) {
		if (bytes[i] == ' ')
			return bytes[i + 1] == '/' || bytes[i + 1] == '*' || bytes[i + 1] == 'h';
		if (!is_token(bytes[i]))
			return false;
	}
	return false;
}

/* Whether a request may be what lies at ADDRESS. A function of its own, so that the verifier does
 * not go through the parser once more for what it learns here. */
SUBPROGRAM int request_lies_at(__u64 address, __u64 length)
{
	__u8 bytes[GLANCE] = {};

	return length >= GLANCE && !bpf_probe_read_user(bytes, GLANCE, (void *)address) &&
	       looks_like_request(bytes);
}

/* A connection that was joined in its middle: takes what may be a request for one, until the
 * response shows. */
static __always_inline bool try_request(struct connection *c, const struct operation *op,
					__u32 direction)
{
	if (!request_lies_at(op->base, op->length))
		return false;
	c->unread = UNREAD_NONE;
	c->on_trial = TRIAL_JOINED;
	c->role = direction == RECEIVED ? HTTP_SERVER : HTTP_CLIENT;
	token_begin(&c->lanes[RECEIVED], AT_START);
	token_begin(&c->lanes[SENT], AT_START);
	return true;
}

/* What is on trial as a request may have been part of a body that looks like one: where a response
 * should begin in DIRECTION, and a request does, the trial is over. */
static __always_inline void reconsider(struct connection *c, const struct operation *op,
				       __u32 direction)
{
	if (!c->on_trial || direction == request_direction(c) ||
	    lane_of(c, direction)->place != AT_START || !request_lies_at(op->base, op->length))
		return;
	lose_track(c, 0);
	c->unread_last = !direction + 1;
}

/*
 * A request that expects 100 (RFC 9110, 10.1.1), and was answered before any of its body has
 * passed, may never be followed by that: the client goes on with the next request. LENGTH bytes are
 * sent. All that was refused, in one piece, is taken for that; what else begins like a request for
 * one, which is on trial: where more follows before a response, it is the body all the same.
 */
static __always_inline void skip_refused_body(struct connection *c, const struct operation *op,
					      __u32 direction, __u64 length)
{
	struct lane *lane = lane_of(c, direction);

	if (direction != request_direction(c))
		return;
	if (c->on_trial == TRIAL_NO_BODY && lane->place == AT_START && c->made != c->answered) {
		lose_track(c, 0);
		c->unread_last = direction + 1;
		return;
	}
	if (!(lane->flags & EXPECTS) || (lane->place != AT_BODY && lane->place != AT_CHUNK_SIZE) ||
	    lane->body_bytes || lane->column || c->made != c->answered || lane->left == length ||
	    !request_lies_at(op->base, op->length))
		return;
	token_begin(lane, AT_START);
	c->on_trial = TRIAL_NO_BODY;
}

/* A connection counts as unread once bytes of it are. */
static __always_inline void leave_unread(struct connection *c, __u32 direction, __u32 length)
{
	if (!c->unread_bytes && c->unread != UNREAD_TLS) /* which OpenSSL may be about to read */
		count_unread(c->watching, c->unread, 1, 0);
	c->unread_bytes += length;
	c->unread_last = direction + 1;
}

/* LENGTH bytes; COPIED, they lie in the process's memory. */
static __always_inline void passed(struct connection *c, __u32 direction, __u32 length, bool copied)
{
	struct feed feed = {.c = c, .left = length};
	__u32 zero = 0;
	bool seen;

	if (c->unread && c->unread != UNREAD_JOINED) {
		leave_unread(c, direction, length);
		return;
	}
	feed.window = window_here();
	feed.op = bpf_map_lookup_elem(map_of(operations), &zero);
	if (!feed.window || !feed.op)
		return;
	seen = copied && operation_find(feed.op, length);
	if (seen) {
		reconsider(c, feed.op, direction);
		skip_refused_body(c, feed.op, direction, length);
	}
	if (!seen && body_ahead(lane_of(c, direction)) < length)
		count_unread(c->watching, by_io_uring() ? UNREAD_IO_URING : UNREAD_NONE, 1, length);
	/* Where the same side has just sent something that was not read, this may be more of that.
	 */
	if (c->unread &&
	    !(seen && c->unread_last != direction + 1 && try_request(c, feed.op, direction))) {
		leave_unread(c, direction, length);
		return;
	}
	feed.window->direction = direction;
	lane_of(c, direction)->last_ns = feed.window->now_ns = bpf_ktime_get_ns();
	if (seen)
		bpf_loop(MOST_WINDOWS, feed_window, &feed, 0);
	else
		bytes_unseen(c, direction, length, feed.window->now_ns);
}

/* The peer sends nothing more, and the process has read that. */
static __always_inline void end_read(struct connection *c)
{
	struct lane *answer = lane_of(c, RECEIVED);
	__u64 now_ns = bpf_ktime_get_ns();

	if (!c->closed)
		c->closed = RECEIVED + 1;
	if (c->role != HTTP_CLIENT || c->unread)
		return;
	if (answer->place == AT_BODY_TO_CLOSE)
		response_end(c, answer, OUTCOME_COMPLETE, now_ns);
	else if (!c->on_trial)
		exchange_ended(c, OUTCOME_ABORTED_BY_SERVER, now_ns);
}

OPTION(__u64, ns_per_jiffy, 4000000);

/* When unseen bytes of LANE passed, in DIRECTION. Nothing tells when the process spliced them out
 * of the socket, so it is the time at which they came: idle time belongs to no request. */
static __always_inline __u64 unseen_ns(const struct lane *lane, struct tcp_sock *tp,
				       __u32 direction, bool typed)
{
	__u64 now_ns = bpf_ktime_get_ns(), came_ns;
	__u32 jiffies = bpf_jiffies64();

	if (direction == SENT)
		return now_ns;
	jiffies -= socket_read_if(typed, tp, inet_conn.icsk_ack.lrcvtime);
	came_ns = now_ns - jiffies * option(ns_per_jiffy);
	return came_ns > now_ns || came_ns < lane->last_ns ? lane->last_ns : came_ns;
}

/*
 * Takes in what has passed in the other direction, unseen, before an operation in DIRECTION: all of
 * it while the connection is not read, and when a message begins, what is left of the last one.
 * Either that was spliced, or the call that sends it has not returned yet: when it does, its bytes
 * come too late.
 */
static __always_inline void catch_up(struct connection *c, struct tcp_sock *tp, __u32 direction,
				     bool typed)
{
	bool asks = direction == request_direction(c);
	struct lane *lane = lane_of(c, !direction);
	__u32 offset, gap;

	if (!c->unread &&
	    ((asks && direction == RECEIVED) || lane_of(c, direction)->place != AT_START))
		return;
	offset = offset_of(tp, !direction, typed);
	gap = offset - lane->offset;
	if (!c->unread && (asks || c->made != c->answered) && body_ahead(lane) < gap)
		return; /* the next message, whose call may yet show it */
	lane->offset = offset;
	if (!gap)
		return;
	c->unread_last = !direction + 1;
	bytes_unseen(c, !direction, gap, unseen_ns(lane, tp, !direction, typed));
}

/* Whether the process has received the FIN, which has a number, too: OFFSET is the one after it. */
static __always_inline bool is_behind_fin(struct sock *sk, struct tcp_sock *tp, __u32 offset,
					  bool typed)
{
	return socket_read_if(typed, sk, __sk_common.skc_flags) & (1UL << SOCK_DONE) &&
	       socket_read_if(typed, tp, rcv_nxt) == offset;
}

/*
 * A response that was there before any request, such as a 408, is the answer to none. One whose
 * request no program has seen yet is told from it by what had been sent when its first bytes
 * passed. These, of LENGTH up to OFFSET, are about to be read.
 */
static __always_inline void match_early(struct connection *c, struct tcp_sock *tp, __u32 direction,
					__u32 offset, __u32 length, bool typed)
{
	struct lane *answer = lane_of(c, !request_direction(c));

	if (direction != request_direction(c)) {
		if (answer->place == AT_START || c->made != c->answered)
			answer->asked = offset_of(tp, !direction, typed);
	} else if (answer->flags & IS_EARLY && (__s32)(offset - length - answer->asked) >= 0) {
		answer->flags = 0;
		answer->status = 0;
	}
}

/* What is needed of tls.bpf.h: see there. */
static __always_inline bool encrypted_passed(struct connection *c, __u32 direction, __u32 length);
static __always_inline struct connection *read_of(struct connection *c);
static __always_inline void connection_left(struct connection *c);

#define MSG_OOB	     0x1
#define MSG_PEEK     0x2
#define MSG_TRUNC    0x20
#define MSG_ERRQUEUE 0x2000

static __always_inline int used(struct sock *sk, int length, int flags, __u32 direction, bool typed)
{
	struct sessions *all = all_sessions();
	struct connection *c;
	struct tcp_sock *tp;
	struct lane *lane;
	__u32 offset, gap;
	__u8 unread;
	bool ended;

	if (!all || surely_unwatched_here(all, current_tgid()) || length < 0 ||
	    flags & (MSG_PEEK | MSG_OOB | MSG_ERRQUEUE) || !is_tcp(sk, typed))
		return 0;
	tp = tcp_of(sk, typed);
	if (!tp)
		return 0;
	ended = direction == RECEIVED && socket_read_if(typed, sk, sk_shutdown) & RCV_SHUTDOWN;
	if (!length && !ended)
		return 0;
	c = connection_used(all, sk, tp, direction, length, typed);
	if (!c)
		return 0;
	unread = c->unread;
	lane = lane_of(c, direction);
	offset = offset_of(tp, direction, typed);
	gap = offset - length - lane->offset;
	if ((__s32)gap < 0) /* counted already, as a gap */
		return 0;
	lane->offset = offset;
	if (gap && ended && is_behind_fin(sk, tp, offset, typed))
		gap--;
	if (gap)
		bytes_unseen(c, direction, gap, unseen_ns(lane, tp, direction, typed));
	if (length) {
		match_early(c, tp, direction, offset, length, typed);
		catch_up(c, tp, direction, typed);
	}
	if (length && c->unread == UNREAD_JOINED && encrypted_passed(c, direction, length))
		c->unread_bytes += length;
	else if (length)
		passed(c, direction, length, !(direction == RECEIVED && flags & MSG_TRUNC));
	else
		end_read(read_of(c));
	if (length && c->unread == UNREAD_TLS)
		encrypted_passed(c, direction, length);
	if (length && c->unread && c->unread != unread)
		leave_unread(c, direction, length);
	return 0;
}

SEC("raw_tp/sock_recv_length")
int RAW_PROGRAM(coral_received, struct sock *sk, int length, int flags)
{
	return used(sk, length, flags, RECEIVED, option(typed_sockets));
}

SEC("raw_tp/sock_send_length")
int RAW_PROGRAM(coral_sent, struct sock *sk, int length, int flags)
{
	return used(sk, length, flags, SENT, option(typed_sockets));
}

/* How many bytes have passed since the last that was seen; 0 if none was. */
static __always_inline __u32 passed_unseen(struct sock *sk, __u32 direction, bool typed)
{
	struct connection *c = connection_of(sk);
	struct tcp_sock *tp = tcp_of(sk, typed);

	if (!c || !tp)
		return 0;
	return offset_of(tp, direction, typed) - lane_of(c, direction)->offset;
}

/* Instead of both, where the kernel lacks their tracepoints. */
SEC("raw_tp/sys_exit")
int RAW_PROGRAM(coral_left, struct pt_regs *regs, long result)
{
	struct sessions *all;
	struct socket_call call;
	struct sock *sk;
	__u32 direction;

	if (result < 0 || !socket_call_find(&call))
		return 0;
	all = all_sessions();
	if (!all || surely_unwatched_here(all, current_tgid()))
		return 0;
	sk = socket_of_call(&call);
	if (!sk)
		return 0;
	direction = call.kind & 1;
	if (call.kind & OF_MESSAGES)
		result = passed_unseen(sk, direction, option(typed_sockets));
	return used(sk, result, call.flags, direction, option(typed_sockets));
}

/* Ends. */

/* Who has ended the connection: this side, or the peer. */
static __always_inline bool ended_by_peer(const struct connection *c, struct sock *sk, bool typed)
{
	if (c->closed)
		return c->closed == RECEIVED + 1;
	return socket_read_if(typed, sk, sk_err);
}

/* Takes in what the process has received, and no hook has seen: by splice. */
static __always_inline void catch_up_at_end(struct connection *c, struct sock *sk, bool typed)
{
	struct lane *lane = lane_of(c, RECEIVED);
	struct tcp_sock *tp = tcp_of(sk, typed);
	__u32 offset, gap;

	if (!tp || c->ssl || c->unread || !held_by_process(sk))
		return;
	offset = offset_of(tp, RECEIVED, typed);
	gap = offset - lane->offset;
	if (gap && is_behind_fin(sk, tp, offset, typed))
		gap--;
	if ((__s32)gap <= 0)
		return;
	lane->offset = offset;
	bytes_unseen(c, RECEIVED, gap, unseen_ns(lane, tp, RECEIVED, typed));
}

static __always_inline void connection_over(struct connection *c, struct sock *sk, bool typed)
{
	__u32 context = held_by_process(sk) ? 0 : BY_PACKET;
	bool by_peer = ended_by_peer(c, sk, typed);
	bool failed = c->reset || socket_read_if(typed, sk, sk_err);
	struct lane *answer = lane_of(c, !request_direction(c));
	bool by_server = by_peer == (c->role == HTTP_CLIENT);

	if (c->unread || c->made == c->answered)
		return;
	if (c->on_trial) {
		exchange_ended(c, OUTCOME_NONE | context, 0);
		return;
	}
	/* A server's own end ends the body, also where the client has ended its side before. */
	if (answer->place == AT_BODY_TO_CLOSE && !failed && (by_server || c->role == HTTP_SERVER))
		exchange_ended(c, OUTCOME_COMPLETE | context, answer->last_ns);
	exchange_ended(
	    c, (by_server ? OUTCOME_ABORTED_BY_SERVER : OUTCOME_ABORTED_BY_CLIENT) | context,
	    bpf_ktime_get_ns());
}

/* Whether a packet has ended a connection that the process goes on using: a call that sends has not
 * returned yet, so that no hook has seen its bytes, or what a client has received is still to be
 * read. The exchange ends then with that, or when the process closes the socket. */
static __always_inline bool is_in_use(struct connection *c, struct sock *sk, int old, bool typed)
{
	bool closed = socket_read_if(typed, sk, sk_shutdown) == SHUTDOWN_MASK;
	bool fin = socket_read_if(typed, sk, __sk_common.skc_flags) & (1UL << SOCK_DONE);
	struct tcp_sock *tp = tcp_of(sk, typed);

	if (!tp || (closed && !fin))
		return false;
	if ((old == TCP_ESTABLISHED || old == TCP_CLOSE_WAIT) &&
	    offset_of(tp, SENT, typed) != c->lanes[SENT].offset)
		return true;
	return read_of(c)->role == HTTP_CLIENT &&
	       socket_read_if(typed, tp, rcv_nxt) != offset_of(tp, RECEIVED, typed);
}

static __always_inline int state_changed(struct sock *sk, int old, int state, bool typed)
{
	struct connection *c;
	bool closes;

	if (state != TCP_FIN_WAIT1 && state != TCP_LAST_ACK && state != TCP_CLOSE_WAIT &&
	    state != TCP_CLOSE)
		return 0;
	c = connection_of(sk);
	if (!c)
		return 0;
	if (state == TCP_CLOSE_WAIT) {
		if (!c->closed)
			c->closed = RECEIVED + 1;
		return 0;
	}
	if (state == TCP_CLOSE && (old == TCP_ESTABLISHED || old == TCP_CLOSE_WAIT))
		read_of(c)->reset = 1; /* by either side, without a FIN of this one */
	if (state == TCP_CLOSE && is_in_use(c, sk, old, typed)) {
		c->closed = RECEIVED + 1; /* also where the client had ended its side before */
		return 0;
	}
	if (!c->closed && state != TCP_CLOSE)
		c->closed = SENT + 1;
	c = read_of(c);
	closes = state == TCP_CLOSE || c->role == HTTP_SERVER ||
		 (socket_read_if(typed, sk, sk_shutdown) & SHUTDOWN_MASK) == SHUTDOWN_MASK;
	if (!closes)
		return 0;
	catch_up_at_end(c, sk, typed);
	connection_over(c, sk, typed);
	return 0;
}

SEC("raw_tp/inet_sock_set_state")
int RAW_PROGRAM(coral_state, struct sock *sk, int old, int state)
{
	return state_changed(sk, old, state, option(typed_sockets));
}

SEC("raw_tp/tcp_destroy_sock")
int RAW_PROGRAM(coral_destroy, struct sock *sk)
{
	struct connection *c = connection_of(sk);

	if (!c)
		return 0;
	connection_over(read_of(c), sk, option(typed_sockets));
	connection_left(c);
	if (c->unread && c->unread_bytes && !c->tied)
		count_unread(sessions_of_then(c->watching, c->generation), c->unread, 0,
			     c->unread_bytes);
	connection_forget(sk);
	return 0;
}

#include "joined.bpf.h"
#include "tls.bpf.h"

LICENSED_AS("GPL");
