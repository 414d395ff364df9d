"""Read NAL units of H.264 and HEVC: where a decoder can start, and where frames were lost.

Only packets with lengths before their NAL units, as in MP4 and Matroska, are read; of others,
nothing is known. Source: ITU-T H.264, 7.3.2.1.1, 7.3.3 and 7.4.3; H.265, 7.4.2.2.
"""

from __future__ import annotations

from typing import Any

_LENGTH_BYTE = {"h264": 4, "hevc": 21}
"""Byte of avcC and hvcC (ISO/IEC 14496-15) that holds the size of NAL unit lengths."""

_H264_IDR, _H264_LAST_SLICE, _H264_REFERENCE = 5, 5, 0x60
_H264_PARAMETERS = 7
_H264_INTRA_SLICES = {0xB, 8}
"""First four bits of a slice header: macroblock 0, then slice type 2 or 7."""

_HEVC_IDR, _HEVC_LAST_SLICE = (19, 20), 31

_HEAD_BYTES = 14
"""Bytes of a slice that contain its header up to frame_num."""

_PROFILES_WITH_CHROMA = {44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244}


class NalReader:
    """Reads the first slice of each packet of a track."""

    def __init__(self, codec_context: Any) -> None:  # noqa: ANN401
        self._codec = codec_context.name
        self._length_bytes: int | None = None
        self._frame_num_bits: int | None = None
        self._frame_num: int | None = None
        index, header = _LENGTH_BYTE.get(self._codec), codec_context.extradata
        if index is not None and header is not None and len(header) > index and header[0] == 1:
            self._length_bytes = int(header[index] & 3) + 1
            if self._codec == "h264" and header[5] & 31 == 1:
                stop = 8 + int.from_bytes(header[6:8], "big")
                self._frame_num_bits = _frame_num_bits(bytes(header[8:stop]))

    @property
    def knows_slices(self) -> bool:
        """Whether packets can be read."""
        return self._length_bytes is not None

    def is_restart(self, packet: Any) -> bool:  # noqa: ANN401
        """Check whether a packet is an IDR picture: nothing after it refers to anything before it.

        Of a track whose packets can't be read, no packet is.
        """
        head = self._slice_head(packet)
        if head is None:
            return False
        kind = head[0] & 31 if self._codec == "h264" else head[0] >> 1 & 63
        return kind == _H264_IDR if self._codec == "h264" else kind in _HEVC_IDR

    def is_intra(self, packet: Any) -> bool:  # noqa: ANN401
        """Check whether a keyframe is not one of H.264 that refers to other pictures."""
        head = self._slice_head(packet) if self._codec == "h264" else None
        return head is None or head[1] >> 4 in _H264_INTRA_SLICES

    def is_disposable(self, packet: Any) -> bool:  # noqa: ANN401
        """Check whether a packet is a picture of H.264 that no other refers to."""
        head = self._slice_head(packet) if self._codec == "h264" else None
        return head is not None and not head[0] & _H264_REFERENCE

    def follows_lost_frame(self, packet: Any, *, is_keyframe: bool) -> bool:  # noqa: ANN401
        """Check whether a reference picture of H.264 is missing before a packet.

        Packets come in the file's order. A keyframe needs no picture before it.
        """
        if packet.has_sidedata("new_extradata"):
            self._frame_num_bits = None
        head = self._slice_head(packet) if self._codec == "h264" else None
        if head is None or self._frame_num_bits is None:
            return False
        last, number = self._frame_num, _frame_num(head, self._frame_num_bits)
        if head[0] & _H264_REFERENCE or is_keyframe:
            self._frame_num = number
        is_next = last is None or (number - last) % (1 << self._frame_num_bits) <= 1
        return not is_next and not is_keyframe

    def _slice_head(self, packet: Any) -> bytes | None:  # noqa: ANN401
        """Return the first bytes of a packet's first slice; parameter sets are skipped."""
        length_bytes = self._length_bytes
        if length_bytes is None:
            return None
        view = memoryview(packet)
        while len(view) > length_bytes + 1:
            size = int.from_bytes(view[:length_bytes], "big")
            kind = view[length_bytes]
            is_slice = kind >> 1 & 63 <= _HEVC_LAST_SLICE
            if self._codec == "h264":
                is_slice = 0 < kind & 31 <= _H264_LAST_SLICE
                if kind & 31 == _H264_PARAMETERS:
                    parameters = bytes(view[length_bytes : length_bytes + size])
                    self._frame_num_bits = _frame_num_bits(parameters)
            if is_slice:
                return bytes(view[length_bytes : length_bytes + _HEAD_BYTES])
            view = view[length_bytes + size :]
        return None


class _Bits:
    """Reads bits and Exp-Golomb codes of a NAL unit."""

    def __init__(self, content: bytes) -> None:
        content = content.replace(b"\0\0\3", b"\0\0")  # emulation prevention
        self._value, self._left = int.from_bytes(content, "big"), len(content) * 8

    def bits(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise ValueError("too few bits")
        return self._value >> self._left & ((1 << count) - 1)

    def code(self) -> int:
        zeros = self._left - (self._value & ((1 << self._left) - 1)).bit_length()
        return self.bits(2 * zeros + 1) - 1


def _frame_num(head: bytes, num_bits: int) -> int:
    """Return frame_num of a slice that begins like this; 0 if it is too short."""
    reader = _Bits(head[1:].ljust(_HEAD_BYTES, b"\0"))
    try:
        for _ in range(3):  # first_mb_in_slice, slice_type, pic_parameter_set_id
            reader.code()
        return reader.bits(num_bits)
    except ValueError:
        return 0


def _frame_num_bits(parameters: bytes) -> int | None:
    """Return the length of frame_num; None if it may have gaps, or the parameters are rare."""
    reader = _Bits(parameters[1:])
    try:
        profile = reader.bits(24) >> 16
        reader.code()  # seq_parameter_set_id
        if profile in _PROFILES_WITH_CHROMA:
            is_separate = reader.code() == 3 and reader.bits(1)
            for _ in range(2):  # depth of luma and chroma
                reader.code()
            if is_separate or reader.bits(2) & 1:  # scaling matrices follow
                return None
        num_bits = reader.code() + 4
        order_type = reader.code()
        if order_type == 1:
            return None
        if order_type == 0:
            reader.code()
        reader.code()  # max_num_ref_frames
        return None if reader.bits(1) or num_bits > 16 else num_bits
    except ValueError:
        return None
