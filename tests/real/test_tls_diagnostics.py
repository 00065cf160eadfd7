"""Diagnostics of TLS: log records of failed handshakes, certificates with openssl's defaults, and warnings of `check`."""

import re
import shutil
import socket
import subprocess
import unittest

from fixtures import TIMEOUT, VESTIBULE, Certificates, Dovecot, Folder, Proxy, program, wait_for
from imap_client import ALICE, LOGIN, RawClient, context


def openssl(*words):
    subprocess.run([program("openssl"), *map(str, words)], check=True, capture_output=True, timeout=TIMEOUT)


class SelfSigned:
    """The result of `openssl req -x509`: a certificate with CA:TRUE and without alternative names."""

    def __init__(self, folder, name="own", days=30):
        self.ca = self.cert = folder.path / f"{name}.pem"
        self.key = folder.path / f"{name}-key.pem"
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", days, "-subj", "/CN=localhost", "-keyout", self.key, "-out", self.cert)


class HandshakeErrors(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        cls.certificates = Certificates(cls.folder)
        cls.proxy = Proxy(f"""
listeners:
  - {{address: "127.0.0.1:{{tls}}", tls: implicit}}
  - {{address: "127.0.0.1:{{starttls}}", tls: implicit, alpn: any}}
  - {{address: "127.0.0.1:{{plain}}", tls: implicit, tls_min: "1.3"}}
tls: {{certificates: [{{cert: {cls.certificates.cert}, key: {cls.certificates.key}}}]}}
backends: {{shard: {{servers: ["127.0.0.1:1"], check: off}}}}
routes: [{{default: shard}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
""")
        cls.addClassCleanup(cls.proxy.close)

    def s_client(self, *options, port="tls"):
        command = [program("openssl"), "s_client", "-CAfile", self.certificates.ca, "-servername", "localhost", "-crlf", "-ign_eof",
                   *options, "-connect", f"127.0.0.1:{self.proxy.ports[port]}"]
        done = subprocess.run([str(word) for word in command], input=b"a LOGOUT\n", capture_output=True, timeout=TIMEOUT)
        return done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")

    def wait_for_log(self, words):
        wait_for(f"a record with {words!r}", lambda: words in self.proxy.log())

    def test_alpn_mismatch_is_logged(self):
        self.s_client("-alpn", "h2,http/1.1")
        self.wait_for_log('the client offers the application protocols h2, http/1.1 (ALPN), but not imap')
        self.assertIn("set `alpn: any` for the listener", self.proxy.log())
        output = self.s_client("-alpn", "h2,http/1.1", port="starttls")
        self.assertIn("* BYE", output, "accepted because of alpn: any")
        self.assertIn("No ALPN negotiated", output)
        self.assertIn("ALPN protocol: imap", self.s_client("-alpn", "h2,imap", port="starttls"))

    def test_old_tls_version_is_logged(self):
        self.s_client("-tls1_1", "-cipher", "ALL:@SECLEVEL=0")
        self.wait_for_log("the client offers at most TLS 1.1, but this listener requires TLS 1.2; cipher suites TLS_ECDHE_")
        self.s_client("-tls1_2", port="plain")
        self.wait_for_log("the client offers at most TLS 1.2, but this listener requires TLS 1.3")

    def test_cipher_suite_mismatch_is_logged(self):
        self.s_client("-tls1_2", "-cipher", "AES128-SHA:AES256-SHA:@SECLEVEL=0")
        self.wait_for_log("the client offers no cipher suite with forward secrecy and AEAD encryption: "
                  "TLS_RSA_WITH_AES_128_CBC_SHA, TLS_RSA_WITH_AES_256_CBC_SHA")

    def test_unexpected_proxy_header_is_warned_of_once(self):
        for number in range(3):
            with socket.create_connection(("127.0.0.1", self.proxy.ports["tls"]), timeout=TIMEOUT) as balancer:
                balancer.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 4000 993\r\n\x16\x03\x01")
                while balancer.recv(100):
                    pass
            named = number + 1
            wait_for("the reason", lambda named=named: self.proxy.metric("vestibule_failures_total", reason="unexpected_proxy_header") == named)
        warning = "received a PROXY header on a listener without proxy_protocol"
        self.assertEqual(self.proxy.log().count(warning), 1)


class CertificateDiagnostics(unittest.TestCase):
    def setUp(self):
        self.folder = Folder()
        self.addCleanup(self.folder.remove)

    def check(self, configuration, *options):
        file = self.folder.write("check.yaml", configuration)
        return subprocess.run([VESTIBULE, "check", "--config", str(file), *options], capture_output=True, text=True, timeout=TIMEOUT)

    def configuration(self, tls, port, more=""):
        return f"""
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none}}]
backends: {{shard: {{servers: ["localhost:{port}"], tls: {{mode: implicit, {tls}}}{more}}}}}
routes: [{{default: shard}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
"""

    def test_self_signed_server_certificate(self):
        own = SelfSigned(self.folder)
        server = Dovecot(own)
        self.addCleanup(server.close)
        # The certificate is not trusted: `check` warns, and prints the pin that would trust it.
        done = self.check(self.configuration("server_name: localhost", server.tls_port).replace("{plain}", "0").replace("{admin}", "0"))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stderr, r"^warning: \S+check.yaml:3:\d+: backends.shard.servers\[0\]: TLS with localhost:\d+ fails")
        self.assertIn("self-signed", done.stderr)
        pin = re.search(r'pin: "(sha256:[A-Za-z0-9+/=]+)"', done.stderr)[1]
        offline = self.check(self.configuration("server_name: localhost", server.tls_port).replace("{plain}", "0").replace("{admin}", "0"), "--offline")
        self.assertEqual((offline.returncode, offline.stderr), (0, ""))
        # The certificate is trusted as its own `ca`, and by the pin.
        for tls in (f"ca: {own.cert}", f"pin: '{pin}'"):
            with self.subTest(tls):
                proxy = Proxy(self.configuration(tls, server.tls_port))
                self.addCleanup(proxy.close)
                client = RawClient(proxy.ports["plain"])
                self.addCleanup(client.close)
                client.line()
                self.assertRegex(client.command("a", LOGIN[ALICE])[-1], b"^a OK", proxy.log())
        # The name is still verified.
        proxy = Proxy(self.configuration(f"ca: {own.cert}, server_name: mail.example.org", server.tls_port))
        self.addCleanup(proxy.close)
        client = RawClient(proxy.ports["plain"])
        self.addCleanup(client.close)
        client.line()
        self.assertRegex(client.command("a", LOGIN[ALICE])[-1], rb"^a NO \[UNAVAILABLE\]")
        self.assertIn("the certificate is not valid for mail.example.org", proxy.log())

    def test_self_signed_client_certificate(self):
        """A self-signed client certificate is trusted if it is in client_certificates.ca itself."""
        certificates, own = Certificates(self.folder), SelfSigned(self.folder, "client")
        untrusted = SelfSigned(self.folder, "untrusted")
        proxy = Proxy(f"""
listeners:
  - {{address: "127.0.0.1:{{tls}}", tls: implicit, client_certificates: {{ca: {own.cert}, required: true, user: common-name}}}}
tls: {{certificates: [{{cert: {certificates.cert}, key: {certificates.key}}}]}}
backends: {{shard: {{servers: ["127.0.0.1:1"], check: off}}}}
routes: [{{default: shard}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
""")
        self.addCleanup(proxy.close)
        trusting = context(certificates.ca)
        trusting.load_cert_chain(own.cert, own.key)
        client = RawClient(proxy.ports["tls"], trusting)
        self.addCleanup(client.close)
        self.assertTrue(client.line().startswith(b"* OK"))
        refused = context(certificates.ca)
        refused.load_cert_chain(untrusted.cert, untrusted.key)
        with self.assertRaises(OSError):
            client = RawClient(proxy.ports["tls"], refused)
            self.addCleanup(client.close)
            assert client.line(), "closed"
            raise AssertionError("an untrusted certificate was accepted")
        wait_for("the record", lambda: "the certificate is self-signed and not listed in client_certificates.ca" in proxy.log())

    def test_x509_version_1_is_reported(self):
        """`openssl x509 -req` without extensions creates such a certificate."""
        request, key, cert = (self.folder.path / name for name in ("v1.csr", "v1-key.pem", "v1.pem"))
        openssl("req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", key, "-out", request)
        openssl("x509", "-req", "-in", request, "-signkey", key, "-days", "30", "-out", cert)
        own = SelfSigned(self.folder)
        own.ca = own.cert = cert
        own.key = key
        done = self.check(f"""
listeners: [{{address: "127.0.0.1:0", tls: implicit}}]
tls: {{certificates: [{{cert: {cert}, key: {key}}}]}}
backends: {{shard: {{servers: ["127.0.0.1:1"]}}}}
routes: [{{default: shard}}]
""")
        self.assertEqual(done.returncode, 78)
        self.assertIn("X.509 version 1, which TLS libraries refuse: create a version 3 certificate", done.stderr)
        server = Dovecot(own)
        self.addCleanup(server.close)
        for tls in (f"ca: {cert}", "pin: 'sha256:" + "A" * 43 + "='", "insecure: true"):
            with self.subTest(tls):
                done = self.check(self.configuration(tls, server.tls_port).replace("{plain}", "0").replace("{admin}", "0"))
                self.assertEqual(done.returncode, 0)
                self.assertIn("X.509 version 1, which TLS libraries refuse", done.stderr)

    def test_configuration_warnings(self):
        text = self.configuration("insecure: true", 1, more=", client_info: none").replace("{plain}", "0").replace("{admin}", "0")
        done = self.check(text)
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stderr, r"^warning: \S+check.yaml:3:\d+: backends.shard.client_info: with client_info: none")
        self.assertIn("login_trusted_networks", done.stderr)
        sql = "{sql: {url: 'sqlite:users.db', query: \"SELECT b FROM u WHERE n = '%{user}'\"}}"
        done = self.check(text.replace("{default: shard}", sql))
        self.assertEqual(done.returncode, 78)
        self.assertRegex(done.stderr, r"check.yaml:4:\d+: routes\[0\].sql.query: %\{user\} is within quotes")

    def test_unwritable_cache_file_is_warned_of(self):
        text = """
listeners: [{address: "127.0.0.1:0", tls: none}]
backends: {shard: {servers: ["127.0.0.1:1"]}}
routes: [{redis: {url: "redis://127.0.0.1", key: "u:%{user}", cache: {file: answers.json}}}]
"""
        self.assertEqual(self.check(text).stderr, "", "root can write the file")
        done = self.check(text + "run_as: {user: nobody}\n")
        self.assertRegex(done.stderr, r"^warning: \S+check.yaml:4:\d+: routes\[0\].redis.cache.file: the user of run_as cannot write in /tmp/")
        self.check(text)
        # Copy the program to where another user can run it.
        copy = self.folder.path / "vestibule"
        shutil.copy(VESTIBULE, copy)
        done = subprocess.run([program("setpriv"), "--reuid", "65534", "--clear-groups", copy, "check", "--config",
                               self.folder.path / "check.yaml"], capture_output=True, text=True, timeout=TIMEOUT)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stderr, r"^warning: \S+check.yaml:4:\d+: routes\[0\].redis.cache.file: this user cannot write in /tmp/")
        self.assertIn("use a directory like /var/lib/vestibule that belongs to the service's user", done.stderr)


if __name__ == "__main__":
    unittest.main()
