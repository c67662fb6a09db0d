/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: what is copied of the head of a request where a session wants it, and of no other: the
 * query, the host, and the ids of a `traceparent` (W3C Trace Context). It goes before the other
 * steps of the parser, and where nobody wants any of it, costs one test a step.
 *
 * Included by http.bpf.h. The functions that the parser calls have a stack of their own, so that
 * the parser's stays as it is.
 */
#pragma once

#define WANTS_QUERY 1
#define WANTS_TRACE 2
#define WANTS_HOST  4

#define NAME_HOST  4 /* beside those of headers.bpf.h; the lowest bit is its place in: */
#define NAME_TRACE 5

/* Not of 32 bytes: clang would put it into a section that libbpf does not know. */
static const __u8 detail_names[2][NAME_ROOM] = {"host", "traceparent"};

#define HOST_COLON   (LITTLE_8('h', 'o', 's', 't', ':', 0, 0, 0))
#define FIRST_5	     (~0ULL >> 24)
#define TRACE_PARENT (LITTLE_8('t', 'r', 'a', 'c', 'e', 'p', 'a', 'r'))

static __always_inline bool is_visible(__u8 b)
{
	return b > ' ' && b != 127;
}

static __always_inline void host_forget(struct request *request)
{
	for (int i = 0; i < HOST_BYTES / 8; i++)
		request->host[i] = 0;
	request->host_bytes = 0;
	request->flags &= ~HOST_CUT;
}

/* A request has begun. Nothing stays of what the one before it in this place had copied. */
static __always_inline void details_begin(struct connection *c, struct request *request,
					  struct lane *lane)
{
	for (int i = 0; i < PATH_BYTES / 8; i++)
		request->path[i] = 0;
	host_forget(request);
	request->query_bytes = 0;
	request->wants = lane->wants = c->wants;
}

/* Whether anything may be copied of what passes in DIRECTION, or has to be removed. */
static __always_inline __u32 details_wanted(const struct connection *c, __u32 direction)
{
	__u32 wants = c->wants | c->lanes[direction & 1].wants;

	for (int i = 0; i < AT_HAND; i++)
		wants |= c->requests[i].wants;
	return wants;
}

/* With the name of a lane, which is not needed for names there: more came than there is room for.
 */
#define IS_OVER 0x80

static __always_inline void host_add(struct request *request, struct lane *lane, __u8 b)
{
	__u8 at = request->host_bytes;

	if (at >= HOST_BYTES) {
		lane->name |= IS_OVER;
		return;
	}
	((__u8 *)request->host)[at % HOST_BYTES] = b;
	request->host_bytes = at + 1;
	request->flags |= HOST_CUT;
}

static __always_inline void host_end(struct request *request, const struct lane *lane)
{
	if (!(lane->name & IS_OVER))
		request->flags &= ~HOST_CUT;
}

/* The first character of the target of CONNECT, which has nothing before the host. */
static __always_inline __u32 tunnel_taken(struct request *request, struct lane *lane, __u8 b)
{
	if (request->method != METHOD_CONNECT || request->path_bytes || b == '*' ||
	    !(is_token(b) || b == '['))
		return 0;
	token_begin(lane, AT_AUTHORITY);
	lane->name = 0;
	host_add(request, lane, b);
	return 1;
}

/* The next character of scheme://user@host:port, which another step takes in. */
static __always_inline void authority_seen(struct request *request, struct lane *lane, __u8 b)
{
	bool is_host =
	    request->method == METHOD_CONNECT ? !lane->column : lane->column == 2 && lane->name;

	if (b == '/' && lane->column == 1)
		lane->name = (lane->word & 0xFFFF) == (':' << 8 | '/');
	lane->word = lane->word << 8 | b;
	if (!is_host)
		return;
	if (b == '@') { /* what came before is no host, and may be secret */
		host_forget(request);
		lane->name &= ~IS_OVER;
	} else if (b == '/' || b == '?' || b == ' ') {
		host_end(request, lane);
	} else if (is_visible(b)) {
		host_add(request, lane, b);
	}
}

static __always_inline __u32 query_taken(struct window *window, struct request *request,
					 struct lane *lane)
{
	__u32 at = window->at, length = request->path_bytes + request->query_bytes;
	__u32 passed = 0;
	__u8 b;

