"""A machine that runs the PTX which Triton compiles, on CPU tensors, and checks every access to memory.

`emulated` compiles each launch for a GPU that is not there and runs it, so that layouts, shared memory,
asynchronous copies and products on tensor cores are those of a device:

    with emulated(80):
        outputs = launch.contrast_and_gradient(q, k, queue, Negatives.synco(32), temperature=0.2, seed=3, step=7)

A kernel alone is launched in the same way, `mix[(rows, parts)](...)`, with any grid; tensors from `torch.empty` count
as unwritten. The process must not have set TRITON_INTERPRET. Small sizes take a second or less, and compiling takes
most of the time: a folder of one's own in TRITON_CACHE_DIR keeps the compiled kernels.

All CTAs run at once, thread by thread of an array. The lowest instruction that some thread is at comes first, so that
threads meet again where they diverged. `Fault` is raised, with CTA, thread, line of the PTX and line of the source, for

- an access out of the tensors of the launch, or misaligned;
- a read of bytes, global or shared, that nobody has written;
- a race: bytes that one thread writes and another one reads or writes, with no barrier between, or in another CTA;
- bytes that an asynchronous copy has not brought yet, because no wait covers it;
- a deadlock, and lanes that do not all come to an instruction of their warp.

Approximate instructions are exact to float32, or off by what the PTX ISA allows (``error``), and products on tensor
cores are added up in float64.
"""

from tests.support.ptx_machine.faults import Fault
from tests.support.ptx_machine.launching import Emulator, emulated

__all__ = ["Emulator", "Fault", "emulated"]
