"""Faults around a running proxy: servers killed or stopped at each step, resets, peers that vanish from the network, a full
log disk, an unread log, clock jumps, thousands of silent clients.

Each fault affects one user. A session on another server must continue without errors, and afterwards the process must use no
more resources than before.
"""

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import unittest

from fixtures import REPOSITORY, TIMEOUT, VESTIBULE, Certificates, Dovecot, Folder, Process, Proxy, answers, program, wait_for
from imap_client import ALICE, BOB, LOGIN, RawClient, session

CONFIGURATION = """
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none}}]
backends:
  shard-a: {{servers: ["127.0.0.1:{a}"], check: off}}
  shard-b: {{servers: ["127.0.0.1:{b}"], check: off}}
routes: [{{table: users.txt}}]
limits: {{{limits}}}
admin: {{address: "127.0.0.1:{{admin}}"}}
"""
# Allowed growth of memory after 10,000 connections of 20 kB each: tables sized for the peak, and rounding of the allocator.
MORE_MEMORY = 8 << 20
SILENT = 10_000
YEAR = 365.2425 * 86400 // 1


def resource_usage(pid):
    """The number of descriptors of a process, and its anonymous memory in bytes."""
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        memory = next(int(line.split()[1]) << 10 for line in rollup if line.startswith("Pss_Anon"))
    return len(os.listdir(f"/proc/{pid}/fd")), memory


class ConcurrentSession(threading.Thread):
    """A session that sends NOOPs without a pause and checks the responses."""

    def __init__(self, client):
        super().__init__(daemon=True)
        self.client, self.stop, self.count, self.failure = client, threading.Event(), 0, None

    def run(self):
        while not self.stop.is_set():
            try:
                answer = self.client.command(f"n{self.count}", "NOOP")
            except (OSError, AssertionError) as error:
                answer = [repr(error).encode()]
            if not re.fullmatch(rb"n%d OK NOOP completed.*" % self.count, b"|".join(answer)):
                self.failure = answer
                return
            self.count += 1


class FaultTestCase(unittest.TestCase):
    """Tests with a proxy and two Dovecots: that of alice has the fault, that of bob does not."""

    limits = "server_login: 3s"

    @classmethod
    def setUpClass(cls):
        folder = Folder()
        cls.addClassCleanup(folder.remove)
        certificates = Certificates(folder)
        cls.a, cls.b = Dovecot(certificates), Dovecot(certificates)
        cls.addClassCleanup(cls.a.close)
        cls.addClassCleanup(cls.b.close)

    def start(self, a=None, limits=None, **options):
        folder = Folder()
        self.addCleanup(folder.remove)
        folder.write("users.txt", f"{ALICE} shard-a\n{BOB} shard-b\n")
        text = CONFIGURATION.format(a=a or self.a.port, b=self.b.port, limits=limits or self.limits)
        self.proxy = Proxy(text, folder, **options)
        self.addCleanup(self.proxy.close)
        self.port = self.proxy.ports["plain"]

    @contextlib.contextmanager
    def assert_no_side_effects(self):
        """Runs another session during the fault; afterwards only that session and its resources remain."""
        other_session = ConcurrentSession(session(self.port, BOB))
        pid = self.proxy.process.child.pid
        wait_for("one session", lambda: self.proxy.metric("vestibule_connections") == 1)
        before, _ = resource_usage(pid)
        other_session.start()
        yield
        wait_for("one session again", lambda: self.proxy.metric("vestibule_connections") == 1)
        self.assertEqual(self.proxy.metric("vestibule_backend_sessions"), 1)
        self.assertEqual(self.proxy.metric("vestibule_server_sessions"), 1)
        wait_for(f"{before} descriptors", lambda: resource_usage(pid)[0] <= before)
        count_before = other_session.count
        wait_for("the other session", lambda: other_session.count > count_before or other_session.failure)
        other_session.stop.set()
        other_session.join(TIMEOUT)
        self.assertIsNone(other_session.failure)
        self.assertEqual(self.proxy.metric("vestibule_panics_total"), 0)
        other_session.client.close()

    def start_login(self):
        """Sends a login as alice without reading the response."""
        client = RawClient(self.port)
        client.line()
        client.send(b"a " + LOGIN[ALICE].encode() + b"\r\n")
        return client

    def assert_login_answer(self, client, answer):
        """Checks the tagged response, and that the connection is still open."""
        self.assertRegex(client.until(b"a ")[-1], answer)
        self.assertRegex(client.command("b", "NOOP")[-1], b"^b OK")
        client.close()


