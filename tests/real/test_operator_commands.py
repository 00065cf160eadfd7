"""Commands of an operator to the running process: reload, kick, drain, move, upgrade; socket activation; dropping root."""

import grp
import itertools
import json
import os
import pwd
import signal
import socket
import subprocess
import threading
import time
import unittest
from pathlib import Path

from fixtures import TIMEOUT, VESTIBULE, Certificates, Dovecot, Folder, Process, Proxy, answers, free_port, program, wait_for
from imap_client import ALICE, BOB, LOGIN, RawClient, session

CONFIGURATION = """
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none}}]
backends:
  shard-a: {{servers: ["127.0.0.1:{a}"]}}
  shard-b: {{servers: ["127.0.0.1:{b}"]}}
routes: [{{table: users.txt}}]
limits: {{drain: 1m}}
admin: {{address: "127.0.0.1:{{admin}}", control: control}}
"""


def responds(client):
    return client.command("n", "NOOP")[-1].startswith(b"n OK")


class OperatorTestCase(unittest.TestCase):
    configuration = CONFIGURATION

    @classmethod
    def setUpClass(cls):
        folder = Folder()
        cls.addClassCleanup(folder.remove)
        cls.certificates = Certificates(folder)
        cls.a, cls.b = Dovecot(cls.certificates), Dovecot(cls.certificates)
        cls.addClassCleanup(cls.a.close)
        cls.addClassCleanup(cls.b.close)

    def setUp(self):
        self.folder = Folder()
        self.addCleanup(self.folder.remove)
        self.folder.write("users.txt", f"{ALICE} shard-a\n{BOB} shard-b\n")
        self.proxy = Proxy(self.configuration.format(a=self.a.port, b=self.b.port), self.folder)
        self.addCleanup(self.proxy.close)
        self.port = self.proxy.ports["plain"]
        wait_for("the control socket", (self.folder.path / "control").exists)

    def command(self, *words, code=0):
        """Sends a command to the running process; returns its output."""
        done = subprocess.run([VESTIBULE, *map(str, words), "--control", self.folder.path / "control"], capture_output=True, text=True,
                              timeout=TIMEOUT)
        self.assertEqual(done.returncode, code, f"{words}\n{done.stdout}{done.stderr}\n{self.proxy.log()}")
        return done.stdout + done.stderr

    def sessions(self, *user):
        return json.loads(self.command("sessions", *user, "--json"))

    def lines(self, text):
        return [line for line in self.proxy.log().splitlines() if text in line]

    def status(self):
        return json.loads(self.command("status", "--json"))

    def upgrade(self):
        """Replaces the process; returns the process id of the new one."""
        before = self.status()["pid"]
        self.command("upgrade")
        now = self.status()["pid"]
        self.assertNotEqual(now, before)
        return now

    def servers(self):
        return {server["server"]: server for server in json.loads(self.command("status", "--json"))["servers"]}


