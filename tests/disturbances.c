/* A library for LD_PRELOAD that counts, and on request disturbs, what a process does to the files below one folder: opening to write,
 * writing, copying, truncating, syncing, renaming, removing and making folders; or, of another folder, opening and reading.
 *
 * disturb() says where, what and at which call. Nothing happens before. tests/disturbances.py builds and uses it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT = 1, KILL, TEAR, FAIL_ONCE, FAIL_ON, SIGNAL, SIGNAL_ON };
enum { GO_ON, HALF, REFUSED };
#define MAX_FILES 4096

static char folder[PATH_MAX];
static size_t folder_length;
static int kind, number, of_reads, trace = -1;
static long at;
static atomic_long seen;
static char *names[MAX_FILES];

/* Kind COUNT only counts; KILL sends SIGKILL in front of call number `place`, TEAR in the middle of it where it writes; FAIL_ONCE and
 * FAIL_ON answer with the error `value`, once or from then on; SIGNAL and SIGNAL_ON send the signal `value`, once or at every call from
 * then on, and go on. */
void disturb(const char *below, const char *log, int what, long place, int value, int reads) {
    strncpy(folder, below, sizeof folder - 1);
    folder_length = strlen(folder);
    at = place, number = value, of_reads = reads;
    seen = 0;
    if (*log) trace = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    kind = what;
}

long disturbed(void) { return seen; }

static int is_inside(const char *path) {
    return kind && path && !strncmp(path, folder, folder_length) && (path[folder_length] == '/' || !path[folder_length]);
}

static const char *name_of(int file) { return kind && file >= 0 && file < MAX_FILES ? names[file] : NULL; }

static void forget(int file) {
    if (name_of(file)) names[file] = NULL; /* a few bytes stay behind */
}

static int boundary(const char *call, const char *path, int is_read) {
    if (is_read != of_reads) return GO_ON;
    long now = ++seen;
    if (trace >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s\t%s\n", call, path + folder_length);
        if (syscall(SYS_write, trace, line, length) != length) syscall(SYS_kill, getpid(), SIGABRT);
    }
    if (now < at || (now > at && kind != FAIL_ON && kind != SIGNAL_ON)) return GO_ON;
    switch (kind) {
    case KILL:
        syscall(SYS_kill, getpid(), SIGKILL);
        break;
    case TEAR:
        if (!strcmp(call, "write") || !strcmp(call, "copy")) return HALF;
        syscall(SYS_kill, getpid(), SIGKILL);
        break;
    case FAIL_ON:
        /* A full disk still lets files go. */
        if ((number == ENOSPC || number == EDQUOT) && !strcmp(call, "unlink")) return GO_ON;
        /* fall through */
    case FAIL_ONCE:
        errno = number;
        return REFUSED;
    case SIGNAL:
    case SIGNAL_ON:
        syscall(SYS_kill, getpid(), number);
    }
    return GO_ON;
}

static void killed(void) { syscall(SYS_kill, getpid(), SIGKILL); }

#define REAL(result, name, ...)                                    \
    static result (*real)(__VA_ARGS__);                            \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int opened(int file, const char *path) {
    if (file >= 0 && file < MAX_FILES) names[file] = strdup(path);
    return file;
}

