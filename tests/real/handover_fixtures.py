"""A process with a control socket, and a scripted predecessor: shared by the tests of upgrades, control sockets and
listeners."""

import array
import json
import os
import socket
import subprocess
import threading
import unittest
from pathlib import Path

from fixtures import TIMEOUT, VESTIBULE, Folder, Process, answers, free_port, wait_for

CONFIGURATION = """
listeners: {listeners}
backends: {{a: {{servers: ["127.0.0.1:1"], check: off}}}}
routes: {routes}
limits: {{drain: 1m, workers: 2{limits}}}
admin: {{address: "127.0.0.1:{admin}", control: control/socket}}
{more}
"""


class HandoverTestCase(unittest.TestCase):
    """Tests of a process with a control socket; no mailbox server is needed."""

    def setUp(self):
        self.folder = Folder()
        self.addCleanup(self.folder.remove)
        self.port, self.admin = free_port(), free_port()
        self.control = self.folder.path / "control/socket"
        self.control.parent.mkdir()
        self.logs = 0
        self.write()

    def write(self, listeners=None, routes="[{default: a}]", more="", admin=None, limits=""):
        listeners = listeners or f'[{{address: "127.0.0.1:{self.port}", tls: none}}]'
        self.file = self.folder.write("vestibule.yaml", CONFIGURATION.format(
            listeners=listeners, routes=routes, admin=admin or self.admin, more=more, limits=limits and f", {limits}"))

    def run_program(self, *options, before=()):
        self.logs += 1
        process = Process([*before, VESTIBULE, "run", *options, "--config", self.file], self.folder.path / f"log-{self.logs}")
        self.addCleanup(process.kill)
        return process

    def start(self, *options, before=()):
        process = self.run_program(*options, before=before)
        wait_for("the process to start", lambda: self.alive(process) and self.pid() == process.child.pid)
        return process

    def alive(self, process):
        self.assertIsNone(process.child.poll(), process.text())
        return True

    def command(self, *words, before=()):
        return subprocess.run([*before, VESTIBULE, *map(str, words), "--control", self.control], capture_output=True, text=True,
                              timeout=2 * TIMEOUT)

    def pid(self):
        """Process id of the process that answers commands; None if there is none."""
        done = self.command("status", "--json")
        return json.loads(done.stdout)["pid"] if done.returncode == 0 else None

    def upgrade(self, code=0, *options):
        done = self.command("upgrade", *options)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout + done.stderr

    def assert_unaffected(self, process):
        """Checks that the process serves and answers commands, and that no stale control file remains."""
        self.alive(process)
        self.assertTrue(answers(self.port, b"* OK"), process.text())
        wait_for("the control socket", lambda: self.pid() == process.child.pid)
        wait_for("stale control files to be removed", lambda: self.control_files() == ["socket", f"socket.{process.child.pid}"])

    def control_files(self):
        return sorted(path.name for path in self.control.parent.iterdir())


class Predecessor(threading.Thread):
    """A scripted predecessor that hands its sockets over and ends at the step `end`."""

    def __init__(self, control, port, end):
        super().__init__(daemon=True)
        self.control, self.end = control, end
        self.tcp = socket.create_server(("127.0.0.1", port))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(control))
        self.unix.listen()

    def run(self):
        try:
            self.hand_over()
        except OSError:
            pass  # The test or the successor has ended.

    def hand_over(self):
        # Other connections only check whether a process listens, or request its status.
        while b"hand-over" not in (request := self.accept()):
            self.connection.close()
        connection = self.connection
        assert request.startswith(b"POST / HTTP/1.1\r\n"), request
        if self.end == "silent":
            connection.recv(1)
            return
        if self.end == "nonsense":
            connection.sendall(b"220 ESMTP\r\n")
            return connection.close()
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: vestibule-hand-over/1\r\n\r\n")
        connection.recv(65536)
        if self.end != "no sockets":
            connection.sendall((1).to_bytes(4, "big"))
            connection.sendmsg([b"+"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self.tcp.fileno()]))])
            connection.recv(65536)
        if self.end == "refuses":
            connection.sendall(b'{"step": "refused", "text": "not now"}\n')
        if self.end == "after go":
            connection.sendall(b'{"step": "go"}\n')
            connection.recv(65536)
        if self.end == "retires":
            for message in ({"step": "go", "states": [self.state("early", "up")]},
                            {"step": "retiring", "states": [self.state("late", "down")]}):
                connection.sendall(json.dumps(message).encode() + b"\n")
                connection.recv(65536)
        # Closes everything, as after SIGKILL.
        self.unix.close()
        self.tcp.close()
        connection.close()

    def state(self, reason, state):
        return {"backend": "a", "server": "127.0.0.1:1", "state": state, "by": "root", "since": "2026-01-01T00:00:00Z", "reason": reason}

    def accept(self):
        self.connection, _ = self.unix.accept()
        return self.connection.recv(65536)


def wait_for_exit(process):
    return process.child.wait(TIMEOUT)


def processes_listening_on(port):
    """Process ids that have a listening socket on a port."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and int(words[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(f"socket:[{words[9]}]")
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(descriptor) in inodes for descriptor in (process / "fd").iterdir()):
                found.add(int(process.name))
        except OSError:
            pass
    return found


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
