/* CPU detection and the choice of a kernel table. A new instruction set is one file of kernels and one line in
 * `tables`. Called once when a model is opened; it holds no state. */
#include "smallthinker/cpu.h"

#include <string.h>

#if defined(__x86_64__)
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

/* AVX-VNNI is CPUID leaf 7, subleaf 1, EAX bit 4; older compilers have no name for it. */
static int has_avxvnni(void) {
    unsigned a = 7, b = 0, c = 1, d = 0;
    if (!has_avx2())
        return 0;
    __asm__ __volatile__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return (a >> 4) & 1;
}

static int has_avx512vnni(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
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
