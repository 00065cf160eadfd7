"""A login that Dovecot refuses because of its connection limit does not affect other sessions of the user."""

import unittest

from fixtures import Certificates, Dovecot, Folder, Proxy
from imap_client import ALICE, LOGIN, RawClient, session

TEMPLATE = """
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none}}]
backends:
  pair: {{servers: ["127.0.0.1:{one}", "127.0.0.1:{other}"], breaker: {{failures: 1}}}}
routes: [{{default: pair}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
limits: {{failed_logins: 5, drain: 1s}}
"""


class ConnectionLimit(unittest.TestCase):
    """Each of two Dovecots accepts two sessions per user and address."""

    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        certificates = Certificates(cls.folder)
        cls.servers = []
        for _ in range(2):
            server = Dovecot(certificates, extra="mail_max_userip_connections = 2")
            cls.addClassCleanup(server.close)
            cls.servers.append(server)

    def test_login_beyond_the_limit_is_refused_and_sessions_stay(self):
        one, other = (server.port for server in self.servers)
        proxy = Proxy(TEMPLATE.format(one=one, other=other))
        self.addCleanup(proxy.close)
        port = proxy.ports["plain"]
        sessions = [session(port), session(port)]
        third = RawClient(port)
        third.line()
        # More attempts than limits.failed_logins allows.
        for _ in range(7):
            answer = third.command("c", LOGIN[ALICE])[-1]
            self.assertRegex(answer, rb"^c NO \[\w+\] Maximum number of connections from user\+IP exceeded", proxy.log())
        self.assertTrue(third.command("d", "NOOP")[-1].startswith(b"d OK"), "the client may try again")
        for client in sessions:
            self.assertTrue(client.command("e", "SELECT INBOX")[-1].startswith(b"e OK"), proxy.log())
        self.assertEqual(proxy.metric("vestibule_failures_total", reason="moved"), 0)
        self.assertEqual(proxy.metric("vestibule_server_up"), 2)
        self.assertEqual(sum("Login: user=" in server.log() for server in self.servers), 1, "only one server received logins")
        # When a session of the user ends, the next login succeeds.
        sessions.pop().close()
        for _ in range(200):
            if third.command("f", LOGIN[ALICE])[-1].startswith(b"f OK"):
                break
        else:
            self.fail(proxy.log())
        log = proxy.stop()
        self.assertIn("server could not accept the login", log)
        self.assertIn("Maximum number of connections from user+IP exceeded", log)
        self.assertNotIn("login failed", log)
