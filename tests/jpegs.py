"""JPEGs that decoders trip over, by name: what Pillow does not write is made by editing the segments of what it does."""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

SOF0, SOF3, SOF9, SOS, DRI, APP1, APP14 = 0xC0, 0xC3, 0xC9, 0xDA, 0xDD, 0xE1, 0xEE
EOI = b"\xff\xd9"


@dataclass(frozen=True)
class Segment:
    """A marker and what follows it, in a scan with the coded data."""

    marker: int
    content: bytes
    data: bytes = b""

    def encode(self) -> bytes:
        return struct.pack(">BBH", 0xFF, self.marker, len(self.content) + 2) + self.content + self.data


def segments_of(jpeg: bytes) -> list[Segment]:
    """All between SOI and EOI."""
    found, at = [], 2
    while jpeg[at : at + 2] != EOI:
        marker, length = struct.unpack_from(">xBH", jpeg, at)
        begin = end = at + 2 + length
        while marker == SOS and not (jpeg[end] == 0xFF and jpeg[end + 1] != 0 and not 0xD0 <= jpeg[end + 1] <= 0xD7):
            end += 1
        found.append(Segment(marker, jpeg[at + 4 : begin], jpeg[begin:end]))
        at = end
    return found


def join(segments: list[Segment], between: bytes = b"") -> bytes:
    """A file of `segments`, with `between` in front of each."""
    return b"\xff\xd8" + b"".join(between + segment.encode() for segment in segments) + between + EOI


