/* A libnvidia-ml.so.1 without a GPU, for tests. Nothing is kept between calls but the session count: every call reads
 *
 *   FAKE_NVML_STATE  a text file (below). Unset or missing: there is no driver library (error 12), so that a process which
 *                    has this library loaded, and no state, behaves as one that hasn't.
 *   FAKE_NVML_PROCS  a directory of files named by pid, with lines `TARGET BYTES`: what that process has allocated. It counts
 *                    while the process lives, and for release_lag_ms after its end was first seen (kept in PID.gone).
 *   FAKE_NVML_CALLS  a file to which the name of every call is appended.
 *
 * State file: one fact a line, words apart by single blanks. TARGET is 0 (a card), 0/2 (slice in slot 2 of card 0) or a UUID.
 *
 *   driver 580.95.05 | nvml 13.580.95.05 | cuda 13000
 *   init_error CODE           what nvmlInit answers
 *   epoch N                   a session opened under another N is dead: its calls answer 999 until it is opened again
 *   release_lag_ms N          see FAKE_NVML_PROCS
 *   error CALL CODE           CALL is an exported symbol, or * for all but init and shutdown
 *   sleep CALL SECONDS        hangs that long, or until the line is gone; CALL or *
 *   gpu T uuid|name|bus TEXT
 *   gpu T total|reserved|used|minor|utilization|temperature|power|power_limit N      bytes, percent, degrees C, mW
 *   gpu T mig 0|1             without this line MIG is not supported
 *   gpu T error CALL CODE     * for every call that takes the card's handle
 *   gpu T compute|graphics PID BYTES|none
 *   gpu T late BYTES UNTIL    used until CLOCK_MONOTONIC reads UNTIL seconds, though no process holds it
 *   gpu T xid SEQ NUMBER      an event; each SEQ above those seen is told once per event set
 *
 * `used` of a card is what the system holds; processes add to it, each once even when it is in both lists.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef uint32_t u32;
typedef uint64_t u64;

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, UNSUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, TIMED_OUT = 10,
       NO_LIBRARY = 12, WRONG_VERSION = 25, UNKNOWN = 999 };
enum { GPUS = 32, SLOTS = 8, PROCS = 64, RULES = 32, COMPUTE = 1, GRAPHICS = 2 };
#define NONE UINT64_MAX
#define HANDLE_BASE 0x4e560000u

typedef struct { u64 total, free, used; } Memory1;
typedef struct { u32 version; u64 total, reserved, free, used; } Memory2;
typedef struct { u32 pid; u64 used; u32 gpu_instance, compute_instance; } Process;
typedef struct { u32 gpu, memory; } Utilization;
typedef struct { u32 version, sensor; int32_t temperature; } Temperature;
typedef struct { char legacy[16]; u32 domain, bus, device, pci_id, subsystem; char bus_id[32]; } Pci;
typedef struct { void *device; u64 type, data; u32 gpu_instance, compute_instance; } Event;
typedef struct { u32 registered; long seen[GPUS]; } EventSet;

_Static_assert(sizeof(Memory1) == 24 && sizeof(Memory2) == 40 && sizeof(Process) == 24 && sizeof(Utilization) == 8 &&
               sizeof(Temperature) == 12 && sizeof(Pci) == 68 && sizeof(Event) == 32, "as the driver lays them out");

typedef struct { char call[64]; double value; } Rule;
typedef struct { u32 pid; u64 bytes; int lists; } Holder;
typedef struct {
    int present, index, slot;
    char uuid[96], name[96], bus[32];
    u64 total, reserved, used, late;
    long minor, utilization, temperature, power, power_limit, mig, xid_seq, xid;
    int holders, rules;
    Holder holder[PROCS];
    Rule rule[RULES];
} Card;
typedef struct {
    char driver[80], nvml[80];
    int cuda, init_error, rules, sleeps;
    long epoch, release_lag_ms;
    Rule rule[RULES], sleep[RULES];
    Card card[GPUS][SLOTS + 1]; /* [i][0] is the card, [i][1 + s] its slice in slot s */
} State;

