/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: HTTP/1.0 and 1.1, read byte by byte (RFC 9112). The state of a connection holds
 * everything that was read, so that the answer is the same however the bytes are cut. It copies
 * nothing but the path, and looks at no header but Content-Length and Transfer-Encoding.
 *
 * The parser knows of no socket, no map and no clock, and is compiled in user space too, for tests.
 * Whoever includes it says what to do when the oldest exchange is over (with OUTCOME_COMPLETE or
 * OUTCOME_UPGRADED), or all that wait are (with another outcome), and keeps requests for which the
 * connection has no room:
 *
 *	static void exchange_ended(struct connection *c, enum outcome outcome, __u64 now_ns)
 *	static void request_spill(struct connection *c, __u32 number)
 */
#pragma once

#define PATH_BYTES 256
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
	UNREAD_BEHIND, /* more requests waited than are kept: which response is whose is not known
			*/
	UNREAD_PEER,   /* no connection: an exchange over TLS, of which the peer is not known */
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
	AT_REASON,
	AT_NAME,
	AT_VALUE, /* of a header that does not matter */
	AT_LENGTH,
	AT_CODING,
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
	AT_NOTHING, /* not read; see enum unread */
};

/* Of a message. */
#define HAS_LENGTH  1
#define HAS_CODING  2
#define IS_CHUNKED  4
#define IS_UNCLEAR  8  /* recipients disagree where such a message ends */
#define IS_ANSWERED 16 /* a request, before its head was whole */
#define IS_EARLY    32 /* a response that is over, and whose request has not been seen yet */

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
	__u8 reserved[5];
};

/* Of a request. */
#define PATH_CUT     1 /* longer than PATH_BYTES */
#define PATH_QUERIED 2 /* it had a query, which was not copied */

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
	__u8 reserved[7];
	__u64 path[PATH_BYTES / 8]; /* characters; in words, which are quicker to copy */
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
	__u8 on_trial; /* joined in the middle: a request is one if a response to it follows */
	__u8 closed;   /* which side ended first: enum direction + 1 */
	__u8 local[ADDRESS_BYTES];
	__u8 remote[ADDRESS_BYTES];
	__u64 unread_bytes;
	__u64 unread_last; /* enum direction + 1 of the last bytes that were not read */
	__u64 ssl;  /* the object of OpenSSL whose decrypted bytes are read; 0 for a socket */
	__u64 tied; /* `sk` of the socket that carries these; of a socket: of what it carries */
	__u32 encrypted; /* operations of TLS that has not been read so far */
	__u8 reset;	 /* it ended at once, with or without the last bytes */
	__u8 reserved[3];
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

/* The characters of a token (RFC 9110, 5.6.2), a bit each: below '@', and from there. */
#define TOKEN_BELOW 0x03FF6CFA00000000ULL
#define TOKEN_ABOVE 0x57FFFFFFC7FFFFFEULL

static __always_inline bool is_token(__u8 b)
{
	return b < 128 && ((b < 64 ? TOKEN_BELOW : TOKEN_ABOVE) >> (b & 63)) & 1;
}

#define CHARS_3(a, b, c)		 ((__u64)(a) << 16 | (b) << 8 | (c))
#define CHARS_4(a, b, c, d)		 (CHARS_3(a, b, c) << 8 | (d))
#define CHARS_7(a, b, c, d, e, f, g)	 (CHARS_4(a, b, c, d) << 24 | CHARS_3(e, f, g))
#define CHARS_8(a, b, c, d, e, f, g, h)	 (CHARS_4(a, b, c, d) << 32 | CHARS_4(e, f, g, h))
#define HTTP_1_0			 CHARS_8('H', 'T', 'T', 'P', '/', '1', '.', '0')
#define HTTP_2_0			 CHARS_8('H', 'T', 'T', 'P', '/', '2', '.', '0')
#define LITTLE_8(a, b, c, d, e, f, g, h) CHARS_8(h, g, f, e, d, c, b, a)