class KilledServer(FaultTestCase):
    """Kills all processes of a Dovecot with SIGKILL at each step of a session."""

    def tearDown(self):
        self.a.kill()
        self.a.start()

    def wait_until_connected(self, port):
        """Waits for a connection of the proxy to a server, even if the server has not accepted it."""
        def is_established():
            shown = subprocess.run([program("ss"), "-Htn", "dport", "=", f":{port}"], capture_output=True, text=True, check=True)
            return "ESTAB" in shown.stdout
        wait_for("the connection to the server", is_established)

    def test_server_killed_before_its_greeting(self):
        self.start()
        with self.assert_no_side_effects():
            os.killpg(self.a.process.child.pid, signal.SIGSTOP)
            client = self.start_login()
            self.wait_until_connected(self.a.port)
            self.a.kill()
            self.assert_login_answer(client, rb"^a NO \[UNAVAILABLE\]")

    def test_server_killed_during_the_login(self):
        # The password check runs a program that sleeps.
        folder = Folder()
        self.addCleanup(folder.remove)
        slow = folder.write("slow", "#!/bin/sh\nexec sleep 60\n", 0o755)
        certificates = Certificates(folder)
        server = Dovecot(certificates, extra=f"passdb {{\n driver = checkpassword\n args = {slow}\n }}")
        self.addCleanup(server.close)
        self.start(a=server.port, limits="server_login: 20s")
        with self.assert_no_side_effects():
            client = self.start_login()
            wait_for("the password check of the server", lambda: subprocess.run(
                [program("pgrep"), "-g", str(server.process.child.pid), "-x", "sleep"], capture_output=True).returncode == 0)
            server.kill()
            self.assert_login_answer(client, rb"^a NO \[UNAVAILABLE\]")

    def test_server_killed_during_a_literal(self):
        self.start()
        with self.assert_no_side_effects():
            client = session(self.port)
            client.send(b"b APPEND INBOX {1000000}\r\n")
            self.assertTrue(client.line().startswith(b"+"))
            client.send(b"x" * 500_000)
            self.a.kill()
            self.assert_closed(client)

    def test_server_killed_during_idle(self):
        self.start()
        with self.assert_no_side_effects():
            client = session(self.port)
            client.command("b", "SELECT INBOX")
            client.send(b"c IDLE\r\n")
            self.assertTrue(client.line().startswith(b"+"))
            wait_for("the session to be parked", lambda: self.proxy.metric("vestibule_parked_sessions") == 1)
            self.a.kill()
            self.assert_closed(client)

    def assert_closed(self, client):
        with contextlib.suppress(ConnectionResetError):
            self.assertEqual(client.line(), b"")
        client.close()


class StoppedServer(FaultTestCase):
    """A server that accepts connections and does not answer."""

    def tearDown(self):
        os.killpg(self.a.process.child.pid, signal.SIGCONT)

    def test_stopped_server_times_out_the_login(self):
        self.start()
        with self.assert_no_side_effects():
            os.killpg(self.a.process.child.pid, signal.SIGSTOP)
            client = self.start_login()
            self.assert_login_answer(client, rb"^a NO \[UNAVAILABLE\]")
        self.assertEqual(self.proxy.metric("vestibule_failures_total", reason="login_timeout"), 1)

    def test_stopped_server_stalls_a_session(self):
        self.start(limits="stall: 10s")
        with self.assert_no_side_effects():
            client, other = session(self.port), session(self.port)
            os.killpg(self.a.process.child.pid, signal.SIGSTOP)
            # This session waits, and gets its response when the server continues.
            client.send(b"b NOOP\r\n")
            # This session sends until no buffer accepts more, and is ended after limits.stall.
            other.send(b"b APPEND INBOX {100000000+}\r\n")
            with self.assertRaises(OSError):
                while True:
                    other.send(b"x" * 65536)
            os.killpg(self.a.process.child.pid, signal.SIGCONT)
            self.assertTrue(client.line().startswith(b"b OK"))
            client.close()
            other.close()
        self.assertEqual(self.proxy.metric("vestibule_failures_total", reason="stalled", side="backend"), 1)


