// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * A client and a server, each a thread, that speak HTTP over TLS through all functions of OpenSSL
 * that pass bytes.
 *
 *	openssl plain|inner|kernel REQUESTS
 *
 * With `kernel`, the kernel encrypts and decrypts where it can (kTLS), and each response has a
 * body of BODY bytes, by SSL_sendfile where the kernel encrypts.
 * With `inner`, what they say is encrypted twice: a BIO of their own passes the bytes of the
 * inner session through the outer one, by calls inside of calls. Prints the client's port and
 * waits for a byte on standard input; in the end prints "done" and waits for another one. The
 * buffers into which bytes are read or peeked contain a request that nobody has sent.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>

#define BODY  1000
#define GHOST "GET /ghost HTTP/1.1\r\nHost: nobody\r\n\r\n"

#pragma weak SSL_sendfile /* OpenSSL 1.1 has none, nor is it called there */

static int requests;
static int is_inner;
static int is_by_kernel;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* By functions that OpenSSL 1.1 has, too. */
static EVP_PKEY *new_key(void)
{
	EVP_PKEY_CTX *context = EVP_PKEY_CTX_new_id(EVP_PKEY_EC, NULL);
	EVP_PKEY *key = NULL;

	if (EVP_PKEY_keygen_init(context) != 1 ||
	    EVP_PKEY_CTX_ctrl_str(context, "ec_paramgen_curve", "P-256") != 1 ||
	    EVP_PKEY_keygen(context, &key) != 1)
		die("key");
	EVP_PKEY_CTX_free(context);
	return key;
}

static SSL_CTX *server_context(void)
{
	SSL_CTX *context = SSL_CTX_new(TLS_server_method());
	EVP_PKEY *key = new_key();
	X509 *certificate = X509_new();
	X509_NAME *name = X509_get_subject_name(certificate);

	ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
	X509_gmtime_adj(X509_getm_notBefore(certificate), -60);
	X509_gmtime_adj(X509_getm_notAfter(certificate), 86400);
	X509_set_pubkey(certificate, key);
	X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const void *)"localhost", -1, -1, 0);
	X509_set_issuer_name(certificate, name);
	X509_sign(certificate, key, EVP_sha256());
	if (SSL_CTX_use_certificate(context, certificate) != 1 ||
	    SSL_CTX_use_PrivateKey(context, key) != 1)
		die("certificate");
	return context;
}

/* A BIO that passes bytes through an SSL object, as exported functions do. */

static int outer_read(BIO *bio, char *to, int length)
{
	return SSL_read(BIO_get_data(bio), to, length);
}

static int outer_write(BIO *bio, const char *from, int length)
{
	return SSL_write(BIO_get_data(bio), from, length);
}

static long outer_control(BIO *bio, int command, long number, void *pointer)
{
	(void)bio, (void)number, (void)pointer;
	return command == BIO_CTRL_FLUSH;
}

static SSL *inside(SSL_CTX *context, SSL *outer)
{
	BIO_METHOD *method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_FILTER, "outer");
	SSL *inner = SSL_new(context);
	BIO *bio;

	BIO_meth_set_read(method, outer_read);
	BIO_meth_set_write(method, outer_write);
	BIO_meth_set_ctrl(method, outer_control);
	bio = BIO_new(method);
	BIO_set_data(bio, outer);
	BIO_set_init(bio, 1);
	SSL_set_bio(inner, bio, bio);
	return inner;
}

/* Reads until what came ends with an empty line and has LEAST bytes, each time by another function,
 * now and then only a few bytes. */
static void read_head(SSL *ssl, int turn, char *head, size_t least)
{
	size_t length = 0, count;
	int result;

	for (int i = turn; length < least || memcmp(head + length - 4, "\r\n\r\n", 4); i++) {
		char buffer[512] = GHOST, peeked[512] = GHOST;

		if (i % 3 == 1)
			SSL_peek(ssl, peeked, sizeof(peeked));
		if (i % 3 == 2)
			SSL_peek_ex(ssl, peeked, sizeof(peeked), &count);
		if (i % 2) {
			if (SSL_read_ex(ssl, buffer, i % 5 == 0 ? 5 : sizeof(buffer), &count) != 1)
				continue; /* nothing is there yet: what it holds is no request */
		} else {
			result = SSL_read(ssl, buffer, i % 5 == 0 ? 5 : sizeof(buffer));
			if (result <= 0)
				continue;
			count = result;
		}
		memcpy(head + length, buffer, count);
		length += count;
	}
	head[length] = 0;
}