static __always_inline __u8 method_named(__u64 word, __u8 length)
{
	if (length > WORD_BYTES)
		return METHOD_OTHER;
	switch (word) {
	case CHARS_3('G', 'E', 'T'):
		return METHOD_GET;
	case CHARS_4('H', 'E', 'A', 'D'):
		return METHOD_HEAD;
	case CHARS_4('P', 'O', 'S', 'T'):
		return METHOD_POST;
	case CHARS_3('P', 'U', 'T'):
		return METHOD_PUT;
	case CHARS_3('D', 'E', 'L') << 24 | CHARS_3('E', 'T', 'E'):
		return METHOD_DELETE;
	case CHARS_7('C', 'O', 'N', 'N', 'E', 'C', 'T'):
		return METHOD_CONNECT;
	case CHARS_7('O', 'P', 'T', 'I', 'O', 'N', 'S'):
		return METHOD_OPTIONS;
	case CHARS_4('T', 'R', 'A', 'C') << 8 | 'E':
		return METHOD_TRACE;
	case CHARS_4('P', 'A', 'T', 'C') << 8 | 'H':
		return METHOD_PATCH;
	}
	return METHOD_OTHER;
}

static __always_inline void token_begin(struct lane *lane, __u8 place)
{
	lane->place = place;
	lane->column = 0;
	lane->word = 0;
}

static __always_inline void message_begin(struct lane *lane, __u64 now_ns)
{
	lane->begun_ns = now_ns;
	lane->body_bytes = lane->left = 0;
	lane->flags = 0;
	lane->status = 0;
}

static __always_inline void request_begin(struct connection *c, struct lane *lane, __u64 now_ns)
{
	struct request *request = request_at(c, c->made);

	message_begin(lane, now_ns);
	if (c->made - c->answered >= AT_HAND) /* one lies where this one will */
		request_spill(c, c->made - AT_HAND);
	request->number = c->made;
	request->begun_ns = now_ns;
	request->ended_ns = request->body_bytes = 0;
	request->path_hash = FNV_OFFSET;
	request->path_bytes = 0;
	request->flags = 0;
	token_begin(lane, AT_METHOD);
}

static __always_inline void path_add(struct connection *c, __u8 b)
{
	struct request *request = request_at(c, c->made);
	__u16 at = request->path_bytes;

	request->path_hash = (request->path_hash ^ b) * FNV_PRIME;
	if (at >= PATH_BYTES) {
		request->flags |= PATH_CUT;
		return;
	}
	((__u8 *)request->path)[at % PATH_BYTES] = b;
	request->path_bytes = at + 1;
}

/* The last byte of a request. */
static __always_inline void request_end(struct connection *c, struct lane *lane, __u64 now_ns)
{
	struct lane *answer = lane_of(c, !request_direction(c));
	struct request *request = request_at(c, c->made - 1);

	request->body_bytes = lane->body_bytes;
	request->ended_ns = now_ns;
	token_begin(lane, AT_START);
	if (!(answer->flags & IS_EARLY) || c->made == c->answered)
		return;
	answer->flags = 0;
	if (answer->begun_ns < request->begun_ns)
		answer->begun_ns = request->begun_ns;
	exchange_ended(c, OUTCOME_COMPLETE, now_ns);
}

static __always_inline void body_begin(struct lane *lane)
{
	token_begin(lane, lane->flags & IS_CHUNKED ? AT_CHUNK_SIZE : AT_BODY);
}

static __always_inline bool has_body(const struct lane *lane)
{
	return lane->flags & IS_CHUNKED || (lane->flags & HAS_LENGTH && lane->left);
}

static __always_inline void request_head_ended(struct connection *c, struct lane *lane,
					       __u64 now_ns)
{
	bool answered = lane->flags & IS_ANSWERED;

	if (!answered)
		c->made++;
	if (lane->flags & IS_UNCLEAR || (lane->flags & HAS_CODING && !(lane->flags & IS_CHUNKED))) {
		token_begin(lane, AT_BODY_TO_CLOSE); /* its response can still be told */
		if (answered)
			lose_track(c, now_ns);
	} else if (has_body(lane)) {
		body_begin(lane);
	} else {
		request_end(c, lane, now_ns);
	}
}

