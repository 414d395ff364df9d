"""Open video files: choose the main track, and say what a file is that can't be read.

A file may contain several video tracks. The main one is no cover picture or thumbnail, has more
than one frame, and is the largest by pixels times frames; then the container's default flag
decides, then the order in the file.
"""

from __future__ import annotations

import codecs
import errno
import io
import itertools
import os
import stat
import struct
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO

import av
from av.stream import Disposition

from shared.errors import LINK_FAULT, MediaError, MissingMediaError
from shared.machine import describe_os_error, open_for_library, open_steadily, read_steadily

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from av.container import InputContainer

MAX_PIXELS = 8192 * 8192
"""A larger picture is refused before it is decoded."""

MAX_PIXEL_ASPECT = 16.0
"""A more extreme shape of pixels is a damaged header; pixels then count as square."""

INDEXED_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
"""Containers in which a seek ends at the requested keyframe, and whose clock begins at 0."""

RAW_FORMATS = {"h264", "hevc", "m4v", "mjpeg", "mpegvideo", "obu"}
"""Elementary streams: packets without times. Their demuxers assume 25 frames per second."""

READ_ERRORS = (av.FFmpegError, IndexError)
"""Errors that PyAV raises while it reads packets; IndexError if damage makes a track appear
midway."""

_NUM_PROBED = 100
"""Packets that tell which tracks have one frame."""

_OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,mpeg,mpegts,ivf,ogg,flv," + ",".join(sorted(RAW_FORMATS)),
}
"""Refuse playlists that name other files or hosts, and text that ffmpeg would draw as a picture."""

REPLACE_FIX = "fix: replace it, or remove it to do without it"
"""Fix for a file of a session that can't be read."""

COPY_FIX = "fix: copy it again from the recorder if the original is longer"

REPAIR_FIX = (
    "fix: restore the index with a tool such as untrunc and a whole file of the same recorder, or "
    "copy it again if the original is whole"
)

_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image

_CODEC_NAMES = {"libdav1d": "av1", "libaom-av1": "av1", "libvpx-vp9": "vp9", "libvpx": "vp8"}
"""Names of codecs whose decoder has another one."""

_HEAD_BYTES = 4096
_HEADS = {
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG": "a PNG picture",
    b"GIF8": "a GIF picture",
    b"BM": "a BMP picture",
    b"II*\0": "a TIFF picture",
    b"MM\0*": "a TIFF picture",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"ID3": "an MP3 sound",
    b"fLaC": "a FLAC sound",
}
_RIFF_KINDS = {b"WAVE": "a WAV sound", b"WEBP": "a WebP picture"}
_PICTURE_BRANDS = {b"heic", b"heix", b"mif1", b"msf1", b"avif"}
"""Brands of ISO/IEC 23008-12: the file is a picture in a container like that of MP4."""

_TEXT_STARTS = {"{": "JSON", "[": "JSON", "<!": "HTML", "<h": "HTML", "<": "XML"}
_EBML = b"\x1aE\xdf\xa3"
_BOXES = {b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"styp", b"sidx", b"pnot"}


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, Any]]:
    """Open a container and its main video track, after checks that need no decoding.

    Raises:
        MediaError: the file doesn't open or contains no video that can be decoded.
        MachineError: the machine could not read all that was requested.
    """
    require_bytes(path)
    if _is_heif(head := _read_head(path)):  # ffmpeg would open it
        raise MediaError(f"{path}: {_recognize(head)}")
    with ExitStack() as stack:
        try:
            container = stack.enter_context(_open(path, stack))
        except (av.FFmpegError, ValueError) as error:
            reason = f"not a readable video: {error_reason(error)}; {REPLACE_FIX}"
            raise MediaError(f"{path}: {explain_failure(path) or reason}") from error
        stream = choose_track(_lasting_tracks(path, container.streams.video))
        if stream is None:
            content = "only a cover picture" if container.streams.video else "no video track"
            reason = f"contains {content}; {REPLACE_FIX}"
            raise MediaError(f"{path}: {explain_failure(path) or reason}")
        context: Any = stream.codec_context  # None if no decoder is known, despite its type
        if context is None or context.width == 0:
            reason = "its codec is unknown; fix: re-encode it as h264"
            raise MediaError(f"{path}: {explain_failure(path) or reason}")
        # One process per core is faster than threads within one, and the decoder of AV1 reports
        # damage without delay.
        stream.thread_type, context.thread_count = "NONE", 1
        if context.width * context.height > MAX_PIXELS:
            size = f"{context.width}x{context.height}"
            raise MediaError(f"{path}: pictures of {size} are too large; fix: re-encode it smaller")
        yield container, stream


