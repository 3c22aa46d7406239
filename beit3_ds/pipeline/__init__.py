"""The layers cut into stages, and the one schedule that owns micro-batches.

`schedule_1f1b` and `stages` are pure functions of sizes; `schedule`, `deepspeed_compat` and `tied` import DeepSpeed,
which takes seconds.
"""
