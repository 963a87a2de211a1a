"""What suspended micro-batches hold, moved out of the device until their next turn: to pinned host memory, or to a file.

While one micro-batch runs, the next one's hidden states are on their way in and the last one's on their way out. What a suspended forward
refers to stays the same tensor: its memory is given up, and filled again before the forward goes on. So nothing is imitated here either,
and results are the same to the bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Place = Literal["device", "host", "disk"]
PLACES: tuple[Place, ...] = ("device", "host", "disk")
# Micro-batches whose activations are on the device at once where they are spilled: coming in, running, going out.
RESIDENT = 3


def is_spillable(value: Any) -> bool:
    """Whether a tensor owns the whole of its memory, which nothing but the forward uses."""
    return (
        isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and value.is_floating_point()
        and value.untyped_storage().nbytes() == value.numel() * value.element_size() > 0
    )


class Spill:
    """The activations of suspended micro-batches outside the device.

    Args:
        device: where the model runs; for a CPU there is only the disk.
        place: `host` or `disk`, where files without a name are made in the system's folder for temporary ones.
    """

    def __init__(self, device: torch.device, place: Place) -> None:
        assert place == "disk" or (place == "host" and device.type == "cuda")
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._on_disk = place == "disk"
        self._buffers: dict[int, list[Tensor]] = {}
        self._outside: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._events: dict[int, Any] = {}
        if self._is_cuda:
            self._inward: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._outward: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]

    def take_out(self, number: int, held: Sequence[Tensor]) -> None:
        """After a micro-batch was suspended: move what it holds out, and give up its memory on the device."""
        buffers = self._buffers.setdefault(number, [])
        outside = self._outside[number] = []
        for place, tensor in enumerate(held):
            nbytes = tensor.untyped_storage().nbytes()
            if place == len(buffers):
                buffers.append(self._buffer(nbytes))
            elif buffers[place].numel() != nbytes:
                if self._is_cuda:
                    torch.cuda.synchronize(self._device)
                self._release(buffers[place])
                buffers[place] = self._buffer(nbytes)
            outside.append((tensor, buffers[place]))
        if not self._is_cuda:
            for tensor, buffer in outside:
                buffer.copy_(_bytes(tensor))
                tensor.untyped_storage().resize_(0)
            return
        current = torch.cuda.current_stream(self._device)
        self._outward.wait_event(current.record_event())
        with torch.cuda.stream(self._outward):
            for tensor, buffer in outside:
                flat = _bytes(tensor)
                buffer.copy_(flat, non_blocking=True)
                flat.record_stream(self._outward)
        self._events[number] = self._outward.record_event()
        for tensor, _ in outside:
            tensor.untyped_storage().resize_(0)

    def bring_in(self, number: int) -> None:
        """Start to move a micro-batch's activations back; nothing happens where they are there already."""
        outside = self._outside.get(number, [])
        for tensor, buffer in outside:
            tensor.untyped_storage().resize_(buffer.numel())
        if not self._is_cuda:
            for tensor, buffer in outside:
                _bytes(tensor).copy_(buffer)
        elif outside:
            # The memory may have been another tensor's, which a kernel in the queue still uses.
            self._inward.wait_event(torch.cuda.current_stream(self._device).record_event())
            self._inward.wait_event(self._events[number])
            with torch.cuda.stream(self._inward):
                for tensor, buffer in outside:
                    flat = _bytes(tensor)
                    flat.copy_(buffer, non_blocking=True)
                    flat.record_stream(self._inward)  # should it be dropped before it is here
            self._events[number] = self._inward.record_event()
        self._outside[number] = []

    def require(self, number: int) -> None:
        """Let what runs next on the device wait until a micro-batch's activations are back."""
        self.bring_in(number)
        if number in self._events:
            torch.cuda.current_stream(self._device).wait_event(self._events[number])

    def forget(self, number: int) -> None:
        """Drop a micro-batch that will have no further turn."""
        self._outside.pop(number, None)

    def close(self) -> None:
        """Free everything; what was taken out is lost."""
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
        for buffers in self._buffers.values():
            for buffer in buffers:
                self._release(buffer)
        self._buffers, self._outside = {}, {}

    def _release(self, buffer: Tensor) -> None:
        if not self._on_disk:
            torch.cuda.check_error(self._runtime.cudaHostUnregister(buffer.data_ptr()))

    def _buffer(self, nbytes: int) -> Tensor:
        if not self._on_disk:
            # torch's own allocator of pinned memory would round up to a power of two.
            buffer = torch.empty(nbytes, dtype=torch.uint8)
            torch.cuda.check_error(self._runtime.cudaHostRegister(buffer.data_ptr(), nbytes, 0))
            return buffer
        with tempfile.NamedTemporaryFile(prefix="reapkit-activations-", delete=False) as file:
            path = Path(file.name)
        try:
            return torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)
        finally:
            path.unlink()  # the mapping keeps it until it is dropped, or the process ends in any way


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's memory as uint8 [n]."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