/* Whether nobody can tell where the next request begins. */
static __always_inline bool ends_unknown(const struct lane *lane)
{
	return lane->place == AT_BODY_TO_CLOSE || lane->place == AT_NOTHING;
}

/* A response may be over before its request has been seen: where one thread sends and another one
 * receives, their hooks run in any order. The next request is the one that it answers. */
static __always_inline void response_end(struct connection *c, struct lane *lane,
					 enum outcome outcome, __u64 now_ns)
{
	lane->last_ns = now_ns;
	token_begin(lane, AT_START);
	if (c->made == c->answered) {
		lane->flags = IS_EARLY;
		if (*(volatile __u32 *)&c->made == c->answered)
			return;
		lane->flags = 0; /* its request came meanwhile */
	}
	exchange_ended(c, outcome, now_ns);
	if (c->made == c->answered && ends_unknown(lane_of(c, request_direction(c))))
		lose_track(c, now_ns); /* what that request was followed by */
}

/* A server may answer when it has seen enough of a request's head. */
static __always_inline void answer_in_head(struct connection *c, __u8 version)
{
	struct lane *ask = lane_of(c, request_direction(c));
	struct request *request = request_at(c, c->made);

	if (ask->place < AT_TARGET || ask->place > AT_HEAD_END || ask->flags & IS_ANSWERED)
		return;
	if (ask->place <= AT_AUTHORITY)
		request->flags |= PATH_CUT;
	if (ask->place <= AT_VERSION)
		request->version = version;
	ask->flags |= IS_ANSWERED;
	c->made++;
}

static __always_inline bool ends_with_head(const struct lane *lane)
{
	return lane->status == 204 || lane->status == 304 ||
	       ((lane->flags & (HAS_LENGTH | HAS_CODING | IS_UNCLEAR)) == HAS_LENGTH &&
		!lane->left);
}

static __always_inline void response_head_ended(struct connection *c, struct lane *lane,
						__u64 now_ns)
{
	__u16 status = lane->status;
	__u8 method = METHOD_NONE;

	if (status / 100 != 1 && c->made == c->answered)
		answer_in_head(c, lane->version);
	if (c->made != c->answered) {
		method = *method_at(c, c->answered);
		c->on_trial = 0;
	}
	if (status == 101 || (method == METHOD_CONNECT && status / 100 == 2)) { /* a tunnel */
		response_end(c, lane, OUTCOME_UPGRADED, now_ns);
		exchange_ended(c, OUTCOME_UNKNOWN, now_ns);
		not_read(c, UNREAD_UPGRADED);
	} else if (status / 100 == 1) { /* the final one follows */
		token_begin(lane, AT_START);
	} else if (method == METHOD_HEAD || ends_with_head(lane)) {
		response_end(c, lane, OUTCOME_COMPLETE, now_ns);
	} else if (lane->flags & IS_UNCLEAR) {
		lose_track(c, now_ns);
	} else if (lane->flags & IS_CHUNKED ||
		   (lane->flags & (HAS_LENGTH | HAS_CODING)) == HAS_LENGTH) {
		body_begin(lane);
	} else {
		token_begin(lane, AT_BODY_TO_CLOSE);
	}
}

static __always_inline bool is_request_lane(const struct connection *c, __u32 direction)
{
	return request_direction(c) == direction;
}

static __always_inline void head_ended(struct connection *c, struct lane *lane, __u32 direction,
				       __u64 now_ns)
{
	if (is_request_lane(c, direction))
		request_head_ended(c, lane, now_ns);
	else
		response_head_ended(c, lane, now_ns);
}

static __always_inline void message_ended(struct connection *c, struct lane *lane, __u32 direction,
					  __u64 now_ns)
{
	if (is_request_lane(c, direction))
		request_end(c, lane, now_ns);
	else
		response_end(c, lane, OUTCOME_COMPLETE, now_ns);
}

