/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: the state of a connection, from which HTTP is read: two lanes, one for each direction,
 * and the requests that wait for their responses.
 */
#pragma once

#define PATH_BYTES 256
#define HOST_BYTES 64
#define PIPELINE   256 /* requests that wait for their responses on one connection */
#define AT_HAND	   2   /* the newest of them; whoever includes this keeps the others */
#define WINDOW	   512 /* bytes that are copied from user memory at once */
#define WORD_BYTES 8

enum method {
	METHOD_NONE,
	METHOD_GET,
	METHOD_HEAD,
	METHOD_POST,
	METHOD_PUT,
	METHOD_DELETE,
	METHOD_CONNECT,
	METHOD_OPTIONS,
	METHOD_TRACE,
	METHOD_PATCH,
	METHOD_OTHER,
};

/* As enum HttpOutcome of the contract. */
enum outcome {
	OUTCOME_NONE, /* it was no exchange */
	OUTCOME_COMPLETE,
	OUTCOME_ABORTED_BY_CLIENT,
	OUTCOME_ABORTED_BY_SERVER,
	OUTCOME_UPGRADED, /* to another protocol, or a tunnel: what follows is not HTTP/1 */
	OUTCOME_UNKNOWN,
};

enum http_role { HTTP_ROLE_NONE, HTTP_CLIENT, HTTP_SERVER };

enum direction { RECEIVED, SENT };

/* Why a connection is not read. */
enum unread {
	UNREAD_NONE,
	UNREAD_JOINED, /* in the middle; the next clean request is tried */
	UNREAD_TLS,
	UNREAD_HTTP2,
	UNREAD_OTHER, /* another protocol */
	UNREAD_UPGRADED,
	UNREAD_BEHIND,	 /* more requests waited than are kept: which response is whose is not known
			  */
	UNREAD_PEER,	 /* no connection: an exchange over TLS, of which the peer is not known */
	UNREAD_IO_URING, /* no connection: operations of io_uring, whose bytes cannot be seen */
};

enum trial {
	TRIAL_NONE,
	TRIAL_JOINED,  /* joined in the middle */
	TRIAL_NO_BODY, /* in the place of a body that was refused */
};

/* Where in a message the next byte lies. */
enum place {
	AT_START,
	AT_METHOD,
	AT_TARGET,
	AT_AUTHORITY, /* of a target in absolute form, or of CONNECT */
	AT_QUERY,
	AT_VERSION,
	AT_LINE_END,
	AT_PROTOCOL,
	AT_STATUS,
	AT_NAME,
	AT_VALUE, /* of a header that does not matter, or the reason of a status */
	AT_LENGTH,
	AT_CODING,
	AT_HOST,
	AT_TRACE,
	AT_FOLD, /* after a header that matters, which may go on in the next line */
	AT_HEAD_END,
	AT_BODY,
	AT_BODY_TO_CLOSE, /* its end cannot be told */
	AT_CHUNK_SIZE,
	AT_CHUNK_EXTENSION,
	AT_CHUNK,
	AT_CHUNK_END,
	AT_TRAILER,
	AT_TRAILER_REST,
	AT_TRAILER_END,
	AT_NOTHING,  /* not read; see enum unread */
	AT_SETTINGS, /* of HTTP/2, perhaps */
};

/* Of a message. */
#define HAS_LENGTH  1
#define HAS_CODING  2
#define IS_CHUNKED  4
#define IS_UNCLEAR  8  /* recipients disagree where such a message ends */
#define IS_ANSWERED 16 /* a request, before its head was whole */
#define IS_EARLY    32 /* a response that is over, and whose request has not been seen yet */
#define EXPECTS	    64 /* a request whose body may not follow, if it is refused */

/* One direction of a connection: the message that passes. */
struct lane {
	__u64 left; /* bytes of the body, or of the chunk */
	__u64 word; /* the token so far */
	__u64 body_bytes;
	__u64 begun_ns; /* its first byte */
	__u64 last_ns;	/* the last byte so far */
	__u32 offset;	/* TCP sequence number of the next byte */
	__u16 status;
	__u8 place;
	__u8 column; /* in the token */
	__u8 name;   /* which header it may be */
	__u8 flags;
	__u8 version; /* minor */
	__u8 wants;   /* of a request: what is copied besides its path, see details.bpf.h */
	__u32 asked;  /* of a response: the `offset` of requests, when its first bytes passed */
};

/* Of a request. */
#define PATH_CUT     1 /* longer than PATH_BYTES */
#define PATH_QUERIED 2 /* it had a query */
#define QUERY_CUT    4 /* it is not whole: it had no room behind the path, or has not passed */
#define HOST_CUT     8 /* likewise: longer than HOST_BYTES, or has not passed */
#define TRACE_SEEN   16
#define HAS_TRACE    32 /* a valid one */

