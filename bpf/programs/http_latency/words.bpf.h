/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * One idiom: characters, and eight of them as one word, in which several are compared at once.
 */
#pragma once

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

#define ONES  0x0101010101010101ULL
#define HIGHS 0x8080808080808080ULL

/* How many of the eight bytes of WORD, in the order of memory, lie up to the first B, itself
 * included; 0 if there is none. */
static __always_inline __u32 up_to_byte(__u64 word, __u8 b)
{
	__u64 differ = word ^ (ONES * b), found = (differ - ONES) & ~differ & HIGHS;

	if (!found)
		return 0;
	return ((((found & -found) - 1) & ONES) * ONES) >> 56;
}

static __always_inline __u64 word_at(const struct window *window, __u32 at)
{
	return *(const __u64 *)&window->bytes[at & (WINDOW - 1)];
}

/* A hexadecimal digit, or 16. */
static __always_inline __u8 digit_of(__u8 b)
{
	__u8 lower = b | 0x20;

	if (b >= '0' && b <= '9')
		return b - '0';
	return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : 16;
}
