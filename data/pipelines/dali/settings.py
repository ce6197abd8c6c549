"""Settings of DALI's decoder; importing them needs neither DALI nor PyTorch.

Unset ones take what NVIDIA publishes for the GPU:

- Compute capability 9 and 10 (H100, H200, B200): 99 % of the JPEG files to the hardware decoder, 6 threads, and
  memory for images of 5980 x 6430 pixels, ImageNet's largest. NVIDIA's submission to MLPerf Training v3.0, ResNet-50 on
  DGX H100 (`config_DGXH100_multi_64x8x40.sh` of mlcommons/training_results_v3.0).
- 8.0 (A100): 75 %, where NVIDIA's article on its JPEG decoder, "Loading Data Fast with DALI and the New Hardware JPEG
  Decoder in NVIDIA A100 GPUs", finds the highest throughput; the same memory (DALI's examples, pull request 3029).
- Others: DALI's own defaults, 65 % and no memory in advance (pull request 6366).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["DaliSettings"]

_A100 = (8, 0)
#: Major compute capabilities of H100, H200, B200 and their like.
_LATER = (9, 10)
_WIDTH, _HEIGHT, _THREADS = 5980, 6430, 6
#: Memory from which a GPU is large: those of the published figures have 40 GB or more.
_LARGE = 36 << 30


@dataclass(frozen=True)
class DaliSettings:
    """DALI's decoder on a GPU, and its threads; None takes what NVIDIA publishes for the GPU.

    Attributes:
        hw_decoder_load: Fraction of the JPEG files for the GPU's JPEG decoder.
        preallocate_width_hint, preallocate_height_hint: Size of the images to allocate the decoder's memory for; 0 for
            none in advance.
        jpeg_fancy_upsampling: Whether to interpolate chroma as Pillow does.
        threads: DALI's threads.
    """

    hw_decoder_load: float | None = None
    preallocate_width_hint: int | None = None
    preallocate_height_hint: int | None = None
    jpeg_fancy_upsampling: bool = True
    threads: int | None = None

    def decoder(self, capability: tuple[int, int], memory: int, *, allocate: bool = True) -> dict[str, Any]:
        """The arguments of DALI's decoder.

        Args:
            capability: The GPU's compute capability.
            memory: Its memory in bytes.
            allocate: Whether to allocate memory in advance where no hint is set.
        """
        load = 0.99 if capability[0] in _LATER else 0.75 if capability == _A100 else 0.65
        published = load > 0.65 and memory >= _LARGE
        hints = (_WIDTH, _HEIGHT) if allocate and published else (0, 0)
        width, height = self.preallocate_width_hint, self.preallocate_height_hint
        return {
            "hw_decoder_load": load if self.hw_decoder_load is None else self.hw_decoder_load,
            "preallocate_width_hint": hints[0] if width is None else width,
            "preallocate_height_hint": hints[1] if height is None else height,
            "jpeg_fancy_upsampling": self.jpeg_fancy_upsampling,
        }

    def count_threads(self, cores: int, capability: tuple[int, int] | None) -> int:
        """DALI's threads: one for each core unless set, fewer where hardware decodes.

        Args:
            cores: That this process may use.
            capability: The GPU's compute capability; None on a CPU.
        """
        if self.threads is not None:
            return self.threads
        return cores if capability is None or capability[0] not in _LATER else min(cores, _THREADS)
