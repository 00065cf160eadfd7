"""Failover, health checks and session moves in a backend of three Dovecots that are killed, stopped and restarted."""

import os
import signal
import subprocess
import threading
import unittest

from fixtures import TIMEOUT, VESTIBULE, Certificates, Dovecot, Folder, Proxy, wait_for
from imap_client import RawClient

USERS = {f"user{number}@example.org": "secret" for number in range(12)}
TEMPLATE = """
listeners: [{address: "127.0.0.1:{plain}", tls: none}]
backends:
  trio:
    servers: [SERVERS]
    check: CHECK
    MORE
routes: [{default: trio}]
# Dovecot starts a process for each connection: on a busy machine a greeting may take a second.
limits: {drain: 1s}
admin: {address: "127.0.0.1:{admin}", control: CONTROL}
"""


class ThreeServers(unittest.TestCase):
    # Number of proxies that the test has started.
    proxies = 0

    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        cls.certificates = Certificates(cls.folder)
        cls.servers = []
        for _ in range(3):
            cls.servers.append(Dovecot(cls.certificates, users={**USERS, "probe": "probing"}))
            cls.addClassCleanup(cls.servers[-1].close)

    def proxy(self, check="{interval: 200ms, timeout: 3s, fall: 2}", settings="", port="port"):
        servers = ", ".join(f'"localhost:{getattr(server, port)}"' for server in self.servers)
        text = TEMPLATE.replace("SERVERS", servers).replace("CHECK", check).replace("MORE", settings)
        self.proxies += 1
        self.control = self.folder.path / f"control-{self.proxies}"
        proxy = Proxy(text.replace("CONTROL", str(self.control)))
        self.addCleanup(proxy.close)
        self.addCleanup(self.control.unlink, missing_ok=True)
        wait_for("the first checks", lambda: proxy.metric("vestibule_server_checks_total", outcome="passed") >= 3)
        return proxy

    def log_in(self, proxy, user, tries=1):
        """Logs in with up to `tries` attempts on one connection, as clients do after UNAVAILABLE."""
        client = RawClient(proxy.ports["plain"])
        client.line()
        for _ in range(tries):
            answer = client.command("a", f"LOGIN {user} {USERS[user]}")[-1]
            if not answer.startswith(b"a NO [UNAVAILABLE]"):
                break
        self.assertTrue(answer.startswith(b"a OK"), answer)
        return client

    def is_up(self, proxy, server):
        return proxy.metric("vestibule_server_up", server=f"localhost:{server.port}")

    def sessions(self, proxy):
        return [int(proxy.metric("vestibule_server_sessions", server=f"localhost:{server.port}")) for server in self.servers]

    def test_logins_succeed_while_one_server_is_alive(self):
        for balance in ("user-hash", "bounded-hash", "least-sessions", "round-robin"):
            proxy = self.proxy(settings=f"balance: {balance}")
            failed, logins, stop = [], [0], threading.Event()
            # With user-hash, a login that a server had received when it was killed is not retried on another server, because
            # the login may have caused the failure. That is one login per killed server.
            tries = 3 if balance == "user-hash" else 1

            def log_in_repeatedly(user):
                while not stop.is_set():
                    try:
                        # Close without LOGOUT, because a session may end with its server; only a login must not fail.
                        self.log_in(proxy, user, tries).close()
                        logins[0] += 1
                    except Exception as error:  # any error is visible to a user
                        failed.append(f"{balance} {user}: {error!r}")

            threads = [threading.Thread(target=log_in_repeatedly, args=(user,)) for user in list(USERS)[:3]]
            for thread in threads:
                thread.start()
            try:
                # Kill two servers one after the other, so that only one is left, and start them again.
                for server in self.servers[:2]:
                    server.kill()
                    wait_for("the health checks", lambda server=server: self.is_up(proxy, server) == 0)
                before = logins[0]
                wait_for("logins at the last server", lambda: logins[0] > before + 10)
                for server in self.servers[:2]:
                    server.start()
                    wait_for("the health checks", lambda server=server: self.is_up(proxy, server) == 1)
                before = logins[0]
                wait_for("logins after the restarts", lambda: logins[0] > before + 10)
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            self.assertEqual(failed, [], proxy.log())
            proxy.close()

    def test_hung_server_loses_its_users_until_it_answers_again(self):
        proxy = self.proxy()
        before = self.sessions_per_server(proxy)
        self.assertTrue(all(before), f"every server has users: {before}")
        os.killpg(self.servers[0].process.child.pid, signal.SIGSTOP)
        try:
            wait_for("the health checks", lambda: self.is_up(proxy, self.servers[0]) == 0)
            during = self.sessions_per_server(proxy)
            self.assertEqual(during[0], 0, "no user is routed to the stopped server")
            self.assertTrue(during[1] >= before[1] and during[2] >= before[2], "no other user moves")
        finally:
            os.killpg(self.servers[0].process.child.pid, signal.SIGCONT)
        wait_for("the health checks", lambda: self.is_up(proxy, self.servers[0]) == 1)
        self.assertEqual(self.sessions_per_server(proxy), before, "all users are on their own servers again")

    def sessions_per_server(self, proxy):
        """The number of sessions per server when all users are logged in; logs them out again."""
        clients = [self.log_in(proxy, user) for user in USERS]
        sessions = self.sessions(proxy)
        self.assertEqual(sum(sessions), len(USERS))
        for client in clients:
            client.close()
        wait_for("the end of the sessions", lambda: sum(self.sessions(proxy)) == 0)
        return sessions

    def test_failed_login_ends_no_session_of_the_user(self):
        proxy = self.proxy(settings="balance: user-hash")
        user = "user1@example.org"
        before = [server.log().count(user) for server in self.servers]
        clients = [self.log_in(proxy, user) for _ in range(3)]
        index = self.sessions(proxy).index(3)

        def attempt_login(password):
            attacker = RawClient(proxy.ports["plain"])
            attacker.line()
            answer = attacker.command("a", f"LOGIN {user} {password}")[-1]
            attacker.close()
            for client in clients:
                self.assertTrue(client.command("b", "NOOP")[-1].startswith(b"b OK"), password[:20])
            return answer

        # Longer than the line limit of Dovecot, which closes the connection without an answer.
        self.assertTrue(attempt_login("x" * 9000).startswith(b"a NO "))
        self.assertEqual(self.sessions(proxy), [3 if at == index else 0 for at in range(3)])
        elsewhere = [server for at, server in enumerate(self.servers) if at != index]
        self.assertEqual([server.log().count(user) for server in elsewhere], before[:index] + before[index + 1:],
                         "the login was tried on no other server")
        # The server of the user is drained, so that another server refuses the wrong password.
        name = f"localhost:{self.servers[index].port}"
        subprocess.run([VESTIBULE, "drain", name, "--control", self.control], check=True,
                       capture_output=True, timeout=TIMEOUT)
        self.assertTrue(attempt_login("wrong").startswith(b"a NO [AUTHENTICATIONFAILED]"))
        # The password that made the server close the connection, and the wrong one.
        self.assertEqual(proxy.metric("vestibule_logins_total", outcome="refused"), 2)
        # The right password moves the user.
        moved = self.log_in(proxy, user)
        self.assertEqual([client.line() for client in clients], [b""] * 3)
        self.assertTrue(moved.command("b", "NOOP")[-1].startswith(b"b OK"))
        self.assertEqual(self.sessions(proxy)[index], 0)

    def test_login_check_uses_the_configured_account(self):
        password = self.folder.write("probe", "probing\n")
        wrong = self.folder.write("wrong", "guessing\n")
        check = "{kind: login, interval: 200ms, fall: 1, account: probe, password_file: PASSWORD}"
        proxy = self.proxy(check.replace("PASSWORD", str(password)))
        wait_for("logins in Dovecot's log", lambda: all("Logged out" in server.log() for server in self.servers))
        self.assertEqual([self.is_up(proxy, server) for server in self.servers], [1, 1, 1])
        proxy = Proxy(TEMPLATE.replace("SERVERS", f'"localhost:{self.servers[0].port}"').replace("MORE", "")
                      .replace("CHECK", check.replace("PASSWORD", str(wrong)))
                      .replace("CONTROL", str(self.folder.path / "control-of-one")))
        self.addCleanup(proxy.close)
        wait_for("the failed check", lambda: self.is_up(proxy, self.servers[0]) == 0)
        self.log_in(proxy, "user1@example.org").close()
        self.assertNotIn("guessing", proxy.log())

    def test_certificate_expiry_of_a_server_is_exported(self):
        settings = f"tls: {{mode: implicit, ca: {self.certificates.ca}}}"
        for kind in ("tls", "imap"):
            proxy = self.proxy(f"{{kind: {kind}, interval: 200ms}}", settings, port="tls_port")
            name = f"localhost:{self.servers[0].tls_port}"
            served = proxy.metric("vestibule_server_certificate_expiry_timestamp_seconds", server=name)
            self.assertGreater(served, 1.7e9, kind)
            self.assertEqual(proxy.metric("vestibule_server_checks_total", outcome="failed"), 0)


if __name__ == "__main__":
    unittest.main()
