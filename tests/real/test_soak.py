"""Soak test: random activity of many clients, after which the process uses no more resources than before.

Clients log in, also with wrong passwords, append mail and compare it with what they fetch, wait in IDLE, and disconnect in the
middle of literals. At the same time the configuration is reloaded every few seconds, and Dovecots are killed and restarted.
Descriptors, threads, memory, gauges and the list of sessions are compared before and after, without connections.

The test takes half a minute; `tests/run --soak MINUTES` sets another length. `VESTIBULE_SOAK_SEED` repeats the random choices of
a run.
"""

import imaplib
import json
import os
import random
import socket
import struct
import subprocess
import threading
import time
import unittest

from fixtures import TIMEOUT, VESTIBULE, Certificates, Dovecot, Folder, Proxy, wait_for
from imap_client import connect

LENGTH = float(os.environ.get("VESTIBULE_SOAK_MINUTES") or 0.4) * 60
CLIENTS = 8
SHARDS = ("shard-a", "shard-b")
USERS = {f"user{number}@example.org": f"secret {number}" for number in range(16)}
CONFIGURATION = """
listeners:
  - {{address: "127.0.0.1:{{tls}}", tls: implicit}}
  - {{address: "127.0.0.1:{{plain}}", tls: none}}
tls: {{certificates: [{{cert: {certificates.cert}, key: {certificates.key}}}]}}
backends:
  shard-a: {{servers: ["127.0.0.1:{a}"], check: {{interval: 1s}}}}
  shard-b: {{servers: ["127.0.0.1:{b}"], check: {{interval: 1s}}}}
routes: [{{table: users.txt}}]
limits: {{idle: 30m}}
admin: {{address: "127.0.0.1:{{admin}}", control: control}}
"""
# Allowed growth between the warm state and the end. Threads: the runtime keeps idle threads of its blocking pool for ten
# seconds. Memory: rounding of the allocator, and tables sized for the peak. Descriptors must not grow.
MORE_THREADS = 4
MORE_MEMORY = 6 << 20


class Shard:
    """A Dovecot, and whether it is available; failures of clients are expected while it is not."""

    def __init__(self, certificates):
        self.dovecot = Dovecot(certificates, users=USERS)
        self.restarts = 0
        self.is_available = threading.Event()
        self.is_available.set()


