"""Trains torchscale 0.3.0's BEiT-3 like microsoft/unilm; this is the reference of `beit3 bench train`.

The model, initial values, parameter groups and order of the step follow microsoft/unilm's `beit3`. The pretraining code
of BEiT-3 was never released, so the masked-modeling losses follow BEiT v2. Texts are padded to a fixed length, as
`_get_text_segment` does in unilm's datasets.py. As an option, they are padded to the longest text of the batch. Other
differences from unilm only make this file faster: logits are computed only at masked positions, AdamW is torch's fused
version, and gradients are freed after every step.

Ratios to the reference are comparable only while this code stays the same. So tests/benchmarks/step/test_benchmark.py
checks a hash of this code.
"""

# B samples of one kind, N patches per image, S tokens of the longest text, D hidden.

import importlib.metadata
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.tasks.pretraining.targets import MASKED_TOKENS, TARGET_IDS, VISUAL_CODES

TORCHSCALE = "0.3.0"
_PAD = 1
_MAX_POSITIONS = 1024
_NO_DECAY = ("beit3.encoder.embed_positions.A.weight", "beit3.vision_embed.cls_token")


class PaddedStream(NamedTuple):
    """Holds B padded samples of one stream (images, pairs or texts). Tensors of a missing modality are None."""

    pixels: Tensor | None
    """Images, (B, 3, image_size, image_size) float32."""
    patch_mask: Tensor | None
    """True where a patch is masked, (B, patches) bool."""
    codes: Tensor | None
    """Target codes of the masked patches in order, (masked patches,) int64."""
    tokens: Tensor | None
    """Token ids, (B, padded length) int64."""
    padding: Tensor | None
    """True at padding positions, (B, padded length) bool."""
    token_mask: Tensor | None
    """True where a token is masked, (B, padded length) bool."""
    targets: Tensor | None
    """Target ids of the masked tokens in order, (masked tokens,) int64."""

    @property
    def num_masked(self) -> tuple[int, int]:
        """Returns the number of masked patches and the number of masked tokens."""
        return 0 if self.codes is None else len(self.codes), 0 if self.targets is None else len(self.targets)


def check_torchscale() -> None:
    """Checks that torchscale is installed in the right version, and timm in any version.

    Raises:
        ConfigError: if a package is missing, or torchscale has another version; the message contains a command that
            installs both.
    """
    for package, wanted in (("torchscale", TORCHSCALE), ("timm", None)):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "absent"
        if found == "absent" or (wanted and found != wanted):
            # Its pins require versions that no longer exist, hence --no-deps.
            raise ConfigError(
                f"bench train compares with torchscale {TORCHSCALE} (on timm), but {package} is {found}. Run: "
                f"pip install --no-deps torchscale=={TORCHSCALE} && pip install timm"
            )


def build_torchscale(arguments: Mapping[str, Any]) -> Any:
    """Builds torchscale's BEiT3 without the package fairscale, which torchscale imports but needs only for FSDP."""
    if "fairscale" not in sys.modules:
        stub: Any = types.ModuleType("fairscale.nn")
        stub.checkpoint_wrapper = stub.wrap = lambda module, **_: module
        sys.modules |= {"fairscale": types.ModuleType("fairscale"), "fairscale.nn": stub}
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    return BEiT3(EncoderConfig(**arguments))


