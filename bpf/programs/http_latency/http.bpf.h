/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: HTTP/1.0 and 1.1, read byte by byte (RFC 9112). The state of a connection holds
 * everything that was read, so that the answer is the same however the bytes are cut. It copies
 * nothing but the path, and looks at no header but those of headers.bpf.h; where a session wants
 * more of a request, see details.bpf.h.
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

#include "connection.bpf.h"
#include "words.bpf.h"
#include "messages.bpf.h"
#include "headers.bpf.h"
#include "first_line.bpf.h"
#include "details.bpf.h"

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

/* Begins a response with B. A request has begun by now, unless B belongs to an empty line before.
 */
static __always_inline bool start_step(struct connection *c, struct lane *lane, __u32 direction,
				       __u8 b, __u64 now_ns)
{
	if (is_request_lane(c, direction))
		return true;
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
		if (!b && !lane->column && !c->made) {
			lane->place = AT_SETTINGS;
			return settings_step(c, lane, b, now_ns);
		}
		return method_step(c, lane, b);
	case AT_SETTINGS:
		return settings_step(c, lane, b, now_ns);
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
		if (is_blank(b)) {
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

#define SKIPS 16 /* words in one step */

/* Skips the rest of a line, and with IN_HEAD those lines after it that do not matter; true once the
 * end of the last has passed. */
SUBPROGRAM int lines_skipped(struct window *window, bool in_head)
{
	__u32 at, end, found;

	if (!window)
		return false;
	at = window->at;
	end = window->end;

	for (int i = 0; i < SKIPS; i++) {
		if (at + WORD_BYTES > end)
			break;
		found = up_to_byte(word_at(window, at), '\n');
		if (!found) {
			at += WORD_BYTES;
			continue;
		}
		at += found;
		if (!in_head || at + WORD_BYTES > end || line_matters(word_at(window, at))) {
			window->at = at;
			return true;
		}
	}
	if (at < end && at + WORD_BYTES > end) {
		window->at = at + 1;
		return window->bytes[at & (WINDOW - 1)] == '\n';
	}
	window->at = at;
	return false;
}

/* Takes in several bytes at once where that is quicker and they are there, most often the first
 * eight of a token. How many it took in. */
static __always_inline __u32 token_started(struct connection *c, struct window *window,
					   struct lane *lane)
{
	__u32 at = window->at;
	__u8 place = lane->place;

	if (place == AT_TARGET || place == AT_QUERY)
		return target_run(c, window, lane, at);
	if (place == AT_NAME && !lane->column && at + 2 <= window->end &&
	    (__u16)word_at(window, at) == LINE_END) {
		token_begin(lane, AT_HEAD_END);
		return 1;
	}
	if (at + WORD_BYTES > window->end)
		return 0;
	if (place == AT_FOLD && !is_blank(window->bytes[at & (WINDOW - 1)]))
		lane->place = place = AT_NAME;
	if (place == AT_NAME)
		return name_started(lane, word_at(window, at));
	if (place == AT_LENGTH)
		return length_started(lane, word_at(window, at));
	if (lane->column)
		return 0;
	if (place == AT_METHOD)
		return method_started(c, window, lane, at);
	if (place == AT_VERSION)
		return version_started(c, window, lane, at);
	if (place == AT_START && !is_request_lane(c, window->direction))
		return response_started(c, window, lane, at);
	return 0;
}

#define TOKENS 8 /* in one step */

/* Takes in what can be taken in faster than by single bytes. True if what follows may be wanted,
 * see details.bpf.h. */
SUBPROGRAM int tokens_read(struct connection *c, struct window *window)
{
	struct lane *lane;
	__u32 taken;

	if (!c || !window)
		return 0;
	lane = lane_of(c, window->direction);
	for (int i = 0; i < TOKENS && window->at < window->end; i++) {
		if (lane->place == AT_VALUE) {
			if (!lines_skipped(window, !lane->wants))
				break;
			token_begin(lane, AT_NAME);
		} else {
			taken = token_started(c, window, lane);
			if (!taken)
				break;
			window->at += taken;
		}
		if (lane->wants)
			return true;
	}
	return 0;
}

static __always_inline bool skips_line(__u8 place)
{
	return place == AT_VALUE || place == AT_CHUNK_EXTENSION || place == AT_TRAILER_REST;
}

static __always_inline void line_ended(struct lane *lane)
{
	if (lane->place == AT_CHUNK_EXTENSION)
		token_begin(lane, lane->left ? AT_CHUNK : AT_TRAILER);
	else
		token_begin(lane, lane->place == AT_TRAILER_REST ? AT_TRAILER : AT_NAME);
}

/* Begins a request with B, unless that belongs to an empty line before it. */
static __always_inline void request_started(struct connection *c, struct lane *lane, __u8 b,
					    __u64 now_ns)
{
	if (b == '\r' || b == '\n')
		return;
	if (c->made - c->answered >= PIPELINE) {
		lose_track(c, now_ns);
		c->unread = UNREAD_BEHIND;
	} else {
		request_begin(c, lane, now_ns);
	}
}

/* Whether LANE has taken in the first byte of a message, which is none. */
static __always_inline bool failed_at_once(const struct lane *lane)
{
	return lane->place == AT_PROTOCOL ? lane->column == 1
					  : lane->place == AT_METHOD && !lane->column;
}

/* Whether requests wait whose responses can still be told, though what follows them in DIRECTION is
 * none: a client may begin to use a tunnel before it is there, or send more than it said. */
static __always_inline bool answers_follow(const struct connection *c, __u32 direction)
{
	return is_request_lane(c, direction) && c->made != c->answered && !c->on_trial;
}

/* Takes in at least one byte of the window; 1 at its end. Reads what it needs again after each
 * call: the stack has no room to keep it. */
static long http_step(__u32 turn, struct cursor *cursor)
{
	struct connection *c = cursor->c;
	struct window *window = cursor->window;
	struct lane *lane = lane_of(c, window->direction);
	__u64 body;
	__u8 b;

	if (window->at >= window->end)
		return 1;
	if (lane->place == AT_START && is_request_lane(c, window->direction))
		request_started(c, lane, window->bytes[window->at & (WINDOW - 1)], window->now_ns);
	if (cursor->wants && details_taken(c, window))
		return 0;
	if (tokens_read(c, window))
		return 0;
	if (window->at >= window->end)
		return 1;
	if (skips_line(lane->place)) {
		if (lines_skipped(window, lane->place == AT_VALUE && !lane->wants))
			line_ended(lane);
		return 0;
	}
	body = body_ahead(lane);
	if (body) {
		if (body > window->end - window->at)
			body = window->end - window->at;
		window->at += body;
		if (lane->place != AT_NOTHING)
			body_passed(c, lane, window->direction, body, window->now_ns);
		return 0;
	}
	b = window->bytes[window->at++ & (WINDOW - 1)];
	if (byte_step(c, lane, window->direction, b, window->now_ns))
		return 0;
	if (answers_follow(c, window->direction))
		token_begin(lane, AT_NOTHING);
	else
		give_up(c, b == 0x16 && failed_at_once(lane) ? UNREAD_TLS : UNREAD_OTHER,
			window->now_ns);
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
