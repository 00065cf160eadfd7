/* TLS with GnuTLS. */
#include "peer.h"

#include <gnutls/gnutls.h>
#include <poll.h>

static gnutls_session_t session;
static const struct options *chosen;

static void must(int code, const char *what) {
    if (code < 0) fail("%s: %s", what, gnutls_strerror(code));
}

static ssize_t result(ssize_t count) {
    switch (count) {
    case GNUTLS_E_AGAIN:
    case GNUTLS_E_INTERRUPTED: return TLS_LATER;
    case GNUTLS_E_WARNING_ALERT_RECEIVED: say("warning %d", gnutls_alert_get(session)); return TLS_LATER;
    case GNUTLS_E_FATAL_ALERT_RECEIVED: say("alert %d", gnutls_alert_get(session)); return TLS_BROKEN;
    case GNUTLS_E_PREMATURE_TERMINATION: say("broken the connection ended without close_notify"); return TLS_BROKEN;
    }
    if (count < 0) return say("broken %s", gnutls_strerror(count)), TLS_BROKEN;
    return count;
}

/* Blocks until a message is sent. */
static void finish(int (*step)(void), const char *what) {
    int code;
    while ((code = step()) == GNUTLS_E_AGAIN || code == GNUTLS_E_INTERRUPTED) {
        struct pollfd on = {.fd = chosen->tls, .events = gnutls_record_get_direction(session) ? POLLOUT : POLLIN};
        poll(&on, 1, -1);
    }
    if (code == GNUTLS_E_WARNING_ALERT_RECEIVED) say("warning %d", gnutls_alert_get(session));
    else if (code < 0) say("broken %s: %s", what, gnutls_strerror(code));
}

void tls_start(const struct options *options) {
    chosen = options;
    gnutls_certificate_credentials_t credentials;
    must(gnutls_certificate_allocate_credentials(&credentials), "credentials");
    if (options->server) must(gnutls_certificate_set_x509_key_file(credentials, options->cert, options->key, GNUTLS_X509_FMT_PEM), "key");
    else must(gnutls_certificate_set_x509_trust_file(credentials, options->ca, GNUTLS_X509_FMT_PEM), "ca");
    must(gnutls_init(&session, (options->server ? GNUTLS_SERVER : GNUTLS_CLIENT) | GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL), "session");
    must(gnutls_priority_set_direct(session, options->cipher ? options->cipher : "NORMAL", NULL), "priority string");
    must(gnutls_credentials_set(session, GNUTLS_CRD_CERTIFICATE, credentials), "credentials");
    if (options->server) {
        gnutls_datum_t key;
        must(gnutls_session_ticket_key_generate(&key), "ticket key");
        must(gnutls_session_ticket_enable_server(session, &key), "tickets");
    } else {
        must(gnutls_server_name_set(session, GNUTLS_NAME_DNS, "localhost", 9), "name");
        gnutls_session_set_verify_cert(session, "localhost", 0);
    }
    if (options->limit) must(gnutls_record_set_max_recv_size(session, options->limit), "limit");
    if (options->fragment) must(gnutls_record_set_max_size(session, options->fragment), "fragment");
    gnutls_transport_set_int(session, options->tls);
    gnutls_handshake_set_timeout(session, GNUTLS_DEFAULT_HANDSHAKE_TIMEOUT);
    int code;
    do code = gnutls_handshake(session);
    while (code < 0 && !gnutls_error_is_fatal(code));
    must(code, "handshake failed");
    say("handshake %s %s", gnutls_protocol_get_name(gnutls_protocol_get_version(session)), gnutls_ciphersuite_get(session));
}

ssize_t tls_read(void *buffer, size_t size) { return result(gnutls_record_recv(session, buffer, size)); }

ssize_t tls_write(const void *buffer, size_t size) {
    if (!chosen->padding) return result(gnutls_record_send(session, buffer, size));
    /* Data and padding share the size of a record. */
    size_t limit = gnutls_record_get_max_size(session) - chosen->padding;
    return result(gnutls_record_send2(session, buffer, size < limit ? size : limit, chosen->padding, 0));
}

static int update(void) { return gnutls_session_key_update(session, 0); }
static int request(void) { return gnutls_session_key_update(session, GNUTLS_KU_PEER); }
static int ticket(void) { return gnutls_session_ticket_send(session, 1, 0); }
static int rehandshake(void) { return chosen->server ? gnutls_rehandshake(session) : gnutls_handshake(session); }
static int empty_record(void) {
    /* In TLS 1.3 padding is required: GnuTLS treats an empty send without it as the end of a cork. */
    if (gnutls_protocol_get_version(session) == GNUTLS_TLS1_3) return gnutls_record_send2(session, "", 0, 16, 0);
    return gnutls_record_send(session, "", 0);
}
static int goodbye(void) { return gnutls_bye(session, GNUTLS_SHUT_WR); }

void tls_update(bool both) { finish(both ? request : update, "update"); }

void tls_ticket(void) { finish(ticket, "ticket"); }

void tls_renegotiate(void) { finish(rehandshake, "renegotiation"); }

void tls_empty_record(void) { finish(empty_record, "empty record"); }

void tls_close_notify(void) { finish(goodbye, "close_notify"); }

long tls_updates_received(void) { return -1; }
