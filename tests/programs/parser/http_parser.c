/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The parser of http_latency in user space. As a library it serves tests/http_parser.py; as a
 * program it reads random conversations, whole and in pieces, and asserts that the answers are the
 * same:
 *
 *     http_parser SEED CONVERSATIONS
 *
 * prints how many exchanges it has seen, and of which outcome, and how many bytes it took in.
 */
#include <assert.h>
#include <linux/types.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef __always_inline
#define __always_inline inline __attribute__((always_inline))
#define SUBPROGRAM	static

#include "../../../bpf/programs/http_latency/http.bpf.h"

#define MOST_EXCHANGES 512

/* Of the record, what the parser decides. */
struct exchange {
	__u64 began_ns;
	__u64 asked_ns;
	__u64 first_ns;
	__u64 ended_ns;
	__u64 request_body_bytes;
	__u64 response_body_bytes;
	__u64 path_hash;
	__u32 number;
	__u16 status;
	__u16 path_bytes;
	__u8 method;
	__u8 version;
	__u8 outcome;
	__u8 path_flags;
	__u8 host_bytes;
	__u8 reserved;
	__u16 query_bytes;
	__u8 path[PATH_BYTES]; /* and the query */
	__u8 host[HOST_BYTES];
	__u64 trace[2];
	__u64 parent;
};

struct talk {
	struct connection c; /* the first, so that one address is both's */
	struct window window;
	__u64 bytes;
	__u64 turns;
	__u32 count;
	__u32 lost; /* exchanges for which there was no room */
	struct exchange exchanges[MOST_EXCHANGES];
	struct request spilled[PIPELINE];
};

static void request_spill(struct connection *c, __u32 number)
{
	struct talk *talk = (struct talk *)c;

	if (c->answered - number - 1 < PIPELINE)
		return;
	assert(request_at(c, number)->number == number);
	talk->spilled[number % PIPELINE] = *request_at(c, number);
}

static void exchange_add(struct connection *c, enum outcome outcome, __u64 now_ns)
{
	struct lane *ask = lane_of(c, request_direction(c));
	struct lane *answer = lane_of(c, !request_direction(c));
	const struct request *request = request_at(c, c->answered);
	bool answers = answer->status >= 200 || answer->status == 101;
	struct talk *talk = (struct talk *)c;
	struct exchange *to = &talk->exchanges[talk->count];

	if (request->number != c->answered)
		request = &talk->spilled[c->answered % PIPELINE];
	assert(request->number == c->answered && request->method);
	assert(request->path_bytes + request->query_bytes <= PATH_BYTES);
	assert(request->host_bytes <= HOST_BYTES);
	assert(request->wants || !(request->query_bytes || request->host_bytes));
	if (outcome == OUTCOME_NONE) {
		/* it was none */
	} else if (talk->count < MOST_EXCHANGES) {
		talk->count++;
		*to = (struct exchange){
		    .began_ns = request->begun_ns,
		    .asked_ns = request->ended_ns,
		    .first_ns = answers ? answer->begun_ns : 0,
		    .ended_ns = now_ns,
		    .request_body_bytes = request->ended_ns ? request->body_bytes : ask->body_bytes,
		    .response_body_bytes = answers ? answer->body_bytes : 0,
		    .path_hash = request->path_hash,
		    .number = request->number,
		    .status = answers ? answer->status : 0,
		    .path_bytes = request->path_bytes,
		    .method = request->method,
		    .version = request->version,
		    .outcome = outcome,
		    .path_flags = request->flags,
		    .host_bytes = request->host_bytes,
		    .query_bytes = request->query_bytes,
		};
		memcpy(to->path, request->path, request->path_bytes + request->query_bytes);
		memcpy(to->host, request->host, request->host_bytes);
		if (request->flags & HAS_TRACE) {
			memcpy(to->trace, request->trace, sizeof(to->trace));
			to->parent = request->parent;
		}
	} else {
		talk->lost++;
	}
	answer->status = 0;
	c->answered++;
}

static void exchange_ended(struct connection *c, enum outcome outcome, __u64 now_ns)
{
	bool all = outcome != OUTCOME_COMPLETE && outcome != OUTCOME_UPGRADED;

	assert(c->made - c->answered <= PIPELINE);
	while (c->answered != c->made) {
		exchange_add(c, outcome, now_ns);
		if (!all)
			break;
	}
}