int fake_nvml = 1; /* by which tests tell this library from the driver's */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int sessions;
static long session_epoch;

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

static void nap(long ms) {
    struct timespec span = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&span, NULL);
}

static void copy(char *to, size_t size, const char *from) { snprintf(to, size, "%s", from); }

/* ---- reading the state ---- */

static Card *by_uuid(State *s, const char *uuid) {
    for (int i = 0; i < GPUS; i++)
        for (int j = 0; j <= SLOTS; j++)
            if (s->card[i][j].present && !strcmp(s->card[i][j].uuid, uuid)) return &s->card[i][j];
    return NULL;
}

static Card *target(State *s, const char *word) {
    int index = 0, slot = -1;
    if (!isdigit((unsigned char)word[0])) return by_uuid(s, word);
    if (sscanf(word, "%d/%d", &index, &slot) < 1 || index >= GPUS || slot >= SLOTS) return NULL;
    Card *card = &s->card[index][slot + 1];
    if (!card->present) {
        *card = (Card){.present = 1, .index = index, .slot = slot, .minor = index};
        card->utilization = card->temperature = card->power = card->power_limit = card->mig = -1;
    }
    return card;
}

static void add_rule(Rule *rules, int *count, const char *call, double value) {
    if (*count >= RULES) return;
    copy(rules[*count].call, sizeof rules->call, call);
    rules[(*count)++].value = value;
}

static double rule(const Rule *rules, int count, const char *call) {
    for (int i = 0; i < count; i++)
        if (!strcmp(rules[i].call, call) || !strcmp(rules[i].call, "*")) return rules[i].value;
    return 0;
}

static u64 bytes_of(u64 bytes) { return bytes == NONE ? 0 : bytes; }

/* A process in both lists is one holder, of the larger of the two sizes. */
static void add_holder(Card *card, u32 pid, u64 bytes, int list) {
    for (int i = 0; i < card->holders; i++)
        if (card->holder[i].pid == pid) {
            if (bytes_of(bytes) > bytes_of(card->holder[i].bytes)) card->holder[i].bytes = bytes;
            card->holder[i].lists |= list;
            return;
        }
    if (card->holders < PROCS) card->holder[card->holders++] = (Holder){pid, bytes, list};
}

static void number(Card *card, const char *key, long long value) {
    if (!strcmp(key, "total")) card->total = (u64)value;
    else if (!strcmp(key, "reserved")) card->reserved = (u64)value;
    else if (!strcmp(key, "used")) card->used = (u64)value;
    else if (!strcmp(key, "minor")) card->minor = (long)value;
    else if (!strcmp(key, "utilization")) card->utilization = (long)value;
    else if (!strcmp(key, "temperature")) card->temperature = (long)value;
    else if (!strcmp(key, "power")) card->power = (long)value;
    else if (!strcmp(key, "power_limit")) card->power_limit = (long)value;
    else if (!strcmp(key, "mig")) card->mig = (long)value;
}

static void card_line(Card *card, const char *key, const char *rest) {
    char word[64] = "", last[64] = "";
    sscanf(rest, "%63s %63s", word, last);
    if (!strcmp(key, "uuid")) copy(card->uuid, sizeof card->uuid, rest);
    else if (!strcmp(key, "name")) copy(card->name, sizeof card->name, rest);
    else if (!strcmp(key, "bus")) copy(card->bus, sizeof card->bus, rest);
    else if (!strcmp(key, "error")) add_rule(card->rule, &card->rules, word, atof(last));
    else if (!strcmp(key, "xid")) card->xid_seq = atol(word), card->xid = atol(last);
    else if (!strcmp(key, "late")) card->late += atof(last) > now() ? strtoull(word, NULL, 10) : 0;
    else if (!strcmp(key, "compute") || !strcmp(key, "graphics"))
        add_holder(card, (u32)atol(word), strcmp(last, "none") ? strtoull(last, NULL, 10) : NONE,
                   key[0] == 'c' ? COMPUTE : GRAPHICS);
    else number(card, key, atoll(rest));
}