/* LENGTH bytes of a body, or of a chunk, that there is not more of. */
static __always_inline void body_passed(struct connection *c, struct lane *lane, __u32 direction,
					__u64 length, __u64 now_ns)
{
	lane->body_bytes += length;
	if (lane->place == AT_BODY_TO_CLOSE)
		return;
	lane->left -= length;
	if (lane->left)
		return;
	if (lane->place == AT_CHUNK)
		token_begin(lane, AT_CHUNK_END);
	else
		message_ended(c, lane, direction, now_ns);
}

/* How many of the next bytes belong to a body, whatever they are. */
static __always_inline __u64 body_ahead(const struct lane *lane)
{
	if (lane->place == AT_BODY || lane->place == AT_CHUNK)
		return lane->left;
	return lane->place == AT_BODY_TO_CLOSE || lane->place == AT_NOTHING ? ~0ULL : 0;
}

#define ONES  0x0101010101010101ULL
#define HIGHS 0x8080808080808080ULL

/* How many of the eight bytes of WORD, in the order of memory, lie up to the first line feed,
 * itself included; 0 if there is none. */
static __always_inline __u32 up_to_line_feed(__u64 word)
{
	__u64 differ = word ^ (ONES * '\n'), found = (differ - ONES) & ~differ & HIGHS;

	if (!found)
		return 0;
	return ((((found & -found) - 1) & ONES) * ONES) >> 56;
}

static __always_inline __u64 word_at(const struct window *window, __u32 at)
{
	return *(const __u64 *)&window->bytes[at & (WINDOW - 1)];
}

#define SKIPS 6 /* words in one step */

/* Skips the rest of a line; true once its end has passed. */
static __always_inline bool line_skipped(struct cursor *cursor)
{
	__u32 at = cursor->window->at, end = cursor->window->end, found;

	for (int i = 0; i < SKIPS; i++) {
		if (at + WORD_BYTES > end)
			break;
		found = up_to_line_feed(word_at(cursor->window, at));
		if (found) {
			cursor->window->at = at + found;
			return true;
		}
		at += WORD_BYTES;
	}
	if (at < end && at + WORD_BYTES > end) {
		cursor->window->at = at + 1;
		return cursor->window->bytes[at & (WINDOW - 1)] == '\n';
	}
	cursor->window->at = at;
	return false;
}

#define NAME_LENGTH 0 /* content-length */
#define NAME_CODING 1 /* transfer-encoding */
#define NAME_ROOM   32

static const __u8 header_names[2][NAME_ROOM] = {"content-length", "transfer-encoding"};

#define LOWER_CONTENT  LITTLE_8('c', 'o', 'n', 't', 'e', 'n', 't', '-')
#define LOWER_TRANSFER LITTLE_8('t', 'r', 'a', 'n', 's', 'f', 'e', 'r')
#define LOWER_LENGTH   LITTLE_8('l', 'e', 'n', 'g', 't', 'h', ':', 0)
#define FIRST_7	       (~0ULL >> 8)
#define CASE_BIT       0x20
#define CASE_BITS      (ONES * CASE_BIT)

/* Most names are none that matter. */
static __always_inline __u32 name_started(struct lane *lane, __u64 word)
{
	if (lane->column == WORD_BYTES && lane->name == NAME_LENGTH) {
		if (((word | CASE_BITS >> 16) & FIRST_7) != LOWER_LENGTH)
			return 0;
		token_begin(lane, AT_LENGTH);
		return 7;
	}
	if (lane->column)
		return 0;
	if ((word | CASE_BITS >> 8) == LOWER_CONTENT) {
		lane->name = NAME_LENGTH;
	} else if ((word | CASE_BITS) == LOWER_TRANSFER) {
		lane->name = NAME_CODING;
	} else {
		if ((__u8)word != '\r' && (__u8)word != '\n')
			lane->place = AT_VALUE;
		return 0;
	}
	lane->column = WORD_BYTES;
	return WORD_BYTES;
}

