/* CPU detection and the choice of a kernel table. A new instruction set is one file of kernels and one line in
 * `tables`. Called once when a model is opened; it holds no state. */
#include "smallthinker/cpu.h"

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

static int has_avxvnni(void) { return has_avx2() && cpuid_has(7, 1, EAX, 1u << 4); }

static int has_avx512vnni(void) {
    return has_avx2() && system_saves(0xe6) &&
           cpuid_has(7, 0, EBX, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) && /* F, DQ, BW, VL */
           cpuid_has(7, 0, ECX, 1u << 11);
}
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

/* Bits of the kernel's interface (asm/hwcap.h), which older headers lack. */
static int has_dotprod(void) { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }
static int has_i8mm(void) { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

static int feature(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value != 0;
}
static int has_dotprod(void) { return feature("hw.optional.arm.FEAT_DotProd"); }
static int has_i8mm(void) { return has_dotprod() && feature("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__aarch64__)
static int has_dotprod(void) { return 0; }
static int has_i8mm(void) { return 0; }
#endif

static int always(void) { return 1; }

static const struct {
    const char *name;
    const st_kernels *kernels;
    int (*supported)(void);
} tables[] = {
#if defined(__x86_64__)
    {"avx512vnni", &st_kernels_avx512vnni, has_avx512vnni},
    {"avxvnni", &st_kernels_avxvnni, has_avxvnni},
    {"avx2", &st_kernels_avx2, has_avx2},
#elif defined(__aarch64__)
    {"i8mm", &st_kernels_i8mm, has_i8mm},
    {"dotprod", &st_kernels_dotprod, has_dotprod},
    {"neon", &st_kernels_neon, always},
#endif
    {"ref", &st_kernels_ref, always},
};

enum { N_TABLES = sizeof tables / sizeof tables[0] };

const char *const *st_cpu_tables(void) {
    static const char *const names[] = {
#if defined(__x86_64__)
        "avx512vnni", "avxvnni", "avx2",
#elif defined(__aarch64__)
        "i8mm", "dotprod", "neon",
#endif
        "ref", NULL};
    return names;
}

int st_cpu_supports(const char *name) {
    for (int i = 0; i < N_TABLES; i++)
        if (strcmp(tables[i].name, name) == 0)
            return tables[i].supported();
    return 0;
}

const st_kernels *st_cpu_table(const char *name) {
    for (int i = 0; i < N_TABLES; i++)
        if (strcmp(tables[i].name, name) == 0 && tables[i].supported())
            return tables[i].kernels;
    return NULL;
}

const st_kernels *st_cpu_best(void) {
    int i = 0;
    while (!tables[i].supported()) /* the last row, ref, always is */
        i++;
    return tables[i].kernels;
}
