# cython: boundscheck=False, wraparound=False
"""Where a decode call leaves what the matrices of some layers were multiplied with; see capture.pxd."""
import numpy as np


cdef class MatrixInputs:
    """Room for the inputs of a call's matrices: engine.capture = MatrixInputs(...).

    Args:
        config: ModelConfig. first, layers: which layers.
        tokens: most of a call, at least 2; a call of one is refused.

    Attributes, whose first tokens each call fills:
        attention: float32 [layers, tokens, d_model], what q, k and v were multiplied with.
        output: float32 [layers, tokens, n_heads * head_dim], the output projection.
        ffn: float32 [layers, tokens, d_model], gate and up.
        neurons: float32 [layers, tokens, n_experts_used, d_ffn], down of the chosen experts, in ascending order;
            rounded as the experts' kernels round it.
    """

    def __cinit__(self, config, int64_t tokens, int64_t first, int64_t layers):
        cdef float[:, :, ::1] attention, output, ffn
        cdef float[:, :, :, ::1] neurons
        if tokens < 2 or layers < 1 or first < 0 or first + layers > config.n_layers:
            raise ValueError("at least two tokens and one of the model's layers are needed")
        self.attention = np.zeros((layers, tokens, config.d_model), np.float32)
        self.output = np.zeros((layers, tokens, config.n_heads * config.head_dim), np.float32)
        self.ffn = np.zeros((layers, tokens, config.d_model), np.float32)
        self.neurons = np.zeros((layers, tokens, config.n_experts_used, config.d_ffn), np.float32)
        attention, output, ffn, neurons = self.attention, self.output, self.ffn, self.neurons
        self.capture.first, self.capture.layers, self.capture.tokens = first, layers, tokens
        self.capture.attention, self.capture.output = &attention[0, 0, 0], &output[0, 0, 0]
        self.capture.ffn, self.capture.neurons = &ffn[0, 0, 0], &neurons[0, 0, 0, 0]
