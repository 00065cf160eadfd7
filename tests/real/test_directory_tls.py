"""TLS failures of directories: the client gets NO [UNAVAILABLE], no other route is queried, and the log names the route and
the reason."""

import subprocess
import unittest

import directory_servers
from fixtures import PASSWORDS, REPOSITORY, Certificates, Folder, Proxy, program
from http_service import HttpService
from tcp_peers import FixedReplyServer, Relay
from test_directories import ALICE, DirectoryFixture, LoginClient

TEMPLATE = """
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none}}]
backends:
  shard-a: {{servers: ["127.0.0.1:{a}"]}}
  shard-b: {{servers: ["127.0.0.1:{b}"]}}
routes:
  - {kind}:
{keys}
  - default: shard-b
limits: {{drain: 1s}}
admin: {{address: "127.0.0.1:{{admin}}"}}
"""
# Greeting of a MariaDB without TLS: protocol 10, mysql_native_password, no CLIENT_SSL.
MARIADB = (b"\x0a5.5.5-10.11.6\x00" + b"\x01\x00\x00\x00" + b"saltsalt\x00" + b"\x08\xa2" + b"\x08" + b"\x02\x00" + b"\x08\x00"
           + b"\x15" + bytes(10) + b"saltsaltsalt\x00" + b"mysql_native_password\x00")
MARIADB = len(MARIADB).to_bytes(3, "little") + b"\x00" + MARIADB
# An LDAP ExtendedResponse to message 1 with protocolError.
NO_STARTTLS = bytes.fromhex("300c02010178070a010204000400")


class DirectoryTlsTests(DirectoryFixture):
    # Logged error if the server does not support TLS.
    no_tls_error = "the server does not speak TLS on this port"
    # Bytes that a server without TLS sends on connect, and in response to the first request.
    greeting, reply = b"", b"* OK ready\r\n"

    @classmethod
    def rows(cls):
        return {ALICE: {"backend": "shard-a"}}

    def start_proxy(self, port, ca=None, host="localhost", environment=None):
        kind, *keys = self.route(host, port, ca or self.certificates.ca)
        folder = Folder()
        self.addCleanup(folder.remove)
        folder.write("password", getattr(self.directory, "PASSWORD", "none") + "\n", 0o600)
        keys = "\n".join(f"      {key}" for key in [*keys, "timeout: 2s", "cache: off"])
        proxy = Proxy(TEMPLATE.format(a=self.a.port, b=self.b.port, kind=kind, keys=keys), folder, environment)
        self.addCleanup(proxy.close)
        return proxy

    def assert_lookup_fails(self, reason, port=None, **options):
        proxy = self.start_proxy(port or self.tls_port(), **options)
        answer = LoginClient(proxy).login(ALICE, PASSWORDS[ALICE])
        self.assertRegex(answer, r"^a NO \[UNAVAILABLE\]", proxy.log())
        line = next((line for line in proxy.log().splitlines() if "route lookup failed" in line), "")
        self.assertRegex(line, f"route {self.kind}: .*{reason}", proxy.log())
        for backend in ("shard-a", "shard-b"):
            self.assertEqual(proxy.metric("vestibule_backend_sessions_total", backend=backend), 0)
        self.assertEqual(proxy.metric("vestibule_route_failing"), 1)
        self.assertNotIn(getattr(self.directory, "PASSWORD", "no password"), proxy.log())

    def tls_port(self):
        return getattr(self.directory, "tls_port", self.directory.port)

    def test_valid_certificate_is_accepted(self):
        proxy = self.start_proxy(self.tls_port())
        self.assertRegex(LoginClient(proxy).login(ALICE, PASSWORDS[ALICE]), "^a OK", proxy.log())

    def test_certificate_of_an_unknown_authority_is_refused(self):
        other = Folder()
        self.addCleanup(other.remove)
        self.assert_lookup_fails("names an authority in `ca` or in the system's root certificates, but was signed with another key", ca=Certificates(other).ca)

    def test_certificate_for_another_host_is_refused(self):
        relay = Relay(self.tls_port(), "127.0.0.2")
        self.addCleanup(relay.close)
        self.assert_lookup_fails("is not valid for the host in the URL", port=relay.port, host="127.0.0.2")

    def test_expired_certificate_is_refused(self):
        folder = Folder()
        self.addCleanup(folder.remove)
        library = folder.path / "clock.so"
        subprocess.run([program("cc"), "-shared", "-fPIC", "-O", "-o", library, REPOSITORY / "tests/real/clock_offset.c"], check=True)
        shift = folder.write("shift", str(20 * 365 * 24 * 3600))
        self.assert_lookup_fails("the server's certificate has expired", environment={"LD_PRELOAD": str(library), "CLOCK_FILE": str(shift)})

    def test_server_without_tls_is_reported(self):
        server = FixedReplyServer(self.greeting, self.reply)
        self.addCleanup(server.close)
        self.assert_lookup_fails(self.no_tls_error, port=server.port)

    def test_hung_handshake_times_out(self):
        server = FixedReplyServer(self.greeting)
        self.addCleanup(server.close)
        self.assert_lookup_fails("no answer within 2s: the connection was not established", port=server.port)


