"""The command line: commands, exit codes, error texts, the shipped configurations, the demo."""

import os
import re
import signal
import socket
import subprocess
import unittest
import urllib.request

from fixtures import REPOSITORY, TIMEOUT, VESTIBULE, Certificates, Folder, Process, answers, free_port, program, wait_for


def run(*arguments, **options):
    return subprocess.run([VESTIBULE, *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT, **options)


class Commands(unittest.TestCase):
    def setUp(self):
        self.folder = Folder()
        self.addCleanup(self.folder.remove)

    def configuration(self, text):
        return self.folder.write("vestibule.yaml", text)

    def test_usage_errors_and_help(self):
        self.assertEqual(run().returncode, 64)
        self.assertEqual(run("dance").returncode, 64)
        for command in ("run", "check", "route", "demo"):
            done = run(command, "--help")
            self.assertEqual(done.returncode, 0)
            self.assertIn("Example:", done.stdout)

    def test_shipped_configurations_are_valid(self):
        """The files that each configuration names are replaced by files of the test."""
        certificates = Certificates(self.folder)
        checked = 0
        for path in sorted((REPOSITORY / "config").glob("*.yaml")):
            text = path.read_text()
            for name in set(re.findall(r"/etc/vestibule/[\w./-]+|/etc/ssl/certs/[\w.-]+", text)):
                base = name.split("/")[-1]
                if base.endswith(("password", "token")):
                    replacement = self.folder.write(base, "secret\n")
                elif base in ("users.txt", "moved-users.txt"):
                    replacement = self.folder.write(base, "# none yet\n")
                else:
                    replacement = {"fullchain.pem": certificates.cert, "privkey.pem": certificates.key}.get(base, certificates.ca)
                text = text.replace(name, str(replacement))
            done = run("check", "--config", self.configuration(text))
            self.assertEqual(done.returncode, 0, f"{path}\n{done.stderr}")
            self.assertIn(": ok (", done.stdout)
            checked += 1
        self.assertGreaterEqual(checked, 4)

    def test_check_lists_all_file_errors(self):
        certificates = Certificates(self.folder)
        other = Folder()
        self.addCleanup(other.remove)
        unrelated = Certificates(other)
        self.folder.write("users.txt", "alice shard-a\nbob shard-z\n")
        encrypted = self.folder.path / "encrypted.pem"
        subprocess.run([program("openssl"), "pkcs8", "-topk8", "-in", certificates.key, "-out", encrypted, "-passout", "pass:hunter2"], check=True)
        done = run("check", "--config", self.configuration(f"""
listeners: [{{address: "127.0.0.1:0", tls: implicit}}]
tls:
  certificates:
    - {{cert: {certificates.cert}, key: {unrelated.key}}}
    - {{cert: absent.pem, key: {certificates.key}}}
    - {{cert: {certificates.cert}, key: {encrypted}}}
    - {{cert: {certificates.key}, key: {certificates.key}}}
backends:
  shard-a: {{servers: ["127.0.0.1:1"], tls: {{mode: implicit, ca: absent-ca.pem}}}}
routes: [{{table: users.txt}}]
"""))
        self.assertEqual(done.returncode, 78, done.stderr)
        for expected in (
            r"vestibule.yaml:5:\d+: tls.certificates\[0\].key: .*does not match the certificate",
            r"vestibule.yaml:6:\d+: tls.certificates\[1\].cert: .*absent.pem: No such file",
            r"vestibule.yaml:7:\d+: tls.certificates\[2\].key: .*encrypted",
            r"vestibule.yaml:8:\d+: tls.certificates\[3\].cert: .*the file contains no certificate",
            r"vestibule.yaml:10:\d+: backends.shard-a.tls.ca: .*absent-ca.pem: No such file",
            r"vestibule.yaml:11:\d+: routes\[0\].table: .*users.txt:2: no backend is declared as \"shard-z\"; declared: shard-a",
        ):
            self.assertRegex(done.stderr, expected)
        self.assertEqual(len(done.stderr.strip().splitlines()), 6, done.stderr)
        self.assertNotIn("hunter2", done.stderr)

    def test_route_explains_each_step(self):
        file = self.configuration("""
listeners: [{address: "127.0.0.1:0", tls: none}]
backends:
  shard-a: {servers: ["127.0.0.1:1143", "localhost:1144", {address: "127.0.0.1:1146", state: drain}]}
  shard-b: {servers: [{address: "127.0.0.1:1145", weight: 2, max_sessions: 9}], balance: least-sessions}
routes: [{domain: {a.test: shard-a}}, {domain: {b.test: shard-b}}]
""")
        done = run("route", "--config", file, "Alice@A.test")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"route    domain: found: shard-a \(\d+ µs\)")
        self.assertRegex(done.stdout, r"server   first: \S+ \(.*127.0.0.1:114[34]\)")
        self.assertRegex(done.stdout, r"server   next: \S+ \(.*127.0.0.1:114[34]\)")
        self.assertIn("balance  user-hash: the user's name decides", done.stdout)
        self.assertIn("server   no logins: 127.0.0.1:1146 (state drain)\n", done.stdout)
        done = run("route", "--config", file, "bob@b.test")
        self.assertRegex(done.stdout, r"(?s)route    domain: does not know the user.*route    domain-2: found: shard-b")
        self.assertIn("balance  least-sessions: of two servers drawn by weight, the running process takes", done.stdout)
        self.assertIn("first: 127.0.0.1:1145 (127.0.0.1:1145), weight 2, at most 9 sessions\n", done.stdout)
        done = run("route", "--config", file, "eve@c.test")
        self.assertEqual(done.returncode, 1)
        self.assertIn("none", done.stdout)
        self.assertEqual(run("route", "--config", file, "a\nb").returncode, 64)

    def test_address_in_use_is_named_in_the_error(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            file = self.configuration(f"""
listeners: [{{address: "127.0.0.1:{port}", tls: none}}]
backends: {{a: {{servers: ["127.0.0.1:1"]}}}}
routes: [{{default: a}}]
""")
            done = run("run", "--config", file)
        self.assertEqual(done.returncode, 70)
        self.assertIn(f"127.0.0.1:{port} cannot be bound (listeners[0].address): Address already in use", done.stderr)

    def test_descriptor_exhaustion_ends_no_session(self):
        port, admin = free_port(), free_port()
        file = self.configuration(f"""
listeners: [{{address: "127.0.0.1:{port}", tls: none}}]
backends: {{a: {{servers: ["127.0.0.1:1"]}}}}
routes: [{{default: a}}]
limits: {{sessions: 1000}}
admin: {{address: "127.0.0.1:{admin}"}}
""")
        process = Process([program("prlimit"), "--nofile=48:48", VESTIBULE, "run", "--config", file], self.folder.path / "log")
        self.addCleanup(process.kill)
        wait_for("the proxy", lambda: answers(port, b"* OK"))
        self.assertRegex(process.text(), r"open-file limit \d+ is too low for \d+ sessions")
        served = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        # Accept this client before the others connect: each worker has its own accept queue, and another worker may use all
        # remaining descriptors.
        self.assertTrue(served.recv(4096).startswith(b"* OK"))
        clients = [served, *(socket.create_connection(("127.0.0.1", port), TIMEOUT) for _ in range(59))]
        wait_for("the logged advice", lambda: "no free descriptor to accept a connection: raise LimitNOFILE" in process.text())
        served.sendall(b"a NOOP\r\n")
        self.assertEqual(served.recv(4096), b"a OK NOOP completed.\r\n", "the existing connection stays open")
        for client in clients[:40]:
            client.close()
        for client in clients[40:]:
            self.assertTrue(client.recv(4096).startswith(b"* OK"), "a waiting connection is served")
            client.close()
        wait_for("all connections to end", lambda: f'vestibule_connections{{listener="127.0.0.1:{port}"}} 0' in
                 urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics", timeout=TIMEOUT).read().decode())

    def test_systemd_is_notified_of_readiness(self):
        file = self.configuration("""
listeners: [{address: "127.0.0.1:0", tls: none}]
backends: {a: {servers: ["127.0.0.1:1"]}}
routes: [{default: a}]
""")
        address = str(self.folder.path / "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(address)
            notify.settimeout(TIMEOUT)
            process = Process([VESTIBULE, "run", "--config", file], self.folder.path / "log", env={**os.environ, "NOTIFY_SOCKET": address})
            self.addCleanup(process.kill)
            self.assertIn(b"READY=1", notify.recv(4096))
            process.child.send_signal(signal.SIGTERM)
            self.assertIn(b"STOPPING=1", notify.recv(4096))
            self.assertEqual(process.child.wait(TIMEOUT), 0)


class Demo(unittest.TestCase):
    def test_printed_commands_work(self):
        folder = Folder()
        self.addCleanup(folder.remove)
        output = folder.path / "output"
        process = Process([VESTIBULE, "demo", "--tls-port", 0, "--starttls-port", 0, "--admin-port", 0, "--folder", folder.path / "demo"], output)
        self.addCleanup(process.kill)
        wait_for("the output of the demo", lambda: "Ctrl-C ends it." in process.text())
        lines = [line.strip() for line in process.text().splitlines() if line.startswith("  ")]
        curls = [line for line in lines if line.startswith("curl -s --cacert")]
        self.assertEqual(len(curls), 2)
        for line, server in zip(curls, ("shard-a", "shard-b")):
            done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=TIMEOUT)
            self.assertIn(f"X-Served-By: {server}", done.stdout, f"{line}\n{done.stderr}\n{process.text()}")
        metrics = next(line for line in lines if "/metrics" in line)
        done = subprocess.run(["sh", "-c", metrics], capture_output=True, text=True, timeout=TIMEOUT)
        for server in ("shard-a", "shard-b"):
            self.assertRegex(done.stdout, rf'vestibule_logins_total\{{backend="{server}",mechanism="[a-z-]+",outcome="accepted"\}} 1')
        for line in (line for line in lines if line.startswith(("cat ", str(VESTIBULE)))):
            done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=TIMEOUT)
            self.assertIn("shard-a", done.stdout, line)
        self.assertEqual((folder.path / "demo/key.pem").stat().st_mode & 0o777, 0o600)
        process.child.send_signal(signal.SIGINT)
        self.assertEqual(process.child.wait(TIMEOUT), 0)

    def test_demo_once_fetches_each_mailbox(self):
        folder = Folder()
        self.addCleanup(folder.remove)
        done = run("demo", "--tls-port", 0, "--starttls-port", 0, "--admin-port", 0, "--folder", folder.path / "demo", "--once")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("alice@example.org: the first message was served by shard-a", done.stdout)
        self.assertIn("bob@example.net: the first message was served by shard-b", done.stdout)


if __name__ == "__main__":
    unittest.main()
