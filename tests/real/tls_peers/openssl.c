/* TLS with OpenSSL. */
#include "peer.h"

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <string.h>

static SSL *ssl;
static int last_alert = -1;
static long received;

static void on_info(const SSL *about, int where, int value) {
    (void)about;
    if (where & SSL_CB_ALERT && where & SSL_CB_READ && (value >> 8) == SSL3_AL_FATAL) last_alert = value & 0xff;
    if (where & SSL_CB_ALERT && where & SSL_CB_READ && (value >> 8) == SSL3_AL_WARNING && (value & 0xff) != SSL_AD_CLOSE_NOTIFY)
        say("warning %d", value & 0xff);
}

static void on_message(int out, int version, int type, const void *bytes, size_t size, SSL *about, void *nothing) {
    (void)version, (void)about, (void)nothing;
    if (!out && type == SSL3_RT_HANDSHAKE && size && *(const unsigned char *)bytes == SSL3_MT_KEY_UPDATE) received++;
}

static const char *reason(void) {
    const char *text = ERR_reason_error_string(ERR_peek_error());
    ERR_clear_error();
    return text ? text : "the connection ended without close_notify";
}

static ssize_t result(int count) {
    if (count > 0) return count;
    switch (SSL_get_error(ssl, count)) {
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE: return TLS_LATER;
    case SSL_ERROR_ZERO_RETURN: return TLS_END;
    }
    if (last_alert >= 0) say("alert %d", last_alert), ERR_clear_error();
    else say("broken %s", reason());
    return TLS_BROKEN;
}

void tls_start(const struct options *options) {
    SSL_CTX *context = SSL_CTX_new(TLS_method());
    int version = !options->version ? 0 : strcmp(options->version, "1.2") ? TLS1_3_VERSION : TLS1_2_VERSION;
    SSL_CTX_set_min_proto_version(context, version);
    SSL_CTX_set_max_proto_version(context, version);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    if (options->cipher && version == TLS1_2_VERSION) {
        if (!SSL_CTX_set_cipher_list(context, OPENSSL_cipher_name(options->cipher))) fail("suite: %s", reason());
    } else if (options->cipher && !SSL_CTX_set_ciphersuites(context, options->cipher)) fail("suite: %s", reason());
    if (options->padding) SSL_CTX_set_block_padding(context, options->padding);
    if (options->fragment) SSL_CTX_set_max_send_fragment(context, options->fragment);
    if (options->limit) SSL_CTX_set_tlsext_max_fragment_length(context, options->limit);
    if (options->server) {
        if (SSL_CTX_use_certificate_chain_file(context, options->cert) != 1) fail("certificate: %s", reason());
        if (SSL_CTX_use_PrivateKey_file(context, options->key, SSL_FILETYPE_PEM) != 1) fail("key: %s", reason());
    } else {
        if (SSL_CTX_load_verify_locations(context, options->ca, NULL) != 1) fail("ca: %s", reason());
        SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
    }
    ssl = SSL_new(context);
    SSL_set_fd(ssl, options->tls);
    SSL_set_info_callback(ssl, on_info);
    SSL_set_msg_callback(ssl, on_message);
    if (!options->server) SSL_set_tlsext_host_name(ssl, "localhost"), SSL_set1_host(ssl, "localhost");
    if ((options->server ? SSL_accept(ssl) : SSL_connect(ssl)) != 1) fail("handshake failed: %s", reason());
    say("handshake %s %s", SSL_get_version(ssl), SSL_CIPHER_standard_name(SSL_get_current_cipher(ssl)));
}

ssize_t tls_read(void *buffer, size_t size) {
    ERR_clear_error();
    return result(SSL_read(ssl, buffer, size));
}

ssize_t tls_write(const void *buffer, size_t size) {
    ERR_clear_error();
    return result(SSL_write(ssl, buffer, size));
}

/* If the socket is full, the message goes out with the next read or write. */
static void flush(const char *what) {
    ERR_clear_error();
    int done = SSL_do_handshake(ssl);
    int error = SSL_get_error(ssl, done);
    if (done != 1 && error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE) {
        if (last_alert < 0) say("broken %s: %s", what, reason());
    }
}

void tls_update(bool request) {
    if (SSL_key_update(ssl, request ? SSL_KEY_UPDATE_REQUESTED : SSL_KEY_UPDATE_NOT_REQUESTED) != 1) fail("update: %s", reason());
    flush("update");
}

void tls_ticket(void) {
    if (SSL_new_session_ticket(ssl) != 1) fail("ticket: %s", reason());
    flush("ticket");
}

void tls_renegotiate(void) {
    if (SSL_renegotiate(ssl) != 1) say("broken renegotiation: %s", reason());
    else flush("renegotiation");
}

void tls_empty_record(void) { fail("OpenSSL sends no empty records"); }

void tls_close_notify(void) { SSL_shutdown(ssl); }

long tls_updates_received(void) { return received; }
