"""Cuts the layers into stages and schedules their micro-batches.

`schedule_1f1b` and `stages` are pure functions of sizes. `schedule`, `deepspeed_compat` and `tied` import DeepSpeed.
"""
