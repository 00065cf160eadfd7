"""Fixtures of the TLS interoperability tests: peers that use other TLS libraries, IMAP over such a peer, big messages, and a
relay that alters records.

A peer is a process with a plaintext socket and a TLS socket. The tests use IMAP on the plaintext socket, independent of the
library and of the side of TLS.
"""

import atexit
import functools
import hashlib
import imaplib
import random
import re
import socket
import subprocess
import threading
from pathlib import Path

from fixtures import PASSWORDS, TIMEOUT, Certificates, Dovecot, Folder, Process, Proxy, program, wait_for
from imap_client import RawClient, message

SOURCES = Path(__file__).parent / "tls_peers"
PACKAGES = {"openssl": ["openssl"], "gnutls": ["gnutls"], "nss": ["nss"]}
ALICE = "alice@example.org"
BIG_SIZE = 20 << 20
SUITES = {
    "1.3": ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"),
    "1.2": ("TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
            "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"),
}


def each_suite():
    """All pairs of TLS version and cipher suite that the proxy supports."""
    return [(version, suite) for version, suites in SUITES.items() for suite in suites]


def gnutls_priority(version, suite=None):
    """The GnuTLS priority string of one version, optionally with one cipher suite."""
    text = f"NORMAL:-VERS-ALL:+VERS-TLS{version}"
    if suite:
        cipher = "CHACHA20-POLY1305" if "CHACHA20" in suite else "AES-128-GCM" if "AES_128" in suite else "AES-256-GCM"
        text += f":-CIPHER-ALL:+{cipher}"
    return text


