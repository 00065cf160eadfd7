/* One end of a TLS connection for the interoperability tests: it encrypts the bytes of a plaintext socket, and decrypts
 * those of the TLS socket. peer.c forwards bytes and runs commands; openssl.c, gnutls.c and nss.c each use one TLS library.
 *
 * Options are `key=value` arguments (see peer.c); commands are lines on the control socket. Each event is a line on
 * standard output, which tls_fixtures.py reads. */
#ifndef PEER_H
#define PEER_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

struct options {
    bool server;
    int tls, plain, control;  /* descriptors inherited from the test */
    const char *version;      /* "1.2" or "1.3"; NULL: the highest common version */
    const char *cipher;       /* IANA name of the only suite to offer; for GnuTLS a priority string */
    const char *ca, *cert, *key; /* PEM files; for NSS `ca` is a database that contains them */
    long update_every;        /* bytes, both directions together, between two KeyUpdates; 0: none */
    bool request;             /* these KeyUpdates request one of the other side */
    long ticket_every;        /* bytes between two tickets of a server; 0: none */
    int padding;              /* of TLS 1.3 records: a block size for OpenSSL, a number of bytes for GnuTLS */
    int fragment;             /* maximum plaintext bytes per record; 0: the default of the library */
    int limit;                /* record size limit to announce (RFC 8449), for OpenSSL the code of RFC 6066; 0: none */
};

/* Results of reading and writing other than a number of bytes. TLS_END: the other side has sent close_notify. */
enum { TLS_END = 0, TLS_LATER = -1, TLS_BROKEN = -2 };

/* Prints one line to standard output. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Prints the reason of a failure and exits. */
void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* Performs the handshake, blocking, and prints `handshake VERSION SUITE`. */
void tls_start(const struct options *options);
/* These do not block. A failure prints `alert N` if an alert was received, else `broken REASON`. */
ssize_t tls_read(void *buffer, size_t size);
ssize_t tls_write(const void *buffer, size_t size);
/* Only called while no partial write is pending. */
void tls_update(bool request);
void tls_ticket(void);
void tls_renegotiate(void);
void tls_empty_record(void);
void tls_close_notify(void);
/* Number of KeyUpdates received, or -1 if the library does not provide it. */
long tls_updates_received(void);

#endif
