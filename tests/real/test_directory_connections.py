"""Connections to directories: silent ones, and those of a replaced configuration."""

import concurrent.futures
import re
import signal
import subprocess
import unittest

import directory_servers
import test_directories
from fixtures import PASSWORDS, free_port, program, wait_for
from http_service import HttpService
from tcp_peers import Relay
from test_directories import ALICE, BOB, DirectoryFixture, LoginClient
from test_http_routes import BASE, Nginx

LOOKUP_TIMEOUT = "6s"


class ConnectionTests(DirectoryFixture):
    """Tests with a relay between the proxy and the directory, to which the route of the directory points."""

    # Number of connections that four concurrent lookups use.
    expected_connections = 4

    @classmethod
    def rows(cls):
        return {ALICE: {"backend": "shard-a"}, BOB: {"backend": "shard-b"}}

    def setUp(self):
        self.relays = [self.start_relay(self.directory.port)]
        # `route()` reads the port from the directory, so it is that of the relay for the call.
        self.directory_port = self.directory.port
        self.directory.port = self.relays[0].port
        self.exempt = []
        try:
            self.relayed_route = self.route()
        finally:
            self.directory.port = self.directory_port
        self.route = lambda: self.relayed_route

    def start_relay(self, port):
        relay = Relay(port)
        self.addCleanup(relay.close)
        return relay

    def accepted(self):
        return sum(relay.accepted for relay in self.relays)

    def open_connections(self):
        return sum(relay.open_connections() for relay in self.relays)

    def relayed_connections(self):
        return [connection for relay in self.relays for connection in relay.connections if connection not in self.exempt]

    def go_silent(self):
        for relay in self.relays:
            relay.go_silent(but=self.exempt)

    def log_in(self, proxy, user=ALICE):
        """Logs in and keeps the session open."""
        client = LoginClient(proxy)
        self.assertRegex(client.login(user, PASSWORDS[user]), "^a OK", proxy.log())
        return client

    def use_all_connections(self, proxy, count=4):
        """Runs enough concurrent lookups to use all connections."""
        clients, before = [LoginClient(proxy) for _ in range(count)], self.accepted()
        self.directory.pause()
        try:
            for client in clients:
                client.raw.send(f'a LOGIN {ALICE} "{PASSWORDS[ALICE]}"\r\n'.encode())
            wait_for("the connections of the lookups", lambda: self.accepted() >= before + self.expected_connections)
        finally:
            self.directory.resume()
        for client in clients:
            self.assertRegex(client.raw.until(b"a ")[-1], b"^a OK", proxy.log())

    def reload(self, proxy):
        before = proxy.metric("vestibule_reloads_total", outcome="loaded")
        proxy.process.child.send_signal(signal.SIGHUP)
        wait_for("the reload", lambda: proxy.metric("vestibule_reloads_total", outcome="loaded") == before + 1)

    def test_silent_connections_fail_no_login(self):
        proxy = self.proxy(timeout=LOOKUP_TIMEOUT)
        self.use_all_connections(proxy)
        for _ in range(2):
            self.go_silent()
            accepted, silent = self.accepted(), self.relayed_connections()
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                clients = [LoginClient(proxy) for _ in range(4)]
                answers = list(pool.map(lambda client: client.login(ALICE, PASSWORDS[ALICE]), clients))
            for answer in answers:
                self.assertRegex(answer, "^a OK", proxy.log())
            self.assertGreater(self.accepted(), accepted)
            # The silent connections are closed, so that later lookups do not use them.
            wait_for("the silent connections to close", lambda: all(connection.is_closed_by_client for connection in silent))
            accepted = self.accepted()
            for _ in range(6):
                self.log_in(proxy)
            self.assertEqual(self.accepted(), accepted)
        self.assertEqual(proxy.metric("vestibule_route_lookups_total", result="failed"), 0, proxy.log())
        self.assertEqual(proxy.metric("vestibule_route_failing"), 0)

    def test_idle_connections_use_keepalive(self):
        proxy = self.proxy(timeout=LOOKUP_TIMEOUT)
        self.log_in(proxy)
        for relay in self.relays:
            if any(connection not in self.exempt and not connection.is_closed_by_client for connection in relay.connections):
                found = subprocess.run([program("ss"), "-Htnpo", "dport", "=", f":{relay.port}"], capture_output=True, text=True)
                own = [line for line in found.stdout.splitlines() if f"pid={proxy.process.child.pid}," in line]
                self.assertTrue(own, found.stdout)
                for line in own:
                    self.assertIn("timer:(keepalive", line)

    def test_reload_keeps_connections_unless_the_secret_changes(self):
        proxy = self.proxy(timeout=LOOKUP_TIMEOUT)
        sessions = [self.log_in(proxy)]
        accepted, text = self.accepted(), proxy.file.read_text()
        for round in range(10):
            proxy.file.write_text(text.replace("failed_logins: 1000", f"failed_logins: {100 + round}"))
            self.reload(proxy)
            sessions.append(self.log_in(proxy))
        self.assertEqual(self.accepted(), accepted, "no lookup opened another connection")
        secret = proxy.folder.path / "password"
        if "password_file" in text:
            # The content of the file changes, the password does not.
            secret.write_text(secret.read_text() + "\n")
        else:
            proxy.file.write_text(text.replace(f"timeout: {LOOKUP_TIMEOUT}", "timeout: 7s"))
        before = self.relayed_connections()
        self.reload(proxy)
        wait_for("the old connections to close", lambda: all(connection.is_closed_by_client for connection in before))
        sessions.append(self.log_in(proxy))
        self.assertGreater(self.accepted(), accepted)
        for session in sessions:
            self.assertRegex(session.raw.command("n", "NOOP")[-1], b"^n OK")


