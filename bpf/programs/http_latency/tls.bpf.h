/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * HTTP inside of TLS: the bytes that programs pass to OpenSSL and get from it, seen by uprobes on
 * its functions, in libssl or in an executable. An SSL object is a connection like a socket, under
 * a number of its own, and its bytes go through the same parser.
 *
 * Which socket carries an SSL object is known in two ways. Where OpenSSL uses the socket itself,
 * the thread does so inside of the call. Where a program passes the encrypted bytes on (memory
 * BIOs), the last bytes that the thread has received are looked for where the object keeps its
 * input. An object whose socket is not known for sure has none: its addresses are zeros.
 *
 * Included by http_latency.bpf.c, at its end.
 */
#pragma once

#define SSL_NESTED 3	/* calls of one thread for different objects, through filters */
#define SSL_ROOM   4	/* a power of two */
#define SEVERAL	   1ULL /* instead of the address of a socket */
#define HANDSHAKE  2	/* instead of a direction: a call that passes no bytes */

/*
 * Where a program runs: user space attaches each to several functions, with these numbers as
 * cookies. Few programs mean a quick start: the verifier goes through the parser for each.
 */
#define SSL_DIRECTION 3 /* a mask */
#define SSL_EXTENDED  4 /* the fourth argument says where the number of bytes will be */
#define SSL_UNSEEN    8 /* there is no buffer */

enum ssl_place {
	SSL_PLACE_READ = RECEIVED,
	SSL_PLACE_READ_EX = RECEIVED | SSL_EXTENDED,
	SSL_PLACE_WRITE = SENT,
	SSL_PLACE_WRITE_EX = SENT | SSL_EXTENDED,
	SSL_PLACE_SENDFILE = SENT | SSL_UNSEEN,
	SSL_PLACE_DO_HANDSHAKE = HANDSHAKE, /* which SSL_accept and SSL_connect call, too */
	SSL_PLACE_FREE = 16,
	SSL_PLACE_SHUTDOWN,
};

IN_BTF(enum ssl_place, ssl_place);

/* A call that has not returned yet. */
struct ssl_call {
	__u64 ssl;
	__u64 sp; /* tells which call returns */
	__u64 buffer;
	__u64 length_at; /* where the number of bytes will be, or 0: it is what the call returns */
	__u64 sk;	 /* the socket that carries it, 0 or SEVERAL */
	__u64 sent_ns;	 /* when the first encrypted bytes were sent inside of it, or 0 */
	__u32 direction;
	__u8 closing;	 /* the peer has probably said that it sends no more */
	__u8 by_address; /* how `sk` was found, see ssl_search */
	__u8 reserved[2];
};

/* The last encrypted bytes that a thread has received outside of such calls. */
struct heard {
	__u64 sk; /* 0 if there are none */
	__u64 base;
	__u64 tail[2]; /* the last of them, as good as random */
	__u32 length;
	__u32 tries; /* that are left */
};

struct ssl_thread {
	struct ssl_call calls[SSL_ROOM];
	__u32 depth;
	__u32 reserved;
	struct heard heard;
	struct operation op;
	struct window window;
	struct draft draft;
};

#define THREAD_STATE struct ssl_thread
#include "include/thread.bpf.h"

OPTIONS(struct ssl_thread, no_ssl_thread, 1); /* zeros */

struct ssl_key {
	__u64 process;
	__u64 ssl;
};

/* An SSL object since it was made, or since it was first seen. */
struct ssl_object {
	__u64 connection; /* its number, 0 before the first bytes */
	__u64 watching;	  /* the sessions that have seen all of it ... */
	__u32 generation; /* ... as of this generation */
	__u32 searched;	  /* how often its socket was looked for */
	__u64 sk;	  /* the socket that carried its handshake, or 0 */
};

MAP(HASH, ssl_objects, struct ssl_key, struct ssl_object, 65536, BPF_F_NO_PREALLOC);

