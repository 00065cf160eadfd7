/* Forwards bytes between the plaintext and the TLS socket without blocking, and runs commands of the control socket. */
#include "peer.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Bytes not yet written to one side. */
struct pending {
    char bytes[16384];
    size_t start, end;
};

static struct options options = {.tls = -1, .plain = -1, .control = -1};
static struct pending up, down;
static bool plain_ended, tls_ended, tls_broken, write_broken, closed;
static long moved, updates, tickets;

void say(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
}

void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
    exit(1);
}

static bool empty(const struct pending *pending) { return pending->start == pending->end; }

static void read_options(int count, char **words) {
    for (int i = 1; i < count; i++) {
        char *value = strchr(words[i], '=');
        if (!value) fail("usage: key=value ..., not %s", words[i]);
        *value++ = 0;
        const char *key = words[i];
        if (!strcmp(key, "role")) options.server = !strcmp(value, "server");
        else if (!strcmp(key, "tls")) options.tls = atoi(value);
        else if (!strcmp(key, "plain")) options.plain = atoi(value);
        else if (!strcmp(key, "control")) options.control = atoi(value);
        else if (!strcmp(key, "version")) options.version = value;
        else if (!strcmp(key, "cipher")) options.cipher = value;
        else if (!strcmp(key, "ca")) options.ca = value;
        else if (!strcmp(key, "cert")) options.cert = value;
        else if (!strcmp(key, "key")) options.key = value;
        else if (!strcmp(key, "update_every")) options.update_every = atol(value);
        else if (!strcmp(key, "request")) options.request = atoi(value);
        else if (!strcmp(key, "ticket_every")) options.ticket_every = atol(value);
        else if (!strcmp(key, "padding")) options.padding = atoi(value);
        else if (!strcmp(key, "fragment")) options.fragment = atoi(value);
        else if (!strcmp(key, "limit")) options.limit = atoi(value);
        else fail("unknown option %s", key);
    }
    if (options.tls < 0 || options.plain < 0 || options.control < 0) fail("tls=, plain= and control= are required");
}

/* Requests a KeyUpdate with every byte it sends, and reads nothing until the next command. */
static void flood_without_reading(void) {
    long requested = 0;
    for (bool taken = true; taken && requested < 300000; requested++) {
        tls_update(true);
        ssize_t sent;
        while (taken && (sent = tls_write("x", 1)) == TLS_LATER) {
            struct pollfd on = {.fd = options.tls, .events = POLLOUT};
            taken = poll(&on, 1, 10000) == 1;
        }
        if (taken && sent < 0) fail("the connection ended after %ld requests", requested);
    }
    say("requested %ld", requested);
    struct pollfd on = {.fd = options.control, .events = POLLIN};
    poll(&on, 1, -1);
}

static void run_command(const char *command) {
    say("does %s", command);
    if (!strcmp(command, "update")) tls_update(false), updates++;
    else if (!strcmp(command, "request")) tls_update(true), updates++;
    else if (!strcmp(command, "flood")) for (int i = 0; i < 100; i++) tls_update(false);
    else if (!strcmp(command, "flood-without-reading")) flood_without_reading();
    else if (!strcmp(command, "ticket")) tls_ticket();
    else if (!strcmp(command, "renegotiate")) tls_renegotiate();
    else if (!strcmp(command, "empty")) tls_empty_record();
    else if (!strcmp(command, "close")) tls_close_notify(), closed = true;
    /* Closes TCP without close_notify. */
    else if (!strcmp(command, "drop")) shutdown(options.tls, SHUT_WR), closed = true;
    else fail("unknown command %s", command);
    say("did %s", command);
}

static bool step_up(void) {
    if (empty(&up) && !plain_ended) {
        ssize_t got = recv(options.plain, up.bytes, sizeof up.bytes, MSG_DONTWAIT);
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) return false;
        if (got <= 0) {
            plain_ended = true;
            if (!closed && !write_broken) tls_close_notify();
            return closed = true;
        }
        up.start = 0, up.end = got;
    }
    if (empty(&up)) return false;
    if (write_broken || closed) return up.start = up.end, true;
    ssize_t sent = tls_write(up.bytes + up.start, up.end - up.start);
    if (sent == TLS_LATER) return false;
    if (sent == TLS_BROKEN) return write_broken = true; /* keep reading: an alert may be pending */
    up.start += sent, moved += sent;
    return true;
}

/* Runs a pending command. Each read returns whole lines, because the test sends them one by one. Bytes that the test sent on
 * the plaintext socket before the command are written first, except before `drop`, which simulates a lost connection. */
static bool step_control(void) {
    char line[64];
    ssize_t got = recv(options.control, line, sizeof line - 1, MSG_DONTWAIT | MSG_PEEK);
    if (got == 0) exit(0); /* the test is over */
    if (got < 0) return false;
    if (strncmp(line, "drop", 4)) {
        while (step_up()) {}
        if (!empty(&up)) return false;
    }
    recv(options.control, line, got, MSG_DONTWAIT);
    line[got] = 0;
    for (char *command = strtok(line, "\n"); command; command = strtok(NULL, "\n")) run_command(command);
    return true;
}

static bool step_down(void) {
    bool progress = false;
    if (empty(&down) && !tls_ended) {
        ssize_t got = tls_read(down.bytes, sizeof down.bytes);
        if (got == TLS_LATER) return false;
        progress = true;
        if (got > 0) {
            down.start = 0, down.end = got, moved += got;
        } else {
            if (got == TLS_END) say("close_notify");
            tls_ended = true, tls_broken = got == TLS_BROKEN;
            shutdown(options.plain, SHUT_WR);
        }
    }
    if (empty(&down)) return progress;
    ssize_t sent = send(options.plain, down.bytes + down.start, down.end - down.start, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && (errno == EAGAIN || errno == EINTR)) return progress;
    if (sent < 0) return down.start = down.end, true; /* the test has closed its socket */
    down.start += sent;
    return true;
}

/* Sends the KeyUpdates and tickets that are due. */
static void step_due(void) {
    if (!empty(&up) || closed || write_broken) return;
    if (options.update_every && moved / options.update_every > updates) tls_update(options.request), updates++;
    if (options.ticket_every && moved / options.ticket_every > tickets) tls_ticket(), tickets++;
}

static void wait_for_more(void) {
    struct pollfd on[3] = {
        {.fd = tls_broken ? -1 : options.tls},
        {.fd = options.plain},
        {.fd = options.control, .events = POLLIN},
    };
    if (empty(&down) && !tls_ended) on[0].events |= POLLIN;
    if (!empty(&up)) on[0].events |= POLLOUT;
    if (empty(&up) && !plain_ended) on[1].events |= POLLIN;
    if (!empty(&down)) on[1].events |= POLLOUT;
    /* A closed side would end poll at once. */
    if (!on[0].events) on[0].fd = -1;
    if (!on[1].events) on[1].fd = -1;
    poll(on, 3, -1);
}

int main(int count, char **words) {
    signal(SIGPIPE, SIG_IGN);
    read_options(count, words);
    tls_start(&options);
    fcntl(options.tls, F_SETFL, fcntl(options.tls, F_GETFL) | O_NONBLOCK);
    for (;;) {
        if (tls_ended && empty(&down) && (closed || tls_broken)) break;
        bool progress = step_up();
        progress |= step_down();
        step_due();
        progress |= step_control();
        if (!progress) wait_for_more();
    }
    say("end: updates sent %ld received %ld, tickets sent %ld", updates, tls_updates_received(), tickets);
    return 0;
}
