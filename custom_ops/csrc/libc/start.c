/* Where Android starts a program: its NDK has the same in crtbegin_dynamic.o. The dynamic linker
 * has run the constructors; what remains is to give the C library the arguments, and main. */
#include <stddef.h>

int main(int count, char **arguments);

/* Of a program that is linked dynamically only the last of its first three is looked at. */
typedef struct {
  void *preinit, *init, *fini, *unused[5];
} Structors;

void __libc_init(void *stack, void (*unused)(void), int (*main)(int, char **),
                 const Structors *structors) __attribute__((noreturn));

__attribute__((used, noreturn)) static void begin(void *stack) {
  static const Structors none;
  __libc_init(stack, NULL, main, &none);
}

__asm__(".globl _start\n_start:\n\tmov x29, #0\n\tmov x30, #0\n\tmov x0, sp\n\tb begin\n");
