/* Shifts the wall clock of one process by the number of seconds in the file $CLOCK_FILE; monotonic clocks are unchanged.
   Preloaded by test_fault_injection.py and test_directory_tls.py. (libfaketime is not used because it allocates while it
   starts: an allocator that reads the clock then deadlocks.) */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t id, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, id, now);
    const char *path = getenv("CLOCK_FILE");
    if (result == 0 && path && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
        char text[32] = {0};
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file >= 0) {
            if (read(file, text, sizeof text - 1) > 0) now->tv_sec += atoll(text);
            close(file);
        }
    }
    return result;
}
