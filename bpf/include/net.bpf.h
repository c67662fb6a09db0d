/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * Sockets as the programs see them: the members that they use, as in kernel.bpf.h, and the figures
 * that follow from a struct sock alone.
 */
#pragma once

#include "kernel.bpf.h"

#define ADDRESS_BYTES 16

#ifdef CORAL_BCC

/* The kernel has a function of that name. */
#pragma push_macro("kernel_read")
#undef kernel_read
#include <net/inet_hashtables.h>
#include <net/inet_sock.h>
#include <net/net_namespace.h>
#include <linux/tcp.h>
#pragma pop_macro("kernel_read")

#define member_offset(type, member) offsetof(type, member)
#define HAVE_IPV6		    IS_ENABLED(CONFIG_IPV6)
#define kernel_has_ipv6(sk)	    true

/* A bit field has no address: these are bits of the byte before the next member. */
static __always_inline __u8 congestion_state(struct sock *sk)
{
	struct inet_connection_sock *icsk = (void *)sk;
	__u8 bits = 0;

	bpf_probe_read_kernel(&bits, sizeof(bits), &icsk->icsk_retransmits - 1);
	return bits & 0x1F;
}

#else

#include <bpf/bpf_endian.h>

#ifndef AF_INET
#define AF_INET	 2
#define AF_INET6 10
#endif

enum {
	TCP_ESTABLISHED = 1,
	TCP_SYN_SENT,
	TCP_SYN_RECV,
	TCP_FIN_WAIT1,
	TCP_FIN_WAIT2,
	TCP_TIME_WAIT,
	TCP_CLOSE,
	TCP_CLOSE_WAIT,
	TCP_LAST_ACK,
	TCP_LISTEN,
	TCP_CLOSING,
};

#define RCV_SHUTDOWN  1
#define SEND_SHUTDOWN 2
#define SHUTDOWN_MASK 3

#define SOCK_DONE 1 /* enum sock_flags: the peer's FIN has come */

#define IPPROTO_TCP   6
#define IPPROTO_MPTCP 262

#define SOCKFS_MAGIC 0x534F434B

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct in6_addr {
	union {
		__u8 u6_addr8[ADDRESS_BYTES];
	} in6_u;
};

typedef struct {
	__s64 counter;
} atomic64_t;

struct ns_common {
	unsigned int inum;
};

struct net {
	struct ns_common ns;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	unsigned char skc_state;
	int skc_bound_dev_if;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	atomic64_t skc_cookie;
	unsigned long skc_flags;
};

typedef struct {
	int owned;
} socket_lock_t;

struct sock {
	struct sock_common __sk_common;
	int sk_err;
	socket_lock_t sk_lock;
	atomic_t sk_drops;
	__u32 sk_ack_backlog;
	__u32 sk_max_ack_backlog;
	__u16 sk_protocol;
	__u8 sk_shutdown;
};

struct request_sock {
	struct sock_common __req_common;
};

struct inet_sock {
	struct sock sk;
	__be16 inet_sport;
};

struct inet_bind_bucket {
	signed char fastreuse;
};

struct inet_connection_sock {
	struct inet_sock icsk_inet;
	struct inet_bind_bucket *icsk_bind_hash;
	__u8 icsk_ca_state : 5;
	struct {
		__u32 lrcvtime;
	} icsk_ack;
};

struct minmax_sample {
	__u32 t;
	__u32 v;
};

struct minmax {
	struct minmax_sample s[3];
};

struct tcp_rack {
	__u32 rtt_us;
};

struct list_head {
	struct list_head *next;
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	struct list_head tsorted_sent_queue;
	__u32 copied_seq;
	__u32 rcv_nxt;
	__u32 snd_nxt;
	__u32 snd_una;
	__u32 write_seq;
	__u32 lsndtime;
	__u32 srtt_us;
	__u32 mdev_us;
	__u32 snd_cwnd;
	__u32 snd_ssthresh;
	__u32 mss_cache;
	__u32 delivered;
	__u32 segs_in;
	__u32 segs_out;
	__u32 total_retrans;
	__u64 bytes_sent;
	__u64 bytes_acked;
	__u64 bytes_received;
	__u64 bytes_retrans;
	struct minmax rtt_min;
	struct tcp_rack rack;
};

