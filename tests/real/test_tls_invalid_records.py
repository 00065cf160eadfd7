"""Invalid TLS records after the login end the session with the correct alert and are counted; other sessions continue. A relay
between client and server creates them from valid records.
"""

import socket
import unittest

from fixtures import PASSWORDS, TIMEOUT, wait_for
from imap_client import context
from tls_fixtures import ALICE, SUITES, ImapConversation, InteropSetup, TamperingRelay, TlsPeer

UNEXPECTED, BAD_MAC, OVERFLOW = 10, 20, 22


def record_header(kind, size):
    return bytes([kind, 3, 3]) + size.to_bytes(2, "big")


def flip_bit(record, at):
    return record[:at] + bytes([record[at] ^ 1]) + record[at + 1:]


# Name, change of a valid record, and the expected alerts in TLS 1.3 and 1.2. A changed record type is an unexpected message in
# TLS 1.3 and fails the authentication in TLS 1.2.
INVALID_RECORDS = {
    "flipped bit in the tag": (lambda record: flip_bit(record, len(record) - 1), BAD_MAC, BAD_MAC),
    "flipped bit in the ciphertext": (lambda record: flip_bit(record, 14), BAD_MAC, BAD_MAC),
    "flipped bit in the first byte": (lambda record: flip_bit(record, 5), BAD_MAC, BAD_MAC),
    "longer than its length field": (lambda record: record[:3] + (len(record) - 6).to_bytes(2, "big") + record[5:-1], BAD_MAC, BAD_MAC),
    "sent twice": (lambda record: record + record, BAD_MAC, BAD_MAC),
    "plaintext": (lambda record: record_header(23, 32) + b"a7 NOOP\r\n".ljust(32), BAD_MAC, BAD_MAC),
    "too short for a tag": (lambda record: record_header(23, 3) + b"abc", BAD_MAC, BAD_MAC),
    "empty": (lambda record: record_header(23, 0), BAD_MAC, BAD_MAC),
    "length ffff": (lambda record: record_header(23, 0xFFFF) + bytes(0xFFFF), OVERFLOW, OVERFLOW),
    "one byte over the TLS 1.2 limit": (lambda record: record_header(23, 16384 + 2049) + bytes(16384 + 2049), OVERFLOW, OVERFLOW),
    "one byte over the TLS 1.3 limit": (lambda record: record_header(23, 16384 + 257) + bytes(16384 + 257), OVERFLOW, BAD_MAC),
    "plaintext handshake message": (lambda record: record_header(22, 4) + bytes(4) + record, UNEXPECTED, BAD_MAC),
    "plaintext alert": (lambda record: record_header(21, 2) + b"\x02\x28" + record, UNEXPECTED, BAD_MAC),
    "plaintext close_notify": (lambda record: record_header(21, 2) + b"\x01\x00" + record, UNEXPECTED, BAD_MAC),
    "change cipher spec": (lambda record: record_header(20, 1) + b"\x01" + record, UNEXPECTED, BAD_MAC),
    "unknown record type": (lambda record: record_header(99, 16) + bytes(16), UNEXPECTED, UNEXPECTED),
    "HTTP request": (lambda record: b"GET / HTTP/1.1\r\nHost: mail.test\r\n\r\n", UNEXPECTED, UNEXPECTED),
}


class InvalidRecords(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scene = InteropSetup(cls)
        cls.proxy = cls.scene.proxy()
        cls.addClassCleanup(cls.proxy.close)

    def python_client(self, proxy):
        plain = socket.create_connection(("127.0.0.1", proxy.ports["tls"]), timeout=TIMEOUT)
        client = ImapConversation(context(self.scene.certificates.ca).wrap_socket(plain, server_hostname="localhost"))
        self.addCleanup(client.close)
        client.line()
        return client

    def for_each_record(self, check):
        for version in SUITES:
            for suite in SUITES[version]:
                for name, (alter, *alerts) in INVALID_RECORDS.items():
                    with self.subTest(name=name, suite=suite):
                        check(version, suite, alter, alerts[version == "1.2"], name == "sent twice")

    def violations(self, proxy, side):
        return proxy.metric("vestibule_failures_total", side=side, reason="tls_violation")

    def test_invalid_record_from_the_client_ends_the_session(self):
        other_session = self.python_client(self.proxy)
        other_session.login()

        def check(version, suite, alter, alert, first_copy_is_valid):
            relay = TamperingRelay(self.proxy.ports["tls"], alter)
            self.addCleanup(relay.close)
            tls = socket.create_connection(("127.0.0.1", relay.port))
            peer = TlsPeer("openssl", tls, **self.scene.peer_options("openssl", version, suite))
            self.addCleanup(peer.close)
            peer.line()
            peer.login()
            before = self.violations(self.proxy, "client")
            relay.armed.set()
            peer.send(b"a7 NOOP\r\n")
            if not first_copy_is_valid:
                self.assertEqual(peer.line(), b"")
            self.assertTrue(relay.altered.wait(TIMEOUT))
            peer.wait_for_report(f"alert {alert}")
            wait_for("the violation to be counted", lambda: self.violations(self.proxy, "client") == before + 1)
            other_session.noop()

        self.for_each_record(check)

    def test_invalid_record_from_the_server_ends_the_session(self):
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        listener.settimeout(TIMEOUT)
        # The proxy connects to this listener; each check passes the connection to a new relay.
        proxy = self.scene.proxy(listener.getsockname()[1], "implicit")
        self.addCleanup(proxy.close)

        def check(version, suite, alter, alert, first_copy_is_valid):
            behind = socket.create_server(("127.0.0.1", 0))
            self.addCleanup(behind.close)
            client = self.python_client(proxy)
            client.send(f"a1 LOGIN {ALICE} {PASSWORDS[ALICE]}\r\n".encode())
            relay = TamperingRelay(behind.getsockname()[1], alter, of_server=True, accepted=listener.accept()[0])
            self.addCleanup(relay.close)
            tls, _ = behind.accept()
            dovecot = socket.create_connection(("127.0.0.1", self.scene.dovecot.port))
            server = TlsPeer("openssl", tls, "server", dovecot, **self.scene.peer_options("openssl", version, suite, "server"))
            self.addCleanup(server.close)
            self.assertTrue(client.until(b"a1 ")[-1].startswith(b"a1 OK"))
            before = self.violations(proxy, "backend")
            relay.armed.set()
            client.send(b"a7 NOOP\r\n")
            if not first_copy_is_valid:
                self.assertEqual(client.line(), b"", "no altered byte is relayed")
            self.assertTrue(relay.altered.wait(TIMEOUT))
            server.wait_for_report(f"alert {alert}")
            wait_for("the violation to be counted", lambda: self.violations(proxy, "backend") == before + 1)

        self.for_each_record(check)

    def test_truncated_record_is_not_relayed(self):
        """TCP ends after half a record: the session ends, and the partial record is not relayed."""
        for version in SUITES:
            with self.subTest(version=version):
                relay = TamperingRelay(self.proxy.ports["tls"], lambda record: record[:len(record) // 2], last=True)
                self.addCleanup(relay.close)
                tls = socket.create_connection(("127.0.0.1", relay.port))
                peer = TlsPeer("openssl", tls, **self.scene.peer_options("openssl", version))
                self.addCleanup(peer.close)
                peer.line()
                peer.login()
                ended = self.proxy.log().count("session ended")
                relay.armed.set()
                peer.send(b"a7 NOOP\r\n")
                wait_for("the session to end", lambda: self.proxy.log().count("session ended") > ended)
                self.assertNotIn(b"a7", peer.line())


if __name__ == "__main__":
    unittest.main()
