"""ImapFlow, a Node.js client library: passwords, tokens, STARTTLS, reading, writing and IDLE through the proxy."""

import imaplib
import json
import subprocess
import unittest
from pathlib import Path

from fixtures import CACHE, PASSWORDS, TIMEOUT, program
from imap_client import message
from test_authentication import ALICE, BOB, DovecotWithAllMechanisms, token

LIBRARY = CACHE / "imapflow"
CLIENT = Path(__file__).with_name("imapflow") / "client.mjs"


class ImapFlow(DovecotWithAllMechanisms, unittest.TestCase):
    def run_client(self, proxy, auth, subject, port="tls", mail_for=None):
        """Runs the client and returns its result. The user `mail_for` gets a message while the client is in IDLE."""
        assert LIBRARY.is_dir(), "imapflow is not unpacked: run tests/run"
        task = {"port": proxy.ports[port], "secure": port == "tls", "ca": str(self.certificates.ca), "auth": auth,
                "subject": subject, "message": message(subject, "x" * 100_000 + "\r\n").decode()}
        command = [program("node"), CLIENT, json.dumps(task), LIBRARY]
        with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            try:
                if mail_for:
                    first = child.stdout.readline()
                    if first != '{"idle":true}\n':
                        raise AssertionError(f"{first}{child.stderr.read()}\n{proxy.log()}")
                    other = imaplib.IMAP4("127.0.0.1", self.server.port, timeout=TIMEOUT)
                    other.login(mail_for, PASSWORDS[mail_for])
                    other.append("INBOX", None, None, message("news"))
                    other.logout()
                out, error = child.communicate(timeout=TIMEOUT)
            finally:
                child.kill()
        self.assertTrue(out, error)
        return json.loads(out.splitlines()[-1])

    def assert_reads_and_writes(self, proxy, auth, subject, port="tls"):
        result = self.run_client(proxy, auth, subject, port, mail_for=auth["user"])
        self.assertEqual(result.get("subject"), subject, f"{result}\n{proxy.log()}")
        self.assertGreater(result["size"], 100_000)
        self.assertGreaterEqual(result["count"], 2)
        # The capabilities in the login response are those of the server.
        self.assertIn("IDLE", result["capabilities"])

    def test_imapflow_logs_in_with_passwords(self):
        proxy = self.wait_until_mechanisms_are_known(self.proxy())
        for method in (None, "LOGIN", "AUTH=LOGIN", "AUTH=PLAIN"):
            auth = {"user": ALICE, "pass": PASSWORDS[ALICE], **({"loginMethod": method} if method else {})}
            self.assert_reads_and_writes(proxy, auth, f"flow-{method}")
            result = self.run_client(proxy, {**auth, "pass": "wrong"}, "never")
            self.assertTrue(result["refused"] and result["code"] == "AUTHENTICATIONFAILED", result)
        for mechanism in ("login", "sasl-login", "sasl-plain"):
            self.assertGreater(proxy.metric("vestibule_logins_total", mechanism=mechanism, outcome="accepted"), 0, mechanism)

    def test_imapflow_uses_starttls(self):
        proxy = self.wait_until_mechanisms_are_known(self.proxy())
        self.assert_reads_and_writes(proxy, {"user": ALICE, "pass": PASSWORDS[ALICE]}, "flow-starttls", "starttls")

    def test_imapflow_logs_in_with_tokens(self):
        for mechanism in ("xoauth2", "oauthbearer"):
            proxy = self.proxy(listener=f"mechanisms: [{mechanism}]")
            self.assert_reads_and_writes(proxy, {"user": BOB, "accessToken": token(BOB)}, f"flow-{mechanism}")
            result = self.run_client(proxy, {"user": BOB, "accessToken": "nonsense"}, "never")
            # The client has received the error of the server about the token.
            self.assertTrue(result["refused"] and "status" in result["oauth"], f"{result}\n{proxy.log()}")
            self.assertEqual(proxy.metric("vestibule_logins_total", mechanism=mechanism, outcome="accepted"), 1)
            self.assertEqual(proxy.metric("vestibule_logins_total", mechanism=mechanism, outcome="refused"), 1)


if __name__ == "__main__":
    unittest.main()
