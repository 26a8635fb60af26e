/* The bitcompile operators as a static library: link lib*.a beside this header into your program,
 * and give the function to ONNX Runtime before a session is made. C and C++. */
#ifndef BITCOMPILE_H
#define BITCOMPILE_H

#ifdef __cplusplus
extern "C" {
#endif

struct OrtApiBase;
struct OrtSessionOptions;
struct OrtStatus;

/* Adds operator domain "bitcompile" to the options: NULL, or a status that says what is wrong (to
 * be released by OrtApi.ReleaseStatus). Call it with OrtGetApiBase(). It has the signature that
 * OrtApi.RegisterCustomOpsUsingFunction looks up by name, and that the Objective-C method
 * registerCustomOpsUsingFunctionPointer takes. */
struct OrtStatus *bitcompile_RegisterCustomOps(struct OrtSessionOptions *options,
                                               const struct OrtApiBase *api);

#ifdef __cplusplus
}
#endif

#endif