def big_message(subject, size=BIG_SIZE):
    """A message of about `size` bytes, always the same for a subject. It contains no upper case letter and no k in its body,
    which openssl s_client would interpret as commands at the start of a read."""
    lines = random.Random(subject).randbytes(size // 78 * 38).hex()
    return message(subject, "".join(f"{lines[at:at + 76]}\r\n" for at in range(0, len(lines), 76)))


def digest(data):
    return hashlib.sha256(data).hexdigest()


@functools.cache
def build(library):
    """Compiles a peer; returns its path."""
    folder = Folder()
    atexit.register(folder.remove)
    output = folder.path / library
    flags = subprocess.run([program("pkg-config"), "--cflags", "--libs", *PACKAGES[library]], check=True, capture_output=True,
                           text=True).stdout.split()
    subprocess.run([program("cc"), "-O1", "-Wall", "-Wextra", "-Werror", "-o", output, SOURCES / "peer.c",
                    SOURCES / f"{library}.c", *flags], check=True)
    return output


def nss_database(certificates, folder):
    """Creates an NSS database with the authority's certificate, and the server's with its key; returns its name."""
    path = folder.path / "nssdb"
    if not path.exists():
        path.mkdir()
        bundle = folder.path / "server.p12"
        for command in (
            ["openssl", "pkcs12", "-export", "-in", certificates.cert, "-inkey", certificates.key, "-name", "server",
             "-passout", "pass:secret", "-out", bundle],
            ["certutil", "-N", "-d", f"sql:{path}", "--empty-password"],
            ["certutil", "-A", "-d", f"sql:{path}", "-n", "ca", "-t", "C,,", "-i", certificates.ca],
            ["pk12util", "-i", bundle, "-d", f"sql:{path}", "-W", "secret", "-K", ""],
        ):
            subprocess.run([program(command[0]), *command[1:]], check=True, capture_output=True)
    return f"sql:{path}"


class ImapConversation(RawClient):
    """An IMAP client on a connected socket."""

    def __init__(self, connected):
        connected.settimeout(TIMEOUT)
        self.socket = connected
        self.pending = b""

    def output(self):
        """The output of the process other than IMAP."""
        return self.process.text()

    def read_exactly(self, size):
        data = bytearray(size)
        have = min(size, len(self.pending))
        data[:have], self.pending = self.pending[:have], self.pending[have:]
        view = memoryview(data)
        while have < size:
            got = self.socket.recv_into(view[have:])
            assert got, f"the stream ended {size - have} bytes early"
            have += got
        return bytes(data)

    def login(self, user=ALICE):
        answer = self.command("a1", f"LOGIN {user} {PASSWORDS[user]}")[-1]
        assert answer.startswith(b"a1 OK"), answer

    def select(self, mailbox):
        answer = self.command("a2", f"SELECT {mailbox}")[-1]
        assert answer.startswith(b"a2 OK"), answer

    def start_fetch(self, number=1):
        """Sends FETCH and reads up to the literal; returns its length."""
        self.send(f"a3 FETCH {number} BODY.PEEK[]\r\n".encode())
        return int(re.search(rb"\{(\d+)\}$", self.until(f"* {number} FETCH".encode())[-1])[1])

    def finish_fetch(self, size):
        body = self.read_exactly(size)
        assert self.until(b"a3 ")[-1].startswith(b"a3 OK")
        return body

    def fetch(self, number=1):
        return self.finish_fetch(self.start_fetch(number))

    def append(self, mailbox, text):
        self.send(f"a4 APPEND {mailbox} {{{len(text)}}}\r\n".encode())
        assert self.until(b"+ ")
        self.socket.settimeout(2 * TIMEOUT)
        self.send(text + b"\r\n")
        answer = self.until(b"a4 ")[-1]
        assert answer.startswith(b"a4 OK"), answer

    def noop(self):
        answer = self.command("a5", "NOOP")[-1]
        assert answer.startswith(b"a5 OK"), answer

    def logout(self):
        output = self.command("a6", "LOGOUT")
        assert any(line.startswith(b"* BYE") for line in output) and output[-1].startswith(b"a6 OK"), output
        self.finish()

    def finish(self):
        """Checks that the stream ends."""
        assert self.line() == b"", "bytes after LOGOUT"


class TlsPeer(ImapConversation):
    """A process that uses TLS of `library` on the socket `tls`; tls_peers/peer.h describes the options."""

    def __init__(self, library, tls, role="client", plain=None, **options):
        ours, theirs = (None, plain) if plain else socket.socketpair()
        self.control, control = socket.socketpair()
        words = {"role": role, "tls": tls.fileno(), "plain": theirs.fileno(), "control": control.fileno(), **options}
        self.folder = Folder()
        passed = (tls.fileno(), theirs.fileno(), control.fileno())
        self.process = Process([build(library), *(f"{key}={value}" for key, value in words.items())], self.folder.path / "log",
                               pass_fds=passed)
        for given in (tls, theirs, control):
            given.close()
        if ours:
            super().__init__(ours)

    def wait_for_report(self, pattern):
        """Waits for a line of the output that matches `pattern` completely."""
        return self._wait(pattern, lambda: re.search(rf"^(?:{pattern})$", self.output(), re.MULTILINE))

    def send_command(self, command):
        """Sends a command to the peer, and waits until it has run."""
        before = self.output().count(f"did {command}\n")
        self.control.sendall(command.encode() + b"\n")
        self._wait(f"did {command}", lambda: self.output().count(f"did {command}\n") > before)

    def _wait(self, what, condition):
        try:
            return wait_for(what, condition)
        except AssertionError as error:
            raise AssertionError(f"{error}; output of the peer:\n{self.output()}") from None

    def counts(self):
        """Ends the peer, and returns the number of key updates sent and received and of tickets sent."""
        if hasattr(self, "socket"):
            self.socket.close()
        found = self.wait_for_report(r"end: updates sent (\d+) received (-?\d+), tickets sent (\d+)")
        return tuple(int(number) for number in found.groups())

    def close(self):
        if hasattr(self, "socket"):
            self.socket.close()
        self.control.close()
        self.process.kill()
        self.folder.remove()


class CommandLineClient(ImapConversation):
    """A command line client: IMAP on its standard input and output, other output in a file."""

    def __init__(self, command):
        ours, theirs = socket.socketpair()
        self.folder = Folder()
        descriptor = theirs.fileno()
        self.process = Process(["bash", "-c", f'exec "$@" <&{descriptor} >&{descriptor}', "bash", *command], self.folder.path / "log",
                               pass_fds=(descriptor,))
        theirs.close()
        super().__init__(ours)

    def finish(self):
        # tstclnt runs until its input ends.
        self.socket.shutdown(socket.SHUT_WR)
        super().finish()

    def close(self):
        self.socket.close()
        self.process.kill()
        self.folder.remove()


class TamperingRelay:
    """A relay between a TLS client and a TLS server that alters one record after `armed` is set.

    `alter` gets the next application data record of the client, or of the server if `of_server`, and returns the bytes to send
    instead; with `last`, this direction ends after them. `accepted` is the connection of a client that is already connected.
    """

    def __init__(self, port, alter, of_server=False, last=False, accepted=None):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(TIMEOUT)
        self.port = self.listener.getsockname()[1]
        self.server_port = port
        self.alter = alter
        self.of_server = of_server
        self.last = last
        self.accepted = accepted
        self.armed = threading.Event()
        self.altered = threading.Event()
        self.sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        client = self.accepted or self.listener.accept()[0]
        client.setblocking(True)
        server = socket.create_connection(("127.0.0.1", self.server_port))
        self.sockets = [client, server]
        altered, other = (server, client) if self.of_server else (client, server)
        threading.Thread(target=self._copy, args=(other, altered), daemon=True).start()
        self._alter(altered, other)

    def _alter(self, source, sink):
        records = source.makefile("rb")
        try:
            while header := records.read(5):
                record = header + records.read(int.from_bytes(header[3:5], "big"))
                if self.armed.is_set() and record[0] == 23 and not self.altered.is_set():
                    self.altered.set()
                    sink.sendall(self.alter(record))
                    if self.last:
                        break
                else:
                    sink.sendall(record)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    @staticmethod
    def _copy(source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self):
        for opened in (self.listener, *self.sockets):
            opened.close()


def append_directly(dovecot, mailbox, text, user=ALICE):
    """Creates a mailbox and appends a message to it, without the proxy."""
    client = imaplib.IMAP4("127.0.0.1", dovecot.port, timeout=2 * TIMEOUT)
    client.login(user, PASSWORDS[user])
    client.create(mailbox)
    assert client.append(mailbox, None, None, text)[0] == "OK"
    client.logout()


def fetch_and_delete_directly(dovecot, mailbox, user=ALICE):
    """Empties a mailbox without the proxy, and returns the digests of its messages."""
    client = imaplib.IMAP4("127.0.0.1", dovecot.port, timeout=2 * TIMEOUT)
    client.login(user, PASSWORDS[user])
    assert client.select(mailbox)[0] == "OK"
    numbers = client.search(None, "ALL")[1][0].split()
    found = [digest(client.fetch(number, "(BODY.PEEK[])")[1][0][1]) for number in numbers]
    client.store("1:*", "+FLAGS.SILENT", "\\Deleted") if numbers else None
    client.expunge()
    client.logout()
    return found


class InteropSetup:
    """A Dovecot with a big and a medium message in the mailbox `big` and an empty mailbox `up`, and certificates."""

    def __init__(self, test):
        self.folder = Folder()
        test.addClassCleanup(self.folder.remove)
        self.certificates = Certificates(self.folder)
        self.dovecot = Dovecot(self.certificates)
        test.addClassCleanup(self.dovecot.close)
        self.down, self.medium, self.up = big_message("down"), big_message("medium", 1 << 20), big_message("up")
        append_directly(self.dovecot, "big", self.down)
        append_directly(self.dovecot, "big", self.medium)
        append_directly(self.dovecot, "up", message("first"))
        fetch_and_delete_directly(self.dovecot, "up")

    def proxy(self, port=None, mode="none", limits="{}"):
        """A proxy for the server at `port`, by default Dovecot."""
        tls = "none" if mode == "none" else f"{{mode: {mode}, ca: {self.certificates.ca}}}"
        return Proxy(f"""
listeners:
  - {{address: "127.0.0.1:{{tls}}", tls: implicit}}
  - {{address: "127.0.0.1:{{starttls}}", tls: starttls}}
  - {{address: "127.0.0.1:{{plain}}", tls: none}}
tls: {{certificates: [{{cert: {self.certificates.cert}, key: {self.certificates.key}}}]}}
backends: {{shard: {{servers: ["localhost:{port or self.dovecot.port}"], tls: {tls}, check: off}}}}
routes: [{{domain: {{example.org: shard}}}}]
# No health check: it would use up the only connection that a peer accepts.
limits: {limits}
admin: {{address: "127.0.0.1:{{admin}}"}}
""")

    def peer_options(self, library, version=None, suite=None, role="client"):
        """The options for certificates and cipher suites of a peer of this library."""
        if library == "nss":
            options = {"ca": nss_database(self.certificates, self.folder)}
        elif role == "client":
            options = {"ca": self.certificates.ca}
        else:
            options = {"cert": self.certificates.cert, "key": self.certificates.key}
        if version and library == "gnutls":
            return {**options, "cipher": gnutls_priority(version, suite)}
        return {**options, **({"version": version} if version else {}), **({"cipher": suite} if suite else {})}
