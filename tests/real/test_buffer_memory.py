"""Memory of the running proxy while clients make its buffers grow: before the login with endless commands, after it with
TLS messages that require an answer which the client never reads.

docs/security.md lists the limit of each buffer; these tests measure the memory of the process.
"""

import contextlib
import re
import socket
import threading
import unittest

from fixtures import Certificates, Folder, Proxy, wait_for
from imap_client import RawClient
from tls_fixtures import TlsPeer

MIB = 1 << 20
CONFIGURATION = """
listeners:
  - {{address: "127.0.0.1:{{tls}}", tls: implicit}}
  - {{address: "127.0.0.1:{{plain}}", tls: none}}
tls: {{certificates: [{{cert: {certificates.cert}, key: {certificates.key}}}]}}
backends: {{only: {{servers: ["127.0.0.1:{port}"], check: off}}}}
routes: [{{default: only}}]
limits: {{{limits}}}
admin: {{address: "127.0.0.1:{{admin}}"}}
"""


def memory(proxy):
    """Bytes of anonymous memory of the process."""
    with open(f"/proc/{proxy.process.child.pid}/smaps_rollup") as rollup:
        return next(int(line.split()[1]) << 10 for line in rollup if line.startswith("Pss_Anon"))


class SilentServer:
    """A server that accepts every login, and reads what follows without an answer."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.listener.accept()[0],), daemon=True).start()

    @staticmethod
    def _serve(client):
        with contextlib.suppress(OSError), client:
            client.sendall(b"* OK [CAPABILITY IMAP4rev1] ready\r\n")
            if client.recv(4096):
                client.sendall(b"L OK [CAPABILITY IMAP4rev1] in\r\n")
            while client.recv(65536):
                pass

    def close(self):
        self.listener.close()


class BufferMemory(unittest.TestCase):
    def start(self, limits=""):
        folder = Folder()
        self.addCleanup(folder.remove)
        self.certificates = Certificates(folder)
        server = SilentServer()
        self.addCleanup(server.close)
        self.proxy = Proxy(CONFIGURATION.format(certificates=self.certificates, port=server.port, limits=limits), folder)
        self.addCleanup(self.proxy.close)

    def test_endless_commands_stay_within_the_memory_budget(self):
        """Hundreds of clients send as much as is accepted; an ordinary login still succeeds."""
        self.start("before_login_memory: 16MiB")
        endless = b"a LOGIN {65000+}\r\n" + 65_000 * b"u" + b" " + 90_000 * b"p"
        before, peak, clients = memory(self.proxy), 0, []
        for round_ in range(600):
            client = RawClient(self.proxy.ports["plain"])
            self.addCleanup(client.socket.close)
            clients.append(client)
            client.line()
            # A client that is shed cannot send the rest.
            with contextlib.suppress(OSError):
                client.send(endless)
            if round_ % 100 == 99:
                peak = max(peak, memory(self.proxy))
                ordinary = RawClient(self.proxy.ports["plain"])
                ordinary.line()
                self.assertRegex(ordinary.command("a", "LOGIN alice secret")[-1], b"^a OK")
                ordinary.socket.close()
        used = self.proxy.metric("vestibule_before_login_memory_bytes")
        self.assertGreater(used, 8 * MIB)
        self.assertLessEqual(used, 16 * MIB)
        # The budget, 8 KiB per client outside of it, and the tasks and the rounding of the allocator.
        self.assertLess(peak - before, 16 * MIB + 600 * 24 * 1024 + 8 * MIB)
        print(f"600 endless commands: {(peak - before) >> 10} kB", flush=True)

    def test_unread_key_update_answers_use_little_memory(self):
        self.start()
        tls = socket.socket()
        # Keep the kernel's receive buffer small, so that the answers stay in the proxy.
        tls.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        tls.connect(("127.0.0.1", self.proxy.ports["tls"]))
        peer = TlsPeer("openssl", tls, version="1.3", ca=self.certificates.ca)
        self.addCleanup(peer.close)
        self.assertIn(b"* OK", peer.line())
        self.assertRegex(peer.command("a", "LOGIN alice secret")[-1], b"^a OK")
        before = memory(self.proxy)
        peer.control.sendall(b"flood-without-reading\n")
        peak = 0

        def flood_has_ended():
            nonlocal peak
            peak = max(peak, memory(self.proxy) - before)
            return "requested" in peer.output() or peer.process.child.poll() is not None

        wait_for("the flood", flood_has_ended)
        requests = int(re.search(r"requested (\d+)", peer.output())[1])
        self.assertLess(peak, MIB, f"after {requests} KeyUpdate requests")
        print(f"{requests} KeyUpdate requests: {peak >> 10} kB", flush=True)
