"""IMAPClient's test suite for servers (livetest), run with each server directly and through the proxy.

Every test that passes directly must pass through the proxy. Courier is left out, because it does not let a session create a
mailbox again after deleting it, as every test of the suite does.
"""

import os
import re
import subprocess
import sys
import unittest
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from fixtures import CACHE, PASSWORDS, TIMEOUT, Certificates, Cyrus, Dovecot, Folder, tls_proxy

USER = "alice@example.org"
LIBRARY = CACHE / "python"
# TestSocketTimeout is left out: it tests timeouts of the client, and its outcome depends on timing.
CLASSES = ["TestGeneral", "TestWithUIDs", "TestWithoutUIDs"]


def run_suite(folder, name, port, ca=None):
    """Runs the suite with a port of localhost, over TLS if `ca` is given; returns the result of every test by name, and the log."""
    assert (LIBRARY / "imapclient/livetest.py").exists(), "IMAPClient is not unpacked: run tests/run"
    options = f"ssl = true\nssl_ca_file = {ca}" if ca else "ssl = false"
    configuration = folder.write(f"{name}.ini", f"""[DEFAULT]
host = localhost
port = {port}
username = {USER}
password = {PASSWORDS[USER]}
{options}
""")
    done = subprocess.run([sys.executable, "-m", "imapclient.livetest", configuration, "-v", *CLASSES], capture_output=True, text=True,
                          timeout=6 * TIMEOUT, env={**os.environ, "PYTHONPATH": str(LIBRARY), "PYTHONDONTWRITEBYTECODE": "1"})
    results, test, seen = {}, None, Counter()
    for line in done.stderr.split("\n=====")[0].splitlines():
        begun = re.match(r"(test_\w+) \(", line)
        # A test that fails and then fails to clean up has two consecutive lines.
        if begun and test != f"{begun[1]} {seen[begun[1]]}":
            # The classes with and without UIDs have tests of the same names, in the same order.
            seen[begun[1]] += 1
            test = f"{begun[1]} {seen[begun[1]]}"
        if ended := re.search(r"(?:^|\.\.\. )(ok$|FAIL$|ERROR$|skipped )", line):
            results[test] = ended[1].strip()
    ran = re.search(r"^Ran (\d+) tests", done.stderr, re.M)
    assert ran and int(ran[1]) == len(results), f"{name}: {len(results)} results read\n{done.stderr}"
    return results, done.stderr


class ImapClientSuite(unittest.TestCase):
    """Starts two new servers per test, because two runs of the suite must not share a mailbox."""

    def setUp(self):
        self.folder = Folder()
        self.addCleanup(self.folder.remove)
        self.certificates = Certificates(self.folder)

    def start(self, server):
        self.addCleanup(server.close)
        return server

    def proxy(self, server, tls):
        proxy = tls_proxy(server, self.certificates, tls)
        self.addCleanup(proxy.close)
        return proxy

    def assert_passes_through_the_proxy(self, make, least_passed, tls="none"):
        direct, proxied = self.start(make()), self.start(make())
        proxy = self.proxy(proxied, tls)
        with ThreadPoolExecutor() as pool:
            running = [pool.submit(run_suite, self.folder, "direct", direct.port),
                       pool.submit(run_suite, self.folder, "proxied", proxy.ports["tls"], self.certificates.ca)]
            (expected, _), (got, output) = (each.result() for each in running)
        passed = {name for name, result in expected.items() if result == "ok"}
        self.assertGreaterEqual(len(passed), least_passed, expected)
        self.assertEqual(got, {**got, **{name: "ok" for name in passed}}, output)
        self.assertGreater(proxy.metric("vestibule_logins_total", outcome="accepted"), 3, "number of logins through the proxy")

    def test_suite_passes_with_dovecot(self):
        self.assert_passes_through_the_proxy(lambda: Dovecot(self.certificates), 45,
                                        f"{{mode: starttls, ca: {self.certificates.ca}}}")

    def test_suite_passes_with_cyrus(self):
        self.assert_passes_through_the_proxy(Cyrus, 40)


if __name__ == "__main__":
    unittest.main()
