/* A stand-in for an engine, fast enough never to be what is measured: one thread, epoll, HTTP/1.1 with keep-alive.
 *
 * POST with "stream":true  an SSE stream of "max_tokens" events, one every `--gap-us` (or "gap_us"), each with the time at which
 *                          it was sent
 * any other POST           one JSON answer at once
 * GET                      200 {"status":"ok"}, for health checks; /v1/models lists the model `m`
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONN 40000
#define IN_SIZE 8192

struct conn {
    int fd, used, streaming, left, number;
    long long next_us, gap_us;
    struct conn *next, *prev; /* in the ring of streams */
    char in[IN_SIZE];
};

static struct conn *conns[MAX_CONN];
static struct conn ring = {.next = &ring, .prev = &ring};
static long long gap_us = 10000;
static int epoll_fd, timer_fd, streams;

static long long now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static void drop(struct conn *c) {
    if (c->streaming) {
        c->prev->next = c->next;
        c->next->prev = c->prev;
        streams--;
    }
    conns[c->fd] = NULL;
    close(c->fd);
    free(c);
}

static int put(struct conn *c, const char *data, int size) {
    /* A client that does not take it is dropped: nobody here reads slowly. */
    return send(c->fd, data, size, MSG_NOSIGNAL) == size;
}

static void arm(long long at) {
    struct itimerspec when = {.it_value = {.tv_sec = at / 1000000, .tv_nsec = (at % 1000000) * 1000 + 1}};
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

static int event(struct conn *c) {
    char body[512], chunk[640];
    int size = snprintf(body, sizeof body,
        "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,"
        "\"delta\":{\"content\":\" word%d\"},\"finish_reason\":null}],\"at_us\":%lld}\n\n", c->number++, now_us());
    return put(c, chunk, snprintf(chunk, sizeof chunk, "%x\r\n%s\r\n", size, body));
}

static int finish(struct conn *c) {
    char body[512], chunk[700];
    int size = snprintf(body, sizeof body,
        "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,"
        "\"delta\":{},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":%d,\"total_tokens\":%d}}\n\n"
        "data: [DONE]\n\n", c->number, c->number + 9);
    c->prev->next = c->next;
    c->next->prev = c->prev;
    c->streaming = 0;
    streams--;
    return put(c, chunk, snprintf(chunk, sizeof chunk, "%x\r\n%s\r\n0\r\n\r\n", size, body));
}

static void tick(void) {
    long long now = now_us(), soonest = 0;
    for (struct conn *c = ring.next, *next; c != &ring; c = next) {
        next = c->next;
        if (c->next_us <= now) {
            int fine = c->left-- > 0 ? event(c) : finish(c);
            if (!fine) { drop(c); continue; }
            if (!c->streaming) continue;
            c->next_us += c->gap_us;
            if (c->next_us < now) c->next_us = now;
        }
        if (!soonest || c->next_us < soonest) soonest = c->next_us;
    }
    if (soonest) arm(soonest);
}

static int answer(struct conn *c, const char *head, const char *body) {
    static const char json[] =
        "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"message\":"
        "{\"role\":\"assistant\",\"content\":\"It is the force by which a planet draws objects toward its center.\"},"
        "\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":14,\"total_tokens\":23}}";
    static const char fine[] = "{\"status\":\"ok\",\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":\"model\"}]}";
    static const char stream[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    char out[1024];
    if (!strncmp(head, "GET /slots", 10))
        return put(c, out, snprintf(out, sizeof out, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"));
    if (strncmp(head, "POST", 4) != 0)
        return put(c, out, snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                                    sizeof fine - 1, fine));
    if (!strstr(body, "\"stream\":true") && !strstr(body, "\"stream\": true"))
        return put(c, out, snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                                    sizeof json - 1, json));
    const char *max = strstr(body, "\"max_tokens\":");
    c->left = max ? atoi(max + 13) - 1 : 99;
    c->number = 0;
    c->streaming = 1;
    const char *gap = strstr(body, "\"gap_us\":");
    c->gap_us = gap ? atoll(gap + 9) : gap_us;
    c->next_us = now_us() + c->gap_us;
    c->next = ring.next; c->prev = &ring; ring.next->prev = c; ring.next = c;
    streams++;
    if (!put(c, stream, sizeof stream - 1) || !event(c)) return 0;
    tick();
    return 1;
}

/* Every whole request in the buffer; 0 when the connection is to be dropped. */
static int requests(struct conn *c) {
    for (;;) {
        c->in[c->used] = 0;
        char *end = strstr(c->in, "\r\n\r\n");
        if (!end) return c->used < IN_SIZE - 1;
        int head = end + 4 - c->in, body = 0;
        char *length = strcasestr(c->in, "\r\ncontent-length:");
        if (length && length < end) body = atoi(length + 17);
        if (head + body > IN_SIZE - 1) return 0;
        if (c->used < head + body) return 1;
        char kept = c->in[head + body];
        c->in[head + body] = 0;
        if (!answer(c, c->in, c->in + head)) return 0;
        c->in[head + body] = kept;
        memmove(c->in, c->in + head + body, c->used - head - body);
        c->used -= head + body;
    }
}

int main(int argc, char **argv) {
    int port = 8080, on = 1;
    for (int i = 1; i + 1 < argc; i++) {
        if (!strcmp(argv[i], "--port")) port = atoi(argv[i + 1]);
        if (!strcmp(argv[i], "--gap-us")) gap_us = atoll(argv[i + 1]);
    }
    signal(SIGPIPE, SIG_IGN);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 4096)) { perror("engine"); return 1; }
    epoll_fd = epoll_create1(0);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event add = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &add);
    add.data.fd = timer_fd;
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &add);
    static struct epoll_event events[512];
    for (;;) {
        int count = epoll_wait(epoll_fd, events, 512, -1);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == timer_fd) {
                long long fired;
                if (read(timer_fd, &fired, sizeof fired) > 0) tick();
            } else if (fd == listener) {
                int client;
                while ((client = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    if (client >= MAX_CONN) { close(client); continue; }
                    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                    conns[client] = calloc(1, sizeof **conns);
                    conns[client]->fd = client;
                    add.data.fd = client;
                    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, client, &add);
                }
            } else if (conns[fd]) {
                struct conn *c = conns[fd];
                int got = recv(fd, c->in + c->used, IN_SIZE - 1 - c->used, 0);
                if (got > 0) c->used += got;
                if (got == 0 || (got < 0 && errno != EAGAIN) || !requests(c)) drop(c);
            }
        }
    }
}
