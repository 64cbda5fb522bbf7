/* CPU detection and the choice of a kernel table. A new instruction set is one file of kernels, its flags in setup.py
 * and one row of TABLES. Each table begins as a copy of another and enters what it does better; all are filled when the
 * first is asked for. */
#include "smallthinker/cpu.h"

#include <pthread.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>

enum { EAX, EBX, ECX, EDX };

/* All of `bits` are set in a register of CPUID. Asked directly: __builtin_cpu_supports says no to everything where the
 * compiler's runtime is a stub, as the one is that `make wheels` links. */
static int cpuid_has(unsigned leaf, unsigned subleaf, int reg, unsigned bits) {
    unsigned r[4] = {0, 0, 0, 0};
    return __get_cpuid_count(leaf, subleaf, &r[EAX], &r[EBX], &r[ECX], &r[EDX]) && (r[reg] & bits) == bits;
}

/* The system saves these register files (XCR0: 1 SSE, 2 AVX, 5-7 AVX-512) when it switches threads. */
static int system_saves(unsigned state) {
    unsigned low, high;
    if (!cpuid_has(1, 0, ECX, 1u << 27)) /* OSXSAVE */
        return 0;
    __asm__ __volatile__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    (void)high;
    return (low & state) == state;
}

static int has_avx2(void) {
    return system_saves(0x06) && cpuid_has(1, 0, ECX, 1u << 28 | 1u << 12 | 1u << 29) && /* AVX, FMA, F16C */
           cpuid_has(7, 0, EBX, 1u << 5);
}

static inline int has_avxvnni(void) { return has_avx2() && cpuid_has(7, 1, EAX, 1u << 4); }

static inline int has_avx512vnni(void) {
    return has_avx2() && system_saves(0xe6) &&
           cpuid_has(7, 0, EBX, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) && /* F, DQ, BW, VL */
           cpuid_has(7, 0, ECX, 1u << 11);
}
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

/* Bits of the kernel's interface (asm/hwcap.h), which older headers lack. */
static inline int has_dotprod(void) { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }
static inline int has_i8mm(void) { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

static int feature(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value != 0;
}
static inline int has_dotprod(void) { return feature("hw.optional.arm.FEAT_DotProd"); }
static inline int has_i8mm(void) { return has_dotprod() && feature("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__aarch64__)
static inline int has_dotprod(void) { return 0; }
static inline int has_i8mm(void) { return 0; }
#endif

static int always(void) { return 1; }

/* Tables for instructions that older compilers do not know: setup.py says which it has to leave out. */
#if defined(ST_WITHOUT_AVX512VNNI)
#define AVX512VNNI(X)
#else
#define AVX512VNNI(X) X(avx512vnni, avx2, has_avx512vnni)
#endif
#if defined(ST_WITHOUT_AVXVNNI)
#define AVXVNNI(X)
#else
#define AVXVNNI(X) X(avxvnni, avx2, has_avxvnni)
#endif
#if defined(ST_WITHOUT_I8MM)
#define I8MM(X)
#else
#define I8MM(X) X(i8mm, dotprod, has_i8mm)
#endif

/* The tables, best first: X(name, the table that it begins as, whether this CPU can run it). */
#if defined(__x86_64__)
#define TABLES(X) AVX512VNNI(X) AVXVNNI(X) X(avx2, ref, has_avx2) X(ref, NONE, always)
#elif defined(__aarch64__)
#define TABLES(X) I8MM(X) X(dotprod, neon, has_dotprod) X(neon, ref, always) X(ref, NONE, always)
#else
#define TABLES(X) X(ref, NONE, always)
#endif

#define PLACE(name, base, supported) AT_##name,
#define DECLARE(name, base, supported) void st_fill_##name(st_kernels *k);
#define ROW(name, base, supported) {#name, AT_##base, supported, st_fill_##name},
#define NAME(name, base, supported) #name,

enum { AT_NONE = -1, TABLES(PLACE) N_TABLES };
TABLES(DECLARE)

static const struct {
    const char *name;
    int base;
    int (*supported)(void);
    void (*fill)(st_kernels *k);
} rows[] = {TABLES(ROW)};

static st_kernels tables[N_TABLES]; /* filled once, those that this CPU can run: filling is compiled for the set, too */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void fill(int i, st_kernels *k) {
    if (rows[i].base != AT_NONE)
        fill(rows[i].base, k);
    rows[i].fill(k);
}

static void fill_all(void) {
    for (int i = 0; i < N_TABLES; i++)
        if (rows[i].supported()) {
            fill(i, tables + i);
            tables[i].name = rows[i].name;
        }
}

const char *const *st_cpu_tables(void) {
    static const char *const names[] = {TABLES(NAME) NULL};
    return names;
}

const st_kernels *st_cpu_table(const char *name) {
    pthread_once(&once, fill_all);
    for (int i = 0; i < N_TABLES; i++)
        if (strcmp(rows[i].name, name) == 0 && rows[i].supported())
            return tables + i;
    return NULL;
}

int st_cpu_supports(const char *name) { return st_cpu_table(name) != NULL; }

const st_kernels *st_cpu_best(void) {
    int i = 0;
    while (!rows[i].supported()) /* the last row, ref, always is */
        i++;
    return st_cpu_table(rows[i].name);
}