class Client(threading.Thread):
    """Performs random actions of a mail client until `stop` is set."""

    def __init__(self, soak, seed):
        super().__init__(daemon=True)
        self.soak, self.random, self.stop = soak, random.Random(seed), threading.Event()
        self.counts = dict.fromkeys(("accepted", "refused", "interrupted", "bytes"), 0)
        self.failure = None

    def run(self):
        while not self.stop.is_set() and self.failure is None:
            user = self.random.choice(list(USERS))
            shard = self.soak.shards[self.soak.shard_number(user)]
            # Half of the time, wait for an unavailable server: otherwise most logins would be refused.
            if self.random.random() < 0.5:
                shard.is_available.wait(TIMEOUT)
            action = self.random.choice([self.append_and_fetch, self.append_and_fetch, self.send_noops, self.idle,
                                         self.log_in_with_wrong_password, self.disconnect_during_a_literal, self.stay_silent])
            restarts, was_available = shard.restarts, shard.is_available.is_set()
            try:
                action(user)
            except Exception as error:
                if was_available and shard.is_available.is_set() and shard.restarts == restarts:
                    self.failure = f"{action.__name__} as {user}: {error!r}"
                self.counts["interrupted"] += 1

    def login(self, user, password=None):
        client = connect(self.soak.proxy, self.soak.certificates, self.random.choice(["tls", "plain"]))
        try:
            client.login(user, password or USERS[user])
        except BaseException:
            close(client)
            raise
        self.counts["accepted"] += 1
        return client

    def append_and_fetch(self, user):
        """Appends a message, fetches it and compares both."""
        client = self.login(user)
        try:
            body = self.random.randbytes(self.random.choice([100, 10_000, 400_000])).hex().encode()
            body = b"\r\n".join(body[at:at + 76] for at in range(0, len(body), 76))
            sent = b"Subject: %s\r\n\r\n%s\r\n" % (user.encode(), body)
            box = f"box{self.ident}"
            client.create(box)
            require_ok(client.append(box, None, None, sent))
            require_ok(client.select(box))
            number = client.search(None, "ALL")[1][0].split()[-1]
            data = require_ok(client.fetch(number, "(BODY.PEEK[])"))
            assert data[0][1] == sent, f"{len(sent)} bytes appended, {len(data[0][1])} different bytes fetched"
            self.counts["bytes"] += 2 * len(sent)
            client.store(number, "+FLAGS", "\\Deleted")
            require_ok(client.expunge())
            client.logout()
        finally:
            close(client)

    def send_noops(self, user):
        client = self.login(user)
        try:
            for _ in range(self.random.randrange(30)):
                require_ok(client.noop())
            client.logout()
        finally:
            close(client)

    def idle(self, user):
        """Waits in IDLE, sometimes long enough for the session to be parked."""
        client = self.login(user)
        try:
            require_ok(client.select("INBOX"))
            client.send(b"i IDLE\r\n")
            assert client.readline().startswith(b"+ ")
            self.stop.wait(self.random.choice([0.1, 0.5, 3]))
            client.send(b"DONE\r\n")
            while not (line := client.readline()).startswith(b"i "):
                assert line, "the connection ended"
            client.logout()
        finally:
            close(client)

    def log_in_with_wrong_password(self, user):
        try:
            close(self.login(user, "wrong"))
        except imaplib.IMAP4.error as error:
            if "AUTHENTICATIONFAILED" not in str(error):
                raise
            self.counts["refused"] += 1
            return
        raise AssertionError("a wrong password was accepted")

    def disconnect_during_a_literal(self, user):
        """Disconnects during a literal, half of the time with a reset."""
        client = self.login(user)
        client.send(b"a APPEND INBOX {100000}\r\n")
        if client.readline().startswith(b"+ "):
            client.send(b"x" * self.random.randrange(50_000))
        if self.random.random() < 0.5:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sock.close()

    def stay_silent(self, _):
        port = self.soak.proxy.ports[self.random.choice(["tls", "plain"])]
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as plain:
            if self.random.random() < 0.3:
                plain.sendall(b"\x16\x03\x01\x02\x00\x01")
            elif port == self.soak.proxy.ports["plain"]:
                plain.recv(10)


def close(client):
    """Closes a connection, logged out or not."""
    try:
        client.shutdown()
    except OSError:
        pass


def require_ok(answer):
    status, data = answer
    if status != "OK":
        raise AssertionError(f"{status} {data!r}")
    return data


