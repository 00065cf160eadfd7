"""Ownership of the control socket: run_as, files of other users at its path, and concurrent starts."""

import grp
import os
import pwd
import socket
import stat
import subprocess
import unittest
from pathlib import Path

from fixtures import TIMEOUT, VESTIBULE, answers, free_port, wait_for
from handover_fixtures import HandoverTestCase, Predecessor, processes_listening_on, wait_for_exit


class OtherUser(HandoverTestCase):
    """Processes and files of other users."""

    NOBODY = ("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups")
    RUN_AS = "run_as: {user: nobody, group: nogroup}"

    def chown(self, path, user="nobody", group="nogroup"):
        os.chown(path, pwd.getpwnam(user).pw_uid, grp.getgrnam(group).gr_gid)

    def assert_runs_as_nobody(self, pid):
        status = Path(f"/proc/{pid}/status").read_text()
        uid = pwd.getpwnam("nobody").pw_uid
        self.assertRegex(status, rf"Uid:\s+{uid}\s+{uid}\s+{uid}\s+{uid}\n")
        self.assertRegex(status, r"CapEff:\s+0+\n")
        # The files in /proc of a process that is not dumpable belong to root.
        self.assertEqual(Path(f"/proc/{pid}/maps").stat().st_uid, 0)

    def test_unprivileged_process_is_upgraded(self):
        self.chown(self.control.parent)
        self.write(more=self.RUN_AS)
        first = self.start()
        self.assert_runs_as_nobody(first.child.pid)
        found = self.control.stat()
        self.assertEqual((found.st_uid, stat.S_IMODE(found.st_mode)), (pwd.getpwnam("nobody").pw_uid, 0o600))
        # The command is run by root, and by the user of the process.
        for before in ((), self.NOBODY):
            pid = self.pid()
            done = self.command("upgrade", before=before)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertNotEqual(self.pid(), pid)
            self.assert_runs_as_nobody(self.pid())
        # The successor is started directly, by root and by the user.
        for before in ((), self.NOBODY, ()):
            process = self.start("--replace", before=before)
            self.assert_runs_as_nobody(process.child.pid)
            wait_for("the predecessors to end", lambda: processes_listening_on(self.port) == {process.child.pid})
            self.assertTrue(answers(self.port, b"* OK"))
        # Other users are refused.
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
            self.assertIn("requires root or CAP_NET_BIND_SERVICE: restart", self.upgrade(1))
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
                                     (self.control.mkdir, 70, "is a directory, not a socket"),
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
        """In a folder like /tmp another user may create the socket first."""
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
        wait_for("the remaining process", lambda: self.pid() == one.child.pid)
        self.assertEqual(self.control_files(), ["socket", f"socket.{one.child.pid}"])
        for process in processes:
            if process is not one:
                self.assertEqual(process.child.returncode, 70)
                self.assertIn("replace it with --replace", process.text())

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


if __name__ == "__main__":
    unittest.main()