static __always_inline void name_step(struct lane *lane, __u8 b)
{
	__u8 lower = b & 0x40 ? b | CASE_BIT : b, wanted;

	if (!lane->column)
		lane->name = lower == 't' ? NAME_CODING : NAME_LENGTH;
	wanted = header_names[lane->name & 1][lane->column % NAME_ROOM];
	if (b && lower == wanted) {
		lane->column++;
	} else if (b == ':' && !wanted) {
		token_begin(lane, lane->name == NAME_CODING ? AT_CODING : AT_LENGTH);
	} else {
		if (!wanted && (b == ' ' || b == '\t')) /* some take it for the name all the same */
			lane->flags |= IS_UNCLEAR;
		lane->place = b == '\n' ? AT_NAME : AT_VALUE;
		lane->column = 0;
	}
}

#define MOST_LENGTH (1ULL << 56)

/* Equal lengths may be said several times, in a list or in several headers. */
static __always_inline void length_ended(struct lane *lane, __u8 place)
{
	if (!lane->column || (lane->flags & HAS_LENGTH && lane->left != lane->word))
		lane->flags |= IS_UNCLEAR;
	lane->flags |= HAS_LENGTH;
	lane->left = lane->word;
	token_begin(lane, place);
}

static __always_inline void length_step(struct lane *lane, __u8 b)
{
	if (b >= '0' && b <= '9' && lane->column < 2 && lane->word < MOST_LENGTH) {
		lane->word = lane->word * 10 + (b - '0');
		lane->column = 1;
	} else if (b == '\n' || b == ',') {
		length_ended(lane, b == ',' ? AT_LENGTH : AT_FOLD);
	} else if (b == ' ' || b == '\t' || b == '\r') {
		if (lane->column)
			lane->column = 2; /* no more digits */
	} else {
		lane->flags |= IS_UNCLEAR;
	}
}

#define LOWER_CHUNKED CHARS_7('c', 'h', 'u', 'n', 'k', 'e', 'd')

/* The last coding of all decides where the body ends. */
static __always_inline void coding_step(struct lane *lane, __u8 b)
{
	if (b == '\n') {
		lane->flags = (lane->flags & ~IS_CHUNKED) | HAS_CODING;
		if (lane->word == LOWER_CHUNKED)
			lane->flags |= IS_CHUNKED;
		token_begin(lane, AT_FOLD);
	} else if (b == ',') {
		lane->word = 0;
	} else if (b != ' ' && b != '\t' && b != '\r') {
		lane->word = lane->word << 8 | (b | CASE_BIT);
	}
}

/* A hexadecimal digit, or 16. */
static __always_inline __u8 digit_of(__u8 b)
{
	__u8 lower = b | 0x20;

	if (b >= '0' && b <= '9')
		return b - '0';
	return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : 16;
}

static __always_inline bool chunk_size_step(struct lane *lane, __u8 b)
{
	__u8 digit = digit_of(b);

	if (digit < 16) {
		lane->word = lane->word << 4 | digit;
		lane->column = 1;
		return lane->word < MOST_LENGTH;
	}
	if (!lane->column)
		return false;
	if (b != '\n') {
		lane->left = lane->word;
		lane->place = AT_CHUNK_EXTENSION;
		return b == ';' || b == '\r' || b == ' ' || b == '\t';
	}
	lane->left = lane->word;
	token_begin(lane, lane->left ? AT_CHUNK : AT_TRAILER);
	return true;
}

static __always_inline bool version_is_http1(struct lane *lane)
{
	lane->version = lane->word & 1;
	return lane->column == WORD_BYTES && (lane->word & ~1ULL) == HTTP_1_0;
}

