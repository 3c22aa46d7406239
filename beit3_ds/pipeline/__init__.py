"""Divides the layers into pipeline stages, and schedules the micro-batches.

The modules `schedule_1f1b` and `stages` contain pure functions, and do not import DeepSpeed. Most other modules of this
package import DeepSpeed.
"""
