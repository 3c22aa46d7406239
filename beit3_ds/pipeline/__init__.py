"""Divides the layers into pipeline stages, and schedules the micro-batches.

The modules `schedule_1f1b` and `stages` are pure functions of sizes. `schedule`, `deepspeed_compat` and `tied` import
DeepSpeed.
"""
