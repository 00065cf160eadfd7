"""Routes that query real directories, with two Dovecot shards: known and unknown users, refusals, hostile names, and
directories that stop, hang, or have fewer connections than there are logins."""

import concurrent.futures
import threading
import time
import unittest

import directory_servers
from fixtures import PASSWORDS, TIMEOUT, Certificates, Dovecot, Folder, Proxy, free_port, wait_for
from imap_client import RawClient

ALICE, BOB, CAROL = "alice@example.org", "bob@example.net", "carol@example.org"
# Names that would match a user if they were interpreted as a query or a pattern.
HOSTILE = ["' OR '1'='1", "x') OR ('1'='1", '" OR ""="', "alice@example.org'--", "*", "alice*", "*)(mail=*", "(|(mail=*))",
           "a\\2a", "alice@example.org\\", "%{user}", "%%", "mailbox:alice", "..", "a..b@example.org", "@", "@example.org",
           "*)(|(uid=*", "*))(|(uid=*", "x)(&", "{", "{0}", "${user}", "%", "%s%n", "%u", "'; SELECT pg_sleep(9);--", "\\' OR 1=1 --",
           "\"", "\\", "\\2a", "\\00", "*3", "$7", " ", "  alice", "a b", "alice@example.org alice@example.org", "alice\t", "alice@example.org ", " alice@example.org", "alic\u00e9@example.org",
           "\u202ealice@example.org", "zo\u00eb@example.org", "alice\u00a0@example.org", "a" * 500,
           "x server=y", "a b=c",
           "u2@a.test server=OTHER@x", "alice@example.org user=bob", "$1@example.org", "\"q\"@example.org"]
# Existing users with unusual names.
UNUSUAL = ["o'brien\"@example.org", "a(b)*c\\d@example.org", "100%{user}%@example.org", "x'; drop table mailbox; --@example.org",
       "zo\u00eb\u4e2d@example.org", "two words@example.org", "$1 ${shard} {}@example.org", "cn=x,dc=test+y@example.org"]
TEMPLATE = """
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none}}]
backends:
  shard-a: {{servers: ["127.0.0.1:{a}"]}}
  shard-b: {{servers: ["127.0.0.1:{b}"]}}
routes:
{route}
limits: {{drain: 1s, failed_logins: 1000, bad_commands: 1000}}
admin: {{address: "127.0.0.1:{{admin}}"}}
"""


class LoginClient:
    """A connection for many login attempts."""

    def __init__(self, proxy):
        self.raw = RawClient(proxy.ports["plain"])
        self.raw.until(b"* OK")

    def login(self, user, password="wrong"):
        """The tagged response to LOGIN. It sends literals, because names may contain any bytes."""
        user, password = user.encode(), password.encode()
        return self.raw.command("a", b"LOGIN {%d+}\r\n%s {%d+}\r\n%s" % (len(user), user, len(password), password))[-1].decode()


class DirectoryFixture:
    """Base class with two shards for all tests and a proxy per test; subclasses provide the directory and its route."""

    directory = None
    unusual_names = UNUSUAL

    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        cls.certificates = Certificates(cls.folder)
        cls.a, cls.b = Dovecot(cls.certificates), Dovecot(cls.certificates)
        cls.addClassCleanup(cls.a.close)
        cls.addClassCleanup(cls.b.close)
        cls.directory = cls.make()
        cls.addClassCleanup(cls.directory.close)
        for user, fields in cls.rows().items():
            cls.directory.add_user(user, **fields)

    @classmethod
    def rows(cls):
        return {
            ALICE: {"backend": "shard-a"},
            BOB: {"backend": "shard-b", "server": f"127.0.0.1:{cls.b.port}"},
            "alias@example.org": {"backend": "shard-b", "user": CAROL},
            "closed@example.org": {"refuse": "The account was closed."},
            "moving@example.org": {"maintenance": "Your mailbox moves."},
            "lost@example.org": {"backend": "shard-x"},
            **{user: {"refuse": f"Unusual {number}."} for number, user in enumerate(cls.unusual_names)},
        }

    def proxy(self, more="cache: off", timeout="1s", connections=4):
        lines = self.route() + [f"timeout: {timeout}", f"connections: {connections}", more]
        kind, *keys = lines
        route = f"  - {kind}:\n" + "\n".join(f"      {key}" for key in keys)
        text = TEMPLATE.format(a=self.a.port, b=self.b.port, route=route)
        folder = Folder()
        self.addCleanup(folder.remove)
        folder.write("password", getattr(self.directory, "PASSWORD", "none") + "\n", 0o600)
        proxy = Proxy(text, folder)
        self.addCleanup(proxy.close)
        return proxy

    def assert_login(self, proxy, user=ALICE, backend="shard-a"):
        before = proxy.metric("vestibule_backend_sessions_total", backend=backend)
        answer = LoginClient(proxy).login(user, PASSWORDS.get(user, PASSWORDS[CAROL]))
        self.assertRegex(answer, "^a OK", proxy.log())
        # The session is counted when the relay starts, which may be after the response to the client.
        wait_for("the session", lambda: proxy.metric("vestibule_backend_sessions_total", backend=backend) == before + 1)

    def assert_refused(self, proxy, user, start):
        answer = LoginClient(proxy).login(user, "wrong")
        self.assertTrue(answer.startswith("a " + start), f"{user}: {answer}\n{proxy.log()}")