class ResettingServer:
    """A server that answers up to a given step, and then resets the connection."""

    def __init__(self, step):
        self.step = step
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        steps = {"greeting": [], "login": [b"* OK [CAPABILITY IMAP4rev1] x\r\n"],
                 "literal": [b"* OK [CAPABILITY IMAP4rev1] x\r\n", b"L OK [CAPABILITY IMAP4rev1] in\r\n", b"+ go on\r\n"],
                 "silence": [b"* OK [CAPABILITY IMAP4rev1] x\r\n", b"L OK [CAPABILITY IMAP4rev1] in\r\n"]}
        with contextlib.suppress(OSError):
            while True:
                one, _ = self.listener.accept()
                for answer in steps[self.step]:
                    one.sendall(answer)
                    one.recv(65536)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.close()

    def close(self):
        self.listener.close()


class ConnectionResets(FaultTestCase):
    def test_connection_reset_at_each_step(self):
        for step in ("greeting", "login", "literal", "silence"):
            with self.subTest(step), contextlib.closing(ResettingServer(step)) as server:
                self.start(a=server.port)
                with self.assert_no_side_effects():
                    client = self.start_login()
                    if step in ("greeting", "login"):
                        self.assert_login_answer(client, rb"^a NO \[UNAVAILABLE\]")
                        continue
                    self.assertTrue(client.until(b"a ")[-1].startswith(b"a OK"))
                    client.send(b"b APPEND INBOX {1000}\r\n" if step == "literal" else b"b NOOP\r\n")
                    if step == "literal":
                        self.assertTrue(client.line().startswith(b"+"))
                        client.send(b"half")
                    with contextlib.suppress(ConnectionResetError):
                        self.assertEqual(client.line(), b"")
                    client.close()


