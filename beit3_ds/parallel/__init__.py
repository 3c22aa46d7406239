"""Provides the mesh of ranks, its collectives, and tensor-parallel layers. Independent of BEiT-3."""

from beit3_ds.parallel.broadcast_batches import BroadcastBatches
from beit3_ds.parallel.divided_samples import DividedSamples, sum_gradients
from beit3_ds.parallel.host_group import HostGroup, build_host_group
from beit3_ds.parallel.mesh import Mesh, ModelParallelUnit, build_mesh
from beit3_ds.parallel.pipeline import Message, PipelineParallel
from beit3_ds.parallel.tensor import (
    Split,
    TensorParallel,
    is_split,
    logical_part,
    logical_shape,
    own_part,
    split_parameter,
)
from beit3_ds.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead

__all__ = [
    "BroadcastBatches",
    "DividedSamples",
    "HostGroup",
    "Mesh",
    "Message",
    "ModelParallelUnit",
    "PipelineParallel",
    "Split",
    "TensorParallel",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "build_host_group",
    "build_mesh",
    "is_split",
    "logical_part",
    "logical_shape",
    "own_part",
    "split_parameter",
    "sum_gradients",
]