class DirectoryTests(DirectoryFixture):
    """Tests of every directory."""

    def test_users_are_routed_to_their_shards(self):
        proxy = self.proxy()
        self.assert_login(proxy)
        self.assert_login(proxy, BOB, "shard-b")
        self.assert_login(proxy, "alias@example.org", "shard-b")
        self.assert_refused(proxy, "closed@example.org", "NO [CONTACTADMIN] The account was closed.")
        self.assert_refused(proxy, "moving@example.org", "NO [UNAVAILABLE] Your mailbox moves.")
        self.assert_refused(proxy, "unknown@example.org", "NO [AUTHENTICATIONFAILED]")
        self.assert_refused(proxy, "lost@example.org", "NO [UNAVAILABLE]")
        self.assertIn("shard-x", proxy.log())
        self.assertNotIn(getattr(self.directory, "PASSWORD", "no password"), proxy.log())

    def test_hostile_names_match_no_user(self):
        proxy = self.proxy()
        client = LoginClient(proxy)
        for name in HOSTILE:
            self.assertRegex(client.login(name), r"^a (NO \[AUTHENTICATIONFAILED\]|BAD)", f"{name!r}\n{proxy.log()}")
        # A literal cannot contain NUL (BAD); the others are valid literals of invalid names (NO, RFC 9051 section 6.2.3).
        for control, answer in (("alice@example.org\r\n", "NO"), ("alice\0", "BAD"), ("\n", "NO")):
            self.assertRegex(client.login(control), f"^a {answer}", repr(control))
        # Names that are not UTF-8 or too long.
        for name in (b"\xff\xfe@example.org", b"alice\xc3@example.org", b"\xed\xa0\x80", b"a" * 513, b"'" * 4000):
            answer = client.raw.command("a", b"LOGIN {%d+}\r\n%s x" % (len(name), name))[-1]
            self.assertRegex(answer, rb"^a (NO \[AUTHENTICATIONFAILED\]|BAD)", name[:20])
        self.assertEqual(proxy.metric("vestibule_route_lookups_total", result="failed"), 0, proxy.log())
        self.assertEqual(proxy.metric("vestibule_route_lookups_total", result="found"), 0)
        self.assert_login(proxy)

    def test_unusual_names_are_found(self):
        proxy = self.proxy()
        client = LoginClient(proxy)
        for number, user in enumerate(self.unusual_names):
            self.assertEqual(client.login(user), f"a NO [CONTACTADMIN] Unusual {number}.", f"{user!r}\n{proxy.log()}")

    def test_slow_directory_delays_the_login(self):
        proxy = self.proxy(timeout="20s")
        self.assert_login(proxy)
        client = LoginClient(proxy)
        self.directory.pause()
        try:
            client.raw.send(f'a LOGIN {ALICE} "{PASSWORDS[ALICE]}"\r\n'.encode())
            client.raw.socket.settimeout(1)
            with self.assertRaises(TimeoutError):
                client.raw.line()
        finally:
            self.directory.resume()
        client.raw.socket.settimeout(TIMEOUT)
        self.assertRegex(client.raw.until(b"a ")[-1], b"^a OK", proxy.log())
        self.assertEqual(proxy.metric("vestibule_route_lookups_total", result="failed"), 0)

    def test_hung_connections_fail_lookups_within_the_timeout(self):
        proxy = self.proxy(connections=2, timeout="1s")
        self.assert_login(proxy)
        self.directory.pause()
        try:
            began = time.monotonic()
            clients = [LoginClient(proxy) for _ in range(12)]
            with concurrent.futures.ThreadPoolExecutor(12) as pool:
                results = list(pool.map(lambda client: client.login(ALICE, PASSWORDS[ALICE]), clients))
            for result in results:
                self.assertRegex(result, r"^a NO \[UNAVAILABLE\]")
            # Lookups that wait for a connection use the same timeout.
            self.assertLess(time.monotonic() - began, 10)
            self.assertIn("for a free connection", proxy.log())
        finally:
            self.directory.resume()
        wait_for("the directory", lambda: LoginClient(proxy).login(ALICE, PASSWORDS[ALICE]).startswith("a OK"))

    def test_lookups_wait_for_a_free_connection(self):
        proxy = self.proxy(connections=1, timeout="20s")
        clients = [LoginClient(proxy) for _ in range(30)]
        with concurrent.futures.ThreadPoolExecutor(30) as pool:
            results = list(pool.map(lambda client: client.login(ALICE, PASSWORDS[ALICE]), clients))
        for result in results:
            self.assertRegex(result, "^a OK", proxy.log())

    def test_hung_directory_fails_the_lookup(self):
        proxy = self.proxy()
        self.assert_login(proxy)
        self.directory.pause()
        try:
            began = time.monotonic()
            self.assert_refused(proxy, ALICE, "NO [UNAVAILABLE]")
            self.assertGreater(time.monotonic() - began, 0.5)
            self.assertEqual(proxy.metric("vestibule_route_failing"), 1)
        finally:
            self.directory.resume()
        wait_for("the directory", lambda: LoginClient(proxy).login(ALICE, PASSWORDS[ALICE]).startswith("a OK"))
        self.assertEqual(proxy.metric("vestibule_route_failing"), 0)

    def test_cached_answers_are_used_while_the_directory_hangs(self):
        proxy = self.proxy("cache: {ttl: 1s, negative: 1s}")
        self.assert_login(proxy)
        self.assert_refused(proxy, "unknown@example.org", "NO [AUTHENTICATIONFAILED]")
        self.directory.pause()
        try:
            # Until the answer expires, it counts as fresh.
            wait_for("a stale answer", lambda: LoginClient(proxy).login(ALICE, PASSWORDS[ALICE]).startswith("a OK")
                     and proxy.metric("vestibule_route_cache_total", state="stale") > 0)
            self.assert_refused(proxy, BOB, "NO [UNAVAILABLE]")
            # The answer that a user is unknown is not used after it has expired.
            wait_for("the end of the negative answer",
                     lambda: LoginClient(proxy).login("unknown@example.org").startswith("a NO [UNAVAILABLE]"))
        finally:
            self.directory.resume()
        wait_for("the directory", lambda: LoginClient(proxy).login(BOB, PASSWORDS[BOB]).startswith("a OK"))


