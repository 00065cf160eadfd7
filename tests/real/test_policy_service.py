"""A policy service with the protocol of weakforced: queries before logins, reports after them, and the password hash of Dovecot."""

import base64
import time
import unittest

from fixtures import PASSWORDS, Certificates, Dovecot, Folder, Proxy, wait_for
from http_service import HttpService
from imap_client import RawClient
from tcp_peers import Relay

ALICE, BOB = "alice@example.org", "bob@example.net"
NONCE = "a salt for tests"


class PolicyService(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        cls.certificates = Certificates(cls.folder)
        cls.server = Dovecot(cls.certificates)
        cls.addClassCleanup(cls.server.close)

    def setUp(self):
        self.service = HttpService()
        self.addCleanup(self.service.close)
        self.folder.write("nonce", NONCE + "\n")
        self.folder.write("secret", "sesame\n")

    def proxy(self, more=""):
        proxy = Proxy(f"""
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none}}]
backends: {{only: {{servers: ["127.0.0.1:{self.server.port}"]}}}}
routes: [{{domain: {{example.org: only, example.net: only}}}}]
policy: {{url: "http://127.0.0.1:{self.service.port}/", nonce_file: {self.folder.path}/nonce{more}}}
limits: {{drain: 1s}}
admin: {{address: "127.0.0.1:{{admin}}"}}
""")
        self.addCleanup(proxy.close)
        return proxy

    def login(self, proxy, user, password=None, before_login=()):
        client = RawClient(proxy.ports["plain"])
        self.addCleanup(client.close)
        client.line()
        for command in before_login:
            client.command("i", command)
        return client.command("a", f'LOGIN {user} "{password or PASSWORDS[user]}"')[-1].decode()

    def requests(self, command, count=1):
        matching = lambda: [body for name, body in self.service.policy if name == command]
        return wait_for(f"{count} × {command}", lambda: matching() if len(matching()) >= count else None)

    def test_policy_is_queried_before_and_reported_after_a_login(self):
        proxy = self.proxy()
        self.assertRegex(self.login(proxy, ALICE, before_login=['ID ("name" "phone")']), "^a OK")
        [query], [report] = self.requests("allow"), self.requests("report")
        self.assertEqual({key: query[key] for key in ("login", "remote", "protocol", "tls", "device_id")},
                         {"login": ALICE, "remote": "127.0.0.1", "protocol": "imap", "tls": False, "device_id": '"name" "phone"'})
        self.assertIn(query["session_id"], proxy.log() + proxy.stop())
        self.assertEqual({key: report.pop(key) for key in ("success", "policy_reject")}, {"success": True, "policy_reject": False})
        self.assertEqual(report, query)

    def test_report_contains_only_a_short_password_hash(self):
        proxy = self.proxy()
        self.assertRegex(self.login(proxy, ALICE, "wrong-1"), "^a NO")
        self.assertRegex(self.login(proxy, ALICE, "wrong-1"), "^a NO")
        self.assertRegex(self.login(proxy, ALICE, "wrong-2"), "^a NO")
        first, second, third = self.requests("report", 3)
        self.assertEqual([first["success"], first["policy_reject"]], [False, False])
        self.assertNotIn("wrong-1", str(self.service.policy))
        self.assertRegex(first["pwhash"], "^0[0-9a-f]{3}$")
        self.assertEqual(first["pwhash"], second["pwhash"])
        self.assertNotEqual(first["pwhash"], third["pwhash"])

    def test_password_hash_equals_that_of_dovecot(self):
        """Equal hashes let one service combine the reports of both."""
        dovecot = Dovecot(self.certificates, extra=f"""
            auth_policy_server_url = http://127.0.0.1:{self.service.port}/
            auth_policy_hash_nonce = {NONCE}
            auth_policy_hash_mech = sha256
        """)
        self.addCleanup(dovecot.close)
        client = RawClient(dovecot.port)
        self.addCleanup(client.close)
        client.line()
        client.command("a", f"LOGIN {ALICE} guess")
        theirs = self.requests("allow")[0]["pwhash"]
        self.service.policy.clear()
        self.login(self.proxy(), ALICE, "guess")
        self.assertEqual(self.requests("allow")[0]["pwhash"], theirs)

    def test_negative_status_denies_the_login(self):
        self.service.statuses[ALICE] = -1
        proxy = self.proxy()
        self.assertRegex(self.login(proxy, ALICE), r"^a NO \[AUTHENTICATIONFAILED\]")
        report = self.requests("report")[0]
        self.assertEqual((report["success"], report["policy_reject"]), (False, True))
        self.assertNotIn(f"user=<{ALICE}> method", self.server.log().split("\n")[-1])
        self.assertEqual(proxy.metric("vestibule_policy_answers_total", command="allow", answer="denied"), 1)
        self.assertEqual(proxy.metric("vestibule_failures_total", reason="policy_denied"), 1)
        self.assertRegex(self.login(proxy, BOB), "^a OK")

    def test_positive_status_delays_the_login(self):
        self.service.statuses[ALICE] = 1
        began = time.monotonic()
        self.assertRegex(self.login(self.proxy(), ALICE), "^a OK")
        self.assertGreaterEqual(time.monotonic() - began, 1)

    def test_unreachable_service_allows_or_denies_by_configuration(self):
        self.service.pause()
        self.assertRegex(self.login(self.proxy(", timeout: 200ms"), ALICE), "^a OK")
        proxy = self.proxy(", timeout: 200ms, on_failure: deny")
        self.assertRegex(self.login(proxy, ALICE), r"^a NO \[UNAVAILABLE\]")
        self.assertEqual(proxy.metric("vestibule_failures_total", reason="policy_failed"), 1)
        self.assertNotIn("login failed", proxy.log())

    def test_silent_connection_fails_no_login(self):
        relay = Relay(self.service.port)
        self.addCleanup(relay.close)
        self.service.port, direct = relay.port, self.service.port
        proxy = self.proxy(", timeout: 4s, on_failure: deny")
        self.service.port = direct
        self.assertRegex(self.login(proxy, ALICE), "^a OK")
        for logins in (1, 2):
            # After the answer to the report, its connection is reused for the next request.
            answered_reports = lambda: proxy.metric("vestibule_policy_answers_total", command="report", answer="allowed")
            wait_for("the report", lambda: answered_reports() == logins)
            relay.go_silent()
            self.assertRegex(self.login(proxy, ALICE), "^a OK", proxy.log())
        self.assertEqual(proxy.metric("vestibule_policy_answers_total", command="allow", answer="failed"), 0)

    def test_slow_report_counts_once(self):
        proxy = self.proxy(", timeout: 2s")
        self.assertRegex(self.login(proxy, ALICE), "^a OK")
        answered_reports = lambda: proxy.metric("vestibule_policy_answers_total", command="report", answer="allowed")
        wait_for("the report", lambda: answered_reports() == 1)
        client = RawClient(proxy.ports["plain"])
        self.addCleanup(client.close)
        client.line()
        self.service.holds_reports = True
        self.assertRegex(client.command("a", f'LOGIN {BOB} "{PASSWORDS[BOB]}"')[-1], b"^a OK")
        failed = lambda: proxy.metric("vestibule_policy_answers_total", command="report", answer="failed")
        wait_for("the report to time out", lambda: failed() == 1)
        self.assertEqual([report["login"] for report in self.requests("report", 2)], [ALICE, BOB])

    def test_invalid_answers_count_as_failures(self):
        proxy = self.proxy(", on_failure: deny")
        for answer in (b"", b"[]", b"{}", b"{\"status\": \"-1\"}", b"x" * 100_000):
            self.service.statuses[ALICE] = answer
            self.assertRegex(self.login(proxy, ALICE), r"^a NO \[UNAVAILABLE\]", answer[:20])
        self.service.kill()
        self.assertRegex(self.login(proxy, ALICE), r"^a NO \[UNAVAILABLE\]")
        self.assertEqual(proxy.metric("vestibule_policy_answers_total", command="allow", answer="failed"), 6)

    def test_policy_credentials_are_read_from_a_file(self):
        basic = "Basic " + base64.b64encode(b"wforce:sesame").decode()
        for name, token in (("password_file", basic), ("api_key_file", "sesame")):
            self.service.token = token
            proxy = self.proxy(f", on_failure: deny, {name}: {self.folder.path}/secret")
            self.assertRegex(self.login(proxy, ALICE), "^a OK", name)
            self.assertNotIn("sesame", proxy.log())
        self.service.token = "another"
        self.assertRegex(self.login(proxy, ALICE), r"^a NO \[UNAVAILABLE\]")


if __name__ == "__main__":
    unittest.main()
