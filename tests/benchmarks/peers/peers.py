"""The peers' loaders, each as its own documentation recommends: shuffled, batches of 8 made in the
worker where it can, one decoding thread per worker.

Each is a function (store, number of workers, whether frames are normalized in the worker) -> an
iterable of batches of one epoch. What a peer imports, it imports when it is opened: each runs in a
process of its own.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, default_collate
from windows import (
    BATCH_SIZE,
    EYES,
    NUM_FRAMES,
    NUMBERS,
    SHUFFLE_BUFFER,
    SIZE,
    TICK_RATE_HZ,
    decode_eye,
    normalize_as_users_do,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from numpy.typing import NDArray
    from recordings import Store

Batch = dict[str, Any]


# --- sessions, decoded on the fly -------------------------------------------------------------


class SessionWindows(Dataset[dict[str, Any]]):
    """Windows of mp4 files; only video is decoded, numbers are read from files."""

    def __init__(self, store: Store, read: Callable[[Path, float], Any], *, normalize: bool):
        self._sessions = store.sessions
        self._read = read
        self._normalize = normalize
        files = sorted((store.root / "formats" / "numbers").glob("*.npz"))
        loaded = [dict(np.load(f)) for f in files]
        self._numbers = {n: np.concatenate([f[n] for f in loaded]) for n in (*NUMBERS, "key")}

    def __len__(self) -> int:
        return len(self._numbers["key"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        key = str(self._numbers["key"][index])
        session, _, tick = key.partition("@")
        start_s = int(tick) / TICK_RATE_HZ
        sample = {name: self._numbers[name][index] for name in NUMBERS}
        for eye in EYES:
            pictures = self._read(self._sessions / session / f"{eye}.mp4", start_s)
            sample[eye] = normalize_as_users_do(pictures) if self._normalize else pictures
        return {**sample, "key": key}


def open_sessions_pyav(store: Store, workers: int, normalize: bool) -> Iterable[Batch]:
    """PyAV: seek to the keyframe before the window, decode on, scale the frames that are kept."""
    import av
    from av.video.reformatter import Interpolation, VideoReformatter

    reformatter = VideoReformatter()
    step_s = 4.0 / NUM_FRAMES

    def read(path: Path, start_s: float) -> NDArray[np.uint8]:
        pictures = np.empty((NUM_FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
        found = 0
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            container.seek(round(start_s / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time < start_s + found * step_s - 1e-3:
                    continue
                width = round(frame.width * SIZE / frame.height)
                small = reformatter.reformat(
                    frame, width, SIZE, "rgb24", interpolation=Interpolation.AREA
                )
                left = (width - SIZE) // 2
                pictures[found] = small.to_ndarray()[:, left : left + SIZE]
                found += 1
                if found == NUM_FRAMES:
                    return pictures
        pictures[found:] = pictures[found - 1]
        return pictures

    return _map_style(SessionWindows(store, read, normalize=normalize), workers)


def open_sessions_torchcodec(store: Store, workers: int, normalize: bool) -> Iterable[Batch]:
    """TorchCodec: an open decoder per file, frames by time, cut and scaled by the decoder.

    It cuts before it scales, a third of a pixel beside our pictures: so its PSNR is low.
    """
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import CenterCrop, Resize

    decoders: dict[Path, VideoDecoder] = {}

    def read(path: Path, start_s: float) -> NDArray[np.uint8]:
        if path not in decoders:
            transforms = [CenterCrop((480, 480)), Resize((SIZE, SIZE))]
            decoders[path] = VideoDecoder(
                path, dimension_order="NHWC", num_ffmpeg_threads=1, transforms=transforms
            )
        decoder = decoders[path]
        times = start_s + np.arange(NUM_FRAMES) * 4.0 / NUM_FRAMES + 1e-3
        last_s = decoder.metadata.end_stream_seconds - 1e-2
        return decoder.get_frames_played_at(np.minimum(times, last_s).tolist()).data.numpy()

    return _map_style(SessionWindows(store, read, normalize=normalize), workers)


def _map_style(dataset: Dataset[dict[str, Any]], workers: int) -> Iterable[Batch]:
    return DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, num_workers=workers)


# --- WebDataset -------------------------------------------------------------------------------


def open_webdataset_pillow(store: Store, workers: int, normalize: bool) -> Iterable[Batch]:
    """A member per frame, decoded by Pillow: WebDataset's own ``decode("rgb8")``."""

    def stack(sample: dict[str, Any]) -> dict[str, Any]:
        eyes = {e: np.stack([sample[f"{e}{i:02}.jpg"] for i in range(NUM_FRAMES)]) for e in EYES}
        numbers = {name: sample[f"{name}.npy"] for name in NUMBERS}
        return {**_finished(eyes, normalize), **numbers, "key": sample["__key__"]}

    return _webdataset(store, "tar-frames", workers, lambda d: d.decode("rgb8").map(stack))


