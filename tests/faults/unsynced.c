/* A disk that loses unsynced writes: every write to the ledger's files is written down first, with what it replaces, and every sync.

   Preloaded into a process. Records in the file named by LICHEN_WRITES, each: kind ('w', 't', 's'), offset, old size, length, length of
   the path, path, new bytes, old bytes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int ledger_file(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, 4095);
    if (length < 0) return 0;
    path[length] = 0;
    char *name = strrchr(path, '/');
    return name && (!strcmp(name, "/ledger.sqlite") || !strcmp(name, "/ledger.sqlite-wal"));
}

static void note(char kind, int fd, const char *path, const void *data, uint64_t length, uint64_t offset) {
    const char *log = getenv("LICHEN_WRITES");
    if (!log) return;
    static ssize_t (*plain_write)(int, const void *, size_t);
    if (!plain_write) plain_write = dlsym(RTLD_NEXT, "write");
    struct stat found;
    fstat(fd, &found);
    uint64_t head[4] = {offset, (uint64_t)found.st_size, length, strlen(path)};
    uint64_t total = 1 + sizeof head + head[3] + 2 * length;
    char *record = calloc(1, total);
    record[0] = kind;
    memcpy(record + 1, head, sizeof head);
    memcpy(record + 1 + sizeof head, path, head[3]);
    if (length) {
        char *at = record + 1 + sizeof head + head[3];
        memcpy(at, data, length);
        int other = open(path, O_RDONLY);
        if (other >= 0) {
            ssize_t got = pread(other, at + length, length, (off_t)offset);
            (void)got;
            close(other);
        }
    }
    int out = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (out < 0 || plain_write(out, record, total) != (ssize_t)total) _exit(99);
    close(out);
    free(record);
}

#define WRITE(name)                                                                     \
    ssize_t name(int fd, const void *data, size_t length, off_t offset) {               \
        static ssize_t (*real)(int, const void *, size_t, off_t);                       \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                      \
        char path[4096];                                                                \
        if (ledger_file(fd, path)) note('w', fd, path, data, length, (uint64_t)offset); \
        return real(fd, data, length, offset);                                          \
    }
#define TRUNCATE(name)                                                               \
    int name(int fd, off_t length) {                                                 \
        static int (*real)(int, off_t);                                              \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                   \
        char path[4096];                                                             \
        if (ledger_file(fd, path)) note('t', fd, path, NULL, 0, (uint64_t)length);   \
        return real(fd, length);                                                     \
    }
#define SYNC(name)                                                     \
    int name(int fd) {                                                 \
        static int (*real)(int);                                       \
        if (!real) real = dlsym(RTLD_NEXT, #name);                     \
        char path[4096];                                               \
        int done = real(fd);                                           \
        if (!done && ledger_file(fd, path)) note('s', fd, path, NULL, 0, 0); \
        return done;                                                   \
    }
WRITE(pwrite)
WRITE(pwrite64)
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)
SYNC(fsync)
SYNC(fdatasync)