static __always_inline bool version_step(struct connection *c, struct lane *lane, __u8 b,
					 __u64 now_ns)
{
	if (b != '\r' && b != '\n') {
		lane->word = lane->word << 8 | b;
		return ++lane->column <= WORD_BYTES;
	}
	if (!version_is_http1(lane)) {
		if (lane->word == HTTP_2_0) {
			give_up(c, UNREAD_HTTP2, now_ns);
			return true;
		}
		return false;
	}
	request_at(c, c->made)->version = lane->version;
	token_begin(lane, b == '\r' ? AT_LINE_END : AT_NAME);
	return true;
}

static __always_inline bool target_step(struct connection *c, struct lane *lane, __u8 b)
{
	struct request *request = request_at(c, c->made);

	if (b == ' ') {
		if (!request->path_bytes)
			return false;
		token_begin(lane, AT_VERSION);
		return true;
	}
	if (b < ' ' || b == 127)
		return false;
	if (b == '?') {
		request->flags |= PATH_QUERIED;
		lane->place = AT_QUERY;
		return true;
	}
	if (!request->path_bytes && b != '/' && b != '*') {
		lane->column = 0;
		lane->place = AT_AUTHORITY;
		return is_token(b) || b == '[';
	}
	path_add(c, b);
	return true;
}

/* scheme://host:port, of which nothing is copied; what follows is the path. */
static __always_inline bool authority_step(struct connection *c, struct lane *lane, __u8 b)
{
	if (b == '/' && ++lane->column == 3) {
		path_add(c, b);
		lane->place = AT_TARGET;
	} else if (b == ' ' || b == '?') {
		if (lane->column == 2)
			path_add(c, '/');
		if (b == '?')
			request_at(c, c->made)->flags |= PATH_QUERIED;
		token_begin(lane, b == ' ' ? AT_VERSION : AT_QUERY);
	}
	return b >= ' ' && b != 127;
}

static __always_inline bool method_step(struct connection *c, struct lane *lane, __u8 b)
{
	if (b == ' ') {
		request_at(c, c->made)->method = method_named(lane->word, lane->column);
		*method_at(c, c->made) = request_at(c, c->made)->method;
		lane->place = AT_TARGET;
		return lane->column;
	}
	lane->word = lane->word << 8 | b;
	return is_token(b) && ++lane->column <= 24;
}

static __always_inline bool status_step(struct lane *lane, __u8 b)
{
	if (lane->column < 3) {
		lane->column++;
		lane->status = lane->status * 10 + (b - '0');
		return b >= '0' && b <= '9';
	}
	lane->place = b == '\n' ? AT_NAME : AT_REASON;
	lane->column = 0;
	return lane->status >= 100 && (b == ' ' || b == '\r' || b == '\n');
}

static __always_inline bool protocol_step(struct lane *lane, __u8 b)
{
	if (lane->column < WORD_BYTES) {
		lane->word = lane->word << 8 | b;
		lane->column++;
		return true;
	}
	if (!version_is_http1(lane))
		return false;
	token_begin(lane, AT_STATUS);
	return b == ' ';
}

/* Begins a message with B; a request may come after empty lines. */
static __always_inline bool start_step(struct connection *c, struct lane *lane, __u32 direction,
				       __u8 b, __u64 now_ns)
{
	if (is_request_lane(c, direction)) {
		if (b == '\r' || b == '\n')
			return true;
		if (c->made - c->answered >= PIPELINE) {
			lose_track(c, now_ns);
			c->unread = UNREAD_BEHIND;
			return true;
		}
		request_begin(c, lane, now_ns);
		return method_step(c, lane, b) && b != ' ';
	}
	message_begin(lane, now_ns);
	token_begin(lane, AT_PROTOCOL);
	return protocol_step(lane, b) && b == 'H';
}

/* Takes in the next byte, which is in no body and in no line that is skipped. False if it cannot be
 * HTTP/1. */
