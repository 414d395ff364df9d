"""Sessions, media and shard sets, as both programs understand them; no torch, no dask.

session: one recording, a folder. stream: one timed signal of a session. clock: seconds since the
    session's start.
window: ``[start, start + duration)`` on the clock. sample: the encoded fields of one window.
field: one stream's share of a sample. recipe: how streams become fields. shard: a group of samples.
column: one field of all samples of a shard. shard set: a folder of shards with one manifest.
tick: one time step of the model. step: one optimizer step.
"""
