"""The Debian package, installed on a machine of its own: the service really runs in the confinement of its unit."""

import json
import os
import re
import subprocess
import unittest

from fixtures import PATIENCE, REPOSITORY, VESTIBULE, Certificates, Folder, Process, program, wait_for
from machine import Machine

CONFIGURATION = """
listeners:
  - {{address: "[::]:993", tls: implicit}}
  - {{address: "[::]:143", tls: starttls}}
tls: {{certificates: [{{cert: {tls}/fullchain.pem, key: {tls}/privkey.pem}}]}}
backends: {{mail: {{servers: ["{server}"]}}}}
routes: [{{default: mail}}]
admin: {{address: "127.0.0.1:9143"}}
limits: {{sessions: 1000}}
"""
FILE = "/etc/vestibule/vestibule.yaml"
CREDENTIALS = "/run/credentials/vestibule.service"


def build_package(folder):
    stripped = folder.path / "vestibule"
    subprocess.run([program("strip"), "-o", stripped, VESTIBULE], check=True, timeout=PATIENCE)
    # Fast instead of small.
    environment = {**os.environ, "DEB_BUILD_OPTIONS": "noautodbgsym", "DPKG_DEB_COMPRESSOR_TYPE": "none"}
    done = subprocess.run([REPOSITORY / "deploy/build-deb", stripped, folder.path], capture_output=True, text=True,
                          env=environment, timeout=4 * PATIENCE)
    assert done.returncode == 0, done.stderr
    return next(folder.path.glob("vestibule_*.deb"))


class Unit(unittest.TestCase):
    def test_a_stop_may_take_longer_than_the_drain(self):
        drain = re.search(r"drain: (\d+)s ", (REPOSITORY / "config/reference.yaml").read_text())
        stop = re.search(r"(?m)^TimeoutStopSec=(\d+)s$", (REPOSITORY / "deploy/vestibule.service").read_text())
        self.assertGreater(int(stop[1]), int(drain[1]) + 10)