static void state_line(State *s, char *line) {
    char key[32] = "", where[96] = "", what[32] = "", call[64] = "";
    int at = 0;
    double value = 0;
    sscanf(line, "%31s %95s", key, where);
    if (!strcmp(key, "gpu")) {
        Card *card = target(s, where);
        if (card && sscanf(line, "gpu %*s %31s %n", what, &at) == 1 && at) card_line(card, what, line + at);
    } else if (!strcmp(key, "error") || !strcmp(key, "sleep")) {
        if (sscanf(line, "%*s %63s %lf", call, &value) != 2) return;
        if (key[0] == 'e') add_rule(s->rule, &s->rules, call, value);
        else add_rule(s->sleep, &s->sleeps, call, value);
    } else if (!strcmp(key, "driver")) copy(s->driver, sizeof s->driver, where);
    else if (!strcmp(key, "nvml")) copy(s->nvml, sizeof s->nvml, where);
    else if (!strcmp(key, "cuda")) s->cuda = atoi(where);
    else if (!strcmp(key, "init_error")) s->init_error = atoi(where);
    else if (!strcmp(key, "epoch")) s->epoch = atol(where);
    else if (!strcmp(key, "release_lag_ms")) s->release_lag_ms = atol(where);
}

/* A zombie has given its memory back already. */
static int lives(const char *pid) {
    char path[PATH_MAX], stat[512] = "";
    snprintf(path, sizeof path, "/proc/%s/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    size_t size = fread(stat, 1, sizeof stat - 1, file);
    fclose(file);
    stat[size] = 0;
    char *state = strrchr(stat, ')');
    return state && state[1] && state[2] != 'Z' && state[2] != 'X';
}

/* When the end of this process was first seen, by any process that has this library loaded. */
static double gone_since(const char *marker) {
    double at = now();
    int made = open(marker, O_WRONLY | O_CREAT | O_EXCL, 0600);
    if (made >= 0) {
        dprintf(made, "%.9f", at);
        close(made);
        return at;
    }
    FILE *file = fopen(marker, "r");
    if (file && fscanf(file, "%lf", &at) != 1) at = now();
    if (file) fclose(file);
    return at;
}

static void registered(State *s, const char *folder, const char *pid) {
    char path[PATH_MAX], marker[PATH_MAX + 8], where[96];
    unsigned long long bytes;
    snprintf(path, sizeof path, "%s/%s", folder, pid);
    snprintf(marker, sizeof marker, "%s.gone", path);
    int alive = lives(pid);
    if (alive) unlink(marker);
    else if (now() - gone_since(marker) > (double)s->release_lag_ms / 1000) {
        unlink(path);
        unlink(marker);
        return;
    }
    FILE *file = fopen(path, "r");
    while (file && fscanf(file, "%95s %llu", where, &bytes) == 2) {
        Card *card = target(s, where);
        if (card && alive) {
            u64 held = 0; /* several lines for one card add up, unlike the two lists of one process */
            for (int i = 0; i < card->holders; i++)
                if (card->holder[i].pid == (u32)atol(pid)) held = bytes_of(card->holder[i].bytes);
            add_holder(card, (u32)atol(pid), held + bytes, COMPUTE);
        } else if (card) card->late += bytes;
    }
    if (file) fclose(file);
}

static void read_registered(State *s) {
    const char *folder = getenv("FAKE_NVML_PROCS");
    DIR *directory = folder ? opendir(folder) : NULL;
    struct dirent *entry;
    while (directory && (entry = readdir(directory)))
        if (entry->d_name[0] && strspn(entry->d_name, "0123456789") == strlen(entry->d_name))
            registered(s, folder, entry->d_name);
    if (directory) closedir(directory);
}

static State *read_state(void) {
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512];
    State *s = calloc(1, sizeof *s);
    if (!s) abort();
    if (!file) {
        s->init_error = NO_LIBRARY;
        return s;
    }
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        state_line(s, line);
    }
    fclose(file);
    read_registered(s);
    return s;
}

