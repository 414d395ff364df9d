"""What both programs mean by their words; imports neither torch nor dask.

session: one recording, a folder. stream: one timed signal of it. clock: seconds since session
    start.
window: ``[start, start + duration)`` on the clock. sample: the encoded fields of one window.
field: one stream's part in a sample. recipe: how streams become fields. shard: a run of samples.
column: one field of all samples of a shard. shard set: a folder of shards with one manifest.
tick: one time step of the model. step: one optimizer step.
"""
