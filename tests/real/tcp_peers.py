"""TCP peers: a relay that can stop forwarding, like a firewall that has lost its state, and a server with fixed replies."""

import socket
import threading

from fixtures import free_port


class Relay:
    """Forwards connections to a port of 127.0.0.1. After `go_silent()` it drops the bytes of the open connections without
    closing them; it forwards new connections."""

    def __init__(self, target, host="127.0.0.1"):
        self.port, self.target = free_port(), target
        self.lock = threading.Lock()
        self.connections = []
        self.accepted = 0
        self.listener = socket.create_server((host, self.port), backlog=128)
        threading.Thread(target=self._accept, daemon=True).start()

    def go_silent(self, but=()):
        """Drops the bytes of all open connections except `but`."""
        with self.lock:
            for connection in self.connections:
                if connection not in but:
                    connection.is_silent = True

    def open_connections(self):
        """Number of connections that the client has not closed, including silent ones."""
        with self.lock:
            return sum(not connection.is_closed_by_client for connection in self.connections)

    def close(self):
        self.listener.close()
        with self.lock:
            for connection in self.connections:
                connection.close()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                if self.listener.fileno() == -1:
                    return
                client.close()
                continue
            connection = Connection(client, server)
            with self.lock:
                self.connections.append(connection)
                self.accepted += 1
            connection.start()


class Connection:
    def __init__(self, client, server):
        self.client, self.server = client, server
        self.is_silent = self.is_closed_by_client = False

    def start(self):
        for pair in ((self.client, self.server), (self.server, self.client)):
            threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source, sink):
        try:
            while data := source.recv(65536):
                if not self.is_silent:
                    sink.sendall(data)
        except OSError:
            pass
        if source is self.client:
            self.is_closed_by_client = True
        if not self.is_silent:
            self.close()
        elif source is self.client:
            source.close()

    def close(self):
        for side in (self.client, self.server):
            try:
                side.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class FixedReplyServer:
    """Sends `greeting` when a client connects and `reply` after the first bytes of the client, then nothing."""

    def __init__(self, greeting=b"", reply=b""):
        self.port = free_port()
        self.listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self.greeting, self.reply = greeting, reply
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self.listener.close()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        try:
            client.sendall(self.greeting)
            if client.recv(65536):
                client.sendall(self.reply)
            while client.recv(65536):
                pass
        except OSError:
            pass
