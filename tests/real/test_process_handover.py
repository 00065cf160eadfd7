"""One process takes another's place, and everything that can go wrong meanwhile; the control socket; start and stop."""

import array
import grp
import json
import os
import pwd
import random
import re
import signal
import socket
import stat
import subprocess
import threading
import time
import unittest
import urllib.error
import urllib.request
from pathlib import Path

from fixtures import TIMEOUT, VESTIBULE, Certificates, Folder, Process, answers, free_port, program, wait_for
from imap_client import RawClient

CONFIGURATION = """
listeners: {listeners}
backends: {{a: {{servers: ["127.0.0.1:1"], check: off}}}}
routes: {routes}
limits: {{drain: 1m, workers: 2{limits}}}
admin: {{address: "127.0.0.1:{admin}", control: control/socket}}
{more}
"""
UPGRADE = (b"POST / HTTP/1.1\r\nhost: vestibule\r\nconnection: upgrade\r\nupgrade: vestibule-hand-over/1\r\n"
           b"content-length: %d\r\n\r\n%s")


def wait_for_exit(process):
    return process.child.wait(TIMEOUT)


def processes_listening_on(port):
    """The processes that have a listening socket on a port."""
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


class HandoverTestCase(unittest.TestCase):
    """A process with a control socket in a folder of its own; no mailbox server is needed."""

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
        wait_for("the start", lambda: self.alive(process) and self.pid() == process.child.pid)
        return process

    def alive(self, process):
        self.assertIsNone(process.child.poll(), process.text())
        return True

    def command(self, *words, before=()):
        return subprocess.run([*before, VESTIBULE, *map(str, words), "--control", self.control], capture_output=True, text=True,
                              timeout=2 * TIMEOUT)

    def pid(self):
        """Of the process that answers commands."""
        done = self.command("status", "--json")
        return json.loads(done.stdout)["pid"] if done.returncode == 0 else None

    def upgrade(self, code=0, *options):
        done = self.command("upgrade", *options)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout + done.stderr

    def assert_unaffected(self, process):
        """The process serves, answers commands, and no file is left over."""
        self.alive(process)
        self.assertTrue(answers(self.port, b"* OK"), process.text())
        wait_for("the control socket", lambda: self.pid() == process.child.pid)
        wait_for("no other file", lambda: self.control_files() == ["socket", f"socket.{process.child.pid}"])

    def control_files(self):
        return sorted(path.name for path in self.control.parent.iterdir())


class ConcurrentSuccessors(HandoverTestCase):
    def block_successor(self):
        """A successor that reads a table for ever: a pipe that is never written to."""
        os.mkfifo(self.folder.path / "pipe")
        self.write(routes="[{table: pipe}]")

    def test_second_successor_is_refused(self):
        first = self.start()
        self.block_successor()
        upgrade = Process([VESTIBULE, "upgrade", "--control", self.control], self.folder.path / "upgrade")
        self.addCleanup(upgrade.kill)
        child = int(wait_for("the successor", lambda: re.search(r"successor started \(pid (\d+)\)", upgrade.text()))[1])
        for _ in range(3):
            self.assertIn(f"another successor (pid {child}) is taking over", self.upgrade(1))
        self.assertEqual(self.pid(), first.child.pid, "status is answered meanwhile")
        self.write()
        direct_starts = self.run_program("--replace")
        self.assertEqual(wait_for_exit(direct_starts), 70)
        self.assertIn(f"does not hand over: another successor (pid {child}) is taking over", direct_starts.text())
        # It listens to signals, whatever it waits for.
        os.kill(child, signal.SIGTERM)
        self.assertEqual(wait_for_exit(upgrade), 1)
        self.assertIn(f"the successor (pid {child}) has ended, this process goes on: without an error", upgrade.text())
        self.assert_unaffected(first)
        self.assertIn(f"ends when its 0 sessions have ended", self.upgrade())

    def test_slow_successor_is_killed_after_the_timeout(self):
        first = self.start()
        self.block_successor()
        output = self.upgrade(1, "--timeout", "1s")
        child = int(re.search(r"the successor \(pid (\d+)\) did not take over within 1s: ended", output)[1])
        wait_for("its end", lambda: has_ended(child))
        self.assert_unaffected(first)

    def test_concurrent_upgrades_leave_one_process(self):
        first = self.start()
        for _ in range(3):
            upgrades = [Process([VESTIBULE, "upgrade", "--control", self.control], self.folder.path / f"upgrade-{number}")
                        for number in range(4)]
            direct_starts = [self.run_program("--replace") for _ in range(3)]
            codes = [wait_for_exit(upgrade) for upgrade in upgrades]
            # 70: the process that was asked has ended meanwhile.
            self.assertLessEqual(set(codes), {0, 1, 70})
            wait_for("those that were refused", lambda: sum(process.child.poll() is None for process in direct_starts) <= 1)
            # The last of them may still be taking over.
            pid = wait_for("the one", lambda: len(found := processes_listening_on(self.port)) == 1 and found == {self.pid()} and found.pop())
            self.assertEqual(processes_listening_on(self.admin), {pid})
            for process in direct_starts:
                self.assertTrue(process.child.pid == pid or wait_for_exit(process) in (0, 70), process.text())
        self.assertEqual(wait_for_exit(first), 0)
        os.kill(pid, signal.SIGTERM)
        wait_for("its end", lambda: not processes_listening_on(self.port))