class ServerDirectoryTests(DirectoryTests):
    """Tests of every directory that is a server process."""

    def test_stopped_directory_fails_lookups_until_it_returns(self):
        proxy = self.proxy()
        self.assert_login(proxy)
        self.directory.kill()
        self.assert_refused(proxy, ALICE, "NO [UNAVAILABLE]")
        self.assert_refused(proxy, "unknown@example.org", "NO [UNAVAILABLE]")
        self.directory.start()
        wait_for("the directory", lambda: LoginClient(proxy).login(ALICE, PASSWORDS[ALICE]).startswith("a OK"))
        self.assert_refused(proxy, "unknown@example.org", "NO [AUTHENTICATIONFAILED]")

    def test_directory_that_stops_during_a_lookup_fails_it(self):
        proxy = self.proxy(timeout="3s")
        self.assert_login(proxy)
        self.directory.pause()
        client = LoginClient(proxy)
        client.raw.send(f'a LOGIN {ALICE} "{PASSWORDS[ALICE]}"\r\n'.encode())
        client.raw.socket.settimeout(0.3)
        with self.assertRaises(TimeoutError):
            client.raw.line()
        client.raw.socket.settimeout(TIMEOUT)
        self.directory.kill()
        self.assertRegex(client.raw.until(b"a ")[-1], rb"^a NO \[UNAVAILABLE\]")
        self.directory.resume()
        self.directory.start()
        wait_for("the directory", lambda: LoginClient(proxy).login(ALICE, PASSWORDS[ALICE]).startswith("a OK"))