/* The kernel's reasons for sending a reset (6.10); their values differ between versions. */
enum sk_rst_reason {
	SK_RST_REASON_NOT_SPECIFIED,
	SK_RST_REASON_NO_SOCKET,
	SK_RST_REASON_TCP_INVALID_ACK_SEQUENCE,
	SK_RST_REASON_TCP_RFC7323_PAWS,
	SK_RST_REASON_TCP_TOO_OLD_ACK,
	SK_RST_REASON_TCP_ACK_UNSENT_DATA,
	SK_RST_REASON_TCP_FLAGS,
	SK_RST_REASON_TCP_OLD_ACK,
	SK_RST_REASON_TCP_ABORT_ON_DATA,
	SK_RST_REASON_TCP_TIMEWAIT_SOCKET,
	SK_RST_REASON_INVALID_SYN,
	SK_RST_REASON_TCP_ABORT_ON_CLOSE,
	SK_RST_REASON_TCP_ABORT_ON_LINGER,
	SK_RST_REASON_TCP_ABORT_ON_MEMORY,
	SK_RST_REASON_TCP_STATE,
	SK_RST_REASON_TCP_KEEPALIVE_TIMEOUT,
	SK_RST_REASON_TCP_DISCONNECT_WITH_DATA,
};

struct seq_file;
struct bpf_map;

struct super_block {
	unsigned long s_magic;
};

struct inode {
	struct super_block *i_sb;
};

struct file {
	struct inode *f_inode;
	void *private_data;
};

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__bpf_map_elem {
	struct bpf_iter_meta *meta;
	struct bpf_map *map;
	void *key;
	void *value;
};

struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	__u32 fd;
	struct file *file;
};

/* Linux 5.14 renamed the member. */
struct task_struct___renamed {
	unsigned int __state;
};

struct task_struct___before {
	long state;
};

struct socket {
	struct sock *sk;
};

/* The socket of an application that uses MPTCP, and each connection that carries its data. */
struct mptcp_sock {
	struct list_head conn_list;
};

struct mptcp_subflow_context {
	struct list_head node;
	struct sock *tcp_sock;
};

#pragma clang attribute pop

#define member_offset(type, member) bpf_core_field_offset(((type *)0)->member)
#define HAVE_IPV6		    1
#define kernel_has_ipv6(sk)	    bpf_core_field_exists((sk)->skc_v6_daddr)
#define kernel_has_mptcp()	    bpf_core_field_exists(((struct mptcp_sock *)0)->conn_list)

#define TASK_NEW 0x800

/* Whether TASK has not run yet. It has its parent's open files before sched_process_fork, from when
 * on its process may be a target. */
static __always_inline bool task_is_new(struct task_struct *task)
{
	struct task_struct___renamed *renamed = (void *)task;
	struct task_struct___before *before = (void *)task;

	if (bpf_core_field_exists(renamed->__state))
		return kernel_read(renamed, __state) & TASK_NEW;
	return kernel_read(before, state) & TASK_NEW;
}

static __always_inline __u8 congestion_state(struct sock *sk)
{
	struct inet_connection_sock *icsk = (void *)sk;

	return BPF_CORE_READ_BITFIELD_PROBED(icsk, icsk_ca_state);
}

/* The socket of an open file, or NULL; a file opened with O_PATH has none. */
static __always_inline struct sock *socket_of(struct file *file)
{
	struct socket *socket;

	if (kernel_read(kernel_read(kernel_read(file, f_inode), i_sb), s_magic) != SOCKFS_MAGIC)
		return NULL;
	socket = kernel_read(file, private_data);
	return socket ? kernel_read(socket, sk) : NULL;
}

#endif

#define TCP_CA_RECOVERY 3
#define TCP_CA_LOSS	4

/*
 * Whether programs can tell the verifier which type an address has (6.2): members of sockets are
 * plain loads then. Functions that also read sockets that may be gone have a constant argument
 * TYPED.
 */
OPTION(bool, typed_sockets, false);

#ifndef CORAL_BCC
extern void *bpf_rdonly_cast(void *address, __u32 type) __ksym __weak;
#define typed_address(pointer)                                                                     \
	((typeof(pointer))bpf_rdonly_cast(pointer, bpf_core_type_id_kernel(typeof(*(pointer)))))
#endif

/* The socket at ADDRESS: subprograms only take numbers. */
static __always_inline struct sock *socket_at(__u64 address)
{
	struct sock *sk = (struct sock *)address;

#ifndef CORAL_BCC
	if (option(typed_sockets))
		return typed_address(sk);
#endif
	return sk;
}

/* An address as a number. The verifier keeps the type of a pointer through assignments, but not
 * when its bytes are swapped. */
static __always_inline __u64 address_of(const void *pointer)
{
	__u64 address = (__u64)pointer;

#ifndef CORAL_BCC
	asm volatile("%0 = be64 %0\n%0 = be64 %0" : "+r"(address));
#endif
	return address;
}

