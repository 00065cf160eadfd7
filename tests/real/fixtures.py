"""Fixtures of the tests with real programs: the proxy, mailbox servers, certificates, waiting for conditions.

Everything listens on loopback, on ports chosen by the system, in temporary folders; every process ends with the test
that started it. A program that is not installed fails the test with the command that installs it; no test is skipped.
"""

import atexit
import os
import pwd
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
VESTIBULE = (REPOSITORY / os.environ.get("VESTIBULE", "target/debug/vestibule")).resolve()
CACHE = REPOSITORY / "tests/.cache"
# Seconds to wait for a condition before the test fails. Long, because test machines are shared.
TIMEOUT = 30.0
PASSWORDS = {"alice@example.org": "wonderland", "bob@example.net": "builder", "carol@example.org": "pass word"}


def wait_for(what, condition):
    """Polls `condition` until it returns a true value, and returns that; fails after TIMEOUT."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.02)
    raise AssertionError(f"waited {TIMEOUT:.0f} s for {what}")


def program(name):
    """The path of an installed program."""
    path = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    assert path, f"{name} is not installed: run tests/run"
    return path


def free_port():
    """A free TCP port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port, greeting=b"", tls=False):
    """Whether a server listens on `port` and sends `greeting` first."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as plain:
            stream = ssl._create_unverified_context().wrap_socket(plain) if tls else plain
            return stream.recv(len(greeting)) == greeting if greeting else True
    except OSError:
        return False


class Folder:
    """A temporary folder that all users can enter, because servers change their user."""

    def __init__(self):
        self.path = Path(tempfile.mkdtemp(prefix="vestibule-test-"))
        self.path.chmod(0o755)

    def write(self, name, text, mode=0o644):
        path = self.path / name
        path.write_text(text)
        path.chmod(mode)
        return path

    def remove(self):
        shutil.rmtree(self.path, ignore_errors=True)


class Certificates:
    """A new certificate authority and a certificate of it for loopback."""

    def __init__(self, folder):
        self.ca, self.cert, self.key = (folder.path / name for name in ("ca.pem", "cert.pem", "key.pem"))
        ca_key, request = folder.path / "ca-key.pem", folder.path / "request.pem"
        extensions = folder.write("extensions", "subjectAltName=DNS:localhost,DNS:mail.test,IP:127.0.0.1\n")
        new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        self._run(*new, "-x509", "-days", "3650", "-subj", "/CN=Test CA", "-keyout", ca_key, "-out", self.ca)
        self._run(*new, "-subj", "/CN=localhost", "-keyout", self.key, "-out", request)
        self._run("openssl", "x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", ca_key, "-CAcreateserial",
                  "-days", "3650", "-extfile", extensions, "-out", self.cert)

    @staticmethod
    def _run(*command):
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


class Process:
    """A program that runs until the test ends, with its output in a file.

    The kernel also ends it if the test process is killed, and if the thread that started it ends: start programs in the
    main thread.
    """

    def __init__(self, command, log, **options):
        self.log = Path(log)
        command = [program("setpriv"), "--pdeathsig", "KILL", *(str(word) for word in command)]
        with self.log.open("ab") as output:
            self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                          start_new_session=True, **options)
        atexit.register(self.kill)

    def text(self):
        return self.log.read_text(errors="replace")

    def kill(self):
        """Kills the program and its process group."""
        atexit.unregister(self.kill)
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.child.wait()


def without_delay(configuration):
    """Turns off the delay of failed logins, unless the configuration sets it: tests fail many logins."""
    if "failed_login_delay" in configuration:
        return configuration
    if re.search(r"(?m)^limits:", configuration):
        return re.sub(r"(?m)^limits: \{", "limits: {failed_login_delay: off, ", configuration)
    return configuration.rstrip("\n") + "\nlimits: {failed_login_delay: off}\n"


class Proxy:
    """The real binary. `{tls}`, `{starttls}`, `{plain}` and `{admin}` in its configuration become free ports."""

    def __init__(self, configuration, folder=None, environment=None):
        assert VESTIBULE.exists(), f"{VESTIBULE} is not built: run tests/run"
        self.folder = folder or Folder()
        self.owns_folder = folder is None
        configuration = without_delay(configuration)
        self.ports = {name: free_port() for name in ("tls", "starttls", "plain", "admin")}
        for name, port in self.ports.items():
            configuration = configuration.replace("{" + name + "}", str(port))
        self.file = self.folder.write("vestibule.yaml", configuration)
        self.process = Process([VESTIBULE, "run", "--config", self.file], self.folder.path / "vestibule.log",
                               env={**os.environ, **(environment or {})})
        wait_for("the proxy", self._ready)

    def _ready(self):
        assert self.process.child.poll() is None, f"the proxy ended:\n{self.process.text()}"
        return answers(self.ports["admin"])

    def metrics(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['admin']}/metrics", timeout=TIMEOUT) as answer:
            return answer.read().decode()

    def metric(self, name, **labels):
        """The sum of the samples of `name` with these labels."""
        total = 0.0
        for line in self.metrics().splitlines():
            sample = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if sample and sample[1] == name:
                found = dict(re.findall(r'(\w+)="([^"]*)"', sample[2] or ""))
                if all(found.get(key) == value for key, value in labels.items()):
                    total += float(sample[3])
        return total

    def log(self):
        """The log so far. A separate thread writes it: waits until that thread sleeps, or is stopped with the process."""
        wait_for("the log", lambda: self._log_writer_state() in ("S", "T", None))
        return self.process.text()

    def _log_writer_state(self):
        """The state of the thread that writes the log, as in proc(5); None if the process has ended."""
        for task in Path(f"/proc/{self.process.child.pid}/task").glob("*"):
            try:
                name, fields = (task / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            except (FileNotFoundError, ProcessLookupError):
                continue
            if name == "log":
                return fields.split()[0]
        return None

    def stop(self):
        """Stops the proxy with SIGTERM, as systemd does, and returns the log; the exit code must be 0."""
        self.process.child.send_signal(signal.SIGTERM)
        try:
            code = self.process.child.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the proxy does not stop:\n{self.log()}") from None
        assert code == 0, f"exit {code}:\n{self.log()}"
        return self.log()

    def close(self):
        self.process.kill()
        if self.owns_folder:
            self.folder.remove()


def plain_proxy(server):
    """A proxy without TLS in front of one server."""
    return Proxy(f"""