	if (!(request->flags & QUERY_CUT))
		lane->name = 0;
	request->flags |= QUERY_CUT;
	for (; passed < RUN && at < window->end; passed++, at++) {
		b = window->bytes[at & (WINDOW - 1)];
		if (!is_visible(b))
			break;
		if (length < PATH_BYTES) {
			((__u8 *)request->path)[length % PATH_BYTES] = b;
			length++;
		} else {
			lane->name = IS_OVER;
		}
	}
	request->query_bytes = length - request->path_bytes;
	if (!passed && !lane->name)
		request->flags &= ~QUERY_CUT;
	return passed;
}

/* The value of a header that is wanted begins. A host that the target has said counts, and of
 * several traces none does. */
static __always_inline void detail_begin(struct request *request, struct lane *lane, __u8 name)
{
	token_begin(lane, AT_VALUE);
	if (name == NAME_HOST && !request->host_bytes) {
		lane->place = AT_HOST;
		lane->name = 0;
	} else if (name == NAME_TRACE && !(request->flags & TRACE_SEEN)) {
		request->flags |= TRACE_SEEN;
		lane->place = AT_TRACE;
	} else if (name == NAME_TRACE) {
		request->flags &= ~HAS_TRACE;
	}
}

/* "traceparent" begins like "transfer-encoding", which another step reads up to there. */
static __always_inline __u32 name_taken(struct window *window, struct request *request,
					struct lane *lane, __u8 b)
{
	__u8 lower = b & 0x40 ? b | CASE_BIT : b, wants = lane->wants, wanted;
	__u32 at = window->at;
	__u64 word;

	if (!lane->column && at + WORD_BYTES <= window->end) {
		word = word_at(window, at);
		if (wants & WANTS_HOST && ((word | CASE_BITS >> 32) & FIRST_5) == HOST_COLON) {
			detail_begin(request, lane, NAME_HOST);
			return 5;
		}
		if (!(wants & WANTS_TRACE) || (word | CASE_BITS) != TRACE_PARENT)
			return 0;
		lane->name = NAME_TRACE;
		lane->column = WORD_BYTES;
		return WORD_BYTES;
	}
	if (!lane->column) {
		if (lower != 'h' || !(wants & WANTS_HOST))
			return 0;
		lane->name = NAME_HOST;
	} else if (lane->column == 3 && lane->name == NAME_CODING && lower == 'c') {
		if (!(wants & WANTS_TRACE))
			return 0;
		lane->name = NAME_TRACE;
	} else if (lane->name < NAME_HOST) {
		return 0;
	}
	wanted = detail_names[lane->name & 1][lane->column % NAME_ROOM];
	if (b && lower == wanted) {
		lane->column++;
	} else if (b == ':' && !wanted) {
		detail_begin(request, lane, lane->name);
	} else {
		lane->place = b == '\n' ? AT_NAME : AT_VALUE;
		lane->column = 0;
	}
	return 1;
}

static __always_inline __u32 host_taken(struct window *window, struct request *request,
					struct lane *lane, __u8 b)
{
	__u32 at = window->at, passed = 0;

	if (!is_visible(b)) {
		host_end(request, lane);
		if (b == '\n')
			token_begin(lane, AT_NAME);
		else if (request->host_bytes || !(b == ' ' || b == '\t' || b == '\r'))
			token_begin(lane, AT_VALUE);
		return 1;
	}
	for (; passed < RUN && at < window->end; passed++, at++) {
		b = window->bytes[at & (WINDOW - 1)];
		if (!is_visible(b))
			break;
		host_add(request, lane, b);
	}
	return passed;
}

/*
 * 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 (W3C Trace Context, 3.2): version, trace,
 * parent and flags in lower-case hexadecimal digits. Later versions may say more at the end.
 */
#define VERSION_END 2
#define HALF_TRACE  18 /* the last of 16 digits */
#define TRACE_END   35
#define PARENT_END  52
#define TRACE_BYTES 55
#define NO_VERSION  0xFF
#define IS_PADDED   0x80 /* with the column: only white space may follow */

static __always_inline bool trace_digit(struct request *request, struct lane *lane, __u8 column,
					__u8 b)
{
	__u8 digit = digit_of(b);

	if (digit > 15 || (b >= 'A' && b <= 'F'))
		return false;
	lane->word = lane->word << 4 | digit;
	if (column == HALF_TRACE)
		request->trace[0] = lane->word;
	return true;
}