class Upgrade(HandoverTestCase):
    def test_upgrade_reports_the_new_process(self):
        first = self.start()
        output = self.upgrade()
        pid = self.pid()
        version = re.search(r"\S+$", subprocess.run([VESTIBULE, "--version"], capture_output=True, text=True, check=True).stdout)[0]
        self.assertIn(f"pid {pid}, version {version}, serves", output)
        self.assertEqual(wait_for_exit(first), 0)
        self.assertNotEqual(pid, first.child.pid)
        self.assertEqual(processes_listening_on(self.port), {pid})
        core = Path(f"/proc/{pid}/limits").read_text()
        self.assertRegex(core, r"Max core file size +0 +0")
        self.assertEqual(Path(f"/proc/{pid}/fd/0").readlink(), Path("/dev/null"))

    def test_failed_upgrade_keeps_the_running_process(self):
        first = self.start()
        taken = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(taken.close)
        port = taken.getsockname()[1]
        own = f'{{address: "127.0.0.1:{self.port}", tls: none}}'
        self.folder.write("bad.pem", "-----BEGIN CERTIFICATE-----\nbm8=\n-----END CERTIFICATE-----\n")
        for change, expected in [
            ({"more": "log: {level: shout}"}, "log.level"),
            ({"more": "run_as: {user: nobody-such}"}, 'run_as.user: unknown user "nobody-such"'),
            ({"more": "run_as: {user: nobody, group: none-such}"}, 'run_as.group: unknown group "none-such"'),
            ({"listeners": f'[{own}, {{address: "127.0.0.1:{port}", tls: none}}]'}, f"127.0.0.1:{port} cannot be bound (listeners[1].address)"),
            ({"admin": port}, f"127.0.0.1:{port} cannot be bound (admin.address)"),
            ({"more": "tls: {certificates: [{cert: bad.pem, key: bad.pem}]}"}, "bad.pem"),
            # Its folder is not the user's: found before the socket is taken, and long before the process retires.
            ({"more": "run_as: {user: nobody, group: nogroup}"}, "must be writable by the user of run_as"),
        ]:
            with self.subTest(expected):
                self.write(**change)
                self.assertIn(expected, self.upgrade(1))
                self.assert_unaffected(first)
        self.write()
        self.upgrade()
        self.assertEqual(wait_for_exit(first), 0)

    def test_check_reports_an_unknown_user(self):
        self.write(more="run_as: {user: nobody-such}")
        for command in ("check", "run"):
            done = subprocess.run([VESTIBULE, command, "--config", self.file], capture_output=True, text=True, timeout=TIMEOUT)
            self.assertEqual(done.returncode, 78)
            self.assertRegex(done.stderr, r'vestibule.yaml:\d+:\d+: run_as.user: unknown user "nobody-such"')

    def test_killed_draining_process_does_not_affect_its_successor(self):
        first = self.start()
        client = RawClient(self.port)
        self.assertTrue(client.line().startswith(b"* OK"))
        self.upgrade()
        pid = self.pid()
        self.alive(first)
        # It still can be asked, by a name of its own.
        done = subprocess.run([VESTIBULE, "status", "--json", "--control", f"{self.control}.{first.child.pid}"], capture_output=True,
                              text=True, timeout=TIMEOUT)
        self.assertEqual(json.loads(done.stdout)["pid"], first.child.pid)
        self.assertEqual(self.control_files(), sorted(["socket", f"socket.{first.child.pid}", f"socket.{pid}"]))
        first.child.kill()
        self.assertEqual(wait_for_exit(first), -signal.SIGKILL)
        self.assertEqual(client.line(), b"")
        self.assertTrue(answers(self.port, b"* OK"))
        self.assertEqual((self.pid(), processes_listening_on(self.port)), (pid, {pid}))

    def test_systemd_sockets_are_inherited_by_successors(self):
        process = Process([program("systemd-socket-activate"), "-l", f"127.0.0.1:{self.port}", VESTIBULE, "run", "--config", self.file],
                          self.folder.path / "log")
        self.addCleanup(process.kill)
        wait_for("the proxy", lambda: answers(self.port, b"* OK"))
        pid = wait_for("the control socket", self.pid)
        for _ in range(2):
            self.upgrade()
            before, pid = pid, self.pid()
            self.assertNotEqual(pid, before)
            self.assertTrue(answers(self.port, b"* OK"))
        self.assertEqual(processes_listening_on(self.port), {pid})

    def test_reload_is_refused_during_a_handover(self):
        first = self.start()
        other = Successor(self.control)
        self.addCleanup(other.close)
        self.assertTrue(other.take_sockets())
        done = self.command("reload")
        self.assertEqual(done.returncode, 78)
        self.assertIn("is taking over: reload again", done.stderr)
        other.close()
        wait_for("the end of the hand-over", lambda: self.command("reload").returncode == 0)
        self.assert_unaffected(first)


