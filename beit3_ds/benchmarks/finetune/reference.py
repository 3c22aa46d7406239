"""Fine-tunes torchscale 0.3.0's BEiT-3 like microsoft/unilm; this is the reference of `beit3 bench finetune`.

Heads, losses, masks and padding follow microsoft/unilm's `beit3`. Texts are padded to a fixed length. For retrieval,
images and texts are encoded in two calls. The last layer computes all rows, also those that the head does not read.
"""

# B samples, S tokens of the longest text, D hidden, M masked tokens, A answers, V vocabulary.

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from beit3_ds.benchmarks.finetune.cases import CASES, LABEL_SMOOTHING, NUM_ANSWERS, PAD, Samples, mask_id
from beit3_ds.benchmarks.step.reference import build_torchscale
from beit3_ds.config import ModelConfig, RunConfig
from beit3_ds.weights.unilm_names import reference_arguments


class Pooler(nn.Module):
    """Computes a pooled feature from the CLS row with LayerNorm, a linear layer and tanh."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, width)

    def forward(self, y_BSD: Tensor) -> Tensor:
        """Returns the pooled feature of each sample, (samples, width)."""
        pooled_BD: Tensor = self.dense(self.norm(y_BSD[:, 0])).tanh()
        return pooled_BD


class ReferenceModel(nn.Module):
    """Combines torchscale's backbone with the head of one task; parameters have the names of the released weights."""

    def __init__(self, task: str, model: ModelConfig) -> None:
        super().__init__()
        self.task, self.padded_length, self.mask_id = task, CASES[task].padded_length, mask_id(model)
        arguments = reference_arguments(model) | {"drop_path_rate": model.drop_path_rate}
        self.beit3 = build_torchscale(arguments)
        width = model.hidden_size
        if task == "vqa":
            self.pooler = Pooler(width)
            self.head = nn.Sequential(
                nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, NUM_ANSWERS)
            )
        elif task == "retrieval":
            self.vision_head, self.language_head = (nn.Linear(width, width, bias=False) for _ in range(2))
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        else:
            self.mlm_head = nn.Linear(width, model.text_vocab_size)
        self.apply(_init_weights)

    def forward(self, samples: Samples) -> Tensor:
        """Returns the loss of a batch, averaged over samples or, for captioning, over masked tokens."""
        losses: dict[str, Callable[[Samples], Tensor]] = {
            "vqa": self._answer,
            "retrieval": self._match,
            "captioning": self._describe,
        }
        return losses[self.task](samples)

    def _answer(self, samples: Samples) -> Tensor:
        tokens, padding = pad(samples.texts, self.padded_length)
        y_BSD = self.beit3(textual_tokens=tokens, visual_tokens=samples.pixels, text_padding_position=padding)[
            "encoder_out"
        ]
        logits_BA = self.head(self.pooler(y_BSD))
        return F.binary_cross_entropy_with_logits(logits_BA.float(), samples.scores) * NUM_ANSWERS

    def _match(self, samples: Samples) -> Tensor:
        tokens, padding = pad(samples.texts, self.padded_length)
        images = self.beit3(visual_tokens=samples.pixels)["encoder_out"][:, 0]
        texts = self.beit3(textual_tokens=tokens, text_padding_position=padding)["encoder_out"][:, 0]
        image_BD = F.normalize(self.vision_head(images), dim=-1)
        text_BD = F.normalize(self.language_head(texts), dim=-1)
        logits_BB = self.logit_scale.exp() * image_BD @ text_BD.t()
        labels = torch.arange(len(logits_BB), device=logits_BB.device)
        return (F.cross_entropy(logits_BB, labels) + F.cross_entropy(logits_BB.t(), labels)) / 2

    def _describe(self, samples: Samples) -> Tensor:
        tokens, padding = pad(samples.texts, self.padded_length)
        hidden = torch.zeros_like(tokens, dtype=torch.bool)
        for row, masked in enumerate(samples.masked):
            hidden[row, masked] = True
        image_rows = self.beit3.vision_embed.num_position_embeddings()
        y_BSD = self.beit3(
            textual_tokens=tokens.masked_fill(hidden, self.mask_id),
            visual_tokens=samples.pixels,
            text_padding_position=padding,
            attn_mask=caption_mask(image_rows, tokens.shape[1], tokens.device),
        )["encoder_out"]
        logits_MV = self.mlm_head(y_BSD[:, image_rows:][hidden])
        return smoothed_loss(logits_MV.float(), tokens[hidden])


def caption_mask(image_rows: int, length: int, device: torch.device) -> Tensor:
    """Returns an attention mask for captioning, (rows, rows) int64, with 1 for keys that a query must not see.

    Image rows see all image rows. Text rows see all image rows, themselves and earlier text rows.
    """
    rows = image_rows + length
    seen = torch.zeros(rows, rows, dtype=torch.int64, device=device)
    seen[:, :image_rows] = 1
    seen[image_rows:, image_rows:] = torch.tril(torch.ones(length, length, dtype=torch.int64, device=device))
    return 1 - seen


def smoothed_loss(logits_MV: Tensor, target_M: Tensor) -> Tensor:
    """Returns the mean KL divergence between smoothed labels and predictions, with a full (M, V) label matrix."""
    vocab_size = logits_MV.shape[1]
    label_MV = torch.zeros_like(logits_MV).scatter(1, target_M[:, None], 1)
    label_MV = label_MV * (1 - LABEL_SMOOTHING) + (1 - label_MV) * LABEL_SMOOTHING / (vocab_size - 1)
    return F.kl_div(F.log_softmax(logits_MV, dim=1), label_MV, reduction="none").sum(1).mean()


def pad(texts: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Returns token ids padded to `length` tokens, (B, length) int64, and a bool mask that is True at padding."""
    tokens = pad_sequence(list(texts), batch_first=True, padding_value=PAD)
    tokens = F.pad(tokens, (0, length - tokens.shape[1]), value=PAD)
    lengths = torch.tensor([len(text) for text in texts], device=tokens.device)
    return tokens, torch.arange(length, device=tokens.device) >= lengths[:, None]


class ReferenceTrainer:
    """Trains a `ReferenceModel` with torch's fused AdamW and gradient clipping."""

    def __init__(self, task: str, config: RunConfig, device: torch.device) -> None:
        training = config.training
        self.device, self.max_norm = device, config.deepspeed["gradient_clipping"]
        torch.manual_seed(training.seed)
        self.model = ReferenceModel(task, config.model).to(device).train()
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": training.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=training.learning_rate, betas=training.adam_betas, eps=training.adam_epsilon, fused=True
        )

    def step(self, samples: Samples) -> float:
        """Trains one step and returns the loss; computes in float32 on a CPU, and under bfloat16 autocast on a GPU."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(samples)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item())


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
