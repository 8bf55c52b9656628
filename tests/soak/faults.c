/* Fails, shortens or ends the process at the n-th system call on files below given folders; sets the clock.
 *
 * LD_PRELOAD it; arm it through ctypes. Calls are counted while it is armed, and only those that the mode concerns:
 *
 *   0 every call         (an errno, or a kill)
 *   1 calls that change  (ENOSPC, EROFS)
 *   2 calls that open    (EMFILE)
 *   3 write()            (returns half)
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { CHANGES = 1, OPENS = 2, WRITES = 4 };
static int armed, mode, wanted, error, lasting, count;
static char prefixes[2][1024];
static double offset;

void soak_arm(const char *first, const char *second, int a_mode, int index, int an_error, int stays) {
    snprintf(prefixes[0], sizeof prefixes[0], "%s", first);
    snprintf(prefixes[1], sizeof prefixes[1], "%s", second);
    mode = a_mode, wanted = index, error = an_error, lasting = stays, count = 0, armed = 1;
}
int soak_disarm(void) { armed = 0; return count; }
void soak_clock(double seconds) { offset = seconds; }

static int below(const char *path) {
    for (int i = 0; i < 2; i++) {
        size_t length = strlen(prefixes[i]);
        if (length && !strncmp(path, prefixes[i], length)) return 1;
    }
    return 0;
}
static int fd_below(int fd) {
    char link[64], path[1200];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlink, link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}
/* Whether this call is to fail. */
static int due(int kind) {
    if (mode == 1 && !(kind & CHANGES)) return 0;
    if (mode == 2 && !(kind & OPENS)) return 0;
    if (mode == 3 && !(kind & WRITES)) return 0;
    int number = __atomic_fetch_add(&count, 1, __ATOMIC_SEQ_CST);
    if (wanted < 0 || !(number == wanted || (lasting && number > wanted))) return 0;
    if (error < 0) kill(getpid(), SIGKILL);
    errno = error;
    return 1;
}
static int path_due(int dirfd, const char *path, int kind) {
    if (!armed || !path) return 0;
    if (path[0] == '/' ? !below(path) : dirfd == AT_FDCWD || !fd_below(dirfd)) return 0;
    return due(kind);
}
static int fd_due(int fd, int kind) { return armed && fd_below(fd) && due(kind); }

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
static int opens(int flags) { return OPENS | (flags & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC) ? CHANGES : 0); }
#define MODE mode_t m = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list l; va_start(l, flags); m = va_arg(l, mode_t); va_end(l); }
int open(const char *p, int flags, ...) { MODE REAL(open); return path_due(AT_FDCWD, p, opens(flags)) ? -1 : real(p, flags, m); }
int open64(const char *p, int flags, ...) { MODE REAL(open64); return path_due(AT_FDCWD, p, opens(flags)) ? -1 : real(p, flags, m); }
int openat(int d, const char *p, int flags, ...) { MODE REAL(openat); return path_due(d, p, opens(flags)) ? -1 : real(d, p, flags, m); }
int openat64(int d, const char *p, int flags, ...) { MODE REAL(openat64); return path_due(d, p, opens(flags)) ? -1 : real(d, p, flags, m); }
FILE *fopen(const char *p, const char *how) { REAL(fopen); return path_due(AT_FDCWD, p, OPENS | (how[0] == 'r' ? 0 : CHANGES)) ? NULL : real(p, how); }
FILE *fopen64(const char *p, const char *how) { REAL(fopen64); return path_due(AT_FDCWD, p, OPENS | (how[0] == 'r' ? 0 : CHANGES)) ? NULL : real(p, how); }
DIR *opendir(const char *p) { REAL(opendir); return path_due(AT_FDCWD, p, OPENS) ? NULL : real(p); }
DIR *fdopendir(int fd) { REAL(fdopendir); return fd_due(fd, 0) ? NULL : real(fd); }

