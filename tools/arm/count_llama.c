/* Decodes N fixed tokens one by one with llama.cpp: what tools/arm/count_tokens.py counts beside this library. Usage:
 * count_llama MODEL N; prints the token with the largest logit after the last one. One thread, llama.cpp's defaults. */
#include "llama.h"

#include <stdio.h>
#include <stdlib.h>

static void only_errors(enum ggml_log_level level, const char *text, void *data) {
    (void)data;
    if (level == GGML_LOG_LEVEL_ERROR)
        fputs(text, stderr);
}

static void fail(const char *what) {
    fprintf(stderr, "count_llama: %s\n", what);
    exit(1);
}

int main(int argc, char **argv) {
    if (argc != 3)
        fail("usage: count_llama MODEL N");
    llama_log_set(only_errors, NULL);
    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model)
        fail("the model does not load");
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = 512;
    params.n_threads = params.n_threads_batch = 1;
    struct llama_context *context = llama_init_from_model(model, params);
    if (!context)
        fail("no context");
    int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (int i = 0; i < atoi(argv[2]); i++) {
        llama_token token = (i * 7919 + 11) % vocabulary;
        if (llama_decode(context, llama_batch_get_one(&token, 1)))
            fail("decoding");
    }
    const float *logits = llama_get_logits_ith(context, -1);
    int best = 0;
    for (int i = 1; i < vocabulary; i++)
        if (logits[i] > logits[best])
            best = i;
    printf("%d\n", best);
    return 0;
}