static void write_all(SSL *ssl, int turn, const char *text)
{
	size_t length = strlen(text), count = 0;

	if (turn % 2 ? SSL_write_ex(ssl, text, length, &count) != 1
		     : SSL_write(ssl, text, length) != (int)length)
		die("write");
}

static void let_kernel_encrypt(SSL_CTX *context)
{
	SSL_CTX_set_options(context, SSL_OP_ENABLE_KTLS);
	SSL_CTX_set_max_proto_version(context, TLS1_2_VERSION); /* in which it can decrypt, too */
}

/* Sends a file that ends with an empty line. */
static void send_body(SSL *ssl)
{
	char text[BODY];
	int file;

	memset(text, 'x', BODY - 4);
	memcpy(text + BODY - 4, "\r\n\r\n", 4);
	if (!BIO_get_ktls_send(SSL_get_wbio(ssl))) {
		if (SSL_write(ssl, text, BODY) != BODY)
			die("body");
		return;
	}
	file = memfd_create("body", 0);
	if (write(file, text, BODY) != BODY || SSL_sendfile(ssl, file, 0, BODY, 0) != BODY)
		die("sendfile");
	close(file);
}

static int response(char *text, int turn)
{
	return sprintf(text, "HTTP/1.1 %d Said\r\nContent-Length: %d\r\n\r\n",
		       is_by_kernel ? 200 : 200 + turn % 50, is_by_kernel ? BODY : 0);
}

struct listening {
	SSL_CTX *context;
	int fd;
};

static void *serve(void *argument)
{
	struct listening *listening = argument;
	SSL *ssl = SSL_new(listening->context), *outer = ssl;
	int fd = accept(listening->fd, NULL, NULL);
	char head[4096], text[256];

	SSL_set_fd(ssl, fd);
	if (SSL_accept(ssl) != 1)
		die("accept");
	if (is_inner) {
		ssl = inside(listening->context, outer);
		if (SSL_accept(ssl) != 1)
			die("inner accept");
	} else {
		fcntl(fd, F_SETFL, O_NONBLOCK);
	}
	for (int i = 0; i < requests; i++) {
		read_head(ssl, i, head, 4);
		response(text, i);
		write_all(ssl, i, text);
		if (is_by_kernel)
			send_body(ssl);
	}
	SSL_shutdown(ssl);
	if (ssl != outer)
		SSL_free(ssl);
	SSL_free(outer);
	close(fd);
	return NULL;
}

static void ask(int fd)
{
	SSL_CTX *context = SSL_CTX_new(TLS_client_method());
	SSL *ssl, *outer;
	char head[4096], text[256];

	if (is_by_kernel)
		let_kernel_encrypt(context);
	ssl = outer = SSL_new(context);
	SSL_set_fd(ssl, fd);
	if (SSL_connect(ssl) != 1)
		die("connect");
	if (is_inner) {
		ssl = inside(context, outer);
		if (SSL_connect(ssl) != 1)
			die("inner connect");
	}
	for (int i = 0; i < requests; i++) {
		sprintf(text, "GET /said/%d HTTP/1.1\r\nHost: localhost\r\n\r\n", i);
		write_all(ssl, i + 1, text);
		read_head(ssl, i + 1, head, response(text, i) + (is_by_kernel ? BODY : 0));
	}
	SSL_shutdown(ssl);
	if (ssl != outer)
		SSL_free(ssl);
	SSL_free(outer);
	close(fd);
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = {.sin_family = AF_INET,
				      .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t length = sizeof(address);
	struct listening listening = {.fd = socket(AF_INET, SOCK_STREAM, 0)};
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	pthread_t server;

	if (argc != 3)
		return 2;
	is_inner = !strcmp(argv[1], "inner");
	is_by_kernel = !strcmp(argv[1], "kernel");
	requests = atoi(argv[2]);
	listening.context = server_context();
	if (is_by_kernel)
		let_kernel_encrypt(listening.context);
	if (bind(listening.fd, (void *)&address, length) || listen(listening.fd, 1) ||
	    getsockname(listening.fd, (void *)&address, &length) ||
	    connect(fd, (void *)&address, length) || getsockname(fd, (void *)&address, &length))
		die("socket");
	printf("%d\n", ntohs(address.sin_port));
	fflush(stdout);
	getchar();
	pthread_create(&server, NULL, serve, &listening);
	ask(fd);
	pthread_join(server, NULL);
	printf("done\n");
	fflush(stdout);
	getchar();
	return 0;
}