class PostgreSqlConnections(ConnectionTests, test_directories.PostgreSql):
    """`load_tests` leaves out the inherited tests of test_directories.py."""

    # The database library cannot set keepalive.
    test_idle_connections_use_keepalive = None

    def test_repeated_reloads_stay_within_max_connections(self):
        self.directory.sql("ALTER ROLE vestibule CONNECTION LIMIT 10")
        self.addCleanup(self.directory.sql, "ALTER ROLE vestibule CONNECTION LIMIT -1")
        proxy = self.proxy(timeout=LOOKUP_TIMEOUT, connections=8)
        text, sessions = proxy.file.read_text(), []
        for round in range(10):
            # Every reload changes the query, so that it cannot use the connections of the previous configuration.
            proxy.file.write_text(re.sub("SELECT .* WHERE", f"SELECT *, {round} AS n FROM mailbox WHERE", text))
            self.reload(proxy)
            sessions.append(self.log_in(proxy))
        wait_for("the old connections to close", lambda: self.open_connections() == 1)

    def test_timed_out_lookups_leave_a_limited_number_of_queries(self):
        """PostgreSQL does not notice that a client has closed its connection while a query waits for a lock."""
        proxy = self.proxy(timeout="1s", connections=2)
        self.log_in(proxy)
        lock = self.directory.locked()
        self.addCleanup(lock.wait)
        self.addCleanup(lock.stdin.close)
        for _ in range(5):
            clients = [LoginClient(proxy) for _ in range(2)]
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                for answer in pool.map(lambda client: client.login(ALICE, PASSWORDS[ALICE]), clients):
                    self.assertRegex(answer, r"^a NO \[UNAVAILABLE\]")
            self.assertLessEqual(self.directory.connections(), 4)
        lock.stdin.close()
        wait_for("the table", lambda: LoginClient(proxy).login(ALICE, PASSWORDS[ALICE]).startswith("a OK"))
        wait_for("the abandoned queries to end", lambda: self.directory.connections() <= 2)

    def test_slow_answer_closes_no_other_connection(self):
        sleep = f"pg_sleep(CASE WHEN %{{user}} = '{BOB}' THEN 4 ELSE 0 END)"
        self.relayed_route[-1] = f"query: SELECT mailbox.* FROM mailbox, {sleep} WHERE name = %{{user}}"
        proxy = self.proxy(timeout=LOOKUP_TIMEOUT)
        self.use_all_connections(proxy)
        before = self.relayed_connections()
        self.assertEqual(self.open_connections(), 4)
        # The lookup is repeated on another connection after 3 s.
        self.log_in(proxy, BOB)
        self.assertEqual(self.accepted(), 5)
        self.assertFalse(any(connection.is_closed_by_client for connection in before))

    def test_altered_table_fails_no_login(self):
        """The cached plans of prepared statements become invalid."""
        proxy = self.proxy(timeout=LOOKUP_TIMEOUT)
        self.log_in(proxy)
        self.directory.sql("ALTER TABLE mailbox ADD COLUMN extra text")
        self.addCleanup(self.directory.sql, "ALTER TABLE mailbox DROP COLUMN extra")
        self.log_in(proxy)
        self.directory.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'vestibule'")
        self.log_in(proxy)
        self.assertEqual(proxy.metric("vestibule_route_lookups_total", result="failed"), 0, proxy.log())