/* ---- what every call does first ---- */

static void note(const char *call) {
    const char *path = getenv("FAKE_NVML_CALLS");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file) return;
    fprintf(file, "%s\n", call);
    fclose(file);
}

/* The state, after the hang that it asks for; a test ends a hang by taking its line away. */
static State *begin(const char *call) {
    note(call);
    State *s = read_state();
    double since = now();
    while (now() - since < rule(s->sleep, s->sleeps, call)) {
        nap(10);
        free(s);
        s = read_state();
    }
    return s;
}

static int refusal(State *s, const char *call) {
    if (!sessions) return UNINITIALIZED;
    if (session_epoch != s->epoch) return UNKNOWN;
    return (int)rule(s->rule, s->rules, call);
}

static void *handle_of(const Card *card) {
    return (void *)(uintptr_t)(HANDLE_BASE | (u32)card->index << 8 | (u32)(card->slot + 1));
}

static int card_refusal(State *s, const char *call, void *handle, Card **card) {
    int code = refusal(s, call);
    uintptr_t at = (uintptr_t)handle - HANDLE_BASE;
    if (code) return code;
    if (at >> 8 >= GPUS || (at & 255) > SLOTS) return INVALID;
    *card = &s->card[at >> 8][at & 255];
    if (!(*card)->present) return INVALID;
    return (int)rule((*card)->rule, (*card)->rules, call);
}

/* The rest of the arguments is a block that sees `s` and, for the second, `card`; it sets `code`. */
#define CALL(NAME, ...) { \
    State *s = begin(NAME); int code = refusal(s, NAME); if (!code) __VA_ARGS__ free(s); return code; }
#define CARD_CALL(NAME, ...) { \
    State *s = begin(NAME); Card *card = NULL; int code = card_refusal(s, NAME, handle, &card); \
    if (!code) __VA_ARGS__ free(s); return code; }

/* ---- session ---- */

int nvmlInitWithFlags(u32 flags) {
    (void)flags;
    State *s = begin("nvmlInitWithFlags");
    int code = s->init_error;
    pthread_mutex_lock(&lock);
    if (!code) {
        sessions++;
        session_epoch = s->epoch;
    }
    pthread_mutex_unlock(&lock);
    free(s);
    return code;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    State *s = begin("nvmlShutdown");
    pthread_mutex_lock(&lock);
    int code = sessions ? OK : UNINITIALIZED;
    if (sessions) sessions--;
    pthread_mutex_unlock(&lock);
    free(s);
    return code;
}

const char *nvmlErrorString(int code) {
    static __thread char text[32];
    snprintf(text, sizeof text, "Error %d", code);
    return text;
}

static int text(char *to, u32 size, const char *from) {
    if (strlen(from) + 1 > size) return TOO_SMALL;
    copy(to, size, from);
    return OK;
}

int nvmlSystemGetDriverVersion(char *to, u32 size) CALL("nvmlSystemGetDriverVersion", { code = text(to, size, s->driver); })
int nvmlSystemGetNVMLVersion(char *to, u32 size) CALL("nvmlSystemGetNVMLVersion", { code = text(to, size, s->nvml); })
int nvmlSystemGetCudaDriverVersion_v2(int *to) CALL("nvmlSystemGetCudaDriverVersion_v2", { *to = s->cuda; })

/* ---- handles ---- */

int nvmlDeviceGetCount_v2(u32 *count) CALL("nvmlDeviceGetCount_v2", {
    *count = 0;
    while (*count < GPUS && s->card[*count][0].present) ++*count;
})

