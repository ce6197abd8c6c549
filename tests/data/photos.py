"""Images that look like photographs to the operations: spectra that fall with frequency, correlated colours, noise."""

import numpy as np
from PIL import Image

from synco_fast.data.sources.decode import LIMITS, decode_image
from synco_fast.data.sources.splits import read_file


def photo(width=160, height=120, seed=0):
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    fields = [
        np.fft.irfft2(np.exp(2j * np.pi * rng.uniform(size=frequency.shape)) / frequency**1.1, s=(height, width))
        for _ in range(3)
    ]
    fields = np.stack([field / field.std() for field in fields], axis=-1)
    pixels = 118 + 55 * (0.75 * fields[..., :1] + 0.5 * fields) + rng.normal(0, 4, fields.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def read_image(file, limits=LIMITS):
    """A file as every split reads it."""
    return decode_image(read_file(str(file), limits), str(file), limits)