def photo(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Soft shapes with grain on them, which fill every frequency."""
    rng = np.random.default_rng((height, width, seed))
    channels = []
    for _ in mode:
        coarse = rng.integers(0, 256, (max(2, height // 16), max(2, width // 16)), dtype=np.uint8)
        soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int64)
        channels.append(np.clip(soft + rng.integers(-12, 13, (height, width)), 0, 255).astype(np.uint8))
    return Image.merge(mode, [Image.fromarray(channel) for channel in channels])


def save(image: Image.Image, **options: object) -> bytes:
    """As JPEG by Pillow."""
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def exif(orientation: int, order: str = "<") -> bytes:
    """An EXIF segment of the one entry, in the byte order of `struct`."""
    tiff = struct.pack(order + "2sHIHHHIHHI", b"II" if order == "<" else b"MM", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    return b"Exif\0\0" + tiff


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    """With one more segment in front."""
    return jpeg[:2] + Segment(marker, content).encode() + jpeg[2:]


def with_frame(jpeg: bytes, marker: int | None = None, **changes: int) -> bytes:
    """With other numbers in its frame header: precision, height, width, factors (0xHV) of the first component, the second."""
    places = {"precision": (0, "B"), "height": (1, ">H"), "width": (3, ">H"), "factors": (7, "B"), "second": (10, "B")}
    segments = segments_of(jpeg)
    for i, segment in enumerate(segments):
        if 0xC0 <= segment.marker <= 0xC2:
            content = bytearray(segment.content)
            for name, value in changes.items():
                offset, form = places[name]
                struct.pack_into(form, content, offset, value)
            segments[i] = Segment(segment.marker if marker is None else marker, bytes(content))
    return join(segments)


def with_transform(jpeg: bytes, transform: int) -> bytes:
    """With another colour transform in its Adobe segment."""
    changed = [Segment(s.marker, s.content[:11] + bytes([transform])) if s.marker == APP14 else s for s in segments_of(jpeg)]
    return join(changed)


def with_thin_chroma(height: int, width: int, factors: int, **options: object) -> bytes:
    """4:1:1 (`factors` 0x41), 1x4 (0x14) or 4:4:0 (0x12), which hold as many blocks an MCU as 4:2:0 or 4:2:2 does.

    So the data of such a file, of as many MCUs, are those of this one; its picture is a shuffle of the other's blocks.
    """
    across, down = factors >> 4, factors & 15
    columns, rows = -(-width // (8 * across)), -(-height // (8 * down))
    is_four = across * down == 4
    donor = save(photo(rows * (16 if is_four else 8), columns * 16), subsampling=2 if is_four else 1, **options)
    return with_frame(donor, height=height, width=width, factors=factors)


def one_scan_a_component(height: int, width: int, halved: bool) -> bytes:
    """Sequential, not interleaved; chroma at half the size where `halved`."""
    small = ((height + 1) // 2, (width + 1) // 2) if halved else (height, width)
    planes = [save(photo(*size, "L", seed), quality=85) for seed, size in enumerate([(height, width), small, small])]
    head = segments_of(planes[0])
    frame = struct.pack(">BHHB", 8, height, width, 3) + bytes([1, 0x22 if halved else 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    scans = [
        Segment(SOS, bytes([1, number, 0, 0, 63, 0]), segments_of(plane)[-1].data) for number, plane in enumerate(planes, 1)
    ]
    return join([Segment(SOF0, frame) if s.marker == SOF0 else s for s in head[:-1]] + scans)


def some_scans(jpeg: bytes, number: int) -> bytes:
    """A progressive file that ends early, in order."""
    segments, scans = [], 0
    for segment in segments_of(jpeg):
        scans += segment.marker == SOS
        if scans <= number:
            segments.append(segment)
    return join(segments)


def two_components(height: int, width: int) -> bytes:
    """A header that no image tool writes."""
    segments = []
    for segment in segments_of(save(photo(height, width))):
        content = segment.content
        if segment.marker == SOF0:
            content = content[:5] + bytes([2]) + content[6:12]
        segments.append(Segment(segment.marker, content, segment.data))
    return join(segments)


def coefficients_out_of_range(comment_size: int) -> bytes:
    """A grey block that decodes, and whose first coefficient no encoder takes."""
    segments = [s for s in segments_of(save(photo(8, 8, "L"))) if s.marker not in (0xC4, SOS)]
    one_code = bytes([1, *[0] * 15])  # of one bit
    return join(
        [
            Segment(0xFE, b"c" * comment_size),
            *segments,
            Segment(0xC4, b"\x00" + one_code + b"\x0f"),  # DC: 15 bits follow
            Segment(0xC4, b"\x10" + one_code + b"\x00"),  # AC: the end of the block
            Segment(SOS, bytes([1, 1, 0, 0, 63, 0]), b"\x7f\xff\x00\x7f"),
        ]
    )


def decodable() -> Iterator[tuple[str, bytes]]:
    """Whole images that Pillow reads."""
    for name, subsampling in (("4:4:4", 0), ("4:2:2", 1), ("4:2:0", 2)):
        for progressive in (False, True):
            yield (
                f"{name}{' progressive' * progressive}",
                save(photo(83, 121), subsampling=subsampling, progressive=progressive),
            )
    for name, factors in (("4:4:0", 0x12), ("4:1:1", 0x41), ("1x4", 0x14)):
        yield name, with_thin_chroma(83, 121, factors)
        yield f"{name} restarts", with_thin_chroma(83, 128, factors, restart_marker_blocks=2)
    for interval in range(1, 10):
        for subsampling in (0, 2):
            encoded = save(photo(70, 144), subsampling=subsampling, restart_marker_blocks=interval)
            yield f"restart every {interval} of 4:{(4, 2, 2)[subsampling]}:{(4, 2, 0)[subsampling]}", encoded
    for rows in (1, 2):
        yield f"restart every {rows} rows", save(photo(70, 144), restart_marker_rows=rows)
        yield f"progressive restart every {rows} rows", save(photo(70, 144), restart_marker_rows=rows, progressive=True)
    yield "grey", save(photo(83, 121, "L"))
    yield "grey progressive", save(photo(83, 121, "L"), progressive=True)
    yield "grey restarts", save(photo(80, 128, "L"), restart_marker_blocks=4)
    yield "grey with factors of 2", with_frame(save(photo(83, 121, "L")), factors=0x22)
    yield "grey with factors of 2 and restarts", with_frame(save(photo(80, 128, "L"), restart_marker_blocks=2), factors=0x22)
    cmyk = save(photo(83, 121, "CMYK"), quality=90)
    yield "CMYK", cmyk
    yield "CMYK restarts", save(photo(80, 128, "CMYK"), restart_marker_blocks=2)
    yield "CMYK progressive", save(photo(83, 121, "CMYK"), progressive=True)
    yield "YCCK", with_transform(cmyk, 2)
    yield "YCCK progressive", with_transform(save(photo(83, 121, "CMYK"), progressive=True), 2)
    yield "RGB", save(photo(83, 121), keep_rgb=True)
    yield "RGB by Adobe's transform", with_segment(save(photo(83, 121), subsampling=0), APP14, b"Adobe\0d\0\0\0\0\0")
    yield "one scan a component", one_scan_a_component(83, 121, halved=False)
    yield "one scan a component, chroma halved", one_scan_a_component(83, 121, halved=True)
    for height, width in ((1, 1), (1, 40), (40, 1), (7, 9), (17, 33), (8, 8), (16, 16), (2, 2)):
        for subsampling in (0, 2):
            yield f"{height}x{width} {subsampling}", save(photo(height, width), subsampling=subsampling)
        yield f"{height}x{width} progressive", save(photo(height, width), progressive=True)
        yield f"{height}x{width} grey", save(photo(height, width, "L"))
        yield f"{height}x{width} 4:1:1", with_thin_chroma(height, width, 0x41)
    for orientation in range(1, 9):
        for order in "<>":
            encoded = with_segment(save(photo(48, 80), restart_marker_blocks=1), APP1, exif(orientation, order))
            yield f"orientation {orientation} {order}", encoded
    ordinary = save(photo(83, 121))
    yield "ICC", save(photo(83, 121), icc_profile=b"profile" * 20_000)
    yield "comment", save(photo(83, 121), comment=b"\xff\xd9\xff\xda" * 1000)
    yield "fill bytes", join(segments_of(ordinary), between=b"\xff" * 5)
    yield "trailing garbage", ordinary + b"garbage" * 100
    yield "trailing image", ordinary + save(photo(20, 30))
    yield "trailing half image", ordinary + save(photo(20, 30))[:-100]
    yield "optimized", save(photo(83, 121), optimize=True)
    yield "standard tables left out", join([s for s in segments_of(ordinary) if s.marker != 0xC4])
    for factors in (0x13, 0x14, 0x24, 0x44):
        grey = save(photo(83, 121, "L"), restart_marker_blocks=4)
        yield f"grey of {factors >> 4} x {factors & 15} blocks", with_frame(grey, factors=factors)
    yield "quality 1", save(photo(83, 121), quality=1)
    yield "quality 100", save(photo(83, 121), quality=100)
    yield "some XMP", save(photo(48, 80), xmp=b"<x:xmpmeta>no orientation</x:xmpmeta>")


def refused() -> Iterator[tuple[str, bytes, str]]:
    """What is left to a general decoder, and the status that says so."""
    ordinary = save(photo(48, 80))
    parts = segments_of(ordinary)
    yield "12 bits", with_frame(ordinary, precision=12), "not supported"
    yield "arithmetic", with_frame(ordinary, SOF9), "not supported"
    yield "lossless", with_frame(ordinary, SOF3), "not supported"
    yield "hierarchical", with_frame(ordinary, 0xC5), "not supported"
    yield "two components", two_components(48, 80), "not supported"
    yield "no height", with_frame(ordinary, height=0), "not supported"
    yield "no width", with_frame(ordinary, width=0), "not supported"
    yield "orientation in XMP", save(photo(48, 80), xmp=b'<rdf tiff:Orientation="6"/>'), "not supported"
    yield "EXIF twice", with_segment(with_segment(ordinary, APP1, exif(6)), APP1, exif(6)), "not supported"
    yield "orientation 9", with_segment(ordinary, APP1, exif(9)), "not supported"
    yield "EXIF cut short", with_segment(ordinary, APP1, exif(6)[:-6]), "not supported"
    yield "EXIF without TIFF", with_segment(ordinary, APP1, b"Exif\0\0"), "not supported"
    yield "EXIF beyond its end", with_segment(ordinary, APP1, b"Exif\0\0II*\0\xff\xff\xff\xff"), "not supported"
    yield "two frames", with_segment(ordinary, SOF0, next(s.content for s in parts if s.marker == SOF0)), "not supported"
    yield "huge", with_frame(ordinary, height=65_500, width=65_500), "too large"
    for number in range(1, 10):
        yield f"{number} scans of 10", some_scans(save(photo(48, 80), progressive=True), number), "not supported"
    scans = segments_of(one_scan_a_component(16, 16, halved=False))
    yield "a thousand scans", join(scans[:-3] + scans[-3:] * 340), "not supported"
    yield "no scan", join(segments_of(ordinary)[:-1]), "broken"
    yield "no frame", join([s for s in segments_of(ordinary) if s.marker != SOF0]), "broken"
    for kind in (0x00, 0x10):
        without = [Segment(0xC4, bytes([kind]) + bytes(16)) if s.marker == 0xC4 and s.content[0] == kind else s for s in parts]
        yield f"a table of no codes, {kind:02x}", join(without), "broken"
    yield "sampling factors of 0", with_frame(ordinary, factors=0), "broken"
    for factors in (0xFF, 0x24, 0x42):
        yield f"luma of {factors >> 4} x {factors & 15} blocks", with_frame(ordinary, factors=factors), "not supported"
    # libjpeg makes a window of 4 pixels from other columns of the half than the whole image.
    mixed = with_frame(save(photo(48, 80), subsampling=0), factors=0x41, second=0x21)
    yield "factors of 4, 2 and 1", mixed, "not supported"
    restarts = save(photo(48, 80), restart_marker_blocks=1)
    yield "a restart marker out of turn", restarts.replace(b"\xff\xd3", b"\xff\xd5", 1), "broken"
    yield "nothing", b"", "not supported"
    yield "SOI alone", b"\xff\xd8", "not supported"
    yield "a PNG", b"\x89PNG\r\n\x1a\n" + bytes(100), "not supported"