static __always_inline bool byte_step(struct connection *c, struct lane *lane, __u32 direction,
				      __u8 b, __u64 now_ns)
{
	switch (lane->place) {
	case AT_START:
		return start_step(c, lane, direction, b, now_ns);
	case AT_METHOD:
		return method_step(c, lane, b);
	case AT_TARGET:
		return target_step(c, lane, b);
	case AT_AUTHORITY:
		return authority_step(c, lane, b);
	case AT_QUERY:
		if (b == ' ')
			token_begin(lane, AT_VERSION);
		return b >= ' ' && b != 127;
	case AT_VERSION:
		return version_step(c, lane, b, now_ns);
	case AT_PROTOCOL:
		return protocol_step(lane, b);
	case AT_STATUS:
		return status_step(lane, b);
	case AT_LINE_END:
		token_begin(lane, AT_NAME);
		return b == '\n';
	case AT_LENGTH:
		length_step(lane, b);
		return true;
	case AT_CODING:
		coding_step(lane, b);
		return true;
	case AT_FOLD:
		if (b == ' ' || b == '\t') {
			lane->flags |= IS_UNCLEAR;
			lane->place = AT_VALUE;
			return true;
		}
		lane->place = AT_NAME; /* fall through */
	case AT_NAME:
		if (!lane->column && (b == '\r' || b == '\n')) {
			if (b == '\r')
				token_begin(lane, AT_HEAD_END);
			else
				head_ended(c, lane, direction, now_ns);
			return true;
		}
		name_step(lane, b);
		return true;
	case AT_HEAD_END:
		if (b != '\n')
			return false;
		head_ended(c, lane, direction, now_ns);
		return true;
	case AT_CHUNK_SIZE:
		return chunk_size_step(lane, b);
	case AT_CHUNK_END:
		if (b == '\n')
			token_begin(lane, AT_CHUNK_SIZE);
		return b == '\n' || b == '\r';
	case AT_TRAILER:
		if (b == '\r')
			lane->place = AT_TRAILER_END;
		else if (b == '\n')
			message_ended(c, lane, direction, now_ns);
		else
			lane->place = AT_TRAILER_REST;
		return true;
	case AT_TRAILER_END:
		if (b != '\n')
			return false;
		message_ended(c, lane, direction, now_ns);
		return true;
	}
	return true;
}

static __always_inline bool is_protocol(struct lane *lane, __u64 word)
{
	word = __builtin_bswap64(word);
	if ((word & ~1ULL) != HTTP_1_0)
		return false;
	lane->version = word & 1;
	lane->word = word;
	lane->column = WORD_BYTES;
	return true;
}

#define STATUS_BYTES 5 /* and the spaces around it */

/* WORD is what follows the protocol. */
static __always_inline bool is_status(struct lane *lane, __u64 word)
{
	__u8 hundreds = (word >> 8) - '0', tens = (word >> 16) - '0', ones = (word >> 24) - '0';

	if ((__u8)word != ' ' || (__u8)(word >> 32) != ' ' || hundreds < 1 || hundreds > 9 ||
	    tens > 9 || ones > 9)
		return false;
	lane->status = hundreds * 100 + tens * 10 + ones;
	lane->column = 0;
	lane->place = AT_REASON;
	return true;
}

static __always_inline __u32 response_started(struct cursor *cursor, struct lane *lane, __u32 at)
{
	if (!is_protocol(lane, word_at(cursor->window, at)))
		return 0;
	message_begin(lane, cursor->window->now_ns);
	lane->place = AT_PROTOCOL;
	if (at + 2 * WORD_BYTES > cursor->window->end ||
	    !is_status(lane, word_at(cursor->window, at + WORD_BYTES)))
		return WORD_BYTES;
	return WORD_BYTES + STATUS_BYTES;
}

#define RUN 8 /* characters in one step */

/* The characters of a path, or of a query. */
static __always_inline __u32 target_run(struct cursor *cursor, struct lane *lane, __u32 at)
{
	struct request *request = request_at(cursor->c, cursor->c->made);
	__u64 hash = request->path_hash;
	__u32 length = request->path_bytes, passed = 0;
	bool is_path = lane->place == AT_TARGET;
	__u8 b;

	if (is_path && !length)
		return 0;
	for (; passed < RUN && at < cursor->window->end; passed++, at++) {
		b = cursor->window->bytes[at & (WINDOW - 1)];
		if (b <= ' ' || b == 127 || (is_path && (b == '?' || length >= PATH_BYTES)))
			break;
		if (is_path) {
			hash = (hash ^ b) * FNV_PRIME;
			((__u8 *)request->path)[length % PATH_BYTES] = b;
			length++;
		}
	}
	request->path_hash = hash;
	request->path_bytes = length;
	return passed;
}