/* What tests call. */

__u32 talk_bytes(void)
{
	return sizeof(struct talk);
}

void talk_begin(struct talk *talk, __u8 role, bool on_trial)
{
	memset(talk, 0, offsetof(struct talk, exchanges));
	talk->c.role = role;
	talk->c.on_trial = on_trial;
}

/* From the next request on. */
void talk_want(struct talk *talk, __u32 wants)
{
	talk->c.wants = wants;
}

/* Takes in bytes of one operation, as feed_window does. */
void talk_feed(struct talk *talk, __u32 direction, const __u8 *bytes, __u64 left, __u64 now_ns)
{
	struct lane *lane = lane_of(&talk->c, direction);
	struct cursor cursor = {.c = &talk->c, .window = &talk->window};
	__u64 length, body;
	__u32 before;

	talk->window.direction = direction;
	talk->window.now_ns = now_ns;
	lane->last_ns = now_ns;
	talk->bytes += left;
	for (; left; bytes += length, left -= length) {
		body = body_ahead(lane);
		length = left;
		if (body >= length) {
			unseen_passed(&talk->c, direction, length, now_ns);
			return;
		}
		if (body) {
			length = body;
			body_passed(&talk->c, lane, direction, length, now_ns);
			continue;
		}
		if (length > WINDOW)
			length = WINDOW;
		memcpy(talk->window.bytes, bytes, length);
		talk->window.at = 0;
		talk->window.end = length;
		cursor.wants = details_wanted(&talk->c, direction);
		for (__u32 turn = 0;; turn++, talk->turns++) {
			before = talk->window.at;
			if (http_step(turn, &cursor))
				break;
			assert(talk->window.at > before && talk->window.at <= length);
		}
	}
}

void talk_unseen(struct talk *talk, __u32 direction, __u64 length, __u64 now_ns)
{
	unseen_passed(&talk->c, direction, length, now_ns);
}

/* The connection is over, as connection_over says it. */
void talk_end(struct talk *talk, bool by_server, __u64 now_ns)
{
	struct connection *c = &talk->c;
	struct lane *answer = lane_of(c, !request_direction(c));

	if (c->unread || c->on_trial || c->made == c->answered)
		return;
	if (answer->place == AT_BODY_TO_CLOSE && by_server)
		exchange_ended(c, OUTCOME_COMPLETE, answer->last_ns);
	exchange_ended(c, by_server ? OUTCOME_ABORTED_BY_SERVER : OUTCOME_ABORTED_BY_CLIENT,
		       now_ns);
}

const struct exchange *talk_exchanges(const struct talk *talk, __u32 *count)
{
	*count = talk->count;
	return talk->exchanges;
}

/* What else has to be the same: why it is not read, and where the next bytes lie. */
void talk_state(const struct talk *talk, __u64 state[12])
{
	const struct connection *c = &talk->c;

	*state++ = c->unread;
	*state++ = c->on_trial;
	for (int direction = 0; direction < 2; direction++) {
		const struct lane *lane = &c->lanes[direction];

		*state++ = lane->place;
		*state++ = lane->flags;
		*state++ = lane->status;
		*state++ = body_ahead(lane);
		*state++ = lane->body_bytes;
	}
}

/* One operation of a conversation. */
struct part {
	const __u8 *bytes;
	__u32 length;
	__u32 direction;
};

/* Feeds PARTS, the time of each of which is its number. Each is cut in pieces of 1 to MOST bytes,
 * after the numbers that start with *SEED; 0: not at all. */
static __u64 next_random(__u64 *seed)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return *seed * 0x2545F4914F6CDD1DULL >> 16;
}

void talk_feed_parts(struct talk *talk, const struct part *parts, __u32 count, __u32 most,
		     __u64 *seed)
{
	for (__u32 i = 0; i < count; i++) {
		for (__u32 at = 0, length; at < parts[i].length; at += length) {
			length = parts[i].length - at;
			if (most && length > 1) {
				__u32 cut = most == 1 ? 1 : 1 + next_random(seed) % most;

				length = cut < length ? cut : length;
			}
			talk_feed(talk, parts[i].direction, parts[i].bytes + at, length, i + 1);
		}
	}
}