class TlsDirectoryTests:
    """Tests of every directory whose route has a `ca`."""

    def test_directory_certificate_is_verified(self):
        folder = Folder()
        self.addCleanup(folder.remove)
        other = Certificates(folder)
        route = [line if not line.startswith("ca:") else f"ca: {other.ca}" for line in self.route()]
        self.assertNotEqual(route, self.route())
        self.route = lambda: route
        self.assert_refused(self.proxy(), ALICE, "NO [UNAVAILABLE]")


class PostgreSql(TlsDirectoryTests, ServerDirectoryTests, unittest.TestCase):
    @classmethod
    def make(cls):
        return directory_servers.Postgres(cls.certificates)

    def route(self):
        return ["sql", f"url: postgres://vestibule@localhost:{self.directory.port}/postgres", "password_file: password",
                f"ca: {self.certificates.ca}", 'query: SELECT * FROM mailbox WHERE name = %{user}']

    def test_invalid_query_results_fail_the_lookup(self):
        for query, reason in (("SELECT 1 AS backend WHERE %{user} = %{user}", "the column backend is INT4: cast it"),
                              ("SELECT 'shard-a' AS host WHERE %{user} = %{user}", "the query has no column named"),
                              ("SELECT name AS backend FROM mailbox WHERE %{user} = %{user}", "more than one row"),
                              ("SELECT backend FROM nowhere WHERE name = %{user}", "nowhere")):
            route = self.route()[:-1] + [f'query: "{query}"']
            self.route = lambda route=route: route
            proxy = self.proxy()
            self.assert_refused(proxy, ALICE, "NO [UNAVAILABLE]")
            self.assertIn(reason, proxy.log())
            proxy.close()
            del self.route

    def test_endless_query_result_is_not_read(self):
        query = "SELECT %{user} AS backend, generate_series(1, 100000000) AS n"
        route = self.route()[:-1] + [f'query: "{query}"']
        self.route = lambda: route
        self.addCleanup(lambda: delattr(self, "route"))
        proxy = self.proxy(timeout="5s")
        for _ in range(3):
            self.assert_refused(proxy, ALICE, "NO [UNAVAILABLE]")
        self.assertIn("more than one row", proxy.log())
        self.assertNotIn("no answer within", proxy.log())
        ended = ("DO $$ BEGIN ASSERT (SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND "
                 "application_name = 'vestibule') = 0; END $$")
        wait_for("the queries to end", lambda: self.directory.sql(ended, check=False))


class MariaDb(TlsDirectoryTests, ServerDirectoryTests, unittest.TestCase):
    @classmethod
    def make(cls):
        return directory_servers.MariaDb(cls.certificates)

    def route(self):
        return ["sql", f"url: mariadb://vestibule@localhost:{self.directory.port}/mail", "password_file: password",
                f"ca: {self.certificates.ca}", 'query: SELECT * FROM mailbox WHERE BINARY name = %{user}']


class Sqlite(DirectoryTests, unittest.TestCase):
    @classmethod
    def make(cls):
        return directory_servers.Sqlite()

    def route(self):
        return ["sql", f"url: sqlite://{self.directory.file}", 'query: SELECT * FROM mailbox WHERE name = %{user}']


