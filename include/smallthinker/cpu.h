/* What this CPU can do, and the kernel table that follows from it. */
#ifndef SMALLTHINKER_CPU_H
#define SMALLTHINKER_CPU_H

#include "smallthinker/kernels.h"

/* Names of all tables compiled in, best first, NULL-terminated. */
const char *const *st_cpu_tables(void);
/* The table of that name, or NULL where it is unknown or this CPU lacks its instructions. */
const st_kernels *st_cpu_table(const char *name);
/* The best table of this CPU. */
const st_kernels *st_cpu_best(void);
/* 1 where this CPU (and its operating system) can run the table of that name. */
int st_cpu_supports(const char *name);

#endif
