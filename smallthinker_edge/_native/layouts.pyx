# cython: boundscheck=False, wraparound=False, cdivision=True
"""What the C core says of types, experts and kinds of KV cache: the lists of types.h, expert.h and kv.h.

Called wherever Python needs one of them, so that none is written twice. It computes nothing.
"""
from collections import namedtuple

from libc.stdint cimport int64_t, uint8_t

from smallthinker_edge._native.core cimport *

TypeInfo = namedtuple("TypeInfo", "number columns bytes tiled sparse")


def _types():
    """(those that can be read, numbers of the others -> their names), in the order of their numbers."""
    cdef int number
    cdef const st_type_info *type
    read, others = {}, {}
    for number in range(ST_TYPE_NUMBERS):
        type = st_type_of(number)
        if type == NULL:
            continue
        name = type.name.decode()
        if type.bytes:
            read[name] = TypeInfo(number, type.columns, type.bytes, st_tiled(number) >= 0, bool(st_sparse(number)))
        else:
            others[number] = name
    return read, others


TYPES, OTHER_TYPES = _types()


def _kv_types():
    cdef int i = 0
    kinds = {}
    while st_kv_kind_at(i) != NULL:
        kinds[st_kv_kind_at(i).name.decode()] = (st_kv_kind_at(i).full, st_kv_kind_at(i).window)
        i += 1
    return kinds


KV_TYPES = _kv_types()


# Names of ST_EXPERT_ROWS, ST_EXPERT_TILES and ST_EXPERT_SPARSE, by their numbers.
EXPERT_LAYOUTS = ("rows", "tiles", "sparse")


def kv_kinds(int64_t head_dim, bint windows):
    """The kinds of KV cache that heads of this width fit, largest first; windows: the model has window layers, without
    which kinds that differ in these are one."""
    fit = {}
    for name, types in KV_TYPES.items():
        if all(st_kv_head_bytes(type_, head_dim) for type_ in types):
            fit.setdefault(types if windows else types[0], name)
    return list(fit.values())


cdef class Expert:
    """How one expert of a layer stands in its blob (expert.h).

    Args:
        d, f: width of the model, neurons. types: numbers of the types of gate, up and down.
        transposed: down is stored neuron by neuron.

    Raises ValueError for types that cannot be read, or whose blocks the sizes do not fit.
    """
    cdef st_expert e

    def __cinit__(self, int64_t d, int64_t f, types, bint transposed):
        gate, up, down = types
        if st_expert_init(&self.e, d, f, gate, up, down, transposed, True) < 0:
            raise ValueError("experts of a type that cannot be read, or sizes that do not fit it")

    @property
    def sizes(self):
        """Bytes of gate, up and down as GGUF rows."""
        return self.e.rows[0], self.e.rows[1], self.e.rows[2]

    @property
    def layout(self):
        """One of EXPERT_LAYOUTS."""
        return EXPERT_LAYOUTS[self.e.layout]

    @property
    def bytes(self):
        """Of the blob, without padding."""
        return self.e.bytes

    def pack(self, const uint8_t[::1] gate, const uint8_t[::1] up, const uint8_t[::1] down, uint8_t[::1] blob):
        """GGUF rows to a blob. ValueError where sizes do not fit."""
        self.check(gate.shape[0], up.shape[0], down.shape[0], blob.shape[0])
        st_expert_pack(&self.e, &gate[0], &up[0], &down[0], &blob[0])

    def unpack(self, const uint8_t[::1] blob, uint8_t[::1] gate, uint8_t[::1] up, uint8_t[::1] down):
        """And back."""
        self.check(gate.shape[0], up.shape[0], down.shape[0], blob.shape[0])
        st_expert_unpack(&self.e, &blob[0], &gate[0], &up[0], &down[0])

    cdef int check(self, size_t gate, size_t up, size_t down, size_t blob) except -1:
        if gate != self.e.rows[0] or up != self.e.rows[1] or down != self.e.rows[2] or blob < self.e.bytes:
            raise ValueError("an expert's bytes do not match its shape and types")
        return 0