/* The program. */

#define LARGEST	   4096
#define MOST_PARTS 12

static const char *const requests[] = {
    "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET /users/42?q=1 HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nUser-Agent: b/1\r\n\r\n",
    "HEAD /h HTTP/1.0\r\n\r\n",
    "POST /p HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
    "POST /p HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nA: b\r\n\r\n",
    "PUT http://a/b HTTP/1.1\r\nExpect: 100-continue\r\ncontent-length:  3 \r\n\r\nabc",
    "OPTIONS * HTTP/1.1\nHost: a\n\n",
    "CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    "get /lower HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "POST /g HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\nxxxx",
    "GET /a HTTP/1.1\r\nHost: a\r\n\r\nGET /b HTTP/1.1\r\n\r\nGET /c HTTP/1.1\r\n\r\n",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "\x16\x03\x01\x02\x00\x01\x00",
    "EHLO a\r\n",
    "GET http://u:p@a.example:8080/b?c=d HTTP/1.1\r\nHost: b\r\n\r\n",
    "GET /t?u HTTP/1.1\r\nTraceparent: "
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\nhost: a:80\r\n\r\n",
};

static const char *const responses[] = {
    "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "HTTP/1.1 200 OK\r\nServer: a\r\nTransfer-Encoding: "
    "chunked\r\n\r\na;x=y\r\n0123456789\r\n0\r\n\r\n",
    "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n",
    "HTTP/1.1 204\r\n\r\n",
    "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
    "HTTP/1.0 200 OK\r\n\r\nuntil the end",
    "HTTP/1.1 101 Switching Protocols\r\n\r\n\x81\x05hello",
    "HTTP/1.1 500 \nContent-Length: 1\nContent-Length: 1\n\nx",
    "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nzz",
    "220 a ESMTP\r\n",
};

static const char *const words[] = {
    "\r\n",
    "\n",
    "\r",
    " ",
    ":",
    "0",
    "5\r\n",
    "0\r\n\r\n",
    "HTTP/1.1",
    "GET /x HTTP/1.1\r\n\r\n",
    "HTTP/1.1 200 OK\r\n\r\n",
    "Content-Length: 7\r\n",
    "Content-Length",
    "content-lengths: 3\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding : chunked\r\n",
    "Transfer-Encoding: gzip, chunked\r\n",
    "X-Content-Length: 3\r\n",
    "Host: b\r\n",
    "traceparent: 01-0123456789abcdef0123456789abcdef-0123456789abcdef-00-a\r\n",
    "trace",
    "@",
    "chunked",
    ",",
    "\t",
    "?",
    "//",
    "18446744073709551616",
    "fffffffffffffff",
    "\0",
};

#define ONE_OF(all, seed) ((all)[next_random(seed) % (sizeof(all) / sizeof((all)[0]))])

static __u32 insert(__u8 *to, __u32 length, __u32 at, const void *bytes, __u32 count)
{
	if (length + count > LARGEST)
		return length;
	memmove(to + at + count, to + at, length - at);
	memcpy(to + at, bytes, count);
	return length + count;
}

static __u32 mutated(__u8 *bytes, __u32 length, __u64 *seed)
{
	__u32 at = next_random(seed) % (length + 1), count = next_random(seed) % 16;
	const char *word = ONE_OF(words, seed);
	__u8 copy[16];

	if (count > length - at)
		count = length - at;
	switch (next_random(seed) % 6) {
	case 0:
		if (count)
			bytes[at] ^= 1 << next_random(seed) % 8;
		break;
	case 1:
		if (count)
			bytes[at] = next_random(seed);
		break;
	case 2: /* some are gone */
		memmove(bytes + at, bytes + at + count, length - at - count);
		return length - count;
	case 3: /* some come twice */
		memcpy(copy, bytes + at, count);
		return insert(bytes, length, at, copy, count);
	default:
		return insert(bytes, length, at, word, *word ? strlen(word) : 1);
	}
	return length;
}