#define OPENS(function)                                                                        \
    int function(const char *path, int flags, ...) {                                           \
        REAL(int, #function, const char *, int, ...);                                          \
        mode_t mode = 0;                                                                       \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                   \
            va_list rest;                                                                      \
            va_start(rest, flags);                                                             \
            mode = va_arg(rest, mode_t);                                                       \
            va_end(rest);                                                                      \
        }                                                                                      \
        if (!is_inside(path)) return real(path, flags, mode);                                  \
        int is_read = !(flags & (O_WRONLY | O_RDWR | O_CREAT));                                \
        if (boundary("open", path, is_read) == REFUSED) return -1;                             \
        return opened(real(path, flags, mode), path);                                          \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(function)                                                                     \
    int function(int base, const char *path, int flags, ...) {                                 \
        REAL(int, #function, int, const char *, int, ...);                                     \
        mode_t mode = 0;                                                                       \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                   \
            va_list rest;                                                                      \
            va_start(rest, flags);                                                             \
            mode = va_arg(rest, mode_t);                                                       \
            va_end(rest);                                                                      \
        }                                                                                      \
        if (!is_inside(path)) return real(base, path, flags, mode);                            \
        int is_read = !(flags & (O_WRONLY | O_RDWR | O_CREAT));                                \
        if (boundary("open", path, is_read) == REFUSED) return -1;                             \
        return opened(real(base, path, flags, mode), path);                                    \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

int close(int file) {
    REAL(int, "close", int);
    forget(file);
    return real(file);
}

ssize_t write(int file, const void *bytes, size_t count) {
    REAL(ssize_t, "write", int, const void *, size_t);
    const char *path = name_of(file);
    if (!path) return real(file, bytes, count);
    int answer = boundary("write", path, 0);
    if (answer == REFUSED) return -1;
    if (answer == HALF) {
        if (real(file, bytes, count / 2) >= 0) killed();
        return -1;
    }
    return real(file, bytes, count);
}

ssize_t copy_file_range(int source, off64_t *from, int target, off64_t *to, size_t count, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    const char *path = name_of(target);
    if (path) {
        int answer = boundary("copy", path, 0);
        if (answer == REFUSED) return -1;
        if (answer == HALF) {
            if (real(source, from, target, to, count / 2, flags) < 0) return -1;
            killed();
        }
    }
    return real(source, from, target, to, count, flags);
}

ssize_t read(int file, void *bytes, size_t count) {
    REAL(ssize_t, "read", int, void *, size_t);
    const char *path = name_of(file);
    if (path && boundary("read", path, 1) == REFUSED) return -1;
    return real(file, bytes, count);
}

#define READS_AT(function, offset)                                                             \
    ssize_t function(int file, void *bytes, size_t count, offset from) {                       \
        REAL(ssize_t, #function, int, void *, size_t, offset);                                 \
        const char *path = name_of(file);                                                      \
        if (path && boundary("read", path, 1) == REFUSED) return -1;                           \
        return real(file, bytes, count, from);                                                 \
    }
READS_AT(pread, off_t)
READS_AT(pread64, off64_t)

#define READS_INTO(function)                                                                   \
    ssize_t function(int file, const struct iovec *parts, int count, off64_t from) {           \
        REAL(ssize_t, #function, int, const struct iovec *, int, off64_t);                     \
        const char *path = name_of(file);                                                      \
        if (path && boundary("read", path, 1) == REFUSED) return -1;                           \
        return real(file, parts, count, from);                                                 \
    }
READS_INTO(preadv)
READS_INTO(preadv64)

#define READS_INTO_BY(function)                                                                \
    ssize_t function(int file, const struct iovec *parts, int count, off64_t from, int how) {  \
        REAL(ssize_t, #function, int, const struct iovec *, int, off64_t, int);                \
        const char *path = name_of(file);                                                      \
        if (path && boundary("read", path, 1) == REFUSED) return -1;                           \
        return real(file, parts, count, from, how);                                            \
    }
READS_INTO_BY(preadv2)
READS_INTO_BY(preadv64v2)

#define ON_A_FILE(function, name)                                                              \
    int function(int file) {                                                                   \
        REAL(int, #function, int);                                                             \
        const char *path = name_of(file);                                                      \
        if (path && boundary(name, path, 0) == REFUSED) return -1;                             \
        return real(file);                                                                     \
    }
ON_A_FILE(fsync, "fsync")
ON_A_FILE(fdatasync, "fsync")

#define TRUNCATES(function, offset)                                                            \
    int function(int file, offset length) {                                                    \
        REAL(int, #function, int, offset);                                                     \
        const char *path = name_of(file);                                                      \
        if (path && boundary("truncate", path, 0) == REFUSED) return -1;                       \
        return real(file, length);                                                             \
    }
TRUNCATES(ftruncate, off_t)
TRUNCATES(ftruncate64, off64_t)

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    if (is_inside(to) && boundary("rename", to, 0) == REFUSED) return -1;
    return real(from, to);
}

int renameat(int base, const char *from, int other, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    if (is_inside(to) && boundary("rename", to, 0) == REFUSED) return -1;
    return real(base, from, other, to);
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    if (is_inside(path) && boundary("unlink", path, 0) == REFUSED) return -1;
    return real(path);
}

int unlinkat(int base, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    if (is_inside(path) && boundary("unlink", path, 0) == REFUSED) return -1;
    return real(base, path, flags);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    if (is_inside(path) && boundary("mkdir", path, 0) == REFUSED) return -1;
    return real(path, mode);
}