/* Numbers of connections, unlike the address of any socket. */
#define FIRST_SSL (1ULL << 62)
MAP(ARRAY, ssl_numbers, __u32, __u64, 1, 0);

static __always_inline struct ssl_thread *ssl_thread(void)
{
	struct thread me = current_thread();

	return thread_state(&me);
}

static __always_inline struct ssl_thread *ssl_thread_make(void)
{
	struct thread me = current_thread();
	struct ssl_thread *thread = thread_state(&me);

	return thread ?: thread_state_make(&me, (void *)element(no_ssl_thread, 0));
}

/* Gives the current thread what it needs. A function of its own, for its stack. */
SUBPROGRAM int ssl_thread_prepare(__u32 unused)
{
	return !ssl_thread_make();
}

static __always_inline struct draft *draft_of_thread(void)
{
	struct ssl_thread *thread = ssl_thread();

	if (!thread)
		return NULL;
	barrier_var(thread); /* clang would add to NULL, which the verifier does not like */
	return &thread->draft;
}

static __always_inline __u64 current_process(void)
{
	return process_of(current_tgid(), born_of(kernel_read(this_task(), group_leader)));
}

static __always_inline struct ssl_call *call_at(struct ssl_thread *thread, __u32 depth)
{
	/* clang would leave the mask out, which the verifier needs. */
	asm volatile("" : "+r"(depth));
	return &thread->calls[depth & (SSL_ROOM - 1)];
}

/* The call that a thread is inside of, or NULL. */
static __always_inline struct ssl_call *innermost(struct ssl_thread *thread)
{
	__u32 depth = thread->depth;

	return depth ? call_at(thread, depth - 1) : NULL;
}

/* Connections of SSL objects. */

/* Those of SESSIONS that read TLS: others may have attached these programs. */
SUBPROGRAM __u64 sessions_of_tls(__u64 sessions)
{
	__u64 found = 0;

	for_each_session (slot, sessions) {
		__u32 key = slot;
		struct http_session *session = bpf_map_lookup_elem(map_of(http_sessions), &key);

		if (session && session->reads_tls)
			found |= session_bit(slot);
	}
	return found;
}

static __always_inline struct connection *ssl_connection_make(const struct ssl_key *key,
							      struct ssl_object *object,
							      __u64 watching, __u32 generation,
							      __u32 direction)
{
	bool whole = object && sessions_of_then(object->watching & watching, object->generation);
	struct ssl_object made = {};
	struct connection *c = NULL;
	__u64 number, *last;
	__u32 zero = 0;

	last = bpf_map_lookup_elem(map_of(ssl_numbers), &zero);
	if (!last)
		return NULL;
	number = FIRST_SSL + __sync_fetch_and_add(last, 1);
	if (!object) {
		bpf_map_update_elem(map_of(ssl_objects), key, &made, BPF_NOEXIST);
		object = bpf_map_lookup_elem(map_of(ssl_objects), key);
	}
	if (object) {
		bpf_map_update_elem(map_of(connections), &number, (void *)element(no_connection, 0),
				    BPF_ANY);
		c = bpf_map_lookup_elem(map_of(connections), &number);
	}
	if (!object || !c) {
		for_each_session (slot, watching) {
			account_loss(slot, LOSS_MAP_FULL);
		}
		return NULL;
	}
	object->connection = number;
	c->sk = c->id = number;
	c->ssl = key->ssl;
	c->tgid = key->process;
	c->born = key->process >> 32;
	if (whole) {
		c->role = direction == RECEIVED ? HTTP_SERVER : HTTP_CLIENT;
	} else {
		not_read(c, UNREAD_JOINED);
	}
	return c;
}

