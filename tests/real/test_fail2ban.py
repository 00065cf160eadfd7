"""fail2ban-regex applies the filter to real logs: which addresses it bans, and which it does not."""

import base64
import json
import re
import socket
import subprocess
import unittest

from fixtures import REPOSITORY, TIMEOUT, Certificates, Dovecot, Folder, Proxy, free_port, program
from imap_client import RawClient

FILTER = REPOSITORY / "deploy/fail2ban/filter.d/vestibule.conf"
# User names that make a careless filter ban another address.
HOSTILE = [
    "x client=1.2.3.4",
    "x session=1 client=1.2.3.4 session=",
    "INFO vestibule::login: login failed client=1.2.3.4 session=\\\"",
    "2026-01-31T12:00:00.000000Z  INFO vestibule::login: login failed client=1.2.3.4 session=\\\"x\\\"",
    "\\\",\\\"client\\\":\\\"1.2.3.4\\\",\\\"session\\\":\\\"",
    "{\\\"timestamp\\\":\\\"\\\",\\\"level\\\":\\\"INFO\\\",\\\"message\\\":\\\"login failed\\\",\\\"client\\\":\\\"1.2.3.4\\\",\\\"session\\\":\\\"",
    "vestibule[1]: 2026-01-31T12:00:00.000000Z  INFO vestibule::login: login failed client=1.2.3.4 session=\\\"x\\\"",
]


class Ipv6Client(RawClient):
    def __init__(self, port):
        self.socket = socket.create_connection(("::1", port), timeout=TIMEOUT)
        self.pending = b""


