"""Upgrades: one process takes the place of another, and every failure during the handover."""

import array
import json
import os
import re
import signal
import socket
import subprocess
import unittest
from pathlib import Path

from fixtures import TIMEOUT, VESTIBULE, Process, answers, program, wait_for
from handover_fixtures import HandoverTestCase, Predecessor, has_ended, processes_listening_on, wait_for_exit
from imap_client import RawClient

UPGRADE = (b"POST / HTTP/1.1\r\nhost: vestibule\r\nconnection: upgrade\r\nupgrade: vestibule-hand-over/1\r\n"
           b"content-length: %d\r\n\r\n%s")


class ConcurrentSuccessors(HandoverTestCase):
    def block_successor(self):
        """Makes successors block while they read their table, a pipe without a writer."""
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
        self.assertEqual(self.pid(), first.child.pid, "status is answered during the handover")
        self.write()
        successor = self.run_program("--replace")
        self.assertEqual(wait_for_exit(successor), 70)
        self.assertIn(f"does not hand over: another successor (pid {child}) is taking over", successor.text())
        # The blocked successor still handles signals.
        os.kill(child, signal.SIGTERM)
        self.assertEqual(wait_for_exit(upgrade), 1)
        self.assertIn(f"the successor (pid {child}) has ended, this process continues: without an error", upgrade.text())
        self.assert_unaffected(first)
        self.assertIn("ends when its 0 sessions have ended", self.upgrade())

    def test_slow_successor_is_killed_after_the_timeout(self):
        first = self.start()
        self.block_successor()
        output = self.upgrade(1, "--timeout", "1s")
        child = int(re.search(r"the successor \(pid (\d+)\) did not take over within 1s and was terminated", output)[1])
        wait_for("the successor to end", lambda: has_ended(child))
        self.assert_unaffected(first)

    def test_concurrent_upgrades_leave_one_process(self):
        first = self.start()
        for _ in range(3):
            upgrades = [Process([VESTIBULE, "upgrade", "--control", self.control], self.folder.path / f"upgrade-{number}")
                        for number in range(4)]
            direct_starts = [self.run_program("--replace") for _ in range(3)]
            codes = [wait_for_exit(upgrade) for upgrade in upgrades]
            # 70: the process that received the command has ended.
            self.assertLessEqual(set(codes), {0, 1, 70})
            wait_for("the refused processes to end", lambda: sum(process.child.poll() is None for process in direct_starts) <= 1)
            # The last one may still be taking over.
            pid = wait_for("a single process", lambda: len(found := processes_listening_on(self.port)) == 1
                           and found == {self.pid()} and found.pop())
            self.assertEqual(processes_listening_on(self.admin), {pid})
            for process in direct_starts:
                self.assertTrue(process.child.pid == pid or wait_for_exit(process) in (0, 70), process.text())
        self.assertEqual(wait_for_exit(first), 0)
        os.kill(pid, signal.SIGTERM)
        wait_for("the process to end", lambda: not processes_listening_on(self.port))


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
            ({"more": "run_as: {user: no-such-user}"}, 'run_as.user: unknown user "no-such-user"'),
            ({"more": "run_as: {user: nobody, group: no-such-group}"}, 'run_as.group: unknown group "no-such-group"'),
            ({"listeners": f'[{own}, {{address: "127.0.0.1:{port}", tls: none}}]'}, f"127.0.0.1:{port} cannot be bound (listeners[1].address)"),
            ({"admin": port}, f"127.0.0.1:{port} cannot be bound (admin.address)"),
            ({"more": "tls: {certificates: [{cert: bad.pem, key: bad.pem}]}"}, "bad.pem"),
            # The control folder belongs to another user: this is detected before the sockets are handed over.
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
        self.write(more="run_as: {user: no-such-user}")
        for command in ("check", "run"):
            done = subprocess.run([VESTIBULE, command, "--config", self.file], capture_output=True, text=True, timeout=TIMEOUT)
            self.assertEqual(done.returncode, 78)
            self.assertRegex(done.stderr, r'vestibule.yaml:\d+:\d+: run_as.user: unknown user "no-such-user"')

    def test_killed_draining_process_does_not_affect_its_successor(self):
        first = self.start()
        client = RawClient(self.port)
        self.assertTrue(client.line().startswith(b"* OK"))
        self.upgrade()
        pid = self.pid()
        self.alive(first)
        # It still answers on a control socket named after its process id.
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
        wait_for("the end of the handover", lambda: self.command("reload").returncode == 0)
        self.assert_unaffected(first)


