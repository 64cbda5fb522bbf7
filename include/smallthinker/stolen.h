/* CPU time that the host of a virtual machine gave to others. */
#ifndef SMALLTHINKER_STOLEN_H
#define SMALLTHINKER_STOLEN_H

#include <stdint.h>

/* Nanoseconds since the machine began in which one of its CPUs should have run and did not, of all CPUs together, in
 * steps of 10 ms; 0 where nobody tells (Linux does, in /proc/stat). */
int64_t st_stolen_ns(void);

#endif
