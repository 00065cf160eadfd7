"""The Debian package, installed in a container with systemd: the service runs with the sandboxing of its unit."""

import json
import os
import re
import subprocess
import unittest

from fixtures import REPOSITORY, TIMEOUT, VESTIBULE, Certificates, Folder, Process, program, wait_for
from systemd_container import SystemdContainer

CONFIGURATION = """
listeners:
  - {{address: "[::]:993", tls: implicit}}
  - {{address: "[::]:143", tls: starttls}}
tls: {{certificates: [{{cert: {tls}/fullchain.pem, key: {tls}/privkey.pem}}]}}
backends: {{mail: {{servers: ["{server}"]}}}}
routes: [{{default: mail}}]
admin: {{address: "127.0.0.1:9143"{control}}}
limits: {{sessions: 1000}}
"""
CONTROL = ", control: /run/vestibule/control"
FILE = "/etc/vestibule/vestibule.yaml"
CREDENTIALS = "/run/credentials/vestibule.service"


def build_package(folder):
    stripped = folder.path / "vestibule"
    subprocess.run([program("strip"), "-o", stripped, VESTIBULE], check=True, timeout=TIMEOUT)
    # No compression, to build faster.
    environment = {**os.environ, "DEB_BUILD_OPTIONS": "noautodbgsym", "DPKG_DEB_COMPRESSOR_TYPE": "none"}
    done = subprocess.run([REPOSITORY / "deploy/build-deb", stripped, folder.path], capture_output=True, text=True,
                          env=environment, timeout=4 * TIMEOUT)
    assert done.returncode == 0, done.stderr
    return next(folder.path.glob("vestibule_*.deb"))


class SystemdUnit(unittest.TestCase):
    def test_stop_timeout_is_longer_than_the_drain(self):
        """TimeoutStopSec is longer than the default drain and the ready_delay recommended behind a load balancer."""
        unit = (REPOSITORY / "deploy/vestibule.service").read_text()
        drain = re.search(r"drain: (\d+)s ", (REPOSITORY / "config/reference.yaml").read_text())
        delay = re.search(r"(\d+) s behind a balancer", unit)
        stop = re.search(r"(?m)^TimeoutStopSec=(\d+)s$", unit)
        self.assertGreater(int(stop[1]), int(drain[1]) + int(delay[1]) + 10)


class Session:
    """An open session of alice with openssl s_client."""

    def __init__(self, test):
        self.test = test
        command = test.machine.inside("openssl", "s_client", "-quiet", "-connect", "localhost:993", "-CAfile", "/root/ca.pem")
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        test.addCleanup(self.close)
        test.assertTrue(self.child.stdout.readline().startswith(b"* OK"))
        self.command(b"a LOGIN alice@example.org wonderland")

    def command(self, text):
        self.child.stdin.write(text + b"\r\n")
        self.child.stdin.flush()
        tag = text.split()[0]
        while not (line := self.child.stdout.readline()).startswith(tag):
            self.test.assertNotEqual(line, b"", "the session has ended")
        self.test.assertTrue(line.startswith(tag + b" OK"), line)

    def check_alive(self):
        self.command(b"n NOOP")

    def close(self):
        self.child.kill()
        self.child.wait()
        for stream in (self.child.stdin, self.child.stdout):
            try:
                stream.close()
            except OSError:
                pass