class OpenLdap(TlsDirectoryTests, ServerDirectoryTests, unittest.TestCase):
    # The attribute `mail` contains only ASCII.
    unusual_names = [user for user in UNUSUAL if user.isascii()]

    @classmethod
    def make(cls):
        return directory_servers.OpenLdap(cls.certificates)

    def route(self):
        attributes = ", ".join(f"{field}: {name}" for field, name in self.directory.ATTRIBUTES.items())
        return ["ldap", *self.endpoint(), 'bind: "cn=vestibule,dc=test"', "password_file: password", 'base: "dc=test"',
                'filter: "(mail=%{user})"', f"attributes: {{{attributes}}}"]

    def endpoint(self):
        return [f"url: ldap://localhost:{self.directory.port}", "starttls: true", f"ca: {self.certificates.ca}"]

    def test_ldaps_verifies_the_certificate(self):
        self.endpoint = lambda: [f"url: ldaps://localhost:{self.directory.tls_port}", f"ca: {self.certificates.ca}"]
        self.assert_login(self.proxy())
        other = Certificates(Folder())
        self.endpoint = lambda: [f"url: ldaps://localhost:{self.directory.tls_port}", f"ca: {other.ca}"]
        self.assert_refused(self.proxy(), ALICE, "NO [UNAVAILABLE]")

    def test_two_ldap_entries_fail_the_lookup(self):
        for _ in range(2):
            self.directory.add_user("twice@example.org", backend="shard-a")
        proxy = self.proxy()
        self.assert_refused(proxy, "twice@example.org", "NO [UNAVAILABLE]")
        self.assertIn("more than one entry", proxy.log())

    def test_directory_names_are_mapped_to_backends(self):
        self.directory.add_user("old@example.org", backend="imap3.internal", user=CAROL)
        proxy = self.proxy("names: {imap3.internal: shard-b}")
        self.assert_login(proxy, "old@example.org", "shard-b")


class Redis(ServerDirectoryTests, unittest.TestCase):
    @classmethod
    def make(cls):
        return directory_servers.Redis(cls.certificates)

    def route(self):
        return ["redis", f"url: redis://localhost:{self.directory.port}/0", "password_file: password",
                'key: "mailbox:%{user}"']

    def test_flapping_directory_causes_only_temporary_failures(self):
        """During continuous logins, each is answered correctly or with UNAVAILABLE; none is routed to another backend."""
        proxy = self.proxy()
        stop, answers = threading.Event(), {ALICE: set(), "unknown@example.org": set()}

        def log_in(user):
            while not stop.is_set():
                answers[user].add(LoginClient(proxy).login(user, PASSWORDS.get(user, "wrong"))[:12])

        threads = [threading.Thread(target=log_in, args=(user,), daemon=True) for user in answers]
        for thread in threads:
            thread.start()
        for _ in range(5):
            self.directory.kill()
            wait_for("the route to fail", lambda: proxy.metric("vestibule_route_failing") == 1)
            self.directory.start()
            wait_for("the route to work", lambda: proxy.metric("vestibule_route_failing") == 0)
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT)
        self.assertEqual(answers[ALICE], {"a OK [CAPABI", "a NO [UNAVAI"})
        self.assertEqual(answers["unknown@example.org"], {"a NO [AUTHEN", "a NO [UNAVAI"})
        self.assertEqual(proxy.metric("vestibule_backend_sessions_total", backend="shard-b"), 0)

    def test_redis_hashes_over_tls(self):
        self.directory.command("HSET", f"hash:{CAROL}", "shard", "shard-b")
        self.route = lambda: ["redis", f"url: rediss://localhost:{self.directory.tls_port}", "password_file: password",
                              f"ca: {self.certificates.ca}", 'key: "hash:%{user}"', "field: shard"]
        proxy = self.proxy()
        self.assert_login(proxy, CAROL, "shard-b")
        self.assert_refused(proxy, "unknown@example.org", "NO [AUTHENTICATIONFAILED]")
        self.directory.command("SET", "hash:string@example.org", "shard-a")
        self.assert_refused(proxy, "string@example.org", "NO [UNAVAILABLE]")
        folder = Folder()
        self.addCleanup(folder.remove)
        other = Certificates(folder)
        route = [line if not line.startswith("ca:") else f"ca: {other.ca}" for line in self.route()]
        self.route = lambda: route
        self.assert_refused(self.proxy(), CAROL, "NO [UNAVAILABLE]")

    def test_redis_sentinel_failover_is_followed(self):
        replica = directory_servers.Redis(extra=["--replicaof", "127.0.0.1", str(self.directory.port)])
        self.addCleanup(replica.close)
        wait_for("the replica", lambda: replica.command("GET", f"mailbox:{ALICE}") == "shard-a")
        sentinel = directory_servers.Sentinel(self.directory)
        self.addCleanup(sentinel.close)
        wait_for("the Sentinel", lambda: "num-slaves\n1" in sentinel.command("SENTINEL", "MASTER", "mail"))
        self.route = lambda: ["redis", f'sentinels: ["redis://localhost:{sentinel.port}"]', "master: mail",
                              "password_file: password", 'key: "mailbox:%{user}"']
        proxy = self.proxy()
        self.assert_login(proxy)
        self.directory.kill()
        try:
            wait_for("the new master", lambda: LoginClient(proxy).login(ALICE, PASSWORDS[ALICE]).startswith("a OK"))
        finally:
            self.directory.start()

    def test_redis_cluster_lookups(self):
        nodes = []
        for _ in range(3):
            # The default port of the cluster bus, 10,000 above the port, may not exist.
            settings = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port", str(free_port())]
            nodes.append(directory_servers.Redis(extra=settings))
            self.addCleanup(nodes[-1].close)
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        made = nodes[0].command("--cluster", "create", *addresses, "--cluster-yes")
        self.assertIn("All 16384 slots covered", made)
        wait_for("the cluster", lambda: all("cluster_state:ok" in node.command("CLUSTER", "INFO") for node in nodes))
        for user, fields in self.rows().items():
            self.assertEqual(nodes[0].command("-c", "SET", f"mailbox:{user}", directory_servers.text(fields)).splitlines()[-1], "OK")
        urls = ", ".join(f'"redis://{address}"' for address in addresses[:2])
        self.route = lambda: ["redis", f"cluster: [{urls}]", "password_file: password", 'key: "mailbox:%{user}"']
        proxy = self.proxy()
        self.assert_login(proxy)
        self.assert_login(proxy, BOB, "shard-b")
        self.assert_refused(proxy, "closed@example.org", "NO [CONTACTADMIN]")
        self.assert_refused(proxy, "unknown@example.org", "NO [AUTHENTICATIONFAILED]")
        # While a node without a replica is down, lookups of its users fail.
        number = int(nodes[0].command("CLUSTER", "KEYSLOT", f"mailbox:{ALICE}"))
        owner = next(node for node in nodes if owns(node, number))
        owner.kill()
        self.assert_refused(proxy, ALICE, "NO [UNAVAILABLE]")
        owner.start()
        wait_for("the node", lambda: LoginClient(proxy).login(ALICE, PASSWORDS[ALICE]).startswith("a OK"))


