"""Mail clients read and write through the proxy: curl, mbsync, mutt, openssl s_client.

The other files use imaplib.
"""

import subprocess
import unittest

from fixtures import PASSWORDS, TIMEOUT, Certificates, Dovecot, Folder, Proxy, program
from imap_client import message

ALICE, BOB = "alice@example.org", "bob@example.net"


class MailClients(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        cls.certificates = Certificates(cls.folder)
        cls.a = Dovecot(cls.certificates)
        cls.addClassCleanup(cls.a.close)
        cls.b = Dovecot(cls.certificates)
        cls.addClassCleanup(cls.b.close)
        cls.proxy = Proxy(f"""
listeners:
  - {{address: "127.0.0.1:{{tls}}", tls: implicit}}
  - {{address: "127.0.0.1:{{starttls}}", tls: starttls}}
tls: {{certificates: [{{cert: {cls.certificates.cert}, key: {cls.certificates.key}}}]}}
backends:
  shard-a: {{servers: ["127.0.0.1:{cls.a.port}"]}}
  shard-b: {{servers: ["127.0.0.1:{cls.b.tls_port}"], tls: {{mode: implicit, ca: {cls.certificates.ca}}}}}
routes: [{{domain: {{example.org: shard-a, example.net: shard-b}}}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
""")
        cls.addClassCleanup(cls.proxy.close)

    def run_program(self, *command, **options):
        done = subprocess.run([str(word) for word in command], capture_output=True, timeout=TIMEOUT, **options)
        self.assertEqual(done.returncode, 0, f"{command}\n{done.stdout.decode()}\n{done.stderr.decode()}\n{self.proxy.log()}")
        return done.stdout.decode(errors="replace")

    def server_of(self, user):
        return self.a if user == ALICE else self.b

    def assert_stored_only_on_own_server(self, user, subject):
        other = self.b if user == ALICE else self.a
        self.assertTrue(any(subject in text for text in self.server_of(user).messages(user)), subject)
        self.assertFalse(any(subject in text for text in other.messages(user)), subject)

    def test_curl_appends_and_fetches(self):
        mail = self.folder.path / "mail.eml"
        for user in (ALICE, BOB):
            for scheme, port in (("imaps", "tls"), ("imap", "starttls")):
                subject = f"curl-{scheme}-{user.split('@')[0]}"
                mail.write_bytes(message(subject))
                url = f"{scheme}://localhost:{self.proxy.ports[port]}/INBOX"
                curl = [program("curl"), "-sS", "--ssl-reqd", "--cacert", self.certificates.ca, "--user",
                        f"{user}:{PASSWORDS[user]}"]
                self.run_program(*curl, "-T", mail, url)
                self.assert_stored_only_on_own_server(user, subject)
                listed = self.run_program(*curl, url, "-X", f'SEARCH SUBJECT "{subject}"')
                number = listed.split()[-1]
                self.assertIn(f"Subject: {subject}", self.run_program(*curl, f"{url};MAILINDEX={number}"))

    def test_mbsync_pushes_and_pulls(self):
        for user, port, encryption in ((ALICE, "tls", "IMAPS"), (BOB, "tls", "IMAPS"), (ALICE, "starttls", "STARTTLS")):
            name = f"{user.split('@')[0]}-{port}"
            local = self.folder.path / f"mbsync-{name}"
            for part in ("cur", "new", "tmp"):
                (local / "INBOX" / part).mkdir(parents=True)
            (local / "INBOX/new/1.local").write_bytes(message(f"mbsync-push-{name}"))
            configuration = self.folder.write(f"mbsyncrc-{name}", f"""
IMAPAccount account
Host localhost
Port {self.proxy.ports[port]}
User {user}
Pass {PASSWORDS[user]}
SSLType {encryption}
CertificateFile {self.certificates.ca}

IMAPStore far
Account account

MaildirStore near
Path {local}/
Inbox {local}/INBOX

Channel channel
Far :far:
Near :near:
Patterns INBOX
Sync All
Create Both
SyncState *
""", 0o600)
            self.run_program(program("mbsync"), "-c", configuration, "-a")
            self.assert_stored_only_on_own_server(user, f"mbsync-push-{name}")
            curl = [program("curl"), "-sS", "--cacert", self.certificates.ca, "--user", f"{user}:{PASSWORDS[user]}"]
            mail = self.folder.path / "pull.eml"
            mail.write_bytes(message(f"mbsync-pull-{name}"))
            self.run_program(*curl, "-T", mail, f"imaps://localhost:{self.proxy.ports['tls']}/INBOX")
            self.run_program(program("mbsync"), "-c", configuration, "-a")
            pulled = [path.read_text() for path in local.glob("INBOX/*/*") if path.is_file() and path.parent.name in ("cur", "new")]
            self.assertTrue(any(f"mbsync-pull-{name}" in text for text in pulled))

    def test_mutt_saves_sent_messages(self):
        configuration = self.folder.write("muttrc", f"""
set ssl_force_tls=yes
set ssl_ca_certificates_file="{self.certificates.ca}"
set imap_user="{ALICE}"
set imap_pass="{PASSWORDS[ALICE]}"
set sendmail=/bin/true
set copy=yes
set confirmcreate=no
""", 0o600)
        for scheme, port in (("imaps", "tls"), ("imap", "starttls")):
            subject = f"mutt-{scheme}"
            url = f"{scheme}://localhost:{self.proxy.ports[port]}/INBOX"
            self.run_program(program("mutt"), "-n", "-F", configuration, "-e", f"set record={url}", "-s", subject, BOB,
                             input=b"Hello.\n", env={"TERM": "xterm", "HOME": str(self.folder.path), "PATH": "/usr/bin:/bin"})
            self.assert_stored_only_on_own_server(ALICE, subject)

    def test_mutt_reads_messages(self):
        # mutt needs a terminal; `push` in its configuration types the commands that copy the messages to a file and quit.
        mail = self.folder.path / "mail-for-mutt.eml"
        mail.write_bytes(message("for-mutt", "Read by mutt.\r\n"))
        self.run_program(program("curl"), "-sS", "--cacert", self.certificates.ca, "--user", f"{BOB}:{PASSWORDS[BOB]}", "-T", mail,
                         f"imaps://localhost:{self.proxy.ports['tls']}/INBOX")
        for scheme, port in (("imaps", "tls"), ("imap", "starttls")):
            copies = self.folder.path / f"mutt-copies-{scheme}"
            configuration = self.folder.write(f"muttrc-{scheme}", f"""
set ssl_force_tls=yes
set ssl_ca_certificates_file="{self.certificates.ca}"
set imap_user="{BOB}"
set imap_pass="{PASSWORDS[BOB]}"
set folder="{self.folder.path}"
set wait_key=no
set confirmappend=no
set confirmcreate=no
set delete=no
set quit=yes
push "<tag-pattern>~s for-mutt<enter><tag-prefix><copy-message>{copies}<enter><quit>"
""", 0o600)
            url = f"{scheme}://localhost:{self.proxy.ports[port]}/INBOX"
            self.run_program(program("script"), "-qec", f"mutt -n -F {configuration} -f {url}", "/dev/null", stdin=subprocess.DEVNULL,
                             env={"TERM": "xterm", "HOME": str(self.folder.path), "PATH": "/usr/bin:/bin", "LINES": "24", "COLUMNS": "80"})
            self.assertIn("Read by mutt.", copies.read_text())

    def test_openssl_s_client_logs_in(self):
        for extra, port in (((), "tls"), (("-starttls", "imap"), "starttls")):
            output = self.run_program(
                program("openssl"), "s_client", "-quiet", "-crlf", "-verify_return_error", "-CAfile", self.certificates.ca,
                "-servername", "localhost", "-alpn", "imap", *extra, "-connect", f"localhost:{self.proxy.ports[port]}",
                input=f"a LOGIN {ALICE} {PASSWORDS[ALICE]}\nb SELECT INBOX\nc LOGOUT\n".encode())
            for line in ("a OK [CAPABILITY IMAP4rev1", "b OK [READ-WRITE]", "c OK"):
                self.assertIn(line, output)

    def test_alpn_without_imap_is_refused(self):
        done = subprocess.run([program("openssl"), "s_client", "-alpn", "h2,http/1.1", "-connect",
                               f"localhost:{self.proxy.ports['tls']}"], input=b"", capture_output=True, timeout=TIMEOUT)
        self.assertIn(b"no application protocol", done.stderr)
        self.assertNotEqual(done.returncode, 0)


if __name__ == "__main__":
    unittest.main()