class InstalledPackage(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        cls.certificates = Certificates(cls.folder)
        cls.package = build_package(cls.folder)

    def setUp(self):
        self.machine = SystemdContainer(self.package)
        self.addCleanup(self.machine.close)
        self.machine.run("dpkg", "--install", "/root/package.deb")
        self.machine.write("/root/ca.pem", self.certificates.ca.read_text())

    def install_certificate(self, folder, mode, group):
        self.machine.run("mkdir", "-p", folder)
        self.machine.write(f"{folder}/fullchain.pem", self.certificates.cert.read_text())
        self.machine.write(f"{folder}/privkey.pem", self.certificates.key.read_text())
        self.machine.run("chmod", mode, f"{folder}/privkey.pem")
        self.machine.run("chgrp", group, f"{folder}/privkey.pem")

    def mailbox_server(self):
        """Starts the demo in the container; returns the address of its server with the mailbox of alice."""
        output = self.machine.folder.path / "demo"
        ports = [word for name in ("tls", "starttls", "admin") for word in (f"--{name}-port", "0")]
        demo = Process(self.machine.inside("/usr/bin/vestibule", "demo", "--folder", "/root/demo", *ports), output)
        self.addCleanup(demo.kill)
        return wait_for("the demo", lambda: re.search(r"shard-a \((\S+)\)", demo.text()))[1]

    def property(self, name):
        return self.machine.run("systemctl", "show", "--value", f"--property={name}", "vestibule").strip()

    def read_mail(self, url, *options):
        return self.machine.run("curl", "--silent", "--show-error", "--cacert", "/root/ca.pem",
                                "--user", "alice@example.org:wonderland", *options, f"{url}/INBOX;UID=1")

    def health(self):
        """The exit code of the health check of the container image."""
        text = (REPOSITORY / "deploy/Dockerfile").read_text()
        command = json.loads(re.search(r"(?s)HEALTHCHECK.*?CMD (\[.*?\])\n", text)[1])
        return subprocess.run(self.machine.inside(*command), stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT).returncode

    def test_package_installs_serves_upgrades_and_purges(self):
        machine = self.machine
        self.assertEqual(machine.run("systemctl", "is-enabled", "vestibule", check=False).strip(), "disabled")
        self.assertEqual(self.property("ActiveState"), "inactive", "the service is not started without a configuration")
        self.assertEqual(machine.run("stat", "-c", "%A %U %G", "/etc/vestibule/tls").strip(), "drwxr-x--- root vestibule")

        self.install_certificate("/etc/vestibule/tls", "640", "vestibule")
        configuration = CONFIGURATION.format(tls="/etc/vestibule/tls", server=self.mailbox_server(), control=CONTROL)
        machine.write(FILE, configuration)
        machine.run("runuser", "-u", "vestibule", "--", "/usr/bin/vestibule", "check", "--config", FILE)
        machine.run("systemctl", "enable", "--now", "vestibule", check=False)
        self.assertEqual(self.property("ActiveState"), "active", machine.journal())

        self.assertIn("X-Served-By: shard-a", self.read_mail("imaps://localhost"))
        self.assertIn("X-Served-By: shard-a", self.read_mail("imap://localhost", "--ssl-reqd"))
        metrics = machine.run("curl", "--silent", "http://127.0.0.1:9143/metrics")
        self.assertRegex(metrics, r'vestibule_logins_total\{backend="mail",mechanism="[\w-]+",outcome="accepted"\} 2\n')
        for name in ("process_start_time_seconds", "process_open_fds", "process_resident_memory_bytes"):
            self.assertRegex(metrics, rf"(?m)^{name} [1-9]", "readable despite the sandboxing")
        self.assert_confined()
        self.assertEqual(self.health(), 0)
        self.assertNotRegex(machine.journal(), "WARN|ERROR")

        self.reload_reports_its_outcome(configuration)
        self.upgrades_end_no_session(configuration)
        machine.run("systemctl", "stop", "vestibule")
        self.assertEqual((self.property("Result"), self.property("ExecMainStatus")), ("success", "0"), machine.journal())
        self.assertNotEqual(self.health(), 0)
        machine.run("dpkg", "--purge", "vestibule")
        self.assertEqual(machine.run("ls", "/etc/vestibule").split(), ["tls"], "purging the package keeps the key")

    def reload_reports_its_outcome(self, configuration):
        machine = self.machine
        machine.run("systemctl", "reload", "vestibule")
        machine.write(FILE, configuration.replace("default: mail", "default: male"))
        self.assertIn("failed", machine.run("systemctl", "reload", "vestibule", check=False))
        self.assertEqual((self.property("ActiveState"), self.property("ReloadResult")), ("active", "exit-code"))
        wait_for("the reason in the journal", lambda: 'unknown backend "male"' in machine.journal())
        machine.write(FILE, configuration)
        machine.run("systemctl", "reload", "vestibule")

    def upgrades_end_no_session(self, configuration):
        machine = self.machine
        session = Session(self)
        before = self.property("MainPID")
        output = machine.run("dpkg", "--install", "/root/package.deb")
        self.assertIn(f"serves; pid {before}", output)
        after = self.property("MainPID")
        self.assertNotEqual(after, before, "systemd monitors the new process")
        self.assertEqual(self.property("ActiveState"), "active")
        self.assertIn("X-Served-By: shard-a", self.read_mail("imaps://localhost"))
        session.check_alive()
        self.assert_confined()

        # A new version that cannot start leaves the old process running, and the output names the reason.
        machine.write(FILE, configuration.replace("default: mail", "default: male"))
        output = machine.run("dpkg", "--install", "/root/package.deb")
        self.assertIn('unknown backend "male"', output)
        self.assertIn("was not replaced and goes on serving", output)
        self.assertEqual((self.property("ActiveState"), self.property("MainPID")), ("active", after))
        session.check_alive()
        machine.write(FILE, configuration)
        machine.run("vestibule", "upgrade")
        self.assertNotEqual(self.property("MainPID"), after)
        session.check_alive()
        session.command(b"z LOGOUT")
        wait_for("the first process to end", lambda: not machine.run("ls", "-d", f"/proc/{before}", check=False).startswith("/proc"))
        self.assertEqual(self.property("ActiveState"), "active", "the service stays active when the replaced process ends")
        self.assertEqual(self.property("NRestarts"), "0")
        self.assertNotIn("not our child", machine.journal(), "systemd can wait only for its own children when it stops the service")

    def assert_confined(self):
        process = f"/proc/{self.property('MainPID')}"
        status = dict(re.findall(r"(?m)^(\w+):\s+(.*)$", self.machine.run("cat", f"{process}/status")))
        user = self.machine.run("id", "-u", "vestibule").strip()
        self.assertEqual(status["Uid"].split(), [user] * 4)
        net_bind_service = f"{1 << 10:016x}"
        self.assertEqual([status[name] for name in ("CapEff", "CapBnd", "CapAmb")], [net_bind_service] * 3)
        self.assertEqual((status["NoNewPrivs"], status["Seccomp"]), ("1", "2"))
        limits = self.machine.run("cat", f"{process}/limits")
        self.assertRegex(limits, r"Max core file size +0 +0 ")
        # In a container, the limit of systemd itself may be lower; the service then gets that limit.
        wanted = int(self.property("LimitNOFILE"))
        of_systemd = re.search(r"Max open files +\d+ +(\d+)", self.machine.run("cat", "/proc/1/limits"))[1]
        self.assertGreaterEqual(wanted, 2 * 100_000 + 256, "enough for the default of limits.sessions")
        self.assertRegex(limits, rf"Max open files +({wanted} +{wanted}|{of_systemd} +{of_systemd}) ")

    def test_root_only_key_is_passed_as_a_credential(self):
        self.install_certificate("/etc/letsencrypt/live/imap.example.org", "600", "root")
        self.machine.run("chmod", "700", "/etc/letsencrypt/live")
        drop_in = (REPOSITORY / "deploy/tls-credential.conf").read_text()
        self.assertIn(f"key: {CREDENTIALS}/privkey.pem", drop_in)
        self.machine.run("mkdir", "/etc/systemd/system/vestibule.service.d")
        self.machine.write("/etc/systemd/system/vestibule.service.d/tls-credential.conf", drop_in)
        self.machine.write(FILE, CONFIGURATION.format(tls=CREDENTIALS, server=self.mailbox_server(), control=""))
        self.machine.run("systemctl", "daemon-reload")
        self.machine.run("systemctl", "start", "vestibule", check=False)
        self.assertEqual(self.property("ActiveState"), "active", self.machine.journal())
        self.assertIn("X-Served-By: shard-a", self.read_mail("imaps://localhost"))
        # Without admin.control a reload is a signal, and the package cannot replace the process: it keeps running.
        self.machine.run("systemctl", "reload", "vestibule")
        wait_for("the reload", lambda: "configuration loaded" in self.machine.journal())
        pid = self.property("MainPID")
        output = self.machine.run("dpkg", "--install", "/root/package.deb")
        self.assertIn("set admin.control: /run/vestibule/control", output)
        self.assertEqual((self.property("ActiveState"), self.property("MainPID")), ("active", pid))

    def test_removing_the_package_stops_the_service(self):
        self.install_certificate("/etc/vestibule/tls", "640", "vestibule")
        self.machine.write(FILE, CONFIGURATION.format(tls="/etc/vestibule/tls", server="127.0.0.1:1", control=CONTROL))
        self.machine.run("systemctl", "enable", "--now", "vestibule", check=False)
        self.assertEqual(self.property("ActiveState"), "active", self.machine.journal())
        self.machine.run("dpkg", "--remove", "vestibule")
        self.assertNotEqual(self.property("ActiveState"), "active")

    def test_invalid_configuration_does_not_start(self):
        self.machine.write(FILE, "listeners: [{address: nowhere}]\n")
        self.machine.run("systemctl", "start", "vestibule", check=False)
        self.assertNotEqual(self.property("ActiveState"), "active")
        self.assertIn("status=78", self.property("ExecStartPre"))
        wait_for("the reason in the journal", lambda: "vestibule.yaml:1:" in self.machine.journal())


if __name__ == "__main__":
    unittest.main()
