/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: the two headers that tell where a body ends, Content-Length and Transfer-Encoding, and
 * the name of the one by which a client may leave a body out, Expect. All others are skipped.
 */
#pragma once

#define NAME_LENGTH 0 /* content-length */
#define NAME_CODING 1 /* transfer-encoding */
#define NAME_EXPECT 2
#define NAME_ROOM   32

static const __u8 header_names[4][NAME_ROOM] = {"content-length", "transfer-encoding", "expect"};

#define LOWER_CONTENT  LITTLE_8('c', 'o', 'n', 't', 'e', 'n', 't', '-')
#define LOWER_TRANSFER LITTLE_8('t', 'r', 'a', 'n', 's', 'f', 'e', 'r')
#define LOWER_LENGTH   LITTLE_8('l', 'e', 'n', 'g', 't', 'h', ':', 0)
#define LOWER_EXPECT   LITTLE_8('e', 'x', 'p', 'e', 'c', 't', ':', 0)
#define FIRST_7	       (~0ULL >> 8)
#define CASE_BIT       0x20
#define CASE_BITS      (ONES * CASE_BIT)

static __always_inline bool ends_line(__u64 word)
{
	return (__u8)word == '\r' || (__u8)word == '\n';
}

static __always_inline bool is_expect(__u64 word)
{
	return ((word | CASE_BITS >> 16) & FIRST_7) == LOWER_EXPECT;
}

/* Whether a line that begins with WORD has to be looked at: the end of the head, or a header that
 * may matter. */
static __always_inline bool line_matters(__u64 word)
{
	return ends_line(word) || (word | CASE_BITS >> 8) == LOWER_CONTENT ||
	       (word | CASE_BITS) == LOWER_TRANSFER || is_expect(word);
}

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
		if (is_expect(word))
			lane->flags |= EXPECTS;
		if (!ends_line(word))
			lane->place = AT_VALUE;
		return 0;
	}
	lane->column = WORD_BYTES;
	return WORD_BYTES;
}

static __always_inline bool is_blank(__u8 b)
{
	return b == ' ' || b == '\t';
}

static __always_inline void name_step(struct lane *lane, __u8 b)
{
	__u8 lower = b & 0x40 ? b | CASE_BIT : b, wanted;

	if (!lane->column)
		lane->name = lower == 't' ? NAME_CODING : lower == 'e' ? NAME_EXPECT : NAME_LENGTH;
	wanted = header_names[lane->name & 3][lane->column % NAME_ROOM];
	if (b && lower == wanted) {
		lane->column++;
	} else if (b == ':' && !wanted && lane->name == NAME_EXPECT) {
		lane->flags |= EXPECTS;
		token_begin(lane, AT_VALUE);
	} else if (b == ':' && !wanted) {
		token_begin(lane, lane->name == NAME_CODING ? AT_CODING : AT_LENGTH);
	} else {
		/* Some take it for the name all the same. */
		if (!wanted && is_blank(b) && lane->name != NAME_EXPECT)
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

#define LENGTH_DIGITS                                                                              \
	5 /* as many as a word has room for beside the space and the end of the line */
#define LINE_END ('\n' << 8 | '\r')

/* A length as it is mostly written: how many bytes of WORD it took in. */
static __always_inline __u32 length_started(struct lane *lane, __u64 word)
{
	__u32 value = 0, digits = 0;

	if (lane->column || lane->flags & HAS_LENGTH || (__u8)word != ' ')
		return 0;
	word >>= 8;
	for (; digits < LENGTH_DIGITS; digits++, word >>= 8) {
		__u8 digit = (__u8)word - '0';

		if (digit > 9)
			break;
		value = value * 10 + digit;
	}
	if (!digits || (__u16)word != LINE_END)
		return 0;
	lane->flags |= HAS_LENGTH;
	lane->left = value;
	token_begin(lane, AT_FOLD);
	return digits + 3;
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