class Successor:
    """A successor that does what no real one does."""

    def __init__(self, control):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(str(control))
        self.sockets = []

    def request(self):
        body = json.dumps({"command": "hand-over", "pid": os.getpid()}).encode()
        self.socket.sendall(UPGRADE % (len(body), body))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.socket.recv(1)
        return head

    def send(self, message):
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def line(self):
        line = b""
        while not line.endswith(b"\n"):
            byte = self.socket.recv(1)
            if not byte:
                return None
            line += byte
        return json.loads(line)

    def take_sockets(self):
        if b" 101 " not in self.request():
            return False
        self.send({"step": "send"})
        count = int.from_bytes(self.socket.recv(4), "big")
        while len(self.sockets) < count:
            _, ancillary, _, _ = self.socket.recvmsg(1, socket.CMSG_SPACE(64 * 4))
            for _, _, data in ancillary:
                self.sockets += list(array.array("i", data))
        return True

    def close(self):
        for descriptor in self.sockets:
            os.close(descriptor)
        self.sockets = []
        self.socket.close()


class FailingSuccessor(HandoverTestCase):
    """The successor is gone, or falls silent, at each step."""

    def test_successor_may_disappear_at_each_step(self):
        first = self.start()

        def connects(successor):
            pass

        def requests_handover(successor):
            self.assertIn(b" 101 ", successor.request())

        def receives_sockets(successor):
            self.assertTrue(successor.take_sockets())

        def receives_go(successor):
            receives_sockets(successor)
            successor.send({"step": "ready", "version": "x"})
            self.assertEqual(successor.line(), {"step": "go"})

        def replaces_control_socket(successor):
            receives_go(successor)
            name = self.control.parent / "other"
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(name))
                listener.listen()
                name.rename(self.control)

        def removes_control_socket(successor):
            receives_go(successor)
            self.control.unlink()

        def sends_out_of_order(successor):
            receives_sockets(successor)
            successor.send({"step": "serving"})
            self.assertEqual(successor.line()["step"], "refused")

        def sends_invalid_message(successor):
            requests_handover(successor)
            successor.send("what?")
            self.assertEqual(successor.line()["step"], "refused")

        for step in (connects, requests_handover, receives_sockets, receives_go, replaces_control_socket, removes_control_socket, sends_out_of_order, sends_invalid_message):
            with self.subTest(step.__name__):
                successor = Successor(self.control)
                step(successor)
                successor.close()
                self.assert_unaffected(first)
                # The next one is not refused.
                wait_for("the lease to end", lambda: self.command("reload").returncode == 0)
        self.upgrade()
        self.assertEqual(wait_for_exit(first), 0)

    def test_server_states_are_sent_at_start_and_at_retirement(self):
        """At the permission to start and at the retirement, because operators go on in between. No move begins there."""
        first = self.start()
        server = "127.0.0.1:1"
        own = f"{self.control}.{first.child.pid}"

        def states(message):
            return [(stored["backend"], stored["server"], stored["state"], stored.get("reason")) for stored in message.get("states", [])]

        self.assertEqual(self.command("server", server, "down", "--reason", "early").returncode, 0)
        # A client keeps the process from ending as soon as it is replaced.
        client = socket.create_connection(("127.0.0.1", self.port), TIMEOUT)
        self.addCleanup(client.close)
        client.recv(100)
        successor = Successor(self.control)
        self.addCleanup(successor.close)
        self.assertTrue(successor.take_sockets())
        successor.send({"step": "ready", "version": "x"})
        message = successor.line()
        self.assertEqual((message["step"], states(message)), ("go", [("a", server, "down", "early")]))
        moved = self.command("move", "alice", "a")
        self.assertEqual((moved.returncode, moved.stderr.count("is taking over: try again")), (1, 1), moved.stderr)
        self.assertEqual(self.command("server", server, "drain", "--reason", "late").returncode, 0)
        successor.send({"step": "serving"})
        message = successor.line()
        self.assertEqual((message["step"], states(message)), ("retiring", [("a", server, "drain", "late")]))
        # From now on the successor decides.
        for words in (("server", server, "up"), ("drain", server), ("kick", "alice"), ("move", "alice", "a"), ("reload",), ("upgrade",)):
            done = subprocess.run([VESTIBULE, *words, "--control", own], capture_output=True, text=True, timeout=2 * TIMEOUT)
            self.assertNotEqual(done.returncode, 0, words)
            self.assertIn("this process has been replaced", done.stderr, words)

    def test_control_socket_is_restored_after_its_removal(self):
        first = self.start()
        self.control.unlink()
        self.assert_unaffected(first)
        self.assertIn("the control socket was lost, and is restored", first.text())

    def test_shutdown_ends_a_handover(self):
        first = self.start()
        successor = Successor(self.control)
        self.addCleanup(successor.close)
        self.assertTrue(successor.take_sockets())
        first.child.send_signal(signal.SIGTERM)
        self.assertEqual(successor.line()["step"], "refused")
        self.assertEqual(wait_for_exit(first), 0)
        self.assertEqual(list(self.control.parent.iterdir()), [])

    def test_successor_killed_while_waiting_is_ignored(self):
        first = self.start()
        first.child.send_signal(signal.SIGSTOP)
        second = self.run_program("--replace")
        # It has connected: its request waits in the queue of a process that does not read.
        wait_for("its connection", lambda: self.queued(first.child.pid) > 0)
        second.child.send_signal(signal.SIGKILL)
        wait_for_exit(second)
        first.child.send_signal(signal.SIGCONT)
        self.assert_unaffected(first)

    def queued(self, pid):
        """Connections that a process has not accepted. The kernel knows the socket by the name it was bound to."""
        name = f"{self.control}.{pid}.new"
        done = subprocess.run([program("ss"), "-xlH", "src", name], capture_output=True, text=True, check=True)
        return int(done.stdout.split()[2]) if done.stdout else 0


