"""The alert rules, and the dashboard with a real Prometheus that scrapes the proxy."""

import json
import re
import subprocess
import time
import unittest
import urllib.parse
import urllib.request

import directory_servers
from fixtures import REPOSITORY, TIMEOUT, Certificates, Dovecot, Folder, Process, Proxy, free_port, program, wait_for
from imap_client import RawClient, connect, message

DASHBOARDS = REPOSITORY / "dashboards"
# Values of Grafana's variables; $__rate_interval covers at least four scrapes.
VARIABLES = {"$__rate_interval": "10s", "$datasource": "", "$job": ".*", "$listener": ".*", "$backend": ".*"}


def panels():
    board = json.loads((DASHBOARDS / "vestibule.json").read_text())
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions():
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def metrics_in_source():
    source = (REPOSITORY / "src/metrics/families.rs").read_text()
    return set(re.findall(r'"(vestibule_\w+)"', source))


def metrics_in(text):
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"vestibule_\w+", text)}


class DashboardFiles(unittest.TestCase):
    def test_alert_rules_pass_their_unit_tests(self):
        for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
            done = subprocess.run([program("promtool"), *command], cwd=DASHBOARDS, capture_output=True, text=True, timeout=TIMEOUT)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_every_alert_has_unit_tests(self):
        alerts = set(re.findall(r"- alert: (\w+)", (DASHBOARDS / "alerts.yaml").read_text()))
        cases = (DASHBOARDS / "alerts_test.yaml").read_text()
        self.assertGreater(len(alerts), 10)
        for alert in alerts:
            self.assertIn(f"alertname: {alert}, exp_alerts: []", cases, "a case in which it does not fire")
            self.assertIn(f"alertname: {alert}\n        exp_alerts:\n          - ", cases, "a case in which it fires")

    def test_dashboard_and_alerts_use_existing_metrics(self):
        known = metrics_in_source()
        self.assertGreater(len(known), 20)
        shown = set().union(*(metrics_in(expression) for _, expression in expressions()))
        self.assertEqual(shown, known, "every metric is on the dashboard, and every metric on the dashboard exists")
        alerts = re.findall(r"(?s)expr: (.*?)\n        (?:for|labels):", (DASHBOARDS / "alerts.yaml").read_text())
        self.assertLessEqual(set().union(*map(metrics_in, alerts)), known)

    def test_every_panel_has_a_description_and_a_unit(self):
        for panel in panels():
            self.assertTrue(panel["description"], panel["title"])
            self.assertTrue(panel["fieldConfig"]["defaults"]["unit"], panel["title"])


class Dashboard(unittest.TestCase):
    """Runs the query of every panel after traffic of every kind."""

    def setUp(self):
        self.folder = Folder()
        self.addCleanup(self.folder.remove)
        certificates = Certificates(self.folder)
        server = Dovecot(certificates)
        self.addCleanup(server.close)
        directory = directory_servers.Sqlite()
        self.addCleanup(directory.close)
        self.folder.write("users.txt", "alice@example.org good\nbob@example.net dead\n")
        self.proxy = Proxy(f"""
listeners:
  - {{address: "127.0.0.1:{{tls}}", tls: implicit}}
  - {{address: "127.0.0.1:{{plain}}", tls: none}}
tls: {{certificates: [{{cert: {certificates.cert}, key: {certificates.key}}}]}}
backends:
  good: {{servers: ["127.0.0.1:{server.port}"], check: {{interval: 1s}}}}
  encrypted: {{servers: ["localhost:{server.tls_port}"], tls: {{mode: implicit, ca: {certificates.ca}}}}}
  dead: {{servers: ["127.0.0.1:{free_port()}"]}}
routes:
  - table: users.txt
  - sql: {{url: "sqlite://{directory.file}", query: "SELECT backend FROM mailbox WHERE name = %{{user}}"}}
admin: {{address: "127.0.0.1:{{admin}}"}}
""", self.folder)
        self.addCleanup(self.proxy.close)
        self.certificates = certificates
        self.port = free_port()
        configuration = self.folder.write("prometheus.yml", f"""
global: {{scrape_interval: 500ms, scrape_timeout: 500ms}}
scrape_configs:
  - job_name: vestibule
    static_configs: [{{targets: ["127.0.0.1:{self.proxy.ports['admin']}"]}}]
""")
        prometheus = Process([program("prometheus"), f"--config.file={configuration}", f"--storage.tsdb.path={self.folder.path}/tsdb",
                              f"--web.listen-address=127.0.0.1:{self.port}"], self.folder.path / "prometheus.log")
        self.addCleanup(prometheus.kill)
        wait_for("Prometheus", self.prometheus_is_ready)

    def prometheus_is_ready(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=TIMEOUT) as answer:
                return answer.status == 200
        except OSError:
            return False

    def traffic(self):
        client = connect(self.proxy, self.certificates)
        client.login("alice@example.org", "wonderland")
        client.append("INBOX", None, None, message("metrics"))
        client.logout()
        raw = RawClient(self.proxy.ports["plain"])
        raw.line()
        raw.command("a", "LOGIN alice@example.org wrong")
        raw.command("b", "LOGIN bob@example.net builder")
        # A new name each time, so that the cache has no answer for it.
        raw.command("c", f"LOGIN unknown{time.monotonic_ns()}@nowhere.test x")
        raw.close()

    def query(self, expression):
        for name, value in VARIABLES.items():
            expression = expression.replace("${" + name[1:] + "}", value).replace(name, value)
        url = f"http://127.0.0.1:{self.port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            return [sample for sample in json.load(answer)["data"]["result"] if sample["value"][1] != "NaN"]

    def test_every_panel_query_returns_samples(self):
        checked = 0
        # Rates need two scrapes that differ, so traffic continues while the test waits.
        for title, expression in expressions():
            # Remove the fallback to zero, which would make the result of any query non-empty.
            expression = expression.removesuffix(" or vector(0)")

            def has_samples():
                result = self.query(expression)
                if not result:
                    self.traffic()
                return result
            try:
                wait_for("a sample", has_samples)
            except AssertionError:
                self.fail(f"{title}: no result of {expression}")
            checked += 1
        self.assertGreater(checked, 30)


if __name__ == "__main__":
    unittest.main()
