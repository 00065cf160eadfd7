"""A reload or an upgrade changes listener addresses, TLS modes and the admin address."""

import os
import pwd
import random
import re
import socket
import threading
import unittest
import urllib.request
from pathlib import Path

from fixtures import TIMEOUT, Certificates, answers, wait_for
from handover_fixtures import HandoverTestCase, processes_listening_on


class ConnectionLoop(threading.Thread):
    """Connects and reads the greeting in a loop, and collects errors."""

    def __init__(self, port, host="127.0.0.1"):
        super().__init__(daemon=True)
        self.address, self.count, self.errors, self.stop = (host, port), 0, [], threading.Event()

    def run(self):
        while not self.stop.is_set():
            try:
                with socket.create_connection(self.address, TIMEOUT) as client:
                    greeting = client.recv(4)
                    if greeting != b"* OK":
                        raise AssertionError(f"{greeting!r} after {self.count} connections")
                    client.shutdown(socket.SHUT_WR)
                    client.recv(4096)
                self.count += 1
            except Exception as error:  # noqa: BLE001: any error fails the test
                self.errors.append(repr(error))


def non_ephemeral_port():
    """A free port outside of the ephemeral range: a port that a client has used recently cannot be bound for all addresses."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(max(1024, first // 2), first)
        try:
            with socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True):
                return port
        except OSError:
            pass


class ListenerAddresses(HandoverTestCase):
    def setUp(self):
        super().setUp()
        self.port, self.admin = non_ephemeral_port(), non_ephemeral_port()
        self.write()

    def listeners(self, *addresses, tls="none"):
        return "[" + ", ".join(f'{{address: "{address}:{self.port}", tls: {tls}}}' for address in addresses) + "]"

    FORMS = [("0.0.0.0",), ("[::]",), ("127.0.0.1",), ("[::]", "0.0.0.0"), ("[::]",), ("[::]", "127.0.0.1"), ("0.0.0.0",),
             ("127.0.0.1", "[::1]"), ("[::]",), ("127.0.0.1",)]

    def reload_through_all_forms(self, load, **options):
        process = self.start()
        loops = [ConnectionLoop(self.port) for _ in range(load)]
        for loop in loops:
            loop.start()
        for form in self.FORMS:
            self.write(listeners=self.listeners(*form), **options)
            done = self.command("reload")
            self.assertEqual(done.returncode, 0, f"{form}: {done.stderr}")
            count = sum(loop.count for loop in loops)
            wait_for("more connections", lambda: sum(loop.count for loop in loops) >= count + 20 * load
                     or any(loop.errors for loop in loops))
            self.assertEqual([loop.errors for loop in loops], [[]] * load, form)
            # Other addresses accept connections exactly if the new configuration contains them.
            for host, expected in (("127.0.0.2", form[0] == "0.0.0.0" or form in (("[::]",), ("[::]", "0.0.0.0"))),
                                   ("::1", any(":" in address for address in form))):
                self.assertEqual(self.connects(host), expected, f"{form}: {host}\n{self.lines(process)}")
        for loop in loops:
            loop.stop.set()
            loop.join(TIMEOUT)
        self.assertEqual([loop.errors for loop in loops], [[]] * load)
        return process

    def lines(self, process):
        return "\n".join(line for line in process.text().splitlines() if "session ended" not in line)

    def connects(self, host):
        try:
            with socket.create_connection((host, self.port), TIMEOUT) as client:
                return client.recv(4) == b"* OK"
        except ConnectionRefusedError:
            return False

    def test_reload_widens_and_narrows_addresses_under_load(self):
        self.assert_unaffected(self.reload_through_all_forms(3))

    def test_reload_widens_and_narrows_addresses_without_root(self):
        """Not under load: without permission to filter packets, connections that arrive during the change are reset."""
        account = pwd.getpwnam("nobody")
        os.chown(self.control.parent, account.pw_uid, account.pw_gid)
        run_as = {"more": "run_as: {user: nobody, group: nogroup}"}
        self.write(**run_as)
        self.assert_unaffected(self.reload_through_all_forms(0, **run_as))

    def test_upgrade_widens_and_narrows_addresses(self):
        process = self.start()
        pid = process.child.pid
        loops = [ConnectionLoop(self.port) for _ in range(2)]
        for loop in loops:
            loop.start()
        for form in self.FORMS:
            self.write(listeners=self.listeners(*form))
            self.upgrade()
            self.assertNotEqual(self.pid(), pid)
            pid = self.pid()
            wait_for("the predecessor to end", lambda: processes_listening_on(self.port) == {pid})
            self.assertTrue(answers(self.port, b"* OK"))
            self.assertEqual(self.connects("::1"), any(":" in address for address in form))
        for loop in loops:
            loop.stop.set()
            loop.join(TIMEOUT)
        self.assertEqual([loop.errors for loop in loops], [[]] * 2)

    def test_failed_reload_changes_no_address(self):
        process = self.start()
        taken = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(taken.close)
        loop = ConnectionLoop(self.port)
        loop.start()
        bad = f'{{address: "127.0.0.1:{taken.getsockname()[1]}", tls: none}}'
        for form in self.FORMS:
            self.write(listeners=self.listeners(*form)[:-1] + f", {bad}]")
            done = self.command("reload")
            self.assertEqual(done.returncode, 78, f"{form}: {done.stdout}{done.stderr}")
            self.assertIn(f"cannot be bound (listeners[{len(form)}].address)", done.stderr)
        loop.stop.set()
        loop.join(TIMEOUT)
        self.assertEqual(loop.errors, [])
        self.assertFalse(self.connects("127.0.0.2"))
        self.assert_unaffected(process)

    def test_reload_changes_tls_of_a_port(self):
        certificates = Certificates(self.folder)
        process = self.start()
        tls = f"tls: {{certificates: [{{cert: {certificates.cert}, key: {certificates.key}}}]}}"
        for word, with_tls in (("implicit", True), ("starttls", False), ("implicit", True), ("none", False)):
            self.write(listeners=self.listeners("127.0.0.1", tls=word), more=tls)
            self.assertEqual(self.command("reload").returncode, 0)
            self.assertTrue(answers(self.port, b"* OK", tls=with_tls), word)
        self.alive(process)

    def test_reload_changes_and_swaps_the_admin_address(self):
        process = self.start()

        def ready(host, port):
            """Whether the endpoint is ready; a request to an endpoint that is being replaced may be cut off."""
            try:
                return urllib.request.urlopen(f"http://{host}:{port}/ready", timeout=TIMEOUT).status == 200
            except OSError:
                return False

        for address in ("0.0.0.0", "127.0.0.1", "127.0.0.2"):
            self.file.write_text(re.sub(r"address: \"[\d.]+:(\d+)\", control", rf'address: "{address}:\1", control', self.file.read_text()))
            done = self.command("reload")
            self.assertEqual(done.returncode, 0, done.stderr)
            wait_for("the endpoint", lambda: ready("127.0.0.2" if address == "127.0.0.2" else "127.0.0.1", self.admin))
        self.port, self.admin = self.admin, self.port
        self.write()
        done = self.command("reload")
        self.assertEqual(done.returncode, 0, done.stderr)
        wait_for("the listener", lambda: answers(self.port, b"* OK"))
        wait_for("the endpoint", lambda: not answers(self.admin, b"* OK"))
        self.assertTrue(ready("127.0.0.1", self.admin))
        self.assert_unaffected(process)


if __name__ == "__main__":
    unittest.main()