/* The connection of an SSL object of the current process; NULL if no session watches that. */
static __always_inline struct connection *ssl_connection_used(const struct sessions *all,
							      const struct ssl_key *key,
							      struct ssl_object *object,
							      __u32 direction)
{
	struct connection *c =
	    object && object->connection ? connection_at(object->connection) : NULL;
	__u32 generation = generation_of(all);
	__u64 watching;

	if (c && c->generation == generation)
		return c->watching ? c : NULL;
	watching =
	    sessions_in_state(sessions_of_tls(sessions_of_hub(all)), key->process, MEMBER_ACTIVE);
	if (c) {
		/* Calls that no session wanted to see may have come in between. */
		if (!c->unread && !sessions_of_then(c->watching & watching, c->generation))
			lose_track(c, bpf_ktime_get_ns());
	} else if (watching) {
		c = ssl_connection_make(key, object, watching, generation, direction);
	}
	if (!c)
		return NULL;
	c->watching = watching;
	c->wants = wants_of(watching);
	c->generation = generation;
	return watching ? c : NULL;
}

/* Bytes of SSL object SSL of the current process may have passed unseen. */
SUBPROGRAM int ssl_lost(__u64 ssl)
{
	struct ssl_key key = {.process = current_process(), .ssl = ssl};
	struct ssl_object *object = bpf_map_lookup_elem(map_of(ssl_objects), &key);
	struct connection *c = object ? connection_at(object->connection) : NULL;

	if (c && !c->unread)
		lose_track(c, bpf_ktime_get_ns());
	return 0;
}

/* Nothing more passes, and no socket tells who has ended it. */
static __always_inline void ssl_over(struct connection *c)
{
	struct lane *answer = lane_of(c, !request_direction(c));
	bool by_peer = c->closed == RECEIVED + 1;
	bool by_server = by_peer == (c->role == HTTP_CLIENT);
	enum outcome outcome = by_server ? OUTCOME_ABORTED_BY_SERVER : OUTCOME_ABORTED_BY_CLIENT;

	if (c->unread || c->made == c->answered)
		return;
	if (c->on_trial) {
		exchange_ended(c, OUTCOME_NONE, 0);
		return;
	}
	if (answer->place == AT_BODY_TO_CLOSE && (by_server || c->role == HTTP_SERVER))
		exchange_ended(c, OUTCOME_COMPLETE, answer->last_ns);
	if (!c->closed && !c->tied)
		outcome = OUTCOME_UNKNOWN;
	exchange_ended(c, outcome, bpf_ktime_get_ns());
}

/* Sockets and what they carry. */

/* The connection whose HTTP passes through the socket of C. */
static __always_inline struct connection *read_of(struct connection *c)
{
	struct connection *carried = c->tied ? connection_at(c->tied) : NULL;

	if (!carried)
		return c;
	if (!carried->closed)
		carried->closed = c->closed;
	return carried;
}

#define TLS_PATIENCE 32 /* operations, more than a handshake needs */

/* The socket of C is gone, and so is what it carried. The object may be used for another one. */
static __always_inline void connection_left(struct connection *c)
{
	struct connection *carried = c->tied ? connection_at(c->tied) : NULL;
	struct ssl_object *object;
	struct ssl_key key = {};
	__u64 number;

	if (!c->tied && c->encrypted < TLS_PATIENCE &&
	    (c->unread == UNREAD_TLS || (c->unread == UNREAD_JOINED && c->encrypted)))
		count_unread(sessions_of_then(c->watching, c->generation), c->unread, 1, 0);
	if (!carried)
		return;
	number = carried->sk;
	key.process = process_of(carried->tgid, carried->born);
	key.ssl = carried->ssl;
	object = bpf_map_lookup_elem(map_of(ssl_objects), &key);
	if (object && object->connection == number) {
		object->watching = carried->watching;
		object->generation = carried->generation;
		object->connection = object->sk = 0;
	}
	bpf_map_delete_elem(map_of(connections), &number);
}