class Successor:
    """A scripted successor."""

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
    """Successors that end, hang or violate the protocol."""

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

        for step in (connects, requests_handover, receives_sockets, receives_go, replaces_control_socket, removes_control_socket,
                     sends_out_of_order, sends_invalid_message):
            with self.subTest(step.__name__):
                successor = Successor(self.control)
                step(successor)
                successor.close()
                self.assert_unaffected(first)
                # The next successor is accepted.
                wait_for("the lease to end", lambda: self.command("reload").returncode == 0)
        self.upgrade()
        self.assertEqual(wait_for_exit(first), 0)

    def test_server_states_are_sent_at_start_and_at_retirement(self):
        """They are sent with "go" and with "retiring", because operators may change them in between. No move begins then."""
        first = self.start()
        server = "127.0.0.1:1"
        own = f"{self.control}.{first.child.pid}"

        def states(message):
            return [(stored["backend"], stored["server"], stored["state"], stored.get("reason")) for stored in message.get("states", [])]

        self.assertEqual(self.command("server", server, "down", "--reason", "early").returncode, 0)
        # An open connection keeps the replaced process running.
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
        # From now on only the successor accepts commands that change something.
        for words in (("server", server, "up"), ("drain", server), ("kick", "alice"), ("move", "alice", "a"), ("reload",), ("upgrade",)):
            done = subprocess.run([VESTIBULE, *words, "--control", own], capture_output=True, text=True, timeout=2 * TIMEOUT)
            self.assertNotEqual(done.returncode, 0, words)
            self.assertIn("this process has been replaced", done.stderr, words)

    def test_control_socket_is_restored_after_its_removal(self):
        first = self.start()
        self.control.unlink()
        self.assert_unaffected(first)
        self.assertIn("the control socket was lost and has been restored", first.text())

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
        # The successor has connected; its request is in the accept queue of the stopped process.
        wait_for("the connection of the successor", lambda: self.queued(first.child.pid) > 0)
        second.child.send_signal(signal.SIGKILL)
        wait_for_exit(second)
        first.child.send_signal(signal.SIGCONT)
        self.assert_unaffected(first)

    def queued(self, pid):
        """Number of connections that a process has not accepted. The kernel knows the socket by the name it was bound to."""
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
            wait_for("its signal handlers", lambda: handles_signal(second.child.pid, number))
            second.child.send_signal(number)
            self.assertEqual(wait_for_exit(second), 0, second.text())
        self.resume()

    def resume(self):
        self.first.child.send_signal(signal.SIGCONT)
        self.assert_unaffected(self.first)


def handles_signal(pid, number):
    mask = int(re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
    return mask >> (number - 1) & 1


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
                self.assertEqual(list(self.control.parent.iterdir()), [], "a stopped process has removed its socket")

    def test_server_states_set_during_the_handover_are_kept(self):
        self.write(more="state_file: state.json")
        process = self.replace("retires")
        wait_for("the control socket", lambda: self.alive(process) and self.pid() == process.child.pid)
        server = json.loads(self.command("status", "--json").stdout)["servers"][0]
        self.assertEqual((server["state"], server["set"]["reason"]), ("down", "late"))
        # They are also written to the state file: the predecessor may have had none.
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


if __name__ == "__main__":
    unittest.main()
