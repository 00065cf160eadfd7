"""HTTP routes: a JSON service, and an auth server for nginx's mail module, which nginx also queries for comparison."""

import base64
import os
import signal
import ssl
import time
import unittest

from directory_servers import Directory
from fixtures import PASSWORDS, TIMEOUT, Certificates, Folder, Proxy, free_port, program, wait_for
from http_service import HttpService
from imap_client import RawClient, context
from test_directories import ALICE, BOB, CAROL, DirectoryFixture, LoginClient, ServerDirectoryTests


class Nginx(Directory):
    """nginx with the given configuration."""

    def __init__(self, settings):
        super().__init__()
        self.settings = self.folder.write("nginx.conf", settings.replace("PORT", str(self.port)).replace("FOLDER", str(self.path)))
        self.start()

    def start(self):
        self.run([program("nginx"), "-c", self.settings, "-p", self.path])
        wait_for("nginx", self.ready)


BASE = "daemon off; master_process off; pid FOLDER/pid; error_log stderr info; user root; "


def assert_slow_request_is_sent_once(test):
    """A lookup that times out is sent to the service once, even on a reused connection."""
    proxy = test.proxy(timeout="2s")
    test.assert_login(proxy)
    before = len(test.directory.requests)
    test.directory.pause()
    try:
        test.assert_refused(proxy, ALICE, "NO [UNAVAILABLE]")
        test.assertEqual(len(test.directory.requests) - before, 1)
    finally:
        test.directory.resume()
    test.assert_login(proxy)