int nvmlDeviceGetHandleByIndex_v2(u32 index, void **to) CALL("nvmlDeviceGetHandleByIndex_v2", {
    Card *card = index < GPUS ? &s->card[index][0] : NULL;
    code = INVALID;
    if (card && card->present) {
        code = OK;
        for (int i = 0; i < card->rules; i++) /* only by name: a lost card may still have a handle */
            if (!strcmp(card->rule[i].call, "nvmlDeviceGetHandleByIndex_v2")) code = (int)card->rule[i].value;
        *to = handle_of(card);
    }
})

int nvmlDeviceGetHandleByUUID(const char *uuid, void **to) CALL("nvmlDeviceGetHandleByUUID", {
    Card *card = by_uuid(s, uuid);
    code = card ? OK : NOT_FOUND;
    if (card) *to = handle_of(card);
})

int nvmlDeviceGetIndex(void *handle, u32 *to) CARD_CALL("nvmlDeviceGetIndex", { *to = (u32)card->index; })
int nvmlDeviceGetMinorNumber(void *handle, u32 *to) CARD_CALL("nvmlDeviceGetMinorNumber", { *to = (u32)card->minor; })
int nvmlDeviceGetUUID(void *handle, char *to, u32 size) CARD_CALL("nvmlDeviceGetUUID", { code = text(to, size, card->uuid); })
int nvmlDeviceGetName(void *handle, char *to, u32 size) CARD_CALL("nvmlDeviceGetName", { code = text(to, size, card->name); })

int nvmlDeviceGetPciInfo_v3(void *handle, Pci *to) CARD_CALL("nvmlDeviceGetPciInfo_v3", {
    memset(to, 0, sizeof *to);
    code = sscanf(card->bus, "%x:%x:%x", &to->domain, &to->bus, &to->device) == 3 ? OK : UNSUPPORTED;
    copy(to->bus_id, sizeof to->bus_id, card->bus);
    copy(to->legacy, sizeof to->legacy, strlen(card->bus) > 4 ? card->bus + 4 : card->bus);
})

int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor)
    CARD_CALL("nvmlDeviceGetCudaComputeCapability", { *major = 8; *minor = 9; })

/* ---- memory and processes ---- */

static u64 held(const Card *card) {
    u64 sum = card->used + card->late;
    for (int i = 0; i < card->holders; i++) sum += bytes_of(card->holder[i].bytes);
    return sum;
}

static u64 unused(const Card *card) {
    u64 taken = held(card) + card->reserved;
    return taken < card->total ? card->total - taken : 0;
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory1 *to) CARD_CALL("nvmlDeviceGetMemoryInfo", {
    *to = (Memory1){card->total, unused(card), card->total - unused(card)};
})

int nvmlDeviceGetMemoryInfo_v2(void *handle, Memory2 *to) CARD_CALL("nvmlDeviceGetMemoryInfo_v2", {
    if (to->version != (sizeof *to | 2u << 24)) code = WRONG_VERSION;
    else *to = (Memory2){to->version, card->total, card->reserved, unused(card), held(card)};
})

static int list(const Card *card, int which, u32 *count, Process *to) {
    u32 size = *count, found = 0;
    for (int i = 0; i < card->holders; i++) {
        if (!(card->holder[i].lists & which)) continue;
        if (to && found < size) to[found] = (Process){card->holder[i].pid, card->holder[i].bytes, UINT32_MAX, UINT32_MAX};
        found++;
    }
    *count = found;
    return found > (to ? size : 0) ? TOO_SMALL : OK;
}

#define LIST(NAME, WHICH) int NAME(void *handle, u32 *count, Process *to) \
    CARD_CALL(#NAME, { code = list(card, WHICH, count, to); })
LIST(nvmlDeviceGetComputeRunningProcesses_v2, COMPUTE)
LIST(nvmlDeviceGetComputeRunningProcesses_v3, COMPUTE)
LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, GRAPHICS)
LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, GRAPHICS)

/* ---- gauges ---- */

static int gauge(long value, u32 *to) {
    if (value < 0) return UNSUPPORTED;
    *to = (u32)value;
    return OK;
}

int nvmlDeviceGetUtilizationRates(void *handle, Utilization *to)
    CARD_CALL("nvmlDeviceGetUtilizationRates", { to->memory = 0; code = gauge(card->utilization, &to->gpu); })
