"""Faults of the proxy host: exhausted local ports, and a process that is not scheduled for some time. Neither must count
against a server."""

import os
import signal
import subprocess
import sys
import threading
import time
import unittest

from fixtures import TIMEOUT, VESTIBULE, Certificates, Dovecot, Folder, Process, Proxy, program, wait_for
from imap_client import ALICE, LOGIN, RawClient

SERVER = """
import socket, threading
listener = socket.create_server(("127.0.0.1", 143))
def serve(one):
    one.sendall(b"* OK [CAPABILITY IMAP4rev1] x\\r\\n")
    while line := one.recv(4096):
        one.sendall(b"L OK [CAPABILITY IMAP4rev1] in\\r\\n" if line.startswith(b"L ") else b"b OK done\\r\\n")
    one.close()
print("ready", flush=True)
while True: threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""

# Each line on standard input is the number of a client, which logs in from its own address and from a port outside of the
# ephemeral range, or `end N`, which ends the session of client N.
CLIENTS = """
import socket, sys
clients = {}
for line in sys.stdin:
    if line.startswith("end "):
        clients.pop(line.split()[1]).close()
        print("ended", flush=True)
        continue
    number = line.strip()
    one = clients[number] = socket.create_connection(("127.0.0.1", 1143), 30, source_address=(f"127.0.1.{number}", 20000 + int(number)))
    one.recv(4096)
    one.sendall(f"a LOGIN u{number} p\\r\\n".encode())
    print(one.recv(4096).decode().strip(), flush=True)
"""

CONFIGURATION = """
listeners: [{address: "127.0.0.1:1143", tls: none}]
backends: {only: {servers: ["127.0.0.1:143"], CHECK balance: BALANCE, source_addresses: SOURCES}}
routes: [{default: only}]
limits: {failed_login_delay: off}
admin: {address: "127.0.0.1:9"}
"""


class LocalPortExhaustion(unittest.TestCase):
    """Runs in a network namespace with eight ephemeral ports."""

    def setUp(self):
        self.name = f"vst-{os.getpid()}-ports"
        self.ip("netns", "add", self.name)
        self.addCleanup(self.ip, "netns", "del", self.name)
        self.ip("-n", self.name, "link", "set", "lo", "up")
        subprocess.run(self.inside("sh", "-c", "echo 40000 40007 > /proc/sys/net/ipv4/ip_local_port_range"), check=True)
        self.folder = Folder()
        self.addCleanup(self.folder.remove)
        server = self.python(SERVER)
        self.assertEqual(server.stdout.readline(), "ready\n")
        self.clients = self.python(CLIENTS)

    def ip(self, *words):
        subprocess.run([program("ip"), *words], check=True, capture_output=True)

    def inside(self, *command):
        return [program("ip"), "netns", "exec", self.name, *map(str, command)]

    def python(self, text):
        child = subprocess.Popen(self.inside(sys.executable, "-c", text), stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
        self.addCleanup(child.stdout.close)
        self.addCleanup(child.stdin.close)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        return child

    def start(self, sources, balance="least-sessions"):
        self.file = self.folder.path / "vestibule.yaml"
        self.configure(sources, "check: off,", balance)
        self.proxy = Process(self.inside(VESTIBULE, "run", "--config", self.file), self.folder.path / "log")
        self.addCleanup(self.proxy.kill)
        wait_for("the proxy", lambda: self.metric("vestibule_build_info") == 1)

    def configure(self, sources, check, balance="least-sessions"):
        text = CONFIGURATION.replace("SOURCES", sources).replace("CHECK", check).replace("BALANCE", balance)
        self.folder.write("vestibule.yaml", text)

    def metric(self, name, label=""):
        # The scrape uses a port outside of the ephemeral range.
        text = subprocess.run(self.inside("curl", "-s", "--local-port", "50000-60000", "http://127.0.0.1:9/metrics"),
                              capture_output=True, text=True).stdout
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
                   if line.split("{")[0].split(" ")[0] == name and label in line)

    def request(self, text):
        self.clients.stdin.write(f"{text}\n")
        self.clients.stdin.flush()
        return self.clients.stdout.readline().strip()

    def use_all_ports(self, sessions):
        """Logs in `sessions` clients; the next login fails because no local port is free."""
        for number in range(1, sessions + 1):
            self.assertTrue(self.request(number).startswith("a OK"), f"{number}: {self.proxy.text()}")
        self.assertTrue(self.request(200).startswith("a NO [UNAVAILABLE]"), self.proxy.text())
        self.assertEqual(self.metric("vestibule_failures_total", 'reason="local_ports"'), 1)
        self.assertEqual(self.metric("vestibule_failures_total"), 1)
        self.assertEqual((self.metric("vestibule_server_up"), self.metric("vestibule_server_breaker")), (1, 0))
        self.assertIn("no local port is free for a connection to 127.0.0.1:143", self.proxy.text())
        self.assertIn("add source_addresses to the backend", self.proxy.text())

    def free_one_port(self):
        self.assertEqual(self.request("end 1"), "ended")
        numbers = iter(range(201, 255))
        wait_for("a free port", lambda: self.request(next(numbers)).startswith("a OK"))
        self.assertEqual((self.metric("vestibule_server_up"), self.metric("vestibule_server_breaker")), (1, 0))

    def test_local_ports_limit_sessions_without_source_addresses(self):
        self.start("[]", "user-hash")
        self.use_all_ports(8)
        # Health checks that fail for lack of a local port do not count against the server.
        self.configure("[]", "check: {interval: 100ms, fall: 1},", "user-hash")
        self.proxy.child.send_signal(signal.SIGHUP)
        wait_for("a health check", lambda: "this machine cannot check the server" in self.proxy.text())
        self.assertEqual(self.metric("vestibule_server_up"), 1)
        self.assertEqual(self.metric("vestibule_server_checks_total", 'outcome="failed"'), 0)
        self.free_one_port()

    def test_two_source_addresses_double_the_sessions(self):
        self.start("[127.0.0.2, 127.0.0.3]")
        self.use_all_ports(16)
        self.free_one_port()

    def test_source_address_of_another_host_is_skipped(self):
        self.start("[192.0.2.1, 127.0.0.2]")
        self.use_all_ports(8)


class ProcessPauses(unittest.TestCase):
    """The process is stopped and continued, as in a suspended virtual machine."""

    def test_pause_fails_no_login_and_marks_no_server_down(self):
        folder = Folder()
        self.addCleanup(folder.remove)
        certificates = Certificates(folder)
        servers = [Dovecot(certificates) for _ in range(2)]
        for server in servers:
            self.addCleanup(server.close)
        proxy = Proxy(f"""
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none}}]
backends:
  pair:
    servers: ["localhost:{servers[0].tls_port}", "localhost:{servers[1].tls_port}"]
    tls: {{mode: implicit, ca: {certificates.ca}}}
    balance: round-robin
    check: {{interval: 100ms, timeout: 5s, fall: 1}}