class JsonService(ServerDirectoryTests, unittest.TestCase):
    @classmethod
    def make(cls):
        return HttpService()

    def route(self):
        return ["http", f"url: http://localhost:{self.directory.port}/where"]

    def test_cacheable_request_contains_only_the_user(self):
        proxy = self.proxy("cache: {ttl: 1m}")
        self.assert_login(proxy)
        self.assertEqual(self.directory.requests[-1][0], {"user": ALICE, "protocol": "imap"})

    def test_uncacheable_request_describes_the_login(self):
        proxy = self.proxy()
        self.assert_login(proxy)
        request = self.directory.requests[-1][0]
        self.assertEqual({name: request[name] for name in ("user", "client", "mechanism", "attempt", "tls")},
                         {"user": ALICE, "client": "127.0.0.1", "mechanism": "login", "attempt": 1, "tls": None})
        self.assertNotIn("password", request)
        wait_for("the log record", lambda: request["session"] in proxy.log())

    def test_paused_proxy_fails_no_lookup(self):
        proxy = self.proxy(timeout="3s")
        before, client = len(self.directory.requests), LoginClient(proxy)
        self.directory.pause()
        try:
            client.raw.send(f'a LOGIN {ALICE} "{PASSWORDS[ALICE]}"\r\n'.encode())
            wait_for("the request", lambda: len(self.directory.requests) > before)
            os.killpg(proxy.process.child.pid, signal.SIGSTOP)
            try:
                # Longer than the lookup timeout.
                time.sleep(4)
            finally:
                os.killpg(proxy.process.child.pid, signal.SIGCONT)
            client.raw.socket.settimeout(0.5)
            with self.assertRaises(TimeoutError):
                client.raw.line()
        finally:
            self.directory.resume()
        client.raw.socket.settimeout(TIMEOUT)
        self.assertRegex(client.raw.until(b"a ")[-1], b"^a OK", proxy.log())

    def test_http_connections_are_reused(self):
        proxy = self.proxy()
        before = len(self.directory.requests)
        for _ in range(5):
            self.assert_login(proxy)
        ports = {client for _, _, client in self.directory.requests[before:]}
        self.assertEqual(len(ports), 1, ports)

    def test_concurrent_lookups_of_one_user_are_merged(self):
        proxy = self.proxy("cache: {ttl: 1m}", timeout="20s")
        before = len(self.directory.requests)
        clients = [LoginClient(proxy) for _ in range(20)]
        self.directory.pause()
        try:
            for client in clients:
                client.raw.send(f'a LOGIN {ALICE} "{PASSWORDS[ALICE]}"\r\n'.encode())
            wait_for("all lookups to miss the cache", lambda: proxy.metric("vestibule_route_cache_total", state="miss") == len(clients))
        finally:
            self.directory.resume()
        for client in clients:
            self.assertRegex(client.raw.until(b"a ")[-1], b"^a OK")
        self.assertEqual(len(self.directory.requests) - before, 1)

    def test_cached_answer_is_refreshed_before_it_expires(self):
        proxy = self.proxy("cache: {ttl: 3s}")
        self.assert_login(proxy)
        before = len(self.directory.requests)
        self.directory.pause()
        try:
            # The background refresh gets no answer, and the client does not wait for it.
            def refresh_is_requested():
                self.assertRegex(LoginClient(proxy).login(ALICE, PASSWORDS[ALICE]), "^a OK")
                return len(self.directory.requests) > before
            wait_for("the background refresh", refresh_is_requested)
            self.assertEqual(proxy.metric("vestibule_route_cache_total", state="stale"), 0)
        finally:
            self.directory.resume()

    def test_only_a_service_that_verifies_passwords_may_replace_them(self):
        self.directory.add_user(CAROL, backend="shard-b", user=BOB, password=PASSWORDS[BOB])
        self.route = lambda: ["http", f"url: http://localhost:{self.directory.port}/", "password: true"]
        proxy = self.proxy()
        self.assert_login(proxy, CAROL, "shard-b")
        self.assert_refused(proxy, CAROL, "NO [AUTHENTICATIONFAILED]")
        # Without `password: true` the service must not replace passwords, or any password would be accepted.
        self.route = lambda: ["http", f"url: http://localhost:{self.directory.port}/"]
        proxy = self.proxy()
        self.assert_refused(proxy, CAROL, "NO [AUTHENTICATIONFAILED]")
        self.assertNotIn(PASSWORDS[BOB], proxy.log())

    def test_slow_request_with_a_password_is_sent_once(self):
        self.route = lambda: ["http", f"url: http://localhost:{self.directory.port}/", "password: true"]
        assert_slow_request_is_sent_once(self)

    def test_invalid_answers_fail_the_lookup(self):
        for body in (b"", b"[]", b"{", b'{"backend": 7}', b'{"backend": "shard-a"' + b" " * 70_000 + b"}", b"\xff"):
            self.directory.users["odd@example.org"] = body
            proxy = self.proxy()
            self.assert_refused(proxy, "odd@example.org", "NO [UNAVAILABLE]")
            proxy.close()
        del self.directory.users["odd@example.org"]

    def test_token_and_headers_are_sent_and_not_logged(self):
        self.directory.token = "very-secret-token"
        self.addCleanup(setattr, self.directory, "token", None)
        self.route = lambda: ["http", f"url: http://localhost:{self.directory.port}/", "token_file: password",
                              "headers: {X-Who: vestibule}"]
        self.directory.PASSWORD = self.directory.token
        try:
            proxy = self.proxy()
        finally:
            del self.directory.PASSWORD
        self.assert_login(proxy)
        self.assertEqual(self.directory.requests[-1][1]["x-who"], "vestibule")
        self.assertNotIn(self.directory.token, proxy.log())

    def test_http_2_over_tls_verifies_the_certificate(self):
        settings = BASE + f"""
            events {{}}
            http {{
              access_log FOLDER/access '$server_protocol $status';
              server {{
                listen 127.0.0.1:PORT ssl http2;
                ssl_certificate {self.certificates.cert};
                ssl_certificate_key {self.certificates.key};
                location / {{ proxy_pass http://127.0.0.1:{self.directory.port}; }}
              }}
            }}"""
        settings = settings.replace("access_log FOLDER/access '$server_protocol $status';",
                                    "log_format short '$server_protocol $status'; access_log FOLDER/access short;")
        nginx = Nginx(settings)
        self.addCleanup(nginx.close)
        self.route = lambda: ["http", f"url: https://localhost:{nginx.port}/", f"ca: {self.certificates.ca}"]
        self.assert_login(self.proxy())
        wait_for("the log", lambda: "HTTP/2.0 200" in (nginx.path / "access").read_text())
        other = Certificates(Folder())
        self.route = lambda: ["http", f"url: https://localhost:{nginx.port}/", f"ca: {other.ca}"]
        self.assert_refused(self.proxy(), ALICE, "NO [UNAVAILABLE]")


