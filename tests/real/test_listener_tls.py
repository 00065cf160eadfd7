"""TLS of listeners, tested with openssl s_client: versions, server names, signatures, OCSP, session tickets shared between
hosts; and renewal of certificates and keys in the running process.
"""

import base64
import os
import re
import socket
import ssl
import subprocess
import unittest

from fixtures import PASSWORDS, TIMEOUT, Certificates, Dovecot, Folder, Proxy, program, wait_for
from imap_client import RawClient, context
from tls_fixtures import CommandLineClient

ALICE = "alice@example.org"
OLD = {"TLS 1.0": "-tls1", "TLS 1.1": "-tls1_1"}
VERSIONS = {"1.2": "-tls1_2", "1.3": "-tls1_3"}


class ListenerTlsTestCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        cls.certificates = Certificates(cls.folder)
        cls.server = Dovecot(cls.certificates)
        cls.addClassCleanup(cls.server.close)

    def proxy(self, first="", second="", third="", certificates="", more="", folder=None):
        """Three listeners with implicit TLS at the ports `tls`, `starttls` and `plain`."""
        certificates = certificates or f"{{cert: {self.certificates.cert}, key: {self.certificates.key}}}"
        listeners = "".join(f'  - {{address: "127.0.0.1:{{{port}}}", tls: implicit, {policy}}}\n'
                            for port, policy in (("tls", first), ("starttls", second), ("plain", third)))
        proxy = Proxy(f"""
listeners:
{listeners}
tls: {{certificates: [{certificates}], {more}}}
backends: {{shard: {{servers: ["127.0.0.1:{self.server.port}"]}}}}
routes: [{{default: shard}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
""", folder)
        self.addCleanup(proxy.close)
        return proxy

    def s_client(self, proxy, *options, port="tls", name="localhost", commands=b"a LOGOUT\n"):
        """Sends `commands` and returns the output of s_client, followed by its exit code."""
        name = ["-servername", name] if name else ["-noservername"]
        command = [program("openssl"), "s_client", "-crlf", "-ign_eof", "-CAfile", self.certificates.ca, *name, *options,
                   "-connect", f"127.0.0.1:{proxy.ports[port]}"]
        done = subprocess.run([str(word) for word in command], input=commands, capture_output=True, timeout=TIMEOUT)
        return f"{done.stdout.decode(errors='replace')}{done.stderr.decode(errors='replace')}\nexit {done.returncode}"

    def log_in(self, proxy, port="tls"):
        raw = RawClient(proxy.ports[port], context(self.certificates.ca))
        self.addCleanup(raw.close)
        raw.line()
        self.assertRegex(raw.command("a", f'LOGIN {ALICE} "{PASSWORDS[ALICE]}"')[-1], b"^a OK")
        return raw

    def served_certificate(self, proxy, port="tls"):
        """The certificate that a listener serves, as a dictionary of the ssl module."""
        with socket.create_connection(("127.0.0.1", proxy.ports[port]), timeout=TIMEOUT) as plain:
            with context(self.certificates.ca).wrap_socket(plain, server_hostname="localhost") as tls:
                return tls.getpeercert()

    def issue(self, name, algorithm="ec", days=30, names="DNS:localhost"):
        """Issues a certificate; returns the paths of the certificate and its key."""
        path = self.folder.path
        cert, key, request = path / f"{name}.pem", path / f"{name}-key.pem", path / f"{name}.csr"
        extensions = self.folder.write(f"{name}.ext", f"subjectAltName={names}\n")
        new = ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"] if algorithm == "ec" else ["rsa:2048"]
        Certificates._run("openssl", "req", "-newkey", *new, "-nodes", "-subj", "/CN=localhost", "-keyout", key, "-out", request)
        Certificates._run("openssl", "x509", "-req", "-in", request, "-CA", self.certificates.ca, "-CAkey", path / "ca-key.pem",
                          "-CAcreateserial", "-days", str(days), "-extfile", extensions, "-out", cert)
        return cert, key

    def write_ocsp_response(self, cert, response):
        """Writes an OCSP response of the authority with status good to the file `response`, as DER."""
        path = self.folder.path
        serial = subprocess.run(["openssl", "x509", "-noout", "-serial", "-in", cert], check=True, capture_output=True,
                                text=True).stdout.strip().removeprefix("serial=")
        index = self.folder.write("index.txt", f"V\t400101000000Z\t\t{serial}\tunknown\t/CN=localhost\n")
        self.folder.write("index.txt.attr", "")
        Certificates._run("openssl", "ocsp", "-issuer", self.certificates.ca, "-cert", cert, "-no_nonce", "-reqout", path / "request.der")
        Certificates._run("openssl", "ocsp", "-index", index, "-CA", self.certificates.ca, "-rsigner", self.certificates.ca, "-rkey",
                          path / "ca-key.pem", "-reqin", path / "request.der", "-ndays", "7", "-respout", response)

    def key_file(self, name, folder=None):
        """Creates a ticket key as described in the reference configuration."""
        path = (folder or self.folder).path / name
        secret = subprocess.run(["openssl", "rand", "-base64", "48"], check=True, capture_output=True).stdout
        replace(path, secret, 0o600)
        return path


