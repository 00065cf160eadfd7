"""TLS interoperability with clients that use OpenSSL, GnuTLS or NSS: long transfers in both directions, key updates, padding,
small records, connection close, and renegotiation.

Servers with these libraries are tested in test_tls_interop_servers.py, invalid records in test_tls_invalid_records.py.
"""

import socket
import unittest

from fixtures import TIMEOUT, program, wait_for
from imap_client import RawClient
from tls_fixtures import (
    BIG_SIZE, PACKAGES, SUITES, CommandLineClient, InteropSetup, TlsPeer, digest, each_suite, fetch_and_delete_directly,
    gnutls_priority, nss_database,
)


class InteroperabilityTestCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scene = InteropSetup(cls)
        cls.proxy = cls.scene.proxy()
        cls.addClassCleanup(cls.proxy.close)

    def start_tool(self, *command):
        tool = CommandLineClient([str(word) for word in command])
        self.addCleanup(tool.close)
        return tool

    def peer(self, library, version=None, suite=None, port="tls", **options):
        """A client after its TLS handshake; with STARTTLS if `port` is `starttls`."""
        tls = socket.create_connection(("127.0.0.1", self.proxy.ports[port]), timeout=TIMEOUT)
        if port == "starttls":
            before = RawClient.__new__(RawClient)
            before.socket, before.pending = tls, b""
            before.line()
            self.assertTrue(before.command("s", "STARTTLS")[-1].startswith(b"s OK"))
            self.assertEqual(before.pending, b"")
        tls.setblocking(True)
        peer = TlsPeer(library, tls, **self.scene.peer_options(library, version, suite), **options)
        self.addCleanup(peer.close)
        peer.wait_for_report("handshake .*" if not version else rf"handshake TLSv?{version} .*" if not suite or library == "gnutls"
                     else f"handshake TLSv{version} {suite}")
        if port == "tls":
            self.assertIn(b"* OK", peer.line(), peer.output())
        return peer

    def read_and_write(self, client, slow=False):
        """Fetches and appends a big message, compares both, and logs out. A slow client fetches a smaller message."""
        client.login()
        client.select("big")
        number, expected = (2, self.scene.medium) if slow else (1, self.scene.down)
        self.assertEqual(digest(client.fetch(number)), digest(expected))
        client.append("up", self.scene.up)
        self.assertEqual(fetch_and_delete_directly(self.scene.dovecot, "up"), [digest(self.scene.up)])
        client.noop()
        client.logout()


class CipherSuites(InteroperabilityTestCase):
    """Each cipher suite of each TLS version with each listener."""

    def test_openssl_s_client_with_each_suite(self):
        for version, suite in each_suite():
            cipher = {"1.3": ["-ciphersuites", suite, "-tls1_3"], "1.2": ["-cipher", openssl_name(suite), "-tls1_2"]}[version]
            for port, how in (("tls", []), ("starttls", ["-starttls", "imap"])):
                with self.subTest(suite=suite, port=port):
                    client = self.start_tool(program("openssl"), "s_client", "-quiet", "-verify_return_error", "-verify_hostname", "localhost",
                                       "-CAfile", self.scene.certificates.ca, *cipher, *how, "-connect",
                                       f"127.0.0.1:{self.proxy.ports[port]}")
                    # With STARTTLS, s_client does not print the greeting.
                    if port == "tls":
                        self.assertIn(b"* OK", client.line(), client.output())
                    self.read_and_write(client)

    def test_gnutls_cli_with_each_suite(self):
        """gnutls-cli writes its output byte by byte, so `test_libraries_with_each_suite` tests the big download with GnuTLS."""
        for version, suite in each_suite():
            for port, how in (("tls", []), ("starttls", ["--starttls-proto=imap"])):
                with self.subTest(suite=suite, port=port):
                    client = self.start_tool(program("gnutls-cli"), "--logfile=/dev/stderr", f"--x509cafile={self.scene.certificates.ca}",
                                       f"--priority={gnutls_priority(version, suite)}", *how, f"--port={self.proxy.ports[port]}",
                                       "localhost")
                    if port == "tls":
                        self.assertIn(b"* OK", client.line(), client.output())
                    self.read_and_write(client, slow=True)

    def test_nss_tstclnt_with_each_suite(self):
        """tstclnt does not support STARTTLS of IMAP; the next test uses it with NSS."""
        for version, suite in each_suite():
            with self.subTest(suite=suite):
                client = self.start_tool(program("tstclnt"), "-h", "localhost", "-p", self.proxy.ports["tls"], "-4", "-d",
                                   nss_database(self.scene.certificates, self.scene.folder), "-V", f"tls{version}:tls{version}",
                                   "-c", NSS_CIPHERS[suite])
                self.assertIn(b"* OK", client.line(), client.output())
                self.read_and_write(client)

    def test_libraries_with_each_suite(self):
        """The programs in tls_peers with each library, over STARTTLS."""
        for library in PACKAGES:
            for version, suite in each_suite():
                with self.subTest(library=library, suite=suite):
                    self.read_and_write(self.peer(library, version, suite, "starttls"))


