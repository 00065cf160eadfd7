"""Passwords with special characters, in every syntax that a client may use, with servers of different capabilities.

Dovecot and Cyrus advertise AUTH=PLAIN and SASL-IR. Courier advertises neither, so the proxy sends passwords that cannot be
quoted as literals.
"""

import base64
import unittest

from fixtures import Certificates, Courier, Cyrus, Dovecot, Folder, plain_proxy
from imap_client import RawClient

PASSWORDS = {
    "quote@example.org": 'qu"ote',
    "backslash@example.org": "back\\slash",
    "eight-bit@example.org": "pässwörd",
    "special@example.org": "p%c*{5} (x) ]",
    "literal@example.org": "x{5+}",
    "long@example.org": "x" * 900,
}


def quoted(text):
    return b'"' + text.replace("\\", "\\\\").replace('"', '\\"').encode() + b'"'


def send_quoted(client, user, password):
    return client.command("a", b"LOGIN " + quoted(user) + b" " + quoted(password))


def send_literals(client, user, password):
    """Sends name and password as synchronising literals (RFC 3501 section 4.3)."""
    user, password = user.encode(), password.encode()
    client.send(b"a LOGIN {%d}\r\n" % len(user))
    assert client.line().startswith(b"+")
    client.send(user + b" {%d}\r\n" % len(password))
    assert client.line().startswith(b"+")
    client.send(password + b"\r\n")
    return client.until(b"a ")


def send_literal_plus(client, user, password):
    """Sends the password as a non-synchronising literal (RFC 7888)."""
    password = password.encode()
    return client.command("a", b"LOGIN " + user.encode() + b" {%d+}\r\n" % len(password) + password)


def send_sasl(client, user, password):
    return client.command("a", b"AUTHENTICATE PLAIN " + base64.b64encode(f"\0{user}\0{password}".encode()))


class UnusualPasswords(unittest.TestCase):
    def log_in_with_every_form(self, server, users):
        self.addCleanup(server.close)
        proxy = plain_proxy(server)
        self.addCleanup(proxy.close)
        logins = 0
        for send in (send_quoted, send_literals, send_literal_plus, send_sasl):
            for user, password in users.items():
                # Quoted strings of IMAP4rev1 contain only seven-bit characters.
                if send == send_quoted and not password.isascii():
                    continue
                with self.subTest(form=send.__name__, user=user):
                    client = RawClient(proxy.ports["plain"])
                    self.addCleanup(client.close)
                    client.line()
                    answer = send(client, user, password)
                    self.assertTrue(answer[-1].startswith(b"a OK"), answer)
                    # No bytes of the login dialogue are left in the relayed stream.
                    self.assertTrue(client.command("b", "NOOP")[-1].startswith(b"b OK"))
                    client.command("c", "LOGOUT")
                    logins += 1
        self.assertEqual(logins, 4 * len(users) - 1)
        # A wrong password is refused by the server, and does not count as a failure.
        client = RawClient(proxy.ports["plain"])
        self.addCleanup(client.close)
        client.line()
        self.assertTrue(send_literals(client, "quote@example.org", 'qu"ot')[-1].startswith(b"a NO [AUTHENTICATIONFAILED]"))
        self.assertEqual(proxy.metric("vestibule_logins_total", outcome="refused"), 1)
        self.assertEqual(proxy.metric("vestibule_logins_total", outcome="accepted"), logins)

    def test_dovecot_accepts_unusual_passwords(self):
        folder = Folder()
        self.addCleanup(folder.remove)
        self.log_in_with_every_form(Dovecot(Certificates(folder), users=PASSWORDS), PASSWORDS)

    def test_cyrus_accepts_unusual_passwords(self):
        self.log_in_with_every_form(Cyrus(PASSWORDS), PASSWORDS)

    def test_courier_accepts_unusual_passwords(self):
        # Courier checks passwords with crypt(3), which reads only the first few hundred bytes.
        users = {**PASSWORDS, "long@example.org": "x" * 200}
        self.log_in_with_every_form(Courier(users), users)


if __name__ == "__main__":
    unittest.main()