class Commands(OperatorTestCase):
    def test_reload_applies_or_reports_errors(self):
        client = session(self.port)
        text = self.proxy.file.read_text()
        self.proxy.file.write_text(text.replace("shard-b:", "shard-c:"))
        output = self.command("reload", code=78)
        self.assertIn("users.txt:2: no backend is declared as \"shard-b\"; declared: shard-a, shard-c", output)
        self.assertEqual(self.proxy.metric("vestibule_reload_failed"), 1)
        self.assertTrue(responds(session(self.port, BOB)), "the old configuration stays in use")
        other = free_port()
        address = f'{{address: "127.0.0.1:{self.port}", tls: none}}'
        self.proxy.file.write_text(text.replace(address, f'{address}, {{address: "127.0.0.1:{other}", tls: none}}'))
        self.assertIn("loaded", self.command("reload"))
        self.assertTrue(responds(session(other)))
        self.proxy.file.write_text(text + "log: {level: debug}\n")
        self.proxy.process.child.send_signal(signal.SIGHUP)
        wait_for("the port to close", lambda: not answers(other))
        with socket.create_connection(("127.0.0.1", self.proxy.ports["admin"]), TIMEOUT) as junk:
            junk.sendall(b"what?\r\n\r\n")
            wait_for("the new level", lambda: "DEBUG" in self.proxy.log())
        self.assertEqual(self.proxy.metric("vestibule_reload_failed"), 0)
        self.assertEqual(self.proxy.metric("vestibule_reloads_total", outcome="loaded"), 2)
        self.assertTrue(responds(client), "the session survives all reloads")

    def test_sessions_are_listed_and_kicked(self):
        alice, again, bob = session(self.port), session(self.port), session(self.port, BOB)
        shown = json.loads(self.command("sessions", "--json"))
        self.assertEqual(sorted((one["user"], one["backend"]) for one in shown),
                         [(ALICE, "shard-a"), (ALICE, "shard-a"), (BOB, "shard-b")])
        self.assertIn("2 sessions ended", self.command("kick", "Alice@example.org"))
        self.assertEqual((alice.line(), again.line()), (b"", b""))
        self.assertTrue(responds(bob))
        self.assertTrue(responds(session(self.port)), "a kicked user may log in again")
        self.assertIn('reason="kicked"', self.proxy.log().replace("reason=kicked", 'reason="kicked"'))
        self.assertIn("0 sessions ended", self.command("kick", "unknown@example.org"))

    def test_drain_ends_the_sessions_of_a_server(self):
        name = f"127.0.0.1:{self.a.port}"
        sessions = [session(self.port) for _ in range(5)]
        bob = session(self.port, BOB)
        self.assertIn("5 sessions there", self.command("drain", name))
        self.assertTrue(all(map(responds, sessions)), "without --over no session ends")
        newcomer = RawClient(self.port)
        newcomer.line()
        self.assertTrue(newcomer.command("a", LOGIN[ALICE])[-1].startswith(b"a NO [UNAVAILABLE]"), "no new logins")
        began = time.monotonic()
        self.assertIn("no session is left", self.command("drain", name, "--over", "2s"))
        took = time.monotonic() - began
        self.assertGreater(took, 1.2, "sessions end evenly over the given time")
        self.assertEqual([client.line() for client in sessions], [b""] * 5)
        self.assertTrue(responds(bob))
        self.assertEqual(self.servers()[name]["state"], "drain")
        self.command("server", name, "up")
        self.assertTrue(newcomer.command("b", LOGIN[ALICE])[-1].startswith(b"b OK"))
        self.assertIn("unknown server", self.command("drain", "10.9.9.9:1", code=1))

    def test_server_state_survives_a_reload(self):
        name = f"127.0.0.1:{self.a.port}"
        self.command("server", name, "drain")
        self.command("reload")
        self.assertEqual(self.servers()[name]["state"], "drain")
        self.command("server", name, "as-configured")
        self.assertEqual(self.servers()[name]["state"], "up")

    def test_move_holds_logins_while_its_command_runs(self):
        before, bob = session(self.port), session(self.port, BOB)
        # The default timeout is longer, for routes that are changed by hand.
        output = self.command("move", ALICE, "shard-b", "--timeout", "1s", code=1)
        self.assertIn("names backend shard-a, not shard-b", output)
        self.assertIn('route "table" names backend', output)
        self.assertEqual(before.line(), b"")
        before = session(self.port)
        # A login waits while the command runs, and is then routed to the new backend.
        waiting, answer = RawClient(self.port), []
        waiting.line()
        thread = threading.Thread(target=lambda: answer.append(waiting.command("a", LOGIN[ALICE])[-1]))
        script = self.folder.write("script", f"""
            set -e
            touch {self.folder.path}/begun
            while [ ! -e {self.folder.path}/go ]; do sleep 0.05; done
            printf '%s\\n' '{ALICE} shard-b' '{BOB} shard-b' > {self.folder.path}/users.txt.new
            mv {self.folder.path}/users.txt.new {self.folder.path}/users.txt
            {VESTIBULE} reload --control {self.folder.path}/control
        """)
        mover = Process([VESTIBULE, "move", ALICE, "shard-b", "--while", f"sh {script}", "--control", self.folder.path / "control"],
                        self.folder.path / "mover")
        self.addCleanup(mover.kill)
        wait_for("the command", lambda: (self.folder.path / "begun").exists())
        self.assertEqual(before.line(), b"", "sessions end before the mailbox is moved")
        thread.start()
        wait_for("the login to wait", lambda: self.proxy.metric("vestibule_connections") == 2)
        time.sleep(0.3)
        self.assertEqual(answer, [], "the login waits and is not refused")
        (self.folder.path / "go").touch()
        self.assertEqual(mover.child.wait(TIMEOUT), 0, mover.text())
        thread.join(TIMEOUT)
        # Both servers have a mailbox of alice, so check where the session is.
        self.assertTrue(answer[0].startswith(b"a OK"), answer)
        self.assertEqual([one["backend"] for one in json.loads(self.command("sessions", ALICE, "--json"))], ["shard-b"])
        self.assertTrue(responds(bob))

    def test_move_reloads_the_table_at_once(self):
        """The example of the help text: the command only copies the new table."""
        before = session(self.port)
        new = self.folder.write("users.new", f"{ALICE} shard-b\n{BOB} shard-b\n")
        output = self.command("move", ALICE, "shard-b", "--while", f"cp {new} {self.folder.path}/users.txt")
        self.assertEqual(before.line(), b"")
        self.assertIn(f"{ALICE}: 1 sessions ended, now routed to shard-b", output)
        for progress in ("new logins wait", f"running cp {new}", "waiting until the routes name shard-b, at most 10s"):
            self.assertIn(progress, output)
        client = session(self.port)
        self.assertEqual([one["backend"] for one in self.sessions(ALICE)], ["shard-b"])
        self.assertTrue(responds(client))

    def test_many_users_are_moved_concurrently(self):
        """Each move keeps a control connection open while its command runs, and needs another one at the end."""
        go = self.folder.path / "go"
        users = [f"user{number}@example.org" for number in range(24)]
        self.folder.write("users.txt", "".join(f"{user} shard-b\n" for user in users))
        movers = [Process([VESTIBULE, "move", user, "shard-b", "--while", f"while [ ! -e {go} ]; do sleep 0.2; done",
                           "--control", self.folder.path / "control"], self.folder.path / user) for user in users]
        for mover in movers:
            self.addCleanup(mover.kill)
        for mover in movers:
            wait_for("the login hold", lambda: "new logins wait" in mover.text())
        self.command("status")
        go.touch()
        for mover in movers:
            self.assertEqual(mover.child.wait(TIMEOUT), 0, mover.text())

    def test_move_reports_failure_when_the_process_ends(self):
        mover = Process([VESTIBULE, "move", ALICE, "shard-a", "--while", f"while [ ! -e {self.folder.path}/go ]; do sleep 0.05; done",
                         "--control", self.folder.path / "control"], self.folder.path / "mover")
        self.addCleanup(mover.kill)
        wait_for("the login hold", lambda: "new logins wait" in mover.text())
        self.proxy.process.kill()
        again = Process([VESTIBULE, "run", "--config", self.proxy.file], self.folder.path / "again")
        self.addCleanup(again.kill)
        wait_for("the next process", lambda: answers(self.port, b"* OK"))
        self.folder.write("go", "")
        self.assertEqual(mover.child.wait(TIMEOUT), 1, mover.text())
        self.assertIn(f"the running process ended during the command: {ALICE} may have logged in since", mover.text())

    def test_command_reports_a_hung_process(self):
        os.kill(self.proxy.process.child.pid, signal.SIGSTOP)
        self.assertIn("does not respond within 15s", self.command("status", code=70))

    def test_login_is_logged_immediately(self):
        """A login is in the log even if the process is killed before the session ends."""
        alice, bob = session(self.port), session(self.port, BOB)
        ids = {one["user"]: one["session"] for one in self.sessions()}
        bob.command("z", "LOGOUT")
        bob.close()
        ended = wait_for("the end of the session of bob", lambda: [line for line in self.lines("session ended") if BOB in line])
        self.proxy.process.kill()
        lines = {user: [line for line in self.lines("logged in") if f'user="{user}"' in line] for user in (ALICE, BOB)}
        self.assertEqual([len(lines[ALICE]), len(lines[BOB]), len(ended)], [1, 1, 1], self.proxy.log())
        self.assertEqual([line for line in self.lines("session ended") if ALICE in line], [])
        self.assertIn(f'session="{ids[BOB]}"', ended[0])
        for user, server, backend in ((ALICE, self.a, "shard-a"), (BOB, self.b, "shard-b")):
            for field in ("vestibule::session: logged in", f'session="{ids[user]}"', "client=127.0.0.1:", f"listener=127.0.0.1:{self.port}",
                          'mechanism="login"', 'route="table"', f'backend="{backend}"', f'server="127.0.0.1:{server.port}"',
                          f"address=127.0.0.1:{server.port}", "route_ms=", "connect_ms=", "server_login_ms=", "login_ms="):
                self.assertIn(field, lines[user][0])
            self.assertNotIn("outcome=", lines[user][0])
        alice.close()

    def test_server_state_has_reason_user_and_time(self):
        name = f"127.0.0.1:{self.a.port}"
        self.command("drain", f"shard-a/{name}", "--reason", "new disks")
        self.assertIn("unknown server", self.command("drain", f"shard-b/{name}", code=1))
        shown = self.servers()[name]
        self.assertEqual((shown["state"], shown["set"]["state"], shown["set"]["reason"]), ("drain", "drain", "new disks"))
        self.assertRegex(shown["set"]["by"], r"^(\S+ \(as )?root\)?$")
        self.assertRegex(shown["set"]["since"], r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
        self.assertRegex(self.command("status"), rf"server       shard-a {name}: drain, healthy, 0 sessions; set by .*root.* at 20\S*Z: new disks\n")
        self.assertIn("no control characters", self.command("drain", name, "--reason", "\x1b[2J", code=1))
        self.command("server", name, "as-configured")
        self.assertNotIn("set", self.servers()[name])

    def test_move_with_a_failed_command_readmits_the_user(self):
        self.assertIn("are accepted again", self.command("move", ALICE, "shard-a", "--while", "exit 3", code=1))
        self.assertTrue(responds(session(self.port)))

    def test_control_socket_refuses_other_users(self):
        control = self.folder.path / "control"
        self.assertEqual(control.stat().st_mode & 0o777, 0o600)
        command = [program("setpriv"), "--reuid", "nobody", "--clear-groups", VESTIBULE, "status", "--control", control]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        self.assertEqual(done.returncode, 77)
        self.assertIn("may be opened by root and by the user that the process runs as, only", done.stderr)
        with socket.socket(socket.AF_UNIX) as junk:
            junk.connect(str(control))
            junk.sendall(b"\x00\x01 what\r\n\r\n")
            junk.settimeout(TIMEOUT)
            junk.recv(4096)
        self.assertIn("server", self.command("status"))


class LoginLoop(threading.Thread):
    """Connects, logs in, sends a command and logs out in a loop; collects errors."""

    def __init__(self, port, user):
        super().__init__(daemon=True)
        self.port, self.user, self.count, self.errors, self.stop = port, user, 0, [], threading.Event()

    def run(self):
        while not self.stop.is_set():
            try:
                client = session(self.port, self.user)
                assert responds(client)
                client.command("z", "LOGOUT")
                client.close()
                self.count += 1
            except Exception as error:  # noqa: BLE001: any error fails the test
                self.errors.append(repr(error))


class Upgrades(OperatorTestCase):
    def test_upgrades_refuse_no_connection(self):
        """Ten upgrades and ten starts with --replace during continuous logins and open sessions."""
        lasting_sessions = [session(self.port, user) for user in (ALICE, BOB) for _ in range(5)]
        loops = [LoginLoop(self.port, user) for user in (ALICE, BOB) for _ in range(2)]
        for loop in loops:
            loop.start()
        pid = self.proxy.process.child.pid
        direct_starts = []
        for turn in range(20):
            if turn % 2:
                self.command("upgrade")
            else:
                direct_starts.append(Process([VESTIBULE, "run", "--replace", "--config", self.proxy.file], self.folder.path / f"log-{turn}"))
                self.addCleanup(direct_starts[-1].kill)

            def succeeded():
                done = subprocess.run([VESTIBULE, "status", "--json", "--control", self.folder.path / "control"], capture_output=True, text=True,
                                      timeout=TIMEOUT)
                now = json.loads(done.stdout)["pid"] if done.returncode == 0 else pid
                return now if now != pid else None
            pid = wait_for(f"successor {turn}", succeeded)
            count = sum(loop.count for loop in loops)
            wait_for("more logins", lambda: sum(loop.count for loop in loops) >= count + 8 or any(loop.errors for loop in loops))
        for loop in loops:
            loop.stop.set()
            loop.join(TIMEOUT)
        self.assertEqual([loop.errors for loop in loops], [[]] * 4)
        self.assertTrue(all(map(responds, lasting_sessions)), "sessions of the first process continue")
        self.assertIsNone(self.proxy.process.child.poll())
        for client in lasting_sessions:
            client.close()
        self.assertEqual(self.proxy.process.child.wait(TIMEOUT), 0, "the first process ends with its last session")
        # The last process serves all ports, including metrics.
        self.assertEqual(self.proxy.metric("vestibule_draining"), 0)
        os.kill(pid, signal.SIGTERM)
        wait_for("the last process to end", lambda: not answers(self.port))
        for process in direct_starts:
            self.assertEqual(process.child.wait(TIMEOUT), 0, process.text())

    def test_successor_that_cannot_start_changes_nothing(self):
        client = session(self.port)
        done = subprocess.run([VESTIBULE, "run", "--config", self.proxy.file], capture_output=True, text=True, timeout=TIMEOUT)
        self.assertEqual(done.returncode, 70)
        self.assertIn("replace it with --replace", done.stderr)
        text = self.proxy.file.read_text()
        self.proxy.file.write_text(text + "log: {level: shout}\n")
        self.assertIn("log.level: unknown value: expected", self.command("upgrade", code=1))
        wait_for("the successor to end", lambda: "the successor has ended; this process continues" in self.proxy.log())
        self.assertTrue(responds(client) and responds(session(self.port)))


class Predecessors(OperatorTestCase):
    """Commands also apply to replaced processes that still serve sessions."""

    configuration = CONFIGURATION.replace("drain: 1m", "drain: 1m, server_login: 2s")

    def test_sessions_of_predecessors_are_listed_and_ended(self):
        first = self.status()["pid"]
        alice, bob = [session(self.port)], session(self.port, BOB)
        second = self.upgrade()
        alice.append(session(self.port))
        third = self.upgrade()
        alice.append(session(self.port))
        shown = {(one["user"], one.get("predecessor")) for one in self.sessions()}
        self.assertEqual(shown, {(ALICE, first), (BOB, first), (ALICE, second), (ALICE, None)})
        self.assertEqual(len(self.sessions(ALICE)), 3)
        status = self.status()
        self.assertEqual({one["pid"]: one["sessions"] for one in status["predecessors"]}, {first: 2, second: 1})
        self.assertEqual((status["pid"], status["sessions"]), (third, 4))
        name_a, name_b = f"127.0.0.1:{self.a.port}", f"127.0.0.1:{self.b.port}"
        self.assertEqual((self.servers()[name_a]["sessions"], self.servers()[name_b]["sessions"]), (3, 1))
        self.assertIn(f"predecessor  {first} ", self.command("status"))
        self.assertIn("3 sessions ended", self.command("kick", ALICE))
        self.assertEqual([client.line() for client in alice], [b""] * 3)
        self.assertTrue(responds(bob))
        wait_for("the second process to end", lambda: [one["pid"] for one in self.status()["predecessors"]] == [first])
        self.assertIn("no session is left", self.command("drain", name_b, "--over", "1s"))
        self.assertEqual(bob.line(), b"")
        wait_for("the first process to end", lambda: self.status()["predecessors"] == [])
        self.assertEqual(sorted(path.name for path in self.folder.path.glob("control*")), ["control", f"control.{third}"])

    def test_move_covers_predecessors(self):
        old, waiting = session(self.port), RawClient(self.port)
        waiting.line()
        self.upgrade()
        new = session(self.port)
        self.folder.write("users.txt", f"{ALICE} shard-b\n{BOB} shard-b\n")
        self.assertIn("2 sessions ended, now routed to shard-b", self.command("move", ALICE, "shard-b"))
        self.assertEqual((old.line(), new.line()), (b"", b""))
        # The predecessor refuses a login of the moved user, even though its own routes are those from before the move.
        self.assertRegex(waiting.command("a", LOGIN[ALICE])[-1], rb"^a NO \[UNAVAILABLE\]")
        again = session(self.port)
        self.assertEqual([one["backend"] for one in self.sessions(ALICE)], ["shard-b"])
        self.assertTrue(responds(again))

    def test_hung_predecessor_is_reported(self):
        first = self.status()["pid"]
        old = session(self.port)
        self.upgrade()
        os.kill(first, signal.SIGSTOP)
        problem = f"the predecessor with process id {first} could not be queried: no response within (5|10)s"
        self.folder.write("users.txt", f"{ALICE} shard-b\n{BOB} shard-b\n")
        for words, code in ((("status",), 0), (("sessions",), 0), (("kick", ALICE), 1), (("move", ALICE, "shard-b"), 1),
                            (("drain", f"127.0.0.1:{self.a.port}"), 1)):
            self.assertRegex(self.command(*words, code=code), problem)
        os.kill(first, signal.SIGCONT)
        self.assertIn("now routed to shard-b", self.command("move", ALICE, "shard-b"))
        self.assertEqual(old.line(), b"")

    def test_killed_predecessor_is_forgotten(self):
        first = self.status()["pid"]
        old = session(self.port)
        self.upgrade()
        os.kill(first, signal.SIGKILL)
        self.proxy.process.child.wait(TIMEOUT)
        self.assertEqual(old.line(), b"")
        self.assertIn("0 sessions ended", self.command("kick", ALICE))
        self.assertFalse((self.folder.path / f"control.{first}").exists())

    def test_drain_continues_in_a_predecessor(self):
        name = f"127.0.0.1:{self.a.port}"
        sessions = [session(self.port) for _ in range(6)]
        drain = Process([VESTIBULE, "drain", name, "--over", "3s", "--control", self.folder.path / "control"], self.folder.path / "drain")
        self.addCleanup(drain.kill)
        wait_for("the drain", lambda: "6 sessions there" in drain.text())
        self.upgrade()
        self.assertEqual(drain.child.wait(TIMEOUT), 0, drain.text())
        self.assertIn("no session is left", drain.text())
        for client in sessions:
            client.socket.setblocking(False)
            # The session has ended already: the read does not block.
            self.assertEqual(client.socket.recv(1), b"")
        self.assertEqual(self.servers()[name]["state"], "drain")

    def test_control_socket_of_another_user_is_ignored(self):
        """Its process could read which sessions are kicked, and prevent every move from completing."""
        self.folder.path.chmod(0o777)
        path = self.folder.path / "control.1"
        listen = "$s = IO::Socket::UNIX->new(Local => $ARGV[0], Listen => 5) or die; chmod(0666, $ARGV[0]); sleep"
        other_user = Process([program("setpriv"), "--reuid", "nobody", "--clear-groups", program("perl"), "-MIO::Socket::UNIX", "-e", listen, path],
                           self.folder.path / "other_user")
        self.addCleanup(other_user.kill)
        wait_for("the socket of the other user", path.exists)
        self.assertIn("0 sessions ended", self.command("kick", ALICE))
        self.assertIn("now routed to shard-a", self.command("move", ALICE, "shard-a"))
        self.assertIn("control socket of another user ignored", self.proxy.log())

    def test_upgrade_is_refused_during_a_move(self):
        go = self.folder.path / "go"
        mover = Process([VESTIBULE, "move", ALICE, "shard-a", "--while", f"while [ ! -e {go} ]; do sleep 0.05; done",
                         "--control", self.folder.path / "control"], self.folder.path / "mover")
        self.addCleanup(mover.kill)
        wait_for("the login hold", lambda: "new logins wait" in mover.text())
        before = self.status()["pid"]
        successor = Process([VESTIBULE, "run", "--replace", "--config", self.proxy.file], self.folder.path / "successor")
        self.addCleanup(successor.kill)
        self.assertNotEqual(successor.child.wait(TIMEOUT), 0)
        self.assertIn("a user is being moved: try again when that is done", successor.text())
        self.assertEqual(self.status()["pid"], before)
        go.touch()
        self.assertEqual(mover.child.wait(TIMEOUT), 0, mover.text())

    def test_server_states_survive_upgrades(self):
        name_a, name_b = f"127.0.0.1:{self.a.port}", f"127.0.0.1:{self.b.port}"
        self.command("drain", name_a, "--reason", "new disks")
        self.command("server", name_b, "down")
        before = self.servers()
        self.upgrade()
        self.upgrade()
        after = self.servers()
        self.assertEqual((after[name_a]["state"], after[name_b]["state"]), ("drain", "down"))
        self.assertEqual((after[name_a]["set"], after[name_b]["set"]), (before[name_a]["set"], before[name_b]["set"]))
        client = RawClient(self.port)
        client.line()
        self.assertRegex(client.command("a", LOGIN[ALICE])[-1], rb"^a NO \[UNAVAILABLE\]")
        self.command("server", name_a, "as-configured")
        self.upgrade()
        self.assertEqual(self.servers()[name_a]["state"], "up")

    def test_server_state_set_during_an_upgrade_is_kept(self):
        """A state that a command has confirmed is kept, even if the confirming process is being replaced."""
        name, done, stop = f"127.0.0.1:{self.a.port}", [0], threading.Event()

        def change():
            for number in itertools.count(1):
                if stop.is_set():
                    return
                words = ["server", name, "drain", "--reason", str(number), "--control", self.folder.path / "control"]
                if subprocess.run([VESTIBULE, *words], capture_output=True, timeout=TIMEOUT).returncode == 0:
                    done.append(number)
        changing = threading.Thread(target=change)
        changing.start()
        try:
            for _ in range(6):
                before = len(done)
                wait_for("a state change", lambda: len(done) > before)
                self.upgrade()
                confirmed = done[-1]
                self.assertGreaterEqual(int(self.servers()[name]["set"]["reason"]), confirmed)
        finally:
            stop.set()
            changing.join(TIMEOUT)
        self.assertGreaterEqual(int(self.servers()[name]["set"]["reason"]), done[-1])


class Startup(unittest.TestCase):
    def setUp(self):
        self.folder = Folder()
        self.addCleanup(self.folder.remove)

    def configuration(self, port, more=""):
        return self.folder.write("vestibule.yaml", f"""
listeners: [{{address: "127.0.0.1:{port}", tls: none}}]
backends: {{a: {{servers: ["127.0.0.1:1"], check: off}}}}
routes: [{{default: a}}]
{more}""")

    def test_systemd_socket_activation(self):
        """The connection that triggers the activation is served."""
        port = free_port()
        process = Process([program("systemd-socket-activate"), "-l", f"127.0.0.1:{port}", VESTIBULE, "run", "--config", self.configuration(port)],
                          self.folder.path / "log")
        self.addCleanup(process.kill)
        client = wait_for("the socket", lambda: connect(port))
        self.assertTrue(RawClient.line(client).startswith(b"* OK"), process.text())

    def test_root_privileges_are_dropped(self):
        port = free_port()
        process = Process([VESTIBULE, "run", "--config", self.configuration(port, "run_as: {user: nobody, group: nogroup}")],
                          self.folder.path / "log")
        self.addCleanup(process.kill)
        wait_for("the proxy", lambda: answers(port, b"* OK"))
        for task in Path(f"/proc/{process.child.pid}/task").iterdir():
            status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
            ids = {name: set(status[name].split()) for name in ("Uid", "Gid")}
            uid, gid = str(pwd.getpwnam("nobody").pw_uid), str(grp.getgrnam("nogroup").gr_gid)
            self.assertEqual(ids, {"Uid": {uid}, "Gid": {gid}}, "real, effective, saved and file system id of every thread")
            self.assertEqual(int(status["CapEff"], 16), 0)
        limits = Path(f"/proc/{process.child.pid}/limits").read_text()
        self.assertRegex(limits, r"Max core file size +0 +0")
        # The files in /proc of a process that is not dumpable belong to root.
        self.assertEqual(Path(f"/proc/{process.child.pid}/maps").stat().st_uid, 0)
        done = subprocess.run([VESTIBULE, "run", "--config", self.configuration(free_port(), "run_as: {user: no-such-user}")], capture_output=True,
                              text=True, timeout=TIMEOUT)
        self.assertEqual(done.returncode, 78)
        self.assertIn("run_as.user: unknown user \"no-such-user\"", done.stderr)


def connect(port):
    try:
        return RawClient(port)
    except OSError:
        return None


if __name__ == "__main__":
    unittest.main()