class MariaDbConnections(ConnectionTests, test_directories.MariaDb):
    test_idle_connections_use_keepalive = None


class OpenLdapConnections(ConnectionTests, test_directories.OpenLdap):
    pass


class RedisConnections(ConnectionTests, test_directories.Redis):
    expected_connections = 1


class SentinelConnections(ConnectionTests, test_directories.Redis):
    """The Sentinel connects to the master through the same relay; its own connections are not silenced."""
    expected_connections = 1

    def setUp(self):
        super().setUp()
        master = self.start_relay(self.directory.port)
        named = type("Master", (), {"port": master.port, "PASSWORD": self.directory.PASSWORD})
        sentinel = directory_servers.Sentinel(named)
        self.addCleanup(sentinel.close)
        wait_for("the Sentinel", lambda: "flags\nmaster\n" in sentinel.command("SENTINEL", "MASTER", "mail"))
        wait_for("the connections of the Sentinel", lambda: master.accepted >= 2)
        self.exempt = list(master.connections)
        self.relays = [master, self.start_relay(sentinel.port)]
        self.relayed_route = ["redis", f'sentinels: ["redis://localhost:{self.relays[1].port}"]', "master: mail",
                         "password_file: password", 'key: "mailbox:%{user}"']


class ClusterConnections(ConnectionTests, test_directories.Redis):
    expected_connections = 1

    def setUp(self):
        super().setUp()
        nodes, self.relays = [], []
        for _ in range(3):
            port = free_port()
            self.relays.append(self.start_relay(port))
            settings = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port", str(free_port()),
                        "--cluster-announce-port", str(self.relays[-1].port)]
            nodes.append(directory_servers.Redis(extra=settings, port=port))
            self.addCleanup(nodes[-1].close)
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        made = nodes[0].command("--cluster", "create", *addresses, "--cluster-yes")
        self.assertIn("All 16384 slots covered", made)
        wait_for("the cluster", lambda: all("cluster_state:ok" in node.command("CLUSTER", "INFO") for node in nodes))
        for user, fields in self.rows().items():
            self.assertEqual(nodes[0].command("-c", "SET", f"mailbox:{user}", directory_servers.text(fields)).splitlines()[-1], "OK")
        urls = ", ".join(f'"redis://127.0.0.1:{relay.port}"' for relay in self.relays[:2])
        self.relayed_route = ["redis", f"cluster: [{urls}]", "password_file: password", 'key: "mailbox:%{user}"']


class HttpConnections(ConnectionTests, unittest.TestCase):
    @classmethod
    def make(cls):
        return HttpService()

    def route(self):
        return ["http", f"url: http://localhost:{self.directory.port}/where"]


class Http2Connections(HttpConnections):
    expected_connections = 1

    def setUp(self):
        super().setUp()
        nginx = Nginx(BASE + f"""
            events {{}}
            http {{
              access_log off;
              server {{
                listen 127.0.0.1:PORT ssl http2;
                ssl_certificate {self.certificates.cert};
                ssl_certificate_key {self.certificates.key};
                location / {{ proxy_pass http://127.0.0.1:{self.directory_port}; }}
              }}
            }}""")
        self.addCleanup(nginx.close)
        self.relays = [self.start_relay(nginx.port)]
        self.relayed_route = ["http", f"url: https://localhost:{self.relays[0].port}/", f"ca: {self.certificates.ca}"]


def load_tests(loader, _tests, _pattern):
    """Selects the tests of this file: the classes of test_directories.py contribute tests that run there."""
    suite = unittest.TestSuite()
    for case in (PostgreSqlConnections, MariaDbConnections, OpenLdapConnections, RedisConnections, SentinelConnections,
                 ClusterConnections, HttpConnections, Http2Connections):
        names = [name for name in loader.getTestCaseNames(case) if name in dir(ConnectionTests) or name in vars(case)]
        suite.addTests(case(name) for name in names)
    return suite


if __name__ == "__main__":
    unittest.main()
