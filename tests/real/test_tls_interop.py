"""Clients whose TLS is not ours, after the login: OpenSSL, GnuTLS and NSS, on long transfers both ways, with key updates,
padding, odd record sizes, every way to close, and renegotiation.

What their servers do is in test_tls_servers.py, what no library would send in test_tls_wrong.py.
"""

import socket
import unittest

from fixtures import PATIENCE, program
from mail import Raw
from tls_interop import (PACKAGES, Peer, Scene, Tool, digest, each_suite, gnutls_priority, nss_database, take_directly)


class Interoperability(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scene = Scene(cls)
        cls.proxy = cls.scene.proxy()
        cls.addClassCleanup(cls.proxy.close)

    def tool(self, *command):
        tool = Tool([str(word) for word in command])
        self.addCleanup(tool.close)
        return tool

    def peer(self, library, version=None, suite=None, port="tls", **options):
        """A client that has done its handshake, by STARTTLS if `port` says so."""
        tls = socket.create_connection(("127.0.0.1", self.proxy.ports[port]), timeout=PATIENCE)
        if port == "starttls":
            before = Raw.__new__(Raw)
            before.socket, before.pending = tls, b""
            before.line()
            self.assertTrue(before.command("s", "STARTTLS")[-1].startswith(b"s OK"))
            self.assertEqual(before.pending, b"")
        tls.setblocking(True)
        peer = Peer(library, tls, **self.scene.peer_options(library, version, suite), **options)
        self.addCleanup(peer.close)
        peer.reports("handshake .*" if not version else rf"handshake TLSv?{version} .*" if not suite or library == "gnutls"
                     else f"handshake TLSv{version} {suite}")
        if port == "tls":
            self.assertIn(b"* OK", peer.line(), peer.report())
        return peer

    def reads_and_writes(self, client, slow=False):
        """A big message each way, unharmed; then LOGOUT. A medium one down if the client is slow."""
        client.login()
        client.select("big")
        number, expected = (2, self.scene.medium) if slow else (1, self.scene.down)
        self.assertEqual(digest(client.fetch(number)), digest(expected))
        client.append("up", self.scene.up)
        self.assertEqual(take_directly(self.scene.dovecot, "up"), [digest(self.scene.up)])
        client.noop()
        client.logout()


class Suites(Interoperability):
    """Each suite of each version through each listener."""

    def test_openssl_s_client(self):
        for version, suite in each_suite():
            cipher = {"1.3": ["-ciphersuites", suite, "-tls1_3"], "1.2": ["-cipher", openssl_name(suite), "-tls1_2"]}[version]
            for port, how in (("tls", []), ("starttls", ["-starttls", "imap"])):
                with self.subTest(suite=suite, port=port):
                    client = self.tool(program("openssl"), "s_client", "-quiet", "-verify_return_error", "-verify_hostname", "localhost",
                                       "-CAfile", self.scene.certificates.ca, *cipher, *how, "-connect",
                                       f"127.0.0.1:{self.proxy.ports[port]}")
                    # By STARTTLS it shows nothing of what the server said before.
                    if port == "tls":
                        self.assertIn(b"* OK", client.line(), client.report())
                    self.reads_and_writes(client)

    def test_gnutls_cli(self):
        """It writes its output byte by byte: the big download with GnuTLS is in `test_libraries`."""
        for version, suite in each_suite():
            for port, how in (("tls", []), ("starttls", ["--starttls-proto=imap"])):
                with self.subTest(suite=suite, port=port):
                    client = self.tool(program("gnutls-cli"), "--logfile=/dev/stderr", f"--x509cafile={self.scene.certificates.ca}",
                                       f"--priority={gnutls_priority(version, suite)}", *how, f"--port={self.proxy.ports[port]}",
                                       "localhost")
                    if port == "tls":
                        self.assertIn(b"* OK", client.line(), client.report())
                    self.reads_and_writes(client, slow=True)

    def test_nss_tstclnt(self):
        """It knows no STARTTLS of IMAP; the next test does that with NSS."""
        for version, suite in each_suite():
            with self.subTest(suite=suite):
                client = self.tool(program("tstclnt"), "-h", "localhost", "-p", self.proxy.ports["tls"], "-4", "-d",
                                   nss_database(self.scene.certificates, self.scene.folder), "-V", f"tls{version}:tls{version}",
                                   "-c", NSS_LETTERS[suite])
                self.assertIn(b"* OK", client.line(), client.report())
                self.reads_and_writes(client)

    def test_libraries(self):
        """The peers that the other tests steer, NSS through STARTTLS among them."""
        for library in PACKAGES:
            for version, suite in each_suite():
                with self.subTest(library=library, suite=suite):
                    self.reads_and_writes(self.peer(library, version, suite, "starttls"))


NSS_LETTERS = {
    "TLS_AES_128_GCM_SHA256": ":1301",
    "TLS_AES_256_GCM_SHA384": ":1302",
    "TLS_CHACHA20_POLY1305_SHA256": ":1303",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": ":C02B",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": ":C02C",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": ":CCA9",
}


def openssl_name(suite):
    """OpenSSL's own name of a TLS 1.2 suite."""
    return (suite.removeprefix("TLS_").replace("_WITH", "").replace("AES_128", "AES128").replace("AES_256", "AES256")
            .removesuffix("_SHA256" if "CHACHA20" in suite else "").replace("_", "-"))


if __name__ == "__main__":
    unittest.main()
