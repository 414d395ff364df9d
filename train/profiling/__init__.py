"""``train profile``: where each second of training goes, and what would make it faster.

::

    breakdown   some steps on the real loader: seconds by phase, part of the model, stage of the
                loader; how many batches were ready when one was asked for
    trace       some steps under torch.profiler: operators, memory by phase, a file for TensorBoard
    rates       short runs in turns: the loader with other numbers of processes, the step with other
                settings; each against the configured one, round by round
    advice      those figures -> recommendations: a pure function
    report      all of it as profile_report.json and as tables

Nothing of a run is touched: the weights are fresh, no checkpoint is read or written, and only the
folder of the report is written to.
"""
