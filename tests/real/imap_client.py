"""IMAP clients: imaplib with a timeout, and a raw socket for bytes that no client library sends."""

import imaplib
import socket
import ssl

from fixtures import PASSWORDS, TIMEOUT

ALICE, BOB = "alice@example.org", "bob@example.net"
LOGIN = {user: f"LOGIN {user} {PASSWORDS[user]}" for user in (ALICE, BOB)}


def context(ca):
    """A TLS context that verifies the certificate of the proxy."""
    return ssl.create_default_context(cafile=str(ca))


def connect(proxy, certificates, port="tls"):
    """An imaplib client, before login; over TLS unless `port` is `plain`."""
    number = proxy.ports[port]
    if port == "tls":
        return imaplib.IMAP4_SSL("localhost", number, ssl_context=context(certificates.ca), timeout=TIMEOUT)
    client = imaplib.IMAP4("localhost", number, timeout=TIMEOUT)
    if port == "starttls":
        client.starttls(context(certificates.ca))
    return client


def message(subject, body="Hello.\r\n"):
    return (f"From: test@example.org\r\nTo: test@example.org\r\nSubject: {subject}\r\n"
            f"Date: Mon, 23 Nov 2026 12:00:00 +0000\r\nMessage-ID: <{subject}@example.org>\r\n\r\n{body}").encode()


def subjects(client):
    """The subjects of all messages in INBOX."""
    client.select("INBOX")
    status, found = client.search(None, "ALL")
    assert status == "OK"
    numbers = found[0].split()
    result = []
    for number in numbers:
        status, data = client.fetch(number, "(BODY.PEEK[HEADER.FIELDS (SUBJECT)])")
        assert status == "OK"
        result.append(data[0][1].decode().strip().removeprefix("Subject: "))
    return result


class RawClient:
    """An IMAP client that sends bytes and reads lines."""

    def __init__(self, port, tls_context=None, source="127.0.0.1"):
        plain = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT, source_address=(source, 0))
        self.socket = tls_context.wrap_socket(plain, server_hostname="localhost") if tls_context else plain
        self.pending = b""

    def send(self, data):
        self.socket.sendall(data)

    def line(self):
        """The next line without CRLF; empty at the end of the stream."""
        while b"\n" not in self.pending:
            got = self.socket.recv(65536)
            if not got:
                rest, self.pending = self.pending, b""
                return rest
            self.pending += got
        line, self.pending = self.pending.split(b"\n", 1)
        return line.rstrip(b"\r")

    def until(self, start):
        """The next lines, up to the first that begins with `start`."""
        lines = []
        while True:
            line = self.line()
            lines.append(line)
            if line.startswith(start):
                return lines
            if not line:
                raise AssertionError(f"no line begins with {start!r} in {lines!r}")

    def command(self, tag, text):
        """Sends a command and returns the lines of its response, the tagged one last."""
        self.send(tag.encode() + b" " + (text if isinstance(text, bytes) else text.encode()) + b"\r\n")
        return self.until(tag.encode() + b" ")

    def close(self):
        self.socket.close()


def session(port, user=ALICE):
    """A `RawClient` that has logged in."""
    client = RawClient(port)
    client.line()
    answer = client.command("a", LOGIN[user])[-1]
    assert answer.startswith(b"a OK"), answer
    return client
