/* What compilers call for atomic operations on AArch64, where their own library would use a CPU's
 * LSE instructions if it has them. Here by exclusive loads and stores, which every CPU has. Names
 * and meaning: LLVM's compiler-rt, lib/builtins/aarch64/lse.S. */
#include <stdint.h>

uint8_t __aarch64_swp1_relax(uint8_t value, uint8_t *at);
uint64_t __aarch64_ldadd8_rel(uint64_t value, uint64_t *at);

uint8_t __aarch64_swp1_relax(uint8_t value, uint8_t *at) {
  uint8_t old;
  uint32_t failed;
  do
    __asm__ volatile("ldxrb %w0, %2\n\tstxrb %w1, %w3, %2"
                     : "=&r"(old), "=&r"(failed), "+Q"(*at)
                     : "r"(value)
                     : "memory");
  while (failed);
  return old;
}

uint64_t __aarch64_ldadd8_rel(uint64_t value, uint64_t *at) {
  uint64_t old, sum;
  uint32_t failed;
  do
    __asm__ volatile("ldxr %0, %3\n\tadd %1, %0, %4\n\tstlxr %w2, %1, %3"
                     : "=&r"(old), "=&r"(sum), "=&r"(failed), "+Q"(*at)
                     : "r"(value)
                     : "memory");
  while (failed);
  return old;
}