class ReferenceModel(nn.Module):
    """Combines torchscale's backbone with the two masked-modeling heads."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        model = config.model
        self.beit3 = build_torchscale(
            {
                "img_size": model.image_size,
                "patch_size": model.patch_size,
                "vocab_size": model.text_vocab_size,
                "multiway": True,
                "layernorm_embedding": False,
                "normalize_output": True,
                "no_output_layer": True,
                "drop_path_rate": model.drop_path_rate,
                "encoder_embed_dim": model.hidden_size,
                "encoder_attention_heads": model.num_attention_heads,
                "encoder_ffn_embed_dim": model.ffn_hidden_size,
                "encoder_layers": model.num_layers,
                "max_source_positions": _MAX_POSITIONS,
            }
        )
        self.mlm_head = nn.Linear(model.hidden_size, model.text_vocab_size)
        self.mim_head = nn.Linear(model.hidden_size, model.visual_vocab_size)
        self.apply(_init_weights)

    def forward(self, stream: PaddedStream) -> list[Tensor]:
        """Returns two losses: the mean cross entropy of masked patches, and the mean cross entropy of masked tokens.

        A stream without images or without texts gives only one of these losses.
        """
        y_BSD = self.beit3(
            textual_tokens=stream.tokens,
            visual_tokens=stream.pixels,
            text_padding_position=stream.padding,
            vision_masked_position=stream.patch_mask,
        )["encoder_out"]
        losses = []
        if stream.patch_mask is not None and stream.codes is not None:
            patches = y_BSD[:, 1 : 1 + stream.patch_mask.shape[1]]
            losses.append(F.cross_entropy(self.mim_head(patches[stream.patch_mask]), stream.codes))
        if stream.token_mask is not None and stream.targets is not None:
            words = y_BSD[:, -stream.token_mask.shape[1] :]
            losses.append(F.cross_entropy(self.mlm_head(words[stream.token_mask]), stream.targets))
        return losses


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class ReferenceTrainer:
    """Trains a `ReferenceModel` with AdamW and gradient clipping."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        training = config.training
        self.device, self.max_norm = device, config.deepspeed["gradient_clipping"]
        self.model = ReferenceModel(config).to(device)
        decay: list[nn.Parameter] = []
        no_decay: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            (no_decay if parameter.ndim == 1 or name in _NO_DECAY else decay).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": decay, "weight_decay": training.weight_decay},
            {"params": no_decay, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=training.learning_rate, betas=training.adam_betas, eps=training.adam_epsilon, fused=True
        )

    def step(self, streams: Sequence[PaddedStream]) -> float:
        """Trains one step and returns the loss: one forward pass per stream, one backward pass and one update.

        Computes in float32 on a CPU, and under bfloat16 autocast on a GPU.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = torch.stack([term for stream in streams for term in self.model(stream)]).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def unpack_streams(batch: PackedBatch, caption_length: int | None, text_length: int | None) -> list[PaddedStream]:
    """Returns a batch's images, pairs and texts in the form that the reference's data loaders give: padded streams.

    Args:
        batch: batch with pixels and visual codes.
        caption_length: padded length of captions; None pads to the longest caption.
        text_length: padded length of texts; None pads to the longest text.
    """
    assert batch.pixels is not None, "a batch with pixels"
    masked_tokens, target_ids = batch.targets[MASKED_TOKENS], batch.targets[TARGET_IDS]
    images, pairs = batch.num_images, batch.num_pairs
    num_codes, num_tokens = int(batch.patch_mask[:images].sum()), sum(batch.caption_lengths)
    num_targets = int((masked_tokens < num_tokens).sum())
    masked = torch.zeros_like(batch.token_ids, dtype=torch.bool).index_fill_(0, masked_tokens, True)
    pixels, patch_mask, codes = batch.pixels, batch.patch_mask, batch.targets[VISUAL_CODES]
    captions = _pad(batch.token_ids[:num_tokens], masked[:num_tokens], batch.caption_lengths, caption_length)
    texts = _pad(batch.token_ids[num_tokens:], masked[num_tokens:], batch.text_lengths, text_length)
    no_image, no_text = (None, None, None), (None, None, None, None)
    return [
        PaddedStream(pixels[:images], patch_mask[:images], codes[:num_codes], *no_text),
        PaddedStream(
            pixels[images : images + pairs],
            patch_mask[images : images + pairs],
            codes[num_codes:],
            *captions,
            target_ids[:num_targets],
        ),
        PaddedStream(*no_image, *texts, target_ids[num_targets:]),
    ]


def _pad(ids: Tensor, masked: Tensor, lengths: Sequence[int], length: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Pads texts; returns token ids, a mask that is True at padding, and a mask that is True at masked tokens."""
    tokens = pad_sequence(list(ids.split(list(lengths))), batch_first=True, padding_value=_PAD)
    token_mask = pad_sequence(list(masked.split(list(lengths))), batch_first=True, padding_value=False)
    missing = 0 if length is None else length - tokens.shape[1]
    tokens, token_mask = F.pad(tokens, (0, missing), value=_PAD), F.pad(token_mask, (0, missing), value=False)
    padding = torch.arange(tokens.shape[1], device=ids.device) >= torch.tensor(lengths, device=ids.device)[:, None]
    return tokens, padding, token_mask
