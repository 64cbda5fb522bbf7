/* Requests for cache lines that are read soon: hints, any address may be given. Volatile assembly, because GCC (12.2)
 * takes a function that does nothing but __builtin_prefetch for one without effects, and leaves its calls out. The
 * operand is an address and not what is there: for that, sums would be stored before and loaded again after it. */
#ifndef SMALLTHINKER_PREFETCH_H
#define SMALLTHINKER_PREFETCH_H

/* The line of p, into the first-level cache or into the second. */
#if defined(__x86_64__)
static inline void st_prefetch_l1(const void *p) { __asm__ volatile("prefetcht0 (%0)" : : "r"(p)); }
static inline void st_prefetch_l2(const void *p) { __asm__ volatile("prefetcht1 (%0)" : : "r"(p)); }
#elif defined(__aarch64__)
static inline void st_prefetch_l1(const void *p) { __asm__ volatile("prfm pldl1keep, [%0]" : : "r"(p)); }
static inline void st_prefetch_l2(const void *p) { __asm__ volatile("prfm pldl2keep, [%0]" : : "r"(p)); }
#else
static inline void st_prefetch_l1(const void *p) { __builtin_prefetch(p); }
static inline void st_prefetch_l2(const void *p) { __builtin_prefetch(p); }
#endif

#endif
