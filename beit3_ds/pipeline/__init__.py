"""The layers cut into stages, and the one schedule that owns micro-batches.

`order` and `stages` are pure functions of sizes; `schedule`, `seams` and `tied` import DeepSpeed, which takes seconds.
"""