/* SK is the socket that carries C. */
static __always_inline void tie(struct connection *c, __u64 sk)
{
	struct connection *carrier = connection_at(sk), *before;

	if (!carrier || carrier->ssl || c->tied == sk)
		return;
	before = c->tied ? connection_at(c->tied) : NULL;
	if (before && before->tied == c->sk)
		before->tied = 0;
	before = carrier->tied ? connection_at(carrier->tied) : NULL;
	if (before && before->tied == sk)
		before->tied = 0;
	c->tied = sk;
	c->network = carrier->network;
	c->local_port = carrier->local_port;
	c->remote_port = carrier->remote_port;
	__builtin_memcpy(c->local, carrier->local, ADDRESS_BYTES);
	__builtin_memcpy(c->remote, carrier->remote, ADDRESS_BYTES);
	carrier->tied = c->sk;
	carrier->unread = UNREAD_TLS;
}

#define TLS_HEADER	5
#define TLS_ALERT	21
#define TLS_DATA	23
#define TLS_LEAST_TAIL	21	     /* a header, and a tag or as many encrypted bytes */
#define TLS_ALERT_BYTES (2 + 1 + 16) /* of TLS 1.3, encrypted */

static __always_inline bool is_record(const __u8 *header)
{
	return header[0] >= 20 && header[0] <= TLS_DATA && header[1] == 3 && header[2] <= 4;
}

static __always_inline bool is_alert(const __u8 *header)
{
	return header[0] == TLS_ALERT ||
	       (header[0] == TLS_DATA && !header[3] && header[4] == TLS_ALERT_BYTES);
}

static __always_inline void socket_heard(struct ssl_thread *thread, struct connection *c,
					 const struct operation *op, __u32 length)
{
	struct heard *heard = &thread->heard;

	heard->sk = 0;
	if (c->tied || length < TLS_LEAST_TAIL || op->length < length ||
	    user_read(&heard->tail, op->base + length - sizeof(heard->tail)))
		return;
	heard->base = op->base;
	heard->length = length;
	heard->tries = SSL_NESTED;
	heard->sk = c->sk;
}

/* A connection that carries TLS is told as not read once it is clear that no function of OpenSSL is
 * called for it: INSIDE of one, which may send a lot before it returns, only when the connection
 * ends. One that was joined may have been told before, when other bytes of it passed. */
static __always_inline void count_encrypted(struct connection *c, bool inside)
{
	if (c->tied || c->encrypted >= TLS_PATIENCE - inside ||
	    (c->unread == UNREAD_JOINED && c->unread_bytes && !c->encrypted))
		return;
	if (++c->encrypted == TLS_PATIENCE)
		count_unread(c->watching, c->unread, 1, 0);
}

/* LENGTH bytes that are no HTTP have passed through the socket of C. Whether they are of TLS as far
 * as one can tell. */
static __always_inline bool bytes_heard(struct connection *c, __u32 direction, __u32 length)
{
	struct ssl_thread *thread = ssl_thread();
	__u8 header[TLS_HEADER] = {};
	struct ssl_call *call;
	struct operation op;
	bool seen = false;

	if (c->unread == UNREAD_JOINED || direction == RECEIVED)
		seen = operation_find(&op, length) && op.length >= TLS_HEADER &&
		       !bpf_probe_read_user(header, sizeof(header), (void *)op.base);
	if (c->unread == UNREAD_JOINED && !(seen && is_record(header)))
		return thread && thread->depth; /* maybe plain text that the kernel encrypts */
	count_encrypted(c, thread && thread->depth);
	thread = ssl_thread_make();
	if (!thread)
		return true;
	call = innermost(thread);
	if (call) {
		call->sk = !call->sk || call->sk == c->sk ? c->sk : SEVERAL;
		if (direction == SENT && !call->sent_ns)
			call->sent_ns = bpf_ktime_get_ns();
		if (direction == RECEIVED && seen && is_record(header) && is_alert(header))
			call->closing = 1;
	} else if (direction == RECEIVED && seen) {
		socket_heard(thread, c, &op, length);
	}
	return true;
}

