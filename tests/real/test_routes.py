"""Routes without a directory server in the running program: changed tables, cache files, the hash of Dovecot's director, route
diffs, and response times."""

import os
import re
import socket
import statistics
import subprocess
import time
import unittest

import directory_servers
from fixtures import PASSWORDS, TIMEOUT, VESTIBULE, Certificates, Dovecot, Folder, Process, Proxy, free_port, program, wait_for
from test_directories import ALICE, BOB, CAROL, LoginClient

BASE = """
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none}}]
backends:
  shard-a: {{servers: ["127.0.0.1:{a}"]}}
  shard-b: {{servers: ["127.0.0.1:{b}"]}}
limits: {{drain: 1s, failed_logins: 1000}}
admin: {{address: "127.0.0.1:{{admin}}"}}
routes:
"""


def vestibule(*words):
    return subprocess.run([VESTIBULE, *map(str, words)], capture_output=True, text=True, timeout=TIMEOUT)


class Routes(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.addClassCleanup(cls.folder.remove)
        cls.certificates = Certificates(cls.folder)
        cls.a, cls.b = Dovecot(cls.certificates), Dovecot(cls.certificates)
        cls.addClassCleanup(cls.a.close)
        cls.addClassCleanup(cls.b.close)

    def proxy(self, routes, files=None, folder=None):
        if not folder:
            folder = Folder()
            self.addCleanup(folder.remove)
        for name, text in (files or {}).items():
            folder.write(name, text)
        proxy = Proxy(BASE.format(a=self.a.port, b=self.b.port) + routes, folder)
        self.addCleanup(proxy.close)
        return proxy

    def logs_in_at(self, proxy, user, backend):
        """Whether a login succeeds on a server of `backend`."""
        before = proxy.metric("vestibule_backend_sessions_total", backend=backend)
        if not LoginClient(proxy).login(user, PASSWORDS[user]).startswith("a OK"):
            return False
        return proxy.metric("vestibule_backend_sessions_total", backend=backend) > before

    def test_table_changes_are_loaded(self):
        proxy = self.proxy("  - table: users.txt\n", {"users.txt": f"{ALICE} shard-a\n"})
        table = proxy.folder.path / "users.txt"
        self.assertTrue(self.logs_in_at(proxy, ALICE, "shard-a"))
        # The table is written in place, then replaced by a rename.
        table.write_text(f"{ALICE} shard-b\n{BOB} shard-b\n")
        wait_for("the new table", lambda: self.logs_in_at(proxy, ALICE, "shard-b"))
        beside = proxy.folder.write("new", f"{ALICE} shard-a\n{BOB} refuse: Closed.\n")
        os.rename(beside, table)
        wait_for("the next table", lambda: self.logs_in_at(proxy, ALICE, "shard-a"))
        self.assertEqual(LoginClient(proxy).login(BOB, "x"), "a NO [CONTACTADMIN] Closed.")
        # A table with an error is not used, and the log names the line.
        table.write_text(f"{ALICE} shard-b\n{BOB} shard-x\n")
        wait_for("the error", lambda: "users.txt:2: no backend is declared as \"shard-x\"" in proxy.log())
        wait_for("the gauge", lambda: proxy.metric("vestibule_table_load_failed", route="table") == 1)
        self.assertTrue(self.logs_in_at(proxy, ALICE, "shard-a"))
        table.unlink()
        wait_for("the next error", lambda: "No such file" in proxy.log())
        self.assertTrue(self.logs_in_at(proxy, ALICE, "shard-a"))
        table.write_text(f"{ALICE} shard-b\n")
        wait_for("the valid table", lambda: self.logs_in_at(proxy, ALICE, "shard-b"))
        self.assertEqual(proxy.metric("vestibule_table_load_failed", route="table"), 0)
        self.assertEqual(proxy.metric("vestibule_table_users", route="table"), 1)

    def test_cache_file_survives_a_restart(self):
        directory = directory_servers.Redis()
        self.addCleanup(directory.close)
        directory.add_user(ALICE, backend="shard-b")
        routes = (f"  - redis: {{url: 'redis://127.0.0.1:{directory.port}', password_file: password, key: 'mailbox:%{{user}}', "
                  "timeout: 500ms, cache: {file: kept}}\n")
        folder = Folder()
        self.addCleanup(folder.remove)
        folder.write("password", directory.PASSWORD, 0o600)
        proxy = self.proxy(routes, folder=folder)
        self.assertTrue(self.logs_in_at(proxy, ALICE, "shard-b"))
        proxy.stop()
        explained = vestibule("route", "--config", proxy.file, CAROL)
        self.assertRegex(explained.stdout, r"route    redis: does not know the user \(\d+ \u00b5s, queried now\)\nbackend  none")
        self.assertEqual(explained.returncode, 1)
        kept = folder.path / "kept"
        self.assertEqual(kept.stat().st_mode & 0o777, 0o600)
        self.assertIn(ALICE, kept.read_text())
        directory.kill()
        proxy = self.proxy(routes, folder=folder)
        wait_for("the cached answer", lambda: proxy.metric("vestibule_route_cached_users", route="redis") == 1)
        self.assertTrue(self.logs_in_at(proxy, ALICE, "shard-b"))
        self.assertIn("NO [UNAVAILABLE]", LoginClient(proxy).login(BOB, "x"))
        explained = vestibule("route", "--config", proxy.file, ALICE).stdout
        self.assertRegex(explained, r"route    redis: found: shard-b \(\d+ \u00b5s, cached \d+ s ago\)")
        self.assertRegex(vestibule("route", "--config", proxy.file, BOB).stdout, r"route    redis: failed: .*refused.* \(\d+ \u00b5s, queried now\)")
        short = folder.write("short.yaml", proxy.file.read_text().replace("{file: kept}", "{file: kept, ttl: 1s}"))
        wait_for("the answer to become stale", lambda: re.search(r"cached \d+ s ago and stale: its source is down", vestibule("route", "--config", short, ALICE).stdout))

    def test_director_hash_equals_that_of_dovecot(self):
        """Compares the backend of each user with the lookup of a running director."""
        folder = Folder()
        self.addCleanup(folder.remove)
        hosts = {"10.0.0.11": 1, "10.0.0.12": 1, "10.0.0.13": 3}
        port = free_port()
        director = program("dovecot").replace("sbin/dovecot", "lib/dovecot/director")
        self.assertTrue(os.path.exists(director), director)
        settings = folder.write("dovecot.conf", f"""
            base_dir = {folder.path}/run
            state_dir = {folder.path}/state
            log_path = {folder.path}/log
            instance_name = director-{port}
            protocols = imap
            listen = 127.0.0.1
            ssl = no
            director_servers = 127.0.0.1:{port}
            director_mail_servers = {" ".join(hosts)}
            service director {{
              chroot =
              unix_listener director-admin {{
                mode = 0600
              }}
              unix_listener login/director {{
                mode = 0666
              }}
              fifo_listener login/proxy-notify {{
                mode = 0666
              }}
              inet_listener {{
                address = 127.0.0.1
                port = {port}
              }}
            }}
            service imap-login {{
              executable = imap-login director
              chroot =
              inet_listener imap {{
                port = {free_port()}
              }}
            }}
            service stats {{
              chroot =
            }}
            service anvil {{
              chroot =
            }}
            passdb {{
              driver = static
              args = proxy=y nopassword=y
            }}
        """)
        process = Process([program("dovecot"), "-F", "-c", settings], folder.path / "output")
        self.addCleanup(process.kill)

        def doveadm(*words):
            return subprocess.run([program("doveadm"), "-c", settings, "director", *words], capture_output=True, text=True,
                                  timeout=TIMEOUT)
        wait_for("the director", lambda: doveadm("status").returncode == 0)
        for host, weight in hosts.items():
            done = doveadm("add", host, str(100 * weight))
            self.assertEqual(done.returncode, 0, done.stderr)
        names = [f"Backend{number}" for number in range(len(hosts))]
        shares = "\n".join(f"        {name}: {{weight: {weight}, host: {host}}}" for name, (host, weight) in zip(names, hosts.items()))
        servers = "\n".join(f'  {name}: {{servers: ["{host}:143"]}}' for name, host in zip(names, hosts))
        configuration = folder.write("vestibule.yaml", f"""
listeners: [{{address: "127.0.0.1:0", tls: none}}]
backends:
{servers}
routes:
  - hash:
      style: director
      backends:
{shares}
""")
        # Non-ASCII letters in upper case, names that differ only in case, and names without a domain.
        users = [f"User{number}@Example.org" for number in range(3000)]
        users += [f"\u00c4RZT\u0130N{number}@example.org" for number in range(50)]
        users += ["alice", "ALICE", "a+b@example.org", "z\u00f6e@example.org", "\u1e9e"]
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(TIMEOUT)
            admin.connect(f"{folder.path}/run/director-admin")
            lines = admin.makefile("rw", encoding="utf-8", newline="\n")
            lines.readline()
            lines.write("VERSION\tdirector-doveadm\t1\t0\n" + "".join(f"USER-LOOKUP\t{user}\n" for user in users))
            lines.flush()
            # The fields are the expiry time, the current host, and the host by hash.
            director_hosts = [lines.readline().rstrip("\n").split("\t")[2] for _ in users]
        listed = folder.write("users.txt", "".join(f"{user}\n" for user in users))
        # Compared with a configuration that routes all users elsewhere, the diff lists every user.
        nowhere = folder.write("nowhere.yaml", configuration.read_text().split("routes:")[0].replace("backends:", "backends:\n  nowhere: {servers: ['10.9.9.9:143']}")
                               + "routes: [{default: nowhere}]\n")
        diff = vestibule("route", "--config", configuration, "--diff", nowhere, "--users", listed).stdout
        routed = dict(re.findall(r"^(.+): (\S+) -> nowhere$", diff, re.MULTILINE))
        for user, host in zip(users, director_hosts):
            self.assertEqual(routed.get(user), names[list(hosts).index(host)], f"{user}")
        self.assertEqual(set(director_hosts), set(hosts))

    def test_route_diff_lists_users_that_would_move(self):
        folder = Folder()
        self.addCleanup(folder.remove)
        text = BASE.format(a=1143, b=2143).replace("{plain}", "0").replace("{admin}", "0")
        users = folder.write("users.txt", "# all\n" + "".join(f"user{number}@example.org shard-a\n" for number in range(1000)) + "@x shard-a\n")
        old = folder.write("old.yaml", text + "  - hash: [shard-a, shard-b]\n")
        same = folder.write("same.yaml", text + "  - hash: [shard-b, shard-a]\n")
        new = folder.write("new.yaml", text.replace("limits:", "  shard-c: {servers: ['127.0.0.1:3143']}\nlimits:")
                           + "  - hash: [shard-a, shard-b, shard-c]\n")
        done = vestibule("route", "--config", old, "--diff", same, "--users", users)
        self.assertEqual((done.returncode, done.stdout), (0, "0 of 1000 users would move\n"), done.stderr)
        done = vestibule("route", "--config", old, "--diff", new, "--users", users)
        self.assertEqual(done.returncode, 1, done.stderr)
        lines = done.stdout.splitlines()
        self.assertTrue(250 < len(lines) - 1 < 420, lines[-1])
        for line in lines[:-1]:
            self.assertRegex(line, r"^user\d+@example.org: shard-[ab] -> shard-c$")
        self.assertEqual(lines[-1], f"{len(lines) - 1} of 1000 users would move")

    def test_response_time_does_not_reveal_users(self):
        """The response to an unknown name takes as long as the response to a wrong password."""
        slow = Dovecot(self.certificates, extra="auth_failure_delay = 1s")
        self.addCleanup(slow.close)
        text = BASE.format(a=slow.port, b=self.b.port) + "  - domain: {example.org: shard-a}\n"
        proxy = Proxy(text)
        self.addCleanup(proxy.close)

        def login_seconds(user):
            client = LoginClient(proxy)
            began = time.monotonic()
            self.assertRegex(client.login(user, "wrong"), "^a NO")
            return time.monotonic() - began
        wrong = [login_seconds(ALICE) for _ in range(5)]
        unknown = [login_seconds(f"user{number}@nowhere.test") for number in range(5)]
        self.assertGreater(statistics.median(wrong), 0.3)
        self.assertGreater(min(unknown), min(wrong) * 0.8, (wrong, unknown))
        self.assertLess(max(unknown), max(wrong) * 1.5, (wrong, unknown))


if __name__ == "__main__":
    unittest.main()
