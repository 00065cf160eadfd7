"""Authentication other than by plaintext password: tokens, SCRAM, certificates, master users, referrals; and user names."""

import base64
import hashlib
import hmac
import imaplib
import json
import os
import re
import subprocess
import unittest

from fixtures import PASSWORDS, TIMEOUT, Certificates, Dovecot, Folder, Proxy, free_port, program, wait_for
from imap_client import RawClient, context

ALICE, BOB, CAROL = "alice@example.org", "bob@example.net", "carol@example.org"
KEY = b"the key that signs tokens"
ALL = "plain login scram-sha-1 scram-sha-256 xoauth2 oauthbearer"
OAUTH = """
auth_master_user_separator = *
passdb {
  driver = oauth2
  mechanisms = xoauth2 oauthbearer
  args = {path}/oauth2.conf
}
passdb {
  driver = passwd-file
  mechanisms = plain login
  master = yes
  args = scheme=PLAIN {path}/masters
}
"""
TEMPLATE = """
listeners:
  - {{address: "127.0.0.1:{{tls}}", tls: implicit, {listener}}}
  - {{address: "127.0.0.1:{{starttls}}", tls: starttls}}
  - {{address: "127.0.0.1:{{plain}}", tls: none}}
tls: {{certificates: [{{cert: {cert}, key: {key}}}]}}
backends:
  shard-a: {{servers: ["127.0.0.1:{a}"], authzid: allow, check: {{interval: 1s}}, {backend}}}
{more}
routes: [{{default: shard-a}}]
users: {{{users}}}
limits: {{drain: 1s, failed_logins: 1000}}
admin: {{address: "127.0.0.1:{{admin}}"}}
"""


