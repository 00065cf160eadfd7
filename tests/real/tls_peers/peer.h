/* One end of a TLS connection for the interoperability tests: bytes of a plain socket go out sealed, and the other way
 * round. peer.c moves them and obeys; openssl.c, gnutls.c and nss.c each speak TLS with one library.
 *
 * Everything is told by words on the command line (`key=value`, see peer.c), and later by lines on the control socket.
 * What happens is reported on standard output, a line each; tls_fixtures.py reads them. */
#ifndef PEER_H
#define PEER_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

struct options {
    bool server;
    int tls, plain, control;  /* descriptors handed down by the test */
    const char *version;      /* "1.2" or "1.3"; NULL: what both sides like best */
    const char *cipher;       /* the IANA name of the only suite to offer; for GnuTLS a whole priority string */
    const char *ca, *cert, *key; /* PEM files; for NSS `ca` is a database with all of them */
    long update_every;        /* a KeyUpdate after so many bytes, both directions counted together; 0: none */
    bool request;             /* these KeyUpdates ask the other side for one too */
    long ticket_every;        /* a server sends a ticket after so many bytes; 0: none */
    int padding;              /* TLS 1.3 records are padded: OpenSSL to multiples of it, GnuTLS by so many bytes */
    int fragment;             /* plaintext bytes a record, at most; 0: the library's default */
    int limit;                /* the record size limit to announce (RFC 8449), for OpenSSL the RFC 6066 code; 0: none */
};

/* Results of reading and writing beside a count of bytes. TLS_END is the other side's close_notify. */
enum { TLS_END = 0, TLS_LATER = -1, TLS_BROKEN = -2 };

/* Prints one line of the report. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Reports why it cannot go on, and ends the program. */
void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* The handshake; blocks. Reports `handshake VERSION SUITE`. */
void tls_start(const struct options *options);
/* Neither blocks. A failure is reported first: `alert N` where one was received, else `broken REASON`. */
ssize_t tls_read(void *buffer, size_t size);
ssize_t tls_write(const void *buffer, size_t size);
/* These are called while nothing is half written. */
void tls_update(bool request);
void tls_ticket(void);
void tls_renegotiate(void);
void tls_empty_record(void);
void tls_close_notify(void);
/* KeyUpdates received so far, or -1 where the library does not tell. */
long tls_updates_received(void);

#endif
