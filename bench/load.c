/* A client that is never what is measured: one thread, epoll, keep-alive. Prints one JSON object.
 *
 * load json   PORT PATH CONNECTIONS SECONDS          asks again as soon as it is answered
 * load stream PORT PATH CONNECTIONS SECONDS TOKENS   the same with streams; each event bears the time at which it was sent
 * load hold   PORT PATH CONNECTIONS SECONDS TOKENS [GAP_US]   opens the streams, says so on stderr once all have begun, keeps them
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define IN_SIZE 65536
#define KEPT 4000000

struct conn { int fd, used, begun, open; long long asked; char in[4096]; };
struct samples { long long *at; long count; };

static struct samples first, delay, whole;
static char request[2048];
static int request_size, streaming, hold;
static long answers, events_seen, failed;
static struct sockaddr_in address;
static int epoll_fd;

static long long now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static void note(struct samples *s, long long value) {
    if (!s->at) s->at = malloc(sizeof(long long) * KEPT);
    if (s->count < KEPT) s->at[s->count++] = value;
}

static int by_size(const void *a, const void *b) {
    long long x = *(long long *)a, y = *(long long *)b;
    return (x > y) - (x < y);
}

static long long part(struct samples *s, double share) {
    return s->count ? s->at[(long)((s->count - 1) * share)] : -1;
}

static void report(const char *name, struct samples *s) {
    if (s->count) qsort(s->at, s->count, sizeof(long long), by_size);
    printf(",\"%s_us\":{\"count\":%ld,\"p50\":%lld,\"p90\":%lld,\"p99\":%lld}", name, s->count, part(s, .5), part(s, .9), part(s, .99));
}

static void ask(struct conn *c) {
    c->used = c->begun = 0;
    c->asked = now_us();
    if (send(c->fd, request, request_size, MSG_NOSIGNAL) != request_size) failed++;
}

static void dial(struct conn *c) {
    int on = 1;
    struct epoll_event add = {.events = EPOLLIN, .data.ptr = c};
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    while (connect(c->fd, (struct sockaddr *)&address, sizeof address)) {
        if (errno != EINTR) { perror("connect"); exit(1); }
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &add);
    c->open = 1;
    ask(c);
}

/* Whether the answer is whole: by its length, or by its last chunk. */
static int complete(struct conn *c) {
    char *end = memmem(c->in, c->used, "\r\n\r\n", 4);
    if (!end) return 0;
    char *length = strcasestr(c->in, "\r\ncontent-length:");
    if (length && length < end) return c->used >= (end + 4 - c->in) + atoi(length + 17);
    return c->used >= 5 && !memcmp(c->in + c->used - 5, "0\r\n\r\n", 5);
}

static void received(struct conn *c, char *data, int size) {
    long long now = now_us();
    if (!streaming) {
        if (c->used + size >= (int)sizeof c->in) { failed++; size = sizeof c->in - 1 - c->used; }
        memcpy(c->in + c->used, data, size);
        c->used += size;
        c->in[c->used] = 0;
        if (!c->begun) {
            c->begun = 1;
            if (strncmp(c->in, "HTTP/1.1 200", 12)) failed++;
        }
        if (complete(c)) { answers++; note(&whole, now - c->asked); ask(c); }
        return;
    }
    data[size] = 0;
    for (char *at = data; (at = strstr(at, "\"at_us\":")); at += 8) {
        if (!c->begun) { c->begun = 1; note(&first, now - c->asked); }
        events_seen++;
        note(&delay, now - atoll(at + 8));
    }
    /* The end may be cut in two: the last bytes are kept. */
    int kept = size < 16 ? size : 16;
    memmove(c->in, c->in + kept, 16 - kept);
    memcpy(c->in + 16 - kept, data + size - kept, kept);
    if (!memcmp(c->in + 11, "0\r\n\r\n", 5)) { answers++; if (!hold) ask(c); }
}

int main(int argc, char **argv) {
    if (argc < 6) return 2;
    hold = !strcmp(argv[1], "hold");
    streaming = hold || !strcmp(argv[1], "stream");
    int count = atoi(argv[4]), all = 0;
    double seconds = atof(argv[5]);
    char body[512], gap[64] = "";
    if (argc > 7) snprintf(gap, sizeof gap, ",\"gap_us\":%d", atoi(argv[7]));
    signal(SIGPIPE, SIG_IGN);
    address = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(argv[2])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int size = snprintf(body, sizeof body,
        "{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"What is gravity? Answer in one sentence.\"}],\"max_tokens\":%d%s%s}",
        argc > 6 ? atoi(argv[6]) : 14, streaming ? ",\"stream\":true" : "", gap);
    request_size = snprintf(request, sizeof request,
        "POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nAuthorization: Bearer sk-bench\r\n"
        "User-Agent: load\r\nAccept: */*\r\nContent-Length: %d\r\n\r\n%s", argv[3], size, body);
    epoll_fd = epoll_create1(0);
    struct conn *conns = calloc(count, sizeof *conns);
    static struct epoll_event events[512];
    static char data[IN_SIZE + 1];
    int dialled = 0;
    /* A stream lasts 10 ms for each of its tokens. */
    long long spread_us = streaming && !hold ? 10000LL * atoi(argv[6]) / count : 0;
    long long begin = now_us(), last = begin + seconds * 1e6;
    while (now_us() < last) {
        /* Streams begin one after another, so that first tokens are those of single requests and not of a burst; others in small
           groups, so that no backlog overflows. */
        if (spread_us) while (dialled < count && now_us() >= begin + dialled * spread_us) dial(&conns[dialled++]);
        else for (int i = 0; i < 50 && dialled < count; i++) dial(&conns[dialled++]);
        int found = epoll_wait(epoll_fd, events, 512, dialled < count ? 1 : 100);
        for (int i = 0; i < found; i++) {
            struct conn *c = events[i].data.ptr;
            if (!c->open) continue;
            int got = recv(c->fd, data, IN_SIZE, 0);
            if (got > 0) { received(c, data, got); continue; }
            failed += !hold && !(got == 0 && c->used == 0 && !c->begun);
            close(c->fd);
            c->open = 0;
            if (!hold) dial(c);
        }
        if (hold && !all && first.count >= count) {
            all = 1;
            fprintf(stderr, "open\n");
            fflush(stderr);
            last = now_us() + seconds * 1e6;
        }
        /* However long it takes to open them, but not for ever. */
        if (hold && !all) last = now_us() + 1e6 > begin + 120e6 ? 0 : now_us() + seconds * 1e6;
    }
    double took = (now_us() - begin) / 1e6;
    printf("{\"seconds\":%.3f,\"answers\":%ld,\"events\":%ld,\"failed\":%ld,\"rate\":%.1f", took, answers, events_seen, failed,
           (streaming ? events_seen : answers) / took);
    report("first", &first);
    report("delay", &delay);
    report("whole", &whole);
    printf("}\n");
    return 0;
}