/* A function of its own, whose stack is not there while the parser works. */
SUBPROGRAM int hear(__u64 sk, __u32 direction, __u32 length)
{
	struct connection *c = connection_at(sk);

	return c && bytes_heard(c, direction, length);
}

static __always_inline bool encrypted_passed(struct connection *c, __u32 direction, __u32 length)
{
	return hear(c->sk, direction, length);
}

/*
 * Looks for the bytes that the thread has just received where an SSL object keeps its input. The
 * object points to its BIO, that to what it consists of, and so on: in a memory BIO of OpenSSL the
 * third structure begins with the length of the bytes and their address; in one of Node the third
 * one has the very address to which they were received. Encrypted bytes are never twice the same,
 * so that nothing else is found.
 */
struct ssl_search {
	__u64 ssl;
	__u64 base;
	__u64 tail[2];
	__u64 bio;
	__u64 part;
	__u32 found;
};

#define FOUND_BYTES   1
#define FOUND_ADDRESS 2
#define RBIO	      16 /* in an SSL object of OpenSSL 1.1 to 3.1 */
#define RBIO_SINCE_32 80
#define BIO_WORDS     16
#define PART_WORDS    8
#define MOST_INPUT    (1 << 24)

static __always_inline bool may_be_address(__u64 word)
{
	return word >= 4096 && word < 1ULL << 56;
}

static long ssl_search_step(__u32 turn, struct ssl_search *search)
{
	__u64 offset = turn < BIO_WORDS * PART_WORDS ? RBIO : RBIO_SINCE_32;
	__u64 words[PART_WORDS], tail[2], inner;
	__u32 at = turn % PART_WORDS;

	if (turn % (BIO_WORDS * PART_WORDS) == 0 && user_read(&search->bio, search->ssl + offset))
		search->bio = 0;
	if (!may_be_address(search->bio))
		return 0;
	if (!at && user_read(&search->part, search->bio + turn / PART_WORDS % BIO_WORDS * 8))
		search->part = 0;
	if (!may_be_address(search->part) || search->part % 8 ||
	    user_read(&inner, search->part + at * 8) || !may_be_address(inner) || inner % 8 ||
	    user_read(&words, inner))
		return 0;
	for (int i = 0; i < PART_WORDS; i++) {
		if (words[i] == search->base)
			search->found = FOUND_ADDRESS;
	}
	if (words[0] >= sizeof(tail) && words[0] <= MOST_INPUT && may_be_address(words[1]) &&
	    !user_read(&tail, words[1] + words[0] - sizeof(tail)) && tail[0] == search->tail[0] &&
	    tail[1] == search->tail[1])
		search->found = FOUND_BYTES;
	return search->found != 0;
}

#define MOST_SEARCHES 64

/* Finds the socket of a call that reads from SSL, in what the thread has heard. */
static __always_inline void ssl_search(struct ssl_thread *thread, struct ssl_call *call,
				       struct ssl_object *object)
{
	struct heard *heard = &thread->heard;
	struct ssl_search search = {
	    .ssl = call->ssl,
	    .base = heard->base,
	    .tail = {heard->tail[0], heard->tail[1]},
	};
	struct connection *c;

	if (!heard->sk)
		return;
	c = object && object->connection ? connection_at(object->connection) : NULL;
	if ((c && c->tied) || !heard->tries || (object && object->searched >= MOST_SEARCHES))
		return;
	heard->tries--;
	if (object)
		object->searched++;
	bpf_loop(2 * BIO_WORDS * PART_WORDS, ssl_search_step, &search, 0);
	if (!search.found)
		return;
	call->sk = heard->sk;
	call->by_address = search.found == FOUND_ADDRESS;
	if (!call->by_address)
		heard->sk = 0;
}

/* Calls. */

