"""IMAP compliance: the same commands get the same responses from a server directly and through the proxy.

The commands cover the states of RFC 3501 section 3 and the extensions of the server: mailboxes, APPEND, all forms of FETCH,
flags, SEARCH, SORT, COPY, MOVE, IDLE, literals of many sizes, pipelining, errors and compression. Two sessions in one mailbox
test notifications. Values that differ between runs (times, UIDVALIDITY, modification sequences) are masked; everything else
must be equal byte for byte.
"""

import re
import unittest
import zlib

from fixtures import Certificates, Courier, Cyrus, Dovecot, Folder, tls_proxy
from imap_client import RawClient, context, message

USER, PASSWORD = "alice@example.org", "wonderland"
MULTIPART = (b"From: a@example.org\r\nTo: b@example.org\r\nSubject: =?utf-8?q?p=C3=A4rts?=\r\nMIME-Version: 1.0\r\n"
             b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: text/plain\r\n\r\none\r\n--b\r\n"
             b"Content-Type: application/octet-stream\r\nContent-Transfer-Encoding: base64\r\n\r\nAAECAw==\r\n--b--\r\n")


def append(mailbox, text, flags=b"", plus=b"+"):
    return b"APPEND %s %s{%d%s}\r\n%s" % (mailbox, flags, len(text), plus, text)


COMMANDS = [
    b"CAPABILITY", b"NOOP", b"ID NIL", b"ENABLE CONDSTORE", b"NAMESPACE", b"LIST \"\" *", b"LIST \"\" \"\"", b"LSUB \"\" *",
    b"CREATE work", b"CREATE work/deep", b"CREATE work", b"CREATE {6+}\r\nquoted", b"SUBSCRIBE work", b"LSUB \"\" *",
    b"LIST (SUBSCRIBED) \"\" * RETURN (CHILDREN STATUS (MESSAGES))", b"RENAME work/deep work/deeper", b"DELETE work/deeper", b"DELETE absent",
    b"STATUS INBOX (MESSAGES RECENT UIDNEXT UNSEEN)",
    append(b"INBOX", message("one")), append(b"INBOX", message("two", "x" * 100 + "\r\n"), b"(\\Seen \\Flagged keyword) "),
    append(b"INBOX", MULTIPART), append(b"INBOX", message("big", ("y" * 76 + "\r\n") * 20000)), append(b"absent", message("none")),
    append(b"INBOX", message("dated"), b"(\\Draft) \"17-Jul-1996 02:44:25 -0700\" "),
    b"FETCH 1 FLAGS", b"EXAMINE INBOX", b"STORE 1 +FLAGS (\\Seen)", b"CLOSE", b"SELECT absent", b"SELECT INBOX",
    b"FETCH 1:* (UID FLAGS RFC822.SIZE)", b"FETCH 1 ALL", b"FETCH 2 FULL", b"FETCH 1 FAST", b"FETCH 3 BODYSTRUCTURE", b"FETCH 3 BODY",
    b"FETCH 3 (BODY[1] BODY[2.MIME] BODY[HEADER.FIELDS (SUBJECT)] BODY[TEXT]<0.10>)", b"FETCH 1 BODY.PEEK[]", b"FETCH 4 BODY[]",
    b"FETCH 4 BODY[]<1000000.5000>", b"FETCH 5 (INTERNALDATE ENVELOPE)", b"FETCH 99 FLAGS", b"FETCH 0 FLAGS", b"FETCH 1 NONSENSE",
    b"UID FETCH 1:* (FLAGS)", b"UID FETCH 1000:* (UID)", b"FETCH 3 BINARY[2]", b"FETCH 3 (BINARY.SIZE[2])",
    b"STORE 1 +FLAGS (\\Flagged)", b"STORE 1 -FLAGS.SILENT (\\Flagged)", b"STORE 1:2 FLAGS (\\Deleted \\Answered)", b"UID STORE 3 +FLAGS (custom)",
    b"SEARCH ALL", b"SEARCH DELETED", b"SEARCH SUBJECT one", b"SEARCH NOT SEEN OR FLAGGED LARGER 1000", b"SEARCH CHARSET UTF-8 SUBJECT {6+}\r\np\xc3\xa4rts",
    b"SEARCH CHARSET NONE SUBJECT x", b"SEARCH RETURN (MIN MAX COUNT) ALL", b"UID SEARCH KEYWORD custom", b"SEARCH", b"SORT (SUBJECT) UTF-8 ALL",
    b"THREAD REFERENCES UTF-8 ALL", b"SEARCH BEFORE 1-Jan-2000", b"SEARCH HEADER Message-ID two",
    b"COPY 1 work", b"COPY 1 absent", b"UID COPY 2:3 work", b"UID MOVE 5 work", b"EXPUNGE", b"SEARCH ALL", b"UID EXPUNGE 1:*",
    b"SELECT work", b"FETCH 1:* (FLAGS BODY.PEEK[HEADER.FIELDS (SUBJECT)])", b"UNSELECT", b"CHECK",
    b"SELECT INBOX (CONDSTORE)", b"STATUS work (MESSAGES UNSEEN)", b"GETQUOTAROOT INBOX", b"NONSENSE", b"SELECT", b"", b"FETCH",
    b"LIST \"unbalanced", b"LOGIN again again", b"STARTTLS", b"AUTHENTICATE PLAIN", b"DELETE work", b"UNSUBSCRIBE work",
]


