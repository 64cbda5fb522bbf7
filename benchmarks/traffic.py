"""How many bytes of weights and KV cache one decoded token has to read, from a model file's tensors.

Called by compare.py, which divides by the time of a token. It counts what the layouts make necessary, once each;
activations, norms' scratch and what caches keep are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from smallthinker_edge.files.config import ModelConfig, tensor_name
from smallthinker_edge.files.gguf import TensorInfo

KV_ELEMENT_BYTES = 2  # fp16 keys and values
# Types whose silent neurons are skipped, and the share of their bytes that scales and minima are.
SCALES = {"Q4_0": 2 / 18, "Q4_K": 16 / 144, "Q5_K": 16 / 176, "Q6_K": 18 / 210}


@dataclass(frozen=True)
class Traffic:
    """Bytes per token.

    Attributes:
        dense: attention, router, norms and head, and one row of the embedding.
        experts: of the experts used: gate whole, up's rows and down's numbers of active neurons, all scales of down.
        experts_whole: of the same experts, nothing skipped.
        kv_position: keys and values of one position in the layers without a window.
        kv_position_window: the same in the layers that attend to a window.
        window: positions of the window.
    """

    dense: int
    experts: int
    experts_whole: int
    kv_position: int
    kv_position_window: int
    window: int

    def at(self, position: float) -> float:
        """Bytes of a token that attends to `position` positions."""
        return self.dense + self.experts + self._kv(position)

    def whole_at(self, position: float) -> float:
        """The same for an engine that skips nothing."""
        return self.dense + self.experts_whole + self._kv(position)

    def _kv(self, position: float) -> float:
        windowed = min(position, self.window) if self.window else position
        return self.kv_position * position + self.kv_position_window * windowed

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def traffic_of(tensors: Mapping[str, TensorInfo], config: ModelConfig, active: float) -> Traffic:
    """Traffic of a model of which the share `active` of a used expert's neurons is active.

    Skipping is counted where the engine skips: up and down in types of SCALES, a transposed down in Q4_0, the gate in
    one of them or in Q8_0; other experts count whole.
    """
    embedding = tensors[tensor_name("token_embd")]
    row = embedding.nbytes // config.vocab_size
    unread = tensor_name("lm_head_profiler")  # a whole head does not ask its predictor
    dense = row + sum(t.nbytes for name, t in tensors.items() if not name.endswith("_exps.weight") and name != unread)
    if not config.tied:
        dense -= embedding.nbytes  # else it is the head, and read whole
    used = config.n_experts_used / config.n_experts
    experts = whole = 0.0
    for layer in range(config.n_layers):
        gate, up, down = (tensors[tensor_name(f"ffn_{part}_exps", layer)] for part in ("gate", "up", "down"))
        everything = used * (gate.nbytes + up.nbytes + down.nbytes)
        whole += everything
        sparse = {gate.type, up.type, down.type} <= {*SCALES, "Q8_0"} and "Q8_0" not in (up.type, down.type)
        if sparse and (down.type == "Q4_0" or not config.down_transposed):
            read = active if config.down_transposed else 1.0  # a neuron's own scales, or shared by 16 or 32
            read_of_down = SCALES[down.type] * read + active * (1 - SCALES[down.type])
            experts += used * (gate.nbytes + active * up.nbytes + read_of_down * down.nbytes)
        else:
            experts += everything
    per_layer = 2 * KV_ELEMENT_BYTES * config.n_kv_heads * config.head_dim
    windowed = sum(config.window_layout) if config.window else 0
    return Traffic(
        dense=dense,
        experts=round(experts),
        experts_whole=round(whole),
        kv_position=per_layer * (config.n_layers - windowed),
        kv_position_window=per_layer * windowed,
        window=config.window,
    )