/* Takes in several bytes at once where that is quicker and they are there, most often the first
 * eight of a token. How many it took in. */
static __always_inline __u32 token_started(struct cursor *cursor, struct lane *lane)
{
	__u32 at = cursor->window->at;
	__u8 place = lane->place;

	if (place == AT_TARGET || place == AT_QUERY)
		return target_run(cursor, lane, at);
	if (at + WORD_BYTES > cursor->window->end)
		return 0;
	if (place == AT_NAME)
		return name_started(lane, word_at(cursor->window, at));
	if (lane->column)
		return 0;
	if (place == AT_VERSION)
		return is_protocol(lane, word_at(cursor->window, at)) ? WORD_BYTES : 0;
	if (place == AT_START && !is_request_lane(cursor->c, cursor->window->direction))
		return response_started(cursor, lane, at);
	return 0;
}

static __always_inline bool skips_line(__u8 place)
{
	return place == AT_VALUE || place == AT_REASON || place == AT_CHUNK_EXTENSION ||
	       place == AT_TRAILER_REST;
}

static __always_inline void line_ended(struct lane *lane)
{
	if (lane->place == AT_CHUNK_EXTENSION)
		token_begin(lane, lane->left ? AT_CHUNK : AT_TRAILER);
	else
		token_begin(lane, lane->place == AT_TRAILER_REST ? AT_TRAILER : AT_NAME);
}

/* Whether requests wait whose responses can still be told, though what follows them in DIRECTION is
 * none: a client may begin to use a tunnel before it is there, or send more than it said. */
static __always_inline bool answers_follow(const struct connection *c, __u32 direction)
{
	return is_request_lane(c, direction) && c->made != c->answered && !c->on_trial;
}

/* Takes in at least one byte of the window; 1 at its end. */
static long http_step(__u32 turn, struct cursor *cursor)
{
	struct connection *c = cursor->c;
	struct lane *lane = lane_of(c, cursor->window->direction);
	__u32 at = cursor->window->at, end = cursor->window->end;
	__u64 body, now_ns = cursor->window->now_ns;
	__u32 started;
	__u8 place, b;

	if (at >= end)
		return 1;
	started = token_started(cursor, lane);
	if (started) {
		cursor->window->at = at + started;
		return 0;
	}
	place = lane->place;
	if (skips_line(place)) {
		if (line_skipped(cursor))
			line_ended(lane);
		return 0;
	}
	body = body_ahead(lane);
	if (body) {
		if (body > end - at)
			body = end - at;
		cursor->window->at = at + body;
		if (place != AT_NOTHING)
			body_passed(c, lane, cursor->window->direction, body, now_ns);
		return 0;
	}
	b = cursor->window->bytes[at & (WINDOW - 1)];
	cursor->window->at = at + 1;
	if (byte_step(c, lane, cursor->window->direction, b, now_ns))
		return 0;
	if (answers_follow(c, cursor->window->direction))
		token_begin(lane, AT_NOTHING);
	else
		give_up(c, b == 0x16 && place == AT_START ? UNREAD_TLS : UNREAD_OTHER, now_ns);
	return 0;
}

/* LENGTH bytes that nobody can see have passed. */
static __always_inline void unseen_passed(struct connection *c, __u32 direction, __u64 length,
					  __u64 now_ns)
{
	struct lane *lane = lane_of(c, direction);

	if (lane->place == AT_NOTHING)
		return;
	if (body_ahead(lane) >= length)
		body_passed(c, lane, direction, length, now_ns);
	else
		lose_track(c, now_ns);
}