listeners: [{{address: "127.0.0.1:{{plain}}", tls: none}}]
backends: {{only: {{servers: ["127.0.0.1:{server.port}"]}}}}
routes: [{{default: only}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
""")


def tls_proxy(server, certificates, server_tls):
    """A proxy with implicit TLS in front of one server, to which `server_tls` applies."""
    return Proxy(f"""
listeners: [{{address: "127.0.0.1:{{tls}}", tls: implicit}}]
tls: {{certificates: [{{cert: {certificates.cert}, key: {certificates.key}}}]}}
backends: {{only: {{servers: ["localhost:{server.port}"], tls: {server_tls}}}}}
routes: [{{default: only}}]
admin: {{address: "127.0.0.1:{{admin}}"}}
""")


class Dovecot:
    """A Dovecot process with its own configuration; its Maildirs are in the folder `mail`."""

    def __init__(self, certificates, users=None, haproxy=False, trusted=True, mechanisms="plain login", extra="",
                 log_elements=""):
        """`extra` is configuration inserted before the passdb; `{path}` in it is the folder of the server."""
        self.users = users or PASSWORDS
        self.folder = Folder()
        self.port, self.tls_port, self.haproxy_port = free_port(), free_port(), free_port()
        self.mail = self.folder.path / "mail"
        self.mail.mkdir()
        account = pwd.getpwnam("nobody")
        os.chown(self.mail, account.pw_uid, account.pw_gid)
        # A password may contain further fields of passwd-file, separated by colons.
        lines = [f"{user}:{{PLAIN}}{password}" for user, password in self.users.items()]
        extra = extra.replace("{path}", str(self.folder.path))
        users = self.folder.write("users", "\n".join(lines) + "\n")
        path = self.folder.path
        haproxy_listener = f"inet_listener proxied {{\n port = {self.haproxy_port}\n haproxy = yes\n }}" if haproxy else ""
        self.configuration = self.folder.write("dovecot.conf", f"""
            base_dir = {path}/run
            state_dir = {path}/state
            log_path = {path}/log
            auth_verbose = yes
            instance_name = {path.name}
            protocols = imap
            listen = 127.0.0.1
            ssl = yes
            ssl_cert = <{certificates.cert}
            ssl_key = <{certificates.key}
            disable_plaintext_auth = no
            auth_mechanisms = {mechanisms}
            auth_failure_delay = 0
            login_trusted_networks = {'127.0.0.0/8' if trusted else ''}
            haproxy_trusted_networks = 127.0.0.0/8
            login_log_format_elements = user=<%u> method=%m rip=%r session=<%{{session}}> {log_elements}
            mail_location = maildir:{path}/mail/%u
            mail_max_userip_connections = 100
            first_valid_uid = 1
            first_valid_gid = 1
            mail_uid = nobody
            mail_gid = {account.pw_gid}
            namespace inbox {{
              inbox = yes
              separator = /
            }}
            {extra}
            passdb {{
              driver = passwd-file
              args = scheme=PLAIN username_format=%u {users}
            }}
            userdb {{
              driver = static
              args = uid={account.pw_uid} gid={account.pw_gid} home={path}/mail/%u
            }}
            service imap-login {{
              chroot =
              inet_listener imap {{
                port = {self.port}
              }}
              inet_listener imaps {{
                port = {self.tls_port}
                ssl = yes
              }}
              {haproxy_listener}
            }}
            service stats {{
              chroot =
            }}
            service anvil {{
              chroot =
              # Turns off the growing delay after failed logins, which the tests cause.
              unix_listener anvil-auth-penalty {{
                mode = 0
              }}
            }}
        """)
        self.start()

    def start(self):
        self.process = Process([program("dovecot"), "-F", "-c", self.configuration], self.folder.path / "output")
        wait_for(f"Dovecot ({self.folder.path})", lambda: self._alive() and answers(self.port, b"* OK"))

    def _alive(self):
        assert self.process.child.poll() is None, f"Dovecot ended:\n{self.process.text()}\n{self.log()}"
        return True

    def log(self):
        path = self.folder.path / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def messages(self, user):
        """Texts of all messages in all folders of a user."""
        return [path.read_text(errors="replace") for part in ("cur", "new")
                for path in (self.mail / user).glob(f"**/{part}/*")]

    def kill(self):
        """Kills all processes, so that connections close without a BYE."""
        self.process.kill()

    def close(self):
        self.process.kill()
        self.folder.remove()


class UnpackedServer:
    """A server from packages that are unpacked, not installed. It runs in a mount and process namespace in which the unpacked
    files overlay /usr and /etc."""

    def __init__(self, name):
        self.root = CACHE / name / "root"
        assert self.root.is_dir(), f"{name} is not unpacked: run tests/run"
        self.folder = Folder()

    def run(self, script, log):
        """Runs a shell script as root in the namespace until the test ends."""
        root = self.folder.path / "root"
        for name in ("usr", "etc", "run", "var", "proc", "dev", "tmp", "root"):
            (root / name).mkdir(parents=True, exist_ok=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            link = root / name
            if not link.is_symlink():
                link.symlink_to(f"usr/{name}")
        outside = f"""
            set -e
            mount -t overlay overlay -o ro,lowerdir={self.root}/usr:/usr {root}/usr
            mount -t overlay overlay -o ro,lowerdir={self.etc()}:{self.root}/etc:/etc {root}/etc
            mount -t tmpfs tmpfs {root}/run
            mkdir -p {root}/run/lock {root}/var/lib {root}/var/run
            mount --bind /dev {root}/dev
            mount -t proc proc {root}/proc
            mount --bind /tmp {root}/tmp
            exec chroot {root} sh -ec '{script}'
        """
        command = [program("unshare"), "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", outside]
        self.process = Process(command, self.folder.path / log)

    def etc(self):
        """The folder that overlays /etc."""
        path = self.folder.path / "etc"
        path.mkdir(exist_ok=True)
        return path

    def log(self):
        return self.process.text()

    def close(self):
        self.process.kill()
        self.folder.remove()


class Courier(UnpackedServer):
    """Courier IMAP with users in userdb."""

    def __init__(self, users=None):
        super().__init__("courier")
        self.port = free_port()
        path = self.folder.path
        account = pwd.getpwnam("nobody")
        lines = []
        for user, password in (users or PASSWORDS).items():
            home = path / "mail" / user
            for part in ("cur", "new", "tmp"):
                (home / "Maildir" / part).mkdir(parents=True)
            subprocess.run(["chown", "-R", f"{account.pw_uid}:{account.pw_gid}", home], check=True)
            hashed = subprocess.run(["openssl", "passwd", "-6", password], check=True, capture_output=True, text=True)
            lines.append(f"{user}\thome={home}|mail={home}/Maildir|uid={account.pw_uid}|gid={account.pw_gid}"
                         f"|imappw={hashed.stdout.strip()}\n")
        courier = self.etc() / "courier"
        courier.mkdir()
        (courier / "userdb").write_text("".join(lines))
        (courier / "userdb").chmod(0o600)
        authlib = ('authmodulelist="authuserdb"\nauthmodulelistorig="authuserdb"\ndaemons=1\n'
                   'authdaemonvar=/run/courier/authdaemon\nDEBUG_LOGIN=1\nDEFAULTOPTIONS=""\nLOGGEROPTS=""\n')
        (courier / "authdaemonrc").write_text(authlib)
        self.run(f"""
            export PATH=/usr/sbin:/usr/bin:/sbin:/bin
            mkdir -p /run/courier/authdaemon /tmp/none
            cp -r /etc/courier {path}/courier-etc
            mount --bind {path}/courier-etc /etc/courier
            makeuserdb
            /usr/lib/courier/courier-authlib/authdaemond &
            set -a
            . /etc/courier/imapd
            IMAP_STARTTLS=NO
            IMAPDSTARTTLS=NO
            MAILDIRPATH=Maildir
            exec couriertcpd -address=127.0.0.1 -maxprocs=40 -maxperip=40 -nodnslookup -noidentlookup {self.port} \\
                /usr/lib/courier/courier/imaplogin /usr/bin/imapd Maildir
        """, "log")
        wait_for(f"Courier ({path})", lambda: self._alive() and answers(self.port, b"* OK"))

    def _alive(self):
        assert self.process.child.poll() is None, f"Courier ended:\n{self.log()}"
        return True


class Cyrus(UnpackedServer):
    """Cyrus IMAP with users in sasldb; it creates the INBOX of a user at the first login."""

    def __init__(self, users=None):
        super().__init__("cyrus")
        self.port = free_port()
        path = self.folder.path
        state = path / "state"
        for part in ("config", "spool", "sasl", "sockets"):
            (state / part).mkdir(parents=True)
        sasldb = state / "sasl/sasldb2"
        for user, password in (users or PASSWORDS).items():
            name, realm = user.split("@")
            subprocess.run([program("saslpasswd2"), "-c", "-p", "-f", sasldb, "-u", realm, name],
                           input=password.encode(), check=True)
        (self.etc() / "imapd.conf").write_text(f"""
configdirectory: {state}/config
defaultpartition: default
partition-default: {state}/spool
sievedir: {state}/sieve
admins: cyrus
virtdomains: userid
defaultdomain: localhost
unixhierarchysep: yes
autocreate_quota: 0
delete_mode: immediate
imapidlepoll: 1
autocreate_post: yes
allowplaintext: yes
sasl_mech_list: PLAIN LOGIN
sasl_pwcheck_method: auxprop
sasl_auxprop_plugin: sasldb
sasl_sasldb_path: {sasldb}
syslog_prefix: cyrus
cyrus_user: cyrus
proc_path: {state}/config/proc
mboxname_lockpath: {state}/config/lock
idlesocket: {state}/sockets/idle
notifysocket: {state}/sockets/notify
lmtpsocket: {state}/sockets/lmtp
tls_sessions_db_path: {state}/config/tls_sessions.db
""")
        (self.etc() / "cyrus.conf").write_text(f"""
START {{
  recover cmd="/usr/sbin/cyrus ctl_cyrusdb -r"
}}
SERVICES {{
  imap cmd="imapd -U 30" listen="127.0.0.1:{self.port}" prefork=0 maxchild=40
}}
EVENTS {{
}}
""")
        (self.etc() / "passwd").write_text(Path("/etc/passwd").read_text() +
                                           "cyrus:x:996:8:Cyrus:/var/spool/cyrus:/usr/sbin/nologin\n")
        subprocess.run(["chown", "-R", "996:8", state], check=True)
        self.run("""
            export PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/cyrus/bin
            mkdir -p /run/cyrus/proc /run/cyrus/lock /run/cyrus/socket /var/lib/cyrus
            chown -R 996:8 /run/cyrus /var/lib/cyrus
            # Keeps the shell running: a process that changes its user, as cyrmaster does, no longer ends with its parent.
            /usr/sbin/cyrmaster -C /etc/imapd.conf -M /etc/cyrus.conf &
            wait
        """, "log")
        wait_for(f"Cyrus ({path})", lambda: self._alive() and answers(self.port, b"* OK"))

    def _alive(self):
        assert self.process.child.poll() is None, f"Cyrus ended:\n{self.log()}"
        return True