#define PATH1(type, name, kind, params, args, p) type name params { REAL(name); return path_due(AT_FDCWD, p, kind) ? -1 : real args; }
#define PATHAT(type, name, kind, params, args, d, p) type name params { REAL(name); return path_due(d, p, kind) ? -1 : real args; }
#define FD1(type, name, kind, params, args, fd) type name params { REAL(name); return fd_due(fd, kind) ? -1 : real args; }
PATH1(int, mkdir, CHANGES, (const char *p, mode_t m), (p, m), p)
PATH1(int, rmdir, CHANGES, (const char *p), (p), p)
PATH1(int, unlink, CHANGES, (const char *p), (p), p)
PATH1(int, rename, CHANGES, (const char *p, const char *q), (p, q), p)
PATH1(int, link, CHANGES, (const char *p, const char *q), (p, q), q)
PATH1(int, symlink, CHANGES, (const char *p, const char *q), (p, q), q)
PATH1(int, chmod, CHANGES, (const char *p, mode_t m), (p, m), p)
PATH1(int, truncate, CHANGES, (const char *p, off_t n), (p, n), p)
PATH1(int, access, 0, (const char *p, int m), (p, m), p)
PATH1(int, stat, 0, (const char *p, struct stat *s), (p, s), p)
PATH1(int, lstat, 0, (const char *p, struct stat *s), (p, s), p)
PATH1(int, stat64, 0, (const char *p, struct stat64 *s), (p, s), p)
PATH1(int, lstat64, 0, (const char *p, struct stat64 *s), (p, s), p)
PATH1(ssize_t, readlink, 0, (const char *p, char *b, size_t n), (p, b, n), p)
PATHAT(int, mkdirat, CHANGES, (int d, const char *p, mode_t m), (d, p, m), d, p)
PATHAT(int, unlinkat, CHANGES, (int d, const char *p, int f), (d, p, f), d, p)
PATHAT(int, renameat, CHANGES, (int d, const char *p, int e, const char *q), (d, p, e, q), d, p)
PATHAT(int, linkat, CHANGES, (int d, const char *p, int e, const char *q, int f), (d, p, e, q, f), e, q)
PATHAT(int, fchmodat, CHANGES, (int d, const char *p, mode_t m, int f), (d, p, m, f), d, p)
PATHAT(int, utimensat, CHANGES, (int d, const char *p, const struct timespec t[2], int f), (d, p, t, f), d, p)
PATHAT(int, faccessat, 0, (int d, const char *p, int m, int f), (d, p, m, f), d, p)
PATHAT(int, fstatat, 0, (int d, const char *p, struct stat *s, int f), (d, p, s, f), d, p)
PATHAT(int, fstatat64, 0, (int d, const char *p, struct stat64 *s, int f), (d, p, s, f), d, p)
FD1(int, fstat, 0, (int fd, struct stat *s), (fd, s), fd)
FD1(int, fstat64, 0, (int fd, struct stat64 *s), (fd, s), fd)
FD1(ssize_t, read, 0, (int fd, void *b, size_t n), (fd, b, n), fd)
FD1(ssize_t, pread, 0, (int fd, void *b, size_t n, off_t o), (fd, b, n, o), fd)
FD1(ssize_t, pread64, 0, (int fd, void *b, size_t n, off64_t o), (fd, b, n, o), fd)
FD1(ssize_t, pwrite, CHANGES, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), fd)
FD1(int, fsync, CHANGES, (int fd), (fd), fd)
FD1(int, fdatasync, CHANGES, (int fd), (fd), fd)
FD1(int, ftruncate, CHANGES, (int fd, off_t n), (fd, n), fd)
FD1(int, ftruncate64, CHANGES, (int fd, off64_t n), (fd, n), fd)
FD1(int, futimens, CHANGES, (int fd, const struct timespec t[2]), (fd, t), fd)
FD1(int, flock, 0, (int fd, int operation), (fd, operation), fd)
ssize_t write(int fd, const void *b, size_t n) {
    REAL(write);
    if (!fd_due(fd, CHANGES | (n > 1 ? WRITES : 0))) return real(fd, b, n);
    return mode == 3 ? real(fd, b, n / 2) : -1;
}
void *mmap(void *a, size_t n, int p, int f, int fd, off_t o) {
    REAL(mmap);
    return fd >= 0 && fd_due(fd, 0) ? MAP_FAILED : real(a, n, p, f, fd, o);
}
int clock_gettime(clockid_t clock, struct timespec *t) {
    long code = syscall(SYS_clock_gettime, clock, t);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) t->tv_sec += (long)offset;
    return (int)code;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