def owns(node, slot):
    """Whether a slot belongs to a node."""
    own = next(line for line in node.command("CLUSTER", "NODES").splitlines() if "myself" in line)
    ranges = [word.split("-") for word in own.split()[8:]]
    return any(int(part[0]) <= slot <= int(part[-1]) for part in ranges)


class Valkey(ServerDirectoryTests, unittest.TestCase):
    @classmethod
    def make(cls):
        return directory_servers.Valkey()

    def route(self):
        return ["redis", f"url: redis://localhost:{self.directory.port}/0", "password_file: password",
                'key: "mailbox:%{user}"']


class Dns(ServerDirectoryTests, unittest.TestCase):
    # Unusual names are not looked up in DNS: see test_hostile_names_match_no_user.
    unusual_names = []

    @classmethod
    def make(cls):
        return directory_servers.DnsServer()

    def route(self):
        return ["dns", 'txt: "%{local}._mailbox.%{domain}"', f'servers: ["127.0.0.1:{self.directory.port}"]']

    def test_srv_records_select_the_backend(self):
        self.directory.records.append("srv-host=_imap._tcp.example.org,mail-b.internal,143,20")
        self.directory.records.append("srv-host=_imap._tcp.example.org,mail-a.internal,143,10")
        self.directory.kill()
        self.directory.start()
        self.route = lambda: ["dns", 'srv: "_imap._tcp.%{domain}"', f'servers: ["127.0.0.1:{self.directory.port}"]',
                              "names: {mail-a.internal: shard-a}"]
        proxy = self.proxy()
        self.assert_login(proxy)
        self.assert_refused(proxy, BOB, "NO [AUTHENTICATIONFAILED]")


if __name__ == "__main__":
    unittest.main()