struct request {
	__u64 begun_ns;
	__u64 ended_ns; /* its last byte; 0 if it has not passed yet */
	__u64 body_bytes;
	__u64 path_hash; /* FNV-1a */
	__u32 number;	 /* on its connection */
	__u16 path_bytes;
	__u8 method;
	__u8 version;
	__u8 flags;
	__u8 wants; /* as of the lane when it began */
	__u16 query_bytes;
	__u8 host_bytes;
	__u8 reserved[3];
	__u64 path[PATH_BYTES / 8]; /* characters; in words, which are quicker to copy */
	/* Where they are wanted, `query_bytes` more follow the path in its place; and: */
	__u64 host[HOST_BYTES / 8];
	__u64 trace[2];
	__u64 parent;
};

#define ADDRESS_BYTES 16

struct connection {
	__u64 sk;
	__u64 id;	  /* the socket's cookie, or a number of ours */
	__u64 watching;	  /* the sessions that watch the process ... */
	__u32 tgid;	  /* ... that used it last, */
	__u32 generation; /* as of which they do */
	__u32 born;
	__u32 made; /* requests whose head has passed */
	__u32 answered;
	__u32 network;
	__u16 local_port;
	__u16 remote_port;
	__u8 role;
	__u8 unread;
	__u8 on_trial; /* enum trial: a request is one if a response to it follows */
	__u8 closed;   /* which side ended first: enum direction + 1 */
	__u8 local[ADDRESS_BYTES];
	__u8 remote[ADDRESS_BYTES];
	__u64 unread_bytes;
	__u64 unread_last; /* enum direction + 1 of the last bytes that were not read */
	__u64 ssl;  /* the object of OpenSSL whose decrypted bytes are read; 0 for a socket */
	__u64 tied; /* `sk` of the socket that carries these; of a socket: of what it carries */
	__u32 encrypted; /* operations of TLS that has not been read so far */
	__u16 wants;	 /* what the sessions `watching` want of its requests */
	__u8 reset;	 /* it ended at once, with or without the last bytes */
	__u8 reserved;
	struct lane lanes[2];	/* by direction */
	__u8 methods[PIPELINE]; /* of the requests that wait, by number */
	struct request requests[AT_HAND];
};

static __always_inline void exchange_ended(struct connection *c, enum outcome outcome,
					   __u64 now_ns);
static __always_inline void request_spill(struct connection *c, __u32 number);

/* Bytes of a connection that pass in one direction. Where the next one lies is kept here: the
 * verifier would go through each turn of the loop for a number that it knows. */
struct window {
	__u8 bytes[WINDOW + WORD_BYTES];
	__u32 at;
	__u32 end; /* at most WINDOW */
	__u32 direction;
	__u32 reserved;
	__u64 now_ns;
};

struct cursor {
	struct connection *c;
	struct window *window;
	__u64 wants; /* of the window, see details_wanted */
};

#define FNV_OFFSET 0xCBF29CE484222325ULL
#define FNV_PRIME  0x100000001B3ULL

static __always_inline struct lane *lane_of(struct connection *c, __u32 direction)
{
	return &c->lanes[direction & 1];
}

static __always_inline __u32 request_direction(const struct connection *c)
{
	return c->role == HTTP_SERVER ? RECEIVED : SENT;
}

static __always_inline struct request *request_at(struct connection *c, __u32 number)
{
	return &c->requests[number % AT_HAND];
}

static __always_inline __u8 *method_at(struct connection *c, __u32 number)
{
	return &c->methods[number % PIPELINE];
}

static __always_inline void not_read(struct connection *c, __u8 why)
{
	c->unread = why;
	c->on_trial = 0;
	c->lanes[RECEIVED].place = c->lanes[SENT].place = AT_NOTHING;
	c->lanes[RECEIVED].flags = c->lanes[SENT].flags = 0;
	c->lanes[RECEIVED].status = c->lanes[SENT].status = 0;
}

/* What follows cannot be understood: what waits for a response gets none that is known. */
static __always_inline void lose_track(struct connection *c, __u64 now_ns)
{
	exchange_ended(c, c->on_trial ? OUTCOME_NONE : OUTCOME_UNKNOWN, now_ns);
	c->role = HTTP_ROLE_NONE;
	not_read(c, UNREAD_JOINED);
}

/* The first bytes of a connection are no HTTP/1. */
static __always_inline void give_up(struct connection *c, __u8 why, __u64 now_ns)
{
	if (!c->made && !c->on_trial)
		not_read(c, why);
	else
		lose_track(c, now_ns);
}
