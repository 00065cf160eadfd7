"""Passwords are wiped from the memory of the process after a login."""

import base64
import re
import secrets
import unittest
from pathlib import Path

from fixtures import Certificates, Dovecot, Folder, Proxy
from imap_client import RawClient, context

ALICE = "alice@example.org"
CONFIGURATION = """
listeners:
  - {{address: "127.0.0.1:{{tls}}", tls: implicit}}
  - {{address: "127.0.0.1:{{plain}}", tls: none}}
tls: {{certificates: [{{cert: {cert}, key: {key}}}]}}
backends: {{only: {{servers: ["127.0.0.1:{server}"], tls: {tls}, check: off}}}}
routes: [{{default: only}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
log: {{level: trace}}
limits: {{workers: 1}}
"""


def memory(pid):
    """The writable memory of a process that is present."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as image:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            start, end, access = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line).groups()
            start, end = int(start, 16), int(end, 16)
            if access.startswith("rw"):
                try:
                    image.seek(start)
                    yield image.read(end - start)
                except OSError:
                    # Mappings that only the kernel can read.
                    continue


def occurrences(pid, words):
    """How often each of `words` is in the memory of a process; words that are not there are left out."""
    found = {}
    for part in memory(pid):
        for word in words:
            count = part.count(word)
            if count:
                found[word] = found.get(word, 0) + count
    return found


class PasswordsInMemory(unittest.TestCase):
    """Uses long random passwords, so that a match cannot be a coincidence."""

    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        cls.certificates = Certificates(cls.folder)
        cls.password = secrets.token_hex(24)
        cls.dovecot = Dovecot(cls.certificates, users={ALICE: cls.password})
        cls.addClassCleanup(cls.dovecot.close)

    def passwords_in_memory(self, port, tls="none", server=None):
        """Logs in with each command, with right and wrong passwords, and searches the memory for the passwords."""
        proxy = Proxy(CONFIGURATION.format(cert=self.certificates.cert, key=self.certificates.key, tls=tls,
                                           server=server or self.dovecot.port))
        self.addCleanup(proxy.close)
        pid = proxy.process.child.pid
        wrong = secrets.token_hex(24)
        encoded = {}
        for password in (self.password, wrong):
            message = base64.b64encode(f"\0{ALICE}\0{password}".encode()).decode()
            alone = base64.b64encode(password.encode()).decode()
            encoded[password] = [password, message[-40:-4], alone[:40]]
            for command in (f"LOGIN {ALICE} {password}", f'LOGIN {ALICE} "{password}"', f"LOGIN {ALICE} {{{len(password)}+}}\r\n{password}",
                            f"AUTHENTICATE PLAIN {message}", f"AUTHENTICATE PLAIN\r\n{message}",
                            f"AUTHENTICATE LOGIN\r\n{base64.b64encode(ALICE.encode()).decode()}\r\n{alone}"):
                client = RawClient(proxy.ports[port], context(self.certificates.ca) if port == "tls" else None)
                self.addCleanup(client.close)
                client.line()
                answer = client.command("a", command)[-1]
                self.assertEqual(answer.startswith(b"a OK"), password == self.password, answer)
                if password == self.password:
                    self.assertTrue(client.command("b", "NOOP")[-1].startswith(b"b OK"))
        words = [word.encode() for forms in encoded.values() for word in forms]
        # The search works: it finds the user name, which is in the log records of open sessions.
        self.assertTrue(occurrences(pid, [ALICE.encode()]))
        return occurrences(pid, words)

    def test_plaintext_logins_leave_no_password_in_memory(self):
        self.assertEqual(self.passwords_in_memory("plain"), {})

    def test_tls_logins_leave_at_most_one_password_per_connection(self):
        """rustls does not wipe its decryption buffer: it keeps the last record of a connection until the next one arrives or
        the memory is reused. That is one copy per connection, of which there are twelve; no copy is in buffers of Vestibule."""
        self.assertLessEqual(sum(self.passwords_in_memory("tls").values()), 12)

    def test_logins_over_server_tls_leave_no_password_in_memory(self):
        tls = f"{{mode: implicit, ca: {self.certificates.ca}}}"
        self.assertEqual(self.passwords_in_memory("plain", tls, self.dovecot.tls_port), {})


if __name__ == "__main__":
    unittest.main()
