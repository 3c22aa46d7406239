"""Defines a head that decides whether a statement about two images is true, like the NLVR2 model in Microsoft's BEiT-3
code.
"""

# S samples, P = 2 S pairs, M = 2 P rows, D hidden.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model import Head
from beit3_ds.parallel import TensorParallel

LABELS = "labels"
"""Key in `PackedBatch.targets`: label of each sample, (samples,) int64; 1 for a true statement, 0 for a false one."""


class StatementHead(Head):
    """Decides whether a statement about two images is true (paper section 3.1).

    A sample is two image-text pairs. Pair 2 i is the left image with the statement, and pair 2 i + 1 is the right image
    with the statement. The head reads the CLS row of each image and the BOS row of each text. The four rows of a sample
    are concatenated to 4 times the hidden size. The next layers are LayerNorm, a linear layer to 2 times the hidden
    size, LayerNorm, GELU, and a linear layer to two classes. Parameters are replicated on all tensor-parallel ranks,
    which compute equal logits.
    """

    def __init__(self, config: ModelConfig, tensor: TensorParallel | None = None) -> None:
        """Builds the head with uninitialised parameters.

        Args:
            config: the model's configuration.
            tensor: the tensor-parallel group; unused, because the parameters are replicated.
        """
        super().__init__()
        width = config.hidden_size
        self.input_norm = nn.LayerNorm(4 * width, config.layer_norm_epsilon)
        self.dense = nn.Linear(4 * width, 2 * width)
        self.hidden_norm = nn.LayerNorm(2 * width, config.layer_norm_epsilon)
        self.classes = nn.Linear(2 * width, 2)

    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Returns two terms summed over samples, (2,) float32, or the logits, (samples, 2) float32.

        The first term is the cross entropy. The second term is the number of correct answers, without gradient. The two
        logits are for "false" and "true".

        Args:
            h_MD: CLS rows of the images of all pairs, then BOS rows of the texts, (2 * pairs, hidden size).
            batch: the packed micro-batch; needs `LABELS` if `with_loss`.
            with_loss: True returns the terms, False the logits.
        """
        assert batch.num_pairs % 2 == 0, f"{batch.num_pairs} pairs, but a sample has two"
        cls_PD, bos_PD = h_MD.tensor_split(2)
        joined_S = torch.cat([cls_PD, bos_PD], dim=1).reshape(-1, 4 * h_MD.shape[1])
        hidden_S = self.hidden_norm(self.dense(self.input_norm(joined_S)))
        logits = self.classes(F.gelu(hidden_S)).float()
        if not with_loss:
            return logits
        labels = batch.targets[LABELS]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return torch.stack([loss, (logits.argmax(1) == labels).sum().float()])
