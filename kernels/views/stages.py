"""The four augmentation kernels: crop, colour, and the two axes of the blur.

They compute in floats from 0 to 255, clamp after each jitter operation, and round after the crop and at the end, like
`synco_fast.data.augment.ops`. Between the kernels a view is stored as float32 planes.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-def,no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["blur_columns", "blur_rows", "colour", "crop"]

#: Codes of the jitter operations, and their number.
_BRIGHTNESS = tl.constexpr(0)
_CONTRAST = tl.constexpr(1)
_SATURATION = tl.constexpr(2)
_HUE = tl.constexpr(3)
_PARTS = tl.constexpr(4)
#: Half the width of the blur's window, in standard deviations.
_SIGMAS = tl.constexpr(3.0)
#: Words of a view, and the first word of each parameter (`words.py`).
_WORDS = tl.constexpr(16)
_CROP = tl.constexpr(0)
_ORDER = tl.constexpr(4)
_GRAYSCALE = tl.constexpr(8)
_SOLARIZE = tl.constexpr(9)
_FLIP = tl.constexpr(10)
_FACTORS = tl.constexpr(11)
_SIGMA = tl.constexpr(15)


@triton.jit
def _number(p_word):
    """The float32 number of a word."""
    return tl.load(p_word).to(tl.float32, bitcast=True)


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def _luma(red, green, blue):
    return 0.299 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _side(corner, sign, middle, start):
    """Strength of a channel for a hue on the HSV hexagon, from 0 to 1."""
    return tl.minimum(tl.maximum(sign * tl.abs(corner - middle) + start, 0.0), 1.0)


@triton.jit
def _hue(red, green, blue, shift):
    """Shift the hue by ``shift`` turns in HSV; value and chroma stay the same."""
    top = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    chroma = top - low
    inverse = 1.0 / tl.maximum(chroma, 1e-6)
    corner = tl.where(
        top == red,
        (green - blue) * inverse,
        tl.where(top == green, (blue - red) * inverse + 2.0, (red - green) * inverse + 4.0),
    )
    corner = corner / 6.0 + shift
    corner = (corner - tl.floor(corner)) * 6.0
    return (
        low + chroma * _side(corner, 1.0, 3.0, -1.0),
        low + chroma * _side(corner, -1.0, 2.0, 2.0),
        low + chroma * _side(corner, -1.0, 4.0, 2.0),
    )


@triton.jit
def _part(part, factor, red, green, blue):
    """Apply one jitter operation other than contrast, which needs the mean of the view."""
    if part == _BRIGHTNESS:
        red, green, blue = _clamp(red * factor), _clamp(green * factor), _clamp(blue * factor)
    if part == _SATURATION:
        luma = _luma(red, green, blue)
        red = _clamp(luma + (red - luma) * factor)
        green = _clamp(luma + (green - luma) * factor)
        blue = _clamp(luma + (blue - luma) * factor)
    if (part == _HUE) & (factor != 0.0):
        red, green, blue = _hue(red, green, blue, factor)
    return red, green, blue


@triton.jit
def _contrast_place(p_words, view):
    """Position of contrast in the order of a view; after all operations if the view has none."""
    found = view * 0 + _PARTS
    for place in tl.static_range(_PARTS):
        part = tl.load(p_words + _ORDER + place)
        if (part == _CONTRAST) & (_number(p_words + _FACTORS + _CONTRAST) != 1.0):
            found = view * 0 + place
    return found


@triton.jit
def _store(p_planes, view, o_pixel, m_pixel, red, green, blue, PIXELS: tl.constexpr):
    p_view = p_planes + view.to(tl.int64) * 3 * PIXELS + o_pixel
    tl.store(p_view, red, m_pixel)
    tl.store(p_view + PIXELS, green, m_pixel)
    tl.store(p_view + 2 * PIXELS, blue, m_pixel)


@triton.jit
def _load(p_planes, view, o_pixel, m_pixel, PIXELS: tl.constexpr):
    p_view = p_planes + view.to(tl.int64) * 3 * PIXELS + o_pixel
    return (
        tl.load(p_view, m_pixel, 0.0),
        tl.load(p_view + PIXELS, m_pixel, 0.0),
        tl.load(p_view + 2 * PIXELS, m_pixel, 0.0),
    )


@triton.jit
def _tap(i, middle, reach, extent):
    """Weight of source pixel ``i`` in a resized pixel: a triangle filter, wider (antialiased) for downscaling."""
    weight = tl.maximum(1.0 - tl.abs(i.to(tl.float32) + 0.5 - middle) / reach, 0.0)
    return tl.where((i >= 0) & (i < extent), weight, 0.0)


@triton.jit
def crop(
    p_pixels,
    p_offsets,
    p_sizes,
    p_images,
    p_words,
    p_planes,
    p_sums,
    IMAGES,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLANAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Crop, resize, and the jitter operations before contrast. Also writes one sum of the luma for each program.

    Grid (views, blocks of pixels). Bilinear with antialiasing, as in PyTorch; pixels are rounded to integers.
    """
    PIXELS: tl.constexpr = SIZE * SIZE
    view, block = tl.program_id(0), tl.program_id(1)
    o_pixel = block * BLOCK + tl.arange(0, BLOCK)
    m_pixel = o_pixel < PIXELS
    # Twice an index may not fit into its own dtype.
    image = tl.load(p_images + view % IMAGES).to(tl.int64)
    p_words += view.to(tl.int64) * _WORDS
    height, width = tl.load(p_sizes + 2 * image), tl.load(p_sizes + 2 * image + 1)
    p_image = p_pixels + tl.load(p_offsets + image)
    top, left = tl.load(p_words + _CROP), tl.load(p_words + _CROP + 1)
    rows, columns = tl.load(p_words + _CROP + 2), tl.load(p_words + _CROP + 3)
    if PLANAR:
        s_channel, s_column = height.to(tl.int64) * width, 1
    else:
        s_channel, s_column = (height * 0 + 1).to(tl.int64), CHANNELS
    s_row = width.to(tl.int64) * s_column

    scale_y, scale_x = rows.to(tl.float32) / SIZE, columns.to(tl.float32) / SIZE
    reach_y, reach_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    middle_y = ((o_pixel // SIZE).to(tl.float32) + 0.5) * scale_y
    middle_x = ((o_pixel % SIZE).to(tl.float32) + 0.5) * scale_x
    # The pixels whose centres are within reach, as in PyTorch: at most twice the reach, rounded up.
    first_y = tl.floor(middle_y - reach_y + 0.5).to(tl.int32)
    first_x = tl.floor(middle_x - reach_x + 0.5).to(tl.int32)
    taps_y, taps_x = tl.ceil(2.0 * reach_y).to(tl.int32), tl.ceil(2.0 * reach_x).to(tl.int32)

    red, green, blue = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for tap_y in range(0, taps_y):
        i_y = first_y + tap_y
        weight_y = _tap(i_y, middle_y, reach_y, rows)
        p_row = p_image + (top + i_y).to(tl.int64) * s_row
        for tap_x in range(0, taps_x):
            i_x = first_x + tap_x
            weight = weight_y * _tap(i_x, middle_x, reach_x, columns)
            m_tap = m_pixel & (weight > 0.0)
            p_tap = p_row + (left + i_x) * s_column
            total += weight
            red += weight * tl.load(p_tap, m_tap, 0).to(tl.float32)
            if CHANNELS == 3:
                green += weight * tl.load(p_tap + s_channel, m_tap, 0).to(tl.float32)
                blue += weight * tl.load(p_tap + 2 * s_channel, m_tap, 0).to(tl.float32)
    total = tl.maximum(total, 1e-12)
    red = tl.floor(red / total + 0.5)
    if CHANNELS == 3:
        green, blue = tl.floor(green / total + 0.5), tl.floor(blue / total + 0.5)
    else:
        green, blue = red, red

    end = _contrast_place(p_words, view)
    for place in tl.static_range(_PARTS):
        if place < end:
            part = tl.load(p_words + _ORDER + place)
            red, green, blue = _part(part, _number(p_words + _FACTORS + part), red, green, blue)
    _store(p_planes, view, o_pixel, m_pixel, red, green, blue, PIXELS)
    tl.store(p_sums + view * tl.num_programs(1) + block, tl.sum(tl.where(m_pixel, _luma(red, green, blue), 0.0)))


@triton.jit
def colour(
    p_planes,
    p_sums,
    p_words,
    BLOCKS,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Contrast, the jitter operations after it, and grayscale, in place. Grid (views, blocks of pixels)."""
    PIXELS: tl.constexpr = SIZE * SIZE
    view, block = tl.program_id(0), tl.program_id(1)
    p_words += view.to(tl.int64) * _WORDS
    begin = _contrast_place(p_words, view)
    grayscale = tl.load(p_words + _GRAYSCALE) != 0
    if (begin < _PARTS) | grayscale:
        o_pixel = block * BLOCK + tl.arange(0, BLOCK)
        m_pixel = o_pixel < PIXELS
        red, green, blue = _load(p_planes, view, o_pixel, m_pixel, PIXELS)
        if begin < _PARTS:
            o_sum = tl.arange(0, SUMS)
            mean = tl.sum(tl.load(p_sums + view * BLOCKS + o_sum, o_sum < BLOCKS, 0.0)) / PIXELS
            factor = _number(p_words + _FACTORS + _CONTRAST)
            base = (1.0 - factor) * mean
            red, green, blue = _clamp(base + red * factor), _clamp(base + green * factor), _clamp(base + blue * factor)
            for place in tl.static_range(_PARTS):
                if place > begin:
                    part = tl.load(p_words + _ORDER + place)
                    red, green, blue = _part(part, _number(p_words + _FACTORS + part), red, green, blue)
        if grayscale:
            red = _luma(red, green, blue)
            green, blue = red, red
        _store(p_planes, view, o_pixel, m_pixel, red, green, blue, PIXELS)


@triton.jit
def _reflect(i, SIZE: tl.constexpr):
    """Reflect padding: the index inside the image for an index outside it."""
    PERIOD: tl.constexpr = 2 * (SIZE - 1)
    i = tl.abs(i) % PERIOD
    return tl.minimum(i, PERIOD - i)


@triton.jit
def _blurred(p_planes, view, row, column, m_pixel, sigma, DOWN: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Gaussian blur along one axis, truncated at three standard deviations."""
    PIXELS: tl.constexpr = SIZE * SIZE
    width = sigma * _SIGMAS
    reach = width.to(tl.int32)
    if reach.to(tl.float32) < width:
        reach += 1
    red, green, blue = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    total = sigma * 0.0
    for tap in range(-reach, reach + 1):
        distance = tap / sigma
        weight = tl.exp(-0.5 * distance * distance)
        if DOWN:  # noqa: SIM108 - in Triton a conditional expression evaluates both sides
            o_tap = _reflect(row + tap, SIZE) * SIZE + column
        else:
            o_tap = row * SIZE + _reflect(column + tap, SIZE)
        one, two, three = _load(p_planes, view, o_tap, m_pixel, PIXELS)
        red, green, blue, total = red + weight * one, green + weight * two, blue + weight * three, total + weight
    return red / total, green / total, blue / total


@triton.jit
def blur_rows(p_planes, p_blurred, p_words, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Blur along the rows, for the views that have a blur. Grid (views, blocks of pixels)."""
    PIXELS: tl.constexpr = SIZE * SIZE
    view, block = tl.program_id(0), tl.program_id(1)
    sigma = _number(p_words + view.to(tl.int64) * _WORDS + _SIGMA)
    if sigma > 0.0:
        o_pixel = block * BLOCK + tl.arange(0, BLOCK)
        m_pixel = o_pixel < PIXELS
        red, green, blue = _blurred(p_planes, view, o_pixel // SIZE, o_pixel % SIZE, m_pixel, sigma, False, SIZE, BLOCK)
        _store(p_blurred, view, o_pixel, m_pixel, red, green, blue, PIXELS)


@triton.jit
def _finish(p_out, x, m_pixel, solarize, mean, scale, NORMALISE: tl.constexpr):
    if solarize:
        x = tl.minimum(x, 255.0 - x)
    x = tl.floor(_clamp(x) + 0.5)
    if NORMALISE:
        x = (x - mean) * scale
    tl.store(p_out, x.to(p_out.dtype.element_ty), m_pixel)


@triton.jit
def blur_columns(
    p_planes,
    p_blurred,
    p_words,
    p_out,
    mean_red,
    mean_green,
    mean_blue,
    scale_red,
    scale_green,
    scale_blue,
    SIZE: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blur along the columns, solarize, flip, and write the view in channels-last layout. Grid as in `blur_rows`."""
    PIXELS: tl.constexpr = SIZE * SIZE
    view, block = tl.program_id(0), tl.program_id(1)
    o_pixel = block * BLOCK + tl.arange(0, BLOCK)
    m_pixel = o_pixel < PIXELS
    row, column = o_pixel // SIZE, o_pixel % SIZE
    p_words += view.to(tl.int64) * _WORDS
    sigma = _number(p_words + _SIGMA)
    if sigma > 0.0:
        red, green, blue = _blurred(p_blurred, view, row, column, m_pixel, sigma, True, SIZE, BLOCK)
    else:
        red, green, blue = _load(p_planes, view, o_pixel, m_pixel, PIXELS)
    solarize = tl.load(p_words + _SOLARIZE) != 0
    if tl.load(p_words + _FLIP) != 0:
        column = SIZE - 1 - column
    p_view = p_out + view.to(tl.int64) * 3 * PIXELS + (row * SIZE + column) * 3
    _finish(p_view, red, m_pixel, solarize, mean_red, scale_red, NORMALISE)
    _finish(p_view + 1, green, m_pixel, solarize, mean_green, scale_green, NORMALISE)
    _finish(p_view + 2, blue, m_pixel, solarize, mean_blue, scale_blue, NORMALISE)
