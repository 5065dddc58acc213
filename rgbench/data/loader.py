"""Batches of a run in the order of its steps, one rank's share of each, read ahead by threads where asked for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from rgbench.data.contract import Batch, DataSource
from rgbench.data.sampler import batch_indices


class BatchLoader:
    """Micro-batches by (step, number): what is read ahead changes when it is read, never what.

    Threads, not processes: decoding leaves Python's lock, nothing has to be sent between processes, and none is
    orphaned by a kill.

    Args:
        source: the data.
        seed: the run's.
        batch_size: images per optimiser step over all ranks.
        positions: this rank's, in the global batch.
        num_micro: micro-batches they are read in; divides their number.
        num_workers: threads that read ahead; 0 reads when asked.
        steps: of the run; nothing is read beyond.
    """

    def __init__(
        self,
        source: DataSource,
        seed: int,
        batch_size: int,
        positions: Sequence[int],
        num_micro: int = 1,
        num_workers: int = 0,
        steps: int | None = None,
    ) -> None:
        self.source, self.seed, self.batch_size, self.steps = source, seed, batch_size, steps
        each = len(positions) // num_micro
        self.micro = [positions[i * each : (i + 1) * each] for i in range(num_micro)]
        self.num_workers = num_workers
        self._threads: ThreadPoolExecutor | None = None
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}

    def load(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step.

        Raises:
            UsageError: data that cannot be read, see :meth:`DataSource.load`.
        """
        if not self.num_workers:
            return [self._read(step, micro) for micro in range(len(self.micro))]
        self._read_ahead(step)
        return [self._ahead.pop((step, micro)).result() for micro in range(len(self.micro))]

    def close(self) -> None:
        """End the threads; what they had not begun is dropped."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None
        self._ahead.clear()

    def _read(self, step: int, micro: int) -> Batch:
        indices = batch_indices(self.seed, step, self.batch_size, self.source.length)
        positions = self.micro[micro]
        return self.source.load(indices[positions[0] : positions[-1] + 1].tolist())

    def _read_ahead(self, step: int) -> None:
        """Have this step and as many micro-batches beyond it as there are threads on their way."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.num_workers, thread_name_prefix="rgbench-data")
        beyond = -(-self.num_workers // len(self.micro))
        last = step + beyond if self.steps is None else min(step + beyond, self.steps - 1)
        for later in range(step, max(last, step) + 1):
            for micro in range(len(self.micro)):
                if (later, micro) not in self._ahead:
                    self._ahead[later, micro] = self._threads.submit(self._read, later, micro)