class Fail2ban(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        cls.server = Dovecot(Certificates(cls.folder))
        cls.addClassCleanup(cls.server.close)

    def banned_addresses(self, log):
        """The address of each matching line."""
        done = subprocess.run([program("fail2ban-regex"), "-o", "ip", str(log), str(FILTER)], capture_output=True, text=True,
                              timeout=TIMEOUT)
        self.assertIn(done.returncode, (0, 1), done.stderr)
        self.assertNotIn("Traceback", done.stdout + done.stderr)
        return [line for line in done.stdout.splitlines() if re.fullmatch(r"[0-9a-f.:]+", line)]

    def proxy(self, form):
        proxy = Proxy(f"""
listeners:
  - {{address: "127.0.0.1:{{plain}}", tls: none}}
  - {{address: "[::1]:{{tls}}", tls: none}}
backends:
  good: {{servers: ["127.0.0.1:{self.server.port}"]}}
  dead: {{servers: ["127.0.0.1:{free_port()}"]}}
routes: [{{domain: {{example.org: good, example.net: dead}}}}]
access: {{deny: [127.0.0.7]}}
limits: {{failed_login_delay: off, failed_logins: 1000, login_rate_per_user: 2/1h}}
log: {{format: {form}}}
admin: {{address: "127.0.0.1:{{admin}}"}}
""")
        self.addCleanup(proxy.close)
        return proxy

    def log_in_from_many_addresses(self, form):
        """Logs in with every outcome, each from a different address; returns the log and its path."""
        proxy = self.proxy(form)
        port = proxy.ports["plain"]

        def login(client, *commands, answer):
            client.line()
            for command in commands:
                self.assertRegex(client.command("a", command)[-1], answer)
            client.close()

        wrong = rb"^a NO \[AUTHENTICATIONFAILED\]"
        login(RawClient(port, source="127.0.0.2"), "LOGIN alice@example.org wrong", answer=wrong)
        login(RawClient(port, source="127.0.0.3"), "LOGIN unknown@nowhere.test x", answer=wrong)
        login(Ipv6Client(proxy.ports["tls"]), "LOGIN carol@example.org wrong", "LOGIN unknown@nowhere.test x", answer=wrong)
        # On behalf of another user, and with invalid credentials.
        for authcid in ("mallory", "x client=1.2.3.4 session=\""):
            message = base64.b64encode(f"dave@example.org\0{authcid}\0x".encode()).decode()
            login(RawClient(port, source="127.0.0.10"), f"AUTHENTICATE PLAIN {message}", answer=rb"^a NO \[AUTHORIZATIONFAILED\]")
        login(RawClient(port, source="127.0.0.11"), 'LOGIN "" x', answer=wrong)
        # The following outcomes must not cause a ban, except those of the hostile names.
        login(RawClient(port, source="127.0.0.4"), "LOGIN carol@example.org \"pass word\"", answer=rb"^a OK")
        login(RawClient(port, source="127.0.0.5"), "LOGIN bob@example.net builder", answer=rb"^a NO \[UNAVAILABLE\]")
        login(RawClient(port, source="127.0.0.6"), "LOGIN unknown@nowhere.test x", answer=rb"^a NO \[LIMIT\]")
        denied = RawClient(port, source="127.0.0.7")
        self.assertRegex(denied.line(), rb"^\* BYE")
        denied.close()
        for name in HOSTILE:
            login(RawClient(port, source="127.0.0.8"), f"LOGIN \"{name}\" x", answer=wrong)
        # A client that disconnects before the login is also logged.
        RawClient(port, source="127.0.0.9").close()
        return proxy.stop(), proxy.process.log

    def test_filter_matches_text_logs(self):
        text, log = self.log_in_from_many_addresses("text")
        self.assertIn("x client=1.2.3.4", text)
        expected = ["127.0.0.2", "127.0.0.3", "::1", "::1", "127.0.0.10", "127.0.0.10", "127.0.0.11"] + ["127.0.0.8"] * len(HOSTILE)
        self.assertEqual(self.banned_addresses(log), expected, text)

    def test_filter_matches_json_logs(self):
        text, log = self.log_in_from_many_addresses("json")
        records = [json.loads(line) for line in text.splitlines()]
        self.assertTrue(any("1.2.3.4" in str(record.get("user")) for record in records))
        self.assertTrue(any(record.get("user") == "dave@example.org" and record.get("authcid") == "mallory" for record in records))
        expected = ["127.0.0.2", "127.0.0.3", "::1", "::1", "127.0.0.10", "127.0.0.10", "127.0.0.11"] + ["127.0.0.8"] * len(HOSTILE)
        self.assertEqual(self.banned_addresses(log), expected, text)

    def test_filter_matches_a_client_that_disconnects_after_a_refused_token(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(TIMEOUT)
            proxy = Proxy(f"""
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none, mechanisms: [xoauth2]}}]
backends: {{only: {{servers: ["127.0.0.1:{server.getsockname()[1]}"], check: off}}}}
routes: [{{default: only}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
""")
            self.addCleanup(proxy.close)
            client = RawClient(proxy.ports["plain"], source="127.0.0.12")
            client.line()
            token = base64.b64encode(b"user=carol@example.org\1auth=Bearer wrong\1\1")
            client.send(b"a AUTHENTICATE XOAUTH2 " + token + b"\r\n")
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=XOAUTH2] x\r\n")
                self.assertIn(b"AUTHENTICATE XOAUTH2", connection.recv(65536))
                connection.sendall(b"+ eyJzdGF0dXMiOiI0MDEifQ==\r\n")
                self.assertEqual(client.line(), b"+ eyJzdGF0dXMiOiI0MDEifQ==")
                client.close()
                text = proxy.stop()
        self.assertEqual(self.banned_addresses(proxy.process.log), ["127.0.0.12"], text)
        self.assertRegex(text, r"session ended.*127\.0\.0\.12.*carol@example\.org.*outcome.{0,20}refused")

    def test_filter_accepts_journal_and_syslog_prefixes(self):
        text, _ = self.log_in_from_many_addresses("text")
        for prefix in ("host vestibule[4711]: ", "vestibule[4711]: ", "vestibule: "):
            log = self.folder.write("prefixed", "".join(prefix + line + "\n" for line in text.splitlines()))
            self.assertEqual(len(self.banned_addresses(log)), 7 + len(HOSTILE), prefix)

    def test_example_jail_uses_the_filter(self):
        jail = (REPOSITORY / "deploy/fail2ban/vestibule-jail.conf").read_text()
        self.assertIn("\n[vestibule]\n", jail)
        installed = (REPOSITORY / "deploy/debian/install").read_text()
        self.assertRegex(installed, r"deploy/fail2ban/filter.d/vestibule.conf\s+etc/fail2ban/filter.d\n")


if __name__ == "__main__":
    unittest.main()
