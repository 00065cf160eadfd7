"""PROXY headers: HAProxy, nginx or another Vestibule send them to Vestibule, which sends them to Dovecot."""

import re
import unittest

from fixtures import PASSWORDS, Certificates, Dovecot, Folder, Process, Proxy, answers, free_port, program, wait_for
from imap_client import RawClient, context

ALICE = "alice@example.org"

# Every listener expects PROXY headers; Dovecot gets headers of version 2.
CONFIGURATION = """
listeners:
  - {{address: "127.0.0.1:{{tls}}", tls: implicit, proxy_protocol: {{from: [127.0.0.1]}}}}
  - {{address: "127.0.0.1:{{starttls}}", tls: starttls, proxy_protocol: {{from: [127.0.0.1]}}}}
  - {{address: "127.0.0.1:{{plain}}", tls: none, proxy_protocol: {{from: [127.0.0.1]}}}}
tls: {{certificates: [{{cert: {cert}, key: {key}}}]}}
backends: {{only: {{servers: ["127.0.0.1:{server}"], client_info: {info}}}}}
routes: [{{default: only}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
log: {{format: json, level: {level}}}
"""


class HAProxy:
    """HAProxy in TCP mode with the given `listen` sections."""

    def __init__(self, sections):
        self.folder = Folder()
        text = "global\n  log stdout format raw local0\ndefaults\n  mode tcp\n  timeout connect 10s\n  timeout client 60s\n  timeout server 60s\n"
        file = self.folder.write("haproxy.cfg", text + sections)
        self.process = Process([program("haproxy"), "-db", "-f", file], self.folder.path / "log")

    def close(self):
        self.process.kill()
        self.folder.remove()


