"""Two Dovecot shards behind the proxy, with plaintext, STARTTLS and TLS connections to the servers."""

import base64
import os
import re
import signal
import unittest

from fixtures import PASSWORDS, Certificates, Dovecot, Folder, Proxy, wait_for
from imap_client import RawClient, connect, context, message, subjects

ALICE, BOB, CAROL = "alice@example.org", "bob@example.net", "carol@example.org"
TEMPLATE = """
listeners:
  - {{address: "127.0.0.1:{{tls}}", tls: implicit}}
  - {{address: "127.0.0.1:{{starttls}}", tls: starttls}}
  - {{address: "127.0.0.1:{{plain}}", tls: none}}
tls: {{certificates: [{{cert: {cert}, key: {key}}}]}}
backends:
  shard-a: {{servers: ["localhost:{a}"], tls: {tls}, client_info: {info}}}
  shard-b: {{servers: ["localhost:{b}"], tls: {tls}, client_info: {info}}}
routes:
  - table: users.txt
  - domain: {{example.net: shard-b}}
limits: {{connect: 2s, server_login: 4s, drain: 2s}}
admin: {{address: "127.0.0.1:{{admin}}"}}
log: {{format: json}}
"""


class DovecotShards(unittest.TestCase):
    """Starts both shards once; each test starts its own proxies."""

    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        cls.certificates = Certificates(cls.folder)
        cls.a = Dovecot(cls.certificates, haproxy=True)
        cls.addClassCleanup(cls.a.close)
        cls.b = Dovecot(cls.certificates, haproxy=True)
        cls.addClassCleanup(cls.b.close)

    def proxy(self, tls="none", ports=("port", "port"), info="id", ca=None):
        ca = ca or self.certificates.ca
        folder = Folder()
        self.addCleanup(folder.remove)
        folder.write("users.txt", f"{ALICE} shard-a\n@example.org shard-b\n")
        modes = {
            "none": "none",
            "starttls": f"{{mode: starttls, ca: {ca}}}",
            "implicit": f"{{mode: implicit, ca: {ca}}}",
        }
        text = TEMPLATE.format(cert=self.certificates.cert, key=self.certificates.key, tls=modes[tls], info=info,
                               a=getattr(self.a, ports[0]), b=getattr(self.b, ports[1]))
        proxy = Proxy(text, folder)
        self.addCleanup(proxy.close)
        return proxy

    def read_and_write_as_each_user(self, tls, ports):
        proxy = self.proxy(tls, ports)
        for port in ("tls", "starttls", "plain"):
            for user, home, other in ((ALICE, self.a, self.b), (BOB, self.b, self.a), (CAROL, self.b, self.a)):
                subject = f"{tls}-{port}-{user.split('@')[0]}"
                client = connect(proxy, self.certificates, port)
                client.login(user, PASSWORDS[user])
                self.assertEqual(client.append("INBOX", None, None, message(subject))[0], "OK")
                self.assertIn(subject, subjects(client))
                client.logout()
                self.assertTrue(any(subject in text for text in home.messages(user)), "on the shard of the user")
                self.assertFalse(any(subject in text for text in other.messages(user)), "not on the other shard")
        log = proxy.stop()
        self.assertEqual(log.count('"outcome":"accepted"'), 9, log)
        for password in PASSWORDS.values():
            self.assertNotIn(password, log)

    def test_plaintext_shards_serve_each_user(self):
        self.read_and_write_as_each_user("none", ("port", "port"))

    def test_starttls_shards_serve_each_user(self):
        self.read_and_write_as_each_user("starttls", ("port", "port"))

    def test_tls_shards_serve_each_user(self):
        self.read_and_write_as_each_user("implicit", ("tls_port", "tls_port"))

    def test_untrusted_server_certificate_answers_unavailable(self):
        folder = Folder()
        self.addCleanup(folder.remove)
        proxy = self.proxy("implicit", ("tls_port", "tls_port"), ca=Certificates(folder).ca)
        client = RawClient(proxy.ports["plain"])
        client.line()
        self.assertTrue(client.command("a", f"LOGIN {ALICE} wonderland")[-1].startswith(b"a NO [UNAVAILABLE]"))
        self.assertEqual(proxy.metric("vestibule_failures_total", side="backend", reason="tls"), 1)

    def test_authenticate_plain_and_login(self):
        proxy = self.proxy()
        for command in (b"AUTHENTICATE PLAIN AGFsaWNlQGV4YW1wbGUub3JnAHdvbmRlcmxhbmQ=",
                        b"AUTHENTICATE PLAIN\r\nAGFsaWNlQGV4YW1wbGUub3JnAHdvbmRlcmxhbmQ=",
                        b"AUTHENTICATE LOGIN\r\nYWxpY2VAZXhhbXBsZS5vcmc=\r\nd29uZGVybGFuZA=="):
            client = RawClient(proxy.ports["tls"], context(self.certificates.ca))
            client.line()
            self.assertTrue(client.command("a", command)[-1].startswith(b"a OK [CAPABILITY IMAP4rev1 "), command)
            client.close()

    def test_login_after_a_refused_password_is_routed_again(self):
        proxy = self.proxy()
        client = RawClient(proxy.ports["tls"], context(self.certificates.ca))
        client.line()
        self.assertTrue(client.command("a", f"LOGIN {ALICE} wrong")[-1].startswith(b"a NO [AUTHENTICATIONFAILED]"))
        self.assertTrue(client.command("b", "LOGIN unknown@nowhere.test x")[-1].startswith(b"b NO [AUTHENTICATIONFAILED]"))
        # The login is routed again: the mailbox of bob is on the other shard.
        self.assertTrue(client.command("c", f"LOGIN {BOB} builder")[-1].startswith(b"c OK"))
        self.assertTrue(client.command("d", "SELECT INBOX")[-1].startswith(b"d OK"))
        self.assertEqual(proxy.metric("vestibule_logins_total", outcome="refused"), 1)
        self.assertEqual(proxy.metric("vestibule_logins_total", outcome="unknown_user"), 1)

    def test_commands_pipelined_after_login_are_answered(self):
        proxy = self.proxy()
        client = RawClient(proxy.ports["tls"], context(self.certificates.ca))
        client.send(f"a LOGIN {ALICE} wonderland\r\nb SELECT INBOX\r\nc NOOP\r\nd LOGOUT\r\n".encode())
        tagged = [line[:4] for line in client.until(b"d ") if line[:2] in (b"a ", b"b ", b"c ", b"d ")]
        self.assertEqual(tagged, [b"a OK", b"b OK", b"c OK", b"d OK"])
        self.assertEqual(client.line(), b"", "the proxy closes the connection after the server")

    def test_no_secret_is_logged_at_any_level(self):
        text = TEMPLATE.format(cert=self.certificates.cert, key=self.certificates.key, tls="none", info="id",
                               a=self.a.port, b=self.b.port)
        folder = Folder()
        self.addCleanup(folder.remove)
        folder.write("users.txt", "* shard-a\n")
        proxy = Proxy(text.replace("format: json", "format: json, level: trace"), folder, environment={"RUST_LOG": "trace"})
        self.addCleanup(proxy.close)
        encoded = base64.b64encode(f"\0{ALICE}\0wonderland".encode())
        for command in (f"LOGIN {ALICE} wonderland".encode(), f"LOGIN {ALICE} {{10+}}\r\nwonderland".encode(),
                        b"AUTHENTICATE PLAIN " + encoded, b"AUTHENTICATE PLAIN\r\n" + encoded,
                        f"LOGIN {ALICE} wonderland2".encode(), f"LOGIN wonderland {ALICE} x".encode()):
            for port in ("tls", "plain"):
                client = RawClient(proxy.ports[port], context(self.certificates.ca) if port == "tls" else None)
                client.line()
                client.command("a", command)
                client.close()
        log = proxy.stop()
        self.assertIn('"level":"TRACE"', log, "the configured level is in use")
        self.assertIn(ALICE, log)
        for secret in ("wonderland", encoded.decode(), str(list(b"wonderland"))[1:-1]):
            self.assertNotIn(secret, log)

    def address_in_server_log(self, proxy, server):
        """Logs in from 127.0.0.2 and returns the client address and the session id that the server logged."""
        client = RawClient(proxy.ports["tls"], context(self.certificates.ca), source="127.0.0.2")
        client.line()
        client.command("a", 'ID ("name" "test" "x-originating-ip" "192.0.2.66")')
        before = len(server.log())
        self.assertTrue(client.command("b", f"LOGIN {ALICE} wonderland")[-1].startswith(b"b OK"))
        line = wait_for("the server's log line", lambda: re.search(r"Login: .*rip=([^,]*), session=<([^>]*)>", server.log()[before:]))
        client.close()
        return line[1], line[2]

    def test_id_command_forwards_client_address_and_session_id(self):
        proxy = self.proxy(info="id")
        address, session = self.address_in_server_log(proxy, self.a)
        self.assertEqual(address, "127.0.0.2")
        self.assertIn(f'"session":"{session}"', proxy.stop(), "both logs contain the same session id")

    def test_proxy_headers_forward_the_client_address(self):
        for info in ("proxy-v1", "proxy-v2"):
            proxy = self.proxy(info=info, ports=("haproxy_port", "haproxy_port"))
            self.assertEqual(self.address_in_server_log(proxy, self.a)[0], "127.0.0.2", info)

    def test_client_info_none_forwards_nothing(self):
        self.assertEqual(self.address_in_server_log(self.proxy(info="none"), self.a)[0], "127.0.0.1")

    def test_client_stays_connected_when_the_server_is_down(self):
        server = Dovecot(self.certificates)
        self.addCleanup(server.close)
        text = f"""
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none}}]
backends: {{only: {{servers: ["127.0.0.1:{server.port}"], check: {{interval: 200ms, rise: 1}}}}}}
routes: [{{default: only}}]
limits: {{connect: 1s, server_login: 2s}}
admin: {{address: "127.0.0.1:{{admin}}"}}
"""
        proxy = Proxy(text)
        self.addCleanup(proxy.close)
        client = RawClient(proxy.ports["plain"])
        client.line()
        server.kill()
        self.assertTrue(client.command("a", f"LOGIN {ALICE} wonderland")[-1].startswith(b"a NO [UNAVAILABLE]"))
        wait_for("the health checks", lambda: proxy.metric("vestibule_server_up", backend="only") == 0)
        server.start()
        self.assertTrue(client.command("b", f"LOGIN {ALICE} wonderland")[-1].startswith(b"b OK"), "on the same connection")
        wait_for("the health checks", lambda: proxy.metric("vestibule_server_up", backend="only") == 1)
        client.close()
        # A stopped server accepts connections and does not answer.
        os.killpg(server.process.child.pid, signal.SIGSTOP)
        client = RawClient(proxy.ports["plain"])
        client.line()
        self.assertTrue(client.command("c", f"LOGIN {ALICE} wonderland")[-1].startswith(b"c NO [UNAVAILABLE]"))
        self.assertTrue(client.command("d", "NOOP")[-1].startswith(b"d OK"))

    def test_login_fails_over_to_the_next_server(self):
        dead = Dovecot(self.certificates)
        dead.close()
        text = f"""
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none}}]
backends: {{pair: {{servers: ["127.0.0.1:{dead.port}", "127.0.0.1:{self.a.port}"]}}}}
routes: [{{default: pair}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
"""
        proxy = Proxy(text)
        self.addCleanup(proxy.close)
        for user, password in ((ALICE, "wonderland"), (BOB, "builder"), (CAROL, "pass word")):
            client = RawClient(proxy.ports["plain"])
            client.line()
            self.assertTrue(client.command("a", f'LOGIN {user} "{password}"')[-1].startswith(b"a OK"), user)
            client.close()

    def test_shutdown_sends_bye_and_lets_sessions_finish(self):
        proxy = self.proxy()
        waiting = RawClient(proxy.ports["plain"])
        waiting.line()
        relayed = RawClient(proxy.ports["plain"])
        relayed.line()
        relayed.command("a", f"LOGIN {ALICE} wonderland")
        # SIGHUP reloads and ends no connection.
        proxy.process.child.send_signal(signal.SIGHUP)
        wait_for("the reload", lambda: "configuration loaded" in proxy.log())
        self.assertTrue(relayed.command("h", "NOOP")[-1].startswith(b"h OK"))
        proxy.process.child.send_signal(signal.SIGTERM)
        self.assertTrue(waiting.line().startswith(b"* BYE [UNAVAILABLE]"))
        self.assertEqual(waiting.line(), b"")
        self.assertTrue(relayed.command("b", "NOOP")[-1].startswith(b"b OK"), "sessions continue until limits.drain")
        relayed.command("c", "LOGOUT")
        self.assertEqual(proxy.process.child.wait(10), 0)


if __name__ == "__main__":
    unittest.main()