class HungPredecessor(HandoverTestCase):
    def setUp(self):
        super().setUp()
        self.first = self.start()
        self.first.child.send_signal(signal.SIGSTOP)
        self.addCleanup(lambda: self.first.child.send_signal(signal.SIGCONT))

    def test_successor_gives_up_when_the_process_hangs(self):
        second = self.run_program("--replace")
        self.assertEqual(wait_for_exit(second), 70)
        self.assertIn("the running process does not answer", second.text())
        self.resume()

    def test_waiting_successor_stops_on_a_signal(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            second = self.run_program("--replace")
            wait_for("its handlers", lambda: handles_signal(second.child.pid, number))
            second.child.send_signal(number)
            self.assertEqual(wait_for_exit(second), 0, second.text())
        self.resume()

    def resume(self):
        self.first.child.send_signal(signal.SIGCONT)
        self.assert_unaffected(self.first)


def handles_signal(pid, number):
    mask = int(re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
    return mask >> (number - 1) & 1


class Predecessor(threading.Thread):
    """A process that hands its sockets over and dies at a given step."""

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
            pass  # The test has ended, or the other side has.

    def hand_over(self):
        # Others only look whether there is a process, or how it is.
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
        # As if killed.
        self.unix.close()
        self.tcp.close()
        connection.close()

    def state(self, reason, state):
        return {"backend": "a", "server": "127.0.0.1:1", "state": state, "by": "root", "since": "2026-01-01T00:00:00Z", "reason": reason}

    def accept(self):
        self.connection, _ = self.unix.accept()
        return self.connection.recv(65536)


class FailingPredecessor(HandoverTestCase):
    def replace(self, end):
        predecessor = Predecessor(self.control, self.port, end)
        predecessor.start()
        return self.run_program("--replace")

    def test_successor_starts_when_the_predecessor_dies_after_sending_sockets(self):
        for end in ("after sockets", "after go"):
            with self.subTest(end):
                process = self.replace(end)
                wait_for("the control socket", lambda: self.alive(process) and self.pid() == process.child.pid)
                self.assertTrue(answers(self.port, b"* OK"), process.text())
                process.child.send_signal(signal.SIGTERM)
                self.assertEqual(wait_for_exit(process), 0)
                self.assertEqual(list(self.control.parent.iterdir()), [], "a process that stops removes its socket")

    def test_server_states_set_during_the_handover_are_kept(self):
        self.write(more="state_file: state.json")
        process = self.replace("retires")
        wait_for("the control socket", lambda: self.alive(process) and self.pid() == process.child.pid)
        server = json.loads(self.command("status", "--json").stdout)["servers"][0]
        self.assertEqual((server["mode"], server["set"]["reason"]), ("down", "late"))
        # And they are written: the predecessor may have had no file.
        self.assertEqual([stored["reason"] for stored in json.loads((self.folder.path / "state.json").read_text())["states"]], ["late"])

    def test_invalid_replies_of_the_predecessor_are_reported(self):
        for end, expected in [("no sockets", "the listening sockets could not be received"), ("refuses", "not now"),
                              ("nonsense", "the running process does not answer"), ("silent", "does not answer at")]:
            with self.subTest(end):
                process = self.replace(end)
                self.assertEqual(wait_for_exit(process), 70, process.text())
                self.assertIn(expected, process.text())
                self.assertEqual([path.name for path in self.control.parent.iterdir()], ["socket"])
                self.control.unlink()


class OtherUser(HandoverTestCase):
    """run_as, and other users' files."""

    NOBODY = ("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups")
    RUN_AS = "run_as: {user: nobody, group: nogroup}"

    def chown(self, path, user="nobody", group="nogroup"):
        os.chown(path, pwd.getpwnam(user).pw_uid, grp.getgrnam(group).gr_gid)

    def assert_runs_as_nobody(self, pid):
        status = Path(f"/proc/{pid}/status").read_text()
        uid = pwd.getpwnam("nobody").pw_uid
        self.assertRegex(status, rf"Uid:\s+{uid}\s+{uid}\s+{uid}\s+{uid}\n")
        self.assertRegex(status, r"CapEff:\s+0+\n")
        # What is not dumpable belongs to root, whatever user the process has.
        self.assertEqual(Path(f"/proc/{pid}/maps").stat().st_uid, 0)

    def test_unprivileged_process_is_upgraded(self):
        self.chown(self.control.parent)
        self.write(more=self.RUN_AS)
        first = self.start()
        self.assert_runs_as_nobody(first.child.pid)
        found = self.control.stat()
        self.assertEqual((found.st_uid, stat.S_IMODE(found.st_mode)), (pwd.getpwnam("nobody").pw_uid, 0o600))
        # By root, and by the user itself.
        for before in ((), self.NOBODY):
            pid = self.pid()
            done = self.command("upgrade", before=before)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertNotEqual(self.pid(), pid)
            self.assert_runs_as_nobody(self.pid())
        # By hand, as root and as the user.
        for before in ((), self.NOBODY, ()):
            process = self.start("--replace", before=before)
            self.assert_runs_as_nobody(process.child.pid)
            wait_for("the others to end", lambda: processes_listening_on(self.port) == {process.child.pid})
            self.assertTrue(answers(self.port, b"* OK"))
        # A third user may not.
        for program_user in ("daemon", "bin"):
            done = subprocess.run(["setpriv", "--reuid", program_user, "--clear-groups", VESTIBULE, "run", "--replace", "--config", self.file],
                                  capture_output=True, text=True, timeout=TIMEOUT)
            self.assertEqual(done.returncode, 77, done.stderr)
            self.assertIn("belongs to another user", done.stderr)
        self.assert_unaffected(process)

    def test_upgrade_that_needs_root_is_refused(self):
        self.chown(self.control.parent)
        self.write(more=self.RUN_AS)
        first = self.start()
        own = f'{{address: "127.0.0.1:{self.port}", tls: none}}'
        self.write(listeners=f'[{own}, {{address: "127.0.0.1:2", tls: none}}]', more=self.RUN_AS)
        unprivileged = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
        if unprivileged > 2:
            self.assertIn("takes root or CAP_NET_BIND_SERVICE: restart", self.upgrade(1))
        self.write(more="run_as: {user: daemon}")
        self.assertIn('only root can change to user "daemon" (run_as)', self.upgrade(1))
        self.assert_unaffected(first)

    def test_unwritable_control_folder_prevents_upgrades(self):
        self.write(more=self.RUN_AS)
        first = self.start()
        self.assert_runs_as_nobody(first.child.pid)
        self.assertIn("is not writable by the user of run_as: this process cannot be upgraded", first.text())
        self.upgrade(1)
        second = self.run_program("--replace")
        self.assertEqual(wait_for_exit(second), 70)
        self.assertIn("must be writable by the user of run_as", second.text())
        self.assert_unaffected(first)

    def test_foreign_file_at_the_control_path_is_kept(self):
        def file():
            self.control.write_text("precious")

        def link():
            self.folder.write("target", "precious")
            self.control.symlink_to(self.folder.path / "target")

        def socket_of_another():
            with socket.socket(socket.AF_UNIX) as other:
                other.bind(str(self.control))
            self.chown(self.control, "daemon", "daemon")

        for make, code, expected in [(file, 70, "is a file, not a socket"), (link, 70, "is a symbolic link, not a socket"),
                                     (self.control.mkdir, 70, "is a folder, not a socket"),
                                     (socket_of_another, 77, "belongs to another user")]:
            with self.subTest(expected):
                make()
                for options in ((), ("--replace",)):
                    process = self.run_program(*options)
                    self.assertEqual(wait_for_exit(process), code)
                    self.assertIn(expected, process.text())
                self.assertEqual([path.name for path in self.control.parent.iterdir()], ["socket"])
                (Path.rmdir if self.control.is_dir() else Path.unlink)(self.control)
        self.control.parent.chmod(0o777)
        process = self.run_program()
        self.assertEqual(wait_for_exit(process), 70)
        self.assertIn("is writable by every user", process.text())

    def test_process_of_another_user_at_the_control_path_is_refused(self):
        """In a folder like /tmp anyone may be first."""
        self.control.parent.chmod(0o1777)
        other = Predecessor(self.control, free_port(), "silent")
        self.chown(self.control, "daemon", "daemon")
        other.start()
        for options in ((), ("--replace",)):
            process = self.run_program(*options)
            self.assertEqual(wait_for_exit(process), 77, process.text())
        other.unix.close()


class ControlPath(HandoverTestCase):
    def test_one_of_many_concurrent_starts_succeeds(self):
        processes = []
        for _ in range(6):
            self.write(listeners='[{address: "127.0.0.1:0", tls: none}]', admin=free_port())
            text = self.file.read_text()
            self.file = self.folder.write(f"vestibule-{len(processes)}.yaml", text)
            processes.append(self.run_program())
        wait_for("all but one to end", lambda: sum(process.child.poll() is None for process in processes) == 1)
        one = next(process for process in processes if process.child.poll() is None)
        wait_for("the one", lambda: self.pid() == one.child.pid)
        self.assertEqual(self.control_files(), ["socket", f"socket.{one.child.pid}"])
        for process in processes:
            if process is not one:
                self.assertEqual(process.child.returncode, 70)
                self.assertIn("take its place with --replace", process.text())

    def test_stale_control_sockets_are_removed(self):
        for name in ("socket", "socket.4194305", "socket.4194305.new", "socket.4194305.sockets"):
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(self.control.parent / name))
        self.assert_unaffected(self.start())

    def test_killed_process_can_be_replaced(self):
        first = self.start()
        first.kill()
        self.assertTrue(self.control.exists())
        second = self.start("--replace")
        self.assert_unaffected(second)


class ShortConnections(threading.Thread):
    """Connects and reads the greeting, again and again; keeps what went wrong."""

    def __init__(self, port, host="127.0.0.1"):
        super().__init__(daemon=True)
        self.address, self.count, self.errors, self.stop = (host, port), 0, [], threading.Event()

    def run(self):
        while not self.stop.is_set():
            try:
                with socket.create_connection(self.address, TIMEOUT) as client:
                    greeting = client.recv(4)
                    if greeting != b"* OK":
                        raise AssertionError(f"{greeting!r} after {self.count} visits")
                    client.shutdown(socket.SHUT_WR)
                    client.recv(4096)
                self.count += 1
            except Exception as error:  # noqa: BLE001: whatever it is, it is what the test looks for
                self.errors.append(repr(error))


def non_ephemeral_port():
    """A free port from which the system makes no connections: one that a client has had lately cannot be bound for all
    addresses."""
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
        connection_loops = [ShortConnections(self.port) for _ in range(load)]
        for connection_loop in connection_loops:
            connection_loop.start()
        for form in self.FORMS:
            self.write(listeners=self.listeners(*form), **options)
            done = self.command("reload")
            self.assertEqual(done.returncode, 0, f"{form}: {done.stderr}")
            count = sum(connection_loop.count for connection_loop in connection_loops)
            wait_for("visits", lambda: sum(connection_loop.count for connection_loop in connection_loops) >= count + 20 * load or any(connection_loop.errors for connection_loop in connection_loops))
            self.assertEqual([connection_loop.errors for connection_loop in connection_loops], [[]] * load, form)
            # Who else can connect is as the configuration has it, and not as the one before had it.
            for host, expected in (("127.0.0.2", form[0] == "0.0.0.0" or form in (("[::]",), ("[::]", "0.0.0.0"))),
                                   ("::1", any(":" in address for address in form))):
                self.assertEqual(self.connects(host), expected, f"{form}: {host}\n{self.lines(process)}")
        for connection_loop in connection_loops:
            connection_loop.stop.set()
            connection_loop.join(TIMEOUT)
        self.assertEqual([connection_loop.errors for connection_loop in connection_loops], [[]] * load)
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
        """Not under load: systems may forbid to filter packets, and then connections that arrive in the moment are reset."""
        nobody = pwd.getpwnam("nobody")
        os.chown(self.control.parent, nobody.pw_uid, nobody.pw_gid)
        run_as = {"more": "run_as: {user: nobody, group: nogroup}"}
        self.write(**run_as)
        self.assert_unaffected(self.reload_through_all_forms(0, **run_as))

    def test_upgrade_widens_and_narrows_addresses(self):
        process = self.start()
        pid = process.child.pid
        connection_loops = [ShortConnections(self.port) for _ in range(2)]
        for connection_loop in connection_loops:
            connection_loop.start()
        for form in self.FORMS:
            self.write(listeners=self.listeners(*form))
            self.upgrade()
            self.assertNotEqual(self.pid(), pid)
            pid = self.pid()
            wait_for("the process before it to end", lambda: processes_listening_on(self.port) == {pid})
            self.assertTrue(answers(self.port, b"* OK"))
            self.assertEqual(self.connects("::1"), any(":" in address for address in form))
        for connection_loop in connection_loops:
            connection_loop.stop.set()
            connection_loop.join(TIMEOUT)
        self.assertEqual([connection_loop.errors for connection_loop in connection_loops], [[]] * 2)

    def test_failed_reload_changes_no_address(self):
        process = self.start()
        taken = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(taken.close)
        connection_loops = ShortConnections(self.port)
        connection_loops.start()
        bad = f'{{address: "127.0.0.1:{taken.getsockname()[1]}", tls: none}}'
        for form in self.FORMS:
            self.write(listeners=self.listeners(*form)[:-1] + f", {bad}]")
            done = self.command("reload")
            self.assertEqual(done.returncode, 78, f"{form}: {done.stdout}{done.stderr}")
            self.assertIn(f"cannot be bound (listeners[{len(form)}].address)", done.stderr)
        connection_loops.stop.set()
        connection_loops.join(TIMEOUT)
        self.assertEqual(connection_loops.errors, [])
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
            """A request to the endpoint that is being replaced may be cut off."""
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


class Shutdown(HandoverTestCase):
    def ready(self):
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/ready", timeout=TIMEOUT).status
        except urllib.error.HTTPError as error:
            return error.code

    def test_ready_delay_keeps_the_port_open_after_readiness_fails(self):
        for second_signal in (False, True):
            with self.subTest(second_signal=second_signal):
                self.write(limits=f"ready_delay: {'1h' if second_signal else '2s'}")
                process = self.start()
                self.assertEqual(self.ready(), 200)
                process.child.send_signal(signal.SIGTERM)
                wait_for("the check to fail", lambda: self.ready() == 503)
                # Connections are served as before, and no more hand-over begins.
                self.assertTrue(answers(self.port, b"* OK"))
                self.assertIn("this process is stopping", self.upgrade(1))
                client = RawClient(self.port)
                self.assertTrue(client.line().startswith(b"* OK"))
                if second_signal:
                    process.child.send_signal(signal.SIGTERM)
                self.assertTrue(client.line().startswith(b"* BYE [UNAVAILABLE]"), "the drain begins")
                self.assertEqual(wait_for_exit(process), 0)
                self.assertFalse(answers(self.port))

    def test_ready_delay_is_off_by_default(self):
        process = self.start()
        process.child.send_signal(signal.SIGTERM)
        self.assertEqual(wait_for_exit(process), 0)
        self.assertNotIn("ready_delay", process.text())


if __name__ == "__main__":
    unittest.main()