class Installed(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        cls.certificates = Certificates(cls.folder)
        cls.package = build_package(cls.folder)

    def setUp(self):
        self.machine = Machine(self.package)
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
        """The demo's server that has alice's mail, on this machine's loopback."""
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
        """What the container image's health check says of this service."""
        text = (REPOSITORY / "deploy/Dockerfile").read_text()
        command = json.loads(re.search(r"(?s)HEALTHCHECK.*?CMD (\[.*?\])\n", text)[1])
        return subprocess.run(self.machine.inside(*command), stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE).returncode

    def test_it_serves_upgrades_stops_and_goes(self):
        machine = self.machine
        self.assertEqual(machine.run("systemctl", "is-enabled", "vestibule", check=False).strip(), "disabled")
        self.assertEqual(self.property("ActiveState"), "inactive", "there is nothing to serve yet")
        self.assertEqual(machine.run("stat", "-c", "%A %U %G", "/etc/vestibule/tls").strip(), "drwxr-x--- root vestibule")

        self.install_certificate("/etc/vestibule/tls", "640", "vestibule")
        machine.write(FILE, CONFIGURATION.format(tls="/etc/vestibule/tls", server=self.mailbox_server()))
        machine.run("runuser", "-u", "vestibule", "--", "/usr/bin/vestibule", "check", "--config", FILE)
        machine.run("systemctl", "enable", "--now", "vestibule", check=False)
        self.assertEqual(self.property("ActiveState"), "active", machine.journal())

        self.assertIn("X-Served-By: shard-a", self.read_mail("imaps://localhost"))
        self.assertIn("X-Served-By: shard-a", self.read_mail("imap://localhost", "--ssl-reqd"))
        metrics = machine.run("curl", "--silent", "http://127.0.0.1:9143/metrics")
        self.assertRegex(metrics, r'vestibule_logins_total\{backend="mail",mechanism="[\w-]+",outcome="accepted"\} 2\n')
        for name in ("process_start_time_seconds", "process_open_fds", "process_resident_memory_bytes"):
            self.assertRegex(metrics, rf"(?m)^{name} [1-9]", "the confinement leaves it readable")
        self.is_confined()
        self.assertEqual(self.health(), 0)
        self.assertNotRegex(machine.journal(), "WARN|ERROR")

        before = self.property("MainPID")
        machine.run("dpkg", "--install", "/root/package.deb")
        self.assertEqual(self.property("ActiveState"), "active")
        self.assertNotEqual(self.property("MainPID"), before, "an upgrade restarts it")
        self.assertIn("X-Served-By: shard-a", self.read_mail("imaps://localhost"))

        machine.run("systemctl", "stop", "vestibule")
        self.assertEqual((self.property("Result"), self.property("ExecMainStatus")), ("success", "0"))
        self.assertNotEqual(self.health(), 0)
        machine.run("dpkg", "--purge", "vestibule")
        self.assertEqual(machine.run("ls", "/etc/vestibule").split(), ["tls"], "the key is not the package's to remove")

    def is_confined(self):
        process = f"/proc/{self.property('MainPID')}"
        status = dict(re.findall(r"(?m)^(\w+):\s+(.*)$", self.machine.run("cat", f"{process}/status")))
        user = self.machine.run("id", "-u", "vestibule").strip()
        self.assertEqual(status["Uid"].split(), [user] * 4)
        net_bind_service = f"{1 << 10:016x}"
        self.assertEqual([status[name] for name in ("CapEff", "CapBnd", "CapAmb")], [net_bind_service] * 3)
        self.assertEqual((status["NoNewPrivs"], status["Seccomp"]), ("1", "2"))
        limits = self.machine.run("cat", f"{process}/limits")
        self.assertRegex(limits, r"Max core file size +0 +0 ")
        # Inside a container systemd itself may not be allowed that many: it takes what it can get.
        wanted = int(self.property("LimitNOFILE"))
        of_systemd = re.search(r"Max open files +\d+ +(\d+)", self.machine.run("cat", "/proc/1/limits"))[1]
        self.assertGreaterEqual(wanted, 2 * 100_000 + 256, "enough for limits.sessions as it is by default")
        self.assertRegex(limits, rf"Max open files +({wanted} +{wanted}|{of_systemd} +{of_systemd}) ")

    def test_a_key_for_root_alone_goes_by_credential(self):
        self.install_certificate("/etc/letsencrypt/live/imap.example.org", "600", "root")
        self.machine.run("chmod", "700", "/etc/letsencrypt/live")
        drop_in = (REPOSITORY / "deploy/tls-credential.conf").read_text()
        self.assertIn(f"key: {CREDENTIALS}/privkey.pem", drop_in)
        self.machine.run("mkdir", "/etc/systemd/system/vestibule.service.d")
        self.machine.write("/etc/systemd/system/vestibule.service.d/tls-credential.conf", drop_in)
        self.machine.write(FILE, CONFIGURATION.format(tls=CREDENTIALS, server=self.mailbox_server()))
        self.machine.run("systemctl", "daemon-reload")
        self.machine.run("systemctl", "start", "vestibule", check=False)
        self.assertEqual(self.property("ActiveState"), "active", self.machine.journal())
        self.assertIn("X-Served-By: shard-a", self.read_mail("imaps://localhost"))

    def test_a_wrong_configuration_does_not_start(self):
        self.machine.write(FILE, "listeners: [{address: nowhere}]\n")
        self.machine.run("systemctl", "start", "vestibule", check=False)
        self.assertNotEqual(self.property("ActiveState"), "active")
        self.assertIn("status=78", self.property("ExecStartPre"))
        wait_for("the reason in the journal", lambda: "vestibule.yaml:1:" in self.machine.journal())


if __name__ == "__main__":
    unittest.main()
