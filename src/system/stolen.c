/* What /proc/stat says of stolen time. The pager asks it once a second. */
#include "smallthinker/stolen.h"

#include <stdio.h>
#include <unistd.h>

int64_t st_stolen_ns(void) {
    long long ticks = 0;
#ifdef __linux__
    FILE *file = fopen("/proc/stat", "re");
    if (!file)
        return 0;
    /* user, nice, system, idle, iowait, irq, softirq, steal */
    if (fscanf(file, "cpu %*d %*d %*d %*d %*d %*d %*d %lld", &ticks) != 1)
        ticks = 0;
    fclose(file);
    return (int64_t)ticks * (1000000000 / sysconf(_SC_CLK_TCK));
#else
    return ticks;
#endif
}
