/* A decoder language model made by `bitcompile build`, through the C API of ONNX Runtime.
 *
 * Copy bitcompile_model.[ch] into your project. They need C11 and onnxruntime_c_api.h of ONNX
 * Runtime 1.23 or newer; C++ and Swift call them as they are. A function that can fail returns
 * NULL, or a message that stays valid until the thread's next call. One thread at a time may use a
 * model; several models may share one process and, through the page cache, one file of weights. */
#ifndef BITCOMPILE_MODEL_H
#define BITCOMPILE_MODEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct bcm_model bcm_model;

typedef struct {
  const char *folder;  /* the artifact: model.onnx and model.onnx.data, as plain files */
  const char *library; /* plugin; NULL: libbitcompile_ops.so in the folder, or the linked one */
  size_t capacity;     /* most tokens the KV cache holds: prompt and answer, all turns */
  int threads;         /* 0: one a core. On a phone: the big cores only */
  int spinning;        /* 1: idle threads spin between operators; faster, and warmer */
} bcm_options;

const char *bcm_open(const bcm_options *options, bcm_model **model);

/* Reads `count` tokens behind those the cache holds. `logits` becomes float32 [bcm_vocabulary] of
 * the last token; they stay valid until the next call. */
const char *bcm_feed(bcm_model *model, const int64_t *tokens, size_t count, const float **logits);

size_t bcm_vocabulary(const bcm_model *model);

/* Bytes of the KV cache, allocated whole when the model is opened. */
size_t bcm_cache_bytes(const bcm_model *model);

/* Tokens the cache holds. */
size_t bcm_length(const bcm_model *model);

/* Forgets every token but the first `length`; 0 starts anew. Costs nothing. */
void bcm_rewind(bcm_model *model, size_t length);

/* The token with the greatest logit. */
int64_t bcm_argmax(const float *logits, size_t count);

void bcm_close(bcm_model *model);

#ifdef __cplusplus
}
#endif
#endif
