"""Runs a DALI graph over encoded batches: prefetches, and recovers from batches it cannot decode."""

from __future__ import annotations

import gc
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import util
from typing import Any

import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from synco_fast.data.pipelines.dali.reader import EncodedBatch, Reader

__all__ = ["GraphRunner"]

#: Height and width of the image that a new graph decodes first.
_BLANK = (256, 256)

#: Errors that no file causes, though they may come from the graph: those of the device.
_NOT_BY_A_FILE = (torch.OutOfMemoryError, torch.AcceleratorError)

Inputs = Callable[[EncodedBatch], dict[str, NDArray[Any]]]
#: A batch with the arrays fed beside its files, kept alive because DALI reads them in place. An empty batch has no
#: arrays.
_Fed = tuple[EncodedBatch, dict[str, NDArray[Any]]]


class _WrongOutputs(RuntimeError):
    """DALI decoded images to something else than their headers say; the graph still works."""


def _spare_inherited(runner: type[GraphRunner]) -> None:
    """In a forked worker: never free a graph of the training process, whose threads do not exist here."""
    gc.freeze()


class GraphRunner:
    """Feeds a graph and yields its outputs, a few batches ahead.

    A file that DALI cannot decode fails the batch and the graph. Then the graph is rebuilt, the batches in flight are
    run one by one, and the one that fails again is decoded by Pillow, which names the corrupt images. The failed images
    are remembered and never reach DALI's decoder again. So are those that it decodes to something else than expected.

    Args:
        build: Builds the graph.
        inputs: Computes its inputs beside ``encoded`` from a batch.
        reader: Reads images again.
        batch: B, the most images at a time.
        device: Index of the GPU, or None.
        depth: Batches in flight.
        gather: Makes tensors of the graph's outputs, on the device; by default one of each, all rows of one shape.
        wrong: Rows of the outputs that are not what the batch says; by default none.
    """

    def __init__(
        self,
        build: Callable[[], Pipeline],
        inputs: Inputs,
        reader: Reader,
        *,
        batch: int,
        device: int | None,
        depth: int,
        gather: Callable[[Any], list[Tensor]] | None = None,
        wrong: Callable[[list[Tensor], EncodedBatch], list[int]] = lambda outputs, batch: [],
    ) -> None:
        self._wrong = wrong
        self._gather = gather or (lambda outputs: [from_dlpack(views.as_tensor()) for views in outputs])
        self._build, self._inputs, self._reader, self._device, self._depth = build, inputs, reader, device, depth
        #: Blank images in a new graph's first batches, see `_start`. The CPU has no other decoder to share them with.
        self._blank = 1 if device is None else batch
        self._graph: Pipeline | None = None
        #: The arrays of finished batches, kept for a while: a copy to the GPU may still be in flight.
        self._done: deque[_Fed] = deque(maxlen=depth)
        self._failed: set[int] = set()
        self._held: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()
        #: The batches in flight, a new list in each run.
        self._under_way: deque[_Fed] = deque()

    def run(self, batches: Iterable[EncodedBatch]) -> Iterator[tuple[EncodedBatch, list[Tensor]]]:
        """Each batch with the graph's outputs, (b, size, size, 3) each, on the graph's device; none where b is 0.

        The graph prepares the next batches while the caller works on one. A run that begins ends the one before, if
        that was left in the middle and is still referenced, as by the traceback of an error in a notebook.

        Raises:
            RuntimeError: The caller went on with a run that another one has ended.
        """
        source = iter(batches)
        self._drain(self._under_way)
        under_way: deque[_Fed] = deque()
        self._under_way = under_way
        try:
            self._fill(under_way, source)
            while under_way:
                try:
                    outputs = self._outputs(under_way[0])
                except _NOT_BY_A_FILE:
                    raise
                except RuntimeError as error:
                    stuck = [*under_way]
                    under_way.popleft()
                    if isinstance(error, _WrongOutputs):
                        self._drain(under_way)
                        self._done.extend(stuck)
                    else:
                        self._graph = None
                        under_way.clear()
                    for batch, _ in stuck:
                        again, outputs = self._run_alone(self._without_failed(batch))
                        with self._held_afterwards(outputs, under_way):
                            yield again, outputs
                    self._fill(under_way, source)
                    continue
                batch, _ = fed = under_way.popleft()
                # To receive, feed and free 256 files takes the host some 15 ms. By then the caller has queued its step,
                # on which a GPU works meanwhile.
                try:
                    with self._held_afterwards(outputs, under_way):
                        yield batch, outputs
                finally:
                    self._done.append(fed)
                self._fill(under_way, source)
        except GeneratorExit:  # between two batches
            raise
        except BaseException:
            # Such as Ctrl-C while a batch was fed or awaited: what the graph would yield next is not known.
            self._drop(under_way)
            raise
        finally:
            if self._under_way is under_way:
                self._drain(under_way)

    def close(self) -> None:
        """Free the graph, once no kernel reads its views."""
        for event, _ in self._held:
            event.synchronize()
        self._graph = None
        self._under_way = deque()
        self._done.clear()
        self._held.clear()

    def _fill(self, under_way: deque[_Fed], source: Iterator[EncodedBatch]) -> None:
        while len(under_way) < self._depth:
            batch = next(source, None)
            if batch is None:
                return
            under_way.append(self._with_inputs(self._without_failed(batch)))
            self._schedule(under_way[-1])

    def _without_failed(self, batch: EncodedBatch) -> EncodedBatch:
        """The batch with the images that DALI failed on decoded by Pillow."""
        if not self._failed:
            return batch
        rows = [row for row, image in enumerate(batch.images.tolist()) if image in self._failed]
        return self._reader.again_by_pillow(batch, rows) if rows else batch

    def _with_inputs(self, batch: EncodedBatch) -> _Fed:
        return batch, self._inputs(batch) if len(batch) else {}

    def _schedule(self, fed: _Fed) -> None:
        """Feed a batch, which the caller keeps from now on, and run the graph."""
        batch, inputs = fed
        if not inputs:
            return
        graph = self._graph or self._start()
        graph.feed_input("encoded", batch.files())
        for name, values in inputs.items():
            graph.feed_input(name, values)
        graph.schedule_run()

    def _start(self) -> Pipeline:
        """Build the graph and run blank images through it, since its first run takes several batches at once.

        They are JPEG files, and on a GPU they fill a batch: by the first batch nvImageCodec fixes how many images of
        each later one the JPEG decoder in hardware takes.
        """
        graph = self._build()
        file = io.BytesIO()
        Image.new("RGB", _BLANK).save(file, "JPEG")
        blank = self._reader.gather(0, [(0, (file.getvalue(), _BLANK, 0, {}))] * self._blank)
        inputs = self._inputs(blank)
        for _ in range(self._depth):
            graph.feed_input("encoded", blank.files())
            for name, values in inputs.items():
                graph.feed_input(name, values)
        graph.schedule_run()
        for _ in range(self._depth):
            graph.outputs()
        self._graph = graph
        return graph

    def _outputs(self, fed: _Fed) -> list[Tensor]:
        """The outputs of the oldest batch in flight."""
        if not fed[1]:
            return []
        assert self._graph is not None
        # The host waits for the views, so that its waiting time shows whether DALI keeps up; the encoder's work on the
        # device continues meanwhile.
        found = self._graph.outputs()
        with nullcontext() if self._device is None else torch.cuda.device(self._device):
            outputs = self._gather(found)
        wrong = self._wrong(outputs, fed[0])
        if wrong:
            self._failed |= set(fed[0].images[wrong].tolist())
            raise _WrongOutputs
        return outputs

    @contextmanager
    def _held_afterwards(self, outputs: list[Tensor], run: deque[_Fed]) -> Iterator[None]:
        """Hold views whose kernels are launched inside, also where the caller goes no further than this batch.

        Raises:
            RuntimeError: The run was ended inside.
        """
        try:
            yield
        finally:
            self._hold(outputs)
        if self._under_way is not run:
            raise RuntimeError(
                "found an epoch that goes on after another one of its pipeline began, expected one at a time"
            )

    def _hold(self, outputs: list[Tensor]) -> None:
        """Keep views until the kernels that read them are done: their memory is DALI's, which does not track them."""
        if self._device is None:
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._held.append((event, outputs))
        while self._held and self._held[0][0].query():
            self._held.popleft()

    def _run_alone(self, batch: EncodedBatch) -> tuple[EncodedBatch, list[Tensor]]:
        try:
            return batch, self._outputs_alone(batch)
        except _WrongOutputs:
            return self._run_alone(self._without_failed(batch))
        except _NOT_BY_A_FILE:
            raise
        except RuntimeError:
            self._graph = None
        again = self._reader.again_by_pillow(batch, range(len(batch)))
        found = set(again.corrupt) - set(batch.corrupt)
        self._failed |= found or set(batch.images.tolist())
        # A failure now is not caused by the files.
        return again, self._outputs_alone(again)

    def _outputs_alone(self, batch: EncodedBatch) -> list[Tensor]:
        fed = self._with_inputs(batch)
        self._done.append(fed)
        self._schedule(fed)
        return self._outputs(fed)

    def _drain(self, under_way: deque[_Fed]) -> None:
        """Discard the outputs in flight, so that the next batch fed is the next one out."""
        try:
            while under_way:
                if under_way[0][1] and self._graph is not None:
                    self._graph.outputs()
                self._done.append(under_way.popleft())
        except (RuntimeError, StopIteration):
            # StopIteration: interrupted while it waited for outputs, which then are not to be had.
            self._drop(under_way)
        except BaseException:
            self._drop(under_way)
            raise

    def _drop(self, run: deque[_Fed]) -> None:
        """Give up the graph with what is in flight, unless a later run has it."""
        if self._under_way is run:
            self._graph = None
            self._done.extend(run)  # the traceback of an error may keep the graph, and its threads read them
            run.clear()


util.register_after_fork(GraphRunner, _spare_inherited)
