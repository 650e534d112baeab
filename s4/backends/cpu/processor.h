// The best instruction set that there is code for and this processor has, by what it says itself: compilers differ in
// what they can ask it.

#if defined(__x86_64__)
const char* processor() {
    unsigned a, b, c, d, known, wide, saved;
    if (!__get_cpuid(1, &a, &b, &known, &d) || !(known & bit_OSXSAVE) || !__get_cpuid_count(7, 0, &a, &wide, &c, &d))
        return "base";
    asm volatile("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));  // the registers that the system keeps when threads take turns
    const auto all = [](unsigned has, unsigned needs) { return (has & needs) == needs; };
    if (!all(saved, 0x06) || !all(known, bit_AVX | bit_FMA) || !all(wide, bit_AVX2)) return "base";
    const unsigned v4 = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    return all(saved, 0xe6) && all(wide, v4) ? "v4" : "v3";
}
#else
const char* processor() { return "base"; }
#endif
