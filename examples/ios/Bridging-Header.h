/* Makes the C files of examples/c visible to Swift; they register the linked plugin. */
#include "bitcompile_model.h"