class KeyUpdates(InteroperabilityTestCase):
    """Key updates during transfers, around the login and while idle."""

    # Bytes between two key updates. rustls and similar libraries accept 32 key updates without data in between, and a
    # downloading client sends no data. GnuTLS accepts only eight per second, so it requests few.
    EVERY = {("openssl", 0): 1_000_000, ("openssl", 1): 1_000_000, ("gnutls", 0): 1_000_000, ("gnutls", 1): 8_000_000,
             ("nss", 0): 1_000_000, ("nss", 1): 1_000_000}

    def test_key_updates_of_the_client_during_transfers(self):
        for (library, request), every in self.EVERY.items():
            for suite in SUITES["1.3"]:
                with self.subTest(library=library, request=request, suite=suite):
                    peer = self.peer(library, "1.3", suite, update_every=every, request=request)
                    self.read_and_write(peer)
                    sent, received, _ = peer.counts()
                    self.assertGreaterEqual(sent, 2 * BIG_SIZE // every - 1)
                    if library == "openssl":
                        # Several requests may be answered by one key update.
                        self.assertEqual(received > 0, bool(request), peer.output())

    def test_hundreds_of_key_updates_during_an_upload(self):
        for library, request in (("openssl", 0), ("openssl", 1), ("gnutls", 0), ("nss", 0), ("nss", 1)):
            with self.subTest(library=library, request=request):
                peer = self.peer(library, "1.3", update_every=50_000, request=request)
                peer.login()
                peer.append("up", self.scene.up)
                self.assertEqual(fetch_and_delete_directly(self.scene.dovecot, "up"), [digest(self.scene.up)])
                peer.logout()
                self.assertGreaterEqual(peer.counts()[0], BIG_SIZE // 50_000 - 1)

    def test_key_update_flood_ends_the_session(self):
        other_session = self.peer("openssl")
        other_session.login()
        peer = self.peer("openssl", "1.3")
        peer.login()
        peer.send_command("flood")
        peer.wait_for_report("alert 10")
        other_session.noop()

    def test_key_updates_around_the_login(self):
        """Requested key updates before, during and after LOGIN: rustls may still hold answers when the login is accepted."""
        for library in ("openssl", "nss"):
            for every in (40, 60, 100, 200, 400):
                with self.subTest(library=library, every=every):
                    peer = self.peer(library, "1.3", update_every=every, request=1)
                    peer.login()
                    for _ in range(3):
                        peer.noop()
                    peer.logout()
                    self.assertGreater(peer.counts()[0], 0)

    def test_key_updates_while_idle(self):
        """Key updates without data; requested ones are answered."""
        for library in PACKAGES:
            with self.subTest(library=library):
                peer = self.peer(library, "1.3")
                peer.login()
                for _ in range(4):
                    peer.send_command("update")
                    peer.send_command("request")
                    peer.noop()
                peer.logout()
                sent, received, _ = peer.counts()
                self.assertEqual(sent, 8)
                if library == "openssl":
                    self.assertEqual(received, 4)

    def test_twenty_consecutive_key_updates_are_accepted(self):
        """The proxy may refuse a flood of key updates, but must accept the number that a client may send without data."""
        for library in ("openssl", "nss"):
            with self.subTest(library=library):
                peer = self.peer(library, "1.3")
                peer.login()
                for _ in range(20):
                    peer.send_command("update")
                peer.noop()
                peer.logout()

    def test_key_updates_of_s_client_during_a_download(self):
        client = self.start_tool(program("openssl"), "s_client", "-brief", "-verify_return_error", "-CAfile", self.scene.certificates.ca,
                           "-tls1_3", "-connect", f"127.0.0.1:{self.proxy.ports['tls']}")
        self.assertIn(b"* OK", client.line(), client.output())
        client.login()
        client.select("big")
        size = client.start_fetch()
        body = b""
        for letter in (b"k\n", b"K\n") * 5:
            body += client.read_exactly(size // 11)
            client.send(letter)
        body += client.read_exactly(size - len(body))
        self.assertEqual(digest(body), digest(self.scene.down))
        self.assertTrue(client.until(b"a3 ")[-1].startswith(b"a3 OK"))
        client.noop()
        self.assertGreaterEqual(client.output().count("KEYUPDATE"), 10, client.output())


class RecordShapes(InteroperabilityTestCase):
    """Padded, small and empty records, and record size limits."""

    def test_padded_records(self):
        for library, paddings in (("openssl", (512, 16384)), ("gnutls", (1, 300, 8000))):
            for padding in paddings:
                for suite in SUITES["1.3"]:
                    with self.subTest(library=library, padding=padding, suite=suite):
                        self.read_and_write(self.peer(library, "1.3", suite, padding=padding))

    def test_small_records(self):
        for library in ("openssl", "gnutls"):
            for version in SUITES:
                with self.subTest(library=library, version=version):
                    self.read_and_write(self.peer(library, version, fragment=512))

    def test_record_size_limit(self):
        """The client announces a record size limit, which the server may ignore (RFC 8449)."""
        for library, limit in (("openssl", 1), ("openssl", 4), ("gnutls", 512), ("gnutls", 16384), ("nss", 64), ("nss", 16385)):
            for version in SUITES:
                with self.subTest(library=library, limit=limit, version=version):
                    self.read_and_write(self.peer(library, version, limit=limit))

    def test_empty_records(self):
        for version in SUITES:
            with self.subTest(version=version):
                peer = self.peer("gnutls", version)
                peer.send_command("empty")
                peer.login()
                for _ in range(5):
                    peer.send_command("empty")
                    peer.send_command("empty")
                    peer.noop()
                peer.logout()


class ConnectionClose(InteroperabilityTestCase):
    """Every way to close a connection."""

    def for_each_client(self, check, libraries=tuple(PACKAGES)):
        """Runs `check` on a logged-in client of each library and version."""
        for library in libraries:
            for version in SUITES:
                with self.subTest(library=library, version=version):
                    peer = self.peer(library, version)
                    peer.login()
                    check(peer)

    def test_close_notify_is_answered(self):
        def check(peer):
            peer.send_command("close")
            peer.wait_for_report("close_notify")
            peer.wait_for_report("end: .*")

        self.for_each_client(check)

    def test_half_closed_client_receives_all_pending_data(self):
        """Commands before the close_notify of the client are answered completely, including a big message."""
        def check(peer):
            peer.select("big")
            size = peer.start_fetch()
            first = peer.read_exactly(1000)
            peer.send(b"a9 LOGOUT\r\n")
            peer.send_command("close")
            self.assertEqual(digest(first + peer.read_exactly(size - 1000)), digest(self.scene.down), peer.output())
            output = peer.until(b"a9 ")
            self.assertTrue(any(line.startswith(b"* BYE") for line in output), output)
            self.assertEqual(peer.line(), b"")
            peer.wait_for_report("close_notify")

        self.for_each_client(check)

    def test_tcp_close_without_close_notify_ends_the_session(self):
        def check(peer):
            before = self.proxy.log().count("session ended")
            peer.send_command("drop")
            wait_for("the session to end", lambda: self.proxy.log().count("session ended") > before)
            peer.wait_for_report("close_notify|broken .*|alert .*")

        self.for_each_client(check, ("openssl", "gnutls"))

    def test_logout_closes_tls_and_tcp(self):
        """After LOGOUT the proxy sends close_notify and closes TCP."""
        def check(peer):
            peer.logout()
            peer.wait_for_report("close_notify")

        self.for_each_client(check)


class Renegotiation(InteroperabilityTestCase):
    """Renegotiation after the login in TLS 1.2 is refused; the session continues or ends, and does not hang."""

    def test_renegotiation_affects_no_other_session(self):
        for library in PACKAGES:
            with self.subTest(library=library):
                other_session = self.peer("openssl")
                other_session.login()
                peer = self.peer(library, "1.2")
                peer.login()
                peer.send_command("renegotiate")
                # Alert 100 is no_renegotiation; libraries handle it differently.
                peer.wait_for_report("warning 100|broken .*|alert .*")
                other_session.noop()
                other_session.logout()

    def test_gnutls_session_continues_after_refused_renegotiation(self):
        """GnuTLS continues the session after the refusal."""
        peer = self.peer("gnutls", "1.2")
        peer.login()
        peer.send_command("renegotiate")
        peer.wait_for_report("warning 100")
        peer.noop()
        peer.select("big")
        self.assertEqual(digest(peer.fetch()), digest(self.scene.down))
        peer.logout()

    def test_renegotiation_of_s_client_ends_the_session(self):
        client = self.start_tool(program("openssl"), "s_client", "-brief", "-CAfile", self.scene.certificates.ca, "-tls1_2", "-connect",
                           f"127.0.0.1:{self.proxy.ports['tls']}")
        self.assertIn(b"* OK", client.line(), client.output())
        client.login()
        client.send(b"R\n")
        wait_for("s_client to give up", lambda: "no renegotiation" in client.output())
        self.assertEqual(client.line(), b"")


NSS_CIPHERS = {
    "TLS_AES_128_GCM_SHA256": ":1301",
    "TLS_AES_256_GCM_SHA384": ":1302",
    "TLS_CHACHA20_POLY1305_SHA256": ":1303",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": ":C02B",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": ":C02C",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": ":CCA9",
}


def openssl_name(suite):
    """OpenSSL's name of a TLS 1.2 cipher suite."""
    return (suite.removeprefix("TLS_").replace("_WITH", "").replace("AES_128", "AES128").replace("AES_256", "AES256")
            .removesuffix("_SHA256" if "CHACHA20" in suite else "").replace("_", "-"))


if __name__ == "__main__":
    unittest.main()