class FilePart(io.RawIOBase):
    """Some bytes, and after them the `size` bytes of a file from `start` on."""

    def __init__(self, file: BinaryIO, start: int, size: int, *, head: bytes = b"") -> None:
        self._file, self._start, self._size, self._head = file, start, size, head
        self._position = 0

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def seek(self, offset: int, origin: int = os.SEEK_SET, /) -> int:  # noqa: D102
        stop = len(self._head) + self._size
        ends = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: stop}
        self._position = max(0, ends[origin] + offset)
        return self._position

    def readinto(self, buffer: bytearray, /) -> int:  # type: ignore[override]  # noqa: D102
        size, in_file = len(buffer), self._position - len(self._head)
        if in_file < 0:
            content = self._head[self._position : self._position + size]
        else:
            self._file.seek(self._start + in_file)
            content = self._file.read(max(0, min(size, self._size - in_file)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:  # noqa: D102
        self._file.close()
        super().close()


def _open(path: Path, stack: ExitStack) -> InputContainer:
    """Open a container; one whose last fragment has no whole header is opened up to there."""
    try:
        file: BinaryIO = stack.enter_context(open_for_library(path))
        return av.open(file, "r", metadata_errors="ignore", options=_OPEN_OPTIONS)
    except (av.FFmpegError, ValueError):
        cut = _cut_part(path)
        if cut is None or cut[0] != b"moof":
            raise
        head = FilePart(stack.enter_context(open_for_library(path)), 0, cut[1])
        return av.open(head, "r", metadata_errors="ignore", options=_OPEN_OPTIONS)


def is_picture(track: Any) -> bool:  # noqa: ANN401
    """Return whether a track is a cover picture or a thumbnail."""
    return bool(track.disposition & _PICTURES)


def _lasting_tracks(path: Path, tracks: Sequence[Any]) -> list[Any]:
    """Return the video tracks without those of one frame, if the container doesn't count frames.

    Only the first packets are read.
    """
    if len(tracks) < 2 or all(track.frames for track in tracks):
        return list(tracks)
    with ExitStack() as stack:
        try:
            container = stack.enter_context(_open(path, stack))
            packets = itertools.islice(container.demux(video=[*range(len(tracks))]), _NUM_PROBED)
            counts = Counter(packet.stream_index for packet in packets if packet.size)
        except READ_ERRORS:
            return list(tracks)
    return [track for track in tracks if counts[track.index] > 1] or list(tracks)


def choose_track(tracks: Sequence[Any]) -> Any | None:  # noqa: ANN401
    """Choose the main video track of a file; None if it has only cover pictures."""
    videos = [track for track in tracks if not is_picture(track)]
    # Matroska, MPEG streams and fragments don't say how many frames a track has.
    is_counted = all(track.frames for track in videos)

    def rank(track: Any) -> tuple[bool, int, bool]:  # noqa: ANN401
        context, num_frames = track.codec_context, track.frames if is_counted else 2
        pixels = context.width * context.height if context is not None else 0
        return num_frames > 1, pixels * num_frames, bool(track.disposition & Disposition.default)

    return max(videos, key=rank, default=None)


def codec_name(context: Any) -> str:  # noqa: ANN401
    """Return the name of a codec, not that of its decoder."""
    name: str = context.name
    return _CODEC_NAMES.get(name, name)


def pixel_aspect(stream: Any) -> float:  # noqa: ANN401
    """Return the width of a pixel by its height, as the container or else the codec declares it."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT else 1.0


def decode_all(container: InputContainer, stream: Any) -> Iterator[Any]:  # noqa: ANN401
    """Decode every frame of a track; packets that don't decode are skipped."""
    try:
        for packet in container.demux(stream):
            with suppress(av.FFmpegError):
                yield from packet.decode()
    except READ_ERRORS:
        return


def container_origin_s(container: InputContainer) -> float:
    """Return the start of a container whose clock has a meaningful zero, else 0."""
    is_indexed = container.format.name in INDEXED_FORMATS
    return (container.start_time or 0) / av.time_base if is_indexed else 0.0


def require_bytes(path: Path) -> None:
    """Check that a path is a regular file that is not empty.

    Raises:
        MissingMediaError: it doesn't exist.
        MediaError: it isn't such a file.
    """
    try:
        status = read_steadily(path.stat, path)
    except OSError as error:
        if path.is_symlink():
            raise MediaError(f"{path}: {LINK_FAULT}") from error
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise MissingMediaError(f"{path}: no such file") from error
        raise MediaError(describe_os_error(error, path)) from error
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{path}: not a regular file; fix: put the recording there")
    if status.st_size == 0:
        raise MediaError(f"{path}: the file is empty; fix: record or copy it again")
    if not os.access(path, os.R_OK):
        refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        raise MediaError(describe_os_error(refused, path))


def error_reason(error: Exception) -> str:
    """Return a library's reason in one line."""
    return str(getattr(error, "strerror", None) or error).splitlines()[0]


def explain_failure(path: Path) -> str | None:
    """Say why a file that no decoder accepts is no whole video, and the fix; None if unknown."""
    with suppress(OSError):
        if (reason := _recognize(_read_head(path))) is not None:
            return reason
        cut, names = describe_cut(path), [name for name, _, _ in _iter_parts(path)]
        if not names or names[0] not in _BOXES or b"moov" in names:
            return cut
        if cut is not None:
            return f"its index (the moov box) is missing, as it is {cut}"
        text = "its index (the moov box) is missing: the recorder did not finish the file"
        return f"{text}; {REPAIR_FIX}"
    return None


def describe_cut(path: Path) -> str | None:
    """Say which part of a container reaches beyond the end of the file, and the fix; else None."""
    cut = _cut_part(path)
    if cut is None:
        return None
    name, start, stop = cut
    return (
        f"cut off: its last part ({name.decode()}) should have {stop - start} bytes, but "
        f"{path.stat().st_size - start} are there; {COPY_FIX}"
    )


def _cut_part(path: Path) -> tuple[bytes, int, int] | None:
    """Return (type, start, stop) of the part of a container that its file does not have whole."""
    length = path.stat().st_size
    return next((part for part in _iter_parts(path) if part[2] > length), None)


def _read_head(path: Path) -> bytes:
    with open_steadily(path) as file:
        return file.read(_HEAD_BYTES)


def _recognize(head: bytes) -> str | None:
    """Say what a file is that begins like this, and the fix; None if it may be a video."""
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer; fix: fetch the file with `git lfs pull`"
    if not any(head):
        return f"begins with zeros only: its blocks were never written; {COPY_FIX}"
    kinds = [kind for start, kind in _HEADS.items() if head.startswith(start)]
    if head.startswith(b"RIFF") and head[8:12] in _RIFF_KINDS:
        kinds.append(_RIFF_KINDS[head[8:12]])
    if _is_heif(head):
        kinds.append("an HEIF picture")
    if not kinds and (text := _as_text(head)) is not None:
        kinds += [kind for start, kind in _TEXT_STARTS.items() if text.startswith(start)]
        kinds.append("plain text")
    return f"is {kinds[0]}, not a video; {REPLACE_FIX}" if kinds else None


def _is_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in _PICTURE_BRANDS


def _as_text(head: bytes) -> str | None:
    """Decode a file's beginning; None if it isn't text."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return None
    return text.lstrip() if all(c.isprintable() or c.isspace() for c in text) else None


def _iter_parts(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, stop) of each top box of an MP4 file, or of the whole of AVI or Matroska.

    Of other files, nothing is known. Sources: ISO/IEC 14496-12, 4.2; RFC 8794, 6.
    """
    head, length, start = _read_head(path), path.stat().st_size, 0
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        yield b"RIFF", 0, 8 + int.from_bytes(head[4:8], "little")
        return
    if head.startswith(_EBML):
        begin, size = _element_size(head, 4)
        begin, size = _element_size(head, begin + size + 4)
        yield b"Segment", begin, begin + size
        return
    with open_steadily(path) as file:
        while start + 8 <= length:
            file.seek(start)
            size, name, large = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            if start == 0 and name not in _BOXES:
                return
            stop = start + (large if size == 1 else size) if size else length
            if stop < start + 8 or not name.isalnum():
                return
            yield name, start, stop
            start = stop


def _element_size(head: bytes, start: int) -> tuple[int, int]:
    """Return where the content of an element begins, and its length.

    Its size begins at `start`. A recorder that does not know it yet writes only ones: the length is
    then 0.
    """
    count = 9 - head[start].bit_length() if start < len(head) else 9
    mask = (1 << 7 * count) - 1
    size = int.from_bytes(head[start : start + count], "big") & mask
    return start + count, 0 if size == mask or count > 8 else size