int nvmlDeviceGetTemperature(void *handle, u32 sensor, u32 *to)
    CARD_CALL("nvmlDeviceGetTemperature", { code = sensor ? INVALID : gauge(card->temperature, to); })
int nvmlDeviceGetPowerUsage(void *handle, u32 *to)
    CARD_CALL("nvmlDeviceGetPowerUsage", { code = gauge(card->power, to); })
int nvmlDeviceGetPowerManagementLimit(void *handle, u32 *to)
    CARD_CALL("nvmlDeviceGetPowerManagementLimit", { code = gauge(card->power_limit, to); })

int nvmlDeviceGetTemperatureV(void *handle, Temperature *to) CARD_CALL("nvmlDeviceGetTemperatureV", {
    u32 value = 0;
    code = to->version == (sizeof *to | 1u << 24) ? gauge(card->temperature, &value) : WRONG_VERSION;
    to->temperature = (int32_t)value;
})

/* ---- MIG ---- */

int nvmlDeviceGetMigMode(void *handle, u32 *current, u32 *pending)
    CARD_CALL("nvmlDeviceGetMigMode", { code = gauge(card->mig, current); *pending = *current; })
int nvmlDeviceGetMaxMigDeviceCount(void *handle, u32 *to)
    CARD_CALL("nvmlDeviceGetMaxMigDeviceCount", { *to = card->mig == 1 ? SLOTS : 0; })
int nvmlDeviceIsMigDeviceHandle(void *handle, u32 *to) CARD_CALL("nvmlDeviceIsMigDeviceHandle", { *to = card->slot >= 0; })
int nvmlDeviceGetGpuInstanceId(void *handle, u32 *to)
    CARD_CALL("nvmlDeviceGetGpuInstanceId", { code = gauge(card->slot, to); })

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, u32 slot, void **to)
    CARD_CALL("nvmlDeviceGetMigDeviceHandleByIndex", {
        Card *slice = slot < SLOTS ? &s->card[card->index][slot + 1] : NULL;
        code = !slice ? INVALID : slice->present ? OK : NOT_FOUND;
        if (!code) *to = handle_of(slice);
    })
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *handle, void **to)
    CARD_CALL("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", { *to = handle_of(&s->card[card->index][0]); })

/* ---- events ---- */

int nvmlEventSetCreate(EventSet **set) CALL("nvmlEventSetCreate", { *set = calloc(1, sizeof **set); })
int nvmlEventSetFree(EventSet *set) CALL("nvmlEventSetFree", { free(set); })
int nvmlDeviceGetSupportedEventTypes(void *handle, u64 *to) CARD_CALL("nvmlDeviceGetSupportedEventTypes", { *to = 8; })
int nvmlDeviceRegisterEvents(void *handle, u64 types, EventSet *set) CARD_CALL("nvmlDeviceRegisterEvents", {
    if (types & ~8ull) code = UNSUPPORTED;
    else set->registered |= 1u << card->index, set->seen[card->index] = card->xid_seq;
})

static int next_event(State *s, EventSet *set, Event *to) {
    for (int i = 0; i < GPUS; i++) {
        Card *card = &s->card[i][0];
        if (!(set->registered >> i & 1) || card->xid_seq <= set->seen[i]) continue;
        set->seen[i] = card->xid_seq;
        *to = (Event){handle_of(card), 8, (u64)card->xid, UINT32_MAX, UINT32_MAX};
        return OK;
    }
    return TIMED_OUT;
}

int nvmlEventSetWait_v2(EventSet *set, Event *to, u32 ms) {
    double since = now();
    for (;;) {
        State *s = begin("nvmlEventSetWait_v2");
        int code = refusal(s, "nvmlEventSetWait_v2");
        if (!code) code = next_event(s, set, to);
        free(s);
        if (code != TIMED_OUT || (now() - since) * 1000 >= ms) return code;
        nap(5);
    }
}