def mask(line):
    line = re.sub(rb"UIDVALIDITY \d+", b"UIDVALIDITY n", line)
    line = re.sub(rb"APPENDUID \d+", b"APPENDUID n", line)
    line = re.sub(rb"COPYUID \d+", b"COPYUID n", line)
    line = re.sub(rb"(MAILBOXID|EMAILID|THREADID) \([^)]*\)", rb"\1 (x)", line)
    line = re.sub(rb"(HIGHESTMODSEQ|MODSEQ \(|MODSEQ) ?\(?\d+", rb"\1 n", line)
    line = re.sub(rb'INTERNALDATE "[^"]*2026[^"]*"', b"INTERNALDATE now", line)
    line = re.sub(rb"\(\d\.\d+ \+ \d\.\d+ (\+ \d\.\d+ )?secs\)\.?", b"(time)", line)
    return re.sub(rb"\d+\.\d+ secs?", b"time", line)


def read_answer(client, tag, *ends):
    """Reads lines and literals up to the tagged line, or to a line that begins with one of `ends`."""
    lines = []
    while True:
        line = client.line()
        assert line, f"closed after {lines[-3:]}"
        lines.append(mask(line))
        literal = re.search(rb"\{(\d+)\}$", line)
        if literal:
            size = int(literal[1])
            while len(client.pending) < size:
                client.pending += client.socket.recv(65536)
            lines.append(client.pending[:size])
            client.pending = client.pending[size:]
        elif line.startswith((tag + b" ", *ends)):
            return lines


def exchange(client, tag, command, literal_plus):
    """Sends a command and reads its response; a literal waits for the server unless LITERAL+ is available."""
    pieces = re.split(rb"(?<=\+\})\r\n", command)
    lines = []
    if not literal_plus:
        for index, piece in enumerate(pieces[:-1]):
            client.send((tag + b" " if index == 0 else b"") + piece.replace(b"+}", b"}") + b"\r\n")
            lines = read_answer(client, tag, b"+")
            if not lines[-1].startswith(b"+"):
                return lines
        if len(pieces) > 1:
            client.send(pieces[-1] + b"\r\n")
            return lines + read_answer(client, tag)
    client.send(tag + b" " + command + b"\r\n")
    return read_answer(client, tag)


def transcript(client, literal_plus):
    """The responses to all commands and special dialogues, and the end of the connection."""
    result = []
    for number, command in enumerate(COMMANDS):
        result.append((command[:60], exchange(client, b"t%d" % number, command, literal_plus)))
    client.send(b"s1 APPEND INBOX {5}\r\n")
    result.append(("synchronising literal", mask(client.line())))
    client.send(b"a: b\n\r\n")
    result.append(("response to the literal", read_answer(client, b"s1")))
    client.send(b"i1 IDLE\r\n")
    result.append(("IDLE", client.line()))
    client.send(b"DONE\r\n")
    result.append(("DONE", read_answer(client, b"i1")))
    client.send(b"p1 NOOP\r\np2 SELECT INBOX\r\np3 FETCH 1 UID\r\np4 NOOP\r\n")
    for tag in (b"p1", b"p2", b"p3", b"p4"):
        result.append(("pipelined", read_answer(client, tag)))
    client.send(b"z1 COMPRESS DEFLATE\r\n")
    answer = read_answer(client, b"z1")
    result.append(("COMPRESS", answer))
    if answer[-1].startswith(b"z1 OK"):
        deflate, inflate = zlib.compressobj(9, zlib.DEFLATED, -15), zlib.decompressobj(-15)
        client.send(deflate.compress(b"z2 NOOP\r\nz3 LOGOUT\r\n") + deflate.flush(zlib.Z_SYNC_FLUSH))
        output = b""
        while part := client.socket.recv(65536):
            output += inflate.decompress(part)
        result.append(("compressed", output))
    else:
        client.send(b"z3 LOGOUT\r\n")
        result.append(("LOGOUT", read_answer(client, b"z3")))
    result.append(("closed", client.line()))
    return result


