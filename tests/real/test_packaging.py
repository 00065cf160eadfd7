"""Packaging: the systemd unit, the Debian package and the Dockerfile."""

import os
import re
import subprocess
import unittest

from fixtures import REPOSITORY, TIMEOUT, VESTIBULE, Folder, program


def run(*command, **options):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=4 * TIMEOUT, **options)


class Packaging(unittest.TestCase):
    def setUp(self):
        self.folder = Folder()
        self.addCleanup(self.folder.remove)

    def test_systemd_unit_is_valid_and_hardened(self):
        text = (REPOSITORY / "deploy/vestibule.service").read_text()
        # Neither the program nor the documentation is installed on the test machine.
        text = re.sub(r"^Documentation=.*$", "", text, flags=re.M).replace("/usr/bin/vestibule", str(VESTIBULE))
        unit = self.folder.write("vestibule.service", text)
        done = run(program("systemd-analyze"), "verify", unit)
        self.assertEqual((done.returncode, done.stderr.strip()), (0, ""), done.stderr)
        done = run(program("systemd-analyze"), "security", "--offline=yes", "--threshold=20", unit)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        for setting in ("Type=notify", "User=vestibule", "ExecStartPre=/usr/bin/vestibule check", "LimitCORE=0", "NoNewPrivileges=yes"):
            self.assertIn(setting, (REPOSITORY / "deploy/vestibule.service").read_text())

    def test_debian_package_contains_all_files(self):
        # Strip the program first: packing debug information takes a minute.
        stripped = self.folder.path / "vestibule"
        self.assertEqual(run("strip", "-o", stripped, VESTIBULE).returncode, 0)
        done = run(REPOSITORY / "deploy/build-deb", stripped, self.folder.path, 
                   env={**os.environ, "DEB_BUILD_OPTIONS": "noautodbgsym"})
        self.assertEqual(done.returncode, 0, done.stderr)
        package = next(self.folder.path.glob("vestibule_*.deb"))
        listed = run("dpkg-deb", "-c", package).stdout
        for path in ("./usr/bin/vestibule", "./lib/systemd/system/vestibule.service", "./etc/vestibule/vestibule.yaml",
                     "./usr/lib/sysusers.d/vestibule.conf", "./usr/lib/tmpfiles.d/vestibule.conf",
                     "./usr/share/vestibule/grafana/vestibule.json"):
            self.assertRegex(listed, re.escape(path) + r"\n", listed)
        self.assertIn("/etc/vestibule/vestibule.yaml", run("dpkg-deb", "-I", package, "conffiles").stdout)
        unpacked = self.folder.path / "unpacked"
        self.assertEqual(run("dpkg-deb", "-x", package, unpacked).returncode, 0)
        self.assertIn("vestibule", run(unpacked / "usr/bin/vestibule", "--version").stdout)
        done = run(program("lintian"), "--allow-root", "--fail-on", "error", package, env={**os.environ, "LC_ALL": "C"})
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_dockerfile_copies_existing_files(self):
        text = (REPOSITORY / "deploy/Dockerfile").read_text()
        sources = [source for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M) for source in line.split()[:-1]]
        self.assertGreaterEqual(len(sources), 4)
        # Everything else is ignored, so that the build stage gets only what it needs.
        sent = (REPOSITORY / "deploy/Dockerfile.dockerignore").read_text().splitlines()
        for source in sources:
            self.assertTrue((REPOSITORY / source).exists(), source)
        # The build stage must contain the files named in Cargo.toml, or cargo fails.
        for path in re.findall(r'^path = "(.*)"', (REPOSITORY / "Cargo.toml").read_text(), re.M):
            self.assertTrue(any(path.startswith(source) for source in sources), path)
        self.assertRegex(text, r"(?m)^USER \d+:\d+$")


if __name__ == "__main__":
    unittest.main()
