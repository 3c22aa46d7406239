"""Defines the frozen dataclasses that configure a run, and loads them from one JSON file."""

from beit3_ds.config.data import DataConfig, SourceConfig, StreamConfig, TextTokenizerConfig, TokenizersConfig
from beit3_ds.config.dense import DenseConfig
from beit3_ds.config.layouts import check_layout, fits_layout
from beit3_ds.config.model import FIELDS_WITHOUT_TENSORS, INPUT_KINDS, MODEL_SIZES, InputKind, ModelConfig
from beit3_ds.config.parallel import ParallelConfig, RankCoords
from beit3_ds.config.run import RunConfig, build_run_config, load_run_config
from beit3_ds.config.source_names import short_source_names
from beit3_ds.config.step_shares import SampleCounts, StepShares
from beit3_ds.config.strict import ConfigError
from beit3_ds.config.task import TaskConfig
from beit3_ds.config.training import ActivationCheckpointing, KernelBackend, TrainingConfig
from beit3_ds.config.visual_tokenizer import TeacherConfig, VisualTokenizerConfig

__all__ = [
    "FIELDS_WITHOUT_TENSORS",
    "INPUT_KINDS",
    "MODEL_SIZES",
    "ActivationCheckpointing",
    "ConfigError",
    "DataConfig",
    "DenseConfig",
    "InputKind",
    "KernelBackend",
    "ModelConfig",
    "ParallelConfig",
    "RankCoords",
    "RunConfig",
    "SampleCounts",
    "SourceConfig",
    "StepShares",
    "StreamConfig",
    "TaskConfig",
    "TeacherConfig",
    "TextTokenizerConfig",
    "TokenizersConfig",
    "TrainingConfig",
    "VisualTokenizerConfig",
    "build_run_config",
    "check_layout",
    "fits_layout",
    "load_run_config",
    "short_source_names",
]