static __always_inline bool trace_separator(struct request *request, struct lane *lane, __u8 column,
					    __u8 b)
{
	if (b != '-')
		return false;
	if (column == VERSION_END)
		lane->name = lane->word; /* which is not needed for names here */
	else if (column == TRACE_END)
		request->trace[1] = lane->word;
	else
		request->parent = lane->word;
	lane->word = 0;
	return lane->name != NO_VERSION;
}

static __always_inline bool trace_step(struct request *request, struct lane *lane, __u8 b)
{
	__u8 column = lane->column;

	if (b == ' ' || b == '\t' || b == '\r') {
		if (column)
			lane->column = column | IS_PADDED;
		return true;
	}
	if (column & IS_PADDED)
		return false;
	if (column > TRACE_BYTES)
		return true;
	lane->column = column + 1;
	if (column == VERSION_END || column == TRACE_END || column == PARENT_END)
		return trace_separator(request, lane, column, b);
	if (column == TRACE_BYTES)
		return lane->name && b == '-';
	return trace_digit(request, lane, column, b);
}

/* As many digits of the trace and of its parent as there are in a step. */
static __always_inline __u32 digits_taken(struct window *window, struct request *request,
					  struct lane *lane)
{
	__u32 at = window->at, column = lane->column, passed = 0;
	__u64 word = lane->word;
	__u8 digit, b;

	for (; passed < RUN && at < window->end; passed++, at++, column++) {
		b = window->bytes[at & (WINDOW - 1)];
		digit = digit_of(b);
		if (digit > 15 || (b >= 'A' && b <= 'F') || column == TRACE_END ||
		    column >= PARENT_END)
			break;
		word = word << 4 | digit;
		if (column == HALF_TRACE)
			request->trace[0] = word;
	}
	lane->word = word;
	lane->column = column;
	return passed;
}

static __always_inline __u32 trace_taken(struct window *window, struct request *request,
					 struct lane *lane, __u8 b)
{
	__u32 passed = lane->column > VERSION_END && lane->column < PARENT_END
			   ? digits_taken(window, request, lane)
			   : 0;

	if (passed)
		return passed;
	if (b == '\n') {
		if ((lane->column & ~IS_PADDED) >= TRACE_BYTES &&
		    (request->trace[0] | request->trace[1]) && request->parent)
			request->flags |= HAS_TRACE;
		token_begin(lane, AT_NAME);
	} else if (!trace_step(request, lane, b)) {
		token_begin(lane, AT_VALUE);
	}
	return 1;
}

/* How many of the next bytes are no other step's; there is at least one. */
static __always_inline __u32 detail_taken(struct connection *c, struct window *window,
					  struct lane *lane, __u8 b)
{
	struct request *request = request_at(c, c->made);
	__u8 place = lane->place;

	if (lane->flags & IS_ANSWERED && place != AT_NAME) { /* `request` is the next one */
		if (place == AT_HOST || place == AT_TRACE)
			token_begin(lane, AT_VALUE);
		return 0;
	}
	switch (place) {
	case AT_METHOD:
		if (!lane->column)
			details_begin(c, request, lane);
		return 0;
	case AT_TARGET:
		return lane->wants & WANTS_HOST ? tunnel_taken(request, lane, b) : 0;
	case AT_AUTHORITY:
		if (lane->wants & WANTS_HOST)
			authority_seen(request, lane, b);
		return 0;
	case AT_QUERY:
		return lane->wants & WANTS_QUERY ? query_taken(window, request, lane) : 0;
	case AT_FOLD:
		if (is_blank(b))
			return 0;
		lane->place = AT_NAME; /* fall through */
	case AT_NAME:
		return name_taken(window, request, lane, b);
	case AT_HOST:
		return host_taken(window, request, lane, b);
	case AT_TRACE:
		return trace_taken(window, request, lane, b);
	}
	return 0;
}

/* Takes in the next bytes where they are no other step's; 0 if it does not. */
SUBPROGRAM int details_taken(struct connection *c, struct window *window)
{
	struct lane *lane;
	__u32 taken;

	if (!c || !window)
		return 0;
	lane = lane_of(c, window->direction);
	if (!lane->wants || window->at >= window->end)
		return 0;
	taken = detail_taken(c, window, lane, window->bytes[window->at & (WINDOW - 1)]);
	window->at += taken;
	return taken;
}
