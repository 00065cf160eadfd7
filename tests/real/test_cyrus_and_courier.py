"""Cyrus and Courier as backends: their greetings, capabilities and login commands differ from those of Dovecot."""

import unittest

from fixtures import PASSWORDS, Courier, Cyrus, plain_proxy
from imap_client import RawClient, connect, message, subjects


class CyrusAndCourier(unittest.TestCase):
    def proxy(self, server):
        proxy = plain_proxy(server)
        self.addCleanup(proxy.close)
        return proxy

    def read_and_write(self, server):
        self.addCleanup(server.close)
        proxy = self.proxy(server)
        for user, password in PASSWORDS.items():
            client = connect(proxy, None, "plain")
            client.login(user, password)
            subject = f"for-{user.split('@')[0]}"
            self.assertEqual(client.append("INBOX", None, None, message(subject))[0], "OK", server.log())
            self.assertEqual(subjects(client), [subject], "only the mail of this user")
            client.logout()
        client = RawClient(proxy.ports["plain"])
        client.line()
        user, password = next(iter(PASSWORDS.items()))
        self.assertTrue(client.command("a", f"LOGIN {user} wrong")[-1].startswith(b"a NO ["))
        answer = client.command("b", f"LOGIN {user} {password}")
        # The client gets the capabilities in or before the OK, even if the server does not send them.
        self.assertTrue(any(b"CAPABILITY IMAP4" in line for line in answer), answer)
        self.assertTrue(answer[-1].startswith(b"b OK"), answer)
        client.send(b"c SELECT INBOX\r\nd FETCH 1 FLAGS\r\ne LOGOUT\r\n")
        client.until(b"e OK")
        self.assertEqual(client.line(), b"")

    def test_courier_serves_each_user(self):
        self.read_and_write(Courier())

    def test_cyrus_serves_each_user(self):
        self.read_and_write(Cyrus())


if __name__ == "__main__":
    unittest.main()
