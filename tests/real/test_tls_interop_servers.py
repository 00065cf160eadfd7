"""TLS interoperability with servers: OpenSSL, GnuTLS or NSS terminate TLS in front of a Dovecot. Long transfers in both
directions, key updates, late tickets, padding, connection close, and renegotiation.
"""

import socket
import unittest

from fixtures import PASSWORDS, TIMEOUT, wait_for
from imap_client import context
from tls_fixtures import (
    ALICE, BIG_SIZE, PACKAGES, SUITES, ImapConversation, InteropSetup, TlsPeer, digest, each_suite, fetch_and_delete_directly,
)


class ServerInteroperability(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scene = InteropSetup(cls)
        cls.listeners, cls.proxies = {}, {}
        for mode in ("implicit", "starttls"):
            listener = cls.listeners[mode] = socket.create_server(("127.0.0.1", 0))
            cls.addClassCleanup(listener.close)
            listener.settimeout(TIMEOUT)
            cls.proxies[mode] = cls.scene.proxy(listener.getsockname()[1], mode)
            cls.addClassCleanup(cls.proxies[mode].close)

    def session(self, library, version=None, suite=None, mode="implicit", **options):
        """Returns a logged-in client and the TLS endpoint of its server."""
        plain = socket.create_connection(("127.0.0.1", self.proxies[mode].ports["tls"]), timeout=TIMEOUT)
        client = ImapConversation(context(self.scene.certificates.ca).wrap_socket(plain, server_hostname="localhost"))
        self.addCleanup(client.close)
        client.line()
        client.send(f"a1 LOGIN {ALICE} {PASSWORDS[ALICE]}\r\n".encode())
        tls, _ = self.listeners[mode].accept()
        dovecot = socket.create_connection(("127.0.0.1", self.scene.dovecot.port), timeout=TIMEOUT)
        for each in (tls, dovecot):
            each.setblocking(True)
        if mode == "starttls":
            self.offer_starttls(tls, dovecot)
        server = TlsPeer(library, tls, "server", dovecot, **self.scene.peer_options(library, version, suite, "server"), **options)
        self.addCleanup(server.close)
        answer = client.until(b"a1 ")[-1]
        self.assertTrue(answer.startswith(b"a1 OK"), f"{answer}\n{server.output()}\n{self.proxies[mode].log()}")
        if suite and library != "gnutls":
            server.wait_for_report(f"handshake TLSv{version} {suite}")
        return client, server

    @staticmethod
    def offer_starttls(tls, dovecot):
        """Performs the plaintext dialogue of a server up to TLS, and discards the greeting of Dovecot, which must not be sent twice."""
        before = ImapConversation(tls)
        before.send(b"* OK [CAPABILITY IMAP4rev1 STARTTLS] ready\r\n")
        line = before.line()
        assert line.upper().endswith(b" STARTTLS"), line
        before.send(line.split()[0] + b" OK go\r\n")
        greeting = ImapConversation(dovecot)
        greeting.line()
        assert before.pending == greeting.pending == b""
        for each in (tls, dovecot):
            each.setblocking(True)

    def read_and_write(self, client):
        """Fetches and appends a big message, compares both, and logs out."""
        client.select("big")
        self.assertEqual(digest(client.fetch()), digest(self.scene.down))
        client.append("up", self.scene.up)
        self.assertEqual(fetch_and_delete_directly(self.scene.dovecot, "up"), [digest(self.scene.up)])
        client.noop()
        client.logout()
        client.close()

    def test_each_cipher_suite(self):
        for library in PACKAGES:
            for version, suite in each_suite():
                for mode in self.proxies:
                    with self.subTest(library=library, suite=suite, mode=mode):
                        client, server = self.session(library, version, suite, mode)
                        self.read_and_write(client)
                        server.wait_for_report("close_notify")

    def test_key_updates_of_the_server_during_transfers(self):
        # Bytes between two key updates, see KeyUpdates in test_tls_interop_clients.py.
        every = {("openssl", 0): 1_000_000, ("openssl", 1): 1_000_000, ("gnutls", 0): 1_000_000, ("gnutls", 1): 8_000_000,
                 ("nss", 0): 1_000_000, ("nss", 1): 1_000_000}
        for (library, request), every in every.items():
            for suite in SUITES["1.3"]:
                with self.subTest(library=library, request=request, suite=suite):
                    client, server = self.session(library, "1.3", suite, update_every=every, request=request)
                    self.read_and_write(client)
                    sent, received, _ = server.counts()
                    self.assertGreaterEqual(sent, 2 * BIG_SIZE // every - 1)
                    if library == "openssl":
                        self.assertEqual(received > 0, bool(request), server.output())

    def test_hundreds_of_key_updates_during_a_download(self):
        """During a download the proxy sends nothing except answers to requested key updates."""
        for library, request in (("openssl", 0), ("openssl", 1), ("gnutls", 0), ("nss", 0), ("nss", 1)):
            with self.subTest(library=library, request=request):
                client, server = self.session(library, "1.3", update_every=50_000, request=request)
                client.select("big")
                self.assertEqual(digest(client.fetch()), digest(self.scene.down))
                client.noop()
                client.logout()
                client.close()
                self.assertGreaterEqual(server.counts()[0], BIG_SIZE // 50_000 - 1)

    def test_key_updates_around_the_login_response(self):
        for library in ("openssl", "nss"):
            for every in (40, 60, 100, 200, 400):
                with self.subTest(library=library, every=every):
                    client, server = self.session(library, "1.3", update_every=every, request=1)
                    for _ in range(3):
                        client.noop()
                    client.logout()
                    client.close()
                    self.assertGreater(server.counts()[0], 0)

    def test_key_updates_while_idle(self):
        for library in PACKAGES:
            with self.subTest(library=library):
                client, server = self.session(library, "1.3")
                for _ in range(4):
                    server.send_command("update")
                    server.send_command("request")
                    client.noop()
                client.logout()
                client.close()
                sent, received, _ = server.counts()
                self.assertEqual(sent, 8)
                if library == "openssl":
                    self.assertEqual(received, 4)

    def test_session_tickets_after_the_handshake(self):
        """Session tickets during transfers and while idle."""
        for library in PACKAGES:
            with self.subTest(library=library):
                client, server = self.session(library, "1.3", ticket_every=1_000_000)
                for _ in range(4):
                    server.send_command("ticket")
                    client.noop()
                self.read_and_write(client)
                self.assertGreaterEqual(server.counts()[2], 2 * BIG_SIZE // 1_000_000 - 1)

    def test_padded_records(self):
        for library, paddings in (("openssl", (512, 16384)), ("gnutls", (1, 300, 8000))):
            for padding in paddings:
                with self.subTest(library=library, padding=padding):
                    self.read_and_write(self.session(library, "1.3", padding=padding)[0])

    def test_small_records_and_size_limits(self):
        for library, options in (("openssl", {"fragment": 512}), ("gnutls", {"fragment": 512}), ("gnutls", {"limit": 512}),
                                 ("nss", {"limit": 64})):
            for version in SUITES:
                with self.subTest(library=library, version=version, **options):
                    self.read_and_write(self.session(library, version, **options)[0])

    def test_empty_records(self):
        for version in SUITES:
            with self.subTest(version=version):
                client, server = self.session("gnutls", version)
                for _ in range(5):
                    server.send_command("empty")
                    server.send_command("empty")
                    client.noop()
                client.logout()

    def test_close_notify_of_the_server(self):
        for library in PACKAGES:
            for version in SUITES:
                with self.subTest(library=library, version=version):
                    client, server = self.session(library, version)
                    server.send_command("close")
                    self.assertEqual(client.line(), b"")
                    client.close()
                    server.wait_for_report("close_notify")

    def test_tcp_close_during_a_literal_ends_the_session(self):
        """The server closes TCP without close_notify during a literal: the client gets all bytes received before, then the end."""
        for library in ("openssl", "gnutls"):
            for version in SUITES:
                with self.subTest(library=library, version=version):
                    client, server = self.session(library, version)
                    client.select("big")
                    client.start_fetch()
                    client.read_exactly(100_000)
                    server.send_command("drop")
                    with self.assertRaisesRegex(AssertionError, "stream ended"):
                        client.read_exactly(BIG_SIZE)

    def test_renegotiation_requested_by_the_server_is_refused(self):
        """The session continues or ends, and does not hang."""
        for library in PACKAGES:
            with self.subTest(library=library):
                client, server = self.session(library, "1.2")
                other_session, _ = self.session("openssl")
                server.send_command("renegotiate")
                # The answer is sent with the next data.
                client.send(b"a7 NOOP\r\n")
                wait_for("an answer", lambda: "warning 100" in server.output() or "broken" in server.output()
                         or "alert" in server.output())
                other_session.noop()


if __name__ == "__main__":
    unittest.main()