class Soak(unittest.TestCase):
    def setUp(self):
        self.folder = Folder()
        self.addCleanup(self.folder.remove)
        self.certificates = Certificates(self.folder)
        self.shards = [Shard(self.certificates) for _ in SHARDS]
        for shard in self.shards:
            self.addCleanup(shard.dovecot.close)
        self.folder.write("users.txt", "".join(f"{user} {SHARDS[self.shard_number(user)]}\n" for user in USERS))
        a, b = (shard.dovecot.port for shard in self.shards)
        self.proxy = Proxy(CONFIGURATION.format(a=a, b=b, certificates=self.certificates), self.folder)
        self.addCleanup(self.proxy.close)
        seed = int(os.environ.get("VESTIBULE_SOAK_SEED") or time.time_ns() % 1_000_000)
        print(f"VESTIBULE_SOAK_SEED={seed}", flush=True)
        self.random = random.Random(seed)

    @staticmethod
    def shard_number(user):
        return list(USERS).index(user) % len(SHARDS)

    def command(self, *words):
        done = subprocess.run([VESTIBULE, *words, "--control", self.folder.path / "control"], capture_output=True, text=True,
                              timeout=TIMEOUT)
        self.assertEqual(done.returncode, 0, f"{words}\n{done.stdout}{done.stderr}\n{self.proxy.log()[-5000:]}")
        return done.stdout

    def resources(self):
        """The resources of the process without connections."""
        gauges = ("vestibule_connections", "vestibule_backend_sessions", "vestibule_server_sessions", "vestibule_parked_sessions",
                  "vestibule_backend_queue_length")
        wait_for("all sessions to end", lambda: not any(self.proxy.metric(gauge) for gauge in gauges))
        self.assertEqual(json.loads(self.command("sessions", "--json")), [])
        process = f"/proc/{self.proxy.process.child.pid}"

        def descriptors():
            return len(os.listdir(f"{process}/fd"))

        # Health checks and scrapes open connections for a short time, so use the lowest count.
        fewest = min(descriptors() for _ in range(50) if time.sleep(0.02) is None)
        with open(f"{process}/smaps_rollup") as rollup:
            memory = next(int(line.split()[1]) << 10 for line in rollup if line.startswith("Pss_Anon"))
        return {"descriptors": fewest, "threads": len(os.listdir(f"{process}/task")), "memory": memory}

    def restart(self, shard):
        """Kills a Dovecot and starts it again; it counts as unavailable until a login succeeds."""
        shard.is_available.clear()
        shard.restarts += 1
        shard.dovecot.kill()
        time.sleep(self.random.uniform(0, 1))
        shard.dovecot.start()
        user = next(user for user in USERS if self.shards[self.shard_number(user)] is shard)

        def login_succeeds():
            client = connect(self.proxy, self.certificates)
            try:
                return client.login(user, USERS[user])[0] == "OK"
            except imaplib.IMAP4.error:
                return False
            finally:
                close(client)

        wait_for("a login on the restarted server", login_succeeds)
        shard.is_available.set()

    def run_for(self, seconds, inject_faults):
        """Runs all clients for `seconds`; returns the sums of their counts."""
        clients = [Client(self, self.random.random()) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        end, tick = time.monotonic() + seconds, 0
        text = self.proxy.file.read_text()
        while time.monotonic() < end and not any(client.failure for client in clients):
            time.sleep(1)
            tick += 1
            if inject_faults and tick % 3 == 0:
                self.proxy.file.write_text(text.replace("idle: 30m", f"idle: {30 + tick % 2}m"))
                self.command("reload")
            if inject_faults and tick % 8 == 5:
                self.restart(self.random.choice(self.shards))
        for client in clients:
            client.stop.set()
        for client in clients:
            client.join(2 * TIMEOUT)
            self.assertFalse(client.is_alive(), "a client hangs")
        self.assertEqual([client.failure for client in clients if client.failure], [], self.proxy.log()[-3000:])
        return {name: sum(client.counts[name] for client in clients) for name in clients[0].counts}

    def test_resources_return_to_the_warm_state(self):
        self.run_for(5, inject_faults=True)
        warm = self.resources()
        begun = self.proxy.metric("vestibule_backend_sessions_total"), self.proxy.metric("vestibule_session_seconds_count")
        refused = self.proxy.metric("vestibule_logins_total", outcome="refused")
        moved = self.proxy.metric("vestibule_bytes_total")
        counts = self.run_for(LENGTH, inject_faults=True)
        now = self.resources()
        print(f"{counts}; warm {warm}, now {now}", flush=True)
        self.assertGreater(min(counts["accepted"], counts["refused"], counts["interrupted"], counts["bytes"]), 0, "each kind has occurred")
        self.assertEqual(now["descriptors"], warm["descriptors"])
        self.assertLessEqual(now["threads"], warm["threads"] + MORE_THREADS)
        self.assertLessEqual(now["memory"], warm["memory"] + MORE_MEMORY)
        # Every accepted login began a session, and every session has ended. A client whose server dies during the login may
        # not learn that it was accepted, and the logins of `restart` count, too.
        began = self.proxy.metric("vestibule_backend_sessions_total") - begun[0]
        self.assertEqual(began, self.proxy.metric("vestibule_session_seconds_count") - begun[1])
        restarts = sum(shard.restarts for shard in self.shards)
        self.assertLessEqual(counts["accepted"], began)
        self.assertLessEqual(began, counts["accepted"] + counts["interrupted"] + restarts)
        self.assertGreaterEqual(self.proxy.metric("vestibule_bytes_total") - moved, counts["bytes"])
        self.assertGreaterEqual(self.proxy.metric("vestibule_logins_total", outcome="refused") - refused, counts["refused"])
        self.assertEqual(self.proxy.metric("vestibule_panics_total"), 0)
        self.assertEqual(self.proxy.metric("vestibule_reload_failed"), 0)