def replace(path, content, mode=0o644):
    """Replaces a file atomically."""
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(content)
    beside.chmod(mode)
    os.replace(beside, path)


class Handshakes(ListenerTlsTestCase):
    def test_old_tls_versions_are_refused(self):
        proxy = self.proxy(first='tls_min: "1.2"', second='tls_min: "1.3"')
        low = ("-cipher", "DEFAULT@SECLEVEL=0")
        for port, taken in (("tls", VERSIONS), ("starttls", {"1.3": "-tls1_3"})):
            for version, option in {**OLD, **VERSIONS}.items():
                with self.subTest(port=port, version=version):
                    output = self.s_client(proxy, option, *low, port=port)
                    if version in taken:
                        self.assertIn("a OK", output)
                    else:
                        # A client too old to send signature algorithms may be refused for that reason.
                        self.assertRegex(output, "alert (protocol version|handshake failure)" if version in OLD else "alert protocol version")
                        self.assertIn("has read 7 bytes", output, "the server sends only the alert")

    def test_unknown_server_names_are_refused_when_strict(self):
        proxy = self.proxy(first="sni: strict", second="sni: any")
        for version in VERSIONS.values():
            for name, is_known in (("localhost", True), ("MAIL.test", True), ("elsewhere.test", False), (None, False)):
                with self.subTest(version=version, name=name):
                    output = self.s_client(proxy, version, name=name)
                    self.assertEqual("a OK" in output, is_known, output)
                    # rustls itself would send access_denied.
                    self.assertEqual("unrecognized name" in output, not is_known, output)
                    self.assertIn("a OK", self.s_client(proxy, version, name=name, port="starttls"))
        self.assertEqual(proxy.metric("vestibule_failures_total", reason="handshake"), 4)

    def test_rsa_and_ecdsa_certificates_are_selected_by_signature(self):
        (rsa, rsa_key), (curve, curve_key) = self.issue("rsa", "rsa"), self.issue("curve")
        proxy = self.proxy(certificates=f"{{cert: {rsa}, key: {rsa_key}}}, {{cert: {curve}, key: {curve_key}}}")
        for options, signature in (
            (["-tls1_3"], "ECDSA"),
            (["-tls1_3", "-sigalgs", "rsa_pss_rsae_sha256"], "RSA-PSS"),
            (["-tls1_3", "-sigalgs", "rsa_pss_rsae_sha256:ecdsa_secp256r1_sha256"], "ECDSA"),
            (["-tls1_2"], "ECDSA"),
            (["-tls1_2", "-sigalgs", "RSA+SHA256"], "RSA"),
            (["-tls1_2", "-cipher", "ECDHE-RSA-AES128-GCM-SHA256"], "RSA(-PSS)?"),
        ):
            for name in ("localhost", None):
                with self.subTest(options=options, name=name):
                    output = self.s_client(proxy, *options, name=name)
                    self.assertRegex(output, rf"Peer signature type: {signature}\n")
                    self.assertIn("a OK", output)

    def test_renegotiation_before_login_ends_the_session(self):
        """test_tls_interop_clients.py tests renegotiation after the login."""
        proxy = self.proxy()
        client = CommandLineClient([program("openssl"), "s_client", "-brief", "-CAfile", str(self.certificates.ca), "-tls1_2", "-connect",
                       f"127.0.0.1:{proxy.ports['tls']}"])
        self.addCleanup(client.close)
        self.assertIn(b"* OK", client.line(), client.output())
        client.send(b"R\n")
        wait_for("s_client to give up", lambda: "no renegotiation" in client.output())
        self.assertEqual(client.line(), b"")
        wait_for("the session to end", lambda: proxy.metric("vestibule_connections") == 0)
        self.assertIn("a OK", self.s_client(proxy, "-tls1_2"))

    def test_truncated_client_hello_ends_the_connection(self):
        """After each prefix of the ClientHello: the connection ends without a response, and other sessions continue."""
        hello, incoming = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context(self.certificates.ca).wrap_bio(incoming, hello, server_hostname="localhost")
        with self.assertRaises(ssl.SSLWantReadError):
            client.do_handshake()
        first = hello.read()
        proxy = self.proxy(first="sni: any", second="sni: strict")
        other_session = self.log_in(proxy)
        cuts = (0, 1, 5, 6, len(first) // 2, len(first) - 1, len(first))
        for port in ("tls", "starttls"):
            for cut in cuts:
                with socket.create_connection(("127.0.0.1", proxy.ports[port]), timeout=TIMEOUT) as plain:
                    plain.sendall(first[:cut])
                    plain.shutdown(socket.SHUT_WR)
                    answer = b""
                    while got := plain.recv(65536):
                        answer += got
                # Only a complete ClientHello is answered with a handshake record.
                self.assertEqual(answer[:1], b"\x16" if cut == len(first) else b"", f"{cut}: {answer[:20]}")
        wait_for("the sessions to end", lambda: proxy.metric("vestibule_connections") == 1)
        self.assertEqual(proxy.metric("vestibule_failures_total", reason="handshake"), 2 * len(cuts))
        self.assertRegex(other_session.command("b", "NOOP")[-1], b"^b OK")

    def test_early_data_is_refused(self):
        """Early data is not offered, and is rejected from a client whose session file allows it."""
        proxy = self.proxy()
        session, early = self.folder.path / "early.session", self.folder.write("early", "e NOOP\r\n")
        self.assertIn("Max Early Data: 0", self.s_client(proxy, "-tls1_3", "-sess_out", session))
        self.assertIn("Early data was not sent", self.s_client(proxy, "-tls1_3", "-sess_in", session, "-early_data", early))
        self.s_client(proxy, "-tls1_3", "-sess_out", session)
        allow_early_data(session)
        output = self.s_client(proxy, "-tls1_3", "-sess_in", session, "-early_data", early)
        self.assertIn("Early data was rejected", output)
        self.assertIn("Reused, TLSv1.3", output)
        self.assertNotIn("e OK", output)
        self.assertIn("a OK", output)


def allow_early_data(session):
    """Inserts max_early_data into OpenSSL's session file: element [15] of an ordered sequence."""
    der = base64.b64decode("".join(line for line in session.read_text().splitlines() if "-----" not in line))

    def content_range(at):
        """The start and the end of the content of the element at `at`."""
        size, octets = der[at + 1], 0
        if size & 0x80:
            octets = size & 0x7F
            size = int.from_bytes(der[at + 2:at + 2 + octets], "big")
        return at + 2 + octets, at + 2 + octets + size

    start, end = content_range(0)
    at = start
    while at < end and not 0xB0 <= der[at] < 0xC0:
        at = content_range(at)[1]
    content = der[start:at] + bytes.fromhex("af0402024000") + der[at:end]
    der = b"\x30\x82" + len(content).to_bytes(2, "big") + content
    body = base64.encodebytes(der).decode()
    session.write_text(f"-----BEGIN SSL SESSION PARAMETERS-----\n{body}-----END SSL SESSION PARAMETERS-----\n")


class Tickets(ListenerTlsTestCase):
    def test_ticket_is_accepted_only_under_its_own_policy(self):
        client_certificates = f"client_certificates: {{ca: {self.certificates.ca}"
        proxy = self.proxy(second='tls_min: "1.3"', third=f"{client_certificates}, required: true}}")
        session = self.folder.path / "policy.session"
        for version in VERSIONS.values():
            with self.subTest(version=version):
                self.assertIn("New, TLSv", self.s_client(proxy, version, "-sess_out", session))
                for port in ("tls", "starttls", "plain"):
                    output = self.s_client(proxy, version, "-sess_in", session, port=port)
                    self.assertEqual("Reused, TLSv" in output, port == "tls", f"{port}\n{output}")
                    if port == "plain":
                        self.assertRegex(output, "alert (certificate required|handshake failure)")
                        self.assertNotIn("* OK", output)

    def test_shared_ticket_keys_resume_on_other_hosts(self):
        folders = [Folder(), Folder()]
        for folder in folders:
            self.addCleanup(folder.remove)
        newer, older = self.key_file("newer.key"), self.key_file("older.key")
        proxies = []
        for folder in folders:
            for file in (newer, older):
                replace(folder.path / file.name, file.read_bytes(), 0o600)
            proxies.append(self.proxy(second='tls_min: "1.3"', more="ticket_keys: [newer.key, older.key]", folder=folder))
        one, two = proxies
        unrelated = self.proxy()
        sessions = {version: self.folder.path / f"shared-{version}.session" for version in VERSIONS}

        def resumed(proxy, port="tls"):
            output = {version: self.s_client(proxy, option, "-sess_in", sessions[version], port=port)
                      for version, option in VERSIONS.items()}
            for text in output.values():
                self.assertRegex(text, "(New|Reused), ", "the handshake succeeds")
            return ["Reused, TLSv" in text for text in output.values()]

        for version, option in VERSIONS.items():
            self.assertIn("New, TLSv", self.s_client(one, option, "-sess_out", sessions[version]))
        self.assertEqual(resumed(one), [True, True])
        self.assertEqual(resumed(two), [True, True])
        self.assertEqual(resumed(two, "starttls"), [False, False])
        self.assertEqual(resumed(unrelated), [False, False])

        # A new key is added and the oldest is removed: tickets of the remaining key stay valid.
        next_key = self.key_file("next.key").read_bytes()
        loads = [0, 0]

        def rotate(first, second):
            for at, folder in enumerate(folders):
                replace(folder.path / "older.key", second, 0o600)
                replace(folder.path / "newer.key", first, 0o600)
                loads[at] += 1
            for at, proxy in enumerate(proxies):
                wait_for("the keys", lambda: proxy.log().count("ticket keys loaded") >= loads[at])

        rotate(next_key, newer.read_bytes())
        self.assertEqual(resumed(one), [True, True])
        self.assertEqual(resumed(two), [True, True])

        # A key file that other users can read is refused; the old keys stay in use.
        bad = folders[1].path / "newer.key"
        replace(bad, self.key_file("bad.key").read_bytes(), 0o644)
        wait_for("the gauge", lambda: two.metric("vestibule_ticket_keys_load_failed") == 1)
        self.assertIn(f"{bad}: is accessible by all users of this machine (mode 644): run chmod 600; the old ticket keys stay in use", two.log())
        self.assertEqual(resumed(two), [True, True])
        bad.chmod(0o600)
        wait_for("the gauge", lambda: two.metric("vestibule_ticket_keys_load_failed") == 0)
        loads[1] += 1

        # The key that encrypted the tickets is removed.
        rotate(self.key_file("last.key").read_bytes(), next_key)
        self.assertEqual(resumed(one), [False, False])
        self.assertEqual(resumed(two), [False, False])
        for secret in (newer, older):
            self.assertNotIn(secret.read_text().strip()[:20], one.log())

    def test_check_reports_invalid_ticket_keys(self):
        short = self.folder.path / "short.key"
        replace(short, b"too short", 0o600)
        proxy = self.proxy()
        wrong = proxy.file.with_name("wrong.yaml")
        wrong.write_text(proxy.file.read_text().replace("tls: {certificates", f"tls: {{ticket_keys: [{short}], certificates"))
        done = subprocess.run([proxy.process.child.args[3], "check", "--config", wrong], capture_output=True, text=True, timeout=TIMEOUT)
        self.assertNotEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("tls.ticket_keys[0]", done.stderr)
        self.assertIn("32 are required", done.stderr)


class CertificateRenewal(ListenerTlsTestCase):
    def load_failed(self, proxy):
        return proxy.metric("vestibule_certificate_load_failed")

    def expiry(self, proxy):
        return proxy.metric("vestibule_certificate_expiry_timestamp_seconds")

    def volume(self, name, versions):
        """A folder with the layout of Kubernetes: files are links through a link to the folder of a version."""
        path = self.folder.path / name
        path.mkdir()
        for version, (cert, key) in versions.items():
            (path / version).mkdir()
            (path / version / "tls.crt").write_bytes(cert.read_bytes())
            (path / version / "tls.key").write_bytes(key.read_bytes())
        (path / "..data").symlink_to(next(iter(versions)))
        for file in ("tls.crt", "tls.key"):
            (path / file).symlink_to(f"..data/{file}")
        return path

    def test_certificate_is_renewed_without_ending_sessions(self):
        old, new = self.issue("old", days=30), self.issue("new", days=300)
        volume = self.volume("volume", {"1": old, "2": new})
        proxy = self.proxy(certificates=f"{{cert: {volume}/tls.crt, key: {volume}/tls.key}}")
        before, expiry = self.served_certificate(proxy), self.expiry(proxy)
        self.assertEqual(ssl.cert_time_to_seconds(before["notAfter"]), expiry)
        session = self.log_in(proxy)
        number = 0

        def check_session():
            nonlocal number
            number += 1
            self.assertRegex(session.command(f"n{number}", "NOOP")[-1], f"^n{number} OK".encode())
            return True

        (volume / "..new").symlink_to("2")
        os.replace(volume / "..new", volume / "..data")
        wait_for("the new certificate", lambda: check_session()
                 and self.served_certificate(proxy)["serialNumber"] != before["serialNumber"])
        after = self.served_certificate(proxy)
        self.assertEqual(ssl.cert_time_to_seconds(after["notAfter"]), self.expiry(proxy))
        self.assertGreater(self.expiry(proxy), expiry)
        self.assertIn("certificate loaded", proxy.log())
        check_session()
        self.assertRegex(session.command("s", "SELECT INBOX")[-1], b"^s OK")
        self.assertEqual(self.load_failed(proxy), 0)

    def test_invalid_certificate_pair_keeps_the_old_one(self):
        (cert, key), other = self.issue("kept"), self.issue("other")
        cert_bytes, key_bytes = cert.read_bytes(), key.read_bytes()
        proxy = self.proxy(certificates=f"{{cert: {cert}, key: {key}}}")
        before = self.served_certificate(proxy)
        for file, content, reason in (
            (key, other[1].read_bytes(), f"{key}: does not match the certificate {cert}"),
            (cert, cert_bytes[:len(cert_bytes) // 2], f"{cert}: "),
            (cert, b"", f"{cert}: "),
            (key, key_bytes[:len(key_bytes) // 2], f"{key}: "),
        ):
            with self.subTest(file=file.name, size=len(content)):
                good, reported = file.read_bytes(), proxy.log().count("the old certificate stays in use")
                replace(file, content)
                wait_for("the gauge", lambda: self.load_failed(proxy) == 1)
                lines = [line for line in proxy.log().splitlines() if "the old certificate stays in use" in line]
                self.assertEqual(len(lines), reported + 1)
                self.assertRegex(lines[-1], "ERROR")
                self.assertIn(reason, lines[-1])
                self.assertEqual(self.served_certificate(proxy), before)
                replace(file, good)
                wait_for("the gauge", lambda: self.load_failed(proxy) == 0)
        self.assertNotIn(re.sub(r"\s", "", key_bytes.decode())[40:60], proxy.log())
        # A valid pair is used after both files are overwritten in place, as cp does.
        cert.write_bytes(other[0].read_bytes())
        key.write_bytes(other[1].read_bytes())
        wait_for("the new certificate", lambda: self.served_certificate(proxy) != before)
        wait_for("the gauge", lambda: self.load_failed(proxy) == 0)

    def test_ocsp_response_is_stapled_and_renewed(self):
        (cert, key), other = self.issue("stapled"), self.issue("unstapled")
        response, wrong = self.folder.path / "ocsp.der", self.folder.path / "wrong.der"
        self.write_ocsp_response(cert, response)
        self.write_ocsp_response(other[0], wrong)
        good = response.read_bytes()
        proxy = self.proxy(certificates=f"{{cert: {cert}, key: {key}, ocsp: {response}}}")

        def status(*options):
            output = self.s_client(proxy, "-status", *options)
            self.assertIn("a OK", output)
            return "good" if "Cert Status: good" in output else re.search("OCSP response: (.*)", output)[1]

        for version in VERSIONS.values():
            self.assertEqual(status(version), "good")
        replace(response, wrong.read_bytes())
        wait_for("the gauge", lambda: self.load_failed(proxy) == 1)
        self.assertIn(f"{response}: is for another certificate; the certificate is sent without it", proxy.log())
        self.assertEqual(status(), "no response sent")
        replace(response, good)
        wait_for("the gauge", lambda: self.load_failed(proxy) == 0)
        self.assertEqual(status(), "good")
        replace(response, b"nonsense")
        wait_for("the gauge", lambda: self.load_failed(proxy) == 1)
        self.assertIn(f"{response}: is not an OCSP response in DER; the old response stays in use while it is valid", proxy.log())
        self.assertEqual(status(), "good")


if __name__ == "__main__":
    unittest.main()