class NginxAuthHttp(DirectoryFixture, unittest.TestCase):
    """nginx and Vestibule send equal requests to an auth server for nginx's mail module."""

    @classmethod
    def make(cls):
        return HttpService()

    @classmethod
    def rows(cls):
        a, b = ({"Auth_Server": "127.0.0.1", "Auth_Port": str(port)} for port in (cls.a.port, cls.b.port))
        return {ALICE: a, BOB: b, "odd @\"%\u00e9": {**a, "password": "p%20 \"w\u00f6rd\""},
                CAROL: {**a, "Auth_Pass": PASSWORDS[CAROL]},
                "alias": {**b, "password": "mine", "Auth_User": CAROL, "Auth_Pass": PASSWORDS[CAROL]}}

    def route(self):
        return ["http", f"url: http://localhost:{self.directory.port}/auth", "style: nginx-auth-http"]

    def proxy(self, more="cache: off", **options):
        return super().proxy(more, **options)

    def nginx(self, server="listen 127.0.0.1:PORT; protocol imap;"):
        nginx = Nginx("load_module /usr/lib/nginx/modules/ngx_mail_module.so; " + BASE + f"""
            events {{}}
            mail {{
              auth_http 127.0.0.1:{self.directory.port}/auth;
              server {{ {server} }}
            }}""")
        self.addCleanup(nginx.close)
        return nginx

    def start_with_client_certificates(self):
        """Starts nginx and Vestibule with TLS that requests certificates; returns their ports, a client certificate, and the proxy."""
        ca, cert, key = (self.certificates.ca, self.certificates.cert, self.certificates.key)
        nginx = self.nginx(f"""
            listen 127.0.0.1:PORT ssl; protocol imap; imap_auth plain login external;
            ssl_certificate {cert}; ssl_certificate_key {key}; ssl_protocols TLSv1.2 TLSv1.3;
            ssl_client_certificate {ca}; ssl_verify_client optional;
            auth_http_pass_client_cert on;""")
        proxy = Proxy(f"""
listeners:
  - {{address: "127.0.0.1:{{tls}}", tls: implicit, client_certificates: {{ca: {ca}}}, mechanisms: [plain, external]}}
tls: {{certificates: [{{cert: {cert}, key: {key}}}]}}
backends:
  shard-a: {{servers: ["127.0.0.1:{self.a.port}"]}}
  shard-b: {{servers: ["127.0.0.1:{self.b.port}"]}}
routes: [{{http: {{url: "http://localhost:{self.directory.port}/auth", style: nginx-auth-http, client_certificate: true}}}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
""")
        self.addCleanup(proxy.close)
        path = self.folder.path
        extensions = self.folder.write("client.ext", f"subjectAltName=email:{CAROL}\nextendedKeyUsage=clientAuth\n")
        new = ["openssl", "req", "-utf8", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-multivalue-rdn"]
        subject = "/C=DE/O=M\u00fcller, S\u00f6hne + Co. \"<;#>\"/OU=#1 /CN=a person+UID=7/emailAddress=x@y.test"
        subject = subject.replace("e + C", "e \\+ C")
        Certificates._run(*new, "-subj", subject, "-keyout", path / "client-key.pem", "-out", path / "client.csr")
        Certificates._run("openssl", "x509", "-req", "-in", path / "client.csr", "-CA", ca, "-CAkey", path / "ca-key.pem",
                          "-set_serial", "0x00c0ffee", "-days", "30", "-extfile", extensions, "-out", path / "client.pem")
        return (nginx.port, proxy.ports["tls"]), (path / "client.pem", path / "client-key.pem"), proxy

    def test_certificate_login_gets_no_password_from_a_verifying_service(self):
        _, certificate, proxy = self.start_with_client_certificates()
        # The same listener with a JSON service that returns a password.
        self.directory.users[CAROL] = {"backend": "shard-a", "password": PASSWORDS[CAROL]}
        self.addCleanup(self.directory.add_user, CAROL, **self.rows()[CAROL])
        style, text = "style: nginx-auth-http, client_certificate: true", proxy.file.read_text()
        for name in ("tls", "admin"):
            text = text.replace(f":{proxy.ports[name]}\"", f":{{{name}}}\"")
        self.assertIn(style, text)
        for verifies, answer in (("true", rb"^a NO \[UNAVAILABLE\]"), ("false, cache: off", b"^a OK")):
            other = Proxy(text.replace(style, f"password: {verifies}"))
            self.addCleanup(other.close)
            tls = context(self.certificates.ca)
            tls.load_cert_chain(*certificate)
            raw = RawClient(other.ports["tls"], tls)
            raw.until(b"* OK")
            raw.send(b"a AUTHENTICATE EXTERNAL\r\n")
            raw.until(b"+")
            raw.send(base64.b64encode(CAROL.encode()) + b"\r\n")
            self.assertRegex(raw.until(b"a ")[-1], answer, other.log())

    def last_request(self, raw=None):
        """The headers of the last request, except general HTTP headers; checks the cipher against that of the client."""
        headers = {name: value for name, value in self.directory.requests[-1][0].items()
                   if name not in ("host", "connection", "accept", "user-agent")}
        if raw:
            self.assertEqual(headers.pop("auth-ssl-cipher"), raw.socket.cipher()[0])
        return headers

    def test_tls_headers_equal_those_of_nginx(self):
        ports, certificate, proxy = self.start_with_client_certificates()
        for shown, version in ((None, "TLSv1_2"), (None, "TLSv1_3"), (certificate, "TLSv1_2"), (certificate, "TLSv1_3")):
            requests = []
            for port in ports:
                tls = context(self.certificates.ca)
                tls.minimum_version = tls.maximum_version = getattr(ssl.TLSVersion, version)
                tls.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
                if shown:
                    tls.load_cert_chain(*shown)
                raw = RawClient(port, tls)
                raw.until(b"* OK")
                plain = base64.b64encode(f"\0{ALICE}\0{PASSWORDS[ALICE]}".encode())
                self.assertRegex(raw.command("a", b"AUTHENTICATE PLAIN " + plain)[-1], b"^a OK", proxy.log())
                requests.append(self.last_request(raw))
            self.assertEqual(requests[1], requests[0])
            self.assertEqual(requests[1]["auth-ssl-verify"], "SUCCESS" if shown else "NONE")
            self.assertEqual("auth-ssl-serial" in requests[1], bool(shown))

    def test_certificate_headers_equal_those_of_nginx(self):
        ports, certificate, proxy = self.start_with_client_certificates()
        requests = []
        for port in ports:
            tls = context(self.certificates.ca)
            tls.load_cert_chain(*certificate)
            raw = RawClient(port, tls)
            raw.until(b"* OK")
            raw.send(b"a AUTHENTICATE EXTERNAL\r\n")
            raw.until(b"+")
            raw.send(base64.b64encode(CAROL.encode()) + b"\r\n")
            self.assertRegex(raw.until(b"a ")[-1], b"^a OK", proxy.log())
            requests.append(self.last_request(raw))
        self.assertEqual(requests[1], requests[0])
        self.assertEqual((requests[1]["auth-method"], requests[1]["auth-pass"]), ("external", ""))

    def test_proxy_protocol_headers_equal_those_of_nginx(self):
        nginx = self.nginx("listen 127.0.0.1:PORT proxy_protocol; protocol imap; set_real_ip_from 127.0.0.1;")
        proxy = Proxy(f"""
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none, proxy_protocol: {{from: [127.0.0.1]}}}}]
backends: {{shard-a: {{servers: ["127.0.0.1:{self.a.port}"]}}}}
routes: [{{http: {{url: "http://localhost:{self.directory.port}/auth", style: nginx-auth-http}}}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
""")
        self.addCleanup(proxy.close)
        for header in ("PROXY TCP4 192.0.2.7 198.51.100.1 54321 143", "PROXY TCP6 2001:db8::7 2001:db8::1 54321 993",
                       "PROXY UNKNOWN"):
            requests = []
            for port in (nginx.port, proxy.ports["plain"]):
                raw = RawClient(port)
                raw.send(header.encode() + b"\r\n")
                raw.until(b"* OK")
                self.assertRegex(raw.command("a", f'LOGIN {ALICE} "{PASSWORDS[ALICE]}"')[-1], b"^a OK", proxy.log())
                requests.append(self.last_request())
            self.assertEqual(requests[1], requests[0], header)
            self.assertEqual("proxy-protocol-server-addr" in requests[1], "UNKNOWN" not in header)

    def test_slow_request_is_sent_once(self):
        assert_slow_request_is_sent_once(self)

    def test_auth_wait_repeats_the_request(self):
        for port in (self.nginx().port, self.proxy(timeout="20s").ports["plain"]):
            self.directory.add_user("patient", waits=2, password="x", Auth_Server="127.0.0.1", Auth_Port=str(self.a.port),
                               Auth_User=ALICE, Auth_Pass=PASSWORDS[ALICE])
            before = len(self.directory.requests)
            raw = RawClient(port)
            raw.until(b"* OK")
            began = time.monotonic()
            self.assertRegex(raw.command("a", "LOGIN patient x")[-1], b"^a OK")
            self.assertGreater(time.monotonic() - began, 1.9)
            self.assertEqual(len(self.directory.requests) - before, 3)

    def test_refusal_without_auth_wait_closes_the_connection(self):
        self.directory.add_user("final", final=True, password="x")
        for port in (self.nginx().port, self.proxy().ports["plain"]):
            raw = RawClient(port)
            raw.until(b"* OK")
            self.assertRegex(raw.command("a", "LOGIN final wrong")[-1], b"^a NO .*Invalid login or password")
            while line := raw.line():
                self.assertRegex(line, rb"^\* BYE")

    def test_users_are_routed_as_by_nginx(self):
        nginx, proxy = self.nginx(), self.proxy()
        for user, password in ((ALICE, PASSWORDS[ALICE]), (BOB, PASSWORDS[BOB]), ("alias", "mine")):
            requests = []
            for port in (nginx.port, proxy.ports["plain"]):
                raw = RawClient(port)
                raw.until(b"* OK")
                self.assertRegex(raw.command("a", f'LOGIN {user} "{password}"')[-1], b"^a OK", proxy.log())
                requests.append(self.last_request())
            self.assertEqual(requests[1], requests[0])
        self.assertEqual(proxy.metric("vestibule_backend_sessions_total", backend="shard-b"), 2)

    def test_hostile_names_are_encoded_as_by_nginx(self):
        nginx, proxy = self.nginx(), self.proxy()
        user, password = "odd @\"%\u00e9".encode(), "p%20 \"w\u00f6rd\"".encode()
        requests = []
        for port in (nginx.port, proxy.ports["plain"]):
            raw = RawClient(port)
            raw.until(b"* OK")
            raw.send(b"a LOGIN {%d}\r\n" % len(user))
            raw.until(b"+")
            raw.send(user + b" {%d}\r\n" % len(password))
            raw.until(b"+")
            raw.send(password + b"\r\n")
            # The shard does not know this user, so the login fails; only the request is compared.
            raw.line()
            requests.append(self.directory.requests[-1][0])
        theirs, ours = requests
        self.assertEqual((ours["auth-user"], ours["auth-pass"]), (theirs["auth-user"], theirs["auth-pass"]))

    def test_wrong_password_is_refused_after_auth_wait(self):
        proxy = self.proxy()
        client = LoginClient(proxy)
        began = time.monotonic()
        self.assertEqual(client.login(ALICE), "a NO [AUTHENTICATIONFAILED] Invalid login or password")
        self.assertGreater(time.monotonic() - began, 0.9)
        self.assertEqual(client.login(ALICE, PASSWORDS[ALICE])[:4], "a OK", "the connection stays open")
        self.assertEqual(self.directory.requests[-1][0]["auth-login-attempt"], "2")
        self.assertEqual(proxy.metric("vestibule_route_failing"), 0)

    def test_returned_addresses_must_be_declared_or_allowed(self):
        port = free_port()
        self.directory.add_user("stray", Auth_Server="127.0.0.1", Auth_Port=str(port), password="x")
        self.directory.add_user("guest", Auth_Server="127.0.0.2", Auth_Port=str(self.a.port), password="x")
        proxy = self.proxy()
        self.assertRegex(LoginClient(proxy).login("stray", "x"), r"NO \[UNAVAILABLE\]")
        self.assertIn(f"127.0.0.1:{port}, which is neither a declared server", proxy.log())
        # Dovecot listens only on 127.0.0.1, so the failed connection shows that the address was used.
        route = self.route() + ["backend: shard-b", "networks: [127.0.0.2/32]"]
        self.route = lambda: route
        proxy = self.proxy()
        self.assertRegex(LoginClient(proxy).login("stray", "x"), r"NO \[UNAVAILABLE\]")
        self.assertRegex(LoginClient(proxy).login("guest", "x"), r"NO \[UNAVAILABLE\]")
        self.assertIn(f"127.0.0.2:{self.a.port}: Connection refused", proxy.log())


if __name__ == "__main__":
    unittest.main()
