"""The admin endpoint under many silent connections."""

import socket
import time
import unittest
import urllib.request

from fixtures import Proxy


class AdminEndpoint(unittest.TestCase):
    def test_silent_connections_do_not_delay_the_health_check(self):
        proxy = Proxy("""
listeners: [{address: "127.0.0.1:{plain}", tls: none}]
backends: {only: {servers: ["127.0.0.1:1"], check: off}}
routes: [{default: only}]
admin: {address: "127.0.0.1:{admin}"}
""")
        self.addCleanup(proxy.close)
        address = ("127.0.0.1", proxy.ports["admin"])
        for sent in (b"", b"GET /health HTTP/1.1\r\nHost: "):
            for _ in range(500):
                client = socket.create_connection(address, timeout=5)
                self.addCleanup(client.close)
                client.sendall(sent)
            for path in ("health", "ready", "metrics"):
                began = time.monotonic()
                url = f"http://127.0.0.1:{address[1]}/{path}"
                with urllib.request.urlopen(url, timeout=10) as answer:
                    self.assertEqual(answer.status, 200)
                    answer.read()
                self.assertLess(time.monotonic() - began, 1)


if __name__ == "__main__":
    unittest.main()