class ProxyProtocol(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        cls.certificates = Certificates(cls.folder)
        pem = cls.certificates.cert.read_text() + cls.certificates.key.read_text()
        cls.pem = cls.folder.write("both.pem", pem)
        cls.dovecot = Dovecot(cls.certificates, haproxy=True, trusted=False, log_elements="name=<%{local_name}> %c")
        cls.addClassCleanup(cls.dovecot.close)

    def start_proxy(self, info="proxy-v2", level="info"):
        port = self.dovecot.haproxy_port if info.startswith("proxy") else self.dovecot.port
        proxy = Proxy(CONFIGURATION.format(cert=self.certificates.cert, key=self.certificates.key, server=port, info=info, level=level))
        self.addCleanup(proxy.close)
        return proxy

    def haproxy(self, sections):
        haproxy = HAProxy(sections)
        self.addCleanup(haproxy.close)
        return haproxy

    def login(self, port, tls=True, starttls=False):
        """Logs in from 127.0.0.2, and returns the log line of Dovecot."""
        before = len(self.dovecot.log())
        client = RawClient(port, context(self.certificates.ca) if tls and not starttls else None, source="127.0.0.2")
        self.addCleanup(client.close)
        client.line()
        if starttls:
            self.assertTrue(client.command("s", "STARTTLS")[-1].startswith(b"s OK"))
            client.socket = context(self.certificates.ca).wrap_socket(client.socket, server_hostname="localhost")
        self.assertTrue(client.command("a", f"LOGIN {ALICE} {PASSWORDS[ALICE]}")[-1].startswith(b"a OK"))
        self.assertTrue(client.command("b", "SELECT INBOX")[-1].startswith(b"b OK"))
        line = wait_for("the server's log line", lambda: re.search(r"Login: .*", self.dovecot.log()[before:]))
        client.close()
        return line[0]

    def record(self, proxy, number):
        """The log record of login number `number` of the proxy."""
        records = lambda: [line for line in proxy.log().splitlines() if '"outcome":"accepted"' in line]
        return wait_for("the log record", lambda: records()[number - 1:])[0]

    def test_dovecot_accepts_the_tls_fields(self):
        """Dovecot logs a login over TLS as secured, although the connection from the proxy is plaintext."""
        proxy = Proxy(CONFIGURATION.format(cert=self.certificates.cert, key=self.certificates.key, server=self.dovecot.haproxy_port,
                                   info="proxy-v2", level="info").replace(", proxy_protocol: {from: [127.0.0.1]}", ""))
        self.addCleanup(proxy.close)
        output = self.login(proxy.ports["tls"])
        self.assertIn("rip=127.0.0.2", output)
        self.assertRegex(output, "name=<localhost>.*secured")
        output = self.login(proxy.ports["plain"], tls=False)
        self.assertIn("rip=127.0.0.2", output)
        # Dovecot omits empty elements.
        self.assertNotRegex(output, "name=|secured")
        self.assertNotIn("haproxy", self.dovecot.log().lower(), "no error about a header")

    def test_haproxy_passes_tcp_through(self):
        """HAProxy sends headers of both versions to each kind of listener."""
        proxy = self.start_proxy()
        logins = 0
        for version in ("send-proxy", "send-proxy-v2"):
            for kind in ("tls", "starttls", "plain"):
                port = free_port()
                logins += 1
                haproxy = self.haproxy(f"listen one\n  bind 127.0.0.1:{port}\n  server v 127.0.0.1:{proxy.ports[kind]} {version}\n")
                wait_for("HAProxy", lambda: answers(port))
                output = self.login(port, tls=kind != "plain", starttls=kind == "starttls")
                self.assertIn("rip=127.0.0.2", output, f"{version} {kind}")
                haproxy.close()
                record = self.record(proxy, logins)
                self.assertIn('"client":"127.0.0.2:', record)
                self.assertIn(f'"listener":"127.0.0.1:{port}"', record, "the logged listener is the address of the load balancer")

    def test_haproxy_terminates_tls(self):
        """The log record and Dovecot contain the TLS parameters of the load balancer."""
        proxy = self.start_proxy()
        port = free_port()
        self.haproxy(f"""listen one
  bind 127.0.0.1:{port} ssl crt {self.pem} alpn imap
  server v 127.0.0.1:{proxy.ports['plain']} send-proxy-v2 proxy-v2-options ssl,cert-cn,ssl-cipher,authority,crc32c,unique-id
""")
        wait_for("HAProxy", lambda: answers(port))
        output = self.login(port)
        self.assertIn("rip=127.0.0.2", output)
        self.assertRegex(output, "name=<localhost>.*secured")
        record = self.record(proxy, 1)
        self.assertIn('"tls":"TLSv1.3"', record)
        self.assertIn('"sni":"localhost"', record)

    def test_nginx_passes_tcp_through(self):
        """nginx sends headers of version 1 and passes TLS through."""
        proxy = self.start_proxy()
        port = free_port()
        folder = Folder()
        self.addCleanup(folder.remove)
        settings = folder.write("nginx.conf", f"""
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off; master_process off; pid {folder.path}/pid; error_log stderr info; user root;
events {{}}
stream {{ server {{ listen 127.0.0.1:{port}; proxy_pass 127.0.0.1:{proxy.ports['tls']}; proxy_protocol on; }} }}
""")
        nginx = Process([program("nginx"), "-c", settings, "-p", folder.path], folder.path / "log")
        self.addCleanup(nginx.kill)
        wait_for("nginx", lambda: answers(port))
        self.assertIn("rip=127.0.0.2", self.login(port), nginx.text())
        self.assertIn('"client":"127.0.0.2:', self.record(proxy, 1))

    def test_haproxy_health_checks_cause_no_failures(self):
        """Checks with a LOCAL header and plain TCP checks are no failures, and are logged only at level debug."""
        for kind, wanted in (("plain", "tcp-check expect string *\\ OK"), ("tls", None)):
            proxy = self.start_proxy(level="debug")
            port = free_port()
            check = f"  option tcp-check\n  {wanted}\n" if wanted else ""
            self.haproxy(f"""listen one
  bind 127.0.0.1:{port}
{check}  server v 127.0.0.1:{proxy.ports[kind]} send-proxy-v2 check inter 100ms
""")
            ended = r'"level":"DEBUG".*"message":"session ended".*'
            wait_for("health checks", lambda: len(re.findall(ended, proxy.log())) >= 3)
            self.assertEqual(proxy.metric("vestibule_failures_total"), 0, proxy.log())
            self.assertNotRegex(proxy.log(), r'"level":"INFO".*"session ended"')

    def test_chained_proxies_forward_the_client_address(self):
        """Two proxies in a chain, with headers of both versions; health checks of the first are no failures of the second."""
        inner = self.start_proxy()
        for number, info in enumerate(("proxy-v1", "proxy-v2"), 1):
            outer = Proxy(f"""
listeners: [{{address: "127.0.0.1:{{tls}}", tls: implicit}}]
tls: {{certificates: [{{cert: {self.certificates.cert}, key: {self.certificates.key}}}]}}
backends: {{inner: {{servers: ["127.0.0.1:{inner.ports['plain']}"], client_info: {info}, check: {{kind: imap, interval: 100ms}}}}}}
routes: [{{default: inner}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
""")
            self.addCleanup(outer.close)
            output = self.login(outer.ports["tls"])
            self.assertIn("rip=127.0.0.2", output, info)
            # Version 1 does not transfer TLS parameters.
            self.assertEqual("secured" in output, info == "proxy-v2", output)
            record = self.record(inner, number)
            self.assertEqual('"sni":"localhost"' in record, info == "proxy-v2", record)
            checks = lambda: outer.metric("vestibule_server_checks_total", backend="inner")
            before = checks()
            wait_for("checks", lambda: checks() > before + 1)
            self.assertEqual(outer.metric("vestibule_server_up", backend="inner"), 1)
            outer.close()
        self.assertEqual(inner.metric("vestibule_failures_total"), 0, inner.log())

    def test_connection_without_a_header_is_closed(self):
        """A client that bypasses the load balancer, from an address in its network and from another address."""
        proxy = self.start_proxy()
        for number, source in enumerate(("127.0.0.1", "127.0.0.3"), 1):
            client = RawClient(proxy.ports["plain"], source=source)
            self.addCleanup(client.close)
            try:
                client.send(b"a LOGIN alice@example.org wonderland\r\n")
                self.assertEqual(client.line(), b"")
            except ConnectionError:
                pass
            wait_for("the failure to be counted", lambda: proxy.metric("vestibule_failures_total", reason="proxy_header") == number)


if __name__ == "__main__":
    unittest.main()