class SilentClients(FaultTestCase):
    """Ten thousand clients that connect and send nothing."""

    # Two processes open the connections, because many machines limit the descriptors of one.
    PROGRAM = """
import socket, sys
sockets = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), 60, source_address=(f"127.0.1.{at % 200 + 1}", 0)) for at in range(int(sys.argv[2]))]
print("ready", flush=True)
sys.stdin.readline()
"""

    def connect_silent_clients(self):
        children = []
        for _ in range(2):
            child = subprocess.Popen([sys.executable, "-c", self.PROGRAM, str(self.port), str(SILENT // 2)], stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, text=True)
            self.addCleanup(child.wait)
            self.addCleanup(child.kill)
            children.append(child)
        for child in children:
            self.assertEqual(child.stdout.readline(), "ready\n")
        return children

    def disconnect(self, children):
        for child in children:
            child.stdin.close()
            child.stdout.close()
            child.wait(TIMEOUT)

    def test_silent_clients_are_accepted_up_to_the_limit(self):
        self.start(limits=f"before_login: {SILENT + 10}")
        pid = self.proxy.process.child.pid
        with self.assert_no_side_effects():
            _, before = resource_usage(pid)
            children = self.connect_silent_clients()
            wait_for("all connections", lambda: self.proxy.metric("vestibule_connections") == SILENT + 1)
            descriptors, most = resource_usage(pid)
            self.assertGreater(descriptors, SILENT)
            session(self.port).close()
            self.disconnect(children)
            wait_for("the connections to end", lambda: self.proxy.metric("vestibule_connections") == 1)
            wait_for(f"memory back to {before} of {most}", lambda: resource_usage(pid)[1] <= before + MORE_MEMORY)
            after = resource_usage(pid)[1]
            print(f"{SILENT} silent clients: {before >> 10} kB before, {most >> 10} at the peak, {after >> 10} after", flush=True)

    def test_oldest_silent_clients_are_shed(self):
        self.start(limits="before_login: 500")
        with self.assert_no_side_effects():
            children = self.connect_silent_clients()
            wait_for("clients to be shed", lambda: self.proxy.metric("vestibule_failures_total", reason="shed") >= SILENT - 500)
            self.assertLessEqual(self.proxy.metric("vestibule_connections"), 502)
            session(self.port).close()
            self.disconnect(children)


class FullLogDisk(FaultTestCase):
    def test_full_log_disk_affects_no_session(self):
        # Every write to /dev/full fails with ENOSPC.
        self.start()
        self.proxy.process.kill()
        self.proxy.process = Process([VESTIBULE, "run", "--config", self.proxy.file], "/dev/full")
        wait_for("the proxy", lambda: answers(self.proxy.ports["admin"]))
        with self.assert_no_side_effects():
            for _ in range(20):
                client = session(self.port)
                self.assertTrue(client.command("b", "NOOP")[-1].startswith(b"b OK"))
                client.close()


class UnreadLog(FaultTestCase):
    """Standard error is a pipe that is not read, for example because the log collector hangs."""

    limits = "server_login: 3s, failed_login_delay: off, login_rate_per_address: off"

    def start_with_pipe(self):
        """Starts the proxy with a pipe as its log; returns the non-blocking reading end."""
        self.start()
        self.proxy.process.kill()
        self.proxy.file.write_text(self.proxy.file.read_text() + "log: {level: debug}\n")
        path = self.proxy.folder.path / "log.pipe"
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, reader)
        self.proxy.process = Process([VESTIBULE, "run", "--config", self.proxy.file], path)
        wait_for("the proxy", lambda: answers(self.proxy.ports["admin"]))
        return reader

    def dropped(self):
        return self.proxy.metric("vestibule_log_lines_dropped_total")

    def overflow_log(self):
        """Fails at least 2,000 logins, each of which logs a line, until log lines are dropped; every login is answered."""
        count = 0
        while count < 2000 or not self.dropped():
            for _ in range(100):
                client = RawClient(self.port)
                client.line()
                # A long name fills the pipe sooner.
                client.send(b"a LOGIN " + b"x" * 400 + b"@example.org wrong\r\n")
                self.assertRegex(client.until(b"a ")[-1], b"^a NO")
                client.close()
            count += 100

    def read_until(self, reader, text):
        """Reads the pipe up to `text`."""
        read = bytearray()

        def is_complete():
            with contextlib.suppress(BlockingIOError):
                while part := os.read(reader, 1 << 16):
                    read.extend(part)
            return text in read
        wait_for(text, is_complete)
        return read.decode()

    def test_unread_log_drops_and_counts_lines(self):
        reader = self.start_with_pipe()
        self.overflow_log()
        dropped = int(self.dropped())
        session(self.port).close()
        # Reading yields the kept lines complete, then the number of dropped lines, then later lines.
        text = self.read_until(reader, b"log lines were dropped")
        reported = int(re.search(r"(\d+) log lines were dropped", text)[1])
        self.assertGreaterEqual(reported, dropped)
        client = RawClient(self.port)
        client.command("a", "LOGIN afterwards@example.org wrong")
        text += self.read_until(reader, b"afterwards@example.org")
        lines = text.splitlines()[:-1]
        self.assertGreater(len(lines), 1000)
        for line in lines:
            self.assertRegex(line, r"^(\x1b\[\d+m)*\d{4}-\d\d-\d\dT[\d:.]+Z.{0,20} +(ERROR|WARN|INFO|DEBUG)")
            self.assertEqual(len(re.findall(r"\d{4}-\d\d-\d\dT[\d:.]+Z", line)), 1, line)

    def test_process_stops_with_an_unread_log(self):
        self.start_with_pipe()
        self.overflow_log()
        self.proxy.process.child.send_signal(signal.SIGTERM)
        self.assertEqual(self.proxy.process.child.wait(TIMEOUT), 0)


class WallClock(FaultTestCase):
    """A preloaded library shifts the wall clock of the proxy; the monotonic clock is unchanged."""

    def test_wall_clock_jumps_affect_no_session(self):
        folder = Folder()
        self.addCleanup(folder.remove)
        library = folder.path / "clock.so"
        subprocess.run([program("cc"), "-shared", "-fPIC", "-O", "-o", library, REPOSITORY / "tests/real/clock_offset.c"], check=True)
        now = folder.write("now", "0")
        self.start(environment={"LD_PRELOAD": str(library), "CLOCK_FILE": str(now)})

        def year():
            return max(re.findall(r"(?m)^(?:\x1b\[\dm)?(\d{4})-\d\d-\d\dT", self.proxy.log())[-1:])

        with self.assert_no_side_effects():
            before = session(self.port)
            for jump, in_year in ((3600, 0), (-3600, 0), (20 * YEAR, 20), (-10 * YEAR, -10), (0, 0)):
                now.write_text(str(int(jump)))
                self.assertTrue(before.command("c", "NOOP")[-1].startswith(b"c OK"), jump)
                after = session(self.port)
                self.assertTrue(after.command("c", "NOOP")[-1].startswith(b"c OK"), jump)
                after.close()
                wait_for("the session to be counted", lambda: self.proxy.metric("vestibule_backend_sessions") == 2)
                wait_for(f"the log at {jump}", lambda: int(year()) == time.localtime().tm_year + in_year)
            before.close()


class VanishedPeers(unittest.TestCase):
    """Peers that vanish from the network: each is in a network namespace whose link is taken down."""

    def setUp(self):
        self.names = {name: f"vst-{os.getpid()}-{name}" for name in ("proxy", "client", "server")}
        for name in self.names.values():
            self.ip("netns", "add", name)
            self.addCleanup(self.ip, "netns", "del", name)
        for name in self.names.values():
            self.ip("-n", name, "link", "set", "lo", "up")
        for number, other in ((1, "client"), (2, "server")):
            self.ip("-n", self.names["proxy"], "link", "add", f"to{number}", "type", "veth", "peer", "name", "wire", "netns",
                    self.names[other])
            self.ip("-n", self.names["proxy"], "addr", "add", f"10.77.{number}.1/24", "dev", f"to{number}")
            self.ip("-n", self.names[other], "addr", "add", f"10.77.{number}.2/24", "dev", "wire")
            self.ip("-n", self.names["proxy"], "link", "set", f"to{number}", "up")
            self.ip("-n", self.names[other], "link", "set", "wire", "up")

    def ip(self, *words):
        subprocess.run([program("ip"), *words], check=True, capture_output=True)

    def inside(self, name, *command):
        return [program("ip"), "netns", "exec", self.names[name], *command]

    def python(self, name, text):
        child = subprocess.Popen(self.inside(name, sys.executable, "-c", text), stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
        self.addCleanup(child.stdout.close)
        self.addCleanup(child.stdin.close)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        return child

    def test_vanished_client_and_server_are_detected(self):
        folder = Folder()
        self.addCleanup(folder.remove)
        server = self.python("server", """
import socket, threading
listener = socket.create_server(("10.77.2.2", 143))
def serve(one):
    one.sendall(b"* OK [CAPABILITY IMAP4rev1] x\\r\\n")
    one.recv(4096)
    one.sendall(b"L OK [CAPABILITY IMAP4rev1] in\\r\\n")
    while one.recv(4096): one.sendall(b"b OK done\\r\\n")
print("ready", flush=True)
while True: threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
""")
        self.assertEqual(server.stdout.readline(), "ready\n")
        file = folder.write("vestibule.yaml", """
listeners: [{address: "10.77.1.1:143", tls: none}, {address: "127.0.0.1:143", tls: none}]
backends: {only: {servers: ["10.77.2.2:143"], check: off, balance: round-robin}}
routes: [{default: only}]
limits: {keepalive: 10s, login: 10s, max_disconnect_delay: off}
admin: {address: "127.0.0.1:9"}
""")
        proxy = Process(self.inside("proxy", VESTIBULE, "run", "--config", file), folder.path / "log")
        self.addCleanup(proxy.kill)

        def metric(name):
            text = subprocess.run(self.inside("proxy", program("curl"), "-s", "http://127.0.0.1:9/metrics"), capture_output=True,
                                  text=True).stdout
            return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{") or line.startswith(name + " "))

        wait_for("the proxy", lambda: metric("vestibule_build_info") == 1)
        talk = """
import socket, sys
def session(address):
    one = socket.create_connection((address, 143)); one.recv(4096)
    one.sendall(b"a LOGIN u p\\r\\n"); assert b"a OK" in one.recv(4096)
    return one
"""
        client = self.python("client", talk + """
one, other = session("10.77.1.1"), socket.create_connection(("10.77.1.1", 143))
print("in", flush=True); sys.stdin.readline()
""")
        self.assertEqual(client.stdout.readline(), "in\n")
        wait_for("the session to be parked", lambda: metric("vestibule_parked_sessions") == 1)
        # A session and a connection before the login lose their client; keepalive (10 s, three probes) and a deadline end them.
        self.ip("-n", self.names["client"], "link", "set", "wire", "down")
        wait_for("the connections of the client to end", lambda: metric("vestibule_connections") == 0)
        # Now a session loses its server.
        local = self.python("proxy", talk + """
one = session("127.0.0.1")
print("in", flush=True)
print(one.recv(100), flush=True)
""")
        self.assertEqual(local.stdout.readline(), "in\n")
        wait_for("the session to be parked", lambda: metric("vestibule_parked_sessions") == 1)
        self.ip("-n", self.names["server"], "link", "set", "wire", "down")
        self.assertEqual(local.stdout.readline(), "b''\n", "the proxy closes the client connection")
        local.wait(TIMEOUT)
        wait_for("the session to end", lambda: metric("vestibule_connections") == 0)
        self.assertEqual(metric("vestibule_server_sessions"), 0)
