"""An HTTP/1.1 service for routes (JSON, or the headers of nginx's mail module) and for policies (weakforced)."""

import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from fixtures import PASSWORDS, free_port


class HttpService:
    """Runs in threads of this process. `kill()` closes its port, and `pause()` holds back its answers."""

    def __init__(self, certificates=None):
        self.port = free_port()
        self.certificates = certificates
        self.users = {}
        self.requests = []
        self.connections = set()
        self.token = None
        # Statuses by login, and the requests received so far, if it is used as a policy service.
        self.statuses = {}
        self.policy = []
        self.released = threading.Event()
        self.released.set()
        # Whether reports are received and not answered.
        self.holds_reports = False
        self.is_closed = threading.Event()
        self.start()

    def start(self):
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Headers and body are two writes: do not delay the second until the first is acknowledged.
            disable_nagle_algorithm = True

            def setup(self):
                super().setup()
                service.connections.add(self.connection)

            def finish(self):
                service.connections.discard(self.connection)

            def log_message(self, *_):
                pass

            def answer(self, status, body=b"", **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                try:
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # The client has closed the connection.

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append((request, dict(self.headers), self.client_address))
                if "command=" in self.path:
                    return self.answer_policy(request)
                service.released.wait()
                if service.token and self.headers.get("Authorization") != f"Bearer {service.token}":
                    return self.answer(500)
                user = request["user"]
                if "password" in request and request["password"] != PASSWORDS.get(user, "none"):
                    return self.answer(401)
                if user not in service.users:
                    return self.answer(404)
                entry = service.users[user]
                body = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
                self.answer(200, body, Content_Type="application/json")

            def answer_policy(self, request):
                """Answers in the protocol of weakforced."""
                command = self.path.partition("command=")[2]
                service.policy.append((command, request))
                if command == "report" and service.holds_reports:
                    service.is_closed.wait()
                service.released.wait()
                if service.token and service.token not in (self.headers.get("Authorization"), self.headers.get("X-API-Key")):
                    return self.answer(401)
                status = service.statuses.get(request["login"], 0) if command == "allow" else 0
                body = status if isinstance(status, bytes) else json.dumps({"status": status, "msg": ""}).encode()
                self.answer(200, body, Content_Type="application/json")

            def do_GET(self):
                """Answers in the protocol of nginx's mail_auth_http."""
                request = {name.lower(): value for name, value in self.headers.items()}
                service.requests.append((request, dict(self.headers), self.client_address))
                service.released.wait()
                user, password = unquote(request["auth-user"]), unquote(request["auth-pass"])
                entry = service.users.get(user)
                if entry and entry.get("waits"):
                    entry["waits"] -= 1
                    return self.answer(200, Auth_Status="WAIT", Auth_Wait="1")
                if request["auth-method"] == "external" and entry and request.get("auth-ssl-verify") == "SUCCESS":
                    good = "Auth_Pass" in entry
                else:
                    good = entry is not None and PASSWORDS.get(user, entry.get("password")) == password
                if not good:
                    wait = {"Auth_Wait": "1"} if entry is None or "final" not in entry else {}
                    return self.answer(200, Auth_Status="Invalid login or password", **wait)
                headers = {name: value for name, value in entry.items() if name.startswith("Auth")}
                self.answer(200, Auth_Status="OK", **headers)

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        if self.certificates:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificates.cert, self.certificates.key)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def add_user(self, user, /, **fields):
        self.users[user] = fields

    def kill(self):
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):
            try:
                connection.shutdown(2)
            except OSError:
                pass

    def pause(self):
        self.released.clear()

    def resume(self):
        self.released.set()

    def close(self):
        self.is_closed.set()
        self.resume()
        self.kill()