def token(user, key=KEY, **claims):
    """A JSON Web Token for the local validation of Dovecot."""
    def part(value):
        return base64.urlsafe_b64encode(value).rstrip(b"=")
    head = part(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
    body = part(json.dumps({"sub": user, "exp": 4102444800, "iat": 1700000000, "scope": "mail", **claims}).encode())
    return (head + b"." + body + b"." + part(hmac.new(key, head + b"." + body, hashlib.sha256).digest())).decode()


def xoauth2(user, bearer):
    return base64.b64encode(f"user={user}\x01auth=Bearer {bearer}\x01\x01".encode())


def oauthbearer(user, bearer):
    return base64.b64encode(f"n,a={user},\x01host=localhost\x01port=993\x01auth=Bearer {bearer}\x01\x01".encode())


def scram(raw, name, user, password):
    """Performs SCRAM (RFC 5802) step by step, and returns the tagged line."""
    algorithm = {"SCRAM-SHA-1": "sha1", "SCRAM-SHA-256": "sha256"}[name]
    first = f"n={user},r=abcdefghij".encode()
    raw.send(f"a AUTHENTICATE {name} ".encode() + base64.b64encode(b"n,," + first) + b"\r\n")
    line = raw.line()
    if not line.startswith(b"+ "):
        return line
    challenge = base64.b64decode(line[2:])
    parts = dict(part.split(b"=", 1) for part in challenge.split(b","))
    salted = hashlib.pbkdf2_hmac(algorithm, password.encode(), base64.b64decode(parts[b"s"]), int(parts[b"i"]))

    def mac(key, text):
        return hmac.new(key, text, algorithm).digest()

    last = b"c=biws,r=" + parts[b"r"]
    client_key = mac(salted, b"Client Key")
    whole = first + b"," + challenge + b"," + last
    proof = bytes(a ^ b for a, b in zip(client_key, mac(hashlib.new(algorithm, client_key).digest(), whole)))
    raw.send(base64.b64encode(last + b",p=" + base64.b64encode(proof)) + b"\r\n")
    line = raw.line()
    if line.startswith(b"+ "):
        signature = base64.b64encode(mac(mac(salted, b"Server Key"), whole))
        assert base64.b64decode(line[2:]) == b"v=" + signature, "the signature proves that the server knows the password"
        raw.send(b"\r\n")
        line = raw.until(b"a ")[-1]
    return line


class DovecotWithAllMechanisms:
    """A Dovecot with all mechanisms, and proxies for it."""

    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        cls.certificates = Certificates(cls.folder)
        cls.server = cls.dovecot(ALL, OAUTH)

    @classmethod
    def dovecot(cls, mechanisms, extra="", users=None):
        # Dovecot reads these files when it starts.
        folder = Folder()
        cls.addClassCleanup(folder.remove)
        (folder.path / "keys/default/HS256").mkdir(parents=True)
        (folder.path / "keys/default/HS256/default").write_bytes(base64.b64encode(KEY))
        folder.write("oauth2.conf", f"introspection_mode = local\nusername_attribute = sub\n"
                                    f"local_validation_key_dict = fs:posix:prefix={folder.path}/keys/\n")
        folder.write("masters", "admin:{PLAIN}master secret\n")
        server = Dovecot(cls.certificates, users=users, mechanisms=mechanisms, extra=extra.replace("{path}", str(folder.path)))
        cls.addClassCleanup(server.close)
        return server

    def proxy(self, listener="", backend="", more="", users="", server=None, files=None, port=None, plain=None):
        """`port` is that of the mailbox server if it is not Dovecot; `plain` is the plaintext port of the proxy."""
        text = TEMPLATE.format(cert=self.certificates.cert, key=self.certificates.key, a=port or (server or self.server).port,
                               listener=listener, backend=backend, more=more, users=users)
        if plain:
            text = text.replace("{plain}", str(plain))
        folder = Folder()
        self.addCleanup(folder.remove)
        for name, content in (files or {}).items():
            folder.write(name, content, 0o600)
        proxy = Proxy(text, folder)
        self.addCleanup(proxy.close)
        return proxy

    def connect(self, proxy, certificate=None):
        tls = context(self.certificates.ca)
        if certificate:
            tls.load_cert_chain(*certificate)
        raw = RawClient(proxy.ports["tls"], tls)
        self.greeting = raw.until(b"* OK")[-1]
        return raw

    def advertised_mechanisms(self, proxy):
        self.connect(proxy)
        return {name.decode() for name in re.findall(rb"AUTH=(\S+?)[\] ]", self.greeting)}

    def wait_until_mechanisms_are_known(self, proxy):
        """Waits until the proxy has read the capabilities of the servers."""
        wait_for("the mechanisms", lambda: "XOAUTH2" in self.advertised_mechanisms(proxy))
        return proxy


class Authentication(DovecotWithAllMechanisms, unittest.TestCase):
    def test_mechanisms_of_all_backends_are_advertised(self):
        proxy = self.wait_until_mechanisms_are_known(self.proxy())
        self.assertEqual(self.advertised_mechanisms(proxy),
                         {"PLAIN", "LOGIN", "XOAUTH2", "OAUTHBEARER", "SCRAM-SHA-1", "SCRAM-SHA-256"})
        other = self.dovecot("plain scram-sha-256")
        proxy = self.proxy(more=f'  shard-b: {{servers: ["127.0.0.1:{other.port}"]}}')
        wait_for("the mechanisms", lambda: self.advertised_mechanisms(proxy) == {"PLAIN", "LOGIN", "SCRAM-SHA-256"})
        other.kill()
        wait_for("the mechanisms of the remaining server", lambda: "XOAUTH2" in self.advertised_mechanisms(proxy))
        proxy = self.proxy(listener="mechanisms: [xoauth2, plain]")
        self.assertEqual(self.advertised_mechanisms(proxy), {"PLAIN", "XOAUTH2"})
        self.assertIn(b"LOGINDISABLED", self.greeting)

    def test_curl_logs_in_with_tokens(self):
        for mechanism in ("xoauth2", "oauthbearer"):
            # curl prefers OAUTHBEARER if it is advertised.
            proxy = self.proxy(listener=f"mechanisms: [{mechanism}]")
            for bearer, code in ((token(ALICE), 0), (token(ALICE, b"another key"), 67)):
                done = subprocess.run([program("curl"), "--silent", "--show-error", "--cacert", self.certificates.ca, "--user",
                                       ALICE, "--oauth2-bearer", bearer, f"imaps://localhost:{proxy.ports['tls']}/"],
                                      capture_output=True, text=True, timeout=TIMEOUT)
                self.assertEqual(done.returncode, code, f"{mechanism}: {done.stderr}\n{proxy.log()}")
            self.assertEqual(proxy.metric("vestibule_logins_total", mechanism=mechanism, outcome="accepted"), 1)
            # curl disconnects after the error challenge of XOAUTH2; that counts as refused, too.
            self.assertEqual(proxy.metric("vestibule_logins_total", mechanism=mechanism, outcome="refused"), 1)
            self.assertNotIn(token(ALICE), proxy.log())
            self.assertNotIn(xoauth2(ALICE, token(ALICE)).decode(), proxy.log())

    def test_error_of_a_refused_token_reaches_the_client(self):
        raw = self.connect(self.wait_until_mechanisms_are_known(self.proxy()))
        for name, message in (("XOAUTH2", xoauth2), ("OAUTHBEARER", oauthbearer)):
            raw.send(f"a AUTHENTICATE {name} ".encode() + message(ALICE, "nonsense") + b"\r\n")
            line = raw.line()
            self.assertTrue(line.startswith(b"+ "), line)
            self.assertIn("status", json.loads(base64.b64decode(line[2:])))
            raw.send(b"\r\n" if name == "XOAUTH2" else b"AQ==\r\n")
            self.assertRegex(raw.line(), rb"^a NO \[AUTHENTICATIONFAILED\]")
        # The connection can still log in.
        self.assertRegex(raw.command("b", b"AUTHENTICATE XOAUTH2 " + xoauth2(ALICE, token(ALICE)))[-1], b"^b OK")

    def test_sasl_exchange_can_be_aborted_by_the_client(self):
        raw = self.connect(self.wait_until_mechanisms_are_known(self.proxy()))
        raw.send(b"a AUTHENTICATE SCRAM-SHA-256 " + base64.b64encode(f"n,,n={ALICE},r=abcdefgh".encode()) + b"\r\n")
        self.assertTrue(raw.line().startswith(b"+ "))
        raw.send(b"*\r\n")
        self.assertRegex(raw.line(), b"^a BAD")
        self.assertRegex(raw.command("b", b"AUTHENTICATE XOAUTH2 " + xoauth2(ALICE, token(ALICE)))[-1], b"^b OK")

    def test_sasl_exchange_uses_no_session_limit_while_waiting_for_the_client(self):
        proxy = self.wait_until_mechanisms_are_known(self.proxy(backend="max_sessions: 1"))
        first = base64.b64encode(f"n,,n={ALICE},r=abcdefgh".encode())
        pending = [self.connect(proxy) for _ in range(20)]
        for raw in pending:
            raw.send(b"a AUTHENTICATE SCRAM-SHA-256 " + first + b"\r\n")
            self.assertTrue(raw.line().startswith(b"+ "))
        # Another client can log in, and the newest exchange continues.
        self.assertRegex(self.connect(proxy).command("a", f"LOGIN {ALICE} {PASSWORDS[ALICE]}")[-1], b"^a OK", proxy.log())
        pending[-1].send(b"*\r\n")
        self.assertRegex(pending[-1].line(), b"^a BAD")
        self.assertRegex(pending[0].line(), rb"^a NO \[UNAVAILABLE\]", "the oldest exchange was ended to free its place")
        wait_for("a free session", lambda: proxy.metric("vestibule_server_sessions") == 0)
        self.assertRegex(scram(self.connect(proxy), "SCRAM-SHA-256", ALICE, PASSWORDS[ALICE]), b"^a OK", proxy.log())

    def test_scram_is_relayed_between_client_and_server(self):
        proxy = self.wait_until_mechanisms_are_known(self.proxy())
        for name in ("SCRAM-SHA-1", "SCRAM-SHA-256"):
            self.assertRegex(scram(self.connect(proxy), name, ALICE, PASSWORDS[ALICE]), b"^a OK", proxy.log())
            self.assertRegex(scram(self.connect(proxy), name, ALICE, "wrong"), rb"^a NO \[AUTHENTICATIONFAILED\]")
        self.assertNotIn(PASSWORDS[ALICE], proxy.log())
        raw = self.connect(proxy)
        binding = base64.b64encode(f"p=tls-exporter,,n={ALICE},r=abcdefgh".encode())
        self.assertRegex(raw.command("a", b"AUTHENTICATE SCRAM-SHA-256 " + binding)[-1], b"^a BAD")
        self.assertRegex(raw.command("a", b"AUTHENTICATE SCRAM-SHA-256-PLUS " + binding)[-1], b"^a NO")

    def test_mbsync_logs_in_with_scram(self):
        proxy = self.wait_until_mechanisms_are_known(self.proxy())
        folder = Folder()
        self.addCleanup(folder.remove)
        (folder.path / "mail").mkdir()
        settings = folder.write("mbsyncrc", f"""
IMAPAccount proxy
Host localhost
Port {proxy.ports['tls']}
User {ALICE}
Pass "{PASSWORDS[ALICE]}"
SSLType IMAPS
CertificateFile {self.certificates.ca}
AuthMechs SCRAM-SHA-256

IMAPStore far
Account proxy

MaildirStore near
Inbox {folder.path}/mail/INBOX

Channel all
Far :far:
Near :near:
Create Near
SyncState *
""")
        done = subprocess.run([program("mbsync"), "-c", settings, "all"], capture_output=True, text=True, timeout=TIMEOUT,
                              env={**os.environ, "HOME": str(folder.path)})
        self.assertEqual(done.returncode, 0, f"{done.stderr}\n{proxy.log()}")
        self.assertEqual(proxy.metric("vestibule_logins_total", mechanism="scram-sha-256", outcome="accepted"), 1)

    def test_mutt_logs_in_with_scram(self):
        """mutt uses GNU SASL; the curl of Debian is built without it and does not support SCRAM."""
        proxy = self.wait_until_mechanisms_are_known(self.proxy())
        folder = Folder()
        self.addCleanup(folder.remove)
        settings = folder.write("muttrc", f"""
set ssl_force_tls=yes
set ssl_ca_certificates_file="{self.certificates.ca}"
set imap_user="{BOB}"
set imap_pass="{PASSWORDS[BOB]}"
set imap_authenticators="scram-sha-256"
set sendmail=/bin/true
set copy=yes
set confirmcreate=no
set record=imaps://localhost:{proxy.ports['tls']}/INBOX
""", 0o600)
        done = subprocess.run([program("mutt"), "-n", "-F", settings, "-s", "scram-mutt", BOB], input=b"Hello.\n",
                              capture_output=True, timeout=TIMEOUT,
                              env={"TERM": "xterm", "HOME": str(folder.path), "PATH": "/usr/bin:/bin"})
        self.assertEqual(done.returncode, 0, f"{done.stderr.decode()}\n{proxy.log()}")
        self.assertTrue(any("scram-mutt" in text for text in self.server.messages(BOB)))
        self.assertGreater(proxy.metric("vestibule_logins_total", mechanism="scram-sha-256", outcome="accepted"), 0)

    def test_token_length_is_limited(self):
        proxy = self.wait_until_mechanisms_are_known(self.proxy())
        for size, answer in ((5_000, rb"^(\+ |a NO)"), (65_536, rb"^(\+ |a NO)"), (120_000, b"^a BAD The response is too long")):
            raw = self.connect(proxy)
            raw.send(b"a AUTHENTICATE XOAUTH2\r\n")
            self.assertEqual(raw.line(), b"+ ")
            raw.send(xoauth2(ALICE, "x" * size) + b"\r\n")
            self.assertRegex(raw.line(), answer, size)

    def certificate(self, names, subject="/CN=a person"):
        """Issues a client certificate; returns the paths of the certificate and its key."""
        path = self.folder.path
        base = f"client-{len(list(path.glob('client-*.pem')))}"
        key, request, cert = path / f"{base}-key.pem", path / f"{base}.csr", path / f"{base}.pem"
        extensions = self.folder.write(f"{base}.ext", f"subjectAltName={names}\nextendedKeyUsage=clientAuth\n")
        Certificates._run("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj",
                          subject, "-keyout", key, "-out", request)
        Certificates._run("openssl", "x509", "-req", "-in", request, "-CA", self.certificates.ca, "-CAkey", path / "ca-key.pem",
                          "-CAcreateserial", "-days", "30", "-extfile", extensions, "-out", cert)
        return cert, key

    def test_client_certificate_logs_in(self):
        wanted = f"client_certificates: {{ca: {self.certificates.ca}}}"
        login = "login: {master: admin, password_file: master}"
        proxy = self.proxy(listener=wanted, backend=login, files={"master": "master secret\n"})
        alice, other_name = self.certificate(f"email:{ALICE}"), self.certificate("DNS:other.test")
        raw = self.connect(proxy, alice)
        self.assertIn(b"AUTH=EXTERNAL", self.greeting)
        self.assertRegex(raw.command("a", "AUTHENTICATE EXTERNAL =")[-1], b"^a OK", proxy.log())
        self.assertIn(b"* LIST", b"\n".join(raw.command("b", 'LIST "" INBOX')))
        self.assertIn(f"user=<{ALICE}>", self.server.log())
        # Another certificate, or none, does not log in.
        for certificate in (other_name, None):
            raw = self.connect(proxy, certificate)
            self.assertNotIn(b"EXTERNAL", self.greeting)
            self.assertRegex(raw.command("a", "AUTHENTICATE EXTERNAL =")[-1], b"^a NO")
            self.assertRegex(raw.command("b", f'LOGIN {BOB} "{PASSWORDS[BOB]}"')[-1], b"^b OK", "a password is still accepted")
        self.assertNotIn("master secret", proxy.log())
        other = Certificates(Folder())
        with self.assertRaises(OSError):
            self.connect(proxy, (other.cert, other.key)).line()
        proxy = self.proxy(listener=f"client_certificates: {{ca: {self.certificates.ca}, required: true}}")
        with self.assertRaises((OSError, AssertionError)):
            self.connect(proxy)

    def test_client_certificate_acts_only_for_listed_users(self):
        login = "login: {master: admin, password_file: master}"
        webmail = self.certificate("email:webmail@example.org")

        def exchange_external(proxy, certificate, user):
            return self.connect(proxy, certificate).command("a", b"AUTHENTICATE EXTERNAL " + base64.b64encode(user.encode()))[-1]
        listed = "may_act_for: [{certificate: webmail@example.org, users: ['*@example.org']}]"
        proxy = self.proxy(listener=f"client_certificates: {{ca: {self.certificates.ca}, {listed}}}", backend=login,
                           files={"master": "master secret\n"})
        self.assertRegex(exchange_external(proxy, webmail, CAROL), b"^a OK", proxy.log())
        self.assertIn(f"user=<{CAROL}>", self.server.log())
        self.assertRegex(exchange_external(proxy, webmail, BOB), rb"^a NO \[AUTHORIZATIONFAILED\]")
        self.assertRegex(exchange_external(proxy, self.certificate(f"email:{ALICE}"), CAROL), rb"^a NO \[AUTHORIZATIONFAILED\]")
        proxy = self.proxy(listener=f"client_certificates: {{ca: {self.certificates.ca}}}", backend=login,
                           files={"master": "master secret\n"})
        for user in (CAROL, "unknown@example.org"):
            self.assertRegex(exchange_external(proxy, webmail, user), rb"^a NO \[AUTHORIZATIONFAILED\]")
        self.assertRegex(exchange_external(proxy, webmail, "WebMail@example.org"), b"^a OK", "its own name in different case")

    def test_token_claim_determines_the_user(self):
        """OAUTHBEARER without a user name: a claim determines the route, and Dovecot verifies that the token belongs to that user."""
        issuer = "https://login.example.org"
        proxy = self.proxy(listener="mechanisms: [oauthbearer]", more=f"oauth: [{{issuer: '{issuer}', claim: sub}}]")

        def authenticate(bearer):
            message = base64.b64encode(f"n,,\x01auth=Bearer {bearer}\x01\x01".encode())
            raw = self.connect(proxy)
            raw.send(b"a AUTHENTICATE OAUTHBEARER " + message + b"\r\n")
            line = raw.line()
            if line.startswith(b"+ "):
                raw.send(b"AQ==\r\n")
                line = raw.until(b"a ")[-1]
            return line
        self.assertRegex(authenticate(token(ALICE, iss=issuer)), b"^a OK", proxy.log())
        wait_for("the session", lambda: f'user="{ALICE}"' in proxy.log())
        for bearer in (token(ALICE, b"another key", iss=issuer), token(ALICE, iss="https://elsewhere.test"), token(ALICE), "opaque"):
            self.assertRegex(authenticate(bearer), rb"^a NO \[AUTHENTICATIONFAILED\]", bearer)
        self.assertNotIn(token(ALICE, iss=issuer), proxy.log())

    def test_idle_is_advertised_before_login(self):
        """imaplib reads the capabilities only before the login."""
        proxy = self.proxy()

        def connected():
            client = imaplib.IMAP4_SSL("localhost", proxy.ports["tls"], ssl_context=context(self.certificates.ca), timeout=TIMEOUT)
            if "IDLE" in client.capabilities:
                return client
            client.logout()
            return None
        client = wait_for("IDLE in the capabilities before the login", connected)
        for absent in ("STARTTLS", "LOGIN-REFERRALS", "LOGINDISABLED"):
            self.assertNotIn(absent, client.capabilities)
        client.login(ALICE, PASSWORDS[ALICE])
        client.select()
        client.send(b"z IDLE\r\n")
        self.assertTrue(client.readline().startswith(b"+ "))
        client.send(b"DONE\r\n")
        while not (line := client.readline()).startswith(b"z "):
            self.assertTrue(line)
        self.assertRegex(line, b"^z OK")
        client.logout()

    def test_certificate_field_with_the_user_name_is_configurable(self):
        login = "login: {master: admin, password_file: master}"
        certificate = self.certificate("email:email@example.org,DNS:device.example.org", "/O=Example/CN=common@example.org")
        for rule, user in (("san-email", "email@example.org"), ("san-dns", "device.example.org"), ("common-name", "common@example.org")):
            wanted = f"client_certificates: {{ca: {self.certificates.ca}, user: {rule}}}"
            raw = self.connect(self.proxy(listener=wanted, backend=login, files={"master": "master secret\n"}), certificate)
            self.assertRegex(raw.command("a", "AUTHENTICATE EXTERNAL =")[-1], b"^a OK", rule)
            self.assertIn(f"user=<{user}>", self.server.log())

    def test_fixed_server_password_for_certificate_logins(self):
        """The server has one password for all users, which only the proxy knows; the certificate identifies the client."""
        fixed = self.dovecot("plain login", users={user: "fixed secret" for user in PASSWORDS})
        proxy = self.proxy(listener=f"client_certificates: {{ca: {self.certificates.ca}}}", server=fixed,
                           backend="login: {password_file: fixed}", files={"fixed": "fixed secret\n"})
        for user in (ALICE, BOB):
            raw = self.connect(proxy, self.certificate(f"email:{user}"))
            self.assertRegex(raw.command("a", "AUTHENTICATE EXTERNAL =")[-1], b"^a OK", proxy.log())
            self.assertIn(f"user=<{user}>", fixed.log())
        # Without a certificate the user's own password is refused, because the server does not know it.
        self.assertRegex(self.connect(proxy).command("a", f'LOGIN {ALICE} "{PASSWORDS[ALICE]}"')[-1], b"^a NO")
        self.assertNotIn("fixed secret", proxy.log())

    def test_master_user_opens_the_mailbox_of_another_user(self):
        proxy = self.proxy(users='masters: {separator: "*", networks: [127.0.0.1/32]}')
        def logins(password):
            plain = base64.b64encode(f"{ALICE}\0admin\0{password}".encode()).decode()
            return f'LOGIN "{ALICE}*admin" "{password}"', f"AUTHENTICATE PLAIN {plain}"
        for command in logins("master secret"):
            raw = self.connect(proxy)
            self.assertRegex(raw.command("a", command)[-1], b"^a OK", proxy.log())
            # The session is in the mailbox of alice.
            raw.command("b", 'CREATE "seen by the master"')
            self.assertTrue((self.server.mail / ALICE / ".seen by the master").is_dir())
            raw.command("c", 'DELETE "seen by the master"')
        for command in logins("wrong"):
            self.assertRegex(self.connect(proxy).command("a", command)[-1], rb"^a NO \[AUTHENTICATIONFAILED\]")
        self.assertIn(f'user="{ALICE}"', proxy.log(), "the session is logged for alice")
        proxy = self.proxy(users='masters: {separator: "*", networks: [10.0.0.0/8]}')
        for command in logins("master secret"):
            self.assertRegex(self.connect(proxy).command("a", command)[-1], rb"^a NO \[AUTHORIZATIONFAILED\]")

    def test_login_referral_is_followed(self):
        elsewhere = f"{PASSWORDS[CAROL]}::::::nologin=y host=127.0.0.1 port={self.server.port}"
        first = self.dovecot("plain login", users={CAROL: elsewhere})
        declared = f'  shard-b: {{servers: ["127.0.0.1:{self.server.port}"]}}'
        command = f'LOGIN {CAROL} "{PASSWORDS[CAROL]}"'
        proxy = self.proxy(server=first, more=declared)
        raw = self.connect(proxy)
        self.assertRegex(raw.command("a", command)[-1], b"^a OK", proxy.log() + first.log())
        wait_for("the session", lambda: proxy.metric("vestibule_backend_sessions_total", backend="shard-b") == 1)
        proxy = self.proxy(server=first)
        self.assertRegex(self.connect(proxy).command("a", command)[-1], rb"^a NO \[UNAVAILABLE\]")
        self.assertIn("which is not a declared server", proxy.log())
        proxy = self.proxy(server=first, backend="referrals: relay")
        self.assertRegex(self.connect(proxy).command("a", command)[-1], rb"^a NO \[REFERRAL imap://")

    def test_user_names_are_normalised_and_hashed_in_logs(self):
        proxy = self.proxy(users='default_domain: example.org, detail: "+", server: normalised, log: hashed, separators: "%"')
        for name in ("Alice", "ALICE%example.org", "alice@EXAMPLE.org"):
            self.assertRegex(self.connect(proxy).command("a", f'LOGIN "{name}" "{PASSWORDS[ALICE]}"')[-1], b"^a OK", name)
        hashed = hashlib.sha256(ALICE.encode()).hexdigest()[:16]
        for message in ("logged in", "session ended"):
            wait_for("the records", lambda: len(re.findall(rf'{message}.* user="{hashed}"', proxy.log())) == 3)
        self.assertNotIn("alice", proxy.log().lower())
        proxy = self.proxy(users="unicode: refuse")
        self.assertRegex(self.connect(proxy).command("a", b'LOGIN {5+}\r\nzo\xc3\xab1 "x"')[-1], rb"^a NO \[AUTHENTICATIONFAILED\]")

    def test_proxy_loop_is_detected(self):
        """Each proxy uses the other as its mailbox server."""
        port = free_port()
        first = self.proxy(port=port)
        second = self.proxy(port=first.ports["plain"], plain=port)
        self.assertRegex(self.connect(first).command("a", f'LOGIN {ALICE} "x"')[-1], rb"^a NO \[UNAVAILABLE\]")
        loops = first.metric("vestibule_failures_total", reason="proxy_loop") + second.metric("vestibule_failures_total", reason="proxy_loop")
        self.assertEqual(loops, 1, first.log() + second.log())

    def test_unknown_trust_of_the_server_is_not_reported_as_distrust(self):
        proxy = self.proxy(backend="forward: {site: north}")
        for _ in range(3):
            self.assertRegex(self.connect(proxy).command("a", f'LOGIN {ALICE} "{PASSWORDS[ALICE]}"')[-1], b"^a OK")
        # Dovecot 2.3 does not report whether it trusts the ID of the proxy; that is not logged as distrust.
        self.assertEqual(proxy.metric("vestibule_server_trusts_id"), -1)
        self.assertNotIn("trusts our ID", proxy.log())
        self.assertRegex(self.server.log(), r"rip=127\.0\.0\.1")


if __name__ == "__main__":
    unittest.main()