routes: [{{default: pair}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
""")
        self.addCleanup(proxy.close)
        wait_for("health checks", lambda: proxy.metric("vestibule_server_checks_total", outcome="passed") >= 4)
        failed, logins, stop = [], [0], threading.Event()

        def log_in_repeatedly():
            while not stop.is_set():
                client = RawClient(proxy.ports["plain"])
                try:
                    client.line()
                    answer = client.command("a", LOGIN[ALICE])[-1]
                    if not answer.startswith(b"a OK"):
                        failed.append(answer)
                    logins[0] += 1
                except Exception as error:  # any error is visible to a user
                    failed.append(error)
                finally:
                    client.close()

        threads = [threading.Thread(target=log_in_repeatedly) for _ in range(8)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(2):
                before = logins[0]
                wait_for("logins", lambda: logins[0] > before + 8)
                # Longer than limits.connect and the timeout of a health check.
                os.killpg(proxy.process.child.pid, signal.SIGSTOP)
                time.sleep(6.5)
                os.killpg(proxy.process.child.pid, signal.SIGCONT)
                before = logins[0]
                wait_for("logins after the pause", lambda: logins[0] > before + 16)
                self.assertEqual(proxy.metric("vestibule_server_up"), 2)
        finally:
            os.killpg(proxy.process.child.pid, signal.SIGCONT)
            stop.set()
            for thread in threads:
                thread.join(TIMEOUT)
        self.assertEqual(failed, [], proxy.log())
        self.assertEqual(proxy.metric("vestibule_server_checks_total", outcome="failed"), 0)
        self.assertEqual(proxy.metric("vestibule_failures_total", side="backend"), 0)
        self.assertNotIn("is failing and passed over", proxy.log())
        self.assertEqual(proxy.log().count("this process was not scheduled for a while"), 2)

    def test_pause_expires_no_login_deadline(self):
        folder = Folder()
        self.addCleanup(folder.remove)
        certificates = Certificates(folder)
        server = Dovecot(certificates)
        self.addCleanup(server.close)
        proxy = Proxy(f"""
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none}}]
backends:
  only:
    servers: ["localhost:{server.tls_port}"]
    tls: {{mode: implicit, ca: {certificates.ca}}}
    max_sessions: 1
    queue: {{timeout: 5s}}
    check: off
routes: [{{default: only}}]
limits: {{login: 10s}}
admin: {{address: "127.0.0.1:{{admin}}"}}
""")
        self.addCleanup(proxy.close)
        clients = [RawClient(proxy.ports["plain"]) for _ in range(3)]
        for client in clients:
            self.addCleanup(client.close)
            client.line()
        first, queued, silent = clients
        self.assertTrue(first.command("a", LOGIN[ALICE])[-1].startswith(b"a OK"))
        queued.send(b"a " + LOGIN[ALICE].encode() + b"\r\n")
        wait_for("the queue", lambda: proxy.metric("vestibule_backend_queue_length") == 1)
        # Longer than limits.login and the timeout of the queue.
        os.killpg(proxy.process.child.pid, signal.SIGSTOP)
        time.sleep(11)
        os.killpg(proxy.process.child.pid, signal.SIGCONT)
        first.close()
        self.assertTrue(queued.until(b"a ")[-1].startswith(b"a OK"))
        queued.close()
        self.assertTrue(silent.command("a", LOGIN[ALICE])[-1].startswith(b"a OK"))


if __name__ == "__main__":
    unittest.main()