#define socket_read_if(typed, pointer, member)                                                     \
	((typed) ? (pointer)->member : kernel_read(pointer, member))
#define socket_read(pointer, member) socket_read_if(option(typed_sockets), pointer, member)

static __always_inline struct tcp_sock *tcp_of(struct sock *sk, bool typed)
{
#ifndef CORAL_BCC
	if (typed) {
		struct tcp_sock *tp = (struct tcp_sock *)sk;

		return typed_address(tp);
	}
#endif
	return (struct tcp_sock *)sk;
}

/* The lower half of an address, which the verifier takes for a number, unlike the whole. */
static __always_inline __u32 half_of(struct sock *sk)
{
	__u32 half = (__u64)sk;

#ifndef CORAL_BCC
	asm volatile("%0 = %1" : "=w"(half) : "w"((__u32)(__u64)sk));
#endif
	return half;
}

static __always_inline bool is_of_protocol(struct sock *sk, __u16 protocol, bool typed)
{
	__u16 family = socket_read_if(typed, sk, __sk_common.skc_family);

	return (family == AF_INET || family == AF_INET6) &&
	       socket_read_if(typed, sk, sk_protocol) == protocol;
}

static __always_inline bool is_tcp(struct sock *sk, bool typed)
{
	return is_of_protocol(sk, IPPROTO_TCP, typed);
}

/*
 * The listener that SK, its new child, has just been cloned from. Nothing in a socket names it. But
 * a listener never sends, so that its list of sent segments is empty and points to itself; the
 * child has a copy of that pointer until the kernel has set it up.
 */
static __always_inline struct sock *listener_of_child(struct sock *sk)
{
	__u64 list = (__u64)kernel_read((struct tcp_sock *)sk, tsorted_sent_queue.next);

	return (struct sock *)(list - member_offset(struct tcp_sock, tsorted_sent_queue));
}

/*
 * Whether the current task holds the socket's lock, which means that a process is using its socket.
 * Packets and timers, which interrupt arbitrary tasks, leave a socket alone while a process holds
 * it, so that this is false there (sock_owned_by_user in the kernel).
 */
static __always_inline bool held_by_process(struct sock *sk)
{
	return socket_read(sk, sk_lock.owned);
}

/* Whether an administrator destroys it (`ss -K`), whose process holds it then. */
static __always_inline bool is_destroyed_by_other(struct sock *sk)
{
	return socket_read(sk, sk_err) == ECONNABORTED;
}

static __always_inline __u8 state_of(struct sock *sk)
{
	__u8 state = 0;

#ifdef CORAL_BCC /* volatile in the kernel's headers */
	bpf_probe_read_kernel(&state, sizeof(state), (void *)&sk->__sk_common.skc_state);
#else
	state = kernel_read(sk, __sk_common.skc_state);
#endif
	return state;
}

static __always_inline __u32 network_of(struct sock *sk, bool typed)
{
	return kernel_read(socket_read_if(typed, sk, __sk_common.skc_net.net), ns.inum);
}

/* An IPv4 address becomes ::ffff:a.b.c.d, as it is in a dual-stack socket. */
static __always_inline void address_of_v4(__u8 *to, __be32 v4)
{
	__u32 *words = (__u32 *)to;

	words[0] = words[1] = 0;
	words[2] = bpf_htonl(0xFFFF);
	words[3] = v4;
}

/* The addresses of both ends of a socket, or of a request for one. */
static __always_inline void addresses_of(struct sock_common *sk, __u8 *local, __u8 *remote,
					 bool typed)
{
#if HAVE_IPV6
	if (kernel_has_ipv6(sk) && socket_read_if(typed, sk, skc_family) == AF_INET6) {
		struct in6_addr a = kernel_read(sk, skc_v6_rcv_saddr);

		__builtin_memcpy(local, &a, ADDRESS_BYTES);
		a = kernel_read(sk, skc_v6_daddr);
		__builtin_memcpy(remote, &a, ADDRESS_BYTES);
		return;
	}
#endif
	address_of_v4(local, socket_read_if(typed, sk, skc_rcv_saddr));
	address_of_v4(remote, socket_read_if(typed, sk, skc_daddr));
}

/* Stays valid after the kernel has released the port, on the way to CLOSE. */
static __always_inline __u16 local_port_of(struct sock *sk)
{
	return bpf_ntohs(kernel_read((struct inet_sock *)sk, inet_sport));
}

static __always_inline __u16 remote_port_of(struct sock *sk, bool typed)
{
	return bpf_ntohs(socket_read_if(typed, sk, __sk_common.skc_dport));
}