def two_sessions(one, two, idle):
    """The notifications that two sessions of one mailbox get of the changes of each other: after NOOP, in IDLE, after EXPUNGE."""
    result = []

    def run(client, tag, command):
        result.append((command[:60], exchange(client, tag, command, client.literal_plus)))

    for client in (one, two):
        run(client, b"s", b"SELECT INBOX")
    run(one, b"a", append(b"INBOX", message("first")))
    run(two, b"b", b"NOOP")
    run(one, b"c", b"NOOP")
    run(one, b"d", b"STORE 1 +FLAGS (\\Flagged)")
    run(two, b"e", b"NOOP")
    changes = ((b"f", append(b"INBOX", message("second")), rb"\* 2 EXISTS"),
               (b"g", b"STORE 1 +FLAGS.SILENT (\\Deleted)", rb"\* 1 FETCH .*Deleted"),
               (b"h", b"EXPUNGE", rb"\* (1 EXPUNGE|VANISHED .*)"))
    for tag, command, event in changes:
        if not idle:
            run(one, tag, command)
            run(two, b"i", b"NOOP")
            continue
        two.send(b"i IDLE\r\n")
        result.append(("IDLE", read_answer(two, b"i", b"+")))
        run(one, tag, command)
        notified = [two.line()]
        while notified[-1] and not re.match(event, notified[-1]):
            notified.append(two.line())
        two.send(b"DONE\r\n")
        result.append((f"notifications in IDLE of {command[:20]}", notified + read_answer(two, b"i")))
    run(two, b"j", b"FETCH 1:* FLAGS")
    # EXPUNGE responses are delayed until a command that allows them (RFC 3501 section 7.4.1).
    run(one, b"k", append(b"INBOX", message("third")))
    run(two, b"l", b"NOOP")
    run(one, b"m", b"STORE 1 +FLAGS.SILENT (\\Deleted)")
    run(one, b"n", b"EXPUNGE")
    run(two, b"o", b"SEARCH ALL")
    run(two, b"p", b"NOOP")
    for client in (one, two):
        run(client, b"z", b"LOGOUT")
        result.append(("closed", client.line()))
    return result


class ImapCompliance(unittest.TestCase):
    def setUp(self):
        self.folder = Folder()
        self.addCleanup(self.folder.remove)
        self.certificates = Certificates(self.folder)

    def sessions(self, make, tls="none", number=1):
        """Yields new sessions of one user, first with a new server directly, then with another new server through the proxy,
        so that both see the same mailbox."""
        for through in (False, True):
            server = make()
            self.addCleanup(server.close)
            port, encryption = server.port, None
            if through:
                proxy = tls_proxy(server, self.certificates, tls)
                self.addCleanup(proxy.close)
                port, encryption = proxy.ports["tls"], context(self.certificates.ca)
            clients = []
            for _ in range(number):
                client = RawClient(port, encryption)
                self.addCleanup(client.close)
                client.line()
                login = client.command("l", f"LOGIN {USER} {PASSWORD}")
                self.assertTrue(login[-1].startswith(b"l OK "), login)
                client.literal_plus = any(b"LITERAL+" in line for line in client.command("c", "CAPABILITY"))
                clients.append(client)
            yield clients

    def assert_equal_transcripts(self, direct, proxied):
        for (command, expected), (_, got) in zip(direct, proxied):
            self.assertEqual(got, expected, command)
        self.assertEqual(len(direct), len(proxied))

    def assert_same_responses(self, make, tls="none", least_good=50):
        direct, proxied = (transcript(client, client.literal_plus) for (client,) in self.sessions(make, tls))
        self.assertGreater(len(direct), 100, "number of compared commands")
        # The commands had an effect: the server has accepted most of them.
        good = sum(1 for _, answer in direct if isinstance(answer, list) and b" OK" in answer[-1])
        self.assertGreaterEqual(good, least_good)
        self.assert_equal_transcripts(direct, proxied)

    def test_dovecot_responses_are_unchanged_by_the_proxy(self):
        tls = f"{{mode: starttls, ca: {self.certificates.ca}, server_name: localhost}}"
        self.assert_same_responses(lambda: Dovecot(self.certificates), tls, 60)

    def test_cyrus_responses_are_unchanged_by_the_proxy(self):
        self.assert_same_responses(Cyrus)

    def test_courier_responses_are_unchanged_by_the_proxy(self):
        self.assert_same_responses(Courier)

    def assert_same_notifications(self, make, tls="none", idle=True):
        direct, proxied = (two_sessions(*clients, idle) for clients in self.sessions(make, tls, 2))
        self.assertGreater(len(direct), 20)
        self.assert_equal_transcripts(direct, proxied)

    def test_dovecot_notifies_concurrent_sessions_through_the_proxy(self):
        self.assert_same_notifications(lambda: Dovecot(self.certificates), f"{{mode: starttls, ca: {self.certificates.ca}}}")

    def test_cyrus_notifies_concurrent_sessions_through_the_proxy(self):
        self.assert_same_notifications(Cyrus)

    def test_courier_notifies_concurrent_sessions_through_the_proxy(self):
        # Without a file alteration monitor, Courier checks for changes only once a minute in IDLE.
        self.assert_same_notifications(Courier, idle=False)


if __name__ == "__main__":
    unittest.main()