/* Remembers a call of the current thread for its return. */
static __always_inline int ssl_entered(struct user_registers *ctx, __u32 place)
{
	struct sessions *all = all_sessions();
	__u32 depth, tgid = current_tgid(), direction = place & SSL_DIRECTION;
	struct ssl_thread *thread;
	__u64 sp = user_sp(ctx), ssl = user_argument(ctx, 1);
	struct ssl_call *call;

	if (!all || surely_unwatched_here(all, tgid))
		return 0;
	thread = ssl_thread();
	if (!thread) {
		if (!sessions_in_state(sessions_of_hub(all), tgid, MEMBER_ACTIVE))
			return 0;
		thread = ssl_thread_make();
		if (!thread) {
			ssl_lost(ssl);
			return 0;
		}
	}
	depth = thread->depth;
	for (int i = 0; i < SSL_NESTED; i++) {
		/* A call that was left by a jump does not return. */
		if (depth && call_at(thread, depth - 1)->sp <= sp) {
			depth--;
			ssl_lost(call_at(thread, depth)->ssl);
		}
	}
	thread->depth = depth;
	for (int i = 0; i < SSL_NESTED; i++) {
		if (i < depth && thread->calls[i].ssl == ssl)
			return 0; /* the outer call counts */
	}
	if (depth >= SSL_NESTED) {
		ssl_lost(ssl);
		return 0;
	}
	call = call_at(thread, depth);
	call->ssl = ssl;
	call->sp = sp;
	call->buffer = place & SSL_UNSEEN ? 0 : user_argument(ctx, 2);
	call->length_at = place & SSL_EXTENDED ? user_argument(ctx, 4) : 0;
	call->direction = direction;
	call->sk = call->sent_ns = 0;
	call->closing = call->by_address = 0;
	thread->depth = depth + 1;
	if (direction == RECEIVED && thread->heard.sk) {
		struct ssl_key key = {.process = current_process(), .ssl = call->ssl};

		ssl_search(thread, call, bpf_map_lookup_elem(map_of(ssl_objects), &key));
	}
	return 0;
}

/* A function that passes bytes, or shakes hands, begins. */
SEC("uprobe")
int PROGRAM(coral_ssl_enter, struct user_registers *ctx)
{
	return ssl_entered(ctx, bpf_get_attach_cookie(ctx));
}

#if defined(__TARGET_ARCH_x86)
#define RETURN_ADDRESS_BYTES 8 /* which the return has taken off the stack */
#else
#define RETURN_ADDRESS_BYTES 0
#endif

#define LEAST_ADDED  16 /* to the bytes of a record when it is encrypted: a tag */
#define MOST_ADDED   80 /* or an initial vector, a digest and padding */
#define MOST_RECORDS 16

/* Whether one of the records that the thread has heard can have been LENGTH bytes. */
static __always_inline bool heard_record_of(const struct heard *heard, __u64 length)
{
	__u8 header[TLS_HEADER];
	__u32 at = 0, bytes;

	for (int i = 0; i < MOST_RECORDS; i++) {
		if (at + TLS_HEADER > heard->length ||
		    bpf_probe_read_user(header, sizeof(header), (void *)heard->base + at) ||
		    !is_record(header))
			return false;
		bytes = header[3] << 8 | header[4];
		if (header[0] == TLS_DATA && bytes >= length + LEAST_ADDED &&
		    bytes <= length + MOST_ADDED)
			return true;
		at += TLS_HEADER + bytes;
	}
	return false;
}

/* A thread has its own: the kernel may preempt it at a uprobe. */
static __always_inline struct window *ssl_window(void)
{
	struct ssl_thread *thread = ssl_thread();

	return thread ? &thread->window : NULL;
}

/* How many decrypted bytes a call has passed; negative if that cannot be read. */
static __always_inline __s64 ssl_result(struct user_registers *ctx, const struct ssl_call *call)
{
	int result = user_return_value(ctx);
	__u64 length = 0;

	if (result <= 0)
		return 0;
	if (!call->length_at)
		return result;
	return user_read(&length, call->length_at) || (__s64)length < 0 ? -1 : length;
}