def open_webdataset_simplejpeg(store: Store, workers: int, normalize: bool) -> Iterable[Batch]:
    """A member per camera, decoded by simplejpeg straight into one array."""
    return _webdataset(store, "tar-eyes", workers, lambda d: d.map(_tar_sample(normalize)))


def _webdataset(
    store: Store, name: str, workers: int, decode: Callable[[Any], Any]
) -> Iterable[Batch]:
    import webdataset

    urls = sorted(map(str, (store.root / "formats" / name).glob("*.tar")))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(SHUFFLE_BUFFER)
    batches = decode(dataset).batched(BATCH_SIZE, collation_fn=default_collate)
    return webdataset.WebLoader(batches, batch_size=None, num_workers=workers)


def _tar_sample(normalize: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Decode a sample of the tars with a member per camera."""

    def decode(sample: dict[str, Any]) -> dict[str, Any]:
        eyes = {eye: decode_eye(sample[f"{eye}.mjpeg"]) for eye in EYES}
        numbers = {name: _as_array(sample[f"{name}.npy"], kind) for name, kind in NUMBERS.items()}
        return {**_finished(eyes, normalize), **numbers, "key": sample["__key__"]}

    return decode


def _as_array(value: Any, kind: type[np.generic]) -> NDArray[Any]:
    """Return a member's array; Hugging Face datasets converts it to lists."""
    return np.load(io.BytesIO(value)) if isinstance(value, bytes) else np.array(value, dtype=kind)


def _finished(eyes: dict[str, NDArray[np.uint8]], normalize: bool) -> dict[str, Any]:
    return {eye: normalize_as_users_do(v) for eye, v in eyes.items()} if normalize else eyes


# --- formats of their own ---------------------------------------------------------------------


def open_huggingface(store: Store, workers: int, normalize: bool) -> Iterable[Batch]:
    """Hugging Face datasets' ``load_dataset("webdataset")`` in streaming mode."""
    from datasets import load_dataset

    files = sorted(map(str, (store.root / "formats" / "tar-eyes").glob("*.tar")))
    dataset = load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
    shuffled = dataset.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER)
    names = dataset.column_names
    # Without with_format("torch"), which costs 23 ms per sample; the loader makes tensors anyway.
    samples = shuffled.map(_tar_sample(normalize), remove_columns=names)
    return DataLoader(samples, batch_size=BATCH_SIZE, num_workers=workers)


def open_mosaic(store: Store, workers: int, normalize: bool) -> Iterable[Batch]:
    """MosaicML Streaming: a subclass that decodes in ``__getitem__``."""
    from mosaic import StreamingDataset, clean_stale_shared_memory

    class Samples(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            return _finish_sample(super().__getitem__(at), normalize)

    clean_stale_shared_memory()
    local = str(store.root / "formats" / "mds")
    dataset = Samples(local=local, shuffle=True, batch_size=BATCH_SIZE)
    return DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=workers)


def open_litdata(store: Store, workers: int, normalize: bool) -> Iterable[Batch]:
    """LitData's StreamingDataset and StreamingDataLoader."""
    import litdata

    dataset = litdata.StreamingDataset(
        str(store.root / "formats" / "litdata"),
        shuffle=True,
        transform=lambda sample: _finish_sample(sample, normalize),
    )
    return litdata.StreamingDataLoader(dataset, batch_size=BATCH_SIZE, num_workers=workers)


def _finish_sample(sample: dict[str, Any], normalize: bool) -> dict[str, Any]:
    eyes = {eye: decode_eye(bytes(sample[eye])) for eye in EYES}
    return {**sample, **_finished(eyes, normalize)}


def open_energon(store: Store, workers: int, normalize: bool) -> Iterable[Batch]:
    """Megatron-Energon: samples are decoded after its shuffle buffer, as its task encoder does."""
    from megatron import energon

    decode = _tar_sample(normalize)

    @energon.edataclass
    class Window(energon.Sample):
        values: dict[str, Any]

    @energon.stateless
    def cook(sample: dict[str, Any]) -> Window:
        return Window(**energon.basic_sample_keys(sample), values=sample)

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
        decoder = None
        cookers = [energon.Cooker(cook)]  # noqa: RUF012

        @energon.stateless
        def encode_sample(self, sample: Window) -> Window:
            return Window.derive_from(sample, values=decode(sample.values))

        @energon.stateless
        def batch(self, samples: list[Window]) -> dict[str, Any]:
            return default_collate([sample.values for sample in samples])

    dataset = energon.get_train_dataset(
        str(store.root / "formats" / "energon"),
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=BATCH_SIZE,
        shuffle_buffer_size=SHUFFLE_BUFFER,
        max_samples_per_sequence=SHUFFLE_BUFFER,
        task_encoder=Encoder(),
        repeat=False,
    )
    return energon.get_loader(dataset)
