/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: where requests and responses begin and end, which response belongs to which request,
 * and how many bytes of a body are left (RFC 9112, 6).
 */
#pragma once

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
	lane->wants = 0;
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
	lane->wants = c->wants | request->wants; /* see details_begin */
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
	if (lane_of(c, request_direction(c))->place == AT_BODY_TO_CLOSE && c->made == c->answered)
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
