"""Workers of a Dask cluster (extra `cluster`): each process opens its own file, within its own budget, once.

Dask hands lines out and gives those of a worker that is lost to another one. A worker whose model cannot be opened, or
is another one, gets no more lines.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from smallthinker_edge.batch.task import Line, Task
from smallthinker_edge.batch.worker import Answer, Opening, Unfit, answer, error_fields, model_digest, open_for
from smallthinker_edge.errors import MissingExtra, SmallThinkerError
from smallthinker_edge.machine.memory import parse_memory
from smallthinker_edge.model import SmallThinker

if TYPE_CHECKING:
    from distributed import Future

logger = logging.getLogger(__name__)

MODEL_VARIABLE, MEMORY_VARIABLE = "SMALLTHINKER_MODEL", "SMALLTHINKER_MEMORY"
ANOTHER_MODEL = "its model is another one than the one that gave the answers so far"
GONE = "the scheduler is gone; the same command goes on when it is back"
LINES_EACH = 2  # given to a worker process: one that it computes, and the next one
SCHEDULER_SECONDS = 60.0  # that it has to answer
WORKER_SECONDS = 10.0  # that a worker has to come, where there is none that can
LOOK_SECONDS = 5.0  # between looks at which workers there are, while no answer comes


class Cluster:
    """The workers of a scheduler, those included that come later.

    Args:
        address: of the scheduler, "tcp://host:8786".
        opening: for workers whose environment has no SMALLTHINKER_MODEL or SMALLTHINKER_MEMORY of their own.
        expected: as of Worker.

    Raises MissingExtra without the extra, OSError where no scheduler answers, Unfit where it has no workers.
    """

    def __init__(self, address: str, task: Task, opening: Opening, expected: str | None) -> None:
        if find_spec("distributed") is None:
            raise MissingExtra("a Dask cluster needs distributed: pip install 'smallthinker_edge[cluster]'")
        from distributed import Client

        self._task, self._opening, self._expected = task, opening, expected
        self._unfit = dict[str, str]()  # address of a worker -> why
        self._lines: dict[Future, tuple[Line, list[str]]] = {}  # and the workers that may have it; none: all
        self._client = Client(address, timeout=SCHEDULER_SECONDS, set_as_default=False)
        try:
            if not self._fit_workers():
                raise Unfit(f"the scheduler at {address} has no workers")
        except BaseException:
            self._client.close()
            raise

    def has_room(self) -> bool:
        return len(self._lines) < LINES_EACH * max(1, len(self._present() - self._unfit.keys()))

    def submit(self, line: Line) -> None:
        """Raises Unfit where no worker is left."""
        workers = self._fit_workers() if self._unfit else []
        if self._unfit and not workers:
            raise Unfit("; ".join(f"worker {address}: {why}" for address, why in self._unfit.items()))
        future = self._client.submit(
            answer_on_worker, self._task, self._opening, self._expected, line, workers=workers or None, pure=False
        )
        self._lines[future] = line, workers

    def answers(self) -> Iterator[tuple[Line, Answer]]:
        """Raises SmallThinkerError where the scheduler is gone."""
        from distributed import CancelledError, TimeoutError, wait

        try:
            with self._client.as_current():
                done = wait(list(self._lines), timeout=LOOK_SECONDS, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            self._free_stuck()
            return
        except CancelledError as error:
            raise SmallThinkerError(GONE) from error
        for future in done:
            line, _ = self._lines.pop(future)
            found = self._result(future)
            if isinstance(found, str):  # the worker's address: it cannot, and the reason is noted
                self.submit(line)
            else:
                yield line, found

    def close(self) -> None:
        self._lines = {}
        self._client.close()

    def _result(self, future: Future) -> Answer | str:
        """The answer, or the address of a worker that will not be asked again."""
        from distributed import CancelledError, KilledWorker

        try:
            address, found = future.result()
        except KilledWorker as error:
            return Answer(error_fields("WorkerLost", str(error)), self._expected or "")
        except (OSError, CancelledError) as error:  # what fails on a worker is returned: this is the way from there
            raise SmallThinkerError(GONE) from error
        except Exception as error:
            raise SmallThinkerError(f"workers cannot answer: {type(error).__name__}: {error}") from error
        if isinstance(found, Answer):
            self._expected = self._expected or found.model
            others = self._present() - self._unfit.keys() - {address}
            if found.model != self._expected:
                found = ANOTHER_MODEL
            elif found.broken and others:
                found = str(found.fields["error"]["message"])
            else:
                return found
        if address not in self._unfit:
            logger.warning("worker %s gets no more lines: %s", address, found)
        self._unfit[address] = found
        return str(address)

    def _present(self) -> set[str]:
        try:
            return set(self._client.scheduler_info(n_workers=-1)["workers"])
        except (OSError, KeyError) as error:  # what is known of a scheduler that is gone is empty
            raise SmallThinkerError(GONE) from error

    def _fit_workers(self) -> list[str]:
        """Addresses of the workers that may be asked; waits a while for a first one."""
        end = time.monotonic() + WORKER_SECONDS
        while not (fit := self._present() - self._unfit.keys()) and time.monotonic() < end:
            time.sleep(1)
        return sorted(fit)

    def _free_stuck(self) -> None:
        """Lines that only workers may have which are gone are given to others."""
        present = self._present()
        for future, (line, workers) in list(self._lines.items()):
            if workers and not present & set(workers):
                del self._lines[future]
                future.cancel()
                self.submit(line)


_computing = threading.Lock()  # a worker process may have several threads; more than one at a time would gain nothing
_opened: tuple[tuple[Opening, bool], SmallThinker, str] | None = None


def answer_on_worker(task: Task, opening: Opening, expected: str | None, line: Line) -> tuple[str, Any]:
    """Runs on a worker: its address, and an Answer or why it cannot give any."""
    from distributed import get_worker

    address = get_worker().address
    try:
        with _computing:
            model, digest = _model_here(task, opening)
            if expected not in (None, digest):
                return address, ANOTHER_MODEL
            return address, answer(model, digest, task, line)
    except Exception as error:
        return address, f"{type(error).__name__}: {error}"


def _model_here(task: Task, opening: Opening) -> tuple[SmallThinker, str]:
    """The model of this process, opened where it is not; it stays for later runs. Raises as SmallThinker().

    Called by one thread at a time.
    """
    global _opened
    path = os.environ.get(MODEL_VARIABLE) or opening.path
    memory = os.environ.get(MEMORY_VARIABLE)
    opening = replace(opening, path=path, memory=parse_memory(memory) if memory else opening.memory)
    if not path:
        raise Unfit(f"no model is named: set {MODEL_VARIABLE}")
    if _opened is None or _opened[0] != (opening, task.is_structured):
        if _opened is not None:
            model, _opened = _opened[1], None
            model.close()
        model = open_for(task, opening)
        _opened = (opening, task.is_structured), model, model_digest(model)
    return _opened[1], _opened[2]
