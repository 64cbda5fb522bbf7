# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The engine: owns the weights, buffers, paging and thread team of one model, and hands them over to the forward pass.

Made by opening.py, filled by loading.py, run by session.py. It never opens files and never sees text. One Engine serves
one decode at a time: session.py takes a turn (locks.pyx) for each. A KVCache belongs to one session.
"""
cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from posix.unistd cimport getpid

from array import array

from smallthinker_edge._native.buffers cimport ModelBuffers
from smallthinker_edge._native.capture cimport MatrixInputs
from smallthinker_edge._native.call cimport (
    LOOK_NS, TIME_ATTENTION, TIME_EXPERTS, TIME_HEAD, TIME_OTHER, TIME_PARTS, TIME_WAITING, Call,
    check_finite, end_part)
from smallthinker_edge._native.core cimport *
from smallthinker_edge._native.forward cimport forward
from smallthinker_edge._native.head cimport selected_rows
from smallthinker_edge._native.kv_cache cimport KVCache
from smallthinker_edge._native.paging cimport ExpertPaging
from smallthinker_edge._native.router cimport Paging
from smallthinker_edge._native.session_memory cimport SessionMemory
from smallthinker_edge._native.weights cimport ModelWeights, Shape

from smallthinker_edge._native.layouts import KV_TYPES
from smallthinker_edge.errors import (
    DecodeCancelled, ExpertReadError, NotFiniteError, OpenedBeforeFork, OutOfMemoryError)

cdef enum:
    MOST_CPUS = 1024  # a cpu_set_t has no more
    ROWS_KEPT = 1024  # of an embedding that is read from the file: 6 MB of page cache for the 21B


@cython.no_gc_clear  # close() has an order
cdef class Engine:
    """The computing side of one model.

    Args:
        config: ModelConfig.
        threads: size of the team, >= 1.
        kernels: name of a kernel table; None picks the best of this CPU.
        batch: most tokens computed together; does not change the results.
        exact: keep every matrix as GGUF rows and compute in float32 (slow; the tests' yardstick).
        cpus: None, or for each thread the CPU it stays on (the caller's: while it computes).
        predictor: the LM head's predictor will be used, where the config has one.

    Attributes:
        weights: to be filled once. paging: None, or an ExpertPaging.
        memory: what sessions take; KVCaches and logits are made with it.
        routing: None, or a list that decode() adds to: bytes of int32 [n, L, K], the experts chosen.
        capture: None, or a MatrixInputs that decode() fills; no bit of a result depends on it.
        forget_rows: None, or what to call now and then where the embedding is read from a file.

    Afterwards decode() may be called, by one thread at a time. Methods raise OpenedBeforeFork in the child of a fork,
    and ValueError after close().
    """
    cdef readonly ModelWeights weights
    cdef readonly SessionMemory memory
    cdef readonly ExpertPaging paging
    cdef ModelBuffers buffers
    cdef Paging no_paging
    cdef Call call
    cdef st_sizing sizing
    cdef readonly int threads
    cdef public object forget_rows
    cdef public object routing
    cdef public MatrixInputs capture
    cdef int64_t rows_read              # since forget_rows was called
    cdef int64_t tail_ns                # of decode()'s time, after the last layer's last expert was in memory
    cdef int64_t head_rows, head_tokens  # computed by sparse heads
    cdef long process                   # that has the threads
    cdef bint closed
    cdef bint computing
    cdef object cancel                  # of the decode() under way
    cdef object interrupt               # the exception that stopped it

    def __cinit__(self, config, int threads, kernels=None, int64_t batch=512, bint exact=False, cpus=None,
                  bint predictor=True):
        cdef int[::1] place
        if threads < 1 or batch < 1:
            raise ValueError("threads and batch must be at least 1")
        self.threads, self.process = threads, getpid()
        self.weights = ModelWeights(config, kernels, exact)
        self.memory = SessionMemory(config, batch)
        self.buffers = ModelBuffers(config, batch, threads, predictor)
        self.call.weights, self.call.buffers = &self.weights.weights, &self.buffers.buffers
        self.call.paging = &self.no_paging
        self.call.caller, self.call.interrupted = <void *>self, interrupted
        if cpus is None:
            self.call.team = st_team_create(threads, NULL)
        else:
            places = array("i", cpus)
            if len(places) != threads or not all(0 <= cpu < MOST_CPUS for cpu in places):
                raise ValueError(f"one CPU in 0..{MOST_CPUS - 1} is needed for every thread")
            place = places
            self.call.team = st_team_create(threads, &place[0])
        if self.call.team == NULL:
            raise OutOfMemoryError("cannot start the threads")
        st_sizing_init(&self.sizing, threads)

    def __dealloc__(self):
        self.close()

    def close(self):
        """Ends the threads, waits for reads in flight, and gives files and memory back. Safe to call twice.

        RuntimeError while decode() runs.
        """
        if self.computing and self.process == getpid():
            raise RuntimeError("the model cannot be closed while it is computing")
        self.closed = True
        with nogil:
            st_team_destroy(self.call.team)
            self.call.team = NULL
        self.call.paging = &self.no_paging
        if self.paging is not None:
            self.paging.give_back()
        if self.buffers is not None:
            self.buffers.give_back()
        if self.weights is not None:
            self.weights.give_back()
        self.forget_rows = None

    def check_usable(self):
        """Raises what the class says where the engine is closed or belongs to another process."""
        if self.process != getpid():
            raise OpenedBeforeFork(
                "the model was opened before this process was forked; open it in the process that uses it")
        if self.closed:
            raise ValueError("the model is closed")

    @property
    def config(self):
        """The ModelConfig."""
        return self.weights.config

    @property
    def bytes(self):
        """Bytes of weights, buffers and expert slots (rows that are read from the file not counted)."""
        paged = 0 if self.paging is None else self.paging.bytes
        return self.weights.bytes + self.buffers.bytes + paged

    @property
    def threads_in_use(self):
        """Threads that the next token will use: fewer than there are where another program takes a CPU."""
        return self.sizing.size

    @property
    def buffer_bytes(self):
        """Bytes of the buffers, as far as they were needed up to now."""
        return self.buffers.bytes

    def load(self):
        """Reads and packs the weights that were given to `weights` since the last call, on all threads.

        Raises ModelFormatError where a file has them no longer, OSError where it cannot be read, OutOfMemoryError; then
        this engine is of no further use.
        """
        self.check_usable()
        st_team_resize(self.call.team, self.threads)
        try:
            self.weights.load(self.call.team, interrupted, <void *>self, LOOK_NS)
        finally:
            interrupt, self.interrupt = self.interrupt, None
            if interrupt is not None:
                raise interrupt

    def page_experts(self, ExpertPaging paging not None, types):
        """Takes the experts from there instead of ModelWeights.set_experts().

        types: per layer, the type numbers of gate, up and down.
        """
        cdef int64_t l
        self.check_usable()
        for l in range(self.weights.weights.shape.layers):
            self.weights.set_expert(self.weights.layer(l), types[l])
        self.paging = self.memory.paging = paging
        self.call.paging = &paging.state
        paging.fit(self.memory.in_use)

    def keep_to(self, int64_t aside, limit, int64_t context, kv):
        """Lets sessions take `limit` bytes, None for any number, see SessionMemory; besides the buffers that one of
        this context and kind of KV cache needs, which are taken now. Weights, or paging, must be there."""
        self.check_usable()
        self.buffers.fit(context, ST_Q8_0 in KV_TYPES[kv], self.weights.expert_layouts)
        self.memory.aside, self.memory.limit = aside, limit

    def decode(self, KVCache cache not None, tokens, logits, head_threshold=None, cancel=None, allowed=None):
        """Runs at most `batch` tokens at the cache's position and advances it.

        Args:
            cache: made with this engine's memory, with room for the tokens.
            tokens: int32 [n], 1 <= n <= cache.room(), each below the vocabulary's size.
            logits: float32 [n, V] for all tokens, [1, V] for the last one, or None; filled in place.
            head_threshold: with a predictor, only logits whose score is above it are computed, the others are minus
                infinity (but all, where no score is). None, or no predictor: all.
            cancel: anything with is_set(), or None; looked at about every 50 ms, as is Ctrl-C in the main thread.
            allowed: uint32 [ceil(V / 32)], bits of the only rows to compute for the last token; the others are minus
                infinity. None: see head_threshold, which counts for nothing otherwise.

        Raises ExpertReadError when experts, or rows of an embedding, cannot be read, DecodeCancelled when cancelled,
        NotFiniteError where a value of attention or a logit is not finite: the cache's position stays, and decoding may
        be retried.
        """
        cdef Call *call = &self.call
        cdef const int32_t[::1] ids = tokens
        cdef uint8_t[::1] trace
        cdef int64_t n = ids.shape[0]
        cdef bint stopped, done
        self.check_usable()
        self.check_arguments(cache, ids)
        self.set_logits(logits, n, head_threshold, allowed)
        self.fit_buffers(cache)
        self.buffers.fill_rope(&self.weights.weights.shape, cache.position, n)
        if self.paging is not None:
            self.paging.fit(self.memory.in_use)
        cache.prepare(n)
        call.kv, call.tokens, call.n, call.position = cache.view, &ids[0], n, cache.position
        chosen, call.trace = None, NULL
        if self.routing is not None:
            chosen = bytearray(n * call.weights.shape.layers * call.weights.shape.used * sizeof(int32_t))
            trace = chosen
            call.trace = <int32_t *>&trace[0]
        call.capture = NULL if self.capture is None else &self.capture.capture
        self.cancel, self.interrupt = cancel, None
        self.computing = True  # from here to where it is False again nothing raises
        with nogil:
            stopped = self.run()
        done = not (stopped or call.failed or call.no_row or call.not_finite)
        cache.advance(&ids[0], n, done)
        self.computing = False
        self.rows_read += n
        if done:
            if call.sparse_head:
                self.count_head_rows(n if call.all_logits else 1)
            if chosen is not None:
                self.routing.append(bytes(chosen))
        if self.forget_rows is not None and self.rows_read >= ROWS_KEPT:
            self.rows_read = 0
            self.forget_rows()
        interrupt, self.cancel, self.interrupt = self.interrupt, None, None
        if stopped:
            raise interrupt
        if call.no_row:
            raise ExpertReadError("a row of the embedding cannot be read from the file; nothing was decoded")
        if call.failed:
            raise ExpertReadError("expert weights in the file cannot be read or are damaged; nothing was decoded")
        if call.not_finite:
            raise NotFiniteError("the model's weights give values that are not finite; nothing was decoded")

    cdef int fit_buffers(self, KVCache cache) except -1:
        """Takes the buffers that a cache needs, which count where they are more than the plan's, for good."""
        cdef bint q8 = ST_Q8_0 in KV_TYPES[cache.kv]
        cdef int64_t more = self.buffers.lacks(cache.context, q8)
        if more:
            self.memory.take(more, f"attention over {cache.context} positions in {cache.kv}")
        self.buffers.fit(cache.context, q8, self.weights.expert_layouts)
        return 0

    cdef int check_arguments(self, KVCache cache, const int32_t[::1] ids) except -1:
        cdef int64_t n = ids.shape[0], i, vocab = self.weights.weights.shape.vocab
        if self.capture is not None and not 2 <= n <= self.capture.capture.tokens:
            raise ValueError(f"inputs of 2 to {self.capture.capture.tokens} tokens can be captured, not of {n}")
        if self.computing:
            raise RuntimeError("the model is computing already")
        if not 1 <= n <= cache.room() or cache.position + n > cache.context or cache.memory is not self.memory:
            raise ValueError("too many tokens, or none, or another engine's cache")
        for i in range(n):
            if not 0 <= ids[i] < vocab:
                raise ValueError(f"token {ids[i]} is outside the vocabulary of {vocab}")
        return 0

    cdef int set_logits(self, logits, int64_t n, head_threshold, allowed) except -1:
        """Where the call's logits go, and which of them are asked for. `logits` and `allowed` must outlive the call."""
        cdef Call *call = &self.call
        cdef float[:, ::1] out
        cdef const uint32_t[::1] bits
        call.logits, call.all_logits, call.sparse_head, call.allowed = NULL, 0, 0, NULL
        if logits is None:
            return 0
        out = logits
        if out.shape[1] != call.weights.shape.vocab or out.shape[0] not in (1, n):
            raise ValueError("logits has the wrong shape")
        call.logits, call.all_logits = &out[0, 0], out.shape[0] == n
        if allowed is not None:
            bits = allowed
            if out.shape[0] != 1 or bits.shape[0] != (call.weights.shape.vocab + 31) // 32:
                raise ValueError("allowed has the wrong shape, or there are several rows of logits")
            call.all_logits, call.allowed = 0, &bits[0]
        elif head_threshold is not None and call.weights.predictor_in.rows > 0:
            call.sparse_head, call.head_threshold = 1, head_threshold
        return 0

    cdef bint run(self) noexcept nogil:
        """The forward pass with what is set in the call; whether it was stopped before its end."""
        cdef Call *call = &self.call
        cdef Paging *paging = call.paging
        cdef int64_t began, waited
        cdef bint stopped
        call.failed = call.no_row = call.not_finite = 0
        call.part_at = st_nanoseconds()
        call.look_at = call.part_at + LOOK_NS
        if paging.pager != NULL:
            st_pager_interrupt(paging.pager, 0)
        began, waited = call.part_at, call.time_ns[TIME_WAITING]
        st_team_resize(call.team, self.sizing.size if call.n == 1 else self.threads)
        st_team_run(call.team, forward, call, call.n)
        stopped = st_team_stopped(call.team)
        if call.n == 1 and not (stopped or call.failed or call.no_row):
            self.size_team(st_nanoseconds() - began, call.time_ns[TIME_WAITING] - waited)
        if call.logits != NULL and not (stopped or call.failed or call.no_row):
            end_part(call, 0, TIME_HEAD)
        if paging.pager != NULL:
            self.tail_ns += st_pager_since_arrival(paging.pager)
            st_pager_release(paging.pager, paging.held, paging.n_held)
            paging.n_held = 0
            if call.failed or call.no_row or stopped:
                st_pager_ahead(paging.pager, NULL, 0)
        if not (call.failed or call.no_row or stopped):
            self.check_logits()
        end_part(call, 0, TIME_OTHER)
        return stopped

    cdef void size_team(self, int64_t took, int64_t waited) noexcept nogil:
        """How many threads the next token uses, after one that took so long, nanoseconds, and waited for experts in it:
        sleep meanwhile says nothing of the CPUs."""
        cdef int64_t slept = st_team_slept(self.call.team) if waited == 0 else 0
        st_sizing_token(&self.sizing, (took - waited) / 1e9, slept / 1e9)

    cdef void check_logits(self) noexcept nogil:
        """Marks the call where a logit is not finite, but for the minus infinity of a row that was not computed."""
        cdef Call *call = &self.call
        cdef int64_t i, size = (call.n if call.all_logits else 1) * call.weights.shape.vocab
        if call.logits == NULL:
            return
        if not call.sparse_head and call.allowed == NULL:
            check_finite(call, call.logits, size)
            return
        for i in range(size):
            if not call.logits[i] < INFINITY:  # NaN too
                call.not_finite = 1

    cdef void count_head_rows(self, int64_t n) noexcept:
        cdef int64_t t, selected
        for t in range(n):
            selected = selected_rows(&self.call, t)
            self.head_rows += selected if selected else self.weights.weights.shape.vocab
        self.head_tokens += n

    @property
    def head_share(self):
        """Share of the head's rows that decode() with a threshold has computed so far; None where it never did."""
        total = <double>self.head_tokens * self.weights.weights.shape.vocab
        return self.head_rows / total if self.head_tokens else None

    def times(self):
        """Seconds spent in decode() so far, and the parts that make them up; see SmallThinker.stats()."""
        cdef int64_t *ns = self.call.time_ns
        cdef int64_t total = 0
        cdef int part
        for part in range(TIME_PARTS):
            total += ns[part]
        return {
            "decode_seconds": total / 1e9, "attention_seconds": ns[TIME_ATTENTION] / 1e9,
            "expert_seconds": ns[TIME_EXPERTS] / 1e9, "head_seconds": ns[TIME_HEAD] / 1e9,
            "wait_seconds": ns[TIME_WAITING] / 1e9, "other_seconds": ns[TIME_OTHER] / 1e9,
        }

    def paging_stats(self):
        """ExpertPaging.stats() and the seconds that go with them; {} where nothing is paged."""
        if self.paging is None:
            return {}
        return self.paging.stats() | {"tail_seconds": self.tail_ns / 1e9}

    def final_states(self, float[:, ::1] out not None):
        """What the head was applied to in the last decode() of n tokens: float32 [n, d], filled in place."""
        cdef Call *call = &self.call
        cdef const Shape *shape = &self.weights.weights.shape
        cdef int64_t t
        self.check_usable()
        if out.shape[0] != call.n or out.shape[1] != shape.d:
            raise ValueError("out has the wrong shape")
        for t in range(call.n):
            call.weights.kernels.rmsnorm(call.buffers.x + t * shape.d_padded, call.weights.output_norm, shape.d,
                                         shape.eps, &out[t, 0])


cdef bint interrupted(void *caller) noexcept with gil:
    """Whether to stop; decode() or load() raises the reason when the threads have come back."""
    cdef Engine engine = <Engine>caller
    try:
        PyErr_CheckSignals()
        if engine.cancel is not None and engine.cancel.is_set():
            raise DecodeCancelled("decoding was cancelled")
    except BaseException as error:
        engine.interrupt = error
    return engine.interrupt is not None