/* Threads use an SSL object one after the other, so that a response without a request is the answer
 * to none. */
SUBPROGRAM int ssl_forget_early(struct connection *c)
{
	struct lane *answer;

	if (!c)
		return 0;
	answer = lane_of(c, !request_direction(c));
	if (answer->flags & IS_EARLY)
		answer->flags = answer->status = 0;
	return 0;
}

/* Asks whether a request may lie in LENGTH bytes at BASE, before they are read. A function of its
 * own, for its stack. */
SUBPROGRAM int ssl_look_ahead(struct connection *c, __u32 direction, __u64 base, __u64 length)
{
	struct operation op = {.base = base, .length = length};

	if (!c)
		return 0;
	reconsider(c, &op, direction & 1);
	skip_refused_body(c, &op, direction & 1, length);
	return 0;
}

/* Decrypted bytes of connection NUMBER have passed at that time, and lie at BASE. A function of its
 * own, so that the verifier goes through the parser once. */
SUBPROGRAM int ssl_passed(__u64 number, __u32 direction, __u64 base, __u64 length, __u64 now_ns)
{
	struct feed feed = {.c = connection_at(number), .left = length};
	struct ssl_thread *thread = ssl_thread();
	struct connection *c = feed.c;

	if (!thread || !c)
		return 0;
	feed.op = &thread->op;
	feed.window = &thread->window;
	thread->op.base = base;
	thread->op.length = length;
	thread->op.iov = thread->op.iov_count = 0;
	ssl_look_ahead(c, direction, base, length);
	if (c->unread && !(c->unread == UNREAD_JOINED && c->unread_last != direction + 1 &&
			   try_request(c, feed.op, direction & 1))) {
		leave_unread(c, direction, length);
		return 0;
	}
	thread->window.now_ns = now_ns;
	thread->window.direction = direction & 1;
	lane_of(c, direction)->last_ns = now_ns;
	bpf_loop(MOST_WINDOWS, feed_window, &feed, 0);
	ssl_forget_early(c);
	return 0;
}

/* The bytes of a call that returns. Of many that were written, the first may have passed long ago.
 */
static __always_inline void ssl_call_passed(struct connection *c, const struct ssl_call *call,
					    __u64 length)
{
	__u64 head = 0;

	if (call->sent_ns && call->direction == SENT && !c->unread) {
		head = length < WINDOW ? length : WINDOW;
		ssl_passed(c->sk, SENT, call->buffer, head, call->sent_ns);
	}
	if (head < length)
		ssl_passed(c->sk, call->direction, call->buffer + head, length - head,
			   bpf_ktime_get_ns());
}

/* Ties C to the socket that the call has used, or that carried the handshake of OBJECT. */
static __always_inline void ssl_tie(struct ssl_thread *thread, struct connection *c,
				    const struct ssl_call *call, const struct ssl_object *object,
				    __u64 length)
{
	if (call->sk > SEVERAL && (!call->by_address || heard_record_of(&thread->heard, length)))
		tie(c, call->sk);
	else if (!c->tied && object && object->sk)
		tie(c, object->sk);
}

static __always_inline void ssl_returned(struct ssl_thread *thread, struct ssl_call *call,
					 __s64 length)
{
	struct ssl_key key = {.process = current_process(), .ssl = call->ssl};
	struct ssl_object *object = bpf_map_lookup_elem(map_of(ssl_objects), &key);
	struct sessions *all = all_sessions();
	struct connection *c;
	__u8 unread;

	if (call->direction == HANDSHAKE) {
		if (length > 0 && object && call->sk > SEVERAL)
			object->sk = call->sk;
	} else if (length > 0) {
		c = all ? ssl_connection_used(all, &key, object, call->direction) : NULL;
		if (!c)
			return;
		ssl_tie(thread, c, call, object, length);
		unread = c->unread;
		ssl_call_passed(c, call, length);
		if (c->unread && c->unread != unread)
			leave_unread(c, call->direction, length);
	} else if (call->direction == RECEIVED && call->closing) {
		c = object ? connection_at(object->connection) : NULL;
		if (c)
			end_read(c);
	}
}

