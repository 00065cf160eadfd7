/* TLS with NSS. Certificates come from a database, in which that of the server is named `server`. */
#include "peer.h"

#include <cert.h>
#include <keyhi.h>
#include <nss.h>
#include <pk11pub.h>
#include <prerror.h>
#include <private/pprio.h>
#include <ssl.h>
#include <sslexp.h>
#include <sslproto.h>
#include <string.h>

static PRFileDesc *stream;
static int last_alert = -1;

static void must(SECStatus status, const char *what) {
    if (status != SECSuccess) fail("%s: %s", what, PR_ErrorToName(PR_GetError()));
}

static void on_alert(const PRFileDesc *about, void *nothing, const SSLAlert *alert) {
    (void)about, (void)nothing;
    if (alert->level == 2) last_alert = alert->description;
    else if (alert->description != 0) say("warning %d", alert->description);
}

static ssize_t result(PRInt32 count) {
    if (count >= 0) return count;
    if (PR_GetError() == PR_WOULD_BLOCK_ERROR) return TLS_LATER;
    if (last_alert >= 0) say("alert %d", last_alert);
    else say("broken %s", PR_ErrorToName(PR_GetError()));
    return TLS_BROKEN;
}

static void offer_only(const char *name) {
    PRBool found = PR_FALSE;
    for (int i = 0; i < SSL_GetNumImplementedCiphers(); i++) {
        PRUint16 suite = SSL_GetImplementedCiphers()[i];
        SSLCipherSuiteInfo about;
        must(SSL_GetCipherSuiteInfo(suite, &about, sizeof about), "suite");
        PRBool wanted = !strcmp(about.cipherSuiteName, name);
        must(SSL_CipherPrefSet(stream, suite, wanted), "suite");
        found |= wanted;
    }
    if (!found) fail("NSS has no suite %s", name);
}

static void use_certificate(void) {
    CERTCertificate *certificate = PK11_FindCertFromNickname("server", NULL);
    SECKEYPrivateKey *key = certificate ? PK11_FindKeyByAnyCert(certificate, NULL) : NULL;
    if (!key) fail("the database has no certificate `server` with its key");
    must(SSL_ConfigServerSessionIDCache(0, 0, 0, NULL), "session cache");
    must(SSL_ConfigServerCert(stream, certificate, key, NULL, 0), "certificate");
}

void tls_start(const struct options *options) {
    must(NSS_Init(options->ca), "database");
    must(NSS_SetDomesticPolicy(), "policy");
    stream = SSL_ImportFD(NULL, PR_ImportTCPSocket(options->tls));
    if (!stream) fail("socket: %s", PR_ErrorToName(PR_GetError()));
    PRUint16 version = !options->version ? 0 : strcmp(options->version, "1.2") ? SSL_LIBRARY_VERSION_TLS_1_3 : SSL_LIBRARY_VERSION_TLS_1_2;
    SSLVersionRange range = {version ? version : SSL_LIBRARY_VERSION_TLS_1_2, version ? version : SSL_LIBRARY_VERSION_TLS_1_3};
    must(SSL_VersionRangeSet(stream, &range), "version");
    if (options->cipher) offer_only(options->cipher);
    if (options->limit) must(SSL_OptionSet(stream, SSL_RECORD_SIZE_LIMIT, options->limit), "limit");
    must(SSL_OptionSet(stream, SSL_ENABLE_SESSION_TICKETS, PR_TRUE), "tickets");
    must(SSL_OptionSet(stream, SSL_ENABLE_RENEGOTIATION, SSL_RENEGOTIATE_REQUIRES_XTN), "renegotiation");
    must(SSL_AlertReceivedCallback(stream, on_alert, NULL), "alerts");
    if (options->server) use_certificate();
    else must(SSL_SetURL(stream, "localhost"), "name");
    must(SSL_ResetHandshake(stream, options->server), "handshake");
    must(SSL_ForceHandshake(stream), "handshake failed");
    SSLChannelInfo channel;
    SSLCipherSuiteInfo suite;
    must(SSL_GetChannelInfo(stream, &channel, sizeof channel), "channel");
    must(SSL_GetCipherSuiteInfo(channel.cipherSuite, &suite, sizeof suite), "suite");
    say("handshake TLSv1.%d %s", channel.protocolVersion - SSL_LIBRARY_VERSION_TLS_1_0, suite.cipherSuiteName);
    PRSocketOptionData quick = {.option = PR_SockOpt_Nonblocking, .value.non_blocking = PR_TRUE};
    if (PR_SetSocketOption(stream, &quick) != PR_SUCCESS) fail("socket: %s", PR_ErrorToName(PR_GetError()));
}

ssize_t tls_read(void *buffer, size_t size) { return result(PR_Read(stream, buffer, size)); }

ssize_t tls_write(const void *buffer, size_t size) { return result(PR_Write(stream, buffer, size)); }

void tls_update(bool request) { must(SSL_KeyUpdate(stream, request), "update"); }

void tls_ticket(void) { must(SSL_SendSessionTicket(stream, NULL, 0), "ticket"); }

void tls_renegotiate(void) { must(SSL_ReHandshake(stream, PR_TRUE), "renegotiation"); }

void tls_empty_record(void) { fail("NSS sends no empty records"); }

void tls_close_notify(void) { PR_Shutdown(stream, PR_SHUTDOWN_SEND); }

long tls_updates_received(void) { return -1; }
