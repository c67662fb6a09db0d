/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: the first line of a request (method, target, version) and of a response (version,
 * status), by single bytes, and by several at once.
 */
#pragma once

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

static __always_inline void method_ended(struct connection *c, struct lane *lane, __u8 method)
{
	request_at(c, c->made)->method = *method_at(c, c->made) = method;
	lane->place = AT_TARGET;
}

static __always_inline bool method_step(struct connection *c, struct lane *lane, __u8 b)
{
	if (b == ' ') {
		method_ended(c, lane, method_named(lane->word, lane->column));
		return lane->column;
	}
	lane->word = lane->word << 8 | b;
	return is_token(b) && ++lane->column <= 24;
}

/* The first eight bytes of a frame of HTTP/2 that has settings (RFC 9113, 4.1 and 6.5): type 4, no
 * flags, stream 0. The length is at most 255 bytes. */
#define SETTINGS_FRAME (4ULL << 32)
#define FRAME_LENGTH   (0xFFULL << 40)

/* A connection begins with a zero. A server of HTTP/2 may send its settings before it has read the
 * client's preface. */
static __always_inline bool settings_step(struct connection *c, struct lane *lane, __u8 b,
					  __u64 now_ns)
{
	lane->word = lane->word << 8 | b;
	if (++lane->column < WORD_BYTES)
		return true;
	if ((lane->word & ~FRAME_LENGTH) != SETTINGS_FRAME)
		return false;
	give_up(c, UNREAD_HTTP2, now_ns);
	return true;
}

static __always_inline bool status_step(struct lane *lane, __u8 b)
{
	if (lane->column < 3) {
		lane->column++;
		lane->status = lane->status * 10 + (b - '0');
		return b >= '0' && b <= '9';
	}
	lane->place = b == '\n' ? AT_NAME : AT_VALUE;
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
	lane->place = AT_VALUE;
	return true;
}

static __always_inline __u32 response_started(struct connection *c, struct window *window,
					      struct lane *lane, __u32 at)
{
	if (!is_protocol(lane, word_at(window, at)))
		return 0;
	message_begin(lane, window->now_ns);
	lane->place = AT_PROTOCOL;
	if (at + 2 * WORD_BYTES > window->end || !is_status(lane, word_at(window, at + WORD_BYTES)))
		return WORD_BYTES;
	return WORD_BYTES + STATUS_BYTES;
}

#define RUN 8 /* characters in one step */

/* The characters of a path, or of a query. */
static __always_inline __u32 target_run(struct connection *c, struct window *window,
					struct lane *lane, __u32 at)
{
	struct request *request = request_at(c, c->made);
	__u64 hash = request->path_hash;
	__u32 length = request->path_bytes, passed = 0;
	bool is_path = lane->place == AT_TARGET;
	__u8 b = 0;

	if (is_path && !length && window->bytes[at & (WINDOW - 1)] != '/')
		return 0;
	for (; passed < RUN && at < window->end; passed++, at++) {
		b = window->bytes[at & (WINDOW - 1)];
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
	if (b == ' ') {
		token_begin(lane, AT_VERSION);
		passed++;
	}
	return passed;
}

static __always_inline __u32 version_started(struct connection *c, struct window *window,
					     struct lane *lane, __u32 at)
{
	if (!is_protocol(lane, word_at(window, at)))
		return 0;
	if (at + WORD_BYTES + 2 > window->end ||
	    (__u16)word_at(window, at + WORD_BYTES) != LINE_END)
		return WORD_BYTES;
	request_at(c, c->made)->version = lane->version;
	token_begin(lane, AT_NAME);
	return WORD_BYTES + 2;
}

/* A method that has a number, and the space after it. */
static __always_inline __u32 method_started(struct connection *c, struct window *window,
					    struct lane *lane, __u32 at)
{
	__u64 word = word_at(window, at);
	__u32 length = up_to_byte(word, ' ');
	__u8 method;

	if (length < 2 || !(__u8)word) /* zeros before a method would not show in its number */
		return 0;
	method = method_named(__builtin_bswap64(word) >> (WORD_BYTES + 1 - length) * 8, length - 1);
	if (method == METHOD_OTHER)
		return 0;
	method_ended(c, lane, method);
	return length;
}