SEC("uprobe")
int PROGRAM(coral_ssl_return, struct user_registers *ctx)
{
	struct ssl_thread *thread = ssl_thread();
	__u64 sp = user_sp(ctx) - RETURN_ADDRESS_BYTES;
	struct ssl_call *call;
	__s64 length;

	if (!thread)
		return 0;
	for (int i = 0; i < SSL_NESTED; i++) {
		call = innermost(thread);
		if (call && call->sp < sp) { /* it was left by a jump */
			thread->depth--;
			ssl_lost(call->ssl);
		}
	}
	call = innermost(thread);
	if (!call || call->sp != sp)
		return 0;
	length = ssl_result(ctx, call);
	if (length < 0)
		ssl_lost(call->ssl);
	else
		ssl_returned(thread, call, length);
	thread->depth--;
	return 0;
}

/* Objects. */

/* SSL_new returns. */
SEC("uprobe")
int PROGRAM(coral_ssl_new, struct user_registers *ctx)
{
	struct ssl_key key = {.ssl = user_return_value(ctx)};
	struct sessions *all = all_sessions();
	struct ssl_object object = {};
	int error;

	if (!all || !key.ssl || surely_unwatched_here(all, current_tgid()))
		return 0;
	object.generation = generation_of(all);
	object.watching =
	    sessions_in_state(sessions_of_tls(sessions_of_hub(all)), current_tgid(), MEMBER_ACTIVE);
	if (!object.watching)
		return 0;
	key.process = current_process();
	error = bpf_map_update_elem(map_of(ssl_objects), &key, &object, BPF_ANY);
	if (error) {
		for_each_session (slot, object.watching) {
			account_loss(slot, LOSS_MAP_FULL);
		}
	}
	return 0;
}

/* The connection of the SSL object that is a function's first argument, or NULL. */
static __always_inline struct connection *ssl_connection_of(struct user_registers *ctx,
							    struct ssl_key *key)
{
	struct ssl_object *object;

	key->process = current_process();
	key->ssl = user_argument(ctx, 1);
	object = bpf_map_lookup_elem(map_of(ssl_objects), key);
	return object ? connection_at(object->connection) : NULL;
}

/* SSL_free is called. Where there is a socket, its end tells more. */
static __always_inline void ssl_freed(const struct ssl_key *key, struct connection *c)
{
	__u64 number;

	bpf_map_delete_elem(map_of(ssl_objects), key);
	if (!c || (c->tied && connection_at(c->tied)))
		return;
	ssl_over(c);
	number = c->sk;
	bpf_map_delete_elem(map_of(connections), &number);
}

/* SSL_shutdown is called: this side sends nothing more. */
static __always_inline void ssl_shut_down(struct connection *c)
{
	struct connection *carrier = c->tied ? connection_at(c->tied) : NULL;

	if (!c->closed)
		c->closed = carrier && carrier->closed ? carrier->closed : SENT + 1;
	if (c->role == HTTP_SERVER)
		ssl_over(c);
}

SEC("uprobe")
int PROGRAM(coral_ssl_end, struct user_registers *ctx)
{
	struct sessions *all = all_sessions();
	struct connection *c;
	struct ssl_key key;

	if (!all || surely_unwatched_here(all, current_tgid()))
		return 0;
	c = ssl_connection_of(ctx, &key);
	if (bpf_get_attach_cookie(ctx) == SSL_PLACE_FREE)
		ssl_freed(&key, c);
	else if (c)
		ssl_shut_down(c);
	return 0;
}