static __u32 made_up(__u8 *bytes, __u32 direction, __u64 *seed)
{
	const char *message = direction == SENT ? ONE_OF(requests, seed) : ONE_OF(responses, seed);
	__u32 length = strlen(message), kind = next_random(seed) % 16, changes;

	if (kind == 0) {
		length = next_random(seed) % 64;
		for (__u32 i = 0; i < length; i++)
			bytes[i] = next_random(seed);
		return length;
	}
	memcpy(bytes, message, length);
	if (kind == 1) { /* a long header, so that windows end everywhere */
		__u8 many[700];

		memset(many, 'h', sizeof(many));
		length = insert(bytes, length, next_random(seed) % length, many,
				next_random(seed) % 700);
	}
	changes = kind < 8 ? 0 : 1 + next_random(seed) % 4;
	for (__u32 i = 0; i < changes; i++)
		length = mutated(bytes, length, seed);
	return length;
}

static void assert_equal(const struct talk *one, const struct talk *other, __u64 seed)
{
	__u64 states[2][12] = {};

	talk_state(one, states[0]);
	talk_state(other, states[1]);
	if (one->count == other->count && !memcmp(states[0], states[1], sizeof(states[0])) &&
	    !memcmp(one->exchanges, other->exchanges, one->count * sizeof(one->exchanges[0])))
		return;
	fprintf(stderr, "the answer depends on how the bytes are cut: seed %llu\n", seed);
	fprintf(stderr, "exchanges: %u, %u; states:\n", one->count, other->count);
	for (int i = 0; i < 12; i++)
		fprintf(stderr, "%llu, %llu\n", states[0][i], states[1][i]);
	abort();
}

int main(int argc, char **argv)
{
	static __u8 bytes[MOST_PARTS][LARGEST];
	static struct talk whole, cut, single;
	__u64 first = argc > 1 ? strtoull(argv[1], NULL, 10) : 1, taken = 0, turns = 0;
	__u64 count = argc > 2 ? strtoull(argv[2], NULL, 10) : 1000;
	__u64 outcomes[OUTCOME_UNKNOWN + 1] = {};
	struct part parts[MOST_PARTS];

	for (__u64 i = 0; i < count; i++) {
		__u64 seed = (first + i) * 0x9E3779B97F4A7C15ULL | 1, pieces;
		__u8 role = next_random(&seed) % 2 ? HTTP_CLIENT : HTTP_SERVER;
		bool on_trial = next_random(&seed) % 8 == 0, by_server = next_random(&seed) % 2;
		__u32 wants = next_random(&seed) % 8;
		__u32 used = 1 + next_random(&seed) % MOST_PARTS;

		for (__u32 j = 0; j < used; j++) {
			__u32 asks = next_random(&seed) % 8 ? j % 2 == 0 : next_random(&seed) % 2;

			parts[j].bytes = bytes[j];
			parts[j].length = made_up(bytes[j], asks ? SENT : RECEIVED, &seed);
			parts[j].direction = asks == (role == HTTP_CLIENT) ? SENT : RECEIVED;
		}
		pieces = seed;
		talk_begin(&whole, role, on_trial);
		talk_begin(&cut, role, on_trial);
		talk_begin(&single, role, on_trial);
		talk_want(&whole, wants);
		talk_want(&cut, wants);
		talk_want(&single, wants);
		talk_feed_parts(&whole, parts, used, 0, &pieces);
		talk_feed_parts(&cut, parts, used, 1 + next_random(&seed) % 40, &pieces);
		talk_feed_parts(&single, parts, used, 1, &pieces);
		assert_equal(&whole, &cut, first + i);
		assert_equal(&whole, &single, first + i);
		talk_end(&whole, by_server, used + 1);
		talk_end(&cut, by_server, used + 1);
		assert_equal(&whole, &cut, first + i);
		for (__u32 j = 0; j < whole.count; j++)
			outcomes[whole.exchanges[j].outcome]++;
		taken += whole.bytes + cut.bytes + single.bytes;
		turns += whole.turns + cut.turns + single.turns;
		assert(whole.turns <= whole.bytes && !whole.lost);
	}
	printf("{\"conversations\": %llu, \"bytes\": %llu, \"turns\": %llu, \"outcomes\": "
	       "[%llu, %llu, %llu, %llu, %llu, %llu]}\n",
	       count, taken, turns, outcomes[0], outcomes[1], outcomes[2], outcomes[3], outcomes[4],
	       outcomes[5]);
	return 0;
}