class PostgreSqlTls(DirectoryTlsTests, unittest.TestCase):
    kind, reply, no_tls_error = "sql", b"N", "does not support TLS"

    @classmethod
    def make(cls):
        return directory_servers.Postgres(cls.certificates)

    def route(self, host, port, ca):
        return ["sql", f"url: postgres://vestibule@{host}:{port}/postgres", "password_file: password", f"ca: {ca}",
                "query: SELECT * FROM mailbox WHERE name = %{user}"]


class MariaDbTls(DirectoryTlsTests, unittest.TestCase):
    kind, greeting, reply, no_tls_error = "sql", MARIADB, b"", "does not support TLS"

    @classmethod
    def make(cls):
        return directory_servers.MariaDb(cls.certificates)

    def route(self, host, port, ca):
        return ["sql", f"url: mariadb://vestibule@{host}:{port}/mail", "password_file: password", f"ca: {ca}",
                "query: SELECT * FROM mailbox WHERE BINARY name = %{user}"]

    def test_hung_handshake_times_out(self):
        self.greeting = b""
        super().test_hung_handshake_times_out()


class OpenLdapTls(DirectoryTlsTests, unittest.TestCase):
    kind = "ldap"

    @classmethod
    def make(cls):
        return directory_servers.OpenLdap(cls.certificates)

    def route(self, host, port, ca):
        attributes = ", ".join(f"{field}: {name}" for field, name in self.directory.ATTRIBUTES.items())
        return ["ldap", *self.endpoint(host, port), f"ca: {ca}", 'bind: "cn=vestibule,dc=test"', "password_file: password",
                'base: "dc=test"', 'filter: "(mail=%{user})"', f"attributes: {{{attributes}}}"]

    def endpoint(self, host, port):
        return [f"url: ldaps://{host}:{port}"]


class OpenLdapStartTls(OpenLdapTls):
    reply, no_tls_error = NO_STARTTLS, "the server refuses StartTLS"

    def endpoint(self, host, port):
        return [f"url: ldap://{host}:{port}", "starttls: true"]

    def tls_port(self):
        return self.directory.port


class RedisTls(DirectoryTlsTests, unittest.TestCase):
    kind = "redis"

    @classmethod
    def make(cls):
        return directory_servers.Redis(cls.certificates)

    def route(self, host, port, ca):
        return ["redis", f"url: rediss://{host}:{port}", "password_file: password", f"ca: {ca}", 'key: "mailbox:%{user}"']


class HttpTls(DirectoryTlsTests, unittest.TestCase):
    kind = "http"

    @classmethod
    def make(cls):
        return HttpService(cls.certificates)

    def route(self, host, port, ca):
        return ["http", f"url: https://{host}:{port}/", f"ca: {ca}"]

    def test_self_signed_certificate_is_refused(self):
        folder = Folder()
        self.addCleanup(folder.remove)
        own = Certificates(folder)
        own.cert, own.key = folder.path / "self.pem", folder.path / "self-key.pem"
        Certificates._run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days",
                          "30", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", own.key,
                          "-out", own.cert)
        service = HttpService(own)
        self.addCleanup(service.close)
        self.assert_lookup_fails("(is a CA certificate|was not issued by an authority)", port=service.port)


if __name__ == "__main__":
    unittest.main()
